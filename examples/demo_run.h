/* demo_run.h - streams of tokens on one cache and scheduler, and the measurements that demo.c makes with
 * them. */
#ifndef DEMO_RUN_H
#define DEMO_RUN_H

#include "llm/options.h"
#include "llm/runtime.h"
#include "llm/sampler.h"

#include <stdlib.h>
#include <string.h>

enum { RUN_STREAMS = 8, RUN_CHUNKED_STEP = 512, RUN_WHOLE_STEP = 2560 };

/* ---- streams: one request at a time each ---- */
typedef struct stream {
    sampler sampler;
    token_list answer;
    kvl_req req;
    kvl_req_info info; /* as of the last step */
    bool running, failed;
    double last_s, gap_s; /* when the last token came; the longest wait so far */
} stream;

typedef struct engine {
    runtime *rt;
    kvl_cache *cache;
    kvl_sched *sched;
    stream *streams;
    uint32_t n_streams;
    kvl_stats stats;              /* as of the last step */
    uint64_t kv_peak;             /* bytes of blocks that hold KV, and scratch */
    uint64_t n_generated, n_read; /* tokens written; rows of prompts computed */
} engine;

typedef struct engine_desc {
    runtime_cache_desc cache;
    uint32_t step_tokens; /* most rows of a step: not more than the model was loaded for */
    kvl_sched_desc sched;
} engine_desc;

static void engine_close(engine *e) {
    for (uint32_t i = 0; i < e->n_streams; i++) {
        sampler_free(&e->streams[i].sampler);
        token_list_free(&e->streams[i].answer);
    }
    kvl_sched_destroy(e->sched);
    kvl_cache_destroy(e->cache);
    free(e->streams);
    *e = (engine){0};
}

static bool engine_open(engine *e, runtime *rt, const engine_desc *d, uint32_t n_streams, char *err,
                        size_t n) {
    *e = (engine){.rt = rt};
    e->streams = calloc(n_streams, sizeof *e->streams);
    if (!e->streams) return llm_fail(err, n, "no memory for %u streams", n_streams);
    e->n_streams = n_streams;
    runtime_cache_desc c = d->cache;
    c.step_tokens = d->step_tokens; /* the cache needs scratch for its own steps alone */
    if (!runtime_cache(rt, &c, &e->cache, err, n)) return engine_close(e), false;
    kvl_result r = kvl_sched_create(e->cache, &d->sched, &e->sched);
    if (r != KVL_OK) {
        llm_fail(err, n, "%s: %s", kvl_result_name(r), kvl_last_error(e->cache));
        engine_close(e);
        return false;
    }
    kvl_get_stats(e->cache, &e->stats);
    return true;
}

/* Queues stream i's next request. Without `stops` it writes max_new tokens whatever they are. */
static bool engine_submit(engine *e, uint32_t i, const kvl_request *what, const sampler_desc *sampling,
                          bool stops, char *err, size_t n) {
    stream *s = &e->streams[i];
    int32_t stop[8];
    kvl_request request = *what;
    kvl_refusal refusal;
    sampler_free(&s->sampler);
    token_list_free(&s->answer);
    if (!sampler_init(&s->sampler, sampling, err, n)) return false;
    request.user = s;
    request.stop_tokens = stop;
    request.n_stop_tokens = stops ? runtime_stop_tokens(e->rt, stop) : 0;
    kvl_result r = kvl_sched_submit_ex(e->sched, &request, &s->req, &refusal);
    if (r == KVL_NEVER_FITS)
        return llm_fail(err, n, "%u tokens (%llu bytes) are more than the %u that a sequence can have",
                        refusal.n_tokens, (unsigned long long)refusal.need_bytes, refusal.max_tokens);
    if (r != KVL_OK) return llm_fail(err, n, "%s: %s", kvl_result_name(r), kvl_result_text(r));
    s->running = true;
    s->failed = false;
    s->gap_s = 0;
    s->info = (kvl_req_info){0};
    return true;
}

