/* dump_logits.c - what the model runner computes, as raw numbers for tests/e2e/test_logits.py.
 *
 *     dump_logits -m MODEL.gguf (--text FILE | --tokens FILE) --write WHAT [options]
 *
 *     --text FILE      encoded as it stands: the text of control tokens stands for those tokens
 *     --tokens FILE    token ids, raw i32
 *     --write ids      the token ids, i32
 *             logits   the logits of each token, f32 [tokens - from][vocabulary]
 *             greedy   the likeliest continuation, i32 [new]; goes through the scheduler
 *     --from ROW       logits of the tokens before this one are left out
 *     --new N          tokens of the continuation (default 24)
 *     --chunk N        most rows of one step (default 512)
 *     --reuse N        the first N tokens run before as a sequence of their own, and what it left must be reused
 *
 * and -m, --threads, --act, --kv, --kv-k, --kv-v as the programs take them. Everything goes to stdout.
 */
#include "llm/options.h"
#include "llm/runtime.h"
#include "llm/sampler.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

typedef enum what { WRITE_NOTHING = 0, WRITE_IDS, WRITE_LOGITS, WRITE_GREEDY } what;

typedef struct job {
    options o;
    const char *text, *tokens; /* files, one of them */
    what write;
    uint64_t from, n_new, chunk, n_reuse;
    runtime rt;
    kvl_cache *cache;
    token_list ids;
} job;

/* ---- what to do ---- */

static bool take_what(job *j, args *a, char *err, size_t n) {
    static const char *const names[] = {
        [WRITE_IDS] = "ids", [WRITE_LOGITS] = "logits", [WRITE_GREEDY] = "greedy"};
    const char *value;
    if (!args_value(a, &value, err, n)) return false;
    for (int w = WRITE_IDS; w <= WRITE_GREEDY; w++)
        if (strcmp(value, names[w]) == 0) j->write = (what)w;
    return j->write || llm_fail(err, n, "--write '%.40s': must be ids, logits or greedy", value);
}

static bool take(job *j, args *a, char *err, size_t n) {
    bool taken;
    if (!options_take(&j->o, a, &taken, err, n)) return false;
    if (taken) return true;
    if (args_is(a, "--text")) return args_value(a, &j->text, err, n);
    if (args_is(a, "--tokens")) return args_value(a, &j->tokens, err, n);
    if (args_is(a, "--write")) return take_what(j, a, err, n);
    if (args_is(a, "--from")) return args_u64(a, 0, INT32_MAX, &j->from, err, n);
    if (args_is(a, "--new")) return args_u64(a, 1, INT32_MAX, &j->n_new, err, n);
    if (args_is(a, "--chunk")) return args_u64(a, 1, 1 << 16, &j->chunk, err, n);
    if (args_is(a, "--reuse")) return args_u64(a, 1, INT32_MAX, &j->n_reuse, err, n);
    return llm_fail(err, n, "option '%s' is unknown", a->name);
}

static bool parse(job *j, int argc, char **argv, char *err, size_t n) {
    args a = {.argc = argc, .argv = argv, .i = 1};
    j->n_new = 24;
    j->chunk = 512;
    while (args_next(&a, err, n))
        if (!take(j, &a, err, n)) return false;
    if (err[0] || !options_check(&j->o, err, n)) return false;
    if (!j->text == !j->tokens) return llm_fail(err, n, "one of --text and --tokens is needed");
    return j->write || llm_fail(err, n, "--write ids, logits or greedy is needed");
}

/* *data is the caller's to free. */
static bool read_file(const char *path, char **data, size_t *size, char *err, size_t n) {
    FILE *f = fopen(path, "rb");
    size_t cap = 0;
    *data = NULL;
    *size = 0;
    if (!f) return llm_fail(err, n, "%.100s: %s", path, strerror(errno));
    while (!feof(f) && !ferror(f)) {
        char *grown = realloc(*data, cap += 1 << 16);
        if (!grown) break;
        *data = grown;
        *size += fread(*data + *size, 1, cap - *size, f);
    }
    bool ok = feof(f) && !ferror(f);
    fclose(f);
    return ok || llm_fail(err, n, "%.100s: cannot be read", path);
}

