/* Runs one shader of kernels_vulkan/ on lavapipe, without kvlite.h: for tests of shaders, in C or C++. Validation (core and
   synchronization) is on; any message of it fails the test.

     vkr r;
     if (!vkr_open(&r, 256, false)) return 77;                 // says SKIP; 128, 256, 512 bits: subgroups of 4, 8, 16
     uint32_t spec[KVLI_VK_SPECIALISATIONS] = {...};            // by their ids: spec[KVLI_VK_DIM] = 128, ...
     vkr_pipeline p = vkr_pipeline_make(&r, "decode", KVLI_VK_SUBGROUP, spec);
     vkr_bindings b = {0};
     b.pages[0] = vkr_buffer_make(&r, bytes, NULL);             // .map: the bytes, for the test to read and write
     b.pages[1] = ...                                           // all spec[KVLI_VK_BANKS] of them, or the last given again
     b.tables = ..., b.layers = ..., b.a = ..., b.b = ...       // those left out are bound to a small buffer
     vkr_dispatch(&r, &p, &b, &push, n_items, n_kv_heads, 1);   // and waits
     double us = vkr_time(&r, &p, &b, &push, n, h, 1, 0.5);     // the least of what fits in half a second

   Buffers, pipelines and all are freed by vkr_close, or before by vkr_buffer_free and vkr_pipeline_free. What fails, fails the
   test by cmocka. A process has one vector width: the driver looks at it once.

   VKR_LOADER, defined before this file is included: another vkGetInstanceProcAddr.

   Shaders come from kernels_vulkan/kvlite_vulkan_kernels.h. With VKR_SOURCES defined before this file is included, or in the
   environment, or while that header is not there, kernels_vulkan/NAME.comp is compiled by glslangValidator instead. */
#ifndef KVL_TESTS_VK_RUN_H
#define KVL_TESTS_VK_RUN_H
#ifdef __cplusplus
extern "C" {
#endif
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#ifdef __cplusplus
}
#endif
#include <dlfcn.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

#define VK_NO_PROTOTYPES
#include <vulkan/vulkan.h>

#include "../common/vk_env.h"
#include "../../kernels_cuda/tables.h"
#if defined(__has_include)
#if __has_include("../../kernels_vulkan/kvlite_vulkan_kernels.h") && !defined(VKR_SOURCES)
#include "../../kernels_vulkan/kvlite_vulkan_kernels.h"
#define VKR_HEADER
#endif
#endif
#include "../../kernels_vulkan/abi.h"

#define VKR_GLOBAL(X) X(vkCreateInstance) X(vkEnumerateInstanceExtensionProperties)
#define VKR_INSTANCE(X)                         \
    X(vkDestroyInstance)                        \
    X(vkEnumeratePhysicalDevices)               \
    X(vkGetPhysicalDeviceProperties2)           \
    X(vkGetPhysicalDeviceFeatures2)             \
    X(vkGetPhysicalDeviceMemoryProperties)      \
    X(vkGetPhysicalDeviceQueueFamilyProperties) \
    X(vkCreateDebugUtilsMessengerEXT)           \
    X(vkDestroyDebugUtilsMessengerEXT)          \
    X(vkCreateDevice)                           \
    X(vkGetDeviceProcAddr)
#define VKR_DEVICE(X)                \
    X(vkDestroyDevice)               \
    X(vkGetDeviceQueue)              \
    X(vkCreateBuffer)                \
    X(vkDestroyBuffer)               \
    X(vkGetBufferMemoryRequirements) \
    X(vkAllocateMemory)              \
    X(vkFreeMemory)                  \
    X(vkBindBufferMemory)            \
    X(vkMapMemory)                   \
    X(vkCreateShaderModule)          \
    X(vkDestroyShaderModule)         \
    X(vkCreateDescriptorSetLayout)   \
    X(vkDestroyDescriptorSetLayout)  \
    X(vkCreatePipelineLayout)        \
    X(vkDestroyPipelineLayout)       \
    X(vkCreateComputePipelines)      \
    X(vkDestroyPipeline)             \
    X(vkCreateDescriptorPool)        \
    X(vkDestroyDescriptorPool)       \
    X(vkAllocateDescriptorSets)      \
    X(vkUpdateDescriptorSets)        \
    X(vkCreateCommandPool)           \
    X(vkDestroyCommandPool)          \
    X(vkResetCommandPool)            \
    X(vkAllocateCommandBuffers)      \
    X(vkBeginCommandBuffer)          \
    X(vkEndCommandBuffer)            \
    X(vkCmdBindPipeline)             \
    X(vkCmdBindDescriptorSets)       \
    X(vkCmdPushConstants)            \
    X(vkCmdDispatch)                 \
    X(vkCmdPipelineBarrier)          \
    X(vkQueueSubmit)                 \
    X(vkCreateFence)                 \
    X(vkDestroyFence)                \
    X(vkResetFences)                 \
    X(vkWaitForFences)

