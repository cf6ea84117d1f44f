/* bench_attend: kvlite's attention of one layer on the CPU, beside what the same run measures for reading memory and for
 * converting F16 and multiplying-adding. bench_peer_attention has ggml beside it. See --help. */
#include "attend_case.h"
#include "ceiling.h"
#include "llm/options.h"

enum { MOST = 8, PREFILL_ROWS = 512 };

static const char usage[] =
    "usage: bench_attend [options]\n"
    "\n"
    "Attention of one layer, 8 KV heads. decode: one token after a context. read: as many bytes read\n"
    "once; ceiling: share of the lesser of read and of converting F16 and multiplying-adding (target:\n"
    "f16 at 70% or more); to f16: time over f16's (target: 1.0 or less, 1.2 at GQA 8). prefill: 512\n"
    "tokens at the end of the context; ceiling: share of multiply-adds alone. Figures are the best of\n"
    "several runs.\n"
    "\n"
    "  --prefill       instead of decode\n"
    "  --quick         fewer cases\n"
    "  --simd PATH     avx512, avx2 or scalar (default: the widest there is)\n"
    "  --preset NAME, --dim N, --gqa N, --context N, --threads N   this one alone\n";

typedef struct plan {
    const char *presets[MOST];
    uint32_t contexts[MOST], dims[MOST], gqas[MOST], threads[MOST]; /* up to a 0 */
    double seconds;                                                 /* a case */
    kvl_simd simd;
    bool prefill, quick, help;
} plan;

static const plan whole = {.presets = {"f16", "int8", "int8+", "fp8", "nvfp4", "balanced", "int4"},
                           .contexts = {1024, 8192, 65536},
                           .dims = {64, 128},
                           .gqas = {1, 4, 8},
                           .threads = {1, 2},
                           .seconds = 0.06};
static const plan quick = {.presets = {"f16", "int8", "int4"},
                           .contexts = {1024, 16384},
                           .dims = {128},
                           .gqas = {1, 4, 8},
                           .threads = {1, 2},
                           .seconds = 0.04};

typedef struct bench {
    const plan *p;
    pool *pool;
    kvl_context *ctx;
    case_rows rows;
    double fma; /* 1e9 multiply-adds a second */
} bench;

static double read_rate(const bench *b, size_t bytes) {
    uint8_t *at = case_alloc(bytes);
    memset(at, 1, bytes);
    double rate = ceiling_rate(b->pool, b->p->simd, at, bytes, 0, b->p->seconds / 2);
    free(at);
    return rate;
}

/* One line; returns the microseconds. */
static double run_case(bench *b, const char *preset, uint32_t gqa, uint32_t context, double convert,
                       double f16) {
    case_cache c;
    uint32_t n_new = b->p->prefill ? PREFILL_ROWS : 1;
    uint32_t n = b->p->prefill ? context : context - CASE_T / 2; /* decode ends half way in a block */
    if (n_new > n) n_new = n;
    uint32_t n_floats = n_new * CASE_KV_HEADS * gqa * b->rows.dim;
    float *q = case_alloc(n_floats * sizeof(float));
    case_queries(n_floats, q);
    case_open(&c, b->ctx, &b->rows, kvl_preset_find(preset), gqa, n - n_new, n_new, q);
    double us = bench_best(case_attend, &c, b->p->seconds) * 1e6, rate, limit, shown;
    if (!(case_error(&b->rows, gqa, n - n_new, n_new, q, c.out) < CASE_MOST_ERROR))
        case_die(preset, "its result is wrong");
    if (b->p->prefill) {
        double pairs = (double)n_new * (n - n_new) + n_new * (n_new + 1) / 2.0;
        rate = 2 * pairs * b->rows.dim * CASE_KV_HEADS * gqa / us * 1e-3;
        limit = shown = b->fma;
    } else {
        rate = (double)c.bytes / us * 1e-3;
        shown = f16 > 0 ? 0 : read_rate(b, c.bytes);
        limit = shown < convert ? shown : convert;
    }
    printf("%-9s %4u %4u %8u %10.1f %8.2f", preset, b->rows.dim, gqa, context, us, rate);
    if (shown > 0)
        printf(" %8.1f %8.0f%%", shown, 100 * rate / limit);
    else
        printf(" %8s %9s", "", "");
    if (f16 > 0) printf(" %7.2f", us / f16);
    printf("\n");
    fflush(stdout);
    case_close(&c);
    free(q);
    return us;
}

