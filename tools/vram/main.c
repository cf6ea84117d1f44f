/* vram: the memory that a conversation's KV takes, for common models in each format. See --help. */
#define KVL_IMPLEMENTATION
#include "kvlite.h"

#include "llm/options.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_LIST = 16, MAX_LAYERS = 128, MAX_TOKENS = 1 << 24 };

static const char usage[] =
    "usage: vram [options]\n"
    "\n"
    "Device memory that the KV of one conversation takes, for common models, in each format: the blocks that "
    "kvlite takes\n"
    "in a cache of that geometry. Blocks behind a sliding window, which no row sees any more, are free "
    "again. Nothing is\n"
    "run, and no device is needed.\n"
    "\n"
    "  --model WORD     models with WORD in their names alone, in any case\n"
    "  --tokens LIST    lengths, such as 4096,131072 (default 8192,32768,131072; a model's longest at most)\n"
    "  --kv LIST        presets (default: f16,int8+,int8,fp8,balanced,int4,nvfp4)\n"
    "  --models         list the models' geometries and where they stand, and end\n"
    "  --readme FILE    rewrite the table between the markers <!-- vram --> and <!-- /vram --> in FILE\n";

/* What a model's config.json says (num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim,
 * max_position_embeddings, sliding_window) in the repository of that name on huggingface.co. */
typedef struct model_row {
    const char *name, *source;
    uint32_t n_layers, n_q_heads, n_kv_heads, dim, n_ctx;
    uint32_t window, full_each; /* window of all layers but each full_each-th; 0: none */
} model_row;

static const model_row models[] = {
    {"SmolLM2 135M", "HuggingFaceTB/SmolLM2-135M-Instruct", 30, 9, 3, 64, 8192, 0, 0},
    {"SmolLM2 1.7B", "HuggingFaceTB/SmolLM2-1.7B-Instruct", 24, 32, 32, 64, 8192, 0, 0},
    {"Llama 3.2 1B", "meta-llama/Llama-3.2-1B-Instruct", 16, 32, 8, 64, 131072, 0, 0},
    {"Llama 3.2 3B", "meta-llama/Llama-3.2-3B-Instruct", 28, 24, 8, 128, 131072, 0, 0},
    {"Llama 3.1 8B", "meta-llama/Llama-3.1-8B-Instruct", 32, 32, 8, 128, 131072, 0, 0},
    {"Llama 3.3 70B", "meta-llama/Llama-3.3-70B-Instruct", 80, 64, 8, 128, 131072, 0, 0},
    {"Qwen2.5 0.5B", "Qwen/Qwen2.5-0.5B-Instruct", 24, 14, 2, 64, 32768, 0, 0},
    {"Qwen2.5 1.5B", "Qwen/Qwen2.5-1.5B-Instruct", 28, 12, 2, 128, 32768, 0, 0},
    {"Qwen2.5 3B", "Qwen/Qwen2.5-3B-Instruct", 36, 16, 2, 128, 32768, 0, 0},
    {"Qwen2.5 7B", "Qwen/Qwen2.5-7B-Instruct", 28, 28, 4, 128, 32768, 0, 0},
    {"Qwen2.5 14B", "Qwen/Qwen2.5-14B-Instruct", 48, 40, 8, 128, 32768, 0, 0},
    {"Qwen2.5 32B", "Qwen/Qwen2.5-32B-Instruct", 64, 40, 8, 128, 32768, 0, 0},
    {"Qwen3 0.6B, 1.7B", "Qwen/Qwen3-0.6B", 28, 16, 8, 128, 40960, 0, 0},
    {"Qwen3 4B, 8B", "Qwen/Qwen3-8B", 36, 32, 8, 128, 40960, 0, 0},
    {"Qwen3 14B", "Qwen/Qwen3-14B", 40, 40, 8, 128, 40960, 0, 0},
    {"Qwen3 32B", "Qwen/Qwen3-32B", 64, 64, 8, 128, 40960, 0, 0},
    {"Qwen3 30B-A3B", "Qwen/Qwen3-30B-A3B", 48, 32, 4, 128, 40960, 0, 0},
    {"Mistral 7B v0.3", "mistralai/Mistral-7B-Instruct-v0.3", 32, 32, 8, 128, 32768, 0, 0},
    {"Mistral Small 24B", "mistralai/Mistral-Small-24B-Instruct-2501", 40, 32, 8, 128, 32768, 0, 0},
    {"Gemma 3 1B", "google/gemma-3-1b-it", 26, 4, 1, 256, 32768, 512, 6},
    {"Gemma 3 4B", "google/gemma-3-4b-it", 34, 8, 4, 256, 131072, 1024, 6},
    {"Gemma 3 12B", "google/gemma-3-12b-it", 48, 16, 8, 256, 131072, 1024, 6},
    {"Gemma 3 27B", "google/gemma-3-27b-it", 62, 32, 16, 128, 131072, 1024, 6},
    {"Phi-3 mini 128k", "microsoft/Phi-3-mini-128k-instruct", 32, 32, 32, 96, 131072, 0, 0},
    {"Phi-4 mini", "microsoft/Phi-4-mini-instruct", 32, 24, 8, 128, 131072, 0, 0},
    {"Phi-4 14B", "microsoft/phi-4", 40, 40, 10, 128, 16384, 0, 0},
};
enum { N_MODELS = sizeof models / sizeof *models };

