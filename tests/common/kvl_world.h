/* Drives a scheduler with the toy model: every step is checked against the shadow of memory, every request's
   tokens are derived from what its sequence holds. Used by the scheduler's tests and by the model checker. */
#ifndef KVL_WORLD_H
#define KVL_WORLD_H

#include "kvl_test.h"

typedef struct kt_answer { /* one request; its address is the request's user pointer */
    kvl_req req;
    kt_stream stream; /* prompt and what was generated so far */
    uint32_t
        n_prompt; /* as submitted; a fork has its parent's, and what that had answered so far as its own */
    uint32_t max_new;
    uint64_t seed;
    uint32_t finish_at; /* the app ends it after so many tokens; 0 = never */
    bool cancelled;
    bool stops;                     /* has stop tokens (what they are is the test's affair) */
    uint32_t first_step, last_step; /* number of the steps that gave its first and its last token */
    uint32_t rows;                  /* rows it ran, recomputed ones included */
} kt_answer;

enum { KT_MAX_ANSWERS = 4096 };

typedef struct kt_world {
    kt_env env;
    kvl_cache_desc desc;
    kvl_sched_desc sdesc;
    kvl_cache *cache;
    kvl_sched *sched;
    kt_shadow shadow;
    kt_answer *answers[KT_MAX_ANSWERS];
    uint32_t n_answers;
    uint32_t vocabulary;
    kvl_cost cost; /* what a step takes on the test's clock */
    /* the last step */
    uint32_t steps, rows, decode_rows, prefill_rows, spans;
    double ms;
} kt_world;

static KT_UNUSED void kt_world_init(kt_world *w) {
    memset(w, 0, sizeof *w);
    kt_env_init(&w->env);
    w->vocabulary = 1000;
    w->cost.step_ms = 1.0;
}

static KT_UNUSED void kt_world_open(kt_world *w, kvl_cache_desc desc, const kvl_sched_desc *sdesc) {
    w->desc = desc;
    memset(&w->sdesc, 0, sizeof w->sdesc);
    if (sdesc) w->sdesc = *sdesc;
    KT_OK(NULL, kvl_cache_create(&w->desc, &w->cache));
    KT_OK(w->cache, kvl_sched_create(w->cache, &w->sdesc, &w->sched));
    kt_shadow_init(&w->shadow, &w->desc.geometry);
}

static KT_UNUSED void kt_world_close(kt_world *w) {
    kvl_sched_destroy(w->sched);
    if (w->cache) {
        kvl_stats s = kt_stats(w->cache);
        KT_VALID(w->cache);
        KT_CHECK(kt_used(&s) == 0 && s.sequences == 0, "%u blocks and %u sequences are left", kt_used(&s),
                 s.sequences);
        kvl_cache_destroy(w->cache);
        kt_shadow_free(&w->shadow);
    }
    for (uint32_t i = 0; i < w->n_answers; i++) {
        kt_stream_free(&w->answers[i]->stream);
        free(w->answers[i]);
    }
    w->n_answers = 0;
    w->sched = NULL;
    w->cache = NULL;
    kt_env_check(&w->env);
}

static KT_UNUSED kt_answer *kt_answer_new(kt_world *w) {
    kt_answer *a = (kt_answer *)calloc(1, sizeof *a);
    assert_non_null(a);
    KT_CHECK(w->n_answers < KT_MAX_ANSWERS, "%u answers", w->n_answers);
    a->seed = w->n_answers;
    w->answers[w->n_answers++] = a;
    return a;
}

static KT_UNUSED void kt_answer_drop(kt_world *w) { /* the one made last */
    kt_answer *a = w->answers[--w->n_answers];
    kt_stream_free(&a->stream);
    free(a);
}

