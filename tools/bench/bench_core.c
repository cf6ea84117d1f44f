/* bench_core: what the bookkeeping costs, with p50 and p99, and how many conversations fit into equal bytes. See --help. */
#define KVL_IMPLEMENTATION
#include "kvlite.h"

#include "bench_json.h"
#include "llm/options.h"

enum { RESERVED_TOKENS = 4096, REPEATS = 400, RUNNING = 256, MAP_SIZE = 1 << 14 };

static const char usage[] =
    "usage: bench_core [options]\n"
    "\n"
    "Null backend, no attention: planning and committing a step of 256 sequences that decode (512 to 767\n"
    "tokens each), a block taken and given back, the match of a cached prefix of 8,192 tokens, its open, a\n"
    "fork; beside malloc and a lookup in a hash map in the same run. Then what sealing a tile of 32 tokens\n"
    "costs in each format (write: F32 rows into an F16 tile; memcpy: its F16 bytes). Then capacity:\n"
    "conversations that a cache of a fixed size takes in, in pages of each preset.\n"
    "\n"
    "  --simd PATH     of sealing: scalar, avx2 or avx512 (default: the widest there is)\n"
    "  --json FILE     also write the figures as JSON; - is stdout, the table then goes to stderr\n"
    "\n"
    "JSON: bench, simd, others_share (of the processors, taken by other programs); rows, each with what,\n"
    "unit, p50, p99, target (0: none); capacity, each with model, tokens, bytes (of the cache), f16 and "
    "each\n"
    "packed preset (conversations), reserved (conversations in contiguous F16 buffers of 4,096 tokens),\n"
    "ratio (int4 over f16), target.\n";

static uint64_t samples[REPEATS];

typedef struct bench {
    kvl_simd simd;
    FILE *table;
    cJSON *rows, *capacity;
} bench;

