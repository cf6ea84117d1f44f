/* What the host side in kvlite.h (>>vulkan) and the shaders say to each other, beside tables.h: C99 and GLSL. The text of this
   file stands in the generated kvlite_vulkan_kernels.h, so that both sides always have the same. */
#ifndef KVLI_VULKAN_ABI_H
#define KVLI_VULKAN_ABI_H

/* Variants of a shader, bits: what the device must have, or may have and is used. Each is compiled with these as macros of
   value 0 or 1: KVL_FP16 (shaderFloat16: numbers are dequantised with 16-bit arithmetic), KVL_STORAGE16
   (storageBuffer16BitAccess: 16-bit tensors are read and written by element), KVL_SUBGROUP (shuffles and broadcasts in a
   subgroup, VK_SUBGROUP_FEATURE_SHUFFLE_BIT and BALLOT_BIT, instead of shared memory). */
#define KVLI_VK_FP16 1u
#define KVLI_VK_STORAGE16 2u
#define KVLI_VK_SUBGROUP 4u

/* Specialisation constants (constant_id). */
#define KVLI_VK_WORKGROUP 0 /* invocations of a workgroup: local_size_x */
#define KVLI_VK_BANKS 1     /* storage buffers in pages[] */
#define KVLI_VK_K_FORMAT 2  /* of packed tiles */
#define KVLI_VK_V_FORMAT 3
#define KVLI_VK_EXACT_FORMAT 4 /* of exact tiles: F32, F16 or BF16 */
#define KVLI_VK_ROTATED 5      /* bit 0: packed keys, bit 1: packed values */
#define KVLI_VK_DIM 6          /* k_dim == v_dim, a multiple of 16 in 64..256 */
#define KVLI_VK_BLOCK_TOKENS 7 /* 16, 32 or 64 */
#define KVLI_VK_ROWS 8         /* the most packed rows of an item that this pipeline takes */
#define KVLI_VK_LANES 9        /* decode: invocations that share a token, a power of two */
#define KVLI_VK_PARTS 10       /* store: KVLI_VK_WRITES or KVLI_VK_SEALS, anything else: both */
#define KVLI_VK_SPECIALISATIONS 11

/* Parts of the store shader. A device that runs on a CPU takes both branches of every condition: there, one pipeline writes rows and
   another, after a barrier and only where a store has something to seal, seals. */
#define KVLI_VK_WRITES 1
#define KVLI_VK_SEALS 2
/* WORKGROUP of the store shader: a power of two in 32..128; if it only writes, any. */
#define KVLI_VK_STORE_WORKGROUP 128
#define KVLI_VK_WRITE_WORKGROUP 8

/* Descriptors, all of storage buffers. Set 0: */
#define KVLI_VK_PAGES \
    0 /* [BANKS]: 0 the step's exact scratch, 1 + s slab s. An entry's low word is an offset in bytes (and
                               flags), its high word the bank. The bank is the same for all invocations of a workgroup. */
#define KVLI_VK_TABLES 1     /* words of the step's tables */
#define KVLI_VK_PARTIAL_O 2  /* [partials][dim] floats */
#define KVLI_VK_PARTIAL_ML 3 /* [partials][2] floats: m, l */
#define KVLI_VK_LAYERS 4     /* words: a kvli_vk_layer for each layer, then sink logits */
#define KVLI_VK_TAINT 5      /* [spans] words */
/* Set 1: a and b of the push constants: k and v of a store, q and out of the others. */
#define KVLI_VK_TENSOR_A 0
#define KVLI_VK_TENSOR_B 1

/* q, k, v or out: [rows][heads][dim]; element (r, h, e) at offset + r * row_stride + h * head_stride + e elements from the
   start of the buffer that is bound. Without KVL_STORAGE16, 16-bit tensors that are written have all three even. */
KVLI_GPU_STRUCT(kvli_vk_tensor) { kvli_u32 offset, row_stride, head_stride, dtype; }
KVLI_GPU_END(kvli_vk_tensor);

