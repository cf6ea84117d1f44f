/* retrieval.c - does the model still find what stands far back? See quality.h.
 *
 * N_FACTS lines, "The code of the city of KEY: KEY NUMBER.", stand at even depths in a filler text, which fills the
 * rest of the context. At its end each fact is asked for on its own: one other fact is said again, as an example, then
 * "The code of the city of KEY: KEY", and the answer is right where the model's likeliest continuation is the number,
 * token for token. The other facts, which begin alike, are what makes this hard. (The wording is one that
 * SmolLM2-135M can do: what it answers with an F32 cache is the first row of the result.)
 */
#include "quality.h"
#include "llm/sampler.h"

#include <stdlib.h>
#include <string.h>

enum { N_FACTS = 16, CODE_DIGITS = 5 };

static const char *const keys[N_FACTS] = {"Lisbon", "Oslo",   "Cairo",  "Vienna", "Lima",   "Boston",
                                          "Madrid", "Dublin", "Prague", "Tokyo",  "Athens", "Havana",
                                          "Berlin", "Sydney", "Geneva", "Moscow"};

typedef struct fact {
    token_list ask, answer; /* the line's beginning, and its number */
} fact;

/* What the model says to a question, up to its first wrong token. */
typedef struct reply {
    uint32_t n_right;
    int32_t wrong; /* the token in place of the answer's, -1 where all are right */
} reply;

typedef struct recall_task {
    fact facts[N_FACTS];
    token_list stop; /* the end of a fact's line */
    token_list context;
    token_list question;
    reply first[N_FACTS]; /* of the first variant */
} recall_task;

static bool encode(const runtime *rt, const char *text, token_list *out, char *err, size_t n) {
    return tokenizer_encode(rt->tok, text, strlen(text), TOKENIZE_PLAIN, out, err, n);
}

static void free_facts(recall_task *t) {
    for (uint32_t i = 0; i < N_FACTS; i++) {
        token_list_free(&t->facts[i].ask);
        token_list_free(&t->facts[i].answer);
    }
    token_list_free(&t->stop);
    token_list_free(&t->context);
    token_list_free(&t->question);
}

/* Other numbers for each context. */
static bool make_facts(recall_task *t, const runtime *rt, uint32_t context, char *err, size_t n) {
    uint64_t state = context;
    for (uint32_t i = 0; i < N_FACTS; i++) {
        char text[96], digits[CODE_DIGITS + 2] = " ";
        for (uint32_t d = 0; d < CODE_DIGITS; d++) {
            state = state * 6364136223846793005u + 1442695040888963407u; /* Knuth's MMIX generator */
            digits[1 + d] = (char)('0' + (state >> 33) % 10);
        }
        snprintf(text, sizeof text, "\nThe code of the city of %s: %s", keys[i], keys[i]);
        if (!encode(rt, text, &t->facts[i].ask, err, n) || !encode(rt, digits, &t->facts[i].answer, err, n))
            return false;
    }
    return encode(rt, ".\n", &t->stop, err, n);
}

static bool append(token_list *to, const int32_t *ids, size_t n_ids, char *err, size_t n) {
    for (size_t i = 0; i < n_ids; i++)
        if (!token_list_push(to, ids[i])) return llm_fail(err, n, "no memory for the context");
    return true;
}

static bool append_fact(token_list *to, const recall_task *t, uint32_t index, char *err, size_t n) {
    const fact *f = &t->facts[index];
    return append(to, f->ask.ids, f->ask.n, err, n) && append(to, f->answer.ids, f->answer.n, err, n) &&
           append(to, t->stop.ids, t->stop.n, err, n);
}

/* Filler with the facts in it, n_tokens long with room for a question. */
static bool make_context(recall_task *t, const int32_t *filler, uint32_t n_tokens, char *err, size_t n) {
    size_t in_facts = 0, longest = 0, at = 0;
    for (uint32_t i = 0; i < N_FACTS; i++) {
        const size_t length = t->facts[i].ask.n + t->facts[i].answer.n + t->stop.n;
        in_facts += length;
        if (length > longest) longest = length;
    }
    const size_t taken = in_facts + 2 * longest; /* an example, and the question */
    if (n_tokens < 2 * taken)
        return llm_fail(err, n, "--ctx %u: the facts take %zu tokens, and filler as many", n_tokens, taken);
    const size_t in_filler = n_tokens - taken;
    for (uint32_t i = 0; i < N_FACTS; i++) {
        const size_t to = in_filler * (2 * i + 1) / (2 * N_FACTS);
        if (!append(&t->context, filler + at, to - at, err, n) || !append_fact(&t->context, t, i, err, n))
            return false;
        at = to;
    }
    return append(&t->context, filler + at, in_filler - at, err, n);
}

