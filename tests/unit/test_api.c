/* The public API's edges: names, defaults, handles, bad input. Every error leaves the state as it was. */
#define KVL_IMPLEMENTATION
#include "../common/kvl_test.h"

#define LAYERS 2

/* ---------------------------------------------------------------- names */

static void test_result_names(void **state) {
    static const struct {
        kvl_result r;
        int value;
        const char *name;
    } pinned[] = {
        {KVL_OK, 0, "OK"},
        {KVL_IDLE, 1, "IDLE"},
        {KVL_DRAINED, 2, "DRAINED"},
        {KVL_INVALID_ARG, -1, "INVALID_ARG"},
        {KVL_OUT_OF_HOST_MEMORY, -2, "OUT_OF_HOST_MEMORY"},
        {KVL_OUT_OF_DEVICE_MEMORY, -3, "OUT_OF_DEVICE_MEMORY"},
        {KVL_NO_BLOCKS, -4, "NO_BLOCKS"},
        {KVL_QUEUE_FULL, -5, "QUEUE_FULL"},
        {KVL_BUSY, -6, "BUSY"},
        {KVL_NO_BACKEND, -7, "NO_BACKEND"},
        {KVL_UNSUPPORTED, -8, "UNSUPPORTED"},
        {KVL_INVALID_HANDLE, -9, "INVALID_HANDLE"},
        {KVL_CLOSED, -10, "CLOSED"},
        {KVL_NEVER_FITS, -11, "NEVER_FITS"},
        {KVL_MISMATCH, -12, "MISMATCH"},
        {KVL_CORRUPT, -13, "CORRUPT"},
        {KVL_LIMIT, -14, "LIMIT"},
    };
    (void)state;
    for (size_t i = 0; i < KT_COUNT(pinned); i++) {
        assert_int_equal((int)pinned[i].r, pinned[i].value);
        assert_string_equal(kvl_result_name(pinned[i].r), pinned[i].name);
        assert_true(strlen(kvl_result_text(pinned[i].r)) > 3);
    }
    assert_non_null(kvl_result_name((kvl_result)-999));
    assert_non_null(kvl_result_text((kvl_result)999));
}

static void test_format_names(void **state) {
    static const kvl_format rotated[] = {KVL_INT8, KVL_FP8_E4M3, KVL_NVFP4, KVL_INT4};
    (void)state;
    for (kvl_format f = KVL_F32; f < KVL_FORMAT_COUNT; f++) {
        const char *name = kvl_format_name(f);
        assert_int_equal(kvl_format_from_name(name), f);
        for (kvl_format g = KVL_F32; g < f; g++) assert_string_not_equal(name, kvl_format_name(g));
    }
    for (size_t i = 0; i < KT_COUNT(rotated); i++) {
        char name[64];
        snprintf(name, sizeof name, "%s", kvl_format_name(rotated[i] | KVL_ROTATED));
        assert_string_not_equal(name, kvl_format_name(rotated[i]));
        assert_int_equal(kvl_format_from_name(name), rotated[i] | KVL_ROTATED);
    }
    assert_int_equal(kvl_format_from_name("int4_channel"), KVL_INT4_CHANNEL);
    assert_int_equal(kvl_format_from_name("int4+rot"), KVL_INT4 | KVL_ROTATED);
    assert_int_equal(kvl_format_from_name("int5"), KVL_FORMAT_DEFAULT);
    assert_int_equal(kvl_format_from_name("f16+rot"), KVL_FORMAT_DEFAULT);
    assert_int_equal(kvl_format_from_name(""), KVL_FORMAT_DEFAULT);
    assert_int_equal(kvl_format_from_name(NULL), KVL_FORMAT_DEFAULT);
    assert_non_null(kvl_format_name(9999));
}

static void test_presets(void **state) {
    static const char *const names[] = {"f32", "f16",   "bf16",     "int8", "int8+",
                                        "fp8", "nvfp4", "balanced", "int4"};
    uint32_t n = 0;
    const kvl_preset *table = kvl_presets(&n);
    (void)state;
    assert_int_equal(n, KT_COUNT(names));
    for (size_t i = 0; i < KT_COUNT(names); i++) {
        const kvl_preset *p = kvl_preset_find(names[i]);
        assert_non_null(p);
        assert_true(p >= table && p < table + n);
        assert_string_equal(p->name, names[i]);
        assert_true(kvl_tile_bytes(p->k, 32, 64) > 0 && kvl_tile_bytes(p->v, 32, 64) > 0);
        assert_true(p->exact == KVL_F32 || p->exact == KVL_F16 || p->exact == KVL_BF16);
    }
    assert_non_null(kvl_presets(NULL));
    assert_null(kvl_preset_find("int9"));
    assert_null(kvl_preset_find(NULL));
    assert_int_equal(kvl_preset_find("int8")->k, KVL_INT8);
    assert_int_equal(kvl_preset_find("int8")->v, KVL_INT8);
    assert_int_equal(kvl_preset_find("int4")->k, KVL_INT4_CHANNEL);
}

static void test_tile_bytes(void **state) {
    (void)state;
    assert_int_equal(kvl_tile_bytes(KVL_F32, 32, 64), 32 * 64 * 4);
    assert_int_equal(kvl_tile_bytes(KVL_F16, 16, 64), 16 * 64 * 2);
    assert_int_equal(kvl_tile_bytes(KVL_INT8, 32, 64), 32 * 64 + 128);     /* 64 bytes of scales, padded */
    assert_int_equal(kvl_tile_bytes(KVL_INT4, 32, 64), 32 * 32 + 128);     /* 4 bytes a token */
    assert_int_equal(kvl_tile_bytes(KVL_NVFP4, 32, 64), 32 * 32 + 32 * 4); /* 4 scales a token */
    assert_int_equal(kvl_tile_bytes(KVL_INT4_CHANNEL, 32, 64), 32 * 32 + 256); /* 4 bytes a channel */
    assert_int_equal(kvl_tile_bytes(KVL_INT8_CHANNEL, 8, 64), 0);
    assert_int_equal(kvl_tile_bytes(KVL_F16, 12, 64), 0);
    assert_int_equal(kvl_tile_bytes(KVL_F16, 32, 20), 0);
    assert_int_equal(kvl_tile_bytes(KVL_F16, 32, 0), 0);
    assert_int_equal(kvl_tile_bytes(KVL_FORMAT_COUNT, 32, 64), 0);
    assert_int_equal(kvl_tile_bytes(KVL_F16 | KVL_ROTATED, 32, 64), 0);
    assert_int_equal(kvl_tile_bytes(0xffffffffu, 0xffffffffu, 0xffffffffu), 0);
}

