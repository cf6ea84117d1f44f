/* The runner's forward pass on small random llama models written in memory: against a double-precision
 * forward pass written here, bit for bit however the rows are batched, and refusals that name what a file
 * has too much. */
#include "gguf_builder.h"
#include "llm/model.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

enum { LAYERS = 2, WIDTH = 64, HEADS = 4, KV_HEADS = 2, DIM = WIDTH / HEADS, KV = KV_HEADS * DIM, FFN = 96 };
enum { VOCAB = 67, ROT = 12, POSITIONS = 300, MOST_TENSORS = 2 + 9 * LAYERS + 2 };
static const double rope_base = 5000, eps = 1e-5;

/* ---- a model file ---- */

/* What is different from a good file with tied embeddings. */
typedef struct variant {
    const char *arch, *without_key, *without_tensor, *extra_tensor, *wide_tensor, *odd_type_tensor;
    const char *string_key, *string_value; /* an extra key */
    const char *number_key;                /* an extra key, or another value of one */
    uint32_t number;
    const char *float_key; /* an extra key */
    float float_value;
    bool untied;
} variant;

typedef struct tensor {
    char name[40];
    uint64_t ne[2];
    uint32_t n_dims, type;
    size_t at; /* in tensors_data, in floats */
} tensor;

static tensor tensors[MOST_TENSORS];
static uint32_t n_tensors;
static float tensors_data[200000];
static size_t n_data;
static uint32_t seed;

static void add_tensor(const variant *v, const char *name, uint64_t ne0, uint64_t ne1) {
    if (v->without_tensor && strcmp(name, v->without_tensor) == 0) return;
    tensor *t = &tensors[n_tensors++];
    snprintf(t->name, sizeof t->name, "%s", name);
    t->ne[0] = ne0 + (v->wide_tensor && strcmp(name, v->wide_tensor) == 0 ? 32 : 0);
    t->ne[1] = ne1;
    t->n_dims = ne1 ? 2 : 1;
    t->type = v->odd_type_tensor && strcmp(name, v->odd_type_tensor) == 0 ? 30 : 0; /* BF16 */
    t->at = n_data;
    size_t n = (size_t)(t->ne[0] * (ne1 ? ne1 : 1));
    for (size_t i = 0; i < n; i++) {
        seed = seed * 1664525 + 1013904223;
        double unit = seed / 4294967296.0 * 2 - 1;
        tensors_data[n_data + i] = (float)(ne1 ? unit / 4 : 1 + unit / 2);
    }
    n_data = (n_data + n + 7) / 8 * 8;
}

static const float *tensor_data(const char *name) {
    for (uint32_t i = 0; i < n_tensors; i++) {
        if (strcmp(tensors[i].name, name) == 0) return tensors_data + tensors[i].at;
    }
    return NULL;
}

static const float *layer_data(int l, const char *name) {
    char full[40];
    snprintf(full, sizeof full, "blk.%d.%s.weight", l, name);
    return tensor_data(full);
}

static void make_tensors(const variant *v) {
    static const struct {
        const char *name;
        uint32_t ne0, ne1;
    } parts[] = {{"attn_norm", WIDTH, 0},  {"attn_q", WIDTH, WIDTH},      {"attn_k", WIDTH, KV},
                 {"attn_v", WIDTH, KV},    {"attn_output", WIDTH, WIDTH}, {"ffn_norm", WIDTH, 0},
                 {"ffn_gate", WIDTH, FFN}, {"ffn_up", WIDTH, FFN},        {"ffn_down", FFN, WIDTH}};
    n_tensors = 0;
    n_data = 0;
    seed = 9;
    add_tensor(v, "token_embd.weight", WIDTH, VOCAB);
    for (int l = 0; l < LAYERS; l++) {
        for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
            char name[40];
            snprintf(name, sizeof name, "blk.%d.%s.weight", l, parts[i].name);
            add_tensor(v, name, parts[i].ne0, parts[i].ne1);
        }
    }
    add_tensor(v, "output_norm.weight", WIDTH, 0);
    if (v->untied) add_tensor(v, "output.weight", WIDTH, VOCAB);
    if (v->extra_tensor) add_tensor(v, v->extra_tensor, WIDTH, 0);
}

