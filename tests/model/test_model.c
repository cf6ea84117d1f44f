/* Model checking: random operations on random caches, each compared with a model that knows nothing of
   blocks: a sequence is the list of its tokens, and whatever its tables lead to must hold exactly their KV
   (the shadow in kvl_test.h).

     test_model [-n OPERATIONS] [-s SEED] [-c CASE]

   -n: in all, 1000000 if not given; -c: only this case of each test (with the SEED that a failure printed). */
#define KVL_IMPLEMENTATION
#include "../common/kvl_world.h"

static uint64_t option_operations = 1000000, option_seed = 1;
static long option_case = -1;

enum { MAX_LAYERS = 4, CASE_OPERATIONS = 2000 };

/* ---------------------------------------------------------------- random geometries */

typedef struct shape {
    kvl_layer layers[MAX_LAYERS];
    kvl_cache_desc desc;
    bool windows;
    uint32_t tokens; /* of a block */
} shape;

static void random_shape(kt_rng *rng, kt_env *env, shape *s) {
    static const uint32_t sizes[] = {8, 8, 16, 16, 32, 64};
    static const char *const presets[] = {NULL,  NULL,  "f16",   "f16",     "bf16",
                                          "f32", "fp8", "nvfp4", "balanced"};
    static const char *const channel_presets[] = {"int4", "int8+"};
    uint32_t n_layers = kt_between(rng, 1, MAX_LAYERS), n_windows = kt_below(rng, 3), window[2], sinks[2];
    s->tokens = sizes[kt_below(rng, KT_COUNT(sizes))];
    s->desc = kt_desc(env, n_layers, s->tokens, presets[kt_below(rng, KT_COUNT(presets))]);
    if (s->tokens >= 32 && kt_chance(rng, 40)) s->desc.geometry.preset = channel_presets[kt_below(rng, 2)];
    for (int i = 0; i < 2; i++) {
        window[i] = kt_between(rng, 1, 4 * s->tokens);
        sinks[i] = kt_chance(rng, 50) ? 0 : kt_between(rng, 1, 2 * s->tokens);
    }
    memset(s->layers, 0, sizeof s->layers);
    s->windows = false;
    for (uint32_t l = 0; l < n_layers && n_windows; l++) {
        uint32_t which = kt_below(rng, n_windows + 1);
        if (!which) continue;
        s->layers[l].window = window[which - 1];
        s->layers[l].sink_tokens = sinks[which - 1];
        s->windows = true;
    }
    for (uint32_t l = 0; l < n_layers; l++) { /* some groups packed, some not */
        if (kt_chance(rng, 10)) s->layers[l].k_format = KVL_INT8;
        if (kt_chance(rng, 10)) s->layers[l].v_format = KVL_FP8_E4M3;
        if (kt_chance(rng, 10)) s->layers[l].k_format = s->layers[l].v_format = KVL_F16;
    }
    s->desc.geometry.layers = s->layers;
    s->desc.geometry.sink_blocks = kt_chance(rng, 70)   ? 0
                                   : kt_chance(rng, 50) ? KVL_NONE
                                                        : kt_between(rng, 1, 3);
    s->desc.max_sequences = kt_between(rng, 3, 10);
    s->desc.max_step_tokens = kt_between(rng, 8, 160);
    s->desc.max_seq_tokens = kt_between(rng, 2 * s->tokens, 14 * s->tokens);
    s->desc.lookup_hash_bits = kt_chance(rng, 70) ? 0 : kt_between(rng, 1, 4);
    s->desc.no_prefix_cache = kt_chance(rng, 10);
    s->desc.device_bytes = kt_budget(&s->desc, kt_between(rng, 12, 70));
}

/* Prompts that often begin alike: most tokens are the same for all, a few positions choose among two. */
static int32_t prompt_token(kt_rng *rng, uint32_t position, uint32_t tokens) {
    bool choose = position % tokens == tokens / 2 || position % (2 * tokens) == 0;
    return choose && kt_chance(rng, 40) ? 1 : kt_chance(rng, 2) ? (int32_t)kt_below(rng, 5) : 0;
}

/* ---------------------------------------------------------------- the cache alone */

enum { MAX_LIVE = 10, MAX_PINS = 16 };

typedef struct live_seq {
    kt_seq q;
    bool pinned;
    kt_stream pin;     /* what it held when it was pinned */
    uint32_t reserved; /* steps up to this length cannot fail */
} live_seq;

enum { REAL_ROWS = 160 };
typedef struct
    real_tensors { /* of one layer, for cases on the CPU backend: 2 query heads, 1 KV head, dim 16 */
    float q[REAL_ROWS * 32], k[REAL_ROWS * 16], v[REAL_ROWS * 16], out[REAL_ROWS * 32];
} real_tensors;

typedef struct cache_case {
    real_tensors *real; /* null on the null backend */
    kt_env env;
    shape shape;
    kvl_cache *cache;
    kt_shadow shadow;
    kt_rng rng;
    live_seq live[MAX_LIVE + 1]; /* one to try with when all are open */
    uint32_t n_live, max_seq_tokens;
    kt_stream pins[MAX_PINS]; /* of closed sequences */
    uint32_t n_pins;
    kvl_seq stale;
    uint64_t steps, refused_steps, reused; /* so that it can be told that much was tested */
} cache_case;

