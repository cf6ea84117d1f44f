// What a query sees, and the rows of q and out. BLOCK_TOKENS is a power of two.
#ifndef KVL_PAGES_GLSL
#define KVL_PAGES_GLSL
#include "tables.glsl"
#include "floats.glsl"
#if KVL_STORAGE16
#extension GL_EXT_shader_16bit_storage : require
#endif

// ---- sight ----
// What limits sight in a layer.
struct kvl_sight {
    uint window, sink_tokens;
};

uint kvl_block_start(uint token) { return token & ~(BLOCK_TOKENS - 1); }

// Whether a query at position x sees a token of an own block, or else of a block of the table (kvli_gpu_item's rule).
bool kvl_sees(kvl_sight s, bool own, uint x, uint token) {
    uint own_start = kvl_block_start(x);
    if (own ? token < own_start || token > x : token >= own_start) return false;
    return s.window == 0 || x - token < s.window || token < s.sink_tokens;
}

// The same for all queries at positions x_first..x_last and tokens first..last of one block: does any see any?
bool kvl_any_sees(kvl_sight s, bool own, uint x_first, uint x_last, uint first, uint last) {
    uint start = kvl_block_start(first), next = start + BLOCK_TOKENS;
    uint from = own ? first : next, to = own && x_last >= next ? next - 1 : x_last;
    uint x = max(x_first, from); // the first query that may
    if (x > to) return false;
    return s.window == 0 || x - min(last, x) < s.window || first < s.sink_tokens;
}

// Does every one see all?
bool kvl_all_see(kvl_sight s, bool own, uint x_first, uint x_last, uint first, uint last) {
    uint own_start = kvl_block_start(x_first);
    if (own ? first < own_start || last > x_first || x_last - own_start >= BLOCK_TOKENS : last >= own_start) return false;
    return s.window == 0 || x_last - first < s.window || last < s.sink_tokens;
}

// ---- query and output rows ----
// Packed row p of a span and a KV head: row p / gqa of the span, query head p % gqa of that KV head.
struct kvl_row {
    uint tensor_row, head, position;
};
kvl_row kvl_row_of(kvli_gpu_span span, uint kv_head, uint p) {
    uint r = p / push.gqa;
    return kvl_row(span.first_row + r, kv_head * push.gqa + (p - r * push.gqa), span.position + r);
}

// Where dim 0 of a row stands in a tensor, in elements.
uint kvl_element(kvli_vk_tensor t, kvl_row row) {
    return t.offset + row.tensor_row * t.row_stride + row.head * t.head_stride;
}

layout(set = 1, binding = KVLI_VK_TENSOR_A, std430) readonly buffer kvl_tensor_a { uint d[]; } tensor_a;
layout(set = 1, binding = KVLI_VK_TENSOR_B, std430) writeonly buffer kvl_tensor_b { uint d[]; } tensor_b;
#if KVL_STORAGE16
layout(set = 1, binding = KVLI_VK_TENSOR_A, std430) readonly buffer kvl_tensor_a16 { uint16_t d[]; } tensor_a16;
layout(set = 1, binding = KVLI_VK_TENSOR_B, std430) writeonly buffer kvl_tensor_b16 { uint16_t d[]; } tensor_b16;
#endif

// Element i of q.
float kvl_q_get(uint i) {
    if (push.a.dtype == KVLI_GPU_DTYPE_F32) return uintBitsToFloat(tensor_a.d[i]);
#if KVL_STORAGE16
    uint h = uint(tensor_a16.d[i]);
#else
    uint h = tensor_a.d[i / 2] >> 16 * (i & 1) & 0xffff;
#endif
    return push.a.dtype == KVLI_GPU_DTYPE_F16 ? kvl_f16_to_f32(h) : uintBitsToFloat(h << 16);
}

// Elements i and i + 1 of out. Without KVL_STORAGE16, i is even where they have 16 bits.
void kvl_out_set(uint i, vec2 x) {
    if (push.b.dtype == KVLI_GPU_DTYPE_F32) {
        tensor_b.d[i] = floatBitsToUint(x.x);
        tensor_b.d[i + 1] = floatBitsToUint(x.y);
        return;
    }
    uvec2 bits = floatBitsToUint(x);
    if (push.b.dtype == KVLI_GPU_DTYPE_F16)
        bits = uvec2(kvl_f32_to_f16(bits.x), kvl_f32_to_f16(bits.y));
    else
        bits = uvec2(kvl_f32_to_bf16(bits.x), kvl_f32_to_bf16(bits.y));
#if KVL_STORAGE16
    tensor_b16.d[i] = uint16_t(bits.x);
    tensor_b16.d[i + 1] = uint16_t(bits.y);
#else
    tensor_b.d[i / 2] = bits.x | bits.y << 16;
#endif
}
#endif
