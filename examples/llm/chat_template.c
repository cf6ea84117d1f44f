#include "chat_template.h"

#include <stdlib.h>
#include <string.h>

#define KEY "tokenizer.chat_template"

/* ---- recognising the template ----------------------------------------------------------------------------- */

/* The ChatML programs in canonical form (see canonical()); the default system message, where there is one, stands
 * between OPEN_SYSTEM and CLOSE_SYSTEM. */
#define LOOP "{%formessageinmessages%}"
#define OPEN_SYSTEM "{%ifloop.firstandmessages[0]['role']!='system'%}{{'<|im_start|>system\n"
#define CLOSE_SYSTEM "<|im_end|>\n'}}{%endif%}"
#define MESSAGE "{{'<|im_start|>'+message['role']+'\n'+message['content']+'<|im_end|>'+'\n'}}"
#define END "{%endfor%}{%ifadd_generation_prompt%}{{'<|im_start|>assistant\n'}}{%endif%}"

/* Copies a Jinja program into out (s.len bytes are enough) so that spelling does not matter: no white space inside
 * tags, no line break after a statement (the trim_blocks that chat templates are rendered with), '-' trims dropped,
 * string literals in single quotes with \n as a line break. Returns the length. */
static size_t canonical(gguf_str s, char *out) {
    size_t n = 0;
    char quote = 0;
    bool tag = false;
    for (size_t i = 0; i < s.len; i++) {
        char c = s.data[i], next = i + 1 < s.len ? s.data[i + 1] : 0;
        if (quote) {
            if (c == '\\' && next == 'n')
                c = '\n', i++;
            else if (c == quote)
                c = '\'', quote = 0;
        } else if (tag) {
            if (c == ' ' || c == '\n' || c == '\t') continue;
            if (c == '-' && (next == '%' || next == '}')) continue;
            if (c == '\'' || c == '"')
                quote = c, c = '\'';
            else if ((c == '%' || c == '}') && next == '}')
                tag = false;
        } else if (c == '{' && (next == '%' || next == '{')) {
            tag = true;
            out[n++] = c;
            c = next;
            i += i + 2 < s.len && s.data[i + 2] == '-' ? 2 : 1;
        } else if (c == '\n' && n >= 2 && out[n - 1] == '}' && out[n - 2] == '%') {
            continue;
        }
        out[n++] = c;
    }
    return n;
}

static bool skip(const char **p, const char *end, const char *text) {
    size_t n = strlen(text);
    if ((size_t)(end - *p) < n || memcmp(*p, text, n) != 0) return false;
    *p += n;
    return true;
}

/* Matches the canonical program; *system is the default system message inside it, or has len 0 and data NULL. */
static bool is_chatml(const char *p, const char *end, gguf_str *system) {
    *system = (gguf_str){NULL, 0};
    if (!skip(&p, end, LOOP)) return false;
    if (skip(&p, end, OPEN_SYSTEM)) {
        const char *close = p;
        while (close < end && *close != '<' && *close != '\'') close++;
        *system = (gguf_str){p, (size_t)(close - p)};
        p = close;
        if (!skip(&p, end, CLOSE_SYSTEM)) return false;
    }
    return skip(&p, end, MESSAGE END) && p == end;
}

static bool load_program(chat_template *c, gguf_str source, char *err, size_t err_len) {
    char *text = malloc(source.len + 1);
    if (!text) return llm_fail(err, err_len, "out of memory");
    gguf_str system;
    bool ok = is_chatml(text, text + canonical(source, text), &system);
    if (!ok) {
        char shown[100];
        llm_fail(err, err_len, "key '" KEY "': only plain ChatML is supported, and this begins: %s",
                 gguf_printable(source, shown, sizeof shown));
    } else if (system.data) {
        c->default_system = malloc(system.len + 1);
        c->default_system_len = system.len;
        ok = c->default_system != NULL;
        if (ok)
            memcpy(c->default_system, system.data, system.len);
        else
            llm_fail(err, err_len, "out of memory");
    }
    free(text);
    return ok;
}

