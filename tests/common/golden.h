/* The inputs and hashes of tests/golden: what tools/gen_golden.py makes, in C. Include kvlite.h first. */
#ifndef KVL_TESTS_GOLDEN_H
#define KVL_TESTS_GOLDEN_H
#include <math.h>

static inline uint64_t golden_fnv(const uint8_t *p, size_t n) {
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < n; i++) h = (h ^ p[i]) * 0x100000001b3u;
    return h;
}

static inline uint32_t golden_mix(uint32_t h) {
    h ^= h >> 16;
    h *= 0x85ebca6bu;
    h ^= h >> 13;
    h *= 0xc2b2ae35u;
    return h ^ h >> 16;
}

enum {
    GOLDEN_BELL,
    GOLDEN_OUTLIERS,
    GOLDEN_SPREAD,
    GOLDEN_TIES,
    GOLDEN_SINGLE,
    GOLDEN_HUGE_ROWS,
    GOLDEN_CONSTANT,
    GOLDEN_PATTERNS
};

/* What lies between codes b and b + 1 of e4m3. */
static inline double golden_e4m3_middle(uint32_t b) {
    uint32_t twice = 2 * b + 1;
    return b < 8 ? ldexp(twice, -10) : ldexp(16 + twice % 16, (int)(twice / 16) - 11);
}

static inline double golden_tie(kvl_format base, uint32_t h, uint32_t t, uint32_t e) {
    bool by_channel = base == KVL_INT8_CHANNEL || base == KVL_INT4_CHANNEL;
    if (base == KVL_INT4 || by_channel) {
        uint32_t top = base == KVL_INT8_CHANNEL ? 255 : 15, i = base == KVL_INT4 ? e % 16 : t;
        return i == 0 ? 0 : i == 1 ? top : h % (2 * top + 1) / 2.0;
    }
    if (base == KVL_NVFP4) return e % 16 == 0 ? 6 : ((int)(h % 49) - 24) / 4.0;
    if (base == KVL_FP8_E4M3) {
        double middle = golden_e4m3_middle(h % 126);
        return e == 0 ? 448 : h >> 20 & 1 ? -middle : middle;
    }
    return e == 0 ? 127 : ((int)(h % 509) - 254) / 2.0;
}

static inline float golden_value(uint32_t pattern, kvl_format base, uint32_t tokens, uint32_t dim, uint32_t t,
                                 uint32_t e) {
    uint32_t h = golden_mix(t * dim + e + 977 * dim + 31 * tokens + 7777 * pattern);
    int n = (int)((h & 255) + (h >> 8 & 255) + (h >> 16 & 255) + (h >> 24)) - 510;
    switch (pattern) {
    case GOLDEN_BELL: return (float)n / 256;
    case GOLDEN_OUTLIERS:
        return e % 16 == 3 ? (float)n / 16 : e % 16 == 7 ? (float)(n + 1536) / 64 : (float)n / 256;
    case GOLDEN_SPREAD: return t % 5 == 4 ? h & 1 ? -0.0f : 0.0f : ldexpf((float)n, (int)(t * 5 % 30) - 24);
    case GOLDEN_TIES: return (float)golden_tie(base, h, t, e);
    case GOLDEN_SINGLE:
        return ldexpf((h & 1 ? -1.0f : 1.0f) * (float)(h >> 8 | 1), (int)(golden_mix(h) & 15) - 32);
    case GOLDEN_HUGE_ROWS: return (float)n * 128;
    default: return (float)((int)((t * 37 + 11) % 101) - 50) / 8;
    }
}

/* rows [tokens][dim] */
static inline void golden_rows(uint32_t pattern, kvl_format f, uint32_t tokens, uint32_t dim, float *rows) {
    for (uint32_t t = 0; t < tokens; t++)
        for (uint32_t e = 0; e < dim; e++)
            rows[t * dim + e] = golden_value(pattern, f & ~(kvl_format)KVL_ROTATED, tokens, dim, t, e);
}

typedef struct golden_hash {
    const char *format;
    uint32_t pattern, tokens, dim;
    float global;
    size_t bytes;
    uint64_t hash;
} golden_hash;
#define HASH(...) {__VA_ARGS__},
#define TILE(...)
static const golden_hash golden_hashes[] = {
#include "../golden/tiles.inc"
};
#undef HASH
#undef TILE
#endif
