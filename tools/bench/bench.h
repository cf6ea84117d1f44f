/* bench.h - what the benchmarks share: a median with its spread, noise, and a pause that lets the threads of one
 * contender fall asleep before the next one runs. */
#ifndef BENCH_H
#define BENCH_H

#include "llm/runtime.h"

#include <stdint.h>
#include <stdlib.h>
#include <time.h>

enum { BENCH_MAX_ROUNDS = 32 };

/* One figure for each round. */
typedef struct rounds {
    double at[BENCH_MAX_ROUNDS];
    uint32_t n;
} rounds;

typedef struct spread {
    double median, least, most;
} spread;

static inline int bench_by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static inline void rounds_add(rounds *r, double value) {
    if (r->n < BENCH_MAX_ROUNDS) r->at[r->n++] = value;
}

static inline spread rounds_spread(const rounds *r) {
    if (!r->n) return (spread){0};
    rounds s = *r;
    qsort(s.at, s.n, sizeof s.at[0], bench_by_value);
    return (spread){(s.at[(s.n - 1) / 2] + s.at[s.n / 2]) / 2, s.at[0], s.at[s.n - 1]};
}

/* a / b, round by round: what the two did at nearly the same time. */
static inline spread rounds_ratio(const rounds *a, const rounds *b) {
    rounds r = {.n = 0};
    for (uint32_t i = 0; i < a->n && i < b->n; i++) rounds_add(&r, a->at[i] / b->at[i]);
    return rounds_spread(&r);
}

/* Uniform in -1..1, the same numbers in every run. */
static inline float bench_noise(void) {
    static uint32_t x = 2463534242u;
    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    return (float)(int32_t)x * (1.0f / 2147483648.0f);
}

/* Longer than the threads of a pool or of OpenMP spin after their last work. */
static inline void bench_settle(void) { nanosleep(&(struct timespec){.tv_nsec = 8000000}, NULL); }

/* Seconds that run(arg) says it took: the least of as many as fit into `slice` seconds, and of at least three unless
 * they are long, so that the caches are as warm as the data allows and a neighbour's burst does not count. */
static inline double bench_best(double (*run)(void *arg), void *arg, double slice) {
    double best = 1e30, spent = 0;
    for (uint32_t i = 0; i < 1000 && (spent < slice || (i < 3 && spent < 0.2)); i++) {
        double s = run(arg);
        if (s < best) best = s;
        spent += s;
    }
    return best;
}

#endif /* BENCH_H */
