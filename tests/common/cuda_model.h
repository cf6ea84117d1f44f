/* A small model for tests of the CUDA backend: q, k and v of a row are made from its token and position, with tensors in
   host memory or in the mock's device memory. */
#ifndef KVL_TESTS_CUDA_MODEL_H
#define KVL_TESTS_CUDA_MODEL_H
#include "../mock_cuda/driver.h"
#include "../mock_cuda/mock_cuda.h"

#include "../../kvlite.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CM_LAYERS = 2, CM_Q_HEADS = 4, CM_KV_HEADS = 2, CM_DIM = 64, CM_ROWS = 128, CM_T = 32 };

typedef struct cm_buffers { /* of one layer of one step */
    float q[CM_ROWS][CM_Q_HEADS][CM_DIM], k[CM_ROWS][CM_KV_HEADS][CM_DIM], v[CM_ROWS][CM_KV_HEADS][CM_DIM],
        out[CM_ROWS][CM_Q_HEADS][CM_DIM];
} cm_buffers;

static float cm_noise(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    x ^= x >> 31;
    return ((float)(x & 0xffff) + (float)(x >> 16 & 0xffff) - 65536) / 32768;
}
static void cm_numbers(float *out, uint32_t n, uint64_t seed) {
    uint32_t i;
    for (i = 0; i < n; i++) out[i] = cm_noise(seed * 4096 + i) * (i % 16 == 3 ? 3 : 1);
}

static void cm_fill(cm_buffers *b, const kvl_step *step, uint32_t layer) {
    uint32_t r;
    for (r = 0; r < step->n_tokens; r++) {
        uint64_t seed = ((uint64_t)(uint32_t)step->tokens[r] * 4096 + step->positions[r]) * 8 + layer;
        cm_numbers(b->q[r][0], CM_Q_HEADS * CM_DIM, seed * 4);
        cm_numbers(b->k[r][0], CM_KV_HEADS * CM_DIM, seed * 4 + 1);
        cm_numbers(b->v[r][0], CM_KV_HEADS * CM_DIM, seed * 4 + 2);
    }
}

static kvl_geometry cm_geometry(const char *preset, const kvl_layer *layers) {
    kvl_geometry g;
    memset(&g, 0, sizeof g);
    g.n_layers = CM_LAYERS;
    g.n_q_heads = CM_Q_HEADS;
    g.n_kv_heads = CM_KV_HEADS;
    g.k_dim = CM_DIM;
    g.block_tokens = CM_T;
    g.preset = preset;
    g.layers = layers;
    return g;
}

/* The same buffers in device memory. The calls here are the test's own. */
typedef struct cm_device {
    unsigned long long at; /* a cm_buffers */
    void *context, *stream;
} cm_device;

static int cm_device_open(cm_device *d, void *context, void *stream) {
    int r;
    mock_cuda_own(true);
    d->context = context;
    d->stream = stream;
    d->at = 0;
    r = cuCtxPushCurrent_v2(context);
    if (!r) r = cuMemAlloc_v2(&d->at, sizeof(cm_buffers));
    cuCtxPopCurrent_v2(NULL);
    mock_cuda_own(false);
    return r;
}
static void cm_device_close(cm_device *d) {
    mock_cuda_own(true);
    if (!cuCtxPushCurrent_v2(d->context)) {
        cuStreamSynchronize(d->stream);
        cuMemFree_v2(d->at);
        cuCtxPopCurrent_v2(NULL);
    }
    mock_cuda_own(false);
}
/* From a queue that is not pinned: taken at once. */
static void cm_upload(const cm_device *d, const cm_buffers *b) {
    mock_cuda_own(true);
    if (!cuCtxPushCurrent_v2(d->context)) {
        cuMemcpyHtoDAsync_v2(d->at, b, offsetof(cm_buffers, out), d->stream);
        cuMemsetD8Async(d->at + offsetof(cm_buffers, out), 0xff, sizeof b->out, d->stream);
        cuCtxPopCurrent_v2(NULL);
    }
    mock_cuda_own(false);
}
static void cm_download(const cm_device *d, cm_buffers *b) {
    mock_cuda_own(true);
    if (!cuCtxPushCurrent_v2(d->context)) {
        cuMemcpyDtoHAsync_v2(b->out, d->at + offsetof(cm_buffers, out), sizeof b->out, d->stream);
        cuCtxPopCurrent_v2(NULL);
    }
    mock_cuda_own(false);
}

static kvl_result cm_call(kvl_cache *cache, const kvl_step *step, uint32_t layer, const cm_device *d,
                          cm_buffers *b) {
    kvl_tensor t[4];
    size_t at[4] = {offsetof(cm_buffers, q), offsetof(cm_buffers, k), offsetof(cm_buffers, v),
                    offsetof(cm_buffers, out)};
    uint32_t i;
    memset(t, 0, sizeof t);
    for (i = 0; i < 4; i++) {
        t[i].memory = d ? KVL_MEMORY_DEVICE : KVL_MEMORY_HOST;
        t[i].data = d ? (void *)(uintptr_t)(d->at + at[i]) : (void *)((char *)b + at[i]);
    }
    return kvl_attend(cache, step, layer, &t[0], &t[1], &t[2], &t[3]);
}

/* One layer. d null: tensors in host memory. */
static kvl_result cm_attend(kvl_cache *cache, const kvl_step *step, uint32_t layer, const cm_device *d,
                            cm_buffers *b) {
    kvl_result r;
    cm_fill(b, step, layer);
    memset(b->out, 0xff, sizeof b->out);
    if (d) cm_upload(d, b);
    r = cm_call(cache, step, layer, d, b);
    if (d && r == KVL_OK) cm_download(d, b);
    return r;
}

/* The next token, from what the last layer gave for a row: the same where numbers differ by a rounding. */
static inline int32_t cm_next(const cm_buffers *b, uint32_t row) {
    uint32_t e, hash = 17;
    for (e = 0; e < 8; e++) hash = hash * 31 + (uint32_t)(int32_t)floorf(b->out[row][e % CM_Q_HEADS][e] * 8);
    return (int32_t)(hash % 1000);
}
#endif
