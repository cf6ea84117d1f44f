/* bench_vulkan: the Vulkan backend on a device, as shares of what the same run measures of that device. See --help. */
#define KVL_IMPLEMENTATION
#include "kvlite.h"

#include "bench_rows.h"
#include "vulkan_case.h"
#include "llm/options.h"

enum { EXIT_SKIPPED = 77, STORES = 512, COPIES = 512, COPY_BYTES = 128 << 10 };

static const char usage[] =
    "usage: bench_vulkan [options]\n"
    "\n"
    "Attention over a paged cache on a Vulkan device that is lent to kvlite, 8 KV heads, blocks of 32 "
    "tokens, q, k, v and out\n"
    "in F16 on the device, layers recorded once and submitted again. Before it the rate at which a shader "
    "that does nothing\n"
    "else reads the memory: the ceiling. Times are the least of several rounds. On a driver that runs on the "
    "CPU the cases are\n"
    "small, and what the processor's own cache holds is read from there.\n"
    "\n"
    "  --only LIST     of: ceiling, decode, prefill, store, copies, host, same (default: all)\n"
    "  --preset LIST   KV formats (default: f16 bf16 int8 int8+ fp8 balanced int4 nvfp4)\n"
    "  --quick         the cases with targets alone\n"
    "  --smoke         tiny cases: shows that all of it runs, the figures say nothing\n"
    "  --without LIST  of: fp16 storage16 subgroup: not to be used though the device has it\n"
    "  --seconds N     begin no case of decode and prefill after so many seconds in all (default 600)\n"
    "  --device N      number of the device (default: the best one)\n"
    "  --json FILE     also write the figures as JSON; - is stdout, the table then goes to stderr\n"
    "\n"
    "Status 77: there is no loader, driver or device. JSON: an object a line; its section is device, ceiling "
    "(gb_s), or\n"
    "  decode: preset, batch, context, gqa, dim, layers, bytes (of a layer's KV with its scales), us (a "
    "layer, with the append\n"
    "          and the merge), gb_s, share (of the ceiling), of_f16 (its time over that of F16), ggml_us and "
    "of_ggml (its time\n"
    "          over that of ggml's Vulkan backend, which was measured once, on lavapipe, with 2 cores);\n"
    "  prefill: preset, batch, context, gqa, dim, rows, us (with append and seal), tflop_s, of_f16;\n"
    "  store: preset, us, gb_s (rows read, exact and sealed tiles written), share;\n"
    "  copies: what, us, gb_s (read and written together), share;  host: what, us;\n"
    "  same: preset, what, rows, equal;  left_out: case, why.\n";

typedef struct bench {
    vk v;
    kvl_context *ctx;
    bench_out out;
    const char *json, *only, *presets;
    bool quick, smoke, help, cpu;
    uint64_t seconds;
    uint32_t device, without;
    double start, ceiling; /* GB/s */
} bench;

static double slice_of(const bench *b) { return b->smoke ? 0 : b->cpu ? 0.3 : 0.1; }

/* ---- shaders by themselves ---- */

/* The variant that the backend takes where the device has all that it may use. */
static const kvli_vk_shader *find_shader(const bench *b, const char *name) {
    const kvli_vk_shader *found = NULL;
    for (size_t i = 0; i < sizeof kvli_vk_shaders / sizeof *kvli_vk_shaders; i++) {
        const kvli_vk_shader *s = &kvli_vk_shaders[i];
        if (strcmp(s->name, name) != 0 || s->variant & ~(b->v.features & ~b->without)) continue;
        if (!found || s->variant > found->variant) found = s;
    }
    if (!found) fprintf(stderr, "bench_vulkan: there is no shader %s\n", name), exit(1);
    return found;
}

static void spec_of(const bench *b, const char *preset, uint32_t workgroup,
                    uint32_t spec[KVLI_VK_SPECIALISATIONS]) {
    const kvl_preset *p = kvl_preset_find(preset);
    const kvl_format rotated = KVL_ROTATED;
    (void)b;
    memset(spec, 0, KVLI_VK_SPECIALISATIONS * sizeof *spec);
    spec[KVLI_VK_WORKGROUP] = workgroup;
    spec[KVLI_VK_BANKS] = VK_BANKS;
    spec[KVLI_VK_K_FORMAT] = (uint32_t)(p->k & ~rotated);
    spec[KVLI_VK_V_FORMAT] = (uint32_t)(p->v & ~rotated);
    spec[KVLI_VK_EXACT_FORMAT] = (uint32_t)p->exact;
    spec[KVLI_VK_ROTATED] = (p->k & rotated ? 1 : 0) | (p->v & rotated ? 2 : 0);
    spec[KVLI_VK_DIM] = CASE_DIM;
    spec[KVLI_VK_BLOCK_TOKENS] = CASE_T;
    spec[KVLI_VK_ROWS] = 4;
    spec[KVLI_VK_LANES] = 4;
}

