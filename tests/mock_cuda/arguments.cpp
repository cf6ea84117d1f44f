/* The addresses in the arguments of kvlite's kernels (kernels_cuda/abi.h), followed as far as the kernel does: on the CPU
   host memory would do as well, on a GPU it does not. */
#include "state.h"

#include "../../kernels_cuda/abi.h"

#include <cstring>

static bool none(uint64_t at, uint64_t n) { return n && !device_range(at, n); }
static bool none(const void *p, uint64_t n) { return none((uint64_t)p, n); }
static bool no_tensor(const kvli_cu_tensor &t) { return none(t.data, t.dtype == KVLI_GPU_DTYPE_F32 ? 4 : 2); }
static bool no_block(uint64_t entry) { return none(entry & ~(uint64_t)KVLI_GPU_FLAGS, 128); }
static bool is(const char *name, const char *prefix) { return !strncmp(name, prefix, strlen(prefix)); }

static const char *store_problem(const kvli_cu_store_args &a) {
    if (none(a.counts, sizeof *a.counts)) return "counts";
    uint32_t n = a.counts->stores;
    if (none(a.stores, sizeof *a.stores * n)) return "stores";
    if (n && no_tensor(a.k)) return "k";
    if (n && no_tensor(a.v)) return "v";
    for (uint32_t i = 0; i < n; i++) {
        if (no_block(a.stores[i].exact)) return "the exact block of a store";
        if (a.stores[i].sealed && no_block(a.stores[i].sealed)) return "the sealed block of a store";
        if (none(a.taint + a.stores[i].span, 4)) return "taint";
    }
    return nullptr;
}

static const char *item_problem(const kvli_cu_attend_args &a, const kvli_gpu_item &item) {
    const kvli_gpu_span &s = a.spans[item.span];
    if (none(&s, sizeof s)) return "the span of an item";
    for (uint32_t j = item.begin; j < item.end; j++) {
        const uint64_t *e = &a.entries[(uint32_t)(s.table + j)];
        if (none(e, 8) || (*e && no_block(*e))) return "an entry of a table";
    }
    for (uint32_t j = item.own_begin; j < item.own_end; j++) {
        const uint64_t *e = &a.entries[(uint32_t)(s.own + j - s.first_own)];
        if (none(e, 8) || no_block(*e)) return "an own entry";
    }
    if (item.partial == KVLI_GPU_NONE) return no_tensor(a.out) ? "out" : nullptr;
    uint64_t last = (uint64_t)(item.partial + item.n_rows) * a.n_kv_heads;
    if (none(a.partial_o, last * a.dim * 4)) return "partial_o";
    return none(a.partial_ml, last * 8) ? "partial_ml" : nullptr;
}

static const char *attend_problem(const kvli_cu_attend_args &a, bool merge,
                                  uint32_t kvli_gpu_counts::*count) {
    if (none(a.counts, sizeof *a.counts)) return "counts";
    uint32_t end = a.end_item < a.counts->*count ? a.end_item : a.counts->*count;
    if (a.first_item >= end) return nullptr;
    if (a.sink_logits && none(a.sink_logits, a.n_q_heads * 4ull)) return "sink_logits";
    if (merge) {
        if (none(a.merges + a.first_item, sizeof *a.merges * (end - a.first_item))) return "merges";
        return no_tensor(a.out) ? "out" : nullptr;
    }
    if (no_tensor(a.q)) return "q";
    if (none(a.items + a.first_item, sizeof *a.items * (end - a.first_item))) return "items";
    for (uint32_t i = a.first_item; i < end; i++) {
        const char *problem = item_problem(a, a.items[i]);
        if (problem) return problem;
    }
    return nullptr;
}

static const char *copy_problem(const kvli_cu_copy_args &a) {
    if (a.counts && none(a.counts, sizeof *a.counts)) return "counts";
    uint32_t n = a.counts ? a.counts->copies : a.n_copies;
    if (none(a.copies, sizeof *a.copies * n)) return "copies";
    for (uint32_t i = 0; i < n; i++) {
        if (none(a.copies[i].dst, a.copies[i].bytes)) return "where a copy goes to";
        if (none(a.copies[i].src, a.copies[i].bytes)) return "where a copy comes from";
    }
    return nullptr;
}

static const char *row_copy_problem(const kvli_cu_row_copy_args &a) {
    uint64_t bytes = (a.tile_bytes[0] + a.tile_bytes[1]) * (a.n_tiles / 2);
    if (none(a.copies, sizeof *a.copies * a.n_copies)) return "copies";
    for (uint32_t i = 0; i < a.n_copies; i++) {
        if (none(a.copies[i].dst, bytes)) return "the block that rows go to";
        if (none(a.copies[i].src, bytes)) return "the block that rows come from";
    }
    return nullptr;
}

const char *arguments_problem(const char *name, const void *args) {
    const kvli_cu_attend_args &attend = *(const kvli_cu_attend_args *)args;
    if (!strcmp(name, "kvl_store")) return store_problem(*(const kvli_cu_store_args *)args);
    if (!strcmp(name, "kvl_copy")) return copy_problem(*(const kvli_cu_copy_args *)args);
    if (!strcmp(name, "kvl_copy_rows")) return row_copy_problem(*(const kvli_cu_row_copy_args *)args);
    if (!strcmp(name, "kvl_merge")) return attend_problem(attend, true, &kvli_gpu_counts::merges);
    if (is(name, "kvl_decode")) return attend_problem(attend, false, &kvli_gpu_counts::decodes);
    if (is(name, "kvl_prefill")) return attend_problem(attend, false, &kvli_gpu_counts::prefills);
    if (!strcmp(name, "kvl_plain")) return attend_problem(attend, false, &kvli_gpu_counts::decodes);
    return nullptr;
}
