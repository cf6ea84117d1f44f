/* The paged allocator through the public API: sharing, copy on write, trim, windows, slabs, compaction,
   resize, can_fit. */
#define KVL_IMPLEMENTATION
#include "../common/kvl_test.h"

#define LAYERS 2

typedef struct fixture {
    kt_env env;
    kvl_cache_desc desc;
    kvl_cache *cache;
    kt_shadow shadow;
} fixture;

static void make(fixture *f, kvl_cache_desc desc) {
    f->desc = desc;
    KT_OK(NULL, kvl_cache_create(&f->desc, &f->cache));
    kt_shadow_init(&f->shadow, &f->desc.geometry);
}

static void unmake(fixture *f) {
    if (f->cache) {
        KT_VALID(f->cache);
        kvl_cache_destroy(f->cache);
        kt_shadow_free(&f->shadow);
    }
    f->cache = NULL;
    kt_env_check(&f->env);
}

static int setup(void **state) {
    fixture *f = (fixture *)calloc(1, sizeof *f);
    kt_env_init(&f->env);
    *state = f;
    return 0;
}

static int teardown(void **state) {
    fixture *f = (fixture *)*state;
    unmake(f);
    free(f);
    return 0;
}

static kt_seq start(fixture *f, int32_t first,
                    uint32_t n) { /* an open sequence with tokens first.., not run yet */
    kt_seq q;
    memset(&q, 0, sizeof q);
    kt_stream_init(&q.stream, 0, 0);
    kt_push_range(&q.stream, first, n);
    kt_open(f->cache, &q, 0);
    return q;
}

static void feed(fixture *f, kt_seq *q, uint32_t n) {
    KT_OK(f->cache, kt_try_feed(f->cache, &f->shadow, LAYERS, q, n));
}

/* ---------------------------------------------------------------- counting */

/* Blocks in use, by class, as a sequence grows: one exact sink, packed ones, one exact open block. */
static void test_block_counts(void **state) {
    fixture *f = (fixture *)*state;
    kt_seq q;
    make(f, kt_desc(&f->env, LAYERS, 16, NULL));
    q = start(f, 100, 80);
    for (uint32_t n = 1; n <= 80; n++) {
        kvl_stats s;
        uint32_t full = n / 16, open = n % 16 != 0;
        feed(f, &q, 1);
        s = kt_stats(f->cache);
        KT_CHECK(s.blocks_used[0] == (full > 1 ? full - 1 : 0), "%u tokens: %u packed", n, s.blocks_used[0]);
        KT_CHECK(s.blocks_used[1] == (full > 0) + open, "%u tokens: %u exact", n, s.blocks_used[1]);
        assert_int_equal(s.blocks_shared[0] + s.blocks_shared[1], 0);
        assert_int_equal(s.sequences, 1);
        KT_VALID(f->cache);
    }
    kt_close(f->cache, &q);
    assert_int_equal(f->shadow.seals, 4);
    { /* they stay, as cached ones */
        kvl_stats s = kt_stats(f->cache);
        assert_int_equal(kt_used(&s), 0);
        assert_int_equal(s.blocks_cached[0], 4);
        assert_int_equal(s.blocks_cached[1], 1);
        assert_true(s.bytes_cached > 0);
        assert_int_equal(s.bytes_used, 0);
    }
}

/* One class: all blocks count as exact, nothing is sealed. */
static void test_one_class(void **state) {
    fixture *f = (fixture *)*state;
    kvl_stats s;
    kt_seq q;
    make(f, kt_desc(&f->env, LAYERS, 8, "f16"));
    q = start(f, 0, 100);
    feed(f, &q, 50);
    feed(f, &q, 50);
    s = kt_stats(f->cache);
    assert_int_equal(s.blocks_used[0], 0);
    assert_int_equal(s.blocks_used[1], 13);
    assert_int_equal(f->shadow.seals, 0);
    kt_close(f->cache, &q);
}

static void test_no_sinks_and_many(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = kt_desc(&f->env, LAYERS, 16, NULL);
    kvl_stats s;
    kt_seq q;
    desc.geometry.sink_blocks = KVL_NONE;
    make(f, desc);
    q = start(f, 0, 64);
    feed(f, &q, 64);
    s = kt_stats(f->cache);
    assert_int_equal(s.blocks_used[0], 4);
    assert_int_equal(s.blocks_used[1], 0);
    kt_close(f->cache, &q);
    unmake(f);
    desc.geometry.sink_blocks = 3;
    make(f, desc);
    q = start(f, 0, 80);
    feed(f, &q, 80);
    s = kt_stats(f->cache);
    assert_int_equal(s.blocks_used[0], 2);
    assert_int_equal(s.blocks_used[1], 3);
    kt_close(f->cache, &q);
}

/* Without the prefix cache a closed sequence leaves nothing; no_keep does the same for one. */
static void test_keep_nothing(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = kt_desc(&f->env, LAYERS, 16, NULL);
    kvl_seq_desc sdesc;
    kvl_stats s;
    kt_seq q;
    desc.no_prefix_cache = true;
    make(f, desc);
    q = start(f, 0, 70);
    feed(f, &q, 70);
    kt_close(f->cache, &q);
    s = kt_stats(f->cache);
    assert_int_equal(kt_used(&s) + kt_cached(&s) + s.nodes, 0);
    assert_int_equal(s.slabs_free, s.slabs);
    unmake(f);
    desc.no_prefix_cache = false;
    make(f, desc);
    memset(&q, 0, sizeof q);
    kt_push_range(&q.stream, 0, 70);
    memset(&sdesc, 0, sizeof sdesc);
    sdesc.tokens = q.stream.tokens;
    sdesc.n_tokens = 70;
    sdesc.no_keep = true;
    KT_OK(f->cache, kvl_seq_open(f->cache, &sdesc, &q.seq, &q.reuse));
    feed(f, &q, 70);
    kt_close(f->cache, &q);
    s = kt_stats(f->cache);
    assert_int_equal(kt_used(&s) + kt_cached(&s), 0);
}

