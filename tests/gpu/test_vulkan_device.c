/* The conformance suite on the Vulkan backend with a device of this machine, whatever it is: for tools/gpu_check.sh; `make test` has
   tests/backend/test_vulkan.c on lavapipe. `test_vulkan_device few` runs three small cases alone. Status 77: there is no loader,
   driver or device. */
#define KVL_IMPLEMENTATION
#include "../../kvlite.h"

#include "../backend/conformance.h"
#include "../backend/sealed.h"
#include "../../tools/bench/vk.h"

static vk device;
static kvl_context *host_context, *without_context,
    *lent_context; /* of the caches of a group: pipelines are made once */
static kvl_context *now;

static void describe_host(kvl_cache_desc *d) { d->context = now = host_context; }
static void describe_without(kvl_cache_desc *d) { d->context = now = without_context; }
static void describe_sealed(kvl_cache_desc *d) {
    d->context = now = lent_context;
} /* tensors in host memory */
static void describe_lent(kvl_cache_desc *d) {
    d->context = now = lent_context;
    d->device_tensors = true;
}

/* ---- tensors in device memory ---- */
static vk_buffer buffers[4];

/* The same bytes in a buffer, as little aligned as theirs. */
static uint64_t to_device(int i, const void *data, size_t bytes) {
    size_t lead = (uintptr_t)data % 16;
    if (bytes + lead > buffers[i].bytes) {
        vk_free(&device, buffers[i]);
        buffers[i] = vk_alloc(&device, 2 * bytes + 64, false);
    }
    vk_upload(&device, buffers[i], lead / 4 * 4, data, bytes);
    return lead / 4 * 4;
}

static kvl_result attend_on_device(kvl_cache *cache, const kvl_step *step, uint32_t layer,
                                   kvl_tensor *qkvo[4], const size_t bytes[4]) {
    kvl_tensor there[4];
    for (int i = 0; i < 4; i++) {
        there[i] = *qkvo[i];
        there[i].offset = to_device(i, qkvo[i]->data, bytes[i]);
        there[i].data = buffers[i].buffer;
        there[i].memory = KVL_MEMORY_DEVICE;
    }
    kvl_result r = kvl_attend(cache, step, layer, &there[0], &there[1], &there[2], &there[3]);
    vk_download(&device, qkvo[3]->data, buffers[3], there[3].offset, bytes[3]);
    return r;
}

/* ---- the tests ---- */

/* From a block of the cache that was created last, on the lent device. */
static void download(void *to, uint64_t from, size_t bytes) {
    vk_buffer there = {.buffer = kvli_vk_of(now->vk->caches)->banks[from >> 32].buffer};
    vk_download(&device, to, there, (uint32_t)from, bytes);
}

/* Sealed blocks have the bytes that kvl_tile_encode gives. */
static void test_sealed_bytes(void **state) {
    static const uint32_t dims[] = {64, 80, 96, 128, 192, 256}, chunks[] = {1, 64, 23};
    const conf_backend *b = *state;
    uint32_t n_presets, n = 0;
    const kvl_preset *p = kvl_presets(&n_presets);
    for (uint32_t i = 0; i < n_presets; i++)
        for (uint32_t d = 0; d < 6; d++, n++) {
            uint32_t T = conf_is_channel(p[i].k) ? 32u << n % 2 : 16u << n % 3;
            if (p[i].k == p[i].exact || (b->every > 1 && n % 9)) continue;
            seal_and_compare(b, p[i].k, p[i].v, p[i].exact, T, dims[d], chunks[(n / 3) % 3]);
        }
}

static kvl_context *open_context(bool lend, uint32_t without) {
    char why[LLM_ERR_LEN] = "";
    kvl_context_desc d = {.backend = KVL_BACKEND_VULKAN, .error = why, .error_size = sizeof why};
    kvl_context *context = NULL;
    if (lend) vk_lend(&device, &d.vulkan);
    d.vulkan.device_index = 1 + device.number;
    d.vulkan.without = without;
    if (kvl_context_create(&d, &context) != KVL_OK) fprintf(stderr, "%s: %s\n", device.about.name, why);
    return context;
}

int main(int argc, char **argv) {
    bool few = argc > 1 && !strcmp(argv[1], "few");
    char why[LLM_ERR_LEN] = "";
    if (!vk_open(&device, KVL_NONE, why, sizeof why)) {
        printf("SKIP test_vulkan_device: %s\n", why);
        return 77;
    }
    host_context = open_context(false, 0);
    without_context = open_context(false, KVL_VULKAN_FP16 | KVL_VULKAN_STORAGE16 | KVL_VULKAN_SUBGROUP);
    lent_context = open_context(true, 0);
    if (!host_context || !without_context || !lent_context) return 1;
    printf("%s\n%s", device.about.name, kvl_context_report(lent_context));
    conf_backend host = {.name = "tensors in host memory",
                         .kind = KVL_BACKEND_VULKAN,
                         .presets_only = true,
                         .gpu = true,
                         .spoils_step = true,
                         .tolerance = 2e-6,
                         .f16_rounding = 0x1p-11,
                         .first = few ? 3 : 0,
                         .every = few ? 100 : 1,
                         .work = few ? 2e5 : 6e6,
                         .describe = describe_host};
    conf_backend without = host, there = host;
    without.name = "without fp16, storage16 and subgroups";
    without.f16_rounding = 0;
    without.first = few ? 11 : 1;
    without.every = few ? 100 : 4;
    without.describe = describe_without;
    there.name = "tensors in device memory";
    there.first = few ? 17 : 0;
    there.attend = attend_on_device;
    there.describe = describe_lent;
    conf_backend sealed = host;
    sealed.describe = describe_sealed;
    sealed.download = download;
    const struct CMUnitTest tables[] = {
        {"without fp16, storage16 and subgroups", conf_test_table, NULL, NULL, &without},
        {"tensors in device memory", conf_test_table, NULL, NULL, &there},
        {"tensors in host memory", conf_test_table, NULL, NULL, &host},
    };
    const struct CMUnitTest others[] = {
        {"sealed bytes", test_sealed_bytes, NULL, NULL, &sealed},
        {"long contexts, tensors in host memory", conf_test_long, NULL, NULL, &host},
        {"long contexts, tensors in device memory", conf_test_long, NULL, NULL, &there},
    };
    int failed = cmocka_run_group_tests_name(device.about.name, tables, NULL, NULL);
    if (!few) failed += cmocka_run_group_tests_name(device.about.name, others, NULL, NULL);
    kvl_context_destroy(host_context);
    kvl_context_destroy(without_context);
    kvl_context_destroy(lent_context);
    for (int i = 0; i < 4; i++) vk_free(&device, buffers[i]);
    vk_close(&device);
    if (!failed) printf("%s: conformance holds\n", argv[0]);
    return failed;
}
