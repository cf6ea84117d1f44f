/* Of the host side of Vulkan, what is Vulkan's alone: finding and creating a device, buffers with memory, command buffers. C for
   kvlite.h (>>vulkan); the text of this file stands in the generated kvlite_vulkan_kernels.h, and says nothing to others. */
#if defined(KVLITE_IMPLEMENTED) && !defined(KVLI_VULKAN_DEVICE_H)
#define KVLI_VULKAN_DEVICE_H

enum {
    KVLI_VK_MORE_BUFFERS = 7, /* storage buffers of a pipeline besides banks */
    KVLI_VK_MOST_SLABS = 511,
    KVLI_VK_LEAST_SUBGROUP = 4 /* decode's lanes; of fewer, slots would be more than a block's tokens */
};

/* What of a device is used. */
typedef struct kvli_vk_caps {
    uint32_t variants;      /* KVLI_VK_FP16 | KVLI_VK_STORAGE16 | KVLI_VK_SUBGROUP that may be used */
    uint32_t subgroup_size; /* that pipelines get */
    bool size_control;      /* a stage must ask for it, and for full subgroups */
    bool unified, is_cpu, memory_budget;
    bool cpu_shapes; /* of workgroups, and which variants are tried first */
    uint32_t max_workgroup, max_shared, banks;
    uint64_t max_range, max_alloc; /* bytes of a storage buffer, of memory allocated at once */
} kvli_vk_caps;

/* The device, of a context. */
struct kvli_vk {
    void *library;
    kvli_vk_get_instance_proc get_proc;
    kvli_vk_functions fn;
    kvli_vk_instance instance;
    kvli_vk_physical physical;
    kvli_vk_device device;
    kvli_vk_queue queue;
    uint32_t family;
    bool lent, renewed, lost; /* renewed: another device was lent */
    uint32_t generation;      /* grows when the device is stopped or started: what was on it is gone */
    kvli_vk_properties properties;
    kvli_vk_memory_properties memory;
    kvli_vk_caps caps;
    bool has_locks;
    kvli_mutex lock;       /* caches, pipelines */
    kvli_mutex queue_lock; /* the queue */
    kvli_vk_shelf shelf;
    kvl_cache *caches; /* started; linked by their kvli_vk_cache.next */
};

/* A buffer with memory of its own; at: where the host sees it, or null. */
typedef struct kvli_vk_piece {
    kvli_vk_buffer buffer;
    kvli_vk_memory memory;
    uint8_t *at;
} kvli_vk_piece;

/* ---- errors ---- */
static const char *kvli_vk_result_name(int e) {
    switch (e) {
#define KVLI_VK_NAME_(name, value, symbol) \
    case value: return symbol;
        KVLI_VK_RESULTS(KVLI_VK_NAME_)
#undef KVLI_VK_NAME_
    default: return "an unknown error";
    }
}

static kvl_result kvli_vk_fail(kvl_context *ctx, kvli_text text, int e, const char *call) {
    bool full = e == KVLI_VK_ERROR_OUT_OF_DEVICE_MEMORY || e == KVLI_VK_ERROR_TOO_MANY_OBJECTS ||
                e == KVLI_VK_ERROR_FRAGMENTED_POOL || e == KVLI_VK_ERROR_OUT_OF_POOL_MEMORY ||
                e == KVLI_VK_ERROR_MEMORY_MAP_FAILED;
    kvl_result r = full                                    ? KVL_OUT_OF_DEVICE_MEMORY
                   : e == KVLI_VK_ERROR_OUT_OF_HOST_MEMORY ? KVL_OUT_OF_HOST_MEMORY
                                                           : KVL_DEVICE_LOST;
    ctx->native = e;
    snprintf(ctx->native_text, sizeof ctx->native_text, "%s: %s (%d)", call, kvli_vk_result_name(e), e);
    ctx->vk->lost = ctx->vk->lost || r == KVL_DEVICE_LOST;
    return kvli_fail(ctx, text, r, "%s", ctx->native_text);
}
static bool kvli_vk_failed(int e) { return e < 0 || e == KVLI_VK_TIMEOUT || e == KVLI_VK_NOT_READY; }