static kvl_output engine_sample(void *user, const kvl_step *step, uint32_t i, const float *logits) {
    engine *e = user;
    stream *s = step->logit_users[i];
    double now = runtime_now();
    kvl_output o = {.token = sampler_sample(&s->sampler, logits, e->rt->config->n_vocab)};
    if (o.token < 0 || !token_list_push(&s->answer, o.token)) {
        s->failed = o.no_token = o.finish = true;
        return o;
    }
    if (s->answer.n > 1 && now - s->last_s > s->gap_s) s->gap_s = now - s->last_s;
    s->last_s = now;
    e->n_generated++;
    return o;
}

/* One step. *ran is false where nothing can run now. */
static bool engine_step(engine *e, bool *ran, char *err, size_t n) {
    kvl_result r = runtime_step(e->rt, e->cache, e->sched, engine_sample, e, err, n);
    *ran = r == KVL_OK;
    if (r < 0) return false;
    kvl_get_stats(e->cache, &e->stats);
    uint64_t bytes =
        e->stats.bytes_used + e->stats.bytes_cached + e->stats.bytes_scratch + e->stats.bytes_workspace;
    if (bytes > e->kv_peak) e->kv_peak = bytes;
    e->n_read = e->stats.prefill_tokens;
    for (uint32_t i = 0; i < e->n_streams; i++) {
        stream *s = &e->streams[i];
        if (!s->running) continue;
        if (s->failed) return llm_fail(err, n, "the model gave no finite logits, or memory is short");
        kvl_sched_info(e->sched, s->req, &s->info);
        s->running = s->info.state != KVL_REQ_FINISHED;
    }
    return true;
}

static bool engine_busy(const engine *e) {
    for (uint32_t i = 0; i < e->n_streams; i++)
        if (e->streams[i].running) return true;
    return false;
}

/* A step where there is something to run. */
static bool engine_must_step(engine *e, char *err, size_t n) {
    bool ran;
    if (!engine_step(e, &ran, err, n)) return false;
    return ran || llm_fail(err, n, "the KV budget does not let the streams go on");
}

/* Steps until all streams have ended. */
static bool engine_drain(engine *e, char *err, size_t n) {
    while (engine_busy(e))
        if (!engine_must_step(e, err, n)) return false;
    return true;
}

/* ---- measurements: each on a cache of its own, empty at first ---- */
typedef struct question { /* what a stream is asked, and what it answered in the live run */
    const int32_t *tokens;
    uint32_t n_tokens, max_new;
    sampler_desc sampling;
    const int32_t *answer;
    size_t n_answer;
} question;

typedef struct figures {
    /* the same questions all at once and one after another */
    double together_rate, alone_rate;
    uint32_t n_compared, n_same; /* answers, and those that were the same tokens in all three runs */
    /* a long prompt among streams */
    uint32_t gap_streams, gap_prompt;
    double chunked_gap_ms, whole_gap_ms;
    /* the next token of a long text */
    uint32_t at_tokens;
    double cached_ms, recomputed_ms;
} figures;

static bool ask(engine *e, uint32_t i, const question *q, uint32_t max_new, bool stops, char *err, size_t n) {
    kvl_request r = {.tokens = q->tokens, .n_tokens = q->n_tokens, .max_new_tokens = max_new};
    return engine_submit(e, i, &r, &q->sampling, stops, err, n);
}

/* All questions, together or one after another; *rate is tokens written a second, reading included. */
static bool answer_all(runtime *rt, const engine_desc *d, const question *q, uint32_t n_q, bool together,
                       double *rate, bool *same, char *err, size_t n) {
    engine e;
    bool ok = engine_open(&e, rt, d, n_q, err, n);
    if (!ok) return false;
    double start = runtime_now();
    for (uint32_t i = 0; i < n_q && ok; i++) {
        ok = ask(&e, i, &q[i], q[i].max_new, true, err, n);
        if (ok && !together) ok = engine_drain(&e, err, n);
    }
    ok = ok && engine_drain(&e, err, n);
    *rate = (double)e.n_generated / (runtime_now() - start);
    for (uint32_t i = 0; i < n_q && ok; i++) {
        const token_list *a = &e.streams[i].answer;
        same[i] = same[i] && a->n == q[i].n_answer && memcmp(a->ids, q[i].answer, a->n * sizeof *a->ids) == 0;
    }
    engine_close(&e);
    return ok;
}