static bool read_ids(job *j, char *err, size_t n) {
    char *data;
    size_t size;
    bool ok = read_file(j->text ? j->text : j->tokens, &data, &size, err, n);
    if (ok && j->text)
        ok = tokenizer_encode(j->rt.tok, data, size, TOKENIZE_SPECIAL | TOKENIZE_BOS, &j->ids, err, n);
    for (size_t at = 0; ok && j->tokens && at + sizeof(int32_t) <= size; at += sizeof(int32_t)) {
        int32_t id;
        memcpy(&id, data + at, sizeof id);
        ok = token_list_push(&j->ids, id) || llm_fail(err, n, "no memory for the tokens");
    }
    free(data);
    if (!ok) return false;
    if (!j->ids.n || j->ids.n > j->rt.config->n_ctx)
        return llm_fail(err, n, "%zu tokens: must be 1 to %u", j->ids.n, j->rt.config->n_ctx);
    return j->n_reuse < j->ids.n || llm_fail(err, n, "--reuse: must be less than the %zu tokens", j->ids.n);
}

static bool put(const void *data, size_t size, size_t count, char *err, size_t n) {
    return fwrite(data, size, count, stdout) == count || llm_fail(err, n, "stdout: %s", strerror(errno));
}

/* ---- logits: the cache alone, step by step ---- */

static bool cache_failed(const job *j, kvl_result r, char *err, size_t n) {
    return llm_fail(err, n, "%s: %s", kvl_result_name(r), kvl_last_error(j->cache));
}

/* Runs tokens [at, end) of an open sequence and writes the logits of those from `from` on. */
static bool run_rows(job *j, kvl_seq seq, uint32_t at, uint32_t end, uint32_t from, char *err, size_t n) {
    while (at < end) {
        uint32_t rows = end - at < j->chunk ? end - at : (uint32_t)j->chunk;
        uint32_t skipped = from > at ? from - at : 0;
        kvl_span span = {.seq = seq,
                         .tokens = j->ids.ids + at,
                         .n_tokens = rows,
                         .n_logits = skipped < rows ? rows - skipped : 0};
        const kvl_step *step;
        kvl_result r = kvl_step_begin(j->cache, &span, 1, &step);
        if (r != KVL_OK) return cache_failed(j, r, err, n);
        if (!runtime_forward(&j->rt, j->cache, step, err, n)) return false;
        for (uint32_t i = 0; i < span.n_logits; i++)
            if (!put(runtime_logits(&j->rt, i), sizeof(float), j->rt.config->n_vocab, err, n)) return false;
        r = kvl_step_end(j->cache, step);
        if (r != KVL_OK) return cache_failed(j, r, err, n);
        at += rows;
    }
    return true;
}

static bool run_sequence(job *j, uint32_t n_tokens, uint32_t from, uint32_t *matched, char *err, size_t n) {
    kvl_seq_desc desc = {.tokens = j->ids.ids, .n_tokens = n_tokens};
    kvl_seq seq;
    kvl_reuse reuse;
    kvl_result r = kvl_seq_open(j->cache, &desc, &seq, &reuse);
    if (r != KVL_OK) return cache_failed(j, r, err, n);
    *matched = reuse.matched;
    if (reuse.matched > from)
        return llm_fail(err, n, "--from %u: %u tokens were reused and have no logits", from, reuse.matched);
    if (!run_rows(j, seq, reuse.matched, n_tokens, from, err, n)) return false;
    r = kvl_seq_close(j->cache, seq);
    return r == KVL_OK || cache_failed(j, r, err, n);
}

