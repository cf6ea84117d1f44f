/* A sequence's attention and a stream's tokens are the same bits whatever else happens: how prefill was chunked, who
   else ran, threads, prefix hits, forks, trims, preemption, aborts, resizes. First with the cache alone, then with
   the scheduler and a small model. */
#define KVL_IMPLEMENTATION
#include "../../kvlite.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>

static const char *const presets[] = {"f32", "f16",   "bf16",     "int8", "int8+",
                                      "fp8", "nvfp4", "balanced", "int4"};
enum {
    PRESETS = sizeof presets / sizeof presets[0],
    LAYERS = 3,
    STREAMS = 8,
    TOKENS = 224, /* longest stream of the attention level: crosses blocks of 32 and segments of 64 */
    SHARED = 77   /* tokens that all streams begin with: two full blocks and part of a third */
};

/* Under a sanitizer three of the presets, one with a single class of blocks: its time is the tests' limit. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { PRESETS_STEP = 4 };
#else
enum { PRESETS_STEP = 1 };
#endif

typedef struct path {
    const char *name;
    kvl_simd simd;
} path;

static uint64_t mix64(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}
static uint32_t pick(uint64_t *state, uint32_t n) { return (uint32_t)(mix64((*state)++) >> 33) % n; }
static uint32_t least(uint32_t a, uint32_t b) { return a < b ? a : b; }
static float noise(uint64_t x) {
    x = mix64(x);
    return ((float)(x & 0xffff) + (float)(x >> 16 & 0xffff) + (float)(x >> 32 & 0xffff) + (float)(x >> 48)) *
               (1.732f / 65536) -
           3.464f;
}

static void need(const kvl_cache *cache, const char *what, kvl_result got, kvl_result want) {
    if (got != want) {
        fail_msg("%s gave %s, wanted %s: %s", what, kvl_result_name(got), kvl_result_name(want),
                 kvl_last_error(cache));
    }
}

static void skip_if_missing(const path *p) {
    kvl_context_desc d = {.backend = KVL_BACKEND_CPU, .simd = p->simd};
    kvl_context *ctx = NULL;
    char why[256] = "";
    kvl_result r;
    d.error = why;
    d.error_size = sizeof why;
    r = kvl_context_create(&d, &ctx);
    kvl_context_destroy(ctx);
    if (r == KVL_UNSUPPORTED) {
        printf("SKIP %s: %s\n", p->name, why);
        skip();
    }
    if (r != KVL_OK) fail_msg("%s: %s", p->name, why);
}

/* Shapes take turns. The third has tiles of several steps of the softmax inside one segment. */
typedef struct shape {
    uint32_t q_heads, kv_heads, k_dim, v_dim, block_tokens, segment_tokens;
} shape;
static const shape shapes[] = {{6, 2, 48, 32, 32, 64}, {8, 1, 64, 64, 32, 128}, {2, 2, 80, 112, 64, 0}};
enum { Q_MAX = 8 * 64, K_MAX = 2 * 80, V_MAX = 2 * 112, OUT_MAX = 8 * 64 };
static shape geo;

/* The app's own threads may run tasks in any order: here the last comes first. */
enum { BACKWARDS = 99 };
static void run_backwards(void *user, uint32_t n, void (*fn)(void *arg, uint32_t i), void *arg) {
    (void)user;
    while (n-- > 0) fn(arg, n);
}

/* Full attention; a window with sinks of both kinds; a short window with softcap: three groups. */
static kvl_cache *make_cache(const char *preset, kvl_simd simd, uint32_t threads, uint64_t bytes) {
    static const float sinks[8] = {0.5f, -1, 2, 0, 1, -2, 0.25f, 3};
    kvl_layer layers[LAYERS] = {
        {0}, {.window = 70, .sink_tokens = 3, .sink_logits = sinks}, {.window = 9, .softcap = 8}};
    kvl_cache_desc d = {0};
    kvl_cache *cache = NULL;
    char why[256] = "";
    kvl_result r;
    d.context_desc = (kvl_context_desc){.backend = KVL_BACKEND_CPU, .simd = simd, .n_threads = threads};
    if (threads == BACKWARDS) d.context_desc.parallel_for = run_backwards;
    d.context_desc.error = why;
    d.context_desc.error_size = sizeof why;
    d.geometry = (kvl_geometry){.n_layers = LAYERS, .n_q_heads = geo.q_heads, .n_kv_heads = geo.kv_heads};
    d.geometry.k_dim = geo.k_dim;
    d.geometry.v_dim = geo.v_dim;
    d.geometry.block_tokens = geo.block_tokens;
    d.geometry.segment_tokens = geo.segment_tokens;
    d.geometry.preset = preset;
    d.geometry.layers = layers;
    d.device_bytes = bytes;
    d.max_sequences = 2 * STREAMS;
    d.max_seq_tokens = 512;
    d.poison = true;
    r = kvl_cache_create(&d, &cache);
    if (r != KVL_OK && r != KVL_NO_BLOCKS) fail_msg("create: %s: %s", kvl_result_name(r), why);
    return cache;
}

