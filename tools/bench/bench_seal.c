/* What writing and sealing a tile costs: nanoseconds for 32 tokens x 64 dims (and 128), a line for each
   format and path, beside memcpy of the exact tile's bytes. Best of several short runs. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define KVL_IMPLEMENTATION
#include "../../kvlite.h"

enum { TOKENS = 32, TILES = 16, RUNS = 12 };

static float rows[TILES][TOKENS * 128];
static uint8_t exact[TILES][TOKENS * 128 * 4];
static uint8_t packed[TILES][TOKENS * 128 * 4];

typedef struct work {
    kvli_side side;
    kvl_simd simd;
    int what; /* 0 memcpy, 1 write rows, 2 seal */
} work;

static void once(const work *w, uint32_t i) {
    const kvli_side *s = &w->side;
    if (w->what == 0) memcpy(packed[i], exact[i], (size_t)s->tokens * s->dim * 2);
    if (w->what == 1)
        kvli_write_rows(KVL_F16, s->dim, rows[i], KVL_DTYPE_F32, s->dim, s->tokens, exact[i], 0, w->simd);
    if (w->what == 2) kvli_seal_tile(s, KVL_F16, exact[i], packed[i], w->simd);
}

/* Nanoseconds a tile: the least of RUNS runs of about a millisecond. */
static double measure(const work *w) {
    double best = 1e30;
    uint32_t n = TILES;
    for (uint32_t run = 0; run < RUNS; run++) {
        uint64_t t0 = kvli_clock_now();
        for (uint32_t i = 0; i < n; i++) once(w, i % TILES);
        double ns = (double)(kvli_clock_now() - t0);
        if (ns / n < best) best = ns / n;
        if (ns < 1e6 && n < 1u << 20) n *= 2;
    }
    return best;
}

static void line(const char *name, work w, kvl_simd last, double copy) {
    printf("  %-14s", name);
    for (int p = KVL_SIMD_SCALAR; p <= (int)last; p++) {
        w.simd = (kvl_simd)p;
        double ns = measure(&w);
        printf(" %9.0f (%6.1f)", ns, ns / copy);
    }
    printf("\n");
}

int main(void) {
    static const char *const names[] = {"int8",      "int8_channel", "fp8_e4m3", "nvfp4",
                                        "nvfp4+rot", "int4",         "int4+rot", "int4_channel"};
    kvl_simd last = kvli_simd_best();
    uint32_t seed = 1;
    for (uint32_t i = 0; i < TILES * TOKENS * 128; i++) {
        seed = seed * 1664525u + 1013904223u;
        rows[i / (TOKENS * 128)][i % (TOKENS * 128)] = (float)((int)(seed >> 16) - 32768) / 10000;
    }
    for (uint32_t dim = 64; dim <= 128; dim += 64) {
        work w;
        memset(&w, 0, sizeof w);
        w.side.tokens = TOKENS;
        w.side.dim = dim;
        w.side.global = 1.0f / 16.0f;
        double copy = measure(&w);
        printf("a tile of %d x %u, ns (and times memcpy of its F16 bytes, %.0f ns); columns: scalar%s%s\n",
               TOKENS, dim, copy, last >= KVL_SIMD_AVX2 ? ", avx2" : "",
               last >= KVL_SIMD_AVX512 ? ", avx512" : "");
        w.what = 1;
        line("write f32->f16", w, last, copy);
        w.what = 2;
        for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
            kvl_format f = kvl_format_from_name(names[i]);
            w.side.format = f & ~(kvl_format)KVL_ROTATED;
            w.side.rotated = w.side.format != f;
            line(names[i], w, last, copy);
        }
    }
    return 0;
}
