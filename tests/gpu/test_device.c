/* The conformance suite on the CUDA backend of this machine: a GPU with its driver, or the mock driver where that is found
   as libcuda.so.1. For tools/gpu_check.sh; `make test` has tests/backend/test_cuda.c. `test_device few` runs some small
   cases alone, as for compute-sanitizer. Status 77: there is no device. */
#define KVL_IMPLEMENTATION
#include "../../kvlite.h"

#include "tests/backend/conformance.h"
#include "tests/backend/sealed.h"
#include "gpu.h"

static gpu device;

/* ---- tensors in device memory ---- */
static struct {
    gpu_ptr at;
    size_t bytes;
} buffers[4];

/* The same bytes at an address that is as little aligned as theirs. */
static gpu_ptr to_device(int i, const void *data, size_t bytes) {
    size_t lead = (uintptr_t)data % 16;
    if (bytes + lead > buffers[i].bytes) {
        gpu_free(&device, buffers[i].at);
        buffers[i].bytes = 2 * bytes + 64;
        buffers[i].at = gpu_alloc(&device, buffers[i].bytes);
    }
    gpu_upload(&device, buffers[i].at + lead, data, bytes);
    return buffers[i].at + lead;
}

static kvl_result attend_on_device(kvl_cache *cache, const kvl_step *step, uint32_t layer,
                                   kvl_tensor *qkvo[4], const size_t bytes[4]) {
    kvl_tensor there[4];
    for (int i = 0; i < 4; i++) {
        there[i] = *qkvo[i];
        there[i].data = (void *)(uintptr_t)to_device(i, qkvo[i]->data, bytes[i]);
        there[i].memory = KVL_MEMORY_DEVICE;
    }
    kvl_result r = kvl_attend(cache, step, layer, &there[0], &there[1], &there[2], &there[3]);
    gpu_download(&device, qkvo[3]->data, (gpu_ptr)(uintptr_t)there[3].data, bytes[3]);
    return r;
}

static void lend(kvl_cache_desc *d) {
    d->context_desc.cuda_context = device.context;
    d->context_desc.cuda_stream = device.stream;
    d->device_tensors = true;
}

static void download(void *to, uint64_t from, size_t bytes) { gpu_download(&device, to, from, bytes); }

/* ---- the tests ---- */

/* Sealed blocks have the bytes that kvl_tile_encode gives. */
static void test_sealed_bytes(void **state) {
    static const uint32_t dims[] = {64, 80, 96, 128, 192, 256}, chunks[] = {1, 64, 23};
    const conf_backend *b = *state;
    uint32_t n_presets, n = 0;
    const kvl_preset *p = kvl_presets(&n_presets);
    conf_skip_if_missing(b);
    for (uint32_t i = 0; i < n_presets; i++)
        for (uint32_t d = 0; d < 6; d++, n++) {
            uint32_t T = conf_is_channel(p[i].k) ? 32u << n % 2 : 16u << n % 3;
            if (p[i].k == p[i].exact || (b->every > 1 && n % 9)) continue;
            seal_and_compare(b, p[i].k, p[i].v, p[i].exact, T, dims[d], chunks[(n / 3) % 3]);
        }
}

int main(int argc, char **argv) {
    bool few = argc > 1 && !strcmp(argv[1], "few");
    char why[LLM_ERR_LEN] = "";
    if (!gpu_open(&device, 0, why, sizeof why)) {
        printf("SKIP test_device: %s\n", why);
        return 77;
    }
    kvl_context_desc d = {.backend = KVL_BACKEND_CUDA, .error = why, .error_size = sizeof why};
    kvl_context *context;
    if (kvl_context_create(&d, &context) != KVL_OK) { /* the suite would skip all of it */
        printf("%s: %s\n", device.name, why);
        return 1;
    }
    kvl_context_destroy(context);
    conf_backend host = {.name = "tensors in host memory",
                         .kind = KVL_BACKEND_CUDA,
                         .presets_only = true,
                         .gpu = true,
                         .spoils_step = true,
                         .tolerance = 2e-6,
                         .f16_rounding = 0x1p-11,
                         .bf16_rounding = 0x1p-8,
                         .first = few ? 3 : 0,
                         .every = few ? 40 : 1,
                         .work = few ? 2e5 : 0,
                         .download = download};
    conf_backend there = host;
    there.name = "tensors in device memory";
    there.first = few ? 17 : 0;
    there.attend = attend_on_device;
    there.describe = lend;
    const struct CMUnitTest tests[] = {
        {"sealed bytes", test_sealed_bytes, NULL, NULL, &host},
        CONF_TESTS("tensors in host memory", &host),
        CONF_TESTS("tensors in device memory", &there),
    };
    int failed = cmocka_run_group_tests_name(device.name, tests, NULL, NULL);
    for (int i = 0; i < 4; i++) gpu_free(&device, buffers[i].at);
    gpu_close(&device);
    if (!failed) printf("%s: conformance holds\n", argv[0]);
    return failed;
}