typedef struct names {
    const char *at[MAX_LIST];
    uint32_t n;
} names;

typedef struct numbers {
    uint32_t at[MAX_LIST], n;
} numbers;

typedef struct command {
    names presets;
    numbers tokens;
    const char *model, *readme;
    bool list, help;
} command;

/* ---- what kvlite says ---- */

/* Bytes of the most blocks that a conversation holds at once while it grows to n_tokens. */
static double conversation_bytes(const model_row *m, const char *preset, uint32_t n_tokens) {
    kvl_layer layers[MAX_LAYERS] = {{0}};
    char error[LLM_ERR_LEN] = "";
    kvl_cache *cache;
    for (uint32_t l = 0; l < m->n_layers; l++)
        if (m->window && (l + 1) % m->full_each) layers[l].window = m->window;
    kvl_cache_desc d = {.context_desc = {.backend = KVL_BACKEND_NULL},
                        .geometry = {.n_layers = m->n_layers,
                                     .n_q_heads = m->n_q_heads,
                                     .n_kv_heads = m->n_kv_heads,
                                     .k_dim = m->dim,
                                     .preset = preset,
                                     .layers = layers},
                        .device_bytes = 1u << 30, /* the null backend takes none */
                        .error = error,
                        .error_size = sizeof error};
    if (kvl_cache_create(&d, &cache) != KVL_OK) {
        fprintf(stderr, "vram: %s, %s: %s\n", m->name, preset, error);
        exit(1);
    }
    uint32_t need[KVLI_MAX_CLASSES];
    double bytes = 0;
    kvli_need(cache, n_tokens, cache->geo.block_tokens, need);
    for (uint32_t k = 0; k < 2 * cache->geo.n_groups; k++)
        bytes += (double)need[k] * (double)cache->classes[k].bytes;
    kvl_cache_destroy(cache);
    return bytes;
}

/* ---- the table ---- */

static void print_bytes(FILE *f, double bytes) {
    if (bytes < 1024.0 * (1 << 20))
        fprintf(f, bytes < 99.5 * (1 << 20) ? "%.1f MiB" : "%.0f MiB", bytes / (1 << 20));
    else
        fprintf(f, "%.2f GiB", bytes / (1 << 30));
}

static bool has_word(const char *text, const char *word) {
    size_t n = strlen(word);
    for (; *text; text++) {
        size_t i = 0;
        while (i < n && (text[i] | 0x20) == (word[i] | 0x20)) i++;
        if (i == n) return true;
    }
    return n == 0;
}

static void print_tokens(FILE *f, uint32_t n) {
    if (n >= 1024 && n % 1024 == 0)
        fprintf(f, "%uk", n / 1024);
    else
        fprintf(f, "%u", n);
}

static void print_model(FILE *f, const command *c, const model_row *m) {
    const char *name = m->name;
    for (uint32_t t = 0; t < c->tokens.n; t++) {
        if (c->tokens.at[t] > m->n_ctx) continue;
        fprintf(f, "| %s | ", name);
        name = ""; /* once a model */
        print_tokens(f, c->tokens.at[t]);
        fputs(" |", f);
        for (uint32_t p = 0; p < c->presets.n; p++) {
            fputc(' ', f);
            print_bytes(f, conversation_bytes(m, c->presets.at[p], c->tokens.at[t]));
            fputs(" |", f);
        }
        fputc('\n', f);
    }
}

static void print_table(FILE *f, const command *c) {
    fputs("| model | tokens |", f);
    for (uint32_t p = 0; p < c->presets.n; p++) fprintf(f, " %s |", c->presets.at[p]);
    fputs("\n|---|---|", f);
    for (uint32_t p = 0; p < c->presets.n; p++) fputs("---|", f);
    fputc('\n', f);
    for (uint32_t i = 0; i < N_MODELS; i++)
        if (!c->model || has_word(models[i].name, c->model)) print_model(f, c, &models[i]);
}

/* The geometries, for who wants to check them. */
static void print_models(FILE *f) {
    for (uint32_t i = 0; i < N_MODELS; i++) {
        const model_row *m = &models[i];
        fprintf(f, "%s: %u layers, %u heads, %u KV heads, dim %u, %u tokens", m->name, m->n_layers,
                m->n_q_heads, m->n_kv_heads, m->dim, m->n_ctx);
        if (m->window) fprintf(f, ", window %u but for each %uth layer", m->window, m->full_each);
        fprintf(f, "; huggingface.co/%s\n", m->source);
    }
}

