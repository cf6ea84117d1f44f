/* Lives: the same streams, told in other ways, must come out the same bit for bit; and a scheduler that preempts. For GPU
   backends: a test program sets `lives` before each test. */
#ifndef KVL_TESTS_LIVES_H
#define KVL_TESTS_LIVES_H
#include "../common/gpu_model.h"
#include "conformance.h"

typedef struct lives_backend {
    kvl_backend_kind kind;
    void (*describe)(kvl_cache_desc *desc);
    uint64_t (*memory)(void); /* device memory that is allocated now */
    /* Tensors in device memory: opened for each cache, in the order of work of `attend`. Null: in host memory. */
    void *(*open)(void);
    void (*close)(void *tensors);
    kvl_result (*attend)(kvl_cache *cache, const kvl_step *step, uint32_t layer, void *tensors,
                         gm_buffers *b);
    uint64_t budget, most, low,
        high;       /* MiB of a life: at first, what it may be, and what it shrinks to and grows to */
    uint32_t every; /* of the presets */
} lives_backend;
static lives_backend lives;

enum { STREAMS = 5, PROMPT = 100, LENGTH = 130, SHARED = 70 };

typedef struct life {
    const char *preset;
    uint32_t chunk; /* of the prompt of stream 0 */
    bool others;    /* four more streams run beside it */
    bool reuse;     /* stream 0 is closed and opened again on what it left */
    bool fork;      /* stream 0 goes on as a fork, and the one it came from goes another way */
    bool resize;    /* the budget shrinks and grows all the time */
    float out[LENGTH][GM_LAYERS][GM_Q_HEADS][GM_DIM]; /* of stream 0 */
} life;

static int32_t life_token(uint32_t s, uint32_t pos) {
    return (int32_t)(pos < SHARED ? 7000 + pos : 10000 * (s + 1) + pos);
}

static kvl_cache *life_cache(const life *w, kvl_context *shared) {
    kvl_layer layers[GM_LAYERS];
    kvl_cache_desc d;
    kvl_cache *cache = NULL;
    char why[256] = "";
    memset(layers, 0, sizeof layers);
    memset(&d, 0, sizeof d);
    layers[1].window = 40;
    layers[1].sink_tokens = 3;
    d.geometry = gm_geometry(w->preset, layers);
    d.context = shared;
    d.context_desc.backend = lives.kind;
    lives.describe(&d);
    d.device_bytes = lives.budget << 20;
    d.max_device_bytes = lives.most << 20;
    d.max_sequences = 16;
    d.max_seq_tokens = 512;
    d.max_step_tokens = GM_ROWS;
    d.poison = true;
    d.error = why;
    d.error_size = sizeof why;
    if (kvl_cache_create(&d, &cache) != KVL_OK) fail_msg("%s: %s", w->preset, why);
    return cache;
}

