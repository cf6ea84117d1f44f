#include "tokenizer.h"
#include "pretokenize.h"

#include <stdlib.h>
#include <string.h>

/* Values of tokenizer.ggml.token_type. */
enum { TYPE_NORMAL = 1, TYPE_UNKNOWN = 2, TYPE_CONTROL = 3, TYPE_USER_DEFINED = 4, TYPE_LAST = 6 };

#define NO_TOKEN (-1)
#define MAX_TEXT ((size_t)1 << 30)
/* Ids, ranks and positions in a word are kept in 32 bits. */
#define MAX_ENTRIES ((uint64_t)1 << 28)

/* Merge number r replaces the neighbours left, right by merged; the lowest r goes first. */
typedef struct merge {
    int32_t left, right, merged;
} merge;

struct tokenizer {
    pretokenizer pre;
    uint32_t n_vocab, n_merges, n_special;
    gguf_str *text;   /* [n_vocab] as in the file */
    uint8_t *type;    /* [n_vocab] */
    char *pieces;     /* the bytes that each token stands for, one after another */
    size_t *piece_at; /* [n_vocab + 1] */
    int32_t byte_id[256];
    merge *merges;
    uint32_t *text_slots, text_mask;   /* hash of text -> id + 1 */
    uint32_t *merge_slots, merge_mask; /* hash of (left, right) -> rank + 1 */
    int32_t *special;                  /* ids of tokens matched by their text: by first byte, longest first */
    uint32_t special_at[257];          /* the range of `special` for a first byte */
    int32_t bos, eos, eot;
    bool add_bos;
};

#define SHOW(s) gguf_printable((s), (char[64]){0}, 64)

/* ---- the list --------------------------------------------------------------------------------------------- */

bool token_list_push(token_list *l, int32_t id) {
    if (l->n == l->cap) {
        size_t cap = l->cap ? l->cap * 2 : 64;
        int32_t *ids = realloc(l->ids, cap * sizeof *ids);
        if (!ids) return false;
        l->ids = ids;
        l->cap = cap;
    }
    l->ids[l->n++] = id;
    return true;
}

void token_list_free(token_list *l) {
    free(l->ids);
    *l = (token_list){0};
}

/* ---- bytes as characters ---------------------------------------------------------------------------------- */

/* Byte-level vocabularies spell each byte as one printable character: itself where it is one (in Latin-1), else
 * U+0100 and up in order. Source: bytes_to_unicode() in the encoder of GPT-2. */
static void byte_alphabet(uint16_t byte_to_char[256], int16_t char_to_byte[324]) {
    unsigned next = 256;
    for (unsigned c = 0; c < 324; c++) char_to_byte[c] = -1;
    for (unsigned b = 0; b < 256; b++) {
        bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        byte_to_char[b] = (uint16_t)(printable ? b : next++);
        char_to_byte[byte_to_char[b]] = (int16_t)b;
    }
}

/* Writes the bytes that a token's text spells, at most s.len of them; characters of no byte stay as they are. */
static size_t spell_bytes(gguf_str s, const int16_t char_to_byte[324], char *out) {
    size_t n_out = 0;
    for (size_t i = 0; i < s.len;) {
        uint32_t cp;
        size_t n = utf8_decode(s.data + i, s.len - i, &cp);
        if (cp < 324 && char_to_byte[cp] >= 0) {
            out[n_out++] = (char)char_to_byte[cp];
        } else {
            memcpy(out + n_out, s.data + i, n);
            n_out += n;
        }
        i += n;
    }
    return n_out;
}

/* ---- hash tables ------------------------------------------------------------------------------------------ */

/* FNV-1a over a then b. */
static uint64_t hash_text(gguf_str a, gguf_str b) {
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < a.len; i++) h = (h ^ (unsigned char)a.data[i]) * 0x100000001b3u;
    for (size_t i = 0; i < b.len; i++) h = (h ^ (unsigned char)b.data[i]) * 0x100000001b3u;
    return h ^ h >> 32;
}

/* The slot of the token whose text is a followed by b, or the empty slot where it would go. */
static uint32_t text_slot(const tokenizer *t, gguf_str a, gguf_str b) {
    uint32_t i = (uint32_t)hash_text(a, b) & t->text_mask;
    for (; t->text_slots[i]; i = (i + 1) & t->text_mask) {
        gguf_str s = t->text[t->text_slots[i] - 1];
        if (s.len == a.len + b.len && memcmp(s.data, a.data, a.len) == 0 &&
            memcmp(s.data + a.len, b.data, b.len) == 0)
            break;
    }
    return i;
}

