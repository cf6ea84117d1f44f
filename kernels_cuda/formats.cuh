/* What the bytes of a tile stand for: codes -> f16 numbers in registers, two in a word (half2), for decode (rows cut into
   one piece per lane of a matrix fragment) and prefill (whole words in natural order).

   Decoding costs, in instructions for two numbers: F16, BF16 0-1; INT8 3 (without its scale); FP8 1 from sm_89, else 4; INT4
   3; NVFP4 4, less where the hardware converts. A scale costs one more (a half2 multiply or multiply-add), whose operand is
   shared by many numbers. Numbers come out true, except NVFP4's, which lack KVL_NVFP4_FACTOR (f16 has no room for 2^14 x
   scale): it goes into a score or an output. */
#ifndef KVL_FORMATS_CUH
#define KVL_FORMATS_CUH
#include "port.cuh"
#include "abi.h"

constexpr float KVL_NVFP4_FACTOR =
    128; /* 2^14 that kvl_e2m1x2 leaves out, less the 2^7 in kvl_nvfp4_scales */

/* ---- loops that the compiler must unroll, with indices that are constants ---- */
template <uint32_t I> struct kvl_index { static constexpr uint32_t value = I; };
template <uint32_t N, uint32_t I = 0, class Body> KVL_D void kvl_static_for(Body &&body) {
    if constexpr (I < N) {
        body(kvl_index<I>());
        kvl_static_for<N, I + 1>(body);
    }
}

/* ---- properties of formats ---- */
KVLI_GPU_FN bool kvl_is_4_bit(uint32_t f) {
    return f == KVLI_GPU_NVFP4 || f == KVLI_GPU_INT4 || f == KVLI_GPU_INT4_CHANNEL;
}
KVLI_GPU_FN bool kvl_is_16_bit(uint32_t f) { return f == KVLI_GPU_F16 || f == KVLI_GPU_BF16; }
KVLI_GPU_FN bool kvl_is_per_channel(uint32_t f) {
    return f == KVLI_GPU_INT8_CHANNEL || f == KVLI_GPU_INT4_CHANNEL;
}
/* One f16 scale per token: K's multiplies the score, V's the numbers. */
KVLI_GPU_FN bool kvl_is_per_token(uint32_t f) { return f == KVLI_GPU_INT8 || f == KVLI_GPU_FP8_E4M3; }
KVLI_GPU_FN uint32_t kvl_numbers_in(uint32_t f, uint32_t bytes) {
    return kvl_is_16_bit(f) ? bytes / 2 : kvl_is_4_bit(f) ? bytes * 2 : bytes;
}

/* ---- codes of a few bits -> half2 ---- */

/* An integer in the low bits of 1024's mantissa is 1024 + that integer. */
constexpr uint32_t KVL_1024 = 0x64006400;

/* Nibbles I and I + 4 of w, as numbers 0..15. */
template <uint32_t I> KVL_D uint32_t kvl_u4x2(uint32_t w) {
    if constexpr (I >= 2) w >>= 8;
    if constexpr (I % 2 == 0) return kvl_hsub2(kvl_and_or(w, 0x000f000f, KVL_1024), KVL_1024);
    return kvl_hfma2(kvl_and_or(w, 0x00f000f0, KVL_1024), 0x2c002c00, 0xd400d400); /* / 16, - 64 */
}
/* Nibbles 2 * I and 2 * I + 1 of w (byte I), as numbers 0..15. */
template <uint32_t I> KVL_D uint32_t kvl_u4x2_adjacent(uint32_t w) {
    uint32_t byte_twice = __byte_perm(w, 0, 0x4040 | I << 8 | I);
    return kvl_hfma2(kvl_and_or(byte_twice, 0x00f0000f, KVL_1024), 0x2c003c00,
                     0xd400e400); /* / 16 - 64, - 1024 */
}
/* Bytes 2 * I and 2 * I + 1 of w, as numbers 0..255. */
template <uint32_t I> KVL_D uint32_t kvl_u8x2(uint32_t w) {
    return kvl_hsub2(__byte_perm(w, KVL_1024, I ? 0x5352 : 0x5150), KVL_1024);
}
/* The same of bytes with their highest bit flipped, as numbers -128..127. */
template <uint32_t I> KVL_D uint32_t kvl_i8x2_flipped(uint32_t w) {
    return kvl_hsub2(__byte_perm(w, KVL_1024, I ? 0x5352 : 0x5150), 0x64806480);
}

