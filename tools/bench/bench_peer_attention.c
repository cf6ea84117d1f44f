/* bench_peer_attention: attention of one layer on the CPU, kvlite's and ggml's, over the same keys and values with
 * the same number of threads, in turns. See --help. */
#include "attend_case.h"
#include "bench_json.h"
#include "ceiling.h"
#include "llm/options.h"
#include "peer.h"

enum { MAX_CONTENDERS = 20, MOST = 8, CELL_SECONDS = 20 };
#define END UINT32_MAX /* of a list */

static const char usage[] =
    "usage: bench_peer_attention [options]\n"
    "\n"
    "One layer, 8 KV heads, made-up keys and values, the same for all. decode: one new token after a\n"
    "context (16 tokens short of the named length, so that it ends inside a block); kvlite's time has\n"
    "the append in it, ggml's has not. prefill: 512 new tokens; kvlite's time has their append and\n"
    "sealing in it. ggml runs ggml_flash_attn_ext on keys and values that stand head by head (its best\n"
    "layout) and token by token, as llama.cpp's cache has them, there with llama.cpp's mask and padding\n"
    "to 256 tokens. Every round runs every contender once, each for a slice of time of which the best\n"
    "counts; ratios are taken within a round. error: root mean square against double precision,\n"
    "relative; 0.3 and more ends the run, since then the contenders did not compute the same.\n"
    "\n"
    "  --threads N     (default 2)\n"
    "  --rounds N      (default 5, at most 32)\n"
    "  --quick         fewer cells and 3 rounds\n"
    "  --only WHAT     decode or prefill\n"
    "  --d N, --gqa N, --context N, --kv PRESET   this one alone\n"
    "  --json FILE     also write the rows as JSON; - is stdout, the table then goes to stderr\n"
    "\n"
    "JSON: bench, backend, peer, threads, rounds, others_share (of the processors, taken by other\n"
    "programs), rows, each with what (decode, prefill), d, gqa, context (tokens before the new ones),\n"
    "new, kv (\"kvlite int8\", \"ggml q8_0 heads\", \"ggml q8_0 cache\"), bytes (of keys and values), us,\n"
    "us_min, us_max, gbs, error; kvlite's also peer, ratio, ratio_min, ratio_max (time of ggml's better\n"
    "layout in that format over its own) and cache_ratio, cache_ratio_min, cache_ratio_max (of\n"
    "llama.cpp's layout); decode rows of kvlite f16 also read_gbs, convert_gbs, ceiling_share,\n"
    "ceiling_share_min, ceiling_share_max.\n";

typedef struct cell {
    bool prefill;
    uint32_t dim, gqa, n_context, n_new;
} cell;

/* ---- ggml ---- */
typedef struct peer {
    enum ggml_type type;
    bool by_token; /* as llama.cpp's cache; else head by head */
    uint32_t threads;
    uint8_t *kv;
    size_t bytes; /* of K and V */
    struct ggml_context *ctx;
    struct ggml_cgraph *graph;
    struct ggml_cplan plan;
    void *mask;
    float *out;
} peer;

static const enum ggml_type peer_types[] = {GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0};

/* Keys or values of n tokens, every variant encoded once and copied to where the layout has it. */
static void peer_fill(const peer *p, const case_rows *r, int kv, uint32_t n, uint32_t n_room, uint8_t *at) {
    size_t row = ggml_row_size(p->type, r->dim);
    uint8_t *tiles = case_alloc(row * CASE_T * CASE_VARIANTS);
    for (int i = 0; i < CASE_VARIANTS; i++)
        ggml_quantize_chunk(p->type, r->tile[kv][i], tiles + i * CASE_T * row, 0, CASE_T, r->dim, NULL);
    for (uint32_t h = 0; h < CASE_KV_HEADS; h++)
        for (uint32_t t = 0; t < n; t++) {
            size_t to = p->by_token ? (size_t)t * CASE_KV_HEADS + h : (size_t)h * n_room + t;
            memcpy(at + to * row, tiles + (case_variant(t / CASE_T, h) * CASE_T + t % CASE_T) * row, row);
        }
    free(tiles);
}