static int by_value(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

/* Nanoseconds of the samples, which need not be in order before. */
static double quantile(double q) {
    qsort(samples, REPEATS, sizeof *samples, by_value);
    return (double)samples[(size_t)(q * (REPEATS - 1))];
}

/* A figure of the samples: nanoseconds over `per`. Returns its p50. */
static double report(bench *b, const char *what, const char *unit, double per, double target) {
    double p50 = quantile(0.5) / per, p99 = quantile(0.99) / per;
    char aim[32] = "";
    cJSON *row = cJSON_CreateObject();
    if (target > 0) snprintf(aim, sizeof aim, "target %g", target);
    fprintf(b->table, "%-42s p50 %9.2f  p99 %9.2f %-11s %s\n", what, p50, p99, unit, aim);
    cJSON_AddStringToObject(row, "what", what);
    cJSON_AddStringToObject(row, "unit", unit);
    cJSON_AddNumberToObject(row, "p50", p50);
    cJSON_AddNumberToObject(row, "p99", p99);
    cJSON_AddNumberToObject(row, "target", target);
    cJSON_AddItemToArray(b->rows, row);
    return p50;
}

/* ---- caches of the null backend ---- */
typedef struct model_shape {
    const char *name;
    uint32_t n_layers, n_q_heads, n_kv_heads, dim;
    uint64_t bytes; /* of a cache whose conversations are counted */
} model_shape;

static const model_shape smollm2 = {"SmolLM2-135M", 30, 9, 3, 64, 16ull << 30};
static const model_shape llama8b = {"Llama-3.1-8B", 32, 32, 8, 128, 256ull << 30};

static kvl_cache *make_cache(const model_shape *m, const char *preset, uint64_t bytes, bool keep) {
    static char error[256];
    kvl_cache_desc d;
    kvl_cache *c = NULL;
    memset(&d, 0, sizeof d);
    d.geometry.n_layers = m->n_layers;
    d.geometry.n_q_heads = m->n_q_heads;
    d.geometry.n_kv_heads = m->n_kv_heads;
    d.geometry.k_dim = m->dim;
    d.geometry.preset = preset;
    d.device_bytes = bytes;
    d.max_sequences = keep ? 0 : 20000;
    d.max_seq_tokens = 16384;
    d.no_prefix_cache = !keep;
    d.context_desc.backend = KVL_BACKEND_NULL;
    d.error = error;
    d.error_size = sizeof error;
    if (kvl_cache_create(&d, &c) != KVL_OK) {
        fprintf(stderr, "bench_core: %s\n", error);
        exit(1);
    }
    return c;
}

static void must(bool ok, const char *what) {
    if (ok) return;
    fprintf(stderr, "bench_core: %s failed\n", what);
    exit(1);
}

static void run_layers(kvl_cache *c, const kvl_step *step) {
    for (uint32_t l = 0; l < c->geo.n_layers; l++) kvl_step_layer_done(c, step, l, NULL);
}

/* Rows of one sequence as a step; false where no blocks are left. */
static bool run_rows(kvl_cache *c, kvl_seq seq, const int32_t *tokens, uint32_t n) {
    kvl_span span = {.seq = seq, .tokens = tokens, .n_tokens = n};
    const kvl_step *step;
    kvl_result r = kvl_step_begin(c, &span, 1, &step);
    if (r == KVL_NO_BLOCKS) return false;
    must(r == KVL_OK, "kvl_step_begin");
    run_layers(c, step);
    must(kvl_step_end(c, step) == KVL_OK, "kvl_step_end");
    return true;
}

/* ---- bookkeeping ---- */
static void bench_plan(bench *b) {
    static int32_t prompt[1024], next[RUNNING * 2];
    kvl_cache *c = make_cache(&smollm2, NULL, 16ull << 30, true);
    kvl_sched *s;
    const kvl_step *step;
    kvl_stats stats;
    uint64_t commit[REPEATS];
    must(kvl_sched_create(c, NULL, &s) == KVL_OK, "kvl_sched_create");
    for (int i = 0; i < RUNNING; i++) {
        for (int j = 0; j < 1024; j++) prompt[j] = i * 31 + j;
        kvl_request r = {.tokens = prompt, .n_tokens = 512 + (uint32_t)i, .max_new_tokens = 2000};
        kvl_req handle;
        must(kvl_sched_submit(s, &r, &handle) == KVL_OK, "kvl_sched_submit");
    }
    do {
        must(kvl_sched_plan(s, &step) == KVL_OK, "kvl_sched_plan");
        run_layers(c, step);
        kvl_sched_commit(s, step, next);
        kvl_get_stats(c, &stats);
    } while (stats.running < RUNNING || step->n_logits < RUNNING);
    for (int i = 0; i < REPEATS; i++) {
        uint64_t t0 = kvli_clock_now();
        kvl_sched_plan(s, &step);
        uint64_t t1 = kvli_clock_now();
        run_layers(c, step);
        uint64_t t2 = kvli_clock_now();
        kvl_sched_commit(s, step, next);
        commit[i] = kvli_clock_now() - t2;
        samples[i] = t1 - t0;
    }
    report(b, "plan, 256 decoding", "us", 1e3, 10);
    memcpy(samples, commit, sizeof samples);
    report(b, "commit, 256 decoding", "us", 1e3, 0);
    kvl_sched_destroy(s);
    kvl_cache_destroy(c);
}

static void bench_alloc(bench *b) {
    kvl_cache *c = make_cache(&smollm2, NULL, 4ull << 30, true);
    static uint32_t held[256];
    static void *mallocs[256];
    for (int i = 0; i < REPEATS; i++) {
        uint64_t t0 = kvli_clock_now();
        for (int j = 0; j < 256; j++) held[j] = kvli_block_alloc(c, 0);
        for (int j = 0; j < 256; j++) kvli_unref(c, held[j]);
        samples[i] = kvli_clock_now() - t0;
    }
    report(b, "block alloc + free", "ns", 256, 50);
    for (int i = 0; i < REPEATS; i++) {
        uint64_t t0 = kvli_clock_now();
        for (int j = 0; j < 256; j++) mallocs[j] = malloc(512);
        for (int j = 0; j < 256; j++) free(mallocs[j]);
        samples[i] = kvli_clock_now() - t0;
    }
    report(b, "  beside: malloc + free", "ns", 256, 0);
    kvl_cache_destroy(c);
}

/* A plain open-addressing map from 64-bit keys, larger than the L1 cache, each lookup waiting for the one before it: what
   any prefix lookup needs at least once a block. */
static void bench_map(bench *b) {
    static uint64_t keys[MAP_SIZE * 2];
    volatile uint64_t sink = 0;
    for (uint64_t i = 0; i < MAP_SIZE; i++) {
        uint64_t k = (i + 1) * 0x9E3779B97F4A7C15ull, at = k >> 49;
        while (keys[at]) at = (at + 1) % (MAP_SIZE * 2);
        keys[at] = k;
    }
    for (int i = 0; i < REPEATS; i++) {
        uint64_t t0 = kvli_clock_now(), found = 0;
        for (uint64_t j = 0; j < 1024; j++) {
            uint64_t k = ((found + j * 7919 + (uint64_t)i * 131) % MAP_SIZE + 1) * 0x9E3779B97F4A7C15ull,
                     at = k >> 49;
            while (keys[at] != k) at = (at + 1) % (MAP_SIZE * 2);
            found += at;
        }
        sink = sink + found;
        samples[i] = kvli_clock_now() - t0;
    }
    report(b, "  beside: hash map lookup, once a block", "ns", 1024, 0);
}

static void bench_prefix(bench *b) {
    enum { N = 8192, SEQS = 24 };
    kvl_cache *c = make_cache(&smollm2, NULL, 16ull << 30, true);
    static int32_t tokens[N];
    uint64_t fork[REPEATS], match[REPEATS];
    for (int s = 0; s < SEQS; s++) { /* 24 conversations of 8,192 tokens in the tree */
        kvl_seq_desc d = {.tokens = NULL};
        kvl_seq h;
        must(kvl_seq_open(c, &d, &h, NULL) == KVL_OK, "kvl_seq_open");
        for (int i = 0; i < N; i++) tokens[i] = i * 17 + s;
        for (int i = 0; i < N; i += 512) must(run_rows(c, h, tokens + i, 512), "kvl_step_begin");
        kvl_seq_close(c, h);
    }
    for (int i = 0; i < REPEATS; i++) {
        kvl_seq_desc d = {.tokens = tokens, .n_tokens = N};
        kvl_seq h, f;
        kvl_reuse reuse;
        for (int j = 0; j < N; j++) tokens[j] = j * 17 + i % SEQS;
        uint64_t t0 = kvli_clock_now();
        kvli_match m = kvli_match_find(c, &d);
        uint64_t t1 = kvli_clock_now();
        must(m.length >= N - 32, "kvli_match_find");
        match[i] = t1 - t0;
        kvl_seq_open(c, &d, &h, &reuse);
        uint64_t t2 = kvli_clock_now();
        samples[i] = t2 - t1;
        kvl_seq_fork(c, h, &f, NULL);
        fork[i] = kvli_clock_now() - t2;
        kvl_seq_close(c, f);
        kvl_seq_close(c, h);
    }
    report(b, "open on 8,192 cached tokens", "ns/token", N, 0);
    memcpy(samples, fork, sizeof samples);
    report(b, "fork of 8,192 tokens", "us", 1e3, 0);
    memcpy(samples, match, sizeof samples);
    report(b, "prefix match", "ns/token", N, 5);
    bench_map(b);
    kvl_cache_destroy(c);
}

/* ---- sealing ---- */
enum { TOKENS = 32, TILES = 16 };

typedef struct sealing {
    kvli_side side;
    kvl_simd simd;
    enum { COPY, WRITE, SEAL } what;
} sealing;

static float seal_rows[TILES][TOKENS * 128];
static uint8_t seal_exact[TILES][TOKENS * 128 * 4], seal_packed[TILES][TOKENS * 128 * 4];

static void seal_one(const sealing *w, uint32_t i) {
    const kvli_side *s = &w->side;
    if (w->what == COPY) memcpy(seal_packed[i], seal_exact[i], (size_t)s->tokens * s->dim * 2);
    if (w->what == WRITE)
        kvli_write_rows(KVL_F16, s->dim, seal_rows[i], KVL_DTYPE_F32, s->dim, s->tokens, seal_exact[i], 0,
                        w->simd);
    if (w->what == SEAL) kvli_seal_tile(s, KVL_F16, seal_exact[i], seal_packed[i], w->simd);
}

static void seal_report(bench *b, const sealing *w, const char *name) {
    char what[64];
    for (int r = 0; r < REPEATS; r++) {
        uint64_t t0 = kvli_clock_now();
        for (uint32_t i = 0; i < TILES; i++) seal_one(w, i);
        samples[r] = kvli_clock_now() - t0;
    }
    snprintf(what, sizeof what, "%s, %u x %u", name, w->side.tokens, w->side.dim);
    report(b, what, "ns/tile", TILES, 0);
}

static void bench_seal(bench *b) {
    static const char *const names[] = {"int8",      "int8_channel", "fp8_e4m3", "nvfp4",
                                        "nvfp4+rot", "int4",         "int4+rot", "int4_channel"};
    for (int i = 0; i < TILES; i++)
        for (int j = 0; j < TOKENS * 128; j++) seal_rows[i][j] = bench_noise();
    for (uint32_t dim = 64; dim <= 128; dim += 64) {
        sealing w = {
            .side = {.tokens = TOKENS, .dim = dim, .global = 1.0f / 16}, .simd = b->simd, .what = WRITE};
        seal_report(b, &w, "write");
        w.what = COPY;
        seal_report(b, &w, "memcpy");
        w.what = SEAL;
        for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
            char name[64];
            kvl_format f = kvl_format_from_name(names[i]);
            w.side.format = f & ~(kvl_format)KVL_ROTATED;
            w.side.rotated = w.side.format != f;
            snprintf(name, sizeof name, "seal %s", names[i]);
            seal_report(b, &w, name);
        }
    }
}

