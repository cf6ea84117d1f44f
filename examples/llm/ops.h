/* ops.h - the element-wise steps of a transformer layer, each on one row of floats.
 *
 * Every function is a pure function of its row: nothing depends on a batch or on threads.
 */
#ifndef LLM_OPS_H
#define LLM_OPS_H

#include "weights.h"

#include <stdint.h>

/* out = x / sqrt(mean(x^2) + eps) * w. n is a multiple of 16; out may be x. */
void ops_rmsnorm(const float *x, const float *w, uint32_t n, float eps, float *out);

/* The rotations of one position: angles[2i] = cos, angles[2i + 1] = sin of position * base^(-2i / n_dims),
 * for i < n_dims / 2, computed in double precision. */
void ops_rope_angles(uint32_t position, double base, uint32_t n_dims, float *angles);

/* Rotates pairs (2i, 2i + 1) of each head, the order in which GGUF stores llama models. Dimensions of a
 * head from n_dims on stay as they are. */
void ops_rope(float *x, uint32_t n_heads, uint32_t head_dim, uint32_t n_dims, const float *angles);

/* gate = gate / (1 + exp(-gate)) * up, with a relative error below 1e-6. n is a multiple of 16. */
void ops_silu_mul(weights_path path, float *gate, const float *up, uint32_t n);

#endif /* LLM_OPS_H */
