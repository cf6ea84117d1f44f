/* pool.h - a thread pool for short parallel loops.
 *
 * A decode step of a small model is some hundred parallel loops of a few microseconds each, so idle workers
 * spin for a moment before they sleep, and tasks are claimed one by one from an atomic counter. The calling
 * thread works too: a pool of n threads starts n - 1 workers, and a pool of one thread runs everything
 * inline.
 *
 * Threads: one caller at a time. Tasks of one loop run concurrently and may not start a loop on the same
 * pool.
 */
#ifndef LLM_POOL_H
#define LLM_POOL_H

#include <stdint.h>

typedef struct pool pool;

typedef void (*pool_fn)(void *ctx, uint32_t task);

/* n_threads = 0 takes the number of online processors. NULL where memory or threads are short. */
pool *pool_create(uint32_t n_threads);
void pool_destroy(pool *p); /* NULL is fine */
uint32_t pool_threads(const pool *p);

/* Runs fn(ctx, 0) ... fn(ctx, n_tasks - 1), each once, in any order, and returns when all are done. */
void pool_run(pool *p, uint32_t n_tasks, pool_fn fn, void *ctx);

/* The same with the pool as an opaque pointer: the shape of a parallel_for callback. */
void pool_parallel_for(void *pool_as_user, uint32_t n_tasks, pool_fn fn, void *ctx);

#endif /* LLM_POOL_H */
