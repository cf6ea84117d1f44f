/* bench_attend: attention on the CPU after a context: of one new token (decode), beside what the same run measures for
   reading memory and for converting F16 and multiplying-adding; and of 512 (prefill), beside the rate of multiply-adds
   alone. Contexts are laid down as blocks, not computed (that would take hours), so the library's attention is called
   underneath its public API. Figures are the best of several runs. Options leave cases out:
     bench_attend [--quick] [--simd avx512|avx2|scalar] [--prefill] [--preset NAME] [--dim N] [--gqa N] [--context N]
                  [--threads N] */
#define KVL_IMPLEMENTATION
#include "../../kvlite.h"

enum { KV_HEADS = 8, T = 32, MAX_BLOCKS = 65536 / T };

static float noise(void) {
    static uint32_t x = 2463534242u;
    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    return (float)(int32_t)x * (1.0f / 2147483648.0f);
}

/* ---- ceilings ---- */
typedef struct slice_job {
    const uint8_t *at;
    size_t bytes; /* of all slices */
    uint32_t n_slices, gqa, repeats;
    kvl_simd simd;
    float q[128];
    float sink[64];
} slice_job;

#if KVLI_X86
static KVLI_TARGET_AVX512 float read512(const uint8_t *p, size_t n) {
    __m512 a[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (size_t i = 0; i + 256 <= n; i += 256) {
        KVLI_UNROLL for (int k = 0; k < 4; k++) a[k] =
            _mm512_add_ps(a[k], _mm512_loadu_ps((const float *)(const void *)(p + i + 64 * k)));
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a[0], a[1]), _mm512_add_ps(a[2], a[3])));
}

static KVLI_TARGET_AVX2 float read256(const uint8_t *p, size_t n) {
    __m256 a[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    for (size_t i = 0; i + 128 <= n; i += 128) {
        KVLI_UNROLL for (int k = 0; k < 4; k++) a[k] =
            _mm256_add_ps(a[k], _mm256_loadu_ps((const float *)(const void *)(p + i + 32 * k)));
    }
    a[0] = _mm256_add_ps(_mm256_add_ps(a[0], a[1]), _mm256_add_ps(a[2], a[3]));
    return _mm256_cvtss_f32(a[0]);
}

/* Every 16 (or 8) numbers are converted once and used by G query heads, as attention must at the least. */
KVLI_INLINE KVLI_TARGET_AVX512 float convert512(const int G, const uint8_t *p, size_t n, const float *q) {
    __m512 a[16];
    KVLI_UNROLL for (int i = 0; i < 16; i++) a[i] = _mm512_setzero_ps();
    for (size_t i = 0; i + 128 <= n; i += 128) {
        KVLI_UNROLL for (int k = 0; k < 4; k++) {
            __m512 v = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)(p + i + 32 * k)));
            KVLI_UNROLL for (int g = 0; g < G; g++) a[(k * G + g) % 16] =
                _mm512_fmadd_ps(_mm512_loadu_ps(q + 16 * g), v, a[(k * G + g) % 16]);
        }
    }
    KVLI_UNROLL for (int i = 1; i < 16; i++) a[0] = _mm512_add_ps(a[0], a[i]);
    return _mm512_reduce_add_ps(a[0]);
}

KVLI_INLINE KVLI_TARGET_AVX2 float convert256(const int G, const uint8_t *p, size_t n, const float *q) {
    __m256 a[8];
    KVLI_UNROLL for (int i = 0; i < 8; i++) a[i] = _mm256_setzero_ps();
    for (size_t i = 0; i + 128 <= n; i += 128) {
        KVLI_UNROLL for (int k = 0; k < 8; k++) {
            __m256 v = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(p + i + 16 * k)));
            KVLI_UNROLL for (int g = 0; g < G; g++) a[(k * G + g) % 8] =
                _mm256_fmadd_ps(_mm256_loadu_ps(q + 8 * g), v, a[(k * G + g) % 8]);
        }
    }
    KVLI_UNROLL for (int i = 1; i < 8; i++) a[0] = _mm256_add_ps(a[0], a[i]);
    return _mm256_cvtss_f32(a[0]);
}

static KVLI_TARGET_AVX512 float convert512_n(uint32_t gqa, const uint8_t *p, size_t n, const float *q) {
    return gqa == 1 ? convert512(1, p, n, q) : gqa == 4 ? convert512(4, p, n, q) : convert512(8, p, n, q);
}
static KVLI_TARGET_AVX2 float convert256_n(uint32_t gqa, const uint8_t *p, size_t n, const float *q) {
    return gqa == 1 ? convert256(1, p, n, q) : gqa == 4 ? convert256(4, p, n, q) : convert256(8, p, n, q);
}
#endif

