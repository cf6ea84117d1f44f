// Runs CUDA kernels on the CPU: what tests and the mock driver call. What kernels see is in cuda_cpu_device.h.
//
// Every CUDA thread is a fiber. A fiber runs until it reaches a collective (shuffle, mma, __syncthreads, …) and gives
// way to the next until all that take part have arrived. Asynchronous copies happen as late as they may, and their
// destination holds poison until then. With a seed, lanes and warps run in shuffled order: a kernel that forgets a
// synchronisation gives other results, or poison, on some seeds.
//
// What is not seen here: bank conflicts, coalescing, memory order between blocks, the rounding inside tensor cores.
#ifndef CUDA_CPU_H
#define CUDA_CPU_H
#include <cstddef>
#include <cstdint>
#include <vector>

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace cuda_cpu {

struct Kernel {
    const char *name;
    unsigned threads, arch; // arch: 750, 800, 900, as the file was compiled
    size_t args_bytes;
    void (*body)(const void *args);
};

// Kernels register themselves, so their objects must be linked whole (--whole-archive).
const std::vector<Kernel> &kernels();
const Kernel *find(const char *name); // null: there is none

// Runs the grid and returns when it is done. False: an error was reported (see below) and the grid given up.
bool launch(const char *name, dim3 grid, dim3 block, size_t smem_bytes, const void *args);

struct Settings {
    unsigned seed = 0;       // 0: lanes and warps in their order
    unsigned os_threads = 2; // blocks of a grid are spread over at most so many
};
extern Settings settings; // read by launch

// Called with one line that names the kernel, block and thread. The default prints it and aborts; if a hook returns,
// the launch is given up. One call for a launch.
typedef void (*ErrorHook)(const char *message, void *user);
void set_error_hook(ErrorHook hook, void *user); // null: the default

// Device memory: poisoned, aligned to 256 bytes, with inaccessible pages around it. What a kernel does beyond it is an
// error (what it writes in the up to 255 bytes of rounding is one found by release).
void *allocate(size_t bytes);
void release(void *p);

struct Counters {
    uint64_t collectives, mmas;
};
Counters counters(); // of all launches so far

} // namespace cuda_cpu
#endif
