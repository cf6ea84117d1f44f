// What kernels are written in: the names of CUDA, and one function for each instruction that CUDA C++ has no name for.
// Compiled by nvcc these are PTX. Compiled as plain C++ they come from tests/cuda_cpu, which runs the kernels on the
// CPU; what stands under an #if here is therefore one instruction each, and kernels choose between architectures with
// `if constexpr (KVL_ARCH >= 900)`.
#ifndef KVL_CUDA_PORT_CUH
#define KVL_CUDA_PORT_CUH
#include <stdint.h>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#include <cuda_bf16.h>

#ifdef __CUDA_ARCH__
#define KVL_ARCH __CUDA_ARCH__
#else
#define KVL_ARCH 750 // nvcc's pass over host code
#endif
#define KVL_D static __device__ __forceinline__
#define KVL_MEMBER __device__ __forceinline__ // KVL_D of functions in a struct
#define KVL_UNROLL _Pragma("unroll")
#define KVL_ROLLED _Pragma("unroll 1")
// A kernel with one struct as its parameter, `a`.
#define KVL_KERNEL(name, threads, min_blocks_per_sm, Args)                   \
    extern "C" __global__ void __launch_bounds__(threads, min_blocks_per_sm) \
        name(const __grid_constant__ Args a)
// T *name: the block's dynamic shared memory, aligned to 128 bytes.
#define KVL_DYN_SMEM(T, name)                                            \
    extern __shared__ __align__(128) unsigned char kvl_dynamic_shared[]; \
    T *name = (T *)kvl_dynamic_shared

// x, of which the compiler knows nothing: what is computed from it stays where it stands, rather than in a register
// throughout a loop.
KVL_D uint32_t kvl_opaque(uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
}

// ---- half and bfloat16; a pair's first element is in the low bits ----

KVL_D uint32_t kvl_hmul2(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
KVL_D uint32_t kvl_hadd2(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("add.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
KVL_D uint32_t kvl_hsub2(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
KVL_D uint32_t kvl_hfma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}
// a & mask | bits, as one instruction even where both are constants
KVL_D uint32_t kvl_and_or(uint32_t a, uint32_t mask, uint32_t bits) {
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(a), "r"(mask), "r"(bits));
    return r;
}
KVL_D float kvl_h2f(uint16_t h) { return __half2float(__ushort_as_half(h)); }
KVL_D uint16_t kvl_f2h(float f) { return __half_as_ushort(__float2half_rn(f)); }
KVL_D uint32_t kvl_f22h2(float low, float high) {
    __half2 h = __floats2half2_rn(low, high);
    return (uint32_t)__half_as_ushort(__low2half(h)) | (uint32_t)__half_as_ushort(__high2half(h)) << 16;
}
KVL_D float kvl_bf2f(uint16_t b) { return __uint_as_float((uint32_t)b << 16); }
KVL_D uint16_t kvl_f2bf(float f) { return __bfloat16_as_ushort(__float2bfloat16_rn(f)); }
KVL_D uint32_t kvl_f22bf2(float low, float high) {
    __nv_bfloat162 h = __floats2bfloat162_rn(low, high);
    return (uint32_t)__bfloat16_as_ushort(h.x) | (uint32_t)__bfloat16_as_ushort(h.y) << 16;
}
KVL_D uint32_t kvl_cvt_e4m3x2(uint32_t lo16) { // sm_89 and later
    uint32_t r = 0;
#if KVL_ARCH >= 890
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.rn.f16x2.e4m3x2 %0, l; }" : "=r"(r) : "r"(lo16));
#endif
    return r;
}
KVL_D float kvl_exp2(float x) { // 2 ulp; 0 below 2^-126
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
KVL_D float kvl_rcp(float x) { // 1 / x, 1 ulp
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
KVL_D float kvl_divide(float x, float y) { return __fdividef(x, y); } // 2 ulp; 0 where y is above 2^126
KVL_D float kvl_tanh(float x) { return tanhf(x); }

// ---- tensor cores. Lane = 4 g + t. ----

// c (16 x 8) += a (16 x 16) · b (16 x 8). a[0]: row g, columns 2t and 2t+1; a[1]: row g+8; a[2], a[3]: columns + 8.
// b[0]: rows 2t and 2t+1 of column g; b[1]: rows + 8. c[0], c[1]: row g, columns 2t and 2t+1; c[2], c[3]: row g+8.
KVL_D void kvl_mma_f16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
#if KVL_ARCH >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2]), "r"(a[3]), "r"(b[1]));
#endif
}
KVL_D void kvl_mma_bf16(float c[4], const uint32_t a[4], const uint32_t b[2]) { // sm_80 and later
#if KVL_ARCH >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
// The transpose of an 8 x 8 matrix of 16 bits, of which a lane has row g, columns 2t and 2t+1.
KVL_D uint32_t kvl_movm(uint32_t v) {
    uint32_t r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}
// Four such matrices from shared memory: row i of matrix m is the 16 bytes at the p of lane 8 m + i. trans: transposed.
KVL_D void kvl_ldmatrix_x4(uint32_t r[4], const void *p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(p))
                 : "memory");
}
KVL_D void kvl_ldmatrix_x4_trans(uint32_t r[4], const void *p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(p))
                 : "memory");
}

