#version 450
// Partial results of the same query rows, each over another range of tokens, to the output: with M the largest m,
//     out = sum of o 2^(m - M) / (sum of l 2^(m - M) + 2^(sink logit - M))
// Two dims of a row an invocation; parts are added in their order, so that equal input gives equal bits.
//
// Roofline: bytes, 4 (DIM + 2) for each part and row, read once. Far less than the attention that made them: a part stands for
// some hundred tokens of 2 DIM numbers.
#extension GL_GOOGLE_include_directive : require
#define KVL_PARTIAL_ACCESS readonly
#include "softmax.glsl"

void kvl_merge_pair(kvli_vk_layer layer, kvli_gpu_merge merge, uint r, uint e) {
    uint first = merge.partial * push.n_kv_heads + gl_WorkGroupID.y * merge.n_rows + r;
    uint step = merge.n_rows * push.n_kv_heads;
    float m = KVL_NOTHING, l = 0;
    vec2 sum = vec2(0);
    for (uint i = 0; i < merge.n_parts; i++) m = max(m, partial_ml[first + i * step].x);
    for (uint i = 0; i < merge.n_parts; i++) {
        uint part = first + i * step, at = part * DIM + e;
        float weight = exp2(partial_ml[part].x - m);
        l = fma(partial_ml[part].y, weight, l);
        sum = fma(vec2(partial_o[at], partial_o[at + 1]), vec2(weight), sum);
    }
    kvl_row row = kvl_row_of(kvl_span_at(merge.span), gl_WorkGroupID.y, merge.row + r);
    kvl_out_set(kvl_element(push.b, row) + e, sum * kvl_output_factor(layer, row.head, m, l));
}

void main() {
    uint index = push.first + gl_WorkGroupID.x;
    if (index >= push.n) return;
    kvli_gpu_merge merge = kvl_merge_at(index);
    kvli_vk_layer layer = kvl_layer();
    for (uint i = gl_LocalInvocationID.x; i < merge.n_rows * (DIM / 2); i += WORKGROUP)
        kvl_merge_pair(layer, merge, i / (DIM / 2), i % (DIM / 2) * 2);
}
