/* The part of the CUDA driver API that the mock has: types, numbers and names as in NVIDIA's documentation of the driver
   API, so that no toolkit is needed to build it. */
#ifndef MOCK_CUDA_CU_H
#define MOCK_CUDA_CU_H
#include <cstddef>
#include <cstdint>

typedef int CUresult;
typedef int CUdevice;
typedef unsigned long long CUdeviceptr, CUmemHandle;
typedef struct Context *CUcontext;
typedef struct Module *CUmodule;
typedef struct Function *CUfunction;
typedef struct Stream *CUstream;
typedef struct Event *CUevent;
typedef struct Graph *CUgraph;
typedef struct GraphExec *CUgraphExec;

#define CU_RESULTS(X)                                                                                     \
    X(0, SUCCESS, "no error")                                                                             \
    X(1, INVALID_VALUE, "invalid argument")                                                               \
    X(2, OUT_OF_MEMORY, "out of memory")                                                                  \
    X(3, NOT_INITIALIZED, "initialization error")                                                         \
    X(4, DEINITIALIZED, "driver shutting down")                                                           \
    X(34, STUB_LIBRARY, "CUDA driver is a stub library")                                                  \
    X(46, DEVICE_UNAVAILABLE, "CUDA-capable device(s) is/are busy or unavailable")                        \
    X(100, NO_DEVICE, "no CUDA-capable device is detected")                                               \
    X(101, INVALID_DEVICE, "invalid device ordinal")                                                      \
    X(200, INVALID_IMAGE, "device kernel image is invalid")                                               \
    X(201, INVALID_CONTEXT, "invalid device context")                                                     \
    X(205, MAP_FAILED, "mapping of buffer object failed")                                                 \
    X(206, UNMAP_FAILED, "unmapping of buffer object failed")                                             \
    X(208, ALREADY_MAPPED, "resource already mapped")                                                     \
    X(209, NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device")                 \
    X(211, NOT_MAPPED, "resource not mapped")                                                             \
    X(214, ECC_UNCORRECTABLE, "uncorrectable ECC error encountered")                                      \
    X(218, INVALID_PTX, "a PTX JIT compilation failed")                                                   \
    X(222, UNSUPPORTED_PTX_VERSION, "the provided PTX was compiled with an unsupported toolchain.")       \
    X(304, OPERATING_SYSTEM, "OS call failed or operation not supported on this OS")                      \
    X(400, INVALID_HANDLE, "invalid resource handle")                                                     \
    X(401, ILLEGAL_STATE, "the operation cannot be performed in the present state")                       \
    X(500, NOT_FOUND, "named symbol not found")                                                           \
    X(600, NOT_READY, "device not ready")                                                                 \
    X(700, ILLEGAL_ADDRESS, "an illegal memory access was encountered")                                   \
    X(701, LAUNCH_OUT_OF_RESOURCES, "too many resources requested for launch")                            \
    X(702, LAUNCH_TIMEOUT, "the launch timed out and was terminated")                                     \
    X(708, PRIMARY_CONTEXT_ACTIVE, "cannot set while device is active in this process")                   \
    X(709, CONTEXT_IS_DESTROYED, "context is destroyed")                                                  \
    X(712, HOST_MEMORY_ALREADY_REGISTERED, "part or all of the requested memory range is already mapped") \
    X(713, HOST_MEMORY_NOT_REGISTERED, "pointer does not correspond to a registered memory region")       \
    X(716, MISALIGNED_ADDRESS, "misaligned address")                                                      \
    X(719, LAUNCH_FAILED, "unspecified launch failure")                                                   \
    X(800, NOT_PERMITTED, "operation not permitted")                                                      \
    X(801, NOT_SUPPORTED, "operation not supported")                                                      \
    X(803, SYSTEM_DRIVER_MISMATCH, "system has unsupported display driver / cuda driver combination")     \
    X(900, STREAM_CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing")                \
    X(901, STREAM_CAPTURE_INVALIDATED, "operation failed due to a previous error during capture")         \
    X(902, STREAM_CAPTURE_MERGE, "operation would result in a merge of separate capture sequences")       \
    X(903, STREAM_CAPTURE_UNMATCHED, "capture was not ended in the same stream as it began")              \
    X(904, STREAM_CAPTURE_UNJOINED, "capturing stream has unjoined work")                                 \
    X(905, STREAM_CAPTURE_ISOLATION, "dependency created on uncaptured work in another stream")           \
    X(906, STREAM_CAPTURE_IMPLICIT,                                                                       \
      "operation would make the legacy stream depend on a capturing blocking stream")                     \
    X(907, CAPTURED_EVENT, "operation not permitted on an event last recorded in a capturing stream")     \
    X(908, STREAM_CAPTURE_WRONG_THREAD,                                                                   \
      "attempt to terminate a thread-local capture sequence from another thread")                         \
    X(999, UNKNOWN, "unknown error")

enum : CUresult {
#define CU_RESULT(number, name, text) CUDA_##name = number,
    CU_RESULTS(CU_RESULT)
#undef CU_RESULT
};

enum { /* CUdevice_attribute */
       ATTRIBUTE_MAX_THREADS = 1,
       ATTRIBUTE_MAX_GRID_X = 5,
       ATTRIBUTE_MAX_GRID_Y,
       ATTRIBUTE_MAX_GRID_Z,
       ATTRIBUTE_SHARED_PER_BLOCK = 8,
       ATTRIBUTE_WARP = 10,
       ATTRIBUTE_CLOCK = 13,
       ATTRIBUTE_SM_COUNT = 16,
       ATTRIBUTE_INTEGRATED = 18,
       ATTRIBUTE_CAN_MAP_HOST = 19,
       ATTRIBUTE_COMPUTE_MODE = 20,
       ATTRIBUTE_MEMORY_CLOCK = 36,
       ATTRIBUTE_BUS_WIDTH = 37,
       ATTRIBUTE_L2 = 38,
       ATTRIBUTE_THREADS_PER_SM = 39,
       ATTRIBUTE_UNIFIED = 41,
       ATTRIBUTE_MAJOR = 75,
       ATTRIBUTE_MINOR = 76,
       ATTRIBUTE_SHARED_PER_SM = 81,
       ATTRIBUTE_SHARED_OPTIN = 97,
       ATTRIBUTE_VMM = 102,
       ATTRIBUTE_SHARED_RESERVED = 111
};
enum { FUNC_SHARED_SIZE = 1, FUNC_NUM_REGS = 4, FUNC_DYNAMIC_SHARED = 8, FUNC_SHARED_CARVEOUT = 9 };
enum { STREAM_NON_BLOCKING = 1, EVENT_BLOCKING_SYNC = 1, EVENT_DISABLE_TIMING = 2 };
enum { CAPTURE_GLOBAL = 0, CAPTURE_THREAD_LOCAL, CAPTURE_RELAXED };

/* CUmemAllocationProp and CUmemAccessDesc; location type 1 is a device, allocation type 1 pinned, access 3 read and write */
struct CUmemLocation {
    int type, id;
};
struct CUmemAllocationProp {
    int type, requestedHandleTypes;
    CUmemLocation location;
    void *win32HandleMetaData;
    struct {
        unsigned char compressionType, gpuDirectRDMACapable;
        unsigned short usage;
        unsigned char reserved[4];
    } allocFlags;
};
struct CUmemAccessDesc {
    CUmemLocation location;
    int flags;
};
struct CUuuid {
    char bytes[16];
};

#define CU_API extern "C" __attribute__((visibility("default"))) CUresult
#endif