/* Row i of the new ones sees the context and the new rows up to itself. */
static void *peer_mask(const cell *c, uint32_t n_room) {
    uint16_t *mask = case_alloc((size_t)n_room * c->n_new * sizeof *mask);
    for (uint32_t i = 0; i < c->n_new; i++)
        for (uint32_t t = 0; t < n_room; t++)
            mask[(size_t)i * n_room + t] = t <= c->n_context + i ? 0 : 0xfc00; /* F16: 0, -infinity */
    return mask;
}

static struct ggml_tensor *peer_tensor(const peer *p, void *data, uint32_t dim, uint32_t n_room) {
    struct ggml_tensor *t;
    if (!p->by_token) {
        t = ggml_new_tensor_3d(p->ctx, p->type, dim, n_room, CASE_KV_HEADS);
        t->data = data;
        return t;
    }
    t = ggml_new_tensor_2d(p->ctx, p->type, (int64_t)dim * CASE_KV_HEADS, n_room);
    t->data = data;
    t = ggml_view_3d(p->ctx, t, dim, CASE_KV_HEADS, n_room, ggml_row_size(p->type, dim),
                     ggml_row_size(p->type, (int64_t)dim * CASE_KV_HEADS), 0);
    return ggml_permute(p->ctx, t, 0, 2, 1, 3);
}

static void peer_open(peer *p, const case_rows *r, const cell *c, float *q) {
    uint32_t n = c->n_context + c->n_new, heads = CASE_KV_HEADS * c->gqa;
    bool padded = p->by_token || c->prefill;
    uint32_t n_room = padded ? (n + 255) / 256 * 256 : n;
    size_t side = ggml_row_size(p->type, r->dim) * CASE_KV_HEADS * n_room;
    p->bytes = 2 * side;
    p->kv = case_alloc(p->bytes);
    memset(p->kv, 0, p->bytes);
    peer_fill(p, r, 0, n, n_room, p->kv);
    peer_fill(p, r, 1, n, n_room, p->kv + side);
    p->ctx = ggml_init((struct ggml_init_params){.mem_size = 1 << 20, .no_alloc = true});
    struct ggml_tensor *k = peer_tensor(p, p->kv, r->dim, n_room),
                       *v = peer_tensor(p, p->kv + side, r->dim, n_room),
                       *rows = ggml_new_tensor_3d(p->ctx, GGML_TYPE_F32, r->dim, heads, c->n_new),
                       *mask = NULL;
    rows->data = q;
    if (padded) {
        mask = ggml_new_tensor_2d(p->ctx, GGML_TYPE_F16, n_room, c->n_new);
        mask->data = p->mask = peer_mask(c, n_room);
    }
    struct ggml_tensor *out = ggml_flash_attn_ext(p->ctx, ggml_permute(p->ctx, rows, 0, 2, 1, 3), k, v, mask,
                                                  1.0f / sqrtf((float)r->dim), 0, 0);
    out->data = p->out = case_alloc(ggml_nbytes(out));
    p->graph = ggml_new_graph(p->ctx);
    ggml_build_forward_expand(p->graph, out);
    p->plan = ggml_graph_plan(p->graph, (int)p->threads, NULL);
    p->plan.work_data = case_alloc(p->plan.work_size + 1);
}

static void peer_close(peer *p) {
    ggml_free(p->ctx);
    free(p->plan.work_data);
    free(p->mask);
    free(p->out);
    free(p->kv);
}

static double peer_attend(void *arg) {
    peer *p = arg;
    double start = runtime_now();
    if (ggml_graph_compute(p->graph, &p->plan) != GGML_STATUS_SUCCESS)
        case_die("ggml_graph_compute", "failed");
    return runtime_now() - start;
}

/* ---- one cell ---- */
typedef struct contender {
    char name[40];
    const kvl_preset *preset; /* NULL: ggml */
    case_cache kv;
    peer peer;
    rounds us;
    double error;
} contender;