/* ---- the attention level: outputs compared bit for bit ---- */

typedef float layer_out[OUT_MAX];
static layer_out golden[STREAMS][LAYERS][TOKENS];
static int32_t stream_tokens[STREAMS][TOKENS];

typedef struct player {
    kvl_cache *cache;
    const char *preset;
    kvl_seq seq[STREAMS];
    uint32_t length[STREAMS];
    bool record; /* what comes out becomes golden */
    uint64_t rng;
} player;

static uint64_t row_seed(uint32_t stream, uint32_t pos) {
    return (pos < SHARED ? 1000 : stream) * 4096u + pos;
}

static void make_rows(float *out, char what, uint32_t layer, uint32_t stream, uint32_t pos, uint32_t n) {
    uint64_t base = mix64(row_seed(stream, pos) * 64 + layer * 8 + (uint64_t)(what - 'k'));
    for (uint32_t e = 0; e < n; e++) {
        out[e] = noise(base + e * 0x9e3779b9u) * (what == 'k' && e % 16 == 3 ? 5 : 1);
    }
}

static void compare_rows(const player *p, uint32_t stream, uint32_t layer, uint32_t pos, const float *got) {
    float *want = golden[stream][layer][pos];
    uint32_t n = geo.q_heads * geo.v_dim;
    if (p->record) memcpy(want, got, n * sizeof(float));
    if (memcmp(want, got, n * sizeof(float)) == 0) return;
    for (uint32_t e = 0; e < n; e++) {
        if (memcmp(&want[e], &got[e], 4) != 0) {
            fail_msg("%s: stream %u layer %u position %u head %u element %u: %.9g, alone %.9g", p->preset,
                     stream, layer, pos, e / geo.v_dim, e % geo.v_dim, (double)got[e], (double)want[e]);
        }
    }
}

/* One step: n[s] rows of each stream; only so many layers of it, then abort, where layers < LAYERS or abort_it. */
static void feed(player *p, const uint32_t n[STREAMS], uint32_t layers, bool abort_it) {
    static float q[512 * Q_MAX], k[512 * K_MAX], v[512 * V_MAX], out[512 * OUT_MAX];
    uint32_t nq = geo.q_heads * geo.k_dim, nk = geo.kv_heads * geo.k_dim, nv = geo.kv_heads * geo.v_dim,
             no = geo.q_heads * geo.v_dim;
    kvl_tensor tq = {.data = q}, tk = {.data = k}, tv = {.data = v}, to = {.data = out};
    kvl_span spans[STREAMS];
    uint32_t who[STREAMS], n_spans = 0;
    const kvl_step *step;
    for (uint32_t i = 0, first = pick(&p->rng, STREAMS); i < STREAMS; i++) {
        uint32_t s = (first + i) % STREAMS;
        if (!n[s]) continue;
        who[n_spans] = s;
        spans[n_spans++] = (kvl_span){p->seq[s], stream_tokens[s] + p->length[s], n[s], 1, NULL};
    }
    if (!n_spans) return;
    need(p->cache, "step_begin", kvl_step_begin(p->cache, spans, n_spans, &step), KVL_OK);
    for (uint32_t l = 0; l < layers; l++) {
        uint32_t row = 0;
        for (uint32_t i = 0; i < n_spans; i++) {
            for (uint32_t j = 0; j < n[who[i]]; j++, row++) {
                uint32_t pos = p->length[who[i]] + j;
                make_rows(q + row * nq, 'q', l, who[i], pos, nq);
                make_rows(k + row * nk, 'k', l, who[i], pos, nk);
                make_rows(v + row * nv, 'v', l, who[i], pos, nv);
            }
        }
        need(p->cache, "attend", kvl_attend(p->cache, step, l, &tq, &tk, &tv, &to), KVL_OK);
        row = 0;
        for (uint32_t i = 0; i < n_spans; i++) {
            for (uint32_t j = 0; j < n[who[i]]; j++, row++) {
                compare_rows(p, who[i], l, p->length[who[i]] + j, out + row * no);
            }
        }
    }
    if (abort_it) {
        need(p->cache, "step_abort", kvl_step_abort(p->cache, step), KVL_OK);
        return;
    }
    need(p->cache, "step_end", kvl_step_end(p->cache, step), KVL_OK);
    for (uint32_t i = 0; i < n_spans; i++) p->length[who[i]] += n[who[i]];
}

