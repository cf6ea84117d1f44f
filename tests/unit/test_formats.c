/* Formats: conversions, encoders and decoders against double precision, brute force and the bytes in
   tests/golden, and every SIMD path against the scalar one. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define KVL_IMPLEMENTATION
#include "../../kvlite.h"
#include "../common/golden.h"

#define MAX_ROWS (64 * 256)
enum { GUARD = 64 };

static float input[MAX_ROWS], decoded[MAX_ROWS], rotated[MAX_ROWS];
static uint8_t exact_tile[MAX_ROWS * 4], tile_a[MAX_ROWS * 4 + GUARD], tile_b[MAX_ROWS * 4 + GUARD];

/* ---- helpers ---- */
static uint32_t seed = 1;
static uint32_t rnd(void) {
    seed = seed * 1664525u + 1013904223u;
    return seed ^ seed >> 15;
}

static kvl_simd paths[3];
static uint32_t n_paths;
static void find_paths(void) {
    kvl_simd best = kvli_simd_best();
    paths[n_paths++] = KVL_SIMD_SCALAR;
    if (best == KVL_SIMD_AVX2 || best == KVL_SIMD_AVX512) paths[n_paths++] = KVL_SIMD_AVX2;
    if (best == KVL_SIMD_AVX512) paths[n_paths++] = KVL_SIMD_AVX512;
}

static kvli_side side_of(kvl_format f, uint32_t tokens, uint32_t dim, float global) {
    kvli_side side;
    memset(&side, 0, sizeof side);
    side.format = f & ~(kvl_format)KVL_ROTATED;
    side.rotated = side.format != f;
    side.global = global > 0 ? global : 1.0f / 16.0f;
    side.tokens = tokens;
    side.dim = dim;
    side.tile_bytes = kvl_tile_bytes(f, tokens, dim);
    return side;
}

/* All formats, rotated ones included; 0 ends. */
static kvl_format format_at(uint32_t i) {
    for (kvl_format f = KVL_F32; f < KVL_FORMAT_COUNT; f++) {
        for (uint32_t r = 0; r < 2; r++) {
            kvl_format g = f | (r ? (kvl_format)KVL_ROTATED : 0);
            if (kvli_side_supported(g, true, 32, 64, NULL) && i-- == 0) return g;
        }
    }
    return KVL_FORMAT_DEFAULT;
}

/* Seals input (rounded to the exact format) into tile, and checks that no byte beyond the tile was written.
   */
static void seal(const kvli_side *side, kvl_format exact, uint8_t *tile, kvl_simd simd) {
    kvli_write_rows(exact, side->dim, input, KVL_DTYPE_F32, side->dim, side->tokens, exact_tile, 0, simd);
    memset(tile, 0xa5, side->tile_bytes + GUARD);
    kvli_seal_tile(side, exact, exact_tile, tile, simd);
    for (uint32_t i = 0; i < GUARD; i++) assert_int_equal(tile[side->tile_bytes + i], 0xa5);
}

/* The f32 nearest to x, on machines with excess precision too. */
static double f32_of(double x) {
    volatile float f = (float)x;
    return (double)f;
}

/* Value of a binary float from its fields, in double. */
static double value_of(uint32_t bits, int exponent_bits, int mantissa_bits) {
    int bias = (1 << (exponent_bits - 1)) - 1;
    uint32_t m = bits & ((1u << mantissa_bits) - 1), e = bits >> mantissa_bits & ((1u << exponent_bits) - 1);
    double v = e ? ldexp(m + ldexp(1, mantissa_bits), (int)e - bias - mantissa_bits)
                 : ldexp(m, 1 - bias - mantissa_bits);
    return bits >> (exponent_bits + mantissa_bits) & 1 ? -v : v;
}
static double f16_value(uint16_t h) { return value_of(h, 5, 10); }
static double e4m3_value(uint8_t b) { return value_of(b, 4, 3); }
static const double e2m1_value[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};

/* Nearest f16 of a finite double, ties to even, saturating: by search over all of them. */
static double f16_nearest(double x) {
    int lo = 0, hi = 0x7bff;
    double a = fabs(x);
    while (hi - lo > 1) {
        int mid = (lo + hi) / 2;
        if (f16_value((uint16_t)mid) <= a)
            lo = mid;
        else
            hi = mid;
    }
    double below = a - f16_value((uint16_t)lo), above = f16_value((uint16_t)hi) - a;
    double r = f16_value((uint16_t)(below < above || (below == above && lo % 2 == 0) ? lo : hi));
    return x < 0 ? -r : r;
}
static double f16_scale_of(double x) {
    double s = f16_nearest(x);
    return s == 0 ? 1 : s;
}

/* ---- conversions ---- */

/* For each pair of neighbours of a 16-bit float: the f32 values at, between and next to them go to the
   nearest, ties to even. */
static void check_16(uint16_t (*encode)(float), float (*decode)(uint16_t), int exponent_bits,
                     int mantissa_bits) {
    uint32_t infinity = ((1u << exponent_bits) - 1) << mantissa_bits;
    for (uint32_t h = 0; h < infinity; h++) {
        double v = value_of(h, exponent_bits, mantissa_bits),
               next = value_of(h + 1, exponent_bits, mantissa_bits);
        float middle = (float)((v + next) / 2);
        bool tie = (double)middle == (v + next) / 2;   /* not among the subnormals of bf16 */
        if (h + 1 == infinity && mantissa_bits == 7) { /* the middle is no f32 */
            tie = false;
            middle = FLT_MAX;
        }
        assert_true(decode((uint16_t)h) == v);
        assert_true(decode((uint16_t)(h | 0x8000)) == -v);
        assert_int_equal(encode((float)v), h);
        assert_int_equal(encode(-(float)v), h | 0x8000);
        if (tie) assert_int_equal(encode(middle), h + (h & 1));
        if (tie) assert_int_equal(encode(-middle), (h + (h & 1)) | 0x8000);
        if (tie) assert_int_equal(encode(nextafterf(middle, 0)), h);
        if (tie) assert_int_equal(encode(nextafterf(middle, INFINITY)), h + 1);
    }
    assert_int_equal(encode(INFINITY), infinity);
    assert_int_equal(encode(-INFINITY), infinity | 0x8000);
    assert_int_equal(encode(FLT_MAX), infinity);
    assert_true(isinf(decode((uint16_t)infinity)));
    for (uint32_t h = infinity + 1; h < 0x8000; h++) {
        assert_true(isnan(decode((uint16_t)h)));
        assert_true((encode(decode((uint16_t)h)) & 0x7fff) > infinity);
    }
}

