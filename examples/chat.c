/* chat: a conversation in the terminal that computes only what is new in it. See `chat --help`.
 *
 * A conversation is a list of tokens that only grows: messages as encoded, answers as generated. Each turn
 * submits all of it, and kvlite finds in its prefix tree what earlier turns, of any branch, have left there.
 */
#include "llm/options.h"
#include "llm/runtime.h"
#include "llm/sampler.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { EXIT_RUNTIME = 1, EXIT_USAGE = 2, LEAST_TOKENS = 256, STEP_TOKENS = 128, MAX_BRANCHES = 64 };

static const char usage[] = "usage: chat -m MODEL.gguf [options]\n"
                            "\n"
                            "A conversation: one line is one message, a line that ends in \\ goes on. "
                            "Answers go to stdout, the rest to stderr.\n"
                            "\n"
                            "  -n N             at most so many tokens in an answer (default 512)\n"
                            "  --system TEXT    system message (default: the model's own)\n"
                            "%s"
                            "  -h, --help       this text\n"
                            "\n"
                            "Defaults here: --temp 0.7 --top-p 0.9, and KV memory for two conversations of "
                            "the model's full context.\n"
                            "Exit codes: 0 left, 1 failed, 2 wrong usage.\n";

static const char commands[] = "/stats        what the KV cache holds and how often it helped\n"
                               "/fork         branch here: goes on in a copy, the original stays\n"
                               "/switch N     go to branch N\n"
                               "/undo         drop the last exchange\n"
                               "/system TEXT  replace the system message; without TEXT: the model's own\n"
                               "/help, /quit  Ctrl-C stops an answer, Ctrl-D leaves\n";

typedef struct branch {
    token_list tokens;
    size_t n_system;   /* tokens of the system message */
    size_t *exchanges; /* [n_exchanges] where each begins in tokens */
    size_t n_exchanges, cap_exchanges;
} branch;

typedef struct program {
    options o;
    const char *system_text;
    uint32_t n_answer;
    bool help;
    runtime rt;
    chat_template form;
    sampler sampler;
    kvl_cache *cache;
    kvl_sched *sched;
    uint32_t limit; /* tokens of one conversation: the model's context, or what the KV budget holds */
    branch branches[MAX_BRANCHES];
    uint32_t n_branches, current;
    bool tty_in, tty_err;
    /* the answer in progress */
    token_list answer;
    utf8_stream utf8;
    char *text; /* of one token */
    size_t text_cap;
    const char *failed; /* why the answer ended early, or NULL */
} program;

/* ---- the terminal ---- */

static volatile sig_atomic_t interrupted;

static void on_interrupt(int signal) {
    (void)signal;
    interrupted = 1;
}

/* No SA_RESTART: Ctrl-C at the prompt gives a new one. */
static bool catch_interrupts(char *err, size_t n) {
    struct sigaction a = {.sa_handler = on_interrupt};
    sigemptyset(&a.sa_mask);
    return sigaction(SIGINT, &a, NULL) == 0 || llm_fail(err, n, "sigaction: %s", strerror(errno));
}

/* A remark about the conversation: dim, on stderr. */
__attribute__((format(printf, 2, 3))) static void note(const program *p, const char *fmt, ...) {
    va_list ap;
    fflush(stdout);
    if (p->tty_err) fputs("\033[2m", stderr);
    va_start(ap, fmt);
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    fputs(p->tty_err ? "\033[0m\n" : "\n", stderr);
}

/* What a model writes is text: control characters that a terminal would act on are left out. s is valid
 * UTF-8. */
static void print_text(const char *s, size_t n) {
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)s[i], next = i + 1 < n ? (unsigned char)s[i + 1] : 0;
        if (c == 0xc2 && next < 0xa0)
            i++; /* U+0080..U+009F */
        else if (c >= 0x20 ? c != 0x7f : c == '\n' || c == '\t')
            putchar(c);
    }
    fflush(stdout);
}

