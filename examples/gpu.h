/* gpu.h - the part of the CUDA driver API that device.c, bench_cuda and the tests on a GPU call, found at run time: nothing of
 * CUDA is needed to compile it. Names and numbers as in NVIDIA's documentation of the driver API. A call that fails ends
 * the program with its name. */
#ifndef GPU_H
#define GPU_H

#include "llm/error.h"

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t gpu_ptr;

#define GPU_CALLS(X)                                                                                  \
    X(Init, "cuInit", (unsigned))                                                                     \
    X(DriverGetVersion, "cuDriverGetVersion", (int *))                                                \
    X(DeviceGet, "cuDeviceGet", (int *, int))                                                         \
    X(DeviceGetName, "cuDeviceGetName", (char *, int, int))                                           \
    X(DeviceGetAttribute, "cuDeviceGetAttribute", (int *, int, int))                                  \
    X(DeviceTotalMem, "cuDeviceTotalMem_v2", (size_t *, int))                                         \
    X(PrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (void **, int))                                   \
    X(PrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2", (int))                                       \
    X(CtxPushCurrent, "cuCtxPushCurrent_v2", (void *))                                                \
    X(CtxPopCurrent, "cuCtxPopCurrent_v2", (void **))                                                 \
    X(StreamCreate, "cuStreamCreate", (void **, unsigned))                                            \
    X(StreamDestroy, "cuStreamDestroy_v2", (void *))                                                  \
    X(StreamSynchronize, "cuStreamSynchronize", (void *))                                             \
    X(StreamBeginCapture, "cuStreamBeginCapture_v2", (void *, int))                                   \
    X(StreamEndCapture, "cuStreamEndCapture", (void *, void **))                                      \
    X(GraphInstantiate, "cuGraphInstantiateWithFlags", (void **, void *, unsigned long long))         \
    X(GraphGetNodes, "cuGraphGetNodes", (void *, void **, size_t *))                                  \
    X(GraphLaunch, "cuGraphLaunch", (void *, void *))                                                 \
    X(GraphExecDestroy, "cuGraphExecDestroy", (void *))                                               \
    X(GraphDestroy, "cuGraphDestroy", (void *))                                                       \
    X(MemGetInfo, "cuMemGetInfo_v2", (size_t *, size_t *))                                            \
    X(MemAlloc, "cuMemAlloc_v2", (gpu_ptr *, size_t))                                                 \
    X(MemFree, "cuMemFree_v2", (gpu_ptr))                                                             \
    X(MemHostAlloc, "cuMemHostAlloc", (void **, size_t, unsigned))                                    \
    X(MemFreeHost, "cuMemFreeHost", (void *))                                                         \
    X(MemcpyHtoD, "cuMemcpyHtoDAsync_v2", (gpu_ptr, const void *, size_t, void *))                    \
    X(MemcpyDtoH, "cuMemcpyDtoHAsync_v2", (void *, gpu_ptr, size_t, void *))                          \
    X(MemcpyDtoD, "cuMemcpyDtoDAsync_v2", (gpu_ptr, gpu_ptr, size_t, void *))                         \
    X(ModuleLoadData, "cuModuleLoadData", (void **, const void *))                                    \
    X(ModuleGetFunction, "cuModuleGetFunction", (void **, void *, const char *))                      \
    X(ModuleUnload, "cuModuleUnload", (void *))                                                       \
    X(FuncSetAttribute, "cuFuncSetAttribute", (void *, int, int))                                     \
    X(LaunchKernel, "cuLaunchKernel",                                                                 \
      (void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, \
       void **))                                                                                      \
    X(GetErrorName, "cuGetErrorName", (int, const char **))

enum { GPU_CLOCK_KHZ = 13, GPU_SMS = 16, GPU_MEM_CLOCK_KHZ = 36, GPU_BUS_BITS = 37, GPU_L2 = 38 };
enum { GPU_MAJOR = 75, GPU_MINOR = 76, GPU_FUNC_DYNAMIC_SMEM = 8 };
enum { GPU_STREAM_NON_BLOCKING = 1, GPU_CAPTURE_THREAD_LOCAL = 1 };

typedef struct gpu {
#define GPU_FIELD(name, symbol, args) int(*name) args;
    GPU_CALLS(GPU_FIELD)
#undef GPU_FIELD
    void *library, *context, *stream;
    int device, driver;
    char name[128];
} gpu;

static inline void gpu_check(const gpu *g, int r, const char *call) {
    const char *name = "?";
    if (!r) return;
    g->GetErrorName(r, &name);
    fprintf(stderr, "%s: %s (%d)\n", call, name ? name : "?", r);
    exit(1);
}
#define GPU(g, name, ...) gpu_check(g, (g)->name(__VA_ARGS__), #name)

/* False: there is no driver or no such device; err says which. */
static inline bool gpu_open(gpu *g, int ordinal, char *err, size_t n) {
    *g = (gpu){.library = dlopen("libcuda.so.1", RTLD_NOW)};
    if (!g->library) return llm_fail(err, n, "no CUDA driver: %s", dlerror());
#define GPU_FIND(field, symbol, args)                       \
    if (!(*(void **)&g->field = dlsym(g->library, symbol))) \
        return llm_fail(err, n, "the CUDA driver has no %s", symbol);
    GPU_CALLS(GPU_FIND)
#undef GPU_FIND
    int r = g->Init(0);
    if (r) return llm_fail(err, n, "cuInit: error %d", r);
    if (g->DeviceGet(&g->device, ordinal)) return llm_fail(err, n, "there is no CUDA device %d", ordinal);
    GPU(g, DriverGetVersion, &g->driver);
    GPU(g, DeviceGetName, g->name, (int)sizeof g->name, g->device);
    GPU(g, PrimaryCtxRetain, &g->context, g->device);
    GPU(g, CtxPushCurrent, g->context);
    GPU(g, StreamCreate, &g->stream, GPU_STREAM_NON_BLOCKING);
    return true;
}

static inline void gpu_close(gpu *g) {
    void *popped;
    if (g->stream) g->StreamDestroy(g->stream);
    if (g->context) {
        g->CtxPopCurrent(&popped);
        g->PrimaryCtxRelease(g->device);
    }
    *g = (gpu){0}; /* the library stays: its threads may be running */
}

static inline int gpu_attribute(const gpu *g, int which) {
    int value = 0;
    GPU(g, DeviceGetAttribute, &value, which, g->device);
    return value;
}

static inline void gpu_sync(const gpu *g) { GPU(g, StreamSynchronize, g->stream); }

static inline gpu_ptr gpu_alloc(const gpu *g, size_t bytes) {
    gpu_ptr p = 0;
    GPU(g, MemAlloc, &p, bytes);
    return p;
}

static inline void gpu_free(const gpu *g, gpu_ptr p) {
    if (p) GPU(g, MemFree, p);
}

static inline void gpu_upload(const gpu *g, gpu_ptr to, const void *from, size_t bytes) {
    GPU(g, MemcpyHtoD, to, from, bytes, g->stream);
    gpu_sync(g);
}

static inline void gpu_download(const gpu *g, void *to, gpu_ptr from, size_t bytes) {
    GPU(g, MemcpyDtoH, to, from, bytes, g->stream);
    gpu_sync(g);
}

static inline gpu_ptr gpu_uploaded(const gpu *g, const void *from, size_t bytes) {
    gpu_ptr p = gpu_alloc(g, bytes);
    gpu_upload(g, p, from, bytes);
    return p;
}

static inline size_t gpu_free_bytes(const gpu *g) {
    size_t free_bytes, total;
    GPU(g, MemGetInfo, &free_bytes, &total);
    return free_bytes;
}

static inline void gpu_launch(const gpu *g, void *function, unsigned x, unsigned y, unsigned z,
                              unsigned threads, unsigned shared, void *args) {
    void *params[] = {args};
    GPU(g, LaunchKernel, function, x, y, z, threads, 1, 1, shared, g->stream, params, NULL);
}

#endif /* GPU_H */