enum { VKR_BUFFERS = 512, VKR_PIPELINES = 512, VKR_BANKS = 30 };

typedef struct vkr_buffer {
    VkBuffer buffer;
    VkDeviceMemory memory;
    uint8_t *map;
    size_t bytes;
} vkr_buffer;

typedef struct vkr_pipeline {
    VkDescriptorSetLayout sets[2];
    VkPipelineLayout layout;
    VkPipeline pipeline;
    VkDescriptorPool pool;
    VkDescriptorSet set[2];
    uint32_t banks;
} vkr_pipeline;

typedef struct vkr_bindings {
    vkr_buffer pages[VKR_BANKS];
    vkr_buffer tables, partial_o, partial_ml, layers, taint; /* set 0 */
    vkr_buffer a, b;                                         /* set 1 */
} vkr_bindings;

typedef struct vkr {
    void *library;
    VkInstance instance;
    VkDebugUtilsMessengerEXT messenger;
    VkPhysicalDevice physical;
    VkDevice device;
    VkQueue queue;
    VkCommandPool pool;
    VkCommandBuffer commands;
    VkFence fence;
    uint32_t family, memory_type, subgroup_size;
    vkr_buffer nothing; /* stands for what is not given */
    vkr_buffer buffers[VKR_BUFFERS];
    vkr_pipeline pipelines[VKR_PIPELINES];
    uint32_t messages;
    char text[2000]; /* the first message */
#define VKR_MEMBER(f) PFN_##f f;
    VKR_GLOBAL(VKR_MEMBER) VKR_INSTANCE(VKR_MEMBER) VKR_DEVICE(VKR_MEMBER)
#undef VKR_MEMBER
} vkr;

static inline void vkr_check(VkResult result, const char *what) {
    if (result != VK_SUCCESS) fail_msg("%s: VkResult %d", what, (int)result);
}
#define VKR_DO(r, call) vkr_check((r)->call, #call)

static inline void vkr_silent(vkr *r) {
    if (r->messages) fail_msg("validation, %u messages: %s", r->messages, r->text);
}

static VKAPI_ATTR VkBool32 VKAPI_CALL vkr_message(VkDebugUtilsMessageSeverityFlagBitsEXT severity,
                                                  VkDebugUtilsMessageTypeFlagsEXT types,
                                                  const VkDebugUtilsMessengerCallbackDataEXT *data,
                                                  void *user) {
    vkr *r = (vkr *)user;
    (void)severity;
    (void)types;
    if (!r->messages++) snprintf(r->text, sizeof r->text, "%s", data->pMessage);
    return VK_FALSE;
}

