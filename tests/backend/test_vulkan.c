/* The Vulkan backend on Mesa's lavapipe, which runs shaders on the CPU, through a wrapped loader (common/vk_wrap.h) that adds
   the validation layer: its messages, leaks and use of a queue that is not locked fail a test.

     test_vulkan              part of the table in each variant, widths and limits
     test_vulkan full         each variant with the whole table and the cross product of formats and shapes (hours)
     test_vulkan BITS [NAME]  vectors of 128, 256 or 512 bits: subgroups of 4, 8, 16 (the driver looks once: each its own process)
     test_vulkan NAME         tests of that name, as cmocka matches them */
#define KVL_IMPLEMENTATION
#include "../../kvlite.h"

#include "../common/vk_wrap.h"
#include "conformance.h"
#include "lives.h"
#include "sealed.h"

#include <sys/wait.h>
#include <unistd.h>

typedef struct variant {
    conf_backend b;   /* first: the suite takes a conf_backend */
    uint32_t without; /* KVL_VULKAN_*: of desc.vulkan */
    bool lend, device,
        record; /* a lent device; tensors in its memory; steps recorded into the app's command buffer */
    vkw_settings shown;
} variant;

static const variant *now;
static vkw_app app;
static kvl_context *shared_context; /* of most tests' caches: pipelines are made once */

static void describe(kvl_cache_desc *d) {
    kvl_vulkan_desc *v = &d->context_desc.vulkan;
    v->get_instance_proc_addr = vkw_get_instance_proc_addr;
    v->without = now->without;
    if (now->lend) {
        v->instance = app.instance;
        v->physical_device = app.physical;
        v->device = app.device;
        v->queue = app.queue;
        v->queue_family = app.family;
        v->features = KVL_VULKAN_FP16 | KVL_VULKAN_STORAGE16 | KVL_VULKAN_SUBGROUP | KVL_VULKAN_SUBGROUP_SIZE;
        v->lock = vkw_lock;
        v->unlock = vkw_unlock;
    }
    if (!d->context) d->context = shared_context;
}

static void download(void *to, uint64_t from, size_t bytes) {
    vkw_download((uint32_t)(from >> 32), (uint32_t)from, to, bytes);
}

/* ---- tensors in device memory ---- */
static kvl_result attend_recorded(kvl_cache *cache, const kvl_step *step, uint32_t layer, kvl_tensor t[4]) {
    kvl_result r;
    if (now->record) KOK(cache, kvl_step_record(cache, step, vkw_app_begin(&app)));
    r = kvl_attend(cache, step, layer, &t[0], &t[1], &t[2], &t[3]);
    if (now->record) {
        KOK(cache, kvl_step_record(cache, step, NULL));
        vkw_app_submit(&app);
    } else {
        vkw_app_wait(&app);
    }
    return r;
}

/* kvl_attend on copies of the tensors, each in a buffer of its own behind something else, as far off alignment as it was. */
static kvl_result device_attend(kvl_cache *cache, const kvl_step *step, uint32_t layer, kvl_tensor *t[4],
                                const size_t bytes[4]) {
    kvl_tensor copy[4];
    vkw_buffer buffers[4];
    kvl_result r;
    int i;
    for (i = 0; i < 4; i++) {
        size_t offset = 64 + (uintptr_t)t[i]->data % 16;
        buffers[i] = vkw_buffer_make(&app, offset + bytes[i]);
        memcpy((char *)buffers[i].map + offset, t[i]->data, bytes[i]);
        copy[i] = *t[i];
        copy[i].data = buffers[i].buffer;
        copy[i].offset = offset;
        copy[i].memory = KVL_MEMORY_DEVICE;
    }
    r = attend_recorded(cache, step, layer, copy);
    memcpy(t[3]->data, (char *)buffers[3].map + copy[3].offset, bytes[3]);
    for (i = 0; i < 4; i++) vkw_buffer_free(&app, &buffers[i]);
    return r;
}

