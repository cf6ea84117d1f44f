/* bench_cuda: the CUDA backend on a GPU, as shares of what the same run measures of the device. See --help. */
#define KVL_IMPLEMENTATION
#include "kvlite.h"

#include "bench_rows.h"
#include "cuda_case.h"
#include "llm/options.h"

enum { EXIT_SKIPPED = 77, CEILING_BYTES = 1 << 30, LAUNCH_LAYERS = 32, LAUNCH_STEPS = 40 };

static const char usage[] =
    "usage: bench_cuda [options]\n"
    "\n"
    "Attention over a paged cache on a GPU, D 128, 8 KV heads, blocks of 32 tokens, q, k, v and out in F16 "
    "on\n"
    "the device, layers replayed as a CUDA graph, more KV in turn than the L2 cache holds. Before it the "
    "rate at\n"
    "which a kernel that does nothing else reads the memory: the ceiling.\n"
    "\n"
    "  --only LIST     of: ceiling, decode, prefill, store, copies, host, same (default: all)\n"
    "  --preset LIST   KV formats (default: f16 bf16 int8 int8+ fp8 balanced int4 nvfp4)\n"
    "  --quick         the cases with targets alone\n"
    "  --smoke         tiny cases: shows that all of it runs, the figures say nothing\n"
    "  --seconds N     begin no case of decode and prefill after so many seconds in all (default 600)\n"
    "  --list          the cases of decode and prefill, one a line: what preset batch context gqa rows\n"
    "  --device N      ordinal of the device (default 0)\n"
    "  --json FILE     also write the figures as JSON; - is stdout, the table then goes to stderr\n"
    "\n"
    "Status 77: there is no driver or no device. JSON: an object a line; its section is device, ceiling "
    "(gb_s), or\n"
    "  decode: preset, batch, context, gqa, layers, bytes (of a layer's KV with its scales), us (a layer, "
    "with\n"
    "          the append and the merge), gb_s, share (of the ceiling);\n"
    "  prefill: preset, batch, context, gqa, rows, us (with append and seal), tflop_s;\n"
    "  store: preset, us, gb_s (rows read, exact and sealed tiles written), share;\n"
    "  copies: what, us, gb_s (read and written together; over the bus: one way), share;\n"
    "  host: what, us or count, target;\n"
    "  same: preset, what, rows, equal;  left_out: case, why.\n";

typedef struct bench {
    gpu g;
    kvl_context *ctx;
    void *module;
    bench_out out;
    const char *json, *only, *presets;
    bool quick, smoke, list, help;
    uint64_t seconds, device;
    double start, ceiling; /* GB/s */
    size_t l2;
} bench;

static double slice_of(const bench *b) { return b->smoke ? 0 : 0.06; }
static uint64_t extra_of(const bench *b) { return b->smoke ? 48u << 20 : 768u << 20; }

/* ---- the cases ---- */

/* The large ones first, which have targets. One token of the context's last block is still to come, so that a step seals
 * nothing. */
static void decode_shapes(const bench *b, case_list *s) {
    static const struct {
        uint32_t batch, context;
    } all[] = {{64, 16384}, {16, 131072}, {256, 8192}, {256, 1024}, {1, 131072}, {16, 16384}, {1, 16384},
               {64, 4096},  {256, 4096},  {16, 4096},  {1, 4096},   {64, 1024},  {16, 1024},  {1, 1024},
               {4, 65536},  {64, 65536},  {4, 16384},  {4, 4096},   {4, 1024}};
    uint32_t n = b->smoke ? 1 : b->quick ? 3 : sizeof all / sizeof *all;
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t p = 0; p < CASE_PRESETS; p++)
            for (uint32_t gqa = 4; gqa <= 8; gqa += 4) {
                case_shape c = {case_presets[p], all[i].batch, all[i].context - CASE_T / 2, gqa, 1, 0};
                if (b->smoke) c.batch = 2, c.context = 80;
                if (!b->smoke || gqa == 4) case_list_add(s, b->presets, c);
            }
}

