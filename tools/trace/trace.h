/* trace.h - the parts of the trace tool and what they hand to each other.
 *
 *     workload_read, workload_synthetic -> workload     requests: arrival, lengths, blocks of the prompt
 *     model_find, cost_find             -> model, cost  what a step takes
 *     simulate                          -> result       the real scheduler and cache, null backend, simulated clock
 *     batching_run, batching_ideal      -> result       the baselines, and the bound that no schedule can pass
 *     oracle_lru, oracle_belady         -> hit rates    of caches of whole blocks
 *
 * Errors: functions return false and write one line to err (LLM_ERR_LEN bytes). Threads: one.
 */
#ifndef TRACE_H
#define TRACE_H

#include "llm/error.h"
#include "kvlite.h"

#include <stdio.h>

/* ---- workload.c: who asks for what, and when ---- */

enum { HASH_TOKENS = 512 }; /* tokens that one hash of a Mooncake trace stands for */

typedef struct request {
    double arrival_ms;
    uint32_t n_prompt, n_output; /* tokens, at least 1 each */
    uint32_t first_hash;         /* of ceil(n_prompt / HASH_TOKENS) in workload.hashes, where there are any */
} request;

typedef struct workload {
    request *requests; /* in order of arrival */
    uint32_t n;
    uint32_t *hashes; /* numbered from 0; equal number = equal prefix block; NULL: no two prompts share */
    uint32_t n_hashes, n_distinct;
    uint32_t max_prompt, max_output, max_total;
    uint32_t
        reserve; /* what contiguous memory must be reserved for: max_total, or the longest that could be drawn */
} workload;

typedef enum trace_format { TRACE_GUESS, TRACE_AZURE, TRACE_MOONCAKE } trace_format;

/* Reads a trace of at most `limit` requests (0 = all). An error names file and line. */
bool workload_read(workload *w, const char *path, trace_format format, uint32_t limit, char *err, size_t n);
/* n requests at time 0 with prompts of n_prompt tokens; output lengths drawn from an exponential distribution of
 * that mean (0: evenly from 1..max), at least 1, cut at max. */
bool workload_synthetic(workload *w, uint32_t n, uint32_t n_prompt, uint32_t mean, uint32_t max,
                        uint64_t seed, char *err, size_t err_len);
/* The same trace `times` times, one after the other, each with blocks of its own; arrivals `speed` times as fast. */
bool workload_repeat(workload *w, uint32_t times, double speed, char *err, size_t err_len);
/* Leaves out requests of more than max_total tokens; returns how many. */
uint32_t workload_drop(workload *w, uint32_t max_total);
void workload_free(workload *w);
/* Token i of the prompt of request r. */
int32_t workload_token(const workload *w, uint32_t r, uint32_t i);
/* Token i of its answer: no other request has it. (What a model answered stands in no trace, so that a next turn of
 * a conversation does not match the answer that it quotes.) */
int32_t workload_answer(uint32_t r, uint32_t i);

/* ---- cost.c: models, and what a step takes ---- */

typedef struct model {
    char name[32];
    uint32_t n_layers, n_q_heads, n_kv_heads, head_dim;
    double params; /* weights that a token passes through */
} model;

/* A name of the table or "layers:kvheads:dim[:qheads[:params in 1e9]]". */
bool model_find(model *m, const char *name, char *err, size_t err_len);
const char *model_names(void);

typedef struct cost {
    char name[64];
    double step_ms;          /* a step */
    double prefill_token_ms; /* a row of prefill */
    double decode_ms;        /* a row of decode */
    double kv_gb_ms;         /* 1e9 bytes of KV that decodes read */
    double prefill_kv_ms;    /* a million pairs of a prefill row and a token that it sees */
    double memory_gb;        /* of the device; 0 = unknown */
} cost;

/* "cpu", "rtx4090", "a100" or a file (the format is described in cost_rtx4090.txt). */
bool cost_find(cost *c, const char *name, const model *m, char *err, size_t err_len);
/* measure.c: measures steps on the CPU backend with a real model, and prints such a file. */
bool cost_measure(const char *gguf, const char *preset, char *err, size_t err_len);

typedef struct step_work { /* sums over the rows of a step */
    double prefill_rows, decode_rows, decode_kv_tokens, prefill_pairs;
} step_work;

double cost_ms(const cost *c, const step_work *w, double kv_token_bytes);
kvl_cost cost_for_scheduler(const cost *c, double kv_token_bytes);

/* ---- metrics.c: what happened to the requests ---- */

typedef struct quantiles {
    double p50, p95, p99, max;
} quantiles;

