/* Controls, devices, contexts, modules. */
#include "state.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>

State S;

static thread_local std::vector<Context *> context_stack;
Context *current_context() {
    if (context_stack.empty()) return nullptr;
    Context *c = context_stack.back();
    return S.contexts.count(c) ? c : nullptr;
}

void misuse(const char *format, ...) {
    char text[300];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (S.misuse.size() < 100) S.misuse.push_back(text);
}

Call::Call(const char *name, int flags) : held(S.lock), context(current_context()), refused(CUDA_SUCCESS) {
    if (!S.own) S.calls++;
    if (!S.own && S.fail_at && S.calls == S.fail_at) {
        S.failures++;
        S.failed = name;
        S.lost = S.fail_lost;
        for (Context *c : S.contexts) {
            if (S.lost) c->lost = S.fail_result;
        }
        if (!(flags & FREES) || (S.lost && !(flags & EVEN_LOST))) {
            refused = S.fail_result;
            return;
        }
        after = S.fail_result;
    }
    if (S.lost && !(flags & EVEN_LOST)) {
        S.failures += !S.own;
        refused = S.fail_result;
    } else if (!S.initialised && !(flags & BEFORE_INIT)) {
        refused = CUDA_NOT_INITIALIZED;
    } else if (flags & CONTEXT) {
        if (!context) {
            refused = CUDA_INVALID_CONTEXT;
        } else if (context->lost) {
            refused = context->lost;
        } else if ((flags & UNSAFE) && capturing_here()) {
            break_captures();
            refused = CUDA_STREAM_CAPTURE_UNSUPPORTED;
        }
    }
}

/* ---- controls ---- */
static mock_cuda_settings standard() {
    mock_cuda_settings s = {};
    s.devices = 1;
    s.capability = 80;
    s.driver_version = 13000;
    s.total_bytes = 8ull << 30;
    return s;
}
static const bool made = (S.settings = standard(), true);

static void destroy_context(Context *c) {
    if (!c->lost && !S.lost)
        run_all(c);
    else
        drop_work(c);
    destroy_streams_of(c);
    free_memory_of(c);
    for (auto i = S.modules.begin(); i != S.modules.end();) {
        if ((*i)->context == c) {
            if (!c->lost && !S.lost) misuse("a context was destroyed before a module of it");
            delete *i;
            i = S.modules.erase(i);
        } else {
            ++i;
        }
    }
    S.contexts.erase(c);
    S.dead.push_back(c);
}

extern "C" {
__attribute__((visibility("default"))) mock_cuda_settings *mock_cuda(void) { return &S.settings; }

__attribute__((visibility("default"))) void mock_cuda_reset(void) {
    std::lock_guard<std::recursive_mutex> held(S.lock);
    S.lost = true; /* so that nothing is said about what is left */
    while (!S.contexts.empty()) destroy_context(*S.contexts.begin());
    for (Context *c : S.dead) delete c;
    S.dead.clear();
    for (Graph *g : S.graphs) delete g;
    for (GraphExec *g : S.execs) delete g;
    S.graphs.clear();
    S.execs.clear();
    forget_memory();
    context_stack.clear();
    S.primary = nullptr;
    S.primary_held = 0;
    S.settings = standard();
    S.initialised = S.lost = S.own = false;
    S.calls = S.launches = S.failures = S.fail_at = 0;
    S.failed.clear();
    S.misuse.clear();
    S.random = 1;
}

__attribute__((visibility("default"))) void mock_cuda_fail(uint64_t nth, int result, bool lost) {
    std::lock_guard<std::recursive_mutex> held(S.lock);
    S.fail_at = nth ? S.calls + nth : 0;
    S.fail_result = result;
    S.fail_lost = lost;
    S.lost = false;
    S.failures = 0;
    S.failed.clear();
}
__attribute__((visibility("default"))) void mock_cuda_own(bool own) { S.own = own; }
__attribute__((visibility("default"))) uint64_t mock_cuda_calls(void) { return S.calls; }
__attribute__((visibility("default"))) uint64_t mock_cuda_launches(void) { return S.launches; }
__attribute__((visibility("default"))) uint64_t mock_cuda_failures(void) { return S.failures; }
__attribute__((visibility("default"))) const char *mock_cuda_failed(void) { return S.failed.c_str(); }
__attribute__((visibility("default"))) uint64_t mock_cuda_memory(void) { return S.held_bytes; }

__attribute__((visibility("default"))) int mock_cuda_problems(char *text, size_t size) {
    std::lock_guard<std::recursive_mutex> held(S.lock);
    std::string all;
    int n = (int)S.misuse.size();
    for (auto &m : S.misuse) all += m + "; ";
    auto live = [&](size_t count, const char *what) {
        if (!count) return;
        n += (int)count;
        all += std::to_string(count) + " " + what + " left; ";
    };
    live(S.primary_held, "holds of the primary context");
    live(S.contexts.size() - (S.primary ? 1 : 0), "contexts");
    live(S.modules.size(), "modules");
    std::string rest = live_streams() + live_memory();
    for (char c : rest) n += c == ';';
    all += rest;
    if (size) snprintf(text, size, "%s", all.c_str());
    return n;
}
}

