/* Faults of the CUDA driver: each call of it fails in its turn, for once or with the device lost. Every time there is a
   clean error with the driver's own words, nothing is leaked, requests are kept, and after kvl_cache_recover the tokens
   come out as they would have. */
#define KVL_IMPLEMENTATION
#define KVL_CUDA_KERNELS "tests/mock_cuda/image.h"
#include "../common/kvl_test.h"

#include "../common/cuda_model.h"

enum { OUT_OF_MEMORY = 2, LAUNCH_FAILED = 719 };
enum { REQUESTS = 3, PROMPT = 45, NEW = 4, MOST_CALLS = 4000 };

/* Under a sanitizer every seventh call: its time is the tests' limit. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { EVERY = 7 };
#else
enum { EVERY = 1 };
#endif

typedef struct life {
    bool device, lend; /* tensors in device memory; a lent context and stream */
    bool virtual;      /* slabs large enough for virtual memory */
    kt_env env;
    void *context, *stream;
    cm_device buffers, *tensors;
    kvl_cache *cache;
    kvl_sched *sched;
    kvl_req req[REQUESTS];
    int32_t tokens[REQUESTS][NEW];
    uint32_t recoveries;
} life;

/* ---- the app's own objects ---- */
static void app_open(life *w) {
    mock_cuda_own(true);
    KT_CHECK(!cuInit(0), "cuInit");
    if (w->lend) {
        KT_CHECK(!cuCtxCreate_v2(&w->context, 0, 0) && !cuStreamCreate(&w->stream, 1), "no context");
        cuCtxPopCurrent_v2(NULL);
    } else {
        KT_CHECK(!cuDevicePrimaryCtxRetain(&w->context, 0), "no context");
        w->stream = NULL;
    }
    mock_cuda_own(false);
    w->tensors = NULL;
    if (w->device) {
        KT_CHECK(!cm_device_open(&w->buffers, w->context, w->stream), "no buffers");
        w->tensors = &w->buffers;
    }
}
static void app_close(life *w) {
    if (w->tensors) cm_device_close(w->tensors);
    w->tensors = NULL;
    mock_cuda_own(true);
    if (w->lend) {
        if (!cuCtxPushCurrent_v2(w->context)) cuStreamDestroy_v2(w->stream);
        cuCtxDestroy_v2(w->context);
    } else {
        cuDevicePrimaryCtxRelease_v2(0);
    }
    mock_cuda_own(false);
}

static void nothing_left(void) {
    char text[600] = "";
    int n = mock_cuda_problems(text, sizeof text);
    KT_CHECK(n == 0, "%d problems: %s", n, text);
}

/* ---- errors ---- */
static kvl_cache_desc describe(life *w, kvl_backend_kind kind) {
    kvl_cache_desc d;
    memset(&d, 0, sizeof d);
    d.geometry = gm_geometry("int8", NULL);
    d.context_desc = kt_context(&w->env, kind);
    if (w->lend) {
        d.context_desc.cuda_context = w->context;
        d.context_desc.cuda_stream = w->stream;
    }
    d.device_bytes = w->virtual ? 16u << 20 : 2u << 20;
    d.max_device_bytes = w->virtual ? 1u << 30 : 4u << 20;
    d.max_sequences = 4;
    d.max_seq_tokens = 128;
    d.max_step_tokens = 64;
    d.error = kt_error;
    d.error_size = sizeof kt_error;
    return d;
}

/* An error of a call that the driver failed in: a result that says so, the driver's number, and a text. */
static void is_clean(const life *w, kvl_result r) {
    const kvl_context *ctx = w->cache ? kvl_cache_context(w->cache) : NULL;
    const char *text = "";
    KT_CHECK(r == KVL_DEVICE_LOST || r == KVL_OUT_OF_DEVICE_MEMORY || r == KVL_NO_BACKEND, "%s",
             kvl_result_name(r));
    if (!ctx) {
        KT_CHECK(strlen(kt_error) > 5, "no text");
        return;
    }
    KT_CHECK(kvl_native_error(ctx, &text) != 0 && strstr(text, "CUDA_ERROR_") != NULL, "native error: %s",
             text);
}

