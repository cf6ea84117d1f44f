/* complete: continues a text with a model from a GGUF file. See `complete --help`. */
#include "llm/options.h"
#include "llm/runtime.h"
#include "llm/sampler.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

enum { EXIT_RUNTIME = 1, EXIT_USAGE = 2 };

static const char usage[] =
    "usage: complete -m MODEL.gguf (-p TEXT | -f FILE) [options]\n"
    "\n"
    "Writes the continuation of a text to stdout, and nothing else there; all that is said about it goes to "
    "stderr.\n"
    "The text of control tokens in the prompt, such as <|im_start|>, stands for those tokens.\n"
    "\n"
    "  -p TEXT          the prompt\n"
    "  -f FILE          file with the prompt; - is stdin\n"
    "  -n N             at most so many new tokens (default 128); 0 only reads the prompt\n"
    "  --json           one object: tokens, text, prompt_tokens, prefill_s, decode_s, backend, kv_bytes, "
    "finish\n"
    "%s"
    "  -h, --help       this text\n"
    "\n"
    "KV memory is by default what the prompt and N tokens take. Exit codes: 0 done, 1 failed, 2 wrong "
    "usage.\n";

typedef struct bytes {
    char *data;
    size_t n, cap;
} bytes;

static bool bytes_room(bytes *b, size_t more) {
    if (more <= b->cap - b->n) return true;
    if (more > SIZE_MAX / 4 - b->n) return false;
    size_t cap = (b->n + more) * 2;
    char *p = realloc(b->data, cap);
    if (!p) return false;
    b->data = p;
    b->cap = cap;
    return true;
}

typedef struct program {
    options o;
    const char *text, *file; /* one of them */
    uint32_t n_new;
    bool json, help;
    runtime rt;
    bytes prompt;
    token_list tokens; /* of the prompt */
    sampler sampler;
    kvl_cache *cache;
    kvl_sched *sched;
    /* what came out */
    token_list generated;
    bytes out; /* text: all of it with --json, else of the latest token */
    utf8_stream utf8;
    bool no_memory;
    double first_token; /* time of it; 0 before */
    kvl_finish finish;
    double prefill_s, decode_s;
    kvl_stats stats;
} program;

/* ---- the command line and the prompt ---- */

static bool parse(program *p, int argc, char **argv, char *err, size_t n) {
    args a = {.argc = argc, .argv = argv, .i = 1};
    p->n_new = 128;
    while (args_next(&a, err, n)) {
        bool taken = false;
        uint64_t v;
        if (!options_take(&p->o, &a, &taken, err, n)) return false;
        if (taken) continue;
        if (args_is(&a, "-p") || args_is(&a, "--prompt")) {
            if (!args_value(&a, &p->text, err, n)) return false;
        } else if (args_is(&a, "-f") || args_is(&a, "--file")) {
            if (!args_value(&a, &p->file, err, n)) return false;
        } else if (args_is(&a, "-n")) {
            if (!args_u64(&a, 0, UINT32_MAX - 1, &v, err, n)) return false;
            p->n_new = (uint32_t)v;
        } else if (args_is(&a, "--json")) {
            if (!args_flag(&a, err, n)) return false;
            p->json = true;
        } else if (args_is(&a, "-h") || args_is(&a, "--help")) {
            p->help = true;
            return true;
        } else {
            return llm_fail(err, n, "option '%s' is unknown", a.name);
        }
    }
    if (err[0] || !options_check(&p->o, err, n)) return false;
    if (!p->text == !p->file) return llm_fail(err, n, "one of -p TEXT and -f FILE is needed");
    return !p->text || p->text[0] || llm_fail(err, n, "-p '': the prompt is empty");
}

static bool read_all(program *p, FILE *f, char *err, size_t n) {
    bytes *b = &p->prompt;
    while (!feof(f) && !ferror(f)) {
        if (!bytes_room(b, 1 << 16)) return llm_fail(err, n, "-f %.100s: no memory", p->file);
        b->n += fread(b->data + b->n, 1, 1 << 16, f);
    }
    if (ferror(f)) return llm_fail(err, n, "-f %.100s: %s", p->file, strerror(errno));
    return b->n > 0 || llm_fail(err, n, "-f %.100s: the prompt is empty", p->file);
}

