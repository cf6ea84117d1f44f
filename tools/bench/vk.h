/* vk.h - the part of Vulkan that bench_vulkan and the tests on a GPU call, with the declarations of kernels_vulkan/vk_api.h (which stand in the
 * generated header): no
 * Vulkan headers are needed, and the loader is found at run time. A call that fails ends the program with its name.
 *
 * Threads: one. */
#ifndef BENCH_VK_H
#define BENCH_VK_H

#include "kvlite.h"

#include "kernels_vulkan/kvlite_vulkan_kernels.h"
#include "llm/error.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct vk {
    kvli_vk_functions f;
    void *library;
    kvli_vk_get_instance_proc proc;
    kvli_vk_instance instance;
    kvli_vk_physical physical;
    kvli_vk_device device;
    kvli_vk_queue queue;
    uint32_t family, number; /* of the queue's family; of the device among the instance's */
    uint32_t features;       /* KVL_VULKAN_*: what it was created with */
    uint32_t subgroup;
    kvli_vk_properties about;
    kvli_vk_memory_properties memory;
    uint64_t allocation_size; /* the most at once */
    bool budget;              /* VK_EXT_memory_budget */
    kvli_vk_command_pool pool;
    kvli_vk_fence fence;
    void(KVLI_VK_CALL *free_commands)(kvli_vk_device device, kvli_vk_command_pool pool, uint32_t n,
                                      const kvli_vk_commands *commands);
} vk;

typedef struct vk_buffer {
    kvli_vk_buffer buffer;
    kvli_vk_memory memory;
    uint8_t *map; /* of host-visible memory */
    uint64_t bytes;
} vk_buffer;

static inline void vk_check(int r, const char *call) {
    if (r >= 0) return;
    fprintf(stderr, "%s: VkResult %d\n", call, r);
    exit(1);
}
#define VK(v, name, ...) vk_check((v)->f.name(__VA_ARGS__), #name)

/* ---- opening ---- */

static inline void vk_set(void *pointer, kvli_vk_function f) { memcpy(pointer, &f, sizeof f); }

static inline bool vk_load(vk *v, char *err, size_t n) {
    static const char *const names[] = {"libvulkan.so.1", "libvulkan.so", "libvulkan.1.dylib",
                                        "libMoltenVK.dylib"};
    for (size_t i = 0; i < sizeof names / sizeof *names && !v->library; i++)
        v->library = dlopen(names[i], RTLD_NOW);
    if (!v->library) return llm_fail(err, n, "no Vulkan loader: libvulkan.so.1 is not there");
    void *proc = dlsym(v->library, "vkGetInstanceProcAddr");
    memcpy(&v->proc, &proc, sizeof proc);
    if (!v->proc) return llm_fail(err, n, "libvulkan.so.1 has no vkGetInstanceProcAddr");
#define VK_GLOBAL(name, symbol, result, args)  \
    vk_set(&v->f.name, v->proc(NULL, symbol)); \
    if (!v->f.name) return llm_fail(err, n, "libvulkan.so.1 has no %s", symbol);
    KVLI_VK_GLOBAL_FUNCTIONS(VK_GLOBAL)
#undef VK_GLOBAL
    kvli_vk_application app = {.type = KVLI_VK_TYPE_APPLICATION, .api_version = KVLI_VK_API_1_1};
    kvli_vk_instance_info info = {.type = KVLI_VK_TYPE_INSTANCE, .application = &app};
    int r = v->f.create_instance(&info, NULL, &v->instance);
    if (r) return llm_fail(err, n, "vkCreateInstance: VkResult %d (no driver?)", r);
#define VK_OF_INSTANCE(name, symbol, result, args)    \
    vk_set(&v->f.name, v->proc(v->instance, symbol)); \
    if (!v->f.name) return llm_fail(err, n, "there is no %s", symbol);
    KVLI_VK_INSTANCE_FUNCTIONS(VK_OF_INSTANCE)
#undef VK_OF_INSTANCE
    return true;
}