typedef struct bench {
    uint32_t threads, n_rounds;
    double slice; /* seconds of one contender in one round */
    const char *only_kv;
    pool *pool;
    kvl_context *ctx;
    FILE *table;
    cJSON *json_rows;
    case_rows rows;
    contender all[MAX_CONTENDERS]; /* kvlite's, then ggml's */
    uint32_t n, first_peer;
    rounds read, convert; /* GB/s */
} bench;

static size_t contender_bytes(const contender *c) { return c->preset ? c->kv.bytes : c->peer.bytes; }

/* Prefill of presets that differ little in it is left out: it takes minutes. */
static bool takes_part(const bench *b, const cell *c, const char *preset) {
    if (b->only_kv) return strcmp(preset, b->only_kv) == 0;
    return !c->prefill || !strcmp(preset, "f16") || !strcmp(preset, "int8") || !strcmp(preset, "int4");
}

static void open_contenders(bench *b, const cell *c, float *q) {
    uint32_t n_presets;
    const kvl_preset *presets = kvl_presets(&n_presets);
    b->n = 0;
    for (uint32_t i = 0; i < n_presets; i++) {
        if (!takes_part(b, c, presets[i].name)) continue;
        contender *t = &b->all[b->n++];
        *t = (contender){.preset = &presets[i]};
        snprintf(t->name, sizeof t->name, "kvlite %s", presets[i].name);
        case_open(&t->kv, b->ctx, &b->rows, &presets[i], c->gqa, c->n_context, c->n_new, q);
    }
    b->first_peer = b->n;
    for (int i = 0; i < 6; i++) {
        if (c->prefill && i > 2 && i % 2)
            continue; /* Q8_0 and Q4_0 take seconds; their better layout is enough */
        contender *t = &b->all[b->n++];
        *t = (contender){.peer = {.type = peer_types[i / 2], .by_token = i % 2, .threads = b->threads}};
        snprintf(t->name, sizeof t->name, "ggml %s %s", ggml_type_name(t->peer.type),
                 i % 2 ? "cache" : "heads");
        peer_open(&t->peer, &b->rows, c, q);
    }
}

static void run_rounds(bench *b, const cell *c) {
    static uint8_t warm[16384] __attribute__((aligned(64)));
    const contender *f16 =
        &b->all[b->n - 6]; /* ggml's F16, in one piece: what reading the same bytes takes */
    double start = runtime_now();
    b->read.n = b->convert.n = 0;
    for (uint32_t r = 0; r < b->n_rounds && (r < 2 || runtime_now() - start < CELL_SECONDS); r++) {
        for (uint32_t i = 0; i < b->n; i++) {
            contender *t = &b->all[i];
            bench_settle();
            double s = t->preset ? bench_best(case_attend, &t->kv, b->slice)
                                 : bench_best(peer_attend, &t->peer, b->slice);
            rounds_add(&t->us, s * 1e6);
        }
        if (c->prefill) continue;
        bench_settle();
        rounds_add(&b->read,
                   ceiling_rate(b->pool, KVL_SIMD_AUTO, f16->peer.kv, f16->peer.bytes, 0, b->slice));
        rounds_add(&b->convert, ceiling_rate(b->pool, KVL_SIMD_AUTO, warm, sizeof warm, c->gqa, b->slice));
    }
}

/* ggml's formats that stand against a preset of kvlite: as many bits, or the next fewer. */
static bool stands_against(const char *preset, enum ggml_type type) {
    bool four = !strcmp(preset, "int4") || !strcmp(preset, "nvfp4"), mixed = !strcmp(preset, "balanced");
    bool sixteen = !strcmp(preset, "f32") || !strcmp(preset, "f16") || !strcmp(preset, "bf16");
    if (type == GGML_TYPE_F16) return sixteen;
    if (type == GGML_TYPE_Q4_0) return four || mixed;
    return !four && !sixteen;
}

