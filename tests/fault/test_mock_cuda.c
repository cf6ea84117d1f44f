/* The mock driver itself: what goes wrong with a real one is seen, each mistake planted here once. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>

#include "../../kernels_cuda/abi.h"
#include "../mock_cuda/driver.h"
#include "../mock_cuda/mock_cuda.h"

enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, NOT_FOUND = 500, ILLEGAL_ADDRESS = 700 };
enum { CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_ISOLATION = 905 };
enum { MIB = 1 << 20 };
#define OK(call) assert_int_equal(call, 0)

static void *context, *stream;
static unsigned long long dev;
static unsigned char *pinned;
enum { BYTES = 4096 };

static int begin(void **state) {
    (void)state;
    mock_cuda_reset();
    mock_cuda()->simple_kernels = true;
    OK(cuInit(0));
    OK(cuDevicePrimaryCtxRetain(&context, 0));
    OK(cuCtxPushCurrent_v2(context));
    OK(cuStreamCreate(&stream, 1));
    OK(cuMemAlloc_v2(&dev, BYTES));
    OK(cuMemHostAlloc((void **)&pinned, BYTES, 0));
    return 0;
}
static int end(void **state) {
    (void)state;
    mock_cuda_reset();
    return 0;
}
static void free_all(void) {
    OK(cuMemFree_v2(dev));
    OK(cuMemFreeHost(pinned));
    OK(cuStreamDestroy_v2(stream));
    OK(cuCtxPopCurrent_v2(NULL));
    OK(cuDevicePrimaryCtxRelease_v2(0));
}

static void problem(const char *text) {
    char all[600] = "";
    int n = mock_cuda_problems(all, sizeof all);
    if (text ? !strstr(all, text) : n != 0) fail_msg("%d problems: %s", n, all);
}

static void test_clean(void **state) {
    (void)state;
    free_all();
    problem(NULL);
}

/* A buffer that is written again before the copy from it has run: the copy takes what is there then. */
static void test_copies_run_late(void **state) {
    unsigned char got[16];
    (void)state;
    for (int order = MOCK_LAZY; order <= MOCK_EAGER; order++) {
        mock_cuda()->order = order;
        memset(pinned, 1, BYTES);
        OK(cuMemcpyHtoDAsync_v2(dev, pinned, BYTES, stream));
        memset(pinned, 2, BYTES);
        OK(cuStreamSynchronize(stream));
        OK(cuMemcpyDtoH_v2(got, dev, sizeof got));
        assert_int_equal(got[0], order == MOCK_LAZY ? 2 : 1);
    }
    mock_cuda()->order = MOCK_LAZY; /* without a wait nothing has happened */
    memset(pinned, 3, BYTES);
    OK(cuMemcpyDtoHAsync_v2(pinned, dev, BYTES, stream));
    assert_int_equal(pinned[0], 3);
    OK(cuStreamSynchronize(stream));
    assert_int_equal(pinned[0], 1);
    free_all();
    problem(NULL);
}

static void test_events_order_streams(void **state) {
    void *other, *event;
    unsigned char got;
    (void)state;
    for (int wait = 0; wait < 2; wait++) {
        OK(cuStreamCreate(&other, 1));
        OK(cuEventCreate(&event, 2));
        OK(cuMemsetD8Async(dev, 1, BYTES, stream));
        OK(cuStreamSynchronize(stream));
        OK(cuMemsetD8Async(dev, 7, BYTES, stream));
        OK(cuEventRecord(event, stream));
        if (wait) OK(cuStreamWaitEvent(other, event, 0));
        OK(cuMemcpyDtoHAsync_v2(pinned, dev, 1, other));
        OK(cuStreamSynchronize(other));
        got = pinned[0];
        assert_int_equal(got, wait ? 7 : 1);
        OK(cuStreamSynchronize(stream));
        OK(cuEventDestroy_v2(event));
        OK(cuStreamDestroy_v2(other));
    }
    free_all();
    problem(NULL);
}

static void test_leaks_are_named(void **state) {
    void *event, *p;
    unsigned long long at;
    (void)state;
    OK(cuEventCreate(&event, 0));
    problem("1 events left");
    OK(cuMemAlloc_v2(&at, 100));
    OK(cuMemHostAlloc(&p, 100, 0));
    problem("2 device allocations left; 2 pinned buffers left");
    OK(cuMemAddressReserve(&at, 4 * MIB, 0, 0, 0));
    problem("1 reserved address ranges left");
    free_all();
    problem("a context was destroyed before an event of it");
    problem("a context was destroyed before a pinned buffer of 100 bytes");
}