/* Device `wanted`, or for KVL_NONE the first of the best kind. */
static inline bool vk_choose(vk *v, uint32_t wanted, char *err, size_t n) {
    static const int rank[] = {
        [KVLI_VK_DEVICE_DISCRETE] = 4, [KVLI_VK_DEVICE_INTEGRATED] = 3, [KVLI_VK_DEVICE_VIRTUAL] = 2};
    kvli_vk_physical all[32];
    uint32_t count = 32;
    int best = -1;
    VK(v, physical_devices, v->instance, &count, all);
    if (!count) return llm_fail(err, n, "there is no Vulkan device");
    if (wanted != KVL_NONE && wanted >= count)
        return llm_fail(err, n, "there is no Vulkan device %u, only %u", wanted, count);
    for (uint32_t i = 0; i < count; i++) {
        kvli_vk_properties p = {.type = KVLI_VK_TYPE_PROPERTIES};
        v->f.properties(all[i], &p);
        int r = p.device_type < KVLI_VK_DEVICE_CPU ? rank[p.device_type] : 0;
        if (wanted == KVL_NONE ? r <= best : i != wanted) continue;
        best = r;
        v->physical = all[i];
        v->number = i;
    }
    kvli_vk_maintenance3_properties limits = {.type = KVLI_VK_TYPE_MAINTENANCE3_PROPERTIES};
    kvli_vk_subgroup_properties subgroup = {.type = KVLI_VK_TYPE_SUBGROUP_PROPERTIES, .next = &limits};
    v->about = (kvli_vk_properties){.type = KVLI_VK_TYPE_PROPERTIES, .next = &subgroup};
    v->memory = (kvli_vk_memory_properties){.type = KVLI_VK_TYPE_MEMORY_PROPERTIES};
    v->f.properties(v->physical, &v->about);
    v->f.memory_properties(v->physical, &v->memory);
    v->about.next = NULL;
    v->subgroup = subgroup.size;
    if (subgroup.operations & KVLI_VK_SUBGROUP_SHUFFLE) v->features |= KVL_VULKAN_SUBGROUP;
    v->allocation_size = limits.allocation_size;
    return true;
}

static inline bool vk_has(const kvli_vk_extension *all, uint32_t n, const char *name) {
    for (uint32_t i = 0; i < n; i++)
        if (strcmp(all[i].name, name) == 0) return true;
    return false;
}

