/* The CUDA backend through the mock driver: kernels run on the CPU, the host side as it is. Each test is run where
   something of it differs: the compute capability (7.5, 8.0, 9.0: how kernels fetch), the kernels themselves or plain
   ones that stand for them (where a test is about the host side), when queued work runs, tensors in host or device
   memory. `test_cuda full` runs the cross product of formats and shapes too (hours). */
#define KVL_IMPLEMENTATION
#define KVL_CUDA_KERNELS "tests/mock_cuda/image.h"
#include "../../kvlite.h"

#include "../common/cuda_model.h"
#include "conformance.h"
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
    return 0;
}

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

/* ---- lives: the same streams, told in other ways ---- */
enum { STREAMS = 5, PROMPT = 100, LENGTH = 130, SHARED = 70 };

typedef struct life {
    const char *preset;
    uint32_t chunk; /* of the prompt of stream 0 */
    bool others;    /* four more streams run beside it */
    bool reuse;     /* stream 0 is closed and opened again on what it left */
    bool fork;      /* stream 0 goes on as a fork, and the one it came from goes another way */
    bool resize;    /* the budget shrinks and grows all the time */
    float out[LENGTH][CM_LAYERS][CM_Q_HEADS][CM_DIM]; /* of stream 0 */
} life;

static int32_t life_token(uint32_t s, uint32_t pos) {
    return (int32_t)(pos < SHARED ? 7000 + pos : 10000 * (s + 1) + pos);
}

static kvl_cache *life_cache(const life *w, kvl_context *shared) {
    kvl_layer layers[CM_LAYERS];
    kvl_cache_desc d;
    kvl_cache *cache = NULL;
    char why[256] = "";
    memset(layers, 0, sizeof layers);
    memset(&d, 0, sizeof d);
    layers[1].window = 40;
    layers[1].sink_tokens = 3;
    d.geometry = cm_geometry(w->preset, layers);
    d.context = shared;
    d.context_desc.backend = KVL_BACKEND_CUDA;
    describe(&d);
    d.device_bytes = 8u << 20;
    d.max_device_bytes = 64u << 20;
    d.max_sequences = 16;
    d.max_seq_tokens = 512;
    d.max_step_tokens = CM_ROWS;
    d.poison = true;
    d.error = why;
    d.error_size = sizeof why;
    if (kvl_cache_create(&d, &cache) != KVL_OK) fail_msg("%s: %s", w->preset, why);
    return cache;
}

