/* error.h - one way for the modules of examples/llm to report a failure: a line of text in the caller's buffer. */
#ifndef LLM_ERROR_H
#define LLM_ERROR_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

#define LLM_ERR_LEN 256 /* the size that every `err` buffer in examples/llm should have */

/* Formats the reason into err (which may be NULL) and returns false, so that a check is one line. */
__attribute__((format(printf, 3, 4))) static inline bool llm_fail(char *err, size_t err_len, const char *fmt,
                                                                  ...) {
    if (err && err_len) {
        va_list ap;
        va_start(ap, fmt);
        vsnprintf(err, err_len, fmt, ap);
        va_end(ap);
    }
    return false;
}

#endif /* LLM_ERROR_H */