/* ---- branches ---- */

static branch *current(program *p) { return &p->branches[p->current]; }

static void branch_free(branch *b) {
    token_list_free(&b->tokens);
    free(b->exchanges);
    *b = (branch){0};
}

static bool append(token_list *to, const int32_t *ids, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (!token_list_push(to, ids[i])) return false;
    return true;
}

static bool push_exchange(branch *b, size_t at) {
    if (b->n_exchanges == b->cap_exchanges) {
        size_t cap = b->cap_exchanges * 2 + 8;
        size_t *grown = realloc(b->exchanges, cap * sizeof *grown);
        if (!grown) return false;
        b->exchanges = grown;
        b->cap_exchanges = cap;
    }
    b->exchanges[b->n_exchanges++] = at;
    return true;
}

static bool branch_copy(const branch *from, branch *to) {
    *to = (branch){.n_system = from->n_system};
    bool ok = append(&to->tokens, from->tokens.ids, from->tokens.n);
    for (size_t i = 0; ok && i < from->n_exchanges; i++) ok = push_exchange(to, from->exchanges[i]);
    if (!ok) branch_free(to);
    return ok;
}

/* Puts another system message (NULL: the model's own) before what was said. */
static bool set_system(program *p, branch *b, const char *text, char *err, size_t n) {
    token_list fresh = {0};
    chat_message m = {"system", text, text ? strlen(text) : 0};
    bool ok = text ? chat_append_message(&p->form, &m, &fresh, err, n)
                   : chat_append_default_system(&p->form, &fresh, err, n);
    size_t n_system = fresh.n;
    if (ok && fresh.n + (b->tokens.n - b->n_system) > p->limit)
        ok = llm_fail(err, n,
                      "the system message has %zu tokens: with what was said that is more than the %u tokens "
                      "of a conversation",
                      n_system, p->limit);
    if (ok && !append(&fresh, b->tokens.ids + b->n_system, b->tokens.n - b->n_system))
        ok = llm_fail(err, n, "no memory");
    if (!ok) {
        token_list_free(&fresh);
        return false;
    }
    for (size_t i = 0; i < b->n_exchanges; i++) b->exchanges[i] += n_system - b->n_system;
    token_list_free(&b->tokens);
    b->tokens = fresh;
    b->n_system = n_system;
    return true;
}

/* ---- an answer ---- */

static bool emit(program *p, int32_t token) {
    size_t len = 0;
    if (!token_list_push(&p->answer, token)) return false;
    if (tokenizer_is_control(p->rt.tok, token)) return true;
    const char *piece = tokenizer_piece(p->rt.tok, token, &len);
    size_t room = UTF8_STREAM_ROOM(len);
    if (room > p->text_cap) {
        char *grown = realloc(p->text, room);
        if (!grown) return false;
        p->text = grown;
        p->text_cap = room;
    }
    print_text(p->text, utf8_stream_push(&p->utf8, piece, len, p->text));
    return true;
}

static kvl_output on_logits(void *user, const kvl_step *step, uint32_t i, const float *logits) {
    program *p = user;
    (void)step;
    (void)i;
    kvl_output o = {.token = sampler_sample(&p->sampler, logits, p->rt.config->n_vocab)};
    if (o.token < 0) {
        p->failed = "the model gave no finite logits";
        o.no_token = o.finish = true;
    } else if (!emit(p, o.token)) {
        p->failed = "no memory";
        o.finish = true;
    } else {
        o.finish = tokenizer_is_end(p->rt.tok, o.token);
    }
    return o;
}

