/* The budget that follows what the device has left: a backend with a room that the test sets. */
#define KVL_IMPLEMENTATION
#include "../common/kvl_world.h"

#define LAYERS 2

/* The null backend, which knows how much memory there is: what the caches have counts as used, as with a driver. */
typedef struct fixture {
    kt_world w;
    kvl_context *ctx;
    kvli_backend backend;
    uint64_t slab;
} fixture;

static struct {
    uint64_t budget, others;
    bool live, lost;
    kvl_cache *cache;
    uint32_t polls;
    char said[2048];
} device;

static kvl_result room(const kvl_context *ctx, kvl_memory_info *out) {
    const kvl_cache *c = device.cache;
    (void)ctx;
    device.polls++;
    if (device.lost) return KVL_DEVICE_LOST;
    out->total = 1u << 30;
    out->budget = device.budget;
    out->used = device.others + (c && c->scratch ? c->n_slabs * c->slab_bytes + c->fixed_bytes : 0);
    out->available = out->budget > out->used ? out->budget - out->used : 0;
    out->live = device.live;
    return KVL_OK;
}

static void say(void *user, kvl_log_level level, const char *text) {
    size_t used = strlen(device.said);
    (void)user;
    (void)level;
    snprintf(device.said + used, sizeof device.said - used, "%s\n", text);
}

static int setup(void **state) {
    fixture *f = (fixture *)calloc(1, sizeof *f);
    kt_world_init(&f->w);
    memset(&device, 0, sizeof device);
    device.live = true;
    device.budget = 512u << 20;
    *state = f;
    return 0;
}

static kvl_cache_desc describe(fixture *f, uint32_t slabs) {
    kvl_cache_desc desc = kt_desc(&f->w.env, LAYERS, 16, NULL);
    desc.device_bytes = kt_budget(&desc, slabs);
    f->slab = kt_budget(&desc, slabs + 1) - desc.device_bytes;
    desc.context_desc.log = say;
    KT_OK(NULL, kvl_context_create(&desc.context_desc, &f->ctx));
    f->backend = *f->ctx->backend;
    f->backend.room = room;
    f->ctx->backend = &f->backend;
    desc.context = f->ctx;
    return desc;
}

static void open_world(fixture *f, kvl_cache_desc desc) {
    kt_world_open(&f->w, desc, NULL);
    device.cache = f->w.cache;
}

static int teardown(void **state) {
    fixture *f = (fixture *)*state;
    device.cache = NULL;
    if (f->w.cache) {
        KT_VALID(f->w.cache);
        kvl_sched_destroy(f->w.sched);
        kvl_cache_destroy(f->w.cache);
        kt_shadow_free(&f->w.shadow);
        for (uint32_t i = 0; i < f->w.n_answers; i++) {
            kt_stream_free(&f->w.answers[i]->stream);
            free(f->w.answers[i]);
        }
    }
    kvl_context_destroy(f->ctx);
    kt_env_check(&f->w.env);
    free(f);
    return 0;
}

static uint64_t held(kvl_cache *c) {
    kvl_stats s = kt_stats(c);
    return s.bytes_slabs + s.bytes_scratch + s.bytes_workspace;
}

/* ---------------------------------------------------------------- create and resize */

static void test_create(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = describe(f, 40), shown;
    kvl_memory_info m;
    device.others = 1000;
    device.budget = 1000 + desc.device_bytes; /* all of it is free: 70% is taken */
    KT_OK(NULL, kvl_context_memory(f->ctx, &m));
    assert_int_equal(m.available, desc.device_bytes);
    assert_int_equal(m.total, 1u << 30);
    open_world(f, desc);
    kvl_stats s = kt_stats(f->w.cache);
    assert_int_equal(s.device_asked, desc.device_bytes);
    assert_int_equal(s.device_budget, desc.device_bytes / 10 * 7);
    assert_true(held(f->w.cache) <= s.device_budget &&
                held(f->w.cache) + f->w.cache->slab_bytes > s.device_budget);
    assert_non_null(strstr(device.said, "little memory is left"));
    KT_OK(NULL, kvl_cache_defaults(&desc, &shown)); /* what was asked for stays in the desc */
    assert_int_equal(shown.device_bytes, desc.device_bytes);
}

