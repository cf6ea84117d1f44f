/* Which shaders a cache runs: pipelines are made when it is created (or recovered), tested once, kept in the context for all
   of its caches, and remembered from run to run (kvl_vulkan_cache). Of kvlite.h (>>vulkan), which includes what it needs
   to declare a device with the rest of the header, and the rest when there is one. */
#ifndef KVLI_VULKAN_PIPELINES_H
#define KVLI_VULKAN_PIPELINES_H

enum { KVLI_VK_UNTESTED, KVLI_VK_RIGHT, KVLI_VK_WRONG };
typedef struct kvli_vk_layouts { /* of pipelines with so many banks */
    struct kvli_vk_layouts *next;
    uint32_t banks;
    kvli_vk_set_layout sets[2];
    kvli_vk_pipeline_layout pipeline;
} kvli_vk_layouts;
typedef struct kvli_vk_made {
    uint32_t shader, special[KVLI_VK_SPECIALISATIONS], verdict; /* shader: in kvli_vk_shaders */
    kvli_vk_pipeline pipeline;                                  /* null: not made on this device */
} kvli_vk_made;
typedef struct kvli_vk_shelf {
    uint32_t filled;       /* 1: with what desc.vulkan.cache has */
    uint32_t size_control; /* 1: verdicts are of pipelines that asked for a subgroup size */
    kvli_vk_layouts *layouts;
    kvli_vk_made *made;
    uint32_t n_made, max_made;
    kvli_vk_pipeline_cache cache;
} kvli_vk_shelf;
#endif

#ifdef KVLI_VULKAN_PIPELINES
/* A line of the report, once. */
static void kvli_vk_say(kvl_context *ctx, const char *format, ...) {
    char line[256];
    size_t used = strlen(ctx->report), n;
    va_list args;
    va_start(args, format);
    n = (size_t)snprintf(line, sizeof line, "vulkan: ");
    vsnprintf(line + n, sizeof line - n - 1, format, args);
    va_end(args);
    n = strlen(line);
    line[n] = '\n';
    line[n + 1] = 0;
    if (used + n + 2 <= sizeof ctx->report && !strstr(ctx->report, line))
        memcpy(ctx->report + used, line, n + 2);
}

static kvl_result kvli_vk_layouts_get(kvl_context *ctx, uint32_t banks, kvli_text text,
                                      kvli_vk_layouts **out) {
    struct kvli_vk *vk = ctx->vk;
    kvli_vk_layouts *l = vk->shelf.layouts;
    kvli_vk_binding bindings[6];
    int e = 0;
    while (l && l->banks != banks) l = l->next;
    *out = l;
    if (l && l->pipeline) return KVL_OK;
    if (!l) {
        l = (kvli_vk_layouts *)kvli_alloc(ctx, sizeof *l);
        if (!l) return kvli_fail(ctx, text, KVL_OUT_OF_HOST_MEMORY, "the allocator returned null");
        memset(l, 0, sizeof *l);
        l->banks = banks;
        l->next = vk->shelf.layouts;
        vk->shelf.layouts = *out = l; /* freed with the context, whatever comes */
    }
    memset(bindings, 0, sizeof bindings);
    for (uint32_t i = 0; i < 6; i++) {
        bindings[i].binding = i;
        bindings[i].type = KVLI_VK_STORAGE_BUFFER;
        bindings[i].count = i == KVLI_VK_PAGES ? banks : 1;
        bindings[i].stages = KVLI_VK_STAGE_COMPUTE;
    }
    for (uint32_t s = 0; s < 2 && !e; s++) {
        kvli_vk_set_layout_info info = {KVLI_VK_TYPE_SET_LAYOUT, NULL, 0, s ? 2u : 6u, bindings};
        bindings[0].count = s ? 1 : banks;
        if (l->sets[s]) continue; /* the call before this one failed halfway */
        e = vk->fn.create_set_layout(vk->device, &info, NULL, &l->sets[s]);
        if (e) l->sets[s] = NULL;
    }
    if (e) return kvli_vk_fail(ctx, text, e, "vkCreateDescriptorSetLayout");
    kvli_vk_push_range range = {KVLI_VK_STAGE_COMPUTE, 0, sizeof(kvli_vk_push)};
    kvli_vk_pipeline_layout_info info = {KVLI_VK_TYPE_PIPELINE_LAYOUT, NULL, 0, 2, l->sets, 1, &range};
    e = vk->fn.create_pipeline_layout(vk->device, &info, NULL, &l->pipeline);
    if (e) l->pipeline = NULL;
    return e ? kvli_vk_fail(ctx, text, e, "vkCreatePipelineLayout") : KVL_OK;
}