static float read_plain(const uint8_t *p, size_t n) {
    uint64_t a[4] = {0, 0, 0, 0}, x[4];
    for (size_t i = 0; i + 32 <= n; i += 32) {
        memcpy(x, p + i, 32);
        for (int k = 0; k < 4; k++) a[k] += x[k];
    }
    return (float)(a[0] + a[1] + a[2] + a[3]);
}

static float convert_plain(uint32_t gqa, const uint8_t *p, size_t n, const float *q) {
    float a[8] = {0};
    for (size_t i = 0; i + 2 <= n; i += 2) {
        uint16_t h;
        memcpy(&h, p + i, 2);
        for (uint32_t g = 0; g < gqa; g++) a[g] += q[g] * kvli_f16_to_f32(h);
    }
    return a[0] + a[gqa - 1];
}

static void slice_task(void *arg, uint32_t i) {
    slice_job *j = (slice_job *)arg;
    const float *q = j->q;
    size_t n = j->bytes / j->n_slices;
    const uint8_t *p = j->at + i * n;
    float sum = 0;
    for (uint32_t r = 0; r < j->repeats; r++) {
#if KVLI_X86
        if (j->simd == KVL_SIMD_AVX512) {
            sum += j->gqa ? convert512_n(j->gqa, p, n, q) : read512(p, n);
            continue;
        }
        if (j->simd == KVL_SIMD_AVX2) {
            sum += j->gqa ? convert256_n(j->gqa, p, n, q) : read256(p, n);
            continue;
        }
#endif
        sum += j->gqa ? convert_plain(j->gqa, p, n, q) : read_plain(p, n);
    }
    j->sink[i] = sum;
}

/* GB/s of all threads together; gqa 0 reads only. */
static double ceiling(kvl_context *ctx, const uint8_t *at, size_t bytes, uint32_t gqa, double seconds) {
    slice_job j;
    double best = 0, spent = 0;
    memset(&j, 0, sizeof j);
    j.at = at;
    j.bytes = bytes;
    j.n_slices = kvli_threads(ctx);
    j.gqa = gqa;
    j.simd = kvli_simd(ctx);
    j.repeats =
        bytes < (32u << 20) ? (uint32_t)((32u << 20) / bytes) : 1; /* long against the waking of threads */
    for (int i = 0; i < 128; i++) j.q[i] = noise();
    for (int r = 0; r < 1000 && (r < 3 || spent < seconds); r++) {
        uint64_t t = kvli_clock_now();
        kvli_parallel(ctx, j.n_slices, slice_task, &j);
        double s = (double)(kvli_clock_now() - t) * 1e-9, rate = (double)bytes * j.repeats / s * 1e-9;
        if (rate > best) best = rate;
        spent += s;
    }
    return best;
}

/* ---- one case ---- */
typedef struct setup {
    kvli_geometry geo;
    kvli_layer layer;
    uint8_t *memory;
    size_t memory_bytes, kv_bytes;
    uint64_t address[MAX_BLOCKS + 1];
    uint32_t table[MAX_BLOCKS + 1];
} setup;

static kvli_side side_of(kvl_format f, uint32_t dim) {
    kvli_side s;
    memset(&s, 0, sizeof s);
    s.format = f & ~(kvl_format)KVL_ROTATED;
    s.rotated = (f & KVL_ROTATED) != 0;
    s.global = 1.0f / 16;
    s.tokens = T;
    s.dim = dim;
    s.tile_bytes = kvli_tile_size(s.format, T, dim);
    return s;
}

/* One layer's blocks for n tokens: the first exact, also the last unless it is full; the rest packed; a few different
   tiles, repeated. */