static void prefill_shapes(const bench *b, case_list *s) {
    static const struct {
        uint32_t batch, context, rows;
    } all[] = {{1, 0, 8192}, {1, 30720, 2048}, {4, 0, 2048}, {1, 0, 2048}, {1, 7680, 512}, {16, 0, 512}};
    uint32_t n = b->smoke ? 1 : b->quick ? 2 : sizeof all / sizeof *all;
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t p = 0; p < CASE_PRESETS; p++) {
            case_shape c = {case_presets[p], all[i].batch, all[i].context, 4, all[i].rows, 0};
            if (b->smoke) c.batch = 1, c.context = 32, c.rows = 40;
            case_list_add(s, b->presets, c);
        }
}

static void shape_name(const char *what, const case_shape *c, char *name, size_t n) {
    snprintf(name, n, "%s %s %u %u %u %u", what, c->preset, c->batch, c->context, c->gqa, c->rows);
}

/* ---- the ceiling, and kernels by themselves ---- */

static void *load_image(const bench *b) {
    uint32_t arch = (uint32_t)(10 * gpu_attribute(&b->g, GPU_MAJOR) + gpu_attribute(&b->g, GPU_MINOR));
    const kvli_cu_part *part =
        kvli_cu_find_part(kvli_cu_parts, sizeof kvli_cu_parts / sizeof kvli_cu_parts[0], arch);
    uint8_t *image = malloc(part ? (size_t)part->before + part->raw_bytes : 1);
    uint16_t *probs = malloc(KVLI_CU_UNPACK_PROBS * sizeof *probs);
    void *module = NULL;
    if (part && image && probs && kvli_cu_unpack_part(kvli_cu_image, part, image, probs))
        GPU(&b->g, ModuleLoadData, &module, image + part->before);
    free(probs);
    free(image);
    return module;
}

static void *kernel(const bench *b, const char *name) {
    void *f = NULL;
    GPU(&b->g, ModuleGetFunction, &f, b->module, name);
    return f;
}

/* Seconds of one launch, of as many as take some time, the middle one of three. */
static double time_launches(const bench *b, void (*launch)(const bench *, void *), void *arg) {
    rounds r = {.n = 0};
    launch(b, arg);
    gpu_sync(&b->g);
    for (uint32_t n = 1; r.n < 3;) {
        double start = runtime_now();
        for (uint32_t i = 0; i < n; i++) launch(b, arg);
        gpu_sync(&b->g);
        double s = runtime_now() - start;
        if (s >= slice_of(b) / 3 || n >= 1u << 16)
            rounds_add(&r, s / n);
        else
            n *= 2;
    }
    return rounds_spread(&r).median;
}

typedef struct launch {
    void *function;
    uint32_t grid[3], threads, shared;
    void *args;
} launch;

static void launch_one(const bench *b, void *arg) {
    const launch *l = arg;
    gpu_launch(&b->g, l->function, l->grid[0], l->grid[1], l->grid[2], l->threads, l->shared, l->args);
}

static void measure_ceiling(bench *b) {
    size_t bytes = b->smoke ? 1 << 20 : CEILING_BYTES;
    gpu_ptr data = gpu_alloc(&b->g, bytes), sum = gpu_alloc(&b->g, 16);
    kvli_cu_read_args args = {.src = data, .bytes = bytes, .sum = (uint32_t *)(uintptr_t)sum};
    uint32_t sms = (uint32_t)gpu_attribute(&b->g, GPU_SMS);
    double best = 0;
    for (uint32_t each = 4; each <= 16; each *= 2) { /* blocks of threads a multiprocessor */
        launch l = {kernel(b, "kvl_read"), {b->smoke ? 2 : sms * each, 1, 1}, KVLI_CU_COPY_THREADS, 0, &args};
        double rate = (double)bytes / time_launches(b, launch_one, &l) * 1e-9;
        if (rate > best) best = rate;
    }
    gpu_free(&b->g, data);
    gpu_free(&b->g, sum);
    b->ceiling = best;
    fprintf(b->out.table, "ceiling: reading alone %.0f GB/s\n", best);
    row_begin(&b->out, "ceiling");
    row_number(&b->out, "gb_s", best);
    row_end(&b->out);
}

/* ---- decode and prefill ---- */

static uint32_t layers_for(const bench *b, const case_shape *c) {
    uint64_t one = case_block_bytes(c, 1);
    uint64_t n = b->smoke ? 2 : (4 * (uint64_t)b->l2 + one - 1) / one;
    return n < 1 ? 1 : n > CASE_LAYERS ? CASE_LAYERS : (uint32_t)n;
}

