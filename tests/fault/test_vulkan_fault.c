/* Faults of a Vulkan driver, by a wrapped loader: each call fails in its turn, for once or with the device lost; the driver wants
   memory back; a shader is wrong; what was kept of an earlier run is damaged; there is no driver. Every time there is a clean
   error that names what failed, nothing is leaked, requests are kept, and after kvl_cache_recover the tokens come out as they
   would have. `test_vulkan_fault NAME`: tests of that name. */
#include <dlfcn.h>
static void *loader_or_null(const char *name, int flags);
#define dlopen loader_or_null
#define KVL_IMPLEMENTATION
#include "gpu_life.h"
#undef dlopen

#include "../common/vk_wrap.h"

static bool no_loader;
static void *loader_or_null(const char *name, int flags) { return no_loader ? NULL : dlopen(name, flags); }

/* ---- the app's own objects ---- */
typedef struct app {
    vkw_app vk;
    vkw_buffer tensors; /* a gm_buffers */
} app;
static vkw_settings shown; /* the device, in each life */

static void app_open(life *w) {
    app *a = (app *)calloc(1, sizeof *a);
    w->app = a;
    if (!w->lend) return;
    vkw_app_open(&a->vk);
    if (w->device) a->tensors = vkw_buffer_make(&a->vk, sizeof(gm_buffers));
}
static void app_free(app *a) {
    if (a->tensors.buffer) vkw_buffer_free(&a->vk, &a->tensors);
    vkw_app_close(&a->vk);
    free(a);
}
static void app_close(life *w) {
    app_free((app *)w->app);
    w->app = NULL;
}

static uint32_t without; /* KVL_VULKAN_*: of desc.vulkan */

static kvl_vulkan_desc vulkan_desc(const life *w) {
    const app *a = (const app *)w->app;
    kvl_vulkan_desc v;
    memset(&v, 0, sizeof v);
    v.get_instance_proc_addr = vkw_get_instance_proc_addr;
    v.without = without;
    if (!w->lend) return v;
    v.instance = a->vk.instance;
    v.physical_device = a->vk.physical;
    v.device = a->vk.device;
    v.queue = a->vk.queue;
    v.queue_family = a->vk.family;
    v.features = KVL_VULKAN_FP16 | KVL_VULKAN_STORAGE16 | KVL_VULKAN_SUBGROUP | KVL_VULKAN_SUBGROUP_SIZE;
    v.lock = vkw_lock;
    v.unlock = vkw_unlock;
    return v;
}
static void describe(life *w, kvl_context_desc *d) { d->vulkan = vulkan_desc(w); }

static kvl_result attend(life *w, const kvl_step *step, uint32_t layer, gm_buffers *b) {
    static const size_t at[4] = {offsetof(gm_buffers, q), offsetof(gm_buffers, k), offsetof(gm_buffers, v),
                                 offsetof(gm_buffers, out)};
    app *a = (app *)w->app;
    kvl_tensor t[4];
    kvl_result r;
    if (!w->device) return gm_attend(w->cache, step, layer, b);
    memset(t, 0, sizeof t);
    for (int i = 0; i < 4; i++) {
        t[i].data = a->tensors.buffer;
        t[i].offset = at[i];
        t[i].memory = KVL_MEMORY_DEVICE;
    }
    vkw_app_wait(&a->vk);
    gm_fill((gm_buffers *)a->tensors.map, step, layer);
    memset(((gm_buffers *)a->tensors.map)->out, 0xff, sizeof b->out);
    r = kvl_attend(w->cache, step, layer, &t[0], &t[1], &t[2], &t[3]);
    vkw_app_wait(&a->vk);
    memcpy(b->out, ((gm_buffers *)a->tensors.map)->out, sizeof b->out);
    return r;
}

/* The dead device is destroyed when kvlite has let go of it. */
static kvl_result lend(life *w) {
    app *dead = (app *)w->app;
    kvl_vulkan_desc v;
    kvl_result r;
    app_open(w);
    v = vulkan_desc(w);
    r = kvl_context_lend_vulkan(kvl_cache_context(w->cache), &v);
    app_free(dead);
    return r;
}

