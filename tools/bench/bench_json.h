/* bench_json.h - results of a benchmark as one JSON object. */
#ifndef BENCH_JSON_H
#define BENCH_JSON_H

#include "bench.h"

#include <cjson/cJSON.h>

/* NAME, NAME_min and NAME_max. */
static inline void bench_json_spread(cJSON *o, const char *name, spread s) {
    char key[64];
    cJSON_AddNumberToObject(o, name, s.median);
    snprintf(key, sizeof key, "%s_min", name);
    cJSON_AddNumberToObject(o, key, s.least);
    snprintf(key, sizeof key, "%s_max", name);
    cJSON_AddNumberToObject(o, key, s.most);
}

static inline bool bench_write_json(const cJSON *json, const char *path, char *err, size_t n) {
    char *text = cJSON_Print(json);
    FILE *f = strcmp(path, "-") == 0 ? stdout : fopen(path, "w");
    bool ok = text && f && fprintf(f, "%s\n", text) > 0 && fflush(f) == 0;
    if (f && f != stdout) ok = fclose(f) == 0 && ok;
    cJSON_free(text);
    return ok || llm_fail(err, n, "--json %.100s: could not be written", path);
}

#endif /* BENCH_JSON_H */