static void test_f16(void **state) {
    (void)state;
    check_16(kvli_f32_to_f16, kvli_f16_to_f32, 5, 10);
    for (uint32_t h = 0; h < 0x7c00; h++)
        assert_true(f16_nearest(f16_value((uint16_t)h)) == f16_value((uint16_t)h));
}

static void test_bf16(void **state) {
    (void)state;
    check_16(kvli_f32_to_bf16, kvli_bf16_to_f32, 8, 7);
}

static void test_e4m3(void **state) {
    (void)state;
    for (uint32_t b = 0; b < 0x7f; b++) {
        double v = e4m3_value((uint8_t)b);
        assert_true(kvli_e4m3_to_f32((uint8_t)b) == v);
        assert_true(kvli_e4m3_to_f32((uint8_t)(b | 0x80)) == -v);
        assert_int_equal(kvli_f32_to_e4m3((float)v), b);
        assert_int_equal(kvli_f32_to_e4m3(-(float)v), b | 0x80);
        if (b == 0x7e) break;
        float middle = (float)((v + e4m3_value((uint8_t)(b + 1))) / 2);
        assert_int_equal(kvli_f32_to_e4m3(middle), b + (b & 1));
        assert_int_equal(kvli_f32_to_e4m3(nextafterf(middle, 0)), b);
        assert_int_equal(kvli_f32_to_e4m3(nextafterf(middle, 1000)), b + 1);
    }
    assert_int_equal(kvli_f32_to_e4m3(1e-40f), 0);
    assert_int_equal(kvli_f32_to_e4m3(449), 0x7e);
    assert_int_equal(kvli_f32_to_e4m3(1e30f), 0x7e);
    assert_int_equal(kvli_f32_to_e4m3(-INFINITY), 0xfe);
    assert_true(isnan(kvli_e4m3_to_f32(0x7f)) && isnan(kvli_e4m3_to_f32(0xff)));
    assert_true(isnan(kvli_e4m3_to_f32(kvli_f32_to_e4m3(NAN))));
}

/* The library takes rint(x / s) for the nearest code: for every f16 scale and every midpoint, the f32 numbers
   at and next to it. */
static void test_division_is_nearest(void **state) {
    (void)state;
    uint32_t wrong = 0;
    for (uint32_t h = 1; h < 0x7c00; h++) {
        float s = (float)f16_value((uint16_t)h);
        for (int k = -128; k < 255; k++) { /* the midpoint of k and k + 1 */
            float lo = k < 0 ? -127.0f : 0.0f, hi = k < 0 ? 127.0f : 255.0f, x = (k + 0.5f) * s;
            int even = k & 1 ? k + 1 : k, below = k < (int)lo ? (int)lo : k, above = k + 1;
            wrong += kvli_code(x, s, lo, hi) != (even < (int)lo ? (int)lo : even);
            wrong += kvli_code(nextafterf(x, -FLT_MAX), s, lo, hi) != below;
            wrong += kvli_code(nextafterf(x, FLT_MAX), s, lo, hi) != above;
        }
        for (uint32_t b = 0; b < 0x7e; b++) {
            float x = (float)((e4m3_value((uint8_t)b) + e4m3_value((uint8_t)(b + 1))) / 2 * s);
            wrong += kvli_f32_to_e4m3(x / s) != b + (b & 1);
            wrong += kvli_f32_to_e4m3(nextafterf(x, 0) / s) != b;
            wrong += kvli_f32_to_e4m3(nextafterf(x, FLT_MAX) / s) != b + 1;
        }
    }
    assert_int_equal(wrong, 0);
}

/* Every path writes the same bytes as the scalar one, for every pair of types, and sees what is not finite.
   */
static void test_write_rows(void **state) {
    (void)state;
    enum { N = 8, DIM = 48, STRIDE = 61 };
    static uint32_t raw[N * STRIDE];
    for (uint32_t round = 0; round < 3000; round++) {
        for (uint32_t i = 0; i < N * STRIDE; i++) raw[i] = rnd() << 16 ^ rnd();
        for (uint32_t i = 0; i < N * STRIDE && round % 2;
             i++) { /* finite as f32; most of them in reach of f16 */
            if ((raw[i] & 0x7f800000u) == 0x7f800000u) raw[i] ^= 0x40000000u;
            if (round % 4 == 1) raw[i] = (raw[i] & 0x8fffffffu) | 0x30000000u;
            if (round % 8 == 1) raw[i] &= 0x8000ffffu;
        }
        for (kvl_format exact = KVL_F32; exact <= KVL_BF16; exact++) {
            for (int type = KVL_DTYPE_F32; type <= KVL_DTYPE_BF16; type++) {
                size_t bytes = (size_t)DIM * (exact == KVL_F32 ? 4 : 2);
                bool finite =
                    kvli_write_rows(exact, DIM, raw, (kvl_dtype)type, STRIDE, N, tile_a, 2, KVL_SIMD_SCALAR);
                bool each = true;
                for (uint32_t i = 0; i < N * DIM; i++) {
                    const uint8_t *p = tile_a + 2 * bytes + (size_t)i * (exact == KVL_F32 ? 4 : 2);
                    uint32_t u = 0;
                    memcpy(&u, p, exact == KVL_F32 ? 4 : 2);
                    uint32_t mask = exact == KVL_F32 ? 0x7f800000u : exact == KVL_F16 ? 0x7c00u : 0x7f80u;
                    each = each && (u & mask) != mask;
                }
                assert_int_equal(finite, each);
                for (uint32_t p = 1; p < n_paths; p++) {
                    memset(tile_b, 0xa5, sizeof tile_b);
                    assert_int_equal(
                        kvli_write_rows(exact, DIM, raw, (kvl_dtype)type, STRIDE, N, tile_b, 2, paths[p]),
                        finite);
                    assert_memory_equal(tile_b + 2 * bytes, tile_a + 2 * bytes, N * bytes);
                    assert_int_equal(tile_b[2 * bytes - 1], 0xa5);
                    assert_int_equal(tile_b[(2 + N) * bytes], 0xa5);
                }
            }
        }
    }
}

