/* Writes a step's rows of K and V into exact tiles and seals those that are complete: the bytes that the CPU writes. */
#include "encode.cuh"

/* A block's tile of one class; `v_offset` is 0 for K. */
KVL_D uint8_t *kvl_store_tile(uint64_t entry, uint64_t offset, uint64_t head_offset, uint64_t v_offset) {
    uint64_t block = entry & ~(uint64_t)KVLI_GPU_FLAGS;
    return (uint8_t *)(block + (entry & KVLI_GPU_SCRATCH ? 0 : offset) + head_offset + v_offset);
}

/* Rows of a head from `in` to the exact tile, 8 numbers a thread; false if a number that this thread wrote is not
   finite. */
KVL_D bool kvl_store_rows(const kvli_cu_tensor &in, const kvli_gpu_store &s, uint32_t exact, uint32_t dim,
                          uint8_t *tile) {
    uint32_t from = in.dtype + KVLI_GPU_F32; /* the two enums run alike */
    uint64_t size = kvl_number_bytes(from);
    const uint8_t *head = (const uint8_t *)in.data + blockIdx.y * in.head_stride * size;
    bool aligned = !(((uint64_t)head | in.row_stride * size) % 16), finite = true;
    uint8_t *out = tile + (uint64_t)s.at * dim * kvl_number_bytes(exact);
    for (uint32_t i = threadIdx.x * 8; i < s.n_rows * dim; i += KVLI_CU_STORE_THREADS * 8) {
        const uint8_t *p = head + ((s.row + i / dim) * in.row_stride + i % dim) * size;
        float x[8];
        if (aligned)
            kvl_load8(from, p, x);
        else
            kvl_load8_unaligned(from, p, x);
        finite &= kvl_store8(exact, x, out + i * kvl_number_bytes(exact));
    }
    return finite;
}

/* grid (stores, n_kv_heads, 2: K and V) */
KVL_KERNEL(kvl_store, KVLI_CU_STORE_THREADS, 4, kvli_cu_store_args) {
    KVL_DYN_SMEM(float, smem);
    if (blockIdx.x >= a.counts->stores) return;
    kvli_gpu_store s = a.stores[blockIdx.x];
    bool v = blockIdx.z;
    kvl_side side = {v ? a.v_format : a.k_format, v ? a.v_rotated : a.k_rotated, a.exact, a.block_tokens,
                     v ? a.v_dim : a.k_dim,       v ? a.v_global : a.k_global};
    uint8_t *exact_tile = kvl_store_tile(s.exact, a.pages.offset[1], blockIdx.y * a.pages.head_stride[1],
                                         v ? a.pages.v_offset[1] : 0);
    if (!kvl_store_rows(v ? a.v : a.k, s, a.exact, side.dim, exact_tile)) a.taint[s.span] = 1;
    if (!s.sealed) return;
    __syncthreads(); /* the tile is read by other threads than those that wrote it */
    uint8_t *tile = kvl_store_tile(s.sealed, a.pages.offset[0], blockIdx.y * a.pages.head_stride[0],
                                   v ? a.pages.v_offset[0] : 0);
    kvl_seal_tile(side, exact_tile, tile, smem);
}
