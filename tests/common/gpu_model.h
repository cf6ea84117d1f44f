/* A small model for tests of GPU backends: q, k and v of a row are made from its token and position. */
#ifndef KVL_TESTS_GPU_MODEL_H
#define KVL_TESTS_GPU_MODEL_H
#include "../../kvlite.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GM_LAYERS = 2, GM_Q_HEADS = 4, GM_KV_HEADS = 2, GM_DIM = 64, GM_ROWS = 128, GM_T = 32 };

typedef struct gm_buffers { /* of one layer of one step */
    float q[GM_ROWS][GM_Q_HEADS][GM_DIM], k[GM_ROWS][GM_KV_HEADS][GM_DIM], v[GM_ROWS][GM_KV_HEADS][GM_DIM],
        out[GM_ROWS][GM_Q_HEADS][GM_DIM];
} gm_buffers;

static float gm_noise(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    x ^= x >> 31;
    return ((float)(x & 0xffff) + (float)(x >> 16 & 0xffff) - 65536) / 32768;
}
static void gm_numbers(float *out, uint32_t n, uint64_t seed) {
    uint32_t i;
    for (i = 0; i < n; i++) out[i] = gm_noise(seed * 4096 + i) * (i % 16 == 3 ? 3 : 1);
}

static void gm_fill(gm_buffers *b, const kvl_step *step, uint32_t layer) {
    uint32_t r;
    for (r = 0; r < step->n_tokens; r++) {
        uint64_t seed = ((uint64_t)(uint32_t)step->tokens[r] * 4096 + step->positions[r]) * 8 + layer;
        gm_numbers(b->q[r][0], GM_Q_HEADS * GM_DIM, seed * 4);
        gm_numbers(b->k[r][0], GM_KV_HEADS * GM_DIM, seed * 4 + 1);
        gm_numbers(b->v[r][0], GM_KV_HEADS * GM_DIM, seed * 4 + 2);
    }
}

static kvl_geometry gm_geometry(const char *preset, const kvl_layer *layers) {
    kvl_geometry g;
    memset(&g, 0, sizeof g);
    g.n_layers = GM_LAYERS;
    g.n_q_heads = GM_Q_HEADS;
    g.n_kv_heads = GM_KV_HEADS;
    g.k_dim = GM_DIM;
    g.block_tokens = GM_T;
    g.preset = preset;
    g.layers = layers;
    return g;
}

/* One layer, tensors in host memory. */
static inline kvl_result gm_attend(kvl_cache *cache, const kvl_step *step, uint32_t layer, gm_buffers *b) {
    kvl_tensor t[4];
    memset(t, 0, sizeof t);
    gm_fill(b, step, layer);
    memset(b->out, 0xff, sizeof b->out);
    t[0].data = b->q;
    t[1].data = b->k;
    t[2].data = b->v;
    t[3].data = b->out;
    return kvl_attend(cache, step, layer, &t[0], &t[1], &t[2], &t[3]);
}

/* The next token, from what the last layer gave for a row: the same where numbers differ by a rounding. */
static inline int32_t gm_next(const gm_buffers *b, uint32_t row) {
    uint32_t e, hash = 17;
    for (e = 0; e < 8; e++) hash = hash * 31 + (uint32_t)(int32_t)floorf(b->out[row][e % GM_Q_HEADS][e] * 8);
    return (int32_t)(hash % 1000);
}
#endif