#define KOK(cache, call)                                                                                 \
    do {                                                                                                 \
        kvl_result r_ = (call);                                                                          \
        if (r_ != KVL_OK) fail_msg("%s gave %s: %s", #call, kvl_result_name(r_), kvl_last_error(cache)); \
    } while (0)

typedef struct runner {
    life *w;
    kvl_cache *cache;
    kvl_seq seq[STREAMS];
    uint32_t pos[STREAMS];
    cm_device device, *d;
    cm_buffers b;
    uint64_t rng;
} runner;

static void runner_open(runner *r, uint32_t s, bool match) {
    int32_t tokens[LENGTH];
    kvl_seq_desc d;
    kvl_reuse reuse;
    uint32_t i;
    memset(&d, 0, sizeof d);
    for (i = 0; i < LENGTH; i++) tokens[i] = life_token(s, i);
    d.tokens = tokens;
    d.n_tokens = LENGTH;
    d.no_match = !match;
    KOK(r->cache, kvl_seq_open(r->cache, &d, &r->seq[s], &reuse));
    r->pos[s] = reuse.matched;
}

/* n[s] rows of each stream in one step. */
static void runner_step(runner *r, const uint32_t n[STREAMS]) {
    static int32_t tokens[STREAMS][CM_ROWS];
    kvl_span spans[STREAMS];
    const kvl_step *step;
    uint32_t who[STREAMS], n_spans = 0, s, i, l;
    memset(spans, 0, sizeof spans);
    for (i = 0; i < STREAMS; i++) {
        s = (i + (uint32_t)r->rng) % STREAMS; /* stream 0 is not always first */
        if (!n[s]) continue;
        for (l = 0; l < n[s]; l++) tokens[s][l] = life_token(s, r->pos[s] + l);
        spans[n_spans].seq = r->seq[s];
        spans[n_spans].tokens = tokens[s];
        spans[n_spans].n_tokens = n[s];
        spans[n_spans].n_logits = 1;
        who[n_spans++] = s;
    }
    if (!n_spans) return;
    KOK(r->cache, kvl_step_begin(r->cache, spans, n_spans, &step));
    for (l = 0; l < CM_LAYERS; l++) {
        KOK(r->cache, cm_attend(r->cache, step, l, r->d, &r->b));
        for (i = 0; i < n_spans; i++) {
            if (who[i] != 0) continue;
            for (s = 0; s < n[0]; s++)
                memcpy(r->w->out[r->pos[0] + s][l], r->b.out[step->spans[i].first_row + s],
                       sizeof r->b.out[0]);
        }
    }
    KOK(r->cache, kvl_step_end(r->cache, step));
    for (s = 0; s < STREAMS; s++) r->pos[s] += n[s];
}

static void runner_resize(runner *r) {
    uint64_t held, low = 4u << 20, high = 60u << 20, before = mock_cuda_memory();
    KOK(r->cache, kvl_cache_resize(r->cache, high, &held));
    if (mock_cuda_memory() <= before) fail_msg("growing took no memory");
    before = mock_cuda_memory();
    KOK(r->cache, kvl_cache_resize(r->cache, low, &held));
    if (mock_cuda_memory() >= before) fail_msg("shrinking gave no memory back");
    KOK(r->cache, kvl_validate(r->cache));
}

static void life_run(life *w) {
    runner *r = (runner *)calloc(1, sizeof *r);
    uint32_t s, n[STREAMS], steps = 0;
    r->w = w;
    r->cache = life_cache(w, NULL);
    if (now->device) {
        NEED(cm_device_open(&r->device, context, stream));
        r->d = &r->device;
    }
    for (s = 0; s < (w->others ? STREAMS : 1u); s++) runner_open(r, s, false);
    while (r->pos[0] < LENGTH) {
        memset(n, 0, sizeof n);
        n[0] = r->pos[0] < PROMPT ? conf_min(w->chunk, PROMPT - r->pos[0]) : 1;
        for (s = 1; w->others && s < STREAMS; s++) {
            uint32_t used = n[0] + n[1] * (s > 1) + n[2] * (s > 2) + n[3] * (s > 3);
            n[s] = conf_min(conf_random(&r->rng, 3) ? 1 : conf_random(&r->rng, 40), LENGTH - r->pos[s]);
            n[s] = conf_min(n[s], CM_ROWS - used);
        }
        runner_step(r, n);
        if (w->resize && steps++ % 4 == 0) runner_resize(r);
        if (w->reuse && r->pos[0] == PROMPT) {
            KOK(r->cache, kvl_seq_close(r->cache, r->seq[0]));
            runner_open(r, 0, true);
            if (r->pos[0] != PROMPT) fail_msg("%s: %u of %u tokens reused", w->preset, r->pos[0], PROMPT);
            w->reuse = false;
        }
        if (w->fork && r->pos[0] == PROMPT) { /* the fork becomes stream 0, stream 1 the one it came from */
            uint32_t length;
            r->seq[1] = r->seq[0];
            r->pos[1] = r->pos[0];
            KOK(r->cache, kvl_seq_fork(r->cache, r->seq[1], &r->seq[0], &length));
            assert_int_equal(length, PROMPT);
            for (memset(n, 0, sizeof n), n[1] = 5, s = 0; s < 3; s++) runner_step(r, n);
            w->fork = false;
        }
    }
    KOK(r->cache, kvl_validate(r->cache));
    kvl_cache_destroy(r->cache);
    if (r->d) cm_device_close(r->d);
    free(r);
}

/* tolerance 0: bit for bit */
static void lives_agree(const life *a, const life *b, double tolerance, const char *what) {
    uint32_t i, l, h, e;
    for (i = 0; i < LENGTH; i++) {
        for (l = 0; l < CM_LAYERS; l++) {
            for (h = 0; h < CM_Q_HEADS; h++) {
                for (e = 0; e < CM_DIM; e++) {
                    float x = a->out[i][l][h][e], y = b->out[i][l][h][e];
                    bool ok =
                        tolerance > 0 ? fabs((double)x - (double)y) <= tolerance : memcmp(&x, &y, 4) == 0;
                    if (!ok)
                        fail_msg("%s, %s: position %u layer %u head %u element %u: %.9g and %.9g", a->preset,
                                 what, i, l, h, e, (double)x, (double)y);
                }
            }
        }
    }
}

static const char *const all_presets[] = {"f16",   "bf16",     "int8", "int8+", "fp8",
                                          "nvfp4", "balanced", "int4", "f32"};

static void test_same_answer(void **state) {
    static life first, other;
    uint32_t p, every = CONF_EVERY * (((const variant *)*state)->simple ? 1 : 2);
    for (p = 0; p < 9; p += every) {
        memset(&first, 0, sizeof first);
        first.preset = all_presets[p];
        first.chunk = 37;
        life_run(&first);
        other = first;
        memset(other.out, 0, sizeof other.out);
        life_run(&other);
        lives_agree(&first, &other, 0, "a second run");
        other.others = true;
        life_run(&other);
        lives_agree(&first, &other, 0, "beside others");
        other.resize = true;
        life_run(&other);
        lives_agree(&first, &other, 0, "resized all the time, beside others");
        other.others = other.resize = false;
        other.reuse = true;
        life_run(&other);
        lives_agree(&first, &other, 0, "gone on with after it was closed");
        other.fork = true;
        life_run(&other);
        lives_agree(&first, &other, 0, "as a fork");
        other.chunk = 64;
        life_run(&other);
        lives_agree(&first, &other, 0.02, "in other chunks");
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

/* ---- two caches of one context, whose steps are open at once ---- */
static void test_two_caches(void **state) {
    static life alone, w[2];
    kvl_context_desc d;
    kvl_context *shared;
    runner *r[2];
    uint32_t i, n[STREAMS] = {0};
    (void)state;
    memset(&alone, 0, sizeof alone);
    alone.preset = "int8";
    alone.chunk = 50;
    life_run(&alone);
    memset(&d, 0, sizeof d);
    d.backend = KVL_BACKEND_CUDA;
    if (now->lend) {
        d.cuda_context = context;
        d.cuda_stream = stream;
    }
    assert_int_equal(kvl_context_create(&d, &shared), KVL_OK);
    for (i = 0; i < 2; i++) {
        r[i] = (runner *)calloc(1, sizeof **r);
        w[i] = alone;
        memset(w[i].out, 0, sizeof w[i].out);
        r[i]->w = &w[i];
        r[i]->cache = life_cache(&w[i], shared);
        if (now->device) {
            NEED(cm_device_open(&r[i]->device, context, stream));
            r[i]->d = &r[i]->device;
        }
        runner_open(r[i], 0, false);
    }
    while (r[1]->pos[0] < LENGTH) {
        for (i = 0; i < 2; i++) {
            n[0] = r[i]->pos[0] < PROMPT ? 50 : 1;
            runner_step(r[i], n);
        }
    }
    for (i = 0; i < 2; i++) {
        lives_agree(&alone, &w[i], 0, "beside another cache");
        if (r[i]->d) cm_device_close(r[i]->d);
        kvl_cache_destroy(r[i]->cache);
        free(r[i]);
    }
    kvl_context_destroy(shared);
}

/* ---- the scheduler: preempted requests are computed again ---- */
enum { REQUESTS = 6, NEW = 40, R_PROMPT = 60 };
typedef float request_out[R_PROMPT + NEW][CM_Q_HEADS][CM_DIM]; /* of the last layer */

static kvl_cache_desc sched_desc(kvl_backend_kind kind, uint64_t bytes) {
    kvl_cache_desc d;
    memset(&d, 0, sizeof d);
    d.geometry = cm_geometry("int8", NULL);
    d.context_desc.backend = kind;
    if (kind == KVL_BACKEND_CUDA) describe(&d);
    d.device_bytes = bytes;
    d.max_sequences = 8;
    d.max_seq_tokens = 128;
    d.max_step_tokens = 64;
    return d;
}

/* Does the budget hold a request and a half? */
static bool sched_fits(uint64_t bytes) {
    kvl_cache_desc d = sched_desc(KVL_BACKEND_CUDA, bytes);
    kvl_cache *cache = NULL;
    bool fits = kvl_cache_create(&d, &cache) == KVL_OK && kvl_can_fit(cache, 1, 120, NULL) == KVL_OK;
    kvl_cache_destroy(cache);
    return fits;
}

static uint64_t sched_run(kvl_backend_kind kind, uint64_t bytes, request_out *out) {
    kvl_cache_desc d = sched_desc(kind, bytes);
    kvl_cache *cache = NULL;
    kvl_sched *sched = NULL;
    const kvl_step *step;
    kvl_stats stats;
    cm_buffers *b = (cm_buffers *)calloc(1, sizeof *b);
    int32_t tokens[R_PROMPT], next[CM_ROWS];
    uint32_t i, l, steps = 0;
    char why[256] = "";
    d.error = why;
    d.error_size = sizeof why;
    if (kvl_cache_create(&d, &cache) != KVL_OK) fail_msg("%s", why);
    KOK(cache, kvl_sched_create(cache, &(kvl_sched_desc){0}, &sched));
    for (i = 0; i < REQUESTS; i++) {
        kvl_request q;
        kvl_req handle;
        memset(&q, 0, sizeof q);
        for (l = 0; l < R_PROMPT; l++) tokens[l] = (int32_t)(1000 * i + l);
        q.tokens = tokens;
        q.n_tokens = R_PROMPT;
        q.max_new_tokens = NEW;
        q.user = out[i];
        KOK(cache, kvl_sched_submit(sched, &q, &handle));
    }
    while (kvl_sched_plan(sched, &step) == KVL_OK) {
        if (steps++ > 2000) fail_msg("not done");
        for (l = 0; l < CM_LAYERS; l++) KOK(cache, cm_attend(cache, step, l, NULL, b));
        for (i = 0; i < step->n_tokens; i++) {
            request_out *to = (request_out *)step->spans[step->row_span[i]].user;
            memcpy((*to)[step->positions[i]], b->out[i], sizeof b->out[0]);
        }
        for (i = 0; i < step->n_logits; i++) next[i] = (int32_t)(5000 + step->positions[step->logit_rows[i]]);
        KOK(cache, kvl_sched_commit(sched, step, next));
    }
    KOK(cache, kvl_get_stats(cache, &stats));
    assert_int_equal(stats.finished, REQUESTS);
    KOK(cache, kvl_validate(cache));
    kvl_sched_destroy(sched);
    kvl_cache_destroy(cache);
    free(b);
    return stats.preemptions;
}

static void test_preemption(void **state) {
    static request_out cpu[REQUESTS], cuda[REQUESTS];
    uint64_t preemptions = 0, bytes;
    uint32_t i, p, h, e;
    (void)state;
    sched_run(KVL_BACKEND_CPU, 32u << 20, cpu);
    for (bytes = 256u << 10; !preemptions && bytes < 8u << 20;
         bytes += 32u << 10) { /* the first that preempts */
        if (sched_fits(bytes)) preemptions = sched_run(KVL_BACKEND_CUDA, bytes, cuda);
    }
    assert_true(preemptions > 0);
    for (i = 0; i < REQUESTS; i++) {
        for (p = 0; p < R_PROMPT + NEW - 1; p++) {
            for (h = 0; h < CM_Q_HEADS; h++) {
                for (e = 0; e < CM_DIM; e++) {
                    double x = (double)cpu[i][p][h][e], y = (double)cuda[i][p][h][e];
                    if (!(fabs(x - y) <= 0.02))
                        fail_msg("request %u position %u: %.9g on the CPU, %.9g", i, p, x, y);
                }
            }
        }
    }
}

/* ---- graphs ---- */
static void *capture(runner *r, const kvl_step *step) {
    void *graph, *exec;
    uint32_t l;
    NEED(cuCtxPushCurrent_v2(context));
    NEED(cuStreamBeginCapture_v2(stream, 0));
    for (l = 0; l < CM_LAYERS; l++) {
        /* each layer has its own tensors, so that a replay computes them all */
        cm_device d = r->device;
        d.at += l * sizeof(cm_buffers);
        KOK(r->cache, cm_call(r->cache, step, l, &d, NULL));
    }
    NEED(cuStreamEndCapture(stream, &graph));
    NEED(cuGraphInstantiateWithFlags(&exec, graph, 0));
    NEED(cuGraphDestroy(graph));
    NEED(cuCtxPopCurrent_v2(NULL));
    return exec;
}

static void test_graph_replay(void **state) {
    static life direct;
    static cm_buffers b;
    runner *r = (runner *)calloc(1, sizeof *r);
    void *exec = NULL;
    uint64_t key = 0;
    uint32_t n[STREAMS] = {0}, replays = 0, captures = 0, l;
    (void)state;
    assert_true(now->lend && now->device);
    memset(&direct, 0, sizeof direct);
    direct.preset = "int8";
    direct.chunk = 50;
    life_run(&direct);
    r->cache = life_cache(&direct, NULL);
    r->w = (life *)calloc(1, sizeof *r->w);
    NEED(cm_device_open(&r->device, context, stream));
    runner_open(r, 0, false);
    r->d = &r->device;
    n[0] = 50;
    runner_step(r, n);
    runner_step(r, n);
    cm_device_close(&r->device);
    NEED(cuCtxPushCurrent_v2(context));
    NEED(cuMemAlloc_v2(&r->device.at, CM_LAYERS * sizeof(cm_buffers)));
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
        for (l = 0; l < CM_LAYERS; l++) {
            cm_device d = r->device;
            d.at += l * sizeof(cm_buffers);
            cm_fill(&b, step, l);
            cm_upload(&d, &b);
        }
        if (!exec || key != step->graph_key) {
            void *before = exec;
            exec = capture(r, step);
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
        for (l = 0; l < CM_LAYERS; l++) {
            NEED(cuMemcpyDtoHAsync_v2(b.out, r->device.at + l * sizeof b + offsetof(cm_buffers, out),
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
    NEED(cuMemFree_v2(r->device.at));
    NEED(cuCtxPopCurrent_v2(NULL));
    kvl_cache_destroy(r->cache);
    free(r->w);
    free(r);
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
    kvl_geometry g = cm_geometry("int8", NULL);
    (void)state;
    g.v_dim = 128;
    refused(g, "v_dim");
    g = cm_geometry("int8", NULL);
    g.k_dim = 112;
    refused(g, "k_dim");
    g = cm_geometry("int8", NULL);
    g.block_tokens = 8;
    refused(g, "block_tokens");
    g = cm_geometry("int8", NULL);
    g.n_q_heads = 64;
    refused(g, "n_q_heads");
    g = cm_geometry(NULL, NULL);
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
