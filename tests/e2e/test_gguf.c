/* The GGUF reader: a good file is read back value by value, and files that are wrong in every way we know are refused
 * with a message that names the key or tensor. */
#include "gguf_builder.h"
#include "llm/gguf.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <unistd.h>
#include <cmocka.h>

static const char *model_path = "build/models/SmolLM2-135M-Instruct.Q4_1.gguf";

/* Opens a copy of exactly n bytes, so that a memory checker sees any read behind them. */
static bool open_copy(const uint8_t *data, size_t n, gguf_file **f, void **copy, char *err) {
    *copy = malloc(n ? n : 1);
    assert_non_null(*copy);
    if (n) memcpy(*copy, data, n);
    return gguf_open_memory(*copy, n, f, err, LLM_ERR_LEN);
}

#define NE(...) ((const uint64_t[]){__VA_ARGS__})

/* One value of every type and two tensors. */
static void build_good(gb *b, uint32_t version) {
    gb_header(b, version, 2, 14);
    gb_key(b, "t.u8", 0), gb_u8(b, 200);
    gb_key(b, "t.i8", 1), gb_u8(b, (uint8_t)-5);
    gb_key(b, "t.u16", 2), gb_bytes(b, &(uint16_t){60000}, 2);
    gb_key(b, "t.i16", 3), gb_bytes(b, &(int16_t){-300}, 2);
    gb_kv_u32(b, "t.u32", 4000000000u);
    gb_key(b, "t.i32", 5), gb_u32(b, 77);
    gb_key(b, "t.f32", 6), gb_bytes(b, &(float){1.5f}, 4);
    gb_kv_bool(b, "t.bool", 1);
    gb_kv_str(b, "t.str", "text");
    gb_key(b, "t.u64", 10), gb_u64(b, 1ull << 32);
    gb_key(b, "t.i64", 11), gb_u64(b, 99);
    gb_key(b, "t.f64", 12), gb_bytes(b, &(double){0.25}, 8);
    gb_kv_array(b, "t.strs", 8, 3), gb_str(b, "a"), gb_str(b, ""), gb_str(b, "ccc");
    gb_kv_array(b, "t.f32s", 6, 2), gb_bytes(b, (float[]){2.0f, -4.0f}, 8);
    gb_tensor(b, "w", GGUF_Q4_1, 2, NE(64, 3), 0);
    gb_tensor(b, "norm", GGUF_F32, 1, NE(5), 128);
    gb_align(b, 32);
    gb_fill(b, 128 + 20);
}

static void check_values(const gguf_file *f) {
    uint32_t u;
    float x;
    bool flag;
    gguf_str s;
    gguf_array a;
    char err[LLM_ERR_LEN] = "";
    assert_true(gguf_get_u32(f, "t.u8", &u, err, sizeof err) && u == 200);
    assert_true(gguf_get_u32(f, "t.u16", &u, err, sizeof err) && u == 60000);
    assert_true(gguf_get_u32(f, "t.u32", &u, err, sizeof err) && u == 4000000000u);
    assert_true(gguf_get_u32(f, "t.i32", &u, err, sizeof err) && u == 77);
    assert_true(gguf_get_u32(f, "t.i64", &u, err, sizeof err) && u == 99);
    assert_true(gguf_get_f32(f, "t.f32", &x, err, sizeof err) && x == 1.5f);
    assert_true(gguf_get_f32(f, "t.f64", &x, err, sizeof err) && x == 0.25f);
    assert_true(gguf_get_bool(f, "t.bool", &flag, err, sizeof err) && flag);
    assert_true(gguf_get_str(f, "t.str", &s, err, sizeof err) && gguf_str_eq(s, "text"));
    assert_true(gguf_get_array(f, "t.f32s", GGUF_KV_F32, &a, err, sizeof err) && a.n == 2);
    assert_true(gguf_array_f32(&a, 0) == 2.0f && gguf_array_f32(&a, 1) == -4.0f);
    assert_true(gguf_get_array(f, "t.strs", GGUF_KV_STR, &a, err, sizeof err) && a.n == 3);
    size_t pos = 0;
    assert_true(gguf_str_eq(gguf_array_next_str(&a, &pos), "a"));
    assert_true(gguf_str_eq(gguf_array_next_str(&a, &pos), ""));
    assert_true(gguf_str_eq(gguf_array_next_str(&a, &pos), "ccc"));
    assert_true(gguf_has(f, "t.str") && !gguf_has(f, "t.st") && !gguf_has(f, "t.strx"));
}