/* One number that is not finite, anywhere in a row, is seen; so is one that becomes infinite by rounding. */
static void test_write_rows_finite(void **state) {
    (void)state;
    for (uint32_t p = 0; p < n_paths; p++) {
        for (uint32_t dim = 16; dim <= 256; dim += 16) {
            for (uint32_t i = 0; i < dim; i++) input[i] = (float)i;
            for (uint32_t i = 0; i < dim; i++) {
                const float bad[4] = {NAN, INFINITY, -INFINITY, 65520.0f};
                for (uint32_t b = 0; b < 4; b++) {
                    input[i] = bad[b];
                    assert_false(
                        kvli_write_rows(KVL_F16, dim, input, KVL_DTYPE_F32, dim, 1, exact_tile, 0, paths[p]));
                    assert_int_equal(
                        kvli_write_rows(KVL_F32, dim, input, KVL_DTYPE_F32, dim, 1, exact_tile, 0, paths[p]),
                        b == 3);
                    assert_int_equal(
                        kvli_write_rows(KVL_BF16, dim, input, KVL_DTYPE_F32, dim, 1, exact_tile, 0, paths[p]),
                        b == 3);
                }
                input[i] = (float)i;
            }
            assert_true(kvli_write_rows(KVL_F16, dim, input, KVL_DTYPE_F32, dim, 1, exact_tile, 0, paths[p]));
        }
    }
}

/* ---- Hadamard ---- */
static void test_hadamard(void **state) {
    (void)state;
    for (uint32_t dim = 16; dim <= 256; dim += 16) {
        uint32_t block = 128, n_rows = 3;
        while (dim % block) block /= 2;
        for (uint32_t i = 0; i < n_rows * dim; i++)
            input[i] = ldexpf((float)((int)(rnd() % 2001) - 1000), (int)(rnd() % 9) - 12);
        memcpy(rotated, input, sizeof(float) * n_rows * dim);
        kvli_hadamard(rotated, dim, n_rows, KVL_SIMD_SCALAR);
        for (uint32_t i = 0; i < n_rows * dim; i++) {
            uint32_t first = i / block * block, j = i - first;
            double sum = 0, size = 0;
            for (uint32_t k = 0; k < block;
                 k++) { /* Sylvester's matrix: the sign is the parity of the common bits */
                double x = input[first + k];
                sum += __builtin_popcount(j & k) & 1 ? -x : x;
                size += fabs(x);
            }
            assert_true(fabs(rotated[i] - sum / sqrt(block)) <= 1e-6 * size / sqrt(block));
        }
        memset(decoded, 0, sizeof(float) * dim); /* a one alone gives the constant */
        decoded[0] = 1;
        kvli_hadamard(decoded, dim, 1, KVL_SIMD_SCALAR);
        for (uint32_t i = 0; i < dim; i++)
            assert_true(decoded[i] == (i < block ? f32_of(1 / sqrt(block)) : 0));
        for (uint32_t p = 1; p < n_paths; p++) {
            memcpy(decoded, input, sizeof(float) * n_rows * dim);
            kvli_hadamard(decoded, dim, n_rows, paths[p]);
            assert_memory_equal(decoded, rotated, sizeof(float) * n_rows * dim);
        }
        kvli_hadamard(rotated, dim, n_rows, KVL_SIMD_SCALAR); /* its own inverse */
        for (uint32_t i = 0; i < n_rows * dim; i++) assert_true(fabsf(rotated[i] - input[i]) <= 1e-4f);
    }
}

/* ---- golden bytes: the inputs are those of tools/gen_golden.py ---- */
typedef struct golden_tile {
    const char *format;
    uint32_t tokens, dim;
    const char *hex;
} golden_tile;

#define HASH(...)
#define TILE(...) {__VA_ARGS__},
static const golden_tile golden_tiles[] = {
#include "../golden/tiles.inc"
};

static void test_golden_tiles(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof golden_tiles / sizeof golden_tiles[0]; i++) {
        const golden_tile *g = &golden_tiles[i];
        kvl_format f = kvl_format_from_name(g->format);
        size_t n = strlen(g->hex) / 2, bytes = kvl_tile_bytes(f, g->tokens, g->dim);
        golden_rows(GOLDEN_OUTLIERS, f, g->tokens, g->dim, input);
        assert_int_equal(kvl_tile_encode(f, g->tokens, g->dim, 0, input, tile_a), KVL_OK);
        for (size_t b = 0; b < bytes; b++) {
            char digits[3] = "00";
            if (b < n) memcpy(digits, g->hex + 2 * b, 2);
            if (tile_a[b] != strtoul(digits, NULL, 16))
                fail_msg("%s: byte %zu is %02x, not %s", g->format, b, tile_a[b], digits);
        }
    }
}

