#include "sampler.h"
#include "error.h"

#include <math.h>
#include <stdlib.h>

bool sampler_init(sampler *s, const sampler_desc *d, char *err, size_t err_len) {
    *s = (sampler){0};
    /* written so that NaN fails too */
    if (!(d->temperature >= 0 && d->temperature < INFINITY))
        return llm_fail(err, err_len, "temperature %g: must be 0 (greedy) or more", (double)d->temperature);
    if (!(d->top_p >= 0 && d->top_p <= 1))
        return llm_fail(err, err_len, "top_p %g: must be between 0 and 1", (double)d->top_p);
    if (!(d->min_p >= 0 && d->min_p <= 1))
        return llm_fail(err, err_len, "min_p %g: must be between 0 and 1", (double)d->min_p);
    if (d->top_k < 0) return llm_fail(err, err_len, "top_k %d: must be 0 (all) or more", d->top_k);
    s->desc = *d;
    s->state = d->seed;
    return true;
}

void sampler_free(sampler *s) {
    free(s->candidates);
    *s = (sampler){0};
}

/* SplitMix64 (Steele, Lea, Flood 2014): every seed, 0 too, starts a stream of its own. Uniform in [0, 1). */
static double next_uniform(sampler *s) {
    uint64_t z = s->state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (double)((z ^ z >> 31) >> 11) * 0x1p-53;
}

int32_t sampler_argmax(const float *logits, size_t n_vocab) {
    float best = -INFINITY;
    int32_t id = -1;
    for (size_t i = 0; i < n_vocab; i++) {
        if (logits[i] > best) { /* false for NaN */
            best = logits[i];
            id = (int32_t)i;
        }
    }
    return id;
}

static bool ranks_before(sampler_candidate a, sampler_candidate b) {
    return a.score > b.score || (a.score == b.score && a.id < b.id);
}

/* Divides c around one of its elements: those that rank before it, itself, the rest. Returns where it is. */
static size_t partition(sampler_candidate *c, size_t n) {
    size_t middle = n / 2,
           last = n - 1; /* the pivot is the median of three, which is good for sorted ones too */
    bool first_middle = ranks_before(c[0], c[middle]), middle_last = ranks_before(c[middle], c[last]);
    bool first_last = ranks_before(c[0], c[last]);
    size_t at = first_middle == middle_last ? middle : first_middle == first_last ? last : 0;
    sampler_candidate pivot = c[at];
    c[at] = c[last];
    size_t n_before = 0;
    for (size_t i = 0; i < last; i++) {
        /* swapped in any case: two that both rank behind the pivot may change places, and no branch is missed */
        sampler_candidate v = c[i];
        c[i] = c[n_before];
        c[n_before] = v;
        n_before += ranks_before(v, pivot);
    }
    c[last] = c[n_before];
    c[n_before] = pivot;
    return n_before;
}

/* Moves the k best of n candidates to the front, in no particular order; 0 < k <= n. */
static void select_count(sampler_candidate *c, size_t n, size_t k) {
    size_t low = 0,
           high = n; /* what is before low ranks before the rest, what is from high on behind the rest */
    while (low != k && high != k) {
        size_t p = low + partition(c + low, high - low);
        if (p < k)
            low = p + 1;
        else
            high = p;
    }
}

/* Moves the fewest best candidates that weigh at least `wanted` together to the front; returns how many. */
static size_t select_weight(sampler_candidate *c, size_t n, double wanted) {
    size_t low = 0, high = n;
    double before = 0; /* weight of what is before low */
    while (low < high) {
        size_t p = low + partition(c + low, high - low);
        double sum = before;
        for (size_t i = low; i < p; i++) sum += c[i].score;
        if (sum >= wanted) {
            high = p;
        } else if (sum + c[p].score >= wanted) {
            return p + 1;
        } else {
            before = sum + c[p].score;
            low = p + 1;
        }
    }
    return high;
}

/* A logit that at least k others reach, or -inf where none is found cheaply. Each block's maximum stands for one token,
 * so the k-th best of those maxima is such a bound; it leaves few more than k candidates to select from. */