static void reset(void) {
    vkw_reset();
    *vkw() = shown;
}
static void set_faults(void) {
    faults.kind = KVL_BACKEND_VULKAN;
    faults.words = "VK_";
    faults.host_memory = true;
    faults.reset = reset;
    faults.fail_nth = vkw_fail;
    faults.calls = vkw_calls;
    faults.failures = vkw_failures;
    faults.failed = vkw_failed;
    faults.problems = vkw_problems;
    faults.open = app_open;
    faults.close = app_close;
    faults.describe = describe;
    faults.attend = attend;
    faults.lend = lend;
}

/* ---- each call fails ---- */
static void lives(const life *like, uint64_t every_failing, uint64_t every_lost) {
    faults.every = every_failing;
    every_call(like, CALL_FAILS);
    faults.every = every_lost;
    every_call(like, DEVICE_LOST);
    faults.every = 19; /* of a recovery that fails itself */
}
static void test_host_tensors(void **state) {
    static const life like;
    (void)state;
    lives(&like, 5, 3);
}
/* A GPU with memory of its own, whose driver tells of its budget. */
static void test_discrete(void **state) {
    static const life like;
    (void)state;
    shown.discrete = shown.budget = true;
    shown.heap_budget = shown.heap_bytes = 256u << 20;
    lives(&like, 29, 7);
    memset(&shown, 0, sizeof shown);
}
static void test_lent_device(void **state) {
    static const life like = {.device = true, .lend = true};
    (void)state;
    shown.lock = true;
    lives(&like, 7, 3);
    memset(&shown, 0, sizeof shown);
}

/* The app knows that its device is dead: it lends another before anything is recovered. */
static void test_lend_first(void **state) {
    static const life like = {.device = true, .lend = true};
    kvl_vulkan_desc v;
    const kvl_step *step;
    life w;
    (void)state;
    life_init(&w, &like);
    KT_OK(NULL, life_start(&w));
    v = vulkan_desc(&w);
    KT_CHECK(kvl_context_lend_vulkan(kvl_cache_context(w.cache), &v) == KVL_BUSY, "nothing is lost");
    KT_OK(w.cache, kvl_sched_plan(w.sched, &step));
    vkw_fail(1, DEVICE_LOST);
    KT_CHECK(attend(&w, step, 0, &(gm_buffers){0}) == KVL_DEVICE_LOST, "not lost");
    KT_OK(w.cache, kvl_sched_abort(w.sched, step));
    v.queue = NULL;
    KT_CHECK(kvl_context_lend_vulkan(kvl_cache_context(w.cache), &v) == KVL_INVALID_ARG, "no queue");
    KT_OK(w.cache, lend(&w));
    KT_OK(w.cache, kvl_cache_recover(w.cache));
    life_run(&w);
    life_end(&w);
    reset();
}

/* ---- the driver wants memory back, and gives it again ---- */
enum { B_REQUESTS = 8, B_PROMPT = 60, B_NEW = 110 };
typedef struct pressure {
    int32_t tokens[B_REQUESTS][B_NEW];
    uint64_t before, least, after; /* device memory that kvlite has */
    uint32_t steps, shrinks;
} pressure;

static void pressure_submit(kvl_cache *cache, kvl_sched *sched, kvl_req req[B_REQUESTS]) {
    kvl_request q;
    int32_t tokens[B_PROMPT];
    for (uint32_t i = 0; i < B_REQUESTS; i++) {
        for (uint32_t t = 0; t < B_PROMPT; t++) tokens[t] = (int32_t)(1000 * i + t);
        memset(&q, 0, sizeof q);
        q.tokens = tokens;
        q.n_tokens = B_PROMPT;
        q.max_new_tokens = B_NEW;
        KT_OK(cache, kvl_sched_submit(sched, &q, &req[i]));
    }
}

