/* What a shared library of kernels gives the mock: found by name, run to the end. */
#ifndef MOCK_CUDA_KERNELS_H
#define MOCK_CUDA_KERNELS_H
#include <stddef.h>
#ifdef __cplusplus
extern "C" {
#endif
#define MOCK_EXPORT __attribute__((visibility("default")))
/* Bytes of the arguments, 0 = no such kernel; *threads: of a block, 0 = any. */
MOCK_EXPORT size_t mock_kernel_find(const char *name, unsigned *threads);
/* 0, or a CUresult. */
MOCK_EXPORT int mock_kernel_run(const char *name, const unsigned grid[3], const unsigned block[3],
                                size_t shared, const void *args);
#ifdef __cplusplus
}
#endif
#endif
