/* The event trace: what any workload records replays to the same bytes, on the null backend whatever it was recorded
   on; broken traces are named and never crash; a failing write changes nothing else. */
#define KVL_IMPLEMENTATION
#include "../common/kvl_world.h"
#include "../../tools/trace/replay.h"

#include <unistd.h>

/* ---------------------------------------------------------------- a recording in memory */

typedef struct tape {
    uint8_t *bytes;
    size_t n, capacity;
    uint32_t writes, fail_at; /* this write (from 1) takes half of what it is given; 0 = none */
} tape;

static size_t tape_write(void *user, const void *data, size_t size) {
    tape *t = (tape *)user;
    size_t take = ++t->writes == t->fail_at ? size / 2 : size;
    if (t->n + take > t->capacity) {
        t->capacity = 2 * (t->n + take);
        t->bytes = (uint8_t *)realloc(t->bytes, t->capacity);
        assert_non_null(t->bytes);
    }
    memcpy(t->bytes + t->n, data, take);
    t->n += take;
    return take;
}

static void tape_free(tape *t) {
    free(t->bytes);
    memset(t, 0, sizeof *t);
}

static uint64_t word(const uint8_t *at, unsigned n) {
    uint64_t x = 0;
    while (n--) x = x << 8 | at[n];
    return x;
}

/* What the chunks of a tape hold. */
static uint8_t *tape_payload(const tape *t, size_t *n) {
    uint8_t *out = (uint8_t *)malloc(t->n);
    assert_non_null(out);
    *n = 0;
    for (size_t at = 12; at < t->n;) {
        size_t size = (size_t)word(t->bytes + at, 4);
        memcpy(out + *n, t->bytes + at + 8, size);
        *n += size;
        at += 8 + size;
    }
    return out;
}

/* A trace of one chunk with a right checksum, of any payload. */
static tape tape_of(const uint8_t *payload, size_t n) {
    tape t;
    uint8_t *b = (uint8_t *)calloc(1, n + 28);
    uint64_t h = 0;
    assert_non_null(b);
    memcpy(b, "KVLEVENT\1\0\0\0", 12);
    memcpy(b + 20, payload, n);
    for (size_t i = 0; i < n; i += 8) {
        h ^= word(b + 20 + i, 8);
        h *= 0xD6E8FEB86659FD93u;
        h ^= h >> 32;
    }
    for (int i = 0; i < 4; i++) {
        b[12 + i] = (uint8_t)(n >> 8 * i);
        b[16 + i] = (uint8_t)(h >> 8 * i);
    }
    memset(&t, 0, sizeof t);
    t.bytes = b;
    t.n = n + 20;
    return t;
}

/* Replays; what is recorded then must be the tape if the replay says so. */
static struct replay_report replayed(const tape *t) {
    tape again;
    struct replay_report report;
    memset(&again, 0, sizeof again);
    struct replay_options options = {.max_bytes = 64u << 20, .copy = tape_write, .copy_user = &again};
    replay_bytes(t->bytes, t->n, &options, &report);
    KT_CHECK(report.text[0], "status %d has no text", (int)report.status);
    KT_CHECK(report.offset <= t->n, "offset %llu of %zu", (unsigned long long)report.offset, t->n);
    if (report.status == REPLAY_EQUAL && t->writes) /* a whole recording, not one made by tape_of */
        KT_CHECK(again.n == t->n && memcmp(again.bytes, t->bytes, t->n) == 0,
                 "%zu bytes of %zu are not the same", again.n, t->n);
    tape_free(&again);
    return report;
}

/* ---------------------------------------------------------------- random workloads */

enum { MAX_REQUESTS = 200, MAX_OWN = 6, MAX_LAYERS = 3, MAX_ROWS = 160 };

typedef struct own_seq { /* of the app, beside the scheduler */
    kvl_seq seq;
    uint32_t length;
    int32_t tokens[512];
    bool pinned;
} own_seq;

typedef struct work {
    kt_env env;
    uint64_t seed;
    kt_rng rng;
    kvl_layer layers[MAX_LAYERS];
    kvl_cache_desc desc;
    kvl_sched_desc sdesc;
    kvl_cache *cache;
    kvl_sched *sched;
    bool cpu, taints, no_pins;
    kvl_req reqs[MAX_REQUESTS];
    uint32_t n_reqs;
    own_seq own[MAX_OWN];
    uint32_t n_own;
    int32_t pinned[512]; /* the prefix that was pinned last */
    uint32_t n_pinned;
    uint64_t plans; /* hash over all steps: made from the public step alone */
    float rows[MAX_ROWS * 2 * 16];
} work;

static struct totals { /* so that the tests can tell that they tested something */
    uint64_t plans, preemptions, refused, aborts, forks, cancels, tainted, resizes, recoveries, calls, copies,
        evicted, idle;
} totals;

