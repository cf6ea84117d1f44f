/* quality: what KV formats cost a model. See `quality --help`. */
#include "quality.h"
#include "llm/options.h"
#include "llm/pretokenize.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

enum { EXIT_RUNTIME = 1, EXIT_USAGE = 2 };
enum { MAX_KV = 32, MAX_VARIANTS = 3 * MAX_KV + 2 };

static const char usage[] =
    "usage: quality -m MODEL.gguf -f TEXT [--kv NAME]... [options]\n"
    "\n"
    "Perplexity of a text with KV caches of several formats, and how far their predictions are from those\n"
    "with an F32 cache: Kullback-Leibler divergence (KLD), share of equal likeliest tokens, bits a number.\n"
    "Counted as llama.cpp's perplexity tool does: the text is cut into chunks of --ctx tokens, and what the\n"
    "second half of each predicts is scored.\n"
    "\n"
    "  -m FILE          model, a GGUF file (required)\n"
    "  -f FILE          the text (required)\n"
    "  --kv NAME        a preset, FORMAT/FORMAT for keys and values, or a file (llm/kv_file.h says how);\n"
    "                   may be given several times (default: every preset)\n"
    "  --whole          no rows for keys and values apart, nor for int8 activations\n"
    "  --ctx N          tokens in a chunk, even (default 1024; 2048 with --retrieval)\n"
    "  --chunks N       chunks to run, fewer where the text ends (default 8; 2 with --retrieval, 1 with\n"
    "                   --per-layer)\n"
    "  --act f32|int8   activations (default f32: int8 has a noise that hides the better formats)\n"
    "  --threads N      threads (default: one for each processor)\n"
    "  --json           an array of objects, one for each row\n"
    "\n"
    "  --retrieval      instead: 16 facts planted in each chunk, and asked for at its end\n"
    "  --per-layer      instead: what each layer loses by a format of its own, the others in F16\n"
    "  --bits B         with it: the best formats within B bits a number, layer by layer\n"
    "  --out FILE       with it: writes them for --kv FILE\n"
    "\n"
    "Exit codes: 0 done, 1 failed, 2 wrong usage.\n";

typedef enum command { DIVERGENCE, RETRIEVAL, PER_LAYER } command;
static const uint32_t default_chunks[] = {[DIVERGENCE] = 8, [RETRIEVAL] = 2, [PER_LAYER] = 1};

typedef struct program {
    options o;
    command command;
    const char *text;
    const char *kv[MAX_KV];
    uint32_t n_kv;
    uint32_t ctx, chunks; /* 0: the command's */
    bool whole, json, help;
    layers_desc layers;
    runtime rt, int8; /* int8: the model with int8 activations, where a row wants it */
    passage passage;
    variant variants[MAX_VARIANTS];
    uint32_t n_variants;
} program;

/* ---- the command line ---- */

static bool take_command(program *p, const args *a, command c, char *err, size_t n) {
    if (p->command != DIVERGENCE && p->command != c)
        return llm_fail(err, n, "--retrieval and --per-layer exclude each other");
    p->command = c;
    return args_flag((args *)a, err, n);
}

static bool take_number(args *a, uint32_t max, uint32_t *out, char *err, size_t n) {
    uint64_t v;
    if (!args_u64(a, 1, max, &v, err, n)) return false;
    *out = (uint32_t)v;
    return true;
}

static bool take_kv(program *p, args *a, char *err, size_t n) {
    if (p->n_kv == MAX_KV) return llm_fail(err, n, "--kv: at most %d", MAX_KV);
    return args_value(a, &p->kv[p->n_kv++], err, n);
}