/* Bytes 2 * I and 2 * I + 1 of w, codes of a format of 8 bits. */
template <uint32_t F, uint32_t I> KVL_D uint32_t kvl_byte_codes(uint32_t w) {
    static_assert(!kvl_is_16_bit(F) && !kvl_is_4_bit(F), "a format of 8 bits");
    if constexpr (F == KVLI_GPU_INT8)
        return kvl_i8x2_flipped<I>(w ^ 0x80808080);
    else if constexpr (F == KVLI_GPU_INT8_CHANNEL)
        return kvl_u8x2<I>(w);
    else
        return kvl_e4m3x2(I ? w >> 16 : w & 0xffff);
}

/* ---- scales ---- */

/* A half in both halves of a word. */
KVL_D uint32_t kvl_twice(uint32_t half) { return __byte_perm(half, 0, 0x1010); }
/* Two NVFP4 scales (e4m3 in the low two bytes) as a half2 to multiply kvl_e2m1x2's numbers with. */
KVL_D uint32_t kvl_nvfp4_scales(uint32_t two_bytes) {
    return kvl_hmul2(kvl_e4m3x2(two_bytes), 0x58005800); /* x 128 */
}

/* ---- whole words in natural order (prefill) ---- */

/* The kvl_numbers_in(F, 4) numbers that stand in a 32-bit word of a row, unscaled, in the order of the row: 1 (16 bits), 2 (8
   bits) or 4 (4 bits) half2. What is still to be done: multiply with the scale (per token, NVFP4: kvl_twice of one of
   kvl_nvfp4_scales), or multiply-add with scale and zero (per channel: both read as they stand beside each other; INT4:
   kvl_twice of each). */
template <uint32_t F> KVL_D void kvl_word_to_f16(uint32_t w, uint32_t *h) {
    if constexpr (kvl_is_16_bit(F)) {
        h[0] = w;
    } else if constexpr (F == KVLI_GPU_NVFP4) {
        uint32_t even = kvl_e2m1x2<0>(w), odd = kvl_e2m1x2<1>(w);
        h[0] = __byte_perm(even, odd, 0x5410);
        h[2] = __byte_perm(even, odd, 0x7632);
        even = kvl_e2m1x2<2>(w);
        odd = kvl_e2m1x2<3>(w);
        h[1] = __byte_perm(even, odd, 0x5410);
        h[3] = __byte_perm(even, odd, 0x7632);
    } else if constexpr (kvl_is_4_bit(F)) {
        h[0] = kvl_u4x2_adjacent<0>(w);
        h[1] = kvl_u4x2_adjacent<1>(w);
        h[2] = kvl_u4x2_adjacent<2>(w);
        h[3] = kvl_u4x2_adjacent<3>(w);
    } else {
        h[0] = kvl_byte_codes<F, 0>(w);
        h[1] = kvl_byte_codes<F, 1>(w);
    }
}

/* ---- pieces of rows (decode) ----
   A row's bytes are dealt to `lanes` lanes in pieces as large as their alignment allows: lane l has bytes offset + l * bytes..
   of each. Which dimension of the head a lane supplies to which place of a fragment is free, as long as q (for K) or the
   output (for V) has the same order. */
struct kvl_piece {
    uint32_t offset, bytes;
};
KVLI_GPU_FN uint32_t kvl_next_piece(uint32_t left, uint32_t lanes) {
    return left >= 16 * lanes  ? 16
           : left >= 8 * lanes ? 8
           : left >= 4 * lanes ? 4
           : left >= 2 * lanes ? 2
                               : 1;
}
KVLI_GPU_FN kvl_piece kvl_piece_at(uint32_t row_bytes, uint32_t lanes, uint32_t i) {
    uint32_t at = 0;
    for (; i > 0; i--) at += lanes * kvl_next_piece(row_bytes - at, lanes);
    return kvl_piece{at, kvl_next_piece(row_bytes - at, lanes)};
}
KVLI_GPU_FN uint32_t kvl_piece_count(uint32_t row_bytes, uint32_t lanes) {
    uint32_t n = 0, at = 0;
    for (; at < row_bytes; n++) at += lanes * kvl_next_piece(row_bytes - at, lanes);
    return n;
}

