/* simulate.c - drives kvlite's scheduler and cache over a workload: null backend, a clock that the cost model moves. */
#include "trace.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct live { /* what the simulation knows of a request */
    uint32_t n_known; /* tokens that have KV, or had it before a preemption */
    uint32_t n_answered;
    uint32_t unfilled; /* rows of its open block that hold nothing yet */
    uint32_t step;     /* the last one that it had rows in */
    bool admitted, late;
} live;

typedef struct simulation {
    const workload *w;
    const setup *s;
    result *out;
    kvl_cache *cache;
    kvl_sched *sched;
    uint64_t now_ns;
    metrics m;
    live *live;
    kvl_req *handles;
    uint32_t *active, n_active; /* admitted and not finished */
    uint32_t next;              /* request to submit */
    uint32_t block_tokens, max_tokens, max_new, step_number;
    double row_bytes, kv_token_bytes; /* of an exact row; of a packed token */
    uint64_t unfilled;                /* rows, of all */
    int32_t *prompt;
    kvl_output *outputs;
    double used, unused, slab_ms, slack_ms; /* bytes times milliseconds */
    uint64_t last_preemptions, within;
    gap_histogram bounds, plan, commit, plan_full;
    uint32_t sample_stride, sample_left;
    char *err;
    size_t err_len;
} simulation;

static uint64_t sim_clock(void *user) { return ((const simulation *)user)->now_ns; }
static double now_ms(const simulation *z) { return (double)z->now_ns / 1e6; }
static double wall_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static bool fail(simulation *z, const char *what, const char *why) {
    return llm_fail(z->err, z->err_len, "%s: %s", what, why);
}

/* ---- making the cache and the scheduler ---- */

static bool open_cache(const setup *s, uint32_t max_tokens, simulation *z, kvl_cache **out, char *err,
                       size_t err_len) {
    char why[LLM_ERR_LEN];
    kvl_cache_desc d = {
        .geometry = s->geometry, .device_bytes = s->kv_bytes, .error = why, .error_size = sizeof why};
    d.max_sequences = s->max_running;
    d.max_step_tokens = s->step_tokens;
    d.max_seq_tokens = max_tokens;
    d.no_prefix_cache = s->no_prefix_cache;
    d.context_desc.backend = KVL_BACKEND_NULL;
    d.context_desc.clock = z ? sim_clock : NULL;
    d.context_desc.user = z;
    if (kvl_cache_create(&d, out) == KVL_OK) return true;
    return llm_fail(err, err_len, "%s", why);
}

bool setup_limits(const setup *s, uint32_t *max_tokens, double *kv_token_bytes, char *err, size_t err_len) {
    kvl_cache *cache;
    kvl_fit fit;
    kvl_block_layout layout;
    if (!open_cache(s, 1u << 20, NULL, &cache, err, err_len)) return false;
    kvl_can_fit(cache, 1, 1, &fit);
    kvl_cache_layout(cache, 0, false, &layout);
    uint32_t T = s->geometry.block_tokens ? s->geometry.block_tokens : 32;
    *max_tokens = (uint32_t)fit.max_tokens;
    *kv_token_bytes = (double)layout.block_bytes / T;
    kvl_cache_destroy(cache);
    return true;
}

static size_t write_events(void *user, const void *data, size_t size) { return fwrite(data, 1, size, user); }

static bool open_scheduler(simulation *z) {
    const setup *s = z->s;
    kvl_stats before, after;
    kvl_sched_desc d = {.policy = s->policy, .max_running = s->max_running, .max_waiting = s->max_waiting};
    d.token_pool_bytes = UINT64_MAX / 4;
    d.step_tokens = s->step_tokens;
    d.min_chunk = s->min_chunk;
    d.max_gap_ms = s->max_gap_ms;
    d.fixed_cost = !s->learn;
    d.record = s->events ? write_events : NULL;
    d.record_user = s->events;
    if (!s->learn) d.cost = cost_for_scheduler(&s->cost, z->kv_token_bytes);
    kvl_get_stats(z->cache, &before);
    if (kvl_sched_create(z->cache, &d, &z->sched) != KVL_OK)
        return fail(z, "scheduler", kvl_last_error(z->cache));
    kvl_get_stats(z->cache, &after);
    z->out->waiting_record_bytes = (double)(after.bytes_metadata - before.bytes_metadata) / s->max_waiting;
    z->out->metadata_bytes = after.bytes_metadata;
    return true;
}