static bool take(program *p, args *a, char *err, size_t n) {
    bool taken;
    float bits;
    if (args_is(a, "-f") || args_is(a, "--file")) return args_value(a, &p->text, err, n);
    if (args_is(a, "--kv")) return take_kv(p, a, err, n);
    if (args_is(a, "--ctx")) return take_number(a, 1u << 24, &p->ctx, err, n);
    if (args_is(a, "--chunks")) return take_number(a, 1u << 20, &p->chunks, err, n);
    if (args_is(a, "--whole")) return p->whole = true, args_flag(a, err, n);
    if (args_is(a, "--json")) return p->json = true, args_flag(a, err, n);
    if (args_is(a, "-h") || args_is(a, "--help")) return p->help = true;
    if (args_is(a, "--retrieval")) return take_command(p, a, RETRIEVAL, err, n);
    if (args_is(a, "--per-layer")) return take_command(p, a, PER_LAYER, err, n);
    if (args_is(a, "--out")) return args_value(a, &p->layers.out, err, n);
    if (args_is(a, "--bits")) {
        bool ok = args_float(a, 1, 32, &bits, err, n);
        p->layers.bits = ok ? (double)bits : 0;
        return ok;
    }
    if (!args_is(a, "-m") && !args_is(a, "--model") && !args_is(a, "--act") && !args_is(a, "--threads"))
        return llm_fail(err, n, "option '%s' is unknown", a->name);
    return options_take(&p->o, a, &taken, err, n);
}

static bool parse(program *p, int argc, char **argv, char *err, size_t n) {
    args a = {.argc = argc, .argv = argv, .i = 1};
    p->o.runtime.act = WEIGHTS_F32;
    while (!p->help && args_next(&a, err, n))
        if (!take(p, &a, err, n)) return false;
    if (p->help) return true;
    if (err[0] || !options_check(&p->o, err, n)) return false;
    if (!p->text) return llm_fail(err, n, "-f TEXT is missing");
    if (p->command != PER_LAYER && (p->layers.bits > 0 || p->layers.out))
        return llm_fail(err, n, "--bits and --out go with --per-layer");
    if (p->layers.out && !(p->layers.bits > 0)) return llm_fail(err, n, "--out needs --bits");
    if (p->command == PER_LAYER && p->n_kv) return llm_fail(err, n, "--per-layer takes no --kv");
    if (p->ctx % 2 || p->ctx == 2) return llm_fail(err, n, "--ctx %u: must be even, 4 or more", p->ctx);
    if (!p->ctx) p->ctx = p->command == RETRIEVAL ? 2048 : 1024;
    return true;
}

/* ---- the text ---- */

static bool read_text(const char *path, char **data, size_t *size, char *err, size_t n) {
    FILE *f = fopen(path, "rb");
    size_t cap = 0;
    if (!f) return llm_fail(err, n, "-f %.100s: %s", path, strerror(errno));
    while (!feof(f) && !ferror(f)) {
        char *grown = realloc(*data, cap += 1 << 20);
        if (!grown) break;
        *data = grown;
        *size += fread(*data + *size, 1, cap - *size, f);
    }
    bool ok = feof(f) && !ferror(f);
    if (!ok) llm_fail(err, n, "-f %.100s: %s", path, ferror(f) ? strerror(errno) : "no memory");
    fclose(f);
    return ok && (*size || llm_fail(err, n, "-f %.100s: the text is empty", path));
}

/* What is no text names its line: a NUL, or bytes that are no UTF-8. (A text may end inside a character.) */
static bool check_text(const char *path, const char *data, size_t size, char *err, size_t n) {
    uint32_t line = 1, cp;
    for (size_t i = 0; i < size;) {
        size_t len = utf8_decode(data + i, size - i, &cp);
        if (!cp) return llm_fail(err, n, "-f %.100s:%u: a NUL byte: this is no text", path, line);
        if (cp == UTF8_INVALID)
            return llm_fail(err, n, "-f %.100s:%u: byte 0x%02x is no UTF-8", path, line, (uint8_t)data[i]);
        line += data[i] == '\n';
        i += len;
    }
    return true;
}