static void put_u32(gb *b, const variant *v, const char *key, uint32_t value, uint64_t *n) {
    if (v->without_key && strcmp(key, v->without_key) == 0) return;
    if (v->number_key && strcmp(key, v->number_key) == 0) value = v->number;
    gb_kv_u32(b, key, value);
    ++*n;
}

static void put_f32(gb *b, const char *key, float value, uint64_t *n) {
    gb_key(b, key, 6);
    gb_bytes(b, &value, 4);
    ++*n;
}

static void build(gb *b, const variant *v) {
    gb kv = {0};
    uint64_t n = 0;
    make_tensors(v);
    gb_kv_str(&kv, "general.architecture", v->arch ? v->arch : "llama"), n++;
    put_u32(&kv, v, "llama.block_count", LAYERS, &n);
    put_u32(&kv, v, "llama.context_length", 512, &n);
    put_u32(&kv, v, "llama.embedding_length", WIDTH, &n);
    put_u32(&kv, v, "llama.feed_forward_length", FFN, &n);
    put_u32(&kv, v, "llama.attention.head_count", HEADS, &n);
    put_u32(&kv, v, "llama.attention.head_count_kv", KV_HEADS, &n);
    put_u32(&kv, v, "llama.rope.dimension_count", ROT, &n);
    put_f32(&kv, "llama.rope.freq_base", (float)rope_base, &n);
    put_f32(&kv, "llama.attention.layer_norm_rms_epsilon", (float)eps, &n);
    if (v->string_key) gb_kv_str(&kv, v->string_key, v->string_value), n++;
    if (v->float_key) put_f32(&kv, v->float_key, v->float_value, &n);
    if (v->number_key && strstr(v->number_key, "expert")) put_u32(&kv, v, v->number_key, 0, &n);
    gb_header(b, 3, n_tensors, n);
    gb_bytes(b, kv.data, kv.n);
    for (uint32_t i = 0; i < n_tensors; i++) {
        gb_tensor(b, tensors[i].name, tensors[i].type, tensors[i].n_dims, tensors[i].ne, tensors[i].at * 4);
    }
    gb_align(b, 32);
    gb_bytes(b, tensors_data, n_data * 4);
    gb_free(&kv);
}

/* ---- attention, and the reference ---- */

typedef struct dense {
    uint32_t n_rows, past, calls;
    int fail_at; /* layer, or -1 */
    float k[LAYERS][POSITIONS][KV], v[LAYERS][POSITIONS][KV];
} dense;

static void attend_row(const float *q, float (*k)[KV], float (*v)[KV], uint32_t n, double *out) {
    for (uint32_t h = 0; h < HEADS; h++) {
        uint32_t at = h / (HEADS / KV_HEADS) * DIM;
        double sum = 0, acc[DIM] = {0};
        for (uint32_t j = 0; j < n; j++) {
            double s = 0;
            for (uint32_t i = 0; i < DIM; i++) s += (double)q[h * DIM + i] * k[j][at + i];
            double p = exp(s / sqrt(DIM));
            sum += p;
            for (uint32_t i = 0; i < DIM; i++) acc[i] += p * v[j][at + i];
        }
        for (uint32_t i = 0; i < DIM; i++) out[h * DIM + i] = acc[i] / sum;
    }
}