static void test_tile_arguments(void **state) {
    static float rows[32 * 64];
    static unsigned char tile[32 * 64 * 4];
    (void)state;
    assert_int_equal(kvl_tile_encode(KVL_INT8, 32, 64, 0, NULL, tile), KVL_INVALID_ARG);
    assert_int_equal(kvl_tile_encode(KVL_INT8, 32, 64, 0, rows, NULL), KVL_INVALID_ARG);
    assert_int_equal(kvl_tile_decode(KVL_INT8, 32, 64, 0, NULL, false, rows), KVL_INVALID_ARG);
    assert_int_equal(kvl_tile_decode(KVL_INT8, 32, 64, 0, tile, false, NULL), KVL_INVALID_ARG);
    assert_true(kvl_tile_encode(KVL_INT8, 31, 64, 0, rows, tile) < 0);
    assert_true(kvl_tile_encode(99, 32, 64, 0, rows, tile) < 0);
    assert_true(kvl_tile_decode(KVL_INT4_CHANNEL, 8, 64, 0, tile, false, rows) < 0);
    rows[70] = 1.0f;
    assert_int_equal(kvl_tile_encode(KVL_INT8, 32, 64, 0, rows, tile), KVL_OK);
    rows[70] = 0.0f;
    assert_int_equal(kvl_tile_decode(KVL_INT8, 32, 64, 0, tile, true, rows), KVL_OK);
    assert_true(fabsf(rows[70] - 1.0f) < 1e-2f);
    assert_true(rows[71] == 0.0f);
}

static void test_reason_texts(void **state) {
    (void)state;
    for (int r = KVL_MATCH_ALL; r <= KVL_MATCH_EMPTY; r++) {
        assert_true(strlen(kvl_match_reason_text((kvl_match_reason)r)) > 3);
        for (int q = KVL_MATCH_ALL; q < r; q++) {
            assert_string_not_equal(kvl_match_reason_text((kvl_match_reason)r),
                                    kvl_match_reason_text((kvl_match_reason)q));
        }
    }
    assert_non_null(kvl_match_reason_text((kvl_match_reason)77));
}

/* ---------------------------------------------------------------- defaults and create */

static void test_cache_defaults(void **state) {
    kvl_cache_desc desc, full;
    (void)state;
    memset(&desc, 0, sizeof desc);
    desc.geometry.n_layers = 2;
    desc.geometry.n_q_heads = 4;
    desc.geometry.k_dim = 64;
    desc.device_bytes = 64u << 20;
    assert_int_equal(kvl_cache_defaults(&desc, &full), KVL_OK);
    assert_int_equal(full.geometry.n_kv_heads, 4);
    assert_int_equal(full.geometry.v_dim, 64);
    assert_true(fabsf(full.geometry.scale - 0.125f) < 1e-7f);
    assert_int_equal(full.geometry.block_tokens, 32);
    assert_string_equal(full.geometry.preset, "int8");
    assert_int_equal(full.geometry.k_format, KVL_INT8);
    assert_int_equal(full.geometry.v_format, KVL_INT8);
    assert_int_equal(full.geometry.exact_format, KVL_F16);
    assert_int_equal(full.geometry.sink_blocks, 1);
    assert_int_equal(full.geometry.segment_tokens, 1024);
    assert_int_equal(full.device_bytes, 64u << 20);
    assert_int_equal(full.max_device_bytes, 64u << 20);
    assert_int_equal(full.max_sequences, 256);
    assert_true(full.max_seq_tokens > 0 && full.max_seq_tokens <= 131072);
    assert_int_equal(full.max_step_tokens, 512);
    assert_int_equal(kvl_cache_defaults(NULL, &full), KVL_INVALID_ARG);
    assert_int_equal(kvl_cache_defaults(&desc, NULL), KVL_INVALID_ARG);
    desc.device_bytes = 0;
    assert_int_equal(kvl_cache_defaults(&desc, &full), KVL_INVALID_ARG);
}

static void test_sched_defaults(void **state) {
    kvl_cache_desc desc = kt_desc(NULL, LAYERS, 16, NULL);
    kvl_sched_desc sdesc, full;
    kvl_cache *cache;
    (void)state;
    KT_OK(NULL, kvl_cache_create(&desc, &cache));
    memset(&sdesc, 0, sizeof sdesc);
    assert_int_equal(kvl_sched_defaults(cache, &sdesc, &full), KVL_OK);
    assert_int_equal(full.max_running, 16);
    assert_int_equal(full.max_waiting, 4096);
    assert_int_equal(full.token_pool_bytes, 256u << 20);
    assert_int_equal(full.step_tokens, 128);
    assert_int_equal(full.min_chunk, 16);
    assert_int_equal(kvl_sched_defaults(cache, NULL, NULL), KVL_INVALID_ARG);
    assert_int_equal(kvl_sched_defaults(NULL, &sdesc, &full), KVL_INVALID_ARG);
    kvl_cache_destroy(cache);
}

typedef struct bad_desc {
    const char *field; /* must stand in the error text */
    kvl_result expected;
    void (*spoil)(kvl_cache_desc *d);
} bad_desc;

static kvl_layer bad_layers[LAYERS];

static void with_layers(kvl_cache_desc *d) {
    memset(bad_layers, 0, sizeof bad_layers);
    d->geometry.layers = bad_layers;
}

#define SPOIL(name, code) \
    static void spoil_##name(kvl_cache_desc *d) { code; }
