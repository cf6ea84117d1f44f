// What the bytes of a tile stand for. Numbers are taken eight at a time, dims e .. e + 7 of a token's row with e a multiple of 8:
//     kvl_raw8   their bytes, as loaded (kvl_load8)
//     kvl_eight  numbers as f32: codes (kvl_codes8), or what they stand for (kvl_numbers8)
// and  number = code * scale + zero, where scale and zero are of the row or a group of it (kvl_row_scale) or of a channel
// (kvl_channel_scales). Values are the same bit for bit in every variant: KVL_FP16 only makes codes two at a time with 16-bit
// arithmetic, where they are exact. Nothing here depends on whether a device keeps subnormal numbers, but for F16 rows.
//
// `format` is a specialisation constant at every call, so what a pipeline does not use is gone before code is made.
#ifndef KVL_FORMATS_GLSL
#define KVL_FORMATS_GLSL
#include "tables.glsl"
#if KVL_FP16
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#endif

// The pages once more, for loads of 4 and 8 bytes.
layout(set = 0, binding = KVLI_VK_PAGES, std430) KVL_PAGES_ACCESS buffer kvl_pages_words { uint d[]; } pages_words[BANKS];
layout(set = 0, binding = KVLI_VK_PAGES, std430) KVL_PAGES_ACCESS buffer kvl_pages_pairs { uvec2 d[]; } pages_pairs[BANKS];

struct kvl_raw8 {
    uvec4 low, high; // F32: all; 16 bits: low; 8 bits: low.xy; 4 bits: low.x
};
struct kvl_eight {
    vec4 low, high;
};
kvl_eight kvl_madd8(kvl_eight x, kvl_eight scale, kvl_eight zero) {
    return kvl_eight(fma(x.low, scale.low, zero.low), fma(x.high, scale.high, zero.high));
}
kvl_eight kvl_madd8(kvl_eight x, vec2 scale_zero) {
    return kvl_eight(fma(x.low, vec4(scale_zero.x), vec4(scale_zero.y)),
                     fma(x.high, vec4(scale_zero.x), vec4(scale_zero.y)));
}
kvl_eight kvl_scaled8(kvl_eight x, float scale) { return kvl_eight(x.low * scale, x.high * scale); }

// ---- properties of formats ----
bool kvl_is_16_bit(uint f) { return f == KVLI_GPU_F16 || f == KVLI_GPU_BF16; }
bool kvl_is_4_bit(uint f) { return f == KVLI_GPU_NVFP4 || f == KVLI_GPU_INT4 || f == KVLI_GPU_INT4_CHANNEL; }
bool kvl_is_per_channel(uint f) { return f == KVLI_GPU_INT8_CHANNEL || f == KVLI_GPU_INT4_CHANNEL; }
// One scale for a token's row, without a zero.
bool kvl_is_per_token(uint f) { return f == KVLI_GPU_INT8 || f == KVLI_GPU_FP8_E4M3; }
// Scales for groups of a token's row: NVFP4 16 dims, INT4 64, with zeros.
bool kvl_is_per_group(uint f) { return f == KVLI_GPU_NVFP4 || f == KVLI_GPU_INT4; }

// ---- small floats, exactly ----
// Magnitudes whose exponent field was moved up into that of a wider float: they are true but for subnormals, which got a leading
// one that they lack. If a float of the least exponent is `least`, x is the smaller one of itself and 2 x - least.
vec4 kvl_without_subnormals(vec4 x, float least) { return min(x, x + (x - least)); }

// A finite f16 in the low half of a word.
float kvl_f16(uint h) {
    float x = uintBitsToFloat(((h & 0x7fff) << 13) + (112u << 23)), least = 1.0 / 16384;
    return uintBitsToFloat(floatBitsToUint(min(x, x + (x - least))) | (h & 0x8000) << 16);
}
vec2 kvl_f16x2(uint w) { return vec2(kvl_f16(w & 0xffff), kvl_f16(w >> 16)); }
// An e4m3 without a sign.
float kvl_e4m3(uint b) {
    float x = uintBitsToFloat((b << 20) + (120u << 23)), least = 1.0 / 64;
    return min(x, x + (x - least));
}

