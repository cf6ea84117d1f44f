/* gguf_builder.h - writes GGUF files into memory, byte by byte, so that a test can write wrong ones. */
#ifndef GGUF_BUILDER_H
#define GGUF_BUILDER_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GB_UNUSED __attribute__((unused))

typedef struct gb {
    uint8_t *data;
    size_t n, cap;
} gb;

static GB_UNUSED void gb_bytes(gb *b, const void *p, size_t n) {
    if (b->n + n > b->cap) {
        b->cap = 2 * (b->n + n) + 256;
        b->data = realloc(b->data, b->cap);
        if (!b->data) abort();
    }
    if (n) memcpy(b->data + b->n, p, n);
    b->n += n;
}

static GB_UNUSED void gb_u8(gb *b, uint8_t v) { gb_bytes(b, &v, 1); }
static GB_UNUSED void gb_u32(gb *b, uint32_t v) { gb_bytes(b, &v, 4); }
static GB_UNUSED void gb_u64(gb *b, uint64_t v) { gb_bytes(b, &v, 8); }

static GB_UNUSED void gb_strn(gb *b, const char *s, size_t n) {
    gb_u64(b, n);
    gb_bytes(b, s, n);
}
static GB_UNUSED void gb_str(gb *b, const char *s) { gb_strn(b, s, strlen(s)); }

static GB_UNUSED void gb_header(gb *b, uint32_t version, uint64_t n_tensors, uint64_t n_kv) {
    gb_bytes(b, "GGUF", 4);
    gb_u32(b, version);
    gb_u64(b, n_tensors);
    gb_u64(b, n_kv);
}

/* The key and the type number of a value; the value follows. */
static GB_UNUSED void gb_key(gb *b, const char *key, uint32_t type) {
    gb_str(b, key);
    gb_u32(b, type);
}

static GB_UNUSED void gb_kv_u32(gb *b, const char *key, uint32_t v) {
    gb_key(b, key, 4);
    gb_u32(b, v);
}

static GB_UNUSED void gb_kv_bool(gb *b, const char *key, uint8_t v) {
    gb_key(b, key, 7);
    gb_u8(b, v);
}

static GB_UNUSED void gb_kv_str(gb *b, const char *key, const char *v) {
    gb_key(b, key, 8);
    gb_str(b, v);
}

static GB_UNUSED void gb_kv_array(gb *b, const char *key, uint32_t type, uint64_t n) {
    gb_key(b, key, 9);
    gb_u32(b, type);
    gb_u64(b, n);
}

/* An entry of the tensor table. */
static GB_UNUSED void gb_tensor(gb *b, const char *name, uint32_t type, uint32_t n_dims, const uint64_t *ne,
                                uint64_t offset) {
    gb_str(b, name);
    gb_u32(b, n_dims);
    for (uint32_t i = 0; i < n_dims; i++) gb_u64(b, ne[i]);
    gb_u32(b, type);
    gb_u64(b, offset);
}

static GB_UNUSED void gb_align(gb *b, size_t to) {
    while (b->n % to) gb_u8(b, 0);
}

static GB_UNUSED void gb_fill(gb *b, size_t n) {
    for (size_t i = 0; i < n; i++) gb_u8(b, (uint8_t)(i * 7 + 1));
}

static GB_UNUSED void gb_free(gb *b) {
    free(b->data);
    *b = (gb){0};
}

/* ---- a small vocabulary: the 256 bytes, some merges, five special tokens ---------------------------------- */

#define GB_CHATML                                                                                        \
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"               \
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"                                        \
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}" \
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

/* How byte-level vocabularies spell a byte, in UTF-8. */
static GB_UNUSED void gb_spell(uint8_t byte, char out[4]) {
    static const unsigned unprintable[][2] = {{0, 32}, {127, 160}, {173, 173}};
    unsigned c = byte, next = 256;
    for (int r = 0; r < 3; r++) {
        if (byte >= unprintable[r][0] && byte <= unprintable[r][1]) c = next + byte - unprintable[r][0];
        next += unprintable[r][1] - unprintable[r][0] + 1;
    }
    if (c < 128)
        snprintf(out, 4, "%c", (char)c);
    else
        snprintf(out, 4, "%c%c", (char)(0xC0 | c >> 6), (char)(0x80 | (c & 63)));
}

