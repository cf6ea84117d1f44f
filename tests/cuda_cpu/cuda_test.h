// What the tests of kernels share: cmocka from C++, planted bugs run in a child process, device memory that frees itself.
#ifndef CUDA_TEST_H
#define CUDA_TEST_H
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <sys/wait.h>
#include <unistd.h>
extern "C" {
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
}
#include "cuda_cpu.h"

template <class T> struct DeviceArray {
    T *data;
    size_t n;
    explicit DeviceArray(size_t n_) : data((T *)cuda_cpu::allocate(n_ * sizeof(T))), n(n_) {}
    ~DeviceArray() { cuda_cpu::release(data); }
    DeviceArray(const DeviceArray &) = delete;
    DeviceArray &operator=(const DeviceArray &) = delete;
    T &operator[](size_t i) { return data[i]; }
};

static inline uint32_t test_random(uint32_t *state) {
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

// What a child process says on stderr while it does f(user): the message of the shim's hook, or a sanitizer's report.
static inline std::string words_of_child(void (*f)(void *), void *user) {
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    fflush(stdout);
    pid_t child = fork();
    assert_true(child >= 0);
    if (!child) {
        dup2(ends[1], 2);
        cuda_cpu::set_error_hook(
            [](const char *message, void *) {
                fprintf(stderr, "%s\n", message);
                _exit(1);
            },
            nullptr);
        f(user);
        _exit(0);
    }
    close(ends[1]);
    std::string words;
    char buffer[4096];
    for (ssize_t got; (got = read(ends[0], buffer, sizeof buffer)) > 0;) words.append(buffer, (size_t)got);
    close(ends[0]);
    waitpid(child, nullptr, 0);
    return words;
}

// Asserts that f ends with an error that says `wanted`, or in a sanitizer's report.
static inline void assert_caught(void (*f)(void *), void *user, const char *wanted) {
    std::string words = words_of_child(f, user);
    if (words.find(wanted) != std::string::npos || words.find("Sanitizer") != std::string::npos ||
        words.find("runtime error:") != std::string::npos)
        return;
    fail_msg("expected \"%s\", found \"%s\"", wanted, words.c_str());
}
#endif
