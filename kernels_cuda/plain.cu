/* kvl_plain: attention by the book, on CUDA cores in single precision, for what tensor cores cannot do: exact tiles
   of F32 (whose 24 bits no MMA keeps), and of BF16 on cards older than sm_80. Any dim that is a multiple of 16, up to
   256. One block of threads takes up to 8 packed query rows of one KV head over the blocks of its item, 16 tokens
   (a unit) at a time:

     1. the unit's K goes to shared memory; thread (r, t) computes the score of row r and token t
     2. the 16 threads of a row agree on a maximum and turn scores into weights (the online softmax)
     3. thread e adds weight * V to dims e and e + 128 of the 8 rows, V straight from global memory

   Roofline: 4 * 8 * D FLOP for the 8 * D bytes of a token's F32 K and V, 4 FLOP a byte: bound by memory on every card
   (a 4090 does 82 FLOP a byte). It stages nothing ahead, and so reaches only a part of that bound. */
#include "steps.cuh"

enum {
    KVL_PLAIN_THREADS = KVLI_CU_PLAIN_THREADS,
    KVL_PLAIN_ROWS = KVLI_CU_PLAIN_ROWS,
    KVL_PLAIN_DIMS = 256 / KVLI_CU_PLAIN_THREADS /* of a thread */
};

/* What the threads share. */
struct kvl_plain_smem {
    float *q, *k;               /* [8][stride], [16][stride] */
    float *weights;             /* [8][16] */
    float *rescale, *max, *sum; /* [8]; rescale: what a row's accumulators must be multiplied with */
    uint32_t stride;
};

KVL_D kvl_plain_smem kvl_plain_layout(float *base, uint32_t dim) {
    kvl_plain_smem s;
    s.stride = kvli_cu_plain_stride(dim);
    s.q = base;
    s.k = s.q + KVL_PLAIN_ROWS * s.stride;
    s.weights = s.k + KVLI_CU_UNIT * s.stride;
    s.rescale = s.weights + KVL_PLAIN_ROWS * KVLI_CU_UNIT;
    s.max = s.rescale + KVL_PLAIN_ROWS;
    s.sum = s.max + KVL_PLAIN_ROWS;
    return s;
}

KVL_D void kvl_plain_load_q(const kvl_plain_smem &s, const kvli_cu_attend_args &a, const kvl_rows &rows) {
    for (uint32_t i = threadIdx.x; i < KVL_PLAIN_ROWS * a.dim; i += KVL_PLAIN_THREADS) {
        uint32_t r = i / a.dim, e = i % a.dim;
        kvl_row row = kvl_row_of(a, kvl_span_of(a, rows), blockIdx.y, rows.item->row + r);
        s.q[r * s.stride + e] = r < rows.item->n_rows ? kvl_tensor_get(a.q, row.tensor_row, row.head, e) : 0;
    }
}

/* Number i of an exact tile. */
KVL_D float kvl_plain_get(const uint8_t *tile, uint32_t format, uint32_t i) {
    return format == KVLI_GPU_F32 ? ((const float *)tile)[i] : kvl_bf2f(((const uint16_t *)tile)[i]);
}

KVL_D void kvl_plain_load_k(const kvl_plain_smem &s, const kvli_cu_attend_args &a, const uint8_t *tile,
                            uint32_t row) {
    for (uint32_t i = threadIdx.x; i < KVLI_CU_UNIT * a.dim; i += KVL_PLAIN_THREADS) {
        s.k[i / a.dim * s.stride + i % a.dim] = kvl_plain_get(tile, a.exact, row * a.dim + i);
    }
}

/* Four sums in turn: fewer roundings on top of one another. */
KVL_D float kvl_plain_dot(const float *q, const float *k, uint32_t dim) {
    float x = 0, y = 0, z = 0, w = 0;
    for (uint32_t e = 0; e < dim; e += 4) {
        float4 a = *(const float4 *)(q + e), b = *(const float4 *)(k + e);
        x = __fmaf_rn(a.x, b.x, x);
        y = __fmaf_rn(a.y, b.y, y);
        z = __fmaf_rn(a.z, b.z, z);
        w = __fmaf_rn(a.w, b.w, w);
    }
    return (x + y) + (z + w);
}

