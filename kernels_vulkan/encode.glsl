// The encoders: what kvlite.h's >>formats does, so that the bytes are the same. A code is the nearest by comparison with exact
// midpoints times the scale: an estimate is off by one at most and is corrected, so that no byte depends on how a device
// divides. Rounding is integer arithmetic. Float products and sums are `precise`: none is fused.
//   A device may flush f32 denormals. No byte depends on them: numbers that small get code 0 (a scale is at least 2^-24), and
// extremes, signs and zeros are compared as integers. (But for NVFP4 with a global scale below 2^-50, where squared errors may
// be denormal.)
//   Rows: 16 numbers an invocation ("unit" of a row), the units of a row next to one another, padded to a power of two; a group
// of NVFP4 is a unit's, one of INT4 four units'. Channels: 8 an invocation, the tokens divided among those that have the same.
#ifndef KVL_ENCODE_GLSL
#define KVL_ENCODE_GLSL
#include "floats.glsl"
#include "tables.glsl"

const uint KVL_UNIT = 16, KVL_CHANNELS = 8, KVL_INT4_UNITS = 4;
const uint KVL_MAX_SCALE_WORDS = 256; // of a tile: 64 tokens of 256 numbers, one e4m3 for each 16, or f16 pairs for each 64

// Numbers that invocations exchange: number i of an invocation at i * WORKGROUP + invocation.
shared float kvl_exchange[KVL_UNIT * WORKGROUP];
shared uint kvl_scales[KVL_MAX_SCALE_WORDS];

// A side of a tile: the format of its packed tiles, and a constant of NVFP4. Its place: a bank, and a unit of 16 bytes.
struct kvl_side {
    uint format;
    bool rotated;
    float global;
};
struct kvl_place {
    uint bank, at;
};

bool kvl_has(uint format) { return K_FORMAT == format || V_FORMAT == format; } // so that other encoders are left out
uint kvl_local() { return gl_LocalInvocationID.x; }

// ---- numbers ----
// A number of an exact format, as the bits of an f32, and back. `h`: in the low bits.
uint kvl_widened(uint format, uint h) {
    return format == KVLI_GPU_F16 ? floatBitsToUint(kvl_f16_to_f32(h & 0xffffu)) : h << 16;
}
uint kvl_narrowed2(uint format, uint low, uint high) {
    return format == KVLI_GPU_F16 ? kvl_f32_to_f16(low) | kvl_f32_to_f16(high) << 16
                                  : kvl_f32_to_bf16(low) | kvl_f32_to_bf16(high) << 16;
}
uint kvl_number_bytes(uint format) { return format == KVLI_GPU_F32 ? 4 : 2; }