/* With what kvlite can use of it. */
static inline bool vk_make_device(vk *v, char *err, size_t n) {
    static kvli_vk_extension all[1024];
    kvli_vk_queue_family families[32];
    uint32_t n_all = 1024, n_families = 32, n_names = 0;
    const char *names[4];
    v->f.device_extensions(v->physical, NULL, &n_all, all);
    v->f.queue_families(v->physical, &n_families, families);
    for (v->family = 0; v->family < n_families && !(families[v->family].flags & KVLI_VK_QUEUE_COMPUTE);)
        v->family++;
    if (v->family == n_families) return llm_fail(err, n, "%s has no queue for compute", v->about.name);
    kvli_vk_subgroup_size_features size = {.type = KVLI_VK_TYPE_SUBGROUP_SIZE_FEATURES};
    kvli_vk_float16_features half = {.type = KVLI_VK_TYPE_FLOAT16_FEATURES};
    kvli_vk_storage16_features storage = {.type = KVLI_VK_TYPE_STORAGE16_FEATURES};
    kvli_vk_features f = {.type = KVLI_VK_TYPE_FEATURES, .next = &storage};
    if (vk_has(all, n_all, "VK_KHR_shader_float16_int8")) {
        names[n_names++] = "VK_KHR_shader_float16_int8";
        half.next = f.next, f.next = &half;
    }
    if (vk_has(all, n_all, "VK_EXT_subgroup_size_control")) {
        names[n_names++] = "VK_EXT_subgroup_size_control";
        size.next = f.next, f.next = &size;
    }
    v->budget = vk_has(all, n_all, "VK_EXT_memory_budget");
    if (v->budget) names[n_names++] = "VK_EXT_memory_budget", v->features |= KVL_VULKAN_MEMORY_BUDGET;
    if (vk_has(all, n_all, "VK_KHR_portability_subset")) names[n_names++] = "VK_KHR_portability_subset";
    v->f.features(v->physical, &f);
    uint32_t arrays = f.has[KVLI_VK_FEATURE_BUFFER_ARRAYS];
    memset(f.has, 0, sizeof f.has);
    f.has[KVLI_VK_FEATURE_BUFFER_ARRAYS] = arrays;
    if (half.float16) v->features |= KVL_VULKAN_FP16;
    if (storage.storage) v->features |= KVL_VULKAN_STORAGE16;
    if (size.control && size.full) v->features |= KVL_VULKAN_SUBGROUP_SIZE;
    storage.uniform = storage.push_constants = storage.input_output = 0;
    const float priority = 1;
    kvli_vk_queue_info queue = {
        .type = KVLI_VK_TYPE_DEVICE_QUEUE, .family = v->family, .count = 1, .priorities = &priority};
    kvli_vk_device_info info = {.type = KVLI_VK_TYPE_DEVICE,
                                .next = &f,
                                .n_queues = 1,
                                .queues = &queue,
                                .n_extensions = n_names,
                                .extensions = names};
    int r = v->f.create_device(v->physical, &info, NULL, &v->device);
    if (r) return llm_fail(err, n, "%s: vkCreateDevice: VkResult %d", v->about.name, r);
#define VK_OF_DEVICE(name, symbol, result, args)                 \
    vk_set(&v->f.name, v->f.get_device_proc(v->device, symbol)); \
    if (!v->f.name) return llm_fail(err, n, "there is no %s", symbol);
    KVLI_VK_DEVICE_FUNCTIONS(VK_OF_DEVICE)
#undef VK_OF_DEVICE
    vk_set(&v->free_commands, v->f.get_device_proc(v->device, "vkFreeCommandBuffers"));
    if (!v->free_commands) return llm_fail(err, n, "there is no vkFreeCommandBuffers");
    v->f.get_queue(v->device, v->family, 0, &v->queue);
    return true;
}

/* False: there is no loader, driver or such device; err says which. */
static inline bool vk_open(vk *v, uint32_t number, char *err, size_t n) {
    *v = (vk){0};
    if (!vk_load(v, err, n) || !vk_choose(v, number, err, n) || !vk_make_device(v, err, n)) return false;
    kvli_vk_command_pool_info pool = {
        .type = KVLI_VK_TYPE_COMMAND_POOL, .flags = KVLI_VK_POOL_RESET, .family = v->family};
    kvli_vk_fence_info fence = {.type = KVLI_VK_TYPE_FENCE};
    VK(v, create_command_pool, v->device, &pool, NULL, &v->pool);
    VK(v, create_fence, v->device, &fence, NULL, &v->fence);
    return true;
}

static inline void vk_close(vk *v) {
    if (v->fence) v->f.destroy_fence(v->device, v->fence, NULL);
    if (v->pool) v->f.destroy_command_pool(v->device, v->pool, NULL);
    if (v->device) v->f.destroy_device(v->device, NULL);
    if (v->instance) v->f.destroy_instance(v->instance, NULL);
    *v = (vk){0}; /* the library stays */
}

/* It, for kvlite. */
static inline void vk_lend(const vk *v, kvl_vulkan_desc *d) {
    d->instance = v->instance;
    d->physical_device = v->physical;
    d->device = v->device;
    d->queue = v->queue;
    d->queue_family = v->family;
    d->features = v->features;
}

/* ---- memory ---- */

/* The first type that has all of `flags`, among the ones allowed; KVL_NONE: none. */
static inline uint32_t vk_memory_type(const vk *v, uint32_t allowed, uint32_t flags) {
    for (uint32_t i = 0; i < v->memory.n_types; i++)
        if (allowed >> i & 1 && (v->memory.types[i].flags & flags) == flags) return i;
    return KVL_NONE;
}

