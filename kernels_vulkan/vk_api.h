/* What kvlite.h (>>vulkan) uses of Vulkan 1.1, with declarations of our own that have the same layout, so that programs need
   no Vulkan headers (registry.khronos.org/vulkan: the specification; tests/compile/vk_api.c compares all this with
   vulkan_core.h). The text of this file stands in the generated kvlite_vulkan_kernels.h. 64-bit programs only.
   In structs `type` is sType, `next` pNext. */
#ifndef KVLI_VULKAN_API_H
#define KVLI_VULKAN_API_H
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define KVLI_VK_CALL __stdcall
#else
#define KVLI_VK_CALL
#endif

#define KVLI_VK_HANDLES(X)               \
    X(instance, VkInstance)              \
    X(physical, VkPhysicalDevice)        \
    X(device, VkDevice)                  \
    X(queue, VkQueue)                    \
    X(commands, VkCommandBuffer)         \
    X(memory, VkDeviceMemory)            \
    X(buffer, VkBuffer)                  \
    X(fence, VkFence)                    \
    X(shader_module, VkShaderModule)     \
    X(set_layout, VkDescriptorSetLayout) \
    X(set_pool, VkDescriptorPool)        \
    X(set, VkDescriptorSet)              \
    X(pipeline_layout, VkPipelineLayout) \
    X(pipeline_cache, VkPipelineCache)   \
    X(pipeline, VkPipeline)              \
    X(command_pool, VkCommandPool)
#define KVLI_VK_HANDLE_(name, vk) typedef struct kvli_vk_##name##_ *kvli_vk_##name;
KVLI_VK_HANDLES(KVLI_VK_HANDLE_)
#undef KVLI_VK_HANDLE_

/* VkResult; errors are negative. */
#define KVLI_VK_RESULTS(X)                                               \
    X(SUCCESS, 0, "VK_SUCCESS")                                          \
    X(NOT_READY, 1, "VK_NOT_READY")                                      \
    X(TIMEOUT, 2, "VK_TIMEOUT")                                          \
    X(INCOMPLETE, 5, "VK_INCOMPLETE")                                    \
    X(ERROR_OUT_OF_HOST_MEMORY, -1, "VK_ERROR_OUT_OF_HOST_MEMORY")       \
    X(ERROR_OUT_OF_DEVICE_MEMORY, -2, "VK_ERROR_OUT_OF_DEVICE_MEMORY")   \
    X(ERROR_INITIALIZATION_FAILED, -3, "VK_ERROR_INITIALIZATION_FAILED") \
    X(ERROR_DEVICE_LOST, -4, "VK_ERROR_DEVICE_LOST")                     \
    X(ERROR_MEMORY_MAP_FAILED, -5, "VK_ERROR_MEMORY_MAP_FAILED")         \
    X(ERROR_LAYER_NOT_PRESENT, -6, "VK_ERROR_LAYER_NOT_PRESENT")         \
    X(ERROR_EXTENSION_NOT_PRESENT, -7, "VK_ERROR_EXTENSION_NOT_PRESENT") \
    X(ERROR_FEATURE_NOT_PRESENT, -8, "VK_ERROR_FEATURE_NOT_PRESENT")     \
    X(ERROR_INCOMPATIBLE_DRIVER, -9, "VK_ERROR_INCOMPATIBLE_DRIVER")     \
    X(ERROR_TOO_MANY_OBJECTS, -10, "VK_ERROR_TOO_MANY_OBJECTS")          \
    X(ERROR_FRAGMENTED_POOL, -12, "VK_ERROR_FRAGMENTED_POOL")            \
    X(ERROR_OUT_OF_POOL_MEMORY, -1000069000, "VK_ERROR_OUT_OF_POOL_MEMORY")