static void random_desc(work *w) {
    static const char *const presets[] = {NULL, "f16", "bf16", "fp8", "int4"};
    kt_rng *rng = &w->rng;
    uint32_t layers = kt_between(rng, 1, MAX_LAYERS), sizes[] = {8, 16, 32};
    const char *preset = presets[kt_below(rng, 5)];
    uint32_t T = preset && strcmp(preset, "int4") == 0 ? 32 : sizes[kt_below(rng, 3)];
    kvl_cache_desc *d = &w->desc;
    *d = kt_desc(&w->env, layers, T, preset);
    if (w->cpu) d->context_desc.backend = KVL_BACKEND_CPU;
    for (uint32_t l = 0; l < layers && kt_chance(rng, 40); l++) {
        w->layers[l].window = kt_between(rng, 1, 4 * T);
        w->layers[l].sink_tokens = kt_below(rng, T);
        if (kt_chance(rng, 30)) w->layers[l].k_format = KVL_FP8_E4M3;
        if (kt_chance(rng, 30)) w->layers[l].v_format = (kvl_format)KVL_INT8 | (kvl_format)KVL_ROTATED;
    }
    d->geometry.layers = w->layers;
    if (kt_chance(rng, 20)) d->geometry.sink_blocks = KVL_NONE;
    d->max_sequences = kt_between(rng, 4, 12);
    d->max_step_tokens = kt_between(rng, T, MAX_ROWS);
    d->max_seq_tokens = kt_between(rng, 3 * T, 12 * T);
    d->lookup_hash_bits = kt_chance(rng, 30) ? 3 : 0;
    d->no_prefix_cache = kt_chance(rng, 10);
    d->device_bytes = kt_budget(d, kt_between(rng, 12, 50));
    d->max_device_bytes = d->device_bytes + (kt_chance(rng, 50) ? d->device_bytes / 2 : 0);
    if (w->seed % 4 == 3) d->slab_granularity = 4096; /* slabs end where pages do */
    kvl_sched_desc *s = &w->sdesc;
    s->policy = (kvl_policy)kt_below(rng, 3);
    s->max_running = kt_chance(rng, 50) ? 0 : kt_between(rng, 2, 6);
    s->max_waiting = kt_chance(rng, 50) ? 0 : kt_between(rng, 3, 20);
    s->token_pool_bytes = kt_chance(rng, 70) ? 0 : 16384;
    s->max_gap_ms = kt_chance(rng, 60) ? kt_between(rng, 2, 30) : 0;
    s->refuse_over_gap = kt_chance(rng, 50);
    s->min_chunk = kt_below(rng, 3) * 4;
    s->fixed_cost = kt_chance(rng, 30);
    if (s->fixed_cost || kt_chance(rng, 30)) s->cost = (kvl_cost){1.0, 0.1, 0.3, 0.7, 0.4};
}

/* Prompts that often begin alike. */
static uint32_t random_prompt(work *w, int32_t *to, uint32_t most) {
    uint32_t n = kt_between(&w->rng, 1, most);
    int32_t base = kt_chance(&w->rng, 20) ? INT32_MIN : (int32_t)kt_below(&w->rng, 3) * 100000;
    for (uint32_t i = 0; i < n; i++)
        to[i] = kt_chance(&w->rng, 2) ? (int32_t)kt_random(&w->rng) : base + (int32_t)(i % 50);
    return n;
}

static void do_submit(work *w) {
    int32_t tokens[512], stop[2] = {7, -1};
    kvl_request q;
    uint32_t most = w->desc.max_seq_tokens < 500 ? w->desc.max_seq_tokens : 500;
    memset(&q, 0, sizeof q);
    if (w->n_reqs == MAX_REQUESTS) return;
    q.tokens = tokens;
    q.n_tokens = random_prompt(w, tokens, most);
    q.max_new_tokens = kt_chance(&w->rng, 10) ? 0 : kt_between(&w->rng, 1, 12);
    q.stop_tokens = stop;
    q.n_stop_tokens = kt_chance(&w->rng, 30) ? 2 : 0;
    q.klass = kt_chance(&w->rng, 30) ? KVL_BACKGROUND : KVL_INTERACTIVE;
    q.priority = kt_below(&w->rng, 8);
    q.name_space = kt_chance(&w->rng, 20) ? kt_random(&w->rng) % 2 : 0;
    q.salt = kt_chance(&w->rng, 10) ? UINT64_MAX : 0;
    q.no_match = kt_chance(&w->rng, 10);
    q.no_keep = kt_chance(&w->rng, 10);
    if (kvl_sched_submit(w->sched, &q, &w->reqs[w->n_reqs]) == KVL_OK) w->n_reqs++;
}

static void do_fork(work *w) {
    if (!w->n_reqs || w->n_reqs == MAX_REQUESTS) return;
    kvl_req of = w->reqs[w->n_reqs - 1 - kt_below(&w->rng, w->n_reqs < 6 ? w->n_reqs : 6)];
    if (kvl_sched_fork(w->sched, of, NULL, &w->reqs[w->n_reqs]) != KVL_OK) return;
    w->n_reqs++;
    totals.forks++;
}