/* ---- loader, instance, device ---- */
static kvl_result kvli_vk_refuse(kvl_context *ctx, kvli_text why, int e, const char *call) {
    const char *hint =
        e == KVLI_VK_ERROR_INCOMPATIBLE_DRIVER ? "no driver for Vulkan 1.1 is installed; " : "";
    kvli_vk_fail(ctx, kvli_text_at(NULL, 0), e, call);
    return kvli_fail(NULL, why,
                     e == KVLI_VK_ERROR_OUT_OF_HOST_MEMORY ? KVL_OUT_OF_HOST_MEMORY : KVL_NO_BACKEND, "%s%s",
                     hint, ctx->native_text);
}

/* A function of the device, or (null) of the instance, or (null) of the loader; to: a pointer to a function. */
static bool kvli_vk_load(struct kvli_vk *vk, kvli_vk_device device, const char *symbol, void *to) {
    kvli_vk_function at =
        device ? vk->fn.get_device_proc(device, symbol) : vk->get_proc(vk->instance, symbol);
    memcpy(to, &at, sizeof at);
    return at != NULL;
}
/* In a function with vk, device and why. */
#define KVLI_VK_LOAD_(name, symbol, result, args)        \
    if (!kvli_vk_load(vk, device, symbol, &vk->fn.name)) \
        return kvli_fail(NULL, why, KVL_NO_BACKEND, "the loader or the driver is too old: no %s", symbol);

static bool kvli_vk_listed(const kvli_vk_extension *list, uint32_t n, const char *name) {
    for (uint32_t i = 0; i < n; i++)
        if (strcmp(list[i].name, name) == 0) return true;
    return false;
}

/* Which of the named extensions the instance (or the device, if given) has: a bit each. */
static kvl_result kvli_vk_extensions(kvl_context *ctx, kvli_text why, kvli_vk_physical device,
                                     const char *const *names, uint32_t n_names, uint32_t *bits) {
    struct kvli_vk *vk = ctx->vk;
    const char *call =
        device ? "vkEnumerateDeviceExtensionProperties" : "vkEnumerateInstanceExtensionProperties";
    uint32_t n = 0;
    *bits = 0;
    int e = device ? vk->fn.device_extensions(device, NULL, &n, NULL)
                   : vk->fn.instance_extensions(NULL, &n, NULL);
    if (kvli_vk_failed(e)) return kvli_vk_refuse(ctx, why, e, call);
    if (!n) return KVL_OK;
    size_t bytes = n * sizeof(kvli_vk_extension);
    kvli_vk_extension *list = (kvli_vk_extension *)kvli_alloc(ctx, bytes);
    if (!list) return kvli_fail(NULL, why, KVL_OUT_OF_HOST_MEMORY, "the allocator returned null");
    e = device ? vk->fn.device_extensions(device, NULL, &n, list)
               : vk->fn.instance_extensions(NULL, &n, list);
    for (uint32_t i = 0; i < n_names && !kvli_vk_failed(e); i++)
        *bits |= (uint32_t)kvli_vk_listed(list, n, names[i]) << i;
    kvli_free(ctx, list, bytes);
    return kvli_vk_failed(e) ? kvli_vk_refuse(ctx, why, e, call) : KVL_OK;
}

static kvl_result kvli_vk_start_instance(kvl_context *ctx, kvli_text why) {
    struct kvli_vk *vk = ctx->vk;
    static const char *const names[] = {"VK_KHR_portability_enumeration"}; /* (MoltenVK is no whole Vulkan) */
    kvli_vk_application application = {KVLI_VK_TYPE_APPLICATION, NULL, NULL, 0, "kvlite", KVL_VERSION,
                                       KVLI_VK_API_1_1};
    const kvli_vk_device device = NULL;
    uint32_t portable = 0;
    if (!vk->lent) {
        KVLI_VK_GLOBAL_FUNCTIONS(KVLI_VK_LOAD_)
        kvl_result r = kvli_vk_extensions(ctx, why, NULL, names, 1, &portable);
        if (r != KVL_OK) return r;
        kvli_vk_instance_info info = {KVLI_VK_TYPE_INSTANCE,
                                      NULL,
                                      (uint32_t)(portable ? KVLI_VK_INSTANCE_PORTABILITY : 0),
                                      &application,
                                      0,
                                      NULL,
                                      portable,
                                      names};
        int e = vk->fn.create_instance(&info, NULL, &vk->instance);
        if (kvli_vk_failed(e)) vk->instance = NULL;
        if (kvli_vk_failed(e)) return kvli_vk_refuse(ctx, why, e, "vkCreateInstance");
    }
    KVLI_VK_INSTANCE_FUNCTIONS(KVLI_VK_LOAD_)
    return KVL_OK;
}