/* squeeze: other programs take memory at step 20, 60, and give it back at 40, 90. */
static void pressure_run(pressure *p, bool squeeze) {
    static gm_buffers b;
    life w = {.device = false};
    kvl_cache_desc d;
    kvl_sched_desc sd;
    kvl_req req[B_REQUESTS];
    kvl_memory_info info;
    int32_t next[GM_ROWS];
    const kvl_step *step;
    memset(p, 0, sizeof *p);
    memset(&sd, 0, sizeof sd);
    life_init(&w, &w);
    d = life_desc(&w, KVL_BACKEND_VULKAN);
    d.device_bytes = d.max_device_bytes = 6u << 20;
    d.max_sequences = B_REQUESTS;
    d.max_seq_tokens = 256;
    KT_OK(NULL, kvl_cache_create(&d, &w.cache));
    KT_OK(w.cache, kvl_sched_create(w.cache, &sd, &w.sched));
    pressure_submit(w.cache, w.sched, req);
    p->before = p->least = vkw_memory();
    KT_OK(w.cache, kvl_context_memory(kvl_cache_context(w.cache), &info));
    KT_CHECK(info.live && info.total == shown.heap_bytes && info.budget == shown.heap_budget, "budget");
    KT_CHECK(info.used == vkw_heap_use() && info.available == info.budget - info.used, "use");
    while (kvl_sched_plan(w.sched, &step) == KVL_OK) {
        for (uint32_t l = 0; l < GM_LAYERS; l++) KT_OK(w.cache, gm_attend(w.cache, step, l, &b));
        for (uint32_t i = 0; i < step->n_logits; i++) next[i] = gm_next(&b, step->logit_rows[i]);
        KT_OK(w.cache, kvl_sched_commit(w.sched, step, next));
        KT_VALID(w.cache);
        if (vkw_memory() < p->least) p->least = vkw_memory();
        p->steps++;
        if (!squeeze) continue;
        if (p->steps == 20 || p->steps == 60)
            vkw()->others_use = shown.heap_budget - (vkw_heap_use() * 3) / 4;
        if (p->steps == 40 || p->steps == 90) vkw()->others_use = 0;
        KT_CHECK(p->steps < 3000, "not done");
    }
    p->after = vkw_memory();
    for (uint32_t i = 0; i < B_REQUESTS; i++) {
        uint32_t n = 0;
        KT_OK(w.cache, kvl_sched_tokens(w.sched, req[i], p->tokens[i], B_NEW, &n));
        KT_CHECK(n == B_NEW, "request %u: %u tokens", i, n);
    }
    life_end(&w);
}

static void test_budget_shrinks(void **state) {
    static pressure calm, squeezed;
    (void)state;
    shown.discrete = shown.budget = true;
    shown.heap_bytes = 64u << 20;
    shown.heap_budget = 48u << 20;
    pressure_run(&calm, false);
    pressure_run(&squeezed, true);
    printf("%llu KiB of the device, %llu at the least, %llu at the end; %u steps, %u undisturbed\n",
           (unsigned long long)squeezed.before >> 10, (unsigned long long)squeezed.least >> 10,
           (unsigned long long)squeezed.after >> 10, squeezed.steps, calm.steps);
    KT_CHECK(memcmp(calm.tokens, squeezed.tokens, sizeof calm.tokens) == 0, "other tokens");
    KT_CHECK(calm.least == calm.before, "it shrank though there was room");
    KT_CHECK(squeezed.least < squeezed.before * 9 / 10, "no memory was given back");
    KT_CHECK(squeezed.after > squeezed.least + (squeezed.before - squeezed.least) / 2,
             "it did not grow again");
    memset(&shown, 0, sizeof shown);
    reset();
}

/* ---- a shader that is wrong ---- */
static void break_shader(const char *name, uint32_t variants_with, uint32_t how) {
    vkw_settings *s = &shown;
    s->n_broken = 0;
    s->how = how;
    for (size_t i = 0; i < KT_COUNT(kvli_vk_shaders); i++) {
        if (strcmp(kvli_vk_shaders[i].name, name) != 0 ||
            (kvli_vk_shaders[i].variant & variants_with) != variants_with)
            continue;
        s->broken[s->n_broken].words = kvli_vk_shaders[i].words;
        s->broken[s->n_broken++].n_words = kvli_vk_shaders[i].n_words;
    }
}

static void good_life(life *good) {
    static const life like;
    memset(&shown, 0, sizeof shown);
    life_init(good, &like);
    KT_OK(NULL, life_start(good));
    life_run(good);
    life_end(good);
}