static void test_good_file(void **state) {
    (void)state;
    for (uint32_t version = 2; version <= 3; version++) {
        gb b = {0};
        gguf_file *f;
        void *copy;
        char err[LLM_ERR_LEN] = "";
        build_good(&b, version);
        assert_true(open_copy(b.data, b.n, &f, &copy, err));
        check_values(f);
        assert_int_equal(gguf_tensor_count(f), 2);
        const gguf_tensor_info *w = gguf_tensor(f, "w"), *norm = gguf_tensor(f, "norm");
        assert_non_null(w);
        assert_non_null(norm);
        assert_null(gguf_tensor(f, "nor"));
        assert_ptr_equal(w, gguf_tensor_at(f, 0));
        assert_int_equal(w->bytes, 3 * 2 * 20);
        assert_int_equal(norm->bytes, 20);
        assert_true(w->ne[0] == 64 && w->ne[1] == 3 && w->ne[2] == 1 && w->ne[3] == 1);
        /* where the builder put them, counted from the end of the file */
        assert_memory_equal(w->data, b.data + b.n - 148, w->bytes);
        assert_memory_equal(norm->data, b.data + b.n - 20, norm->bytes);
        gguf_close(f);
        free(copy);
        gb_free(&b);
    }
}

/* No beginning of a good file is a good file; every one has a message. */
static void test_truncated(void **state) {
    (void)state;
    gb b = {0};
    build_good(&b, 3);
    for (size_t n = 0; n < b.n; n++) {
        gguf_file *f;
        void *copy;
        char err[LLM_ERR_LEN] = "";
        assert_false(open_copy(b.data, n, &f, &copy, err));
        assert_null(f);
        assert_true(strlen(err) > 10);
        free(copy);
    }
    gb_free(&b);
}

static void test_getters_name_the_key(void **state) {
    (void)state;
    gb b = {0};
    gguf_file *f;
    void *copy;
    char err[LLM_ERR_LEN] = "";
    uint32_t u;
    float x;
    bool flag;
    gguf_str s;
    gguf_array a;
    const gguf_tensor_info *t;
    build_good(&b, 3);
    assert_true(open_copy(b.data, b.n, &f, &copy, err));
#define REFUSES(call, ...)                                                          \
    do {                                                                            \
        static const char *const words[] = {__VA_ARGS__};                           \
        err[0] = 0;                                                                 \
        assert_false(call);                                                         \
        for (size_t i = 0; i < sizeof words / sizeof words[0]; i++)                 \
            if (!strstr(err, words[i])) fail_msg("'%s' lacks '%s'", err, words[i]); \
    } while (0)
    REFUSES(gguf_get_u32(f, "no.such", &u, err, sizeof err), "no.such", "missing");
    REFUSES(gguf_get_u32(f, "t.i8", &u, err, sizeof err), "t.i8", "negative", "-5");
    REFUSES(gguf_get_u32(f, "t.i16", &u, err, sizeof err), "t.i16", "-300");
    REFUSES(gguf_get_u32(f, "t.u64", &u, err, sizeof err), "t.u64", "4294967296");
    REFUSES(gguf_get_u32(f, "t.f32", &u, err, sizeof err), "t.f32", "f32", "integer");
    REFUSES(gguf_get_f32(f, "t.u32", &x, err, sizeof err), "t.u32", "u32");
    REFUSES(gguf_get_bool(f, "t.u8", &flag, err, sizeof err), "t.u8", "bool");
    REFUSES(gguf_get_str(f, "t.strs", &s, err, sizeof err), "t.strs", "array of string");
    REFUSES(gguf_get_array(f, "t.strs", GGUF_KV_I32, &a, err, sizeof err), "t.strs", "array of i32");
    REFUSES(gguf_get_array(f, "t.str", GGUF_KV_STR, &a, err, sizeof err), "t.str", "array of string");
    REFUSES(gguf_require_tensor(f, "gone", 1, 0, &t, err, sizeof err), "gone", "missing");
    REFUSES(gguf_require_tensor(f, "w", 64, 4, &t, err, sizeof err), "'w'", "[64, 3, 1, 1]", "[64, 4]");
    REFUSES(gguf_require_tensor(f, "norm", 6, 0, &t, err, sizeof err), "'norm'", "[5, 1, 1, 1]", "[6, 1]");
    assert_true(gguf_require_tensor(f, "w", 64, 3, &t, err, sizeof err) && t == gguf_tensor(f, "w"));
    assert_true(gguf_require_tensor(f, "norm", 5, 0, &t, err, sizeof err));
    gguf_close(f);
    free(copy);
    gb_free(&b);
}

