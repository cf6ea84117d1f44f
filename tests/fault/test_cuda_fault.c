/* Faults of the CUDA driver: each call of it fails in its turn, for once or with the device lost. Every time there is a
   clean error with the driver's own words, nothing is leaked, requests are kept, and after kvl_cache_recover the tokens
   come out as they would have. */
#define KVL_IMPLEMENTATION
#define KVL_CUDA_KERNELS "tests/mock_cuda/image.h"
#include "gpu_life.h"

#include "../common/cuda_model.h"

enum { OUT_OF_MEMORY = 2, LAUNCH_FAILED = 719 };

typedef struct app {
    void *context, *stream;
    cm_device buffers, *tensors;
} app;

/* ---- the app's own objects ---- */
static void app_open(life *w) {
    app *a = (app *)calloc(1, sizeof *a);
    w->app = a;
    mock_cuda_own(true);
    KT_CHECK(!cuInit(0), "cuInit");
    if (w->lend) {
        KT_CHECK(!cuCtxCreate_v2(&a->context, 0, 0) && !cuStreamCreate(&a->stream, 1), "no context");
        cuCtxPopCurrent_v2(NULL);
    } else {
        KT_CHECK(!cuDevicePrimaryCtxRetain(&a->context, 0), "no context");
        a->stream = NULL;
    }
    mock_cuda_own(false);
    if (w->device) {
        KT_CHECK(!cm_device_open(&a->buffers, a->context, a->stream), "no buffers");
        a->tensors = &a->buffers;
    }
}
static void app_close(life *w) {
    app *a = (app *)w->app;
    if (a->tensors) cm_device_close(a->tensors);
    mock_cuda_own(true);
    if (w->lend) {
        if (!cuCtxPushCurrent_v2(a->context)) cuStreamDestroy_v2(a->stream);
        cuCtxDestroy_v2(a->context);
    } else {
        cuDevicePrimaryCtxRelease_v2(0);
    }
    mock_cuda_own(false);
    free(a);
    w->app = NULL;
}

static void describe(life *w, kvl_context_desc *d) {
    if (!w->lend) return;
    d->cuda_context = ((app *)w->app)->context;
    d->cuda_stream = ((app *)w->app)->stream;
}
static kvl_result attend(life *w, const kvl_step *step, uint32_t layer, gm_buffers *b) {
    return cm_attend(w->cache, step, layer, ((app *)w->app)->tensors, b);
}
static kvl_result lend_this(life *w) {
    app *a = (app *)w->app;
    return kvl_context_lend(kvl_cache_context(w->cache), a->context, a->stream);
}
static kvl_result lend(life *w) {
    app_close(w);
    app_open(w);
    return lend_this(w);
}
/* What the app held of the primary context is gone with it. */
static void after_recovery(life *w, kvl_result why) {
    if (w->lend) return;
    if (why == KVL_DEVICE_LOST) ((app *)w->app)->tensors = NULL;
    app_close(w);
    app_open(w);
}

/* ---- the mock driver ---- */
static void reset(void) {
    mock_cuda_reset();
    mock_cuda()->simple_kernels = true;
}
static void fail_call(uint64_t nth, int how) {
    mock_cuda_fail(nth, how == DEVICE_LOST ? LAUNCH_FAILED : nth ? OUT_OF_MEMORY : 0, how == DEVICE_LOST);
}
static uint64_t calls(int how) {
    (void)how;
    return mock_cuda_calls();
}
/* A context that cannot be made current keeps what is in it: no driver does that to one that works. */
static bool forgives(void) { return !strcmp(mock_cuda_failed(), "cuCtxPushCurrent_v2"); }
static void set_faults(void) {
    faults.kind = KVL_BACKEND_CUDA;
    faults.words = "CUDA_ERROR_";
    faults.reset = reset;
    faults.fail_nth = fail_call;
    faults.calls = calls;
    faults.failures = mock_cuda_failures;
    faults.failed = mock_cuda_failed;
    faults.problems = mock_cuda_problems;
    faults.open = app_open;
    faults.close = app_close;
    faults.describe = describe;
    faults.attend = attend;
    faults.lend = lend;
    faults.after_recovery = after_recovery;
    faults.forgives = forgives;
}

static void test_host_tensors(void **state) {
    static const life like;
    (void)state;
    every_call(&like, CALL_FAILS);
    every_call(&like, DEVICE_LOST);
}
static void test_device_tensors(void **state) {
    static const life like = {.device = true};
    (void)state;
    every_call(&like, CALL_FAILS);
    every_call(&like, DEVICE_LOST);
}
static void test_virtual_memory(void **state) {
    static const life like = {.large = true};
    (void)state;
    every_call(&like, CALL_FAILS);
    every_call(&like, DEVICE_LOST);
}
static void test_lent_context(void **state) {
    static const life like = {.device = true, .lend = true};
    (void)state;
    every_call(&like, CALL_FAILS);
    every_call(&like, DEVICE_LOST);
}

/* The app knows that its context is dead: it destroys it and lends another one before anything is recovered. */
static void test_lend_first(void **state) {
    (void)state;
    for (int i = 0; i < 2; i++) {
        life w, like = {.device = true, .lend = true, .large = i == 1};
        const kvl_step *step;
        kvl_context *ctx;
        void *other;
        life_init(&w, &like);
        mock_cuda()->devices = 2;
        KT_OK(NULL, life_start(&w));
        ctx = kvl_cache_context(w.cache);
        KT_CHECK(lend_this(&w) == KVL_BUSY, "nothing is lost");
        KT_OK(w.cache, kvl_sched_plan(w.sched, &step));
        mock_cuda_fail(2, LAUNCH_FAILED, true);
        KT_CHECK(attend(&w, step, 0, &(gm_buffers){0}) == KVL_DEVICE_LOST, "not lost");
        KT_OK(w.cache, kvl_sched_abort(w.sched, step));
        app_close(&w);
        app_open(&w);
        KT_CHECK(!cuCtxCreate_v2(&other, 0, 1) && !cuCtxPopCurrent_v2(NULL), "no second device");
        KT_CHECK(kvl_context_lend(ctx, other, NULL) == KVL_INVALID_ARG, "a context of another device");
        KT_CHECK(!cuCtxDestroy_v2(other), "cuCtxDestroy");
        KT_OK(w.cache, lend_this(&w));
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
            d = life_desc(&w, automatic ? KVL_BACKEND_AUTO : KVL_BACKEND_CUDA);
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
    set_faults();
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