/* On the device, or in memory that the host has mapped and reads fast. */
static inline vk_buffer vk_alloc(const vk *v, uint64_t bytes, bool on_host) {
    static const uint32_t host = KVLI_VK_MEMORY_HOST_VISIBLE | KVLI_VK_MEMORY_HOST_COHERENT;
    vk_buffer b = {.bytes = bytes};
    void *map = NULL;
    kvli_vk_buffer_info info = {.type = KVLI_VK_TYPE_BUFFER,
                                .size = bytes,
                                .use = KVLI_VK_USE_STORAGE | KVLI_VK_USE_TRANSFER_SRC |
                                       KVLI_VK_USE_TRANSFER_DST};
    kvli_vk_requirements need;
    VK(v, create_buffer, v->device, &info, NULL, &b.buffer);
    v->f.requirements(v->device, b.buffer, &need);
    uint32_t type = vk_memory_type(v, need.types,
                                   on_host ? host | KVLI_VK_MEMORY_HOST_CACHED : KVLI_VK_MEMORY_DEVICE_LOCAL);
    if (type == KVL_NONE && on_host) type = vk_memory_type(v, need.types, host);
    if (type == KVL_NONE) vk_check(KVLI_VK_ERROR_FEATURE_NOT_PRESENT, "a type of memory");
    kvli_vk_memory_info memory = {.type = KVLI_VK_TYPE_MEMORY, .size = need.size, .memory_type = type};
    VK(v, alloc, v->device, &memory, NULL, &b.memory);
    VK(v, bind, v->device, b.buffer, b.memory, 0);
    if (on_host) VK(v, map, v->device, b.memory, 0, bytes, 0, &map);
    b.map = map;
    return b;
}

static inline void vk_free(const vk *v, vk_buffer b) {
    if (b.buffer) v->f.destroy_buffer(v->device, b.buffer, NULL);
    if (b.memory) v->f.free(v->device, b.memory, NULL);
}

/* Bytes of the device's largest heap that are free, or all of it where the driver does not tell. */
static inline uint64_t vk_free_bytes(const vk *v) {
    kvli_vk_budget_properties budget = {.type = KVLI_VK_TYPE_BUDGET_PROPERTIES};
    kvli_vk_memory_properties now = {.type = KVLI_VK_TYPE_MEMORY_PROPERTIES,
                                     .next = v->budget ? &budget : NULL};
    uint32_t heap = 0;
    v->f.memory_properties(v->physical, &now);
    for (uint32_t i = 0; i < now.n_heaps; i++)
        if (now.heaps[i].flags & KVLI_VK_HEAP_DEVICE_LOCAL && now.heaps[i].size > now.heaps[heap].size)
            heap = i;
    if (!v->budget) return now.heaps[heap].size;
    return budget.budget[heap] > budget.usage[heap] ? budget.budget[heap] - budget.usage[heap] : 0;
}

/* ---- commands ---- */

static inline kvli_vk_commands vk_begin(const vk *v) {
    kvli_vk_commands_info info = {.type = KVLI_VK_TYPE_COMMANDS, .pool = v->pool, .count = 1};
    kvli_vk_begin_info begin = {.type = KVLI_VK_TYPE_BEGIN};
    kvli_vk_commands commands;
    VK(v, alloc_commands, v->device, &info, &commands);
    VK(v, begin, commands, &begin);
    return commands;
}

/* All before it is done, and seen by all after it. */
static inline void vk_barrier(const vk *v, kvli_vk_commands commands) {
    kvli_vk_barrier all = {.type = KVLI_VK_TYPE_BARRIER,
                           .from = KVLI_VK_MEMORY_READ | KVLI_VK_MEMORY_WRITE,
                           .to = KVLI_VK_MEMORY_READ | KVLI_VK_MEMORY_WRITE};
    v->f.barrier(commands, KVLI_VK_AT_ALL, KVLI_VK_AT_ALL, 0, 1, &all, 0, NULL, 0, NULL);
}

