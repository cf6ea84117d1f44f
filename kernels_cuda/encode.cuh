/* The encoders: what kvlite.h's >>formats does, the same float operations in the same order, so that the bytes are the
   same. Products that are added to must not be fused: every such operation is an intrinsic that rounds (_rn).

   Rows: 16 numbers a lane, the lanes of a row next to one another, padded to a power of two; a group of NVFP4 is a lane's, one
   of INT4 four lanes'. Channels: 4 a thread, the tokens divided among the threads that have the same channels. */
#ifndef KVL_ENCODE_CUH
#define KVL_ENCODE_CUH
#include "port.cuh"
#include "abi.h"

enum { KVL_LANE_DIMS = 16, KVL_THREAD_CHANNELS = 4, KVL_INT4_GROUP_LANES = 4 };

/* A side of a tile: its format and shape. */
struct kvl_side {
    uint32_t format, rotated, exact, tokens, dim;
    float global;
};

/* ---- loads and stores of exact numbers ---- */
KVL_D uint32_t kvl_number_bytes(uint32_t format) { return format == KVLI_GPU_F32 ? 4 : 2; }

KVL_D float kvl_from_half(uint32_t format, uint32_t h) {
    return format == KVLI_GPU_F16 ? kvl_h2f((uint16_t)h) : __uint_as_float(h << 16);
}

KVL_D void kvl_unpack2(uint32_t format, uint32_t w, float *x) {
    x[0] = kvl_from_half(format, w & 0xffffu);
    x[1] = kvl_from_half(format, w >> 16);
}

/* 4 numbers, aligned to as many. */
KVL_D void kvl_load4(uint32_t format, const uint8_t *p, float *x) {
    if (format == KVLI_GPU_F32) {
        uint4 v = kvl_ld16(p);
        x[0] = __uint_as_float(v.x), x[1] = __uint_as_float(v.y);
        x[2] = __uint_as_float(v.z), x[3] = __uint_as_float(v.w);
    } else {
        uint2 v = kvl_ld8(p);
        kvl_unpack2(format, v.x, x);
        kvl_unpack2(format, v.y, x + 2);
    }
}

/* 8 numbers, aligned to 16 bytes. */
KVL_D void kvl_load8(uint32_t format, const uint8_t *p, float *x) {
    if (format == KVLI_GPU_F32) {
        kvl_load4(format, p, x);
        kvl_load4(format, p + 16, x + 4);
    } else {
        uint4 v = kvl_ld16(p);
        kvl_unpack2(format, v.x, x);
        kvl_unpack2(format, v.y, x + 2);
        kvl_unpack2(format, v.z, x + 4);
        kvl_unpack2(format, v.w, x + 6);
    }
}

/* 8 numbers, aligned to a number. */
KVL_D void kvl_load8_unaligned(uint32_t format, const uint8_t *p, float *x) {
    KVL_UNROLL
    for (int i = 0; i < 8; i++)
        x[i] = format == KVLI_GPU_F32 ? __uint_as_float(kvl_ld4(p + 4 * i))
                                      : kvl_from_half(format, kvl_ld2(p + 2 * i));
}

KVL_D uint32_t kvl_pack2(uint32_t format, float low, float high) {
    return format == KVLI_GPU_F16 ? kvl_f22h2(low, high) : kvl_f22bf2(low, high);
}

/* Is a number of this word (one F32, two of the others) infinite or NaN? Adding to the exponent's last bit carries into
   the sign's place where the exponent is all ones. */
KVL_D bool kvl_not_finite(uint32_t format, uint32_t w) {
    if (format == KVLI_GPU_F32) return ((w & 0x7fffffffu) + 0x00800000u) >> 31;
    return ((w & 0x7fff7fffu) + (format == KVLI_GPU_F16 ? 0x04000400u : 0x00800080u)) & 0x80008000u;
}