/* ---- files that are wrong in one way ----------------------------------------------------------------------- */

typedef struct hostile {
    const char *what;
    void (*build)(gb *b);
    const char *words[3]; /* all in the message */
} hostile;

static void h_magic(gb *b) { gb_bytes(b, "GGML\3\0\0\0", 8), gb_fill(b, 64); }
static void h_version1(gb *b) { gb_header(b, 1, 0, 0); }
static void h_big_endian(gb *b) { gb_header(b, 0x03000000, 0, 0); }
static void h_kv_count(gb *b) { gb_header(b, 3, 0, 1ull << 60), gb_fill(b, 400); }
static void h_kv_count_near(gb *b) { gb_header(b, 3, 0, 4), gb_kv_bool(b, "k", 1), gb_kv_bool(b, "l", 1); }
static void h_tensor_count(gb *b) { gb_header(b, 3, UINT64_MAX, 0), gb_fill(b, 400); }
static void h_key_length(gb *b) { gb_header(b, 3, 0, 1), gb_u64(b, UINT64_MAX - 3), gb_fill(b, 64); }
static void h_key_empty(gb *b) { gb_header(b, 3, 0, 1), gb_key(b, "", 4), gb_fill(b, 64); }
static void h_key_bytes(gb *b) { gb_header(b, 3, 0, 1), gb_kv_u32(b, "ab\x01\xff", 4), gb_fill(b, 64); }
static void h_kv_type(gb *b) { gb_header(b, 3, 0, 1), gb_key(b, "odd.key", 13), gb_fill(b, 64); }
static void h_value_cut(gb *b) { gb_header(b, 3, 0, 1), gb_key(b, "a.u64.key", 10), gb_fill(b, 4); }
static void h_str_length(gb *b) {
    gb_header(b, 3, 0, 1), gb_key(b, "long.str", 8), gb_u64(b, UINT64_MAX), gb_fill(b, 32);
}
static void h_bool(gb *b) { gb_header(b, 3, 0, 1), gb_kv_bool(b, "half.true", 2); }
static void h_bool_array(gb *b) {
    gb_header(b, 3, 0, 1), gb_kv_array(b, "flags", 7, 3), gb_bytes(b, "\1\0\7", 3);
}
static void h_array_type(gb *b) { gb_header(b, 3, 0, 1), gb_kv_array(b, "arr.key", 99, 1), gb_fill(b, 64); }
static void h_array_nested(gb *b) {
    gb_header(b, 3, 0, 1), gb_kv_array(b, "nest.key", 9, 1), gb_u32(b, 4), gb_u64(b, 1), gb_u32(b, 1);
}
static void h_array_count(gb *b) {
    gb_header(b, 3, 0, 1), gb_kv_array(b, "big.array", 10, (1ull << 61) + 1), gb_fill(b, 64);
}
static void h_array_str_count(gb *b) {
    gb_header(b, 3, 0, 1), gb_kv_array(b, "big.strs", 8, 1ull << 61), gb_fill(b, 64);
}
static void h_array_str_length(gb *b) {
    gb_header(b, 3, 0, 1), gb_kv_array(b, "strs.key", 8, 2), gb_str(b, "ok"), gb_u64(b, 1000), gb_fill(b, 8);
}
static void h_array_cut(gb *b) { gb_header(b, 3, 0, 1), gb_key(b, "cut.array", 9), gb_u32(b, 4); }
static void h_key_twice(gb *b) {
    gb_header(b, 3, 0, 3), gb_kv_u32(b, "twice", 1), gb_kv_u32(b, "other", 1), gb_kv_u32(b, "twice", 2);
}