/* Runs a request to its end, Ctrl-C or an error; *info is how it ended. */
static bool run_request(program *p, const kvl_request *request, kvl_req_info *info, char *err, size_t n) {
    kvl_req req;
    kvl_result r = kvl_sched_submit(p->sched, request, &req);
    if (r != KVL_OK) return llm_fail(err, n, "%s: %s", kvl_result_name(r), kvl_result_text(r));
    bool ok = true;
    do {
        if (interrupted || !ok) kvl_sched_cancel(p->sched, req);
        r = runtime_step(&p->rt, p->cache, p->sched, on_logits, p, err, n);
        if (r < 0 && !ok) return false; /* not even the cancelling worked */
        if (r < 0) ok = false;
        if (kvl_sched_info(p->sched, req, info) != KVL_OK)
            return llm_fail(err, n, "%s", kvl_sched_last_error(p->sched));
        if (r == KVL_IDLE && info->state != KVL_REQ_FINISHED)
            ok = llm_fail(err, n, "the KV budget is exhausted");
    } while (info->state != KVL_REQ_FINISHED);
    return ok;
}

static void report(const program *p, const kvl_req_info *info) {
    const kvl_reuse *u = &info->reuse;
    char at[32] = "", speed[48] = "";
    if (u->reason == KVL_MATCH_TOKEN) snprintf(at, sizeof at, " at %u", u->first_differing);
    double s = (double)(info->last_token_ns - info->first_token_ns) * 1e-9;
    if (info->n_generated > 1 && s > 0)
        snprintf(speed, sizeof speed, ", %.0f tok/s", (double)(info->n_generated - 1) / s);
    note(p, "reused %u of %u tokens (%s%s), %u new%s", u->matched, info->n_prompt,
         kvl_match_reason_text(u->reason), at, info->n_generated, speed);
    if (p->failed) note(p, "the answer ended early: %s", p->failed);
    if (info->finish == KVL_FINISH_CANCELLED) note(p, "stopped");
    if (info->finish == KVL_FINISH_LENGTH && info->n_prompt + info->n_generated > p->limit)
        note(p, "the conversation is full: %u tokens. /undo drops the last exchange", p->limit);
    else if (info->finish == KVL_FINISH_LENGTH)
        note(p, "cut at -n %u tokens", p->n_answer);
}

/* The generated tokens join the conversation as they are, so that the next turn's match goes through them. */
static bool keep_answer(program *p, branch *b, char *err, size_t n) {
    size_t keep = p->answer.n;
    if (keep && tokenizer_is_end(p->rt.tok, p->answer.ids[keep - 1]) &&
        p->answer.ids[keep - 1] != p->form.im_end)
        keep--;
    if (!append(&b->tokens, p->answer.ids, keep)) return llm_fail(err, n, "no memory for the conversation");
    return chat_close_answer(&p->form, &b->tokens, err, n);
}

static bool answer(program *p, branch *b, char *err, size_t n) {
    if (b->tokens.n > p->limit)
        return llm_fail(
            err, n,
            "with this message the conversation has %zu tokens, and %u is the most: /undo drops the "
            "last exchange",
            b->tokens.n, p->limit);
    uint32_t room = p->limit - (uint32_t)b->tokens.n + 1; /* the last token needs no KV */
    kvl_request request = {.tokens = b->tokens.ids,
                           .n_tokens = (uint32_t)b->tokens.n,
                           .max_new_tokens = p->n_answer < room ? p->n_answer : room};
    kvl_req_info info = {0};
    p->answer.n = 0;
    p->utf8 = (utf8_stream){0};
    p->failed = NULL;
    interrupted = 0;
    bool ok = run_request(p, &request, &info, err, n);
    char rest[UTF8_STREAM_ROOM(0)] = "";
    print_text(rest, utf8_stream_flush(&p->utf8, rest));
    if (p->answer.n) putchar('\n');
    if (!ok) return false;
    if (!p->answer.n)
        return llm_fail(err, n, "no answer%s%s", p->failed ? ": " : "", p->failed ? p->failed : "");
    report(p, &info);
    return keep_answer(p, b, err, n);
}