static void test_golden_hashes(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof golden_hashes / sizeof golden_hashes[0]; i++) {
        const golden_hash *g = &golden_hashes[i];
        kvl_format f = kvl_format_from_name(g->format);
        kvli_side side = side_of(f, g->tokens, g->dim, g->global);
        assert_int_equal(side.tile_bytes, g->bytes);
        golden_rows(g->pattern, f, g->tokens, g->dim, input);
        for (uint32_t p = 0; p < n_paths; p++) {
            for (kvl_format exact = KVL_F32; exact <= KVL_F16;
                 exact++) { /* all but one pattern are exact in f16 */
                if (g->pattern == GOLDEN_SINGLE && exact != KVL_F32) continue;
                seal(&side, exact, tile_a, paths[p]);
                if (golden_fnv(tile_a, g->bytes) != g->hash) {
                    fail_msg("%s, pattern %u, %u x %u, from %s, path %d: other bytes", g->format, g->pattern,
                             g->tokens, g->dim, kvl_format_name(exact), (int)paths[p]);
                }
            }
        }
    }
}

/* ---- paths against each other ---- */

/* Rows that try the encoders: ordinary ones, outliers, biased channels, tiny, huge, equal, few values, and
   all bits of an f32. */
static void wild_rows(uint32_t tokens, uint32_t dim, uint32_t kind, float limit) {
    for (uint32_t t = 0; t < tokens; t++) {
        for (uint32_t e = 0; e < dim; e++) {
            int n = (int)(rnd() % 4096) - 2048;
            float x = ldexpf((float)n, -10);
            if (kind % 8 == 1 && e % 29 == 5) x *= 50;
            if (kind % 8 == 2) x += (float)(e * 7919 % 301) - 150;
            if (kind % 8 == 3) x = ldexpf((float)n, (int)(rnd() % 30) - 45);
            if (kind % 8 == 4) x = ldexpf((float)n, (int)(rnd() % 6));
            if (kind % 8 == 5) x = (float)(rnd() % 3) - 1;
            if (kind % 8 == 6) x = ldexpf((float)(rnd() % 16777216) - 8388608, (int)(rnd() % 40) - 40);
            if (kind % 8 == 7) x = ldexpf((float)n, (int)(rnd() % 200) - 100);
            if (rnd() % 64 == 0) x = rnd() & 1 ? 0.0f : -0.0f;
            input[t * dim + e] = fminf(fmaxf(x, -limit), limit);
        }
    }
}

static void test_paths_agree(void **state) {
    (void)state;
    for (uint32_t i = 0, kind = 0; format_at(i); i++) {
        for (uint32_t dim = 16; dim <= 256; dim += 16) {
            for (uint32_t tokens = 8; tokens <= 64; tokens *= 2) {
                if (!kvl_tile_bytes(format_at(i), tokens, dim)) continue;
                for (kvl_format exact = KVL_F32; exact <= KVL_BF16; exact++, kind++) {
                    for (uint32_t repeat = 0; repeat < 2; repeat++) {
                        kvli_side side = side_of(format_at(i), tokens, dim,
                                                 kind % 3 ? 0 : ldexpf(1 + (float)(rnd() % 100), -9));
                        wild_rows(tokens, dim, kind + 5 * repeat, exact == KVL_F16 ? 65504.0f : FLT_MAX);
                        seal(&side, exact, tile_a, KVL_SIMD_SCALAR);
                        for (uint32_t p = 1; p < n_paths; p++) {
                            seal(&side, exact, tile_b, paths[p]);
                            if (memcmp(tile_a, tile_b, side.tile_bytes) == 0) continue;
                            fail_msg("%s, %u x %u, kind %u: path %d gives other bytes",
                                     kvl_format_name(format_at(i)), tokens, dim, (kind + 5 * repeat) % 8,
                                     (int)paths[p]);
                        }
                    }
                }
            }
        }
    }
}

/* ---- what the codes mean, in double precision and by trying every code ---- */

/* The least distance from x to code * s + z over all codes of the format. */
static double least_distance(kvl_format base, double x, double s, double z) {
    double least = INFINITY;
    int lo = base == KVL_INT8 ? -127 : 0, hi = base == KVL_INT8 ? 127 : base == KVL_INT8_CHANNEL ? 255 : 15;
    if (base == KVL_FP8_E4M3) hi = 126;
    if (base == KVL_NVFP4) hi = 7;
    for (int c = lo; c <= hi; c++) {
        double v = base == KVL_FP8_E4M3 ? e4m3_value((uint8_t)c) : base == KVL_NVFP4 ? e2m1_value[c] : c;
        double a = base == KVL_FP8_E4M3 || base == KVL_NVFP4 ? fabs(x) : x;
        double d = fabs(a - (v * s + z));
        if (d < least) least = d;
    }
    return least;
}

typedef struct meaning {
    double scale, zero; /* as stored */
    double want_scale, want_zero;
    double value; /* code * scale + zero */
} meaning;

static double stored_f16(const uint8_t *p) { return f16_value((uint16_t)(p[0] | p[1] << 8)); }

static void min_max_of(meaning *m, uint32_t first, uint32_t step, uint32_t n, uint32_t top) {
    double lo = INFINITY, hi = -INFINITY;
    for (uint32_t i = 0; i < n; i++) {
        lo = fmin(lo, rotated[first + i * step]);
        hi = fmax(hi, rotated[first + i * step]);
    }
    m->want_zero = f16_nearest(lo);
    m->want_scale = f16_scale_of(f32_of(f32_of(hi - lo) * f32_of(1.0 / top)));
}

static double amax_of(uint32_t first, uint32_t n) {
    double a = 0;
    for (uint32_t i = 0; i < n; i++) a = fmax(a, fabs((double)rotated[first + i]));
    return a;
}

