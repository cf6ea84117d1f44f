/* sampler.h - one token id out of a row of logits.
 *
 * Order: temperature, then top-k, then top-p over what top-k left, then min-p. Of equals the lower id ranks first.
 * The same logits, settings and seed give the same tokens (with the same C library: expf may differ). NaN logits
 * count as -inf.
 *
 * Threads: a sampler belongs to one thread (one stream); different samplers are independent.
 */
#ifndef LLM_SAMPLER_H
#define LLM_SAMPLER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* All zero is greedy. */
typedef struct sampler_desc {
    float temperature; /* 0: greedy, the rest is then ignored */
    float
        top_p; /* in [0, 1]: keep the fewest most likely tokens with at least this probability; 0 and 1: all */
    float min_p; /* in [0, 1]: keep tokens at least this likely, relative to the likeliest; 0: all */
    int top_k;   /* keep the k most likely tokens; 0: all */
    uint64_t seed;
} sampler_desc;

/* A token that may be drawn: its score is the logit while top-k selects, then the weight exp((logit - max) / T). */
typedef struct sampler_candidate {
    float score;
    int32_t id;
} sampler_candidate;

typedef struct sampler {
    sampler_desc desc;
    uint64_t state;
    sampler_candidate *candidates;
    size_t cap;
} sampler;

/* False, with the field named in err, where a setting is out of range. Free with sampler_free(). */
bool sampler_init(sampler *s, const sampler_desc *desc, char *err, size_t err_len);
void sampler_free(sampler *s); /* leaves {0} */

/* An id in [0, n_vocab); -1 where no logit is above -inf (all NaN: the model has failed) or memory is short.
 * A draw takes one random number, whatever the settings are, and a greedy or failed one none. */
int32_t sampler_sample(sampler *s, const float *logits, size_t n_vocab);

/* The id of the highest logit, NaN aside; -1 where no logit is above -inf. */
int32_t sampler_argmax(const float *logits, size_t n_vocab);

#endif /* LLM_SAMPLER_H */