/* Aborts what is open, and recovers: the first time on what is there, and if the lent context is dead on another. */
static void recover(life *w, const kvl_step *step, kvl_result why) {
    kvl_result r;
    is_clean(w, why);
    if (step) KT_OK(w->cache, kvl_sched_abort(w->sched, step));
    KT_VALID(w->cache);
    w->recoveries++;
    r = kvl_cache_recover(w->cache);
    if (r != KVL_OK) {
        bool lost = r == KVL_DEVICE_LOST;
        is_clean(w, r);
        if (w->lend && lost) { /* the app makes another context */
            app_close(w);
            app_open(w);
            KT_OK(w->cache, kvl_context_lend(kvl_cache_context(w->cache), w->context, w->stream));
        }
        r = kvl_cache_recover(w->cache);
        if (r != KVL_OK && !lost) r = kvl_cache_recover(w->cache);
    }
    KT_OK(w->cache, r);
    if (!w->lend) { /* what the app held of the primary context is gone with it */
        bool device = w->device;
        if (why == KVL_DEVICE_LOST) w->tensors = NULL;
        app_close(w);
        w->device = device;
        app_open(w);
    }
    KT_VALID(w->cache);
}

/* ---- a life ---- */
static kvl_result life_start(life *w, kvl_backend_kind kind) {
    kvl_cache_desc d = describe(w, kind);
    kvl_sched_desc sd;
    kvl_result r = kvl_cache_create(&d, &w->cache);
    int32_t tokens[PROMPT];
    if (r != KVL_OK) {
        KT_CHECK(w->cache == NULL, "a cache in spite of %s", kvl_result_name(r));
        return r;
    }
    memset(&sd, 0, sizeof sd);
    KT_OK(w->cache, kvl_sched_create(w->cache, &sd, &w->sched));
    for (uint32_t i = 0; i < REQUESTS; i++) {
        kvl_request q;
        for (uint32_t t = 0; t < PROMPT; t++) tokens[t] = (int32_t)(t < 20 ? t : 100 * i + t);
        memset(&q, 0, sizeof q);
        q.tokens = tokens;
        q.n_tokens = PROMPT;
        q.max_new_tokens = NEW;
        KT_OK(w->cache, kvl_sched_submit(w->sched, &q, &w->req[i]));
    }
    return KVL_OK;
}

static void life_step(life *w, const kvl_step *step) {
    static gm_buffers b;
    int32_t next[GM_ROWS];
    kvl_result r = KVL_OK;
    for (uint32_t l = 0; l < GM_LAYERS && r == KVL_OK; l++) r = cm_attend(w->cache, step, l, w->tensors, &b);
    if (r == KVL_OK) {
        for (uint32_t i = 0; i < step->n_logits; i++) next[i] = gm_next(&b, step->logit_rows[i]);
        r = kvl_sched_commit(w->sched, step, next);
        if (r == KVL_OK) return;
    }
    recover(w, step, r);
}

static void life_resize(life *w, uint64_t bytes) {
    kvl_result r = kvl_cache_resize(w->cache, bytes, NULL);
    KT_VALID(w->cache);
    if (r == KVL_OK) return;
    is_clean(w, r);
    if (r == KVL_DEVICE_LOST) recover(w, NULL, r);
    KT_OK(w->cache, kvl_cache_resize(w->cache, bytes, NULL));
}

static bool life_finished(const life *w) {
    kvl_stats stats;
    KT_OK(w->cache, kvl_get_stats(w->cache, &stats));
    return stats.finished == REQUESTS;
}

static void life_run(life *w) {
    uint64_t low = w->virtual ? 12u << 20 : 1u << 20, high = w->virtual ? 24u << 20 : 4u << 20;
    for (uint32_t steps = 0;; steps++) {
        const kvl_step *step = NULL;
        kvl_result r;
        KT_CHECK(steps < 100, "not done");
        if (steps == 2) life_resize(w, high);
        if (steps == 3) life_resize(w, low);
        r = kvl_sched_plan(w->sched, &step);
        if (r == KVL_IDLE && steps < 60 && !life_finished(w)) { /* it was recovered with fewer slabs */
            life_resize(w, high);
            continue;
        }
        if (r == KVL_IDLE) break;
        if (r == KVL_OK)
            life_step(w, step);
        else
            recover(w, NULL, r);
    }
    for (uint32_t i = 0; i < REQUESTS; i++) {
        uint32_t n = 0;
        KT_OK(w->cache, kvl_sched_tokens(w->sched, w->req[i], w->tokens[i], NEW, &n));
        KT_CHECK(n == NEW, "request %u: %u tokens", i, n);
    }
}

