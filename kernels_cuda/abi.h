/* What the host side in kvlite.h (>>cuda) and the kernels say to each other. C99 and CUDA C++; the text of this file stands
   at the top of the generated kvlite_cuda_kernels.h, so that both sides always have the same.

   Every kernel takes one of these structs, by value, as its only parameter. Addresses are device addresses. */
#ifndef KVLI_CUDA_ABI_H
#define KVLI_CUDA_ABI_H
#ifndef KVLI_TABLES_H
#include "tables.h"
#endif

/* q, k, v or out: [rows][heads][dim]; element (r, h, e) at data + (r * row_stride + h * head_stride + e) * size. Not
   aligned to more than an element. */
typedef struct kvli_cu_tensor {
    uint64_t data;
    uint64_t row_stride, head_stride; /* in elements */
    uint32_t dtype, reserved;
} kvli_cu_tensor;

/* Where a layer's tiles stand. Index 0: packed blocks, 1: exact ones (equal where there is one class). Tile of KV head h:
   K at (entry & ~FLAGS) + offset[class] + h * head_stride[class] (scratch: without offset), V v_offset[class] after it. */
typedef struct kvli_cu_pages {
    uint64_t offset[2], head_stride[2], v_offset[2];
} kvli_cu_pages;

/* grid (stores, n_kv_heads, 2: K and V) */
typedef struct kvli_cu_store_args {
    const kvli_gpu_counts *counts;
    const kvli_gpu_store *stores;
    uint32_t *taint; /* [spans] becomes 1 where a number was not finite after rounding to the exact format */
    kvli_cu_tensor k, v;
    kvli_cu_pages pages;
    uint32_t block_tokens, k_dim, v_dim, exact; /* exact: format of exact tiles */
    uint32_t k_format, v_format, k_rotated, v_rotated;
    float k_global, v_global; /* NVFP4 */
} kvli_cu_store_args;

/* Kernels decode, prefill, plain: grid (items, n_kv_heads). merge: grid (merges, n_kv_heads).
   A score is scale * q·k, softcap * tanh(score / softcap) where softcap is not 0. Partial results are in base 2: m is the
   largest score times log2(e) or up to 8 less, l the sum of 2^(score * log2(e) - m), o the sum of such weights times v,
   rotation undone.
   A part of which a row sees nothing has l = 0 and any finite m below -1e30. */
typedef struct kvli_cu_attend_args {
    const kvli_gpu_counts *counts;
    const kvli_gpu_span *spans;
    const uint64_t *entries;
    const kvli_gpu_item *items;
    const kvli_gpu_merge *merges;
    const float *sink_logits; /* [n_q_heads] or null */
    float *partial_o;         /* [partials][v_dim] */
    float *partial_ml;        /* [partials][2] m, l */
    kvli_cu_tensor q, out;
    kvli_cu_pages pages;
    uint32_t first_item, end_item; /* of items or merges in this launch; end_item is lowered to the
                                    count: decodes (plain, too), prefills or merges */
    uint32_t block_tokens, n_q_heads, n_kv_heads, gqa, dim;
    uint32_t window, sink_tokens; /* window 0 = none */
    uint32_t exact;               /* format of exact tiles */
    uint32_t stages;              /* decode: depth of a warp's ring: 0 below sm_80, else 1..4 */
    float scale, softcap;
    float k_global, v_global; /* NVFP4 */
} kvli_cu_attend_args;

/* grid (copies, n): n blocks of threads share each copy. */
typedef struct kvli_cu_copy_args {
    const kvli_gpu_counts *counts; /* counts->copies, or null: n_copies */
    const kvli_gpu_copy *copies;
    uint32_t n_copies, reserved;
} kvli_cu_copy_args;

/* The first n_rows rows of every tile of an exact block, one layer group's K and V of all heads. grid (copies, tiles) */
typedef struct kvli_cu_row_copy {
    uint64_t dst, src; /* addresses of blocks */
    uint32_t n_rows, reserved;
} kvli_cu_row_copy;
typedef struct kvli_cu_row_copy_args {
    const kvli_cu_row_copy *copies;
    uint64_t tile_bytes[2];     /* K, V; tiles alternate K, V, K, V from the start of the block */
    uint32_t row_bytes[2];      /* K, V */
    uint32_t n_copies, n_tiles; /* n_tiles: K and V tiles together */
} kvli_cu_row_copy_args;