/* ---------------------------------------------------------------- fork, copy on write */

static void test_fork_copies_the_open_block(void **state) {
    fixture *f = (fixture *)*state;
    const kvl_step *step;
    kvl_span span;
    kvl_stats s;
    uint32_t length = 0;
    kt_seq a, b;
    make(f, kt_desc(&f->env, LAYERS, 16, NULL));
    a = start(f, 0, 60);
    feed(f, &a, 40); /* 2 full, 8 rows open */
    b = a;
    kt_stream_copy(&b.stream, &a.stream, 40);
    KT_OK(f->cache, kvl_seq_fork(f->cache, a.seq, &b.seq, &length));
    assert_int_equal(length, 40);
    s = kt_stats(f->cache);
    assert_int_equal(kt_used(&s), 3);
    assert_int_equal(s.blocks_shared[0], 1);
    assert_int_equal(s.blocks_shared[1], 2);
    assert_int_equal(s.sequences, 2);
    KT_VALID(f->cache);
    /* the first to write copies, once */
    kt_push_range(&b.stream, 5000, 20);
    memset(&span, 0, sizeof span);
    span.seq = b.seq;
    span.tokens = b.stream.tokens + 40;
    span.n_tokens = 2;
    KT_OK(f->cache, kvl_step_begin(f->cache, &span, 1, &step));
    assert_int_equal(step->n_copies, 1);
    assert_int_not_equal(step->copies[0].src, step->copies[0].dst);
    assert_int_equal(step->copies[0].dst, step->blocks[0].own[0]);
    KT_OK(f->cache, kvl_step_abort(f->cache, step));
    KT_VALID(f->cache);
    feed(f, &b, 2);
    s = kt_stats(f->cache);
    assert_int_equal(kt_used(&s), 4);
    assert_int_equal(s.blocks_shared[0] + s.blocks_shared[1], 2);
    memset(&span, 0, sizeof span);
    span.seq = a.seq;
    span.tokens = a.stream.tokens + 40;
    span.n_tokens = 2;
    KT_OK(f->cache, kvl_step_begin(f->cache, &span, 1, &step));
    assert_int_equal(step->n_copies, 0); /* it is alone now */
    KT_OK(f->cache, kvl_step_abort(f->cache, step));
    feed(f, &a, 20);
    feed(f, &b, 18);

    KT_VALID(f->cache);
    kt_close(f->cache, &b);
    kt_close(f->cache, &a);
    s = kt_stats(f->cache);
    assert_int_equal(kt_used(&s), 0);
}

/* Both sides of a fork in one step: one of them may keep the block, and no block has two writers (the shadow
   checks). */
static void test_fork_both_write(void **state) {
    fixture *f = (fixture *)*state;
    enum { N = 5 };
    kt_seq q[N];
    kt_stream *streams[N];
    kvl_span spans[N];
    const kvl_step *step;
    make(f, kt_desc(&f->env, LAYERS, 16, NULL));
    q[0] = start(f, 0, 40);
    feed(f, &q[0], 40);
    for (int i = 1; i < N; i++) {
        memset(&q[i], 0, sizeof q[i]);
        kt_stream_copy(&q[i].stream, &q[0].stream, 40);
        KT_OK(f->cache, kvl_seq_fork(f->cache, q[0].seq, &q[i].seq, &q[i].length));
    }
    for (int round = 0; round < 20; round++) {
        memset(spans, 0, sizeof spans);
        for (int i = 0; i < N; i++) {
            kt_push(&q[i].stream, 1000 * i + round);
            streams[i] = &q[i].stream;
            spans[i].seq = q[i].seq;
            spans[i].tokens = q[i].stream.tokens + q[i].length;
            spans[i].n_tokens = 1;
            spans[i].n_logits = 1;
        }
        KT_OK(f->cache, kvl_step_begin(f->cache, spans, N, &step));
        KT_CHECK(round ? step->n_copies == 0 : step->n_copies == N - 1 || step->n_copies == N,
                 "%u copies in round %d", step->n_copies, round);
        kt_shadow_step(&f->shadow, step, streams);
        kt_attend(f->cache, step, LAYERS);
        KT_OK(f->cache, kvl_step_end(f->cache, step));
        for (int i = 0; i < N; i++) q[i].length++;
        KT_VALID(f->cache);
    }
    for (int i = 0; i < N; i++) kt_close(f->cache, &q[i]);
}

/* ---------------------------------------------------------------- trim */

static void trim_to(fixture *f, kt_seq *q, uint32_t n, uint32_t expected) {
    uint32_t length = 0, again = 0;
    KT_OK(f->cache, kvl_seq_trim(f->cache, q->seq, n, &length));
    KT_CHECK(length == expected, "trim %u to %u reached %u, not %u", q->length, n, length, expected);
    KT_OK(f->cache, kvl_seq_length(f->cache, q->seq, &again));
    assert_int_equal(again, length);
    q->length = length;
    q->stream.n = length;
    KT_VALID(f->cache);
}