/* Over the 16 threads of a row. */
KVL_D float kvl_plain_row_max(float x) {
    KVL_UNROLL
    for (int lane = 1; lane < KVLI_CU_UNIT; lane *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
    return x;
}
KVL_D float kvl_plain_row_sum(float x) {
    KVL_UNROLL
    for (int lane = 1; lane < KVLI_CU_UNIT; lane *= 2)
        x = __fadd_rn(x, __shfl_xor_sync(0xffffffffu, x, lane));
    return x;
}

/* Steps 1 and 2, for this thread's row and token; max and sum are the row's so far. */
KVL_D void kvl_plain_scores(const kvl_plain_smem &s, const kvli_cu_attend_args &a, bool sees, float &max,
                            float &sum) {
    uint32_t r = threadIdx.x / KVLI_CU_UNIT, t = threadIdx.x % KVLI_CU_UNIT;
    float score = __fmul_rn(kvl_plain_dot(s.q + r * s.stride, s.k + t * s.stride, a.dim), a.scale);
    if (a.softcap != 0) score = __fmul_rn(a.softcap, kvl_tanh(__fdiv_rn(score, a.softcap)));
    score = sees ? __fmul_rn(score, KVL_LOG2E) : KVL_NO_SCORE;
    float above = fmaxf(max, kvl_plain_row_max(score)), rescale = kvl_exp2(__fsub_rn(max, above));
    float weight = sees ? kvl_exp2(__fsub_rn(score, above)) : 0;
    max = above;
    sum = __fmaf_rn(sum, rescale, kvl_plain_row_sum(weight));
    s.weights[threadIdx.x] = weight;
    if (t == 0) s.rescale[r] = rescale;
}

/* Step 3, for this thread's dims; v: the tile's first row of n. */
KVL_D void kvl_plain_values(const kvl_plain_smem &s, const kvli_cu_attend_args &a, const uint8_t *tile,
                            uint32_t row, uint32_t n, float out[KVL_PLAIN_ROWS][KVL_PLAIN_DIMS]) {
    KVL_UNROLL
    for (int d = 0; d < KVL_PLAIN_DIMS; d++) {
        uint32_t e = threadIdx.x + d * KVL_PLAIN_THREADS;
        if (e >= a.dim) break;
        KVL_UNROLL
        for (int r = 0; r < KVL_PLAIN_ROWS; r++) out[r][d] = __fmul_rn(out[r][d], s.rescale[r]);
        for (uint32_t t = 0; t < n; t++) {
            float v = kvl_plain_get(tile, a.exact, (row + t) * a.dim + e);
            KVL_UNROLL
            for (int r = 0; r < KVL_PLAIN_ROWS; r++) {
                out[r][d] = __fmaf_rn(s.weights[r * KVLI_CU_UNIT + t], v, out[r][d]);
            }
        }
    }
}

KVL_D void kvl_plain_finish(const kvl_plain_smem &s, const kvli_cu_attend_args &a, const kvl_rows &rows,
                            const float out[KVL_PLAIN_ROWS][KVL_PLAIN_DIMS]) {
    KVL_UNROLL
    for (int r = 0; r < KVL_PLAIN_ROWS; r++) {
        if (r >= (int)rows.item->n_rows) break;
        kvl_row row = kvl_row_of(a, kvl_span_of(a, rows), blockIdx.y, rows.item->row + r);
        float factor = kvl_output_factor(a, row.head, s.max[r], s.sum[r]);
        uint64_t partial = kvl_partial_number(a, *rows.item, r);
        KVL_UNROLL
        for (int d = 0; d < KVL_PLAIN_DIMS; d++) {
            uint32_t e = threadIdx.x + d * KVL_PLAIN_THREADS;
            if (e >= a.dim) break;
            if (rows.item->partial == KVLI_GPU_NONE) {
                kvl_tensor_set(a.out, row.tensor_row, row.head, e, __fmul_rn(out[r][d], factor));
            } else
                a.partial_o[partial * a.dim + e] = out[r][d];
        }
        if (rows.item->partial != KVLI_GPU_NONE && threadIdx.x == 0) {
            a.partial_ml[2 * partial] = s.max[r];
            a.partial_ml[2 * partial + 1] = s.sum[r];
        }
    }
}

KVL_KERNEL(kvl_plain, KVLI_CU_PLAIN_THREADS, 4, kvli_cu_attend_args) {
    KVL_DYN_SMEM(float, base);
    kvl_rows rows;
    if (!kvl_rows_of_block(a, a.counts->decodes, rows)) return;
    kvl_plain_smem s = kvl_plain_layout(base, a.dim);
    kvl_plain_load_q(s, a, rows);
    uint32_t r = threadIdx.x / KVLI_CU_UNIT, written = kvl_written(a, rows);
    uint32_t x = kvl_position(a, rows, r);
    float out[KVL_PLAIN_ROWS][KVL_PLAIN_DIMS] = {}, max = KVL_NO_SCORE, sum = 0;
    kvl_walk walk = kvl_walk_start(rows);
    for (;;) {
        kvl_step<1> step;
        kvl_walk_step(walk, a, rows, KVL_WALK_ALL, step);
        if (step.flags == 0) break;
        uint32_t token = step.token, row = token % a.block_tokens, mine = threadIdx.x % KVLI_CU_UNIT;
        uint32_t n = min(written - token, (uint32_t)KVLI_CU_UNIT);
        kvl_plain_load_k(s, a, step.tiles[0].k, row);
        __syncthreads();
        kvl_plain_scores(s, a, kvl_sees(rows.sight, step.own(), x, token + mine), max, sum);
        __syncthreads();
        kvl_plain_values(s, a, step.tiles[0].v, row, n, out);
    }
    if (threadIdx.x % KVLI_CU_UNIT == 0) {
        s.max[r] = max;
        s.sum[r] = sum;
    }
    __syncthreads();
    kvl_plain_finish(s, a, rows, out);
}