static float top_k_bound(sampler_candidate *c, const float *logits, size_t n_vocab, size_t k) {
    enum { BLOCK = 64, LANES = 8 };
    size_t n = n_vocab / BLOCK;
    if (k > n) return -INFINITY;
    for (size_t b = 0; b < n; b++) {
        const float *p = logits + b * BLOCK;
        float m[LANES], max = -INFINITY;
        for (int j = 0; j < LANES; j++) m[j] = -INFINITY;
        for (int i = 0; i < BLOCK; i += LANES)
            for (int j = 0; j < LANES; j++) m[j] = p[i + j] > m[j] ? p[i + j] : m[j]; /* NaN: false */
        for (int j = 0; j < LANES; j++) max = m[j] > max ? m[j] : max;
        c[b] = (sampler_candidate){max, (int32_t)b};
    }
    select_count(c, n, k);
    float bound = INFINITY;
    for (size_t b = 0; b < k; b++) bound = c[b].score < bound ? c[b].score : bound;
    return bound;
}

/* The tokens with finite logits of at least `bound`, by id. */
static size_t gather(sampler_candidate *c, const float *logits, size_t n_vocab, float bound) {
    size_t n = 0;
    for (size_t i = 0; i < n_vocab; i++) {
        c[n] = (sampler_candidate){logits[i], (int32_t)i};
        n += logits[i] >= bound && logits[i] > -INFINITY; /* false for NaN */
    }
    return n;
}

static size_t select_top_k(sampler_candidate *c, const float *logits, size_t n_vocab, size_t k) {
    if (k == 0 || k >= n_vocab) return gather(c, logits, n_vocab, -INFINITY);
    size_t n = gather(c, logits, n_vocab, top_k_bound(c, logits, n_vocab, k));
    if (n <= k) return n;
    select_count(c, n, k);
    return k;
}

/* Keeps the fewest of the likeliest candidates that have top_p of the total; returns how many. */
static size_t select_top_p(sampler_candidate *c, size_t n, double total, double top_p) {
    /* Candidates below this have less than 1 - top_p together, so none of them is needed: a cheap way to leave few to
     * select from. The half is room for rounding. */
    double least = 0.5 * (1 - top_p) * total / (double)n;
    size_t m = 0;
    for (size_t i = 0; i < n; i++) {
        c[m] = c[i];
        m += c[i].score >= least;
    }
    return select_weight(c, m, top_p * total);
}

/* Logits to weights in (0, 1]; the likeliest has 1. Returns their sum. */
static double weigh(sampler_candidate *c, size_t n, float max, float temperature) {
    double total = 0;
    for (size_t i = 0; i < n; i++) {
        /* in double: the difference of two floats may be no float */
        c[i].score = expf((float)(((double)c[i].score - max) / temperature));
        total += c[i].score;
    }
    return total;
}

static int32_t draw(const sampler_candidate *c, size_t n, float min_p, double uniform) {
    double total = 0, sum = 0;
    for (size_t i = 0; i < n; i++)
        if (c[i].score >= min_p) total += c[i].score;
    int32_t id = -1;
    for (size_t i = 0; i < n; i++) {
        if (c[i].score < min_p || c[i].score == 0) continue;
        id = c[i].id;
        sum += c[i].score;
        if (uniform * total < sum) break;
    }
    return id;
}

int32_t sampler_sample(sampler *s, const float *logits, size_t n_vocab) {
    const sampler_desc *d = &s->desc;
    int32_t best = sampler_argmax(logits, n_vocab);
    if (best < 0 || d->temperature == 0) return best;
    if (s->cap < n_vocab) {
        sampler_candidate *c = realloc(s->candidates, n_vocab * sizeof *c);
        if (!c) return -1;
        s->candidates = c;
        s->cap = n_vocab;
    }
    double uniform = next_uniform(s);
    if (logits[best] == INFINITY) return best; /* all of the probability is there */
    sampler_candidate *c = s->candidates;
    size_t n = select_top_k(c, logits, n_vocab, (size_t)d->top_k);
    double total = weigh(c, n, logits[best], d->temperature);
    if (d->top_p > 0 && d->top_p < 1) n = select_top_p(c, n, total, d->top_p);
    return draw(c, n, d->min_p, uniform);
}