static uint32_t open_stream(player *p, uint32_t s, uint32_t n_tokens, bool match) {
    kvl_seq_desc d = {.tokens = stream_tokens[s], .n_tokens = n_tokens, .no_match = !match};
    kvl_reuse reuse;
    need(p->cache, "seq_open", kvl_seq_open(p->cache, &d, &p->seq[s], &reuse), KVL_OK);
    p->length[s] = reuse.matched;
    return reuse.matched;
}
static void close_stream(player *p, uint32_t s) {
    need(p->cache, "seq_close", kvl_seq_close(p->cache, p->seq[s]), KVL_OK);
    p->length[s] = 0;
}

/* Feeds one stream alone up to n_tokens in chunks. */
static void feed_to(player *p, uint32_t s, uint32_t n_tokens, uint32_t chunk) {
    while (p->length[s] < n_tokens) {
        uint32_t n[STREAMS] = {0};
        n[s] = least(chunk, n_tokens - p->length[s]);
        feed(p, n, LAYERS, false);
    }
}

/* Feeds the streams [0, count) to their ends, in steps of anything between one row and all the rest. */
static void feed_all(player *p, uint32_t count, bool with_aborts) {
    static const uint32_t sizes[] = {0, 1, 1, 1, 1, 2, 7, 13, 31, 32, 33, 64, 100};
    for (uint32_t steps = 0, left = 1; left; steps++) {
        uint32_t n[STREAMS] = {0}, total = 0;
        bool abort_it = with_aborts && pick(&p->rng, 3) == 0;
        left = 0;
        for (uint32_t s = 0; s < count; s++) {
            n[s] = least(sizes[pick(&p->rng, 13)], least(TOKENS - p->length[s], 512 - total));
            total += n[s];
            left += TOKENS - p->length[s];
        }
        feed(p, n, abort_it ? pick(&p->rng, LAYERS + 1) : LAYERS, abort_it);
        assert_true(steps < 3000);
    }
}

static player new_player(const char *preset, kvl_simd simd, uint32_t threads, uint64_t bytes) {
    player p = {.preset = preset, .rng = 77};
    p.cache = make_cache(preset, simd, threads, bytes);
    assert_non_null(p.cache);
    return p;
}
static void end_player(player *p) {
    need(p->cache, "validate", kvl_validate(p->cache), KVL_OK);
    kvl_cache_destroy(p->cache);
}

enum { PLENTY = 24 << 20 };

/* Every stream alone, all of it in one chunk. */
static void record_golden(const char *preset, kvl_simd simd) {
    player p = new_player(preset, simd, 1, PLENTY);
    p.record = true;
    for (uint32_t s = 0; s < STREAMS; s++) {
        for (uint32_t i = 0; i < TOKENS; i++) stream_tokens[s][i] = (int32_t)row_seed(s, i);
        open_stream(&p, s, TOKENS, false);
        feed_to(&p, s, TOKENS, TOKENS);
    }
    end_player(&p);
}

static void each_preset(const path *p, void (*scenario)(const char *preset, kvl_simd simd)) {
    static uint32_t turn;
    skip_if_missing(p);
    for (uint32_t i = 0; i < PRESETS; i += PRESETS_STEP) {
        geo = shapes[turn++ % 3];
        record_golden(presets[i], p->simd);
        scenario(presets[i], p->simd);
    }
}