static void test_trim_rules(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = kt_desc(&f->env, LAYERS, 16, NULL);
    kt_seq q;
    desc.no_prefix_cache = true; /* so that the block counts are the sequence's own */
    make(f, desc);
    q = start(f, 0, 100);
    feed(f, &q, 100);
    trim_to(f, &q, 100, 100);
    trim_to(f, &q, 98, 98); /* inside the open block: exact */
    kt_push_range(&q.stream, 900, 2);
    feed(f, &q, 2);
    trim_to(f, &q, 96, 96); /* a boundary */
    trim_to(f, &q, 90, 80); /* inside a packed block: its start */
    kt_push_range(&q.stream, 700, 30);
    feed(f, &q, 30);
    trim_to(f, &q, 64, 64);
    trim_to(f, &q, 17, 16);
    trim_to(f, &q, 7, 7); /* the first block stays exact: any row */
    kt_push_range(&q.stream, 800, 30);
    feed(f, &q, 30);
    trim_to(f, &q, 0, 0);
    {
        kvl_stats s = kt_stats(f->cache);
        assert_int_equal(kt_used(&s), 0);
    }
    kt_push_range(&q.stream, 400, 20);
    feed(f, &q, 20);
    kt_close(f->cache, &q);
}

/* One class: every length can be reached. */
static void test_trim_one_class(void **state) {
    fixture *f = (fixture *)*state;
    kt_seq q;
    make(f, kt_desc(&f->env, LAYERS, 16, "f16"));
    q = start(f, 0, 100);
    feed(f, &q, 100);
    for (uint32_t n = 99; n > 3; n -= 3) {
        trim_to(f, &q, n, n);
        kt_push(&q.stream, 6000 + (int32_t)n);
        feed(f, &q, 1);
    }
    kt_close(f->cache, &q);
}

/* Trimming one of a fork leaves the other whole, also when it then writes elsewhere. */
static void test_trim_a_fork(void **state) {
    fixture *f = (fixture *)*state;
    kt_seq a, b;
    make(f, kt_desc(&f->env, LAYERS, 16, "f16"));
    a = start(f, 0, 60);
    feed(f, &a, 50);
    b = a;
    kt_stream_copy(&b.stream, &a.stream, 50);
    KT_OK(f->cache, kvl_seq_fork(f->cache, a.seq, &b.seq, NULL));
    trim_to(f, &b, 21, 21);
    kt_push_range(&b.stream, 3000, 40);
    feed(f, &b, 40);
    feed(f, &a, 10);
    kt_close(f->cache, &a);
    kt_close(f->cache, &b);
}

/* Behind a window blocks are given back; a trim goes to where the window is still whole, perhaps 0. */
static void test_trim_behind_window(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = kt_desc(&f->env, LAYERS, 16, "f16");
    kvl_layer layers[LAYERS];
    uint32_t length = 0;
    kt_seq q;
    memset(layers, 0, sizeof layers);
    layers[0].window = 32;
    desc.geometry.layers = layers;
    desc.no_prefix_cache = true;
    make(f, desc);
    q = start(f, 0, 400);
    for (int i = 0; i < 20; i++) feed(f, &q, 10);
    { /* the full layer holds 13 blocks, the window's at most 4 */
        kvl_stats s = kt_stats(f->cache);
        KT_CHECK(kt_used(&s) >= 13 + 2 && kt_used(&s) <= 13 + 4, "%u blocks", kt_used(&s));
    }
    KT_OK(f->cache, kvl_seq_trim(f->cache, q.seq, 199, &length)); /* 168..198 must be there */
    assert_int_equal(length, 199);
    KT_OK(f->cache, kvl_seq_trim(f->cache, q.seq, 100, &length)); /* what it needs has gone */
    KT_CHECK(length == 0, "reached %u", length);
    q.length = length;
    KT_VALID(f->cache);
    feed(f, &q, 50);
    kt_close(f->cache, &q);
}

static void test_window_with_sink_tokens(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = kt_desc(&f->env, LAYERS, 16, NULL);
    kvl_layer layers[LAYERS];
    kvl_stats s;
    kt_seq q;
    memset(layers, 0, sizeof layers);
    layers[0].window = layers[1].window = 40;
    layers[0].sink_tokens = layers[1].sink_tokens = 4;
    desc.geometry.layers = layers;
    desc.no_prefix_cache = true;
    make(f, desc);
    q = start(f, 0, 900);
    while (q.length < 900) feed(f, &q, 9); /* the shadow checks window and sinks at every step */
    s = kt_stats(f->cache);
    KT_CHECK(kt_used(&s) <= 1 + 4, "%u blocks for a window of 40 and a sink", kt_used(&s));
    kt_close(f->cache, &q);
}

/* ---------------------------------------------------------------- extend */

