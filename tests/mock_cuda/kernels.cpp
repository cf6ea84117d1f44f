/* The libraries of kernels stand beside libcuda.so.1, one for each way that the kernels are compiled. */
#include "state.h"

#include "kernels.h"

#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>

namespace {
struct Library {
    decltype(&mock_kernel_find) find;
    decltype(&mock_kernel_run) run;
};

Library open_library(const std::string &name) {
    Dl_info me;
    Library l = {};
    dladdr((void *)&mock_cuda_reset, &me);
    std::string path = me.dli_fname;
    path = path.substr(0, path.rfind('/') + 1) + name;
    void *handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        fprintf(stderr, "mock_cuda: %s\n", dlerror());
        abort();
    }
    l.find = (decltype(l.find))dlsym(handle, "mock_kernel_find");
    l.run = (decltype(l.run))dlsym(handle, "mock_kernel_run");
    return l;
}

const Library &library() {
    static std::map<std::string, Library> open;
    int c = S.settings.capability;
    std::string name = S.settings.simple_kernels ? "simple_kernels.so"
                       : c < 80                  ? "kernels_750.so"
                       : c < 90                  ? "kernels_800.so"
                                                 : "kernels_900.so";
    auto i = open.find(name);
    if (i == open.end()) i = open.emplace(name, open_library(name)).first;
    return i->second;
}
} // namespace

KernelInfo kernel_find(const char *name) {
    KernelInfo info = {0, 0};
    info.args_bytes = library().find(name, &info.threads);
    return info;
}
CUresult kernel_run(const char *name, const unsigned grid[3], const unsigned block[3], size_t shared,
                    const void *args) {
    return library().run(name, grid, block, shared, args);
}