static void chunks(const char *preset, kvl_simd simd) {
    static const uint32_t sizes[] = {1, 7, 31, 32, 33, 64, 65, 100};
    for (uint32_t threads = 1; threads <= 2; threads++) {
        player p = new_player(preset, simd, threads, PLENTY);
        for (uint32_t i = 0; i < sizeof sizes / sizeof sizes[0]; i += 2 * threads - 1) {
            open_stream(&p, 0, TOKENS, false);
            feed_to(&p, 0, TOKENS, sizes[i]);
            close_stream(&p, 0);
        }
        end_player(&p);
    }
}
static void test_chunks(void **state) { each_preset(*state, chunks); }

static void batches(const char *preset, kvl_simd simd) {
    static const uint32_t threads[] = {1, 2, BACKWARDS};
    for (uint32_t i = 0; i < 3; i++) {
        player p = new_player(preset, simd, threads[i], PLENTY);
        p.rng = i;
        for (uint32_t s = 0; s < STREAMS; s++) open_stream(&p, s, TOKENS, false);
        feed_all(&p, STREAMS, threads[i] == 1);
        end_player(&p);
    }
}
static void test_batches_and_aborts(void **state) { each_preset(*state, batches); }

static void prefix(const char *preset, kvl_simd simd) {
    player p = new_player(preset, simd, 1, PLENTY);
    uint32_t hits = 0;
    open_stream(&p, 0, TOKENS, true);
    feed_to(&p, 0, 45, 45); /* ends inside a block: an exact partial leaf stays behind */
    close_stream(&p, 0);
    assert_int_equal(open_stream(&p, 0, TOKENS, true), 45);
    feed_to(&p, 0, TOKENS, 50);
    for (uint32_t s = 1; s < STREAMS; s++) { /* hits while the first is still open, and while others run */
        uint32_t matched = open_stream(&p, s, TOKENS, true);
        assert_true(matched <= SHARED);
        hits += matched;
        feed_to(&p, s, SHARED + 3 * s, 11);
    }
    assert_true(hits >= 7 * 64);
    feed_all(&p, STREAMS, true);
    for (uint32_t s = 0; s < STREAMS; s++) {
        close_stream(&p, s);
        open_stream(&p, s, TOKENS, true);
        assert_true(p.length[s] < TOKENS);
    }
    feed_all(&p, STREAMS, false);
    end_player(&p);
}
static void test_prefix_hits(void **state) { each_preset(*state, prefix); }

static void fork_and_trim(const char *preset, kvl_simd simd) {
    player p = new_player(preset, simd, 1, PLENTY);
    uint32_t from[] = {SHARED, 64, 33, 32, 70, 1, 76};
    open_stream(&p, 0, TOKENS, false);
    feed_to(&p, 0, SHARED, 20);
    for (uint32_t s = 1; s < STREAMS; s++) {
        uint32_t reached = KVL_NONE;
        need(p.cache, "seq_fork", kvl_seq_fork(p.cache, p.seq[0], &p.seq[s], &p.length[s]), KVL_OK);
        assert_true(p.length[s] <= SHARED);
        need(p.cache, "seq_trim", kvl_seq_trim(p.cache, p.seq[s], from[s - 1], &reached), KVL_OK);
        assert_true(reached <= from[s - 1] && reached <= p.length[s]);
        p.length[s] = reached;
    }
    feed_all(&p, STREAMS, true);
    for (uint32_t s = 0; s < STREAMS; s++) { /* what forks wrote is found again under their tokens */
        close_stream(&p, s);
        assert_true(open_stream(&p, s, TOKENS, true) >= 192);
    }
    feed_all(&p, STREAMS, false);
    for (uint32_t round = 0; round < 2; round++) {
        for (uint32_t s = 0; s < STREAMS; s++) {
            uint32_t want = pick(&p.rng, TOKENS + 1), reached = KVL_NONE;
            need(p.cache, "seq_trim", kvl_seq_trim(p.cache, p.seq[s], want, &reached), KVL_OK);
            assert_true(reached <= want);
            p.length[s] = reached;
        }
        feed_all(&p, STREAMS, false);
    }
    end_player(&p);
}
static void test_fork_and_trim(void **state) { each_preset(*state, fork_and_trim); }

