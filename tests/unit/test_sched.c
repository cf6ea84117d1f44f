/* The scheduler: order, chunks, gaps, classes, preemption, cancel, fork, limits, threads. */
#define KVL_IMPLEMENTATION
#include "../common/kvl_world.h"

#include <time.h>

#define LAYERS 2

static int setup(void **state) {
    kt_world *w = (kt_world *)calloc(1, sizeof *w);
    kt_world_init(w);
    *state = w;
    return 0;
}

static int teardown(void **state) {
    kt_world *w = (kt_world *)*state;
    kt_world_close(w);
    free(w);
    return 0;
}

static kvl_cache_desc small(kt_world *w, const char *preset) { return kt_desc(&w->env, LAYERS, 16, preset); }

static kvl_cache_desc tight(kt_world *w, uint32_t blocks) { /* one class, so many blocks */
    kvl_cache_desc desc = kt_desc(&w->env, LAYERS, 16, "f16");
    desc.device_bytes = kt_budget(&desc, blocks);
    return desc;
}

/* ---------------------------------------------------------------- running */

static void test_runs_all(void **state) {
    kt_world *w = (kt_world *)*state;
    kvl_stats s;
    kt_world_open(w, small(w, NULL), NULL);
    for (int i = 0; i < 12; i++)
        kt_world_submit(w, 1000 * i, 5 + 37 * (uint32_t)i % 200, 3 + (uint32_t)i, NULL);
    assert_int_equal(kt_stats(w->cache).waiting, 12);
    assert_int_equal(kt_world_run(w, 200), KVL_IDLE);
    for (uint32_t i = 0; i < 12; i++) kt_world_answer_is(w, w->answers[i], KVL_FINISH_LENGTH, 3 + i);
    s = kt_stats(w->cache);
    assert_int_equal(s.waiting + s.running, 0);
    assert_int_equal(s.submitted, 12);
    assert_int_equal(s.finished, 12);
    assert_int_equal(s.steps, w->steps);
    assert_int_equal(s.ttft_ms.count, 12);
    assert_int_equal(kt_used(&s), 0);
    assert_int_equal(s.decode_tokens, 2 * 12 + 11 * 12 / 2); /* the first of each comes from its prefill */
}

static void test_info_and_times(void **state) {
    kt_world *w = (kt_world *)*state;
    kvl_req_info info;
    kt_answer *a;
    uint64_t t0;
    w->cost.step_ms = 5;
    kt_world_open(w, small(w, NULL), NULL);
    kt_advance_ms(&w->env, 100);
    t0 = w->env.now_ns;
    a = kt_world_submit(w, 0, 200, 4, NULL);
    info = kt_info(w, a);
    assert_int_equal(info.state, KVL_REQ_WAITING);
    assert_int_equal(info.n_prompt, 200);
    assert_int_equal(info.submit_ns, t0);
    assert_int_equal(info.first_token_ns, 0);
    kt_advance_ms(&w->env, 10);
    KT_OK(w->cache, kt_world_step(w)); /* 128 of 200 */
    info = kt_info(w, a);
    assert_int_equal(info.state, KVL_REQ_PREFILL);
    assert_int_equal(info.n_computed, 128);
    assert_int_equal(info.n_generated, 0);
    assert_int_not_equal(info.seq.id, 0);
    KT_OK(w->cache, kt_world_step(w));
    info = kt_info(w, a);
    assert_int_equal(info.state, KVL_REQ_DECODE);
    assert_int_equal(info.n_computed, 200);
    assert_int_equal(info.n_generated, 1);
    assert_int_equal(info.first_token_ns, t0 + 20000000u);
    assert_int_equal(kt_world_run(w, 10), KVL_IDLE);
    info = kt_info(w, a);
    assert_int_equal(info.state, KVL_REQ_FINISHED);
    assert_int_equal(info.last_token_ns, t0 + 35000000u);
    assert_true(info.finish_ns >= info.last_token_ns);
    kt_world_answer_is(w, a, KVL_FINISH_LENGTH, 4);
}

static void test_stop_tokens(void **state) {
    kt_world *w = (kt_world *)*state;
    kvl_request extra;
    kt_answer *a, *b;
    kt_world_open(w, small(w, NULL), NULL);
    a = kt_world_submit(w, 0, 30, 20, NULL);
    assert_int_equal(kt_world_run(w, 50), KVL_IDLE);
    kt_world_answer_is(w, a, KVL_FINISH_LENGTH, 20);
    for (uint32_t n = 1; n <= 8; n++) {
        for (uint32_t at = 0; at < n;
             at++) { /* n stop tokens, of which one comes as the seventh of the answer */
            int32_t stops[8];
            for (int i = 0; i < 8; i++) stops[i] = -5 - i;
            stops[at] = a->stream.tokens[30 + 6];
            memset(&extra, 0, sizeof extra);
            extra.stop_tokens = stops;
            extra.n_stop_tokens = n;
            b = kt_world_submit(w, 0, 30, 20, &extra);
            b->seed = a->seed;              /* the same answer, up to the stop token */
            memset(stops, 0, sizeof stops); /* they were copied */
            assert_int_equal(kt_world_run(w, 50), KVL_IDLE);
            kt_world_answer_is(w, b, KVL_FINISH_STOP, 7);
            assert_memory_equal(a->stream.tokens, b->stream.tokens, 37 * sizeof(int32_t));
        }
    }
}

static void test_app_finishes(void **state) {
    kt_world *w = (kt_world *)*state;
    const kvl_step *step;
    kvl_output none;
    kt_answer *a, *b;
    kt_world_open(w, small(w, NULL), NULL);
    a = kt_world_submit(w, 0, 30, 20, NULL);
    a->finish_at = 5;
    assert_int_equal(kt_world_run(w, 50), KVL_IDLE);
    kt_world_answer_is(w, a, KVL_FINISH_APP, 5);
    b = kt_world_submit(w, 500, 30, 20, NULL);
    KT_OK(w->cache, kt_world_step(w));
    KT_OK(w->cache, kt_world_step(w));
    KT_OK(w->cache, kvl_sched_plan(w->sched, &step));
    kt_attend(w->cache, step, LAYERS);
    memset(&none, 0, sizeof none);
    none.no_token = true;
    none.finish = true;
    none.token = 12345;
    KT_OK(w->cache, kvl_sched_commit_ex(w->sched, step, &none));
    kt_world_answer_is(w, b, KVL_FINISH_APP, 2);
}

/* A prompt near max_seq_tokens: by default the answer is cut there (its last token needs no KV); more is
   refused. */
static void test_length_limit(void **state) {
    kt_world *w = (kt_world *)*state;
    kt_answer *a;
    kt_world_open(w, small(w, NULL), NULL);
    a = kt_world_submit(w, 0, 1014, 0, NULL);
    assert_int_equal(kt_world_run(w, 50), KVL_IDLE);
    kt_world_answer_is(w, a, KVL_FINISH_LENGTH, 11);
    a = kt_world_submit(w, 5000, 1014, 11, NULL);
    assert_int_equal(kt_world_run(w, 50), KVL_IDLE);
    kt_world_answer_is(w, a, KVL_FINISH_LENGTH, 11);
    a = kt_answer_new(w);
    kt_push_range(&a->stream, 0, 1014);
    assert_int_equal(kt_world_try(w, a, 12, NULL), KVL_NEVER_FITS);
    kt_answer_drop(w);
}

/* ---------------------------------------------------------------- order */

static void test_fcfs(void **state) {
    kt_world *w = (kt_world *)*state;
    kvl_sched_desc sdesc;
    memset(&sdesc, 0, sizeof sdesc);
    sdesc.max_running = 2;
    kt_world_open(w, small(w, NULL), &sdesc);
    for (int i = 0; i < 8; i++) kt_world_submit(w, 1000 * i, 40, 4, NULL);
    while (kt_world_step(w) == KVL_OK) {
        assert_true(kt_stats(w->cache).running <= 2);
        assert_true(w->spans <= 2);
    }
    for (uint32_t i = 1; i < 8; i++) assert_true(w->answers[i]->first_step >= w->answers[i - 1]->first_step);
    for (uint32_t i = 2; i < 8; i++) assert_true(w->answers[i]->first_step > w->answers[i - 2]->last_step);
}

static void test_priority_policy(void **state) {
    kt_world *w = (kt_world *)*state;
    static const uint32_t order[] = {0, 3, 7, 1, 7, 0, 5};
    kvl_sched_desc sdesc;
    kvl_request extra;
    memset(&sdesc, 0, sizeof sdesc);
    memset(&extra, 0, sizeof extra);
    sdesc.max_running = 1;
    sdesc.policy = KVL_POLICY_PRIORITY;
    kt_world_open(w, small(w, NULL), &sdesc);
    for (int i = 0; i < 7; i++) {
        extra.priority = order[i];
        kt_world_submit(w, 1000 * i, 40, 3, &extra);
    }
    assert_int_equal(kt_world_run(w, 100), KVL_IDLE);
    for (uint32_t i = 0; i < 7; i++) {
        for (uint32_t j = 0; j < 7; j++) {
            bool before = order[i] > order[j] || (order[i] == order[j] && i < j);
            if (before) assert_true(w->answers[i]->first_step < w->answers[j]->first_step);
        }
    }
}

