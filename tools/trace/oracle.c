/* oracle.c - what caches of whole blocks would find of the prompts of a trace, request after request: least recently
   used, and Belady's optimum, which knows the future. Prompt and answer of a request pass through the cache; a block
   counts as found where all blocks before it are. */
#include "trace.h"

#include <stdlib.h>
#include <string.h>

/* Blocks have numbers: of the hash that they stand in and their place in it. What no prompt shares has none. */
typedef struct blocks {
    const workload *w;
    uint32_t T, per_hash;
} blocks;

static uint32_t n_full(const blocks *b, uint32_t r) { return (b->w->requests[r].n_prompt - 1) / b->T; }
static uint32_t block_id(const blocks *b, uint32_t r, uint32_t i) {
    return b->w->hashes[b->w->requests[r].first_hash + i / b->per_hash] * b->per_hash + i % b->per_hash;
}
/* Blocks beside those of n_full: the rest of the prompt with the answer. */
static uint32_t n_own(const blocks *b, uint32_t r) {
    const request *q = &b->w->requests[r];
    return (q->n_prompt + q->n_output - 1) / b->T - n_full(b, r);
}
static blocks blocks_of(const workload *w, uint32_t block_tokens) {
    blocks b = {w, block_tokens, HASH_TOKENS / block_tokens};
    return b;
}

/* ---- least recently used ---- */

typedef struct lru {
    uint32_t *prev, *next; /* [n] a ring through entry n; prev KVL_NONE: not in it */
    uint32_t n;
    uint64_t held, capacity;
} lru;

static void lru_remove(lru *l, uint32_t i) {
    l->next[l->prev[i]] = l->next[i];
    l->prev[l->next[i]] = l->prev[i];
    l->prev[i] = KVL_NONE;
    l->held--;
}
static void lru_touch(lru *l, uint32_t i) {
    if (l->prev[i] != KVL_NONE) lru_remove(l, i);
    l->prev[i] = l->prev[l->n];
    l->next[i] = l->n;
    l->next[l->prev[i]] = i;
    l->prev[l->n] = i;
    l->held++;
}

bool oracle_lru(const workload *w, uint32_t block_tokens, uint64_t n_blocks, uint64_t *hit_tokens, char *err,
                size_t err_len) {
    blocks b = blocks_of(w, block_tokens);
    *hit_tokens = 0;
    if (!w->hashes) return true;
    uint64_t shared = (uint64_t)w->n_distinct * b.per_hash, total = shared;
    for (uint32_t r = 0; r < w->n; r++) total += n_own(&b, r);
    lru l = {.capacity = n_blocks, .n = (uint32_t)total};
    l.prev = malloc((total + 1) * sizeof *l.prev);
    l.next = malloc((total + 1) * sizeof *l.next);
    bool ok = l.prev && l.next && total < KVL_NONE;
    if (ok) memset(l.prev, 0xff, total * sizeof *l.prev);
    if (ok) l.prev[total] = l.next[total] = l.n;
    uint32_t own = (uint32_t)shared;
    for (uint32_t r = 0; ok && r < w->n; r++) {
        uint32_t n = n_full(&b, r), found = 0, fresh = n_own(&b, r);
        while (found < n && l.prev[block_id(&b, r, found)] != KVL_NONE) found++;
        *hit_tokens += (uint64_t)found * block_tokens;
        for (uint32_t i = fresh; i-- > 0;)
            lru_touch(&l, own + i); /* deepest first: parents outlive children */
        own += fresh;
        for (uint32_t i = n; i-- > 0;) lru_touch(&l, block_id(&b, r, i));
        while (l.held > l.capacity) lru_remove(&l, l.next[l.n]);
    }
    free(l.prev);
    free(l.next);
    return ok || llm_fail(err, err_len, "out of memory");
}

/* ---- Belady: keep what is needed soonest ---- */

/* next[k] of the k-th block access of the trace: the request that needs that block next, or w->n. */
static uint32_t *next_uses(const blocks *b, uint64_t n_accesses) {
    const workload *w = b->w;
    uint64_t distinct = (uint64_t)w->n_distinct * b->per_hash, k = n_accesses;
    uint32_t *next = malloc((n_accesses + 1) * sizeof *next), *seen = malloc((distinct + 1) * sizeof *seen);
    if (next && seen) {
        for (uint64_t i = 0; i < distinct; i++) seen[i] = w->n;
        for (uint32_t r = w->n; r-- > 0;)
            for (uint32_t i = n_full(b, r); i-- > 0;) {
                uint32_t id = block_id(b, r, i);
                next[--k] = seen[id];
                seen[id] = r;
            }
    }
    if (!seen) {
        free(next);
        next = NULL;
    }
    free(seen);
    return next;
}

/* What is kept for a request is always the first blocks of its prompt, since those are needed by others no later: so
   a count for each request is all that the cache is. */
bool oracle_belady(const workload *w, uint32_t block_tokens, uint64_t n_blocks, uint64_t *hit_tokens,
                   uint32_t *hits, char *err, size_t err_len) {
    blocks b = blocks_of(w, block_tokens);
    uint64_t n_accesses = 0, held = 0, k = 0;
    uint32_t farthest = 0;
    *hit_tokens = 0;
    if (hits) memset(hits, 0, w->n * sizeof *hits);
    if (!w->hashes) return true;
    for (uint32_t r = 0; r < w->n; r++) n_accesses += n_full(&b, r);
    uint32_t *kept = calloc(w->n + 1, sizeof *kept), *next = next_uses(&b, n_accesses);
    bool ok = kept && next;
    for (uint32_t r = 0; ok && r < w->n; r++) {
        *hit_tokens += (uint64_t)kept[r] * block_tokens;
        if (hits) hits[r] = kept[r] * block_tokens;
        held -= kept[r];
        kept[r] = 0;
        for (uint32_t i = n_full(&b, r); i-- > 0; k++) {
            uint32_t need = next[k];
            if (need == w->n) continue;
            kept[need]++;
            if (need > farthest) farthest = need;
            if (++held <= n_blocks) continue;
            while (!kept[farthest]) farthest--;
            kept[farthest]--;
            held--;
        }
    }
    free(kept);
    free(next);
    return ok || llm_fail(err, err_len, "out of memory");
}