/* The extensions of a device that are used where they are there. */
enum {
    KVLI_VK_EXT_FLOAT16,
    KVLI_VK_EXT_SUBGROUP_SIZE,
    KVLI_VK_EXT_BUDGET,
    KVLI_VK_EXT_PORTABLE,
    KVLI_VK_EXTS
};
static const char *const kvli_vk_device_extensions[KVLI_VK_EXTS] = {
    "VK_KHR_shader_float16_int8", "VK_EXT_subgroup_size_control", "VK_EXT_memory_budget",
    "VK_KHR_portability_subset"};

/* What a device says of itself: features as KVL_VULKAN_* (of a lent one: as the app says). */
typedef struct kvli_vk_probe {
    kvli_vk_properties properties;
    kvli_vk_subgroup_properties subgroup;
    kvli_vk_subgroup_size_properties sizes;
    kvli_vk_maintenance3_properties more;
    uint32_t extensions, features, family;
    bool buffer_arrays, computes;
} kvli_vk_probe;

/* Features, asked for or enabled: those of extensions only where the device has them. */
typedef struct kvli_vk_chain {
    kvli_vk_features all;
    kvli_vk_storage16_features storage;
    kvli_vk_float16_features half;
    kvli_vk_subgroup_size_features size;
} kvli_vk_chain;

static void kvli_vk_chain_init(kvli_vk_chain *f, uint32_t extensions) {
    memset(f, 0, sizeof *f);
    f->all.type = KVLI_VK_TYPE_FEATURES;
    f->storage.type = KVLI_VK_TYPE_STORAGE16_FEATURES;
    f->half.type = KVLI_VK_TYPE_FLOAT16_FEATURES;
    f->size.type = KVLI_VK_TYPE_SUBGROUP_SIZE_FEATURES;
    void **next = &f->all.next;
    *next = &f->storage;
    next = &f->storage.next;
    if (extensions >> KVLI_VK_EXT_FLOAT16 & 1) {
        *next = &f->half;
        next = &f->half.next;
    }
    if (extensions >> KVLI_VK_EXT_SUBGROUP_SIZE & 1) *next = &f->size;
}

static void kvli_vk_probe_features(const struct kvli_vk *vk, kvli_vk_physical device, kvli_vk_probe *p) {
    kvli_vk_chain f;
    kvli_vk_chain_init(&f, p->extensions);
    vk->fn.features(device, &f.all);
    p->buffer_arrays = f.all.has[KVLI_VK_FEATURE_BUFFER_ARRAYS] != 0;
    p->features = (f.half.float16 ? KVL_VULKAN_FP16 : 0) | (f.storage.storage ? KVL_VULKAN_STORAGE16 : 0) |
                  KVL_VULKAN_SUBGROUP | (f.size.control && f.size.full ? KVL_VULKAN_SUBGROUP_SIZE : 0) |
                  (p->extensions >> KVLI_VK_EXT_BUDGET & 1 ? KVL_VULKAN_MEMORY_BUDGET : 0);
}

static void kvli_vk_probe_family(const struct kvli_vk *vk, kvli_vk_physical device, kvli_vk_probe *p) {
    kvli_vk_queue_family families[16]; /* one that does nothing but compute, where there is one */
    uint32_t n = sizeof families / sizeof *families;
    vk->fn.queue_families(device, &n, families);
    for (uint32_t i = n; i-- > 0;) {
        bool alone = !(families[i].flags & KVLI_VK_QUEUE_GRAPHICS);
        if (!(families[i].flags & KVLI_VK_QUEUE_COMPUTE) || !families[i].count) continue;
        if (!p->computes || alone || families[p->family].flags & KVLI_VK_QUEUE_GRAPHICS) p->family = i;
        p->computes = true;
    }
}

