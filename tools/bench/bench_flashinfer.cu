// bench_flashinfer: FlashInfer's paged attention on the shapes of bench_cuda, D 128, 8 KV heads, pages of 32 tokens, q and
// out in F16; the plan is made before, the kernels are replayed as a CUDA graph over more KV than the L2 cache holds.
//
//     bench_cuda --list | bench_flashinfer >FILE     lines "what preset batch context gqa rows"; f16 and fp8 are taken
//
// Decode is run on FlashInfer's CUDA-core kernel and on its FA2 (tensor core) kernel, prefill on FA2; appending the new rows
// is not in its times. JSON, an object a line: section, what, preset, batch, context, gqa, rows, kernel, us. Made by tools/gpu_check.sh
// with nvcc and -I FLASHINFER/include; not part of `make`.
#include <cuda/cmath>

// FlashInfer takes cuda::fast_mod_div from CCCL, which the toolkits of CUDA 12.x and 13.0 do not have yet.
#ifdef BENCH_FAST_MOD_DIV
namespace cuda {
template <class T> class fast_mod_div { // exact below 2^31: one product and a shift, as CCCL's
    uint32_t d, factor, shift = 31;

  public:
    __host__ __device__ fast_mod_div(T divisor) : d(divisor) {
        while ((1ull << (shift - 31)) < d) shift++;
        factor = static_cast<uint32_t>(((1ull << shift) + d - 1) / d);
    }
    friend __host__ __device__ T operator/(T n, fast_mod_div by) {
        return static_cast<T>(static_cast<uint64_t>(n) * by.factor >> by.shift);
    }
    friend __host__ __device__ T operator%(T n, fast_mod_div by) { return n - n / by * by.d; }
};
} // namespace cuda
#endif

#include <flashinfer/attention/decode.cuh>
#include <flashinfer/attention/default_decode_params.cuh>
#include <flashinfer/attention/default_prefill_params.cuh>
#include <flashinfer/attention/prefill.cuh>
#include <flashinfer/attention/scheduler.cuh>
#include <flashinfer/attention/variants.cuh>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

using namespace flashinfer;

enum { DIM = 128, KV_HEADS = 8, PAGE = 32, FLOATS = 256 << 20, INTS = 16 << 20 };
using Variant = DefaultAttention<false, false, false, false>;

static void check(cudaError_t e, const char *what) {
    if (e == cudaSuccess) return;
    fprintf(stderr, "bench_flashinfer: %s: %s\n", what, cudaGetErrorString(e));
    exit(1);
}
#define CHECK(call) check(call, #call)

template <class T> static T *device(size_t n) {
    void *p = nullptr;
    CHECK(cudaMalloc(&p, n * sizeof(T)));
    CHECK(cudaMemset(p, 0x2b, n * sizeof(T))); // small numbers in F16 (0.056) and FP8 (0.69)
    return static_cast<T *>(p);
}

static int32_t *uploaded(const std::vector<int32_t> &x) {
    int32_t *p = device<int32_t>(x.size());
    CHECK(cudaMemcpy(p, x.data(), x.size() * 4, cudaMemcpyHostToDevice));
    return p;
}

struct Shape {
    char what[16], preset[16];
    uint32_t batch, context, gqa, rows;
};

struct Common {
    cudaStream_t stream;
    void *floats, *ints, *pinned;
    size_t l2;
};

// One layer's launches over `layers` copies of the pages, as a graph; seconds of one of them.
template <class F> static double timed(const Common &c, uint32_t layers, F run) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    for (uint32_t l = 0; l < layers; l++) CHECK(run(l));
    CHECK(cudaStreamSynchronize(c.stream));
    CHECK(cudaStreamBeginCapture(c.stream, cudaStreamCaptureModeThreadLocal));
    for (uint32_t l = 0; l < layers; l++) CHECK(run(l));
    CHECK(cudaStreamEndCapture(c.stream, &graph));
    CHECK(cudaGraphInstantiateWithFlags(&exec, graph, 0));
    CHECK(cudaGraphLaunch(exec, c.stream));
    CHECK(cudaStreamSynchronize(c.stream));
    std::vector<double> seconds;
    for (uint32_t n = 1; seconds.size() < 3;) {
        auto start = std::chrono::steady_clock::now();
        for (uint32_t i = 0; i < n; i++) CHECK(cudaGraphLaunch(exec, c.stream));
        CHECK(cudaStreamSynchronize(c.stream));
        double s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        if (s >= 0.02)
            seconds.push_back(s / n / layers);
        else
            n *= 2;
    }
    std::sort(seconds.begin(), seconds.end());
    CHECK(cudaGraphExecDestroy(exec));
    CHECK(cudaGraphDestroy(graph));
    return seconds[1];
}