static void hash_step(work *w, const kvl_step *step) {
    uint64_t h = w->plans;
    for (uint32_t i = 0; i < step->n_tokens; i++)
        h = kt_mix(h ^ (uint32_t)step->tokens[i] ^ (uint64_t)step->positions[i] << 32);
    for (uint32_t i = 0; i < step->n_logits; i++) h = kt_mix(h ^ step->logit_rows[i]);
    for (uint32_t i = 0; i < step->n_groups * step->n_spans; i++) {
        const kvl_span_blocks *b = &step->blocks[i];
        for (uint32_t j = 0; j < b->n_blocks; j++) h = kt_mix(h ^ b->table[j]);
        for (uint32_t j = 0; j < b->n_own; j++) h = kt_mix(h ^ b->own[j]);
    }
    w->plans = h;
    totals.copies += step->n_copies;
}

static void run_layers(work *w, const kvl_step *step) {
    uint8_t tainted[64] = {0};
    uint32_t bad = w->taints && kt_chance(&w->rng, 5) ? kt_below(&w->rng, step->n_spans) : KVL_NONE;
    kvl_tensor t = {.data = w->rows}, out = {.data = NULL};
    static float to[MAX_ROWS * 2 * 16];
    out.data = to;
    assert_true(step->n_spans <= 64 && step->n_tokens <= MAX_ROWS);
    for (uint32_t i = 0; i < step->n_tokens * 32; i++) w->rows[i] = (float)(i % 17) / 16;
    if (bad != KVL_NONE) {
        tainted[bad] = 1;
        w->rows[step->spans[bad].first_row * 16] =
            NAN; /* k and v have one head of 16; q, of 32, sees it elsewhere */
    }
    for (uint32_t l = 0; l < w->desc.geometry.n_layers; l++)
        KT_OK(w->cache, w->cpu ? kvl_attend(w->cache, step, l, &t, &t, &t, &out)
                               : kvl_step_layer_done(w->cache, step, l, tainted));
    kt_advance_ms(&w->env, 0.5 + step->n_tokens * 0.05 + kt_below(&w->rng, 1000) / 300.0);
}

static kvl_result do_step(work *w) {
    const kvl_step *step = NULL;
    kvl_output out[256];
    kvl_result r = kvl_sched_plan(w->sched, &step);
    if (r == KVL_IDLE) totals.idle++;
    if (r != KVL_OK) return r;
    totals.plans++;
    hash_step(w, step);
    kt_advance_ms(&w->env, 0.01);
    if (kt_chance(&w->rng, 5)) {
        KT_OK(w->cache, kvl_sched_abort(w->sched, step));
        return r;
    }
    run_layers(w, step);
    assert_true(step->n_logits <= 256);
    memset(out, 0xff, sizeof out); /* a token that is none is never read */
    for (uint32_t i = 0; i < step->n_logits; i++) {
        out[i].no_token = kt_chance(&w->rng, 2);
        out[i].finish = out[i].no_token || kt_chance(&w->rng, 4);
        out[i].token = (int32_t)kt_below(&w->rng, 40) - 5;
    }
    KT_OK(w->cache, kvl_sched_commit_ex(w->sched, step, out));
    return r;
}

static void do_resize(work *w) {
    uint64_t max = w->desc.max_device_bytes,
             bytes = kt_chance(&w->rng, 20) ? 0 : max / 4 * kt_between(&w->rng, 1, 4);
    kvl_result r = kvl_cache_resize(w->cache, bytes, NULL);
    assert_true(r == KVL_OK || r == KVL_NO_BLOCKS);
    totals.resizes++;
}

/* As if the device had been lost: all that was there is forgotten. */
static void do_recover(work *w) {
    KT_OK(w->cache, kvl_cache_recover(w->cache));
    KT_VALID(w->cache);
    kvl_stats s = kt_stats(w->cache);
    KT_CHECK(kt_used(&s) == 0 && s.bytes_cached == 0 && s.running == 0, "%u blocks, %u running", kt_used(&s),
             s.running);
    for (uint32_t i = 0; i < w->n_own; i++) {
        uint32_t length = 1;
        KT_OK(w->cache, kvl_seq_length(w->cache, w->own[i].seq, &length));
        KT_CHECK(length == 0, "%u tokens are left", length);
        w->own[i].length = 0;
        w->own[i].pinned = false;
    }
    totals.recoveries++;
}

/* ---- calls beside the scheduler ---- */
static void own_forget(work *w, uint32_t i) { w->own[i] = w->own[--w->n_own]; }

static void own_open(work *w) {
    own_seq *o = &w->own[w->n_own];
    kvl_seq_desc d;
    kvl_reuse reuse;
    memset(&d, 0, sizeof d);
    if (w->n_own == MAX_OWN) return;
    memset(o, 0, sizeof *o);
    d.tokens = o->tokens;
    d.n_tokens = random_prompt(w, o->tokens, w->desc.max_seq_tokens);
    d.priority = kt_below(&w->rng, 8);
    if (kvl_seq_open(w->cache, &d, &o->seq, &reuse) != KVL_OK) return;
    o->length = reuse.matched;
    w->n_own++;
}