static kvli_vk_made *kvli_vk_made_at(kvl_context *ctx, uint32_t shader,
                                     const uint32_t *special) { /* null: no memory */
    kvli_vk_shelf *p = &ctx->vk->shelf;
    for (uint32_t i = 0; i < p->n_made; i++)
        if (p->made[i].shader == shader &&
            memcmp(p->made[i].special, special, sizeof p->made[i].special) == 0)
            return &p->made[i];
    if (p->n_made == p->max_made) {
        uint32_t room = 2 * p->max_made + 32;
        kvli_vk_made *all = (kvli_vk_made *)kvli_alloc(ctx, room * sizeof *all);
        if (!all) return NULL;
        if (p->n_made) memcpy(all, p->made, p->n_made * sizeof *all);
        kvli_free(ctx, p->made, p->max_made * sizeof *all);
        p->made = all;
        p->max_made = room;
    }
    kvli_vk_made *m = &p->made[p->n_made++];
    memset(m, 0, sizeof *m);
    m->shader = shader;
    memcpy(m->special, special, sizeof m->special);
    return m;
}

/* What of special[] a shader looks at: bits. */
static uint32_t kvli_vk_looks_at(uint32_t sort) {
    const uint32_t all = (1u << KVLI_VK_SPECIALISATIONS) - 1,
                   shape = 1u << KVLI_VK_WORKGROUP | 1u << KVLI_VK_BANKS;
    return sort == KVLI_VT_COPY    ? shape
           : sort == KVLI_VT_MERGE ? shape | 1u << KVLI_VK_DIM
           : sort <= KVLI_VT_WRITE ? all & ~(1u << KVLI_VK_ROWS | 1u << KVLI_VK_LANES)
                                   : all;
}

/* An error is one of the device or of memory; a driver that does not take the shader leaves made->pipeline null. */
static kvl_result kvli_vk_make(kvl_context *ctx, kvli_vk_made *made, uint32_t sort, const kvli_vk_layouts *l,
                               kvli_text text, char *why) {
    struct kvli_vk *vk = ctx->vk;
    const kvli_vk_shader *shader = &kvli_vk_shaders[made->shader];
    kvli_vk_special entries[KVLI_VK_SPECIALISATIONS];
    kvli_vk_specialisation special = {0, entries, sizeof made->special, made->special};
    kvli_vk_required_subgroup_size size = {KVLI_VK_TYPE_REQUIRED_SUBGROUP_SIZE, NULL, vk->caps.subgroup_size};
    kvli_vk_shader_module_info code = {KVLI_VK_TYPE_SHADER_MODULE, NULL, 0,
                                       shader->n_words * sizeof(uint32_t), shader->words};
    kvli_vk_compute_pipeline_info info;
    const char *call = "vkCreateShaderModule";
    for (uint32_t i = 0; i < KVLI_VK_SPECIALISATIONS; i++) {
        kvli_vk_special entry = {i, i * (uint32_t)sizeof(uint32_t), sizeof(uint32_t)};
        if (kvli_vk_looks_at(sort) >> i & 1) entries[special.n++] = entry;
    }
    memset(&info, 0, sizeof info);
    info.type = KVLI_VK_TYPE_COMPUTE_PIPELINE;
    info.layout = l->pipeline;
    info.stage.type = KVLI_VK_TYPE_STAGE;
    info.stage.stage = KVLI_VK_STAGE_COMPUTE;
    info.stage.name = "main";
    info.stage.specialisation = &special;
    if (shader->variant & KVLI_VK_SUBGROUP &&
        vk->caps.size_control) { /* lanes are where the shader thinks they are */
        info.stage.next = &size;
        info.stage.flags = KVLI_VK_FULL_SUBGROUPS;
    }
    int e = vk->fn.create_shader_module(vk->device, &code, NULL, &info.stage.module);
    if (!e) {
        call = "vkCreateComputePipelines";
        e = vk->fn.create_pipelines(vk->device, vk->shelf.cache, 1, &info, NULL, &made->pipeline);
        if (e) made->pipeline = NULL;
        vk->fn.destroy_shader_module(vk->device, info.stage.module, NULL);
    }
    if (e == KVLI_VK_ERROR_OUT_OF_HOST_MEMORY || e == KVLI_VK_ERROR_OUT_OF_DEVICE_MEMORY ||
        e == KVLI_VK_ERROR_DEVICE_LOST)
        return kvli_vk_fail(ctx, text, e, call);
    snprintf(why, 96, "the driver does not compile it: %s: %d", call, e);
    return KVL_OK;
}