static void test_create_with_nothing_left(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = describe(f, 40);
    kvl_cache *c = NULL;
    device.others = device.budget + 1; /* more is used than there is: not a huge number */
    KT_RESULT(KVL_OUT_OF_DEVICE_MEMORY, NULL, kvl_cache_create(&desc, &c));
    assert_null(c);
    assert_non_null(strstr(kt_error, "has 0 MiB left"));
    device.others = 0;
    device.budget = 3 * f->slab;
    KT_RESULT(KVL_OUT_OF_DEVICE_MEMORY, NULL, kvl_cache_create(&desc, &c));
    device.lost = true; /* nobody knows: as asked */
    KT_OK(NULL, kvl_cache_create(&desc, &c));
    assert_int_equal(kt_stats(c).device_budget, desc.device_bytes);
    kvl_cache_destroy(c);
    kvl_memory_info m;
    KT_RESULT(KVL_DEVICE_LOST, NULL, kvl_context_memory(f->ctx, &m));
    KT_RESULT(KVL_INVALID_ARG, NULL, kvl_context_memory(f->ctx, NULL));
    f->backend.room = NULL;
    KT_RESULT(KVL_UNSUPPORTED, NULL, kvl_context_memory(f->ctx, &m));
}

static void test_resize(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = describe(f, 40);
    open_world(f, desc);
    assert_int_equal(kt_stats(f->w.cache).device_budget, desc.device_bytes);
    device.budget = desc.device_bytes; /* all of it is the cache's: it may keep 70% */
    KT_OK(f->w.cache, kvl_cache_resize(f->w.cache, desc.device_bytes / 2, NULL));
    assert_int_equal(kt_stats(f->w.cache).device_budget, desc.device_bytes / 2);
    KT_OK(f->w.cache, kvl_cache_resize(f->w.cache, desc.device_bytes, NULL));
    assert_int_equal(kt_stats(f->w.cache).device_budget, desc.device_bytes / 10 * 7);
    assert_int_equal(kt_stats(f->w.cache).device_asked, desc.device_bytes);
    KT_OK(f->w.cache, kvl_cache_resize(f->w.cache, 0, NULL));
    assert_int_equal(held(f->w.cache), 0);
    for (int i = 0; i < 40; i++) kt_world_step(&f->w); /* suspended is suspended */
    assert_int_equal(held(f->w.cache), 0);
}

/* ---------------------------------------------------------------- pressure */

static void run_steps(fixture *f, int n) {
    for (int i = 0; i < n; i++) {
        kvl_result r = kt_world_step(&f->w);
        KT_CHECK(r == KVL_OK || r == KVL_IDLE, "%s", kvl_result_name(r));
        KT_VALID(f->w.cache);
    }
}

/* Requests run while memory goes and comes: every token is the one that was due (the shadow checks what it read), and
   all finish. */
static void test_pressure(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = describe(f, 40);
    kt_answer *a[6];
    open_world(f, desc);
    for (int i = 0; i < 6; i++) a[i] = kt_world_submit(&f->w, 1000 * i, 60 + 10 * (uint32_t)i, 120, NULL);
    run_steps(f, 20);
    uint64_t full = held(f->w.cache), asked = desc.device_bytes;
    device.others = device.budget - full / 2; /* half of what it has must go */
    device.said[0] = 0;
    run_steps(f, 17);
    uint64_t small = held(f->w.cache);
    KT_CHECK(small <= full / 2 && small + f->w.cache->slab_bytes > full / 20 * 7, "%llu of %llu bytes",
             (unsigned long long)small, (unsigned long long)full);
    assert_non_null(strstr(device.said, "memory is short"));
    assert_int_equal(kt_stats(f->w.cache).device_asked, asked);
    device.others = device.budget - full / 2 - asked / 10; /* a little more: not worth a change */
    run_steps(f, 40);
    assert_int_equal(held(f->w.cache), small);
    device.others = 0;
    run_steps(f, 17);
    assert_int_equal(held(f->w.cache), full);
    assert_non_null(strstr(device.said, "memory is there again"));
    assert_int_equal(kt_stats(f->w.cache).device_budget, asked);
    assert_int_equal(kt_world_run(&f->w, 2000), KVL_IDLE);
    for (int i = 0; i < 6; i++) kt_world_answer_is(&f->w, a[i], KVL_FINISH_LENGTH, 120);
}

