/* What stands for kvlite_cuda_kernels.h where the mock driver runs the kernels: an image with nothing but a header, which is
   what the mock looks at. Define KVL_CUDA_KERNELS as this file. */
#ifndef MOCK_CUDA_IMAGE_H
#define MOCK_CUDA_IMAGE_H
#include "../../kernels_cuda/abi.h"

static const int kvli_cu_image_min_driver = 13000;
static const uint32_t kvli_cu_image_bytes = 16;
static const char *const kvli_cu_image[] = {"=#l:s#>>^4##########", 0};
#endif
