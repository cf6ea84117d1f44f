/* demo_report.h - what demo.c measured: as tables, and as a JSON object. `demo --help` names its keys. */
#ifndef DEMO_REPORT_H
#define DEMO_REPORT_H

#include "demo_run.h"
#include "demo_view.h"

#include <inttypes.h>

enum { REPORT_CHATS = 8 };

typedef struct report_chat {
    const char *name;
    unsigned n_turns;
    size_t n_tokens;             /* of the conversation in the end */
    uint64_t n_prompt, n_reused; /* over all turns */
    const token_list *answers;   /* [n_turns] */
} report_chat;

typedef struct report {
    const runtime *rt;
    const char *path, *model; /* the file, and its name alone */
    char kv[64];
    uint64_t seed, budget;
    uint32_t context; /* tokens a conversation may grow to */
    double max_gap_ms, live_s, seconds;
    bool quick;
    report_chat chats[REPORT_CHATS];
    kvl_stats stats; /* of the live run */
    uint64_t n_generated, kv_peak;
    figures f;
} report;

/* ---- tables ---- */

static void report_chats(const report *r) {
    for (unsigned i = 0; i < REPORT_CHATS; i++) {
        const report_chat *c = &r->chats[i];
        printf(" %-8s %u turns, %4zu tokens in the end, %4" PRIu64 " of %4" PRIu64 " prompt tokens reused\n",
               c->name, c->n_turns, c->n_tokens, c->n_reused, c->n_prompt);
    }
    putchar('\n');
}

typedef struct totals {
    uint64_t prompt, reused, turns, reserved, final;
} totals;

static totals sum_up(const report *r) {
    totals t = {.reserved = REPORT_CHATS * runtime_contiguous_bytes(r->rt, r->context)};
    for (unsigned i = 0; i < REPORT_CHATS; i++) {
        t.turns += r->chats[i].n_turns;
        t.prompt += r->chats[i].n_prompt;
        t.reused += r->chats[i].n_reused;
        t.final += runtime_contiguous_bytes(r->rt, r->chats[i].n_tokens);
    }
    return t;
}

static void table_row(const char *what, const char *with, const char *without, double times) {
    printf(" %-27s %-15s %s", what, with, without);
    if (times > 0) printf("%*s%.*fx", 26 - (int)strlen(without), "", times < 10 ? 1 : 0, times);
    putchar('\n');
}

static void report_rows(const report *r, const totals *t) {
    const figures *f = &r->f;
    char what[64], with[64], without[64];
    table_row("", "kvlite", "without", 0);
    snprintf(with, sizeof with, "%.0f together", f->together_rate);
    snprintf(without, sizeof without, "%.0f one at a time", f->alone_rate);
    table_row("tokens/s, 8 streams (1)", with, without, f->together_rate / f->alone_rate);
    snprintf(with, sizeof with, "%.1f MiB", VIEW_MIB(r->kv_peak));
    snprintf(without, sizeof without, "%.1f MiB reserved", VIEW_MIB(t->reserved));
    table_row("KV memory, peak (2)", with, without, (double)t->reserved / (double)r->kv_peak);
    snprintf(without, sizeof without, "%.1f MiB at final size", VIEW_MIB(t->final));
    table_row("", "", without, (double)t->final / (double)r->kv_peak);
    snprintf(with, sizeof with, "%" PRIu64, t->prompt - t->reused);
    snprintf(without, sizeof without, "%" PRIu64, t->prompt);
    table_row("prompt tokens computed (3)", with, without,
              (double)t->prompt / (double)(t->prompt - t->reused));
    snprintf(with, sizeof with, "%.0f ms", f->chunked_gap_ms);
    snprintf(without, sizeof without, "%.0f ms", f->whole_gap_ms);
    table_row("longest wait, one token (4)", with, without, f->whole_gap_ms / f->chunked_gap_ms);
    snprintf(what, sizeof what, "a token after %u (5)", f->at_tokens);
    snprintf(with, sizeof with, "%.1f ms", f->cached_ms);
    snprintf(without, sizeof without, "%.0f ms recomputed", f->recomputed_ms);
    table_row(what, with, without, f->recomputed_ms / f->cached_ms);
}

static void report_table(const report *r) {
    totals t = sum_up(r);
    const figures *f = &r->f;
    printf("%d conversations, %" PRIu64 " turns, %" PRIu64
           " tokens written in %.0f s (people's pauses included)\n",
           REPORT_CHATS, t.turns, r->n_generated, r->live_s);
    printf("%s on %s, %u thread%s, KV in %s\n\n", r->model, kvl_context_backend(r->rt->context),
           pool_threads(r->rt->threads), pool_threads(r->rt->threads) > 1 ? "s" : "", r->kv);
    report_rows(r, &t);
    printf("\n (1) The 8 first questions, all at once and one after another: tokens written a\n"
           "     second. Live, together, alone: %u of %u answers are equal, token for token.\n",
           f->n_same, f->n_compared);
    printf(" (2) Blocks in use or kept for reuse, and scratch, in a budget of %.0f MiB; against\n"
           "     contiguous f16 buffers, reserved for %u tokens a conversation, and then\n"
           "     for only the tokens that each had in the end.\n",
           VIEW_MIB(r->budget), r->context);
    printf(" (3) In the live run %.0f%% of the prompt tokens were in memory already.\n",
           100.0 * (double)t.reused / (double)t.prompt);
    printf(" (4) A prompt of %u tokens comes in while %u streams write: in chunks (asked: at\n"
           "     most %.0f ms) and in one piece. Live: %.0f ms at most, %.0f ms in the median.\n",
           f->gap_prompt, f->gap_streams, r->max_gap_ms, r->stats.gap_ms.max, r->stats.gap_ms.p50);
    printf(" (5) With the cache, and by computing all %u tokens again.\n", f->at_tokens);
    printf("\nAll of it was measured on this machine just now, in %.0f s.\n", r->seconds);
}

