/* bench_peer_llm: a whole model with kvlite and with llama.cpp, the same tokens, threads and greedy choice, in turns. See
 * --help. */
#include "bench_json.h"
#include "llm/options.h"
#include "peer.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { STREAMS = 8, FIRST = 8, MOST_ROWS = 24 };

static const char usage[] =
    "usage: bench_peer_llm [options]\n"
    "\n"
    "Runs the same scenes with kvlite (examples/llm, its scheduler) and llama.cpp (a loop like its\n"
    "server's: one token of every running stream and then as much of waiting prompts as n_batch 2048\n"
    "leaves, in pieces of n_ubatch 512), each at its default cache format. Every round runs each scene\n"
    "with both; ratios are taken within a round.\n"
    "\n"
    "  prefill         a prompt of 1,024 tokens: tokens/s until its first answer token\n"
    "  one stream      after a prompt of 64 tokens: tokens/s of the next 96\n"
    "  eight streams   prompts of 160 tokens, 48 new ones each: tokens/s of answers from when all have\n"
    "                  begun (decode), and over all of the time (whole)\n"
    "  shared prefix   the same, behind a prefix of 768 tokens that all share; kvlite finds it,\n"
    "                  llama.cpp is told (llama_memory_seq_cp in a unified cache)\n"
    "  gaps            seven streams write when a prompt of 4,000 tokens comes: longest wait of a\n"
    "                  stream for a token until the prompt is answered (ms), and the time to its first\n"
    "                  token (s)\n"
    "  bytes           of KV for one conversation of 1,000 and of 4,000 tokens: kvlite's pages;\n"
    "                  llama.cpp's room for the 4,096 tokens that every conversation could grow to\n"
    "\n"
    "  -m FILE         (default build/models/SmolLM2-135M-Instruct.Q4_1.gguf)\n"
    "  -f TEXT         where prompts are cut from (default ../shared/data/alice29.txt)\n"
    "  --threads N     (default 2)\n"
    "  --rounds N      (default 3, at most 32)\n"
    "  --quick         one round, shorter prompts\n"
    "  --kv PRESET     of kvlite (default int8)\n"
    "  --max-gap-ms N  of kvlite's scheduler in the scene gaps (default 50)\n"
    "  --json FILE     also write the figures as JSON; - is stdout, the table then goes to stderr\n"
    "\n"
    "JSON: bench, model, peer, threads, rounds, others_share (of the processors, taken by other\n"
    "programs), kv, max_gap_ms, rows, each with what, unit, better (higher, lower), kvlite, kvlite_min,\n"
    "kvlite_max, peer, peer_min, peer_max, ratio, ratio_min, ratio_max (above 1: kvlite is better).\n";

/* ---- scenes ---- */
typedef struct scene {
    const char *name;
    uint32_t n_streams;
    const int32_t *prompt[STREAMS];
    uint32_t n_prompt[STREAMS], n_new;
    uint32_t n_shared; /* tokens at the start that all prompts have in common */
    bool last_is_late; /* it comes after LATE_AFTER tokens of the others; its first token ends all */
    double max_gap_ms;
} scene;

enum { LATE_AFTER = 10 };

typedef struct stream {
    int32_t first[FIRST]; /* tokens */
    uint32_t n;
    double first_s, last_s, gap_s; /* times of tokens; longest wait since the late prompt came */
} stream;

typedef struct outcome {
    stream stream[STREAMS];
    double start_s, end_s, late_s; /* late_s: when the late prompt came, 0 before */
} outcome;

static void outcome_token(outcome *o, uint32_t i, int32_t token) {
    stream *s = &o->stream[i];
    double now = runtime_now();
    if (s->n < FIRST) s->first[s->n] = token;
    if (s->n == 0) s->first_s = now;
    if (s->n > 0 && o->late_s > 0 && now - s->last_s > s->gap_s) s->gap_s = now - s->last_s;
    s->last_s = o->end_s = now;
    s->n++;
}

static bool late_is_due(const scene *c, const outcome *o) {
    for (uint32_t i = 0; i + 1 < c->n_streams; i++)
        if (o->stream[i].n < LATE_AFTER) return false;
    return c->last_is_late && o->late_s == 0;
}

static bool scene_over(const scene *c, const outcome *o) {
    if (c->last_is_late) return o->stream[c->n_streams - 1].n > 0;
    for (uint32_t i = 0; i < c->n_streams; i++)
        if (o->stream[i].n < c->n_new) return false;
    return true;
}

