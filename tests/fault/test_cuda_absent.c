/* A machine without libcuda.so.1: AUTO runs on the CPU and says why, CUDA is refused by name. (Not linked with the mock.) */
#define KVL_IMPLEMENTATION
#define KVL_CUDA_KERNELS "tests/mock_cuda/image.h"
#include "../common/kvl_test.h"

#include <dlfcn.h>

static void test_no_library(void **state) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    kvl_context_desc d;
    kvl_context *ctx = NULL;
    kvl_result r;
    char why[300] = "";
    kt_env env;
    (void)state;
    if (library) {
        dlclose(library);
        printf("SKIP there is a CUDA driver on this machine\n");
        skip();
    }
    kt_env_init(&env);
    d = kt_context(&env, KVL_BACKEND_AUTO);
    KT_OK(NULL, kvl_context_create(&d, &ctx));
    KT_CHECK(!strncmp(kvl_context_backend(ctx), "cpu", 3), "%s", kvl_context_backend(ctx));
    KT_CHECK(strstr(kvl_context_report(ctx), "libcuda"), "%s", kvl_context_report(ctx));
    assert_int_equal(kvl_native_error(ctx, NULL), 0);
    kvl_context_destroy(ctx);
    d.backend = KVL_BACKEND_CUDA;
    d.error = why;
    d.error_size = sizeof why;
    r = kvl_context_create(&d, &ctx);
    KT_CHECK(r == KVL_NO_BACKEND && strstr(why, "libcuda"), "%s: %s", kvl_result_name(r), why);
    kt_env_check(&env);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_no_library)};
    return cmocka_run_group_tests_name("no CUDA driver", tests, NULL, NULL);
}
