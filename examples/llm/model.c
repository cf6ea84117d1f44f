/* model.c - see model.h. */
#include "model.h"
#include "error.h"
#include "ops.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Rows go through a layer's products in slices of this many, whose intermediate results stay in the L2
 * cache. */
#define SLICE_ROWS 128

typedef struct layer {
    float *attn_norm, *ffn_norm; /* [width] */
    matrix q, k, v, o, gate, up, down;
} layer;

struct model {
    model_config config;
    pool *threads;
    uint32_t max_rows;
    layer *layers;
    float *out_norm;                    /* [width] */
    matrix out;                         /* n_vocab x width */
    const gguf_tensor_info *embeddings; /* n_vocab rows in the file */
    size_t embedding_bytes;             /* of a row */
    /* Activations of a whole forward, [max_rows][...]. */
    float *x;       /* width: the residual stream */
    float *q, *att; /* n_q_heads * head_dim */
    float *k, *v;   /* n_kv_heads * head_dim */
    float *angles;  /* rope_dims */
    /* Of a slice, [SLICE_ROWS][...]. */
    acts a;
    float *h;         /* width: normalised rows */
    float *gate, *up; /* ffn_width */
};

/* ---- loading ---- */

static bool read_config(const gguf_file *f, model_config *c, char *err, size_t n) {
    if (!gguf_get_u32(f, "llama.block_count", &c->n_layers, err, n)) return false;
    if (!gguf_get_u32(f, "llama.embedding_length", &c->width, err, n)) return false;
    if (!gguf_get_u32(f, "llama.attention.head_count", &c->n_q_heads, err, n)) return false;
    if (!gguf_get_u32(f, "llama.feed_forward_length", &c->ffn_width, err, n)) return false;
    if (!gguf_get_u32(f, "llama.context_length", &c->n_ctx, err, n)) return false;
    if (!gguf_get_f32(f, "llama.attention.layer_norm_rms_epsilon", &c->rms_eps, err, n)) return false;
    c->n_kv_heads = c->n_q_heads;
    if (gguf_has(f, "llama.attention.head_count_kv") &&
        !gguf_get_u32(f, "llama.attention.head_count_kv", &c->n_kv_heads, err, n)) {
        return false;
    }
    c->rope_base = 10000.0f;
    if (gguf_has(f, "llama.rope.freq_base") &&
        !gguf_get_f32(f, "llama.rope.freq_base", &c->rope_base, err, n)) {
        return false;
    }
    if (c->n_q_heads == 0 || c->width % c->n_q_heads != 0) {
        return llm_fail(err, n, "llama.attention.head_count %u does not divide llama.embedding_length %u",
                        c->n_q_heads, c->width);
    }
    c->head_dim = c->width / c->n_q_heads;
    c->rope_dims = c->head_dim;
    if (gguf_has(f, "llama.rope.dimension_count") &&
        !gguf_get_u32(f, "llama.rope.dimension_count", &c->rope_dims, err, n)) {
        return false;
    }
    return true;
}

static bool check_config(const model_config *c, char *err, size_t n) {
    if (c->n_layers == 0 || c->n_layers > 1024) {
        return llm_fail(err, n, "llama.block_count %u is not within 1 .. 1024", c->n_layers);
    }
    if (c->width == 0 || c->width % WEIGHTS_BLOCK != 0 || c->width > 1u << 17) {
        return llm_fail(err, n, "llama.embedding_length %u is not a multiple of %d up to 131072", c->width,
                        WEIGHTS_BLOCK);
    }
    if (c->ffn_width == 0 || c->ffn_width % WEIGHTS_BLOCK != 0 || c->ffn_width > 1u << 20) {
        return llm_fail(err, n, "llama.feed_forward_length %u is not a multiple of %d up to 1048576",
                        c->ffn_width, WEIGHTS_BLOCK);
    }
    if (c->n_kv_heads == 0 || c->n_q_heads % c->n_kv_heads != 0) {
        return llm_fail(err, n,
                        "llama.attention.head_count_kv %u does not divide llama.attention.head_count %u",
                        c->n_kv_heads, c->n_q_heads);
    }
    if (c->rope_dims == 0 || c->rope_dims % 2 != 0 || c->rope_dims > c->head_dim) {
        return llm_fail(err, n, "llama.rope.dimension_count %u is not even and within the head dimension %u",
                        c->rope_dims, c->head_dim);
    }
    if (!(c->rope_base > 0) || !(c->rms_eps >= 0)) {
        return llm_fail(err, n,
                        "llama.rope.freq_base or llama.attention.layer_norm_rms_epsilon is not positive");
    }
    return true;
}

