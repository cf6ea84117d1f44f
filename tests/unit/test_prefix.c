/* The prefix tree through the public API: what matches, what never does, what stays, what goes first. */
#define KVL_IMPLEMENTATION
#include "../common/kvl_test.h"

#define LAYERS 2
#define T 16

typedef struct fixture {
    kt_env env;
    kvl_cache_desc desc;
    kvl_layer layers[LAYERS];
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

static kt_seq stream_in(uint64_t name_space, uint64_t salt) {
    kt_seq q;
    memset(&q, 0, sizeof q);
    kt_stream_init(&q.stream, name_space, salt);
    return q;
}

static kt_seq start(fixture *f, int32_t first, uint32_t n) {
    kt_seq q = stream_in(0, 0);
    kt_push_range(&q.stream, first, n);
    kt_open(f->cache, &q, 0);
    return q;
}

/* Opens, runs and closes tokens first..first+n: they are cached then. */
static void leave_by(fixture *f, int32_t first, uint32_t n, uint32_t priority, uint32_t chunk) {
    kt_seq q = stream_in(0, 0);
    kt_push_range(&q.stream, first, n);
    kt_open(f->cache, &q, priority);
    kt_feed_all(f->cache, &f->shadow, LAYERS, &q, chunk);
    kt_close(f->cache, &q);
}
static void leave(fixture *f, int32_t first, uint32_t n, uint32_t priority) {
    leave_by(f, first, n, priority, 50);
}

/* Opens first..first+shared and then `more` tokens that are like no others; checks what was reused; runs it;
   closes. */
static kvl_reuse reopen(fixture *f, int32_t first, uint32_t shared, uint32_t more) {
    static int32_t other = 1 << 28;
    kt_seq q = stream_in(0, 0);
    kvl_reuse reuse;
    kt_push_range(&q.stream, first, shared);
    kt_push_range(&q.stream, other, more);
    other += 1000;
    kt_open(f->cache, &q, 0);
    reuse = q.reuse;
    KT_VALID(f->cache);
    kt_feed_all(f->cache, &f->shadow, LAYERS, &q, 40);
    KT_VALID(f->cache);
    kt_close(f->cache, &q);
    return reuse;
}

#define REUSED(r, n_matched, why)                                                                         \
    do {                                                                                                  \
        kvl_reuse reuse_ = (r);                                                                           \
        KT_CHECK(reuse_.matched == (n_matched) && reuse_.reason == (why), "matched %u (%s), not %u (%s)", \
                 reuse_.matched, kvl_match_reason_text(reuse_.reason), (uint32_t)(n_matched),             \
                 kvl_match_reason_text(why));                                                             \
    } while (0)

/* ---------------------------------------------------------------- how far a match goes */

typedef struct match_case {
    const char *preset;
    uint32_t cached, shared, more; /* tokens cached, shared with them, and others after */
    uint32_t matched;
    kvl_match_reason reason;
} match_case;

static const match_case match_cases[] = {
    /* the whole, partial leaf included, and on from there */
    {NULL, 100, 100, 20, 100, KVL_MATCH_END},
    {"f16", 100, 100, 20, 100, KVL_MATCH_END},
    {NULL, 96, 96, 20, 96, KVL_MATCH_END},
    /* exactly the same tokens: one must be left to run */
    {NULL, 100, 100, 0, 99, KVL_MATCH_ALL},
    {"f16", 100, 100, 0, 99, KVL_MATCH_ALL},
    {"f16", 96, 96, 0, 95, KVL_MATCH_ALL},
    {NULL, 96, 96, 0, 80, KVL_MATCH_ALL}, /* the last block is packed: from its start */
    {NULL, 97, 97, 0, 96, KVL_MATCH_ALL},
    {NULL, 1, 1, 0, 0, KVL_MATCH_ALL},
    {NULL, 2, 2, 0, 1, KVL_MATCH_ALL},
    {NULL, 16, 16, 0, 15, KVL_MATCH_ALL}, /* the first block stays exact */
    /* fewer than are cached */
    {"f16", 100, 50, 0, 49, KVL_MATCH_ALL},
    {NULL, 100, 50, 0, 48, KVL_MATCH_ALL},
    {NULL, 100, 9, 0, 8, KVL_MATCH_ALL},
    /* others from inside a block */
    {"f16", 100, 40, 20, 40, KVL_MATCH_TOKEN},
    {NULL, 100, 40, 20, 32, KVL_MATCH_FORMAT},
    {NULL, 100, 32, 20, 32, KVL_MATCH_TOKEN},
    {NULL, 100, 7, 20, 7, KVL_MATCH_TOKEN},
    {NULL, 100, 98, 20, 98, KVL_MATCH_TOKEN}, /* from inside the partial leaf */
    {NULL, 100, 0, 20, 0, KVL_MATCH_TOKEN},
    {NULL, 10, 10, 20, 10, KVL_MATCH_END},
    {NULL, 10, 4, 20, 4, KVL_MATCH_TOKEN},
};

static void test_match_lengths(void **state) {
    fixture *f = (fixture *)*state;
    for (size_t i = 0; i < KT_COUNT(match_cases); i++) {
        const match_case *m = &match_cases[i];
        kvl_reuse r;
        snprintf(kt_where, sizeof kt_where, "case %zu", i);
        make(f, kt_desc(&f->env, LAYERS, T, m->preset));
        leave(f, 0, m->cached, 0);
        r = reopen(f, 0, m->shared, m->more);
        REUSED(r, m->matched, m->reason);
        if (m->reason == KVL_MATCH_TOKEN) assert_int_equal(r.first_differing, m->shared);
        assert_int_equal(r.restored, 0);
        /* what the first left is still whole */
        r = reopen(f, 0, m->cached, 20);
        KT_CHECK(r.matched + T > m->cached, "%u of %u are left", r.matched, m->cached);
        unmake(f);
    }
    kt_where[0] = 0;
}

static void test_empty_cache(void **state) {
    fixture *f = (fixture *)*state;
    kvl_seq_desc sdesc;
    kvl_reuse reuse;
    kt_seq q;
    make(f, kt_desc(&f->env, LAYERS, T, NULL));
    q = start(f, 0, 40);
    REUSED(q.reuse, 0, KVL_MATCH_EMPTY);
    kt_feed_all(f->cache, &f->shadow, LAYERS, &q, 40);
    memset(&sdesc, 0, sizeof sdesc); /* told not to look */
    sdesc.tokens = q.stream.tokens;
    sdesc.n_tokens = 40;
    sdesc.no_match = true;
    {
        kvl_seq other;
        KT_OK(f->cache, kvl_seq_open(f->cache, &sdesc, &other, &reuse));
        REUSED(reuse, 0, KVL_MATCH_EMPTY);
        assert_int_equal(reuse.recomputed, 40);
        KT_OK(f->cache, kvl_seq_close(f->cache, other));
    }
    kt_close(f->cache, &q);
}

/* A sequence still open shares its full blocks already. */
static void test_match_with_an_open_sequence(void **state) {
    fixture *f = (fixture *)*state;
    kvl_stats s;
    kt_seq a, b;
    make(f, kt_desc(&f->env, LAYERS, T, NULL));
    a = start(f, 0, 90);
    kt_feed_all(f->cache, &f->shadow, LAYERS, &a, 33);
    b = stream_in(0, 0);
    kt_push_range(&b.stream, 0, 90);
    kt_push_range(&b.stream, 5000, 30);
    kt_open(f->cache, &b, 0);
    assert_int_equal(b.length, 80);
    s = kt_stats(f->cache);
    assert_int_equal(s.blocks_shared[0] + s.blocks_shared[1], 5);
    assert_int_equal(kt_used(&s), 6);
    kt_feed_all(f->cache, &f->shadow, LAYERS, &b, 7);
    kt_close(f->cache, &a);
    kt_push_range(&b.stream, 8000, 9);
    kt_feed_all(f->cache, &f->shadow, LAYERS, &b, 7);
    kt_close(f->cache, &b);
}

/* The next turn of a chat takes the open block of the last one: nothing is recomputed, nothing copied. */
static void test_turns_take_the_leaf(void **state) {
    fixture *f = (fixture *)*state;
    kt_seq q;
    make(f, kt_desc(&f->env, LAYERS, T, NULL));
    q = stream_in(0, 0);
    for (int turn = 0; turn < 30; turn++) {
        uint32_t before = q.stream.n;
        kt_push_range(&q.stream, 1000 * turn, 11);
        kt_open(f->cache, &q, 0);
        KT_CHECK(q.reuse.matched == before, "turn %d: matched %u of %u", turn, q.reuse.matched, before);
        kt_feed_all(f->cache, &f->shadow, LAYERS, &q, 16);
        KT_OK(f->cache, kvl_seq_close(f->cache, q.seq));
        KT_VALID(f->cache);
    }
    assert_int_equal(f->shadow.copies, 0);
    {
        kvl_stats s = kt_stats(f->cache);
        assert_int_equal(kt_cached(&s), (330 + T - 1) / T); /* no leaf is left behind */
        assert_int_equal(s.opened, 30);
        assert_int_equal(s.hit_tokens, 11 * 29 * 30 / 2);
        assert_int_equal(s.open_tokens, 11 * 30 * 31 / 2);
    }
    kt_stream_free(&q.stream);
}

/* Two go on from one leaf: one takes it, the other gets at least the full blocks; and both are right. */
static void test_two_want_the_leaf(void **state) {
    fixture *f = (fixture *)*state;
    kt_seq q[3];
    make(f, kt_desc(&f->env, LAYERS, T, NULL));
    leave(f, 0, 42, 0);
    for (int i = 0; i < 3; i++) {
        q[i] = stream_in(0, 0);
        kt_push_range(&q[i].stream, 0, 42);
        kt_push_range(&q[i].stream, 1000 * (i + 1), 30);
        kt_open(f->cache, &q[i], 0);
        KT_CHECK(q[i].length == (i ? q[i].length : 42) && q[i].length >= 32, "%d: %u", i, q[i].length);
        KT_VALID(f->cache);
    }
    for (int round = 0; round < 10; round++) {
        for (int i = 0; i < 3; i++) {
            uint32_t left = q[i].stream.n - q[i].length;
            if (left) KT_OK(f->cache, kt_try_feed(f->cache, &f->shadow, LAYERS, &q[i], left < 5 ? left : 5));
        }
    }
    for (int i = 0; i < 3; i++) kt_close(f->cache, &q[i]);
}

/* Of several leaves under one block the one that shares most is used. */
static void test_best_leaf(void **state) {
    fixture *f = (fixture *)*state;
    kt_seq q;
    make(f, kt_desc(&f->env, LAYERS, T, NULL));
    for (uint32_t shared = 1; shared < 14;
         shared += 4) { /* 32 tokens, then leaves that share 1, 5, 9, 13 with 0.. */
        q = stream_in(0, 0);
        kt_push_range(&q.stream, 0, 32 + shared);
        kt_push_range(&q.stream, 7000 + 100 * (int32_t)shared, 15 - shared);
        kt_open(f->cache, &q, 0);
        kt_feed_all(f->cache, &f->shadow, LAYERS, &q, 100);
        kt_close(f->cache, &q);
    }
    REUSED(reopen(f, 0, 32 + 14, 10), 32 + 13, KVL_MATCH_TOKEN);
    REUSED(reopen(f, 0, 32 + 7, 10), 32 + 7, KVL_MATCH_TOKEN);
}

/* A trim into cached blocks, then other tokens: the tree's blocks are not written. */
static void test_trim_does_not_write_the_tree(void **state) {
    fixture *f = (fixture *)*state;
    static const char *const presets[] = {"f16", NULL};
    for (int p = 0; p < 2; p++) {
        uint32_t length = 0;
        kt_seq q;
        make(f, kt_desc(&f->env, LAYERS, T, presets[p]));
        q = start(f, 0, 70);
        kt_feed_all(f->cache, &f->shadow, LAYERS, &q, 100);
        KT_OK(f->cache, kvl_seq_trim(f->cache, q.seq, 9, &length));
        assert_int_equal(length, 9);
        q.length = q.stream.n = 9;
        kt_push_range(&q.stream, 4000, 50);
        kt_feed_all(f->cache, &f->shadow, LAYERS, &q, 11);
        REUSED(reopen(f, 0, 64, 30), 64, KVL_MATCH_END);
        kt_close(f->cache, &q);
        REUSED(reopen(f, 0, 64, 20), 64, KVL_MATCH_TOKEN);
        unmake(f);
    }
}

/* ---------------------------------------------------------------- what never matches */

static void test_namespaces_and_salts(void **state) {
    fixture *f = (fixture *)*state;
    static const uint64_t who[][2] = {{0, 0},          {1, 0},          {0, 1},         {1, 1},
                                      {UINT64_MAX, 0}, {0, UINT64_MAX}, {1ull << 32, 0}};
    make(f, kt_desc(&f->env, LAYERS, T, NULL));
    for (size_t i = 0; i < KT_COUNT(who); i++) { /* the same tokens for all: each computes its own */
        kt_seq q = stream_in(who[i][0], who[i][1]);
        kt_push_range(&q.stream, 0, 50);
        kt_open(f->cache, &q, 0);
        REUSED(q.reuse, 0, i ? KVL_MATCH_NAMESPACE : KVL_MATCH_EMPTY);
        kt_feed_all(f->cache, &f->shadow, LAYERS, &q, 20);
        kt_close(f->cache, &q);
    }
    for (size_t i = 0; i < KT_COUNT(who); i++) {
        kt_seq q = stream_in(who[i][0], who[i][1]);
        kt_push_range(&q.stream, 0, 50);
        kt_push_range(&q.stream, 900, 5);
        kt_open(f->cache, &q, 0);
        REUSED(q.reuse, 50, KVL_MATCH_END);
        kt_feed_all(f->cache, &f->shadow, LAYERS, &q, 20);
        kt_close(f->cache, &q);
    }
    assert_int_equal(kt_stats(f->cache).duplicate_blocks, 0);
}

/* With one bit of hash nearly everything collides: matches are those of a full hash, and all content is
   right. */
static void test_forced_collisions(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = kt_desc(&f->env, LAYERS, 8, NULL);
    uint32_t matched[2][400];
    uint64_t total = 0;
    for (int full = 0; full < 2; full++) {
        kt_rng rng = {77};
        desc.lookup_hash_bits = full ? 0 : 1;
        desc.device_bytes = 16u << 20;
        make(f, desc);
        for (int i = 0; i < 400; i++) {
            kt_seq q = stream_in(kt_below(&rng, 2), kt_below(&rng, 2));
            uint32_t n = kt_between(&rng, 1, 60);
            for (uint32_t k = 0; k < n; k++)
                kt_push(&q.stream, (int32_t)(k / 8 * 10 + kt_below(&rng, k % 8 ? 1 : 3)));
            kt_open(f->cache, &q, 0);
            matched[full][i] = q.reuse.matched;
            total += q.reuse.matched;
            kt_feed_all(f->cache, &f->shadow, LAYERS, &q, 64);
            kt_close(f->cache, &q);
            if (i % 16 == 0) KT_VALID(f->cache);
        }
        unmake(f);
    }
    assert_memory_equal(matched[0], matched[1], sizeof matched[0]);
    assert_true(total > 2 * 400 * 5); /* it did reuse */
}

/* Random prompts over few tokens: a match is exactly the longest common prefix that the rules allow. */
static void test_match_is_the_longest(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = kt_desc(&f->env, LAYERS, 8, "f16");
    enum { N = 300 };
    static int32_t seen[N][64];
    static uint32_t lengths[N];
    kt_rng rng = {5};
    desc.device_bytes = 16u << 20; /* nothing is evicted */
    make(f, desc);
    for (uint32_t i = 0; i < N; i++) {
        kt_seq q = stream_in(0, 0);
        uint32_t best = 0, full = 0;
        lengths[i] = kt_between(&rng, 2, 60);
        for (uint32_t k = 0; k < lengths[i]; k++) {
            seen[i][k] = (int32_t)kt_below(&rng, k % 5 == 0 ? 3 : 1);
            kt_push(&q.stream, seen[i][k]);
        }
        for (uint32_t j = 0; j < i; j++) {
            uint32_t common = 0;
            while (common < lengths[i] - 1 && common < lengths[j] && seen[i][common] == seen[j][common])
                common++;
            if (common > best) best = common;
        }
        full = best - best % 8;
        kt_open(f->cache, &q, 0);
        /* one class: rows are shared to the token; a leaf that another took, and grew, is found as a full
           block */
        KT_CHECK(q.length <= best && q.length >= full, "prompt %u: matched %u of %u common", i, q.length,
                 best);
        KT_CHECK(q.length == best, "prompt %u: matched %u of %u common", i, q.length, best);
        kt_feed_all(f->cache, &f->shadow, LAYERS, &q, 64);
        kt_close(f->cache, &q);
    }
}

/* Two compute the same blocks at once: at commit one copy is kept and shared. */
static void test_duplicates_are_freed(void **state) {
    fixture *f = (fixture *)*state;
    kvl_stats s;
    kt_seq a, b;
    make(f, kt_desc(&f->env, LAYERS, T, NULL));
    a = start(f, 0, 100);
    b = start(f, 0, 100);
    assert_int_equal(b.length, 0);
    for (int i = 0; i < 10; i++) {
        KT_OK(f->cache, kt_try_feed(f->cache, &f->shadow, LAYERS, &a, 10));
        KT_OK(f->cache, kt_try_feed(f->cache, &f->shadow, LAYERS, &b, 10));
        KT_VALID(f->cache);
    }
    s = kt_stats(f->cache);
    assert_int_equal(s.blocks_shared[0] + s.blocks_shared[1], 6);
    assert_int_equal(kt_used(&s), 8);
    assert_int_equal(s.duplicate_blocks, 6);
    kt_close(f->cache, &a);
    kt_close(f->cache, &b);
}

/* ---------------------------------------------------------------- windows */

static kvl_cache_desc windows(fixture *f, uint32_t window, uint32_t sinks, const char *preset) {
    kvl_cache_desc desc = kt_desc(&f->env, LAYERS, T, preset);
    memset(f->layers, 0, sizeof f->layers);
    f->layers[1].window = window;
    f->layers[1].sink_tokens = sinks;
    desc.geometry.layers = f->layers;
    return desc;
}

/* With memory to spare, blocks behind the window stay in the tree: a hit anywhere is whole. */
static void test_window_hits(void **state) {
    fixture *f = (fixture *)*state;
    make(f, windows(f, 32, 0, "f16"));
    leave(f, 0, 200, 0);
    REUSED(reopen(f, 0, 100, 40), 100, KVL_MATCH_TOKEN);
    REUSED(reopen(f, 0, 200, 40), 200, KVL_MATCH_END);
    unmake(f);
    make(f, windows(f, 32, 0, NULL));
    leave(f, 0, 200, 0);
    REUSED(reopen(f, 0, 100, 40), 96, KVL_MATCH_FORMAT);
    REUSED(reopen(f, 0, 200, 40), 200, KVL_MATCH_END);
}

/* A hit needs [R-W+1, R) and the sinks in the window's group. When those have gone it is lowered, perhaps to
   0. */
static void test_window_rule(void **state) {
    fixture *f = (fixture *)*state;
    for (uint32_t sinks = 0; sinks <= 16; sinks += 16) {
        kvl_cache_desc desc = windows(f, 32, sinks, "f16");
        kvl_stats s;
        kt_seq a, b;
        desc.device_bytes = kt_budget(&desc, 36);
        desc.geometry.layers = f->layers;
        make(f, desc);
        a = start(f, 0, 320);
        kt_feed_all(f->cache, &f->shadow, LAYERS, &a,
                    16); /* 20 full, ≥ 2 window; the rest of the window's are cached */
        s = kt_stats(f->cache);
        assert_true(kt_used(&s) >= 22 && kt_used(&s) <= 25 && kt_cached(&s) > 0);
        b = start(f, 9000, 90); /* needs room: the window's old blocks go, oldest first */
        kt_feed_all(f->cache, &f->shadow, LAYERS, &b, 20);
        s = kt_stats(f->cache);
        assert_true(s.evicted_blocks > 0);
        kt_close(f->cache, &b);
        kt_close(f->cache, &a);
        /* the end of a is whole: its last window and (with sinks) its first block were held */
        {
            kvl_reuse r = reopen(f, 0, 320, 20);
            REUSED(r, 320, KVL_MATCH_END);
        }
        unmake(f);
        /* now with so little room that a's old window blocks cannot stay */
        desc.device_bytes = kt_budget(&desc, 29);
        make(f, desc);
        leave_by(f, 0, 320, 0, 16);
        {
            kvl_reuse r = reopen(f, 0, 160, 1);
            KT_CHECK(r.matched <= 32 && r.reason == KVL_MATCH_EVICTED, "matched %u (%s)", r.matched,
                     kvl_match_reason_text(r.reason));
        }
        unmake(f);
    }
}

/* Recomputing what a window lost fills the empty slots again: the next hit is whole. */
static void test_window_slots_are_filled_again(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = windows(f, 32, 0, "f16");
    desc.max_device_bytes = kt_budget(&desc, 200);
    desc.device_bytes = kt_budget(&desc, 29);
    desc.geometry.layers = f->layers;
    make(f, desc);
    leave_by(f, 0, 320, 0, 16);
    KT_OK(f->cache, kvl_cache_resize(f->cache, desc.max_device_bytes, NULL));
    assert_true(reopen(f, 0, 160, 1).matched <= 32);
    {
        uint64_t duplicates = kt_stats(f->cache).duplicate_blocks;
        KT_CHECK(duplicates > 0, "%s", "the full-attention blocks were there already");
    }
    assert_int_equal(reopen(f, 0, 160, 1).matched, 160);
    assert_int_equal(reopen(f, 0, 100, 1).matched, 100);
}

/* ---------------------------------------------------------------- pins and eviction */

/* Fills the cache with other sequences until `bytes` of turnover have gone through it. */
static void flood(fixture *f, uint32_t sequences, uint32_t priority) {
    static int32_t next = 1 << 24;
    for (uint32_t i = 0; i < sequences; i++) {
        leave(f, next, 64, priority);
        next += 1000;
    }
}

/* After a flood, the first 64 tokens are still there. */
static void still_there(fixture *f, uint32_t expected) {
    kt_seq q;
    flood(f, 20, 7);
    q = stream_in(0, 0);
    kt_push_range(&q.stream, 0, 64);
    kt_push_range(&q.stream, 1 << 29, 6);
    kt_open(f->cache, &q, 0);
    KT_CHECK(q.length == expected, "%u of 64 tokens are left, not %u", q.length, expected);
    kt_close(f->cache, &q);
}

static void test_pins(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = kt_desc(&f->env, LAYERS, T, "f16");
    kvl_seq_desc pinned;
    uint32_t n = 0;
    kvl_stats s;
    kt_seq a, b;
    desc.device_bytes = kt_budget(&desc, 16);
    make(f, desc);
    a = start(f, 0, 72);
    kt_feed_all(f->cache, &f->shadow, LAYERS, &a, 100);
    b = start(f, 0, 72);
    KT_OK(f->cache, kvl_seq_pin(f->cache, a.seq, true));
    KT_OK(f->cache, kvl_seq_pin(f->cache, a.seq, true)); /* a sequence pins once, */
    KT_OK(f->cache, kvl_seq_pin(f->cache, b.seq, true)); /* several count */
    KT_VALID(f->cache);
    kt_close(f->cache, &a);
    kt_close(f->cache, &b);
    s = kt_stats(f->cache);
    assert_int_equal(s.blocks_pinned[1], 4);
    KT_VALID(f->cache);
    still_there(f, 64);
    KT_CHECK(kt_stats(f->cache).evicted_blocks > 40, "%s", "the flood was too small");
    memset(&pinned, 0, sizeof pinned);
    a = stream_in(0, 0);
    kt_push_range(&a.stream, 0, 90);
    pinned.tokens = a.stream.tokens;
    pinned.n_tokens = a.stream.n;
    pinned.name_space = 1; /* another's */
    KT_OK(f->cache, kvl_prefix_unpin(f->cache, &pinned, &n));
    assert_int_equal(n, 0);
    pinned.name_space = 0;
    KT_OK(f->cache, kvl_prefix_unpin(f->cache, &pinned, &n));
    assert_int_equal(n, 64);
    KT_VALID(f->cache);
    still_there(f, 64); /* one pin is left */
    KT_OK(f->cache, kvl_prefix_unpin(f->cache, &pinned, &n));
    assert_int_equal(n, 64);
    KT_VALID(f->cache);
    s = kt_stats(f->cache);
    assert_int_equal(s.blocks_pinned[0] + s.blocks_pinned[1], 0);
    still_there(f, 0);
    KT_OK(f->cache, kvl_prefix_unpin(f->cache, &pinned, &n));
    assert_int_equal(n, 0);
    kt_stream_free(&a.stream);
    KT_RESULT(KVL_INVALID_ARG, f->cache, kvl_prefix_unpin(f->cache, NULL, &n));
}

/* An open sequence moves its pin as it grows, and takes it back. */
static void test_pin_moves_and_comes_off(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = kt_desc(&f->env, LAYERS, T, "f16");
    kt_seq a;
    desc.device_bytes = kt_budget(&desc, 16);
    make(f, desc);
    a = start(f, 0, 64);
    KT_OK(f->cache, kt_try_feed(f->cache, &f->shadow, LAYERS, &a, 32));
    KT_OK(f->cache, kvl_seq_pin(f->cache, a.seq, true));
    KT_VALID(f->cache);
    KT_OK(f->cache, kt_try_feed(f->cache, &f->shadow, LAYERS, &a, 32));
    KT_OK(f->cache, kvl_seq_pin(f->cache, a.seq, true));
    KT_VALID(f->cache);
    kt_close(f->cache, &a);
    still_there(f, 64);
    {
        kvl_seq_desc d;
        kt_seq q = stream_in(0, 0);
        kt_push_range(&q.stream, 0, 65);
        memset(&d, 0, sizeof d);
        d.tokens = q.stream.tokens;
        d.n_tokens = q.stream.n;
        KT_OK(f->cache, kvl_prefix_unpin(f->cache, &d, NULL));
        kt_open(f->cache, &q, 0);
        assert_int_equal(q.length, 64);
        KT_OK(f->cache, kvl_seq_pin(f->cache, q.seq, true));
        KT_OK(f->cache, kvl_seq_pin(f->cache, q.seq, false));
        KT_OK(f->cache, kvl_seq_pin(f->cache, q.seq, false));
        kt_close(f->cache, &q);
    }
    still_there(f, 0);
}

/* Pinned blocks count against the budget: they are never taken, also when nothing else is left. */
static void test_pins_are_hard(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = kt_desc(&f->env, LAYERS, T, "f16");
    uint64_t held = 0;
    kt_seq a, b;
    desc.device_bytes = kt_budget(&desc, 9);
    make(f, desc);
    a = start(f, 0, 96);
    kt_feed_all(f->cache, &f->shadow, LAYERS, &a, 100);
    KT_OK(f->cache, kvl_seq_pin(f->cache, a.seq, true));
    kt_close(f->cache, &a);
    b = start(f, 5000, 64);
    KT_RESULT(KVL_NO_BLOCKS, f->cache, kt_try_feed(f->cache, &f->shadow, LAYERS, &b, 64));
    KT_OK(f->cache, kt_try_feed(f->cache, &f->shadow, LAYERS, &b, 48));
    KT_RESULT(KVL_NO_BLOCKS, f->cache, kt_try_feed(f->cache, &f->shadow, LAYERS, &b, 1));
    kt_close(f->cache, &b);
    KT_RESULT(KVL_NO_BLOCKS, f->cache, kvl_cache_resize(f->cache, 0, &held));
    assert_true(held > 0);
    KT_OK(f->cache, kvl_cache_resize(f->cache, desc.device_bytes, &held));
    REUSED(reopen(f, 0, 96, 20), 96, KVL_MATCH_END);
}

/* Least recently used first, and leaf first: what is left of each is a prefix of it. */
static void test_eviction_by_recency(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = kt_desc(&f->env, LAYERS, T, "f16");
    desc.device_bytes = kt_budget(&desc, 13);
    make(f, desc);
    leave(f, 0, 64, 0); /* 4 blocks each */
    leave(f, 1000, 64, 0);
    leave(f, 2000, 64, 0);
    reopen(f, 0, 64, 1);   /* the oldest is used again: 12 full, and a leaf */
    leave(f, 3000, 32, 0); /* takes 2: the tail of 1000 */
    REUSED(reopen(f, 1000, 64, 1), 32, KVL_MATCH_EVICTED);
    unmake(f);
    make(f, desc);
    leave(f, 0, 64, 0);
    leave(f, 1000, 64, 0);
    leave(f, 2000, 64, 0);
    reopen(f, 0, 64, 1);
    leave(f, 3000, 32, 0);
    assert_int_equal(reopen(f, 0, 64, 1).matched, 64);
    assert_int_equal(reopen(f, 2000, 48, 1).matched, 48);
}

/* What was found again outlives what never was, though that came later; not for ever. */
static void test_eviction_spares_what_was_found_again(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = kt_desc(&f->env, LAYERS, T, "f16");
    desc.device_bytes = kt_budget(&desc, 40);
    make(f, desc);
    for (int32_t i = 0; i < 8; i++) flood(f, 10, 0); /* how long blocks stay is known from those that went */
    leave(f, 0, 64, 0);
    leave(f, 1000, 64, 0);
    for (int i = 0; i < 3; i++) assert_int_equal(reopen(f, 0, 64, 1).matched, 64);
    flood(f, 12, 0); /* enough to turn all of it over once */
    assert_int_equal(reopen(f, 1000, 64, 1).matched, 0);
    assert_int_equal(reopen(f, 0, 64, 1).matched, 64);
    flood(f, 60, 0);
    assert_int_equal(reopen(f, 0, 64, 1).matched, 0);
}

static void test_eviction_by_priority(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = kt_desc(&f->env, LAYERS, T, "f16");
    desc.device_bytes = kt_budget(&desc, 16);
    make(f, desc);
    leave(f, 0, 64, 5); /* oldest, kept longest */
    leave(f, 1000, 64, 2);
    leave(f, 2000, 64, 0); /* newest, goes first */
    flood(f, 3, 2);        /* 12 blocks of priority 2 through 4 free ones, 2000's, and then 1000's */
    assert_int_equal(reopen(f, 0, 64, 1).matched, 64);
    assert_int_equal(reopen(f, 2000, 64, 1).matched, 0);
    unmake(f);
    make(f, desc);
    leave(f, 0, 64, 5);
    flood(f, 20, 4);
    assert_int_equal(reopen(f, 0, 64, 1).matched, 64);
    flood(f, 20, 7);
    assert_int_equal(reopen(f, 0, 64, 1).matched, 0);
}

/* A prefix shared with more important work takes its priority: it never goes before what hangs on it. */
static void test_shared_prefix_keeps_the_highest_priority(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache_desc desc = kt_desc(&f->env, LAYERS, T, "f16");
    kt_seq q;
    desc.device_bytes = kt_budget(&desc, 16);
    make(f, desc);
    leave(f, 0, 48, 0); /* 3 blocks */
    q = stream_in(0, 0);
    kt_push_range(&q.stream, 0, 48);
    kt_push_range(&q.stream, 5000, 32); /* 2 more, important */
    kt_open(f->cache, &q, 6);
    assert_int_equal(q.length, 48);
    kt_feed_all(f->cache, &f->shadow, LAYERS, &q, 100);
    kt_close(f->cache, &q);
    flood(f, 20, 3);
    q = stream_in(0, 0);
    kt_push_range(&q.stream, 0, 48);
    kt_push_range(&q.stream, 5000, 33);
    kt_open(f->cache, &q, 0);
    assert_int_equal(q.length, 80);
    kt_close(f->cache, &q);
}

/* Random turnover over a small budget: whatever goes, matches are right and the tree holds together. */
static void test_eviction_under_load(void **state) {
    fixture *f = (fixture *)*state;
    for (int kind = 0; kind < 4; kind++) {
        kvl_cache_desc desc = kind & 1 ? windows(f, 24, kind & 2 ? 8 : 0, NULL)
                                       : kt_desc(&f->env, LAYERS, T, kind ? "f16" : NULL);
        kt_rng rng = {(uint64_t)kind + 9};
        uint64_t reused = 0;
        desc.device_bytes = kt_budget(&desc, 40);
        make(f, desc);
        for (int i = 0; i < 300; i++) {
            kt_seq q = stream_in(0, kt_below(&rng, 2));
            uint32_t n = kt_between(&rng, 1, 150);
            for (uint32_t k = 0; k < n; k++) kt_push(&q.stream, (int32_t)(k % 32 ? 0 : kt_below(&rng, 3)));
            kt_open(f->cache, &q, kt_below(&rng, 8));
            reused += q.reuse.matched;
            kt_feed_all(f->cache, &f->shadow, LAYERS, &q, kt_between(&rng, 1, 64));
            kt_close(f->cache, &q);
            KT_VALID(f->cache);
        }
        KT_CHECK(reused > 300 * 10, "reused only %llu tokens", (unsigned long long)reused);
        assert_true(kt_stats(f->cache).evicted_blocks > 50);
        unmake(f);
    }
}

/* ---------------------------------------------------------------- NaN */

/* One step of real numbers on the CPU backend for several sequences; sequence `bad` (whose answers are not
   looked at) gets `poison` at position `bad_position`, in K (side 0) or V of layer 1. */
static void run_numbers(fixture *f, kt_seq *q, uint32_t n_seqs, uint32_t n, uint32_t bad,
                        uint32_t bad_position, int side, float poison) {
    static float qd[128 * 32], kd[128 * 16], vd[128 * 16], od[128 * 32];
    kvl_tensor t[4];
    const kvl_step *step;
    kvl_span spans[4];
    memset(t, 0, sizeof t);
    memset(spans, 0, sizeof spans);
    t[0].data = qd;
    t[1].data = kd;
    t[2].data = vd;
    t[3].data = od;
    for (uint32_t i = 0; i < n_seqs; i++) {
        spans[i].seq = q[i].seq;
        spans[i].tokens = q[i].stream.tokens + q[i].length;
        spans[i].n_tokens = n;
    }
    KT_OK(f->cache, kvl_step_begin(f->cache, spans, n_seqs, &step));
    for (uint32_t l = 0; l < LAYERS; l++) {
        for (uint32_t i = 0; i < n_seqs * n * 32; i++) qd[i] = 0.5f;
        for (uint32_t i = 0; i < n_seqs * n * 16; i++) kd[i] = vd[i] = 0.25f;
        if (l == 1 && bad < n_seqs && bad_position >= q[bad].length && bad_position < q[bad].length + n) {
            uint32_t row = step->spans[bad].first_row + bad_position - q[bad].length;
            (side ? vd : kd)[row * 16 + 3] = poison;
        }
        KT_OK(f->cache, kvl_attend(f->cache, step, l, &t[0], &t[1], &t[2], &t[3]));
        for (uint32_t i = 0; i < n_seqs; i++) { /* the others' answers are numbers */
            if (i == bad) continue;
            for (uint32_t r = 0; r < n * 32; r++) {
                float x = od[step->spans[i].first_row * 32 + r];
                KT_CHECK(x == x && fabsf(x) < 1e3f, "layer %u sequence %u: %g", l, i, (double)x);
            }
        }
    }
    KT_OK(f->cache, kvl_step_end(f->cache, step));
    for (uint32_t i = 0; i < n_seqs; i++) q[i].length += n;
}

static void test_tainted_is_never_reused(void **state) {
    fixture *f = (fixture *)*state;
    static const float poisons[] = {NAN, INFINITY, -INFINITY, 1e6f /* overflows F16 */};
    for (int which = 0; which < 8; which++) {
        kvl_cache_desc desc = kt_desc(&f->env, LAYERS, T, which & 1 ? "f16" : NULL);
        kvl_reuse r;
        kvl_seq child;
        kt_seq q[3];
        desc.context_desc.backend = KVL_BACKEND_CPU;
        make(f, desc);
        for (int i = 0; i < 3; i++) q[i] = start(f, 1000 * i, 80);
        run_numbers(f, q, 3, 20, 1, 45, which & 1, poisons[which / 2]);
        assert_false(kvl_seq_tainted(f->cache, q[1].seq));
        run_numbers(f, q, 3, 30, 1, 45, which & 1, poisons[which / 2]);
        assert_true(kvl_seq_tainted(f->cache, q[1].seq));
        assert_false(kvl_seq_tainted(f->cache, q[0].seq));
        assert_false(kvl_seq_tainted(f->cache, q[2].seq));
        run_numbers(f, q, 3, 30, 1, 0, 0, 0); /* goes on */
        assert_true(kvl_seq_tainted(f->cache, q[1].seq));
        KT_OK(f->cache, kvl_seq_fork(f->cache, q[1].seq, &child, NULL));
        assert_true(kvl_seq_tainted(f->cache, child));
        KT_OK(f->cache, kvl_seq_close(f->cache, child));
        KT_VALID(f->cache);
        for (int i = 0; i < 3; i++) kt_close(f->cache, &q[i]);
        for (int i = 0; i < 3; i++) {
            kt_seq again = stream_in(0, 0);
            kt_push_range(&again.stream, 1000 * i, 80);
            kt_push(&again.stream, 7);
            kt_open(f->cache, &again, 0);
            r = again.reuse;
            if (i == 1)
                KT_CHECK(r.matched <= 20, "%u tokens of a tainted sequence", r.matched);
            else
                KT_CHECK(r.matched == 80, "%u of an untouched one", r.matched);
            kt_close(f->cache, &again);
        }
        assert_int_equal(kt_stats(f->cache).tainted_sequences, 1);
        unmake(f);
    }
}

/* A poisoned step that is aborted has not happened. */
static void test_abort_of_a_tainted_step(void **state) {
    fixture *f = (fixture *)*state;
    static float nan_rows[16 * 32], out[16 * 32];
    kvl_cache_desc desc = kt_desc(&f->env, LAYERS, T, NULL);
    const kvl_step *step;
    kvl_tensor t, o;
    kvl_span span;
    kt_seq q;
    desc.context_desc.backend = KVL_BACKEND_CPU;
    make(f, desc);
    for (size_t i = 0; i < KT_COUNT(nan_rows); i++) nan_rows[i] = NAN;
    q = start(f, 0, 40);
    memset(&t, 0, sizeof t);
    memset(&span, 0, sizeof span);
    t.data = nan_rows;
    o = t;
    o.data = out;
    span.seq = q.seq;
    span.tokens = q.stream.tokens;
    span.n_tokens = 16;
    KT_OK(f->cache, kvl_step_begin(f->cache, &span, 1, &step));
    for (uint32_t l = 0; l < LAYERS; l++) KT_OK(f->cache, kvl_attend(f->cache, step, l, &t, &t, &t, &o));
    KT_OK(f->cache, kvl_step_abort(f->cache, step));
    assert_false(kvl_seq_tainted(f->cache, q.seq));
    run_numbers(f, &q, 1, 40, 1, 0, 0, 0);
    assert_false(kvl_seq_tainted(f->cache, q.seq));
    kt_close(f->cache, &q);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_match_lengths, setup, teardown),
        cmocka_unit_test_setup_teardown(test_empty_cache, setup, teardown),
        cmocka_unit_test_setup_teardown(test_match_with_an_open_sequence, setup, teardown),
        cmocka_unit_test_setup_teardown(test_turns_take_the_leaf, setup, teardown),
        cmocka_unit_test_setup_teardown(test_two_want_the_leaf, setup, teardown),
        cmocka_unit_test_setup_teardown(test_best_leaf, setup, teardown),
        cmocka_unit_test_setup_teardown(test_trim_does_not_write_the_tree, setup, teardown),
        cmocka_unit_test_setup_teardown(test_namespaces_and_salts, setup, teardown),
        cmocka_unit_test_setup_teardown(test_forced_collisions, setup, teardown),
        cmocka_unit_test_setup_teardown(test_match_is_the_longest, setup, teardown),
        cmocka_unit_test_setup_teardown(test_duplicates_are_freed, setup, teardown),
        cmocka_unit_test_setup_teardown(test_window_hits, setup, teardown),
        cmocka_unit_test_setup_teardown(test_window_rule, setup, teardown),
        cmocka_unit_test_setup_teardown(test_window_slots_are_filled_again, setup, teardown),
        cmocka_unit_test_setup_teardown(test_pins, setup, teardown),
        cmocka_unit_test_setup_teardown(test_pin_moves_and_comes_off, setup, teardown),
        cmocka_unit_test_setup_teardown(test_pins_are_hard, setup, teardown),
        cmocka_unit_test_setup_teardown(test_eviction_by_recency, setup, teardown),
        cmocka_unit_test_setup_teardown(test_eviction_spares_what_was_found_again, setup, teardown),
        cmocka_unit_test_setup_teardown(test_eviction_by_priority, setup, teardown),
        cmocka_unit_test_setup_teardown(test_shared_prefix_keeps_the_highest_priority, setup, teardown),
        cmocka_unit_test_setup_teardown(test_eviction_under_load, setup, teardown),
        cmocka_unit_test_setup_teardown(test_tainted_is_never_reused, setup, teardown),
        cmocka_unit_test_setup_teardown(test_abort_of_a_tainted_step, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