/* A gm_buffers for each layer of one buffer. */
static void *tensors_open(void) {
    vkw_buffer *b = (vkw_buffer *)malloc(sizeof *b);
    *b = vkw_buffer_make(&app, GM_LAYERS * sizeof(gm_buffers));
    return b;
}
static void tensors_close(void *tensors) {
    vkw_buffer_free(&app, (vkw_buffer *)tensors);
    free(tensors);
}
static void tensors_of(kvl_tensor t[4], const vkw_buffer *b, uint32_t layer) {
    static const size_t at[4] = {offsetof(gm_buffers, q), offsetof(gm_buffers, k), offsetof(gm_buffers, v),
                                 offsetof(gm_buffers, out)};
    uint32_t i;
    memset(t, 0, 4 * sizeof *t);
    for (i = 0; i < 4; i++) {
        t[i].data = b->buffer;
        t[i].offset = layer * sizeof(gm_buffers) + at[i];
        t[i].memory = KVL_MEMORY_DEVICE;
    }
}
static kvl_result tensors_attend(kvl_cache *cache, const kvl_step *step, uint32_t layer, void *tensors,
                                 gm_buffers *b) {
    gm_buffers *there = (gm_buffers *)((vkw_buffer *)tensors)->map + layer;
    kvl_tensor t[4];
    kvl_result r;
    gm_fill(there, step, layer);
    memset(there->out, 0xff, sizeof there->out);
    tensors_of(t, (vkw_buffer *)tensors, layer);
    r = attend_recorded(cache, step, layer, t);
    memcpy(b->out, there->out, sizeof b->out);
    return r;
}

/* ---- each test's device ---- */
static int begin(void **state) {
    kvl_cache_desc d;
    char why[300] = "";
    now = (const variant *)*state;
    vkw_reset();
    *vkw() = now->shown;
    if (now->lend) {
        vkw_app_open(&app);
        vkw()->lock = true;
    }
    memset(&lives, 0, sizeof lives);
    lives.kind = KVL_BACKEND_VULKAN;
    lives.describe = describe;
    lives.memory = vkw_memory;
    lives.budget = 12; /* a device has few slabs */
    lives.most = 16;
    lives.low = 7;
    lives.high = 15;
    lives.every = now->b.every > 1 ? 3 : 1;
    if (now->device) {
        lives.open = tensors_open;
        lives.close = tensors_close;
        lives.attend = tensors_attend;
    }
    memset(&d, 0, sizeof d);
    d.context_desc.backend = KVL_BACKEND_VULKAN;
    d.context_desc.error = why;
    d.context_desc.error_size = sizeof why;
    describe(&d);
    if (kvl_context_create(&d.context_desc, &shared_context) != KVL_OK) {
        print_error("%s: %s\n", now->b.name, why);
        return -1;
    }
    return 0;
}

/* Nothing is left, and validation was silent. */
static int end(void **state) {
    char text[1200] = "";
    int problems;
    (void)state;
    kvl_context_destroy(shared_context);
    shared_context = NULL;
    if (now->lend) vkw_app_close(&app);
    problems = vkw_problems(text, sizeof text);
    if (problems) {
        print_error("%s: %d problems: %s\n", now->b.name, problems, text);
        return -1;
    }
    return 0;
}

/* ---- the tests that are Vulkan's own ---- */
static void test_sealed_bytes(void **state) {
    static const uint32_t dims[] = {64, 80, 96, 128, 192, 256}, tokens[] = {16, 32, 64},
                          chunks[] = {1, 64, 23};
    const conf_backend *b = (const conf_backend *)*state;
    uint32_t n = 0, p, d;
    for (p = 0; p < REF_PRESETS; p++) {
        for (d = 0; d < 6; d++, n++) {
            const ref_preset *f = &ref_presets[p];
            uint32_t T = conf_is_channel(f->k) ? tokens[1 + n % 2] : tokens[n % 3];
            if (!b->full && n % 3 != b->first % 3) continue;
            seal_and_compare(b, f->k, f->v, f->exact, T, dims[d], chunks[(n / 3) % 3]);
        }
    }
}

