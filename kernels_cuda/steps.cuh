/* Which tokens a block of threads visits, and in what order: the walk over an item's blocks in steps of 16 or 32 tokens,
   used by prefill and plain.

   A step is a range of positions aligned to its size, whatever the item and its rows, so a row's numbers are added up in
   the same order in every batch and chunk. What none of the rows sees is not even looked up. */
#ifndef KVL_STEPS_CUH
#define KVL_STEPS_CUH
#include "pages.cuh"

/* An item, left in memory since registers are dear, and the positions of its first and last row. */
struct kvl_rows {
    const kvli_gpu_item *item;
    uint32_t x_first, x_last;
    kvl_sight sight;
};

KVL_D const kvli_gpu_span &kvl_span_of(const kvli_cu_attend_args &a, const kvl_rows &r) {
    return a.spans[r.item->span];
}
/* Of row i of the item. */
KVL_D uint32_t kvl_position(const kvli_cu_attend_args &a, const kvl_rows &r, uint32_t i) {
    return kvl_span_of(a, r).position + (r.item->row + i) / a.gqa;
}
/* How many tokens of the sequence are there. */
KVL_D uint32_t kvl_written(const kvli_cu_attend_args &a, const kvl_rows &r) {
    return kvl_span_of(a, r).position + kvl_span_of(a, r).n_rows;
}

/* False: this block of threads has no item. */
KVL_D bool kvl_rows_of_block(const kvli_cu_attend_args &a, uint32_t n_items, kvl_rows &r) {
    uint32_t i = a.first_item + blockIdx.x;
    if (i >= a.end_item || i >= n_items) return false;
    r.item = a.items + i;
    r.x_first = kvl_position(a, r, 0);
    r.x_last = kvl_position(a, r, r.item->n_rows - 1);
    r.sight = kvl_sight{a.block_tokens, a.window, a.sink_tokens};
    return true;
}

constexpr uint32_t KVL_ALL_LANES = 0xffffffff;

/* ---- the online softmax, in base 2 ---- */
constexpr float KVL_LOG2E = 1.4426950408889634f;
constexpr float KVL_NO_SCORE = -2e30f; /* below every score; times anything in [2^-96, 2^27] still a number */

/* The power of two at or below a row's largest magnitude, within what has an inverse. */
KVL_D float kvl_row_power(float largest) {
    uint32_t exponent = __float_as_uint(largest) >> 23;
    return __uint_as_float((exponent < 1 ? 1 : exponent > 253 ? 253 : exponent) << 23);
}

/* What a row's accumulators are multiplied with to be its output, given its maximum and sum of weights; sink_logits have
   their share of the sum. */
KVL_D float kvl_output_factor(const kvli_cu_attend_args &a, uint32_t head, float max, float sum) {
    if (a.sink_logits) {
        float sink = __fmul_rn(a.sink_logits[head], KVL_LOG2E), top = fmaxf(max, sink);
        float rescale = kvl_exp2(__fsub_rn(max, top));
        return __fdiv_rn(rescale, __fmaf_rn(sum, rescale, kvl_exp2(__fsub_rn(sink, top))));
    }
    return sum > 0 ? __fdiv_rn(1, sum) : 0;
}

/* Which partial result is row i of an item. */
KVL_D uint64_t kvl_partial_number(const kvli_cu_attend_args &a, const kvli_gpu_item &item, uint32_t i) {
    return (uint64_t)item.partial * a.n_kv_heads + blockIdx.y * item.n_rows + i;
}

/* ---- visits ---- */

/* The positions first..last of the queries that see a token. */
struct kvl_range {
    uint32_t first, last;
};
KVL_D kvl_range kvl_seen_by(const kvl_sight &s, bool own, uint32_t token) {
    uint32_t next = kvl_block_start(s, token) + s.block_tokens;
    kvl_range r = {own ? token : next, own ? next - 1 : 0x7fffffffu};
    if (s.window && token >= s.sink_tokens && r.last - token >= s.window) r.last = token + s.window - 1;
    return r;
}

/* UNITS times 16 tokens: of one block, or, where blocks have 16 tokens, of two. */
constexpr uint32_t KVL_NO_TOKEN = 0x7fffffc0; /* no query comes that far */
enum { KVL_STEP_OWN = 4 };
template <uint32_t UNITS> struct kvl_step {
    KVL_MEMBER bool own() const { return flags & KVL_STEP_OWN; }
    KVL_MEMBER bool has(uint32_t unit) const { return flags >> unit & 1; }

    uint32_t token;         /* position of the first, a multiple of 16 * UNITS */
    uint32_t flags;         /* bit u: unit u is there; KVL_STEP_OWN; 0: there is no step */
    kvl_tiles tiles[UNITS]; /* of the blocks of units that are there */
};