/* Seconds of one dispatch of x × y × z workgroups. */
static double time_shader(const bench *b, const vk_shader *s, const kvli_vk_push *push, uint32_t x,
                          uint32_t y, uint32_t z) {
    kvli_vk_commands commands = vk_begin(&b->v);
    vk_barrier(&b->v, commands);
    vk_dispatch(&b->v, commands, s, push, x, y, z);
    VK(&b->v, end, commands);
    double seconds = vk_time(&b->v, commands, slice_of(b));
    b->v.free_commands(b->v.device, b->v.pool, 1, &commands);
    return seconds;
}

static uint64_t ceiling_bytes(const bench *b) {
    uint64_t most = b->smoke ? 1u << 20 : b->cpu ? 64u << 20 : 1u << 30;
    uint64_t range = b->v.about.limits.storage_range;
    return (most < range ? most : range) & ~(uint64_t)0xffff;
}

static void measure_ceiling(bench *b) {
    uint32_t spec[KVLI_VK_SPECIALISATIONS];
    uint64_t bytes = ceiling_bytes(b);
    vk_buffer data = vk_alloc(&b->v, bytes, false), sum = vk_alloc(&b->v, 256, false);
    kvli_vk_buffer bound[VK_BOUND];
    for (int i = 0; i < VK_BOUND; i++) bound[i] = sum.buffer;
    bound[VK_BOUND_PAGES] = data.buffer;
    kvli_vk_push push = {.n = (uint32_t)(bytes / 16)};
    for (uint32_t workgroup = b->v.subgroup < 32 ? b->v.subgroup : 64; workgroup <= 256;
         workgroup *= b->cpu ? 4 : 2) {
        vk_shader s;
        spec_of(b, "f16", workgroup, spec);
        vk_shader_make(&b->v, &s, find_shader(b, "read"), spec, bound);
        for (uint32_t groups = b->cpu ? 16 : 512; groups <= (b->cpu ? 64u : 8192u); groups *= 4) {
            double rate = (double)bytes / time_shader(b, &s, &push, groups, 1, 1) * 1e-9;
            if (rate > b->ceiling) b->ceiling = rate;
        }
        vk_shader_free(&b->v, &s);
    }
    vk_free(&b->v, data);
    vk_free(&b->v, sum);
    fprintf(b->out.table, "ceiling: reading alone %.1f GB/s\n", b->ceiling);
    row_begin(&b->out, "ceiling");
    row_number(&b->out, "gb_s", b->ceiling);
    row_end(&b->out);
}

/* ---- store and copies ---- */