static void own_step(work *w) {
    const kvl_step *step = NULL;
    kvl_span spans[MAX_OWN];
    uint32_t n = kt_between(&w->rng, 1, w->n_own), rows[MAX_OWN];
    memset(spans, 0, sizeof spans);
    for (uint32_t i = 0; i < n; i++) {
        own_seq *o = &w->own[i];
        uint32_t room = w->desc.max_seq_tokens - o->length, most = w->desc.max_step_tokens / MAX_OWN;
        rows[i] = kt_between(&w->rng, 1, most < room || !room ? most : room);
        spans[i].seq = w->own[kt_chance(&w->rng, 3) ? 0 : i].seq; /* now and then one twice: refused */
        spans[i].tokens = o->tokens + o->length;
        spans[i].n_tokens = rows[i];
        spans[i].n_logits = kt_below(&w->rng, 2);
    }
    if (kvl_step_begin(w->cache, spans, n, &step) != KVL_OK) return;
    hash_step(w, step);
    run_layers(w, step);
    if (kt_chance(&w->rng, 20)) {
        KT_OK(w->cache, kvl_step_abort(w->cache, step));
        return;
    }
    KT_OK(w->cache, kvl_step_end(w->cache, step));
    for (uint32_t i = 0; i < n; i++) w->own[i].length += rows[i];
}

static void own_copy(work *w) {
    kvl_req_info info;
    own_seq *to = &w->own[w->n_own];
    kvl_seq from = {0};
    if (w->n_own == MAX_OWN) return;
    memset(to, 0, sizeof *to);
    if (w->n_own && kt_chance(&w->rng, 50)) {
        *to = w->own[kt_below(&w->rng, w->n_own)];
        from = to->seq;
        to->pinned = false;
    } else if (w->n_reqs &&
               kvl_sched_info(w->sched, w->reqs[kt_below(&w->rng, w->n_reqs)], &info) == KVL_OK) {
        from = info.seq; /* a running request's, or none */
    }
    if (from.id && kvl_seq_fork(w->cache, from, &to->seq, &to->length) == KVL_OK) w->n_own++;
}

static void own_pin(work *w, own_seq *o) {
    kvl_seq_desc d;
    memset(&d, 0, sizeof d);
    if (w->no_pins) return;
    if (w->n_pinned && kt_chance(&w->rng, 60)) {
        d.tokens = w->pinned;
        d.n_tokens = w->n_pinned;
        KT_OK(w->cache, kvl_prefix_unpin(w->cache, &d, NULL));
        w->n_pinned = 0;
    } else if (kvl_seq_pin(w->cache, o->seq, !o->pinned) == KVL_OK) {
        o->pinned = !o->pinned;
        w->n_pinned = o->length;
        memcpy(w->pinned, o->tokens, sizeof w->pinned);
    }
}

static void do_call(work *w) {
    uint32_t i = w->n_own ? kt_below(&w->rng, w->n_own) : 0;
    totals.calls++;
    if (!w->n_own || kt_chance(&w->rng, 25)) {
        own_open(w);
        return;
    }
    switch (kt_below(&w->rng, 7)) {
    case 0: kvl_seq_extend(w->cache, w->own[i].seq, kt_below(&w->rng, 64)); break;
    case 1: own_copy(w); break;
    case 2:
        KT_OK(w->cache, kvl_seq_trim(w->cache, w->own[i].seq, kt_below(&w->rng, w->own[i].length + 1),
                                     &w->own[i].length));
        break;
    case 3: own_pin(w, &w->own[i]); break;
    case 4:
        KT_OK(w->cache, kvl_seq_close(w->cache, w->own[i].seq));
        own_forget(w, i);
        break;
    default: own_step(w); break;
    }
}

static void work_open(work *w, uint64_t seed, bool cpu, tape *t) {
    memset(w, 0, sizeof *w);
    kt_env_init(&w->env);
    w->rng.state = seed << 32;
    w->seed = seed;
    w->cpu = cpu;
    w->taints = seed % 2;
    random_desc(w);
    w->sdesc.record = t ? tape_write : NULL;
    w->sdesc.record_user = t;
    KT_OK(NULL, kvl_cache_create(&w->desc, &w->cache));
    KT_OK(w->cache, kvl_sched_create(w->cache, &w->sdesc, &w->sched));
}

static void work_close(work *w) {
    kvl_stats s = kt_stats(w->cache);
    totals.preemptions += s.preemptions;
    totals.refused += s.refused;
    totals.aborts += s.aborts;
    totals.cancels += s.cancelled;
    totals.tainted += s.tainted_sequences;
    totals.evicted += s.evicted_blocks;
    kvl_sched_destroy(w->sched);
    kvl_cache_destroy(w->cache);
    kt_env_check(&w->env);
}