/* A model that wants a BOS gets one even before an empty text. */
static bool find_bos(program *p, char *err, size_t n) {
    token_list l = {0};
    bool ok = tokenizer_encode(p->rt.tok, "", 0, TOKENIZE_BOS, &l, err, n);
    p->passage.bos = ok && l.n ? l.ids[0] : -1;
    token_list_free(&l);
    return ok;
}

static bool make_passage(program *p, char *err, size_t n) {
    passage *text = &p->passage;
    char *data = NULL;
    size_t size = 0;
    if (p->ctx > p->rt.config->n_ctx)
        return llm_fail(err, n, "--ctx %u: the model's context is %u", p->ctx, p->rt.config->n_ctx);
    bool ok = read_text(p->text, &data, &size, err, n) && check_text(p->text, data, size, err, n) &&
              find_bos(p, err, n) &&
              tokenizer_encode(p->rt.tok, data, size, TOKENIZE_BOS, &text->ids, err, n);
    free(data);
    if (!ok) return false;
    text->ctx = p->ctx;
    text->n_chunks = (uint32_t)(text->ids.n / p->ctx);
    if (!text->n_chunks)
        return llm_fail(err, n, "-f %.100s: %zu tokens are less than a chunk of %u", p->text, text->ids.n,
                        p->ctx);
    const uint32_t asked = p->chunks ? p->chunks : default_chunks[p->command];
    if (p->chunks > text->n_chunks)
        fprintf(stderr, "quality: --chunks %u: lowered to the %u that the text has\n", asked, text->n_chunks);
    if (text->n_chunks > asked) text->n_chunks = asked;
    return true;
}

/* ---- what is compared ---- */

static bool same_cache(const variant *a, const variant *b) {
    return a->rt == b->rt && a->cache.preset == b->cache.preset && a->cache.k_format == b->cache.k_format &&
           a->cache.v_format == b->cache.v_format && !a->cache.kv_file && !b->cache.kv_file;
}

static variant *add_variant(program *p, const char *name, const char *suffix) {
    variant *v = &p->variants[p->n_variants++];
    snprintf(v->name, sizeof v->name, "%.40s%s", name, suffix);
    v->rt = &p->rt;
    return v;
}

/* Formats in place of a preset's, and an earlier variant with the same ones. */
static void set_formats(program *p, variant *v, kvl_format k, kvl_format val) {
    v->cache.preset = "f16";
    v->cache.k_format = k;
    v->cache.v_format = val;
    for (uint32_t i = 1; p->variants + i < v && !v->same_as; i++)
        if (same_cache(&p->variants[i], v)) v->same_as = i;
}

static bool add_kv(program *p, const char *name, char *err, size_t n) {
    const char *slash = strchr(name, '/');
    char k[32] = "";
    if (slash) snprintf(k, sizeof k, "%.*s", (int)(slash - name < 31 ? slash - name : 31), name);
    kvl_format key = slash ? kvl_format_from_name(k) : 0, value = slash ? kvl_format_from_name(slash + 1) : 0;
    variant *v = add_variant(p, name, "");
    if (key && value)
        set_formats(p, v, key, value);
    else if (!options_kv(&v->cache, "--kv", name, err, n))
        return false;
    return true;
}

/* Keys in a preset's format with values in F16, and the other way round. */
static void add_apart(program *p, const char *name) {
    const kvl_preset *preset = kvl_preset_find(name);
    if (!preset || (preset->k == preset->exact && preset->v == preset->exact)) return;
    set_formats(p, add_variant(p, name, " keys only"), preset->k, KVL_F16);
    set_formats(p, add_variant(p, name, " values only"), KVL_F16, preset->v);
}