/* Refused with the shader's name, or the tokens are right. Which it was. */
static bool refused_or_right(const life *good, const char *name) {
    static const life like;
    life w;
    kvl_result r;
    bool refused;
    life_init(&w, &like);
    r = life_start(&w);
    refused = r != KVL_OK;
    if (refused) {
        KT_CHECK(r == KVL_NO_BACKEND || r == KVL_UNSUPPORTED, "%s: %s", kvl_result_name(r), kt_error);
        KT_CHECK(strstr(kt_error, name), "%s is not named: %s", name, kt_error);
    } else {
        life_run(&w);
        KT_CHECK(memcmp(w.tokens, good->tokens, sizeof w.tokens) == 0, "%s: other tokens", name);
    }
    life_end(&w);
    return refused;
}

static void test_broken_shaders(void **state) {
    static const char *const names[] = {"store", "decode", "prefill", "merge", "copy"};
    static life good;
    uint32_t caught = 0, mutants = 0;
    (void)state;
    good_life(&good);
    for (uint32_t i = 0; i < KT_COUNT(names); i++) {
        for (uint32_t how = 0; how < 40; how = how ? how * 16 : 1) { /* 0: it does nothing */
            bool refused;
            break_shader(names[i], 0, how);
            snprintf(kt_where, sizeof kt_where, "%s, broken in way %u", names[i], how);
            refused = refused_or_right(&good, names[i]);
            KT_CHECK(how || refused, "a shader that does nothing is used");
            mutants++;
            caught += refused;
        }
    }
    kt_where[0] = 0;
    printf("%u of %u broken shaders refused, the others did not matter here\n", caught, mutants);
    memset(&shown, 0, sizeof shown);
    reset();
}

/* The variants with some capability are wrong: others are used, and the report says why. */
static void test_other_variants(void **state) {
    static const struct {
        const char *name;
        uint32_t with;
    } table[] = {
        {"decode", KVLI_VK_SUBGROUP}, {"decode", KVLI_VK_FP16},     {"decode", KVLI_VK_STORAGE16},
        {"prefill", KVLI_VK_FP16},    {"store", KVLI_VK_STORAGE16},
    };
    static const life like;
    static life good;
    (void)state;
    good_life(&good);
    without = KVL_VULKAN_CPU_SHAPES; /* the variants that GPUs are tried with */
    for (uint32_t i = 0; i < KT_COUNT(table); i++) {
        char complaint[32]; /* (what is used has its name in the report, too) */
        life w;
        break_shader(table[i].name, table[i].with, 0);
        life_init(&w, &like);
        snprintf(kt_where, sizeof kt_where, "%s with %u", table[i].name, table[i].with);
        KT_OK(NULL, life_start(&w));
        KT_CHECK(vkw_broken() > 0, "no shader was broken");
        snprintf(complaint, sizeof complaint, "vulkan: %s ", table[i].name);
        KT_CHECK(strstr(kvl_context_report(kvl_cache_context(w.cache)), complaint), "%s",
                 kvl_context_report(kvl_cache_context(w.cache)));
        life_run(&w);
        KT_CHECK(memcmp(w.tokens, good.tokens, sizeof w.tokens) == 0, "other tokens");
        life_end(&w);
    }
    without = 0;
    kt_where[0] = 0;
    memset(&shown, 0, sizeof shown);
    reset();
}

/* Under AUTO a GPU whose shaders are wrong is passed over. */
static void test_broken_under_auto(void **state) {
    static const life like;
    life w;
    kvl_cache_desc d;
    (void)state;
    break_shader("decode", 0, 0);
    shown.discrete = true;
    life_init(&w, &like);
    d = life_desc(&w, KVL_BACKEND_AUTO);
    KT_OK(NULL, kvl_cache_create(&d, &w.cache));
    KT_CHECK(!strncmp(kvl_context_backend(kvl_cache_context(w.cache)), "cpu", 3), "%s",
             kvl_context_backend(kvl_cache_context(w.cache)));
    KT_CHECK(strstr(kvl_context_report(kvl_cache_context(w.cache)), "decode"), "%s",
             kvl_context_report(kvl_cache_context(w.cache)));
    life_end(&w);
    memset(&shown, 0, sizeof shown);
    reset();
}