/* ---- opening ---- */
static inline bool vkr_open_instance(vkr *r, bool validate) {
    static const char *const layer = "VK_LAYER_KHRONOS_validation";
    static const char *const extension = VK_EXT_DEBUG_UTILS_EXTENSION_NAME;
    VkValidationFeatureEnableEXT feature = VK_VALIDATION_FEATURE_ENABLE_SYNCHRONIZATION_VALIDATION_EXT;
    VkValidationFeaturesEXT features;
    VkDebugUtilsMessengerCreateInfoEXT messenger;
    VkApplicationInfo app;
    VkInstanceCreateInfo info;
    PFN_vkGetInstanceProcAddr get;
    VkResult result;
    r->library = dlopen("libvulkan.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!r->library) {
        printf("SKIP libvulkan.so.1 is not there (make deps)\n");
        return false;
    }
#ifdef VKR_LOADER
    get = VKR_LOADER;
#else
    *(void **)(&get) = dlsym(r->library, "vkGetInstanceProcAddr");
#endif
#define VKR_LOAD(f) r->f = (PFN_##f)get(r->instance, #f);
    VKR_GLOBAL(VKR_LOAD)
    memset(&features, 0, sizeof features);
    features.sType = VK_STRUCTURE_TYPE_VALIDATION_FEATURES_EXT;
    features.enabledValidationFeatureCount = 1;
    features.pEnabledValidationFeatures = &feature;
    memset(&messenger, 0, sizeof messenger);
    messenger.sType = VK_STRUCTURE_TYPE_DEBUG_UTILS_MESSENGER_CREATE_INFO_EXT;
    messenger.pNext = &features;
    messenger.messageSeverity =
        VK_DEBUG_UTILS_MESSAGE_SEVERITY_WARNING_BIT_EXT | VK_DEBUG_UTILS_MESSAGE_SEVERITY_ERROR_BIT_EXT;
    messenger.messageType = VK_DEBUG_UTILS_MESSAGE_TYPE_VALIDATION_BIT_EXT;
    messenger.pfnUserCallback = vkr_message;
    messenger.pUserData = r;
    memset(&app, 0, sizeof app);
    app.sType = VK_STRUCTURE_TYPE_APPLICATION_INFO;
    app.apiVersion = VK_API_VERSION_1_1;
    memset(&info, 0, sizeof info);
    info.sType = VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO;
    info.pApplicationInfo = &app;
    if (validate) {
        info.pNext = &messenger;
        info.enabledLayerCount = 1;
        info.ppEnabledLayerNames = &layer;
        info.enabledExtensionCount = 1;
        info.ppEnabledExtensionNames = &extension;
    }
    result = r->vkCreateInstance(&info, NULL, &r->instance);
    if (result == VK_ERROR_LAYER_NOT_PRESENT || result == VK_ERROR_INCOMPATIBLE_DRIVER) {
        printf("SKIP Vulkan's validation layer or lavapipe does not load: VkResult %d\n", (int)result);
        return false;
    }
    vkr_check(result, "vkCreateInstance");
    VKR_INSTANCE(VKR_LOAD)
#undef VKR_LOAD
    messenger.pNext = NULL;
    if (validate) VKR_DO(r, vkCreateDebugUtilsMessengerEXT(r->instance, &messenger, NULL, &r->messenger));
    return true;
}

static inline void vkr_open_device(vkr *r) {
    static const char *const extensions[] = {VK_KHR_SHADER_FLOAT16_INT8_EXTENSION_NAME,
                                             VK_EXT_SUBGROUP_SIZE_CONTROL_EXTENSION_NAME};
    float priority = 1;
    VkPhysicalDeviceSubgroupSizeControlFeaturesEXT size_control;
    VkPhysicalDeviceShaderFloat16Int8Features float16;
    VkPhysicalDevice16BitStorageFeatures storage16;
    VkPhysicalDeviceFeatures2 features;
    VkPhysicalDeviceSubgroupProperties subgroup;
    VkPhysicalDeviceProperties2 properties;
    VkDeviceQueueCreateInfo queue;
    VkDeviceCreateInfo info;
    memset(&subgroup, 0, sizeof subgroup);
    subgroup.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_PROPERTIES;
    memset(&properties, 0, sizeof properties);
    properties.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2;
    properties.pNext = &subgroup;
    r->vkGetPhysicalDeviceProperties2(r->physical, &properties);
    r->subgroup_size = subgroup.subgroupSize;
    memset(&size_control, 0, sizeof size_control);
    size_control.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_SIZE_CONTROL_FEATURES_EXT;
    memset(&float16, 0, sizeof float16);
    float16.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SHADER_FLOAT16_INT8_FEATURES;
    float16.pNext = &size_control;
    memset(&storage16, 0, sizeof storage16);
    storage16.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_16BIT_STORAGE_FEATURES;
    storage16.pNext = &float16;
    memset(&features, 0, sizeof features);
    features.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2;
    features.pNext = &storage16;
    r->vkGetPhysicalDeviceFeatures2(r->physical, &features);
    memset(&features.features, 0, sizeof features.features);
    features.features.shaderStorageBufferArrayDynamicIndexing = VK_TRUE;
    float16.shaderInt8 = VK_FALSE;
    storage16.uniformAndStorageBuffer16BitAccess = storage16.storagePushConstant16 = VK_FALSE;
    storage16.storageInputOutput16 = VK_FALSE;
    memset(&queue, 0, sizeof queue);
    queue.sType = VK_STRUCTURE_TYPE_DEVICE_QUEUE_CREATE_INFO;
    queue.queueCount = 1;
    queue.pQueuePriorities = &priority;
    memset(&info, 0, sizeof info);
    info.sType = VK_STRUCTURE_TYPE_DEVICE_CREATE_INFO;
    info.pNext = &features;
    info.queueCreateInfoCount = 1;
    info.pQueueCreateInfos = &queue;
    info.enabledExtensionCount = 2;
    info.ppEnabledExtensionNames = extensions;
    VKR_DO(r, vkCreateDevice(r->physical, &info, NULL, &r->device));
#define VKR_LOAD(f) r->f = (PFN_##f)r->vkGetDeviceProcAddr(r->device, #f);
    VKR_DEVICE(VKR_LOAD)
#undef VKR_LOAD
}