enum {
#define KVLI_VK_RESULT_(name, value, symbol) KVLI_VK_##name = value,
    KVLI_VK_RESULTS(KVLI_VK_RESULT_)
#undef KVLI_VK_RESULT_
        KVLI_VK_RESULT_FORCE_INT_ = 0x7fffffff
};
enum { /* VkStructureType */
       KVLI_VK_TYPE_APPLICATION = 0,
       KVLI_VK_TYPE_INSTANCE = 1,
       KVLI_VK_TYPE_DEVICE_QUEUE = 2,
       KVLI_VK_TYPE_DEVICE = 3,
       KVLI_VK_TYPE_SUBMIT = 4,
       KVLI_VK_TYPE_MEMORY = 5,
       KVLI_VK_TYPE_FENCE = 8,
       KVLI_VK_TYPE_BUFFER = 12,
       KVLI_VK_TYPE_SHADER_MODULE = 16,
       KVLI_VK_TYPE_PIPELINE_CACHE = 17,
       KVLI_VK_TYPE_STAGE = 18,
       KVLI_VK_TYPE_COMPUTE_PIPELINE = 29,
       KVLI_VK_TYPE_PIPELINE_LAYOUT = 30,
       KVLI_VK_TYPE_SET_LAYOUT = 32,
       KVLI_VK_TYPE_SET_POOL = 33,
       KVLI_VK_TYPE_SETS = 34,
       KVLI_VK_TYPE_WRITE_SET = 35,
       KVLI_VK_TYPE_COMMAND_POOL = 39,
       KVLI_VK_TYPE_COMMANDS = 40,
       KVLI_VK_TYPE_BEGIN = 42,
       KVLI_VK_TYPE_BARRIER = 46,
       KVLI_VK_TYPE_FEATURES = 1000059000,
       KVLI_VK_TYPE_PROPERTIES = 1000059001,
       KVLI_VK_TYPE_MEMORY_PROPERTIES = 1000059006,
       KVLI_VK_TYPE_FLOAT16_FEATURES = 1000082000,
       KVLI_VK_TYPE_STORAGE16_FEATURES = 1000083000,
       KVLI_VK_TYPE_SUBGROUP_PROPERTIES = 1000094000,
       KVLI_VK_TYPE_MAINTENANCE3_PROPERTIES = 1000168000,
       KVLI_VK_TYPE_SUBGROUP_SIZE_PROPERTIES = 1000225000,
       KVLI_VK_TYPE_REQUIRED_SUBGROUP_SIZE = 1000225001,
       KVLI_VK_TYPE_SUBGROUP_SIZE_FEATURES = 1000225002,
       KVLI_VK_TYPE_BUDGET_PROPERTIES = 1000237000
};
enum { /* bits and small enumerations */
       KVLI_VK_API_1_1 = 1 << 22 | 1 << 12,
       KVLI_VK_INSTANCE_PORTABILITY = 1,
       KVLI_VK_DEVICE_OTHER = 0, /* VkPhysicalDeviceType */
       KVLI_VK_DEVICE_INTEGRATED = 1,
       KVLI_VK_DEVICE_DISCRETE = 2,
       KVLI_VK_DEVICE_VIRTUAL = 3,
       KVLI_VK_DEVICE_CPU = 4,
       KVLI_VK_FEATURE_BUFFER_ARRAYS = 35, /* shaderStorageBufferArrayDynamicIndexing, in kvli_vk_features */
       KVLI_VK_FEATURE_COUNT = 55,
       KVLI_VK_SUBGROUP_BASIC = 1,
       KVLI_VK_SUBGROUP_BALLOT = 8,
       KVLI_VK_SUBGROUP_SHUFFLE = 16,
       KVLI_VK_QUEUE_GRAPHICS = 1,
       KVLI_VK_QUEUE_COMPUTE = 2,
       KVLI_VK_HEAP_DEVICE_LOCAL = 1,
       KVLI_VK_MEMORY_DEVICE_LOCAL = 1,
       KVLI_VK_MEMORY_HOST_VISIBLE = 2,
       KVLI_VK_MEMORY_HOST_COHERENT = 4,
       KVLI_VK_MEMORY_HOST_CACHED = 8,
       KVLI_VK_USE_TRANSFER_SRC = 1,
       KVLI_VK_USE_TRANSFER_DST = 2,
       KVLI_VK_USE_STORAGE = 32,
       KVLI_VK_STORAGE_BUFFER = 7, /* VkDescriptorType */
       KVLI_VK_STAGE_COMPUTE = 32, /* VkShaderStageFlagBits */
       KVLI_VK_BIND_COMPUTE = 1,   /* VkPipelineBindPoint */
       KVLI_VK_FULL_SUBGROUPS = 2, /* VkPipelineShaderStageCreateFlagBits */
       KVLI_VK_POOL_RESET = 2,
       KVLI_VK_ONE_TIME = 1,
       KVLI_VK_AT_COMPUTE = 0x800, /* VkPipelineStageFlagBits */
       KVLI_VK_AT_TRANSFER = 0x1000,
       KVLI_VK_AT_HOST = 0x4000,
       KVLI_VK_AT_ALL = 0x10000,
       KVLI_VK_SHADER_READ = 0x20, /* VkAccessFlagBits */
       KVLI_VK_SHADER_WRITE = 0x40,
       KVLI_VK_TRANSFER_READ = 0x800,
       KVLI_VK_TRANSFER_WRITE = 0x1000,
       KVLI_VK_HOST_READ = 0x2000,
       KVLI_VK_HOST_WRITE = 0x4000,
       KVLI_VK_MEMORY_READ = 0x8000,
       KVLI_VK_MEMORY_WRITE = 0x10000
};