static void test_longest_prefix_policy(void **state) {
    kt_world *w = (kt_world *)*state;
    kvl_sched_desc sdesc;
    kt_answer *a[4];
    memset(&sdesc, 0, sizeof sdesc);
    sdesc.max_running = 1;
    sdesc.policy = KVL_POLICY_LONGEST_PREFIX;
    kt_world_open(w, small(w, NULL), &sdesc);
    kt_world_submit(w, 0, 100, 2, NULL);
    assert_int_equal(kt_world_run(w, 100), KVL_IDLE);
    a[0] = kt_world_submit(w, 5000, 100, 2, NULL); /* nothing cached */
    a[1] = kt_world_submit(w, 0, 33, 2, NULL);     /* 2 blocks */
    a[2] = kt_world_submit(w, 0, 97, 2, NULL);     /* 6 */
    a[3] = kt_world_submit(w, 0, 65, 2, NULL);     /* 4 */
    assert_int_equal(kt_world_run(w, 100), KVL_IDLE);
    assert_true(a[2]->first_step < a[3]->first_step);
    assert_true(a[3]->first_step < a[1]->first_step);
    assert_true(a[1]->first_step < a[0]->first_step);
}

/* Nobody waits for ever because others keep arriving that the policy likes better. */
static void test_policies_do_not_starve(void **state) {
    kt_world *w = (kt_world *)*state;
    static const kvl_policy policies[] = {KVL_POLICY_FCFS, KVL_POLICY_LONGEST_PREFIX};
    for (size_t p = 0; p < KT_COUNT(policies); p++) {
        kvl_sched_desc sdesc;
        kt_answer *poor;
        uint32_t n = 0;
        memset(&sdesc, 0, sizeof sdesc);
        sdesc.max_running = 1;
        sdesc.policy = policies[p];
        kt_world_open(w, small(w, NULL), &sdesc);
        kt_world_submit(w, 0, 100, 1, NULL);
        assert_int_equal(kt_world_run(w, 100), KVL_IDLE);
        kt_world_submit(w, 0, 97, 2, NULL);
        poor = kt_world_submit(w, 5000, 100, 1, NULL);
        while (!poor->first_step && n < 2000) { /* always one more with a long prefix */
            if (kt_stats(w->cache).waiting < 3) kt_world_submit(w, 0, 97, 2, NULL);
            assert_true(kt_world_step(w) >= 0);
            n++;
        }
        KT_CHECK(poor->first_step, "policy %d: one request starved for %u steps", (int)policies[p], n);
        assert_int_equal(kt_world_run(w, 100), KVL_IDLE);
        kt_world_close(w);
        w->steps = 0;
    }
}

/* ---------------------------------------------------------------- chunks and gaps */

/* All decodes are in every step; prefill takes what is left of the token budget. */
static void test_decodes_first(void **state) {
    kt_world *w = (kt_world *)*state;
    kvl_sched_desc sdesc;
    kt_answer *big;
    memset(&sdesc, 0, sizeof sdesc);
    sdesc.step_tokens = 48;
    kt_world_open(w, small(w, NULL), &sdesc);
    for (int i = 0; i < 6; i++) kt_world_submit(w, 1000 * i, 8, 100, NULL);
    KT_OK(w->cache, kt_world_step(w));
    assert_int_equal(w->rows, 48);
    big = kt_world_submit(w, 9000, 900, 3, NULL);
    while (!big->first_step) {
        KT_OK(w->cache, kt_world_step(w));
        assert_int_equal(w->decode_rows, 6);
        assert_true(w->rows <= 48);
        assert_true(w->prefill_rows >= 32 || big->first_step); /* and it uses them */
    }
    assert_true(big->first_step <= 2 + 900 / 32 + 1);
    assert_int_equal(kt_world_run(w, 300), KVL_IDLE);
}

/* A short prompt that comes after a long one does not wait for the whole of it, and slows it by no more than it takes
   itself, and a stream of short ones by no more than half. */
static void test_short_prompts_are_not_held_up(void **state) {
    kt_world *w = (kt_world *)*state;
    kvl_sched_desc sdesc;
    kt_answer *big, *little, *last = NULL;
    memset(&sdesc, 0, sizeof sdesc);
    sdesc.step_tokens = 48;
    kt_world_open(w, tight(w, 120), &sdesc);
    big = kt_world_submit(w, 0, 48 * 20, 2, NULL);
    KT_OK(w->cache, kt_world_step(w));
    little = kt_world_submit(w, 50000, 40, 2, NULL);
    for (uint32_t i = 0; !big->first_step; i++) {
        if (!last || last->last_step) last = kt_world_submit(w, 60000 + 1000 * (int32_t)i, 40, 1, NULL);
        KT_OK(w->cache, kt_world_step(w));
    }
    KT_CHECK(little->first_step && little->first_step <= 3, "the short one waited %u steps",
             little->first_step);
    KT_CHECK(big->first_step <= 2 * 20 + 2, "the long one waited %u steps", big->first_step);
}

typedef struct gap_case {
    uint32_t decoders, step_tokens, min_chunk;
    kvl_class klass; /* of the prompt; an interactive one would wait where one more stream breaks the bound */
    double max_gap_ms;
    kvl_cost cost;
} gap_case;

/* A long prompt falls among streams: no step is longer than max(max_gap_ms, decodes alone plus the smallest
   chunk), the room under the bound is used, and the prompt gets through. */
static void test_max_gap(void **state) {
    kt_world *w = (kt_world *)*state;
    static const gap_case cases[] = {
        {4, 128, 0, KVL_INTERACTIVE, 8.0, {2.0, 0.1, 0.5, 0, 0}}, /* 40 tokens fit beside the decodes */
        {4, 128, 0, KVL_BACKGROUND, 8.0, {2.0, 0.1, 0.5, 0, 0}},
        {4, 128, 0, KVL_BACKGROUND, 4.2, {2.0, 0.1, 0.5, 0, 0}}, /* only 2 do: yet the smallest chunk goes */
        {1, 128, 0, KVL_BACKGROUND, 0.5, {2.0, 0.1, 0.5, 0, 0}}, /* broken by the decode alone */
        {6, 128, 4, KVL_INTERACTIVE, 5.75, {2.0, 0.1, 0.5, 0, 0}},  /* 7, with a smaller smallest chunk */
        {1, 128, 0, KVL_INTERACTIVE, 100.0, {2.0, 0.1, 0.5, 0, 0}}, /* bound by the tokens of a step */
        {8, 64, 16, KVL_INTERACTIVE, 20.0, {1.0, 0.5, 0.25, 0, 0}},
    };
    for (size_t i = 0; i < KT_COUNT(cases); i++) {
        const gap_case *c = &cases[i];
        uint32_t smallest = c->min_chunk ? c->min_chunk : 16, steps = 0, room;
        double bound, least;
        kvl_sched_desc sdesc;
        kvl_request extra;
        kt_answer *big;
        snprintf(kt_where, sizeof kt_where, "case %zu", i);
        memset(&sdesc, 0, sizeof sdesc);
        memset(&extra, 0, sizeof extra);
        extra.klass = c->klass;
        sdesc.step_tokens = c->step_tokens;
        sdesc.min_chunk = c->min_chunk;
        sdesc.max_gap_ms = c->max_gap_ms;
        sdesc.cost = c->cost;
        sdesc.fixed_cost = true;
        w->cost = c->cost;
        kt_world_open(w, small(w, NULL), &sdesc);
        for (uint32_t k = 0; k < c->decoders; k++) kt_world_submit(w, 1000 * (int32_t)k, 1, 400, NULL);
        for (int k = 0; k < 8; k++) KT_OK(w->cache, kt_world_step(w));
        big = kt_world_submit(w, 50000, 800, 2, &extra);
        least = c->cost.step_ms + c->decoders * c->cost.decode_ms;
        bound = least + smallest * c->cost.prefill_token_ms;
        if (bound < c->max_gap_ms) bound = c->max_gap_ms;
        room = (uint32_t)((bound - least) / c->cost.prefill_token_ms + 1e-6);
        if (room > c->step_tokens - c->decoders) room = c->step_tokens - c->decoders;
        while (!big->first_step) {
            KT_OK(w->cache, kt_world_step(w));
            KT_CHECK(w->decode_rows == c->decoders, "%u of %u decodes", w->decode_rows, c->decoders);
            KT_CHECK(w->ms <= bound + 1e-6, "a step of %g ms, bound %g", w->ms, bound);
            KT_CHECK(w->prefill_rows > 0, "step %u takes nothing of the prompt", steps);
            steps++;
        }
        if (room < smallest) room = smallest;
        KT_CHECK(steps <= 800 / (room < 16 ? room * 3 / 4 : room / 16 * 16) + 3,
                 "%u steps with room for %u tokens in each", steps, room);
        assert_int_equal(kt_world_run(w, 1000), KVL_IDLE);
        KT_CHECK(kt_stats(w->cache).gap_ms.max <= bound + 1e-6, "gap %g, bound %g",
                 kt_stats(w->cache).gap_ms.max, bound);
        kt_world_close(w);
        w->steps = 0;
    }
    kt_where[0] = 0;
}

/* Without streams to wait for it, a prompt takes whole steps whatever max_gap_ms says. */
static void test_no_chunking_alone(void **state) {
    kt_world *w = (kt_world *)*state;
    kvl_sched_desc sdesc;
    kt_answer *big;
    memset(&sdesc, 0, sizeof sdesc);
    sdesc.max_gap_ms = 3;
    sdesc.cost.step_ms = 2;
    sdesc.cost.prefill_token_ms = 0.1;
    sdesc.cost.decode_ms = 0.5;
    sdesc.fixed_cost = true;
    kt_world_open(w, small(w, NULL), &sdesc);
    big = kt_world_submit(w, 0, 900, 2, NULL);
    assert_int_equal(kt_world_run(w, 100), KVL_IDLE);
    assert_true(big->first_step <= 8);
}

