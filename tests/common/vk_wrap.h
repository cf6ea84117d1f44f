/* Vulkan's loader with a wrapper around each function that kvlite may call, for tests of the Vulkan backend:
   desc.vulkan.get_instance_proc_addr = vkw_get_instance_proc_addr.

   Always: the validation layer (core and synchronization) is added to each instance and its messages are kept; objects and memory
   are followed, so that what is left at the end, or destroyed twice, over a limit, or used without a barrier, is known. vkw_problems tells of all.
   On demand: the Nth call that can fail does, or the device is lost there; another device is shown than there is (features, limits,
   memory types, VK_EXT_memory_budget); a shader is broken.

   Calls between vkw_own(true) and vkw_own(false), and those of the functions below, are the test's own: they are not counted and do
   not fail, and what they make is not followed. One thread. */
#ifndef KVL_TESTS_VK_WRAP_H
#define KVL_TESTS_VK_WRAP_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Opens the loader with lavapipe (common/vk_env.h). False, and a line that says SKIP, where it is not there. */
bool vkw_open(unsigned bits);
void *vkw_get_instance_proc_addr(void *instance, const char *name);

/* ---- the device that is shown ---- */
enum { VKW_FP16 = 1, VKW_STORAGE16 = 2, VKW_SUBGROUP = 4, VKW_SIZE_CONTROL = 8 };
enum { VKW_MAX_BROKEN = 64 };
typedef struct vkw_settings {
    bool quiet;       /* no validation: where there are thousands of instances */
    uint32_t api;     /* of the device, major << 22 | minor << 12; 0 = lavapipe's */
    uint32_t without; /* VKW_*: features, and their extensions, that the device has not */
    uint32_t devices; /* this many are enumerated, 0 = one; KVL_NONE = none */
    bool no_compute;  /* queues of the device do not compute */
    bool
        discrete; /* a GPU with memory of its own that the host does not see, heap 0, type 0; and the host's, heap 1, type 1 */
    uint64_t max_range;               /* maxStorageBufferRange */
    uint64_t max_alloc;               /* maxMemoryAllocationSize */
    uint32_t max_buffers;             /* maxPerStageDescriptorStorageBuffers */
    uint64_t heap_bytes;              /* of heap 0; more cannot be allocated */
    bool budget;                      /* VK_EXT_memory_budget is there */
    uint64_t heap_budget, others_use; /* of heap 0: its budget, and what other programs use of it */
    uint32_t driver_version;          /* told to be this; 0 = lavapipe's */
    bool lock;                        /* the queue is used with vkw_lock called */

    /* Shaders: modules of these words are broken when they are made. */
    struct {
        const uint32_t *words;
        size_t n_words;
    } broken[VKW_MAX_BROKEN];
    uint32_t n_broken;
    uint32_t how; /* 0: they do nothing; n: their n-th arithmetic instruction is another one */
} vkw_settings;
vkw_settings *vkw(void);
void vkw_reset(void); /* settings and counts; objects are forgotten */

/* For desc.vulkan.lock and unlock. */
void vkw_lock(void *user);
void vkw_unlock(void *user);

/* ---- faults ---- */
enum { VKW_FAILS, VKW_LOST };
/* The nth call from now on fails (0: none), for once: of those that can fail, or, with VKW_LOST, of those that can tell of a lost
   device, which is then lost for all of them until it is destroyed. */
void vkw_fail(uint64_t nth, int how);
const char *vkw_failed(void);         /* the function that failed last, "" */
uint64_t vkw_failures(void);          /* since vkw_fail */
uint64_t vkw_calls(int how);          /* that can fail, or tell of a lost device, since vkw_reset */
uint64_t vkw_count(const char *name); /* calls of a function since vkw_reset */
uint32_t vkw_broken(void);            /* modules broken since vkw_reset */

uint64_t vkw_memory(void);   /* device memory that is followed, bytes */
uint64_t vkw_heap_use(void); /* of that, of heap 0 */
uint64_t vkw_objects(void);
/* Messages of the validation layer, leaks, and what else was wrong: how many, and the first of them. */
int vkw_problems(char *text, size_t size);
uint32_t vkw_wrong(void); /* how many of them there are now, without leaks */
void vkw_own(bool own);

/* ---- the app's own device ---- */
typedef struct vkw_app {
    void *instance, *physical, *device, *queue;
    uint32_t family;
    void *commands; /* a VkCommandBuffer */
    void *pool, *fence;
} vkw_app;
typedef struct vkw_buffer { /* of the app: storage, in memory that the host sees */
    void *buffer, *memory, *map;
    size_t bytes;
} vkw_buffer;
void vkw_app_open(vkw_app *app); /* with all features that the settings leave */
void vkw_app_close(vkw_app *app);
vkw_buffer vkw_buffer_make(vkw_app *app, size_t bytes);
void vkw_buffer_free(vkw_app *app, vkw_buffer *b);
void *vkw_app_begin(vkw_app *app); /* its command buffer, in recording state */
void vkw_app_submit(vkw_app *app); /* and waits */
void vkw_app_wait(vkw_app *app);   /* for the device */
/* What stands in the buffer that element `bank` of binding 0 was last set to (the device is idle). */
void vkw_download(uint32_t bank, uint64_t offset, void *to, size_t bytes);
#endif