static int attend(void *user, int layer, const float *q, const float *k, const float *v, float *out) {
    dense *d = (dense *)user;
    d->calls++;
    if (layer == d->fail_at) return -77;
    memcpy(d->k[layer][d->past], k, d->n_rows * sizeof d->k[0][0]);
    memcpy(d->v[layer][d->past], v, d->n_rows * sizeof d->v[0][0]);
    for (uint32_t r = 0; r < d->n_rows; r++) {
        double row[WIDTH];
        attend_row(q + r * WIDTH, d->k[layer], d->v[layer], d->past + r + 1, row);
        for (uint32_t i = 0; i < WIDTH; i++) out[r * WIDTH + i] = (float)row[i];
    }
    return 0;
}

static void ref_product(const float *w, const double *x, uint32_t n_out, uint32_t n_in, double *y) {
    for (uint32_t o = 0; o < n_out; o++) {
        y[o] = 0;
        for (uint32_t i = 0; i < n_in; i++) y[o] += (double)w[o * n_in + i] * x[i];
    }
}

static void ref_norm(const double *x, const float *w, double *out) {
    double squares = 0;
    for (int i = 0; i < WIDTH; i++) squares += x[i] * x[i];
    for (int i = 0; i < WIDTH; i++) out[i] = x[i] / sqrt(squares / WIDTH + eps) * w[i];
}

static void ref_rope(const double *x, uint32_t n, uint32_t position, float *out) {
    for (uint32_t i = 0; i < n; i += 2) {
        double a = i % DIM < ROT ? position * pow(rope_base, -(double)(i % DIM) / ROT) : 0;
        out[i] = (float)(x[i] * cos(a) - x[i + 1] * sin(a));
        out[i + 1] = (float)(x[i] * sin(a) + x[i + 1] * cos(a));
    }
}

/* One token through the whole model; d holds the past. */
static void ref_token(int32_t token, uint32_t position, dense *d, double *logits) {
    double x[WIDTH], h[WIDTH], y[WIDTH], gate[FFN], up[FFN];
    float q[WIDTH];
    for (int i = 0; i < WIDTH; i++) x[i] = tensor_data("token_embd.weight")[token * WIDTH + i];
    for (int l = 0; l < LAYERS; l++) {
        ref_norm(x, layer_data(l, "attn_norm"), h);
        ref_product(layer_data(l, "attn_q"), h, WIDTH, WIDTH, y);
        ref_rope(y, WIDTH, position, q);
        ref_product(layer_data(l, "attn_k"), h, KV, WIDTH, y);
        ref_rope(y, KV, position, d->k[l][position]);
        ref_product(layer_data(l, "attn_v"), h, KV, WIDTH, y);
        for (int i = 0; i < KV; i++) d->v[l][position][i] = (float)y[i];
        attend_row(q, d->k[l], d->v[l], position + 1, h);
        ref_product(layer_data(l, "attn_output"), h, WIDTH, WIDTH, y);
        for (int i = 0; i < WIDTH; i++) x[i] += y[i];
        ref_norm(x, layer_data(l, "ffn_norm"), h);
        ref_product(layer_data(l, "ffn_gate"), h, FFN, WIDTH, gate);
        ref_product(layer_data(l, "ffn_up"), h, FFN, WIDTH, up);
        for (int i = 0; i < FFN; i++) gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i];
        ref_product(layer_data(l, "ffn_down"), gate, WIDTH, FFN, y);
        for (int i = 0; i < WIDTH; i++) x[i] += y[i];
    }
    ref_norm(x, tensor_data("output_norm.weight"), h);
    const float *out = tensor_data("output.weight");
    ref_product(out ? out : tensor_data("token_embd.weight"), h, VOCAB, WIDTH, logits);
}

/* ---- fixture ---- */

typedef struct fixture {
    gb file;
    gguf_file *f;
    pool *p;
    model *m;
    int32_t tokens[POSITIONS];
    uint32_t positions[POSITIONS], all_rows[POSITIONS];
    dense d;
    float logits[POSITIONS * VOCAB];
} fixture;

