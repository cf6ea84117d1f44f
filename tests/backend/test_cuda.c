/* The CUDA backend through the mock driver: kernels run on the CPU, the host side as it is. Each test is run where
   something of it differs: the compute capability (7.5, 8.0, 9.0: how kernels fetch), the kernels themselves or plain
   ones that stand for them (where a test is about the host side), when queued work runs, tensors in host or device
   memory. `test_cuda full` runs the cross product of formats and shapes too (hours). */
#define KVL_IMPLEMENTATION
#define KVL_CUDA_KERNELS "tests/mock_cuda/image.h"
#include "../../kvlite.h"

#include "../common/cuda_model.h"
#include "conformance.h"
#include "lives.h"
#include "sealed.h"

typedef struct variant {
    conf_backend b; /* first: the suite takes a conf_backend */
    int capability, order;
    bool simple, no_vmm, lend, device;
} variant;

static void *context, *stream; /* what the test lends, or the primary context */
static const variant *now;

#define NEED(call)                                       \
    do {                                                 \
        int need_ = (call);                              \
        if (need_) fail_msg("%s gave %d", #call, need_); \
    } while (0)

/* Nothing is left, and nothing was done that only a mock forgives. */
static int end(void **state) {
    char text[600] = "";
    int problems;
    (void)state;
    if (now->lend) {
        NEED(cuCtxPushCurrent_v2(context));
        NEED(cuStreamDestroy_v2(stream));
        NEED(cuCtxDestroy_v2(context));
    } else {
        NEED(cuDevicePrimaryCtxRelease_v2(0));
    }
    problems = mock_cuda_problems(text, sizeof text);
    mock_cuda_reset();
    if (problems) {
        print_error("%d problems: %s\n", problems, text);
        return -1;
    }
    return 0;
}

static void describe(kvl_cache_desc *d) {
    if (!now->lend) return;
    d->context_desc.cuda_context = context;
    d->context_desc.cuda_stream = stream;
}

static void download(void *to, uint64_t from, size_t bytes) {
    NEED(cuCtxPushCurrent_v2(context));
    NEED(cuCtxSynchronize());
    NEED(cuMemcpyDtoH_v2(to, from, bytes));
    NEED(cuCtxPopCurrent_v2(NULL));
}

/* kvl_attend on copies of the tensors in device memory, as far off alignment as they were. */
static kvl_result device_attend(kvl_cache *cache, const kvl_step *step, uint32_t layer, kvl_tensor *t[4],
                                const size_t bytes[4]) {
    kvl_tensor copy[4];
    unsigned long long at[4];
    kvl_result r;
    int i;
    NEED(cuCtxPushCurrent_v2(context));
    for (i = 0; i < 4; i++) {
        size_t off = (uintptr_t)t[i]->data % 16;
        NEED(cuMemAlloc_v2(&at[i], bytes[i] + off));
        NEED(cuMemcpyHtoDAsync_v2(at[i] + off, t[i]->data, bytes[i], stream));
        copy[i] = *t[i];
        copy[i].data = (void *)(uintptr_t)(at[i] + off);
        copy[i].memory = KVL_MEMORY_DEVICE;
    }
    NEED(cuCtxPopCurrent_v2(NULL));
    r = kvl_attend(cache, step, layer, &copy[0], &copy[1], &copy[2], &copy[3]);
    NEED(cuCtxPushCurrent_v2(context));
    NEED(cuMemcpyDtoHAsync_v2(t[3]->data, (uintptr_t)copy[3].data, bytes[3], stream));
    NEED(cuStreamSynchronize(stream));
    for (i = 0; i < 4; i++) NEED(cuMemFree_v2(at[i]));
    NEED(cuCtxPopCurrent_v2(NULL));
    return r;
}

/* ---- lives ---- */
static void *tensors_open(void) {
    cm_device *d = (cm_device *)calloc(1, sizeof *d);
    NEED(cm_device_open(d, context, stream));
    return d;
}
static void tensors_close(void *tensors) {
    cm_device_close((cm_device *)tensors);
    free(tensors);
}
static kvl_result tensors_attend(kvl_cache *cache, const kvl_step *step, uint32_t layer, void *tensors,
                                 gm_buffers *b) {
    return cm_attend(cache, step, layer, (cm_device *)tensors, b);
}
static uint64_t memory(void) { return mock_cuda_memory(); }
static void lives_begin(void) {
    memset(&lives, 0, sizeof lives);
    lives.kind = KVL_BACKEND_CUDA;
    lives.describe = describe;
    lives.memory = memory;
    lives.budget = 8;
    lives.most = 64;
    lives.low = 4;
    lives.high = 60;
    lives.every = now->simple ? 1 : 2;
    if (!now->device) return;
    lives.open = tensors_open;
    lives.close = tensors_close;
    lives.attend = tensors_attend;
}

static int begin(void **state) {
    now = (const variant *)*state;
    mock_cuda_reset();
    mock_cuda()->capability = now->capability;
    mock_cuda()->order = now->order;
    mock_cuda()->seed = 11;
    mock_cuda()->simple_kernels = now->simple;
    mock_cuda()->no_vmm = now->no_vmm;
    context = stream = NULL;
    NEED(cuInit(0));
    if (now->lend) {
        NEED(cuCtxCreate_v2(&context, 0, 0));
        NEED(cuStreamCreate(&stream, 1));
        NEED(cuCtxPopCurrent_v2(NULL));
    } else {
        NEED(cuDevicePrimaryCtxRetain(&context, 0));
    }
    lives_begin();
    return 0;
}

/* ---- bytes ---- */
static void test_sealed_bytes(void **state) {
    static const uint32_t dims[] = {64, 80, 96, 128, 192, 256}, tokens[] = {16, 32, 64},
                          chunks[] = {1, 64, 23};
    const conf_backend *b = (const conf_backend *)*state;
    uint32_t n = 0, p, d;
    for (p = 0; p < REF_PRESETS; p++) {
        for (d = 0; d < 6; d++, n++) {
            const ref_preset *f = &ref_presets[p];
            uint32_t T = conf_is_channel(f->k) ? tokens[1 + n % 2] : tokens[n % 3];
            if (b->every && n % b->every != b->first) continue;
            seal_and_compare(b, f->k, f->v, f->exact, T, dims[d], chunks[(n / 3) % 3]);
        }
    }
}

/* Work that runs as late as it can, at once, or in between, on tensors that the app and kvlite write in turn. */
static void test_orders(void **state) {
    static life first, other;
    (void)state;
    memset(&first, 0, sizeof first);
    first.preset = "int8";
    first.chunk = 33;
    first.others = true;
    life_run(&first);
    for (int order = MOCK_EAGER; order <= MOCK_MIXED + 3; order++) {
        mock_cuda()->order = order > MOCK_MIXED ? MOCK_MIXED : order;
        mock_cuda()->seed = (uint64_t)order;
        other = first;
        memset(other.out, 0, sizeof other.out);
        life_run(&other);
        lives_agree(&first, &other, 0, "when work runs at other times");
    }
}

/* ---- graphs ---- */
static void *capture(runner *r, const cm_device *device, const kvl_step *step) {
    void *graph, *exec;
    uint32_t l;
    NEED(cuCtxPushCurrent_v2(context));
    NEED(cuStreamBeginCapture_v2(stream, 0));
    for (l = 0; l < GM_LAYERS; l++) {
        /* each layer has its own tensors, so that a replay computes them all */
        cm_device d = *device;
        d.at += l * sizeof(gm_buffers);
        KOK(r->cache, cm_call(r->cache, step, l, &d));
    }
    NEED(cuStreamEndCapture(stream, &graph));
    NEED(cuGraphInstantiateWithFlags(&exec, graph, 0));
    NEED(cuGraphDestroy(graph));
    NEED(cuCtxPopCurrent_v2(NULL));
    return exec;
}

static void test_graph_replay(void **state) {
    static life direct;
    static life graphs;
    static gm_buffers b;
    cm_device device = {0, context, stream}; /* a gm_buffers for each layer */
    runner *r;
    void *exec = NULL;
    uint64_t key = 0;
    uint32_t n[STREAMS] = {0}, replays = 0, captures = 0, l;
    (void)state;
    assert_true(now->lend && now->device);
    memset(&direct, 0, sizeof direct);
    direct.preset = "int8";
    direct.chunk = 50;
    life_run(&direct);
    graphs.preset = direct.preset;
    r = runner_make(&graphs, NULL);
    runner_open(r, 0, false);
    n[0] = 50;
    runner_step(r, n);
    runner_step(r, n);
    NEED(cuCtxPushCurrent_v2(context));
    NEED(cuMemAlloc_v2(&device.at, GM_LAYERS * sizeof(gm_buffers)));
    NEED(cuCtxPopCurrent_v2(NULL));
    while (r->pos[0] < LENGTH) {
        int32_t token = life_token(0, r->pos[0]);
        kvl_span span;
        const kvl_step *step;
        memset(&span, 0, sizeof span);
        span.seq = r->seq[0];
        span.tokens = &token;
        span.n_tokens = span.n_logits = 1;
        KOK(r->cache, kvl_step_begin(r->cache, &span, 1, &step));
        for (l = 0; l < GM_LAYERS; l++) {
            cm_device d = device;
            d.at += l * sizeof(gm_buffers);
            gm_fill(&b, step, l);
            cm_upload(&d, &b);
        }
        if (!exec || key != step->graph_key) {
            void *before = exec;
            exec = capture(r, &device, step);
            NEED(cuCtxPushCurrent_v2(context));
            if (before) NEED(cuGraphExecDestroy(before));
            NEED(cuCtxPopCurrent_v2(NULL));
            key = step->graph_key;
            captures++;
        } else {
            KOK(r->cache, kvl_step_replayed(r->cache, step));
            replays++;
        }
        NEED(cuCtxPushCurrent_v2(context));
        NEED(cuGraphLaunch(exec, stream));
        for (l = 0; l < GM_LAYERS; l++) {
            NEED(cuMemcpyDtoHAsync_v2(b.out, device.at + l * sizeof b + offsetof(gm_buffers, out),
                                      sizeof b.out, stream));
            if (memcmp(b.out[0], direct.out[r->pos[0]][l], sizeof b.out[0]) != 0)
                fail_msg("position %u layer %u: a graph gives other numbers (after %u replays)", r->pos[0], l,
                         replays);
        }
        NEED(cuCtxPopCurrent_v2(NULL));
        KOK(r->cache, kvl_step_end(r->cache, step));
        r->pos[0]++;
    }
    printf("%u graphs, %u replays\n", captures, replays);
    assert_true(replays > 20 && captures <= 3);
    NEED(cuCtxPushCurrent_v2(context));
    NEED(cuGraphExecDestroy(exec));
    NEED(cuMemFree_v2(device.at));
    NEED(cuCtxPopCurrent_v2(NULL));
    runner_destroy(r);
}

/* ---- what is refused ---- */
static void refused(kvl_geometry g, const char *name) {
    kvl_cache_desc d;
    kvl_cache *cache = NULL;
    char why[256] = "";
    kvl_result r;
    memset(&d, 0, sizeof d);
    d.geometry = g;
    d.context_desc.backend = KVL_BACKEND_CUDA;
    d.device_bytes = 32u << 20;
    d.error = why;
    d.error_size = sizeof why;
    r = kvl_cache_create(&d, &cache);
    kvl_cache_destroy(cache);
    if (r != KVL_UNSUPPORTED || !strstr(why, name)) fail_msg("%s: %s: %s", name, kvl_result_name(r), why);
}
static void test_refusals(void **state) {
    kvl_geometry g = gm_geometry("int8", NULL);
    (void)state;
    g.v_dim = 128;
    refused(g, "v_dim");
    g = gm_geometry("int8", NULL);
    g.k_dim = 112;
    refused(g, "k_dim");
    g = gm_geometry("int8", NULL);
    g.block_tokens = 8;
    refused(g, "block_tokens");
    g = gm_geometry("int8", NULL);
    g.n_q_heads = 64;
    refused(g, "n_q_heads");
    g = gm_geometry(NULL, NULL);
    g.k_format = KVL_INT4;
    g.v_format = KVL_INT8;
    refused(g, "format");
}

static void fill(variant *v, const char *name, int capability, bool full) {
    memset(v, 0, sizeof *v);
    v->b.name = name;
    v->b.kind = KVL_BACKEND_CUDA;
    v->b.presets_only = v->b.gpu = v->b.spoils_step = true;
    v->b.full = full;
    v->b.tolerance = 2e-6;
    v->b.f16_rounding = 0x1p-11;
    v->b.bf16_rounding = 0x1p-8;
    v->b.work = 6e6;
    v->b.describe = describe;
    v->b.download = download;
    v->capability = capability;
}

#define TEST(label, test, v) \
    { label, test, begin, end, &v }
#define TABLE(label, v) TEST(label ": every pair of settings", conf_test_table, v)

int main(int argc, char **argv) {
    bool full = argc > 1 && !strcmp(argv[1], "full");
    static variant sm75, sm80, sm90, host, host_device, host_lent, no_vmm, lent;
    fill(&sm80, "sm_80", 80, full);
    fill(&sm75, "sm_75", 75, full);
    fill(&sm90, "sm_90", 90, full);
    sm75.b.every = sm90.b.every = 4;
    sm90.b.first = 2;
    if (full) sm75.b.every = sm90.b.every = 0;
    fill(&host, "host side", 89, false);
    host.simple = true;
    host.b.work = 0;
    host.b.spoils_step = false;
    host.b.f16_rounding = host.b.bf16_rounding = 0;
    host_device = host;
    host_device.b.name = "host side, tensors in device memory";
    host_device.b.every = 3;
    host_device.b.attend = device_attend;
    host_device.device = true;
    host_lent = host_device;
    host_lent.b.name = "host side, lent stream";
    host_lent.b.first = 1;
    host_lent.lend = true;
    no_vmm = host;
    no_vmm.b.name = "host side, no virtual memory";
    no_vmm.no_vmm = true;
    lent = sm80;
    lent.lend = lent.device = true;
    const struct CMUnitTest tests[] = {
        TABLE("host side", host),
        TEST("host side: long contexts", conf_test_long, host),
        TABLE("host side, tensors in device memory", host_device),
        TABLE("host side, lent stream", host_lent),
        TEST("host side: sealed bytes", test_sealed_bytes, host),
        TEST("host side: the same answer", test_same_answer, host),
        TEST("host side, lent stream: the same answer", test_same_answer, host_lent),
        TEST("host side, no virtual memory: the same answer", test_same_answer, no_vmm),
        TEST("host side: orders of work", test_orders, host),
        TEST("host side, tensors in device memory: orders of work", test_orders, host_device),
        TEST("host side, lent stream: orders of work", test_orders, host_lent),
        TEST("host side: two caches", test_two_caches, host),
        TEST("host side, lent stream: two caches", test_two_caches, host_lent),
        TEST("host side: preemption", test_preemption, host),
        TEST("host side: graphs", test_graph_replay, host_lent),
        TEST("host side: refusals", test_refusals, host),
        TEST("sm_80: sealed bytes", test_sealed_bytes, sm80),
        TEST("sm_75: sealed bytes", test_sealed_bytes, sm75),
        TEST("sm_80: the same answer", test_same_answer, sm80),
        TEST("sm_90: the same answer", test_same_answer, sm90),
        TEST("sm_80: graphs", test_graph_replay, lent),
        TEST("sm_80: preemption", test_preemption, sm80),
        TEST("sm_80: long contexts", conf_test_long, sm80),
        TEST("sm_90: long contexts", conf_test_long, sm90),
        TABLE("sm_80", sm80),
        TABLE("sm_75", sm75),
        TABLE("sm_90", sm90),
    };
#if defined(__SANITIZE_THREAD__)
    printf("SKIP ThreadSanitizer knows nothing of the fibers that kernels run in\n");
    return 77;
#endif
    if (argc > 1 && !full) cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests_name("cuda", tests, NULL, NULL);
}
