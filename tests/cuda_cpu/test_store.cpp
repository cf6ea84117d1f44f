// kvl_store, kvl_copy, kvl_copy_rows and kvl_read, on the CPU.
// Oracle of the bytes: kvl_tile_encode, which shares no code with the kernels. All of the memory around is compared, too.
#include <cmath>
#include <csetjmp>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>
extern "C" {
#include <cmocka.h>
}
#include "abi.h"
#include "cuda_cpu.h"
#include "kvlite.h"

namespace {

uint64_t random_state = 1;
uint32_t random32() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)(random_state >> 32);
}
uint32_t below(uint32_t n) { return random32() % n; }
float uniform() { return (float)random32() * 0x1p-32f; }
float power(int low, int high) { return std::ldexp(1.0f, low + (int)below((uint32_t)(high - low + 1))); }

// Memory aligned as blocks are, of a byte that nobody writes.
struct Memory {
    explicit Memory(size_t n) : bytes(n + 127) {
        at = bytes.data() + (0 - (uintptr_t)bytes.data()) % 128;
        size = n;
        memset(at, 0xa5, n);
    }
    Memory(const Memory &) = delete;
    Memory &operator=(const Memory &) = delete;
    void copy_of(const Memory &other) { memcpy(at, other.at, size); }
    uint64_t address(size_t offset) const { return (uint64_t)(uintptr_t)(at + offset); }
    std::vector<uint8_t> bytes;
    uint8_t *at;
    size_t size;
};

struct Formats {
    const char *name;
    kvl_format k, v, exact;
};

// A tile's rows as floats; `kind` is what they are made to hit.
enum Kind { NORMAL, MIDPOINTS, CONSTANTS, EXTREMES, BITS, TIES, KINDS };

float any_bits(kvl_format exact) {
    for (;;) {
        uint32_t bits = random32();
        float x;
        memcpy(&x, &bits, 4);
        float limit = exact == KVL_F16 ? 65504.0f : 0x1p110f, least = exact == KVL_F16 ? 0x1p-26f : 0.0f;
        if (std::isfinite(x) && std::fabs(x) <= limit && std::fabs(x) >= least) return x;
        if (exact == KVL_F16) return std::ldexp((float)(below(4096) - 2048.0f), (int)below(30) - 25);
    }
}

// Steps of s, halves of steps, and the extremes that make s the scale: of symmetric codes, of unsigned ones, of e2m1.
float midpoint(uint32_t i, uint32_t group, float s, uint32_t levels) {
    static const float halves[] = {0, .25f, .5f, .75f, 1, 1.25f, 1.5f, 1.75f, 2, 2.5f, 3, 3.5f, 4, 5, 6};
    float sign = below(2) ? 1.0f : -1.0f;
    if (levels == 6) return sign * s * (i % group == 0 ? 6.0f : halves[below(15)]);
    if (levels == 127)
        return sign * s * (i % group == 0 ? 127.0f : (float)below(127) + (below(4) ? 0.5f : 0.0f));
    if (i % group < 2) return i % group ? s * (float)levels : 0.0f;
    return s * ((float)below(levels) + (below(4) ? 0.5f : 0.0f));
}

// Groups of 16 whose squared errors under the two scales of NVFP4 (peaks 6 and 4) are the same numbers in another order:
// which sum is the lesser depends on how each was rounded.
void ties(std::vector<float> &x) {
    for (size_t g = 0; g < x.size(); g += 16) {
        float s = power(-6, 3);
        x[g] = 6 * s;
        x[g + 15] = 0;
        for (size_t i = 1; i < 15; i += 2) {
            float d = uniform() / 8;
            x[g + i] = s * (0.5f + d);
            x[g + i + 1] = s * (0.75f - (x[g + i] / s - 0.5f));
        }
        for (size_t i = 14; i > 1; i--) std::swap(x[g + i], x[g + 1 + below((uint32_t)i)]);
    }
}

