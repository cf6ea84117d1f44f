/* A scheduler with a few requests on a GPU backend, told again and again with each call of its driver failing in turn:
   every time there is a clean error with the driver's own words, nothing is leaked, requests are kept, and after
   kvl_cache_recover the tokens come out as they would have. A test program sets `faults`. */
#ifndef KVL_TESTS_GPU_LIFE_H
#define KVL_TESTS_GPU_LIFE_H
#include "../common/kvl_test.h"

#include "../common/gpu_model.h"

enum { REQUESTS = 3, PROMPT = 45, NEW = 4, MOST_CALLS = 4000 };
enum { CALL_FAILS, DEVICE_LOST }; /* what a call does: fails for once, or the device is lost */

/* Under a sanitizer every seventh call: its time is the tests' limit. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { LIFE_EVERY = 7 };
#else
enum { LIFE_EVERY = 1 };
#endif

typedef struct life {
    bool device, lend; /* tensors in device memory; a lent device */
    bool large;        /* slabs large enough for what a backend does with large ones */
    kt_env env;
    void *app; /* what the app has of the driver: fault_backend */
    kvl_cache *cache;
    kvl_sched *sched;
    kvl_req req[REQUESTS];
    int32_t tokens[REQUESTS][NEW];
    uint32_t recoveries;
} life;

typedef struct fault_backend {
    kvl_backend_kind kind;
    const char *words;                       /* each of the driver's errors has them */
    void (*reset)(void);                     /* the driver, and all that it counts */
    void (*fail_nth)(uint64_t nth, int how); /* CALL_FAILS, DEVICE_LOST; nth 0: no call */
    uint64_t (*calls)(int how);              /* that can */
    uint64_t (*failures)(void);
    const char *(*failed)(void); /* the function */
    int (*problems)(char *text, size_t size);
    void (*open)(life *w); /* the app's own objects: lent device, tensors */
    void (*close)(life *w);
    void (*describe)(life *w, kvl_context_desc *d);
    kvl_result (*attend)(life *w, const kvl_step *step, uint32_t layer, gm_buffers *b);
    kvl_result (*lend)(life *w);                     /* another device, and closes the one before */
    void (*after_recovery)(life *w, kvl_result why); /* null: nothing */
    bool (*forgives)(void); /* null: never; else whether what is left now is not kvlite's fault */
    bool host_memory;       /* the driver can be out of the host's memory */
    uint64_t every;         /* only every nth call */
} fault_backend;
static fault_backend faults;

static void nothing_left(void) {
    char text[1200] = "";
    int n = faults.problems(text, sizeof text);
    KT_CHECK(n == 0, "%d problems: %s", n, text);
}

/* ---- errors ---- */
static kvl_cache_desc life_desc(life *w, kvl_backend_kind kind) {
    kvl_cache_desc d;
    memset(&d, 0, sizeof d);
    d.geometry = gm_geometry("int8", NULL);
    d.context_desc = kt_context(&w->env, kind);
    faults.describe(w, &d.context_desc);
    d.device_bytes = w->large ? 16u << 20 : 2u << 20;
    d.max_device_bytes = w->large ? 1u << 30 : 4u << 20;
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
    KT_CHECK(r == KVL_DEVICE_LOST || r == KVL_OUT_OF_DEVICE_MEMORY || r == KVL_NO_BACKEND ||
                 (faults.host_memory && r == KVL_OUT_OF_HOST_MEMORY),
             "%s", kvl_result_name(r));
    if (!ctx) {
        KT_CHECK(strlen(kt_error) > 5, "no text");
        return;
    }
    KT_CHECK(kvl_native_error(ctx, &text) != 0 && strstr(text, faults.words) != NULL, "native error: %s",
             text);
}

/* Aborts what is open, and recovers: the first time on what is there, and if the lent device is dead on another. */
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
        if (w->lend && lost) KT_OK(w->cache, faults.lend(w)); /* the app makes another one */
        r = kvl_cache_recover(w->cache);
        if (r != KVL_OK && !lost) r = kvl_cache_recover(w->cache);
    }
    KT_OK(w->cache, r);
    if (faults.after_recovery) faults.after_recovery(w, why);
    KT_VALID(w->cache);
}

/* ---- a life ---- */
static void life_add_requests(life *w) {
    kvl_sched_desc sd;
    int32_t tokens[PROMPT];
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
}

static kvl_result life_start(life *w) {
    kvl_cache_desc d = life_desc(w, faults.kind);
    kvl_result r = kvl_cache_create(&d, &w->cache);
    if (r == KVL_OK)
        life_add_requests(w);
    else
        KT_CHECK(w->cache == NULL, "a cache in spite of %s", kvl_result_name(r));
    return r;
}

