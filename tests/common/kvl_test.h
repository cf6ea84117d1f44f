/* Shared helpers of the tests: an injected clock, an allocator that counts and fails, a toy model, and a
   shadow of the cache's memory that checks what every block table entry leads to.

   A test defines KVL_IMPLEMENTATION and includes this file; it includes kvlite.h before cmocka. */
#ifndef KVL_TEST_H
#define KVL_TEST_H

#include "../../kvlite.h"

#include <stdarg.h>
#include <stddef.h>
#include <math.h>
#include <stdint.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <setjmp.h>
#include <pthread.h>
#include <cmocka.h>

#define KT_UNUSED __attribute__((unused))
#define KT_COUNT(a) (sizeof(a) / sizeof((a)[0]))

/* ---------------------------------------------------------------- checks */

static KT_UNUSED char kt_where[256]; /* what a failure prints besides its own text: seed, case, operation */
static KT_UNUSED char kt_error[256]; /* why the last create failed (desc.error of kt_desc) */

static KT_UNUSED const char *kt_why(const kvl_cache *cache) {
    return cache ? kvl_last_error(cache) : kt_error;
}

static KT_UNUSED __attribute__((noreturn)) void kt_failed(const char *file, int line, const char *what,
                                                          const char *format, ...) {
    va_list args;
    fprintf(stderr, "%s:%d: %s", file, line, what);
    if (kt_where[0]) fprintf(stderr, " [%s]", kt_where);
    fprintf(stderr, ": ");
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, "\n");
    _fail(file, line);
    abort(); /* not reached: _fail jumps */
}