static void work_run(work *w, uint32_t operations) {
    for (uint32_t i = 0; i < operations; i++) {
        uint32_t what = kt_below(&w->rng, 100);
        kt_advance_ms(&w->env, kt_below(&w->rng, 3));
        if (what < 15)
            do_submit(w);
        else if (what < 18)
            do_fork(w);
        else if (what < 21 && w->n_reqs)
            kvl_sched_cancel(w->sched, w->reqs[kt_below(&w->rng, w->n_reqs)]);
        else if (what < 23)
            kt_chance(&w->rng, 10) ? do_recover(w) : do_resize(w);
        else if (what < 31)
            do_call(w);
        else
            do_step(w);
        if (i % 64 == 0) KT_VALID(w->cache);
    }
    if (kt_chance(&w->rng, 50)) {
        kvl_sched_close(w->sched);
        KT_OK(w->cache, kvl_cache_resize(w->cache, w->desc.max_device_bytes, NULL));
        for (int i = 0; i < 300 && do_step(w) == KVL_OK; i++) {
        }
    }
}

/* Records a workload; returns the hash of its steps. */
static uint64_t recorded(uint64_t seed, bool cpu, uint32_t operations, tape *t) {
    work *w = (work *)malloc(sizeof *w);
    assert_non_null(w);
    snprintf(kt_where, sizeof kt_where, "seed %llu%s", (unsigned long long)seed, cpu ? ", cpu" : "");
    work_open(w, seed, cpu, t);
    work_run(w, operations);
    uint64_t plans = w->plans;
    work_close(w);
    free(w);
    return plans;
}

static void expect(enum replay_status status, const struct replay_report *r) {
    KT_CHECK(r->status == status, "status %d: %s", (int)r->status, r->text);
}

/* ---------------------------------------------------------------- the tests */

static void check_workloads(bool cpu, uint32_t n, uint32_t operations) {
    memset(&totals, 0, sizeof totals);
    for (uint64_t seed = 1; seed <= n; seed++) {
        tape t = {0};
        recorded(seed, cpu, operations, &t);
        uint64_t plans = totals.plans;
        struct replay_report report = replayed(&t);
        expect(REPLAY_EQUAL, &report);
        totals.plans = plans;
        tape_free(&t);
    }
    kt_where[0] = '\0';
    const struct totals *a = &totals;
    KT_CHECK(
        a->plans > n * operations / 8 && a->preemptions && a->refused && a->aborts && a->forks &&
            a->cancels && a->tainted && a->resizes && a->recoveries && a->calls && a->copies && a->evicted &&
            a->idle,
        "%llu plans, %llu preemptions, %llu refused, %llu aborts, %llu forks, %llu cancels, %llu tainted",
        (unsigned long long)a->plans, (unsigned long long)a->preemptions, (unsigned long long)a->refused,
        (unsigned long long)a->aborts, (unsigned long long)a->forks, (unsigned long long)a->cancels,
        (unsigned long long)a->tainted);
}

static void test_replays_null(void **state) {
    (void)state;
    check_workloads(false, 300, 400);
}

static void test_replays_cpu(void **state) {
    (void)state;
    check_workloads(true, 60, 300);
}

/* The same plans with a recording, without one, and with one that fails. */
static void test_recording_changes_nothing(void **state) {
    (void)state;
    for (uint64_t seed = 1; seed <= 20; seed++) {
        tape t = {0}, broken = {.fail_at = (uint32_t)seed};
        uint64_t off = recorded(seed, false, 300, NULL), on = recorded(seed, false, 300, &t);
        uint64_t failing = recorded(seed, false, 300, &broken);
        assert_true(off == on && off == failing);
        assert_int_equal(broken.writes, seed); /* it is not called again */
        struct replay_report report = replayed(&broken);
        expect(seed > 1 ? REPLAY_INCOMPLETE : REPLAY_BAD, &report);
        tape_free(&t);
        tape_free(&broken);
    }
}

static void test_failing_write(void **state) {
    (void)state;
    tape t = {.fail_at = 3};
    kt_world *w = (kt_world *)calloc(1, sizeof *w);
    kvl_sched_desc d = {.record = tape_write, .record_user = &t};
    kt_world_init(w);
    kt_world_open(w, kt_desc(&w->env, 1, 16, NULL), &d);
    for (int i = 0; i < 3; i++) kt_world_submit(w, 100 * i, 20, 8, NULL);
    assert_int_equal(kt_world_step(w), KVL_OK); /* the first chunk; the beginning was the first write */
    assert_false(kt_stats(w->cache).record_failed);
    assert_int_equal(kt_stats(w->cache).record_bytes, t.n);
    assert_int_equal(w->env.logs, 0);
    assert_int_equal(kt_world_run(w, 100), KVL_IDLE);
    assert_true(kt_stats(w->cache).record_failed);
    assert_int_equal(kt_stats(w->cache).record_bytes, t.n);
    assert_int_equal(w->env.logs, 1);
    assert_int_equal(t.writes, 3);
    for (int i = 0; i < 3; i++) kt_world_answer_is(w, w->answers[i], KVL_FINISH_LENGTH, 8);
    kt_world_close(w);
    free(w);
    struct replay_report report = replayed(&t);
    expect(REPLAY_INCOMPLETE, &report);
    assert_int_equal(report.plans, 1);
    tape_free(&t);
}