static void measure_case(bench *b, const char *what, const case_shape *shape) {
    char name[96], err[LLM_ERR_LEN] = "";
    case_cache c;
    bool decode = strcmp(what, "decode") == 0;
    shape_name(what, shape, name, sizeof name);
    if (runtime_now() - b->start > (double)b->seconds) {
        leave_out(&b->out, name, "time is over (--seconds)");
        return;
    }
    if (!case_open(&c, &b->g, b->ctx, shape, decode ? layers_for(b, shape) : 1, extra_of(b), err,
                   sizeof err)) {
        leave_out(&b->out, name, err);
        case_close(&c);
        return;
    }
    double s = case_time(&c, slice_of(b));
    row_begin(&b->out, what);
    row_text(&b->out, "preset", shape->preset);
    row_number(&b->out, "batch", shape->batch);
    row_number(&b->out, "context", shape->context);
    row_number(&b->out, "gqa", shape->gqa);
    if (decode) {
        row_number(&b->out, "layers", c.n_layers);
        row_number(&b->out, "bytes", (double)c.bytes);
        case_row_rate(&b->out, (double)c.bytes, s, b->ceiling);
        fprintf(b->out.table, "%-34s %10.1f us %8.0f GB/s  %5.1f%%\n", name, s * 1e6,
                (double)c.bytes / s * 1e-9, (double)c.bytes / s * 1e-7 / b->ceiling);
    } else {
        double seen = (double)shape->rows * shape->context + (double)shape->rows * (shape->rows + 1) / 2;
        double flop = 4.0 * CASE_DIM * CASE_KV_HEADS * shape->gqa * seen * shape->batch;
        row_number(&b->out, "rows", shape->rows);
        row_number(&b->out, "us", s * 1e6);
        row_number(&b->out, "tflop_s", flop / s * 1e-12);
        fprintf(b->out.table, "%-34s %10.1f us %8.1f TFLOP/s\n", name, s * 1e6, flop / s * 1e-12);
    }
    row_end(&b->out);
    case_close(&c);
}

/* ---- store and copies ---- */

static kvli_cu_tensor rows_at(gpu_ptr at) {
    return (kvli_cu_tensor){.data = at,
                            .row_stride = CASE_KV_HEADS * CASE_DIM,
                            .head_stride = CASE_DIM,
                            .dtype = KVLI_GPU_DTYPE_F16};
}