/* Submits what the answer's stream holds as the prompt. `extra` (may be null) gives the other fields. */
static KT_UNUSED kvl_result kt_world_try(kt_world *w, kt_answer *a, uint32_t max_new,
                                         const kvl_request *extra) {
    kvl_request q;
    memset(&q, 0, sizeof q);
    if (extra) q = *extra;
    q.tokens = a->stream.tokens;
    q.n_tokens = a->stream.n;
    q.max_new_tokens = max_new;
    q.name_space = a->stream.name_space;
    q.salt = a->stream.salt;
    q.user = a;
    a->n_prompt = a->stream.n;
    a->max_new = max_new ? max_new : 256;
    return kvl_sched_submit(w->sched, &q, &a->req);
}

/* A request for max_new tokens after the prompt first, first + 1, …, of n tokens. */
static KT_UNUSED kt_answer *kt_world_submit(kt_world *w, int32_t first, uint32_t n, uint32_t max_new,
                                            const kvl_request *extra) {
    kt_answer *a = kt_answer_new(w);
    kt_stream_init(&a->stream, extra ? extra->name_space : 0, extra ? extra->salt : 0);
    kt_push_range(&a->stream, first, n);
    KT_OK(w->cache, kt_world_try(w, a, max_new, extra));
    return a;
}

static KT_UNUSED kt_answer *kt_world_fork(kt_world *w, kt_answer *parent, uint64_t seed) {
    kt_answer *a = kt_answer_new(w);
    kt_stream_copy(&a->stream, &parent->stream, parent->stream.n);
    a->n_prompt = parent->n_prompt;
    a->seed = seed;
    a->max_new = parent->max_new;
    KT_OK(w->cache, kvl_sched_fork(w->sched, parent->req, a, &a->req));
    return a;
}

static KT_UNUSED kvl_req_info kt_info(kt_world *w, const kt_answer *a) {
    kvl_req_info info = {0};
    KT_OK(w->cache, kvl_sched_info(w->sched, a->req, &info));
    KT_CHECK(info.user == a, "user pointer of request %x", a->req.id);
    return info;
}

/* What is true of every step: whose rows, which positions, which logits, which memory. */
static KT_UNUSED void kt_world_check(kt_world *w, const kvl_step *step) {
    kt_stream *streams[256];
    uint32_t wanted = 0;
    KT_CHECK(step->n_spans > 0 && step->n_spans <= 256, "%u spans", step->n_spans);
    w->rows = step->n_tokens;
    w->decode_rows = w->prefill_rows = 0;
    w->spans = step->n_spans;
    for (uint32_t s = 0; s < step->n_spans; s++) {
        const kvl_step_span *span = &step->spans[s];
        kt_answer *a = (kt_answer *)span->user;
        uint32_t end = span->position + span->n_rows;
        KT_CHECK(span->request == a->req.id, "span %u is of request %x, user of %x", s, span->request,
                 a->req.id);
        for (uint32_t q = 0; q < s; q++)
            KT_CHECK(step->spans[q].user != a, "request %x has two spans", a->req.id);
        streams[s] = &a->stream;
        KT_CHECK(end <= a->stream.n, "request %x runs to %u of %u tokens", a->req.id, end, a->stream.n);
        KT_CHECK((span->n_logits > 0) == (end == a->stream.n), "request %x: %u logits at %u of %u tokens",
                 a->req.id, span->n_logits, end, a->stream.n);
        if (a->stream.n > a->n_prompt && span->n_rows == 1 && end == a->stream.n)
            w->decode_rows++;
        else
            w->prefill_rows += span->n_rows;
        a->rows += span->n_rows;
        if (span->n_logits) wanted++;
    }
    KT_CHECK(step->n_logits >= wanted, "%u logits for %u spans that end", step->n_logits, wanted);
    for (uint32_t i = 0; i < step->n_logits; i++) {
        kt_answer *a = (kt_answer *)step->logit_users[i];
        uint32_t row = step->logit_rows[i];
        const kvl_step_span *span = &step->spans[step->row_span[row]];
        const kt_answer *host = (const kt_answer *)span->user;
        KT_CHECK(step->logit_requests[i] == a->req.id, "logits %u: request %x, user of %x", i,
                 step->logit_requests[i], a->req.id);
        KT_CHECK(step->positions[row] + 1 == a->stream.n, "request %x samples at %u of %u tokens", a->req.id,
                 step->positions[row], a->stream.n);
        KT_CHECK(host->stream.chain[a->stream.n - 1] == a->stream.chain[a->stream.n - 1],
                 "request %x samples from another's row", a->req.id);
    }
    kt_shadow_step(&w->shadow, step, streams);
}

