#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_control_flow_attributes : require
#if KVL_STORAGE16
#extension GL_EXT_shader_16bit_storage : require
#endif
// Writes a step's rows of K and V into exact tiles and seals those that are complete: the bytes that the CPU writes.
#define KVL_PAGES_ACCESS coherent // rows that an invocation wrote are sealed by others
#include "encode.glsl"

layout(set = 0, binding = KVLI_VK_TAINT, std430) buffer kvl_taint { uint taint[]; };
layout(set = 1, binding = KVLI_VK_TENSOR_A, std430) readonly buffer kvl_units_a { uvec4 k_units[]; };
layout(set = 1, binding = KVLI_VK_TENSOR_B, std430) readonly buffer kvl_units_b { uvec4 v_units[]; };
layout(set = 1, binding = KVLI_VK_TENSOR_A, std430) readonly buffer kvl_words_a { uint k_words[]; };
layout(set = 1, binding = KVLI_VK_TENSOR_B, std430) readonly buffer kvl_words_b { uint v_words[]; };
#if KVL_STORAGE16
layout(set = 1, binding = KVLI_VK_TENSOR_A, std430) readonly buffer kvl_halves_a { uint16_t k_halves[]; };
layout(set = 1, binding = KVLI_VK_TENSOR_B, std430) readonly buffer kvl_halves_b { uint16_t v_halves[]; };
#endif

uvec4 kvl_input_unit(bool v, uint i) {
    if (v) return v_units[i];
    return k_units[i];
}
uint kvl_input_word(bool v, uint i) {
    if (v) return v_words[i];
    return k_words[i];
}
// Element i of 16 bits. (Without KVL_STORAGE16 its word is read, of which the other half may be past the tensor's end.)
uint kvl_input_half(bool v, uint i) {
#if KVL_STORAGE16
    if (v) return uint(v_halves[i]);
    return uint(k_halves[i]);
#else
    return kvl_input_word(v, i / 2) >> 16 * (i % 2);
#endif
}

// Elements i..i+7, as the bits of f32.
void kvl_input8(bool v, uint dtype, uint i, out uint x[8]) {
    uint format = dtype + KVLI_GPU_F32; // the two enums run alike
    bool wide = dtype == KVLI_GPU_DTYPE_F32;
    if (i % 8 == 0) {
        uvec4 a = kvl_input_unit(v, wide ? i / 4 : i / 8), b = a;
        if (wide) b = kvl_input_unit(v, i / 4 + 1);
        [[unroll]] for (uint j = 0; j < 4; j++) {
            x[j] = wide ? a[j] : kvl_widened(format, a[j / 2] >> 16 * (j % 2));
            x[4 + j] = wide ? b[j] : kvl_widened(format, a[2 + j / 2] >> 16 * (j % 2));
        }
    } else {
        [[unroll]] for (uint j = 0; j < 8; j++)
            x[j] = wide ? kvl_input_word(v, i + j) : kvl_widened(format, kvl_input_half(v, i + j));
    }
}

// Rows of a head to the exact tile, 8 numbers an invocation; false if a number that this one wrote is not finite.
bool kvl_store_rows(bool v, kvli_gpu_store s, uint head, kvl_place tile) {
    kvli_vk_tensor t = push.a;
    if (v) t = push.b;
    bool finite = true;
    for (uint i = kvl_local() * 8; i < s.n_rows * DIM; i += WORKGROUP * 8) {
        uint x[8];
        kvl_input8(v, t.dtype, t.offset + (s.row + i / DIM) * t.row_stride + head * t.head_stride + i % DIM, x);
        finite = kvl_store8(EXACT_FORMAT, tile, s.at * DIM + i, x) && finite;
    }
    return finite;
}

// workgroups (stores, n_kv_heads, 2: K and V)
void main() {
    uint number = push.first + gl_WorkGroupID.x, head = gl_WorkGroupID.y;
    if (number >= push.n) return;
    kvli_gpu_store s = kvl_store_at(number);
    kvli_vk_layer layer = kvl_layer();
    bool v = gl_WorkGroupID.z != 0;
    kvl_tiles to = kvl_tiles_of(layer, s.exact, head);
    kvl_place exact = kvl_place(to.bank, v ? to.v : to.k);
    if (PARTS != KVLI_VK_SEALS) {
        if (!kvl_store_rows(v, s, head, exact)) atomicOr(taint[s.span], 1u);
    }
    if (PARTS == KVLI_VK_WRITES || s.sealed == uvec2(0)) return;
    if (PARTS != KVLI_VK_SEALS) {
        memoryBarrierBuffer(); // the tile is read by other invocations than those that wrote it
        barrier();
    }
    to = kvl_tiles_of(layer, s.sealed, head);
    kvl_side side = kvl_side(v ? V_FORMAT : K_FORMAT, (ROTATED & (v ? 2 : 1)) != 0, v ? layer.v_global : layer.k_global);
    kvl_seal_tile(side, exact, kvl_place(to.bank, v ? to.v : to.k));
}
