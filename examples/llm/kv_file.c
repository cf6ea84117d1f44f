/* kv_file.c - see kv_file.h. */
#include "kv_file.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { LINE_LEN = 256, MAX_WORDS = 8 };

/* Where the reader is. */
typedef struct reader {
    const char *path;
    uint32_t line, n_layers;
    bool has_preset, has_sinks, has_block;
    kv_file *out;
    char *err;
    size_t err_len;
} reader;

/* Prefixes "FILE:LINE: ". */
__attribute__((format(printf, 2, 3))) static bool refuse(const reader *r, const char *fmt, ...) {
    char why[LLM_ERR_LEN];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(why, sizeof why, fmt, ap);
    va_end(ap);
    return llm_fail(r->err, r->err_len, "%.100s:%u: %s", r->path, r->line, why);
}

static bool number(const reader *r, const char *word, uint32_t max, uint32_t *out) {
    char *end;
    errno = 0;
    unsigned long v = word[0] >= '0' && word[0] <= '9' ? strtoul(word, &end, 10) : (end = (char *)word, 0);
    if (end == word || *end || errno || v > max)
        return refuse(r, "'%.40s' is not a whole number up to %u", word, max);
    *out = (uint32_t)v;
    return true;
}

static bool once(const reader *r, const char *word, bool *seen) {
    if (*seen) return refuse(r, "%s stands twice", word);
    return *seen = true;
}

static bool per_channel(kvl_format f) { return f == KVL_INT8_CHANNEL || f == KVL_INT4_CHANNEL; }

/* "k=FORMAT" or "v=FORMAT" of a layer. */
static bool take_side(const reader *r, const char *word, kvl_layer *layer) {
    if ((word[0] != 'k' && word[0] != 'v') || word[1] != '=')
        return refuse(r, "'%.40s': expected k=FORMAT or v=FORMAT", word);
    kvl_format *side = word[0] == 'k' ? &layer->k_format : &layer->v_format;
    kvl_format f = kvl_format_from_name(word + 2);
    if (!f) return refuse(r, "'%.40s' is no format", word + 2);
    if (word[0] == 'v' && per_channel(f)) return refuse(r, "%s is for keys only", word + 2);
    if (*side) return refuse(r, "%c= stands twice", word[0]);
    *side = f;
    return true;
}

static bool take_layer(const reader *r, char **words, uint32_t n) {
    uint32_t index = 0;
    if (n < 3) return refuse(r, "expected: layer N k=FORMAT v=FORMAT");
    if (!number(r, words[1], UINT32_MAX, &index)) return false;
    if (index >= r->n_layers) return refuse(r, "layer %u: the model has %u layers", index, r->n_layers);
    kvl_layer *layer = &r->out->layers[index];
    if (layer->k_format || layer->v_format) return refuse(r, "layer %u stands twice", index);
    for (uint32_t i = 2; i < n; i++)
        if (!take_side(r, words[i], layer)) return false;
    return true;
}

static bool take_preset(reader *r, const char *name) {
    const kvl_preset *preset = kvl_preset_find(name);
    if (!preset) return refuse(r, "'%.40s' is no preset", name);
    r->out->preset = preset->name;
    return once(r, "preset", &r->has_preset);
}

static bool take_sinks(reader *r, const char *word) {
    uint32_t v = 0;
    if (!number(r, word, 1u << 20, &v)) return false;
    r->out->sink_blocks = v ? v : KVL_NONE;
    return once(r, "sink_blocks", &r->has_sinks);
}

static bool take_block_tokens(reader *r, const char *word) {
    uint32_t v = 0;
    if (!number(r, word, 64, &v)) return false;
    if (v != 8 && v != 16 && v != 32 && v != 64)
        return refuse(r, "block_tokens %u: must be 8, 16, 32 or 64", v);
    r->out->block_tokens = v;
    return once(r, "block_tokens", &r->has_block);
}

static bool take_line(reader *r, char *line) {
    char *words[MAX_WORDS], *rest = line;
    uint32_t n = 0;
    line[strcspn(line, "#")] = 0;
    for (char *word; (word = strtok_r(rest, " \t\r\n", &rest));) {
        if (n == MAX_WORDS) return refuse(r, "more than %d words", MAX_WORDS);
        words[n++] = word;
    }
    if (!n) return true;
    if (strcmp(words[0], "layer") == 0) return take_layer(r, words, n);
    if (n == 2 && strcmp(words[0], "preset") == 0) return take_preset(r, words[1]);
    if (n == 2 && strcmp(words[0], "sink_blocks") == 0) return take_sinks(r, words[1]);
    if (n == 2 && strcmp(words[0], "block_tokens") == 0) return take_block_tokens(r, words[1]);
    return refuse(r,
                  "'%.40s': expected preset NAME, sink_blocks N, block_tokens N or layer N k=FORMAT v=FORMAT",
                  words[0]);
}

static bool take_lines(reader *r, FILE *f) {
    char line[LINE_LEN + 2];
    while (memset(line, 0, sizeof line), fgets(line, sizeof line, f)) {
        size_t len = strlen(line);
        r->line++;
        if (len > LINE_LEN) return refuse(r, "the line is longer than %d bytes", LINE_LEN);
        if (len && line[len - 1] != '\n' && !feof(f)) return refuse(r, "there is a zero byte in the line");
        if (!take_line(r, line)) return false;
    }
    return !ferror(f) || llm_fail(r->err, r->err_len, "%.100s: %s", r->path, strerror(errno));
}

bool kv_file_read(const char *path, uint32_t n_layers, kv_file *out, char *err, size_t err_len) {
    *out = (kv_file){0};
    FILE *f = fopen(path, "rb");
    if (!f) return llm_fail(err, err_len, "%.100s: %s", path, strerror(errno));
    reader r = {.path = path, .n_layers = n_layers, .out = out, .err = err, .err_len = err_len};
    out->layers = calloc(n_layers, sizeof *out->layers);
    bool ok = out->layers ? take_lines(&r, f) : llm_fail(err, err_len, "no memory for %u layers", n_layers);
    fclose(f);
    if (!ok) kv_file_free(out);
    return ok;
}

void kv_file_free(kv_file *f) {
    free(f->layers);
    *f = (kv_file){0};
}

bool kv_file_write(const char *path, const kv_file *f, uint32_t n_layers, const char *comment, char *err,
                   size_t err_len) {
    FILE *out = fopen(path, "wb");
    if (!out) return llm_fail(err, err_len, "%.100s: %s", path, strerror(errno));
    if (comment) fprintf(out, "# %s\n", comment);
    if (f->preset) fprintf(out, "preset %s\n", f->preset);
    if (f->sink_blocks) fprintf(out, "sink_blocks %u\n", f->sink_blocks == KVL_NONE ? 0 : f->sink_blocks);
    if (f->block_tokens) fprintf(out, "block_tokens %u\n", f->block_tokens);
    for (uint32_t l = 0; l < n_layers; l++) {
        const kvl_layer *layer = &f->layers[l];
        if (!layer->k_format && !layer->v_format) continue;
        fprintf(out, "layer %u", l);
        if (layer->k_format) fprintf(out, " k=%s", kvl_format_name(layer->k_format));
        if (layer->v_format) fprintf(out, " v=%s", kvl_format_name(layer->v_format));
        fputc('\n', out);
    }
    bool ok = !ferror(out);
    ok = fclose(out) == 0 && ok;
    return ok || llm_fail(err, err_len, "%.100s: %s", path, strerror(errno));
}