/* The scheduler learns the costs from the steps and then keeps to the bound. */
static void test_learns_the_cost(void **state) {
    kt_world *w = (kt_world *)*state;
    kvl_sched_desc sdesc;
    uint32_t over = 0, steps = 0;
    kvl_stats s;
    memset(&sdesc, 0, sizeof sdesc);
    sdesc.max_gap_ms = 20;
    w->cost.step_ms = 3;
    w->cost.prefill_token_ms = 0.25;
    w->cost.decode_ms = 0.75;
    kt_world_open(w, small(w, NULL), &sdesc);
    for (int round = 0; round < 6; round++) {
        for (int k = 0; k < 4; k++) kt_world_submit(w, 10000 * round + 1000 * k, 20, 60, NULL);
        for (int k = 0; k < 10; k++) KT_OK(w->cache, kt_world_step(w));
        kt_world_submit(w, 10000 * round + 8000, 600, 2, NULL);
        while (kt_world_step(w) == KVL_OK) {
            if (round < 2 || !w->decode_rows) continue; /* by then it has seen steps of all kinds */
            steps++;
            if (w->ms > 20 * 1.1) over++;
        }
    }
    s = kt_stats(w->cache);
    KT_CHECK(over * 20 <= steps, "%u of %u steps broke the bound; learnt %g + %g p + %g d", over, steps,
             s.cost.step_ms, s.cost.prefill_token_ms, s.cost.decode_ms);
    KT_CHECK(s.cost.prefill_token_ms > 0.125 && s.cost.prefill_token_ms < 0.5,
             "a token of prefill costs %g, not 0.25", s.cost.prefill_token_ms);
}

/* Interactive work that decodes alone would breach is refused where the app wants it, else it queues. */
static void test_over_gap(void **state) {
    kt_world *w = (kt_world *)*state;
    for (int refuse = 0; refuse < 2; refuse++) {
        kvl_sched_desc sdesc;
        kt_answer *a[6];
        uint32_t refused = 0, most = 0;
        memset(&sdesc, 0, sizeof sdesc);
        sdesc.max_gap_ms = 4;
        sdesc.refuse_over_gap = refuse != 0;
        sdesc.cost.step_ms = 1;
        sdesc.cost.prefill_token_ms = 0.01;
        sdesc.cost.decode_ms = 1; /* three streams are the most that keep to 4 ms */
        sdesc.fixed_cost = true;
        w->cost = sdesc.cost;
        kt_world_open(w, small(w, NULL), &sdesc);
        for (int i = 0; i < 6; i++) a[i] = kt_world_submit(w, 1000 * i, 16, 30, NULL);
        for (;;) {
            kvl_result r = kt_world_step(w);
            if (r != KVL_OK) break;
            if (w->decode_rows > most) most = w->decode_rows;
        }
        for (int i = 0; i < 6; i++) {
            kvl_req_info info = kt_info(w, a[i]);
            assert_int_equal(info.state, KVL_REQ_FINISHED);
            if (info.finish == KVL_FINISH_REFUSED) {
                refused++;
                assert_int_equal(info.n_generated, 0);
            } else {
                kt_world_answer_is(w, a[i], KVL_FINISH_LENGTH, 30);
            }
        }
        KT_CHECK(most <= 3, "%u streams at once", most);
        KT_CHECK(refused == (refuse ? 3 : 0), "%u refused", refused);
        assert_int_equal(kt_stats(w->cache).refused, refused);
        kt_world_close(w);
        w->steps = 0;
    }
}

/* ---------------------------------------------------------------- classes */

static void test_background_waits_for_interactive(void **state) {
    kt_world *w = (kt_world *)*state;
    kvl_sched_desc sdesc;
    kvl_request extra;
    kt_answer *back[3], *front;
    memset(&sdesc, 0, sizeof sdesc);
    memset(&extra, 0, sizeof extra);
    sdesc.max_running = 1;
    kt_world_open(w, small(w, NULL), &sdesc);
    extra.klass = KVL_BACKGROUND;
    for (int i = 0; i < 3; i++) back[i] = kt_world_submit(w, 1000 * i, 20, 5, &extra);
    front = kt_world_submit(w, 9000, 20, 5, NULL);
    assert_int_equal(kt_world_run(w, 100), KVL_IDLE);
    for (int i = 0; i < 3; i++) {
        assert_true(back[i]->first_step > front->first_step);
        kt_world_answer_is(w, back[i], KVL_FINISH_LENGTH, 5);
    }
}

/* The rows of a step go to interactive prefill before background prefill that began earlier. */
static void test_background_prefill_yields(void **state) {
    kt_world *w = (kt_world *)*state;
    kvl_request extra;
    kt_answer *back, *front;
    memset(&extra, 0, sizeof extra);
    extra.klass = KVL_BACKGROUND;
    kt_world_open(w, small(w, NULL), NULL);
    back = kt_world_submit(w, 0, 900, 2, &extra);
    KT_OK(w->cache, kt_world_step(w));
    KT_OK(w->cache, kt_world_step(w));
    assert_true(kt_info(w, back).n_computed >= 128);
    front = kt_world_submit(w, 5000, 250, 2, NULL);
    KT_OK(w->cache, kt_world_step(w));
    assert_int_equal(kt_info(w, front).n_computed, 128);
    KT_OK(w->cache, kt_world_step(w));
    assert_int_equal(front->first_step, 4);
    assert_int_equal(kt_world_run(w, 100), KVL_IDLE);
    kt_world_answer_is(w, back, KVL_FINISH_LENGTH, 2);
}

/* Memory too: interactive work that does not fit beside background work preempts it; that goes on afterwards.
   */
static void test_background_gives_up_memory(void **state) {
    kt_world *w = (kt_world *)*state;
    kvl_request extra;
    kt_answer *back, *front;
    memset(&extra, 0, sizeof extra);
    extra.klass = KVL_BACKGROUND;
    kt_world_open(w, tight(w, 12), NULL);
    back = kt_world_submit(w, 0, 100, 40, &extra); /* 9 blocks */
    for (int i = 0; i < 10; i++) KT_OK(w->cache, kt_world_step(w));
    front = kt_world_submit(w, 5000, 100, 20, NULL); /* 8 */
    for (int i = 0; i < 3; i++) KT_OK(w->cache, kt_world_step(w));
    assert_true(front->first_step > 0);
    assert_true(kt_info(w, back).preemptions >= 1);
    assert_int_equal(kt_info(w, back).state, KVL_REQ_WAITING);
    assert_int_equal(kt_world_run(w, 200), KVL_IDLE);
    assert_int_equal(kt_info(w, front).preemptions, 0);
    assert_true(front->last_step < back->last_step);
    kt_world_answer_is(w, front, KVL_FINISH_LENGTH, 20);
    kt_world_answer_is(w, back, KVL_FINISH_LENGTH, 40);
    assert_true(kt_stats(w->cache).preemptions >= 1);
}

/* ---------------------------------------------------------------- preemption */

typedef struct rank_case {
    kvl_policy policy;
    kvl_class klass[2];
    uint32_t priority[2];
    int victim;
} rank_case;

/* How long answers get is learnt: those that stream are not preempted, where a gap is promised. */
static void test_admission_foresees_growth(void **state) {
    kt_world *w = (kt_world *)*state;
    uint64_t preemptions[2];
    for (int promised = 0; promised < 2; promised++) {
        kvl_sched_desc sdesc;
        uint64_t learnt;
        memset(&sdesc, 0, sizeof sdesc);
        sdesc.max_gap_ms = promised ? 1000 : 0;
        kt_world_open(w, tight(w, 40), &sdesc);
        for (int i = 0; i < 20; i++) kt_world_submit(w, 1000 * i, 40, 110, NULL);
        assert_int_equal(kt_world_run(w, 5000), KVL_IDLE);
        learnt = kt_stats(w->cache).preemptions;
        for (int i = 20; i < 60; i++) kt_world_submit(w, 1000 * i, 40, 110, NULL);
        assert_int_equal(kt_world_run(w, 10000), KVL_IDLE);
        preemptions[promised] = kt_stats(w->cache).preemptions - learnt;
        for (uint32_t i = 0; i < 60; i++) kt_world_answer_is(w, w->answers[i], KVL_FINISH_LENGTH, 110);
        kt_world_close(w);
        w->steps = 0;
    }
    assert_true(preemptions[0] > 0); /* the load is such that it matters */
    assert_int_equal(preemptions[1], 0);
}

/* One that does not fit beside what runs is passed by what does, yet gets its turn while more of that comes. */
static void test_what_fits_may_pass(void **state) {
    kt_world *w = (kt_world *)*state;
    kt_answer *big, *little[200];
    uint32_t n = 0, before = 0;
    kt_world_open(w, tight(w, 24), NULL);
    kt_world_submit(w, 900000, 16 * 8, 60, NULL);
    KT_OK(w->cache, kt_world_step(w));
    big = kt_world_submit(w, 0, 16 * 20, 4, NULL);
    while (!kt_finished(w, big)) {
        if (n < 200 && (n < 4 || kt_finished(w, little[n - 4]))) {
            little[n] = kt_world_submit(w, 1000 * (int32_t)n + 1000, 16 * 2, 8, NULL);
            n++;
        }
        KT_OK(w->cache, kt_world_step(w));
    }
    for (uint32_t i = 0; i < n; i++)
        before += little[i]->first_step && little[i]->first_step < big->first_step;
    KT_CHECK(before >= 3 && before <= 70, "%u of %u passed", before, n);
}