static bool sim_open(simulation *z) {
    const workload *w = z->w;
    kvl_block_layout packed, exact;
    uint32_t most = w->max_total;
    if (!setup_limits(z->s, &z->max_tokens, &z->kv_token_bytes, z->err, z->err_len)) return false;
    z->max_new = z->s->max_new ? z->s->max_new : w->max_output;
    if (z->max_new != KVL_NONE && w->max_prompt + z->max_new > most) most = w->max_prompt + z->max_new;
    if (!open_cache(z->s, most < z->max_tokens ? most : z->max_tokens, z, &z->cache, z->err, z->err_len))
        return false;
    kvl_cache_layout(z->cache, 0, false, &packed);
    kvl_cache_layout(z->cache, 0, true, &exact);
    z->block_tokens = z->s->geometry.block_tokens ? z->s->geometry.block_tokens : 32;
    z->row_bytes = (double)exact.block_bytes / z->block_tokens;
    z->live = calloc(w->n, sizeof *z->live);
    z->handles = calloc(w->n, sizeof *z->handles);
    z->active = calloc(w->n, sizeof *z->active);
    z->prompt = calloc(w->max_prompt, sizeof *z->prompt);
    z->out->hits = calloc(w->n, sizeof *z->out->hits);
    z->outputs = calloc((size_t)z->s->step_tokens + z->s->max_running, sizeof *z->outputs);
    z->sample_stride = z->sample_left = 1;
    if (!z->live || !z->handles || !z->active || !z->prompt || !z->outputs || !z->out->hits)
        return fail(z, "simulation", "out of memory");
    return metrics_open(&z->m, w, z->err, z->err_len) && open_scheduler(z);
}

static void sim_close(simulation *z) {
    kvl_sched_destroy(z->sched); /* ends the event trace */
    kvl_cache_destroy(z->cache);
    metrics_free(&z->m);
    free(z->live);
    free(z->handles);
    free(z->active);
    free(z->prompt);
    free(z->outputs);
}

/* ---- arrivals ---- */

static uint32_t room_for_answer(const simulation *z, const request *q) {
    uint32_t most = z->max_tokens - q->n_prompt + 1, n = z->max_new == KVL_NONE ? q->n_output : z->max_new;
    if (n < q->n_output) n = q->n_output;
    return n < most ? n : most;
}

/* Submits what has arrived, as far as the queue takes it. */
static bool submit_arrived(simulation *z) {
    for (; z->next < z->w->n && z->w->requests[z->next].arrival_ms * 1e6 <= (double)z->now_ns; z->next++) {
        const request *q = &z->w->requests[z->next];
        kvl_refusal refusal;
        for (uint32_t i = 0; i < q->n_prompt; i++) z->prompt[i] = workload_token(z->w, z->next, i);
        kvl_request r = {.tokens = z->prompt, .n_tokens = q->n_prompt, .user = &z->live[z->next]};
        r.max_new_tokens = room_for_answer(z, q);
        kvl_result code = kvl_sched_submit_ex(z->sched, &r, &z->handles[z->next], &refusal);
        if (code == KVL_QUEUE_FULL) return true;
        if (code != KVL_OK) return fail(z, "submit", refusal.text);
        z->out->waiting_answer_bytes += (double)r.max_new_tokens * sizeof *z->prompt / z->w->n;
    }
    return true;
}

/* ---- a step ---- */

static uint32_t index_of(const simulation *z, const void *user) {
    return (uint32_t)((const live *)user - z->live);
}

static void set_unfilled(simulation *z, live *a, uint32_t rows) {
    z->unfilled += rows;
    z->unfilled -= a->unfilled;
    a->unfilled = rows;
}

/* Who was preempted holds nothing now. */
static void forget_preempted(simulation *z) {
    for (uint32_t i = 0; i < z->n_active; i++) {
        kvl_req_info info;
        live *a = &z->live[z->active[i]];
        if (a->step == z->step_number || !a->unfilled) continue;
        if (kvl_sched_info(z->sched, z->handles[z->active[i]], &info) == KVL_OK &&
            info.state == KVL_REQ_WAITING)
            set_unfilled(z, a, 0);
    }
}