/* 8 numbers to 16-byte words; false if one is not finite as it stands there. */
KVL_D bool kvl_store8(uint32_t format, const float *x, uint8_t *p) {
    uint32_t n = format == KVLI_GPU_F32 ? 2 : 1;
    bool finite = true;
    KVL_UNROLL
    for (uint32_t i = 0; i < 2; i++) {
        if (i >= n) break;
        uint32_t w[4];
        KVL_UNROLL
        for (uint32_t j = 0; j < 4; j++) {
            w[j] = n == 2 ? __float_as_uint(x[4 * i + j]) : kvl_pack2(format, x[2 * j], x[2 * j + 1]);
            finite &= !kvl_not_finite(format, w[j]);
        }
        kvl_st16(p + 16 * i, make_uint4(w[0], w[1], w[2], w[3]));
    }
    return finite;
}

/* ---- single numbers ---- */
/* f16 that stays finite; the same for a scale, where 0 becomes 1. */
KVL_D uint32_t kvl_f16_saturated(float x) { return kvl_f2h(fmaxf(fminf(x, 65504.0f), -65504.0f)); }
KVL_D uint32_t kvl_f16_scale(float x) {
    uint32_t h = kvl_f16_saturated(x);
    return h & 0x7fffu ? h : 0x3c00u;
}

/* An f16 scale. Its reciprocal makes quotients cheap: the corrected one is off by 2^-45 before it is rounded, and x / s, of
   24 bits by 11, is never so near to what lies between two floats, so that it rounds as x / s does. (Only where it is far
   below any code does the correction underflow; the sign of a zero is not kept.) */
struct kvl_scale {
    float s, inverse;
};
KVL_D kvl_scale kvl_scale_of(uint32_t h) {
    float s = kvl_h2f((uint16_t)h);
    return {s, __fdiv_rn(1.0f, s)};
}
KVL_D float kvl_quotient(float x, kvl_scale scale) {
    float q = __fmul_rn(x, scale.inverse);
    return __fmaf_rn(__fmaf_rn(-q, scale.s, x), scale.inverse, q);
}

/* rint(x / s) between lo and hi in the low bits (two's complement). 1.5 * 2^23 puts the rounding position at 1. */
KVL_D uint32_t kvl_code(float x, kvl_scale scale, float lo, float hi) {
    float q = fminf(fmaxf(kvl_quotient(x, scale), lo), hi);
    return __float_as_uint(__fadd_rn(q, 12582912.0f));
}

