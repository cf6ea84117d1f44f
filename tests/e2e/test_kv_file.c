/* Geometry overrides as files: what is read is what stands there, and what is wrong is named with its line. */
#include "llm/kv_file.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

enum { N_LAYERS = 30 };

static char path[] = "/tmp/kv_file_XXXXXX";

static void write_bytes(const char *text, size_t n) {
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(text, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

static void write_text(const char *text) { write_bytes(text, strlen(text)); }

static void read_fails(const char *why) {
    char err[LLM_ERR_LEN] = "";
    kv_file f;
    assert_false(kv_file_read(path, N_LAYERS, &f, err, sizeof err));
    assert_null(f.layers);
    if (!strstr(err, path) || !strstr(err, why)) fail_msg("'%s' is not in '%s'", why, err);
}

static void test_every_statement(void **state) {
    (void)state;
    kv_file f;
    write_text("# of a model\n\npreset int4 # the rest\r\n  sink_blocks\t2\nblock_tokens 64\n"
               "layer 29 v=int8\nlayer 0 v=int4+rot k=int8_channel\nlayer 7 k=f16");
    assert_true(kv_file_read(path, N_LAYERS, &f, NULL, 0));
    assert_string_equal(f.preset, "int4");
    assert_int_equal(f.sink_blocks, 2);
    assert_int_equal(f.block_tokens, 64);
    for (uint32_t l = 0; l < N_LAYERS; l++) {
        assert_int_equal(f.layers[l].k_format, l == 0 ? KVL_INT8_CHANNEL : l == 7 ? KVL_F16 : 0);
        assert_int_equal(f.layers[l].v_format, l == 0 ? (KVL_INT4 | KVL_ROTATED) : l == 29 ? KVL_INT8 : 0);
    }
    kv_file_free(&f);
    assert_null(f.layers);
    write_text("");
    assert_true(kv_file_read(path, N_LAYERS, &f, NULL, 0));
    assert_null(f.preset);
    assert_int_equal(f.sink_blocks, 0);
    kv_file_free(&f);
    write_text("sink_blocks 0");
    assert_true(kv_file_read(path, N_LAYERS, &f, NULL, 0));
    assert_int_equal(f.sink_blocks, KVL_NONE);
    kv_file_free(&f);
}

static void test_wrong_lines(void **state) {
    (void)state;
    static const struct {
        const char *text, *why;
    } wrong[] = {
        {"preset int4\nlayer 30 k=int8\n", ":2: layer 30: the model has 30 layers"},
        {"\n\nlayer 4294967296 k=int8\n", ":3: '4294967296' is not a whole number"},
        {"layer -1 k=int8\n", ":1: '-1'"},
        {"layer one k=int8\n", ":1: 'one'"},
        {"layer 1x k=int8\n", ":1: '1x'"},
        {"layer 1\n", ":1: expected: layer N"},
        {"layer\n", ":1: expected: layer N"},
        {"layer 1 k=int3\n", ":1: 'int3' is no format"},
        {"layer 1 k=\n", ":1: '' is no format"},
        {"layer 1 q=int8\n", ":1: 'q=int8'"},
        {"layer 1 k=int8 k=int8\n", ":1: k= stands twice"},
        {"layer 1 v=int4_channel\n", ":1: int4_channel is for keys only"},
        {"layer 1 k=int8\nlayer 1 v=int8\n", ":2: layer 1 stands twice"},
        {"preset int3\n", ":1: 'int3' is no preset"},
        {"preset\n", ":1: 'preset': expected"},
        {"preset int4 int8\n", ":1: 'preset': expected"},
        {"preset int4\n# again\npreset int4\n", ":3: preset stands twice"},
        {"sink_blocks 1\nsink_blocks 1\n", ":2: sink_blocks stands twice"},
        {"sink_blocks 99999999\n", ":1: '99999999'"},
        {"block_tokens 33\n", ":1: block_tokens 33"},
        {"block_tokens 0\n", ":1: block_tokens 0"},
        {"GGUF\x03\n", ":1: 'GGUF"},
        {"layer 1 k=int8 v=int8 a b c d e f\n", ":1: more than 8 words"},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        write_text(wrong[i].text);
        read_fails(wrong[i].why);
    }
}

static void test_hostile_bytes(void **state) {
    (void)state;
    char line[400];
    memset(line, 'x', sizeof line);
    write_bytes(line, sizeof line);
    read_fails(":1: the line is longer than 256 bytes");
    memset(line, ' ', sizeof line);
    line[256] = '\n';
    write_bytes(line, sizeof line / 2);
    kv_file f;
    assert_true(kv_file_read(path, N_LAYERS, &f, NULL, 0));
    kv_file_free(&f);
    write_bytes("preset int8\nlayer 1\0 k=int8\n", 28);
    read_fails(":2: there is a zero byte");
    uint64_t random = 1;
    for (uint32_t i = 0; i < 2000; i++) { /* nothing but an error or a sane file comes of any bytes */
        static const char *const words[] = {"layer", "preset",      "int4", " ",  "\n",   "=",
                                            "k=",    "sink_blocks", "0",    "29", "int8", "\xff"};
        char text[256];
        size_t n = 0;
        while (n < 200) {
            random = random * 6364136223846793005u + 1442695040888963407u;
            const char *word = words[(random >> 33) % 12];
            memcpy(text + n, word, strlen(word));
            n += strlen(word);
        }
        write_bytes(text, n);
        char err[LLM_ERR_LEN] = "";
        if (kv_file_read(path, N_LAYERS, &f, err, sizeof err))
            kv_file_free(&f);
        else
            assert_non_null(strstr(err, path));
    }
}

static void test_files_that_are_not_there(void **state) {
    (void)state;
    char err[LLM_ERR_LEN] = "";
    kv_file f;
    assert_false(kv_file_read("/nonexistent/kv", N_LAYERS, &f, err, sizeof err));
    assert_non_null(strstr(err, "/nonexistent/kv"));
    assert_false(kv_file_read("/tmp", N_LAYERS, &f, err, sizeof err));
    assert_non_null(strstr(err, "/tmp"));
    assert_false(kv_file_write("/nonexistent/kv", &(kv_file){0}, N_LAYERS, NULL, err, sizeof err));
    assert_non_null(strstr(err, "/nonexistent/kv"));
}

static void test_written_is_read(void **state) {
    (void)state;
    kvl_layer layers[N_LAYERS] = {{0}};
    for (uint32_t l = 0; l < N_LAYERS; l++) {
        layers[l].k_format = KVL_F32 + l % (KVL_FORMAT_COUNT - 1);
        if (l % 3) layers[l].v_format = l % 2 ? KVL_INT4 | KVL_ROTATED : KVL_FP8_E4M3;
    }
    const kv_file out = {.preset = "nvfp4", .sink_blocks = KVL_NONE, .block_tokens = 64, .layers = layers};
    kv_file in;
    assert_true(kv_file_write(path, &out, N_LAYERS, "layer 0 k=int8", NULL, 0));
    assert_true(kv_file_read(path, N_LAYERS, &in, NULL, 0));
    assert_string_equal(in.preset, "nvfp4");
    assert_int_equal(in.sink_blocks, KVL_NONE);
    assert_int_equal(in.block_tokens, 64);
    assert_memory_equal(in.layers, layers, sizeof layers);
    kv_file_free(&in);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_statement), cmocka_unit_test(test_wrong_lines),
        cmocka_unit_test(test_hostile_bytes), cmocka_unit_test(test_files_that_are_not_there),
        cmocka_unit_test(test_written_is_read)};
    int fd = mkstemp(path);
    if (fd < 0) return 1;
    close(fd);
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    unlink(path);
    return failed;
}
