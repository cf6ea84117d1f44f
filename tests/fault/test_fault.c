/* Faults: every Nth allocation fails. Each call then gives a clean error, nothing leaks, and what was there
   goes on. */
#define KVL_IMPLEMENTATION
#include "../common/kvl_world.h"

#define LAYERS 2
enum { MOST = 500 }; /* no call asks for memory that often */

static bool out_of_memory(kvl_result r) {
    return r == KVL_OUT_OF_HOST_MEMORY || r == KVL_OUT_OF_DEVICE_MEMORY;
}

static kvl_cache_desc described(kt_env *env, kvl_backend_kind backend, const char *preset) {
    kvl_cache_desc desc = kt_desc(env, LAYERS, 16, preset);
    desc.context_desc.backend = backend;
    return desc;
}

/* ---------------------------------------------------------------- create */

static void test_context_create(void **state) {
    (void)state;
    for (int and_after = 0; and_after < 2; and_after++) {
        for (uint64_t nth = 1;; nth++) {
            kt_env env;
            kvl_context_desc desc;
            kvl_context *context = (kvl_context *)&env;
            char error[128] = "";
            kvl_result r;
            kt_env_init(&env);
            desc = kt_context(&env, KVL_BACKEND_CPU);
            desc.n_threads = 3;
            desc.error = error;
            desc.error_size = sizeof error;
            kt_env_fail(&env, nth, and_after != 0);
            r = kvl_context_create(&desc, &context);
            if (!env.failures) {
                KT_OK(NULL, r);
                assert_true(nth >= 3); /* a context and its pool */
                kvl_context_destroy(context);
                kt_env_check(&env);
                break;
            }
            assert_int_equal(r, KVL_OUT_OF_HOST_MEMORY);
            assert_null(context);
            assert_true(strlen(error) > 5);
            kt_env_check(&env);
            assert_true(nth < MOST);
        }
    }
}

static void test_cache_create(void **state) {
    static const kvl_backend_kind backends[] = {KVL_BACKEND_NULL, KVL_BACKEND_CPU};
    (void)state;
    for (int variant = 0; variant < 8; variant++) {
        uint64_t nth = 1;
        for (;; nth++) {
            kt_env env;
            kvl_cache_desc desc;
            kvl_context *context = NULL;
            kvl_cache *cache = (kvl_cache *)&env;
            kvl_result r;
            kt_env_init(&env);
            desc = described(&env, backends[variant & 1], variant & 2 ? "f16" : NULL);
            desc.device_bytes = 256u << 10;
            if (variant & 4) {
                KT_OK(NULL, kvl_context_create(&desc.context_desc, &context));
                desc.context = context;
            }
            kt_error[0] = 0;
            kt_env_fail(&env, nth, false);
            r = kvl_cache_create(&desc, &cache);
            if (!env.failures) {
                KT_OK(NULL, r);
                kvl_cache_destroy(cache);
                kvl_context_destroy(context);
                kt_env_check(&env);
                break;
            }
            KT_CHECK(out_of_memory(r), "variant %d, allocation %llu: %s", variant, (unsigned long long)nth,
                     kvl_result_name(r));
            assert_null(cache);
            assert_true(strlen(kt_error) > 5);
            if (context) { /* a lent context is as it was */
                kt_env_fail(&env, 0, false);
                KT_OK(NULL, kvl_cache_create(&desc, &cache));
                KT_VALID(cache);
                kvl_cache_destroy(cache);
                kvl_context_destroy(context);
            }
            kt_env_check(&env);
            assert_true(nth < MOST);
        }
        KT_CHECK(nth > (variant & 4 ? 3 : 4), "variant %d asks for memory only %llu times", variant,
                 (unsigned long long)nth - 1);
    }
}

