/* weights.h - weight matrices repacked for SIMD, and their product with a batch of activation rows.
 *
 *     y[row][out] = sum over k of W[out][k] * x[row][k]
 *
 * A matrix is repacked once, 16 output rows side by side ("panel"), so that one instruction works on 16 rows.
 * Quantised weights keep their bits: 4-bit weights stay 4-bit in memory and become bytes in registers.
 *
 * Two ways to compute, chosen when the matrices are packed:
 *   WEIGHTS_INT8  Activations become int8 with one scale per 32 (absmax / 127, round to nearest even).
 *                 Products of 32 are summed as integers without error, and block sums are added in f32 in the
 *                 order of k. F32 and F16 weights become 8-bit with an f16 scale per 32 (as Q8_0), whose
 *                 error is of the size of the activations'. All paths give the same bits.
 *   WEIGHTS_F32   Float activations times the exact weights; slower, for quality work. Paths agree to
 *                 rounding.
 *
 * The value of an output depends on its own activation row alone: not on the batch the row ran in, nor on the
 * number of threads, bit for bit.
 *
 * Threads: a packed matrix is immutable. An `acts` has one user at a time, except acts_store (see there).
 * Source of the block layouts: ggml-common.h in the ggml project.
 */
#ifndef LLM_WEIGHTS_H
#define LLM_WEIGHTS_H

#include "gguf.h"
#include "pool.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define WEIGHTS_PANEL 16 /* output rows side by side */
#define WEIGHTS_BLOCK 32 /* weights that share a scale; row lengths are multiples of it */
#define ACTS_TILE 8      /* activation rows that a kernel works on at once */

typedef enum weights_mode { WEIGHTS_INT8 = 0, WEIGHTS_F32 = 1 } weights_mode;

typedef enum weights_path {
    WEIGHTS_AUTO = 0, /* the best that the processor has */
    WEIGHTS_SCALAR = 1,
    WEIGHTS_AVX2 = 2,  /* AVX2, FMA, F16C */
    WEIGHTS_AVX512 = 3 /* AVX-512 F, BW, VL and VNNI */
} weights_path;

bool weights_path_available(weights_path path);
weights_path weights_path_resolve(weights_path path); /* AUTO becomes one of the others */
const char *weights_path_name(weights_path path);

/* How a panel is stored. Nibbles and bytes lie so that each dword holds consecutive k of one output row. */
typedef enum matrix_kind {
    MATRIX_Q4_0, /* per block of 32 k: 4 x 64 bytes of nibbles, 16 f16 scales; w = (q - 8) d */
    MATRIX_Q4_1, /* the same, and 16 f16 minima; w = q d + m */
    MATRIX_Q8,   /* per block: 8 x 64 bytes holding q + 128, 16 f16 scales; w = q d */
    MATRIX_F16,  /* per k: 16 f16 */
    MATRIX_F32   /* per k: 16 f32 */
} matrix_kind;

typedef struct matrix {
    matrix_kind kind;
    uint32_t n_rows; /* outputs */
    uint32_t n_cols; /* k */
    size_t panel_bytes;
    uint8_t *data; /* ceil(n_rows / 16) panels; rows past n_rows are zero */
} matrix;

/* Packs n_rows x n_cols weights of a GGUF type (rows contiguous) on the pool's threads. false, with a line
 * in err, where the type is not one of F32 F16 Q4_0 Q4_1 Q8_0, n_cols is no multiple of 32, a size is zero
 * or overflows, or memory is short. */
bool matrix_pack(pool *p, matrix *w, uint32_t gguf_type, const void *data, uint64_t n_rows, uint64_t n_cols,
                 weights_mode mode, char *err, size_t err_len);
void matrix_free(matrix *w);
size_t matrix_bytes(const matrix *w);

/* Decodes n values (a multiple of 32) of a row of a GGUF type that matrix_pack takes. */
void weights_decode_row(uint32_t gguf_type, const void *row, uint32_t n, float *out);

/* 32 int8 activations of one row and what the kernels need of them. */
typedef struct act_block {
    int8_t q[WEIGHTS_BLOCK];
    float d;        /* x = q d */
    float d_sum;    /* d * sum of q: times a Q4_1 minimum */
    int32_t neg8;   /* -8 * sum of q: where a Q4_0 accumulator starts */
    int32_t neg128; /* -128 * sum of q: where a Q8 accumulator starts */
} act_block;

/* A batch of activation rows, cut into tiles of 8 rows (the last may have fewer). Inside a tile of t rows
 * the t blocks, or in f32 mode the t values, of one k lie together. */
typedef struct acts {
    weights_mode mode;
    weights_path path;
    uint32_t max_rows, max_cols;
    uint32_t n_rows, n_cols;
    void *data;
} acts;

bool acts_create(acts *a, weights_mode mode, weights_path path, uint32_t max_rows, uint32_t max_cols);
void acts_free(acts *a);

/* Sets the shape: n_rows <= max_rows, n_cols <= max_cols and a multiple of 32. Then every row must be
 * stored; rows may be stored by several threads at a time. */
void acts_begin(acts *a, uint32_t n_rows, uint32_t n_cols);
void acts_store(acts *a, uint32_t row, const float *x);

/* One product of the batch. y is [acts rows][stride] floats, stride >= w->n_rows. With `add` the
 * product is added to what y holds. */
typedef struct matmul_job {
    const matrix *w;
    float *y;
    size_t stride;
    bool add;
} matmul_job;

#define MATMUL_MAX_JOBS 4

/* Runs up to MATMUL_MAX_JOBS products of the same activations in one parallel loop. Each w has n_cols
 * columns and was packed for the mode of `a`. */
void matmul(pool *p, const acts *a, const matmul_job *jobs, uint32_t n_jobs);

#endif /* LLM_WEIGHTS_H */
