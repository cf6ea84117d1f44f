// Cases of attention (tests/common/attend_case.h) by a kernel of kernels_cuda: decode, prefill or plain, merged where an item is
// split.
#ifndef CUDA_ATTEND_CASE_H
#define CUDA_ATTEND_CASE_H
#include "cuda_test.h"
#include "abi.h"
#include "../common/attend_case.h"

#ifndef KVL_CPU_ARCH
#define KVL_CPU_ARCH 800
#endif

namespace attend {

typedef std::string KernelName(const Case &c);
typedef size_t KernelMemory(const Case &c);

static kvli_cu_tensor cuda_tensor(Tensor &t) {
    return {(uint64_t)(t.base() + t.offset * dtype_size(t.dtype)), t.row_stride, t.head_stride, t.dtype, 0};
}

static Result run(const Case &c, KernelName *name, KernelMemory *memory, unsigned threads) {
    Problem p(c, [](const uint8_t *bytes, size_t) { return (uint64_t)bytes; });
    std::vector<float> partial_o((size_t)p.plan.partials * c.kv_heads * c.dim, NAN),
        partial_ml((size_t)p.plan.partials * c.kv_heads * 2, NAN);
    uint32_t items = (uint32_t)p.plan.items.size(), merges = (uint32_t)p.plan.merges.size();
    kvli_gpu_counts counts = {0, 0, items, items, merges, {0, 0, 0}};
    kvli_cu_attend_args a = {};
    a.counts = &counts;
    a.spans = p.spans;
    a.entries = p.entries.data();
    a.items = p.plan.items.data();
    a.merges = p.plan.merges.data();
    a.sink_logits = c.sink_logits ? p.logits.data() : nullptr;
    a.partial_o = partial_o.data();
    a.partial_ml = partial_ml.data();
    a.q = cuda_tensor(p.q);
    a.out = cuda_tensor(p.out);
    a.pages = {{p.s.packed.offset, p.s.exact.offset},
               {p.s.packed.head_stride, p.s.exact.head_stride},
               {p.s.packed.v_offset, p.s.exact.v_offset}};
    a.end_item = 1000;
    a.block_tokens = c.block_tokens;
    a.n_q_heads = p.heads;
    a.n_kv_heads = c.kv_heads;
    a.gqa = c.gqa;
    a.dim = c.dim;
    a.window = c.window;
    a.sink_tokens = c.sink_tokens;
    a.exact = c.preset->exact;
    a.stages = c.stages;
    a.scale = p.scale;
    a.softcap = c.softcap;
    a.k_global = a.v_global = 1.0f / 8;
    // The grids are padded by one, as for a graph that is replayed.
    std::string kernel = name(c);
    bool ok = cuda_cpu::launch(kernel.c_str(), dim3(items + 1, c.kv_heads), threads, memory(c), &a);
    if (ok && merges)
        ok = cuda_cpu::launch("kvl_merge", dim3(merges + 1, c.kv_heads), KVLI_CU_MERGE_THREADS, 0, &a);
    Result result = p.judge(c.preset->tolerance);
    result.overwrote |= !ok;
    return result;
}

static const uint32_t dims[] = {64, 80, 96, 128, 192, 256}; // that kernels are compiled for

} // namespace attend
#endif