/* One exchange. Where it fails the conversation is as it was before it. */
static void turn(program *p, const char *line, size_t len) {
    char err[LLM_ERR_LEN] = "";
    branch *b = current(p);
    size_t before = b->tokens.n;
    chat_message m = {"user", line, len};
    if (!push_exchange(b, before)) {
        note(p, "chat: no memory");
        return;
    }
    if (chat_append_message(&p->form, &m, &b->tokens, err, sizeof err) &&
        chat_open_answer(&p->form, &b->tokens, err, sizeof err) && answer(p, b, err, sizeof err))
        return;
    b->tokens.n = before;
    b->n_exchanges--;
    note(p, "%s (the message was dropped)", err);
}

/* ---- commands ---- */

static void show_percentiles(const program *p, const char *what, const kvl_percentiles *v) {
    if (v->count) note(p, "%s %.1f ms median, %.1f ms 95%%, %.1f ms longest", what, v->p50, v->p95, v->max);
}

static void show_stats(const program *p) {
    static const char *const classes[2] = {"packed", "exact "};
    kvl_stats s;
    kvl_get_stats(p->cache, &s);
    for (int i = 0; i < 2; i++)
        note(p, "%s blocks   %u in use, %u cached, %u pinned, %u free", classes[i], s.blocks_used[i],
             s.blocks_cached[i], s.blocks_pinned[i], s.blocks_free[i]);
    note(p, "KV memory       %.2f MiB of blocks, %.1f MiB budget (%.1f MiB of it scratch)",
         (double)(s.bytes_used + s.bytes_cached) / (1 << 20), (double)s.device_budget / (1 << 20),
         (double)(s.bytes_scratch + s.bytes_workspace) / (1 << 20));
    note(p, "reuse           %" PRIu64 " of %" PRIu64 " tokens (%.0f%%), %" PRIu64 " blocks evicted",
         s.hit_tokens, s.open_tokens,
         s.open_tokens ? 100.0 * (double)s.hit_tokens / (double)s.open_tokens : 0.0, s.evicted_blocks);
    note(p, "computed        %" PRIu64 " tokens read, %" PRIu64 " steps of one token", s.prefill_tokens,
         s.decode_tokens);
    show_percentiles(p, "between tokens ", &s.gap_ms);
    show_percentiles(p, "first token    ", &s.ttft_ms);
    for (uint32_t i = 0; i < p->n_branches; i++)
        note(p, "branch %-8u exchanges %zu, tokens %zu%s", i + 1, p->branches[i].n_exchanges,
             p->branches[i].tokens.n, i == p->current ? ", here" : "");
}

static void fork_branch(program *p) {
    if (p->n_branches == MAX_BRANCHES) {
        note(p, "there are %d branches already", MAX_BRANCHES);
    } else if (!branch_copy(current(p), &p->branches[p->n_branches])) {
        note(p, "no memory for another branch");
    } else {
        uint32_t from = p->current;
        p->current = p->n_branches++;
        note(p, "now in branch %u, a copy of branch %u: /switch %u goes back", p->current + 1, from + 1,
             from + 1);
    }
}

static void switch_branch(program *p, const char *text) {
    char *end;
    unsigned long n = strtoul(text, &end, 10);
    if (!isdigit((unsigned char)text[0]) || *end || n < 1 || n > p->n_branches) {
        note(p, "/switch '%.20s': there are branches 1 to %u", text, p->n_branches);
        return;
    }
    p->current = (uint32_t)n - 1;
    note(p, "now in branch %lu; exchanges: %zu, tokens: %zu", n, current(p)->n_exchanges,
         current(p)->tokens.n);
}

static void undo(program *p) {
    branch *b = current(p);
    if (!b->n_exchanges) {
        note(p, "there is no exchange to drop");
        return;
    }
    b->tokens.n = b->exchanges[--b->n_exchanges];
    note(p, "dropped; exchanges left: %zu, tokens: %zu", b->n_exchanges, b->tokens.n);
}

static void change_system(program *p, const char *text) {
    char err[LLM_ERR_LEN] = "";
    if (set_system(p, current(p), text[0] ? text : NULL, err, sizeof err))
        note(p, "system message: %s", text[0] ? text : "the model's own");
    else
        note(p, "%s", err);
}