#define KT_CHECK(condition, ...)                                                  \
    do {                                                                          \
        if (!(condition)) kt_failed(__FILE__, __LINE__, #condition, __VA_ARGS__); \
    } while (0)

#define KT_RESULT(expected, cache, call)                                                         \
    do {                                                                                         \
        kvl_result kt_result_ = (call);                                                          \
        if (kt_result_ != (expected))                                                            \
            kt_failed(__FILE__, __LINE__, #call, "%s, not %s (%s)", kvl_result_name(kt_result_), \
                      kvl_result_name(expected), kt_why(cache));                                 \
    } while (0)
#define KT_OK(cache, call) KT_RESULT(KVL_OK, cache, call)

#define KT_VALID(cache)                                                                 \
    do {                                                                                \
        if (kvl_validate(cache) != KVL_OK)                                              \
            kt_failed(__FILE__, __LINE__, "kvl_validate", "%s", kvl_last_error(cache)); \
    } while (0)

/* ---------------------------------------------------------------- randomness */

typedef struct kt_rng {
    uint64_t state;
} kt_rng;

static KT_UNUSED uint64_t kt_mix(uint64_t x) { /* splitmix64's finaliser */
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static KT_UNUSED uint64_t kt_random(kt_rng *rng) { return kt_mix(rng->state++); }
static KT_UNUSED uint32_t kt_below(kt_rng *rng, uint32_t n) {
    return (uint32_t)((kt_random(rng) >> 32) * n >> 32);
}
static KT_UNUSED uint32_t kt_between(kt_rng *rng, uint32_t low, uint32_t high) {
    return low + kt_below(rng, high - low + 1);
}
static KT_UNUSED bool kt_chance(kt_rng *rng, uint32_t percent) { return kt_below(rng, 100) < percent; }

/* ---------------------------------------------------------------- clock and allocator */

typedef struct kt_env { /* the user pointer of a context's callbacks */
    uint64_t now_ns;
    pthread_mutex_t lock;
    size_t live_bytes;
    uint64_t live, calls; /* allocations now, and requests for memory ever */
    uint64_t fail_at;     /* this request (1 = the first from now on: kt_env_fail) fails; 0 = none */
    bool fail_after;      /* and all after it */
    uint64_t failures, logs;
    bool bad_size; /* an old_size that was not what was asked for */
} kt_env;

typedef struct kt_header {
    size_t size;
    uint64_t magic;
    uint64_t pad[2]; /* keeps the alignment of what follows */
} kt_header;
#define KT_MAGIC 0x6b766c74657374u

static KT_UNUSED void kt_env_init(kt_env *env) {
    memset(env, 0, sizeof *env);
    env->now_ns = 1000000000u;
    pthread_mutex_init(&env->lock, NULL);
}

static KT_UNUSED void kt_env_fail(kt_env *env, uint64_t nth, bool and_after) { /* nth 0: never */
    env->fail_at = nth ? env->calls + nth : 0;
    env->fail_after = and_after;
    env->failures = 0;
}

static KT_UNUSED uint64_t kt_clock(void *user) {
    return __atomic_load_n(&((kt_env *)user)->now_ns, __ATOMIC_RELAXED);
}
static KT_UNUSED void kt_advance_ms(kt_env *env, double ms) {
    __atomic_fetch_add(&env->now_ns, (uint64_t)(ms * 1e6 + 0.5), __ATOMIC_RELAXED);
}

static KT_UNUSED void *kt_alloc(void *user, void *ptr, size_t old_size, size_t new_size) {
    kt_env *env = (kt_env *)user;
    kt_header *old = ptr ? (kt_header *)ptr - 1 : NULL, *fresh = NULL;
    pthread_mutex_lock(&env->lock);
    if (old && (old->magic != KT_MAGIC || old->size != old_size)) env->bad_size = true;
    if (new_size) {
        env->calls++;
        if (env->fail_at && (env->calls == env->fail_at || (env->fail_after && env->calls > env->fail_at))) {
            env->failures++;
        } else {
            fresh = (kt_header *)malloc(sizeof *fresh + new_size);
        }
        if (!fresh) {
            pthread_mutex_unlock(&env->lock);
            return NULL;
        }
        memset(fresh + 1, 0xa5, new_size); /* nobody may count on zeroes */
        fresh->size = new_size;
        fresh->magic = KT_MAGIC;
        env->live++;
        env->live_bytes += new_size;
    }
    if (old) {
        if (fresh) memcpy(fresh + 1, old + 1, old->size < new_size ? old->size : new_size);
        env->live--;
        env->live_bytes -= old->size;
        old->magic = 0;
        free(old);
    }
    pthread_mutex_unlock(&env->lock);
    return fresh ? fresh + 1 : NULL;
}

static KT_UNUSED void kt_log(void *user, kvl_log_level level, const char *text) {
    (void)level;
    (void)text;
    __atomic_fetch_add(&((kt_env *)user)->logs, 1, __ATOMIC_RELAXED);
}

/* All memory given back, and every old_size right. */
static KT_UNUSED void kt_env_check(const kt_env *env) {
    KT_CHECK(env->live == 0, "%llu allocations (%zu bytes) leaked", (unsigned long long)env->live,
             env->live_bytes);
    KT_CHECK(!env->bad_size, "the allocator was called with a wrong old_size");
}

static KT_UNUSED kvl_context_desc kt_context(kt_env *env, kvl_backend_kind backend) {
    kvl_context_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.backend = backend;
    if (env) {
        desc.alloc = kt_alloc;
        desc.clock = kt_clock;
        desc.log = kt_log;
        desc.user = env;
    }
    return desc;
}

/* ---------------------------------------------------------------- geometries */

/* A small cache on the null backend: n_layers × 1 KV head × 2 query heads × dim 16. preset null = "int8". */
static KT_UNUSED kvl_cache_desc kt_desc(kt_env *env, uint32_t n_layers, uint32_t block_tokens,
                                        const char *preset) {
    kvl_cache_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.context_desc = kt_context(env, KVL_BACKEND_NULL);
    desc.geometry.n_layers = n_layers;
    desc.geometry.n_q_heads = 2;
    desc.geometry.n_kv_heads = 1;
    desc.geometry.k_dim = 16;
    desc.geometry.block_tokens = block_tokens;
    desc.geometry.preset = preset;
    desc.device_bytes = 1u << 20;
    desc.error = kt_error;
    desc.error_size = sizeof kt_error;
    desc.max_sequences = 16;
    desc.max_seq_tokens = 1024;
    desc.max_step_tokens = 128;
    return desc;
}

/* The bytes of the largest block of any layer's group and class. */
static KT_UNUSED size_t kt_largest_block(const kvl_cache *cache, uint32_t n_layers) {
    size_t largest = 0;
    for (uint32_t l = 0; l < n_layers; l++) {
        for (int exact = 0; exact < 2; exact++) {
            kvl_block_layout layout = {0};
            KT_OK(cache, kvl_cache_layout(cache, l, exact != 0, &layout));
            if (layout.block_bytes > largest) largest = layout.block_bytes;
        }
    }
    return largest;
}

/* A budget of scratch, workspace and n slabs, each of one largest block (below 256 slabs a slab is one such
   block). */
static KT_UNUSED uint64_t kt_budget(const kvl_cache_desc *desc, uint32_t n_slabs) {
    kvl_cache_desc probe = *desc;
    kvl_cache *cache = NULL;
    kvl_stats stats = {0};
    uint64_t fixed, slab;
    probe.max_device_bytes = 0;
    probe.device_bytes = 8u << 20;
    KT_OK(NULL, kvl_cache_create(&probe, &cache));
    KT_OK(cache, kvl_get_stats(cache, &stats));
    fixed = stats.bytes_scratch + stats.bytes_workspace;
    slab = kt_largest_block(cache, desc->geometry.n_layers);
    kvl_cache_destroy(cache);
    return fixed + slab * n_slabs;
}

/* ---------------------------------------------------------------- streams and the toy model */

/* The tokens a sequence is meant to hold. chain[i] stands for the KV of position i: a hash of all tokens up
   to it, of namespace and salt. Whatever block a sequence reads row i from must hold chain[i]. */
typedef struct kt_stream {
    int32_t *tokens;
    uint64_t *chain;
    uint32_t n, capacity;
    uint64_t name_space, salt;
} kt_stream;

static KT_UNUSED void kt_stream_init(kt_stream *s, uint64_t name_space, uint64_t salt) {
    memset(s, 0, sizeof *s);
    s->name_space = name_space;
    s->salt = salt;
}

static KT_UNUSED void kt_stream_free(kt_stream *s) {
    free(s->tokens);
    free(s->chain);
    memset(s, 0, sizeof *s);
}

static KT_UNUSED void kt_push(kt_stream *s, int32_t token) {
    uint64_t before = s->n ? s->chain[s->n - 1] : kt_mix(s->name_space ^ kt_mix(s->salt));
    if (s->n == s->capacity) {
        s->capacity = s->capacity ? 2 * s->capacity : 64;
        s->tokens = (int32_t *)realloc(s->tokens, s->capacity * sizeof *s->tokens);
        s->chain = (uint64_t *)realloc(s->chain, s->capacity * sizeof *s->chain);
        assert_non_null(s->tokens);
        assert_non_null(s->chain);
    }
    s->tokens[s->n] = token;
    s->chain[s->n] = kt_mix(before ^ kt_mix((uint32_t)token)) | 1; /* never 0: 0 is an empty row */
    s->n++;
}

static KT_UNUSED void kt_push_all(kt_stream *s, const int32_t *tokens, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) kt_push(s, tokens[i]);
}

/* first, first + 1, … : a prompt that shares nothing with one of another range. */
static KT_UNUSED void kt_push_range(kt_stream *s, int32_t first, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) kt_push(s, first + (int32_t)i);
}

