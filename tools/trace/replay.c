#include "replay.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NO_INDEX UINT64_MAX /* of a number that stands alone */

enum { PREFIX = 12, CHUNK_HEAD = 8, MAX_STOP = 8, SLOTS = 65536 };

/* ---------------------------------------------------------------- chunks */

/* The bytes of all chunks together, and where each stood in the file. */
struct trace {
    uint8_t *bytes;
    uint64_t n;
    struct chunk {
        uint64_t at, file;
    } * chunks;
    size_t n_chunks, capacity;
    uint64_t end;    /* in the file, of what was taken */
    char error[128]; /* why it ends there, "" = that is all */
    bool broken;     /* because of a checksum */
};

static uint64_t little_endian(const uint8_t *at, unsigned n) {
    uint64_t x = 0;
    for (unsigned i = 0; i < n; i++) x |= (uint64_t)at[i] << 8 * i;
    return x;
}

static uint32_t checksum(const uint8_t *at, size_t n) {
    uint64_t h = 0;
    for (size_t i = 0; i < n; i += 8) {
        h = (h ^ little_endian(at + i, n - i < 8 ? (unsigned)(n - i) : 8)) * 0xD6E8FEB86659FD93u;
        h ^= h >> 32;
    }
    return (uint32_t)h;
}

/* False: no memory. A broken chunk ends the trace, with the reason in t->error. */
static bool trace_open(struct trace *t, const uint8_t *data, uint64_t size) {
    memset(t, 0, sizeof *t);
    t->bytes = malloc(size ? size : 1);
    if (!t->bytes) return false;
    if (size < PREFIX || memcmp(data, "KVLEVENT", 8) != 0) {
        snprintf(t->error, sizeof t->error,
                 "this is not an event trace of kvlite: it does not begin with KVLEVENT");
        return true;
    }
    if (little_endian(data + 8, 4) != 1) {
        snprintf(t->error, sizeof t->error, "format %u of the event trace is not 1",
                 (unsigned)little_endian(data + 8, 4));
        return true;
    }
    for (t->end = PREFIX; t->end < size;) {
        const uint8_t *chunk = data + t->end;
        uint64_t left = size - t->end, n = left < CHUNK_HEAD ? 0 : little_endian(chunk, 4);
        if (left < CHUNK_HEAD || n > left - CHUNK_HEAD) {
            snprintf(t->error, sizeof t->error, "the file ends inside a chunk");
            return true;
        }
        if (checksum(chunk + CHUNK_HEAD, n) != little_endian(chunk + 4, 4)) {
            snprintf(t->error, sizeof t->error, "the checksum of the chunk of %llu bytes does not match",
                     (unsigned long long)n);
            t->broken = true;
            return true;
        }
        if (t->n_chunks == t->capacity) {
            t->capacity = t->capacity ? 2 * t->capacity : 64;
            struct chunk *more = realloc(t->chunks, t->capacity * sizeof *more);
            if (!more) return false;
            t->chunks = more;
        }
        t->chunks[t->n_chunks++] = (struct chunk){t->n, t->end + CHUNK_HEAD};
        memcpy(t->bytes + t->n, chunk + CHUNK_HEAD, n);
        t->n += n;
        t->end += CHUNK_HEAD + n;
    }
    return true;
}

static void trace_free(struct trace *t) {
    free(t->bytes);
    free(t->chunks);
}

/* Where byte `at` stands in the file. */
static uint64_t trace_offset(const struct trace *t, uint64_t at) {
    size_t low = 0, high = t->n_chunks;
    if (at >= t->n) return t->end;
    while (high - low > 1) {
        size_t mid = low + (high - low) / 2;
        if (t->chunks[mid].at <= at)
            low = mid;
        else
            high = mid;
    }
    return t->chunks[low].file + (at - t->chunks[low].at);
}

/* ---------------------------------------------------------------- numbers */

/* Reads data[at, n). Stops at the first error. For naming a difference it tells which number byte `watch` is in. */
struct reader {
    const uint8_t *data;
    uint64_t n, at, start; /* start: of the number read last */
    const char *error;     /* what could not be read; null = nothing went wrong */
    const char *why;
    bool cut; /* because the bytes ended */
    uint64_t watch;
    struct hit {
        const char *what; /* null = not seen */
        uint64_t index, value;
        bool is_signed;
    } hit;
};

static uint64_t fail(struct reader *r, const char *what, const char *why) {
    if (!r->error) {
        r->error = what;
        r->why = why;
        r->cut = why[0] == '\0';
    }
    r->at = r->n;
    return 0;
}

/* What the number read last means. */
static void name(struct reader *r, const char *what, uint64_t index, uint64_t value, bool is_signed) {
    if (!r->error && r->start <= r->watch && r->watch < r->at)
        r->hit = (struct hit){what, index, value, is_signed};
}

static uint64_t get_nth(struct reader *r, const char *what, uint64_t index) {
    uint64_t x = 0;
    r->start = r->at;
    if (r->error) return 0;
    for (unsigned shift = 0; r->at < r->n; shift += 7) {
        uint8_t byte = r->data[r->at++];
        if (shift == 63 && byte > 1) return fail(r, what, "is longer than 64 bits");
        x |= (uint64_t)(byte & 127) << shift;
        if (byte & 128) continue;
        name(r, what, index, x, false);
        return x;
    }
    return fail(r, what, "");
}
static uint64_t get(struct reader *r, const char *what) { return get_nth(r, what, NO_INDEX); }