static void test_extend(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = kt_desc(&f->env, LAYERS, 16, "f16");
    kvl_stats before, s;
    kt_seq a, b;
    desc.device_bytes = kt_budget(&desc, 12);
    make(f, desc);
    a = start(f, 0, 160);
    b = start(f, 1000, 160);
    KT_OK(f->cache, kvl_seq_extend(f->cache, a.seq, 112)); /* 7 of 12 blocks */
    KT_VALID(f->cache);
    before = kt_stats(f->cache);
    KT_RESULT(KVL_NO_BLOCKS, f->cache, kvl_seq_extend(f->cache, b.seq, 112));
    s = kt_stats(f->cache);
    assert_int_equal(kt_used(&before), kt_used(&s));
    KT_VALID(f->cache);
    KT_OK(f->cache, kvl_seq_extend(f->cache, b.seq, 75));
    feed(f, &b, 80);
    KT_RESULT(KVL_NO_BLOCKS, f->cache, kt_try_feed(f->cache, &f->shadow, LAYERS, &b, 1));
    KT_VALID(f->cache);
    for (int i = 0; i < 8; i++) feed(f, &a, 14); /* cannot fail */
    KT_RESULT(KVL_NO_BLOCKS, f->cache, kt_try_feed(f->cache, &f->shadow, LAYERS, &a, 1));
    kt_close(f->cache, &b);
    feed(f, &a, 48); /* evicts what b left */
    s = kt_stats(f->cache);
    assert_true(s.evicted_blocks >= 3);
    kt_close(f->cache, &a);
    s = kt_stats(f->cache);
    assert_int_equal(kt_used(&s), 0);
}

/* The same with packed blocks, whose exact ones come and go: another sequence that takes all it can get does
   not matter. */
static void test_extend_two_classes(void **state) {
    fixture *f = (fixture *)*state;
    for (uint32_t chunk = 1; chunk <= 40; chunk += 13) {
        kvl_cache_desc desc = kt_desc(&f->env, LAYERS, 16, NULL);
        kt_seq a, thief[12];
        uint32_t n = 0;
        desc.no_prefix_cache = true;
        desc.device_bytes = kt_budget(&desc, 24);
        make(f, desc);
        a = start(f, 0, 205);
        feed(f, &a, 5);
        KT_OK(f->cache, kvl_seq_extend(f->cache, a.seq, 200));
        for (; n < 12; n++) thief[n] = start(f, 1000 * (int32_t)(n + 1), 300);
        while (a.length < 205) {
            for (uint32_t i = 0; i < n; i++) {
                kvl_result r = KVL_OK;
                while (r == KVL_OK && thief[i].length < 300)
                    r = kt_try_feed(f->cache, &f->shadow, LAYERS, &thief[i], 5);
                KT_CHECK(r == KVL_NO_BLOCKS || r == KVL_OK, "%s", kvl_result_name(r));
            }
            feed(f, &a, 205 - a.length < chunk ? 205 - a.length : chunk);
            KT_VALID(f->cache);
        }
        kt_close(f->cache, &a);
        for (uint32_t i = 0; i < n; i++) kt_close(f->cache, &thief[i]);
        unmake(f);
    }
}

/* Reserved blocks that were not used come back at close and at trim. */
static void test_extend_gives_back(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = kt_desc(&f->env, LAYERS, 16, NULL);
    kvl_stats s;
    kt_seq a;
    desc.no_prefix_cache = true;
    desc.device_bytes = kt_budget(&desc, 10);
    make(f, desc);
    for (int round = 0; round < 30; round++) {
        a = start(f, 0, 100);
        KT_OK(f->cache, kvl_seq_extend(f->cache, a.seq, 90));
        KT_OK(f->cache, kvl_seq_extend(f->cache, a.seq, 20)); /* less than there is */
        feed(f, &a, 30);
        KT_VALID(f->cache);
        kt_close(f->cache, &a);
        s = kt_stats(f->cache);
        assert_int_equal(kt_used(&s), 0);
        assert_int_equal(s.slabs_free, s.slabs);
    }
}

/* ---------------------------------------------------------------- budget, can_fit, resize */

static void check_ledger(fixture *f, uint64_t budget) {
    kvl_stats s = kt_stats(f->cache);
    KT_CHECK(s.bytes_slabs + s.bytes_scratch + s.bytes_workspace <= budget, "%llu + %llu + %llu of %llu",
             (unsigned long long)s.bytes_slabs, (unsigned long long)s.bytes_scratch,
             (unsigned long long)s.bytes_workspace, (unsigned long long)budget);
    KT_CHECK(s.bytes_used + s.bytes_cached <= s.bytes_slabs, "blocks of %llu in slabs of %llu",
             (unsigned long long)(s.bytes_used + s.bytes_cached), (unsigned long long)s.bytes_slabs);
    KT_CHECK(s.device_budget == budget, "budget %llu", (unsigned long long)s.device_budget);
}

static void test_budget_holds(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = kt_desc(&f->env, LAYERS, 16, NULL);
    kt_seq q[4];
    desc.device_bytes = kt_budget(&desc, 20);
    make(f, desc);
    for (int round = 0; round < 40; round++) {
        for (int i = 0; i < 4; i++) q[i] = start(f, round * 4000 + i * 1000, 100);
        for (int step = 0; step < 10; step++) {
            for (int i = 0; i < 4; i++) {
                kvl_result r = kt_try_feed(f->cache, &f->shadow, LAYERS, &q[i], 10);
                KT_CHECK(r == KVL_OK || r == KVL_NO_BLOCKS, "%s", kvl_result_name(r));
                check_ledger(f, desc.device_bytes);
            }
        }
        KT_VALID(f->cache);
        for (int i = 0; i < 4; i++) kt_close(f->cache, &q[i]);
    }
    assert_true(kt_stats(f->cache).device_peak <= desc.device_bytes);
    assert_true(kt_stats(f->cache).evicted_blocks > 100);
}