/* ---- the self-test ---- */
typedef struct kvli_vk_trial {
    const kvli_vk_test *t;
    kvli_vk_pipeline pipeline;
    kvli_vk_pipeline_layout layout;
    kvli_vk_set sets[2];
} kvli_vk_trial;

static void kvli_vk_trial_record(const struct kvli_vk *vk, kvli_vk_commands commands, void *arg) {
    const kvli_vk_trial *trial = (const kvli_vk_trial *)arg;
    vk->fn.bind_pipeline(commands, KVLI_VK_BIND_COMPUTE, trial->pipeline);
    vk->fn.bind_sets(commands, KVLI_VK_BIND_COMPUTE, trial->layout, 0, 2, trial->sets, 0, NULL);
    for (uint32_t i = 0; i < trial->t->n_cases; i++) {
        const kvli_vk_case *one = &trial->t->cases[i];
        if (i) kvli_vk_wall(vk, commands, KVLI_VK_AT_COMPUTE, KVLI_VK_AT_COMPUTE);
        vk->fn.push(commands, trial->layout, KVLI_VK_STAGE_COMPUTE, 0, sizeof one->push, &one->push);
        vk->fn.dispatch(commands, one->groups[0], one->groups[1], one->groups[2]);
    }
}

/* A pool with both sets, on regions of the test's buffer. Every bank but 0 is the slab. */
static int kvli_vk_trial_sets(const struct kvli_vk *vk, const kvli_vk_layouts *l, const kvli_vk_piece *piece,
                              kvli_vk_trial *trial, kvli_vk_set_pool *pool) {
    static const struct {
        uint32_t set, binding, region;
    } places[] = {{0, KVLI_VK_TABLES, KVLI_VT_TABLES},
                  {0, KVLI_VK_LAYERS, KVLI_VT_LAYERS},
                  {0, KVLI_VK_TAINT, KVLI_VT_TAINT},
                  {0, KVLI_VK_PARTIAL_O, KVLI_VT_PARTIAL_O},
                  {0, KVLI_VK_PARTIAL_ML, KVLI_VT_PARTIAL_ML},
                  {1, KVLI_VK_TENSOR_A, KVLI_VT_A},
                  {1, KVLI_VK_TENSOR_B, KVLI_VT_B}};
    const size_t *at = trial->t->at;
    kvli_vk_pool_size size = {KVLI_VK_STORAGE_BUFFER, l->banks + KVLI_VK_MORE_BUFFERS};
    kvli_vk_set_pool_info info = {KVLI_VK_TYPE_SET_POOL, NULL, 0, 2, 1, &size};
    int e = vk->fn.create_set_pool(vk->device, &info, NULL, pool);
    if (kvli_vk_failed(e)) *pool = NULL;
    if (kvli_vk_failed(e)) return e;
    kvli_vk_sets_info all = {KVLI_VK_TYPE_SETS, NULL, *pool, 2, l->sets};
    e = vk->fn.alloc_sets(vk->device, &all, trial->sets);
    if (kvli_vk_failed(e)) return e;
    for (uint32_t bank = 0; bank < l->banks; bank++) {
        uint32_t region = bank ? KVLI_VT_SLAB : KVLI_VT_SCRATCH;
        kvli_vk_set_range(vk, trial->sets[0], KVLI_VK_PAGES, bank, piece, at[region],
                          at[region + 1] - at[region]);
    }
    for (uint32_t i = 0; i < sizeof places / sizeof *places; i++)
        kvli_vk_set_range(vk, trial->sets[places[i].set], places[i].binding, 0, piece, at[places[i].region],
                          at[places[i].region + 1] - at[places[i].region]);
    return e;
}