static int32_t greedy(const float *logits, uint32_t n) {
    uint32_t best = 0;
    for (uint32_t i = 1; i < n; i++)
        if (logits[i] > logits[best]) best = i;
    return (int32_t)best;
}

/* ---- kvlite ---- */
typedef struct ours {
    runtime rt;
    const char *preset;
    outcome *o;
} ours;

static kvl_output ours_token(void *user, const kvl_step *step, uint32_t i, const float *logits) {
    ours *u = user;
    kvl_output out = {.token = greedy(logits, u->rt.config->n_vocab)};
    outcome_token(u->o, (uint32_t)(uintptr_t)step->logit_users[i], out.token);
    return out;
}

static bool ours_submit(kvl_sched *sched, const scene *c, uint32_t i, char *err, size_t n) {
    kvl_request r = {.tokens = c->prompt[i],
                     .n_tokens = c->n_prompt[i],
                     .max_new_tokens = c->n_new,
                     .user = (void *)(uintptr_t)i};
    kvl_req handle;
    kvl_result k = kvl_sched_submit(sched, &r, &handle);
    return k == KVL_OK || llm_fail(err, n, "kvl_sched_submit: %s", kvl_result_text(k));
}

static bool ours_loop(ours *u, kvl_cache *cache, kvl_sched *sched, const scene *c, outcome *o, char *err,
                      size_t n) {
    uint32_t now = c->n_streams - c->last_is_late;
    for (uint32_t i = 0; i < now; i++)
        if (!ours_submit(sched, c, i, err, n)) return false;
    while (!scene_over(c, o)) {
        if (late_is_due(c, o)) {
            o->late_s = runtime_now();
            if (!ours_submit(sched, c, now, err, n)) return false;
        }
        kvl_result r = runtime_step(&u->rt, cache, sched, ours_token, u, err, n);
        if (r < 0) return false;
        if (r != KVL_OK) return llm_fail(err, n, "kvlite had nothing to run");
    }
    return true;
}

static bool ours_run(ours *u, const scene *c, outcome *o, char *err, size_t n) {
    kvl_cache *cache;
    kvl_sched *sched = NULL;
    runtime_cache_desc d = {.preset = u->preset, .n_sequences = c->n_streams};
    for (uint32_t i = 0; i < c->n_streams; i++)
        if (c->n_prompt[i] + c->n_new > d.seq_tokens) d.seq_tokens = c->n_prompt[i] + c->n_new;
    *o = (outcome){.start_s = 0};
    u->o = o;
    if (!runtime_cache(&u->rt, &d, &cache, err, n)) return false;
    bool ok = kvl_sched_create(cache, &(kvl_sched_desc){.max_gap_ms = c->max_gap_ms}, &sched) == KVL_OK ||
              llm_fail(err, n, "kvl_sched_create: %s", kvl_last_error(cache));
    o->start_s = runtime_now();
    ok = ok && ours_loop(u, cache, sched, c, o, err, n);
    kvl_sched_destroy(sched);
    kvl_cache_destroy(cache);
    return ok;
}

/* ---- llama.cpp ---- */
typedef struct theirs {
    struct llama_model *model;
    uint32_t threads, n_vocab;
} theirs;