static int32_t find_text(const tokenizer *t, gguf_str a, gguf_str b) {
    return (int32_t)t->text_slots[text_slot(t, a, b)] - 1;
}

static uint32_t merge_slot(const tokenizer *t, int32_t left, int32_t right) {
    uint64_t key = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    uint32_t i = (uint32_t)(key * 0x9e3779b97f4a7c15u >> 32) & t->merge_mask;
    for (; t->merge_slots[i]; i = (i + 1) & t->merge_mask) {
        const merge *m = &t->merges[t->merge_slots[i] - 1];
        if (m->left == left && m->right == right) break;
    }
    return i;
}

/* At most half full. *mask is slots - 1. */
static uint32_t *new_slots(uint64_t entries, uint32_t *mask) {
    uint64_t n = 16;
    while (n < 2 * entries) n *= 2;
    *mask = (uint32_t)(n - 1);
    return calloc((size_t)n, sizeof(uint32_t));
}

/* ---- loading ---------------------------------------------------------------------------------------------- */

#define KEY_TOKENS "tokenizer.ggml.tokens"
#define KEY_TYPES "tokenizer.ggml.token_type"
#define KEY_MERGES "tokenizer.ggml.merges"

static bool load_kind(tokenizer *t, const gguf_file *f, char *err, size_t err_len) {
    gguf_str model, pre;
    if (!gguf_get_str(f, "tokenizer.ggml.model", &model, err, err_len)) return false;
    if (!gguf_str_eq(model, "gpt2"))
        return llm_fail(err, err_len, "key 'tokenizer.ggml.model': '%s' is not supported (only gpt2 is)",
                        SHOW(model));
    if (!gguf_get_str(f, "tokenizer.ggml.pre", &pre, err, err_len)) return false;
    if (!pretokenizer_by_name(pre, &t->pre))
        return llm_fail(err, err_len,
                        "key 'tokenizer.ggml.pre': '%s' is not supported (only smollm and gpt-2 are)",
                        SHOW(pre));
    return true;
}

static bool load_types(tokenizer *t, const gguf_file *f, char *err, size_t err_len) {
    gguf_array a;
    memset(t->type, TYPE_NORMAL, t->n_vocab);
    if (!gguf_has(f, KEY_TYPES)) return true;
    if (!gguf_get_array(f, KEY_TYPES, GGUF_KV_I32, &a, err, err_len)) return false;
    if (a.n != t->n_vocab)
        return llm_fail(err, err_len, "key '" KEY_TYPES "': %llu entries for %u tokens",
                        (unsigned long long)a.n, t->n_vocab);
    for (uint32_t i = 0; i < t->n_vocab; i++) {
        int32_t type = gguf_array_i32(&a, i);
        if (type < TYPE_NORMAL || type > TYPE_LAST)
            return llm_fail(err, err_len, "key '" KEY_TYPES "': token %u has unknown type %d", i, (int)type);
        t->type[i] = (uint8_t)type;
    }
    return true;
}

static bool load_tokens(tokenizer *t, const gguf_file *f, char *err, size_t err_len) {
    gguf_array a;
    if (!gguf_get_array(f, KEY_TOKENS, GGUF_KV_STR, &a, err, err_len)) return false;
    if (a.n == 0 || a.n > MAX_ENTRIES)
        return llm_fail(err, err_len, "key '" KEY_TOKENS "': %llu tokens", (unsigned long long)a.n);
    t->n_vocab = (uint32_t)a.n;
    t->text = calloc(t->n_vocab, sizeof *t->text);
    t->type = calloc(t->n_vocab, 1);
    t->text_slots = new_slots(t->n_vocab, &t->text_mask);
    if (!t->text || !t->type || !t->text_slots)
        return llm_fail(err, err_len, "out of memory for the vocabulary");
    size_t pos = 0;
    for (uint32_t i = 0; i < t->n_vocab; i++) {
        gguf_str s = gguf_array_next_str(&a, &pos);
        uint32_t slot = text_slot(t, s, (gguf_str){"", 0});
        if (t->text_slots[slot])
            return llm_fail(err, err_len, "key '" KEY_TOKENS "': token %u repeats token %u, '%s'", i,
                            t->text_slots[slot] - 1, SHOW(s));
        t->text[i] = s;
        t->text_slots[slot] = i + 1;
    }
    return load_types(t, f, err, err_len);
}

