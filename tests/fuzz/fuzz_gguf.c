/* Feeds arbitrary bytes to everything that reads a model file: the GGUF reader, the tokenizer, the chat template.
 * It finds what a memory checker finds; besides, an accepted file must be consistent.
 *
 *   clang -fsanitize=fuzzer,address -Iexamples -Itests tests/fuzz/fuzz_gguf.c examples/llm/{gguf,pretokenize,tokenizer,
 *       chat_template}.c -o fuzz_gguf && ./fuzz_gguf
 *
 * With FUZZ_STANDALONE it needs no fuzzer: fuzz_gguf [rounds] [seed] mutates a small model that many times. */
#include "../e2e/gguf_builder.h"
#include "llm/chat_template.h"
#include "llm/gguf.h"
#include "llm/tokenizer.h"

#define CHECK(condition)                                                    \
    do {                                                                    \
        if (!(condition)) {                                                 \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                        \
        }                                                                   \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static unsigned sink; /* keeps reads from being optimised away */

static void touch_tensors(const gguf_file *f) {
    for (uint64_t i = 0; i < gguf_tensor_count(f); i++) {
        const gguf_tensor_info *t = gguf_tensor_at(f, i);
        const uint8_t *bytes = t->data;
        CHECK(t->bytes > 0);
        sink += bytes[0] + bytes[t->bytes - 1] + (unsigned char)t->name.data[t->name.len - 1];
    }
}

static void touch_keys(const gguf_file *f) {
    static const char *const keys[] = {"tokenizer.ggml.tokens", "tokenizer.ggml.pre",
                                       "tokenizer.ggml.token_type", "tokenizer.ggml.bos_token_id",
                                       "general.alignment"};
    char err[LLM_ERR_LEN];
    for (size_t k = 0; k < sizeof keys / sizeof keys[0]; k++) {
        gguf_array a;
        gguf_str s;
        uint32_t u;
        if (gguf_get_array(f, keys[k], GGUF_KV_STR, &a, err, sizeof err)) {
            size_t pos = 0;
            for (uint64_t i = 0; i < a.n; i++) {
                s = gguf_array_next_str(&a, &pos);
                if (s.len) sink += (unsigned char)s.data[s.len - 1];
            }
        }
        if (gguf_get_array(f, keys[k], GGUF_KV_I32, &a, err, sizeof err))
            for (uint64_t i = 0; i < a.n; i++) sink += (unsigned)gguf_array_i32(&a, i);
        if (gguf_get_str(f, keys[k], &s, err, sizeof err) && s.len) sink += (unsigned char)s.data[s.len - 1];
        if (gguf_get_u32(f, keys[k], &u, err, sizeof err)) sink += u;
    }
}

static void use_tokenizer(const gguf_file *f, const tokenizer *t, const uint8_t *data, size_t size) {
    char err[LLM_ERR_LEN];
    size_t n = size < 512 ? size : 512, len;
    token_list l = {0};
    chat_template c;
    CHECK(tokenizer_encode(t, (const char *)data + size - n, n, TOKENIZE_SPECIAL | TOKENIZE_BOS, &l, err,
                           sizeof err));
    CHECK(tokenizer_encode(t, "ab abc  12<|im_end|>", 20, TOKENIZE_PLAIN, &l, err, sizeof err));
    if (chat_template_load(f, t, &c, err, sizeof err)) {
        chat_message m = {"user", (const char *)data, n};
        CHECK(chat_render(&c, &m, 1, true, &l, err, sizeof err));
        chat_template_free(&c);
    }
    for (size_t i = 0; i < l.n; i++) {
        CHECK(l.ids[i] >= 0 && (uint32_t)l.ids[i] < tokenizer_vocab_size(t));
        const char *piece = tokenizer_piece(t, l.ids[i], &len);
        if (len) sink += (unsigned char)piece[len - 1];
    }
    token_list_free(&l);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char err[LLM_ERR_LEN] = "";
    gguf_file *f;
    tokenizer *t;
    /* a copy of exactly this size: reads past its end are seen */
    uint8_t *copy = malloc(size ? size : 1);
    CHECK(copy);
    if (size) memcpy(copy, data, size);
    if (gguf_open_memory(copy, size, &f, err, sizeof err)) {
        touch_tensors(f);
        touch_keys(f);
        if (tokenizer_load(f, &t, err, sizeof err)) {
            use_tokenizer(f, t, copy, size);
            tokenizer_free(t);
        }
        gguf_close(f);
    } else {
        CHECK(!f && err[0]);
    }
    free(copy);
    return 0;
}

#ifdef FUZZ_STANDALONE
static uint64_t rng;

static uint64_t random_below(uint64_t n) {
    rng = rng * 6364136223846793005u + 1442695040888963407u;
    return (rng >> 20) % n;
}

/* Overwrites, flips, inserts, removes or cuts, mostly near the front, where the counts and lengths are. */
static void mutate(gb *b) {
    static const uint64_t edges[] = {
        0,          1,          8,          0x7f,       0xff,           0x7fffffff,
        0xffffffff, 1ull << 32, 1ull << 61, 1ull << 63, UINT64_MAX - 7, UINT64_MAX};
    size_t at = (size_t)random_below(random_below(2) ? b->n : b->n < 400 ? b->n : 400);
    size_t rest = b->n - at;
    switch (random_below(6)) {
    case 0: b->data[at] ^= (uint8_t)(1u << random_below(8)); break;
    case 1: b->data[at] = (uint8_t)random_below(256); break;
    case 2: memcpy(b->data + at, &edges[random_below(12)], rest < 8 ? rest : 8); break;
    case 3: memcpy(b->data + at, &edges[random_below(12)], rest < 4 ? rest : 4); break;
    case 4: /* remove some bytes */
        rest = (size_t)random_below(rest < 16 ? rest : 16);
        memmove(b->data + at, b->data + at + rest, b->n - at - rest);
        b->n -= rest;
        break;
    default: /* mostly small changes, sometimes a cut */
        if (random_below(8) == 0 && at > 0)
            b->n = at;
        else
            b->data[at]++;
        break;
    }
}

int main(int argc, char **argv) {
    static const char merges[4][2][16] = {{"a", "b"}, {"ab", "c"}, {"1", "2"}, {"\xc4\xa0", "a"}};
    gb_vocab v = {.merges = merges, .n_merges = 4};
    long rounds = argc > 1 ? strtol(argv[1], NULL, 10) : 20000;
    gb model = {0};
    rng = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    gb_vocab_file(&model, &v);
    LLVMFuzzerTestOneInput(model.data, model.n);
    for (long i = 0; i < rounds; i++) {
        gb b = {0};
        gb_bytes(&b, model.data, model.n);
        for (uint64_t k = 1 + random_below(4); k > 0; k--) mutate(&b);
        LLVMFuzzerTestOneInput(b.data, b.n);
        gb_free(&b);
    }
    gb_free(&model);
    printf("fuzz_gguf: %ld mutated models, nothing found\n", rounds);
    return 0;
}
#endif