static bool write_logits(job *j, char *err, size_t n) {
    uint32_t matched = 0;
    if (j->n_reuse && !run_sequence(j, (uint32_t)j->n_reuse, UINT32_MAX, &matched, err, n)) return false;
    if (!run_sequence(j, (uint32_t)j->ids.n, (uint32_t)j->from, &matched, err, n)) return false;
    return !j->n_reuse || matched > 0 || llm_fail(err, n, "--reuse: nothing was reused");
}

/* ---- greedy: through the scheduler ---- */

static kvl_output likeliest(void *user, const kvl_step *step, uint32_t i, const float *logits) {
    const job *j = user;
    (void)step;
    (void)i;
    return (kvl_output){.token = sampler_argmax(logits, j->rt.config->n_vocab)};
}

static bool run_request(job *j, kvl_sched *sched, uint32_t n_tokens, uint32_t n_new, kvl_req *req, char *err,
                        size_t n) {
    kvl_request request = {.tokens = j->ids.ids, .n_tokens = n_tokens, .max_new_tokens = n_new};
    kvl_result r = kvl_sched_submit(sched, &request, req);
    if (r != KVL_OK) return llm_fail(err, n, "%s: %s", kvl_result_name(r), kvl_result_text(r));
    while ((r = runtime_step(&j->rt, j->cache, sched, likeliest, j, err, n)) == KVL_OK) {
    }
    return r >= 0;
}

static bool generate(job *j, kvl_sched *sched, char *err, size_t n) {
    kvl_req req;
    kvl_req_info info;
    uint32_t got;
    if (j->n_reuse && !run_request(j, sched, (uint32_t)j->n_reuse, 1, &req, err, n)) return false;
    if (!run_request(j, sched, (uint32_t)j->ids.n, (uint32_t)j->n_new, &req, err, n)) return false;
    if (kvl_sched_info(sched, req, &info) != KVL_OK || (j->n_reuse && !info.reuse.matched))
        return llm_fail(err, n, "--reuse: nothing was reused");
    int32_t *tokens = calloc(j->n_new, sizeof *tokens);
    bool ok =
        tokens && kvl_sched_tokens(sched, req, tokens, (uint32_t)j->n_new, &got) == KVL_OK && got == j->n_new;
    ok = ok ? put(tokens, sizeof *tokens, got, err, n) : llm_fail(err, n, "the continuation is not whole");
    free(tokens);
    return ok;
}

static bool write_greedy(job *j, char *err, size_t n) {
    kvl_sched *sched;
    kvl_result r = kvl_sched_create(j->cache, NULL, &sched);
    if (r != KVL_OK) return cache_failed(j, r, err, n);
    bool ok = generate(j, sched, err, n);
    kvl_sched_destroy(sched);
    return ok;
}

/* ---- */

static bool run(job *j, char *err, size_t n) {
    j->o.runtime.step_tokens = (uint32_t)j->chunk;
    if (!runtime_load(&j->rt, &j->o.runtime, err, n) || !read_ids(j, err, n)) return false;
    if (j->write == WRITE_IDS) return put(j->ids.ids, sizeof *j->ids.ids, j->ids.n, err, n);
    j->o.cache.seq_tokens = (uint32_t)(j->ids.n + j->n_new);
    j->o.cache.n_sequences = 2; /* what --reuse leaves, and the sequence itself */
    if (!runtime_cache(&j->rt, &j->o.cache, &j->cache, err, n)) return false;
    return j->write == WRITE_LOGITS ? write_logits(j, err, n) : write_greedy(j, err, n);
}

int main(int argc, char **argv) {
    static job j;
    char err[LLM_ERR_LEN] = "";
    bool ok = parse(&j, argc, argv, err, sizeof err) && run(&j, err, sizeof err);
    if (ok && fflush(stdout) != 0) ok = llm_fail(err, sizeof err, "stdout: %s", strerror(errno));
    if (!ok) fprintf(stderr, "dump_logits: %s\n", err);
    kvl_cache_destroy(j.cache);
    token_list_free(&j.ids);
    runtime_free(&j.rt);
    return ok ? 0 : 1;
}