static kvl_result kvli_vk_probe_device(kvl_context *ctx, kvli_text why, kvli_vk_physical device,
                                       kvli_vk_probe *p) {
    const struct kvli_vk *vk = ctx->vk;
    const kvl_vulkan_desc *d = &ctx->desc.vulkan;
    memset(p, 0, sizeof *p);
    kvl_result r =
        kvli_vk_extensions(ctx, why, device, kvli_vk_device_extensions, KVLI_VK_EXTS, &p->extensions);
    if (r != KVL_OK) return r;
    p->properties.type = KVLI_VK_TYPE_PROPERTIES;
    p->subgroup.type = KVLI_VK_TYPE_SUBGROUP_PROPERTIES;
    p->more.type = KVLI_VK_TYPE_MAINTENANCE3_PROPERTIES;
    p->sizes.type = KVLI_VK_TYPE_SUBGROUP_SIZE_PROPERTIES;
    p->properties.next = &p->subgroup;
    p->subgroup.next = &p->more;
    if (p->extensions >> KVLI_VK_EXT_SUBGROUP_SIZE & 1) p->more.next = &p->sizes;
    vk->fn.properties(device, &p->properties);
    p->properties.next = p->subgroup.next = p->more.next = NULL;
    kvli_vk_probe_features(vk, device, p);
    kvli_vk_probe_family(vk, device, p);
    if (vk->lent) {
        p->features = d->features;
        p->family = d->queue_family;
    }
    return KVL_OK;
}

/* Storage buffers that a pipeline can have, less those that are no banks. */
static uint32_t kvli_vk_banks_of(const kvli_vk_probe *p) {
    const kvli_vk_limits *l = &p->properties.limits;
    uint32_t n = kvli_min_u32(kvli_min_u32(l->stage_storage_buffers, l->set_storage_buffers),
                              kvli_min_u32(l->stage_resources, p->more.set_descriptors));
    return n > KVLI_VK_MORE_BUFFERS ? kvli_min_u32(n - KVLI_VK_MORE_BUFFERS, 1 + KVLI_VK_MOST_SLABS) : 0;
}

/* How good a device is, or why it will not do. */
static uint32_t kvli_vk_rate(const kvl_context *ctx, const kvli_vk_probe *p, const char **lack) {
    static const uint8_t by_type[] = {2, 4, 5, 3, 1}; /* other, integrated, discrete, virtual, CPU */
    uint32_t sort = (uint32_t)p->properties.device_type;
    bool skips_cpu = ctx->desc.backend == KVL_BACKEND_AUTO && !ctx->vk->lent;
    *lack = p->properties.api_version < KVLI_VK_API_1_1
                ? "is for Vulkan 1.0, 1.1 is needed: look for a newer driver"
            : !p->computes                            ? "has no queue that computes"
            : !p->buffer_arrays                       ? "has no shaderStorageBufferArrayDynamicIndexing"
            : kvli_vk_banks_of(p) < 2                 ? "has too few storage buffers for a shader"
            : sort == KVLI_VK_DEVICE_CPU && skips_cpu ? "is a CPU: ask for the backend vulkan to use it"
                                                      : NULL;
    return sort < sizeof by_type ? by_type[sort] : 2;
}