/* ---- errors, start ---- */
static const struct {
    CUresult number;
    const char *name, *text;
} results[] = {
#define CU_RESULT(number, name, text) {number, number ? "CUDA_ERROR_" #name : "CUDA_" #name, text},
    CU_RESULTS(CU_RESULT)
#undef CU_RESULT
};

CU_API cuGetErrorName(CUresult r, const char **out) {
    for (auto &x : results) {
        if (x.number == r) return *out = x.name, CUDA_SUCCESS;
    }
    *out = nullptr;
    return CUDA_INVALID_VALUE;
}
CU_API cuGetErrorString(CUresult r, const char **out) {
    for (auto &x : results) {
        if (x.number == r) return *out = x.text, CUDA_SUCCESS;
    }
    *out = nullptr;
    return CUDA_INVALID_VALUE;
}

CU_API cuInit(unsigned flags) {
    CALL(BEFORE_INIT);
    if (flags) return CUDA_INVALID_VALUE;
    if (S.settings.init_result) return S.settings.init_result;
    if (!S.settings.devices) return CUDA_NO_DEVICE;
    S.initialised = true;
    return CUDA_SUCCESS;
}
CU_API cuDriverGetVersion(int *out) {
    CALL(BEFORE_INIT | EVEN_LOST);
    if (!out) return CUDA_INVALID_VALUE;
    *out = S.settings.driver_version;
    return CUDA_SUCCESS;
}

/* ---- devices ---- */
static bool is_device(CUdevice d) { return d >= 0 && d < S.settings.devices; }

CU_API cuDeviceGetCount(int *out) {
    CALL(ANY);
    *out = S.settings.devices;
    return CUDA_SUCCESS;
}
CU_API cuDeviceGet(CUdevice *out, int ordinal) {
    CALL(ANY);
    if (!out) return CUDA_INVALID_VALUE;
    if (!is_device(ordinal)) return CUDA_INVALID_DEVICE;
    *out = ordinal;
    return CUDA_SUCCESS;
}
CU_API cuDeviceGetName(char *out, int n, CUdevice d) {
    CALL(ANY);
    if (!out || n <= 0) return CUDA_INVALID_VALUE;
    if (!is_device(d)) return CUDA_INVALID_DEVICE;
    snprintf(out, (size_t)n, "Mock GPU sm_%d", S.settings.capability);
    return CUDA_SUCCESS;
}
CU_API cuDeviceTotalMem_v2(size_t *out, CUdevice d) {
    CALL(ANY);
    if (!out) return CUDA_INVALID_VALUE;
    if (!is_device(d)) return CUDA_INVALID_DEVICE;
    *out = S.settings.total_bytes;
    return CUDA_SUCCESS;
}
CU_API cuDeviceGetUuid_v2(CUuuid *out, CUdevice d) {
    CALL(ANY);
    if (!is_device(d)) return CUDA_INVALID_DEVICE;
    memset(out, 0x42, sizeof *out);
    return CUDA_SUCCESS;
}