static bool add_variants(program *p, char *err, size_t n) {
    uint32_t n_presets;
    const kvl_preset *all = kvl_presets(&n_presets);
    const bool everything = p->n_kv == 0;
    for (uint32_t i = 0; everything && i < n_presets; i++) p->kv[p->n_kv++] = all[i].name;
    add_variant(p, "f32", "")->cache.preset = "f32";
    for (uint32_t i = 0; i < p->n_kv; i++)
        if (strcmp(p->kv[i], "f32") != 0 && !add_kv(p, p->kv[i], err, n)) return false;
    if (p->whole || p->command == RETRIEVAL) return true;
    for (uint32_t i = 0; i < p->n_kv; i++) add_apart(p, p->kv[i]);
    if (!everything || p->o.runtime.act == WEIGHTS_INT8) return true;
    runtime_desc int8 = p->o.runtime;
    int8.act = WEIGHTS_INT8;
    if (!runtime_load(&p->int8, &int8, err, n)) return false;
    variant *v = add_variant(p, "f32", " with int8 activations");
    v->cache.preset = "f32";
    v->rt = &p->int8;
    return true;
}

/* ---- output ---- */

static double dppl_percent(const program *p, const variant *v) {
    return 100 * (perplexity(v) / perplexity(&p->variants[0]) - 1);
}

static bool print_json(cJSON *rows, char *err, size_t n) {
    char *text = cJSON_Print(rows);
    cJSON_Delete(rows);
    if (!text) return llm_fail(err, n, "no memory for the output");
    puts(text);
    cJSON_free(text);
    return true;
}

/* Rows that say where they are from. */
static cJSON *add_row(const program *p, cJSON *rows, const variant *v) {
    cJSON *row = cJSON_CreateObject();
    const char *slash = strrchr(p->text, '/');
    cJSON_AddItemToArray(rows, row);
    cJSON_AddStringToObject(row, "kv", v->name);
    cJSON_AddStringToObject(row, "text", slash ? slash + 1 : p->text);
    cJSON_AddStringToObject(row, "act",
                            v->rt == &p->int8 || p->o.runtime.act == WEIGHTS_INT8 ? "int8" : "f32");
    cJSON_AddNumberToObject(row, "ctx", p->ctx);
    return row;
}

static bool divergence_json(const program *p, char *err, size_t n) {
    cJSON *rows = cJSON_CreateArray();
    for (uint32_t i = 0; i < p->n_variants; i++) {
        const variant *v = &p->variants[i];
        cJSON *row = add_row(p, rows, v);
        cJSON_AddNumberToObject(row, "chunks", p->passage.n_chunks);
        cJSON_AddNumberToObject(row, "predictions", v->n);
        cJSON_AddNumberToObject(row, "ppl", perplexity(v));
        cJSON_AddNumberToObject(row, "dppl_percent", dppl_percent(p, v));
        cJSON_AddNumberToObject(row, "kld_mean", v->kld_mean);
        cJSON_AddNumberToObject(row, "kld_p99", kld_quantile(v, 0.99));
        cJSON_AddNumberToObject(row, "kld_p999", kld_quantile(v, 0.999));
        cJSON_AddNumberToObject(row, "top1_percent", 100 * v->top1);
        cJSON_AddNumberToObject(row, "bits", v->bits);
        cJSON_AddNumberToObject(row, "k_bits", v->k_bits);
        cJSON_AddNumberToObject(row, "v_bits", v->v_bits);
    }
    return print_json(rows, err, n);
}

static const variant *find_variant(const program *p, const char *name) {
    for (uint32_t i = 0; i < p->n_variants; i++)
        if (strcmp(p->variants[i].name, name) == 0) return &p->variants[i];
    return NULL;
}