/* ---- instance and devices ---- */
typedef struct kvli_vk_application { /* VkApplicationInfo */
    int type;
    const void *next;
    const char *name;
    uint32_t version;
    const char *engine;
    uint32_t engine_version, api_version;
} kvli_vk_application;
typedef struct kvli_vk_instance_info { /* VkInstanceCreateInfo */
    int type;
    const void *next;
    uint32_t flags;
    const kvli_vk_application *application;
    uint32_t n_layers;
    const char *const *layers;
    uint32_t n_extensions;
    const char *const *extensions;
} kvli_vk_instance_info;
typedef struct kvli_vk_extension { /* VkExtensionProperties */
    char name[256];
    uint32_t version;
} kvli_vk_extension;
typedef struct kvli_vk_limits { /* VkPhysicalDeviceLimits */
    uint32_t reserved0[7], storage_range, push_constants, allocations, reserved2[9], stage_storage_buffers,
        reserved3[3], stage_resources, reserved4[3], set_storage_buffers, reserved5[26], shared_memory,
        workgroups[3], invocations, workgroup_size[3], reserved6[20];
    uint64_t storage_alignment;
    uint32_t reserved7[22];
    float timestamp_period;
    uint32_t reserved8[17];
    uint64_t coherent_atom;
} kvli_vk_limits;
typedef struct kvli_vk_properties { /* VkPhysicalDeviceProperties2 */
    int type;
    void *next;
    uint32_t api_version, driver_version, vendor, device;
    int device_type;
    char name[256];
    uint8_t cache_uuid[16];
    kvli_vk_limits limits;
    uint32_t sparse[5];
} kvli_vk_properties;
typedef struct kvli_vk_maintenance3_properties { /* VkPhysicalDeviceMaintenance3Properties */
    int type;
    void *next;
    uint32_t set_descriptors;
    uint64_t allocation_size;
} kvli_vk_maintenance3_properties;
typedef struct kvli_vk_subgroup_properties { /* VkPhysicalDeviceSubgroupProperties */
    int type;
    void *next;
    uint32_t size, stages, operations, quad_in_all;
} kvli_vk_subgroup_properties;
typedef struct kvli_vk_subgroup_size_properties { /* VkPhysicalDeviceSubgroupSizeControlProperties */
    int type;
    void *next;
    uint32_t min_size, max_size, workgroup_subgroups, stages;
} kvli_vk_subgroup_size_properties;
typedef struct kvli_vk_features { /* VkPhysicalDeviceFeatures2 */
    int type;
    void *next;
    uint32_t has[KVLI_VK_FEATURE_COUNT];
} kvli_vk_features;
typedef struct kvli_vk_storage16_features { /* VkPhysicalDevice16BitStorageFeatures */
    int type;
    void *next;
    uint32_t storage, uniform, push_constants, input_output;
} kvli_vk_storage16_features;
typedef struct kvli_vk_float16_features { /* VkPhysicalDeviceShaderFloat16Int8Features */
    int type;
    void *next;
    uint32_t float16, int8;
} kvli_vk_float16_features;
typedef struct kvli_vk_subgroup_size_features { /* VkPhysicalDeviceSubgroupSizeControlFeatures */
    int type;
    void *next;
    uint32_t control, full;
} kvli_vk_subgroup_size_features;
typedef struct kvli_vk_queue_family { /* VkQueueFamilyProperties */
    uint32_t flags, count, timestamp_bits, granularity[3];
} kvli_vk_queue_family;
typedef struct kvli_vk_queue_info { /* VkDeviceQueueCreateInfo */
    int type;
    const void *next;
    uint32_t flags, family, count;
    const float *priorities;
} kvli_vk_queue_info;
typedef struct kvli_vk_device_info { /* VkDeviceCreateInfo */
    int type;
    const void *next;
    uint32_t flags, n_queues;
    const kvli_vk_queue_info *queues;
    uint32_t n_layers;
    const char *const *layers;
    uint32_t n_extensions;
    const char *const *extensions;
    const void *features;
} kvli_vk_device_info;