/* Two that do not fit together once they have grown: who gives way. */
static void test_preemption_ranking(void **state) {
    kt_world *w = (kt_world *)*state;
    static const rank_case cases[] = {
        {KVL_POLICY_FCFS, {KVL_INTERACTIVE, KVL_INTERACTIVE}, {0, 0}, 1}, /* the later one */
        {KVL_POLICY_FCFS, {KVL_BACKGROUND, KVL_BACKGROUND}, {0, 0}, 1},
        {KVL_POLICY_FCFS, {KVL_BACKGROUND, KVL_INTERACTIVE}, {0, 0}, 0}, /* background */
        {KVL_POLICY_FCFS, {KVL_INTERACTIVE, KVL_BACKGROUND}, {0, 0}, 1},
        {KVL_POLICY_PRIORITY, {KVL_INTERACTIVE, KVL_INTERACTIVE}, {1, 6}, 0}, /* lower priority */
        {KVL_POLICY_PRIORITY, {KVL_INTERACTIVE, KVL_INTERACTIVE}, {6, 1}, 1},
        {KVL_POLICY_PRIORITY, {KVL_BACKGROUND, KVL_INTERACTIVE}, {7, 0}, 0}, /* class before priority */
    };
    for (size_t i = 0; i < KT_COUNT(cases); i++) {
        kvl_sched_desc sdesc;
        kvl_request extra;
        kt_answer *a[2];
        snprintf(kt_where, sizeof kt_where, "case %zu", i);
        memset(&sdesc, 0, sizeof sdesc);
        memset(&extra, 0, sizeof extra);
        sdesc.policy = cases[i].policy;
        kt_world_open(w, tight(w, 14), &sdesc);
        for (int k = 0; k < 2; k++) { /* 3 blocks at first, 10 in the end */
            extra.klass = cases[i].klass[k];
            extra.priority = cases[i].priority[k];
            a[k] = kt_world_submit(w, 5000 * k, 40, 110, &extra);
        }
        KT_OK(w->cache, kt_world_step(w));
        KT_CHECK(w->spans == 2, "%u start", w->spans); /* both fit now: no reason to wait */
        while (kt_stats(w->cache).preemptions == 0) KT_OK(w->cache, kt_world_step(w));
        assert_int_equal(kt_world_run(w, 1000), KVL_IDLE);
        KT_CHECK(kt_info(w, a[cases[i].victim]).preemptions >= 1, "request %d was not preempted",
                 cases[i].victim);
        KT_CHECK(kt_info(w, a[!cases[i].victim]).preemptions == 0, "request %d was", !cases[i].victim);
        for (int k = 0; k < 2; k++) kt_world_answer_is(w, a[k], KVL_FINISH_LENGTH, 110);
        kt_world_close(w);
        w->steps = 0;
    }
    kt_where[0] = 0;
}

/* Many that never fit together: all finish, and not by thrashing. */
static void test_preemption_makes_progress(void **state) {
    kt_world *w = (kt_world *)*state;
    uint64_t rows = 0, least = 0;
    kvl_stats s;
    kt_world_open(w, tight(w, 20), NULL);
    for (int i = 0; i < 12; i++) kt_world_submit(w, 1000 * i, 60 + 5 * (uint32_t)i, 100, NULL);
    assert_int_equal(kt_world_run(w, 5000), KVL_IDLE);
    for (uint32_t i = 0; i < 12; i++) {
        kt_world_answer_is(w, w->answers[i], KVL_FINISH_LENGTH, 100);
        rows += w->answers[i]->rows;
        least += w->answers[i]->n_prompt + 99;
    }
    s = kt_stats(w->cache);
    assert_true(s.preemptions > 0);
    KT_CHECK(rows <= 3 * least, "%llu rows for %llu tokens", (unsigned long long)rows,
             (unsigned long long)least);
}

/* ---------------------------------------------------------------- sharing */

/* Identical prompts at once: one computes, the others wait for it and reuse. */
static void test_identical_prompts_wait(void **state) {
    kt_world *w = (kt_world *)*state;
    uint64_t rows = 0;
    kt_answer *a[5];
    kt_world_open(w, small(w, NULL), NULL);
    for (int i = 0; i < 5; i++) a[i] = kt_world_submit(w, 0, 200, 8, NULL);
    assert_int_equal(kt_world_run(w, 200), KVL_IDLE);
    for (int i = 0; i < 5; i++) {
        rows += a[i]->rows;
        kt_world_answer_is(w, a[i], KVL_FINISH_LENGTH, 8);
        if (i)
            KT_CHECK(kt_info(w, a[i]).reuse.matched >= 192 - 16, "request %d reused %u", i,
                     kt_info(w, a[i]).reuse.matched);
    }
    KT_CHECK(rows <= 200 + 4 * 40 + 5 * 8, "%llu rows", (unsigned long long)rows);
}

/* A shared system prompt, different questions: it is computed once. */
static void test_shared_system_prompt(void **state) {
    kt_world *w = (kt_world *)*state;
    uint64_t rows = 0;
    kt_world_open(w, small(w, NULL), NULL);
    for (int i = 0; i < 6; i++) {
        kt_answer *a = kt_answer_new(w);
        kt_push_range(&a->stream, 0, 160);
        kt_push_range(&a->stream, 1000 * (i + 1), 20);
        KT_OK(w->cache, kt_world_try(w, a, 5, NULL));
    }
    assert_int_equal(kt_world_run(w, 200), KVL_IDLE);
    for (uint32_t i = 0; i < 6; i++) rows += w->answers[i]->rows;
    KT_CHECK(rows <= 160 + 6 * 25 + 5 * 16, "%llu rows", (unsigned long long)rows);
}

/* Other namespaces do not wait and do not share. */
static void test_namespaces_do_not_wait(void **state) {
    kt_world *w = (kt_world *)*state;
    kvl_request extra;
    memset(&extra, 0, sizeof extra);
    kt_world_open(w, small(w, NULL), NULL);
    for (int i = 0; i < 3; i++) {
        extra.name_space = (uint64_t)i;
        kt_world_submit(w, 0, 40, 5, &extra);
    }
    KT_OK(w->cache, kt_world_step(w));
    assert_int_equal(w->spans, 3);
    assert_int_equal(w->rows, 120);
    assert_int_equal(kt_world_run(w, 200), KVL_IDLE);
    for (uint32_t i = 0; i < 3; i++) {
        assert_int_equal(kt_info(w, w->answers[i]).reuse.matched, 0);
        kt_world_answer_is(w, w->answers[i], KVL_FINISH_LENGTH, 5);
    }
}

/* But not for background work that itself gets no rows because younger interactive prompts keep coming. */
static void test_does_not_wait_for_worse(void **state) {
    kt_world *w = (kt_world *)*state;
    kvl_request extra;
    kt_answer *back, *front;
    uint32_t at;
    memset(&extra, 0, sizeof extra);
    extra.klass = KVL_BACKGROUND;
    kt_world_open(w, small(w, NULL), NULL);
    back = kt_world_submit(w, 0, 700, 2, &extra);
    KT_OK(w->cache, kt_world_step(w));
    front = kt_world_submit(w, 0, 700, 2, NULL);
    at = w->steps;
    for (int i = 0; i < 40 && !front->first_step; i++) { /* each younger prompt would fill a step */
        if (kt_stats(w->cache).waiting + kt_stats(w->cache).running < 10)
            kt_world_submit(w, 1000 * (i + 1), 128, 1, NULL);
        KT_OK(w->cache, kt_world_step(w));
    }
    KT_CHECK(front->first_step && front->first_step <= at + 8, "no answer after %u steps", w->steps - at);
    assert_int_equal(kt_world_run(w, 200), KVL_IDLE);
    kt_world_answer_is(w, back, KVL_FINISH_LENGTH, 2);
    kt_world_answer_is(w, front, KVL_FINISH_LENGTH, 2);
}

/* If the one that others wait for is cancelled, they go on by themselves. */
static void test_waiting_for_one_that_is_cancelled(void **state) {
    kt_world *w = (kt_world *)*state;
    kt_answer *a[3];
    kt_world_open(w, small(w, NULL), NULL);
    for (int i = 0; i < 3; i++) a[i] = kt_world_submit(w, 0, 400, 4, NULL);
    KT_OK(w->cache, kt_world_step(w));
    assert_int_equal(w->spans, 1);
    KT_OK(w->cache, kvl_sched_cancel(w->sched, a[0]->req));
    a[0]->cancelled = true;
    assert_int_equal(kt_world_run(w, 200), KVL_IDLE);
    assert_int_equal(kt_info(w, a[0]).finish, KVL_FINISH_CANCELLED);
    for (int i = 1; i < 3; i++) kt_world_answer_is(w, a[i], KVL_FINISH_LENGTH, 4);
    assert_true(kt_info(w, a[1]).reuse.matched >= 112); /* what the cancelled one had computed */
}

/* ---------------------------------------------------------------- fork */

