// Descriptors and push constants of all shaders, and the step's tables as structs.
#ifndef KVL_TABLES_GLSL
#define KVL_TABLES_GLSL
#include "../kernels_cuda/tables.h"
#include "abi.h"

layout(local_size_x_id = KVLI_VK_WORKGROUP) in;
layout(constant_id = KVLI_VK_WORKGROUP) const uint WORKGROUP = 64;
layout(constant_id = KVLI_VK_BANKS) const uint BANKS = 2;
layout(constant_id = KVLI_VK_K_FORMAT) const uint K_FORMAT = KVLI_GPU_F16;
layout(constant_id = KVLI_VK_V_FORMAT) const uint V_FORMAT = KVLI_GPU_F16;
layout(constant_id = KVLI_VK_EXACT_FORMAT) const uint EXACT_FORMAT = KVLI_GPU_F16;
layout(constant_id = KVLI_VK_ROTATED) const uint ROTATED = 0;
layout(constant_id = KVLI_VK_DIM) const uint DIM = 64;
layout(constant_id = KVLI_VK_BLOCK_TOKENS) const uint BLOCK_TOKENS = 32;
layout(constant_id = KVLI_VK_ROWS) const uint ROWS = 4;
layout(constant_id = KVLI_VK_LANES) const uint LANES = 8;
layout(constant_id = KVLI_VK_PARTS) const uint PARTS = 0;

#ifndef KVL_PAGES_ACCESS
#define KVL_PAGES_ACCESS readonly // of store and copy: nothing
#endif
layout(set = 0, binding = KVLI_VK_PAGES, std430) KVL_PAGES_ACCESS buffer kvl_pages { uvec4 d[]; } pages[BANKS];
layout(set = 0, binding = KVLI_VK_TABLES, std430) readonly buffer kvl_tables { uint tables[]; };
layout(set = 0, binding = KVLI_VK_LAYERS, std430) readonly buffer kvl_layers { uint layers[]; };
layout(push_constant) uniform kvl_push { kvli_vk_push push; };

kvli_gpu_store kvl_store_at(uint i) {
    uint w = push.list + i * 8;
    return kvli_gpu_store(uvec2(tables[w], tables[w + 1]), uvec2(tables[w + 2], tables[w + 3]), tables[w + 4], tables[w + 5],
                          tables[w + 6], tables[w + 7]);
}
kvli_gpu_span kvl_span_at(uint i) {
    uint w = push.spans + i * 6;
    return kvli_gpu_span(tables[w], tables[w + 1], tables[w + 2], tables[w + 3], tables[w + 4], tables[w + 5]);
}
kvli_gpu_item kvl_item_at(uint i) {
    uint w = push.list + i * 8;
    return kvli_gpu_item(tables[w], tables[w + 1], tables[w + 2], tables[w + 3], tables[w + 4], tables[w + 5], tables[w + 6],
                         tables[w + 7]);
}
kvli_gpu_merge kvl_merge_at(uint i) {
    uint w = push.list + i * 8;
    return kvli_gpu_merge(tables[w], tables[w + 1], tables[w + 2], tables[w + 3], tables[w + 4], uint[3](0, 0, 0));
}
uvec2 kvl_entry_at(uint i) {
    uint w = push.entries + i * 2;
    return uvec2(tables[w], tables[w + 1]);
}
kvli_vk_layer kvl_layer() {
    uint w = push.layer * 16;
    kvli_vk_layer l;
    for (uint i = 0; i < 2; i++) {
        l.offset[i] = layers[w + i];
        l.head_stride[i] = layers[w + 2 + i];
        l.v_offset[i] = layers[w + 4 + i];
    }
    l.window = layers[w + 6];
    l.sink_tokens = layers[w + 7];
    l.sink_logits = layers[w + 8];
    l.scale = uintBitsToFloat(layers[w + 9]);
    l.softcap = uintBitsToFloat(layers[w + 10]);
    l.k_global = uintBitsToFloat(layers[w + 11]);
    l.v_global = uintBitsToFloat(layers[w + 12]);
    return l;
}

// One KV head's tiles in a block: a bank, and where K and V start in it, in units of 16 bytes.
struct kvl_tiles {
    uint bank, k, v;
};
bool kvl_entry_is_exact(uvec2 entry) { return (entry.x & (KVLI_GPU_EXACT | KVLI_GPU_SCRATCH)) != 0; }
kvl_tiles kvl_tiles_of(kvli_vk_layer l, uvec2 entry, uint head) {
    uint c = kvl_entry_is_exact(entry) ? 1 : 0, at = (entry.x & ~KVLI_GPU_FLAGS) >> 4;
    if ((entry.x & KVLI_GPU_SCRATCH) == 0) at += l.offset[c];
    at += head * l.head_stride[c];
    return kvl_tiles(entry.y, at, at + l.v_offset[c]);
}
#endif