/* Whole blocks of F16 rows written as exact tiles and sealed. */
static void measure_store(bench *b, const char *name) {
    const kvl_preset *p = kvl_preset_find(name);
    const case_shape shape = {.preset = name, .batch = 1, .context = 1, .gqa = 1, .rows = 1};
    uint32_t n = b->smoke ? 2 : 2048;
    kvl_block_layout l[2];
    case_layouts(&shape, 1, l);
    bool seals = l[0].block_bytes != l[1].block_bytes;
    gpu_ptr blocks[2] = {gpu_alloc(&b->g, n * l[0].block_bytes), gpu_alloc(&b->g, n * l[1].block_bytes)};
    size_t n_rows = (size_t)n * CASE_T * CASE_KV_HEADS * CASE_DIM;
    gpu_ptr k = case_tensor(&b->g, n_rows), v = case_tensor(&b->g, n_rows), taint = gpu_alloc(&b->g, 4);
    kvli_gpu_store *stores = calloc(n, sizeof *stores);
    for (uint32_t i = 0; stores && i < n; i++)
        stores[i] = (kvli_gpu_store){.exact = (blocks[1] + i * l[1].block_bytes) | KVLI_GPU_EXACT,
                                     .sealed = seals ? blocks[0] + i * l[0].block_bytes : 0,
                                     .row = i * CASE_T,
                                     .n_rows = CASE_T};
    kvli_gpu_counts counts = {.stores = n};
    gpu_ptr there = gpu_uploaded(&b->g, stores, n * sizeof *stores),
            count = gpu_uploaded(&b->g, &counts, sizeof counts);
    kvli_cu_store_args args = {.counts = (const kvli_gpu_counts *)(uintptr_t)count,
                               .stores = (const kvli_gpu_store *)(uintptr_t)there,
                               .taint = (uint32_t *)(uintptr_t)taint,
                               .k = rows_at(k),
                               .v = rows_at(v),
                               .pages = {.head_stride = {l[0].head_stride, l[1].head_stride},
                                         .v_offset = {l[0].v_offset, l[1].v_offset}},
                               .block_tokens = CASE_T,
                               .k_dim = CASE_DIM,
                               .v_dim = CASE_DIM,
                               .exact = (uint32_t)p->exact,
                               .k_format = (uint32_t)(p->k & ~(kvl_format)KVL_ROTATED),
                               .v_format = (uint32_t)(p->v & ~(kvl_format)KVL_ROTATED),
                               .k_rotated = (p->k & KVL_ROTATED) != 0,
                               .v_rotated = (p->v & KVL_ROTATED) != 0,
                               .k_global = 1.0f / 16,
                               .v_global = 1.0f / 16};
    launch one = {
        kernel(b, "kvl_store"), {n, CASE_KV_HEADS, 2}, KVLI_CU_STORE_THREADS, KVLI_CU_STORE_SMEM, &args};
    double s = time_launches(b, launch_one, &one);
    uint64_t tile =
        2 * CASE_T * CASE_DIM * 2 + 2 * case_tile_bytes(p->exact, CASE_DIM); /* k and v rows; exact tiles */
    if (seals) tile += case_tile_bytes(p->k, CASE_DIM) + case_tile_bytes(p->v, CASE_DIM);
    double bytes = (double)tile * CASE_KV_HEADS * n;
    row_begin(&b->out, "store");
    row_text(&b->out, "preset", name);
    case_row_rate(&b->out, bytes, s, b->ceiling);
    row_end(&b->out);
    fprintf(b->out.table, "store %-28s %10.1f us %8.0f GB/s\n", name, s * 1e6, bytes / s * 1e-9);
    free(stores);
    const gpu_ptr all[] = {blocks[0], blocks[1], k, v, taint, there, count};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) gpu_free(&b->g, all[i]);
}

static void add_copy(bench *b, const char *what, double bytes, double s, bool on_device) {
    row_begin(&b->out, "copies");
    row_text(&b->out, "what", what);
    row_number(&b->out, "us", s * 1e6);
    row_number(&b->out, "gb_s", bytes / s * 1e-9);
    if (on_device && b->ceiling > 0) row_number(&b->out, "share", bytes / s * 1e-9 / b->ceiling);
    row_end(&b->out);
    fprintf(b->out.table, "%-34s %10.1f us %8.1f GB/s\n", what, s * 1e6, bytes / s * 1e-9);
}

typedef struct bus_copy {
    gpu_ptr device;
    void *host;
    size_t bytes;
    bool up;
} bus_copy;

static void bus_one(const bench *b, void *arg) {
    const bus_copy *c = arg;
    if (c->up)
        GPU(&b->g, MemcpyHtoD, c->device, c->host, c->bytes, b->g.stream);
    else
        GPU(&b->g, MemcpyDtoH, c->host, c->device, c->bytes, b->g.stream);
}

/* Whole blocks, from anywhere to anywhere: what copy on write, compaction, gather and scatter are. */
static void measure_copies(bench *b) {
    const size_t block = 128 << 10; /* an F16 block of one layer here */
    uint32_t n = b->smoke ? 2 : 2048;
    gpu_ptr data = gpu_alloc(&b->g, 2 * n * block);
    kvli_gpu_copy *copies = calloc(n, sizeof *copies);
    for (uint32_t i = 0; copies && i < n; i++) /* neighbours go far apart */
        copies[i] = (kvli_gpu_copy){data + (n + (uint64_t)i * 769 % n) * block, data + i * block, block};
    gpu_ptr there = gpu_uploaded(&b->g, copies, n * sizeof *copies);
    kvli_cu_copy_args args = {.copies = (const kvli_gpu_copy *)(uintptr_t)there, .n_copies = n};
    launch one = {kernel(b, "kvl_copy"), {n, 4, 1}, KVLI_CU_COPY_THREADS, 0, &args};
    add_copy(b, "blocks of 128 KiB on the device", 2.0 * (double)(n * block),
             time_launches(b, launch_one, &one), true);
    bus_copy bus = {.device = data, .bytes = n * block};
    GPU(&b->g, MemHostAlloc, &bus.host, bus.bytes, 0);
    for (int up = 0; up < 2; up++) {
        bus.up = up;
        add_copy(b, up ? "pinned memory to the device" : "the device to pinned memory", (double)bus.bytes,
                 time_launches(b, bus_one, &bus), false);
    }
    GPU(&b->g, MemFreeHost, bus.host);
    gpu_free(&b->g, data);
    gpu_free(&b->g, there);
    free(copies);
}