/* The bytes are those of the description in kvlite.h. */
static void test_bytes(void **state) {
    (void)state;
    /* A line for each event, or part of one. */
    /* clang-format off */
    static const uint8_t expected[] = {
        KVL_EVENT_SUBMIT, 0x80, 0xa8, 0xd6, 0xb9, 0x07, /* clock: 10^9, as 2 * 10^9 */
        8 * 3 + 4, 5, 0, 1, 0xc8, 0x01, 3, 10, 2, 11, 2, /* no_keep, priority 3; namespace 5; stop 100; 5, 6, 0; 2 more */
        KVL_EVENT_PLAN, 0, KVL_OK, 0, 0, 1, 1, 0, 0, 0, 3, 3, 'd', 'd', 'd', 'd', 'd', 'd', 'd', 'd', /* rows 0..3 */
        KVL_EVENT_COMMIT, 0x80, 0x89, 0x7a, 0, 1, 17, /* 1 ms later: -9 */
        KVL_EVENT_FORK, 0, 0, /* of request 0 */
        KVL_EVENT_PLAN, 0, KVL_OK, 0, 0, 1, 2, 0, 1, 'd', 'd', 'd', 'd', 'd', 'd', 'd', 'd', /* decodes, 2 logits */
        KVL_EVENT_COMMIT, 0x80, 0x89, 0x7a, 1, 2, 40, 0, 2, 3, /* 20 and the end; the end without a token */
        KVL_EVENT_CLOSE,
        KVL_EVENT_PLAN, 0, KVL_DRAINED, 0, 0, /* nothing is left */
        KVL_EVENT_END, 'd', 'd', 'd', 'd', 'd', 'd', 'd', 'd',
    };
    /* clang-format on */
    tape all = {0}, none = {0};
    kt_env env;
    size_t n, n_none;
    for (int run = 0; run < 2; run++) {
        kvl_sched_desc d = {.record = tape_write, .record_user = run ? &all : &none};
        kt_env_init(&env);
        kvl_cache_desc desc = kt_desc(&env, 1, 16, NULL);
        int32_t tokens[] = {5, 6, 0}, stop = 100;
        kvl_request q = {
            .tokens = tokens, .n_tokens = 3, .max_new_tokens = 2, .stop_tokens = &stop, .n_stop_tokens = 1};
        kvl_cache *c;
        kvl_sched *s;
        kvl_req req, fork;
        const kvl_step *step;
        kvl_output out[2] = {{.token = -9}};
        q.priority = 3;
        q.no_keep = true;
        q.name_space = 5;
        KT_OK(NULL, kvl_cache_create(&desc, &c));
        KT_OK(c, kvl_sched_create(c, &d, &s));
        for (int i = 0; run && i < 2; i++) {
            if (i == 0) KT_OK(c, kvl_sched_submit(s, &q, &req));
            if (i == 1) KT_OK(c, kvl_sched_fork(s, req, NULL, &fork));
            KT_OK(c, kvl_sched_plan(s, &step));
            kt_attend(c, step, 1);
            kt_advance_ms(&env, 1);
            KT_OK(c, kvl_sched_commit_ex(s, step, out));
            out[0] = (kvl_output){.token = 20, .finish = true};
            out[1] = (kvl_output){.token = 77, .no_token = true, .finish = true};
        }
        if (run) {
            kvl_sched_close(s);
            assert_int_equal(kvl_sched_plan(s, &step), KVL_DRAINED);
        }
        kvl_sched_destroy(s);
        kvl_cache_destroy(c);
    }
    uint8_t *bytes = tape_payload(&all, &n), *begin = tape_payload(&none, &n_none);
    size_t description = n_none - 9;
    assert_int_equal(word(begin, 4), KVL_VERSION);
    assert_memory_equal(bytes, begin, description);
    assert_int_equal(n - description, sizeof expected);
    for (size_t i = 0; i < sizeof expected; i++)
        KT_CHECK(expected[i] == 'd' || bytes[description + i] == expected[i], "byte %zu is %02x, not %02x", i,
                 bytes[description + i], expected[i]);
    struct replay_report report = replayed(&all);
    expect(REPLAY_EQUAL, &report);
    assert_int_equal(report.events, 9);
    assert_int_equal(report.requests, 2);
    assert_int_equal(report.plans, 2);
    free(bytes);
    free(begin);
    tape_free(&all);
    tape_free(&none);
}

/* Changes one byte of what the chunks hold, with a right checksum. */
static struct replay_report tampered(const uint8_t *payload, size_t n, size_t at, uint8_t byte) {
    uint8_t *copy = (uint8_t *)malloc(n);
    assert_non_null(copy);
    memcpy(copy, payload, n);
    copy[at] = byte;
    tape t = tape_of(copy, n);
    struct replay_report report = replayed(&t);
    tape_free(&t);
    free(copy);
    return report;
}