/* Whole blocks of F16 rows written as exact tiles and sealed. */
static void measure_store(bench *b, const char *name) {
    const kvl_preset *p = kvl_preset_find(name);
    const case_shape shape = {.preset = name, .batch = 1, .context = 1, .gqa = 1, .rows = 1};
    const uint32_t n = b->smoke ? 2 : b->cpu ? 32 : STORES, width = CASE_KV_HEADS * CASE_DIM;
    kvl_block_layout l[2];
    kvli_gpu_store stores[STORES];
    uint32_t spec[KVLI_VK_SPECIALISATIONS];
    vk_shader s;
    case_layouts(&shape, 1, l);
    bool seals = l[0].block_bytes != l[1].block_bytes;
    uint64_t exact = n * l[1].block_bytes;
    vk_buffer blocks = vk_alloc(&b->v, exact + n * l[0].block_bytes, false),
              taint = vk_alloc(&b->v, 256, false);
    vk_buffer k = case_tensor(&b->v, (size_t)n * CASE_T * width),
              v = case_tensor(&b->v, (size_t)n * CASE_T * width);
    for (uint32_t i = 0; i < n; i++)
        stores[i] = (kvli_gpu_store){.exact = i * l[1].block_bytes | KVLI_GPU_EXACT | (uint64_t)1 << 32,
                                     .sealed = seals ? (exact + i * l[0].block_bytes) | (uint64_t)1 << 32 : 0,
                                     .row = i * CASE_T,
                                     .n_rows = CASE_T};
    kvli_vk_layer layer = {.k_global = 1.0f / 16, .v_global = 1.0f / 16};
    for (int e = 0; e < 2; e++)
        layer.head_stride[e] = (uint32_t)l[e].head_stride / 16,
        layer.v_offset[e] = (uint32_t)l[e].v_offset / 16;
    vk_buffer tables = case_uploaded(&b->v, stores, n * sizeof *stores),
              layers = case_uploaded(&b->v, &layer, sizeof layer);
    kvli_vk_buffer bound[VK_BOUND];
    for (int i = 0; i < VK_BOUND; i++) bound[i] = blocks.buffer;
    bound[VK_BOUND_TABLES] = tables.buffer;
    bound[VK_BOUND_LAYERS] = layers.buffer;
    bound[VK_BOUND_TAINT] = taint.buffer;
    bound[VK_BOUND_A] = k.buffer;
    bound[VK_BOUND_B] = v.buffer;
    const kvli_vk_tensor rows = {.row_stride = width, .head_stride = CASE_DIM, .dtype = KVLI_GPU_DTYPE_F16};
    kvli_vk_push push = {
        .a = rows, .b = rows, .n = n, .n_kv_heads = CASE_KV_HEADS, .n_q_heads = CASE_KV_HEADS, .gqa = 1};
    spec_of(b, name, b->cpu ? 64 : 128, spec);
    vk_shader_make(&b->v, &s, find_shader(b, "store"), spec, bound);
    double seconds = time_shader(b, &s, &push, n, CASE_KV_HEADS, 2);
    uint64_t tile =
        2 * CASE_T * CASE_DIM * 2 + 2 * case_tile_bytes(p->exact, CASE_DIM); /* rows; exact tiles */
    if (seals) tile += case_tile_bytes(p->k, CASE_DIM) + case_tile_bytes(p->v, CASE_DIM);
    double bytes = (double)tile * CASE_KV_HEADS * n;
    row_begin(&b->out, "store");
    row_text(&b->out, "preset", name);
    case_row_rate(&b->out, bytes, seconds, b->ceiling);
    row_end(&b->out);
    fprintf(b->out.table, "store %-28s %10.1f us %8.1f GB/s\n", name, seconds * 1e6, bytes / seconds * 1e-9);
    vk_shader_free(&b->v, &s);
    const vk_buffer all[] = {blocks, taint, k, v, tables, layers};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) vk_free(&b->v, all[i]);
}

static void add_copy(bench *b, const char *what, double bytes, double s) {
    row_begin(&b->out, "copies");
    row_text(&b->out, "what", what);
    case_row_rate(&b->out, bytes, s, b->ceiling);
    row_end(&b->out);
    fprintf(b->out.table, "%-34s %10.1f us %8.1f GB/s\n", what, s * 1e6, bytes / s * 1e-9);
}

static double time_buffer_copy(const bench *b, vk_buffer to, vk_buffer from, uint64_t bytes) {
    kvli_vk_commands commands = vk_begin(&b->v);
    kvli_vk_copy copy = {.bytes = bytes};
    vk_barrier(&b->v, commands);
    b->v.f.copy_buffer(commands, from.buffer, to.buffer, 1, &copy);
    VK(&b->v, end, commands);
    double s = vk_time(&b->v, commands, slice_of(b));
    b->v.free_commands(b->v.device, b->v.pool, 1, &commands);
    return s;
}