/* n answers to one prompt: the logits row of the prompt stands n times, and KV is shared. */
static void test_fork_of_a_prompt(void **state) {
    kt_world *w = (kt_world *)*state;
    const kvl_step *step = NULL;
    kt_answer *a, *forks[3];
    kvl_stats s;
    kt_world_open(w, small(w, NULL), NULL);
    a = kt_world_submit(w, 0, 200, 20, NULL);
    KT_OK(w->cache, kt_world_step(w)); /* 128 rows: in the middle of the prompt */
    for (uint64_t i = 0; i < 3; i++) forks[i] = kt_world_fork(w, a, 100 + i);
    KT_VALID(w->cache);
    KT_OK(w->cache, kvl_sched_plan(w->sched, &step));
    assert_int_equal(step->n_spans, 1);
    assert_int_equal(step->n_logits, 4);
    for (uint32_t i = 0; i < 4; i++) {
        assert_int_equal(step->logit_rows[i], step->n_tokens - 1);
        for (uint32_t k = 0; k < i; k++)
            assert_int_not_equal(step->logit_requests[i], step->logit_requests[k]);
    }
    kt_world_check(w, step);
    kt_world_commit(w, step);
    KT_VALID(w->cache);
    s = kt_stats(w->cache);
    assert_int_equal(s.sequences, 4);
    assert_true(kt_used(&s) <= 13 + 3); /* 13 for the prompt, shared */
    assert_true(s.blocks_shared[0] + s.blocks_shared[1] >= 12);
    KT_OK(w->cache, kvl_sched_plan(w->sched, &step));
    assert_int_equal(step->n_spans, 4);
    assert_int_equal(step->n_tokens, 4);
    kt_world_check(w, step);
    kt_world_commit(w, step);
    assert_int_equal(kt_world_run(w, 200), KVL_IDLE);
    kt_world_answer_is(w, a, KVL_FINISH_LENGTH, 20);
    for (int i = 0; i < 3; i++) {
        kt_world_answer_is(w, forks[i], KVL_FINISH_LENGTH, 20);
        assert_memory_not_equal(forks[i]->stream.tokens + 200, a->stream.tokens + 200, 20 * sizeof(int32_t));
        assert_int_equal(forks[i]->rows, 19);
    }
}

/* A fork of a stream in the middle of its answer, of one that waits, and of a fork. */
static void test_fork_in_each_state(void **state) {
    kt_world *w = (kt_world *)*state;
    kt_answer *a, *waiting, *f1, *f2, *f3;
    kt_world_open(w, small(w, NULL), NULL);
    a = kt_world_submit(w, 0, 50, 30, NULL);
    f3 = kt_world_fork(w, a, 7); /* before anything ran */
    for (int i = 0; i < 6; i++) KT_OK(w->cache, kt_world_step(w));
    f1 = kt_world_fork(w, a, 8);
    f2 = kt_world_fork(w, f1, 9);
    waiting = kt_world_submit(w, 7000, 40, 10, NULL);
    kt_world_fork(w, waiting, 10);
    assert_int_equal(kt_world_run(w, 300), KVL_IDLE);
    for (uint32_t i = 0; i < w->n_answers; i++) {
        kvl_req_info info = kt_info(w, w->answers[i]);
        assert_int_equal(info.state, KVL_REQ_FINISHED);
        assert_int_equal(info.finish, KVL_FINISH_LENGTH);
    }
    assert_true(f1->stream.n > f1->n_prompt && f2->stream.n > f2->n_prompt && f3->stream.n > f3->n_prompt);
    {
        kvl_req fork;
        assert_int_equal(kvl_sched_fork(w->sched, a->req, NULL, &fork), KVL_INVALID_ARG); /* finished */
    }
}

/* The parent ends or is preempted before the fork has joined: it goes on as a request of its own. */
static void test_fork_outlives_its_parent(void **state) {
    kt_world *w = (kt_world *)*state;
    kt_answer *a, *f, *g;
    kt_world_open(w, small(w, NULL), NULL);
    a = kt_world_submit(w, 0, 300, 10, NULL);
    KT_OK(w->cache, kt_world_step(w));
    f = kt_world_fork(w, a, 55);
    g = kt_world_fork(w, f, 56);
    KT_OK(w->cache, kvl_sched_cancel(w->sched, a->req));
    a->cancelled = true;
    assert_int_equal(kt_world_run(w, 100), KVL_IDLE);
    assert_int_equal(kt_info(w, a).finish, KVL_FINISH_CANCELLED);
    kt_world_answer_is(w, f, KVL_FINISH_LENGTH, 10);
    kt_world_answer_is(w, g, KVL_FINISH_LENGTH, 10);
}

/* More answers to one prompt than sequences, and than a step has logits rows: the rest run later. */
static void test_more_forks_than_sequences(void **state) {
    kt_world *w = (kt_world *)*state;
    kvl_cache_desc desc = small(w, NULL);
    kt_answer *a, *forks[60];
    desc.max_sequences = 6;
    desc.max_step_tokens = 16;
    kt_world_open(w, desc, NULL);
    a = kt_world_submit(w, 0, 50, 5, NULL);
    for (uint64_t i = 0; i < 60; i++) forks[i] = kt_world_fork(w, a, i);
    KT_VALID(w->cache);
    assert_int_equal(kt_world_run(w, 1000), KVL_IDLE);
    kt_world_answer_is(w, a, KVL_FINISH_LENGTH, 5);
    for (int i = 0; i < 60; i++) kt_world_answer_is(w, forks[i], KVL_FINISH_LENGTH, 5);
}

static void test_fork_under_pressure(void **state) {
    kt_world *w = (kt_world *)*state;
    kt_answer *a, *forks[4];
    kt_world_open(w, tight(w, 14), NULL);
    a = kt_world_submit(w, 0, 60, 80, NULL);
    for (uint64_t i = 0; i < 4; i++) forks[i] = kt_world_fork(w, a, 30 + i);
    assert_int_equal(kt_world_run(w, 3000), KVL_IDLE);
    kt_world_answer_is(w, a, KVL_FINISH_LENGTH, 80);
    for (int i = 0; i < 4; i++) kt_world_answer_is(w, forks[i], KVL_FINISH_LENGTH, 80);
    assert_true(kt_stats(w->cache).preemptions > 0);
}

/* ---------------------------------------------------------------- cancel, abort, suspend */

static void test_cancel_in_each_state(void **state) {
    kt_world *w = (kt_world *)*state;
    kvl_sched_desc sdesc;
    const kvl_step *step;
    kt_answer *waiting, *prefill, *decode, *open, *done, *other;
    memset(&sdesc, 0, sizeof sdesc);
    sdesc.max_running = 4;
    kt_world_open(w, small(w, NULL), &sdesc);
    done = kt_world_submit(w, 100, 4, 1, NULL);
    assert_int_equal(kt_world_run(w, 10), KVL_IDLE);
    decode = kt_world_submit(w, 1000, 20, 50, NULL);
    open = kt_world_submit(w, 2000, 20, 50, NULL);
    other = kt_world_submit(w, 3000, 20, 12, NULL);
    KT_OK(w->cache, kt_world_step(w));
    prefill = kt_world_submit(w, 4000, 900, 5, NULL);
    waiting = kt_world_submit(w, 5000, 20, 50, NULL); /* the fifth */
    KT_OK(w->cache, kt_world_step(w));
    assert_int_equal(kt_info(w, waiting).state, KVL_REQ_WAITING);
    assert_int_equal(kt_info(w, prefill).state, KVL_REQ_PREFILL);
    assert_int_equal(kt_info(w, decode).state, KVL_REQ_DECODE);
    KT_OK(w->cache, kvl_sched_cancel(w->sched, waiting->req));
    KT_OK(w->cache, kvl_sched_cancel(w->sched, prefill->req));
    KT_OK(w->cache, kvl_sched_cancel(w->sched, decode->req));
    KT_OK(w->cache, kvl_sched_cancel(w->sched, decode->req)); /* twice */
    KT_OK(w->cache, kvl_sched_cancel(w->sched, done->req));   /* nothing happens */
    assert_int_equal(kt_info(w, done).finish, KVL_FINISH_LENGTH);
    waiting->cancelled = prefill->cancelled = decode->cancelled = true;
    KT_OK(w->cache, kvl_sched_plan(w->sched, &step));
    assert_int_equal(step->n_spans, 2);
    kt_world_check(w, step);
    KT_OK(w->cache, kvl_sched_cancel(w->sched, open->req)); /* while it is in an open step */
    open->cancelled = true;
    kt_world_commit(w, step);
    KT_VALID(w->cache);
    KT_OK(w->cache, kt_world_step(w));
    assert_int_equal(w->spans, 1);
    assert_int_equal(kt_world_run(w, 30), KVL_IDLE);
    assert_int_equal(kt_info(w, waiting).finish, KVL_FINISH_CANCELLED);
    assert_int_equal(kt_info(w, waiting).n_generated, 0);
    assert_int_equal(kt_info(w, prefill).finish, KVL_FINISH_CANCELLED);
    assert_int_equal(kt_info(w, decode).finish, KVL_FINISH_CANCELLED);
    assert_int_equal(kt_info(w, decode).n_generated, 2);
    assert_int_equal(kt_info(w, open).finish, KVL_FINISH_CANCELLED);
    kt_world_answer_is(w, other, KVL_FINISH_LENGTH, 12);
    assert_int_equal(kt_stats(w->cache).cancelled, 4);
    { /* what a cancelled one computed may be used */
        kt_answer *again = kt_world_submit(w, 4000, 900, 1, NULL);
        assert_int_equal(kt_world_run(w, 30), KVL_IDLE);
        assert_true(kt_info(w, again).reuse.matched >= 64);
    }
}

