/* trace: replays request traces through kvlite's scheduler and cache. See `trace --help`. */
#include "replay.h"
#include "report.h"
#include "trace.h"
#include "llm/options.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { EXIT_RUNTIME = 1, EXIT_USAGE = 2, MAX_SWEEP = 32 };

static const char usage[] =
    "usage: trace (--trace FILE | --synthetic N:PROMPT:MEAN:MAX) [options]\n"
    "\n"
    "Runs kvlite's real scheduler and cache, on the null backend and under a simulated clock, over the\n"
    "requests of a trace, and reports what that took. The same input gives the same report, but for real\n"
    "times (\"wall\").\n"
    "\n"
    "  --trace FILE        a request trace\n"
    "  --format NAME       azure: CSV with TIMESTAMP, ContextTokens, GeneratedTokens\n"
    "                      mooncake: JSON lines with timestamp, input_length, output_length, hash_ids\n"
    "                      (default: what the first line looks like)\n"
    "  --synthetic N:PROMPT:MEAN:MAX\n"
    "                      instead of a trace: N requests at once, prompts of PROMPT tokens, answers of\n"
    "                      random length up to MAX: exponential of that MEAN, or with MEAN 0 evenly\n"
    "                      spread; --seed N (default 1)\n"
    "  --limit N           only the first N requests\n"
    "  --repeat N          the trace N times, one after the other, nothing shared between them\n"
    "  --speed X           arrivals X times as fast; inf: all at once (default 1)\n"
    "  --model NAME        or layers:kvheads:dim[:qheads[:params in 1e9]] (default Llama-3-8B); names:\n"
    "                      %s\n"
    "  --kv PRESET         KV format (default int8)\n"
    "  --kv-bytes N        KV memory, also with K, M, G (default: what the cost's device has beside the\n"
    "                      weights)\n"
    "  --cost NAME         what steps take: cpu, rtx4090 (default), a100, or a file as\n"
    "                      tools/trace/cost_rtx4090.txt\n"
    "  --policy NAME       fcfs (default), priority, longest-prefix\n"
    "  --max-gap-ms N      longest wait between two tokens of a stream (default 100); 0: no bound\n"
    "  --no-chunking       prompts run whole, whatever that does to the others\n"
    "  --max-running N     requests with KV at once (default 256)\n"
    "  --max-waiting N     requests in the queue (default 4096)\n"
    "  --step-tokens N     rows of a step (default 2048)\n"
    "  --min-chunk N       smallest chunk of a prompt (default 32)\n"
    "  --block-tokens N    tokens of a block: 8, 16, 32, 64 (default 32)\n"
    "  --max-new N         answer length that requests ask for (default: the longest of the trace, since\n"
    "                      nobody knows before); own: what each turns out to need\n"
    "  --no-prefix-cache   nothing of a request is kept\n"
    "  --learn             the scheduler is not told the cost and learns it\n"
    "  --mode NAME         continuous (default), static, request, contiguous; all\n"
    "  --sweep LIST        hit rates at these KV sizes, such as 1G,4G,16G\n"
    "  --measure-cost GGUF measure steps on the CPU backend with this model, and print a cost file\n"
    "  --events FILE       write the scheduler's binary event trace (kvlite.h says what is in it)\n"
    "  --replay FILE       instead of all this: do what an event trace says, and see whether the plans\n"
    "                      come out the same, byte for byte\n"
    "  --json              the report as JSON\n"
    "  -h, --help          this text\n"
    "\n"
    "Modes, all under the same cost, format and bytes:\n"
    "  continuous   the real scheduler: pages taken as tokens come, requests join and leave at every step\n"
    "  static       batches padded to their longest prompt and answer, memory reserved for the longest\n"
    "               request of the trace; the next batch begins when the whole of one is done\n"
    "  request      the same without padding: who has finished costs nothing, but nobody joins before\n"
    "               all are done\n"
    "  contiguous   requests join and leave at every step, prompts run whole, memory is reserved for the\n"
    "               longest\n"
    "  ideal        a bound: the time in which the same work could be done with pages that waste\n"
    "               nothing, no idle time while there is work, and only as many steps as memory and\n"
    "               --max-running demand\n"
    "\n"
    "%s\n"
    "Exit codes: 0 done, 1 failed, 2 wrong usage.\n";