/* The fastest in each round of the peers of a preset; by_token: in llama.cpp's layout alone. */
static rounds peer_best(const bench *b, const char *preset, bool by_token, char *names, size_t size) {
    rounds best = {.n = 0};
    names[0] = 0;
    for (uint32_t i = 0; i < b->n; i++) {
        const contender *t = &b->all[i];
        if (t->preset || !stands_against(preset, t->peer.type) || (by_token && !t->peer.by_token)) continue;
        if (!strstr(names, ggml_type_name(t->peer.type)))
            snprintf(names + strlen(names), size - strlen(names), "%s%s", names[0] ? "/" : "ggml ",
                     ggml_type_name(t->peer.type));
        for (uint32_t r = 0; r < t->us.n; r++) {
            if (r == best.n)
                rounds_add(&best, t->us.at[r]);
            else if (t->us.at[r] < best.at[r])
                best.at[r] = t->us.at[r];
        }
    }
    return best;
}

static cJSON *json_row(const cell *c, const contender *t, spread us) {
    cJSON *row = cJSON_CreateObject();
    cJSON_AddStringToObject(row, "what", c->prefill ? "prefill" : "decode");
    cJSON_AddNumberToObject(row, "d", c->dim);
    cJSON_AddNumberToObject(row, "gqa", c->gqa);
    cJSON_AddNumberToObject(row, "context", c->n_context);
    cJSON_AddNumberToObject(row, "new", c->n_new);
    cJSON_AddStringToObject(row, "kv", t->name);
    cJSON_AddNumberToObject(row, "bytes", (double)contender_bytes(t));
    bench_json_spread(row, "us", us);
    if (!c->prefill) cJSON_AddNumberToObject(row, "gbs", (double)contender_bytes(t) / us.median * 1e-3);
    cJSON_AddNumberToObject(row, "error", t->error);
    return row;
}

/* The part of the lesser ceiling that kvlite's F16 reaches. */
static void report_ceiling(bench *b, const contender *t, cJSON *row, char *text, size_t size) {
    rounds share = {.n = 0};
    for (uint32_t r = 0; r < t->us.n; r++) {
        double least = b->read.at[r] < b->convert.at[r] ? b->read.at[r] : b->convert.at[r];
        rounds_add(&share, (double)t->kv.bytes / t->us.at[r] * 1e-3 / least);
    }
    spread s = rounds_spread(&share), read = rounds_spread(&b->read), convert = rounds_spread(&b->convert);
    cJSON_AddNumberToObject(row, "read_gbs", read.median);
    cJSON_AddNumberToObject(row, "convert_gbs", convert.median);
    bench_json_spread(row, "ceiling_share", s);
    snprintf(text, size, "  %3.0f%% of %.1f (%s)", 100 * s.median,
             read.median < convert.median ? read.median : convert.median,
             read.median < convert.median ? "read" : "convert");
}

static void report_ratio(FILE *table, cJSON *row, const char *key, const rounds *peer, const rounds *us) {
    spread s = rounds_ratio(peer, us);
    if (peer->n) bench_json_spread(row, key, s);
    if (peer->n)
        fprintf(table, "  %6.2f (%5.2f-%5.2f)", s.median, s.least, s.most);
    else
        fprintf(table, "  %20s", "");
}

static void report_one(bench *b, const cell *c, const contender *t) {
    spread us = rounds_spread(&t->us);
    cJSON *row = json_row(c, t, us);
    char peers[64], text[64] = "";
    if (!c->prefill) snprintf(text, sizeof text, "%.2f", (double)contender_bytes(t) / us.median * 1e-3);
    fprintf(b->table, "%-7s %4u %4u %6u  %-16s %10.1f %7s %8.5f", c->prefill ? "prefill" : "decode", c->dim,
            c->gqa, c->n_context, t->name, us.median, text, t->error);
    if (t->preset) {
        rounds cache = peer_best(b, t->preset->name, true, peers, sizeof peers);
        rounds best = peer_best(b, t->preset->name, false, peers, sizeof peers);
        text[0] = 0;
        cJSON_AddStringToObject(row, "peer", peers);
        report_ratio(b->table, row, "ratio", &best, &t->us);
        report_ratio(b->table, row, "cache_ratio", &cache, &t->us);
        if (!c->prefill && strcmp(t->preset->name, "f16") == 0) report_ceiling(b, t, row, text, sizeof text);
        fprintf(b->table, "  %s%s", peers, text);
    }
    fprintf(b->table, "\n");
    fflush(b->table);
    cJSON_AddItemToArray(b->json_rows, row);
}

