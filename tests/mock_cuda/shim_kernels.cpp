// The kernels themselves, compiled for the CPU, as a library that the mock opens.
#include "../cuda_cpu/cuda_cpu.h"
#include "kernels.h"

#include <cstdio>

static void on_error(const char *message, void *failed) {
    fprintf(stderr, "kernel: %s\n", message);
    *(bool *)failed = true;
}

size_t mock_kernel_find(const char *name, unsigned *threads) {
    const cuda_cpu::Kernel *k = cuda_cpu::find(name);
    *threads = k ? k->threads : 0;
    return k ? k->args_bytes : 0;
}

int mock_kernel_run(const char *name, const unsigned grid[3], const unsigned block[3], size_t shared,
                    const void *args) {
    bool failed = false;
    cuda_cpu::set_error_hook(on_error, &failed);
    bool ok = cuda_cpu::launch(name, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]),
                               shared, args);
    return ok && !failed ? 0 : 719; /* CUDA_ERROR_LAUNCH_FAILED */
}