// Of a positive number; at most 448.
uint kvl_f32_to_e4m3(float x) {
    uint magnitude = min(floatBitsToUint(x), 0x43e00000u);
    if (magnitude >= 0x3c800000u) return (magnitude - 0x3c000000u + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
    return kvl_shift_rounded((magnitude & 0x7fffffu) | 0x800000u, 141u - (magnitude >> 23)); // in steps of 2^-9
}
float kvl_e4m3_to_f32(uint b) {
    return b >= 8 ? uintBitsToFloat((b << 20) + 0x3c000000u) : kvl_mul(float(b), 0.001953125);
}
// What lies between codes b - 1 and b, or where b is 0 less than anything.
float kvl_e4m3_below(uint b) {
    uint twice = 2 * b - 1;
    return b == 0 ? -1.0 : b > 8 ? uintBitsToFloat((twice << 19) + 0x3c000000u) : kvl_mul(float(twice), 0.0009765625);
}

// f16 that stays finite; the same for a scale, where 0 becomes 1.
uint kvl_f16_saturated(float x) { return kvl_f32_to_f16(floatBitsToUint(clamp(x, -65504.0, 65504.0))); }
uint kvl_f16_scale(float x) {
    uint h = kvl_f16_saturated(x);
    return (h & 0x7fffu) != 0 ? h : 0x3c00u;
}

// f32(1 / x) of a positive x: an estimate, corrected by its exact remainder.
float kvl_reciprocal(float x) {
    uint bits = floatBitsToUint(x), exponent = bits >> 23, m = (bits & 0x7fffffu) | 0x800000u;
    if (m == 0x800000u) return uintBitsToFloat((254u - exponent) << 23);
    uint r = uint(140737488355328.0 / float(m)); // 2^47 / m, of 24 bits
    int left = int(0u - m * r);                  // 2^47 - m * r, which is small
    while (2 * left > int(m)) r++, left -= int(m);
    while (2 * left < -int(m)) r--, left += int(m);
    return uintBitsToFloat((253u - exponent) << 23 | (r & 0x7fffffu));
}

// Order of floats as that of unsigned integers, and back. The least of zeros of both signs is +0.
uint kvl_ordered(float x) {
    uint bits = floatBitsToUint(x);
    return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}
float kvl_from_ordered(uint o) {
    uint bits = (o >> 31) != 0 ? o & 0x7fffffffu : ~o;
    return uintBitsToFloat(bits == 0x80000000u ? 0u : bits);
}

// ---- exact rows ----
// 8 numbers from a tile of exact rows; `index` is the first's in it, a multiple of 8.
void kvl_load8(kvl_place tile, uint index, out float x[8]) {
    if (EXACT_FORMAT == KVLI_GPU_F32) {
        [[unroll]] for (uint i = 0; i < 2; i++) {
            uvec4 w = pages[tile.bank].d[tile.at + index / 4 + i];
            [[unroll]] for (uint j = 0; j < 4; j++) x[4 * i + j] = uintBitsToFloat(w[j]);
        }
        return;
    }
    uvec4 w = pages[tile.bank].d[tile.at + index / 8];
    [[unroll]] for (uint j = 0; j < 4; j++) {
        x[2 * j] = uintBitsToFloat(kvl_widened(EXACT_FORMAT, w[j]));
        x[2 * j + 1] = uintBitsToFloat(kvl_widened(EXACT_FORMAT, w[j] >> 16));
    }
}

// Is a number of this word (one F32, two of the others) infinite or NaN? Adding to the exponent's last bit carries into the
// sign's place where the exponent is all ones.
bool kvl_not_finite(uint format, uint w) {
    if (format == KVLI_GPU_F32) return (w & 0x7f800000u) == 0x7f800000u;
    return (((w & 0x7fff7fffu) + (format == KVLI_GPU_F16 ? 0x04000400u : 0x00800080u)) & 0x80008000u) != 0;
}

// 8 numbers, as the bits of f32, to a tile of exact rows; false if one is not finite as it stands there.
bool kvl_store8(uint format, kvl_place tile, uint index, uint x[8]) {
    bool finite = true;
    if (format == KVLI_GPU_F32) {
        [[unroll]] for (uint i = 0; i < 2; i++) {
            pages[tile.bank].d[tile.at + index / 4 + i] = uvec4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
            [[unroll]] for (uint j = 0; j < 4; j++) finite = finite && !kvl_not_finite(format, x[4 * i + j]);
        }
        return finite;
    }
    uvec4 w;
    [[unroll]] for (uint j = 0; j < 4; j++) {
        w[j] = kvl_narrowed2(format, x[2 * j], x[2 * j + 1]);
        finite = finite && !kvl_not_finite(format, w[j]);
    }
    pages[tile.bank].d[tile.at + index / 8] = w;
    return finite;
}

// ---- codes ----
// An f16 scale, and about 1 / s.
struct kvl_scale {
    float s, inverse;
};
kvl_scale kvl_scale_of(uint h) {
    float s = kvl_f16_to_f32(h);
    return kvl_scale(s, 1.0 / s);
}

// The nearest to x / s of the integers 0..top, ties to even.
uint kvl_code(float x, kvl_scale scale, float top) {
    x = max(x, 0.0);
    uint c = uint(min(kvl_add(kvl_mul(x, scale.inverse), 0.5), top));
    float above = kvl_mul(kvl_add(float(c), 0.5), scale.s), below = kvl_mul(kvl_sub(float(c), 0.5), scale.s); // exact
    bool odd = (c & 1u) != 0;
    if (x > above || (x == above && odd)) return min(c + 1, uint(top));
    return x < below || (x == below && odd) ? c - 1 : c;
}

// The nearest to x / s of the codes of e4m3, without sign.
uint kvl_fp8_code(float x, kvl_scale scale) {
    uint b = kvl_f32_to_e4m3(kvl_mul(x, scale.inverse));
    float above = kvl_mul(kvl_e4m3_below(b + 1), scale.s), below = kvl_mul(kvl_e4m3_below(b), scale.s); // exact
    bool odd = (b & 1u) != 0;
    if (x > above || (x == above && odd)) return min(b + 1, 0x7eu);
    return x < below || (x == below && odd) ? b - 1 : b;
}

// ---- rows: x are an invocation's 16 numbers ----
// Butterflies at strides 1, 2, 4, ..., then one multiply; strides of 16 and more are between invocations.
void kvl_hadamard(inout float x[KVL_UNIT]) {
    uint block = min(DIM & (0u - DIM), 128u);
    [[unroll]] for (uint stride = 1; stride < KVL_UNIT; stride *= 2) {
        [[unroll]] for (uint i = 0; i < KVL_UNIT; i++) {
            if ((i & stride) != 0) continue;
            float lo = x[i], hi = x[i + stride];
            x[i] = kvl_add(lo, hi);
            x[i + stride] = kvl_sub(lo, hi);
        }
    }
    uint local = kvl_local();
    for (uint units = 1; units * KVL_UNIT < block; units *= 2) {
        barrier();
        [[unroll]] for (uint i = 0; i < KVL_UNIT; i++) kvl_exchange[i * WORKGROUP + local] = x[i];
        barrier();
        [[unroll]] for (uint i = 0; i < KVL_UNIT; i++) {
            float other = kvl_exchange[i * WORKGROUP + (local ^ units)];
            x[i] = kvl_add(other, (local & units) != 0 ? -x[i] : x[i]);
        }
    }
    float scale = block == 16 ? 0.25 : block == 32 ? 0.17677669529663687 : block == 64 ? 0.125 : 0.08838834764831845;
    [[unroll]] for (uint i = 0; i < KVL_UNIT; i++) x[i] = kvl_mul(x[i], scale);
}

float kvl_amax(float x[KVL_UNIT]) {
    uint amax = 0;
    [[unroll]] for (uint i = 0; i < KVL_UNIT; i++) amax = max(amax, floatBitsToUint(x[i]) & 0x7fffffffu);
    return uintBitsToFloat(amax);
}

// The greatest of what `units` neighbours have, twice.
void kvl_greatest(inout uint a, inout uint b, uint units) {
    uint local = kvl_local();
    barrier();
    kvl_exchange[local] = uintBitsToFloat(a);
    kvl_exchange[WORKGROUP + local] = uintBitsToFloat(b);
    barrier();
    for (uint i = 1; i < units; i++) {
        a = max(a, floatBitsToUint(kvl_exchange[local ^ i]));
        b = max(b, floatBitsToUint(kvl_exchange[WORKGROUP + (local ^ i)]));
    }
}

// INT8, FP8: returns the row's scale. INT4: scale and zero of the unit's group of 64, the last of a row perhaps short.
uint kvl_encode_steps(uint format, float x[KVL_UNIT], uint units, bool used, out uint words[4]) {
    bool int4 = kvl_has(KVLI_GPU_INT4) && format == KVLI_GPU_INT4, fp8 = kvl_has(KVLI_GPU_FP8_E4M3) && format == KVLI_GPU_FP8_E4M3;
    uint least = ~0u, most = 0, hz = 0;
    [[unroll]] for (uint i = 0; i < KVL_UNIT; i++) {
        least = min(least, kvl_ordered(x[i]));
        most = max(most, int4 ? kvl_ordered(x[i]) : floatBitsToUint(x[i]) & 0x7fffffffu);
    }
    least = used ? ~least : 0;
    most = used ? most : 0;
    kvl_greatest(least, most, int4 ? min(units, KVL_INT4_UNITS) : units);
    float range = uintBitsToFloat(most), z = 0.0;
    if (int4) {
        float lo = kvl_from_ordered(~least);
        hz = kvl_f16_saturated(lo);
        z = kvl_f16_to_f32(hz);
        range = kvl_sub(kvl_from_ordered(most), lo);
    }
    // f32(1 / 15), f32(1 / 448), f32(1 / 127)
    uint hs = kvl_f16_scale(kvl_mul(range, int4 ? 0.06666667014360428 : fp8 ? 0.0022321429569274187 : 0.007874015718698502));
    kvl_scale scale = kvl_scale_of(hs);
    words = uint[4](0, 0, 0, 0);
    [[unroll]] for (uint i = 0; i < KVL_UNIT; i++) {
        float v = int4 ? kvl_sub(x[i], z) : abs(x[i]);
        uint c = fp8 ? kvl_fp8_code(v, scale) : kvl_code(v, scale, int4 ? 15.0 : 127.0);
        bool negative = floatBitsToUint(x[i]) >> 31 != 0;
        if (int4)
            words[i / 8] |= c << 4 * (i % 8);
        else
            words[i / 4] |= (!negative ? c : fp8 ? c | 0x80u : (0u - c) & 0xffu) << 8 * (i % 4);
    }
    return hs | hz << 16;
}

// NVFP4: e4m3 scale that maps amax to a peak; 0 becomes 2^-9.
uint kvl_nvfp4_scale(float amax, float inverse, float per_global) {
    return max(kvl_f32_to_e4m3(kvl_mul(kvl_mul(amax, inverse), per_global)), 1u);
}

// Codes of 16 numbers under the scale s; returns their squared error, summed in element order. A tie goes up where that is
// even.
float kvl_nvfp4_codes(float x[KVL_UNIT], float s, out uint words[2]) {
    const float values[8] = float[8](0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0);
    const float midpoints[7] = float[7](0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0);
    float error = 0.0, limits[7];
    [[unroll]] for (uint m = 0; m < 7; m++) limits[m] = kvl_mul(midpoints[m], s);
    words = uint[2](0, 0);
    [[unroll]] for (uint i = 0; i < KVL_UNIT; i++) {
        float magnitude = abs(x[i]), value = 0.0;
        uint code = floatBitsToUint(x[i]) >> 28 & 8u;
        [[unroll]] for (uint m = 0; m < 7; m++) {
            bool above = (m & 1u) != 0 ? magnitude >= limits[m] : magnitude > limits[m];
            code += above ? 1 : 0;
            value = above ? values[m + 1] : value;
        }
        float d = kvl_sub(magnitude, kvl_mul(value, s));
        error = kvl_add(error, kvl_mul(d, d));
        words[i / 8] |= code << 4 * (i % 8);
    }
    return error;
}

// NVFP4: returns the unit's scale, of peak 6 or 4.
uint kvl_encode_nvfp4(float x[KVL_UNIT], float global, out uint words[4]) {
    float amax = kvl_amax(x), per_global = kvl_reciprocal(global), least = 0.0;
    uint best = 0;
    words = uint[4](0, 0, 0, 0);
    for (uint i = 0; i < 2; i++) {
        uint scale = kvl_nvfp4_scale(amax, i == 0 ? 0.1666666716337204 : 0.25, per_global), codes[2];
        float error = kvl_nvfp4_codes(x, kvl_mul(kvl_e4m3_to_f32(scale), global), codes);
        bool better = i == 0 || error < least;
        words[0] = better ? codes[0] : words[0];
        words[1] = better ? codes[1] : words[1];
        least = better ? error : least;
        best = better ? scale : best;
    }
    return best;
}

// The tile's scales, written when all rows are done: words that rows share.
void kvl_put_scale(uint format, uint t, uint unit, uint scale) {
    uint groups = (DIM + 63) / 64, i = t * (DIM / KVL_UNIT) + unit;
    if (format == KVLI_GPU_NVFP4) atomicOr(kvl_scales[i / 4], scale << 8 * (i % 4));
    if (format == KVLI_GPU_INT4 && unit % KVL_INT4_UNITS == 0) kvl_scales[t * groups + unit / KVL_INT4_UNITS] = scale;
    if ((format == KVLI_GPU_INT8 || format == KVLI_GPU_FP8_E4M3) && unit == 0) atomicOr(kvl_scales[t / 2], scale << 16 * (t % 2));
}

// Writes the codes of 16 numbers at `unit` of row t.
void kvl_encode_unit(kvl_side side, float x[KVL_UNIT], uint units, uint t, uint unit, bool used, kvl_place tile) {
    uint words[4] = uint[4](0, 0, 0, 0), scale = 0, n = t * (DIM / KVL_UNIT) + unit;
    bool wide = side.format == KVLI_GPU_INT8 || side.format == KVLI_GPU_FP8_E4M3;
    if (side.format == KVLI_GPU_NVFP4) {
        if (kvl_has(KVLI_GPU_NVFP4)) scale = kvl_encode_nvfp4(x, side.global, words);
    } else if (wide || kvl_has(KVLI_GPU_INT4)) {
        scale = kvl_encode_steps(side.format, x, units, used, words);
    }
    if (!used) return;
    if (wide) {
        pages[tile.bank].d[tile.at + n] = uvec4(words[0], words[1], words[2], words[3]);
    } else {
        pages[tile.bank].d[tile.at + n / 2][2 * (n % 2)] = words[0];
        pages[tile.bank].d[tile.at + n / 2][2 * (n % 2) + 1] = words[1];
    }
    kvl_put_scale(side.format, t, unit, scale);
}

void kvl_seal_rows(kvl_side side, kvl_place exact, kvl_place tile) {
    uint units = 4, local = kvl_local();
    while (units * KVL_UNIT < DIM) units *= 2;
    for (uint i = local; i < KVL_MAX_SCALE_WORDS; i += WORKGROUP) kvl_scales[i] = 0;
    barrier();
    uint unit = local % units, step = WORKGROUP / units;
    for (uint t0 = 0; t0 < BLOCK_TOKENS; t0 += step) { // every invocation takes part in the exchange
        uint t = t0 + local / units;
        bool used = t < BLOCK_TOKENS && unit * KVL_UNIT < DIM;
        float x[KVL_UNIT], half8[8];
        [[unroll]] for (uint i = 0; i < 2; i++) {
            half8 = float[8](0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0);
            if (used) kvl_load8(exact, t * DIM + unit * KVL_UNIT + 8 * i, half8);
            [[unroll]] for (uint j = 0; j < 8; j++) x[8 * i + j] = half8[j];
        }
        if (ROTATED != 0 && side.rotated) kvl_hadamard(x);
        kvl_encode_unit(side, x, units, t, unit, used, tile);
    }
    barrier();
    uint at = tile.at + kvli_gpu_row_bytes(side.format, DIM) * BLOCK_TOKENS / 16;
    uint n = kvli_gpu_token_scale_bytes(side.format, DIM) * BLOCK_TOKENS / 16;
    for (uint i = local; i < n; i += WORKGROUP)
        pages[tile.bank].d[at + i] = uvec4(kvl_scales[4 * i], kvl_scales[4 * i + 1], kvl_scales[4 * i + 2], kvl_scales[4 * i + 3]);
}

// ---- channels ----
uvec4 kvl_halves(uint h[KVL_CHANNELS]) {
    return uvec4(h[0] | h[1] << 16, h[2] | h[3] << 16, h[4] | h[5] << 16, h[6] | h[7] << 16);
}

void kvl_encode_channels(kvl_side side, kvl_place exact, kvl_place tile, uint group, uint part, uint parts,
                         uint least[KVL_CHANNELS], uint most[KVL_CHANNELS]) {
    bool wide = side.format == KVLI_GPU_INT8_CHANNEL;
    uint hs[KVL_CHANNELS], hz[KVL_CHANNELS], c[KVL_CHANNELS];
    float z[KVL_CHANNELS], x[8], top = wide ? 255.0 : 15.0;
    kvl_scale scale[KVL_CHANNELS];
    [[unroll]] for (uint i = 0; i < KVL_CHANNELS; i++) {
        float lo = kvl_from_ordered(least[i]);
        float range = kvl_sub(kvl_from_ordered(most[i]), lo);
        hz[i] = kvl_f16_saturated(lo);
        hs[i] = kvl_f16_scale(kvl_mul(range, wide ? 0.003921568859368563 : 0.06666667014360428)); // f32(1 / 255), f32(1 / 15)
        z[i] = kvl_f16_to_f32(hz[i]);
        scale[i] = kvl_scale_of(hs[i]);
    }
    uint n_groups = DIM / KVL_CHANNELS, zeros = DIM / 8; // f16 zeros stand after as many scales
    if (part == 0) {
        uint at = tile.at + kvli_gpu_row_bytes(side.format, DIM) * BLOCK_TOKENS / 16 + group;
        pages[tile.bank].d[at] = kvl_halves(hs);
        pages[tile.bank].d[at + zeros] = kvl_halves(hz);
    }
    for (uint t = part; t < BLOCK_TOKENS; t += parts) {
        uint n = t * n_groups + group;
        kvl_load8(exact, n * KVL_CHANNELS, x);
        [[unroll]] for (uint i = 0; i < KVL_CHANNELS; i++) c[i] = kvl_code(kvl_sub(x[i], z[i]), scale[i], top);
        if (wide) {
            pages[tile.bank].d[tile.at + n / 2][2 * (n % 2)] = c[0] | c[1] << 8 | c[2] << 16 | c[3] << 24;
            pages[tile.bank].d[tile.at + n / 2][2 * (n % 2) + 1] = c[4] | c[5] << 8 | c[6] << 16 | c[7] << 24;
        } else {
            pages[tile.bank].d[tile.at + n / 4][n % 4] = c[0] | c[1] << 4 | c[2] << 8 | c[3] << 12 | c[4] << 16 | c[5] << 20 |
                                                         c[6] << 24 | c[7] << 28;
        }
    }
}

void kvl_seal_channels(kvl_side side, kvl_place exact, kvl_place tile) {
    uint local = kvl_local(), groups = DIM / KVL_CHANNELS, parts = WORKGROUP / groups, part = local / groups, group = local % groups;
    bool used = part < parts;
    uint least[KVL_CHANNELS], most[KVL_CHANNELS];
    float x[8];
    [[unroll]] for (uint i = 0; i < KVL_CHANNELS; i++) least[i] = ~0u, most[i] = 0;
    for (uint t = part; used && t < BLOCK_TOKENS; t += parts) {
        kvl_load8(exact, (t * groups + group) * KVL_CHANNELS, x);
        [[unroll]] for (uint i = 0; i < KVL_CHANNELS; i++) {
            least[i] = min(least[i], kvl_ordered(x[i]));
            most[i] = max(most[i], kvl_ordered(x[i]));
        }
    }
    barrier();
    [[unroll]] for (uint i = 0; i < KVL_CHANNELS; i++) {
        kvl_exchange[2 * i * WORKGROUP + local] = uintBitsToFloat(least[i]);
        kvl_exchange[(2 * i + 1) * WORKGROUP + local] = uintBitsToFloat(most[i]);
    }
    barrier();
    if (!used) return;
    for (uint p = 0; p < parts; p++) {
        [[unroll]] for (uint i = 0; i < KVL_CHANNELS; i++) {
            least[i] = min(least[i], floatBitsToUint(kvl_exchange[2 * i * WORKGROUP + p * groups + group]));
            most[i] = max(most[i], floatBitsToUint(kvl_exchange[(2 * i + 1) * WORKGROUP + p * groups + group]));
        }
    }
    kvl_encode_channels(side, exact, tile, group, part, parts, least, most);
}

// ---- a tile ----
// Encodes a whole exact tile; the bytes up to the next multiple of 128 become 0.
void kvl_seal_tile(kvl_side side, kvl_place exact, kvl_place tile) {
    if (side.format == KVLI_GPU_INT8_CHANNEL || side.format == KVLI_GPU_INT4_CHANNEL) {
        if (kvl_has(KVLI_GPU_INT8_CHANNEL) || kvl_has(KVLI_GPU_INT4_CHANNEL)) kvl_seal_channels(side, exact, tile);
    } else if (side.format <= KVLI_GPU_BF16) {
        for (uint i = kvl_local() * 8; i < BLOCK_TOKENS * DIM; i += WORKGROUP * 8) {
            float x[8];
            uint bits[8];
            kvl_load8(exact, i, x);
            [[unroll]] for (uint j = 0; j < 8; j++) bits[j] = floatBitsToUint(x[j]);
            kvl_store8(side.format, tile, i, bits);
        }
    } else {
        kvl_seal_rows(side, exact, tile);
    }
    uint bytes = (kvli_gpu_row_bytes(side.format, DIM) + kvli_gpu_token_scale_bytes(side.format, DIM)) * BLOCK_TOKENS +
                 kvli_gpu_channel_scale_bytes(side.format, DIM);
    for (uint i = bytes / 16 + kvl_local(); i < (bytes + 127) / 128 * 8; i += WORKGROUP) pages[tile.bank].d[tile.at + i] = uvec4(0);
}
#endif