// ---- memory; addresses are multiples of the size ----

KVL_D uint4 kvl_ld16(const void *p) { return *(const uint4 *)p; }
KVL_D uint2 kvl_ld8(const void *p) { return *(const uint2 *)p; }
KVL_D uint32_t kvl_ld4(const void *p) { return *(const uint32_t *)p; }
KVL_D uint16_t kvl_ld2(const void *p) { return *(const uint16_t *)p; }
KVL_D void kvl_st16(void *p, uint4 v) { *(uint4 *)p = v; }
KVL_D void kvl_st8(void *p, uint2 v) { *(uint2 *)p = v; }
KVL_D void kvl_st4(void *p, uint32_t v) { *(uint32_t *)p = v; }
KVL_D void kvl_st2(void *p, uint16_t v) { *(uint16_t *)p = v; }
// Global memory that nobody writes during the kernel and that is read once: past the L1.
KVL_D uint4 kvl_ldg16(const void *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(__cvta_generic_to_global(p)));
    return v;
}

// 16 bytes from global to shared memory; zeros if not valid (src is not read then). There after this thread's
// kvl_cp_wait<N> that leaves at most the N youngest committed groups under way; for other threads after a barrier, too.
// Before sm_80: a load and a store.
KVL_D void kvl_cp_async16(void *dst, const void *src, bool valid) {
#if KVL_ARCH >= 800
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(dst)),
        "l"(__cvta_generic_to_global(src)), "r"(valid ? 16 : 0)
        : "memory");
#else
    *(uint4 *)dst = valid ? kvl_ldg16(src) : make_uint4(0, 0, 0, 0);
#endif
}
KVL_D void kvl_cp_commit() {
#if KVL_ARCH >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N> KVL_D void kvl_cp_wait() {
#if KVL_ARCH >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// sm_90 and later: copies of a multiple of 16 bytes, counted by an mbarrier in shared memory. Its phase is over after
// `count` calls of kvl_mbar_expect and the arrival of as many bytes as those announced. Phases have parity 0, 1, 0, …
// After kvl_mbar_init: kvl_mbar_fence by the same thread, then a barrier for the others.
KVL_D void kvl_mbar_init(uint64_t *bar, uint32_t count) {
#if KVL_ARCH >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"((uint32_t)__cvta_generic_to_shared(bar)),
                 "r"(count)
                 : "memory");
#endif
}
KVL_D void kvl_mbar_fence() {
#if KVL_ARCH >= 900
    asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// What this thread wrote to shared memory comes before bulk copies to the same place, started after a barrier.
KVL_D void kvl_bulk_fence() {
#if KVL_ARCH >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
KVL_D void kvl_mbar_expect(uint64_t *bar, uint32_t bytes) {
#if KVL_ARCH >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     (uint32_t)__cvta_generic_to_shared(bar)),
                 "r"(bytes)
                 : "memory");
#endif
}
KVL_D void kvl_bulk_copy(void *dst, const void *src, uint32_t bytes, uint64_t *bar) {
#if KVL_ARCH >= 900
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            (uint32_t)__cvta_generic_to_shared(dst)),
        "l"(__cvta_generic_to_global(src)), "r"(bytes), "r"((uint32_t)__cvta_generic_to_shared(bar))
        : "memory");
#endif
}
KVL_D void kvl_mbar_wait(uint64_t *bar, uint32_t parity) { // until the phase of this parity is over
#if KVL_ARCH >= 900
    asm volatile("{\n\t.reg .pred done;\n"
                 "wait_%=:\n\tmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
                 "@!done bra wait_%=;\n\t}" ::"r"((uint32_t)__cvta_generic_to_shared(bar)),
                 "r"(parity)
                 : "memory");
#endif
}
#else
#include "cuda_cpu_device.h"
#endif

// Two e4m3 codes in the low 16 bits as halves, exact. Before sm_89: the seven low bits moved below the half's
// exponent, times 2^8; the code for NaN, which no encoder here writes, is 480 then.
KVL_D uint32_t kvl_e4m3x2(uint32_t lo16) {
    if constexpr (KVL_ARCH >= 890) return kvl_cvt_e4m3x2(lo16);
    uint32_t x = __byte_perm(lo16, 0, 0x1404);
    return kvl_hmul2((x & 0x80008000u) | (x & 0x7f007f00u) >> 1, 0x5c005c00u);
}

// The e2m1 codes in nibbles I and I + 4 of w as halves times 2^-14, exact. I: 0..3
template <int I> KVL_D uint32_t kvl_e2m1x2(uint32_t w) {
    uint32_t x = w << (12 - 4 * I);
    return (x & 0x80008000u) | (x >> 3 & 0x0e000e00u);
}
#endif