/* Whole blocks, from anywhere to anywhere: what copy on write, compaction, gather and scatter are. */
static void measure_copies(bench *b) {
    const uint32_t n = b->smoke ? 2 : b->cpu ? 64 : COPIES, half = n * COPY_BYTES;
    kvli_gpu_copy copies[COPIES];
    uint32_t spec[KVLI_VK_SPECIALISATIONS];
    vk_shader s;
    vk_buffer data = vk_alloc(&b->v, 2 * (uint64_t)half, false), host = vk_alloc(&b->v, half, true);
    for (uint32_t i = 0; i < n; i++) /* neighbours go far apart */
        copies[i] =
            (kvli_gpu_copy){(uint64_t)half + i * 769 % n * COPY_BYTES, (uint64_t)i * COPY_BYTES, COPY_BYTES};
    vk_buffer tables = case_uploaded(&b->v, copies, n * sizeof *copies);
    kvli_vk_buffer bound[VK_BOUND];
    for (int i = 0; i < VK_BOUND; i++) bound[i] = data.buffer;
    bound[VK_BOUND_TABLES] = tables.buffer;
    spec_of(b, "f16", b->cpu ? 64 : 128, spec);
    vk_shader_make(&b->v, &s, find_shader(b, "copy"), spec, bound);
    const kvli_vk_push push = {.n = n};
    add_copy(b, "blocks of 128 KiB on the device", 2.0 * half,
             time_shader(b, &s, &push, n, b->cpu ? 1 : 4, 1));
    add_copy(b, "the host's memory to the device", 2.0 * half, time_buffer_copy(b, data, host, half));
    add_copy(b, "the device to the host's memory", 2.0 * half, time_buffer_copy(b, host, data, half));
    vk_shader_free(&b->v, &s);
    const vk_buffer all[] = {data, host, tables};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) vk_free(&b->v, all[i]);
}

/* ---- decode and prefill ---- */

/* F16 first, whose time the others are compared with. One token of the context's last block is still to come, so that a step
 * seals nothing. The first two are those of the CPU's target, then a GPU's. */
