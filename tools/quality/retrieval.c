/* retrieval.c - does the model still find what stands far back? See quality.h.
 *
 * N_FACTS sentences, "The secret code of KEY is NUMBER.", stand at even depths in a filler text, which fills the rest of
 * the context. At its end every fact is asked for: "The secret code of KEY is", and the answer is right where the
 * model's likeliest continuation is the number, token for token. The other facts, which begin alike, are what
 * makes this hard.
 */
#include "quality.h"
#include "llm/sampler.h"

#include <stdlib.h>
#include <string.h>

enum { N_FACTS = 32, CODE_DIGITS = 5, MAX_ANSWER = 16 };

static const char *const keys[N_FACTS] = {
    "Lisbon",  "Oslo",   "Cairo",  "Vienna",  "Lima",   "Boston", "Madrid",  "Dublin",
    "Prague",  "Tokyo",  "Athens", "Havana",  "Berlin", "Sydney", "Geneva",  "Moscow",
    "Denver",  "Naples", "Delhi",  "Warsaw",  "Quito",  "Bergen", "Toronto", "Nairobi",
    "Seville", "Kyoto",  "Dallas", "Glasgow", "Milan",  "Riga",   "Hamburg", "Bogota"};

typedef struct fact {
    token_list ask, answer; /* the sentence's beginning, and its number */
} fact;

/* What the model says to a question, up to its first wrong token. */
typedef struct reply {
    uint32_t n_right;
    int32_t wrong; /* the token in place of the answer's, -1 where all are right */
} reply;

typedef struct recall_task {
    fact facts[N_FACTS];
    token_list context;
    reply first[N_FACTS]; /* of the first variant */
} recall_task;

static bool encode(const runtime *rt, const char *text, token_list *out, char *err, size_t n) {
    return tokenizer_encode(rt->tok, text, strlen(text), TOKENIZE_PLAIN, out, err, n);
}

static bool make_facts(recall_task *t, const runtime *rt, char *err, size_t n) {
    uint64_t state = 1;
    for (uint32_t i = 0; i < N_FACTS; i++) {
        char text[96], digits[CODE_DIGITS + 2] = " ";
        for (uint32_t d = 0; d < CODE_DIGITS; d++) {
            state = state * 6364136223846793005u + 1442695040888963407u; /* Knuth's MMIX generator */
            digits[1 + d] = (char)('0' + (state >> 33) % 10);
        }
        snprintf(text, sizeof text, "\nThe secret code of %s is", keys[i]);
        if (!encode(rt, text, &t->facts[i].ask, err, n) || !encode(rt, digits, &t->facts[i].answer, err, n))
            return false;
        if (t->facts[i].answer.n > MAX_ANSWER) return llm_fail(err, n, "'%s' is too many tokens", digits);
    }
    return true;
}

static bool append(token_list *to, const int32_t *ids, size_t n_ids, char *err, size_t n) {
    for (size_t i = 0; i < n_ids; i++)
        if (!token_list_push(to, ids[i])) return llm_fail(err, n, "no memory for the context");
    return true;
}

/* Filler with the facts in it, n_tokens long with room for one question. */
static bool make_context(recall_task *t, const runtime *rt, const token_list *filler, uint32_t n_tokens,
                         char *err, size_t n) {
    token_list stop = {0};
    size_t in_facts = 0, longest = 0, at = 0;
    bool ok = encode(rt, ".\n", &stop, err, n);
    for (uint32_t i = 0; i < N_FACTS; i++) {
        const size_t length = t->facts[i].ask.n + t->facts[i].answer.n;
        in_facts += length + stop.n;
        if (length > longest) longest = length;
    }
    if (ok && n_tokens < 2 * in_facts + longest)
        ok = llm_fail(err, n, "%u tokens are too few for %d facts, which take %zu", n_tokens, N_FACTS,
                      in_facts);
    const size_t in_filler = ok ? n_tokens - in_facts - longest : 0;
    if (ok && filler->n < in_filler)
        ok = llm_fail(err, n, "the text has only %zu of the %zu tokens that %u take", filler->n, in_filler,
                      n_tokens);
    for (uint32_t i = 0; ok && i < N_FACTS; i++) {
        const size_t to = in_filler * (2 * i + 1) / (2 * N_FACTS);
        const fact *f = &t->facts[i];
        ok = append(&t->context, filler->ids + at, to - at, err, n) &&
             append(&t->context, f->ask.ids, f->ask.n, err, n) &&
             append(&t->context, f->answer.ids, f->answer.n, err, n) &&
             append(&t->context, stop.ids, stop.n, err, n);
        at = to;
    }
    ok = ok && append(&t->context, filler->ids + at, in_filler - at, err, n);
    token_list_free(&stop);
    return ok;
}

/* Asks on a copy of the sequence. The question runs with its answer: where the likeliest tokens are the
 * answer's up to some token, they are what greedy decoding would have said. */
static bool ask(const variant *v, kvl_cache *cache, kvl_seq context, const fact *f, reply *out, char *err,
                size_t n) {
    int32_t tokens[SCORED_ROWS];
    const uint32_t n_ask = (uint32_t)f->ask.n, n_answer = (uint32_t)f->answer.n;
    if (n_ask + n_answer > SCORED_ROWS) return llm_fail(err, n, "a question of %u tokens", n_ask);
    memcpy(tokens, f->ask.ids, n_ask * sizeof *tokens);
    memcpy(tokens + n_ask, f->answer.ids, n_answer * sizeof *tokens);
    kvl_seq copy;
    kvl_result r = kvl_seq_fork(cache, context, &copy, NULL);
    if (r != KVL_OK) return llm_fail(err, n, "%s: %s", kvl_result_name(r), kvl_last_error(cache));
    bool ok = run_tokens(v->rt, cache, copy, tokens, n_ask + n_answer - 1, n_answer, err, n);
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
    *out = (recall){0};
    for (uint32_t i = 0; ok && i < N_FACTS; i++) {
        reply r;
        ok = ask(v, cache, seq, &t->facts[i], &r, err, n);
        if (is_first) t->first[i] = r;
        out->asked++;
        out->right += r.wrong < 0;
        out->same += r.n_right == t->first[i].n_right && r.wrong == t->first[i].wrong;
    }
    kvl_cache_destroy(cache);
    return ok;
}

bool score_recall(const passage *p, uint32_t n_tokens, const variant *v, uint32_t n_variants, recall *out,
                  char *err, size_t n) {
    recall_task *t = calloc(1, sizeof *t);
    if (!t) return llm_fail(err, n, "no memory for the facts");
    bool ok = make_facts(t, v[0].rt, err, n) && make_context(t, v[0].rt, &p->ids, n_tokens, err, n);
    for (uint32_t i = 0; ok && i < n_variants; i++) {
        ok = run_variant(t, &v[i], n_tokens, i == 0, &out[i], err, n);
        if (ok) fprintf(stderr, "quality: %s: %u of %u facts\n", v[i].name, out[i].right, out[i].asked);
    }
    for (uint32_t i = 0; i < N_FACTS; i++) {
        token_list_free(&t->facts[i].ask);
        token_list_free(&t->facts[i].answer);
    }
    token_list_free(&t->context);
    free(t);
    return ok;
}
