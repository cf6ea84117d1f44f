#include "vk_wrap.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define VK_NO_PROTOTYPES
#include <vulkan/vulkan.h>

#include "vk_env.h"

#if defined(__SANITIZE_ADDRESS__) /* the driver and its compiler keep memory of their own until the end */
const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "detect_leaks=0"; }
#endif

enum { MOST_OBJECTS = 8192, MOST_BANKS = 64, MOST_NAMES = 160 };

typedef struct object {
    const char *type; /* null: no object */
    uint64_t handle, bytes;
    uint64_t memory; /* of a buffer: what it is bound to; of memory: its type */
    void *map;       /* of memory */
} object;

static struct {
    vkw_settings settings;
    void *library;
    uint64_t calls[2], fail_at, failures;
    int fail_how;
    const char *failed;
    bool own, lost, locked;
    object objects[MOST_OBJECTS];
    VkBuffer banks[MOST_BANKS];
    uint32_t n_objects, n_broken, messages, problems;
    struct {
        const char *name;
        uint64_t n;
    } names[MOST_NAMES];
    char text[1200]; /* the first of messages and problems */
    struct {
        VkInstance instance;
        VkDebugUtilsMessengerEXT messenger;
    } instances[8];
} w;

vkw_settings *vkw(void) { return &w.settings; }
void vkw_own(bool own) { w.own = own; }
void vkw_lock(void *user) {
    (void)user;
    w.locked = true;
}
void vkw_unlock(void *user) {
    (void)user;
    w.locked = false;
}

static void problem(const char *format, ...) {
    va_list args;
    if (w.problems++ || w.messages) return;
    va_start(args, format);
    vsnprintf(w.text, sizeof w.text, format, args);
    va_end(args);
}

static PFN_vkVoidFunction real(const char *name) {
    PFN_vkVoidFunction f;
    *(void **)(&f) = dlsym(w.library, name);
    return f;
}
#define REAL(name) ((PFN_##name)real(#name))