/* A context that cannot be made current keeps what is in it: no driver does that to one that works. */
static void life_end(life *w) {
    bool closed = !strcmp(mock_cuda_failed(), "cuCtxPushCurrent_v2");
    kvl_sched_destroy(w->sched);
    kvl_cache_destroy(w->cache);
    closed = closed || !strcmp(mock_cuda_failed(), "cuCtxPushCurrent_v2");
    mock_cuda_fail(0, 0, false);
    app_close(w);
    kt_env_check(&w->env);
    if (!closed) nothing_left();
}

static void life_init(life *w, const life *like) {
    *w = *like;
    kt_env_init(&w->env);
    mock_cuda_reset();
    mock_cuda()->simple_kernels = true;
    app_open(w);
}

/* Every call fails in turn. */
static void every_call(const life *like, int result, bool lost) {
    life good, w;
    uint64_t calls, recoveries = 0, refused = 0, nth;
    life_init(&good, like);
    calls = mock_cuda_calls();
    KT_OK(NULL, life_start(&good, KVL_BACKEND_CUDA));
    life_run(&good);
    life_end(&good);
    calls = mock_cuda_calls() - calls;
    KT_CHECK(calls > 100 && calls < MOST_CALLS, "%llu calls", (unsigned long long)calls);
    for (nth = 1; nth <= calls; nth += EVERY) {
        kvl_result r;
        life_init(&w, like);
        mock_cuda_fail(nth, result, lost);
        r = life_start(&w, KVL_BACKEND_CUDA);
        snprintf(kt_where, sizeof kt_where, "call %llu of %llu, %s, gives %d%s", (unsigned long long)nth,
                 (unsigned long long)calls, mock_cuda_failed(), result,
                 lost ? " and the device is lost" : "");
        if (r != KVL_OK) {
            is_clean(&w, r);
            KT_CHECK(mock_cuda_failures() > 0, "%s without a failure", kvl_result_name(r));
            mock_cuda_fail(0, 0, false); /* the device is well again: so can the next one be */
            if (lost) {
                app_close(&w);
                mock_cuda_reset();
                mock_cuda()->simple_kernels = true;
                app_open(&w);
            }
            KT_OK(NULL, life_start(&w, KVL_BACKEND_CUDA));
            refused++;
        }
        life_run(&w);
        snprintf(kt_where, sizeof kt_where, "call %llu of %llu, %s, gives %d%s", (unsigned long long)nth,
                 (unsigned long long)calls, mock_cuda_failed(), result,
                 lost ? " and the device is lost" : "");
        KT_CHECK(memcmp(w.tokens, good.tokens, sizeof good.tokens) == 0, "other tokens");
        life_end(&w);
        recoveries += w.recoveries;
    }
    kt_where[0] = 0;
    printf("%llu calls, %llu refused creates, %llu recoveries\n", (unsigned long long)calls,
           (unsigned long long)refused, (unsigned long long)recoveries);
    assert_true(recoveries * EVERY > 50 && refused * EVERY > 30);
    mock_cuda_reset();
}

static void test_host_tensors(void **state) {
    static const life like;
    (void)state;
    every_call(&like, OUT_OF_MEMORY, false);
    every_call(&like, LAUNCH_FAILED, true);
}
static void test_device_tensors(void **state) {
    static const life like = {.device = true};
    (void)state;
    every_call(&like, OUT_OF_MEMORY, false);
    every_call(&like, LAUNCH_FAILED, true);
}
static void test_virtual_memory(void **state) {
    static const life like = {.virtual = true};
    (void)state;
    every_call(&like, OUT_OF_MEMORY, false);
    every_call(&like, LAUNCH_FAILED, true);
}
static void test_lent_context(void **state) {
    static const life like = {.device = true, .lend = true};
    (void)state;
    every_call(&like, OUT_OF_MEMORY, false);
    every_call(&like, LAUNCH_FAILED, true);
}