static KT_UNUSED void kt_stream_copy(kt_stream *to, const kt_stream *from, uint32_t n) {
    kt_stream_init(to, from->name_space, from->salt);
    kt_push_all(to, from->tokens, n);
}

/* The next token of the toy model: a function of all tokens so far and the sampler's seed. */
static KT_UNUSED int32_t kt_next_token(const kt_stream *s, uint64_t seed, uint32_t vocabulary) {
    return (int32_t)((kt_mix(s->chain[s->n - 1] ^ kt_mix(seed)) >> 32) * vocabulary >> 32);
}

/* ---------------------------------------------------------------- the shadow of the cache's memory */

typedef struct kt_shadow {
    const kvl_geometry *geometry; /* with layers; n_layers and block_tokens set */
    uint32_t tokens;              /* of a block */
    uint32_t sink_blocks;
    bool two_classes[16]; /* [group] packed and exact differ; known from the first step on */
    uint64_t *rows;       /* [block id][tokens] chain value, 0 = nothing */
    uint64_t *written;    /* [block id] number of the step that wrote it last */
    uint32_t *writer;     /* [block id] its span in that step */
    uint32_t n_ids;
    uint64_t *scratch; /* [group][slot][tokens] */
    uint32_t n_groups, n_slots;
    uint64_t step;
    uint64_t rows_checked, copies, seals; /* so that a test can tell that it tested something */
} kt_shadow;