/* Asks on a copy of the sequence. The question runs with its answer: where the likeliest tokens are the
 * answer's up to some token, they are what greedy decoding would have said. */
static bool ask(recall_task *t, uint32_t index, const variant *v, kvl_cache *cache, kvl_seq context,
                reply *out, char *err, size_t n) {
    const fact *f = &t->facts[index];
    const uint32_t n_answer = (uint32_t)f->answer.n;
    t->question.n = 0;
    if (!append_fact(&t->question, t, (index + N_FACTS / 2) % N_FACTS, err, n) ||
        !append(&t->question, f->ask.ids, f->ask.n, err, n) ||
        !append(&t->question, f->answer.ids, n_answer, err, n))
        return false;
    kvl_seq copy;
    kvl_result r = kvl_seq_fork(cache, context, &copy, NULL);
    if (r != KVL_OK) return llm_fail(err, n, "%s: %s", kvl_result_name(r), kvl_last_error(cache));
    bool ok = run_tokens(v->rt, cache, copy, t->question.ids, (uint32_t)t->question.n - 1, n_answer, err, n);
    *out = (reply){.wrong = -1};
    for (uint32_t i = 0; ok && i < n_answer && out->wrong < 0; i++) {
        const int32_t said = sampler_argmax(runtime_logits(v->rt, i), v->rt->config->n_vocab);
        if (said == f->answer.ids[i])
            out->n_right++;
        else
            out->wrong = said;
    }
    kvl_seq_close(cache, copy);
    return ok;
}

static bool run_variant(recall_task *t, const variant *v, uint32_t n_tokens, bool is_first, recall *out,
                        char *err, size_t n) {
    runtime_cache_desc desc = v->cache;
    kvl_cache *cache;
    kvl_seq seq;
    desc.seq_tokens = n_tokens;
    desc.n_sequences = 2; /* the copy that a question is asked on */
    if (!runtime_cache(v->rt, &desc, &cache, err, n)) return false;
    bool ok = open_sequence(cache, &seq, err, n);
    const uint32_t length = (uint32_t)t->context.n;
    for (uint32_t at = 0; ok && at < length; at += SCORED_ROWS)
        ok = run_tokens(v->rt, cache, seq, t->context.ids + at,
                        length - at < SCORED_ROWS ? length - at : SCORED_ROWS, 0, err, n);
    for (uint32_t i = 0; ok && i < N_FACTS; i++) {
        reply r = {0};
        ok = ask(t, i, v, cache, seq, &r, err, n);
        if (is_first) t->first[i] = r;
        out->asked++;
        out->right += r.wrong < 0;
        out->same += r.n_right == t->first[i].n_right && r.wrong == t->first[i].wrong;
    }
    kvl_cache_destroy(cache);
    return ok;
}

static bool run_context(recall_task *t, const passage *p, uint32_t context, const variant *v,
                        uint32_t n_variants, recall *out, char *err, size_t n) {
    if (!make_facts(t, v[0].rt, context, err, n) ||
        !make_context(t, p->ids.ids + (size_t)context * p->ctx, p->ctx, err, n))
        return false;
    if (p->bos >= 0) t->context.ids[0] = p->bos;
    for (uint32_t i = 0; i < n_variants; i++)
        if (!run_variant(t, &v[i], p->ctx, i == 0, &out[i], err, n)) return false;
    fprintf(stderr, "quality: context %u of %u: %s has %u right of %u so far\n", context + 1, p->n_chunks,
            v[0].name, out[0].right, out[0].asked);
    return true;
}

bool score_recall(const passage *p, const variant *v, uint32_t n_variants, recall *out, char *err, size_t n) {
    bool ok = true;
    memset(out, 0, n_variants * sizeof *out);
    for (uint32_t c = 0; ok && c < p->n_chunks; c++) {
        recall_task t = {0};
        ok = run_context(&t, p, c, v, n_variants, out, err, n);
        free_facts(&t);
    }
    return ok;
}