/* ---- what was kept of an earlier run ---- */
static uint8_t *kept(size_t *n) {
    static const life like;
    uint8_t *bytes;
    size_t room;
    life w;
    life_init(&w, &like);
    KT_OK(NULL, life_start(&w));
    KT_OK(w.cache, kvl_vulkan_cache(kvl_cache_context(w.cache), NULL, n));
    KT_CHECK(*n > 0, "nothing is kept");
    bytes = (uint8_t *)malloc(*n);
    room = *n;
    KT_OK(w.cache, kvl_vulkan_cache(kvl_cache_context(w.cache), bytes, &room));
    KT_CHECK(room == *n, "%zu and %zu bytes", room, *n);
    life_end(&w);
    return bytes;
}

/* A life with these bytes; whether they were used: then nothing is tested anew. */
static bool is_used(const life *good, const uint8_t *bytes, size_t n) {
    static const life like;
    kvl_cache_desc d;
    uint64_t submits;
    bool used;
    life w;
    life_init(&w, &like);
    d = life_desc(&w, KVL_BACKEND_VULKAN);
    d.context_desc.vulkan.cache = bytes;
    d.context_desc.vulkan.cache_bytes = n;
    KT_OK(NULL, kvl_cache_create(&d, &w.cache));
    submits = vkw_count("vkQueueSubmit");
    used = !strstr(kvl_context_report(kvl_cache_context(w.cache)), "vulkan.cache is not used");
    KT_CHECK(!used || submits <= 1, "%llu submits for tests that were done before",
             (unsigned long long)submits);
    life_add_requests(&w);
    life_run(&w);
    KT_CHECK(memcmp(w.tokens, good->tokens, sizeof w.tokens) == 0, "other tokens");
    life_end(&w);
    return used;
}

static void test_kept_pipelines(void **state) {
    static life good;
    uint8_t *bytes, *copy;
    size_t n, i;
    (void)state;
    good_life(&good);
    bytes = kept(&n);
    copy = (uint8_t *)malloc(n);
    KT_CHECK(is_used(&good, bytes, n), "it is not used");
    for (i = 0; i < 10; i++) { /* a bit is another one: in the header, and all over it */
        size_t at = i < 4 ? i * 9 % n : (size_t)kt_mix(i) % n;
        memcpy(copy, bytes, n);
        copy[at] ^= (uint8_t)(1u << i % 8);
        snprintf(kt_where, sizeof kt_where, "byte %zu of %zu is wrong", at, n);
        KT_CHECK(!is_used(&good, copy, n), "it is used");
    }
    for (i = 0; i < 4; i++) {
        size_t less = i < 2 ? 7 + i * 40 : n - 1 - (i - 2) * n / 3;
        snprintf(kt_where, sizeof kt_where, "%zu of %zu bytes", less, n);
        KT_CHECK(!is_used(&good, bytes, less), "it is used");
    }
    snprintf(kt_where, sizeof kt_where, "another driver");
    shown.driver_version = 77;
    KT_CHECK(!is_used(&good, bytes, n), "it is used");
    memset(&shown, 0, sizeof shown);
    kt_where[0] = 0;
    free(copy);
    free(bytes);
    reset();
}

/* ---- no Vulkan here ---- */
typedef struct absence {
    const char *what, *says;
    bool no_loader;
    vkw_settings shown;
    bool only_auto;
} absence;