std::vector<float> make_rows(Kind kind, kvl_format exact, uint32_t tokens, uint32_t dim) {
    static const float extremes[] = {65504,     -65504,   0x1p-24f, -0x1p-24f, 0x1.ff8p-15f, 0x1p-14f,
                                     -65472.0f, 32768.0f, 0.0f,     -0.0f,     1.0f,         1.0009765625f};
    static const uint32_t levels[] = {6, 15, 127, 255};
    std::vector<float> x(tokens * dim), channel(dim);
    for (float &c : channel) c = power(-3, 3);
    bool by_channel = below(2), mixed_zeros = below(2);
    uint32_t level = levels[below(4)], by_tile = below(12);
    for (uint32_t t = 0; t < tokens; t++) {
        float row = power(-12, 9), step = (float)(1 + below(4)) * power(-12, 3),
              constant = uniform() * power(-20, 14);
        uint32_t style = below(4);
        for (uint32_t e = 0; e < dim; e++) {
            float &v = x[t * dim + e], s = by_channel ? channel[e] : step;
            if (kind == NORMAL) v = (uniform() + uniform() + uniform() + uniform() - 2.0f) * row * channel[e];
            if (kind == MIDPOINTS)
                v = midpoint(by_channel ? t : e, level == 6 ? 16 : by_channel ? tokens : dim, s, level);
            if (kind == CONSTANTS && style == 0) v = mixed_zeros && below(2) ? -0.0f : 0.0f;
            if (kind == CONSTANTS && style == 1) v = below(2) ? -0.0f : 0.0f;
            if (kind == CONSTANTS && style == 2) v = constant;
            if (kind == CONSTANTS && style == 3) v = e == by_tile ? -constant : constant;
            if (kind == EXTREMES) v = extremes[style ? below(12) : by_tile];
            if (kind == BITS) v = any_bits(exact);
        }
    }
    if (kind == TIES) ties(x);
    return x;
}

std::vector<uint8_t> encode(kvl_format f, uint32_t tokens, uint32_t dim, float global,
                            const std::vector<float> &rows) {
    std::vector<uint8_t> tile(kvl_tile_bytes(f, tokens, dim));
    assert_int_equal(kvl_tile_encode(f, tokens, dim, global, rows.data(), tile.data()), KVL_OK);
    return tile;
}

std::vector<float> rounded(kvl_format f, uint32_t tokens, uint32_t dim, const std::vector<float> &rows) {
    std::vector<float> out(rows.size());
    std::vector<uint8_t> tile = encode(f, tokens, dim, 0, rows);
    assert_int_equal(kvl_tile_decode(f, tokens, dim, 0, tile.data(), false, out.data()), KVL_OK);
    return out;
}

size_t number_bytes(kvl_format f) { return f == KVL_F32 ? 4 : 2; }

constexpr uint32_t HEADS = 2, STORES = 4, SPANS = STORES, MAX_TOKENS = 64;

// One launch: a whole block; the end of a block and its seal; rows inside of one; one row into a scratch slot and no seal.
struct Test {
    Formats formats;
    uint32_t tokens, dim;
    kvl_format dtype;
    uint32_t misaligned; // elements
    float global[2];
    kvli_cu_pages pages;
    kvli_gpu_store stores[STORES];
    uint32_t rows = 0;
    size_t block_bytes[2], tile[2][2]; // by class, by side

    void layout() {
        uint64_t layer = 128 * (1 + below(4));
        for (int packed = 1; packed >= 0; packed--) {
            int cls = packed ? 0 : 1;
            for (int side = 0; side < 2; side++) {
                kvl_format f = cls ? formats.exact : side ? formats.v : formats.k;
                tile[cls][side] = kvl_tile_bytes(f, tokens, dim);
            }
            pages.offset[cls] = layer;
            pages.v_offset[cls] = tile[cls][0];
            pages.head_stride[cls] = tile[cls][0] + tile[cls][1];
            block_bytes[cls] = layer + HEADS * pages.head_stride[cls] + 128;
        }
    }