static void resize(const char *preset, kvl_simd simd) {
    player p = new_player(preset, simd, 1, PLENTY);
    kvl_stats stats;
    for (uint32_t s = 0; s < STREAMS; s++) open_stream(&p, s, TOKENS, false);
    for (uint32_t round = 0; round < 6; round++) {
        uint64_t held = 0;
        for (uint32_t i = 0; i < 3; i++) {
            uint32_t n[STREAMS];
            for (uint32_t s = 0; s < STREAMS; s++) n[s] = least(pick(&p.rng, 14), TOKENS - p.length[s]);
            feed(&p, n, LAYERS, false);
        }
        close_stream(&p, round); /* leaves holes: its blocks are evicted by the shrinking below */
        kvl_cache_resize(p.cache, 0, &held);
        need(p.cache, "validate", kvl_validate(p.cache), KVL_OK);
        need(p.cache, "resize", kvl_cache_resize(p.cache, PLENTY, &held), KVL_OK);
        open_stream(&p, round, TOKENS, true);
    }
    feed_all(&p, STREAMS, false);
    need(p.cache, "stats", kvl_get_stats(p.cache, &stats), KVL_OK);
    assert_true(stats.compactions > 0 && stats.evicted_blocks > 0);
    end_player(&p);
}
static void test_resize(void **state) { each_preset(*state, resize); }

/* ---- the scheduler level: a small model, its tokens and every row's bits ---- */

enum { WIDTH = 32, VOCAB = 96, PROMPT_MAX = 150, NEW = 40, ROWS_MAX = PROMPT_MAX + NEW + 1 };

static float embed[VOCAB][WIDTH], wq[LAYERS][Q_MAX][WIDTH], wk[LAYERS][K_MAX][WIDTH],
    wv[LAYERS][V_MAX][WIDTH], wo[LAYERS][WIDTH][OUT_MAX];

static void fill(float *w, size_t n, float scale, uint64_t seed) {
    for (size_t i = 0; i < n; i++) w[i] = noise(seed * 1000003 + i) * scale;
}
static void make_model(void) {
    fill(embed[0], sizeof embed / 4, 1, 1);
    fill(wq[0][0], sizeof wq / 4, 0.3f, 2);
    fill(wk[0][0], sizeof wk / 4, 0.3f, 3);
    fill(wv[0][0], sizeof wv / 4, 0.3f, 4);
    fill(wo[0][0], sizeof wo / 4, 0.2f, 5);
}

/* One row at a time, so that a row cannot depend on its batch. */
static void multiply(float *out, uint32_t n, const float *w, uint32_t width, const float *x) {
    for (uint32_t i = 0; i < n; i++) {
        float sum = 0;
        for (uint32_t e = 0; e < width; e++) sum += w[(size_t)i * width + e] * x[e];
        out[i] = sum;
    }
}
static void normalise(float *x) {
    float sum = 1e-6f;
    for (int e = 0; e < WIDTH; e++) sum += x[e] * x[e];
    sum = sqrtf(WIDTH / sum);
    for (int e = 0; e < WIDTH; e++) x[e] *= sum;
}

typedef struct stream {
    int32_t prompt[PROMPT_MAX], tokens[NEW];
    uint32_t n_prompt;
    uint64_t row_hash[ROWS_MAX]; /* of everything that was computed for a position */
    bool seen[ROWS_MAX];
} stream;
static stream streams[STREAMS];

static uint64_t hash_floats(uint64_t h, const float *x, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) {
        uint32_t u;
        memcpy(&u, &x[i], 4);
        h = (h ^ u) * 0x100000001b3u;
    }
    return h;
}

typedef struct model_run { /* buffers of a step */
    float x[512][WIDTH], q[512][Q_MAX], k[512][K_MAX], v[512][V_MAX], out[512][OUT_MAX];
    uint64_t hash[512];
    int32_t next[512];
} model_run;
static model_run run;

