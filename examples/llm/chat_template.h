/* chat_template.h - conversations to token ids, in the ChatML form:
 *
 *     <|im_start|>role\ncontent<|im_end|>\n ... <|im_start|>assistant\n
 *
 * The form is recognised from the file's tokenizer.chat_template, which is a Jinja program: one that renders exactly
 * this, with or without a default system message, is accepted; any other is refused. The markers are put in as
 * tokens and what people wrote is encoded as plain text, so no message can forge a marker.
 *
 * Threads: a loaded template is immutable; any number of threads may use it.
 */
#ifndef LLM_CHAT_TEMPLATE_H
#define LLM_CHAT_TEMPLATE_H

#include "tokenizer.h"

typedef struct chat_message {
    const char *role; /* "system", "user", "assistant"; one line */
    const char *content;
    size_t content_len;
} chat_message;

typedef struct chat_template {
    const tokenizer *tok;
    int32_t im_start, im_end;
    char *default_system; /* added before a first message of another role; NULL: none */
    size_t default_system_len;
} chat_template;

/* The tokenizer must live as long as the template. On failure err says why and *out is {0}. */
bool chat_template_load(const gguf_file *f, const tokenizer *tok, chat_template *out, char *err,
                        size_t err_len);
void chat_template_free(chat_template *c); /* leaves {0} */

/* Appends a whole conversation, and the opening of an answer where `answer` is set. All of these return false where
 * memory is short or a role is not one line; `out` then ends as it was. */
bool chat_render(const chat_template *c, const chat_message *messages, size_t n, bool answer, token_list *out,
                 char *err, size_t err_len);

/* The parts of it, for a conversation that grows and keeps the tokens that it has. */
bool chat_append_message(const chat_template *c, const chat_message *m, token_list *out, char *err,
                         size_t err_len);
bool chat_append_default_system(const chat_template *c, token_list *out, char *err, size_t err_len);
bool chat_open_answer(const chat_template *c, token_list *out, char *err, size_t err_len);
/* After a generated answer: <|im_end|> unless the model has ended with it, and the line break. */
bool chat_close_answer(const chat_template *c, token_list *out, char *err, size_t err_len);

#endif /* LLM_CHAT_TEMPLATE_H */