static KT_UNUSED double kt_world_ms(const kt_world *w) {
    return w->cost.step_ms + w->cost.prefill_token_ms * w->prefill_rows + w->cost.decode_ms * w->decode_rows;
}

/* Samples for all logits rows, runs the layers, lets the time pass, commits. */
static KT_UNUSED void kt_world_commit(kt_world *w, const kvl_step *step) {
    kvl_output outputs[1024];
    kt_answer *who[1024];
    uint32_t n = step->n_logits;
    KT_CHECK(n <= 1024, "%u logits", n);
    memset(outputs, 0, sizeof outputs);
    for (uint32_t i = 0; i < n; i++) {
        kt_answer *a = who[i] = (kt_answer *)step->logit_users[i];
        outputs[i].token = kt_next_token(&a->stream, a->seed, w->vocabulary);
        outputs[i].finish = a->finish_at && a->stream.n - a->n_prompt + 1 >= a->finish_at;
    }
    kt_attend(w->cache, step, w->desc.geometry.n_layers);
    w->ms = kt_world_ms(w);
    kt_advance_ms(&w->env, w->ms);
    w->steps++;
    KT_OK(w->cache, kvl_sched_commit_ex(w->sched, step, outputs));
    for (uint32_t i = 0; i < n; i++) {
        if (who[i]->cancelled) continue; /* its last token may or may not count */
        if (!who[i]->first_step) who[i]->first_step = w->steps;
        who[i]->last_step = w->steps;
        kt_push(&who[i]->stream, outputs[i].token);
    }
}

static KT_UNUSED kvl_result kt_world_step(kt_world *w) {
    const kvl_step *step = NULL;
    kvl_result r = kvl_sched_plan(w->sched, &step);
    if (r != KVL_OK) return r;
    kt_world_check(w, step);
    kt_world_commit(w, step);
    return KVL_OK;
}

/* Steps until nothing can run; returns IDLE or DRAINED. */
static KT_UNUSED kvl_result kt_world_run(kt_world *w, uint32_t max_steps) {
    for (uint32_t i = 0; i <= max_steps; i++) {
        kvl_result r = kt_world_step(w);
        if (r != KVL_OK) return r;
    }
    KT_CHECK(false, "not done after %u steps", max_steps);
    return KVL_OK;
}

static KT_UNUSED bool kt_finished(kt_world *w, const kt_answer *a) {
    return kt_info(w, a).state == KVL_REQ_FINISHED;
}

/* The scheduler's record of an answer is the test's. */
static KT_UNUSED void kt_world_answer_is(kt_world *w, const kt_answer *a, kvl_finish finish,
                                         uint32_t n_generated) {
    int32_t tokens[2048];
    uint32_t n = 0;
    kvl_req_info info = kt_info(w, a);
    KT_CHECK(info.state == KVL_REQ_FINISHED && info.finish == finish,
             "request %x: state %d, finish %d not %d", a->req.id, (int)info.state, (int)info.finish,
             (int)finish);
    KT_CHECK(info.n_generated == n_generated, "request %x: %u tokens, not %u", a->req.id, info.n_generated,
             n_generated);
    KT_OK(w->cache, kvl_sched_tokens(w->sched, a->req, tokens, 2048, &n));
    KT_CHECK(n == n_generated, "request %x: %u tokens, not %u", a->req.id, n, n_generated);
    KT_CHECK(n <= a->stream.n - a->n_prompt &&
                 memcmp(tokens, a->stream.tokens + a->n_prompt, n * sizeof *tokens) == 0,
             "request %x: other tokens than were committed", a->req.id);
}

#endif /* KVL_WORLD_H */