static fixture *open_model(const variant *v, weights_mode mode, weights_path path, uint32_t n_threads,
                           uint32_t max_rows) {
    char err[LLM_ERR_LEN] = "";
    fixture *x = calloc(1, sizeof *x);
    build(&x->file, v);
    if (!gguf_open_memory(x->file.data, x->file.n, &x->f, err, sizeof err)) fail_msg("%s", err);
    x->p = pool_create(n_threads);
    model_desc desc = {.mode = mode, .path = path, .max_rows = max_rows, .threads = x->p};
    if (!model_load(x->f, &desc, &x->m, err, sizeof err)) fail_msg("%s", err);
    x->d.fail_at = -1;
    for (uint32_t i = 0; i < POSITIONS; i++) {
        x->tokens[i] = (int32_t)(i * 31 % VOCAB);
        x->positions[i] = x->all_rows[i] = i;
    }
    return x;
}

static void close_model(fixture *x) {
    model_free(x->m);
    gguf_close(x->f);
    pool_destroy(x->p);
    gb_free(&x->file);
    free(x);
}

/* All tokens in chunks of this many rows, every row's logits kept. */
static void run_chunks(fixture *x, uint32_t n, uint32_t chunk) {
    for (uint32_t at = 0; at < n; at += chunk) {
        x->d.past = at;
        x->d.n_rows = n - at < chunk ? n - at : chunk;
        assert_int_equal(model_forward(x->m, x->tokens + at, x->positions + at, x->d.n_rows, x->all_rows,
                                       x->d.n_rows, x->logits + at * VOCAB, attend, &x->d),
                         MODEL_OK);
    }
}

/* ---- tests ---- */

static void test_logits(void **state) {
    (void)state;
    enum { N = 40 };
    static dense past;
    for (int i = 0; i < 2 * 2 * 3; i++) {
        const weights_path path = (weights_path)(1 + i % 3);
        const weights_mode mode = (weights_mode)(i / 3 % 2);
        if (!weights_path_available(path)) continue;
        fixture *x = open_model(&(variant){.untied = i >= 6}, mode, path, 2, 64);
        run_chunks(x, N, N);
        double error = 0, size = 0;
        for (uint32_t t = 0; t < N; t++) {
            double want[VOCAB];
            ref_token(x->tokens[t], t, &past, want);
            for (int v = 0; v < VOCAB; v++) {
                double e = fabs(x->logits[t * VOCAB + v] - want[v]);
                if (mode == WEIGHTS_F32) assert_true(e < 2e-5);
                error += e * e;
                size += want[v] * want[v];
            }
        }
        assert_true(sqrt(error / size) < (mode == WEIGHTS_F32 ? 2e-6 : 0.05));
        close_model(x);
    }
}

/* 300 rows at once (more than the model takes through a layer at a time), in sevens, and one by one. */
static void test_batches_and_threads(void **state) {
    (void)state;
    const uint32_t chunks[] = {POSITIONS, 7, 129};
    for (int mode = 0; mode < 2; mode++) {
        fixture *one = open_model(&(variant){0}, (weights_mode)mode, WEIGHTS_AUTO, 1, 1);
        run_chunks(one, POSITIONS, 1);
        for (uint32_t i = 0; i < 3; i++) {
            fixture *x = open_model(&(variant){0}, (weights_mode)mode, WEIGHTS_AUTO, 1 + i, chunks[i]);
            run_chunks(x, POSITIONS, chunks[i]);
            assert_memory_equal(x->logits, one->logits, sizeof x->logits);
            close_model(x);
        }
        close_model(one);
    }
}