/* can_fit says yes exactly where the sequences can then be filled. */
static void test_can_fit_is_true(void **state) {
    fixture *f = (fixture *)*state;
    static const char *const presets[] = {"f16", NULL};
    for (int p = 0; p < 2; p++) {
        kvl_cache_desc desc = kt_desc(&f->env, LAYERS, 16, presets[p]);
        uint32_t tokens = 0, n = 0;
        kvl_fit fit;
        kt_seq first;
        desc.device_bytes = kt_budget(&desc, 24);
        make(f, desc);
        first = start(f, 0, 100);
        feed(f, &first, 100);
        KT_OK(f->cache, kvl_can_fit(f->cache, 1, 1, &fit));
        tokens = (uint32_t)fit.max_tokens;
        assert_true(tokens > 100);
        KT_OK(f->cache, kvl_can_fit(f->cache, 1, tokens, &fit));
        assert_int_equal(fit.short_bytes, 0);
        assert_true(fit.need_bytes > 0 &&
                    fit.free_bytes < desc.device_bytes); /* slabs: partly filled ones have room too */
        if (tokens < 1024) {
            KT_RESULT(KVL_NO_BLOCKS, f->cache, kvl_can_fit(f->cache, 1, tokens + 1, &fit));
            assert_true(fit.short_bytes > 0 && fit.short_bytes <= fit.need_bytes);
            assert_true(fit.fits_empty);
        }
        { /* and it does fit */
            kt_seq q = start(f, 5000, tokens);
            while (q.length < tokens) feed(f, &q, tokens - q.length < 7 ? tokens - q.length : 7);
            KT_VALID(f->cache);
            kt_close(f->cache, &q);
        }
        while (kvl_can_fit(f->cache, n + 1, 30, &fit) == KVL_OK) n++;
        assert_true(n >= 3);
        {
            kt_seq q[16];
            assert_true(n < 16);
            for (uint32_t i = 0; i < n; i++) q[i] = start(f, 20000 + 100 * (int32_t)i, 30);
            for (int k = 0; k < 3; k++) {
                for (uint32_t i = 0; i < n; i++) feed(f, &q[i], 10);
            }
            for (uint32_t i = 0; i < n; i++) kt_close(f->cache, &q[i]);
        }
        KT_RESULT(KVL_NEVER_FITS, f->cache, kvl_can_fit(f->cache, 16, 1000, &fit));
        assert_false(fit.fits_empty);
        assert_true(fit.need_bytes > desc.device_bytes && fit.short_bytes > 0);
        KT_RESULT(KVL_NEVER_FITS, f->cache, kvl_can_fit(f->cache, 16, 0xffffffffu, &fit));
        KT_RESULT(KVL_INVALID_ARG, f->cache, kvl_can_fit(f->cache, 17, 10, &fit)); /* above max_sequences */
        KT_OK(f->cache, kvl_can_fit(f->cache, 1, 10, NULL));
        KT_RESULT(KVL_INVALID_ARG, f->cache, kvl_can_fit(f->cache, 0, 10, &fit));
        kt_close(f->cache, &first);
        unmake(f);
    }
}

static void test_resize(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = kt_desc(&f->env, LAYERS, 16, "f16");
    uint64_t small, large, held = 0;
    kvl_stats s;
    kt_seq a, b;
    large = kt_budget(&desc, 40);
    small = kt_budget(&desc, 8);
    desc.device_bytes = small;
    desc.max_device_bytes = large;
    make(f, desc);
    a = start(f, 0, 400);
    feed(f, &a, 128);
    KT_RESULT(KVL_NO_BLOCKS, f->cache, kt_try_feed(f->cache, &f->shadow, LAYERS, &a, 1));
    KT_OK(f->cache, kvl_cache_resize(f->cache, large, &held)); /* up */
    check_ledger(f, large);
    KT_VALID(f->cache);
    for (int i = 0; i < 4; i++) feed(f, &a, 64);
    b = start(f, 9000, 64);
    feed(f, &b, 64);
    kt_close(f->cache, &b); /* 4 cached blocks */
    /* down below what the open sequence holds: its blocks stay, the cached ones go */
    KT_RESULT(KVL_NO_BLOCKS, f->cache, kvl_cache_resize(f->cache, small, &held));
    s = kt_stats(f->cache);
    assert_int_equal(kt_used(&s), 24);
    assert_int_equal(kt_cached(&s), 0);
    assert_true(held >= s.bytes_used && held > 0);
    assert_true(s.bytes_slabs >= s.bytes_used);
    assert_true(s.bytes_slabs < kt_largest_block(f->cache, LAYERS) * 26);
    KT_VALID(f->cache);
    KT_RESULT(KVL_NO_BLOCKS, f->cache, kvl_cache_resize(f->cache, 0, &held));
    KT_VALID(f->cache);
    KT_OK(f->cache, kvl_cache_resize(f->cache, large, &held));
    feed(f, &a, 16); /* its KV is still right: the shadow checks */
    kt_close(f->cache, &a);
    KT_OK(f->cache, kvl_cache_resize(f->cache, small, &held));
    check_ledger(f, small);
    assert_int_equal(held, 0);
    KT_OK(f->cache, kvl_cache_resize(f->cache, 0, &held));
    s = kt_stats(f->cache);
    assert_int_equal(
        s.bytes_slabs + s.bytes_scratch + s.bytes_workspace + kt_used(&s) + kt_cached(&s) + s.slabs, 0);
    KT_VALID(f->cache);
    a = start(f, 0, 20); /* suspended: opens, but takes no step */
    assert_int_equal(a.length, 0);
    KT_RESULT(KVL_NO_BLOCKS, f->cache, kt_try_feed(f->cache, &f->shadow, LAYERS, &a, 1));
    KT_OK(f->cache, kvl_cache_resize(f->cache, small, &held));
    feed(f, &a, 20);
    kt_close(f->cache, &a);
    KT_RESULT(KVL_INVALID_ARG, f->cache, kvl_cache_resize(f->cache, large + 1, &held));
    assert_non_null(strstr(kvl_last_error(f->cache), "max_device_bytes"));
    check_ledger(f, small);
}