/* A scaling type, or (in older files) a factor without a type, which meant linear. */
static bool refuse_rope_scaling(const gguf_file *f, char *err, size_t n) {
    static const char *const factors[] = {"llama.rope.scaling.factor", "llama.rope.scale_linear"};
    gguf_str scaling;
    if (gguf_has(f, "llama.rope.scaling.type")) {
        char text[64];
        if (!gguf_get_str(f, "llama.rope.scaling.type", &scaling, err, n)) return false;
        if (gguf_str_eq(scaling, "none")) return true;
        return llm_fail(err, n, "llama.rope.scaling.type '%s' is not supported",
                        gguf_printable(scaling, text, sizeof text));
    }
    for (int i = 0; i < 2; i++) {
        float factor;
        if (!gguf_has(f, factors[i])) continue;
        if (!gguf_get_f32(f, factors[i], &factor, err, n)) return false;
        if (factor != 0.0f && factor != 1.0f) {
            return llm_fail(err, n, "%s %g is not supported", factors[i], (double)factor);
        }
    }
    return true;
}

/* Keys that change the computation, with the one value at which they do not. */
static bool refuse_keys(const gguf_file *f, const model_config *c, char *err, size_t n) {
    const struct {
        const char *key;
        uint32_t allowed;
    } keys[] = {{"llama.attention.key_length", c->head_dim},
                {"llama.attention.value_length", c->head_dim},
                {"llama.expert_count", 0},
                {"llama.attention.sliding_window", 0}};
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        uint32_t v;
        if (!gguf_has(f, keys[i].key)) continue;
        if (!gguf_get_u32(f, keys[i].key, &v, err, n)) return false;
        if (v != keys[i].allowed) {
            return llm_fail(err, n, "%s %u is not supported (only %u)", keys[i].key, v, keys[i].allowed);
        }
    }
    return true;
}

static const char *const layer_tensors[] = {"attn_norm", "attn_q",   "attn_k", "attn_v",  "attn_output",
                                            "ffn_norm",  "ffn_gate", "ffn_up", "ffn_down"};

static bool tensor_is_known(const model_config *c, gguf_str name) {
    char want[64];
    if (gguf_str_eq(name, "token_embd.weight") || gguf_str_eq(name, "output.weight") ||
        gguf_str_eq(name, "output_norm.weight")) {
        return true;
    }
    if (name.len < 5 || memcmp(name.data, "blk.", 4) != 0) return false;
    uint32_t l = 0;
    for (size_t i = 4; i < name.len && i < 9 && name.data[i] >= '0' && name.data[i] <= '9'; i++) {
        l = l * 10 + (uint32_t)(name.data[i] - '0');
    }
    for (size_t i = 0; i < sizeof layer_tensors / sizeof layer_tensors[0] && l < c->n_layers; i++) {
        snprintf(want, sizeof want, "blk.%u.%s.weight", l, layer_tensors[i]);
        if (gguf_str_eq(name, want)) return true;
    }
    return false;
}

/* A tensor that the forward pass would leave out is something the model needs and this code does not have. */
static bool refuse_tensors(const gguf_file *f, const model_config *c, char *err, size_t n) {
    for (uint64_t i = 0; i < gguf_tensor_count(f); i++) {
        const gguf_tensor_info *t = gguf_tensor_at(f, i);
        char text[96];
        if (!tensor_is_known(c, t->name)) {
            return llm_fail(err, n, "tensor '%s' is not part of a llama model with %u layers",
                            gguf_printable(t->name, text, sizeof text), c->n_layers);
        }
    }
    return true;
}

