/* quality.h - what the parts of tools/quality share: a text, caches under test, and what they score.
 *
 * Errors: false, and a line in err (n bytes). Threads: one; what is parallel is so inside.
 */
#ifndef QUALITY_H
#define QUALITY_H

#include "llm/runtime.h"

#define SCORED_ROWS 128 /* rows that run, and are compared, at a time */

/* A text as tokens, cut into chunks as llama.cpp's perplexity tool cuts it: tokenised whole, chunks of ctx
 * tokens one after another, and where the model wants a BOS, it takes the place of a chunk's first token. */
typedef struct passage {
    token_list ids;
    uint32_t ctx, n_chunks;
    int32_t bos; /* -1: none */
} passage;

/* A cache under test and what it scored. The first of a list is what the others are compared with. */
typedef struct variant {
    char name[64];
    runtime *rt; /* whose activations it runs with */
    runtime_cache_desc cache;
    uint32_t same_as; /* index of an earlier variant with the same cache, whose scores are this one's; or 0 */
    /* scores: over n predictions */
    uint32_t n;
    double nll;            /* mean negative log-likelihood of the text's tokens */
    double *kld;           /* [n] divergence of each prediction from the first variant's, in order of size */
    double kld_mean, top1; /* top1: share of predictions with the same likeliest token */
    double bits, k_bits, v_bits; /* a number, exact blocks, scales and padding included */
} variant;

/* Scores every variant on the passage; the variants go through it side by side, so that the first one's
 * logits are kept for one step only. */
bool score_passage(const passage *p, variant *v, uint32_t n_variants, bool progress, char *err, size_t n);
void free_scores(variant *v, uint32_t n);

/* The q-quantile of the divergences, interpolated between neighbours. */
double kld_quantile(const variant *v, double q);
double perplexity(const variant *v);

/* Bits that a number takes on average in a sequence of n_tokens, and K and V apart (either may be NULL). */
double cache_bits(kvl_cache *cache, const model_config *c, uint32_t n_tokens, double *k_bits, double *v_bits);

/* Opens a cache for one sequence of n_tokens that keeps nothing between sequences. */
bool open_sequence(kvl_cache *cache, kvl_seq *seq, char *err, size_t n);

/* Runs tokens as one span of a sequence; logits of the last n_logits are then runtime_logits(rt, i). */
bool run_tokens(runtime *rt, kvl_cache *cache, kvl_seq seq, const int32_t *tokens, uint32_t n_tokens,
                uint32_t n_logits, char *err, size_t n);

/* ---- retrieval.c ---- */

typedef struct recall {
    uint32_t asked, right, same; /* same: the answer is the first variant's, right or wrong */
} recall;

/* Plants facts in each chunk of the passage and asks for them at its end; out [n_variants]. */
bool score_recall(const passage *p, const variant *v, uint32_t n_variants, recall *out, char *err, size_t n);

/* ---- layers.c ---- */

typedef struct layers_desc {
    double bits;     /* budget of the assignment; 0: none is made */
    const char *out; /* file to write it to; NULL: none */
    bool json;
} layers_desc;

bool study_layers(runtime *rt, const passage *p, const layers_desc *d, char *err, size_t n);

#endif /* QUALITY_H */