/* A marker that is not a control token could be typed by a user. */
static bool load_marker(const tokenizer *tok, const char *text, int32_t *id, char *err, size_t err_len) {
    *id = tokenizer_find(tok, text);
    if (*id >= 0 && tokenizer_is_control(tok, *id)) return true;
    return llm_fail(err, err_len, "key '" KEY "' uses '%s', which is not a control token of the vocabulary",
                    text);
}

bool chat_template_load(const gguf_file *f, const tokenizer *tok, chat_template *out, char *err,
                        size_t err_len) {
    gguf_str source;
    *out = (chat_template){.tok = tok};
    if (gguf_get_str(f, KEY, &source, err, err_len) && load_program(out, source, err, err_len) &&
        load_marker(tok, "<|im_start|>", &out->im_start, err, err_len) &&
        load_marker(tok, "<|im_end|>", &out->im_end, err, err_len))
        return true;
    chat_template_free(out);
    return false;
}

void chat_template_free(chat_template *c) {
    free(c->default_system);
    *c = (chat_template){0};
}

/* ---- rendering -------------------------------------------------------------------------------------------- */

static bool push(token_list *out, int32_t id, char *err, size_t err_len) {
    return token_list_push(out, id) || llm_fail(err, err_len, "out of memory");
}

/* <|im_start|>, then role and content in one piece of text, as words may join across the line break. */
static bool open_message(const chat_template *c, const char *role, const char *content, size_t len,
                         token_list *out, char *err, size_t err_len) {
    size_t n_role = strlen(role);
    if (strchr(role, '\n')) return llm_fail(err, err_len, "a role must be one line");
    if (len > SIZE_MAX - n_role - 1) return llm_fail(err, err_len, "a message of %zu bytes is too long", len);
    char *text = malloc(n_role + 1 + len);
    if (!text) return llm_fail(err, err_len, "out of memory");
    memcpy(text, role, n_role);
    text[n_role] = '\n';
    if (len) memcpy(text + n_role + 1, content, len);
    bool ok = push(out, c->im_start, err, err_len) &&
              tokenizer_encode(c->tok, text, n_role + 1 + len, TOKENIZE_PLAIN, out, err, err_len);
    free(text);
    return ok;
}

static bool close_message(const chat_template *c, bool ended, token_list *out, char *err, size_t err_len) {
    return (ended || push(out, c->im_end, err, err_len)) &&
           tokenizer_encode(c->tok, "\n", 1, TOKENIZE_PLAIN, out, err, err_len);
}

/* Takes back what a failed call appended. */
static bool settle(bool ok, const token_list *before, token_list *out) {
    if (ok) return true;
    out->n = before->n;
    out->dropped_bytes = before->dropped_bytes;
    return false;
}

bool chat_append_message(const chat_template *c, const chat_message *m, token_list *out, char *err,
                         size_t err_len) {
    token_list before = *out;
    return settle(open_message(c, m->role, m->content, m->content_len, out, err, err_len) &&
                      close_message(c, false, out, err, err_len),
                  &before, out);
}

bool chat_append_default_system(const chat_template *c, token_list *out, char *err, size_t err_len) {
    if (!c->default_system) return true;
    chat_message m = {"system", c->default_system, c->default_system_len};
    return chat_append_message(c, &m, out, err, err_len);
}

bool chat_open_answer(const chat_template *c, token_list *out, char *err, size_t err_len) {
    token_list before = *out;
    return settle(open_message(c, "assistant", "", 0, out, err, err_len), &before, out);
}

bool chat_close_answer(const chat_template *c, token_list *out, char *err, size_t err_len) {
    token_list before = *out;
    bool ended = out->n && out->ids[out->n - 1] == c->im_end;
    return settle(close_message(c, ended, out, err, err_len), &before, out);
}

bool chat_render(const chat_template *c, const chat_message *messages, size_t n, bool answer, token_list *out,
                 char *err, size_t err_len) {
    token_list before = *out;
    bool ok =
        n == 0 || strcmp(messages[0].role, "system") == 0 || chat_append_default_system(c, out, err, err_len);
    for (size_t i = 0; ok && i < n; i++) ok = chat_append_message(c, &messages[i], out, err, err_len);
    if (ok && answer) ok = chat_open_answer(c, out, err, err_len);
    return settle(ok, &before, out);
}