static KT_UNUSED void kt_shadow_init(kt_shadow *sh, const kvl_geometry *geometry) {
    memset(sh, 0, sizeof *sh);
    sh->geometry = geometry;
    sh->tokens = geometry->block_tokens ? geometry->block_tokens : 32;
    sh->sink_blocks = geometry->sink_blocks == KVL_NONE ? 0
                      : geometry->sink_blocks           ? geometry->sink_blocks
                                                        : 1;
}

/* Does a layer pack anything? A group has two classes as soon as one of its layers does. */
static KT_UNUSED bool kt_packs(const kvl_geometry *g, uint32_t l) {
    const kvl_preset *preset = kvl_preset_find(g->preset ? g->preset : "int8");
    kvl_format k = g->layers && g->layers[l].k_format ? g->layers[l].k_format : preset->k;
    kvl_format v = g->layers && g->layers[l].v_format ? g->layers[l].v_format : preset->v;
    return k != preset->exact || v != preset->exact;
}

static KT_UNUSED void kt_shadow_free(kt_shadow *sh) {
    free(sh->rows);
    free(sh->written);
    free(sh->writer);
    free(sh->scratch);
    memset(sh, 0, sizeof *sh);
}

static KT_UNUSED uint64_t *kt_shadow_block(kt_shadow *sh, uint32_t id) {
    if (id >= sh->n_ids) {
        uint32_t n = sh->n_ids ? sh->n_ids : 64;
        while (n <= id) n *= 2;
        KT_CHECK(n < 1u << 26, "block id %u", id);
        sh->rows = (uint64_t *)realloc(sh->rows, (size_t)n * sh->tokens * sizeof *sh->rows);
        sh->written = (uint64_t *)realloc(sh->written, n * sizeof *sh->written);
        sh->writer = (uint32_t *)realloc(sh->writer, n * sizeof *sh->writer);
        memset(sh->rows + (size_t)sh->n_ids * sh->tokens, 0,
               (size_t)(n - sh->n_ids) * sh->tokens * sizeof *sh->rows);
        memset(sh->written + sh->n_ids, 0, (n - sh->n_ids) * sizeof *sh->written);
        sh->n_ids = n;
    }
    return sh->rows + (size_t)id * sh->tokens;
}

/* The rows an `own` or table entry leads to. */
static KT_UNUSED uint64_t *kt_shadow_entry(kt_shadow *sh, uint32_t group, uint32_t entry) {
    uint32_t id = entry & KVL_ENTRY_ID;
    if (entry & KVL_ENTRY_SCRATCH) {
        KT_CHECK(id < sh->n_slots, "scratch slot %u of %u", id, sh->n_slots);
        return sh->scratch + ((size_t)group * sh->n_slots + id) * sh->tokens;
    }
    return kt_shadow_block(sh, id);
}