SPOIL(budget, d->device_bytes = 0)
SPOIL(max_budget, d->max_device_bytes = d->device_bytes - 1)
SPOIL(no_layers, d->geometry.n_layers = 0)
SPOIL(no_q, d->geometry.n_q_heads = 0)
SPOIL(kv_heads, (d->geometry.n_q_heads = 6, d->geometry.n_kv_heads = 4))
SPOIL(k_dim_zero, d->geometry.k_dim = 0)
SPOIL(k_dim_odd, d->geometry.k_dim = 24)
SPOIL(k_dim_big, d->geometry.k_dim = 272)
SPOIL(v_dim, d->geometry.v_dim = 40)
SPOIL(block, d->geometry.block_tokens = 12)
SPOIL(block_big, d->geometry.block_tokens = 128)
SPOIL(preset, d->geometry.preset = "int3")
SPOIL(k_format, d->geometry.k_format = 77)
SPOIL(v_format, d->geometry.v_format = KVL_INT4_CHANNEL)
SPOIL(v_rotated, d->geometry.v_format = KVL_F16 | KVL_ROTATED)
SPOIL(exact_format, d->geometry.exact_format = KVL_INT8)
SPOIL(channel_block, (d->geometry.k_format = KVL_INT8_CHANNEL, d->geometry.block_tokens = 16))
SPOIL(segment, d->geometry.segment_tokens = 100)
SPOIL(scale_nan, d->geometry.scale = NAN)
SPOIL(shares, (with_layers(d), bad_layers[1].shares_kv_with = 1))
SPOIL(latent, (with_layers(d), bad_layers[1].latent_dim = 64))
SPOIL(recurrent, (with_layers(d), bad_layers[0].state_bytes = 4096))
SPOIL(layer_format, (with_layers(d), bad_layers[1].v_format = 55))
SPOIL(softcap, (with_layers(d), bad_layers[1].softcap = -1.0f))
SPOIL(softcap_nan, (with_layers(d), bad_layers[1].softcap = NAN))
SPOIL(layer_scale, (with_layers(d), bad_layers[1].scale = INFINITY))
SPOIL(k_global, (with_layers(d), bad_layers[1].k_global = -2.0f))
SPOIL(backend, d->context_desc.backend = (kvl_backend_kind)42)
SPOIL(simd, d->context_desc.simd = (kvl_simd)42)

static const bad_desc bad_descs[] = {
    {"device_bytes", KVL_INVALID_ARG, spoil_budget},
    {"max_device_bytes", KVL_INVALID_ARG, spoil_max_budget},
    {"n_layers", KVL_INVALID_ARG, spoil_no_layers},
    {"n_q_heads", KVL_INVALID_ARG, spoil_no_q},
    {"n_kv_heads", KVL_INVALID_ARG, spoil_kv_heads},
    {"k_dim", KVL_INVALID_ARG, spoil_k_dim_zero},
    {"k_dim", KVL_INVALID_ARG, spoil_k_dim_odd},
    {"k_dim", KVL_INVALID_ARG, spoil_k_dim_big},
    {"v_dim", KVL_INVALID_ARG, spoil_v_dim},
    {"block_tokens", KVL_INVALID_ARG, spoil_block},
    {"block_tokens", KVL_INVALID_ARG, spoil_block_big},
    {"int3", KVL_INVALID_ARG, spoil_preset},
    {"k_format", KVL_UNSUPPORTED, spoil_k_format},
    {"v_format", KVL_UNSUPPORTED, spoil_v_format},
    {"v_format", KVL_UNSUPPORTED, spoil_v_rotated},
    {"exact_format", KVL_INVALID_ARG, spoil_exact_format},
    {"k_format", KVL_UNSUPPORTED, spoil_channel_block},
    {"segment_tokens", KVL_INVALID_ARG, spoil_segment},
    {"scale", KVL_INVALID_ARG, spoil_scale_nan},
    {"shares_kv_with", KVL_UNSUPPORTED, spoil_shares},
    {"latent_dim", KVL_UNSUPPORTED, spoil_latent},
    {"state_bytes", KVL_UNSUPPORTED, spoil_recurrent},
    {"v_format", KVL_UNSUPPORTED, spoil_layer_format},
    {"softcap", KVL_INVALID_ARG, spoil_softcap},
    {"softcap", KVL_INVALID_ARG, spoil_softcap_nan},
    {"scale", KVL_INVALID_ARG, spoil_layer_scale},
    {"k_global", KVL_INVALID_ARG, spoil_k_global},
    {"backend", KVL_NO_BACKEND, spoil_backend},
    {"simd", KVL_INVALID_ARG, spoil_simd},
};

static void test_create_names_the_field(void **state) {
    (void)state;
    for (size_t i = 0; i < KT_COUNT(bad_descs); i++) {
        kt_env env;
        kvl_cache_desc desc;
        kvl_cache *cache = (kvl_cache *)&env;
        kvl_result r;
        kt_env_init(&env);
        desc = kt_desc(&env, LAYERS, 32, NULL);
        bad_descs[i].spoil(&desc);
        kt_error[0] = 0;
        r = kvl_cache_create(&desc, &cache);
        KT_CHECK(r == bad_descs[i].expected, "case %zu (%s): %s, text \"%s\"", i, bad_descs[i].field,
                 kvl_result_name(r), kt_error);
        KT_CHECK(strstr(kt_error, bad_descs[i].field), "case %zu: \"%s\" is not in \"%s\"", i,
                 bad_descs[i].field, kt_error);
        assert_null(cache);
        kt_env_check(&env);
    }
}

/* Sizes whose products overflow 32 or 64 bits, or that no machine has: an error, never a small allocation. */
static void test_create_overflow(void **state) {
    static const uint32_t huge[] = {0x7fffffffu, 0x80000000u, 0xfffffff0u, 0xffffffffu};
    (void)state;
    for (size_t i = 0; i < KT_COUNT(huge); i++) {
        for (int field = 0; field < 8; field++) {
            kt_env env;
            kvl_cache_desc desc;
            kvl_cache *cache = NULL;
            kvl_result r;
            kt_env_init(&env);
            desc = kt_desc(&env, LAYERS, 32, NULL);
            desc.host_bytes = 64u << 20; /* so that the test machine need not have the memory */
            switch (field) {
            case 0: desc.geometry.n_layers = huge[i]; break;
            case 1: desc.geometry.n_q_heads = huge[i]; break;
            case 2: desc.geometry.n_q_heads = desc.geometry.n_kv_heads = huge[i]; break;
            case 3: desc.max_sequences = huge[i]; break;
            case 4: desc.max_seq_tokens = huge[i]; break;
            case 5: desc.max_step_tokens = huge[i]; break;
            case 6: desc.geometry.segment_tokens = huge[i]; break;
            case 7: desc.device_bytes = UINT64_MAX - i; break;
            }
            kt_error[0] = 0;
            r = kvl_cache_create(&desc, &cache);
            if (r == KVL_OK) { /* lowered to what fits: then it must work */
                KT_CHECK(field == 4 || field == 6, "field %d = %x was taken", field, huge[i]);
                KT_VALID(cache);
                kvl_cache_destroy(cache);
            } else {
                assert_null(cache);
                assert_true(strlen(kt_error) > 5);
            }
            kt_env_check(&env);
        }
    }
}

