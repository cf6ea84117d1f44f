/* A CUDA driver without a GPU: libcuda.so.1 with the part of the driver API that kvlite calls. Kernels run on the CPU
   through tests/cuda_cpu. It is stricter than a driver, keeps a table of every object, and fails on demand. These are its
   controls; a test is linked with it, and kvlite's dlopen("libcuda.so.1") then finds the same one.

   Work is queued and runs only when something waits for it, as late as it can: a missing wait gives wrong numbers. */
#ifndef MOCK_CUDA_H
#define MOCK_CUDA_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { MOCK_LAZY, MOCK_EAGER, MOCK_MIXED }; /* work runs when waited for, at once, or anywhere between */

typedef struct mock_cuda_settings {
    int devices;
    int capability;       /* 75, 80, 89, 90: which kernels run (sm_75, sm_80, sm_90), and the limits */
    int driver_version;   /* 13000 = 13.0 */
    int init_result;      /* what cuInit gives */
    int load_result;      /* what loading any image gives */
    bool no_vmm;          /* no virtual memory management */
    uint64_t total_bytes; /* of device memory */
    bool simple_kernels;  /* simple_kernels.c instead of the kernels themselves: fast */
    int order;            /* MOCK_LAZY … */
    uint64_t seed;        /* of MOCK_MIXED */
} mock_cuda_settings;

/* The settings, to be read and changed at any time. */
mock_cuda_settings *mock_cuda(void);
/* Everything as it was at the start: settings, counters, and no object. */
void mock_cuda_reset(void);

/* The nth call of the driver from now on (1 = the next; 0 = none) gives `result`. If lost, it has lost the device: all
   later calls give the same until the context is reset, released or destroyed. */
void mock_cuda_fail(uint64_t nth, int result, bool lost);
/* From now on the calls are the test's own: they are not counted and do not fail in their turn. */
void mock_cuda_own(bool own);
uint64_t mock_cuda_calls(void);     /* so far; cuGetErrorName and cuGetErrorString do not count */
uint64_t mock_cuda_launches(void);  /* kernels that have run; those in graphs too */
uint64_t mock_cuda_failures(void);  /* calls that failed because of mock_cuda_fail, since it was called */
const char *mock_cuda_failed(void); /* the first of these functions; "" = none */
uint64_t mock_cuda_memory(void);    /* bytes of device memory held */

/* Problems: objects that still exist, and what no correct program does (use after free, a context destroyed before what
   is in it, memory freed that queued work uses, a kernel's pointer that leads to no device memory). 0 = none; text names
   the first ones. */
int mock_cuda_problems(char *text, size_t size);

#ifdef __cplusplus
}
#endif
#endif