/* `/name text`: the text, or NULL where it is another command. */
static const char *command(const char *line, const char *name) {
    size_t n = strlen(name);
    if (strncmp(line, name, n) != 0 || (line[n] && !isspace((unsigned char)line[n]))) return NULL;
    line += n;
    while (isspace((unsigned char)*line)) line++;
    return line;
}

static bool run_command(program *p, const char *line) { /* false: leave */
    const char *text;
    if (command(line, "/quit") || command(line, "/exit")) return false;
    if (command(line, "/help"))
        note(p, "%s%u of %u tokens used", commands, (uint32_t)current(p)->tokens.n, p->limit);
    else if (command(line, "/stats"))
        show_stats(p);
    else if (command(line, "/fork"))
        fork_branch(p);
    else if ((text = command(line, "/switch")) != NULL)
        switch_branch(p, text);
    else if (command(line, "/undo"))
        undo(p);
    else if ((text = command(line, "/system")) != NULL)
        change_system(p, text);
    else
        note(p, "'%.40s' is no command: /help lists them", line);
    return true;
}

/* ---- input ---- */

static void show_prompt(const program *p, bool goes_on) {
    if (!p->tty_in) return;
    if (p->tty_err) fputs("\033[1m", stderr);
    if (p->n_branches > 1 && !goes_on) fprintf(stderr, "[%u]", p->current + 1);
    fputs(goes_on ? ". " : "> ", stderr);
    if (p->tty_err) fputs("\033[0m", stderr);
}

typedef struct message {
    char *line, *text; /* one line; all of it */
    size_t line_cap, text_len;
} message;

/* Reads a message, without its last line break. False at the end of the input, or after Ctrl-C with *stopped.
 */
static bool read_message(program *p, message *m, bool *stopped, char *err, size_t n) {
    m->text_len = 0;
    *stopped = false;
    for (bool goes_on = false;; goes_on = true) {
        show_prompt(p, goes_on);
        interrupted = 0;
        errno = 0;
        ssize_t got = getline(&m->line, &m->line_cap, stdin);
        if (got < 0) {
            *stopped = errno == EINTR;
            if (!*stopped && ferror(stdin)) return llm_fail(err, n, "stdin: %s", strerror(errno));
            clearerr(stdin);
            if (!*stopped && m->text_len) return true; /* the last line ended in \ and nothing followed */
            return false;
        }
        size_t len = (size_t)got;
        while (len && (m->line[len - 1] == '\n' || m->line[len - 1] == '\r')) len--;
        bool more = len && m->line[len - 1] == '\\';
        char *grown = realloc(m->text, m->text_len + len + 2);
        if (!grown) return llm_fail(err, n, "no memory for a message of %zu bytes", m->text_len + len);
        m->text = grown;
        memcpy(m->text + m->text_len, m->line, len);
        m->text_len += len;
        if (more) m->text[m->text_len - 1] = '\n';
        m->text[m->text_len] = 0;
        if (!more) return true;
    }
}

static bool is_blank(const char *s) {
    while (isspace((unsigned char)*s)) s++;
    return !*s;
}

static bool converse(program *p, char *err, size_t n) {
    message m = {0};
    bool stopped, go_on = true;
    err[0] = 0;
    while (go_on) {
        if (read_message(p, &m, &stopped, err, n)) {
            if (m.text[0] == '/')
                go_on = run_command(p, m.text);
            else if (!is_blank(m.text))
                turn(p, m.text, m.text_len);
        } else if (stopped) {
            note(p, "\nCtrl-D or /quit leaves");
        } else {
            if (p->tty_in) fputc('\n', stderr);
            go_on = false;
        }
    }
    free(m.line);
    free(m.text);
    if (!err[0] && (fflush(stdout) || ferror(stdout))) llm_fail(err, n, "stdout: %s", strerror(errno));
    return !err[0];
}

/* ---- the program ---- */