/* Push constants of every shader: at most 128 bytes. Places in the tables and in the layers' buffer are in words. */
KVLI_GPU_STRUCT(kvli_vk_push) {
    kvli_vk_tensor a, b;
    kvli_u32 layer;   /* number of the layer */
    kvli_u32 list;    /* of stores, items, merges or copies: its first */
    kvli_u32 n;       /* elements of the list */
    kvli_u32 first;   /* element of workgroup 0 */
    kvli_u32 spans;   /* kvli_gpu_span[] */
    kvli_u32 entries; /* kvli_gpu_entry[] */
    kvli_u32 n_q_heads, n_kv_heads, gqa;
    kvli_u32 reserved;
}
KVLI_GPU_END(kvli_vk_push);

/* Where a layer's tiles stand, in units of 16 bytes. Index 0: packed blocks, 1: exact ones (equal where there is one class).
   K tile of KV head h at (entry & ~FLAGS) / 16 + offset[class] + h * head_stride[class] (scratch: without offset), its V tile
   v_offset[class] after it. */
KVLI_GPU_STRUCT(kvli_vk_layer) {
    kvli_u32 offset[2], head_stride[2], v_offset[2];
    kvli_u32 window, sink_tokens; /* window 0 = none */
    kvli_u32 sink_logits;         /* where its [n_q_heads] floats stand, or KVLI_GPU_NONE */
    float scale, softcap;
    float k_global, v_global; /* NVFP4 */
    kvli_u32 reserved[3];
}
KVLI_GPU_END(kvli_vk_layer);

/* Shaders. Scores, partial results and what a row sees: as kernels_cuda/abi.h and tables.h have it.
     store    workgroups (n, n_kv_heads, 2: K and V)   writes rows into exact tiles, seals complete blocks
     decode   workgroups (n, n_kv_heads)               items of at most ROWS rows
     prefill  workgroups (n, n_kv_heads)               items of at most ROWS rows
     merge    workgroups (n, n_kv_heads)               n kvli_gpu_merge
     copy     workgroups (n, any)                      n kvli_gpu_copy; workgroups of a column share each
     read     workgroups (any)                         for benchmarks: adds the sum of the words of bank `first`, n 16-byte units
                                                       from unit `list` on, to word 0 of the taint buffer (which keeps it from being
                                                       left out) */

/* ---- launch shapes ---- */
/* The most packed rows of a decode item. */
KVLI_GPU_FN kvli_u32 kvli_vk_decode_rows(kvli_u32 gqa) { return gqa <= 8u ? gqa : (gqa + 1u) / 2u; }

/* Invocations of a decode workgroup: one subgroup on a CPU (whose cores run one workgroup each), two of 32 on a GPU: barriers
   are cheap then, and there are many workgroups. subgroup_size: 0 without KVL_SUBGROUP. */
KVLI_GPU_FN kvli_u32 kvli_vk_decode_workgroup(kvli_u32 subgroup_size, kvli_u32 is_cpu) {
    return is_cpu != 0u          ? (subgroup_size != 0u ? subgroup_size : 8u)
           : subgroup_size > 64u ? subgroup_size
                                 : 64u;
}

/* Tokens that a slot takes at once; fewer where lanes' parts of scores, with q, would not leave room in 16 KB. */
KVLI_GPU_FN kvli_u32 kvli_vk_decode_tokens(kvli_u32 dim, kvli_u32 rows, kvli_u32 block_tokens, kvli_u32 slots,
                                           kvli_u32 has_subgroups) {
    kvli_u32 most = has_subgroups == 0u && rows * dim > 1920u ? 2u : 4u;
    return slots == 1u ? 1u : block_tokens / slots < most ? block_tokens / slots : most;
}

/* Bytes of shared memory of a decode workgroup. */
KVLI_GPU_FN kvli_u32 kvli_vk_decode_shared(kvli_u32 dim, kvli_u32 rows, kvli_u32 block_tokens,
                                           kvli_u32 workgroup, kvli_u32 lanes, kvli_u32 has_subgroups) {
    kvli_u32 slots = workgroup / lanes, row = slots == 1u ? 1u : slots * dim;
    kvli_u32 tokens = kvli_vk_decode_tokens(dim, rows, block_tokens, slots, has_subgroups);
    kvli_u32 scores = has_subgroups != 0u ? 0u : workgroup * tokens * rows;
    return 4u * ((row > scores ? row : scores) + rows * dim + 2u * slots * rows);
}