static void theirs_log(enum ggml_log_level level, const char *text, void *user) {
    (void)user;
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

/* A context for sequences of so many tokens each. unified: one buffer for all, in which a prefix can be shared. */
static struct llama_context *theirs_context(const theirs *t, uint32_t n_seq, uint32_t seq_tokens,
                                            bool unified) {
    struct llama_context_params p = llama_context_default_params(); /* n_batch 2048, n_ubatch 512, F16 */
    p.n_ctx = n_seq * ((seq_tokens + 255) / 256 * 256);
    p.n_seq_max = n_seq;
    p.n_threads = p.n_threads_batch = (int32_t)t->threads;
    p.kv_unified = unified;
    return llama_init_from_model(t->model, p);
}

static void batch_add(struct llama_batch *b, int32_t token, uint32_t pos, uint32_t seq, bool logits) {
    int32_t i = b->n_tokens++;
    b->token[i] = token;
    b->pos[i] = (llama_pos)pos;
    b->n_seq_id[i] = 1;
    b->seq_id[i][0] = (llama_seq_id)seq;
    b->logits[i] = logits;
}

typedef struct theirs_run {
    struct llama_context *ctx;
    struct llama_batch batch;
    uint32_t n_done[STREAMS]; /* tokens of a stream that are in the cache */
    int32_t next[STREAMS];    /* its latest token, not in the cache yet */
    int32_t row[STREAMS];     /* of its logits in the batch, -1: none */
} theirs_run;

static bool theirs_decode(theirs_run *r, char *err, size_t n) {
    int32_t code = llama_decode(r->ctx, r->batch);
    return code == 0 || llm_fail(err, n, "llama_decode: %d", (int)code);
}

/* The shared part once, then as every sequence's. */
static bool theirs_share(theirs_run *r, const scene *c, char *err, size_t n) {
    if (!c->n_shared) return true;
    r->batch.n_tokens = 0;
    for (uint32_t i = 0; i < c->n_shared; i++) batch_add(&r->batch, c->prompt[0][i], i, 0, false);
    if (!theirs_decode(r, err, n)) return false;
    for (uint32_t s = 0; s < c->n_streams; s++) {
        if (s > 0)
            llama_memory_seq_cp(llama_get_memory(r->ctx), 0, (llama_seq_id)s, 0, (llama_pos)c->n_shared);
        r->n_done[s] = c->n_shared;
    }
    return true;
}

/* One token of every stream that writes, then as much of the prompts as the batch takes. */
static void theirs_fill(theirs_run *r, const scene *c, const outcome *o) {
    uint32_t n_batch = llama_n_batch(r->ctx), late = c->last_is_late && o->late_s == 0;
    r->batch.n_tokens = 0;
    for (uint32_t s = 0; s < c->n_streams; s++) {
        r->row[s] = -1;
        if (o->stream[s].n == 0 || o->stream[s].n >= c->n_new) continue;
        r->row[s] = r->batch.n_tokens;
        batch_add(&r->batch, r->next[s], r->n_done[s]++, s, true);
    }
    for (uint32_t s = 0; s < c->n_streams - late; s++)
        while (r->n_done[s] < c->n_prompt[s] && (uint32_t)r->batch.n_tokens < n_batch) {
            bool last = r->n_done[s] + 1 == c->n_prompt[s];
            if (last) r->row[s] = r->batch.n_tokens;
            batch_add(&r->batch, c->prompt[s][r->n_done[s]], r->n_done[s], s, last);
            r->n_done[s]++;
        }
}

static bool theirs_loop(const theirs *t, theirs_run *r, const scene *c, outcome *o, char *err, size_t n) {
    if (!theirs_share(r, c, err, n)) return false;
    while (!scene_over(c, o)) {
        if (late_is_due(c, o)) o->late_s = runtime_now();
        theirs_fill(r, c, o);
        if (!theirs_decode(r, err, n)) return false;
        for (uint32_t s = 0; s < c->n_streams; s++) {
            if (r->row[s] < 0) continue;
            r->next[s] = greedy(llama_get_logits_ith(r->ctx, r->row[s]), t->n_vocab);
            outcome_token(o, s, r->next[s]);
        }
    }
    return true;
}

static bool theirs_run_scene(const theirs *t, const scene *c, outcome *o, char *err, size_t n) {
    theirs_run r = {.ctx = NULL};
    uint32_t most = 0;
    for (uint32_t i = 0; i < c->n_streams; i++)
        if (c->n_prompt[i] + c->n_new > most) most = c->n_prompt[i] + c->n_new;
    *o = (outcome){.start_s = 0};
    r.ctx = theirs_context(t, c->n_streams, most, c->n_shared > 0 || c->last_is_late);
    if (!r.ctx) return llm_fail(err, n, "llama_init_from_model failed");
    r.batch = llama_batch_init((int32_t)llama_n_batch(r.ctx), 0, 1);
    o->start_s = runtime_now();
    bool ok = theirs_loop(t, &r, c, o, err, n);
    llama_batch_free(r.batch);
    llama_free(r.ctx);
    return ok;
}

/* ---- figures ---- */
typedef struct row {
    const char *what, *unit;
    bool lower; /* is better */
    rounds ours, theirs;
} row;

typedef struct bench {
    ours ours;
    theirs theirs;
    uint32_t threads, n_rounds;
    double max_gap_ms;
    bool quick;
    FILE *table;
    token_list text;
    row rows[MOST_ROWS];
    uint32_t n_rows;
} bench;

static void add(bench *b, const char *what, const char *unit, bool lower, double our, double their) {
    uint32_t i = 0;
    while (i < b->n_rows && strcmp(b->rows[i].what, what) != 0) i++;
    if (i == MOST_ROWS) return;
    if (i == b->n_rows) b->rows[b->n_rows++] = (row){.what = what, .unit = unit, .lower = lower};
    rounds_add(&b->rows[i].ours, our);
    rounds_add(&b->rows[i].theirs, their);
}

/* When every stream had begun. */
static double all_begun(const scene *c, const outcome *o) {
    double t = 0;
    for (uint32_t i = 0; i < c->n_streams; i++)
        if (o->stream[i].first_s > t) t = o->stream[i].first_s;
    return t;
}

static double prefill_rate(const scene *c, const outcome *o) {
    return c->n_prompt[0] / (o->stream[0].first_s - o->start_s);
}

/* Tokens a second of the streams from when all had begun; what they wrote before is taken as spread evenly. */
static double decode_rate(const scene *c, const outcome *o) {
    double begun = all_begun(c, o), tokens = 0;
    for (uint32_t i = 0; i < c->n_streams; i++) {
        const stream *s = &o->stream[i];
        tokens += (s->n - 1) * (s->last_s - begun) / (s->last_s - s->first_s);
    }
    return tokens / (o->end_s - begun);
}

static double whole_rate(const scene *c, const outcome *o) {
    return (double)c->n_streams * c->n_new / (o->end_s - o->start_s);
}

static double longest_gap_ms(const scene *c, const outcome *o) {
    double gap = 0;
    for (uint32_t i = 0; i + 1 < c->n_streams; i++)
        if (o->stream[i].gap_s > gap) gap = o->stream[i].gap_s;
    return gap * 1e3;
}

static double late_first_s(const scene *c, const outcome *o) {
    return o->stream[c->n_streams - 1].first_s - o->late_s;
}

static void add_figures(bench *b, const scene *c, const outcome *our, const outcome *their) {
    if (c->last_is_late) {
        add(b, "longest gap", "ms", true, longest_gap_ms(c, our), longest_gap_ms(c, their));
        add(b, "late prompt's first token", "s", true, late_first_s(c, our), late_first_s(c, their));
    } else if (c->n_new == 1) {
        add(b, "prefill", "tokens/s", false, prefill_rate(c, our), prefill_rate(c, their));
    } else if (c->n_streams == 1) {
        add(b, "one stream", "tokens/s", false, decode_rate(c, our), decode_rate(c, their));
    } else if (c->n_shared) {
        add(b, "shared prefix, decode", "tokens/s", false, decode_rate(c, our), decode_rate(c, their));
        add(b, "shared prefix, whole", "tokens/s", false, whole_rate(c, our), whole_rate(c, their));
    } else {
        add(b, "eight streams, decode", "tokens/s", false, decode_rate(c, our), decode_rate(c, their));
        add(b, "eight streams, whole", "tokens/s", false, whole_rate(c, our), whole_rate(c, their));
    }
}

/* Both must write nearly the same: the first tokens agree, but for formats and roundings that tip a close choice. */
static bool same_answers(const scene *c, const outcome *a, const outcome *b, char *err, size_t n) {
    uint32_t same = 0;
    for (uint32_t i = 0; i < c->n_streams; i++) same += a->stream[i].first[0] == b->stream[i].first[0];
    return same * 2 >= c->n_streams || llm_fail(err, n, "%s: only %u of %u answers begin with the same token",
                                                c->name, same, c->n_streams);
}

static bool run_scene(bench *b, const scene *c, char *err, size_t n) {
    static outcome our, their;
    fprintf(stderr, "  %s\n", c->name);
    bench_settle();
    if (!ours_run(&b->ours, c, &our, err, n)) return false;
    bench_settle();
    if (!theirs_run_scene(&b->theirs, c, &their, err, n) || !same_answers(c, &our, &their, err, n))
        return false;
    add_figures(b, c, &our, &their);
    return true;
}

/* ---- prompts, cut from a text ---- */
static const int32_t *text_at(const bench *b, uint32_t at) { return b->text.ids + at; }

static void joined_prompts(const bench *b, uint32_t n_shared, uint32_t n_own, int32_t *room, scene *c) {
    for (uint32_t i = 0; i < c->n_streams; i++) {
        int32_t *p = room + (size_t)i * (n_shared + n_own);
        memcpy(p, text_at(b, 0), n_shared * sizeof *p);
        memcpy(p + n_shared, text_at(b, n_shared + 300 * (i + 1)), n_own * sizeof *p);
        c->prompt[i] = p;
        c->n_prompt[i] = n_shared + n_own;
    }
}

static bool run_round(bench *b, char *err, size_t n) {
    static int32_t room[STREAMS * 1024];
    uint32_t half = b->quick ? 2 : 1;
    scene prefill = {.name = "prefill", .n_streams = 1, .n_new = 1};
    joined_prompts(b, 0, 1024 / half, room, &prefill);
    if (!run_scene(b, &prefill, err, n)) return false;
    scene one = {.name = "one stream", .n_streams = 1, .n_new = 96 / half + 1};
    joined_prompts(b, 0, 64, room, &one);
    if (!run_scene(b, &one, err, n)) return false;
    scene eight = {.name = "eight streams", .n_streams = STREAMS, .n_new = 48 / half};
    joined_prompts(b, 0, 160 / half, room, &eight);
    if (!run_scene(b, &eight, err, n)) return false;
    scene shared = {
        .name = "shared prefix", .n_streams = STREAMS, .n_new = 48 / half, .n_shared = 768 / half};
    joined_prompts(b, shared.n_shared, 160 / half, room, &shared);
    if (!run_scene(b, &shared, err, n)) return false;
    scene gaps = {.name = "gaps",
                  .n_streams = STREAMS,
                  .n_new = 400,
                  .last_is_late = true,
                  .max_gap_ms = b->max_gap_ms};
    joined_prompts(b, 0, 96, room, &gaps);
    gaps.prompt[STREAMS - 1] = text_at(b, 3000);
    gaps.n_prompt[STREAMS - 1] = 4000;
    return run_scene(b, &gaps, err, n);
}

/* ---- bytes of a conversation ---- */

/* What the pages of one conversation of n tokens take: counted in a cache that holds it (null backend: no model is
 * run). 0: the cache could not be made. */
static uint64_t paged_bytes(const bench *b, const char *preset, uint32_t n_tokens) {
    static const int32_t tokens[512];
    const model_config *m = b->ours.rt.config;
    kvl_cache_desc d = {.geometry = {.n_layers = m->n_layers,
                                     .n_q_heads = m->n_q_heads,
                                     .n_kv_heads = m->n_kv_heads,
                                     .k_dim = m->head_dim,
                                     .preset = preset},
                        .context_desc = {.backend = KVL_BACKEND_NULL},
                        .device_bytes = 1u << 30};
    kvl_cache *cache;
    kvl_seq seq;
    kvl_stats stats = {0};
    const kvl_step *step;
    if (kvl_cache_create(&d, &cache) != KVL_OK) return 0;
    bool ok = kvl_seq_open(cache, &(kvl_seq_desc){.no_match = true}, &seq, NULL) == KVL_OK;
    for (uint32_t at = 0; ok && at < n_tokens; at += 512) {
        kvl_span span = {.seq = seq, .tokens = tokens, .n_tokens = n_tokens - at < 512 ? n_tokens - at : 512};
        ok = kvl_step_begin(cache, &span, 1, &step) == KVL_OK;
        for (uint32_t l = 0; ok && l < m->n_layers; l++)
            ok = kvl_step_layer_done(cache, step, l, NULL) == KVL_OK;
        ok = ok && kvl_step_end(cache, step) == KVL_OK;
    }
    if (ok) kvl_get_stats(cache, &stats);
    kvl_cache_destroy(cache);
    return stats.bytes_used;
}

/* What llama.cpp sets aside for a conversation that may grow to seq_tokens. */
static uint64_t reserved_bytes(const bench *b, enum ggml_type type, uint32_t seq_tokens) {
    const model_config *m = b->ours.rt.config;
    return (uint64_t)2 * m->n_layers * seq_tokens * ggml_row_size(type, (int64_t)m->n_kv_heads * m->head_dim);
}

static bool add_bytes(bench *b, char *err, size_t n) {
    static const struct {
        const char *what, *preset;
        enum ggml_type type;
        uint32_t n_tokens;
    } cases[] = {{"bytes at 1,000 tokens, f16", "f16", GGML_TYPE_F16, 1000},
                 {"bytes at 4,000 tokens, f16", "f16", GGML_TYPE_F16, 4000},
                 {"bytes at 1,000 tokens, int4 and q4_0", "int4", GGML_TYPE_Q4_0, 1000},
                 {"bytes at 4,000 tokens, int4 and q4_0", "int4", GGML_TYPE_Q4_0, 4000}};
    struct llama_context *ctx = theirs_context(&b->theirs, STREAMS, 4096, false);
    if (!ctx) return llm_fail(err, n, "llama_init_from_model failed");
    uint32_t seq_tokens = llama_n_ctx_seq(ctx);
    llama_free(ctx);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        uint64_t our = paged_bytes(b, cases[i].preset, cases[i].n_tokens);
        if (!our) return llm_fail(err, n, "no cache for %s", cases[i].what);
        add(b, cases[i].what, "bytes", true, (double)our,
            (double)reserved_bytes(b, cases[i].type, seq_tokens));
    }
    return true;
}

