// decode.comp and merge.comp against a double-precision reference that reads the same bytes.
#include "attend_case.h"

using namespace attend;

static Device device;
static double worst;

static Shader decode(const Case &c, uint32_t variant) {
    uint32_t size = variant & KVLI_VK_SUBGROUP ? device.r.subgroup_size : 0;
    Shader s = {"decode", variant, kvli_vk_decode_rows(c.gqa), kvli_vk_decode_workgroup(size, 1), 0};
    s.lanes = kvli_vk_decode_lanes(c.dim, s.rows, s.workgroup, size, 1);
    return s;
}
static void check(Case c, const Shader &s) {
    c.item_rows = s.rows;
    Result r = device.run(c, s);
    worst = std::max(worst, r.error);
    if (!(r.error <= 1) || r.overwrote)
        fail_msg("error %.2f of what is allowed%s: %s; variant %u, %u rows, %u lanes of %u", r.error,
                 r.overwrote ? ", wrote elsewhere" : "", c.text().c_str(), s.variant, s.rows, s.lanes, s.workgroup);
}

static void test_one(void **) {
    Case c;
    check(c, decode(c, 0));
    check(c, decode(c, KVLI_VK_SUBGROUP));
}

int main(int argc, char **argv) {
    const CMUnitTest tests[] = {cmocka_unit_test(test_one)};
    (void)argc;
    if (!device.open(argv[1] ? (unsigned)atoi(argv[1]) : 256, false)) return 77;
    int failed = cmocka_run_group_tests(tests, nullptr, nullptr);
    printf("worst %g\n", worst);
    device.close();
    return failed;
}