/* The layers [0, layers) of a step. */
static void model_layers(kvl_cache *cache, const kvl_step *step, uint32_t layers) {
    kvl_tensor q = {.data = run.q, .row_stride = Q_MAX}, k = {.data = run.k, .row_stride = K_MAX};
    kvl_tensor v = {.data = run.v, .row_stride = V_MAX}, out = {.data = run.out, .row_stride = OUT_MAX};
    for (uint32_t r = 0; r < step->n_tokens; r++) {
        memcpy(run.x[r], embed[step->tokens[r]], sizeof run.x[r]);
        for (int e = 0; e < WIDTH; e++) run.x[r][e] += 0.5f * noise(step->positions[r] * 64u + (uint32_t)e);
        run.hash[r] = 1469598103934665603u;
    }
    for (uint32_t l = 0; l < layers; l++) {
        for (uint32_t r = 0; r < step->n_tokens; r++) {
            normalise(run.x[r]);
            multiply(run.q[r], geo.q_heads * geo.k_dim, wq[l][0], WIDTH, run.x[r]);
            multiply(run.k[r], geo.kv_heads * geo.k_dim, wk[l][0], WIDTH, run.x[r]);
            multiply(run.v[r], geo.kv_heads * geo.v_dim, wv[l][0], WIDTH, run.x[r]);
        }
        need(cache, "attend", kvl_attend(cache, step, l, &q, &k, &v, &out), KVL_OK);
        for (uint32_t r = 0; r < step->n_tokens; r++) {
            float delta[WIDTH];
            multiply(delta, WIDTH, wo[l][0], geo.q_heads * geo.v_dim, run.out[r]);
            for (int e = 0; e < WIDTH; e++) run.x[r][e] += delta[e];
            run.hash[r] = hash_floats(run.hash[r], run.out[r], geo.q_heads * geo.v_dim);
        }
    }
}

static int32_t best_token(const float *x) {
    float logits[VOCAB];
    int32_t best = 0;
    multiply(logits, VOCAB, embed[0], WIDTH, x);
    for (int32_t t = 1; t < VOCAB; t++) {
        if (logits[t] > logits[best]) best = t;
    }
    return best;
}

typedef struct variant {
    const char *name;
    uint32_t threads, step_tokens;
    bool alone, match, aborts, forks, resizes, tiny, classes;
} variant;

typedef struct totals {
    uint64_t hit_tokens, preemptions, aborts, forks, compactions;
} totals;

/* Hashes of a finished step's rows against the stream's own. */
static void check_rows(const char *preset, const char *name, const kvl_step *step, bool record) {
    for (uint32_t r = 0; r < step->n_tokens; r++) {
        stream *s = (stream *)step->spans[step->row_span[r]].user;
        uint32_t pos = step->positions[r];
        assert_true(pos < ROWS_MAX);
        if (record) {
            s->row_hash[pos] = run.hash[r];
            s->seen[pos] = true;
        } else if (!s->seen[pos] || s->row_hash[pos] != run.hash[r]) {
            fail_msg("%s, %s: stream %d, position %u differs from the stream alone", preset, name,
                     (int)(s - streams), pos);
        }
    }
}

typedef struct job {
    kvl_req req;
    stream *s;
} job;

static void check_tokens(kvl_sched *sched, const char *preset, const char *name, const job *j, bool record) {
    int32_t tokens[NEW];
    uint32_t n;
    kvl_req_info info;
    assert_int_equal(kvl_sched_info(sched, j->req, &info), KVL_OK);
    assert_int_equal(info.state, KVL_REQ_FINISHED);
    assert_int_equal(info.finish, KVL_FINISH_LENGTH);
    assert_int_equal(kvl_sched_tokens(sched, j->req, tokens, NEW, &n), KVL_OK);
    assert_int_equal(n, NEW);
    if (record) memcpy(j->s->tokens, tokens, sizeof tokens);
    if (memcmp(j->s->tokens, tokens, sizeof tokens) != 0) {
        fail_msg("%s, %s: stream %d wrote other tokens than alone", preset, name, (int)(j->s - streams));
    }
}

static uint32_t submit(kvl_sched *sched, job *jobs, uint32_t n, stream *s, const variant *v) {
    kvl_request q = {.tokens = s->prompt,
                     .n_tokens = s->n_prompt,
                     .max_new_tokens = NEW,
                     .no_match = !v->match,
                     .user = s};
    kvl_result r;
    q.priority = v->classes ? (uint32_t)(s - streams) % 3 : 0;
    q.klass =
        v->classes && (s - streams) % 2 == 0 ? KVL_BACKGROUND : KVL_INTERACTIVE; /* gives way: preemption */
    r = kvl_sched_submit(sched, &q, &jobs[n].req);
    if (r != KVL_OK) fail_msg("submit: %s: %s", kvl_result_name(r), kvl_sched_last_error(sched));
    jobs[n].s = s;
    return n + 1;
}