static void drop_live(cache_case *k, uint32_t i) {
    kt_stream_free(&k->live[i].q.stream);
    kt_stream_free(&k->live[i].pin);
    k->live[i] = k->live[--k->n_live];
}

static void op_open(cache_case *k) {
    live_seq *s = &k->live[k->n_live];
    kvl_seq_desc d;
    uint32_t n = kt_below(&k->rng, k->max_seq_tokens + 1);
    kvl_result r;
    if (kt_chance(&k->rng, 50) && n > 3 * k->shape.tokens + 3) n = 3 * k->shape.tokens + kt_below(&k->rng, 4);
    memset(s, 0, sizeof *s);
    kt_stream_init(&s->q.stream, kt_chance(&k->rng, 90) ? 0 : kt_below(&k->rng, 3),
                   kt_chance(&k->rng, 95) ? 0 : 1);
    for (uint32_t p = 0; p < n; p++) kt_push(&s->q.stream, prompt_token(&k->rng, p, k->shape.tokens));
    memset(&d, 0, sizeof d);
    d.tokens = s->q.stream.tokens;
    d.n_tokens = n;
    d.name_space = s->q.stream.name_space;
    d.salt = s->q.stream.salt;
    d.priority = kt_below(&k->rng, 8);
    d.no_match = kt_chance(&k->rng, 3);
    d.no_keep = kt_chance(&k->rng, 5);
    r = kvl_seq_open(k->cache, &d, &s->q.seq, &s->q.reuse);
    if (k->n_live == k->shape.desc.max_sequences) {
        KT_CHECK(r == KVL_LIMIT, "%s with all sequences open", kvl_result_name(r));
        kt_stream_free(&s->q.stream);
        return;
    }
    KT_OK(k->cache, r);
    KT_CHECK(n ? s->q.reuse.matched < n : s->q.reuse.matched == 0, "matched %u of %u", s->q.reuse.matched, n);
    KT_CHECK(!d.no_match || s->q.reuse.matched == 0, "matched %u though told not to", s->q.reuse.matched);
    s->q.length = s->q.reuse.matched;
    k->reused += s->q.reuse.matched;
    k->n_live++;
}

/* The first n rows of one tile in memory are those of block j of a stream; a packed tile is, byte for byte,
   the encoding of its rows. */
static void check_tile(const kt_stream *s, uint32_t l, uint32_t j, uint32_t n, uint32_t side,
                       const kvl_block_layout *at, uint64_t base, uint32_t T) {
    float want[64 * 16], rows[64 * 16];
    unsigned char encoded[64 * 16 * 4];
    kvl_format f = side ? at->v_format : at->k_format;
    const char *tile = (const char *)(uintptr_t)(base + at->layer_offset + (side ? at->v_offset : 0));
    for (uint32_t i = 0; i < n * 16; i++) want[i] = kt_value(s, j * T + i / 16, l, 0, side, i % 16);
    if (f == KVL_F32 || f == KVL_F16 || f == KVL_BF16) {
        assert_int_equal(kvl_tile_decode(f, T, 16, 0, tile, true, rows), KVL_OK);
        for (uint32_t i = 0; i < n * 16; i++) {
            KT_CHECK(rows[i] == want[i], "layer %u side %u position %u: memory holds %g, not %g", l, side,
                     j * T + i / 16, (double)rows[i], (double)want[i]);
        }
    } else {
        size_t bytes = kvl_tile_bytes(f, T, 16);
        KT_CHECK(n == T, "layer %u block %u: %u rows of a packed block", l, j, n);
        assert_int_equal(kvl_tile_encode(f, T, 16, 0, want, encoded), KVL_OK);
        KT_CHECK(memcmp(tile, encoded, bytes) == 0,
                 "layer %u side %u block %u: other bytes than its rows encode to", l, side, j);
    }
}

/* Before the step writes: whatever its tables lead to in memory is what the sequence wrote there once. */
static void check_memory(cache_case *k, const kvl_step *step, kt_stream *const *streams) {
    uint32_t T = k->shape.tokens;
    for (uint32_t l = 0; l < k->shape.desc.geometry.n_layers; l++) {
        uint32_t g = step->layer_group[l], window = k->shape.layers[l].window;
        for (uint32_t s = 0; s < step->n_spans; s++) {
            const kvl_span_blocks *b = &step->blocks[(size_t)g * step->n_spans + s];
            uint32_t position = step->spans[s].position;
            for (uint32_t j = 0; j * T < position; j++) {
                uint32_t entry = j < b->first_own ? b->table[j] : b->own[0], n = position - j * T;
                kvl_block_layout at;
                if (entry == KVL_NONE) continue; /* the shadow has checked that nobody needs it */
                if (window && (j + 1) * T + window <= position && j * T >= k->shape.layers[l].sink_tokens)
                    continue;
                KT_OK(k->cache, kvl_cache_layout(k->cache, l, (entry & KVL_ENTRY_EXACT) != 0, &at));
                for (uint32_t side = 0; side < 2; side++) {
                    check_tile(streams[s], l, j, n < T ? n : T, side, &at,
                               step->block_address[entry & KVL_ENTRY_ID], T);
                }
            }
        }
    }
}

/* kvl_attend for n_layers layers. With real tensors: every answer is a mean of values, so within ±0.5 and a
   number, though fresh and freed memory is full of NaN (desc.poison). */
