// decode.comp and merge.comp against a double-precision reference that reads the same bytes; in subgroups of 8, 4 and 16, a process
// each, which share the cases between them.
#include <cstring>
#include <sys/wait.h>
#include "attend_case.h"

using namespace attend;

static Device device;
static uint32_t share; // of this process, 0..2
static bool full;
static double worst;

static const double TOLERANCE = 1e-5; // everything is computed in single precision
static const uint32_t ALL_DIMS[] = {64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256};

// As a CPU (workgroups of one subgroup that is one slot) or a GPU runs it.
static Shader decode_shader(const Case &c, uint32_t variant, uint32_t is_cpu) {
    uint32_t size = variant & KVLI_VK_SUBGROUP ? device.r.subgroup_size : 0;
    Shader s = {"decode", variant, kvli_vk_decode_rows(c.gqa), kvli_vk_decode_workgroup(size, is_cpu), 0};
    s.lanes = kvli_vk_decode_lanes(c.dim, s.rows, s.workgroup, size, is_cpu);
    return s;
}

static Result check(Case c, const Shader &s) {
    static Preset strict;
    strict = *c.preset;
    strict.tolerance = TOLERANCE;
    c.preset = &strict;
    c.item_rows = std::min(c.item_rows, s.rows);
    c.apart = s.variant & KVLI_VK_STORAGE16 ? 1 : 2;
    Result r = device.run(c, s);
    worst = std::max(worst, r.error);
    if (!(r.error <= 1) || r.overwrote)
        fail_msg("error %.2f of what is allowed%s: %s; variant %u, %u rows, %u lanes of %u", r.error,
                 r.overwrote ? ", wrote elsewhere" : "", c.text().c_str(), s.variant, s.rows, s.lanes,
                 s.workgroup);
    return r;
}

static const Preset &preset_at(uint32_t i) { return i == 0 ? preset_f32 : presets[i - 1]; }
enum { PRESETS = 1 + sizeof presets / sizeof presets[0] };

static uint32_t least_block(const Preset &p) { return kvli_gpu_channel_scale_bytes(p.k, 64) ? 32 : 16; }

// Features by turns, eight cases to a shader.
static Case feature_case(const Preset &p, uint32_t turn, uint32_t feature) {
    static const uint32_t gqas[] = {4, 1, 3, 8, 16, 2, 7, 5}, blocks[] = {32, 64, 16};
    Case c;
    c.preset = &p;
    c.gqa = gqas[turn % 8];
    c.block_tokens = std::max(blocks[turn % 3], least_block(p));
    c.seed = 10 * turn + feature;
    c.kv_heads = 1 + feature % 2;
    c.position = 40 + (turn * 7 + feature * 61) % 200;
    c.rows = feature % 4 == 3 ? 1 + turn % 8 : 1; // draft tokens
    c.scratch = feature % 3 == 0;
    c.split_blocks = feature % 2 ? 1 + turn % 3 : 0;
    c.window = feature % 4 >= 2 ? 20 + turn % 60 : 0;
    c.sink_tokens = feature == 3 || feature == 6 ? 4 : 0;
    c.softcap = feature % 4 == 1 ? 5.0f : 0;
    c.sink_logits = feature >= 5;
    c.q_dtype = feature % 3, c.out_dtype = (feature + turn) % 3;
    c.small = feature == 4;
    return c;
}

// Every preset with half of the head dims, or all (full); variants, shapes of workgroups and query heads for a KV head by turns.
static void test_presets(void **) {
    uint32_t turn = 0, kept = 0;
    for (uint32_t i = 0; i < PRESETS; i++) {
        for (uint32_t dim : ALL_DIMS) {
            if (++turn % 3 != share || (!full && turn / 3 % 2 != i % 2)) continue;
            uint32_t variant = ++kept * 5 % 8;
            for (uint32_t feature = 0; feature < 8; feature++) {
                Case c = feature_case(preset_at(i), turn, feature);
                c.dim = dim;
                check(c, decode_shader(c, variant, kept % 3 != 0));
            }
        }
    }
    print_message("largest error: %.2f of what is allowed\n", worst);
}