static void test_differences_are_named(void **state) {
    (void)state;
    tape t = {0};
    size_t n;
    kt_world *w = (kt_world *)calloc(1, sizeof *w);
    kvl_sched_desc d = {.record = tape_write, .record_user = &t};
    kt_world_init(w);
    kt_world_open(w, kt_desc(&w->env, 1, 16, NULL), &d);
    kt_world_submit(w, 0, 40, 4, NULL);
    assert_int_equal(kt_world_step(w), KVL_OK);
    size_t first = t.n; /* up to here: the description, a submit, a plan, a commit */
    kt_world_run(w, 100);
    kt_world_close(w);
    free(w);
    uint8_t *bytes = tape_payload(&t, &n);
    struct replay_report r = tampered(bytes, n, n - 1, (uint8_t)(bytes[n - 1] + 1));
    expect(REPLAY_DIFFERS, &r);
    assert_non_null(strstr(r.text, "(end)"));
    assert_non_null(strstr(r.text, "digest of all plans"));
    assert_int_equal(r.offset, 20 + n - 1);
    size_t rows = 0; /* of the span at position 0: 40 of them, logits and just admitted */
    while (rows + 20 < first && !(bytes[rows] == 0 && bytes[rows + 1] == 40 && bytes[rows + 2] == 3)) rows++;
    r = tampered(bytes, n, rows + 1, 39);
    expect(REPLAY_DIFFERS, &r);
    assert_non_null(strstr(r.text, "event 2 (plan)"));
    assert_non_null(strstr(r.text, "rows of span 0: 39 was recorded, now it is 40"));
    r = tampered(bytes, n, 0, (uint8_t)(bytes[0] + 1)); /* another version of kvlite with the same plans */
    expect(REPLAY_EQUAL, &r);
    r = tampered(bytes, n, 4, 0);
    expect(REPLAY_BAD, &r);
    assert_non_null(strstr(r.text, "in use before"));
    r = tampered(bytes, n, 5, 0); /* no layers */
    expect(REPLAY_BAD, &r);
    free(bytes);
    tape_free(&t);
}

static void test_used_before(void **state) {
    (void)state;
    kt_env env;
    kvl_cache *c;
    kvl_sched *s;
    tape t = {0};
    kt_seq q;
    kvl_sched_desc d = {.record = tape_write, .record_user = &t};
    kt_env_init(&env);
    kvl_cache_desc desc = kt_desc(&env, 1, 16, NULL);
    KT_OK(NULL, kvl_cache_create(&desc, &c));
    memset(&q, 0, sizeof q);
    kt_stream_init(&q.stream, 0, 0);
    kt_push_range(&q.stream, 0, 40);
    kt_open(c, &q, 0);
    kt_feed_all(c, NULL, 1, &q, 40);
    kt_close(c, &q);
    KT_OK(c, kvl_sched_create(c, &d, &s));
    kvl_sched_destroy(s);
    kvl_cache_destroy(c);
    struct replay_report r = replayed(&t);
    expect(REPLAY_BAD, &r);
    assert_non_null(strstr(r.text, "in use before"));
    tape_free(&t);
}

/* ---- hostile files ---- */
static void test_cut_short(void **state) {
    (void)state;
    tape t = {0};
    recorded(3, false, 150, &t);
    size_t all = t.n;
    t.writes = 0;
    for (size_t n = 0; n < all; n += n < 400 || n + 400 > all ? 1 : 97) {
        t.n = n;
        struct replay_report r = replayed(&t);
        KT_CHECK(r.status == REPLAY_INCOMPLETE || (r.status == REPLAY_BAD && n <= 12),
                 "cut at %zu: status %d: %s", n, (int)r.status, r.text);
    }
    t.n = all;
    tape_free(&t);
}

static void test_flipped_bits(void **state) {
    (void)state;
    kt_rng rng = {5};
    tape t = {0};
    recorded(5, false, 150, &t);
    t.writes = 0;
    for (int i = 0; i < 1500; i++) {
        size_t at = i < 200 ? (size_t)i : kt_below(&rng, (uint32_t)t.n);
        uint8_t bit = (uint8_t)(1 << kt_below(&rng, 8));
        t.bytes[at] ^= bit;
        struct replay_report r = replayed(&t);
        KT_CHECK(r.status != REPLAY_EQUAL, "byte %zu, bit %02x: not noticed", at, bit);
        t.bytes[at] ^= bit;
    }
    tape_free(&t);
}

/* With right checksums: the decoder and the calls see the damage. */
static void test_hostile(void **state) {
    (void)state;
    static const uint8_t evil[] = {0, 1, 0x7f, 0x80, 0xff, 0x10, 0x05};
    kt_rng rng = {11};
    uint32_t seen[4] = {0};
    for (int file = 0; file < 12; file++) {
        tape t = {0};
        size_t n;
        recorded(100 + (uint64_t)file, false, 120, &t);
        uint8_t *bytes = tape_payload(&t, &n), *copy = (uint8_t *)malloc(n + 16);
        assert_non_null(copy);
        for (int i = 0; i < 250; i++) {
            size_t size = n;
            memcpy(copy, bytes, n);
            for (uint32_t k = kt_between(&rng, 1, 4); k; k--) {
                size_t at = kt_below(&rng, (uint32_t)(kt_chance(&rng, 30) ? 150 : n));
                copy[at] = kt_chance(&rng, 50) ? evil[kt_below(&rng, sizeof evil)] : (uint8_t)kt_random(&rng);
            }
            if (kt_chance(&rng, 30)) { /* an event is left out, or stands twice */
                size_t at = kt_below(&rng, (uint32_t)n - 20), m = kt_between(&rng, 1, 12);
                bool twice = kt_chance(&rng, 50);
                memmove(copy + at + (twice ? m : 0), copy + at + (twice ? 0 : m), n - at - m);
            }
            tape damaged = tape_of(copy, size);
            struct replay_report r = replayed(&damaged);
            seen[r.status]++;
            tape_free(&damaged);
        }
        free(copy);
        free(bytes);
        tape_free(&t);
    }
    KT_CHECK(seen[REPLAY_DIFFERS] > 100 && seen[REPLAY_BAD] > 100, "%u differ, %u are bad",
             seen[REPLAY_DIFFERS], seen[REPLAY_BAD]);
}

