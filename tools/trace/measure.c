/* measure.c - the cost of steps on the CPU backend with a real model: least squares over the steps of a mixed run. */
#include "trace.h"
#include "llm/runtime.h"

#include <string.h>

enum { N_REQUESTS = 24, MAX_PROMPT = 3000, N_ANSWER = 48, N_COSTS = 5 };

typedef struct fit { /* normal equations, in units that make features about one */
    double a[N_COSTS][N_COSTS], b[N_COSTS];
    uint32_t n;
} fit;
static const double unit[N_COSTS] = {1, 64, 8, 5e3, 5e4};

static void fit_add(fit *f, const step_work *w, double ms) {
    double x[N_COSTS] = {1, w->prefill_rows / unit[1], w->decode_rows / unit[2],
                         w->decode_kv_tokens / unit[3], w->prefill_pairs / unit[4]};
    for (int i = 0; i < N_COSTS; i++) {
        for (int j = 0; j < N_COSTS; j++)
            f->a[i][j] += x[i] * x[j] / (ms * ms); /* relative errors count alike */
        f->b[i] += x[i] / ms;
    }
    f->n++;
}

static void fit_solve(const fit *f, double *v) { /* coordinate descent, no coefficient below 0 */
    memset(v, 0, N_COSTS * sizeof *v);
    for (int round = 0; round < 20000; round++)
        for (int i = 0; i < N_COSTS; i++) {
            double r = f->b[i];
            for (int j = 0; j < N_COSTS; j++) r -= j == i ? 0 : f->a[i][j] * v[j];
            v[i] = r > 0 && f->a[i][i] > 0 ? r / f->a[i][i] : 0;
        }
    for (int i = 0; i < N_COSTS; i++) v[i] /= unit[i];
}

static step_work work_of(const kvl_step *step) {
    step_work w = {0};
    for (uint32_t i = 0; i < step->n_spans; i++) {
        const kvl_step_span *s = &step->spans[i];
        double pairs = (double)s->n_rows * s->position + 0.5 * s->n_rows * s->n_rows;
        if (s->n_rows == 1) {
            w.decode_rows++;
            w.decode_kv_tokens += pairs;
        } else {
            w.prefill_rows += s->n_rows;
            w.prefill_pairs += pairs;
        }
    }
    return w;
}

static bool measured_step(runtime *rt, kvl_cache *cache, kvl_sched *sched, fit *f, bool *more, char *err,
                          size_t n) {
    const kvl_step *step;
    int32_t tokens[512 + N_REQUESTS];
    double start = runtime_now();
    *more = kvl_sched_plan(sched, &step) == KVL_OK;
    if (!*more) return true;
    step_work w = work_of(step);
    if (!runtime_forward(rt, cache, step, err, n)) {
        kvl_sched_abort(sched, step);
        return false;
    }
    for (uint32_t i = 0; i < step->n_logits; i++) tokens[i] = (int32_t)(1000 + i);
    if (kvl_sched_commit(sched, step, tokens) != KVL_OK)
        return llm_fail(err, n, "%s", kvl_sched_last_error(sched));
    if (w.prefill_rows + w.decode_rows > 0) fit_add(f, &w, (runtime_now() - start) * 1e3);
    return true;
}

static bool submit_all(const runtime *rt, kvl_sched *sched, char *err, size_t n) {
    static int32_t prompt[MAX_PROMPT];
    for (uint32_t r = 0; r < N_REQUESTS; r++) {
        kvl_req handle;
        kvl_refusal refusal;
        kvl_request q = {.tokens = prompt, .max_new_tokens = N_ANSWER, .no_match = true};
        q.n_tokens = 64 + r * 1237 % (MAX_PROMPT - 64);
        if (q.n_tokens > rt->config->n_ctx / 2) q.n_tokens = rt->config->n_ctx / 2;
        for (uint32_t i = 0; i < q.n_tokens; i++)
            prompt[i] = (int32_t)((r * 31u + i * 17u) % (rt->config->n_vocab / 2));
        if (kvl_sched_submit_ex(sched, &q, &handle, &refusal) != KVL_OK)
            return llm_fail(err, n, "%s", refusal.text);
    }
    return true;
}

static void print_cost(const fit *f, const runtime *rt, const char *gguf, const char *preset,
                       double kv_token_bytes) {
    double v[N_COSTS];
    const char *slash = strrchr(gguf, '/');
    fit_solve(f, v);
    printf("// Measured: trace --measure-cost %s --kv %s, %u steps of mixed prefill and decode on %s.\n",
           slash ? slash + 1 : gguf, preset, f->n, kvl_context_backend(rt->context));
    printf("// It holds for that model on that machine.\n\n");
    printf("step_ms = %.5g;\nprefill_token_ms = %.5g;\ndecode_ms = %.5g;\n", v[0], v[1], v[2]);
    printf("kv_gb_ms = %.5g;      // of KV that decodes read (%.0f bytes a token)\n",
           v[3] / kv_token_bytes * 1e9, kv_token_bytes);
    printf("prefill_kv_ms = %.5g; // a million pairs of a prefill row and a token that it sees\n",
           v[4] * 1e6);
}

bool cost_measure(const char *gguf, const char *preset, char *err, size_t n) {
    runtime rt = {0};
    runtime_cache_desc cd = {
        .preset = preset ? preset : "int8", .n_sequences = 12, .seq_tokens = MAX_PROMPT + N_ANSWER};
    kvl_cache *cache = NULL;
    kvl_sched *sched = NULL;
    kvl_block_layout layout;
    fit f = {.n = 0};
    bool more = true;
    bool ok = runtime_load(&rt, &(runtime_desc){.path = gguf, .backend = KVL_BACKEND_CPU}, err, n) &&
              runtime_cache(&rt, &cd, &cache, err, n);
    if (ok && kvl_sched_create(cache, &(kvl_sched_desc){.max_gap_ms = 120}, &sched) != KVL_OK)
        ok = llm_fail(err, n, "%s", kvl_last_error(cache));
    ok = ok && submit_all(&rt, sched, err, n);
    while (ok && more) ok = measured_step(&rt, cache, sched, &f, &more, err, n);
    if (ok) {
        kvl_cache_layout(cache, 0, false, &layout);
        print_cost(&f, &rt, gguf, cd.preset, (double)layout.block_bytes / 32);
    }
    kvl_sched_destroy(sched);
    kvl_cache_destroy(cache);
    runtime_free(&rt);
    return ok;
}
