/* The tables of a step, as the host side in kvlite.h (>>tables) builds them for a GPU and kernels read them: C99, CUDA C++
   and GLSL. The text of this file stands in each generated header of kernels, so that all sides always have the same. */
#ifndef KVLI_TABLES_H
#define KVLI_TABLES_H

/* kvli_gpu_entry: an entry of a block table, the address of a block (a multiple of 128) with flags in its low bits. 0: no block
   (behind a window). A slot of the step's exact scratch holds one layer's tiles alone: no layer offset is added. */
#ifdef VULKAN /* (glslang defines it) */
#define kvli_u32 uint
#define kvli_gpu_entry uvec2 /* low word first */
#define KVLI_GPU_STRUCT(name) struct name
#define KVLI_GPU_END(name)
#define KVLI_GPU_FN
#else
#include <stdint.h>
typedef uint32_t kvli_u32;
typedef uint64_t kvli_gpu_entry;
#define KVLI_GPU_STRUCT(name) typedef struct name
#define KVLI_GPU_END(name) name
#if defined(__CUDACC__) /* functions for both sides; constant expressions where the language has them */
#define KVLI_GPU_FN static __host__ __device__ constexpr
#elif defined(__cplusplus) && __cplusplus >= 201402L
#define KVLI_GPU_FN static constexpr
#else
#define KVLI_GPU_FN static inline
#endif
#endif

#define KVLI_GPU_NONE 0xffffffffu
#define KVLI_GPU_EXACT 1u
#define KVLI_GPU_SCRATCH 2u
#define KVLI_GPU_FLAGS 127u

/* Numbers as in kvl_format and kvl_dtype (kvlite.h checks that they agree). */
#define KVLI_GPU_F32 1u
#define KVLI_GPU_F16 2u
#define KVLI_GPU_BF16 3u
#define KVLI_GPU_INT8 4u
#define KVLI_GPU_INT8_CHANNEL 5u
#define KVLI_GPU_FP8_E4M3 6u
#define KVLI_GPU_NVFP4 7u
#define KVLI_GPU_INT4 8u
#define KVLI_GPU_INT4_CHANNEL 9u
#define KVLI_GPU_DTYPE_F32 0u
#define KVLI_GPU_DTYPE_F16 1u
#define KVLI_GPU_DTYPE_BF16 2u

/* A tile: block_tokens rows of row_bytes, then what scales them: for each token, or for each channel f16 scales, then f16
   zeros; padded to a multiple of 128. */
KVLI_GPU_FN kvli_u32 kvli_gpu_row_bytes(kvli_u32 format, kvli_u32 dim) {
    return format == KVLI_GPU_F32                              ? 4u * dim
           : format == KVLI_GPU_F16 || format == KVLI_GPU_BF16 ? 2u * dim
           : format == KVLI_GPU_INT8 || format == KVLI_GPU_INT8_CHANNEL || format == KVLI_GPU_FP8_E4M3
               ? dim
               : dim / 2u;
}
KVLI_GPU_FN kvli_u32 kvli_gpu_token_scale_bytes(kvli_u32 format, kvli_u32 dim) {
    return format == KVLI_GPU_INT8 || format == KVLI_GPU_FP8_E4M3 ? 2u
           : format == KVLI_GPU_NVFP4                             ? dim / 16u
           : format == KVLI_GPU_INT4                              ? (dim + 63u) / 64u * 4u
                                                                  : 0u;
}
KVLI_GPU_FN kvli_u32 kvli_gpu_channel_scale_bytes(kvli_u32 format, kvli_u32 dim) {
    return format == KVLI_GPU_INT8_CHANNEL || format == KVLI_GPU_INT4_CHANNEL ? 4u * dim : 0u;
}

/* How many of each array's elements this step uses; grids may be larger (they are padded, so that a captured graph can
   be replayed): a block of threads whose item is not there returns at once. */
KVLI_GPU_STRUCT(kvli_gpu_counts) { kvli_u32 stores, copies, decodes, prefills, merges, reserved[3]; }
KVLI_GPU_END(kvli_gpu_counts);

/* One own block of one span: rows of k and v to write into its exact tiles, and whether it is sealed then. */
KVLI_GPU_STRUCT(kvli_gpu_store) {
    kvli_gpu_entry exact;  /* entry of the exact block or scratch slot */
    kvli_gpu_entry sealed; /* entry of the packed block to seal into, 0: it is not complete, or stays exact */
    kvli_u32 span;         /* whose taint is set */
    kvli_u32 row;          /* first row in k and v */
    kvli_u32 n_rows;
    kvli_u32 at; /* first row in the tile; rows before it are there already */
}
KVLI_GPU_END(kvli_gpu_store);

/* Rows first_row.. of the step are positions position.. of a sequence. Entry of table block j: entries[table + j] (in
   32-bit arithmetic: entries of blocks that nobody reads need not be there). Where the exact rows of block first_own + i
   stand: entries[own + i]. */
KVLI_GPU_STRUCT(kvli_gpu_span) {
    kvli_u32 first_row, n_rows, position;
    kvli_u32 table, first_own, own;
}
KVLI_GPU_END(kvli_gpu_span);

/* Attention of some query rows of a span, for each KV head, over a range of blocks. Query rows are packed: row p of a
   span and a KV head is query head p % gqa of that KV head's group at the span's row p / gqa.
     A query at position x in block j = x / block_tokens sees token t of table block b in [begin, end) if b < j, and
   token t of own block b in [own_begin, own_end) if b == j and t <= x; both only if there is no window, or t + window > x,
   or t < sink_tokens. Rows at or past position + n_rows of the last own block were never written and may hold NaN.
     partial: KVLI_GPU_NONE: this is all that the rows see, and `out` is written. Else: partial result p of KV head h and
   packed row r is number partial * n_kv_heads + h * n_rows + (r - row). */
KVLI_GPU_STRUCT(kvli_gpu_item) {
    kvli_u32 span;
    kvli_u32 row, n_rows; /* packed rows */
    kvli_u32 begin, end;  /* blocks of the table */
    kvli_u32 own_begin, own_end;
    kvli_u32 partial;
}
KVLI_GPU_END(kvli_gpu_item);

/* Partial results of n_parts items with the same rows: of item i at partial + i * n_rows. */
KVLI_GPU_STRUCT(kvli_gpu_merge) { kvli_u32 span, row, n_rows, partial, n_parts, reserved[3]; }
KVLI_GPU_END(kvli_gpu_merge);

/* Copies of whole blocks, gathers into and scatters from staging: any list of copies. Addresses (entries without flags)
   and sizes are multiples of 16. */
KVLI_GPU_STRUCT(kvli_gpu_copy) { kvli_gpu_entry dst, src, bytes; }
KVLI_GPU_END(kvli_gpu_copy);

#endif