static void make_setup(setup *s, const kvl_preset *preset, uint32_t dim, uint32_t gqa, uint32_t n,
                       kvl_simd simd) {
    enum { VARIANTS = 4, MOST = T * 256 * 4 };
    static uint8_t tiles[2][2][VARIANTS][MOST] KVLI_ALIGN(128);
    float rows[T * 256];
    uint32_t n_blocks = (n + T - 1) / T;
    size_t block[2], used = 0;
    memset(&s->geo, 0, sizeof s->geo);
    memset(&s->layer, 0, sizeof s->layer);
    s->geo.n_layers = s->geo.n_groups = 1;
    s->geo.n_kv_heads = KV_HEADS;
    s->geo.gqa = gqa;
    s->geo.n_q_heads = KV_HEADS * gqa;
    s->geo.k_dim = s->geo.v_dim = dim;
    s->geo.block_tokens = T;
    s->geo.segment_tokens = 1024;
    s->geo.exact = preset->exact;
    s->geo.layers = &s->layer;
    s->layer.scale = 1.0f / sqrtf((float)dim);
    for (int c = 0; c < 2; c++) {
        s->layer.k[c] = side_of(c == KVLI_EXACT ? preset->exact : preset->k, dim);
        s->layer.v[c] = side_of(c == KVLI_EXACT ? preset->exact : preset->v, dim);
        s->layer.v_offset[c] = s->layer.k[c].tile_bytes;
        s->layer.head_stride[c] = s->layer.k[c].tile_bytes + s->layer.v[c].tile_bytes;
        block[c] = s->layer.head_stride[c] * KV_HEADS;
    }
    for (int v = 0; v < VARIANTS; v++)
        for (int kv = 0; kv < 2; kv++) {
            const kvli_side *packed = kv ? &s->layer.v[KVLI_PACKED] : &s->layer.k[KVLI_PACKED];
            for (uint32_t i = 0; i < T * dim; i++) rows[i] = noise();
            kvli_write_rows(preset->exact, dim, rows, KVL_DTYPE_F32, dim, T, tiles[KVLI_EXACT][kv][v], 0,
                            simd);
            if (packed->format == preset->exact)
                memcpy(tiles[KVLI_PACKED][kv][v], tiles[KVLI_EXACT][kv][v], packed->tile_bytes);
            else
                kvli_seal_tile(packed, preset->exact, tiles[KVLI_EXACT][kv][v], tiles[KVLI_PACKED][kv][v],
                               simd);
        }
    s->memory_bytes = (size_t)n_blocks * (block[0] > block[1] ? block[0] : block[1]);
    s->memory_bytes = (s->memory_bytes + 4095) & ~(size_t)4095;
    s->memory = (uint8_t *)aligned_alloc(4096, s->memory_bytes);
    if (!s->memory) {
        fprintf(stderr, "bench_attend: no memory for a context of %u tokens: %zu bytes\n", n,
                s->memory_bytes);
        exit(1);
    }
    for (uint32_t b = 0; b < n_blocks; b++) {
        int c = b == 0 || (b + 1) * T > n ? KVLI_EXACT : KVLI_PACKED;
        s->address[b] = (uint64_t)(uintptr_t)(s->memory + used);
        s->table[b] = b | (c == KVLI_EXACT ? KVL_ENTRY_EXACT : 0);
        for (uint32_t h = 0; h < KV_HEADS; h++) {
            uint8_t *at = s->memory + used + h * s->layer.head_stride[c];
            memcpy(at, tiles[c][0][(b + h) % VARIANTS], s->layer.k[c].tile_bytes);
            memcpy(at + s->layer.v_offset[c], tiles[c][1][(b + h) % VARIANTS], s->layer.v[c].tile_bytes);
        }
        used += block[c];
    }
    s->kv_bytes = used;
}

static kvl_tensor tensor(float *data, uint32_t heads, uint32_t dim) {
    kvl_tensor t;
    memset(&t, 0, sizeof t);
    t.data = data;
    t.row_stride = (size_t)heads * dim;
    t.head_stride = dim;
    return t;
}

enum { MOST_ROWS = 512 };

/* Microseconds of one step whose rows are the last of n, best of what `seconds` allow. Rows of blocks that they complete
   stand in scratch and are sealed, as in a step of the library. */
