/* report.h - what the trace tool says: JSON with fixed keys, or text. */
#ifndef TRACE_REPORT_H
#define TRACE_REPORT_H

#include "trace.h"

#include <cjson/cJSON.h>

typedef struct sweep_point {
    uint64_t kv_bytes;
    double hit_rate, lru_hit_rate, belady_hit_rate;
} sweep_point;

typedef struct report {
    const char *source; /* the trace's file, without folders */
    const model *m;
    const setup *s;
    double speed, kv_token_bytes;
    uint32_t repeat;
    const result *real; /* of the scheduler; NULL: not run */
    const result *baselines[3];
    double hit_rate, lru_hit_rate, belady_hit_rate; /* of the prompts' tokens */
    double ideal_ms,
        ideal_belady_ms; /* with the hits that there were (without a real run: with the latter) */
    const sweep_point *sweep;
    uint32_t n_sweep;
    const result *swept; /* with a sweep: at its last size */
} report;

extern const char report_help[]; /* the keys */

bool report_json(const report *r, FILE *f);
void report_text(const report *r, FILE *f);

#endif /* TRACE_REPORT_H */