static void test_memory_mistakes(void **state) {
    unsigned long long at;
    (void)state;
    mock_cuda()->total_bytes = 8 * MIB;
    assert_int_equal(cuMemAlloc_v2(&at, 9 * MIB), OUT_OF_MEMORY);
    assert_int_equal(cuMemAlloc_v2(&at, 0), INVALID_VALUE);
    assert_int_equal(cuMemcpyHtoDAsync_v2(dev + BYTES - 8, pinned, 16, stream), INVALID_VALUE);
    problem("not all device memory");
    OK(cuMemcpyHtoDAsync_v2(dev, pinned, 16, stream));
    OK(cuMemFreeHost(pinned));
    problem("cuMemFreeHost of memory that queued work");
    assert_int_equal(cuMemFree_v2(dev + 256), INVALID_VALUE);
    assert_int_equal(cuMemFreeHost(pinned), INVALID_VALUE);
    problem("cuMemFree of what is not allocated; cuMemFreeHost of what is not allocated");
    OK(cuCtxPopCurrent_v2(NULL));
    assert_int_equal(cuMemAlloc_v2(&at, 16), INVALID_CONTEXT);
    assert_int_equal(cuStreamSynchronize(stream), INVALID_CONTEXT);
}

typedef struct prop { /* CUmemAllocationProp */
    int type, handles, location_type, id;
    void *meta;
    unsigned char flags[8];
} prop;

static void test_virtual_memory(void **state) {
    static const prop p = {1, 0, 1, 0, NULL, {0}};
    static const int access[] = {1, 0, 3};
    unsigned long long at, memory;
    unsigned char byte;
    (void)state;
    assert_int_equal(cuMemAddressReserve(&at, MIB, 0, 0, 0), INVALID_VALUE);
    OK(cuMemAddressReserve(&at, 8 * MIB, 0, 0, 0));
    assert_int_equal(cuMemCreate(&memory, 3 * MIB, &p, 0), INVALID_VALUE);
    OK(cuMemCreate(&memory, 4 * MIB, &p, 0));
    assert_int_equal(cuMemMap(at + MIB, 4 * MIB, 0, memory, 0), INVALID_VALUE);
    assert_int_equal(cuMemMap(at + 6 * MIB, 4 * MIB, 0, memory, 0), INVALID_VALUE);
    OK(cuMemMap(at + 2 * MIB, 4 * MIB, 0, memory, 0));
    OK(cuMemRelease(memory));
    assert_int_equal(cuMemsetD8Async(at + 2 * MIB, 5, 16, stream), INVALID_VALUE); /* no access yet */
    OK(cuMemSetAccess(at + 2 * MIB, 4 * MIB, access, 1));
    OK(cuMemsetD8Async(at + 2 * MIB, 5, 4 * MIB, stream));
    OK(cuStreamSynchronize(stream));
    OK(cuMemcpyDtoH_v2(&byte, at + 6 * MIB - 1, 1));
    assert_int_equal(byte, 5);
    assert_int_equal(cuMemUnmap(at + 2 * MIB, 2 * MIB), INVALID_VALUE); /* a part */
    assert_int_equal(cuMemAddressFree(at, 8 * MIB), INVALID_VALUE);     /* while it is mapped */
    problem("cuMemUnmap of what is not mapped, or of a part; cuMemAddressFree while memory is mapped");
    assert_true(mock_cuda_memory() > 4 * MIB);
    OK(cuMemUnmap(at + 2 * MIB, 4 * MIB));
    assert_true(mock_cuda_memory() < MIB);
    assert_int_equal(cuMemcpyDtoH_v2(&byte, at + 2 * MIB, 1), INVALID_VALUE);
    OK(cuMemAddressFree(at, 8 * MIB));
}

static void *function_named(void **module, const char *name, int want) {
    static const uint64_t image[2] = {0x00100001ba55ed50u, 0};
    void *f = NULL;
    if (!*module) OK(cuModuleLoadData(module, image));
    assert_int_equal(cuModuleGetFunction(&f, *module, name), want);
    return f;
}

static int launch_copy(void *f, uint64_t list, unsigned shared) {
    kvli_cu_copy_args a = {NULL, (const kvli_gpu_copy *)(uintptr_t)list, 1, 0};
    void *params[] = {&a};
    return cuLaunchKernel(f, 1, 1, 1, KVLI_CU_COPY_THREADS, 1, 1, shared, stream, params, NULL);
}

static void test_launches(void **state) {
    void *module = NULL, *f;
    kvli_gpu_copy list = {0, 0, 16};
    char text[16] = "12345";
    (void)state;
    assert_int_equal(cuModuleLoadData(&module, text), 200);
    module = NULL;
    function_named(&module, "kvl_nothing", NOT_FOUND);
    f = function_named(&module, "kvl_copy", 0);
    list.src = dev;
    list.dst = dev + 1024;
    OK(cuMemsetD8Async(dev, 9, 16, stream));
    OK(cuMemcpyHtoDAsync_v2(dev + 512, &list, sizeof list, stream)); /* not pinned: taken at once */
    list.src = 0;
    assert_int_equal(launch_copy(f, dev + 512, 50000), INVALID_VALUE); /* more than 48 KiB without asking */
    OK(cuFuncSetAttribute(f, 8, 50000));
    assert_int_equal(cuFuncSetAttribute(f, 8, 1 << 20), INVALID_VALUE);
    OK(launch_copy(f, dev + 512, 50000));
    OK(cuStreamSynchronize(stream));
    OK(cuMemcpyDtoH_v2(text, dev + 1024 + 15, 1));
    assert_int_equal(text[0], 9);
    assert_int_equal(mock_cuda_launches(), 1);
    problem("50000 bytes of shared memory (limit 49152)");
    /* an array in host memory: the device is lost to this context */
    OK(launch_copy(f, (uint64_t)(uintptr_t)&list, 0));
    assert_int_equal(cuStreamSynchronize(stream), ILLEGAL_ADDRESS);
    problem("copies leads to no device memory");
    assert_int_equal(cuMemFree_v2(dev), ILLEGAL_ADDRESS);
    OK(cuDevicePrimaryCtxReset_v2(0));
    OK(cuCtxPopCurrent_v2(NULL));
    OK(cuDevicePrimaryCtxRelease_v2(0));
    OK(cuDevicePrimaryCtxRetain(&context, 0));
    OK(cuCtxPushCurrent_v2(context));
    OK(cuMemAlloc_v2(&dev, BYTES));
}

