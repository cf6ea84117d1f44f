// prefill.comp against a double-precision reference that reads the same bytes. Arithmetic is in single precision throughout.
#include "attend_case.h"

using namespace attend;

static Device device;
static double worst;

// As a device with 16 or 32 KB of shared memory has it.
static Shader prefill(uint32_t dim, uint32_t variant, uint32_t max_shared) {
    return {"prefill", variant, kvli_vk_prefill_rows(dim, max_shared), kvli_vk_prefill_workgroup(max_shared),
            kvli_vk_prefill_lanes(dim)};
}

static Result check(Case c, const Shader &s) {
    Preset single = *c.preset;
    single.tolerance = 5e-5;
    c.preset = &single;
    if (c.item_rows == 0) c.item_rows = s.rows;
    assert_true(c.item_rows <= s.rows);
    Result r = device.run(c, s);
    worst = std::max(worst, r.error);
    if (!(r.error <= 1) || r.overwrote)
        fail_msg("error %.2f of what is allowed%s: %s; variant %u, %u rows, workgroup %u", r.error,
                 r.overwrote ? ", wrote elsewhere" : "", c.text().c_str(), s.variant, s.rows, s.workgroup);
    return r;
}

// Every preset; head dims, GQA, windows, sinks, softcap and all else by turns.
static void test_presets(void **) {
    static const uint32_t dims[] = {64, 128, 80, 256, 96, 192, 112, 144, 160, 240, 176, 208, 224};
    static const uint32_t gqas[] = {1, 4, 2, 8, 7, 16}, blocks[] = {32, 64, 16};
    uint32_t turn = 0;
    for (uint32_t i = 0; i <= sizeof presets / sizeof presets[0]; i++) {
        for (uint32_t n = 0; n < 4; n++, turn++) {
            Case c;
            c.preset = i ? &presets[i - 1] : &preset_f32, c.dim = dims[turn % 13], c.seed = turn + 1;
            Shader s = prefill(c.dim, turn % 4 ^ i % 4, turn % 3 ? 16384 : 32768);
            c.gqa = gqas[turn % 6], c.kv_heads = 1 + turn % 2, c.block_tokens = blocks[turn % 3];
            c.rows = 1 + (turn * 29 % 70 + 20) / c.gqa; // packed rows of several items
            c.position = turn % 4 == 0 ? 0 : 30 + turn * 37 % 100;
            c.item_rows = turn % 5 ? s.rows : 1 + turn % s.rows;
            c.split_blocks = turn % 4 == 1 ? 1 + turn % 3 : 0;
            c.window = turn % 3 == 2 ? 1 + turn * 13 % 90 : 0, c.sink_tokens = turn % 2 ? 4 : 0;
            c.softcap = turn % 4 == 2 ? 5.0f : 0, c.sink_logits = turn % 3 == 1;
            c.scratch = turn % 2;
            c.q_dtype = turn % 3, c.out_dtype = turn / 2 % 3;
            c.apart = s.variant & KVLI_VK_STORAGE16 ? 1 : 2;
            check(c, s);
        }
    }
}

// Chunks that begin and end at, before and after edges of blocks and steps.
static void test_edges(void **) {
    for (uint32_t position : {0, 1, 15, 16, 31, 32, 63, 64}) {
        for (uint32_t rows : {1, 2, 16, 17, 31, 32, 33}) {
            if ((position + rows) % 2) continue;
            Case c;
            c.preset = &presets[rows % 4 == 0 ? 7 : 0], c.dim = rows % 4 == 0 ? 64 : 128;
            c.block_tokens = rows % 4 == 0 ? 16 : 64, c.position = position, c.rows = rows;
            c.gqa = 1 + rows % 3, c.kv_heads = 1, c.seed = position + rows, c.item_rows = 0;
            c.window = position % 4 == 1 ? 1 + position % 20 : 0;
            check(c, prefill(c.dim, 0, 16384));
        }
    }
}

// q far beyond what f16 holds, and far below.
static void test_large_and_small_queries(void **) {
    for (float size : {1e-30f, 1e6f, 1e30f}) {
        for (uint32_t i : {0, 5}) {
            Case c;
            c.preset = &presets[i], c.dim = i ? 64 : 128, c.rows = 9, c.item_rows = 0, c.q_size = size;
            check(c, prefill(c.dim, 0, 16384));
        }
    }
}

// Equal bits from run to run, and for each row whatever its neighbours in an item are.
static void test_order(void **) {
    for (uint32_t i : {0, 5, 7}) {
        Case c;
        c.preset = &presets[i], c.dim = i == 0 ? 128 : 64, c.block_tokens = i == 7 ? 16 : i == 0 ? 64 : 32;
        c.position = 83, c.rows = 20, c.window = i == 5 ? 70 : 0, c.kv_heads = 1;
        Shader s = prefill(c.dim, 0, 16384);
        c.item_rows = s.rows;
        Result first = check(c, s);
        for (uint32_t rows : {s.rows, 5u, 13u}) {
            c.item_rows = rows;
            assert_true(check(c, s).out == first.out);
        }
    }
}

// All fits the shared memory that a device must have, or 32 KB.
static void test_shared_memory(void **) {
    for (uint32_t dim = 64; dim <= 256; dim += 16) {
        for (uint32_t block_tokens = 16; block_tokens <= 64; block_tokens *= 2) {
            for (uint32_t max_shared : {16384u, 32768u}) {
                Shader s = prefill(dim, 0, max_shared);
                assert_true(kvli_vk_prefill_shared(dim, block_tokens, s.rows, s.lanes) <= max_shared);
                assert_int_equal(s.rows % (4 * (s.workgroup / s.lanes)), 0);
            }
        }
    }
}

int main(int argc, char **argv) {
    const CMUnitTest tests[] = {
        cmocka_unit_test(test_shared_memory), cmocka_unit_test(test_presets),
        cmocka_unit_test(test_edges),         cmocka_unit_test(test_large_and_small_queries),
        cmocka_unit_test(test_order),
    };
    if (!device.open(argc > 1 ? (unsigned)atoi(argv[1]) : 256, false, 8 << 20)) return 77;
    int failed = cmocka_run_group_tests(tests, nullptr, nullptr);
    printf("largest error: %.2f of what is allowed\n", worst);
    device.close();
    return failed;
}