typedef struct snapshot {
    kvl_req_state state;
    uint32_t n_generated, n_computed, preemptions;
} snapshot;

/* Plans that are aborted leave every request as it was, and the answers are the same as without. */
static void test_abort_restores(void **state) {
    kt_world *w = (kt_world *)*state;
    for (int blocks = 12; blocks <= 60; blocks += 24) {
        kt_rng rng = {(uint64_t)blocks};
        uint32_t n = 0;
        kt_world_open(w, tight(w, (uint32_t)blocks), NULL);
        for (int i = 0; i < 8; i++) kt_world_submit(w, 1000 * i, 20 + 10 * (uint32_t)i, 40, NULL);
        for (;;) {
            const kvl_step *step;
            snapshot before[8];
            kvl_stats sb = kt_stats(w->cache), sa;
            kvl_result r;
            for (uint32_t i = 0; i < 8; i++) {
                kvl_req_info info = kt_info(w, w->answers[i]);
                before[i].state = info.state;
                before[i].n_generated = info.n_generated;
                before[i].n_computed = info.n_computed;
                before[i].preemptions = info.preemptions;
            }
            r = kvl_sched_plan(w->sched, &step);
            if (r == KVL_IDLE) break;
            KT_OK(w->cache, r);
            kt_world_check(w, step);
            if (kt_chance(&rng, 60) && n++ < 300) {
                kt_attend(w->cache, step, kt_below(&rng, LAYERS + 1));
                KT_OK(w->cache, kvl_sched_abort(w->sched, step));
                sa = kt_stats(w->cache);
                for (uint32_t i = 0; i < 8; i++) {
                    kvl_req_info info = kt_info(w, w->answers[i]);
                    if (info.preemptions > before[i].preemptions) {
                        assert_int_equal(info.state, KVL_REQ_WAITING);
                        continue;
                    }
                    KT_CHECK(info.state == before[i].state, "request %u: state %d, was %d", i,
                             (int)info.state, (int)before[i].state);
                    assert_int_equal(info.n_generated, before[i].n_generated);
                    KT_CHECK(info.n_computed == before[i].n_computed, "request %u: computed %u, was %u", i,
                             info.n_computed, before[i].n_computed);
                }
                if (sa.preemptions == sb.preemptions) {
                    assert_int_equal(kt_used(&sa), kt_used(&sb));
                    assert_int_equal(sa.running, sb.running);
                    assert_int_equal(sa.waiting, sb.waiting);
                }
                KT_VALID(w->cache);
            } else {
                kt_world_commit(w, step);
            }
        }
        for (uint32_t i = 0; i < 8; i++) kt_world_answer_is(w, w->answers[i], KVL_FINISH_LENGTH, 40);
        assert_true(n > 20);
        assert_true(kt_stats(w->cache).aborts >= 20);
        kt_world_close(w);
        w->steps = 0;
    }
}

/* A budget of 0 suspends: nothing runs, submits queue, nothing is lost. */
static void test_suspend(void **state) {
    kt_world *w = (kt_world *)*state;
    const kvl_step *step;
    kt_answer *a, *b;
    uint64_t held = 1;
    kt_world_open(w, small(w, NULL), NULL);
    a = kt_world_submit(w, 0, 200, 20, NULL);
    for (int i = 0; i < 5; i++) KT_OK(w->cache, kt_world_step(w));
    KT_OK(w->cache, kvl_cache_resize(w->cache, 0, &held));
    assert_int_equal(held, 0);
    KT_VALID(w->cache);
    assert_int_equal(kt_stats(w->cache).bytes_slabs, 0);
    assert_int_equal(kvl_sched_plan(w->sched, &step), KVL_IDLE);
    b = kt_world_submit(w, 5000, 50, 5, NULL); /* judged against the maximum */
    assert_int_equal(kvl_sched_plan(w->sched, &step), KVL_IDLE);
    assert_int_equal(kt_info(w, a).state, KVL_REQ_WAITING);
    assert_int_equal(kt_info(w, a).n_generated, 4);
    KT_OK(w->cache, kvl_cache_resize(w->cache, w->desc.device_bytes, &held));
    assert_int_equal(kt_world_run(w, 100), KVL_IDLE);
    kt_world_answer_is(w, a, KVL_FINISH_LENGTH, 20);
    kt_world_answer_is(w, b, KVL_FINISH_LENGTH, 5);
}

/* Shrinking while many run: the ones that no longer fit wait, all finish. */
static void test_resize_while_running(void **state) {
    kt_world *w = (kt_world *)*state;
    kvl_cache_desc desc = tight(w, 60);
    uint64_t top = desc.device_bytes, low = kt_budget(&desc, 14);
    kt_rng rng = {3};
    kt_world_open(w, desc, NULL);
    for (int i = 0; i < 8; i++) kt_world_submit(w, 1000 * i, 50 + 9 * (uint32_t)i, 80, NULL);
    for (int i = 0; i < 400; i++) {
        if (i % 5 == 0) {
            uint64_t held = 0;
            KT_OK(w->cache, kvl_cache_resize(w->cache, low + kt_random(&rng) % (top - low + 1), &held));
            KT_VALID(w->cache);
        }
        if (kt_world_step(w) != KVL_OK) break;
    }
    KT_OK(w->cache, kvl_cache_resize(w->cache, top, NULL));
    assert_int_equal(kt_world_run(w, 2000), KVL_IDLE);
    for (uint32_t i = 0; i < 8; i++) kt_world_answer_is(w, w->answers[i], KVL_FINISH_LENGTH, 80);
}

/* ---------------------------------------------------------------- limits */

static void test_queue_full(void **state) {
    kt_world *w = (kt_world *)*state;
    kvl_sched_desc sdesc;
    kt_answer *a;
    memset(&sdesc, 0, sizeof sdesc);
    sdesc.max_waiting = 4;
    kt_world_open(w, small(w, NULL), &sdesc);
    for (int i = 0; i < 4; i++) kt_world_submit(w, 1000 * i, 10, 2, NULL);
    for (int round = 0; round < 3; round++) {
        kvl_stats before = kt_stats(w->cache), after;
        a = kt_answer_new(w);
        kt_push_range(&a->stream, 9000, 10);
        assert_int_equal(kt_world_try(w, a, 2, NULL), KVL_QUEUE_FULL);
        after = kt_stats(w->cache);
        assert_int_equal(before.submitted, after.submitted);
        assert_int_equal(before.waiting, after.waiting);
        kt_answer_drop(w);
        if (round == 1) {
            kvl_req fork;
            assert_int_equal(kvl_sched_fork(w->sched, w->answers[0]->req, NULL, &fork), KVL_QUEUE_FULL);
        }
    }
    assert_int_equal(kt_world_run(w, 20), KVL_IDLE);
    for (int i = 0; i < 4; i++) kt_world_submit(w, 1000 * i, 10, 2, NULL); /* room again */
    assert_int_equal(kt_world_run(w, 20), KVL_IDLE);
}

static void test_token_pool(void **state) {
    kt_world *w = (kt_world *)*state;
    kvl_sched_desc sdesc;
    kvl_result r = KVL_OK;
    uint32_t n = 0;
    memset(&sdesc, 0, sizeof sdesc);
    sdesc.token_pool_bytes = 16384;
    kt_world_open(w, small(w, NULL), &sdesc);
    while (n < 100) {
        kt_answer *a = kt_answer_new(w);
        kt_push_range(&a->stream, (int32_t)n * 1000, 200);
        r = kt_world_try(w, a, 50, NULL);
        if (r != KVL_OK) {
            kt_answer_drop(w);
            break;
        }
        n++;
        assert_true(kt_stats(w->cache).bytes_tokens <= 16384);
    }
    KT_CHECK(r == KVL_QUEUE_FULL && n >= 8 && n <= 16384 / 800, "%s after %u", kvl_result_name(r), n);
    assert_int_equal(kt_world_run(w, 400), KVL_IDLE);
    for (uint32_t i = 0; i < n; i++) kt_world_answer_is(w, w->answers[i], KVL_FINISH_LENGTH, 50);
    kt_world_submit(w, 70000, 200, 50, NULL);
    assert_int_equal(kt_world_run(w, 400), KVL_IDLE);
}

/* Refused at submit with the numbers; the longest that they name is taken, and runs. */
static void test_never_fits(void **state) {
    kt_world *w = (kt_world *)*state;
    static const char *const presets[] = {"f16", NULL};
    for (int p = 0; p < 2; p++) {
        kvl_cache_desc desc = kt_desc(&w->env, LAYERS, 16, presets[p]);
        kvl_refusal refusal;
        kvl_request q;
        kvl_req req = {0};
        kt_answer *a;
        int32_t tokens[1024];
        uint32_t longest;
        for (int i = 0; i < 1024; i++) tokens[i] = i;
        desc.device_bytes = kt_budget(&desc, 10);
        kt_world_open(w, desc, NULL);
        memset(&q, 0, sizeof q);
        memset(&refusal, 0, sizeof refusal);
        q.tokens = tokens;
        q.n_tokens = 1000;
        q.max_new_tokens = 4;
        assert_int_equal(kvl_sched_submit_ex(w->sched, &q, &req, &refusal), KVL_NEVER_FITS);
        assert_int_equal(req.id, 0);
        assert_true(refusal.n_tokens >= 1000 && refusal.n_tokens <= 1004);
        assert_true(refusal.max_tokens > 64 && refusal.max_tokens < 1000);
        assert_true(refusal.need_bytes > refusal.budget_bytes);
        assert_true(refusal.budget_bytes <= desc.device_bytes);
        assert_int_equal(kvl_sched_submit(w->sched, &q, &req), KVL_NEVER_FITS);
        assert_int_equal(kt_stats(w->cache).submitted, 0);
        longest = refusal.max_tokens;
        q.n_tokens = longest;
        q.max_new_tokens = 2; /* the first one's row would not fit */
        KT_CHECK(kvl_sched_submit(w->sched, &q, &req) == KVL_NEVER_FITS, "%u tokens and 2 were taken",
                 longest);
        a = kt_world_submit(w, 0, longest - 20, 21, NULL);
        assert_int_equal(kt_world_run(w, 200), KVL_IDLE);
        kt_world_answer_is(w, a, KVL_FINISH_LENGTH, 21);
        kt_world_close(w);
        w->steps = 0;
    }
}