static void test_create_budgets(void **state) {
    static const char *const presets[] = {"f16", NULL, "int4"};
    (void)state;
    for (size_t p = 0; p < KT_COUNT(presets); p++) {
        kt_env env;
        kvl_cache_desc desc;
        kvl_cache *cache = NULL;
        kvl_seq seq;
        kvl_seq_desc sdesc;
        unsigned long long takes = 0;
        const char *at;
        kt_env_init(&env);
        desc = kt_desc(&env, LAYERS, 32, presets[p]);
        desc.device_bytes = 64;
        assert_int_equal(kvl_cache_create(&desc, &cache), KVL_NO_BLOCKS);
        at = strstr(kt_error, "takes ");
        assert_non_null(at); /* says how much it takes */
        takes = strtoull(at + 6, NULL, 10);
        desc.device_bytes = takes;
        KT_OK(NULL, kvl_cache_create(&desc, &cache)); /* which is enough */
        memset(&sdesc, 0, sizeof sdesc);
        KT_OK(cache, kvl_seq_open(cache, &sdesc, &seq, NULL));
        KT_OK(cache, kvl_seq_extend(cache, seq, 33));
        kvl_cache_destroy(cache);
        desc.device_bytes = takes - 1; /* and no less is */
        assert_int_equal(kvl_cache_create(&desc, &cache), KVL_NO_BLOCKS);
        assert_null(cache);
        kt_env_check(&env);
    }
}

/* The cap on metadata holds, and the ledger's figure is what the allocator was asked for. */
static void test_host_ledger(void **state) {
    kt_env env;
    kvl_cache_desc desc;
    kvl_cache *cache = NULL;
    kvl_stats stats;
    size_t of_context;
    kvl_context *context = NULL;
    (void)state;
    kt_env_init(&env);
    desc = kt_desc(&env, LAYERS, 32, NULL);
    KT_OK(NULL, kvl_context_create(&desc.context_desc, &context));
    of_context = env.live_bytes;
    desc.context = context;
    KT_OK(NULL, kvl_cache_create(&desc, &cache));
    stats = kt_stats(cache);
    assert_int_equal(stats.bytes_metadata, env.live_bytes - of_context); /* device memory is numbers here */
    kvl_cache_destroy(cache);
    desc.host_bytes = stats.bytes_metadata;
    KT_OK(NULL, kvl_cache_create(&desc, &cache));
    kvl_cache_destroy(cache);
    desc.host_bytes = stats.bytes_metadata - 1;
    assert_int_equal(kvl_cache_create(&desc, &cache), KVL_OUT_OF_HOST_MEMORY);
    kvl_context_destroy(context);
    kt_env_check(&env);
}

/* Tiles of the layers of a group lie one after another in its block, in the formats asked for. */
static void test_layouts(void **state) {
    enum { N = 5, KV = 3 };
    kvl_layer layers[N];
    kvl_cache_desc desc = kt_desc(NULL, N, 32, "int4");
    kvl_cache *cache;
    (void)state;
    memset(layers, 0, sizeof layers);
    layers[1].window = layers[3].window = 64;
    layers[2].k_format = KVL_INT8;
    layers[3].v_format = KVL_FP8_E4M3;
    layers[4].window = 64;
    layers[4].sink_tokens = 4; /* a group of its own */
    desc.geometry.layers = layers;
    desc.geometry.n_kv_heads = KV;
    desc.geometry.n_q_heads = 2 * KV;
    desc.geometry.k_dim = 64;
    desc.geometry.v_dim = 32;
    desc.device_bytes = 16u << 20;
    KT_OK(NULL, kvl_cache_create(&desc, &cache));
    for (int exact = 0; exact < 2; exact++) {
        kvl_block_layout at[N];
        for (uint32_t l = 0; l < N; l++) {
            kvl_format k = exact ? KVL_F16 : l == 2 ? KVL_INT8 : KVL_INT4_CHANNEL;
            kvl_format v = exact ? KVL_F16 : l == 3 ? KVL_FP8_E4M3 : KVL_INT4 | KVL_ROTATED;
            KT_OK(cache, kvl_cache_layout(cache, l, exact != 0, &at[l]));
            assert_int_equal(at[l].k_format, k);
            assert_int_equal(at[l].v_format, v);
            assert_true(at[l].v_offset >= kvl_tile_bytes(k, 32, 64));
            assert_true(at[l].head_stride >= at[l].v_offset + kvl_tile_bytes(v, 32, 32));
            assert_true(at[l].layer_offset + KV * at[l].head_stride <= at[l].block_bytes);
            assert_int_equal((at[l].layer_offset | at[l].head_stride | at[l].v_offset) % 128, 0);
            for (uint32_t m = 0; m < l; m++) {
                bool together =
                    layers[l].window == layers[m].window && layers[l].sink_tokens == layers[m].sink_tokens;
                assert_int_equal(at[l].group == at[m].group, together);
                if (!together) continue;
                assert_int_equal(at[l].block_bytes, at[m].block_bytes);
                assert_true(at[m].layer_offset + KV * at[m].head_stride <= at[l].layer_offset);
            }
        }
    }
    kvl_cache_destroy(cache);
}

static void test_contexts(void **state) {
    kvl_context_desc desc = kt_context(NULL, KVL_BACKEND_AUTO);
    kvl_context *context = NULL;
    kvl_cache *a = NULL, *b = NULL;
    kvl_cache_desc cdesc = kt_desc(NULL, LAYERS, 16, NULL);
    (void)state;
    assert_int_equal(kvl_context_create(NULL, NULL), KVL_INVALID_ARG);
    assert_int_equal(kvl_context_create(&desc, NULL), KVL_INVALID_ARG);
    KT_OK(NULL, kvl_context_create(&desc, &context));
    assert_int_equal(strncmp(kvl_context_backend(context), "cpu", 3), 0);
    assert_non_null(kvl_context_report(context));
    cdesc.context = context;
    KT_OK(NULL, kvl_cache_create(&cdesc, &a)); /* several caches on one context */
    KT_OK(NULL, kvl_cache_create(&cdesc, &b));
    assert_ptr_equal(kvl_cache_context(a), context);
    assert_ptr_equal(kvl_cache_context(b), context);
    kvl_cache_destroy(a);
    KT_VALID(b);
    kvl_cache_destroy(b);
    kvl_context_destroy(context);
    desc.backend = KVL_BACKEND_NULL;
    KT_OK(NULL, kvl_context_create(&desc, &context));
    assert_int_equal(strncmp(kvl_context_backend(context), "null", 4), 0);
    kvl_context_destroy(context);
    kvl_context_destroy(NULL);
    kvl_cache_destroy(NULL);
    kvl_sched_destroy(NULL);
    assert_non_null(kvl_context_backend(NULL));
    assert_non_null(kvl_context_report(NULL));
    assert_null(kvl_cache_context(NULL));
}

