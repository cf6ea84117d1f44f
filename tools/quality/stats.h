/* stats.h - what predictions are scored with, here and in tools/bench: so that kvlite's and llama.cpp's figures are counted alike. */
#ifndef QUALITY_STATS_H
#define QUALITY_STATS_H

#include <math.h>
#include <stdint.h>

/* ln of the sum of e^logit over n logits; *top is the likeliest token. */
static inline double log_sum_exp(const float *logits, uint32_t n, uint32_t *top) {
    double sum = 0;
    *top = 0;
    for (uint32_t i = 1; i < n; i++)
        if (logits[i] > logits[*top]) *top = i;
    const double most = logits[*top];
    for (uint32_t i = 0; i < n; i++) sum += exp(logits[i] - most);
    return most + log(sum);
}

/* The q-quantile of n >= 1 values in order of size, interpolated between neighbours. */
static inline double sorted_quantile(const double *values, uint32_t n, double q) {
    const double at = q * (n - 1);
    const uint32_t below = (uint32_t)at, above = below + 1 < n ? below + 1 : below;
    return values[below] + (at - below) * (values[above] - values[below]);
}

#endif /* QUALITY_STATS_H */