static void test_graphs(void **state) {
    void *module = NULL, *f, *graph, *exec, *event;
    kvli_gpu_copy list = {0, 0, 16};
    unsigned long long at;
    unsigned char got;
    (void)state;
    f = function_named(&module, "kvl_copy", 0);
    list.src = dev;
    list.dst = dev + 1024;
    OK(cuMemcpyHtoD_v2(dev + 512, &list, sizeof list));
    OK(cuStreamBeginCapture_v2(stream, 0));
    OK(launch_copy(f, dev + 512, 0));
    OK(cuStreamEndCapture(stream, &graph));
    assert_int_equal(mock_cuda_launches(), 0);
    OK(cuGraphInstantiateWithFlags(&exec, graph, 0));
    for (unsigned char value = 3; value < 6; value++) {
        OK(cuMemsetD8Async(dev, value, 16, stream));
        OK(cuGraphLaunch(exec, stream));
        OK(cuStreamSynchronize(stream));
        OK(cuMemcpyDtoH_v2(&got, dev + 1024, 1));
        assert_int_equal(got, value);
    }
    OK(cuGraphExecDestroy(exec));
    OK(cuGraphDestroy(graph));
    /* what is not allowed meanwhile */
    for (int mistake = 0; mistake < 4; mistake++) {
        int r = 0, wanted = CAPTURE_UNSUPPORTED;
        OK(cuEventCreate(&event, 2));
        OK(cuEventRecord(event, stream));
        OK(cuStreamBeginCapture_v2(stream, 0));
        if (mistake == 0) r = cuStreamSynchronize(stream);
        if (mistake == 1) r = cuMemAlloc_v2(&at, 16);
        if (mistake == 2) r = cuMemcpyHtoDAsync_v2(dev, &list, sizeof list, stream);
        if (mistake == 3) r = cuStreamWaitEvent(stream, event, 0), wanted = CAPTURE_ISOLATION;
        assert_int_equal(r, wanted);
        r = cuStreamEndCapture(stream, &graph);
        assert_int_equal(r, mistake == 2 ? 0 : CAPTURE_INVALIDATED);
        if (!r) OK(cuGraphDestroy(graph));
        OK(cuEventDestroy_v2(event));
    }
    OK(cuModuleUnload(module));
    free_all();
    problem(NULL);
}

static void test_failures(void **state) {
    unsigned long long at;
    (void)state;
    mock_cuda_fail(2, 2, false);
    OK(cuStreamSynchronize(stream));
    assert_int_equal(cuMemAlloc_v2(&at, 16), 2);
    assert_string_equal(mock_cuda_failed(), "cuMemAlloc_v2");
    OK(cuMemAlloc_v2(&at, 16));
    OK(cuMemFree_v2(at));
    mock_cuda_fail(1, 719, true);
    assert_int_equal(cuStreamSynchronize(stream), 719);
    assert_int_equal(cuMemFree_v2(dev), 719);
    assert_int_equal(mock_cuda_failures(), 2);
    OK(cuCtxPopCurrent_v2(NULL));
    OK(cuDevicePrimaryCtxRelease_v2(0));
    problem(NULL); /* what a lost device held is nobody's leak */
    mock_cuda()->init_result = 34;
    assert_int_equal(cuInit(0), 34);
    mock_cuda()->init_result = mock_cuda()->devices = 0;
    assert_int_equal(cuInit(0), 100);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_clean, begin, end),
        cmocka_unit_test_setup_teardown(test_copies_run_late, begin, end),
        cmocka_unit_test_setup_teardown(test_events_order_streams, begin, end),
        cmocka_unit_test_setup_teardown(test_leaks_are_named, begin, end),
        cmocka_unit_test_setup_teardown(test_memory_mistakes, begin, end),
        cmocka_unit_test_setup_teardown(test_virtual_memory, begin, end),
        cmocka_unit_test_setup_teardown(test_launches, begin, end),
        cmocka_unit_test_setup_teardown(test_graphs, begin, end),
        cmocka_unit_test_setup_teardown(test_failures, begin, end),
    };
    return cmocka_run_group_tests_name("mock driver", tests, NULL, NULL);
}
