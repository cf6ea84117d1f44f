/* cuda_case.h - case.h on CUDA; a step's layers are replayed as a CUDA graph. */
#ifndef CUDA_CASE_H
#define CUDA_CASE_H

#include "kvlite.h"

#include "gpu.h"

typedef gpu case_device;
typedef gpu_ptr case_buffer;
#define CASE_PROGRAM "bench_cuda"
#include "case.h"

static case_buffer case_alloc(const gpu *g, size_t bytes) { return gpu_alloc(g, bytes); }
static case_buffer case_uploaded(const gpu *g, const void *from, size_t bytes) {
    return gpu_uploaded(g, from, bytes);
}
static void case_free(const gpu *g, case_buffer b) { gpu_free(g, b); }
static void case_sync(const gpu *g) { gpu_sync(g); }
static uint64_t case_room(const gpu *g) { return gpu_free_bytes(g); }
static void case_put(const case_cache *c, uint64_t block, case_buffer from, uint64_t at, size_t bytes) {
    GPU(c->g, MemcpyDtoD, block, from + at, bytes, c->g->stream);
}
static kvl_tensor case_rows(case_buffer b) {
    return (kvl_tensor){.data = (void *)(uintptr_t)b, .memory = KVL_MEMORY_DEVICE, .dtype = KVL_DTYPE_F16};
}

/* All layers of an open step as a graph; *nodes of it. */
static void *case_capture(const case_cache *c, const kvl_step *step, size_t *nodes) {
    void *graph = NULL, *exec = NULL;
    GPU(c->g, StreamBeginCapture, c->g->stream, GPU_CAPTURE_THREAD_LOCAL);
    for (uint32_t l = 0; l < c->n_layers; l++) case_attend(c, step, l);
    GPU(c->g, StreamEndCapture, c->g->stream, &graph);
    GPU(c->g, GraphGetNodes, graph, NULL, nodes);
    GPU(c->g, GraphInstantiate, &exec, graph, 0);
    GPU(c->g, GraphDestroy, graph);
    return exec;
}

/* Seconds of one layer of a step, from a graph of all layers that is replayed for `slice` seconds, three times: the
 * middle one. The step is aborted then, the context is as before. */
static double case_time(case_cache *c, double slice) {
    size_t nodes;
    rounds r = {.n = 0};
    const kvl_step *step = case_begin(c, NULL, c->shape.batch, c->shape.rows);
    void *exec = case_capture(c, step, &nodes);
    GPU(c->g, GraphLaunch, exec, c->g->stream);
    gpu_sync(c->g);
    for (uint32_t n = 1; r.n < 3;) {
        double start = runtime_now();
        for (uint32_t i = 0; i < n; i++) GPU(c->g, GraphLaunch, exec, c->g->stream);
        gpu_sync(c->g);
        double s = runtime_now() - start;
        if (s >= slice / 3)
            rounds_add(&r, s / n / c->n_layers);
        else
            n = s * 8 < slice ? n * 2 : (uint32_t)(n * slice / 3 / s) + 1;
    }
    GPU(c->g, GraphExecDestroy, exec);
    case_must(c, kvl_step_abort(c->cache, step), "kvl_step_abort");
    return rounds_spread(&r).median;
}

static void case_answer(case_cache *c, const uint32_t *which, uint32_t n, uint16_t *out) {
    const kvl_step *step = case_begin(c, which, n, c->shape.rows);
    size_t numbers = (size_t)n * c->shape.rows * CASE_KV_HEADS * c->shape.gqa * CASE_DIM;
    for (uint32_t l = 0; l < c->n_layers; l++) case_attend(c, step, l);
    gpu_download(c->g, out, c->out, numbers * 2);
    case_must(c, kvl_step_abort(c->cache, step), "kvl_step_abort");
}

#endif /* CUDA_CASE_H */