/* ---------------------------------------------------------------- handles and steps */

typedef struct fixture {
    kt_env env;
    kvl_cache_desc desc;
    kvl_cache *cache;
} fixture;

static int setup(void **state) {
    fixture *f = (fixture *)calloc(1, sizeof *f);
    kt_env_init(&f->env);
    f->desc = kt_desc(&f->env, LAYERS, 16, NULL);
    KT_OK(NULL, kvl_cache_create(&f->desc, &f->cache));
    *state = f;
    return 0;
}

static int teardown(void **state) {
    fixture *f = (fixture *)*state;
    KT_VALID(f->cache);
    kvl_cache_destroy(f->cache);
    kt_env_check(&f->env);
    free(f);
    return 0;
}

static kvl_seq open_plain(kvl_cache *cache) {
    kvl_seq_desc desc;
    kvl_seq seq = {0};
    memset(&desc, 0, sizeof desc);
    KT_OK(cache, kvl_seq_open(cache, &desc, &seq, NULL));
    assert_int_not_equal(seq.id, 0);
    return seq;
}

/* Every function that takes a sequence, with one that is not open here. */
static void refused_handle(kvl_cache *cache, kvl_seq seq) {
    static const int32_t tokens[] = {1, 2, 3};
    const kvl_step *step = NULL;
    kvl_span span;
    kvl_seq other;
    uint32_t length = 77;
    kvl_stats before = kt_stats(cache), after;
    memset(&span, 0, sizeof span);
    span.seq = seq;
    span.tokens = tokens;
    span.n_tokens = 3;
    assert_int_equal(kvl_seq_extend(cache, seq, 10), KVL_INVALID_HANDLE);
    assert_int_equal(kvl_seq_fork(cache, seq, &other, &length), KVL_INVALID_HANDLE);
    assert_int_equal(kvl_seq_trim(cache, seq, 0, &length), KVL_INVALID_HANDLE);
    assert_int_equal(kvl_seq_pin(cache, seq, true), KVL_INVALID_HANDLE);
    assert_int_equal(kvl_seq_close(cache, seq), KVL_INVALID_HANDLE);
    assert_int_equal(kvl_seq_length(cache, seq, &length), KVL_INVALID_HANDLE);
    assert_false(kvl_seq_tainted(cache, seq));
    assert_int_equal(kvl_step_begin(cache, &span, 1, &step), KVL_INVALID_HANDLE);
    assert_true(strlen(kvl_last_error(cache)) > 5);
    after = kt_stats(cache);
    assert_memory_equal(&before, &after, sizeof before);
    KT_VALID(cache);
}

static void test_stale_handles(void **state) {
    fixture *f = (fixture *)*state;
    kvl_seq a = open_plain(f->cache), b, stale = a, bits;
    kvl_cache *other;
    kvl_cache_desc desc = f->desc;
    refused_handle(f->cache, (kvl_seq){0});
    refused_handle(f->cache, (kvl_seq){0xffffffffu});
    for (uint32_t bit = 0; bit < 32; bit++) {
        bits.id = a.id ^ (1u << bit);
        refused_handle(f->cache, bits);
    }
    KT_OK(f->cache, kvl_seq_close(f->cache, a));
    refused_handle(f->cache, stale);
    for (int i = 0; i < 300; i++) { /* the slot's next users have other handles */
        b = open_plain(f->cache);
        assert_int_not_equal(b.id, stale.id);
        refused_handle(f->cache, stale);
        KT_OK(f->cache, kvl_seq_close(f->cache, b));
    }
    b = open_plain(f->cache);
    KT_OK(NULL, kvl_cache_create(&desc, &other)); /* a handle of another cache */
    refused_handle(other, b);
    kvl_cache_destroy(other);
    KT_OK(f->cache, kvl_seq_close(f->cache, b));
}