/* Runs the pipeline on its problem; the verdict is made->verdict, and why where it is wrong. */
static kvl_result kvli_vk_try(kvl_context *ctx, kvli_vk_made *made, uint32_t sort, const kvli_vk_layouts *l,
                              kvli_text text, char *why) {
    const struct kvli_vk *vk = ctx->vk;
    kvli_vk_trial trial;
    kvli_vk_test t;
    kvli_vk_piece piece;
    kvli_vk_set_pool pool = NULL;
    memset(&t, 0, sizeof t);
    memset(&trial, 0, sizeof trial);
    t.sort = sort;
    t.special = made->special;
    t.simd = kvli_simd(ctx);
    t.why = why;
    kvli_vt_shape(&t);
    size_t bytes = kvli_vt_cpu_bytes(&t);
    uint8_t *cpu = (uint8_t *)kvli_alloc(ctx, bytes);
    if (!cpu) return kvli_fail(ctx, text, KVL_OUT_OF_HOST_MEMORY, "the allocator returned null");
    kvl_result r = kvli_vk_piece_new(ctx, text, t.at[KVLI_VT_REGIONS], KVLI_VK_READBACK, &piece);
    if (r == KVL_OK) {
        t.gpu = piece.at;
        kvli_vt_make(&t, cpu);
        trial.t = &t;
        trial.pipeline = made->pipeline;
        trial.layout = l->pipeline;
        int e = kvli_vk_trial_sets(vk, l, &piece, &trial, &pool);
        r = kvli_vk_failed(e) ? kvli_vk_fail(ctx, text, e, "vkAllocateDescriptorSets")
                              : kvli_vk_run_once(ctx, text, kvli_vk_trial_record, &trial);
        if (r == KVL_OK) made->verdict = kvli_vt_sorts[sort].check(&t) ? KVLI_VK_RIGHT : KVLI_VK_WRONG;
        if (pool) vk->fn.destroy_set_pool(vk->device, pool, NULL);
        kvli_vk_piece_free(vk, &piece);
    }
    kvli_free(ctx, cpu, bytes);
    return r;
}

static const char *kvli_vk_variant(uint32_t variant) {
    static const char *const names[] = {
        "plain",    "fp16",          "storage16",          "fp16+storage16",
        "subgroup", "fp16+subgroup", "storage16+subgroup", "fp16+storage16+subgroup"};
    return names[variant & 7];
}

/* Constants of a shader for a preset. False: not with this variant. */
static bool kvli_vk_specialise(const kvl_cache *c, uint32_t sort, const kvl_preset *p, uint32_t variant,
                               uint32_t *s) {
    const struct kvli_vk *vk = c->ctx->vk;
    uint32_t dim = c->geo.k_dim, T = c->geo.block_tokens, rows, lanes, shared = 0,
             subgroup = variant & KVLI_VK_SUBGROUP ? vk->caps.subgroup_size : 0;
    s[KVLI_VK_WORKGROUP] = sort == KVLI_VT_MERGE ? KVLI_VK_MERGE_WORKGROUP : KVLI_VK_STORE_WORKGROUP;
    s[KVLI_VK_BANKS] = kvli_vk_of(c)->n_banks;
    s[KVLI_VK_K_FORMAT] = p->k & ~(kvl_format)KVL_ROTATED;
    s[KVLI_VK_V_FORMAT] = p->v & ~(kvl_format)KVL_ROTATED;
    s[KVLI_VK_EXACT_FORMAT] = p->exact;
    s[KVLI_VK_ROTATED] = (p->k & KVL_ROTATED ? 1u : 0) | (p->v & KVL_ROTATED ? 2u : 0);
    s[KVLI_VK_DIM] = dim;
    s[KVLI_VK_BLOCK_TOKENS] = T;
    s[KVLI_VK_ROWS] = s[KVLI_VK_LANES] = s[KVLI_VK_PARTS] = 0;
    if (sort == KVLI_VT_WRITE) {
        s[KVLI_VK_WORKGROUP] = KVLI_VK_WRITE_WORKGROUP;
        s[KVLI_VK_PARTS] = KVLI_VK_WRITES;
    }
    if (sort == KVLI_VT_DECODE) {
        s[KVLI_VK_ROWS] = rows = kvli_vk_decode_rows(c->geo.gqa);
        s[KVLI_VK_WORKGROUP] = kvli_vk_decode_workgroup(subgroup, vk->caps.cpu_shapes);
        s[KVLI_VK_LANES] = lanes =
            kvli_vk_decode_lanes(dim, rows, s[KVLI_VK_WORKGROUP], subgroup, vk->caps.cpu_shapes);
        shared = kvli_vk_decode_shared(dim, rows, T, s[KVLI_VK_WORKGROUP], lanes, subgroup);
        if (subgroup && lanes > subgroup) return false;
    }
    if (sort == KVLI_VT_PREFILL) {
        s[KVLI_VK_ROWS] = rows = kvli_vk_prefill_rows(dim, vk->caps.max_shared);
        s[KVLI_VK_WORKGROUP] = kvli_vk_prefill_workgroup(vk->caps.max_shared);
        s[KVLI_VK_LANES] = lanes = kvli_vk_prefill_lanes(dim);
        shared = kvli_vk_prefill_shared(dim, T, rows, lanes);
    }
    for (uint32_t i = 0; i < KVLI_VK_SPECIALISATIONS; i++)
        if (!(kvli_vk_looks_at(sort) >> i & 1)) s[i] = 0;
    return shared <= vk->caps.max_shared && s[KVLI_VK_WORKGROUP] <= vk->caps.max_workgroup;
}

