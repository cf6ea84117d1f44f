/* kvlite.h - a KV-cache runtime for language models in one header.        version 0.1.0

   Paged, quantised, prefix-shared key/value memory, a continuous-batching scheduler, and the attention that
   reads it. Your app brings the model; kvlite brings everything between "here are this step's q, k, v" and
   "here is the attention output", and decides which tokens run next. No engine, no SDK, no dependency but
   the C library, libm and threads.

   CONTENTS (search for the tags)
     this text                     what it is, how to use it, what must hold
     results, formats, geometry    the API ...
     context, cache, sequences
     steps, scheduler, stats       ... "Stop here" marks its end
     >>config >>platform >>log >>mem
     >>formats                     bytes of every format, encoders, decoders
     >>backend                     what a backend must do
     >>blocks >>prefix >>steps     slabs and blocks; the prefix tree; sequences and rows into pages
     >>sched                       which tokens run next
     >>events                      the recording of what plans depend on
     >>cpu >>null                  backends
     >>tables >>cuda >>vulkan      steps as kernels on a GPU read them; its backends
     >>public >>validate           create, destroy, checks of arguments; every invariant

   HOW TO BUILD
     In exactly one C or C++ file:
         #define KVL_IMPLEMENTATION
         #include "kvlite.h"
     and include it plainly everywhere else. C99 or C++11, gcc or clang; link with -lm -lpthread. No -march
     flag is needed: AVX2 and AVX-512 are chosen at run time. With -std=c99 include it first in that file
     (it asks for POSIX clocks). Options, defined before the include, the same in every file:
         KVL_STATIC     every function is static (one translation unit)
         KVL_API        your own decoration of public functions
         KVL_NO_SIMD    (in the implementation's file) scalar code alone
         KVL_NO_CUDA    (in the implementation's file) no CUDA backend
         KVL_CUDA_KERNELS  (in the implementation's file) where its kernels are; if that is not said,
                        "kernels_cuda/kvlite_cuda_kernels.h" or "kvlite_cuda_kernels.h" where the compiler
                        finds it. A driver (libcuda) is looked for when a context is created; nothing of CUDA is
                        needed to compile or link (before glibc 2.34: -ldl)
         KVL_NO_VULKAN, KVL_VULKAN_KERNELS  the same of Vulkan: "kernels_vulkan/kvlite_vulkan_kernels.h", libvulkan

   STEP BY STEP
     1. Describe the model in a kvl_geometry and a budget in kvl_cache_desc.device_bytes;
        kvl_cache_create().
     2. kvl_sched_create(); kvl_sched_submit() requests, from any thread.
     3. Loop: kvl_sched_plan() says which tokens run now. Embed them; in each layer make q, k, v (q and k
        after RoPE) and call kvl_attend(), which appends k and v to the pages and attends; sample the rows
        in step->logit_rows; kvl_sched_commit() the tokens.
     examples/minimal.c is the whole of it in 77 lines.
     With a scheduler of your own: kvl_seq_open(), then kvl_step_begin(), kvl_attend() for every layer,
     kvl_step_end() or kvl_step_abort().
     With kernels of your own: block tables, slot places, copies and addresses are in kvl_step;
     kvl_cache_layout() says where tiles stand.

   WHAT HOLDS
     - Zero means default in every desc struct; kvl_*_defaults() shows what zero became.
     - The same answer: a sequence's attention does not depend on how its prefill was chunked, who else ran,
       how many threads worked, or whether its prefix was computed or reused: on the CPU bit for bit, within
       one build and SIMD path; on a GPU from run to run and whoever else ran bit for bit, else within tolerance.
     - What a query sees is fixed by position alone: its own block exact, earlier blocks as sealed, the
       first sink_blocks exact.
     - Every byte is in one ledger and under its cap before it is allocated. plan, attend and commit
       allocate nothing.
     - A request that fits alone finishes; a request that can never fit is refused at submit, with the
       numbers.
     - Nothing is silently other than asked: no other backend, no other format, no other request's KV.
     - An error names what was wrong and changes nothing. No abort, no exit, no output, no globals, no
       environment variables.

   THREADS
     A cache and its scheduler belong to one owner thread. Any thread may call kvl_sched_submit,
     kvl_sched_cancel, kvl_sched_close, kvl_sched_wait and kvl_get_stats; allocator, logger and clock must then be
     thread-safe. Different caches are independent.

   WHAT IT DOES NOT DO (yet)
     Host and disk tiers, drafts, latent (MLA) layouts, cross-layer sharing, recurrent state: refused
     by name where asked for.

   Licence: MIT or public domain, as you choose; see LICENSE. */
#ifndef KVLITE_H
#define KVLITE_H

#if defined(KVL_IMPLEMENTATION) && defined(__STRICT_ANSI__) && !defined(_WIN32) && \
    !defined(_POSIX_C_SOURCE) && !defined(_GNU_SOURCE)
#define _POSIX_C_SOURCE 200809L /* the implementation needs a monotonic clock, which -std=c99 hides */
#endif
#include <stddef.h>
#include <stdint.h>
#include <stdbool.h>

#define KVL_VERSION_MAJOR 0
#define KVL_VERSION_MINOR 1
#define KVL_VERSION_PATCH 0
#define KVL_VERSION (KVL_VERSION_MAJOR * 10000 + KVL_VERSION_MINOR * 100 + KVL_VERSION_PATCH)

#ifdef __cplusplus
extern "C" {
#endif

/* KVL_API: define it before the include to decorate every public function; KVL_STATIC makes them all static.
 */
#ifndef KVL_API
#if defined(KVL_STATIC) && (defined(__GNUC__) || defined(__clang__))
#define KVL_API static __attribute__((unused))
#elif defined(KVL_STATIC)
#define KVL_API static
#else
#define KVL_API extern
#endif
#endif

/* ==== results ============================================================ */
/* Zero is success, positive values are normal states of a loop, negative values are errors with pinned
   numbers. NO_BLOCKS, QUEUE_FULL and BUSY are back-pressure: normal flow, nothing was changed, try again
   later. */
#define KVL_RESULTS(X)                                                                        \
    X(OK, 0, "success")                                                                       \
    X(IDLE, 1, "nothing can run now: wait for a submit, or for memory")                       \
    X(DRAINED, 2, "the scheduler was closed and every request has finished")                  \
    X(INVALID_ARG, -1, "an argument is null, out of range or inconsistent")                   \
    X(OUT_OF_HOST_MEMORY, -2, "the host allocator returned null, or the host cap is reached") \
    X(OUT_OF_DEVICE_MEMORY, -3, "the device could not give the memory asked for")             \
    X(NO_BLOCKS, -4, "no free or evictable KV blocks are left under the budget")              \
    X(QUEUE_FULL, -5, "the request queue or the token pool is full")                          \
    X(BUSY, -6, "a step is open: end or abort it first")                                      \
    X(NO_BACKEND, -7, "no backend can run this; the error text says why each was skipped")    \
    X(UNSUPPORTED, -8, "not built yet or not possible here; the error text names the field")  \
    X(INVALID_HANDLE, -9, "a handle is null, stale or belongs to another object")             \
    X(CLOSED, -10, "the scheduler takes no more requests")                                    \
    X(NEVER_FITS, -11, "the request cannot fit even with the whole budget to itself")         \
    X(MISMATCH, -12, "geometry, format, fingerprint or step does not match")                  \
    X(CORRUPT, -13, "an internal invariant or stored data is broken")                         \
    X(LIMIT, -14, "a fixed limit chosen at create is reached")                                \
    X(DEVICE_LOST, -15, "the device failed or was reset: abort the step, then kvl_cache_recover")

typedef enum kvl_result {
#define KVL_RESULT_ENUM_(name, value, text) KVL_##name = value,
    KVL_RESULTS(KVL_RESULT_ENUM_)
#undef KVL_RESULT_ENUM_
        KVL_RESULT_FORCE_INT_ = 0x7fffffff
} kvl_result;

/* The name of a result ("NO_BLOCKS") and one line that says what it means. Any thread. Never null. */
KVL_API const char *kvl_result_name(kvl_result r);
KVL_API const char *kvl_result_text(kvl_result r);

/* ==== formats ============================================================ */
/* clang-format off */
/* How K and V stand in memory. Bytes of a tile (one KV head of one layer, block_tokens rows of dim numbers):
     F32, F16, BF16   rows
     INT8             rows of i8, then one f16 scale a token
     INT8_CHANNEL     rows of u8, then an f16 scale a channel, then an f16 zero a channel      (keys only)
     FP8_E4M3         rows of e4m3, then one f16 scale a token
     NVFP4            rows of e2m1 (two a byte, low nibble first), then an e4m3 scale per 16
     INT4             rows of u4 (two a byte, low nibble first), then (f16 scale, f16 zero) per 64
     INT4_CHANNEL     rows of u4, then an f16 scale a channel, then an f16 zero a channel      (keys only)
   each tile padded to 128 bytes. KVL_ROTATED may be or-ed to INT8, FP8_E4M3, NVFP4 or INT4: rows are multiplied with a
   block-diagonal Hadamard matrix before encoding. */
/* clang-format on */
typedef uint32_t kvl_format;
enum {
    KVL_FORMAT_DEFAULT = 0,
    KVL_F32,
    KVL_F16,
    KVL_BF16,
    KVL_INT8,
    KVL_INT8_CHANNEL,
    KVL_FP8_E4M3,
    KVL_NVFP4,
    KVL_INT4,
    KVL_INT4_CHANNEL,
    KVL_FORMAT_COUNT,
    KVL_ROTATED = 0x100 /* flag */
};

/* A name such as "int4_channel" or "int4+rot" for a format, and back (returns KVL_FORMAT_DEFAULT if unknown).
 */
KVL_API const char *kvl_format_name(kvl_format f);
KVL_API kvl_format kvl_format_from_name(const char *name);

/* Bytes of one tile, padding included; 0 where the format does not take this shape. Any thread. */
KVL_API size_t kvl_tile_bytes(kvl_format f, uint32_t block_tokens, uint32_t dim);

/* Encodes block_tokens rows (row-major f32, already rounded to the exact format) into a tile, or decodes a
   tile to f32 rows (in the encoded domain: rotated rows stay rotated unless unrotate). nvfp4_global is the
   geometry's constant, 0 = 1/16. For callers with their own kernels, and for tests. INVALID_ARG, UNSUPPORTED
   (shape or format). Any thread. */
KVL_API kvl_result kvl_tile_encode(kvl_format f, uint32_t block_tokens, uint32_t dim, float nvfp4_global,
                                   const float *rows, void *tile);
KVL_API kvl_result kvl_tile_decode(kvl_format f, uint32_t block_tokens, uint32_t dim, float nvfp4_global,
                                   const void *tile, bool unrotate, float *rows);

/* Named pairs of a key and a value format, as measured: "f32", "f16", "bf16", "int8" (the default), "int8+",
   "fp8", "nvfp4", "balanced", "int4". */
typedef struct kvl_preset {
    const char *name;
    kvl_format k, v, exact; /* exact: open and sink blocks */
} kvl_preset;
KVL_API const kvl_preset *kvl_presets(uint32_t *count);      /* the table */
KVL_API const kvl_preset *kvl_preset_find(const char *name); /* null if unknown */

/* ==== geometry ============================================================ */
/* what one layer does differently; all zero = nothing */
typedef struct kvl_layer {
    uint32_t window;          /* sliding window in tokens, the query's own counted; 0 = full attention */
    uint32_t sink_tokens;     /* with a window: the first tokens of a sequence that stay visible */
    const float *sink_logits; /* [n_q_heads] learned logits that join the softmax and have no value (gpt-oss);
                                 null = none; copied */
    float softcap;            /* logits become softcap * tanh(logit / softcap); 0 = off */
    float scale;              /* softmax scale of this layer; 0 = the geometry's */
    kvl_format k_format, v_format; /* override of the geometry's packed formats; 0 = none */
    float k_global, v_global;      /* NVFP4 global scales; 0 = 1/16 */
    uint32_t shares_kv_with; /* 1 + index of the layer whose KV this one reads; 0 = own. UNSUPPORTED yet */
    uint32_t latent_dim;     /* MLA: V is the first dims of K. UNSUPPORTED yet */
    uint32_t state_bytes;    /* recurrent state per sequence. UNSUPPORTED yet */
} kvl_layer;

typedef struct kvl_geometry {
    uint32_t n_layers;
    uint32_t n_q_heads;
    uint32_t n_kv_heads;   /* divides n_q_heads; 0 = n_q_heads */
    uint32_t k_dim;        /* multiple of 16 in 16..256 */
    uint32_t v_dim;        /* 0 = k_dim */
    float scale;           /* softmax scale; 0 = 1/sqrt(k_dim) */
    uint32_t block_tokens; /* 8, 16, 32 or 64; 0 = 32. The channel formats need 32 or 64 */
    const char *preset;    /* names the formats; null = "int8" */
    kvl_format k_format, v_format, exact_format; /* override the preset's; 0 = the preset's */
    uint32_t sink_blocks;    /* first blocks of a sequence that stay exact; 0 = 1; KVL_NONE = none */
    uint32_t segment_tokens; /* length of the fixed ranges that attention folds; 0 = 1024; a multiple of 64 */
    const kvl_layer *layers; /* [n_layers] or null; copied */
    /* of model, tokenizer and RoPE: what is stored outside of a cache (sessions, not built yet) must have the
     * same */
    uint64_t fingerprint;
} kvl_geometry;

#define KVL_NONE 0xffffffffu

/* ==== context ============================================================ */
typedef struct kvl_context kvl_context;
typedef struct kvl_cache kvl_cache;
typedef struct kvl_sched kvl_sched;

typedef enum kvl_backend_kind {
    KVL_BACKEND_AUTO = 0,
    KVL_BACKEND_NULL,
    KVL_BACKEND_CPU,
    KVL_BACKEND_CUDA,
    KVL_BACKEND_VULKAN,
    KVL_BACKEND_FORCE_INT_ = 0x7fffffff
} kvl_backend_kind;
typedef enum kvl_simd {
    KVL_SIMD_AUTO = 0,
    KVL_SIMD_SCALAR,
    KVL_SIMD_AVX2,
    KVL_SIMD_AVX512,
    KVL_SIMD_FORCE_INT_ = 0x7fffffff
} kvl_simd;
typedef enum kvl_log_level {
    KVL_LOG_ERROR = 0,
    KVL_LOG_WARNING,
    KVL_LOG_INFO,
    KVL_LOG_FORCE_INT_ = 0x7fffffff
} kvl_log_level;

/* realloc-like: size 0 frees ptr; must return memory aligned for any type, or null. Called at create,
 * destroy, submit, fork and resize only. */
typedef void *(*kvl_alloc_fn)(void *user, void *ptr, size_t old_size, size_t new_size);
typedef void (*kvl_log_fn)(void *user, kvl_log_level level, const char *text);
/* Monotonic nanoseconds. */
typedef uint64_t (*kvl_clock_fn)(void *user);
/* Calls fn(arg, i) once for each i < n, on any threads, and returns when all are done. */
/* (On the CPU a task takes up to 96 KB of stack.) */
typedef void (*kvl_parallel_fn)(void *user, uint32_t n, void (*fn)(void *arg, uint32_t i), void *arg);

/* Of a device for Vulkan: what the shaders may use (all is optional). */
enum {
    KVL_VULKAN_FP16 = 1,      /* shaderFloat16 of VK_KHR_shader_float16_int8 */
    KVL_VULKAN_STORAGE16 = 2, /* storageBuffer16BitAccess */
    KVL_VULKAN_SUBGROUP = 4,  /* shuffles in compute shaders (no feature of a device has to be enabled) */
    KVL_VULKAN_SUBGROUP_SIZE =
        8, /* subgroupSizeControl and computeFullSubgroups of VK_EXT_subgroup_size_control */
    KVL_VULKAN_MEMORY_BUDGET = 16, /* VK_EXT_memory_budget */
    KVL_VULKAN_CPU_SHAPES = 32 /* shaders chosen for a driver that runs on the CPU (without: as for a GPU) */
};

/* Vulkan 1.1. All null: an instance and a device of kvlite's own, through the loader that is installed (libvulkan.so.1,
   vulkan-1.dll, libvulkan.1.dylib or libMoltenVK.dylib). Lent: the first four together. They are an instance for Vulkan
   1.1 or later, a device created with shaderStorageBufferArrayDynamicIndexing, and one of its queues that can compute;
   they outlive the contexts. */
typedef struct kvl_vulkan_desc {
    void *instance, *physical_device, *device, *queue; /* VkInstance, VkPhysicalDevice, VkDevice, VkQueue */
    uint32_t queue_family;                             /* of the lent queue */
    uint32_t features; /* lent: the KVL_VULKAN_* that the device was created with */
    /* vkGetInstanceProcAddr of a loader of the app's; null: the one that is installed */
    void *(*get_instance_proc_addr)(void *instance, const char *name);
    /* Around every use of the lent queue, with the desc's user; null: no other thread uses it while one is in a call of
       kvlite. (Caches of one context, on whatever threads, lock each other out by themselves.) */
    void (*lock)(void *user);
    void (*unlock)(void *user);
    uint32_t
        without; /* KVL_VULKAN_FP16, STORAGE16, SUBGROUP, CPU_SHAPES: not to be used though they are there */
    uint32_t
        device_index; /* where none is lent: 0 = the best (a GPU with memory of its own before an integrated one
                              before others; AUTO takes no CPU), else 1 + its place in the instance's list */
    const void *
        cache; /* [cache_bytes] what kvl_vulkan_cache gave an earlier run, or null. What another driver wrote, */
    size_t cache_bytes; /* or is damaged, is not used, and the report says so */
} kvl_vulkan_desc;

typedef struct kvl_context_desc {
    kvl_backend_kind backend; /* AUTO: the first that works of CUDA, Vulkan, CPU */
    kvl_simd simd;            /* AUTO: the best this CPU has; a path it lacks is UNSUPPORTED */
    uint32_t n_threads; /* built-in pool: threads in all, at most 1024; 0 or 1 = none. With parallel_for: how
                           many it has, 0 = 2 */
    kvl_parallel_fn parallel_for;
    kvl_alloc_fn alloc;
    kvl_log_fn log;
    kvl_clock_fn clock;
    /* CUDA: a CUcontext and a CUstream of it that are lent (they must outlive the caches; a cudaStream_t is a
       CUstream). Null: the device's primary context, and a stream a cache that is ordered with the legacy default
       stream. Caches that share a lent stream have one owner thread. */
    void *cuda_context, *cuda_stream;
    uint32_t cuda_device;   /* which one, where no context is lent */
    kvl_vulkan_desc vulkan; /* Vulkan: what is lent, or which device to take */
    void *user;             /* handed to every callback */
    char *error;            /* where a failed create writes why, at most error_size bytes; may be null */
    size_t error_size;
} kvl_context_desc;

/* A context owns backend, threads and callbacks; several caches may share one. Errors: NO_BACKEND,
   UNSUPPORTED (simd), OUT_OF_HOST_MEMORY. Destroy it after its caches. One thread at a time. */
KVL_API kvl_result kvl_context_create(const kvl_context_desc *desc, kvl_context **out);
KVL_API void kvl_context_destroy(kvl_context *ctx);
/* "cpu (avx512)", and a line a backend: why it was chosen or skipped. Any thread; "" for null. */
KVL_API const char *kvl_context_backend(const kvl_context *ctx);
KVL_API const char *kvl_context_report(const kvl_context *ctx);
/* What the driver said when it last failed: its number (a CUresult, a VkResult), 0 = it never did, and *text (may be null)
   its name and meaning, which later failures overwrite. Not while another thread is inside a call. */
KVL_API int kvl_native_error(const kvl_context *ctx, const char **text);
/* After DEVICE_LOST, with a lent CUcontext that is dead: another one of the same device, and a CUstream of it or null,
   for kvl_cache_recover; the dead one is the app's to destroy, with all that was in it.
   INVALID_ARG (not CUDA, nothing was lent, another device), BUSY (the device is not lost), DEVICE_LOST (this one
   is dead, too). No other thread may be inside a call. */
KVL_API kvl_result kvl_context_lend(kvl_context *ctx, void *cuda_context, void *cuda_stream);
/* The same with Vulkan: instance, physical_device, device, queue, queue_family and features of desc take the place of
   those that were lent. The lost device must still be there: what kvlite has in it is destroyed by this call; the device
   itself is the app's to destroy then. INVALID_ARG (not Vulkan, nothing was lent, one of the four is null, another GPU),
   BUSY (the device is not lost), DEVICE_LOST (this one does not work, either). No other thread may be inside a call. */
KVL_API kvl_result kvl_context_lend_vulkan(kvl_context *ctx, const kvl_vulkan_desc *desc);
/* Vulkan: compiled pipelines, and which shaders were found right on this driver, for kvl_vulkan_desc.cache of a later run:
   what it creates starts faster. to null: *bytes is how many they are; else *bytes is the room at `to`, then how many were
   written. LIMIT (more than the room: *bytes is how many), UNSUPPORTED (not Vulkan), INVALID_ARG, DEVICE_LOST. Any thread. */
KVL_API kvl_result kvl_vulkan_cache(kvl_context *ctx, void *to, size_t *bytes);

typedef struct kvl_memory_info {
    uint64_t total;  /* of the device memory that KV blocks stand in */
    uint64_t budget; /* of that, what the driver says this process may use now; 80% where it does not say */
    uint64_t used;   /* by this process; where the driver does not say, by this context */
    uint64_t available; /* budget - used, 0 where more is used */
    bool live;          /* the driver says (VK_EXT_memory_budget): caches follow it */
    bool unified;       /* the host's memory, too: an integrated GPU */
} kvl_memory_info;
/* The device's memory now. INVALID_ARG, UNSUPPORTED (CPU, null, CUDA: only their apps know), DEVICE_LOST. Any thread. */
KVL_API kvl_result kvl_context_memory(const kvl_context *ctx, kvl_memory_info *out);

/* ==== cache ============================================================ */
typedef struct kvl_cache_desc {
    kvl_context *context; /* null = a private one made from context_desc; under AUTO of the first backend that
                             takes this geometry too (kvl_context_report says why others do not) */
    kvl_context_desc context_desc;
    kvl_geometry geometry;
    /* required: the cap on KV blocks and attention scratch. On Vulkan no more than 70% of what the device has left is
       taken (kvl_stats.device_budget), and that follows what other programs take: between steps the cache gives
       memory back and takes it again */
    uint64_t device_bytes;
    uint64_t max_device_bytes; /* what kvl_cache_resize may reach; 0 = device_bytes */
    uint64_t host_bytes;       /* cap on metadata; 0 = none */
    uint32_t max_sequences;    /* open at once; 0 = 256 */
    uint32_t max_seq_tokens;   /* longest sequence; 0 = 131072, lowered to what max_device_bytes can hold */
    uint32_t max_step_tokens;  /* rows in one step; 0 = 512 */
    uint32_t lookup_hash_bits; /* testing: keep only so many bits of the prefix lookup hash, to force
                                  collisions; 0 = all */
    uint64_t slab_granularity; /* slabs of its size or more are multiples of it; 0 = the backend's (replay) */
    uint64_t slab_bytes;       /* of a slab; 0 = chosen (replay) */
    bool no_prefix_cache;      /* keep nothing of closed sequences */
    bool
        device_tensors; /* CUDA, Vulkan: every tensor will be in device memory; no staging is taken for others */
    bool poison;        /* debugging: fill freed and fresh blocks with NaN */
    char *error;        /* where a failed create writes why, at most error_size bytes; may be null */
    size_t error_size;
} kvl_cache_desc;

/* Errors: INVALID_ARG or UNSUPPORTED (desc.error names the field), NO_BACKEND, OUT_OF_HOST_MEMORY,
   OUT_OF_DEVICE_MEMORY, NO_BLOCKS (the budget does not hold one block and the scratch: the text says how much
   it takes). */
KVL_API kvl_result kvl_cache_create(const kvl_cache_desc *desc, kvl_cache **out);
/* Null is fine. Destroy its scheduler first; no other thread may be inside a call. */
KVL_API void kvl_cache_destroy(kvl_cache *cache);
/* What zero became. */
KVL_API kvl_result kvl_cache_defaults(const kvl_cache_desc *desc, kvl_cache_desc *out);
/* The context that it uses, its own or the one given. Any thread. */
KVL_API kvl_context *kvl_cache_context(kvl_cache *cache);

/* Why the last failed call on this cache failed: names the field, handle, bytes or tokens. Never null. Owner
   thread. A failed create writes its text to desc.error. */
KVL_API const char *kvl_last_error(const kvl_cache *cache);

/* Changes the budget between steps (kvl_cache_desc.device_bytes): compacts, evicts, preempts. 0 suspends. *held_bytes
   (may be null): what could not be given up. Errors: BUSY, INVALID_ARG (above max_device_bytes), NO_BLOCKS (shrunk to what pinned
   and directly opened sequences hold), OUT_OF_DEVICE_MEMORY (grown as far as possible). Owner thread. */
KVL_API kvl_result kvl_cache_resize(kvl_cache *cache, uint64_t device_bytes, uint64_t *held_bytes);
/* After DEVICE_LOST: starts the device again and forgets all KV: requests of the scheduler wait with their tokens
   and are computed again, the caller's sequences stay open with length 0, pins are gone. Where no context was lent
   the device's primary context is reset, and with it all that this process has on the device (Vulkan: kvlite's own
   device is created again): an app with device memory of its own lends its context, and another with kvl_context_lend
   (kvl_context_lend_vulkan) if that is dead. Each cache of the
   context recovers for itself, not while another thread is inside a call on one of them. A cache whose device is
   well forgets its KV all the same. Errors: BUSY (abort the step first), DEVICE_LOST (it did not start: try
   later), OUT_OF_DEVICE_MEMORY (fewer slabs than before). Owner thread. */
KVL_API kvl_result kvl_cache_recover(kvl_cache *cache);

typedef struct kvl_fit {
    uint64_t need_bytes;  /* of slabs, for n_sequences × n_tokens */
    uint64_t free_bytes;  /* free or evictable now */
    uint64_t short_bytes; /* how much is missing now */
    uint64_t max_tokens;  /* longest single sequence that would fit now */
    bool fits_empty;      /* would fit in max_device_bytes with nothing else there */
} kvl_fit;
/* Would n_sequences more sequences of n_tokens each fit now? OK, NO_BLOCKS (later perhaps), NEVER_FITS,
   INVALID_ARG. fit may be null. Owner thread. */
KVL_API kvl_result kvl_can_fit(kvl_cache *cache, uint32_t n_sequences, uint32_t n_tokens, kvl_fit *fit);

/* Checks every invariant: refcounts, free lists, tree, ledger, tables, scheduler. OK or CORRUPT with the text
 * in kvl_last_error. O(everything). */
KVL_API kvl_result kvl_validate(kvl_cache *cache);

/* ==== sequences ============================================================ */
typedef struct kvl_seq {
    uint32_t id;
} kvl_seq; /* 0 is never valid */

/* why a match stopped where it did */
typedef enum kvl_match_reason {
    KVL_MATCH_ALL = 0,   /* all but what must be recomputed to get logits */
    KVL_MATCH_TOKEN,     /* the next cached tokens differ, first at first_differing */
    KVL_MATCH_END,       /* nothing cached goes on from here */
    KVL_MATCH_NAMESPACE, /* nothing cached under this namespace and salt, though under another */
    KVL_MATCH_EVICTED,   /* the tokens are known, their KV was evicted */
    KVL_MATCH_FORMAT,    /* the next rows are packed: shared rows of a packed block are recomputed */
    KVL_MATCH_EMPTY,     /* nothing cached at all, or the cache was told not to look */
    KVL_MATCH_FORCE_INT_ = 0x7fffffff
} kvl_match_reason;
KVL_API const char *kvl_match_reason_text(kvl_match_reason r);

typedef struct kvl_reuse {
    uint32_t matched;         /* tokens whose KV was found in memory */
    uint32_t restored;        /* of them, brought back from a lower tier (0 until tiers exist) */
    uint32_t recomputed;      /* n_tokens - matched */
    uint32_t first_differing; /* with KVL_MATCH_TOKEN: position of the first token that differs */
    kvl_match_reason reason;
} kvl_reuse;

typedef struct kvl_seq_desc {
    const int32_t *tokens; /* [n_tokens] to match against what is cached; may be null with n_tokens 0 */
    uint32_t n_tokens;
    uint64_t name_space; /* one app or user never sees another's reuse */
    uint64_t salt;       /* adapter, or anything else that changes KV */
    uint32_t priority;   /* 0..7: what it leaves behind is evicted later than lower ones */
    bool no_match;       /* reuse nothing */
    bool no_keep;        /* leave nothing behind */
} kvl_seq_desc;

/* Opens a sequence on the longest cached prefix; its length is reuse->matched, at most n_tokens - 1. Errors:
   INVALID_ARG, LIMIT (max_sequences), BUSY. Owner thread, like all of this section. */
KVL_API kvl_result kvl_seq_open(kvl_cache *cache, const kvl_seq_desc *desc, kvl_seq *out, kvl_reuse *reuse);
/* Takes blocks for n_tokens beyond the length now, so that steps up to there cannot fail with NO_BLOCKS,
   until it is forked or trimmed. Errors: NO_BLOCKS (nothing changed), LIMIT (max_seq_tokens), BUSY,
   INVALID_HANDLE, INVALID_ARG (a scheduler's sequence). */
KVL_API kvl_result kvl_seq_extend(kvl_cache *cache, kvl_seq seq, uint32_t n_tokens);
/* A copy that shares all blocks; what is written later is copied first. *length (may be null): its length.
 * LIMIT, BUSY, INVALID_HANDLE. */
KVL_API kvl_result kvl_seq_fork(kvl_cache *cache, kvl_seq seq, kvl_seq *out, uint32_t *length);
/* Shortens to n_tokens or, where that is inside a packed block or behind a window, less: *length (may be
   null) is what was reached. Errors: BUSY, INVALID_HANDLE, INVALID_ARG (a scheduler's sequence). */
KVL_API kvl_result kvl_seq_trim(kvl_cache *cache, kvl_seq seq, uint32_t n_tokens, uint32_t *length);
/* Pins (or unpins) the full blocks of a sequence in the prefix tree: they outlive it and are not evicted.
   Pins count. Errors: BUSY, INVALID_HANDLE, INVALID_ARG (it keeps nothing in the tree). */
KVL_API kvl_result kvl_seq_pin(kvl_cache *cache, kvl_seq seq, bool pin);
/* Takes one pin off the cached blocks of desc's tokens, namespace and salt. *n_tokens (may be null): how many
 * tokens of it were pinned. */
KVL_API kvl_result kvl_prefix_unpin(kvl_cache *cache, const kvl_seq_desc *desc, uint32_t *n_tokens);
/* Closes: full blocks and the open one stay in the prefix tree until evicted. Errors: BUSY, INVALID_HANDLE,
   INVALID_ARG (a scheduler's sequence: cancel the request). */
KVL_API kvl_result kvl_seq_close(kvl_cache *cache, kvl_seq seq);
/* Committed tokens. INVALID_HANDLE, INVALID_ARG. Owner thread. */
KVL_API kvl_result kvl_seq_length(const kvl_cache *cache, kvl_seq seq, uint32_t *length);

/* ==== steps ============================================================ */
/* rows of one sequence in a step */
typedef struct kvl_span {
    kvl_seq seq;
    const int32_t *tokens; /* [n_tokens] */
    uint32_t n_tokens;
    uint32_t n_logits; /* how many of the last rows want logits */
    void *user;
} kvl_span;

/* A block table entry. Id or-ed with KVL_ENTRY_EXACT where the block is of the exact class; KVL_NONE where
 * there is no block (behind a window). */
#define KVL_ENTRY_EXACT 0x80000000u
#define KVL_ENTRY_SCRATCH 0x40000000u /* in `own` only: index of a slot of the step's exact scratch */
#define KVL_ENTRY_ID 0x3fffffffu

/* one group's blocks of one span */
typedef struct kvl_span_blocks {
    const uint32_t *table; /* [n_blocks] what later blocks see; entry j covers tokens [j*T, j*T+T) */
    uint32_t n_blocks;
    uint32_t first_own; /* index of the first block that this step writes */
    uint32_t n_own;
    const uint32_t
        *own; /* [n_own] where the exact rows of block first_own+i stand while its own queries run */
} kvl_span_blocks;

typedef struct kvl_copy {
    uint32_t group, src, dst;
} kvl_copy; /* whole-block copies (entries) to do before the step */

typedef struct kvl_step_span {
    kvl_seq seq;
    uint32_t first_row, n_rows;
    uint32_t position; /* of its first row = committed length before this step */
    uint32_t n_logits;
    uint32_t request; /* kvl_req id, 0 for a caller's own sequence */
    void *user;       /* of the request or of the kvl_span */
} kvl_step_span;

typedef struct kvl_step {
    uint64_t id;
    uint32_t n_tokens;         /* rows */
    const int32_t *tokens;     /* [n_tokens] */
    const uint32_t *positions; /* [n_tokens] */
    const uint32_t *row_span;  /* [n_tokens] index into spans */
    uint32_t n_spans;
    const kvl_step_span *spans;
    uint32_t n_logits;
    const uint32_t
        *logit_rows; /* [n_logits] rows whose logits are wanted, in the order commit takes tokens */
    const uint32_t *logit_requests; /* [n_logits] kvl_req id (0: a caller's own); a row may be wanted by
                                       several after a fork */
    void *const *logit_users;       /* [n_logits] user pointer of that request */
    uint32_t n_groups;
    const kvl_span_blocks *blocks; /* [n_groups][n_spans] */
    const uint64_t
        *block_address; /* by block id: address in device memory; Vulkan: 1 + slab << 32 | bytes into it */
    const uint32_t *layer_group; /* [n_layers] */
    uint32_t n_copies; /* copy-on-write and partial reuse; already done by the library's own backends */
    const kvl_copy *copies;
    /* slot s of the exact scratch stands at scratch_address + s * scratch_slot_bytes: one layer's tiles, laid
       out as in an exact block from that layer's layer_offset on */
    uint64_t scratch_address;
    size_t scratch_slot_bytes;
    /* Equal keys: a CUDA graph captured around the layers of one step may be replayed for another
       (kvl_step_replayed). Tables are padded to a few shapes; a resize changes the key. */
    uint64_t graph_key;
    uint32_t
        n_padded; /* n_tokens rounded up to a shape, at most max_step_tokens: equal where keys are; rows from
                          n_tokens on are neither read nor written */
} kvl_step;

/* Begins a step over spans of distinct sequences. *out stays valid until end or abort. Errors, all with state
   unchanged: BUSY, INVALID_HANDLE, INVALID_ARG (empty span, a sequence twice), LIMIT (max_step_tokens,
   max_seq_tokens), NO_BLOCKS. Owner thread. */
KVL_API kvl_result kvl_step_begin(kvl_cache *cache, const kvl_span *spans, uint32_t n_spans,
                                  const kvl_step **out);
/* The rows are in: lengths grow, full blocks enter the prefix tree. MISMATCH: not the open step, or
 * kvl_attend has not run for every layer. */
KVL_API kvl_result kvl_step_end(kvl_cache *cache, const kvl_step *step);
/* As if the step had never begun (what it evicted stays evicted). */
KVL_API kvl_result kvl_step_abort(kvl_cache *cache, const kvl_step *step);

typedef enum kvl_dtype {
    KVL_DTYPE_F32 = 0,
    KVL_DTYPE_F16,
    KVL_DTYPE_BF16,
    KVL_DTYPE_FORCE_INT_ = 0x7fffffff
} kvl_dtype;

typedef enum kvl_memory {
    KVL_MEMORY_HOST = 0,
    KVL_MEMORY_DEVICE, /* on the CPU: INVALID_ARG */
    KVL_MEMORY_FORCE_INT_ = 0x7fffffff
} kvl_memory;

typedef struct kvl_tensor {
    void *data; /* [rows][heads][dim], in device memory a CUdeviceptr, or a VkBuffer made for storage
                   whose size is a multiple of 4 bytes */
    kvl_dtype dtype;
    size_t row_stride;  /* in elements; 0 = heads * dim */
    size_t head_stride; /* in elements; 0 = dim */
    kvl_memory memory;  /* all four of a call alike */
    uint64_t offset;    /* into a VkBuffer, in bytes, a multiple of an element; elsewhere ignored. Without
                           KVL_VULKAN_STORAGE16, offset and strides of a 16-bit out are multiples of 2 elements */
} kvl_tensor;

/* Appends this layer's k and v (after RoPE) and attends. q [n_tokens][n_q_heads][k_dim], k
   [n_tokens][n_kv_heads][k_dim], v [n_tokens][n_kv_heads][v_dim], out [n_tokens][n_q_heads][v_dim]. Query
   head h reads KV head h / (n_q_heads / n_kv_heads). Each layer once a step, in any order. A row with NaN or
   Inf in k or v taints its own sequence alone (kvl_seq_tainted), which is never reused; on a GPU rows before it
   in the same step may come out NaN, too. Errors: INVALID_ARG, MISMATCH (not the open step, a layer twice),
   DEVICE_LOST, OUT_OF_DEVICE_MEMORY; after an error of the device the step must be aborted. Owner thread. Blocks
   until done with tensors in host memory; with tensors in device memory it enqueues and returns, and may be
   captured into a CUDA graph. (Vulkan: it submits to the queue, after what was submitted there before, and with barriers
   before and after: the app needs none.) Source: online softmax, Milakov & Gimelshein 2018; split-KV merge, Dao et al. 2023
   (Flash-Decoding); paging, Kwon et al. 2023. */
KVL_API kvl_result kvl_attend(kvl_cache *cache, const kvl_step *step, uint32_t layer, const kvl_tensor *q,
                              const kvl_tensor *k, const kvl_tensor *v, const kvl_tensor *out);
/* In place of kvl_attend, for callers with their own kernels: they have written, sealed and attended this
   layer by the step's tables. tainted [n_spans], may be null: not 0 where a row of k or v was not finite.
   Errors as kvl_attend. Owner thread. */
KVL_API kvl_result kvl_step_layer_done(kvl_cache *cache, const kvl_step *step, uint32_t layer,
                                       const uint8_t *tainted);
/* All layers of this step were run by replaying a CUDA graph, captured in a step with the same graph_key. MISMATCH
   (not the open step), UNSUPPORTED (not CUDA). Owner thread. */
KVL_API kvl_result kvl_step_replayed(kvl_cache *cache, const kvl_step *step);
/* Vulkan: from now on kvl_attend of this step, with tensors in device memory, records into this VkCommandBuffer, which is in
   the recording state, outside of a render pass, and of the queue's family, and submits nothing; null: it submits again. The
   app submits it to the queue of the context, once, and it has completed before kvl_step_end, kvl_sched_commit or an abort.
   INVALID_ARG, MISMATCH (not the open step), UNSUPPORTED (not Vulkan), DEVICE_LOST. Owner thread. */
KVL_API kvl_result kvl_step_record(kvl_cache *cache, const kvl_step *step, void *command_buffer);
/* Has the sequence committed a row that was not finite? false for a handle that is not open. Owner thread. */
KVL_API bool kvl_seq_tainted(const kvl_cache *cache, kvl_seq seq);

/* Where layer `layer`'s tiles stand inside a block of its group, for callers with their own kernels. */
typedef struct kvl_block_layout {
    uint32_t group;
    kvl_format k_format, v_format;
    size_t block_bytes;  /* whole block, all layers of the group */
    size_t layer_offset; /* of this layer's first tile */
    size_t head_stride;  /* between KV heads: K tile, then V tile */
    size_t v_offset;     /* of the V tile after its K tile */
    uint32_t max_blocks; /* ids are below it */
} kvl_block_layout;
KVL_API kvl_result kvl_cache_layout(const kvl_cache *cache, uint32_t layer, bool exact,
                                    kvl_block_layout *out);

/* ==== scheduler ============================================================ */
typedef struct kvl_req {
    uint32_t id;
} kvl_req; /* 0 is never valid */

typedef enum kvl_policy {
    KVL_POLICY_FCFS = 0,
    KVL_POLICY_PRIORITY,
    KVL_POLICY_LONGEST_PREFIX,
    KVL_POLICY_FORCE_INT_ = 0x7fffffff
} kvl_policy;
typedef enum kvl_class { KVL_INTERACTIVE = 0, KVL_BACKGROUND, KVL_CLASS_FORCE_INT_ = 0x7fffffff } kvl_class;
/* why a request ended */
typedef enum kvl_finish {
    KVL_FINISH_NONE = 0, /* it has not */
    KVL_FINISH_STOP,     /* a stop token */
    KVL_FINISH_LENGTH,   /* max_new_tokens or max_seq_tokens */
    KVL_FINISH_APP,      /* the app said so at commit */
    KVL_FINISH_CANCELLED,
    KVL_FINISH_REFUSED, /* refuse_over_gap: it would have broken max_gap_ms for those already running */
    KVL_FINISH_FORCE_INT_ = 0x7fffffff
} kvl_finish;
typedef enum kvl_req_state {
    KVL_REQ_WAITING = 0,
    KVL_REQ_PREFILL,
    KVL_REQ_DECODE,
    KVL_REQ_FINISHED,
    KVL_REQ_FORCE_INT_ = 0x7fffffff
} kvl_req_state;

/* What a step costs, in milliseconds: step + prefill_token·rows of prefill + decode·rows of decode +
 * (kv_megatoken·tokens that decodes attend to + prefill_kv_megatoken·tokens that rows of prefill attend to) / 1e6.
 * (Decodes read their KV once a row; a chunk reads it once for many rows, so that a token costs it far less.) */
typedef struct kvl_cost {
    double step_ms, prefill_token_ms, decode_ms, kv_megatoken_ms, prefill_kv_megatoken_ms;
} kvl_cost;

/* Takes the next bytes of a recording, as fwrite does: fewer than size = it failed. */
typedef size_t (*kvl_write_fn)(void *user, const void *data, size_t size);

typedef struct kvl_sched_desc {
    kvl_policy policy;
    uint32_t max_running; /* requests with KV at once; 0 or more: the cache's max_sequences or step_tokens,
                             the lesser */
    uint32_t max_waiting; /* submitted and not finished, running ones included; 0 = 4096 */
    uint64_t token_pool_bytes; /* cap on the tokens of all requests; 0 = 256 MiB */
    uint32_t step_tokens;      /* token budget of a step; 0 = the cache's max_step_tokens */
    uint32_t min_chunk;        /* smallest chunk of prefill while others stream; 0 = block_tokens */
    double max_gap_ms; /* longest wait between two tokens of an interactive stream; 0 = no bound: chunks use
                          the whole budget */
    bool refuse_over_gap; /* refuse interactive work that decodes alone would breach; else it queues */
    kvl_cost cost;        /* to start from; all 0 = learn from the steps */
    bool fixed_cost;      /* do not learn: simulations */
    kvl_write_fn record;  /* gets the event trace (below); null = none */
    void *record_user;
} kvl_sched_desc;

/* One scheduler per cache. Errors: INVALID_ARG, OUT_OF_HOST_MEMORY, BUSY (the cache has one). */
KVL_API kvl_result kvl_sched_create(kvl_cache *cache, const kvl_sched_desc *desc, kvl_sched **out);
KVL_API void kvl_sched_destroy(
    kvl_sched *sched); /* aborts an open step, closes all sequences; no other thread may be inside a call */
KVL_API kvl_result kvl_sched_defaults(kvl_cache *cache, const kvl_sched_desc *desc, kvl_sched_desc *out);
KVL_API const char *kvl_sched_last_error(const kvl_sched *sched); /* of the owner thread's calls */

/* clang-format off */
/* THE EVENT TRACE. With kvl_sched_desc.record the scheduler writes down all that its plans depend on, and the
   plans: whoever does the same calls with the same clock readings on the null backend gets the same bytes
   (tools/trace does). The callback runs on the owner's thread, inside of plan, commit, abort, fork, create,
   destroy and calls on the cache, never under a lock; it may not call kvlite. A write that fails is logged and
   sets kvl_stats.record_failed; the recording stops, and nothing else changes. It takes 64 KB of memory, and
   nothing where it is off.
     Everything stands in the order in which the owner's thread acts: a submit, cancel or close of another thread
   where plan takes it in. Calls on the cache beside the scheduler (kvl_seq_*, kvl_step_*, kvl_prefix_unpin,
   resize) and which spans were tainted are recorded too, so that a trace of any backend replays on the null one.
   What was done with the cache before its scheduler was created is not: then `fresh` is 0 and there is no
   replay. Learnt costs are sums of doubles: a build that rounds otherwise (fused multiply-add) may plan
   otherwise. With fixed costs all builds plan alike.
     Bytes: "KVLEVENT", u32 1 (little-endian, as all here), then chunks: u32 size, u32 checksum, so many bytes.
   Checksum: h = 0; for each 8 bytes, zeros after the last: h = (h ^ them) * 0xD6E8FEB86659FD93, h ^= h >> 32;
   its low half. The bytes of all chunks together are the description, then events. A number is a LEB128 varint
   (7 bits a byte, lowest first; top bit: more follow). ~: zigzag (2n, or -2n - 1 below 0). tokens: of each the
   ~difference to the one before, of the first to 0. clock: the ~difference in ns to the last one recorded, of
   the first to 0. double and digest are 8 bytes.
     Description: u32 KVL_VERSION; flags (1 fresh, 2 slab_granularity is at its end, 4 slab_bytes is); the geometry's n_layers, n_q_heads, n_kv_heads, k_dim, v_dim,
   block_tokens, k_format, v_format, exact_format, sink_blocks, segment_tokens, fingerprint; each layer's window,
   sink_tokens, k_format, v_format; the cache's device_bytes and max_device_bytes, both less what attention takes
   of them on the backend, max_sequences, max_seq_tokens, max_step_tokens, lookup_hash_bits, no_prefix_cache; the
   scheduler's policy, max_running, max_waiting, token_pool_bytes, step_tokens, min_chunk, refuse_over_gap,
   fixed_cost, double max_gap_ms and all of cost; slab_granularity where it is more than 1; slab_bytes.
     Requests are numbered from 0 as they arrive, forks among them. A sequence is 2 * its slot or, the
   scheduler's, 2 * its request + 1. What stands after "gives" came out: a replay compares it. */
typedef enum kvl_event {
    KVL_EVENT_END = 0,     /* the scheduler is destroyed; gives digest */
    KVL_EVENT_SUBMIT,      /* clock, flags (1 background, 2 no_match, 4 no_keep, 8 * priority), name_space, salt,
                              n_stop_tokens, tokens, n_tokens, tokens, max_new_tokens */
    KVL_EVENT_FORK,        /* clock, request */
    KVL_EVENT_CANCEL,      /* request */
    KVL_EVENT_CLOSE,
    KVL_EVENT_PLAN,        /* clock; gives result, how many were preempted and refused since the last plan and, if
                              OK: n_spans, n_logits, n_copies; of each span 2 * ~(request - the one before, first
                              0) + (does it decode?), if not also position, rows, 2 * logits + (just admitted?);
                              digest of rows, block tables, places to write, logits, copies, all up to here */
    KVL_EVENT_COMMIT,      /* clock, flags (1 some finish, 2 some are tainted), n, tokens; with 1: of each
                              no_token + 2 * finish; with 2: how many spans are tainted, which */
    KVL_EVENT_ABORT,
    KVL_EVENT_RESIZE,      /* bytes (as in the description; no more than the device gave); gives slabs */
    KVL_EVENT_SEQ_OPEN,    /* flags (2, 4, 8 of SUBMIT), name_space, salt, n_tokens, tokens; gives slot, length */
    KVL_EVENT_SEQ_EXTEND,  /* sequence, n_tokens; gives 1 where there were no blocks, else 0 */
    KVL_EVENT_SEQ_FORK,    /* sequence; gives slot, length */
    KVL_EVENT_SEQ_TRIM,    /* sequence, n_tokens; gives length */
    KVL_EVENT_SEQ_PIN,     /* sequence, pin */
    KVL_EVENT_SEQ_CLOSE,   /* sequence */
    KVL_EVENT_UNPIN,       /* as SEQ_OPEN; gives n_tokens */
    KVL_EVENT_STEP_BEGIN,  /* n_spans; of each sequence, n_tokens, n_logits, tokens; gives ~result */
    KVL_EVENT_STEP_END,    /* flags (2 some are tainted); with 2: as COMMIT */
    KVL_EVENT_STEP_ABORT,
    KVL_EVENT_RECOVER,
    KVL_EVENT_COUNT,
    KVL_EVENT_FORCE_INT_ = 0x7fffffff
} kvl_event;
/* clang-format on */

typedef struct kvl_request {
    const int32_t *tokens;   /* [n_tokens], copied */
    uint32_t n_tokens;       /* at least 1 */
    uint32_t max_new_tokens; /* 0 = 256, or less where max_seq_tokens ends before; asked for and too long for
                                it: NEVER_FITS */
    const int32_t *stop_tokens; /* [n_stop_tokens], copied; at most 8 */
    uint32_t n_stop_tokens;
    kvl_class klass;
    uint32_t priority; /* 0..7, higher first under KVL_POLICY_PRIORITY; also how long its KV is kept */
    uint64_t name_space, salt;
    bool no_match, no_keep;
    void *user;
} kvl_request;

/* with NEVER_FITS: the numbers */
typedef struct kvl_refusal {
    uint32_t n_tokens, max_tokens; /* asked for, longest possible */
    uint64_t need_bytes, budget_bytes;
    char text[160]; /* with any refusal: why */
} kvl_refusal;

/* Queues a request. Errors: INVALID_ARG, QUEUE_FULL, CLOSED, NEVER_FITS (*refusal, may be null, has the
 * numbers), OUT_OF_HOST_MEMORY. Any thread. */
KVL_API kvl_result kvl_sched_submit(kvl_sched *sched, const kvl_request *request, kvl_req *out);
KVL_API kvl_result kvl_sched_submit_ex(kvl_sched *sched, const kvl_request *request, kvl_req *out,
                                       kvl_refusal *refusal);
/* Ends a request at the next plan. A finished one: OK, nothing happens. INVALID_HANDLE. Any thread. */
KVL_API kvl_result kvl_sched_cancel(kvl_sched *sched, kvl_req req);
/* Another answer to the same tokens: shares the KV of `req` and joins at its next logits row (which then
   stands once more in logit_rows). If `req` ends or is preempted first, the fork goes on as a request of its
   own. user: the fork's. Errors: INVALID_HANDLE, INVALID_ARG (finished), QUEUE_FULL, BUSY. Owner thread. */
KVL_API kvl_result kvl_sched_fork(kvl_sched *sched, kvl_req req, void *user, kvl_req *out);
/* No more submits; plan returns DRAINED when all have finished. Any thread. */
KVL_API void kvl_sched_close(kvl_sched *sched);
/* Waits until something was submitted, cancelled or closed since the last plan, or the time is over. Returns
 * false at time-out. Any thread. */
KVL_API bool kvl_sched_wait(kvl_sched *sched, uint32_t timeout_ms);

/* The next step. OK: *out until commit or abort. IDLE: nothing can run now. DRAINED: closed and done. BUSY: a
 * step is open. Owner thread. */
KVL_API kvl_result kvl_sched_plan(kvl_sched *sched, const kvl_step **out);

/* what became of one logits row */
typedef struct kvl_output {
    int32_t token;
    bool no_token; /* nothing was sampled (with finish): token is ignored */
    bool finish;   /* end the request after this token */
} kvl_output;
/* One sampled token for each of step->logit_rows, in that order (null if there are none). MISMATCH: not the
   open step, or layers are missing. Owner thread. */
KVL_API kvl_result kvl_sched_commit(kvl_sched *sched, const kvl_step *step, const int32_t *tokens);
KVL_API kvl_result kvl_sched_commit_ex(kvl_sched *sched, const kvl_step *step, const kvl_output *outputs);
/* Undoes plan: lengths, pages and request states are as before; what it evicted stays evicted, what it
 * preempted waits. Owner thread. */
KVL_API kvl_result kvl_sched_abort(kvl_sched *sched, const kvl_step *step);

typedef struct kvl_req_info {
    kvl_req_state state;
    kvl_finish finish;
    uint32_t n_prompt, n_generated;
    uint32_t n_computed; /* tokens with KV now */
    uint32_t preemptions;
    kvl_reuse reuse; /* of its latest admission */
    uint64_t submit_ns, first_token_ns, last_token_ns, finish_ns;
    kvl_seq seq; /* while running */
    void *user;
} kvl_req_info;
/* A finished request can be asked about until a submit needs its slot or its tokens' room. INVALID_HANDLE,
   INVALID_ARG. Owner thread. */
KVL_API kvl_result kvl_sched_info(const kvl_sched *sched, kvl_req req, kvl_req_info *out);
/* Copies up to capacity generated tokens (a stop token too; for a fork also those its parent had); *n_tokens
   (may be null) = how many there are. INVALID_HANDLE, INVALID_ARG. Owner thread. */
KVL_API kvl_result kvl_sched_tokens(const kvl_sched *sched, kvl_req req, int32_t *tokens, uint32_t capacity,
                                    uint32_t *n_tokens);

/* ==== stats ============================================================ */
typedef struct kvl_percentiles {
    double p50, p95, p99, max;
    uint64_t count;
} kvl_percentiles;

typedef struct kvl_stats {
    /* blocks by class and state: [0] packed, [1] exact; where a group has one class its blocks count as exact
     */
    uint32_t blocks_used[2];   /* in a sequence's table */
    uint32_t blocks_shared[2]; /* of them, in more than one */
    uint32_t blocks_cached[2]; /* only in the prefix tree, evictable */
    uint32_t blocks_pinned[2]; /* only in the prefix tree, pinned */
    uint32_t blocks_free[2];   /* free slots of slabs of that class */
    uint32_t slabs, slabs_free;
    /* the ledger, bytes by purpose */
    /* device_bytes, as last resized; what is in force: less where the device has not that much left, more where
       more is held */
    uint64_t device_asked, device_budget;
    uint64_t device_peak;
    uint64_t bytes_slabs, bytes_scratch, bytes_workspace; /* device */
    uint64_t bytes_used, bytes_cached;                    /* of blocks, inside the slabs */
    uint64_t bytes_metadata, bytes_tokens;                /* host */
    uint64_t slab_bytes;
    /* prefix cache, since create */
    uint64_t opened, open_tokens, hit_tokens, evicted_blocks, duplicate_blocks, tainted_sequences;
    uint32_t nodes, sequences;
    /* scheduler, since create; 0 without one */
    uint32_t waiting, running;
    uint64_t steps, prefill_tokens, decode_tokens, submitted, finished, cancelled, refused, preemptions,
        aborts, compactions;
    kvl_percentiles gap_ms;  /* between two tokens of an interactive stream */
    kvl_percentiles ttft_ms; /* submit to first token */
    kvl_percentiles step_ms; /* plan to commit */
    kvl_cost cost;           /* as learnt */
    uint64_t record_bytes;   /* of the event trace, written so far */
    bool record_failed;      /* a write failed and the trace ends there */
} kvl_stats;
/* A snapshot as of the last plan, commit, or other call of the owner thread. Any thread. */
KVL_API kvl_result kvl_get_stats(kvl_cache *cache, kvl_stats *out);

#ifdef __cplusplus
}
#endif
#endif /* KVLITE_H */

/* ==== Stop here if you only want the API. The implementation follows. ==== */
#ifdef KVL_IMPLEMENTATION
#ifndef KVLITE_IMPLEMENTED
#define KVLITE_IMPLEMENTED
/* ==== >>config: what the implementation is compiled with ==== */
#include <math.h>
#include <string.h>
#include <stdlib.h>
#include <stdio.h> /* snprintf alone */
#include <stdarg.h>

#if (defined(__x86_64__) || defined(__i386__) || defined(_M_X64)) && !defined(KVL_NO_SIMD)
#define KVLI_X86 1
#include <immintrin.h>
#if defined(__GNUC__) || defined(__clang__)
#include <cpuid.h>
#endif
#else
#define KVLI_X86 0
#endif

#if defined(__GNUC__) || defined(__clang__)
#define KVLI_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define KVLI_TARGET_AVX512 \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512cd,avx2,fma,f16c")))
#define KVLI_INLINE static inline __attribute__((always_inline))
#define KVLI_NOINLINE static __attribute__((noinline))
#define KVLI_ALIGN(n) __attribute__((aligned(n)))
#else
#define KVLI_TARGET_AVX2
#define KVLI_TARGET_AVX512
#define KVLI_INLINE static __forceinline
#define KVLI_NOINLINE static __declspec(noinline)
#define KVLI_ALIGN(n) __declspec(align(n))
#endif

static inline uint32_t kvli_min_u32(uint32_t a, uint32_t b) { return a < b ? a : b; }
static inline uint32_t kvli_max_u32(uint32_t a, uint32_t b) { return a > b ? a : b; }
static inline uint32_t kvli_div_up(uint32_t a, uint32_t b) { return a / b + (a % b != 0); }

/* ---- one side (K or V) of a layer in one class ---- */
typedef struct kvli_side {
    kvl_format format; /* without the flag */
    bool rotated;
    float global; /* NVFP4 */
    uint32_t tokens, dim;
    size_t tile_bytes; /* padded */
} kvli_side;

enum { KVLI_PACKED = 0, KVLI_EXACT = 1 };

/* ---- a layer, resolved ---- */
typedef struct kvli_layer {
    uint32_t group;
    uint32_t window, sink_tokens; /* window 0 = full */
    float softcap, scale;
    const float *sink_logits; /* [n_q_heads] or null */
    kvli_side k[2], v[2];     /* [KVLI_PACKED], [KVLI_EXACT]; equal where there is one class */
    size_t offset[2];         /* of this layer in a block of the class */
    size_t head_stride[2], v_offset[2];
} kvli_layer;

typedef struct kvli_geometry {
    uint32_t n_layers, n_q_heads, n_kv_heads, gqa, k_dim, v_dim, block_tokens, sink_blocks, segment_tokens;
    kvl_format exact; /* F32, F16 or BF16: the format of every exact tile, K and V */
    uint32_t n_groups;
    kvli_layer *layers;
} kvli_geometry;

/* ---- what a backend's attend gets: one layer of one step ---- */
typedef struct kvli_attend_span {
    uint32_t first_row, n_rows, position; /* rows first_row.. are positions position.. of this sequence */
    kvl_span_blocks
        blocks; /* of this layer's group. A query in block j sees blocks < j through table[], its own block
                   through own[j - first_own]. own[i] is an exact block or a slot of the scratch. Where
                   table[first_own + i] != own[i] the block is complete after this step and must be sealed:
                   exact tile -> packed tile, once its last row is written. Rows before `position` in the
                   first own block are already there, exact. */
} kvli_attend_span;

typedef struct kvli_attend {
    const kvli_geometry *geo;
    const kvli_layer *layer;
    const kvli_attend_span *spans;
    uint32_t n_spans, n_rows;
    const uint64_t *block_address; /* by id: start of the block; this layer's tiles are at offset[class] +
                                      head * head_stride[class] */
    uint8_t *scratch;              /* exact slots of one layer: slot s at s * scratch_slot, head h at + h *
                                      head_stride[KVLI_EXACT] */
    size_t scratch_slot;
    void *workspace; /* workspace_bytes of the backend, 64-byte aligned */
    size_t workspace_bytes;
    kvl_tensor q, k, v, out; /* strides filled in */
    uint8_t *taint; /* [n_spans] set to 1 where a row of k or v was not finite after rounding to the exact
                       format */
} kvli_attend;

/* ---- given by other sections ---- */
/* >>platform: runs fn(arg, i) for i < n on the context's threads, blocks until done. Tasks are claimed
 * dynamically. */
static void kvli_parallel(struct kvl_context *ctx, uint32_t n, void (*fn)(void *arg, uint32_t i), void *arg);
static uint32_t kvli_threads(const struct kvl_context *ctx); /* 1 = no threads */
static kvl_simd kvli_simd(const struct kvl_context *ctx);    /* resolved: SCALAR, AVX2 or AVX512 */

/* >>formats */
static float kvli_f16_to_f32(uint16_t h);
static uint16_t kvli_f32_to_f16(float f); /* round to nearest even, overflow to inf, NaN kept */
static float kvli_bf16_to_f32(uint16_t h);
static uint16_t kvli_f32_to_bf16(float f);
static float kvli_e4m3_to_f32(uint8_t b);
static uint8_t kvli_f32_to_e4m3(float f); /* nearest even, saturates at 448 */
static bool kvli_side_supported(kvl_format format_with_flag, bool is_key, uint32_t tokens, uint32_t dim,
                                const char **why);
static size_t kvli_tile_size(kvl_format format, uint32_t tokens, uint32_t dim); /* padded to 128 */
/* Writes n rows of a tensor (dtype, row stride in elements) as rows [row, row+n) of an exact tile; returns
   false if any number is not finite after rounding (the number is stored as it is). */
static bool kvli_write_rows(kvl_format exact, uint32_t dim, const void *src, kvl_dtype dtype,
                            size_t row_stride, uint32_t n, void *tile, uint32_t row, kvl_simd simd);
/* Seals: encodes a whole exact tile (side.tokens × side.dim). Same bytes on every simd path. NaN or Inf in
 * the input: any bytes, no trap. */
static void kvli_seal_tile(const kvli_side *side, kvl_format exact, const void *exact_tile, void *tile,
                           kvl_simd simd);
/* Scalar decode to f32 [tokens][dim], in the rotated domain. */
static void kvli_decode_tile(const kvli_side *side, const void *tile, float *rows);
/* In place over n rows: x <- x H (block-diagonal Hadamard, orthonormal, its own inverse); same operations on
 * every path. */
static void kvli_hadamard(float *x, uint32_t dim, uint32_t n_rows, kvl_simd simd);

/* >>cpu */
static size_t kvli_cpu_workspace(const kvli_geometry *geo, uint32_t n_threads, uint32_t max_step_tokens,
                                 uint32_t max_seq_tokens);
static void kvli_cpu_attend(struct kvl_context *ctx, const kvli_attend *a); /* write, seal, attend, merge */

/* ==== >>platform: threads, clock, atomics, cpu features ==== */
#if defined(_WIN32)
#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#define KVLI_UNDEF_LEAN
#endif
#include <windows.h>
#ifdef KVLI_UNDEF_LEAN
#undef WIN32_LEAN_AND_MEAN
#undef KVLI_UNDEF_LEAN
#endif
typedef SRWLOCK kvli_mutex;
typedef CONDITION_VARIABLE kvli_cond;
typedef HANDLE kvli_thread;
#else
#include <pthread.h>
#include <time.h>
#include <errno.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
typedef pthread_mutex_t kvli_mutex;
typedef pthread_cond_t kvli_cond;
typedef pthread_t kvli_thread;
#endif

#if defined(__GNUC__) || defined(__clang__)
static inline uint32_t kvli_atomic_load(uint32_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void kvli_atomic_store(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline uint32_t kvli_atomic_add(uint32_t *p, uint32_t v) {
    return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL);
}
#else
static inline uint32_t kvli_atomic_load(uint32_t *p) {
    return (uint32_t)InterlockedCompareExchange((volatile LONG *)p, 0, 0);
}
static inline void kvli_atomic_store(uint32_t *p, uint32_t v) {
    InterlockedExchange((volatile LONG *)p, (LONG)v);
}
static inline uint32_t kvli_atomic_add(uint32_t *p, uint32_t v) {
    return (uint32_t)InterlockedExchangeAdd((volatile LONG *)p, (LONG)v);
}
#endif

#if defined(_WIN32)
static bool kvli_mutex_init(kvli_mutex *m) {
    InitializeSRWLock(m);
    return true;
}
static void kvli_mutex_free(kvli_mutex *m) { (void)m; }
static void kvli_lock(kvli_mutex *m) { AcquireSRWLockExclusive(m); }
static void kvli_unlock(kvli_mutex *m) { ReleaseSRWLockExclusive(m); }
static bool kvli_cond_init(kvli_cond *c) {
    InitializeConditionVariable(c);
    return true;
}
static void kvli_cond_free(kvli_cond *c) { (void)c; }
static void kvli_cond_wait(kvli_cond *c, kvli_mutex *m) { SleepConditionVariableSRW(c, m, INFINITE, 0); }
static bool kvli_cond_wait_ms(kvli_cond *c, kvli_mutex *m, uint32_t ms) {
    return SleepConditionVariableSRW(c, m, ms, 0) != 0;
}
static void kvli_cond_broadcast(kvli_cond *c) { WakeAllConditionVariable(c); }
static uint64_t kvli_clock_now(void) {
    LARGE_INTEGER f, t;
    QueryPerformanceFrequency(&f);
    QueryPerformanceCounter(&t);
    return (uint64_t)((double)t.QuadPart * 1e9 / (double)f.QuadPart);
}
#define KVLI_THREAD_FN(name, arg) static DWORD WINAPI name(LPVOID arg)
#define KVLI_THREAD_RETURN return 0
static bool kvli_thread_start(kvli_thread *t, DWORD(WINAPI *fn)(LPVOID), void *arg) {
    *t = CreateThread(NULL, 0, fn, arg, 0, NULL);
    return *t != NULL;
}
static void kvli_thread_join(kvli_thread t) {
    WaitForSingleObject(t, INFINITE);
    CloseHandle(t);
}
#else
static bool kvli_mutex_init(kvli_mutex *m) { return pthread_mutex_init(m, NULL) == 0; }
static void kvli_mutex_free(kvli_mutex *m) { pthread_mutex_destroy(m); }
static void kvli_lock(kvli_mutex *m) { pthread_mutex_lock(m); }
static void kvli_unlock(kvli_mutex *m) { pthread_mutex_unlock(m); }
static bool kvli_cond_init(kvli_cond *c) {
#if defined(__APPLE__)
    return pthread_cond_init(c, NULL) == 0;
#else
    pthread_condattr_t attr;
    bool ok = pthread_condattr_init(&attr) == 0;
    ok = ok && pthread_condattr_setclock(&attr, CLOCK_MONOTONIC) == 0 && pthread_cond_init(c, &attr) == 0;
    pthread_condattr_destroy(&attr);
    return ok;
#endif
}
static void kvli_cond_free(kvli_cond *c) { pthread_cond_destroy(c); }
static void kvli_cond_wait(kvli_cond *c, kvli_mutex *m) { pthread_cond_wait(c, m); }
static bool kvli_cond_wait_ms(kvli_cond *c, kvli_mutex *m, uint32_t ms) {
    struct timespec t;
#if defined(__APPLE__)
    clock_gettime(CLOCK_REALTIME, &t);
#else
    clock_gettime(CLOCK_MONOTONIC, &t);
#endif
    t.tv_sec += (time_t)(ms / 1000);
    t.tv_nsec += (long)(ms % 1000) * 1000000L;
    if (t.tv_nsec >= 1000000000L) {
        t.tv_nsec -= 1000000000L;
        t.tv_sec++;
    }
    return pthread_cond_timedwait(c, m, &t) != ETIMEDOUT;
}
static void kvli_cond_broadcast(kvli_cond *c) { pthread_cond_broadcast(c); }
static uint64_t kvli_clock_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}
#define KVLI_THREAD_FN(name, arg) static void *name(void *arg)
#define KVLI_THREAD_RETURN return NULL
static bool kvli_thread_start(kvli_thread *t, void *(*fn)(void *), void *arg) {
    return pthread_create(t, NULL, fn, arg) == 0;
}
static void kvli_thread_join(kvli_thread t) { pthread_join(t, NULL); }
#endif

/* Asks for huge pages, where the system gives them on request: the tiles of a head lie far apart. */
static void kvli_huge_pages(void *p, size_t bytes) {
#ifdef MADV_HUGEPAGE
    uintptr_t page = 4096, from = ((uintptr_t)p + page - 1) & ~(page - 1),
              end = ((uintptr_t)p + bytes) & ~(page - 1);
    if (end > from) (void)madvise((void *)from, end - from, MADV_HUGEPAGE);
#else
    (void)p;
    (void)bytes;
#endif
}

#if KVLI_X86
#define KVLI_PREFETCH(p) _mm_prefetch((const char *)(p), _MM_HINT_T1)
#else
#define KVLI_PREFETCH(p) ((void)(p))
#endif

static inline void kvli_pause(void) {
#if KVLI_X86
    _mm_pause();
#endif
}

static kvl_simd kvli_simd_best(void) {
#if KVLI_X86 && (defined(__GNUC__) || defined(__clang__))
    unsigned a = 0, b = 0, leaf1 = 0, d = 0;
    __builtin_cpu_init();
    if (!__get_cpuid(1, &a, &b, &leaf1, &d) || !(leaf1 >> 29 & 1))
        return KVL_SIMD_SCALAR; /* F16C, which the builtin does not name everywhere */
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512cd"))
        return KVL_SIMD_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return KVL_SIMD_AVX2;
#endif
    return KVL_SIMD_SCALAR;
}

/* The built-in pool. One job at a time; workers spin for a moment before they sleep, since attends come in
 * bursts. */
typedef struct kvli_pool {
    kvli_mutex job, sleep;
    kvli_cond wake, done;
    kvli_thread *threads;
    uint32_t n_threads;                    /* workers, without the caller */
    uint32_t stop, generation, next, busy; /* atomics */
    uint32_t n;
    void (*fn)(void *arg, uint32_t i);
    void *arg;
} kvli_pool;

enum { KVLI_SPINS = 4000 };

static void kvli_pool_work(kvli_pool *p) {
    for (;;) {
        uint32_t i = kvli_atomic_add(&p->next, 1);
        if (i >= p->n) return;
        p->fn(p->arg, i);
    }
}

KVLI_THREAD_FN(kvli_pool_main, arg) {
    kvli_pool *p = (kvli_pool *)arg;
    uint32_t seen = 0;
    for (;;) {
        uint32_t spins = 0;
        while (kvli_atomic_load(&p->generation) == seen && !kvli_atomic_load(&p->stop)) {
            if (++spins < KVLI_SPINS) {
                kvli_pause();
                continue;
            }
            kvli_lock(&p->sleep);
            while (kvli_atomic_load(&p->generation) == seen && !kvli_atomic_load(&p->stop))
                kvli_cond_wait(&p->wake, &p->sleep);
            kvli_unlock(&p->sleep);
        }
        if (kvli_atomic_load(&p->stop)) break;
        seen++;
        kvli_pool_work(p);
        if (kvli_atomic_add(&p->busy, (uint32_t)-1) == 1) {
            kvli_lock(&p->sleep);
            kvli_cond_broadcast(&p->done);
            kvli_unlock(&p->sleep);
        }
    }
    KVLI_THREAD_RETURN;
}

static void kvli_pool_run(kvli_pool *p, uint32_t n, void (*fn)(void *arg, uint32_t i), void *arg) {
    uint32_t spins = 0;
    kvli_lock(&p->job);
    p->fn = fn;
    p->arg = arg;
    p->n = n;
    kvli_atomic_store(&p->next, 0);
    kvli_atomic_store(&p->busy, p->n_threads);
    kvli_lock(&p->sleep);
    kvli_atomic_add(&p->generation, 1);
    kvli_cond_broadcast(&p->wake);
    kvli_unlock(&p->sleep);
    kvli_pool_work(p);
    while (kvli_atomic_load(&p->busy) && ++spins < KVLI_SPINS) kvli_pause();
    if (kvli_atomic_load(&p->busy)) {
        kvli_lock(&p->sleep);
        while (kvli_atomic_load(&p->busy)) kvli_cond_wait(&p->done, &p->sleep);
        kvli_unlock(&p->sleep);
    }
    kvli_unlock(&p->job);
}

/* ==== >>log: errors as text ==== */
enum { KVLI_REPORT_BYTES = 3072 };
struct kvli_backend;

struct kvl_context {
    kvl_context_desc desc;
    const struct kvli_backend *backend;
    struct kvli_cu *cu; /* >>cuda; null where another backend was chosen */
    struct kvli_vk *vk; /* >>vulkan; likewise */
    int native;         /* what the driver said when it last failed, and in words */
    char native_text[160];
    kvl_simd simd;
    kvli_pool *pool;
    uint32_t null_pages; /* atomic: pages of 4 KB that the null backend has given out */
    char name[96], report[KVLI_REPORT_BYTES];
};

typedef struct kvli_text {
    char *at;
    size_t size;
} kvli_text;

static kvli_text kvli_text_at(char *at, size_t size) {
    kvli_text t;
    t.at = at;
    t.size = size;
    return t;
}

static void kvli_vformat(char *at, size_t size, const char *format, va_list args) {
    if (at && size) vsnprintf(at, size, format, args);
}

#if defined(__GNUC__) || defined(__clang__)
__attribute__((format(printf, 4, 5)))
#endif
static kvl_result
kvli_fail(const kvl_context *ctx, kvli_text text, kvl_result r, const char *format, ...) {
    char local[256];
    va_list args;
    va_start(args, format);
    kvli_vformat(local, sizeof local, format, args);
    va_end(args);
    if (text.at && text.size) snprintf(text.at, text.size, "%s", local);
    if (ctx && ctx->desc.log)
        ctx->desc.log(ctx->desc.user,
                      r == KVL_NO_BLOCKS || r == KVL_QUEUE_FULL ? KVL_LOG_INFO : KVL_LOG_ERROR, local);
    return r;
}

/* ==== >>mem: allocation through the context, and one arena an object ==== */
static void *kvli_default_alloc(void *user, void *ptr, size_t old_size, size_t new_size) {
    (void)user;
    (void)old_size;
    if (!new_size) {
        free(ptr);
        return NULL;
    }
    return realloc(ptr, new_size);
}
static uint64_t kvli_default_clock(void *user) {
    (void)user;
    return kvli_clock_now();
}

static void *kvli_alloc(const kvl_context *ctx, size_t size) {
    return ctx->desc.alloc(ctx->desc.user, NULL, 0, size);
}
static void kvli_free(const kvl_context *ctx, void *ptr, size_t size) {
    if (ptr) ctx->desc.alloc(ctx->desc.user, ptr, size, 0);
}
static uint64_t kvli_now(const kvl_context *ctx) { return ctx->desc.clock(ctx->desc.user); }

/* An object's arrays are carved out of one allocation: a first pass with base null counts, a second hands
   out. A size that overflows becomes SIZE_MAX and stays there. */
typedef struct kvli_arena {
    uint8_t *base;
    size_t used;
} kvli_arena;

static void *kvli_carve(kvli_arena *a, size_t count, size_t size) {
    size_t at = (a->used + 63) & ~(size_t)63;
    if (a->used == SIZE_MAX || at < a->used || (size && count > (SIZE_MAX - at) / size)) {
        a->used = SIZE_MAX;
        return NULL;
    }
    a->used = at + count * size;
    return a->base ? a->base + at : NULL;
}
#define KVLI_CARVE(arena, type, count) ((type *)kvli_carve((arena), (size_t)(count), sizeof(type)))

static uint32_t kvli_threads(const kvl_context *ctx) {
    if (ctx->desc.parallel_for) return ctx->desc.n_threads ? ctx->desc.n_threads : 2;
    return ctx->pool ? ctx->pool->n_threads + 1 : 1;
}
static kvl_simd kvli_simd(const kvl_context *ctx) { return ctx->simd; }

static void kvli_parallel(kvl_context *ctx, uint32_t n, void (*fn)(void *arg, uint32_t i), void *arg) {
    if (n > 1 && ctx->desc.parallel_for) {
        ctx->desc.parallel_for(ctx->desc.user, n, fn, arg);
    } else if (n > 1 && ctx->pool) {
        kvli_pool_run(ctx->pool, n, fn, arg);
    } else {
        for (uint32_t i = 0; i < n; i++) fn(arg, i);
    }
}
/* ==== >>formats: how numbers stand in tiles ===============================================================
   Every path (scalar, AVX2, AVX-512) does the same float32 operations in the same order and gives the same
   bytes; the scalar code is the reference. What makes that possible:
   - A code is rint(x / s). With an f16 scale s a midpoint times s is exact in f32 and lies on the grid of x,
     so the correctly rounded quotient is a midpoint only where x is exactly midpoint times s: the division
     alone gives the nearest code, ties to even.
   - Sums of products (NVFP4's squared error alone) pass through kvli_rounded: no compiler fuses them.
   - Scales and zeros saturate at the largest f16: finite rows give finite tiles. The least of zeros of both
     signs is +0. */
#include <float.h>

#if defined(__FAST_MATH__)
#error "kvlite needs IEEE float arithmetic: compile the file with KVL_IMPLEMENTATION without -ffast-math"
#endif

#define KVLI_MAX_DIM 256u
#define KVLI_INT4_GROUP 64u
#define KVLI_NVFP4_GROUP 16u
#define KVLI_SEAL_ROWS 8u /* rows in flight; divides every block_tokens */

/* The f32 nearest to x, whatever the compiler would like to keep: no FMA with what follows, no
   excess precision. */
KVLI_INLINE float kvli_rounded(float x) {
#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
    __asm__("" : "+x"(x));
    return x;
#elif (defined(__GNUC__) || defined(__clang__)) && defined(__aarch64__)
    __asm__("" : "+w"(x));
    return x;
#else
    volatile float v = x;
    return v;
#endif
}

#if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD == 0
#define KVLI_F32(x) (x) /* float arithmetic is float arithmetic */
#else
#define KVLI_F32(x) kvli_rounded(x) /* x87 */
#endif

KVLI_INLINE uint32_t kvli_f32_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

KVLI_INLINE float kvli_f32_from_bits(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}

KVLI_INLINE uint16_t kvli_get16(const void *p) {
    uint16_t v;
    memcpy(&v, p, 2);
    return v;
}

KVLI_INLINE void kvli_put16(void *p, uint16_t v) { memcpy(p, &v, 2); }

/* ---- conversions of single numbers. NaNs come out quiet, with the top of their payload, as in F16C. ---- */
static float kvli_f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
    if (magnitude > 0x7c00u) return kvli_f32_from_bits(sign | 0x7fc00000u | (magnitude & 0x3ffu) << 13);
    if (magnitude == 0x7c00u) return kvli_f32_from_bits(sign | 0x7f800000u);
    if (magnitude >= 0x400u) return kvli_f32_from_bits(sign | ((magnitude << 13) + 0x38000000u));
    return kvli_f32_from_bits(sign | kvli_f32_bits((float)magnitude * 5.9604644775390625e-8f));
}

static uint16_t kvli_f32_to_f16(float f) {
    uint32_t bits = kvli_f32_bits(f), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu, h;
    if (magnitude > 0x7f800000u) {
        h = 0x7e00u | (magnitude >> 13 & 0x3ffu);
    } else if (magnitude >= 0x477ff000u) { /* 65520 and up */
        h = 0x7c00u;
    } else if (magnitude >= 0x38800000u) {
        h = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    } else { /* below 2^-14: adding 0.5 puts the rounding position at f16's last subnormal bit */
        h = kvli_f32_bits(KVLI_F32(kvli_f32_from_bits(magnitude) + 0.5f)) - 0x3f000000u;
    }
    return (uint16_t)(sign | h);
}

static float kvli_bf16_to_f32(uint16_t h) { return kvli_f32_from_bits((uint32_t)h << 16); }

static uint16_t kvli_f32_to_bf16(float f) {
    uint32_t bits = kvli_f32_bits(f);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40u);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static float kvli_e4m3_to_f32(uint8_t b) {
    uint32_t sign = (uint32_t)(b & 0x80u) << 24, magnitude = b & 0x7fu;
    if (magnitude == 0x7fu) return kvli_f32_from_bits(sign | 0x7fc00000u);
    if (magnitude >= 8u) return kvli_f32_from_bits(sign | ((magnitude << 20) + 0x3c000000u));
    return kvli_f32_from_bits(sign | kvli_f32_bits((float)magnitude * 0.001953125f));
}

static uint8_t kvli_f32_to_e4m3(float f) {
    uint32_t bits = kvli_f32_bits(f), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint8_t)(sign | 0x7fu);
    if (magnitude > 0x43e00000u) magnitude = 0x43e00000u; /* 448 */
    if (magnitude >= 0x3c800000u) {
        magnitude = (magnitude - 0x3c000000u + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
    } else { /* below 2^-6: adding 2^14 puts the rounding position at 2^-9 */
        magnitude = kvli_f32_bits(KVLI_F32(kvli_f32_from_bits(magnitude) + 16384.0f)) - 0x46800000u;
    }
    return (uint8_t)(sign | magnitude);
}

/* Objects, since a constant expression may keep excess precision. */
static const float kvli_per_4 = 1.0f / 4.0f, kvli_per_6 = 1.0f / 6.0f, kvli_per_15 = 1.0f / 15.0f;
static const float kvli_per_127 = 1.0f / 127.0f, kvli_per_255 = 1.0f / 255.0f, kvli_per_448 = 1.0f / 448.0f;
static const float kvli_e2m1_values[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
static const float kvli_e2m1_midpoints[7] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f};

/* ---- shapes and names ---- */
static bool kvli_is_exact(kvl_format f) { return f == KVL_F32 || f == KVL_F16 || f == KVL_BF16; }
static bool kvli_is_channel(kvl_format f) { return f == KVL_INT8_CHANNEL || f == KVL_INT4_CHANNEL; }

static const char *const kvli_format_names[KVL_FORMAT_COUNT][2] = {
    {"default", NULL},
    {"f32", NULL},
    {"f16", NULL},
    {"bf16", NULL},
    {"int8", "int8+rot"},
    {"int8_channel", NULL},
    {"fp8_e4m3", "fp8_e4m3+rot"},
    {"nvfp4", "nvfp4+rot"},
    {"int4", "int4+rot"},
    {"int4_channel", NULL},
};

KVL_API const char *kvl_format_name(kvl_format f) {
    kvl_format base = f & ~(kvl_format)KVL_ROTATED;
    const char *name = base < KVL_FORMAT_COUNT ? kvli_format_names[base][base != f] : NULL;
    return name ? name : "unknown";
}

KVL_API kvl_format kvl_format_from_name(const char *name) {
    if (!name) return KVL_FORMAT_DEFAULT;
    for (uint32_t f = 0; f < KVL_FORMAT_COUNT; f++) {
        for (uint32_t rotated = 0; rotated < 2; rotated++) {
            const char *known = kvli_format_names[f][rotated];
            if (known && strcmp(known, name) == 0) return f | (rotated ? (kvl_format)KVL_ROTATED : 0);
        }
    }
    return KVL_FORMAT_DEFAULT;
}

static const kvl_preset kvli_presets[] = {
    {"f32", KVL_F32, KVL_F32, KVL_F32},
    {"f16", KVL_F16, KVL_F16, KVL_F16},
    {"bf16", KVL_BF16, KVL_BF16, KVL_BF16},
    {"int8", KVL_INT8, KVL_INT8, KVL_F16},
    {"int8+", KVL_INT8_CHANNEL, KVL_INT8, KVL_F16},
    {"fp8", KVL_FP8_E4M3, KVL_FP8_E4M3, KVL_F16},
    {"nvfp4", (kvl_format)KVL_NVFP4 | (kvl_format)KVL_ROTATED, KVL_NVFP4, KVL_F16},
    {"balanced", KVL_INT8, (kvl_format)KVL_INT4 | (kvl_format)KVL_ROTATED, KVL_F16},
    {"int4", KVL_INT4_CHANNEL, (kvl_format)KVL_INT4 | (kvl_format)KVL_ROTATED, KVL_F16},
};

KVL_API const kvl_preset *kvl_presets(uint32_t *count) {
    if (count) *count = (uint32_t)(sizeof kvli_presets / sizeof kvli_presets[0]);
    return kvli_presets;
}

KVL_API const kvl_preset *kvl_preset_find(const char *name) {
    uint32_t n;
    const kvl_preset *p = kvl_presets(&n);
    for (uint32_t i = 0; name && i < n; i++) {
        if (strcmp(p[i].name, name) == 0) return &p[i];
    }
    return NULL;
}

static bool kvli_side_supported(kvl_format format, bool is_key, uint32_t tokens, uint32_t dim,
                                const char **why) {
    kvl_format base = format & ~(kvl_format)KVL_ROTATED;
    const char *text = NULL;
    if (base == KVL_FORMAT_DEFAULT || base >= KVL_FORMAT_COUNT)
        text = "unknown format";
    else if (dim < 16 || dim > KVLI_MAX_DIM || dim % 16)
        text = "the head dim must be a multiple of 16 in 16..256";
    else if (tokens != 8 && tokens != 16 && tokens != 32 && tokens != 64)
        text = "block_tokens must be 8, 16, 32 or 64";
    else if (kvli_is_channel(base) && tokens < 32)
        text = "the channel formats need block_tokens of 32 or 64";
    else if (kvli_is_channel(base) && !is_key)
        text = "the channel formats are for keys only";
    else if (base != format && !kvli_format_names[base][1])
        text = "only INT8, FP8_E4M3, NVFP4 and INT4 can be rotated";
    if (text && why) *why = text;
    return !text;
}

/* Bytes of one row of codes (or of exact numbers), and of all that stands behind the rows. */
static size_t kvli_row_bytes(kvl_format base, uint32_t dim) {
    switch (base) {
    case KVL_F32: return (size_t)dim * 4;
    case KVL_F16:
    case KVL_BF16: return (size_t)dim * 2;
    case KVL_NVFP4:
    case KVL_INT4:
    case KVL_INT4_CHANNEL: return dim / 2;
    default: return dim;
    }
}

static size_t kvli_scale_bytes(kvl_format base, uint32_t tokens, uint32_t dim) {
    switch (base) {
    case KVL_INT8:
    case KVL_FP8_E4M3: return (size_t)tokens * 2;
    case KVL_NVFP4: return (size_t)tokens * (dim / KVLI_NVFP4_GROUP);
    case KVL_INT4: return (size_t)tokens * kvli_div_up(dim, KVLI_INT4_GROUP) * 4;
    case KVL_INT8_CHANNEL:
    case KVL_INT4_CHANNEL: return (size_t)dim * 4;
    default: return 0;
    }
}

static size_t kvli_tile_size(kvl_format format, uint32_t tokens, uint32_t dim) {
    kvl_format base = format & ~(kvl_format)KVL_ROTATED;
    return (kvli_row_bytes(base, dim) * tokens + kvli_scale_bytes(base, tokens, dim) + 127) / 128 * 128;
}

KVL_API size_t kvl_tile_bytes(kvl_format f, uint32_t block_tokens, uint32_t dim) {
    return kvli_side_supported(f, true, block_tokens, dim, NULL) ? kvli_tile_size(f, block_tokens, dim) : 0;
}

/* ---- scalar ---- */
static void kvli_load_scalar(kvl_format format, const void *src, size_t step, uint32_t n_rows, uint32_t n,
                             float *dst) {
    const uint8_t *row = (const uint8_t *)src;
    for (uint32_t r = 0; r < n_rows; r++, row += step, dst += n) {
        if (format == KVL_F32) memcpy(dst, row, (size_t)n * 4);
        for (uint32_t i = 0; i < n && format == KVL_F16; i++)
            dst[i] = kvli_f16_to_f32(kvli_get16(row + 2 * i));
        for (uint32_t i = 0; i < n && format == KVL_BF16; i++)
            dst[i] = kvli_bf16_to_f32(kvli_get16(row + 2 * i));
    }
}

static void kvli_store_scalar(kvl_format format, const float *src, uint32_t n, void *dst) {
    uint8_t *p = (uint8_t *)dst;
    if (format == KVL_F32) memcpy(dst, src, (size_t)n * 4);
    for (uint32_t i = 0; i < n && format == KVL_F16; i++) kvli_put16(p + 2 * i, kvli_f32_to_f16(src[i]));
    for (uint32_t i = 0; i < n && format == KVL_BF16; i++) kvli_put16(p + 2 * i, kvli_f32_to_bf16(src[i]));
}

static bool kvli_finite_scalar(kvl_format format, const void *row, uint32_t n) {
    const uint8_t *p = (const uint8_t *)row;
    bool finite = true;
    if (format == KVL_F32) {
        for (uint32_t i = 0; i < n; i++) {
            uint32_t bits;
            memcpy(&bits, p + 4 * i, 4);
            finite &= (bits & 0x7f800000u) != 0x7f800000u;
        }
    } else {
        uint16_t mask = format == KVL_F16 ? 0x7c00u : 0x7f80u;
        for (uint32_t i = 0; i < n; i++) finite &= (kvli_get16(p + 2 * i) & mask) != mask;
    }
    return finite;
}

/* Side of the Hadamard blocks, and 1/sqrt of it. */
static uint32_t kvli_hadamard_block(uint32_t dim) { return kvli_min_u32(dim & (0u - dim), 128u); }
static float kvli_hadamard_scale(uint32_t block) {
    return block == 16   ? 0.25f
           : block == 32 ? 0.17677669529663687f
           : block == 64 ? 0.125f
                         : 0.08838834764831845f;
}

static void kvli_hadamard_scalar(float *x, uint32_t block, uint32_t n_blocks) {
    float scale = kvli_hadamard_scale(block);
    for (uint32_t b = 0; b < n_blocks; b++, x += block) {
        for (uint32_t stride = 1; stride < block; stride *= 2) {
            for (uint32_t i = 0; i < block; i++) {
                if (i & stride) continue;
                float lo = x[i], hi = x[i + stride];
                x[i] = KVLI_F32(lo + hi);
                x[i + stride] = KVLI_F32(lo - hi);
            }
        }
        for (uint32_t i = 0; i < block; i++) x[i] = KVLI_F32(x[i] * scale);
    }
}

/* f16 that stays finite. */
static uint16_t kvli_f16_saturated(float f) {
    return kvli_f32_to_f16(f > 65504.0f ? 65504.0f : f < -65504.0f ? -65504.0f : f);
}
/* The same for a scale: 0 becomes 1. */
static uint16_t kvli_f16_scale(float f) {
    uint16_t h = kvli_f16_saturated(f);
    return h & 0x7fffu ? h : 0x3c00u;
}

/* rint(x / s) clamped to lo..hi; NaN becomes lo. 1.5 * 2^23 puts the rounding position at 1. */
KVLI_INLINE int32_t kvli_code(float x, float s, float lo, float hi) {
    float q = KVLI_F32(x / s);
    q = q > lo ? q : lo;
    q = q < hi ? q : hi;
    return (int32_t)(kvli_f32_bits(KVLI_F32(q + 12582912.0f)) - 0x4b400000u);
}

static float kvli_amax(const float *x, uint32_t n) {
    float amax = 0.0f;
    for (uint32_t i = 0; i < n; i++) amax = fabsf(x[i]) > amax ? fabsf(x[i]) : amax;
    return amax;
}

static void kvli_int8_row(const float *x, uint32_t dim, uint8_t *codes, uint8_t *scale) {
    uint16_t h = kvli_f16_scale(KVLI_F32(kvli_amax(x, dim) * kvli_per_127));
    float s = kvli_f16_to_f32(h);
    for (uint32_t i = 0; i < dim; i++) codes[i] = (uint8_t)kvli_code(x[i], s, -127.0f, 127.0f);
    kvli_put16(scale, h);
}

static void kvli_fp8_row(const float *x, uint32_t dim, uint8_t *codes, uint8_t *scale) {
    uint16_t h = kvli_f16_scale(KVLI_F32(kvli_amax(x, dim) * kvli_per_448));
    float s = kvli_f16_to_f32(h);
    for (uint32_t i = 0; i < dim; i++) codes[i] = kvli_f32_to_e4m3(KVLI_F32(x[i] / s));
    kvli_put16(scale, h);
}

/* n numbers under one (scale, zero); codes of 4 bits. */
static void kvli_int4_group(const float *x, uint32_t n, uint8_t *codes, uint8_t *scale) {
    float lo = x[0], hi = x[0];
    for (uint32_t i = 1; i < n; i++) {
        lo = x[i] < lo ? x[i] : lo;
        hi = x[i] > hi ? x[i] : hi;
    }
    lo = KVLI_F32(lo + 0.0f); /* -0 becomes 0: which of them is the least depends on the order */
    uint16_t hz = kvli_f16_saturated(lo), hs = kvli_f16_scale(KVLI_F32(KVLI_F32(hi - lo) * kvli_per_15));
    float z = kvli_f16_to_f32(hz), s = kvli_f16_to_f32(hs);
    for (uint32_t i = 0; i < n; i += 2) {
        int32_t low = kvli_code(KVLI_F32(x[i] - z), s, 0.0f, 15.0f);
        int32_t high = kvli_code(KVLI_F32(x[i + 1] - z), s, 0.0f, 15.0f);
        codes[i / 2] = (uint8_t)(low | high << 4);
    }
    kvli_put16(scale, hs);
    kvli_put16(scale + 2, hz);
}

/* e4m3 scale that maps amax to a peak of 6 or 4; 0 becomes 2^-9. inverse = f32(1 / peak), per_global =
   1 / global. */
static uint8_t kvli_nvfp4_scale(float amax, float inverse, float per_global) {
    uint8_t b = kvli_f32_to_e4m3(KVLI_F32(KVLI_F32(amax * inverse) * per_global));
    return b ? b : 1;
}

/* Codes of 16 numbers under the scale s; returns their squared error, summed in element order. */
static float kvli_nvfp4_codes(const float *x, float s, uint8_t *codes) {
    float error = 0.0f;
    for (uint32_t i = 0; i < KVLI_NVFP4_GROUP; i++) {
        float a = fabsf(x[i]);
        uint32_t code = 0;
        for (uint32_t m = 0; m < 7; m++) { /* a tie goes up where that is even */
            float limit = KVLI_F32(kvli_e2m1_midpoints[m] * s);
            code += m & 1 ? a >= limit : a > limit;
        }
        float d = KVLI_F32(a - kvli_rounded(kvli_e2m1_values[code] * s));
        error = KVLI_F32(error + kvli_rounded(d * d));
        code |= kvli_f32_bits(x[i]) >> 28 & 8u;
        if (i % 2)
            codes[i / 2] = (uint8_t)(codes[i / 2] | code << 4);
        else
            codes[i / 2] = (uint8_t)code;
    }
    return error;
}

static void kvli_nvfp4_group(const float *x, float global, uint8_t *codes, uint8_t *scale) {
    float amax = kvli_amax(x, KVLI_NVFP4_GROUP), per_global = KVLI_F32(1.0f / global);
    uint8_t six = kvli_nvfp4_scale(amax, kvli_per_6, per_global),
            four = kvli_nvfp4_scale(amax, kvli_per_4, per_global);
    uint8_t other[KVLI_NVFP4_GROUP / 2];
    float error = kvli_nvfp4_codes(x, KVLI_F32(kvli_e4m3_to_f32(six) * global), codes);
    *scale = six;
    if (kvli_nvfp4_codes(x, KVLI_F32(kvli_e4m3_to_f32(four) * global), other) < error) {
        memcpy(codes, other, sizeof other);
        *scale = four;
    }
}

/* Encodes KVLI_SEAL_ROWS rows, the first of which is row `first` of the tile. */
static void kvli_seal_rows_scalar(const kvli_side *side, const float *rows, uint32_t first, uint8_t *tile) {
    uint32_t dim = side->dim, groups = kvli_div_up(dim, KVLI_INT4_GROUP);
    size_t row_bytes = kvli_row_bytes(side->format, dim);
    uint8_t *scales = tile + row_bytes * side->tokens;
    for (uint32_t t = first; t < first + KVLI_SEAL_ROWS; t++, rows += dim) {
        uint8_t *codes = tile + row_bytes * t;
        if (side->format == KVL_INT8) kvli_int8_row(rows, dim, codes, scales + 2 * t);
        if (side->format == KVL_FP8_E4M3) kvli_fp8_row(rows, dim, codes, scales + 2 * t);
        for (uint32_t g = 0; g < groups && side->format == KVL_INT4; g++) {
            uint32_t e = g * KVLI_INT4_GROUP;
            kvli_int4_group(rows + e, kvli_min_u32(dim - e, KVLI_INT4_GROUP), codes + e / 2,
                            scales + 4 * (t * groups + g));
        }
        for (uint32_t g = 0; g < dim / KVLI_NVFP4_GROUP && side->format == KVL_NVFP4; g++) {
            kvli_nvfp4_group(rows + g * 16, side->global, codes + g * 8,
                             scales + t * (dim / KVLI_NVFP4_GROUP) + g);
        }
    }
}

/* Encodes channels first .. first+15 of a whole tile; x [tokens][16]. */
static void kvli_seal_channels_scalar(const kvli_side *side, const float *x, uint32_t first, uint8_t *tile) {
    bool wide = side->format == KVL_INT8_CHANNEL;
    float top = wide ? 255.0f : 15.0f, inverse = wide ? kvli_per_255 : kvli_per_15;
    size_t row_bytes = kvli_row_bytes(side->format, side->dim);
    uint8_t *scales = tile + row_bytes * side->tokens, *zeros = scales + 2 * (size_t)side->dim;
    for (uint32_t c = 0; c < 16; c++) {
        float lo = x[c], hi = x[c];
        for (uint32_t t = 1; t < side->tokens; t++) {
            lo = x[t * 16 + c] < lo ? x[t * 16 + c] : lo;
            hi = x[t * 16 + c] > hi ? x[t * 16 + c] : hi;
        }
        lo = KVLI_F32(lo + 0.0f);
        uint16_t hz = kvli_f16_saturated(lo), hs = kvli_f16_scale(KVLI_F32(KVLI_F32(hi - lo) * inverse));
        float z = kvli_f16_to_f32(hz), s = kvli_f16_to_f32(hs);
        for (uint32_t t = 0; t < side->tokens; t++) {
            uint8_t code = (uint8_t)kvli_code(KVLI_F32(x[t * 16 + c] - z), s, 0.0f, top);
            uint8_t *p = tile + row_bytes * t + (wide ? first + c : (first + c) / 2);
            *p = wide || c % 2 == 0 ? code : (uint8_t)(*p | code << 4);
        }
        kvli_put16(scales + 2 * (first + c), hs);
        kvli_put16(zeros + 2 * (first + c), hz);
    }
}

#if KVLI_X86
#define KVLI_LOAD128(p) _mm_loadu_si128((const __m128i *)(p))
#define KVLI_LOAD256(p) _mm256_loadu_si256((const __m256i *)(p))
#define KVLI_STORE128(p, v) _mm_storeu_si128((__m128i *)(p), v)
#define KVLI_STORE256(p, v) _mm256_storeu_si256((__m256i *)(p), v)

/* ---- AVX2 ---- */
KVLI_TARGET_AVX2 static void kvli_load_avx2(kvl_format format, const void *src, size_t step, uint32_t n_rows,
                                            uint32_t n, float *dst) {
    const uint8_t *row = (const uint8_t *)src;
    for (uint32_t r = 0; r < n_rows; r++, row += step, dst += n) {
        for (uint32_t i = 0; i < n; i += 8) {
            __m256 v;
            if (format == KVL_F16)
                v = _mm256_cvtph_ps(KVLI_LOAD128(row + 2 * i));
            else if (format == KVL_F32)
                v = _mm256_loadu_ps((const float *)(row + 4 * i));
            else
                v = _mm256_castsi256_ps(
                    _mm256_slli_epi32(_mm256_cvtepu16_epi32(KVLI_LOAD128(row + 2 * i)), 16));
            _mm256_storeu_ps(dst + i, v);
        }
    }
}

KVLI_TARGET_AVX2 KVLI_INLINE __m128i kvli_bf16_avx2(__m256 x) {
    __m256i bits = _mm256_castps_si256(x), high = _mm256_srli_epi32(bits, 16);
    __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    __m256i h = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
    return _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
}

KVLI_TARGET_AVX2 static void kvli_store_avx2(kvl_format format, const float *src, uint32_t n, void *dst) {
    uint8_t *p = (uint8_t *)dst;
    for (uint32_t i = 0; i < n; i += 8) {
        __m256 x = _mm256_loadu_ps(src + i);
        if (format == KVL_F32)
            _mm256_storeu_ps((float *)(p + 4 * i), x);
        else
            KVLI_STORE128(p + 2 * i, format == KVL_F16 ? _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)
                                                       : kvli_bf16_avx2(x));
    }
}

KVLI_TARGET_AVX2 static bool kvli_finite_avx2(kvl_format format, const void *row, uint32_t n) {
    const uint8_t *p = (const uint8_t *)row;
    __m256i bad = _mm256_setzero_si256();
    __m256i mask = format == KVL_F32 ? _mm256_set1_epi32(0x7f800000)
                                     : _mm256_set1_epi16(format == KVL_F16 ? 0x7c00 : 0x7f80);
    for (uint32_t i = 0, bytes = n * (format == KVL_F32 ? 4u : 2u); i < bytes; i += 32) {
        __m256i v = _mm256_and_si256(KVLI_LOAD256(p + i), mask);
        bad = _mm256_or_si256(bad,
                              format == KVL_F32 ? _mm256_cmpeq_epi32(v, mask) : _mm256_cmpeq_epi16(v, mask));
    }
    return _mm256_testz_si256(bad, bad);
}

/* Strides 1, 2 and 4 of the butterflies lie within a register. */
KVLI_TARGET_AVX2 KVLI_INLINE __m256 kvli_butterfly_avx2(__m256 x) {
    __m256 y = _mm256_permute_ps(x, 0xb1);
    x = _mm256_blend_ps(_mm256_add_ps(x, y), _mm256_sub_ps(y, x), 0xaa);
    y = _mm256_permute_ps(x, 0x4e);
    x = _mm256_blend_ps(_mm256_add_ps(x, y), _mm256_sub_ps(y, x), 0xcc);
    y = _mm256_permute2f128_ps(x, x, 1);
    return _mm256_blend_ps(_mm256_add_ps(x, y), _mm256_sub_ps(y, x), 0xf0);
}

KVLI_TARGET_AVX2 static void kvli_hadamard_avx2(float *x, uint32_t block, uint32_t n_blocks) {
    __m256 scale = _mm256_set1_ps(kvli_hadamard_scale(block));
    for (uint32_t b = 0; b < n_blocks; b++, x += block) {
        for (uint32_t i = 0; i < block; i += 8)
            _mm256_storeu_ps(x + i, kvli_butterfly_avx2(_mm256_loadu_ps(x + i)));
        for (uint32_t stride = 8; stride < block; stride *= 2) {
            for (uint32_t i = 0; i < block; i += 8) {
                if (i & stride) continue;
                __m256 lo = _mm256_loadu_ps(x + i), hi = _mm256_loadu_ps(x + i + stride);
                _mm256_storeu_ps(x + i, _mm256_add_ps(lo, hi));
                _mm256_storeu_ps(x + i + stride, _mm256_sub_ps(lo, hi));
            }
        }
        for (uint32_t i = 0; i < block; i += 8)
            _mm256_storeu_ps(x + i, _mm256_mul_ps(_mm256_loadu_ps(x + i), scale));
    }
}

KVLI_TARGET_AVX2 KVLI_INLINE __m256 kvli_abs_avx2(__m256 x) {
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
}

KVLI_TARGET_AVX2 KVLI_INLINE float kvli_max_of_avx2(__m256 x) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

KVLI_TARGET_AVX2 KVLI_INLINE float kvli_amax_avx2(const float *x, uint32_t n) {
    __m256 m = _mm256_setzero_ps();
    for (uint32_t i = 0; i < n; i += 8) m = _mm256_max_ps(kvli_abs_avx2(_mm256_loadu_ps(x + i)), m);
    return kvli_max_of_avx2(m);
}

/* kvli_f16_scale and kvli_f16_saturated of 8 numbers. */
KVLI_TARGET_AVX2 KVLI_INLINE __m128i kvli_zeros_avx2(__m256 x) {
    x = _mm256_max_ps(_mm256_min_ps(x, _mm256_set1_ps(65504.0f)), _mm256_set1_ps(-65504.0f));
    return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
}
KVLI_TARGET_AVX2 KVLI_INLINE __m128i kvli_scales_avx2(__m256 x) {
    __m128i h = kvli_zeros_avx2(x);
    __m128i none = _mm_cmpeq_epi16(_mm_and_si128(h, _mm_set1_epi16(0x7fff)), _mm_setzero_si128());
    return _mm_blendv_epi8(h, _mm_set1_epi16(0x3c00), none);
}

KVLI_TARGET_AVX2 KVLI_INLINE __m256i kvli_codes_avx2(__m256 x, __m256 s, __m256 lo, __m256 hi) {
    return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(_mm256_div_ps(x, s), lo), hi));
}

KVLI_TARGET_AVX2 KVLI_INLINE __m256i kvli_e4m3_avx2(__m256 q) {
    __m256i sign = _mm256_and_si256(_mm256_srli_epi32(_mm256_castps_si256(q), 24), _mm256_set1_epi32(0x80));
    __m256 a = _mm256_min_ps(kvli_abs_avx2(q), _mm256_set1_ps(448.0f));
    __m256i bits = _mm256_castps_si256(a),
            odd = _mm256_and_si256(_mm256_srli_epi32(bits, 20), _mm256_set1_epi32(1));
    __m256i normal = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7ffff - 0x3c000000)), odd);
    __m256i small = _mm256_castps_si256(_mm256_add_ps(a, _mm256_set1_ps(16384.0f)));
    small = _mm256_sub_epi32(small, _mm256_set1_epi32(0x46800000));
    __m256 is_small = _mm256_cmp_ps(a, _mm256_set1_ps(0.015625f), _CMP_LT_OQ);
    return _mm256_or_si256(
        sign, _mm256_blendv_epi8(_mm256_srli_epi32(normal, 20), small, _mm256_castps_si256(is_small)));
}

/* The low bytes of 16 integers. */
KVLI_TARGET_AVX2 KVLI_INLINE __m128i kvli_bytes_avx2(__m256i a, __m256i b) {
    __m256i mask = _mm256_set1_epi32(0xff);
    __m256i w = _mm256_packus_epi32(_mm256_and_si256(a, mask), _mm256_and_si256(b, mask));
    w = _mm256_permute4x64_epi64(w, 0xd8);
    return _mm_packus_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
}

/* 16 codes of 4 bits, a byte each, to 8 bytes, low nibble first. */
KVLI_TARGET_AVX2 KVLI_INLINE void kvli_put_nibbles_avx2(uint8_t *p, __m128i codes) {
    __m128i w = _mm_maddubs_epi16(codes, _mm_set1_epi16(0x1001));
    _mm_storel_epi64((__m128i *)p, _mm_packus_epi16(w, w));
}

KVLI_TARGET_AVX2 static void kvli_byte_row_avx2(kvl_format format, const float *x, uint32_t dim,
                                                uint8_t *codes, uint8_t *scale) {
    bool fp8 = format == KVL_FP8_E4M3;
    float amax = KVLI_F32(kvli_amax_avx2(x, dim) * (fp8 ? kvli_per_448 : kvli_per_127));
    __m128i h = kvli_scales_avx2(_mm256_set1_ps(amax));
    __m256 s = _mm256_cvtph_ps(h), lo = _mm256_set1_ps(-127.0f), hi = _mm256_set1_ps(127.0f);
    for (uint32_t i = 0; i < dim; i += 16) {
        __m256 a = _mm256_loadu_ps(x + i), b = _mm256_loadu_ps(x + i + 8);
        __m128i bytes =
            fp8 ? kvli_bytes_avx2(kvli_e4m3_avx2(_mm256_div_ps(a, s)), kvli_e4m3_avx2(_mm256_div_ps(b, s)))
                : kvli_bytes_avx2(kvli_codes_avx2(a, s, lo, hi), kvli_codes_avx2(b, s, lo, hi));
        KVLI_STORE128(codes + i, bytes);
    }
    kvli_put16(scale, (uint16_t)_mm_extract_epi16(h, 0));
}

KVLI_TARGET_AVX2 static void kvli_int4_group_avx2(const float *x, uint32_t n, uint8_t *codes,
                                                  uint8_t *scale) {
    __m256 lo = _mm256_loadu_ps(x), hi = lo, none = _mm256_setzero_ps(), top = _mm256_set1_ps(15.0f);
    for (uint32_t i = 8; i < n; i += 8) {
        lo = _mm256_min_ps(lo, _mm256_loadu_ps(x + i));
        hi = _mm256_max_ps(hi, _mm256_loadu_ps(x + i));
    }
    float least = KVLI_F32(0.0f - kvli_max_of_avx2(_mm256_sub_ps(none, lo))); /* never -0 */
    float range = KVLI_F32(KVLI_F32(kvli_max_of_avx2(hi) - least) * kvli_per_15);
    __m128i hz = kvli_zeros_avx2(_mm256_set1_ps(least)), hs = kvli_scales_avx2(_mm256_set1_ps(range));
    __m256 z = _mm256_cvtph_ps(hz), s = _mm256_cvtph_ps(hs);
    for (uint32_t i = 0; i < n; i += 16) {
        __m256i a = kvli_codes_avx2(_mm256_sub_ps(_mm256_loadu_ps(x + i), z), s, none, top);
        __m256i b = kvli_codes_avx2(_mm256_sub_ps(_mm256_loadu_ps(x + i + 8), z), s, none, top);
        kvli_put_nibbles_avx2(codes + i / 2, kvli_bytes_avx2(a, b));
    }
    kvli_put16(scale, (uint16_t)_mm_extract_epi16(hs, 0));
    kvli_put16(scale + 2, (uint16_t)_mm_extract_epi16(hz, 0));
}

/* kvli_rounded of 8 numbers: GCC fuses the products of intrinsics too. */
KVLI_TARGET_AVX2 KVLI_INLINE __m256 kvli_rounded_avx2(__m256 x) {
#if defined(__GNUC__) || defined(__clang__)
    __asm__("" : "+x"(x));
#endif
    return x;
}

/* x [8][8] transposed, rows 16 apart. */
KVLI_TARGET_AVX2 KVLI_INLINE void kvli_transpose_avx2(const float *x, __m256 *out) {
    __m256 t[8], u[8];
    for (int i = 0; i < 8; i++) t[i] = _mm256_loadu_ps(x + 16 * i);
    for (int i = 0; i < 4; i++) {
        u[2 * i] = _mm256_unpacklo_ps(t[2 * i], t[2 * i + 1]);
        u[2 * i + 1] = _mm256_unpackhi_ps(t[2 * i], t[2 * i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        t[i] = _mm256_shuffle_ps(u[i], u[i + 2], 0x44);
        t[i + 1] = _mm256_shuffle_ps(u[i], u[i + 2], 0xee);
        t[i + 2] = _mm256_shuffle_ps(u[i + 1], u[i + 3], 0x44);
        t[i + 3] = _mm256_shuffle_ps(u[i + 1], u[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        out[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
        out[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
    }
}

/* kvli_nvfp4_codes of 8 groups: x [16] registers, one element of each group; words [2]: the codes of
   elements 0..7 and 8..15. */
KVLI_TARGET_AVX2 KVLI_INLINE __m256 kvli_nvfp4_codes_avx2(const __m256 *x, __m256 s, __m256i *words) {
    __m256 values = _mm256_loadu_ps(kvli_e2m1_values), error = _mm256_setzero_ps(), limits[7];
    for (int m = 0; m < 7; m++) limits[m] = _mm256_mul_ps(_mm256_set1_ps(kvli_e2m1_midpoints[m]), s);
    for (int half = 0; half < 2; half++) {
        __m256i word = _mm256_setzero_si256();
        for (int e = 0; e < 8; e++) {
            __m256 v = x[8 * half + e], a = kvli_abs_avx2(v);
            __m256i code = _mm256_castps_si256(_mm256_cmp_ps(a, limits[0], _CMP_GT_OQ));
            for (int m = 1; m < 7; m += 2) {
                code = _mm256_add_epi32(code, _mm256_castps_si256(_mm256_cmp_ps(a, limits[m], _CMP_GE_OQ)));
                code =
                    _mm256_add_epi32(code, _mm256_castps_si256(_mm256_cmp_ps(a, limits[m + 1], _CMP_GT_OQ)));
            }
            code = _mm256_sub_epi32(_mm256_setzero_si256(), code);
            __m256 d =
                _mm256_sub_ps(a, kvli_rounded_avx2(_mm256_mul_ps(_mm256_permutevar8x32_ps(values, code), s)));
            error = _mm256_add_ps(error, kvli_rounded_avx2(_mm256_mul_ps(d, d)));
            __m256i sign =
                _mm256_and_si256(_mm256_srli_epi32(_mm256_castps_si256(v), 28), _mm256_set1_epi32(8));
            word = _mm256_or_si256(_mm256_srli_epi32(word, 4),
                                   _mm256_slli_epi32(_mm256_or_si256(code, sign), 28));
        }
        words[half] = word;
    }
    return error;
}

KVLI_TARGET_AVX2 KVLI_INLINE __m256i kvli_nvfp4_scale_avx2(__m256 amax, float inverse, __m256 per_global) {
    __m256 x = _mm256_mul_ps(_mm256_mul_ps(amax, _mm256_set1_ps(inverse)), per_global);
    return _mm256_max_epi32(kvli_e4m3_avx2(x), _mm256_set1_epi32(1));
}

/* Of e4m3 that are positive and finite. */
KVLI_TARGET_AVX2 KVLI_INLINE __m256 kvli_from_e4m3_avx2(__m256i b) {
    __m256 normal =
        _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(b, 20), _mm256_set1_epi32(0x3c000000)));
    __m256 small = _mm256_mul_ps(_mm256_cvtepi32_ps(b), _mm256_set1_ps(0.001953125f));
    return _mm256_blendv_ps(normal, small, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(8), b)));
}

/* kvli_nvfp4_group of 8 groups of 16 that follow one another. */
KVLI_TARGET_AVX2 static void kvli_nvfp4_groups_avx2(const float *rows, float global, uint8_t *codes,
                                                    uint8_t *scales) {
    __m256 x[16], amax = _mm256_setzero_ps(), g = _mm256_set1_ps(global),
                  per_global = _mm256_set1_ps(KVLI_F32(1.0f / global));
    kvli_transpose_avx2(rows, x);
    kvli_transpose_avx2(rows + 8, x + 8);
    for (int e = 0; e < 16; e++) amax = _mm256_max_ps(kvli_abs_avx2(x[e]), amax);
    __m256i six = kvli_nvfp4_scale_avx2(amax, kvli_per_6, per_global),
            four = kvli_nvfp4_scale_avx2(amax, kvli_per_4, per_global);
    __m256i words[2], other[2];
    __m256 error = kvli_nvfp4_codes_avx2(x, _mm256_mul_ps(kvli_from_e4m3_avx2(six), g), words);
    __m256 error4 = kvli_nvfp4_codes_avx2(x, _mm256_mul_ps(kvli_from_e4m3_avx2(four), g), other);
    __m256i better = _mm256_castps_si256(_mm256_cmp_ps(error4, error, _CMP_LT_OQ));
    __m256i low = _mm256_blendv_epi8(words[0], other[0], better),
            high = _mm256_blendv_epi8(words[1], other[1], better);
    __m256i even = _mm256_unpacklo_epi32(low, high), odd = _mm256_unpackhi_epi32(low, high);
    KVLI_STORE256(codes, _mm256_permute2x128_si256(even, odd, 0x20));
    KVLI_STORE256(codes + 32, _mm256_permute2x128_si256(even, odd, 0x31));
    __m256i scale = _mm256_blendv_epi8(six, four, better);
    _mm_storel_epi64((__m128i *)scales, kvli_bytes_avx2(scale, scale));
}

KVLI_TARGET_AVX2 static void kvli_seal_rows_avx2(const kvli_side *side, const float *rows, uint32_t first,
                                                 uint8_t *tile) {
    uint32_t dim = side->dim, groups = kvli_div_up(dim, KVLI_INT4_GROUP), blocks = dim / KVLI_NVFP4_GROUP;
    size_t row_bytes = kvli_row_bytes(side->format, dim);
    uint8_t *scales = tile + row_bytes * side->tokens, *codes = tile + row_bytes * first;
    if (side->format == KVL_NVFP4) { /* groups follow one another through the rows, a multiple of 8 in all */
        for (uint32_t g = 0; g < KVLI_SEAL_ROWS * blocks; g += 8) {
            kvli_nvfp4_groups_avx2(rows + 16 * g, side->global, codes + 8 * g, scales + first * blocks + g);
        }
        return;
    }
    for (uint32_t t = first; t < first + KVLI_SEAL_ROWS; t++, rows += dim, codes += row_bytes) {
        if (side->format != KVL_INT4) kvli_byte_row_avx2(side->format, rows, dim, codes, scales + 2 * t);
        for (uint32_t g = 0; g < groups && side->format == KVL_INT4; g++) {
            uint32_t e = g * KVLI_INT4_GROUP;
            kvli_int4_group_avx2(rows + e, kvli_min_u32(dim - e, KVLI_INT4_GROUP), codes + e / 2,
                                 scales + 4 * (t * groups + g));
        }
    }
}

KVLI_TARGET_AVX2 static void kvli_seal_channels_avx2(const kvli_side *side, const float *x, uint32_t first,
                                                     uint8_t *tile) {
    bool wide = side->format == KVL_INT8_CHANNEL;
    size_t row_bytes = kvli_row_bytes(side->format, side->dim);
    uint8_t *scales = tile + row_bytes * side->tokens + 2 * first;
    __m256 z[2], s[2], none = _mm256_setzero_ps(), top = _mm256_set1_ps(wide ? 255.0f : 15.0f);
    for (int half = 0; half < 2; half++) {
        __m256 lo = _mm256_loadu_ps(x + 8 * half), hi = lo;
        for (uint32_t t = 1; t < side->tokens; t++) {
            __m256 v = _mm256_loadu_ps(x + 16 * t + 8 * half);
            lo = _mm256_min_ps(lo, v);
            hi = _mm256_max_ps(hi, v);
        }
        lo = _mm256_add_ps(lo, none);
        __m128i hz = kvli_zeros_avx2(lo);
        __m128i hs = kvli_scales_avx2(
            _mm256_mul_ps(_mm256_sub_ps(hi, lo), _mm256_set1_ps(wide ? kvli_per_255 : kvli_per_15)));
        KVLI_STORE128(scales + 16 * half, hs);
        KVLI_STORE128(scales + 2 * (size_t)side->dim + 16 * half, hz);
        z[half] = _mm256_cvtph_ps(hz);
        s[half] = _mm256_cvtph_ps(hs);
    }
    uint8_t *p = tile + (wide ? first : first / 2);
    for (uint32_t t = 0; t < side->tokens; t++, p += row_bytes) {
        __m256i a = kvli_codes_avx2(_mm256_sub_ps(_mm256_loadu_ps(x + 16 * t), z[0]), s[0], none, top);
        __m256i b = kvli_codes_avx2(_mm256_sub_ps(_mm256_loadu_ps(x + 16 * t + 8), z[1]), s[1], none, top);
        if (wide)
            KVLI_STORE128(p, kvli_bytes_avx2(a, b));
        else
            kvli_put_nibbles_avx2(p, kvli_bytes_avx2(a, b));
    }
}

/* ---- AVX-512 ---- */
#if defined(__GNUC__) && !defined(__clang__) /* its header's undefined operands, warned about in C++ */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
KVLI_TARGET_AVX512 static void kvli_load_avx512(kvl_format format, const void *src, size_t step,
                                                uint32_t n_rows, uint32_t n, float *dst) {
    const uint8_t *row = (const uint8_t *)src;
    for (uint32_t r = 0; r < n_rows; r++, row += step, dst += n) {
        for (uint32_t i = 0; i < n; i += 16) {
            __m512 v;
            if (format == KVL_F16)
                v = _mm512_cvtph_ps(KVLI_LOAD256(row + 2 * i));
            else if (format == KVL_F32)
                v = _mm512_loadu_ps(row + 4 * i);
            else
                v = _mm512_castsi512_ps(
                    _mm512_slli_epi32(_mm512_cvtepu16_epi32(KVLI_LOAD256(row + 2 * i)), 16));
            _mm512_storeu_ps(dst + i, v);
        }
    }
}

KVLI_TARGET_AVX512 KVLI_INLINE __m256i kvli_bf16_avx512(__m512 x) {
    __m512i bits = _mm512_castps_si512(x), high = _mm512_srli_epi32(bits, 16);
    __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40)));
}

KVLI_TARGET_AVX512 static void kvli_store_avx512(kvl_format format, const float *src, uint32_t n, void *dst) {
    uint8_t *p = (uint8_t *)dst;
    for (uint32_t i = 0; i < n; i += 16) {
        __m512 x = _mm512_loadu_ps(src + i);
        if (format == KVL_F32)
            _mm512_storeu_ps(p + 4 * i, x);
        else
            KVLI_STORE256(p + 2 * i, format == KVL_F16 ? _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)
                                                       : kvli_bf16_avx512(x));
    }
}

KVLI_TARGET_AVX512 static bool kvli_finite_avx512(kvl_format format, const void *row, uint32_t n) {
    const uint8_t *p = (const uint8_t *)row;
    uint32_t bad = 0;
    __m256i mask = _mm256_set1_epi16(format == KVL_F16 ? 0x7c00 : 0x7f80);
    __m512i mask32 = _mm512_set1_epi32(0x7f800000);
    for (uint32_t i = 0; i < n; i += 16) {
        if (format == KVL_F32)
            bad |= _mm512_cmpeq_epi32_mask(_mm512_and_si512(_mm512_loadu_si512(p + 4 * i), mask32), mask32);
        else
            bad |= _mm256_cmpeq_epi16_mask(_mm256_and_si256(KVLI_LOAD256(p + 2 * i), mask), mask);
    }
    return bad == 0;
}

/* Strides 1, 2, 4 and 8 of the butterflies lie within a register. */
KVLI_TARGET_AVX512 KVLI_INLINE __m512 kvli_butterfly_avx512(__m512 x) {
    __m512 y = _mm512_permute_ps(x, 0xb1);
    x = _mm512_mask_sub_ps(_mm512_add_ps(x, y), 0xaaaa, y, x);
    y = _mm512_permute_ps(x, 0x4e);
    x = _mm512_mask_sub_ps(_mm512_add_ps(x, y), 0xcccc, y, x);
    y = _mm512_shuffle_f32x4(x, x, 0xb1);
    x = _mm512_mask_sub_ps(_mm512_add_ps(x, y), 0xf0f0, y, x);
    y = _mm512_shuffle_f32x4(x, x, 0x4e);
    return _mm512_mask_sub_ps(_mm512_add_ps(x, y), 0xff00, y, x);
}

KVLI_TARGET_AVX512 static void kvli_hadamard_avx512(float *x, uint32_t block, uint32_t n_blocks) {
    __m512 scale = _mm512_set1_ps(kvli_hadamard_scale(block));
    for (uint32_t b = 0; b < n_blocks; b++, x += block) {
        for (uint32_t i = 0; i < block; i += 16)
            _mm512_storeu_ps(x + i, kvli_butterfly_avx512(_mm512_loadu_ps(x + i)));
        for (uint32_t stride = 16; stride < block; stride *= 2) {
            for (uint32_t i = 0; i < block; i += 16) {
                if (i & stride) continue;
                __m512 lo = _mm512_loadu_ps(x + i), hi = _mm512_loadu_ps(x + i + stride);
                _mm512_storeu_ps(x + i, _mm512_add_ps(lo, hi));
                _mm512_storeu_ps(x + i + stride, _mm512_sub_ps(lo, hi));
            }
        }
        for (uint32_t i = 0; i < block; i += 16)
            _mm512_storeu_ps(x + i, _mm512_mul_ps(_mm512_loadu_ps(x + i), scale));
    }
}

KVLI_TARGET_AVX512 KVLI_INLINE __m512i kvli_codes_avx512(__m512 x, __m512 s, __m512 lo, __m512 hi) {
    return _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(_mm512_div_ps(x, s), lo), hi));
}

KVLI_TARGET_AVX512 KVLI_INLINE __m512i kvli_e4m3_avx512(__m512 q) {
    __m512i sign = _mm512_and_si512(_mm512_srli_epi32(_mm512_castps_si512(q), 24), _mm512_set1_epi32(0x80));
    __m512 a = _mm512_min_ps(_mm512_abs_ps(q), _mm512_set1_ps(448.0f));
    __m512i bits = _mm512_castps_si512(a),
            odd = _mm512_and_si512(_mm512_srli_epi32(bits, 20), _mm512_set1_epi32(1));
    __m512i normal = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7ffff - 0x3c000000)), odd);
    __m512i small = _mm512_castps_si512(_mm512_add_ps(a, _mm512_set1_ps(16384.0f)));
    __mmask16 is_small = _mm512_cmp_ps_mask(a, _mm512_set1_ps(0.015625f), _CMP_LT_OQ);
    normal =
        _mm512_mask_sub_epi32(_mm512_srli_epi32(normal, 20), is_small, small, _mm512_set1_epi32(0x46800000));
    return _mm512_or_si512(sign, normal);
}

KVLI_TARGET_AVX512 static void kvli_byte_row_avx512(kvl_format format, const float *x, uint32_t dim,
                                                    uint8_t *codes, uint8_t *scale) {
    bool fp8 = format == KVL_FP8_E4M3;
    __m512 m = _mm512_setzero_ps();
    for (uint32_t i = 0; i < dim; i += 16) m = _mm512_max_ps(_mm512_abs_ps(_mm512_loadu_ps(x + i)), m);
    float amax = KVLI_F32(_mm512_reduce_max_ps(m) * (fp8 ? kvli_per_448 : kvli_per_127));
    __m128i h = kvli_scales_avx2(_mm256_set1_ps(amax));
    __m512 s = _mm512_broadcastss_ps(_mm_cvtph_ps(h)), lo = _mm512_set1_ps(-127.0f),
           hi = _mm512_set1_ps(127.0f);
    for (uint32_t i = 0; i < dim; i += 16) {
        __m512 v = _mm512_loadu_ps(x + i);
        __m512i c = fp8 ? kvli_e4m3_avx512(_mm512_div_ps(v, s)) : kvli_codes_avx512(v, s, lo, hi);
        KVLI_STORE128(codes + i, _mm512_cvtepi32_epi8(c));
    }
    kvli_put16(scale, (uint16_t)_mm_extract_epi16(h, 0));
}

KVLI_TARGET_AVX512 static void kvli_int4_group_avx512(const float *x, uint32_t n, uint8_t *codes,
                                                      uint8_t *scale) {
    __m512 lo = _mm512_loadu_ps(x), hi = lo, none = _mm512_setzero_ps(), top = _mm512_set1_ps(15.0f);
    for (uint32_t i = 16; i < n; i += 16) {
        lo = _mm512_min_ps(lo, _mm512_loadu_ps(x + i));
        hi = _mm512_max_ps(hi, _mm512_loadu_ps(x + i));
    }
    float least = KVLI_F32(_mm512_reduce_min_ps(lo) + 0.0f); /* never -0 */
    float range = KVLI_F32(KVLI_F32(_mm512_reduce_max_ps(hi) - least) * kvli_per_15);
    __m128i hz = kvli_zeros_avx2(_mm256_set1_ps(least)), hs = kvli_scales_avx2(_mm256_set1_ps(range));
    __m512 z = _mm512_broadcastss_ps(_mm_cvtph_ps(hz)), s = _mm512_broadcastss_ps(_mm_cvtph_ps(hs));
    for (uint32_t i = 0; i < n; i += 16) {
        __m512i c = kvli_codes_avx512(_mm512_sub_ps(_mm512_loadu_ps(x + i), z), s, none, top);
        kvli_put_nibbles_avx2(codes + i / 2, _mm512_cvtepi32_epi8(c));
    }
    kvli_put16(scale, (uint16_t)_mm_extract_epi16(hs, 0));
    kvli_put16(scale + 2, (uint16_t)_mm_extract_epi16(hz, 0));
}

KVLI_TARGET_AVX512 static void kvli_seal_rows_avx512(const kvli_side *side, const float *rows, uint32_t first,
                                                     uint8_t *tile) {
    if (side->format == KVL_NVFP4) { /* bound by compares, which gain nothing from the width */
        kvli_seal_rows_avx2(side, rows, first, tile);
        return;
    }
    uint32_t dim = side->dim, groups = kvli_div_up(dim, KVLI_INT4_GROUP);
    size_t row_bytes = kvli_row_bytes(side->format, dim);
    uint8_t *scales = tile + row_bytes * side->tokens, *codes = tile + row_bytes * first;
    for (uint32_t t = first; t < first + KVLI_SEAL_ROWS; t++, rows += dim, codes += row_bytes) {
        if (side->format != KVL_INT4) kvli_byte_row_avx512(side->format, rows, dim, codes, scales + 2 * t);
        for (uint32_t g = 0; g < groups && side->format == KVL_INT4; g++) {
            uint32_t e = g * KVLI_INT4_GROUP;
            kvli_int4_group_avx512(rows + e, kvli_min_u32(dim - e, KVLI_INT4_GROUP), codes + e / 2,
                                   scales + 4 * (t * groups + g));
        }
    }
}

KVLI_TARGET_AVX512 static void kvli_seal_channels_avx512(const kvli_side *side, const float *x,
                                                         uint32_t first, uint8_t *tile) {
    bool wide = side->format == KVL_INT8_CHANNEL;
    size_t row_bytes = kvli_row_bytes(side->format, side->dim);
    uint8_t *scales = tile + row_bytes * side->tokens + 2 * first;
    __m512 lo = _mm512_loadu_ps(x), hi = lo, none = _mm512_setzero_ps(),
           top = _mm512_set1_ps(wide ? 255.0f : 15.0f);
    for (uint32_t t = 1; t < side->tokens; t++) {
        lo = _mm512_min_ps(lo, _mm512_loadu_ps(x + 16 * t));
        hi = _mm512_max_ps(hi, _mm512_loadu_ps(x + 16 * t));
    }
    lo = _mm512_add_ps(lo, none);
    __m512 range = _mm512_mul_ps(_mm512_sub_ps(hi, lo), _mm512_set1_ps(wide ? kvli_per_255 : kvli_per_15));
    __m512 finite = _mm512_max_ps(_mm512_min_ps(lo, _mm512_set1_ps(65504.0f)), _mm512_set1_ps(-65504.0f));
    __m256i hz = _mm512_cvtps_ph(finite, _MM_FROUND_TO_NEAREST_INT);
    __m256i hs = _mm512_cvtps_ph(_mm512_min_ps(range, _mm512_set1_ps(65504.0f)), _MM_FROUND_TO_NEAREST_INT);
    __mmask16 none_of = _mm256_testn_epi16_mask(hs, _mm256_set1_epi16(0x7fff));
    hs = _mm256_mask_mov_epi16(hs, none_of, _mm256_set1_epi16(0x3c00));
    KVLI_STORE256(scales, hs);
    KVLI_STORE256(scales + 2 * (size_t)side->dim, hz);
    __m512 z = _mm512_cvtph_ps(hz), s = _mm512_cvtph_ps(hs);
    uint8_t *p = tile + (wide ? first : first / 2);
    for (uint32_t t = 0; t < side->tokens; t++, p += row_bytes) {
        __m512i c = kvli_codes_avx512(_mm512_sub_ps(_mm512_loadu_ps(x + 16 * t), z), s, none, top);
        if (wide)
            KVLI_STORE128(p, _mm512_cvtepi32_epi8(c));
        else
            kvli_put_nibbles_avx2(p, _mm512_cvtepi32_epi8(c));
    }
}
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

/* ---- the paths ---- */
typedef struct kvli_codec {
    /* n_rows rows of n numbers (a multiple of 16), step bytes apart, to dst [n_rows][n] */
    void (*load)(kvl_format format, const void *src, size_t step, uint32_t n_rows, uint32_t n, float *dst);
    void (*store)(kvl_format format, const float *src, uint32_t n, void *dst);
    bool (*finite)(kvl_format format, const void *row, uint32_t n);
    void (*hadamard)(float *x, uint32_t block, uint32_t n_blocks);
    void (*seal_rows)(const kvli_side *side, const float *rows, uint32_t first, uint8_t *tile);
    void (*seal_channels)(const kvli_side *side, const float *x, uint32_t first, uint8_t *tile);
} kvli_codec;

static const kvli_codec kvli_codecs[] = {
    {kvli_load_scalar, kvli_store_scalar, kvli_finite_scalar, kvli_hadamard_scalar, kvli_seal_rows_scalar,
     kvli_seal_channels_scalar},
#if KVLI_X86
    {kvli_load_avx2, kvli_store_avx2, kvli_finite_avx2, kvli_hadamard_avx2, kvli_seal_rows_avx2,
     kvli_seal_channels_avx2},
    {kvli_load_avx512, kvli_store_avx512, kvli_finite_avx512, kvli_hadamard_avx512, kvli_seal_rows_avx512,
     kvli_seal_channels_avx512},
#endif
};

static const kvli_codec *kvli_codec_of(kvl_simd simd) {
#if KVLI_X86
    return &kvli_codecs[simd == KVL_SIMD_AVX512 ? 2 : simd == KVL_SIMD_AVX2 ? 1 : 0];
#else
    (void)simd;
    return &kvli_codecs[0];
#endif
}

static void kvli_hadamard(float *x, uint32_t dim, uint32_t n_rows, kvl_simd simd) {
    uint32_t block = kvli_hadamard_block(dim);
    kvli_codec_of(simd)->hadamard(x, block, dim / block * n_rows);
}

static bool kvli_write_rows(kvl_format exact, uint32_t dim, const void *src, kvl_dtype dtype,
                            size_t row_stride, uint32_t n, void *tile, uint32_t row, kvl_simd simd) {
    const kvli_codec *codec = kvli_codec_of(simd);
    kvl_format from = (kvl_format)dtype + KVL_F32; /* the two enums run alike */
    size_t step = row_stride * (from == KVL_F32 ? 4 : 2), row_bytes = kvli_row_bytes(exact, dim);
    const uint8_t *in = (const uint8_t *)src;
    uint8_t *out = (uint8_t *)tile + row_bytes * row;
    bool finite = true;
    for (uint32_t i = 0; i < n; i++, in += step, out += row_bytes) {
        float x[KVLI_MAX_DIM];
        if (from == exact) {
            memcpy(out, in, row_bytes);
        } else if (from == KVL_F32) {
            codec->store(exact, (const float *)(const void *)in, dim, out);
        } else {
            codec->load(from, in, 0, 1, dim, x);
            codec->store(exact, x, dim, out);
        }
        finite &= codec->finite(exact, out, dim);
    }
    return finite;
}

static void kvli_seal_tile(const kvli_side *side, kvl_format exact, const void *exact_tile, void *tile,
                           kvl_simd simd) {
    const kvli_codec *codec = kvli_codec_of(simd);
    const uint8_t *src = (const uint8_t *)exact_tile;
    uint8_t *dst = (uint8_t *)tile;
    uint32_t tokens = side->tokens, dim = side->dim;
    size_t in_bytes = kvli_row_bytes(exact, dim);
    size_t used = kvli_row_bytes(side->format, dim) * tokens + kvli_scale_bytes(side->format, tokens, dim);
    if (kvli_is_exact(side->format)) {
        kvli_write_rows(side->format, dim, src, (kvl_dtype)(exact - KVL_F32), dim, tokens, dst, 0, simd);
    } else if (kvli_is_channel(side->format)) {
        for (uint32_t c = 0; c < dim; c += 16) {
            float x[64 * 16];
            codec->load(exact, src + in_bytes / dim * c, in_bytes, tokens, 16, x);
            codec->seal_channels(side, x, c, dst);
        }
    } else {
        for (uint32_t t = 0; t < tokens; t += KVLI_SEAL_ROWS) {
            float rows[KVLI_SEAL_ROWS * KVLI_MAX_DIM];
            codec->load(exact, src + in_bytes * t, in_bytes, KVLI_SEAL_ROWS, dim, rows);
            if (side->rotated)
                codec->hadamard(rows, kvli_hadamard_block(dim),
                                dim / kvli_hadamard_block(dim) * KVLI_SEAL_ROWS);
            codec->seal_rows(side, rows, t, dst);
        }
    }
    memset(dst + used, 0, kvli_tile_size(side->format, tokens, dim) - used);
}

/* ---- decoding: products that are exact in f32 and at most one sum, so that no order of operations is needed
   (but for an NVFP4 global that is no power of two: the scale is rounded once, then each number) ---- */
static float kvli_decode_one(const kvli_side *side, const uint8_t *tile, uint32_t t, uint32_t e) {
    uint32_t dim = side->dim;
    size_t row_bytes = kvli_row_bytes(side->format, dim);
    const uint8_t *row = tile + row_bytes * t, *scales = tile + row_bytes * side->tokens;
    uint32_t nibble = row_bytes == dim / 2 ? row[e / 2] >> (e % 2 ? 4 : 0) & 15u : 0;
    switch (side->format) {
    case KVL_INT8: return (float)(int8_t)row[e] * kvli_f16_to_f32(kvli_get16(scales + 2 * t));
    case KVL_FP8_E4M3: return kvli_e4m3_to_f32(row[e]) * kvli_f16_to_f32(kvli_get16(scales + 2 * t));
    case KVL_NVFP4: {
        float s = kvli_rounded(kvli_e4m3_to_f32(scales[t * (dim / KVLI_NVFP4_GROUP) + e / KVLI_NVFP4_GROUP]) *
                               side->global);
        float v = kvli_e2m1_values[nibble & 7u];
        return (nibble & 8u ? -v : v) * s;
    }
    case KVL_INT4: {
        const uint8_t *p = scales + 4 * (t * kvli_div_up(dim, KVLI_INT4_GROUP) + e / KVLI_INT4_GROUP);
        return (float)nibble * kvli_f16_to_f32(kvli_get16(p)) + kvli_f16_to_f32(kvli_get16(p + 2));
    }
    default: { /* the channel formats */
        float code = side->format == KVL_INT8_CHANNEL ? (float)row[e] : (float)nibble;
        return code * kvli_f16_to_f32(kvli_get16(scales + 2 * e)) +
               kvli_f16_to_f32(kvli_get16(scales + 2 * dim + 2 * e));
    }
    }
}

static void kvli_decode_tile(const kvli_side *side, const void *tile, float *rows) {
    if (kvli_is_exact(side->format)) {
        kvli_load_scalar(side->format, tile, 0, 1, side->tokens * side->dim, rows);
        return;
    }
    for (uint32_t t = 0; t < side->tokens; t++) {
        for (uint32_t e = 0; e < side->dim; e++)
            rows[t * side->dim + e] = kvli_decode_one(side, (const uint8_t *)tile, t, e);
    }
}

static kvl_result kvli_tile_side(kvl_format f, uint32_t tokens, uint32_t dim, float global, kvli_side *side) {
    if (!kvli_side_supported(f, true, tokens, dim, NULL)) return KVL_UNSUPPORTED;
    if (!(global >= 0.0f && global <= FLT_MAX) || (global > 0.0f && global < FLT_MIN)) return KVL_INVALID_ARG;
    side->format = f & ~(kvl_format)KVL_ROTATED;
    side->rotated = side->format != f;
    side->global = global > 0.0f ? global : 1.0f / 16.0f;
    side->tokens = tokens;
    side->dim = dim;
    side->tile_bytes = kvli_tile_size(f, tokens, dim);
    return KVL_OK;
}

KVL_API kvl_result kvl_tile_encode(kvl_format f, uint32_t block_tokens, uint32_t dim, float nvfp4_global,
                                   const float *rows, void *tile) {
    kvli_side side;
    if (!rows || !tile) return KVL_INVALID_ARG;
    kvl_result r = kvli_tile_side(f, block_tokens, dim, nvfp4_global, &side);
    if (r == KVL_OK) kvli_seal_tile(&side, KVL_F32, rows, tile, kvli_simd_best());
    return r;
}

KVL_API kvl_result kvl_tile_decode(kvl_format f, uint32_t block_tokens, uint32_t dim, float nvfp4_global,
                                   const void *tile, bool unrotate, float *rows) {
    kvli_side side;
    if (!rows || !tile) return KVL_INVALID_ARG;
    kvl_result r = kvli_tile_side(f, block_tokens, dim, nvfp4_global, &side);
    if (r != KVL_OK) return r;
    kvli_decode_tile(&side, tile, rows);
    if (side.rotated && unrotate) kvli_hadamard(rows, dim, block_tokens, kvli_simd_best());
    return KVL_OK;
}

/* ==== >>backend: what a backend must do ==== */
/* Those with a cache come from its owner thread. Addresses are the backend's own (host pointers on the CPU). Of a
   device, copy, poison and attend only enqueue; a copy that fails makes the device lost, which every call says
   from then on. */
typedef struct kvli_backend {
    const char *name;
    kvl_backend_kind kind;
    bool automatic;  /* AUTO tries it */
    bool has_memory; /* false: addresses are only numbers */
    /* For a context. *why becomes what the report says of it, in any case. close takes what a failed open left. */
    kvl_result (*open)(kvl_context *ctx, kvli_text why);
    void (*close)(kvl_context *ctx);
    bool (*supports)(kvl_format format, bool is_key, uint32_t block_tokens, uint32_t dim, const char **why);
    /* For a geometry that is resolved: sets workspace_bytes, backend_bytes (of the arena), pinned_bytes and, if
       it is 0, desc.slab_granularity; may set slab_most and slabs_most. Says why not in the cache's error. */
    kvl_result (*plan)(kvl_cache *c);
    kvl_result (*start)(kvl_cache *c); /* the arena is there; stop takes what a failed start left */
    void (*stop)(kvl_cache *c);
    /* A slab, or the scratch and the workspace (slab KVL_NONE): 128-byte aligned. */
    kvl_result (*map)(kvl_cache *c, uint32_t slab, size_t bytes, uint64_t *address);
    void (*unmap)(kvl_cache *c, uint32_t slab, size_t bytes, uint64_t address);
    kvl_result (*copy)(kvl_cache *c, uint64_t dst, uint64_t src, size_t bytes);
    kvl_result (*poison)(kvl_cache *c, uint64_t address, size_t bytes);
    kvl_result (*step)(
        kvl_cache *c); /* the step's tables are final: does its copies, may change its graph_key */
    kvl_result (*attend)(kvl_cache *c, const kvli_attend *args);
    kvl_result (*finish)(kvl_cache *c);  /* of the step: its taint is in step.taint */
    kvl_result (*check)(kvl_cache *c);   /* DEVICE_LOST or OK */
    kvl_result (*recover)(kvl_cache *c); /* nothing is mapped: the device works again */
    kvl_result (*room)(const kvl_context *ctx, kvl_memory_info *out); /* null: nobody knows */
} kvli_backend;

/* ==== >>blocks: slabs, classes, block ids ==== */
enum {
    KVLI_MAX_GROUPS = 16,
    KVLI_MAX_CLASSES = 2 * KVLI_MAX_GROUPS,
    KVLI_PRIORITIES = 8,
    KVLI_USES = 4, /* how often a block was found again is counted so far */
    KVLI_LRU_LISTS = KVLI_PRIORITIES * KVLI_USES,
    KVLI_SCAN = 32, /* siblings looked at for a partial match */
    KVLI_NO_LRU = 255
};

typedef struct kvli_class {
    size_t bytes; /* of a block; 0 = the class does not exist */
    uint32_t per_slab;
    uint32_t partial;     /* list of slabs of this class with free slots */
    uint32_t slabs, live; /* live = slots taken */
    uint32_t cached;      /* of them, evictable */
    uint32_t pinned, shared;
} kvli_class;

typedef struct kvli_slab {
    uint64_t address; /* 0 = not mapped */
    uint32_t klass;   /* KVL_NONE = free */
    uint32_t live, n_free;
    uint32_t prev, next; /* in the class's partial list, or next in the free list */
} kvli_slab;

typedef struct kvli_block {
    uint32_t slab, slot; /* slab KVL_NONE = the id is free */
    uint32_t refs;       /* tables and open steps that hold it */
    uint32_t node;       /* prefix-tree node that holds it, or KVL_NONE */
    uint32_t prev, next; /* LRU, or next in a reserve list */
    uint64_t released;   /* when it was put into the LRU, in blocks put there */
    uint8_t klass, lru;  /* lru: which list, KVLI_NO_LRU = none */
    bool reserved;       /* came from a sequence's reserve: goes back there if its step is aborted */
} kvli_block;

typedef struct kvli_reserve {
    uint32_t head, count;
} kvli_reserve;

typedef struct kvli_group {
    uint32_t window, sink_tokens;
    bool two_class;
    size_t bytes[2]; /* of a block */
} kvli_group;

/* ---- prefix tree ---- */
typedef struct kvli_node {
    uint32_t parent;                                 /* KVL_NONE: a root */
    uint32_t first_child, first_partial, prev, next; /* next/prev: siblings, or roots */
    uint32_t bucket_next, hash;
    uint32_t depth;    /* full blocks up to and including this one; of a partial leaf, of its parent */
    uint32_t n_tokens; /* block_tokens, fewer in a partial leaf, 0 in a root */
    uint32_t n_slots;  /* filled */
    uint32_t seqs;     /* sequences whose deepest node this is */
    uint32_t pins;
    uint8_t priority, uses; /* uses: how often it was found again; a child's is never more */
    bool used;
    uint64_t name_space, salt; /* of its root */
    uint64_t chain; /* hash over namespace, salt and all tokens: says of what has gone that it was here */
} kvli_node;

typedef struct kvli_seq {
    uint32_t generation;
    bool open, keep, tainted,
        attached;    /* attached: node covers all full blocks, so new ones can be hung under it */
    bool tail_known; /* tails[] holds the tokens of the open block */
    bool scheduled;  /* a scheduler's: callers may not change it */
    uint8_t priority;
    uint32_t length, n_blocks; /* committed tokens, table entries in use */
    uint32_t extended;         /* length up to which blocks are reserved */
    uint32_t node;             /* deepest tree node over its full blocks, KVL_NONE without one */
    uint32_t pin_node;         /* deepest node that it pinned, or KVL_NONE */
    uint32_t step_span;        /* in the open step, or KVL_NONE */
} kvli_seq;

typedef struct kvli_undo { /* what a step changed in a table */
    uint32_t seq, group, index;
    uint32_t old_entry; /* held by the step until it ends; KVL_NONE = there was none */
    uint32_t own_entry; /* exact block of this step that is not the table's, or KVL_NONE; held by the step */
} kvli_undo;

typedef struct kvli_step_state {
    bool open;
    uint64_t id;
    uint32_t n_undo, n_own, n_copies, n_scratch, n_spans, n_rows, n_logits, layers_done;
    kvli_undo *undo;
    uint32_t *own;
    kvl_copy *copies;
    kvl_step_span *spans;
    kvl_span_blocks *blocks;  /* [group][span] as the public step has it */
    kvli_attend_span *attend; /* [group][span] */
    int32_t *tokens;
    uint32_t *positions, *row_span, *logit_rows, *logit_requests;
    void **logit_users;
    uint8_t *done, *taint;
    kvl_result failed;        /* what a layer of it failed with */
    kvl_step views[2], *view; /* the open step's */
} kvli_step_state;

typedef struct kvli_histogram {
    uint64_t count, bucket[256];
    double max;
} kvli_histogram;

struct kvl_cache {
    kvl_context *ctx;
    bool own_ctx;
    void *arena, *layer_arena;
    size_t arena_bytes, layer_bytes;
    kvl_cache_desc desc;
    kvli_geometry geo;
    kvli_group groups[KVLI_MAX_GROUPS];
    kvli_class classes[KVLI_MAX_CLASSES]; /* group * 2 + exact */
    uint32_t max_blocks, max_slabs, max_per_slab, max_nodes, max_seqs, seq_blocks, max_spans, max_logits,
        n_buckets;
    uint64_t fixed_bytes; /* scratch + workspace, one after the other */
    uint64_t least_bytes; /* for one sequence of two blocks */
    uint32_t until_poll;  /* steps until the device is asked for its room again */
    uint32_t until_grow;  /* such times until growth is tried again, after it failed */
    size_t scratch_slot, scratch_bytes, workspace_bytes, slab_bytes;
    uint64_t slab_most; /* bytes of a slab, and how many, that the device can have; 0: any */
    uint32_t slabs_most;
    uint64_t scratch, workspace;        /* addresses, 0 while the budget is below them */
    void *backend_state;                /* [backend_bytes] of the arena */
    size_t backend_bytes, pinned_bytes; /* pinned: host memory that the backend takes itself */
    kvli_slab *slabs;
    uint32_t *slot_block, *slot_free; /* [max_slabs][max_per_slab] */
    uint32_t n_slabs, free_slab, n_free_slabs, unmapped_slab;
    kvli_block *blocks;
    uint64_t *address;
    uint32_t *free_ids, n_free_ids, *check;
    uint32_t lru_head[KVLI_LRU_LISTS], lru_tail[KVLI_LRU_LISTS]; /* [priority][uses] */
    uint64_t released;                                           /* blocks put into the LRU since create */
    double stay; /* how long blocks stay that nobody finds again, in those */
    kvli_node *nodes;
    int32_t *node_tokens;
    uint64_t *ghosts; /* [n_ghosts] chains of blocks evicted lately */
    uint32_t n_ghosts, *node_slots, *buckets, free_node, n_nodes, roots;
    kvli_seq *seqs;
    uint32_t *tables;       /* [seq][group][seq_blocks] */
    int32_t *tails;         /* [seq][block_tokens]: tokens of the open block */
    kvli_reserve *reserves; /* [seq][class] blocks taken ahead by kvl_seq_extend */
    uint32_t *free_seqs, n_free_seqs, *path;
    uint32_t *layer_group;
    kvli_step_state step;
    bool compacted; /* in this step */
    uint64_t epoch; /* grows when memory moves: part of graph_key */
    kvl_sched *sched;
    kvl_stats stats, published;
    kvli_mutex lock; /* published stats, and the scheduler's queue */
    char error[256];
};

static kvli_text kvli_err(kvl_cache *c) { return kvli_text_at(c->error, sizeof c->error); }
#define KVLI_ERROR(cache, result, ...) kvli_fail((cache)->ctx, kvli_err(cache), result, __VA_ARGS__)
static void kvli_budget_poll(kvl_cache *c); /* >>public: at the start of plan and step_begin */

static uint32_t *kvli_table(const kvl_cache *c, uint32_t seq, uint32_t group) {
    return c->tables + ((size_t)seq * c->geo.n_groups + group) * c->seq_blocks;
}
static uint32_t kvli_class_of(const kvl_cache *c, uint32_t group, bool exact) {
    return group * 2 + (exact || !c->groups[group].two_class);
}
/* Does block `index` of a sequence stay exact when it is full? */
static bool kvli_stays_exact(const kvl_cache *c, uint32_t group, uint32_t index) {
    return !c->groups[group].two_class || index < c->geo.sink_blocks;
}
static uint32_t kvli_entry(const kvl_cache *c, uint32_t block) {
    return block | (c->blocks[block].klass & 1 ? KVL_ENTRY_EXACT : 0);
}
static kvli_block *kvli_block_at(kvl_cache *c, uint32_t entry) { return &c->blocks[entry & KVL_ENTRY_ID]; }
static uint32_t *kvli_slots(const kvl_cache *c, uint32_t node) {
    return c->node_slots + (size_t)node * c->geo.n_groups;
}
static int32_t *kvli_node_toks(const kvl_cache *c, uint32_t node) {
    return c->node_tokens + (size_t)node * c->geo.block_tokens;
}

/* ---- slabs ---- */
static void kvli_partial_link(kvl_cache *c, uint32_t s) {
    kvli_class *k = &c->classes[c->slabs[s].klass];
    c->slabs[s].prev = KVL_NONE;
    c->slabs[s].next = k->partial;
    if (k->partial != KVL_NONE) c->slabs[k->partial].prev = s;
    k->partial = s;
}

static void kvli_partial_unlink(kvl_cache *c, uint32_t s) {
    kvli_slab *slab = &c->slabs[s];
    if (slab->prev != KVL_NONE)
        c->slabs[slab->prev].next = slab->next;
    else
        c->classes[slab->klass].partial = slab->next;
    if (slab->next != KVL_NONE) c->slabs[slab->next].prev = slab->prev;
}

static void kvli_slab_release(kvl_cache *c, uint32_t s) { /* its last block has gone */
    kvli_partial_unlink(c, s);
    c->classes[c->slabs[s].klass].slabs--;
    c->slabs[s].klass = KVL_NONE;
    c->slabs[s].next = c->free_slab;
    c->free_slab = s;
    c->n_free_slabs++;
}

static void kvli_slab_take(kvl_cache *c, uint32_t klass) { /* gives a free slab to a class */
    uint32_t s = c->free_slab;
    kvli_slab *slab = &c->slabs[s];
    uint32_t *slots = c->slot_free + (size_t)s * c->max_per_slab;
    c->free_slab = slab->next;
    c->n_free_slabs--;
    slab->klass = klass;
    slab->live = 0;
    slab->n_free = c->classes[klass].per_slab;
    for (uint32_t i = 0; i < slab->n_free; i++) slots[i] = slab->n_free - 1 - i;
    c->classes[klass].slabs++;
    kvli_partial_link(c, s);
}

static void kvli_slot_take(kvl_cache *c, uint32_t klass, uint32_t id) { /* the class has a partial slab */
    uint32_t s = c->classes[klass].partial;
    kvli_slab *slab = &c->slabs[s];
    uint32_t slot = c->slot_free[(size_t)s * c->max_per_slab + --slab->n_free];
    if (!slab->n_free) kvli_partial_unlink(c, s);
    slab->live++;
    c->slot_block[(size_t)s * c->max_per_slab + slot] = id;
    c->blocks[id].slab = s;
    c->blocks[id].slot = slot;
    c->address[id] = slab->address + (uint64_t)slot * c->classes[klass].bytes;
}

static void kvli_slot_give(kvl_cache *c, uint32_t s, uint32_t slot) {
    kvli_slab *slab = &c->slabs[s];
    c->slot_block[(size_t)s * c->max_per_slab + slot] = KVL_NONE;
    c->slot_free[(size_t)s * c->max_per_slab + slab->n_free++] = slot;
    slab->live--;
    if (slab->n_free == 1) kvli_partial_link(c, s);
    if (!slab->live) kvli_slab_release(c, s);
}

/* Moves every block of a slab into other slabs of its class, which must have room. */
static void kvli_slab_empty(kvl_cache *c, uint32_t s) {
    uint32_t klass = c->slabs[s].klass, per = c->classes[klass].per_slab;
    if (c->slabs[s].n_free) kvli_partial_unlink(c, s);
    for (uint32_t slot = 0; slot < per; slot++) {
        uint32_t id = c->slot_block[(size_t)s * c->max_per_slab + slot];
        if (id == KVL_NONE) continue;
        uint64_t from = c->address[id];
        kvli_slot_take(c, klass, id);
        c->ctx->backend->copy(c, c->address[id], from, c->classes[klass].bytes);
        c->slot_block[(size_t)s * c->max_per_slab + slot] = KVL_NONE;
    }
    c->slabs[s].live = 0;
    c->slabs[s].n_free = per;
    kvli_partial_link(c, s);
    kvli_slab_release(c, s);
    c->epoch++;
    c->stats.compactions++;
}

/* Empties the emptiest slab whose blocks fit elsewhere. False: there is none. O(slabs), and only tried where
   some class has a slab's worth of free slots. */
static bool kvli_compact(kvl_cache *c) {
    uint32_t best = KVL_NONE, best_live = KVL_NONE;
    bool possible = false;
    for (uint32_t k = 0; k < c->geo.n_groups * 2; k++) {
        kvli_class *class_ = &c->classes[k];
        possible = possible || (class_->slabs && (class_->slabs - 1) * class_->per_slab >= class_->live);
    }
    if (!possible) return false;
    for (uint32_t s = 0; s < c->max_slabs; s++) {
        uint32_t k = c->slabs[s].klass;
        if (k == KVL_NONE || (c->classes[k].slabs - 1) * c->classes[k].per_slab < c->classes[k].live)
            continue;
        if (c->slabs[s].live < best_live) {
            best = s;
            best_live = c->slabs[s].live;
        }
    }
    kvli_slab_empty(c, best);
    return true;
}

/* ---- LRU of blocks that only the tree holds: a list for each priority and number of uses ---- */
static void kvli_lru_remove(kvl_cache *c, uint32_t id) {
    kvli_block *b = &c->blocks[id];
    if (b->lru == KVLI_NO_LRU) return;
    if (b->prev != KVL_NONE)
        c->blocks[b->prev].next = b->next;
    else
        c->lru_head[b->lru] = b->next;
    if (b->next != KVL_NONE)
        c->blocks[b->next].prev = b->prev;
    else
        c->lru_tail[b->lru] = b->prev;
    b->lru = KVLI_NO_LRU;
    c->classes[b->klass].cached--;
}

static void kvli_lru_push(kvl_cache *c, uint32_t id) { /* as the most recent */
    kvli_block *b = &c->blocks[id];
    const kvli_node *node = &c->nodes[b->node];
    uint32_t list = node->priority * KVLI_USES + node->uses;
    b->lru = (uint8_t)list;
    b->released = c->released++;
    b->next = KVL_NONE;
    b->prev = c->lru_tail[list];
    if (b->prev != KVL_NONE)
        c->blocks[b->prev].next = id;
    else
        c->lru_head[list] = id;
    c->lru_tail[list] = id;
    c->classes[b->klass].cached++;
}

/* ---- blocks ---- */
static void kvli_block_free(kvl_cache *c, uint32_t id) {
    kvli_block *b = &c->blocks[id];
    if (c->desc.poison) c->ctx->backend->poison(c, c->address[id], c->classes[b->klass].bytes);
    c->classes[b->klass].live--;
    kvli_slot_give(c, b->slab, b->slot);
    b->slab = KVL_NONE;
    c->address[id] = 0;
    c->free_ids[c->n_free_ids++] = id;
}

static void kvli_ref(kvl_cache *c, uint32_t entry) {
    kvli_block *b = kvli_block_at(c, entry);
    kvli_lru_remove(c, entry & KVL_ENTRY_ID);
    if (b->refs == 0 && b->node != KVL_NONE && c->nodes[b->node].pins) c->classes[b->klass].pinned--;
    if (b->refs == 1) c->classes[b->klass].shared++;
    b->refs++;
}

/* The tree or nobody holds it now: make it evictable, or free it. */
static void kvli_settle(kvl_cache *c, uint32_t id) {
    kvli_block *b = &c->blocks[id];
    if (b->node == KVL_NONE)
        kvli_block_free(c, id);
    else if (c->nodes[b->node].pins)
        c->classes[b->klass].pinned++;
    else
        kvli_lru_push(c, id);
}

static void kvli_unref(kvl_cache *c, uint32_t entry) {
    kvli_block *b = kvli_block_at(c, entry);
    b->refs--;
    if (b->refs == 1) c->classes[b->klass].shared--;
    if (b->refs == 0) kvli_settle(c, entry & KVL_ENTRY_ID);
}

static bool kvli_evict_one(kvl_cache *c);

/* A block with one reference, or KVL_NONE. Takes a free slot, a free slab, a compacted one, or evicts, in
   this order. O(1) but for the last two. */
static uint32_t kvli_block_alloc(kvl_cache *c, uint32_t klass) {
    kvli_class *k = &c->classes[klass];
    while (k->partial == KVL_NONE) {
        if (c->n_free_slabs) {
            kvli_slab_take(c, klass);
            break;
        }
        if (!c->compacted && kvli_compact(c))
            c->compacted = true; /* one slab a step, unless nothing else is left */
        else if (!kvli_evict_one(c) && !kvli_compact(c))
            return KVL_NONE;
    }
    uint32_t id = c->free_ids[--c->n_free_ids];
    kvli_block *b = &c->blocks[id];
    b->refs = 1;
    b->node = KVL_NONE;
    b->klass = (uint8_t)klass;
    b->lru = KVLI_NO_LRU;
    b->reserved = false;
    k->live++;
    kvli_slot_take(c, klass, id);
    if (c->desc.poison) c->ctx->backend->poison(c, c->address[id], k->bytes);
    return kvli_entry(c, id);
}

/* Would so many more blocks of each class fit, with everything evictable evicted and slabs compacted? */
static bool kvli_fits_n(const kvl_cache *c, const uint32_t *need, uint32_t times, uint32_t n_slabs,
                        bool empty, uint64_t *slabs_needed) {
    uint64_t slabs = 0;
    for (uint32_t k = 0; k < c->geo.n_groups * 2; k++) {
        const kvli_class *class_ = &c->classes[k];
        if (!class_->bytes) continue;
        uint64_t n = (uint64_t)need[k] * times + (empty ? 0 : class_->live - class_->cached);
        slabs += (n + class_->per_slab - 1) / class_->per_slab;
    }
    if (slabs_needed) *slabs_needed = slabs;
    return slabs <= n_slabs;
}

static bool kvli_fits(const kvl_cache *c, const uint32_t *need, uint32_t n_slabs, bool empty,
                      uint64_t *slabs_needed) {
    return kvli_fits_n(c, need, 1, n_slabs, empty, slabs_needed);
}

/* Most blocks that one sequence holds at once while it grows to n_tokens in steps of at most chunk tokens. */
static void kvli_need(const kvl_cache *c, uint32_t n_tokens, uint32_t chunk, uint32_t *need) {
    uint32_t T = c->geo.block_tokens, all = kvli_div_up(n_tokens, T);
    for (uint32_t g = 0; g < c->geo.n_groups; g++) {
        const kvli_group *group = &c->groups[g];
        uint32_t blocks = all;
        if (group->window) {
            uint64_t live =
                ((uint64_t)group->window + chunk + T - 2) / T + 1 + kvli_div_up(group->sink_tokens, T);
            if (live < blocks) blocks = (uint32_t)live;
        }
        need[2 * g] = need[2 * g + 1] = 0;
        if (!group->two_class) {
            need[2 * g + 1] = blocks + 1; /* one more while a shared one is copied */
        } else {
            uint32_t sinks = kvli_min_u32(c->geo.sink_blocks, blocks);
            need[2 * g] = blocks - sinks;
            need[2 * g + 1] = sinks + 2; /* the open one, and one more while a shared one is copied */
        }
    }
}

/* ==== >>prefix: the tree of cached blocks ==== */
static uint64_t kvli_mix(uint64_t h, uint64_t x) {
    h = (h ^ x) * 0xD6E8FEB86659FD93ull;
    return h ^ h >> 32;
}

static uint64_t kvli_chain(const kvl_cache *c, uint64_t h, const int32_t *tokens) {
    for (uint32_t i = 0; i < c->geo.block_tokens; i += 2) { /* block_tokens is even */
        uint64_t pair = (uint32_t)tokens[i] | (uint64_t)(uint32_t)tokens[i + 1] << 32;
        h = kvli_mix(h, pair);
    }
    return h;
}

static uint64_t kvli_chain_root(uint64_t name_space, uint64_t salt) {
    return (name_space + 1) * 0x9E3779B97F4A7C15ull ^ (salt + 1) * 0xC2B2AE3D27D4EB4Full;
}

static uint32_t kvli_hash(const kvl_cache *c, uint32_t parent, const int32_t *tokens) {
    uint64_t h = kvli_chain(c, (parent + 1) * 0x9E3779B97F4A7C15ull, tokens);
    uint32_t bits = c->desc.lookup_hash_bits;
    return bits && bits < 32 ? (uint32_t)h & ((1u << bits) - 1) : (uint32_t)h;
}

/* The full child of a node with exactly these tokens, or KVL_NONE. A hash only leads here: parent and tokens
 * decide. */
static uint32_t kvli_child(const kvl_cache *c, uint32_t parent, const int32_t *tokens) {
    uint32_t hash = kvli_hash(c, parent, tokens);
    uint32_t n = c->buckets[hash & (c->n_buckets - 1)];
    for (; n != KVL_NONE; n = c->nodes[n].bucket_next)
        if (c->nodes[n].hash == hash && c->nodes[n].parent == parent &&
            memcmp(kvli_node_toks(c, n), tokens, c->geo.block_tokens * sizeof *tokens) == 0)
            return n;
    return KVL_NONE;
}

static uint32_t kvli_root_find(const kvl_cache *c, uint64_t name_space, uint64_t salt) {
    for (uint32_t n = c->roots; n != KVL_NONE; n = c->nodes[n].next)
        if (c->nodes[n].name_space == name_space && c->nodes[n].salt == salt) return n;
    return KVL_NONE;
}

static void kvli_sibling_link(kvl_cache *c, uint32_t *head, uint32_t n) {
    c->nodes[n].prev = KVL_NONE;
    c->nodes[n].next = *head;
    if (*head != KVL_NONE) c->nodes[*head].prev = n;
    *head = n;
}

static uint32_t *kvli_sibling_head(kvl_cache *c, uint32_t n) {
    const kvli_node *node = &c->nodes[n];
    if (node->parent == KVL_NONE) return &c->roots;
    if (node->n_tokens < c->geo.block_tokens) return &c->nodes[node->parent].first_partial;
    return &c->nodes[node->parent].first_child;
}

static uint32_t kvli_node_new(kvl_cache *c, uint32_t parent, const int32_t *tokens, uint32_t n_tokens) {
    uint32_t n = c->free_node;
    if (n == KVL_NONE) return KVL_NONE;
    kvli_node *node = &c->nodes[n];
    c->free_node = node->next;
    c->n_nodes++;
    memset(node, 0, sizeof *node);
    node->used = true;
    node->parent = parent;
    node->first_child = node->first_partial = node->bucket_next = KVL_NONE;
    node->n_tokens = n_tokens;
    for (uint32_t g = 0; g < c->geo.n_groups; g++) kvli_slots(c, n)[g] = KVL_NONE;
    if (parent != KVL_NONE) {
        memcpy(kvli_node_toks(c, n), tokens, n_tokens * sizeof *tokens);
        node->depth = c->nodes[parent].depth + (n_tokens == c->geo.block_tokens);
        node->name_space = c->nodes[parent].name_space;
        node->salt = c->nodes[parent].salt;
        if (n_tokens == c->geo.block_tokens) node->chain = kvli_chain(c, c->nodes[parent].chain, tokens);
    }
    if (n_tokens == c->geo.block_tokens) {
        node->hash = kvli_hash(c, parent, tokens);
        uint32_t *bucket = &c->buckets[node->hash & (c->n_buckets - 1)];
        node->bucket_next = *bucket;
        *bucket = n;
    }
    kvli_sibling_link(c, kvli_sibling_head(c, n), n);
    return n;
}

static uint32_t kvli_root_get(kvl_cache *c, uint64_t name_space, uint64_t salt) {
    uint32_t n = kvli_root_find(c, name_space, salt);
    if (n != KVL_NONE) return n;
    n = kvli_node_new(c, KVL_NONE, NULL, 0);
    if (n == KVL_NONE) return n;
    c->nodes[n].name_space = name_space;
    c->nodes[n].salt = salt;
    c->nodes[n].chain = kvli_chain_root(name_space, salt);
    return n;
}

static void kvli_bucket_remove(kvl_cache *c, uint32_t n) {
    uint32_t *at = &c->buckets[c->nodes[n].hash & (c->n_buckets - 1)];
    while (*at != n) at = &c->nodes[*at].bucket_next;
    *at = c->nodes[n].bucket_next;
}

/* Removes a node that holds and leads to nothing, and then its ancestors likewise. */
static void kvli_node_tidy(kvl_cache *c, uint32_t n) {
    while (n != KVL_NONE) {
        kvli_node *node = &c->nodes[n];
        if (node->n_slots || node->seqs || node->pins || node->first_child != KVL_NONE ||
            node->first_partial != KVL_NONE)
            return;
        uint32_t parent = node->parent;
        if (node->n_tokens == c->geo.block_tokens) kvli_bucket_remove(c, n);
        if (node->prev != KVL_NONE)
            c->nodes[node->prev].next = node->next;
        else
            *kvli_sibling_head(c, n) = node->next;
        if (node->next != KVL_NONE) c->nodes[node->next].prev = node->prev;
        node->used = false;
        node->next = c->free_node;
        c->free_node = n;
        c->n_nodes--;
        n = parent;
    }
}

static void kvli_slot_fill(kvl_cache *c, uint32_t n, uint32_t group, uint32_t entry) {
    kvli_slots(c, n)[group] = entry;
    c->nodes[n].n_slots++;
    kvli_block_at(c, entry)->node = n;
}

/* Takes a block out of the tree; the caller settles what becomes of the block and tidies the node. */
static void kvli_slot_clear(kvl_cache *c, uint32_t n, uint32_t group) {
    kvli_block_at(c, kvli_slots(c, n)[group])->node = KVL_NONE;
    kvli_slots(c, n)[group] = KVL_NONE;
    c->nodes[n].n_slots--;
}

static void kvli_evict_block(kvl_cache *c, uint32_t id) {
    uint32_t n = c->blocks[id].node, group = c->blocks[id].klass / 2u;
    if (c->nodes[n].chain) c->ghosts[c->nodes[n].chain & (c->n_ghosts - 1)] = c->nodes[n].chain;
    kvli_lru_remove(c, id);
    kvli_slot_clear(c, n, group);
    kvli_block_free(c, id);
    kvli_node_tidy(c, n);
    c->stats.evicted_blocks++;
}

/* Evicts of the lowest priority the block that was released first, where each time that a block was found again counts
   as half of how long blocks stay that never are. (Between least recently and least frequently used.) Paths are
   released deepest first and a node's priority and uses are at least its children's, so that a full-attention slot
   never goes before its children's. */
static bool kvli_evict_one(kvl_cache *c) {
    uint32_t best = KVL_NONE;
    double least = 0;
    for (uint32_t list = 0; list < KVLI_LRU_LISTS; list++) {
        uint32_t id = c->lru_head[list], uses = list % KVLI_USES;
        if (!uses && best != KVL_NONE) break; /* a higher priority */
        if (id == KVL_NONE) continue;
        double due = (double)c->blocks[id].released + uses * 0.5 * c->stay;
        if (best != KVL_NONE && due >= least) continue;
        best = id;
        least = due;
    }
    if (best == KVL_NONE) return false;
    if (c->blocks[best].lru % KVLI_USES == 0)
        c->stay += ((double)(c->released - c->blocks[best].released) - c->stay) / 256;
    kvli_evict_block(c, best);
    return true;
}

static void kvli_path_priority(kvl_cache *c, uint32_t n, uint8_t priority) {
    for (; n != KVL_NONE && c->nodes[n].priority < priority; n = c->nodes[n].parent)
        c->nodes[n].priority = priority;
}

/* ---- matching ---- */
typedef struct kvli_match {
    uint32_t root, depth; /* c->path[0..depth) are the nodes of the full blocks that match */
    uint32_t partial;     /* node whose first `rows` tokens go on from there, or KVL_NONE */
    uint32_t rows;
    uint32_t length;  /* from which computing can go on */
    uint32_t differs; /* longest common length with anything cached */
    bool ended;       /* what is cached ends there */
    kvl_match_reason reason;
} kvli_match;

static uint32_t kvli_common(const int32_t *a, const int32_t *b, uint32_t n) {
    uint32_t i = 0;
    while (i < n && a[i] == b[i]) i++;
    return i;
}

/* The sibling that shares the most first tokens: of the most recent ones of a list. */
static void kvli_best_sibling(const kvl_cache *c, uint32_t n, const int32_t *tokens, uint32_t n_tokens,
                              uint32_t *best, uint32_t *rows) {
    for (uint32_t i = 0; n != KVL_NONE && i < KVLI_SCAN; i++, n = c->nodes[n].next) {
        uint32_t common =
            kvli_common(kvli_node_toks(c, n), tokens, kvli_min_u32(n_tokens, c->nodes[n].n_tokens));
        if (common > *rows) {
            *rows = common;
            *best = n;
        }
    }
}

static bool kvli_all_exact(const kvl_cache *c, uint32_t n) {
    for (uint32_t g = 0; g < c->geo.n_groups; g++) {
        uint32_t entry = kvli_slots(c, n)[g];
        if (entry == KVL_NONE || !(entry & KVL_ENTRY_EXACT)) return false;
    }
    return true;
}

/* Which block would serve position block `index` of a sequence: its own table's, else the tree's. */
static uint32_t kvli_have(const kvl_cache *c, const uint32_t *table, uint32_t n_table, uint32_t depth,
                          uint32_t group, uint32_t index, uint32_t partial) {
    if (table && index < n_table && table[index] != KVL_NONE) return table[index];
    if (index < depth) return kvli_slots(c, c->path[index])[group];
    return partial != KVL_NONE ? kvli_slots(c, partial)[group] : KVL_NONE;
}

/* First block that a query at position `length` needs and that has gone, in one group; KVL_NONE if all are
 * there. */
static uint32_t kvli_first_missing(const kvl_cache *c, uint32_t seq, uint32_t group, const kvli_match *m,
                                   uint32_t length) {
    const uint32_t *table = seq == KVL_NONE ? NULL : kvli_table(c, seq, group);
    uint32_t n_table = seq == KVL_NONE ? 0 : c->seqs[seq].n_blocks, T = c->geo.block_tokens,
             end = kvli_div_up(length, T);
    uint32_t window = c->groups[group].window, sinks = kvli_div_up(c->groups[group].sink_tokens, T);
    uint32_t from = window && length + 1 > window ? (length + 1 - window) / T : 0;
    for (uint32_t i = 0; i < end; i++) {
        if (i >= sinks && i < from) i = from;
        if (i >= end) break;
        if (kvli_have(c, table, n_table, m->depth, group, i, m->partial) == KVL_NONE) return i;
    }
    return KVL_NONE;
}

/* Lowers a length to one from which computing can go on: not inside a packed block, and with every group's
 * slots there. */
static uint32_t kvli_lower(const kvl_cache *c, uint32_t seq, const kvli_match *m, uint32_t length) {
    uint32_t T = c->geo.block_tokens;
    for (uint32_t g = 0; g < c->geo.n_groups && length % T; g++) {
        uint32_t n_table = seq == KVL_NONE ? 0 : c->seqs[seq].n_blocks;
        uint32_t entry = kvli_have(c, seq == KVL_NONE ? NULL : kvli_table(c, seq, g), n_table, m->depth, g,
                                   length / T, m->partial);
        if (entry == KVL_NONE || !(entry & KVL_ENTRY_EXACT)) length -= length % T;
    }
    for (uint32_t g = 0; g < c->geo.n_groups && length;) {
        uint32_t missing = kvli_first_missing(c, seq, g, m, length);
        if (missing == KVL_NONE) {
            g++;
            continue;
        }
        length = missing * T;
        g = 0;
    }
    return length;
}

static bool kvli_known_elsewhere(const kvl_cache *c, const kvl_seq_desc *d) {
    uint32_t T = c->geo.block_tokens;
    for (uint32_t n = c->roots; n != KVL_NONE; n = c->nodes[n].next) {
        uint32_t best = KVL_NONE, rows = 0;
        if (d->n_tokens >= T && kvli_child(c, n, d->tokens) != KVL_NONE) return true;
        kvli_best_sibling(c, c->nodes[n].first_partial, d->tokens, kvli_min_u32(T, d->n_tokens), &best,
                          &rows);
        if (rows) return true;
    }
    return false;
}

/* Was the block after the matching ones here until lately? (By hash alone: it is only said, not used.) */
static bool kvli_was_evicted(const kvl_cache *c, const kvl_seq_desc *d, const kvli_match *m) {
    uint32_t T = c->geo.block_tokens;
    uint64_t chain =
        m->depth ? c->nodes[c->path[m->depth - 1]].chain : kvli_chain_root(d->name_space, d->salt);
    if ((m->depth + 1) * T > d->n_tokens || m->rows) return false;
    chain = kvli_chain(c, chain, d->tokens + m->depth * T);
    return c->ghosts[chain & (c->n_ghosts - 1)] == chain;
}

static kvl_match_reason kvli_reason(const kvl_cache *c, const kvl_seq_desc *d, const kvli_match *m,
                                    uint32_t full) {
    if (d->no_match) return KVL_MATCH_EMPTY;
    if (kvli_was_evicted(c, d, m)) return KVL_MATCH_EVICTED;
    if (c->n_nodes == 0) return KVL_MATCH_EMPTY;
    if (m->root == KVL_NONE) return kvli_known_elsewhere(c, d) ? KVL_MATCH_NAMESPACE : KVL_MATCH_END;
    if (m->length + 1 >= d->n_tokens) return KVL_MATCH_ALL;
    if (m->length < full - full % c->geo.block_tokens) return KVL_MATCH_EVICTED;
    if (m->differs + 1 >= d->n_tokens)
        return KVL_MATCH_ALL; /* the rest stands in a packed block and is needed for logits */
    if (m->length < m->differs) return KVL_MATCH_FORMAT;
    return m->ended ? KVL_MATCH_END : KVL_MATCH_TOKEN;
}

/* Finds the longest cached prefix of desc's tokens that can be gone on from, leaving at least one to run.
 * Changes nothing but c->path. */
static kvli_match kvli_match_find(kvl_cache *c, const kvl_seq_desc *d) {
    kvli_match m;
    uint32_t T = c->geo.block_tokens;
    memset(&m, 0, sizeof m);
    m.partial = KVL_NONE;
    m.root = d->n_tokens && !d->no_match ? kvli_root_find(c, d->name_space, d->salt) : KVL_NONE;
    if (m.root != KVL_NONE) {
        uint32_t at = m.root, left, rows = 0, best = KVL_NONE;
        while ((m.depth + 1) * T <= d->n_tokens) {
            uint32_t next = kvli_child(c, at, d->tokens + m.depth * T);
            if (next == KVL_NONE) break;
            c->path[m.depth++] = at = next;
        }
        left = d->n_tokens - m.depth * T;
        kvli_best_sibling(c, c->nodes[at].first_partial, d->tokens + m.depth * T, kvli_min_u32(left, T),
                          &best, &rows);
        uint32_t exact_rows = rows;
        kvli_best_sibling(c, c->nodes[at].first_child, d->tokens + m.depth * T, kvli_min_u32(left, T), &best,
                          &rows);
        m.differs = m.depth * T + rows;
        m.ended = rows ? c->nodes[best].n_tokens == rows
                       : c->nodes[at].first_child == KVL_NONE && c->nodes[at].first_partial == KVL_NONE;
        if (rows > exact_rows &&
            !kvli_all_exact(c, best)) { /* the shared rows are packed: a partial leaf may still serve some */
            best = KVL_NONE;
            rows = 0;
            kvli_best_sibling(c, c->nodes[at].first_partial, d->tokens + m.depth * T, kvli_min_u32(left, T),
                              &best, &rows);
        }
        m.partial = best;
        m.rows = rows;
    }
    uint32_t full = kvli_min_u32(m.depth * T + m.rows, d->n_tokens ? d->n_tokens - 1 : 0);
    m.length = kvli_lower(c, KVL_NONE, &m, full);
    m.reason = kvli_reason(c, d, &m, full);
    return m;
}

/* ---- sequences ---- */
static uint32_t kvli_seq_index(kvl_cache *c,
                               kvl_seq h) { /* KVL_NONE if the handle is not of an open sequence */
    uint32_t i = (h.id & 0xffff) - 1;
    if (!h.id || i >= c->max_seqs || !c->seqs[i].open || c->seqs[i].generation != h.id >> 16) return KVL_NONE;
    return i;
}
static kvl_seq kvli_seq_handle(const kvl_cache *c, uint32_t i) {
    kvl_seq h;
    h.id = (i + 1) | c->seqs[i].generation << 16;
    return h;
}
static int32_t *kvli_tail(const kvl_cache *c, uint32_t seq) {
    return c->tails + (size_t)seq * c->geo.block_tokens;
}
static kvli_reserve *kvli_reserve_of(const kvl_cache *c, uint32_t seq, uint32_t klass) {
    return &c->reserves[(size_t)seq * c->geo.n_groups * 2 + klass];
}

/* Moves a sequence's hold from one tree node to another (either may be KVL_NONE). */
static void kvli_seq_node(kvl_cache *c, uint32_t seq, uint32_t node) {
    uint32_t old = c->seqs[seq].node;
    if (node != KVL_NONE) c->nodes[node].seqs++;
    c->seqs[seq].node = node;
    if (old == KVL_NONE) return;
    c->nodes[old].seqs--;
    kvli_node_tidy(c, old);
}

static uint32_t kvli_node_depth(const kvl_cache *c, uint32_t node) {
    return node == KVL_NONE ? 0 : c->nodes[node].depth;
}

static bool kvli_node_room(kvl_cache *c) {
    while (c->free_node == KVL_NONE)
        if (!kvli_evict_one(c)) return false;
    return true;
}

/* References the blocks that a sequence of this length needs and does not have yet, from path and partial
 * node of a match. */
static void kvli_seq_acquire(kvl_cache *c, uint32_t seq, const kvli_match *m, uint32_t length) {
    uint32_t T = c->geo.block_tokens, end = kvli_div_up(length, T);
    for (uint32_t g = 0; g < c->geo.n_groups; g++) {
        uint32_t *table = kvli_table(c, seq, g), n_table = c->seqs[seq].n_blocks,
                 window = c->groups[g].window;
        uint32_t sinks = kvli_div_up(c->groups[g].sink_tokens, T),
                 from = window && length + 1 > window ? (length + 1 - window) / T : 0;
        for (uint32_t i = 0; i < end; i++) {
            bool had = i < n_table && table[i] != KVL_NONE;
            if (had) continue;
            table[i] = i < sinks || i >= from ? kvli_have(c, NULL, 0, m->depth, g, i, m->partial) : KVL_NONE;
            if (table[i] != KVL_NONE) kvli_ref(c, table[i]);
        }
    }
    c->seqs[seq].n_blocks = end;
    c->seqs[seq].length = length;
}

static uint32_t kvli_seq_slot(kvl_cache *c) {
    uint32_t i = c->free_seqs[--c->n_free_seqs], generation = c->seqs[i].generation;
    memset(&c->seqs[i], 0, sizeof c->seqs[i]);
    c->seqs[i].generation = generation;
    c->seqs[i].open = true;
    c->seqs[i].node = c->seqs[i].pin_node = c->seqs[i].step_span = KVL_NONE;
    for (uint32_t k = 0; k < c->geo.n_groups * 2; k++) {
        kvli_reserve_of(c, i, k)->head = KVL_NONE;
        kvli_reserve_of(c, i, k)->count = 0;
    }
    c->stats.sequences++;
    return i;
}

/* Opens a sequence on a match that was just found. There must be a free slot. */
static uint32_t kvli_seq_start(kvl_cache *c, const kvl_seq_desc *d, const kvli_match *m) {
    uint32_t i = kvli_seq_slot(c), T = c->geo.block_tokens, full = m->length / T, root = m->root;
    kvli_seq *seq = &c->seqs[i];
    seq->keep = !d->no_keep && !c->desc.no_prefix_cache;
    seq->priority = (uint8_t)d->priority;
    kvli_seq_acquire(c, i, m, m->length); /* first: what it references cannot be evicted for the root below */
    if (full)
        kvli_seq_node(c, i, c->path[full - 1]);
    else if (root != KVL_NONE)
        kvli_seq_node(c, i, root);
    else if (seq->keep && kvli_node_room(c))
        kvli_seq_node(c, i, kvli_root_get(c, d->name_space, d->salt));
    seq->attached = seq->keep && seq->node != KVL_NONE;
    seq->tail_known = true;
    if (m->length % T) memcpy(kvli_tail(c, i), d->tokens + full * T, (m->length % T) * sizeof *d->tokens);
    kvli_path_priority(c, seq->node, seq->priority);
    for (uint32_t d = 0; d < full; d++)
        if (c->nodes[c->path[d]].uses < KVLI_USES - 1) c->nodes[c->path[d]].uses++;
    c->stats.opened++;
    c->stats.open_tokens += d->n_tokens;
    c->stats.hit_tokens += m->length;
    return i;
}

static void kvli_reuse_report(const kvl_seq_desc *d, const kvli_match *m, kvl_reuse *out) {
    memset(out, 0, sizeof *out);
    out->matched = m->length;
    out->recomputed = d->n_tokens - m->length;
    out->reason = m->reason;
    if (m->reason == KVL_MATCH_TOKEN) out->first_differing = m->differs;
}

/* Leaves the open block in the tree as an exact partial leaf. */
static void kvli_leave_partial(kvl_cache *c, uint32_t i) {
    kvli_seq *seq = &c->seqs[i];
    uint32_t rows = seq->length % c->geo.block_tokens, index = seq->length / c->geo.block_tokens, n;
    if (!rows || !seq->attached || !seq->tail_known || kvli_node_depth(c, seq->node) != index) return;
    for (uint32_t g = 0; g < c->geo.n_groups; g++) {
        kvli_block *b = kvli_block_at(c, kvli_table(c, i, g)[index]);
        if (b->node != KVL_NONE || b->refs != 1) return; /* shared: its source is still there */
    }
    uint32_t scanned = 0, next;
    for (n = c->nodes[seq->node].first_partial; n != KVL_NONE && scanned < KVLI_SCAN; n = next, scanned++) {
        const kvli_node *leaf = &c->nodes[n];
        uint32_t first = kvli_slots(c, n)[0], have = leaf->n_tokens;
        next = leaf->next;
        if (kvli_common(kvli_node_toks(c, n), kvli_tail(c, i), kvli_min_u32(rows, have)) <
            kvli_min_u32(rows, have))
            continue;
        if (have >= rows && leaf->n_slots == c->geo.n_groups) return; /* it holds all of ours */
        if (first == KVL_NONE || kvli_block_at(c, first)->lru == KVLI_NO_LRU) continue;
        for (uint32_t g = 0; g < c->geo.n_groups; g++) { /* ours goes on from it: it is not needed any more */
            uint32_t entry = kvli_slots(c, n)[g];
            if (entry != KVL_NONE && kvli_block_at(c, entry)->lru != KVLI_NO_LRU)
                kvli_evict_block(c, entry & KVL_ENTRY_ID);
        }
    }
    if (!kvli_node_room(c)) return;
    n = kvli_node_new(c, seq->node, kvli_tail(c, i), rows);
    c->nodes[n].priority = seq->priority;
    for (uint32_t g = 0; g < c->geo.n_groups; g++) kvli_slot_fill(c, n, g, kvli_table(c, i, g)[index]);
}

static void kvli_seq_cut(kvl_cache *c, uint32_t i,
                         uint32_t n_blocks) { /* lets go of the blocks from n_blocks on, deepest first */
    for (uint32_t j = c->seqs[i].n_blocks; j-- > n_blocks;)
        for (uint32_t g = 0; g < c->geo.n_groups; g++) {
            uint32_t *entry = &kvli_table(c, i, g)[j];
            if (*entry != KVL_NONE) kvli_unref(c, *entry);
            *entry = KVL_NONE;
        }
    c->seqs[i].n_blocks = kvli_min_u32(c->seqs[i].n_blocks, n_blocks);
}

static void kvli_reserve_free(kvl_cache *c, uint32_t seq) {
    for (uint32_t k = 0; k < c->geo.n_groups * 2; k++) {
        kvli_reserve *r = kvli_reserve_of(c, seq, k);
        for (; r->head != KVL_NONE; r->count--) {
            uint32_t id = r->head;
            r->head = c->blocks[id].next;
            kvli_unref(c, id);
        }
    }
    c->seqs[seq].extended = 0;
}

static void kvli_seq_stop(kvl_cache *c, uint32_t i) {
    kvli_leave_partial(c, i);
    kvli_seq_cut(c, i, 0);
    kvli_reserve_free(c, i);
    kvli_seq_node(c, i, KVL_NONE);
    c->seqs[i].open = false;
    c->seqs[i].generation = (c->seqs[i].generation + 1) & 0xffff;
    c->free_seqs[c->n_free_seqs++] = i;
    c->stats.sequences--;
}

/* c->path becomes the nodes from the root's child down to `node`; returns how many. */
static uint32_t kvli_path_of(kvl_cache *c, uint32_t node) {
    uint32_t depth = kvli_node_depth(c, node);
    for (uint32_t i = depth; i-- > 0; node = c->nodes[node].parent) c->path[i] = node;
    return depth;
}

static uint32_t kvli_seq_shorten(kvl_cache *c, uint32_t i, uint32_t n_tokens) {
    kvli_seq *seq = &c->seqs[i];
    uint32_t T = c->geo.block_tokens;
    if (n_tokens >= seq->length) return seq->length;
    kvli_match m;
    memset(&m, 0, sizeof m);
    m.partial = KVL_NONE;
    m.depth = kvli_path_of(c, seq->node);
    uint32_t length = kvli_lower(c, i, &m, n_tokens), index = length / T;
    if (length % T && index < m.depth) {
        memcpy(kvli_tail(c, i), kvli_node_toks(c, c->path[index]), (length % T) * sizeof(int32_t));
        seq->tail_known = true;
    } else if (length % T && index != seq->length / T) {
        seq->tail_known = false;
    }
    seq->tail_known = seq->tail_known || length % T == 0;
    kvli_seq_cut(c, i, kvli_div_up(length, T));
    kvli_seq_acquire(c, i, &m, length);
    if (index < m.depth) {
        uint32_t node = c->path[m.depth - 1];
        for (uint32_t d = m.depth; d > index; d--) node = c->nodes[node].parent;
        kvli_seq_node(c, i, node);
    }
    seq->attached = seq->keep && !seq->tainted && seq->tail_known && seq->node != KVL_NONE &&
                    kvli_node_depth(c, seq->node) == index;
    return length;
}

static uint32_t kvli_seq_copy(kvl_cache *c, uint32_t from) { /* there must be a free slot */
    uint32_t i = kvli_seq_slot(c), generation = c->seqs[i].generation;
    c->seqs[i] = c->seqs[from];
    c->seqs[i].generation = generation;
    c->seqs[i].pin_node = c->seqs[i].step_span = KVL_NONE;
    c->seqs[i].extended = 0;
    c->seqs[i].scheduled = false;
    if (c->seqs[i].node != KVL_NONE) c->nodes[c->seqs[i].node].seqs++;
    memcpy(kvli_tail(c, i), kvli_tail(c, from), c->geo.block_tokens * sizeof(int32_t));
    for (uint32_t g = 0; g < c->geo.n_groups; g++)
        for (uint32_t j = 0; j < c->seqs[i].n_blocks; j++) {
            uint32_t entry = kvli_table(c, from, g)[j];
            kvli_table(c, i, g)[j] = entry;
            if (entry != KVL_NONE) kvli_ref(c, entry);
        }
    return i;
}

/* ---- reserves ---- */
static void kvli_reserve_push(kvl_cache *c, uint32_t seq, uint32_t entry) {
    uint32_t id = entry & KVL_ENTRY_ID;
    kvli_reserve *r = kvli_reserve_of(c, seq, c->blocks[id].klass);
    c->blocks[id].next = r->head;
    r->head = id;
    r->count++;
}

static uint32_t kvli_seq_alloc(kvl_cache *c, uint32_t seq, uint32_t klass) {
    kvli_reserve *r = kvli_reserve_of(c, seq, klass);
    uint32_t id = r->head;
    if (id == KVL_NONE) return kvli_block_alloc(c, klass);
    r->head = c->blocks[id].next;
    r->count--;
    c->blocks[id].reserved = true;
    return kvli_entry(c, id);
}

static bool kvli_is_private(kvl_cache *c, uint32_t entry) {
    const kvli_block *b = kvli_block_at(c, entry);
    return b->refs == 1 && b->node == KVL_NONE;
}

/* Blocks of a class that growing to `end` tokens takes beyond what the sequence has. */
static void kvli_growth(kvl_cache *c, uint32_t i, uint32_t end, uint32_t *need) {
    uint32_t T = c->geo.block_tokens, length = c->seqs[i].length;
    memset(need, 0, KVLI_MAX_CLASSES * sizeof *need);
    if (end <= length) return;
    for (uint32_t g = 0; g < c->geo.n_groups; g++) {
        uint32_t open = 0, most = 2; /* a step may seal one and open the next; then the first comes back */
        for (uint32_t j = length / T; j <= (end - 1) / T; j++) {
            bool had = j * T < length, complete = (j + 1) * T <= end, stays = kvli_stays_exact(c, g, j);
            bool fresh = !had || !kvli_is_private(c, kvli_table(c, i, g)[j]);
            if (stays) {
                need[kvli_class_of(c, g, true)] += fresh;
            } else {
                need[kvli_class_of(c, g, false)] += complete;
                if (!fresh) most = 1;
                open = kvli_min_u32(open + fresh, most);
            }
        }
        need[kvli_class_of(c, g, true)] += open;
    }
}

/* ==== >>steps: rows into pages ==== */
static void kvli_step_reset(kvl_cache *c) {
    kvli_step_state *st = &c->step;
    st->open = true;
    st->id++;
    st->view = &st->views[st->id & 1]; /* so that the last step's pointer is not taken for this one's */
    c->compacted = false;
    st->n_undo = st->n_own = st->n_copies = st->n_scratch = st->n_spans = st->n_rows = st->n_logits =
        st->layers_done = 0;
    st->failed = KVL_OK;
    memset(st->done, 0, c->geo.n_layers);
}

/* Gives up a block that this step took. */
static void kvli_step_drop(kvl_cache *c, uint32_t seq, uint32_t entry) {
    if (kvli_block_at(c, entry)->reserved)
        kvli_reserve_push(c, seq, entry);
    else
        kvli_unref(c, entry);
}

static void kvli_step_undo(kvl_cache *c, uint32_t mark) {
    kvli_step_state *st = &c->step;
    while (st->n_undo > mark) {
        const kvli_undo *u = &st->undo[--st->n_undo];
        uint32_t *entry = &kvli_table(c, u->seq, u->group)[u->index];
        kvli_step_drop(c, u->seq, *entry);
        if (u->own_entry != KVL_NONE) kvli_step_drop(c, u->seq, u->own_entry);
        *entry = u->old_entry;
    }
}

/* Finds places for one block of one group that a span writes: its sealed or lasting place goes into the
   table, where its exact rows stand during the step into *own. */
static bool kvli_step_block(kvl_cache *c, uint32_t seq, uint32_t g, uint32_t j, uint32_t end,
                            uint32_t scratch, uint32_t *own) {
    kvli_step_state *st = &c->step;
    uint32_t T = c->geo.block_tokens, *entry = &kvli_table(c, seq, g)[j],
             old = j * T < c->seqs[seq].length ? *entry : KVL_NONE;
    bool packs = (j + 1) * T <= end && !kvli_stays_exact(c, g, j);
    bool copies = old != KVL_NONE && !kvli_is_private(c, old), takes = copies || (old == KVL_NONE && !packs);
    uint32_t exact = old, target;
    if (old != KVL_NONE && !copies && !packs) {
        *own = old;
        return true;
    } /* the common case: a row more */
    if (takes) exact = kvli_seq_alloc(c, seq, kvli_class_of(c, g, true));
    if (takes && exact == KVL_NONE) return false;
    target = packs ? kvli_seq_alloc(c, seq, kvli_class_of(c, g, false)) : exact;
    if (target == KVL_NONE) {
        if (takes) kvli_step_drop(c, seq, exact);
        return false;
    }
    kvli_undo *u = &st->undo[st->n_undo++];
    u->seq = seq;
    u->group = g;
    u->index = j;
    u->old_entry = old;
    u->own_entry = copies && packs ? exact : KVL_NONE;
    if (copies) {
        kvl_copy *copy = &st->copies[st->n_copies++];
        copy->group = g;
        copy->src = old;
        copy->dst = exact;
    }
    *entry = target;
    *own = exact != KVL_NONE ? exact : KVL_ENTRY_SCRATCH | scratch;
    return true;
}

/* A sequence that alone holds a partial leaf and goes on from its end takes the leaf's blocks instead of
 * copying them. */
static void kvli_take_partial(kvl_cache *c, uint32_t i) {
    uint32_t T = c->geo.block_tokens, index = c->seqs[i].length / T, n = KVL_NONE;
    for (uint32_t g = 0; g < c->geo.n_groups; g++) {
        const kvli_block *b = kvli_block_at(c, kvli_table(c, i, g)[index]);
        if (b->refs != 1 || b->node == KVL_NONE || (g && b->node != n)) return;
        n = b->node;
        if (c->nodes[n].n_tokens != c->seqs[i].length % T || c->nodes[n].pins) return;
    }
    for (uint32_t g = 0; g < c->geo.n_groups; g++) kvli_slot_clear(c, n, g);
    kvli_node_tidy(c, n);
}

/* Adds rows of a sequence to the open step. NO_BLOCKS: this span changed nothing. */
static kvl_result kvli_step_add(kvl_cache *c, uint32_t i, const kvl_span *span, uint32_t request) {
    kvli_step_state *st = &c->step;
    uint32_t T = c->geo.block_tokens, position = c->seqs[i].length, end = position + span->n_tokens,
             first = position / T;
    uint32_t n_own = (end - 1) / T - first + 1, mark = st->n_undo, own_mark = st->n_own,
             copy_mark = st->n_copies, s = st->n_spans;
    uint32_t whole = position % T ? first + 1 : first; /* first block that starts in this step */
    if (position % T && c->seqs[i].attached) kvli_take_partial(c, i); /* who keeps nothing copies */
    for (uint32_t g = 0; g < c->geo.n_groups; g++) {
        kvl_span_blocks *b = &st->attend[(size_t)g * c->max_spans + s].blocks;
        b->table = kvli_table(c, i, g);
        b->n_blocks = first + n_own;
        b->first_own = first;
        b->n_own = n_own;
        b->own = st->own + st->n_own;
        for (uint32_t j = first; j < first + n_own; j++)
            if (!kvli_step_block(c, i, g, j, end, st->n_scratch + (j - whole), &st->own[st->n_own++])) {
                kvli_step_undo(c, mark);
                st->n_own = own_mark;
                st->n_copies = copy_mark;
                return KVL_NO_BLOCKS;
            }
    }
    if (end / T > whole) st->n_scratch += end / T - whole;
    kvl_step_span *out = &st->spans[s];
    out->seq = kvli_seq_handle(c, i);
    out->first_row = st->n_rows;
    out->n_rows = span->n_tokens;
    out->position = position;
    out->n_logits = span->n_logits;
    out->request = request;
    out->user = span->user;
    memcpy(st->tokens + st->n_rows, span->tokens, span->n_tokens * sizeof *span->tokens);
    for (uint32_t r = 0; r < span->n_tokens; r++) {
        st->positions[st->n_rows + r] = position + r;
        st->row_span[st->n_rows + r] = s;
    }
    st->taint[s] = 0;
    st->n_rows += span->n_tokens;
    st->n_spans++;
    c->seqs[i].step_span = s;
    return KVL_OK;
}

/* Another logits row of the step: row of `span` for `request`. */
static void kvli_step_logit(kvl_cache *c, uint32_t row, uint32_t request, void *user) {
    kvli_step_state *st = &c->step;
    st->logit_rows[st->n_logits] = row;
    st->logit_requests[st->n_logits] = request;
    st->logit_users[st->n_logits++] = user;
}

/* Of shapes alone, the same on all backends. */
static uint64_t kvli_step_key(const kvl_cache *c) {
    return (c->epoch * 0x9E3779B97F4A7C15ull) ^ ((uint64_t)c->step.n_rows << 32 | c->step.n_spans);
}

/* The step is complete: shows it, after its copies. An error: it is open, but cannot run. */
static kvl_result kvli_step_finish(kvl_cache *c) {
    kvli_step_state *st = &c->step;
    kvl_step *v = st->view;
    for (uint32_t g = 0; g < c->geo.n_groups; g++)
        for (uint32_t s = 0; s < st->n_spans; s++) {
            kvli_attend_span *a = &st->attend[(size_t)g * c->max_spans + s];
            a->first_row = st->spans[s].first_row;
            a->n_rows = st->spans[s].n_rows;
            a->position = st->spans[s].position;
            st->blocks[(size_t)g * st->n_spans + s] = a->blocks;
        }
    v->id = st->id;
    v->n_tokens = v->n_padded = st->n_rows;
    v->n_spans = st->n_spans;
    v->n_logits = st->n_logits;
    v->n_copies = st->n_copies;
    v->scratch_address = c->scratch;
    v->graph_key = kvli_step_key(c);
    return c->ctx->backend->step(c);
}

/* Hangs the block that a sequence has just filled under its node. An equal block that is there already takes
 * the place of ours. */
static void kvli_seq_hang(kvl_cache *c, uint32_t i, uint32_t index) {
    kvli_seq *seq = &c->seqs[i];
    if (!seq->attached || kvli_node_depth(c, seq->node) != index) return;
    uint32_t n = kvli_child(c, seq->node, kvli_tail(c, i));
    if (n == KVL_NONE && kvli_node_room(c))
        n = kvli_node_new(c, seq->node, kvli_tail(c, i), c->geo.block_tokens);
    if (n == KVL_NONE) {
        seq->attached = false;
        return;
    }
    for (uint32_t g = 0; g < c->geo.n_groups; g++) {
        uint32_t *entry = &kvli_table(c, i, g)[index], there = kvli_slots(c, n)[g];
        if (there == KVL_NONE) {
            kvli_slot_fill(c, n, g, *entry);
            continue;
        }
        if (there == *entry) continue;
        kvli_ref(c, there);
        kvli_unref(c, *entry);
        *entry = there;
        c->stats.duplicate_blocks++;
    }
    kvli_seq_node(c, i, n);
    kvli_path_priority(c, n, seq->priority);
}

/* Lets go of the blocks that no later query of this sequence can see. */
static void kvli_seq_slide(kvl_cache *c, uint32_t i) {
    uint32_t T = c->geo.block_tokens, length = c->seqs[i].length;
    for (uint32_t g = 0; g < c->geo.n_groups; g++) {
        uint32_t window = c->groups[g].window, sinks = kvli_div_up(c->groups[g].sink_tokens, T),
                 *table = kvli_table(c, i, g);
        if (!window || length + 1 <= window) continue;
        for (uint32_t j = (length + 1 - window) / T; j-- > sinks && table[j] != KVL_NONE;) {
            kvli_unref(c, table[j]);
            table[j] = KVL_NONE;
        }
    }
}

static void kvli_span_commit(kvl_cache *c, uint32_t s) {
    kvli_step_state *st = &c->step;
    const kvl_step_span *span = &st->spans[s];
    uint32_t i = (span->seq.id & 0xffff) - 1, T = c->geo.block_tokens, n = span->n_rows;
    const int32_t *tokens = st->tokens + span->first_row;
    kvli_seq *seq = &c->seqs[i];
    if (st->taint[s] && !seq->tainted) {
        seq->tainted = true;
        seq->attached = false;
        c->stats.tainted_sequences++;
    }
    seq->step_span = KVL_NONE;
    seq->n_blocks = kvli_div_up(seq->length + n, T);
    while (n) {
        uint32_t row = seq->length % T, k = kvli_min_u32(T - row, n);
        memcpy(kvli_tail(c, i) + row, tokens, k * sizeof *tokens);
        if (row == 0) seq->tail_known = true;
        tokens += k;
        n -= k;
        seq->length += k;
        if (seq->length % T == 0) kvli_seq_hang(c, i, seq->length / T - 1);
    }
    kvli_seq_slide(c, i);
    if (seq->extended && seq->length >= seq->extended) kvli_reserve_free(c, i);
}

/* Lets go of a block that the step held: an exact block whose rows are sealed now goes back to what was
 * reserved for its sequence. */
static void kvli_step_release(kvl_cache *c, uint32_t seq, uint32_t entry) {
    if (entry == KVL_NONE) return;
    if (c->seqs[seq].extended && kvli_is_private(c, entry))
        kvli_reserve_push(c, seq, entry);
    else
        kvli_unref(c, entry);
}

static void kvli_step_commit(kvl_cache *c) {
    kvli_step_state *st = &c->step;
    for (uint32_t u = 0; u < st->n_undo; u++) {
        kvli_step_release(c, st->undo[u].seq, st->undo[u].old_entry);
        kvli_step_release(c, st->undo[u].seq, st->undo[u].own_entry);
    }
    st->n_undo = 0;
    for (uint32_t s = 0; s < st->n_spans; s++) kvli_span_commit(c, s);
    st->open = false;
}

static void kvli_step_rollback(kvl_cache *c) {
    kvli_step_state *st = &c->step;
    kvli_step_undo(c, 0);
    for (uint32_t s = 0; s < st->n_spans; s++)
        c->seqs[(st->spans[s].seq.id & 0xffff) - 1].step_span = KVL_NONE;
    st->open = false;
}

static kvl_result kvli_step_is(kvl_cache *c, const kvl_step *step, const char *call) {
    if (!c->step.open || step != c->step.view)
        return KVLI_ERROR(c, KVL_MISMATCH, "%s: this is not the open step", call);
    return KVL_OK;
}

static kvl_result kvli_step_complete(kvl_cache *c, const kvl_step *step, const char *call) {
    kvl_result r = kvli_step_is(c, step, call);
    if (r == KVL_OK && c->step.layers_done < c->geo.n_layers)
        r = KVLI_ERROR(c, KVL_MISMATCH, "%s: kvl_attend has run for %u of %u layers", call,
                       c->step.layers_done, c->geo.n_layers);
    return r == KVL_OK ? c->ctx->backend->finish(c) : r;
}

/* Resident bytes, blocks by class: what the owner's calls leave for other threads to read. O(classes). */
static void kvli_publish(kvl_cache *c) {
    kvl_stats *s = &c->stats;
    uint64_t used = 0, cached = 0;
    for (uint32_t e = 0; e < 2; e++) {
        s->blocks_used[e] = s->blocks_shared[e] = s->blocks_cached[e] = s->blocks_pinned[e] =
            s->blocks_free[e] = 0;
        for (uint32_t g = 0; g < c->geo.n_groups; g++) {
            const kvli_class *k = &c->classes[2 * g + e];
            uint32_t in_use = k->live - k->cached - k->pinned;
            s->blocks_used[e] += in_use;
            s->blocks_shared[e] += k->shared;
            s->blocks_cached[e] += k->cached;
            s->blocks_pinned[e] += k->pinned;
            s->blocks_free[e] += k->slabs * k->per_slab - k->live;
            used += (uint64_t)in_use * k->bytes;
            cached += (uint64_t)(k->cached + k->pinned) * k->bytes;
        }
    }
    s->bytes_used = used;
    s->bytes_cached = cached;
    s->slabs = c->n_slabs;
    s->slabs_free = c->n_free_slabs;
    s->bytes_slabs = (uint64_t)c->n_slabs * c->slab_bytes;
    s->bytes_scratch = c->scratch ? c->scratch_bytes : 0;
    s->bytes_workspace = c->scratch ? c->workspace_bytes : 0;
    uint64_t device = s->bytes_slabs + s->bytes_scratch + s->bytes_workspace;
    if (device > s->device_peak) s->device_peak = device;
    s->nodes = c->n_nodes;
    kvli_lock(&c->lock);
    c->published = *s;
    kvli_unlock(&c->lock);
}

/* ==== >>sched: which tokens run next ==== */
enum {
    KVLI_MAX_STOP = 8,
    KVLI_WAIT_LISTS = 2 * KVLI_PRIORITIES,
    KVLI_LOOKAHEAD = 32,
    KVLI_PASSED_OVER = 64,
    KVLI_PASSERS = 16, /* so many in the queue are looked at for one that fits */
    KVLI_BEGUN = 8,
    KVLI_COSTS = 5,
    KVLI_LENGTHS = 208, /* of answers: eight a power of two, up to 2^28 */
    KVLI_AHEAD = 32,    /* points in time that a forecast of memory looks at */
    KVLI_STALL = 16     /* steps after which a refused admission is tried again though nothing was freed */
};

typedef struct kvli_req {
    uint32_t generation;
    bool used, finished, cancel; /* under the lock: also read by other threads */
    bool no_match, no_keep, joining, decode;
    uint8_t klass, priority, n_stop, finish;
    uint32_t n_prompt, n_tokens, capacity;  /* tokens[0..n_tokens) are known, capacity is the limit */
    uint32_t seq;                           /* KVL_NONE while waiting */
    uint32_t prev, next;                    /* in a waiting list, the inbox, the finished or the free list */
    uint32_t parent, first_fork, next_fork; /* forks that wait for their parent's next logits row */
    uint32_t preemptions, passed_over;
    uint64_t admitted_step, arrival, name_space, salt;
    uint64_t submit_ns, first_ns, last_ns, finish_ns;
    int32_t *tokens;
    int32_t stop[KVLI_MAX_STOP];
    kvl_reuse reuse;
    void *user;
} kvli_req;

typedef struct kvli_list {
    uint32_t head, tail;
} kvli_list;

typedef struct kvli_budget { /* of the step being planned */
    uint32_t rows;           /* left */
    double ms, bound;        /* predicted so far; what it may reach, 0 = no bound */
    uint32_t prefill_rows, decode_rows, background_rows;
    double kv_tokens, prefill_kv_tokens; /* that decodes and prefills attend to */
    bool starved;                        /* somebody found no blocks: admit nobody */
} kvli_budget;

typedef struct kvli_recorder { /* the owner's thread alone touches it */
    bool on, failed;
    uint8_t *buffer; /* the chunk being filled, after room for its head */
    uint32_t used;
    uint64_t bytes, clock, digest, preemptions, refused; /* as last written */
} kvli_recorder;
typedef struct kvli_lengths { /* of the answers that ended lately; older ones fade */
    double weight[KVLI_LENGTHS], total;
    float mean[KVLI_LENGTHS], variance[KVLI_LENGTHS]; /* of those in this bucket and above */
} kvli_lengths;

typedef struct kvli_ahead {          /* running requests by how many tokens from now they are likely to end */
    double width;                    /* tokens of one stretch of time; 0: not made for this state */
    double alive, pending, variance; /* requests; rows of prefill that have no memory yet; of what is left */
    double count[KVLI_AHEAD], grow[KVLI_AHEAD], held[KVLI_AHEAD];
} kvli_ahead;

struct kvl_sched {
    kvl_cache *cache;
    kvl_sched_desc desc;
    size_t arena_bytes;
    kvli_req *reqs;
    uint32_t max_reqs, *running, *order, n_running, n_active,
        n_streams; /* active = neither free nor finished */
    kvli_list waiting[KVLI_WAIT_LISTS], inbox, finished;
    uint32_t free_req, n_records, n_inbox, n_waiting, n_joining,
        n_cancels; /* records = active and finished */
    uint64_t arrivals, token_bytes, finished_bytes, events, seen_events, n_preemptions;
    bool closed, closing, step_open; /* closing: plan has seen that it was closed and all are taken in */
    uint64_t plan_ns;
    kvli_budget budget;
    kvl_cost cost;
    double a[KVLI_COSTS][KVLI_COSTS], b[KVLI_COSTS],
        margin; /* decayed sums of the regression; how far steps overrun its prediction */
    kvli_lengths lengths;
    kvli_ahead ahead[2]; /* for interactive work, for background work */
    uint32_t stalled; /* request that found no room at step stalled_id, KVL_NONE if memory was freed since */
    uint64_t stalled_id;
    kvli_cond wake;
    kvl_output *outputs; /* [max_logits] for the short form of commit */
    kvl_stats stats;
    kvli_histogram gap, ttft, step;
    kvli_recorder record;
    char error[256];
};

static kvli_text kvli_serr(kvl_sched *s) { return kvli_text_at(s->error, sizeof s->error); }

/* >>events: each writes one event if the scheduler is being recorded */
static void kvli_record_submit(kvl_sched *s, const kvli_req *q);
static void kvli_record_fork(kvl_sched *s, const kvli_req *q, uint64_t parent);
static void kvli_record_request(kvl_sched *s, kvl_event e, uint64_t request);
static void kvli_record_event(kvl_sched *s, kvl_event e);
static void kvli_record_plan(kvl_sched *s, kvl_result r);
static void kvli_record_commit(kvl_sched *s, const kvl_output *outputs, uint64_t now);

/* ---- percentiles: eight buckets a power of two, from a microsecond on ---- */
static void kvli_histogram_add(kvli_histogram *h, double ms) {
    double us = ms * 1000;
    int bucket = us <= 1 ? 0 : (int)(log2(us) * 8);
    h->bucket[bucket > 255 ? 255 : bucket]++;
    h->count++;
    if (ms > h->max) h->max = ms;
}

static double kvli_quantile(const kvli_histogram *h, double q) {
    uint64_t rank = (uint64_t)(q * (double)h->count), sum = 0;
    for (int i = 0; i < 256; i++) {
        sum += h->bucket[i];
        if (sum > rank) {
            double ms = exp2((i + 0.5) / 8) / 1000;
            return ms < h->max ? ms : h->max;
        }
    }
    return h->max;
}

static kvl_percentiles kvli_percentiles(const kvli_histogram *h) {
    kvl_percentiles p;
    p.p50 = kvli_quantile(h, 0.5);
    p.p95 = kvli_quantile(h, 0.95);
    p.p99 = kvli_quantile(h, 0.99);
    p.max = h->max;
    p.count = h->count;
    return p;
}

/* ---- the cost of a step, learnt: ridge regression on decayed sums, weights kept non-negative ---- */
static void kvli_cost_solve(double a[KVLI_COSTS][KVLI_COSTS], const double *b,
                            double *w) { /* Gauss-Seidel with projection: a is small and convex */
    for (int round = 0; round < 60; round++)
        for (int i = 0; i < KVLI_COSTS; i++) {
            double r = b[i];
            for (int j = 0; j < KVLI_COSTS; j++) r -= j == i ? 0 : a[i][j] * w[j];
            w[i] = r > 0 ? r / a[i][i] : 0;
        }
}

static void kvli_cost_learn(kvl_sched *s, double ms) {
    static const double unit[KVLI_COSTS] = {1, 64, 8, 0.05, 0.05}; /* features of about one */
    const kvli_budget *u = &s->budget;
    const double x[KVLI_COSTS] = {1, u->prefill_rows / unit[1], u->decode_rows / unit[2],
                                  u->kv_tokens / 1e6 / unit[3], u->prefill_kv_tokens / 1e6 / unit[4]};
    double *const known[KVLI_COSTS] = {&s->cost.step_ms, &s->cost.prefill_token_ms, &s->cost.decode_ms,
                                       &s->cost.kv_megatoken_ms, &s->cost.prefill_kv_megatoken_ms};
    double a[KVLI_COSTS][KVLI_COSTS], b[KVLI_COSTS], w[KVLI_COSTS], predicted = u->ms;
    if (predicted > 0 && ms > predicted * s->margin)
        s->margin += 0.25 * (ms / predicted - s->margin);
    else
        s->margin += 0.02 * (1 - s->margin);
    if (s->margin > 2) s->margin = 2;
    for (int i = 0; i < KVLI_COSTS; i++) {
        for (int j = 0; j < KVLI_COSTS; j++) s->a[i][j] = 0.97 * s->a[i][j] + x[i] * x[j];
        s->b[i] = 0.97 * s->b[i] + x[i] * ms;
    }
    for (int i = 0; i < KVLI_COSTS;
         i++) { /* a weak pull to what was known keeps directions that do not occur */
        for (int j = 0; j < KVLI_COSTS; j++) a[i][j] = s->a[i][j] + (i == j ? 1e-2 : 0);
        w[i] = *known[i] * unit[i];
        b[i] = s->b[i] + 1e-2 * w[i];
    }
    kvli_cost_solve(a, b, w);
    for (int i = 0; i < KVLI_COSTS; i++) *known[i] = w[i] / unit[i];
}

static double kvli_rows_cost(const kvl_sched *s, uint32_t position, uint32_t rows, bool decode) {
    double kv = (double)rows * position + 0.5 * (double)rows * rows;
    return s->margin * (rows * (decode ? s->cost.decode_ms : s->cost.prefill_token_ms) +
                        kv * (decode ? s->cost.kv_megatoken_ms : s->cost.prefill_kv_megatoken_ms) / 1e6);
}

static void kvli_budget_take(kvl_sched *s, uint32_t position, uint32_t rows, bool decode, bool background) {
    kvli_budget *u = &s->budget;
    u->rows -= rows;
    u->ms += kvli_rows_cost(s, position, rows, decode);
    *(decode ? &u->kv_tokens : &u->prefill_kv_tokens) += (double)rows * position + 0.5 * (double)rows * rows;
    if (decode)
        u->decode_rows += rows;
    else
        u->prefill_rows += rows;
    if (background) u->background_rows += rows;
}

/* Rows of prefill that may still run in this step: within the bound, but once a step at least the smallest
 * chunk. */
static uint32_t kvli_chunk(const kvl_sched *s, uint32_t position, uint32_t remaining) {
    const kvli_budget *u = &s->budget;
    uint32_t T = s->cache->geo.block_tokens, n = kvli_min_u32(remaining, u->rows), low = 0, high = n;
    if (u->bound > 0) {
        bool known = s->cost.prefill_token_ms > 0;
        uint32_t least = kvli_min_u32(s->desc.min_chunk, n);
        if (u->prefill_rows && u->ms + kvli_rows_cost(s, position, least, false) > u->bound) return 0;
        while (known && low < high) {
            uint32_t mid = low + (high - low + 1) / 2;
            if (u->ms + kvli_rows_cost(s, position, mid, false) <= u->bound)
                low = mid;
            else
                high = mid - 1;
        }
        n = kvli_min_u32(n, low);
        if (n < s->desc.min_chunk && n < remaining)
            n = u->prefill_rows ? 0 : kvli_min_u32(kvli_min_u32(s->desc.min_chunk, remaining), u->rows);
    }
    uint32_t past = (position + n) % T; /* ends on a block where it can: no open block is left behind */
    if (n < remaining && n > past && n - past >= s->desc.min_chunk) n -= past;
    return n;
}

/* ---- how long answers get: what running requests will still need is guessed from those that ended ----
   Source: Gong et al. 2025 (Past-Future scheduler), with a conditional mean and deviation in place of samples. */
static uint32_t kvli_length_bucket(uint32_t n) { /* eight steps of equal width in each power of two */
    uint32_t power = 0;
    if (n < 8) return n;
    while (n >> power >= 16) power++;
    return kvli_min_u32((power << 3) + (n >> power), KVLI_LENGTHS - 1);
}
static double kvli_bucket_length(uint32_t b) { /* its middle */
    return b < 8 ? b : ldexp((b & 7) + 8.5, (int)(b >> 3) - 1);
}

static void kvli_length_learn(kvli_lengths *l, uint32_t n) {
    double w = 0, sum = 0, squares = 0;
    l->total = l->total * 0.995 + 1;
    for (uint32_t b = KVLI_LENGTHS; b-- > 0;) {
        double length = kvli_bucket_length(b);
        l->weight[b] *= 0.995;
        if (b == kvli_length_bucket(n)) l->weight[b] += 1;
        w += l->weight[b];
        sum += l->weight[b] * length;
        squares += l->weight[b] * length * length;
        double mean = w > 0.25 ? sum / w : 0, variance = w > 0.25 ? squares / w - mean * mean : 0;
        l->mean[b] = (float)mean; /* 0: too few to say */
        l->variance[b] = variance > 0 ? (float)variance : 0;
    }
}

/* Tokens that a request is likely to generate yet, and their variance. */
static double kvli_remaining(const kvl_sched *s, const kvli_req *q, double *variance) {
    uint32_t done = q->n_tokens - q->n_prompt, most = q->capacity - q->n_tokens;
    uint32_t b = done ? kvli_min_u32(kvli_length_bucket(done) + 1, KVLI_LENGTHS - 1) : 0;
    double mean = (double)s->lengths.mean[b],
           left = mean > done ? mean - done : done; /* longer than any: as long again */
    *variance = mean > 0 ? (double)s->lengths.variance[b] : 0;
    return left < most ? left : most;
}

/* ---- lists ---- */
static void kvli_list_append(kvl_sched *s, kvli_list *l, uint32_t r) {
    s->reqs[r].next = KVL_NONE;
    s->reqs[r].prev = l->tail;
    if (l->tail != KVL_NONE)
        s->reqs[l->tail].next = r;
    else
        l->head = r;
    l->tail = r;
}
static void kvli_list_remove(kvl_sched *s, kvli_list *l, uint32_t r) {
    const kvli_req *q = &s->reqs[r];
    if (q->prev != KVL_NONE)
        s->reqs[q->prev].next = q->next;
    else
        l->head = q->next;
    if (q->next != KVL_NONE)
        s->reqs[q->next].prev = q->prev;
    else
        l->tail = q->prev;
}

static kvli_list *kvli_waiting_list(kvl_sched *s, uint32_t r) {
    uint32_t level = s->desc.policy == KVL_POLICY_PRIORITY ? KVLI_PRIORITIES - 1u - s->reqs[r].priority : 0;
    return &s->waiting[s->reqs[r].klass * KVLI_PRIORITIES + level];
}

/* In order of arrival: the preempted come back to the front. */
static void kvli_wait_push(kvl_sched *s, uint32_t r) {
    kvli_list *l = kvli_waiting_list(s, r);
    uint32_t at = l->head;
    s->n_waiting++;
    if (l->tail == KVL_NONE || s->reqs[l->tail].arrival < s->reqs[r].arrival) {
        kvli_list_append(s, l, r);
        return;
    }
    while (s->reqs[at].arrival < s->reqs[r].arrival) at = s->reqs[at].next;
    kvli_req *q = &s->reqs[r];
    q->next = at;
    q->prev = s->reqs[at].prev;
    if (q->prev != KVL_NONE)
        s->reqs[q->prev].next = r;
    else
        l->head = r;
    s->reqs[at].prev = r;
}
static void kvli_wait_remove(kvl_sched *s, uint32_t r) {
    kvli_list_remove(s, kvli_waiting_list(s, r), r);
    s->n_waiting--;
}

/* Rank: class, then priority under that policy, then arrival. Memory goes to the better rank. */
static bool kvli_outranks(const kvl_sched *s, uint32_t a, uint32_t b) {
    const kvli_req *x = &s->reqs[a], *y = &s->reqs[b];
    if (x->klass != y->klass) return x->klass < y->klass;
    if (s->desc.policy == KVL_POLICY_PRIORITY && x->priority != y->priority) return x->priority > y->priority;
    return x->arrival < y->arrival;
}

static uint32_t kvli_run_insert(kvl_sched *s, uint32_t r) { /* returns its place */
    memset(s->ahead, 0, sizeof s->ahead);
    uint32_t at = s->n_running++;
    for (; at && kvli_outranks(s, r, s->running[at - 1]); at--) s->running[at] = s->running[at - 1];
    s->running[at] = r;
    return at;
}
static void kvli_run_remove(kvl_sched *s, uint32_t r) {
    memset(s->ahead, 0, sizeof s->ahead);
    uint32_t at = 0;
    while (s->running[at] != r) at++;
    s->n_running--;
    memmove(s->running + at, s->running + at + 1, (s->n_running - at) * sizeof *s->running);
}

static kvl_req kvli_req_handle(const kvl_sched *s, uint32_t r) {
    kvl_req h;
    h.id = (r + 1) | s->reqs[r].generation << 20;
    return h;
}
static uint32_t kvli_req_index(const kvl_sched *s, kvl_req h) { /* under the lock */
    uint32_t r = (h.id & 0xfffff) - 1;
    if (!h.id || r >= s->max_reqs || !s->reqs[r].used || s->reqs[r].generation != h.id >> 20) return KVL_NONE;
    return r;
}

/* ---- life of a request ---- */
static void kvli_decode_state(kvl_sched *s, uint32_t r, bool decode) {
    kvli_req *q = &s->reqs[r];
    if (q->klass == KVL_INTERACTIVE) s->n_streams += (uint32_t)decode - (uint32_t)q->decode;
    q->decode = decode;
}

static void kvli_fork_unlink(kvl_sched *s, uint32_t r) {
    kvli_req *q = &s->reqs[r];
    uint32_t *at = &s->reqs[q->parent].first_fork;
    while (*at != r) at = &s->reqs[*at].next_fork;
    *at = q->next_fork;
    q->parent = q->next_fork = KVL_NONE;
}

/* A fork that cannot join its parent goes on as a request of its own. */
static void kvli_fork_detach(kvl_sched *s, uint32_t r) {
    kvli_fork_unlink(s, r);
    s->reqs[r].joining = false;
    kvli_wait_push(s, r);
}
static void kvli_forks_detach(kvl_sched *s, uint32_t parent) {
    while (s->reqs[parent].first_fork != KVL_NONE) kvli_fork_detach(s, s->reqs[parent].first_fork);
}

static void kvli_req_end(kvl_sched *s, uint32_t r,
                         kvl_finish why) { /* under the lock; it is in no waiting list */
    kvli_req *q = &s->reqs[r];
    if (q->parent != KVL_NONE) kvli_fork_unlink(s, r);
    kvli_forks_detach(s, r);
    if (q->seq != KVL_NONE) {
        kvli_decode_state(s, r, false);
        kvli_run_remove(s, r);
        kvli_seq_stop(s->cache, q->seq);
        q->seq = KVL_NONE;
    }
    if (q->cancel) s->n_cancels--; /* it ended before its cancel was taken in */
    q->cancel = false;
    q->finished = true;
    q->finish = (uint8_t)why;
    q->finish_ns = kvli_now(s->cache->ctx);
    if (why <= KVL_FINISH_APP && q->n_tokens > q->n_prompt)
        kvli_length_learn(&s->lengths, q->n_tokens - q->n_prompt);
    s->stalled = KVL_NONE;
    kvli_list_append(s, &s->finished, r);
    s->finished_bytes += (uint64_t)q->capacity * sizeof *q->tokens;
    s->n_active--;
    s->stats.finished++;
    s->stats.cancelled += why == KVL_FINISH_CANCELLED;
    s->stats.refused += why == KVL_FINISH_REFUSED;
}

/* Preemption by recompute: its blocks stay in the tree until others need the room, so often little is
 * computed again. */
static void kvli_preempt(kvl_sched *s, uint32_t r) {
    kvli_req *q = &s->reqs[r];
    kvli_forks_detach(s, r);
    kvli_decode_state(s, r, false);
    kvli_run_remove(s, r);
    kvli_seq_stop(s->cache, q->seq);
    q->seq = KVL_NONE;
    q->preemptions++;
    s->n_preemptions++;
    s->stalled = KVL_NONE;
    kvli_wait_push(s, r);
}

/* The worst-ranked running request behind place `after` that is not in the step; one whose answer has not begun,
   if there is one, since nobody sees it wait. */
static bool kvli_preempt_behind(kvl_sched *s, uint32_t after) {
    uint32_t victim = KVL_NONE;
    for (uint32_t at = s->n_running; at-- > after;) {
        const kvli_req *q = &s->reqs[s->running[at]];
        if (s->cache->seqs[q->seq].step_span != KVL_NONE && s->cache->step.open) continue;
        if (victim == KVL_NONE || !q->decode) victim = s->running[at];
        if (!q->decode || q->klass == KVL_BACKGROUND) break;
    }
    if (victim == KVL_NONE) return false;
    kvli_preempt(s, victim);
    return true;
}

static bool kvli_sched_preempt_any(kvl_cache *c) { return c->sched && kvli_preempt_behind(c->sched, 0); }

static bool kvli_sched_owns_step(const kvl_cache *c) { return c->sched && c->sched->step_open; }

/* ---- planning ---- */
/* Takes in the submits that came before `arrival`. Under the lock, which a recording lets go for each: nobody else
   takes from the inbox, and who is in it stays as it is. */
static void kvli_inbox_take(kvl_sched *s, uint64_t arrival) {
    while (s->inbox.head != KVL_NONE && s->reqs[s->inbox.head].arrival < arrival) {
        uint32_t r = s->inbox.head;
        if (s->record.on) {
            kvli_unlock(&s->cache->lock);
            kvli_record_submit(s, &s->reqs[r]);
            kvli_lock(&s->cache->lock);
        }
        kvli_list_remove(s, &s->inbox, r);
        s->n_inbox--;
        kvli_wait_push(s, r);
    }
}

static uint32_t kvli_sched_intake(
    kvl_sched *s) { /* what other threads asked for since the last plan; returns how many requests live */
    kvli_lock(&s->cache->lock);
    s->seen_events = s->events;
    kvli_inbox_take(s, s->arrivals);
    for (uint32_t r = 0; s->n_cancels && r < s->max_reqs; r++) {
        kvli_req *q = &s->reqs[r];
        if (!q->used || !q->cancel || q->finished ||
            (s->n_inbox && q->arrival >= s->reqs[s->inbox.head].arrival))
            continue;
        if (s->record.on) {
            kvli_unlock(&s->cache->lock);
            kvli_record_request(s, KVL_EVENT_CANCEL, q->arrival);
            kvli_lock(&s->cache->lock);
        }
        if (q->seq == KVL_NONE && q->parent == KVL_NONE) kvli_wait_remove(s, r);
        kvli_req_end(s, r, KVL_FINISH_CANCELLED);
    }
    uint32_t n = s->n_active - s->n_inbox;
    bool closing = s->closed && !s->n_inbox, closes = closing && !s->closing;
    s->closing = closing;
    kvli_unlock(&s->cache->lock);
    if (closes) kvli_record_event(s, KVL_EVENT_CLOSE);
    return n;
}

/* Forks of r take their logits from the row that was just added for r. */
static void kvli_forks_join(kvl_sched *s, uint32_t r, uint32_t row) {
    uint32_t f = s->reqs[r].first_fork, next;
    for (; f != KVL_NONE; f = next) {
        kvl_cache *c = s->cache;
        next = s->reqs[f].next_fork;
        bool room = s->n_running + s->n_joining < s->desc.max_running && c->n_free_seqs > s->n_joining &&
                    c->step.n_logits < c->max_logits;
        if (!room) {
            kvli_fork_detach(s, f);
            continue;
        }
        s->reqs[f].joining = true;
        s->n_joining++;
        kvli_step_logit(c, row, kvli_req_handle(s, f).id, s->reqs[f].user);
    }
}

/* Adds up to n rows of the request at place `at`; preempts worse-ranked ones for memory, else takes fewer
 * rows. Returns how many. */
static uint32_t kvli_run(kvl_sched *s, uint32_t at, uint32_t n) {
    uint32_t r = s->running[at];
    kvli_req *q = &s->reqs[r];
    kvl_cache *c = s->cache;
    uint32_t position = c->seqs[q->seq].length, T = c->geo.block_tokens;
    kvl_span span;
    span.seq = kvli_seq_handle(c, q->seq);
    span.tokens = q->tokens + position;
    span.user = q->user;
    while (n) {
        span.n_tokens = n;
        span.n_logits = position + n == q->n_tokens;
        if (kvli_step_add(c, q->seq, &span, kvli_req_handle(s, r).id) == KVL_OK) break;
        if (kvli_preempt_behind(s, at + 1)) continue;
        s->budget.starved = true;
        n = n > T ? (n / 2 + T - 1) / T * T : n / 2;
    }
    if (!n) return 0;
    kvli_budget_take(s, position, n, q->decode, q->klass == KVL_BACKGROUND);
    if (span.n_logits) {
        kvli_step_logit(c, c->step.n_rows - 1, kvli_req_handle(s, r).id, q->user);
        kvli_forks_join(s, r, c->step.n_rows - 1);
    }
    return n;
}

static void kvli_plan_decodes(kvl_sched *s) {
    kvli_budget *u = &s->budget;
    for (uint32_t at = 0; at < s->n_running && u->rows; at++) {
        const kvli_req *q = &s->reqs[s->running[at]];
        uint32_t position = q->n_tokens - 1;
        if (!q->decode) continue;
        bool over = u->bound > 0 && u->ms + kvli_rows_cost(s, position, 1, true) > u->bound;
        if (over && q->klass == KVL_BACKGROUND && u->background_rows) continue; /* one at least goes on */
        kvli_run(s, at, 1);
    }
}

/* Every second step the prompts that can end in it come first, shortest first, and then new ones: a long prompt holds
   up short ones by a factor of two at most, and they it. Only so many are begun beside others that are not done. */
static bool kvli_short_first(const kvl_sched *s) { return s->cache->step.id & 1; }

static uint32_t kvli_prefill_left(const kvl_sched *s, uint32_t r) {
    return s->reqs[r].n_tokens - s->cache->seqs[s->reqs[r].seq].length;
}

static void kvli_plan_short_prefills(kvl_sched *s, kvl_class klass) {
    uint32_t n = 0, *order = s->order, most = kvli_chunk(s, 0, s->budget.rows);
    for (uint32_t at = 0; at < s->n_running; at++) {
        uint32_t r = s->running[at], left = kvli_prefill_left(s, r), i = n;
        if (s->reqs[r].decode || s->reqs[r].klass != klass || left > most) continue;
        for (n++; i && kvli_prefill_left(s, order[i - 1]) > left; i--) order[i] = order[i - 1];
        order[i] = r;
    }
    for (uint32_t i = 0; i < n; i++) {
        if (s->reqs[order[i]].seq == KVL_NONE) continue; /* preempted for one before */
        uint32_t at = 0, left = kvli_prefill_left(s, order[i]);
        if (kvli_chunk(s, s->cache->seqs[s->reqs[order[i]].seq].length, left) < left) return;
        while (s->running[at] != order[i]) at++;
        kvli_run(s, at, left);
    }
}

static void kvli_plan_prefills(kvl_sched *s, kvl_class klass) { /* in order of rank */
    for (uint32_t at = 0; at < s->n_running && s->budget.rows; at++) {
        const kvli_req *q = &s->reqs[s->running[at]];
        const kvli_seq *seq = &s->cache->seqs[q->seq];
        if (q->decode || q->klass != klass || seq->step_span != KVL_NONE) continue;
        uint32_t n = kvli_chunk(s, seq->length, q->n_tokens - seq->length);
        if (n) kvli_run(s, at, n);
    }
}

static kvl_seq_desc kvli_req_desc(const kvli_req *q) {
    kvl_seq_desc d;
    memset(&d, 0, sizeof d);
    d.tokens = q->tokens;
    d.n_tokens = q->n_tokens;
    d.name_space = q->name_space;
    d.salt = q->salt;
    d.priority = q->priority;
    d.no_match = q->no_match;
    d.no_keep = q->no_keep;
    return d;
}

/* Is a running prefill of better rank about to compute the very block that this request would need next? Then
   wait for it. */
static bool kvli_in_flight(const kvl_sched *s, uint32_t r, const kvli_match *m) {
    const kvl_cache *c = s->cache;
    const kvli_req *q = &s->reqs[r];
    uint32_t T = c->geo.block_tokens, done = m->depth * T;
    if (q->no_match || done + T > q->n_tokens - 1 || m->length < done) return false;
    for (uint32_t i = 0; i < s->n_running; i++) {
        const kvli_req *o = &s->reqs[s->running[i]];
        const kvli_seq *seq = &c->seqs[o->seq];
        if (!kvli_outranks(s, s->running[i], r)) break; /* they run in order of rank */
        if (!seq->attached || o->n_tokens < done + T || seq->length < done || seq->length >= done + T)
            continue;
        bool same =
            m->depth ? seq->node == c->path[m->depth - 1]
                     : o->name_space == q->name_space && o->salt == q->salt && c->nodes[seq->node].depth == 0;
        if (same && memcmp(o->tokens + done, q->tokens + done, T * sizeof *q->tokens) == 0) return true;
    }
    return false;
}

static void kvli_ahead_add(const kvl_sched *s, kvli_ahead *a, const kvli_req *q) {
    if (q->seq != KVL_NONE) a->pending += q->n_tokens - s->cache->seqs[q->seq].length;
    if (q->klass != KVL_INTERACTIVE || !(s->desc.max_gap_ms > 0)) return; /* may be preempted */
    double variance, left = kvli_remaining(s, q, &variance), at = left / a->width;
    uint32_t j = at < KVLI_AHEAD - 1 ? (uint32_t)at : KVLI_AHEAD - 1;
    a->count[j]++;
    a->grow[j] += left;
    a->held[j] += q->n_tokens - q->reuse.matched;
    a->variance += variance;
    a->alive++;
}

/* Tokens that the running requests and q are likely to need, when they need most, beyond what they have and what
   q's tokens take: some grow, some end. Where max_gap_ms is promised nobody should be preempted while it streams;
   elsewhere memory is filled, and preemption is how that ends. */
static double kvli_growth_ahead(kvl_sched *s, const kvli_req *q) {
    kvli_ahead *a = &s->ahead[q->klass], sum;
    double peak = 0, freed = 0, alive;
    if (!a->width) {
        a->width = (double)s->lengths.mean[0] * 4 / (int)KVLI_AHEAD + 1;
        for (uint32_t i = 0; i < s->n_running; i++)
            if (s->reqs[s->running[i]].klass <= q->klass) kvli_ahead_add(s, a, &s->reqs[s->running[i]]);
    }
    sum = *a;
    kvli_ahead_add(s, &sum, q);
    alive = sum.alive;
    for (uint32_t j = 0; j < KVLI_AHEAD;
         j++) { /* at the end of each stretch of time, before anybody in it ends */
        alive -= sum.count[j];
        double now = sum.grow[j] + alive * sum.width * (j + 1) - freed +
                     0.5 * s->cache->geo.block_tokens * (alive + sum.count[j]); /* whole blocks */
        if (now > peak) peak = now;
        freed += sum.held[j];
    }
    peak += sum.pending + sqrt(sum.variance);
    return peak < 1e9 ? peak : 1e9;
}

/* Does a request fit beside what is in use, if so many blocks of its match are in use as well? */
static bool kvli_admissible_with(kvl_sched *s, const kvli_req *q, const uint32_t *in_use) {
    kvl_cache *c = s->cache;
    uint32_t T = c->geo.block_tokens, need[KVLI_MAX_CLASSES], room = 0;
    if (s->n_running) /* to grow before preemption */
        room =
            kvli_max_u32(s->n_running < 16 ? 1 : s->n_running / 16, (uint32_t)(kvli_growth_ahead(s, q) / T));
    kvli_need(c, q->n_tokens, T, need);
    for (uint32_t g = 0; g < c->geo.n_groups; g++) {
        for (uint32_t e = 0; e < 2; e++) need[2 * g + e] -= kvli_min_u32(need[2 * g + e], in_use[2 * g + e]);
        need[kvli_class_of(c, g, false)] += c->groups[g].window ? kvli_min_u32(room, s->n_running) : room;
    }
    return kvli_fits(c, need, c->n_slabs, false, NULL);
}

/* The same, its match counted once. */
static bool kvli_admissible(kvl_sched *s, const kvli_req *q, const kvli_match *m) {
    kvl_cache *c = s->cache;
    uint32_t in_use[KVLI_MAX_CLASSES];
    memset(in_use, 0, sizeof in_use);
    for (uint32_t g = 0; g < c->geo.n_groups; g++)
        for (uint32_t i = 0; i < m->length / c->geo.block_tokens; i++) {
            uint32_t entry = kvli_slots(c, c->path[i])[g];
            const kvli_block *b = entry == KVL_NONE ? NULL : kvli_block_at(c, entry);
            if (b && b->lru == KVLI_NO_LRU) in_use[b->klass]++;
        }
    return kvli_admissible_with(s, q, in_use);
}

typedef enum kvli_admission { KVLI_ADMITTED, KVLI_SKIP, KVLI_FULL, KVLI_LATER, KVLI_STOP } kvli_admission;

static kvli_admission kvli_admit(kvl_sched *s, uint32_t r, bool whole) {
    kvl_cache *c = s->cache;
    kvli_req *q = &s->reqs[r];
    kvl_seq_desc d = kvli_req_desc(q);
    kvli_match m = kvli_match_find(c, &d);
    if (kvli_in_flight(s, r, &m)) return KVLI_SKIP;
    if (!kvli_admissible(s, q, &m)) return KVLI_FULL;
    uint32_t n = kvli_chunk(s, m.length, q->n_tokens - m.length);
    if (!n) return KVLI_STOP;
    if (whole && n < q->n_tokens - m.length) return KVLI_LATER;
    kvli_wait_remove(s, r);
    q->seq = kvli_seq_start(c, &d, &m);
    c->seqs[q->seq].scheduled = true;
    kvli_reuse_report(&d, &m, &q->reuse);
    q->admitted_step = c->step.id;
    uint32_t at = kvli_run_insert(s, r);
    if (kvli_run(s, at, n)) return KVLI_ADMITTED;
    kvli_run_remove(s, r);
    kvli_seq_stop(c, q->seq);
    q->seq = KVL_NONE;
    kvli_wait_push(s, r);
    return KVLI_STOP;
}

/* Would one more interactive stream make even decode-only steps too long? */
static bool kvli_gap_full(const kvl_sched *s, uint32_t candidate) {
    uint32_t streams = 0;
    double per = kvli_rows_cost(s, s->reqs[candidate].n_tokens, 1, true),
           decodes = s->margin * s->cost.step_ms;
    for (uint32_t i = 0; i < s->n_running; i++) {
        const kvli_req *q = &s->reqs[s->running[i]];
        if (q->klass != KVL_INTERACTIVE) continue;
        decodes += kvli_rows_cost(s, q->n_tokens, 1, true);
        streams++;
    }
    return streams && s->desc.max_gap_ms > 0 && decodes + per > s->desc.max_gap_ms;
}

/* The next to be admitted of a list: the first, or under longest-prefix the one with most of it cached. */
static uint32_t kvli_candidate(kvl_sched *s, uint32_t from) {
    uint32_t best = from, best_matched = 0, looked = 0;
    if (s->desc.policy != KVL_POLICY_LONGEST_PREFIX || from == KVL_NONE ||
        s->reqs[from].passed_over >= KVLI_PASSED_OVER)
        return from;
    for (uint32_t r = from; r != KVL_NONE && looked < KVLI_LOOKAHEAD; r = s->reqs[r].next, looked++) {
        kvl_seq_desc d = kvli_req_desc(&s->reqs[r]);
        kvli_match m = kvli_match_find(s->cache, &d);
        if (m.length > best_matched) {
            best = r;
            best_matched = m.length;
        }
    }
    if (best != from) s->reqs[from].passed_over++;
    return best;
}

static bool kvli_has_slot(const kvl_sched *s) {
    return s->n_running + s->n_joining < s->desc.max_running && s->cache->n_free_seqs > s->n_joining;
}

/* Background work gives up memory and slots to the first interactive request that waits, before anything is
 * planned. */
static void kvli_make_room(kvl_sched *s) {
    uint32_t r = KVL_NONE;
    for (uint32_t l = 0; l < KVLI_PRIORITIES && r == KVL_NONE; l++) r = s->waiting[l].head;
    if (r == KVL_NONE || kvli_gap_full(s, r)) return;
    kvl_seq_desc d = kvli_req_desc(&s->reqs[r]);
    while (s->n_running && s->reqs[s->running[s->n_running - 1]].klass == KVL_BACKGROUND) {
        kvli_match m = kvli_match_find(s->cache, &d);
        if (kvli_in_flight(s, r, &m) || (kvli_has_slot(s) && kvli_admissible(s, &s->reqs[r], &m))) return;
        kvli_preempt(s, s->running[s->n_running - 1]);
    }
}

static bool kvli_refused_over_gap(kvl_sched *s, uint32_t r) {
    if (!s->desc.refuse_over_gap) return false;
    kvli_wait_remove(s, r);
    kvli_lock(&s->cache->lock);
    kvli_req_end(s, r, KVL_FINISH_REFUSED);
    kvli_unlock(&s->cache->lock);
    return true;
}

/* Admits from one list; `whole`: only what can be computed to its end in this step. Who waits longest and finds no room may be passed by others of it that do, but not for ever.
   False: lower priorities get nothing; starved: nor do lower classes. */
static bool kvli_admit_list(kvl_sched *s, uint32_t r, bool bound, bool whole) {
    uint32_t skipped = 0, blocked = KVL_NONE;
    while (r != KVL_NONE && skipped <= KVLI_LOOKAHEAD) {
        if (!kvli_has_slot(s) || !s->budget.rows) return false;
        s->budget.starved = s->budget.starved || (r == s->stalled && s->n_running &&
                                                  s->cache->step.id - s->stalled_id < KVLI_STALL);
        if (s->budget.starved) return false;
        uint32_t pick = skipped ? r : kvli_candidate(s, r), next = s->reqs[r].next;
        bool begun = s->reqs[pick].preemptions ||
                     s->reqs[pick].n_tokens > s->reqs[pick].n_prompt; /* it was let in before */
        if (bound && !begun && kvli_gap_full(s, pick)) {
            if (!kvli_refused_over_gap(s, pick)) return false;
        } else {
            kvli_admission a = kvli_admit(s, pick, whole);
            if (a == KVLI_LATER) return false;
            s->budget.starved = s->budget.starved || a == KVLI_STOP;
            if (a == KVLI_FULL && blocked == KVL_NONE) {
                blocked = s->stalled = r;
                s->stalled_id = s->cache->step.id;
            }
            if (a == KVLI_FULL)
                skipped += KVLI_LOOKAHEAD / KVLI_PASSERS;
            else if (a == KVLI_SKIP)
                skipped++;
            else if (a == KVLI_ADMITTED && blocked != KVL_NONE)
                s->reqs[blocked].passed_over++;
            if (blocked != KVL_NONE && s->reqs[blocked].passed_over >= KVLI_PASSED_OVER) break;
        }
        if (pick == r) r = next;
    }
    s->budget.starved = s->budget.starved || blocked != KVL_NONE;
    return !s->budget.starved;
}

static void kvli_plan_admissions(kvl_sched *s, kvl_class klass, bool early) {
    uint32_t l = 0, begun = 0;
    for (uint32_t i = 0; early && i < s->n_running; i++) begun += !s->reqs[s->running[i]].decode;
    bool whole = early && begun >= KVLI_BEGUN;
    while (l < KVLI_PRIORITIES && kvli_admit_list(s, s->waiting[(uint32_t)klass * KVLI_PRIORITIES + l].head,
                                                  klass == KVL_INTERACTIVE, whole))
        l++;
}

static void kvli_sched_publish(kvl_sched *s) { /* under the lock */
    s->stats.waiting = s->n_active - s->n_running;
    s->stats.running = s->n_running;
    s->stats.preemptions = s->n_preemptions;
    s->stats.cost = s->cost;
    s->stats.bytes_tokens = s->token_bytes;
    s->stats.record_bytes = s->record.bytes;
    s->stats.record_failed = s->record.failed;
}

static void kvli_sched_stats(kvl_cache *c, kvl_stats *out) { /* under the lock */
    kvl_sched *s = c->sched;
    if (!s) return;
    kvl_stats *t = &s->stats;
    out->waiting = t->waiting;
    out->running = t->running;
    out->steps = t->steps;
    out->prefill_tokens = t->prefill_tokens;
    out->decode_tokens = t->decode_tokens;
    out->submitted = t->submitted;
    out->finished = t->finished;
    out->cancelled = t->cancelled;
    out->refused = t->refused;
    out->preemptions = t->preemptions;
    out->aborts = t->aborts;
    out->cost = t->cost;
    out->bytes_tokens = s->token_bytes;
    out->record_bytes = t->record_bytes;
    out->record_failed = t->record_failed;
    out->gap_ms = kvli_percentiles(&s->gap);
    out->ttft_ms = kvli_percentiles(&s->ttft);
    out->step_ms = kvli_percentiles(&s->step);
}

/* The budget has changed: who waits for memory may look again. */
static void kvli_sched_resized(kvl_cache *c) {
    kvl_sched *s = c->sched;
    if (!s) return;
    s->stalled = KVL_NONE;
    kvli_lock(&c->lock);
    kvli_sched_publish(s);
    s->events++;
    kvli_cond_broadcast(&s->wake);
    kvli_unlock(&c->lock);
}

KVL_API kvl_result kvl_sched_plan(kvl_sched *s, const kvl_step **out) {
    if (out) *out = NULL;
    if (!s || !out) return KVL_INVALID_ARG;
    kvl_cache *c = s->cache;
    if (c->step.open) return kvli_fail(c->ctx, kvli_serr(s), KVL_BUSY, "kvl_sched_plan: a step is open");
    kvl_result r = c->ctx->backend->check(c), finished = KVL_OK;
    if (r != KVL_OK) return kvli_fail(c->ctx, kvli_serr(s), r, "kvl_sched_plan: %s", c->error);
    kvli_budget_poll(c);
    uint32_t active = kvli_sched_intake(s);
    memset(&s->budget, 0, sizeof s->budget);
    memset(s->ahead, 0, sizeof s->ahead);
    s->plan_ns = kvli_now(c->ctx);
    s->budget.rows = s->desc.step_tokens;
    s->budget.ms = s->margin * s->cost.step_ms;
    s->budget.bound = s->n_streams && s->desc.max_gap_ms > 0 ? s->desc.max_gap_ms : 0;
    r = KVL_IDLE;
    if (c->n_slabs && active) {
        kvli_step_reset(c);
        kvli_make_room(s);
        kvli_plan_decodes(s);
        for (int k = KVL_INTERACTIVE; k <= KVL_BACKGROUND; k++) {
            if (kvli_short_first(s)) {
                kvli_plan_short_prefills(s, (kvl_class)k);
                kvli_plan_admissions(s, (kvl_class)k, true);
            }
            kvli_plan_prefills(s, (kvl_class)k);
            kvli_plan_admissions(s, (kvl_class)k, false);
        }
        if (c->step.n_rows) {
            finished = kvli_step_finish(c);
            s->step_open = true;
            r = KVL_OK;
        } else {
            kvli_step_rollback(c);
        }
    }
    kvli_lock(&c->lock);
    kvli_sched_publish(s);
    if (!s->step_open && s->closing && !s->n_active) r = KVL_DRAINED;
    kvli_unlock(&c->lock);
    kvli_record_plan(s, r);
    kvli_publish(c);
    if (finished != KVL_OK) { /* in a recording: a plan and its abort */
        kvl_sched_abort(s, c->step.view);
        return kvli_fail(NULL, kvli_serr(s), finished, "kvl_sched_plan: %s", c->error);
    }
    if (s->step_open) *out = c->step.view;
    return r;
}

/* ---- commit ---- */
static void kvli_req_token(kvl_sched *s, uint32_t r, const kvl_output *o, uint64_t now) {
    kvli_req *q = &s->reqs[r];
    bool stop = false;
    if (o->no_token) {
        kvli_req_end(s, r, KVL_FINISH_APP);
        return;
    }
    q->tokens[q->n_tokens++] = o->token;
    if (!q->first_ns) {
        q->first_ns = now;
        kvli_histogram_add(&s->ttft, (double)(now - q->submit_ns) / 1e6);
    } else if (q->klass == KVL_INTERACTIVE) {
        kvli_histogram_add(&s->gap, (double)(now - q->last_ns) / 1e6);
    }
    q->last_ns = now;
    for (uint32_t i = 0; i < q->n_stop; i++) stop = stop || q->stop[i] == o->token;
    if (stop)
        kvli_req_end(s, r, KVL_FINISH_STOP);
    else if (o->finish)
        kvli_req_end(s, r, KVL_FINISH_APP);
    else if (q->n_tokens == q->capacity)
        kvli_req_end(s, r, KVL_FINISH_LENGTH);
    else
        kvli_decode_state(s, r, true);
}

static void kvli_forks_start(
    kvl_sched *s) { /* those that joined get their own sequence, on all that their parent has */
    kvli_step_state *st = &s->cache->step;
    for (uint32_t i = 0; i < st->n_logits && s->n_joining; i++) {
        kvl_req h;
        h.id = st->logit_requests[i];
        uint32_t r = kvli_req_index(s, h);
        kvli_req *q = &s->reqs[r];
        if (!q->joining) continue;
        q->seq = kvli_seq_copy(s->cache, s->reqs[q->parent].seq);
        s->cache->seqs[q->seq].scheduled = true;
        q->joining = false;
        q->reuse.matched = q->n_tokens;
        q->reuse.recomputed = 0;
        q->reuse.reason = KVL_MATCH_ALL;
        kvli_fork_unlink(s, r);
        kvli_run_insert(s, r);
        s->n_joining--;
    }
}

KVL_API kvl_result kvl_sched_commit_ex(kvl_sched *s, const kvl_step *step, const kvl_output *outputs) {
    if (!s) return KVL_INVALID_ARG;
    kvl_cache *c = s->cache;
    kvl_result result = s->step_open ? kvli_step_complete(c, step, "kvl_sched_commit") : KVL_MISMATCH;
    if (result != KVL_OK)
        return kvli_fail(NULL, kvli_serr(s), result, "%s",
                         s->step_open ? c->error : "kvl_sched_commit: no step is open");
    uint32_t n = c->step.n_logits;
    if (n && !outputs)
        return kvli_fail(c->ctx, kvli_serr(s), KVL_INVALID_ARG,
                         "kvl_sched_commit: %u rows have logits, outputs are null", n);
    for (uint32_t i = 0; i < n; i++)
        if (outputs[i].no_token && !outputs[i].finish)
            return kvli_fail(c->ctx, kvli_serr(s), KVL_INVALID_ARG,
                             "kvl_sched_commit: outputs[%u] has neither a token nor finish", i);
    uint64_t now = kvli_now(c->ctx);
    double ms = (double)(now - s->plan_ns) / 1e6;
    kvli_step_commit(c);
    s->step_open = false;
    kvli_record_commit(s, outputs, now);
    if (!s->desc.fixed_cost) kvli_cost_learn(s, ms);
    kvli_lock(&c->lock);
    kvli_histogram_add(&s->step, ms);
    s->stats.steps++;
    s->stats.prefill_tokens += s->budget.prefill_rows;
    s->stats.decode_tokens += s->budget.decode_rows;
    kvli_forks_start(s);
    for (uint32_t i = 0; i < n; i++) {
        kvl_req h;
        h.id = c->step.logit_requests[i];
        kvli_req_token(s, kvli_req_index(s, h), &outputs[i], now);
    }
    kvli_sched_publish(s);
    kvli_unlock(&c->lock);
    kvli_publish(c);
    return KVL_OK;
}

KVL_API kvl_result kvl_sched_commit(kvl_sched *s, const kvl_step *step, const int32_t *tokens) {
    if (!s) return KVL_INVALID_ARG;
    uint32_t n = s->step_open && step == s->cache->step.view ? s->cache->step.n_logits : 0;
    if (n && !tokens)
        return kvli_fail(s->cache->ctx, kvli_serr(s), KVL_INVALID_ARG,
                         "kvl_sched_commit: %u rows have logits, tokens are null", n);
    for (uint32_t i = 0; i < n; i++) {
        memset(&s->outputs[i], 0, sizeof *s->outputs);
        s->outputs[i].token = tokens[i];
    }
    return kvl_sched_commit_ex(s, step, s->outputs);
}

KVL_API kvl_result kvl_sched_abort(kvl_sched *s, const kvl_step *step) {
    if (!s) return KVL_INVALID_ARG;
    kvl_cache *c = s->cache;
    if (!s->step_open || step != c->step.view)
        return kvli_fail(c->ctx, kvli_serr(s), KVL_MISMATCH, "kvl_sched_abort: this is not the open step");
    kvli_step_rollback(c);
    s->step_open = false;
    kvli_lock(&c->lock);
    for (uint32_t r = 0; s->n_joining && r < s->max_reqs; r++)
        if (s->reqs[r].joining) {
            s->reqs[r].joining = false;
            s->n_joining--;
        }
    kvli_unlock(&c->lock);
    for (uint32_t at = s->n_running; at-- > 0;) {
        kvli_req *q = &s->reqs[s->running[at]];
        uint32_t r = s->running[at];
        if (q->admitted_step != c->step.id) continue;
        kvli_run_remove(s, r);
        kvli_seq_stop(c, q->seq);
        q->seq = KVL_NONE;
        kvli_wait_push(s, r);
    }
    kvli_record_event(s, KVL_EVENT_ABORT);
    s->stalled = KVL_NONE;
    kvli_lock(&c->lock);
    s->stats.aborts++;
    kvli_sched_publish(s);
    kvli_unlock(&c->lock);
    kvli_publish(c);
    return KVL_OK;
}

/* ==== >>events: the recording of what plans depend on (bytes: see kvl_event) ==== */
enum { KVLI_RECORD_BYTES = 1 << 16, KVLI_CHUNK_HEAD = 8 };

static void kvli_put_le(uint8_t *to, uint64_t x, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) to[i] = (uint8_t)(x >> 8 * i);
}

static void kvli_record_write(kvl_sched *s, const uint8_t *data, size_t n) {
    kvli_recorder *rec = &s->record;
    size_t done = s->desc.record(s->desc.record_user, data, n);
    rec->bytes += done < n ? done : n;
    if (done == n) return;
    rec->on = false;
    rec->failed = true;
    kvli_fail(s->cache->ctx, kvli_text_at(NULL, 0), KVL_LIMIT,
              "record: the callback took %zu of %zu bytes after %llu: the event trace ends here", done, n,
              (unsigned long long)rec->bytes);
}

static void kvli_record_flush(kvl_sched *s) {
    kvli_recorder *rec = &s->record;
    uint32_t n = rec->used - KVLI_CHUNK_HEAD;
    uint64_t h = 0, word;
    if (rec->on && n) {
        memset(rec->buffer + rec->used, 0, 8);
        for (uint32_t i = KVLI_CHUNK_HEAD; i < rec->used; i += 8) {
            word = 0;
            for (uint32_t k = 0; k < 8; k++) word |= (uint64_t)rec->buffer[i + k] << 8 * k;
            h = kvli_mix(h, word);
        }
        kvli_put_le(rec->buffer, n, 4);
        kvli_put_le(rec->buffer + 4, h, 4);
        kvli_record_write(s, rec->buffer, rec->used);
    }
    rec->used = KVLI_CHUNK_HEAD;
}

static uint8_t *kvli_record_room(kvl_sched *s) { /* for one number */
    if (s->record.used + 10 > KVLI_RECORD_BYTES) kvli_record_flush(s);
    return s->record.buffer + s->record.used;
}

static void kvli_put(kvl_sched *s, uint64_t x) {
    uint8_t *at = kvli_record_room(s);
    for (; x > 127; x >>= 7) *at++ = (uint8_t)(x | 128);
    *at++ = (uint8_t)x;
    s->record.used = (uint32_t)(at - s->record.buffer);
}
static uint64_t kvli_zigzag(int64_t x) { return (uint64_t)x << 1 ^ (x < 0 ? UINT64_MAX : 0); }
static void kvli_put_signed(kvl_sched *s, int64_t x) { kvli_put(s, kvli_zigzag(x)); }
static void kvli_put_fixed(kvl_sched *s, uint64_t x) {
    kvli_put_le(kvli_record_room(s), x, 8);
    s->record.used += 8;
}
static void kvli_put_double(kvl_sched *s, double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    kvli_put_fixed(s, bits);
}
static void kvli_put_tokens(kvl_sched *s, const int32_t *tokens, uint32_t n) {
    int64_t last = 0;
    for (uint32_t i = 0; i < n; last = tokens[i++]) kvli_put_signed(s, tokens[i] - last);
}
static void kvli_put_clock(kvl_sched *s, uint64_t now) {
    kvli_put_signed(s, (int64_t)(now - s->record.clock));
    s->record.clock = now;
}

/* ---- the description ---- */
static void kvli_record_geometry(kvl_sched *s) {
    const kvl_cache *c = s->cache;
    const kvl_geometry *g = &c->desc.geometry;
    const uint32_t shape[] = {g->n_layers,     g->n_q_heads,    g->n_kv_heads,    g->k_dim,
                              g->v_dim,        g->block_tokens, g->k_format,      g->v_format,
                              g->exact_format, g->sink_blocks,  g->segment_tokens};
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++) kvli_put(s, shape[i]);
    kvli_put(s, g->fingerprint);
    for (uint32_t l = 0; l < g->n_layers; l++) {
        const kvli_layer *layer = &c->geo.layers[l];
        const kvli_side *k = &layer->k[KVLI_PACKED], *v = &layer->v[KVLI_PACKED];
        kvli_put(s, layer->window);
        kvli_put(s, layer->sink_tokens);
        kvli_put(s, k->format | (k->rotated ? (kvl_format)KVL_ROTATED : 0));
        kvli_put(s, v->format | (v->rotated ? (kvl_format)KVL_ROTATED : 0));
    }
}

static uint64_t kvli_less_workspace(const kvl_cache *c, uint64_t bytes) {
    return bytes > c->workspace_bytes ? bytes - c->workspace_bytes : 0;
}

static void kvli_record_begin(kvl_sched *s) {
    const kvl_cache *c = s->cache;
    const kvl_sched_desc *d = &s->desc;
    uint8_t *head = s->record.buffer;
    bool fresh = !c->step.id && !c->stats.opened && c->epoch == c->n_slabs; /* epoch: of mapping the slabs */
    s->record.on = true;
    memcpy(head, "KVLEVENT", 8);
    kvli_put_le(head + 8, 1, 4);
    kvli_record_write(s, head, 12);
    s->record.used = KVLI_CHUNK_HEAD;
    kvli_put_le(head + KVLI_CHUNK_HEAD, KVL_VERSION, 4);
    s->record.used += 4;
    bool chosen = c->slabs_most || c->desc.slab_bytes; /* by what a device can have */
    kvli_put(s, fresh | (c->desc.slab_granularity > 1 ? 2u : 0) | (chosen ? 4u : 0));
    kvli_record_geometry(s);
    uint64_t now = kvli_less_workspace(c, c->stats.device_budget);
    const uint64_t of_cache[] = {now ? now : 1,           kvli_less_workspace(c, c->desc.max_device_bytes),
                                 c->desc.max_sequences,   c->desc.max_seq_tokens,
                                 c->desc.max_step_tokens, c->desc.lookup_hash_bits,
                                 c->desc.no_prefix_cache};
    const uint64_t of_sched[] = {(uint64_t)d->policy, d->max_running, d->max_waiting,     d->token_pool_bytes,
                                 d->step_tokens,      d->min_chunk,   d->refuse_over_gap, d->fixed_cost};
    double costs[1 + KVLI_COSTS];
    costs[0] = d->max_gap_ms;
    memcpy(costs + 1, &d->cost, sizeof d->cost);
    for (size_t i = 0; i < sizeof of_cache / sizeof *of_cache; i++) kvli_put(s, of_cache[i]);
    for (size_t i = 0; i < sizeof of_sched / sizeof *of_sched; i++) kvli_put(s, of_sched[i]);
    for (size_t i = 0; i < sizeof costs / sizeof *costs; i++) kvli_put_double(s, costs[i]);
    if (c->desc.slab_granularity > 1) kvli_put(s, c->desc.slab_granularity);
    if (chosen) kvli_put(s, c->slab_bytes);
}

/* ---- events ---- */
static void kvli_record_event(kvl_sched *s, kvl_event e) {
    if (!s->record.on) return;
    kvli_put(s, (uint64_t)e);
    if (e == KVL_EVENT_END) kvli_put_fixed(s, s->record.digest);
    if (e != KVL_EVENT_CLOSE) kvli_record_flush(s);
}

static void kvli_record_request(kvl_sched *s, kvl_event e, uint64_t request) {
    if (!s->record.on) return;
    kvli_put(s, (uint64_t)e);
    kvli_put(s, request);
}

static void kvli_put_opening(kvl_sched *s, const kvl_seq_desc *d, bool background) {
    kvli_put(s, background | d->no_match * 2u | d->no_keep * 4u | d->priority * 8);
    kvli_put(s, d->name_space);
    kvli_put(s, d->salt);
}

static void kvli_record_submit(kvl_sched *s, const kvli_req *q) {
    kvl_seq_desc d = kvli_req_desc(q);
    if (!s->record.on) return;
    kvli_put(s, KVL_EVENT_SUBMIT);
    kvli_put_clock(s, q->submit_ns);
    kvli_put_opening(s, &d, q->klass == KVL_BACKGROUND);
    kvli_put(s, q->n_stop);
    kvli_put_tokens(s, q->stop, q->n_stop);
    kvli_put(s, q->n_prompt);
    kvli_put_tokens(s, q->tokens, q->n_prompt);
    kvli_put(s, q->capacity - q->n_prompt);
}

static void kvli_record_fork(kvl_sched *s, const kvli_req *q, uint64_t parent) {
    if (!s->record.on) return;
    kvli_put(s, KVL_EVENT_FORK);
    kvli_put_clock(s, q->submit_ns);
    kvli_put(s, parent);
}

/* Into the digest: a sequence's table from block `from` up to `end`. */
static void kvli_digest_table(kvl_sched *s, uint32_t seq, uint32_t from, uint32_t end) {
    uint64_t h = s->record.digest;
    for (uint32_t g = 0; g < s->cache->geo.n_groups; g++) {
        const uint32_t *table = kvli_table(s->cache, seq, g);
        for (uint32_t j = from; j < end; j++) h = kvli_mix(h, table[j]);
    }
    s->record.digest = h;
}

/* Into the digest: the step's rows, where they go and what they see that was not there before. */
static void kvli_digest_step(kvl_sched *s) {
    kvl_cache *c = s->cache;
    const kvli_step_state *st = &c->step;
    for (uint32_t i = 0; i < st->n_spans; i++) {
        const kvl_step_span *span = &st->spans[i];
        const kvl_span_blocks *b = &st->attend[i].blocks;
        kvl_req h;
        h.id = span->request;
        uint32_t seq = (span->seq.id & 0xffff) - 1, r = kvli_req_index(s, h);
        bool admitted = r != KVL_NONE && s->reqs[r].admitted_step == st->id;
        s->record.digest = kvli_mix(s->record.digest, (uint64_t)span->position << 32 | span->n_rows);
        kvli_digest_table(s, seq, admitted ? 0 : b->first_own, b->n_blocks);
    }
    uint64_t h = s->record.digest;
    for (uint32_t i = 0; i < st->n_own; i++) h = kvli_mix(h, st->own[i]);
    for (uint32_t i = 0; i < st->n_rows; i++) h = kvli_mix(h, (uint32_t)st->tokens[i]);
    for (uint32_t i = 0; i < st->n_logits; i++) {
        kvl_req q;
        q.id = st->logit_requests[i];
        uint32_t r = kvli_req_index(s, q);
        h = kvli_mix(h, (r == KVL_NONE ? 0 : s->reqs[r].arrival) << 20 ^ st->logit_rows[i]);
    }
    for (uint32_t i = 0; i < st->n_copies; i++)
        h = kvli_mix(h, (uint64_t)st->copies[i].src << 32 | st->copies[i].dst);
    s->record.digest = kvli_mix(h, kvli_step_key(c));
}

static void kvli_record_plan(kvl_sched *s, kvl_result r) {
    const kvli_step_state *st = &s->cache->step;
    kvli_recorder *rec = &s->record;
    uint64_t last = 0;
    if (!rec->on) return;
    kvli_put(s, KVL_EVENT_PLAN);
    kvli_put_clock(s, s->plan_ns);
    kvli_put(s, (uint64_t)r);
    kvli_put(s, s->n_preemptions - rec->preemptions);
    kvli_put(s, s->stats.refused - rec->refused);
    rec->preemptions = s->n_preemptions;
    rec->refused = s->stats.refused;
    if (r != KVL_OK) return;
    kvli_put(s, st->n_spans);
    kvli_put(s, st->n_logits);
    kvli_put(s, st->n_copies);
    for (uint32_t i = 0; i < st->n_spans; i++) {
        const kvl_step_span *span = &st->spans[i];
        const kvli_req *q = &s->reqs[(span->request & 0xfffff) - 1];
        int64_t step = (int64_t)(q->arrival - last);
        last = q->arrival;
        kvli_put(s, kvli_zigzag(step) << 1 | q->decode);
        if (q->decode) continue;
        kvli_put(s, span->position);
        kvli_put(s, span->n_rows);
        kvli_put(s, span->n_logits * 2u + (q->admitted_step == st->id));
    }
    kvli_digest_step(s);
    kvli_put_fixed(s, rec->digest);
}

/* What a step leaves behind: where its blocks stand in the end, and who saw a number that is not finite. */
static uint32_t kvli_digest_left(kvl_sched *s) {
    const kvli_step_state *st = &s->cache->step;
    uint32_t tainted = 0;
    for (uint32_t i = 0; i < st->n_spans; i++) {
        const kvl_span_blocks *b = &st->attend[i].blocks;
        kvli_digest_table(s, (st->spans[i].seq.id & 0xffff) - 1, b->first_own, b->n_blocks);
        tainted += st->taint[i] != 0;
    }
    return tainted;
}
static void kvli_put_tainted(kvl_sched *s, uint32_t n) {
    const kvli_step_state *st = &s->cache->step;
    if (n) kvli_put(s, n);
    for (uint32_t i = 0; n && i < st->n_spans; i++)
        if (st->taint[i]) kvli_put(s, i);
}

static void kvli_record_commit(kvl_sched *s, const kvl_output *outputs, uint64_t now) {
    uint32_t n = s->cache->step.n_logits, tainted;
    int64_t last = 0;
    bool finish = false;
    if (!s->record.on) return;
    tainted = kvli_digest_left(s);
    for (uint32_t i = 0; i < n; i++) finish = finish || outputs[i].finish;
    kvli_put(s, KVL_EVENT_COMMIT);
    kvli_put_clock(s, now);
    kvli_put(s, finish | (tainted ? 2u : 0));
    kvli_put(s, n);
    for (uint32_t i = 0; i < n; i++) {
        int64_t token = outputs[i].no_token ? last : outputs[i].token;
        kvli_put_signed(s, token - last);
        last = token;
    }
    for (uint32_t i = 0; finish && i < n; i++) kvli_put(s, outputs[i].no_token | outputs[i].finish * 2u);
    kvli_put_tainted(s, tainted);
    kvli_record_flush(s);
}

/* ---- calls on the cache beside the scheduler ---- */
static kvl_sched *kvli_recorded(const kvl_cache *c) {
    return c->sched && c->sched->record.on ? c->sched : NULL;
}

static void kvli_put_seq(kvl_sched *s, uint32_t seq) {
    uint64_t name = 2ull * seq;
    for (uint32_t i = 0; i < s->n_running; i++)
        if (s->reqs[s->running[i]].seq == seq) name = 2 * s->reqs[s->running[i]].arrival + 1;
    kvli_put(s, name);
}

/* n_args of a, b. The table of `changed`, unless KVL_NONE, goes into the digest. */
static void kvli_record_call(kvl_cache *c, kvl_event e, uint32_t seq, uint32_t n_args, uint64_t a, uint64_t b,
                             uint32_t changed) {
    kvl_sched *s = kvli_recorded(c);
    if (!s) return;
    kvli_put(s, (uint64_t)e);
    kvli_put_seq(s, seq);
    if (n_args > 0) kvli_put(s, a);
    if (n_args > 1) kvli_put(s, b);
    if (changed != KVL_NONE) kvli_digest_table(s, changed, 0, c->seqs[changed].n_blocks);
}

static void kvli_record_desc(kvl_cache *c, kvl_event e, const kvl_seq_desc *d, uint32_t seq, uint32_t n) {
    kvl_sched *s = kvli_recorded(c);
    if (!s) return;
    kvli_put(s, (uint64_t)e);
    kvli_put_opening(s, d, false);
    kvli_put(s, d->n_tokens);
    kvli_put_tokens(s, d->tokens, d->n_tokens);
    if (seq != KVL_NONE) kvli_put(s, seq);
    if (seq != KVL_NONE) kvli_digest_table(s, seq, 0, c->seqs[seq].n_blocks);
    kvli_put(s, n);
}

static void kvli_record_step(kvl_cache *c, const kvl_span *spans, uint32_t n, kvl_result r) {
    kvl_sched *s = kvli_recorded(c);
    if (!s) return;
    kvli_put(s, KVL_EVENT_STEP_BEGIN);
    kvli_put(s, n);
    for (uint32_t i = 0; i < n; i++) {
        kvli_put_seq(s, kvli_seq_index(c, spans[i].seq));
        kvli_put(s, spans[i].n_tokens);
        kvli_put(s, spans[i].n_logits);
        kvli_put_tokens(s, spans[i].tokens, spans[i].n_tokens);
    }
    kvli_put_signed(s, r);
    if (r == KVL_OK) kvli_digest_step(s);
}

static void kvli_record_step_end(kvl_cache *c) {
    kvl_sched *s = kvli_recorded(c);
    if (!s) return;
    uint32_t tainted = kvli_digest_left(s);
    kvli_put(s, KVL_EVENT_STEP_END);
    kvli_put(s, tainted ? 2 : 0);
    kvli_put_tainted(s, tainted);
    kvli_record_flush(s);
}

static void kvli_record_resize(kvl_cache *c, uint64_t bytes, kvl_result r) {
    kvl_sched *s = kvli_recorded(c);
    if (!s) return;
    bytes = kvli_less_workspace(c, bytes);
    if (r != KVL_OK && r != KVL_NO_BLOCKS)
        bytes = c->n_slabs ? (uint64_t)c->n_slabs * c->slab_bytes + c->scratch_bytes : 0;
    kvli_put(s, KVL_EVENT_RESIZE);
    kvli_put(s, bytes);
    kvli_put(s, c->n_slabs);
    kvli_record_flush(s);
}

/* ==== >>public: scheduler ==== */
static void kvli_sched_desc_fill(const kvl_cache *c, kvl_sched_desc *d) {
    if (!d->max_running || d->max_running > c->max_spans) d->max_running = c->max_spans;
    if (!d->max_waiting) d->max_waiting = 4096;
    if (!d->token_pool_bytes) d->token_pool_bytes = 256u << 20;
    if (!d->step_tokens || d->step_tokens > c->desc.max_step_tokens) d->step_tokens = c->desc.max_step_tokens;
    if (!d->min_chunk) d->min_chunk = c->geo.block_tokens;
    d->min_chunk = kvli_min_u32(d->min_chunk, d->step_tokens);
    d->max_running = kvli_min_u32(d->max_running, d->step_tokens);
}

static kvl_result kvli_sched_desc_check(kvl_cache *c, const kvl_sched_desc *d) {
    if ((uint32_t)d->policy > KVL_POLICY_LONGEST_PREFIX)
        return KVLI_ERROR(c, KVL_INVALID_ARG, "policy: %d is unknown", (int)d->policy);
    if (d->max_waiting > 1000000)
        return KVLI_ERROR(c, KVL_INVALID_ARG, "max_waiting: %u is more than 1000000", d->max_waiting);
    if (!(d->max_gap_ms >= 0 && d->max_gap_ms < 1e12))
        return KVLI_ERROR(c, KVL_INVALID_ARG, "max_gap_ms is negative or not finite");
    const kvl_cost *k = &d->cost;
    if (!(k->step_ms >= 0 && k->prefill_token_ms >= 0 && k->decode_ms >= 0 && k->kv_megatoken_ms >= 0 &&
          k->prefill_kv_megatoken_ms >= 0))
        return KVLI_ERROR(c, KVL_INVALID_ARG, "cost: a coefficient is negative or not a number");
    return KVL_OK;
}

KVL_API kvl_result kvl_sched_defaults(kvl_cache *cache, const kvl_sched_desc *desc, kvl_sched_desc *out) {
    if (!cache || !desc || !out) return KVL_INVALID_ARG;
    *out = *desc;
    kvli_sched_desc_fill(cache, out);
    return kvli_sched_desc_check(cache, desc);
}

static void kvli_sched_lists(kvl_sched *s) {
    uint32_t salt = (uint32_t)((uintptr_t)s >> 6) * 0x9E3779B9u;
    for (uint32_t l = 0; l < KVLI_WAIT_LISTS; l++) s->waiting[l].head = s->waiting[l].tail = KVL_NONE;
    s->inbox = s->finished = s->waiting[0];
    for (uint32_t r = 0; r < s->max_reqs; r++) {
        memset(&s->reqs[r], 0, sizeof *s->reqs);
        s->reqs[r].generation = (salt + r * 31) >> 20;
        s->reqs[r].next = r + 1 < s->max_reqs ? r + 1 : KVL_NONE;
    }
    s->margin = 1;
}

KVL_API kvl_result kvl_sched_create(kvl_cache *c, const kvl_sched_desc *desc, kvl_sched **out) {
    if (out) *out = NULL;
    if (!c) return KVL_INVALID_ARG;
    if (!out) return KVLI_ERROR(c, KVL_INVALID_ARG, "kvl_sched_create: out is null");
    if (c->sched) return KVLI_ERROR(c, KVL_BUSY, "kvl_sched_create: the cache has a scheduler");
    kvl_sched_desc d;
    memset(&d, 0, sizeof d);
    if (desc) d = *desc;
    kvl_result r = kvli_sched_desc_check(c, &d);
    if (r != KVL_OK) return r;
    kvli_sched_desc_fill(c, &d);
    kvli_arena a = {NULL, 0};
    kvl_sched *s = NULL;
    for (int pass = 0; pass < 2; pass++) {
        a.used = 0;
        s = KVLI_CARVE(&a, kvl_sched, 1);
        kvli_req *reqs = KVLI_CARVE(&a, kvli_req, d.max_waiting);
        uint32_t *running = KVLI_CARVE(&a, uint32_t, d.max_running + 1);
        uint32_t *order = KVLI_CARVE(&a, uint32_t, d.max_running + 1);
        kvl_output *outputs = KVLI_CARVE(&a, kvl_output, c->max_logits);
        uint8_t *buffer = KVLI_CARVE(&a, uint8_t, d.record ? KVLI_RECORD_BYTES + 8 : 0);
        if (!pass) {
            if (c->desc.host_bytes && c->stats.bytes_metadata + a.used > c->desc.host_bytes)
                return KVLI_ERROR(c, KVL_OUT_OF_HOST_MEMORY, "host_bytes: the scheduler takes %zu bytes more",
                                  a.used);
            a.base = (uint8_t *)kvli_alloc(c->ctx, a.used);
            if (!a.base)
                return KVLI_ERROR(c, KVL_OUT_OF_HOST_MEMORY,
                                  "kvl_sched_create: the allocator returned null for %zu bytes", a.used);
            continue;
        }
        memset(s, 0, sizeof *s);
        s->reqs = reqs;
        s->running = running;
        s->order = order;
        s->outputs = outputs;
        s->record.buffer = buffer;
    }
    s->cache = c;
    s->desc = d;
    s->cost = d.cost;
    s->max_reqs = d.max_waiting;
    s->stalled = KVL_NONE;
    s->arena_bytes = a.used;
    kvli_sched_lists(s);
    if (!kvli_cond_init(&s->wake)) {
        kvli_free(c->ctx, s, a.used);
        return KVLI_ERROR(c, KVL_OUT_OF_HOST_MEMORY, "kvl_sched_create: no condition variable");
    }
    c->stats.bytes_metadata += a.used;
    if (d.record) kvli_record_begin(s);
    kvli_lock(&c->lock);
    c->sched = s;
    kvli_sched_publish(s);
    kvli_unlock(&c->lock);
    kvli_publish(c);
    *out = s;
    return KVL_OK;
}

static void kvli_req_free_tokens(kvl_sched *s, kvli_req *q) {
    size_t bytes = (size_t)q->capacity * sizeof *q->tokens;
    if (!q->tokens) return;
    kvli_free(s->cache->ctx, q->tokens, bytes);
    s->token_bytes -= bytes;
    q->tokens = NULL;
}

KVL_API void kvl_sched_destroy(kvl_sched *s) {
    if (!s) return;
    kvl_cache *c = s->cache;
    if (s->step_open) kvl_sched_abort(s, c->step.view);
    kvli_record_event(s, KVL_EVENT_END);
    for (uint32_t r = 0; r < s->max_reqs; r++) {
        kvli_req *q = &s->reqs[r];
        if (q->used && !q->finished && q->seq != KVL_NONE) kvli_seq_stop(c, q->seq);
        kvli_req_free_tokens(s, q);
    }
    kvli_lock(&c->lock);
    c->sched = NULL;
    kvli_unlock(&c->lock);
    c->stats.bytes_metadata -= s->arena_bytes;
    kvli_publish(c);
    kvli_cond_free(&s->wake);
    kvli_free(c->ctx, s, s->arena_bytes);
}

KVL_API const char *kvl_sched_last_error(const kvl_sched *s) {
    return s ? s->error : "the scheduler is null";
}

/* Room for a request's tokens, with those it begins with. Not under the lock: allocators may take their time.
 */
static int32_t *kvli_tokens_new(const kvl_sched *s, const int32_t *tokens, uint32_t n, uint32_t capacity) {
    int32_t *copy = (int32_t *)kvli_alloc(s->cache->ctx, (size_t)capacity * sizeof *copy);
    if (copy) memcpy(copy, tokens, (size_t)n * sizeof *copy);
    return copy;
}

/* A record for tokens that were just allocated, under the lock; the oldest finished requests make room.
   QUEUE_FULL: nothing was forgotten. */
static kvl_result kvli_req_take(kvl_sched *s, int32_t *tokens, uint32_t capacity, uint32_t *out) {
    uint64_t bytes = (uint64_t)capacity * sizeof(int32_t);
    if (s->n_active == s->max_reqs || s->token_bytes - s->finished_bytes + bytes > s->desc.token_pool_bytes)
        return KVL_QUEUE_FULL;
    while (s->n_records == s->max_reqs || s->token_bytes + bytes > s->desc.token_pool_bytes) {
        uint32_t old = s->finished.head;
        kvli_list_remove(s, &s->finished, old);
        kvli_req *q = &s->reqs[old];
        s->finished_bytes -= (uint64_t)q->capacity * sizeof *q->tokens;
        kvli_req_free_tokens(s, q);
        q->used = false;
        q->generation = (q->generation + 1) & 0xfff;
        q->next = s->free_req;
        s->free_req = old;
        s->n_records--;
    }
    uint32_t r = s->free_req, generation = s->reqs[r].generation;
    s->free_req = s->reqs[r].next;
    s->n_records++;
    memset(&s->reqs[r], 0, sizeof *s->reqs);
    kvli_req *q = &s->reqs[r];
    q->generation = generation;
    q->used = true;
    q->tokens = tokens;
    q->capacity = capacity;
    q->seq = q->parent = q->first_fork = q->next_fork = KVL_NONE;
    q->arrival = s->arrivals++;
    q->submit_ns = kvli_now(s->cache->ctx);
    s->token_bytes += bytes;
    s->n_active++;
    s->stats.submitted++;
    s->stats.waiting++;
    *out = r;
    return KVL_OK;
}

static kvl_result kvli_request_check(const kvl_sched *s, const kvl_request *q, uint32_t *capacity,
                                     kvl_refusal *refusal) {
    const kvl_cache *c = s->cache;
    kvli_text text = refusal ? kvli_text_at(refusal->text, sizeof refusal->text) : kvli_text_at(NULL, 0);
    uint32_t longest = c->desc.max_seq_tokens, need[KVLI_MAX_CLASSES], fresh = q->max_new_tokens;
    uint64_t slabs = 0, total;
    if (!q->tokens || !q->n_tokens)
        return kvli_fail(c->ctx, text, KVL_INVALID_ARG, "submit: a request needs at least one token");
    if (q->n_stop_tokens > KVLI_MAX_STOP || (q->n_stop_tokens && !q->stop_tokens))
        return kvli_fail(c->ctx, text, KVL_INVALID_ARG,
                         "submit: n_stop_tokens: %u is more than 8, or stop_tokens is null",
                         q->n_stop_tokens);
    if (q->priority >= KVLI_PRIORITIES || (uint32_t)q->klass > KVL_BACKGROUND)
        return kvli_fail(c->ctx, text, KVL_INVALID_ARG, "submit: priority %u or class %d is out of range",
                         q->priority, (int)q->klass);
    if (!fresh) fresh = q->n_tokens <= longest ? kvli_min_u32(256, longest - q->n_tokens + 1) : 1;
    total = (uint64_t)q->n_tokens + fresh - 1; /* the last token needs no KV */
    *capacity = (uint32_t)(total + 1);
    if (total <= longest && (total + 1) * sizeof(int32_t) <= s->desc.token_pool_bytes) return KVL_OK;
    if (total <= longest)
        return kvli_fail(c->ctx, text, KVL_NEVER_FITS,
                         "submit: %llu tokens are more than token_pool_bytes holds",
                         (unsigned long long)total + 1);
    kvli_need(c, total > 1u << 28 ? 1u << 28 : (uint32_t)total, c->geo.block_tokens, need);
    kvli_fits(c, need, c->max_slabs, true, &slabs);
    if (refusal) {
        refusal->n_tokens = total > KVL_NONE ? KVL_NONE : (uint32_t)total;
        refusal->max_tokens = longest;
        refusal->need_bytes = slabs * c->slab_bytes + c->fixed_bytes;
        refusal->budget_bytes = c->desc.max_device_bytes;
    }
    return kvli_fail(c->ctx, text, KVL_NEVER_FITS,
                     "submit: %llu tokens (%u of prompt) are more than the %u that a sequence can have here",
                     (unsigned long long)total, q->n_tokens, longest);
}

KVL_API kvl_result kvl_sched_submit_ex(kvl_sched *s, const kvl_request *request, kvl_req *out,
                                       kvl_refusal *refusal) {
    uint32_t capacity = 0, r = 0;
    if (out) out->id = 0;
    if (refusal) memset(refusal, 0, sizeof *refusal);
    if (!s || !request || !out) return KVL_INVALID_ARG;
    kvl_result result = kvli_request_check(s, request, &capacity, refusal);
    if (result != KVL_OK) return result;
    int32_t *tokens = kvli_tokens_new(s, request->tokens, request->n_tokens, capacity);
    if (!tokens) return KVL_OUT_OF_HOST_MEMORY;
    kvli_lock(&s->cache->lock);
    result = s->closed ? KVL_CLOSED : kvli_req_take(s, tokens, capacity, &r);
    if (result == KVL_OK) {
        kvli_req *q = &s->reqs[r];
        if (request->n_stop_tokens)
            memcpy(q->stop, request->stop_tokens, request->n_stop_tokens * sizeof *q->stop);
        q->n_stop = (uint8_t)request->n_stop_tokens;
        q->n_prompt = q->n_tokens = request->n_tokens;
        q->klass = (uint8_t)request->klass;
        q->priority = (uint8_t)request->priority;
        q->name_space = request->name_space;
        q->salt = request->salt;
        q->no_match = request->no_match;
        q->no_keep = request->no_keep;
        q->user = request->user;
        kvli_list_append(s, &s->inbox, r);
        s->n_inbox++;
        *out = kvli_req_handle(s, r);
        s->events++;
        kvli_cond_broadcast(&s->wake);
    }
    kvli_unlock(&s->cache->lock);
    if (result != KVL_OK) kvli_free(s->cache->ctx, tokens, (size_t)capacity * sizeof *tokens);
    if (result != KVL_OK && refusal)
        snprintf(refusal->text, sizeof refusal->text, "submit: %s", kvl_result_text(result));
    return result;
}

KVL_API kvl_result kvl_sched_submit(kvl_sched *s, const kvl_request *request, kvl_req *out) {
    return kvl_sched_submit_ex(s, request, out, NULL);
}

KVL_API kvl_result kvl_sched_cancel(kvl_sched *s, kvl_req req) {
    if (!s) return KVL_INVALID_ARG;
    kvli_lock(&s->cache->lock);
    uint32_t r = kvli_req_index(s, req);
    if (r != KVL_NONE && !s->reqs[r].finished && !s->reqs[r].cancel) {
        s->reqs[r].cancel = true;
        s->n_cancels++;
        s->events++;
        kvli_cond_broadcast(&s->wake);
    }
    kvli_unlock(&s->cache->lock);
    return r == KVL_NONE ? KVL_INVALID_HANDLE : KVL_OK;
}

KVL_API kvl_result kvl_sched_fork(kvl_sched *s, kvl_req req, void *user, kvl_req *out) {
    uint32_t r = 0, capacity = 0;
    uint64_t of = 0;
    int32_t *tokens = NULL;
    if (out) out->id = 0;
    if (!s || !out) return KVL_INVALID_ARG;
    if (s->cache->step.open)
        return kvli_fail(s->cache->ctx, kvli_serr(s), KVL_BUSY, "kvl_sched_fork: a step is open");
    kvli_lock(&s->cache->lock);
    uint32_t parent = kvli_req_index(s, req);
    kvl_result result = parent == KVL_NONE         ? KVL_INVALID_HANDLE
                        : s->reqs[parent].finished ? KVL_INVALID_ARG
                        : s->closed                ? KVL_CLOSED
                                                   : KVL_OK;
    kvli_unlock(&s->cache->lock);
    if (result == KVL_OK) { /* only this thread changes or ends the parent */
        capacity = s->reqs[parent].capacity;
        tokens = kvli_tokens_new(s, s->reqs[parent].tokens, s->reqs[parent].n_tokens, capacity);
        if (!tokens) result = KVL_OUT_OF_HOST_MEMORY;
    }
    kvli_lock(&s->cache->lock);
    if (result == KVL_OK) result = kvli_req_take(s, tokens, capacity, &r);
    if (result == KVL_OK) {
        kvli_req *q = &s->reqs[r], *p = &s->reqs[parent];
        memcpy(q->stop, p->stop, sizeof q->stop);
        q->n_stop = p->n_stop;
        q->n_prompt = p->n_prompt;
        q->n_tokens = p->n_tokens;
        q->klass = p->klass;
        q->priority = p->priority;
        q->name_space = p->name_space;
        q->salt = p->salt;
        q->no_match = p->no_match;
        q->no_keep = p->no_keep;
        q->user = user;
        of = p->arrival;
        while (s->reqs[parent].parent != KVL_NONE)
            parent = s->reqs[parent].parent; /* a fork that has not joined yet: join with it */
        q->parent = parent;
        q->next_fork = s->reqs[parent].first_fork;
        s->reqs[parent].first_fork = r;
        *out = kvli_req_handle(s, r);
        s->events++;
        kvli_cond_broadcast(&s->wake);
        kvli_inbox_take(s, q->arrival); /* in order of arrival into the recording */
    }
    kvli_unlock(&s->cache->lock);
    if (result == KVL_OK) kvli_record_fork(s, &s->reqs[r], of);
    if (result != KVL_OK) kvli_free(s->cache->ctx, tokens, (size_t)capacity * sizeof *tokens);
    if (result != KVL_OK)
        kvli_fail(s->cache->ctx, kvli_serr(s), result, "kvl_sched_fork: %s", kvl_result_text(result));
    return result;
}

KVL_API void kvl_sched_close(kvl_sched *s) {
    if (!s) return;
    kvli_lock(&s->cache->lock);
    s->closed = true;
    s->events++;
    kvli_cond_broadcast(&s->wake);
    kvli_unlock(&s->cache->lock);
}

KVL_API bool kvl_sched_wait(kvl_sched *s, uint32_t timeout_ms) {
    if (!s) return false;
    bool in_time = true;
    kvli_lock(&s->cache->lock);
    while (s->events == s->seen_events && in_time)
        in_time = kvli_cond_wait_ms(&s->wake, &s->cache->lock, timeout_ms);
    bool woken = s->events != s->seen_events;
    kvli_unlock(&s->cache->lock);
    return woken;
}

KVL_API kvl_result kvl_sched_info(const kvl_sched *sched, kvl_req req, kvl_req_info *out) {
    kvl_sched *s = (kvl_sched *)sched;
    if (!s || !out) return KVL_INVALID_ARG;
    memset(out, 0, sizeof *out);
    kvli_lock(&s->cache->lock);
    uint32_t r = kvli_req_index(s, req);
    if (r != KVL_NONE) {
        const kvli_req *q = &s->reqs[r];
        out->state = q->finished          ? KVL_REQ_FINISHED
                     : q->seq == KVL_NONE ? KVL_REQ_WAITING
                     : q->decode          ? KVL_REQ_DECODE
                                          : KVL_REQ_PREFILL;
        out->finish = (kvl_finish)q->finish;
        out->n_prompt = q->n_prompt;
        out->n_generated = q->n_tokens - q->n_prompt;
        out->preemptions = q->preemptions;
        out->reuse = q->reuse;
        out->submit_ns = q->submit_ns;
        out->first_token_ns = q->first_ns;
        out->last_token_ns = q->last_ns;
        out->finish_ns = q->finish_ns;
        out->user = q->user;
        if (q->seq != KVL_NONE) {
            out->seq = kvli_seq_handle(s->cache, q->seq);
            out->n_computed = s->cache->seqs[q->seq].length;
        }
    }
    kvli_unlock(&s->cache->lock);
    return r == KVL_NONE ? KVL_INVALID_HANDLE : KVL_OK;
}

KVL_API kvl_result kvl_sched_tokens(const kvl_sched *sched, kvl_req req, int32_t *tokens, uint32_t capacity,
                                    uint32_t *n_tokens) {
    kvl_sched *s = (kvl_sched *)sched;
    if (!s || (!tokens && capacity)) return KVL_INVALID_ARG;
    kvli_lock(&s->cache->lock);
    uint32_t r = kvli_req_index(s, req), n = 0;
    if (r != KVL_NONE) {
        const kvli_req *q = &s->reqs[r];
        n = q->n_tokens - q->n_prompt;
        if (capacity) memcpy(tokens, q->tokens + q->n_prompt, kvli_min_u32(n, capacity) * sizeof *tokens);
    }
    kvli_unlock(&s->cache->lock);
    if (n_tokens) *n_tokens = n;
    return r == KVL_NONE ? KVL_INVALID_HANDLE : KVL_OK;
}

/* ==== >>cpu: attention on the CPU ====
   The order in which a row is computed is fixed by its position alone, so that its bits do not depend on how
   rows were chunked, on threads or on other sequences:
     - keys fall into segments of geo->segment_tokens and, inside, into tiles of KVLI_CPU_TILE tokens, both
       counted from position 0;
     - a score is the sum of partial sums, each a chain over the dims in order, added up as a binary tree;
     - a tile is one step of the online softmax (Milakov & Gimelshein 2018); values are added token by token;
     - segments merge from left to right (split-KV: Dao et al. 2023, Flash-Decoding).
   Tasks differ only in which rows and segments they take. Kernels take several rows at once, each with the
   same operations as alone. What a row must not see is left out of loops or replaced by selection, never
   multiplied by zero: it may be NaN. Scores are kept in base 2: log2(e) is folded into q. */
enum {
    KVLI_CPU_TILE = 128,   /* tokens of one softmax step; segments are cut into tiles from their start */
    KVLI_CPU_STRIDE = 144, /* floats between score rows: the last 16-wide store may run over */
    KVLI_CPU_CHUNK = 32,   /* tokens decoded at once where rows are decoded to memory: 1 << 5 */
    KVLI_CPU_BLOCKS = KVLI_CPU_TILE / 8, /* of a tile, at most */
    KVLI_CPU_AHEAD = 2,                  /* tiles that are prefetched before they are read */
    KVLI_CPU_MAX_Q = 64,                 /* query rows of a task */
    KVLI_CPU_FLOATS = 22016,             /* scratch of a task, on its stack: 86 KB */
    KVLI_CPU_DIRECT_Q = 8                /* more query rows than that share K and V decoded to memory */
};
static const float KVLI_LOG2E = 1.44269504088896f;
static const float KVLI_LOW = -3.0e38f; /* below every score; finite, so that differences stay defined */

/* Which tokens of a range a query sees: [0, sink) and [lo, hi), sink <= lo. */
typedef struct kvli_cpu_run {
    uint32_t sink, lo, hi;
} kvli_cpu_run;

/* Softmax state of a query row: maximum and sum of 2^(score - maximum). */
typedef struct kvli_cpu_stat {
    float m, l;
} kvli_cpu_stat;

/* Which query rows stand in scratch in the form that a kernel wants, from one block to the next. */
typedef struct kvli_cpu_spread {
    const float *q;
    uint32_t n_q;
} kvli_cpu_spread;

/* The K or V tiles of consecutive blocks and the query rows that read them. Rows of s are KVLI_CPU_STRIDE
   apart and start at the first token. */
typedef struct kvli_cpu_block {
    const kvli_side *side;
    const uint8_t *const *tiles; /* a few more than are needed may be looked at: see kvli_cpu_part */
    uint32_t n_tiles;
    uint32_t n;     /* tokens that anyone sees */
    uint32_t first; /* index of the first token in the range that runs count in */
    uint32_t n_q;
    const float *q; /* keys: [n_q] padded rows, scaled, rotated as the tile is; one more row may be read */
    float *s;       /* scores out (keys); probabilities in, may be overwritten (values) */
    const kvli_cpu_run *runs;
    float *acc; /* values: [n_q] rows to add to */
    size_t q_stride, acc_stride;
    float *scratch;
    uint32_t scratch_dim; /* the larger of the two head dims */
    kvli_cpu_spread *spread;
} kvli_cpu_block;

/* A SIMD path. */
typedef struct kvli_cpu_ops {
    uint32_t row_align; /* rows of q and of accumulators are padded to a multiple of it */
    /* 4-bit rows stand in another order (kvli_cpu_key_place, kvli_cpu_value_place), and INT4 values leave 16 partial sums
       of probability times zero point per 64 dims behind the accumulator's dims. */
    bool turns_nibbles;
    size_t (*scratch_floats)(const kvli_geometry *geo);
    void (*score)(const kvli_cpu_block *b);
    /* Scores to probabilities of one or more of n query rows; returns of how many. by: what their
       accumulators must be multiplied with. cap: 0 or softcap * log2(e). */
    uint32_t (*softmax)(float *s, const kvli_cpu_run *runs, uint32_t n, float cap, kvli_cpu_stat *st,
                        float *by);
    void (*values)(const kvli_cpu_block *b);
    float (*exp2)(float x);
} kvli_cpu_ops;

/* Cuts the block's query rows into groups, and each group's tokens [t0, t1) of the block into what all of it
   see, done together, and what single rows see before and after that. Every row gets its tokens in order. */
typedef void (*kvli_cpu_run_fn)(void *arg, uint32_t q, uint32_t n_q, uint32_t t0, uint32_t t1);

static void kvli_cpu_group_runs(const kvli_cpu_run *runs, uint32_t first, uint32_t t0, uint32_t t1,
                                uint32_t n_q, uint32_t q0, kvli_cpu_run_fn fn, void *arg) {
    uint32_t lo[8], hi[8], a = t0, b = t1;
    for (uint32_t i = 0; i < n_q; i++) {
        const kvli_cpu_run *r = &runs[i];
        uint32_t sink = r->sink > first ? kvli_min_u32(r->sink - first, t1) : 0;
        if (sink > t0) fn(arg, q0 + i, 1, t0, sink);
        lo[i] = kvli_max_u32(r->lo > first ? kvli_min_u32(r->lo - first, t1) : 0, t0);
        hi[i] = kvli_max_u32(r->hi > first ? kvli_min_u32(r->hi - first, t1) : 0, lo[i]);
        a = kvli_max_u32(a, lo[i]);
        b = kvli_min_u32(b, hi[i]);
    }
    if (a >= b) {
        for (uint32_t i = 0; i < n_q; i++)
            if (lo[i] < hi[i]) fn(arg, q0 + i, 1, lo[i], hi[i]);
        return;
    }
    for (uint32_t i = 0; i < n_q; i++)
        if (lo[i] < a) fn(arg, q0 + i, 1, lo[i], a);
    fn(arg, q0, n_q, a, b);
    for (uint32_t i = 0; i < n_q; i++)
        if (b < hi[i]) fn(arg, q0 + i, 1, b, hi[i]);
}

/* How many of `left` rows a kernel takes at once: 7 run as 8 and 3 as 4 with a row to spare. */
static uint32_t kvli_cpu_take(uint32_t left, uint32_t widest) {
    if (left >= 7 && widest >= 8) return kvli_min_u32(left, 8);
    if (left >= 3 && widest >= 4) return kvli_min_u32(left, 4);
    return left >= 2 && widest >= 2 ? 2 : 1;
}

static void kvli_cpu_spread_runs(const kvli_cpu_run *runs, uint32_t first, uint32_t t0, uint32_t t1,
                                 uint32_t n_q, uint32_t widest, kvli_cpu_run_fn fn, void *arg) {
    for (uint32_t i = 0, n; i < n_q; i += n) {
        n = kvli_cpu_take(n_q - i, widest);
        kvli_cpu_group_runs(runs + i, first, t0, t1, n, i, fn, arg);
    }
}

/* ---- scalar: the plain statement of what the other paths do ---- */
static float kvli_s_exp2(float x) {
    union {
        uint32_t u;
        float f;
    } two;
    float n, r, p;
    if (x != x) return x;
    if (x < -126.0f) x = -126.0f;
    n = floorf(x + 0.5f);
    r = x - n;
    p = 1.535336188319500e-4f;
    p = p * r + 1.339887440266574e-3f;
    p = p * r + 9.618437357674640e-3f;
    p = p * r + 5.550332471162809e-2f;
    p = p * r + 2.402264791363012e-1f;
    p = p * r + 6.931472028550421e-1f;
    two.u = (uint32_t)((int32_t)n + 127) << 23;
    return (p * r + 1.0f) * two.f;
}

static float kvli_s_tanh(float x) {
    float e = kvli_s_exp2(-2.0f * KVLI_LOG2E * fabsf(x)), t = (1.0f - e) / (1.0f + e);
    return x < 0 ? -t : t;
}

static size_t kvli_s_scratch(const kvli_geometry *geo) {
    return (size_t)geo->block_tokens * kvli_max_u32(geo->k_dim, geo->v_dim);
}

KVLI_NOINLINE float kvli_s_dot(const float *q, const float *k, uint32_t dim) {
    float s = 0;
    for (uint32_t d = 0; d < dim; d++) s += q[d] * k[d];
    return s;
}

static void kvli_s_score(const kvli_cpu_block *b) {
    uint32_t dim = b->side->dim, T = b->side->tokens;
    for (uint32_t t = 0; t < b->n; t++) {
        if (t % T == 0) kvli_decode_tile(b->side, b->tiles[t / T], b->scratch);
        for (uint32_t i = 0; i < b->n_q; i++)
            b->s[(size_t)i * KVLI_CPU_STRIDE + t] =
                kvli_s_dot(b->q + i * b->q_stride, b->scratch + (size_t)(t % T) * dim, dim);
    }
}

static uint32_t kvli_s_softmax(float *s, const kvli_cpu_run *run, uint32_t n, float cap, kvli_cpu_stat *st,
                               float *by) {
    float m = st->m, sum = 0;
    (void)n;
    for (uint32_t t = 0; t < run->hi; t++) {
        if (t >= run->sink && t < run->lo) continue;
        if (cap != 0) s[t] = cap * kvli_s_tanh(s[t]);
        if (!(s[t] <= m)) m = s[t];
    }
    *by = kvli_s_exp2(st->m - m);
    for (uint32_t t = 0; t < run->hi; t++) {
        if (t >= run->sink && t < run->lo) continue;
        s[t] = kvli_s_exp2(s[t] - m);
        sum += s[t];
    }
    st->l = st->l * *by + sum;
    st->m = m;
    return 1;
}

static void kvli_s_values_run(void *arg, uint32_t q, uint32_t n_q, uint32_t t0, uint32_t t1) {
    const kvli_cpu_block *b = (const kvli_cpu_block *)arg;
    const float *p = b->s + (size_t)q * KVLI_CPU_STRIDE;
    float *acc = b->acc + q * b->acc_stride;
    uint32_t dim = b->side->dim;
    (void)n_q; /* 1 */
    for (uint32_t t = t0; t < t1; t++)
        for (uint32_t d = 0; d < dim; d++) acc[d] += p[t] * b->scratch[(size_t)t * dim + d];
}

static void kvli_s_values(const kvli_cpu_block *b) {
    uint32_t T = b->side->tokens;
    for (uint32_t i = 0; i < b->n_tiles; i++) {
        kvli_cpu_block one = *b;
        one.s += i * T;
        kvli_decode_tile(b->side, b->tiles[i], b->scratch);
        kvli_cpu_spread_runs(b->runs, b->first + i * T, 0, T, b->n_q, 1, kvli_s_values_run, &one);
    }
}

static const kvli_cpu_ops KVLI_CPU_SCALAR = {
    16, false, kvli_s_scratch, kvli_s_score, kvli_s_softmax, kvli_s_values, kvli_s_exp2};

#if KVLI_X86
/* ---- AVX-512: rows are decoded in registers where few query rows share them ---- */
#if defined(__clang__)
#define KVLI_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define KVLI_UNROLL _Pragma("GCC unroll 16")
#else
#define KVLI_UNROLL
#endif
/* Keeps gcc from reading an operand from memory again for each use. */
#if defined(__GNUC__) || defined(__clang__)
#define KVLI_IN_REGISTER(x) __asm__("" : "+v"(x))
#else
#define KVLI_IN_REGISTER(x) ((void)0)
#endif
#define KVLI_Z KVLI_INLINE KVLI_TARGET_AVX512
#if defined(__GNUC__) && !defined(__clang__) /* g++ warns of its own _mm512_undefined_ps (GCC bug 105593) */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

/* Bytes of 8 dims of a row; 0, keys as quads (below): of four rows as f32. */
KVLI_INLINE uint32_t kvli_bytes8(kvl_format f) {
    switch (f) {
    case 0: return 128;
    case KVL_F32: return 32;
    case KVL_F16:
    case KVL_BF16: return 16;
    case KVL_NVFP4:
    case KVL_INT4:
    case KVL_INT4_CHANNEL: return 4;
    default: return 8;
    }
}

/* Rows of a tile in some format, with its scales as f32 beside it. Values are taken as pairs: 32 dims of one
   row in two vectors. Keys are taken as quads: 8 dims of four rows in two vectors, each with four dims of row
   i in its lanes 4i to 4i + 3, so that little is left to add up across lanes. */
typedef struct kvli_z_rows {
    const uint8_t *const *tiles; /* of 1 << shift rows each */
    size_t stride;
    const float *side; /* values: scales of a row every side_stride; keys: of four every kvli_z_side_floats */
    uint32_t side_stride, dim, shift;
} kvli_z_rows;

/* Keys that were decoded to memory as quads. */
enum { KVLI_Z_QUADS = 0 };

/* The parts of a task's scratch. */
typedef struct kvli_z_scratch {
    /* [CHUNK][padded dim], or query rows with each four dims repeated four times: [DIRECT_Q][dim / 4][4][4]
     */
    float *rows;
    float *side;    /* [TILE][padded dim / 16] scales of groups */
    float *token;   /* [TILE] scales, or scales and zeros [2][4][TILE] for INT4 values */
    float *channel; /* [2][padded dim] scales, zeros */
    float *folded;  /* [8][padded dim] q times channel scales */
    float *p;       /* [8][STRIDE] probabilities times scales */
    float *spare;   /* accumulators of a row that is not there */
} kvli_z_scratch;

static inline uint32_t kvli_z_pad(uint32_t dim) { return (dim + 31u) & ~31u; }

static inline const uint8_t *kvli_z_row(const kvli_z_rows *r, uint32_t t) {
    return r->tiles[t >> r->shift] + (t & ((1u << r->shift) - 1)) * r->stride;
}

static kvli_z_scratch kvli_z_carve(float *at, uint32_t dim) {
    kvli_z_scratch s;
    s.rows = at;
    s.side = s.rows + KVLI_CPU_CHUNK * dim;
    s.token = s.side + KVLI_CPU_TILE / 16 * dim;
    s.channel = s.token + 8 * KVLI_CPU_TILE;
    s.folded = s.channel + 2 * dim;
    s.spare = s.folded + 8 * dim;
    s.p = s.spare + dim;
    return s;
}

static size_t kvli_z_scratch_floats(const kvli_geometry *geo) {
    uint32_t dim = kvli_z_pad(kvli_max_u32(geo->k_dim, geo->v_dim));
    return (size_t)(KVLI_CPU_CHUNK + KVLI_CPU_TILE / 16 + 2 + 8 + 1) * dim + 8 * KVLI_CPU_TILE +
           8 * KVLI_CPU_STRIDE;
}

/* What is taken from codes whose zeros are summed apart, so that the two sums do not cancel: zeros are given back as
   much times the scale. */
KVLI_INLINE float kvli_z_centre(kvl_format f) {
    return f == KVL_INT8_CHANNEL ? 128.0f : f == KVL_INT4_CHANNEL ? 7.5f : 0.0f;
}

/* What codes of 4 bits stand for. */
KVLI_Z __m512 kvli_z_nibbles(kvl_format f) {
    if (f == KVL_NVFP4)
        return _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6);
    return _mm512_sub_ps(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                         _mm512_set1_ps(kvli_z_centre(f)));
}

/* 16 bytes as numbers. FP8 shifted into f16 is 2^-8 of its value: the scale makes up for that. */
KVLI_Z __m512 kvli_z_codes(kvl_format f, __m128i x) {
    __m256i h;
    if (f == KVL_INT8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x));
    if (f == KVL_INT8_CHANNEL)
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_xor_si128(x, _mm_set1_epi8(-128))));
    h = _mm256_slli_epi16(_mm256_cvtepi8_epi16(x), 7);
    return _mm512_cvtph_ps(_mm256_and_si256(h, _mm256_set1_epi16((short)0xbfff)));
}

/* 16 numbers of a row whose elements are whole bytes. */
KVLI_Z __m512 kvli_z_16(kvl_format f, const uint8_t *row, uint32_t i) {
    switch (f) {
    case KVL_F32: return _mm512_loadu_ps((const float *)(const void *)row + 16 * i);
    case KVL_F16: return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)row + i));
    case KVL_BF16: {
        __m256i x = _mm256_loadu_si256((const __m256i *)(const void *)row + i);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
    }
    default: return kvli_z_codes(f, _mm_loadu_si128((const __m128i *)(const void *)row + i));
    }
}

/* Pair j of a row. Nibbles come out as 16 even, then 16 odd elements; vpermps takes the low four bits of a
   lane as its index. A tail is the last 16 dims where 32 does not divide the dims: the rest becomes zero. */
KVLI_Z void kvli_z_pair(kvl_format f, const uint8_t *row, const float *side, uint32_t j, bool tail,
                        __m512 *v0, __m512 *v1) {
    const __m512i halves = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    if (f == KVL_NVFP4 || f == KVL_INT4_CHANNEL) {
        const __m128i *at = (const __m128i *)(const void *)row + j;
        __m512i x = _mm512_cvtepu8_epi32(tail ? _mm_loadl_epi64(at) : _mm_loadu_si128(at));
        const __m512 table = kvli_z_nibbles(f);
        *v0 = _mm512_permutexvar_ps(x, table);
        *v1 = _mm512_permutexvar_ps(_mm512_srli_epi32(x, 4), table);
        if (f == KVL_NVFP4) {
            __m128i two = _mm_loadl_epi64((const __m128i *)(const void *)(side + 2 * j));
            __m512 scale = _mm512_permutexvar_ps(halves, _mm512_castps128_ps512(_mm_castsi128_ps(two)));
            *v0 = _mm512_mul_ps(*v0, scale);
            *v1 = _mm512_mul_ps(*v1, scale);
        }
    } else {
        *v0 = kvli_z_16(f, row, 2 * j);
        *v1 = tail ? _mm512_setzero_ps() : kvli_z_16(f, row, 2 * j + 1);
    }
}

/* Calls CALL with each format of values as a constant. INT4 values stand as bare codes, like channel formats.
 */
#define KVLI_Z_VALUE_FORMATS(f, CALL)             \
    switch (f) {                                  \
    case KVL_F32: CALL(KVL_F32); break;           \
    case KVL_F16: CALL(KVL_F16); break;           \
    case KVL_BF16: CALL(KVL_BF16); break;         \
    case KVL_INT8: CALL(KVL_INT8); break;         \
    case KVL_FP8_E4M3: CALL(KVL_FP8_E4M3); break; \
    case KVL_NVFP4: CALL(KVL_NVFP4); break;       \
    default: CALL(KVL_INT4_CHANNEL); break;       \
    }

/* Decodes rows [t0, t0 + n) of values to f32, pairs as they come. */
KVLI_Z void kvli_z_decode_as(kvl_format f, const kvli_z_rows *r, uint32_t t0, uint32_t n, float *out) {
    for (uint32_t t = t0; t < t0 + n; t++) {
        const uint8_t *row = kvli_z_row(r, t);
        const float *side = r->side + t * r->side_stride;
        for (uint32_t j = 0; j < (r->dim + 31) / 32; j++, out += 32) {
            __m512 v0, v1;
            if (32 * j + 32 <= r->dim)
                kvli_z_pair(f, row, side, j, false, &v0, &v1);
            else
                kvli_z_pair(f, row, side, j, true, &v0, &v1);
            _mm512_storeu_ps(out, v0);
            _mm512_storeu_ps(out + 16, v1);
        }
    }
}

static KVLI_TARGET_AVX512 void kvli_z_decode(kvl_format f, const kvli_z_rows *r, uint32_t t0, uint32_t n,
                                             float *out){
#define KVLI_CALL(F) kvli_z_decode_as(F, r, t0, n, out)
    KVLI_Z_VALUE_FORMATS(f, KVLI_CALL)
#undef KVLI_CALL
}

/* 16 bytes of two rows, one after the other. */
KVLI_Z __m256i kvli_z_two(const uint8_t *a, const uint8_t *b) {
    __m128i x = _mm_loadu_si128((const __m128i *)(const void *)a),
            y = _mm_loadu_si128((const __m128i *)(const void *)b);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(x), y, 1);
}

/* 32 dims of 4 bits of four rows, in a tail 16 and zeros, as four 32-bit numbers a row. */
KVLI_Z __m512i kvli_z_four(const uint8_t *row, size_t stride, bool tail) {
    __m256i half[2];
    KVLI_UNROLL for (int i = 0; i < 2; i++, row += 2 * stride) {
        if (tail)
            half[i] = _mm256_inserti128_si256(
                _mm256_castsi128_si256(_mm_loadl_epi64((const __m128i *)(const void *)row)),
                _mm_loadl_epi64((const __m128i *)(const void *)(row + stride)), 1);
        else
            half[i] = kvli_z_two(row, row + stride);
    }
    return _mm512_inserti64x4(_mm512_castsi256_si512(half[0]), half[1], 1);
}

/* Dims 8c to 8c + 7 of four rows; bytes and nibbles become codes. Nibbles: not those dims, but the next two of each 32-bit
   number of x, which lasts for four calls. */
KVLI_Z void kvli_z_quad(kvl_format f, const uint8_t *row, size_t stride, uint32_t c, bool tail, __m512i *x,
                        __m512 *v) {
    if (f == KVL_NVFP4 || f == KVL_INT4 || f == KVL_INT4_CHANNEL) {
        const __m512 table = kvli_z_nibbles(f);
        *x = c % 4 == 0 ? kvli_z_four(row + c * 4, stride, tail) : _mm512_srli_epi32(*x, 8);
        v[0] = _mm512_permutexvar_ps(*x, table);
        v[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(*x, 4), table);
        return;
    }
    row += c * kvli_bytes8(f);
    const uint8_t *r[4] = {row, row + stride, row + 2 * stride, row + 3 * stride};
    if (f == KVLI_Z_QUADS) {
        v[0] = _mm512_loadu_ps((const float *)(const void *)row);
        v[1] = _mm512_loadu_ps((const float *)(const void *)(row + 64));
    } else if (f == KVL_F32) {
        __m512i x =
            _mm512_inserti64x4(_mm512_castsi256_si512(kvli_z_two(r[0], r[1])), kvli_z_two(r[2], r[3]), 1);
        __m512i y = _mm512_inserti64x4(_mm512_castsi256_si512(kvli_z_two(r[0] + 16, r[1] + 16)),
                                       kvli_z_two(r[2] + 16, r[3] + 16), 1);
        v[0] = _mm512_castsi512_ps(x);
        v[1] = _mm512_castsi512_ps(y);
    } else if (f == KVL_F16 || f == KVL_BF16) {
        __m256i even = kvli_z_two(r[0], r[2]), odd = kvli_z_two(r[1], r[3]);
        __m256i x[2] = {_mm256_unpacklo_epi64(even, odd), _mm256_unpackhi_epi64(even, odd)};
        KVLI_UNROLL for (int k = 0; k < 2; k++) v[k] =
            f == KVL_F16 ? _mm512_cvtph_ps(x[k])
                         : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x[k]), 16));
    } else {
        __m128i ab = _mm_unpacklo_epi32(_mm_loadl_epi64((const __m128i *)(const void *)r[0]),
                                        _mm_loadl_epi64((const __m128i *)(const void *)r[1]));
        __m128i cd = _mm_unpacklo_epi32(_mm_loadl_epi64((const __m128i *)(const void *)r[2]),
                                        _mm_loadl_epi64((const __m128i *)(const void *)r[3]));
        v[0] = kvli_z_codes(f, _mm_unpacklo_epi64(ab, cd));
        v[1] = kvli_z_codes(f, _mm_unpackhi_epi64(ab, cd));
    }
}

/* Four numbers, one a row, to the lanes of their rows. */
KVLI_Z __m512 kvli_z_spread(const float *at) {
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(_mm_loadu_ps(at)));
}

/* Floats of scales for four rows of keys. */
KVLI_Z uint32_t kvli_z_side_floats(kvl_format f, uint32_t dim) {
    return f == KVL_NVFP4 ? (dim + 31) / 32 * 8 : f == KVL_INT4 ? (dim + 63) / 64 * 8 : 0;
}

/* Dims of keys as quads: nibbles come 32 at a time. */
KVLI_Z uint32_t kvli_z_key_dims(kvl_format f, uint32_t dim) {
    return f == KVL_NVFP4 || f == KVL_INT4 || f == KVL_INT4_CHANNEL ? kvli_z_pad(dim) : dim;
}

/* kvli_z_quad with scales of groups of dims applied. */
KVLI_Z void kvli_z_key(kvl_format f, const uint8_t *row, size_t stride, const float *side, uint32_t c,
                       bool tail, __m512i *x, __m512 *v) {
    kvli_z_quad(f, row, stride, c, tail, x, v);
    if (f == KVL_NVFP4) {
        const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
        const __m512 scale =
            _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_loadu_ps(side + c / 4 * 8)));
        v[0] = _mm512_mul_ps(v[0], scale);
        v[1] = _mm512_mul_ps(v[1], scale);
    } else if (f == KVL_INT4) {
        const __m512 scale = kvli_z_spread(side + c / 8 * 8), zero = kvli_z_spread(side + c / 8 * 8 + 4);
        v[0] = _mm512_fmadd_ps(v[0], scale, zero);
        v[1] = _mm512_fmadd_ps(v[1], scale, zero);
    }
}

/* Lane 4t + i of the result is the sum over lanes 4t to 4t + 3 of a[i], as the tree (l, l+2), (l, l+1). */
KVLI_Z __m512 kvli_z_sum4(__m512 *a) {
    __m512 x = _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, a[0], a[2]), _mm512_shuffle_ps(a[0], a[2], 0x4e));
    __m512 y = _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, a[1], a[3]), _mm512_shuffle_ps(a[1], a[3], 0x4e));
    __m512 swap = _mm512_permute_ps(_mm512_mask_blend_ps(0xaaaa, y, x), 0xb1);
    return _mm512_add_ps(_mm512_mask_blend_ps(0xaaaa, x, y), swap);
}

KVLI_Z float kvli_z_sum(__m512 a) {
    a = _mm512_add_ps(a, _mm512_shuffle_f32x4(a, a, 0x4e));
    a = _mm512_add_ps(a, _mm512_shuffle_f32x4(a, a, 0xb1));
    a = _mm512_add_ps(a, _mm512_permute_ps(a, 0x4e));
    a = _mm512_add_ps(a, _mm512_permute_ps(a, 0xb1));
    return _mm512_cvtss_f32(a);
}

/* Where rows of q stand with each four dims repeated four times: a broadcast would take a shuffle's place
   (Zen 4). Not so where q changes with each block or where loads are many. */
KVLI_Z bool kvli_z_spreads(kvl_format f) {
    return f != KVL_INT8_CHANNEL && f != KVL_INT4_CHANNEL && f != KVLI_Z_QUADS;
}

static KVLI_TARGET_AVX512 void kvli_z_spread_q(const kvli_cpu_block *b, float *out) {
    if (b->spread->q == b->q && b->spread->n_q >= b->n_q) return;
    b->spread->q = b->q;
    b->spread->n_q = b->n_q;
    for (uint32_t i = 0; i < b->n_q; i++)
        for (uint32_t d = 0; d < b->side->dim; d += 4, out += 16)
            _mm512_storeu_ps(out, _mm512_broadcast_f32x4(_mm_loadu_ps(b->q + i * b->q_stride + d)));
}

/* Where query rows are and scores go. The last of a kernel's rows has its own place: it may be one too many.
 */
typedef struct kvli_z_queries {
    const float *q;
    size_t q_stride;
    const float *zero;  /* [H] to add: q times the zeros of channel scales */
    const float *token; /* scales of tokens */
    float *s, *last;
} kvli_z_queries;

/* Scores of four query rows with the eight tokens of two quads: a[0], a[1] of the first row, a[step], a[step
 * + 1] of the second. */
KVLI_Z void kvli_z_score_out(const __m512 *a, const int step, const float *zero, const float *token, float *s,
                             float *last) {
    const __m512i turn = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
    const __m512i half = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    __m512 x[4] = {a[0], a[step], a[2 * step], a[3 * step]},
           y[4] = {a[1], a[step + 1], a[2 * step + 1], a[3 * step + 1]}, low, high;
    __m512 z = _mm512_castps128_ps512(_mm_loadu_ps(zero)),
           by = _mm512_broadcast_f32x8(_mm256_loadu_ps(token));
    x[0] = kvli_z_sum4(x);
    y[0] = kvli_z_sum4(y);
    low = _mm512_permutex2var_ps(x[0], turn, y[0]);
    high = _mm512_permutex2var_ps(x[0], _mm512_add_epi32(turn, _mm512_set1_epi32(2)), y[0]);
    low = _mm512_fmadd_ps(low, by, _mm512_permutexvar_ps(half, z));
    high = _mm512_fmadd_ps(high, by, _mm512_permutexvar_ps(_mm512_add_epi32(half, _mm512_set1_epi32(2)), z));
    _mm256_storeu_ps(s, _mm512_castps512_ps256(low));
    _mm256_storeu_ps(s + KVLI_CPU_STRIDE, _mm512_extractf32x8_ps(low, 1));
    _mm256_storeu_ps(s + 2 * KVLI_CPU_STRIDE, _mm512_castps512_ps256(high));
    _mm256_storeu_ps(last, _mm512_extractf32x8_ps(high, 1));
}

/* Scores of H query rows with tokens [0, n), Q quads at a time: n is rounded up to 4 * Q. */
KVLI_Z void kvli_z_score_as(kvl_format f, const int H, const int Q, const kvli_z_rows *r, uint32_t n,
                            const kvli_z_queries *w) {
    const size_t wide = kvli_z_spreads(f) ? 4 : 1, stride = r->stride;
    const uint32_t n_side = kvli_z_side_floats(f, r->dim), bytes = 4 * (uint32_t)Q * kvli_bytes8(f),
                   n_lines = (bytes + 63) / 64;
    for (uint32_t t0 = 0; t0 < n; t0 += 4 * (uint32_t)Q) {
        const float *side = r->side + t0 / 4 * n_side;
        const uint8_t *row[4], *ahead = kvli_z_row(r, t0 + (KVLI_CPU_AHEAD << r->shift));
        __m512i x[4];
        __m512 a[16];
        KVLI_UNROLL for (int i = 0; i < Q; i++) row[i] = kvli_z_row(r, t0 + 4 * (uint32_t)i);
        KVLI_UNROLL for (int i = 0; i < H * Q; i++) a[i] = _mm512_setzero_ps();
        for (uint32_t c = 0; c < r->dim / 8; c++, ahead += bytes) {
            __m512 v[4][2];
            if (f != KVLI_Z_QUADS) {
                KVLI_UNROLL for (uint32_t i = 0; i < n_lines; i++) KVLI_PREFETCH(ahead + 64 * i);
            }
            KVLI_UNROLL for (int i = 0; i < Q; i++)
                kvli_z_key(f, row[i], stride, side + (uint32_t)i * n_side, c, false, &x[i], v[i]);
            KVLI_UNROLL for (int h = 0; h < H; h++) {
                const float *at = w->q + (size_t)h * w->q_stride + 8 * wide * c;
                KVLI_UNROLL for (int k = 0; k < 2; k++) {
                    __m512 q = wide == 4 ? _mm512_loadu_ps(at + 16 * k)
                                         : _mm512_broadcast_f32x4(_mm_loadu_ps(at + 4 * k));
                    KVLI_IN_REGISTER(q);
                    KVLI_UNROLL for (int i = 0; i < Q; i++) a[h * Q + i] =
                        _mm512_fmadd_ps(q, v[i][k], a[h * Q + i]);
                }
            }
        }
        if (H <= 2) {
            const __m512i turn = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            KVLI_UNROLL for (int h = 0; h < H; h++) {
                __m512 sum = _mm512_permutexvar_ps(turn, kvli_z_sum4(a + h * Q));
                _mm512_storeu_ps(
                    w->s + (size_t)h * KVLI_CPU_STRIDE + t0,
                    _mm512_fmadd_ps(sum, _mm512_loadu_ps(w->token + t0), _mm512_set1_ps(w->zero[h])));
            }
            continue;
        }
        KVLI_UNROLL for (int h = 0; h < H; h += 4) {
            float *s = w->s + (size_t)h * KVLI_CPU_STRIDE + t0,
                  *last = h + 4 == H ? w->last + t0 : s + 3 * KVLI_CPU_STRIDE;
            KVLI_UNROLL for (int i = 0; i < Q; i += 2) kvli_z_score_out(
                a + h * Q + i, Q, w->zero + h, w->token + t0 + 4 * i, s + 4 * i, last + 4 * i);
        }
    }
}

/* Formats of keys that kernels decode in registers; the rest (F32, INT4) always comes through memory. */
#define KVLI_Z_KEY_FORMATS(f, CALL)                       \
    switch (f) {                                          \
    case KVL_F16: CALL(KVL_F16); break;                   \
    case KVL_BF16: CALL(KVL_BF16); break;                 \
    case KVL_INT8: CALL(KVL_INT8); break;                 \
    case KVL_INT8_CHANNEL: CALL(KVL_INT8_CHANNEL); break; \
    case KVL_FP8_E4M3: CALL(KVL_FP8_E4M3); break;         \
    case KVL_NVFP4: CALL(KVL_NVFP4); break;               \
    case KVL_INT4_CHANNEL: CALL(KVL_INT4_CHANNEL); break; \
    default: CALL(KVLI_Z_QUADS); break;                   \
    }

static KVLI_TARGET_AVX512 void kvli_z_score1(kvl_format f, const kvli_z_rows *r, uint32_t n,
                                             const kvli_z_queries *w) {
#define KVLI_CALL(F) kvli_z_score_as(F, 1, 4, r, n, w)
    KVLI_Z_KEY_FORMATS(f, KVLI_CALL)
#undef KVLI_CALL
}

static KVLI_TARGET_AVX512 void kvli_z_score2(kvl_format f, const kvli_z_rows *r, uint32_t n,
                                             const kvli_z_queries *w) {
#define KVLI_CALL(F) kvli_z_score_as(F, 2, 4, r, n, w)
    KVLI_Z_KEY_FORMATS(f, KVLI_CALL)
#undef KVLI_CALL
}

static KVLI_TARGET_AVX512 void kvli_z_score4(kvl_format f, const kvli_z_rows *r, uint32_t n,
                                             const kvli_z_queries *w) {
#define KVLI_CALL(F) kvli_z_score_as(F, 4, 4, r, n, w)
    KVLI_Z_KEY_FORMATS(f, KVLI_CALL)
#undef KVLI_CALL
}

static KVLI_TARGET_AVX512 void kvli_z_score8(kvl_format f, const kvli_z_rows *r, uint32_t n,
                                             const kvli_z_queries *w){
#define KVLI_CALL(F) kvli_z_score_as(F, 8, 2, r, n, w)
    KVLI_Z_KEY_FORMATS(f, KVLI_CALL)
#undef KVLI_CALL
}

/* Decodes keys [t0, t0 + n) to quads in memory. */
KVLI_Z void kvli_z_decode_keys_as(kvl_format f, const kvli_z_rows *r, uint32_t t0, uint32_t n, float *out) {
    const uint32_t n_side = kvli_z_side_floats(f, r->dim), padded = kvli_z_key_dims(f, r->dim);
    for (uint32_t t = t0; t < t0 + n; t += 4) {
        __m512i x;
        for (uint32_t c = 0; c < padded / 8; c++, out += 32) {
            __m512 v[2];
            kvli_z_key(f, kvli_z_row(r, t), r->stride, r->side + t / 4 * n_side, c, c / 4 * 32 + 32 > r->dim,
                       &x, v);
            _mm512_storeu_ps(out, v[0]);
            _mm512_storeu_ps(out + 16, v[1]);
        }
    }
}

static KVLI_TARGET_AVX512 void kvli_z_decode_keys(kvl_format f, const kvli_z_rows *r, uint32_t t0, uint32_t n,
                                                  float *out) {
#define KVLI_CALL(F) kvli_z_decode_keys_as(F, r, t0, n, out)
    if (f == KVL_F32)
        KVLI_CALL(KVL_F32);
    else if (f == KVL_INT4)
        KVLI_CALL(KVL_INT4);
    else
        KVLI_Z_KEY_FORMATS(f, KVLI_CALL)
#undef KVLI_CALL
}

static KVLI_TARGET_AVX512 void kvli_z_f16(const uint8_t *src, uint32_t n, float by, float *dst) {
    const __m256 m = _mm256_set1_ps(by);
    for (uint32_t i = 0; i < n; i += 8)
        _mm256_storeu_ps(
            dst + i,
            _mm256_mul_ps(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(src + 2 * i))), m));
}

/* NVFP4's scales as f32. Values: [row][groups, padded to even]. Keys: [row / 4][group / 2][row % 4][group % 2]. */
static KVLI_TARGET_AVX512 void kvli_z_scales16(const uint8_t *src, uint32_t n, uint32_t groups, float global,
                                               bool is_key, float *dst) {
    const __m512 by = _mm512_set1_ps(256.0f * global);
    const __m256i turn4 = _mm256_setr_epi16(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15),
                  turn8 = _mm256_setr_epi16(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    uint32_t padded = (groups + 1) & ~1u;
    if (is_key ? groups != 4 && groups != 8 : groups % 2 != 0) {
        for (uint32_t t = 0; t < n; t++)
            for (uint32_t g = 0; g < padded; g++)
                dst[is_key ? t / 4 * 4 * padded + g / 2 * 8 + t % 4 * 2 + g % 2 : t * padded + g] =
                    g < groups ? kvli_e4m3_to_f32(src[t * groups + g]) * global : 0.0f;
        return;
    }
    for (uint32_t i = 0; i < n * groups; i += 32) {
        __m256i x = _mm256_loadu_si256((const __m256i *)(const void *)(src + i));
        if (is_key) x = _mm256_permutexvar_epi16(groups == 4 ? turn4 : turn8, x);
        _mm512_storeu_ps(dst + i, _mm512_mul_ps(by, kvli_z_codes(KVL_FP8_E4M3, _mm256_castsi256_si128(x))));
        _mm512_storeu_ps(dst + i + 16,
                         _mm512_mul_ps(by, kvli_z_codes(KVL_FP8_E4M3, _mm256_extracti128_si256(x, 1))));
    }
}

/* INT4 keys: scales and zeros as f32 [row / 4][group][scale, zero][row % 4]. */
static void kvli_z_scales64(const uint8_t *src, uint32_t n, uint32_t groups, float *dst) {
    for (uint32_t t = 0; t < n; t++) {
        for (uint32_t g = 0; g < groups; g++, src += 4) {
            float *at = dst + (t / 4 * groups + g) * 8 + t % 4;
            uint16_t h[2];
            memcpy(h, src, sizeof h);
            at[0] = kvli_f16_to_f32(h[0]);
            at[4] = kvli_f16_to_f32(h[1]);
        }
    }
}

/* Splits n × groups × (f16 scale, f16 zero) into scales [4][TILE] and zeros of centred codes [4][TILE]. */
static KVLI_TARGET_AVX512 void kvli_z_split_groups(const uint8_t *src, uint32_t n, uint32_t groups,
                                                   float *dst) {
    const uint32_t zeros = 4 * KVLI_CPU_TILE;
    const __m512 centre = _mm512_set1_ps(kvli_z_centre(KVL_INT4_CHANNEL));
    const __m512i at =
        _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                           _mm512_set1_epi32((int)groups));
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    for (uint32_t t = 0; t < n; t += 16) {
        __mmask16 some = (__mmask16)(n - t < 16 ? 0xffu : 0xffffu);
        for (uint32_t g = 0; g < groups; g++) {
            const uint8_t *from = src + 4 * (t * groups + g);
            __m512 scale, zero;
            __m512i x;
            if (groups == 1)
                x = _mm512_maskz_loadu_epi32(some, from);
            else if (groups == 2 && some == 0xffff)
                x = _mm512_permutex2var_epi32(_mm512_loadu_si512(src + 8 * t),
                                              _mm512_add_epi32(even, _mm512_set1_epi32((int)g)),
                                              _mm512_loadu_si512(src + 8 * t + 64));
            else
                x = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), some, at, from, 4);
            scale = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x));
            zero = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(x, 16)));
            _mm512_mask_storeu_ps(dst + g * KVLI_CPU_TILE + t, some, scale);
            _mm512_mask_storeu_ps(dst + zeros + g * KVLI_CPU_TILE + t, some,
                                  _mm512_fmadd_ps(scale, centre, zero));
        }
    }
}

/* Channel scales and zeros of centred codes as f32, in the order of the keys' dims. */
static KVLI_TARGET_AVX512 void kvli_z_channels(kvl_format f, const uint8_t *src, uint32_t dim, float *dst) {
    const __m512i turn = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
    const __m512 centre = _mm512_set1_ps(kvli_z_centre(f));
    uint32_t padded = kvli_z_pad(dim);
    for (uint32_t i = 0; i < padded; i += 32) {
        __m512 s[2], z[2];
        kvli_z_pair(KVL_F16, src, NULL, i / 32, i + 16 == dim, &s[0], &s[1]);
        kvli_z_pair(KVL_F16, src + 2 * dim, NULL, i / 32, i + 16 == dim, &z[0], &z[1]);
        for (int k = 0; k < 2; k++) {
            const __m512i order = _mm512_add_epi32(turn, _mm512_set1_epi32(4 * k));
            bool turned = f == KVL_INT4_CHANNEL;
            __m512 scale = turned ? _mm512_permutex2var_ps(s[0], order, s[1]) : s[k],
                   zero = turned ? _mm512_permutex2var_ps(z[0], order, z[1]) : z[k];
            _mm512_storeu_ps(dst + i + 16 * k, scale);
            _mm512_storeu_ps(dst + padded + i + 16 * k, _mm512_fmadd_ps(scale, centre, zero));
        }
    }
}

/* q times channel scales, and q · zeros. */
static KVLI_TARGET_AVX512 float kvli_z_fold(const float *q, const float *channel, uint32_t dim,
                                            float *folded) {
    __m512 sum = _mm512_setzero_ps();
    for (uint32_t i = 0; i < dim; i += 16) {
        __m512 x = _mm512_loadu_ps(q + i);
        _mm512_storeu_ps(folded + i, _mm512_mul_ps(x, _mm512_loadu_ps(channel + i)));
        sum = _mm512_fmadd_ps(x, _mm512_loadu_ps(channel + dim + i), sum);
    }
    return kvli_z_sum(sum);
}

/* Where rows are, and their scales as f32 in scratch. */
static KVLI_TARGET_AVX512 kvli_z_rows kvli_z_open(const kvli_cpu_block *b, bool is_key,
                                                  const kvli_z_scratch *z) {
    kvli_z_rows r;
    kvl_format f = b->side->format;
    uint32_t T = b->side->tokens, D = b->side->dim;
    size_t at;
    r.tiles = b->tiles;
    for (r.shift = 3; 1u << r.shift < T;) r.shift++;
    r.stride = D / 8 * kvli_bytes8(f);
    r.side = z->side;
    r.side_stride = f == KVL_NVFP4 ? (D / 16 + 1) & ~1u : 0;
    r.dim = D;
    at = T * r.stride;
    for (uint32_t i = 0; i < b->n_tiles; i++) {
        const uint8_t *scales = b->tiles[i] + at;
        if (f == KVL_INT8 || f == KVL_FP8_E4M3)
            kvli_z_f16(scales, T, f == KVL_INT8 ? 1.0f : 256.0f, z->token + i * T);
        if (f == KVL_NVFP4)
            kvli_z_scales16(scales, T, D / 16, b->side->global, is_key, z->side + i * T * r.side_stride);
        else if (f == KVL_INT4 && is_key)
            kvli_z_scales64(scales, T, (D + 63) / 64, z->side + i * T / 4 * kvli_z_side_floats(f, D));
        else if (f == KVL_INT4)
            kvli_z_split_groups(scales, T, (D + 63) / 64, z->token + i * T);
    }
    if (is_key && f != KVL_INT8 && f != KVL_FP8_E4M3)
        for (uint32_t t = 0; t < b->n; t += 16) _mm512_storeu_ps(z->token + t, _mm512_set1_ps(1.0f));
    return r;
}

/* Scores of all query rows with n keys, t tokens into the block. */
static KVLI_TARGET_AVX512 void kvli_z_score_rows(const kvli_cpu_block *b, kvl_format f,
                                                 const kvli_z_rows *rows, uint32_t t, uint32_t n,
                                                 const kvli_z_scratch *z) {
    uint32_t D = kvli_z_key_dims(b->side->format, b->side->dim), padded = kvli_z_pad(D), take;
    bool channel = b->side->format == KVL_INT8_CHANNEL || b->side->format == KVL_INT4_CHANNEL;
    for (uint32_t i = 0; i < b->n_q; i += take) {
        float zero[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        kvli_z_queries w;
        take = kvli_cpu_take(b->n_q - i, 8);
        w.q = b->q + i * b->q_stride;
        w.q_stride = b->q_stride;
        w.zero = zero;
        w.token = z->token + t;
        w.s = b->s + (size_t)i * KVLI_CPU_STRIDE + t;
        w.last = take % 4 == 0 ? w.s + (take - 1) * KVLI_CPU_STRIDE : z->p;
        if (kvli_z_spreads(f)) {
            w.q = z->rows + (size_t)4 * D * i;
            w.q_stride = 4 * D;
        } else if (channel) {
            for (uint32_t h = 0; h < take; h++)
                zero[h] = kvli_z_fold(w.q + h * w.q_stride, z->channel, padded, z->folded + h * padded);
            w.q = z->folded;
            w.q_stride = padded;
        }
        if (take >= 7)
            kvli_z_score8(f, rows, n, &w);
        else if (take >= 3)
            kvli_z_score4(f, rows, n, &w);
        else if (take == 2)
            kvli_z_score2(f, rows, n, &w);
        else
            kvli_z_score1(f, rows, n, &w);
    }
}

static KVLI_TARGET_AVX512 void kvli_z_score(const kvli_cpu_block *b) {
    kvl_format f = b->side->format;
    uint32_t D = b->side->dim, T = b->side->tokens, step = b->n;
    kvli_z_scratch z = kvli_z_carve(b->scratch, kvli_z_pad(b->scratch_dim));
    kvli_z_rows rows = kvli_z_open(b, true, &z), part = rows;
    bool channel = f == KVL_INT8_CHANNEL || f == KVL_INT4_CHANNEL,
         direct = b->n_q <= KVLI_CPU_DIRECT_Q && kvli_z_key_dims(f, D) == D && f != KVL_F32 && f != KVL_INT4;
    const uint8_t *decoded[1 + KVLI_CPU_AHEAD] = {(const uint8_t *)z.rows, (const uint8_t *)z.rows,
                                                  (const uint8_t *)z.rows};
    if (direct && kvli_z_spreads(f)) kvli_z_spread_q(b, z.rows);
    if (!direct) b->spread->n_q = 0;
    if (channel) step = T;
    if (!direct) step = kvli_min_u32(step, KVLI_CPU_CHUNK);
    for (uint32_t t = 0; t < b->n; t += step) {
        uint32_t n = kvli_min_u32(b->n - t, step);
        if (channel && t % T == 0) kvli_z_channels(f, b->tiles[t / T] + T * rows.stride, D, z.channel);
        if (direct) {
            part.tiles = rows.tiles + t / T;
            kvli_z_score_rows(b, f, &part, t, n, &z);
            continue;
        }
        kvli_z_decode_keys(f, &rows, t, kvli_min_u32((n + 7) & ~7u, b->n_tiles * T - t), z.rows);
        part.tiles = decoded;
        part.shift = 5;
        part.dim = kvli_z_key_dims(f, D);
        part.stride = part.dim * sizeof(float);
        kvli_z_score_rows(b, KVLI_Z_QUADS, &part, t, n, &z);
    }
}

/* 2^x for x <= 0 in [-126, 0]: Taylor-like polynomial of degree 6, relative error about 1e-7; 2^0 is 1
 * exactly. NaN stays NaN. */
KVLI_Z __m512 kvli_z_exp2v(__m512 x) {
    __m512 n, r, p;
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);
    n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    r = _mm512_sub_ps(x, n);
    p = _mm512_set1_ps(1.535336188319500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.339887440266574e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.618437357674640e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.550332471162809e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402264791363012e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931472028550421e-1f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f)), n);
}

static KVLI_TARGET_AVX512 float kvli_z_exp2(float x) {
    return _mm512_cvtss_f32(kvli_z_exp2v(_mm512_set1_ps(x)));
}

/* A row of scores becomes cap * tanh(x), by tanh |x| = (1 - e) / (1 + e), e = exp(-2 |x|). */
static KVLI_TARGET_AVX512 void kvli_z_softcap(float *s, float cap) {
    const __m512 one = _mm512_set1_ps(1.0f);
    for (uint32_t i = 0; i < KVLI_CPU_TILE; i += 16) {
        __m512 x = _mm512_loadu_ps(s + i),
               e = kvli_z_exp2v(_mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(-2.0f * KVLI_LOG2E)));
        __m512 t =
            _mm512_mul_ps(_mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e)), _mm512_set1_ps(cap));
        __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
        _mm512_storeu_ps(s + i, _mm512_mask_sub_ps(t, negative, _mm512_setzero_ps(), t));
    }
}

KVLI_Z __m512 kvli_z_max(__m512 a) { /* to all lanes */
    a = _mm512_max_ps(a, _mm512_shuffle_f32x4(a, a, 0x4e));
    a = _mm512_max_ps(a, _mm512_shuffle_f32x4(a, a, 0xb1));
    a = _mm512_max_ps(a, _mm512_permute_ps(a, 0x4e));
    return _mm512_max_ps(a, _mm512_permute_ps(a, 0xb1));
}

/* R rows, so that one's chain of operations hides another's; whole: they see all tokens. */
KVLI_Z void kvli_z_softmax_as(const int R, const bool whole, float *s, const kvli_cpu_run *run,
                              kvli_cpu_stat *st, float *by) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i lo = _mm512_set1_epi32((int)run->lo), hi = _mm512_set1_epi32((int)run->hi),
                  sink = _mm512_set1_epi32((int)run->sink);
    __m512 x[2][8], m[2];
    __mmask16 seen[8];
    KVLI_UNROLL for (int r = 0; r < R; r++) {
        KVLI_UNROLL for (int i = 0; i < 8; i++) {
            __m512i t = _mm512_add_epi32(lane, _mm512_set1_epi32(16 * i));
            x[r][i] = _mm512_loadu_ps(s + r * KVLI_CPU_STRIDE + 16 * i);
            if (whole) continue;
            seen[i] = (__mmask16)((_mm512_cmpge_epi32_mask(t, lo) & _mm512_cmplt_epi32_mask(t, hi)) |
                                  _mm512_cmplt_epi32_mask(t, sink));
            x[r][i] = _mm512_mask_mov_ps(_mm512_set1_ps(KVLI_LOW), seen[i], x[r][i]);
        }
        m[r] = _mm512_max_ps(_mm512_max_ps(_mm512_max_ps(x[r][0], x[r][1]), _mm512_max_ps(x[r][2], x[r][3])),
                             _mm512_max_ps(_mm512_max_ps(x[r][4], x[r][5]), _mm512_max_ps(x[r][6], x[r][7])));
        m[r] = kvli_z_max(_mm512_max_ps(_mm512_set1_ps(st[r].m), m[r]));
        by[r] = kvli_z_exp2(st[r].m - _mm512_cvtss_f32(m[r]));
    }
    KVLI_UNROLL for (int i = 0; i < 8; i++) {
        KVLI_UNROLL for (int r = 0; r < R; r++) {
            x[r][i] = kvli_z_exp2v(_mm512_sub_ps(x[r][i], m[r]));
            if (!whole) x[r][i] = _mm512_maskz_mov_ps(seen[i], x[r][i]);
            _mm512_storeu_ps(s + r * KVLI_CPU_STRIDE + 16 * i, x[r][i]);
        }
    }
    KVLI_UNROLL for (int r = 0; r < R; r++) {
        KVLI_UNROLL for (int i = 0; i < 4; i++) x[r][i] = _mm512_add_ps(x[r][i], x[r][i + 4]);
        x[r][0] = _mm512_add_ps(_mm512_add_ps(x[r][0], x[r][2]), _mm512_add_ps(x[r][1], x[r][3]));
        st[r].l = st[r].l * by[r] + kvli_z_sum(x[r][0]);
        st[r].m = _mm512_cvtss_f32(m[r]);
    }
}

static KVLI_TARGET_AVX512 uint32_t kvli_z_softmax(float *s, const kvli_cpu_run *runs, uint32_t n, float cap,
                                                  kvli_cpu_stat *st, float *by) {
    bool whole = runs[0].lo == 0 && runs[0].hi == KVLI_CPU_TILE;
    uint32_t rows = whole && n > 1 && runs[1].lo == 0 && runs[1].hi == KVLI_CPU_TILE ? 2 : 1;
    for (uint32_t r = 0; r < rows && cap != 0; r++) kvli_z_softcap(s + r * KVLI_CPU_STRIDE, cap);
    if (rows == 2)
        kvli_z_softmax_as(2, true, s, runs, st, by);
    else if (whole)
        kvli_z_softmax_as(1, true, s, runs, st, by);
    else
        kvli_z_softmax_as(1, false, s, runs, st, by);
    return rows;
}

/* acc[h] += p[h][t] * row t over tokens [t0, t1), for H rows and NP pairs from pair j on. */
KVLI_Z void kvli_z_values_as(kvl_format f, const int H, const int NP, const kvli_z_rows *r, uint32_t t0,
                             uint32_t t1, const float *p, uint32_t j, float *acc, size_t acc_stride,
                             float *last) {
    __m512 a[16];
    const int W = 2 * NP, n_lines = ((int)kvli_bytes8(f) * 2 * W + 63) / 64;
    const float *side = r->side + t0 * r->side_stride;
    p += t0;
    KVLI_UNROLL for (int h = 0; h < H; h++) {
        const float *from = (h < H - 1 ? acc + (size_t)h * acc_stride : last) + 32 * j;
        KVLI_UNROLL for (int i = 0; i < W; i++) a[h * W + i] = _mm512_loadu_ps(from + 16 * i);
    }
    for (uint32_t t = t0, end; t < t1; t = end) { /* tile by tile */
        const uint8_t *row = kvli_z_row(r, t),
                      *ahead = kvli_z_row(r, t + (KVLI_CPU_AHEAD << r->shift)) + j * 4 * kvli_bytes8(f);
        end = kvli_min_u32(t1, ((t >> r->shift) + 1) << r->shift);
        for (uint32_t n = end - t; n > 0;
             n--, p++, row += r->stride, ahead += r->stride, side += r->side_stride) {
            __m512 v[8];
            KVLI_UNROLL for (int i = 0; i < n_lines; i++) KVLI_PREFETCH(ahead + 64 * i);
            KVLI_UNROLL for (int i = 0; i < NP; i++)
                kvli_z_pair(f, row, side, j + (uint32_t)i, false, &v[2 * i], &v[2 * i + 1]);
            KVLI_UNROLL for (int h = 0; h < H; h++) {
                __m512 w = _mm512_set1_ps(p[h * KVLI_CPU_STRIDE]);
                KVLI_UNROLL for (int i = 0; i < W; i++) a[h * W + i] = _mm512_fmadd_ps(w, v[i], a[h * W + i]);
            }
        }
    }
    KVLI_UNROLL for (int h = 0; h < H; h++) {
        float *to = (h < H - 1 ? acc + (size_t)h * acc_stride : last) + 32 * j;
        KVLI_UNROLL for (int i = 0; i < W; i++) _mm512_storeu_ps(to + 16 * i, a[h * W + i]);
    }
}

/* What kvli_z_values_run needs: the format that rows stand in, and pairs [j0, j1). */
typedef struct kvli_z_values_job {
    kvl_format format;
    kvli_z_rows rows;
    const float *p;
    float *acc, *spare;
    size_t acc_stride;
    uint32_t j0, j1;
} kvli_z_values_job;

static KVLI_TARGET_AVX512 void kvli_z_values_run(void *arg, uint32_t q, uint32_t n_q, uint32_t t0,
                                                 uint32_t t1) {
    const kvli_z_values_job *w = (const kvli_z_values_job *)arg;
    const float *p = w->p + (size_t)q * KVLI_CPU_STRIDE;
    float *acc = w->acc + q * w->acc_stride, *last = n_q == 3 ? w->spare : acc + (n_q - 1) * w->acc_stride;
    for (uint32_t j = w->j0, n; j < w->j1; j += n) {
        n = n_q == 1 && w->j1 - j >= 4 ? 4 : kvli_min_u32(w->j1 - j, 2);
#define KVLI_AS(F, H, NP) kvli_z_values_as(F, H, NP, &w->rows, t0, t1, p, j, acc, w->acc_stride, last)
#define KVLI_FOUR(F) KVLI_AS(F, 4, 2)
#define KVLI_TWO(F) KVLI_AS(F, 2, 2)
#define KVLI_ONE(F) KVLI_AS(F, 1, 2)
#define KVLI_LONG(F) KVLI_AS(F, 1, 4)
        if (n == 1 && n_q >= 3) /* such rows always come through memory */
            KVLI_AS(KVL_F32, 4, 1);
        else if (n == 1 && n_q == 2)
            KVLI_AS(KVL_F32, 2, 1);
        else if (n == 1)
            KVLI_AS(KVL_F32, 1, 1);
        else if (n_q >= 3)
            KVLI_Z_VALUE_FORMATS(w->format, KVLI_FOUR)
        else if (n_q == 2)
            KVLI_Z_VALUE_FORMATS(w->format, KVLI_TWO)
        else if (n == 2)
            KVLI_Z_VALUE_FORMATS(w->format, KVLI_ONE)
        else
            KVLI_Z_VALUE_FORMATS(w->format, KVLI_LONG)
#undef KVLI_AS
#undef KVLI_FOUR
#undef KVLI_TWO
#undef KVLI_ONE
#undef KVLI_LONG
    }
}

/* p times one group's scales, and the sums of p times zeros. A probability of 0 is either not seen or too
   small to count: its scale and zero are not looked at. */
static KVLI_TARGET_AVX512 void kvli_z_weigh(const float *p, const float *scale, const float *zero, uint32_t n,
                                            float *out, float *sums) {
    __m512 sum = _mm512_loadu_ps(sums);
    for (uint32_t t = 0; t < n; t += 16) {
        __mmask16 some = (__mmask16)(n - t < 16 ? 0xffu : 0xffffu);
        __m512 x = _mm512_maskz_loadu_ps(some, p + t);
        __mmask16 k = _mm512_test_epi32_mask(_mm512_castps_si512(x), _mm512_castps_si512(x));
        _mm512_mask_storeu_ps(out + t, some, _mm512_maskz_mul_ps(k, x, _mm512_loadu_ps(scale + t)));
        sum = _mm512_mask3_fmadd_ps(x, _mm512_loadu_ps(zero + t), sum, k);
    }
    _mm512_storeu_ps(sums, sum);
}

static KVLI_TARGET_AVX512 void kvli_z_scale_tokens(float *p, const float *token, uint32_t n) {
    for (uint32_t t = 0; t < n; t += 8)
        _mm256_storeu_ps(p + t, _mm256_mul_ps(_mm256_loadu_ps(p + t), _mm256_loadu_ps(token + t)));
}

/* n tokens, t0 into the block, whose rows are `w->rows`. INT4: eight query rows and one group of 64 dims at a
 * time. */
static void kvli_z_values_chunk(const kvli_cpu_block *b, kvli_z_values_job *w, const kvli_z_scratch *z,
                                uint32_t t0, uint32_t n) {
    uint32_t dim = kvli_z_pad(b->side->dim), n_pairs = dim / 32;
    w->spare = z->spare;
    w->acc_stride = b->acc_stride;
    if (b->side->format != KVL_INT4) {
        w->p = b->s + t0;
        w->acc = b->acc;
        w->j0 = 0;
        w->j1 = n_pairs;
        kvli_cpu_spread_runs(b->runs, b->first + t0, 0, n, b->n_q, 4, kvli_z_values_run, w);
        return;
    }
    for (uint32_t i = 0; i < b->n_q; i += 8) {
        uint32_t n_q = kvli_min_u32(b->n_q - i, 8);
        w->p = z->p;
        w->acc = b->acc + i * b->acc_stride;
        for (uint32_t g = 0; 2 * g < n_pairs; g++) {
            const float *scale = z->token + g * KVLI_CPU_TILE + t0;
            for (uint32_t h = 0; h < n_q; h++)
                kvli_z_weigh(b->s + (size_t)(i + h) * KVLI_CPU_STRIDE + t0, scale, scale + 4 * KVLI_CPU_TILE,
                             n, z->p + h * KVLI_CPU_STRIDE, w->acc + h * b->acc_stride + dim + 16 * g);
            w->j0 = 2 * g;
            w->j1 = kvli_min_u32(w->j0 + 2, n_pairs);
            kvli_cpu_spread_runs(b->runs + i, b->first + t0, 0, n, n_q, 4, kvli_z_values_run, w);
        }
    }
}

static KVLI_TARGET_AVX512 void kvli_z_values(const kvli_cpu_block *b) {
    uint32_t D = b->side->dim, padded = kvli_z_pad(D);
    kvli_z_scratch z = kvli_z_carve(b->scratch, kvli_z_pad(b->scratch_dim));
    kvli_z_rows rows = kvli_z_open(b, false, &z);
    kvl_format f = b->side->format == KVL_INT4 ? (kvl_format)KVL_INT4_CHANNEL : b->side->format;
    const uint8_t *decoded[1 + KVLI_CPU_AHEAD] = {(const uint8_t *)z.rows, (const uint8_t *)z.rows,
                                                  (const uint8_t *)z.rows};
    kvli_z_values_job w;
    if (f == KVL_INT8 || f == KVL_FP8_E4M3)
        for (uint32_t i = 0; i < b->n_q; i++)
            kvli_z_scale_tokens(b->s + (size_t)i * KVLI_CPU_STRIDE, z.token, b->n);
    w.format = f;
    w.rows = rows;
    if (b->n_q <= KVLI_CPU_DIRECT_Q && D % 64 == 0) {
        kvli_z_values_chunk(b, &w, &z, 0, b->n);
        return;
    }
    b->spread->n_q = 0;
    w.format = KVL_F32;
    w.rows.tiles = decoded;
    w.rows.shift = 5;
    w.rows.stride = padded * sizeof(float);
    w.rows.side_stride = 0;
    for (uint32_t t = 0; t < b->n; t += KVLI_CPU_CHUNK) {
        uint32_t n = kvli_min_u32(b->n - t, KVLI_CPU_CHUNK);
        kvli_z_decode(f, &rows, t, n, z.rows);
        kvli_z_values_chunk(b, &w, &z, t, n);
    }
}

static const kvli_cpu_ops KVLI_CPU_AVX512 = {
    32, true, kvli_z_scratch_floats, kvli_z_score, kvli_z_softmax, kvli_z_values, kvli_z_exp2};

/* ---- AVX2: rows are decoded to memory, with their scales ---- */
#define KVLI_Y KVLI_INLINE KVLI_TARGET_AVX2

static size_t kvli_y_scratch_floats(const kvli_geometry *geo) {
    return (size_t)(KVLI_CPU_CHUNK + 3) * kvli_max_u32(geo->k_dim, geo->v_dim) + KVLI_CPU_STRIDE;
}

KVLI_Y __m256 kvli_y_f16(const uint8_t *at) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)at));
}

KVLI_Y float kvli_y_f16_at(const uint8_t *at) {
    uint16_t h;
    memcpy(&h, at, sizeof h);
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
}

/* 16 codes of 4 bits as 16 bytes. */
KVLI_Y __m128i kvli_y_nibbles(const uint8_t *at) {
    __m128i x = _mm_loadl_epi64((const __m128i *)(const void *)at), low = _mm_set1_epi8(15);
    return _mm_unpacklo_epi8(_mm_and_si128(x, low), _mm_and_si128(_mm_srli_epi16(x, 4), low));
}

/* 16 numbers of a row, scaled. */
KVLI_Y void kvli_y_16(kvl_format f, const uint8_t *row, uint32_t i, __m256 scale, __m256 zero, __m256 *v0,
                      __m256 *v1) {
    const __m128i e2m1 =
        _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12); /* twice the value */
    __m128i x;
    switch (f) {
    case KVL_F32:
        *v0 = _mm256_loadu_ps((const float *)(const void *)row + 16 * i);
        *v1 = _mm256_loadu_ps((const float *)(const void *)row + 16 * i + 8);
        return;
    case KVL_F16:
        *v0 = kvli_y_f16(row + 32 * i);
        *v1 = kvli_y_f16(row + 32 * i + 16);
        return;
    case KVL_BF16: {
        const __m128i *at = (const __m128i *)(const void *)(row + 32 * i);
        *v0 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(at)), 16));
        *v1 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(at + 1)), 16));
        return;
    }
    case KVL_FP8_E4M3: { /* bits shifted into f16 are 2^-8 of the value */
        __m256i h = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)(row + 16 * i)));
        h = _mm256_and_si256(_mm256_slli_epi16(h, 7), _mm256_set1_epi16((short)0xbfff));
        *v0 = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(h)), scale);
        *v1 = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(h, 1)), scale);
        return;
    }
    case KVL_INT8:
    case KVL_NVFP4:
        x = f == KVL_INT8 ? _mm_loadu_si128((const __m128i *)(const void *)(row + 16 * i))
                          : _mm_shuffle_epi8(e2m1, kvli_y_nibbles(row + 8 * i));
        *v0 = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)), scale);
        *v1 = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))), scale);
        return;
    default: /* INT4; the channel formats as bare codes */
        x = f == KVL_INT8_CHANNEL ? _mm_loadu_si128((const __m128i *)(const void *)(row + 16 * i))
                                  : kvli_y_nibbles(row + 8 * i);
        *v0 = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x));
        *v1 = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(x, 8)));
        if (f != KVL_INT4) return;
        *v0 = _mm256_fmadd_ps(*v0, scale, zero);
        *v1 = _mm256_fmadd_ps(*v1, scale, zero);
        return;
    }
}

/* Rows [t0, t0 + n), which lie in one tile, as f32. */
KVLI_Y void kvli_y_decode_as(kvl_format f, const kvli_cpu_block *b, uint32_t t0, uint32_t n) {
    uint32_t D = b->side->dim, T = b->side->tokens, groups = (D + 63) / 64;
    size_t stride = D / 8 * kvli_bytes8(f);
    const uint8_t *tile = b->tiles[t0 / T], *scales = tile + T * stride;
    float *out = b->scratch, by = 128.0f * b->side->global;
    t0 %= T;
    for (uint32_t t = t0; t < t0 + n; t++) {
        const uint8_t *row = tile + t * stride;
        __m256 scale = _mm256_setzero_ps(), zero = scale;
        if (f == KVL_INT8) scale = _mm256_set1_ps(kvli_y_f16_at(scales + 2 * t));
        if (f == KVL_FP8_E4M3) scale = _mm256_set1_ps(256.0f * kvli_y_f16_at(scales + 2 * t));
        for (uint32_t i = 0; i < D / 16; i++, out += 16) {
            __m256 v0, v1;
            if (f == KVL_NVFP4) { /* e4m3 shifted into f16 is 2^-8 of the value; codes are twice theirs */
                int x = scales[t * (D / 16) + i];
                scale = _mm256_set1_ps(
                    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128((x & 127) << 7 | (x & 128) << 8))) * by);
            } else if (f == KVL_INT4 && i % 4 == 0) {
                scale = _mm256_set1_ps(kvli_y_f16_at(scales + 4 * (t * groups + i / 4)));
                zero = _mm256_set1_ps(kvli_y_f16_at(scales + 4 * (t * groups + i / 4) + 2));
            }
            kvli_y_16(f, row, i, scale, zero, &v0, &v1);
            if (f == KVL_INT8_CHANNEL || f == KVL_INT4_CHANNEL) {
                const uint8_t *c = scales + 32 * i;
                v0 = _mm256_fmadd_ps(v0, kvli_y_f16(c), kvli_y_f16(c + 2 * D));
                v1 = _mm256_fmadd_ps(v1, kvli_y_f16(c + 16), kvli_y_f16(c + 2 * D + 16));
            }
            _mm256_storeu_ps(out, v0);
            _mm256_storeu_ps(out + 8, v1);
        }
    }
}

static KVLI_TARGET_AVX2 void kvli_y_decode(const kvli_cpu_block *b, uint32_t t0, uint32_t n) {
    switch (b->side->format) {
    case KVL_F32: kvli_y_decode_as(KVL_F32, b, t0, n); break;
    case KVL_F16: kvli_y_decode_as(KVL_F16, b, t0, n); break;
    case KVL_BF16: kvli_y_decode_as(KVL_BF16, b, t0, n); break;
    case KVL_INT8: kvli_y_decode_as(KVL_INT8, b, t0, n); break;
    case KVL_INT8_CHANNEL: kvli_y_decode_as(KVL_INT8_CHANNEL, b, t0, n); break;
    case KVL_FP8_E4M3: kvli_y_decode_as(KVL_FP8_E4M3, b, t0, n); break;
    case KVL_NVFP4: kvli_y_decode_as(KVL_NVFP4, b, t0, n); break;
    case KVL_INT4: kvli_y_decode_as(KVL_INT4, b, t0, n); break;
    default: kvli_y_decode_as(KVL_INT4_CHANNEL, b, t0, n); break;
    }
}

/* Lane l of the result is the sum over the lanes of a[l], as the tree (l, l+4), (l, l+2), (l, l+1). */
KVLI_Y __m256 kvli_y_sum8(__m256 *a) {
    KVLI_UNROLL for (int i = 0; i < 4; i++) a[i] =
        _mm256_add_ps(_mm256_blend_ps(a[i], a[i + 4], 0xf0), _mm256_permute2f128_ps(a[i], a[i + 4], 0x21));
    KVLI_UNROLL for (int i = 0; i < 2; i++) a[i] =
        _mm256_add_ps(_mm256_blend_ps(a[i], a[i + 2], 0xcc), _mm256_shuffle_ps(a[i], a[i + 2], 0x4e));
    a[2] = _mm256_blend_ps(a[1], a[0], 0xaa);
    return _mm256_add_ps(_mm256_blend_ps(a[0], a[1], 0xaa), _mm256_permute_ps(a[2], 0xb1));
}

KVLI_Y void kvli_y_score_as(const int H, const float *rows, uint32_t dim, uint32_t n, const float *q,
                            size_t q_stride, float *s) {
    const uint32_t NT = 8 / (uint32_t)H;
    for (uint32_t t0 = 0; t0 < n; t0 += NT, rows += NT * dim) {
        __m256 a[8], sum;
        KVLI_UNROLL for (int i = 0; i < 8; i++) a[i] = _mm256_setzero_ps();
        for (uint32_t d = 0; d < dim; d += 8) {
            KVLI_UNROLL for (uint32_t h = 0; h < (uint32_t)H; h++) {
                __m256 x = _mm256_loadu_ps(q + h * q_stride + d);
                KVLI_UNROLL for (uint32_t t = 0; t < NT; t++) a[h * NT + t] =
                    _mm256_fmadd_ps(x, _mm256_loadu_ps(rows + t * dim + d), a[h * NT + t]);
            }
        }
        sum = kvli_y_sum8(a);
        if (H == 1) {
            _mm256_storeu_ps(s + t0, sum);
        } else {
            _mm_storeu_ps(s + t0, _mm256_castps256_ps128(sum));
            _mm_storeu_ps(s + KVLI_CPU_STRIDE + t0, _mm256_extractf128_ps(sum, 1));
        }
    }
}

static KVLI_TARGET_AVX2 void kvli_y_score(const kvli_cpu_block *b) {
    uint32_t dim = b->side->dim, step = kvli_min_u32(b->side->tokens, KVLI_CPU_CHUNK);
    for (uint32_t t = 0; t < b->n; t += step) {
        uint32_t n = kvli_min_u32(b->n - t, step);
        kvli_y_decode(b, t, (n + 7) & ~7u);
        for (uint32_t i = 0; i < b->n_q; i += 2) {
            float *s = b->s + (size_t)i * KVLI_CPU_STRIDE + t;
            const float *q = b->q + i * b->q_stride;
            if (i + 1 < b->n_q)
                kvli_y_score_as(2, b->scratch, dim, n, q, b->q_stride, s);
            else
                kvli_y_score_as(1, b->scratch, dim, n, q, 0, s);
        }
    }
}

KVLI_Y __m256 kvli_y_exp2v(__m256 x) { /* as kvli_z_exp2v */
    __m256 n, r, p;
    __m256i two;
    x = _mm256_max_ps(_mm256_set1_ps(-126.0f), x);
    n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    r = _mm256_sub_ps(x, n);
    p = _mm256_set1_ps(1.535336188319500e-4f);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.339887440266574e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(9.618437357674640e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.550332471162809e-2f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(2.402264791363012e-1f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(6.931472028550421e-1f));
    two = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(_mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f)), _mm256_castsi256_ps(two));
}

static KVLI_TARGET_AVX2 float kvli_y_exp2(float x) {
    return _mm256_cvtss_f32(kvli_y_exp2v(_mm256_set1_ps(x)));
}

KVLI_Y __m256 kvli_y_softcap(__m256 x, float cap) { /* as kvli_z_softcap */
    const __m256 one = _mm256_set1_ps(1.0f), sign = _mm256_set1_ps(-0.0f);
    __m256 e = kvli_y_exp2v(_mm256_mul_ps(_mm256_andnot_ps(sign, x), _mm256_set1_ps(-2.0f * KVLI_LOG2E)));
    __m256 t =
        _mm256_mul_ps(_mm256_div_ps(_mm256_sub_ps(one, e), _mm256_add_ps(one, e)), _mm256_set1_ps(cap));
    return _mm256_or_ps(t, _mm256_and_ps(sign, x));
}

/* All ones where a token is seen, of the eight from t on. */
KVLI_Y __m256 kvli_y_seen(const kvli_cpu_run *run, uint32_t t) {
    __m256i at = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32((int)t));
    __m256i in = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32((int)run->lo), at),
                                     _mm256_cmpgt_epi32(_mm256_set1_epi32((int)run->hi), at));
    return _mm256_castsi256_ps(
        _mm256_or_si256(in, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)run->sink), at)));
}

static KVLI_TARGET_AVX2 uint32_t kvli_y_softmax(float *s, const kvli_cpu_run *run, uint32_t n, float cap,
                                                kvli_cpu_stat *st, float *by) {
    __m256 m = _mm256_set1_ps(st->m), sum[4];
    __m128 half;
    (void)n;
    for (uint32_t t = 0; t < KVLI_CPU_TILE; t += 8) {
        __m256 x = _mm256_loadu_ps(s + t);
        if (cap != 0) x = kvli_y_softcap(x, cap);
        x = _mm256_blendv_ps(_mm256_set1_ps(KVLI_LOW), x, kvli_y_seen(run, t));
        m = _mm256_max_ps(m, x);
        _mm256_storeu_ps(s + t, x);
    }
    m = _mm256_max_ps(m, _mm256_permute2f128_ps(m, m, 0x01));
    m = _mm256_max_ps(m, _mm256_permute_ps(m, 0x4e));
    m = _mm256_max_ps(m, _mm256_permute_ps(m, 0xb1));
    *by = kvli_y_exp2(st->m - _mm256_cvtss_f32(m));
    KVLI_UNROLL for (int i = 0; i < 4; i++) sum[i] = _mm256_setzero_ps();
    for (uint32_t t = 0; t < KVLI_CPU_TILE; t += 32) {
        KVLI_UNROLL for (uint32_t i = 0; i < 4; i++) {
            __m256 x = _mm256_and_ps(kvli_y_seen(run, t + 8 * i),
                                     kvli_y_exp2v(_mm256_sub_ps(_mm256_loadu_ps(s + t + 8 * i), m)));
            sum[i] = _mm256_add_ps(sum[i], x);
            _mm256_storeu_ps(s + t + 8 * i, x);
        }
    }
    sum[0] = _mm256_add_ps(_mm256_add_ps(sum[0], sum[2]), _mm256_add_ps(sum[1], sum[3]));
    half = _mm_add_ps(_mm256_castps256_ps128(sum[0]), _mm256_extractf128_ps(sum[0], 1));
    half = _mm_add_ps(half, _mm_permute_ps(half, 0x4e));
    half = _mm_add_ps(half, _mm_permute_ps(half, 0xb1));
    st->l = st->l * *by + _mm_cvtss_f32(half);
    st->m = _mm256_cvtss_f32(m);
    return 1;
}

/* acc[h] += p[h][t] * row t over tokens [t0, t1), for H rows and 8 * W dims. */
KVLI_Y void kvli_y_values_as(const int H, const int W, const float *rows, uint32_t dim, uint32_t t0,
                             uint32_t t1, const float *p, float *acc, size_t acc_stride) {
    __m256 a[8];
    KVLI_UNROLL for (int h = 0; h < H; h++) {
        KVLI_UNROLL for (int i = 0; i < W; i++) a[h * W + i] =
            _mm256_loadu_ps(acc + (size_t)h * acc_stride + 8 * i);
    }
    for (uint32_t t = t0; t < t1; t++) {
        KVLI_UNROLL for (int h = 0; h < H; h++) {
            __m256 w = _mm256_set1_ps(p[h * KVLI_CPU_STRIDE + (int)t]);
            KVLI_UNROLL for (int i = 0; i < W; i++) a[h * W + i] =
                _mm256_fmadd_ps(w, _mm256_loadu_ps(rows + t * dim + 8 * i), a[h * W + i]);
        }
    }
    KVLI_UNROLL for (int h = 0; h < H; h++) {
        KVLI_UNROLL for (int i = 0; i < W; i++)
            _mm256_storeu_ps(acc + (size_t)h * acc_stride + 8 * i, a[h * W + i]);
    }
}

static KVLI_TARGET_AVX2 void kvli_y_values_run(void *arg, uint32_t q, uint32_t n_q, uint32_t t0,
                                               uint32_t t1) {
    const kvli_cpu_block *b = (const kvli_cpu_block *)arg;
    const float *p = b->s + (size_t)q * KVLI_CPU_STRIDE, *rows = b->scratch;
    float *acc = b->acc + q * b->acc_stride;
    uint32_t dim = b->side->dim, d = 0;
    if (n_q == 2) {
        for (; d + 32 <= dim; d += 32)
            kvli_y_values_as(2, 4, rows + d, dim, t0, t1, p, acc + d, b->acc_stride);
        if (d < dim) kvli_y_values_as(2, 2, rows + d, dim, t0, t1, p, acc + d, b->acc_stride);
        return;
    }
    for (; d + 64 <= dim; d += 64) kvli_y_values_as(1, 8, rows + d, dim, t0, t1, p, acc + d, 0);
    for (; d < dim; d += 16) kvli_y_values_as(1, 2, rows + d, dim, t0, t1, p, acc + d, 0);
}

static KVLI_TARGET_AVX2 void kvli_y_values(const kvli_cpu_block *b) {
    uint32_t step = kvli_min_u32(b->side->tokens, KVLI_CPU_CHUNK);
    for (uint32_t t = 0; t < b->n; t += step) {
        kvli_cpu_block chunk = *b;
        uint32_t n = kvli_min_u32(b->n - t, step);
        kvli_y_decode(b, t, n);
        chunk.s += t;
        kvli_cpu_spread_runs(b->runs, b->first + t, 0, n, b->n_q, 2, kvli_y_values_run, &chunk);
    }
}

static const kvli_cpu_ops KVLI_CPU_AVX2 = {
    16, false, kvli_y_scratch_floats, kvli_y_score, kvli_y_softmax, kvli_y_values, kvli_y_exp2};
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif /* KVLI_X86 */

/* ---- a step ---- */
/* One span as tasks: n_blocks query blocks of max_q rows × KV heads × n_parts ranges of segments. */
typedef struct kvli_cpu_plan {
    uint32_t first_write, first_unit;             /* tasks before this span's */
    uint32_t n_query_blocks, n_segments, n_parts; /* n_parts 1: a task goes through all segments */
    size_t partial; /* where the span's partial results start: [KV head][query row][segment][2 + v_dim] */
} kvli_cpu_plan;

typedef struct kvli_cpu_job {
    const kvli_attend *a;
    const kvli_cpu_ops *ops;
    kvl_simd simd;
    kvli_cpu_plan *plan; /* [n_spans + 1] */
    uint8_t *bad;        /* by write task: a row was not finite */
    float *partial;
    uint32_t max_q, k_pad, v_pad, acc_floats;
    uint32_t k_row_bytes, v_row_bytes, k_scale_bytes, v_scale_bytes; /* of packed tiles */
    bool two_q,
        two_acc; /* packed tiles want q, or add to accumulators, of their own: rotated, or in another order */
} kvli_cpu_job;

static uint32_t kvli_cpu_span_of(const kvli_cpu_job *job, uint32_t task, bool write) {
    uint32_t lo = 0, hi = job->a->n_spans;
    while (hi - lo > 1) {
        uint32_t mid = (lo + hi) / 2;
        if ((write ? job->plan[mid].first_write : job->plan[mid].first_unit) <= task)
            lo = mid;
        else
            hi = mid;
    }
    return lo;
}

static size_t kvli_dtype_size(kvl_dtype t) { return t == KVL_DTYPE_F32 ? 4 : 2; }

static uint8_t *kvli_tensor_at(const kvl_tensor *t, uint32_t row, uint32_t head) {
    return (uint8_t *)t->data +
           ((size_t)row * t->row_stride + (size_t)head * t->head_stride) * kvli_dtype_size(t->dtype);
}

/* The K tile of a head in a block or a scratch slot; *cls is its class. */
static uint8_t *kvli_cpu_tile(const kvli_attend *a, uint32_t entry, uint32_t head, uint32_t *cls) {
    uint32_t id = entry & KVL_ENTRY_ID;
    const kvli_layer *L = a->layer;
    if (entry & KVL_ENTRY_SCRATCH) {
        *cls = KVLI_EXACT;
        return a->scratch + id * a->scratch_slot + head * L->head_stride[KVLI_EXACT];
    }
    *cls = entry & KVL_ENTRY_EXACT ? KVLI_EXACT : KVLI_PACKED;
    return (uint8_t *)(uintptr_t)a->block_address[id] + L->offset[*cls] + head * L->head_stride[*cls];
}

static void kvli_cpu_seal(const kvli_cpu_job *job, uint32_t own, uint32_t entry, uint32_t head) {
    const kvli_attend *a = job->a;
    const kvli_layer *L = a->layer;
    uint32_t from_cls, to_cls;
    const uint8_t *from = kvli_cpu_tile(a, own, head, &from_cls);
    uint8_t *to = kvli_cpu_tile(a, entry, head, &to_cls);
    if (to_cls == KVLI_EXACT) {
        memcpy(to, from, L->k[KVLI_EXACT].tile_bytes);
        memcpy(to + L->v_offset[to_cls], from + L->v_offset[from_cls], L->v[KVLI_EXACT].tile_bytes);
        return;
    }
    kvli_seal_tile(&L->k[KVLI_PACKED], a->geo->exact, from, to, job->simd);
    kvli_seal_tile(&L->v[KVLI_PACKED], a->geo->exact, from + L->v_offset[from_cls], to + L->v_offset[to_cls],
                   job->simd);
}

/* Task: one head's new rows of one block; seals the block if they complete it. */
static void kvli_cpu_write(void *arg, uint32_t task) {
    const kvli_cpu_job *job = (const kvli_cpu_job *)arg;
    const kvli_attend *a = job->a;
    const kvli_geometry *geo = a->geo;
    uint32_t si = kvli_cpu_span_of(job, task, true), local = task - job->plan[si].first_write,
             T = geo->block_tokens, cls;
    const kvli_attend_span *span = &a->spans[si];
    const kvl_span_blocks *blocks = &span->blocks;
    uint32_t i = local / geo->n_kv_heads, head = local % geo->n_kv_heads, b = blocks->first_own + i,
             end = span->position + span->n_rows;
    uint32_t from = kvli_max_u32(b * T, span->position), n = kvli_min_u32((b + 1) * T, end) - from;
    uint32_t row = span->first_row + (from - span->position);
    uint8_t *tile = kvli_cpu_tile(a, blocks->own[i], head, &cls);
    bool ok = kvli_write_rows(geo->exact, geo->k_dim, kvli_tensor_at(&a->k, row, head), a->k.dtype,
                              a->k.row_stride, n, tile, from - b * T, job->simd);
    ok &= kvli_write_rows(geo->exact, geo->v_dim, kvli_tensor_at(&a->v, row, head), a->v.dtype,
                          a->v.row_stride, n, tile + a->layer->v_offset[cls], from - b * T, job->simd);
    job->bad[task] = !ok;
    if (end >= (b + 1) * T && b < blocks->n_blocks && blocks->table[b] != blocks->own[i] &&
        blocks->table[b] != KVL_NONE)
        kvli_cpu_seal(job, blocks->own[i], blocks->table[b], head);
}

/* A task's query rows: rows [q0, q0 + n_q) of the span's rows × the query heads of one KV head. */
typedef struct kvli_cpu_unit {
    const kvli_cpu_job *job;
    const kvli_attend_span *span;
    uint32_t head, q0, n_q;
    float *q[2], *acc[2], *run_acc, *s,
        *scratch; /* [KVLI_PACKED], [KVLI_EXACT]: the same array unless two_q, two_acc */
    kvli_cpu_stat stat[KVLI_CPU_MAX_Q], run_stat[KVLI_CPU_MAX_Q];
    kvli_cpu_run runs[KVLI_CPU_MAX_Q]; /* of the tile at hand */
    bool whole;                        /* every row sees all of it */
    kvli_cpu_spread spread;
} kvli_cpu_unit;

static uint32_t kvli_cpu_position(const kvli_cpu_unit *u, uint32_t i) {
    return u->span->position + (u->q0 + i) / u->job->a->geo->gqa;
}

/* The first of the unit's query rows at this position or later. */
static uint32_t kvli_cpu_first_at(const kvli_cpu_unit *u, uint64_t position) {
    uint64_t i;
    if (position <= u->span->position) return 0;
    i = (position - u->span->position) * u->job->a->geo->gqa;
    return i <= u->q0 ? 0 : i - u->q0 < u->n_q ? (uint32_t)(i - u->q0) : u->n_q;
}

static void kvli_cpu_load(const kvl_tensor *t, uint32_t row, uint32_t head, uint32_t dim, float *out) {
    const uint8_t *at = kvli_tensor_at(t, row, head);
    if (t->dtype == KVL_DTYPE_F32) {
        memcpy(out, at, dim * sizeof(float));
        return;
    }
    for (uint32_t d = 0; d < dim; d++) {
        uint16_t h;
        memcpy(&h, at + 2 * d, sizeof h);
        out[d] = t->dtype == KVL_DTYPE_F16 ? kvli_f16_to_f32(h) : kvli_bf16_to_f32(h);
    }
}

static void kvli_cpu_store(const kvl_tensor *t, uint32_t row, uint32_t head, uint32_t dim, const float *x) {
    uint8_t *at = kvli_tensor_at(t, row, head);
    if (t->dtype == KVL_DTYPE_F32) {
        memcpy(at, x, dim * sizeof(float));
        return;
    }
    for (uint32_t d = 0; d < dim; d++) {
        uint16_t h = t->dtype == KVL_DTYPE_F16 ? kvli_f32_to_f16(x[d]) : kvli_f32_to_bf16(x[d]);
        memcpy(at + 2 * d, &h, sizeof h);
    }
}

static bool kvli_is_nibbles(kvl_format f) { return f == KVL_NVFP4 || f == KVL_INT4 || f == KVL_INT4_CHANNEL; }

/* Where element d of a row of 4 bits stands: keys lie as they are taken from 32-bit numbers, the first of each four of them,
   then the second and so on; values with the even elements of each 32 before the odd ones. */
static inline uint32_t kvli_cpu_key_place(uint32_t d) { return (d & ~31u) + d % 8 * 4 + d % 32 / 8; }
static inline uint32_t kvli_cpu_value_place(uint32_t d) { return (d & ~31u) + d % 2 * 16 + d % 32 / 2; }

/* q rows as f32, scaled (softmax scale, softcap, base 2), and once more as packed keys want them. */
KVLI_NOINLINE void kvli_cpu_prepare_q(kvli_cpu_unit *u) {
    const kvli_cpu_job *job = u->job;
    const kvli_attend *a = job->a;
    const kvli_side *packed = &a->layer->k[KVLI_PACKED];
    uint32_t gqa = a->geo->gqa, dim = a->geo->k_dim;
    float by = a->layer->softcap != 0 ? a->layer->scale / a->layer->softcap : a->layer->scale * KVLI_LOG2E;
    memset(u->q[KVLI_EXACT], 0, (size_t)(u->n_q + 1) * job->k_pad * sizeof(float));
    if (job->two_q) memset(u->q[KVLI_PACKED], 0, (size_t)(u->n_q + 1) * job->k_pad * sizeof(float));
    for (uint32_t i = 0; i < u->n_q; i++) {
        float *q = u->q[KVLI_EXACT] + (size_t)i * job->k_pad, *p = u->q[KVLI_PACKED] + (size_t)i * job->k_pad,
              x[256];
        uint32_t at = u->q0 + i;
        kvli_cpu_load(&a->q, u->span->first_row + at / gqa, u->head * gqa + at % gqa, dim, q);
        for (uint32_t d = 0; d < dim; d++) q[d] *= by;
        if (!job->two_q) continue;
        memcpy(x, q, dim * sizeof(float));
        if (packed->rotated) kvli_hadamard(x, dim, 1, job->simd);
        if (job->ops->turns_nibbles && kvli_is_nibbles(packed->format)) {
            for (uint32_t d = 0; d < dim; d++) p[kvli_cpu_key_place(d)] = x[d];
        } else {
            memcpy(p, x, dim * sizeof(float));
        }
    }
}

/* Accumulators of packed values, undone, are added to those of exact ones. */
KVLI_NOINLINE void kvli_cpu_join(const kvli_cpu_unit *u, uint32_t i) {
    const kvli_cpu_job *job = u->job;
    const kvli_side *packed = &job->a->layer->v[KVLI_PACKED];
    uint32_t dim = packed->dim;
    const float *from = u->acc[KVLI_PACKED] + (size_t)i * job->acc_floats;
    float *to = u->acc[KVLI_EXACT] + (size_t)i * job->acc_floats, x[256];
    if (job->ops->turns_nibbles && kvli_is_nibbles(packed->format)) {
        for (uint32_t d = 0; d < dim; d++) x[d] = from[kvli_cpu_value_place(d)];
        for (uint32_t g = 0; packed->format == KVL_INT4 && g * 64 < dim; g++) {
            float sum = 0;
            for (uint32_t l = 0; l < 16; l++) sum += from[job->v_pad + 16 * g + l];
            for (uint32_t d = 64 * g; d < kvli_min_u32(64 * g + 64, dim); d++) x[d] += sum;
        }
    } else {
        memcpy(x, from, dim * sizeof(float));
    }
    if (packed->rotated) kvli_hadamard(x, dim, 1, job->simd);
    for (uint32_t d = 0; d < dim; d++) to[d] += x[d];
}

/* Folds one segment's result into what came before it. l is 0 where nothing was seen. */
KVLI_NOINLINE void kvli_cpu_merge(const kvli_cpu_ops *ops, kvli_cpu_stat *st, float *acc,
                                  const kvli_cpu_stat *next, const float *next_acc, uint32_t dim) {
    float m = st->m > next->m ? st->m : next->m, a, b;
    if (next->l == 0) return;
    if (st->l == 0) {
        *st = *next;
        memcpy(acc, next_acc, dim * sizeof(float));
        return;
    }
    a = ops->exp2(st->m - m);
    b = ops->exp2(next->m - m);
    st->m = m;
    st->l = st->l * a + next->l * b;
    for (uint32_t d = 0; d < dim; d++) acc[d] = acc[d] * a + next_acc[d] * b;
}

/* A finished row: the sink logit joins the sum, then the division. */
KVLI_NOINLINE void kvli_cpu_finish(const kvli_cpu_job *job, const kvli_attend_span *span, uint32_t at,
                                   uint32_t head, kvli_cpu_stat st, const float *acc) {
    const kvli_attend *a = job->a;
    uint32_t gqa = a->geo->gqa, h = head * gqa + at % gqa, dim = a->geo->v_dim;
    float x[256], by = 0;
    if (a->layer->sink_logits && st.l != 0) {
        float sink = a->layer->sink_logits[h] * KVLI_LOG2E, m = sink > st.m ? sink : st.m;
        by = job->ops->exp2(st.m - m);
        by /= st.l * by + job->ops->exp2(sink - m);
    } else if (st.l != 0) {
        by = 1.0f / st.l;
    }
    for (uint32_t d = 0; d < dim; d++) x[d] = st.l != 0 ? acc[d] * by : 0.0f;
    kvli_cpu_store(&a->out, span->first_row + at / gqa, h, dim, x);
}

/* Which tokens of tile [t0, t0 + n) each query row sees; false: none sees any. */
static bool kvli_cpu_tile_runs(kvli_cpu_unit *u, uint32_t t0, uint32_t n) {
    const kvli_layer *L = u->job->a->layer;
    const kvli_cpu_run all = {0, 0, n};
    bool any = false;
    u->whole = kvli_cpu_position(u, 0) + 1 >= t0 + n &&
               (!L->window || kvli_cpu_position(u, u->n_q - 1) < t0 + L->window);
    for (uint32_t i = 0; i < u->n_q && u->whole; i++) u->runs[i] = all;
    for (uint32_t i = 0; i < u->n_q && !u->whole; i++) {
        uint32_t p = kvli_cpu_position(u, i), lo = L->window && p + 1 > L->window ? p + 1 - L->window : 0;
        uint32_t sink = kvli_min_u32(L->window ? L->sink_tokens : 0, lo);
        kvli_cpu_run *r = &u->runs[i];
        r->sink = sink > t0 ? kvli_min_u32(sink - t0, n) : 0;
        r->hi = p + 1 > t0 ? kvli_min_u32(p + 1 - t0, n) : 0;
        r->lo = lo > t0 ? kvli_min_u32(lo - t0, n) : 0;
        if (r->lo > r->hi) r->lo = r->hi;
        any |= r->sink > 0 || r->lo < r->hi;
    }
    return any || u->whole;
}

/* Consecutive blocks of the tile at hand, and the query rows [q0, q0 + n_q) that read this version of them.
 */
typedef struct kvli_cpu_part {
    /* a few more, to be prefetched; those of 16 tokens look at two tiles of 8 */
    const uint8_t *k[KVLI_CPU_BLOCKS + KVLI_CPU_AHEAD], *v[KVLI_CPU_BLOCKS + KVLI_CPU_AHEAD];
    uint32_t cls, n_tiles, first, n, q0, n_q;
} kvli_cpu_part;

/* Adds a block, read by query rows [q0, q1) less those at both ends that see none of it: those may have no such block any
   more. n_ahead entries behind it are looked at, so that kernels can prefetch their tiles. */
static void kvli_cpu_add_block(const kvli_cpu_unit *u, const uint32_t *entry, uint32_t n_ahead,
                               uint32_t first, uint32_t q0, uint32_t q1, kvli_cpu_part *parts,
                               uint32_t *n_parts) {
    const kvli_layer *L = u->job->a->layer;
    const kvli_cpu_run *r = u->runs;
    uint32_t T = u->job->a->geo->block_tokens, n = 0, cls;
    kvli_cpu_part *p = *n_parts ? &parts[*n_parts - 1] : NULL;
    const uint8_t *at;
#define KVLI_SEES(i) (r[i].sink > first || (r[i].lo < first + T && r[i].hi > first && r[i].lo < r[i].hi))
    while (!u->whole && q0 < q1 && !KVLI_SEES(q0)) q0++;
    while (!u->whole && q0 < q1 && !KVLI_SEES(q1 - 1)) q1--;
#undef KVLI_SEES
    if (q0 == q1) return;
    if (u->whole) n = first + T;
    for (uint32_t i = q0; i < q1 && !u->whole; i++) n = kvli_max_u32(n, kvli_max_u32(r[i].sink, r[i].hi));
    at = kvli_cpu_tile(u->job->a, *entry, u->head, &cls);
    if (!p || p->cls != cls || p->q0 != q0 || p->n_q != q1 - q0 || p->first + p->n_tiles * T != first) {
        p = &parts[(*n_parts)++];
        p->cls = cls;
        p->n_tiles = 0;
        p->first = first;
        p->q0 = q0;
        p->n_q = q1 - q0;
    }
    p->n = kvli_min_u32(n, first + T) - p->first;
    p->k[p->n_tiles] = at;
    p->v[p->n_tiles++] = at + L->v_offset[cls];
    for (uint32_t i = 0; i < KVLI_CPU_AHEAD; i++) {
        if (i < n_ahead && entry[1 + i] != KVL_NONE && T >= 16)
            at = kvli_cpu_tile(u->job->a, entry[1 + i], u->head, &cls);
        p->k[p->n_tiles + i] = at;
        p->v[p->n_tiles + i] = at + L->v_offset[cls];
    }
}

/* The parts of tile [t0, t0 + n): earlier blocks as the table has them, then each row's own block, exact. */
static uint32_t kvli_cpu_tile_parts(const kvli_cpu_unit *u, uint32_t t0, uint32_t n, kvli_cpu_part *parts) {
    const kvl_span_blocks *blocks = &u->span->blocks;
    uint32_t T = u->job->a->geo->block_tokens, n_parts = 0;
    for (uint32_t b = t0 / T; b * T < t0 + n; b++) {
        uint32_t later = kvli_cpu_first_at(u, ((uint64_t)b + 1) * T);
        if (later < u->n_q)
            kvli_cpu_add_block(u, &blocks->table[b], (b + 1) * T < t0 + n ? 0 : blocks->n_blocks - b - 1,
                               b * T - t0, later, u->n_q, parts, &n_parts);
    }
    for (uint32_t b = kvli_max_u32(t0 / T, blocks->first_own); b * T < t0 + n; b++) {
        uint32_t own = kvli_cpu_first_at(u, (uint64_t)b * T),
                 later = kvli_cpu_first_at(u, ((uint64_t)b + 1) * T);
        if (own < later)
            kvli_cpu_add_block(u, &blocks->own[b - blocks->first_own], 0, b * T - t0, own, later, parts,
                               &n_parts);
    }
    return n_parts;
}

static kvli_cpu_block kvli_cpu_block_of(kvli_cpu_unit *u, const kvli_cpu_part *p, bool is_key) {
    const kvli_cpu_job *job = u->job;
    const kvli_layer *L = job->a->layer;
    kvli_cpu_block b;
    b.side = is_key ? &L->k[p->cls] : &L->v[p->cls];
    b.tiles = is_key ? p->k : p->v;
    b.n_tiles = p->n_tiles;
    b.n = p->n;
    b.first = p->first;
    b.n_q = p->n_q;
    b.q = u->q[p->cls] + (size_t)p->q0 * job->k_pad;
    b.q_stride = job->k_pad;
    b.s = u->s + (size_t)p->q0 * KVLI_CPU_STRIDE + p->first;
    b.runs = u->runs + p->q0;
    b.acc = u->acc[p->cls] + (size_t)p->q0 * job->acc_floats;
    b.acc_stride = job->acc_floats;
    b.scratch = u->scratch;
    b.scratch_dim = kvli_max_u32(job->a->geo->k_dim, job->a->geo->v_dim);
    b.spread = &u->spread;
    return b;
}

KVLI_NOINLINE void kvli_cpu_scale(float *x, uint32_t n, float by) {
    for (uint32_t d = 0; d < n; d++) x[d] *= by;
}

/* Scales stand behind the rows of a tile, where kernels going from row to row do not look ahead: brings those of the
   tokens from t0 on, which are next. */
static void kvli_cpu_prefetch_scales(const kvli_cpu_unit *u, uint32_t t0) {
    const kvli_cpu_job *job = u->job;
    const kvli_layer *L = job->a->layer;
    const kvl_span_blocks *blocks = &u->span->blocks;
    uint32_t T = job->a->geo->block_tokens, cls,
             end = kvli_min_u32((t0 + KVLI_CPU_TILE) / T, blocks->n_blocks);
    if (job->k_scale_bytes + job->v_scale_bytes == 0) return;
    for (uint32_t b = t0 / T; b < end; b++) {
        const uint8_t *at =
            blocks->table[b] == KVL_NONE ? NULL : kvli_cpu_tile(job->a, blocks->table[b], u->head, &cls);
        if (!at || cls == KVLI_EXACT) continue;
        for (uint32_t i = 0; i < job->k_scale_bytes; i += 64) KVLI_PREFETCH(at + job->k_row_bytes + i);
        at += L->v_offset[cls];
        for (uint32_t i = 0; i < job->v_scale_bytes; i += 64) KVLI_PREFETCH(at + job->v_row_bytes + i);
    }
}

static void kvli_cpu_tile_step(kvli_cpu_unit *u, uint32_t t0, uint32_t n) {
    const kvli_cpu_job *job = u->job;
    const kvli_layer *L = job->a->layer;
    kvli_cpu_part parts[2 * KVLI_CPU_BLOCKS];
    uint32_t n_parts;
    if (!kvli_cpu_tile_runs(u, t0, n)) return;
    n_parts = kvli_cpu_tile_parts(u, t0, n, parts);
    kvli_cpu_prefetch_scales(u, t0 + n);
    for (uint32_t i = 0; i < n_parts; i++) {
        kvli_cpu_block b = kvli_cpu_block_of(u, &parts[i], true);
        job->ops->score(&b);
    }
    for (uint32_t i = 0, done; i < u->n_q; i += done) {
        const kvli_cpu_run *r = &u->runs[i];
        float by[2];
        done = 1;
        if (r->sink == 0 && r->lo == r->hi) continue;
        done = job->ops->softmax(u->s + (size_t)i * KVLI_CPU_STRIDE, r, u->n_q - i, L->softcap * KVLI_LOG2E,
                                 &u->stat[i], by);
        for (uint32_t k = 0; k < done; k++) {
            if (by[k] == 1.0f) continue;
            kvli_cpu_scale(u->acc[KVLI_EXACT] + (size_t)(i + k) * job->acc_floats, job->acc_floats, by[k]);
            if (job->two_acc)
                kvli_cpu_scale(u->acc[KVLI_PACKED] + (size_t)(i + k) * job->acc_floats, job->acc_floats,
                               by[k]);
        }
    }
    for (uint32_t i = 0; i < n_parts; i++) {
        kvli_cpu_block b = kvli_cpu_block_of(u, &parts[i], false);
        job->ops->values(&b);
    }
}

/* One segment of the unit's rows, from nothing: stat and acc[KVLI_EXACT]. */
static void kvli_cpu_segment(kvli_cpu_unit *u, uint32_t segment) {
    const kvli_cpu_job *job = u->job;
    const kvli_layer *L = job->a->layer;
    uint32_t length = job->a->geo->segment_tokens, start = segment * length, first = kvli_cpu_position(u, 0);
    uint32_t end = kvli_min_u32(kvli_cpu_position(u, u->n_q - 1) + 1, start + length);
    uint32_t lo = L->window && first + 1 > L->window ? first + 1 - L->window : 0,
             sinks = L->window ? L->sink_tokens : 0;
    size_t floats = (size_t)u->n_q * job->acc_floats;
    for (uint32_t i = 0; i < u->n_q; i++) {
        u->stat[i].m = KVLI_LOW;
        u->stat[i].l = 0;
    }
    memset(u->acc[KVLI_EXACT], 0, floats * sizeof(float));
    if (job->two_acc) memset(u->acc[KVLI_PACKED], 0, floats * sizeof(float));
    for (uint32_t t = start; t < end; t += KVLI_CPU_TILE) {
        uint32_t n = kvli_min_u32(start + length - t, KVLI_CPU_TILE);
        if (t + n > lo || t < sinks) kvli_cpu_tile_step(u, t, n);
    }
    for (uint32_t i = 0; i < u->n_q && job->two_acc; i++)
        if (u->stat[i].l != 0) kvli_cpu_join(u, i);
}

/* Whether a segment lies between the sinks and the windows of all of the unit's rows. */
static bool kvli_cpu_segment_unseen(const kvli_cpu_unit *u, uint32_t segment) {
    const kvli_layer *L = u->job->a->layer;
    uint32_t length = u->job->a->geo->segment_tokens, first = kvli_cpu_position(u, 0);
    return L->window && segment * length >= L->sink_tokens &&
           (uint64_t)(segment + 1) * length + L->window <= (uint64_t)first + 1;
}

static float *kvli_cpu_partial(const kvli_cpu_job *job, const kvli_cpu_plan *plan,
                               const kvli_attend_span *span, uint32_t head, uint32_t at, uint32_t segment) {
    size_t rows = (size_t)span->n_rows * job->a->geo->gqa;
    return job->partial + plan->partial +
           ((head * rows + at) * plan->n_segments + segment) * (2 + job->a->geo->v_dim);
}

static void kvli_cpu_unit_run(kvli_cpu_unit *u, const kvli_cpu_plan *plan, uint32_t part) {
    const kvli_cpu_job *job = u->job;
    uint32_t dim = job->a->geo->v_dim, s0 = (uint32_t)((uint64_t)plan->n_segments * part / plan->n_parts);
    uint32_t s1 = (uint32_t)((uint64_t)plan->n_segments * (part + 1) / plan->n_parts);
    kvli_cpu_prepare_q(u);
    u->spread.n_q = 0;
    for (uint32_t i = 0; i < u->n_q; i++) {
        u->run_stat[i].m = KVLI_LOW;
        u->run_stat[i].l = 0;
    }
    for (uint32_t s = s0; s < s1; s++) {
        bool unseen = kvli_cpu_segment_unseen(u, s);
        if (!unseen) kvli_cpu_segment(u, s);
        for (uint32_t i = 0; i < u->n_q; i++) {
            const float *acc = u->acc[KVLI_EXACT] + (size_t)i * job->acc_floats;
            if (plan->n_parts > 1) {
                float *to = kvli_cpu_partial(job, plan, u->span, u->head, u->q0 + i, s);
                to[0] = u->stat[i].m;
                to[1] = unseen ? 0 : u->stat[i].l;
                if (!unseen) memcpy(to + 2, acc, dim * sizeof(float));
            } else if (!unseen) {
                kvli_cpu_merge(job->ops, &u->run_stat[i], u->run_acc + (size_t)i * dim, &u->stat[i], acc,
                               dim);
            }
        }
    }
    for (uint32_t i = 0; i < u->n_q && plan->n_parts == 1; i++)
        kvli_cpu_finish(job, u->span, u->q0 + i, u->head, u->run_stat[i], u->run_acc + (size_t)i * dim);
}

/* Task: some query rows of one KV head of one span, over all segments or some. */
static void kvli_cpu_unit_task(void *arg, uint32_t task) {
    const kvli_cpu_job *job = (const kvli_cpu_job *)arg;
    const kvli_geometry *geo = job->a->geo;
    KVLI_ALIGN(64) float memory[KVLI_CPU_FLOATS];
    uint32_t si = kvli_cpu_span_of(job, task, false), local = task - job->plan[si].first_unit, rows;
    const kvli_cpu_plan *plan = &job->plan[si];
    size_t q_floats, acc_floats;
    kvli_cpu_unit u;
    u.job = job;
    u.span = &job->a->spans[si];
    u.head = local / (plan->n_query_blocks * plan->n_parts);
    u.q0 = local / plan->n_parts % plan->n_query_blocks * job->max_q;
    rows = u.span->n_rows * geo->gqa;
    u.n_q = kvli_min_u32(rows - u.q0, job->max_q);
    q_floats = (size_t)(u.n_q + 1) * job->k_pad;
    acc_floats = (size_t)u.n_q * job->acc_floats;
    u.q[KVLI_EXACT] = memory;
    u.q[KVLI_PACKED] = job->two_q ? memory + q_floats : memory;
    u.acc[KVLI_EXACT] = u.q[KVLI_PACKED] + q_floats;
    u.acc[KVLI_PACKED] = job->two_acc ? u.acc[KVLI_EXACT] + acc_floats : u.acc[KVLI_EXACT];
    u.run_acc = u.acc[KVLI_PACKED] + acc_floats;
    u.s = u.run_acc + (size_t)u.n_q * geo->v_dim;
    u.scratch = u.s + (size_t)(u.n_q + 1) * KVLI_CPU_STRIDE;
    kvli_cpu_unit_run(&u, plan, local % plan->n_parts);
}

/* Task: merges the partial results of one KV head of one span, left to right. */
static void kvli_cpu_merge_task(void *arg, uint32_t task) {
    const kvli_cpu_job *job = (const kvli_cpu_job *)arg;
    const kvli_geometry *geo = job->a->geo;
    uint32_t si = task / geo->n_kv_heads, head = task % geo->n_kv_heads;
    const kvli_cpu_plan *plan = &job->plan[si];
    const kvli_attend_span *span = &job->a->spans[si];
    if (plan->n_parts == 1) return;
    for (uint32_t at = 0; at < span->n_rows * geo->gqa; at++) {
        kvli_cpu_stat st = {KVLI_LOW, 0}, next;
        float acc[256];
        for (uint32_t s = 0; s < plan->n_segments; s++) {
            const float *from = kvli_cpu_partial(job, plan, span, head, at, s);
            next.m = from[0];
            next.l = from[1];
            kvli_cpu_merge(job->ops, &st, acc, &next, from + 2, geo->v_dim);
        }
        kvli_cpu_finish(job, span, at, head, st, acc);
    }
}

/* Query rows that a task's scratch holds, and how wide its rows are. */
static void kvli_cpu_shape(kvli_cpu_job *job) {
    const kvli_geometry *geo = job->a->geo;
    const kvli_layer *L = job->a->layer;
    const kvli_side *k = &L->k[KVLI_PACKED], *v = &L->v[KVLI_PACKED];
    uint32_t align = job->ops->row_align;
    bool split = job->ops->turns_nibbles;
    size_t row, left;
    job->k_row_bytes = (uint32_t)kvli_row_bytes(k->format, k->dim) * k->tokens;
    job->v_row_bytes = (uint32_t)kvli_row_bytes(v->format, v->dim) * v->tokens;
    job->k_scale_bytes = (uint32_t)kvli_scale_bytes(k->format, k->tokens, k->dim);
    job->v_scale_bytes = (uint32_t)kvli_scale_bytes(v->format, v->tokens, v->dim);
    job->k_pad = kvli_div_up(geo->k_dim, align) * align;
    job->v_pad = kvli_div_up(geo->v_dim, align) * align;
    job->two_q = k->rotated || (split && kvli_is_nibbles(k->format));
    job->two_acc = v->rotated || (split && kvli_is_nibbles(v->format));
    job->acc_floats = job->v_pad + (split && v->format == KVL_INT4 ? 16 * kvli_div_up(geo->v_dim, 64) : 0);
    row = (job->two_q ? 2 : 1) * job->k_pad + (job->two_acc ? 2 : 1) * job->acc_floats + geo->v_dim +
          KVLI_CPU_STRIDE;
    left = KVLI_CPU_FLOATS - job->ops->scratch_floats(geo) - 2 * job->k_pad - KVLI_CPU_STRIDE;
    job->max_q = (uint32_t)(left / row);
    if (job->max_q > KVLI_CPU_MAX_Q) job->max_q = KVLI_CPU_MAX_Q;
    if (job->max_q > 4) job->max_q &= ~3u;
}

/* Cuts spans into tasks. A span whose tasks are long against all work over the threads is cut along segments
 * as well. */
static uint32_t kvli_cpu_split_units(const kvli_cpu_job *job, uint32_t n_threads, size_t partial_floats) {
    const kvli_attend *a = job->a;
    const kvli_geometry *geo = a->geo;
    uint64_t work = 0;
    uint32_t n_units = 0;
    size_t used = 0;
    for (uint32_t s = 0; s < a->n_spans; s++) {
        kvli_cpu_plan *p = &job->plan[s];
        uint32_t end = a->spans[s].position + a->spans[s].n_rows;
        p->n_query_blocks = kvli_div_up(a->spans[s].n_rows * geo->gqa, job->max_q);
        p->n_segments = kvli_div_up(end, geo->segment_tokens);
        work += (uint64_t)p->n_query_blocks * geo->n_kv_heads * end;
    }
    for (uint32_t s = 0; s < a->n_spans; s++) {
        kvli_cpu_plan *p = &job->plan[s];
        uint32_t end = a->spans[s].position + a->spans[s].n_rows;
        uint64_t parts = ((uint64_t)end * 4 * n_threads + work - 1) / work;
        size_t floats = (size_t)a->spans[s].n_rows * geo->n_q_heads * p->n_segments * (2 + geo->v_dim);
        if (parts > p->n_segments) parts = p->n_segments;
        if (n_threads == 1 || floats > partial_floats - used) parts = 1;
        p->n_parts = (uint32_t)parts;
        p->partial = used;
        if (parts > 1) used += floats;
        p->first_unit = n_units;
        n_units += p->n_query_blocks * geo->n_kv_heads * p->n_parts;
    }
    return n_units;
}

/* Writes and seals; with few rows and nothing to seal, waking threads would cost more than it gives. */
static void kvli_cpu_write_all(struct kvl_context *ctx, kvli_cpu_job *job) {
    const kvli_attend *a = job->a;
    uint32_t n = 0, heads = a->geo->n_kv_heads, T = a->geo->block_tokens;
    bool seals = false;
    for (uint32_t s = 0; s < a->n_spans; s++) {
        const kvli_attend_span *span = &a->spans[s];
        job->plan[s].first_write = n;
        n += span->blocks.n_own * heads;
        seals |= span->position / T != (span->position + span->n_rows) / T;
    }
    if (seals || a->n_rows >= 16) {
        kvli_parallel(ctx, n, kvli_cpu_write, job);
    } else {
        for (uint32_t i = 0; i < n; i++) kvli_cpu_write(job, i);
    }
    for (uint32_t s = 0, i = 0; s < a->n_spans; s++)
        for (uint32_t end = i + a->spans[s].blocks.n_own * heads; i < end; i++)
            if (job->bad[i]) a->taint[s] = 1;
}

static size_t kvli_cpu_align64(size_t n) { return (n + 63) & ~(size_t)63; }

/* Plans and flags of a step, and room for the partial results of as many query rows as splitting along
 * segments can pay for. */
static size_t kvli_cpu_workspace(const kvli_geometry *geo, uint32_t n_threads, uint32_t max_step_tokens,
                                 uint32_t max_seq_tokens) {
    size_t fixed = kvli_cpu_align64(max_step_tokens * sizeof(kvli_cpu_plan)) +
                   kvli_cpu_align64((size_t)max_step_tokens * geo->n_kv_heads);
    uint64_t row =
        (uint64_t)kvli_div_up(max_seq_tokens, geo->segment_tokens) * (2 + geo->v_dim) * sizeof(float);
    uint64_t rows = (uint64_t)kvli_min_u32(max_step_tokens, 4 * n_threads) * geo->n_q_heads;
    uint64_t most = 16u << 20, partial = row * rows < most ? row * rows : most;
    return fixed + (n_threads > 1 ? (size_t)partial : 0);
}

static void kvli_cpu_attend(struct kvl_context *ctx, const kvli_attend *a) {
    uint32_t n_threads = kvli_threads(ctx), n_units;
    uint8_t *at = (uint8_t *)a->workspace;
    bool merge = false;
    size_t fixed;
    kvli_cpu_job job;
    job.a = a;
    job.simd = kvli_simd(ctx);
    job.ops = &KVLI_CPU_SCALAR;
#if KVLI_X86
    if (job.simd == KVL_SIMD_AVX512) job.ops = &KVLI_CPU_AVX512;
    if (job.simd == KVL_SIMD_AVX2) job.ops = &KVLI_CPU_AVX2;
#endif
    job.plan = (kvli_cpu_plan *)a->workspace;
    job.bad = at + kvli_cpu_align64(a->n_spans * sizeof(kvli_cpu_plan));
    fixed = (size_t)(job.bad - at) + kvli_cpu_align64((size_t)a->n_rows * a->geo->n_kv_heads);
    job.partial = (float *)(void *)(at + fixed);
    kvli_cpu_shape(&job);
    kvli_cpu_write_all(ctx, &job);
    n_units = kvli_cpu_split_units(&job, n_threads, (a->workspace_bytes - fixed) / sizeof(float));
    kvli_parallel(ctx, n_units, kvli_cpu_unit_task, &job);
    for (uint32_t s = 0; s < a->n_spans; s++) merge |= job.plan[s].n_parts > 1;
    if (merge) kvli_parallel(ctx, a->n_spans * a->geo->n_kv_heads, kvli_cpu_merge_task, &job);
}

/* ==== >>null: no math and no memory: scheduler tests, capacity planning ==== */
static kvl_result kvli_null_map(kvl_cache *c, uint32_t slab, size_t bytes, uint64_t *address) {
    (void)slab;
    *address = 4096ull * (1 + (uint64_t)kvli_atomic_add(&c->ctx->null_pages, (uint32_t)(bytes / 4096 + 1)));
    return KVL_OK;
}
static void kvli_null_unmap(kvl_cache *c, uint32_t slab, size_t bytes, uint64_t address) {
    (void)c;
    (void)slab;
    (void)bytes;
    (void)address;
}
static kvl_result kvli_null_copy(kvl_cache *c, uint64_t dst, uint64_t src, size_t bytes) {
    (void)c;
    (void)dst;
    (void)src;
    (void)bytes;
    return KVL_OK;
}
static kvl_result kvli_null_poison(kvl_cache *c, uint64_t address, size_t bytes) {
    return kvli_null_copy(c, address, 0, bytes);
}
static kvl_result kvli_null_cache(kvl_cache *c) {
    (void)c;
    return KVL_OK;
}
static kvl_result kvli_null_attend(kvl_cache *c, const kvli_attend *args) {
    (void)c;
    (void)args;
    return KVL_OK;
}
static kvl_result kvli_host_open(kvl_context *ctx, kvli_text why) {
    (void)why;
    snprintf(ctx->name, sizeof ctx->name, "%s", ctx->backend->name);
    return KVL_OK;
}
static void kvli_host_close(kvl_context *ctx) { (void)ctx; }
static void kvli_host_stop(kvl_cache *c) { (void)c; }

/* The CPU's memory; its attention is in >>cpu. */
static const char *const kvli_simd_names[] = {"auto", "scalar", "avx2", "avx512"};

static kvl_result kvli_cpu_open(kvl_context *ctx, kvli_text why) {
    (void)why;
    snprintf(ctx->name, sizeof ctx->name, "cpu (%s)", kvli_simd_names[ctx->simd]);
    return KVL_OK;
}
static kvl_result kvli_cpu_size(kvl_cache *c) {
    c->workspace_bytes =
        kvli_cpu_workspace(&c->geo, kvli_threads(c->ctx), c->desc.max_step_tokens, c->desc.max_seq_tokens);
    return KVL_OK;
}
static kvl_result kvli_cpu_map(kvl_cache *c, uint32_t slab, size_t bytes, uint64_t *address) {
    size_t size = bytes + 128 + sizeof(void *);
    (void)slab;
    if (size < bytes) return KVL_OUT_OF_DEVICE_MEMORY;
    uint8_t *raw = (uint8_t *)kvli_alloc(c->ctx, size);
    if (!raw) return KVL_OUT_OF_DEVICE_MEMORY;
    kvli_huge_pages(raw, size);
    uintptr_t at = ((uintptr_t)raw + sizeof(void *) + 127) & ~(uintptr_t)127;
    ((void **)at)[-1] = raw;
    *address = (uint64_t)at;
    return KVL_OK;
}
static void kvli_cpu_unmap(kvl_cache *c, uint32_t slab, size_t bytes, uint64_t address) {
    (void)slab;
    kvli_free(c->ctx, ((void **)(uintptr_t)address)[-1], bytes + 128 + sizeof(void *));
}
static kvl_result kvli_cpu_copy(kvl_cache *c, uint64_t dst, uint64_t src, size_t bytes) {
    (void)c;
    memcpy((void *)(uintptr_t)dst, (const void *)(uintptr_t)src, bytes);
    return KVL_OK;
}
static kvl_result kvli_cpu_poison(kvl_cache *c, uint64_t address,
                                  size_t bytes) { /* all ones: NaN in every float format */
    (void)c;
    memset((void *)(uintptr_t)address, 0xff, bytes);
    return KVL_OK;
}
static kvl_result kvli_cpu_step(kvl_cache *c) {
    for (uint32_t i = 0; i < c->step.n_copies; i++) {
        const kvl_copy *copy = &c->step.copies[i];
        kvli_cpu_copy(c, c->address[copy->dst & KVL_ENTRY_ID], c->address[copy->src & KVL_ENTRY_ID],
                      c->groups[copy->group].bytes[KVLI_EXACT]);
    }
    return KVL_OK;
}
static kvl_result kvli_cpu_layer(kvl_cache *c, const kvli_attend *args) {
    kvli_cpu_attend(c->ctx, args);
    return KVL_OK;
}

/* ==== >>tables: a step as kernels on a GPU read it ====
   Which rows to store and seal, which blocks of which tables each workgroup attends to, what to merge: built once, when
   the step is planned, for CUDA and Vulkan alike (kernels_cuda/tables.h says what kernels make of it).
     What one workgroup attends to is cut by position and geometry alone, and merged in a fixed order, so that an answer
   does not depend on who else runs. */
#if UINTPTR_MAX <= 0xffffffffu || defined(KVL_NO_CUDA)
#define KVLI_CUDA 0 /* (there are no drivers for programs of 32 bits) */
#elif defined(KVL_CUDA_KERNELS)
#include KVL_CUDA_KERNELS
#define KVLI_CUDA 1
#elif defined(__has_include)
#if __has_include("kernels_cuda/kvlite_cuda_kernels.h")
#include "kernels_cuda/kvlite_cuda_kernels.h"
#define KVLI_CUDA 1
#elif __has_include("kvlite_cuda_kernels.h")
#include "kvlite_cuda_kernels.h"
#define KVLI_CUDA 1
#endif
#endif
#ifndef KVLI_CUDA
#define KVLI_CUDA 0
#endif

#if UINTPTR_MAX <= 0xffffffffu || defined(KVL_NO_VULKAN)
#define KVLI_VULKAN 0
#elif defined(KVL_VULKAN_KERNELS)
#define KVLI_VULKAN_HEADER KVL_VULKAN_KERNELS
#elif defined(__has_include)
#if __has_include("kernels_vulkan/kvlite_vulkan_kernels.h")
#define KVLI_VULKAN_HEADER "kernels_vulkan/kvlite_vulkan_kernels.h"
#elif __has_include("kvlite_vulkan_kernels.h")
#define KVLI_VULKAN_HEADER "kvlite_vulkan_kernels.h"
#endif
#endif
#ifdef KVLI_VULKAN_HEADER
#include KVLI_VULKAN_HEADER
#define KVLI_VULKAN 1
#elif !defined(KVLI_VULKAN)
#define KVLI_VULKAN 0
#endif

#if KVLI_CUDA || KVLI_VULKAN
#if !defined(_WIN32)
#include <dlfcn.h>
#endif

/* ---- libraries of drivers ---- */
static void *kvli_gpu_library(const char *name) {
#if defined(_WIN32)
    return (void *)LoadLibraryA(name);
#else
    return dlopen(name, RTLD_NOW | RTLD_LOCAL);
#endif
}
static void kvli_gpu_unload(void *library) {
#if defined(_WIN32)
    FreeLibrary((HMODULE)library);
#else
    dlclose(library);
#endif
}
/* Writes the address of a function of the library to *to, a pointer to a function. */
static bool kvli_gpu_symbol(void *library, const char *symbol, void *to) {
#if defined(_WIN32)
    FARPROC at = GetProcAddress((HMODULE)library, symbol);
#else
    void *at = dlsym(library, symbol);
#endif
    memcpy(to, &at, sizeof at);
    return at != NULL;
}

enum {
    KVLI_GPU_PART_TOKENS = 256, /* least length of what one workgroup attends to */
    KVLI_GPU_PARTS = 64,        /* most parts of what a row sees */
    KVLI_GPU_PART_ROWS = 1024,  /* most parts times rows */
    KVLI_GPU_DRAFT_ROWS = 8     /* query tokens of a span that decode kernels take */
};

/* What is attended: sorts of items, one kernel each. */
enum { KVLI_GPU_DECODE, KVLI_GPU_DECODE_MORE, KVLI_GPU_PREFILL, KVLI_GPU_MERGE, KVLI_GPU_SORTS };

/* What a backend's kernels take. */
typedef struct kvli_gpu_shape {
    uint32_t rows[KVLI_GPU_MERGE]; /* most packed rows of an item of each sort; 0: there is no such kernel */
    uint32_t few;                  /* spans of at most so many packed rows are decoded, not prefilled */
} kvli_gpu_shape;

/* Launches over some items of a group: their partial results are merged before the next pass. */
typedef struct kvli_gpu_pass {
    uint64_t largest[KVLI_GPU_SORTS]; /* packed rows x tokens of the largest item */
    uint32_t n[KVLI_GPU_SORTS], padded[KVLI_GPU_SORTS];
    uint32_t at[KVLI_GPU_SORTS]; /* in the tables: bytes */
} kvli_gpu_pass;
typedef struct kvli_gpu_group {
    uint32_t counts, spans, stores;                                  /* in the tables: bytes */
    uint32_t n_stores, n_seals, padded_stores, first_pass, n_passes; /* n_seals: of the stores, the first */
} kvli_gpu_group;

/* A cache's part of it: what stands where in the tables of this step. */
typedef struct kvli_gpu_tables {
    kvli_gpu_shape shape;
    kvli_gpu_group groups[KVLI_MAX_GROUPS];
    kvli_gpu_pass *passes; /* [n_groups * (tiles + 1)] */
    uint32_t max_partials, max_spans;
    uint32_t entries, copies, used; /* bytes */
    uint32_t mapped;                /* grows whenever memory is mapped or unmapped */
} kvli_gpu_tables;

/* ---- what a cache needs ---- */
/* Which preset a layer has; KVL_NONE: none. */
static uint32_t kvli_gpu_preset(const kvl_cache *c, uint32_t layer) {
    const kvli_side *k = &c->geo.layers[layer].k[KVLI_PACKED], *v = &c->geo.layers[layer].v[KVLI_PACKED];
    uint32_t n;
    const kvl_preset *p = kvl_presets(&n);
    for (uint32_t i = 0; i < n; i++)
        if (p[i].k == (k->format | (k->rotated ? (kvl_format)KVL_ROTATED : 0)) &&
            p[i].v == (v->format | (v->rotated ? (kvl_format)KVL_ROTATED : 0)) && p[i].exact == c->geo.exact)
            return i;
    return KVL_NONE;
}

static kvl_result kvli_gpu_geometry(kvl_cache *c) {
    const kvli_geometry *g = &c->geo;
    const char *backend = c->ctx->backend->name;
    if (g->k_dim != g->v_dim)
        return KVLI_ERROR(c, KVL_UNSUPPORTED, "geometry.v_dim: %u is not k_dim %u (%s)", g->v_dim, g->k_dim,
                          backend);
    if (g->gqa > 16)
        return KVLI_ERROR(c, KVL_UNSUPPORTED, "geometry.n_q_heads: %u for each KV head are more than 16 (%s)",
                          g->gqa, backend);
    for (uint32_t l = 0; l < g->n_layers; l++) {
        const kvli_side *k = &g->layers[l].k[KVLI_PACKED], *v = &g->layers[l].v[KVLI_PACKED];
        if (kvli_gpu_preset(c, l) != KVL_NONE) continue;
        return KVLI_ERROR(
            c, KVL_UNSUPPORTED,
            "k_format, v_format, exact_format of layer %u: %s%s, %s%s, %s are not together in a preset "
            "(%s)",
            l, kvl_format_name(k->format), k->rotated ? "+rot" : "", kvl_format_name(v->format),
            v->rotated ? "+rot" : "", kvl_format_name(g->exact), backend);
    }
    return KVL_OK;
}

/* n rounded up to a shape: at most a quarter more. */
static uint32_t kvli_gpu_pad(uint32_t n) {
    uint32_t step = 1;
    while (n > 8 * step) step *= 2;
    return (n + step - 1) / step * step;
}
static size_t kvli_gpu_align(size_t bytes) { return (bytes + 255) & ~(size_t)255; }

/* Sizes that follow from the desc. */
typedef struct kvli_gpu_sizes {
    uint32_t spans, tiles, parts, partials;
    uint64_t tables, staging, partial_o, partial_ml;
} kvli_gpu_sizes;

/* No sequence is longer: each of its blocks in a group without a window takes memory of its own. */
static uint32_t kvli_gpu_longest(const kvl_cache *c) {
    uint64_t longest = c->desc.max_seq_tokens;
    for (uint32_t g = 0; g < c->geo.n_groups; g++) {
        size_t bytes = c->groups[g].bytes[c->groups[g].two_class ? KVLI_PACKED : KVLI_EXACT];
        uint64_t blocks = c->desc.max_device_bytes / bytes + 2;
        if (!c->groups[g].window && blocks * c->geo.block_tokens < longest)
            longest = blocks * c->geo.block_tokens;
    }
    return (uint32_t)longest;
}

static kvli_gpu_sizes kvli_gpu_size(const kvl_cache *c, const kvli_gpu_shape *shape) {
    kvli_gpu_sizes z;
    const kvli_geometry *g = &c->geo;
    uint64_t rows = c->desc.max_step_tokens, T = g->block_tokens, seq = kvli_gpu_longest(c), arrays, room;
    uint64_t row_bytes = (uint64_t)g->n_kv_heads * (g->v_dim + 2) * sizeof(float);
    uint32_t most = kvli_max_u32(shape->rows[KVLI_GPU_PREFILL], shape->rows[KVLI_GPU_DECODE]);
    memset(&z, 0, sizeof z);
    z.spans = kvli_min_u32(c->desc.max_sequences, c->desc.max_step_tokens);
    z.tiles =
        z.spans * kvli_div_up(shape->few, shape->rows[KVLI_GPU_DECODE]) + (uint32_t)(rows * g->gqa / most);
    z.parts = kvli_min_u32(KVLI_GPU_PARTS,
                           (uint32_t)(seq / kvli_min_u32(KVLI_GPU_PART_TOKENS, g->segment_tokens)) + 4);
    /* tables: taint; of each group spans, stores, items, merges and counts of each pass, all padded; entries; copies */
    arrays = z.spans * sizeof(kvli_gpu_span) + (rows / T + 2 * z.spans) * sizeof(kvli_gpu_store);
    arrays +=
        (2ull * z.spans * z.parts + 2 * z.tiles) * sizeof(kvli_gpu_item) + z.tiles * sizeof(kvli_gpu_merge);
    arrays = arrays / 4 * 5 + (z.tiles + 1) * (2 * sizeof(kvli_gpu_counts) + KVLI_GPU_SORTS * 256ull) + 2048;
    arrays += z.spans * (seq / T + 2 + rows / T) * sizeof(uint64_t) + z.spans * sizeof(kvli_gpu_copy);
    z.tables = kvli_gpu_align((size_t)(z.spans * sizeof(uint32_t) + g->n_groups * arrays));
    /* partial results: a tile's at least, else of all that may be, or what the budget can spare */
    z.partials = kvli_min_u32(KVLI_GPU_PART_ROWS, most * z.parts);
    room = c->desc.max_device_bytes / 64;
    room = (room < 32u << 20 ? room : 32u << 20) / row_bytes;
    if (room > (uint64_t)z.spans * z.parts * shape->few) room = (uint64_t)z.spans * z.parts * shape->few;
    if (room > z.partials) z.partials = (uint32_t)room;
    z.partial_o = kvli_gpu_align((size_t)z.partials * g->n_kv_heads * g->v_dim * sizeof(float));
    z.partial_ml = kvli_gpu_align((size_t)z.partials * g->n_kv_heads * 2 * sizeof(float));
    z.staging = c->desc.device_tensors
                    ? 0
                    : 2 * rows * (g->n_q_heads + g->n_kv_heads) * g->k_dim * sizeof(float) + 1024;
    return z;
}

static kvl_result kvli_gpu_too_large(kvl_cache *c, uint64_t tables) {
    return KVLI_ERROR(c, KVL_LIMIT,
                      "max_sequences, max_seq_tokens, max_step_tokens: a step's tables take %llu bytes",
                      (unsigned long long)tables);
}

static size_t kvli_gpu_passes_bytes(const kvl_cache *c, const kvli_gpu_sizes *z) {
    return (size_t)c->geo.n_groups * (z->tiles + 1) * sizeof(kvli_gpu_pass);
}

/* passes: [kvli_gpu_passes_bytes] */
static void kvli_gpu_tables_init(kvli_gpu_tables *t, const kvli_gpu_shape *shape, const kvli_gpu_sizes *z,
                                 void *passes) {
    memset(t, 0, sizeof *t);
    t->shape = *shape;
    t->passes = (kvli_gpu_pass *)passes;
    t->max_spans = z->spans;
    t->max_partials = z->partials;
}

/* ---- a step's tables ---- */
typedef struct kvli_gpu_builder {
    kvl_cache *c;
    kvli_gpu_tables *t;
    uint8_t *to; /* the tables; null: to count */
    uint64_t largest[KVLI_GPU_SORTS];
    uint32_t group, pass, n[KVLI_GPU_SORTS], partials;
} kvli_gpu_builder;

static void kvli_gpu_pass_end(kvli_gpu_builder *b) {
    kvli_gpu_pass *pass = &b->t->passes[b->pass++];
    if (!b->to) {
        memcpy(pass->n, b->n, sizeof b->n);
        memcpy(pass->largest, b->largest, sizeof b->largest);
    }
    memset(b->n, 0, sizeof b->n);
    memset(b->largest, 0, sizeof b->largest);
    b->partials = 0;
}

/* (Items and merges are of one size.) */
static void *kvli_gpu_slot(kvli_gpu_builder *b, uint32_t sort) {
    return b->to + b->t->passes[b->pass].at[sort] + b->n[sort]++ * sizeof(kvli_gpu_item);
}

/* Blocks that rows at positions first..last see: one range, or two with a gap between sinks and window. */
typedef struct kvli_gpu_ranges {
    uint32_t begin[2], end[2], n;
} kvli_gpu_ranges;

static kvli_gpu_ranges kvli_gpu_ranges_of(const kvl_cache *c, uint32_t group, uint32_t first, uint32_t last) {
    uint32_t T = c->geo.block_tokens, window = c->groups[group].window, end = last / T + 1;
    uint32_t sinks = kvli_min_u32(kvli_div_up(c->groups[group].sink_tokens, T), end);
    uint32_t from = window && first + 1 > window ? (first + 1 - window) / T : 0;
    kvli_gpu_ranges r = {{0, 0}, {end, end}, 1};
    if (from <= sinks && sinks) return r;
    r.begin[0] = from;
    if (!sinks) return r;
    r.begin[0] = 0;
    r.end[0] = sinks;
    r.begin[1] = from;
    r.n = 2;
    return r;
}

static uint32_t kvli_gpu_pieces(const kvli_gpu_ranges *r,
                                uint32_t step) { /* cut at multiples of step blocks */
    uint32_t n = 0;
    for (uint32_t i = 0; i < r->n; i++) n += (r->end[i] - 1) / step - r->begin[i] / step + 1;
    return n;
}

/* Packed rows of a span that a workgroup takes, in at most so many parts. */
static void kvli_gpu_tile(kvli_gpu_builder *b, uint32_t s, uint32_t row, uint32_t n_rows, uint32_t sort,
                          uint32_t parts) {
    const kvl_cache *c = b->c;
    const kvli_attend_span *span = &c->step.attend[(size_t)b->group * c->max_spans + s];
    uint32_t T = c->geo.block_tokens, gqa = c->geo.gqa, first = span->position + row / gqa,
             last = span->position + (row + n_rows - 1) / gqa;
    kvli_gpu_ranges r = kvli_gpu_ranges_of(c, b->group, first, last);
    uint32_t step = parts > 1 ? kvli_min_u32(KVLI_GPU_PART_TOKENS, c->geo.segment_tokens) / T : 1u << 30, n;
    for (n = kvli_gpu_pieces(&r, step); n > parts && step < 1u << 30; n = kvli_gpu_pieces(&r, step))
        step *= 2;
    if (n > 1 && b->partials + n * n_rows > b->t->max_partials) kvli_gpu_pass_end(b);
    uint32_t partial = b->partials;
    if (n > 1) b->partials += n * n_rows;
    if (!b->to) {
        uint64_t work = (uint64_t)n_rows * T * kvli_min_u32(step, last / T + 1);
        if (work > b->largest[sort]) b->largest[sort] = work;
        b->n[sort] += n;
        b->n[KVLI_GPU_MERGE] += n > 1;
        return;
    }
    if (n > 1) {
        kvli_gpu_merge merge = {s, row, n_rows, partial, n, {0, 0, 0}};
        *(kvli_gpu_merge *)kvli_gpu_slot(b, KVLI_GPU_MERGE) = merge;
    }
    for (uint32_t i = 0; i < r.n; i++)
        for (uint32_t at = r.begin[i], end; at < r.end[i]; at = end, partial += n_rows) {
            end = kvli_min_u32((at / step + 1) * step, r.end[i]);
            uint32_t table_end = kvli_min_u32(end, last / T), own = kvli_max_u32(at, first / T);
            kvli_gpu_item item = {s,         row,
                                  n_rows,    kvli_min_u32(at, table_end),
                                  table_end, kvli_min_u32(own, end),
                                  end,       n > 1 ? partial : KVLI_GPU_NONE};
            *(kvli_gpu_item *)kvli_gpu_slot(b, sort) = item;
        }
}

static void kvli_gpu_items(kvli_gpu_builder *b) { /* of all spans, for one group */
    const kvl_cache *c = b->c;
    const kvli_gpu_shape *shape = &b->t->shape;
    for (uint32_t s = 0; s < c->step.n_spans; s++) {
        uint32_t n = c->step.spans[s].n_rows, packed = n * c->geo.gqa;
        bool few = packed <= shape->few && n <= KVLI_GPU_DRAFT_ROWS,
             more = shape->rows[KVLI_GPU_DECODE_MORE] && packed > shape->rows[KVLI_GPU_DECODE];
        uint32_t sort = !few && shape->rows[KVLI_GPU_PREFILL] ? KVLI_GPU_PREFILL
                        : more                                ? KVLI_GPU_DECODE_MORE
                                                              : KVLI_GPU_DECODE;
        uint32_t most = shape->rows[sort];
        uint32_t parts =
            few || packed <= most ? kvli_min_u32(KVLI_GPU_PARTS, KVLI_GPU_PART_ROWS / packed) : 1;
        for (uint32_t row = 0; row < packed; row += most)
            kvli_gpu_tile(b, s, row, kvli_min_u32(most, packed - row), sort, parts);
    }
    kvli_gpu_pass_end(b);
}

/* Sizes of all arrays and where they stand; into the key what launches depend on. */
static uint32_t kvli_gpu_array(uint32_t *used, uint32_t n, uint32_t size, uint64_t *key) {
    uint32_t at = (*used + 127) & ~127u;
    *used = at + n * size;
    *key = kvli_mix(*key, n);
    return at;
}

static uint64_t kvli_gpu_lay_out(kvl_cache *c, kvli_gpu_builder *b) {
    kvli_gpu_tables *t = b->t;
    const kvli_step_state *st = &c->step;
    uint32_t used = t->max_spans * (uint32_t)sizeof(uint32_t);
    uint64_t key = kvli_mix(t->mapped, kvli_gpu_pad(st->n_rows));
    for (b->group = 0; b->group < c->geo.n_groups; b->group++) {
        kvli_gpu_group *g = &t->groups[b->group];
        g->first_pass = b->pass;
        kvli_gpu_items(b);
        g->n_passes = b->pass - g->first_pass;
        g->n_stores = 0;
        for (uint32_t s = 0; s < st->n_spans; s++)
            g->n_stores += st->attend[(size_t)b->group * c->max_spans + s].blocks.n_own;
        g->padded_stores = kvli_gpu_pad(g->n_stores);
        g->counts = kvli_gpu_array(&used, 2 * g->n_passes, sizeof(kvli_gpu_counts), &key);
        g->spans = kvli_gpu_array(&used, kvli_gpu_pad(st->n_spans), sizeof(kvli_gpu_span), &key);
        g->stores = kvli_gpu_array(&used, g->padded_stores, sizeof(kvli_gpu_store), &key);
        for (uint32_t p = g->first_pass; p < b->pass; p++)
            for (uint32_t k = 0; k < KVLI_GPU_SORTS; k++) {
                kvli_gpu_pass *pass = &t->passes[p];
                pass->padded[k] = kvli_gpu_pad(pass->n[k]);
                pass->at[k] = kvli_gpu_array(&used, pass->padded[k], sizeof(kvli_gpu_item), &key);
            }
    }
    t->used = (used + 127) & ~127u;
    return key;
}

static uint64_t kvli_gpu_entry_of(const kvl_cache *c, uint32_t entry) {
    if (entry == KVL_NONE) return 0;
    uint32_t id = entry & KVL_ENTRY_ID;
    if (entry & KVL_ENTRY_SCRATCH)
        return (c->scratch + (uint64_t)id * c->scratch_slot) | KVLI_GPU_EXACT | KVLI_GPU_SCRATCH;
    return c->address[id] | (entry & KVL_ENTRY_EXACT ? KVLI_GPU_EXACT : 0);
}

/* A span's entries, from *n on; what is before a window (and no sink) is left out. */
static kvli_gpu_span kvli_gpu_put_span(const kvl_cache *c, uint32_t group, const kvli_attend_span *span,
                                       uint64_t *entries, uint32_t *n) {
    const kvl_span_blocks *b = &span->blocks;
    uint32_t window = c->groups[group].window, from = 0;
    if (window && !c->groups[group].sink_tokens && span->position + 1 > window)
        from = (span->position + 1 - window) / c->geo.block_tokens;
    kvli_gpu_span out = {span->first_row, span->n_rows, span->position, *n - from, b->first_own, 0};
    for (uint32_t j = from; j + 1 < b->n_blocks; j++) entries[(*n)++] = kvli_gpu_entry_of(c, b->table[j]);
    out.own = *n;
    for (uint32_t i = 0; i < b->n_own; i++) entries[(*n)++] = kvli_gpu_entry_of(c, b->own[i]);
    return out;
}

static void kvli_gpu_put_stores(const kvl_cache *c, const kvli_attend_span *span, uint32_t s,
                                kvli_gpu_store *stores, uint32_t *seals, uint32_t *others) {
    const kvl_span_blocks *b = &span->blocks;
    uint32_t T = c->geo.block_tokens, end = span->position + span->n_rows;
    for (uint32_t i = 0; i < b->n_own; i++) {
        uint32_t start = (b->first_own + i) * T, from = kvli_max_u32(start, span->position), own = b->own[i],
                 target = b->table[b->first_own + i];
        kvli_gpu_store out = {
            kvli_gpu_entry_of(c, own), target != own ? kvli_gpu_entry_of(c, target) : 0, s, 0, 0, 0};
        out.row = span->first_row + (from - span->position);
        out.n_rows = kvli_min_u32(start + T, end) - from;
        out.at = from - start;
        stores[out.sealed ? (*seals)++ : --*others] = out; /* those that are sealed first */
    }
}

static void kvli_gpu_put_counts(const kvli_gpu_tables *t, const kvli_gpu_group *g, uint8_t *to) {
    kvli_gpu_counts *counts = (kvli_gpu_counts *)(void *)(to + g->counts);
    memset(counts, 0, 2 * g->n_passes * sizeof *counts);
    counts->stores = g->n_stores;
    for (uint32_t p = 0; p < g->n_passes; p++) {
        const kvli_gpu_pass *pass = &t->passes[g->first_pass + p];
        counts[2 * p].decodes = pass->n[KVLI_GPU_DECODE];
        counts[2 * p].prefills = pass->n[KVLI_GPU_PREFILL];
        counts[2 * p].merges = pass->n[KVLI_GPU_MERGE];
        counts[2 * p + 1].decodes = pass->n[KVLI_GPU_DECODE_MORE];
    }
}

/* The tables of the step, the graph_key with them. */
static void kvli_gpu_build(kvl_cache *c, kvli_gpu_tables *t, uint8_t *to) {
    const kvli_step_state *st = &c->step;
    kvli_gpu_builder b;
    memset(&b, 0, sizeof b);
    b.c = c;
    b.t = t;
    c->step.view->graph_key = kvli_gpu_lay_out(c, &b);
    c->step.view->n_padded = kvli_min_u32(kvli_gpu_pad(st->n_rows), c->desc.max_step_tokens);
    b.to = to;
    b.pass = 0;
    memset(to, 0, t->max_spans * sizeof(uint32_t));
    uint64_t *entries = (uint64_t *)(void *)(to + t->used);
    uint32_t n = 0;
    t->entries = t->used;
    for (b.group = 0; b.group < c->geo.n_groups; b.group++) {
        kvli_gpu_group *g = &t->groups[b.group];
        uint32_t others = g->n_stores;
        g->n_seals = 0;
        kvli_gpu_put_counts(t, g, to);
        for (uint32_t s = 0; s < st->n_spans; s++) {
            const kvli_attend_span *span = &st->attend[(size_t)b.group * c->max_spans + s];
            ((kvli_gpu_span *)(void *)(to + g->spans))[s] = kvli_gpu_put_span(c, b.group, span, entries, &n);
            kvli_gpu_put_stores(c, span, s, (kvli_gpu_store *)(void *)(to + g->stores), &g->n_seals, &others);
        }
        kvli_gpu_items(&b);
    }
    t->copies = (t->entries + n * (uint32_t)sizeof *entries + 15) & ~15u;
    kvli_gpu_copy *list = (kvli_gpu_copy *)(void *)(to + t->copies);
    for (uint32_t i = 0; i < st->n_copies; i++) {
        const kvl_copy *copy = &st->copies[i];
        list[i].dst = c->address[copy->dst & KVL_ENTRY_ID];
        list[i].src = c->address[copy->src & KVL_ENTRY_ID];
        list[i].bytes = c->groups[copy->group].bytes[KVLI_EXACT];
    }
    t->used = t->copies + st->n_copies * (uint32_t)sizeof *list;
}

/* ---- tensors in host memory ---- */
static size_t kvli_gpu_dtype_size(kvl_dtype d) { return d == KVL_DTYPE_F32 ? 4 : 2; }

/* Rows of a tensor, one after the other, to or from `at`. */
static void kvli_gpu_pack(const kvl_tensor *t, uint32_t rows, uint32_t heads, uint32_t dim, uint8_t *at,
                          bool from) {
    size_t size = kvli_gpu_dtype_size(t->dtype), n = dim * size;
    bool whole = t->head_stride == dim;
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t h = 0; h < (whole ? 1 : heads); h++) {
            uint8_t *there = (uint8_t *)t->data + (r * t->row_stride + h * t->head_stride) * size;
            size_t bytes = whole ? n * heads : n;
            memcpy(from ? there : at, from ? at : there, bytes);
            at += bytes;
        }
}

/* The same tensor packed at `base` + *used, where its bytes are taken. */
static kvl_tensor kvli_gpu_stage(const kvl_cache *c, const kvl_tensor *t, uint32_t heads, uint32_t dim,
                                 uint64_t base, size_t *used) {
    kvl_tensor out = *t;
    out.data = (void *)(uintptr_t)(base + *used);
    out.head_stride = dim;
    out.row_stride = (size_t)heads * dim;
    *used += kvli_gpu_align((size_t)c->step.n_rows * heads * dim * kvli_gpu_dtype_size(t->dtype));
    return out;
}
#endif

/* ==== >>cuda: NVIDIA GPUs, through the driver alone ====
   A step's tables are uploaded once, when it is planned. A layer's call then only launches kernels on them: store,
   decode and prefill, merge. Everything a launch depends on is fixed but for counts, which stand in device memory, so
   that a captured graph may be replayed for another step with the same graph_key. */
#if KVLI_CUDA
#if defined(_WIN32)
#define KVLI_CU_CALL __stdcall
#else
#define KVLI_CU_CALL
#endif

/* ---- the driver (its API: docs.nvidia.com/cuda/cuda-driver-api), with prototypes of our own ---- */
typedef unsigned long long kvli_cu_ptr;
typedef struct kvli_cu_location { /* CUmemLocation */
    int type, id;
} kvli_cu_location;
typedef struct kvli_cu_memory { /* CUmemAllocationProp */
    int type, handle_types;
    kvli_cu_location location;
    void *win32;
    unsigned char flags[8];
} kvli_cu_memory;
typedef struct kvli_cu_access { /* CUmemAccessDesc */
    kvli_cu_location location;
    int flags;
} kvli_cu_access;

/* clang-format off */
#define KVLI_CU_DRIVER(X)                                                                             \
    X(init, "cuInit", (unsigned flags))                                                               \
    X(driver_version, "cuDriverGetVersion", (int *version))                                           \
    X(error_name, "cuGetErrorName", (int error, const char **text))                                   \
    X(error_text, "cuGetErrorString", (int error, const char **text))                                 \
    X(device_count, "cuDeviceGetCount", (int *count))                                                 \
    X(device_get, "cuDeviceGet", (int *device, int ordinal))                                          \
    X(device_name, "cuDeviceGetName", (char *name, int size, int device))                             \
    X(device_attribute, "cuDeviceGetAttribute", (int *value, int attribute, int device))              \
    X(primary_retain, "cuDevicePrimaryCtxRetain", (void **context, int device))                       \
    X(primary_release, "cuDevicePrimaryCtxRelease_v2", (int device))                                  \
    X(primary_reset, "cuDevicePrimaryCtxReset_v2", (int device))                                      \
    X(context_push, "cuCtxPushCurrent_v2", (void *context))                                           \
    X(context_pop, "cuCtxPopCurrent_v2", (void **context))                                            \
    X(context_device, "cuCtxGetDevice", (int *device))                                                \
    X(module_load, "cuModuleLoadData", (void **module, const void *image))                            \
    X(module_unload, "cuModuleUnload", (void *module))                                                \
    X(module_function, "cuModuleGetFunction", (void **function, void *module, const char *name))      \
    X(function_set, "cuFuncSetAttribute", (void *function, int attribute, int value))                 \
    X(stream_create, "cuStreamCreate", (void **stream, unsigned flags))                               \
    X(stream_destroy, "cuStreamDestroy_v2", (void *stream))                                           \
    X(stream_wait, "cuStreamSynchronize", (void *stream))                                             \
    X(event_create, "cuEventCreate", (void **event, unsigned flags))                                  \
    X(event_destroy, "cuEventDestroy_v2", (void *event))                                              \
    X(event_record, "cuEventRecord", (void *event, void *stream))                                     \
    X(event_wait, "cuEventSynchronize", (void *event))                                                \
    X(alloc, "cuMemAlloc_v2", (kvli_cu_ptr *address, size_t bytes))                                   \
    X(free, "cuMemFree_v2", (kvli_cu_ptr address))                                                    \
    X(host_alloc, "cuMemHostAlloc", (void **at, size_t bytes, unsigned flags))                        \
    X(host_free, "cuMemFreeHost", (void *at))                                                         \
    X(upload, "cuMemcpyHtoDAsync_v2", (kvli_cu_ptr to, const void *from, size_t bytes, void *stream)) \
    X(download, "cuMemcpyDtoHAsync_v2", (void *to, kvli_cu_ptr from, size_t bytes, void *stream))     \
    X(copy, "cuMemcpyDtoDAsync_v2", (kvli_cu_ptr to, kvli_cu_ptr from, size_t bytes, void *stream))   \
    X(fill, "cuMemsetD8Async", (kvli_cu_ptr to, unsigned char value, size_t bytes, void *stream))     \
    X(launch, "cuLaunchKernel",                                                                       \
      (void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,           \
       unsigned block_y, unsigned block_z, unsigned shared, void *stream, void **args, void **extra))
/* Virtual memory: may be missing. */
#define KVLI_CU_VIRTUAL(X)                                                                            \
    X(reserve, "cuMemAddressReserve",                                                                 \
      (kvli_cu_ptr *address, size_t bytes, size_t alignment, kvli_cu_ptr hint, unsigned long long flags)) \
    X(unreserve, "cuMemAddressFree", (kvli_cu_ptr address, size_t bytes))                             \
    X(granularity, "cuMemGetAllocationGranularity", (size_t *bytes, const kvli_cu_memory *memory, int option)) \
    X(create, "cuMemCreate",                                                                          \
      (unsigned long long *handle, size_t bytes, const kvli_cu_memory *memory, unsigned long long flags)) \
    X(release, "cuMemRelease", (unsigned long long handle))                                           \
    X(map, "cuMemMap",                                                                                \
      (kvli_cu_ptr address, size_t bytes, size_t offset, unsigned long long handle, unsigned long long flags)) \
    X(unmap, "cuMemUnmap", (kvli_cu_ptr address, size_t bytes))                                       \
    X(set_access, "cuMemSetAccess", (kvli_cu_ptr address, size_t bytes, const kvli_cu_access *access, size_t n))
/* clang-format on */

typedef struct kvli_cu_driver {
#define KVLI_CU_MEMBER_(name, symbol, args) int(KVLI_CU_CALL * name) args;
    KVLI_CU_DRIVER(KVLI_CU_MEMBER_)
    KVLI_CU_VIRTUAL(KVLI_CU_MEMBER_)
#undef KVLI_CU_MEMBER_
} kvli_cu_driver;

enum { /* of CUresult */
       KVLI_CU_OUT_OF_MEMORY = 2,
       KVLI_CU_STUB = 34,
       KVLI_CU_NO_DEVICE = 100,
       KVLI_CU_NO_BINARY = 209,
       KVLI_CU_BAD_PTX = 218,
       KVLI_CU_NEW_PTX = 222,
       KVLI_CU_NOT_FOUND = 500,
       KVLI_CU_NOT_SUPPORTED = 801,
       KVLI_CU_DRIVER_MISMATCH = 803,
       KVLI_CU_CAPTURE_FIRST = 900,
       KVLI_CU_CAPTURE_LAST = 908
};
enum { /* of CUdevice_attribute, CUfunction_attribute, flags */
       KVLI_CU_ATTRIBUTE_MAJOR = 75,
       KVLI_CU_ATTRIBUTE_MINOR = 76,
       KVLI_CU_ATTRIBUTE_SM_SHARED = 81,
       KVLI_CU_ATTRIBUTE_BLOCK_SHARED = 97,
       KVLI_CU_ATTRIBUTE_VIRTUAL = 102,
       KVLI_CU_FUNCTION_SHARED = 8,
       KVLI_CU_EVENT_NO_TIMING = 2,
       KVLI_CU_READ_WRITE = 3
};
enum { KVLI_CU_RING = 3 }; /* uploads that may be under way */

/* The device, of a context. */
struct kvli_cu {
    void *library;
    kvli_cu_driver fn;
    int device;
    void *context, *stream; /* stream: lent, or null */
    /* renewed: another context was lent; started: cuInit was, so that the library has threads and stays */
    bool lent, renewed, retained, started, lost, virtual_memory;
    void *module;
    uint8_t *image;
    size_t image_bytes;
    uint32_t generation; /* grows when the device is stopped or started: what was on it is gone */
    int major, minor, block_shared, sm_shared;
    size_t granularity;
};

/* A pair of formats' functions. */
typedef struct kvli_cu_kernels {
    void *decode[2], *prefill; /* for 8 and for 16 rows; or decode[0] is kvl_plain */
    uint32_t decode_shared[2], prefill_shared, stages;
} kvli_cu_kernels;

/* A cache's part of it. The tables are built in pinned memory and have the same offsets on the device. */
typedef struct kvli_cu_cache {
    uint32_t generation; /* of the device when it was started */
    void *stream;
    bool own_stream, spoilt; /* spoilt: a copy of blocks failed, so that its KV is gone */
    void *event[KVLI_CU_RING];
    uint8_t *pinned; /* [KVLI_CU_RING][tables_bytes], [staging_bytes], [max_spans] taint */
    uint32_t turn;   /* in the ring */
    kvli_cu_ptr reserved;
    size_t reserved_bytes;
    void *store, *copy, *merge;
    kvli_cu_kernels kernels[16]; /* by preset */
    uint8_t *layer_kernels;      /* [n_layers] */
    kvli_gpu_tables tables;
    size_t tables_bytes, staging_bytes;
    size_t partial_o, partial_ml, staging, sinks; /* where in the workspace; the tables are at its start */
} kvli_cu_cache;

static kvli_cu_cache *kvli_cu_of(const kvl_cache *c) { return (kvli_cu_cache *)c->backend_state; }

/* ---- errors ---- */
static kvl_result kvli_cu_fail(kvl_context *ctx, kvli_text text, int e, const char *call) {
    const char *name = "", *meaning = "";
    struct kvli_cu *cu = ctx->cu;
    if (cu->fn.error_name(e, &name) || !name) name = "an unknown error";
    if (cu->fn.error_text(e, &meaning) || !meaning) meaning = "";
    ctx->native = e;
    snprintf(ctx->native_text, sizeof ctx->native_text, "%s: %s (%d): %s", call, name, e, meaning);
    kvl_result r = e == KVLI_CU_OUT_OF_MEMORY                                ? KVL_OUT_OF_DEVICE_MEMORY
                   : e == KVLI_CU_NOT_SUPPORTED                              ? KVL_UNSUPPORTED
                   : e >= KVLI_CU_CAPTURE_FIRST && e <= KVLI_CU_CAPTURE_LAST ? KVL_INVALID_ARG
                                                                             : KVL_DEVICE_LOST;
    cu->lost = cu->lost || r == KVL_DEVICE_LOST;
    return kvli_fail(ctx, text, r, "%s", ctx->native_text);
}
static kvl_result kvli_cu_ok(kvl_cache *c, int e, const char *call) {
    return e ? kvli_cu_fail(c->ctx, kvli_err(c), e, call) : KVL_OK;
}

static kvl_result kvli_cu_check(kvl_cache *c) {
    const struct kvli_cu *cu = c->ctx->cu;
    if (cu->lost) return KVLI_ERROR(c, KVL_DEVICE_LOST, "the device is lost (%s)", c->ctx->native_text);
    if (cu->generation != kvli_cu_of(c)->generation)
        return KVLI_ERROR(c, KVL_DEVICE_LOST, "the device was started again: the KV of this cache is gone");
    if (kvli_cu_of(c)->spoilt)
        return KVLI_ERROR(c, KVL_DEVICE_LOST, "a copy of blocks failed: the KV of this cache is gone");
    return KVL_OK;
}

/* Makes the device's context current until kvli_cu_leave: the app's own comes back then. */
static kvl_result kvli_cu_enter(kvl_cache *c) {
    kvl_result r = kvli_cu_check(c);
    return r == KVL_OK ? kvli_cu_ok(c, c->ctx->cu->fn.context_push(c->ctx->cu->context), "cuCtxPushCurrent")
                       : r;
}
static void kvli_cu_leave(const kvl_context *ctx) {
    void *old;
    ctx->cu->fn.context_pop(&old);
}

/* ---- open: library, device, context, module ---- */
static void *kvli_cu_library(void) {
#if defined(_WIN32)
    return kvli_gpu_library("nvcuda.dll");
#else
    void *library = kvli_gpu_library("libcuda.so.1");
    return library ? library : kvli_gpu_library("libcuda.so");
#endif
}

static kvl_result kvli_cu_load(kvl_context *ctx, kvli_text why) {
    struct kvli_cu *cu = ctx->cu;
    bool ok;
    cu->library = kvli_cu_library();
    if (!cu->library) return kvli_fail(NULL, why, KVL_NO_BACKEND, "no driver: libcuda is not there");
#define KVLI_CU_LOAD_(name, symbol, args)                    \
    ok = kvli_gpu_symbol(cu->library, symbol, &cu->fn.name); \
    if (!ok) return kvli_fail(NULL, why, KVL_NO_BACKEND, "the driver is too old: no %s", symbol);
    KVLI_CU_DRIVER(KVLI_CU_LOAD_)
#undef KVLI_CU_LOAD_
    cu->virtual_memory = true;
#define KVLI_CU_LOAD_(name, symbol, args)                    \
    ok = kvli_gpu_symbol(cu->library, symbol, &cu->fn.name); \
    cu->virtual_memory = cu->virtual_memory && ok;
    KVLI_CU_VIRTUAL(KVLI_CU_LOAD_)
#undef KVLI_CU_LOAD_
    return KVL_OK;
}

/* Why the driver will not do, with what it says. */
static kvl_result kvli_cu_refuse(kvl_context *ctx, kvli_text why, int e, const char *call) {
    const char *hint = e == KVLI_CU_STUB              ? "this libcuda is the toolkit's stub; "
                       : e == KVLI_CU_NO_DEVICE       ? "no GPU; "
                       : e == KVLI_CU_DRIVER_MISMATCH ? "the driver and its library are of two versions; "
                       : e == KVLI_CU_NO_BINARY || e == KVLI_CU_BAD_PTX || e == KVLI_CU_NEW_PTX
                           ? "the driver does not take the kernels; "
                           : "";
    kvli_cu_fail(ctx, kvli_text_at(NULL, 0), e, call);
    return kvli_fail(NULL, why, KVL_NO_BACKEND, "%s%s", hint, ctx->native_text);
}
/* In a function with ctx and why: leaves it where the driver fails. */
#define KVLI_CU_OPEN(name, symbol, args)                     \
    do {                                                     \
        int e_ = ctx->cu->fn.name args;                      \
        if (e_) return kvli_cu_refuse(ctx, why, e_, symbol); \
    } while (0)

static kvl_result kvli_cu_device(kvl_context *ctx, kvli_text why) {
    struct kvli_cu *cu = ctx->cu;
    int version = 0, count = 0, virtual_memory = 0;
    KVLI_CU_OPEN(init, "cuInit", (0));
    cu->started = true;
    KVLI_CU_OPEN(driver_version, "cuDriverGetVersion", (&version));
    if (version < kvli_cu_image_min_driver)
        return kvli_fail(NULL, why, KVL_NO_BACKEND, "the driver is for CUDA %d.%d, the kernels need %d.%d",
                         version / 1000, version % 1000 / 10, kvli_cu_image_min_driver / 1000,
                         kvli_cu_image_min_driver % 1000 / 10);
    if (cu->lent) {
        KVLI_CU_OPEN(context_push, "cuCtxPushCurrent", (cu->context));
        int e = cu->fn.context_device(&cu->device);
        kvli_cu_leave(ctx);
        if (e) return kvli_cu_refuse(ctx, why, e, "cuCtxGetDevice");
    } else {
        KVLI_CU_OPEN(device_count, "cuDeviceGetCount", (&count));
        if (ctx->desc.cuda_device >= (uint32_t)count)
            return kvli_fail(NULL, why, KVL_NO_BACKEND, "cuda_device: %u of %d", ctx->desc.cuda_device,
                             count);
        KVLI_CU_OPEN(device_get, "cuDeviceGet", (&cu->device, (int)ctx->desc.cuda_device));
    }
    KVLI_CU_OPEN(device_attribute, "cuDeviceGetAttribute", (&cu->major, KVLI_CU_ATTRIBUTE_MAJOR, cu->device));
    KVLI_CU_OPEN(device_attribute, "cuDeviceGetAttribute", (&cu->minor, KVLI_CU_ATTRIBUTE_MINOR, cu->device));
    if (cu->major * 10 + cu->minor < 75)
        return kvli_fail(NULL, why, KVL_NO_BACKEND, "the GPU is of compute capability %d.%d, 7.5 is needed",
                         cu->major, cu->minor);
    KVLI_CU_OPEN(device_attribute, "cuDeviceGetAttribute",
                 (&cu->block_shared, KVLI_CU_ATTRIBUTE_BLOCK_SHARED, cu->device));
    KVLI_CU_OPEN(device_attribute, "cuDeviceGetAttribute",
                 (&cu->sm_shared, KVLI_CU_ATTRIBUTE_SM_SHARED, cu->device));
    KVLI_CU_OPEN(device_attribute, "cuDeviceGetAttribute",
                 (&virtual_memory, KVLI_CU_ATTRIBUTE_VIRTUAL, cu->device));
    cu->virtual_memory = cu->virtual_memory && virtual_memory;
    return KVL_OK;
}

static kvli_cu_memory kvli_cu_memory_of(const struct kvli_cu *cu) {
    kvli_cu_memory m;
    memset(&m, 0, sizeof m);
    m.type = m.location.type = 1; /* pinned, on a device */
    m.location.id = cu->device;
    return m;
}

/* The context and what is loaded into it; also when the device is started again. */
static kvl_result kvli_cu_start_device(kvl_context *ctx, kvli_text why) {
    struct kvli_cu *cu = ctx->cu;
    kvli_cu_memory memory = kvli_cu_memory_of(cu);
    if (!cu->lent) {
        KVLI_CU_OPEN(primary_retain, "cuDevicePrimaryCtxRetain", (&cu->context, cu->device));
        cu->retained = true;
    }
    cu->granularity = 1;
    if (cu->virtual_memory)
        KVLI_CU_OPEN(granularity, "cuMemGetAllocationGranularity", (&cu->granularity, &memory, 0));
    KVLI_CU_OPEN(context_push, "cuCtxPushCurrent", (cu->context));
    int e = cu->fn.module_load(&cu->module, cu->image);
    kvli_cu_leave(ctx);
    if (e) cu->module = NULL;
    if (e) return kvli_cu_refuse(ctx, why, e, "cuModuleLoadData");
    cu->lost = cu->renewed = false;
    cu->generation++;
    return KVL_OK;
}

static void kvli_cu_stop_device(kvl_context *ctx,
                                bool reset) { /* the device may be lost: nothing is asked of it */
    struct kvli_cu *cu = ctx->cu;
    if (cu->module && !cu->fn.context_push(cu->context)) {
        cu->fn.module_unload(cu->module);
        kvli_cu_leave(ctx);
    }
    cu->module = NULL;
    if (cu->retained) cu->fn.primary_release(cu->device);
    if (cu->retained && reset) cu->fn.primary_reset(cu->device);
    cu->retained = false;
    cu->generation++;
}

/* The kernels for this device out of the generated header. */
static kvl_result kvli_cu_take_image(kvl_context *ctx, kvli_text why) {
    struct kvli_cu *cu = ctx->cu;
    const uint32_t n = sizeof kvli_cu_parts / sizeof kvli_cu_parts[0],
                   arch = (uint32_t)(cu->major * 10 + cu->minor);
    const kvli_cu_part *part = kvli_cu_find_part(kvli_cu_parts, n, arch);
    if (!part)
        return kvli_fail(NULL, why, KVL_NO_BACKEND, "there are no kernels for compute capability %d.%d",
                         cu->major, cu->minor);
    size_t scratch = KVLI_CU_UNPACK_PROBS * sizeof(uint16_t), stream = (size_t)part->before + part->raw_bytes;
    uint16_t *probs = (uint16_t *)kvli_alloc(ctx, scratch);
    uint8_t *all = (uint8_t *)kvli_alloc(ctx, stream);
    cu->image = (uint8_t *)kvli_alloc(ctx, part->raw_bytes);
    cu->image_bytes = part->raw_bytes;
    bool fits = probs && all && cu->image,
         whole = fits && kvli_cu_unpack_part(kvli_cu_image, part, all, probs);
    if (whole) memcpy(cu->image, all + part->before, part->raw_bytes);
    kvli_free(ctx, all, stream);
    kvli_free(ctx, probs, scratch);
    if (!fits) return kvli_fail(NULL, why, KVL_OUT_OF_HOST_MEMORY, "the allocator returned null");
    return whole ? KVL_OK : kvli_fail(NULL, why, KVL_NO_BACKEND, "the kernels' header is damaged");
}

static void kvli_cu_close(kvl_context *ctx) {
    struct kvli_cu *cu = ctx->cu;
    if (!cu) return;
    if (cu->library) kvli_cu_stop_device(ctx, false);
    if (cu->library && !cu->started) kvli_gpu_unload(cu->library);
    kvli_free(ctx, cu->image, cu->image_bytes);
    kvli_free(ctx, cu, sizeof *cu);
    ctx->cu = NULL;
}

static kvl_result kvli_cu_open(kvl_context *ctx, kvli_text why) {
    struct kvli_cu *cu = (struct kvli_cu *)kvli_alloc(ctx, sizeof *cu);
    char name[64] = "";
    if (cu) memset(cu, 0, sizeof *cu);
    ctx->cu = cu;
    if (!cu) return kvli_fail(NULL, why, KVL_OUT_OF_HOST_MEMORY, "the allocator returned null");
    cu->context = ctx->desc.cuda_context;
    cu->stream = ctx->desc.cuda_stream;
    cu->lent = cu->context != NULL;
    kvl_result r = kvli_cu_load(ctx, why);
    if (r == KVL_OK) r = kvli_cu_device(ctx, why);
    if (r == KVL_OK) r = kvli_cu_take_image(ctx, why);
    if (r == KVL_OK) r = kvli_cu_start_device(ctx, why);
    if (r != KVL_OK) return r;
    KVLI_CU_OPEN(device_name, "cuDeviceGetName", (name, (int)sizeof name, cu->device));
    snprintf(ctx->name, sizeof ctx->name, "cuda (%s, sm_%d%d)", name, cu->major, cu->minor);
    return KVL_OK;
}

/* ---- what a cache needs ---- */
static bool kvli_cu_supports(kvl_format f, bool is_key, uint32_t tokens, uint32_t dim, const char **why) {
    static const uint32_t dims[] = {64, 80, 96, 128, 192, 256};
    bool known = false;
    for (size_t i = 0; i < sizeof dims / sizeof *dims; i++) known = known || dims[i] == dim;
    if (!known)
        *why =
            is_key ? "k_dim is not 64, 80, 96, 128, 192 or 256" : "v_dim is not 64, 80, 96, 128, 192 or 256";
    if (tokens < 16) *why = "block_tokens is below 16";
    return known && tokens >= 16 && kvli_side_supported(f, is_key, tokens, dim, why);
}

static bool kvli_cu_is_plain(const kvl_cache *c) { /* all its layers, since they share the exact format */
    return c->geo.exact == KVL_F32 || (c->geo.exact == KVL_BF16 && c->ctx->cu->major < 8);
}

static kvli_gpu_shape kvli_cu_shape(const kvl_cache *c) {
    uint32_t decode = kvli_cu_decode_rows(c->geo.k_dim);
    kvli_gpu_shape normal = {{8, decode > 8 ? decode : 0, kvli_cu_prefill_rows(c->geo.k_dim)}, decode},
                   plain = {{KVLI_CU_PLAIN_ROWS, 0, 0}, decode};
    return kvli_cu_is_plain(c) ? plain : normal;
}

static kvli_gpu_sizes kvli_cu_size(const kvl_cache *c) {
    kvli_gpu_shape shape = kvli_cu_shape(c);
    return kvli_gpu_size(c, &shape);
}

static size_t kvli_cu_sinks(const kvl_cache *c) { /* bytes */
    for (uint32_t l = 0; l < c->geo.n_layers; l++)
        if (c->geo.layers[l].sink_logits) return (size_t)c->geo.n_layers * c->geo.n_q_heads * sizeof(float);
    return 0;
}

static kvl_result kvli_cu_plan(kvl_cache *c) {
    const struct kvli_cu *cu = c->ctx->cu;
    kvl_result r = kvli_gpu_geometry(c);
    if (r != KVL_OK) return r;
    if (!c->desc.slab_granularity) c->desc.slab_granularity = cu->granularity;
    kvli_gpu_sizes z = kvli_cu_size(c);
    uint64_t bytes = z.tables + z.partial_o + z.partial_ml + z.staging + kvli_cu_sinks(c) + 5 * 256;
    if (z.tables > UINT32_MAX / 2 || bytes > SIZE_MAX / 4) return kvli_gpu_too_large(c, z.tables);
    uint64_t fixed = bytes + c->scratch_bytes, unit = cu->granularity;
    if (fixed >= unit) bytes += (unit - fixed % unit) % unit; /* as the driver rounds it */
    c->workspace_bytes = (size_t)bytes;
    c->pinned_bytes = (size_t)(KVLI_CU_RING * z.tables + z.staging + z.spans * sizeof(uint32_t));
    c->backend_bytes = sizeof(kvli_cu_cache) + c->geo.n_layers + kvli_gpu_passes_bytes(c, &z) + 64;
    return KVL_OK;
}

/* ---- start: stream, pinned memory, functions ---- */
static kvl_result kvli_cu_function(kvl_cache *c, const char *name, uint32_t shared, void **out) {
    struct kvli_cu *cu = c->ctx->cu;
    if (shared > (uint32_t)cu->block_shared)
        return KVLI_ERROR(c, KVL_UNSUPPORTED, "%s takes %u bytes of shared memory, this GPU has %d", name,
                          shared, cu->block_shared);
    int e = cu->fn.module_function(out, cu->module, name);
    if (e == KVLI_CU_NOT_FOUND) /* PTX for later GPUs has the commonest head dims alone */
        return KVLI_ERROR(c, KVL_UNSUPPORTED, "k_dim: the kernels have no %s for compute capability %d.%d",
                          name, cu->major, cu->minor);
    kvl_result r = kvli_cu_ok(c, e, "cuModuleGetFunction");
    if (r == KVL_OK && shared)
        r = kvli_cu_ok(c, cu->fn.function_set(*out, KVLI_CU_FUNCTION_SHARED, (int)shared),
                       "cuFuncSetAttribute");
    return r;
}

/* Depth of a warp's ring of loads: as deep as two blocks of threads on an SM allow, else one. */
static uint32_t kvli_cu_stages(const struct kvli_cu *cu, kvl_format k, kvl_format v, uint32_t dim,
                               uint32_t n) {
    if (cu->major < 8) return 0;
    for (uint32_t stages = 4; stages > 1; stages--)
        if (2 * (kvli_cu_decode_smem(k, v, dim, stages, n) + 1024) <= (uint32_t)cu->sm_shared) return stages;
    for (uint32_t stages = 4; stages > 1; stages--)
        if (kvli_cu_decode_smem(k, v, dim, stages, n) <= (uint32_t)cu->block_shared) return stages;
    return 1;
}

static kvl_result kvli_cu_kernels_get(kvl_cache *c, const kvl_preset *p, kvli_cu_kernels *out) {
    uint32_t dim = c->geo.k_dim;
    kvl_format k = p->k & ~(kvl_format)KVL_ROTATED, v = p->v & ~(kvl_format)KVL_ROTATED;
    char name[64];
    kvl_result r = KVL_OK;
    const char *sort = strcmp(p->name, "int8+") == 0 ? "int8c" : p->name;
    if (kvli_cu_is_plain(c)) {
        out->decode_shared[0] = kvli_cu_plain_smem(dim);
        return kvli_cu_function(c, "kvl_plain", out->decode_shared[0], &out->decode[0]);
    }
    out->stages = kvli_cu_stages(c->ctx->cu, k, v, dim, 16);
    for (uint32_t i = 0; 8u << i <= kvli_cu_decode_rows(dim) && r == KVL_OK; i++) {
        out->decode_shared[i] = kvli_cu_decode_smem(k, v, dim, out->stages, 8 << i);
        snprintf(name, sizeof name, "kvl_decode_%s_d%u_n%u", sort, dim, 8u << i);
        r = kvli_cu_function(c, name, out->decode_shared[i], &out->decode[i]);
    }
    out->prefill_shared = kvli_cu_prefill_smem(dim);
    snprintf(name, sizeof name, "kvl_prefill_%s_d%u", sort, dim);
    return r == KVL_OK ? kvli_cu_function(c, name, out->prefill_shared, &out->prefill) : r;
}

static kvl_result kvli_cu_functions(kvl_cache *c) {
    kvli_cu_cache *cc = kvli_cu_of(c);
    uint32_t n;
    const kvl_preset *presets = kvl_presets(&n);
    kvl_result r = kvli_cu_function(c, "kvl_store", KVLI_CU_STORE_SMEM, &cc->store);
    if (r == KVL_OK) r = kvli_cu_function(c, "kvl_merge", 0, &cc->merge);
    if (r == KVL_OK) r = kvli_cu_function(c, "kvl_copy", 0, &cc->copy);
    memset(cc->kernels, 0, sizeof cc->kernels);
    for (uint32_t l = 0; l < c->geo.n_layers && r == KVL_OK; l++) {
        uint32_t i = cc->layer_kernels[l];
        if (!cc->kernels[i].decode[0]) r = kvli_cu_kernels_get(c, &presets[i], &cc->kernels[i]);
    }
    return r;
}

/* What start and recover do. */
static kvl_result kvli_cu_acquire(kvl_cache *c) {
    struct kvli_cu *cu = c->ctx->cu;
    kvli_cu_cache *cc = kvli_cu_of(c);
    void *pinned = NULL;
    cc->generation = cu->generation;
    cc->spoilt = false;
    kvl_result r = kvli_cu_enter(c);
    if (r != KVL_OK) return r;
    r = kvli_cu_functions(c);
    cc->stream = cu->stream;
    if (r == KVL_OK && !cc->stream) {
        r = kvli_cu_ok(c, cu->fn.stream_create(&cc->stream, 0), "cuStreamCreate");
        cc->own_stream = r == KVL_OK;
    }
    for (uint32_t i = 0; i < KVLI_CU_RING && r == KVL_OK; i++) {
        r = kvli_cu_ok(c, cu->fn.event_create(&cc->event[i], KVLI_CU_EVENT_NO_TIMING), "cuEventCreate");
        if (r != KVL_OK) cc->event[i] = NULL;
    }
    if (r == KVL_OK) {
        r = kvli_cu_ok(c, cu->fn.host_alloc(&pinned, c->pinned_bytes, 0), "cuMemHostAlloc");
        cc->pinned = r == KVL_OK ? (uint8_t *)pinned : NULL;
    }
    if (r == KVL_OK && cu->virtual_memory && c->slab_bytes % cu->granularity == 0) {
        size_t bytes = c->max_slabs * c->slab_bytes;
        r = kvli_cu_ok(c, cu->fn.reserve(&cc->reserved, bytes, 0, 0, 0), "cuMemAddressReserve");
        cc->reserved_bytes = r == KVL_OK ? bytes : 0;
    }
    kvli_cu_leave(c->ctx);
    return r;
}

/* Also of a device that is lost: what it says is not asked. What stood in a context that is gone is forgotten. */
static void kvli_cu_stop(kvl_cache *c) {
    struct kvli_cu *cu = c->ctx->cu;
    kvli_cu_cache *cc = kvli_cu_of(c);
    bool there = cc->generation == cu->generation && !cu->fn.context_push(cu->context);
    if (there && cc->stream) cu->fn.stream_wait(cc->stream);
    if (cc->reserved_bytes) cu->fn.unreserve(cc->reserved, cc->reserved_bytes);
    for (uint32_t i = 0; i < KVLI_CU_RING; i++) {
        if (there && cc->event[i]) cu->fn.event_destroy(cc->event[i]);
        cc->event[i] = NULL;
    }
    if (there && cc->pinned) cu->fn.host_free(cc->pinned);
    if (there && cc->own_stream) cu->fn.stream_destroy(cc->stream);
    if (there) kvli_cu_leave(c->ctx);
    cc->stream = cc->pinned = NULL;
    cc->own_stream = false;
    cc->reserved_bytes = 0;
}

static kvl_result kvli_cu_start(kvl_cache *c) {
    kvli_gpu_shape shape = kvli_cu_shape(c);
    kvli_gpu_sizes z = kvli_gpu_size(c, &shape);
    kvli_cu_cache *cc = kvli_cu_of(c);
    memset(cc, 0, c->backend_bytes);
    kvli_gpu_tables_init(&cc->tables, &shape, &z, cc + 1);
    cc->layer_kernels = (uint8_t *)(cc + 1) + kvli_gpu_passes_bytes(c, &z);
    for (uint32_t l = 0; l < c->geo.n_layers; l++) cc->layer_kernels[l] = (uint8_t)kvli_gpu_preset(c, l);
    cc->tables_bytes = (size_t)z.tables;
    cc->staging_bytes = (size_t)z.staging;
    cc->partial_o = cc->tables_bytes;
    cc->partial_ml = cc->partial_o + (size_t)z.partial_o;
    cc->staging = cc->partial_ml + (size_t)z.partial_ml;
    cc->sinks = kvli_cu_sinks(c) ? kvli_gpu_align(cc->staging + cc->staging_bytes) : 0;
    return kvli_cu_acquire(c);
}

static kvl_result kvli_cu_recover(kvl_cache *c) {
    struct kvli_cu *cu = c->ctx->cu;
    kvli_cu_stop(c);
    if (cu->lost && cu->lent && !cu->renewed) {
        cu->lost = false; /* if its context is dead, the next call says so */
    } else if (cu->lost) {
        kvli_cu_stop_device(c->ctx, true);
        if (kvli_cu_start_device(c->ctx, kvli_err(c)) != KVL_OK) {
            cu->lost = true;
            return KVL_DEVICE_LOST;
        }
    }
    kvl_result r = kvli_cu_acquire(c);
    if (r == KVL_OK) return r;
    kvli_cu_stop(c);
    kvli_cu_of(c)->generation = 0; /* not started */
    return r;
}

/* ---- memory ---- */
static kvl_result kvli_cu_map_virtual(kvl_cache *c, size_t bytes, kvli_cu_ptr at) {
    struct kvli_cu *cu = c->ctx->cu;
    kvli_cu_memory memory = kvli_cu_memory_of(cu);
    kvli_cu_access access;
    unsigned long long handle;
    access.location = memory.location;
    access.flags = KVLI_CU_READ_WRITE;
    kvl_result r = kvli_cu_ok(c, cu->fn.create(&handle, bytes, &memory, 0), "cuMemCreate");
    if (r != KVL_OK) return r;
    r = kvli_cu_ok(c, cu->fn.map(at, bytes, 0, handle, 0), "cuMemMap");
    cu->fn.release(handle); /* what is mapped stays */
    if (r != KVL_OK) return r;
    r = kvli_cu_ok(c, cu->fn.set_access(at, bytes, &access, 1), "cuMemSetAccess");
    if (r != KVL_OK) cu->fn.unmap(at, bytes);
    return r;
}

/* What of the workspace stays as it is. */
static kvl_result kvli_cu_fill_workspace(kvl_cache *c, size_t bytes, kvli_cu_ptr at) {
    struct kvli_cu *cu = c->ctx->cu;
    const kvli_cu_cache *cc = kvli_cu_of(c);
    kvli_cu_ptr sinks = at + c->scratch_bytes + cc->sinks;
    size_t n = c->geo.n_q_heads * sizeof(float);
    kvl_result r = KVL_OK;
    if (c->desc.poison) r = kvli_cu_ok(c, cu->fn.fill(at, 0xff, bytes, cc->stream), "cuMemsetD8Async");
    for (uint32_t l = 0; l < c->geo.n_layers && r == KVL_OK; l++)
        if (c->geo.layers[l].sink_logits)
            r = kvli_cu_ok(c, cu->fn.upload(sinks + l * n, c->geo.layers[l].sink_logits, n, cc->stream),
                           "cuMemcpyHtoDAsync");
    return r == KVL_OK ? kvli_cu_ok(c, cu->fn.stream_wait(cc->stream), "cuStreamSynchronize") : r;
}

static kvl_result kvli_cu_map(kvl_cache *c, uint32_t slab, size_t bytes, uint64_t *address) {
    struct kvli_cu *cu = c->ctx->cu;
    kvli_cu_cache *cc = kvli_cu_of(c);
    kvli_cu_ptr at = 0;
    kvl_result r = kvli_cu_enter(c);
    if (r != KVL_OK) return r;
    if (slab != KVL_NONE && cc->reserved_bytes) {
        at = cc->reserved + (kvli_cu_ptr)slab * c->slab_bytes;
        r = kvli_cu_map_virtual(c, bytes, at);
    } else {
        r = kvli_cu_ok(c, cu->fn.alloc(&at, bytes), "cuMemAlloc");
        if (r == KVL_OK && slab == KVL_NONE) {
            r = kvli_cu_fill_workspace(c, bytes, at);
            if (r != KVL_OK) cu->fn.stream_wait(cc->stream);
            if (r != KVL_OK) cu->fn.free(at);
        }
    }
    kvli_cu_leave(c->ctx);
    *address = r == KVL_OK ? at : 0;
    cc->tables.mapped++;
    return r;
}

static void kvli_cu_unmap(kvl_cache *c, uint32_t slab, size_t bytes, uint64_t address) {
    struct kvli_cu *cu = c->ctx->cu;
    kvli_cu_cache *cc = kvli_cu_of(c);
    bool is_virtual = slab != KVL_NONE && cc->reserved_bytes, there = cc->generation == cu->generation;
    bool pushed = there && !cu->fn.context_push(cu->context);
    cc->tables.mapped++;
    if (pushed) cu->fn.stream_wait(cc->stream); /* nobody may still be using it */
    if (is_virtual)
        cu->fn.unmap(address, bytes);
    else if (pushed)
        cu->fn.free(address);
    if (pushed) kvli_cu_leave(c->ctx);
}

static bool kvli_cu_is_lost(const kvl_cache *c) {
    return c->ctx->cu->lost || c->ctx->cu->generation != kvli_cu_of(c)->generation;
}

static kvl_result kvli_cu_move(kvl_cache *c, uint64_t dst, uint64_t src, size_t bytes) {
    if (kvli_cu_is_lost(c)) return KVL_DEVICE_LOST;
    kvl_result r = kvli_cu_enter(c);
    if (r == KVL_OK) {
        r = kvli_cu_ok(c, c->ctx->cu->fn.copy(dst, src, bytes, kvli_cu_of(c)->stream), "cuMemcpyDtoDAsync");
        kvli_cu_leave(c->ctx);
    }
    if (r != KVL_OK) c->ctx->cu->lost = kvli_cu_of(c)->spoilt = true; /* the caller cannot go back */
    return r;
}

static kvl_result kvli_cu_poison(kvl_cache *c, uint64_t address, size_t bytes) {
    if (kvli_cu_is_lost(c)) return KVL_DEVICE_LOST;
    kvl_result r = kvli_cu_enter(c);
    if (r != KVL_OK) return r;
    r = kvli_cu_ok(c, c->ctx->cu->fn.fill(address, 0xff, bytes, kvli_cu_of(c)->stream), "cuMemsetD8Async");
    kvli_cu_leave(c->ctx);
    return r;
}

/* ---- launches ---- */
static kvl_result kvli_cu_launch(kvl_cache *c, void *function, uint32_t x, uint32_t y, uint32_t z,
                                 uint32_t threads, uint32_t shared, void *args) {
    void *params[1];
    params[0] = args;
    return kvli_cu_ok(
        c,
        c->ctx->cu->fn.launch(function, x, y, z, threads, 1, 1, shared, kvli_cu_of(c)->stream, params, NULL),
        "cuLaunchKernel");
}

static kvl_result kvli_cu_step(kvl_cache *c) {
    struct kvli_cu *cu = c->ctx->cu;
    kvli_cu_cache *cc = kvli_cu_of(c);
    uint8_t *to = cc->pinned + cc->turn * cc->tables_bytes;
    kvl_result r = kvli_cu_enter(c);
    if (r != KVL_OK) return r;
    r = kvli_cu_ok(c, cu->fn.event_wait(cc->event[cc->turn]), "cuEventSynchronize");
    if (r == KVL_OK) {
        kvli_gpu_build(c, &cc->tables, to);
        r = kvli_cu_ok(c, cu->fn.upload(c->workspace, to, cc->tables.used, cc->stream), "cuMemcpyHtoDAsync");
    }
    if (r == KVL_OK) r = kvli_cu_ok(c, cu->fn.event_record(cc->event[cc->turn], cc->stream), "cuEventRecord");
    cc->turn = (cc->turn + 1) % KVLI_CU_RING;
    if (r == KVL_OK && c->step.n_copies) {
        kvli_cu_copy_args args;
        memset(&args, 0, sizeof args);
        args.copies = (const kvli_gpu_copy *)(uintptr_t)(c->workspace + cc->tables.copies);
        args.n_copies = c->step.n_copies;
        r = kvli_cu_launch(c, cc->copy, c->step.n_copies, 16, 1, KVLI_CU_COPY_THREADS, 0, &args);
    }
    kvli_cu_leave(c->ctx);
    return r;
}

/* An address in the workspace, as a kernel's struct has it. */
static const void *kvli_cu_at(const kvl_cache *c, size_t offset) {
    return (const void *)(uintptr_t)(c->workspace + offset);
}

static kvli_cu_tensor kvli_cu_tensor_of(const kvl_tensor *t) {
    kvli_cu_tensor out = {(uint64_t)(uintptr_t)t->data, t->row_stride, t->head_stride, (uint32_t)t->dtype, 0};
    return out;
}

static kvli_cu_pages kvli_cu_pages_of(const kvli_layer *l) {
    kvli_cu_pages p;
    for (int e = 0; e < 2; e++) {
        p.offset[e] = l->offset[e];
        p.head_stride[e] = l->head_stride[e];
        p.v_offset[e] = l->v_offset[e];
    }
    return p;
}

static kvl_result kvli_cu_store_rows(kvl_cache *c, const kvli_attend *a, const kvli_gpu_group *g) {
    const kvli_layer *l = a->layer;
    const kvli_side *k = &l->k[KVLI_PACKED], *v = &l->v[KVLI_PACKED];
    kvli_cu_store_args args;
    memset(&args, 0, sizeof args);
    args.counts = (const kvli_gpu_counts *)kvli_cu_at(c, g->counts);
    args.stores = (const kvli_gpu_store *)kvli_cu_at(c, g->stores);
    args.taint = (uint32_t *)kvli_cu_at(c, 0);
    args.k = kvli_cu_tensor_of(&a->k);
    args.v = kvli_cu_tensor_of(&a->v);
    args.pages = kvli_cu_pages_of(l);
    args.block_tokens = c->geo.block_tokens;
    args.k_dim = c->geo.k_dim;
    args.v_dim = c->geo.v_dim;
    args.exact = c->geo.exact;
    args.k_format = k->format;
    args.v_format = v->format;
    args.k_rotated = k->rotated;
    args.v_rotated = v->rotated;
    args.k_global = k->global;
    args.v_global = v->global;
    return kvli_cu_launch(c, kvli_cu_of(c)->store, g->padded_stores, c->geo.n_kv_heads, 2,
                          KVLI_CU_STORE_THREADS, KVLI_CU_STORE_SMEM, &args);
}

static kvli_cu_attend_args kvli_cu_args(kvl_cache *c, const kvli_attend *a, const kvli_gpu_group *g) {
    const kvli_cu_cache *cc = kvli_cu_of(c);
    const kvli_layer *l = a->layer;
    uint32_t layer = (uint32_t)(l - c->geo.layers);
    kvli_cu_attend_args args;
    memset(&args, 0, sizeof args);
    args.spans = (const kvli_gpu_span *)kvli_cu_at(c, g->spans);
    args.entries = (const uint64_t *)kvli_cu_at(c, cc->tables.entries);
    if (l->sink_logits)
        args.sink_logits =
            (const float *)kvli_cu_at(c, cc->sinks + (size_t)layer * c->geo.n_q_heads * sizeof(float));
    args.partial_o = (float *)kvli_cu_at(c, cc->partial_o);
    args.partial_ml = (float *)kvli_cu_at(c, cc->partial_ml);
    args.q = kvli_cu_tensor_of(&a->q);
    args.out = kvli_cu_tensor_of(&a->out);
    args.pages = kvli_cu_pages_of(l);
    args.block_tokens = c->geo.block_tokens;
    args.n_q_heads = c->geo.n_q_heads;
    args.n_kv_heads = c->geo.n_kv_heads;
    args.gqa = c->geo.gqa;
    args.dim = c->geo.k_dim;
    args.window = l->window;
    args.sink_tokens = l->sink_tokens;
    args.exact = c->geo.exact;
    args.stages = cc->kernels[cc->layer_kernels[layer]].stages;
    args.scale = l->scale;
    args.softcap = l->softcap;
    args.k_global = l->k[KVLI_PACKED].global;
    args.v_global = l->v[KVLI_PACKED].global;
    return args;
}

/* One sort of items of a pass. */
static kvl_result kvli_cu_run(kvl_cache *c, kvli_cu_attend_args *args, const kvli_cu_kernels *f,
                              const kvli_gpu_group *g, uint32_t p, uint32_t sort) {
    const kvli_cu_cache *cc = kvli_cu_of(c);
    const kvli_gpu_pass *pass = &cc->tables.passes[p];
    uint32_t second = sort == KVLI_GPU_DECODE_MORE, threads = 32 * KVLI_CU_DECODE_WARPS, shared;
    void *function;
    if (!pass->padded[sort]) return KVL_OK;
    args->counts = (const kvli_gpu_counts *)kvli_cu_at(c, g->counts) + 2 * (p - g->first_pass) + second;
    args->end_item = pass->padded[sort];
    if (sort == KVLI_GPU_MERGE)
        args->merges = (const kvli_gpu_merge *)kvli_cu_at(c, pass->at[sort]);
    else
        args->items = (const kvli_gpu_item *)kvli_cu_at(c, pass->at[sort]);
    if (sort == KVLI_GPU_MERGE) {
        function = cc->merge;
        threads = KVLI_CU_MERGE_THREADS;
        shared = 0;
    } else if (sort == KVLI_GPU_PREFILL) {
        function = f->prefill;
        threads = 32 * KVLI_CU_PREFILL_WARPS;
        shared = f->prefill_shared;
    } else {
        function = f->decode[second];
        if (kvli_cu_is_plain(c)) threads = KVLI_CU_PLAIN_THREADS;
        shared = f->decode_shared[second];
    }
    return kvli_cu_launch(c, function, pass->padded[sort], c->geo.n_kv_heads, 1, threads, shared, args);
}

static kvl_result kvli_cu_layer(kvl_cache *c, const kvli_attend *a) { /* tensors in device memory */
    const kvli_cu_cache *cc = kvli_cu_of(c);
    const kvli_gpu_group *g = &cc->tables.groups[a->layer->group];
    const kvli_cu_kernels *f = &cc->kernels[cc->layer_kernels[a->layer - c->geo.layers]];
    kvl_result r = kvli_cu_store_rows(c, a, g);
    kvli_cu_attend_args args = kvli_cu_args(c, a, g);
    for (uint32_t p = g->first_pass; p < g->first_pass + g->n_passes; p++)
        for (uint32_t sort = 0; sort < KVLI_GPU_SORTS && r == KVL_OK; sort++)
            r = kvli_cu_run(c, &args, f, g, p, sort);
    return r;
}

/* ---- tensors in host memory ---- */
static kvl_result kvli_cu_host_layer(kvl_cache *c, const kvli_attend *a) {
    struct kvli_cu *cu = c->ctx->cu;
    kvli_cu_cache *cc = kvli_cu_of(c);
    const kvli_geometry *g = &c->geo;
    kvli_attend d = *a;
    uint32_t rows = a->n_rows;
    size_t k_at, v_at, out_at, used = 0;
    uint64_t base = c->workspace + cc->staging;
    uint8_t *host = cc->pinned + KVLI_CU_RING * cc->tables_bytes;
    if (c->desc.device_tensors)
        return KVLI_ERROR(c, KVL_INVALID_ARG,
                          "kvl_attend: tensors in host memory, though desc.device_tensors");
    d.q = kvli_gpu_stage(c, &a->q, g->n_q_heads, g->k_dim, base, &used);
    k_at = used;
    d.k = kvli_gpu_stage(c, &a->k, g->n_kv_heads, g->k_dim, base, &used);
    v_at = used;
    d.v = kvli_gpu_stage(c, &a->v, g->n_kv_heads, g->v_dim, base, &used);
    out_at = used;
    d.out = kvli_gpu_stage(c, &a->out, g->n_q_heads, g->v_dim, base, &used);
    kvli_gpu_pack(&a->q, rows, g->n_q_heads, g->k_dim, host, false);
    kvli_gpu_pack(&a->k, rows, g->n_kv_heads, g->k_dim, host + k_at, false);
    kvli_gpu_pack(&a->v, rows, g->n_kv_heads, g->v_dim, host + v_at, false);
    kvl_result r = kvli_cu_ok(c, cu->fn.upload(base, host, out_at, cc->stream), "cuMemcpyHtoDAsync");
    if (r == KVL_OK) r = kvli_cu_layer(c, &d);
    if (r == KVL_OK)
        r = kvli_cu_ok(
            c, cu->fn.download(host + out_at, (kvli_cu_ptr)(uintptr_t)d.out.data, used - out_at, cc->stream),
            "cuMemcpyDtoHAsync");
    kvl_result waited = kvli_cu_ok(c, cu->fn.stream_wait(cc->stream), "cuStreamSynchronize");
    if (r == KVL_OK) r = waited;
    if (r == KVL_OK) kvli_gpu_pack(&a->out, rows, g->n_q_heads, g->v_dim, host + out_at, true);
    return r;
}

static kvl_result kvli_cu_attend(kvl_cache *c, const kvli_attend *a) {
    kvl_result r = kvli_cu_enter(c);
    if (r != KVL_OK) return r;
    r = a->q.memory == KVL_MEMORY_DEVICE ? kvli_cu_layer(c, a) : kvli_cu_host_layer(c, a);
    kvli_cu_leave(c->ctx);
    return r;
}

static kvl_result kvli_cu_finish(kvl_cache *c) {
    struct kvli_cu *cu = c->ctx->cu;
    kvli_cu_cache *cc = kvli_cu_of(c);
    uint32_t *taint = (uint32_t *)(void *)(cc->pinned + KVLI_CU_RING * cc->tables_bytes + cc->staging_bytes);
    kvl_result r = kvli_cu_enter(c);
    if (r != KVL_OK) return r;
    r = kvli_cu_ok(c, cu->fn.download(taint, c->workspace, c->step.n_spans * sizeof *taint, cc->stream),
                   "cuMemcpyDtoHAsync");
    if (r == KVL_OK) r = kvli_cu_ok(c, cu->fn.stream_wait(cc->stream), "cuStreamSynchronize");
    kvli_cu_leave(c->ctx);
    for (uint32_t s = 0; s < c->step.n_spans && r == KVL_OK; s++) c->step.taint[s] |= taint[s] != 0;
    return r;
}

static kvl_result kvli_cu_lend(kvl_context *ctx, void *context, void *stream) {
    struct kvli_cu *cu = ctx->cu;
    int device = -1;
    if (!cu || !cu->lent) return KVL_INVALID_ARG;
    if (!cu->lost) return KVL_BUSY;
    int e = cu->fn.context_push(context);
    if (e) return kvli_cu_fail(ctx, kvli_text_at(NULL, 0), e, "cuCtxPushCurrent");
    e = cu->fn.context_device(&device);
    kvli_cu_leave(ctx);
    if (e) return kvli_cu_fail(ctx, kvli_text_at(NULL, 0), e, "cuCtxGetDevice");
    if (device != cu->device) return KVL_INVALID_ARG;
    cu->module = NULL; /* it went with its context, and so did what caches have in it */
    cu->generation++;
    cu->context = context;
    cu->stream = stream;
    cu->renewed = true;
    return KVL_OK;
}
#else
static kvl_result kvli_cu_open(kvl_context *ctx, kvli_text why) {
    (void)ctx;
    return kvli_fail(NULL, why, KVL_NO_BACKEND,
                     "not in this build (KVL_NO_CUDA, or its kernels were not found)");
}
static kvl_result kvli_cu_lend(kvl_context *ctx, void *context, void *stream) {
    (void)ctx;
    (void)context;
    (void)stream;
    return KVL_INVALID_ARG;
}
#endif

/* ==== >>vulkan: any GPU with Vulkan 1.1 ====
   A slab is a buffer; an address is its bank (0: scratch and workspace, 1 + s: slab s) << 32 | bytes into it. Shaders get
   all banks as an array of storage buffers, and which block of threads does what from the step's tables, which the host
   writes into memory that both see. A layer's call records dispatches (store; decode and prefill; merge) into a command
   buffer and submits it; where an app's command buffer was lent, it only records. */
#if KVLI_VULKAN
#if UINTPTR_MAX <= 0xffffffffu
#error "kvlite's Vulkan backend is for programs of 64 bits"
#endif
enum {
    KVLI_VK_RING = 8,       /* submits that may be under way */
    KVLI_VK_COPY_GROUPS = 8 /* workgroups that share the copy of a block */
};
/* Drivers stop what runs for more than about 2 s: multiply-adds (twice, of keys and of values) and bytes in a submit. */
static const uint64_t kvli_vk_submit_work = 1ull << 33, kvli_vk_submit_bytes = 1ull << 30;

/* What a cache runs: the context's, by preset. write: instead of store, where nothing is sealed. */
typedef struct kvli_vk_pipes {
    kvli_vk_set_layout sets[2];
    kvli_vk_pipeline_layout layout;
    kvli_vk_pipeline store[16], write[16], decode[16], prefill[16], merge, copy;
    bool halves; /* all that write `out` have KVLI_VK_STORAGE16: on a device that has it they may be wrong */
} kvli_vk_pipes;

/* A cache's part of it. */
typedef struct kvli_vk_cache {
    kvl_cache *next;
    uint32_t generation; /* of the device when it was started; 0: it is not */
    bool spoilt;         /* a copy of blocks failed, so that its KV is gone */
    kvli_gpu_tables tables;
    kvli_vk_pipes pipes;
    uint8_t *layer_preset; /* [n_layers] */
    kvli_vk_piece *banks;  /* [n_banks]; unmapped ones are null */
    uint32_t n_banks;      /* of the shaders' array: 1 + max_slabs, rounded up */
    kvli_vk_piece host;    /* tables, then kvli_vk_layer[n_layers] and sink logits */
    kvli_vk_piece in, out; /* staging: q, k, v; out, then taint [max_spans] */
    size_t tables_bytes, layers_bytes, in_bytes, out_bytes;            /* out_bytes: without taint */
    uint64_t partial_o, partial_ml, partial_o_bytes, partial_ml_bytes; /* in bank 0 */
    kvli_vk_command_pool command_pool;
    kvli_vk_commands commands[KVLI_VK_RING], record; /* record: lent for this step, or null */
    kvli_vk_fence fence[KVLI_VK_RING];
    uint32_t turn, pending; /* in the ring; bits of those submitted and not waited for */
    bool open, moves;       /* commands[turn] is being recorded; copies of blocks are among it */
    uint64_t work, bytes;   /* in it */
    kvli_vk_set_pool set_pool;
    kvli_vk_set
        *sets; /* pages and tables; one for copies, which have no tensors; k, v and q, out of each layer */
} kvli_vk_cache;

/* ---- pipelines ---- */
/* With the device: what is kept of them for all caches. free: also after a start that failed, and twice. */
static kvl_result kvli_vk_pipelines_start(kvl_context *ctx, kvli_text why);
static void kvli_vk_pipelines_free(kvl_context *ctx);
static void kvli_vk_pipelines_forget(kvl_context *ctx);
/* All that the cache's layers need, tested, into its `pipes`. */
static kvl_result kvli_vk_pipelines(kvl_cache *c);

static kvli_vk_cache *kvli_vk_of(const kvl_cache *c) { return (kvli_vk_cache *)c->backend_state; }

/* ---- errors ---- */
static kvl_result kvli_vk_ok(kvl_cache *c, int e, const char *call) {
    return kvli_vk_failed(e) ? kvli_vk_fail(c->ctx, kvli_err(c), e, call) : KVL_OK;
}

static kvl_result kvli_vk_check(kvl_cache *c) {
    const struct kvli_vk *vk = c->ctx->vk;
    if (vk->lost) return KVLI_ERROR(c, KVL_DEVICE_LOST, "the device is lost (%s)", c->ctx->native_text);
    if (vk->generation != kvli_vk_of(c)->generation)
        return KVLI_ERROR(c, KVL_DEVICE_LOST, "the device was started again: the KV of this cache is gone");
    if (kvli_vk_of(c)->spoilt)
        return KVLI_ERROR(c, KVL_DEVICE_LOST, "a copy of blocks failed: the KV of this cache is gone");
    return KVL_OK;
}

/* ---- open ---- */
static void *kvli_vk_library(void) {
#if defined(_WIN32)
    static const char *const names[] = {"vulkan-1.dll"};
#elif defined(__APPLE__)
    static const char *const names[] = {"libvulkan.1.dylib", "libMoltenVK.dylib"};
#else
    static const char *const names[] = {"libvulkan.so.1", "libvulkan.so"};
#endif
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        void *library = kvli_gpu_library(names[i]);
        if (library) return library;
    }
    return NULL;
}

/* The device and what it is asked through; also when it is started again. */
static kvl_result kvli_vk_start_device(kvl_context *ctx, kvli_text why) {
    struct kvli_vk *vk = ctx->vk;
    kvli_vk_probe probe;
    bool again = vk->generation != 0;
    kvl_result r =
        again ? kvli_vk_probe_device(ctx, why, vk->physical, &probe) : kvli_vk_choose(ctx, why, &probe);
    if (r == KVL_OK && again && !kvli_vk_same(vk, &probe))
        r = kvli_fail(NULL, why, KVL_NO_BACKEND, "another GPU, or another driver");
    if (r == KVL_OK && !vk->lent) r = kvli_vk_create_device(ctx, why, &probe);
    if (r != KVL_OK) return r;
    const kvli_vk_device device = vk->device;
    KVLI_VK_DEVICE_FUNCTIONS(KVLI_VK_LOAD_)
    vk->family = probe.family;
    if (!vk->lent) vk->fn.get_queue(vk->device, vk->family, 0, &vk->queue);
    kvli_vk_set_caps(ctx, &probe);
    vk->lost = vk->renewed = false;
    vk->generation++;
    return kvli_vk_pipelines_start(ctx, why);
}

static void kvli_vk_release(kvl_cache *c);

/* What caches have on the device goes with it. */
static void kvli_vk_stop_device(kvl_context *ctx) {
    struct kvli_vk *vk = ctx->vk;
    for (kvl_cache *c = vk->caches; c; c = kvli_vk_of(c)->next) kvli_vk_release(c);
    vk->caches = NULL;
    if (vk->device && vk->fn.destroy_device) {
        kvli_vk_pipelines_free(ctx);
        if (!vk->lent) vk->fn.destroy_device(vk->device, NULL);
    }
    if (!vk->lent) vk->device = NULL;
    vk->generation++;
}

static void kvli_vk_close(kvl_context *ctx) {
    struct kvli_vk *vk = ctx->vk;
    if (!vk) return;
    kvli_vk_stop_device(ctx);
    kvli_vk_pipelines_forget(ctx);
    if (vk->instance && !vk->lent && vk->fn.destroy_instance) vk->fn.destroy_instance(vk->instance, NULL);
    if (vk->library) kvli_gpu_unload(vk->library);
    if (vk->has_locks) {
        kvli_mutex_free(&vk->queue_lock);
        kvli_mutex_free(&vk->lock);
    }
    kvli_free(ctx, vk, sizeof *vk);
    ctx->vk = NULL;
}

/* What is lent: all of it, or nothing. */
static bool kvli_vk_borrow(struct kvli_vk *vk, const kvl_vulkan_desc *d) {
    vk->instance = (kvli_vk_instance)d->instance;
    vk->physical = (kvli_vk_physical)d->physical_device;
    vk->device = (kvli_vk_device)d->device;
    vk->queue = (kvli_vk_queue)d->queue;
    vk->lent = d->instance != NULL;
    return vk->lent ? d->physical_device && d->device && d->queue
                    : !d->physical_device && !d->device && !d->queue;
}

static kvl_result kvli_vk_open(kvl_context *ctx, kvli_text why) {
    const kvl_vulkan_desc *d = &ctx->desc.vulkan;
    struct kvli_vk *vk = (struct kvli_vk *)kvli_alloc(ctx, sizeof *vk);
    if (vk) memset(vk, 0, sizeof *vk);
    ctx->vk = vk;
    if (!vk) return kvli_fail(NULL, why, KVL_OUT_OF_HOST_MEMORY, "the allocator returned null");
    vk->has_locks = kvli_mutex_init(&vk->lock);
    if (vk->has_locks && !kvli_mutex_init(&vk->queue_lock)) {
        kvli_mutex_free(&vk->lock);
        vk->has_locks = false;
    }
    if (!vk->has_locks) return kvli_fail(NULL, why, KVL_OUT_OF_HOST_MEMORY, "no mutex");
    if (!kvli_vk_borrow(vk, d)) {
        vk->instance = NULL;
        vk->device = NULL;
        return kvli_fail(
            NULL, why, KVL_INVALID_ARG,
            "vulkan: instance, physical_device, device and queue are lent together or not at all");
    }
    memcpy(&vk->get_proc, &d->get_instance_proc_addr, sizeof vk->get_proc);
    if (!vk->get_proc) vk->library = kvli_vk_library();
    if (!vk->get_proc && !vk->library)
        return kvli_fail(NULL, why, KVL_NO_BACKEND,
                         "no loader: libvulkan is not there (a GPU's driver brings it)");
    if (vk->library && !kvli_gpu_symbol(vk->library, "vkGetInstanceProcAddr", &vk->get_proc))
        return kvli_fail(NULL, why, KVL_NO_BACKEND, "libvulkan has no vkGetInstanceProcAddr");
    kvl_result r = kvli_vk_start_instance(ctx, why);
    if (r == KVL_OK) r = kvli_vk_start_device(ctx, why);
    if (r == KVL_OK) snprintf(ctx->name, sizeof ctx->name, "vulkan (%.80s)", vk->properties.name);
    return r;
}

/* ---- pipelines: kernels_vulkan/selftest.h, pipelines.h ---- */
static void kvli_vk_set_range(const struct kvli_vk *vk, kvli_vk_set set, uint32_t binding, uint32_t element,
                              const kvli_vk_piece *p, uint64_t offset, uint64_t bytes);
#define KVLI_VULKAN_PIPELINES /* the rest of the header */
#include KVLI_VULKAN_HEADER
#undef KVLI_VULKAN_PIPELINES

/* ---- what a cache needs ---- */
static bool kvli_vk_supports(kvl_format f, bool is_key, uint32_t tokens, uint32_t dim, const char **why) {
    if (dim < 64) *why = is_key ? "k_dim is below 64" : "v_dim is below 64";
    if (tokens < 16) *why = "block_tokens is below 16";
    return dim >= 64 && tokens >= 16 && kvli_side_supported(f, is_key, tokens, dim, why);
}

static kvli_gpu_shape kvli_vk_shape(const kvl_cache *c) {
    kvli_gpu_shape shape = {
        {kvli_vk_decode_rows(c->geo.gqa), 0, kvli_vk_prefill_rows(c->geo.k_dim, c->ctx->vk->caps.max_shared)},
        c->geo.gqa};
    return shape;
}

static size_t kvli_vk_layers_bytes(const kvl_cache *c) {
    size_t bytes = c->geo.n_layers * sizeof(kvli_vk_layer);
    for (uint32_t l = 0; l < c->geo.n_layers; l++)
        if (c->geo.layers[l].sink_logits) bytes += c->geo.n_q_heads * sizeof(float);
    return kvli_gpu_align(bytes);
}

static size_t kvli_vk_staging_bytes(const kvl_cache *c, uint32_t heads) {
    return c->desc.device_tensors
               ? 0
               : kvli_gpu_align((size_t)c->desc.max_step_tokens * heads * c->geo.k_dim * sizeof(float)) + 768;
}

static uint32_t kvli_vk_n_sets(const kvl_cache *c) { return 2 + 2 * c->geo.n_layers; }

/* How the cache's memory is cut into buffers. */
static kvl_result kvli_vk_limits_of(kvl_cache *c, const kvli_gpu_sizes *z) {
    const kvli_vk_caps *caps = &c->ctx->vk->caps;
    const struct {
        const char *field;
        uint64_t bytes;
    } buffers[] = {{"max_sequences, max_seq_tokens, max_step_tokens: a step's tables", z->tables},
                   {"max_step_tokens: a staged tensor", kvli_vk_staging_bytes(c, c->geo.n_q_heads)},
                   {"max_step_tokens: exact scratch", c->scratch_bytes + 256ull},
                   {"geometry.n_layers", kvli_vk_layers_bytes(c)},
                   {"geometry.n_kv_heads: partial results", z->partial_o},
                   {"geometry.k_dim: partial results", z->partial_ml}};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++)
        if (buffers[i].bytes > caps->max_range)
            return KVLI_ERROR(c, KVL_UNSUPPORTED, "%s: %llu bytes, a buffer of this device has at most %llu",
                              buffers[i].field, (unsigned long long)buffers[i].bytes,
                              (unsigned long long)caps->max_range);
    c->slab_most = caps->max_range < caps->max_alloc ? caps->max_range : caps->max_alloc;
    c->slabs_most = caps->banks - 1;
    return KVL_OK;
}

static kvl_result kvli_vk_plan(kvl_cache *c) {
    kvl_result r = kvli_gpu_geometry(c);
    if (r != KVL_OK) return r;
    kvli_gpu_shape shape = kvli_vk_shape(c);
    kvli_gpu_sizes z = kvli_gpu_size(c, &shape);
    const kvli_geometry *g = &c->geo;
    if (z.tables > UINT32_MAX / 2 || z.staging > UINT32_MAX) return kvli_gpu_too_large(c, z.tables);
    r = kvli_vk_limits_of(c, &z);
    if (r != KVL_OK) return r;
    if (!c->desc.slab_granularity) c->desc.slab_granularity = 65536; /* as drivers round it */
    c->workspace_bytes = (size_t)(z.partial_o + z.partial_ml) + 1024;
    c->pinned_bytes = (size_t)z.tables + kvli_vk_layers_bytes(c) + z.spans * sizeof(uint32_t) +
                      kvli_vk_staging_bytes(c, g->n_q_heads + 2 * g->n_kv_heads) +
                      kvli_vk_staging_bytes(c, g->n_q_heads);
    c->backend_bytes = sizeof(kvli_vk_cache) + kvli_gpu_passes_bytes(c, &z) + g->n_layers + 64 +
                       c->ctx->vk->caps.banks * sizeof(kvli_vk_piece) +
                       kvli_vk_n_sets(c) * sizeof(kvli_vk_set);
    return KVL_OK;
}

/* ---- start ---- */
static void kvli_vk_put_layers(const kvl_cache *c, uint8_t *to) {
    const kvli_geometry *g = &c->geo;
    kvli_vk_layer *out = (kvli_vk_layer *)(void *)to;
    uint32_t sinks = g->n_layers * (uint32_t)(sizeof *out / 4); /* in words */
    for (uint32_t n = 0; n < g->n_layers; n++) {
        const kvli_layer *l = &g->layers[n];
        kvli_vk_layer v;
        memset(&v, 0, sizeof v);
        for (int e = 0; e < 2; e++) {
            v.offset[e] = (uint32_t)(l->offset[e] / 16);
            v.head_stride[e] = (uint32_t)(l->head_stride[e] / 16);
            v.v_offset[e] = (uint32_t)(l->v_offset[e] / 16);
        }
        v.window = l->window;
        v.sink_tokens = l->sink_tokens;
        v.sink_logits = l->sink_logits ? sinks : KVLI_GPU_NONE;
        v.scale = l->scale;
        v.softcap = l->softcap;
        v.k_global = l->k[KVLI_PACKED].global;
        v.v_global = l->v[KVLI_PACKED].global;
        out[n] = v;
        if (!l->sink_logits) continue;
        memcpy(to + sinks * (size_t)4, l->sink_logits, g->n_q_heads * sizeof(float));
        sinks += g->n_q_heads;
    }
}

static void kvli_vk_set_range(const struct kvli_vk *vk, kvli_vk_set set, uint32_t binding, uint32_t element,
                              const kvli_vk_piece *p, uint64_t offset, uint64_t bytes) {
    kvli_vk_range range = {p->buffer, offset, bytes};
    kvli_vk_write_set write = {KVLI_VK_TYPE_WRITE_SET, NULL, set,    binding, element, 1,
                               KVLI_VK_STORAGE_BUFFER, NULL, &range, NULL};
    vk->fn.update_sets(vk->device, 1, &write, 0, NULL);
}

/* A bank that is not mapped is bank 0: no entry names it. */
static void kvli_vk_set_bank(const kvl_cache *c, uint32_t bank) {
    const kvli_vk_cache *cc = kvli_vk_of(c);
    bool slab = bank && cc->banks[bank].buffer;
    kvli_vk_set_range(c->ctx->vk, cc->sets[0], KVLI_VK_PAGES, bank, &cc->banks[slab ? bank : 0], 0,
                      slab ? c->slab_bytes : 256 + c->scratch_bytes);
}

static int kvli_vk_new_sets(const kvl_cache *c, kvli_vk_cache *cc) {
    const struct kvli_vk *vk = c->ctx->vk;
    uint32_t n = kvli_vk_n_sets(c);
    kvli_vk_pool_size size = {KVLI_VK_STORAGE_BUFFER, cc->n_banks + KVLI_VK_MORE_BUFFERS + 2 * n};
    kvli_vk_set_pool_info info = {KVLI_VK_TYPE_SET_POOL, NULL, 0, n, 1, &size};
    int e = vk->fn.create_set_pool(vk->device, &info, NULL, &cc->set_pool);
    if (kvli_vk_failed(e)) cc->set_pool = NULL;
    for (uint32_t i = 0; i < n && !kvli_vk_failed(e); i++) {
        kvli_vk_sets_info one = {KVLI_VK_TYPE_SETS, NULL, cc->set_pool, 1, &cc->pipes.sets[i != 0]};
        e = vk->fn.alloc_sets(vk->device, &one, &cc->sets[i]);
    }
    return e;
}

/* Memory that host and device share, and the descriptors of it. */
static kvl_result kvli_vk_new_staging(kvl_cache *c) {
    const struct kvli_vk *vk = c->ctx->vk;
    kvli_vk_cache *cc = kvli_vk_of(c);
    uint64_t taint = cc->tables.max_spans * sizeof(uint32_t);
    kvl_result r = kvli_vk_piece_new(c->ctx, kvli_err(c), cc->tables_bytes + cc->layers_bytes, KVLI_VK_UPLOAD,
                                     &cc->host);
    if (r == KVL_OK)
        r = kvli_vk_piece_new(c->ctx, kvli_err(c), cc->out_bytes + taint, KVLI_VK_READBACK, &cc->out);
    if (r == KVL_OK && cc->in_bytes)
        r = kvli_vk_piece_new(c->ctx, kvli_err(c), cc->in_bytes, KVLI_VK_UPLOAD, &cc->in);
    if (r != KVL_OK) return r;
    kvli_vk_put_layers(c, cc->host.at + cc->tables_bytes);
    kvli_vk_set_range(vk, cc->sets[0], KVLI_VK_TABLES, 0, &cc->host, 0, cc->tables_bytes);
    kvli_vk_set_range(vk, cc->sets[0], KVLI_VK_LAYERS, 0, &cc->host, cc->tables_bytes, cc->layers_bytes);
    kvli_vk_set_range(vk, cc->sets[0], KVLI_VK_TAINT, 0, &cc->out, cc->out_bytes, taint);
    return r;
}

/* What start and recover do; release takes what a failure left. */
static kvl_result kvli_vk_acquire(kvl_cache *c) {
    struct kvli_vk *vk = c->ctx->vk;
    kvli_vk_cache *cc = kvli_vk_of(c);
    cc->generation = vk->generation;
    cc->spoilt = false;
    kvli_lock(&vk->lock);
    cc->next = vk->caches;
    vk->caches = c;
    kvli_unlock(&vk->lock);
    kvl_result r = kvli_vk_pipelines(c);
    if (r == KVL_OK)
        r = kvli_vk_ok(c, kvli_vk_new_commands(vk, KVLI_VK_RING, &cc->command_pool, cc->commands),
                       "vkAllocateCommandBuffers");
    for (uint32_t i = 0; i < KVLI_VK_RING && r == KVL_OK; i++)
        r = kvli_vk_ok(c, kvli_vk_new_fence(vk, &cc->fence[i]), "vkCreateFence");
    if (r == KVL_OK) r = kvli_vk_ok(c, kvli_vk_new_sets(c, cc), "vkAllocateDescriptorSets");
    return r == KVL_OK ? kvli_vk_new_staging(c) : r;
}

static kvl_result kvli_vk_wait(kvl_cache *c);

/* Destroys all that the cache has on the device, slabs too; also of a device that is lost. */
static void kvli_vk_release(kvl_cache *c) {
    struct kvli_vk *vk = c->ctx->vk;
    kvli_vk_cache *cc = kvli_vk_of(c);
    if (cc->generation != vk->generation) return; /* it was, with the device */
    if (cc->pending && (vk->lost || kvli_vk_wait(c) != KVL_OK)) kvli_vk_idle(c->ctx);
    for (uint32_t i = 0; i < vk->caps.banks; i++) kvli_vk_piece_free(vk, &cc->banks[i]);
    kvli_vk_piece_free(vk, &cc->host);
    kvli_vk_piece_free(vk, &cc->in);
    kvli_vk_piece_free(vk, &cc->out);
    for (uint32_t i = 0; i < KVLI_VK_RING; i++)
        if (cc->fence[i]) vk->fn.destroy_fence(vk->device, cc->fence[i], NULL);
    if (cc->command_pool) vk->fn.destroy_command_pool(vk->device, cc->command_pool, NULL);
    if (cc->set_pool) vk->fn.destroy_set_pool(vk->device, cc->set_pool, NULL);
    memset(cc->fence, 0, sizeof cc->fence);
    cc->command_pool = NULL;
    cc->set_pool = NULL;
    cc->record = NULL;
    cc->pending = cc->turn = 0;
    cc->work = cc->bytes = 0;
    cc->open = cc->moves = false;
    cc->generation = 0;
}

static void kvli_vk_stop(kvl_cache *c) {
    struct kvli_vk *vk = c->ctx->vk;
    kvli_vk_release(c);
    kvli_lock(&vk->lock);
    kvl_cache **at = &vk->caches;
    while (*at && *at != c) at = &kvli_vk_of(*at)->next;
    if (*at) *at = kvli_vk_of(c)->next;
    kvli_unlock(&vk->lock);
}

static kvl_result kvli_vk_start(kvl_cache *c) {
    const kvli_geometry *g = &c->geo;
    const kvli_vk_caps *caps = &c->ctx->vk->caps;
    kvli_gpu_shape shape = kvli_vk_shape(c);
    kvli_gpu_sizes z = kvli_gpu_size(c, &shape);
    kvli_vk_cache *cc = kvli_vk_of(c);
    memset(cc, 0, c->backend_bytes);
    kvli_gpu_tables_init(&cc->tables, &shape, &z, cc + 1);
    uint8_t *at = (uint8_t *)(cc + 1) + kvli_gpu_passes_bytes(c, &z);
    cc->banks = (kvli_vk_piece *)(void *)at;
    at += caps->banks * sizeof *cc->banks;
    cc->sets = (kvli_vk_set *)(void *)at;
    cc->layer_preset = at + kvli_vk_n_sets(c) * sizeof *cc->sets;
    for (uint32_t l = 0; l < g->n_layers; l++) cc->layer_preset[l] = (uint8_t)kvli_gpu_preset(c, l);
    for (cc->n_banks = 2; cc->n_banks < 1 + c->max_slabs; cc->n_banks *= 2) {
    }
    cc->n_banks = kvli_min_u32(cc->n_banks, caps->banks); /* (caches of about one size share pipelines) */
    cc->tables_bytes = (size_t)z.tables;
    cc->layers_bytes = kvli_vk_layers_bytes(c);
    cc->in_bytes = kvli_vk_staging_bytes(c, g->n_q_heads + 2 * g->n_kv_heads);
    cc->out_bytes = kvli_gpu_align(kvli_vk_staging_bytes(c, g->n_q_heads));
    cc->partial_o = kvli_gpu_align(256 + c->scratch_bytes);
    cc->partial_o_bytes = z.partial_o;
    cc->partial_ml = cc->partial_o + z.partial_o;
    cc->partial_ml_bytes = z.partial_ml;
    return kvli_vk_acquire(c);
}

static kvl_result kvli_vk_recover(kvl_cache *c) {
    struct kvli_vk *vk = c->ctx->vk;
    kvli_vk_stop(c);
    if (!vk->device && vk->lent) return kvli_vk_check(c); /* the last one that was lent was refused */
    if (vk->lost && vk->lent && !vk->renewed) {
        kvl_result r = kvli_vk_ok(c, kvli_vk_idle(c->ctx), "vkQueueWaitIdle"); /* is it dead? */
        if (r != KVL_OK) return r;
        vk->lost = false;
    } else if (vk->lost) {
        kvli_vk_stop_device(c->ctx);
        if (kvli_vk_start_device(c->ctx, kvli_err(c)) != KVL_OK) {
            vk->lost = true;
            return KVL_DEVICE_LOST;
        }
    }
    kvl_result r = kvli_vk_acquire(c);
    if (r != KVL_OK) kvli_vk_stop(c);
    return r;
}

/* ---- memory ---- */
static kvl_result kvli_vk_submit(kvl_cache *c);

/* Descriptors change when nothing uses them. */
static kvl_result kvli_vk_quiet(kvl_cache *c) {
    kvl_result r = kvli_vk_submit(c);
    return r == KVL_OK ? kvli_vk_wait(c) : r;
}

static uint64_t kvli_vk_address(uint32_t bank, uint64_t offset) { return (uint64_t)bank << 32 | offset; }

static kvl_result kvli_vk_poison(kvl_cache *c, uint64_t address, size_t bytes);

static kvl_result kvli_vk_map(kvl_cache *c, uint32_t slab, size_t bytes, uint64_t *address) {
    const struct kvli_vk *vk = c->ctx->vk;
    kvli_vk_cache *cc = kvli_vk_of(c);
    uint32_t bank = slab == KVL_NONE ? 0 : 1 + slab;
    *address = 0;
    kvl_result r = kvli_vk_check(c);
    if (r == KVL_OK) r = kvli_vk_quiet(c);
    if (r == KVL_OK)
        r = kvli_vk_piece_new(c->ctx, kvli_err(c), bytes + (bank ? 0 : 256), KVLI_VK_BLOCKS,
                              &cc->banks[bank]);
    if (r != KVL_OK) return r;
    cc->tables.mapped++;
    for (uint32_t i = bank; i < (bank ? bank + 1 : cc->n_banks); i++) kvli_vk_set_bank(c, i);
    *address = kvli_vk_address(bank, bank ? 0 : 256);
    if (bank) return r;
    kvli_vk_set_range(vk, cc->sets[0], KVLI_VK_PARTIAL_O, 0, cc->banks, cc->partial_o, cc->partial_o_bytes);
    kvli_vk_set_range(vk, cc->sets[0], KVLI_VK_PARTIAL_ML, 0, cc->banks, cc->partial_ml,
                      cc->partial_ml_bytes);
    if (c->desc.poison) kvli_vk_poison(c, *address, bytes);
    return r;
}

static void kvli_vk_unmap(kvl_cache *c, uint32_t slab, size_t bytes, uint64_t address) {
    struct kvli_vk *vk = c->ctx->vk;
    kvli_vk_cache *cc = kvli_vk_of(c);
    uint32_t bank = slab == KVL_NONE ? 0 : 1 + slab;
    (void)bytes;
    (void)address;
    cc->tables.mapped++;
    if (cc->generation != vk->generation) return; /* it went with the device */
    if (vk->lost || kvli_vk_quiet(c) != KVL_OK) {
        kvli_vk_idle(c->ctx);
        cc->spoilt = cc->spoilt || cc->moves; /* what is recorded and not submitted may be of this buffer */
        cc->open = cc->moves = false;
        cc->work = cc->bytes = 0;
    }
    kvli_vk_piece_free(vk, &cc->banks[bank]);
    if (bank && cc->banks[0].buffer) kvli_vk_set_bank(c, bank);
}

/* ---- commands of a cache ---- */
static kvl_result kvli_vk_wait_for(kvl_cache *c, uint32_t pending) { /* bits of the ring */
    const struct kvli_vk *vk = c->ctx->vk;
    kvli_vk_cache *cc = kvli_vk_of(c);
    kvli_vk_fence fences[KVLI_VK_RING];
    uint32_t n = 0;
    for (uint32_t i = 0; i < KVLI_VK_RING; i++)
        if (pending >> i & 1) fences[n++] = cc->fence[i];
    if (!n) return KVL_OK;
    kvl_result r =
        kvli_vk_ok(c, vk->fn.wait_fences(vk->device, n, fences, 1, kvli_vk_patience(vk)), "vkWaitForFences");
    if (r == KVL_OK) cc->pending &= ~pending;
    return r;
}
static kvl_result kvli_vk_wait(kvl_cache *c) { return kvli_vk_wait_for(c, kvli_vk_of(c)->pending); }

/* A command buffer of ours to record into, which submit submits. */
static kvl_result kvli_vk_begin(kvl_cache *c, kvli_vk_commands *out) {
    kvli_vk_cache *cc = kvli_vk_of(c);
    kvl_result r = KVL_OK;
    *out = cc->commands[cc->turn];
    if (cc->open) return r;
    r = kvli_vk_wait_for(c, cc->pending & 1u << cc->turn);
    if (r == KVL_OK) r = kvli_vk_ok(c, kvli_vk_begin_commands(c->ctx->vk, *out), "vkBeginCommandBuffer");
    cc->open = r == KVL_OK;
    return r;
}
/* For a layer: the one that was lent, if one was. */
static kvl_result kvli_vk_begin_layer(kvl_cache *c, kvli_vk_commands *out) {
    *out = kvli_vk_of(c)->record;
    return *out ? KVL_OK : kvli_vk_begin(c, out);
}

/* What is recorded goes to the queue. If that fails, copies of blocks are not made up for. */
static kvl_result kvli_vk_submit(kvl_cache *c) {
    const struct kvli_vk *vk = c->ctx->vk;
    kvli_vk_cache *cc = kvli_vk_of(c);
    kvli_vk_commands commands = cc->commands[cc->turn];
    if (!cc->open) return KVL_OK;
    cc->open = false;
    cc->work = cc->bytes = 0;
    kvl_result r = kvli_vk_ok(c, kvli_vk_end_commands(vk, commands), "vkEndCommandBuffer");
    if (r == KVL_OK)
        r = kvli_vk_ok(c, vk->fn.reset_fences(vk->device, 1, &cc->fence[cc->turn]), "vkResetFences");
    if (r == KVL_OK)
        r = kvli_vk_ok(c, kvli_vk_submit_to(c->ctx, commands, cc->fence[cc->turn]), "vkQueueSubmit");
    cc->spoilt = cc->spoilt || (r != KVL_OK && cc->moves);
    cc->moves = false;
    if (r != KVL_OK) return r;
    cc->pending |= 1u << cc->turn;
    cc->turn = (cc->turn + 1) % KVLI_VK_RING;
    return r;
}

/* After so many bytes more are copied or filled: never too many in one submit. */
static kvl_result kvli_vk_moved(kvl_cache *c, kvli_vk_commands commands, size_t bytes) {
    kvli_vk_cache *cc = kvli_vk_of(c);
    kvli_vk_wall(c->ctx->vk, commands, KVLI_VK_AT_TRANSFER, KVLI_VK_AT_OURS);
    cc->moves = true;
    cc->bytes += bytes;
    return cc->bytes > kvli_vk_submit_bytes ? kvli_vk_submit(c) : KVL_OK;
}

static kvl_result kvli_vk_move(kvl_cache *c, uint64_t dst, uint64_t src, size_t bytes) {
    kvli_vk_cache *cc = kvli_vk_of(c);
    kvli_vk_commands commands;
    kvli_vk_copy copy = {src & UINT32_MAX, dst & UINT32_MAX, bytes};
    kvl_result r = kvli_vk_check(c);
    if (r == KVL_OK) r = kvli_vk_begin(c, &commands);
    if (r == KVL_OK) {
        c->ctx->vk->fn.copy_buffer(commands, cc->banks[src >> 32].buffer, cc->banks[dst >> 32].buffer, 1,
                                   &copy);
        r = kvli_vk_moved(c, commands, bytes);
    }
    if (r != KVL_OK) cc->spoilt = true; /* the caller cannot go back, also where a lent device is well */
    return r;
}

static kvl_result kvli_vk_poison(kvl_cache *c, uint64_t address, size_t bytes) {
    kvli_vk_commands commands;
    kvl_result r = kvli_vk_check(c);
    if (r == KVL_OK) r = kvli_vk_begin(c, &commands);
    if (r != KVL_OK) return r;
    c->ctx->vk->fn.fill_buffer(commands, kvli_vk_of(c)->banks[address >> 32].buffer, address & UINT32_MAX,
                               bytes & ~(size_t)3, ~0u);
    return kvli_vk_moved(c, commands, bytes);
}

/* ---- steps and layers ---- */
/* Runs a pipeline on n elements of a list of the tables, in so many pieces that neither a submit nor a grid is too large;
   `each`: work of the largest element. */
static kvl_result kvli_vk_run(kvl_cache *c, kvli_vk_pipeline pipeline, kvli_vk_set tensors,
                              kvli_vk_push *push, const uint32_t grid[2], uint64_t each) {
    const struct kvli_vk *vk = c->ctx->vk;
    kvli_vk_cache *cc = kvli_vk_of(c);
    kvli_vk_set sets[2] = {cc->sets[0], tensors};
    kvli_vk_commands commands;
    for (push->first = 0; push->first < push->n;) {
        uint64_t room =
            cc->work < kvli_vk_submit_work ? (kvli_vk_submit_work - cc->work) / (each ? each : 1) : 0;
        uint32_t most = kvli_min_u32(push->n - push->first, vk->properties.limits.workgroups[0]);
        if (!room && cc->work && !cc->record) {
            kvl_result r = kvli_vk_submit(c);
            if (r != KVL_OK) return r;
            continue;
        }
        uint32_t n = cc->record || room >= most ? most : room ? (uint32_t)room : 1;
        kvl_result r = kvli_vk_begin_layer(c, &commands);
        if (r != KVL_OK) return r;
        vk->fn.bind_pipeline(commands, KVLI_VK_BIND_COMPUTE, pipeline);
        vk->fn.bind_sets(commands, KVLI_VK_BIND_COMPUTE, cc->pipes.layout, 0, 2, sets, 0, NULL);
        vk->fn.push(commands, cc->pipes.layout, KVLI_VK_STAGE_COMPUTE, 0, sizeof *push, push);
        vk->fn.dispatch(commands, n, grid[0], grid[1]);
        push->first += n;
        if (!cc->record) cc->work += n * each;
    }
    return KVL_OK;
}

static kvl_result kvli_vk_step(kvl_cache *c) {
    kvli_vk_cache *cc = kvli_vk_of(c);
    const uint32_t grid[2] = {KVLI_VK_COPY_GROUPS, 1};
    kvli_vk_push push;
    kvl_result r = kvli_vk_check(c);
    if (r == KVL_OK) r = kvli_vk_wait(c); /* an aborted step may still be reading its tables */
    if (r != KVL_OK) return r;
    cc->record = NULL;
    kvli_gpu_build(c, &cc->tables, cc->host.at);
    memset(cc->out.at + cc->out_bytes, 0, c->step.n_spans * sizeof(uint32_t));
    memset(&push, 0, sizeof push);
    push.list = cc->tables.copies / 4;
    push.n = c->step.n_copies;
    r = kvli_vk_run(c, cc->pipes.copy, cc->sets[1], &push, grid, 0);
    return r == KVL_OK ? kvli_vk_submit(c) : r;
}

/* Where tensors stand in the buffers that are bound. */
typedef struct kvli_vk_tensors {
    kvli_vk_tensor q, k, v, out;
    kvli_vk_set store, attend;
} kvli_vk_tensors;

static kvl_result kvli_vk_attend_items(kvl_cache *c, const kvli_attend *a, const kvli_vk_tensors *t,
                                       kvli_vk_push *push) {
    const struct kvli_vk *vk = c->ctx->vk;
    const kvli_vk_cache *cc = kvli_vk_of(c);
    const kvli_gpu_group *g = &cc->tables.groups[a->layer->group];
    const uint32_t grid[2] = {c->geo.n_kv_heads, 1}, preset = cc->layer_preset[push->layer];
    const kvli_vk_pipeline by_sort[KVLI_GPU_SORTS] = {cc->pipes.decode[preset], NULL,
                                                      cc->pipes.prefill[preset], cc->pipes.merge};
    kvl_result r = KVL_OK;
    push->a = t->q;
    push->b = t->out;
    for (uint32_t p = g->first_pass; p < g->first_pass + g->n_passes; p++)
        for (uint32_t sort = 0; sort < KVLI_GPU_SORTS && r == KVL_OK; sort++) {
            const kvli_gpu_pass *pass = &cc->tables.passes[p];
            kvli_vk_commands commands;
            if (!pass->n[sort]) continue;
            r = kvli_vk_begin_layer(c, &commands);
            if (r != KVL_OK) break;
            if (sort == KVLI_GPU_MERGE || sort == KVLI_GPU_DECODE || !pass->n[KVLI_GPU_DECODE])
                kvli_vk_wall(vk, commands, KVLI_VK_AT_COMPUTE, KVLI_VK_AT_COMPUTE);
            push->list = pass->at[sort] / 4;
            push->n = pass->n[sort];
            r = kvli_vk_run(c, by_sort[sort], t->attend, push, grid,
                            pass->largest[sort] * c->geo.k_dim * c->geo.n_kv_heads);
        }
    return r;
}

/* Blocks that are sealed come first in the list. */
static kvl_result kvli_vk_store(kvl_cache *c, const kvli_gpu_group *g, const kvli_vk_tensors *t,
                                kvli_vk_push *push) {
    const kvli_vk_cache *cc = kvli_vk_of(c);
    const uint32_t grid[2] = {c->geo.n_kv_heads, 2}, preset = cc->layer_preset[push->layer];
    const kvli_vk_pipeline pipelines[2] = {cc->pipes.store[preset], cc->pipes.write[preset]};
    uint32_t n[2] = {pipelines[0] == pipelines[1] ? g->n_stores : g->n_seals, 0};
    kvl_result r = KVL_OK;
    n[1] = g->n_stores - n[0];
    push->list = g->stores / 4;
    for (uint32_t i = 0; i < 2 && r == KVL_OK; i++) {
        kvli_vk_commands commands;
        push->n = n[i];
        if (i && n[0] && n[1]) {
            r = kvli_vk_begin_layer(c, &commands);
            if (r != KVL_OK) break;
            kvli_vk_wall(c->ctx->vk, commands, KVLI_VK_AT_COMPUTE, KVLI_VK_AT_COMPUTE);
        }
        r = kvli_vk_run(c, pipelines[i], t->store, push, grid,
                        (uint64_t)c->geo.block_tokens * c->geo.k_dim * c->geo.n_kv_heads * 8);
        push->list += n[i] * (uint32_t)(sizeof(kvli_gpu_store) / 4);
    }
    return r;
}

static kvl_result kvli_vk_layer_run(kvl_cache *c, const kvli_attend *a, const kvli_vk_tensors *t) {
    const kvli_vk_cache *cc = kvli_vk_of(c);
    const kvli_gpu_group *g = &cc->tables.groups[a->layer->group];
    kvli_vk_commands commands;
    kvli_vk_push push;
    memset(&push, 0, sizeof push);
    push.layer = (uint32_t)(a->layer - c->geo.layers);
    push.spans = g->spans / 4;
    push.entries = cc->tables.entries / 4;
    push.n_q_heads = c->geo.n_q_heads;
    push.n_kv_heads = c->geo.n_kv_heads;
    push.gqa = c->geo.gqa;
    push.a = t->k;
    push.b = t->v;
    kvl_result r = kvli_vk_begin_layer(c, &commands);
    if (r == KVL_OK && cc->record) kvli_vk_wall(c->ctx->vk, commands, KVLI_VK_AT_ALL, KVLI_VK_AT_OURS);
    if (r == KVL_OK) r = kvli_vk_store(c, g, t, &push);
    if (r == KVL_OK) r = kvli_vk_attend_items(c, a, t, &push);
    if (r == KVL_OK && cc->record)
        kvli_vk_wall(c->ctx->vk, commands, KVLI_VK_AT_COMPUTE, KVLI_VK_AT_ALL | KVLI_VK_AT_HOST);
    return r == KVL_OK ? kvli_vk_submit(c) : r;
}

static kvli_vk_tensor kvli_vk_tensor_of(const kvl_tensor *t, uint64_t at) {
    kvli_vk_tensor out;
    out.offset = (uint32_t)(at / kvli_gpu_dtype_size(t->dtype));
    out.row_stride = (uint32_t)t->row_stride;
    out.head_stride = (uint32_t)t->head_stride;
    out.dtype = (uint32_t)t->dtype;
    return out;
}

/* Binds a tensor of the app's, and says where it stands in what is bound. */
static kvl_result kvli_vk_bind_tensor(kvl_cache *c, const kvl_tensor *t, const char *name, uint32_t heads,
                                      kvli_vk_set set, uint32_t binding, kvli_vk_tensor *out) {
    const struct kvli_vk *vk = c->ctx->vk;
    size_t size = kvli_gpu_dtype_size(t->dtype), rows = c->step.n_rows - 1;
    uint64_t start = t->offset & ~(vk->properties.limits.storage_alignment - 1), before = t->offset - start;
    uint64_t bytes, most = vk->caps.max_range / size;
    kvli_vk_piece piece = {(kvli_vk_buffer)t->data, NULL, NULL};
    if (t->row_stride > most / (rows + 1) || t->head_stride > most / heads)
        bytes = UINT64_MAX;
    else
        bytes = before + (rows * t->row_stride + (heads - 1) * t->head_stride + c->geo.k_dim) * size;
    if (bytes > vk->caps.max_range - 3)
        return KVLI_ERROR(c, KVL_INVALID_ARG,
                          "kvl_attend: tensor %s takes more than the %llu bytes of a buffer", name,
                          (unsigned long long)vk->caps.max_range);
    bool odd = (t->offset / size | t->row_stride | t->head_stride) & 1;
    if (odd && size == 2 && strcmp(name, "out") == 0 && !kvli_vk_of(c)->pipes.halves)
        return KVLI_ERROR(c, KVL_INVALID_ARG,
                          "kvl_attend: tensor out: offset and strides of 16-bit numbers must be even without "
                          "KVL_VULKAN_STORAGE16");
    kvli_vk_set_range(vk, set, binding, 0, &piece, start, (bytes + 3) & ~3ull);
    *out = kvli_vk_tensor_of(t, before);
    return KVL_OK;
}

static kvl_result kvli_vk_device_layer(kvl_cache *c, const kvli_attend *a) {
    const kvli_vk_cache *cc = kvli_vk_of(c);
    const kvli_geometry *g = &c->geo;
    kvli_vk_tensors t;
    uint32_t first = 2 + 2 * (uint32_t)(a->layer - g->layers);
    t.store = cc->sets[first];
    t.attend = cc->sets[first + 1];
    kvl_result r = kvli_vk_bind_tensor(c, &a->k, "k", g->n_kv_heads, t.store, KVLI_VK_TENSOR_A, &t.k);
    if (r == KVL_OK) r = kvli_vk_bind_tensor(c, &a->v, "v", g->n_kv_heads, t.store, KVLI_VK_TENSOR_B, &t.v);
    if (r == KVL_OK) r = kvli_vk_bind_tensor(c, &a->q, "q", g->n_q_heads, t.attend, KVLI_VK_TENSOR_A, &t.q);
    if (r == KVL_OK)
        r = kvli_vk_bind_tensor(c, &a->out, "out", g->n_q_heads, t.attend, KVLI_VK_TENSOR_B, &t.out);
    return r == KVL_OK ? kvli_vk_layer_run(c, a, &t) : r;
}

/* The same on packed copies in memory that host and device share. */
static kvl_result kvli_vk_host_layer(kvl_cache *c, const kvli_attend *a) {
    kvli_vk_cache *cc = kvli_vk_of(c);
    const kvli_geometry *g = &c->geo;
    const kvl_tensor *in[3];
    const uint32_t heads[3] = {g->n_q_heads, g->n_kv_heads, g->n_kv_heads};
    kvli_attend d = *a;
    kvl_tensor *to[3];
    size_t used = 0, none = 0;
    if (c->desc.device_tensors)
        return KVLI_ERROR(c, KVL_INVALID_ARG,
                          "kvl_attend: tensors in host memory, though desc.device_tensors");
    if (cc->record)
        return KVLI_ERROR(c, KVL_INVALID_ARG, "kvl_attend: tensors in host memory, after kvl_step_record");
    in[0] = &a->q, in[1] = &a->k, in[2] = &a->v;
    to[0] = &d.q, to[1] = &d.k, to[2] = &d.v;
    for (uint32_t i = 0; i < 3; i++) {
        size_t at = used;
        *to[i] = kvli_gpu_stage(c, in[i], heads[i], g->k_dim, 0, &used);
        to[i]->data = cc->in.buffer;
        to[i]->offset = at;
        kvli_gpu_pack(in[i], a->n_rows, heads[i], g->k_dim, cc->in.at + at, false);
    }
    d.out = kvli_gpu_stage(c, &a->out, g->n_q_heads, g->k_dim, 0, &none);
    d.out.data = cc->out.buffer;
    d.out.offset = 0;
    kvl_result r = kvli_vk_device_layer(c, &d);
    if (r == KVL_OK) r = kvli_vk_wait(c);
    if (r == KVL_OK) kvli_gpu_pack(&a->out, a->n_rows, g->n_q_heads, g->k_dim, cc->out.at, true);
    return r;
}

static kvl_result kvli_vk_attend(kvl_cache *c, const kvli_attend *a) {
    kvl_result r = kvli_vk_check(c);
    if (r != KVL_OK) return r;
    return a->q.memory == KVL_MEMORY_DEVICE ? kvli_vk_device_layer(c, a) : kvli_vk_host_layer(c, a);
}

static kvl_result kvli_vk_finish(kvl_cache *c) {
    kvli_vk_cache *cc = kvli_vk_of(c);
    const uint32_t *taint = (const uint32_t *)(const void *)(cc->out.at + cc->out_bytes);
    kvl_result r = kvli_vk_check(c);
    cc->record = NULL;
    if (r == KVL_OK) r = kvli_vk_quiet(c);
    for (uint32_t s = 0; s < c->step.n_spans && r == KVL_OK; s++) c->step.taint[s] |= taint[s] != 0;
    return r;
}

static kvl_result kvli_vk_step_record(kvl_cache *c, void *commands) {
    kvl_result r = kvli_vk_check(c);
    if (r == KVL_OK) r = kvli_vk_quiet(c);
    if (r == KVL_OK) kvli_vk_of(c)->record = (kvli_vk_commands)commands;
    return r;
}

static kvl_result kvli_vk_lend(kvl_context *ctx, const kvl_vulkan_desc *desc) {
    struct kvli_vk *vk = ctx->vk;
    kvl_vulkan_desc *mine = &ctx->desc.vulkan;
    kvli_vk_probe probe;
    if (!vk || !vk->lent || !desc->instance || !desc->physical_device || !desc->device || !desc->queue)
        return KVL_INVALID_ARG;
    if (!vk->lost) return KVL_BUSY;
    kvli_vk_stop_device(ctx);
    mine->instance = desc->instance;
    mine->physical_device = desc->physical_device;
    mine->device = desc->device;
    mine->queue = desc->queue;
    mine->queue_family = desc->queue_family;
    mine->features = desc->features;
    kvli_vk_borrow(vk, desc);
    vk->renewed = true;
    kvl_result r = kvli_vk_start_instance(ctx, kvli_text_at(NULL, 0));
    if (r == KVL_OK) r = kvli_vk_probe_device(ctx, kvli_text_at(NULL, 0), vk->physical, &probe);
    if (r == KVL_OK && kvli_vk_same(vk, &probe)) return r;
    vk->device = NULL;
    return r == KVL_OK ? KVL_INVALID_ARG : KVL_DEVICE_LOST;
}
#else
static kvl_result kvli_vk_open(kvl_context *ctx, kvli_text why) {
    (void)ctx;
    return kvli_fail(NULL, why, KVL_NO_BACKEND,
                     "not in this build (KVL_NO_VULKAN, or its kernels were not found)");
}
static kvl_result kvli_vk_blob_out(kvl_context *ctx, void *to, size_t *bytes) {
    (void)ctx;
    (void)to;
    (void)bytes;
    return KVL_UNSUPPORTED;
}
static kvl_result kvli_vk_step_record(kvl_cache *c, void *commands) {
    (void)c;
    (void)commands;
    return KVL_UNSUPPORTED;
}
static kvl_result kvli_vk_lend(kvl_context *ctx, const kvl_vulkan_desc *desc) {
    (void)ctx;
    (void)desc;
    return KVL_INVALID_ARG;
}
#endif

/* In the order that AUTO tries them. */
/* clang-format off */
static const kvli_backend kvli_backends[] = {
#if KVLI_CUDA
    {"cuda", KVL_BACKEND_CUDA, true, true, kvli_cu_open, kvli_cu_close, kvli_cu_supports, kvli_cu_plan,
     kvli_cu_start, kvli_cu_stop, kvli_cu_map, kvli_cu_unmap, kvli_cu_move, kvli_cu_poison, kvli_cu_step,
     kvli_cu_attend, kvli_cu_finish, kvli_cu_check, kvli_cu_recover, NULL},
#else
    {"cuda", KVL_BACKEND_CUDA, true, true, kvli_cu_open, kvli_host_close, kvli_side_supported,
     kvli_null_cache, kvli_null_cache, kvli_host_stop, kvli_null_map, kvli_null_unmap, kvli_null_copy,
     kvli_null_poison, kvli_null_cache, kvli_null_attend, kvli_null_cache, kvli_null_cache, kvli_null_cache,
     NULL},
#endif
#if KVLI_VULKAN
    {"vulkan", KVL_BACKEND_VULKAN, true, true, kvli_vk_open, kvli_vk_close, kvli_vk_supports, kvli_vk_plan,
     kvli_vk_start, kvli_vk_stop, kvli_vk_map, kvli_vk_unmap, kvli_vk_move, kvli_vk_poison, kvli_vk_step,
     kvli_vk_attend, kvli_vk_finish, kvli_vk_check, kvli_vk_recover, kvli_vk_room},
#else
    {"vulkan", KVL_BACKEND_VULKAN, true, true, kvli_vk_open, kvli_host_close, kvli_side_supported,
     kvli_null_cache, kvli_null_cache, kvli_host_stop, kvli_null_map, kvli_null_unmap, kvli_null_copy,
     kvli_null_poison, kvli_null_cache, kvli_null_attend, kvli_null_cache, kvli_null_cache, kvli_null_cache,
     NULL},
#endif
    {"cpu", KVL_BACKEND_CPU, true, true, kvli_cpu_open, kvli_host_close, kvli_side_supported, kvli_cpu_size,
     kvli_null_cache, kvli_host_stop, kvli_cpu_map, kvli_cpu_unmap, kvli_cpu_copy, kvli_cpu_poison,
     kvli_cpu_step, kvli_cpu_layer, kvli_null_cache, kvli_null_cache, kvli_null_cache, NULL},
    {"null", KVL_BACKEND_NULL, false, false, kvli_host_open, kvli_host_close, kvli_side_supported,
     kvli_null_cache, kvli_null_cache, kvli_host_stop, kvli_null_map, kvli_null_unmap, kvli_null_copy,
     kvli_null_poison, kvli_null_cache, kvli_null_attend, kvli_null_cache, kvli_null_cache, kvli_null_cache,
     NULL},
};
/* clang-format on */

/* ==== >>public: context ==== */
KVL_API const char *kvl_result_name(kvl_result r) {
    switch ((int)r) {
#define KVL_RESULT_NAME_(name, value, text) \
    case value: return #name;
        KVL_RESULTS(KVL_RESULT_NAME_)
#undef KVL_RESULT_NAME_
    default: return "UNKNOWN";
    }
}
KVL_API const char *kvl_result_text(kvl_result r) {
    switch ((int)r) {
#define KVL_RESULT_TEXT_(name, value, text) \
    case value: return text;
        KVL_RESULTS(KVL_RESULT_TEXT_)
#undef KVL_RESULT_TEXT_
    default: return "not a result of kvlite";
    }
}
KVL_API const char *kvl_match_reason_text(kvl_match_reason r) {
    static const char *const text[] = {"all that can be reused was",
                                       "the next tokens differ",
                                       "nothing cached goes on from here",
                                       "cached only under another namespace or salt",
                                       "evicted",
                                       "the shared rows stand in a packed block",
                                       "nothing is cached"};
    return (uint32_t)r < sizeof text / sizeof *text ? text[r] : "unknown";
}

static void kvli_pool_destroy(kvl_context *ctx) {
    kvli_pool *p = ctx->pool;
    if (!p) return;
    kvli_lock(&p->sleep);
    kvli_atomic_store(&p->stop, 1);
    kvli_cond_broadcast(&p->wake);
    kvli_unlock(&p->sleep);
    uint32_t capacity = ctx->desc.n_threads - 1;
    for (uint32_t i = 0; i < p->n_threads; i++) kvli_thread_join(p->threads[i]);
    kvli_cond_free(&p->wake);
    kvli_cond_free(&p->done);
    kvli_mutex_free(&p->sleep);
    kvli_mutex_free(&p->job);
    kvli_free(ctx, p, sizeof *p + capacity * sizeof(kvli_thread));
    ctx->pool = NULL;
}

static bool kvli_pool_create(kvl_context *ctx) {
    uint32_t workers = ctx->desc.n_threads - 1;
    size_t size = sizeof(kvli_pool) + workers * sizeof(kvli_thread);
    kvli_pool *p = (kvli_pool *)kvli_alloc(ctx, size);
    if (!p) return false;
    memset(p, 0, size);
    p->threads = (kvli_thread *)(p + 1);
    if (!kvli_mutex_init(&p->job) || !kvli_mutex_init(&p->sleep) || !kvli_cond_init(&p->wake) ||
        !kvli_cond_init(&p->done)) {
        kvli_free(ctx, p, size);
        return false;
    }
    ctx->pool = p;
    while (p->n_threads < workers && kvli_thread_start(&p->threads[p->n_threads], kvli_pool_main, p))
        p->n_threads++;
    if (p->n_threads == workers) return true;
    kvli_pool_destroy(ctx);
    return false;
}

static void kvli_report_skipped(char report[KVLI_REPORT_BYTES], const kvli_backend *b, const char *why) {
    size_t used = strlen(report);
    snprintf(report + used, KVLI_REPORT_BYTES - used, "%s: skipped: %s\n", b->name, why);
}

/* Opens the first backend from `first` on that works, of those asked for, and adds to the report. */
static kvl_result kvli_backend_choose(kvl_context *ctx, size_t first, kvli_text err) {
    bool automatic = ctx->desc.backend == KVL_BACKEND_AUTO;
    char why[256] = "is not known";
    for (size_t i = first; i < sizeof kvli_backends / sizeof *kvli_backends; i++) {
        const kvli_backend *b = &kvli_backends[i];
        if (automatic ? !b->automatic : ctx->desc.backend != b->kind) continue;
        ctx->backend = b;
        why[0] = 0;
        kvl_result r = b->open(ctx, kvli_text_at(why, sizeof why));
        if (r == KVL_OK) {
            size_t used = strlen(ctx->report);
            snprintf(ctx->report + used, sizeof ctx->report - used, "%s: %s%s%s\n", b->name,
                     automatic ? "chosen: the first that works" : "as asked", why[0] ? "; " : "", why);
            return KVL_OK;
        }
        kvli_report_skipped(ctx->report, b, why);
        b->close(ctx);
        if (!automatic) return kvli_fail(ctx, err, r, "backend: %s: %s", b->name, why);
    }
    return kvli_fail(ctx, err, KVL_NO_BACKEND, "backend: %d %s", (int)ctx->desc.backend, why);
}

/* With backends from `first` on, after what the report says of those before. */
static kvl_result kvli_context_new(const kvl_context_desc *desc, size_t first, const char *report,
                                   kvl_context **out) {
    kvl_context local, *ctx;
    if (out) *out = NULL;
    memset(&local, 0, sizeof local);
    snprintf(local.report, sizeof local.report, "%s", report);
    if (desc) local.desc = *desc;
    if (!local.desc.alloc) local.desc.alloc = kvli_default_alloc;
    if (!local.desc.clock) local.desc.clock = kvli_default_clock;
    kvli_text err = kvli_text_at(local.desc.error, local.desc.error_size);
    if (!out) return kvli_fail(&local, err, KVL_INVALID_ARG, "kvl_context_create: out is null");
    if (local.desc.n_threads > 1024)
        return kvli_fail(&local, err, KVL_INVALID_ARG, "n_threads: %u is more than 1024",
                         local.desc.n_threads);
    if ((uint32_t)local.desc.simd > KVL_SIMD_AVX512)
        return kvli_fail(&local, err, KVL_INVALID_ARG, "simd: %d is unknown", (int)local.desc.simd);
    local.simd = local.desc.simd ? local.desc.simd : kvli_simd_best();
    if (local.simd > kvli_simd_best())
        return kvli_fail(&local, err, KVL_UNSUPPORTED, "simd: this CPU or build has no %s",
                         kvli_simd_names[local.simd]);
    if (local.desc.cuda_stream && !local.desc.cuda_context)
        return kvli_fail(&local, err, KVL_INVALID_ARG, "cuda_stream: lent without its cuda_context");
    kvl_result r = kvli_backend_choose(&local, first, err);
    if (r != KVL_OK) return r;
    ctx = (kvl_context *)kvli_alloc(&local, sizeof *ctx);
    if (!ctx) {
        local.backend->close(&local);
        return kvli_fail(&local, err, KVL_OUT_OF_HOST_MEMORY,
                         "kvl_context_create: the allocator returned null");
    }
    *ctx = local;
    ctx->desc.error = NULL;
    if (!ctx->desc.parallel_for && ctx->desc.n_threads > 1 && !kvli_pool_create(ctx)) {
        local.backend->close(&local);
        kvli_free(&local, ctx, sizeof *ctx);
        return kvli_fail(&local, err, KVL_OUT_OF_HOST_MEMORY, "n_threads: %u threads could not be started",
                         local.desc.n_threads);
    }
    *out = ctx;
    return KVL_OK;
}

KVL_API kvl_result kvl_context_create(const kvl_context_desc *desc, kvl_context **out) {
    return kvli_context_new(desc, 0, "", out);
}

KVL_API void kvl_context_destroy(kvl_context *ctx) {
    if (!ctx) return;
    kvli_pool_destroy(ctx);
    ctx->backend->close(ctx);
    kvl_context local = *ctx;
    kvli_free(&local, ctx, sizeof *ctx);
}
KVL_API const char *kvl_context_backend(const kvl_context *ctx) { return ctx ? ctx->name : ""; }
KVL_API const char *kvl_context_report(const kvl_context *ctx) { return ctx ? ctx->report : ""; }
KVL_API kvl_result kvl_context_lend(kvl_context *ctx, void *cuda_context, void *cuda_stream) {
    return ctx && cuda_context ? kvli_cu_lend(ctx, cuda_context, cuda_stream) : KVL_INVALID_ARG;
}
KVL_API kvl_result kvl_context_lend_vulkan(kvl_context *ctx, const kvl_vulkan_desc *desc) {
    return ctx && desc ? kvli_vk_lend(ctx, desc) : KVL_INVALID_ARG;
}
KVL_API kvl_result kvl_vulkan_cache(kvl_context *ctx, void *to, size_t *bytes) {
    return ctx && bytes ? kvli_vk_blob_out(ctx, to, bytes) : KVL_INVALID_ARG;
}
KVL_API kvl_result kvl_context_memory(const kvl_context *ctx, kvl_memory_info *out) {
    if (out) memset(out, 0, sizeof *out);
    if (!ctx || !out) return KVL_INVALID_ARG;
    return ctx->backend->room ? ctx->backend->room(ctx, out) : KVL_UNSUPPORTED;
}
KVL_API int kvl_native_error(const kvl_context *ctx, const char **text) {
    if (text) *text = ctx ? ctx->native_text : "";
    return ctx ? ctx->native : 0;
}

/* ==== >>public: cache create ==== */
static bool kvli_finite(float x) { return x > -1e30f && x < 1e30f; }

static bool kvli_side_make(kvl_cache *c, kvli_side *side, const char *field, uint32_t layer, kvl_format f,
                           bool is_key, uint32_t dim, float global, kvl_result *r) {
    const char *why = "";
    if (!c->ctx->backend->supports(f, is_key, c->geo.block_tokens, dim, &why)) {
        *r = KVLI_ERROR(c, KVL_UNSUPPORTED, "%s of layer %u: %s: %s (%s)", field, layer, kvl_format_name(f),
                        why, c->ctx->backend->name);
        return false;
    }
    side->format = f & ~(kvl_format)KVL_ROTATED;
    side->rotated = (f & KVL_ROTATED) != 0;
    side->global = global > 0 ? global : 1.0f / 16;
    side->tokens = c->geo.block_tokens;
    side->dim = dim;
    side->tile_bytes = kvli_tile_size(f, c->geo.block_tokens, dim);
    return true;
}

static kvl_result kvli_geometry_check(kvl_cache *c, kvl_geometry *g) {
    const kvl_preset *preset = kvl_preset_find(g->preset ? g->preset : "int8");
    if (!preset) return KVLI_ERROR(c, KVL_INVALID_ARG, "geometry.preset: \"%s\" is unknown", g->preset);
    g->preset = preset->name;
    if (!g->n_layers || g->n_layers > 4096)
        return KVLI_ERROR(c, KVL_INVALID_ARG, "geometry.n_layers: %u is not in 1..4096", g->n_layers);
    if (!g->n_q_heads || g->n_q_heads > 4096)
        return KVLI_ERROR(c, KVL_INVALID_ARG, "geometry.n_q_heads: %u is not in 1..4096", g->n_q_heads);
    if (!g->n_kv_heads) g->n_kv_heads = g->n_q_heads;
    if (g->n_q_heads % g->n_kv_heads)
        return KVLI_ERROR(c, KVL_INVALID_ARG, "geometry.n_kv_heads: %u does not divide n_q_heads %u",
                          g->n_kv_heads, g->n_q_heads);
    if (!g->v_dim) g->v_dim = g->k_dim;
    if (g->k_dim < 16 || g->k_dim > 256 || g->k_dim % 16)
        return KVLI_ERROR(c, KVL_INVALID_ARG, "geometry.k_dim: %u is not a multiple of 16 in 16..256",
                          g->k_dim);
    if (g->v_dim < 16 || g->v_dim > 256 || g->v_dim % 16)
        return KVLI_ERROR(c, KVL_INVALID_ARG, "geometry.v_dim: %u is not a multiple of 16 in 16..256",
                          g->v_dim);
    if (!kvli_finite(g->scale)) return KVLI_ERROR(c, KVL_INVALID_ARG, "geometry.scale is not finite");
    if (g->scale == 0) g->scale = 1.0f / sqrtf((float)g->k_dim);
    if (!g->block_tokens) g->block_tokens = 32;
    if (g->block_tokens != 8 && g->block_tokens != 16 && g->block_tokens != 32 && g->block_tokens != 64)
        return KVLI_ERROR(c, KVL_INVALID_ARG, "geometry.block_tokens: %u is not 8, 16, 32 or 64",
                          g->block_tokens);
    if (!g->segment_tokens) g->segment_tokens = 1024;
    if (g->segment_tokens % 64 || g->segment_tokens > 1u << 20)
        return KVLI_ERROR(c, KVL_INVALID_ARG,
                          "geometry.segment_tokens: %u is not a multiple of 64 up to 1048576",
                          g->segment_tokens);
    if (!g->sink_blocks) g->sink_blocks = 1;
    if (!g->k_format) g->k_format = preset->k;
    if (!g->v_format) g->v_format = preset->v;
    if (!g->exact_format) g->exact_format = preset->exact;
    if (g->exact_format != KVL_F32 && g->exact_format != KVL_F16 && g->exact_format != KVL_BF16)
        return KVLI_ERROR(c, KVL_INVALID_ARG, "geometry.exact_format: %s is not f32, f16 or bf16",
                          kvl_format_name(g->exact_format));
    return KVL_OK;
}

static kvl_result kvli_layer_check(kvl_cache *c, uint32_t l, const kvl_layer *layer) {
    if (layer->shares_kv_with)
        return KVLI_ERROR(c, KVL_UNSUPPORTED, "geometry.layers[%u].shares_kv_with is not built yet", l);
    if (layer->latent_dim)
        return KVLI_ERROR(c, KVL_UNSUPPORTED, "geometry.layers[%u].latent_dim is not built yet", l);
    if (layer->state_bytes)
        return KVLI_ERROR(c, KVL_UNSUPPORTED, "geometry.layers[%u].state_bytes is not built yet", l);
    if (layer->window > 1u << 30)
        return KVLI_ERROR(c, KVL_INVALID_ARG, "geometry.layers[%u].window: %u is too large", l,
                          layer->window);
    if (layer->sink_tokens > 1u << 20)
        return KVLI_ERROR(c, KVL_INVALID_ARG, "geometry.layers[%u].sink_tokens: %u is too large", l,
                          layer->sink_tokens);
    if (!(layer->k_global >= 0) || !kvli_finite(layer->k_global))
        return KVLI_ERROR(c, KVL_INVALID_ARG, "geometry.layers[%u].k_global is negative or not finite", l);
    if (!(layer->v_global >= 0) || !kvli_finite(layer->v_global))
        return KVLI_ERROR(c, KVL_INVALID_ARG, "geometry.layers[%u].v_global is negative or not finite", l);
    if (!(layer->softcap >= 0) || !kvli_finite(layer->softcap))
        return KVLI_ERROR(c, KVL_INVALID_ARG, "geometry.layers[%u].softcap is not finite", l);
    if (!kvli_finite(layer->scale))
        return KVLI_ERROR(c, KVL_INVALID_ARG, "geometry.layers[%u].scale is not finite", l);
    return KVL_OK;
}

/* Finds or adds the group of a layer; KVL_NONE if there are too many. */
static uint32_t kvli_group_of(kvl_cache *c, uint32_t window, uint32_t sink_tokens) {
    uint32_t g = 0;
    while (g < c->geo.n_groups && (c->groups[g].window != window || c->groups[g].sink_tokens != sink_tokens))
        g++;
    if (g < c->geo.n_groups) return g;
    if (g == KVLI_MAX_GROUPS) return KVL_NONE;
    c->groups[g].window = window;
    c->groups[g].sink_tokens = sink_tokens;
    return c->geo.n_groups++, g;
}

static kvl_result kvli_layer_make(kvl_cache *c, const kvl_geometry *g, uint32_t l, const kvl_layer *d,
                                  float *sinks) {
    kvli_layer *layer = &c->geo.layers[l];
    kvl_result r = kvli_layer_check(c, l, d);
    if (r != KVL_OK) return r;
    layer->window = d->window;
    layer->sink_tokens = d->window ? d->sink_tokens : 0;
    layer->softcap = d->softcap;
    layer->scale = d->scale != 0 ? d->scale : g->scale;
    if (d->sink_logits) {
        memcpy(sinks, d->sink_logits, g->n_q_heads * sizeof *sinks);
        layer->sink_logits = sinks;
    }
    layer->group = kvli_group_of(c, layer->window, layer->sink_tokens);
    if (layer->group == KVL_NONE)
        return KVLI_ERROR(c, KVL_UNSUPPORTED, "geometry.layers: more than %d different windows",
                          KVLI_MAX_GROUPS);
    kvl_format k = d->k_format ? d->k_format : g->k_format, v = d->v_format ? d->v_format : g->v_format;
    if (!kvli_side_make(c, &layer->k[KVLI_PACKED], "k_format", l, k, true, g->k_dim, d->k_global, &r) ||
        !kvli_side_make(c, &layer->v[KVLI_PACKED], "v_format", l, v, false, g->v_dim, d->v_global, &r) ||
        !kvli_side_make(c, &layer->k[KVLI_EXACT], "exact_format", l, g->exact_format, true, g->k_dim, 0,
                        &r) ||
        !kvli_side_make(c, &layer->v[KVLI_EXACT], "exact_format", l, g->exact_format, false, g->v_dim, 0, &r))
        return r;
    kvli_group *group = &c->groups[layer->group];
    group->two_class = group->two_class || k != g->exact_format || v != g->exact_format;
    for (int e = 0; e < 2; e++) {
        layer->v_offset[e] = layer->k[e].tile_bytes;
        layer->head_stride[e] = layer->k[e].tile_bytes + layer->v[e].tile_bytes;
        layer->offset[e] = group->bytes[e];
        uint64_t bytes = group->bytes[e] + (uint64_t)layer->head_stride[e] * g->n_kv_heads;
        if (bytes > 1u << 30)
            return KVLI_ERROR(c, KVL_LIMIT, "geometry: a block of more than 1 GiB; lower block_tokens");
        group->bytes[e] = (size_t)bytes;
    }
    size_t slot = layer->head_stride[KVLI_EXACT] * g->n_kv_heads;
    if (slot > c->scratch_slot) c->scratch_slot = slot;
    return KVL_OK;
}

/* Resolves the geometry: layers, groups, classes. */
static kvl_result kvli_geometry_make(kvl_cache *c) {
    kvl_geometry *g = &c->desc.geometry;
    kvl_layer none;
    kvl_result r = kvli_geometry_check(c, g);
    if (r != KVL_OK) return r;
    memset(&none, 0, sizeof none);
    c->geo.n_layers = g->n_layers;
    c->geo.n_q_heads = g->n_q_heads;
    c->geo.n_kv_heads = g->n_kv_heads;
    c->geo.gqa = g->n_q_heads / g->n_kv_heads;
    c->geo.k_dim = g->k_dim;
    c->geo.v_dim = g->v_dim;
    c->geo.block_tokens = g->block_tokens;
    c->geo.sink_blocks = g->sink_blocks == KVL_NONE ? 0 : g->sink_blocks;
    c->geo.segment_tokens = g->segment_tokens;
    c->geo.exact = g->exact_format;
    kvli_arena a = {NULL, 0};
    float *sinks = NULL;
    for (int pass = 0; pass < 2; pass++) {
        a.used = 0;
        c->geo.layers = KVLI_CARVE(&a, kvli_layer, g->n_layers);
        sinks = KVLI_CARVE(&a, float, (size_t)g->n_layers * g->n_q_heads);
        if (pass) break;
        if (c->desc.host_bytes && a.used > c->desc.host_bytes)
            return KVLI_ERROR(c, KVL_OUT_OF_HOST_MEMORY,
                              "host_bytes: metadata of the layers alone takes %zu bytes", a.used);
        c->layer_bytes = a.used;
        c->layer_arena = a.base = (uint8_t *)kvli_alloc(c->ctx, a.used);
        if (!a.base)
            return KVLI_ERROR(c, KVL_OUT_OF_HOST_MEMORY,
                              "kvl_cache_create: the allocator returned null for %zu bytes", a.used);
    }
    memset(c->layer_arena, 0, c->layer_bytes);
    for (uint32_t l = 0; l < g->n_layers && r == KVL_OK; l++)
        r = kvli_layer_make(c, g, l, g->layers ? &g->layers[l] : &none, sinks + (size_t)l * g->n_q_heads);
    for (uint32_t k = 0; k < c->geo.n_groups; k++) {
        if (c->groups[k].two_class) c->classes[2 * k].bytes = c->groups[k].bytes[KVLI_PACKED];
        c->classes[2 * k + 1].bytes = c->groups[k].bytes[KVLI_EXACT];
    }
    return r;
}

static size_t kvli_largest_block(const kvl_cache *c) {
    size_t largest = 0;
    for (uint32_t k = 0; k < c->geo.n_groups * 2; k++)
        if (c->classes[k].bytes > largest) largest = c->classes[k].bytes;
    return largest;
}

static size_t kvli_smallest_block(const kvl_cache *c) {
    size_t smallest = kvli_largest_block(c);
    for (uint32_t k = 0; k < c->geo.n_groups * 2; k++)
        if (c->classes[k].bytes && c->classes[k].bytes < smallest) smallest = c->classes[k].bytes;
    return smallest;
}

static size_t kvli_slab_least(
    const kvl_cache *c) { /* the largest block, in units of the granularity if it is more */
    size_t bytes = kvli_largest_block(c), unit = (size_t)c->desc.slab_granularity;
    return bytes < unit ? bytes : (bytes + unit - 1) / unit * unit;
}

static uint64_t kvli_slab_set(kvl_cache *c, size_t bytes,
                              uint64_t budget) { /* returns how many slabs the budget holds */
    c->slab_bytes = bytes;
    c->max_per_slab = 0;
    for (uint32_t k = 0; k < c->geo.n_groups * 2; k++) {
        c->classes[k].partial = KVL_NONE;
        if (!c->classes[k].bytes) continue;
        c->classes[k].per_slab = (uint32_t)(bytes / c->classes[k].bytes);
        c->max_per_slab = kvli_max_u32(c->max_per_slab, c->classes[k].per_slab);
    }
    return c->slabs_most && budget / bytes > c->slabs_most ? c->slabs_most : budget / bytes;
}

/* Slab size: at least the largest block and about 1/256 of the budget, chosen so that what the classes leave
   over at its end, and the slab that each class has half empty, waste least. 0: the device can have no such slabs. */
static size_t kvli_slab_size(const kvl_cache *c, uint64_t budget) {
    size_t largest = kvli_largest_block(c), best = 0, unit = (size_t)c->desc.slab_granularity;
    double best_cost = 1e30;
    uint32_t classes = 0;
    if (c->desc.slab_bytes) return (size_t)c->desc.slab_bytes;
    for (uint32_t k = 0; k < c->geo.n_groups * 2; k++) classes += c->classes[k].bytes != 0;
    uint64_t share = c->slabs_most && c->slabs_most < 256 ? budget / c->slabs_most + 1 : budget / 256;
    size_t base = share > largest ? (size_t)share : largest;
    for (uint32_t k = 0; k < c->geo.n_groups * 2; k++) {
        size_t bytes = c->classes[k].bytes;
        if (!bytes) continue;
        for (size_t n = (base + bytes - 1) / bytes, i = 0; i < 16; i++, n++) {
            size_t size = n * bytes;
            if (size >= unit) size = (size + unit - 1) / unit * unit;
            if (c->slab_most && size > c->slab_most) break;
            double slack = 0, weight = 0;
            for (uint32_t j = 0; j < c->geo.n_groups * 2; j++) {
                if (!c->classes[j].bytes) continue;
                double w = j & 1 ? 1 : 3; /* most of a long context is packed */
                slack += w * (double)(size % c->classes[j].bytes) / (double)size;
                weight += w;
            }
            double cost = slack / weight + 0.5 * classes * (double)size / (double)(budget ? budget : 1);
            if (cost < best_cost) {
                best_cost = cost;
                best = size;
            }
        }
    }
    return best;
}

static uint32_t kvli_longest(const kvl_cache *c, uint32_t limit, uint32_t n_slabs,
                             bool empty) { /* longest sequence that fits */
    uint32_t low = 0, high = limit, need[KVLI_MAX_CLASSES];
    while (low < high) {
        uint32_t mid = low + (high - low + 1) / 2;
        kvli_need(c, mid, c->geo.block_tokens, need);
        if (kvli_fits(c, need, n_slabs, empty, NULL))
            low = mid;
        else
            high = mid - 1;
    }
    return low;
}

/* Everything that create decides before it allocates. */
static kvl_result kvli_cache_plan(kvl_cache *c) {
    kvl_cache_desc *d = &c->desc;
    if (!d->device_bytes)
        return KVLI_ERROR(c, KVL_INVALID_ARG, "device_bytes is required: the budget for KV blocks");
    if (!d->max_device_bytes) d->max_device_bytes = d->device_bytes;
    if (d->max_device_bytes < d->device_bytes)
        return KVLI_ERROR(c, KVL_INVALID_ARG, "max_device_bytes is below device_bytes");
    if (!d->max_sequences) d->max_sequences = 256;
    if (d->max_sequences > 65535)
        return KVLI_ERROR(c, KVL_INVALID_ARG, "max_sequences: %u is more than 65535", d->max_sequences);
    if (!d->max_seq_tokens) d->max_seq_tokens = 131072;
    if (d->max_seq_tokens > 1u << 27)
        return KVLI_ERROR(c, KVL_INVALID_ARG, "max_seq_tokens: %u is more than 134217728", d->max_seq_tokens);
    if (!d->max_step_tokens) d->max_step_tokens = 512;
    if (d->max_step_tokens > 1u << 20)
        return KVLI_ERROR(c, KVL_INVALID_ARG, "max_step_tokens: %u is more than 1048576", d->max_step_tokens);
    if (d->slab_granularity > 1u << 30)
        return KVLI_ERROR(c, KVL_INVALID_ARG, "slab_granularity: %llu is more than 1 GiB",
                          (unsigned long long)d->slab_granularity);
    if (d->lookup_hash_bits > 32)
        return KVLI_ERROR(c, KVL_INVALID_ARG, "lookup_hash_bits: %u is more than 32", d->lookup_hash_bits);
    kvl_result r = kvli_geometry_make(c);
    if (r != KVL_OK) return r;
    uint32_t T = c->geo.block_tokens, need[KVLI_MAX_CLASSES];
    bool two = false;
    for (uint32_t g = 0; g < c->geo.n_groups; g++) two = two || c->groups[g].two_class;
    if (two && (uint64_t)c->scratch_slot * (d->max_step_tokens / T) > SIZE_MAX / 2)
        return KVLI_ERROR(c, KVL_LIMIT, "max_step_tokens: %u rows take more scratch than can be addressed",
                          d->max_step_tokens);
    c->scratch_bytes = two ? c->scratch_slot * (d->max_step_tokens / T) : 0;
    r = c->ctx->backend->plan(c);
    if (r != KVL_OK) return r;
    if (!d->slab_granularity) d->slab_granularity = 1;
    c->fixed_bytes = (uint64_t)c->scratch_bytes + c->workspace_bytes;
    if (d->max_device_bytes / kvli_smallest_block(c) >= KVL_ENTRY_ID)
        return KVLI_ERROR(c, KVL_LIMIT, "max_device_bytes: %llu bytes are more than 2^30 blocks",
                          (unsigned long long)d->max_device_bytes);
    uint64_t room = d->max_device_bytes > c->fixed_bytes ? d->max_device_bytes - c->fixed_bytes : 0,
             least = 0, slabs;
    kvli_need(c, 2 * T, T, need);
    size_t bytes = kvli_slab_size(c, room);
    if (c->slab_most && d->slab_bytes > c->slab_most)
        return KVLI_ERROR(c, KVL_UNSUPPORTED, "slab_bytes: %llu, a buffer of this device has at most %llu",
                          (unsigned long long)d->slab_bytes, (unsigned long long)c->slab_most);
    if (!bytes || bytes < kvli_largest_block(c))
        return KVLI_ERROR(
            c, KVL_UNSUPPORTED,
            "max_device_bytes: %llu for blocks, of up to %zu bytes, are more than the %u buffers of %llu "
            "bytes that this device can have",
            (unsigned long long)room, kvli_largest_block(c), c->slabs_most, (unsigned long long)c->slab_most);
    slabs = kvli_slab_set(c, bytes, room);
    if (!kvli_fits(c, need, (uint32_t)slabs, true, NULL)) slabs = kvli_slab_set(c, kvli_slab_least(c), room);
    if (!kvli_fits(c, need, (uint32_t)slabs, true, &least))
        return KVLI_ERROR(
            c, KVL_NO_BLOCKS,
            "device_bytes: %llu is too small: one sequence of two blocks takes %llu (%llu of it scratch)",
            (unsigned long long)d->max_device_bytes,
            (unsigned long long)(least * c->slab_bytes + c->fixed_bytes), (unsigned long long)c->fixed_bytes);
    c->least_bytes = least * c->slab_bytes + c->fixed_bytes;
    c->max_slabs = (uint32_t)slabs;
    c->max_blocks = c->max_slabs * c->max_per_slab;
    c->max_seqs = d->max_sequences;
    d->max_seq_tokens = kvli_longest(c, d->max_seq_tokens, c->max_slabs, true);
    c->seq_blocks = kvli_div_up(d->max_seq_tokens, T) + 1;
    c->max_spans = kvli_min_u32(c->max_seqs, d->max_step_tokens);
    c->max_logits = d->max_step_tokens + c->max_seqs;
    c->max_nodes = c->max_blocks + c->max_seqs + 64;
    c->n_ghosts = 4096;
    for (c->n_buckets = 64; c->n_buckets < c->max_nodes; c->n_buckets *= 2) {
    }
    return KVL_OK;
}

static void kvli_step_carve(kvl_cache *c, kvli_arena *a) {
    kvli_step_state *st = &c->step;
    size_t G = c->geo.n_groups,
           own = G * ((size_t)c->desc.max_step_tokens / c->geo.block_tokens + 2 * (size_t)c->max_spans);
    st->undo = KVLI_CARVE(a, kvli_undo, own);
    st->own = KVLI_CARVE(a, uint32_t, own);
    st->copies = KVLI_CARVE(a, kvl_copy, G * c->max_spans);
    st->spans = KVLI_CARVE(a, kvl_step_span, c->max_spans);
    st->blocks = KVLI_CARVE(a, kvl_span_blocks, G * c->max_spans);
    st->attend = KVLI_CARVE(a, kvli_attend_span, G * c->max_spans);
    st->tokens = KVLI_CARVE(a, int32_t, c->desc.max_step_tokens);
    st->positions = KVLI_CARVE(a, uint32_t, c->desc.max_step_tokens);
    st->row_span = KVLI_CARVE(a, uint32_t, c->desc.max_step_tokens);
    st->logit_rows = KVLI_CARVE(a, uint32_t, c->max_logits);
    st->logit_requests = KVLI_CARVE(a, uint32_t, c->max_logits);
    st->logit_users = KVLI_CARVE(a, void *, c->max_logits);
    st->done = KVLI_CARVE(a, uint8_t, c->geo.n_layers);
    st->taint = KVLI_CARVE(a, uint8_t, c->max_spans);
}

static void kvli_cache_carve(kvl_cache *c, kvli_arena *a) {
    size_t G = c->geo.n_groups, T = c->geo.block_tokens;
    c->slabs = KVLI_CARVE(a, kvli_slab, c->max_slabs);
    c->slot_block = KVLI_CARVE(a, uint32_t, c->max_blocks);
    c->slot_free = KVLI_CARVE(a, uint32_t, c->max_blocks);
    c->blocks = KVLI_CARVE(a, kvli_block, c->max_blocks);
    c->address = KVLI_CARVE(a, uint64_t, c->max_blocks);
    c->free_ids = KVLI_CARVE(a, uint32_t, c->max_blocks);
    c->check = KVLI_CARVE(a, uint32_t, c->max_blocks);
    c->nodes = KVLI_CARVE(a, kvli_node, c->max_nodes);
    c->node_tokens = KVLI_CARVE(a, int32_t, (size_t)c->max_nodes * T);
    c->node_slots = KVLI_CARVE(a, uint32_t, (size_t)c->max_nodes * G);
    c->buckets = KVLI_CARVE(a, uint32_t, c->n_buckets);
    c->ghosts = KVLI_CARVE(a, uint64_t, c->n_ghosts);
    c->seqs = KVLI_CARVE(a, kvli_seq, c->max_seqs);
    c->tables = KVLI_CARVE(a, uint32_t, (size_t)c->max_seqs * G * c->seq_blocks);
    c->tails = KVLI_CARVE(a, int32_t, (size_t)c->max_seqs * T);
    c->reserves = KVLI_CARVE(a, kvli_reserve, (size_t)c->max_seqs * G * 2);
    c->free_seqs = KVLI_CARVE(a, uint32_t, c->max_seqs);
    c->path = KVLI_CARVE(a, uint32_t, c->seq_blocks);
    c->layer_group = KVLI_CARVE(a, uint32_t, c->geo.n_layers);
    c->backend_state = KVLI_CARVE(a, uint8_t, c->backend_bytes);
    kvli_step_carve(c, a);
}

static void kvli_cache_lists(kvl_cache *c) { /* everything free */
    uint32_t salt = (uint32_t)((uintptr_t)c >> 6) *
                    0x9E3779B9u; /* so that another cache's handles are not taken for ours */
    for (uint32_t i = 0; i < c->max_slabs; i++) {
        c->slabs[i].address = 0;
        c->slabs[i].klass = KVL_NONE;
        c->slabs[i].next = i + 1 < c->max_slabs ? i + 1 : KVL_NONE;
    }
    c->free_slab = KVL_NONE;
    memset(c->slot_block, 0xff, (size_t)c->max_blocks * sizeof *c->slot_block);
    for (uint32_t i = 0; i < c->max_blocks; i++) {
        c->blocks[i].slab = KVL_NONE;
        c->blocks[i].refs = 0;
        c->address[i] = 0;
        c->free_ids[i] = c->max_blocks - 1 - i;
    }
    c->n_free_ids = c->max_blocks;
    for (uint32_t i = 0; i < KVLI_LRU_LISTS; i++) c->lru_head[i] = c->lru_tail[i] = KVL_NONE;
    for (uint32_t i = 0; i < c->max_nodes; i++) {
        c->nodes[i].used = false;
        c->nodes[i].next = i + 1 < c->max_nodes ? i + 1 : KVL_NONE;
    }
    c->roots = KVL_NONE;
    memset(c->ghosts, 0, (size_t)c->n_ghosts * sizeof *c->ghosts);
    memset(c->buckets, 0xff, (size_t)c->n_buckets * sizeof *c->buckets);
    for (uint32_t i = 0; i < c->max_seqs; i++) {
        c->seqs[i].open = false;
        c->seqs[i].generation = (salt + i * 31) >> 16;
        c->free_seqs[i] = c->max_seqs - 1 - i;
    }
    c->n_free_seqs = c->max_seqs;
    for (uint32_t l = 0; l < c->geo.n_layers; l++) c->layer_group[l] = c->geo.layers[l].group;
}

static void kvli_step_views(kvl_cache *c) { /* the public step's arrays stay where they are */
    kvli_step_state *st = &c->step;
    kvl_step *v = &st->views[0];
    v->tokens = st->tokens;
    v->positions = st->positions;
    v->row_span = st->row_span;
    v->spans = st->spans;
    v->logit_rows = st->logit_rows;
    v->logit_requests = st->logit_requests;
    v->logit_users = st->logit_users;
    v->n_groups = c->geo.n_groups;
    v->blocks = st->blocks;
    v->block_address = c->address;
    v->layer_group = c->layer_group;
    v->copies = st->copies;
    v->scratch_slot_bytes = c->scratch_slot;
    st->views[1] = *v;
    st->view = v;
}

static void kvli_unpin_path(kvl_cache *c, uint32_t node);
static uint32_t kvli_loose_pins(const kvl_cache *c, uint32_t n);

/* ---- slabs from and to the backend ---- */
static void kvli_fixed_unmap(kvl_cache *c) {
    if (c->scratch) c->ctx->backend->unmap(c, KVL_NONE, (size_t)c->fixed_bytes, c->scratch);
    c->scratch = c->workspace = 0;
}

static kvl_result kvli_fixed_map(kvl_cache *c) {
    if (c->scratch || !c->fixed_bytes) return KVL_OK;
    kvl_result r = c->ctx->backend->map(c, KVL_NONE, (size_t)c->fixed_bytes, &c->scratch);
    c->workspace = r == KVL_OK ? c->scratch + c->scratch_bytes : 0;
    if (r != KVL_OK) c->scratch = 0;
    return r;
}

static kvl_result kvli_slab_map(kvl_cache *c) {
    uint32_t s = c->unmapped_slab;
    kvl_result r = c->ctx->backend->map(c, s, c->slab_bytes, &c->slabs[s].address);
    if (r != KVL_OK) {
        c->slabs[s].address = 0;
        return r;
    }
    c->unmapped_slab = c->slabs[s].next;
    c->slabs[s].next = c->free_slab;
    c->free_slab = s;
    c->n_free_slabs++;
    c->n_slabs++;
    c->epoch++;
    if (c->desc.poison) c->ctx->backend->poison(c, c->slabs[s].address, c->slab_bytes);
    return KVL_OK;
}

static void kvli_slab_unmap(kvl_cache *c) { /* there is a free one */
    uint32_t s = c->free_slab;
    c->free_slab = c->slabs[s].next;
    c->n_free_slabs--;
    c->n_slabs--;
    c->epoch++;
    c->ctx->backend->unmap(c, s, c->slab_bytes, c->slabs[s].address);
    c->slabs[s].address = 0;
    c->slabs[s].next = c->unmapped_slab;
    c->unmapped_slab = s;
}

static uint32_t kvli_slabs_in(const kvl_cache *c, uint64_t bytes) {
    if (bytes <= c->fixed_bytes) return 0;
    uint64_t n = (bytes - c->fixed_bytes) / c->slab_bytes;
    return n > c->max_slabs ? c->max_slabs : (uint32_t)n;
}

KVL_API void kvl_cache_destroy(kvl_cache *c) {
    if (!c) return;
    kvl_context *ctx = c->ctx;
    bool own = c->own_ctx;
    for (uint32_t s = 0; c->arena && s < c->max_slabs; s++)
        if (c->slabs[s].address) ctx->backend->unmap(c, s, c->slab_bytes, c->slabs[s].address);
    kvli_fixed_unmap(c);
    if (c->arena) ctx->backend->stop(c);
    kvli_free(ctx, c->arena, c->arena_bytes);
    kvli_free(ctx, c->layer_arena, c->layer_bytes);
    kvli_mutex_free(&c->lock);
    kvli_free(ctx, c, sizeof *c);
    if (own) kvl_context_destroy(ctx);
}

static kvl_result kvli_resize(kvl_cache *c, uint64_t device_bytes, uint64_t *held_bytes);

/* ---- the budget in force, where the backend knows how much room the device has ----
   Of what this process may still take and what the cache has, 70%: others grow, too. */
enum { KVLI_POLL_STEPS = 16, KVLI_GROW_LATER = 64 };

static uint64_t kvli_budget_of(const kvl_cache *c, uint64_t asked, kvl_memory_info *m) {
    uint64_t have = c->scratch ? (uint64_t)c->n_slabs * c->slab_bytes + c->fixed_bytes : 0;
    memset(m, 0, sizeof *m);
    if (!c->ctx->backend->room || c->ctx->backend->room(c->ctx, m) != KVL_OK) return asked;
    uint64_t left = m->budget + have > m->used ? m->budget + have - m->used : 0, most = left / 10 * 7;
    return asked < most ? asked : most;
}

static void kvli_budget_log(const kvl_cache *c, const char *why, const kvl_memory_info *m) {
    char text[224];
    snprintf(text, sizeof text,
             "%s: %llu of %llu MiB of the cache's budget are in use; of the device's memory this process "
             "has %llu of %llu MiB",
             why, (unsigned long long)(c->stats.device_budget >> 20),
             (unsigned long long)(c->stats.device_asked >> 20), (unsigned long long)(m->used >> 20),
             (unsigned long long)(m->budget >> 20));
    if (c->ctx->desc.log) c->ctx->desc.log(c->ctx->desc.user, KVL_LOG_INFO, text);
}

static kvl_result kvli_budget_first(kvl_cache *c) { /* at create */
    kvl_memory_info m;
    uint64_t asked = c->desc.device_bytes, budget = kvli_budget_of(c, asked, &m);
    c->stats.device_asked = asked;
    c->stats.device_budget = budget;
    c->until_poll = KVLI_POLL_STEPS;
    if (budget < asked && budget < c->least_bytes)
        return KVLI_ERROR(
            c, KVL_OUT_OF_DEVICE_MEMORY,
            "the device has %llu MiB left for this process: 70%% of it is less than the %llu MiB "
            "that one sequence of two blocks takes",
            (unsigned long long)(m.available >> 20), (unsigned long long)(c->least_bytes >> 20));
    if (budget < asked) kvli_budget_log(c, "little memory is left", &m);
    return KVL_OK;
}

/* Between steps: gives back what the driver wants back, and takes it again, in larger pieces, when there is room. */
static void kvli_budget_poll(kvl_cache *c) {
    kvl_memory_info m;
    if (!c->ctx->backend->room || --c->until_poll) return;
    c->until_poll = KVLI_POLL_STEPS;
    uint64_t before = c->stats.device_budget, now = before, asked = c->stats.device_asked,
             to = kvli_budget_of(c, asked, &m);
    if (!m.live) return;
    if (c->n_slabs < kvli_slabs_in(c, now)) /* it could not grow to its budget: it tries again */
        now = (uint64_t)c->n_slabs * c->slab_bytes + c->fixed_bytes;
    bool shrink = m.used > m.budget && to < now;
    if (shrink && to < c->least_bytes) to = now < c->least_bytes ? now : c->least_bytes;
    if (to == now || (!shrink && (to < now || (to < asked && to - now < asked / 8)))) return;
    if (!shrink && c->until_grow && --c->until_grow) return;
    if (kvli_resize(c, to, NULL) == KVL_OUT_OF_DEVICE_MEMORY) c->until_grow = KVLI_GROW_LATER;
    if (c->stats.device_budget != before)
        kvli_budget_log(c, shrink ? "memory is short" : "memory is there again", &m);
}

static kvl_result kvli_cache_build(kvl_cache *c) {
    kvli_arena a = {NULL, 0};
    kvl_result r = kvli_cache_plan(c);
    if (r != KVL_OK) return r;
    kvli_cache_carve(c, &a);
    uint64_t host = (uint64_t)a.used + c->layer_bytes + sizeof *c + c->pinned_bytes;
    if (a.used == SIZE_MAX || (c->desc.host_bytes && host > c->desc.host_bytes))
        return KVLI_ERROR(c, KVL_OUT_OF_HOST_MEMORY, "host_bytes: metadata takes %llu bytes",
                          (unsigned long long)host);
    c->arena = a.base = (uint8_t *)kvli_alloc(c->ctx, a.used);
    if (!a.base)
        return KVLI_ERROR(c, KVL_OUT_OF_HOST_MEMORY,
                          "kvl_cache_create: the allocator returned null for %zu bytes", a.used);
    c->arena_bytes = a.used;
    a.used = 0;
    kvli_cache_carve(c, &a);
    if (c->backend_bytes)
        memset(c->backend_state, 0, c->backend_bytes); /* stop takes one that was not started */
    kvli_cache_lists(c);
    kvli_step_views(c);
    c->stats.bytes_metadata = host;
    c->stats.slab_bytes = c->slab_bytes;
    r = kvli_budget_first(c);
    if (r == KVL_OK) r = c->ctx->backend->start(c);
    if (r != KVL_OK) return r;
    uint32_t target = kvli_slabs_in(c, c->stats.device_budget);
    if (target) r = kvli_fixed_map(c);
    if (r != KVL_OK)
        return KVLI_ERROR(c, r, "no memory for %llu bytes of scratch. %s", (unsigned long long)c->fixed_bytes,
                          c->ctx->native_text);
    while (c->n_slabs < target) {
        r = kvli_slab_map(c);
        if (r != KVL_OK)
            return KVLI_ERROR(c, r, "no memory for slab %u of %u (%zu bytes each). %s", c->n_slabs + 1,
                              target, c->slab_bytes, c->ctx->native_text);
    }
    kvli_publish(c);
    return KVL_OK;
}

/* Makes the object in a context; plan_only: only what create would decide. *why, where it fails. */
static kvl_result kvli_cache_in(kvl_context *ctx, const kvl_cache_desc *desc, bool plan_only, kvli_text why,
                                kvl_cache **out) {
    kvl_cache *c = (kvl_cache *)kvli_alloc(ctx, sizeof *c);
    bool locked = false;
    if (c) {
        memset(c, 0, sizeof *c);
        c->ctx = ctx;
        c->desc = *desc;
        c->desc.error = NULL;
        locked = kvli_mutex_init(&c->lock);
    }
    if (!locked) {
        if (c) kvli_free(ctx, c, sizeof *c);
        return kvli_fail(ctx, why, KVL_OUT_OF_HOST_MEMORY, "kvl_cache_create: the allocator returned null");
    }
    kvl_result r = plan_only ? kvli_cache_plan(c) : kvli_cache_build(c);
    if (r == KVL_OK) {
        *out = c;
        return r;
    }
    if (why.at && why.size) snprintf(why.at, why.size, "%s", c->error);
    kvl_cache_destroy(c);
    return r;
}

/* The same with a context of its own, where none is given: what AUTO's first backend does not take, the next may. */
static kvl_result kvli_cache_new(const kvl_cache_desc *desc, bool plan_only, kvl_cache **out) {
    kvli_text err = kvli_text_at(desc->error, desc->error_size);
    kvl_context_desc d = desc->context_desc;
    char report[KVLI_REPORT_BYTES] = "", why[256];
    size_t first = 0;
    if (desc->context) return kvli_cache_in(desc->context, desc, plan_only, err, out);
    if (!d.error) {
        d.error = desc->error;
        d.error_size = desc->error_size;
    }
    for (;;) {
        kvl_context *ctx;
        kvl_result r = kvli_context_new(&d, first, report, &ctx);
        if (r != KVL_OK) return r;
        r = kvli_cache_in(ctx, desc, plan_only, kvli_text_at(why, sizeof why), out);
        if (r == KVL_OK) {
            (*out)->own_ctx = true;
            return r;
        }
        bool again = (r == KVL_UNSUPPORTED || r == KVL_DEVICE_LOST) /* the latter: by a test of its shaders */
                     && d.backend == KVL_BACKEND_AUTO && ctx->backend->kind != KVL_BACKEND_CPU;
        if (again) kvli_report_skipped(report, ctx->backend, why);
        first = (size_t)(ctx->backend - kvli_backends) + 1;
        kvl_context_destroy(ctx);
        if (again) continue;
        if (err.at && err.size) snprintf(err.at, err.size, "%s", why);
        return r;
    }
}

KVL_API kvl_result kvl_cache_create(const kvl_cache_desc *desc, kvl_cache **out) {
    if (out) *out = NULL;
    if (!desc || !out) return KVL_INVALID_ARG;
    return kvli_cache_new(desc, false, out);
}

KVL_API kvl_result kvl_cache_defaults(const kvl_cache_desc *desc, kvl_cache_desc *out) {
    kvl_cache *c = NULL;
    if (!desc || !out) return KVL_INVALID_ARG;
    kvl_result r = kvli_cache_new(desc, true, &c);
    if (r != KVL_OK) return r;
    *out = c->desc;
    out->error = desc->error;
    kvl_cache_destroy(c);
    return KVL_OK;
}

KVL_API kvl_context *kvl_cache_context(kvl_cache *c) { return c ? c->ctx : NULL; }
KVL_API const char *kvl_last_error(const kvl_cache *c) { return c ? c->error : "the cache is null"; }

KVL_API kvl_result kvl_get_stats(kvl_cache *c, kvl_stats *out) {
    if (!c || !out) return KVL_INVALID_ARG;
    kvli_lock(&c->lock);
    *out = c->published;
    kvli_sched_stats(c, out);
    kvli_unlock(&c->lock);
    return KVL_OK;
}

KVL_API kvl_result kvl_cache_resize(kvl_cache *c, uint64_t device_bytes, uint64_t *held_bytes) {
    if (held_bytes) *held_bytes = 0;
    if (!c) return KVL_INVALID_ARG;
    if (c->step.open) return KVLI_ERROR(c, KVL_BUSY, "kvl_cache_resize: a step is open");
    if (device_bytes > c->desc.max_device_bytes)
        return KVLI_ERROR(c, KVL_INVALID_ARG, "device_bytes: %llu is above max_device_bytes %llu",
                          (unsigned long long)device_bytes, (unsigned long long)c->desc.max_device_bytes);
    kvl_result r = c->ctx->backend->check(c);
    if (r != KVL_OK) return r;
    kvl_memory_info m;
    uint64_t budget = kvli_budget_of(c, device_bytes, &m);
    c->stats.device_asked = device_bytes;
    r = kvli_resize(c, budget, held_bytes);
    if (budget < device_bytes) kvli_budget_log(c, "little memory is left", &m);
    return r;
}

static kvl_result kvli_resize(kvl_cache *c, uint64_t device_bytes, uint64_t *held_bytes) {
    uint32_t target = kvli_slabs_in(c, device_bytes);
    kvl_result r = KVL_OK, room;
    while (c->n_slabs > target) {
        if (c->n_free_slabs)
            kvli_slab_unmap(c);
        else if (!kvli_compact(c) && !kvli_evict_one(c) && !kvli_sched_preempt_any(c))
            break;
    }
    if (c->n_slabs > target) {
        uint64_t held = (uint64_t)c->n_slabs * c->slab_bytes + c->fixed_bytes;
        if (held_bytes) *held_bytes = held;
        r = KVLI_ERROR(c, KVL_NO_BLOCKS, "kvl_cache_resize: open and pinned sequences hold %llu bytes",
                       (unsigned long long)held);
    }
    if (!c->n_slabs && !target) kvli_fixed_unmap(c);
    room = c->n_slabs < target ? kvli_fixed_map(c) : KVL_OK;
    while (room == KVL_OK && c->n_slabs < target) room = kvli_slab_map(c);
    if (room != KVL_OK) {
        if (!c->n_slabs) kvli_fixed_unmap(c);
        r = KVLI_ERROR(c, room, "kvl_cache_resize: memory for %u of %u slabs. %s", c->n_slabs, target,
                       c->ctx->native_text);
    }
    c->stats.device_budget =
        r == KVL_NO_BLOCKS ? (uint64_t)c->n_slabs * c->slab_bytes + c->fixed_bytes : device_bytes;
    kvli_record_resize(c, device_bytes, r);
    kvli_publish(c);
    kvli_sched_resized(c);
    return r;
}

/* A sequence of the caller forgets what it holds and goes on from its root, empty. */
static void kvli_seq_forget(kvl_cache *c, uint32_t i) {
    kvli_seq *seq = &c->seqs[i];
    uint32_t root = seq->node;
    while (root != KVL_NONE && c->nodes[root].parent != KVL_NONE) root = c->nodes[root].parent;
    if (seq->pin_node != KVL_NONE) kvli_unpin_path(c, seq->pin_node);
    seq->pin_node = KVL_NONE;
    kvli_seq_cut(c, i, 0);
    kvli_reserve_free(c, i);
    kvli_seq_node(c, i, root);
    seq->length = 0;
    seq->tail_known = true;
    seq->attached = seq->keep && !seq->tainted && root != KVL_NONE;
}

/* Nothing is cached or pinned any more, and no slab is in use. */
static void kvli_forget_all(kvl_cache *c) {
    while (kvli_sched_preempt_any(c)) {
    }
    for (uint32_t i = 0; i < c->max_seqs; i++)
        if (c->seqs[i].open) kvli_seq_forget(c, i);
    for (uint32_t n = 0; n < c->max_nodes; n++)
        while (c->nodes[n].used && c->nodes[n].pins && kvli_loose_pins(c, n)) kvli_unpin_path(c, n);
    while (kvli_evict_one(c)) {
    }
}

KVL_API kvl_result kvl_cache_recover(kvl_cache *c) {
    if (!c) return KVL_INVALID_ARG;
    if (c->step.open) return KVLI_ERROR(c, KVL_BUSY, "kvl_cache_recover: a step is open: abort it");
    uint32_t before = c->n_slabs, target = kvli_slabs_in(c, c->stats.device_budget);
    kvli_forget_all(c);
    if (c->sched) kvli_record_event(c->sched, KVL_EVENT_RECOVER);
    while (c->n_free_slabs) kvli_slab_unmap(c);
    kvli_fixed_unmap(c);
    kvl_result r = c->ctx->backend->recover(c);
    if (r == KVL_OK && target) r = kvli_fixed_map(c);
    while (r == KVL_OK && c->n_slabs < target) r = kvli_slab_map(c);
    if (!c->n_slabs) kvli_fixed_unmap(c);
    if (c->n_slabs != before) kvli_record_resize(c, c->stats.device_budget, r);
    if (c->n_slabs < before) c->epoch += 2 * (before - c->n_slabs); /* as where a recording is replayed */
    kvli_publish(c);
    kvli_sched_resized(c);
    return r;
}

KVL_API kvl_result kvl_can_fit(kvl_cache *c, uint32_t n_sequences, uint32_t n_tokens, kvl_fit *fit) {
    uint32_t need[KVLI_MAX_CLASSES], none[KVLI_MAX_CLASSES];
    uint64_t slabs = 0, used = 0, alone = 0;
    if (fit) memset(fit, 0, sizeof *fit);
    if (!c || !n_sequences || !n_tokens || n_sequences > c->max_seqs) return KVL_INVALID_ARG;
    memset(none, 0, sizeof none);
    kvli_need(c, kvli_min_u32(n_tokens, 1u << 28), c->geo.block_tokens, need);
    bool fits = kvli_fits_n(c, need, n_sequences, c->n_slabs, false, &slabs);
    bool ever =
        kvli_fits_n(c, need, n_sequences, c->max_slabs, true, &alone) && n_tokens <= c->desc.max_seq_tokens;
    kvli_fits(c, none, c->n_slabs, false, &used);
    if (fit) {
        fit->need_bytes = alone * c->slab_bytes;
        fit->free_bytes = (c->n_slabs - kvli_min_u32(c->n_slabs, (uint32_t)used)) * (uint64_t)c->slab_bytes;
        fit->short_bytes = slabs > c->n_slabs ? (slabs - c->n_slabs) * c->slab_bytes : 0;
        fit->max_tokens = kvli_longest(c, c->desc.max_seq_tokens, c->n_slabs, false);
        fit->fits_empty = ever;
    }
    return !ever ? KVL_NEVER_FITS : fits ? KVL_OK : KVL_NO_BLOCKS;
}

KVL_API kvl_result kvl_cache_layout(const kvl_cache *c, uint32_t layer, bool exact, kvl_block_layout *out) {
    if (!c || !out || layer >= c->geo.n_layers) return KVL_INVALID_ARG;
    const kvli_layer *l = &c->geo.layers[layer];
    int e = exact ? KVLI_EXACT : KVLI_PACKED;
    memset(out, 0, sizeof *out);
    out->group = l->group;
    out->k_format = l->k[e].format | (l->k[e].rotated ? (kvl_format)KVL_ROTATED : 0);
    out->v_format = l->v[e].format | (l->v[e].rotated ? (kvl_format)KVL_ROTATED : 0);
    out->block_bytes = c->groups[l->group].bytes[e];
    out->layer_offset = l->offset[e];
    out->head_stride = l->head_stride[e];
    out->v_offset = l->v_offset[e];
    out->max_blocks = c->max_blocks;
    return KVL_OK;
}

/* ==== >>public: sequences and steps ==== */
static bool kvli_desc_tokens_ok(const kvl_seq_desc *d) {
    return d && (d->tokens || !d->n_tokens) && d->priority < KVLI_PRIORITIES;
}

KVL_API kvl_result kvl_seq_open(kvl_cache *c, const kvl_seq_desc *desc, kvl_seq *out, kvl_reuse *reuse) {
    if (out) out->id = 0;
    if (reuse) memset(reuse, 0, sizeof *reuse);
    if (!c) return KVL_INVALID_ARG;
    if (!out || !kvli_desc_tokens_ok(desc))
        return KVLI_ERROR(c, KVL_INVALID_ARG,
                          "kvl_seq_open: desc or out is null, tokens are null, or priority is above 7");
    if (c->step.open) return KVLI_ERROR(c, KVL_BUSY, "kvl_seq_open: a step is open");
    if (desc->n_tokens > c->desc.max_seq_tokens)
        return KVLI_ERROR(c, KVL_LIMIT, "n_tokens: %u is more than max_seq_tokens %u", desc->n_tokens,
                          c->desc.max_seq_tokens);
    if (!c->n_free_seqs) return KVLI_ERROR(c, KVL_LIMIT, "max_sequences: all %u are open", c->max_seqs);
    kvli_match m = kvli_match_find(c, desc);
    uint32_t i = kvli_seq_start(c, desc, &m);
    *out = kvli_seq_handle(c, i);
    kvli_record_desc(c, KVL_EVENT_SEQ_OPEN, desc, i, m.length);
    if (reuse) kvli_reuse_report(desc, &m, reuse);
    kvli_publish(c);
    return KVL_OK;
}

/* The index behind a handle for a call that needs the sequence between steps. */
static kvl_result kvli_seq_idle(kvl_cache *c, kvl_seq h, const char *call, uint32_t *i) {
    if (!c) return KVL_INVALID_ARG;
    *i = kvli_seq_index(c, h);
    if (*i == KVL_NONE)
        return KVLI_ERROR(c, KVL_INVALID_HANDLE, "%s: sequence %08x is not open here", call, h.id);
    if (c->step.open) return KVLI_ERROR(c, KVL_BUSY, "%s: a step is open", call);
    return KVL_OK;
}

/* The same for a call that changes the sequence. */
static kvl_result kvli_seq_mine(kvl_cache *c, kvl_seq h, const char *call, uint32_t *i) {
    kvl_result r = kvli_seq_idle(c, h, call, i);
    if (r == KVL_OK && c->seqs[*i].scheduled)
        return KVLI_ERROR(c, KVL_INVALID_ARG, "%s: sequence %08x belongs to the scheduler", call, h.id);
    return r;
}

KVL_API kvl_result kvl_seq_extend(kvl_cache *c, kvl_seq h, uint32_t n_tokens) {
    uint32_t i, need[KVLI_MAX_CLASSES], taken[KVLI_MAX_CLASSES];
    kvl_result r = kvli_seq_mine(c, h, "kvl_seq_extend", &i);
    if (r != KVL_OK) return r;
    if (n_tokens > c->desc.max_seq_tokens - c->seqs[i].length)
        return KVLI_ERROR(c, KVL_LIMIT, "kvl_seq_extend: %u + %u tokens is more than max_seq_tokens %u",
                          c->seqs[i].length, n_tokens, c->desc.max_seq_tokens);
    kvli_growth(c, i, c->seqs[i].length + n_tokens, need);
    memset(taken, 0, sizeof taken);
    for (uint32_t k = 0; k < c->geo.n_groups * 2 && r == KVL_OK; k++)
        while (kvli_reserve_of(c, i, k)->count < need[k]) {
            uint32_t entry = kvli_block_alloc(c, k);
            if (entry == KVL_NONE) {
                r = KVL_NO_BLOCKS;
                break;
            }
            kvli_reserve_push(c, i, entry);
            taken[k]++;
        }
    for (uint32_t k = 0; k < c->geo.n_groups * 2 && r != KVL_OK; k++)
        for (; taken[k]; taken[k]--) {
            kvli_reserve *reserve = kvli_reserve_of(c, i, k);
            uint32_t id = reserve->head;
            reserve->head = c->blocks[id].next;
            reserve->count--;
            kvli_unref(c, id);
        }
    kvli_record_call(c, KVL_EVENT_SEQ_EXTEND, i, 2, n_tokens, r != KVL_OK, KVL_NONE);
    if (r == KVL_OK) c->seqs[i].extended = kvli_max_u32(c->seqs[i].extended, c->seqs[i].length + n_tokens);
    kvli_publish(c);
    return r == KVL_OK ? r : KVLI_ERROR(c, r, "kvl_seq_extend: no blocks for %u more tokens", n_tokens);
}

KVL_API kvl_result kvl_seq_fork(kvl_cache *c, kvl_seq h, kvl_seq *out, uint32_t *length) {
    uint32_t i;
    if (out) out->id = 0;
    kvl_result r = kvli_seq_idle(c, h, "kvl_seq_fork", &i);
    if (r != KVL_OK) return r;
    if (!out) return KVLI_ERROR(c, KVL_INVALID_ARG, "kvl_seq_fork: out is null");
    if (!c->n_free_seqs) return KVLI_ERROR(c, KVL_LIMIT, "max_sequences: all %u are open", c->max_seqs);
    uint32_t copy = kvli_seq_copy(c, i);
    *out = kvli_seq_handle(c, copy);
    kvli_record_call(c, KVL_EVENT_SEQ_FORK, i, 2, copy, c->seqs[i].length, copy);
    if (length) *length = c->seqs[i].length;
    kvli_publish(c);
    return KVL_OK;
}

KVL_API kvl_result kvl_seq_trim(kvl_cache *c, kvl_seq h, uint32_t n_tokens, uint32_t *length) {
    uint32_t i;
    kvl_result r = kvli_seq_mine(c, h, "kvl_seq_trim", &i);
    if (r != KVL_OK) return r;
    uint32_t reached = kvli_seq_shorten(c, i, n_tokens);
    if (length) *length = reached;
    kvli_record_call(c, KVL_EVENT_SEQ_TRIM, i, 2, n_tokens, reached, i);
    kvli_publish(c);
    return KVL_OK;
}

static void kvli_pin_path(kvl_cache *c, uint32_t node) {
    for (uint32_t n = node; n != KVL_NONE; n = c->nodes[n].parent) {
        for (uint32_t g = 0; g < c->geo.n_groups && !c->nodes[n].pins; g++) {
            uint32_t entry = kvli_slots(c, n)[g];
            if (entry == KVL_NONE || kvli_block_at(c, entry)->refs) continue;
            kvli_lru_remove(c, entry & KVL_ENTRY_ID);
            c->classes[kvli_block_at(c, entry)->klass].pinned++;
        }
        c->nodes[n].pins++;
    }
}

static void kvli_unpin_path(kvl_cache *c, uint32_t node) {
    uint32_t parent;
    for (uint32_t n = node; n != KVL_NONE; n = parent) { /* deepest first, as eviction wants it */
        parent = c->nodes[n].parent;
        c->nodes[n].pins--;
        for (uint32_t g = 0; g < c->geo.n_groups && !c->nodes[n].pins; g++) {
            uint32_t entry = kvli_slots(c, n)[g];
            if (entry == KVL_NONE || kvli_block_at(c, entry)->refs) continue;
            c->classes[kvli_block_at(c, entry)->klass].pinned--;
            kvli_lru_push(c, entry & KVL_ENTRY_ID);
        }
    }
    kvli_node_tidy(c, node);
}

KVL_API kvl_result kvl_seq_pin(kvl_cache *c, kvl_seq h, bool pin) {
    uint32_t i;
    kvl_result r = kvli_seq_idle(c, h, "kvl_seq_pin", &i);
    if (r != KVL_OK) return r;
    uint32_t old = c->seqs[i].pin_node, node = c->seqs[i].node;
    if (pin && node == KVL_NONE)
        return KVLI_ERROR(c, KVL_INVALID_ARG, "kvl_seq_pin: the sequence has nothing in the prefix tree");
    if (pin) kvli_pin_path(c, node);
    if (old != KVL_NONE) kvli_unpin_path(c, old);
    c->seqs[i].pin_node = pin ? node : KVL_NONE;
    kvli_record_call(c, KVL_EVENT_SEQ_PIN, i, 1, pin, 0, KVL_NONE);
    kvli_publish(c);
    return KVL_OK;
}

/* Pins that end at this node and belong to no open sequence: those that kvl_prefix_unpin may take. */
static uint32_t kvli_loose_pins(const kvl_cache *c, uint32_t n) {
    uint32_t pins = c->nodes[n].pins;
    for (uint32_t k = c->nodes[n].first_child; k != KVL_NONE; k = c->nodes[k].next) pins -= c->nodes[k].pins;
    for (uint32_t i = 0; i < c->max_seqs; i++) pins -= c->seqs[i].open && c->seqs[i].pin_node == n;
    return pins;
}

KVL_API kvl_result kvl_prefix_unpin(kvl_cache *c, const kvl_seq_desc *d, uint32_t *n_tokens) {
    if (n_tokens) *n_tokens = 0;
    if (!c) return KVL_INVALID_ARG;
    if (!kvli_desc_tokens_ok(d))
        return KVLI_ERROR(c, KVL_INVALID_ARG, "kvl_prefix_unpin: desc or its tokens are null");
    if (c->step.open) return KVLI_ERROR(c, KVL_BUSY, "kvl_prefix_unpin: a step is open");
    uint32_t T = c->geo.block_tokens, at = kvli_root_find(c, d->name_space, d->salt), deepest = KVL_NONE;
    for (uint32_t done = 0; at != KVL_NONE && c->nodes[at].pins; done += T) {
        if (kvli_loose_pins(c, at)) deepest = at;
        if (done + T > d->n_tokens) break;
        at = kvli_child(c, at, d->tokens + done);
    }
    if (deepest == KVL_NONE) return KVL_OK;
    if (n_tokens) *n_tokens = c->nodes[deepest].depth * T;
    kvli_record_desc(c, KVL_EVENT_UNPIN, d, KVL_NONE, c->nodes[deepest].depth * T);
    kvli_unpin_path(c, deepest);
    kvli_publish(c);
    return KVL_OK;
}

KVL_API kvl_result kvl_seq_close(kvl_cache *c, kvl_seq h) {
    uint32_t i;
    kvl_result r = kvli_seq_mine(c, h, "kvl_seq_close", &i);
    if (r != KVL_OK) return r;
    kvli_record_call(c, KVL_EVENT_SEQ_CLOSE, i, 0, 0, 0, KVL_NONE);
    kvli_seq_stop(c, i);
    kvli_publish(c);
    return KVL_OK;
}

KVL_API kvl_result kvl_seq_length(const kvl_cache *c, kvl_seq h, uint32_t *length) {
    if (!c || !length) return KVL_INVALID_ARG;
    uint32_t i = kvli_seq_index((kvl_cache *)c, h);
    if (i == KVL_NONE) return KVL_INVALID_HANDLE;
    *length = c->seqs[i].length;
    return KVL_OK;
}

KVL_API bool kvl_seq_tainted(const kvl_cache *c, kvl_seq h) {
    uint32_t i = c ? kvli_seq_index((kvl_cache *)c, h) : KVL_NONE;
    return i != KVL_NONE && c->seqs[i].tainted;
}

static kvl_result kvli_span_check(kvl_cache *c, const kvl_span *span, uint32_t s, uint32_t *rows,
                                  uint32_t *logits) {
    uint32_t i = kvli_seq_index(c, span->seq);
    if (i == KVL_NONE)
        return KVLI_ERROR(c, KVL_INVALID_HANDLE, "spans[%u].seq: %08x is not open here", s, span->seq.id);
    if (c->seqs[i].scheduled)
        return KVLI_ERROR(c, KVL_INVALID_ARG, "spans[%u].seq: %08x belongs to the scheduler", s,
                          span->seq.id);
    if (!span->tokens || !span->n_tokens) return KVLI_ERROR(c, KVL_INVALID_ARG, "spans[%u]: no tokens", s);
    if (span->n_logits > span->n_tokens)
        return KVLI_ERROR(c, KVL_INVALID_ARG, "spans[%u].n_logits: %u is more than its %u tokens", s,
                          span->n_logits, span->n_tokens);
    if (span->n_tokens > c->desc.max_step_tokens - *rows)
        return KVLI_ERROR(c, KVL_LIMIT, "spans[%u]: more than max_step_tokens %u in one step", s,
                          c->desc.max_step_tokens);
    if (span->n_tokens > c->desc.max_seq_tokens - c->seqs[i].length)
        return KVLI_ERROR(c, KVL_LIMIT, "spans[%u]: %u + %u tokens is more than max_seq_tokens %u", s,
                          c->seqs[i].length, span->n_tokens, c->desc.max_seq_tokens);
    *rows += span->n_tokens;
    *logits += span->n_logits;
    return KVL_OK;
}

KVL_API kvl_result kvl_step_begin(kvl_cache *c, const kvl_span *spans, uint32_t n_spans,
                                  const kvl_step **out) {
    uint32_t rows = 0, logits = 0;
    kvl_result r = KVL_OK;
    if (out) *out = NULL;
    if (!c) return KVL_INVALID_ARG;
    if (!out || !spans || !n_spans)
        return KVLI_ERROR(c, KVL_INVALID_ARG, "kvl_step_begin: no spans, or out is null");
    if (c->step.open) return KVLI_ERROR(c, KVL_BUSY, "kvl_step_begin: a step is open");
    r = c->ctx->backend->check(c);
    if (r != KVL_OK) return r;
    kvli_budget_poll(c);
    if (n_spans > c->max_spans)
        return KVLI_ERROR(c, KVL_LIMIT, "kvl_step_begin: %u spans are more than %u", n_spans, c->max_spans);
    for (uint32_t s = 0; s < n_spans; s++) {
        r = kvli_span_check(c, &spans[s], s, &rows, &logits);
        if (r != KVL_OK) return r;
    }
    kvli_step_reset(c);
    for (uint32_t s = 0; s < n_spans && r == KVL_OK; s++) {
        uint32_t i = kvli_seq_index(c, spans[s].seq), first = c->step.n_rows;
        if (c->seqs[i].step_span != KVL_NONE)
            r = KVLI_ERROR(c, KVL_INVALID_ARG, "spans[%u].seq: a sequence stands twice in the step", s);
        else
            r = kvli_step_add(c, i, &spans[s], 0);
        if (r == KVL_NO_BLOCKS)
            KVLI_ERROR(c, r, "spans[%u]: no blocks for %u more tokens", s, spans[s].n_tokens);
        for (uint32_t k = spans[s].n_tokens - spans[s].n_logits; k < spans[s].n_tokens && r == KVL_OK; k++)
            kvli_step_logit(c, first + k, 0, spans[s].user);
    }
    kvl_result finished = r == KVL_OK ? kvli_step_finish(c) : r;
    if (r != KVL_OK) kvli_step_rollback(c);
    kvli_record_step(c, spans, n_spans, r);
    if (r == KVL_OK && finished != KVL_OK) { /* in a recording: a step and its abort */
        kvli_step_rollback(c);
        if (c->sched) kvli_record_event(c->sched, KVL_EVENT_STEP_ABORT);
    }
    if (finished == KVL_OK) *out = c->step.view;
    kvli_publish(c);
    return finished;
}

KVL_API kvl_result kvl_step_end(kvl_cache *c, const kvl_step *step) {
    if (!c) return KVL_INVALID_ARG;
    kvl_result r = kvli_step_complete(c, step, "kvl_step_end");
    if (r != KVL_OK) return r;
    if (kvli_sched_owns_step(c))
        return KVLI_ERROR(c, KVL_MISMATCH, "kvl_step_end: the scheduler's step is ended by kvl_sched_commit");
    kvli_step_commit(c);
    kvli_record_step_end(c);
    kvli_publish(c);
    return KVL_OK;
}

KVL_API kvl_result kvl_step_abort(kvl_cache *c, const kvl_step *step) {
    if (!c) return KVL_INVALID_ARG;
    kvl_result r = kvli_step_is(c, step, "kvl_step_abort");
    if (r != KVL_OK) return r;
    if (kvli_sched_owns_step(c))
        return KVLI_ERROR(c, KVL_MISMATCH,
                          "kvl_step_abort: the scheduler's step is aborted by kvl_sched_abort");
    kvli_step_rollback(c);
    if (c->sched) kvli_record_event(c->sched, KVL_EVENT_STEP_ABORT);
    kvli_publish(c);
    return KVL_OK;
}

static bool kvli_tensor_fill(const kvl_tensor *in, uint32_t heads, uint32_t dim, const kvli_backend *backend,
                             kvl_tensor *out) {
    if (!in || (backend->has_memory && !in->data) || (uint32_t)in->dtype > KVL_DTYPE_BF16 ||
        (uint32_t)in->memory > KVL_MEMORY_DEVICE)
        return false;
    bool is_buffer =
        in->memory == KVL_MEMORY_DEVICE && backend->kind == KVL_BACKEND_VULKAN; /* and no address */
    uint64_t at = is_buffer ? in->offset : (uintptr_t)in->data;
    if (in->memory == KVL_MEMORY_DEVICE && at % (in->dtype == KVL_DTYPE_F32 ? 4 : 2)) return false;
    *out = *in;
    if (!out->head_stride) out->head_stride = dim;
    if (!out->row_stride) out->row_stride = (size_t)heads * dim;
    return true;
}

/* May this layer of this step run? */
static kvl_result kvli_layer_open(kvl_cache *c, const kvl_step *step, uint32_t layer, const char *call) {
    kvl_result r = kvli_step_is(c, step, call);
    if (r != KVL_OK) return r;
    if (layer >= c->geo.n_layers)
        return KVLI_ERROR(c, KVL_INVALID_ARG, "%s: layer %u of %u", call, layer, c->geo.n_layers);
    if (c->step.done[layer])
        return KVLI_ERROR(c, KVL_MISMATCH, "%s: layer %u has run in this step", call, layer);
    if (c->step.failed != KVL_OK)
        return KVLI_ERROR(c, c->step.failed, "%s: a layer of this step failed: abort it", call);
    return KVL_OK;
}

static void kvli_layer_done(kvl_cache *c, uint32_t layer) {
    c->step.done[layer] = 1;
    c->step.layers_done++;
}

KVL_API kvl_result kvl_attend(kvl_cache *c, const kvl_step *step, uint32_t layer, const kvl_tensor *q,
                              const kvl_tensor *k, const kvl_tensor *v, const kvl_tensor *out) {
    kvli_attend a;
    if (!c) return KVL_INVALID_ARG;
    kvl_result r = kvli_layer_open(c, step, layer, "kvl_attend");
    if (r != KVL_OK) return r;
    const kvli_backend *backend = c->ctx->backend;
    memset(&a, 0, sizeof a);
    const char *bad = !kvli_tensor_fill(q, c->geo.n_q_heads, c->geo.k_dim, backend, &a.q)       ? "q"
                      : !kvli_tensor_fill(k, c->geo.n_kv_heads, c->geo.k_dim, backend, &a.k)    ? "k"
                      : !kvli_tensor_fill(v, c->geo.n_kv_heads, c->geo.v_dim, backend, &a.v)    ? "v"
                      : !kvli_tensor_fill(out, c->geo.n_q_heads, c->geo.v_dim, backend, &a.out) ? "out"
                                                                                                : NULL;
    if (bad)
        return KVLI_ERROR(c, KVL_INVALID_ARG,
                          "kvl_attend: tensor %s is null, not aligned, or of an unknown dtype or memory",
                          bad);
    if (a.k.memory != a.q.memory || a.v.memory != a.q.memory || a.out.memory != a.q.memory)
        return KVLI_ERROR(c, KVL_INVALID_ARG,
                          "kvl_attend: some tensors are in host memory, some in the device's");
    if (a.q.memory == KVL_MEMORY_DEVICE && c->ctx->backend->kind == KVL_BACKEND_CPU)
        return KVLI_ERROR(c, KVL_INVALID_ARG, "kvl_attend: tensors in device memory: the backend is the CPU");
    a.geo = &c->geo;
    a.layer = &c->geo.layers[layer];
    a.spans = &c->step.attend[(size_t)a.layer->group * c->max_spans];
    a.n_spans = c->step.n_spans;
    a.n_rows = c->step.n_rows;
    a.block_address = c->address;
    a.scratch = (uint8_t *)(uintptr_t)c->scratch;
    a.scratch_slot = c->scratch_slot;
    a.workspace = (void *)(uintptr_t)c->workspace;
    a.workspace_bytes = c->workspace_bytes;
    a.taint = c->step.taint;
    r = c->ctx->backend->attend(c, &a);
    if (r == KVL_OK)
        kvli_layer_done(c, layer);
    else if (r != KVL_INVALID_ARG)
        c->step.failed = r;
    return r;
}

KVL_API kvl_result kvl_step_replayed(kvl_cache *c, const kvl_step *step) {
    if (!c) return KVL_INVALID_ARG;
    kvl_result r = kvli_step_is(c, step, "kvl_step_replayed");
    if (r != KVL_OK) return r;
    if (c->ctx->backend->kind != KVL_BACKEND_CUDA)
        return KVLI_ERROR(c, KVL_UNSUPPORTED, "kvl_step_replayed: the backend is %s, which has no graphs",
                          c->ctx->backend->name);
    for (uint32_t l = 0; l < c->geo.n_layers; l++)
        if (!c->step.done[l]) kvli_layer_done(c, l);
    return KVL_OK;
}

KVL_API kvl_result kvl_step_record(kvl_cache *c, const kvl_step *step, void *command_buffer) {
    if (!c) return KVL_INVALID_ARG;
    kvl_result r = kvli_step_is(c, step, "kvl_step_record");
    if (r != KVL_OK) return r;
    if (c->ctx->backend->kind != KVL_BACKEND_VULKAN)
        return KVLI_ERROR(c, KVL_UNSUPPORTED,
                          "kvl_step_record: the backend is %s, which has no command buffers",
                          c->ctx->backend->name);
    return kvli_vk_step_record(c, command_buffer);
}

KVL_API kvl_result kvl_step_layer_done(kvl_cache *c, const kvl_step *step, uint32_t layer,
                                       const uint8_t *tainted) {
    if (!c) return KVL_INVALID_ARG;
    kvl_result r = kvli_layer_open(c, step, layer, "kvl_step_layer_done");
    if (r != KVL_OK) return r;
    for (uint32_t s = 0; tainted && s < c->step.n_spans; s++) c->step.taint[s] |= tainted[s] != 0;
    kvli_layer_done(c, layer);
    return KVL_OK;
}

/* ==== >>validate: every invariant ==== */
#define KVLI_MUST(condition, ...)                                         \
    do {                                                                  \
        if (!(condition)) return KVLI_ERROR(c, KVL_CORRUPT, __VA_ARGS__); \
    } while (0)

static kvl_result kvli_check_slabs(kvl_cache *c) {
    uint32_t mapped = 0, free_slabs = 0, live[KVLI_MAX_CLASSES] = {0}, slabs[KVLI_MAX_CLASSES] = {0};
    for (uint32_t s = 0; s < c->max_slabs; s++) {
        const kvli_slab *slab = &c->slabs[s];
        uint32_t taken = 0;
        mapped += slab->address != 0;
        if (slab->klass == KVL_NONE) {
            free_slabs += slab->address != 0;
            continue;
        }
        KVLI_MUST(slab->address, "slab %u is in use and not mapped", s);
        KVLI_MUST(slab->klass < c->geo.n_groups * 2 && c->classes[slab->klass].bytes, "slab %u has class %u",
                  s, slab->klass);
        uint32_t per = c->classes[slab->klass].per_slab;
        for (uint32_t slot = 0; slot < per; slot++) {
            uint32_t id = c->slot_block[(size_t)s * c->max_per_slab + slot];
            if (id == KVL_NONE) continue;
            taken++;
            KVLI_MUST(id < c->max_blocks && c->blocks[id].slab == s && c->blocks[id].slot == slot,
                      "slab %u slot %u: block %u stands elsewhere", s, slot, id);
            KVLI_MUST(c->blocks[id].klass == slab->klass, "block %u: class differs from its slab's", id);
            KVLI_MUST(c->address[id] == slab->address + (uint64_t)slot * c->classes[slab->klass].bytes,
                      "block %u: address is wrong", id);
        }
        KVLI_MUST(taken && taken == slab->live && slab->n_free == per - taken,
                  "slab %u: %u live, %u free, %u found", s, slab->live, slab->n_free, taken);
        live[slab->klass] += taken;
        slabs[slab->klass]++;
    }
    KVLI_MUST(mapped == c->n_slabs && free_slabs == c->n_free_slabs,
              "%u slabs mapped, %u free: counted %u, %u", c->n_slabs, c->n_free_slabs, mapped, free_slabs);
    uint32_t all = 0;
    for (uint32_t k = 0; k < c->geo.n_groups * 2; k++) {
        uint32_t with_room = 0, linked = 0;
        KVLI_MUST(live[k] == c->classes[k].live && slabs[k] == c->classes[k].slabs,
                  "class %u: counts are off", k);
        for (uint32_t s = 0; s < c->max_slabs; s++) with_room += c->slabs[s].klass == k && c->slabs[s].n_free;
        for (uint32_t s = c->classes[k].partial; s != KVL_NONE && linked <= c->max_slabs;
             s = c->slabs[s].next)
            linked++;
        KVLI_MUST(with_room == linked, "class %u: partial list has %u of %u slabs", k, linked, with_room);
        all += live[k];
    }
    KVLI_MUST(all + c->n_free_ids == c->max_blocks, "%u blocks live and %u ids free of %u", all,
              c->n_free_ids, c->max_blocks);
    return KVL_OK;
}

/* c->check counts the references that tables, reserves and the open step hold. */
static kvl_result kvli_count_refs(kvl_cache *c) {
    const kvli_step_state *st = &c->step;
    memset(c->check, 0, (size_t)c->max_blocks * sizeof *c->check);
    for (uint32_t i = 0; i < c->max_seqs; i++) {
        const kvli_seq *seq = &c->seqs[i];
        if (!seq->open) continue;
        bool in_step = st->open && seq->step_span != KVL_NONE;
        for (uint32_t g = 0; g < c->geo.n_groups; g++) {
            uint32_t n = in_step ? st->attend[(size_t)g * c->max_spans + seq->step_span].blocks.n_blocks
                                 : seq->n_blocks;
            for (uint32_t j = 0; j < n; j++) {
                uint32_t entry = kvli_table(c, i, g)[j];
                if (entry == KVL_NONE) continue;
                KVLI_MUST((entry & KVL_ENTRY_ID) < c->max_blocks &&
                              c->blocks[entry & KVL_ENTRY_ID].slab != KVL_NONE,
                          "sequence %u block %u: entry %08x is not live", i, j, entry);
                KVLI_MUST(kvli_entry(c, entry & KVL_ENTRY_ID) == entry,
                          "sequence %u block %u: entry %08x has the wrong class", i, j, entry);
                KVLI_MUST(c->blocks[entry & KVL_ENTRY_ID].klass / 2u == g,
                          "sequence %u block %u: block of another group", i, j);
                c->check[entry & KVL_ENTRY_ID]++;
            }
        }
        for (uint32_t k = 0; k < c->geo.n_groups * 2; k++) {
            uint32_t n = 0;
            for (uint32_t id = kvli_reserve_of(c, i, k)->head; id != KVL_NONE && n <= c->max_blocks;
                 id = c->blocks[id].next, n++)
                c->check[id]++;
            KVLI_MUST(n == kvli_reserve_of(c, i, k)->count, "sequence %u: reserve of class %u", i, k);
        }
    }
    for (uint32_t u = 0; u < st->n_undo; u++) {
        if (st->undo[u].old_entry != KVL_NONE) c->check[st->undo[u].old_entry & KVL_ENTRY_ID]++;
        if (st->undo[u].own_entry != KVL_NONE) c->check[st->undo[u].own_entry & KVL_ENTRY_ID]++;
    }
    return KVL_OK;
}

static kvl_result kvli_check_blocks(kvl_cache *c) {
    uint32_t cached[KVLI_MAX_CLASSES] = {0}, pinned[KVLI_MAX_CLASSES] = {0}, shared[KVLI_MAX_CLASSES] = {0},
             listed = 0, in_lists = 0;
    kvl_result r = kvli_count_refs(c);
    if (r != KVL_OK) return r;
    for (uint32_t id = 0; id < c->max_blocks; id++) {
        const kvli_block *b = &c->blocks[id];
        if (b->slab == KVL_NONE) {
            KVLI_MUST(!c->check[id], "block %u is free and referenced", id);
            continue;
        }
        KVLI_MUST(b->refs == c->check[id], "block %u: %u references, %u found", id, b->refs, c->check[id]);
        KVLI_MUST(b->refs || b->node != KVL_NONE, "block %u is leaked", id);
        if (b->node != KVL_NONE)
            KVLI_MUST(c->nodes[b->node].used && kvli_slots(c, b->node)[b->klass / 2u] == kvli_entry(c, id),
                      "block %u: its node does not hold it", id);
        bool alone = !b->refs, pin = b->node != KVL_NONE && c->nodes[b->node].pins;
        KVLI_MUST((b->lru != KVLI_NO_LRU) == (alone && !pin), "block %u: evictable or not, wrongly", id);
        cached[b->klass] += alone && !pin;
        pinned[b->klass] += alone && pin;
        shared[b->klass] += b->refs > 1;
        in_lists += b->lru != KVLI_NO_LRU;
    }
    for (uint32_t k = 0; k < c->geo.n_groups * 2; k++)
        KVLI_MUST(cached[k] == c->classes[k].cached && pinned[k] == c->classes[k].pinned &&
                      shared[k] == c->classes[k].shared,
                  "class %u: cached %u, pinned %u, shared %u; counted %u, %u, %u", k, c->classes[k].cached,
                  c->classes[k].pinned, c->classes[k].shared, cached[k], pinned[k], shared[k]);
    for (uint32_t p = 0; p < KVLI_LRU_LISTS; p++)
        for (uint32_t id = c->lru_head[p], prev = KVL_NONE; id != KVL_NONE && listed <= c->max_blocks;
             prev = id, id = c->blocks[id].next) {
            KVLI_MUST(c->blocks[id].lru == p && c->blocks[id].prev == prev, "block %u: LRU links", id);
            listed++;
        }
    KVLI_MUST(listed == in_lists, "LRU lists have %u blocks of %u", listed, in_lists);
    return KVL_OK;
}

static kvl_result kvli_check_node(kvl_cache *c, uint32_t n) {
    const kvli_node *node = &c->nodes[n];
    uint32_t T = c->geo.block_tokens, slots = 0, seqs = 0, children = 0;
    for (uint32_t g = 0; g < c->geo.n_groups; g++) {
        uint32_t entry = kvli_slots(c, n)[g];
        if (entry == KVL_NONE) continue;
        slots++;
        KVLI_MUST(c->blocks[entry & KVL_ENTRY_ID].slab != KVL_NONE &&
                      c->blocks[entry & KVL_ENTRY_ID].node == n,
                  "node %u: its block does not know it", n);
        if (!c->groups[g].window && node->parent != KVL_NONE && c->nodes[node->parent].parent != KVL_NONE)
            KVLI_MUST(kvli_slots(c, node->parent)[g] != KVL_NONE,
                      "node %u: full-attention slot under an empty one", n);
    }
    for (uint32_t i = 0; i < c->max_seqs; i++) seqs += c->seqs[i].open && c->seqs[i].node == n;
    KVLI_MUST(slots == node->n_slots && seqs == node->seqs, "node %u: %u slots, %u sequences; counted %u, %u",
              n, node->n_slots, node->seqs, slots, seqs);
    for (int list = 0; list < 2; list++)
        for (uint32_t k = list ? node->first_partial : node->first_child; k != KVL_NONE;
             k = c->nodes[k].next) {
            KVLI_MUST(c->nodes[k].used && c->nodes[k].parent == n && (c->nodes[k].n_tokens == T) == !list &&
                          ++children <= c->max_nodes,
                      "node %u: child %u", n, k);
            KVLI_MUST(c->nodes[k].pins <= node->pins && c->nodes[k].priority <= node->priority,
                      "node %u: child %u is pinned or ranked higher", n, k);
        }
    KVLI_MUST(slots || seqs || children || node->pins, "node %u holds and leads to nothing", n);
    if (node->n_tokens < T) return KVL_OK;
    KVLI_MUST(kvli_child(c, node->parent, kvli_node_toks(c, n)) == n, "node %u is not found by its tokens",
              n);
    KVLI_MUST(node->depth == c->nodes[node->parent].depth + 1, "node %u: depth", n);
    return KVL_OK;
}

static kvl_result kvli_check_tree(kvl_cache *c) {
    uint32_t used = 0;
    for (uint32_t n = 0; n < c->max_nodes; n++) {
        if (!c->nodes[n].used) continue;
        used++;
        kvl_result r = kvli_check_node(c, n);
        if (r != KVL_OK) return r;
    }
    KVLI_MUST(used == c->n_nodes, "%u nodes, counted %u", c->n_nodes, used);
    return KVL_OK;
}

static kvl_result kvli_check_seqs(kvl_cache *c) {
    uint32_t T = c->geo.block_tokens, open = 0;
    for (uint32_t i = 0; i < c->max_seqs; i++) {
        const kvli_seq *seq = &c->seqs[i];
        if (!seq->open) continue;
        open++;
        KVLI_MUST(seq->length <= c->desc.max_seq_tokens && seq->n_blocks == kvli_div_up(seq->length, T),
                  "sequence %u: %u tokens in %u blocks", i, seq->length, seq->n_blocks);
        KVLI_MUST(kvli_node_depth(c, seq->node) <= seq->length / T, "sequence %u: its node is too deep", i);
        KVLI_MUST(!seq->attached ||
                      (seq->node != KVL_NONE && kvli_node_depth(c, seq->node) == seq->length / T),
                  "sequence %u: attached to the wrong depth", i);
        for (uint32_t g = 0; g < c->geo.n_groups; g++) {
            uint32_t window = c->groups[g].window, sinks = kvli_div_up(c->groups[g].sink_tokens, T);
            uint32_t from = window && seq->length + 1 > window ? (seq->length + 1 - window) / T : 0;
            for (uint32_t j = 0; j < seq->n_blocks; j++) {
                uint32_t entry = kvli_table(c, i, g)[j];
                KVLI_MUST(entry != KVL_NONE || (j >= sinks && j < from),
                          "sequence %u lacks block %u of group %u", i, j, g);
                if (entry == KVL_NONE || (c->step.open && seq->step_span != KVL_NONE)) continue;
                bool exact = kvli_stays_exact(c, g, j) || (j + 1) * T > seq->length;
                KVLI_MUST(exact == ((entry & KVL_ENTRY_EXACT) != 0), "sequence %u block %u: wrong class", i,
                          j);
            }
        }
    }
    KVLI_MUST(open == c->stats.sequences && open + c->n_free_seqs == c->max_seqs,
              "%u sequences open, %u free", open, c->n_free_seqs);
    return KVL_OK;
}

/* Two sequences of a step must not write one block. */
static kvl_result kvli_check_step(kvl_cache *c) {
    const kvli_step_state *st = &c->step;
    for (uint32_t g = 0; g < c->geo.n_groups && st->open; g++)
        for (uint32_t s = 0; s < st->n_spans; s++) {
            const kvl_span_blocks *b = &st->attend[(size_t)g * c->max_spans + s].blocks;
            for (uint32_t i = 0; i < b->n_own; i++) {
                uint32_t own = b->own[i], entry = b->table[b->first_own + i];
                KVLI_MUST(own & KVL_ENTRY_SCRATCH || kvli_is_private(c, own),
                          "step: span %u writes block %08x, which is shared", s, own);
                KVLI_MUST(entry != KVL_NONE && kvli_is_private(c, entry),
                          "step: span %u seals into block %08x, which is shared", s, entry);
            }
        }
    return KVL_OK;
}

static kvl_result kvli_check_sched(kvl_cache *c) { /* under the lock */
    kvl_sched *s = c->sched;
    uint32_t active = 0, running = 0, waiting = 0, streams = 0, joining = 0, forks = 0, queued = 0;
    uint64_t bytes = 0;
    if (!s) return KVL_OK;
    for (uint32_t r = 0; r < s->max_reqs; r++) {
        const kvli_req *q = &s->reqs[r];
        bytes += q->tokens ? (uint64_t)q->capacity * sizeof *q->tokens : 0;
        if (!q->used || q->finished) {
            KVLI_MUST(!q->used || q->seq == KVL_NONE, "request %u has ended and holds a sequence", r);
            continue;
        }
        active++;
        running += q->seq != KVL_NONE;
        forks += q->parent != KVL_NONE;
        joining += q->joining;
        streams += q->decode && q->klass == KVL_INTERACTIVE;
        if (q->seq == KVL_NONE) continue;
        KVLI_MUST(c->seqs[q->seq].open && c->seqs[q->seq].length < q->n_tokens, "request %u: sequence", r);
        KVLI_MUST(!q->decode || c->seqs[q->seq].length + 1 == q->n_tokens,
                  "request %u: decodes with %u of %u tokens", r, c->seqs[q->seq].length, q->n_tokens);
    }
    for (uint32_t l = 0; l < KVLI_WAIT_LISTS; l++)
        for (uint32_t r = s->waiting[l].head, prev = KVL_NONE; r != KVL_NONE && waiting <= s->max_reqs;
             prev = r, r = s->reqs[r].next, waiting++) {
            KVLI_MUST(s->reqs[r].prev == prev &&
                          (prev == KVL_NONE || s->reqs[prev].arrival < s->reqs[r].arrival),
                      "waiting list %u at request %u", l, r);
            KVLI_MUST(s->reqs[r].used && !s->reqs[r].finished && s->reqs[r].seq == KVL_NONE,
                      "waiting list %u: request %u does not wait", l, r);
        }
    for (uint32_t r = s->inbox.head; r != KVL_NONE && queued <= s->max_reqs; r = s->reqs[r].next) queued++;
    KVLI_MUST(active == s->n_active && running == s->n_running && streams == s->n_streams,
              "scheduler: %u active, %u running, %u streams; counted %u, %u, %u", s->n_active, s->n_running,
              s->n_streams, active, running, streams);
    KVLI_MUST(waiting == s->n_waiting && queued == s->n_inbox &&
                  waiting + running + forks + queued == active && joining == s->n_joining,
              "scheduler: %u waiting, %u queued, %u forks, %u joining", waiting, queued, forks, joining);
    KVLI_MUST(bytes == s->token_bytes, "scheduler: token bytes %llu, counted %llu",
              (unsigned long long)s->token_bytes, (unsigned long long)bytes);
    for (uint32_t i = 0; i + 1 < s->n_running; i++)
        KVLI_MUST(kvli_outranks(s, s->running[i], s->running[i + 1]), "scheduler: running out of rank at %u",
                  i);
    return KVL_OK;
}

KVL_API kvl_result kvl_validate(kvl_cache *c) {
    if (!c) return KVL_INVALID_ARG;
    kvl_result r = kvli_check_slabs(c);
    if (r == KVL_OK) r = kvli_check_blocks(c);
    if (r == KVL_OK) r = kvli_check_tree(c);
    if (r == KVL_OK) r = kvli_check_seqs(c);
    if (r == KVL_OK) r = kvli_check_step(c);
    if (r != KVL_OK) return r;
    uint64_t device = (uint64_t)c->n_slabs * c->slab_bytes + (c->scratch ? c->fixed_bytes : 0);
    KVLI_MUST(device <= c->stats.device_budget || !c->n_slabs, "ledger: %llu bytes above the budget",
              (unsigned long long)device);
    kvli_lock(&c->lock);
    r = kvli_check_sched(c);
    kvli_unlock(&c->lock);
    return r;
}
#endif /* KVLITE_IMPLEMENTED */
#endif /* KVL_IMPLEMENTATION */