/* Sums up the rows of a step; *bound_ms becomes what DESIGN lets the gap of its streams be: the longer of max_gap_ms
   and a step of the decodes and the smallest chunk alone. */
static step_work look_at_step(simulation *z, const kvl_step *step, double *bound_ms) {
    step_work all = {0}, least;
    uint32_t chunk = 0, chunk_at = 0;
    for (uint32_t i = 0; i < step->n_spans; i++) {
        const kvl_step_span *span = &step->spans[i];
        live *a = span->user;
        uint32_t r = index_of(z, a), end = span->position + span->n_rows, T = z->block_tokens;
        double pairs = (double)span->n_rows * span->position + 0.5 * span->n_rows * span->n_rows;
        if (!a->admitted) {
            a->admitted = true;
            z->active[z->n_active++] = r;
            z->out->hits[r] = span->position;
            z->out->hit_tokens += span->position;
        }
        if (a->n_answered && span->n_rows == 1 && span->n_logits) {
            all.decode_rows++;
            all.decode_kv_tokens += pairs;
        } else {
            all.prefill_rows += span->n_rows;
            all.prefill_pairs += pairs;
            if (span->position < a->n_known)
                z->out->recomputed_rows += (end < a->n_known ? end : a->n_known) - span->position;
            if (!chunk) {
                chunk = span->n_rows;
                chunk_at = span->position;
            }
        }
        if (end > a->n_known) a->n_known = end;
        a->step = z->step_number;
        set_unfilled(z, a, (T - end % T) % T);
    }
    least = all;
    if (chunk > z->s->min_chunk) chunk = z->s->min_chunk;
    least.prefill_rows = chunk;
    least.prefill_pairs = (double)chunk * chunk_at + 0.5 * chunk * chunk;
    *bound_ms = fmax(z->s->max_gap_ms, cost_ms(&z->s->cost, &least, z->kv_token_bytes));
    return all;
}

static void take_sample(simulation *z, const kvl_stats *stats) {
    result *o = z->out;
    if (--z->sample_left) return;
    if (o->n_samples == MAX_SAMPLES) { /* every second one goes */
        for (uint32_t i = 0; i < MAX_SAMPLES / 2; i++) o->samples[i] = o->samples[2 * i + 1];
        o->n_samples /= 2;
        z->sample_stride *= 2;
    }
    z->sample_left = z->sample_stride;
    sample *p = &o->samples[o->n_samples++];
    p->ms = now_ms(z);
    p->used_bytes = stats->bytes_used;
    p->cached_bytes = stats->bytes_cached;
    p->waste = stats->bytes_used ? (double)z->unfilled * z->row_bytes / (double)stats->bytes_used : 0;
    p->running = stats->running;
    p->waiting = stats->waiting;
}

/* Adds what stands allocated for the time of a step. */
static void account_memory(simulation *z, const kvl_stats *stats, double ms) {
    uint64_t slabs = stats->bytes_slabs - (uint64_t)stats->slabs_free * stats->slab_bytes;
    z->used += (double)stats->bytes_used * ms;
    z->unused += (double)z->unfilled * z->row_bytes * ms;
    z->slab_ms += (double)slabs * ms;
    z->slack_ms += (double)(slabs - stats->bytes_used - stats->bytes_cached) * ms;
    take_sample(z, stats);
}

static void remove_active(simulation *z, uint32_t r) {
    uint32_t i = 0;
    while (z->active[i] != r) i++;
    z->active[i] = z->active[--z->n_active];
}

/* Tokens for all logits rows, at the time that the step ends. */
static void answer(simulation *z, const kvl_step *step, double bound_ms) {
    for (uint32_t i = 0; i < step->n_logits; i++) {
        live *a = step->logit_users[i];
        uint32_t r = index_of(z, a);
        double gap = metrics_token(&z->m, r, now_ms(z));
        if (gap >= 0) {
            bool within = gap <= bound_ms * (1 + 1e-6) + 2e-6; /* the clock has whole nanoseconds */
            z->within += within;
            a->late = a->late || !within;
            gap_add(&z->bounds, bound_ms);
        }
        z->outputs[i] = (kvl_output){.token = workload_answer(r, a->n_answered++)};
        if (a->n_answered < z->w->requests[r].n_output) continue;
        z->outputs[i].finish = true;
        set_unfilled(z, a, 0);
        remove_active(z, r);
        metrics_done(&z->m, now_ms(z));
    }
}