static int shared_optin() {
    int c = S.settings.capability;
    int kib = c < 80 ? 64 : c == 80 || c == 87 ? 163 : c == 86 || c == 89 || c >= 120 ? 99 : 227;
    return kib << 10;
}
static int attribute(int a) {
    switch (a) {
    case ATTRIBUTE_MAX_THREADS: return 1024;
    case ATTRIBUTE_MAX_GRID_X: return 0x7fffffff;
    case ATTRIBUTE_MAX_GRID_Y:
    case ATTRIBUTE_MAX_GRID_Z: return 65535;
    case ATTRIBUTE_SHARED_PER_BLOCK: return 48 << 10;
    case ATTRIBUTE_WARP: return 32;
    case ATTRIBUTE_CLOCK: return 1500000;
    case ATTRIBUTE_SM_COUNT: return 4;
    case ATTRIBUTE_INTEGRATED: return 0;
    case ATTRIBUTE_CAN_MAP_HOST: return 1;
    case ATTRIBUTE_COMPUTE_MODE: return 0;
    case ATTRIBUTE_MEMORY_CLOCK: return 7000000;
    case ATTRIBUTE_BUS_WIDTH: return 256;
    case ATTRIBUTE_L2: return 4 << 20;
    case ATTRIBUTE_THREADS_PER_SM: return S.settings.capability == 75 ? 1024 : 2048;
    case ATTRIBUTE_UNIFIED: return 1;
    case ATTRIBUTE_MAJOR: return S.settings.capability / 10;
    case ATTRIBUTE_MINOR: return S.settings.capability % 10;
    case ATTRIBUTE_SHARED_PER_SM: return shared_optin() + (S.settings.capability < 80 ? 0 : 1024);
    case ATTRIBUTE_SHARED_OPTIN: return shared_optin();
    case ATTRIBUTE_SHARED_RESERVED: return S.settings.capability < 80 ? 0 : 1024;
    case ATTRIBUTE_VMM: return !S.settings.no_vmm;
    default: return -1;
    }
}
CU_API cuDeviceGetAttribute(int *out, int a, CUdevice d) {
    CALL(ANY);
    if (!out || attribute(a) < 0) {
        misuse("cuDeviceGetAttribute: attribute %d is none that the mock knows", a);
        return CUDA_INVALID_VALUE;
    }
    if (!is_device(d)) return CUDA_INVALID_DEVICE;
    *out = attribute(a);
    return CUDA_SUCCESS;
}

/* ---- contexts ---- */
static Context *new_context(bool primary) {
    Context *c = new Context();
    c->primary = primary;
    c->legacy.context = c;
    c->legacy.blocking = c->legacy.legacy = true;
    S.contexts.insert(c);
    return c;
}