static void decode_shapes(const bench *b, case_list *s) {
    static const struct {
        uint32_t batch, context, dim;
        bool cpu, target;
    } all[] = {{1, 4096, 128, true, true},    {1, 16384, 128, true, true},    {1, 1024, 128, true, false},
               {1, 4096, 64, true, false},    {1, 16384, 64, true, false},    {4, 1024, 128, true, false},
               {64, 16384, 128, false, true}, {16, 131072, 128, false, true}, {256, 8192, 128, false, false},
               {1, 131072, 128, false, true}, {256, 1024, 128, false, false}, {16, 16384, 128, false, false},
               {1, 16384, 128, false, false}, {16, 4096, 128, false, false},  {1, 4096, 128, false, false},
               {64, 16384, 64, false, false}, {64, 16384, 256, false, false}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        for (uint32_t p = 0; p < CASE_PRESETS; p++) {
            case_shape c = {case_presets[p], all[i].batch, all[i].context - CASE_T / 2, 4, 1, all[i].dim};
            if (all[i].cpu != b->cpu || (b->quick && !all[i].target)) continue;
            if (b->smoke) c.batch = 2, c.context = 80;
            if (!b->smoke || !s->n || strcmp(s->at[s->n - 1].preset, case_presets[p]) != 0)
                case_list_add(s, b->presets, c);
            if (b->smoke && p + 1 == CASE_PRESETS) return;
        }
}

static void prefill_shapes(const bench *b, case_list *s) {
    static const struct {
        uint32_t batch, context, rows;
        bool cpu, target;
    } all[] = {{1, 0, 512, true, true},       {1, 3584, 512, true, false}, {1, 0, 8192, false, true},
               {1, 30720, 2048, false, true}, {4, 0, 2048, false, false},  {1, 7680, 512, false, false},
               {16, 0, 512, false, false}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        for (uint32_t p = 0; p < CASE_PRESETS; p++) {
            case_shape c = {case_presets[p], all[i].batch, all[i].context, 4, all[i].rows, CASE_DIM};
            if (all[i].cpu != b->cpu || (b->quick && !all[i].target)) continue;
            if (b->smoke) c.batch = 1, c.context = 32, c.rows = 40;
            case_list_add(s, b->presets, c);
            if (b->smoke && p + 1 == CASE_PRESETS) return;
        }
}

static uint32_t layers_for(const bench *b, const case_shape *c) {
    uint64_t one = case_block_bytes(c, 1), n = (256u << 20) / one + 1;
    return b->smoke ? 2 : b->cpu ? 1 : n > CASE_LAYERS ? CASE_LAYERS : (uint32_t)n;
}

/* us of ggml's Vulkan backend (ggml 0.21, FLASH_ATTN_EXT) for the same attention without append, on lavapipe of Mesa 22.3.6
 * with 2 cores; 0: not measured. In another run than this one, on a machine that was shared. */
static double ggml_us(const case_shape *s) {
    static const struct {
        const char *preset;
        double at[2];
    } all[] = {
        {"f16", {19814, 121198}}, {"int8", {35601, 205099}}, {"int4", {34693, 191450}}}; /* F16, Q8_0, Q4_0 */
    const uint32_t context = s->context + CASE_T / 2;
    const int at = context == 4096 ? 0 : context == 16384 ? 1 : -1;
    for (size_t i = 0; i < sizeof all / sizeof *all && at >= 0; i++)
        if (strcmp(all[i].preset, s->preset) == 0 && s->batch == 1 && s->dim == 128 && s->gqa == 4)
            return all[i].at[at];
    return 0;
}

/* That of the same shape in F16, or 0; kept here since F16 runs first. */
static double f16_seconds(const case_shape *shape, double s) {
    static case_shape last;
    static double seconds;
    if (strcmp(shape->preset, "f16") == 0) last = *shape, seconds = s;
    case_shape same = last;
    same.preset = shape->preset;
    return last.preset && memcmp(&same, shape, sizeof same) == 0 ? seconds : 0;
}

static void add_decode(bench *b, const case_cache *c, double s, const char *name) {
    double ggml = b->cpu ? ggml_us(&c->shape) : 0, f16 = f16_seconds(&c->shape, s),
           rate = (double)c->bytes / s * 1e-9;
    row_number(&b->out, "layers", c->n_layers);
    row_number(&b->out, "bytes", (double)c->bytes);
    case_row_rate(&b->out, (double)c->bytes, s, b->ceiling);
    if (f16 > 0) row_number(&b->out, "of_f16", s / f16);
    if (ggml > 0) row_number(&b->out, "ggml_us", ggml), row_number(&b->out, "of_ggml", s * 1e6 / ggml);
    fprintf(b->out.table, "%-32s %10.1f us %8.1f GB/s", name, s * 1e6, rate);
    if (b->ceiling > 0) fprintf(b->out.table, "  %5.1f%% of the ceiling", 100 * rate / b->ceiling);
    if (f16 > 0) fprintf(b->out.table, "  %.2f x F16", s / f16);
    if (ggml > 0) fprintf(b->out.table, "  %.2f x ggml-vulkan's %.1f ms", s * 1e6 / ggml, ggml * 1e-3);
    fputc('\n', b->out.table);
}

static void add_prefill(bench *b, const case_shape *c, double s, const char *name) {
    double seen = (double)c->rows * c->context + (double)c->rows * (c->rows + 1) / 2;
    double flop = 4.0 * c->dim * CASE_KV_HEADS * c->gqa * seen * c->batch, f16 = f16_seconds(c, s);
    row_number(&b->out, "rows", c->rows);
    row_number(&b->out, "us", s * 1e6);
    row_number(&b->out, "tflop_s", flop / s * 1e-12);
    if (f16 > 0) row_number(&b->out, "of_f16", s / f16);
    fprintf(b->out.table, "%-32s %10.1f us %8.3f TFLOP/s", name, s * 1e6, flop / s * 1e-12);
    if (f16 > 0) fprintf(b->out.table, "  %.2f x F16", s / f16);
    fputc('\n', b->out.table);
}

static void measure_case(bench *b, const char *what, const case_shape *shape) {
    char name[96], err[LLM_ERR_LEN] = "";
    case_cache c;
    bool decode = strcmp(what, "decode") == 0;
    snprintf(name, sizeof name, "%s %s %u %u %u d%u", what, shape->preset, shape->batch, shape->context,
             shape->rows, shape->dim);
    if (runtime_now() - b->start > (double)b->seconds) {
        leave_out(&b->out, name, "time is over (--seconds)");
        return;
    }
    if (!case_open(&c, &b->v, b->ctx, shape, decode ? layers_for(b, shape) : 1,
                   b->smoke || b->cpu ? 256u << 20 : 768u << 20, err, sizeof err)) {
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
    row_number(&b->out, "dim", shape->dim);
    if (decode)
        add_decode(b, &c, s, name);
    else
        add_prefill(b, shape, s, name);
    row_end(&b->out);
    case_close(&c);
}

/* ---- the host's part ---- */

static void add_host(bench *b, const char *what, double s) {
    row_begin(&b->out, "host");
    row_text(&b->out, "what", what);
    row_number(&b->out, "us", s * 1e6);
    row_end(&b->out);
    fprintf(b->out.table, "%-52s %10.2f us\n", what, s * 1e6);
}

/* Seconds of a layer's call of a step of one row: with tensors on the device recorded, or submitted; the least of all. */
static double time_calls(case_cache *c, bool record) {
    double best = 1e30;
    for (int i = 0; i < 8; i++) {
        const kvl_step *step = case_begin(c, NULL, c->shape.batch, 1);
        kvli_vk_commands commands = record ? vk_begin(c->g) : NULL;
        if (record) case_must(c, kvl_step_record(c->cache, step, commands), "kvl_step_record");
        for (uint32_t l = 0; l < c->n_layers; l++) {
            double start = runtime_now();
            case_attend(c, step, l);
            double s = runtime_now() - start;
            if (l && s < best) best = s; /* the first has the upload of the tables in it */
        }
        if (record) vk_end_and_run(c->g, commands);
        vk_end_and_run(c->g, vk_begin(c->g)); /* what was submitted before is done then */
        case_must(c, kvl_step_abort(c->cache, step), "kvl_step_abort");
    }
    return best;
}

/* The same with tensors in host memory: there and back. */
static double time_host_tensors(case_cache *c) {
    static float rows[CASE_KV_HEADS * 4 * CASE_DIM], out[CASE_KV_HEADS * 4 * CASE_DIM];
    double best = 1e30;
    for (int i = 0; i < 8; i++) {
        const kvl_step *step = case_begin(c, NULL, 1, 1);
        for (uint32_t l = 0; l < c->n_layers; l++) {
            kvl_tensor in = {.data = rows}, to = {.data = out};
            double start = runtime_now();
            case_must(c, kvl_attend(c->cache, step, l, &in, &in, &in, &to), "kvl_attend");
            double s = runtime_now() - start;
            if (l && s < best) best = s;
        }
        case_must(c, kvl_step_abort(c->cache, step), "kvl_step_abort");
    }
    return best;
}

static void measure_host(bench *b) {
    const case_shape shape = {"int8", 1, 64, 4, 1, CASE_DIM};
    char err[LLM_ERR_LEN] = "";
    case_cache c;
    kvli_vk_commands nothing = vk_begin(&b->v);
    VK(&b->v, end, nothing);
    add_host(b, "empty commands, submitted and waited for", vk_time(&b->v, nothing, slice_of(b)));
    b->v.free_commands(b->v.device, b->v.pool, 1, &nothing);
    if (!case_open(&c, &b->v, b->ctx, &shape, 8, 64u << 20, err, sizeof err)) {
        leave_out(&b->out, "host", err);
        case_close(&c);
        return;
    }
    add_host(b, "a layer's call, recorded into lent commands", time_calls(&c, true));
    add_host(b, "a layer's call, submitted", time_calls(&c, false));
    case_close(&c);
    case_host_tensors = true;
    if (case_open(&c, &b->v, b->ctx, &shape, 8, 64u << 20, err, sizeof err))
        add_host(b, "a layer's call, tensors in host memory, until done", time_host_tensors(&c));
    else
        leave_out(&b->out, "host tensors", err);
    case_host_tensors = false;
    case_close(&c);
}

static void measure_same(bench *b, const char *preset, uint32_t rows) {
    const bool few = b->smoke || b->cpu;
    const case_shape s = {preset, few ? 2 : 16, few ? 64 : 3000, 4, rows, CASE_DIM};
    case_measure_same(&b->out, &b->v, b->ctx, &s, 256u << 20);
}

/* ---- the command line ---- */

static bool take_without(bench *b, args *a, char *err, size_t n) {
    static const char *const names[] = {"fp16", "storage16", "subgroup"};
    const char *list;
    if (!args_value(a, &list, err, n)) return false;
    for (uint32_t i = 0; i < 3; i++)
        if (in_list(list, names[i])) b->without |= 1u << i;
    return b->without || llm_fail(err, n, "%s '%.40s': there are fp16 storage16 subgroup", a->name, list);
}

static bool parse(bench *b, int argc, char **argv, char *err, size_t n) {
    args a = {.argc = argc, .argv = argv, .i = 1};
    uint64_t device = 0;
    b->seconds = 600;
    b->device = KVL_NONE;
    while (args_next(&a, err, n)) {
        bool ok = true;
        if (args_is(&a, "--json"))
            ok = args_value(&a, &b->json, err, n);
        else if (args_is(&a, "--only"))
            ok = args_value(&a, &b->only, err, n);
        else if (args_is(&a, "--preset"))
            ok = args_value(&a, &b->presets, err, n);
        else if (args_is(&a, "--without"))
            ok = take_without(b, &a, err, n);
        else if (args_is(&a, "--seconds"))
            ok = args_u64(&a, 1, 100000, &b->seconds, err, n);
        else if (args_is(&a, "--device"))
            ok = args_u64(&a, 0, 255, &device, err, n), b->device = (uint32_t)device;
        else if (args_is(&a, "--quick"))
            b->quick = true;
        else if (args_is(&a, "--smoke"))
            b->smoke = true;
        else if (args_is(&a, "-h") || args_is(&a, "--help"))
            b->help = true;
        else
            ok = llm_fail(err, n, "option '%s' is unknown", a.name);
        if (!ok) return false;
    }
    return !err[0];
}

static void describe_device(bench *b) {
    const kvli_vk_properties *p = &b->v.about;
    char version[32];
    const char *report = kvl_context_report(b->ctx);
    snprintf(version, sizeof version, "%u.%u", p->api_version >> 22 & 127, p->api_version >> 12 & 1023);
    fprintf(b->out.table, "%s, Vulkan %s, subgroups of %u\n%s\n", p->name, version, b->v.subgroup, report);
    row_begin(&b->out, "device");
    row_bool(&b->out, "smoke", b->smoke);
    row_bool(&b->out, "cpu", b->cpu);
    row_text(&b->out, "name", p->name);
    row_text(&b->out, "api", version);
    row_number(&b->out, "driver", p->driver_version);
    row_number(&b->out, "vendor", p->vendor);
    row_number(&b->out, "subgroup", b->v.subgroup);
    row_number(&b->out, "without", b->without);
    row_number(&b->out, "memory_bytes", (double)vk_free_bytes(&b->v));
    row_text(&b->out, "report", report);
    row_end(&b->out);
}

static bool open_backend(bench *b, char *err, size_t n) {
    kvl_context_desc d = {.backend = KVL_BACKEND_VULKAN, .error = err, .error_size = n};
    vk_lend(&b->v, &d.vulkan);
    d.vulkan.without = b->without;
    return kvl_context_create(&d, &b->ctx) == KVL_OK;
}

static void measure_all(bench *b) {
    static case_list decode, prefill;
    decode_shapes(b, &decode);
    prefill_shapes(b, &prefill);
    if (in_list(b->only, "ceiling")) measure_ceiling(b);
    if (in_list(b->only, "host")) measure_host(b);
    if (in_list(b->only, "copies")) measure_copies(b);
    for (uint32_t p = 0; p < CASE_PRESETS; p++) {
        if (!in_list(b->presets, case_presets[p])) continue;
        if (in_list(b->only, "same")) measure_same(b, case_presets[p], 1);
        if (in_list(b->only, "same")) measure_same(b, case_presets[p], 33);
        if (in_list(b->only, "store")) measure_store(b, case_presets[p]);
    }
    for (uint32_t i = 0; in_list(b->only, "decode") && i < decode.n; i++)
        measure_case(b, "decode", &decode.at[i]);
    for (uint32_t i = 0; in_list(b->only, "prefill") && i < prefill.n; i++)
        measure_case(b, "prefill", &prefill.at[i]);
}

int main(int argc, char **argv) {
    char err[LLM_ERR_LEN] = "";
    static bench b;
    if (!parse(&b, argc, argv, err, sizeof err)) {
        fprintf(stderr, "bench_vulkan: %s (--help tells more)\n", err);
        return 2;
    }
    if (b.help) return fputs(usage, stdout) < 0;
    b.start = runtime_now();
    if (!vk_open(&b.v, b.device, err, sizeof err)) {
        printf("SKIP bench_vulkan: %s\n", err);
        return EXIT_SKIPPED;
    }
    b.cpu = b.v.about.device_type == KVLI_VK_DEVICE_CPU;
    if (!open_backend(&b, err, sizeof err)) {
        fprintf(stderr, "bench_vulkan: %s: %s\n", b.v.about.name, err);
        return 1;
    }
    if (!rows_open(&b.out, b.json)) {
        fprintf(stderr, "bench_vulkan: --json %.100s: could not be written\n", b.json);
        return 1;
    }
    describe_device(&b);
    measure_all(&b);
    bool ok = rows_close(&b.out);
    if (!ok) fprintf(stderr, "bench_vulkan: --json %.100s: could not be written\n", b.json);
    kvl_context_destroy(b.ctx);
    vk_close(&b.v);
    return !ok;
}