/* ---- memory ---- */
typedef struct kvli_vk_memory_type { /* VkMemoryType */
    uint32_t flags, heap;
} kvli_vk_memory_type;
typedef struct kvli_vk_memory_heap { /* VkMemoryHeap */
    uint64_t size;
    uint32_t flags;
} kvli_vk_memory_heap;
typedef struct kvli_vk_memory_properties { /* VkPhysicalDeviceMemoryProperties2 */
    int type;
    void *next;
    uint32_t n_types;
    kvli_vk_memory_type types[32];
    uint32_t n_heaps;
    kvli_vk_memory_heap heaps[16];
} kvli_vk_memory_properties;
typedef struct kvli_vk_budget_properties { /* VkPhysicalDeviceMemoryBudgetPropertiesEXT */
    int type;
    void *next;
    uint64_t budget[16], usage[16];
} kvli_vk_budget_properties;
typedef struct kvli_vk_requirements { /* VkMemoryRequirements */
    uint64_t size, alignment;
    uint32_t types;
} kvli_vk_requirements;
typedef struct kvli_vk_memory_info { /* VkMemoryAllocateInfo */
    int type;
    const void *next;
    uint64_t size;
    uint32_t memory_type;
} kvli_vk_memory_info;
typedef struct kvli_vk_buffer_info { /* VkBufferCreateInfo */
    int type;
    const void *next;
    uint32_t flags;
    uint64_t size;
    uint32_t use;
    int sharing;
    uint32_t n_families;
    const uint32_t *families;
} kvli_vk_buffer_info;