static bool load_matrix(const gguf_file *f, const char *name, uint32_t n_rows, uint32_t n_cols,
                        const model_desc *d, matrix *w, char *err, size_t n) {
    const gguf_tensor_info *t;
    char why[LLM_ERR_LEN];
    if (!gguf_require_tensor(f, name, n_cols, n_rows, &t, err, n)) return false;
    if (matrix_pack(d->threads, w, t->type, t->data, n_rows, n_cols, d->mode, why, sizeof why)) return true;
    return llm_fail(err, n, "tensor '%s': %s", name, why);
}

static bool load_vector(const gguf_file *f, const char *name, uint32_t length, float **out, char *err,
                        size_t n) {
    const gguf_tensor_info *t;
    if (!gguf_require_tensor(f, name, length, 0, &t, err, n)) return false;
    *out = (float *)malloc(length * sizeof(float));
    if (!*out) return llm_fail(err, n, "no memory for tensor '%s'", name);
    weights_decode_row(t->type, t->data, length, *out);
    return true;
}

static bool load_layer(const gguf_file *f, const model_config *c, uint32_t index, const model_desc *d,
                       layer *l, char *err, size_t n) {
    const uint32_t qw = c->n_q_heads * c->head_dim, kvw = c->n_kv_heads * c->head_dim;
    const struct {
        const char *name;
        matrix *w;
        uint32_t n_rows, n_cols;
    } all[] = {{"attn_q", &l->q, qw, c->width},
               {"attn_k", &l->k, kvw, c->width},
               {"attn_v", &l->v, kvw, c->width},
               {"attn_output", &l->o, c->width, qw},
               {"ffn_gate", &l->gate, c->ffn_width, c->width},
               {"ffn_up", &l->up, c->ffn_width, c->width},
               {"ffn_down", &l->down, c->width, c->ffn_width}};
    char name[64];
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        snprintf(name, sizeof name, "blk.%u.%s.weight", index, all[i].name);
        if (!load_matrix(f, name, all[i].n_rows, all[i].n_cols, d, all[i].w, err, n)) return false;
    }
    snprintf(name, sizeof name, "blk.%u.attn_norm.weight", index);
    if (!load_vector(f, name, c->width, &l->attn_norm, err, n)) return false;
    snprintf(name, sizeof name, "blk.%u.ffn_norm.weight", index);
    return load_vector(f, name, c->width, &l->ffn_norm, err, n);
}

static bool load_weights(const gguf_file *f, model *m, const model_desc *d, char *err, size_t n) {
    model_config *c = &m->config;
    const gguf_tensor_info *t = gguf_tensor(f, "token_embd.weight");
    if (!t) return llm_fail(err, n, "tensor 'token_embd.weight' is missing");
    if (t->ne[1] == 0 || t->ne[1] > 1u << 24)
        return llm_fail(err, n, "tensor 'token_embd.weight' has no sane shape");
    c->n_vocab = (uint32_t)t->ne[1];
    if (!gguf_require_tensor(f, "token_embd.weight", c->width, c->n_vocab, &m->embeddings, err, n))
        return false;
    m->embedding_bytes = (size_t)(t->bytes / c->n_vocab);
    const char *out = gguf_tensor(f, "output.weight") ? "output.weight" : "token_embd.weight";
    if (!load_matrix(f, out, c->n_vocab, c->width, d, &m->out, err, n)) return false;
    if (!load_vector(f, "output_norm.weight", c->width, &m->out_norm, err, n)) return false;
    m->layers = (layer *)calloc(c->n_layers, sizeof(layer));
    if (!m->layers) return llm_fail(err, n, "no memory for %u layers", c->n_layers);
    for (uint32_t l = 0; l < c->n_layers; l++) {
        if (!load_layer(f, c, l, d, &m->layers[l], err, n)) return false;
    }
    return true;
}

