/* kvl_info: which backends and devices kvlite can use here, what they support, and why others are skipped. See --help. */
#include "kvlite.h"

#include "llm/options.h"

#include <cjson/cJSON.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { EXIT_RUNTIME = 1, EXIT_USAGE = 2, MAX_DEVICES = 16, BLOCK_SIZES = 4, MAX_DIM = 256, STEP_DIM = 16 };

static const char usage[] =
    "usage: kvl_info [options]\n"
    "\n"
    "Lists every backend of kvlite and every device that it finds on this machine: what each supports, its "
    "memory, which\n"
    "shaders it uses, and why something is skipped. Shaders of a GPU are compiled and tested for one preset, "
    "which takes\n"
    "less than a second; those of a Vulkan driver that computes on the CPU, which takes longer, only with "
    "--test.\n"
    "\n"
    "  --backend NAME   this one alone: cuda, vulkan, cpu, null\n"
    "  --device N       this device alone, by its number in the list\n"
    "  --test LIST      presets to compile and test, such as int8,f16; all; none (default int8)\n"
    "  --dim N          head dim of that test (default 128)\n"
    "  --json           the list as JSON\n"
    "  -h, --help       this text\n"
    "\n"
    "Exit codes: 0 done, 1 a test failed or the device asked for is not there, 2 wrong usage.\n";

static const struct {
    const char *name;
    kvl_backend_kind kind;
    bool has_devices;
} backends[] = {{"cuda", KVL_BACKEND_CUDA, true},
                {"vulkan", KVL_BACKEND_VULKAN, true},
                {"cpu", KVL_BACKEND_CPU, false},
                {"null", KVL_BACKEND_NULL, false}};
enum { N_BACKENDS = sizeof backends / sizeof *backends };

typedef struct command {
    const char *backend, *test;
    uint64_t device, dim;
    bool one_device, json, help;
} command;

/* ---- what to do about a reason ---- */
static const struct {
    const char *part, *advice;
} advices[] = {
    {"libcuda is not there", "with an NVIDIA GPU, install NVIDIA's driver; otherwise there is nothing to do"},
    {"toolkit's stub", "install NVIDIA's driver: the CUDA toolkit alone has none"},
    {"the driver is too old", "install a newer driver"},
    {"the driver is for CUDA", "install a newer NVIDIA driver"},
    {"two versions", "restart the machine: NVIDIA's driver was updated"},
    {"compute capability", "this GPU is too old for the CUDA backend; try vulkan"},
    {"libvulkan is not there", "install the Vulkan loader and a driver (Debian, Ubuntu: libvulkan1 and "
                               "mesa-vulkan-drivers; NVIDIA's own driver brings "
                               "both)"},
    {"no driver for Vulkan", "install a Vulkan driver (Debian, Ubuntu: mesa-vulkan-drivers for AMD and "
                             "Intel; NVIDIA's own); VK_DRIVER_FILES, if it is "
                             "set, must name one that is there"},
    {"no GPU with a driver for Vulkan", "install a Vulkan driver (Debian, Ubuntu: mesa-vulkan-drivers for "
                                        "AMD and Intel; NVIDIA's own); VK_DRIVER_FILES, if it is "
                                        "set, must name one that is there"},
    {"is for Vulkan 1.0", "install a newer driver"},
    {"wrong on this driver", "install a newer driver, and tell kvlite's authors"},
    {"no GPU", "is the GPU visible to this user or container?"},
    {"not in this build",
     "compile kvlite.h where its kernels' folder is beside it, without KVL_NO_CUDA or KVL_NO_VULKAN"},
};

static const char *advice_for(const char *reason) {
    for (size_t i = 0; i < sizeof advices / sizeof *advices; i++)
        if (strstr(reason, advices[i].part)) return advices[i].advice;
    return NULL;
}

/* ---- the list, as JSON; the text is made from it ---- */
static cJSON *numbers(const bool *is, uint32_t n, uint32_t first, uint32_t factor) {
    cJSON *list = cJSON_CreateArray();
    for (uint32_t i = 0; i < n; i++)
        if (is[i]) cJSON_AddItemToArray(list, cJSON_CreateNumber(first + i * factor));
    return list;
}