typedef struct program {
    const char *trace, *model_name, *cost_name, *measure, *kv, *events, *replay;
    trace_format format;
    uint32_t synthetic[4], limit, repeat;
    uint64_t seed;
    float speed;
    bool has_synthetic, json, help, run_real, run_baseline[3], bounds_gap;
    uint64_t sweep[MAX_SWEEP];
    uint32_t n_sweep;
    model m;
    setup s;
    workload w;
    double kv_token_bytes;
    uint32_t n_dropped;
    result real, baselines[3];
    sweep_point points[MAX_SWEEP];
} program;

/* ---- the command line ---- */

static bool choice(args *a, const char *const *names, uint32_t n, uint32_t *v, char *err, size_t len) {
    const char *text;
    char known[100] = "";
    if (!args_value(a, &text, err, len)) return false;
    for (*v = 0; *v < n; ++*v)
        if (strcmp(text, names[*v]) == 0) return true;
    for (uint32_t i = 0; i < n; i++) {
        size_t at = strlen(known);
        snprintf(known + at, sizeof known - at, " %s", names[i]);
    }
    return llm_fail(err, len, "%s '%.40s' is unknown; there are:%s", a->name, text, known);
}

static bool take_mode(program *p, args *a, char *err, size_t n) {
    static const char *const names[] = {"static", "request", "contiguous", "continuous", "all"};
    uint32_t v;
    if (!choice(a, names, 5, &v, err, n)) return false;
    p->run_real = v >= 3;
    for (uint32_t i = 0; i < 3; i++) p->run_baseline[i] = v == i || v == 4;
    return true;
}

static bool take_synthetic(program *p, args *a, char *err, size_t n) {
    const char *text;
    char rest;
    uint32_t *v = p->synthetic;
    if (!args_value(a, &text, err, n)) return false;
    p->has_synthetic = true;
    if (strspn(text, "0123456789:") == strlen(text) && strlen(text) < 40 &&
        sscanf(text, "%8u:%8u:%8u:%8u%c", &v[0], &v[1], &v[2], &v[3], &rest) == 4 && v[0] && v[1] && v[3])
        return true;
    return llm_fail(err, n, "--synthetic '%.60s': must be N:PROMPT:MEAN:MAX, such as 1000:512:128:1536",
                    text);
}

static bool take_speed(program *p, args *a, char *err, size_t n) {
    const char *text = a->inlined ? a->inlined : a->i < a->argc ? a->argv[a->i] : "";
    if (strcmp(text, "inf") != 0) return args_float(a, 1e-6f, 1e9f, &p->speed, err, n);
    p->speed = INFINITY;
    return args_value(a, &text, err, n);
}

static bool take_sweep(program *p, args *a, char *err, size_t n) {
    const char *text;
    char one[32];
    if (!args_value(a, &text, err, n)) return false;
    for (p->n_sweep = 0; *text; text += *text == ',') {
        size_t len = strcspn(text, ",");
        if (len >= sizeof one || p->n_sweep == MAX_SWEEP)
            return llm_fail(err, n, "--sweep: more than %d sizes, or no size: '%.40s'", MAX_SWEEP, text);
        memcpy(one, text, len);
        one[len] = 0;
        args b = {.argc = 0, .name = "--sweep", .inlined = one};
        if (!args_bytes(&b, &p->sweep[p->n_sweep++], err, n)) return false;
        text += len;
    }
    return p->n_sweep || llm_fail(err, n, "--sweep: no sizes");
}

static bool take_u32(args *a, uint32_t min, uint32_t max, uint32_t *v, char *err, size_t n) {
    uint64_t wide = 0;
    if (!args_u64(a, min, max, &wide, err, n)) return false;
    *v = (uint32_t)wide;
    return true;
}

static bool take_max_new(program *p, args *a, char *err, size_t n) {
    const char *text = a->inlined ? a->inlined : a->i < a->argc ? a->argv[a->i] : "";
    if (strcmp(text, "own") != 0) return take_u32(a, 1, 1u << 27, &p->s.max_new, err, n);
    p->s.max_new = KVL_NONE;
    return args_value(a, &text, err, n);
}