static inline vkr_buffer vkr_buffer_make(vkr *r, size_t bytes, const void *data);

/* timing: without validation, which takes time of its own. */
static inline bool vkr_open(vkr *r, unsigned bits, bool timing) {
    VkPhysicalDeviceMemoryProperties memory;
    VkCommandPoolCreateInfo pool;
    VkCommandBufferAllocateInfo commands;
    VkFenceCreateInfo fence;
    uint32_t n = 1;
    VkResult result;
    memset(r, 0, sizeof *r);
    if (!vk_env_lavapipe(bits) || !vkr_open_instance(r, !timing)) return false;
    result = r->vkEnumeratePhysicalDevices(r->instance, &n, &r->physical);
    if (result != VK_SUCCESS || n != 1) {
        printf("SKIP lavapipe has no device: VkResult %d\n", (int)result);
        return false;
    }
    vkr_open_device(r);
    r->vkGetDeviceQueue(r->device, 0, 0, &r->queue);
    r->vkGetPhysicalDeviceMemoryProperties(r->physical, &memory);
    for (r->memory_type = 0; r->memory_type < memory.memoryTypeCount; r->memory_type++) {
        VkMemoryPropertyFlags want =
            VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT | VK_MEMORY_PROPERTY_HOST_COHERENT_BIT;
        if ((memory.memoryTypes[r->memory_type].propertyFlags & want) == want) break;
    }
    memset(&pool, 0, sizeof pool);
    pool.sType = VK_STRUCTURE_TYPE_COMMAND_POOL_CREATE_INFO;
    VKR_DO(r, vkCreateCommandPool(r->device, &pool, NULL, &r->pool));
    memset(&commands, 0, sizeof commands);
    commands.sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_ALLOCATE_INFO;
    commands.commandPool = r->pool;
    commands.commandBufferCount = 1;
    VKR_DO(r, vkAllocateCommandBuffers(r->device, &commands, &r->commands));
    memset(&fence, 0, sizeof fence);
    fence.sType = VK_STRUCTURE_TYPE_FENCE_CREATE_INFO;
    VKR_DO(r, vkCreateFence(r->device, &fence, NULL, &r->fence));
    r->nothing = vkr_buffer_make(r, 256, NULL);
    vkr_silent(r);
    return true;
}