static void attend_layers(cache_case *k, const kvl_step *step, kt_stream *const *streams, uint32_t n_layers) {
    real_tensors *t = k->real;
    kvl_tensor tq, tk, tv, to;
    if (!t) {
        kt_attend(k->cache, step, n_layers);
        return;
    }
    memset(&tq, 0, sizeof tq);
    tk = tv = to = tq;
    tq.data = t->q;
    tk.data = t->k;
    tv.data = t->v;
    to.data = t->out;
    for (uint32_t l = 0; l < n_layers; l++) {
        for (uint32_t r = 0; r < step->n_tokens; r++) {
            const kt_stream *s = streams[step->row_span[r]];
            for (uint32_t d = 0; d < 16; d++) {
                t->k[r * 16 + d] = kt_value(s, step->positions[r], l, 0, 0, d);
                t->v[r * 16 + d] = kt_value(s, step->positions[r], l, 0, 1, d);
                t->q[r * 32 + d] = t->q[r * 32 + 16 + d] = 1.0f - (float)d / 8;
            }
        }
        KT_OK(k->cache, kvl_attend(k->cache, step, l, &tq, &tk, &tv, &to));
        for (uint32_t i = 0; i < step->n_tokens * 32; i++) {
            KT_CHECK(fabsf(t->out[i]) <= 0.6f, "layer %u row %u: %g", l, i / 32, (double)t->out[i]);
        }
    }
}

static void op_step(cache_case *k) {
    kvl_span spans[MAX_LIVE];
    kt_stream *streams[MAX_LIVE];
    live_seq *who[MAX_LIVE];
    uint32_t n = 0, rows = 0, room = k->shape.desc.max_step_tokens, start = kt_below(&k->rng, k->n_live);
    uint32_t wanted = kt_chance(&k->rng, 30) ? k->n_live : kt_between(&k->rng, 1, 3);
    const kvl_step *step = NULL;
    bool certain;
    kvl_result r;
    memset(spans, 0, sizeof spans);
    for (uint32_t i = 0; i < k->n_live && n < wanted && rows < room; i++) {
        live_seq *s = &k->live[(start + i) % k->n_live];
        uint32_t most = k->max_seq_tokens - s->q.length, take;
        if (most > room - rows) most = room - rows;
        if (!most) continue;
        take = kt_chance(&k->rng, 55) ? 1 : kt_between(&k->rng, 1, 3 * k->shape.tokens);
        if (take > most) take = most;
        while (s->q.stream.n < s->q.length + take) {
            kt_push(&s->q.stream, prompt_token(&k->rng, s->q.stream.n, k->shape.tokens));
        }
        spans[n].seq = s->q.seq;
        spans[n].tokens = s->q.stream.tokens + s->q.length;
        spans[n].n_tokens = take;
        spans[n].n_logits = kt_below(&k->rng, take + 1);
        spans[n].user = s;
        streams[n] = &s->q.stream;
        who[n++] = s;
        rows += take;
    }
    if (!n) return;
    certain = n == 1 && who[0]->q.length + rows <= who[0]->reserved;
    r = kvl_step_begin(k->cache, spans, n, &step);
    KT_CHECK(r == KVL_OK || r == KVL_NO_BLOCKS, "%s (%s)", kvl_result_name(r), kvl_last_error(k->cache));
    KT_CHECK(r == KVL_OK || !certain, "no blocks for a step that was reserved up to %u", who[0]->reserved);
    if (r != KVL_OK) {
        k->refused_steps++;
        return;
    }
    k->steps++;
    KT_CHECK(step->n_spans == n, "%u spans, not %u", step->n_spans, n);
    for (uint32_t i = 0; i < n; i++) {
        const kvl_step_span *sp = &step->spans[i];
        KT_CHECK(sp->user == who[i] && sp->seq.id == who[i]->q.seq.id && sp->position == who[i]->q.length &&
                     sp->n_rows == spans[i].n_tokens && sp->n_logits == spans[i].n_logits,
                 "span %u is not what was asked for", i);
    }
    kt_shadow_step(&k->shadow, step, streams);
    if (k->real) check_memory(k, step, streams);
    if (kt_chance(&k->rng, 20)) KT_VALID(k->cache);
    if (kt_chance(&k->rng, 15)) {
        attend_layers(k, step, streams, kt_below(&k->rng, k->shape.desc.geometry.n_layers + 1));
        KT_OK(k->cache, kvl_step_abort(k->cache, step));
        return;
    }
    attend_layers(k, step, streams, k->shape.desc.geometry.n_layers);
    KT_OK(k->cache, kvl_step_end(k->cache, step));
    for (uint32_t i = 0; i < n; i++) who[i]->q.length += spans[i].n_tokens;
}

static void op_fork(cache_case *k, live_seq *s) {
    live_seq *f = &k->live[k->n_live];
    uint32_t length = 0;
    kvl_seq seq;
    kvl_result r = kvl_seq_fork(k->cache, s->q.seq, &seq, &length);
    if (k->n_live == k->shape.desc.max_sequences) {
        KT_CHECK(r == KVL_LIMIT, "%s with all sequences open", kvl_result_name(r));
        return;
    }
    KT_OK(k->cache, r);
    KT_CHECK(length == s->q.length, "forked at %u, not %u", length, s->q.length);
    memset(f, 0, sizeof *f);
    f->q.seq = seq;
    f->q.length = length;
    kt_stream_copy(&f->q.stream, &s->q.stream, length);
    s->reserved = 0; /* its open block is shared now */
    k->n_live++;
}