static void test_files(void **state) {
    (void)state;
    char path[] = "/tmp/test_events_XXXXXX";
    tape t = {0};
    struct replay_report r;
    recorded(1, false, 100, &t);
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, t.bytes, t.n), (long)t.n);
    close(fd);
    assert_int_equal(replay_file(path, NULL, &r), REPLAY_EQUAL);
    unlink(path);
    assert_int_equal(replay_file(path, NULL, &r), REPLAY_BAD);
    assert_non_null(strstr(r.text, "No such file"));
    assert_int_equal(replay_file("/", NULL, &r), REPLAY_BAD);
    tape_free(&t);
}

/* ---- threads ---- */
typedef struct submitter {
    work *w;
    pthread_t thread;
    uint64_t seed;
    uint32_t submitted;
} submitter;

enum { PER_THREAD = 150 };

static void *submit_many(void *arg) {
    submitter *s = (submitter *)arg;
    kt_rng rng = {s->seed};
    kvl_req mine[PER_THREAD];
    int32_t tokens[100];
    while (s->submitted < PER_THREAD) {
        kvl_request q;
        memset(&q, 0, sizeof q);
        q.tokens = tokens;
        q.n_tokens = kt_between(&rng, 1, 90);
        q.max_new_tokens = kt_between(&rng, 1, 6);
        q.klass = kt_chance(&rng, 30) ? KVL_BACKGROUND : KVL_INTERACTIVE;
        for (uint32_t i = 0; i < q.n_tokens; i++)
            tokens[i] = kt_chance(&rng, 3) ? (int32_t)kt_below(&rng, 9) : (int32_t)i;
        kt_advance_ms(&s->w->env, 0.1); /* all threads turn the clock */
        if (kvl_sched_submit(s->w->sched, &q, &mine[s->submitted]) != KVL_OK) {
            usleep(50);
            continue;
        }
        s->submitted++;
        if (kt_chance(&rng, 20)) kvl_sched_cancel(s->w->sched, mine[kt_below(&rng, s->submitted)]);
        if (kt_chance(&rng, 10)) usleep(100);
    }
    return NULL;
}

static void test_threads(void **state) {
    (void)state;
    for (uint64_t seed = 1; seed <= 6; seed++) {
        submitter s[3];
        tape t = {0};
        work *w = (work *)malloc(sizeof *w);
        assert_non_null(w);
        snprintf(kt_where, sizeof kt_where, "threads, seed %llu", (unsigned long long)seed);
        work_open(w, seed, false, &t);
        w->no_pins = true; /* pins that nobody takes off would keep requests waiting for ever */
        memset(s, 0, sizeof s);
        for (uint32_t i = 0; i < 3; i++) {
            s[i].w = w;
            s[i].seed = seed * 10 + i;
            assert_int_equal(pthread_create(&s[i].thread, NULL, submit_many, &s[i]), 0);
        }
        for (uint32_t done = 0; done < 3 * PER_THREAD;) {
            kvl_stats before = kt_stats(w->cache);
            done = (uint32_t)before.submitted - w->n_reqs;
            if (kt_chance(&w->rng, 10)) do_submit(w);
            if (kt_chance(&w->rng, 10)) do_fork(w);
            if (kt_chance(&w->rng, 3)) do_resize(w);
            if (kt_chance(&w->rng, 5)) do_call(w);
            do_step(w);
        }
        for (uint32_t i = 0; i < 3; i++) pthread_join(s[i].thread, NULL);
        work_close(w);
        free(w);
        struct replay_report r = replayed(&t);
        expect(REPLAY_EQUAL, &r);
        assert_true(r.requests >= PER_THREAD); /* those refused are not in it */
        tape_free(&t);
    }
    kt_where[0] = '\0';
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bytes),         cmocka_unit_test(test_replays_null),
        cmocka_unit_test(test_replays_cpu),   cmocka_unit_test(test_recording_changes_nothing),
        cmocka_unit_test(test_failing_write), cmocka_unit_test(test_differences_are_named),
        cmocka_unit_test(test_used_before),   cmocka_unit_test(test_cut_short),
        cmocka_unit_test(test_flipped_bits),  cmocka_unit_test(test_hostile),
        cmocka_unit_test(test_files),         cmocka_unit_test(test_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