/* The device to use; *why: why others are not. */
static kvl_result kvli_vk_choose(kvl_context *ctx, kvli_text why, kvli_vk_probe *best) {
    struct kvli_vk *vk = ctx->vk;
    kvli_vk_physical devices[16];
    uint32_t n = sizeof devices / sizeof *devices, best_rate = 0, asked = ctx->desc.vulkan.device_index;
    char text[256] = "";
    kvli_vk_probe probe;
    devices[0] = vk->physical;
    if (vk->lent) {
        n = 1;
        asked = 0;
    } else {
        int e = vk->fn.physical_devices(vk->instance, &n, devices);
        if (kvli_vk_failed(e)) return kvli_vk_refuse(ctx, why, e, "vkEnumeratePhysicalDevices");
    }
    if (!n) return kvli_fail(NULL, why, KVL_NO_BACKEND, "no GPU with a driver for Vulkan");
    if (asked > n) return kvli_fail(NULL, why, KVL_NO_BACKEND, "vulkan.device_index: %u of %u", asked, n);
    for (uint32_t i = asked ? asked - 1 : 0; i < (asked ? asked : n); i++) {
        const char *lack;
        size_t used = strlen(text);
        kvl_result r = kvli_vk_probe_device(ctx, why, devices[i], &probe);
        if (r != KVL_OK) return r;
        uint32_t rate = kvli_vk_rate(ctx, &probe, &lack);
        if (lack)
            snprintf(text + used, sizeof text - used, "%s%.64s %s", used ? "; " : "", probe.properties.name,
                     lack);
        if (lack || rate <= best_rate) continue;
        best_rate = rate;
        *best = probe;
        vk->physical = devices[i];
    }
    if (!best_rate) return kvli_fail(NULL, why, KVL_NO_BACKEND, "%s", text);
    if (why.at && why.size) snprintf(why.at, why.size, "%s", text);
    return KVL_OK;
}

static void kvli_vk_set_caps(kvl_context *ctx, const kvli_vk_probe *p) {
    const kvli_vk_limits *l = &p->properties.limits;
    const uint32_t operations = KVLI_VK_SUBGROUP_BASIC | KVLI_VK_SUBGROUP_BALLOT | KVLI_VK_SUBGROUP_SHUFFLE;
    uint32_t has = p->features & ~ctx->desc.vulkan.without;
    struct kvli_vk *vk = ctx->vk;
    kvli_vk_caps *c = &vk->caps;
    memset(c, 0, sizeof *c);
    if ((p->subgroup.operations & operations) != operations ||
        !(p->subgroup.stages & KVLI_VK_STAGE_COMPUTE) || p->subgroup.size < KVLI_VK_LEAST_SUBGROUP)
        has &= ~(uint32_t)KVL_VULKAN_SUBGROUP;
    c->variants = (has & KVL_VULKAN_FP16 ? KVLI_VK_FP16 : 0) |
                  (has & KVL_VULKAN_STORAGE16 ? KVLI_VK_STORAGE16 : 0) |
                  (has & KVL_VULKAN_SUBGROUP ? KVLI_VK_SUBGROUP : 0);
    c->subgroup_size = p->subgroup.size;
    c->size_control = has & KVL_VULKAN_SUBGROUP_SIZE && p->sizes.stages & KVLI_VK_STAGE_COMPUTE;
    c->is_cpu = p->properties.device_type == KVLI_VK_DEVICE_CPU;
    c->cpu_shapes = c->is_cpu && !(ctx->desc.vulkan.without & KVL_VULKAN_CPU_SHAPES);
    c->unified = c->is_cpu || p->properties.device_type == KVLI_VK_DEVICE_INTEGRATED;
    c->memory_budget = (p->features & KVL_VULKAN_MEMORY_BUDGET) != 0;
    c->max_workgroup = kvli_min_u32(l->invocations, l->workgroup_size[0]);
    c->max_shared = l->shared_memory;
    c->banks = kvli_vk_banks_of(p);
    c->max_range = l->storage_range;
    c->max_alloc = p->more.allocation_size;
    vk->properties = p->properties;
    memset(&vk->memory, 0, sizeof vk->memory);
    vk->memory.type = KVLI_VK_TYPE_MEMORY_PROPERTIES;
    vk->fn.memory_properties(vk->physical, &vk->memory);
}