static bool alloc_rows(float **p, uint32_t n_rows, uint32_t width) {
    *p = (float *)calloc((size_t)n_rows * width, sizeof(float));
    return *p != NULL;
}

static bool alloc_buffers(model *m, const model_desc *d, char *err, size_t n) {
    const model_config *c = &m->config;
    const uint32_t qw = c->n_q_heads * c->head_dim, kvw = c->n_kv_heads * c->head_dim;
    const uint32_t widest = c->width > c->ffn_width ? c->width : c->ffn_width;
    const uint32_t rows = m->max_rows, slice = rows < SLICE_ROWS ? rows : SLICE_ROWS;
    if (alloc_rows(&m->x, rows, c->width) && alloc_rows(&m->q, rows, qw) && alloc_rows(&m->att, rows, qw) &&
        alloc_rows(&m->k, rows, kvw) && alloc_rows(&m->v, rows, kvw) &&
        alloc_rows(&m->angles, rows, c->rope_dims) && alloc_rows(&m->h, slice, c->width) &&
        alloc_rows(&m->gate, slice, c->ffn_width) && alloc_rows(&m->up, slice, c->ffn_width) &&
        acts_create(&m->a, d->mode, d->path, slice, widest)) {
        return true;
    }
    return llm_fail(err, n, "no memory for activations of %u rows", rows);
}

bool model_load(const gguf_file *f, const model_desc *desc, model **out, char *err, size_t err_len) {
    *out = NULL;
    gguf_str arch;
    if (!gguf_get_str(f, "general.architecture", &arch, err, err_len)) return false;
    if (!gguf_str_eq(arch, "llama")) {
        char text[64];
        return llm_fail(err, err_len, "architecture '%s' is not supported (only llama)",
                        gguf_printable(arch, text, sizeof text));
    }
    if (!weights_path_available(desc->path)) {
        return llm_fail(err, err_len, "this processor has no %s", weights_path_name(desc->path));
    }
    model *m = (model *)calloc(1, sizeof *m);
    if (!m) return llm_fail(err, err_len, "no memory for the model");
    m->threads = desc->threads;
    m->max_rows = desc->max_rows ? desc->max_rows : 512;
    if (!read_config(f, &m->config, err, err_len) || !check_config(&m->config, err, err_len) ||
        !refuse_rope_scaling(f, err, err_len) || !refuse_keys(f, &m->config, err, err_len) ||
        !refuse_tensors(f, &m->config, err, err_len) || !load_weights(f, m, desc, err, err_len) ||
        !alloc_buffers(m, desc, err, err_len)) {
        model_free(m);
        return false;
    }
    *out = m;
    return true;
}

void model_free(model *m) {
    if (!m) return;
    for (uint32_t i = 0; m->layers && i < m->config.n_layers; i++) {
        layer *l = &m->layers[i];
        matrix *const all[] = {&l->q, &l->k, &l->v, &l->o, &l->gate, &l->up, &l->down};
        for (size_t j = 0; j < sizeof all / sizeof all[0]; j++) matrix_free(all[j]);
        free(l->attn_norm);
        free(l->ffn_norm);
    }
    float *const rows[] = {m->out_norm, m->x, m->h, m->q, m->att, m->k, m->v, m->gate, m->up, m->angles};
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) free(rows[i]);
    matrix_free(&m->out);
    acts_free(&m->a);
    free(m->layers);
    free(m);
}

const model_config *model_get_config(const model *m) { return &m->config; }

uint32_t model_max_rows(const model *m) { return m->max_rows; }

size_t model_bytes(const model *m) {
    size_t bytes = matrix_bytes(&m->out);
    for (uint32_t i = 0; i < m->config.n_layers; i++) {
        const layer *l = &m->layers[i];
        const matrix *const all[] = {&l->q, &l->k, &l->v, &l->o, &l->gate, &l->up, &l->down};
        for (size_t j = 0; j < sizeof all / sizeof all[0]; j++) bytes += matrix_bytes(all[j]);
    }
    return bytes;
}

/* ---- forward ---- */