static void test_null_arguments(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache *c = f->cache;
    kvl_seq_desc desc;
    kvl_seq seq = open_plain(c), out;
    kvl_span span;
    kvl_tensor t;
    kvl_fit fit;
    kvl_block_layout layout;
    const kvl_step *step = NULL;
    const int32_t token = 5;
    uint32_t length = 0;
    uint64_t held;
    memset(&desc, 0, sizeof desc);
    memset(&span, 0, sizeof span);
    memset(&t, 0, sizeof t);
    assert_int_equal(kvl_cache_create(NULL, &c), KVL_INVALID_ARG);
    c = f->cache;
    assert_int_equal(kvl_cache_create(&f->desc, NULL), KVL_INVALID_ARG);
    assert_non_null(kvl_last_error(NULL));
    assert_int_equal(kvl_cache_resize(NULL, 0, &held), KVL_INVALID_ARG);
    assert_int_equal(kvl_can_fit(NULL, 1, 1, &fit), KVL_INVALID_ARG);
    assert_int_equal(kvl_validate(NULL), KVL_INVALID_ARG);
    assert_int_equal(kvl_get_stats(NULL, NULL), KVL_INVALID_ARG);
    assert_int_equal(kvl_get_stats(c, NULL), KVL_INVALID_ARG);
    assert_int_equal(kvl_seq_open(NULL, &desc, &out, NULL), KVL_INVALID_ARG);
    assert_int_equal(kvl_seq_open(c, NULL, &out, NULL), KVL_INVALID_ARG);
    assert_int_equal(kvl_seq_open(c, &desc, NULL, NULL), KVL_INVALID_ARG);
    desc.n_tokens = 3; /* without tokens */
    assert_int_equal(kvl_seq_open(c, &desc, &out, NULL), KVL_INVALID_ARG);
    desc.n_tokens = 0;
    desc.priority = 8;
    assert_int_equal(kvl_seq_open(c, &desc, &out, NULL), KVL_INVALID_ARG);
    assert_non_null(strstr(kvl_last_error(c), "priority"));
    assert_int_equal(kvl_seq_extend(NULL, seq, 1), KVL_INVALID_ARG);
    assert_int_equal(kvl_seq_fork(NULL, seq, &out, &length), KVL_INVALID_ARG);
    assert_int_equal(kvl_seq_fork(c, seq, NULL, &length), KVL_INVALID_ARG);
    assert_int_equal(kvl_seq_trim(NULL, seq, 0, &length), KVL_INVALID_ARG);
    assert_int_equal(kvl_seq_pin(NULL, seq, true), KVL_INVALID_ARG);
    assert_int_equal(kvl_seq_close(NULL, seq), KVL_INVALID_ARG);
    assert_int_equal(kvl_seq_length(NULL, seq, &length), KVL_INVALID_ARG);
    assert_int_equal(kvl_seq_length(c, seq, NULL), KVL_INVALID_ARG);
    assert_false(kvl_seq_tainted(NULL, seq));
    assert_int_equal(kvl_step_begin(NULL, &span, 1, &step), KVL_INVALID_ARG);
    assert_int_equal(kvl_step_begin(c, NULL, 1, &step), KVL_INVALID_ARG);
    assert_int_equal(kvl_step_begin(c, &span, 0, &step), KVL_INVALID_ARG);
    span.seq = seq;
    span.n_tokens = 1; /* without tokens */
    assert_int_equal(kvl_step_begin(c, &span, 1, &step), KVL_INVALID_ARG);
    span.tokens = &token;
    assert_int_equal(kvl_step_begin(c, &span, 1, NULL), KVL_INVALID_ARG);
    span.n_tokens = 0;
    assert_int_equal(kvl_step_begin(c, &span, 1, &step), KVL_INVALID_ARG);
    span.n_tokens = 1;
    span.n_logits = 2; /* more than rows */
    assert_int_equal(kvl_step_begin(c, &span, 1, &step), KVL_INVALID_ARG);
    assert_true(kvl_step_end(NULL, NULL) == KVL_INVALID_ARG);
    assert_true(kvl_step_end(c, NULL) < 0);
    assert_true(kvl_step_abort(c, NULL) < 0);
    assert_true(kvl_attend(NULL, NULL, 0, &t, &t, &t, &t) == KVL_INVALID_ARG);
    assert_true(kvl_attend(c, NULL, 0, &t, &t, &t, &t) < 0);
    assert_int_equal(kvl_cache_layout(NULL, 0, true, &layout), KVL_INVALID_ARG);
    assert_int_equal(kvl_cache_layout(c, LAYERS, true, &layout), KVL_INVALID_ARG);
    assert_int_equal(kvl_cache_layout(c, 0, true, NULL), KVL_INVALID_ARG);
    KT_OK(c, kvl_seq_close(c, seq));
}

static void test_limits(void **state) {
    fixture *f = (fixture *)*state;
    kvl_seq seqs[16], more;
    kvl_seq_desc desc;
    kvl_span spans[2];
    const kvl_step *step = NULL;
    int32_t tokens[1100] = {0};
    uint32_t length = 9;
    memset(&desc, 0, sizeof desc);
    memset(spans, 0, sizeof spans);
    for (int i = 0; i < 16; i++) seqs[i] = open_plain(f->cache);
    assert_int_equal(kvl_seq_open(f->cache, &desc, &more, NULL), KVL_LIMIT);
    assert_non_null(strstr(kvl_last_error(f->cache), "max_sequences"));
    assert_int_equal(kvl_seq_fork(f->cache, seqs[0], &more, NULL), KVL_LIMIT);
    KT_OK(f->cache, kvl_seq_close(f->cache, seqs[15]));
    KT_OK(f->cache, kvl_seq_fork(f->cache, seqs[0], &seqs[15], &length));
    assert_int_equal(length, 0);
    spans[0].seq = seqs[0];
    spans[0].tokens = tokens;
    spans[0].n_tokens = 129;
    assert_int_equal(kvl_step_begin(f->cache, spans, 1, &step), KVL_LIMIT);
    assert_non_null(strstr(kvl_last_error(f->cache), "max_step_tokens"));
    spans[0].n_tokens = 64;
    spans[1] = spans[0];
    assert_int_equal(kvl_step_begin(f->cache, spans, 2, &step), KVL_INVALID_ARG); /* a sequence twice */
    spans[1].seq = seqs[1];
    spans[1].n_tokens = 65;
    assert_int_equal(kvl_step_begin(f->cache, spans, 2, &step), KVL_LIMIT);
    spans[1].n_tokens = 0xffffffc0u; /* the sum wraps to 0 */
    assert_int_equal(kvl_step_begin(f->cache, spans, 2, &step), KVL_LIMIT);
    for (int i = 0; i < 8; i++) {
        spans[0].n_tokens = 128;
        KT_OK(f->cache, kvl_step_begin(f->cache, spans, 1, &step));
        kt_attend(f->cache, step, LAYERS);
        KT_OK(f->cache, kvl_step_end(f->cache, step));
    }
    spans[0].n_tokens = 1;
    assert_int_equal(kvl_step_begin(f->cache, spans, 1, &step), KVL_LIMIT);
    assert_non_null(strstr(kvl_last_error(f->cache), "max_seq_tokens"));
    assert_true(kvl_seq_extend(f->cache, seqs[0], 1) < 0);
    assert_true(kvl_seq_extend(f->cache, seqs[1], 0xffffffffu) < 0);
    desc.tokens = tokens;
    desc.n_tokens = 0xffffffffu;
    assert_true(kvl_seq_open(f->cache, &desc, &more, NULL) < 0);     /* and does not read them */
    KT_OK(f->cache, kvl_seq_trim(f->cache, seqs[0], 1025, &length)); /* it is that short already */
    assert_int_equal(length, 1024);
    KT_OK(f->cache, kvl_seq_length(f->cache, seqs[0], &length));
    assert_int_equal(length, 1024);
    for (int i = 0; i < 16; i++) KT_OK(f->cache, kvl_seq_close(f->cache, seqs[i]));
}

