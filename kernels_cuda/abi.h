/* What the host side in kvlite.h (>>cuda) and the kernels say to each other. C99 and CUDA C++; the text of this file stands
   at the top of the generated kvlite_cuda_kernels.h, so that both sides always have the same.

   Every kernel takes one of these structs, by value, as its only parameter. Addresses are device addresses. */
#ifndef KVLI_CUDA_ABI_H
#define KVLI_CUDA_ABI_H
#include <stdint.h>

#define KVLI_CU_NONE 0xffffffffu

/* Functions for both sides; constant expressions where the language has them. */
#if defined(__CUDACC__)
#define KVLI_CU_FN static __host__ __device__ constexpr
#elif defined(__cplusplus) && __cplusplus >= 201402L
#define KVLI_CU_FN static constexpr
#else
#define KVLI_CU_FN static inline
#endif

/* An entry of a block table: the address of a block (a multiple of 128) with flags in its low bits. 0: no block
   (behind a window). A slot of the step's exact scratch holds one layer's tiles alone: no layer offset is added. */
enum { KVLI_CU_EXACT = 1, KVLI_CU_SCRATCH = 2, KVLI_CU_FLAGS = 127 };

/* Numbers as in kvl_format and kvl_dtype (kvlite.h checks that they agree). */
enum {
    KVLI_CU_F32 = 1,
    KVLI_CU_F16,
    KVLI_CU_BF16,
    KVLI_CU_INT8,
    KVLI_CU_INT8_CHANNEL,
    KVLI_CU_FP8_E4M3,
    KVLI_CU_NVFP4,
    KVLI_CU_INT4,
    KVLI_CU_INT4_CHANNEL
};
enum { KVLI_CU_DTYPE_F32 = 0, KVLI_CU_DTYPE_F16, KVLI_CU_DTYPE_BF16 };

/* A tile: block_tokens rows of row_bytes, then what scales them: for each token, or for each channel f16 scales, then f16
   zeros; padded to a multiple of 128. */
KVLI_CU_FN uint32_t kvli_cu_row_bytes(uint32_t format, uint32_t dim) {
    return format == KVLI_CU_F32                                                                    ? 4 * dim
           : format == KVLI_CU_F16 || format == KVLI_CU_BF16                                        ? 2 * dim
           : format == KVLI_CU_INT8 || format == KVLI_CU_INT8_CHANNEL || format == KVLI_CU_FP8_E4M3 ? dim
                                                                                                    : dim / 2;
}
KVLI_CU_FN uint32_t kvli_cu_token_scale_bytes(uint32_t format, uint32_t dim) {
    return format == KVLI_CU_INT8 || format == KVLI_CU_FP8_E4M3 ? 2
           : format == KVLI_CU_NVFP4                            ? dim / 16
           : format == KVLI_CU_INT4                             ? (dim + 63) / 64 * 4
                                                                : 0;
}
KVLI_CU_FN uint32_t kvli_cu_channel_scale_bytes(uint32_t format, uint32_t dim) {
    return format == KVLI_CU_INT8_CHANNEL || format == KVLI_CU_INT4_CHANNEL ? 4 * dim : 0;
}

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

/* How many of each array's elements this step uses; grids may be larger (they are padded, so that a captured graph can
   be replayed): a block of threads whose item is not there returns at once. */
typedef struct kvli_cu_counts {
    uint32_t stores, copies, decodes, prefills, merges;
    uint32_t reserved[3];
} kvli_cu_counts;

/* One own block of one span: rows of k and v to write into its exact tiles, and whether it is sealed then. */
typedef struct kvli_cu_store {
    uint64_t exact;  /* entry of the exact block or scratch slot */
    uint64_t sealed; /* entry of the packed block to seal into, 0: it is not complete, or stays exact */
    uint32_t span;   /* whose taint is set */
    uint32_t row;    /* first row in k and v */
    uint32_t n_rows;
    uint32_t at; /* first row in the tile; rows before it are there already */
} kvli_cu_store;

/* grid (stores, n_kv_heads, 2: K and V) */
typedef struct kvli_cu_store_args {
    const kvli_cu_counts *counts;
    const kvli_cu_store *stores;
    uint32_t *taint; /* [spans] becomes 1 where a number was not finite after rounding to the exact format */
    kvli_cu_tensor k, v;
    kvli_cu_pages pages;
    uint32_t block_tokens, k_dim, v_dim, exact; /* exact: format of exact tiles */
    uint32_t k_format, v_format, k_rotated, v_rotated;
    float k_global, v_global; /* NVFP4 */
} kvli_cu_store_args;

/* Rows first_row.. of the step are positions position.. of a sequence. Entry of table block j: entries[table + j] (in
   32-bit arithmetic: entries of blocks that nobody reads need not be there). Where the exact rows of block first_own + i
   stand: entries[own + i]. */
typedef struct kvli_cu_span {
    uint32_t first_row, n_rows, position;
    uint32_t table, first_own, own;
} kvli_cu_span;