/* A piece of 1 to 16 bytes, from memory aligned to its size; zeros if it is not `there`. */
template <uint32_t BYTES> struct kvl_words { uint32_t w[BYTES <= 4 ? 1 : BYTES / 4]; };
template <uint32_t BYTES> KVL_D kvl_words<BYTES> kvl_load_piece(const uint8_t *p, bool there = true) {
    kvl_words<BYTES> r = {};
    if (!there) return r;
    if constexpr (BYTES == 16) {
        uint4 v = kvl_ld16(p);
        r.w[0] = v.x, r.w[1] = v.y, r.w[2] = v.z, r.w[3] = v.w;
    } else if constexpr (BYTES == 8) {
        uint2 v = kvl_ld8(p);
        r.w[0] = v.x, r.w[1] = v.y;
    } else if constexpr (BYTES == 4) {
        r.w[0] = kvl_ld4(p);
    } else if constexpr (BYTES == 2) {
        r.w[0] = kvl_ld2(p);
    } else {
        r.w[0] = *p;
    }
    return r;
}

/* K: in step S of a piece (4 numbers of one token), the two half2 for registers 0 and 2 (or 1 and 3) of an m16n8k16 A
   fragment, unscaled. Half `c` of register `r` is number kvl_k_number of the lane's piece. */
template <uint32_t F, uint32_t BYTES, uint32_t S>
KVL_D void kvl_k_codes(const kvl_words<BYTES> &p, uint32_t h[2]) {
    if constexpr (kvl_is_16_bit(F)) {
        h[0] = p.w[2 * S], h[1] = p.w[2 * S + 1];
    } else if constexpr (F == KVLI_GPU_NVFP4 && BYTES == 2) {
        uint32_t w = __byte_perm(p.w[0], 0, 0x4140);
        h[0] = kvl_e2m1x2<0>(w), h[1] = kvl_e2m1x2<1>(w);
    } else if constexpr (F == KVLI_GPU_NVFP4) {
        h[0] = kvl_e2m1x2<S % 2 * 2>(p.w[S / 2]), h[1] = kvl_e2m1x2<S % 2 * 2 + 1>(p.w[S / 2]);
    } else if constexpr (kvl_is_4_bit(F)) {
        h[0] = kvl_u4x2_adjacent<S % 2 * 2>(p.w[S / 2]), h[1] = kvl_u4x2_adjacent<S % 2 * 2 + 1>(p.w[S / 2]);
    } else {
        h[0] = kvl_byte_codes<F, 0>(p.w[S]), h[1] = kvl_byte_codes<F, 1>(p.w[S]);
    }
}
KVLI_GPU_FN uint32_t kvl_k_number(uint32_t f, uint32_t bytes, uint32_t s, uint32_t r, uint32_t c) {
    return f != KVLI_GPU_NVFP4 ? 4 * s + 2 * r + c
           : bytes == 2        ? r + 2 * c
                               : s / 2 * 8 + s % 2 * 2 + r + 4 * c;
}

/* V: from the pieces of two tokens, in step J (2 numbers of each), the half2 (token x, token y) of numbers kvl_v_number(…, 0)
   and (…, 1), unscaled. */
template <uint32_t F, uint32_t BYTES, uint32_t J>
KVL_D void kvl_v_codes(const kvl_words<BYTES> &x, const kvl_words<BYTES> &y, uint32_t h[2]) {
    if constexpr (kvl_is_16_bit(F)) {
        h[0] = __byte_perm(x.w[J], y.w[J], 0x5410), h[1] = __byte_perm(x.w[J], y.w[J], 0x7632);
    } else if constexpr (!kvl_is_4_bit(F)) {
        uint32_t w = __byte_perm(x.w[J / 2], y.w[J / 2], J % 2 ? 0x7362 : 0x5140);
        h[0] = kvl_byte_codes<F, 0>(w), h[1] = kvl_byte_codes<F, 1>(w);
    } else {
        constexpr uint32_t half = BYTES >= 4 ? 4 : BYTES; /* numbers that lo takes from a word */
        constexpr uint32_t i = J % half, i_hi = half == 4 ? i : i + half;
        uint32_t lo = __byte_perm(x.w[J / 4], y.w[J / 4], 0x5410), hi = lo;
        if constexpr (half == 4) hi = __byte_perm(x.w[J / 4], y.w[J / 4], 0x7632);
        if constexpr (F == KVLI_GPU_NVFP4)
            h[0] = kvl_e2m1x2<i>(lo), h[1] = kvl_e2m1x2<i_hi>(hi);
        else
            h[0] = kvl_u4x2<i>(lo), h[1] = kvl_u4x2<i_hi>(hi);
    }
}
KVLI_GPU_FN uint32_t kvl_v_number(uint32_t f, uint32_t bytes, uint32_t j, uint32_t hi) {
    return !kvl_is_4_bit(f) ? 2 * j + hi : bytes >= 4 ? j / 4 * 8 + j % 4 + 4 * hi : j + bytes * hi;
}

#endif