static bool parse(program *p, int argc, char **argv, char *err, size_t n) {
    args a = {.argc = argc, .argv = argv, .i = 1};
    p->n_answer = 512;
    p->o.sampling = (sampler_desc){.temperature = 0.7f, .top_p = 0.9f};
    while (args_next(&a, err, n)) {
        bool taken = false;
        uint64_t v;
        if (!options_take(&p->o, &a, &taken, err, n)) return false;
        if (taken) continue;
        if (args_is(&a, "-n")) {
            if (!args_u64(&a, 1, UINT32_MAX - 1, &v, err, n)) return false;
            p->n_answer = (uint32_t)v;
        } else if (args_is(&a, "--system")) {
            if (!args_value(&a, &p->system_text, err, n)) return false;
        } else if (args_is(&a, "-h") || args_is(&a, "--help")) {
            p->help = true;
            return true;
        } else {
            return llm_fail(err, n, "option '%s' is unknown", a.name);
        }
    }
    return !err[0] && options_check(&p->o, err, n);
}

static bool open_all(program *p, char *err, size_t n) {
    kvl_fit fit;
    p->o.runtime.step_tokens = STEP_TOKENS; /* Ctrl-C is looked at between steps */
    p->o.cache.n_sequences = 2;
    p->o.cache.least_tokens = LEAST_TOKENS;
    if (!runtime_load(&p->rt, &p->o.runtime, err, n) ||
        !chat_template_load(p->rt.file, p->rt.tok, &p->form, err, n) ||
        !sampler_init(&p->sampler, &p->o.sampling, err, n) ||
        !runtime_cache(&p->rt, &p->o.cache, &p->cache, err, n))
        return false;
    kvl_result r = kvl_sched_create(p->cache, NULL, &p->sched);
    if (r != KVL_OK) return llm_fail(err, n, "%s: %s", kvl_result_name(r), kvl_last_error(p->cache));
    kvl_can_fit(p->cache, 1, 1, &fit);
    p->limit = (uint32_t)fit.max_tokens;
    p->n_branches = 1;
    char backend[LLM_ERR_LEN * 2];
    runtime_backend_line(&p->rt, backend, sizeof backend);
    note(p, "%s", backend);
    return set_system(p, current(p), p->system_text, err, n) && catch_interrupts(err, n);
}

static void greet(const program *p) {
    gguf_str name = {0};
    char shown[80] = "the model";
    kvl_stats s;
    kvl_get_stats(p->cache, &s);
    if (gguf_get_str(p->rt.file, "general.name", &name, NULL, 0)) gguf_printable(name, shown, sizeof shown);
    note(p, "%s: %u tokens of context, %.0f MiB for KV. /help lists the commands", shown, p->limit,
         (double)s.device_budget / (1 << 20));
}

static void release(program *p) {
    kvl_sched_destroy(p->sched);
    kvl_cache_destroy(p->cache);
    for (uint32_t i = 0; i < p->n_branches; i++) branch_free(&p->branches[i]);
    token_list_free(&p->answer);
    free(p->text);
    sampler_free(&p->sampler);
    chat_template_free(&p->form);
    runtime_free(&p->rt);
}

int main(int argc, char **argv) {
    static program p;
    char err[LLM_ERR_LEN] = "";
    if (!parse(&p, argc, argv, err, sizeof err)) {
        fprintf(stderr, "chat: %s (chat --help tells more)\n", err);
        return EXIT_USAGE;
    }
    if (p.help) {
        printf(usage, options_help);
        return 0;
    }
    p.tty_in = isatty(STDIN_FILENO);
    p.tty_err = isatty(STDERR_FILENO);
    bool ok = open_all(&p, err, sizeof err);
    if (ok) {
        if (p.tty_in) greet(&p);
        ok = converse(&p, err, sizeof err);
    }
    if (!ok) fprintf(stderr, "chat: %s\n", err);
    release(&p);
    return ok ? 0 : EXIT_RUNTIME;
}