static void run_plan(bench *b) {
    static uint8_t warm[16384] __attribute__((aligned(64)));
    const plan *p = b->p;
    uint32_t threads = pool_threads(b->pool);
    b->fma = ceiling_rate(b->pool, p->simd, warm, sizeof warm, 8, 0.05) / 2 *
             8; /* two bytes, eight for each number */
    printf("\n%s, %s, %u thread%s\n", kvl_context_backend(b->ctx), p->prefill ? "prefill" : "decode", threads,
           threads > 1 ? "s" : "");
    printf("%-9s %4s %4s %8s %10s %8s %8s %9s %7s\n", "preset", "D", "GQA", "context", "us",
           p->prefill ? "Gfma/s" : "GB/s", p->prefill ? "fma" : "read", "ceiling", "to f16");
    for (const uint32_t *d = p->dims; *d; d++) {
        case_rows_make(&b->rows, *d);
        for (const uint32_t *c = p->contexts; *c; c++)
            for (const uint32_t *g = p->gqas; *g; g++) {
                double f16 = 0, convert = ceiling_rate(b->pool, p->simd, warm, sizeof warm, *g, 0.05);
                for (const char *const *name = p->presets; *name; name++) {
                    double us = run_case(b, *name, *g, *c, convert, f16);
                    if (!strcmp(*name, "f16")) f16 = us;
                }
            }
    }
}

/* ---- the command line ---- */
static bool only(args *a, uint32_t list[MOST], uint64_t least, uint64_t most, char *err, size_t n) {
    uint64_t v;
    if (!args_u64(a, least, most, &v, err, n)) return false;
    list[0] = (uint32_t)v;
    list[1] = 0;
    return true;
}

static bool take_simd(plan *p, args *a, char *err, size_t n) {
    static const char *const names[] = {"", "scalar", "avx2", "avx512"};
    const char *name;
    if (!args_value(a, &name, err, n)) return false;
    for (int i = KVL_SIMD_SCALAR; i <= KVL_SIMD_AVX512; i++)
        if (strcmp(name, names[i]) == 0) p->simd = (kvl_simd)i;
    return p->simd != KVL_SIMD_AUTO || llm_fail(err, n, "--simd '%.40s': scalar, avx2 or avx512", name);
}

static bool parse_one(plan *p, args *a, char *err, size_t n) {
    if (args_is(a, "--quick")) return args_flag(a, err, n);
    if (args_is(a, "--prefill")) return p->prefill = args_flag(a, err, n);
    if (args_is(a, "-h") || args_is(a, "--help")) return p->help = args_flag(a, err, n);
    if (args_is(a, "--simd")) return take_simd(p, a, err, n);
    if (args_is(a, "--dim")) return only(a, p->dims, 64, CASE_MAX_DIM, err, n);
    if (args_is(a, "--gqa")) return only(a, p->gqas, 1, CASE_MAX_GQA, err, n);
    if (args_is(a, "--context")) return only(a, p->contexts, 2 * CASE_T, 1 << 20, err, n);
    if (args_is(a, "--threads")) return only(a, p->threads, 1, CEILING_MAX_SLICES, err, n);
    if (!args_is(a, "--preset")) return llm_fail(err, n, "option '%s' is unknown", a->name);
    if (!args_value(a, &p->presets[0], err, n)) return false;
    p->presets[1] = NULL;
    return kvl_preset_find(p->presets[0]) ||
           llm_fail(err, n, "--preset '%.40s': no such preset", p->presets[0]);
}

static bool parse(plan *p, int argc, char **argv, char *err, size_t n) {
    args a = {.argc = argc, .argv = argv, .i = 1};
    *p = whole;
    for (int i = 1; i < argc; i++) /* first, since the others narrow what it chose */
        if (strcmp(argv[i], "--quick") == 0) *p = quick;
    while (args_next(&a, err, n))
        if (!parse_one(p, &a, err, n)) return false;
    return !err[0];
}

int main(int argc, char **argv) {
    static bench b;
    static plan p;
    char err[LLM_ERR_LEN] = "";
    if (!parse(&p, argc, argv, err, sizeof err)) {
        fprintf(stderr, "bench_attend: %s (--help tells more)\n", err);
        return 2;
    }
    if (p.help) return fputs(usage, stdout) < 0;
    b.p = &p;
    for (const uint32_t *threads = p.threads; *threads; threads++) {
        b.pool = pool_create(*threads);
        kvl_context_desc d = {.backend = KVL_BACKEND_CPU,
                              .simd = p.simd,
                              .n_threads = *threads,
                              .parallel_for = pool_parallel_for,
                              .user = b.pool,
                              .error = err,
                              .error_size = sizeof err};
        if (!b.pool || kvl_context_create(&d, &b.ctx) != KVL_OK) case_die("bench_attend", err);
        run_plan(&b);
        kvl_context_destroy(b.ctx);
        pool_destroy(b.pool);
    }
    return 0;
}