/* All layers of a step in one of the app's command buffers. */
static void test_record(void **state) {
    static life direct, recorded;
    vkw_buffer *tensors;
    runner *r;
    uint32_t n[STREAMS] = {0}, l;
    (void)state;
    assert_true(now->record);
    memset(&direct, 0, sizeof direct);
    direct.preset = recorded.preset = "int8";
    direct.chunk = 50;
    life_run(&direct);
    r = runner_make(&recorded, NULL);
    tensors = (vkw_buffer *)r->tensors;
    runner_open(r, 0, false);
    n[0] = 50;
    runner_step(r, n);
    runner_step(r, n);
    while (r->pos[0] < LENGTH) {
        int32_t token = life_token(0, r->pos[0]);
        const gm_buffers *b = (const gm_buffers *)tensors->map;
        const kvl_step *step;
        uint64_t submits;
        kvl_span span;
        memset(&span, 0, sizeof span);
        span.seq = r->seq[0];
        span.tokens = &token;
        span.n_tokens = span.n_logits = 1;
        KOK(r->cache, kvl_step_begin(r->cache, &span, 1, &step));
        submits = vkw_count("vkQueueSubmit");
        KOK(r->cache, kvl_step_record(r->cache, step, vkw_app_begin(&app)));
        for (l = 0; l < GM_LAYERS; l++) {
            kvl_tensor t[4];
            tensors_of(t, tensors, l);
            gm_fill((gm_buffers *)tensors->map + l, step, l);
            KOK(r->cache, kvl_attend(r->cache, step, l, &t[0], &t[1], &t[2], &t[3]));
        }
        if (vkw_count("vkQueueSubmit") != submits) fail_msg("submitted, though it is recorded");
        vkw_app_submit(&app);
        KOK(r->cache, kvl_step_end(r->cache, step));
        for (l = 0; l < GM_LAYERS; l++) {
            if (memcmp(b[l].out[0], direct.out[r->pos[0]][l], sizeof b->out[0]) != 0)
                fail_msg("position %u layer %u: other numbers when recorded", r->pos[0], l);
        }
        r->pos[0]++;
    }
    runner_destroy(r);
}

static void refused(kvl_geometry g, const char *name) {
    kvl_cache_desc d;
    kvl_cache *cache = NULL;
    char why[256] = "";
    kvl_result r;
    memset(&d, 0, sizeof d);
    d.geometry = g;
    d.context_desc.backend = KVL_BACKEND_VULKAN;
    describe(&d);
    d.device_bytes = 32u << 20;
    d.error = why;
    d.error_size = sizeof why;
    r = kvl_cache_create(&d, &cache);
    kvl_cache_destroy(cache);
    if ((r != KVL_UNSUPPORTED && r != KVL_LIMIT) || !strstr(why, name))
        fail_msg("%s: %s: %s", name, kvl_result_name(r), why);
}
static void test_refusals(void **state) {
    kvl_geometry g = gm_geometry("int8", NULL);
    (void)state;
    g.v_dim = 128;
    refused(g, "v_dim");
    g = gm_geometry("int8", NULL);
    g.k_dim = 48;
    refused(g, "k_dim");
    g = gm_geometry("int8", NULL);
    g.block_tokens = 8;
    refused(g, "block_tokens");
    g = gm_geometry("int8", NULL);
    g.n_q_heads = 64;
    refused(g, "n_q_heads");
}

/* ---- variants ---- */
static variant make(const char *name, uint32_t without, bool full) {
    variant v;
    memset(&v, 0, sizeof v);
    v.b.name = name;
    v.b.kind = KVL_BACKEND_VULKAN;
    v.b.presets_only = v.b.gpu = v.b.spoils_step = true;
    v.b.full = full;
    v.b.tolerance = 2e-6;
    v.b.work = 6e6;
    v.b.describe = describe;
    v.b.download = download;
    /* fp16 arithmetic, and the shapes of workgroups that GPUs have, are not what a CPU's driver gets by itself. */
    v.without = without & KVL_VULKAN_FP16 ? without : without | KVL_VULKAN_CPU_SHAPES;
    return v;
}
/* Every nth case of the table, each variant others. */
static variant part(variant v, uint32_t first, uint32_t every) {
    if (v.b.full) return v;
    v.b.first = first;
    v.b.every = every;
    return v;
}
static variant on(variant v, bool device, bool record) {
    v.lend = true;
    v.device = device || record;
    v.record = record;
    if (v.device) v.b.attend = device_attend;
    return v;
}

#define TEST(label, test, v) \
    { label, test, begin, end, &v }
#define TABLE(v) TEST("every pair of settings, " #v, conf_test_table, v)
enum { NO_FP16 = KVL_VULKAN_FP16, NO_16 = KVL_VULKAN_STORAGE16, NO_SUBGROUP = KVL_VULKAN_SUBGROUP };
enum { EVERY = 24 };