static void life_step(life *w, const kvl_step *step) {
    static gm_buffers b;
    int32_t next[GM_ROWS];
    kvl_result r = KVL_OK;
    for (uint32_t l = 0; l < GM_LAYERS && r == KVL_OK; l++) r = faults.attend(w, step, l, &b);
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
    uint64_t low = w->large ? 12u << 20 : 1u << 20, high = w->large ? 24u << 20 : 4u << 20;
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

static void life_end(life *w) {
    bool forgiven = faults.forgives && faults.forgives();
    kvl_sched_destroy(w->sched);
    kvl_cache_destroy(w->cache);
    forgiven = forgiven || (faults.forgives && faults.forgives());
    faults.fail_nth(0, CALL_FAILS);
    faults.close(w);
    kt_env_check(&w->env);
    if (!forgiven) nothing_left();
}

static void life_init(life *w, const life *like) {
    *w = *like;
    kt_env_init(&w->env);
    faults.reset();
    faults.open(w);
}

static void say_where(uint64_t nth, uint64_t calls, int how) {
    snprintf(kt_where, sizeof kt_where, "call %llu of %llu, %s%s", (unsigned long long)nth,
             (unsigned long long)calls, faults.failed(),
             how == DEVICE_LOST ? ", and the device is lost" : "");
}

/* Every call fails in turn. */
static void every_call(const life *like, int how) {
    life good, w;
    uint64_t calls, recoveries = 0, refused = 0, nth, every = LIFE_EVERY * (faults.every ? faults.every : 1);
    life_init(&good, like);
    calls = faults.calls(how);
    KT_OK(NULL, life_start(&good));
    life_run(&good);
    life_end(&good);
    calls = faults.calls(how) - calls;
    KT_CHECK(calls > 10 && calls < MOST_CALLS, "%llu calls", (unsigned long long)calls);
    for (nth = 1; nth <= calls; nth += every) {
        kvl_result r;
        life_init(&w, like);
        faults.fail_nth(nth, how);
        r = life_start(&w);
        say_where(nth, calls, how);
        if (r != KVL_OK) {
            is_clean(&w, r);
            KT_CHECK(faults.failures() > 0, "%s without a failure", kvl_result_name(r));
            faults.fail_nth(0, CALL_FAILS); /* the device is well again: so can the next one be */
            if (how == DEVICE_LOST) {
                faults.close(&w);
                nothing_left();
                faults.reset();
                faults.open(&w);
            }
            KT_OK(NULL, life_start(&w));
            refused++;
        }
        life_run(&w);
        say_where(nth, calls, how);
        KT_CHECK(memcmp(w.tokens, good.tokens, sizeof good.tokens) == 0, "other tokens");
        life_end(&w);
        recoveries += w.recoveries;
    }
    kt_where[0] = 0;
    printf("%llu calls, %llu refused creates, %llu recoveries\n", (unsigned long long)calls,
           (unsigned long long)refused, (unsigned long long)recoveries);
    assert_true(recoveries * every > 10 && (how == DEVICE_LOST || refused * every > 20));
    faults.reset();
}

/* ---- recovery that fails itself ---- */
static void test_recover_fails(void **state) {
    uint64_t nth, every = faults.every ? faults.every : 1;
    (void)state;
    for (nth = 1;; nth += every) {
        static life like;
        life w;
        const kvl_step *step;
        kvl_result r;
        bool failed;
        life_init(&w, &like);
        KT_OK(NULL, life_start(&w));
        KT_OK(w.cache, kvl_sched_plan(w.sched, &step));
        faults.fail_nth(1, DEVICE_LOST);
        r = faults.attend(&w, step, 0, &(gm_buffers){0});
        KT_CHECK(r == KVL_DEVICE_LOST, "%s", kvl_result_name(r));
        KT_RESULT(KVL_BUSY, w.cache, kvl_cache_recover(w.cache)); /* a step is open */
        KT_OK(w.cache, kvl_sched_abort(w.sched, step));
        KT_RESULT(KVL_DEVICE_LOST, w.cache, kvl_sched_plan(w.sched, &step));
        KT_RESULT(KVL_DEVICE_LOST, w.cache, kvl_cache_resize(w.cache, 1u << 20, NULL));
        faults.fail_nth(nth, CALL_FAILS); /* the device is back, but for one call */
        snprintf(kt_where, sizeof kt_where, "recovery, call %llu", (unsigned long long)nth);
        r = kvl_cache_recover(w.cache);
        failed = r != KVL_OK;
        if (failed) {
            is_clean(&w, r);
            KT_VALID(w.cache);
            KT_OK(w.cache, kvl_cache_recover(w.cache));
        }
        failed = failed || faults.failures() > 0;
        faults.close(&w);
        faults.open(&w);
        life_run(&w);
        life_end(&w);
        if (!failed) break;
        KT_CHECK(nth < 500, "no end");
    }
    assert_true(nth > 20);
    kt_where[0] = 0;
    faults.reset();
}

#endif