/* Creates the device with the features of p. */
static kvl_result kvli_vk_create_device(kvl_context *ctx, kvli_text why, const kvli_vk_probe *p) {
    struct kvli_vk *vk = ctx->vk;
    const float priority = 1;
    const char *names[KVLI_VK_EXTS];
    kvli_vk_chain f;
    kvli_vk_queue_info queue = {KVLI_VK_TYPE_DEVICE_QUEUE, NULL, 0, p->family, 1, &priority};
    kvli_vk_device_info info = {KVLI_VK_TYPE_DEVICE, &f.all, 0, 1, &queue, 0, NULL, 0, names, NULL};
    kvli_vk_chain_init(&f, p->extensions);
    f.all.has[KVLI_VK_FEATURE_BUFFER_ARRAYS] = 1;
    f.storage.storage = (p->features & KVL_VULKAN_STORAGE16) != 0;
    f.half.float16 = (p->features & KVL_VULKAN_FP16) != 0;
    f.size.control = f.size.full = (p->features & KVL_VULKAN_SUBGROUP_SIZE) != 0;
    for (uint32_t i = 0; i < KVLI_VK_EXTS; i++)
        if (p->extensions >> i & 1) names[info.n_extensions++] = kvli_vk_device_extensions[i];
    int e = vk->fn.create_device(vk->physical, &info, NULL, &vk->device);
    if (!kvli_vk_failed(e)) return KVL_OK;
    vk->device = NULL;
    return kvli_vk_refuse(ctx, why, e, "vkCreateDevice");
}

/* Caches are laid out for one device, and stay when it is started again. */
static bool kvli_vk_same(const struct kvli_vk *vk, const kvli_vk_probe *p) {
    const kvli_vk_properties *a = &vk->properties, *b = &p->properties;
    return a->vendor == b->vendor && a->device == b->device && a->driver_version == b->driver_version &&
           kvli_vk_banks_of(p) == vk->caps.banks && a->limits.shared_memory == b->limits.shared_memory &&
           a->limits.storage_range == b->limits.storage_range;
}

/* ---- memory ---- */
/* What memory is for: types that have these properties are tried in turn. */
typedef enum kvli_vk_purpose { KVLI_VK_BLOCKS, KVLI_VK_UPLOAD, KVLI_VK_READBACK } kvli_vk_purpose;
static const uint32_t kvli_vk_properties_of[][2] = {
    {KVLI_VK_MEMORY_DEVICE_LOCAL, KVLI_VK_MEMORY_DEVICE_LOCAL}, /* never another: what spills is slow */
    {KVLI_VK_MEMORY_HOST_VISIBLE | KVLI_VK_MEMORY_HOST_COHERENT | KVLI_VK_MEMORY_DEVICE_LOCAL,
     KVLI_VK_MEMORY_HOST_VISIBLE | KVLI_VK_MEMORY_HOST_COHERENT},
    {KVLI_VK_MEMORY_HOST_VISIBLE | KVLI_VK_MEMORY_HOST_COHERENT | KVLI_VK_MEMORY_HOST_CACHED,
     KVLI_VK_MEMORY_HOST_VISIBLE | KVLI_VK_MEMORY_HOST_COHERENT}};

static void kvli_vk_piece_free(const struct kvli_vk *vk, kvli_vk_piece *p) {
    if (p->buffer) vk->fn.destroy_buffer(vk->device, p->buffer, NULL);
    if (p->memory) vk->fn.free(vk->device, p->memory, NULL);
    memset(p, 0, sizeof *p);
}

static int kvli_vk_piece_memory(const struct kvli_vk *vk, kvli_vk_purpose purpose, kvli_vk_piece *p) {
    const uint32_t known = KVLI_VK_MEMORY_DEVICE_LOCAL | KVLI_VK_MEMORY_HOST_VISIBLE |
                           KVLI_VK_MEMORY_HOST_COHERENT | KVLI_VK_MEMORY_HOST_CACHED;
    kvli_vk_requirements need;
    kvli_vk_memory_info info;
    int e = KVLI_VK_ERROR_OUT_OF_DEVICE_MEMORY;
    vk->fn.requirements(vk->device, p->buffer, &need);
    memset(&info, 0, sizeof info);
    info.type = KVLI_VK_TYPE_MEMORY;
    info.size = need.size;
    for (uint32_t choice = 0; choice < 2; choice++)
        for (uint32_t i = 0; i < vk->memory.n_types; i++) {
            uint32_t want = kvli_vk_properties_of[purpose][choice], flags = vk->memory.types[i].flags;
            if (!(need.types >> i & 1) || (flags & want) != want || flags & ~known) continue;
            info.memory_type = i;
            e = vk->fn.alloc(vk->device, &info, NULL, &p->memory);
            if (!kvli_vk_failed(e)) return e;
            p->memory = NULL;
            if (e != KVLI_VK_ERROR_OUT_OF_DEVICE_MEMORY) return e;
        }
    return e;
}