enum { GAP_BUCKETS = 1280 };
typedef struct gap_histogram { /* 32 buckets for each doubling from 0.001 ms on: quantiles are within 2.2% */
    uint64_t bucket[GAP_BUCKETS], count;
    double max;
} gap_histogram;

typedef struct metrics {
    const workload *w;
    double *first_ms, *last_ms; /* of each request, when its tokens came; first < 0: none yet */
    float *longest_ms;          /* longest gap between two of them */
    gap_histogram gaps;
    double end_ms;
    uint32_t n_done;
} metrics;

bool metrics_open(metrics *m, const workload *w, char *err, size_t err_len);
void metrics_free(metrics *m);
double metrics_token(metrics *m, uint32_t r, double now_ms); /* returns the gap, or -1 for a first token */
void metrics_done(metrics *m, double now_ms);                /* a request has all its tokens */
void gap_add(gap_histogram *h, double ms);
quantiles gap_quantiles(const gap_histogram *h);
double gap_bucket_ms(uint32_t bucket);       /* its upper end */
quantiles quantiles_of(double *v, size_t n); /* sorts v */

/* ---- simulate.c: the real scheduler ---- */

typedef struct setup {
    kvl_geometry geometry;
    cost cost;
    uint64_t kv_bytes;
    kvl_policy policy;
    double max_gap_ms;
    uint32_t max_running, max_waiting, step_tokens, min_chunk;
    uint32_t
        max_new; /* what each request asks for; 0 = the longest answer of the trace, KVL_NONE = its own */
    bool no_chunking, learn, no_prefix_cache;
    bool progress;
    FILE *events; /* gets the scheduler's event trace; NULL: none */
} setup;

typedef struct sample { /* one point of the series over time */
    double ms, waste;
    uint64_t used_bytes, cached_bytes;
    uint32_t running, waiting;
} sample;
enum { MAX_SAMPLES = 400 };

typedef struct result {
    char mode[16];
    uint32_t n_requests, n_dropped, batch;
    uint64_t prompt_tokens, output_tokens;
    double makespan_ms, busy_ms;
    uint64_t steps, prefill_rows, recomputed_rows, preemptions;
    quantiles ttft_ms, tbt_ms, longest_gap_ms;
    gap_histogram gaps;
    double waste, slab_slack; /* shares */
    uint64_t hit_tokens;
    uint32_t *hits; /* [n_requests] of each request; result_free frees it */
    /* of the real scheduler alone */
    quantiles bound_ms;     /* of the steps that had streams: what DESIGN allows the gap to be */
    double within_bound;    /* share of the gaps */
    double requests_within; /* share of the requests all of whose gaps are */
    uint64_t device_budget, device_peak, slab_bytes, metadata_bytes;
    double waiting_record_bytes, waiting_answer_bytes;
    kvl_cost cost;
    quantiles plan_us, commit_us; /* real time */
    quantiles plan_full_us;       /* of the steps with at least 256 running */
    double wall_s;
    sample samples[MAX_SAMPLES];
    uint32_t n_samples;
} result;

/* Fills in what metrics say: lengths, times to first token, gaps, makespan. Overwrites first_ms. */
void metrics_result(metrics *m, result *out);

bool simulate(const workload *w, const setup *s, result *out, char *err, size_t err_len);
void result_free(result *r);
/* The most tokens that a request can have, and the bytes of a token in a packed block. */
bool setup_limits(const setup *s, uint32_t *max_tokens, double *kv_token_bytes, char *err, size_t err_len);

/* ---- batching.c: what it is compared with ---- */

typedef enum batching { BATCH_STATIC, BATCH_REQUEST, BATCH_CONTIGUOUS } batching;
/* kv_token_bytes: as setup_limits has it. */
bool batching_run(const workload *w, const setup *s, batching mode, double kv_token_bytes, result *out,
                  char *err, size_t err_len);
/* Least time in which any schedule can do the work, with these tokens of each prompt found in the cache. */
double batching_ideal_ms(const workload *w, const setup *s, double kv_token_bytes, const uint32_t *hits);

/* ---- oracle.c: caches of whole blocks ---- */

/* Tokens of prompts found. hits, where not NULL: [w->n], of each request. False: out of memory. */
bool oracle_lru(const workload *w, uint32_t block_tokens, uint64_t n_blocks, uint64_t *hit_tokens, char *err,
                size_t err_len);
bool oracle_belady(const workload *w, uint32_t block_tokens, uint64_t n_blocks, uint64_t *hit_tokens,
                   uint32_t *hits, char *err, size_t err_len);

#endif /* TRACE_H */
