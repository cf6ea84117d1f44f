#include "pretokenize.h"
#include "unicode_tables.h"

size_t utf8_decode(const char *s, size_t n, uint32_t *cp) {
    const unsigned char *p = (const unsigned char *)s;
    unsigned b = p[0], low = 0x80, high = 0xBF;
    size_t need;
    *cp = b;
    if (b < 0x80) return 1;
    /* `low` and `high` bound the second byte: no overlong forms, no surrogates, nothing above U+10FFFF */
    if (b >= 0xC2 && b <= 0xDF) {
        need = 2, *cp = b & 0x1F;
    } else if (b >= 0xE0 && b <= 0xEF) {
        need = 3, *cp = b & 0x0F;
        if (b == 0xE0) low = 0xA0;
        if (b == 0xED) high = 0x9F;
    } else if (b >= 0xF0 && b <= 0xF4) {
        need = 4, *cp = b & 0x07;
        if (b == 0xF0) low = 0x90;
        if (b == 0xF4) high = 0x8F;
    } else {
        *cp = UTF8_INVALID;
        return 1;
    }
    for (size_t i = 1; i < need; i++) {
        if (i == n || p[i] < low || p[i] > high) {
            *cp = i == n ? UTF8_TRUNCATED : UTF8_INVALID;
            return i;
        }
        *cp = *cp << 6 | (p[i] & 0x3F);
        low = 0x80, high = 0xBF;
    }
    return need;
}

static int class_of(uint32_t cp) {
    if ((cp | 0x20) - 'a' < 26u) return UNICODE_LETTER;
    if (cp == ' ') return UNICODE_SPACE;
    size_t a = 0, b = UNICODE_RANGES; /* the last range that begins at or before cp is in [a, b) */
    while (b - a > 1) {
        size_t mid = (a + b) / 2;
        if (unicode_ranges[mid][0] <= cp)
            a = mid;
        else
            b = mid;
    }
    const uint32_t *r = unicode_ranges[a];
    return cp >= r[0] && cp <= r[1] >> 2 ? (int)(r[1] & 3) : UNICODE_OTHER;
}

/* The text as one pretokenizer sees it. For SMOLLM a number ends the text that the GPT-2 expression is applied to. */
typedef struct view {
    const char *text;
    size_t len;
    bool number_ends;
} view;

#define AT_END (-1)

/* Class of the character at pos and its length, or AT_END. */
static int peek(const view *v, size_t pos, size_t *n) {
    uint32_t cp;
    *n = 0;
    if (pos >= v->len) return AT_END;
    *n = utf8_decode(v->text + pos, v->len - pos, &cp);
    int c = class_of(cp);
    return c == UNICODE_NUMBER && v->number_ends ? AT_END : c;
}

/* The end of the run of characters of class c from pos on; *last is where the last of them begins. */
static size_t run(const view *v, size_t pos, int c, size_t *last) {
    size_t n;
    *last = pos;
    while (peek(v, pos, &n) == c) {
        *last = pos;
        pos += n;
    }
    return pos;
}

/* 's 't 'm 'd 're 've 'll: bytes of the contraction at pos, or 0. */
static size_t contraction(const view *v, size_t pos) {
    const char *p = v->text + pos;
    size_t n = v->len - pos;
    if (n < 2 || p[0] != '\'') return 0;
    if (p[1] == 's' || p[1] == 't' || p[1] == 'm' || p[1] == 'd') return 2;
    if (n < 3) return 0;
    bool re_ve = (p[1] == 'r' || p[1] == 'v') && p[2] == 'e';
    return re_ve || (p[1] == 'l' && p[2] == 'l') ? 3 : 0;
}

/* 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+   (pos is not AT_END) */
static size_t gpt2_word(const view *v, size_t pos) {
    size_t n, last, skip = contraction(v, pos);
    if (skip) return pos + skip;
    size_t start = v->text[pos] == ' ' ? pos + 1 : pos;
    int c = peek(v, start, &n);
    if (c != UNICODE_SPACE && c != AT_END) return run(v, start, c, &last);
    size_t end = run(v, pos, UNICODE_SPACE, &last);
    /* spaces before a word leave their last one to it, unless it is the only one */
    return peek(v, end, &n) == AT_END || last == pos ? end : last;
}

bool pretokenizer_by_name(gguf_str name, pretokenizer *out) {
    if (gguf_str_eq(name, "gpt-2"))
        *out = PRETOKENIZER_GPT2;
    else if (gguf_str_eq(name, "smollm"))
        *out = PRETOKENIZER_SMOLLM;
    else
        return false;
    return true;
}

size_t pretokenize_word(pretokenizer kind, const char *text, size_t len, size_t pos) {
    view v = {text, len, kind == PRETOKENIZER_SMOLLM};
    size_t n;
    if (peek(&v, pos, &n) == AT_END) return pos + n; /* a number, alone */
    return gpt2_word(&v, pos);
}