/* A buffer of so many bytes, with memory; the host sees all but blocks'. */
static kvl_result kvli_vk_piece_new(kvl_context *ctx, kvli_text text, uint64_t bytes, kvli_vk_purpose purpose,
                                    kvli_vk_piece *out) {
    const struct kvli_vk *vk = ctx->vk;
    kvli_vk_buffer_info info = {KVLI_VK_TYPE_BUFFER,
                                NULL,
                                0,
                                (bytes + 15) & ~15ull,
                                KVLI_VK_USE_STORAGE | KVLI_VK_USE_TRANSFER_SRC | KVLI_VK_USE_TRANSFER_DST,
                                0,
                                0,
                                NULL};
    const char *call = "vkCreateBuffer";
    void *at = NULL;
    memset(out, 0, sizeof *out);
    int e = vk->fn.create_buffer(vk->device, &info, NULL, &out->buffer);
    if (kvli_vk_failed(e)) {
        out->buffer = NULL;
    } else {
        call = "vkAllocateMemory";
        e = kvli_vk_piece_memory(vk, purpose, out);
    }
    if (!kvli_vk_failed(e)) {
        call = "vkBindBufferMemory";
        e = vk->fn.bind(vk->device, out->buffer, out->memory, 0);
    }
    if (!kvli_vk_failed(e) && purpose != KVLI_VK_BLOCKS) {
        call = "vkMapMemory";
        e = vk->fn.map(vk->device, out->memory, 0, ~0ull, 0, &at);
        out->at = (uint8_t *)at;
    }
    if (!kvli_vk_failed(e)) return KVL_OK;
    kvli_vk_piece_free(vk, out);
    return kvli_vk_fail(ctx, text, e, call);
}

/* ---- commands ---- */
static void kvli_vk_queue_enter(kvl_context *ctx) {
    kvli_lock(&ctx->vk->queue_lock);
    if (ctx->vk->lent && ctx->desc.vulkan.lock) ctx->desc.vulkan.lock(ctx->desc.user);
}
static void kvli_vk_queue_leave(kvl_context *ctx) {
    if (ctx->vk->lent && ctx->desc.vulkan.unlock) ctx->desc.vulkan.unlock(ctx->desc.user);
    kvli_unlock(&ctx->vk->queue_lock);
}

static int kvli_vk_submit_to(kvl_context *ctx, kvli_vk_commands commands, kvli_vk_fence fence) {
    kvli_vk_submit_info info = {KVLI_VK_TYPE_SUBMIT, NULL, 0, NULL, NULL, 1, &commands, 0, NULL};
    kvli_vk_queue_enter(ctx);
    int e = ctx->vk->fn.queue_submit(ctx->vk->queue, 1, &info, fence);
    kvli_vk_queue_leave(ctx);
    return e;
}
/* Before something is destroyed that a wait which failed may have left in use. */
static int kvli_vk_idle(kvl_context *ctx) {
    kvli_vk_queue_enter(ctx);
    int e = ctx->vk->fn.queue_idle(ctx->vk->queue);
    kvli_vk_queue_leave(ctx);
    return e;
}

/* A CPU may be slow; a GPU that does not answer for so long is lost. */
static uint64_t kvli_vk_patience(const struct kvli_vk *vk) {
    return vk->caps.is_cpu ? ~0ull : 10000000000ull;
}

