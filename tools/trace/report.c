/* report.c - results as JSON and as text. */
#include "report.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

const char report_help[] =
    "Keys of --json (times in simulated milliseconds; {p50, p95, p99, max} where there are several):\n"
    "  trace, requests, dropped   what was replayed; dropped: longer than kv_bytes holds, left out in\n"
    "                             every mode\n"
    "  prompt_tokens, output_tokens, model, kv, kv_bytes, kv_token_bytes, cost, max_gap_ms, speed, repeat\n"
    "  continuous                 the real scheduler and cache; of it:\n"
    "    tokens_per_s             prompt and output tokens in a second; output_tokens_per_s the latter\n"
    "                             alone\n"
    "    makespan_ms, busy_ms     until the last token; of it in steps\n"
    "    of_ideal                 share of the ideal schedule's rate (see ideal); of_ideal_belady: of\n"
    "                             one that has the hits of Belady's optimum\n"
    "    ttft_ms, tbt_ms          arrival to first token; between two tokens of a request\n"
    "    longest_gap_ms           of each request, the longest time between two tokens\n"
    "    bound_ms                 what DESIGN lets that be, of each token: the longer of max_gap_ms and\n"
    "                             a step of the decodes and the smallest chunk; within_bound: share of\n"
    "                             the gaps that keep to it; requests_within_bound: share of the requests\n"
    "                             whose every gap does\n"
    "    waste                    KV bytes that running requests hold and that hold no token, by time,\n"
    "                             over all they hold; slab_slack: bytes of slabs in use that no block\n"
    "                             has, over those slabs\n"
    "    hit_rate                 tokens of prompts found in the cache, over all; lru_hit_rate,\n"
    "                             belady_hit_rate: of caches of whole blocks with all of kv_bytes for\n"
    "                             them (running requests take none)\n"
    "    steps, prefill_rows, recomputed_rows, preemptions\n"
    "    ledger_peak_bytes, ledger_budget_bytes, slab_bytes, metadata_bytes\n"
    "    waiting_record_bytes     host bytes of a request in the queue beside its tokens\n"
    "    waiting_answer_bytes     and what is kept free for the longest answer that it may give\n"
    "    learnt_cost              the scheduler's coefficients at the end\n"
    "    series                   points over time: ms, waste, used_bytes, cached_bytes, running, waiting\n"
    "    gap_histogram            [upper end in ms, gaps] for each range that has any\n"
    "  ideal                      makespan_ms, tokens_per_s: a bound that no schedule of the same work\n"
    "                             passes, with this cost, these bytes and the prefix hits that there\n"
    "                             were; belady_makespan_ms: with those of Belady's optimum\n"
    "  static, request, contiguous   baselines (see --help): as continuous where it applies, and batch:\n"
    "                             requests that fit; speedup: how many times as long as continuous they\n"
    "                             take\n"
    "  sweep                      [{kv_bytes, hit_rate, lru_hit_rate, belady_hit_rate}]\n"
    "  wall                       real time, which differs from run to run: seconds, plan_us, commit_us,\n"
    "                             and plan_256_us: of steps with at least 256 running requests\n";

static double per_second(double n, double ms) { return ms > 0 ? n / ms * 1e3 : 0; }

static double n_tokens(const result *r) { return (double)(r->prompt_tokens + r->output_tokens); }

/* Rounded to seven digits: a report is read by people too. */
static void add(cJSON *o, const char *key, double v) {
    char text[32];
    snprintf(text, sizeof text, v == floor(v) && fabs(v) < 1e15 ? "%.0f" : "%.7g", v);
    cJSON_AddRawToObject(o, key, isfinite(v) ? text : "null");
}

static void add_quantiles(cJSON *o, const char *key, quantiles q) {
    cJSON *at = cJSON_AddObjectToObject(o, key);
    add(at, "p50", q.p50);
    add(at, "p95", q.p95);
    add(at, "p99", q.p99);
    add(at, "max", q.max);
}