static void test_cache_defaults(void **state) {
    (void)state;
    for (uint64_t nth = 1;; nth++) {
        kt_env env;
        kvl_cache_desc desc, out;
        kvl_result r;
        kt_env_init(&env);
        desc = described(&env, KVL_BACKEND_CPU, NULL);
        kt_env_fail(&env, nth, false);
        r = kvl_cache_defaults(&desc, &out);
        kt_env_check(&env);
        if (!env.failures) {
            KT_OK(NULL, r);
            break;
        }
        assert_int_equal(r, KVL_OUT_OF_HOST_MEMORY);
        assert_true(nth < MOST);
    }
}

static void test_sched_create(void **state) {
    (void)state;
    for (uint64_t nth = 1;; nth++) {
        kt_env env;
        kvl_cache_desc desc;
        kvl_sched_desc sdesc;
        kvl_cache *cache = NULL;
        kvl_sched *sched = (kvl_sched *)&env;
        kvl_stats before, after;
        kvl_result r;
        bool failed;
        kt_env_init(&env);
        desc = described(&env, KVL_BACKEND_NULL, NULL);
        memset(&sdesc, 0, sizeof sdesc);
        KT_OK(NULL, kvl_cache_create(&desc, &cache));
        before = kt_stats(cache);
        kt_env_fail(&env, nth, false);
        r = kvl_sched_create(cache, &sdesc, &sched);
        failed = env.failures > 0;
        if (failed) {
            assert_int_equal(r, KVL_OUT_OF_HOST_MEMORY);
            assert_null(sched);
            after = kt_stats(cache);
            assert_memory_equal(&before, &after, sizeof before);
            KT_OK(cache, kvl_sched_create(cache, &sdesc, &sched)); /* it can have one after all */
        }
        KT_VALID(cache);
        kvl_sched_destroy(sched);
        kvl_cache_destroy(cache);
        kt_env_check(&env);
        if (!failed) break;
        assert_true(nth < MOST);
    }
}

/* ---------------------------------------------------------------- what must not ask for memory at all */

/* A whole life of a cache with an allocator that is dry from the first open on: nothing needs it. */
static void test_running_allocates_nothing(void **state) {
    static const kvl_backend_kind backends[] = {KVL_BACKEND_NULL, KVL_BACKEND_CPU};
    static float data[128 * 32];
    (void)state;
    for (int b = 0; b < 2; b++) {
        kt_env env;
        kvl_cache_desc desc;
        kvl_cache *cache = NULL;
        kvl_seq_desc sdesc;
        kvl_tensor t;
        kvl_fit fit;
        kvl_seq seq, fork;
        int32_t tokens[400];
        uint32_t length;
        uint64_t calls;
        for (int i = 0; i < 400; i++) tokens[i] = i;
        memset(&sdesc, 0, sizeof sdesc);
        memset(&t, 0, sizeof t);
        t.data = data;
        kt_env_init(&env);
        desc = described(&env, backends[b], NULL);
        desc.device_bytes = kt_budget(&desc, 40);
        KT_OK(NULL, kvl_cache_create(&desc, &cache));
        calls = env.calls;
        kt_env_fail(&env, 1, true);
        for (int round = 0; round < 12; round++) {
            sdesc.tokens = tokens + 10 * (round % 4);
            sdesc.n_tokens = 300;
            KT_OK(cache, kvl_seq_open(cache, &sdesc, &seq, NULL));
            KT_OK(cache, kvl_seq_length(cache, seq, &length));
            while (length < 200) {
                kvl_span span;
                const kvl_step *step;
                memset(&span, 0, sizeof span);
                span.seq = seq;
                span.tokens = sdesc.tokens + length;
                span.n_tokens = 200 - length < 37 ? 200 - length : 37;
                span.n_logits = 1;
                KT_OK(cache, kvl_step_begin(cache, &span, 1, &step));
                for (uint32_t l = 0; l < LAYERS; l++) {
                    kvl_tensor out = t;
                    static float result[128 * 32];
                    out.data = result;
                    KT_OK(cache, kvl_attend(cache, step, l, &t, &t, &t, &out));
                }
                KT_OK(cache, kvl_step_end(cache, step));
                length += span.n_tokens;
            }
            KT_OK(cache, kvl_seq_fork(cache, seq, &fork, NULL));
            KT_OK(cache, kvl_seq_trim(cache, fork, 100, NULL));
            KT_OK(cache, kvl_seq_extend(cache, fork, 20));
            KT_OK(cache, kvl_seq_pin(cache, fork, true));
            KT_OK(cache, kvl_seq_pin(cache, fork, false));
            kvl_can_fit(cache, 2, 100, &fit);
            KT_VALID(cache);
            KT_OK(cache, kvl_seq_close(cache, fork));
            KT_OK(cache, kvl_seq_close(cache, seq));
        }
        assert_int_equal(env.failures, 0);
        assert_int_equal(env.calls, calls);
        KT_OK(cache, kvl_cache_resize(cache, 0, NULL)); /* giving back needs none either */
        assert_int_equal(env.failures, 0);
        kvl_cache_destroy(cache);
        kt_env_check(&env);
    }
}