// Head dims for which 16 KB of shared memory decide on lanes and tokens, as GPUs run them.
static void test_large_heads(void **) {
    static const uint32_t gqas[] = {1, 8, 1}, variants[] = {0, 0, KVLI_VK_SUBGROUP};
    Case c = feature_case(presets[0], 3, share);
    c.dim = 256;
    c.gqa = gqas[share];
    check(c, decode_shader(c, variants[share], 0));
}

// Sequences at the edges of blocks, and shorter than any; queries of any size.
static void test_lengths(void **) {
    for (uint32_t i : {2, 8}) { // f16, int4
        Case c;
        c.preset = &presets[i - 1];
        Shader s = decode_shader(c, KVLI_VK_SUBGROUP | KVLI_VK_STORAGE16, share != 1);
        for (uint32_t position : {0, 1, 15, 16, 31, 32, 33, 47, 63, 64, 127, 128}) {
            c.position = position, c.seed = position + 1;
            c.rows = 1, c.split_blocks = 0, c.item_rows = 8;
            check(c, s);
            c.rows = 3, c.item_rows = 3, c.split_blocks = 1;
            check(c, s);
        }
        for (float size : {1e-30f, 1e-5f, 1e6f, 1e30f}) {
            c.q_size = size;
            check(c, s);
        }
    }
}

// Equal bits from run to run, and for each row whatever its neighbours are.
static void test_order(void **) {
    for (uint32_t i : {0, 7}) {
        Case c;
        c.preset = &presets[i], c.dim = 128, c.position = 333, c.split_blocks = 4;
        c.rows = 2;
        Shader s = decode_shader(c, KVLI_VK_SUBGROUP | KVLI_VK_STORAGE16, share != 1);
        Result first = check(c, s);
        assert_true(check(c, s).out == first.out);
        for (uint32_t rows : {1, 3}) { // other companions
            c.item_rows = rows;
            assert_true(check(c, s).out == first.out);
        }
    }
}

// The shared memory that every device has is enough: without subgroups always, with those of 16 and more too.
static void test_shared_memory(void **) {
    for (uint32_t size : {0, 16, 32, 64, 128}) {
        for (uint32_t dim : ALL_DIMS) {
            for (uint32_t gqa = 1; gqa <= 16; gqa++) {
                uint32_t rows = kvli_vk_decode_rows(gqa), workgroup = kvli_vk_decode_workgroup(size, 0),
                         lanes = kvli_vk_decode_lanes(dim, rows, workgroup, size, 0);
                for (uint32_t T : {16, 32, 64})
                    if (kvli_vk_decode_shared(dim, rows, T, workgroup, lanes, size) > 16384)
                        fail_msg("head dim %u, %u rows, subgroups of %u", dim, rows, size);
            }
        }
    }
}

static int run_share(unsigned bits) {
    const CMUnitTest tests[] = {
        cmocka_unit_test(test_shared_memory), cmocka_unit_test(test_presets),
        cmocka_unit_test(test_large_heads),   cmocka_unit_test(test_lengths),
        cmocka_unit_test(test_order),
    };
    if (!device.open(bits, false, 4 << 20)) return 77;
    int failed = cmocka_run_group_tests_name(std::to_string(bits).c_str(), tests, nullptr, nullptr);
    device.close();
    return failed != 0;
}

int main(int argc, char **argv) {
    pid_t children[3];
    int result = 0;
    full = argc > 1 && !strcmp(argv[1], "full");
    for (share = 0; share < 3; share++) {
        children[share] = fork();
        if (children[share] == 0) return run_share(share == 0 ? 256 : share == 1 ? 128 : 512);
    }
    for (pid_t child : children) {
        int status;
        if (waitpid(child, &status, 0) != child || !WIFEXITED(status) || WEXITSTATUS(status) == 1) return 1;
        if (WEXITSTATUS(status)) result = WEXITSTATUS(status);
    }
    return result;
}