static void with_alignment(gb *b, uint32_t v) {
    gb_header(b, 3, 1, 1), gb_kv_u32(b, "general.alignment", v), gb_tensor(b, "w", 0, 1, NE(4), 0);
    gb_align(b, 64), gb_fill(b, 64);
}
static void h_align_zero(gb *b) { with_alignment(b, 0); }
static void h_align_odd(gb *b) { with_alignment(b, 48); }
static void h_align_small(gb *b) { with_alignment(b, 4); }
static void h_align_huge(gb *b) { with_alignment(b, 1u << 31); }
static void h_align_type(gb *b) {
    gb_header(b, 3, 0, 1), gb_kv_str(b, "general.alignment", "32"), gb_fill(b, 64);
}

/* One tensor entry and 64 bytes of data. */
static void one_tensor(gb *b, uint32_t type, uint32_t n_dims, const uint64_t *ne, uint64_t offset) {
    gb_header(b, 3, 1, 0), gb_tensor(b, "blk.0.bad", type, n_dims, ne, offset);
    gb_align(b, 32), gb_fill(b, 64);
}
static void h_tensor_name_length(gb *b) { gb_header(b, 3, 1, 0), gb_u64(b, 1ull << 63), gb_fill(b, 64); }
static void h_tensor_type(gb *b) { one_tensor(b, 777, 1, NE(4), 0); }
static void h_tensor_type_removed(gb *b) { one_tensor(b, 4, 1, NE(32), 0); }
static void h_tensor_dims_zero(gb *b) { one_tensor(b, 0, 0, NE(1), 0); }
static void h_tensor_dims_many(gb *b) { one_tensor(b, 0, 5, NE(1, 1, 1, 1, 1), 0); }
static void h_tensor_dims_absurd(gb *b) {
    gb_header(b, 3, 1, 0), gb_str(b, "blk.0.bad"), gb_u32(b, UINT32_MAX), gb_fill(b, 64);
}
static void h_tensor_ne_zero(gb *b) { one_tensor(b, 0, 2, NE(4, 0), 0); }
static void h_tensor_ne_overflow(gb *b) { one_tensor(b, 0, 3, NE(1ull << 32, 1ull << 31, 2), 0); }
static void h_tensor_wraps_to_small(gb *b) { one_tensor(b, 0, 2, NE(1ull << 33, 1ull << 31), 0); }
static void h_tensor_bytes_overflow(gb *b) { one_tensor(b, 0, 1, NE(1ull << 62), 0); }
static void h_tensor_row(gb *b) { one_tensor(b, GGUF_Q4_0, 2, NE(48, 2), 0); }
static void h_tensor_outside(gb *b) { one_tensor(b, 0, 1, NE(17), 0); }
static void h_tensor_offset_outside(gb *b) { one_tensor(b, 0, 1, NE(4), 96); }
static void h_tensor_offset_wraps(gb *b) { one_tensor(b, 0, 1, NE(4), UINT64_MAX - 31); }
static void h_tensor_offset_align(gb *b) { one_tensor(b, 0, 1, NE(4), 8); }
static void h_tensor_entry_cut(gb *b) {
    gb_header(b, 3, 1, 0), gb_str(b, "blk.0.bad"), gb_u32(b, 2), gb_u64(b, 4), gb_u64(b, 4);
}
static void h_tensor_no_data(gb *b) { gb_header(b, 3, 1, 0), gb_tensor(b, "blk.0.bad", 0, 1, NE(4), 0); }
static void h_tensor_twice(gb *b) {
    gb_header(b, 3, 2, 0), gb_tensor(b, "same", 0, 1, NE(4), 0), gb_tensor(b, "same", 0, 1, NE(4), 32);
    gb_align(b, 32), gb_fill(b, 64);
}
static void h_tensor_overlap(gb *b) {
    gb_header(b, 3, 2, 0), gb_tensor(b, "first", 0, 1, NE(16), 0), gb_tensor(b, "second", 0, 1, NE(4), 32);
    gb_align(b, 32), gb_fill(b, 64);
}