/* ---- buffers ---- */
/* Of host-visible memory, a multiple of 16 bytes; data null: 0xff, which is NaN in every format. */
static inline vkr_buffer vkr_buffer_make(vkr *r, size_t bytes, const void *data) {
    VkBufferCreateInfo info;
    VkMemoryRequirements need;
    VkMemoryAllocateInfo allocate;
    vkr_buffer b;
    void *map = NULL;
    uint32_t i;
    memset(&b, 0, sizeof b);
    b.bytes = bytes ? (bytes + 15) / 16 * 16 : 16;
    memset(&info, 0, sizeof info);
    info.sType = VK_STRUCTURE_TYPE_BUFFER_CREATE_INFO;
    info.size = b.bytes;
    info.usage = VK_BUFFER_USAGE_STORAGE_BUFFER_BIT;
    VKR_DO(r, vkCreateBuffer(r->device, &info, NULL, &b.buffer));
    r->vkGetBufferMemoryRequirements(r->device, b.buffer, &need);
    memset(&allocate, 0, sizeof allocate);
    allocate.sType = VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_INFO;
    allocate.allocationSize = need.size;
    allocate.memoryTypeIndex = r->memory_type;
    VKR_DO(r, vkAllocateMemory(r->device, &allocate, NULL, &b.memory));
    VKR_DO(r, vkBindBufferMemory(r->device, b.buffer, b.memory, 0));
    VKR_DO(r, vkMapMemory(r->device, b.memory, 0, VK_WHOLE_SIZE, 0, &map));
    b.map = (uint8_t *)map;
    memset(b.map, 0xff, b.bytes);
    if (data) memcpy(b.map, data, bytes);
    for (i = 0; i < VKR_BUFFERS && r->buffers[i].buffer; i++) {
    }
    assert_true(i < VKR_BUFFERS);
    r->buffers[i] = b;
    return b;
}

static inline void vkr_buffer_free(vkr *r, vkr_buffer *b) {
    vkr_buffer old = *b; /* b may be in buffers[] */
    uint32_t i;
    for (i = 0; i < VKR_BUFFERS; i++) {
        if (r->buffers[i].buffer == old.buffer) memset(&r->buffers[i], 0, sizeof old);
    }
    memset(b, 0, sizeof *b);
    r->vkDestroyBuffer(r->device, old.buffer, NULL);
    r->vkFreeMemory(r->device, old.memory, NULL);
}

/* ---- pipelines ---- */
/* kernels_vulkan/NAME.comp compiled; free() it. */
static inline uint32_t *vkr_compile(const char *name, uint32_t variant, size_t *words) {
    char command[700], path[128];
    uint32_t *code;
    FILE *f;
    long size;
    snprintf(path, sizeof path, "build/vulkan_shaders/%s-%u-%d.spv", name, variant, (int)getpid());
    snprintf(command, sizeof command,
             "glslangValidator -V --quiet --target-env vulkan1.1 -DKVL_FP16=%u -DKVL_STORAGE16=%u "
             "-DKVL_SUBGROUP=%u kernels_vulkan/%s.comp -o %s",
             variant & 1, variant >> 1 & 1, variant >> 2 & 1, name, path);
    fflush(stdout);
    if (system(command) != 0) fail_msg("%s", command);
    f = fopen(path, "rb");
    if (!f) fail_msg("%s is not there", path);
    fseek(f, 0, SEEK_END);
    size = ftell(f);
    rewind(f);
    code = (uint32_t *)malloc((size_t)size);
    if (!code || fread(code, 1, (size_t)size, f) != (size_t)size) fail_msg("%s cannot be read", path);
    fclose(f);
    remove(path);
    *words = (size_t)size / 4;
    return code;
}

/* Of the committed header, or compiled. */
static inline uint32_t *vkr_shader(const char *name, uint32_t variant, size_t *words) {
#ifdef VKR_HEADER
    size_t i;
    if (!getenv("VKR_SOURCES")) {
        for (i = 0; i < sizeof kvli_vk_shaders / sizeof kvli_vk_shaders[0]; i++) {
            uint32_t *code;
            if (strcmp(kvli_vk_shaders[i].name, name) != 0 || kvli_vk_shaders[i].variant != variant) continue;
            *words = kvli_vk_shaders[i].n_words;
            code = (uint32_t *)malloc(*words * 4);
            assert_non_null(code);
            memcpy(code, kvli_vk_shaders[i].words, *words * 4);
            return code;
        }
        fail_msg("no variant %u of %s in kvlite_vulkan_kernels.h", variant, name);
    }
#endif
    return vkr_compile(name, variant, words);
}

