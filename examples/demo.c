/* demo: eight conversations with a real model inside a fixed KV budget, and what that costs, measured.
 *
 * Eight people come one after another with questions under one system prompt; each asks three times. One of
 * them pastes a long text in the middle. Then single things are measured on caches of their own. See
 * `demo --help`. */
#include "demo_report.h"
#include "demo_run.h"
#include "demo_script.h"
#include "demo_view.h"

#include <time.h>

enum { EXIT_FAILED = 1, EXIT_USAGE = 2, TEXT_ROOM = 4096, CONTEXT = 4096, AT_TOKENS = 1000, GAP_STREAMS = 4 };

static const char default_model[] = "build/models/SmolLM2-135M-Instruct.Q4_1.gguf";
static const uint64_t default_budget = (uint64_t)64 << 20;

static const char usage[] =
    "usage: demo [options]\n"
    "\n"
    "Holds eight conversations at once inside a fixed KV budget: on a terminal as a live view, else as plain "
    "lines.\n"
    "Then it measures, and ends with a table.\n"
    "\n"
    "%s"
    "  --max-gap-ms N   longest wait between two tokens of a stream to plan for (default 100; 0: no bound)\n"
    "  --quick          shorter answers and a shorter text: some ten seconds\n"
    "  --plain          lines instead of the live view\n"
    "  --json           the figures as one object on stdout, lines on stderr\n"
    "  -h, --help       this text\n"
    "\n"
    "By default: -m build/models/SmolLM2-135M-Instruct.Q4_1.gguf (`make model` fetches it), --kv-bytes 64M, "
    "--kv int8,\n"
    "greedy answers; --seed N alone sets --temp 0.7 --top-p 0.9.\n"
    "\n"
    "The object has: model, backend, threads, kv, seed, quick, seconds;\n"
    "  live: seconds, conversations, turns, prompt_tokens, reused_tokens, generated_tokens, steps, "
    "preemptions,\n"
    "        evicted_blocks, max_gap_ms (asked for), gap_ms and first_token_ms: {p50, p99, max};\n"
    "  chats: for each: name, turns, tokens, prompt_tokens, reused_tokens, answers;\n"
    "  memory: budget_bytes, peak_bytes, context_tokens, reserved_bytes (f16, contiguous, every conversation "
    "at\n"
    "        context_tokens), final_bytes (the same at the tokens each had in the end);\n"
    "  rates: streams, together_tokens_per_s, one_at_a_time_tokens_per_s, same_answers;\n"
    "  gap: streams, prompt_tokens, chunked_ms, whole_ms;  next_token: tokens, cached_ms, recomputed_ms.\n";

typedef struct chat {
    const demo_chat *script;
    unsigned turn, n_turns; /* turn: of the question that is asked or comes next */
    bool asked;
    double due;        /* when it is asked */
    token_list tokens; /* the conversation so far */
    token_list prompts[DEMO_TURNS], answers[DEMO_TURNS];
    uint64_t n_prompt, n_reused;
    char text[TEXT_ROOM]; /* the latest answer as one line of printable UTF-8 */
    size_t text_len, n_shown;
    utf8_stream utf8;
} chat;

typedef struct program {
    options o;
    bool plain, json, help, live_view;
    FILE *log;
    runtime rt;
    chat_template chatml;
    chat chats[DEMO_CHATS];
    char *text;      /* the long one */
    size_t text_len; /* how much of it people paste */
    token_list text_tokens;
    engine e;
    view v;
    double start, drawn;
    struct {
        double t;
        uint64_t written, read;
    } past[16]; /* for the rates on the screen */
    unsigned n_past;
    report r;
} program;

/* ---- the command line ---- */

static bool parse_own(program *p, args *a, char *err, size_t n) {
    static const struct {
        const char *name;
        size_t at;
    } flags[] = {{"--quick", offsetof(program, r.quick)},
                 {"--plain", offsetof(program, plain)},
                 {"--json", offsetof(program, json)},
                 {"--help", offsetof(program, help)},
                 {"-h", offsetof(program, help)}};
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++) {
        if (!args_is(a, flags[i].name)) continue;
        *(bool *)((char *)p + flags[i].at) = true;
        return args_flag(a, err, n);
    }
    if (args_is(a, "--max-gap-ms")) {
        float ms;
        if (!args_float(a, 0, 1e6f, &ms, err, n)) return false;
        p->r.max_gap_ms = ms;
        return true;
    }
    return llm_fail(err, n, "option '%s' is unknown", a->name);
}