/* ---- output ---- */
static cJSON *report(const bench *b) {
    cJSON *rows = cJSON_CreateArray();
    fprintf(b->table, "%-38s %-9s %12s %12s   %s\n", "", "", "kvlite", "llama.cpp", "better by (least-most)");
    for (uint32_t i = 0; i < b->n_rows; i++) {
        const row *r = &b->rows[i];
        spread our = rounds_spread(&r->ours), their = rounds_spread(&r->theirs),
               ratio = r->lower ? rounds_ratio(&r->theirs, &r->ours) : rounds_ratio(&r->ours, &r->theirs);
        int digits = our.median < 10 ? 2 : our.median < 1000 ? 1 : 0;
        fprintf(b->table, "%-38s %-9s %12.*f %12.*f   %6.2f (%.2f-%.2f)\n", r->what, r->unit, digits,
                our.median, digits, their.median, ratio.median, ratio.least, ratio.most);
        cJSON *o = cJSON_CreateObject();
        cJSON_AddStringToObject(o, "what", r->what);
        cJSON_AddStringToObject(o, "unit", r->unit);
        cJSON_AddStringToObject(o, "better", r->lower ? "lower" : "higher");
        bench_json_spread(o, "kvlite", our);
        bench_json_spread(o, "peer", their);
        bench_json_spread(o, "ratio", ratio);
        cJSON_AddItemToArray(rows, o);
    }
    return rows;
}