/* The best variant of a shader that is right on this driver; *used: which. (CPUs convert to and from f16 number by number:
   there, variants without such arithmetic come first.) */
static kvl_result kvli_vk_pipeline_get(kvl_cache *c, const kvli_vk_layouts *l, uint32_t sort,
                                       const kvl_preset *p, kvli_vk_pipeline *out, uint32_t *used) {
    kvl_context *ctx = c->ctx;
    char why[96] = "no variant of it fits this device";
    bool of_preset = sort != KVLI_VT_MERGE && sort != KVLI_VT_COPY;
    for (uint32_t turn = 8; turn-- > 0;) {
        uint32_t variant = turn ^ (ctx->vk->caps.cpu_shapes ? KVLI_VK_FP16 : 0);
        uint32_t special[KVLI_VK_SPECIALISATIONS], i = 0,
                                                   n = sizeof kvli_vk_shaders / sizeof *kvli_vk_shaders;
        while (i < n && (strcmp(kvli_vk_shaders[i].name, kvli_vk_names[sort]) ||
                         kvli_vk_shaders[i].variant != variant))
            i++;
        if (i == n || variant & ~ctx->vk->caps.variants || !kvli_vk_specialise(c, sort, p, variant, special))
            continue;
        kvli_vk_made *made = kvli_vk_made_at(ctx, i, special);
        if (!made)
            return KVLI_ERROR(c, KVL_OUT_OF_HOST_MEMORY, "kvl_cache_create: the allocator returned null");
        kvl_result r = KVL_OK;
        snprintf(why, sizeof why, "found by an earlier test");
        if (!made->pipeline && made->verdict != KVLI_VK_WRONG)
            r = kvli_vk_make(ctx, made, sort, l, kvli_err(c), why);
        if (r == KVL_OK && made->pipeline && made->verdict == KVLI_VK_UNTESTED)
            r = kvli_vk_try(ctx, made, sort, l, kvli_err(c), why);
        if (r != KVL_OK) return r;
        if (!made->pipeline) made->verdict = KVLI_VK_WRONG;
        *out = made->pipeline;
        *used = variant;
        if (made->verdict == KVLI_VK_RIGHT) return KVL_OK;
        kvli_vk_say(ctx, "%s %s%s%s, head dim %u: wrong on this driver (%s): not used", kvli_vk_names[sort],
                    kvli_vk_variant(variant), of_preset ? " of " : "", of_preset ? p->name : "", c->geo.k_dim,
                    why);
    }
    return KVLI_ERROR(c, KVL_UNSUPPORTED, "no %s shader%s%s, head dim %u, is right on this driver (%s)",
                      kvli_vk_names[sort], of_preset ? " of preset " : "", of_preset ? p->name : "",
                      c->geo.k_dim, why);
}

static kvl_result kvli_vk_pipelines_all(kvl_cache *c) {
    kvli_vk_cache *cc = kvli_vk_of(c);
    kvli_vk_pipes *out = &cc->pipes;
    kvli_vk_layouts *l = NULL;
    uint32_t used[KVLI_VT_SORTS] = {0, 0, 0, 0, 0, 0};
    const kvl_preset *presets = kvl_presets(NULL);
    kvl_result r = kvli_vk_layouts_get(c->ctx, cc->n_banks, kvli_err(c), &l);
    memset(out, 0, sizeof *out);
    if (r != KVL_OK) return r;
    memcpy(out->sets, l->sets, sizeof out->sets);
    out->layout = l->pipeline;
    r = kvli_vk_pipeline_get(c, l, KVLI_VT_COPY, presets, &out->copy, &used[KVLI_VT_COPY]);
    if (r == KVL_OK)
        r = kvli_vk_pipeline_get(c, l, KVLI_VT_MERGE, presets, &out->merge, &used[KVLI_VT_MERGE]);
    out->halves = used[KVLI_VT_MERGE] & KVLI_VK_STORAGE16;
    for (uint32_t n = 0; n < c->geo.n_layers && r == KVL_OK; n++) {
        uint32_t i = cc->layer_preset[n];
        const kvl_preset *p = &presets[i];
        if (out->store[i]) continue;
        r = kvli_vk_pipeline_get(c, l, KVLI_VT_STORE, p, &out->store[i], &used[KVLI_VT_STORE]);
        out->write[i] = out->store[i];
        if (r == KVL_OK && c->ctx->vk->caps.cpu_shapes) /* which runs both branches of a condition */
            r = kvli_vk_pipeline_get(c, l, KVLI_VT_WRITE, p, &out->write[i], &used[KVLI_VT_WRITE]);
        if (r == KVL_OK)
            r = kvli_vk_pipeline_get(c, l, KVLI_VT_DECODE, p, &out->decode[i], &used[KVLI_VT_DECODE]);
        if (r == KVL_OK)
            r = kvli_vk_pipeline_get(c, l, KVLI_VT_PREFILL, p, &out->prefill[i], &used[KVLI_VT_PREFILL]);
        out->halves = out->halves && used[KVLI_VT_DECODE] & used[KVLI_VT_PREFILL] & KVLI_VK_STORAGE16;
        if (r == KVL_OK)
            kvli_vk_say(c->ctx, "%s, head dim %u: store %s, decode %s, prefill %s, merge %s", p->name,
                        c->geo.k_dim, kvli_vk_variant(used[KVLI_VT_STORE]),
                        kvli_vk_variant(used[KVLI_VT_DECODE]), kvli_vk_variant(used[KVLI_VT_PREFILL]),
                        kvli_vk_variant(used[KVLI_VT_MERGE]));
    }
    return r;
}
static kvl_result kvli_vk_pipelines(kvl_cache *c) {
    kvli_lock(&c->ctx->vk->lock);
    kvl_result r = kvli_vk_pipelines_all(c);
    kvli_unlock(&c->ctx->vk->lock);
    return r;
}