static inline void vkr_layouts(vkr *r, vkr_pipeline *p) {
    VkDescriptorSetLayoutBinding bindings[6];
    VkDescriptorSetLayoutCreateInfo set;
    VkPushConstantRange push = {VK_SHADER_STAGE_COMPUTE_BIT, 0, sizeof(kvli_vk_push)};
    VkPipelineLayoutCreateInfo info;
    VkDescriptorPoolSize size = {VK_DESCRIPTOR_TYPE_STORAGE_BUFFER, p->banks + 7};
    VkDescriptorPoolCreateInfo pool;
    VkDescriptorSetAllocateInfo allocate;
    uint32_t i;
    memset(bindings, 0, sizeof bindings);
    for (i = 0; i < 6; i++) {
        bindings[i].binding = i;
        bindings[i].descriptorType = VK_DESCRIPTOR_TYPE_STORAGE_BUFFER;
        bindings[i].descriptorCount = i == KVLI_VK_PAGES ? p->banks : 1;
        bindings[i].stageFlags = VK_SHADER_STAGE_COMPUTE_BIT;
    }
    memset(&set, 0, sizeof set);
    set.sType = VK_STRUCTURE_TYPE_DESCRIPTOR_SET_LAYOUT_CREATE_INFO;
    set.pBindings = bindings;
    set.bindingCount = 6;
    VKR_DO(r, vkCreateDescriptorSetLayout(r->device, &set, NULL, &p->sets[0]));
    bindings[0].descriptorCount = 1;
    set.bindingCount = 2;
    VKR_DO(r, vkCreateDescriptorSetLayout(r->device, &set, NULL, &p->sets[1]));
    memset(&info, 0, sizeof info);
    info.sType = VK_STRUCTURE_TYPE_PIPELINE_LAYOUT_CREATE_INFO;
    info.setLayoutCount = 2;
    info.pSetLayouts = p->sets;
    info.pushConstantRangeCount = 1;
    info.pPushConstantRanges = &push;
    VKR_DO(r, vkCreatePipelineLayout(r->device, &info, NULL, &p->layout));
    memset(&pool, 0, sizeof pool);
    pool.sType = VK_STRUCTURE_TYPE_DESCRIPTOR_POOL_CREATE_INFO;
    pool.maxSets = 2;
    pool.poolSizeCount = 1;
    pool.pPoolSizes = &size;
    VKR_DO(r, vkCreateDescriptorPool(r->device, &pool, NULL, &p->pool));
    memset(&allocate, 0, sizeof allocate);
    allocate.sType = VK_STRUCTURE_TYPE_DESCRIPTOR_SET_ALLOCATE_INFO;
    allocate.descriptorPool = p->pool;
    allocate.descriptorSetCount = 2;
    allocate.pSetLayouts = p->sets;
    VKR_DO(r, vkAllocateDescriptorSets(r->device, &allocate, p->set));
}