/* Every size on the way down and up leaves a cache that is whole, and open sequences go on. */
static void test_resize_sweep(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = kt_desc(&f->env, LAYERS, 16, NULL);
    uint64_t top = kt_budget(&desc, 48), step = top / 61;
    kt_seq q[3];
    desc.device_bytes = top;
    make(f, desc);
    for (int i = 0; i < 3; i++) {
        q[i] = start(f, 1000 * i, 900);
        feed(f, &q[i], 60);
    }
    for (int turn = 0; turn < 2; turn++) {
        for (int64_t at = 0; at <= 61; at++) {
            uint64_t bytes = (turn ? (uint64_t)at : (uint64_t)(61 - at)) * step, held = 0;
            kvl_result r = kvl_cache_resize(f->cache, bytes, &held);
            KT_CHECK(r == KVL_OK || r == KVL_NO_BLOCKS, "%s", kvl_result_name(r));
            KT_CHECK((r == KVL_NO_BLOCKS) == (held > 0), "held %llu with %s", (unsigned long long)held,
                     kvl_result_name(r));
            if (r == KVL_OK) check_ledger(f, bytes);
            KT_VALID(f->cache);
            if (q[at % 3].stream.n > q[at % 3].length) {
                r = kt_try_feed(f->cache, &f->shadow, LAYERS, &q[at % 3], 1);
                KT_CHECK(r == KVL_OK || r == KVL_NO_BLOCKS, "%s", kvl_result_name(r));
            }
        }
    }
    KT_OK(f->cache, kvl_cache_resize(f->cache, top, NULL));
    for (int i = 0; i < 3; i++) {
        feed(f, &q[i], 100);
        kt_close(f->cache, &q[i]);
    }
}

/* ---------------------------------------------------------------- slabs, compaction: real memory */

/* A step with data on the CPU backend. */
static void run_real(fixture *f, kt_seq *q, uint32_t n) {
    enum { DIM = 16, QH = 2, KH = 1 };
    static float qd[128 * QH * DIM], kd[128 * KH * DIM], vd[128 * KH * DIM], od[128 * QH * DIM];
    kvl_tensor qt, kt, vt, ot;
    const kvl_step *step;
    kvl_span span;
    memset(&qt, 0, sizeof qt);
    kt = vt = ot = qt;
    qt.data = qd;
    kt.data = kd;
    vt.data = vd;
    ot.data = od;
    memset(&span, 0, sizeof span);
    span.seq = q->seq;
    span.tokens = q->stream.tokens + q->length;
    span.n_tokens = n;
    KT_OK(f->cache, kvl_step_begin(f->cache, &span, 1, &step));
    for (uint32_t l = 0; l < LAYERS; l++) {
        for (uint32_t r = 0; r < n; r++) {
            for (uint32_t d = 0; d < DIM; d++) {
                kd[r * DIM + d] = kt_value(&q->stream, q->length + r, l, 0, 0, d);
                vd[r * DIM + d] = kt_value(&q->stream, q->length + r, l, 0, 1, d);
                qd[(r * QH) * DIM + d] = qd[(r * QH + 1) * DIM + d] = 0.25f;
            }
        }
        KT_OK(f->cache, kvl_attend(f->cache, step, l, &qt, &kt, &vt, &ot));
    }
    KT_OK(f->cache, kvl_step_end(f->cache, step));
    q->length += n;
}

/* Begins a step to see the tables, compares every full block of both layers with what was written, and
   aborts. */
static void check_memory(fixture *f, kt_seq *q, uint32_t *entries) {
    const kvl_step *step;
    kvl_span span;
    int32_t token = 1;
    memset(&span, 0, sizeof span);
    span.seq = q->seq;
    span.tokens = &token;
    span.n_tokens = 1;
    KT_OK(f->cache, kvl_step_begin(f->cache, &span, 1, &step));
    for (uint32_t j = 0; j < q->length / 16; j++) {
        uint32_t entry = step->blocks[0].table[j];
        if (entries) {
            KT_CHECK(entries[j] == 0 || entries[j] == entry, "block %u's id became %x, was %x", j, entry,
                     entries[j]);
            entries[j] = entry;
        }
        for (uint32_t l = 0; l < LAYERS; l++) {
            float rows[16 * 16];
            kvl_block_layout at;
            const char *base;
            KT_OK(f->cache, kvl_cache_layout(f->cache, l, (entry & KVL_ENTRY_EXACT) != 0, &at));
            base = (const char *)(uintptr_t)(step->block_address[entry & KVL_ENTRY_ID] + at.layer_offset);
            for (int side = 0; side < 2; side++) {
                KT_OK(f->cache, kvl_tile_decode(side ? at.v_format : at.k_format, 16, 16, 0,
                                                base + (side ? at.v_offset : 0), true, rows));
                for (uint32_t i = 0; i < 16 * 16; i++) {
                    float want = kt_value(&q->stream, j * 16 + i / 16, l, 0, (uint32_t)side, i % 16);
                    KT_CHECK(fabsf(rows[i] - want) < 0.01f, "block %u layer %u side %d row %u: %g, not %g", j,
                             l, side, i / 16, (double)rows[i], (double)want);
                }
            }
        }
    }
    KT_OK(f->cache, kvl_step_abort(f->cache, step));
}