static KT_UNUSED void kt_shadow_begin(kt_shadow *sh, const kvl_step *step) {
    uint32_t slots = step->n_tokens / sh->tokens + step->n_spans + 1;
    if (step->n_groups > sh->n_groups || slots > sh->n_slots) {
        if (step->n_groups > sh->n_groups) sh->n_groups = step->n_groups;
        if (slots > sh->n_slots) sh->n_slots = slots;
        free(sh->scratch);
        sh->scratch =
            (uint64_t *)malloc((size_t)sh->n_groups * sh->n_slots * sh->tokens * sizeof *sh->scratch);
        assert_non_null(sh->scratch);
    }
    memset(sh->scratch, 0, (size_t)sh->n_groups * sh->n_slots * sh->tokens * sizeof *sh->scratch);
    sh->step++;
    for (uint32_t i = 0; i < step->n_copies; i++) {
        const kvl_copy *copy = &step->copies[i];
        uint32_t src = copy->src & KVL_ENTRY_ID, dst = copy->dst & KVL_ENTRY_ID;
        KT_CHECK(copy->group < step->n_groups, "copy %u names group %u", i, copy->group);
        KT_CHECK((copy->src & KVL_ENTRY_EXACT) == (copy->dst & KVL_ENTRY_EXACT), "copy %u changes the class",
                 i);
        KT_CHECK(src != dst, "copy %u of a block onto itself", i);
        kt_shadow_block(sh, src > dst ? src : dst);
        memcpy(kt_shadow_block(sh, dst), kt_shadow_block(sh, src), sh->tokens * sizeof *sh->rows);
        sh->copies++;
    }
}

/* Numbering of rows, spans and logits. streams[i] is what span i's sequence is meant to hold, this step's
   rows included. */
static KT_UNUSED void kt_shadow_numbers(const kvl_step *step, kt_stream *const *streams) {
    uint32_t row = 0;
    for (uint32_t s = 0; s < step->n_spans; s++) {
        const kvl_step_span *span = &step->spans[s];
        KT_CHECK(span->n_rows > 0 && span->first_row == row, "span %u starts at row %u, not %u", s,
                 span->first_row, row);
        KT_CHECK(span->position + span->n_rows <= streams[s]->n, "span %u runs to %u of %u tokens", s,
                 span->position + span->n_rows, streams[s]->n);
        for (uint32_t i = 0; i < span->n_rows; i++, row++) {
            KT_CHECK(step->row_span[row] == s, "row %u is of span %u, not %u", row, step->row_span[row], s);
            KT_CHECK(step->positions[row] == span->position + i, "row %u at position %u, not %u", row,
                     step->positions[row], span->position + i);
            KT_CHECK(step->tokens[row] == streams[s]->tokens[span->position + i], "row %u: token %d, not %d",
                     row, step->tokens[row], streams[s]->tokens[span->position + i]);
        }
    }
    KT_CHECK(row == step->n_tokens, "%u rows, but n_tokens %u", row, step->n_tokens);
    for (uint32_t i = 0; i < step->n_logits; i++) {
        KT_CHECK(step->logit_rows[i] < step->n_tokens, "logits row %u of %u", step->logit_rows[i],
                 step->n_tokens);
    }
}

