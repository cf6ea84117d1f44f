/* divergence.c - perplexity and Kullback-Leibler divergence of caches on a text; see quality.h. */
#include "quality.h"
#include "stats.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct row_score {
    double nll, kld;
    bool same;
} row_score;

/* What the first variant makes of the rows of a step. */
typedef struct reference {
    float *logits;         /* [SCORED_ROWS][n_vocab] */
    double *probabilities; /* the same shape */
    double log_sum[SCORED_ROWS];
    uint32_t top[SCORED_ROWS];
} reference;

/* Rows of a step, a task each. */
typedef struct comparison {
    const runtime *rt;
    reference *reference;
    const int32_t *next; /* [rows] the token that the text goes on with */
    row_score *scores;   /* [rows] */
} comparison;

static void take_reference(void *ctx, uint32_t row) {
    const comparison *c = ctx;
    const uint32_t n = c->rt->config->n_vocab;
    float *logits = c->reference->logits + (size_t)row * n;
    double *p = c->reference->probabilities + (size_t)row * n;
    memcpy(logits, runtime_logits(c->rt, row), n * sizeof *logits);
    const double sum = log_sum_exp(logits, n, &c->reference->top[row]);
    for (uint32_t i = 0; i < n; i++) p[i] = exp(logits[i] - sum);
    c->reference->log_sum[row] = sum;
}

static void compare_row(void *ctx, uint32_t row) {
    const comparison *c = ctx;
    const reference *r = c->reference;
    const uint32_t n = c->rt->config->n_vocab;
    const float *logits = r->logits + (size_t)row * n, *tested = runtime_logits(c->rt, row);
    const double *p = r->probabilities + (size_t)row * n;
    uint32_t top;
    const double log_sum = r->log_sum[row], tested_sum = log_sum_exp(tested, n, &top);
    double kld = 0;
    for (uint32_t i = 0; i < n; i++) kld += p[i] * ((logits[i] - log_sum) - (tested[i] - tested_sum));
    c->scores[row] =
        (row_score){.nll = tested_sum - tested[c->next[row]], .kld = kld, .same = top == r->top[row]};
}

static bool failed(kvl_cache *cache, kvl_result r, char *err, size_t n) {
    return llm_fail(err, n, "%s: %s", kvl_result_name(r), kvl_last_error(cache));
}

bool open_sequence(kvl_cache *cache, kvl_seq *seq, char *err, size_t n) {
    kvl_seq_desc desc = {.no_match = true, .no_keep = true};
    kvl_result r = kvl_seq_open(cache, &desc, seq, NULL);
    return r == KVL_OK || failed(cache, r, err, n);
}

bool run_tokens(runtime *rt, kvl_cache *cache, kvl_seq seq, const int32_t *tokens, uint32_t n_tokens,
                uint32_t n_logits, char *err, size_t n) {
    kvl_span span = {.seq = seq, .tokens = tokens, .n_tokens = n_tokens, .n_logits = n_logits};
    const kvl_step *step;
    kvl_result r = kvl_step_begin(cache, &span, 1, &step);
    if (r != KVL_OK) return failed(cache, r, err, n);
    if (!runtime_forward(rt, cache, step, err, n)) {
        kvl_step_abort(cache, step);
        return false;
    }
    r = kvl_step_end(cache, step);
    return r == KVL_OK || failed(cache, r, err, n);
}

double cache_bits(kvl_cache *cache, const model_config *c, uint32_t n_tokens, double *k_bits,
                  double *v_bits) {
    kvl_stats stats;
    kvl_get_stats(cache, &stats);
    double k = 0, v = 0; /* bytes */
    for (uint32_t l = 0; l < c->n_layers; l++) {
        for (int exact = 0; exact < 2; exact++) {
            kvl_block_layout layout;
            if (kvl_cache_layout(cache, l, exact != 0, &layout) != KVL_OK) continue;
            const double tiles = (double)stats.blocks_used[exact] * c->n_kv_heads;
            k += tiles * (double)layout.v_offset;
            v += tiles * (double)(layout.head_stride - layout.v_offset);
        }
    }
    const double numbers = (double)n_tokens * c->n_layers * c->n_kv_heads * c->head_dim; /* of one side */
    if (k_bits) *k_bits = k * 8 / numbers;
    if (v_bits) *v_bits = v * 8 / numbers;
    return (k + v) * 8 / (2 * numbers);
}

/* ---- a passage, chunk by chunk ---- */

typedef struct scoring {
    const passage *p;
    variant *v;
    uint32_t n;
    kvl_cache **caches; /* [n], NULL for a variant with another's scores */
    kvl_seq *seqs;      /* [n] */
    int32_t *tokens;    /* [ctx] of the chunk */
    reference reference;
    row_score rows[SCORED_ROWS];
} scoring;