/* ---- the host's part ---- */

static void add_host(bench *b, const char *what, const char *unit, double value, double target) {
    row_begin(&b->out, "host");
    row_text(&b->out, "what", what);
    row_number(&b->out, unit, value);
    if (target > 0) row_number(&b->out, "target", target);
    row_end(&b->out);
    fprintf(b->out.table, "%-44s %9.2f %s\n", what, value, unit);
}

typedef struct host_times {
    rounds plan, first, layer, replay, commit; /* us */
    size_t nodes;
} host_times;

typedef struct host_case {
    case_cache c; /* without sequences of its own */
    kvl_sched *sched;
    uint32_t n;
    int32_t next[CASE_BATCH * 2];
    void *exec;
    uint64_t key;
} host_case;

static void host_open(bench *b, host_case *h) {
    char err[LLM_ERR_LEN] = "";
    int32_t prompt[64];
    const uint32_t n_layers = b->smoke ? 2 : LAUNCH_LAYERS, heads = CASE_KV_HEADS * CASE_DIM;
    *h = (host_case){.n = b->smoke ? 4 : CASE_BATCH};
    h->c =
        (case_cache){.g = &b->g, .n_layers = n_layers, .shape = {"int8", h->n, 64 + LAUNCH_STEPS * 3, 4, 1}};
    kvl_cache_desc d = {.context = b->ctx,
                        .geometry = case_geometry(&h->c.shape, n_layers),
                        .device_bytes = case_block_bytes(&h->c.shape, n_layers) + extra_of(b),
                        .max_sequences = h->n,
                        .max_seq_tokens = 1024,
                        .max_step_tokens = 512,
                        .no_prefix_cache = true,
                        .device_tensors = true,
                        .error = err,
                        .error_size = sizeof err};
    if (kvl_cache_create(&d, &h->c.cache) != KVL_OK) {
        fprintf(stderr, "bench_cuda: %s\n", err);
        exit(1);
    }
    case_must(&h->c, kvl_sched_create(h->c.cache, NULL, &h->sched), "kvl_sched_create");
    for (uint32_t i = 0; i < h->n; i++) {
        for (int j = 0; j < 64; j++) prompt[j] = (int32_t)i * 31 + j;
        kvl_request r = {.tokens = prompt, .n_tokens = 33, .max_new_tokens = 900};
        kvl_req handle;
        case_must(&h->c, kvl_sched_submit(h->sched, &r, &handle), "kvl_sched_submit");
    }
    h->c.q = case_tensor(&b->g, 512 * heads * 4);
    h->c.k = case_tensor(&b->g, 512 * heads);
    h->c.v = case_tensor(&b->g, 512 * heads);
    h->c.out = gpu_alloc(&b->g, 512 * heads * 4 * 2);
}

static double us_since(double *start) {
    double now = runtime_now(), us = (now - *start) * 1e6;
    *start = now;
    return us;
}

/* One step of the scheduler: its times where it is one of all sequences, `replay`: by the graph of a step before it where
 * the key is equal. */
static bool host_step(host_case *h, host_times *t, bool replay) {
    const kvl_step *step;
    double at = runtime_now();
    case_must(&h->c, kvl_sched_plan(h->sched, &step), "kvl_sched_plan");
    double plan = us_since(&at), first = 0, layers = 0;
    bool all = step->n_logits == h->n && step->n_tokens == h->n;
    if (replay && all && h->key != step->graph_key) {
        if (h->exec) GPU(h->c.g, GraphExecDestroy, h->exec);
        h->exec = case_capture(&h->c, step, &t->nodes);
        h->key = step->graph_key;
        GPU(h->c.g, GraphLaunch, h->exec, h->c.g->stream);
        all = false;
    } else if (replay && all) {
        GPU(h->c.g, GraphLaunch, h->exec, h->c.g->stream);
        case_must(&h->c, kvl_step_replayed(h->c.cache, step), "kvl_step_replayed");
        rounds_add(&t->replay, us_since(&at));
    } else {
        case_attend(&h->c, step, 0);
        first = us_since(&at);
        for (uint32_t l = 1; l < h->c.n_layers; l++) case_attend(&h->c, step, l);
        layers = us_since(&at) / (h->c.n_layers - 1);
    }
    gpu_sync(h->c.g);
    at = runtime_now();
    case_must(&h->c, kvl_sched_commit(h->sched, step, h->next), "kvl_sched_commit");
    if (!all) return false;
    rounds_add(&t->commit, us_since(&at));
    rounds_add(&t->plan, plan);
    if (replay) return true;
    rounds_add(&t->first, first);
    rounds_add(&t->layer, layers);
    return true;
}