/* x with the sign of `sign_of`. */
KVL_D uint32_t kvl_to_e4m3(float x, float sign_of) {
    uint32_t sign = __float_as_uint(sign_of) >> 24 & 0x80u, magnitude = __float_as_uint(x) & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return sign | 0x7fu;
    if (magnitude > 0x43e00000u) magnitude = 0x43e00000u; /* 448 */
    uint32_t normal = (magnitude - 0x3c000000u + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
    /* below 2^-6: adding 2^14 puts the rounding position at 2^-9 */
    uint32_t small = __float_as_uint(__fadd_rn(__uint_as_float(magnitude), 16384.0f)) - 0x46800000u;
    return sign | (magnitude >= 0x3c800000u ? normal : small);
}

/* Of codes that are positive and finite. */
KVL_D float kvl_from_e4m3(uint32_t b) {
    return b >= 8 ? __uint_as_float((b << 20) + 0x3c000000u) : __fmul_rn((float)b, 0.001953125f);
}

KVL_D uint32_t kvl_bytes4(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

/* ---- rows: x are the 16 numbers of a lane ---- */
KVL_D void kvl_butterfly(float &a, float &b) {
    float lo = a, hi = b;
    a = __fadd_rn(lo, hi);
    b = __fsub_rn(lo, hi);
}

/* Butterflies at strides 1, 2, 4, ..., then one multiply; strides of 16 and more are between lanes. */
KVL_D void kvl_hadamard_lane(float *x, uint32_t dim) {
    uint32_t block = dim & (0u - dim);
    block = block > 128 ? 128 : block;
    KVL_UNROLL
    for (int stride = 1; stride < KVL_LANE_DIMS; stride *= 2) {
        KVL_UNROLL
        for (int i = 0; i < KVL_LANE_DIMS; i++)
            if (!(i & stride)) kvl_butterfly(x[i], x[i + stride]);
    }
    for (uint32_t lanes = 1; lanes * KVL_LANE_DIMS < block; lanes *= 2) {
        bool upper = threadIdx.x & lanes;
        KVL_UNROLL
        for (int i = 0; i < KVL_LANE_DIMS; i++) {
            float other = __shfl_xor_sync(~0u, x[i], (int)lanes);
            x[i] = __fadd_rn(other, upper ? -x[i] : x[i]);
        }
    }
    float scale = block == 16   ? 0.25f
                  : block == 32 ? 0.17677669529663687f
                  : block == 64 ? 0.125f
                                : 0.08838834764831845f;
    KVL_UNROLL
    for (int i = 0; i < KVL_LANE_DIMS; i++) x[i] = __fmul_rn(x[i], scale);
}

KVL_D float kvl_amax_lane(const float *x) {
    float amax = 0.0f;
    KVL_UNROLL
    for (int i = 0; i < KVL_LANE_DIMS; i++) amax = fmaxf(amax, fabsf(x[i]));
    return amax;
}

/* INT8 and FP8: returns the row's scale. */
KVL_D uint32_t kvl_encode_bytes(uint32_t format, const float *x, uint32_t lanes, uint32_t *words) {
    bool fp8 = format == KVLI_GPU_FP8_E4M3;
    float amax = kvl_amax_lane(x);
    for (uint32_t step = 1; step < lanes; step *= 2)
        amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, (int)step));
    uint32_t h = kvl_f16_scale(__fmul_rn(amax, fp8 ? 1.0f / 448.0f : 1.0f / 127.0f));
    kvl_scale scale = kvl_scale_of(h);
    KVL_UNROLL
    for (int w = 0; w < 4; w++) {
        uint32_t c[4];
        KVL_UNROLL
        for (int i = 0; i < 4; i++) {
            float v = x[4 * w + i];
            c[i] = fp8 ? kvl_to_e4m3(kvl_quotient(v, scale), v) : kvl_code(v, scale, -127.0f, 127.0f);
        }
        words[w] = kvl_bytes4(c[0], c[1], c[2], c[3]);
    }
    return h;
}

/* INT4: returns scale and zero of the lane's group of 64, the last of a row perhaps short. */
KVL_D uint32_t kvl_encode_int4(const float *x, uint32_t lanes, bool used, uint32_t *words) {
    float lo = used ? x[0] : INFINITY, hi = used ? x[0] : -INFINITY;
    KVL_UNROLL
    for (int i = 1; i < KVL_LANE_DIMS; i++) {
        lo = used ? fminf(lo, x[i]) : lo;
        hi = used ? fmaxf(hi, x[i]) : hi;
    }
    for (uint32_t step = 1; step < KVL_INT4_GROUP_LANES && step < lanes; step *= 2) {
        lo = fminf(lo, __shfl_xor_sync(~0u, lo, (int)step));
        hi = fmaxf(hi, __shfl_xor_sync(~0u, hi, (int)step));
    }
    lo = __fadd_rn(lo, 0.0f); /* -0 becomes 0: which of them is the least depends on the order */
    uint32_t hz = kvl_f16_saturated(lo), hs = kvl_f16_scale(__fmul_rn(__fsub_rn(hi, lo), 1.0f / 15.0f));
    float z = kvl_h2f((uint16_t)hz);
    kvl_scale scale = kvl_scale_of(hs);
    words[0] = words[1] = 0;
    KVL_UNROLL
    for (int i = 0; i < KVL_LANE_DIMS; i++)
        words[i / 8] |= (kvl_code(__fsub_rn(x[i], z), scale, 0.0f, 15.0f) & 15u) << 4 * (i % 8);
    return hs | hz << 16;
}