/* ---- capacity ---- */

/* Conversations of n tokens each that the cache takes in before its blocks end. */
static uint32_t conversations(const model_shape *m, const char *preset, uint32_t n_tokens) {
    static const int32_t tokens[512];
    kvl_cache *c = make_cache(m, preset, m->bytes, false);
    uint32_t count = 0, at = n_tokens;
    while (at == n_tokens) {
        kvl_seq seq;
        must(kvl_seq_open(c, &(kvl_seq_desc){.no_match = true}, &seq, NULL) == KVL_OK, "kvl_seq_open");
        for (at = 0; at < n_tokens;) {
            uint32_t rows = kvli_min_u32(n_tokens - at, 512);
            if (!run_rows(c, seq, tokens, rows)) break;
            at += rows;
        }
        count += at == n_tokens;
    }
    kvl_cache_destroy(c);
    return count;
}

/* What a contiguous F16 buffer for n tokens takes: what engines without pages set aside. */
static uint64_t reserved_bytes(const model_shape *m, uint32_t n_tokens) {
    return (uint64_t)2 * 2 * m->n_layers * m->n_kv_heads * m->dim * n_tokens;
}

static void bench_capacity(bench *b, const model_shape *m, uint32_t n_tokens, double target) {
    uint32_t n_presets, f16 = conversations(m, "f16", n_tokens);
    const kvl_preset *presets = kvl_presets(&n_presets);
    cJSON *row = cJSON_CreateObject();
    fprintf(b->table, "conversations of %u tokens in %.0f GiB, %s: f16 %u", n_tokens,
            (double)(m->bytes >> 30), m->name, f16);
    cJSON_AddStringToObject(row, "model", m->name);
    cJSON_AddNumberToObject(row, "tokens", n_tokens);
    cJSON_AddNumberToObject(row, "bytes", (double)m->bytes);
    cJSON_AddNumberToObject(row, "reserved", (double)(m->bytes / reserved_bytes(m, RESERVED_TOKENS)));
    cJSON_AddNumberToObject(row, "f16", f16);
    for (uint32_t i = 0; i < n_presets; i++) {
        if (presets[i].k == presets[i].exact) continue; /* f32, f16, bf16: nothing is packed */
        uint32_t count = conversations(m, presets[i].name, n_tokens);
        fprintf(b->table, "  %s %u (%.2f)", presets[i].name, count, (double)count / f16);
        cJSON_AddNumberToObject(row, presets[i].name, count);
        if (strcmp(presets[i].name, "int4") == 0) cJSON_AddNumberToObject(row, "ratio", (double)count / f16);
    }
    fprintf(b->table, "  target of int4 %g\n", target);
    cJSON_AddNumberToObject(row, "target", target);
    cJSON_AddItemToArray(b->capacity, row);
}