static void test_step_protocol(void **state) {
    fixture *f = (fixture *)*state;
    kvl_cache *c = f->cache, *other;
    kvl_cache_desc odesc = f->desc;
    kvl_seq seq = open_plain(c), more;
    kvl_seq_desc desc;
    kvl_span span;
    kvl_tensor t;
    const kvl_step *step = NULL, *second = NULL;
    kvl_step fake;
    const int32_t tokens[4] = {1, 2, 3, 4};
    uint32_t length = 0;
    memset(&t, 0, sizeof t);
    memset(&desc, 0, sizeof desc);
    memset(&span, 0, sizeof span);
    span.seq = seq;
    span.tokens = tokens;
    span.n_tokens = 4;
    span.n_logits = 2;
    KT_OK(c, kvl_step_begin(c, &span, 1, &step));
    assert_int_equal(step->n_logits, 2);
    assert_int_equal(step->logit_rows[0], 2);
    assert_int_equal(step->logit_rows[1], 3);
    assert_int_equal(kvl_step_begin(c, &span, 1, &second), KVL_BUSY);
    assert_int_equal(kvl_seq_open(c, &desc, &more, NULL), KVL_BUSY);
    assert_int_equal(kvl_seq_fork(c, seq, &more, NULL), KVL_BUSY);
    assert_int_equal(kvl_seq_trim(c, seq, 0, &length), KVL_BUSY);
    assert_int_equal(kvl_seq_close(c, seq), KVL_BUSY);
    assert_int_equal(kvl_seq_extend(c, seq, 1), KVL_BUSY);
    assert_int_equal(kvl_cache_resize(c, f->desc.device_bytes, NULL), KVL_BUSY);
    KT_VALID(c);
    KT_OK(c, kvl_seq_length(c, seq, &length));
    assert_int_equal(length, 0);
    /* wrong steps */
    fake = *step;
    assert_int_equal(kvl_step_end(c, &fake), KVL_MISMATCH);
    assert_int_equal(kvl_step_abort(c, &fake), KVL_MISMATCH);
    assert_int_equal(kvl_attend(c, &fake, 0, &t, &t, &t, &t), KVL_MISMATCH);
    KT_OK(NULL, kvl_cache_create(&odesc, &other));
    assert_int_equal(kvl_step_end(other, step), KVL_MISMATCH);
    assert_int_equal(kvl_attend(other, step, 0, &t, &t, &t, &t), KVL_MISMATCH);
    kvl_cache_destroy(other);
    /* layers */
    assert_int_equal(kvl_step_end(c, step), KVL_MISMATCH); /* none has run */
    assert_int_equal(kvl_attend(c, step, LAYERS, &t, &t, &t, &t), KVL_INVALID_ARG);
    assert_int_equal(kvl_attend(c, step, 0, NULL, &t, &t, &t), KVL_INVALID_ARG);
    KT_OK(c, kvl_attend(c, step, 1, &t, &t, &t, &t)); /* any order */
    assert_int_equal(kvl_attend(c, step, 1, &t, &t, &t, &t), KVL_MISMATCH);
    assert_int_equal(kvl_step_end(c, step), KVL_MISMATCH); /* layer 0 is missing */
    KT_OK(c, kvl_attend(c, step, 0, &t, &t, &t, &t));
    KT_OK(c, kvl_step_end(c, step));
    KT_OK(c, kvl_seq_length(c, seq, &length));
    assert_int_equal(length, 4);
    /* a step that is over */
    assert_int_equal(kvl_step_end(c, step), KVL_MISMATCH);
    assert_int_equal(kvl_step_abort(c, step), KVL_MISMATCH);
    assert_int_equal(kvl_attend(c, step, 0, &t, &t, &t, &t), KVL_MISMATCH);
    KT_OK(c, kvl_step_begin(c, &span, 1, &step));
    KT_OK(c, kvl_step_abort(c, step));
    assert_int_equal(kvl_step_abort(c, step), KVL_MISMATCH);
    KT_OK(c, kvl_seq_length(c, seq, &length));
    assert_int_equal(length, 4);
    KT_OK(c, kvl_seq_close(c, seq));
}

/* ---------------------------------------------------------------- scheduler's edges */

static void test_sched_arguments(void **state) {
    fixture *f = (fixture *)*state;
    kvl_sched_desc sdesc;
    kvl_sched *s = NULL, *second = NULL;
    kvl_request q;
    kvl_req req = {0}, fork = {0};
    kvl_req_info info;
    const kvl_step *step = NULL;
    const int32_t tokens[9] = {1, 2, 3, 4, 5, 6, 7, 8, 9};
    uint32_t n = 0;
    memset(&sdesc, 0, sizeof sdesc);
    assert_int_equal(kvl_sched_create(NULL, &sdesc, &s), KVL_INVALID_ARG);
    assert_int_equal(kvl_sched_create(f->cache, &sdesc, NULL), KVL_INVALID_ARG);
    sdesc.policy = (kvl_policy)9;
    assert_int_equal(kvl_sched_create(f->cache, &sdesc, &s), KVL_INVALID_ARG);
    sdesc.policy = KVL_POLICY_FCFS;
    sdesc.max_gap_ms = NAN;
    assert_int_equal(kvl_sched_create(f->cache, &sdesc, &s), KVL_INVALID_ARG);
    sdesc.max_gap_ms = -1;
    assert_int_equal(kvl_sched_create(f->cache, &sdesc, &s), KVL_INVALID_ARG);
    sdesc.max_gap_ms = 0;
    sdesc.cost.decode_ms = -3;
    assert_int_equal(kvl_sched_create(f->cache, &sdesc, &s), KVL_INVALID_ARG);
    sdesc.cost.decode_ms = 0;
    KT_OK(f->cache, kvl_sched_create(f->cache, &sdesc, &s));
    assert_int_equal(kvl_sched_create(f->cache, &sdesc, &second), KVL_BUSY);

    memset(&q, 0, sizeof q);
    q.tokens = tokens;
    q.n_tokens = 9;
    assert_int_equal(kvl_sched_submit(NULL, &q, &req), KVL_INVALID_ARG);
    assert_int_equal(kvl_sched_submit(s, NULL, &req), KVL_INVALID_ARG);
    q.n_tokens = 0;
    assert_int_equal(kvl_sched_submit(s, &q, &req), KVL_INVALID_ARG);
    q.n_tokens = 9;
    q.tokens = NULL;
    assert_int_equal(kvl_sched_submit(s, &q, &req), KVL_INVALID_ARG);
    q.tokens = tokens;
    q.n_tokens = 0xffffffffu; /* refused by its size, tokens unread */
    assert_true(kvl_sched_submit(s, &q, &req) < 0);
    q.n_tokens = 9;
    q.n_stop_tokens = 9;
    q.stop_tokens = tokens;
    assert_int_equal(kvl_sched_submit(s, &q, &req), KVL_INVALID_ARG);
    q.n_stop_tokens = 1;
    q.stop_tokens = NULL;
    assert_int_equal(kvl_sched_submit(s, &q, &req), KVL_INVALID_ARG);
    q.n_stop_tokens = 0;
    q.priority = 8;
    assert_int_equal(kvl_sched_submit(s, &q, &req), KVL_INVALID_ARG);
    q.priority = 0;
    q.klass = (kvl_class)5;
    assert_int_equal(kvl_sched_submit(s, &q, &req), KVL_INVALID_ARG);
    q.klass = KVL_INTERACTIVE;
    assert_int_equal(kt_stats(f->cache).submitted, 0);
    assert_int_equal(kvl_sched_plan(s, &step), KVL_IDLE);
    assert_int_equal(kvl_sched_submit(s, &q, NULL), KVL_INVALID_ARG);
    KT_OK(f->cache, kvl_sched_submit(s, &q, &req));
    assert_int_not_equal(req.id, 0);

    assert_int_equal(kvl_sched_cancel(s, (kvl_req){0}), KVL_INVALID_HANDLE);
    assert_int_equal(kvl_sched_cancel(s, (kvl_req){req.id ^ 0x80000000u}), KVL_INVALID_HANDLE);
    assert_int_equal(kvl_sched_cancel(NULL, req), KVL_INVALID_ARG);
    assert_int_equal(kvl_sched_fork(s, (kvl_req){0}, NULL, &fork), KVL_INVALID_HANDLE);
    assert_int_equal(kvl_sched_fork(s, req, NULL, NULL), KVL_INVALID_ARG);
    assert_int_equal(kvl_sched_info(s, (kvl_req){0}, &info), KVL_INVALID_HANDLE);
    assert_int_equal(kvl_sched_info(s, req, NULL), KVL_INVALID_ARG);
    assert_int_equal(kvl_sched_tokens(s, (kvl_req){0}, NULL, 0, &n), KVL_INVALID_HANDLE);
    assert_int_equal(kvl_sched_tokens(s, req, NULL, 4, &n), KVL_INVALID_ARG);
    assert_int_equal(kvl_sched_plan(s, NULL), KVL_INVALID_ARG);
    assert_int_equal(kvl_sched_plan(NULL, &step), KVL_INVALID_ARG);
    assert_int_equal(kvl_sched_commit(s, NULL, NULL), KVL_MISMATCH);
    assert_int_equal(kvl_sched_abort(s, NULL), KVL_MISMATCH);
    assert_false(kvl_sched_wait(NULL, 0));
    kvl_sched_close(NULL);
    assert_non_null(kvl_sched_last_error(NULL));
    KT_VALID(f->cache);
    kvl_sched_destroy(s);
}

