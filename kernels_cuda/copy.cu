/* Copies of blocks and of rows, and the reading that benchmarks take as the ceiling. All in 16-byte words, several loads
   in flight a thread. */
#include "port.cuh"
#include "abi.h"

enum { KVL_COPY_WORDS = 4, KVL_READ_WORDS = 8 };

/* Words first, first + threads, ... of n, where `threads` is a whole number of warps. */
KVL_D void kvl_copy_words(uint4 *dst, const uint4 *src, uint64_t n, uint64_t first, uint64_t threads) {
    uint64_t i = first;
    for (; i + (KVL_COPY_WORDS - 1) * threads < n; i += KVL_COPY_WORDS * threads) {
        uint4 v[KVL_COPY_WORDS];
        KVL_UNROLL
        for (int j = 0; j < KVL_COPY_WORDS; j++) v[j] = kvl_ldg16(src + i + j * threads);
        KVL_UNROLL
        for (int j = 0; j < KVL_COPY_WORDS; j++) kvl_st16(dst + i + j * threads, v[j]);
    }
    for (; i < n; i += threads) kvl_st16(dst + i, kvl_ldg16(src + i));
}

/* grid (copies, n): n blocks of threads share each copy */
KVL_KERNEL(kvl_copy, KVLI_CU_COPY_THREADS, 4, kvli_cu_copy_args) {
    if (blockIdx.x >= (a.counts ? a.counts->copies : a.n_copies)) return;
    kvli_gpu_copy c = a.copies[blockIdx.x];
    kvl_copy_words((uint4 *)c.dst, (const uint4 *)c.src, c.bytes / 16,
                   blockIdx.y * KVLI_CU_COPY_THREADS + threadIdx.x,
                   (uint64_t)gridDim.y * KVLI_CU_COPY_THREADS);
}

/* grid (copies, tiles) */
KVL_KERNEL(kvl_copy_rows, KVLI_CU_COPY_THREADS, 4, kvli_cu_row_copy_args) {
    if (blockIdx.x >= a.n_copies || blockIdx.y >= a.n_tiles) return;
    kvli_cu_row_copy c = a.copies[blockIdx.x];
    uint32_t side = blockIdx.y % 2;
    uint64_t offset = blockIdx.y / 2 * (a.tile_bytes[0] + a.tile_bytes[1]) + (side ? a.tile_bytes[0] : 0);
    kvl_copy_words((uint4 *)(c.dst + offset), (const uint4 *)(c.src + offset),
                   (uint64_t)c.n_rows * a.row_bytes[side] / 16, threadIdx.x, KVLI_CU_COPY_THREADS);
}

/* grid (n): the 32-bit words of a range, added */
KVL_KERNEL(kvl_read, KVLI_CU_COPY_THREADS, 4, kvli_cu_read_args) {
    const uint4 *src = (const uint4 *)a.src;
    uint64_t n = a.bytes / 16, i = blockIdx.x * KVLI_CU_COPY_THREADS + threadIdx.x;
    uint64_t threads = (uint64_t)gridDim.x * KVLI_CU_COPY_THREADS;
    uint32_t sum = 0;
    for (; i + (KVL_READ_WORDS - 1) * threads < n; i += KVL_READ_WORDS * threads) {
        uint4 v[KVL_READ_WORDS];
        KVL_UNROLL
        for (int j = 0; j < KVL_READ_WORDS; j++) v[j] = kvl_ldg16(src + i + j * threads);
        KVL_UNROLL
        for (int j = 0; j < KVL_READ_WORDS; j++) sum += v[j].x + v[j].y + v[j].z + v[j].w;
    }
    for (; i < n; i += threads) {
        uint4 v = kvl_ldg16(src + i);
        sum += v.x + v.y + v.z + v.w;
    }
    KVL_UNROLL
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (threadIdx.x % 32 == 0) atomicAdd(a.sum, sum);
}