/* What each token decodes to, and which token is which single byte. */
static bool load_pieces(tokenizer *t, char *err, size_t err_len) {
    uint16_t byte_to_char[256];
    int16_t char_to_byte[324];
    size_t total = 0;
    byte_alphabet(byte_to_char, char_to_byte);
    for (uint32_t i = 0; i < t->n_vocab; i++) total += t->text[i].len;
    t->pieces = malloc(total + 1);
    t->piece_at = malloc(((size_t)t->n_vocab + 1) * sizeof *t->piece_at);
    if (!t->pieces || !t->piece_at) return llm_fail(err, err_len, "out of memory for the vocabulary");
    size_t at = 0;
    for (uint32_t i = 0; i < t->n_vocab; i++) {
        t->piece_at[i] = at;
        if (t->type[i] == TYPE_NORMAL) {
            at += spell_bytes(t->text[i], char_to_byte, t->pieces + at);
        } else if (t->text[i].len) {
            memcpy(t->pieces + at, t->text[i].data, t->text[i].len);
            at += t->text[i].len;
        }
    }
    t->piece_at[t->n_vocab] = at;
    for (unsigned b = 0; b < 256; b++) {
        unsigned c = byte_to_char[b];
        char utf8[2] = {(char)(c < 0x80 ? c : 0xC0 | c >> 6), (char)(0x80 | (c & 0x3F))};
        int32_t id = find_text(t, (gguf_str){utf8, c < 0x80 ? 1 : 2}, (gguf_str){"", 0});
        t->byte_id[b] = id >= 0 && t->type[id] == TYPE_NORMAL ? id : NO_TOKEN;
    }
    return true;
}

/* "left right" to ids. No byte is spelled as a space, so the first one after the left part's first byte divides. */
static bool parse_merge(const tokenizer *t, gguf_str s, merge *m) {
    const char *space = s.len > 2 ? memchr(s.data + 1, ' ', s.len - 1) : NULL;
    if (!space) return false;
    gguf_str left = {s.data, (size_t)(space - s.data)};
    gguf_str right = {space + 1, s.len - left.len - 1};
    m->left = find_text(t, left, (gguf_str){"", 0});
    m->right = find_text(t, right, (gguf_str){"", 0});
    m->merged = find_text(t, left, right);
    return m->left >= 0 && m->right >= 0 && m->merged >= 0;
}

static bool load_merges(tokenizer *t, const gguf_file *f, char *err, size_t err_len) {
    gguf_array a;
    if (!gguf_get_array(f, KEY_MERGES, GGUF_KV_STR, &a, err, err_len)) return false;
    if (a.n > MAX_ENTRIES)
        return llm_fail(err, err_len, "key '" KEY_MERGES "': %llu merges", (unsigned long long)a.n);
    t->n_merges = (uint32_t)a.n;
    t->merges = calloc((size_t)t->n_merges + 1, sizeof *t->merges);
    t->merge_slots = new_slots(t->n_merges, &t->merge_mask);
    if (!t->merges || !t->merge_slots) return llm_fail(err, err_len, "out of memory for the merges");
    size_t pos = 0;
    for (uint32_t rank = 0; rank < t->n_merges; rank++) {
        gguf_str s = gguf_array_next_str(&a, &pos);
        merge *m = &t->merges[rank];
        if (!parse_merge(t, s, m))
            return llm_fail(err, err_len,
                            "key '" KEY_MERGES "': merge %u, '%s', is not two tokens that form one", rank,
                            SHOW(s));
        uint32_t slot = merge_slot(t, m->left, m->right);
        if (!t->merge_slots[slot]) t->merge_slots[slot] = rank + 1;
    }
    return true;
}

static bool is_special(const tokenizer *t, uint32_t id) {
    uint8_t type = t->type[id];
    return t->text[id].len && (type == TYPE_CONTROL || type == TYPE_USER_DEFINED || type == TYPE_UNKNOWN);
}