static void test_sched_protocol(void **state) {
    fixture *f = (fixture *)*state;
    kvl_sched_desc sdesc;
    kvl_sched *s = NULL;
    kvl_request q;
    kvl_req req = {0};
    const kvl_step *step = NULL, *second = NULL;
    kvl_step fake;
    kvl_stats before, after;
    int32_t token = 3;
    memset(&sdesc, 0, sizeof sdesc);
    memset(&q, 0, sizeof q);
    q.tokens = &token;
    q.n_tokens = 1;
    q.max_new_tokens = 2;
    KT_OK(f->cache, kvl_sched_create(f->cache, &sdesc, &s));
    KT_OK(f->cache, kvl_sched_submit(s, &q, &req));
    KT_OK(f->cache, kvl_sched_plan(s, &step));
    before = kt_stats(f->cache);
    assert_int_equal(kvl_sched_plan(s, &second), KVL_BUSY);
    assert_int_equal(kvl_sched_fork(s, req, NULL, &req), KVL_BUSY);
    assert_int_equal(kvl_cache_resize(f->cache, 0, NULL), KVL_BUSY);
    fake = *step;
    assert_int_equal(kvl_sched_commit(s, &fake, &token), KVL_MISMATCH);
    assert_int_equal(kvl_sched_commit(s, step, &token), KVL_MISMATCH); /* layers are missing */
    kt_attend(f->cache, step, LAYERS);
    assert_int_equal(kvl_sched_commit(s, step, NULL), KVL_INVALID_ARG); /* there is a logits row */
    assert_int_equal(kvl_sched_commit_ex(s, step, NULL), KVL_INVALID_ARG);
    after = kt_stats(f->cache);
    assert_int_equal(before.steps, after.steps);
    assert_int_equal(before.running, after.running);
    KT_OK(f->cache, kvl_sched_commit(s, step, &token));
    assert_int_equal(kvl_sched_commit(s, step, &token), KVL_MISMATCH);
    assert_int_equal(kvl_sched_abort(s, step), KVL_MISMATCH);
    kvl_sched_close(s);
    assert_int_equal(kvl_sched_submit(s, &q, &req), KVL_CLOSED);
    assert_non_null(kvl_sched_last_error(s));
    KT_OK(f->cache, kvl_sched_plan(s, &step)); /* what was queued goes on */
    kt_attend(f->cache, step, LAYERS);
    KT_OK(f->cache, kvl_sched_commit(s, step, &token));
    assert_int_equal(kvl_sched_plan(s, &step), KVL_DRAINED);
    assert_int_equal(kvl_sched_submit(s, &q, &req), KVL_CLOSED);
    kvl_sched_destroy(s);
    KT_OK(f->cache, kvl_sched_create(f->cache, &sdesc, &s)); /* the cache can have another */
    KT_OK(f->cache, kvl_sched_submit(s, &q, &req));
    KT_OK(f->cache, kvl_sched_plan(s, &step));
    kvl_sched_destroy(s); /* with a step open: aborted */
    assert_int_equal(kt_stats(f->cache).sequences, 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_result_names),
        cmocka_unit_test(test_format_names),
        cmocka_unit_test(test_presets),
        cmocka_unit_test(test_tile_bytes),
        cmocka_unit_test(test_tile_arguments),
        cmocka_unit_test(test_reason_texts),
        cmocka_unit_test(test_cache_defaults),
        cmocka_unit_test(test_sched_defaults),
        cmocka_unit_test(test_create_names_the_field),
        cmocka_unit_test(test_create_overflow),
        cmocka_unit_test(test_create_budgets),
        cmocka_unit_test(test_host_ledger),
        cmocka_unit_test(test_layouts),
        cmocka_unit_test(test_contexts),
        cmocka_unit_test_setup_teardown(test_stale_handles, setup, teardown),
        cmocka_unit_test_setup_teardown(test_null_arguments, setup, teardown),
        cmocka_unit_test_setup_teardown(test_limits, setup, teardown),
        cmocka_unit_test_setup_teardown(test_step_protocol, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sched_arguments, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sched_protocol, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
