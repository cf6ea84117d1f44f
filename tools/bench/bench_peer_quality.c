/* bench_peer_quality: what llama.cpp's cache formats cost a model, counted as tools/quality counts kvlite's. See
 * --help. */
#include "bench_json.h"
#include "llm/options.h"
#include "peer.h"
#include "tools/quality/stats.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

static const char usage[] =
    "usage: bench_peer_quality [options]\n"
    "\n"
    "Perplexity of a text with llama.cpp's caches and their divergence from its own F32 cache. The text\n"
    "is cut into chunks of --ctx tokens, each read from an empty cache; the predictions of the second\n"
    "half count, as in llama.cpp's perplexity tool. Flash attention is on, but for the F32 cache, which\n"
    "it would round to F16. f16 is the noise floor: what other roundings of the same numbers give\n"
    "(activations are rounded to 8 bits in every row of llama.cpp).\n"
    "\n"
    "  -m FILE         (default build/models/SmolLM2-135M-Instruct.Q4_1.gguf)\n"
    "  -f TEXT         (default ../shared/data/wikitext2_test.txt)\n"
    "  --ctx N         (default 1024)\n"
    "  --chunks N      (default 8)\n"
    "  --threads N     (default 2)\n"
    "  --quick         one chunk\n"
    "  --json FILE     also write the rows as JSON; - is stdout, the table then goes to stderr\n"
    "\n"
    "JSON: an array of objects with kv (\"llama.cpp f32\", f16, q8_0, q4_0), ppl, dppl_percent (against\n"
    "its f32), kld_mean, kld_p99, kld_p999, top1_percent (predictions with the same likeliest token),\n"
    "bits (a number of K and V).\n";

typedef struct format {
    const char *name;
    enum ggml_type type;
    double nll; /* sum over all predictions */
    double *kld;
    uint32_t n, n_same;
} format;

enum { FORMATS = 4 };

typedef struct program {
    const char *model, *text, *json;
    uint64_t threads, ctx, chunks;
    bool quick, help;
    pool *pool;
    gguf_file *file;
    tokenizer *tok;
    token_list ids;
    struct llama_model *llama;
    uint32_t n_vocab;
    format formats[FORMATS];
    float *base, *tested; /* [predictions of a chunk][n_vocab] logits of F32's cache, of another's */
} program;

/* ---- scores of one prediction ---- */
typedef struct score {
    double nll, kld;
    bool same;
} score;

typedef struct comparison {
    const float *base, *tested;
    const int32_t *next; /* the tokens that the text goes on with */
    uint32_t n_vocab;
    score *scores;
} comparison;

static void compare_row(void *user, uint32_t row) {
    const comparison *c = user;
    const float *base = c->base + (size_t)row * c->n_vocab, *tested = c->tested + (size_t)row * c->n_vocab;
    uint32_t base_top, tested_top;
    double base_sum = log_sum_exp(base, c->n_vocab, &base_top), kld = 0;
    double tested_sum = log_sum_exp(tested, c->n_vocab, &tested_top);
    for (uint32_t i = 0; i < c->n_vocab; i++) {
        double log_p = base[i] - base_sum;
        kld += exp(log_p) * (log_p - (tested[i] - tested_sum));
    }
    c->scores[row] = (score){tested_sum - tested[c->next[row]], kld, base_top == tested_top};
}

