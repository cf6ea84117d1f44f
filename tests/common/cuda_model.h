/* gpu_model.h with tensors in the mock's device memory. */
#ifndef KVL_TESTS_CUDA_MODEL_H
#define KVL_TESTS_CUDA_MODEL_H
#include "../mock_cuda/driver.h"
#include "../mock_cuda/mock_cuda.h"

#include "gpu_model.h"

/* The same buffers in device memory. The calls here are the test's own. */
typedef struct cm_device {
    unsigned long long at; /* a gm_buffers */
    void *context, *stream;
} cm_device;

static int cm_device_open(cm_device *d, void *context, void *stream) {
    int r;
    mock_cuda_own(true);
    d->context = context;
    d->stream = stream;
    d->at = 0;
    r = cuCtxPushCurrent_v2(context);
    if (!r) r = cuMemAlloc_v2(&d->at, sizeof(gm_buffers));
    cuCtxPopCurrent_v2(NULL);
    mock_cuda_own(false);
    return r;
}
static void cm_device_close(cm_device *d) {
    mock_cuda_own(true);
    if (!cuCtxPushCurrent_v2(d->context)) {
        cuStreamSynchronize(d->stream);
        cuMemFree_v2(d->at);
        cuCtxPopCurrent_v2(NULL);
    }
    mock_cuda_own(false);
}
/* From a queue that is not pinned: taken at once. */
static void cm_upload(const cm_device *d, const gm_buffers *b) {
    mock_cuda_own(true);
    if (!cuCtxPushCurrent_v2(d->context)) {
        cuMemcpyHtoDAsync_v2(d->at, b, offsetof(gm_buffers, out), d->stream);
        cuMemsetD8Async(d->at + offsetof(gm_buffers, out), 0xff, sizeof b->out, d->stream);
        cuCtxPopCurrent_v2(NULL);
    }
    mock_cuda_own(false);
}
static void cm_download(const cm_device *d, gm_buffers *b) {
    mock_cuda_own(true);
    if (!cuCtxPushCurrent_v2(d->context)) {
        cuMemcpyDtoHAsync_v2(b->out, d->at + offsetof(gm_buffers, out), sizeof b->out, d->stream);
        cuCtxPopCurrent_v2(NULL);
    }
    mock_cuda_own(false);
}

static kvl_result cm_call(kvl_cache *cache, const kvl_step *step, uint32_t layer, const cm_device *d) {
    kvl_tensor t[4];
    size_t at[4] = {offsetof(gm_buffers, q), offsetof(gm_buffers, k), offsetof(gm_buffers, v),
                    offsetof(gm_buffers, out)};
    uint32_t i;
    memset(t, 0, sizeof t);
    for (i = 0; i < 4; i++) {
        t[i].memory = KVL_MEMORY_DEVICE;
        t[i].data = (void *)(uintptr_t)(d->at + at[i]);
    }
    return kvl_attend(cache, step, layer, &t[0], &t[1], &t[2], &t[3]);
}

/* One layer. d null: tensors in host memory. */
static kvl_result cm_attend(kvl_cache *cache, const kvl_step *step, uint32_t layer, const cm_device *d,
                            gm_buffers *b) {
    kvl_result r;
    if (!d) return gm_attend(cache, step, layer, b);
    gm_fill(b, step, layer);
    memset(b->out, 0xff, sizeof b->out);
    cm_upload(d, b);
    r = cm_call(cache, step, layer, d);
    if (r == KVL_OK) cm_download(d, b);
    return r;
}
#endif