/* ---- pipelines ---- */
typedef struct kvli_vk_shader_module_info { /* VkShaderModuleCreateInfo */
    int type;
    const void *next;
    uint32_t flags;
    size_t bytes;
    const uint32_t *code;
} kvli_vk_shader_module_info;
typedef struct kvli_vk_binding { /* VkDescriptorSetLayoutBinding */
    uint32_t binding;
    int type;
    uint32_t count, stages;
    const void *samplers;
} kvli_vk_binding;
typedef struct kvli_vk_set_layout_info { /* VkDescriptorSetLayoutCreateInfo */
    int type;
    const void *next;
    uint32_t flags, n_bindings;
    const kvli_vk_binding *bindings;
} kvli_vk_set_layout_info;
typedef struct kvli_vk_push_range { /* VkPushConstantRange */
    uint32_t stages, offset, size;
} kvli_vk_push_range;
typedef struct kvli_vk_pipeline_layout_info { /* VkPipelineLayoutCreateInfo */
    int type;
    const void *next;
    uint32_t flags, n_sets;
    const kvli_vk_set_layout *sets;
    uint32_t n_ranges;
    const kvli_vk_push_range *ranges;
} kvli_vk_pipeline_layout_info;
typedef struct kvli_vk_special { /* VkSpecializationMapEntry */
    uint32_t id, offset;
    size_t size;
} kvli_vk_special;
typedef struct kvli_vk_specialisation { /* VkSpecializationInfo */
    uint32_t n;
    const kvli_vk_special *entries;
    size_t bytes;
    const void *data;
} kvli_vk_specialisation;
typedef struct kvli_vk_required_subgroup_size { /* VkPipelineShaderStageRequiredSubgroupSizeCreateInfo */
    int type;
    void *next;
    uint32_t size;
} kvli_vk_required_subgroup_size;
typedef struct kvli_vk_stage_info { /* VkPipelineShaderStageCreateInfo */
    int type;
    const void *next;
    uint32_t flags;
    int stage;
    kvli_vk_shader_module module;
    const char *name;
    const kvli_vk_specialisation *specialisation;
} kvli_vk_stage_info;
typedef struct kvli_vk_compute_pipeline_info { /* VkComputePipelineCreateInfo */
    int type;
    const void *next;
    uint32_t flags;
    kvli_vk_stage_info stage;
    kvli_vk_pipeline_layout layout;
    kvli_vk_pipeline base;
    int32_t base_index;
} kvli_vk_compute_pipeline_info;
typedef struct kvli_vk_pipeline_cache_info { /* VkPipelineCacheCreateInfo */
    int type;
    const void *next;
    uint32_t flags;
    size_t bytes;
    const void *data;
} kvli_vk_pipeline_cache_info;

/* ---- descriptors ---- */
typedef struct kvli_vk_pool_size { /* VkDescriptorPoolSize */
    int type;
    uint32_t count;
} kvli_vk_pool_size;
typedef struct kvli_vk_set_pool_info { /* VkDescriptorPoolCreateInfo */
    int type;
    const void *next;
    uint32_t flags, max_sets, n_sizes;
    const kvli_vk_pool_size *sizes;
} kvli_vk_set_pool_info;
typedef struct kvli_vk_sets_info { /* VkDescriptorSetAllocateInfo */
    int type;
    const void *next;
    kvli_vk_set_pool pool;
    uint32_t count;
    const kvli_vk_set_layout *layouts;
} kvli_vk_sets_info;
typedef struct kvli_vk_range { /* VkDescriptorBufferInfo */
    kvli_vk_buffer buffer;
    uint64_t offset, bytes;
} kvli_vk_range;
typedef struct kvli_vk_write_set { /* VkWriteDescriptorSet */
    int type;
    const void *next;
    kvli_vk_set set;
    uint32_t binding, element, count;
    int sort;
    const void *images;
    const kvli_vk_range *ranges;
    const void *views;
} kvli_vk_write_set;

/* ---- commands ---- */
typedef struct kvli_vk_command_pool_info { /* VkCommandPoolCreateInfo */
    int type;
    const void *next;
    uint32_t flags, family;
} kvli_vk_command_pool_info;
typedef struct kvli_vk_commands_info { /* VkCommandBufferAllocateInfo */
    int type;
    const void *next;
    kvli_vk_command_pool pool;
    int level;
    uint32_t count;
} kvli_vk_commands_info;
typedef struct kvli_vk_begin_info { /* VkCommandBufferBeginInfo */
    int type;
    const void *next;
    uint32_t flags;
    const void *inheritance;
} kvli_vk_begin_info;
typedef struct kvli_vk_barrier { /* VkMemoryBarrier */
    int type;
    const void *next;
    uint32_t from, to;
} kvli_vk_barrier;
typedef struct kvli_vk_copy { /* VkBufferCopy */
    uint64_t src, dst, bytes;
} kvli_vk_copy;
typedef struct kvli_vk_submit_info { /* VkSubmitInfo */
    int type;
    const void *next;
    uint32_t n_waits;
    const void *waits;
    const uint32_t *wait_stages;
    uint32_t n_commands;
    const kvli_vk_commands *commands;
    uint32_t n_signals;
    const void *signals;
} kvli_vk_submit_info;
typedef struct kvli_vk_fence_info { /* VkFenceCreateInfo */
    int type;
    const void *next;
    uint32_t flags;
} kvli_vk_fence_info;