/* ---- the command line ---- */
typedef struct command {
    kvl_simd simd;
    const char *json;
    bool help;
} command;

static bool parse(command *k, int argc, char **argv, char *err, size_t n) {
    static const char *const paths[] = {"scalar", "avx2", "avx512"};
    args a = {.argc = argc, .argv = argv, .i = 1};
    const char *path = NULL;
    *k = (command){.simd = kvli_simd_best()};
    while (args_next(&a, err, n)) {
        bool ok = true;
        if (args_is(&a, "--json"))
            ok = args_value(&a, &k->json, err, n);
        else if (args_is(&a, "--simd"))
            ok = args_value(&a, &path, err, n);
        else if (args_is(&a, "-h") || args_is(&a, "--help"))
            k->help = true;
        else
            ok = llm_fail(err, n, "option '%s' is unknown", a.name);
        if (!ok) return false;
    }
    if (err[0] || !path) return !err[0];
    for (int i = 0; i < 3; i++) {
        if (strcmp(path, paths[i]) != 0) continue;
        bool there = KVL_SIMD_SCALAR + i <= (int)k->simd;
        k->simd = (kvl_simd)(KVL_SIMD_SCALAR + i);
        return there || llm_fail(err, n, "--simd %s: this processor has it not", path);
    }
    return llm_fail(err, n, "--simd '%.40s': scalar, avx2 or avx512", path);
}