/* What is wrong with the vocabulary, if anything. All zero is a good one. */
typedef struct gb_vocab {
    const char *model, *pre, *chat; /* NULL: "gpt2", "smollm", GB_CHATML */
    const char (*merges)[2][16];    /* NULL: none; a merge adds its token */
    uint32_t n_merges;
    const char *extra_merge; /* a merge whose token is not added */
    const char *extra_token;
    int32_t type_of_im_start; /* 0: control */
    int32_t missing_types;    /* the list of types is this much too short */
    uint32_t bos;
    uint8_t add_bos, no_bos;
} gb_vocab;

enum { GB_END = 256, GB_IM_START, GB_IM_END, GB_USER_DEFINED, GB_LONGER, GB_FIRST_MERGE };

static GB_UNUSED void gb_vocab_file(gb *b, const gb_vocab *v) {
    static const char *const special[] = {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "[[pad]]",
                                          "[[pad]]+"};
    uint32_t n = GB_FIRST_MERGE + v->n_merges + (v->extra_token ? 1 : 0);
    char s[4];
    gb_header(b, 3, 1, 8u - v->no_bos);
    gb_kv_str(b, "tokenizer.ggml.model", v->model ? v->model : "gpt2");
    gb_kv_str(b, "tokenizer.ggml.pre", v->pre ? v->pre : "smollm");
    gb_kv_array(b, "tokenizer.ggml.tokens", 8, n);
    for (unsigned i = 0; i < 256; i++) {
        gb_spell((uint8_t)i, s);
        gb_str(b, s);
    }
    for (int i = 0; i < 5; i++) gb_str(b, special[i]);
    for (uint32_t i = 0; i < v->n_merges; i++) {
        gb_u64(b, strlen(v->merges[i][0]) + strlen(v->merges[i][1]));
        gb_bytes(b, v->merges[i][0], strlen(v->merges[i][0]));
        gb_bytes(b, v->merges[i][1], strlen(v->merges[i][1]));
    }
    if (v->extra_token) gb_str(b, v->extra_token);
    gb_kv_array(b, "tokenizer.ggml.token_type", 5, n - (uint32_t)v->missing_types);
    for (uint32_t i = 0; i < n - (uint32_t)v->missing_types; i++) {
        uint32_t type = i < GB_END || i >= GB_FIRST_MERGE ? 1 : i >= GB_USER_DEFINED ? 4 : 3;
        if (i == GB_IM_START && v->type_of_im_start) type = (uint32_t)v->type_of_im_start;
        gb_u32(b, type);
    }
    gb_kv_array(b, "tokenizer.ggml.merges", 8, v->n_merges + (v->extra_merge ? 1 : 0));
    for (uint32_t i = 0; i < v->n_merges; i++) {
        gb_u64(b, strlen(v->merges[i][0]) + 1 + strlen(v->merges[i][1]));
        gb_bytes(b, v->merges[i][0], strlen(v->merges[i][0]));
        gb_bytes(b, " ", 1);
        gb_bytes(b, v->merges[i][1], strlen(v->merges[i][1]));
    }
    if (v->extra_merge) gb_str(b, v->extra_merge);
    gb_kv_str(b, "tokenizer.chat_template", v->chat ? v->chat : GB_CHATML);
    gb_kv_bool(b, "tokenizer.ggml.add_bos_token", v->add_bos);
    if (!v->no_bos) gb_kv_u32(b, "tokenizer.ggml.bos_token_id", v->bos ? v->bos : GB_IM_START);
    gb_tensor(b, "output_norm.weight", 0, 1, (uint64_t[]){8}, 0);
    gb_align(b, 32);
    gb_fill(b, 32);
}

#endif /* GGUF_BUILDER_H */