    void plan(const Memory &exact, const Memory &packed) {
        uint32_t inside = 1 + below(tokens - 2);
        uint32_t at[STORES] = {0, inside, 2, tokens - 1}, n[STORES] = {tokens, tokens - inside, 3, 1};
        bool sealed[STORES] = {true, true, false, false};
        for (uint32_t i = 0; i < STORES; i++) {
            uint64_t flags = KVLI_GPU_EXACT | (i % 2 ? (uint64_t)KVLI_GPU_SCRATCH : 0);
            stores[i].exact = exact.address(i * block_bytes[1]) | flags;
            stores[i].sealed = sealed[i] ? packed.address(i * block_bytes[0]) : 0;
            stores[i].span = STORES - 1 - i;
            stores[i].row = rows;
            stores[i].n_rows = n[i];
            stores[i].at = at[i];
            rows += n[i] + below(3);
        }
    }
};

size_t exact_tile_at(const Test &t, uint32_t store, uint32_t head, int side) {
    return store * t.block_bytes[1] + (store % 2 ? 0 : t.pages.offset[1]) + head * t.pages.head_stride[1] +
           (side ? t.pages.v_offset[1] : 0);
}

// k or v as the caller has it, in memory between bytes that make NaN.
struct Input {
    std::vector<uint8_t> bytes;
    kvli_cu_tensor tensor;
    Input(const Test &t, bool wide) : bytes((t.rows + 1) * HEADS * (t.dim + 40) * 4 + 64, 0xff), tensor() {
        size_t size = number_bytes(t.dtype);
        uint64_t start = ((uint64_t)(uintptr_t)bytes.data() + 15) / 16 * 16 + t.misaligned * size;
        tensor.data = start;
        tensor.head_stride = t.dim + (wide ? 16 : 0);
        tensor.row_stride = HEADS * tensor.head_stride + (wide ? 8 : 0) + (t.misaligned > 1 ? 1 : 0);
        tensor.dtype = t.dtype - KVL_F32;
    }
    void put(const Test &t, uint32_t row, uint32_t head, const uint8_t *numbers) {
        size_t size = number_bytes(t.dtype);
        uint8_t *p =
            (uint8_t *)(uintptr_t)tensor.data + (row * tensor.row_stride + head * tensor.head_stride) * size;
        memcpy(p, numbers, t.dim * size);
    }
};

uint32_t first_difference(const Memory &a, const Memory &b) {
    uint32_t i = 0;
    while (i < a.size && a.at[i] == b.at[i]) i++;
    return i;
}

void compare(const Test &t, Kind kind, const char *what, const Memory &got, const Memory &want,
             size_t block) {
    if (memcmp(got.at, want.at, want.size) == 0) return;
    uint32_t i = first_difference(got, want);
    fail_msg("%s kind %d, %u tokens of %u, dtype %u + %u: %s, block %zu, byte %zu: %02x, not %02x",
             t.formats.name, kind, t.tokens, t.dim, t.dtype, t.misaligned, what, i / block, i % block,
             got.at[i], want.at[i]);
}

void launch_store(const Test &t, const Input &k, const Input &v, uint32_t *taint) {
    kvli_gpu_counts counts = {};
    counts.stores = STORES;
    kvli_cu_store_args args = {};
    args.counts = &counts;
    args.stores = t.stores;
    args.taint = taint;
    args.k = k.tensor;
    args.v = v.tensor;
    args.pages = t.pages;
    args.block_tokens = t.tokens;
    args.k_dim = args.v_dim = t.dim;
    args.exact = t.formats.exact;
    args.k_format = t.formats.k & ~(kvl_format)KVL_ROTATED;
    args.v_format = t.formats.v & ~(kvl_format)KVL_ROTATED;
    args.k_rotated = args.k_format != t.formats.k;
    args.v_rotated = args.v_format != t.formats.v;
    args.k_global = t.global[0];
    args.v_global = t.global[1];
    cuda_cpu::settings.seed = random32() | 1;
    assert_true(cuda_cpu::launch("kvl_store", dim3(STORES + 1, HEADS, 2), dim3(KVLI_CU_STORE_THREADS),
                                 KVLI_CU_STORE_SMEM, &args)); // a grid padded by one store
}