/* ---- between the markers of a file ---- */

static char *read_all(const char *path, char *err, size_t n) {
    FILE *f = fopen(path, "rb");
    long size = -1;
    char *text = NULL;
    if (f && fseek(f, 0, SEEK_END) == 0) size = ftell(f);
    if (size >= 0 && fseek(f, 0, SEEK_SET) == 0) text = malloc((size_t)size + 1);
    if (text && fread(text, 1, (size_t)size, f) == (size_t)size)
        text[size] = 0;
    else
        free(text), text = NULL;
    if (f) fclose(f);
    if (!text) llm_fail(err, n, "--readme %.200s: could not be read", path);
    return text;
}

static bool rewrite(const command *c, char *err, size_t n) {
    static const char begin[] = "<!-- vram -->\n", end[] = "<!-- /vram -->\n";
    char *text = read_all(c->readme, err, n);
    if (!text) return false;
    char *from = strstr(text, begin), *to = from ? strstr(from, end) : NULL;
    FILE *f = to ? fopen(c->readme, "wb") : NULL;
    bool ok = f != NULL;
    if (!to)
        llm_fail(err, n, "--readme %.200s: there is no %.13s with %.14s after it", c->readme, begin, end);
    else if (!f)
        llm_fail(err, n, "--readme %.200s: could not be written", c->readme);
    if (ok) {
        fwrite(text, 1, (size_t)(from - text) + strlen(begin), f);
        print_table(f, c);
        fputs(to, f);
        ok = fclose(f) == 0 || llm_fail(err, n, "--readme %.200s: could not be written", c->readme);
    }
    free(text);
    return ok;
}

/* ---- the command line ---- */

static bool take_tokens(args *a, numbers *out, char *err, size_t n) {
    const char *text;
    if (!args_value(a, &text, err, n)) return false;
    for (out->n = 0; out->n < MAX_LIST; text++) {
        char *end;
        unsigned long v = *text >= '1' && *text <= '9' ? strtoul(text, &end, 10) : 0;
        if (!v || v > MAX_TOKENS || (*end && *end != ',')) break;
        out->at[out->n++] = (uint32_t)v;
        if (!*end) return true;
        text = end;
    }
    return llm_fail(err, n, "%s: must be at most %d whole numbers from 1 to %d with commas between them",
                    a->name, MAX_LIST, MAX_TOKENS);
}

static bool take_presets(args *a, names *out, char *err, size_t n) {
    const char *text;
    if (!args_value(a, &text, err, n)) return false;
    for (out->n = 0; out->n < MAX_LIST;) {
        char name[32];
        size_t length = strcspn(text, ",");
        snprintf(name, sizeof name, "%.*s", (int)length, text);
        const kvl_preset *p = kvl_preset_find(name);
        if (!p) return llm_fail(err, n, "%s: there is no preset '%s'", a->name, name);
        out->at[out->n++] = p->name;
        if (!text[length]) return true;
        text += length + 1;
    }
    return llm_fail(err, n, "%s: at most %d presets", a->name, MAX_LIST);
}

static bool parse(command *c, int argc, char **argv, char *err, size_t n) {
    args a = {.argc = argc, .argv = argv, .i = 1};
    while (args_next(&a, err, n)) {
        bool ok = true;
        if (args_is(&a, "--model"))
            ok = args_value(&a, &c->model, err, n);
        else if (args_is(&a, "--tokens"))
            ok = take_tokens(&a, &c->tokens, err, n);
        else if (args_is(&a, "--kv"))
            ok = take_presets(&a, &c->presets, err, n);
        else if (args_is(&a, "--readme"))
            ok = args_value(&a, &c->readme, err, n);
        else if (args_is(&a, "--models"))
            c->list = true;
        else if (args_is(&a, "-h") || args_is(&a, "--help"))
            c->help = true;
        else
            ok = llm_fail(err, n, "option '%s' is unknown", a.name);
        if (!ok) return false;
    }
    return !err[0];
}

int main(int argc, char **argv) {
    char err[LLM_ERR_LEN] = "";
    command c = {.tokens = {.at = {8192, 32768, 131072}, .n = 3},
                 .presets = {.at = {"f16", "int8+", "int8", "fp8", "balanced", "int4", "nvfp4"}, .n = 7}};
    if (!parse(&c, argc, argv, err, sizeof err)) {
        fprintf(stderr, "vram: %s (--help)\n", err);
        return 2;
    }
    if (c.help) {
        fputs(usage, stdout);
    } else if (c.list) {
        print_models(stdout);
    } else if (!c.readme) {
        print_table(stdout, &c);
    } else if (!rewrite(&c, err, sizeof err)) {
        fprintf(stderr, "vram: %s\n", err);
        return 1;
    }
    return 0;
}