/* What stands on the device goes with it; verdicts stay. */
static void kvli_vk_pipelines_free(kvl_context *ctx) {
    struct kvli_vk *vk = ctx->vk;
    kvli_vk_shelf *p = &vk->shelf;
    for (uint32_t i = 0; i < p->n_made; i++) {
        if (p->made[i].pipeline) vk->fn.destroy_pipeline(vk->device, p->made[i].pipeline, NULL);
        p->made[i].pipeline = NULL;
    }
    while (p->layouts) {
        kvli_vk_layouts *l = p->layouts;
        p->layouts = l->next;
        if (l->pipeline) vk->fn.destroy_pipeline_layout(vk->device, l->pipeline, NULL);
        for (uint32_t s = 0; s < 2; s++)
            if (l->sets[s]) vk->fn.destroy_set_layout(vk->device, l->sets[s], NULL);
        kvli_free(ctx, l, sizeof *l);
    }
    if (p->cache) vk->fn.destroy_pipeline_cache(vk->device, p->cache, NULL);
    p->cache = NULL;
}
static void kvli_vk_pipelines_forget(kvl_context *ctx) {
    kvli_vk_shelf *p = &ctx->vk->shelf;
    kvli_free(ctx, p->made, p->max_made * sizeof *p->made);
    memset(p, 0, sizeof *p);
}

/* ---- the blob of kvl_vulkan_cache: a head, verdicts, the driver's own ---- */
typedef struct kvli_vk_blob {
    char magic[8];
    uint64_t check; /* of all that follows */
    uint64_t bytes; /* of all */
    char source[64];
    uint8_t uuid[16];
    uint32_t vendor, device, driver, subgroup_size, n_verdicts, size_control;
} kvli_vk_blob;
enum {
    KVLI_VK_VERDICT_WORDS = KVLI_VK_SPECIALISATIONS + 2,
    KVLI_VK_CACHE_HEAD = 32,
    KVLI_VK_MOST_VERDICTS = 4096
};

static uint64_t kvli_vk_checksum(const uint8_t *at, size_t n) {
    uint64_t h = n;
    for (size_t i = 0; i < n; i += 8) {
        uint64_t word = 0;
        memcpy(&word, at + i, n - i < 8 ? n - i : 8);
        h = kvli_mix(h, word);
    }
    return h;
}

static kvli_vk_blob kvli_vk_blob_head(const kvl_context *ctx) {
    const struct kvli_vk *vk = ctx->vk;
    kvli_vk_blob b;
    memset(&b, 0, sizeof b);
    memcpy(b.magic, "KVLVULK1", sizeof b.magic);
    memcpy(b.source, kvli_vk_source_hash, kvli_min_u32(sizeof b.source, sizeof kvli_vk_source_hash - 1));
    memcpy(b.uuid, vk->properties.cache_uuid, sizeof b.uuid);
    b.vendor = vk->properties.vendor;
    b.device = vk->properties.device;
    b.driver = vk->properties.driver_version;
    b.subgroup_size = vk->caps.subgroup_size;
    b.size_control = vk->caps.size_control;
    return b;
}