static const hostile hostiles[] = {
    {"wrong magic", h_magic, {"GGUF"}},
    {"version 1", h_version1, {"version 1"}},
    {"big endian", h_big_endian, {"big-endian"}},
    {"absurd key count", h_kv_count, {"metadata_kv_count", "1152921504606846976"}},
    {"key count too high by a little", h_kv_count_near, {"metadata_kv_count", "4"}},
    {"absurd tensor count", h_tensor_count, {"tensor_count", "18446744073709551615"}},
    {"key length overflows", h_key_length, {"key 0", "18446744073709551612"}},
    {"empty key", h_key_empty, {"key 0", "0 bytes"}},
    {"key of odd bytes", h_key_bytes, {"key 0", "ab??", "ASCII"}},
    {"unknown value type", h_kv_type, {"odd.key", "13"}},
    {"value cut", h_value_cut, {"a.u64.key"}},
    {"string length overflows", h_str_length, {"long.str", "end of the file"}},
    {"bool of 2", h_bool, {"half.true", "2"}},
    {"bool of 7 in an array", h_bool_array, {"flags", "7"}},
    {"unknown element type", h_array_type, {"arr.key", "99"}},
    {"nested array", h_array_nested, {"nest.key", "array of arrays"}},
    {"array count overflows", h_array_count, {"big.array", "2305843009213693953"}},
    {"string array count overflows", h_array_str_count, {"big.strs", "2305843009213693952"}},
    {"string in an array outside", h_array_str_length, {"strs.key", "string 1 of 2"}},
    {"array header cut", h_array_cut, {"cut.array"}},
    {"key twice", h_key_twice, {"'twice'", "appears twice"}},
    {"alignment 0", h_align_zero, {"general.alignment", " 0 "}},
    {"alignment 48", h_align_odd, {"general.alignment", "48"}},
    {"alignment 4", h_align_small, {"general.alignment", " 4 "}},
    {"alignment beyond the file", h_align_huge, {"'w'"}},
    {"alignment is a string", h_align_type, {"general.alignment", "string"}},
    {"tensor name length", h_tensor_name_length, {"tensor 0", "9223372036854775808"}},
    {"unknown tensor type", h_tensor_type, {"blk.0.bad", "777"}},
    {"removed tensor type", h_tensor_type_removed, {"blk.0.bad", "type 4"}},
    {"no dimensions", h_tensor_dims_zero, {"blk.0.bad", "0 dimensions"}},
    {"5 dimensions", h_tensor_dims_many, {"blk.0.bad", "5 dimensions"}},
    {"absurd dimensions", h_tensor_dims_absurd, {"blk.0.bad", "4294967295 dimensions"}},
    {"a dimension of 0", h_tensor_ne_zero, {"blk.0.bad", "dimension 1 is 0"}},
    {"elements overflow", h_tensor_ne_overflow, {"blk.0.bad", "overflow"}},
    {"elements wrap to 0", h_tensor_wraps_to_small, {"blk.0.bad", "overflow"}},
    {"bytes overflow", h_tensor_bytes_overflow, {"blk.0.bad", "overflow"}},
    {"rows of half a block", h_tensor_row, {"blk.0.bad", "Q4_0", "48"}},
    {"data one element too long", h_tensor_outside, {"blk.0.bad", "68", "64"}},
    {"data outside", h_tensor_offset_outside, {"blk.0.bad", "offset 96"}},
    {"offset wraps", h_tensor_offset_wraps, {"blk.0.bad", "offset 18446744073709551584"}},
    {"offset not aligned", h_tensor_offset_align, {"blk.0.bad", "alignment 32"}},
    {"tensor entry cut", h_tensor_entry_cut, {"blk.0.bad", "ends inside"}},
    {"no data at all", h_tensor_no_data, {"blk.0.bad", "0 bytes of data"}},
    {"tensor twice", h_tensor_twice, {"'same'", "appears twice"}},
    {"tensors overlap", h_tensor_overlap, {"'second'", "'first'", "overlaps"}},
};

static void test_hostile(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof hostiles / sizeof hostiles[0]; i++) {
        const hostile *h = &hostiles[i];
        gb b = {0};
        gguf_file *f;
        void *copy;
        char err[LLM_ERR_LEN] = "";
        h->build(&b);
        if (open_copy(b.data, b.n, &f, &copy, err)) fail_msg("%s: accepted", h->what);
        assert_null(f);
        for (int w = 0; w < 3 && h->words[w]; w++)
            if (!strstr(err, h->words[w])) fail_msg("%s: '%s' lacks '%s'", h->what, err, h->words[w]);
        free(copy);
        gb_free(&b);
    }
}