/* Reads element e of token t of tile_a as formats say it stands there; rotated holds what was encoded. */
static meaning read_element(kvl_format base, uint32_t tokens, uint32_t dim, uint32_t t, uint32_t e) {
    meaning m = {1, 0, 1, 0, 0};
    bool half = base == KVL_NVFP4 || base == KVL_INT4 || base == KVL_INT4_CHANNEL;
    const uint8_t *scales = tile_a + (size_t)tokens * dim / (half ? 2 : 1);
    uint8_t byte = half ? tile_a[(t * dim + e) / 2] : tile_a[t * dim + e], code = byte;
    if (half) code = e % 2 ? byte >> 4 : byte & 15;
    double v = code;
    if (base == KVL_INT8 || base == KVL_FP8_E4M3) {
        m.scale = stored_f16(scales + 2 * t);
        m.want_scale =
            f16_scale_of(f32_of(amax_of(t * dim, dim) * f32_of(base == KVL_INT8 ? 1.0 / 127 : 1.0 / 448)));
        v = base == KVL_INT8 ? (double)(code >= 128 ? code - 256 : code) : e4m3_value(code);
    } else if (base == KVL_NVFP4) {
        uint8_t b = scales[t * (dim / 16) + e / 16];
        double amax = amax_of(t * dim + e / 16 * 16, 16);
        uint8_t six = kvli_f32_to_e4m3((float)(16 * f32_of(amax * f32_of(1.0 / 6))));
        uint8_t four = kvli_f32_to_e4m3((float)(amax * 4));
        assert_true(b == (six ? six : 1) || b == (four ? four : 1));
        m.scale = m.want_scale = e4m3_value(b) / 16;
        v = code & 8 ? -e2m1_value[code & 7] : e2m1_value[code & 7];
    } else if (base == KVL_INT4) {
        uint32_t groups = (dim + 63) / 64, first = e / 64 * 64, n = dim - first < 64 ? dim - first : 64;
        m.scale = stored_f16(scales + 4 * (t * groups + e / 64));
        m.zero = stored_f16(scales + 4 * (t * groups + e / 64) + 2);
        min_max_of(&m, t * dim + first, 1, n, 15);
    } else {
        m.scale = stored_f16(scales + 2 * e);
        m.zero = stored_f16(scales + 2 * dim + 2 * e);
        min_max_of(&m, e, dim, tokens, base == KVL_INT8_CHANNEL ? 255 : 15);
    }
    m.value = v * m.scale + m.zero;
    return m;
}

/* Scales as specified, each code the nearest one, decoding to code * scale + zero, padding zero. */
static void check_meaning(kvl_format f, uint32_t tokens, uint32_t dim) {
    kvl_format base = f & ~(kvl_format)KVL_ROTATED;
    memcpy(rotated, input, sizeof(float) * tokens * dim);
    if (base != f) kvli_hadamard(rotated, dim, tokens, KVL_SIMD_SCALAR); /* checked above */
    assert_int_equal(kvl_tile_encode(f, tokens, dim, 0, input, tile_a), KVL_OK);
    assert_int_equal(kvl_tile_decode(f, tokens, dim, 0, tile_a, false, decoded), KVL_OK);
    for (uint32_t t = 0; t < tokens; t++) {
        for (uint32_t e = 0; e < dim; e++) {
            meaning m = read_element(base, tokens, dim, t, e);
            double x = rotated[t * dim + e], error = fabs(x - m.value);
            double rounding = 1.2e-7 * (fabs(x) + fabs(m.zero)); /* of x - zero */
            assert_true(m.scale == m.want_scale);
            assert_true(m.zero == m.want_zero);
            assert_true(fabs(decoded[t * dim + e] - m.value) <= 6e-8 * fabs(m.value));
            assert_true(error <= least_distance(base, x, m.scale, m.zero) + rounding);
        }
    }
}

static void test_codes_are_nearest(void **state) {
    (void)state;
    static const uint32_t dims[] = {16, 64, 80, 128};
    for (uint32_t i = 0; format_at(i); i++) {
        if (kvli_is_exact(format_at(i))) continue;
        for (uint32_t d = 0; d < 4; d++) {
            for (uint32_t pattern = 0; pattern < GOLDEN_PATTERNS; pattern++) {
                golden_rows(pattern, format_at(i), 32, dims[d], input);
                check_meaning(format_at(i), 32, dims[d]);
            }
        }
    }
}

/* Of the two scales of an NVFP4 group the one is taken that has less squared error. */
static void test_nvfp4_choice(void **state) {
    (void)state;
    uint32_t fours = 0, n = 0;
    for (uint32_t round = 0; round < 40; round++) {
        wild_rows(32, 64, round % 7, FLT_MAX);
        assert_int_equal(kvl_tile_encode(KVL_NVFP4, 32, 64, 0, input, tile_a), KVL_OK);
        for (uint32_t g = 0; g < 128; g++, n++) {
            double amax = 0, error[2] = {0, 0};
            uint8_t b[2], stored = tile_a[1024 + g];
            for (uint32_t e = 0; e < 16; e++) amax = fmax(amax, fabs((double)input[16 * g + e]));
            for (uint32_t c = 0; c < 2; c++) {
                b[c] = kvli_f32_to_e4m3((float)amax * (c ? 0.25f : 1.0f / 6.0f) * 16.0f);
                if (!b[c]) b[c] = 1;
                for (uint32_t e = 0; e < 16; e++) {
                    double d = least_distance(KVL_NVFP4, input[16 * g + e], e4m3_value(b[c]) / 16, 0);
                    error[c] += d * d;
                }
            }
            uint32_t taken = stored == b[0] ? 0 : 1;
            assert_int_equal(stored, b[taken]);
            assert_true(error[taken] <= error[1 - taken] * (1 + 1e-5));
            fours += taken;
        }
    }
    assert_in_range(fours, n / 20, n - n / 20); /* both do occur */
}