static bool take_workload(program *p, args *a, bool *taken, char *err, size_t n) {
    static const char *const formats[] = {"azure", "mooncake"};
    uint32_t v;
    *taken = true;
    if (args_is(a, "--trace")) return args_value(a, &p->trace, err, n);
    if (args_is(a, "--synthetic")) return take_synthetic(p, a, err, n);
    if (args_is(a, "--seed")) return args_u64(a, 0, UINT64_MAX, &p->seed, err, n);
    if (args_is(a, "--limit")) return take_u32(a, 1, 1u << 24, &p->limit, err, n);
    if (args_is(a, "--repeat")) return take_u32(a, 1, 100000, &p->repeat, err, n);
    if (args_is(a, "--speed")) return take_speed(p, a, err, n);
    if (args_is(a, "--format")) {
        if (!choice(a, formats, 2, &v, err, n)) return false;
        p->format = v ? TRACE_MOONCAKE : TRACE_AZURE;
        return true;
    }
    *taken = false;
    return true;
}

static bool take_setup(program *p, args *a, bool *taken, char *err, size_t n) {
    static const char *const policies[] = {"fcfs", "priority", "longest-prefix"};
    uint32_t v;
    float ms;
    *taken = true;
    if (args_is(a, "--model")) return args_value(a, &p->model_name, err, n);
    if (args_is(a, "--kv")) return args_value(a, &p->kv, err, n);
    if (args_is(a, "--kv-bytes")) return args_bytes(a, &p->s.kv_bytes, err, n);
    if (args_is(a, "--cost")) return args_value(a, &p->cost_name, err, n);
    if (args_is(a, "--max-running")) return take_u32(a, 1, 65535, &p->s.max_running, err, n);
    if (args_is(a, "--max-waiting")) return take_u32(a, 1, 1000000, &p->s.max_waiting, err, n);
    if (args_is(a, "--step-tokens")) return take_u32(a, 1, 1u << 20, &p->s.step_tokens, err, n);
    if (args_is(a, "--min-chunk")) return take_u32(a, 1, 1u << 20, &p->s.min_chunk, err, n);
    if (args_is(a, "--block-tokens")) return take_u32(a, 8, 64, &p->s.geometry.block_tokens, err, n);
    if (args_is(a, "--max-new")) return take_max_new(p, a, err, n);
    if (args_is(a, "--no-chunking")) return p->s.no_chunking = true, args_flag(a, err, n);
    if (args_is(a, "--no-prefix-cache")) return p->s.no_prefix_cache = true, args_flag(a, err, n);
    if (args_is(a, "--learn")) return p->s.learn = true, args_flag(a, err, n);
    if (args_is(a, "--policy")) {
        if (!choice(a, policies, 3, &v, err, n)) return false;
        p->s.policy = (kvl_policy)v;
        return true;
    }
    if (args_is(a, "--max-gap-ms")) {
        if (!args_float(a, 0, 1e9f, &ms, err, n)) return false;
        p->s.max_gap_ms = (double)ms;
        p->bounds_gap = ms > 0;
        return true;
    }
    *taken = false;
    return true;
}

static bool parse(program *p, int argc, char **argv, char *err, size_t n) {
    args a = {.argc = argc, .argv = argv, .i = 1};
    while (args_next(&a, err, n)) {
        bool taken = false;
        if (!take_workload(p, &a, &taken, err, n) || (!taken && !take_setup(p, &a, &taken, err, n)))
            return false;
        if (taken) continue;
        if (args_is(&a, "--mode")) {
            if (!take_mode(p, &a, err, n)) return false;
        } else if (args_is(&a, "--sweep")) {
            if (!take_sweep(p, &a, err, n)) return false;
        } else if (args_is(&a, "--measure-cost")) {
            if (!args_value(&a, &p->measure, err, n)) return false;
        } else if (args_is(&a, "--events")) {
            if (!args_value(&a, &p->events, err, n)) return false;
        } else if (args_is(&a, "--replay")) {
            if (!args_value(&a, &p->replay, err, n)) return false;
        } else if (args_is(&a, "--json")) {
            if (!args_flag(&a, err, n)) return false;
            p->json = true;
        } else if (args_is(&a, "-h") || args_is(&a, "--help")) {
            p->help = true;
            return true;
        } else {
            return llm_fail(err, n, "'%s' is not an option", a.name);
        }
    }
    if (err[0]) return false;
    if (p->replay && (p->trace || p->has_synthetic || p->n_sweep || p->measure || p->json))
        return llm_fail(err, n, "--replay goes alone: the event trace has its own requests and settings");
    if (p->n_sweep && p->s.kv_bytes)
        return llm_fail(err, n, "--sweep and --kv-bytes: the sweep has the sizes");
    if (p->n_sweep && !p->run_real)
        return llm_fail(err, n, "--sweep: only a run of the real scheduler has hits (--mode continuous)");
    if (p->s.no_chunking && p->bounds_gap)
        return llm_fail(err, n, "--no-chunking and --max-gap-ms: without chunks no gap is bounded");
    if (p->events && (p->n_sweep || !p->run_real))
        return llm_fail(err, n, "--events: only a run of the real scheduler has them (--mode continuous)");
    if (!p->measure && !p->replay && !p->trace == !p->has_synthetic)
        return llm_fail(err, n, "give --trace FILE or --synthetic N:PROMPT:MEAN:MAX");
    if (p->kv && !kvl_preset_find(p->kv)) return llm_fail(err, n, "--kv '%.40s' is no preset", p->kv);
    return true;
}

