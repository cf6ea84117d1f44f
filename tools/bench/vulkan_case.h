/* vulkan_case.h - case.h on Vulkan, with a lent device; a step's layers are recorded once and submitted again and again. */
#ifndef VULKAN_CASE_H
#define VULKAN_CASE_H

#include "kvlite.h"

#include "vk.h"

typedef vk case_device;
typedef vk_buffer case_buffer;
#define CASE_PROGRAM "bench_vulkan"
#include "case.h"

static case_buffer case_alloc(const vk *v, size_t bytes) { return vk_alloc(v, bytes, false); }
static case_buffer case_uploaded(const vk *v, const void *from, size_t bytes) {
    vk_buffer b = vk_alloc(v, bytes, false);
    vk_upload(v, b, 0, from, bytes);
    return b;
}
static void case_free(const vk *v, case_buffer b) { vk_free(v, b); }
static uint64_t case_room(const vk *v) { return vk_free_bytes(v); }

/* Where the block at this address stands (kvl_step.block_address). */
static kvli_vk_buffer case_bank(const kvl_cache *c, uint64_t block) {
    return kvli_vk_of(c)->banks[block >> 32].buffer;
}

/* Copies that were recorded and not yet submitted. */
static kvli_vk_commands case_copies;

static void case_put(const case_cache *c, uint64_t block, case_buffer from, uint64_t at, size_t bytes) {
    kvli_vk_copy copy = {.src = at, .dst = (uint32_t)block, .bytes = bytes};
    if (!case_copies) {
        case_copies = vk_begin(c->g);
        vk_barrier(c->g, case_copies);
    }
    c->g->f.copy_buffer(case_copies, from.buffer, case_bank(c->cache, block), 1, &copy);
}
static void case_sync(const vk *v) {
    if (!case_copies) return;
    vk_barrier(v, case_copies);
    vk_end_and_run(v, case_copies);
    case_copies = NULL;
}
static kvl_tensor case_rows(case_buffer b) {
    return (kvl_tensor){.data = b.buffer, .memory = KVL_MEMORY_DEVICE, .dtype = KVL_DTYPE_F16};
}

/* All layers of an open step. */
static kvli_vk_commands case_record(const case_cache *c, const kvl_step *step) {
    kvli_vk_commands commands = vk_begin(c->g);
    vk_barrier(c->g, commands); /* between one time and the next */
    case_must(c, kvl_step_record(c->cache, step, commands), "kvl_step_record");
    for (uint32_t l = 0; l < c->n_layers; l++) case_attend(c, step, l);
    case_must(c, kvl_step_record(c->cache, step, NULL), "kvl_step_record");
    VK(c->g, end, commands);
    return commands;
}

/* Seconds of commands that do something n times: the least of rounds that take `slice` seconds together, each of as many
 * submits as take some time. */
static double vk_time(const vk *v, kvli_vk_commands commands, double slice) {
    double best = 1e30, spent = 0;
    vk_run(v, commands, 1); /* where a driver compiles at the first dispatch */
    for (uint32_t n = 1, round = 0; round < 3 || (round < 1000 && spent < slice);) {
        double start = runtime_now();
        vk_run(v, commands, n);
        double s = runtime_now() - start;
        if (s < slice / 8 && n < 1u << 12) {
            n *= 2;
            continue;
        }
        if (s / n < best) best = s / n;
        spent += s;
        round++;
    }
    return best;
}

/* Seconds of one layer of a step, which is aborted then: the context is as before. */
static double case_time(case_cache *c, double slice) {
    const kvl_step *step = case_begin(c, NULL, c->shape.batch, c->shape.rows);
    kvli_vk_commands commands = case_record(c, step);
    double s = vk_time(c->g, commands, slice) / c->n_layers;
    c->g->free_commands(c->g->device, c->g->pool, 1, &commands);
    case_must(c, kvl_step_abort(c->cache, step), "kvl_step_abort");
    return s;
}

static void case_answer(case_cache *c, const uint32_t *which, uint32_t n, uint16_t *out) {
    const kvl_step *step = case_begin(c, which, n, c->shape.rows);
    size_t numbers = (size_t)n * c->shape.rows * CASE_KV_HEADS * c->shape.gqa * CASE_DIM;
    kvli_vk_commands commands = case_record(c, step);
    vk_run(c->g, commands, 1);
    c->g->free_commands(c->g->device, c->g->pool, 1, &commands);
    vk_download(c->g, out, c->out, 0, numbers * 2);
    case_must(c, kvl_step_abort(c->cache, step), "kvl_step_abort");
}

#endif /* VULKAN_CASE_H */
