/* As much of cmocka as the conformance suite uses, for machines that have a GPU and a compiler and no cmocka:
   tools/gpu_check.sh puts this folder into the include path then. The same lines are printed for each test. */
#ifndef WITHOUT_CMOCKA_H
#define WITHOUT_CMOCKA_H
#include <setjmp.h>
#include <stdio.h>
#include <string.h>

typedef int (*CMFixtureFunction)(void **state);
struct CMUnitTest {
    const char *name;
    void (*test_func)(void **state);
    CMFixtureFunction setup_func, teardown_func;
    void *initial_state;
};
#define cmocka_unit_test(f) \
    { #f, f, NULL, NULL, NULL }

enum { LITTLE_FAILED = 1, LITTLE_SKIPPED };
static jmp_buf little_out;
static const char *little_filter;

#define fail_msg(...)                                                                                   \
    (fprintf(stderr, "%s:%d: ", __FILE__, __LINE__), fprintf(stderr, __VA_ARGS__), fputc('\n', stderr), \
     longjmp(little_out, LITTLE_FAILED))
#define skip() longjmp(little_out, LITTLE_SKIPPED)
#define assert_true(c) ((c) ? (void)0 : fail_msg("%s is false", #c))
#define assert_false(c) assert_true(!(c))
#define assert_non_null(p) assert_true((p) != NULL)
#define assert_int_equal(a, b)                                                              \
    do {                                                                                    \
        long long little_a = (long long)(a), little_b = (long long)(b);                     \
        if (little_a != little_b) fail_msg("%s is %lld, not %lld", #a, little_a, little_b); \
    } while (0)
#define assert_memory_equal(a, b, n) assert_true(memcmp((a), (b), (n)) == 0)
#define cmocka_set_test_filter(f) (little_filter = (f))

static int little_matches(const char *name,
                          const char *filter) { /* a * at either end, as filters here have it */
    char word[256];
    size_t n = strlen(filter);
    if (n && filter[n - 1] == '*') n--;
    if (*filter == '*') filter++, n--;
    if (n >= sizeof word) return 1;
    memcpy(word, filter, n);
    word[n] = 0;
    return strstr(name, word) != NULL;
}

static int little_run(const char *group, const struct CMUnitTest *tests, size_t n) {
    volatile int failed = 0, passed = 0;
    for (volatile size_t i = 0; i < n; i++) {
        void *state = tests[i].initial_state;
        if (little_filter && !little_matches(tests[i].name, little_filter)) continue;
        fprintf(stderr, "[ RUN      ] %s\n", tests[i].name);
        fflush(stdout);
        int how = setjmp(little_out);
        if (!how) tests[i].test_func(&state);
        fprintf(stderr, "[%s ] %s\n",
                how == LITTLE_FAILED ? "  FAILED "
                : how                ? "  SKIPPED"
                                     : "       OK",
                tests[i].name);
        failed += how == LITTLE_FAILED;
        passed += !how;
    }
    fprintf(stderr, "[==========] %s: %d passed, %d failed\n", group, passed, failed);
    return failed;
}
#define cmocka_run_group_tests_name(name, tests, setup, teardown) \
    little_run(name, tests, sizeof(tests) / sizeof(tests)[0])

#endif
