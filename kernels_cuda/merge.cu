/* Partial results of the same query rows, each over another range of tokens, to the output: with M the largest m,
       out = sum of o 2^(m - M) / (sum of l 2^(m - M) + 2^(sink logit - M))
   One warp for each row of a KV head; parts are added in their order, so that equal input gives equal bits.

   Roofline: bytes, 4 (dim + 2) for each part and row, read once; four parts' loads are under way at a time. Far less than the
   attention that made them: a part stands for some hundred tokens of 2 dim numbers. */
#include "steps.cuh"

/* m and l of part i of a row. */
KVL_D float2 kvl_part_ml(const kvli_cu_attend_args &a, uint64_t first, uint32_t step, uint32_t i) {
    const float *ml = a.partial_ml + 2 * (first + (uint64_t)i * step);
    return make_float2(ml[0], ml[1]);
}

KVL_D void kvl_merge_row(const kvli_cu_attend_args &a, const kvli_gpu_merge &merge, uint32_t r) {
    constexpr uint32_t most = 256 / 32; /* dims of a lane: lane, lane + 32, … */
    uint32_t lane = threadIdx.x % 32, part_rows = merge.n_rows * a.n_kv_heads;
    uint64_t first = (uint64_t)merge.partial * a.n_kv_heads + (uint64_t)blockIdx.y * merge.n_rows + r;
    kvl_row row = kvl_row_of(a, a.spans[merge.span], blockIdx.y, merge.row + r);
    float sum[most] = {0, 0, 0, 0, 0, 0, 0, 0}, m = -INFINITY, l = 0;
    for (uint32_t i = lane; i < merge.n_parts; i += 32) m = fmaxf(m, kvl_part_ml(a, first, part_rows, i).x);
    KVL_UNROLL for (uint32_t x = 16; x; x /= 2) m = fmaxf(m, __shfl_xor_sync(KVL_ALL_LANES, m, x));
    for (uint32_t i = 0; i < merge.n_parts; i++) {
        float2 ml = kvl_part_ml(a, first, part_rows, i);
        float weight = kvl_exp2(ml.x - m);
        const float *o = a.partial_o + (first + (uint64_t)i * part_rows) * a.dim;
        l += ml.y * weight;
        KVL_UNROLL for (uint32_t j = 0; j < most; j++) {
            if (lane + 32 * j < a.dim) sum[j] += o[lane + 32 * j] * weight;
        }
    }
    float factor = kvl_output_factor(a, row.head, m, l);
    KVL_UNROLL for (uint32_t j = 0; j < most; j++) {
        uint32_t e = lane + 32 * j;
        if (e < a.dim) kvl_tensor_set(a.out, row.tensor_row, row.head, e, sum[j] * factor);
    }
}

KVL_KERNEL(kvl_merge, KVLI_CU_MERGE_THREADS, 1, kvli_cu_attend_args) {
    uint32_t index = a.first_item + blockIdx.x;
    if (index >= a.end_item || index >= a.counts->merges) return;
    const kvli_gpu_merge merge = a.merges[index];
    for (uint32_t r = threadIdx.x / 32; r < merge.n_rows; r += KVLI_CU_MERGE_THREADS / 32)
        kvl_merge_row(a, merge, r);
}