// What the CPU makes of one tile: its rows in the input, in the exact tile as before and after, and sealed.
void expect_tile(const Test &t, Kind kind, uint32_t store, uint32_t head, int side, Input &in,
                 Memory &exact_before, Memory &exact_after, Memory &packed_after) {
    const kvli_gpu_store &s = t.stores[store];
    kvl_format exact = t.formats.exact;
    kvl_format narrow = t.dtype == KVL_F16 || exact == KVL_F16 ? (kvl_format)KVL_F16 : exact;
    std::vector<float> rows = rounded(t.dtype, t.tokens, t.dim, make_rows(kind, narrow, t.tokens, t.dim));
    if (narrow == KVL_F16) { // bfloat16 near the largest half would round beyond it
        for (float &x : rows) x = std::fabs(x) > 65504.0f ? std::copysign(65024.0f, x) : x;
    }
    std::vector<uint8_t> numbers = encode(t.dtype, t.tokens, t.dim, 0, rows),
                         tile = encode(exact, t.tokens, t.dim, 0, rows);
    size_t in_row = t.dim * number_bytes(t.dtype), row = t.dim * number_bytes(exact),
           at = exact_tile_at(t, store, head, side);
    for (uint32_t r = 0; r < s.n_rows; r++) in.put(t, s.row + r, head, &numbers[(s.at + r) * in_row]);
    if (s.sealed) memcpy(exact_before.at + at, tile.data(), s.at * row); // rows of earlier steps
    memcpy(exact_after.at + at, exact_before.at + at, s.at * row);
    memcpy(exact_after.at + at + s.at * row, &tile[s.at * row], s.n_rows * row);
    if (!s.sealed) return;
    std::vector<float> stored = rounded(exact, t.tokens, t.dim, rows);
    std::vector<uint8_t> sealed =
        encode(side ? t.formats.v : t.formats.k, t.tokens, t.dim, t.global[side], stored);
    memcpy(packed_after.at + store * t.block_bytes[0] + t.pages.offset[0] + head * t.pages.head_stride[0] +
               (side ? t.pages.v_offset[0] : 0),
           sealed.data(), sealed.size());
}

void run_store(const Formats &formats, uint32_t tokens, uint32_t dim, Kind kind) {
    static const float globals[] = {1.0f / 16, 0.02f, 1.0f, 3.7f, 0x1p-8f};
    Test t = {};
    t.formats = formats;
    t.tokens = tokens;
    t.dim = dim;
    t.dtype = (kvl_format)(KVL_F32 + below(3));
    t.misaligned = below(3);
    for (float &g : t.global) g = globals[below(5)];
    t.layout();
    Memory exact(STORES * t.block_bytes[1]), packed(STORES * t.block_bytes[0]);
    t.plan(exact, packed);
    Input k(t, below(2)), v(t, below(2));
    Memory exact_after(exact.size), packed_after(packed.size);
    for (uint32_t i = 0; i < STORES; i++) {
        for (uint32_t h = 0; h < HEADS; h++) {
            expect_tile(t, kind, i, h, 0, k, exact, exact_after, packed_after);
            expect_tile(t, kind, i, h, 1, v, exact, exact_after, packed_after);
        }
    }
    uint32_t taint[SPANS] = {};
    launch_store(t, k, v, taint);
    compare(t, kind, "exact", exact, exact_after, t.block_bytes[1]);
    compare(t, kind, "packed", packed, packed_after, t.block_bytes[0]);
    for (uint32_t flag : taint) assert_int_equal(flag, 0);
}

const uint32_t all_dims[] = {64, 80, 96, 128, 192, 256}, all_tokens[] = {16, 32, 64};

bool is_channel(kvl_format f) { return f == KVL_INT8_CHANNEL || f == KVL_INT4_CHANNEL; }

void run_shapes(const Formats &formats, int repeat) {
    for (uint32_t dim : all_dims) {
        for (uint32_t tokens : all_tokens) {
            if (is_channel(formats.k) && tokens < 32) continue;
            for (int kind = 0; kind < KINDS * repeat; kind++)
                run_store(formats, tokens, dim, (Kind)(kind % KINDS));
        }
    }
}