static void test_planning_allocates_nothing(void **state) {
    kt_world *w = (kt_world *)calloc(1, sizeof *w);
    kvl_cache_desc desc;
    (void)state;
    kt_world_init(w);
    desc = kt_desc(&w->env, LAYERS, 16, "f16");
    desc.device_bytes = kt_budget(&desc, 20);
    kt_world_open(w, desc, NULL);
    for (int i = 0; i < 8; i++) kt_world_submit(w, 1000 * i, 40 + 10 * (uint32_t)i, 60, NULL);
    kt_env_fail(&w->env, 1, true);
    assert_int_equal(kt_world_run(w, 3000), KVL_IDLE); /* with preemptions */
    assert_true(kt_stats(w->cache).preemptions > 0);
    assert_int_equal(w->env.failures, 0);
    kt_env_fail(&w->env, 0, false);
    for (uint32_t i = 0; i < 8; i++) kt_world_answer_is(w, w->answers[i], KVL_FINISH_LENGTH, 60);
    kt_world_close(w);
    free(w);
}

/* ---------------------------------------------------------------- submit, fork */

static void test_submit_and_fork(void **state) {
    kt_world *w = (kt_world *)calloc(1, sizeof *w);
    uint32_t failed = 0, done = 0;
    (void)state;
    kt_world_init(w);
    kt_world_open(w, kt_desc(&w->env, LAYERS, 16, NULL), NULL);
    for (uint64_t nth = 1; nth <= 3; nth++) {
        for (int round = 0; round < 6; round++) {
            kt_answer *a = kt_answer_new(w);
            kvl_stats before = kt_stats(w->cache), after;
            kvl_result r;
            uint64_t live = w->env.live;
            kt_push_range(&a->stream, 1000 * round, 60);
            kt_env_fail(&w->env, nth, false);
            r = kt_world_try(w, a, 8, NULL);
            kt_env_fail(&w->env, 0, false);
            if (r != KVL_OK) {
                assert_int_equal(r, KVL_OUT_OF_HOST_MEMORY);
                assert_int_equal(a->req.id, 0);
                after = kt_stats(w->cache);
                assert_memory_equal(&before, &after, sizeof before);
                assert_int_equal(w->env.live, live);
                KT_VALID(w->cache);
                kt_answer_drop(w);
                failed++;
                continue;
            }
            KT_OK(w->cache, kt_world_step(w));
            {
                kvl_req fork = {77};
                before = kt_stats(w->cache);
                kt_env_fail(&w->env, nth, false);
                r = kvl_sched_fork(w->sched, a->req, NULL, &fork);
                kt_env_fail(&w->env, 0, false);
                if (r != KVL_OK) {
                    assert_int_equal(r, KVL_OUT_OF_HOST_MEMORY);
                    assert_int_equal(fork.id, 0);
                    after = kt_stats(w->cache);
                    assert_int_equal(before.submitted, after.submitted);
                    KT_VALID(w->cache);
                    failed++;
                } else {
                    KT_OK(w->cache, kvl_sched_cancel(w->sched, fork));
                }
            }
            done++;
        }
    }
    /* a fork whose parent runs, refused for want of memory */
    {
        kt_answer *a = kt_world_submit(w, 90000, 60, 8, NULL);
        kvl_req fork = {77};
        KT_OK(w->cache, kt_world_step(w));
        kt_env_fail(&w->env, 1, false);
        assert_int_equal(kvl_sched_fork(w->sched, a->req, NULL, &fork), KVL_OUT_OF_HOST_MEMORY);
        kt_env_fail(&w->env, 0, false);
        KT_VALID(w->cache);
        done++;
    }
    assert_true(failed >= 6 && done >= 6);
    assert_int_equal(kt_world_run(w, 500), KVL_IDLE);
    for (uint32_t i = 0; i < w->n_answers; i++) kt_world_answer_is(w, w->answers[i], KVL_FINISH_LENGTH, 8);
    kt_world_close(w);
    free(w);
}

