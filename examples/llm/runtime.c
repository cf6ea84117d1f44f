#include "runtime.h"
#include "kv_file.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

double runtime_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ---- loading ---- */

/* FNV-1a, 64 bits. */
static uint64_t hash_bytes(uint64_t h, const void *data, size_t n) {
    const uint8_t *p = data;
    for (size_t i = 0; i < n; i++) h = (h ^ p[i]) * 0x100000001b3u;
    return h;
}

static uint64_t hash_number(uint64_t h, uint64_t v) { return hash_bytes(h, &v, sizeof v); }

/* What decides the KV of a token list. A tensor counts with its name, shape, type and first 4 KiB: training
 * any further changes those of nearly every tensor, and reading all of a large file would take longer than
 * loading it. */
static uint64_t fingerprint(const runtime *rt, weights_mode act) {
    uint64_t h = 0xcbf29ce484222325u;
    for (uint64_t i = 0; i < gguf_tensor_count(rt->file); i++) {
        const gguf_tensor_info *t = gguf_tensor_at(rt->file, i);
        h = hash_bytes(h, t->name.data, t->name.len);
        h = hash_number(hash_bytes(h, t->ne, sizeof t->ne), t->type);
        h = hash_number(hash_bytes(h, t->data, t->bytes < 4096 ? (size_t)t->bytes : 4096), t->bytes);
    }
    for (uint32_t id = 0; id < tokenizer_vocab_size(rt->tok); id++) {
        size_t len;
        const char *piece = tokenizer_piece(rt->tok, (int32_t)id, &len);
        h = hash_bytes(hash_number(h, len), piece, len);
    }
    const model_config *c = rt->config;
    h = hash_bytes(hash_number(h, c->rope_dims), &c->rope_base, sizeof c->rope_base);
    h = hash_bytes(hash_number(h, c->n_q_heads), &c->rms_eps, sizeof c->rms_eps);
    return hash_number(hash_number(h, c->n_kv_heads), act);
}

static bool make_context(runtime *rt, kvl_backend_kind backend, kvl_context **out, char *err,
                         size_t err_len) {
    kvl_context_desc d = {.backend = backend,
                          .n_threads = pool_threads(rt->threads),
                          .parallel_for = pool_parallel_for,
                          .user = rt->threads,
                          .cuda_device = rt->device ? rt->device - 1 : 0,
                          .vulkan = {.device_index = rt->device},
                          .error = err,
                          .error_size = err_len};
    return kvl_context_create(&d, out) == KVL_OK;
}

static bool load_parts(runtime *rt, const runtime_desc *d, char *err, size_t err_len) {
    if (!gguf_open(d->path, &rt->file, err, err_len)) return false;
    rt->threads = pool_create(d->n_threads);
    if (!rt->threads) return llm_fail(err, err_len, "could not start %u threads", d->n_threads);
    rt->step_tokens = d->step_tokens ? d->step_tokens : 512;
    model_desc md = {.mode = d->act, .max_rows = rt->step_tokens, .threads = rt->threads};
    if (!model_load(rt->file, &md, &rt->model, err, err_len)) return false;
    rt->config = model_get_config(rt->model);
    if (!tokenizer_load(rt->file, &rt->tok, err, err_len)) return false;
    if (tokenizer_vocab_size(rt->tok) > rt->config->n_vocab)
        return llm_fail(err, err_len, "the tokenizer has %u tokens, the model only %u",
                        tokenizer_vocab_size(rt->tok), rt->config->n_vocab);
    if (!rt->config->n_ctx) return llm_fail(err, err_len, "llama.context_length is 0");
    rt->fingerprint = fingerprint(rt, d->act);
    rt->backend = d->backend;
    rt->device = d->device;
    return make_context(rt, d->backend, &rt->context, err, err_len);
}

bool runtime_load(runtime *rt, const runtime_desc *desc, char *err, size_t err_len) {
    double start = runtime_now();
    *rt = (runtime){0};
    if (!load_parts(rt, desc, err, err_len)) {
        runtime_free(rt);
        return false;
    }
    rt->load_s = runtime_now() - start;
    return true;
}