static void op_trim(cache_case *k, live_seq *s) {
    uint32_t n = kt_chance(&k->rng, 50) && s->q.length
                     ? s->q.length - kt_below(&k->rng, s->q.length < 20 ? s->q.length : 20)
                     : kt_below(&k->rng, s->q.length + 1);
    uint32_t reached = 0, T = k->shape.tokens;
    KT_OK(k->cache, kvl_seq_trim(k->cache, s->q.seq, n, &reached));
    KT_CHECK(reached <= n, "trim to %u reached %u", n, reached);
    if (!k->shape.windows) {
        uint32_t least = !k->shadow.two_classes[0] || n == s->q.length ? n : n - n % T;
        KT_CHECK(reached >= least, "trim from %u to %u reached only %u", s->q.length, n, reached);
    }
    if (reached < s->q.length) s->q.stream.n = reached;
    s->q.length = reached;
    s->reserved = 0;
}

static void op_extend(cache_case *k, live_seq *s) {
    uint32_t n = kt_between(&k->rng, 1, 4 * k->shape.tokens);
    kvl_result r;
    if (n > k->max_seq_tokens - s->q.length) return;
    r = kvl_seq_extend(k->cache, s->q.seq, n);
    KT_CHECK(r == KVL_OK || r == KVL_NO_BLOCKS, "%s", kvl_result_name(r));
    if (r == KVL_OK && s->q.length + n > s->reserved) s->reserved = s->q.length + n;
}

static void op_close(cache_case *k, uint32_t i) {
    live_seq *s = &k->live[i];
    k->stale = s->q.seq;
    KT_OK(k->cache, kvl_seq_close(k->cache, s->q.seq));
    if (s->pinned) {
        KT_CHECK(k->n_pins < MAX_PINS, "%u pins", k->n_pins);
        k->pins[k->n_pins++] = s->pin;
        memset(&s->pin, 0, sizeof s->pin);
    }
    drop_live(k, i);
}

static void unpin_one(cache_case *k, uint32_t i, bool all) {
    kt_stream *p = &k->pins[i];
    kvl_seq_desc d;
    uint32_t n = 0;
    memset(&d, 0, sizeof d);
    d.tokens = p->tokens;
    d.n_tokens = p->n;
    d.name_space = p->name_space;
    d.salt = p->salt;
    do {
        KT_OK(k->cache, kvl_prefix_unpin(k->cache, &d, &n));
    } while (all && n);
    kt_stream_free(p);
    k->pins[i] = k->pins[--k->n_pins];
}

static void op_pin(cache_case *k, live_seq *s) {
    bool pin = kt_chance(&k->rng, 40);
    kvl_result r;
    uint32_t held = k->n_pins;
    for (uint32_t i = 0; i < k->n_live; i++) held += k->live[i].pinned;
    if (k->n_pins && kt_chance(&k->rng, 50)) {
        unpin_one(k, kt_below(&k->rng, k->n_pins), false);
        return;
    }
    if (pin && held > 4) return;
    r = kvl_seq_pin(k->cache, s->q.seq, pin);
    KT_CHECK(r == KVL_OK || (pin && r == KVL_INVALID_ARG), "%s",
             kvl_result_name(r)); /* nothing in the tree */
    if (r != KVL_OK) return;
    kt_stream_free(&s->pin);
    if (pin) kt_stream_copy(&s->pin, &s->q.stream, s->q.length);
    s->pinned = pin;
}

static void op_resize(cache_case *k) {
    uint64_t top = k->shape.desc.device_bytes, held = 0;
    uint64_t bytes = kt_chance(&k->rng, 60)   ? top
                     : kt_chance(&k->rng, 20) ? 0
                                              : kt_random(&k->rng) % (top + 1);
    kvl_result r = kvl_cache_resize(k->cache, bytes, &held);
    kvl_stats s = kt_stats(k->cache);
    KT_CHECK(r == KVL_OK || (r == KVL_NO_BLOCKS && held > bytes), "%s, %llu bytes held of %llu",
             kvl_result_name(r), (unsigned long long)held, (unsigned long long)bytes);
    KT_CHECK(s.device_budget == (r == KVL_OK ? bytes : held), "budget %llu",
             (unsigned long long)s.device_budget);
}

static void op_can_fit(cache_case *k) {
    kvl_fit fit;
    uint32_t n = kt_between(&k->rng, 1, k->shape.desc.max_sequences),
             tokens = kt_between(&k->rng, 1, k->max_seq_tokens);
    kvl_result r = kvl_can_fit(k->cache, n, tokens, &fit);
    KT_CHECK(r == KVL_OK || r == KVL_NO_BLOCKS || r == KVL_NEVER_FITS, "%s", kvl_result_name(r));
    KT_CHECK((r == KVL_OK) == (fit.short_bytes == 0) || r == KVL_NEVER_FITS, "%s, %llu bytes short",
             kvl_result_name(r), (unsigned long long)fit.short_bytes);
    KT_CHECK((r != KVL_NEVER_FITS) == fit.fits_empty, "%s, fits_empty %d", kvl_result_name(r),
             fit.fits_empty);
    KT_CHECK(kvl_can_fit(k->cache, 1, (uint32_t)fit.max_tokens, NULL) == KVL_OK || fit.max_tokens == 0,
             "%llu tokens would not fit", (unsigned long long)fit.max_tokens);
}