/* Invocations that share a token. On a CPU all. On a GPU no more than it takes to keep q and the sums in registers (128 of them),
   and the slots' sums of a row in 16 KB of shared memory, but a sixteenth of the workgroup, so that it takes at most 16 tokens at
   once. Within a subgroup, if there are shuffles. */
KVLI_GPU_FN kvli_u32 kvli_vk_decode_lanes(kvli_u32 dim, kvli_u32 rows, kvli_u32 workgroup,
                                          kvli_u32 subgroup_size, kvli_u32 is_cpu) {
    kvli_u32 most = subgroup_size != 0u && subgroup_size < workgroup ? subgroup_size : workgroup;
    kvli_u32 lanes = is_cpu != 0u ? most : workgroup / 16u > 4u ? workgroup / 16u : 4u;
    while (is_cpu == 0u && lanes < most && lanes < dim / 8u &&
           (rows * ((dim / 8u + lanes - 1u) / lanes) > 8u ||
            kvli_vk_decode_shared(dim, rows, 16u, workgroup, lanes, 1u) > 16384u))
        lanes *= 2u;
    while (lanes > most || lanes > dim / 8u) lanes /= 2u;
    return lanes;
}

#define KVLI_VK_MERGE_WORKGROUP 64u

/* Prefill: WORKGROUP invocations are a grid of LANES x (WORKGROUP / LANES), a line of which has 4 rows of q each, or a multiple of
   4; rows and invocations are chosen for 32 accumulators an invocation. Macros, as the sizes of the shader's arrays. */
#define KVLI_VK_PREFILL_STEP(dim, block_tokens) \
    ((dim) <= 64 || (block_tokens) < 32 ? 16u : 32u)             /* tokens at once */
#define KVLI_VK_PREFILL_SLICE(dim) ((dim) % 32 == 0 ? 32u : 16u) /* dims of K in shared memory at once */
#define KVLI_VK_PREFILL_V_TOKENS(dim) ((dim) <= 64 ? 16u : (dim) <= 144 ? 8u : 4u) /* tokens of V likewise */
/* Of either, in units of 16 bytes. */
#define KVLI_VK_PREFILL_K_TILE(dim, block_tokens) \
    (KVLI_VK_PREFILL_STEP(dim, block_tokens) * (KVLI_VK_PREFILL_SLICE(dim) / 4u + 1u))
#define KVLI_VK_PREFILL_V_TILE(dim) (KVLI_VK_PREFILL_V_TOKENS(dim) * ((dim) / 4u))
#define KVLI_VK_PREFILL_TILE(dim, block_tokens)                              \
    (KVLI_VK_PREFILL_K_TILE(dim, block_tokens) > KVLI_VK_PREFILL_V_TILE(dim) \
         ? KVLI_VK_PREFILL_K_TILE(dim, block_tokens)                         \
         : KVLI_VK_PREFILL_V_TILE(dim))

/* Rows of an item, invocations and LANES by the device's shared memory (the least that there is, 16 KB, is enough), and the bytes
   of it that are used. */
KVLI_GPU_FN kvli_u32 kvli_vk_prefill_rows(kvli_u32 dim, kvli_u32 max_shared) {
    return (dim <= 64u ? 32u : dim <= 128u ? 16u : 8u) * (max_shared >= 32768u ? 2u : 1u);
}
KVLI_GPU_FN kvli_u32 kvli_vk_prefill_workgroup(kvli_u32 max_shared) {
    return max_shared >= 32768u ? 128u : 64u;
}
KVLI_GPU_FN kvli_u32 kvli_vk_prefill_lanes(kvli_u32 dim) { return dim <= 64u ? 8u : dim <= 128u ? 16u : 32u; }
KVLI_GPU_FN kvli_u32 kvli_vk_prefill_shared(kvli_u32 dim, kvli_u32 block_tokens, kvli_u32 rows,
                                            kvli_u32 lanes) {
    return 16u * (rows * (dim / 4u + 1u) + KVLI_VK_PREFILL_TILE(dim, block_tokens) +
                  KVLI_VK_PREFILL_STEP(dim, block_tokens) * (rows / 4u) + rows / 4u * lanes);
}
#endif