/* A slice of rows goes through the element-wise steps in parallel, a few rows per task. */
typedef struct slice {
    model *m;
    const int32_t *tokens;
    const uint32_t *positions;
    const float *norm;      /* weights of a normalisation */
    uint32_t first, n_rows; /* of the batch */
    uint32_t per_task;
    void (*step)(const struct slice *s, uint32_t i); /* i < n_rows: row first + i of the batch */
} slice;

static void slice_task(void *ctx, uint32_t task) {
    const slice *s = (const slice *)ctx;
    uint32_t end = (task + 1) * s->per_task;
    if (end > s->n_rows) end = s->n_rows;
    for (uint32_t i = task * s->per_task; i < end; i++) s->step(s, i);
}

static void each_row(slice *s, void (*step)(const slice *, uint32_t)) {
    uint32_t threads = pool_threads(s->m->threads);
    s->step = step;
    s->per_task = s->n_rows < ACTS_TILE * threads ? (s->n_rows + threads - 1) / threads : ACTS_TILE;
    pool_run(s->m->threads, (s->n_rows + s->per_task - 1) / s->per_task, slice_task, s);
}

/* Row i of the slice in a buffer that holds the whole batch. */
static float *batch_row(const slice *s, float *buffer, uint32_t width, uint32_t i) {
    return buffer + (size_t)(s->first + i) * width;
}

static uint32_t q_width(const model *m) { return m->config.n_q_heads * m->config.head_dim; }

static uint32_t kv_width(const model *m) { return m->config.n_kv_heads * m->config.head_dim; }

static void step_embed(const slice *s, uint32_t i) {
    const model *m = s->m;
    const model_config *c = &m->config;
    const uint8_t *data = (const uint8_t *)m->embeddings->data;
    data += (size_t)s->tokens[s->first + i] * m->embedding_bytes;
    weights_decode_row(m->embeddings->type, data, c->width, batch_row(s, m->x, c->width, i));
    ops_rope_angles(s->positions[s->first + i], c->rope_base, c->rope_dims,
                    batch_row(s, m->angles, c->rope_dims, i));
}

/* x, normalised, becomes the input of the next products. */
static void step_norm(const slice *s, uint32_t i) {
    model *m = s->m;
    const uint32_t width = m->config.width;
    float *h = m->h + (size_t)i * width;
    ops_rmsnorm(batch_row(s, m->x, width, i), s->norm, width, m->config.rms_eps, h);
    acts_store(&m->a, i, h);
}

static void step_rope(const slice *s, uint32_t i) {
    const model *m = s->m;
    const model_config *c = &m->config;
    const float *angles = batch_row(s, m->angles, c->rope_dims, i);
    ops_rope(batch_row(s, m->q, q_width(m), i), c->n_q_heads, c->head_dim, c->rope_dims, angles);
    ops_rope(batch_row(s, m->k, kv_width(m), i), c->n_kv_heads, c->head_dim, c->rope_dims, angles);
}

static void step_attention_out(const slice *s, uint32_t i) {
    acts_store(&s->m->a, i, batch_row(s, s->m->att, q_width(s->m), i));
}

static void step_silu(const slice *s, uint32_t i) {
    model *m = s->m;
    const size_t at = (size_t)i * m->config.ffn_width;
    ops_silu_mul(m->a.path, m->gate + at, m->up + at, m->config.ffn_width);
    acts_store(&m->a, i, m->gate + at);
}

static void normalise(slice *s, const float *weights) {
    s->norm = weights;
    acts_begin(&s->m->a, s->n_rows, s->m->config.width);
    each_row(s, step_norm);
}

static void before_attention(slice *s, const layer *l) {
    model *m = s->m;
    const uint32_t qw = q_width(m), kvw = kv_width(m);
    normalise(s, l->attn_norm);
    const matmul_job jobs[3] = {{&l->q, batch_row(s, m->q, qw, 0), qw, false},
                                {&l->k, batch_row(s, m->k, kvw, 0), kvw, false},
                                {&l->v, batch_row(s, m->v, kvw, 0), kvw, false}};
    matmul(m->threads, &m->a, jobs, 3);
    each_row(s, step_rope);
}