static void run_cell(bench *b, const cell *c) {
    uint32_t n_floats = c->n_new * CASE_KV_HEADS * c->gqa * c->dim;
    float *q = case_alloc(n_floats * sizeof(float));
    case_queries(n_floats, q);
    if (b->rows.dim != c->dim) case_rows_make(&b->rows, c->dim);
    open_contenders(b, c, q);
    run_rounds(b, c);
    for (uint32_t i = 0; i < b->n; i++) {
        contender *t = &b->all[i];
        t->error =
            case_error(&b->rows, c->gqa, c->n_context, c->n_new, q, t->preset ? t->kv.out : t->peer.out);
        if (!(t->error < CASE_MOST_ERROR)) case_die(t->name, "its result is not that of the others");
        report_one(b, c, t);
    }
    for (uint32_t i = 0; i < b->n; i++) {
        if (b->all[i].preset)
            case_close(&b->all[i].kv);
        else
            peer_close(&b->all[i].peer);
    }
    free(q);
}

/* ---- the command line ---- */
typedef struct plan {
    uint32_t dims[MOST], gqas[MOST], contexts[MOST], prefill_gqas[MOST],
        prefill_contexts[MOST]; /* END after each */
    bool decode, prefill;
} plan;

static const plan whole = {.dims = {64, 128, END},
                           .gqas = {1, 4, 8, END},
                           .contexts = {1024, 4096, 16384, 65536, END},
                           .prefill_gqas = {4, END},
                           .prefill_contexts = {0, 4096, END},
                           .decode = true,
                           .prefill = true};
static const plan quick = {.dims = {128, END},
                           .gqas = {1, 4, END},
                           .contexts = {1024, 16384, END},
                           .prefill_gqas = {4, END},
                           .prefill_contexts = {0, END},
                           .decode = true,
                           .prefill = true};

static void run_plan(bench *b, const plan *p) {
    fprintf(b->table, "%-7s %4s %4s %6s  %-16s %10s %7s %8s  %-20s  %-20s  %s\n", "", "D", "GQA", "tokens",
            "", "us", "GB/s", "error", "x ggml (best layout)", "x llama.cpp's layout",
            "ceiling of F16, GB/s");
    for (const uint32_t *d = p->dims; *d != END; d++) {
        for (const uint32_t *n = p->contexts; p->decode && *n != END; n++)
            for (const uint32_t *g = p->gqas; *g != END; g++)
                run_cell(b, &(cell){.dim = *d, .gqa = *g, .n_context = *n - CASE_T / 2 - 1, .n_new = 1});
        for (const uint32_t *n = p->prefill_contexts; p->prefill && *n != END; n++)
            for (const uint32_t *g = p->prefill_gqas; *g != END; g++)
                run_cell(b, &(cell){.prefill = true, .dim = *d, .gqa = *g, .n_context = *n, .n_new = 512});
    }
}

static bool only(args *a, uint32_t list[MOST], uint64_t least, uint64_t most, char *err, size_t n) {
    uint64_t v;
    if (!args_u64(a, least, most, &v, err, n)) return false;
    list[0] = (uint32_t)v;
    list[1] = END;
    return true;
}

typedef struct command {
    plan plan;
    uint64_t threads, rounds;
    const char *json;
    bool quick, help;
} command;

