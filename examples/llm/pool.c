/* pool.c - see pool.h.
 *
 * One 64-bit word says what there is to do: the loop's generation above, the number of unclaimed tasks below.
 * A claim is a compare-and-swap of that word, so a worker that comes late can never take a task of a loop
 * other than the one it saw, and fn/ctx may be read after the claim: the loop cannot end while a claimed task
 * is unfinished.
 */
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define SPIN_NS 50000 /* longer than the serial parts between two loops of a step */
#define SPIN_CHECK 64 /* pauses between two looks at the clock */

struct pool {
    _Alignas(64) _Atomic uint64_t work; /* generation << 32 | unclaimed tasks */
    _Alignas(64) _Atomic uint32_t done; /* finished tasks of this loop */
    _Alignas(64) _Atomic uint32_t sleepers;
    _Atomic bool stop;
    /* Written by the caller only while no task is unfinished. */
    pool_fn fn;
    void *ctx;
    uint32_t n_tasks;
    uint32_t n_threads;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    pthread_t threads[];
};

static void cpu_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Runs tasks until none is left to claim. */
static void work_off(pool *p) {
    for (;;) {
        uint64_t w = atomic_load_explicit(&p->work, memory_order_acquire);
        do {
            if ((uint32_t)w == 0) return;
        } while (!atomic_compare_exchange_weak_explicit(&p->work, &w, w - 1, memory_order_acq_rel,
                                                        memory_order_acquire));
        p->fn(p->ctx, p->n_tasks - (uint32_t)w);
        atomic_fetch_add_explicit(&p->done, 1, memory_order_release);
    }
}

static bool has_work(pool *p) {
    return (uint32_t)atomic_load_explicit(&p->work, memory_order_seq_cst) != 0 ||
           atomic_load_explicit(&p->stop, memory_order_seq_cst);
}

static void wait_for_work(pool *p) {
    int64_t start = now_ns();
    do {
        for (int i = 0; i < SPIN_CHECK; i++) {
            if (has_work(p)) return;
            cpu_pause();
        }
    } while (now_ns() - start < SPIN_NS);
    pthread_mutex_lock(&p->lock);
    atomic_fetch_add_explicit(&p->sleepers, 1, memory_order_seq_cst);
    while (!has_work(p)) pthread_cond_wait(&p->wake, &p->lock);
    atomic_fetch_sub_explicit(&p->sleepers, 1, memory_order_seq_cst);
    pthread_mutex_unlock(&p->lock);
}

static void *worker(void *arg) {
    pool *p = (pool *)arg;
    while (!atomic_load_explicit(&p->stop, memory_order_acquire)) {
        work_off(p);
        wait_for_work(p);
    }
    return NULL;
}

/* The caller publishes first and then looks for sleepers; a sleeper announces itself first and then looks
 * for work. Both in one total order: at least one of them sees the other. */
static void wake_sleepers(pool *p) {
    if (atomic_load_explicit(&p->sleepers, memory_order_seq_cst) == 0) return;
    pthread_mutex_lock(&p->lock);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
}

pool *pool_create(uint32_t n_threads) {
    if (n_threads == 0) {
        long n = sysconf(_SC_NPROCESSORS_ONLN);
        n_threads = n > 0 ? (uint32_t)n : 1;
    }
    if (n_threads > 1024) n_threads = 1024;
    size_t bytes = (sizeof(pool) + n_threads * sizeof(pthread_t) + 63) / 64 * 64;
    pool *p = (pool *)aligned_alloc(64, bytes);
    if (!p) return NULL;
    atomic_init(&p->work, 0);
    atomic_init(&p->done, 0);
    atomic_init(&p->sleepers, 0);
    atomic_init(&p->stop, false);
    p->fn = NULL;
    p->ctx = NULL;
    p->n_tasks = 0;
    p->n_threads = 1;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    for (uint32_t i = 1; i < n_threads; i++) {
        if (pthread_create(&p->threads[i - 1], NULL, worker, p) != 0) {
            pool_destroy(p);
            return NULL;
        }
        p->n_threads++;
    }
    return p;
}

void pool_destroy(pool *p) {
    if (!p) return;
    atomic_store_explicit(&p->stop, true, memory_order_seq_cst);
    wake_sleepers(p);
    for (uint32_t i = 1; i < p->n_threads; i++) pthread_join(p->threads[i - 1], NULL);
    pthread_cond_destroy(&p->wake);
    pthread_mutex_destroy(&p->lock);
    free(p);
}

uint32_t pool_threads(const pool *p) { return p->n_threads; }

void pool_run(pool *p, uint32_t n_tasks, pool_fn fn, void *ctx) {
    if (p->n_threads == 1 || n_tasks <= 1) {
        for (uint32_t i = 0; i < n_tasks; i++) fn(ctx, i);
        return;
    }
    p->fn = fn;
    p->ctx = ctx;
    p->n_tasks = n_tasks;
    atomic_store_explicit(&p->done, 0, memory_order_relaxed);
    uint64_t generation = (atomic_load_explicit(&p->work, memory_order_relaxed) >> 32) + 1;
    atomic_store_explicit(&p->work, generation << 32 | n_tasks, memory_order_seq_cst);
    wake_sleepers(p);
    work_off(p);
    /* A worker is in its last task. Where the system gave its processor to someone else, let it come back. */
    for (int spins = 0; atomic_load_explicit(&p->done, memory_order_acquire) != n_tasks; spins++) {
        if (spins < 4000)
            cpu_pause();
        else
            sched_yield();
    }
}

void pool_parallel_for(void *pool_as_user, uint32_t n_tasks, pool_fn fn, void *ctx) {
    pool_run((pool *)pool_as_user, n_tasks, fn, ctx);
}