/* Why the blob is of no use, or null. */
static const char *kvli_vk_blob_fault(const kvl_context *ctx, const uint8_t *at, size_t n, kvli_vk_blob *b) {
    kvli_vk_blob own = kvli_vk_blob_head(ctx);
    const size_t head = offsetof(kvli_vk_blob, bytes);
    if (n < sizeof *b) return "it is truncated";
    memcpy(b, at, sizeof *b);
    if (memcmp(b->magic, own.magic, sizeof b->magic)) return "it is not one";
    if (b->bytes != n) return "it is truncated, or more than it was";
    if (b->check != kvli_vk_checksum(at + head, n - head)) return "it is damaged";
    if (memcmp(b->source, own.source, sizeof b->source)) return "it is of other shaders";
    if (memcmp(b->uuid, own.uuid, sizeof b->uuid) || b->vendor != own.vendor || b->device != own.device ||
        b->driver != own.driver || b->subgroup_size != own.subgroup_size)
        return "it is of another driver or device";
    if (b->size_control != own.size_control) return "it is of a device created with other features";
    if (b->n_verdicts > KVLI_VK_MOST_VERDICTS ||
        b->n_verdicts > (n - sizeof *b) / (KVLI_VK_VERDICT_WORDS * sizeof(uint32_t)))
        return "it is damaged";
    return NULL;
}

/* VkPipelineCacheHeaderVersionOne: does the driver know these bytes for its own? */
static bool kvli_vk_is_of_driver(const struct kvli_vk *vk, const uint8_t *at, size_t n) {
    uint32_t head[4];
    if (n < KVLI_VK_CACHE_HEAD) return false;
    memcpy(head, at, sizeof head);
    return head[0] >= KVLI_VK_CACHE_HEAD && head[0] <= n && head[1] == 1 &&
           head[2] == vk->properties.vendor && head[3] == vk->properties.device &&
           memcmp(at + 16, vk->properties.cache_uuid, 16) == 0;
}

static kvl_result kvli_vk_pipelines_start(kvl_context *ctx, kvli_text why) {
    struct kvli_vk *vk = ctx->vk;
    size_t n = ctx->desc.vulkan.cache_bytes;
    kvli_vk_pipeline_cache_info info = {KVLI_VK_TYPE_PIPELINE_CACHE, NULL, 0, 0, NULL};
    const uint8_t *at = vk->shelf.filled ? NULL : (const uint8_t *)ctx->desc.vulkan.cache;
    kvli_vk_blob b;
    vk->shelf.filled = 1;
    for (uint32_t i = 0; i < vk->shelf.n_made && vk->shelf.size_control != vk->caps.size_control; i++)
        vk->shelf.made[i].verdict = KVLI_VK_UNTESTED; /* another device was lent: other subgroups */
    vk->shelf.size_control = vk->caps.size_control;
    kvli_vk_say(ctx, "%s has %s shaders, subgroups of %u%s", vk->properties.name,
                kvli_vk_variant(vk->caps.variants), vk->caps.subgroup_size,
                vk->caps.is_cpu ? "; it is a CPU" : "");
    const char *fault = at ? kvli_vk_blob_fault(ctx, at, n, &b) : NULL;
    if (fault) kvli_vk_say(ctx, "vulkan.cache is not used: %s", fault);
    for (uint32_t i = 0; at && !fault && i < b.n_verdicts; i++) {
        uint32_t w[KVLI_VK_VERDICT_WORDS];
        memcpy(w, at + sizeof b + i * sizeof w, sizeof w);
        if (w[0] >= sizeof kvli_vk_shaders / sizeof *kvli_vk_shaders || !w[1] || w[1] > KVLI_VK_WRONG)
            continue;
        kvli_vk_made *made = kvli_vk_made_at(ctx, w[0], w + 2);
        if (!made) return kvli_fail(NULL, why, KVL_OUT_OF_HOST_MEMORY, "the allocator returned null");
        made->verdict = w[1];
    }
    if (at && !fault) {
        size_t used = sizeof b + b.n_verdicts * KVLI_VK_VERDICT_WORDS * sizeof(uint32_t);
        bool own = kvli_vk_is_of_driver(vk, at + used, n - used);
        info.bytes = own ? n - used : 0;
        info.data = own ? at + used : NULL;
    }
    int e = vk->fn.create_pipeline_cache(vk->device, &info, NULL, &vk->shelf.cache);
    if (e && info.bytes && e != KVLI_VK_ERROR_OUT_OF_HOST_MEMORY && e != KVLI_VK_ERROR_OUT_OF_DEVICE_MEMORY) {
        info.bytes = 0; /* the driver does not take it */
        e = vk->fn.create_pipeline_cache(vk->device, &info, NULL, &vk->shelf.cache);
    }
    if (e) vk->shelf.cache = NULL;
    return e ? kvli_vk_refuse(ctx, why, e, "vkCreatePipelineCache") : KVL_OK;
}