/* By first byte, and at each of them longest first: then the first that matches is the longest. */
typedef struct special_key {
    unsigned char first;
    size_t len;
    int32_t id;
} special_key;

static int compare_special(const void *pa, const void *pb) {
    const special_key *a = pa, *b = pb;
    if (a->first != b->first) return a->first < b->first ? -1 : 1;
    if (a->len != b->len) return a->len > b->len ? -1 : 1;
    return (a->id > b->id) - (a->id < b->id);
}

static bool load_special(tokenizer *t, char *err, size_t err_len) {
    uint32_t n = 0;
    for (uint32_t id = 0; id < t->n_vocab; id++) n += is_special(t, id);
    special_key *keys = malloc(((size_t)n + 1) * sizeof *keys);
    t->special = malloc(((size_t)n + 1) * sizeof *t->special);
    if (!keys || !t->special) {
        free(keys);
        return llm_fail(err, err_len, "out of memory for the special tokens");
    }
    for (uint32_t id = 0; id < t->n_vocab; id++)
        if (is_special(t, id))
            keys[t->n_special++] =
                (special_key){(unsigned char)t->text[id].data[0], t->text[id].len, (int32_t)id};
    qsort(keys, n, sizeof *keys, compare_special);
    for (uint32_t i = 0; i < n; i++) {
        t->special[i] = keys[i].id;
        t->special_at[keys[i].first + 1u] = i + 1;
    }
    for (unsigned b = 1; b <= 256; b++)
        if (t->special_at[b] < t->special_at[b - 1]) t->special_at[b] = t->special_at[b - 1];
    free(keys);
    return true;
}

static bool load_id(const tokenizer *t, const gguf_file *f, const char *key, int32_t *id, char *err,
                    size_t err_len) {
    uint32_t v;
    *id = NO_TOKEN;
    if (!gguf_has(f, key)) return true;
    if (!gguf_get_u32(f, key, &v, err, err_len)) return false;
    if (v >= t->n_vocab)
        return llm_fail(err, err_len, "key '%s': %u is outside the vocabulary of %u", key, v, t->n_vocab);
    *id = (int32_t)v;
    return true;
}

static bool load_ids(tokenizer *t, const gguf_file *f, char *err, size_t err_len) {
    static const char add_bos[] = "tokenizer.ggml.add_bos_token";
    if (!load_id(t, f, "tokenizer.ggml.bos_token_id", &t->bos, err, err_len) ||
        !load_id(t, f, "tokenizer.ggml.eos_token_id", &t->eos, err, err_len) ||
        !load_id(t, f, "tokenizer.ggml.eot_token_id", &t->eot, err, err_len))
        return false;
    if (gguf_has(f, add_bos) && !gguf_get_bool(f, add_bos, &t->add_bos, err, err_len)) return false;
    if (t->add_bos && t->bos == NO_TOKEN)
        return llm_fail(err, err_len, "key '%s' is true, but tokenizer.ggml.bos_token_id is missing",
                        add_bos);
    return true;
}

bool tokenizer_load(const gguf_file *f, tokenizer **out, char *err, size_t err_len) {
    *out = NULL;
    tokenizer *t = calloc(1, sizeof *t);
    if (!t) return llm_fail(err, err_len, "out of memory");
    if (!load_kind(t, f, err, err_len) || !load_tokens(t, f, err, err_len) || !load_pieces(t, err, err_len) ||
        !load_merges(t, f, err, err_len) || !load_special(t, err, err_len) || !load_ids(t, f, err, err_len)) {
        tokenizer_free(t);
        return false;
    }
    *out = t;
    return true;
}

void tokenizer_free(tokenizer *t) {
    if (!t) return;
    free(t->text);
    free(t->type);
    free(t->pieces);
    free(t->piece_at);
    free(t->merges);
    free(t->text_slots);
    free(t->merge_slots);
    free(t->special);
    free(t);
}

/* ---- encoding --------------------------------------------------------------------------------------------- */

/* A word while its bytes are merged: a doubly linked list in an array, and a heap of merges that are possible. A
 * heap entry is rank << 32 | index of the left symbol, so that the smallest is the lowest rank, then the leftmost. */
typedef struct symbol {
    int32_t id, prev, next; /* id NO_TOKEN: merged away */
} symbol;

typedef struct workspace {
    symbol *symbols;
    uint64_t *heap;
    size_t n_heap, cap; /* cap: bytes of the longest word that fits */
} workspace;