static void test_chosen_logits(void **state) {
    (void)state;
    enum { N = 150 };
    const uint32_t rows[] = {149, 3, 3, 0, 77};
    fixture *x = open_model(&(variant){0}, WEIGHTS_INT8, WEIGHTS_AUTO, 2, N);
    float chosen[5 * VOCAB + 1];
    run_chunks(x, N, N);
    chosen[5 * VOCAB] = 42;
    assert_int_equal(model_forward(x->m, x->tokens, x->positions, N, rows, 5, chosen, attend, &x->d),
                     MODEL_OK);
    for (int i = 0; i < 5; i++) {
        assert_memory_equal(chosen + i * VOCAB, x->logits + rows[i] * VOCAB, VOCAB * sizeof(float));
    }
    assert_true(chosen[5 * VOCAB] == 42);
    x->d.calls = 0; /* a chunk of prefill without logits still shows every layer's k and v */
    assert_int_equal(model_forward(x->m, x->tokens, x->positions, N, NULL, 0, NULL, attend, &x->d), MODEL_OK);
    assert_int_equal(x->d.calls, LAYERS);
    close_model(x);
}

static void test_bad_calls(void **state) {
    (void)state;
    fixture *x = open_model(&(variant){0}, WEIGHTS_INT8, WEIGHTS_AUTO, 1, 8);
    const model_config *c = model_get_config(x->m);
    assert_int_equal(c->n_layers, LAYERS);
    assert_int_equal(c->head_dim, DIM);
    assert_int_equal(c->n_kv_heads, KV_HEADS);
    assert_int_equal(c->n_vocab, VOCAB);
    assert_int_equal(c->rope_dims, ROT);
    assert_int_equal(c->n_ctx, 512);
    assert_int_equal(model_max_rows(x->m), 8);
    uint32_t rows[] = {0, 4};
    x->d.n_rows = 4;
#define FORWARD(n, n_logits) \
    model_forward(x->m, x->tokens, x->positions, n, rows, n_logits, x->logits, attend, &x->d)
    assert_int_equal(FORWARD(0, 0), MODEL_BAD_ROWS);
    assert_int_equal(FORWARD(9, 1), MODEL_BAD_ROWS);
    assert_int_equal(FORWARD(4, 2), MODEL_BAD_ROWS); /* row 4 of 4 */
    assert_int_equal(FORWARD(1, 2), MODEL_BAD_ROWS);
    x->tokens[3] = VOCAB;
    assert_int_equal(FORWARD(4, 1), MODEL_BAD_TOKEN);
    x->tokens[3] = -1;
    assert_int_equal(FORWARD(4, 1), MODEL_BAD_TOKEN);
    assert_int_equal(x->d.calls, 0);
    x->tokens[3] = 1;
    x->d.fail_at = 1;
    assert_int_equal(FORWARD(4, 1), -77);
    assert_int_equal(x->d.calls, 2);
    x->d.fail_at = -1;
    assert_int_equal(FORWARD(4, 1), MODEL_OK);
    close_model(x);
    model_free(NULL);
}