static kvl_result kvli_vk_blob_write(kvl_context *ctx, uint8_t *to, size_t *bytes) {
    struct kvli_vk *vk = ctx->vk;
    const kvli_vk_shelf *p = &vk->shelf;
    kvli_vk_blob b = kvli_vk_blob_head(ctx);
    const size_t head = offsetof(kvli_vk_blob, bytes), room = *bytes;
    size_t n = sizeof b, of_driver = 0;
    int e = p->cache ? vk->fn.pipeline_cache_data(vk->device, p->cache, &of_driver, NULL) : 0;
    for (uint32_t i = 0; i < p->n_made && b.n_verdicts < KVLI_VK_MOST_VERDICTS; i++) {
        const kvli_vk_made *m = &p->made[i];
        uint32_t w[KVLI_VK_VERDICT_WORDS];
        if (m->verdict == KVLI_VK_UNTESTED) continue;
        w[0] = m->shader;
        w[1] = m->verdict;
        memcpy(w + 2, m->special, sizeof m->special);
        if (to && n + sizeof w <= room) memcpy(to + n, w, sizeof w);
        n += sizeof w;
        b.n_verdicts++;
    }
    *bytes = n + of_driver;
    if (e) return kvli_vk_fail(ctx, kvli_text_at(NULL, 0), e, "vkGetPipelineCacheData");
    if (!to) return KVL_OK;
    if (room < *bytes) return KVL_LIMIT;
    if (of_driver) e = vk->fn.pipeline_cache_data(vk->device, p->cache, &of_driver, to + n);
    if (e < 0) return kvli_vk_fail(ctx, kvli_text_at(NULL, 0), e, "vkGetPipelineCacheData");
    *bytes = n + of_driver; /* (as much as it was, or less) */
    b.bytes = *bytes;
    memcpy(to, &b, sizeof b);
    b.check = kvli_vk_checksum(to + head, *bytes - head);
    memcpy(to, &b, sizeof b);
    return KVL_OK;
}

static kvl_result kvli_vk_blob_out(kvl_context *ctx, void *to, size_t *bytes) {
    if (!ctx->vk || !ctx->vk->device) return KVL_UNSUPPORTED;
    kvli_lock(&ctx->vk->lock);
    kvl_result r = kvli_vk_blob_write(ctx, (uint8_t *)to, bytes);
    kvli_unlock(&ctx->vk->lock);
    return r;
}

/* ---- how much room there is ---- */
static kvl_result kvli_vk_room(const kvl_context *ctx, kvl_memory_info *out) {
    const struct kvli_vk *vk = ctx->vk;
    kvli_vk_memory_properties memory;
    kvli_vk_budget_properties budget;
    uint32_t i = 0;
    memset(out, 0, sizeof *out);
    if (vk->lost || !vk->device) return KVL_DEVICE_LOST;
    memset(&memory, 0, sizeof memory);
    memset(&budget, 0, sizeof budget);
    memory.type = KVLI_VK_TYPE_MEMORY_PROPERTIES;
    budget.type = KVLI_VK_TYPE_BUDGET_PROPERTIES;
    memory.next = vk->caps.memory_budget ? &budget : NULL;
    vk->fn.memory_properties(vk->physical, &memory);
    while (i + 1 < memory.n_types && !(memory.types[i].flags & KVLI_VK_MEMORY_DEVICE_LOCAL)) i++;
    uint32_t heap = memory.types[i].heap; /* where blocks are put first */
    out->total = memory.heaps[heap].size;
    out->budget = out->total / 10 * 8;
    out->live = vk->caps.memory_budget && budget.budget[heap];
    out->unified = vk->caps.unified;
    if (out->live) {
        out->budget = budget.budget[heap] < out->total ? budget.budget[heap] : out->total;
        out->used = budget.usage[heap];
    } else {
        kvli_lock(&ctx->vk->lock);
        for (kvl_cache *c = vk->caches; c; c = kvli_vk_of(c)->next) {
            kvli_lock(&c->lock);
            out->used += c->published.bytes_slabs + c->published.bytes_scratch + c->published.bytes_workspace;
            kvli_unlock(&c->lock);
        }
        kvli_unlock(&ctx->vk->lock);
    }
    out->available = out->budget > out->used ? out->budget - out->used : 0;
    return KVL_OK;
}
#endif