/* A word of n symbols has n - 1 pairs, and each of at most n - 1 merges makes two new ones. */
static bool workspace_grow(workspace *w, size_t n) {
    if (n <= w->cap) return true;
    size_t cap = n + n / 2 + 64;
    free(w->symbols);
    free(w->heap);
    w->symbols = malloc(cap * sizeof *w->symbols);
    w->heap = malloc(3 * cap * sizeof *w->heap);
    w->cap = w->symbols && w->heap ? cap : 0;
    return w->cap != 0;
}

static void workspace_free(workspace *w) {
    free(w->symbols);
    free(w->heap);
}

static void heap_push(workspace *w, uint64_t v) {
    size_t i = w->n_heap++;
    for (; i > 0 && v < w->heap[(i - 1) / 2]; i = (i - 1) / 2) w->heap[i] = w->heap[(i - 1) / 2];
    w->heap[i] = v;
}

static uint64_t heap_pop(workspace *w) {
    uint64_t top = w->heap[0], v = w->heap[--w->n_heap];
    size_t i = 0, child;
    while ((child = 2 * i + 1) < w->n_heap) {
        if (child + 1 < w->n_heap && w->heap[child + 1] < w->heap[child]) child++;
        if (v <= w->heap[child]) break;
        w->heap[i] = w->heap[child];
        i = child;
    }
    w->heap[i] = v;
    return top;
}

/* Queues the merge of symbol i with its right neighbour, if there is one. */
static void propose(const tokenizer *t, workspace *w, int32_t i) {
    if (i < 0 || w->symbols[i].next < 0) return;
    uint32_t rank = t->merge_slots[merge_slot(t, w->symbols[i].id, w->symbols[w->symbols[i].next].id)];
    if (rank) heap_push(w, (uint64_t)(rank - 1) << 32 | (uint32_t)i);
}

/* Merges symbol i with its right neighbour if they still are what the queued merge was about. */
static void apply(const tokenizer *t, workspace *w, const merge *m, int32_t i) {
    symbol *s = w->symbols;
    int32_t next = s[i].next;
    if (s[i].id != m->left || next < 0 || s[next].id != m->right) return;
    s[i].id = m->merged;
    s[i].next = s[next].next;
    s[next].id = NO_TOKEN;
    if (s[i].next >= 0) s[s[i].next].prev = i;
    propose(t, w, s[i].prev);
    propose(t, w, i);
}

static bool encode_word(const tokenizer *t, workspace *w, const char *text, size_t len, token_list *out) {
    if (!workspace_grow(w, len)) return false;
    int32_t n = 0;
    for (size_t i = 0; i < len; i++) {
        int32_t id = t->byte_id[(unsigned char)text[i]];
        if (id == NO_TOKEN) {
            out->dropped_bytes++;
            continue;
        }
        w->symbols[n] = (symbol){id, n - 1, n + 1};
        n++;
    }
    if (n == 0) return true;
    w->symbols[n - 1].next = -1;
    w->n_heap = 0;
    for (int32_t i = 0; i < n; i++) propose(t, w, i);
    while (w->n_heap) {
        uint64_t best = heap_pop(w);
        apply(t, w, &t->merges[best >> 32], (int32_t)(uint32_t)best);
    }
    for (int32_t i = 0; i >= 0; i = w->symbols[i].next)
        if (!token_list_push(out, w->symbols[i].id)) return false;
    return true;
}

static bool encode_text(const tokenizer *t, workspace *w, const char *text, size_t len, token_list *out) {
    for (size_t pos = 0, end; pos < len; pos = end) {
        end = pretokenize_word(t->pre, text, len, pos);
        if (!encode_word(t, w, text + pos, end - pos, out)) return false;
    }
    return true;
}

/* The special token whose text is at `text`, longest first, or NO_TOKEN. */
static int32_t match_special(const tokenizer *t, const char *text, size_t len, bool control) {
    unsigned first = (unsigned char)text[0];
    for (uint32_t k = t->special_at[first]; k < t->special_at[first + 1]; k++) {
        int32_t id = t->special[k];
        gguf_str s = t->text[id];
        if ((control || t->type[id] == TYPE_USER_DEFINED) && s.len <= len && memcmp(s.data, text, s.len) == 0)
            return id;
    }
    return NO_TOKEN;
}