static double step_time(setup *s, kvl_context *ctx, uint32_t n, uint32_t n_rows, double seconds) {
    static float q[MOST_ROWS * 64 * 128], out[MOST_ROWS * 64 * 128], k[MOST_ROWS * KV_HEADS * 128],
        v[MOST_ROWS * KV_HEADS * 128];
    static uint8_t scratch[MOST_ROWS * KV_HEADS * 128 * 4] KVLI_ALIGN(128);
    uint32_t dim = s->geo.k_dim, own[MOST_ROWS / T + 1];
    bool exact = s->layer.k[KVLI_PACKED].format == s->geo.exact;
    kvli_attend_span span;
    kvli_attend a;
    uint8_t taint = 0;
    double best = 1e30, spent = 0;
    size_t bytes = kvli_cpu_workspace(&s->geo, kvli_threads(ctx), n_rows, n);
    void *workspace = aligned_alloc(64, (bytes + 63) & ~(size_t)63);
    for (uint32_t i = 0; i < n_rows * s->geo.n_q_heads * dim; i++) q[i] = noise();
    for (uint32_t i = 0; i < n_rows * KV_HEADS * dim; i++) k[i] = noise(), v[i] = noise();
    memset(&span, 0, sizeof span);
    span.n_rows = n_rows;
    span.position = n - n_rows;
    span.blocks.table = s->table;
    span.blocks.n_blocks = (n + T - 1) / T;
    span.blocks.first_own = span.position / T;
    span.blocks.n_own = span.blocks.n_blocks - span.blocks.first_own;
    span.blocks.own = own;
    for (uint32_t i = 0; i < span.blocks.n_own; i++)
        own[i] = n_rows == 1 || exact ? s->table[span.blocks.first_own + i] : i | KVL_ENTRY_SCRATCH;
    memset(&a, 0, sizeof a);
    a.geo = &s->geo;
    a.layer = &s->layer;
    a.spans = &span;
    a.n_spans = 1;
    a.n_rows = n_rows;
    a.block_address = s->address;
    a.scratch = scratch;
    a.scratch_slot = s->layer.head_stride[KVLI_EXACT] * KV_HEADS;
    a.workspace = workspace;
    a.workspace_bytes = bytes;
    a.q = tensor(q, s->geo.n_q_heads, dim);
    a.k = tensor(k, KV_HEADS, dim);
    a.v = tensor(v, KV_HEADS, dim);
    a.out = tensor(out, s->geo.n_q_heads, dim);
    a.taint = &taint;
    for (int r = 0; r < 2000 && (r < 4 || spent < seconds); r++) {
        uint64_t t = kvli_clock_now();
        kvli_cpu_attend(ctx, &a);
        double us = (double)(kvli_clock_now() - t) * 1e-3;
        if (us < best) best = us;
        spent += us * 1e-6;
    }
    free(workspace);
    return best;
}

/* ---- the table ---- */
typedef struct plan {
    const char *presets[8];
    uint32_t contexts[4], dims[4], gqas[4], threads[4]; /* up to a 0 */
    double seconds;                                     /* a case */
    bool prefill;
} plan;

static const plan WHOLE = {{"f16", "int8", "int8+", "fp8", "nvfp4", "balanced", "int4"},
                           {1024, 8192, 65536},
                           {64, 128},
                           {1, 4, 8},
                           {1, 2},
                           0.06,
                           false};
static const plan QUICK = {{"f16", "int8", "int4"}, {1024, 16384}, {128}, {1, 4, 8}, {1, 2}, 0.04, false};

/* Rates of the threads together: reading a context and converting it for some query heads (GB/s), multiply-adds (1e9/s). */
typedef struct limits {
    double read, convert, fma;
} limits;

static double decode_case(setup *s, kvl_context *ctx, uint32_t n, const plan *p, limits *l, double f16) {
    double us = step_time(s, ctx, n, 1, p->seconds), rate = (double)s->kv_bytes / us * 1e-3;
    printf("%10.1f %8.2f", us, rate);
    if (f16 > 0) {
        printf(" %8s %9s %7.2f\n", "", "", us / f16);
        return us;
    }
    l->read = ceiling(ctx, s->memory, s->kv_bytes, 0, p->seconds / 2);
    printf(" %8.1f %8.0f%%\n", l->read, 100 * rate / (l->read < l->convert ? l->read : l->convert));
    return us;
}

static double prefill_case(setup *s, kvl_context *ctx, uint32_t n, const plan *p, const limits *l,
                           double f16) {
    uint32_t rows = n < MOST_ROWS ? n : MOST_ROWS;
    double us = step_time(s, ctx, n, rows, p->seconds),
           pairs = (double)rows * (n - rows) + rows * (rows + 1) / 2.0;
    double rate = 2 * pairs * s->geo.k_dim * s->geo.n_q_heads / us * 1e-3;
    printf("%10.1f %8.2f %8.1f %8.0f%%", us, rate, l->fma, 100 * rate / l->fma);
    if (f16 > 0)
        printf(" %7.2f\n", us / f16);
    else
        printf("\n");
    return us;
}