static bool divergence_table(const program *p) {
    printf("%u predictions: the second half of %u chunks of %u tokens, %s activations\n\n", p->variants[0].n,
           p->passage.n_chunks, p->ctx, p->o.runtime.act == WEIGHTS_INT8 ? "int8" : "float");
    printf("%-26s %8s %8s %10s %9s %9s %7s %6s %6s %6s\n", "", "ppl", "dPPL %", "KLD mean", "p99", "p99.9",
           "top-1 %", "bits", "keys", "values");
    for (uint32_t i = 0; i < p->n_variants; i++) {
        const variant *v = &p->variants[i];
        printf("%-26s %8.4f %+8.3f %10.7f %9.5f %9.5f %7.2f %6.2f %6.2f %6.2f\n", v->name, perplexity(v),
               dppl_percent(p, v), v->kld_mean, kld_quantile(v, 0.99), kld_quantile(v, 0.999), 100 * v->top1,
               v->bits, v->k_bits, v->v_bits);
    }
    const variant *f16 = find_variant(p, "f16"), *int8 = find_variant(p, "f32 with int8 activations");
    if (f16) printf("\nnoise floor: an F16 cache alone has a KLD of %.2g", f16->kld_mean);
    if (f16 && int8) printf("; int8 activations with an F32 cache, of %.2g", int8->kld_mean);
    if (f16) putchar('\n');
    return true;
}

static bool run_divergence(program *p, char *err, size_t n) {
    return add_variants(p, err, n) && score_passage(&p->passage, p->variants, p->n_variants, true, err, n) &&
           (p->json ? divergence_json(p, err, n) : divergence_table(p));
}

static double percent(uint32_t part, uint32_t whole) { return 100.0 * part / whole; }

static bool run_retrieval(program *p, char *err, size_t n) {
    recall r[MAX_VARIANTS];
    if (!add_variants(p, err, n)) return false;
    if (!score_recall(&p->passage, p->variants, p->n_variants, r, err, n)) return false;
    if (!p->json) {
        printf("facts asked for at the end of contexts of %u tokens\n\n%-16s %8s %8s %14s\n", p->ctx, "",
               "asked", "right %", "same as f32 %");
        for (uint32_t i = 0; i < p->n_variants; i++)
            printf("%-16s %8u %8.1f %14.1f\n", p->variants[i].name, r[i].asked,
                   percent(r[i].right, r[i].asked), percent(r[i].same, r[i].asked));
        return true;
    }
    cJSON *rows = cJSON_CreateArray();
    for (uint32_t i = 0; i < p->n_variants; i++) {
        cJSON *row = add_row(p, rows, &p->variants[i]);
        cJSON_AddNumberToObject(row, "asked", r[i].asked);
        cJSON_AddNumberToObject(row, "recall_percent", percent(r[i].right, r[i].asked));
        cJSON_AddNumberToObject(row, "same_percent", percent(r[i].same, r[i].asked));
    }
    return print_json(rows, err, n);
}

static bool run(program *p, char *err, size_t n) {
    p->o.runtime.step_tokens = SCORED_ROWS;
    if (!runtime_load(&p->rt, &p->o.runtime, err, n) || !make_passage(p, err, n)) return false;
    bool ok;
    switch (p->command) {
    case RETRIEVAL: ok = run_retrieval(p, err, n); break;
    case PER_LAYER:
        p->layers.json = p->json;
        ok = study_layers(&p->rt, &p->passage, &p->layers, err, n);
        break;
    default: ok = run_divergence(p, err, n); break;
    }
    if (!ok) return false;
    return (fflush(stdout) == 0 && !ferror(stdout)) || llm_fail(err, n, "stdout: %s", strerror(errno));
}

int main(int argc, char **argv) {
    static program p;
    char err[LLM_ERR_LEN] = "";
    if (!parse(&p, argc, argv, err, sizeof err)) {
        fprintf(stderr, "quality: %s (quality --help tells more)\n", err);
        return EXIT_USAGE;
    }
    if (p.help) {
        fputs(usage, stdout);
        return 0;
    }
    bool ok = run(&p, err, sizeof err);
    if (!ok) fprintf(stderr, "quality: %s\n", err);
    free_scores(p.variants, p.n_variants);
    token_list_free(&p.passage.ids);
    runtime_free(&p.int8);
    runtime_free(&p.rt);
    return ok ? 0 : EXIT_RUNTIME;
}