bool vkw_open(unsigned bits) {
    if (!vk_env_lavapipe(bits)) return false;
    if (!w.library) w.library = dlopen("libvulkan.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!w.library) printf("SKIP libvulkan.so.1 is not there (make deps)\n");
    vkw_reset();
    return w.library != NULL;
}

static void hazards_reset(void);
void vkw_reset(void) {
    void *library = w.library;
    memset(&w, 0, sizeof w);
    w.library = library;
    hazards_reset();
}

/* ---- objects ---- */
static object *find(const char *type, uint64_t handle) {
    uint32_t i;
    for (i = 0; i < w.n_objects; i++) {
        if (w.objects[i].type && w.objects[i].handle == handle && !strcmp(w.objects[i].type, type))
            return &w.objects[i];
    }
    return NULL;
}
static object *add(const char *type, uint64_t handle, uint64_t bytes) {
    uint32_t i;
    for (i = 0; i < w.n_objects && w.objects[i].type; i++) {
    }
    assert_true(i < MOST_OBJECTS);
    if (i == w.n_objects) w.n_objects++;
    memset(&w.objects[i], 0, sizeof w.objects[i]);
    w.objects[i].type = type;
    w.objects[i].handle = handle;
    w.objects[i].bytes = bytes;
    return &w.objects[i];
}
static void gone(const char *type, uint64_t handle) {
    object *o = find(type, handle);
    if (w.own || !handle) return;
    if (o)
        o->type = NULL;
    else
        problem("a %s that is not there was destroyed", type);
}

uint64_t vkw_memory(void) {
    uint64_t bytes = 0;
    uint32_t i;
    for (i = 0; i < w.n_objects; i++)
        if (w.objects[i].type && !strcmp(w.objects[i].type, "VkDeviceMemory")) bytes += w.objects[i].bytes;
    return bytes;
}
uint64_t vkw_objects(void) {
    uint64_t n = 0;
    uint32_t i;
    for (i = 0; i < w.n_objects; i++) n += w.objects[i].type != NULL;
    return n;
}

uint32_t vkw_wrong(void) { return w.problems + w.messages; }
int vkw_problems(char *text, size_t size) {
    uint32_t i;
    for (i = 0; i < w.n_objects; i++)
        if (w.objects[i].type) problem("a %s is left", w.objects[i].type);
    snprintf(text, size, "%s", w.text);
    return (int)(w.problems + w.messages);
}

/* ---- counting and failing ---- */
static void counted(const char *name) {
    uint32_t i;
    if (w.own) return;
    for (i = 0; i < MOST_NAMES && w.names[i].name && strcmp(w.names[i].name, name) != 0; i++) {
    }
    assert_true(i < MOST_NAMES);
    w.names[i].name = name;
    w.names[i].n++;
}
uint64_t vkw_count(const char *name) {
    uint32_t i;
    for (i = 0; i < MOST_NAMES && w.names[i].name; i++)
        if (!strcmp(w.names[i].name, name)) return w.names[i].n;
    return 0;
}

void vkw_fail(uint64_t nth, int how) {
    w.fail_how = how;
    w.fail_at = nth ? w.calls[how] + nth : 0;
    w.failures = 0;
    w.failed = "";
}
const char *vkw_failed(void) { return w.failed ? w.failed : ""; }
uint64_t vkw_failures(void) { return w.failures; }
uint64_t vkw_calls(int how) { return w.calls[how]; }
uint32_t vkw_broken(void) { return w.n_broken; }

/* Whether this call fails now. `tells`: it can tell of a lost device. */
static VkResult fails(const char *name, bool tells, VkResult other) {
    bool now;
    counted(name);
    if (w.own) return VK_SUCCESS;
    if (tells && w.lost) return VK_ERROR_DEVICE_LOST; /* does not count: nothing can fail in it */
    w.calls[VKW_FAILS]++;
    w.calls[VKW_LOST] += tells;
    now = w.fail_at && w.calls[w.fail_how] == w.fail_at && (w.fail_how == VKW_FAILS || tells);
    if (!now) return VK_SUCCESS;
    w.failed = name;
    w.failures++;
    if (w.fail_how == VKW_LOST) {
        w.lost = true;
        return VK_ERROR_DEVICE_LOST;
    }
    if (other != VK_SUCCESS && w.fail_at % 3 == 0) return other;
    return w.fail_at % 2 ? VK_ERROR_OUT_OF_HOST_MEMORY : VK_ERROR_OUT_OF_DEVICE_MEMORY;
}
#define MAY_FAIL(tells, other)                           \
    do {                                                 \
        VkResult fails_ = fails(__func__, tells, other); \
        if (fails_ != VK_SUCCESS) return fails_;         \
    } while (0)

/* ---- instances ---- */
static VKAPI_ATTR VkBool32 VKAPI_CALL message(VkDebugUtilsMessageSeverityFlagBitsEXT severity,
                                              VkDebugUtilsMessageTypeFlagsEXT types,
                                              const VkDebugUtilsMessengerCallbackDataEXT *data, void *user) {
    (void)severity;
    (void)types;
    (void)user;
    if (!w.messages++ && !w.problems) snprintf(w.text, sizeof w.text, "%s", data->pMessage);
    return VK_FALSE;
}

static VKAPI_ATTR VkResult VKAPI_CALL vkCreateInstance(const VkInstanceCreateInfo *info,
                                                       const VkAllocationCallbacks *a, VkInstance *out) {
    const VkValidationFeatureEnableEXT feature = VK_VALIDATION_FEATURE_ENABLE_SYNCHRONIZATION_VALIDATION_EXT;
    const char *layers[8] = {"VK_LAYER_KHRONOS_validation"}, *extensions[16] = {"VK_EXT_debug_utils"};
    VkValidationFeaturesEXT features = {.sType = VK_STRUCTURE_TYPE_VALIDATION_FEATURES_EXT,
                                        .enabledValidationFeatureCount = 1,
                                        .pEnabledValidationFeatures = &feature};
    VkDebugUtilsMessengerCreateInfoEXT messenger = {
        .sType = VK_STRUCTURE_TYPE_DEBUG_UTILS_MESSENGER_CREATE_INFO_EXT,
        .messageSeverity =
            VK_DEBUG_UTILS_MESSAGE_SEVERITY_WARNING_BIT_EXT | VK_DEBUG_UTILS_MESSAGE_SEVERITY_ERROR_BIT_EXT,
        .messageType = VK_DEBUG_UTILS_MESSAGE_TYPE_VALIDATION_BIT_EXT,
        .pfnUserCallback = message};
    VkInstanceCreateInfo more = *info;
    PFN_vkCreateDebugUtilsMessengerEXT create;
    VkResult result;
    uint32_t i;
    MAY_FAIL(false, VK_ERROR_INITIALIZATION_FAILED);
    if (!w.settings.quiet) {
        assert_true(info->enabledLayerCount < 7 && info->enabledExtensionCount < 15);
        for (i = 0; i < info->enabledLayerCount; i++) layers[i + 1] = info->ppEnabledLayerNames[i];
        for (i = 0; i < info->enabledExtensionCount; i++)
            extensions[i + 1] = info->ppEnabledExtensionNames[i];
        features.pNext = info->pNext;
        messenger.pNext = &features;
        more.pNext = &messenger;
        more.ppEnabledLayerNames = layers;
        more.enabledLayerCount++;
        more.ppEnabledExtensionNames = extensions;
        more.enabledExtensionCount++;
    }
    result = REAL(vkCreateInstance)(&more, a, out);
    if (result != VK_SUCCESS) return result;
    if (!w.own) add("VkInstance", (uint64_t)(uintptr_t)*out, 0);
    if (w.settings.quiet) return result;
    for (i = 0; i < 8 && w.instances[i].instance; i++) {
    }
    assert_true(i < 8);
    w.instances[i].instance = *out;
    messenger.pNext = NULL;
    create = (PFN_vkCreateDebugUtilsMessengerEXT)REAL(vkGetInstanceProcAddr)(
        *out, "vkCreateDebugUtilsMessengerEXT");
    return create(*out, &messenger, NULL, &w.instances[i].messenger);
}

static VKAPI_ATTR void VKAPI_CALL vkDestroyInstance(VkInstance instance, const VkAllocationCallbacks *a) {
    uint32_t i;
    counted(__func__);
    gone("VkInstance", (uint64_t)(uintptr_t)instance);
    for (i = 0; instance && i < 8; i++) {
        PFN_vkDestroyDebugUtilsMessengerEXT destroy;
        if (w.instances[i].instance != instance) continue;
        destroy = (PFN_vkDestroyDebugUtilsMessengerEXT)REAL(vkGetInstanceProcAddr)(
            instance, "vkDestroyDebugUtilsMessengerEXT");
        destroy(instance, w.instances[i].messenger, NULL);
        w.instances[i].instance = NULL;
    }
    REAL(vkDestroyInstance)(instance, a);
}

static VKAPI_ATTR VkResult VKAPI_CALL vkEnumerateInstanceVersion(uint32_t *version) {
    MAY_FAIL(false, VK_SUCCESS);
    return REAL(vkEnumerateInstanceVersion)(version);
}
static VKAPI_ATTR VkResult VKAPI_CALL vkEnumerateInstanceExtensionProperties(const char *layer, uint32_t *n,
                                                                             VkExtensionProperties *p) {
    MAY_FAIL(false, VK_SUCCESS);
    return REAL(vkEnumerateInstanceExtensionProperties)(layer, n, p);
}

/* ---- what the device is like ---- */
/* The same device, some times over. */
static VKAPI_ATTR VkResult VKAPI_CALL vkEnumeratePhysicalDevices(VkInstance instance, uint32_t *n,
                                                                 VkPhysicalDevice *devices) {
    uint32_t want = w.settings.devices ? w.settings.devices : 1, one = 1, i, room = *n;
    VkPhysicalDevice device;
    VkResult result;
    MAY_FAIL(false, VK_ERROR_INITIALIZATION_FAILED);
    result = REAL(vkEnumeratePhysicalDevices)(instance, &one, &device);
    if (result != VK_SUCCESS) return result;
    if (want == UINT32_MAX) want = 0;
    *n = devices && room < want ? room : want;
    for (i = 0; devices && i < *n; i++) devices[i] = device;
    return devices && *n < want ? VK_INCOMPLETE : VK_SUCCESS;
}

/* Extensions that the device has not, by the settings. */
static bool is_hidden(const char *name) {
    uint32_t without = w.settings.without;
    return ((without & VKW_FP16) && !strcmp(name, VK_KHR_SHADER_FLOAT16_INT8_EXTENSION_NAME)) ||
           ((without & VKW_SIZE_CONTROL) && !strcmp(name, VK_EXT_SUBGROUP_SIZE_CONTROL_EXTENSION_NAME)) ||
           (!w.settings.budget && !strcmp(name, VK_EXT_MEMORY_BUDGET_EXTENSION_NAME));
}

static VKAPI_ATTR VkResult VKAPI_CALL vkEnumerateDeviceExtensionProperties(VkPhysicalDevice device,
                                                                           const char *layer, uint32_t *n,
                                                                           VkExtensionProperties *out) {
    VkExtensionProperties all[512];
    uint32_t have = 512, i, kept = 0, room = *n;
    bool budget = false;
    VkResult result;
    MAY_FAIL(false, VK_SUCCESS);
    result = REAL(vkEnumerateDeviceExtensionProperties)(device, layer, &have, all);
    if (result != VK_SUCCESS) return result;
    for (i = 0; i < have; i++) {
        if (is_hidden(all[i].extensionName)) continue;
        budget = budget || !strcmp(all[i].extensionName, VK_EXT_MEMORY_BUDGET_EXTENSION_NAME);
        all[kept++] = all[i];
    }
    if (w.settings.budget && !budget) {
        snprintf(all[kept].extensionName, sizeof all[kept].extensionName, "%s",
                 VK_EXT_MEMORY_BUDGET_EXTENSION_NAME);
        all[kept++].specVersion = 1;
    }
    *n = out && room < kept ? room : kept;
    if (out) memcpy(out, all, *n * sizeof *out);
    return out && *n < kept ? VK_INCOMPLETE : VK_SUCCESS;
}

static void show_limits(VkPhysicalDeviceProperties *p) {
    const vkw_settings *s = &w.settings;
    if (w.own) return;
    if (s->api) p->apiVersion = s->api;
    if (s->driver_version) p->driverVersion = s->driver_version;
    if (s->discrete) p->deviceType = VK_PHYSICAL_DEVICE_TYPE_DISCRETE_GPU;
    if (s->max_range) p->limits.maxStorageBufferRange = (uint32_t)s->max_range;
    if (s->max_buffers) p->limits.maxPerStageDescriptorStorageBuffers = s->max_buffers;
    if (s->max_buffers && p->limits.maxPerStageResources > s->max_buffers + 8)
        p->limits.maxPerStageResources = s->max_buffers + 8;
}
static VKAPI_ATTR void VKAPI_CALL vkGetPhysicalDeviceProperties(VkPhysicalDevice device,
                                                                VkPhysicalDeviceProperties *p) {
    counted(__func__);
    REAL(vkGetPhysicalDeviceProperties)(device, p);
    show_limits(p);
}
static VKAPI_ATTR void VKAPI_CALL vkGetPhysicalDeviceProperties2(VkPhysicalDevice device,
                                                                 VkPhysicalDeviceProperties2 *p) {
    VkBaseOutStructure *s;
    counted(__func__);
    REAL(vkGetPhysicalDeviceProperties2)(device, p);
    show_limits(&p->properties);
    for (s = (VkBaseOutStructure *)p->pNext; s && !w.own; s = s->pNext) {
        if (s->sType == VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MAINTENANCE_3_PROPERTIES && w.settings.max_alloc)
            ((VkPhysicalDeviceMaintenance3Properties *)s)->maxMemoryAllocationSize = w.settings.max_alloc;
        if (s->sType == VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_PROPERTIES &&
            (w.settings.without & VKW_SUBGROUP))
            ((VkPhysicalDeviceSubgroupProperties *)s)->supportedOperations = VK_SUBGROUP_FEATURE_BASIC_BIT;
    }
}

static VKAPI_ATTR void VKAPI_CALL vkGetPhysicalDeviceFeatures2(VkPhysicalDevice device,
                                                               VkPhysicalDeviceFeatures2 *f) {
    VkBaseOutStructure *s;
    uint32_t without = w.settings.without;
    counted(__func__);
    REAL(vkGetPhysicalDeviceFeatures2)(device, f);
    for (s = (VkBaseOutStructure *)f->pNext; s; s = s->pNext) {
        if (s->sType == VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SHADER_FLOAT16_INT8_FEATURES &&
            (without & VKW_FP16))
            ((VkPhysicalDeviceShaderFloat16Int8Features *)s)->shaderFloat16 = VK_FALSE;
        if (s->sType == VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_16BIT_STORAGE_FEATURES && (without & VKW_STORAGE16))
            ((VkPhysicalDevice16BitStorageFeatures *)s)->storageBuffer16BitAccess = VK_FALSE;
        if (s->sType == VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_SIZE_CONTROL_FEATURES &&
            (without & VKW_SIZE_CONTROL)) {
            ((VkPhysicalDeviceSubgroupSizeControlFeatures *)s)->subgroupSizeControl = VK_FALSE;
            ((VkPhysicalDeviceSubgroupSizeControlFeatures *)s)->computeFullSubgroups = VK_FALSE;
        }
    }
}

static void show_queues(uint32_t n, VkQueueFamilyProperties *p) {
    for (; p && n && w.settings.no_compute; n--) p[n - 1].queueFlags &= ~(VkQueueFlags)VK_QUEUE_COMPUTE_BIT;
}
static VKAPI_ATTR void VKAPI_CALL vkGetPhysicalDeviceQueueFamilyProperties(VkPhysicalDevice device,
                                                                           uint32_t *n,
                                                                           VkQueueFamilyProperties *p) {
    counted(__func__);
    REAL(vkGetPhysicalDeviceQueueFamilyProperties)(device, n, p);
    show_queues(*n, p);
}

static void show_memory(VkPhysicalDeviceMemoryProperties *m) {
    if (w.own) return;
    if (w.settings.discrete) {
        const VkMemoryPropertyFlags host = VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT |
                                           VK_MEMORY_PROPERTY_HOST_COHERENT_BIT |
                                           VK_MEMORY_PROPERTY_HOST_CACHED_BIT;
        m->memoryTypeCount = m->memoryHeapCount = 2;
        m->memoryHeaps[1] = m->memoryHeaps[0];
        m->memoryHeaps[1].flags = 0;
        m->memoryTypes[0].propertyFlags = VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT;
        m->memoryTypes[1].propertyFlags = host;
        m->memoryTypes[1].heapIndex = 1;
    }
    if (w.settings.heap_bytes) m->memoryHeaps[0].size = w.settings.heap_bytes;
}
static VKAPI_ATTR void VKAPI_CALL vkGetPhysicalDeviceMemoryProperties(VkPhysicalDevice device,
                                                                      VkPhysicalDeviceMemoryProperties *m) {
    counted(__func__);
    REAL(vkGetPhysicalDeviceMemoryProperties)(device, m);
    show_memory(m);
}
static uint64_t heap_use(uint32_t heap) {
    uint64_t bytes = 0;
    uint32_t i;
    for (i = 0; i < w.n_objects; i++) {
        const object *o = &w.objects[i];
        if (o->type && !strcmp(o->type, "VkDeviceMemory") && o->memory == heap) bytes += o->bytes;
    }
    return bytes;
}
uint64_t vkw_heap_use(void) { return heap_use(0); }
static VKAPI_ATTR void VKAPI_CALL vkGetPhysicalDeviceMemoryProperties2(VkPhysicalDevice device,
                                                                       VkPhysicalDeviceMemoryProperties2 *m) {
    VkBaseOutStructure *s;
    counted(__func__);
    REAL(vkGetPhysicalDeviceMemoryProperties2)(device, m);
    show_memory(&m->memoryProperties);
    for (s = (VkBaseOutStructure *)m->pNext; s; s = s->pNext) {
        VkPhysicalDeviceMemoryBudgetPropertiesEXT *b = (VkPhysicalDeviceMemoryBudgetPropertiesEXT *)s;
        uint32_t i;
        if (s->sType != VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_BUDGET_PROPERTIES_EXT) continue;
        if (!w.settings.budget) problem("the memory budget was asked for without its extension");
        for (i = 0; i < m->memoryProperties.memoryHeapCount; i++) {
            b->heapBudget[i] = m->memoryProperties.memoryHeaps[i].size;
            b->heapUsage[i] = heap_use(i);
        }
        b->heapBudget[0] = w.settings.heap_budget;
        b->heapUsage[0] += w.settings.others_use;
    }
}

/* ---- the device ---- */
static VKAPI_ATTR VkResult VKAPI_CALL vkCreateDevice(VkPhysicalDevice physical,
                                                     const VkDeviceCreateInfo *info,
                                                     const VkAllocationCallbacks *a, VkDevice *out) {
    const char *extensions[32];
    VkDeviceCreateInfo real_info = *info;
    VkResult result;
    uint32_t i, n = 0;
    MAY_FAIL(false, VK_ERROR_INITIALIZATION_FAILED);
    assert_true(info->enabledExtensionCount <= 32);
    for (i = 0; i < info->enabledExtensionCount; i++) {
        const char *name = info->ppEnabledExtensionNames[i];
        if (is_hidden(name)) return VK_ERROR_EXTENSION_NOT_PRESENT;
        if (strcmp(name, VK_EXT_MEMORY_BUDGET_EXTENSION_NAME) != 0) extensions[n++] = name;
    }
    real_info.enabledExtensionCount = n;
    real_info.ppEnabledExtensionNames = extensions;
    result = REAL(vkCreateDevice)(physical, &real_info, a, out);
    if (result == VK_SUCCESS) w.lost = false;
    if (result == VK_SUCCESS && !w.own) add("VkDevice", (uint64_t)(uintptr_t)*out, 0);
    return result;
}
static VKAPI_ATTR void VKAPI_CALL vkDestroyDevice(VkDevice device, const VkAllocationCallbacks *a) {
    counted(__func__);
    gone("VkDevice", (uint64_t)(uintptr_t)device);
    if (device) w.lost = false;
    REAL(vkDestroyDevice)(device, a);
}

static void hazards_waited(void);
static bool may_use_queue(const char *name) {
    if (w.own || !w.settings.lock || w.locked) return true;
    problem("%s: the queue is not locked", name);
    return true;
}
/* A lost device has stopped: nothing of it is in use any more. */
static VKAPI_ATTR VkResult VKAPI_CALL vkQueueSubmit(VkQueue queue, uint32_t n, const VkSubmitInfo *info,
                                                    VkFence fence) {
    VkResult result = fails(__func__, true, VK_SUCCESS);
    may_use_queue(__func__);
    if (result == VK_ERROR_DEVICE_LOST) REAL(vkQueueWaitIdle)(queue);
    return result != VK_SUCCESS ? result : REAL(vkQueueSubmit)(queue, n, info, fence);
}
static VKAPI_ATTR VkResult VKAPI_CALL vkQueueWaitIdle(VkQueue queue) {
    VkResult result = fails(__func__, true, VK_SUCCESS), waited = REAL(vkQueueWaitIdle)(queue);
    may_use_queue(__func__);
    return result != VK_SUCCESS ? result : waited;
}
static VKAPI_ATTR VkResult VKAPI_CALL vkDeviceWaitIdle(VkDevice device) {
    VkResult result = fails(__func__, true, VK_SUCCESS), waited = REAL(vkDeviceWaitIdle)(device);
    return result != VK_SUCCESS ? result : waited;
}
static VKAPI_ATTR VkResult VKAPI_CALL vkWaitForFences(VkDevice device, uint32_t n, const VkFence *fences,
                                                      VkBool32 all, uint64_t timeout) {
    VkResult result = fails(__func__, true, VK_SUCCESS);
    if (result != VK_SUCCESS) {
        REAL(vkDeviceWaitIdle)(device);
        return result;
    }
    if (w.settings.discrete) timeout = UINT64_MAX; /* it is a CPU all the same, which may be busy */
    result = REAL(vkWaitForFences)(device, n, fences, all, timeout);
    if (result == VK_SUCCESS) hazards_waited();
    return result;
}
static VKAPI_ATTR VkResult VKAPI_CALL vkGetFenceStatus(VkDevice device, VkFence fence) {
    VkResult result = fails(__func__, true, VK_SUCCESS);
    if (result == VK_ERROR_DEVICE_LOST) REAL(vkDeviceWaitIdle)(device);
    return result != VK_SUCCESS ? result : REAL(vkGetFenceStatus)(device, fence);
}

/* ---- hazards ----
   The validation layer takes what a shader writes into a storage buffer for a read (1.3.239 does), so that it misses barriers
   between dispatches. Here: a dispatch that reads a buffer which one before it wrote, or writes one which it read, needs a
   barrier between them, in the order in which they are recorded, or a wait. By the ranges of
   descriptors: what two dispatches write is not compared. */
enum { SETS = 2, BINDINGS = 8, ELEMENTS = 64, MOST_SETS = 512, MOST_COMMANDS = 64 };
enum { READS = 1, WRITES = 2 };
typedef struct uses {
    uint64_t handle; /* of the module or pipeline */
    size_t words;    /* of its code, which tells which shader it is */
    uint8_t of[SETS][BINDINGS];
} uses;
typedef struct touched {
    VkBuffer buffer;
    uint64_t from, to;
    size_t by; /* words of the shader */
} touched;
static struct {
    uses shaders[256], pipelines[1024];
    uint32_t n_shaders, n_pipelines;
    struct {
        VkDescriptorSet set;
        touched buffers[BINDINGS][ELEMENTS];
    } sets[MOST_SETS];
    struct {
        VkCommandBuffer commands;
        const uses *pipeline;
        uint32_t set[SETS]; /* of sets[] */
    } commands[MOST_COMMANDS];
    touched read[1024], written[1024]; /* since the last barrier */
    uint32_t n_read, n_written;
} h;

static void hazards_reset(void) { memset(&h, 0, sizeof h); }
static void hazards_waited(void) { h.n_read = h.n_written = 0; }

/* Which bindings a SPIR-V module reads and writes, by what is decorated NonWritable and NonReadable. */
static void find_uses(const uint32_t *words, size_t n, uses *u) {
    uint32_t bound = words[3], *of = (uint32_t *)calloc(bound, 6 * sizeof *of), *pointee = of + bound;
    uint32_t *set = of + 2 * bound, *binding = of + 3 * bound, *not = of + 4 * bound, *type = of + 5 * bound,
             i;
    u->words = n;
    for (size_t at = 5; at < n && words[at] >> 16; at += words[at] >> 16) {
        const uint32_t *w = words + at;
        uint32_t op = w[0] & 0xffff, d = op == 71 ? w[2] : op == 72 ? w[3] : 0; /* Decorate, MemberDecorate */
        if (op == 71 && d == 34) set[w[1]] = w[3] + 1;
        if (op == 71 && d == 33) binding[w[1]] = w[3] + 1;
        if (d == 24) not [w[1]] |= WRITES;
        if (d == 25) not [w[1]] |= READS;
        if (op == 32) pointee[w[1]] = w[3]; /* TypePointer */
        if (op == 28) of[w[1]] = w[2];      /* TypeArray */
        if (op == 59) type[w[2]] = w[1];    /* Variable */
    }
    for (i = 0; i < bound; i++) {
        uint32_t t = pointee[type[i]];
        if (!set[i] || !binding[i] || set[i] > SETS || binding[i] > BINDINGS) continue;
        if (of[t]) t = of[t];
        u->of[set[i] - 1][binding[i] - 1] |= (READS | WRITES) & ~(not [i] | not [t]);
    }
    free(of);
}

static uint32_t set_of(VkDescriptorSet set) {
    uint32_t i;
    for (i = 0; i < MOST_SETS - 1 && h.sets[i].set && h.sets[i].set != set; i++) {
    }
    h.sets[i].set = set;
    return i;
}
static uint32_t commands_of(VkCommandBuffer commands) {
    uint32_t i;
    for (i = 0; i < MOST_COMMANDS - 1 && h.commands[i].commands && h.commands[i].commands != commands; i++) {
    }
    h.commands[i].commands = commands;
    return i;
}
static const touched *among(const touched *list, uint32_t n, const touched *t) {
    while (n)
        if (list[--n].buffer == t->buffer && list[n].from < t->to && t->from < list[n].to) return &list[n];
    return NULL;
}

static VKAPI_ATTR void VKAPI_CALL vkCmdBindPipeline(VkCommandBuffer commands, VkPipelineBindPoint point,
                                                    VkPipeline pipeline) {
    uint32_t i;
    counted(__func__);
    for (i = 0; i < h.n_pipelines; i++)
        if (h.pipelines[i].handle == (uint64_t)pipeline)
            h.commands[commands_of(commands)].pipeline = &h.pipelines[i];
    REAL(vkCmdBindPipeline)(commands, point, pipeline);
}
static VKAPI_ATTR void VKAPI_CALL vkCmdBindDescriptorSets(VkCommandBuffer commands, VkPipelineBindPoint point,
                                                          VkPipelineLayout layout, uint32_t first, uint32_t n,
                                                          const VkDescriptorSet *sets, uint32_t n_offsets,
                                                          const uint32_t *offsets) {
    uint32_t i;
    counted(__func__);
    for (i = 0; i < n && first + i < SETS; i++)
        h.commands[commands_of(commands)].set[first + i] = set_of(sets[i]);
    REAL(vkCmdBindDescriptorSets)(commands, point, layout, first, n, sets, n_offsets, offsets);
}

/* Each buffer that the dispatch uses in the given way: compared with a list (hazard is its name), or added to it (null). */
static void dispatch_uses(uint32_t c, int way, touched *list, uint32_t *n, const char *hazard) {
    const uses *u = h.commands[c].pipeline;
    uint32_t s, b, e;
    for (s = 0; s < SETS; s++) {
        for (b = 0; b < BINDINGS; b++) {
            for (e = 0; (u->of[s][b] & way) && e < ELEMENTS; e++) {
                const touched *t = &h.sets[h.commands[c].set[s]].buffers[b][e];
                const touched *there = t->buffer ? among(list, *n, t) : NULL;
                if (hazard && there) {
                    problem("%s without a barrier: set %u, binding %u, element %u of a shader of %zu words, "
                            "after "
                            "one of %zu",
                            hazard, s, b, e, u->words, there->by);
                    return;
                }
                if (hazard || !t->buffer || *n == 1024) continue;
                list[*n] = *t;
                list[(*n)++].by = u->words;
            }
        }
    }
}
static VKAPI_ATTR void VKAPI_CALL vkCmdDispatch(VkCommandBuffer commands, uint32_t x, uint32_t y,
                                                uint32_t z) {
    uint32_t c = commands_of(commands);
    counted(__func__);
    if (h.commands[c].pipeline && !w.own) {
        dispatch_uses(c, READS, h.written, &h.n_written, "read after write");
        dispatch_uses(c, WRITES, h.read, &h.n_read, "write after read");
        dispatch_uses(c, READS, h.read, &h.n_read, NULL);
        dispatch_uses(c, WRITES, h.written, &h.n_written, NULL);
    }
    REAL(vkCmdDispatch)(commands, x, y, z);
}
static VKAPI_ATTR void VKAPI_CALL vkCmdPipelineBarrier(
    VkCommandBuffer commands, VkPipelineStageFlags from, VkPipelineStageFlags to, VkDependencyFlags flags,
    uint32_t n, const VkMemoryBarrier *memory, uint32_t n_buffers, const VkBufferMemoryBarrier *buffers,
    uint32_t n_images, const VkImageMemoryBarrier *images) {
    const VkPipelineStageFlags shaders =
        VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT | VK_PIPELINE_STAGE_ALL_COMMANDS_BIT;
    const VkAccessFlags writes = VK_ACCESS_SHADER_WRITE_BIT | VK_ACCESS_MEMORY_WRITE_BIT,
                        reads = VK_ACCESS_SHADER_READ_BIT | VK_ACCESS_MEMORY_READ_BIT;
    uint32_t i;
    counted(__func__);
    if ((from & shaders) && (to & shaders)) {
        h.n_read = 0;
        for (i = 0; i < n; i++)
            if ((memory[i].srcAccessMask & writes) && (memory[i].dstAccessMask & reads)) h.n_written = 0;
    }
    REAL(vkCmdPipelineBarrier)(commands, from, to, flags, n, memory, n_buffers, buffers, n_images, images);
}

/* ---- memory ---- */
static uint32_t real_type(uint32_t type) { return w.settings.discrete ? 0 : type; }

static VKAPI_ATTR VkResult VKAPI_CALL vkAllocateMemory(VkDevice device, const VkMemoryAllocateInfo *info,
                                                       const VkAllocationCallbacks *a, VkDeviceMemory *out) {
    const vkw_settings *s = &w.settings;
    VkMemoryAllocateInfo real_info = *info;
    uint32_t heap = s->discrete ? info->memoryTypeIndex : 0;
    VkResult result;
    MAY_FAIL(false, VK_SUCCESS);
    if (!w.own && s->max_alloc && info->allocationSize > s->max_alloc)
        problem("%llu bytes allocated at once", (unsigned long long)info->allocationSize);
    if (!w.own && !heap && s->heap_bytes && heap_use(0) + info->allocationSize > s->heap_bytes)
        return VK_ERROR_OUT_OF_DEVICE_MEMORY;
    if (!w.own) real_info.memoryTypeIndex = real_type(info->memoryTypeIndex);
    result = REAL(vkAllocateMemory)(device, &real_info, a, out);
    if (result == VK_SUCCESS && !w.own)
        add("VkDeviceMemory", (uint64_t)*out, info->allocationSize)->memory = heap;
    return result;
}
static VKAPI_ATTR void VKAPI_CALL vkFreeMemory(VkDevice device, VkDeviceMemory memory,
                                               const VkAllocationCallbacks *a) {
    counted(__func__);
    gone("VkDeviceMemory", (uint64_t)memory);
    REAL(vkFreeMemory)(device, memory, a);
}
static VKAPI_ATTR VkResult VKAPI_CALL vkMapMemory(VkDevice device, VkDeviceMemory memory, VkDeviceSize offset,
                                                  VkDeviceSize size, VkMemoryMapFlags flags, void **out) {
    object *o = find("VkDeviceMemory", (uint64_t)memory);
    VkResult result;
    MAY_FAIL(false, VK_ERROR_MEMORY_MAP_FAILED);
    if (!w.own && o && w.settings.discrete && o->memory == 0)
        problem("memory is mapped that the host does not see");
    result = REAL(vkMapMemory)(device, memory, offset, size, flags, out);
    if (result == VK_SUCCESS && o && !w.own) o->map = (char *)*out - offset;
    return result;
}
static VKAPI_ATTR void VKAPI_CALL vkUnmapMemory(VkDevice device, VkDeviceMemory memory) {
    object *o = find("VkDeviceMemory", (uint64_t)memory);
    counted(__func__);
    if (o) o->map = NULL;
    REAL(vkUnmapMemory)(device, memory);
}
static VKAPI_ATTR VkResult VKAPI_CALL vkFlushMappedMemoryRanges(VkDevice device, uint32_t n,
                                                                const VkMappedMemoryRange *ranges) {
    MAY_FAIL(false, VK_SUCCESS);
    return REAL(vkFlushMappedMemoryRanges)(device, n, ranges);
}
static VKAPI_ATTR VkResult VKAPI_CALL vkInvalidateMappedMemoryRanges(VkDevice device, uint32_t n,
                                                                     const VkMappedMemoryRange *ranges) {
    MAY_FAIL(false, VK_SUCCESS);
    return REAL(vkInvalidateMappedMemoryRanges)(device, n, ranges);
}

static VKAPI_ATTR VkResult VKAPI_CALL vkCreateBuffer(VkDevice device, const VkBufferCreateInfo *info,
                                                     const VkAllocationCallbacks *a, VkBuffer *out) {
    VkResult result;
    MAY_FAIL(false, VK_SUCCESS);
    result = REAL(vkCreateBuffer)(device, info, a, out);
    if (result == VK_SUCCESS && !w.own) add("VkBuffer", (uint64_t)*out, info->size);
    return result;
}
static VKAPI_ATTR void VKAPI_CALL vkDestroyBuffer(VkDevice device, VkBuffer buffer,
                                                  const VkAllocationCallbacks *a) {
    counted(__func__);
    gone("VkBuffer", (uint64_t)buffer);
    REAL(vkDestroyBuffer)(device, buffer, a);
}
static VKAPI_ATTR void VKAPI_CALL vkGetBufferMemoryRequirements(VkDevice device, VkBuffer buffer,
                                                                VkMemoryRequirements *need) {
    counted(__func__);
    REAL(vkGetBufferMemoryRequirements)(device, buffer, need);
    if (w.settings.discrete && !w.own) need->memoryTypeBits = 3;
}
static VKAPI_ATTR VkResult VKAPI_CALL vkBindBufferMemory(VkDevice device, VkBuffer buffer,
                                                         VkDeviceMemory memory, VkDeviceSize offset) {
    object *o = find("VkBuffer", (uint64_t)buffer);
    MAY_FAIL(false, VK_SUCCESS);
    if (o) o->memory = (uint64_t)memory;
    if (o && offset) problem("a buffer is not bound to the start of its memory");
    return REAL(vkBindBufferMemory)(device, buffer, memory, offset);
}

static VKAPI_ATTR void VKAPI_CALL vkUpdateDescriptorSets(VkDevice device, uint32_t n,
                                                         const VkWriteDescriptorSet *writes, uint32_t copies,
                                                         const VkCopyDescriptorSet *copy) {
    uint32_t i, j;
    counted(__func__);
    for (i = 0; i < n && !w.own; i++) {
        for (j = 0; j < writes[i].descriptorCount; j++) {
            const VkDescriptorBufferInfo *b = &writes[i].pBufferInfo[j];
            const object *o = find("VkBuffer", (uint64_t)b->buffer);
            uint64_t range = b->range != VK_WHOLE_SIZE ? b->range : o ? o->bytes - b->offset : 0;
            uint32_t bank = writes[i].dstArrayElement + j;
            if (w.settings.max_range && range > w.settings.max_range)
                problem("a descriptor of %llu bytes", (unsigned long long)range);
            if (writes[i].dstBinding == 0 && bank < MOST_BANKS) w.banks[bank] = b->buffer;
            if (writes[i].dstBinding < BINDINGS && bank < ELEMENTS)
                h.sets[set_of(writes[i].dstSet)].buffers[writes[i].dstBinding][bank] =
                    (touched){b->buffer, b->offset, b->offset + range, 0};
        }
    }
    REAL(vkUpdateDescriptorSets)(device, n, writes, copies, copy);
}

void vkw_download(uint32_t bank, uint64_t offset, void *to, size_t bytes) {
    object *b = find("VkBuffer", (uint64_t)w.banks[bank]), *m;
    VkDevice device = VK_NULL_HANDLE;
    void *map = NULL;
    uint32_t i;
    assert_non_null(b);
    m = find("VkDeviceMemory", b->memory);
    assert_non_null(m);
    assert_true(offset + bytes <= b->bytes);
    for (i = 0; i < w.n_objects; i++)
        if (w.objects[i].type && !strcmp(w.objects[i].type, "VkDevice"))
            device = (VkDevice)(uintptr_t)w.objects[i].handle;
    if (!m->map)
        assert_int_equal(REAL(vkMapMemory)(device, (VkDeviceMemory)m->handle, 0, VK_WHOLE_SIZE, 0, &map),
                         VK_SUCCESS);
    memcpy(to, (char *)(m->map ? m->map : map) + offset, bytes);
    if (!m->map) REAL(vkUnmapMemory)(device, (VkDeviceMemory)m->handle);
}

/* ---- shaders ---- */
/* clang-format off */
static const uint32_t does_nothing[] = {
    0x07230203, 0x00010000, 0, 6, 0, /* SPIR-V 1.0, five ids */
    0x00020011, 1,                   /* OpCapability Shader */
    0x0003000e, 0, 1,                /* OpMemoryModel Logical GLSL450 */
    0x0005000f, 5, 1, 0x6e69616d, 0, /* OpEntryPoint GLCompute %1 "main" */
    0x00060010, 1, 17, 128, 1, 1,    /* OpExecutionMode %1 LocalSize 128 1 1 */
    0x00020013, 2,                   /* %2 = OpTypeVoid */
    0x00030021, 3, 2,                /* %3 = OpTypeFunction %2 */
    0x00050036, 2, 1, 0, 3,          /* %1 = OpFunction */
    0x000200f8, 4,                   /* OpLabel */
    0x000100fd, 0x00010038,          /* OpReturn, OpFunctionEnd */
};
/* clang-format on */

/* The nth of the instructions that add, subtract or multiply numbers becomes one that does not. */
static bool mutate(uint32_t *words, size_t n, uint32_t nth) {
    size_t i;
    for (i = 5; i < n && (words[i] >> 16); i += words[i] >> 16) {
        uint32_t op = words[i] & 0xffff, other = op;
        if (op == 129 || op == 131) other = 133; /* OpFAdd, OpFSub: OpFMul */
        if (op == 133) other = 129;              /* OpFMul: OpFAdd */
        if (op == 128) other = 130;              /* OpIAdd: OpISub */
        if (op == 199) other = 197;              /* OpBitwiseAnd: OpBitwiseOr */
        if (op == 176) other = 178;              /* OpULessThan: OpULessThanEqual */
        if (other == op || --nth) continue;
        words[i] = (words[i] & 0xffff0000u) | other;
        return true;
    }
    return false;
}

static VKAPI_ATTR VkResult VKAPI_CALL vkCreateShaderModule(VkDevice device,
                                                           const VkShaderModuleCreateInfo *info,
                                                           const VkAllocationCallbacks *a,
                                                           VkShaderModule *out) {
    VkShaderModuleCreateInfo other = *info;
    uint32_t *copy = NULL, i;
    VkResult result;
    MAY_FAIL(false, VK_SUCCESS);
    for (i = 0; i < w.settings.n_broken; i++) {
        if (w.settings.broken[i].n_words * 4 != info->codeSize ||
            memcmp(w.settings.broken[i].words, info->pCode, info->codeSize) != 0)
            continue;
        copy = (uint32_t *)malloc(info->codeSize);
        memcpy(copy, info->pCode, info->codeSize);
        other.pCode = copy;
        if (!w.settings.how) {
            other.pCode = does_nothing;
            other.codeSize = sizeof does_nothing;
        } else if (!mutate(copy, info->codeSize / 4, w.settings.how)) {
            continue;
        }
        w.n_broken++;
    }
    result = REAL(vkCreateShaderModule)(device, &other, a, out);
    if (result == VK_SUCCESS && !w.own) {
        add("VkShaderModule", (uint64_t)*out, 0);
        for (i = 0; i < h.n_shaders && h.shaders[i].handle != (uint64_t)*out; i++) {
        }
        assert_true(i < 256);
        if (i == h.n_shaders) h.n_shaders++;
        memset(&h.shaders[i], 0, sizeof h.shaders[i]);
        h.shaders[i].handle = (uint64_t)*out;
        find_uses(other.pCode, other.codeSize / 4, &h.shaders[i]);
    }
    free(copy);
    return result;
}

static void pipeline_uses(VkPipeline pipeline, VkShaderModule module) {
    uint32_t i, p;
    for (i = 0; i < h.n_shaders && h.shaders[i].handle != (uint64_t)module; i++) {
    }
    for (p = 0; p < h.n_pipelines && h.pipelines[p].handle != (uint64_t)pipeline; p++) {
    }
    assert_true(i < h.n_shaders && p < 1024);
    if (p == h.n_pipelines) h.n_pipelines++;
    h.pipelines[p] = h.shaders[i];
    h.pipelines[p].handle = (uint64_t)pipeline;
}

static VKAPI_ATTR VkResult VKAPI_CALL vkCreateComputePipelines(VkDevice device, VkPipelineCache cache,
                                                               uint32_t n,
                                                               const VkComputePipelineCreateInfo *info,
                                                               const VkAllocationCallbacks *a,
                                                               VkPipeline *out) {
    VkResult result = fails(__func__, false, VK_SUCCESS);
    uint32_t i;
    memset(out, 0, n * sizeof *out);
    if (result != VK_SUCCESS) return result;
    result = REAL(vkCreateComputePipelines)(device, cache, n, info, a, out);
    for (i = 0; result == VK_SUCCESS && !w.own && i < n; i++) {
        add("VkPipeline", (uint64_t)out[i], 0);
        pipeline_uses(out[i], info[i].stage.module);
    }
    return result;
}
static VKAPI_ATTR VkResult VKAPI_CALL vkGetPipelineCacheData(VkDevice device, VkPipelineCache cache,
                                                             size_t *n, void *data) {
    MAY_FAIL(false, VK_SUCCESS);
    return REAL(vkGetPipelineCacheData)(device, cache, n, data);
}

/* ---- the rest: objects that are made and destroyed alike ---- */
#define MADE(type, info_type)                                                                             \
    static VKAPI_ATTR VkResult VKAPI_CALL vkCreate##type(VkDevice device, const info_type *info,          \
                                                         const VkAllocationCallbacks *a, Vk##type *out) { \
        VkResult result;                                                                                  \
        MAY_FAIL(false, VK_SUCCESS);                                                                      \
        result = REAL(vkCreate##type)(device, info, a, out);                                              \
        if (result == VK_SUCCESS && !w.own) add("Vk" #type, (uint64_t)*out, 0);                           \
        return result;                                                                                    \
    }                                                                                                     \
    DESTROYED(type)
#define DESTROYED(type)                                                                 \
    static VKAPI_ATTR void VKAPI_CALL vkDestroy##type(VkDevice device, Vk##type handle, \
                                                      const VkAllocationCallbacks *a) { \
        counted(__func__);                                                              \
        gone("Vk" #type, (uint64_t)handle);                                             \
        REAL(vkDestroy##type)(device, handle, a);                                       \
    }
DESTROYED(ShaderModule)
DESTROYED(Pipeline)
MADE(DescriptorSetLayout, VkDescriptorSetLayoutCreateInfo)
MADE(PipelineLayout, VkPipelineLayoutCreateInfo)
MADE(PipelineCache, VkPipelineCacheCreateInfo)
MADE(DescriptorPool, VkDescriptorPoolCreateInfo)
MADE(CommandPool, VkCommandPoolCreateInfo)
MADE(Fence, VkFenceCreateInfo)
MADE(Semaphore, VkSemaphoreCreateInfo)
MADE(QueryPool, VkQueryPoolCreateInfo)

#define FAILS(name, declared, passed)                     \
    static VKAPI_ATTR VkResult VKAPI_CALL name declared { \
        MAY_FAIL(false, VK_SUCCESS);                      \
        return REAL(name) passed;                         \
    }
FAILS(vkAllocateDescriptorSets,
      (VkDevice device, const VkDescriptorSetAllocateInfo *info, VkDescriptorSet *out), (device, info, out))
FAILS(vkAllocateCommandBuffers,
      (VkDevice device, const VkCommandBufferAllocateInfo *info, VkCommandBuffer *out), (device, info, out))
FAILS(vkBeginCommandBuffer, (VkCommandBuffer commands, const VkCommandBufferBeginInfo *info),
      (commands, info))
FAILS(vkEndCommandBuffer, (VkCommandBuffer commands), (commands))
FAILS(vkResetCommandBuffer, (VkCommandBuffer commands, VkCommandBufferResetFlags flags), (commands, flags))
FAILS(vkResetCommandPool, (VkDevice device, VkCommandPool pool, VkCommandPoolResetFlags flags),
      (device, pool, flags))
FAILS(vkResetFences, (VkDevice device, uint32_t n, const VkFence *fences), (device, n, fences))

/* ---- the table ---- */
static VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL vkGetDeviceProcAddr(VkDevice device, const char *name);
static const struct {
    const char *name;
    PFN_vkVoidFunction f;
} table[] = {
#define F(name) \
    { #name, (PFN_vkVoidFunction)name }
    F(vkCreateInstance),
    F(vkDestroyInstance),
    F(vkCreateDevice),
    F(vkDestroyDevice),
    F(vkCreateBuffer),
    F(vkDestroyBuffer),
    F(vkCreateShaderModule),
    F(vkDestroyShaderModule),
    F(vkCreateDescriptorSetLayout),
    F(vkDestroyDescriptorSetLayout),
    F(vkCreatePipelineLayout),
    F(vkDestroyPipelineLayout),
    F(vkCreatePipelineCache),
    F(vkDestroyPipelineCache),
    F(vkCreateDescriptorPool),
    F(vkDestroyDescriptorPool),
    F(vkCreateCommandPool),
    F(vkDestroyCommandPool),
    F(vkCreateFence),
    F(vkDestroyFence),
    F(vkCreateSemaphore),
    F(vkDestroySemaphore),
    F(vkCreateQueryPool),
    F(vkDestroyQueryPool),
    F(vkEnumerateInstanceVersion),
    F(vkEnumerateInstanceExtensionProperties),
    F(vkEnumeratePhysicalDevices),
    F(vkEnumerateDeviceExtensionProperties),
    F(vkGetPhysicalDeviceProperties),
    F(vkGetPhysicalDeviceProperties2),
    F(vkGetPhysicalDeviceFeatures2),
    F(vkGetPhysicalDeviceQueueFamilyProperties),
    F(vkGetPhysicalDeviceMemoryProperties),
    F(vkGetPhysicalDeviceMemoryProperties2),
    F(vkQueueSubmit),
    F(vkQueueWaitIdle),
    F(vkDeviceWaitIdle),
    F(vkWaitForFences),
    F(vkGetFenceStatus),
    F(vkResetFences),
    F(vkAllocateMemory),
    F(vkFreeMemory),
    F(vkMapMemory),
    F(vkUnmapMemory),
    F(vkFlushMappedMemoryRanges),
    F(vkInvalidateMappedMemoryRanges),
    F(vkGetBufferMemoryRequirements),
    F(vkBindBufferMemory),
    F(vkUpdateDescriptorSets),
    F(vkCreateComputePipelines),
    F(vkDestroyPipeline),
    F(vkGetPipelineCacheData),
    F(vkAllocateDescriptorSets),
    F(vkAllocateCommandBuffers),
    F(vkBeginCommandBuffer),
    F(vkEndCommandBuffer),
    F(vkResetCommandBuffer),
    F(vkResetCommandPool),
    F(vkCmdBindPipeline),
    F(vkCmdBindDescriptorSets),
    F(vkCmdDispatch),
    F(vkCmdPipelineBarrier),
    F(vkGetDeviceProcAddr)};

static PFN_vkVoidFunction wrapped(const char *name) {
    size_t i;
    for (i = 0; i < sizeof table / sizeof table[0]; i++)
        if (!strcmp(table[i].name, name)) return table[i].f;
    return NULL;
}
static VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL vkGetDeviceProcAddr(VkDevice device, const char *name) {
    PFN_vkVoidFunction f = wrapped(name);
    return f ? f : REAL(vkGetDeviceProcAddr)(device, name);
}
void *vkw_get_instance_proc_addr(void *instance, const char *name) {
    PFN_vkVoidFunction f = wrapped(name);
    void *p;
    if (!f) f = REAL(vkGetInstanceProcAddr)((VkInstance)instance, name);
    memcpy(&p, &f, sizeof p);
    return p;
}

/* ---- the app's own device ---- */
static void need(VkResult result, const char *what) {
    if (result != VK_SUCCESS) fail_msg("%s: VkResult %d", what, (int)result);
}
#define NEED(call) need(call, #call)

void vkw_app_open(vkw_app *app) {
    static const float priority = 1;
    const uint32_t without = w.settings.without;
    VkApplicationInfo info = {.sType = VK_STRUCTURE_TYPE_APPLICATION_INFO, .apiVersion = VK_API_VERSION_1_1};
    VkInstanceCreateInfo instance = {.sType = VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO,
                                     .pApplicationInfo = &info};
    VkPhysicalDeviceSubgroupSizeControlFeaturesEXT size = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_SIZE_CONTROL_FEATURES_EXT,
        .subgroupSizeControl = VK_TRUE,
        .computeFullSubgroups = VK_TRUE};
    VkPhysicalDeviceShaderFloat16Int8Features float16 = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SHADER_FLOAT16_INT8_FEATURES,
        .pNext = without & VKW_SIZE_CONTROL ? NULL : &size,
        .shaderFloat16 = !(without & VKW_FP16)};
    VkPhysicalDevice16BitStorageFeatures storage = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_16BIT_STORAGE_FEATURES,
        .pNext = &float16,
        .storageBuffer16BitAccess = !(without & VKW_STORAGE16)};
    VkPhysicalDeviceFeatures2 features = {.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2,
                                          .pNext = &storage,
                                          .features = {.shaderStorageBufferArrayDynamicIndexing = VK_TRUE}};
    VkDeviceQueueCreateInfo queue = {
        .sType = VK_STRUCTURE_TYPE_DEVICE_QUEUE_CREATE_INFO, .queueCount = 1, .pQueuePriorities = &priority};
    const char *extensions[2] = {VK_KHR_SHADER_FLOAT16_INT8_EXTENSION_NAME,
                                 VK_EXT_SUBGROUP_SIZE_CONTROL_EXTENSION_NAME};
    VkDeviceCreateInfo device = {.sType = VK_STRUCTURE_TYPE_DEVICE_CREATE_INFO,
                                 .pNext = &features,
                                 .queueCreateInfoCount = 1,
                                 .pQueueCreateInfos = &queue,
                                 .enabledExtensionCount = without & VKW_SIZE_CONTROL ? 1 : 2,
                                 .ppEnabledExtensionNames = extensions};
    VkCommandPoolCreateInfo pool = {.sType = VK_STRUCTURE_TYPE_COMMAND_POOL_CREATE_INFO,
                                    .flags = VK_COMMAND_POOL_CREATE_RESET_COMMAND_BUFFER_BIT};
    VkCommandBufferAllocateInfo commands = {.sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_ALLOCATE_INFO,
                                            .commandBufferCount = 1};
    VkFenceCreateInfo fence = {.sType = VK_STRUCTURE_TYPE_FENCE_CREATE_INFO};
    uint32_t one = 1;
    memset(app, 0, sizeof *app);
    w.own = true;
    NEED(vkCreateInstance(&instance, NULL, (VkInstance *)&app->instance));
    NEED(REAL(vkEnumeratePhysicalDevices)((VkInstance)app->instance, &one,
                                          (VkPhysicalDevice *)&app->physical));
    if (without & VKW_FP16) { /* the extension is not there either */
        storage.pNext = float16.pNext;
        device.ppEnabledExtensionNames = extensions + 1;
        device.enabledExtensionCount--;
    }
    NEED(vkCreateDevice((VkPhysicalDevice)app->physical, &device, NULL, (VkDevice *)&app->device));
    REAL(vkGetDeviceQueue)((VkDevice)app->device, 0, 0, (VkQueue *)&app->queue);
    NEED(REAL(vkCreateCommandPool)((VkDevice)app->device, &pool, NULL, (VkCommandPool *)&app->pool));
    commands.commandPool = (VkCommandPool)app->pool;
    NEED(REAL(vkAllocateCommandBuffers)((VkDevice)app->device, &commands, (VkCommandBuffer *)&app->commands));
    NEED(REAL(vkCreateFence)((VkDevice)app->device, &fence, NULL, (VkFence *)&app->fence));
    w.own = false;
}
void vkw_app_close(vkw_app *app) {
    VkDevice device = (VkDevice)app->device;
    if (!device) return;
    w.own = true;
    REAL(vkDeviceWaitIdle)(device);
    REAL(vkDestroyFence)(device, (VkFence)app->fence, NULL);
    REAL(vkDestroyCommandPool)(device, (VkCommandPool)app->pool, NULL);
    vkDestroyDevice(device, NULL);
    vkDestroyInstance((VkInstance)app->instance, NULL);
    w.own = false;
    memset(app, 0, sizeof *app);
}

vkw_buffer vkw_buffer_make(vkw_app *app, size_t bytes) {
    VkDevice device = (VkDevice)app->device;
    VkBufferCreateInfo info = {.sType = VK_STRUCTURE_TYPE_BUFFER_CREATE_INFO,
                               .size = (bytes + 15) / 16 * 16,
                               .usage = VK_BUFFER_USAGE_STORAGE_BUFFER_BIT};
    VkMemoryAllocateInfo allocate = {.sType = VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_INFO};
    VkMemoryRequirements needs;
    vkw_buffer b = {.bytes = bytes};
    NEED(REAL(vkCreateBuffer)(device, &info, NULL, (VkBuffer *)&b.buffer));
    REAL(vkGetBufferMemoryRequirements)(device, (VkBuffer)b.buffer, &needs);
    allocate.allocationSize = needs.size;
    NEED(REAL(vkAllocateMemory)(device, &allocate, NULL, (VkDeviceMemory *)&b.memory));
    NEED(REAL(vkBindBufferMemory)(device, (VkBuffer)b.buffer, (VkDeviceMemory)b.memory, 0));
    NEED(REAL(vkMapMemory)(device, (VkDeviceMemory)b.memory, 0, VK_WHOLE_SIZE, 0, &b.map));
    memset(b.map, 0xff, bytes);
    return b;
}
void vkw_buffer_free(vkw_app *app, vkw_buffer *b) {
    REAL(vkDestroyBuffer)((VkDevice)app->device, (VkBuffer)b->buffer, NULL);
    REAL(vkFreeMemory)((VkDevice)app->device, (VkDeviceMemory)b->memory, NULL);
    memset(b, 0, sizeof *b);
}

void *vkw_app_begin(vkw_app *app) {
    VkCommandBufferBeginInfo info = {.sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_BEGIN_INFO,
                                     .flags = VK_COMMAND_BUFFER_USAGE_ONE_TIME_SUBMIT_BIT};
    NEED(REAL(vkBeginCommandBuffer)((VkCommandBuffer)app->commands, &info));
    return app->commands;
}
void vkw_app_submit(vkw_app *app) {
    VkSubmitInfo info = {.sType = VK_STRUCTURE_TYPE_SUBMIT_INFO,
                         .commandBufferCount = 1,
                         .pCommandBuffers = (VkCommandBuffer *)&app->commands};
    VkMemoryBarrier written = {.sType = VK_STRUCTURE_TYPE_MEMORY_BARRIER,
                               .srcAccessMask = VK_ACCESS_SHADER_WRITE_BIT,
                               .dstAccessMask = VK_ACCESS_HOST_READ_BIT};
    VkDevice device = (VkDevice)app->device;
    REAL(vkCmdPipelineBarrier)
    ((VkCommandBuffer)app->commands, VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT, VK_PIPELINE_STAGE_HOST_BIT, 0, 1,
     &written, 0, NULL, 0, NULL);
    NEED(REAL(vkEndCommandBuffer)((VkCommandBuffer)app->commands));
    NEED(REAL(vkQueueSubmit)((VkQueue)app->queue, 1, &info, (VkFence)app->fence));
    NEED(REAL(vkWaitForFences)(device, 1, (VkFence *)&app->fence, VK_TRUE, UINT64_MAX));
    NEED(REAL(vkResetFences)(device, 1, (VkFence *)&app->fence));
}
void vkw_app_wait(vkw_app *app) { NEED(REAL(vkDeviceWaitIdle)((VkDevice)app->device)); }