void runtime_free(runtime *rt) {
    kvl_context_destroy(rt->context);
    kvl_context_destroy(rt->passed_over);
    tokenizer_free(rt->tok);
    model_free(rt->model);
    pool_destroy(rt->threads);
    gguf_close(rt->file);
    free(rt->logits);
    free(rt->logit_rows);
    free(rt->logit_slot);
    free(rt->outputs);
    *rt = (runtime){0};
}

/* ---- caches ---- */

static kvl_format exact_for(kvl_format k, kvl_format v) {
    if (k == KVL_F32 || v == KVL_F32) return KVL_F32; /* open blocks are no coarser than full ones */
    return k == KVL_BF16 && v == KVL_BF16 ? KVL_BF16 : KVL_FORMAT_DEFAULT;
}

static kvl_cache_desc cache_desc(const runtime *rt, const runtime_cache_desc *d, uint32_t seq_tokens) {
    const model_config *c = rt->config;
    return (kvl_cache_desc){.context = rt->context,
                            .geometry = {.n_layers = c->n_layers,
                                         .n_q_heads = c->n_q_heads,
                                         .n_kv_heads = c->n_kv_heads,
                                         .k_dim = c->head_dim,
                                         .preset = d->preset,
                                         .k_format = d->k_format,
                                         .v_format = d->v_format,
                                         .exact_format = exact_for(d->k_format, d->v_format),
                                         .sink_blocks = d->sink_blocks,
                                         .block_tokens = d->block_tokens,
                                         .layers = d->layers,
                                         .fingerprint = rt->fingerprint},
                            .device_bytes = d->device_bytes,
                            .max_seq_tokens = seq_tokens,
                            .max_step_tokens = d->step_tokens ? d->step_tokens : rt->step_tokens};
}

/* Does a budget hold n sequences of so many tokens? NO_BLOCKS and NEVER_FITS: it does not. */
static kvl_result try_budget(kvl_cache_desc desc, uint64_t bytes, uint32_t n, uint32_t tokens) {
    kvl_cache *cache;
    desc.device_bytes = bytes;
    kvl_result r = kvl_cache_create(&desc, &cache);
    if (r != KVL_OK) return r;
    r = kvl_can_fit(cache, n, tokens, NULL);
    kvl_cache_destroy(cache);
    return r;
}

static bool too_small(kvl_result r) { return r == KVL_NO_BLOCKS || r == KVL_NEVER_FITS; }

/* The least budget for n sequences of so many tokens, up to 1.5% more than it takes; what counts is found by
 * asking kvlite, which knows its slabs and scratch. */
static kvl_result find_budget(const kvl_cache_desc *desc, uint32_t n, uint32_t tokens, uint64_t *bytes) {
    uint64_t low = 0, high = 1 << 20;
    kvl_result r;
    while (too_small(r = try_budget(*desc, high, n, tokens)) && high < (uint64_t)1 << 46) {
        low = high;
        high *= 2;
    }
    while (r == KVL_OK && high - low > high / 64) {
        uint64_t middle = low + (high - low) / 2;
        kvl_result at_middle = try_budget(*desc, middle, n, tokens);
        if (at_middle == KVL_OK)
            high = middle;
        else if (too_small(at_middle))
            low = middle;
        else
            r = at_middle;
    }
    *bytes = high;
    return r;
}

static void refuse_budget(const kvl_cache_desc *desc, uint32_t tokens, char *err, size_t err_len) {
    uint64_t need;
    if (find_budget(desc, 1, tokens, &need) != KVL_OK)
        llm_fail(err, err_len, "a KV budget of %" PRIu64 " bytes does not hold %u tokens", desc->device_bytes,
                 tokens);
    else
        llm_fail(err, err_len,
                 "a KV budget of %" PRIu64 " bytes does not hold a sequence of %u tokens: it takes %" PRIu64
                 " (%.1f MiB)",
                 desc->device_bytes, tokens, need, (double)need / (1 << 20));
}

