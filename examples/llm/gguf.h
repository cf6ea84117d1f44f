/* gguf.h - read-only view of a GGUF v2/v3 model file (little endian).
 *
 * The file is mapped, not copied: strings, arrays and tensor data point into the mapping and stay valid until
 * gguf_close(). Files are treated as hostile. Every count, offset and length is checked against the bytes that are
 * there before it is used, so an open file needs no further bounds checks. A failure returns false and writes one
 * line to `err` (LLM_ERR_LEN bytes, see error.h) that names the key or tensor at fault.
 *
 * Threads: an open file is immutable; any number of threads may read it.
 * Source of the format: ggml/docs/gguf.md in the ggml project.
 */
#ifndef LLM_GGUF_H
#define LLM_GGUF_H

#include "error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define GGUF_MAX_DIMS 4

/* Types of metadata values; the numbers are those in the file. */
typedef enum gguf_kv_type {
    GGUF_KV_U8 = 0,
    GGUF_KV_I8 = 1,
    GGUF_KV_U16 = 2,
    GGUF_KV_I16 = 3,
    GGUF_KV_U32 = 4,
    GGUF_KV_I32 = 5,
    GGUF_KV_F32 = 6,
    GGUF_KV_BOOL = 7,
    GGUF_KV_STR = 8,
    GGUF_KV_ARRAY = 9,
    GGUF_KV_U64 = 10,
    GGUF_KV_I64 = 11,
    GGUF_KV_F64 = 12
} gguf_kv_type;

/* Tensor types; the numbers are those in the file. Only the types this runner computes with have a name here.
 * gguf_type_name() and gguf_type_block() know every ggml type, so that a refusal can say what was found. */
typedef enum gguf_type { GGUF_F32 = 0, GGUF_F16 = 1, GGUF_Q4_0 = 2, GGUF_Q4_1 = 3, GGUF_Q8_0 = 8 } gguf_type;

/* A string in the file: not terminated, may hold any byte. */
typedef struct gguf_str {
    const char *data;
    size_t len;
} gguf_str;

/* One tensor. ne[0] is the fastest-varying dimension (the row length, what a matmul reduces over); dimensions at
 * n_dims and above are 1. Rows are contiguous, each `ne[0] / block elements * block bytes` long. */
typedef struct gguf_tensor_info {
    gguf_str name;
    uint32_t type; /* a gguf_type, or another ggml type that this runner cannot compute with */
    uint32_t n_dims;
    uint64_t ne[GGUF_MAX_DIMS];
    const void *data; /* inside the file, aligned to general.alignment (32 where the file sets none) */
    uint64_t bytes;
} gguf_tensor_info;

/* An array in the metadata. Elements have no alignment; read them with the gguf_array_* functions. */
typedef struct gguf_array {
    gguf_kv_type type; /* of the elements */
    uint64_t n;
    const uint8_t *data; /* first element; strings are {u64 length, bytes} one after another */
} gguf_array;

typedef struct gguf_file gguf_file;

/* Opens and checks a file. On success *out is the file; on failure *out is NULL and err says why. */
bool gguf_open(const char *path, gguf_file **out, char *err, size_t err_len);

/* The same for bytes that the caller keeps alive and unchanged until gguf_close(). `data` should be aligned to 8. */
bool gguf_open_memory(const void *data, size_t size, gguf_file **out, char *err, size_t err_len);

void gguf_close(gguf_file *f); /* NULL is fine */

/* Metadata. A getter fails, naming the key, where the key is missing, has another type, or does not fit the
 * result. u32 accepts every integer type whose value fits; f32 accepts f32 and f64. `err` may be NULL. */
bool gguf_has(const gguf_file *f, const char *key);
bool gguf_get_u32(const gguf_file *f, const char *key, uint32_t *v, char *err, size_t err_len);
bool gguf_get_f32(const gguf_file *f, const char *key, float *v, char *err, size_t err_len);
bool gguf_get_bool(const gguf_file *f, const char *key, bool *v, char *err, size_t err_len);
bool gguf_get_str(const gguf_file *f, const char *key, gguf_str *v, char *err, size_t err_len);
/* `type` is the element type the caller expects; another one is an error. */
bool gguf_get_array(const gguf_file *f, const char *key, gguf_kv_type type, gguf_array *v, char *err,
                    size_t err_len);

/* Element i < a->n of an array of F32 / I32 (or U32, as its bits). */
float gguf_array_f32(const gguf_array *a, uint64_t i);
int32_t gguf_array_i32(const gguf_array *a, uint64_t i);
/* Walks an array of strings: start with *pos = 0 and call it a->n times at most. */
gguf_str gguf_array_next_str(const gguf_array *a, size_t *pos);

/* Tensors. gguf_tensor() returns NULL where the file has none of that name. */
const gguf_tensor_info *gguf_tensor(const gguf_file *f, const char *name);
uint64_t gguf_tensor_count(const gguf_file *f);
const gguf_tensor_info *gguf_tensor_at(const gguf_file *f, uint64_t i); /* i < count, file order */

/* A tensor that must exist, with a readable type (see gguf_type_readable) and this shape; ne1 = 0 asks for a
 * one-dimensional tensor. The error names the tensor, its type or both shapes. */
bool gguf_require_tensor(const gguf_file *f, const char *name, uint64_t ne0, uint64_t ne1,
                         const gguf_tensor_info **out, char *err, size_t err_len);

const char *gguf_type_name(uint32_t type);                                /* "Q4_1"; "unknown" */
bool gguf_type_block(uint32_t type, uint32_t *elements, uint32_t *bytes); /* false: unknown type */
bool gguf_type_readable(uint32_t type);                                   /* F32, F16, Q8_0, Q4_0, Q4_1 */
bool gguf_str_eq(gguf_str s, const char *c);
/* A name out of the file for a message: cut to fit, unprintable bytes replaced. Returns buf. */
const char *gguf_printable(gguf_str s, char *buf, size_t buf_len);

#endif /* LLM_GGUF_H */