/* ---- the command line ---- */
typedef struct command {
    const char *model, *text, *preset, *json;
    uint64_t threads, rounds;
    float max_gap_ms;
    bool quick, help;
} command;

static bool parse(command *k, int argc, char **argv, char *err, size_t n) {
    args a = {.argc = argc, .argv = argv, .i = 1};
    *k = (command){.model = "build/models/SmolLM2-135M-Instruct.Q4_1.gguf",
                   .text = "../shared/data/alice29.txt",
                   .preset = "int8",
                   .threads = 2,
                   .max_gap_ms = 50};
    while (args_next(&a, err, n)) {
        bool ok = true;
        if (args_is(&a, "-m"))
            ok = args_value(&a, &k->model, err, n);
        else if (args_is(&a, "-f"))
            ok = args_value(&a, &k->text, err, n);
        else if (args_is(&a, "--threads"))
            ok = args_u64(&a, 1, 1024, &k->threads, err, n);
        else if (args_is(&a, "--rounds"))
            ok = args_u64(&a, 1, BENCH_MAX_ROUNDS, &k->rounds, err, n);
        else if (args_is(&a, "--quick"))
            ok = k->quick = args_flag(&a, err, n);
        else if (args_is(&a, "--kv"))
            ok = args_value(&a, &k->preset, err, n);
        else if (args_is(&a, "--max-gap-ms"))
            ok = args_float(&a, 1, 1e6f, &k->max_gap_ms, err, n);
        else if (args_is(&a, "--json"))
            ok = args_value(&a, &k->json, err, n);
        else if (args_is(&a, "-h") || args_is(&a, "--help"))
            k->help = true;
        else
            ok = llm_fail(err, n, "option '%s' is unknown", a.name);
        if (!ok) return false;
    }
    if (!k->rounds) k->rounds = k->quick ? 1 : 3;
    return !err[0] &&
           (kvl_preset_find(k->preset) || llm_fail(err, n, "--kv '%.40s': no such preset", k->preset));
}