static kvl_result make_cache(runtime *rt, const runtime_cache_desc *desc, kvl_cache **out, char *err,
                             size_t err_len) {
    uint32_t n_ctx = rt->config->n_ctx, seq_tokens = desc->seq_tokens, n = desc->n_sequences;
    if (!seq_tokens || seq_tokens > n_ctx) seq_tokens = n_ctx;
    uint32_t least = desc->least_tokens && desc->least_tokens < seq_tokens ? desc->least_tokens : seq_tokens;
    kvl_cache_desc d = cache_desc(rt, desc, seq_tokens);
    if (!d.device_bytes && find_budget(&d, n ? n : 1, seq_tokens, &d.device_bytes) != KVL_OK)
        d.device_bytes = 1; /* create says what is wrong */
    d.error = err;
    d.error_size = err_len;
    kvl_result r = kvl_cache_create(&d, out);
    if (r == KVL_OK && kvl_can_fit(*out, 1, least, NULL) != KVL_OK) {
        kvl_cache_destroy(*out);
        *out = NULL;
        r = KVL_NO_BLOCKS;
    }
    if (r == KVL_NO_BLOCKS) refuse_budget(&d, least, err, err_len);
    return r;
}

/* Nobody asked for this backend: the CPU has all formats. */
static bool pass_over(runtime *rt, char *err, size_t err_len) {
    kvl_context *cpu;
    snprintf(rt->why_passed_over, sizeof rt->why_passed_over, "%s: %s", kvl_context_backend(rt->context),
             err);
    if (!make_context(rt, KVL_BACKEND_CPU, &cpu, err, err_len)) return false;
    rt->passed_over = rt->context; /* caches may live in it */
    rt->context = cpu;
    return true;
}

static bool make_cache_somewhere(runtime *rt, const runtime_cache_desc *desc, kvl_cache **out, char *err,
                                 size_t err_len) {
    kvl_result r = make_cache(rt, desc, out, err, err_len);
    if (r == KVL_UNSUPPORTED && rt->backend == KVL_BACKEND_AUTO && !rt->passed_over)
        r = pass_over(rt, err, err_len) ? make_cache(rt, desc, out, err, err_len) : r;
    return r == KVL_OK;
}

bool runtime_cache(runtime *rt, const runtime_cache_desc *desc, kvl_cache **out, char *err, size_t err_len) {
    *out = NULL;
    if (!desc->kv_file) return make_cache_somewhere(rt, desc, out, err, err_len);
    runtime_cache_desc d = *desc;
    kv_file f;
    if (!kv_file_read(desc->kv_file, rt->config->n_layers, &f, err, err_len)) return false;
    d.preset = f.preset;
    d.sink_blocks = f.sink_blocks;
    d.block_tokens = f.block_tokens;
    d.layers = f.layers;
    bool ok = make_cache_somewhere(rt, &d, out, err, err_len);
    kv_file_free(&f);
    return ok;
}

/* The lines of a report but for that of the backend named. */
static void append_reasons(const char *report, const char *but, char *line, size_t n) {
    while (*report) {
        size_t len = strcspn(report, "\n"), at = strlen(line), name = strcspn(report, ":");
        if (len && (strncmp(report, but, name) != 0 || (but[name] && but[name] != ' ')))
            snprintf(line + at, n - at, "; %.*s", (int)len, report);
        report += len + (report[len] == '\n');
    }
}

void runtime_backend_line(const runtime *rt, char *line, size_t n) {
    const char *backend = kvl_context_backend(rt->context);
    snprintf(line, n, "backend %s", backend);
    append_reasons(rt->why_passed_over, backend, line, n);
    append_reasons(kvl_context_report(rt->context), backend, line, n);
}

uint64_t runtime_contiguous_bytes(const runtime *rt, uint64_t n_tokens) {
    const model_config *c = rt->config;
    return n_tokens * c->n_layers * c->n_kv_heads * c->head_dim * 2 * sizeof(uint16_t);
}

/* ---- steps ---- */

typedef struct attention {
    kvl_cache *cache;
    const kvl_step *step;
} attention;

static int attend(void *user, int layer, const float *q, const float *k, const float *v, float *out) {
    const attention *a = user;
    kvl_tensor tq = {.data = (void *)q}, tk = {.data = (void *)k}, tv = {.data = (void *)v},
               to = {.data = out};
    return kvl_attend(a->cache, a->step, (uint32_t)layer, &tq, &tk, &tv, &to);
}

static bool grow(void **p, size_t n, size_t size) {
    void *grown = n > SIZE_MAX / size ? NULL : realloc(*p, n * size);
    if (grown) *p = grown;
    return grown != NULL;
}