/* A finished request can be asked about until its slot is used again; then its handle is stale. */
static void test_stale_requests(void **state) {
    kt_world *w = (kt_world *)*state;
    kvl_sched_desc sdesc;
    kvl_req_info info;
    kvl_req first;
    memset(&sdesc, 0, sizeof sdesc);
    sdesc.max_waiting = 8;
    kt_world_open(w, small(w, NULL), &sdesc);
    first = kt_world_submit(w, 0, 4, 1, NULL)->req;
    assert_int_equal(kt_world_run(w, 5), KVL_IDLE);
    for (int i = 1; i < 8; i++) {
        kt_world_submit(w, 100 * i, 4, 1, NULL);
        assert_int_equal(kt_world_run(w, 5), KVL_IDLE);
        KT_OK(w->cache, kvl_sched_info(w->sched, first, &info));
        assert_int_equal(info.n_generated, 1);
    }
    for (int i = 8; i < 40; i++) {
        kt_world_submit(w, 100 * i, 4, 1, NULL);
        assert_int_equal(kt_world_run(w, 5), KVL_IDLE);
    }
    assert_int_equal(kvl_sched_info(w->sched, first, &info), KVL_INVALID_HANDLE);
    assert_int_equal(kvl_sched_cancel(w->sched, first), KVL_INVALID_HANDLE);
}

/* ---------------------------------------------------------------- stats */

static void near(const char *what, double x, double want) {
    KT_CHECK(fabs(x - want) <= 0.1 * want, "%s is %g, not %g", what, x, want);
}

static void test_percentiles(void **state) {
    kt_world *w = (kt_world *)*state;
    kvl_stats s;
    kt_world_open(w, small(w, NULL), NULL);
    kt_world_submit(w, 0, 10, 201, NULL);
    w->cost.step_ms = 50;
    KT_OK(w->cache, kt_world_step(w));
    for (uint32_t i = 0; i < 200; i++) { /* gaps of 1..200 ms, shuffled */
        w->cost.step_ms = (double)(i * 77 % 200 + 1);
        KT_OK(w->cache, kt_world_step(w));
    }
    s = kt_stats(w->cache);
    assert_int_equal(s.gap_ms.count, 200);
    near("gap p50", s.gap_ms.p50, 100);
    near("gap p95", s.gap_ms.p95, 190);
    near("gap p99", s.gap_ms.p99, 198);
    assert_true(fabs(s.gap_ms.max - 200) < 1e-3);
    assert_int_equal(s.ttft_ms.count, 1);
    near("ttft p50", s.ttft_ms.p50, 50);
    assert_int_equal(s.step_ms.count, 201);
    near("step p99", s.step_ms.p99, 198);
    /* background streams are not in gap_ms */
    {
        kvl_request extra;
        memset(&extra, 0, sizeof extra);
        extra.klass = KVL_BACKGROUND;
        kt_world_submit(w, 5000, 10, 20, &extra);
        assert_int_equal(kt_world_run(w, 50), KVL_IDLE);
        assert_int_equal(kt_stats(w->cache).gap_ms.count, 200);
    }
}

/* ---------------------------------------------------------------- close, wait, threads */

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The sequence that info shows is the scheduler's: it can be looked at, forked and pinned, not changed. */
static void test_sequences_are_the_schedulers(void **state) {
    kt_world *w = (kt_world *)*state;
    const kvl_step *step;
    const int32_t token = 1;
    kvl_span span;
    kvl_seq seq, copy;
    uint32_t length = 0;
    kt_answer *a;
    kt_world_open(w, small(w, NULL), NULL);
    a = kt_world_submit(w, 0, 50, 10, NULL);
    KT_OK(w->cache, kt_world_step(w));
    seq = kt_info(w, a).seq;
    KT_OK(w->cache, kvl_seq_length(w->cache, seq, &length));
    assert_int_equal(length, 50);
    memset(&span, 0, sizeof span);
    span.seq = seq;
    span.tokens = &token;
    span.n_tokens = 1;
    assert_true(kvl_seq_close(w->cache, seq) < 0);
    assert_true(kvl_seq_trim(w->cache, seq, 3, &length) < 0);
    assert_true(kvl_step_begin(w->cache, &span, 1, &step) < 0);
    KT_OK(w->cache, kvl_seq_fork(w->cache, seq, &copy, &length)); /* the caller's own copy */
    assert_int_equal(length, 50);
    KT_OK(w->cache, kvl_seq_trim(w->cache, copy, 32, &length));
    span.seq = copy;
    KT_OK(w->cache, kvl_step_begin(w->cache, &span, 1, &step));
    {
        const kvl_step *second;
        assert_int_equal(kvl_sched_plan(w->sched, &second), KVL_BUSY);
        assert_int_equal(kvl_sched_commit(w->sched, step, &token), KVL_MISMATCH);
    }
    kt_attend(w->cache, step, LAYERS);
    KT_OK(w->cache, kvl_step_end(w->cache, step));
    KT_OK(w->cache, kvl_sched_plan(w->sched, &step));
    assert_int_equal(kvl_step_end(w->cache, step), KVL_MISMATCH);
    assert_int_equal(kvl_step_abort(w->cache, step), KVL_MISMATCH);
    kt_world_check(w, step);
    kt_world_commit(w, step);
    KT_OK(w->cache, kvl_seq_close(w->cache, copy));
    assert_int_equal(kt_world_run(w, 30), KVL_IDLE);
    kt_world_answer_is(w, a, KVL_FINISH_LENGTH, 10);
}

static void test_close_and_drain(void **state) {
    kt_world *w = (kt_world *)*state;
    const kvl_step *step;
    kt_answer *a;
    kt_world_open(w, small(w, NULL), NULL);
    a = kt_world_submit(w, 0, 50, 5, NULL);
    kvl_sched_close(w->sched);
    assert_int_equal(kt_world_run(w, 50), KVL_DRAINED);
    kt_world_answer_is(w, a, KVL_FINISH_LENGTH, 5);
    assert_int_equal(kvl_sched_plan(w->sched, &step), KVL_DRAINED);
    {
        kvl_req fork;
        assert_true(kvl_sched_fork(w->sched, a->req, NULL, &fork) < 0);
    }
}

typedef struct delayed {
    kt_world *w;
    kvl_request q;
    int kind;
    uint32_t sleep_ms;
} delayed;

static void *later(void *arg) {
    delayed *h = (delayed *)arg;
    struct timespec t = {0, (long)h->sleep_ms * 1000000};
    nanosleep(&t, NULL);
    kvl_req req;
    if (h->kind == 0)
        KT_OK(NULL, kvl_sched_submit(h->w->sched, &h->q, &req));
    else
        kvl_sched_close(h->w->sched);
    return NULL;
}

static void test_wait(void **state) {
    kt_world *w = (kt_world *)*state;
    const int32_t token = 1;
    const kvl_step *step;
    double t0;
    kt_world_open(w, small(w, NULL), NULL);
    assert_int_equal(kvl_sched_plan(w->sched, &step), KVL_IDLE);
    t0 = seconds();
    assert_false(kvl_sched_wait(w->sched, 30));
    assert_true(seconds() - t0 > 0.025);
    assert_false(kvl_sched_wait(w->sched, 0));
    for (int kind = 0; kind < 2; kind++) {
        pthread_t thread;
        delayed h = {w, {0}, kind, 40};
        h.q.tokens = &token;
        h.q.n_tokens = 1;
        h.q.max_new_tokens = 1;
        t0 = seconds();
        assert_int_equal(pthread_create(&thread, NULL, later, &h), 0);
        assert_true(kvl_sched_wait(w->sched, 20000));
        assert_true(seconds() - t0 < 10);
        pthread_join(thread, NULL);
        assert_true(kvl_sched_wait(w->sched, 20000)); /* what came before the wait counts too */
        if (kind == 0) {
            KT_OK(w->cache, kvl_sched_plan(w->sched, &step));
            kt_attend(w->cache, step, LAYERS);
            KT_OK(w->cache, kvl_sched_commit(w->sched, step, &token));
            assert_int_equal(kvl_sched_plan(w->sched, &step), KVL_IDLE);
            assert_false(kvl_sched_wait(w->sched, 5));
            { /* a fork is news, and does not hide other news */
                kvl_req req, fork;
                h.q.max_new_tokens = 3;
                KT_OK(w->cache, kvl_sched_submit(w->sched, &h.q, &req));
                KT_OK(w->cache, kvl_sched_fork(w->sched, req, NULL, &fork));
                assert_true(kvl_sched_wait(w->sched, 0));
                KT_OK(w->cache, kvl_sched_plan(w->sched, &step));
                KT_OK(w->cache, kvl_sched_abort(w->sched, step));
                KT_OK(w->cache, kvl_sched_fork(w->sched, req, NULL, &fork));
                assert_true(kvl_sched_wait(w->sched, 0));
                while (kvl_sched_plan(w->sched, &step) == KVL_OK) {
                    const int32_t tokens[8] = {0};
                    assert_true(step->n_logits <= 8);
                    kt_attend(w->cache, step, LAYERS);
                    KT_OK(w->cache, kvl_sched_commit(w->sched, step, tokens));
                }
            }
        }
    }
    assert_int_equal(kvl_sched_plan(w->sched, &step), KVL_DRAINED);
}