/* One vector width: subgroups of another size. */
static int run_width(unsigned bits, const char *filter) {
    static variant all, no_subgroup;
    if (!vkw_open(bits)) return 77;
    all = part(make("all", 0, false), bits / 128, EVERY);
    no_subgroup = part(make("no subgroups", NO_SUBGROUP, false), bits / 128 + 8, 2 * EVERY);
    const struct CMUnitTest tests[] = {
        TABLE(all),
        TABLE(no_subgroup),
        TEST("the same answer", test_same_answer, all),
    };
    if (filter) cmocka_set_test_filter(filter);
    return cmocka_run_group_tests_name(bits == 128 ? "subgroups of 4" : "subgroups of 16", tests, NULL, NULL);
}

static int run(const char *filter, bool full) {
    static variant v[8], lent, device, record, small, discrete, bare;
    static const char *const names[8] = {
        "all",         "no fp16",           "no storage16",           "no fp16, storage16",
        "no subgroup", "no fp16, subgroup", "no storage16, subgroup", "none of them"};
    uint32_t i;
    if (!vkw_open(256)) return 77;
    for (i = 0; i < 8; i++)
        v[i] = part(
            make(names[i], (i & 1 ? NO_FP16 : 0) | (i & 2 ? NO_16 : 0) | (i & 4 ? NO_SUBGROUP : 0), full),
            3 * i, EVERY);
    lent = on(part(make("lent device", 0, full), 1, EVERY), false, false);
    device = on(part(make("lent device and tensors", 0, full), 4, EVERY), true, false);
    record = on(part(make("recorded", 0, full), 7, EVERY), true, true);
    small = part(make("small limits", 0, full), 10, EVERY);
    small.shown.max_range = small.shown.max_alloc = 24u << 20;
    small.shown.max_buffers = 24;
    discrete = part(make("memory that the host does not see", 0, full), 13, EVERY);
    discrete.shown.discrete = true;
    bare = part(make("a device of Vulkan 1.1 and nothing more", 0, full), 16, EVERY);
    bare.shown.api = 1u << 22 | 1u << 12;
    bare.shown.without = VKW_FP16 | VKW_STORAGE16 | VKW_SUBGROUP | VKW_SIZE_CONTROL;
    const struct CMUnitTest tests[] = {
        TABLE(v[0]),
        TABLE(v[1]),
        TABLE(v[2]),
        TABLE(v[3]),
        TABLE(v[4]),
        TABLE(v[5]),
        TABLE(v[6]),
        TABLE(v[7]),
        TABLE(lent),
        TABLE(device),
        TABLE(record),
        TABLE(small),
        TABLE(discrete),
        TABLE(bare),
        TEST("long contexts, all", conf_test_long, v[0]),
        TEST("long contexts, none", conf_test_long, v[7]),
        TEST("sealed bytes, all", test_sealed_bytes, v[0]),
        TEST("sealed bytes, none", test_sealed_bytes, v[7]),
        TEST("the same answer, all", test_same_answer, v[0]),
        TEST("the same answer, none", test_same_answer, v[7]),
        TEST("the same answer, device", test_same_answer, device),
        TEST("the same answer, small", test_same_answer, small),
        TEST("the same answer, discrete", test_same_answer, discrete),
        TEST("two caches", test_two_caches, v[0]),
        TEST("two caches, device", test_two_caches, device),
        TEST("preemption", test_preemption, v[0]),
        TEST("recorded", test_record, record),
        TEST("refusals", test_refusals, v[0]),
    };
    if (filter) cmocka_set_test_filter(filter);
    return cmocka_run_group_tests_name("vulkan", tests, NULL, NULL);
}

static int other_width(const char *program, const char *bits) {
    int status = 1;
    pid_t child;
    fflush(stdout);
    child = fork();
    if (!child) {
        execl(program, program, bits, (char *)NULL);
        _exit(1);
    }
    return child > 0 && waitpid(child, &status, 0) == child && status == 0 ? 0 : 1;
}

int main(int argc, char **argv) {
    unsigned bits = argc > 1 ? (unsigned)strtoul(argv[1], NULL, 10) : 0;
    bool full = argc > 1 && !strcmp(argv[1], "full");
    int failed;
#if defined(__SANITIZE_THREAD__)
    printf("SKIP lavapipe's threads are not ThreadSanitizer's\n");
    return 77;
#endif
    if (bits) return run_width(bits, argc > 2 ? argv[2] : NULL);
    failed = run(argc > 1 && !full ? argv[1] : NULL, full);
    if (failed == 77 || (argc > 1 && !full)) return failed;
    return failed + other_width(argv[0], "128") + other_width(argv[0], "512");
}