/* ---- recovery that fails itself ---- */
static void test_recover_fails(void **state) {
    uint64_t nth;
    (void)state;
    for (nth = 1;; nth++) {
        static life like;
        life w;
        const kvl_step *step;
        kvl_result r;
        bool failed;
        life_init(&w, &like);
        KT_OK(NULL, life_start(&w, KVL_BACKEND_CUDA));
        KT_OK(w.cache, kvl_sched_plan(w.sched, &step));
        mock_cuda_fail(1, LAUNCH_FAILED, true);
        r = cm_attend(w.cache, step, 0, NULL, &(gm_buffers){0});
        KT_CHECK(r == KVL_DEVICE_LOST, "%s", kvl_result_name(r));
        KT_RESULT(KVL_BUSY, w.cache, kvl_cache_recover(w.cache)); /* a step is open */
        KT_OK(w.cache, kvl_sched_abort(w.sched, step));
        KT_RESULT(KVL_DEVICE_LOST, w.cache, kvl_sched_plan(w.sched, &step));
        KT_RESULT(KVL_DEVICE_LOST, w.cache, kvl_cache_resize(w.cache, 1u << 20, NULL));
        mock_cuda_fail(nth, OUT_OF_MEMORY, false); /* the device is back, but for one call */
        snprintf(kt_where, sizeof kt_where, "recovery, call %llu", (unsigned long long)nth);
        r = kvl_cache_recover(w.cache);
        failed = r != KVL_OK;
        if (failed) {
            is_clean(&w, r);
            KT_VALID(w.cache);
            KT_OK(w.cache, kvl_cache_recover(w.cache));
        }
        failed = failed || mock_cuda_failures() > 0;
        app_close(&w);
        app_open(&w);
        life_run(&w);
        life_end(&w);
        if (!failed) break;
        KT_CHECK(nth < 500, "no end");
    }
    assert_true(nth > 20);
    kt_where[0] = 0;
    mock_cuda_reset();
}

/* The app knows that its context is dead: it destroys it and lends another one before anything is recovered. */
static void test_lend_first(void **state) {
    (void)state;
    for (int i = 0; i < 2; i++) {
        life w, like = {.device = true, .lend = true, .virtual = i == 1};
        const kvl_step *step;
        kvl_context *ctx;
        void *other;
        life_init(&w, &like);
        mock_cuda()->devices = 2;
        KT_OK(NULL, life_start(&w, KVL_BACKEND_CUDA));
        ctx = kvl_cache_context(w.cache);
        KT_CHECK(kvl_context_lend(ctx, w.context, w.stream) == KVL_BUSY, "nothing is lost");
        KT_OK(w.cache, kvl_sched_plan(w.sched, &step));
        mock_cuda_fail(2, LAUNCH_FAILED, true);
        KT_CHECK(cm_attend(w.cache, step, 0, w.tensors, &(gm_buffers){0}) == KVL_DEVICE_LOST, "not lost");
        KT_OK(w.cache, kvl_sched_abort(w.sched, step));
        app_close(&w);
        app_open(&w);
        KT_CHECK(!cuCtxCreate_v2(&other, 0, 1) && !cuCtxPopCurrent_v2(NULL), "no second device");
        KT_CHECK(kvl_context_lend(ctx, other, NULL) == KVL_INVALID_ARG, "a context of another device");
        KT_CHECK(!cuCtxDestroy_v2(other), "cuCtxDestroy");
        KT_OK(w.cache, kvl_context_lend(ctx, w.context, w.stream));
        KT_OK(w.cache, kvl_cache_recover(w.cache));
        life_run(&w);
        life_end(&w);
    }
    mock_cuda_reset();
}

/* A kernel that the image has not, as PTX for later GPUs: refused by name, and AUTO takes the next. */
static void test_no_kernel(void **state) {
    (void)state;
    for (int automatic = 0; automatic < 2; automatic++) {
        for (uint64_t nth = 1;; nth++) {
            life w, like = {.device = false};
            kvl_cache_desc d;
            kvl_result r;
            bool there;
            life_init(&w, &like);
            mock_cuda_fail(nth, 500, false);
            d = describe(&w, automatic ? KVL_BACKEND_AUTO : KVL_BACKEND_CUDA);
            r = kvl_cache_create(&d, &w.cache);
            there = !strcmp(mock_cuda_failed(), "cuModuleGetFunction");
            if (there && automatic)
                KT_CHECK(r == KVL_OK && strstr(kvl_context_report(kvl_cache_context(w.cache)), "kvl_"), "%s",
                         kvl_result_name(r));
            else if (there)
                KT_CHECK(r == KVL_UNSUPPORTED && strstr(kt_error, "kvl_"), "%s: %s", kvl_result_name(r),
                         kt_error);
            life_end(&w);
            if (there) break;
            KT_CHECK(nth < 100, "no kernel is looked for");
        }
    }
    mock_cuda_reset();
}

static void test_stream_alone(void **state) {
    kvl_context_desc d;
    kvl_context *ctx;
    char why[200] = "";
    (void)state;
    memset(&d, 0, sizeof d);
    d.cuda_stream = &d;
    d.error = why;
    d.error_size = sizeof why;
    KT_CHECK(kvl_context_create(&d, &ctx) == KVL_INVALID_ARG && strstr(why, "cuda_stream"), "%s", why);
}

/* ---- no CUDA here ---- */
typedef struct absence {
    const char *what, *says;
    int init, load, devices, driver, capability;
} absence;

