/* runtime.h - a model file and kvlite put together: what a program needs around plan / attend / commit.
 *
 *     runtime_load(path) ---- one thread pool ----> model (weights), tokenizer, kvl_context
 *     runtime_cache(rt)  -> kvl_cache for this model's geometry; a program may have several
 *     runtime_step(...)  -> plan, forward with kvl_attend as the attention, sample, commit
 *
 * Programs link the implementation of kvlite.h from its archive and include the header without
 * KVL_IMPLEMENTATION.
 *
 * Errors: functions return false (or a negative kvl_result) and write one line to err (LLM_ERR_LEN bytes).
 * Threads: everything here belongs to one thread, the owner thread of the caches.
 */
#ifndef LLM_RUNTIME_H
#define LLM_RUNTIME_H

#include "chat_template.h"
#include "error.h"
#include "gguf.h"
#include "model.h"
#include "pool.h"
#include "tokenizer.h"
#include "weights.h"

#include "kvlite.h"

typedef struct runtime_desc {
    const char *path;         /* of the GGUF file */
    weights_mode act;         /* activations: int8 (default) or f32 */
    uint32_t n_threads;       /* 0: one for each online processor */
    uint32_t step_tokens;     /* most rows of one step; 0 = 512 */
    kvl_backend_kind backend; /* of the caches; AUTO: the first that works and has a cache's formats */
    uint32_t device;          /* of the backend: 1 + its number; 0: the one that the backend takes */
} runtime_desc;

/* Fields are for reading. Start from {0}. */
typedef struct runtime {
    gguf_file *file;
    pool *threads; /* shared by the model and every cache */
    model *model;
    const model_config *config;
    tokenizer *tok;
    kvl_context *context;     /* of the caches to come */
    kvl_context *passed_over; /* the one before, which had not the formats of a cache, or NULL */
    char why_passed_over[LLM_ERR_LEN];
    kvl_backend_kind backend; /* as asked */
    uint32_t device;
    uint64_t fingerprint; /* of tensors, vocabulary, RoPE and activation mode */
    uint32_t step_tokens;
    double load_s;
    float *logits; /* [logits_cap][n_vocab] of the last forward */
    uint32_t *logit_rows, *logit_slot;
    kvl_output *outputs;
    uint32_t logits_cap;
} runtime;

bool runtime_load(runtime *rt, const runtime_desc *desc, char *err,
                  size_t err_len); /* on failure *rt is {0} */
void runtime_free(runtime *rt);    /* after its caches; leaves {0} */

typedef struct runtime_cache_desc {
    const char *preset;  /* NULL: "int8" */
    const char *kv_file; /* geometry override (kv_file.h) in place of preset, sink_blocks and layers */
    kvl_format k_format, v_format;      /* 0: the preset's */
    uint32_t sink_blocks, block_tokens; /* as in kvl_geometry */
    const kvl_layer *layers;            /* as in kvl_geometry: [n_layers] or NULL */
    uint64_t device_bytes; /* budget; 0: what n_sequences of seq_tokens take, and no prefix left to evict */
    uint32_t n_sequences;  /* 0 = 1 */
    uint32_t seq_tokens;   /* longest sequence; 0 or too many: the model's context length */
    uint32_t least_tokens; /* a given budget must hold one sequence of so many; 0: seq_tokens */
    uint32_t step_tokens;  /* most rows of its steps, not more than the model takes; 0: as many */
} runtime_cache_desc;

/* A cache for this model; a wrong kv_file is named with its line. Where a given budget does not hold a
 * sequence of least_tokens, the error says how much it takes; what it holds beyond that is kvl_can_fit's
 * fit.max_tokens. Where the backend was not asked for by name and has not these formats, the CPU takes this
 * cache and later ones. */
bool runtime_cache(runtime *rt, const runtime_cache_desc *desc, kvl_cache **out, char *err, size_t err_len);

/* One line: the backend that runs, and of each that was tried before it why it does not. */
void runtime_backend_line(const runtime *rt, char *line, size_t n);

/* Bytes that n_tokens tokens of one sequence take where every sequence has a contiguous buffer in f16: what a
 * cache without pages, sharing and formats reserves. */
uint64_t runtime_contiguous_bytes(const runtime *rt, uint64_t n_tokens);

/* Runs the model over a planned step with kvl_attend on `cache`; does not commit. False: the step is still
 * open and must be aborted. */
bool runtime_forward(runtime *rt, kvl_cache *cache, const kvl_step *step, char *err, size_t err_len);

/* n_vocab logits of step->logit_rows[i] of the last runtime_forward. */
const float *runtime_logits(const runtime *rt, uint32_t i);

/* Chooses the token of logits row i of a step; step->logit_users[i] is whose it is. */
typedef kvl_output (*runtime_sample_fn)(void *user, const kvl_step *step, uint32_t i, const float *logits);

/* Plan, forward, sample, commit. KVL_OK: a step ran, or a device that was lost is there again and the requests
 * are computed anew. KVL_IDLE, KVL_DRAINED: as kvl_sched_plan. Negative: err says why; the step was aborted. (Also a
 * device lost at commit: what was sampled may have been shown already.) */
kvl_result runtime_step(runtime *rt, kvl_cache *cache, kvl_sched *sched, runtime_sample_fn sample, void *user,
                        char *err, size_t err_len);

/* The ids that end an answer (tokenizer_is_end), for kvl_request.stop_tokens: at most 8. Returns how many. */
uint32_t runtime_stop_tokens(const runtime *rt, int32_t out[8]);

double runtime_now(void); /* monotonic seconds */

#endif /* LLM_RUNTIME_H */