static bool load_text(bench *b, const char *path, char *err, size_t n) {
    enum { BYTES = 60000, LEAST = 8000 };
    static char text[BYTES];
    FILE *f = fopen(path, "rb");
    if (!f) return llm_fail(err, n, "-f %.100s: %s", path, strerror(errno));
    size_t len = fread(text, 1, BYTES, f);
    fclose(f);
    if (!tokenizer_encode(b->ours.rt.tok, text, len, TOKENIZE_PLAIN, &b->text, err, n)) return false;
    return b->text.n >= LEAST ||
           llm_fail(err, n, "-f %.100s: %zu tokens are too few, %d are needed", path, b->text.n, LEAST);
}

static bool load(bench *b, const command *k, char *err, size_t n) {
    runtime_desc d = {.path = k->model, .n_threads = b->threads, .backend = KVL_BACKEND_CPU};
    if (!runtime_load(&b->ours.rt, &d, err, n) || !load_text(b, k->text, err, n)) return false;
    b->ours.preset = k->preset;
    llama_log_set(theirs_log, NULL);
    llama_backend_init();
    b->theirs.model = llama_model_load_from_file(k->model, llama_model_default_params());
    if (!b->theirs.model) return llm_fail(err, n, "llama.cpp could not load %.100s", k->model);
    b->theirs.threads = b->threads;
    b->theirs.n_vocab = (uint32_t)llama_vocab_n_tokens(llama_model_get_vocab(b->theirs.model));
    return b->theirs.n_vocab == b->ours.rt.config->n_vocab || llm_fail(err, n, "the vocabularies differ");
}

