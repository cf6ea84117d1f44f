/* cost.c - models by name, and the cost of a step from a few coefficients. */
#include "trace.h"
#include "llm/runtime.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- models ---- */

static const model models[] = {
    {"SmolLM2-135M", 30, 9, 3, 64, 134.5e6}, {"Llama-3-8B", 32, 32, 8, 128, 8.03e9},
    {"Llama-2-7B", 32, 32, 32, 128, 6.74e9}, {"Llama-2-13B", 40, 40, 40, 128, 13.02e9},
    {"OPT-13B", 40, 40, 40, 128, 12.85e9},   {"Qwen2.5-7B", 28, 28, 4, 128, 7.62e9},
    {"Qwen3-8B", 36, 32, 8, 128, 8.19e9},    {"Llama-3-70B", 80, 64, 8, 128, 70.6e9},
};
enum { N_MODELS = sizeof models / sizeof *models };

const char *model_names(void) {
    static char text[512];
    text[0] = 0;
    for (int i = 0; i < N_MODELS; i++) {
        size_t at = strlen(text);
        snprintf(text + at, sizeof text - at, "%s%s", i ? " " : "", models[i].name);
    }
    return text;
}

bool model_find(model *m, const char *name, char *err, size_t err_len) {
    double v[5] = {0, 0, 0, 0, 0}; /* layers, KV heads, dim, query heads, params in 1e9 */
    int n = 0;
    const char *at = name;
    for (int i = 0; i < N_MODELS; i++)
        if (strcmp(name, models[i].name) == 0) {
            *m = models[i];
            return true;
        }
    while (n < 5 && *at >= '0' && *at <= '9') {
        char *end;
        v[n++] = strtod(at, &end);
        at = *end == ':' ? end + 1 : end;
        if (*end != ':') break;
    }
    bool whole = !*at && n >= 3;
    for (int i = 0; i < 4; i++) whole = whole && v[i] == floor(v[i]) && v[i] <= 4096 && (v[i] >= 1 || i >= n);
    if (!whole)
        return llm_fail(err, err_len,
                        "--model '%.60s': must be layers:kvheads:dim[:qheads[:params in 1e9]] or one of %s",
                        name, model_names());
    snprintf(m->name, sizeof m->name, "%.31s", name);
    m->n_layers = (uint32_t)v[0];
    m->n_kv_heads = (uint32_t)v[1];
    m->head_dim = (uint32_t)v[2];
    m->n_q_heads = v[3] > 0 ? (uint32_t)v[3] : m->n_kv_heads;
    double width =
        (double)m->n_q_heads * m->head_dim; /* attention and a feed-forward of about 8 widths squared */
    m->params = v[4] > 0 ? v[4] * 1e9 : 12 * width * width * m->n_layers;
    return true;
}

/* ---- coefficients ---- */

/* What a cost file can name, in this order. */
#define COST_FIELDS(X)  \
    X(step_ms)          \
    X(prefill_token_ms) \
    X(decode_ms)        \
    X(kv_gb_ms)         \
    X(prefill_kv_ms) X(memory_gb) X(bandwidth_gbs) X(bandwidth_share) X(tflops) X(flops_share) X(weight_bits)

typedef struct coefficients {
#define FIELD(name) double name;
    COST_FIELDS(FIELD)
#undef FIELD
} coefficients;

/* The files of this folder are C as well, so that the program carries them. */
#define FIELD(name) double name = 0;
#define STORE(name) c.name = name;
static coefficients cpu(void) {
    coefficients c;
    COST_FIELDS(FIELD)
#include "cost_cpu.txt"
    COST_FIELDS(STORE)
    return c;
}
static coefficients rtx4090(void) {
    coefficients c;
    COST_FIELDS(FIELD)
#include "cost_rtx4090.txt"
    COST_FIELDS(STORE)
    return c;
}
static coefficients a100(void) {
    coefficients c;
    COST_FIELDS(FIELD)
#include "cost_a100.txt"
    COST_FIELDS(STORE)
    return c;
}
#undef FIELD
#undef STORE