/* ---- running ---- */

static bool prepare(program *p, char *err, size_t n) {
    setup *s = &p->s;
    uint32_t max_tokens;
    if (!model_find(&p->m, p->model_name, err, n) || !cost_find(&s->cost, p->cost_name, &p->m, err, n))
        return false;
    bool read = p->trace ? workload_read(&p->w, p->trace, p->format, p->limit, err, n)
                         : workload_synthetic(&p->w, p->synthetic[0], p->synthetic[1], p->synthetic[2],
                                              p->synthetic[3], p->seed, err, n);
    if (!read || !workload_repeat(&p->w, p->repeat, (double)p->speed, err, n)) return false;
    s->geometry.n_layers = p->m.n_layers;
    s->geometry.n_q_heads = p->m.n_q_heads;
    s->geometry.n_kv_heads = p->m.n_kv_heads;
    s->geometry.k_dim = p->m.head_dim;
    s->geometry.preset = p->kv ? p->kv : "int8";
    if (!s->kv_bytes) s->kv_bytes = s->cost.memory_gb > 0 ? (uint64_t)(s->cost.memory_gb * 1e9) : 2ull << 30;
    if (s->no_chunking) {
        s->max_gap_ms = 0;
        s->step_tokens = p->w.max_total + s->max_running;
    }
    if (s->min_chunk > s->step_tokens) s->min_chunk = s->step_tokens;
    for (uint32_t i = 0; i < p->n_sweep;
         i++) /* requests that the smallest cannot hold are left out everywhere */
        if (!i || p->sweep[i] < s->kv_bytes) s->kv_bytes = p->sweep[i];
    if (!setup_limits(s, &max_tokens, &p->kv_token_bytes, err, n)) return false;
    p->n_dropped = workload_drop(&p->w, max_tokens);
    return p->w.n ||
           llm_fail(err, n, "--kv-bytes %llu: no request of the trace fits", (unsigned long long)s->kv_bytes);
}

/* Hit rates, and the ideal schedule with Belady's hits and with those that there were. */
static bool compare(program *p, report *r, char *err, size_t n) {
    const setup *s = &p->s;
    uint32_t T = s->geometry.block_tokens, *hits = calloc(p->w.n, sizeof *hits);
    uint64_t n_blocks = (uint64_t)((double)s->kv_bytes / (p->kv_token_bytes * T)), lru, best;
    double total = 0;
    for (uint32_t i = 0; i < p->w.n; i++) total += p->w.requests[i].n_prompt;
    bool ok = hits && oracle_lru(&p->w, T, n_blocks, &lru, err, n) &&
              oracle_belady(&p->w, T, n_blocks, &best, hits, err, n);
    if (ok) {
        r->lru_hit_rate = (double)lru / total;
        r->belady_hit_rate = (double)best / total;
        r->hit_rate = r->real ? (double)r->real->hit_tokens / total : 0;
        r->ideal_ms = r->ideal_belady_ms = batching_ideal_ms(&p->w, s, p->kv_token_bytes, hits);
    }
    if (ok && r->real) r->ideal_ms = batching_ideal_ms(&p->w, s, p->kv_token_bytes, p->real.hits);
    free(hits);
    return ok || (hits ? false : llm_fail(err, n, "out of memory"));
}