/* Submits recorded commands n times and waits for them. */
static inline void vk_run(const vk *v, kvli_vk_commands commands, uint32_t n) {
    kvli_vk_submit_info submit = {.type = KVLI_VK_TYPE_SUBMIT, .n_commands = 1, .commands = &commands};
    for (uint32_t i = 0; i < n; i++) VK(v, queue_submit, v->queue, 1, &submit, i + 1 == n ? v->fence : NULL);
    VK(v, wait_fences, v->device, 1, &v->fence, 1, UINT64_MAX);
    VK(v, reset_fences, v->device, 1, &v->fence);
}

static inline void vk_end_and_run(const vk *v, kvli_vk_commands commands) {
    VK(v, end, commands);
    vk_run(v, commands, 1);
    v->free_commands(v->device, v->pool, 1, &commands);
}

static inline void vk_copy(const vk *v, kvli_vk_buffer to, uint64_t to_at, kvli_vk_buffer from,
                           uint64_t from_at, uint64_t bytes) {
    kvli_vk_commands commands = vk_begin(v);
    kvli_vk_copy copy = {.src = from_at, .dst = to_at, .bytes = bytes};
    vk_barrier(v, commands);
    v->f.copy_buffer(commands, from, to, 1, &copy);
    vk_barrier(v, commands);
    vk_end_and_run(v, commands);
}

static inline void vk_upload(const vk *v, vk_buffer to, uint64_t at, const void *from, size_t bytes) {
    vk_buffer staging = vk_alloc(v, bytes, true);
    memcpy(staging.map, from, bytes);
    vk_copy(v, to.buffer, at, staging.buffer, 0, bytes);
    vk_free(v, staging);
}

static inline void vk_download(const vk *v, void *to, vk_buffer from, uint64_t at, size_t bytes) {
    vk_buffer staging = vk_alloc(v, bytes, true);
    vk_copy(v, staging.buffer, 0, from.buffer, at, bytes);
    memcpy(to, staging.map, bytes);
    vk_free(v, staging);
}

/* ---- a shader of kernels_vulkan/ by itself ---- */
enum { VK_BANKS = 2 };

typedef struct vk_shader {
    kvli_vk_set_layout layouts[2];
    kvli_vk_pipeline_layout layout;
    kvli_vk_pipeline pipeline;
    kvli_vk_set_pool pool;
    kvli_vk_set sets[2];
} vk_shader;

/* What is bound: of set 0 pages[0], pages[1], tables, partial o, partial ml, layers, taint; of set 1 a, b. */
enum {
    VK_BOUND_PAGES,
    VK_BOUND_TABLES = 2,
    VK_BOUND_LAYERS = 5,
    VK_BOUND_TAINT,
    VK_BOUND_A,
    VK_BOUND_B,
    VK_BOUND
};

static inline void vk_shader_layout(const vk *v, vk_shader *s) {
    for (uint32_t set = 0; set < 2; set++) {
        kvli_vk_binding b[6];
        for (uint32_t i = 0; i < 6; i++)
            b[i] = (kvli_vk_binding){.binding = i,
                                     .type = KVLI_VK_STORAGE_BUFFER,
                                     .count = !set && i == KVLI_VK_PAGES ? VK_BANKS : 1,
                                     .stages = KVLI_VK_STAGE_COMPUTE};
        kvli_vk_set_layout_info info = {
            .type = KVLI_VK_TYPE_SET_LAYOUT, .n_bindings = set ? 2 : 6, .bindings = b};
        VK(v, create_set_layout, v->device, &info, NULL, &s->layouts[set]);
    }
    kvli_vk_push_range range = {.stages = KVLI_VK_STAGE_COMPUTE, .size = sizeof(kvli_vk_push)};
    kvli_vk_pipeline_layout_info info = {.type = KVLI_VK_TYPE_PIPELINE_LAYOUT,
                                         .n_sets = 2,
                                         .sets = s->layouts,
                                         .n_ranges = 1,
                                         .ranges = &range};
    VK(v, create_pipeline_layout, v->device, &info, NULL, &s->layout);
}