static kvl_cache_desc small_cache(kvl_context *ctx, const char *preset, uint32_t dim, uint32_t block_tokens,
                                  char *error, size_t error_size) {
    kvl_cache_desc d = {0};
    d.context = ctx;
    d.geometry.n_layers = 1;
    d.geometry.n_q_heads = 8;
    d.geometry.n_kv_heads = 2;
    d.geometry.k_dim = dim;
    d.geometry.block_tokens = block_tokens;
    d.geometry.preset = preset;
    d.device_bytes = 32u << 20;
    d.max_sequences = 4;
    d.max_seq_tokens = 1024;
    d.max_step_tokens = 64;
    d.error = error;
    d.error_size = error_size;
    return d;
}

/* Which head dims (with some size of blocks) and sizes of blocks (with some head dim) a preset takes. */
static cJSON *preset_of(kvl_context *ctx, const char *name) {
    static const uint32_t sizes[BLOCK_SIZES] = {8, 16, 32, 64};
    bool dims[MAX_DIM / STEP_DIM] = {false}, blocks[BLOCK_SIZES] = {false};
    char error[256] = "";
    cJSON *preset = cJSON_CreateObject(), *list = cJSON_CreateArray();
    for (uint32_t b = 0; b < BLOCK_SIZES; b++)
        for (uint32_t i = 0; i < MAX_DIM / STEP_DIM; i++) {
            kvl_cache_desc d = small_cache(ctx, name, (i + 1) * STEP_DIM, sizes[b], error, sizeof error), out;
            if (kvl_cache_defaults(&d, &out) == KVL_OK) dims[i] = blocks[b] = true;
        }
    for (uint32_t b = 0; b < BLOCK_SIZES; b++)
        if (blocks[b]) cJSON_AddItemToArray(list, cJSON_CreateNumber(sizes[b]));
    cJSON_AddStringToObject(preset, "name", name);
    cJSON_AddItemToObject(preset, "head_dims", numbers(dims, MAX_DIM / STEP_DIM, STEP_DIM, STEP_DIM));
    cJSON_AddItemToObject(preset, "block_tokens", list);
    if (!cJSON_GetArraySize(list)) cJSON_AddStringToObject(preset, "reason", error);
    return preset;
}

static void add_memory(cJSON *device, const kvl_context *ctx) {
    kvl_memory_info m;
    if (kvl_context_memory(ctx, &m) != KVL_OK) return;
    cJSON *o = cJSON_AddObjectToObject(device, "memory");
    cJSON_AddNumberToObject(o, "total", (double)m.total);
    cJSON_AddNumberToObject(o, "budget", (double)m.budget);
    cJSON_AddNumberToObject(o, "used", (double)m.used);
    cJSON_AddNumberToObject(o, "available", (double)m.available);
    cJSON_AddBoolToObject(o, "live", m.live);
    cJSON_AddBoolToObject(o, "unified", m.unified);
}

static void add_report(cJSON *device, const char *report) {
    cJSON *lines = cJSON_AddArrayToObject(device, "report");
    char line[512];
    while (*report) {
        size_t n = strcspn(report, "\n");
        snprintf(line, sizeof line, "%.*s", (int)n, report);
        cJSON_AddItemToArray(lines, cJSON_CreateString(line));
        report += n + (report[n] != 0);
    }
}

