/* batching.c - what continuous batching on pages is compared with, under the same cost model, KV format and bytes.

   In all three each request has contiguous memory for the longest request of the trace (prompt and answer), so that
   as many fit as kv_bytes / longest:
   - static: a batch is padded to its longest prompt and its longest answer; nothing is let in before all are done.
   - request: no padding, who has finished costs nothing more, but a batch ends before the next begins.
   - contiguous: who has finished makes room for the next at once; prompts run whole (iteration-level batching, with
     memory reserved to the maximum).

   The ideal schedule is a bound that no schedule passes: see batching_ideal_ms. */
#include "trace.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct slot {
    uint32_t r, n_answered;
    bool done;
} slot;

typedef struct batch {
    const workload *w;
    batching mode;
    slot *slots;
    uint32_t n, capacity, next, longest; /* longest prompt of a static batch */
    double now_ms, used, reserved;       /* tokens times milliseconds */
    metrics m;
} batch;

static void fill(batch *b) {
    if (b->n && b->mode != BATCH_CONTIGUOUS) return;
    b->longest = 0;
    for (; b->n < b->capacity && b->next < b->w->n; b->next++) {
        const request *q = &b->w->requests[b->next];
        if (q->arrival_ms > b->now_ms) break;
        b->slots[b->n++] = (slot){.r = b->next};
        if (q->n_prompt > b->longest) b->longest = q->n_prompt;
    }
}

static step_work rows(batch *b, double *held) {
    step_work work = {0};
    bool padded = b->mode == BATCH_STATIC;
    *held = 0;
    for (uint32_t i = 0; i < b->n; i++) {
        const slot *s = &b->slots[i];
        double prompt = padded ? b->longest : b->w->requests[s->r].n_prompt;
        if (!s->done) *held += b->w->requests[s->r].n_prompt + s->n_answered;
        if (s->n_answered == 0) {
            work.prefill_rows += prompt;
            work.prefill_pairs += 0.5 * prompt * prompt;
        } else if (padded || !s->done) {
            work.decode_rows++;
            work.decode_kv_tokens += prompt + s->n_answered - 0.5;
        }
    }
    return work;
}

static void answers(batch *b) {
    bool alive = false;
    uint32_t kept = 0;
    for (uint32_t i = 0; i < b->n; i++) {
        slot *s = &b->slots[i];
        s->n_answered++;
        if (s->done) continue;
        metrics_token(&b->m, s->r, b->now_ms);
        s->done = s->n_answered == b->w->requests[s->r].n_output;
        if (s->done) metrics_done(&b->m, b->now_ms);
        alive = alive || !s->done;
    }
    for (uint32_t i = 0; i < b->n; i++)
        if (b->mode == BATCH_CONTIGUOUS ? !b->slots[i].done : alive) b->slots[kept++] = b->slots[i];
    b->n = kept;
}

bool batching_run(const workload *w, const setup *s, batching mode, double kv_token_bytes, result *out,
                  char *err, size_t err_len) {
    static const char *const names[] = {"static", "request", "contiguous"};
    batch b = {.w = w, .mode = mode};
    memset(out, 0, sizeof *out);
    snprintf(out->mode, sizeof out->mode, "%s", names[mode]);
    double fits = floor((double)s->kv_bytes / (w->reserve * kv_token_bytes));
    b.capacity = fits < 1 ? 1 : fits > s->max_running ? s->max_running : (uint32_t)fits;
    out->batch = b.capacity;
    b.slots = calloc(b.capacity, sizeof *b.slots);
    if (!b.slots || !metrics_open(&b.m, w, err, err_len)) {
        free(b.slots);
        return llm_fail(err, err_len, "out of memory");
    }
    while (b.m.n_done < w->n) {
        double held, ms;
        fill(&b);
        if (!b.n) {
            b.now_ms = w->requests[b.next].arrival_ms;
            continue;
        }
        step_work work = rows(&b, &held);
        ms = cost_ms(&s->cost, &work, kv_token_bytes);
        b.now_ms += ms;
        b.used += held * ms;
        b.reserved += (double)b.n * w->reserve * ms;
        out->busy_ms += ms;
        out->steps++;
        out->prefill_rows += (uint64_t)work.prefill_rows;
        answers(&b);
    }
    metrics_result(&b.m, out);
    out->waste = b.reserved > 0 ? 1 - b.used / b.reserved : 0;
    metrics_free(&b.m);
    free(b.slots);
    return true;
}

/* For each set of the latest requests: they cannot be done before the first of them arrives and all their work is
   done, with the fewest steps that their decodes can take. Those are at least
   - as many as the memory demands: over its steps a request holds (prompt + 1) + (prompt + 2) + ... tokens, and a step
     holds kv_bytes at most, packed without a gap (shared prefixes counted once);
   - as many as max_running demands: a row of decode for each request and step.
   Nor can a request be done before it arrives, its rows have run and as many steps as it has tokens. */
double batching_ideal_ms(const workload *w, const setup *s, double kv_token_bytes, const uint32_t *hits) {
    double best = 0, area = 0, room = (double)s->kv_bytes / kv_token_bytes;
    cost rows_only = s->cost;
    step_work all = {0};
    rows_only.step_ms = 0;
    for (uint32_t r = w->n; r-- > 0;) {
        const request *q = &w->requests[r];
        double reused = hits ? hits[r] : 0, fresh = q->n_prompt - reused, decodes = q->n_output - 1.0;
        double answered = decodes * (decodes + 1) / 2;
        step_work own = {.prefill_rows = fresh,
                         .decode_rows = decodes,
                         .decode_kv_tokens = decodes * (q->n_prompt - 0.5) + answered,
                         .prefill_pairs = fresh * reused + 0.5 * fresh * fresh};
        all.prefill_rows += own.prefill_rows;
        all.decode_rows += own.decode_rows;
        all.decode_kv_tokens += own.decode_kv_tokens;
        all.prefill_pairs += own.prefill_pairs;
        area += decodes * fresh + answered;
        double steps = fmax(area / room, all.decode_rows / s->max_running);
        best =
            fmax(best, q->arrival_ms + cost_ms(&rows_only, &all, kv_token_bytes) + s->cost.step_ms * steps);
        best = fmax(best, q->arrival_ms + cost_ms(&rows_only, &own, kv_token_bytes) +
                              s->cost.step_ms * q->n_output);
    }
    return best;
}
