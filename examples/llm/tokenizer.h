/* tokenizer.h - byte-level BPE from the vocabulary and merges in a GGUF file.
 *
 * Understood: tokenizer.ggml.model "gpt2" with tokenizer.ggml.pre "smollm" or "gpt-2"; anything else is refused by
 * name. Text is bytes: it should be UTF-8, but any bytes are safe, and a byte that is not part of valid UTF-8 is
 * encoded on its own.
 *
 * Threads: a loaded tokenizer is immutable; any number of threads may use it. A token_list or utf8_stream belongs to
 * one thread.
 */
#ifndef LLM_TOKENIZER_H
#define LLM_TOKENIZER_H

#include "gguf.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A growing list of token ids. Start from {0}; free with token_list_free(). */
typedef struct token_list {
    int32_t *ids;
    size_t n, cap;
    size_t dropped_bytes; /* bytes of text so far that the vocabulary has no token for: they are left out */
} token_list;

bool token_list_push(token_list *l, int32_t id); /* false: out of memory, list unchanged */
void token_list_free(token_list *l);             /* leaves {0} */

typedef struct tokenizer tokenizer;

/* The file must stay open for as long as the tokenizer is used. On failure *out is NULL and err says why. */
bool tokenizer_load(const gguf_file *f, tokenizer **out, char *err, size_t err_len);
void tokenizer_free(tokenizer *t); /* NULL is fine */

enum {
    TOKENIZE_PLAIN = 0,        /* the text of control tokens is only text: for anything a user wrote */
    TOKENIZE_SPECIAL = 1 << 0, /* the text of a control token becomes that token */
    TOKENIZE_BOS = 1 << 1      /* begin with BOS where the file asks for it */
};

/* Appends the ids of text[0..len) to out. Tokens that the file calls user-defined are matched with any flags.
 * O(len log len). False: out of memory or len above 1 GiB; out is then as it was. */
bool tokenizer_encode(const tokenizer *t, const char *text, size_t len, unsigned flags, token_list *out,
                      char *err, size_t err_len);

/* The bytes that token `id` stands for: perhaps a part of a character, perhaps none. A control token gives its name.
 * An id outside the vocabulary gives an empty piece. Not terminated; valid while the tokenizer is. */
const char *tokenizer_piece(const tokenizer *t, int32_t id, size_t *len);

int32_t tokenizer_find(const tokenizer *t,
                       const char *text); /* by the text in the file, "<|im_end|>"; -1: none */
bool tokenizer_is_control(const tokenizer *t, int32_t id);
bool tokenizer_is_end(const tokenizer *t,
                      int32_t id);         /* EOS, EOT, <|im_end|> or <|endoftext|>: stop generating */
int32_t tokenizer_bos(const tokenizer *t); /* -1: none; also for the next two */
int32_t tokenizer_eos(const tokenizer *t);
int32_t tokenizer_eot(const tokenizer *t);
uint32_t tokenizer_vocab_size(const tokenizer *t);

/* Pieces to printable text while tokens still arrive: holds back the bytes of a character that is not complete yet
 * and writes U+FFFD for bytes that can be part of none. Start from {0}. */
typedef struct utf8_stream {
    unsigned char held[4];
    unsigned n_held;
} utf8_stream;

#define UTF8_STREAM_ROOM(n) (3 * ((n) + 3)) /* bytes that `out` needs for a push of n; for a flush n is 0 */

/* Both return the bytes written to out, which are whole characters. */
size_t utf8_stream_push(utf8_stream *s, const char *bytes, size_t n, char *out);
size_t utf8_stream_flush(utf8_stream *s, char *out); /* at the end: what is still held back becomes U+FFFD */

#endif /* LLM_TOKENIZER_H */