/* ---- JSON ---- */

/* s is valid UTF-8. */
static void json_text(const char *s, size_t n) {
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)s[i];
        if (c == '"' || c == '\\')
            printf("\\%c", c);
        else if (c < 0x20 || c == 0x7f)
            printf("\\u%04x", c);
        else
            putchar(c);
    }
}

static void json_string(const char *s) { /* may hold invalid UTF-8 */
    char out[UTF8_STREAM_ROOM(1)];
    utf8_stream u = {0};
    putchar('"');
    for (; *s; s++) json_text(out, utf8_stream_push(&u, s, 1, out));
    json_text(out, utf8_stream_flush(&u, out));
    putchar('"');
}

static void json_answer(const report *r, const token_list *answer) {
    char out[UTF8_STREAM_ROOM(256)];
    utf8_stream u = {0};
    putchar('"');
    for (size_t i = 0; i < answer->n; i++) {
        size_t len;
        const char *piece = tokenizer_piece(r->rt->tok, answer->ids[i], &len);
        if (tokenizer_is_control(r->rt->tok, answer->ids[i])) continue;
        json_text(out, utf8_stream_push(&u, piece, len < 256 ? len : 256, out));
    }
    json_text(out, utf8_stream_flush(&u, out));
    putchar('"');
}

static void json_chats(const report *r) {
    printf("\"chats\":[");
    for (unsigned i = 0; i < REPORT_CHATS; i++) {
        const report_chat *c = &r->chats[i];
        printf("%s{\"name\":\"%s\",\"turns\":%u,\"tokens\":%zu,\"prompt_tokens\":%" PRIu64
               ",\"reused_tokens\":%" PRIu64 ",\"answers\":[",
               i ? "," : "", c->name, c->n_turns, c->n_tokens, c->n_prompt, c->n_reused);
        for (unsigned t = 0; t < c->n_turns; t++) {
            if (t) putchar(',');
            json_answer(r, &c->answers[t]);
        }
        printf("]}");
    }
    printf("]");
}

static void report_json(const report *r) {
    totals t = sum_up(r);
    const figures *f = &r->f;
    const kvl_percentiles *g = &r->stats.gap_ms, *first = &r->stats.ttft_ms;
    printf("{\"model\":");
    json_string(r->path);
    printf(",\"backend\":");
    json_string(kvl_context_backend(r->rt->context));
    printf(",\"threads\":%u,\"kv\":\"%s\",\"seed\":%" PRIu64 ",\"quick\":%s,\"seconds\":%.3f,",
           pool_threads(r->rt->threads), r->kv, r->seed, r->quick ? "true" : "false", r->seconds);
    printf("\"live\":{\"seconds\":%.3f,\"conversations\":%d,\"turns\":%" PRIu64 ",\"prompt_tokens\":%" PRIu64
           ",\"reused_tokens\":%" PRIu64 ",\"generated_tokens\":%" PRIu64 ",\"steps\":%" PRIu64
           ",\"preemptions\":%" PRIu64 ",\"evicted_blocks\":%" PRIu64 ",\"max_gap_ms\":%g,",
           r->live_s, REPORT_CHATS, t.turns, t.prompt, t.reused, r->n_generated, r->stats.steps,
           r->stats.preemptions, r->stats.evicted_blocks, r->max_gap_ms);
    printf("\"gap_ms\":{\"p50\":%.3f,\"p99\":%.3f,\"max\":%.3f},", g->p50, g->p99, g->max);
    printf("\"first_token_ms\":{\"p50\":%.3f,\"p99\":%.3f,\"max\":%.3f}},", first->p50, first->p99,
           first->max);
    json_chats(r);
    printf(",\"memory\":{\"budget_bytes\":%" PRIu64 ",\"peak_bytes\":%" PRIu64
           ",\"context_tokens\":%u,\"reserved_bytes\":%" PRIu64 ",\"final_bytes\":%" PRIu64 "},",
           r->budget, r->kv_peak, r->context, t.reserved, t.final);
    printf("\"rates\":{\"streams\":%d,\"together_tokens_per_s\":%.3f,\"one_at_a_time_tokens_per_s\":%.3f,"
           "\"same_answers\":%u},",
           REPORT_CHATS, f->together_rate, f->alone_rate, f->n_same);
    printf("\"gap\":{\"streams\":%u,\"prompt_tokens\":%u,\"chunked_ms\":%.3f,\"whole_ms\":%.3f},",
           f->gap_streams, f->gap_prompt, f->chunked_gap_ms, f->whole_gap_ms);
    printf("\"next_token\":{\"tokens\":%u,\"cached_ms\":%.3f,\"recomputed_ms\":%.3f}}\n", f->at_tokens,
           f->cached_ms, f->recomputed_ms);
}

#endif /* DEMO_REPORT_H */