static void describe(program *p) { /* for the screen and the report */
    const runtime_cache_desc *c = &p->o.cache;
    const kvl_preset *preset = kvl_preset_find(c->preset ? c->preset : "int8");
    const char *slash = strrchr(p->o.runtime.path, '/');
    report *r = &p->r;
    r->rt = &p->rt;
    r->path = p->o.runtime.path;
    r->model = slash ? slash + 1 : r->path;
    r->seed = p->o.sampling.seed;
    r->budget = c->device_bytes;
    if (c->kv_file)
        snprintf(r->kv, sizeof r->kv, "%s", c->kv_file);
    else if (!c->k_format && !c->v_format)
        snprintf(r->kv, sizeof r->kv, "%s", preset->name);
    else
        snprintf(r->kv, sizeof r->kv, "%s/%s", kvl_format_name(c->k_format ? c->k_format : preset->k),
                 kvl_format_name(c->v_format ? c->v_format : preset->v));
}

static bool parse(program *p, int argc, char **argv, char *err, size_t n) {
    args a = {.argc = argc, .argv = argv, .i = 1};
    p->r.max_gap_ms = 100;
    p->o.runtime.path = default_model;
    p->o.cache.device_bytes = default_budget;
    while (!p->help && args_next(&a, err, n)) {
        bool taken = false;
        if (!options_take(&p->o, &a, &taken, err, n)) return false;
        if (!taken && !parse_own(p, &a, err, n)) return false;
    }
    if (p->help) return true;
    if (err[0] || !options_check(&p->o, err, n)) return false;
    if (!p->o.cache.device_bytes) return llm_fail(err, n, "--kv-bytes 0: conversations need memory");
    if (p->o.sampling.seed && p->o.sampling.temperature == 0) {
        p->o.sampling.temperature = 0.7f;
        p->o.sampling.top_p = 0.9f;
    }
    p->o.runtime.step_tokens = RUN_WHOLE_STEP;
    describe(p);
    return true;
}

static sampler_desc sampling_of(const program *p, unsigned chat_index, unsigned turn) {
    sampler_desc d = p->o.sampling;
    d.seed = d.seed * 64 + chat_index * DEMO_TURNS + turn;
    return d;
}

static unsigned longest_answer(const program *p, const demo_turn *t) {
    return p->r.quick && t->answer > 16 ? 16 : t->answer;
}

/* ---- conversations ---- */

static bool append_question(program *p, chat *c, const demo_turn *t, token_list *out, char *err, size_t n) {
    chat_message system = {"system", demo_system, sizeof demo_system - 1};
    chat_message user = {"user", t->question, strlen(t->question)};
    char *both = NULL;
    if (t->with_text) {
        user.content_len += p->text_len;
        both = malloc(user.content_len);
        if (!both) return llm_fail(err, n, "no memory for a question");
        memcpy(both, p->text, p->text_len);
        memcpy(both + p->text_len, t->question, user.content_len - p->text_len);
        user.content = both;
    }
    bool ok = (t != c->script->turns || chat_append_message(&p->chatml, &system, out, err, n)) &&
              chat_append_message(&p->chatml, &user, out, err, n) &&
              chat_open_answer(&p->chatml, out, err, n);
    free(both);
    return ok;
}

static bool copy_tokens(token_list *to, const token_list *from, char *err, size_t n) {
    for (size_t i = 0; i < from->n; i++)
        if (!token_list_push(to, from->ids[i])) return llm_fail(err, n, "no memory for tokens");
    return true;
}

/* The paragraphs of the long text in one; people paste all of it, or with --quick a part. */
static bool join_text(program *p, char *err, size_t n) {
    enum { PARAGRAPHS = sizeof demo_text / sizeof *demo_text, PASTED = 8 };
    size_t all = 0, at = 0;
    for (unsigned i = 0; i < PARAGRAPHS; i++) all += strlen(demo_text[i]) + 2;
    p->text = malloc(all + 1);
    if (!p->text) return llm_fail(err, n, "no memory for the long text");
    for (unsigned i = 0; i < PARAGRAPHS; i++) {
        at += (size_t)snprintf(p->text + at, all + 1 - at, "%s\n\n", demo_text[i]);
        if (!p->r.quick || i < PASTED) p->text_len = at;
    }
    return tokenizer_encode(p->rt.tok, p->text, all, TOKENIZE_PLAIN, &p->text_tokens, err, n);
}