/* All streams [first, first + count) to their ends. */
static void play(kvl_cache *cache, const char *preset, const variant *v, uint32_t first, uint32_t count,
                 bool record, totals *t) {
    kvl_sched_desc d = {.step_tokens = v->step_tokens,
                        .policy = v->classes ? KVL_POLICY_PRIORITY : KVL_POLICY_FCFS};
    kvl_sched *sched;
    job jobs[4 * STREAMS];
    uint32_t n_jobs = 0, arrived = 0, steps = 0;
    uint64_t rng = 5;
    const kvl_step *step;
    kvl_stats stats;
    need(cache, "sched_create", kvl_sched_create(cache, &d, &sched), KVL_OK);
    for (;; steps++) {
        kvl_result r;
        assert_true(steps < 20000);
        if (arrived < count && (arrived < 3 || steps % 4 == 0))
            n_jobs = submit(sched, jobs, n_jobs, &streams[first + arrived++], v);
        if (arrived == count) kvl_sched_close(sched);
        if (v->resizes && steps % 7 == 3) {
            uint64_t held;
            r = kvl_cache_resize(cache, 0, &held);
            assert_true(r == KVL_OK || r == KVL_NO_BLOCKS);
            need(cache, "resize", kvl_cache_resize(cache, PLENTY, &held), KVL_OK);
        }
        r = kvl_sched_plan(sched, &step);
        if (r == KVL_DRAINED) break;
        if (r == KVL_IDLE) continue;
        need(cache, "plan", r, KVL_OK);
        if (v->aborts && pick(&rng, 3) == 0) {
            model_layers(cache, step, pick(&rng, LAYERS + 1));
            need(cache, "abort", kvl_sched_abort(sched, step), KVL_OK);
            t->aborts++;
            continue;
        }
        model_layers(cache, step, LAYERS);
        check_rows(preset, v->name, step, record);
        for (uint32_t i = 0; i < step->n_logits; i++) run.next[i] = best_token(run.x[step->logit_rows[i]]);
        need(cache, "commit", kvl_sched_commit(sched, step, run.next), KVL_OK);
        if (steps % 16 == 0) need(cache, "validate", kvl_validate(cache), KVL_OK);
        if (v->forks && n_jobs < 3 * STREAMS && pick(&rng, 3) == 0) {
            job *j = &jobs[pick(&rng, n_jobs)];
            if (kvl_sched_fork(sched, j->req, j->s, &jobs[n_jobs].req) == KVL_OK) {
                jobs[n_jobs++].s = j->s;
                t->forks++;
            }
        }
    }
    for (uint32_t i = 0; i < n_jobs; i++) check_tokens(sched, preset, v->name, &jobs[i], record);
    need(cache, "stats", kvl_get_stats(cache, &stats), KVL_OK);
    t->hit_tokens += stats.hit_tokens;
    t->preemptions += stats.preemptions;
    t->compactions += stats.compactions;
    kvl_sched_destroy(sched);
    need(cache, "validate", kvl_validate(cache), KVL_OK);
}

/* About the least budget that takes two of the longest stream: eight at once do not fit. */
static kvl_cache *make_tiny_cache(const char *preset, kvl_simd simd) {
    for (uint64_t bytes = 64 << 10;; bytes += bytes / 8) {
        kvl_cache *cache = make_cache(preset, simd, 1, bytes);
        kvl_fit fit;
        assert_true(bytes < PLENTY);
        if (!cache) continue;
        if (kvl_can_fit(cache, 2, ROWS_MAX, &fit) == KVL_OK) return cache;
        kvl_cache_destroy(cache);
    }
}

static void make_streams(void) {
    make_model();
    memset(streams, 0, sizeof streams);
    for (uint32_t s = 0; s < STREAMS; s++) {
        static const uint32_t lengths[STREAMS] = {150, 40, 97, 64, 78, 121, 1, 66};
        streams[s].n_prompt = lengths[s];
        for (uint32_t i = 0; i < lengths[s]; i++)
            streams[s].prompt[i] = (int32_t)(mix64(row_seed(s, i)) % VOCAB);
    }
}

