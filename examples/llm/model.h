/* model.h - the forward pass of llama models from a GGUF file, without attention.
 *
 * The model does everything between a token and its logits except the one thing that needs memory of the
 * past: for each layer it hands q, k and v to a callback and takes the attention output back. Rows may belong
 * to any mix of sequences; a row's result depends on its token, its position and what attention returns,
 * never on the other rows or on the number of threads, bit for bit.
 *
 * What a file asks for beyond this (another architecture, biases, experts, RoPE scaling, other weight types)
 * is refused, naming the key or the tensor.
 *
 * Threads: one forward at a time per model.
 */
#ifndef LLM_MODEL_H
#define LLM_MODEL_H

#include "gguf.h"
#include "pool.h"
#include "weights.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct model_config {
    uint32_t n_layers;
    uint32_t width; /* of a row between layers */
    uint32_t n_q_heads, n_kv_heads, head_dim;
    uint32_t ffn_width;
    uint32_t n_vocab;
    uint32_t n_ctx;     /* positions the model was trained for */
    uint32_t rope_dims; /* leading dimensions of a head that are rotated */
    float rope_base;
    float rms_eps;
} model_config;

typedef struct model_desc {
    weights_mode mode; /* int8 (default) or f32 activations */
    weights_path path;
    uint32_t max_rows; /* of one forward; 0 = 512 */
    pool *threads;     /* required; used by the model only inside model_forward */
} model_desc;

typedef struct model model;

/* Packs the weights. The file must stay open as long as the model: embedding rows are read from it. */
bool model_load(const gguf_file *f, const model_desc *desc, model **out, char *err, size_t err_len);
void model_free(model *m); /* NULL is fine */

const model_config *model_get_config(const model *m);
uint32_t model_max_rows(const model *m);
size_t model_bytes(const model *m); /* of packed weights */

/* One layer's attention over all rows. q is [rows][n_q_heads][head_dim], k and v
 * [rows][n_kv_heads][head_dim], q and k after RoPE; out is shaped as q. 0 is success; anything else ends
 * the forward and becomes its result. */
typedef int (*model_attend_fn)(void *user, int layer, const float *q, const float *k, const float *v,
                               float *out);

enum {
    MODEL_OK = 0,
    MODEL_BAD_TOKEN = -1001, /* a token outside the vocabulary */
    MODEL_BAD_ROWS = -1002   /* no rows, more than max_rows, or a logit row outside the batch */
};

/* Runs n_rows tokens. logits[i] is the row of n_vocab logits of batch row logit_rows[i]. */
int model_forward(model *m, const int32_t *tokens, const uint32_t *positions, uint32_t n_rows,
                  const uint32_t *logit_rows, uint32_t n_logits, float *logits, model_attend_fn attend,
                  void *user);

#endif /* LLM_MODEL_H */