/* variant: KVLI_VK_* bits that this shader has; specialisation constants by their ids. */
static inline vkr_pipeline vkr_pipeline_make(vkr *r, const char *name, uint32_t variant,
                                             const uint32_t spec[KVLI_VK_SPECIALISATIONS]) {
    VkSpecializationMapEntry entries[KVLI_VK_SPECIALISATIONS];
    VkSpecializationInfo constants;
    VkShaderModuleCreateInfo shader;
    VkComputePipelineCreateInfo info;
    VkShaderModule module;
    vkr_pipeline p;
    size_t words;
    uint32_t *code = vkr_shader(name, variant, &words), i;
    memset(&p, 0, sizeof p);
    p.banks = spec[KVLI_VK_BANKS];
    assert_true(p.banks >= 1 && p.banks <= VKR_BANKS);
    vkr_layouts(r, &p);
    for (i = 0; i < KVLI_VK_SPECIALISATIONS; i++) {
        entries[i].constantID = i;
        entries[i].offset = i * 4;
        entries[i].size = 4;
    }
    memset(&constants, 0, sizeof constants);
    constants.mapEntryCount = KVLI_VK_SPECIALISATIONS;
    constants.pMapEntries = entries;
    constants.dataSize = KVLI_VK_SPECIALISATIONS * 4;
    constants.pData = spec;
    memset(&shader, 0, sizeof shader);
    shader.sType = VK_STRUCTURE_TYPE_SHADER_MODULE_CREATE_INFO;
    shader.codeSize = words * 4;
    shader.pCode = code;
    VKR_DO(r, vkCreateShaderModule(r->device, &shader, NULL, &module));
    memset(&info, 0, sizeof info);
    info.sType = VK_STRUCTURE_TYPE_COMPUTE_PIPELINE_CREATE_INFO;
    info.stage.sType = VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_CREATE_INFO;
    info.stage.stage = VK_SHADER_STAGE_COMPUTE_BIT;
    info.stage.module = module;
    info.stage.pName = "main";
    info.stage.pSpecializationInfo = &constants;
    info.layout = p.layout;
    VKR_DO(r, vkCreateComputePipelines(r->device, VK_NULL_HANDLE, 1, &info, NULL, &p.pipeline));
    r->vkDestroyShaderModule(r->device, module, NULL);
    free(code);
    vkr_silent(r);
    for (i = 0; i < VKR_PIPELINES && r->pipelines[i].pipeline; i++) {
    }
    assert_true(i < VKR_PIPELINES);
    r->pipelines[i] = p;
    return p;
}

static inline void vkr_pipeline_free(vkr *r, vkr_pipeline *p) {
    vkr_pipeline old = *p; /* p may be in pipelines[] */
    uint32_t i;
    for (i = 0; i < VKR_PIPELINES; i++) {
        if (r->pipelines[i].pipeline == old.pipeline) memset(&r->pipelines[i], 0, sizeof old);
    }
    memset(p, 0, sizeof *p);
    r->vkDestroyPipeline(r->device, old.pipeline, NULL);
    r->vkDestroyDescriptorPool(r->device, old.pool, NULL);
    r->vkDestroyPipelineLayout(r->device, old.layout, NULL);
    r->vkDestroyDescriptorSetLayout(r->device, old.sets[0], NULL);
    r->vkDestroyDescriptorSetLayout(r->device, old.sets[1], NULL);
}

/* ---- running ---- */
static inline void vkr_bind(vkr *r, vkr_pipeline *p, const vkr_bindings *b) {
    const vkr_buffer *given[5], *last = &r->nothing;
    VkDescriptorBufferInfo buffers[VKR_BANKS + 7];
    VkWriteDescriptorSet writes[8];
    uint32_t i, at = p->banks;
    given[0] = &b->tables, given[1] = &b->partial_o, given[2] = &b->partial_ml;
    given[3] = &b->layers, given[4] = &b->taint;
    memset(buffers, 0, sizeof buffers);
    memset(writes, 0, sizeof writes);
    for (i = 0; i < p->banks; i++) {
        if (b->pages[i].buffer) last = &b->pages[i];
        buffers[i].buffer = last->buffer;
    }
    for (i = 0; i < 5; i++) buffers[at++].buffer = given[i]->buffer;
    buffers[at++].buffer = b->a.buffer;
    buffers[at++].buffer = b->b.buffer;
    for (i = 0; i < at; i++) {
        if (!buffers[i].buffer) buffers[i].buffer = r->nothing.buffer;
        buffers[i].range = VK_WHOLE_SIZE;
    }
    for (i = 0; i < 8; i++) {
        writes[i].sType = VK_STRUCTURE_TYPE_WRITE_DESCRIPTOR_SET;
        writes[i].dstSet = p->set[i >= 6];
        writes[i].dstBinding = i < 6 ? i : i - 6;
        writes[i].descriptorCount = i ? 1 : p->banks;
        writes[i].descriptorType = VK_DESCRIPTOR_TYPE_STORAGE_BUFFER;
        writes[i].pBufferInfo = &buffers[i ? p->banks + i - 1 : 0];
    }
    r->vkUpdateDescriptorSets(r->device, 8, writes, 0, NULL);
}