void test_presets(void **) {
    uint32_t n;
    const kvl_preset *presets = kvl_presets(&n);
    random_state = 12345;
    for (uint32_t i = 0; i < n; i++)
        run_shapes({presets[i].name, presets[i].k, presets[i].v, presets[i].exact}, 1);
}

void test_other_pairs(void **) {
    const kvl_format rotated = KVL_ROTATED;
    const Formats others[] = {
        {"int8+rot / fp8+rot of f32", KVL_INT8 | rotated, KVL_FP8_E4M3 | rotated, KVL_F32},
        {"nvfp4 / int4 of bf16", KVL_NVFP4, KVL_INT4, KVL_BF16},
        {"nvfp4+rot / nvfp4 of f32", KVL_NVFP4 | rotated, KVL_NVFP4, KVL_F32},
        {"int4_channel / int8 of f32", KVL_INT4_CHANNEL, KVL_INT8, KVL_F32},
        {"int8_channel / f16 of bf16", KVL_INT8_CHANNEL, KVL_F16, KVL_BF16},
        {"f16 / int4+rot of f16", KVL_F16, KVL_INT4 | rotated, KVL_F16},
    };
    random_state = 999;
    for (const Formats &f : others) run_shapes(f, 1);
}

// A number that is not finite after rounding taints its span and no other; it is stored as it is.
void test_taint(void **) {
    const float bad[] = {INFINITY, -INFINITY, NAN, 65520.0f, -1e30f, 3.4e38f};
    random_state = 77;
    for (uint32_t round = 0; round < 120; round++) {
        const kvl_format exacts[] = {KVL_F32, KVL_F16, KVL_BF16};
        Test t = {};
        t.formats = {"taint", KVL_INT8, KVL_INT8, exacts[round % 3]};
        t.tokens = 16, t.dim = all_dims[below(6)];
        t.dtype = (kvl_format)(KVL_F32 + below(3));
        t.misaligned = below(2);
        t.layout();
        Memory exact(STORES * t.block_bytes[1]), packed(STORES * t.block_bytes[0]);
        t.plan(exact, packed);
        Input k(t, false), v(t, false);
        std::vector<float> one(16 * t.dim, 1.0f);
        for (uint32_t r = 0; r < t.rows; r++) {
            for (uint32_t h = 0; h < HEADS; h++) {
                k.put(t, r, h, encode(t.dtype, 16, t.dim, 0, one).data());
                v.put(t, r, h, encode(t.dtype, 16, t.dim, 0, one).data());
            }
        }
        uint32_t store = below(STORES), row = below(t.stores[store].n_rows), e = below(t.dim),
                 head = below(HEADS);
        bool of_v = below(2);
        one[e] = bad[below(6)];
        float stored = rounded(t.formats.exact, 16, t.dim, rounded(t.dtype, 16, t.dim, one))[e];
        (of_v ? v : k).put(t, t.stores[store].row + row, head, encode(t.dtype, 16, t.dim, 0, one).data());
        uint32_t taint[SPANS] = {};
        launch_store(t, k, v, taint);
        for (uint32_t s = 0; s < SPANS; s++)
            assert_int_equal(taint[s], s == t.stores[store].span && !std::isfinite(stored));
        size_t size = number_bytes(t.formats.exact);
        const uint8_t *p =
            exact.at + exact_tile_at(t, store, head, of_v) + ((t.stores[store].at + row) * t.dim + e) * size;
        std::vector<uint8_t> tile(kvl_tile_bytes(t.formats.exact, 16, t.dim));
        std::vector<float> back(16 * t.dim);
        memcpy(tile.data(), p, size);
        assert_int_equal(kvl_tile_decode(t.formats.exact, 16, t.dim, 0, tile.data(), false, back.data()),
                         KVL_OK);
        assert_true(std::isnan(stored) ? std::isnan(back[0]) : back[0] == stored);
    }
}

