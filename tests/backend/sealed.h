/* The bytes of sealed blocks, compared with those of kvl_tile_encode. */
#ifndef KVL_TESTS_SEALED_H
#define KVL_TESTS_SEALED_H
#include "conformance.h"

/* Bytes of a tile without its padding. */
static size_t tile_payload(kvl_format f, uint32_t tokens, uint32_t dim) {
    size_t n = (size_t)tokens * dim;
    switch (f & 0xff) {
    case KVL_F32: return n * 4;
    case KVL_F16:
    case KVL_BF16: return n * 2;
    case KVL_INT8:
    case KVL_FP8_E4M3: return n + tokens * 2;
    case KVL_INT8_CHANNEL: return n + dim * 4;
    case KVL_NVFP4: return n / 2 + n / 16;
    case KVL_INT4: return n / 2 + (size_t)tokens * ((dim + 63) / 64) * 4;
    default: return n / 2 + dim * 4;
    }
}

/* The rows of one head and block, rounded to the exact format, as kvl_tile_encode takes them. */
static void exact_rows(float *rows, char what, kvl_format exact, uint32_t block, uint32_t layer,
                       uint32_t head, uint32_t tokens, uint32_t dim) {
    for (uint32_t t = 0; t < tokens; t++) {
        conf_row(rows + (size_t)t * dim, what, block * tokens + t, layer, head, dim);
        for (uint32_t e = 0; e < dim; e++)
            rows[(size_t)t * dim + e] = (float)ref_round(exact, rows[(size_t)t * dim + e]);
    }
}

static bool tile_is(const conf_backend *b, uint64_t tile, kvl_format f, uint32_t tokens, uint32_t dim,
                    const float *rows) {
    static uint8_t want[64 * 256 * 4 + 4096], got[64 * 256 * 4 + 4096];
    assert_true(kvl_tile_bytes(f, tokens, dim) >= tile_payload(f, tokens, dim));
    assert_true(kvl_tile_bytes(f, tokens, dim) <= tile_payload(f, tokens, dim) + 127);
    assert_int_equal(kvl_tile_encode(f, tokens, dim, 0, rows, want), KVL_OK);
    if (b->download)
        b->download(got, tile, tile_payload(f, tokens, dim));
    else
        memcpy(got, (const void *)(uintptr_t)tile, tile_payload(f, tokens, dim));
    return memcmp(got, want, tile_payload(f, tokens, dim)) == 0;
}

enum { SEAL_HEADS = 2, SEAL_LAYERS = 2, SEAL_BLOCKS = 4 };

/* Fills SEAL_BLOCKS blocks and one row of a sequence, and compares the tiles that the block table points to. */
static void seal_and_compare(const conf_backend *b, kvl_format k, kvl_format v, kvl_format exact, uint32_t T,
                             uint32_t dim, uint32_t chunk) {
    static float q[65 * 256 * SEAL_HEADS], kr[65 * 256 * SEAL_HEADS], vr[65 * 256 * SEAL_HEADS],
        out[65 * 256 * SEAL_HEADS], rows[64 * 256];
    kvl_tensor tq = {.data = q}, tk = {.data = kr}, tv = {.data = vr}, to = {.data = out};
    kvl_cache_desc d = {.device_bytes = 24u << 20, .max_seq_tokens = 512, .poison = true};
    kvl_seq_desc open = {.no_match = true};
    int32_t tokens[65] = {0};
    kvl_cache *cache;
    kvl_seq seq;
    const kvl_step *step = NULL;
    uint32_t length = 0, total = SEAL_BLOCKS * T + 1;
    d.context_desc = (kvl_context_desc){.backend = b->kind, .simd = b->simd, .n_threads = b->n_threads};
    d.geometry = (kvl_geometry){
        .n_layers = SEAL_LAYERS, .n_q_heads = SEAL_HEADS, .n_kv_heads = SEAL_HEADS, .k_dim = dim};
    d.geometry.block_tokens = T;
    d.geometry.k_format = k;
    d.geometry.v_format = v;
    d.geometry.exact_format = exact;
    if (b->describe) b->describe(&d);
    assert_int_equal(kvl_cache_create(&d, &cache), KVL_OK);
    assert_int_equal(kvl_seq_open(cache, &open, &seq, NULL), KVL_OK);
    while (length < total) {
        uint32_t n = conf_min(chunk, total - length > 1 ? total - 1 - length : 1);
        kvl_span span = {seq, tokens, n, 1, NULL};
        assert_int_equal(kvl_step_begin(cache, &span, 1, &step), KVL_OK);
        for (uint32_t l = 0; l < SEAL_LAYERS; l++) {
            for (uint32_t i = 0; i < n * SEAL_HEADS; i++) {
                conf_row(q + i * dim, 'q', length + i / SEAL_HEADS, l, i % SEAL_HEADS, dim);
                conf_row(kr + i * dim, 'k', length + i / SEAL_HEADS, l, i % SEAL_HEADS, dim);
                conf_row(vr + i * dim, 'v', length + i / SEAL_HEADS, l, i % SEAL_HEADS, dim);
            }
            assert_int_equal(kvl_attend(cache, step, l, &tq, &tk, &tv, &to), KVL_OK);
        }
        length += n;
        if (length < total) assert_int_equal(kvl_step_end(cache, step), KVL_OK);
    }
    for (uint32_t j = 0; j < SEAL_BLOCKS; j++) { /* the last step is open: its tables are there */
        uint32_t entry = step->blocks[0].table[j];
        bool is_exact = (entry & KVL_ENTRY_EXACT) != 0;
        uint64_t block = step->block_address[entry & KVL_ENTRY_ID];
        if (k != exact || v != exact) assert_int_equal(is_exact, j == 0); /* sink_blocks is 1 */
        for (uint32_t l = 0; l < SEAL_LAYERS; l++) {
            kvl_block_layout at;
            assert_int_equal(kvl_cache_layout(cache, l, is_exact, &at), KVL_OK);
            if (!is_exact) assert_true(at.k_format == k && at.v_format == v);
            for (uint32_t h = 0; h < SEAL_HEADS; h++) {
                uint64_t tile = block + at.layer_offset + h * at.head_stride;
                exact_rows(rows, 'k', exact, j, l, h, T, dim);
                if (!tile_is(b, tile, at.k_format, T, dim, rows)) {
                    fail_msg("%s: keys %s, T %u, dim %u, block %u, layer %u, head %u: other bytes", b->name,
                             kvl_format_name(at.k_format), T, dim, j, l, h);
                }
                exact_rows(rows, 'v', exact, j, l, h, T, dim);
                if (!tile_is(b, tile + at.v_offset, at.v_format, T, dim, rows)) {
                    fail_msg("%s: values %s, T %u, dim %u, block %u, layer %u, head %u: other bytes", b->name,
                             kvl_format_name(at.v_format), T, dim, j, l, h);
                }
            }
        }
    }
    assert_int_equal(kvl_step_abort(cache, step), KVL_OK);
    kvl_cache_destroy(cache);
}

#endif