static bool reserve_logits(runtime *rt, uint32_t n, char *err, size_t err_len) {
    if (n <= rt->logits_cap) return true;
    if (!grow((void **)&rt->logits, n, rt->config->n_vocab * sizeof(float)) ||
        !grow((void **)&rt->logit_rows, n, sizeof *rt->logit_rows) ||
        !grow((void **)&rt->logit_slot, n, sizeof *rt->logit_slot) ||
        !grow((void **)&rt->outputs, n, sizeof *rt->outputs))
        return llm_fail(err, err_len, "no memory for %u rows of logits", n);
    rt->logits_cap = n;
    return true;
}

static kvl_result forward(runtime *rt, kvl_cache *cache, const kvl_step *step, char *err, size_t err_len) {
    uint32_t n = 0;
    if (!reserve_logits(rt, step->n_logits, err, err_len)) return KVL_OUT_OF_HOST_MEMORY;
    for (uint32_t i = 0; i < step->n_logits;
         i++) { /* forks ask for their parent's row again, right after it */
        if (!n || rt->logit_rows[n - 1] != step->logit_rows[i]) rt->logit_rows[n++] = step->logit_rows[i];
        rt->logit_slot[i] = n - 1;
    }
    attention a = {cache, step};
    int r = model_forward(rt->model, step->tokens, step->positions, step->n_tokens, rt->logit_rows, n,
                          rt->logits, attend, &a);
    if (r == MODEL_OK) return KVL_OK;
    if (r == MODEL_BAD_TOKEN)
        llm_fail(err, err_len, "a token is not in the vocabulary of the model");
    else if (r == MODEL_BAD_ROWS)
        llm_fail(err, err_len, "a step of %u rows is more than the model takes", step->n_tokens);
    else
        llm_fail(err, err_len, "%s: %s", kvl_result_name((kvl_result)r), kvl_last_error(cache));
    return r == MODEL_BAD_TOKEN || r == MODEL_BAD_ROWS ? KVL_INVALID_ARG : (kvl_result)r;
}

bool runtime_forward(runtime *rt, kvl_cache *cache, const kvl_step *step, char *err, size_t err_len) {
    return forward(rt, cache, step, err, err_len) == KVL_OK;
}

const float *runtime_logits(const runtime *rt, uint32_t i) {
    return rt->logits + (size_t)rt->logit_slot[i] * rt->config->n_vocab;
}

/* The device starts again, and the requests with it: their tokens are kept, their KV is computed again. */
static kvl_result recover(kvl_cache *cache, char *err, size_t err_len) {
    kvl_result r = kvl_cache_recover(cache);
    if (r != KVL_OK) llm_fail(err, err_len, "%s: %s", kvl_result_name(r), kvl_last_error(cache));
    return r;
}

kvl_result runtime_step(runtime *rt, kvl_cache *cache, kvl_sched *sched, runtime_sample_fn sample, void *user,
                        char *err, size_t err_len) {
    const kvl_step *step;
    kvl_result r = kvl_sched_plan(sched, &step);
    if (r == KVL_DEVICE_LOST) return recover(cache, err, err_len);
    if (r < 0) llm_fail(err, err_len, "%s: %s", kvl_result_name(r), kvl_sched_last_error(sched));
    if (r != KVL_OK) return r;
    r = forward(rt, cache, step, err, err_len);
    if (r != KVL_OK) {
        kvl_sched_abort(sched, step);
        return r == KVL_DEVICE_LOST ? recover(cache, err, err_len) : r;
    }
    for (uint32_t i = 0; i < step->n_logits; i++)
        rt->outputs[i] = sample(user, step, i, runtime_logits(rt, i));
    r = kvl_sched_commit_ex(sched, step, rt->outputs);
    if (r != KVL_OK) {
        llm_fail(err, err_len, "%s: %s", kvl_result_name(r), kvl_sched_last_error(sched));
        kvl_sched_abort(sched, step);
    }
    return r;
}

uint32_t runtime_stop_tokens(const runtime *rt, int32_t out[8]) {
    uint32_t n = 0;
    for (uint32_t id = 0; id < tokenizer_vocab_size(rt->tok) && n < 8; id++)
        if (tokenizer_is_end(rt->tok, (int32_t)id)) out[n++] = (int32_t)id;
    return n;
}
