/* Faults of a Vulkan driver, by a wrapped loader: each call fails in its turn, for once or with the device lost; the driver wants
   memory back; a shader is wrong; what was kept of an earlier run is damaged; there is no driver. Every time there is a clean
   error that names what failed, nothing is leaked, requests are kept, and after kvl_cache_recover the tokens come out as they
   would have. */
#include <dlfcn.h>
static void *loader_or_null(const char *name, int flags);
static bool no_loader;
#define dlopen loader_or_null
#define KVL_IMPLEMENTATION
#include "gpu_life.h"
#undef dlopen

#include "../common/vk_wrap.h"