/* What is said, and how long conversations can become: the budget must hold the longest. */
static bool prepare(program *p, char *err, size_t n) {
    size_t least = 0;
    if (!join_text(p, err, n)) return false;
    for (unsigned i = 0; i < DEMO_CHATS; i++) {
        chat *c = &p->chats[i];
        token_list all = {0};
        size_t answers = 0;
        c->script = &demo_chats[i];
        c->n_turns = p->r.quick ? 2 : DEMO_TURNS;
        c->due = c->script->turns[0].pause_s * (p->r.quick ? 0.1 : 1);
        for (unsigned t = 0; t < c->n_turns; t++) {
            if (!append_question(p, c, &c->script->turns[t], &all, err, n))
                return token_list_free(&all), false;
            answers += longest_answer(p, &c->script->turns[t]) + 4; /* and the marks that close it */
        }
        if (all.n + answers > least) least = all.n + answers;
        token_list_free(&all);
    }
    p->r.context = p->rt.config->n_ctx < CONTEXT ? p->rt.config->n_ctx : CONTEXT;
    if (least > p->r.context)
        return llm_fail(err, n, "the longest conversation has up to %zu tokens, the model's context only %u",
                        least, p->r.context);
    p->o.cache.seq_tokens = p->r.context;
    p->o.cache.least_tokens = (uint32_t)least;
    return true;
}

/* One character onto the line of text; spaces of any kind become one, control characters none. */
static void show_char(chat *c, const char *s, size_t bytes) {
    bool control = (bytes == 1 && ((unsigned char)*s < 0x20 || *s == 0x7f)) ||
                   (bytes == 2 && (unsigned char)s[0] == 0xc2 && (unsigned char)s[1] < 0xa0);
    bool space = *s == ' ' || *s == '\n' || *s == '\t' || *s == '\r';
    if (c->text_len + 5 > TEXT_ROOM) { /* drop the older half */
        size_t from = TEXT_ROOM / 2;
        while (((unsigned char)c->text[from] & 0xc0) == 0x80) from++;
        memmove(c->text, c->text + from, c->text_len - from);
        c->text_len -= from;
    }
    if (space) {
        s = " ";
        bytes = c->text_len && c->text[c->text_len - 1] != ' ';
    } else if (control) {
        return;
    }
    memcpy(c->text + c->text_len, s, bytes);
    c->text[c->text_len += bytes] = 0;
}

static void show_tokens(program *p, chat *c, const token_list *answer) {
    char out[UTF8_STREAM_ROOM(256)];
    for (; c->n_shown < answer->n; c->n_shown++) {
        size_t len;
        int cols;
        const char *piece = tokenizer_piece(p->rt.tok, answer->ids[c->n_shown], &len);
        if (tokenizer_is_control(p->rt.tok, answer->ids[c->n_shown])) continue;
        size_t n = utf8_stream_push(&c->utf8, piece, len < 256 ? len : 256, out);
        out[n] = 0;
        for (size_t i = 0, bytes; i < n; i += bytes) show_char(c, out + i, bytes = view_char(out + i, &cols));
    }
}

/* ---- the live run ---- */