template <class KV> struct Pages {
    uint32_t n = 0, layers = 1;
    KV *k, *v;
    half *q, *out;
    std::vector<int32_t> indptr{0};
    int32_t *indices, *d_indptr, *last;

    Pages(const Common &c, const Shape &s) {
        uint32_t length = s.context + s.rows, each = (length + PAGE - 1) / PAGE;
        std::vector<int32_t> order, lasts(s.batch, (length - 1) % PAGE + 1);
        for (uint32_t b = 0; b < s.batch; b++) indptr.push_back(indptr.back() + each);
        n = indptr.back();
        for (uint32_t i = 0; i < n; i++) order.push_back(static_cast<int32_t>(static_cast<uint64_t>(i) * 7919 % n));
        if (n % 7919 == 0)
            for (uint32_t i = 0; i < n; i++) order[i] = i;
        size_t one = bytes();
        if (strcmp(s.what, "decode") == 0) layers = std::min<size_t>(64, (4 * c.l2 + 2 * one - 1) / (2 * one));
        layers = std::max(layers, 1u);
        k = device<KV>(layers * one / sizeof(KV));
        v = device<KV>(layers * one / sizeof(KV));
        q = device<half>(static_cast<size_t>(s.batch) * s.rows * KV_HEADS * s.gqa * DIM);
        out = device<half>(static_cast<size_t>(s.batch) * s.rows * KV_HEADS * s.gqa * DIM);
        indices = uploaded(order);
        d_indptr = uploaded(indptr);
        last = uploaded(lasts);
    }
    ~Pages() {
        for (void *p : {(void *)k, (void *)v, (void *)q, (void *)out, (void *)indices, (void *)d_indptr, (void *)last})
            cudaFree(p);
    }
    size_t bytes() const { return static_cast<size_t>(n) * PAGE * KV_HEADS * DIM * sizeof(KV); }
    paged_kv_t<KV, int32_t> layer(uint32_t l, uint32_t batch) const {
        size_t at = l * (bytes() / sizeof(KV));
        return paged_kv_t<KV, int32_t>(KV_HEADS, PAGE, DIM, batch, QKVLayout::kHND, k + at, v + at, indices, d_indptr,
                                       last);
    }
};

template <class T> static T *at(void *base, int64_t offset) { return reinterpret_cast<T *>(static_cast<char *>(base) + offset); }

template <class KV, uint32_t GQA> static double decode(const Common &c, const Shape &s, Pages<KV> &p) {
    using Params = BatchDecodeParams<half, KV, half, int32_t>;
    DecodePlanInfo info;
    const uint32_t heads = KV_HEADS * s.gqa;
    auto estimate = BatchDecodeWithPagedKVCacheWorkEstimationDispatched<GQA, DIM, PosEncodingMode::kNone, Variant, Params>;
    CHECK((DecodePlan<DIM, PosEncodingMode::kNone, Variant, Params>(c.floats, FLOATS, c.ints, c.pinned, INTS, info,
                                                                    p.indptr.data(), s.batch, heads, PAGE, false,
                                                                    c.stream, estimate)));
    CHECK(cudaStreamSynchronize(c.stream));
    return timed(c, p.layers, [&](uint32_t l) {
        Params a(p.q, nullptr, p.layer(l, s.batch), p.out, nullptr, nullptr, heads, heads * DIM, DIM, -1, 0.0f,
                 1.0f / std::sqrt(float(DIM)), 1.0f, 1.0f);
        a.request_indices = at<int32_t>(c.ints, info.request_indices_offset);
        a.kv_tile_indices = at<int32_t>(c.ints, info.kv_tile_indices_offset);
        a.o_indptr = at<int32_t>(c.ints, info.o_indptr_offset);
        a.kv_chunk_size_ptr = at<int32_t>(c.ints, info.kv_chunk_size_ptr_offset);
        a.padded_batch_size = info.padded_batch_size;
        half *tmp_v = info.split_kv ? at<half>(c.floats, info.v_offset) : nullptr;
        float *tmp_s = info.split_kv ? at<float>(c.floats, info.s_offset) : nullptr;
        return BatchDecodeWithPagedKVCacheDispatched<DIM, PosEncodingMode::kNone, Variant, Params>(a, tmp_v, tmp_s, false,
                                                                                                   c.stream);
    });
}