/* How far a number may be from what it decodes to. */
static void test_error_bounds(void **state) {
    (void)state;
    for (uint32_t i = 0; format_at(i); i++) {
        kvl_format f = format_at(i), base = f & ~(kvl_format)KVL_ROTATED;
        double squares = 0, errors = 0, most = 0;
        for (uint32_t j = 0; j < 64 * 64; j++) {
            int n = 0;
            for (int k = 0; k < 8; k++) n += (int)(rnd() >> 8 & 255) - 128;
            input[j] = (float)n / 128;
        }
        assert_int_equal(kvl_tile_encode(f, 64, 64, 0, input, tile_a), KVL_OK);
        assert_int_equal(kvl_tile_decode(f, 64, 64, 0, tile_a, true, decoded), KVL_OK);
        for (uint32_t j = 0; j < 64 * 64; j++) {
            double d = decoded[j] - input[j];
            squares += (double)input[j] * input[j];
            errors += d * d;
            most = fmax(most, fabs(d));
        }
        double relative = sqrt(errors / squares);
        double bound = base == KVL_F32            ? 0
                       : base == KVL_F16          ? 1e-4
                       : base == KVL_BF16         ? 2e-3
                       : base == KVL_INT8         ? 8e-3
                       : base == KVL_INT8_CHANNEL ? 6e-3
                       : base == KVL_FP8_E4M3     ? 0.03
                       : base == KVL_NVFP4        ? 0.1
                                                  : 0.11;
        if (relative > bound)
            fail_msg("%s: relative error %g, bound %g", kvl_format_name(f), relative, bound);
        if (!kvli_is_exact(base)) assert_true(relative > bound / 4); /* the bound says something */
        assert_true(most < 1);
    }
}

/* Keys with a large bias, as in Qwen2: what counts is the range of a channel, and half an f16 step of the
   bias. */
static void test_biased_channels(void **state) {
    (void)state;
    for (uint32_t i = 0; i < 32 * 64; i++) {
        double bias = (i % 64) * 8.0 - 256;
        input[i] = (float)f16_nearest(bias + ldexp((double)(rnd() % 1024), -10));
    }
    for (uint32_t wide = 0; wide < 2; wide++) {
        kvl_format f = wide ? KVL_INT8_CHANNEL : KVL_INT4_CHANNEL;
        assert_int_equal(kvl_tile_encode(f, 32, 64, 0, input, tile_a), KVL_OK);
        assert_int_equal(kvl_tile_decode(f, 32, 64, 0, tile_a, true, decoded), KVL_OK);
        for (uint32_t i = 0; i < 32 * 64; i++) {
            assert_true(fabsf(decoded[i] - input[i]) <= (wide ? 0.51 / 255 : 0.51 / 15) * 1.2);
        }
    }
}

static void test_zero_and_constant_rows(void **state) {
    (void)state;
    const float values[] = {0.0f, -0.0f, 1.0f, -3.140625f, 65504.0f, -65504.0f, 5.9604645e-8f, -6.1e-5f};
    for (uint32_t i = 0; format_at(i); i++) {
        kvl_format f = format_at(i), base = f & ~(kvl_format)KVL_ROTATED;
        for (uint32_t v = 0; v < 8; v++) {
            float x = (float)f16_nearest(values[v]);
            if (f == ((kvl_format)KVL_INT4 | (kvl_format)KVL_ROTATED))
                x = fmaxf(x, -8000); /* times 8: the zero is an f16 */
            for (uint32_t j = 0; j < 32 * 64; j++) input[j] = x;
            assert_int_equal(kvl_tile_encode(f, 32, 64, 0, input, tile_a), KVL_OK);
            assert_int_equal(kvl_tile_decode(f, 32, 64, 0, tile_a, true, decoded), KVL_OK);
            for (uint32_t j = 0; j < 32 * 64; j++) {
                double error = fabs((double)decoded[j] - x), size = fabs((double)x);
                if (x == 0)
                    assert_true(decoded[j] == 0);
                else if (base == f && (base == KVL_INT4 || kvli_is_channel(base)))
                    assert_true(error == 0);
                else if (base == KVL_NVFP4 && size > 168)
                    assert_true(decoded[j] == copysignf(168, x) || base != f);
                else if (size > 1e-3)
                    assert_true(error <= size / (base == KVL_NVFP4 ? 15 : base == KVL_INT4 ? 2 : 100));
                else
                    assert_true(error <= size);
            }
        }
    }
    memset(input, 0, sizeof input);
    assert_int_equal(kvl_tile_encode(KVL_NVFP4, 8, 16, 0, input, tile_a), KVL_OK);
    assert_int_equal(tile_a[64], 1); /* 2^-9, not 0 */
    assert_int_equal(kvl_tile_encode(KVL_INT8, 8, 16, 0, input, tile_a), KVL_OK);
    assert_true(stored_f16(tile_a + 128) == 1);
}

/* Finite rows decode to finite rows, however large: f32 rows beyond f16 saturate. */
static void test_huge_values_stay_finite(void **state) {
    (void)state;
    const float sizes[] = {65504.0f, 1e6f, 1e12f, 1e30f, FLT_MAX / 256};
    for (uint32_t i = 0; format_at(i); i++) {
        if (format_at(i) == KVL_F16) continue;
        for (uint32_t s = 0; s < 5; s++) {
            for (uint32_t j = 0; j < 32 * 80; j++)
                input[j] = sizes[s] * (((float)(rnd() % 2001) - 1000) / 1000);
            for (uint32_t p = 0; p < n_paths; p++) {
                kvli_side side = side_of(format_at(i), 32, 80, 0);
                kvli_seal_tile(&side, KVL_F32, input, p ? tile_b : tile_a, paths[p]);
                if (p) assert_memory_equal(tile_a, tile_b, side.tile_bytes);
            }
            assert_int_equal(kvl_tile_decode(format_at(i), 32, 80, 0, tile_a, true, decoded), KVL_OK);
            for (uint32_t j = 0; j < 32 * 80; j++) assert_true(isfinite(decoded[j]));
        }
    }
}