// ---- codes ----
#if KVL_FP16
// An integer in the low bits of 1024's mantissa is 1024 + that integer.
f16vec2 kvl_above_1024(uint two) { return unpackFloat2x16(two | 0x64006400); }
vec4 kvl_bytes(uint w, float16_t zero) {
    f16vec2 even = kvl_above_1024(w & 0x00ff00ff) - zero, odd = kvl_above_1024(w >> 8 & 0x00ff00ff) - zero;
    return vec4(even.x, odd.x, even.y, odd.y);
}
vec4 kvl_int8(uint w) { return kvl_bytes(w ^ 0x80808080, float16_t(1152)); }
vec4 kvl_uint8(uint w) { return kvl_bytes(w, float16_t(1024)); }
// Dims i and i + 4.
vec2 kvl_uint4(uint w, uint i) { return vec2(kvl_above_1024(w >> 4 * i & 0x000f000f) - float16_t(1024)); }
// Numbers and signs of two small floats that stand in the high bits of halves.
f16vec2 kvl_signed(f16vec2 x, float16_t least, uint signs) {
    x = min(x, x + (x - least));
    return unpackFloat2x16(packFloat2x16(x) | signs & 0x80008000);
}
f16vec2 kvl_fp8_pair(uint w) { // of bytes 0 and 2
    return kvl_signed(unpackFloat2x16(((w & 0x007f007f) << 7) + 0x20002000), float16_t(1.0 / 64), w << 8);
}
vec4 kvl_fp8(uint w) {
    f16vec2 even = kvl_fp8_pair(w), odd = kvl_fp8_pair(w >> 8);
    return vec4(even.x, odd.x, even.y, odd.y);
}
// Quarters of dims i and i + 4.
vec2 kvl_e2m1(uint w, uint i) {
    uint at = w >> 4 * i;
    return vec2(kvl_signed(unpackFloat2x16((at & 0x00070007) << 9 | 0x30003000), float16_t(0.25), at << 12));
}
#else
vec4 kvl_int8(uint w) {
    int x = int(w);
    return vec4(bitfieldExtract(x, 0, 8), bitfieldExtract(x, 8, 8), bitfieldExtract(x, 16, 8), x >> 24);
}
vec4 kvl_uint8(uint w) { return vec4(w & 0xff, w >> 8 & 0xff, w >> 16 & 0xff, w >> 24); }
vec2 kvl_uint4(uint w, uint i) { return vec2(w >> 4 * i & 15, w >> 4 * i + 16 & 15); }
// Numbers of small floats, sign in the highest bit, at the place of an f32's exponent and mantissa.
vec4 kvl_signed(uvec4 bits, float least) {
    vec4 x = kvl_without_subnormals(uintBitsToFloat(bits & 0x7fffffff), least);
    return uintBitsToFloat(floatBitsToUint(x) | bits & 0x80000000);
}
vec4 kvl_fp8(uint w) {
    uvec4 at = uvec4(ivec4(w << 24, w << 16, w << 8, w) >> 4);
    return kvl_signed((at & 0x87f00000) + (120u << 23), 1.0 / 64);
}
vec2 kvl_e2m1(uint w, uint i) {
    uvec2 at = uvec2(ivec2(w << 28 - 4 * i, w << 12 - 4 * i) >> 6);
    return kvl_signed(uvec4(at & 0x81c00000 | 124u << 23, 0, 0), 0.25).xy;
}
#endif

// The codes of eight numbers; of floats the numbers. NVFP4: quarters, the other 4 is in the scale.
kvl_eight kvl_codes8(const uint format, kvl_raw8 r) {
    uvec4 w = r.low;
    if (format == KVLI_GPU_F32) return kvl_eight(uintBitsToFloat(w), uintBitsToFloat(r.high));
    if (format == KVLI_GPU_BF16)
        return kvl_eight(uintBitsToFloat(uvec4(w.x << 16, w.x & 0xffff0000, w.y << 16, w.y & 0xffff0000)),
                         uintBitsToFloat(uvec4(w.z << 16, w.z & 0xffff0000, w.w << 16, w.w & 0xffff0000)));
    if (format == KVLI_GPU_F16)
        return kvl_eight(vec4(unpackHalf2x16(w.x), unpackHalf2x16(w.y)),
                         vec4(unpackHalf2x16(w.z), unpackHalf2x16(w.w)));
    if (format == KVLI_GPU_INT8) return kvl_eight(kvl_int8(w.x), kvl_int8(w.y));
    if (format == KVLI_GPU_INT8_CHANNEL) return kvl_eight(kvl_uint8(w.x), kvl_uint8(w.y));
    if (format == KVLI_GPU_FP8_E4M3) return kvl_eight(kvl_fp8(w.x), kvl_fp8(w.y));
    vec2 x[4];
    [[unroll]] for (uint i = 0; i < 4; i++) x[i] = format == KVLI_GPU_NVFP4 ? kvl_e2m1(w.x, i) : kvl_uint4(w.x, i);
    return kvl_eight(vec4(x[0].x, x[1].x, x[2].x, x[3].x), vec4(x[0].y, x[1].y, x[2].y, x[3].y));
}

