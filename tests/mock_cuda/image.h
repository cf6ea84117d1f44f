/* What stands for kvlite_cuda_kernels.h where the mock driver runs the kernels: PTX with nothing but its first line, which is
   what the mock looks at. Define KVL_CUDA_KERNELS as this file. */
#ifndef MOCK_CUDA_IMAGE_H
#define MOCK_CUDA_IMAGE_H
#include "../../kernels_cuda/abi.h"
#include "../../kernels_cuda/unpack.h"

static const int kvli_cu_image_min_driver = 13000;
static const kvli_cu_part kvli_cu_parts[] = {{75, 1, 0, 16, 0, 16, 0, 0, 0}};
static const char *const kvli_cu_image[] = {"1t<jKI*sT3-B=(0&69-B", NULL};
#endif