static void test_falls_back(void **state) {
    static const absence table[] = {
        {"a stub library", "STUB", 34, 0, 1, 13000, 80},
        {"no device", "NO_DEVICE", 0, 0, 0, 13000, 80},
        {"an old driver", "12.0", 0, 0, 1, 12000, 80},
        {"no code for the device", "NO_BINARY_FOR_GPU", 0, 209, 1, 13000, 80},
        {"PTX that is too new", "UNSUPPORTED_PTX_VERSION", 0, 222, 1, 13000, 80},
        {"an old device", "7.0", 0, 0, 1, 13000, 70},
    };
    (void)state;
    for (uint32_t i = 0; i < KT_COUNT(table); i++) {
        for (int cuda = 0; cuda < 2; cuda++) {
            const absence *a = &table[i];
            kvl_context_desc d;
            kvl_context *ctx = NULL;
            kvl_result r;
            char why[300] = "";
            kt_env env;
            mock_cuda_reset();
            mock_cuda()->simple_kernels = true;
            mock_cuda()->init_result = a->init;
            mock_cuda()->load_result = a->load;
            mock_cuda()->devices = a->devices;
            mock_cuda()->driver_version = a->driver;
            mock_cuda()->capability = a->capability;
            kt_env_init(&env);
            d = kt_context(&env, cuda ? KVL_BACKEND_CUDA : KVL_BACKEND_AUTO);
            d.error = why;
            d.error_size = sizeof why;
            snprintf(kt_where, sizeof kt_where, "%s", a->what);
            r = kvl_context_create(&d, &ctx);
            if (cuda) {
                KT_CHECK(r == KVL_NO_BACKEND && strstr(why, a->says), "%s: %s", kvl_result_name(r), why);
                KT_CHECK(!ctx, "a context");
            } else {
                KT_OK(NULL, r);
                KT_CHECK(!strncmp(kvl_context_backend(ctx), "cpu", 3), "%s", kvl_context_backend(ctx));
                KT_CHECK(strstr(kvl_context_report(ctx), a->says), "%s", kvl_context_report(ctx));
                kvl_context_destroy(ctx);
            }
            kt_env_check(&env);
            nothing_left();
        }
    }
    kt_where[0] = 0;
    mock_cuda_reset();
}

/* AUTO: any call that fails while the device is looked for leads to the CPU, with the reason. */
static void test_auto_takes_the_next(void **state) {
    uint64_t nth;
    (void)state;
    for (nth = 1;; nth++) {
        kvl_context_desc d;
        kvl_context *ctx = NULL;
        kt_env env;
        bool failed;
        mock_cuda_reset();
        mock_cuda()->simple_kernels = true;
        mock_cuda_fail(nth, 999, false);
        kt_env_init(&env);
        d = kt_context(&env, KVL_BACKEND_AUTO);
        KT_OK(NULL, kvl_context_create(&d, &ctx));
        failed = mock_cuda_failures() > 0;
        snprintf(kt_where, sizeof kt_where, "call %llu, %s", (unsigned long long)nth, mock_cuda_failed());
        if (failed && strcmp(mock_cuda_failed(), "cuCtxPopCurrent_v2") != 0) {
            KT_CHECK(!strncmp(kvl_context_backend(ctx), "cpu", 3), "%s", kvl_context_backend(ctx));
            KT_CHECK(strstr(kvl_context_report(ctx), "CUDA_ERROR_UNKNOWN"), "%s", kvl_context_report(ctx));
        } else {
            KT_CHECK(!strncmp(kvl_context_backend(ctx), "cuda", 4), "%s", kvl_context_backend(ctx));
        }
        mock_cuda_fail(0, 0, false);
        kvl_context_destroy(ctx);
        kt_env_check(&env);
        nothing_left();
        if (!failed) break;
        KT_CHECK(nth < 100, "no end");
    }
    assert_true(nth > 8);
    kt_where[0] = 0;
    mock_cuda_reset();
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_falls_back),     cmocka_unit_test(test_auto_takes_the_next),
        cmocka_unit_test(test_host_tensors),   cmocka_unit_test(test_device_tensors),
        cmocka_unit_test(test_virtual_memory), cmocka_unit_test(test_lent_context),
        cmocka_unit_test(test_recover_fails),  cmocka_unit_test(test_lend_first),
        cmocka_unit_test(test_stream_alone),   cmocka_unit_test(test_no_kernel),
    };
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests_name("cuda faults", tests, NULL, NULL);
}