static bool read_prompt(program *p, char *err, size_t n) {
    if (p->text) {
        size_t len = strlen(p->text);
        if (!bytes_room(&p->prompt, len)) return llm_fail(err, n, "no memory for the prompt");
        memcpy(p->prompt.data, p->text, len);
        p->prompt.n = len;
        return true;
    }
    if (strcmp(p->file, "-") == 0) return read_all(p, stdin, err, n);
    FILE *f = fopen(p->file, "rb");
    if (!f) return llm_fail(err, n, "-f %.100s: %s", p->file, strerror(errno));
    bool ok = read_all(p, f, err, n);
    fclose(f);
    return ok;
}

static bool encode_prompt(program *p, char *err, size_t n) {
    uint32_t n_ctx = p->rt.config->n_ctx;
    if (!tokenizer_encode(p->rt.tok, p->prompt.data, p->prompt.n, TOKENIZE_SPECIAL | TOKENIZE_BOS, &p->tokens,
                          err, n))
        return false;
    if (p->tokens.dropped_bytes)
        fprintf(stderr, "complete: %zu bytes of the prompt have no token and were left out\n",
                p->tokens.dropped_bytes);
    if (!p->tokens.n) return llm_fail(err, n, "the prompt has no tokens");
    if (p->tokens.n > n_ctx)
        return llm_fail(err, n, "the prompt has %zu tokens, the model's context only %u", p->tokens.n, n_ctx);
    uint32_t room = n_ctx - (uint32_t)p->tokens.n + 1; /* the last token needs no KV */
    if (p->n_new > room) {
        fprintf(stderr, "complete: -n %u: lowered to the %u that the model's context of %u leaves\n",
                p->n_new, room, n_ctx);
        p->n_new = room;
    }
    return true;
}

/* ---- running ---- */

static bool open_cache(program *p, char *err, size_t n) {
    uint32_t n_new = p->n_new ? p->n_new : 1;
    p->o.cache.seq_tokens = (uint32_t)p->tokens.n + n_new - 1;
    if (!runtime_cache(&p->rt, &p->o.cache, &p->cache, err, n)) return false;
    kvl_result r = kvl_sched_create(p->cache, NULL, &p->sched);
    if (r != KVL_OK) return llm_fail(err, n, "%s: %s", kvl_result_name(r), kvl_last_error(p->cache));
    kvl_request request = {
        .tokens = p->tokens.ids, .n_tokens = (uint32_t)p->tokens.n, .max_new_tokens = n_new};
    kvl_req handle;
    r = kvl_sched_submit(p->sched, &request, &handle);
    if (r != KVL_OK) return llm_fail(err, n, "%s: %s", kvl_result_name(r), kvl_result_text(r));
    kvl_sched_close(p->sched);
    char backend[LLM_ERR_LEN * 2];
    runtime_backend_line(&p->rt, backend, sizeof backend);
    fprintf(stderr, "complete: %s\n", backend);
    return true;
}

static bool emit(program *p, int32_t token) {
    size_t len = 0;
    const char *piece = tokenizer_is_control(p->rt.tok, token) ? "" : tokenizer_piece(p->rt.tok, token, &len);
    if (!token_list_push(&p->generated, token) || !bytes_room(&p->out, UTF8_STREAM_ROOM(len))) return false;
    p->out.n += utf8_stream_push(&p->utf8, piece, len, p->out.data + p->out.n);
    if (!p->json) {
        fwrite(p->out.data, 1, p->out.n, stdout);
        fflush(stdout);
        p->out.n = 0;
    }
    return true;
}

static kvl_output on_logits(void *user, const kvl_step *step, uint32_t i, const float *logits) {
    program *p = user;
    (void)step;
    (void)i;
    kvl_output o = {.token = -1, .no_token = true, .finish = true};
    if (!p->first_token) p->first_token = runtime_now();
    if (!p->n_new) return o;
    o.token = sampler_sample(&p->sampler, logits, p->rt.config->n_vocab);
    if (o.token < 0) {
        p->finish = KVL_FINISH_NONE;
        return o;
    }
    if (tokenizer_is_end(p->rt.tok, o.token)) {
        p->finish = KVL_FINISH_STOP;
        return o;
    }
    o.no_token = false;
    o.finish = p->no_memory = !emit(p, o.token);
    return o;
}