/* What was written is seen from here on. */
static void kvli_vk_wall(const struct kvli_vk *vk, kvli_vk_commands commands, uint32_t from, uint32_t to) {
    kvli_vk_barrier barrier = {KVLI_VK_TYPE_BARRIER, NULL, KVLI_VK_MEMORY_WRITE,
                               KVLI_VK_MEMORY_READ | KVLI_VK_MEMORY_WRITE};
    vk->fn.barrier(commands, from, to, 0, 1, &barrier, 0, NULL, 0, NULL);
}
enum { KVLI_VK_AT_OURS = KVLI_VK_AT_COMPUTE | KVLI_VK_AT_TRANSFER };

static int kvli_vk_new_fence(const struct kvli_vk *vk, kvli_vk_fence *out) {
    kvli_vk_fence_info info = {KVLI_VK_TYPE_FENCE, NULL, 0};
    int e = vk->fn.create_fence(vk->device, &info, NULL, out);
    if (kvli_vk_failed(e)) *out = NULL;
    return e;
}

/* A pool, and n command buffers of it. */
static int kvli_vk_new_commands(const struct kvli_vk *vk, uint32_t n, kvli_vk_command_pool *pool,
                                kvli_vk_commands *out) {
    kvli_vk_command_pool_info info = {KVLI_VK_TYPE_COMMAND_POOL, NULL, KVLI_VK_POOL_RESET, vk->family};
    int e = vk->fn.create_command_pool(vk->device, &info, NULL, pool);
    if (kvli_vk_failed(e)) *pool = NULL;
    if (kvli_vk_failed(e)) return e;
    kvli_vk_commands_info all = {KVLI_VK_TYPE_COMMANDS, NULL, *pool, 0, n};
    return vk->fn.alloc_commands(vk->device, &all, out);
}

static int kvli_vk_begin_commands(const struct kvli_vk *vk, kvli_vk_commands commands) {
    kvli_vk_begin_info info = {KVLI_VK_TYPE_BEGIN, NULL, KVLI_VK_ONE_TIME, NULL};
    int e = vk->fn.begin(commands, &info);
    if (!kvli_vk_failed(e)) kvli_vk_wall(vk, commands, KVLI_VK_AT_ALL, KVLI_VK_AT_OURS);
    return e;
}
static int kvli_vk_end_commands(const struct kvli_vk *vk, kvli_vk_commands commands) {
    kvli_vk_wall(vk, commands, KVLI_VK_AT_OURS, KVLI_VK_AT_ALL | KVLI_VK_AT_HOST);
    return vk->fn.end(commands);
}

/* Runs what `record` records, once, and waits for it. */
typedef void (*kvli_vk_record_fn)(const struct kvli_vk *vk, kvli_vk_commands commands, void *arg);
static kvl_result kvli_vk_run_once(kvl_context *ctx, kvli_text text, kvli_vk_record_fn record, void *arg) {
    const struct kvli_vk *vk = ctx->vk;
    kvli_vk_command_pool pool = NULL;
    kvli_vk_commands commands;
    kvli_vk_fence fence = NULL;
    const char *call = "vkAllocateCommandBuffers";
    int e = kvli_vk_new_commands(vk, 1, &pool, &commands);
    if (!kvli_vk_failed(e)) e = kvli_vk_new_fence(vk, &fence);
    if (!kvli_vk_failed(e)) e = kvli_vk_begin_commands(vk, commands);
    if (!kvli_vk_failed(e)) {
        record(vk, commands, arg);
        call = "vkQueueSubmit";
        e = kvli_vk_end_commands(vk, commands);
    }
    if (!kvli_vk_failed(e)) e = kvli_vk_submit_to(ctx, commands, fence);
    if (!kvli_vk_failed(e)) {
        call = "vkWaitForFences";
        e = vk->fn.wait_fences(vk->device, 1, &fence, 1, kvli_vk_patience(vk));
        if (kvli_vk_failed(e)) kvli_vk_idle(ctx);
    }
    if (fence) vk->fn.destroy_fence(vk->device, fence, NULL);
    if (pool) vk->fn.destroy_command_pool(vk->device, pool, NULL);
    return kvli_vk_failed(e) ? kvli_vk_fail(ctx, text, e, call) : KVL_OK;
}

#endif