static cJSON *add_rates(cJSON *root, const char *key, const result *r) {
    cJSON *o = cJSON_AddObjectToObject(root, key);
    add(o, "tokens_per_s", per_second(n_tokens(r), r->makespan_ms));
    add(o, "output_tokens_per_s", per_second((double)r->output_tokens, r->makespan_ms));
    add(o, "makespan_ms", r->makespan_ms);
    add(o, "busy_ms", r->busy_ms);
    add_quantiles(o, "ttft_ms", r->ttft_ms);
    add_quantiles(o, "tbt_ms", r->tbt_ms);
    add_quantiles(o, "longest_gap_ms", r->longest_gap_ms);
    add(o, "waste", r->waste);
    add(o, "steps", (double)r->steps);
    add(o, "prefill_rows", (double)r->prefill_rows);
    return o;
}

static void add_series(cJSON *o, const result *r) {
    cJSON *all = cJSON_AddArrayToObject(o, "series"), *gaps = cJSON_AddArrayToObject(o, "gap_histogram");
    for (uint32_t i = 0; i < r->n_samples; i++) {
        const sample *s = &r->samples[i];
        cJSON *p = cJSON_CreateObject();
        add(p, "ms", s->ms);
        add(p, "waste", s->waste);
        add(p, "used_bytes", (double)s->used_bytes);
        add(p, "cached_bytes", (double)s->cached_bytes);
        add(p, "running", s->running);
        add(p, "waiting", s->waiting);
        cJSON_AddItemToArray(all, p);
    }
    for (uint32_t b = 0; b < GAP_BUCKETS; b++) {
        if (!r->gaps.bucket[b]) continue;
        char text[64];
        snprintf(text, sizeof text, "[%.7g,%llu]", gap_bucket_ms(b), (unsigned long long)r->gaps.bucket[b]);
        cJSON_AddItemToArray(gaps, cJSON_CreateRaw(text));
    }
}

static void add_continuous(cJSON *root, const report *p) {
    const result *r = p->real;
    cJSON *o = add_rates(root, "continuous", r), *c;
    add(o, "of_ideal", p->ideal_ms / r->makespan_ms);
    add(o, "of_ideal_belady", p->ideal_belady_ms / r->makespan_ms);
    add_quantiles(o, "bound_ms", r->bound_ms);
    add(o, "within_bound", r->within_bound);
    add(o, "requests_within_bound", r->requests_within);
    add(o, "slab_slack", r->slab_slack);
    add(o, "hit_rate", p->hit_rate);
    add(o, "lru_hit_rate", p->lru_hit_rate);
    add(o, "belady_hit_rate", p->belady_hit_rate);
    add(o, "recomputed_rows", (double)r->recomputed_rows);
    add(o, "preemptions", (double)r->preemptions);
    add(o, "ledger_peak_bytes", (double)r->device_peak);
    add(o, "ledger_budget_bytes", (double)r->device_budget);
    add(o, "slab_bytes", (double)r->slab_bytes);
    add(o, "metadata_bytes", (double)r->metadata_bytes);
    add(o, "waiting_record_bytes", r->waiting_record_bytes);
    add(o, "waiting_answer_bytes", r->waiting_answer_bytes);
    c = cJSON_AddObjectToObject(o, "learnt_cost");
    add(c, "step_ms", r->cost.step_ms);
    add(c, "prefill_token_ms", r->cost.prefill_token_ms);
    add(c, "decode_ms", r->cost.decode_ms);
    add(c, "kv_megatoken_ms", r->cost.kv_megatoken_ms);
    add(c, "prefill_kv_megatoken_ms", r->cost.prefill_kv_megatoken_ms);
    add_series(o, r);
}

static void add_ideal(cJSON *root, const report *p, const result *r) {
    cJSON *o = cJSON_AddObjectToObject(root, "ideal");
    add(o, "makespan_ms", p->ideal_ms);
    add(o, "belady_makespan_ms", p->ideal_belady_ms);
    add(o, "tokens_per_s", per_second(n_tokens(r), p->ideal_ms));
    add(o, "output_tokens_per_s", per_second((double)r->output_tokens, p->ideal_ms));
}