static bool parse_one(command *k, bench *b, args *a, char *err, size_t n) {
    const char *what;
    if (args_is(a, "--threads")) return args_u64(a, 1, CEILING_MAX_SLICES, &k->threads, err, n);
    if (args_is(a, "--rounds")) return args_u64(a, 1, BENCH_MAX_ROUNDS, &k->rounds, err, n);
    if (args_is(a, "--json")) return args_value(a, &k->json, err, n);
    if (args_is(a, "--d")) return only(a, k->plan.dims, 64, CASE_MAX_DIM, err, n);
    if (args_is(a, "--context"))
        return only(a, k->plan.contexts, 64, 1 << 20, err, n) &&
               memcpy(k->plan.prefill_contexts, k->plan.contexts, sizeof k->plan.contexts);
    if (args_is(a, "--gqa"))
        return only(a, k->plan.gqas, 1, CASE_MAX_GQA, err, n) &&
               memcpy(k->plan.prefill_gqas, k->plan.gqas, sizeof k->plan.gqas);
    if (args_is(a, "--kv")) {
        if (!args_value(a, &b->only_kv, err, n)) return false;
        return kvl_preset_find(b->only_kv) || llm_fail(err, n, "--kv '%.40s': no such preset", b->only_kv);
    }
    if (args_is(a, "--only")) {
        if (!args_value(a, &what, err, n)) return false;
        k->plan.decode = strcmp(what, "decode") == 0;
        k->plan.prefill = strcmp(what, "prefill") == 0;
        return k->plan.decode || k->plan.prefill ||
               llm_fail(err, n, "--only '%.40s': decode or prefill", what);
    }
    return llm_fail(err, n, "option '%s' is unknown", a->name);
}

static bool parse(command *k, bench *b, int argc, char **argv, char *err, size_t n) {
    args a = {.argc = argc, .argv = argv, .i = 1};
    *k = (command){.plan = whole, .threads = 2, .rounds = 5};
    for (int i = 1; i < argc; i++) /* first, since the others narrow what it chose */
        if (strcmp(argv[i], "--quick") == 0) k->plan = quick, k->rounds = 3;
    while (args_next(&a, err, n)) {
        if (args_is(&a, "-h") || args_is(&a, "--help"))
            k->help = true;
        else if (!args_is(&a, "--quick") && !parse_one(k, b, &a, err, n))
            return false;
    }
    return !err[0];
}

static bool write_json(const bench *b, const char *path, cJSON *rows, double others, char *err, size_t n) {
    cJSON *top = cJSON_CreateObject();
    cJSON_AddStringToObject(top, "bench", "attention");
    cJSON_AddStringToObject(top, "backend", kvl_context_backend(b->ctx));
    char peer_name[64];
    snprintf(peer_name, sizeof peer_name, "llama.cpp %s (ggml %s)", llama_version(), ggml_version());
    cJSON_AddStringToObject(top, "peer", peer_name);
    cJSON_AddNumberToObject(top, "threads", b->threads);
    cJSON_AddNumberToObject(top, "rounds", b->n_rounds);
    cJSON_AddNumberToObject(top, "others_share", others);
    cJSON_AddItemToObject(top, "rows", rows);
    bool ok = bench_write_json(top, path, err, n);
    cJSON_Delete(top);
    return ok;
}

int main(int argc, char **argv) {
    static bench b;
    static command k;
    char err[LLM_ERR_LEN] = "";
    if (!parse(&k, &b, argc, argv, err, sizeof err)) {
        fprintf(stderr, "bench_peer_attention: %s (--help tells more)\n", err);
        return 2;
    }
    if (k.help) return fputs(usage, stdout) < 0;
    b.threads = (uint32_t)k.threads;
    b.n_rounds = (uint32_t)k.rounds;
    b.slice = 0.01;
    b.table = bench_table(k.json);
    b.json_rows = cJSON_CreateArray();
    b.pool = pool_create(b.threads);
    kvl_context_desc d = {.backend = KVL_BACKEND_CPU,
                          .n_threads = b.threads,
                          .parallel_for = pool_parallel_for,
                          .user = b.pool,
                          .error = err,
                          .error_size = sizeof err};
    if (!b.pool || kvl_context_create(&d, &b.ctx) != KVL_OK) case_die("bench_peer_attention", err);
    bench_load before = bench_load_now();
    run_plan(&b, &k.plan);
    double others = bench_others(&before);
    bool ok = !k.json || write_json(&b, k.json, b.json_rows, others, err, sizeof err);
    if (!ok) fprintf(stderr, "bench_peer_attention: %s\n", err);
    kvl_context_destroy(b.ctx);
    pool_destroy(b.pool);
    return !ok;
}