static bool measure_rates(runtime *rt, const engine_desc *d, const question *q, uint32_t n_q, figures *f,
                          char *err, size_t n) {
    bool same[RUN_STREAMS];
    for (uint32_t i = 0; i < RUN_STREAMS; i++) same[i] = true;
    if (!answer_all(rt, d, q, n_q, true, &f->together_rate, same, err, n) ||
        !answer_all(rt, d, q, n_q, false, &f->alone_rate, same, err, n))
        return false;
    f->n_compared = n_q;
    f->n_same = 0;
    for (uint32_t i = 0; i < n_q; i++) f->n_same += same[i];
    return true;
}

/* Streams write, as long as a sequence can be; then a long prompt comes. Measures the longest wait of a
 * stream from then until the long prompt has been answered with two tokens. */
static bool measure_gap(runtime *rt, const engine_desc *d, const question *q, uint32_t n_q,
                        const question *intruder, double *gap_ms, char *err, size_t n) {
    enum { BEFORE = 8 }; /* tokens of each stream before it comes */
    engine e;
    bool ok = engine_open(&e, rt, d, n_q + 1, err, n);
    if (!ok) return false;
    for (uint32_t i = 0; i < n_q && ok; i++)
        ok = ask(&e, i, &q[i], d->cache.seq_tokens - q[i].n_tokens, false, err, n);
    while (ok && e.n_generated < BEFORE * n_q) ok = engine_must_step(&e, err, n);
    for (uint32_t i = 0; i < n_q; i++) e.streams[i].gap_s = 0;
    ok = ok && ask(&e, n_q, intruder, 2, false, err, n);
    while (ok && e.streams[n_q].running) ok = engine_must_step(&e, err, n);
    *gap_ms = 0;
    for (uint32_t i = 0; i < n_q; i++)
        if (e.streams[i].gap_s * 1e3 > *gap_ms) *gap_ms = e.streams[i].gap_s * 1e3;
    engine_close(&e);
    return ok;
}

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *x, uint32_t n) {
    qsort(x, n, sizeof *x, compare_doubles);
    return n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

/* The time of one more token after q's: with the cache, and from nothing. Medians. */
static bool measure_token(runtime *rt, const engine_desc *d, const question *q, uint32_t repeats, figures *f,
                          char *err, size_t n) {
    enum { TOKENS = 16, MOST = 8 };
    double ms[TOKENS], again[MOST];
    engine e;
    bool ok = engine_open(&e, rt, d, 1, err, n) && ask(&e, 0, q, TOKENS + 1, false, err, n);
    while (ok && e.n_generated == 0) ok = engine_must_step(&e, err, n);
    for (uint32_t i = 0; i < TOKENS && ok; i++) {
        double start = runtime_now();
        ok = engine_must_step(&e, err, n);
        ms[i] = (runtime_now() - start) * 1e3;
    }
    ok = ok && engine_drain(&e, err, n);
    for (uint32_t i = 0; i < repeats && i < MOST && ok; i++) {
        kvl_request r = {.tokens = q->tokens,
                         .n_tokens = q->n_tokens,
                         .max_new_tokens = 1,
                         .no_match = true,
                         .no_keep = true};
        double start = runtime_now();
        ok = engine_submit(&e, 0, &r, &q->sampling, false, err, n) && engine_drain(&e, err, n);
        again[i] = (runtime_now() - start) * 1e3;
    }
    if (ok) {
        f->at_tokens = q->n_tokens;
        f->cached_ms = median(ms, TOKENS);
        f->recomputed_ms = median(again, repeats < MOST ? repeats : MOST);
    }
    engine_close(&e);
    return ok;
}

#endif /* DEMO_RUN_H */