static bool write_json(const bench *b, const command *k, cJSON *rows, double others, char *err, size_t n) {
    cJSON *top = cJSON_CreateObject();
    char peer_name[64];
    snprintf(peer_name, sizeof peer_name, "llama.cpp %s (ggml %s)", llama_version(), ggml_version());
    cJSON_AddStringToObject(top, "bench", "llm");
    cJSON_AddStringToObject(top, "model", strrchr(k->model, '/') ? strrchr(k->model, '/') + 1 : k->model);
    cJSON_AddStringToObject(top, "peer", peer_name);
    cJSON_AddNumberToObject(top, "threads", b->threads);
    cJSON_AddNumberToObject(top, "rounds", b->n_rounds);
    cJSON_AddNumberToObject(top, "others_share", others);
    cJSON_AddStringToObject(top, "kv", b->ours.preset);
    cJSON_AddNumberToObject(top, "max_gap_ms", b->max_gap_ms);
    cJSON_AddItemToObject(top, "rows", rows);
    bool ok = bench_write_json(top, k->json, err, n);
    cJSON_Delete(top);
    return ok;
}

static bool run(bench *b, const command *k, char *err, size_t n) {
    if (!load(b, k, err, n)) return false;
    bench_load before = bench_load_now();
    for (uint32_t i = 0; i < b->n_rounds; i++) {
        fprintf(stderr, "round %u of %u\n", i + 1, b->n_rounds);
        if (!run_round(b, err, n)) return false;
    }
    if (!add_bytes(b, err, n)) return false;
    double others = bench_others(&before);
    cJSON *rows = report(b);
    if (k->json) return write_json(b, k, rows, others, err, n);
    cJSON_Delete(rows);
    return true;
}

int main(int argc, char **argv) {
    static bench b;
    command k;
    char err[LLM_ERR_LEN] = "";
    if (!parse(&k, argc, argv, err, sizeof err)) {
        fprintf(stderr, "bench_peer_llm: %s (--help tells more)\n", err);
        return 2;
    }
    if (k.help) return fputs(usage, stdout) < 0;
    b.threads = (uint32_t)k.threads;
    b.n_rounds = (uint32_t)k.rounds;
    b.max_gap_ms = (double)k.max_gap_ms;
    b.quick = k.quick;
    b.table = bench_table(k.json);
    bool ok = run(&b, &k, err, sizeof err);
    if (!ok) fprintf(stderr, "bench_peer_llm: %s\n", err);
    llama_model_free(b.theirs.model);
    token_list_free(&b.text);
    runtime_free(&b.ours.rt);
    return !ok;
}
