/* The presets that decode and prefill kernels are made for, and what their rotation takes. */
#ifndef KVL_PRESETS_CUH
#define KVL_PRESETS_CUH
#include "port.cuh"
#include "abi.h"

/* Formats of the packed and the exact class, and whether packed K and V are rotated. */
template <uint32_t K, uint32_t V, uint32_t EXACT, bool K_ROTATED, bool V_ROTATED> struct kvl_preset {
    static constexpr uint32_t k = K, v = V, exact = EXACT;
    static constexpr bool k_rotated = K_ROTATED, v_rotated = V_ROTATED, one_class = K == EXACT;
    static constexpr bool two_passes =
        V_ROTATED || V == KVLI_GPU_NVFP4; /* sums over packed and exact values differ in kind */
};
typedef kvl_preset<KVLI_GPU_F16, KVLI_GPU_F16, KVLI_GPU_F16, false, false> kvl_preset_f16;
typedef kvl_preset<KVLI_GPU_BF16, KVLI_GPU_BF16, KVLI_GPU_BF16, false, false> kvl_preset_bf16;
typedef kvl_preset<KVLI_GPU_INT8, KVLI_GPU_INT8, KVLI_GPU_F16, false, false> kvl_preset_int8;
typedef kvl_preset<KVLI_GPU_INT8_CHANNEL, KVLI_GPU_INT8, KVLI_GPU_F16, false, false> kvl_preset_int8c;
typedef kvl_preset<KVLI_GPU_FP8_E4M3, KVLI_GPU_FP8_E4M3, KVLI_GPU_F16, false, false> kvl_preset_fp8;
typedef kvl_preset<KVLI_GPU_NVFP4, KVLI_GPU_NVFP4, KVLI_GPU_F16, true, false> kvl_preset_nvfp4;
typedef kvl_preset<KVLI_GPU_INT8, KVLI_GPU_INT4, KVLI_GPU_F16, false, true> kvl_preset_balanced;
typedef kvl_preset<KVLI_GPU_INT4_CHANNEL, KVLI_GPU_INT4, KVLI_GPU_F16, false, true> kvl_preset_int4;

/* The Hadamard matrix is block-diagonal, in blocks of this size. */
KVLI_GPU_FN uint32_t kvl_hadamard_size(uint32_t dim) {
    uint32_t n = 1;
    while (n < 128 && dim % (2 * n) == 0) n *= 2;
    return n;
}
KVLI_GPU_FN float kvl_hadamard_norm(uint32_t n) { /* 1 / sqrt(n), n a power of two up to 128 */
    float r = 1;
    for (; n > 2; n /= 4) r /= 2;
    return n == 2 ? r * 0.70710678118654752f : r;
}

#endif