void fill(Memory &m) {
    for (size_t i = 0; i < m.size; i++) m.at[i] = (uint8_t)random32();
}

void test_copy(void **) {
    random_state = 5;
    for (uint32_t round = 0; round < 40; round++) {
        const uint32_t n = 5, room = 48 * 1024;
        Memory from(n * room), to(n * room), want(n * room);
        fill(from);
        kvli_gpu_copy copies[n];
        kvli_gpu_counts counts = {};
        kvli_cu_copy_args args = {};
        uint32_t used = 1 + below(n);
        for (uint32_t i = 0; i < n; i++) {
            uint32_t bytes = 16 * below(round % 2 ? 40 : room / 16 - 8), in = 16 * below(8),
                     out = 16 * below(8);
            copies[i] = {to.address(i * room + out), from.address((n - 1 - i) * room + in), bytes};
            if (i < used) memcpy(want.at + i * room + out, from.at + (n - 1 - i) * room + in, bytes);
        }
        counts.copies = used;
        args.copies = copies;
        args.counts = round % 3 ? &counts : nullptr;
        args.n_copies = used;
        cuda_cpu::settings.seed = random32() | 1;
        assert_true(
            cuda_cpu::launch("kvl_copy", dim3(n, 1 + below(4)), dim3(KVLI_CU_COPY_THREADS), 0, &args));
        assert_memory_equal(to.at, want.at, to.size);
    }
}

void test_copy_rows(void **) {
    random_state = 6;
    for (uint32_t round = 0; round < 30; round++) {
        const uint32_t n = 3, tiles = 6, tokens = all_tokens[below(3)];
        kvli_cu_row_copy_args args = {};
        for (int side = 0; side < 2; side++) {
            args.row_bytes[side] = all_dims[below(6)] * (below(2) ? 2 : 4);
            args.tile_bytes[side] = args.row_bytes[side] * tokens;
        }
        size_t block = (args.tile_bytes[0] + args.tile_bytes[1]) * tiles / 2;
        Memory from(n * block), to(n * block), want(n * block);
        fill(from);
        kvli_cu_row_copy copies[n];
        for (uint32_t i = 0; i < n; i++) {
            copies[i] = {to.address(i * block), from.address((n - 1 - i) * block), below(tokens + 1), 0};
            size_t at = 0;
            for (uint32_t tile = 0; tile < tiles; at += args.tile_bytes[tile++ % 2])
                memcpy(want.at + i * block + at, from.at + (n - 1 - i) * block + at,
                       (size_t)copies[i].n_rows * args.row_bytes[tile % 2]);
        }
        args.copies = copies;
        args.n_copies = n;
        args.n_tiles = tiles;
        cuda_cpu::settings.seed = random32() | 1;
        assert_true(cuda_cpu::launch("kvl_copy_rows", dim3(n, tiles), dim3(KVLI_CU_COPY_THREADS), 0, &args));
        assert_memory_equal(to.at, want.at, to.size);
    }
}

void test_read(void **) {
    random_state = 8;
    for (uint32_t round = 0; round < 20; round++) {
        Memory from(16 * (round ? 1 + below(40000) : 1));
        fill(from);
        uint32_t want = 0, sum = 0;
        for (size_t i = 0; i < from.size; i += 4) {
            uint32_t word;
            memcpy(&word, from.at + i, 4);
            want += word;
        }
        kvli_cu_read_args args = {from.address(0), from.size, &sum};
        assert_true(cuda_cpu::launch("kvl_read", dim3(1 + below(5)), dim3(KVLI_CU_COPY_THREADS), 0, &args));
        assert_int_equal(sum, want);
    }
}

} // namespace

int main() {
    const CMUnitTest tests[] = {
        cmocka_unit_test(test_presets), cmocka_unit_test(test_other_pairs), cmocka_unit_test(test_taint),
        cmocka_unit_test(test_copy),    cmocka_unit_test(test_copy_rows),   cmocka_unit_test(test_read),
    };
    return cmocka_run_group_tests(tests, nullptr, nullptr);
}