static KT_UNUSED void kt_shadow_write(kt_shadow *sh, const kvl_step *step, uint32_t s, uint32_t g,
                                      const kt_stream *stream) {
    const kvl_step_span *span = &step->spans[s];
    const kvl_span_blocks *b = &step->blocks[(size_t)g * step->n_spans + s];
    uint32_t end = span->position + span->n_rows, T = sh->tokens;
    KT_CHECK(b->first_own == span->position / T, "span %u group %u: first_own %u at %u", s, g, b->first_own,
             span->position);
    KT_CHECK(b->n_blocks == (end + T - 1) / T && b->first_own + b->n_own == b->n_blocks,
             "span %u group %u: %u blocks, %u own from %u, for tokens [%u,%u)", s, g, b->n_blocks, b->n_own,
             b->first_own, span->position, end);
    for (uint32_t i = 0; i < b->n_own; i++) {
        uint32_t first = (b->first_own + i) * T, low = i ? first : span->position;
        uint32_t high = first + T < end ? first + T : end, entry = b->own[i], id = entry & KVL_ENTRY_ID;
        uint64_t *rows = kt_shadow_entry(sh, g, entry);
        KT_CHECK(entry != KVL_NONE, "span %u group %u: no block for tokens it writes", s, g);
        KT_CHECK(entry & (KVL_ENTRY_SCRATCH | KVL_ENTRY_EXACT), "span %u group %u: rows into a packed block",
                 s, g);
        KT_CHECK(!(entry & KVL_ENTRY_SCRATCH) || (low == first && high == first + T),
                 "span %u group %u: block [%u,%u) is not complete, but stands in the scratch", s, g, first,
                 high);
        if (entry & KVL_ENTRY_SCRATCH) {
            KT_CHECK(rows[0] == 0, "span %u group %u: scratch slot %u is used twice", s, g, id);
        } else {
            KT_CHECK(sh->written[id] != sh->step, "block %u is written by spans %u and %u", id,
                     sh->writer[id], s);
            sh->written[id] = sh->step;
            sh->writer[id] = s;
        }
        if (low == first) memset(rows, 0, T * sizeof *rows);
        for (uint32_t p = low; p < high; p++) rows[p - first] = stream->chain[p];
        if (b->table[b->first_own + i] != entry) { /* to be sealed */
            uint32_t sealed = b->table[b->first_own + i], sealed_id = sealed & KVL_ENTRY_ID;
            uint64_t *to;
            KT_CHECK(high == first + T, "span %u group %u: an open block is sealed", s, g);
            if (sealed == KVL_NONE) continue; /* already behind the window of what comes next: reads decide */
            KT_CHECK(!(sealed & KVL_ENTRY_SCRATCH), "a table entry in the scratch");
            kt_shadow_block(sh, sealed_id);
            KT_CHECK(sh->written[sealed_id] != sh->step, "block %u is sealed twice", sealed_id);
            sh->written[sealed_id] = sh->step;
            sh->writer[sealed_id] = s;
            to = kt_shadow_block(sh, sealed_id);
            memcpy(to, kt_shadow_entry(sh, g, entry), T * sizeof *to);
            sh->seals++;
        }
    }
}

static KT_UNUSED void kt_shadow_compare(kt_shadow *sh, uint32_t s, uint32_t g, uint32_t entry, uint32_t j,
                                        uint32_t n, const kt_stream *stream) {
    const uint64_t *rows = kt_shadow_entry(sh, g, entry);
    sh->rows_checked += n;
    if (memcmp(rows, stream->chain + (size_t)j * sh->tokens, n * sizeof *rows) == 0) return;
    for (uint32_t i = 0; i < n; i++) {
        KT_CHECK(rows[i] == stream->chain[j * sh->tokens + i],
                 "span %u group %u: entry %x of block %u holds %s at position %u", s, g, entry, j,
                 rows[i] ? "another prefix's KV" : "nothing", j * sh->tokens + i);
    }
}