/* A submit that fails takes nothing from those that are there, records of finished requests included. */
static void test_refused_submit_forgets_nothing(void **state) {
    kt_world *w = (kt_world *)calloc(1, sizeof *w);
    kvl_sched_desc sdesc;
    kt_answer *a[4], *more;
    (void)state;
    kt_world_init(w);
    memset(&sdesc, 0, sizeof sdesc);
    sdesc.max_waiting = 4;
    kt_world_open(w, kt_desc(&w->env, LAYERS, 16, NULL), &sdesc);
    for (int i = 0; i < 4; i++) a[i] = kt_world_submit(w, 1000 * i, 20, 3, NULL);
    assert_int_equal(kt_world_run(w, 20), KVL_IDLE);
    more = kt_answer_new(w);
    kt_push_range(&more->stream, 8000, 20);
    kt_env_fail(&w->env, 1, true);
    assert_int_equal(kt_world_try(w, more, 3, NULL), KVL_OUT_OF_HOST_MEMORY);
    kt_env_fail(&w->env, 0, false);
    kt_answer_drop(w);
    for (int i = 0; i < 4; i++) kt_world_answer_is(w, a[i], KVL_FINISH_LENGTH, 3);
    kt_world_close(w);
    free(w);
}

/* ---------------------------------------------------------------- resize */

static void test_resize(void **state) {
    static const kvl_backend_kind backends[] = {KVL_BACKEND_NULL, KVL_BACKEND_CPU};
    (void)state;
    for (int b = 0; b < 2; b++) {
        uint32_t failures = 0;
        for (uint64_t nth = 1; nth < MOST; nth++) {
            kt_env env;
            kvl_cache_desc desc;
            kvl_cache *cache = NULL;
            kt_shadow shadow;
            kt_seq q;
            kvl_stats s;
            kvl_result r;
            bool failed;
            kt_env_init(&env);
            desc = described(&env, backends[b], "f16");
            desc.device_bytes = kt_budget(&desc, 8);
            desc.max_device_bytes = kt_budget(&desc, 40);
            KT_OK(NULL, kvl_cache_create(&desc, &cache));
            kt_shadow_init(&shadow, &desc.geometry);
            memset(&q, 0, sizeof q);
            kt_push_range(&q.stream, 0, 300);
            if (b == 0) {
                kt_open(cache, &q, 0);
                KT_OK(cache, kt_try_feed(cache, &shadow, LAYERS, &q, 100));
            } else {
                KT_OK(cache,
                      kvl_cache_resize(cache, 0, NULL)); /* so that scratch and workspace are taken again */
            }
            kt_env_fail(&env, nth, false);
            r = kvl_cache_resize(cache, desc.max_device_bytes, NULL);
            failed = env.failures > 0;
            kt_env_fail(&env, 0, false);
            s = kt_stats(cache);
            KT_VALID(cache);
            assert_true(s.bytes_slabs + s.bytes_scratch + s.bytes_workspace <= desc.max_device_bytes);
            if (failed) {
                assert_int_equal(r, KVL_OUT_OF_DEVICE_MEMORY);
                assert_true(strlen(kvl_last_error(cache)) > 5);
                failures++;
            } else {
                KT_OK(cache, r);
            }
            if (b == 0) { /* what it got can be used, what was there is whole */
                KT_OK(cache, kt_try_feed(cache, &shadow, LAYERS, &q, 20));
                KT_OK(cache, kvl_cache_resize(cache, desc.max_device_bytes, NULL));
                KT_OK(cache, kt_try_feed(cache, &shadow, LAYERS, &q, 100));
                kt_close(cache, &q);
            } else {
                KT_OK(cache, kvl_cache_resize(cache, desc.max_device_bytes, NULL));
                KT_OK(cache, kvl_can_fit(cache, 1, 300, NULL));
                kt_stream_free(&q.stream);
            }
            kt_shadow_free(&shadow);
            kvl_cache_destroy(cache);
            kt_env_check(&env);
            if (!failed) break;
        }
        if (b == 1) assert_true(failures >= 3); /* the null backend's memory is only numbers */
    }
}