static void test_falls_back(void **state) {
    static const absence table[] = {
        {.what = "no loader", .says = "libvulkan", .no_loader = true},
        {.what = "no device", .says = "no", .shown = {.devices = KVL_NONE}},
        {.what = "an old device", .says = "1.0", .shown = {.api = 1u << 22, .discrete = true}},
        {.what = "no compute", .says = "comput", .shown = {.no_compute = true, .discrete = true}},
        {.what = "few buffers", .says = "buffers", .shown = {.max_buffers = 8, .discrete = true}},
        {.what = "a CPU", .says = "CPU", .only_auto = true},
    };
    (void)state;
    for (uint32_t i = 0; i < KT_COUNT(table); i++) {
        for (int named = 0; named < (table[i].only_auto ? 1 : 2); named++) {
            const absence *a = &table[i];
            kvl_context_desc d;
            kvl_context *ctx = NULL;
            kvl_result r;
            char why[300] = "";
            kt_env env;
            shown = a->shown;
            reset();
            no_loader = a->no_loader;
            kt_env_init(&env);
            d = kt_context(&env, named ? KVL_BACKEND_VULKAN : KVL_BACKEND_AUTO);
            if (!a->no_loader) d.vulkan.get_instance_proc_addr = vkw_get_instance_proc_addr;
            d.error = why;
            d.error_size = sizeof why;
            snprintf(kt_where, sizeof kt_where, "%s", a->what);
            r = kvl_context_create(&d, &ctx);
            no_loader = false;
            if (named) {
                KT_CHECK(r == KVL_NO_BACKEND && strstr(why, a->says), "%s: %s", kvl_result_name(r), why);
                KT_CHECK(!ctx, "a context");
            } else {
                KT_OK(NULL, r);
                KT_CHECK(!strncmp(kvl_context_backend(ctx), "cpu", 3), "%s", kvl_context_backend(ctx));
                KT_CHECK(strstr(kvl_context_report(ctx), a->says), "%s", kvl_context_report(ctx));
                kvl_context_destroy(ctx);
            }
            kt_env_check(&env);
            nothing_left();
        }
    }
    kt_where[0] = 0;
    memset(&shown, 0, sizeof shown);
    reset();
}

/* AUTO: any call that fails while the device is looked for leads to the CPU, with the reason, or does not matter. */
static void test_auto_takes_the_next(void **state) {
    uint64_t nth, passed_over = 0;
    (void)state;
    shown.discrete = true;
    for (nth = 1;; nth++) {
        kvl_context_desc d;
        kvl_context *ctx = NULL;
        kt_env env;
        bool failed;
        reset();
        vkw_fail(nth, CALL_FAILS);
        kt_env_init(&env);
        d = kt_context(&env, KVL_BACKEND_AUTO);
        d.vulkan.get_instance_proc_addr = vkw_get_instance_proc_addr;
        snprintf(kt_where, sizeof kt_where, "call %llu", (unsigned long long)nth);
        KT_OK(NULL, kvl_context_create(&d, &ctx));
        failed = vkw_failures() > 0;
        snprintf(kt_where, sizeof kt_where, "call %llu, %s", (unsigned long long)nth, vkw_failed());
        if (!strncmp(kvl_context_backend(ctx), "cpu", 3)) {
            KT_CHECK(failed && strstr(kvl_context_report(ctx), "VK_ERROR"), "%s", kvl_context_report(ctx));
            passed_over++;
        } else {
            KT_CHECK(!strncmp(kvl_context_backend(ctx), "vulkan", 6), "%s", kvl_context_backend(ctx));
        }
        vkw_fail(0, CALL_FAILS);
        kvl_context_destroy(ctx);
        kt_env_check(&env);
        nothing_left();
        if (!failed) break;
        KT_CHECK(nth < 200, "no end");
    }
    assert_true(passed_over >= 5);
    kt_where[0] = 0;
    memset(&shown, 0, sizeof shown);
    reset();
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_falls_back),        cmocka_unit_test(test_auto_takes_the_next),
        cmocka_unit_test(test_broken_shaders),    cmocka_unit_test(test_other_variants),
        cmocka_unit_test(test_broken_under_auto), cmocka_unit_test(test_kept_pipelines),
        cmocka_unit_test(test_budget_shrinks),    cmocka_unit_test(test_lend_first),
        cmocka_unit_test(test_lent_device),       cmocka_unit_test(test_discrete),
        cmocka_unit_test(test_host_tensors),      cmocka_unit_test(test_recover_fails),
    };
#if defined(__SANITIZE_THREAD__)
    printf("SKIP lavapipe's threads are not ThreadSanitizer's\n");
    return 77;
#endif
    if (!vkw_open(256)) return 77;
    set_faults();
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests_name("vulkan faults", tests, NULL, NULL);
}