/* Everything that the span's rows see leads to this sequence's own tokens. */
static KT_UNUSED void kt_shadow_read(kt_shadow *sh, const kvl_step *step, uint32_t s, uint32_t g,
                                     const kvl_layer *layer, const kt_stream *stream) {
    const kvl_step_span *span = &step->spans[s];
    const kvl_span_blocks *b = &step->blocks[(size_t)g * step->n_spans + s];
    uint32_t end = span->position + span->n_rows, T = sh->tokens;
    uint32_t window = layer ? layer->window : 0, sinks = layer ? layer->sink_tokens : 0;
    uint32_t low = window && span->position + 1 > window ? span->position + 1 - window : 0;
    for (uint32_t j = 0; j < b->n_blocks; j++) {
        uint32_t first = j * T, n = first + T < end ? T : end - first;
        bool seen = (first + n > low) || (window && first < sinks), own = j >= b->first_own;
        bool complete = first + T <= end;
        if (!seen) continue;
        if (own) kt_shadow_compare(sh, s, g, b->own[j - b->first_own], j, n, stream);
        /* the table's view of a block matters to the blocks after it that still look so far back */
        if (own && j + 1 == b->n_blocks && complete && b->table[j] == KVL_NONE) continue;
        if (b->table[j] == KVL_NONE && window) {
            uint32_t next = first + T; /* the first query that reads it through the table */
            uint32_t reader = next > span->position ? next : span->position;
            bool read = reader < end &&
                        (first + T > (reader + 1 > window ? reader + 1 - window : 0) || first < sinks);
            KT_CHECK(!read, "span %u group %u: block %u is missing though position %u sees it", s, g, j,
                     reader);
            continue;
        }
        KT_CHECK(b->table[j] != KVL_NONE, "span %u group %u: block %u is missing", s, g, j);
        if (!own || complete) {
            bool exact = !sh->two_classes[g] || j < sh->sink_blocks;
            kt_shadow_compare(sh, s, g, b->table[j], j, n, stream);
            KT_CHECK(((b->table[j] & KVL_ENTRY_EXACT) != 0) == exact, "span %u group %u: block %u is %s", s,
                     g, j, exact ? "packed" : "exact");
        } else {
            KT_CHECK(b->table[j] == b->own[j - b->first_own],
                     "span %u group %u: open block %u is not its own", s, g, j);
        }
    }
}

/* Does on the shadow what attend does to memory, and checks all that the step's tables promise. */
static KT_UNUSED void kt_shadow_step(kt_shadow *sh, const kvl_step *step, kt_stream *const *streams) {
    kt_shadow_numbers(step, streams);
    kt_shadow_begin(sh, step);
    for (uint32_t g = 0; g < step->n_groups; g++) {
        for (uint32_t s = 0; s < step->n_spans; s++) kt_shadow_write(sh, step, s, g, streams[s]);
    }
    for (uint32_t g = 0; g < step->n_groups; g++) {
        const kvl_layer *layer = NULL;
        for (uint32_t l = 0; l < sh->geometry->n_layers; l++) {
            const kvl_layer *one = sh->geometry->layers ? &sh->geometry->layers[l] : NULL;
            if (step->layer_group[l] != g) continue;
            if (kt_packs(sh->geometry, l)) sh->two_classes[g] = true;
            if (!one) continue;
            KT_CHECK(!layer || (layer->window == one->window && layer->sink_tokens == one->sink_tokens),
                     "group %u mixes windows %u and %u", g, layer->window, one->window);
            layer = one;
        }
        for (uint32_t s = 0; s < step->n_spans; s++) kt_shadow_read(sh, step, s, g, layer, streams[s]);
    }
}

/* What position p of a stream stores in K (side 0) or V (1) of a layer and head: within ±0.5, and exact in
   F16. */
static KT_UNUSED float kt_value(const kt_stream *s, uint32_t p, uint32_t layer, uint32_t head, uint32_t side,
                                uint32_t d) {
    uint64_t h = kt_mix(s->chain[p] ^ kt_mix(layer * 65536 + head * 1024 + side * 512 + d));
    return (float)(int32_t)(h & 0xff) / 256.0f - 0.5f;
}