KVL_D uint32_t kvl_nvfp4_scale(float amax, float inverse, float per_global) {
    float x = __fmul_rn(__fmul_rn(amax, inverse), per_global);
    uint32_t b = kvl_to_e4m3(x, x);
    return b ? b : 1;
}

/* Codes of 16 numbers under the scale s; returns their squared error, summed in element order. A tie goes up where that
   is even. */
KVL_D float kvl_nvfp4_codes(const float *x, float s, uint32_t *words) {
    const float values[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
    const float midpoints[7] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f};
    float error = 0.0f;
    words[0] = words[1] = 0;
    KVL_UNROLL
    for (int i = 0; i < KVL_LANE_DIMS; i++) {
        float magnitude = fabsf(x[i]), value = 0.0f;
        uint32_t code = __float_as_uint(x[i]) >> 28 & 8u;
        KVL_UNROLL
        for (int m = 0; m < 7; m++) {
            float limit = __fmul_rn(midpoints[m], s);
            bool above = m & 1 ? magnitude >= limit : magnitude > limit;
            code += above;
            value = above ? values[m + 1] : value;
        }
        float d = __fsub_rn(magnitude, __fmul_rn(value, s));
        error = __fadd_rn(error, __fmul_rn(d, d));
        words[i / 8] |= code << 4 * (i % 8);
    }
    return error;
}

/* NVFP4: returns the lane's scale, of peak 6 or 4. */
KVL_D uint32_t kvl_encode_nvfp4(const float *x, float global, uint32_t *words) {
    float amax = kvl_amax_lane(x), per_global = __fdiv_rn(1.0f, global);
    uint32_t six = kvl_nvfp4_scale(amax, 1.0f / 6.0f, per_global);
    uint32_t four = kvl_nvfp4_scale(amax, 1.0f / 4.0f, per_global);
    uint32_t other[2];
    float error = kvl_nvfp4_codes(x, __fmul_rn(kvl_from_e4m3(six), global), words);
    bool better = kvl_nvfp4_codes(x, __fmul_rn(kvl_from_e4m3(four), global), other) < error;
    words[0] = better ? other[0] : words[0];
    words[1] = better ? other[1] : words[1];
    return better ? four : six;
}

/* Writes the codes and scales of 16 numbers at `unit` of row t. */
KVL_D void kvl_encode_lane(const kvl_side &side, const float *x, uint32_t lanes, uint32_t t, uint32_t unit,
                           bool used, uint8_t *tile) {
    uint32_t words[4], scale, dim = side.dim, n = side.tokens * dim;
    if (side.format == KVLI_GPU_INT4 || side.format == KVLI_GPU_NVFP4) {
        bool int4 = side.format == KVLI_GPU_INT4;
        scale = int4 ? kvl_encode_int4(x, lanes, used, words) : kvl_encode_nvfp4(x, side.global, words);
        if (!used) return;
        kvl_st8(tile + (t * dim + unit * KVL_LANE_DIMS) / 2, make_uint2(words[0], words[1]));
        uint8_t *scales = tile + n / 2;
        uint32_t groups = (dim + 63) / 64;
        if (!int4) scales[t * (dim / KVL_LANE_DIMS) + unit] = (uint8_t)scale;
        if (int4 && unit % KVL_INT4_GROUP_LANES == 0)
            kvl_st4(scales + 4 * (t * groups + unit / KVL_INT4_GROUP_LANES), scale);
    } else {
        scale = kvl_encode_bytes(side.format, x, lanes, words);
        if (!used) return;
        kvl_st16(tile + t * dim + unit * KVL_LANE_DIMS, make_uint4(words[0], words[1], words[2], words[3]));
        if (unit == 0) kvl_st2(tile + n + 2 * t, (uint16_t)scale);
    }
}