static void test_refusals(void **state) {
    (void)state;
    const struct {
        variant v;
        const char *says[2];
    } cases[] = {
        {{.arch = "mamba"}, {"mamba", "architecture"}},
        {{.without_key = "llama.block_count"}, {"llama.block_count", ""}},
        {{.without_key = "llama.attention.head_count"}, {"llama.attention.head_count", ""}},
        {{.number_key = "llama.attention.head_count", .number = 0}, {"llama.attention.head_count", ""}},
        {{.number_key = "llama.attention.head_count", .number = 7}, {"llama.attention.head_count", "7"}},
        {{.number_key = "llama.attention.head_count_kv", .number = 3}, {"head_count_kv", "3"}},
        {{.number_key = "llama.attention.head_count_kv", .number = 1}, {"blk.0.attn_k.weight", "shape"}},
        {{.number_key = "llama.block_count", .number = 0}, {"llama.block_count", "0"}},
        {{.number_key = "llama.block_count", .number = 3}, {"blk.2.", "missing"}},
        {{.number_key = "llama.block_count", .number = 1}, {"blk.1.attn_norm.weight", "1 layers"}},
        {{.number_key = "llama.block_count", .number = 4000000000u}, {"llama.block_count", "4000000000"}},
        {{.number_key = "llama.embedding_length", .number = 72}, {"llama.embedding_length", "72"}},
        {{.number_key = "llama.feed_forward_length", .number = 100}, {"llama.feed_forward_length", "100"}},
        {{.number_key = "llama.feed_forward_length", .number = 128}, {"blk.0.ffn_", "shape"}},
        {{.number_key = "llama.rope.dimension_count", .number = 13}, {"llama.rope.dimension_count", "13"}},
        {{.number_key = "llama.rope.dimension_count", .number = 18}, {"llama.rope.dimension_count", "18"}},
        {{.number_key = "llama.expert_count", .number = 8}, {"llama.expert_count", "8"}},
        {{.string_key = "llama.rope.scaling.type", .string_value = "yarn"},
         {"llama.rope.scaling.type", "yarn"}},
        {{.float_key = "llama.rope.scaling.factor", .float_value = 4}, {"llama.rope.scaling.factor", "4"}},
        {{.float_key = "llama.rope.scale_linear", .float_value = 0.5f}, {"llama.rope.scale_linear", "0.5"}},
        {{.extra_tensor = "blk.0.attn_q.bias"}, {"blk.0.attn_q.bias", ""}},
        {{.extra_tensor = "rope_freqs.weight"}, {"rope_freqs.weight", ""}},
        {{.extra_tensor = "blk.99999999999.ffn_up.weight"}, {"blk.99999999999.ffn_up.weight", ""}},
        {{.without_tensor = "token_embd.weight"}, {"token_embd.weight", "missing"}},
        {{.without_tensor = "output_norm.weight"}, {"output_norm.weight", "missing"}},
        {{.without_tensor = "blk.1.ffn_down.weight"}, {"blk.1.ffn_down.weight", "missing"}},
        {{.wide_tensor = "blk.1.attn_v.weight"}, {"blk.1.attn_v.weight", "shape"}},
        {{.wide_tensor = "blk.0.ffn_norm.weight"}, {"blk.0.ffn_norm.weight", "shape"}},
        {{.wide_tensor = "output.weight", .untied = true}, {"output.weight", "shape"}},
        {{.odd_type_tensor = "blk.0.attn_k.weight"}, {"blk.0.attn_k.weight", "BF16"}},
    };
    pool *p = pool_create(1);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        gb b = {0};
        gguf_file *f;
        model *m = (model *)1;
        char err[LLM_ERR_LEN] = "";
        build(&b, &cases[i].v);
        if (!gguf_open_memory(b.data, b.n, &f, err, sizeof err)) fail_msg("case %zu: %s", i, err);
        assert_false(model_load(f, &(model_desc){.threads = p}, &m, err, sizeof err));
        assert_null(m);
        if (!strstr(err, cases[i].says[0]) || !strstr(err, cases[i].says[1]))
            fail_msg("case %zu says: %s", i, err);
        gguf_close(f);
        gb_free(&b);
    }
    pool_destroy(p);
}

/* A key that says nothing new is no reason to refuse. */
static void test_accepts_no_scaling(void **state) {
    (void)state;
    close_model(open_model(&(variant){.string_key = "llama.rope.scaling.type", .string_value = "none"},
                           WEIGHTS_INT8, WEIGHTS_AUTO, 1, 1));
    close_model(open_model(&(variant){.float_key = "llama.rope.scale_linear", .float_value = 1}, WEIGHTS_INT8,
                           WEIGHTS_AUTO, 1, 1));
    close_model(open_model(&(variant){.number_key = "llama.expert_count", .number = 0}, WEIGHTS_INT8,
                           WEIGHTS_AUTO, 1, 1));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_logits),        cmocka_unit_test(test_batches_and_threads),
        cmocka_unit_test(test_chosen_logits), cmocka_unit_test(test_bad_calls),
        cmocka_unit_test(test_refusals),      cmocka_unit_test(test_accepts_no_scaling),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