static void op_misuse(cache_case *k) {
    const kvl_step *step = NULL;
    const int32_t token = 0;
    uint32_t length;
    kvl_span span;
    kvl_seq out;
    memset(&span, 0, sizeof span);
    span.seq = k->stale;
    span.tokens = &token;
    span.n_tokens = 1;
    KT_RESULT(KVL_INVALID_HANDLE, k->cache, kvl_seq_close(k->cache, k->stale));
    KT_RESULT(KVL_INVALID_HANDLE, k->cache, kvl_seq_fork(k->cache, k->stale, &out, NULL));
    KT_RESULT(KVL_INVALID_HANDLE, k->cache, kvl_seq_length(k->cache, k->stale, &length));
    KT_RESULT(KVL_INVALID_HANDLE, k->cache, kvl_step_begin(k->cache, &span, 1, &step));
    if (k->n_live) {
        kvl_span twice[2];
        twice[0] = span;
        twice[0].seq = k->live[0].q.seq;
        twice[1] = twice[0];
        if (k->live[0].q.length < k->max_seq_tokens) {
            kvl_result r = kvl_step_begin(k->cache, twice, 2, &step);
            KT_CHECK(r == KVL_INVALID_ARG || r == KVL_NO_BLOCKS, "%s", kvl_result_name(r));
        }
    }
}

static void random_operation(cache_case *k) {
    uint32_t dice = kt_below(&k->rng, 100), i;
    if (!k->n_live || dice < 14) {
        op_open(k);
        return;
    }
    i = kt_below(&k->rng, k->n_live);
    if (dice < 66)
        op_step(k);
    else if (dice < 72)
        op_fork(k, &k->live[i]);
    else if (dice < 79)
        op_trim(k, &k->live[i]);
    else if (dice < 83)
        op_extend(k, &k->live[i]);
    else if (dice < 91)
        op_close(k, i);
    else if (dice < 94)
        op_pin(k, &k->live[i]);
    else if (dice < 97)
        op_resize(k);
    else if (dice < 98)
        op_can_fit(k);
    else
        op_misuse(k);
}

static void check_case(cache_case *k) {
    kvl_stats s = kt_stats(k->cache);
    KT_VALID(k->cache);
    KT_CHECK(s.bytes_slabs + s.bytes_scratch + s.bytes_workspace <= s.device_budget,
             "%llu bytes above the budget",
             (unsigned long long)(s.bytes_slabs + s.bytes_scratch + s.bytes_workspace - s.device_budget));
    KT_CHECK(s.sequences == k->n_live, "%u sequences, not %u", s.sequences, k->n_live);
    for (uint32_t i = 0; i < k->n_live; i++) {
        uint32_t length = 0;
        KT_OK(k->cache, kvl_seq_length(k->cache, k->live[i].q.seq, &length));
        KT_CHECK(length == k->live[i].q.length, "sequence %u has %u tokens, not %u", i, length,
                 k->live[i].q.length);
    }
}

static void run_cache_case(uint64_t number, uint64_t operations, bool real, uint64_t *totals) {
    cache_case *k = (cache_case *)calloc(1, sizeof *k);
    kvl_cache_desc full;
    kvl_stats s;
    k->rng.state = kt_mix(option_seed + 1000 * real) + number * 1000003;
    kt_env_init(&k->env);
    random_shape(&k->rng, &k->env, &k->shape);
    if (real) {
        k->real = (real_tensors *)calloc(1, sizeof *k->real);
        assert_non_null(k->real);
        k->shape.desc.context_desc.backend = KVL_BACKEND_CPU;
        k->shape.desc.device_bytes =
            kt_budget(&k->shape.desc, kt_between(&k->rng, 12, 70)); /* with its workspace */
        k->shape.desc.poison = true;
    }
    KT_OK(NULL, kvl_cache_defaults(&k->shape.desc, &full));
    k->max_seq_tokens = full.max_seq_tokens;
    KT_OK(NULL, kvl_cache_create(&k->shape.desc, &k->cache));
    kt_shadow_init(&k->shadow, &k->shape.desc.geometry);
    for (uint64_t op = 0; op < operations; op++) {
        snprintf(kt_where, sizeof kt_where, "%s: -s %llu -c %llu, operation %llu", real ? "memory" : "cache",
                 (unsigned long long)option_seed, (unsigned long long)number, (unsigned long long)op);
        random_operation(k);
        check_case(k);
    }
    while (k->n_live) op_close(k, 0);
    while (k->n_pins) unpin_one(k, 0, true);
    KT_OK(k->cache, kvl_cache_resize(k->cache, 0, NULL));
    s = kt_stats(k->cache);
    KT_VALID(k->cache);
    KT_CHECK(kt_used(&s) + kt_cached(&s) + s.blocks_pinned[0] + s.blocks_pinned[1] + s.slabs == 0,
             "%u slabs are left", s.slabs);
    KT_OK(k->cache, kvl_cache_resize(k->cache, k->shape.desc.device_bytes, NULL));
    totals[0] += k->steps;
    totals[1] += k->reused;
    totals[2] += k->refused_steps;
    totals[3] += k->shadow.copies;
    totals[4] += k->shadow.seals;
    totals[5] += s.evicted_blocks;
    totals[6] += s.duplicate_blocks;
    totals[7] += s.compactions;
    totals[8] += k->shadow.rows_checked;
    kvl_cache_destroy(k->cache);
    kt_env_check(&k->env);
    kt_shadow_free(&k->shadow);
    free(k->real);
    free(k);
    kt_where[0] = 0;
}