static bool run_sweep(program *p, report *r, char *err, size_t n) {
    setup s = p->s;
    uint32_t T = s.geometry.block_tokens;
    double total = 0;
    for (uint32_t i = 0; i < p->w.n; i++) total += p->w.requests[i].n_prompt;
    for (uint32_t i = 0; i < p->n_sweep; i++) {
        uint64_t lru, best, n_blocks;
        sweep_point *at = &p->points[i];
        at->kv_bytes = s.kv_bytes = p->sweep[i];
        n_blocks = (uint64_t)((double)s.kv_bytes / (p->kv_token_bytes * T));
        if (!simulate(&p->w, &s, &p->real, err, n) || !oracle_lru(&p->w, T, n_blocks, &lru, err, n) ||
            !oracle_belady(&p->w, T, n_blocks, &best, NULL, err, n))
            return false;
        at->hit_rate = (double)p->real.hit_tokens / total;
        at->lru_hit_rate = (double)lru / total;
        at->belady_hit_rate = (double)best / total;
        if (i + 1 < p->n_sweep) result_free(&p->real);
    }
    p->real.n_dropped = p->n_dropped;
    r->swept = &p->real;
    r->sweep = p->points;
    r->n_sweep = p->n_sweep;
    return true;
}

static bool run_real(program *p, char *err, size_t n) {
    if (p->events && !(p->s.events = fopen(p->events, "wb")))
        return llm_fail(err, n, "--events %s: %s", p->events, strerror(errno));
    bool ok = simulate(&p->w, &p->s, &p->real, err, n);
    bool failed = p->s.events && ferror(p->s.events);
    if (p->s.events && (fclose(p->s.events) || failed) && ok)
        ok = llm_fail(err, n, "--events %s: %s", p->events, strerror(errno));
    return ok;
}

static bool replay(const char *path, char *err, size_t n) {
    struct replay_report r;
    if (replay_file(path, NULL, &r) != REPLAY_EQUAL) return llm_fail(err, n, "%s: %.200s", path, r.text);
    printf("%s\n", r.text);
    return true;
}

static bool run(program *p, report *r, char *err, size_t n) {
    if (p->n_sweep) return run_sweep(p, r, err, n);
    if (p->run_real) {
        if (!run_real(p, err, n)) return false;
        p->real.n_dropped = p->n_dropped;
        r->real = &p->real;
    }
    for (uint32_t i = 0; i < 3; i++) {
        if (!p->run_baseline[i]) continue;
        if (!batching_run(&p->w, &p->s, (batching)i, p->kv_token_bytes, &p->baselines[i], err, n))
            return false;
        p->baselines[i].n_dropped = p->n_dropped;
        r->baselines[i] = &p->baselines[i];
    }
    return compare(p, r, err, n);
}

static const char *base_name(const char *path) {
    const char *slash = path ? strrchr(path, '/') : NULL;
    return slash ? slash + 1 : path ? path : "synthetic";
}

int main(int argc, char **argv) {
    static program p = {
        .model_name = "Llama-3-8B", .cost_name = "rtx4090", .repeat = 1, .seed = 1, .speed = 1};
    char err[LLM_ERR_LEN] = "";
    p.run_real = true;
    p.s = (setup){
        .max_gap_ms = 100, .max_running = 256, .max_waiting = 4096, .step_tokens = 2048, .min_chunk = 32};
    p.s.geometry.block_tokens = 32;
    p.s.progress = isatty(2);
    if (!parse(&p, argc, argv, err, sizeof err)) {
        fprintf(stderr, "trace: %s\n", err);
        return EXIT_USAGE;
    }
    if (p.help) return printf(usage, model_names(), report_help) < 0;
    report r = {
        .source = base_name(p.trace), .m = &p.m, .s = &p.s, .speed = (double)p.speed, .repeat = p.repeat};
    bool ok;
    if (p.replay) {
        ok = replay(p.replay, err, sizeof err);
    } else if (p.measure) {
        ok = cost_measure(p.measure, p.kv, err, sizeof err);
    } else {
        ok = prepare(&p, err, sizeof err) && run(&p, &r, err, sizeof err);
        r.kv_token_bytes = p.kv_token_bytes;
        if (ok && p.json)
            ok = report_json(&r, stdout) || llm_fail(err, sizeof err, "out of memory");
        else if (ok)
            report_text(&r, stdout);
    }
    if (ok && (fflush(stdout) || ferror(stdout)))
        ok = llm_fail(err, sizeof err, "the output could not be written: %s", strerror(errno));
    workload_free(&p.w);
    result_free(&p.real);
    if (!ok) fprintf(stderr, "trace: %s\n", err);
    return ok ? 0 : EXIT_RUNTIME;
}
