/* minimal: plan, attend, commit with a toy model. Two prompts share a prefix and run in one batch.
   cc -O2 minimal.c -o minimal -lm -lpthread */
#define KVL_IMPLEMENTATION
#include "../kvlite.h"
#include <stdio.h>

enum { LAYERS = 2, Q_HEADS = 4, KV_HEADS = 2, DIM = 64, VOCAB = 97, MAX_ROWS = 64 };

static float number(uint32_t x) { /* weights of the toy: a hash in -1..1 */
    x = (x ^ 61) * 9u + 0x27d4eb2du;
    x ^= x >> 15;
    return (float)((x * 0x2c1b3c6du) >> 8) / 8388608.0f - 1.0f;
}

static void project(uint32_t what, const kvl_step *step, const float *x, uint32_t heads, float *out) {
    for (uint32_t r = 0; r < step->n_tokens; r++)
        for (uint32_t i = 0; i < heads * DIM; i++)
            out[r * heads * DIM + i] = number(what * 7919u + (uint32_t)step->tokens[r] * 131u + i) +
                                       0.1f * x[r] + 0.01f * (float)step->positions[r];
}

int main(void) {
    static float q[MAX_ROWS * Q_HEADS * DIM], k[MAX_ROWS * KV_HEADS * DIM], v[MAX_ROWS * KV_HEADS * DIM],
        out[MAX_ROWS * Q_HEADS * DIM];
    static float x[MAX_ROWS];
    const int32_t prompts[2][5] = {{11, 22, 33, 44, 55}, {11, 22, 33, 44, 66}};
    char error[256] = "";
    kvl_cache *cache;
    kvl_sched *sched;

    kvl_cache_desc desc = {0};
    desc.geometry.n_layers = LAYERS;
    desc.geometry.n_q_heads = Q_HEADS;
    desc.geometry.n_kv_heads = KV_HEADS;
    desc.geometry.k_dim = DIM;
    desc.device_bytes = 8 << 20;
    desc.max_step_tokens = MAX_ROWS;
    desc.error = error;
    desc.error_size = sizeof error;
    if (kvl_cache_create(&desc, &cache) != KVL_OK || kvl_sched_create(cache, NULL, &sched) != KVL_OK) {
        fprintf(stderr, "minimal: %s\n", error);
        return 1;
    }
    for (int i = 0; i < 2; i++) {
        kvl_request request = {0};
        kvl_req handle;
        request.tokens = prompts[i];
        request.n_tokens = 5;
        request.max_new_tokens = 8;
        request.user = (void *)(i ? "B" : "A");
        if (kvl_sched_submit(sched, &request, &handle) != KVL_OK) return 1;
    }

    const kvl_step *step;
    while (kvl_sched_plan(sched, &step) == KVL_OK) { /* which tokens run now */
        int32_t next[MAX_ROWS];
        kvl_tensor tq = {.data = q}, tk = {.data = k}, tv = {.data = v}, to = {.data = out}; /* f32 */
        for (uint32_t r = 0; r < step->n_tokens; r++) x[r] = (float)step->tokens[r] / VOCAB;
        for (uint32_t layer = 0; layer < LAYERS; layer++) {
            project(3 * layer, step, x, Q_HEADS, q);
            project(3 * layer + 1, step, x, KV_HEADS, k);
            project(3 * layer + 2, step, x, KV_HEADS, v);
            if (kvl_attend(cache, step, layer, &tq, &tk, &tv, &to) != KVL_OK)
                return 1; /* append k, v; attend */
            for (uint32_t r = 0; r < step->n_tokens; r++) x[r] += out[r * Q_HEADS * DIM + layer];
        }
        for (uint32_t i = 0; i < step->n_logits; i++) { /* "sample": one token for each row that wants one */
            next[i] = (int32_t)((uint32_t)(x[step->logit_rows[i]] * 1e4f) % VOCAB);
            printf("%s: %d\n", (const char *)step->logit_users[i], next[i]);
        }
        kvl_sched_commit(sched, step, next); /* tokens out, pages kept or freed */
    }
    kvl_sched_destroy(sched);
    kvl_cache_destroy(cache);
    return 0;
}