static bool run_step(simulation *z, const kvl_step *step, double plan_us) {
    kvl_stats stats;
    double bound_ms, ms;
    z->step_number++;
    kvl_get_stats(z->cache, &stats);
    step_work work = look_at_step(z, step, &bound_ms);
    if (stats.preemptions != z->last_preemptions) forget_preempted(z);
    z->last_preemptions = stats.preemptions;
    ms = cost_ms(&z->s->cost, &work, z->kv_token_bytes);
    account_memory(z, &stats, ms);
    z->out->busy_ms += ms;
    z->out->prefill_rows += (uint64_t)work.prefill_rows;
    z->now_ns += (uint64_t)(ms * 1e6 + 0.5);
    for (uint32_t l = 0; l < z->s->geometry.n_layers; l++) kvl_step_layer_done(z->cache, step, l, NULL);
    answer(z, step, bound_ms);
    double t0 = wall_us();
    kvl_result code = kvl_sched_commit_ex(z->sched, step, z->outputs);
    gap_add(&z->commit, wall_us() - t0);
    gap_add(&z->plan, plan_us);
    if (stats.running >= 256) gap_add(&z->plan_full, plan_us);
    return code == KVL_OK || fail(z, "commit", kvl_sched_last_error(z->sched));
}

static bool run(simulation *z) {
    uint32_t tenth = 0;
    while (z->m.n_done < z->w->n) {
        const kvl_step *step;
        if (!submit_arrived(z)) return false;
        double t0 = wall_us();
        kvl_result code = kvl_sched_plan(z->sched, &step);
        double plan_us = wall_us() - t0;
        if (code == KVL_IDLE && z->next < z->w->n &&
            z->w->requests[z->next].arrival_ms * 1e6 > (double)z->now_ns)
            z->now_ns = (uint64_t)ceil(z->w->requests[z->next].arrival_ms * 1e6);
        else if (code != KVL_OK)
            return llm_fail(z->err, z->err_len, "plan: %s with %u of %u requests done", kvl_result_name(code),
                            z->m.n_done, z->w->n);
        else if (!run_step(z, step, plan_us))
            return false;
        for (; z->s->progress && z->m.n_done * 10ull >= (tenth + 1ull) * z->w->n; tenth++)
            fprintf(stderr, "%u%% ", (tenth + 1) * 10);
    }
    if (z->s->progress) fprintf(stderr, "\n");
    return true;
}

static void fill_result(simulation *z, double wall_s) {
    result *o = z->out;
    kvl_stats stats;
    uint64_t late = 0;
    kvl_get_stats(z->cache, &stats);
    metrics_result(&z->m, o);
    for (uint32_t i = 0; i < z->w->n; i++) late += z->live[i].late;
    o->steps = stats.steps;
    o->preemptions = stats.preemptions;
    o->waste = z->used > 0 ? z->unused / z->used : 0;
    o->slab_slack = z->slab_ms > 0 ? z->slack_ms / z->slab_ms : 0;
    o->bound_ms = gap_quantiles(&z->bounds);
    o->within_bound = z->m.gaps.count ? (double)z->within / (double)z->m.gaps.count : 1;
    o->requests_within = 1 - (double)late / z->w->n;
    o->device_budget = stats.device_budget;
    o->device_peak = stats.device_peak;
    o->slab_bytes = stats.slab_bytes;
    o->cost = stats.cost;
    o->plan_us = gap_quantiles(&z->plan);
    o->commit_us = gap_quantiles(&z->commit);
    o->plan_full_us = gap_quantiles(&z->plan_full);
    o->wall_s = wall_s;
}

bool simulate(const workload *w, const setup *s, result *out, char *err, size_t err_len) {
    simulation z = {.w = w, .s = s, .out = out, .err = err, .err_len = err_len};
    memset(out, 0, sizeof *out);
    snprintf(out->mode, sizeof out->mode, "continuous");
    double t0 = wall_us();
    bool ok = sim_open(&z) && run(&z);
    if (ok) fill_result(&z, (wall_us() - t0) / 1e6);
    sim_close(&z);
    return ok;
}

void result_free(result *r) {
    free(r->hits);
    r->hits = NULL;
}