CU_API cuDevicePrimaryCtxRetain(CUcontext *out, CUdevice d) {
    CALL(ANY);
    if (!out) return CUDA_INVALID_VALUE;
    if (!is_device(d)) return CUDA_INVALID_DEVICE;
    if (!S.primary) S.primary = new_context(true);
    S.primary_held++;
    *out = S.primary;
    return CUDA_SUCCESS;
}
static void end_primary() {
    orphan_memory(S.primary);
    destroy_context(S.primary);
    S.primary = nullptr;
}
CU_API cuDevicePrimaryCtxRelease_v2(CUdevice d) {
    CALL(EVEN_LOST | FREES);
    if (!is_device(d)) return CUDA_INVALID_DEVICE;
    if (!S.primary_held) {
        misuse("the primary context was released more often than retained");
        return CUDA_INVALID_CONTEXT;
    }
    if (--S.primary_held == 0) {
        end_primary();
        S.lost = false;
    }
    return call.after;
}
/* Destroys what is in the primary context, whoever made it; holds of it stay. */
CU_API cuDevicePrimaryCtxReset_v2(CUdevice d) {
    CALL(EVEN_LOST | FREES);
    if (!is_device(d)) return CUDA_INVALID_DEVICE;
    if (S.primary) {
        if (!S.lost && !S.primary->lost && !S.failures) misuse("a primary context that works was reset");
        S.lost = true;
        end_primary();
        if (S.primary_held) S.primary = new_context(true);
    }
    S.lost = false;
    return call.after;
}
CU_API cuDevicePrimaryCtxGetState(CUdevice d, unsigned *flags, int *active) {
    CALL(ANY);
    if (!is_device(d)) return CUDA_INVALID_DEVICE;
    *flags = 0;
    *active = S.primary != nullptr;
    return CUDA_SUCCESS;
}
CU_API cuCtxCreate_v2(CUcontext *out, unsigned flags, CUdevice d) {
    CALL(ANY);
    (void)flags;
    if (!out) return CUDA_INVALID_VALUE;
    if (!is_device(d)) return CUDA_INVALID_DEVICE;
    *out = new_context(false);
    (*out)->device = d;
    context_stack.push_back(*out);
    return CUDA_SUCCESS;
}
CU_API cuCtxDestroy_v2(CUcontext c) {
    CALL(EVEN_LOST | FREES);
    if (!S.contexts.count(c) || c->primary) return CUDA_INVALID_CONTEXT;
    if (!context_stack.empty() && context_stack.back() == c) context_stack.pop_back();
    orphan_memory(c);
    destroy_context(c);
    S.lost = false;
    return call.after;
}
CU_API cuCtxPushCurrent_v2(CUcontext c) {
    CALL(ANY);
    if (!S.contexts.count(c)) return CUDA_INVALID_CONTEXT;
    context_stack.push_back(c);
    return CUDA_SUCCESS;
}
/* Works on a lost device too: the stack is the thread's own. */
CU_API cuCtxPopCurrent_v2(CUcontext *out) {
    CALL(EVEN_LOST | FREES);
    if (context_stack.empty()) return CUDA_INVALID_CONTEXT;
    if (out) *out = context_stack.back();
    context_stack.pop_back();
    return call.after;
}
CU_API cuCtxSetCurrent(CUcontext c) {
    CALL(ANY);
    if (c && !S.contexts.count(c)) return CUDA_INVALID_CONTEXT;
    if (!context_stack.empty()) context_stack.pop_back();
    if (c) context_stack.push_back(c);
    return CUDA_SUCCESS;
}
CU_API cuCtxGetCurrent(CUcontext *out) {
    CALL(EVEN_LOST);
    if (!out) return CUDA_INVALID_VALUE;
    *out = context_stack.empty() ? nullptr : context_stack.back();
    return CUDA_SUCCESS;
}
CU_API cuCtxGetDevice(CUdevice *out) {
    CALL(CONTEXT);
    *out = call.context->device;
    return CUDA_SUCCESS;
}
CU_API cuCtxGetApiVersion(CUcontext c, unsigned *out) {
    CALL(ANY);
    if (!S.contexts.count(c)) return CUDA_INVALID_CONTEXT;
    *out = 3020;
    return CUDA_SUCCESS;
}
CU_API cuCtxSynchronize() {
    CALL(CONTEXT | UNSAFE);
    run_all(call.context);
    return call.context->lost;
}