static bool run(program *p, char *err, size_t n) {
    double start = runtime_now();
    kvl_result r;
    p->finish = KVL_FINISH_LENGTH;
    while ((r = runtime_step(&p->rt, p->cache, p->sched, on_logits, p, err, n)) == KVL_OK) {
    }
    double end = runtime_now();
    if (r < 0) return false;
    if (p->no_memory) return llm_fail(err, n, "no memory for the continuation");
    if (r != KVL_DRAINED) return llm_fail(err, n, "the KV budget does not hold the sequence");
    if (p->finish == KVL_FINISH_NONE)
        return llm_fail(err, n, "the model gave no finite logits: is the file damaged?");
    p->prefill_s = p->first_token - start;
    p->decode_s = end - p->first_token;
    kvl_get_stats(p->cache, &p->stats);
    return true;
}

/* ---- output ---- */

/* s is valid UTF-8: utf8_stream made it so. */
static void json_string(const char *s, size_t n) {
    putchar('"');
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)s[i];
        if (c == '"' || c == '\\')
            printf("\\%c", c);
        else if (c == '\n')
            fputs("\\n", stdout);
        else if (c < 0x20 || c == 0x7f)
            printf("\\u%04x", c);
        else
            putchar(c);
    }
    putchar('"');
}

static bool finish_output(program *p, char *err, size_t n) {
    if (!bytes_room(&p->out, UTF8_STREAM_ROOM(0))) return llm_fail(err, n, "no memory for the continuation");
    p->out.n += utf8_stream_flush(&p->utf8, p->out.data + p->out.n);
    if (p->json) {
        printf("{\"tokens\":[");
        for (size_t i = 0; i < p->generated.n; i++) printf("%s%" PRId32, i ? "," : "", p->generated.ids[i]);
        printf("],\"text\":");
        json_string(p->out.data, p->out.n);
        printf(",\"prompt_tokens\":%zu,\"prefill_s\":%.6f,\"decode_s\":%.6f,\"backend\":\"%s\",\"kv_bytes\":"
               "%" PRIu64 ",\"finish\":\"%s\"}\n",
               p->tokens.n, p->prefill_s, p->decode_s, kvl_context_backend(p->rt.context),
               p->stats.bytes_used + p->stats.bytes_cached, p->finish == KVL_FINISH_STOP ? "stop" : "length");
    } else {
        fwrite(p->out.data, 1, p->out.n, stdout);
    }
    return (fflush(stdout) == 0 && !ferror(stdout)) || llm_fail(err, n, "stdout: %s", strerror(errno));
}

static void report(const program *p) {
    size_t after_first = p->generated.n > 1 ? p->generated.n - 1 : 0;
    fprintf(stderr, "%scomplete: %zu prompt tokens in %.3f s (%.0f tok/s)",
            p->json || !p->generated.n ? "" : "\n", p->tokens.n, p->prefill_s,
            (double)p->tokens.n / p->prefill_s);
    if (after_first)
        fprintf(stderr, ", %zu new, %.1f tok/s", p->generated.n, (double)after_first / p->decode_s);
    fprintf(stderr, ", %.2f MiB of KV, %s, %u threads\n",
            (double)(p->stats.bytes_used + p->stats.bytes_cached) / (1 << 20),
            kvl_context_backend(p->rt.context), pool_threads(p->rt.threads));
}

static void release(program *p) {
    kvl_sched_destroy(p->sched);
    kvl_cache_destroy(p->cache);
    sampler_free(&p->sampler);
    token_list_free(&p->tokens);
    token_list_free(&p->generated);
    free(p->prompt.data);
    free(p->out.data);
    runtime_free(&p->rt);
}

int main(int argc, char **argv) {
    static program p;
    char err[LLM_ERR_LEN] = "";
    if (!parse(&p, argc, argv, err, sizeof err)) {
        fprintf(stderr, "complete: %s (complete --help tells more)\n", err);
        return EXIT_USAGE;
    }
    if (p.help) {
        printf(usage, options_help);
        return 0;
    }
    bool ok = read_prompt(&p, err, sizeof err) && runtime_load(&p.rt, &p.o.runtime, err, sizeof err) &&
              encode_prompt(&p, err, sizeof err) &&
              sampler_init(&p.sampler, &p.o.sampling, err, sizeof err) && open_cache(&p, err, sizeof err) &&
              run(&p, err, sizeof err) && finish_output(&p, err, sizeof err);
    if (ok)
        report(&p);
    else
        fprintf(stderr, "complete: %s\n", err);
    release(&p);
    return ok ? 0 : EXIT_RUNTIME;
}