static double *field(coefficients *c, const char *name) {
#define FIELD(f) \
    if (strcmp(name, #f) == 0) return &c->f;
    COST_FIELDS(FIELD)
#undef FIELD
    return NULL;
}

static bool read_line(coefficients *c, char *line, const char *path, unsigned number, char *err,
                      size_t err_len) {
    char name[32];
    double value;
    int end = 0;
    char *comment = strstr(line, "//");
    if (comment) *comment = 0;
    if (line[strspn(line, " \t\r\n")] == 0) return true;
    if (sscanf(line, " %31[a-z0-9_] = %lf ;%n", name, &value, &end) != 2 || !end ||
        line[end + strspn(line + end, " \t\r\n")])
        return llm_fail(err, err_len, "%s:%u: not 'name = number;'", path, number);
    double *at = field(c, name);
    if (!at) return llm_fail(err, err_len, "%s:%u: '%s' is no coefficient", path, number, name);
    if (!(value >= 0 && value < 1e12))
        return llm_fail(err, err_len, "%s:%u: %s is negative or not finite", path, number, name);
    *at = value;
    return true;
}

static bool read_file(coefficients *c, const char *path, char *err, size_t err_len) {
    char line[512];
    unsigned number = 0;
    bool ok = true;
    FILE *f = fopen(path, "r");
    memset(c, 0, sizeof *c);
    if (!f)
        return llm_fail(err, err_len, "--cost %s: %s (built in: cpu rtx4090 a100)", path, strerror(errno));
    while (ok && fgets(line, sizeof line, f)) ok = read_line(c, line, path, ++number, err, err_len);
    if (ok && ferror(f)) ok = llm_fail(err, err_len, "--cost %s: %s", path, strerror(errno));
    fclose(f);
    return ok;
}

bool cost_find(cost *out, const char *name, const model *m, char *err, size_t err_len) {
    coefficients c;
    if (strcmp(name, "cpu") == 0)
        c = cpu();
    else if (strcmp(name, "rtx4090") == 0)
        c = rtx4090();
    else if (strcmp(name, "a100") == 0)
        c = a100();
    else if (!read_file(&c, name, err, err_len))
        return false;
    double bandwidth = c.bandwidth_gbs * 1e9 * (c.bandwidth_share > 0 ? c.bandwidth_share : 1);
    double flops = c.tflops * 1e12 * (c.flops_share > 0 ? c.flops_share : 1);
    memset(out, 0, sizeof *out);
    snprintf(out->name, sizeof out->name, "%.63s", name);
    out->step_ms = c.step_ms + (bandwidth > 0 ? m->params * c.weight_bits / 8 / bandwidth * 1e3 : 0);
    out->prefill_token_ms = c.prefill_token_ms + (flops > 0 ? 2 * m->params / flops * 1e3 : 0);
    out->decode_ms = c.decode_ms + (flops > 0 ? 2 * m->params / flops * 1e3 : 0);
    out->kv_gb_ms = c.kv_gb_ms + (bandwidth > 0 ? 1e9 / bandwidth * 1e3 : 0);
    out->prefill_kv_ms = c.prefill_kv_ms +
                         (flops > 0 ? 4.0 * m->n_layers * m->n_q_heads * m->head_dim * 1e6 / flops * 1e3 : 0);
    out->memory_gb = c.memory_gb > 0 ? c.memory_gb * 0.9 - m->params * c.weight_bits / 8 / 1e9 : 0;
    if (!(out->step_ms + out->prefill_token_ms + out->decode_ms > 0))
        return llm_fail(err, err_len, "--cost %s: a step takes no time", name);
    if (c.memory_gb > 0 && out->memory_gb <= 0)
        return llm_fail(err, err_len, "--cost %s: %s does not fit into %g GB", name, m->name, c.memory_gb);
    return true;
}

double cost_ms(const cost *c, const step_work *w, double kv_token_bytes) {
    return c->step_ms + c->prefill_token_ms * w->prefill_rows + c->decode_ms * w->decode_rows +
           c->kv_gb_ms * w->decode_kv_tokens * kv_token_bytes / 1e9 +
           c->prefill_kv_ms * w->prefill_pairs / 1e6;
}

kvl_cost cost_for_scheduler(const cost *c, double kv_token_bytes) {
    kvl_cost k = {.step_ms = c->step_ms,
                  .prefill_token_ms = c->prefill_token_ms,
                  .decode_ms = c->decode_ms,
                  .kv_megatoken_ms = c->kv_gb_ms * kv_token_bytes / 1e3,
                  .prefill_kv_megatoken_ms = c->prefill_kv_ms};
    return k;
}