/* ---- functions: X(name, symbol, type of the result, arguments) ---- */
/* (A null allocator: VkAllocationCallbacks are not used.) */
typedef void(KVLI_VK_CALL *kvli_vk_function)(void);
typedef kvli_vk_function(KVLI_VK_CALL *kvli_vk_get_instance_proc)(kvli_vk_instance instance,
                                                                  const char *name);

#define KVLI_VK_GLOBAL_FUNCTIONS(X)                                                  \
    X(create_instance, "vkCreateInstance", int,                                      \
      (const kvli_vk_instance_info *info, const void *alloc, kvli_vk_instance *out)) \
    X(instance_extensions, "vkEnumerateInstanceExtensionProperties", int,            \
      (const char *layer, uint32_t *n, kvli_vk_extension *out))
#define KVLI_VK_INSTANCE_FUNCTIONS(X)                                                                     \
    X(destroy_instance, "vkDestroyInstance", void, (kvli_vk_instance instance, const void *alloc))        \
    X(physical_devices, "vkEnumeratePhysicalDevices", int,                                                \
      (kvli_vk_instance instance, uint32_t * n, kvli_vk_physical * out))                                  \
    X(properties, "vkGetPhysicalDeviceProperties2", void,                                                 \
      (kvli_vk_physical device, kvli_vk_properties * out))                                                \
    X(features, "vkGetPhysicalDeviceFeatures2", void, (kvli_vk_physical device, kvli_vk_features * out))  \
    X(memory_properties, "vkGetPhysicalDeviceMemoryProperties2", void,                                    \
      (kvli_vk_physical device, kvli_vk_memory_properties * out))                                         \
    X(queue_families, "vkGetPhysicalDeviceQueueFamilyProperties", void,                                   \
      (kvli_vk_physical device, uint32_t * n, kvli_vk_queue_family * out))                                \
    X(device_extensions, "vkEnumerateDeviceExtensionProperties", int,                                     \
      (kvli_vk_physical device, const char *layer, uint32_t *n, kvli_vk_extension *out))                  \
    X(create_device, "vkCreateDevice", int,                                                               \
      (kvli_vk_physical device, const kvli_vk_device_info *info, const void *alloc, kvli_vk_device *out)) \
    X(get_device_proc, "vkGetDeviceProcAddr", kvli_vk_function, (kvli_vk_device device, const char *name))