/* With nothing left at all a cache keeps what one sequence of two blocks takes, and asks every 16 steps only. */
static void test_floor(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = describe(f, 40);
    open_world(f, desc);
    device.others = 2 * device.budget;
    kt_answer *a = kt_world_submit(&f->w, 0, 8, 8, NULL);
    run_steps(f, 16);
    assert_int_equal(held(f->w.cache), f->w.cache->least_bytes);
    assert_int_equal(kt_world_run(&f->w, 100), KVL_IDLE);
    kt_world_answer_is(&f->w, a, KVL_FINISH_LENGTH, 8);
    device.polls = 0;
    run_steps(f, 64);
    assert_int_equal(device.polls, 4);
}

/* The caller's own sequences and steps: what they hold stays. */
static void test_own_sequences(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = describe(f, 40);
    kt_seq q = {0}, closed = {0};
    open_world(f, desc);
    kt_stream_init(&q.stream, 0, 0);
    kt_push_range(&q.stream, 0, 400);
    kt_open(f->w.cache, &q, 0);
    kt_stream_init(&closed.stream, 0, 0);
    kt_push_range(&closed.stream, 5000, 100);
    kt_open(f->w.cache, &closed, 0);
    KT_OK(f->w.cache, kt_try_feed(f->w.cache, &f->w.shadow, LAYERS, &q, 64));
    KT_OK(f->w.cache, kt_try_feed(f->w.cache, &f->w.shadow, LAYERS, &q, 64));
    KT_OK(f->w.cache, kt_try_feed(f->w.cache, &f->w.shadow, LAYERS, &closed, 64));
    kt_close(f->w.cache, &closed);
    uint64_t full = held(f->w.cache);
    device.others = 2 * device.budget;
    for (int i = 0; i < 16; i++) KT_OK(f->w.cache, kt_try_feed(f->w.cache, &f->w.shadow, LAYERS, &q, 1));
    kvl_stats s = kt_stats(f->w.cache);
    assert_true(held(f->w.cache) < full && s.device_budget >= held(f->w.cache));
    assert_int_equal(kt_cached(&s), 0);
    KT_VALID(f->w.cache);
    device.others = 0;
    for (int i = 0; i < 16; i++) KT_OK(f->w.cache, kt_try_feed(f->w.cache, &f->w.shadow, LAYERS, &q, 1));
    assert_int_equal(held(f->w.cache), full);
    kt_close(f->w.cache, &q);
}

/* A driver that does not tell: its size counts at create; nothing is followed. */
static void test_not_live(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = describe(f, 40);
    device.live = false;
    open_world(f, desc);
    uint64_t full = held(f->w.cache);
    device.others = 2 * device.budget;
    run_steps(f, 64);
    assert_int_equal(held(f->w.cache), full);
}

/* Memory that is said to be there and is not given: as much as there was, and no second try soon. */
static uint32_t maps;
static kvl_result no_map(kvl_cache *c, uint32_t slab, size_t bytes, uint64_t *address) {
    (void)c, (void)slab, (void)bytes, (void)address;
    maps++;
    return KVL_OUT_OF_DEVICE_MEMORY;
}
static void test_growth_fails(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = describe(f, 40);
    open_world(f, desc);
    uint64_t full = held(f->w.cache);
    device.others = device.budget - full / 2;
    run_steps(f, 16);
    uint64_t small = held(f->w.cache);
    assert_true(small < full);
    device.others = 0;
    f->backend.map = no_map;
    run_steps(f, 16);
    assert_int_equal(held(f->w.cache), small);
    maps = 0;
    run_steps(f, 100);
    assert_int_equal(maps, 0);
    device.others = device.budget - small / 2; /* others are still seen to need memory */
    run_steps(f, 16);
    assert_true(held(f->w.cache) < small);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_create, setup, teardown),
        cmocka_unit_test_setup_teardown(test_create_with_nothing_left, setup, teardown),
        cmocka_unit_test_setup_teardown(test_resize, setup, teardown),
        cmocka_unit_test_setup_teardown(test_pressure, setup, teardown),
        cmocka_unit_test_setup_teardown(test_floor, setup, teardown),
        cmocka_unit_test_setup_teardown(test_own_sequences, setup, teardown),
        cmocka_unit_test_setup_teardown(test_not_live, setup, teardown),
        cmocka_unit_test_setup_teardown(test_growth_fails, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