static int64_t unzigzag(uint64_t x) { return (int64_t)(x >> 1) ^ -(int64_t)(x & 1); }

static int64_t get_signed(struct reader *r, const char *what) {
    int64_t x = unzigzag(get(r, what));
    name(r, what, NO_INDEX, (uint64_t)x, true);
    return x;
}

static uint32_t get_u32(struct reader *r, const char *what) {
    uint64_t x = get(r, what);
    return x > UINT32_MAX ? (uint32_t)fail(r, what, "does not fit 32 bits") : (uint32_t)x;
}

/* Of things that take at least a byte each: a broken number cannot ask for more memory than the file has bytes. */
static uint32_t get_count(struct reader *r, const char *what) {
    uint64_t x = get(r, what);
    return x > r->n - r->at || x > UINT32_MAX ? (uint32_t)fail(r, what, "") : (uint32_t)x;
}

static uint64_t get_fixed(struct reader *r, const char *what, unsigned n) {
    r->start = r->at;
    if (r->error) return 0;
    if (r->n - r->at < n) return fail(r, what, "");
    uint64_t x = little_endian(r->data + r->at, n);
    r->at += n;
    name(r, what, NO_INDEX, x, false);
    return x;
}

static double get_double(struct reader *r, const char *what) {
    uint64_t bits = get_fixed(r, what, 8);
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static void get_tokens(struct reader *r, const char *what, int32_t *to, uint32_t n) {
    int64_t last = 0;
    for (uint32_t i = 0; i < n && !r->error; i++) {
        int64_t delta = unzigzag(get_nth(r, what, i)), x = delta;
        if (delta > -((int64_t)1 << 33) && delta < (int64_t)1 << 33) x = last + delta;
        if (x < INT32_MIN || x > INT32_MAX) fail(r, what, "is no 32-bit token");
        name(r, what, i, (uint64_t)x, true);
        last = x;
        to[i] = (int32_t)x;
    }
}

/* ---------------------------------------------------------------- the description */

struct description {
    bool fresh, granular, sized;
    uint32_t version;
    kvl_cache_desc cache;
    kvl_sched_desc sched;
    kvl_layer *layers;
};

static void read_layers(struct reader *r, struct description *d) {
    kvl_geometry *g = &d->cache.geometry;
    if (g->n_layers > (r->n - r->at) / 4) fail(r, "n_layers", "");
    if (r->error) return;
    d->layers = calloc(g->n_layers + 1, sizeof *d->layers);
    if (!d->layers) fail(r, "n_layers", "is more than memory holds");
    for (uint32_t l = 0; l < g->n_layers && !r->error; l++) {
        d->layers[l].window = get_u32(r, "window of a layer");
        d->layers[l].sink_tokens = get_u32(r, "sink_tokens of a layer");
        d->layers[l].k_format = get_u32(r, "k_format of a layer");
        d->layers[l].v_format = get_u32(r, "v_format of a layer");
    }
    g->layers = d->layers;
}

static void read_description(struct reader *r, struct description *d) {
    kvl_geometry *g = &d->cache.geometry;
    kvl_sched_desc *s = &d->sched;
    memset(d, 0, sizeof *d);
    d->version = (uint32_t)get_fixed(r, "KVL_VERSION", 4);
    uint64_t flags = get(r, "flags");
    d->fresh = flags & 1;
    d->granular = flags & 2;
    d->sized = flags & 4;
    g->n_layers = get_u32(r, "n_layers");
    g->n_q_heads = get_u32(r, "n_q_heads");
    g->n_kv_heads = get_u32(r, "n_kv_heads");
    g->k_dim = get_u32(r, "k_dim");
    g->v_dim = get_u32(r, "v_dim");
    g->block_tokens = get_u32(r, "block_tokens");
    g->k_format = get_u32(r, "k_format");
    g->v_format = get_u32(r, "v_format");
    g->exact_format = get_u32(r, "exact_format");
    g->sink_blocks = get_u32(r, "sink_blocks");
    g->segment_tokens = get_u32(r, "segment_tokens");
    g->fingerprint = get(r, "fingerprint");
    read_layers(r, d);
    d->cache.device_bytes = get(r, "device_bytes");
    d->cache.max_device_bytes = get(r, "max_device_bytes");
    d->cache.max_sequences = get_u32(r, "max_sequences");
    d->cache.max_seq_tokens = get_u32(r, "max_seq_tokens");
    d->cache.max_step_tokens = get_u32(r, "max_step_tokens");
    d->cache.lookup_hash_bits = get_u32(r, "lookup_hash_bits");
    d->cache.no_prefix_cache = get(r, "no_prefix_cache") != 0;
    s->policy = (kvl_policy)get_u32(r, "policy");
    s->max_running = get_u32(r, "max_running");
    s->max_waiting = get_u32(r, "max_waiting");
    s->token_pool_bytes = get(r, "token_pool_bytes");
    s->step_tokens = get_u32(r, "step_tokens");
    s->min_chunk = get_u32(r, "min_chunk");
    s->refuse_over_gap = get(r, "refuse_over_gap") != 0;
    s->fixed_cost = get(r, "fixed_cost") != 0;
    s->max_gap_ms = get_double(r, "max_gap_ms");
    s->cost.step_ms = get_double(r, "step_ms");
    s->cost.prefill_token_ms = get_double(r, "prefill_token_ms");
    s->cost.decode_ms = get_double(r, "decode_ms");
    s->cost.kv_megatoken_ms = get_double(r, "kv_megatoken_ms");
    s->cost.prefill_kv_megatoken_ms = get_double(r, "prefill_kv_megatoken_ms");
    if (d->granular) d->cache.slab_granularity = get(r, "slab_granularity");
    if (d->sized) d->cache.slab_bytes = get(r, "slab_bytes");
}

/* ---------------------------------------------------------------- events */

static const char *const event_names[KVL_EVENT_COUNT] = {"end",
                                                         "submit",
                                                         "fork",
                                                         "cancel",
                                                         "close",
                                                         "plan",
                                                         "commit",
                                                         "abort",
                                                         "resize",
                                                         "kvl_seq_open",
                                                         "kvl_seq_extend",
                                                         "kvl_seq_fork",
                                                         "kvl_seq_trim",
                                                         "kvl_seq_pin",
                                                         "kvl_seq_close",
                                                         "kvl_prefix_unpin",
                                                         "kvl_step_begin",
                                                         "kvl_step_end",
                                                         "kvl_step_abort",
                                                         "kvl_cache_recover"};

struct array { /* grows to what one event takes */
    void *at;
    size_t bytes;
};

struct event {
    uint64_t type, clock, flags, name_space, salt;
    uint64_t who;    /* request or sequence */
    uint64_t a;      /* the argument: bytes, n_tokens, pin, max_new_tokens */
    uint64_t result; /* of a plan */
    uint32_t slot;   /* of the sequence that it opened */
    uint32_t n, n_tokens, n_stop, n_tainted, n_logits;
    int32_t stop[MAX_STOP];
    struct array tokens;  /* int32_t[n_tokens] */
    struct array outputs; /* kvl_output[n] */
    struct array spans;   /* struct span[n] of STEP_BEGIN */
    struct array tainted; /* uint32_t[n_tainted] */
    uint64_t last_clock;  /* of the event before */
};

struct span {
    uint64_t who;
    uint32_t n_tokens, n_logits, first; /* first: index of its first token */
};

static void *room(struct reader *r, struct array *a, uint64_t count, size_t size) {
    if (count * size > a->bytes) {
        size_t bytes = count * size < 64 ? 64 : count * size * 2;
        void *more = realloc(a->at, bytes);
        if (!more) {
            fail(r, "an event", "is more than memory holds");
            return a->at;
        }
        a->at = more;
        a->bytes = bytes;
    }
    return a->at;
}

static void event_free(struct event *e) {
    free(e->tokens.at);
    free(e->outputs.at);
    free(e->spans.at);
    free(e->tainted.at);
}

static void read_clock(struct reader *r, struct event *e) {
    e->clock = e->last_clock + (uint64_t)get_signed(r, "clock, in ns since the last reading");
}

static void read_opening(struct reader *r, struct event *e) {
    e->flags = get(r, "flags");
    e->name_space = get(r, "name_space");
    e->salt = get(r, "salt");
    if (e->type == KVL_EVENT_SUBMIT) {
        e->n_stop = get_u32(r, "n_stop_tokens");
        if (e->n_stop > MAX_STOP) fail(r, "n_stop_tokens", "is more than 8");
        if (!r->error) get_tokens(r, "stop token", e->stop, e->n_stop);
    }
    e->n_tokens = get_count(r, "n_tokens");
    room(r, &e->tokens, e->n_tokens, sizeof(int32_t));
    if (!r->error) get_tokens(r, "token", e->tokens.at, e->n_tokens);
}

static void read_plan(struct reader *r, struct event *e) {
    uint64_t request = 0;
    read_clock(r, e);
    e->result = get(r, "result");
    get(r, "number of requests preempted");
    get(r, "number of requests refused");
    if (e->result != KVL_OK) return;
    e->n = get_count(r, "n_spans");
    e->n_logits = get_u32(r, "n_logits");
    get(r, "n_copies");
    for (uint32_t i = 0; i < e->n && !r->error; i++) {
        uint64_t x = get(r, "span");
        bool decodes = x & 1;
        request += (uint64_t)unzigzag(x >> 1);
        name(r, decodes ? "request that decodes in span" : "request that is prefilled in span", i, request,
             false);
        if (decodes) continue;
        get_nth(r, "position of span", i);
        get_nth(r, "rows of span", i);
        get_nth(r, "logits * 2 + admitted of span", i);
    }
    get_fixed(r, "digest of rows, block tables and places", 8);
}

static void read_tainted(struct reader *r, struct event *e) {
    e->n_tainted = e->flags & 2 ? get_count(r, "number of tainted spans") : 0;
    uint32_t *at = room(r, &e->tainted, e->n_tainted, sizeof *at);
    for (uint32_t i = 0; i < e->n_tainted && !r->error; i++) at[i] = get_u32(r, "tainted span");
}

static void read_commit(struct reader *r, struct event *e) {
    read_clock(r, e);
    e->flags = get(r, "flags");
    e->n = get_count(r, "number of outputs");
    int32_t *tokens = room(r, &e->tokens, e->n, sizeof *tokens);
    kvl_output *outputs = room(r, &e->outputs, e->n, sizeof *outputs);
    if (!r->error) get_tokens(r, "token", tokens, e->n);
    for (uint32_t i = 0; i < e->n && !r->error; i++) {
        uint64_t flags = e->flags & 1 ? get_nth(r, "no_token + 2 * finish of output", i) : 0;
        outputs[i] = (kvl_output){tokens[i], flags & 1, (flags & 2) != 0};
    }
    read_tainted(r, e);
}

static void read_step(struct reader *r, struct event *e) {
    e->n = get_count(r, "n_spans");
    struct span *spans = room(r, &e->spans, e->n, sizeof *spans);
    e->n_tokens = 0;
    for (uint32_t i = 0; i < e->n && !r->error; i++) {
        spans[i].who = get_nth(r, "sequence of span", i);
        spans[i].n_tokens = get_count(r, "n_tokens of a span");
        spans[i].n_logits = get_u32(r, "n_logits of a span");
        spans[i].first = e->n_tokens;
        if (spans[i].n_tokens > UINT32_MAX - e->n_tokens) fail(r, "n_tokens of a span", "is too large");
        e->n_tokens += spans[i].n_tokens;
        int32_t *tokens = room(r, &e->tokens, e->n_tokens, sizeof *tokens);
        if (!r->error) get_tokens(r, "token", tokens + spans[i].first, spans[i].n_tokens);
    }
    get_signed(r, "result");
}

/* A call on one sequence: its argument, the slot of the new one, the length that it gave. */
static void read_call(struct reader *r, struct event *e) {
    e->who = get(r, "sequence");
    if (e->type == KVL_EVENT_SEQ_FORK) e->slot = get_u32(r, "slot of the copy");
    if (e->type == KVL_EVENT_SEQ_PIN) e->a = get(r, "pin");
    if (e->type == KVL_EVENT_SEQ_EXTEND || e->type == KVL_EVENT_SEQ_TRIM) e->a = get_u32(r, "n_tokens");
    if (e->type == KVL_EVENT_SEQ_EXTEND) get(r, "whether there were no blocks");
    if (e->type == KVL_EVENT_SEQ_FORK || e->type == KVL_EVENT_SEQ_TRIM) get(r, "length");
}

/* Reads one event. False: r->error says why not. */
static bool read_event(struct reader *r, struct event *e) {
    e->last_clock = e->clock;
    e->type = get(r, "event");
    e->flags = 0;
    e->n_tainted = 0;
    switch (e->type) {
    case KVL_EVENT_END: get_fixed(r, "digest of all plans", 8); break;
    case KVL_EVENT_FORK: read_clock(r, e); /* fall through */
    case KVL_EVENT_CANCEL: e->who = get(r, "request"); break;
    case KVL_EVENT_PLAN: read_plan(r, e); break;
    case KVL_EVENT_COMMIT: read_commit(r, e); break;
    case KVL_EVENT_CLOSE:
    case KVL_EVENT_ABORT:
    case KVL_EVENT_STEP_ABORT:
    case KVL_EVENT_RECOVER: break;
    case KVL_EVENT_RESIZE:
        e->a = get(r, "bytes");
        get(r, "number of slabs");
        break;
    case KVL_EVENT_SUBMIT: read_clock(r, e); /* fall through */
    case KVL_EVENT_SEQ_OPEN:
    case KVL_EVENT_UNPIN:
        read_opening(r, e);
        if (e->type == KVL_EVENT_SUBMIT) e->a = get_u32(r, "max_new_tokens");
        if (e->type == KVL_EVENT_SEQ_OPEN) e->slot = get_u32(r, "slot");
        if (e->type != KVL_EVENT_SUBMIT) get(r, "length");
        break;
    case KVL_EVENT_SEQ_EXTEND:
    case KVL_EVENT_SEQ_FORK:
    case KVL_EVENT_SEQ_TRIM:
    case KVL_EVENT_SEQ_PIN:
    case KVL_EVENT_SEQ_CLOSE: read_call(r, e); break;
    case KVL_EVENT_STEP_BEGIN: read_step(r, e); break;
    case KVL_EVENT_STEP_END:
        e->flags = get(r, "flags");
        read_tainted(r, e);
        break;
    default: fail(r, "event", "is of an unknown kind");
    }
    return !r->error;
}

/* ---------------------------------------------------------------- the player */

struct player {
    const struct replay_options *options;
    struct trace trace;
    struct description description;
    uint64_t clock;
    size_t bytes, max_bytes; /* of memory that kvlite has taken */
    kvl_cache *cache;
    kvl_sched *sched;
    const kvl_step *step;  /* open */
    struct array requests; /* kvl_req by number */
    uint64_t n_requests, n_plans;
    kvl_seq *slots; /* [SLOTS] the app's sequences */
    struct event event;
    /* what is recorded now, from byte `base` on: there an event begins and all before it was equal */
    struct array now;
    uint64_t base, n_now;
    bool prefix_seen, differs, no_memory;
    uint64_t differs_at;
    /* events that have begun since: the first is number `first_event` */
    struct array starts;
    uint64_t n_starts, first_event;
    char error[384]; /* why a call could not be done */
};

static void *player_alloc(void *user, void *ptr, size_t old_size, size_t new_size) {
    struct player *p = user;
    if (new_size > old_size && new_size - old_size > p->max_bytes - p->bytes) return NULL;
    if (!new_size) {
        free(ptr);
        p->bytes -= old_size;
        return NULL;
    }
    void *more = realloc(ptr, new_size);
    if (more) p->bytes = p->bytes - old_size + new_size;
    return more;
}

static uint64_t player_clock(void *user) { return ((struct player *)user)->clock; }

/* What the scheduler records now: kept from the last event boundary on, and compared with the trace. Its version of
   kvlite (the first four bytes) may be another. */
static void compare(struct player *p, const uint8_t *data, uint64_t n) {
    const struct trace *t = &p->trace;
    uint64_t at = p->base + p->n_now;
    struct reader none = {0};
    uint8_t *to = room(&none, &p->now, p->n_now + n, 1);
    if (none.error) {
        p->no_memory = true;
        return;
    }
    memcpy(to + p->n_now, data, n);
    p->n_now += n;
    uint64_t i = at < 4 ? (n < 4 - at ? n : 4 - at) : 0;
    if (p->differs || (at + n <= t->n && memcmp(t->bytes + at + i, data + i, n - i) == 0)) return;
    while (i < n && at + i < t->n && t->bytes[at + i] == data[i]) i++;
    p->differs = true;
    p->differs_at = at + i;
}

static size_t player_record(void *user, const void *data, size_t size) {
    struct player *p = user;
    if (p->options && p->options->copy && p->options->copy(p->options->copy_user, data, size) != size)
        return 0;
    if (p->prefix_seen) compare(p, (const uint8_t *)data + CHUNK_HEAD, size - CHUNK_HEAD);
    p->prefix_seen = true;
    return p->no_memory ? 0 : size;
}

static bool player_error(struct player *p, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(p->error, sizeof p->error, format, args);
    va_end(args);
    return false;
}

static bool player_open(struct player *p, struct reader *r) {
    struct description *d = &p->description;
    char why[256] = "";
    read_description(r, d);
    if (r->error) return false;
    if (!d->fresh)
        return player_error(
            p, "the cache was in use before its scheduler was created: this trace has no beginning");
    d->cache.context_desc.backend = KVL_BACKEND_NULL;
    d->cache.context_desc.alloc = player_alloc;
    d->cache.context_desc.clock = player_clock;
    d->cache.context_desc.user = p;
    d->cache.error = why;
    d->cache.error_size = sizeof why;
    d->sched.record = player_record;
    d->sched.record_user = p;
    kvl_result result = kvl_cache_create(&d->cache, &p->cache);
    if (result != KVL_OK)
        return player_error(p, "the cache cannot be created: %s: %s", kvl_result_name(result), why);
    result = kvl_sched_create(p->cache, &d->sched, &p->sched);
    if (result != KVL_OK)
        return player_error(p, "the scheduler cannot be created: %s: %s", kvl_result_name(result),
                            kvl_last_error(p->cache));
    p->slots = calloc(SLOTS, sizeof *p->slots);
    return p->slots || player_error(p, "no memory");
}

static void player_close(struct player *p) {
    kvl_sched_destroy(p->sched);
    kvl_cache_destroy(p->cache);
    trace_free(&p->trace);
    event_free(&p->event);
    free(p->description.layers);
    free(p->requests.at);
    free(p->slots);
    free(p->now.at);
    free(p->starts.at);
}

static bool done(struct player *p, const char *call, kvl_result r) {
    return r == KVL_OK || player_error(p, "%s: %s: %s", call, kvl_result_name(r), kvl_last_error(p->cache));
}

static bool request_of(struct player *p, uint64_t number, kvl_req *out) {
    if (number >= p->n_requests)
        return player_error(p, "request %llu of %llu", (unsigned long long)number,
                            (unsigned long long)p->n_requests);
    *out = ((kvl_req *)p->requests.at)[number];
    return true;
}

static bool sequence_of(struct player *p, uint64_t who, kvl_seq *out) {
    kvl_req request;
    kvl_req_info info;
    if (who % 2 == 0) {
        if (who / 2 >= SLOTS) return player_error(p, "sequence in slot %llu", (unsigned long long)who / 2);
        *out = p->slots[who / 2];
        return true;
    }
    if (!request_of(p, who / 2, &request)) return false;
    kvl_result r = kvl_sched_info(p->sched, request, &info);
    *out = info.seq;
    return done(p, "kvl_sched_info", r);
}

static bool play_arrival(struct player *p, const struct event *e) {
    kvl_req of, *requests;
    struct reader none = {0};
    p->clock = e->clock;
    requests = room(&none, &p->requests, p->n_requests + 1, sizeof *requests);
    if (none.error) return player_error(p, "no memory for request %llu", (unsigned long long)p->n_requests);
    if (e->type == KVL_EVENT_FORK) {
        if (!request_of(p, e->who, &of)) return false;
        kvl_result r = kvl_sched_fork(p->sched, of, NULL, &requests[p->n_requests]);
        if (r != KVL_OK) return player_error(p, "%s", kvl_sched_last_error(p->sched));
    } else {
        kvl_refusal refusal = {0};
        kvl_request q = {.tokens = e->tokens.at,
                         .n_tokens = e->n_tokens,
                         .max_new_tokens = (uint32_t)e->a,
                         .stop_tokens = e->stop,
                         .n_stop_tokens = e->n_stop,
                         .klass = e->flags & 1 ? KVL_BACKGROUND : KVL_INTERACTIVE,
                         .priority = e->flags >> 3 > 8 ? 8 : (uint32_t)(e->flags >> 3),
                         .name_space = e->name_space,
                         .salt = e->salt,
                         .no_match = (e->flags & 2) != 0,
                         .no_keep = (e->flags & 4) != 0};
        kvl_result r = kvl_sched_submit_ex(p->sched, &q, &requests[p->n_requests], &refusal);
        if (r != KVL_OK) return player_error(p, "%s: %s", kvl_result_name(r), refusal.text);
    }
    p->n_requests++;
    return true;
}

/* The recorded result and number of logits must come out, else what follows in the trace makes no sense. */
static bool play_plan(struct player *p, const struct event *e) {
    p->clock = e->clock;
    if (p->step) return player_error(p, "a step is open");
    kvl_result r = kvl_sched_plan(p->sched, &p->step);
    if (r == KVL_OK) p->n_plans++;
    if (r < 0) return done(p, "plan", r);
    if ((uint64_t)r != e->result)
        return player_error(p, "the result is %s, not the recorded %s", kvl_result_name(r),
                            e->result > KVL_DRAINED ? "number" : kvl_result_name((kvl_result)e->result));
    if (p->step && p->step->n_logits != e->n_logits)
        return player_error(p, "%u rows have logits, not the recorded %u", p->step->n_logits, e->n_logits);
    return true;
}

static bool run_layers(struct player *p, const struct event *e) {
    const uint32_t *at = e->tainted.at;
    if (!p->step) return player_error(p, "no step is open");
    uint8_t *tainted = calloc(p->step->n_spans, 1);
    if (!tainted) return player_error(p, "no memory");
    bool ok = true;
    for (uint32_t i = 0; i < e->n_tainted && ok; i++) {
        ok = at[i] < p->step->n_spans || player_error(p, "span %u of %u is tainted", at[i], p->step->n_spans);
        if (ok) tainted[at[i]] = 1;
    }
    for (uint32_t l = 0; l < p->description.cache.geometry.n_layers && ok; l++)
        ok = done(p, "kvl_step_layer_done", kvl_step_layer_done(p->cache, p->step, l, tainted));
    free(tainted);
    return ok;
}

static bool play_commit(struct player *p, const struct event *e) {
    if (!run_layers(p, e)) return false;
    if (e->n != p->step->n_logits)
        return player_error(p, "%u outputs for %u logits", e->n, p->step->n_logits);
    p->clock = e->clock;
    kvl_result r = kvl_sched_commit_ex(p->sched, p->step, e->outputs.at);
    if (r != KVL_OK) return player_error(p, "%s", kvl_sched_last_error(p->sched));
    p->step = NULL;
    return true;
}

static bool play_open(struct player *p, const struct event *e) {
    kvl_seq_desc d = {.tokens = e->tokens.at,
                      .n_tokens = e->n_tokens,
                      .name_space = e->name_space,
                      .salt = e->salt,
                      .priority = e->flags >> 3 > 8 ? 8 : (uint32_t)(e->flags >> 3),
                      .no_match = (e->flags & 2) != 0,
                      .no_keep = (e->flags & 4) != 0};
    if (e->type == KVL_EVENT_UNPIN) return done(p, "kvl_prefix_unpin", kvl_prefix_unpin(p->cache, &d, NULL));
    if (e->slot >= SLOTS) return player_error(p, "slot %u", e->slot);
    return done(p, "kvl_seq_open", kvl_seq_open(p->cache, &d, &p->slots[e->slot], NULL));
}

static bool play_call(struct player *p, const struct event *e) {
    kvl_seq seq;
    kvl_result r = KVL_OK;
    if (!sequence_of(p, e->who, &seq)) return false;
    if (e->slot >= SLOTS && e->type == KVL_EVENT_SEQ_FORK) return player_error(p, "slot %u", e->slot);
    switch (e->type) {
    case KVL_EVENT_SEQ_EXTEND: r = kvl_seq_extend(p->cache, seq, (uint32_t)e->a); break;
    case KVL_EVENT_SEQ_FORK: r = kvl_seq_fork(p->cache, seq, &p->slots[e->slot], NULL); break;
    case KVL_EVENT_SEQ_TRIM: r = kvl_seq_trim(p->cache, seq, (uint32_t)e->a, NULL); break;
    case KVL_EVENT_SEQ_PIN: r = kvl_seq_pin(p->cache, seq, e->a != 0); break;
    default: r = kvl_seq_close(p->cache, seq); break;
    }
    return r == KVL_NO_BLOCKS || done(p, event_names[e->type], r);
}

static bool play_step(struct player *p, const struct event *e) {
    const struct span *spans = e->spans.at;
    kvl_span *at = calloc(e->n + 1, sizeof *at);
    bool ok = at || player_error(p, "no memory");
    for (uint32_t i = 0; i < e->n && ok; i++) {
        ok = sequence_of(p, spans[i].who, &at[i].seq);
        at[i].tokens = (const int32_t *)e->tokens.at + spans[i].first;
        at[i].n_tokens = spans[i].n_tokens;
        at[i].n_logits = spans[i].n_logits;
    }
    if (ok) { /* what it gave is compared; a call that fails without being recorded shows as a difference too */
        const kvl_step *step = NULL;
        if (kvl_step_begin(p->cache, at, e->n, &step) == KVL_OK) p->step = step;
    }
    free(at);
    return ok;
}

static bool play_step_over(struct player *p, const struct event *e) {
    if (!p->step) return player_error(p, "no step is open");
    if (e->type == KVL_EVENT_STEP_END && !run_layers(p, e)) return false;
    kvl_result r = e->type == KVL_EVENT_ABORT      ? kvl_sched_abort(p->sched, p->step)
                   : e->type == KVL_EVENT_STEP_END ? kvl_step_end(p->cache, p->step)
                                                   : kvl_step_abort(p->cache, p->step);
    if (r == KVL_OK) p->step = NULL;
    return done(p, event_names[e->type], r);
}

static bool play_event(struct player *p, const struct event *e) {
    kvl_req request;
    kvl_result r;
    switch (e->type) {
    case KVL_EVENT_END:
        kvl_sched_destroy(p->sched);
        p->sched = NULL;
        return true;
    case KVL_EVENT_SUBMIT:
    case KVL_EVENT_FORK: return play_arrival(p, e);
    case KVL_EVENT_CANCEL:
        return request_of(p, e->who, &request) && done(p, "cancel", kvl_sched_cancel(p->sched, request));
    case KVL_EVENT_CLOSE: kvl_sched_close(p->sched); return true;
    case KVL_EVENT_PLAN: return play_plan(p, e);
    case KVL_EVENT_COMMIT: return play_commit(p, e);
    case KVL_EVENT_RESIZE:
        r = kvl_cache_resize(p->cache, e->a, NULL);
        return r == KVL_NO_BLOCKS || done(p, "resize", r);
    case KVL_EVENT_RECOVER: return done(p, "kvl_cache_recover", kvl_cache_recover(p->cache));
    case KVL_EVENT_SEQ_OPEN:
    case KVL_EVENT_UNPIN: return play_open(p, e);
    case KVL_EVENT_STEP_BEGIN: return play_step(p, e);
    case KVL_EVENT_ABORT:
    case KVL_EVENT_STEP_END:
    case KVL_EVENT_STEP_ABORT: return play_step_over(p, e);
    default: return play_call(p, e);
    }
}

/* ---------------------------------------------------------------- what came of it */

static void report(const struct player *p, struct replay_report *out, enum replay_status status,
                   uint64_t event, uint64_t at, const char *format, ...) {
    va_list args;
    out->status = status;
    out->event = event;
    out->offset = trace_offset(&p->trace, at);
    va_start(args, format);
    vsnprintf(out->text, sizeof out->text, format, args);
    va_end(args);
}

static const char *value_text(const struct hit *h, const char *event, char *to, size_t size) {
    if (!h->what)
        snprintf(to, size, "nothing");
    else if (strcmp(h->what, "event") == 0)
        snprintf(to, size, "%s", h->value < KVL_EVENT_COUNT ? event_names[h->value] : "unknown");
    else if (strcmp(h->what, "result") == 0 && strcmp(event, "plan") == 0)
        snprintf(to, size, "%s", kvl_result_name((kvl_result)h->value));
    else if (strncmp(h->what, "digest", 6) == 0)
        snprintf(to, size, "%016llx", (unsigned long long)h->value);
    else if (h->is_signed)
        snprintf(to, size, "%lld", (long long)h->value);
    else
        snprintf(to, size, "%llu", (unsigned long long)h->value);
    return to;
}

/* The first byte that differs: reads the event around it in both and says which number it is in. */
static void report_difference(struct player *p, struct replay_report *out) {
    const uint64_t *starts = p->starts.at;
    uint64_t i = p->n_starts;
    while (i > 1 && starts[i - 1] > p->differs_at) i--;
    uint64_t start = starts[i - 1], number = p->first_event + i - 1;
    struct reader was = {.data = p->trace.bytes, .n = p->trace.n, .at = start, .watch = p->differs_at};
    struct reader is = {
        .data = p->now.at, .n = p->n_now, .at = start - p->base, .watch = p->differs_at - p->base};
    const char *event = "description";
    if (number == 0) {
        struct description d;
        read_description(&was, &d);
        free(d.layers);
        read_description(&is, &d);
        free(d.layers);
    } else {
        struct event e = {0};
        read_event(&was, &e);
        if (e.type < KVL_EVENT_COUNT) event = event_names[e.type];
        e.clock = e.last_clock = 0;
        read_event(&is, &e);
        event_free(&e);
    }
    char what[96], recorded[96], planned[96], version[64] = "";
    struct hit none = {.index = NO_INDEX};
    const struct hit *h = was.hit.what ? &was.hit : is.hit.what ? &is.hit : &none;
    bool other = was.hit.what && is.hit.what && strcmp(is.hit.what, was.hit.what) != 0;
    if (h->index == NO_INDEX)
        snprintf(what, sizeof what, "%s", h->what ? h->what : "bytes");
    else
        snprintf(what, sizeof what, "%s %llu", h->what, (unsigned long long)h->index);
    value_text(&was.hit, event, recorded, sizeof recorded);
    value_text(&is.hit, event, planned, sizeof planned);
    if (p->description.version != KVL_VERSION)
        snprintf(version, sizeof version, " (recorded by kvlite %u, this is %d)", p->description.version,
                 KVL_VERSION);
    report(p, out, REPLAY_DIFFERS, number, p->differs_at,
           "event %llu (%s) at byte %llu differs after %llu plans: %s: %s was recorded, now it is %s%s%s%s",
           (unsigned long long)number, event, (unsigned long long)trace_offset(&p->trace, p->differs_at),
           (unsigned long long)p->n_plans, what, recorded, other ? is.hit.what : "", other ? " " : "",
           planned, version);
}

/* Stops before the end. What the scheduler records while it is destroyed is no difference. */
static void finish_early(struct player *p) {
    uint64_t last_words = 1 + 8; /* an end record */
    if (!p->sched) return;
    if (p->step && kvl_sched_abort(p->sched, p->step) == KVL_OK) last_words++;
    kvl_sched_destroy(p->sched);
    p->sched = NULL;
    if (p->differs && p->differs_at + last_words >= p->base + p->n_now) p->differs = false;
}

static void note_start(struct player *p, struct reader *r) {
    if (p->base + p->n_now == r->at && !p->differs) { /* all was recorded and is equal: forget it */
        p->base = r->at;
        p->n_now = 0;
        p->first_event += p->n_starts;
        p->n_starts = 0;
    }
    uint64_t *starts = room(r, &p->starts, p->n_starts + 1, sizeof *starts);
    if (!r->error) starts[p->n_starts++] = r->at;
}

static void replay(struct player *p, struct replay_report *out) {
    struct reader r = {.data = p->trace.bytes, .n = p->trace.n, .watch = UINT64_MAX};
    bool ok, ended = false;
    uint64_t start = 0, number = 0;
    note_start(p, &r);
    ok = player_open(p, &r);
    while (ok && !p->differs && !ended && r.at < r.n) {
        number++;
        start = r.at;
        note_start(p, &r);
        ok = read_event(&r, &p->event) && play_event(p, &p->event);
        ended = ok && p->event.type == KVL_EVENT_END;
        if (ok) out->events++;
    }
    if (!ended) finish_early(p);
    if (ended && !p->differs && p->base + p->n_now != r.at) { /* a call that was recorded is not now */
        p->differs = true;
        p->differs_at = p->base + p->n_now;
    }
    out->requests = p->n_requests;
    out->plans = p->n_plans;
    const char *event = number == 0                       ? "description"
                        : p->event.type < KVL_EVENT_COUNT ? event_names[p->event.type]
                                                          : "unknown";
    if (p->no_memory)
        report(p, out, REPLAY_BAD, number, start, "no memory");
    else if (p->differs)
        report_difference(p, out);
    else if (r.error && !r.cut)
        report(p, out, REPLAY_BAD, number, r.start, "event %llu (%s) at byte %llu: %s %s",
               (unsigned long long)number, event, (unsigned long long)trace_offset(&p->trace, r.start),
               r.error, r.why);
    else if (r.error || (ok && !ended))
        report(p, out, p->trace.broken ? REPLAY_BAD : REPLAY_INCOMPLETE, number, p->trace.n,
               "at byte %llu %s before its end record; up to there %llu plans are the same",
               (unsigned long long)p->trace.end, p->trace.error[0] ? p->trace.error : "the trace stops",
               (unsigned long long)p->n_plans);
    else if (!ok)
        report(p, out, REPLAY_BAD, number, start, "event %llu (%s) at byte %llu: %s",
               (unsigned long long)number, event, (unsigned long long)trace_offset(&p->trace, start),
               p->error);
    else if (r.at < p->trace.n || p->trace.error[0])
        report(p, out, REPLAY_BAD, number, r.at, "at byte %llu there is something after the end record",
               (unsigned long long)trace_offset(&p->trace, r.at));
    else
        report(p, out, REPLAY_EQUAL, 0, 0, "%llu events, %llu requests, %llu plans: the same byte for byte",
               (unsigned long long)out->events, (unsigned long long)out->requests,
               (unsigned long long)out->plans);
}

enum replay_status replay_bytes(const void *data, size_t size, const struct replay_options *options,
                                struct replay_report *out) {
    struct player p;
    memset(&p, 0, sizeof p);
    memset(out, 0, sizeof *out);
    p.options = options;
    p.max_bytes = options && options->max_bytes ? options->max_bytes : (size_t)UINT32_MAX;
    if (!trace_open(&p.trace, data, size))
        report(&p, out, REPLAY_BAD, 0, 0, "no memory for a trace of %zu bytes", size);
    else if (!p.trace.n)
        report(&p, out, p.trace.end < PREFIX || p.trace.broken ? REPLAY_BAD : REPLAY_INCOMPLETE, 0, 0,
               "at byte %llu: %s", (unsigned long long)p.trace.end,
               p.trace.error[0] ? p.trace.error : "the trace stops");
    else
        replay(&p, out);
    player_close(&p);
    return out->status;
}

static uint8_t *read_all(FILE *f, size_t *size) {
    uint8_t *data = NULL;
    size_t capacity = 0;
    for (*size = 0;;) {
        if (*size == capacity) {
            capacity = capacity ? 2 * capacity : 1 << 16;
            uint8_t *more = realloc(data, capacity);
            if (!more) break;
            data = more;
        }
        size_t n = fread(data + *size, 1, capacity - *size, f);
        *size += n;
        if (!n) {
            if (!ferror(f)) return data;
            break;
        }
    }
    free(data);
    return NULL;
}

enum replay_status replay_file(const char *path, const struct replay_options *options,
                               struct replay_report *out) {
    size_t size = 0;
    memset(out, 0, sizeof *out);
    out->status = REPLAY_BAD;
    errno = 0;
    FILE *f = fopen(path, "rb");
    uint8_t *data = f ? read_all(f, &size) : NULL;
    if (!data) snprintf(out->text, sizeof out->text, "%s", errno ? strerror(errno) : "cannot be read");
    if (f) fclose(f);
    if (data) replay_bytes(data, size, options, out);
    free(data);
    return out->status;
}