/* Slabs of several blocks, filled by many sequences of which most go: the rest moves together, ids stay,
   bytes stay. */
static void test_compaction(void **state) {
    fixture *f = (fixture *)*state;
    enum { N = 48 };
    static uint32_t entries[N][8];
    kvl_cache_desc desc = kt_desc(&f->env, LAYERS, 16, NULL);
    kvl_stats before, after;
    kt_seq q[N];
    memset(entries, 0, sizeof entries);
    desc.context_desc.backend = KVL_BACKEND_CPU;
    desc.device_bytes = 4u << 20;
    desc.max_sequences = N;
    desc.no_prefix_cache = true;
    desc.poison = true;
    make(f, desc);
    assert_true(kt_stats(f->cache).slab_bytes >= 3 * kt_largest_block(f->cache, LAYERS));
    for (int i = 0; i < N; i++) q[i] = start(f, 1000 * i, 120);
    for (int step = 0; step < 5; step++) { /* interleaved, so that slabs are mixed */
        for (int i = 0; i < N; i++) run_real(f, &q[i], 20);
    }
    for (int i = 0; i < N; i += 7) check_memory(f, &q[i], entries[i]);
    for (int i = 0; i < N; i++) {
        if (i % 7) kt_close(f->cache, &q[i]);
    }
    before = kt_stats(f->cache);
    KT_OK(f->cache, kvl_cache_resize(f->cache,
                                     before.bytes_scratch + before.bytes_workspace + before.bytes_used +
                                         6 * before.slab_bytes,
                                     NULL));
    after = kt_stats(f->cache);
    assert_true(after.compactions > before.compactions);
    assert_true(after.bytes_slabs < before.bytes_slabs);
    assert_int_equal(kt_used(&after), kt_used(&before));
    KT_VALID(f->cache);
    for (int i = 0; i < N; i += 7) {
        check_memory(f, &q[i], entries[i]);
        run_real(f, &q[i], 20);
        check_memory(f, &q[i], entries[i]);
        kt_close(f->cache, &q[i]);
    }
}

/* A class that runs short takes over slabs that another class has left thinly filled: the budget is one. */
static void test_slabs_change_class(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = kt_desc(&f->env, LAYERS, 16, NULL);
    kt_seq q[16], tall;
    kvl_fit fit;
    desc.device_bytes = kt_budget(&desc, 30);
    desc.no_prefix_cache = true;
    make(f, desc);
    for (int i = 0; i < 16; i++) { /* all exact: sink or open */
        q[i] = start(f, 100 * i, 10);
        feed(f, &q[i], 10);
    }
    for (int i = 0; i < 16; i++) kt_close(f->cache, &q[i]);
    KT_OK(f->cache, kvl_can_fit(f->cache, 1, 1, &fit));
    tall = start(f, 9000, (uint32_t)fit.max_tokens); /* nearly all packed */
    while (tall.length < tall.stream.n)
        feed(f, &tall, tall.stream.n - tall.length > 50 ? 50 : tall.stream.n - tall.length);
    KT_CHECK(fit.max_tokens > 30 * 16, "%llu tokens",
             (unsigned long long)fit.max_tokens); /* packed ones are smaller */
    kt_close(f->cache, &tall);
    for (int i = 0; i < 16; i++) {
        q[i] = start(f, 100 * i, 10);
        feed(f, &q[i], 10);
    }
    for (int i = 0; i < 16; i++) kt_close(f->cache, &q[i]);
}

/* Blocks of one step never overlap in memory and stay inside slabs. */
static void test_addresses_are_disjoint(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = kt_desc(&f->env, LAYERS, 16, NULL);
    uint64_t at[64], size[64];
    uint32_t n = 0;
    kvl_span spans[4];
    const kvl_step *step;
    kt_seq q[4];
    memset(spans, 0, sizeof spans);
    make(f, desc);
    for (int i = 0; i < 4; i++) {
        q[i] = start(f, 1000 * i, 90);
        feed(f, &q[i], 80);
        spans[i].seq = q[i].seq;
        spans[i].tokens = q[i].stream.tokens + 80;
        spans[i].n_tokens = 1;
    }
    KT_OK(f->cache, kvl_step_begin(f->cache, spans, 4, &step));
    for (uint32_t s = 0; s < 4; s++) {
        for (uint32_t j = 0; j < step->blocks[s].n_blocks; j++) {
            uint32_t entry = step->blocks[s].table[j];
            kvl_block_layout layout;
            KT_OK(f->cache, kvl_cache_layout(f->cache, 0, (entry & KVL_ENTRY_EXACT) != 0, &layout));
            at[n] = step->block_address[entry & KVL_ENTRY_ID];
            size[n] = layout.block_bytes;
            assert_int_not_equal(at[n], 0);
            assert_int_equal(at[n] % 128, 0);
            for (uint32_t i = 0; i < n; i++)
                assert_true(at[i] + size[i] <= at[n] || at[n] + size[n] <= at[i]);
            n++;
        }
    }
    assert_int_equal(n, 4 * 6);
    KT_OK(f->cache, kvl_step_abort(f->cache, step));
    for (int i = 0; i < 4; i++) kt_close(f->cache, &q[i]);
}