/* NaN and Inf trap nowhere and stay in their token, or in their channel where the scale is a channel's. */
static void test_nan_is_contained(void **state) {
    (void)state;
    for (uint32_t i = 0; format_at(i); i++) {
        kvl_format f = format_at(i), base = f & ~(kvl_format)KVL_ROTATED;
        for (uint32_t p = 0; p < n_paths; p++) {
            for (uint32_t round = 0; round < 24; round++) {
                kvli_side side = side_of(f, 32, 80, 0);
                uint32_t t = rnd() % 32, e = rnd() % 80;
                wild_rows(32, 80, round % 3, FLT_MAX);
                seal(&side, KVL_F16, tile_a, paths[p]);
                kvli_decode_tile(&side, tile_a, rotated);
                input[t * 80 + e] = round % 3 == 0 ? NAN : round % 3 == 1 ? INFINITY : -INFINITY;
                seal(&side, KVL_F16, tile_b, paths[p]);
                kvli_decode_tile(&side, tile_b, decoded);
                for (uint32_t j = 0; j < 32 * 80; j++) {
                    if (kvli_is_channel(base) ? j % 80 != e : j / 80 != t)
                        assert_true(decoded[j] == rotated[j]);
                }
            }
        }
        for (uint32_t j = 0; j < 32 * 80; j++) input[j] = j % 2 ? NAN : -INFINITY;
        for (uint32_t p = 0; p < n_paths; p++) {
            kvli_side side = side_of(f, 32, 80, 0);
            seal(&side, KVL_F32, tile_a, paths[p]);
            kvli_decode_tile(&side, tile_a, decoded);
        }
    }
}

/* ---- shapes, names, presets, bad input ---- */
static void test_tile_bytes(void **state) {
    (void)state;
    static const struct {
        kvl_format format;
        uint32_t tokens, dim;
        double bits; /* a number */
    } table[] = {
        {KVL_F32, 32, 128, 32},           {KVL_F16, 32, 128, 16},          {KVL_BF16, 32, 128, 16},
        {KVL_INT8, 32, 128, 8.125},       {KVL_INT8_CHANNEL, 32, 128, 9},  {KVL_FP8_E4M3, 32, 128, 8.125},
        {KVL_NVFP4, 32, 128, 4.5},        {KVL_INT4, 32, 128, 4.5},        {KVL_INT4_CHANNEL, 32, 128, 5},
        {KVL_INT4_CHANNEL, 64, 128, 4.5}, {KVL_INT8_CHANNEL, 64, 128, 8.5}};
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++) {
        size_t used = (size_t)(table[i].bits * table[i].tokens * table[i].dim / 8);
        assert_int_equal(kvl_tile_bytes(table[i].format, table[i].tokens, table[i].dim),
                         (used + 127) / 128 * 128);
    }
    assert_int_equal(kvl_tile_bytes(KVL_INT4, 8, 80), 384); /* 8 * 40 + 8 * 2 * 4: a short last group */
    assert_int_equal(kvl_tile_bytes((kvl_format)KVL_INT4 | (kvl_format)KVL_ROTATED, 8, 80), 384);
    for (uint32_t i = 0; format_at(i); i++) {
        for (uint32_t dim = 0; dim <= 272; dim++) {
            for (uint32_t tokens = 0; tokens <= 65; tokens++) {
                bool fits = dim >= 16 && dim <= 256 && dim % 16 == 0 &&
                            (tokens == 8 || tokens == 16 || tokens == 32 || tokens == 64);
                if (kvli_is_channel(format_at(i)) && tokens < 32) fits = false;
                size_t bytes = kvl_tile_bytes(format_at(i), tokens, dim);
                assert_int_equal(bytes != 0, fits);
                assert_int_equal(bytes % 128, 0);
            }
        }
    }
}

static void test_side_supported(void **state) {
    (void)state;
    const char *why = NULL;
    kvl_format rot = KVL_ROTATED;
    assert_true(kvli_side_supported(KVL_INT4_CHANNEL, true, 32, 64, &why));
    assert_null(why);
    assert_false(kvli_side_supported(KVL_INT4_CHANNEL, false, 32, 64, &why));
    assert_non_null(strstr(why, "keys"));
    assert_false(kvli_side_supported(KVL_INT8_CHANNEL, true, 16, 64, &why));
    assert_non_null(strstr(why, "block_tokens"));
    assert_false(kvli_side_supported(KVL_INT8, true, 32, 72, &why));
    assert_non_null(strstr(why, "dim"));
    assert_false(kvli_side_supported(KVL_INT8, true, 24, 64, &why));
    assert_non_null(strstr(why, "block_tokens"));
    assert_false(kvli_side_supported(KVL_FORMAT_DEFAULT, true, 32, 64, &why));
    assert_false(kvli_side_supported(KVL_FORMAT_COUNT, true, 32, 64, &why));
    assert_false(kvli_side_supported(0x200, true, 32, 64, &why));
    assert_non_null(strstr(why, "unknown"));
    const kvl_format never[] = {KVL_F32, KVL_F16, KVL_BF16, KVL_INT8_CHANNEL, KVL_INT4_CHANNEL};
    for (uint32_t i = 0; i < 5; i++) {
        assert_false(kvli_side_supported(never[i] | rot, true, 32, 64, &why));
        assert_non_null(strstr(why, "rotated"));
        assert_int_equal(kvl_tile_bytes(never[i] | rot, 32, 64), 0);
    }
    assert_false(kvli_side_supported(KVL_FORMAT_COUNT, true, 32, 64, NULL));
}