static cJSON *results(const bench *b, double others) {
    static const char *const names[] = {"", "scalar", "avx2", "avx512"};
    cJSON *top = cJSON_CreateObject();
    cJSON_AddStringToObject(top, "bench", "core");
    cJSON_AddStringToObject(top, "simd", names[b->simd]);
    cJSON_AddNumberToObject(top, "others_share", others);
    cJSON_AddItemToObject(top, "rows", b->rows);
    cJSON_AddItemToObject(top, "capacity", b->capacity);
    return top;
}

int main(int argc, char **argv) {
    char err[LLM_ERR_LEN] = "";
    command k;
    if (!parse(&k, argc, argv, err, sizeof err)) {
        fprintf(stderr, "bench_core: %s (--help tells more)\n", err);
        return 2;
    }
    if (k.help) return fputs(usage, stdout) < 0;
    bench b = {.simd = k.simd, .table = bench_table(k.json)};
    b.rows = cJSON_CreateArray();
    b.capacity = cJSON_CreateArray();
    bench_load before = bench_load_now();
    bench_plan(&b);
    bench_alloc(&b);
    bench_prefix(&b);
    bench_seal(&b);
    for (int i = 0; i < 2; i++) {
        const model_shape *m = i ? &llama8b : &smollm2;
        bench_capacity(&b, m, 1000, 2.9);
        bench_capacity(&b, m, 4000, 3.2);
    }
    cJSON *top = results(&b, bench_others(&before));
    bool ok = !k.json || bench_write_json(top, k.json, err, sizeof err);
    cJSON_Delete(top);
    if (!ok) fprintf(stderr, "bench_core: %s\n", err);
    return !ok;
}