/* Equal graph keys mean equal shapes with memory where it was; a move of memory changes the key. */
static void test_graph_key(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = kt_desc(&f->env, LAYERS, 16, NULL);
    const kvl_step *step;
    uint64_t keys[4];
    kvl_span spans[2];
    kt_seq q[2];
    make(f, desc);
    memset(spans, 0, sizeof spans);
    for (int i = 0; i < 2; i++) {
        q[i] = start(f, 1000 * i, 60);
        feed(f, &q[i], 30);
        spans[i].seq = q[i].seq;
        spans[i].tokens = q[i].stream.tokens + 30;
        spans[i].n_tokens = 1;
    }
    for (int i = 0; i < 4; i++) { /* two sequences; one; one with 2 rows; two, after a resize */
        if (i == 2) spans[0].n_tokens = 2;
        if (i == 3) {
            spans[0].n_tokens = 1;
            KT_OK(f->cache, kvl_cache_resize(f->cache, desc.device_bytes / 2, NULL));
        }
        KT_OK(f->cache, kvl_step_begin(f->cache, spans, i % 3 ? 1 : 2, &step));
        keys[i] = step->graph_key;
        KT_OK(f->cache, kvl_step_abort(f->cache, step));
        KT_OK(f->cache, kvl_step_begin(f->cache, spans, i % 3 ? 1 : 2, &step));
        assert_int_equal(step->graph_key, keys[i]);
        KT_OK(f->cache, kvl_step_abort(f->cache, step));
        for (int k = 0; k < i; k++) assert_int_not_equal(keys[i], keys[k]);
    }
    for (int i = 0; i < 2; i++) kt_close(f->cache, &q[i]);
}

/* ---------------------------------------------------------------- abort */

/* Any step can be aborted at any point, any number of times, without a trace. */
static void test_abort_leaves_no_trace(void **state) {
    fixture *f = (fixture *)*state;
    static const char *const presets[] = {"f16", NULL};
    for (int p = 0; p < 2; p++) {
        kt_seq a, b;
        make(f, kt_desc(&f->env, LAYERS, 16, presets[p]));
        a = start(f, 0, 400);
        feed(f, &a, 40);
        b = a;
        kt_stream_copy(&b.stream, &a.stream, 40);
        kt_push_range(&b.stream, 700, 360);
        KT_OK(f->cache, kvl_seq_fork(f->cache, a.seq, &b.seq, NULL));
        for (uint32_t n = 1; n <= 120; n += 7) {
            kvl_stats before = kt_stats(f->cache), after;
            for (uint32_t layers = 0; layers <= LAYERS; layers++) {
                const kvl_step *step;
                kvl_span span;
                kt_stream *stream = &b.stream;
                uint32_t length = 0;
                memset(&span, 0, sizeof span);
                span.seq = b.seq;
                span.tokens = b.stream.tokens + b.length;
                span.n_tokens = n;
                KT_OK(f->cache, kvl_step_begin(f->cache, &span, 1, &step));
                kt_shadow_step(&f->shadow, step, &stream);
                KT_VALID(f->cache);
                kt_attend(f->cache, step, layers);
                KT_OK(f->cache, kvl_step_abort(f->cache, step));
                KT_OK(f->cache, kvl_seq_length(f->cache, b.seq, &length));
                assert_int_equal(length, b.length);
                KT_VALID(f->cache);
            }
            after = kt_stats(f->cache);
            assert_int_equal(kt_used(&before), kt_used(&after));
            assert_int_equal(before.blocks_shared[1], after.blocks_shared[1]);
            assert_int_equal(kt_cached(&before), kt_cached(&after));
            assert_int_equal(before.nodes, after.nodes);
        }
        feed(f, &a, 100); /* both go on as if nothing had been */
        feed(f, &b, 100);
        kt_close(f->cache, &a);
        kt_close(f->cache, &b);
        unmake(f);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_block_counts, setup, teardown),
        cmocka_unit_test_setup_teardown(test_one_class, setup, teardown),
        cmocka_unit_test_setup_teardown(test_no_sinks_and_many, setup, teardown),
        cmocka_unit_test_setup_teardown(test_keep_nothing, setup, teardown),
        cmocka_unit_test_setup_teardown(test_fork_copies_the_open_block, setup, teardown),
        cmocka_unit_test_setup_teardown(test_fork_both_write, setup, teardown),
        cmocka_unit_test_setup_teardown(test_trim_rules, setup, teardown),
        cmocka_unit_test_setup_teardown(test_trim_one_class, setup, teardown),
        cmocka_unit_test_setup_teardown(test_trim_a_fork, setup, teardown),
        cmocka_unit_test_setup_teardown(test_trim_behind_window, setup, teardown),
        cmocka_unit_test_setup_teardown(test_window_with_sink_tokens, setup, teardown),
        cmocka_unit_test_setup_teardown(test_extend, setup, teardown),
        cmocka_unit_test_setup_teardown(test_extend_two_classes, setup, teardown),
        cmocka_unit_test_setup_teardown(test_extend_gives_back, setup, teardown),
        cmocka_unit_test_setup_teardown(test_budget_holds, setup, teardown),
        cmocka_unit_test_setup_teardown(test_can_fit_is_true, setup, teardown),
        cmocka_unit_test_setup_teardown(test_resize, setup, teardown),
        cmocka_unit_test_setup_teardown(test_resize_sweep, setup, teardown),
        cmocka_unit_test_setup_teardown(test_compaction, setup, teardown),
        cmocka_unit_test_setup_teardown(test_slabs_change_class, setup, teardown),
        cmocka_unit_test_setup_teardown(test_addresses_are_disjoint, setup, teardown),
        cmocka_unit_test_setup_teardown(test_graph_key, setup, teardown),
        cmocka_unit_test_setup_teardown(test_abort_leaves_no_trace, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