static bool in_list(const char *list, const char *name) {
    size_t n = strlen(name);
    for (; list; list = strchr(list, ',') ? strchr(list, ',') + 1 : NULL)
        if (strncmp(list, name, n) == 0 && (!list[n] || list[n] == ',')) return true;
    return false;
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Makes a cache in each of those presets: kernels are loaded, shaders compiled and tested. False: one failed. */
static bool add_tests(cJSON *device, kvl_context *ctx, const command *c) {
    uint32_t n;
    const kvl_preset *presets = kvl_presets(&n);
    cJSON *tests = cJSON_AddArrayToObject(device, "tests");
    bool fine = true;
    for (uint32_t i = 0; i < n; i++) {
        char error[256] = "";
        kvl_cache *cache = NULL;
        if (strcmp(c->test, "all") != 0 && !in_list(c->test, presets[i].name)) continue;
        kvl_cache_desc d = small_cache(ctx, presets[i].name, (uint32_t)c->dim, 0, error, sizeof error);
        double begin = seconds();
        kvl_result r = kvl_cache_create(&d, &cache);
        kvl_cache_destroy(cache);
        cJSON *test = cJSON_CreateObject();
        cJSON_AddStringToObject(test, "preset", presets[i].name);
        cJSON_AddNumberToObject(test, "head_dim", (double)c->dim);
        cJSON_AddBoolToObject(test, "works", r == KVL_OK);
        cJSON_AddNumberToObject(test, "ms", (seconds() - begin) * 1e3);
        if (r != KVL_OK) cJSON_AddStringToObject(test, "reason", error);
        cJSON_AddItemToArray(tests, test);
        fine = fine && r == KVL_OK;
    }
    return fine;
}

static kvl_result open_device(uint32_t backend, uint32_t device, char *error, size_t error_size,
                              kvl_context **ctx) {
    kvl_context_desc d = {0};
    d.backend = backends[backend].kind;
    d.cuda_device = device;
    d.vulkan.device_index = device + 1;
    d.error = error;
    d.error_size = error_size;
    return kvl_context_create(&d, ctx);
}

/* How many devices a backend has: the number is in the error for one that is far beyond. 0: none can be asked, and why. */
static uint32_t count_devices(uint32_t backend, char *error, size_t error_size) {
    kvl_context *ctx = NULL;
    if (!backends[backend].has_devices) return 1;
    if (open_device(backend, UINT32_MAX - 1, error, error_size, &ctx) == KVL_OK) kvl_context_destroy(ctx);
    const char *index = strstr(error, "device"), *of = index ? strstr(index, " of ") : NULL;
    if (!of || !strstr(error, "_device: ") == !strstr(error, "device_index: ")) return 0;
    uint32_t n = (uint32_t)strtoul(of + 4, NULL, 10);
    return n < MAX_DEVICES ? n : MAX_DEVICES;
}

static void add_reason(cJSON *device, const char *error, const char *backend) {
    char prefix[32];
    snprintf(prefix, sizeof prefix, "backend: %s: ", backend);
    if (strncmp(error, prefix, strlen(prefix)) == 0) error += strlen(prefix);
    cJSON_AddStringToObject(device, "reason", error);
    if (advice_for(error)) cJSON_AddStringToObject(device, "advice", advice_for(error));
}

static bool add_device(cJSON *list, uint32_t backend, uint32_t number, const command *c) {
    char error[256] = "";
    kvl_context *ctx = NULL;
    cJSON *device = cJSON_CreateObject();
    bool fine = true;
    cJSON_AddItemToArray(list, device);
    cJSON_AddStringToObject(device, "backend", backends[backend].name);
    if (backends[backend].has_devices) cJSON_AddNumberToObject(device, "device", number);
    kvl_result r = open_device(backend, number, error, sizeof error, &ctx);
    cJSON_AddBoolToObject(device, "usable", r == KVL_OK);
    if (r != KVL_OK) {
        add_reason(device, error, backends[backend].name);
        return true;
    }
    cJSON_AddStringToObject(device, "name", kvl_context_backend(ctx));
    add_memory(device, ctx);
    cJSON *presets = cJSON_AddArrayToObject(device, "presets");
    uint32_t n;
    const kvl_preset *all = kvl_presets(&n);
    for (uint32_t i = 0; i < n; i++) cJSON_AddItemToArray(presets, preset_of(ctx, all[i].name));
    bool slow = strstr(kvl_context_report(ctx), "it is a CPU") != NULL;
    const command quick = {.test = slow ? "none" : "int8", .dim = c->dim};
    if (backends[backend].has_devices) fine = add_tests(device, ctx, c->test ? c : &quick);
    add_report(device, kvl_context_report(ctx));
    kvl_context_destroy(ctx);
    return fine;
}

/* What desc.backend = AUTO takes. */
static void add_automatic(cJSON *root) {
    char error[256] = "";
    kvl_context_desc d = {.error = error, .error_size = sizeof error};
    kvl_context *ctx = NULL;
    cJSON *o = cJSON_AddObjectToObject(root, "automatic");
    bool there = kvl_context_create(&d, &ctx) == KVL_OK;
    cJSON_AddStringToObject(o, there ? "name" : "reason", there ? kvl_context_backend(ctx) : error);
    add_report(o, there ? kvl_context_report(ctx) : "");
    kvl_context_destroy(ctx);
}

/* False: a test failed, or the device that was asked for is not there or not usable. */
static bool collect(cJSON *root, const command *c) {
    char version[32], error[256];
    bool fine = true, found = !c->one_device;
    snprintf(version, sizeof version, "%d.%d.%d", KVL_VERSION_MAJOR, KVL_VERSION_MINOR, KVL_VERSION_PATCH);
    cJSON_AddStringToObject(root, "version", version);
    cJSON *list = cJSON_AddArrayToObject(root, "devices");
    for (uint32_t b = 0; b < N_BACKENDS; b++) {
        if (c->backend && strcmp(c->backend, backends[b].name) != 0) continue;
        error[0] = 0;
        uint32_t n = count_devices(b, error, sizeof error);
        for (uint32_t i = 0; i < n; i++) {
            if (c->one_device && c->device != i) continue;
            fine = add_device(list, b, i, c) && fine;
            found = true;
        }
        if (n || c->one_device) continue;
        cJSON *none = cJSON_CreateObject();
        cJSON_AddItemToArray(list, none);
        cJSON_AddStringToObject(none, "backend", backends[b].name);
        cJSON_AddBoolToObject(none, "usable", false);
        add_reason(none, error, backends[b].name);
    }
    if (!c->backend && !c->one_device) add_automatic(root);
    return fine && found;
}

/* ---- as text ---- */
static const char *text_of(const cJSON *o, const char *name) {
    const cJSON *item = cJSON_GetObjectItem(o, name);
    return cJSON_IsString(item) ? item->valuestring : "";
}
static double number_of(const cJSON *o, const char *name) {
    const cJSON *item = cJSON_GetObjectItem(o, name);
    return cJSON_IsNumber(item) ? item->valuedouble : 0;
}

/* 16, 32, 48, 64, 128 as "16-64 by 16, 128". */
static void print_numbers(const cJSON *list) {
    int n = cJSON_GetArraySize(list);
    for (int i = 0, end; i < n; i = end) {
        int first = cJSON_GetArrayItem(list, i)->valueint;
        for (end = i + 1; end < n && cJSON_GetArrayItem(list, end)->valueint == first + (end - i) * STEP_DIM;)
            end++;
        if (end - i < 3) end = i + 1;
        printf("%s%d", i ? ", " : "", first);
        if (end > i + 1) printf("-%d by %d", first + (end - 1 - i) * STEP_DIM, STEP_DIM);
    }
}

static void print_presets(const cJSON *presets) {
    const cJSON *p;
    cJSON_ArrayForEach(p, presets) {
        const cJSON *dims = cJSON_GetObjectItem(p, "head_dims");
        printf("    %-9s ", text_of(p, "name"));
        if (!cJSON_GetArraySize(dims)) {
            printf("not supported: %s\n", text_of(p, "reason"));
            continue;
        }
        printf("head dims ");
        print_numbers(dims);
        printf("; blocks of ");
        print_numbers(cJSON_GetObjectItem(p, "block_tokens"));
        printf(" tokens\n");
    }
}

static void print_memory(const cJSON *m) {
    const double gib = 1024.0 * 1024 * 1024;
    if (!m) return;
    printf("  memory: %.2f GiB, %.2f GiB of it available%s%s\n", number_of(m, "total") / gib,
           number_of(m, "available") / gib,
           cJSON_IsTrue(cJSON_GetObjectItem(m, "live")) ? " now" : " (a guess: the driver does not say)",
           cJSON_IsTrue(cJSON_GetObjectItem(m, "unified")) ? "; shared with the CPU" : "");
}

static void print_lines(const char *title, const cJSON *lines) {
    const cJSON *line;
    printf("  %s:\n", title);
    cJSON_ArrayForEach(line, lines) printf("    %s\n", line->valuestring);
}

static void print_device(const cJSON *d) {
    const cJSON *test, *number = cJSON_GetObjectItem(d, "device");
    printf("%s", text_of(d, "backend"));
    if (number) printf(" device %d", number->valueint);
    if (!cJSON_IsTrue(cJSON_GetObjectItem(d, "usable"))) {
        printf(": not usable\n  reason: %s\n", text_of(d, "reason"));
        if (cJSON_GetObjectItem(d, "advice")) printf("  what to do: %s\n", text_of(d, "advice"));
        return;
    }
    printf(": %s\n", text_of(d, "name"));
    print_memory(cJSON_GetObjectItem(d, "memory"));
    printf("  presets:\n");
    print_presets(cJSON_GetObjectItem(d, "presets"));
    cJSON_ArrayForEach(test, cJSON_GetObjectItem(d, "tests")) {
        bool works = cJSON_IsTrue(cJSON_GetObjectItem(test, "works"));
        printf("  tested: %s, head dim %d: %s (%.0f ms)\n", text_of(test, "preset"),
               (int)number_of(test, "head_dim"), works ? "works" : text_of(test, "reason"),
               number_of(test, "ms"));
    }
    print_lines("report", cJSON_GetObjectItem(d, "report"));
}

static void print_text(const cJSON *root) {
    const cJSON *d, *automatic = cJSON_GetObjectItem(root, "automatic");
    printf("kvlite %s\n\n", text_of(root, "version"));
    cJSON_ArrayForEach(d, cJSON_GetObjectItem(root, "devices")) {
        print_device(d);
        printf("\n");
    }
    if (!automatic) return;
    printf("chosen where the app does not say: %s\n", text_of(automatic, "name"));
    print_lines("report", cJSON_GetObjectItem(automatic, "report"));
}

/* ---- the command line ---- */
static bool check_names(const char *list, char *err, size_t err_len) {
    char name[32];
    while (list && *list) {
        size_t n = strcspn(list, ",");
        snprintf(name, sizeof name, "%.*s", (int)n, list);
        if (!kvl_preset_find(name)) {
            snprintf(err, err_len, "--test: no preset \"%s\"", name);
            return false;
        }
        list += n + (list[n] != 0);
    }
    return true;
}

static bool parse(int argc, char **argv, command *c, char *err, size_t err_len) {
    args a = {argc, argv, .i = 1};
    *c = (command){.dim = 128};
    while (args_next(&a, err, err_len)) {
        bool ok;
        if (args_is(&a, "-h") || args_is(&a, "--help")) {
            ok = c->help = args_flag(&a, err, err_len);
        } else if (args_is(&a, "--json")) {
            ok = c->json = args_flag(&a, err, err_len);
        } else if (args_is(&a, "--backend")) {
            ok = args_value(&a, &c->backend, err, err_len);
        } else if (args_is(&a, "--device")) {
            ok = c->one_device = args_u64(&a, 0, MAX_DEVICES - 1, &c->device, err, err_len);
        } else if (args_is(&a, "--test")) {
            ok = args_value(&a, &c->test, err, err_len);
        } else if (args_is(&a, "--dim")) {
            ok = args_u64(&a, STEP_DIM, MAX_DIM, &c->dim, err, err_len);
        } else {
            snprintf(err, err_len, "%s: unknown option", a.name);
            ok = false;
        }
        if (!ok) return false;
    }
    if (err[0] || c->help) return !err[0];
    bool known = !c->backend;
    for (uint32_t b = 0; b < N_BACKENDS; b++) known = known || strcmp(c->backend, backends[b].name) == 0;
    if (!known) snprintf(err, err_len, "--backend: no backend \"%s\"", c->backend);
    if (known && c->test && strcmp(c->test, "all") != 0 && strcmp(c->test, "none") != 0)
        return check_names(c->test, err, err_len);
    return known;
}

int main(int argc, char **argv) {
    command c;
    char err[512] = "";
    if (!parse(argc, argv, &c, err, sizeof err)) {
        fprintf(stderr, "kvl_info: %s\n", err);
        return EXIT_USAGE;
    }
    if (c.help) {
        fputs(usage, stdout);
        return 0;
    }
    cJSON *root = cJSON_CreateObject();
    bool fine = collect(root, &c);
    if (c.json) {
        char *text = cJSON_Print(root);
        if (text) puts(text);
        free(text);
    } else {
        print_text(root);
    }
    if (c.one_device && !cJSON_GetArraySize(cJSON_GetObjectItem(root, "devices")))
        fprintf(stderr, "kvl_info: --device: there is no device %" PRIu64 "\n", c.device);
    cJSON_Delete(root);
    return fine ? 0 : EXIT_RUNTIME;
}