static void test_names(void **state) {
    (void)state;
    kvl_format rot = KVL_ROTATED;
    uint32_t n = 0;
    for (; format_at(n); n++)
        assert_int_equal(kvl_format_from_name(kvl_format_name(format_at(n))), format_at(n));
    assert_int_equal(n, 13);
    assert_string_equal(kvl_format_name(KVL_INT4 | rot), "int4+rot");
    assert_string_equal(kvl_format_name(KVL_FP8_E4M3), "fp8_e4m3");
    assert_string_equal(kvl_format_name(KVL_F16 | rot), "unknown");
    assert_string_equal(kvl_format_name(KVL_FORMAT_COUNT), "unknown");
    assert_string_equal(kvl_format_name(0xffffffffu), "unknown");
    assert_int_equal(kvl_format_from_name(NULL), KVL_FORMAT_DEFAULT);
    assert_int_equal(kvl_format_from_name(""), KVL_FORMAT_DEFAULT);
    assert_int_equal(kvl_format_from_name("int4+ro"), KVL_FORMAT_DEFAULT);
    assert_int_equal(kvl_format_from_name("int5"), KVL_FORMAT_DEFAULT);
}

static void test_presets(void **state) {
    (void)state;
    kvl_format rot = KVL_ROTATED;
    const kvl_preset want[] = {{"f32", KVL_F32, KVL_F32, KVL_F32},
                               {"f16", KVL_F16, KVL_F16, KVL_F16},
                               {"bf16", KVL_BF16, KVL_BF16, KVL_BF16},
                               {"int8", KVL_INT8, KVL_INT8, KVL_F16},
                               {"int8+", KVL_INT8_CHANNEL, KVL_INT8, KVL_F16},
                               {"fp8", KVL_FP8_E4M3, KVL_FP8_E4M3, KVL_F16},
                               {"nvfp4", KVL_NVFP4 | rot, KVL_NVFP4, KVL_F16},
                               {"balanced", KVL_INT8, KVL_INT4 | rot, KVL_F16},
                               {"int4", KVL_INT4_CHANNEL, KVL_INT4 | rot, KVL_F16}};
    uint32_t n = 0;
    assert_non_null(kvl_presets(NULL));
    assert_non_null(kvl_presets(&n));
    assert_int_equal(n, 9);
    for (uint32_t i = 0; i < 9; i++) {
        const kvl_preset *p = kvl_preset_find(want[i].name);
        assert_non_null(p);
        assert_int_equal(p->k, want[i].k);
        assert_int_equal(p->v, want[i].v);
        assert_int_equal(p->exact, want[i].exact);
        assert_true(kvli_side_supported(p->k, true, 32, 64, NULL) &&
                    kvli_side_supported(p->v, false, 32, 64, NULL));
    }
    assert_null(kvl_preset_find("int5"));
    assert_null(kvl_preset_find(""));
    assert_null(kvl_preset_find(NULL));
}

static void test_bad_arguments(void **state) {
    (void)state;
    memset(tile_a, 0x5a, sizeof tile_a);
    assert_int_equal(kvl_tile_encode(KVL_INT8, 32, 64, 0, NULL, tile_a), KVL_INVALID_ARG);
    assert_int_equal(kvl_tile_encode(KVL_INT8, 32, 64, 0, input, NULL), KVL_INVALID_ARG);
    assert_int_equal(kvl_tile_decode(KVL_INT8, 32, 64, 0, NULL, false, decoded), KVL_INVALID_ARG);
    assert_int_equal(kvl_tile_decode(KVL_INT8, 32, 64, 0, tile_a, false, NULL), KVL_INVALID_ARG);
    assert_int_equal(kvl_tile_encode(KVL_INT8, 31, 64, 0, input, tile_a), KVL_UNSUPPORTED);
    assert_int_equal(kvl_tile_encode(KVL_INT8, 32, 65, 0, input, tile_a), KVL_UNSUPPORTED);
    assert_int_equal(kvl_tile_encode(77, 32, 64, 0, input, tile_a), KVL_UNSUPPORTED);
    assert_int_equal(kvl_tile_decode(77, 32, 64, 0, tile_a, false, decoded), KVL_UNSUPPORTED);
    const float globals[] = {-1, NAN, INFINITY, 1e-40f};
    for (uint32_t i = 0; i < 4; i++) {
        assert_int_equal(kvl_tile_encode(KVL_NVFP4, 32, 64, globals[i], input, tile_a), KVL_INVALID_ARG);
        assert_int_equal(kvl_tile_decode(KVL_NVFP4, 32, 64, globals[i], tile_a, false, decoded),
                         KVL_INVALID_ARG);
    }
    for (size_t i = 0; i < sizeof tile_a; i++) assert_int_equal(tile_a[i], 0x5a);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_f16),
        cmocka_unit_test(test_bf16),
        cmocka_unit_test(test_e4m3),
        cmocka_unit_test(test_division_is_nearest),
        cmocka_unit_test(test_write_rows),
        cmocka_unit_test(test_write_rows_finite),
        cmocka_unit_test(test_hadamard),
        cmocka_unit_test(test_golden_tiles),
        cmocka_unit_test(test_golden_hashes),
        cmocka_unit_test(test_paths_agree),
        cmocka_unit_test(test_codes_are_nearest),
        cmocka_unit_test(test_nvfp4_choice),
        cmocka_unit_test(test_error_bounds),
        cmocka_unit_test(test_biased_channels),
        cmocka_unit_test(test_zero_and_constant_rows),
        cmocka_unit_test(test_huge_values_stay_finite),
        cmocka_unit_test(test_nan_is_contained),
        cmocka_unit_test(test_tile_bytes),
        cmocka_unit_test(test_side_supported),
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_presets),
        cmocka_unit_test(test_bad_arguments),
    };
    find_paths();
    printf("%u of 3 SIMD paths run here\n", n_paths);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