#define KOK(cache, call)                                                                                 \
    do {                                                                                                 \
        kvl_result r_ = (call);                                                                          \
        if (r_ != KVL_OK) fail_msg("%s gave %s: %s", #call, kvl_result_name(r_), kvl_last_error(cache)); \
    } while (0)

typedef struct runner {
    life *w;
    kvl_cache *cache;
    kvl_seq seq[STREAMS];
    uint32_t pos[STREAMS];
    void *tensors;
    gm_buffers b;
    uint64_t rng;
} runner;

static runner *runner_make(life *w, kvl_context *shared) {
    runner *r = (runner *)calloc(1, sizeof *r);
    r->w = w;
    r->cache = life_cache(w, shared);
    if (lives.open) r->tensors = lives.open();
    return r;
}
static void runner_destroy(runner *r) {
    kvl_cache_destroy(r->cache);
    if (r->tensors) lives.close(r->tensors);
    free(r);
}
static kvl_result runner_attend(runner *r, const kvl_step *step, uint32_t layer) {
    return r->tensors ? lives.attend(r->cache, step, layer, r->tensors, &r->b)
                      : gm_attend(r->cache, step, layer, &r->b);
}

static void runner_open(runner *r, uint32_t s, bool match) {
    int32_t tokens[LENGTH];
    kvl_seq_desc d;
    kvl_reuse reuse;
    uint32_t i;
    memset(&d, 0, sizeof d);
    for (i = 0; i < LENGTH; i++) tokens[i] = life_token(s, i);
    d.tokens = tokens;
    d.n_tokens = LENGTH;
    d.no_match = !match;
    KOK(r->cache, kvl_seq_open(r->cache, &d, &r->seq[s], &reuse));
    r->pos[s] = reuse.matched;
}

/* n[s] rows of each stream in one step. */
static void runner_step(runner *r, const uint32_t n[STREAMS]) {
    static int32_t tokens[STREAMS][GM_ROWS];
    kvl_span spans[STREAMS];
    const kvl_step *step;
    uint32_t who[STREAMS], n_spans = 0, s, i, l;
    memset(spans, 0, sizeof spans);
    for (i = 0; i < STREAMS; i++) {
        s = (i + (uint32_t)r->rng) % STREAMS; /* stream 0 is not always first */
        if (!n[s]) continue;
        for (l = 0; l < n[s]; l++) tokens[s][l] = life_token(s, r->pos[s] + l);
        spans[n_spans].seq = r->seq[s];
        spans[n_spans].tokens = tokens[s];
        spans[n_spans].n_tokens = n[s];
        spans[n_spans].n_logits = 1;
        who[n_spans++] = s;
    }
    if (!n_spans) return;
    KOK(r->cache, kvl_step_begin(r->cache, spans, n_spans, &step));
    for (l = 0; l < GM_LAYERS; l++) {
        KOK(r->cache, runner_attend(r, step, l));
        for (i = 0; i < n_spans; i++) {
            if (who[i] != 0) continue;
            for (s = 0; s < n[0]; s++)
                memcpy(r->w->out[r->pos[0] + s][l], r->b.out[step->spans[i].first_row + s],
                       sizeof r->b.out[0]);
        }
    }
    KOK(r->cache, kvl_step_end(r->cache, step));
    for (s = 0; s < STREAMS; s++) r->pos[s] += n[s];
}

static void runner_resize(runner *r) {
    uint64_t held, low = lives.low << 20, high = lives.high << 20, before = lives.memory();
    KOK(r->cache, kvl_cache_resize(r->cache, high, &held));
    if (lives.memory() <= before) fail_msg("growing took no memory");
    before = lives.memory();
    KOK(r->cache, kvl_cache_resize(r->cache, low, &held));
    if (lives.memory() >= before) fail_msg("shrinking gave no memory back");
    KOK(r->cache, kvl_validate(r->cache));
}

static void life_run(life *w) {
    runner *r = runner_make(w, NULL);
    uint32_t s, n[STREAMS], steps = 0;
    for (s = 0; s < (w->others ? STREAMS : 1u); s++) runner_open(r, s, false);
    while (r->pos[0] < LENGTH) {
        memset(n, 0, sizeof n);
        n[0] = r->pos[0] < PROMPT ? conf_min(w->chunk, PROMPT - r->pos[0]) : 1;
        for (s = 1; w->others && s < STREAMS; s++) {
            uint32_t used = n[0] + n[1] * (s > 1) + n[2] * (s > 2) + n[3] * (s > 3);
            n[s] = conf_min(conf_random(&r->rng, 3) ? 1 : conf_random(&r->rng, 40), LENGTH - r->pos[s]);
            n[s] = conf_min(n[s], GM_ROWS - used);
        }
        runner_step(r, n);
        if (w->resize && steps++ % 4 == 0) runner_resize(r);
        if (w->reuse && r->pos[0] == PROMPT) {
            KOK(r->cache, kvl_seq_close(r->cache, r->seq[0]));
            runner_open(r, 0, true);
            if (r->pos[0] != PROMPT) fail_msg("%s: %u of %u tokens reused", w->preset, r->pos[0], PROMPT);
            w->reuse = false;
        }
        if (w->fork && r->pos[0] == PROMPT) { /* the fork becomes stream 0, stream 1 the one it came from */
            uint32_t length;
            r->seq[1] = r->seq[0];
            r->pos[1] = r->pos[0];
            KOK(r->cache, kvl_seq_fork(r->cache, r->seq[1], &r->seq[0], &length));
            assert_int_equal(length, PROMPT);
            for (memset(n, 0, sizeof n), n[1] = 5, s = 0; s < 3; s++) runner_step(r, n);
            w->fork = false;
        }
    }
    KOK(r->cache, kvl_validate(r->cache));
    runner_destroy(r);
}

/* tolerance 0: bit for bit */
static void lives_agree(const life *a, const life *b, double tolerance, const char *what) {
    uint32_t i, l, h, e;
    for (i = 0; i < LENGTH; i++) {
        for (l = 0; l < GM_LAYERS; l++) {
            for (h = 0; h < GM_Q_HEADS; h++) {
                for (e = 0; e < GM_DIM; e++) {
                    float x = a->out[i][l][h][e], y = b->out[i][l][h][e];
                    bool ok =
                        tolerance > 0 ? fabs((double)x - (double)y) <= tolerance : memcmp(&x, &y, 4) == 0;
                    if (!ok)
                        fail_msg("%s, %s: position %u layer %u head %u element %u: %.9g and %.9g", a->preset,
                                 what, i, l, h, e, (double)x, (double)y);
                }
            }
        }
    }
}

static const char *const all_presets[] = {"f16",   "bf16",     "int8", "int8+", "fp8",
                                          "nvfp4", "balanced", "int4", "f32"};

static void test_same_answer(void **state) {
    static life first, other;
    uint32_t p;
    (void)state;
    for (p = 0; p < 9; p += CONF_EVERY * lives.every) {
        memset(&first, 0, sizeof first);
        first.preset = all_presets[p];
        first.chunk = 37;
        life_run(&first);
        other = first;
        memset(other.out, 0, sizeof other.out);
        life_run(&other);
        lives_agree(&first, &other, 0, "a second run");
        other.others = true;
        life_run(&other);
        lives_agree(&first, &other, 0, "beside others");
        other.resize = true;
        life_run(&other);
        lives_agree(&first, &other, 0, "resized all the time, beside others");
        other.others = other.resize = false;
        other.reuse = true;
        life_run(&other);
        lives_agree(&first, &other, 0, "gone on with after it was closed");
        other.fork = true;
        life_run(&other);
        lives_agree(&first, &other, 0, "as a fork");
        other.chunk = 64;
        life_run(&other);
        lives_agree(&first, &other, 0.02, "in other chunks");
    }
}

/* ---- two caches of one context, whose steps are open at once ---- */
static void test_two_caches(void **state) {
    static life alone, w[2];
    kvl_cache_desc d;
    kvl_context *shared;
    runner *r[2];
    uint32_t i, n[STREAMS] = {0};
    (void)state;
    memset(&alone, 0, sizeof alone);
    alone.preset = "int8";
    alone.chunk = 50;
    life_run(&alone);
    memset(&d, 0, sizeof d);
    d.context_desc.backend = lives.kind;
    lives.describe(&d);
    assert_int_equal(kvl_context_create(&d.context_desc, &shared), KVL_OK);
    for (i = 0; i < 2; i++) {
        w[i] = alone;
        memset(w[i].out, 0, sizeof w[i].out);
        r[i] = runner_make(&w[i], shared);
        runner_open(r[i], 0, false);
    }
    while (r[1]->pos[0] < LENGTH) {
        for (i = 0; i < 2; i++) {
            n[0] = r[i]->pos[0] < PROMPT ? 50 : 1;
            runner_step(r[i], n);
        }
    }
    for (i = 0; i < 2; i++) {
        lives_agree(&alone, &w[i], 0, "beside another cache");
        runner_destroy(r[i]);
    }
    kvl_context_destroy(shared);
}

/* ---- the scheduler: preempted requests are computed again ---- */
enum { REQUESTS = 6, NEW = 40, R_PROMPT = 60 };
typedef float request_out[R_PROMPT + NEW][GM_Q_HEADS][GM_DIM]; /* of the last layer */

static kvl_cache_desc sched_desc(kvl_backend_kind kind, uint64_t bytes) {
    kvl_cache_desc d;
    memset(&d, 0, sizeof d);
    d.geometry = gm_geometry("int8", NULL);
    d.context_desc.backend = kind;
    if (kind == lives.kind) lives.describe(&d);
    d.device_bytes = bytes;
    d.max_sequences = 8;
    d.max_seq_tokens = 128;
    d.max_step_tokens = 64;
    return d;
}

/* Does the budget hold a request and a half? */
static bool sched_fits(uint64_t bytes) {
    kvl_cache_desc d = sched_desc(lives.kind, bytes);
    kvl_cache *cache = NULL;
    bool fits = kvl_cache_create(&d, &cache) == KVL_OK && kvl_can_fit(cache, 1, 120, NULL) == KVL_OK;
    kvl_cache_destroy(cache);
    return fits;
}

static uint64_t sched_run(kvl_backend_kind kind, uint64_t bytes, request_out *out) {
    kvl_cache_desc d = sched_desc(kind, bytes);
    kvl_cache *cache = NULL;
    kvl_sched *sched = NULL;
    const kvl_step *step;
    kvl_stats stats;
    gm_buffers *b = (gm_buffers *)calloc(1, sizeof *b);
    int32_t tokens[R_PROMPT], next[GM_ROWS];
    uint32_t i, l, steps = 0;
    char why[256] = "";
    d.error = why;
    d.error_size = sizeof why;
    if (kvl_cache_create(&d, &cache) != KVL_OK) fail_msg("%s", why);
    KOK(cache, kvl_sched_create(cache, &(kvl_sched_desc){0}, &sched));
    for (i = 0; i < REQUESTS; i++) {
        kvl_request q;
        kvl_req handle;
        memset(&q, 0, sizeof q);
        for (l = 0; l < R_PROMPT; l++) tokens[l] = (int32_t)(1000 * i + l);
        q.tokens = tokens;
        q.n_tokens = R_PROMPT;
        q.max_new_tokens = NEW;
        q.user = out[i];
        KOK(cache, kvl_sched_submit(sched, &q, &handle));
    }
    while (kvl_sched_plan(sched, &step) == KVL_OK) {
        if (steps++ > 2000) fail_msg("not done");
        for (l = 0; l < GM_LAYERS; l++) KOK(cache, gm_attend(cache, step, l, b));
        for (i = 0; i < step->n_tokens; i++) {
            request_out *to = (request_out *)step->spans[step->row_span[i]].user;
            memcpy((*to)[step->positions[i]], b->out[i], sizeof b->out[0]);
        }
        for (i = 0; i < step->n_logits; i++) next[i] = (int32_t)(5000 + step->positions[step->logit_rows[i]]);
        KOK(cache, kvl_sched_commit(sched, step, next));
    }
    KOK(cache, kvl_get_stats(cache, &stats));
    assert_int_equal(stats.finished, REQUESTS);
    KOK(cache, kvl_validate(cache));
    kvl_sched_destroy(sched);
    kvl_cache_destroy(cache);
    free(b);
    return stats.preemptions;
}

static void test_preemption(void **state) {
    static request_out cpu[REQUESTS], gpu[REQUESTS];
    uint64_t preemptions = 0, bytes;
    uint32_t i, p, h, e;
    (void)state;
    sched_run(KVL_BACKEND_CPU, 32u << 20, cpu);
    for (bytes = 256u << 10; !preemptions && bytes < 8u << 20;
         bytes += 32u << 10) { /* the first that preempts */
        if (sched_fits(bytes)) preemptions = sched_run(lives.kind, bytes, gpu);
    }
    assert_true(preemptions > 0);
    for (i = 0; i < REQUESTS; i++) {
        for (p = 0; p < R_PROMPT + NEW - 1; p++) {
            for (h = 0; h < GM_Q_HEADS; h++) {
                for (e = 0; e < GM_DIM; e++) {
                    double x = (double)cpu[i][p][h][e], y = (double)gpu[i][p][h][e];
                    if (!(fabs(x - y) <= 0.02))
                        fail_msg("request %u position %u: %.9g on the CPU, %.9g", i, p, x, y);
                }
            }
        }
    }
}
#endif
