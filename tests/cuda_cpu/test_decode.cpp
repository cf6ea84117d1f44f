// kvl_decode_* and kvl_merge against a double-precision reference that reads the same bytes.
#include "attend_case.h"

using namespace attend;

static uint32_t tile_rows(const Case &c) { return c.item_rows > 8 ? 16 : 8; }
static std::string kernel_name(const Case &c) {
    return std::string("kvl_decode_") + c.preset->name + "_d" + std::to_string(c.dim) + "_n" +
           std::to_string(tile_rows(c));
}
static size_t kernel_memory(const Case &c) {
    return kvli_cu_decode_smem(c.preset->k, c.preset->v, c.dim, c.stages, tile_rows(c));
}

static double worst;
static Result run_decode(Case c) {
    while (c.stages > 1 && kernel_memory(c) > 99 * 1024) c.stages--; // what an RTX 4090 has
    if (KVL_CPU_ARCH < 800) c.stages = 0;
    Result r = run(c, kernel_name, kernel_memory, 32 * KVLI_CU_DECODE_WARPS);
    worst = std::max(worst, r.error);
    return r;
}
static void check(const Case &c) { check(c, run_decode(c)); }

// Every preset and head dim, with every number of query heads for a KV head, and features by turns.
static void test_presets(void **) {
    uint32_t turn = 0;
    for (const Preset &p : presets) {
        if (KVL_CPU_ARCH < 800 && p.k == KVLI_GPU_BF16) continue;
        for (uint32_t dim : dims) {
            for (uint32_t gqa : {1, 3, 4, 8, 16}) {
                for (uint32_t feature = 0; feature < 4; feature++, turn++) {
                    static const uint32_t blocks[] = {32, 64, 16};
                    Case c;
                    if (KVL_CPU_ARCH != 800 && (turn + dim / 16) % 5 != 0)
                        continue; // the other paths: a fifth of the cases
                    c.preset = &p, c.dim = dim, c.gqa = gqa, c.seed = turn + 1;
                    c.block_tokens = blocks[turn % 3];
                    if ((p.k == KVLI_GPU_INT8_CHANNEL || p.k == KVLI_GPU_INT4_CHANNEL) && c.block_tokens < 32)
                        c.block_tokens = 32;
                    c.kv_heads = 1 + turn % 2;
                    c.position = 60 + turn * 7 % 200;
                    c.rows = turn % 5 == 0 ? 1 + turn % 8 : 1; // draft tokens
                    c.item_rows = gqa > 8 || turn % 4 == 0 ? kvli_cu_decode_rows(c.dim) : 8;
                    c.stages = 1 + turn % 4;
                    c.scratch = turn % 3 == 0;
                    c.split_blocks = feature == 3 || turn % 3 == 1 ? 1 + turn % 3 : 0;
                    c.window = feature == 1 || feature == 3 ? 20 + turn % 60 : 0;
                    c.sink_tokens = feature == 3 ? 4 : 0;
                    c.softcap = feature == 2 ? 5.0f : 0;
                    c.sink_logits = feature >= 2;
                    c.q_dtype = turn % 3, c.out_dtype = turn / 3 % 3;
                    check(c);
                }
            }
        }
    }
    print_message("largest error: %.2f of what is allowed\n", worst);
}

// Sequences at the edges of blocks and units, and shorter than any.
static void test_lengths(void **) {
    for (const char *name : {"f16", "int4"}) {
        for (uint32_t position : {0, 1, 15, 16, 31, 32, 33, 47, 63, 64, 127, 128}) {
            Case c;
            c.preset = &presets[name[0] == 'f' ? 0 : 7];
            c.position = position, c.seed = position + 1;
            check(c);
            c.rows = 3, c.item_rows = 8, c.split_blocks = 1;
            check(c);
        }
    }
}

// q of any size, and queries of one row that do not disturb each other's.
static void test_large_and_small_queries(void **) {
    for (float size : {1e-30f, 1e-5f, 1e6f, 1e30f}) {
        Case c;
        c.q_size = size;
        check(c);
        c.preset = &presets[5];
        check(c);
    }
}

// Equal bits whatever order lanes and warps run in, and for each row whatever its neighbours are.
static void test_order(void **) {
    for (uint32_t i : {0, 3, 5, 7}) {
        Case c;
        c.preset = &presets[i], c.dim = i == 5 ? 80 : 128, c.position = 333, c.stages = 3, c.split_blocks = 4;
        c.rows = 2;
        Result first = run_decode(c);
        assert_true(first.error <= 1);
        for (unsigned seed = 1; seed <= 6; seed++) {
            cuda_cpu::settings.seed = seed;
            Result again = run_decode(c);
            cuda_cpu::settings.seed = 0;
            assert_true(again.out == first.out);
        }
        c.item_rows = 4; /* other companions */
        assert_true(run_decode(c).out == first.out);
    }
}

int main() {
    const CMUnitTest tests[] = {
        cmocka_unit_test(test_presets),
        cmocka_unit_test(test_lengths),
        cmocka_unit_test(test_large_and_small_queries),
        cmocka_unit_test(test_order),
    };
    return cmocka_run_group_tests(tests, nullptr, nullptr);
}