static inline void vkr_record(vkr *r, vkr_pipeline *p, const vkr_bindings *b, const kvli_vk_push *push,
                              uint32_t x, uint32_t y, uint32_t z) {
    VkCommandBufferBeginInfo begin;
    VkMemoryBarrier barrier;
    vkr_bind(r, p, b);
    VKR_DO(r, vkResetCommandPool(r->device, r->pool, 0));
    memset(&begin, 0, sizeof begin);
    begin.sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_BEGIN_INFO;
    VKR_DO(r, vkBeginCommandBuffer(r->commands, &begin));
    r->vkCmdBindPipeline(r->commands, VK_PIPELINE_BIND_POINT_COMPUTE, p->pipeline);
    r->vkCmdBindDescriptorSets(r->commands, VK_PIPELINE_BIND_POINT_COMPUTE, p->layout, 0, 2, p->set, 0, NULL);
    r->vkCmdPushConstants(r->commands, p->layout, VK_SHADER_STAGE_COMPUTE_BIT, 0, sizeof *push, push);
    r->vkCmdDispatch(r->commands, x, y, z);
    memset(&barrier, 0, sizeof barrier);
    barrier.sType = VK_STRUCTURE_TYPE_MEMORY_BARRIER;
    barrier.srcAccessMask = VK_ACCESS_SHADER_WRITE_BIT;
    barrier.dstAccessMask = VK_ACCESS_HOST_READ_BIT;
    r->vkCmdPipelineBarrier(r->commands, VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT, VK_PIPELINE_STAGE_HOST_BIT, 0,
                            1, &barrier, 0, NULL, 0, NULL);
    VKR_DO(r, vkEndCommandBuffer(r->commands));
}

static inline void vkr_submit(vkr *r) {
    VkSubmitInfo info;
    memset(&info, 0, sizeof info);
    info.sType = VK_STRUCTURE_TYPE_SUBMIT_INFO;
    info.commandBufferCount = 1;
    info.pCommandBuffers = &r->commands;
    VKR_DO(r, vkQueueSubmit(r->queue, 1, &info, r->fence));
    VKR_DO(r, vkWaitForFences(r->device, 1, &r->fence, VK_TRUE, UINT64_MAX));
    VKR_DO(r, vkResetFences(r->device, 1, &r->fence));
}

static inline void vkr_dispatch(vkr *r, vkr_pipeline *p, const vkr_bindings *b, const kvli_vk_push *push,
                                uint32_t x, uint32_t y, uint32_t z) {
    vkr_record(r, p, b, push, x, y, z);
    vkr_submit(r);
    vkr_silent(r);
}

static inline double vkr_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Microseconds of one dispatch, with its submit and wait: the least, after a first one that is not counted. */
static inline double vkr_time(vkr *r, vkr_pipeline *p, const vkr_bindings *b, const kvli_vk_push *push,
                              uint32_t x, uint32_t y, uint32_t z, double seconds) {
    double best = 1e30, until;
    vkr_record(r, p, b, push, x, y, z);
    vkr_submit(r);
    until = vkr_now() + seconds;
    do {
        double start = vkr_now(), took;
        vkr_submit(r);
        took = vkr_now() - start;
        if (took < best) best = took;
    } while (vkr_now() < until);
    vkr_silent(r);
    return best * 1e6;
}

static inline void vkr_close(vkr *r) {
    uint32_t i;
    if (r->device) {
        for (i = 0; i < VKR_PIPELINES; i++)
            if (r->pipelines[i].pipeline) vkr_pipeline_free(r, &r->pipelines[i]);
        for (i = 0; i < VKR_BUFFERS; i++)
            if (r->buffers[i].buffer) vkr_buffer_free(r, &r->buffers[i]);
        r->vkDestroyFence(r->device, r->fence, NULL);
        r->vkDestroyCommandPool(r->device, r->pool, NULL);
        r->vkDestroyDevice(r->device, NULL);
    }
    if (r->messenger) r->vkDestroyDebugUtilsMessengerEXT(r->instance, r->messenger, NULL);
    if (r->instance) r->vkDestroyInstance(r->instance, NULL);
    vkr_silent(r);
    memset(r, 0, sizeof *r);
}
#endif
