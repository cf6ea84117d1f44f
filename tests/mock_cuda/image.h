/* What stands for kvlite_cuda_kernels.h where the mock driver runs the kernels: an image with nothing but the head of a fatbin,
   which is what the mock looks at, for every device. Define KVL_CUDA_KERNELS as this file. */
#ifndef MOCK_CUDA_IMAGE_H
#define MOCK_CUDA_IMAGE_H
#include "../../kernels_cuda/abi.h"
#include "../../kernels_cuda/unpack.h"

static const int kvli_cu_image_min_driver = 13000;
static const kvli_cu_part kvli_cu_parts[] = {{10, 1, 0, 16, 16, 0, 0, 0}};
static const char *const kvli_cu_image[] = {"=#l:s#>>^4##########", 0};
#endif