#define KVLI_VK_DEVICE_FUNCTIONS(X)                                                                         \
    X(destroy_device, "vkDestroyDevice", void, (kvli_vk_device device, const void *alloc))                  \
    X(get_queue, "vkGetDeviceQueue", void,                                                                  \
      (kvli_vk_device device, uint32_t family, uint32_t i, kvli_vk_queue * out))                            \
    X(queue_idle, "vkQueueWaitIdle", int, (kvli_vk_queue queue))                                            \
    X(queue_submit, "vkQueueSubmit", int,                                                                   \
      (kvli_vk_queue queue, uint32_t n, const kvli_vk_submit_info *submits, kvli_vk_fence fence))           \
    X(alloc, "vkAllocateMemory", int,                                                                       \
      (kvli_vk_device device, const kvli_vk_memory_info *info, const void *alloc, kvli_vk_memory *out))     \
    X(free, "vkFreeMemory", void, (kvli_vk_device device, kvli_vk_memory memory, const void *alloc))        \
    X(map, "vkMapMemory", int,                                                                              \
      (kvli_vk_device device, kvli_vk_memory memory, uint64_t offset, uint64_t bytes, uint32_t flags,       \
       void **out))                                                                                         \
    X(create_buffer, "vkCreateBuffer", int,                                                                 \
      (kvli_vk_device device, const kvli_vk_buffer_info *info, const void *alloc, kvli_vk_buffer *out))     \
    X(destroy_buffer, "vkDestroyBuffer", void,                                                              \
      (kvli_vk_device device, kvli_vk_buffer buffer, const void *alloc))                                    \
    X(requirements, "vkGetBufferMemoryRequirements", void,                                                  \
      (kvli_vk_device device, kvli_vk_buffer buffer, kvli_vk_requirements * out))                           \
    X(bind, "vkBindBufferMemory", int,                                                                      \
      (kvli_vk_device device, kvli_vk_buffer buffer, kvli_vk_memory memory, uint64_t offset))               \
    X(create_fence, "vkCreateFence", int,                                                                   \
      (kvli_vk_device device, const kvli_vk_fence_info *info, const void *alloc, kvli_vk_fence *out))       \
    X(destroy_fence, "vkDestroyFence", void,                                                                \
      (kvli_vk_device device, kvli_vk_fence fence, const void *alloc))                                      \
    X(reset_fences, "vkResetFences", int, (kvli_vk_device device, uint32_t n, const kvli_vk_fence *fences)) \
    X(wait_fences, "vkWaitForFences", int,                                                                  \
      (kvli_vk_device device, uint32_t n, const kvli_vk_fence *fences, uint32_t all, uint64_t ns))          \
    X(create_shader_module, "vkCreateShaderModule", int,                                                    \
      (kvli_vk_device device, const kvli_vk_shader_module_info *info, const void *alloc,                    \
       kvli_vk_shader_module *out))                                                                         \
    X(destroy_shader_module, "vkDestroyShaderModule", void,                                                 \
      (kvli_vk_device device, kvli_vk_shader_module module, const void *alloc))                             \
    X(create_set_layout, "vkCreateDescriptorSetLayout", int,                                                \
      (kvli_vk_device device, const kvli_vk_set_layout_info *info, const void *alloc,                       \
       kvli_vk_set_layout *out))                                                                            \
    X(destroy_set_layout, "vkDestroyDescriptorSetLayout", void,                                             \
      (kvli_vk_device device, kvli_vk_set_layout layout, const void *alloc))                                \
    X(create_pipeline_layout, "vkCreatePipelineLayout", int,                                                \
      (kvli_vk_device device, const kvli_vk_pipeline_layout_info *info, const void *alloc,                  \
       kvli_vk_pipeline_layout *out))                                                                       \
    X(destroy_pipeline_layout, "vkDestroyPipelineLayout", void,                                             \
      (kvli_vk_device device, kvli_vk_pipeline_layout layout, const void *alloc))                           \
    X(create_pipelines, "vkCreateComputePipelines", int,                                                    \
      (kvli_vk_device device, kvli_vk_pipeline_cache cache, uint32_t n,                                     \
       const kvli_vk_compute_pipeline_info *infos, const void *alloc, kvli_vk_pipeline *out))               \
    X(destroy_pipeline, "vkDestroyPipeline", void,                                                          \
      (kvli_vk_device device, kvli_vk_pipeline pipeline, const void *alloc))                                \
    X(create_pipeline_cache, "vkCreatePipelineCache", int,                                                  \
      (kvli_vk_device device, const kvli_vk_pipeline_cache_info *info, const void *alloc,                   \
       kvli_vk_pipeline_cache *out))                                                                        \
    X(destroy_pipeline_cache, "vkDestroyPipelineCache", void,                                               \
      (kvli_vk_device device, kvli_vk_pipeline_cache cache, const void *alloc))                             \
    X(pipeline_cache_data, "vkGetPipelineCacheData", int,                                                   \
      (kvli_vk_device device, kvli_vk_pipeline_cache cache, size_t * bytes, void *out))                     \
    X(create_set_pool, "vkCreateDescriptorPool", int,                                                       \
      (kvli_vk_device device, const kvli_vk_set_pool_info *info, const void *alloc, kvli_vk_set_pool *out)) \
    X(destroy_set_pool, "vkDestroyDescriptorPool", void,                                                    \
      (kvli_vk_device device, kvli_vk_set_pool pool, const void *alloc))                                    \
    X(alloc_sets, "vkAllocateDescriptorSets", int,                                                          \
      (kvli_vk_device device, const kvli_vk_sets_info *info, kvli_vk_set *out))                             \
    X(update_sets, "vkUpdateDescriptorSets", void,                                                          \
      (kvli_vk_device device, uint32_t n, const kvli_vk_write_set *writes, uint32_t n_copies,               \
       const void *copies))                                                                                 \
    X(create_command_pool, "vkCreateCommandPool", int,                                                      \
      (kvli_vk_device device, const kvli_vk_command_pool_info *info, const void *alloc,                     \
       kvli_vk_command_pool *out))                                                                          \
    X(destroy_command_pool, "vkDestroyCommandPool", void,                                                   \
      (kvli_vk_device device, kvli_vk_command_pool pool, const void *alloc))                                \
    X(alloc_commands, "vkAllocateCommandBuffers", int,                                                      \
      (kvli_vk_device device, const kvli_vk_commands_info *info, kvli_vk_commands *out))                    \
    X(begin, "vkBeginCommandBuffer", int, (kvli_vk_commands commands, const kvli_vk_begin_info *info))      \
    X(end, "vkEndCommandBuffer", int, (kvli_vk_commands commands))                                          \
    X(bind_pipeline, "vkCmdBindPipeline", void,                                                             \
      (kvli_vk_commands commands, int point, kvli_vk_pipeline pipeline))                                    \
    X(bind_sets, "vkCmdBindDescriptorSets", void,                                                           \
      (kvli_vk_commands commands, int point, kvli_vk_pipeline_layout layout, uint32_t first, uint32_t n,    \
       const kvli_vk_set *sets, uint32_t n_offsets, const uint32_t *offsets))                               \
    X(push, "vkCmdPushConstants", void,                                                                     \
      (kvli_vk_commands commands, kvli_vk_pipeline_layout layout, uint32_t stages, uint32_t offset,         \
       uint32_t bytes, const void *from))                                                                   \
    X(dispatch, "vkCmdDispatch", void, (kvli_vk_commands commands, uint32_t x, uint32_t y, uint32_t z))     \
    X(barrier, "vkCmdPipelineBarrier", void,                                                                \
      (kvli_vk_commands commands, uint32_t from, uint32_t to, uint32_t flags, uint32_t n,                   \
       const kvli_vk_barrier *barriers, uint32_t n_buffers, const void *buffers, uint32_t n_images,         \
       const void *images))                                                                                 \
    X(copy_buffer, "vkCmdCopyBuffer", void,                                                                 \
      (kvli_vk_commands commands, kvli_vk_buffer src, kvli_vk_buffer dst, uint32_t n,                       \
       const kvli_vk_copy *copies))                                                                         \
    X(fill_buffer, "vkCmdFillBuffer", void,                                                                 \
      (kvli_vk_commands commands, kvli_vk_buffer buffer, uint64_t offset, uint64_t bytes, uint32_t word))

typedef struct kvli_vk_functions {
#define KVLI_VK_MEMBER_(name, symbol, result, args) result(KVLI_VK_CALL *name) args;
    KVLI_VK_GLOBAL_FUNCTIONS(KVLI_VK_MEMBER_)
    KVLI_VK_INSTANCE_FUNCTIONS(KVLI_VK_MEMBER_)
    KVLI_VK_DEVICE_FUNCTIONS(KVLI_VK_MEMBER_)
#undef KVLI_VK_MEMBER_
} kvli_vk_functions;

#endif