static void after_attention(slice *s, const layer *l) {
    model *m = s->m;
    const model_config *c = &m->config;
    float *x = batch_row(s, m->x, c->width, 0);
    acts_begin(&m->a, s->n_rows, q_width(m));
    each_row(s, step_attention_out);
    const matmul_job o = {&l->o, x, c->width, true};
    matmul(m->threads, &m->a, &o, 1);
    normalise(s, l->ffn_norm);
    const matmul_job ffn[2] = {{&l->gate, m->gate, c->ffn_width, false},
                               {&l->up, m->up, c->ffn_width, false}};
    matmul(m->threads, &m->a, ffn, 2);
    acts_begin(&m->a, s->n_rows, c->ffn_width);
    each_row(s, step_silu);
    const matmul_job down = {&l->down, x, c->width, true};
    matmul(m->threads, &m->a, &down, 1);
}

/* Moves to the slice after this one (or to the first, from a slice without rows); false at the end of the
 * batch. */
static bool next_slice(slice *s, uint32_t n_rows) {
    s->first += s->n_rows;
    s->n_rows = n_rows - s->first < SLICE_ROWS ? n_rows - s->first : SLICE_ROWS;
    return s->n_rows > 0;
}

/* rows[i] = rows[which[i]], by way of scratch, since `which` has no order. */
static void gather(float *rows, float *scratch, uint32_t width, const uint32_t *which, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) {
        memcpy(scratch + (size_t)i * width, rows + (size_t)which[i] * width, width * sizeof(float));
    }
    memcpy(rows, scratch, (size_t)n * width * sizeof(float));
}

static int check_input(const model *m, const int32_t *tokens, uint32_t n_rows, const uint32_t *logit_rows,
                       uint32_t n_logits) {
    if (n_rows == 0 || n_rows > m->max_rows || n_logits > n_rows) return MODEL_BAD_ROWS;
    for (uint32_t i = 0; i < n_rows; i++) {
        if ((uint32_t)tokens[i] >= m->config.n_vocab) return MODEL_BAD_TOKEN;
    }
    for (uint32_t i = 0; i < n_logits; i++) {
        if (logit_rows[i] >= n_rows) return MODEL_BAD_ROWS;
    }
    return MODEL_OK;
}

static void output_logits(slice *s, float *logits) {
    model *m = s->m;
    const uint32_t n_vocab = m->config.n_vocab;
    normalise(s, m->out_norm);
    const matmul_job out = {&m->out, logits + (size_t)s->first * n_vocab, n_vocab, false};
    matmul(m->threads, &m->a, &out, 1);
}

int model_forward(model *m, const int32_t *tokens, const uint32_t *positions, uint32_t n_rows,
                  const uint32_t *logit_rows, uint32_t n_logits, float *logits, model_attend_fn attend,
                  void *user) {
    int result = check_input(m, tokens, n_rows, logit_rows, n_logits);
    if (result != MODEL_OK) return result;
    const slice start = {m, tokens, positions, NULL, 0, 0, 0, NULL};
    for (slice s = start; next_slice(&s, n_rows);) each_row(&s, step_embed);
    for (uint32_t i = 0; i < m->config.n_layers; i++) {
        for (slice s = start; next_slice(&s, n_rows);) before_attention(&s, &m->layers[i]);
        result = attend(user, (int)i, m->q, m->k, m->v, m->att);
        if (result != MODEL_OK) return result;
        if (i + 1 == m->config.n_layers) { /* from here on only the rows whose logits are asked for matter */
            gather(m->att, m->q, q_width(m), logit_rows, n_logits);
            gather(m->x, m->q, m->config.width, logit_rows, n_logits);
            n_rows = n_logits;
        }
        for (slice s = start; next_slice(&s, n_rows);) after_attention(&s, &m->layers[i]);
    }
    for (slice s = start; next_slice(&s, n_rows);) output_logits(&s, logits);
    return MODEL_OK;
}