static void bench(kvl_context *ctx, const plan *p) {
    static setup s;
    static uint8_t warm[16384] KVLI_ALIGN(64);
    uint32_t threads = kvli_threads(ctx);
    limits l = {0, 0, 0};
    l.fma = ceiling(ctx, warm, sizeof warm, 8, 0.05) / 2 * 8; /* two bytes, eight multiply-adds a number */
    printf(", %s, %u thread%s\n", p->prefill ? "prefill of 512 tokens" : "decode", threads,
           threads > 1 ? "s" : "");
    printf("%-9s %4s %4s %8s %10s %8s %8s %9s %7s\n", "preset", "D", "GQA", "context", "us",
           p->prefill ? "Gfma/s" : "GB/s", p->prefill ? "fma" : "read", "ceiling", "to f16");
    for (const uint32_t *d = p->dims; *d; d++)
        for (const uint32_t *c = p->contexts; *c; c++)
            for (const uint32_t *g = p->gqas; *g; g++) {
                uint32_t n = p->prefill ? *c : *c - T / 2; /* decode ends half way in a block */
                double f16 = 0;
                l.convert = ceiling(ctx, warm, sizeof warm, *g, 0.05);
                for (const char *const *name = p->presets; *name; name++) {
                    make_setup(&s, kvl_preset_find(*name), *d, *g, n, kvli_simd(ctx));
                    printf("%-9s %4u %4u %8u ", *name, *d, *g, *c);
                    double us = p->prefill ? prefill_case(&s, ctx, n, p, &l, f16)
                                           : decode_case(&s, ctx, n, p, &l, f16);
                    if (!strcmp(*name, "f16")) f16 = us;
                    fflush(stdout);
                    free(s.memory);
                }
            }
}

static void usage(void) {
    fprintf(
        stderr,
        "usage: bench_attend [--quick] [--simd avx512|avx2|scalar] [--prefill] [--preset NAME] [--dim 64|128]"
        " [--gqa 1|4|8] [--context N] [--threads N]\n");
    exit(2);
}

static void only(uint32_t *list, const char *text, uint32_t most) {
    long x = atol(text);
    if (x < 1 || x > (long)most) usage();
    list[0] = (uint32_t)x;
    list[1] = 0;
}

int main(int argc, char **argv) {
    plan p = WHOLE;
    kvl_simd simd = KVL_SIMD_AUTO;
    bool prefill = false;
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (!strcmp(argv[i], "--quick")) {
            p = QUICK;
            continue;
        }
        if (!strcmp(argv[i], "--prefill")) {
            prefill = true;
            continue;
        }
        if (!value) usage();
        if (!strcmp(argv[i], "--simd"))
            simd = !strcmp(value, "scalar") ? KVL_SIMD_SCALAR
                   : !strcmp(value, "avx2") ? KVL_SIMD_AVX2
                                            : KVL_SIMD_AVX512;
        else if (!strcmp(argv[i], "--preset") && kvl_preset_find(value))
            p.presets[0] = value, p.presets[1] = NULL;
        else if (!strcmp(argv[i], "--dim") && atoi(value) % 16 == 0)
            only(p.dims, value, 128);
        else if (!strcmp(argv[i], "--gqa"))
            only(p.gqas, value, 8);
        else if (!strcmp(argv[i], "--context") && atoi(value) % T == 0)
            only(p.contexts, value, MAX_BLOCKS * T);
        else if (!strcmp(argv[i], "--threads"))
            only(p.threads, value, 64);
        else
            usage();
        i++;
    }
    p.prefill = prefill;
    printf("Attention, one layer, %d KV heads. Decode: one token; read: the same blocks read once; ceiling: "
           "share of the "
           "lesser of read and\n"
           "convert+multiply-add (target: f16 at 70%% or more); to f16: time over f16's (target: 1.0 or "
           "less, 1.2 at GQA "
           "8). Prefill:\n"
           "512 tokens, at the end of the context; ceiling: share of multiply-adds alone.\n",
           KV_HEADS);
    for (const uint32_t *threads = p.threads; *threads; threads++) {
        kvl_context *ctx;
        kvl_context_desc desc;
        memset(&desc, 0, sizeof desc);
        desc.backend = KVL_BACKEND_CPU;
        desc.simd = simd;
        desc.n_threads = *threads;
        if (kvl_context_create(&desc, &ctx) != KVL_OK) {
            fprintf(stderr, "bench_attend: no cpu context with this simd path\n");
            return 1;
        }
        printf("\n%s", kvl_context_backend(ctx));
        bench(ctx, &p);
        kvl_context_destroy(ctx);
    }
    return 0;
}