static void add_wall(cJSON *root, const result *r) {
    cJSON *o = cJSON_AddObjectToObject(root, "wall");
    add(o, "seconds", r->wall_s);
    add_quantiles(o, "plan_us", r->plan_us);
    add_quantiles(o, "commit_us", r->commit_us);
    if (r->plan_full_us.max > 0) add_quantiles(o, "plan_256_us", r->plan_full_us);
}

static void add_setup(cJSON *root, const report *p, const result *r) {
    const setup *s = p->s;
    cJSON_AddStringToObject(root, "trace", p->source);
    add(root, "requests", r->n_requests);
    add(root, "dropped", r->n_dropped);
    add(root, "prompt_tokens", (double)r->prompt_tokens);
    add(root, "output_tokens", (double)r->output_tokens);
    cJSON_AddStringToObject(root, "model", p->m->name);
    cJSON_AddStringToObject(root, "kv", s->geometry.preset);
    add(root, "kv_bytes", (double)s->kv_bytes);
    add(root, "kv_token_bytes", p->kv_token_bytes);
    cJSON *c = cJSON_AddObjectToObject(root, "cost");
    cJSON_AddStringToObject(c, "name", s->cost.name);
    add(c, "step_ms", s->cost.step_ms);
    add(c, "prefill_token_ms", s->cost.prefill_token_ms);
    add(c, "decode_ms", s->cost.decode_ms);
    add(c, "kv_gb_ms", s->cost.kv_gb_ms);
    add(c, "prefill_kv_ms", s->cost.prefill_kv_ms);
    add(root, "max_gap_ms", s->max_gap_ms);
    add(root, "speed", p->speed);
    add(root, "repeat", p->repeat);
}

static const result *any_result(const report *p) {
    const result *r = p->real;
    for (int i = 0; i < 3 && !r; i++) r = p->baselines[i];
    return r;
}

bool report_json(const report *p, FILE *f) {
    cJSON *root = cJSON_CreateObject();
    const result *r = any_result(p);
    if (r || p->swept) add_setup(root, p, r ? r : p->swept);
    if (p->real) add_continuous(root, p);
    if (r) add_ideal(root, p, r);
    for (int i = 0; i < 3; i++) {
        if (!p->baselines[i]) continue;
        cJSON *o = add_rates(root, p->baselines[i]->mode, p->baselines[i]);
        add(o, "batch", p->baselines[i]->batch);
        if (p->real) add(o, "speedup", p->baselines[i]->makespan_ms / p->real->makespan_ms);
    }
    if (p->n_sweep) {
        cJSON *all = cJSON_AddArrayToObject(root, "sweep");
        for (uint32_t i = 0; i < p->n_sweep; i++) {
            cJSON *o = cJSON_CreateObject();
            add(o, "kv_bytes", (double)p->sweep[i].kv_bytes);
            add(o, "hit_rate", p->sweep[i].hit_rate);
            add(o, "lru_hit_rate", p->sweep[i].lru_hit_rate);
            add(o, "belady_hit_rate", p->sweep[i].belady_hit_rate);
            cJSON_AddItemToArray(all, o);
        }
    }
    if (p->real) add_wall(root, p->real);
    char *text = cJSON_Print(root);
    cJSON_Delete(root);
    if (!text) return false;
    fprintf(f, "%s\n", text);
    free(text);
    return true;
}

/* ---- text ---- */

static void line(FILE *f, const char *name, quantiles q, const char *unit) {
    fprintf(f, "  %-22s p50 %10.3f   p95 %10.3f   p99 %10.3f   max %10.3f %s\n", name, q.p50, q.p95, q.p99,
            q.max, unit);
}