// ---- loads: `tile` as in kvl_tiles, in units of 16 bytes ----
kvl_raw8 kvl_load8(const uint format, uint bank, uint tile, uint token, uint e) {
    const uint row_bytes = kvli_gpu_row_bytes(format, DIM);
    kvl_raw8 r = kvl_raw8(uvec4(0), uvec4(0));
    if (format == KVLI_GPU_F32) {
        uint at = tile + token * (row_bytes / 16) + e / 4;
        r.low = pages[bank].d[at];
        r.high = pages[bank].d[at + 1];
    } else if (kvl_is_16_bit(format)) {
        r.low = pages[bank].d[tile + token * (row_bytes / 16) + e / 8];
    } else if (kvl_is_4_bit(format)) {
        r.low.x = pages_words[bank].d[4 * tile + token * (row_bytes / 4) + e / 8];
    } else {
        r.low.xy = pages_pairs[bank].d[2 * tile + token * (row_bytes / 8) + e / 8];
    }
    return r;
}

// Words from a tile's start to its scales.
uint kvl_scales_at(const uint format) { return BLOCK_TOKENS * kvli_gpu_row_bytes(format, DIM) / 4; }

// Scale and zero of dim e in a token's row, as they stand (kvl_load_row_scale), and as numbers: (1, 0) where the format has none.
// `factor` is 1, or of NVFP4 the layer's global.
uint kvl_load_row_scale(const uint format, uint bank, uint tile, uint token, uint e) {
    uint at = 4 * tile + kvl_scales_at(format);
    if (kvl_is_per_token(format)) return pages_words[bank].d[at + token / 2] >> 16 * (token & 1);
    if (format == KVLI_GPU_INT4) return pages_words[bank].d[at + token * ((DIM + 63) / 64) + e / 64];
    if (format != KVLI_GPU_NVFP4) return 0;
    uint i = token * (DIM / 16) + e / 16;
    return pages_words[bank].d[at + i / 4] >> 8 * (i & 3);
}
vec2 kvl_row_scale(const uint format, uint raw, float factor) {
    if (kvl_is_per_token(format)) return vec2(kvl_f16(raw & 0xffff) * factor, 0);
    if (format == KVLI_GPU_INT4) return kvl_f16x2(raw) * factor;
    if (format == KVLI_GPU_NVFP4) return vec2(kvl_e4m3(raw & 0x7f) * (4 * factor), 0);
    return vec2(factor, 0);
}

// Scales (which = 0) or zeros (1) of eight channels, of a format per channel.
kvl_eight kvl_channel_scales(const uint format, uint bank, uint tile, uint e, const uint which) {
    uvec4 w = pages[bank].d[tile + kvl_scales_at(format) / 4 + which * (DIM / 8) + e / 8];
    return kvl_eight(vec4(kvl_f16x2(w.x), kvl_f16x2(w.y)), vec4(kvl_f16x2(w.z), kvl_f16x2(w.w)));
}

// Eight numbers of a tile, true but for a rotation. (Loops over tokens that read a format per channel do better to load its
// scales once.)
kvl_eight kvl_numbers8(const uint format, float factor, uint bank, uint tile, uint token, uint e) {
    kvl_eight x = kvl_codes8(format, kvl_load8(format, bank, tile, token, e));
    if (kvl_is_per_channel(format))
        return kvl_madd8(x, kvl_channel_scales(format, bank, tile, e, 0), kvl_channel_scales(format, bank, tile, e, 1));
    if (!kvl_is_per_token(format) && !kvl_is_per_group(format)) return x;
    return kvl_madd8(x, kvl_row_scale(format, kvl_load_row_scale(format, bank, tile, token, e), factor));
}
#endif