/* The same on the CPU backend: the bytes in memory, through copies, seals and compactions. */
static void test_random_memory(void **state) {
    uint64_t totals[9] = {0}, operations = option_operations / 40, cases = operations / 500 + 1;
    (void)state;
    for (uint64_t c = 0; c < cases; c++) {
        if (option_case < 0 || (uint64_t)option_case == c) run_cache_case(c, 500, true, totals);
    }
    print_message("  steps: %llu, blocks copied: %llu, compactions: %llu\n", (unsigned long long)totals[0],
                  (unsigned long long)totals[3], (unsigned long long)totals[7]);
}

static void test_random_operations(void **state) {
    static const char *const names[] = {
        "steps",          "tokens reused",    "steps refused", "blocks copied", "blocks sealed",
        "blocks evicted", "duplicates freed", "compactions",   "rows compared"};
    uint64_t totals[9] = {0}, operations = option_operations / 10 * 7,
             cases = operations / CASE_OPERATIONS + 1;
    (void)state;
    for (uint64_t c = 0; c < cases; c++) {
        if (option_case < 0 || (uint64_t)option_case == c) run_cache_case(c, CASE_OPERATIONS, false, totals);
    }
    for (size_t i = 0; i < KT_COUNT(names); i++) {
        print_message("  %s: %llu\n", names[i], (unsigned long long)totals[i]);
        if (option_case < 0 && operations >= 100000) {
            KT_CHECK(totals[i] > operations / 2000, "only %llu %s: this tests nothing",
                     (unsigned long long)totals[i], names[i]);
        }
    }
}

/* ---------------------------------------------------------------- the scheduler */

typedef struct sched_case {
    kt_world w;
    shape shape;
    kt_rng rng;
    kt_answer *active[512];
    uint32_t n_active, max_seq_tokens, max_active;
    kt_seq direct; /* a sequence of the caller's own beside the scheduler */
    bool direct_open;
    uint64_t submitted, finished, cancelled, forks, aborts, preemptions;
} sched_case;

static const int32_t trace_stops[2] = {3, 5};
static bool is_stop(int32_t token) { return token == 3 || token == 5; }

static void trace_submit(sched_case *k) {
    kt_answer *a;
    kvl_request extra;
    kvl_result r;
    uint32_t n = kt_between(&k->rng, 1,
                            kt_chance(&k->rng, 20) ? k->max_seq_tokens : k->max_seq_tokens / 3 + 1),
             max_new;
    if (k->n_active >= 500 || k->w.n_answers + 1 >= KT_MAX_ANSWERS) return;
    max_new = kt_between(&k->rng, 1, k->max_seq_tokens - n + 1);
    if (max_new > 40) max_new = kt_between(&k->rng, 1, 40);
    memset(&extra, 0, sizeof extra);
    a = kt_answer_new(&k->w);
    kt_stream_init(&a->stream, kt_chance(&k->rng, 90) ? 0 : 1, kt_chance(&k->rng, 95) ? 0 : 1);
    for (uint32_t p = 0; p < n; p++) kt_push(&a->stream, prompt_token(&k->rng, p, k->shape.tokens));
    extra.klass = kt_chance(&k->rng, 30) ? KVL_BACKGROUND : KVL_INTERACTIVE;
    extra.priority = kt_below(&k->rng, 8);
    extra.no_match = kt_chance(&k->rng, 3);
    extra.no_keep = kt_chance(&k->rng, 5);
    if (kt_chance(&k->rng, 20)) {
        extra.stop_tokens = trace_stops;
        extra.n_stop_tokens = 2;
        a->stops = true;
    }
    if (kt_chance(&k->rng, 10)) a->finish_at = kt_between(&k->rng, 1, 20);
    a->seed = kt_random(&k->rng);
    r = kt_world_try(&k->w, a, max_new, &extra);
    if (r == KVL_QUEUE_FULL && k->n_active + 1 > k->w.sdesc.max_waiting) {
        kt_answer_drop(&k->w);
        return;
    }
    KT_CHECK(r == KVL_OK, "a request of %u + %u tokens with room for %u, %u active of %u: %s", n, max_new,
             k->max_seq_tokens, k->n_active, k->w.sdesc.max_waiting, kvl_result_name(r));
    k->active[k->n_active++] = a;
    k->submitted++;
}

static void trace_fork(sched_case *k) {
    kt_answer *parent = k->active[kt_below(&k->rng, k->n_active)];
    if (parent->cancelled || k->n_active + 1 > k->w.sdesc.max_waiting || k->n_active >= 500) return;
    if (k->w.n_answers + 1 >= KT_MAX_ANSWERS) return;
    k->active[k->n_active] = kt_world_fork(&k->w, parent, kt_random(&k->rng));
    k->active[k->n_active]->finish_at = parent->finish_at;
    k->active[k->n_active++]->stops = parent->stops;
    k->forks++;
}

static void trace_cancel(sched_case *k) {
    kt_answer *a = k->active[kt_below(&k->rng, k->n_active)];
    KT_OK(k->w.cache, kvl_sched_cancel(k->w.sched, a->req));
    a->cancelled = true;
    k->cancelled++;
}