static void say(program *p, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void say(program *p, const char *fmt, ...) {
    va_list args;
    if (p->live_view) return;
    fprintf(p->log, "%6.1f s  ", runtime_now() - p->start);
    va_start(args, fmt);
    vfprintf(p->log, fmt, args);
    va_end(args);
    fputc('\n', p->log);
    fflush(p->log);
}

static bool chat_ask(program *p, unsigned i, char *err, size_t n) {
    chat *c = &p->chats[i];
    const demo_turn *t = &c->script->turns[c->turn];
    if (!append_question(p, c, t, &c->tokens, err, n) ||
        !copy_tokens(&c->prompts[c->turn], &c->tokens, err, n))
        return false;
    kvl_request r = {.tokens = c->tokens.ids,
                     .n_tokens = (uint32_t)c->tokens.n,
                     .max_new_tokens = longest_answer(p, t),
                     .klass = t->with_text ? KVL_BACKGROUND : KVL_INTERACTIVE}; /* short questions go first */
    sampler_desc sampling = sampling_of(p, i, c->turn);
    if (!engine_submit(&p->e, i, &r, &sampling, true, err, n)) return false;
    c->asked = true;
    c->text_len = c->n_shown = 0;
    c->text[0] = 0;
    c->utf8 = (utf8_stream){0};
    say(p, "%-7s asks %u/%u: %s%s", c->script->name, c->turn + 1, c->n_turns,
        t->with_text ? "(a long text) " : "", t->question);
    return true;
}

static bool chat_answered(program *p, unsigned i, char *err, size_t n) {
    chat *c = &p->chats[i];
    stream *s = &p->e.streams[i];
    const kvl_req_info *q = &s->info;
    c->asked = false;
    c->n_prompt += q->n_prompt;
    c->n_reused += q->reuse.matched < q->n_prompt ? q->reuse.matched : q->n_prompt;
    if (!copy_tokens(&c->answers[c->turn], &s->answer, err, n) ||
        !copy_tokens(&c->tokens, &s->answer, err, n) || !chat_close_answer(&p->chatml, &c->tokens, err, n))
        return false;
    say(p, "%-7s has the answer %u/%u: %zu tokens, the first after %.0f ms; reused %u of %u prompt tokens",
        c->script->name, c->turn + 1, c->n_turns, s->answer.n,
        (double)(q->first_token_ns - q->submit_ns) / 1e6, q->reuse.matched, q->n_prompt);
    if (++c->turn < c->n_turns)
        c->due = runtime_now() - p->start + c->script->turns[c->turn].pause_s * (p->r.quick ? 0.1 : 1);
    return true;
}

static uint64_t block_bytes(const program *p, bool exact) {
    kvl_block_layout l;
    return kvl_cache_layout(p->e.cache, 0, exact, &l) == KVL_OK ? l.block_bytes : 0;
}

static void fill_stream(program *p, unsigned i, view_stream *out) {
    chat *c = &p->chats[i];
    const stream *s = &p->e.streams[i];
    bool begun = c->asked || c->turn, read = s->info.state >= KVL_REQ_DECODE;
    unsigned turn = c->asked || !c->turn ? c->turn : c->turn - 1;
    show_tokens(p, c, &s->answer);
    *out =
        (view_stream){.name = c->script->name, .question = c->script->turns[turn].question, .text = c->text};
    out->turn = turn + 1;
    out->n_turns = c->n_turns;
    out->n_prompt = s->info.n_prompt;
    out->n_reused = s->info.reuse.matched;
    out->n_read = s->info.n_computed;
    out->n_written = (unsigned)s->answer.n;
    out->pasted = c->script->turns[turn].with_text;
    if (!begun)
        out->state = VIEW_ABSENT;
    else if (c->asked)
        out->state = read ? VIEW_WRITING : s->info.state == KVL_REQ_PREFILL ? VIEW_READING : VIEW_WAITING;
    else
        out->state = c->turn < c->n_turns ? VIEW_PAUSE : VIEW_DONE;
}

/* Tokens a second over the last moments. */
static void fill_rates(program *p, view_frame *f) {
    enum { PAST = sizeof p->past / sizeof *p->past };
    unsigned at = p->n_past++ % PAST, oldest = p->n_past > PAST ? p->n_past % PAST : 0;
    p->past[at].t = runtime_now();
    p->past[at].written = p->e.n_generated;
    p->past[at].read = p->e.n_read;
    double dt = p->past[at].t - p->past[oldest].t;
    if (dt <= 0) return;
    f->write_rate = (double)(p->past[at].written - p->past[oldest].written) / dt;
    f->read_rate = (double)(p->past[at].read - p->past[oldest].read) / dt;
}

static void draw(program *p) {
    const kvl_stats *s = &p->e.stats;
    char setup[128];
    view_frame f = {.model = p->r.model, .setup = setup};
    if (!p->live_view || runtime_now() - p->drawn < 0.08) return;
    p->drawn = runtime_now();
    f.seconds = p->drawn - p->start;
    snprintf(setup, sizeof setup, "%s, %u thread%s, KV %s", kvl_context_backend(p->rt.context),
             pool_threads(p->rt.threads), pool_threads(p->rt.threads) > 1 ? "s" : "", p->r.kv);
    uint64_t packed = block_bytes(p, false), exact = block_bytes(p, true);
    f.budget = s->device_budget;
    f.bytes[VIEW_SHARED] = s->blocks_shared[0] * packed + s->blocks_shared[1] * exact;
    f.bytes[VIEW_PACKED] = (s->blocks_used[0] - s->blocks_shared[0]) * packed;
    f.bytes[VIEW_EXACT] = (s->blocks_used[1] - s->blocks_shared[1]) * exact;
    f.bytes[VIEW_CACHED] = s->bytes_cached;
    f.bytes[VIEW_SCRATCH] = s->bytes_scratch + s->bytes_workspace;
    fill_rates(p, &f);
    f.gap_ms = s->gap_ms.max;
    f.usual_gap_ms = s->gap_ms.p50;
    f.asked_gap_ms = p->r.max_gap_ms;
    f.n_prompt = s->open_tokens;
    f.n_reused = s->hit_tokens;
    f.n_evicted = s->evicted_blocks;
    f.n_preempted = s->preemptions;
    for (unsigned i = 0; i < DEMO_CHATS; i++) fill_stream(p, i, &f.streams[i]);
    view_draw(&p->v, &f);
}

static void rest(double seconds) {
    if (seconds <= 0) return;
    struct timespec t = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
    nanosleep(&t, NULL);
}

/* Asks what is due; *left: how many conversations go on; *next: when the next question is due. */
static bool ask_due(program *p, unsigned *left, double *next, char *err, size_t n) {
    double now = runtime_now() - p->start;
    *left = 0;
    *next = now + 0.05;
    for (unsigned i = 0; i < DEMO_CHATS; i++) {
        chat *c = &p->chats[i];
        *left += c->asked || c->turn < c->n_turns;
        if (c->asked || c->turn >= c->n_turns) continue;
        if (c->due < *next) *next = c->due;
        if (c->due <= now && !chat_ask(p, i, err, n)) return false;
    }
    return true;
}

static bool converse(program *p, char *err, size_t n) {
    unsigned left;
    double next, idle_since = 0;
    p->start = runtime_now();
    for (;;) {
        bool ran;
        if (!ask_due(p, &left, &next, err, n)) return false;
        if (!left) break;
        if (!engine_step(&p->e, &ran, err, n)) return false;
        for (unsigned i = 0; i < DEMO_CHATS; i++)
            if (p->chats[i].asked && !p->e.streams[i].running && !chat_answered(p, i, err, n)) return false;
        draw(p);
        double now = runtime_now();
        if (ran || !engine_busy(&p->e)) idle_since = now;
        if (now - idle_since > 10)
            return llm_fail(err, n, "the KV budget does not let the conversations go on");
        if (!ran) rest(next - (now - p->start));
    }
    p->r.live_s = runtime_now() - p->start;
    p->drawn = 0;
    draw(p);
    p->r.stats = p->e.stats;
    p->r.n_generated = p->e.n_generated;
    p->r.kv_peak = p->e.kv_peak;
    for (unsigned i = 0; i < DEMO_CHATS; i++) {
        const chat *c = &p->chats[i];
        p->r.chats[i] =
            (report_chat){c->script->name, c->n_turns, c->tokens.n, c->n_prompt, c->n_reused, c->answers};
    }
    return true;
}

static bool live(program *p, char *err, size_t n) {
    engine_desc d = {
        .cache = p->o.cache, .step_tokens = RUN_CHUNKED_STEP, .sched = {.max_gap_ms = p->r.max_gap_ms}};
    if (!engine_open(&p->e, &p->rt, &d, DEMO_CHATS, err, n)) return false;
    char backend[LLM_ERR_LEN * 2];
    runtime_backend_line(&p->rt, backend, sizeof backend);
    fprintf(p->log, "demo: %s\n", backend);
    fflush(p->log);
    if (p->live_view) view_open(&p->v);
    bool ok = converse(p, err, n);
    if (p->live_view) {
        if (ok) rest(p->r.quick ? 0.2 : 1.5);
        view_close(&p->v);
        p->live_view = false;
        if (ok) report_chats(&p->r);
    }
    engine_close(&p->e);
    return ok;
}

/* ---- the measurements after it ---- */

static void progress(program *p, const char *what) {
    if (isatty(fileno(p->log)) && !p->plain) /* one line, written over */
        fprintf(p->log, "\r\x1b[K%s%s", *what ? "measuring: " : "", what);
    else
        fprintf(p->log, *what ? "measuring: %s\n" : "%s\n", what);
    fflush(p->log);
}

static question question_of(const program *p, unsigned i, unsigned turn) {
    const chat *c = &p->chats[i];
    return (question){.tokens = c->prompts[turn].ids,
                      .n_tokens = (uint32_t)c->prompts[turn].n,
                      .max_new = longest_answer(p, &c->script->turns[turn]),
                      .sampling = sampling_of(p, i, turn),
                      .answer = c->answers[turn].ids,
                      .n_answer = c->answers[turn].n};
}

static bool measure(program *p, char *err, size_t n) {
    question first[DEMO_CHATS], intruder = {0};
    engine_desc d = {.cache = p->o.cache, .step_tokens = RUN_CHUNKED_STEP};
    for (unsigned i = 0; i < DEMO_CHATS; i++) {
        first[i] = question_of(p, i, 0);
        for (unsigned t = 0; t < p->chats[i].n_turns; t++)
            if (p->chats[i].script->turns[t].with_text) intruder = question_of(p, i, t);
    }
    progress(p, "the first questions all at once, then one after another");
    if (!measure_rates(&p->rt, &d, first, DEMO_CHATS, &p->r.f, err, n)) return false;

    progress(p, "a long prompt among streams, in chunks and in one piece");
    engine_desc chunked = d;
    chunked.cache.device_bytes = 0; /* what all of it takes */
    chunked.cache.n_sequences = GAP_STREAMS + 1;
    chunked.cache.seq_tokens = p->o.cache.least_tokens;
    engine_desc whole = chunked;
    chunked.sched = (kvl_sched_desc){.max_gap_ms = p->r.max_gap_ms, .cost = p->r.stats.cost};
    whole.step_tokens = RUN_WHOLE_STEP;
    p->r.f.gap_streams = GAP_STREAMS;
    p->r.f.gap_prompt = intruder.n_tokens;
    if (!measure_gap(&p->rt, &chunked, first, GAP_STREAMS, &intruder, &p->r.f.chunked_gap_ms, err, n) ||
        !measure_gap(&p->rt, &whole, first, GAP_STREAMS, &intruder, &p->r.f.whole_gap_ms, err, n))
        return false;

    progress(p, "the next token of a long text, with the cache and by recomputation");
    question next = {.tokens = p->text_tokens.ids, .n_tokens = AT_TOKENS};
    if (p->text_tokens.n < AT_TOKENS) next.n_tokens = (uint32_t)p->text_tokens.n;
    bool ok = measure_token(&p->rt, &d, &next, p->r.quick ? 1 : 3, &p->r.f, err, n);
    progress(p, "");
    return ok;
}

/* ---- the program ---- */

static bool load(program *p, char *err, size_t n) {
    fprintf(p->log, "demo: loading %s\n", p->o.runtime.path);
    fflush(p->log);
    if (!runtime_load(&p->rt, &p->o.runtime, err, n)) {
        size_t used = strlen(err);
        snprintf(err + used, n - used, "\n`make model` fetches the model that this demo is made for");
        return false;
    }
    if (!chat_template_load(p->rt.file, p->rt.tok, &p->chatml, err, n) || !prepare(p, err, n)) return false;
    fprintf(p->log, "demo: loaded in %.1f s; %d conversations of up to %u tokens in %.0f MiB of KV\n",
            p->rt.load_s, DEMO_CHATS, p->r.context, VIEW_MIB(p->o.cache.device_bytes));
    fflush(p->log);
    return true;
}

static void release(program *p) {
    for (unsigned i = 0; i < DEMO_CHATS; i++) {
        token_list_free(&p->chats[i].tokens);
        for (unsigned t = 0; t < DEMO_TURNS; t++) {
            token_list_free(&p->chats[i].prompts[t]);
            token_list_free(&p->chats[i].answers[t]);
        }
    }
    token_list_free(&p->text_tokens);
    free(p->text);
    chat_template_free(&p->chatml);
    runtime_free(&p->rt);
}

int main(int argc, char **argv) {
    static program p;
    char err[LLM_ERR_LEN] = "";
    double start = runtime_now();
    if (!parse(&p, argc, argv, err, sizeof err)) {
        fprintf(stderr, "demo: %s (demo --help tells more)\n", err);
        return EXIT_USAGE;
    }
    if (p.help) {
        printf(usage, options_help);
        return 0;
    }
    p.log = p.json ? stderr : stdout;
    p.live_view = !p.json && !p.plain && view_possible();
    bool ok = load(&p, err, sizeof err) && live(&p, err, sizeof err) && measure(&p, err, sizeof err);
    p.r.seconds = runtime_now() - start;
    if (ok && p.json)
        report_json(&p.r);
    else if (ok)
        report_table(&p.r);
    if (ok && (fflush(stdout) != 0 || ferror(stdout)))
        ok = llm_fail(err, sizeof err, "stdout could not be written");
    if (!ok) fprintf(stderr, "demo: %s\n", err);
    release(&p);
    return ok ? 0 : EXIT_FAILED;
}