/* Attention of some query rows of a span, for each KV head, over a range of blocks. Query rows are packed: row p of a
   span and a KV head is query head p % gqa of that KV head's group at the span's row p / gqa.
     A query at position x in block j = x / block_tokens sees token t of table block b in [begin, end) if b < j, and
   token t of own block b in [own_begin, own_end) if b == j and t <= x; both only if there is no window, or t + window > x,
   or t < sink_tokens. Rows at or past position + n_rows of the last own block were never written and may hold NaN. */
typedef struct kvli_cu_item {
    uint32_t span;
    uint32_t row, n_rows; /* packed rows */
    uint32_t begin, end;  /* blocks of the table */
    uint32_t own_begin, own_end;
    uint32_t
        partial; /* KVLI_CU_NONE: this is all that the rows see, and `out` is written. Else: partial result p of
                         KV head h and packed row r is number partial * n_kv_heads + h * n_rows + (r - row) */
} kvli_cu_item;

/* Partial results of n_parts items with the same rows: of item i at partial + i * n_rows. */
typedef struct kvli_cu_merge {
    uint32_t span, row, n_rows, partial, n_parts;
    uint32_t reserved[3];
} kvli_cu_merge;

/* Kernels decode, prefill, plain: grid (items, n_kv_heads). merge: grid (merges, n_kv_heads).
   A score is scale * q·k, softcap * tanh(score / softcap) where softcap is not 0. Partial results are in base 2: m is the
   largest score times log2(e) or up to 8 less, l the sum of 2^(score * log2(e) - m), o the sum of such weights times v,
   rotation undone.
   A part of which a row sees nothing has l = 0 and any finite m below -1e30. */
typedef struct kvli_cu_attend_args {
    const kvli_cu_counts *counts;
    const kvli_cu_span *spans;
    const uint64_t *entries;
    const kvli_cu_item *items;
    const kvli_cu_merge *merges;
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

/* Copies of whole blocks, gathers into and scatters from staging: any list of copies. Addresses and sizes are multiples
   of 16. grid (copies, n): n blocks of threads share each copy. */
typedef struct kvli_cu_copy {
    uint64_t dst, src, bytes;
} kvli_cu_copy;
typedef struct kvli_cu_copy_args {
    const kvli_cu_counts *counts; /* counts->copies, or null: n_copies */
    const kvli_cu_copy *copies;
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
KVLI_CU_FN uint32_t kvli_cu_decode_slot(uint32_t k_format, uint32_t v_format, uint32_t dim) {
    return 32 + KVLI_CU_UNIT * (kvli_cu_row_bytes(k_format, dim) + kvli_cu_row_bytes(v_format, dim)) +
           KVLI_CU_UNIT *
               (kvli_cu_token_scale_bytes(k_format, dim) + kvli_cu_token_scale_bytes(v_format, dim)) +
           kvli_cu_channel_scale_bytes(k_format, dim);
}
KVLI_CU_FN uint32_t kvli_cu_decode_smem(uint32_t k_format, uint32_t v_format, uint32_t dim, uint32_t stages,
                                        uint32_t n) {
    return KVLI_CU_DECODE_WARPS * stages * kvli_cu_decode_slot(k_format, v_format, dim) + n * dim * 4 +
           (k_format == KVLI_CU_NVFP4 ? 2 : 1) * n * (dim + 4) * 2 + (13 * n + 8) * 4;
}

/* The most packed rows of a decode item: the commonest head dims have kernels for 16, too (all would be too much text). */
KVLI_CU_FN uint32_t kvli_cu_decode_rows(uint32_t dim) { return dim == 64 || dim == 128 ? 16 : 8; }

/* Prefill: the most packed rows of an item, the tokens it takes at once, and its shared memory: q, and two buffers of K
   and V, all as 16-bit numbers (of packed blocks' bytes and what they are decoded to, one each). At most 64 KB. */
KVLI_CU_FN uint32_t kvli_cu_prefill_rows(uint32_t dim) { return dim <= 128 ? 128 : 64; }
KVLI_CU_FN uint32_t kvli_cu_prefill_step(uint32_t dim) { return dim <= 128 ? 32 : 16; }
KVLI_CU_FN uint32_t kvli_cu_prefill_smem(uint32_t dim) {
    return (kvli_cu_prefill_rows(dim) + 4 * kvli_cu_prefill_step(dim)) * dim * 2;
}

/* Plain: floats from one row of q or K to the next (4 apart, so that 16 rows stand in different banks), and shared
   memory: q, K of a unit, weights, and three numbers a row. */
KVLI_CU_FN uint32_t kvli_cu_plain_stride(uint32_t dim) { return (dim + 31) / 32 * 32 + 4; }
KVLI_CU_FN uint32_t kvli_cu_plain_smem(uint32_t dim) {
    return 4 * ((KVLI_CU_PLAIN_ROWS + KVLI_CU_UNIT) * kvli_cu_plain_stride(dim) +
                KVLI_CU_PLAIN_ROWS * (KVLI_CU_UNIT + 3));
}

#endif
