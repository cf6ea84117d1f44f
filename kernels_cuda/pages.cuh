/* From a block table's entry to addresses, and what a query sees. block_tokens is a power of two everywhere. */
#ifndef KVL_PAGES_CUH
#define KVL_PAGES_CUH
#include "port.cuh"
#include "abi.h"

/* One KV head's K and V tiles in a block. */
struct kvl_tiles {
    const uint8_t *k, *v;
};

KVL_D bool kvl_entry_is_exact(uint64_t entry) { return (entry & (KVLI_GPU_EXACT | KVLI_GPU_SCRATCH)) != 0; }

KVL_D kvl_tiles kvl_tiles_of(const kvli_cu_pages &pages, uint64_t entry, uint32_t head) {
    bool exact = kvl_entry_is_exact(entry);
    uint64_t at = entry & ~(uint64_t)KVLI_GPU_FLAGS;
    if (!(entry & KVLI_GPU_SCRATCH)) at += exact ? pages.offset[1] : pages.offset[0];
    at += head * (exact ? pages.head_stride[1] : pages.head_stride[0]);
    return kvl_tiles{(const uint8_t *)at,
                     (const uint8_t *)(at + (exact ? pages.v_offset[1] : pages.v_offset[0]))};
}

/* What limits sight in a layer. */
struct kvl_sight {
    uint32_t block_tokens, window, sink_tokens;
};

KVL_D uint32_t kvl_block_start(const kvl_sight &s, uint32_t token) { return token & ~(s.block_tokens - 1); }

/* Whether a query at position x sees a token of an own block, or else of a block of the table (kvli_gpu_item's rule). */
KVL_D bool kvl_sees(const kvl_sight &s, bool own, uint32_t x, uint32_t token) {
    uint32_t own_start = kvl_block_start(s, x);
    if (own ? token < own_start || token > x : token >= own_start) return false;
    return s.window == 0 || x - token < s.window || token < s.sink_tokens;
}

/* The same for all queries at positions x_first..x_last and tokens first..last of one block: does any see any? */
KVL_D bool kvl_any_sees(const kvl_sight &s, bool own, uint32_t x_first, uint32_t x_last, uint32_t first,
                        uint32_t last) {
    uint32_t start = kvl_block_start(s, first), next = start + s.block_tokens;
    uint32_t from = own ? first : next, to = own && x_last >= next ? next - 1 : x_last;
    uint32_t x = x_first > from ? x_first : from; /* the first query that may */
    if (x > to) return false;
    return s.window == 0 || x - (last < x ? last : x) < s.window || first < s.sink_tokens;
}

/* Does every one see all? */
KVL_D bool kvl_all_see(const kvl_sight &s, bool own, uint32_t x_first, uint32_t x_last, uint32_t first,
                       uint32_t last) {
    uint32_t own_start = kvl_block_start(s, x_first);
    if (own ? first < own_start || last > x_first || x_last - own_start >= s.block_tokens : last >= own_start)
        return false;
    return s.window == 0 || x_last - first < s.window || last < s.sink_tokens;
}

/* ---- query and output rows ---- */

/* Element i of a tensor, and element e of its row and head, as f32. Without a branch, so that many may be under way. */
KVL_D float kvl_number_at(const kvli_cu_tensor &t, uint64_t i) {
    bool f32 = t.dtype == KVLI_GPU_DTYPE_F32;
    const uint16_t *p = (const uint16_t *)t.data + (i << f32);
    uint32_t first = p[0], last = p[f32];
    float wide = __uint_as_float(last << 16 | (f32 ? first : 0)); /* an f32, or a bfloat16 */
    return t.dtype == KVLI_GPU_DTYPE_F16 ? kvl_h2f((uint16_t)first) : wide;
}
KVL_D float kvl_tensor_get(const kvli_cu_tensor &t, uint64_t row, uint32_t head, uint32_t e) {
    return kvl_number_at(t, row * t.row_stride + (uint64_t)head * t.head_stride + e);
}
KVL_D void kvl_tensor_set(const kvli_cu_tensor &t, uint64_t row, uint32_t head, uint32_t e, float x) {
    uint64_t i = row * t.row_stride + (uint64_t)head * t.head_stride + e;
    if (t.dtype == KVLI_GPU_DTYPE_F32)
        ((float *)t.data)[i] = x;
    else
        ((uint16_t *)t.data)[i] = t.dtype == KVLI_GPU_DTYPE_F16 ? kvl_f2h(x) : kvl_f2bf(x);
}

/* Packed row p of a span and a KV head: row p / gqa of the span, query head p % gqa of that KV head. */
struct kvl_row {
    uint64_t tensor_row;
    uint32_t head, position;
};
KVL_D kvl_row kvl_row_of(const kvli_cu_attend_args &a, const kvli_gpu_span &span, uint32_t kv_head,
                         uint32_t p) {
    uint32_t r = p / a.gqa;
    return kvl_row{(uint64_t)span.first_row + r, kv_head * a.gqa + p % a.gqa, span.position + r};
}

#endif