static void measure_host(bench *b) {
    host_case h;
    host_times plain = {.nodes = 0}, graph = {.nodes = 0};
    uint32_t n = b->smoke ? 3 : BENCH_MAX_ROUNDS;
    host_open(b, &h);
    for (uint32_t i = 0; i < 400 && plain.layer.n < n; i++) host_step(&h, &plain, false);
    for (uint32_t i = 0; i < 400 && graph.replay.n < n; i++) host_step(&h, &graph, true);
    double layer = rounds_spread(&plain.layer).median, first = rounds_spread(&plain.first).median;
    double upload = first > layer ? first - layer : 0;
    char what[80];
    add_host(b, "a layer's call, enqueued", "us", layer, 12);
    add_host(b, "nodes of a layer in a captured graph", "count", (double)graph.nodes / h.c.n_layers, 2);
    snprintf(what, sizeof what, "plan and upload of a step of %u sequences", h.n);
    add_host(b, what, "us", rounds_spread(&plain.plan).median + upload, 60);
    add_host(b, "commit of it", "us", rounds_spread(&plain.commit).median, 0);
    snprintf(what, sizeof what, "a step of %u layers without a graph", h.c.n_layers);
    add_host(b, what, "us", rounds_spread(&plain.plan).median + first + layer * (h.c.n_layers - 1), 0);
    add_host(b, "the same by replaying a graph", "us",
             rounds_spread(&graph.plan).median + rounds_spread(&graph.replay).median, 0);
    if (h.exec) GPU(&b->g, GraphExecDestroy, h.exec);
    kvl_sched_destroy(h.sched);
    case_close(&h.c);
}

static void measure_same(bench *b, const char *preset, uint32_t rows) {
    const case_shape s = {preset, b->smoke ? 2 : 16, b->smoke ? 64 : 3000, 4, rows, 0};
    case_measure_same(&b->out, &b->g, b->ctx, &s, extra_of(b));
}

/* ---- the command line ---- */

static bool parse(bench *b, int argc, char **argv, char *err, size_t n) {
    args a = {.argc = argc, .argv = argv, .i = 1};
    b->seconds = 600;
    while (args_next(&a, err, n)) {
        bool ok = true;
        if (args_is(&a, "--json"))
            ok = args_value(&a, &b->json, err, n);
        else if (args_is(&a, "--only"))
            ok = args_value(&a, &b->only, err, n);
        else if (args_is(&a, "--preset"))
            ok = args_value(&a, &b->presets, err, n);
        else if (args_is(&a, "--seconds"))
            ok = args_u64(&a, 1, 100000, &b->seconds, err, n);
        else if (args_is(&a, "--device"))
            ok = args_u64(&a, 0, 1000, &b->device, err, n);
        else if (args_is(&a, "--quick"))
            b->quick = true;
        else if (args_is(&a, "--smoke"))
            b->smoke = true;
        else if (args_is(&a, "--list"))
            b->list = true;
        else if (args_is(&a, "-h") || args_is(&a, "--help"))
            b->help = true;
        else
            ok = llm_fail(err, n, "option '%s' is unknown", a.name);
        if (!ok) return false;
    }
    return !err[0];
}