KVL_D void kvl_seal_rows(const kvl_side &side, const uint8_t *exact_tile, uint8_t *tile) {
    uint32_t lanes = 1;
    while (lanes * KVL_LANE_DIMS < side.dim) lanes *= 2;
    uint32_t unit = threadIdx.x % lanes, step = blockDim.x / lanes, bytes = kvl_number_bytes(side.exact);
    for (uint32_t t0 = 0; t0 < side.tokens; t0 += step) { /* every lane takes part in the shuffles */
        uint32_t t = t0 + threadIdx.x / lanes;
        bool used = t < side.tokens && unit * KVL_LANE_DIMS < side.dim;
        float x[KVL_LANE_DIMS];
        KVL_UNROLL
        for (int i = 0; i < KVL_LANE_DIMS; i++) x[i] = 0.0f;
        if (used) {
            const uint8_t *p = exact_tile + (t * side.dim + unit * KVL_LANE_DIMS) * bytes;
            kvl_load8(side.exact, p, x);
            kvl_load8(side.exact, p + 8 * bytes, x + 8);
        }
        if (side.rotated) kvl_hadamard_lane(x, side.dim);
        kvl_encode_lane(side, x, lanes, t, unit, used, tile);
    }
}

/* ---- channels ---- */
/* Scale and zero of 4 channels from their extremes; as numbers, and where `write` is set to the tile. */
KVL_D void kvl_channel_scales(const kvl_side &side, const float *lo, const float *hi, uint32_t channel,
                              bool write, uint8_t *tile, kvl_scale *s, float *z) {
    bool wide = side.format == KVLI_GPU_INT8_CHANNEL;
    uint32_t hs[KVL_THREAD_CHANNELS], hz[KVL_THREAD_CHANNELS];
    KVL_UNROLL
    for (int i = 0; i < KVL_THREAD_CHANNELS; i++) {
        float least = __fadd_rn(lo[i], 0.0f), range = __fsub_rn(hi[i], least);
        hz[i] = kvl_f16_saturated(least);
        hs[i] = kvl_f16_scale(__fmul_rn(range, wide ? 1.0f / 255.0f : 1.0f / 15.0f));
        z[i] = kvl_h2f((uint16_t)hz[i]);
        s[i] = kvl_scale_of(hs[i]);
    }
    if (!write) return;
    uint8_t *scales = tile + side.tokens * side.dim / (wide ? 1 : 2) + 2 * channel;
    kvl_st8(scales, make_uint2(hs[0] | hs[1] << 16, hs[2] | hs[3] << 16));
    kvl_st8(scales + 2 * side.dim, make_uint2(hz[0] | hz[1] << 16, hz[2] | hz[3] << 16));
}