/* Takes out what has finished; its tokens must be those that were sampled for it. */
static void trace_collect(sched_case *k) {
    for (uint32_t i = 0; i < k->n_active;) {
        kt_answer *a = k->active[i];
        kvl_req_info info = kt_info(&k->w, a);
        if (info.state != KVL_REQ_FINISHED) {
            i++;
            continue;
        }
        switch (info.finish) {
        case KVL_FINISH_LENGTH:
            KT_CHECK(info.n_generated == a->max_new, "%u tokens of %u", info.n_generated, a->max_new);
            break;
        case KVL_FINISH_STOP:
            KT_CHECK(a->stops && is_stop(a->stream.tokens[a->stream.n - 1]), "%s", "not a stop token");
            break;
        case KVL_FINISH_APP: KT_CHECK(a->finish_at, "%s", "the app did not end it"); break;
        case KVL_FINISH_CANCELLED: KT_CHECK(a->cancelled, "%s", "nobody cancelled it"); break;
        case KVL_FINISH_REFUSED:
            KT_CHECK(k->w.sdesc.refuse_over_gap, "%s", "refused though it may queue");
            KT_CHECK(!a->first_step, "%s", "refused in the middle of its answer");
            break;
        default: KT_CHECK(false, "finished for reason %d", (int)info.finish);
        }
        for (uint32_t p = a->n_prompt; a->stops && !a->cancelled && p < a->stream.n; p++) {
            bool last = p + 1 == a->stream.n;
            KT_CHECK(!is_stop(a->stream.tokens[p]) || (last && info.finish == KVL_FINISH_STOP), "%s",
                     "it went on past a stop token");
        }
        if (!a->cancelled) kt_world_answer_is(&k->w, a, info.finish, info.n_generated);
        kt_stream_free(&a->stream);
        k->active[i] = k->active[--k->n_active];
        k->finished++;
    }
}

static void trace_abort(sched_case *k) {
    const kvl_step *step;
    kvl_result r = kvl_sched_plan(k->w.sched, &step);
    if (r != KVL_OK) return;
    kt_world_check(&k->w, step);
    KT_VALID(k->w.cache);
    kt_attend(k->w.cache, step, kt_below(&k->rng, k->shape.desc.geometry.n_layers + 1));
    if (kt_chance(&k->rng, 20) && k->n_active) trace_cancel(k);
    KT_OK(k->w.cache, kvl_sched_abort(k->w.sched, step));
    k->aborts++;
}

static void trace_direct(sched_case *k) {
    kt_seq *q = &k->direct;
    if (!k->direct_open) {
        kvl_seq_desc d;
        memset(q, 0, sizeof *q);
        kt_stream_init(&q->stream, 0, 0);
        for (uint32_t p = 0; p < k->max_seq_tokens; p++)
            kt_push(&q->stream, prompt_token(&k->rng, p, k->shape.tokens));
        memset(&d, 0, sizeof d);
        d.tokens = q->stream.tokens;
        d.n_tokens = kt_between(&k->rng, 1, q->stream.n);
        if (kvl_seq_open(k->w.cache, &d, &q->seq, &q->reuse) == KVL_OK) {
            q->length = q->reuse.matched;
            k->direct_open = true;
        } else {
            kt_stream_free(&q->stream);
        }
    } else if (kt_chance(&k->rng, 30) || q->length == q->stream.n) {
        kt_close(k->w.cache, q);
        k->direct_open = false;
    } else {
        uint32_t n = kt_between(&k->rng, 1, 2 * k->shape.tokens);
        kvl_result r;
        if (n > q->stream.n - q->length) n = q->stream.n - q->length;
        if (n > k->shape.desc.max_step_tokens) n = k->shape.desc.max_step_tokens;
        r = kt_try_feed(k->w.cache, &k->w.shadow, k->shape.desc.geometry.n_layers, q, n);
        KT_CHECK(r == KVL_OK || r == KVL_NO_BLOCKS, "%s", kvl_result_name(r));
    }
}

static void random_sched(kt_rng *rng, kvl_sched_desc *d) {
    memset(d, 0, sizeof *d);
    d->policy = (kvl_policy)kt_below(rng, 3);
    d->max_waiting = kt_between(rng, 2, 24);
    if (kt_chance(rng, 50)) d->max_running = kt_between(rng, 1, 8);
    if (kt_chance(rng, 50)) d->step_tokens = kt_between(rng, 4, 100);
    if (kt_chance(rng, 30)) d->min_chunk = kt_between(rng, 1, 40);
    if (kt_chance(rng, 50)) {
        d->max_gap_ms = kt_between(rng, 1, 20);
        d->refuse_over_gap = kt_chance(rng, 30);
        d->cost.step_ms = 1;
        d->cost.prefill_token_ms = 0.1;
        d->cost.decode_ms = 0.5;
        d->fixed_cost = kt_chance(rng, 50);
    }
}

/* With the whole budget and nothing else in the way, every request finishes, within a bounded number of
   steps. */
