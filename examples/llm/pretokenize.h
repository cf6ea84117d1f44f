/* pretokenize.h - UTF-8, and splitting text into the words that byte-pair merges stay inside.
 *
 * Threads: no state, any thread.
 */
#ifndef LLM_PRETOKENIZE_H
#define LLM_PRETOKENIZE_H

#include "gguf.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define UTF8_INVALID 0xFFFFFFFFu   /* these bytes begin no character */
#define UTF8_TRUNCATED 0xFFFFFFFEu /* the text ends inside a character */

/* Decodes the character at p (n >= 1 bytes are there) into *cp and returns its length. For ill-formed bytes *cp is
 * one of the above and the length is that of the maximal subpart: what a decoder replaces by one U+FFFD
 * (Unicode 14, section 3.9). */
size_t utf8_decode(const char *p, size_t n, uint32_t *cp);

typedef enum pretokenizer {
    PRETOKENIZER_GPT2,  /* the regular expression of GPT-2 */
    PRETOKENIZER_SMOLLM /* every \p{N} is a word of its own; the rest as GPT-2 between them */
} pretokenizer;

/* By the value of tokenizer.ggml.pre. False: not one of ours. */
bool pretokenizer_by_name(gguf_str name, pretokenizer *out);

/* The end of the word that begins at pos < len. The words cover the text without gaps. */
size_t pretokenize_word(pretokenizer kind, const char *text, size_t len, size_t pos);

#endif /* LLM_PRETOKENIZE_H */