/* smem: [2][parts][dim] floats, at most KVLI_CU_STORE_SMEM bytes. */
KVL_D void kvl_seal_channels(const kvl_side &side, const uint8_t *exact_tile, uint8_t *tile, float *smem) {
    uint32_t dim = side.dim, groups = dim / KVL_THREAD_CHANNELS, parts = blockDim.x / groups;
    uint32_t part = threadIdx.x / groups, channel = threadIdx.x % groups * KVL_THREAD_CHANNELS;
    uint32_t bytes = kvl_number_bytes(side.exact);
    const uint8_t *column = exact_tile + channel * bytes;
    bool used = part < parts, wide = side.format == KVLI_GPU_INT8_CHANNEL;
    float lo[KVL_THREAD_CHANNELS], hi[KVL_THREAD_CHANNELS], x[KVL_THREAD_CHANNELS];
    KVL_UNROLL
    for (int i = 0; i < KVL_THREAD_CHANNELS; i++) lo[i] = INFINITY, hi[i] = -INFINITY;
    for (uint32_t t = part; used && t < side.tokens; t += parts) {
        kvl_load4(side.exact, column + t * dim * bytes, x);
        KVL_UNROLL
        for (int i = 0; i < KVL_THREAD_CHANNELS; i++) lo[i] = fminf(lo[i], x[i]), hi[i] = fmaxf(hi[i], x[i]);
    }
    float *highs = smem + parts * dim;
    KVL_UNROLL
    for (int i = 0; i < KVL_THREAD_CHANNELS && used; i++) {
        smem[part * dim + channel + i] = lo[i];
        highs[part * dim + channel + i] = hi[i];
    }
    __syncthreads();
    if (!used) return;
    for (uint32_t p = 0; p < parts; p++) {
        KVL_UNROLL
        for (int i = 0; i < KVL_THREAD_CHANNELS; i++) {
            lo[i] = fminf(lo[i], smem[p * dim + channel + i]);
            hi[i] = fmaxf(hi[i], highs[p * dim + channel + i]);
        }
    }
    kvl_scale s[KVL_THREAD_CHANNELS];
    float z[KVL_THREAD_CHANNELS];
    kvl_channel_scales(side, lo, hi, channel, part == 0, tile, s, z);
    for (uint32_t t = part; t < side.tokens; t += parts) {
        uint32_t c[KVL_THREAD_CHANNELS], at = t * dim + channel;
        kvl_load4(side.exact, column + t * dim * bytes, x);
        KVL_UNROLL
        for (int i = 0; i < KVL_THREAD_CHANNELS; i++)
            c[i] = kvl_code(__fsub_rn(x[i], z[i]), s[i], 0.0f, wide ? 255.0f : 15.0f);
        if (wide)
            kvl_st4(tile + at, kvl_bytes4(c[0], c[1], c[2], c[3]));
        else
            kvl_st2(tile + at / 2,
                    (uint16_t)((c[0] & 15u) | (c[1] & 15u) << 4 | (c[2] & 15u) << 8 | (c[3] & 15u) << 12));
    }
}

/* ---- a tile ---- */
KVL_D uint32_t kvl_tile_used(const kvl_side &side) {
    uint32_t n = side.tokens * side.dim;
    switch (side.format) {
    case KVLI_GPU_F32: return n * 4;
    case KVLI_GPU_F16:
    case KVLI_GPU_BF16: return n * 2;
    case KVLI_GPU_NVFP4: return n / 2 + n / 16;
    case KVLI_GPU_INT4: return n / 2 + side.tokens * ((side.dim + 63) / 64) * 4;
    case KVLI_GPU_INT4_CHANNEL: return n / 2 + side.dim * 4;
    case KVLI_GPU_INT8_CHANNEL: return n + side.dim * 4;
    default: return n + side.tokens * 2;
    }
}

/* Encodes a whole exact tile; the bytes up to the next multiple of 128 become 0. */
KVL_D void kvl_seal_tile(const kvl_side &side, const uint8_t *exact_tile, uint8_t *tile, float *smem) {
    if (side.format == KVLI_GPU_INT8_CHANNEL || side.format == KVLI_GPU_INT4_CHANNEL) {
        kvl_seal_channels(side, exact_tile, tile, smem);
    } else if (side.format <= KVLI_GPU_BF16) {
        for (uint32_t i = threadIdx.x * 8; i < side.tokens * side.dim; i += blockDim.x * 8) {
            float x[8];
            kvl_load8(side.exact, exact_tile + i * kvl_number_bytes(side.exact), x);
            kvl_store8(side.format, x, tile + i * kvl_number_bytes(side.format));
        }
    } else {
        kvl_seal_rows(side, exact_tile, tile);
    }
    uint32_t used = kvl_tile_used(side), end = (used + 127) / 128 * 128;
    for (uint32_t i = used + 4 * threadIdx.x; i < end; i += 4 * blockDim.x) kvl_st4(tile + i, 0);
}

#endif
