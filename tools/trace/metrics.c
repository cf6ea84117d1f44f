/* metrics.c - when each request got its tokens. */
#include "trace.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

bool metrics_open(metrics *m, const workload *w, char *err, size_t err_len) {
    memset(m, 0, sizeof *m);
    m->w = w;
    m->first_ms = malloc((w->n + 1) * sizeof *m->first_ms);
    m->last_ms = malloc((w->n + 1) * sizeof *m->last_ms);
    m->longest_ms = calloc(w->n + 1, sizeof *m->longest_ms);
    if (!m->first_ms || !m->last_ms || !m->longest_ms) {
        metrics_free(m);
        return llm_fail(err, err_len, "out of memory");
    }
    for (uint32_t i = 0; i < w->n; i++) m->first_ms[i] = -1;
    return true;
}

void metrics_free(metrics *m) {
    free(m->first_ms);
    free(m->last_ms);
    free(m->longest_ms);
    memset(m, 0, sizeof *m);
}

double metrics_token(metrics *m, uint32_t r, double now_ms) {
    double gap = -1;
    if (m->first_ms[r] < 0) {
        m->first_ms[r] = now_ms;
    } else {
        gap = now_ms - m->last_ms[r];
        gap_add(&m->gaps, gap);
        if (gap > m->longest_ms[r]) m->longest_ms[r] = (float)gap;
    }
    m->last_ms[r] = now_ms;
    return gap;
}

void metrics_done(metrics *m, double now_ms) {
    m->n_done++;
    m->end_ms = now_ms;
}

/* ---- quantiles ---- */

static uint32_t bucket_of(double ms) {
    double b = ms > 0.001 ? ceil(log2(ms / 0.001) * 32) : 0;
    return b < GAP_BUCKETS - 1 ? (uint32_t)b : GAP_BUCKETS - 1;
}

double gap_bucket_ms(uint32_t bucket) { return 0.001 * exp2(bucket / 32.0); }

void gap_add(gap_histogram *h, double ms) {
    h->bucket[bucket_of(ms)]++;
    h->count++;
    if (ms > h->max) h->max = ms;
}

static double gap_quantile(const gap_histogram *h, double q) {
    uint64_t rank = (uint64_t)ceil(q * (double)h->count), sum = 0;
    for (uint32_t b = 0; b < GAP_BUCKETS; b++) {
        sum += h->bucket[b];
        if (sum >= rank && sum) return fmin(gap_bucket_ms(b), h->max);
    }
    return h->max;
}

quantiles gap_quantiles(const gap_histogram *h) {
    quantiles q = {gap_quantile(h, 0.5), gap_quantile(h, 0.95), gap_quantile(h, 0.99), h->max};
    return q;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double nearest_rank(const double *v, size_t n, double q) {
    size_t rank = (size_t)ceil(q * (double)n);
    return n ? v[rank ? rank - 1 : 0] : 0;
}

quantiles quantiles_of(double *v, size_t n) {
    if (n) qsort(v, n, sizeof *v, by_value);
    quantiles q = {nearest_rank(v, n, 0.5), nearest_rank(v, n, 0.95), nearest_rank(v, n, 0.99),
                   n ? v[n - 1] : 0};
    return q;
}

void metrics_result(metrics *m, result *o) {
    const workload *w = m->w;
    double *v = m->first_ms; /* its numbers are not needed any more */
    uint32_t n = 0;
    o->n_requests = w->n;
    o->makespan_ms = m->end_ms;
    for (uint32_t i = 0; i < w->n; i++) {
        o->prompt_tokens += w->requests[i].n_prompt;
        o->output_tokens += w->requests[i].n_output;
        v[i] = m->first_ms[i] - w->requests[i].arrival_ms;
    }
    o->ttft_ms = quantiles_of(v, w->n);
    for (uint32_t i = 0; i < w->n; i++)
        if (w->requests[i].n_output > 1) v[n++] = (double)m->longest_ms[i];
    o->longest_gap_ms = quantiles_of(v, n);
    o->tbt_ms = gap_quantiles(&m->gaps);
    o->gaps = m->gaps;
}