static void trace_drain(sched_case *k) {
    uint64_t bound = 200, steps = 0;
    kvl_result r;
    if (k->direct_open) kt_close(k->w.cache, &k->direct);
    k->direct_open = false;
    KT_OK(k->w.cache, kvl_cache_resize(k->w.cache, k->shape.desc.device_bytes, NULL));
    for (uint32_t i = 0; i < k->n_active; i++) bound += 4 * (k->active[i]->stream.n + k->active[i]->max_new);
    kvl_sched_close(k->w.sched);
    while ((r = kt_world_step(&k->w)) == KVL_OK) {
        KT_VALID(k->w.cache);
        trace_collect(k);
        KT_CHECK(++steps <= bound, "%u requests are not done after %llu steps", k->n_active,
                 (unsigned long long)steps);
    }
    trace_collect(k);
    KT_CHECK(r == KVL_DRAINED && k->n_active == 0, "%s with %u requests left", kvl_result_name(r),
             k->n_active);
}

static void run_sched_case(uint64_t number, uint64_t operations, uint64_t *totals) {
    sched_case *k = (sched_case *)calloc(1, sizeof *k);
    kvl_sched_desc sdesc;
    kvl_cache_desc full;
    uint64_t top;
    kt_world_init(&k->w);
    k->rng.state = kt_mix(option_seed ^ 0x5ced) + number * 1000003;
    random_shape(&k->rng, &k->w.env, &k->shape);
    random_sched(&k->rng, &sdesc);
    k->w.vocabulary = kt_chance(&k->rng, 50) ? 6 : 1000;
    k->w.cost.step_ms = 1;
    k->w.cost.prefill_token_ms = 0.1;
    k->w.cost.decode_ms = 0.5;
    KT_OK(NULL, kvl_cache_defaults(&k->shape.desc, &full));
    k->max_seq_tokens = full.max_seq_tokens;
    top = k->shape.desc.device_bytes;
    kt_world_open(&k->w, k->shape.desc, &sdesc);
    k->w.shadow.geometry = &k->w.desc.geometry;
    for (uint64_t op = 0; op < operations; op++) {
        uint32_t dice = kt_below(&k->rng, 100);
        snprintf(kt_where, sizeof kt_where, "scheduler: -s %llu -c %llu, operation %llu",
                 (unsigned long long)option_seed, (unsigned long long)number, (unsigned long long)op);
        if (dice < 12)
            trace_submit(k);
        else if (dice < 15 && k->n_active)
            trace_fork(k);
        else if (dice < 17 && k->n_active)
            trace_cancel(k);
        else if (dice < 23)
            trace_abort(k);
        else if (dice < 26)
            trace_direct(k);
        else if (dice < 28) {
            uint64_t bytes = kt_chance(&k->rng, 70) ? top : kt_random(&k->rng) % (top + 1);
            kvl_result r = kvl_cache_resize(k->w.cache, bytes, NULL);
            KT_CHECK(r == KVL_OK || (r == KVL_NO_BLOCKS && k->direct_open), "%s", kvl_result_name(r));
        } else {
            kvl_result r = kt_world_step(&k->w);
            kvl_stats s = kt_stats(k->w.cache);
            KT_CHECK(r == KVL_OK || r == KVL_IDLE, "%s", kvl_result_name(r));
            KT_CHECK(r == KVL_OK || !k->n_active || k->direct_open || s.device_budget < top ||
                         s.waiting + s.running == 0,
                     "idle with %u waiting and %u running", s.waiting, s.running);
        }
        KT_VALID(k->w.cache);
        trace_collect(k);
    }
    trace_drain(k);
    {
        kvl_stats s = kt_stats(k->w.cache);
        totals[0] += k->submitted;
        totals[1] += k->finished - k->cancelled;
        totals[2] += k->cancelled;
        totals[3] += k->forks;
        totals[4] += k->aborts;
        totals[5] += s.preemptions;
        totals[6] += s.steps;
        totals[7] += s.hit_tokens;
        KT_CHECK(s.submitted == k->submitted + k->forks && s.finished == s.submitted,
                 "%llu submitted, %llu finished", (unsigned long long)s.submitted,
                 (unsigned long long)s.finished);
    }
    kt_world_close(&k->w);
    free(k);
    kt_where[0] = 0;
}

static void test_random_traces(void **state) {
    static const char *const names[] = {"requests", "finished",    "cancelled", "forks",
                                        "aborts",   "preemptions", "steps",     "tokens reused"};
    uint64_t totals[8] = {0}, operations = option_operations / 10 * 3,
             cases = operations / CASE_OPERATIONS + 1;
    (void)state;
    for (uint64_t c = 0; c < cases; c++) {
        if (option_case < 0 || (uint64_t)option_case == c) run_sched_case(c, CASE_OPERATIONS, totals);
    }
    for (size_t i = 0; i < KT_COUNT(names); i++) {
        print_message("  %s: %llu\n", names[i], (unsigned long long)totals[i]);
        if (option_case < 0 && operations >= 50000) {
            KT_CHECK(totals[i] > operations / 2000, "only %llu %s: this tests nothing",
                     (unsigned long long)totals[i], names[i]);
        }
    }
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_operations),
        cmocka_unit_test(test_random_memory),
        cmocka_unit_test(test_random_traces),
    };
    for (int i = 1; i < argc; i += 2) {
        const char *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (value && !strcmp(argv[i], "-n"))
            option_operations = strtoull(value, NULL, 0);
        else if (value && !strcmp(argv[i], "-s"))
            option_seed = strtoull(value, NULL, 0);
        else if (value && !strcmp(argv[i], "-c"))
            option_case = strtol(value, NULL, 0);
        else {
            fprintf(stderr, "usage: %s [-n OPERATIONS] [-s SEED] [-c CASE]\n", argv[0]);
            return 2;
        }
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