/* ---- modules ---- */
struct FatbinHeader {
    uint32_t magic;
    uint16_t version, header_bytes;
    uint64_t bytes;
};
/* A fatbin, a cubin for CUDA (machine 190), or PTX. */
static bool is_image(const unsigned char *p) {
    FatbinHeader h;
    if (!memcmp(p, "\177ELF\2", 5)) return p[18] == 190 && p[19] == 0;
    if (!memcmp(p, "//", 2) || !memcmp(p, ".version", 8))
        return strstr((const char *)p, ".version ") != nullptr;
    memcpy(&h, p, sizeof h);
    return h.magic == 0xba55ed50u && h.version == 1 && h.header_bytes == 16;
}
static CUresult load(CUmodule *out, const void *image, Context *c) {
    if (!out || !image) return CUDA_INVALID_VALUE;
    if (!is_image((const unsigned char *)image)) return CUDA_INVALID_IMAGE;
    if (S.settings.load_result) return S.settings.load_result;
    Module *m = new Module();
    m->context = c;
    S.modules.insert(m);
    *out = m;
    return CUDA_SUCCESS;
}
CU_API cuModuleLoadData(CUmodule *out, const void *image) {
    CALL(CONTEXT | UNSAFE);
    return load(out, image, call.context);
}
/* The options that are known to matter: a log of errors (5, 6) is left empty. */
CU_API cuModuleLoadDataEx(CUmodule *out, const void *image, unsigned n, int *options, void **values) {
    CALL(CONTEXT | UNSAFE);
    for (unsigned i = 0; i < n; i++) {
        if (options[i] == 5 && values[i]) *(char *)values[i] = 0;
    }
    return load(out, image, call.context);
}
CU_API cuModuleUnload(CUmodule m) {
    CALL(CONTEXT | UNSAFE | FREES);
    if (!S.modules.count(m)) {
        misuse("cuModuleUnload of no module");
        return CUDA_INVALID_HANDLE;
    }
    if (m->context != call.context) return CUDA_INVALID_CONTEXT;
    run_all(call.context);
    S.modules.erase(m);
    delete m;
    return call.after;
}
CU_API cuModuleGetFunction(CUfunction *out, CUmodule m, const char *name) {
    CALL(CONTEXT);
    if (!out || !name) return CUDA_INVALID_VALUE;
    if (!S.modules.count(m)) return CUDA_INVALID_HANDLE;
    KernelInfo info = kernel_find(name);
    if (!info.args_bytes) return CUDA_NOT_FOUND;
    auto &f = m->functions[name];
    if (!f) {
        f.reset(new Function());
        f->module = m;
        f->name = name;
        f->args_bytes = info.args_bytes;
        f->threads = info.threads;
    }
    *out = f.get();
    return CUDA_SUCCESS;
}

bool is_function(CUfunction f) {
    for (Module *m : S.modules) {
        for (auto &x : m->functions) {
            if (x.second.get() == f) return true;
        }
    }
    return false;
}
CU_API cuFuncSetAttribute(CUfunction f, int a, int value) {
    CALL(CONTEXT);
    if (!is_function(f)) return CUDA_INVALID_HANDLE;
    if (a == FUNC_SHARED_CARVEOUT) return CUDA_SUCCESS;
    if (a != FUNC_DYNAMIC_SHARED || value < 0 || value > shared_optin()) return CUDA_INVALID_VALUE;
    f->dynamic_limit = value;
    return CUDA_SUCCESS;
}
CU_API cuFuncGetAttribute(int *out, int a, CUfunction f) {
    CALL(CONTEXT);
    if (!out) return CUDA_INVALID_VALUE;
    if (!is_function(f)) return CUDA_INVALID_HANDLE;
    switch (a) {
    case 0: *out = (int)f->threads; return CUDA_SUCCESS;
    case FUNC_SHARED_SIZE: *out = 0; return CUDA_SUCCESS;
    case FUNC_NUM_REGS: *out = 128; return CUDA_SUCCESS;
    case FUNC_DYNAMIC_SHARED: *out = f->dynamic_limit; return CUDA_SUCCESS;
    default: return CUDA_INVALID_VALUE;
    }
}
CU_API cuOccupancyMaxActiveBlocksPerMultiprocessor(int *out, CUfunction f, int threads, size_t shared) {
    CALL(CONTEXT);
    if (!out || threads <= 0) return CUDA_INVALID_VALUE;
    if (!is_function(f)) return CUDA_INVALID_HANDLE;
    int by_threads = attribute(ATTRIBUTE_THREADS_PER_SM) / threads;
    int by_shared =
        attribute(ATTRIBUTE_SHARED_PER_SM) / (int)(shared + attribute(ATTRIBUTE_SHARED_RESERVED) + 1);
    if (by_shared > 16) by_shared = 16;
    *out = (int)shared > f->dynamic_limit ? 0 : by_threads < by_shared ? by_threads : by_shared;
    return CUDA_SUCCESS;
}