/* ---------------------------------------------------------------- all at once */

/* A random life with one allocation in five failing: errors are clean, and at the end all memory is back. */
static void test_random_life(void **state) {
    (void)state;
    for (uint64_t seed = 0; seed < 60; seed++) {
        kt_rng rng = {kt_mix(seed)};
        kt_world *w = (kt_world *)calloc(1, sizeof *w);
        kvl_cache_desc desc;
        uint64_t top, low;
        kt_world_init(w);
        snprintf(kt_where, sizeof kt_where, "seed %llu", (unsigned long long)seed);
        desc = kt_desc(&w->env, LAYERS, 16, seed & 1 ? "f16" : NULL);
        if (seed & 2) desc.context_desc.backend = KVL_BACKEND_CPU;
        desc.device_bytes = top = kt_budget(&desc, 40);
        low = kt_budget(&desc, 12);
        kt_world_open(w, desc, NULL);
        for (int op = 0; op < 150; op++) {
            kvl_result r;
            if (kt_chance(&rng, 50)) kt_env_fail(&w->env, kt_between(&rng, 1, 5), false);
            switch (kt_below(&rng, 4)) {
            case 0: {
                kt_answer *a = kt_answer_new(w);
                kt_push_range(&a->stream, 100 * (int32_t)kt_below(&rng, 5), kt_between(&rng, 1, 80));
                r = kt_world_try(w, a, kt_between(&rng, 1, 20), NULL);
                KT_CHECK(r == KVL_OK || r == KVL_OUT_OF_HOST_MEMORY, "%s", kvl_result_name(r));
                if (r != KVL_OK) kt_answer_drop(w);
                break;
            }
            case 1:
                r = kvl_cache_resize(w->cache, low + kt_random(&rng) % (top - low), NULL);
                KT_CHECK(r == KVL_OK || r == KVL_OUT_OF_DEVICE_MEMORY, "%s", kvl_result_name(r));
                break;
            default:
                if (seed & 2)
                    break; /* real attention wants real tensors: plans are run on the null backend */
                r = kt_world_step(w);
                KT_CHECK(r == KVL_OK || r == KVL_IDLE, "%s", kvl_result_name(r));
            }
            KT_VALID(w->cache);
        }
        kt_env_fail(&w->env, 0, false);
        KT_OK(w->cache, kvl_cache_resize(w->cache, top, NULL));
        if (!(seed & 2)) {
            assert_int_equal(kt_world_run(w, 3000), KVL_IDLE);
            for (uint32_t i = 0; i < w->n_answers; i++) {
                assert_int_equal(kt_info(w, w->answers[i]).finish, KVL_FINISH_LENGTH);
            }
        }
        kt_world_close(w);
        free(w);
    }
    kt_where[0] = 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_context_create),
        cmocka_unit_test(test_cache_create),
        cmocka_unit_test(test_cache_defaults),
        cmocka_unit_test(test_sched_create),
        cmocka_unit_test(test_running_allocates_nothing),
        cmocka_unit_test(test_planning_allocates_nothing),
        cmocka_unit_test(test_submit_and_fork),
        cmocka_unit_test(test_refused_submit_forgets_nothing),
        cmocka_unit_test(test_resize),
        cmocka_unit_test(test_random_life),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