/* ---- llama.cpp ---- */
static void quiet(enum ggml_log_level level, const char *text, void *user) {
    (void)user;
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

static struct llama_context *open_context(const program *p, enum ggml_type type) {
    struct llama_context_params c = llama_context_default_params();
    c.n_ctx = c.n_batch = (uint32_t)p->ctx;
    c.n_threads = c.n_threads_batch = (int32_t)p->threads;
    c.type_k = c.type_v = type;
    c.n_outputs_max_per_seq = 0;
    c.flash_attn_type =
        type == GGML_TYPE_F32 ? LLAMA_FLASH_ATTN_TYPE_DISABLED : LLAMA_FLASH_ATTN_TYPE_ENABLED;
    return llama_init_from_model(p->llama, c);
}

/* Logits of the second half of a chunk, but for the last token, whose follower is in another chunk. */
static bool run_chunk(const program *p, struct llama_context *ctx, const int32_t *tokens, float *out,
                      char *err, size_t n) {
    const struct llama_vocab *vocab = llama_model_get_vocab(p->llama);
    uint32_t ctx_n = (uint32_t)p->ctx, first = ctx_n / 2, at = 0;
    struct llama_batch b = llama_batch_init((int32_t)ctx_n, 0, 1);
    for (uint32_t i = 0; i < ctx_n; i++) {
        b.token[i] = i == 0 && llama_vocab_get_add_bos(vocab) ? llama_vocab_bos(vocab) : tokens[i];
        b.pos[i] = (llama_pos)i;
        b.n_seq_id[i] = 1;
        b.seq_id[i][0] = 0;
        b.logits[i] = i >= first && i + 1 < ctx_n;
    }
    b.n_tokens = (int32_t)ctx_n;
    llama_memory_clear(llama_get_memory(ctx), true);
    int32_t code = llama_decode(ctx, b);
    for (uint32_t i = first; code == 0 && i + 1 < ctx_n; i++)
        memcpy(out + (size_t)at++ * p->n_vocab, llama_get_logits_ith(ctx, (int32_t)i),
               p->n_vocab * sizeof(float));
    llama_batch_free(b);
    return code == 0 || llm_fail(err, n, "llama_decode: %d", (int)code);
}

static bool score_chunk(program *p, struct llama_context **ctx, const int32_t *tokens, char *err, size_t n) {
    uint32_t first = (uint32_t)p->ctx / 2, rows = (uint32_t)p->ctx - 1 - first;
    score *scores = malloc(rows * sizeof *scores);
    bool ok = scores || llm_fail(err, n, "no memory for %u predictions", rows);
    for (uint32_t f = 0; ok && f < FORMATS; f++) {
        format *t = &p->formats[f];
        comparison c = {p->base, f ? p->tested : p->base, tokens + first + 1, p->n_vocab, scores};
        ok = run_chunk(p, ctx[f], tokens, f ? p->tested : p->base, err, n);
        if (!ok) break;
        pool_run(p->pool, rows, compare_row, &c);
        for (uint32_t i = 0; i < rows; i++) {
            t->nll += scores[i].nll;
            t->kld[t->n++] = scores[i].kld;
            t->n_same += scores[i].same;
        }
    }
    free(scores);
    return ok;
}

static bool score_text(program *p, char *err, size_t n) {
    struct llama_context *ctx[FORMATS] = {NULL};
    bool ok = true;
    for (uint32_t f = 0; f < FORMATS; f++) {
        ctx[f] = open_context(p, p->formats[f].type);
        if (!ctx[f])
            ok = llm_fail(err, n, "llama.cpp made no context with a cache of %s", p->formats[f].name);
    }
    for (uint64_t i = 0; ok && i < p->chunks; i++) {
        fprintf(stderr, "  chunk %" PRIu64 " of %" PRIu64 "\n", i + 1, p->chunks);
        ok = score_chunk(p, ctx, p->ids.ids + i * p->ctx, err, n);
    }
    for (uint32_t f = 0; f < FORMATS; f++) llama_free(ctx[f]);
    return ok;
}

/* ---- output ---- */
static cJSON *report(program *p, FILE *table) {
    cJSON *rows = cJSON_CreateArray();
    double base = exp(p->formats[0].nll / p->formats[0].n);
    fprintf(table, "%-16s %6s %9s %9s %10s %10s %10s %7s\n", "", "bits", "ppl", "dppl", "kld", "p99", "p99.9",
            "top-1");
    for (uint32_t i = 0; i < FORMATS; i++) {
        format *f = &p->formats[i];
        double ppl = exp(f->nll / f->n), change = (ppl / base - 1) * 100, mean = 0;
        double bits = (double)ggml_type_size(f->type) * 8 / (double)ggml_blck_size(f->type);
        qsort(f->kld, f->n, sizeof *f->kld, bench_by_value);
        for (uint32_t k = 0; k < f->n; k++) mean += f->kld[k] / f->n;
        cJSON *o = cJSON_CreateObject();
        cJSON_AddStringToObject(o, "kv", f->name);
        cJSON_AddNumberToObject(o, "ppl", ppl);
        cJSON_AddNumberToObject(o, "dppl_percent", change);
        cJSON_AddNumberToObject(o, "kld_mean", mean);
        cJSON_AddNumberToObject(o, "kld_p99", sorted_quantile(f->kld, f->n, 0.99));
        cJSON_AddNumberToObject(o, "kld_p999", sorted_quantile(f->kld, f->n, 0.999));
        cJSON_AddNumberToObject(o, "top1_percent", 100.0 * f->n_same / f->n);
        cJSON_AddNumberToObject(o, "bits", bits);
        cJSON_AddItemToArray(rows, o);
        fprintf(table, "%-16s %6.2f %9.4f %+8.3f%% %10.6f %10.6f %10.6f %6.2f%%\n", f->name, bits, ppl,
                change, mean, sorted_quantile(f->kld, f->n, 0.99), sorted_quantile(f->kld, f->n, 0.999),
                100.0 * f->n_same / f->n);
    }
    return rows;
}

/* ---- the command line ---- */
static bool parse(program *p, int argc, char **argv, char *err, size_t n) {
    args a = {.argc = argc, .argv = argv, .i = 1};
    p->model = "build/models/SmolLM2-135M-Instruct.Q4_1.gguf";
    p->text = "../shared/data/wikitext2_test.txt";
    p->threads = 2;
    p->ctx = 1024;
    while (args_next(&a, err, n)) {
        bool ok = true;
        if (args_is(&a, "-m"))
            ok = args_value(&a, &p->model, err, n);
        else if (args_is(&a, "-f"))
            ok = args_value(&a, &p->text, err, n);
        else if (args_is(&a, "--ctx"))
            ok = args_u64(&a, 16, 8192, &p->ctx, err, n);
        else if (args_is(&a, "--chunks"))
            ok = args_u64(&a, 1, 1 << 16, &p->chunks, err, n);
        else if (args_is(&a, "--threads"))
            ok = args_u64(&a, 1, 1024, &p->threads, err, n);
        else if (args_is(&a, "--quick"))
            ok = p->quick = args_flag(&a, err, n);
        else if (args_is(&a, "--json"))
            ok = args_value(&a, &p->json, err, n);
        else if (args_is(&a, "-h") || args_is(&a, "--help"))
            p->help = true;
        else
            ok = llm_fail(err, n, "option '%s' is unknown", a.name);
        if (!ok) return false;
    }
    if (!p->chunks) p->chunks = p->quick ? 1 : 8;
    return !err[0];
}

static bool load_text(program *p, char *err, size_t n) {
    FILE *f = fopen(p->text, "rb");
    if (!f) return llm_fail(err, n, "-f %.100s: %s", p->text, strerror(errno));
    size_t most = (p->chunks + 1) * p->ctx * 16, len; /* far more bytes than so many tokens have */
    char *text = malloc(most);
    len = text ? fread(text, 1, most, f) : 0;
    fclose(f);
    bool ok = text || llm_fail(err, n, "no memory for %zu bytes of text", most);
    ok = ok && tokenizer_encode(p->tok, text, len, TOKENIZE_BOS, &p->ids, err, n);
    free(text);
    if (!ok) return false;
    return p->ids.n >= p->chunks * p->ctx ||
           llm_fail(err, n, "-f %.100s: %zu tokens; %" PRIu64 " chunks of %" PRIu64 " need more", p->text,
                    p->ids.n, p->chunks, p->ctx);
}

static bool load(program *p, char *err, size_t n) {
    static const struct {
        const char *name;
        enum ggml_type type;
    } kinds[FORMATS] = {{"llama.cpp f32", GGML_TYPE_F32},
                        {"llama.cpp f16", GGML_TYPE_F16},
                        {"llama.cpp q8_0", GGML_TYPE_Q8_0},
                        {"llama.cpp q4_0", GGML_TYPE_Q4_0}};
    p->pool = pool_create((uint32_t)p->threads);
    if (!p->pool) return llm_fail(err, n, "could not start %" PRIu64 " threads", p->threads);
    if (!gguf_open(p->model, &p->file, err, n) || !tokenizer_load(p->file, &p->tok, err, n) ||
        !load_text(p, err, n))
        return false;
    llama_log_set(quiet, NULL);
    llama_backend_init();
    p->llama = llama_model_load_from_file(p->model, llama_model_default_params());
    if (!p->llama) return llm_fail(err, n, "llama.cpp could not load %.100s", p->model);
    p->n_vocab = (uint32_t)llama_vocab_n_tokens(llama_model_get_vocab(p->llama));
    size_t logits = p->ctx / 2 * p->n_vocab;
    p->base = malloc(logits * sizeof(float));
    p->tested = malloc(logits * sizeof(float));
    bool ok = p->base && p->tested;
    for (int f = 0; f < FORMATS; f++) {
        p->formats[f] = (format){.name = kinds[f].name, .type = kinds[f].type};
        p->formats[f].kld = malloc(p->chunks * p->ctx * sizeof(double));
        ok = ok && p->formats[f].kld;
    }
    return ok || llm_fail(err, n, "no memory for the logits of %" PRIu64 " tokens", p->ctx);
}

static void release(program *p) {
    for (int f = 0; f < FORMATS; f++) free(p->formats[f].kld);
    free(p->base);
    free(p->tested);
    llama_model_free(p->llama);
    token_list_free(&p->ids);
    tokenizer_free(p->tok);
    gguf_close(p->file);
    pool_destroy(p->pool);
}

int main(int argc, char **argv) {
    static program p;
    char err[LLM_ERR_LEN] = "";
    if (!parse(&p, argc, argv, err, sizeof err)) {
        fprintf(stderr, "bench_peer_quality: %s (--help tells more)\n", err);
        return 2;
    }
    if (p.help) return fputs(usage, stdout) < 0;
    bool ok = load(&p, err, sizeof err) && score_text(&p, err, sizeof err);
    if (ok) {
        cJSON *rows = report(&p, bench_table(p.json));
        ok = !p.json || bench_write_json(rows, p.json, err, sizeof err);
        cJSON_Delete(rows);
    }
    if (!ok) fprintf(stderr, "bench_peer_quality: %s\n", err);
    release(&p);
    return !ok;
}