/* A type that we know but cannot compute with is found when it is asked for, and named. */
static void test_unreadable_type_is_named(void **state) {
    (void)state;
    gb b = {0};
    gguf_file *f;
    void *copy;
    char err[LLM_ERR_LEN] = "";
    const gguf_tensor_info *t;
    gb_header(&b, 3, 1, 0), gb_tensor(&b, "blk.7.ffn_up.weight", 14, 1, NE(256), 0);
    gb_align(&b, 32), gb_fill(&b, 210);
    assert_true(open_copy(b.data, b.n, &f, &copy, err));
    assert_int_equal(gguf_tensor_at(f, 0)->bytes, 210);
    assert_false(gguf_require_tensor(f, "blk.7.ffn_up.weight", 256, 0, &t, err, sizeof err));
    assert_string_equal(err, "tensor 'blk.7.ffn_up.weight' has type Q6_K, which is not supported");
    gguf_close(f);
    free(copy);
    gb_free(&b);
}

/* A message stays within its buffer, and is optional. */
static void test_message_buffer(void **state) {
    (void)state;
    gguf_file *f;
    char err[8] = "1234567";
    assert_false(gguf_open_memory("no", 2, &f, err, 4));
    assert_memory_equal(err + 3,
                        "\0"
                        "567",
                        4);
    assert_false(gguf_open_memory("no", 2, &f, NULL, 0));
}

static void test_paths(void **state) {
    (void)state;
    gguf_file *f;
    char err[LLM_ERR_LEN] = "", path[] = "/tmp/test_gguf_XXXXXX";
    assert_false(gguf_open("/no/such/file.gguf", &f, err, sizeof err));
    assert_non_null(strstr(err, "/no/such/file.gguf"));
    assert_false(gguf_open("/tmp", &f, err, sizeof err));
    assert_non_null(strstr(err, "not a regular file"));
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_false(gguf_open(path, &f, err, sizeof err));
    assert_non_null(strstr(err, "empty"));
    gb b = {0};
    build_good(&b, 3);
    assert_int_equal(write(fd, b.data, b.n), b.n);
    close(fd);
    assert_true(gguf_open(path, &f, err, sizeof err));
    check_values(f);
    gguf_close(f);
    unlink(path);
    gb_free(&b);
}

static void test_real_model(void **state) {
    (void)state;
    gguf_file *f;
    char err[LLM_ERR_LEN] = "";
    const gguf_tensor_info *t;
    uint32_t u;
    float x;
    if (access(model_path, R_OK) != 0) {
        print_message("SKIPPED: no model at %s (make model)\n", model_path);
        skip();
    }
    if (!gguf_open(model_path, &f, err, sizeof err)) fail_msg("%s", err);
    assert_int_equal(gguf_tensor_count(f), 272);
    assert_true(gguf_get_u32(f, "llama.block_count", &u, err, sizeof err) && u == 30);
    assert_true(gguf_get_f32(f, "llama.rope.freq_base", &x, err, sizeof err) && x == 100000.0f);
    assert_true(gguf_require_tensor(f, "token_embd.weight", 576, 49152, &t, err, sizeof err));
    assert_int_equal(t->type, GGUF_Q8_0);
    assert_int_equal((uintptr_t)t->data % 32, 0);
    assert_true(gguf_require_tensor(f, "blk.29.ffn_down.weight", 1536, 576, &t, err, sizeof err));
    assert_int_equal(t->type, GGUF_Q4_1);
    assert_int_equal(t->bytes, 1536 / 32 * 20 * 576);
    gguf_close(f);
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_good_file),
        cmocka_unit_test(test_truncated),
        cmocka_unit_test(test_getters_name_the_key),
        cmocka_unit_test(test_hostile),
        cmocka_unit_test(test_unreadable_type_is_named),
        cmocka_unit_test(test_message_buffer),
        cmocka_unit_test(test_paths),
        cmocka_unit_test(test_real_model),
    };
    if (argc > 1) model_path = argv[1];
    return cmocka_run_group_tests(tests, NULL, NULL);
}