/* One step of one variant: rows [at, at + rows) of the chunk, scored from the middle of the chunk on. */
static bool score_step(scoring *s, uint32_t index, uint32_t at, uint32_t rows, char *err, size_t n) {
    variant *v = &s->v[index];
    const bool counts = at >= s->p->ctx / 2;
    if (!run_tokens(v->rt, s->caches[index], s->seqs[index], s->tokens + at, rows, counts ? rows : 0, err, n))
        return false;
    if (!counts) return true;
    comparison c = {v->rt, &s->reference, s->tokens + at + 1, s->rows};
    if (index == 0) pool_run(v->rt->threads, rows, take_reference, &c);
    pool_run(v->rt->threads, rows, compare_row, &c);
    for (uint32_t i = 0; i < rows; i++) {
        v->nll += s->rows[i].nll;
        v->top1 += s->rows[i].same;
        v->kld[v->n++] = s->rows[i].kld;
    }
    return true;
}

/* The last token of a chunk predicts nothing that is counted, and does not run. Steps end in the middle of the
 * chunk, where counting starts. */
static bool score_chunk(scoring *s, uint32_t chunk, char *err, size_t n) {
    const uint32_t ctx = s->p->ctx, end = ctx - 1;
    memcpy(s->tokens, s->p->ids.ids + (size_t)chunk * ctx, ctx * sizeof *s->tokens);
    if (s->p->bos >= 0) s->tokens[0] = s->p->bos;
    for (uint32_t i = 0; i < s->n; i++)
        if (s->caches[i] && !open_sequence(s->caches[i], &s->seqs[i], err, n)) return false;
    for (uint32_t at = 0, rows; at < end; at += rows) {
        const uint32_t limit = at < ctx / 2 ? ctx / 2 : end;
        rows = limit - at < SCORED_ROWS ? limit - at : SCORED_ROWS;
        for (uint32_t i = 0; i < s->n; i++)
            if (s->caches[i] && !score_step(s, i, at, rows, err, n)) return false;
    }
    for (uint32_t i = 0; i < s->n; i++) {
        variant *v = &s->v[i];
        if (!s->caches[i]) continue;
        v->bits = cache_bits(s->caches[i], v->rt->config, end, &v->k_bits, &v->v_bits);
        kvl_seq_close(s->caches[i], s->seqs[i]);
    }
    return true;
}

static int by_size(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void finish(scoring *s, variant *v) {
    if (v->same_as) {
        const variant *other = &s->v[v->same_as];
        memcpy(v->kld, other->kld, other->n * sizeof *v->kld);
        v->n = other->n;
        v->nll = other->nll;
        v->kld_mean = other->kld_mean;
        v->top1 = other->top1;
        v->bits = other->bits;
        v->k_bits = other->k_bits;
        v->v_bits = other->v_bits;
        return;
    }
    for (uint32_t i = 0; i < v->n; i++) v->kld_mean += v->kld[i] / v->n;
    v->nll /= v->n;
    v->top1 /= v->n;
    qsort(v->kld, v->n, sizeof *v->kld, by_size);
}

static bool prepare(scoring *s, char *err, size_t n) {
    const passage *p = s->p;
    const size_t predictions = (size_t)p->n_chunks * (p->ctx - 1 - p->ctx / 2);
    s->caches = calloc(s->n, sizeof *s->caches);
    s->seqs = calloc(s->n, sizeof *s->seqs);
    s->tokens = calloc(p->ctx, sizeof *s->tokens);
    const size_t logits = (size_t)SCORED_ROWS * s->v[0].rt->config->n_vocab;
    s->reference.logits = malloc(logits * sizeof(float));
    s->reference.probabilities = malloc(logits * sizeof(double));
    if (!s->caches || !s->seqs || !s->tokens || !s->reference.logits || !s->reference.probabilities)
        return llm_fail(err, n, "no memory for %u caches", s->n);
    for (uint32_t i = 0; i < s->n; i++) {
        variant *v = &s->v[i];
        v->n = 0;
        v->nll = v->kld_mean = v->top1 = 0;
        v->kld = malloc(predictions * sizeof *v->kld);
        if (!v->kld) return llm_fail(err, n, "no memory for %zu predictions", predictions);
        v->cache.seq_tokens = p->ctx;
        if (!v->same_as && !runtime_cache(v->rt, &v->cache, &s->caches[i], err, n)) return false;
    }
    return true;
}

bool score_passage(const passage *p, variant *v, uint32_t n_variants, bool progress, char *err, size_t n) {
    scoring s = {.p = p, .v = v, .n = n_variants};
    bool ok = prepare(&s, err, n);
    const double start = runtime_now();
    for (uint32_t chunk = 0; ok && chunk < p->n_chunks; chunk++) {
        ok = score_chunk(&s, chunk, err, n);
        if (ok && progress)
            fprintf(stderr, "quality: chunk %u of %u, %.0f s\n", chunk + 1, p->n_chunks,
                    runtime_now() - start);
    }
    for (uint32_t i = 0; ok && i < n_variants; i++) finish(&s, &v[i]);
    for (uint32_t i = 0; s.caches && i < n_variants; i++) kvl_cache_destroy(s.caches[i]);
    free(s.caches);
    free(s.seqs);
    free(s.tokens);
    free(s.reference.logits);
    free(s.reference.probabilities);
    if (!ok) free_scores(v, n_variants);
    return ok;
}

void free_scores(variant *v, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) {
        free(v[i].kld);
        v[i].kld = NULL;
    }
}

double kld_quantile(const variant *v, double q) { return sorted_quantile(v->kld, v->n, q); }

double perplexity(const variant *v) { return exp(v->nll); }