template <class KV> static double fa2(const Common &c, const Shape &s, Pages<KV> &p) {
    using Params = BatchPrefillPagedParams<half, KV, half, int32_t>;
    PrefillPlanInfo info;
    const uint32_t heads = KV_HEADS * s.gqa, rows = s.batch * s.rows;
    std::vector<int32_t> q_indptr{0};
    for (uint32_t b = 0; b < s.batch; b++) q_indptr.push_back(q_indptr.back() + s.rows);
    int32_t *d_q_indptr = uploaded(q_indptr);
    CHECK(PrefillPlan<int32_t>(c.floats, FLOATS, c.ints, c.pinned, INTS, info, q_indptr.data(), p.indptr.data(), rows,
                               s.batch, heads, KV_HEADS, DIM, DIM, PAGE, false, 2, -1, -1, false, 0, 0, c.stream,
                               sizeof(KV)));
    CHECK(cudaStreamSynchronize(c.stream));
    double seconds = timed(c, p.layers, [&](uint32_t l) {
        Params a(p.q, p.layer(l, s.batch), nullptr, d_q_indptr, nullptr, nullptr, p.out, nullptr, nullptr, heads,
                 heads * DIM, DIM, -1, 0.0f, 1.0f / std::sqrt(float(DIM)), 1.0f, 1.0f);
        a.request_indices = at<int32_t>(c.ints, info.request_indices_offset);
        a.qo_tile_indices = at<int32_t>(c.ints, info.qo_tile_indices_offset);
        a.kv_tile_indices = at<int32_t>(c.ints, info.kv_tile_indices_offset);
        a.o_indptr = at<int32_t>(c.ints, info.o_indptr_offset);
        a.kv_chunk_size_ptr = at<int32_t>(c.ints, info.kv_chunk_size_ptr_offset);
        a.merge_indptr = info.split_kv ? at<int32_t>(c.ints, info.merge_indptr_offset) : nullptr;
        a.padded_batch_size = info.padded_batch_size;
        a.max_total_num_rows = info.total_num_rows;
        a.partition_kv = info.split_kv;
        half *tmp_v = info.split_kv ? at<half>(c.floats, info.v_offset) : nullptr;
        float *tmp_s = info.split_kv ? at<float>(c.floats, info.s_offset) : nullptr;
#define FA2(tile)                                                                                                       \
    BatchPrefillWithPagedKVCacheDispatched<tile, DIM, DIM, PosEncodingMode::kNone, false, MaskMode::kCausal, Variant,  \
                                           Params>(a, tmp_v, tmp_s, false, c.stream)
        return info.cta_tile_q == 128 ? FA2(128) : info.cta_tile_q == 64 ? FA2(64) : FA2(16);
#undef FA2
    });
    cudaFree(d_q_indptr);
    return seconds;
}

static void report(const Shape &s, const char *kernel, double seconds) {
    printf("{\"section\": \"flashinfer\", \"what\": \"%s\", \"preset\": \"%s\", \"batch\": %u, \"context\": %u, \"gqa\": %u, "
           "\"rows\": %u, \"kernel\": \"%s\", \"us\": %.3f}\n",
           s.what, s.preset, s.batch, s.context, s.gqa, s.rows, kernel, seconds * 1e6);
    fflush(stdout);
}

template <class KV> static void measure(const Common &c, const Shape &s) {
    size_t available, total, need = 2 * sizeof(KV) * DIM * KV_HEADS * size_t(s.batch) * (s.context + s.rows + PAGE);
    CHECK(cudaMemGetInfo(&available, &total));
    if (std::max(need, need / 2 + 8 * c.l2) + (1u << 30) > available) {
        fprintf(stderr, "left out: %s %s %u %u: memory\n", s.what, s.preset, s.batch, s.context);
        return;
    }
    Pages<KV> p(c, s);
    if (strcmp(s.what, "decode") == 0)
        report(s, "decode", s.gqa == 8 ? decode<KV, 8>(c, s, p) : decode<KV, 4>(c, s, p));
    report(s, "fa2", fa2<KV>(c, s, p));
}

int main() {
    Common c;
    Shape s;
    cudaDeviceProp prop;
    CHECK(cudaStreamCreate(&c.stream));
    CHECK(cudaGetDeviceProperties(&prop, 0));
    c.l2 = prop.l2CacheSize;
    CHECK(cudaMalloc(&c.floats, FLOATS));
    CHECK(cudaMalloc(&c.ints, INTS));
    CHECK(cudaMallocHost(&c.pinned, INTS));
    while (scanf("%15s %15s %u %u %u %u", s.what, s.preset, &s.batch, &s.context, &s.gqa, &s.rows) == 6) {
        if (s.gqa != 4 && s.gqa != 8) continue;
        if (strcmp(s.preset, "f16") == 0) measure<half>(c, s);
        if (strcmp(s.preset, "fp8") == 0) measure<__nv_fp8_e4m3>(c, s);
    }
    return 0;
}