/* For benchmarks: reads all of a range (16-byte words) and adds the sum of its 32-bit words to *sum. grid (n) */
typedef struct kvli_cu_read_args {
    uint64_t src, bytes;
    uint32_t *sum;
} kvli_cu_read_args;

/* ---- shapes that both sides must know ---- */
enum {
    KVLI_CU_STORE_THREADS = 128,
    KVLI_CU_STORE_SMEM =
        4096, /* bytes of dynamic shared memory; the other kernels of store.cu and copy.cu need none */
    KVLI_CU_DECODE_WARPS = 4,
    KVLI_CU_UNIT = 16,        /* tokens that a warp takes at once */
    KVLI_CU_DECODE_ROWS = 16, /* packed rows of a decode item: 8 or 16 by kernel */
    KVLI_CU_PREFILL_WARPS = 4,
    KVLI_CU_PLAIN_THREADS = 128,
    KVLI_CU_PLAIN_ROWS = 8, /* packed rows of a plain item */
    KVLI_CU_MERGE_THREADS = 128,
    KVLI_CU_COPY_THREADS = 256
};

/* kvl_decode_*: dynamic shared memory. First n x dim sums (f32), query rows (f16, padded by 4; with NVFP4 keys twice: rotated,
   then plain) and 13 n + 8 numbers about rows and warps; then WARPS * stages slots. A slot of a warp's ring holds a unit: 32
   bytes about it, K rows, K scales, V rows, V scales. */
KVLI_GPU_FN uint32_t kvli_cu_decode_slot(uint32_t k_format, uint32_t v_format, uint32_t dim) {
    return 32 + KVLI_CU_UNIT * (kvli_gpu_row_bytes(k_format, dim) + kvli_gpu_row_bytes(v_format, dim)) +
           KVLI_CU_UNIT *
               (kvli_gpu_token_scale_bytes(k_format, dim) + kvli_gpu_token_scale_bytes(v_format, dim)) +
           kvli_gpu_channel_scale_bytes(k_format, dim);
}
KVLI_GPU_FN uint32_t kvli_cu_decode_smem(uint32_t k_format, uint32_t v_format, uint32_t dim, uint32_t stages,
                                         uint32_t n) {
    return KVLI_CU_DECODE_WARPS * stages * kvli_cu_decode_slot(k_format, v_format, dim) + n * dim * 4 +
           (k_format == KVLI_GPU_NVFP4 ? 2 : 1) * n * (dim + 4) * 2 + (13 * n + 8) * 4;
}

/* The most packed rows of a decode item: the commonest head dims have kernels for 16, too (all would be too much text). */
KVLI_GPU_FN uint32_t kvli_cu_decode_rows(uint32_t dim) { return dim == 64 || dim == 128 ? 16 : 8; }

/* Prefill: the most packed rows of an item, the tokens it takes at once, and its shared memory: q, and two buffers of K
   and V, all as 16-bit numbers (of packed blocks' bytes and what they are decoded to, one each). At most 64 KB. */
KVLI_GPU_FN uint32_t kvli_cu_prefill_rows(uint32_t dim) { return dim <= 128 ? 128 : 64; }
KVLI_GPU_FN uint32_t kvli_cu_prefill_step(uint32_t dim) { return dim <= 128 ? 32 : 16; }
KVLI_GPU_FN uint32_t kvli_cu_prefill_smem(uint32_t dim) {
    return (kvli_cu_prefill_rows(dim) + 4 * kvli_cu_prefill_step(dim)) * dim * 2;
}

/* Plain: floats from one row of q or K to the next (4 apart, so that 16 rows stand in different banks), and shared
   memory: q, K of a unit, weights, and three numbers a row. */
KVLI_GPU_FN uint32_t kvli_cu_plain_stride(uint32_t dim) { return (dim + 31) / 32 * 32 + 4; }
KVLI_GPU_FN uint32_t kvli_cu_plain_smem(uint32_t dim) {
    return 4 * ((KVLI_CU_PLAIN_ROWS + KVLI_CU_UNIT) * kvli_cu_plain_stride(dim) +
                KVLI_CU_PLAIN_ROWS * (KVLI_CU_UNIT + 3));
}

#endif