static void describe_device(bench *b) {
    char capability[16];
    size_t memory = 0;
    GPU(&b->g, DeviceTotalMem, &memory, b->g.device);
    b->l2 = (size_t)gpu_attribute(&b->g, GPU_L2);
    snprintf(capability, sizeof capability, "%d.%d", gpu_attribute(&b->g, GPU_MAJOR),
             gpu_attribute(&b->g, GPU_MINOR));
    fprintf(b->out.table, "%s, compute capability %s, driver for CUDA %d.%d\n", b->g.name, capability,
            b->g.driver / 1000, b->g.driver % 1000 / 10);
    row_begin(&b->out, "device");
    row_bool(&b->out, "smoke", b->smoke);
    row_text(&b->out, "name", b->g.name);
    row_number(&b->out, "driver", b->g.driver);
    row_text(&b->out, "capability", capability);
    row_number(&b->out, "sms", gpu_attribute(&b->g, GPU_SMS));
    row_number(&b->out, "clock_mhz", gpu_attribute(&b->g, GPU_CLOCK_KHZ) / 1000);
    row_number(&b->out, "memory_mhz", gpu_attribute(&b->g, GPU_MEM_CLOCK_KHZ) / 1000);
    row_number(&b->out, "bus_bits", gpu_attribute(&b->g, GPU_BUS_BITS));
    row_number(&b->out, "l2_bytes", (double)b->l2);
    row_number(&b->out, "memory_bytes", (double)memory);
    row_end(&b->out);
}

static bool open_backend(bench *b, char *err, size_t n) {
    kvl_context_desc d = {.backend = KVL_BACKEND_CUDA,
                          .cuda_context = b->g.context,
                          .cuda_stream = b->g.stream,
                          .error = err,
                          .error_size = n};
    return kvl_context_create(&d, &b->ctx) == KVL_OK;
}

static void measure_all(bench *b) {
    static case_list decode, prefill;
    decode_shapes(b, &decode);
    prefill_shapes(b, &prefill);
    b->module = load_image(b);
    if (in_list(b->only, "ceiling")) measure_ceiling(b);
    if (in_list(b->only, "host")) measure_host(b);
    if (in_list(b->only, "copies")) measure_copies(b);
    for (uint32_t p = 0; p < CASE_PRESETS; p++) {
        if (!in_list(b->presets, case_presets[p])) continue;
        if (in_list(b->only, "same")) measure_same(b, case_presets[p], 1);
        if (in_list(b->only, "same")) measure_same(b, case_presets[p], 33);
        if (in_list(b->only, "store")) measure_store(b, case_presets[p]);
    }
    for (uint32_t i = 0; in_list(b->only, "prefill") && i < prefill.n; i++)
        measure_case(b, "prefill", &prefill.at[i]);
    for (uint32_t i = 0; in_list(b->only, "decode") && i < decode.n; i++)
        measure_case(b, "decode", &decode.at[i]);
}

static void list_cases(const bench *b) {
    static case_list all[2];
    char name[96];
    decode_shapes(b, &all[0]);
    prefill_shapes(b, &all[1]);
    for (int i = 0; i < 2; i++)
        for (uint32_t j = 0; j < all[i].n; j++) {
            shape_name(i ? "prefill" : "decode", &all[i].at[j], name, sizeof name);
            puts(name);
        }
}

int main(int argc, char **argv) {
    char err[LLM_ERR_LEN] = "";
    static bench b;
    if (!parse(&b, argc, argv, err, sizeof err)) {
        fprintf(stderr, "bench_cuda: %s (--help tells more)\n", err);
        return 2;
    }
    if (b.help) return fputs(usage, stdout) < 0;
    if (b.list) return list_cases(&b), 0;
    b.start = runtime_now();
    if (!gpu_open(&b.g, (int)b.device, err, sizeof err)) {
        printf("SKIP bench_cuda: %s\n", err);
        return EXIT_SKIPPED;
    }
    if (!open_backend(&b, err, sizeof err)) {
        fprintf(stderr, "bench_cuda: %s: %s\n", b.g.name, err);
        return 1;
    }
    if (!rows_open(&b.out, b.json)) {
        fprintf(stderr, "bench_cuda: --json %.100s: could not be written\n", b.json);
        return 1;
    }
    describe_device(&b);
    measure_all(&b);
    bool ok = rows_close(&b.out);
    if (!ok) fprintf(stderr, "bench_cuda: --json %.100s: could not be written\n", b.json);
    if (b.module) GPU(&b.g, ModuleUnload, b.module);
    kvl_context_destroy(b.ctx);
    gpu_close(&b.g);
    return !ok;
}