static bool encode_all(const tokenizer *t, workspace *w, const char *text, size_t len, bool control,
                       token_list *out) {
    size_t start = 0;
    for (size_t pos = 0; pos < len;) {
        int32_t id = match_special(t, text + pos, len - pos, control);
        if (id == NO_TOKEN) {
            pos++;
            continue;
        }
        if (!encode_text(t, w, text + start, pos - start, out) || !token_list_push(out, id)) return false;
        start = pos += t->text[id].len;
    }
    return encode_text(t, w, text + start, len - start, out);
}

bool tokenizer_encode(const tokenizer *t, const char *text, size_t len, unsigned flags, token_list *out,
                      char *err, size_t err_len) {
    if (len > MAX_TEXT)
        return llm_fail(err, err_len, "a text of %zu bytes is too long to encode (at most %zu)", len,
                        MAX_TEXT);
    workspace w = {0};
    size_t n = out->n, dropped = out->dropped_bytes;
    bool ok = !(flags & TOKENIZE_BOS) || !t->add_bos || token_list_push(out, t->bos);
    ok = ok && encode_all(t, &w, text, len, (flags & TOKENIZE_SPECIAL) != 0, out);
    workspace_free(&w);
    if (ok) return true;
    out->n = n;
    out->dropped_bytes = dropped;
    return llm_fail(err, err_len, "out of memory while encoding %zu bytes", len);
}

/* ---- decoding and names ----------------------------------------------------------------------------------- */

static bool in_vocab(const tokenizer *t, int32_t id) { return id >= 0 && (uint32_t)id < t->n_vocab; }

const char *tokenizer_piece(const tokenizer *t, int32_t id, size_t *len) {
    *len = 0;
    if (!in_vocab(t, id)) return "";
    *len = t->piece_at[id + 1] - t->piece_at[id];
    return t->pieces + t->piece_at[id];
}

int32_t tokenizer_find(const tokenizer *t, const char *text) {
    return find_text(t, (gguf_str){text, strlen(text)}, (gguf_str){"", 0});
}

bool tokenizer_is_control(const tokenizer *t, int32_t id) {
    return in_vocab(t, id) && t->type[id] == TYPE_CONTROL;
}

bool tokenizer_is_end(const tokenizer *t, int32_t id) {
    if (!in_vocab(t, id)) return false;
    if (id == t->eos || id == t->eot) return true;
    gguf_str s = t->text[id];
    return t->type[id] == TYPE_CONTROL && (gguf_str_eq(s, "<|im_end|>") || gguf_str_eq(s, "<|endoftext|>"));
}

int32_t tokenizer_bos(const tokenizer *t) { return t->bos; }
int32_t tokenizer_eos(const tokenizer *t) { return t->eos; }
int32_t tokenizer_eot(const tokenizer *t) { return t->eot; }
uint32_t tokenizer_vocab_size(const tokenizer *t) { return t->n_vocab; }

/* ---- streaming -------------------------------------------------------------------------------------------- */

#define REPLACEMENT "\xEF\xBF\xBD" /* U+FFFD */

/* Moves what is decided from the front of `held` to out; `last`: no more bytes will come. */
static size_t utf8_settle(utf8_stream *s, bool last, char *out) {
    size_t n_out = 0;
    while (s->n_held) {
        uint32_t cp;
        size_t n = utf8_decode((const char *)s->held, s->n_held, &cp);
        if (cp == UTF8_TRUNCATED && !last) break;
        if (cp == UTF8_TRUNCATED || cp == UTF8_INVALID) {
            memcpy(out + n_out, REPLACEMENT, 3);
            n_out += 3;
        } else {
            memcpy(out + n_out, s->held, n);
            n_out += n;
        }
        s->n_held -= (unsigned)n;
        memmove(s->held, s->held + n, s->n_held);
    }
    return n_out;
}

size_t utf8_stream_push(utf8_stream *s, const char *bytes, size_t n, char *out) {
    size_t n_out = 0;
    for (size_t i = 0; i < n; i++) {
        s->held[s->n_held++] = (unsigned char)bytes[i];
        n_out += utf8_settle(s, false, out + n_out);
    }
    return n_out;
}

size_t utf8_stream_flush(utf8_stream *s, char *out) { return utf8_settle(s, true, out); }
