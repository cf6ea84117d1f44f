// kvl_prefill_*, kvl_plain and kvl_merge against a double-precision reference that reads the same bytes.
#include "attend_case.h"

using namespace attend;

static std::string prefill_name(const Case &c) {
    return std::string("kvl_prefill_") + c.preset->name + "_d" + std::to_string(c.dim);
}
static size_t prefill_memory(const Case &c) { return kvli_cu_prefill_smem(c.dim); }
static std::string plain_name(const Case &) { return "kvl_plain"; }
static size_t plain_memory(const Case &c) { return kvli_cu_plain_smem(c.dim); }

static double worst;
static Result run_prefill(const Case &c) {
    Result r = run(c, prefill_name, prefill_memory, 32 * KVLI_CU_PREFILL_WARPS);
    worst = std::max(worst, r.error);
    return r;
}
static Result run_plain(const Case &c) { return run(c, plain_name, plain_memory, KVLI_CU_PLAIN_THREADS); }
static Case turn_case(const Preset &p, uint32_t dim, uint32_t turn) {
    static const uint32_t gqas[] = {1, 4, 2, 8, 7, 16}, blocks[] = {32, 64, 16};
    Case c;
    c.preset = &p, c.dim = dim, c.gqa = gqas[turn % 6], c.seed = turn + 1;
    c.kv_heads = 1 + turn % 2;
    c.block_tokens = blocks[turn % 3];
    c.rows = 1 + (turn * 29 % 150 + 20) / c.gqa; // packed rows of one to three items
    c.position = turn % 4 == 0 ? 0 : 30 + turn * 37 % 170;
    c.item_rows = turn % 5 ? kvli_cu_prefill_rows(dim) : 24 + turn % 37;
    c.split_blocks = turn % 4 == 1 ? 1 + turn % 3 : 0;
    c.window = turn % 3 == 2 ? 1 + turn * 13 % 90 : 0;
    c.sink_tokens = turn % 2 ? 4 : 0;
    c.softcap = turn % 4 == 2 ? 5.0f : 0;
    c.sink_logits = turn % 3 == 1;
    c.scratch = turn % 2;
    c.q_dtype = turn % 3, c.out_dtype = turn / 2 % 3;
    c.apart = turn / 3 % 2 ? 8 : 1;
    return c;
}

// Every preset and head dim; GQA, windows, sinks, softcap and all else by turns.
static void test_presets(void **) {
    uint32_t turn = 0;
    for (const Preset &p : presets) {
        if (KVL_CPU_ARCH < 800 && p.k == KVLI_GPU_BF16) continue;
        for (uint32_t dim : dims) {
            for (uint32_t i = 0; i < 3; i++, turn++) {
                if (KVL_CPU_ARCH != 800 && turn % 7 != 0) continue; // the other paths: a part of the cases
                Case c = turn_case(p, dim, turn);
                check(c, run_prefill(c));
            }
        }
    }
    print_message("largest error: %.2f of what is allowed\n", worst);
}

// Chunks that begin and end at, before and after edges of blocks, steps and units.
static void test_edges(void **) {
    for (uint32_t position : {0, 1, 15, 16, 31, 32, 63, 64}) {
        for (uint32_t rows : {1, 2, 16, 17, 31, 32, 33}) {
            Case c;
            if ((position + rows) % 3 != 0 && KVL_CPU_ARCH != 800) continue;
            c.preset = &presets[(position + rows) % 2 ? 0 : 7], c.block_tokens = 16u << (position + rows) % 3;
            c.position = position, c.rows = rows, c.gqa = 1 + rows % 3, c.kv_heads = 1,
            c.seed = position + rows;
            c.item_rows = 128, c.window = rows % 4 == 1 ? 1 + position % 20 : 0;
            check(c, run_prefill(c));
        }
    }
}

// q far beyond what f16 holds, and far below.
static void test_large_and_small_queries(void **) {
    for (float size : {1e-30f, 1e-5f, 1e6f, 1e30f}) {
        for (uint32_t i : {0, 5}) {
            Case c;
            c.preset = &presets[i], c.rows = 9, c.item_rows = 128, c.q_size = size,
            c.q_dtype = KVLI_GPU_DTYPE_F32;
            check(c, run_prefill(c));
        }
    }
}

// Equal bits whatever order lanes and warps run in, and for each row whatever its neighbours in an item are.
static void test_order(void **) {
    for (uint32_t i : {0, 3, 5, 7}) {
        Case c;
        c.preset = &presets[i], c.dim = i == 3 ? 80 : i == 5 ? 256 : 128, c.position = 133, c.rows = 20;
        c.window = i == 3 ? 70 : 0, c.block_tokens = i == 7 ? 16 : 64, c.kv_heads = 1,
        c.item_rows = kvli_cu_prefill_rows(c.dim);
        Result first = run_prefill(c);
        check(c, first);
        for (unsigned seed = 1; seed <= 4; seed++) {
            cuda_cpu::settings.seed = seed;
            Result again = run_prefill(c);
            cuda_cpu::settings.seed = 0;
            assert_true(again.out == first.out);
        }
        for (uint32_t rows : {5, 23}) { // other neighbours
            c.item_rows = rows;
            assert_true(run_prefill(c).out == first.out);
        }
    }
}

// Single precision: 16 millionths, and one for each unit of the largest |q| |k| and of the softcap.
static void test_plain(void **) {
    static const Preset f32 = {"f32", KVLI_GPU_F32, KVLI_GPU_F32, KVLI_GPU_F32, false, false, 26e-6};
    static const Preset bf16 = {"bf16", KVLI_GPU_BF16, KVLI_GPU_BF16, KVLI_GPU_BF16, false, false, 26e-6};
    uint32_t turn = 0;
    for (const Preset *p : {&f32, &bf16}) {
        for (uint32_t dim : {16, 48, 64, 80, 96, 112, 128, 192, 256}) {
            for (uint32_t i = 0; i < 3; i++, turn++) {
                if (KVL_CPU_ARCH != 800 && turn % 5 != 0) continue;
                Case c = turn_case(*p, dim, turn);
                c.rows = 1 + c.rows % 7, c.item_rows = 1 + turn % KVLI_CU_PLAIN_ROWS;
                Result r = run_plain(c);
                worst = std::max(worst, r.error);
                check(c, r);
            }
        }
    }
}

static void test_plain_order(void **) {
    static const Preset f32 = {"f32", KVLI_GPU_F32, KVLI_GPU_F32, KVLI_GPU_F32, false, false, 26e-6};
    Case c;
    c.preset = &f32, c.dim = 128, c.position = 150, c.rows = 4, c.split_blocks = 2;
    Result first = run_plain(c);
    check(c, first);
    for (unsigned seed = 1; seed <= 6; seed++) {
        cuda_cpu::settings.seed = seed;
        Result again = run_plain(c);
        cuda_cpu::settings.seed = 0;
        assert_true(again.out == first.out);
    }
    c.item_rows = 3;
    assert_true(run_plain(c).out == first.out);
}

int main() {
    const CMUnitTest tests[] = {
        cmocka_unit_test(test_presets),
        cmocka_unit_test(test_edges),
        cmocka_unit_test(test_large_and_small_queries),
        cmocka_unit_test(test_order),
        cmocka_unit_test(test_plain),
        cmocka_unit_test(test_plain_order),
    };
    return cmocka_run_group_tests(tests, nullptr, nullptr);
}