enum { SUBMITTERS = 3, EACH = 40 };

typedef struct submitter {
    kt_world *w;
    kt_answer answers[EACH];
    uint32_t id, taken;
} submitter;

static void *submit_many(void *arg) {
    submitter *m = (submitter *)arg;
    kt_rng rng = {m->id};
    for (uint32_t i = 0; i < EACH; i++) {
        kt_answer *a = &m->answers[i];
        kvl_request q;
        kvl_req req = {0};
        kvl_stats s;
        kvl_result r;
        memset(&q, 0, sizeof q);
        kt_push_range(&a->stream, (int32_t)kt_below(&rng, 3) * 100,
                      kt_between(&rng, 1, 80)); /* many share prefixes */
        q.tokens = a->stream.tokens;
        q.n_tokens = a->n_prompt = a->stream.n;
        q.max_new_tokens = a->max_new = kt_between(&rng, 1, 12);
        q.user = a;
        q.klass = kt_chance(&rng, 30) ? KVL_BACKGROUND : KVL_INTERACTIVE;
        a->seed = m->id * 1000 + i;
        while ((r = kvl_sched_submit(m->w->sched, &q, &req)) == KVL_QUEUE_FULL) {
            struct timespec t = {0, 200000};
            nanosleep(&t, NULL);
        }
        KT_CHECK(r == KVL_OK, "%s", kvl_result_name(r));
        m->taken++;
        if (kt_chance(&rng, 20)) {
            r = kvl_sched_cancel(m->w->sched, req);
            KT_CHECK(r == KVL_OK || r == KVL_INVALID_HANDLE, "%s",
                     kvl_result_name(r)); /* its slot may be used again */
        }
        if (kt_chance(&rng, 30)) KT_OK(NULL, kvl_get_stats(m->w->cache, &s));
        if (kt_chance(&rng, 10)) kvl_sched_wait(m->w->sched, 0);
    }
    return NULL;
}

static void *close_after(void *arg) {
    submitter *m = (submitter *)arg;
    pthread_t threads[SUBMITTERS];
    for (uint32_t i = 0; i < SUBMITTERS; i++) pthread_create(&threads[i], NULL, submit_many, &m[i]);
    for (uint32_t i = 0; i < SUBMITTERS; i++) pthread_join(threads[i], NULL);
    kvl_sched_close(m->w->sched);
    return NULL;
}

/* submit, cancel, wait, close and stats from other threads while the owner plans and commits. */
static void test_threads(void **state) {
    kt_world *w = (kt_world *)*state;
    submitter *m = (submitter *)calloc(SUBMITTERS, sizeof *m);
    kvl_sched_desc sdesc;
    pthread_t closer;
    kvl_result r;
    kvl_stats s;
    memset(&sdesc, 0, sizeof sdesc);
    sdesc.max_waiting = 32;
    kt_world_open(w, tight(w, 40), &sdesc);
    for (uint32_t i = 0; i < SUBMITTERS; i++) {
        m[i].w = w;
        m[i].id = i;
    }
    assert_int_equal(pthread_create(&closer, NULL, close_after, m), 0);
    for (;;) {
        const kvl_step *step;
        int32_t tokens[256];
        kt_answer *who[256];
        r = kvl_sched_plan(w->sched, &step);
        if (r == KVL_DRAINED) break;
        if (r == KVL_IDLE) {
            kvl_sched_wait(w->sched, 1000);
            continue;
        }
        KT_OK(w->cache, r);
        kt_attend(w->cache, step, LAYERS);
        {
            kt_stream *streams[256];
            for (uint32_t i = 0; i < step->n_spans; i++)
                streams[i] = &((kt_answer *)step->spans[i].user)->stream;
            kt_shadow_step(&w->shadow, step, streams);
        }
        for (uint32_t i = 0; i < step->n_logits; i++) {
            who[i] = (kt_answer *)step->logit_users[i];
            tokens[i] = kt_next_token(&who[i]->stream, who[i]->seed, 1000);
        }
        KT_OK(w->cache, kvl_sched_commit(w->sched, step, step->n_logits ? tokens : NULL));
        for (uint32_t i = 0; i < step->n_logits; i++) kt_push(&who[i]->stream, tokens[i]);
    }
    pthread_join(closer, NULL);
    KT_VALID(w->cache);
    s = kt_stats(w->cache);
    assert_int_equal(s.submitted, SUBMITTERS * EACH);
    assert_int_equal(s.finished, SUBMITTERS * EACH);
    assert_int_equal(s.waiting + s.running, 0);
    for (uint32_t i = 0; i < SUBMITTERS; i++) {
        for (uint32_t k = 0; k < EACH; k++) kt_stream_free(&m[i].answers[k].stream);
    }
    free(m);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_runs_all, setup, teardown),
        cmocka_unit_test_setup_teardown(test_info_and_times, setup, teardown),
        cmocka_unit_test_setup_teardown(test_stop_tokens, setup, teardown),
        cmocka_unit_test_setup_teardown(test_app_finishes, setup, teardown),
        cmocka_unit_test_setup_teardown(test_length_limit, setup, teardown),
        cmocka_unit_test_setup_teardown(test_fcfs, setup, teardown),
        cmocka_unit_test_setup_teardown(test_priority_policy, setup, teardown),
        cmocka_unit_test_setup_teardown(test_longest_prefix_policy, setup, teardown),
        cmocka_unit_test_setup_teardown(test_policies_do_not_starve, setup, teardown),
        cmocka_unit_test_setup_teardown(test_decodes_first, setup, teardown),
        cmocka_unit_test_setup_teardown(test_short_prompts_are_not_held_up, setup, teardown),
        cmocka_unit_test_setup_teardown(test_max_gap, setup, teardown),
        cmocka_unit_test_setup_teardown(test_no_chunking_alone, setup, teardown),
        cmocka_unit_test_setup_teardown(test_learns_the_cost, setup, teardown),
        cmocka_unit_test_setup_teardown(test_over_gap, setup, teardown),
        cmocka_unit_test_setup_teardown(test_background_waits_for_interactive, setup, teardown),
        cmocka_unit_test_setup_teardown(test_background_prefill_yields, setup, teardown),
        cmocka_unit_test_setup_teardown(test_background_gives_up_memory, setup, teardown),
        cmocka_unit_test_setup_teardown(test_admission_foresees_growth, setup, teardown),
        cmocka_unit_test_setup_teardown(test_what_fits_may_pass, setup, teardown),
        cmocka_unit_test_setup_teardown(test_preemption_ranking, setup, teardown),
        cmocka_unit_test_setup_teardown(test_preemption_makes_progress, setup, teardown),
        cmocka_unit_test_setup_teardown(test_identical_prompts_wait, setup, teardown),
        cmocka_unit_test_setup_teardown(test_shared_system_prompt, setup, teardown),
        cmocka_unit_test_setup_teardown(test_namespaces_do_not_wait, setup, teardown),
        cmocka_unit_test_setup_teardown(test_does_not_wait_for_worse, setup, teardown),
        cmocka_unit_test_setup_teardown(test_waiting_for_one_that_is_cancelled, setup, teardown),
        cmocka_unit_test_setup_teardown(test_fork_of_a_prompt, setup, teardown),
        cmocka_unit_test_setup_teardown(test_fork_in_each_state, setup, teardown),
        cmocka_unit_test_setup_teardown(test_fork_outlives_its_parent, setup, teardown),
        cmocka_unit_test_setup_teardown(test_more_forks_than_sequences, setup, teardown),
        cmocka_unit_test_setup_teardown(test_fork_under_pressure, setup, teardown),
        cmocka_unit_test_setup_teardown(test_cancel_in_each_state, setup, teardown),
        cmocka_unit_test_setup_teardown(test_abort_restores, setup, teardown),
        cmocka_unit_test_setup_teardown(test_suspend, setup, teardown),
        cmocka_unit_test_setup_teardown(test_resize_while_running, setup, teardown),
        cmocka_unit_test_setup_teardown(test_queue_full, setup, teardown),
        cmocka_unit_test_setup_teardown(test_token_pool, setup, teardown),
        cmocka_unit_test_setup_teardown(test_never_fits, setup, teardown),
        cmocka_unit_test_setup_teardown(test_stale_requests, setup, teardown),
        cmocka_unit_test_setup_teardown(test_percentiles, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sequences_are_the_schedulers, setup, teardown),
        cmocka_unit_test_setup_teardown(test_close_and_drain, setup, teardown),
        cmocka_unit_test_setup_teardown(test_wait, setup, teardown),
        cmocka_unit_test_setup_teardown(test_threads, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