static inline void vk_shader_bind(const vk *v, vk_shader *s, const kvli_vk_buffer bound[VK_BOUND]) {
    kvli_vk_pool_size size = {.type = KVLI_VK_STORAGE_BUFFER, .count = VK_BOUND};
    kvli_vk_set_pool_info pool = {.type = KVLI_VK_TYPE_SET_POOL, .max_sets = 2, .n_sizes = 1, .sizes = &size};
    VK(v, create_set_pool, v->device, &pool, NULL, &s->pool);
    kvli_vk_sets_info sets = {.type = KVLI_VK_TYPE_SETS, .pool = s->pool, .count = 2, .layouts = s->layouts};
    VK(v, alloc_sets, v->device, &sets, s->sets);
    for (uint32_t i = 0; i < VK_BOUND; i++) {
        kvli_vk_range range = {.buffer = bound[i], .bytes = UINT64_MAX};
        kvli_vk_write_set write = {.type = KVLI_VK_TYPE_WRITE_SET,
                                   .set = s->sets[i >= VK_BOUND_A],
                                   .binding = i < VK_BANKS      ? KVLI_VK_PAGES
                                              : i >= VK_BOUND_A ? i - VK_BOUND_A
                                                                : i - 1,
                                   .element = i < VK_BANKS ? i : 0,
                                   .count = 1,
                                   .sort = KVLI_VK_STORAGE_BUFFER,
                                   .ranges = &range};
        v->f.update_sets(v->device, 1, &write, 0, NULL);
    }
}

static inline void vk_shader_make(const vk *v, vk_shader *s, const kvli_vk_shader *code, const uint32_t *spec,
                                  const kvli_vk_buffer bound[VK_BOUND]) {
    kvli_vk_special entries[KVLI_VK_SPECIALISATIONS];
    kvli_vk_shader_module module;
    for (uint32_t i = 0; i < KVLI_VK_SPECIALISATIONS; i++) entries[i] = (kvli_vk_special){i, 4 * i, 4};
    kvli_vk_specialisation special = {KVLI_VK_SPECIALISATIONS, entries, 4 * KVLI_VK_SPECIALISATIONS, spec};
    kvli_vk_shader_module_info module_info = {
        .type = KVLI_VK_TYPE_SHADER_MODULE, .bytes = 4 * (size_t)code->n_words, .code = code->words};
    vk_shader_layout(v, s);
    VK(v, create_shader_module, v->device, &module_info, NULL, &module);
    kvli_vk_compute_pipeline_info info = {.type = KVLI_VK_TYPE_COMPUTE_PIPELINE,
                                          .stage = {.type = KVLI_VK_TYPE_STAGE,
                                                    .stage = KVLI_VK_STAGE_COMPUTE,
                                                    .module = module,
                                                    .name = "main",
                                                    .specialisation = &special},
                                          .layout = s->layout};
    VK(v, create_pipelines, v->device, NULL, 1, &info, NULL, &s->pipeline);
    v->f.destroy_shader_module(v->device, module, NULL);
    vk_shader_bind(v, s, bound);
}

static inline void vk_shader_free(const vk *v, vk_shader *s) {
    v->f.destroy_set_pool(v->device, s->pool, NULL);
    v->f.destroy_pipeline(v->device, s->pipeline, NULL);
    v->f.destroy_pipeline_layout(v->device, s->layout, NULL);
    for (int i = 0; i < 2; i++) v->f.destroy_set_layout(v->device, s->layouts[i], NULL);
}

static inline void vk_dispatch(const vk *v, kvli_vk_commands commands, const vk_shader *s,
                               const kvli_vk_push *push, uint32_t x, uint32_t y, uint32_t z) {
    v->f.bind_pipeline(commands, KVLI_VK_BIND_COMPUTE, s->pipeline);
    v->f.bind_sets(commands, KVLI_VK_BIND_COMPUTE, s->layout, 0, 2, s->sets, 0, NULL);
    v->f.push(commands, s->layout, KVLI_VK_STAGE_COMPUTE, 0, sizeof *push, push);
    v->f.dispatch(commands, x, y, z);
}

#endif /* BENCH_VK_H */