/* kvl_attend for every layer, with tensors that have no data: for the null backend. */
static KT_UNUSED void kt_attend(kvl_cache *cache, const kvl_step *step, uint32_t n_layers) {
    kvl_tensor none;
    memset(&none, 0, sizeof none);
    for (uint32_t l = 0; l < n_layers; l++)
        KT_OK(cache, kvl_attend(cache, step, l, &none, &none, &none, &none));
}

/* ---------------------------------------------------------------- a sequence with its stream */

typedef struct kt_seq {
    kvl_seq seq;
    kt_stream stream; /* all tokens it is meant to hold; the first `length` have KV */
    uint32_t length;
    kvl_reuse reuse; /* of its open */
} kt_seq;

static KT_UNUSED void kt_open(kvl_cache *cache, kt_seq *q, uint32_t priority) {
    kvl_seq_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.tokens = q->stream.tokens;
    desc.n_tokens = q->stream.n;
    desc.name_space = q->stream.name_space;
    desc.salt = q->stream.salt;
    desc.priority = priority;
    KT_OK(cache, kvl_seq_open(cache, &desc, &q->seq, &q->reuse));
    KT_OK(cache, kvl_seq_length(cache, q->seq, &q->length));
    KT_CHECK(q->length == q->reuse.matched, "length %u, matched %u", q->length, q->reuse.matched);
    KT_CHECK(q->stream.n == 0 || q->length < q->stream.n, "matched %u of %u", q->length, q->stream.n);
    KT_CHECK(q->reuse.recomputed == q->stream.n - q->reuse.matched, "recomputed %u", q->reuse.recomputed);
}

/* One step over the next n tokens of the sequence's stream, checked against the shadow (which may be null).
   */
static KT_UNUSED kvl_result kt_try_feed(kvl_cache *cache, kt_shadow *sh, uint32_t n_layers, kt_seq *q,
                                        uint32_t n) {
    const kvl_step *step = NULL;
    kvl_span span;
    kt_stream *stream = &q->stream;
    kvl_result r;
    memset(&span, 0, sizeof span);
    span.seq = q->seq;
    span.tokens = q->stream.tokens + q->length;
    span.n_tokens = n;
    span.n_logits = 1;
    KT_CHECK(q->length + n <= q->stream.n, "%u + %u of %u tokens", q->length, n, q->stream.n);
    r = kvl_step_begin(cache, &span, 1, &step);
    if (r != KVL_OK) return r;
    if (sh) kt_shadow_step(sh, step, &stream);
    kt_attend(cache, step, n_layers);
    KT_OK(cache, kvl_step_end(cache, step));
    q->length += n;
    return KVL_OK;
}

/* The rest of the stream in steps of at most `chunk`. */
static KT_UNUSED void kt_feed_all(kvl_cache *cache, kt_shadow *sh, uint32_t n_layers, kt_seq *q,
                                  uint32_t chunk) {
    while (q->length < q->stream.n) {
        uint32_t n = q->stream.n - q->length;
        KT_OK(cache, kt_try_feed(cache, sh, n_layers, q, n < chunk ? n : chunk));
    }
}

static KT_UNUSED void kt_close(kvl_cache *cache, kt_seq *q) {
    KT_OK(cache, kvl_seq_close(cache, q->seq));
    kt_stream_free(&q->stream);
    memset(q, 0, sizeof *q);
}

static KT_UNUSED kvl_stats kt_stats(kvl_cache *cache) {
    kvl_stats stats;
    KT_OK(cache, kvl_get_stats(cache, &stats));
    return stats;
}

static KT_UNUSED uint32_t kt_used(const kvl_stats *s) { return s->blocks_used[0] + s->blocks_used[1]; }
static KT_UNUSED uint32_t kt_cached(const kvl_stats *s) { return s->blocks_cached[0] + s->blocks_cached[1]; }

#endif /* KVL_TEST_H */