static void rates_text(const report *p, const result *r, FILE *f) {
    fprintf(f, "%s", r->mode);
    if (r->batch) fprintf(f, ", %u at once", r->batch);
    fprintf(f, ": %.1f tokens/s (%.1f of output), done after %.1f s, %llu steps\n",
            per_second(n_tokens(r), r->makespan_ms), per_second((double)r->output_tokens, r->makespan_ms),
            r->makespan_ms / 1e3, (unsigned long long)r->steps);
    if (r != p->real && p->real)
        fprintf(f, "  continuous is          %.2f times as fast\n", r->makespan_ms / p->real->makespan_ms);
    line(f, "first token", r->ttft_ms, "ms");
    line(f, "between tokens", r->tbt_ms, "ms");
    line(f, "longest gap", r->longest_gap_ms, "ms");
    fprintf(f, "  waste                  %.2f%% of the KV bytes held\n", 100 * r->waste);
}

static void real_text(const report *p, FILE *f) {
    const result *r = p->real;
    rates_text(p, r, f);
    fprintf(f, "  slab slack             %.2f%% of the slabs in use\n", 100 * r->slab_slack);
    if (r->bound_ms.max > 0) line(f, "bound on the gap", r->bound_ms, "ms");
    fprintf(f, "  within the bound       %.3f%% of the gaps, %.3f%% of the requests\n", 100 * r->within_bound,
            100 * r->requests_within);
    fprintf(f, "  of the ideal schedule  %.2f%% (%.2f%% of one with the best hits)\n",
            100 * p->ideal_ms / r->makespan_ms, 100 * p->ideal_belady_ms / r->makespan_ms);
    fprintf(f, "  prompts found          %.3f%%; least recently used %.3f%%, optimum %.3f%%\n",
            100 * p->hit_rate, 100 * p->lru_hit_rate, 100 * p->belady_hit_rate);
    fprintf(f, "  preemptions            %llu, %llu rows computed again\n",
            (unsigned long long)r->preemptions, (unsigned long long)r->recomputed_rows);
    fprintf(f, "  ledger                 peak %.1f of %.1f MiB; metadata %.1f MiB\n",
            (double)r->device_peak / 1048576, (double)r->device_budget / 1048576,
            (double)r->metadata_bytes / 1048576);
    fprintf(f, "  a waiting request      %.0f bytes beside its tokens, and %.0f for its answer\n",
            r->waiting_record_bytes, r->waiting_answer_bytes);
    line(f, "plan (real time)", r->plan_us, "us");
    if (r->plan_full_us.max > 0) line(f, "plan, 256 running", r->plan_full_us, "us");
    line(f, "commit (real time)", r->commit_us, "us");
    fprintf(f, "  replayed in            %.1f s\n", r->wall_s);
}

void report_text(const report *p, FILE *f) {
    const result *r = any_result(p) ? any_result(p) : p->swept;
    if (r) {
        fprintf(f, "%s: %u requests", p->source, r->n_requests);
        if (r->n_dropped) fprintf(f, " (%u more do not fit)", r->n_dropped);
        fprintf(f, ", %llu prompt and %llu output tokens; %s, %s, %.1f MiB of KV (%.0f bytes a token), %s\n",
                (unsigned long long)r->prompt_tokens, (unsigned long long)r->output_tokens, p->m->name,
                p->s->geometry.preset, (double)p->s->kv_bytes / 1048576, p->kv_token_bytes, p->s->cost.name);
    }
    if (p->real) real_text(p, f);
    if (any_result(p))
        fprintf(f, "ideal: %.1f tokens/s, done after %.1f s\n", per_second(n_tokens(r), p->ideal_ms),
                p->ideal_ms / 1e3);
    for (int i = 0; i < 3; i++)
        if (p->baselines[i]) rates_text(p, p->baselines[i], f);
    for (uint32_t i = 0; i < p->n_sweep; i++)
        fprintf(f, "%12.1f MiB: prompts found %7.3f%%; least recently used %7.3f%%, optimum %7.3f%%\n",
                (double)p->sweep[i].kv_bytes / 1048576, 100 * p->sweep[i].hit_rate,
                100 * p->sweep[i].lru_hit_rate, 100 * p->sweep[i].belady_hit_rate);
}