static void scheduler(const char *preset, kvl_simd simd) {
    static const variant golden_variant = {.name = "alone", .alone = true, .threads = 1, .step_tokens = 512};
    static const variant variants[] = {
        {.name = "steps of 1", .threads = 1, .step_tokens = 1},
        {.name = "steps of 7", .threads = 1, .step_tokens = 7},
        {.name = "steps of 32", .threads = 2, .step_tokens = 32},
        {.name = "steps of 33", .threads = 1, .step_tokens = 33, .match = true},
        {.name = "steps of 512", .threads = 1, .step_tokens = 512},
        {.name = "two threads", .threads = 2, .step_tokens = 512, .match = true},
        {.name = "prefix hits", .threads = 1, .step_tokens = 64, .match = true},
        {.name = "prefix hits, alone", .threads = 1, .step_tokens = 512, .match = true, .alone = true},
        {.name = "aborts", .threads = 1, .step_tokens = 48, .match = true, .aborts = true},
        {.name = "forks", .threads = 1, .step_tokens = 48, .match = true, .forks = true},
        {.name = "forks and aborts", .threads = 2, .step_tokens = 20, .forks = true, .aborts = true},
        {.name = "resizes", .threads = 1, .step_tokens = 50, .match = true, .resizes = true},
        {.name = "tiny budget, two classes",
         .threads = 1,
         .step_tokens = 40,
         .match = true,
         .tiny = true,
         .classes = true},
        {.name = "tiny budget, hits and aborts",
         .threads = 1,
         .step_tokens = 33,
         .match = true,
         .tiny = true,
         .aborts = true},
        {.name = "tiny budget, two classes, aborts",
         .threads = 1,
         .step_tokens = 64,
         .tiny = true,
         .classes = true,
         .aborts = true},
        {.name = "tiny budget, two classes, forks",
         .threads = 1,
         .step_tokens = 70,
         .match = true,
         .tiny = true,
         .classes = true,
         .forks = true},
    };
    static uint32_t turn; /* every other variant, the others on the next path: 9 presets are an odd number */
    totals none = {0}, sum = {0};
    make_streams();
    for (uint32_t s = 0; s < STREAMS; s++) {
        kvl_cache *cache = make_cache(preset, simd, 1, PLENTY);
        play(cache, preset, &golden_variant, s, 1, true, &none);
        kvl_cache_destroy(cache);
    }
    assert_int_equal(none.hit_tokens, 0);
    for (uint32_t i = turn++ % 2; i < sizeof variants / sizeof variants[0]; i += 2) {
        const variant *v = &variants[i];
        kvl_cache *cache =
            v->tiny ? make_tiny_cache(preset, simd) : make_cache(preset, simd, v->threads, PLENTY);
        totals t = {0};
        if (v->alone) {
            for (uint32_t s = 0; s < STREAMS; s++) play(cache, preset, v, s, 1, false, &t);
        } else {
            play(cache, preset, v, 0, STREAMS, false, &t);
        }
        kvl_cache_destroy(cache);
        if (v->match && !v->tiny) assert_true(t.hit_tokens > 0);
        if (!v->match && !v->forks && !v->tiny) assert_int_equal(t.hit_tokens, 0);
        sum.preemptions += t.preemptions;
        sum.aborts += t.aborts;
        sum.forks += t.forks;
    }
    assert_true(sum.preemptions > 0 && sum.aborts > 0 && sum.forks > 0);
}
static void test_scheduler(void **state) { each_preset(*state, scheduler); }

#define TESTS(label, p)                                                         \
    {label ": chunk sizes", test_chunks, NULL, NULL, p},                        \
        {label ": batches and aborts", test_batches_and_aborts, NULL, NULL, p}, \
        {label ": prefix hits", test_prefix_hits, NULL, NULL, p},               \
        {label ": forks and trims", test_fork_and_trim, NULL, NULL, p},         \
        {label ": resizes", test_resize, NULL, NULL, p}, {                      \
        label ": a model under the scheduler", test_scheduler, NULL, NULL, p    \
    }

int main(int argc, char **argv) {
    static path scalar = {"scalar", KVL_SIMD_SCALAR}, avx2 = {"avx2", KVL_SIMD_AVX2},
                avx512 = {"avx512", KVL_SIMD_AVX512};
    const struct CMUnitTest tests[] = {TESTS("scalar", &scalar), TESTS("avx2", &avx2),
                                       TESTS("avx512", &avx512)};
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests_name("same answer", tests, NULL, NULL);
}
