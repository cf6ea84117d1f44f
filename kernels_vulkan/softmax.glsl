// The online softmax, in base 2, and what becomes of a row's sums.
#ifndef KVL_SOFTMAX_GLSL
#define KVL_SOFTMAX_GLSL
#include "pages.glsl"

const float KVL_LOG2E = 1.4426950408889634;
const float KVL_NOTHING = -1e38; // m of a row that has seen nothing

// What q·k is multiplied with: to be a score in base 2, or with a softcap what kvl_capped takes.
float kvl_score_factor(kvli_vk_layer layer) {
    return layer.softcap != 0 ? 2 * KVL_LOG2E * layer.scale / layer.softcap : layer.scale * KVL_LOG2E;
}
// cap · tanh(score / cap) in base 2, from 2 log2(e) · score / cap: as exact as cap · 2^-22.
float kvl_capped(float x, float cap) { return cap * KVL_LOG2E * (1 - 2 / (1 + exp2(min(x, 126.0)))); }

// What a row's sums are multiplied with to be its output, given its largest score and its sum of weights; sink logits have their
// share of the sum.
float kvl_output_factor(kvli_vk_layer layer, uint head, float m, float l) {
    if (layer.sink_logits == KVLI_GPU_NONE) return l > 0 ? 1 / l : 0;
    float sink = uintBitsToFloat(layers[layer.sink_logits + head]) * KVL_LOG2E, top = max(m, sink);
    float rescale = exp2(m - top);
    return rescale / (l * rescale + exp2(sink - top));
}

// ---- partial results ----
#ifndef KVL_PARTIAL_ACCESS
#define KVL_PARTIAL_ACCESS writeonly // of merge: readonly. Validation layers, and so apps, see which dispatches need a barrier
#endif
layout(set = 0, binding = KVLI_VK_PARTIAL_O, std430) KVL_PARTIAL_ACCESS buffer kvl_partial_o { float partial_o[]; };
layout(set = 0, binding = KVLI_VK_PARTIAL_ML, std430) KVL_PARTIAL_ACCESS buffer kvl_partial_ml { vec2 partial_ml[]; };

// Which partial result is row i of an item.
uint kvl_partial_number(kvli_gpu_item item, uint kv_head, uint i) {
    return item.partial * push.n_kv_heads + kv_head * item.n_rows + i;
}
#endif