/* Does a query at one of the positions see some of a step's tokens? Do all see all? */
template <uint32_t UNITS>
KVL_D bool kvl_step_any_sees(const kvl_sight &s, const kvl_step<UNITS> &step, uint32_t x_first,
                             uint32_t x_last) {
    uint32_t size = min(UNITS * KVLI_CU_UNIT, s.block_tokens), token = step.token;
    bool any = step.has(0) && kvl_any_sees(s, step.own(), x_first, x_last, token, token + size - 1);
    if (UNITS == 1 || s.block_tokens > KVLI_CU_UNIT) return any;
    return any ||
           (step.has(1) && kvl_any_sees(s, step.own(), x_first, x_last, token + size, token + 2 * size - 1));
}
template <uint32_t UNITS>
KVL_D bool kvl_step_all_see(const kvl_sight &s, const kvl_step<UNITS> &step, uint32_t x_first,
                            uint32_t x_last) {
    uint32_t size = min(UNITS * KVLI_CU_UNIT, s.block_tokens), token = step.token;
    bool all = step.has(0) && kvl_all_see(s, step.own(), x_first, x_last, token, token + size - 1);
    if (UNITS == 1 || s.block_tokens > KVLI_CU_UNIT) return all;
    return all && step.has(1) &&
           kvl_all_see(s, step.own(), x_first, x_last, token + size, token + 2 * size - 1);
}

/* First the blocks of the table, then the own ones; of one class, or all. */
enum kvl_walk_kind { KVL_WALK_PACKED, KVL_WALK_EXACT, KVL_WALK_ALL };
struct kvl_walk {
    bool own;
    uint32_t next; /* block of the list that is to be looked up; lane l knows block next - 32 + l */
    uint32_t bits; /* of the lanes whose block is to be visited */
    uint32_t done; /* tokens of the first such block */
};

/* From an even block, as two of 16 tokens may be one step. */
KVL_D kvl_walk kvl_walk_start(const kvl_rows &r) { return kvl_walk{false, r.item->begin & ~1u, 0, 0}; }

KVL_D uint64_t kvl_walk_entry(const kvl_walk &w, const kvli_cu_attend_args &a, const kvl_rows &r,
                              uint32_t block) {
    const kvli_gpu_span &span = kvl_span_of(a, r);
    return a.entries[w.own ? span.own + block - span.first_own : span.table + block];
}

/* Looks up the next 32 blocks, a lane each. False: there are no more. */
KVL_D bool kvl_walk_look(kvl_walk &w, const kvli_cu_attend_args &a, const kvl_rows &r, kvl_walk_kind kind) {
    if (w.next >= r.item->end && !w.own && kind != KVL_WALK_PACKED) {
        w.own = true;
        w.next = r.item->own_begin & ~1u;
    }
    uint32_t begin = w.own ? r.item->own_begin : r.item->begin, end = w.own ? r.item->own_end : r.item->end;
    if (w.next >= end) return false;
    uint32_t b = w.next + threadIdx.x % 32, token = b * a.block_tokens;
    bool here = b >= begin && b < end &&
                kvl_any_sees(r.sight, w.own, r.x_first, r.x_last, token, token + a.block_tokens - 1);
    uint64_t entry = here ? kvl_walk_entry(w, a, r, b) : 0;
    bool exact = w.own || kvl_entry_is_exact(entry);
    bool takes = entry != 0 && (kind == KVL_WALK_ALL || exact == (kind == KVL_WALK_EXACT));
    w.bits = __ballot_sync(KVL_ALL_LANES, takes);
    w.next += 32;
    return true;
}

/* The step at the walk's place, whoever sees it. */
template <uint32_t UNITS>
KVL_D void kvl_walk_take(kvl_walk &w, const kvli_cu_attend_args &a, const kvl_rows &r, kvl_step<UNITS> &s) {
    const bool pair = UNITS * KVLI_CU_UNIT > a.block_tokens; /* of blocks, either of which may be absent */
    uint32_t lane = __ffs(w.bits) - 1;
    if (pair) lane &= ~1u;
    uint32_t block = w.next - 32 + lane;
    s.token = block * a.block_tokens + w.done;
    s.flags = (pair ? w.bits >> lane & 3 : 3) | (w.own ? KVL_STEP_OWN : 0);
    KVL_UNROLL
    for (uint32_t u = 0; u < UNITS; u++) {
        s.tiles[u] = u > 0 ? s.tiles[u - 1] : kvl_tiles{nullptr, nullptr};
        if (u > 0 && !pair) break;
        if (s.has(u)) s.tiles[u] = kvl_tiles_of(a.pages, kvl_walk_entry(w, a, r, block + u), blockIdx.y);
    }
    w.done += UNITS * KVLI_CU_UNIT;
    if (w.done >= a.block_tokens) {
        w.bits &= ~((pair ? 3u : 1u) << lane);
        w.done = 0;
    }
}

/* The next step of which some row sees something; none at the end. */
template <uint32_t UNITS>
KVL_D void kvl_walk_step(kvl_walk &w, const kvli_cu_attend_args &a, const kvl_rows &r, kvl_walk_kind kind,
                         kvl_step<UNITS> &s) {
    s.token = KVL_NO_TOKEN;
    s.flags = 0;
    do {
        if (w.bits) {
            kvl_walk_take(w, a, r, s);
        } else if (!kvl_walk_look(w, a, r, kind)) {
            s.token = KVL_NO_TOKEN;
            s.flags = 0;
            return;
        }
    } while (!kvl_step_any_sees(r.sight, s, r.x_first, r.x_last));
}

#endif
