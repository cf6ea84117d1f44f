// One sequence with random pages, for tests of attention kernels of every GPU backend (C++), beside a double-precision reference
// that reads the same bytes by the format specification alone.
//
// Packed and exact tiles of a block hold unrelated numbers, so that reading the wrong class shows. What no kernel may touch is
// poisoned: rows that were not written are NaN, entries of blocks that nobody sees are 0 or addresses of nothing, and so is
// everything around the output's rows.
#ifndef KVL_TESTS_ATTEND_CASE_H
#define KVL_TESTS_ATTEND_CASE_H
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>
#include "../../kernels_cuda/tables.h"

namespace attend {

struct Preset {
    const char *name;
    uint32_t k, v, exact;
    bool k_rotated, v_rotated;
    double tolerance; // of the largest sum of weight x |value|
};
static const Preset presets[] = {
    {"f16", KVLI_GPU_F16, KVLI_GPU_F16, KVLI_GPU_F16, false, false, 1.5e-3},
    {"bf16", KVLI_GPU_BF16, KVLI_GPU_BF16, KVLI_GPU_BF16, false, false, 1.2e-2},
    {"int8", KVLI_GPU_INT8, KVLI_GPU_INT8, KVLI_GPU_F16, false, false, 1.5e-3},
    {"int8c", KVLI_GPU_INT8_CHANNEL, KVLI_GPU_INT8, KVLI_GPU_F16, false, false, 1.5e-3},
    {"fp8", KVLI_GPU_FP8_E4M3, KVLI_GPU_FP8_E4M3, KVLI_GPU_F16, false, false, 1.5e-3},
    {"nvfp4", KVLI_GPU_NVFP4, KVLI_GPU_NVFP4, KVLI_GPU_F16, true, false, 1.5e-3},
    {"balanced", KVLI_GPU_INT8, KVLI_GPU_INT4, KVLI_GPU_F16, false, true, 1.5e-3},
    {"int4", KVLI_GPU_INT4_CHANNEL, KVLI_GPU_INT4, KVLI_GPU_F16, false, true, 1.5e-3},
};
static const Preset preset_f32 = {"f32", KVLI_GPU_F32, KVLI_GPU_F32, KVLI_GPU_F32, false, false, 2e-5};

struct Case {
    const Preset *preset = &presets[0];
    uint32_t dim = 64, gqa = 4, kv_heads = 2, block_tokens = 32;
    uint32_t position = 100, rows = 1; // query rows are positions position.. of the sequence
    uint32_t window = 0, sink_tokens = 0;
    float softcap = 0;
    bool sink_logits = false, scratch = false;
    uint32_t apart = 1;        // elements between what q and out must have
    uint32_t item_rows = 8;    // packed rows of an item
    uint32_t split_blocks = 0; // blocks of an item; 0: not split
    uint32_t stages = 2;       // CUDA
    uint32_t q_dtype = KVLI_GPU_DTYPE_F32, out_dtype = KVLI_GPU_DTYPE_F32;
    float q_size = 1;   // standard deviation of q
    bool small = false; // packed numbers are of codes and scales that are subnormal
    unsigned seed = 1;
    std::string text() const {
        char s[400];
        snprintf(s, sizeof s,
                 "%s dim %u gqa %u block %u position %u rows %u window %u sinks %u softcap %g logits %d "
                 "scratch %d items of %u rows, %u "
                 "blocks, stages %u, q %u out %u",
                 preset->name, dim, gqa, block_tokens, position, rows, window, sink_tokens, softcap,
                 sink_logits, scratch, item_rows, split_blocks, stages, q_dtype, out_dtype);
        return s;
    }
};

// ---- numbers ----

// Values of codes with `mantissa` bits below an exponent of that bias, worked out once: references read millions.
template <int BITS, int MANTISSA, int BIAS> struct Values {
    double of[1 << BITS];
    Values() {
        for (int code = 0; code < 1 << BITS; code++) {
            int e = (code & ((1 << (BITS - 1)) - 1)) >> MANTISSA, m = code & ((1 << MANTISSA) - 1),
                one = 1 << MANTISSA;
            double a = e ? std::ldexp(one + m, e - BIAS - MANTISSA) : std::ldexp(m, 1 - BIAS - MANTISSA);
            if (BITS == 16 && e == 31) a = m ? NAN : INFINITY;
            of[code] = code >> (BITS - 1) ? -a : a;
        }
    }
};
static const Values<16, 10, 15> f16_values;
static const Values<8, 3, 7> e4m3_values;

static double f16_value(uint16_t h) { return f16_values.of[h]; }
static double e4m3_value(uint8_t b) { return e4m3_values.of[b]; }
static double bf16_value(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static uint16_t f16_bits(double x) { // rounded towards zero, which is as good as any for random numbers
    if (x == 0) return 0;
    int e = std::ilogb(x);
    uint16_t sign = x < 0 ? 0x8000 : 0;
    if (e < -14) return (uint16_t)(sign | (uint16_t)std::ldexp(std::fabs(x), 24));
    return (uint16_t)(sign | (e + 15) << 10 | ((uint16_t)std::ldexp(std::fabs(x), 10 - e) & 1023));
}
static uint16_t bf16_bits(double x) {
    float f = (float)x;
    uint32_t u;
    memcpy(&u, &f, 4);
    return (uint16_t)(u >> 16);
}
static double e2m1_value(unsigned n) {
    static const double magnitude[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    return n & 8 ? -magnitude[n & 7] : magnitude[n & 7];
}

static double dtype_value(uint32_t dtype, const uint8_t *p) {
    float f;
    uint16_t h;
    if (dtype == KVLI_GPU_DTYPE_F32) {
        memcpy(&f, p, 4);
        return f;
    }
    memcpy(&h, p, 2);
    return dtype == KVLI_GPU_DTYPE_F16 ? f16_value(h) : bf16_value(h);
}
static size_t dtype_size(uint32_t dtype) { return dtype == KVLI_GPU_DTYPE_F32 ? 4 : 2; }

static void rotate(double *x, uint32_t dim) {
    uint32_t n = 1;
    while (n < 128 && dim % (2 * n) == 0) n *= 2;
    for (uint32_t stride = 1; stride < n; stride *= 2) {
        for (uint32_t i = 0; i < dim; i++) {
            if (i & stride) continue;
            double a = x[i], b = x[i + stride];
            x[i] = a + b, x[i + stride] = a - b;
        }
    }
    for (uint32_t i = 0; i < dim; i++) x[i] /= std::sqrt((double)n);
}

// ---- tiles ----

typedef std::mt19937 Random;
static double normal(Random &r) { // nearly: a sum of four, of variance 1
    double sum = (double)r() + r() + r() + r();
    return (sum * 0x1p-32 - 2) * std::sqrt(3.0);
}

struct Side { // of a block class: K or V
    uint32_t format;
    bool rotated;
    float global;
};

static uint32_t row_bytes(uint32_t f, uint32_t dim) {
    switch (f) {
    case KVLI_GPU_F32: return 4 * dim;
    case KVLI_GPU_F16:
    case KVLI_GPU_BF16: return 2 * dim;
    case KVLI_GPU_INT8:
    case KVLI_GPU_INT8_CHANNEL:
    case KVLI_GPU_FP8_E4M3: return dim;
    default: return dim / 2;
    }
}
static uint32_t scale_bytes(uint32_t f, uint32_t dim, uint32_t tokens) {
    switch (f) {
    case KVLI_GPU_INT8:
    case KVLI_GPU_FP8_E4M3: return 2 * tokens;
    case KVLI_GPU_NVFP4: return tokens * (dim / 16);
    case KVLI_GPU_INT4: return tokens * ((dim + 63) / 64) * 4;
    case KVLI_GPU_INT8_CHANNEL:
    case KVLI_GPU_INT4_CHANNEL: return 4 * dim;
    default: return 0;
    }
}
static uint32_t tile_bytes(uint32_t f, uint32_t dim, uint32_t tokens) {
    return (tokens * row_bytes(f, dim) + scale_bytes(f, dim, tokens) + 127) / 128 * 128;
}

static void put16(uint8_t *p, uint16_t h) { memcpy(p, &h, 2); }
static uint16_t get16(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return h;
}

// Subnormal codes (FP8) or scales (all others), yet numbers that are large enough to be missed.
static void fill_small_tile(Random &r, uint32_t f, uint32_t dim, uint32_t tokens, uint8_t *tile) {
    uint32_t rows = tokens * row_bytes(f, dim), bytes = rows + scale_bytes(f, dim, tokens);
    for (uint32_t i = 0; i < rows; i++) {
        tile[i] = (uint8_t)r();
        if (f == KVLI_GPU_FP8_E4M3) tile[i] &= 0x87;
        if (f == KVLI_GPU_INT8 && tile[i] == 128) tile[i] = 127;
    }
    for (uint32_t i = rows; i < bytes; i += f == KVLI_GPU_NVFP4 ? 1 : 2) {
        if (f == KVLI_GPU_NVFP4)
            tile[i] = (uint8_t)(1 + r() % 7);
        else
            put16(tile + i, f == KVLI_GPU_FP8_E4M3 ? f16_bits(r() % 64) : (uint16_t)(1 + r() % 1023));
    }
}

// Random numbers of about unit size.
static void fill_tile(Random &r, uint32_t f, uint32_t dim, uint32_t tokens, uint8_t *tile) {
    uint32_t rows = tokens * row_bytes(f, dim), bytes = rows + scale_bytes(f, dim, tokens);
    std::uniform_real_distribution<double> around(0.6, 1.4);
    if (f == KVLI_GPU_F32) {
        for (uint32_t i = 0; i < rows; i += 4) {
            float x = (float)normal(r);
            memcpy(tile + i, &x, 4);
        }
        return;
    }
    if (f == KVLI_GPU_F16 || f == KVLI_GPU_BF16) {
        for (uint32_t i = 0; i < rows; i += 2)
            put16(tile + i, f == KVLI_GPU_F16 ? f16_bits(normal(r)) : bf16_bits(normal(r)));
        return;
    }
    for (uint32_t i = 0; i < rows; i++) {
        tile[i] = (uint8_t)r();
        if (f == KVLI_GPU_INT8 && tile[i] == 128) tile[i] = 127;
        if (f == KVLI_GPU_FP8_E4M3) tile[i] = (uint8_t)((tile[i] & 0x80) | (0x40 + r() % 0x3e)); // 2..416
    }
    for (uint32_t i = rows; i < bytes; i += f == KVLI_GPU_NVFP4 ? 1 : 2) {
        uint32_t n = (i - rows) / 2;
        bool zero = f == KVLI_GPU_INT4 ? n % 2 : f != KVLI_GPU_INT8 && f != KVLI_GPU_FP8_E4M3 && n >= dim;
        double step = f == KVLI_GPU_INT8 || f == KVLI_GPU_INT8_CHANNEL ? 1 / 70.0
                      : f == KVLI_GPU_FP8_E4M3                         ? 1 / 100.0
                                                                       : 1 / 4.5;
        if (f == KVLI_GPU_NVFP4)
            tile[i] = (uint8_t)(0x38 + r() % 14); // 1..3.5, with a global of 1/8
        else if (zero)
            put16(tile + i, f16_bits(-1.7 * around(r)));
        else
            put16(tile + i, f16_bits(step * around(r)));
    }
}

static double tile_number(const Side &s, uint32_t dim, uint32_t tokens, const uint8_t *tile, uint32_t token,
                          uint32_t e) {
    const uint8_t *row = tile + token * row_bytes(s.format, dim),
                  *scales = tile + tokens * row_bytes(s.format, dim);
    unsigned nibble = row[e / 2] >> (4 * (e & 1)) & 15;
    switch (s.format) {
    case KVLI_GPU_F32: return dtype_value(KVLI_GPU_DTYPE_F32, row + 4 * e);
    case KVLI_GPU_F16: return f16_value(get16(row + 2 * e));
    case KVLI_GPU_BF16: return bf16_value(get16(row + 2 * e));
    case KVLI_GPU_INT8: return (int8_t)row[e] * f16_value(get16(scales + 2 * token));
    case KVLI_GPU_FP8_E4M3: return e4m3_value(row[e]) * f16_value(get16(scales + 2 * token));
    case KVLI_GPU_INT8_CHANNEL:
        return row[e] * f16_value(get16(scales + 2 * e)) + f16_value(get16(scales + 2 * dim + 2 * e));
    case KVLI_GPU_INT4_CHANNEL:
        return nibble * f16_value(get16(scales + 2 * e)) + f16_value(get16(scales + 2 * dim + 2 * e));
    case KVLI_GPU_NVFP4:
        return e2m1_value(nibble) * e4m3_value(scales[token * (dim / 16) + e / 16]) * s.global;
    default: {
        const uint8_t *group = scales + (token * ((dim + 63) / 64) + e / 64) * 4;
        return nibble * f16_value(get16(group)) + f16_value(get16(group + 2));
    }
    }
}

// ---- the sequence ----

struct Free {
    void operator()(uint8_t *p) const { free(p); }
};
typedef std::unique_ptr<uint8_t, Free> Bytes;
static Bytes make_bytes(size_t n) {
    uint8_t *p = (uint8_t *)aligned_alloc(128, (n + 127) / 128 * 128);
    memset(p, 0xff, n); // NaN in every format
    return Bytes(p);
}

struct Layout {
    Side k, v;
    uint64_t offset, head_stride, v_offset, bytes;
};
static Layout make_layout(const Case &c, bool exact) {
    const Preset &p = *c.preset;
    Layout l;
    l.k = exact ? Side{p.exact, false, 1} : Side{p.k, p.k_rotated, 1.0f / 8};
    l.v = exact ? Side{p.exact, false, 1} : Side{p.v, p.v_rotated, 1.0f / 8};
    l.v_offset = tile_bytes(l.k.format, c.dim, c.block_tokens);
    l.head_stride = l.v_offset + tile_bytes(l.v.format, c.dim, c.block_tokens);
    l.offset = p.k == p.exact ? 128 : exact ? 384 : 128;
    l.bytes = l.offset + l.head_stride * c.kv_heads;
    return l;
}

typedef std::function<uint64_t(const uint8_t *, size_t)> Place;

struct Sequence {
    Layout packed, exact;
    uint32_t tokens, blocks;
    std::vector<Bytes> packed_blocks, exact_blocks;
    std::vector<uint64_t> packed_at, exact_at; // addresses

    Sequence(const Case &c, Random &r) : packed(make_layout(c, false)), exact(make_layout(c, true)) {
        tokens = c.position + c.rows;
        blocks = (tokens + c.block_tokens - 1) / c.block_tokens;
        for (uint32_t b = 0; b < blocks; b++) {
            packed_blocks.push_back(make_bytes(packed.bytes));
            exact_blocks.push_back(make_bytes(exact_bytes(c, b)));
            uint32_t written = std::min(c.block_tokens, tokens - b * c.block_tokens);
            for (uint32_t h = 0; h < c.kv_heads; h++) {
                uint8_t *k = exact_tile(c, b, h);
                fill_tile(r, exact.k.format, c.dim, written, k);
                fill_tile(r, exact.v.format, c.dim, written, k + exact.v_offset);
                if (written < c.block_tokens) continue;
                k = packed_tile(b, h);
                auto fill = c.small ? fill_small_tile : fill_tile;
                fill(r, packed.k.format, c.dim, c.block_tokens, k);
                fill(r, packed.v.format, c.dim, c.block_tokens, k + packed.v_offset);
            }
        }
    }
    uint8_t *packed_tile(uint32_t b, uint32_t h) const {
        return packed_blocks[b].get() + packed.offset + h * packed.head_stride;
    }
    uint8_t *exact_tile(const Case &c, uint32_t b, uint32_t h) const {
        return exact_blocks[b].get() + (c.scratch && b ? 0 : exact.offset) + h * exact.head_stride;
    }
    // Where the device has the blocks: `to` puts n bytes there and returns their address.
    void place(const Case &c, const Place &to) {
        for (uint32_t b = 0; b < blocks; b++) {
            packed_at.push_back(to(packed_blocks[b].get(), packed.bytes));
            exact_at.push_back(to(exact_blocks[b].get(), exact_bytes(c, b)));
        }
    }
    size_t exact_bytes(const Case &c, uint32_t b) const {
        return exact.bytes - (c.scratch && b ? exact.offset : 0);
    }
    uint64_t own_entry(const Case &c, uint32_t b) const {
        return exact_at[b] | KVLI_GPU_EXACT | (c.scratch && b ? KVLI_GPU_SCRATCH : 0);
    }
    // Block 0 is a sink, exact in the table too; where there is one class, any block of the table is as its own rows.
    bool table_exact(const Case &c, uint32_t b) const { return b == 0 || c.preset->k == c.preset->exact; }
    uint64_t table_entry(const Case &c, uint32_t b) const {
        return table_exact(c, b) ? own_entry(c, b) : packed_at[b];
    }
};

// What a tile stands for, rotation undone.
static void read_row(const Case &c, const Side &s, const uint8_t *tile, uint32_t token, double *x) {
    for (uint32_t e = 0; e < c.dim; e++) x[e] = tile_number(s, c.dim, c.block_tokens, tile, token, e);
    if (s.rotated) rotate(x, c.dim);
}

static bool sees(const Case &c, uint32_t x, uint32_t token) {
    return token <= x && (c.window == 0 || x - token < c.window || token < c.sink_tokens);
}

// ---- tensors ----

// Strided; `apart` elements before the first, and more than there must be between heads and rows.
struct Tensor {
    std::vector<uint8_t> bytes;
    uint32_t dtype, offset, head_stride, row_stride;
    Tensor(uint32_t dtype, uint32_t rows, uint32_t heads, uint32_t dim, uint32_t apart)
        : dtype(dtype), offset(apart), head_stride(dim + apart) {
        row_stride = heads * head_stride + 3 * apart;
        bytes.assign((offset + rows * row_stride + 2) * dtype_size(dtype) + 32, 0x7e);
    }
    uint8_t *base() { return bytes.data() + (16 - (uintptr_t)bytes.data() % 16) % 16; } // at 16 bytes
    uint8_t *at(uint32_t row, uint32_t head, uint32_t e) {
        return base() + (offset + (size_t)row * row_stride + head * head_stride + e) * dtype_size(dtype);
    }
};

static std::vector<double> reference(const Case &c, const Sequence &s, Tensor &q, uint32_t first_row,
                                     const float *logits, double *widest) {
    uint32_t heads = c.gqa * c.kv_heads;
    std::vector<double> out((size_t)c.rows * heads * c.dim), row(c.dim), weight(s.tokens);
    *widest = 0;
    for (uint32_t i = 0; i < c.rows * heads; i++) {
        uint32_t x = c.position + i / heads, head = i % heads, kv = head / c.gqa;
        std::vector<double> sum(c.dim), mass(c.dim);
        double top = logits ? logits[head] : -INFINITY, total = 0;
        for (uint32_t pass = 0; pass < 2; pass++) {
            for (uint32_t t = 0; t <= x; t++) {
                uint32_t b = t / c.block_tokens, at = t % c.block_tokens;
                if (!sees(c, x, t)) continue;
                bool exact = b == x / c.block_tokens || s.table_exact(c, b);
                const Layout &l = exact ? s.exact : s.packed;
                const uint8_t *k = exact ? s.exact_tile(c, b, kv) : s.packed_tile(b, kv);
                if (pass == 0) {
                    read_row(c, l.k, k, at, row.data());
                    double dot = 0;
                    for (uint32_t e = 0; e < c.dim; e++)
                        dot += row[e] * dtype_value(q.dtype, q.at(first_row + i / heads, head, e));
                    weight[t] = dot / std::sqrt((double)c.dim) / c.q_size;
                    if (c.softcap > 0) weight[t] = c.softcap * std::tanh(weight[t] / c.softcap);
                    top = std::max(top, weight[t]);
                } else {
                    read_row(c, l.v, k + l.v_offset, at, row.data());
                    double w = std::exp(weight[t] - top);
                    total += w;
                    for (uint32_t e = 0; e < c.dim; e++)
                        sum[e] += w * row[e], mass[e] += w * std::fabs(row[e]);
                }
            }
            if (pass == 0) total = logits ? std::exp(logits[head] - top) : 0;
        }
        for (uint32_t e = 0; e < c.dim; e++) {
            out[(size_t)i * c.dim + e] = sum[e] / total;
            *widest = std::max(*widest, mass[e] / total);
        }
    }
    return out;
}
// `any` plan that covers all rows and what they see: packed rows by item_rows, blocks by split_blocks.
struct Plan {
    std::vector<kvli_gpu_item> items;
    std::vector<kvli_gpu_merge> merges;
    uint32_t partials = 0; // for each KV head
};
static Plan make_plan(const Case &c) {
    Plan p;
    uint32_t packed_rows = c.rows * c.gqa;
    for (uint32_t row = 0; row < packed_rows; row += c.item_rows) {
        uint32_t n = std::min(c.item_rows, packed_rows - row);
        uint32_t x_first = c.position + row / c.gqa, x_last = c.position + (row + n - 1) / c.gqa;
        uint32_t begin = 0, own = x_first / c.block_tokens, end = x_last / c.block_tokens;
        if (c.window && c.sink_tokens == 0 && x_first >= c.window)
            begin = (x_first - c.window + 1) / c.block_tokens;
        begin = std::min(begin, end);
        uint32_t step = c.split_blocks ? c.split_blocks : end - begin + 1, first_partial = p.partials,
                 parts = 0;
        for (uint32_t b = begin; b < end || parts == 0; b += step) {
            uint32_t stop = std::min(b + step, end);
            bool last = stop == end;
            p.items.push_back({1, row, n, b, stop, last ? own : 0, last ? end + 1 : 0, p.partials});
            p.partials += n;
            parts++;
        }
        if (parts == 1) {
            p.partials = first_partial;
            p.items.back().partial = KVLI_GPU_NONE;
        } else {
            p.merges.push_back({1, row, n, first_partial, parts, {0, 0, 0}});
        }
    }
    return p;
}
// ---- a case made ----

struct Result {
    double error = 0; // the largest, over the tolerance
    std::vector<uint8_t> out;
    bool overwrote = false; // something outside of the output's rows
};

// All that a kernel is given, but for addresses of its own.
struct Problem {
    enum { FIRST_ROW = 2 };
    Case c;
    Random random;
    Sequence s;
    uint32_t heads;
    Tensor q, out;
    std::vector<float> logits;
    std::vector<uint64_t> entries;
    kvli_gpu_span spans[2]; // the second is the sequence's
    Plan plan;
    float scale;

    Problem(const Case &given, const Place &place)
        : c(given), random(c.seed), s(c, random), heads(c.gqa * c.kv_heads),
          q(c.q_dtype, FIRST_ROW + c.rows, heads, c.dim, c.apart),
          out(c.out_dtype, FIRST_ROW + c.rows, heads, c.dim, c.apart), logits(heads),
          entries(3, 0x5a5a5a5a5a00), spans(), plan(make_plan(c)),
          scale((float)(1 / std::sqrt((double)c.dim) / c.q_size)) {
        for (uint32_t i = 0; i < c.rows * heads * c.dim; i++) {
            uint8_t *p = q.at(FIRST_ROW + i / (heads * c.dim), i / c.dim % heads, i % c.dim);
            float x = (float)(c.q_size * normal(random));
            if (c.q_dtype == KVLI_GPU_DTYPE_F32)
                memcpy(p, &x, 4);
            else
                put16(p, c.q_dtype == KVLI_GPU_DTYPE_F16 ? f16_bits(x) : bf16_bits(x));
        }
        for (float &x : logits) x = (float)normal(random);
        s.place(c, place);
        make_table();
    }

    // The table starts at the first block that anyone sees, the own blocks after it; around them are addresses of nothing.
    void make_table() {
        uint32_t first_block = 0, first_own = c.position / c.block_tokens;
        if (c.window && c.sink_tokens == 0 && c.position >= c.window)
            first_block = (c.position - c.window + 1) / c.block_tokens;
        spans[1] = {FIRST_ROW, c.rows, c.position, 3 - first_block, first_own, 0};
        for (uint32_t b = first_block; b < s.blocks; b++) {
            bool seen = false;
            for (uint32_t i = 0; i < c.rows; i++) {
                for (uint32_t t = b * c.block_tokens; t < (b + 1) * c.block_tokens; t++) {
                    seen |= sees(c, c.position + i, t) && b < (c.position + i) / c.block_tokens;
                }
            }
            entries.push_back(seen ? s.table_entry(c, b) : 0);
        }
        entries.push_back(0x5a5a5a5a5a00);
        spans[1].own = (uint32_t)entries.size();
        for (uint32_t b = first_own; b < s.blocks; b++) entries.push_back(s.own_entry(c, b));
    }

    // What `out` is, beside the reference. tolerance: of the largest sum of weight x |value|.
    Result judge(double tolerance) {
        Result result;
        double widest;
        std::vector<double> expected =
            reference(c, s, q, FIRST_ROW, c.sink_logits ? logits.data() : nullptr, &widest);
        double rounding = c.out_dtype == KVLI_GPU_DTYPE_F32   ? 0
                          : c.out_dtype == KVLI_GPU_DTYPE_F16 ? 0x1p-11
                                                              : 0x1p-8;
        Tensor untouched(c.out_dtype, FIRST_ROW + c.rows, heads, c.dim, c.apart);
        for (uint32_t i = 0; i < c.rows * heads * c.dim; i++) {
            uint32_t row = FIRST_ROW + i / (heads * c.dim), head = i / c.dim % heads, e = i % c.dim;
            double got = dtype_value(c.out_dtype, out.at(row, head, e));
            double error = std::fabs(got - expected[i]) / ((tolerance + rounding) * widest);
            result.error = error <= result.error ? result.error : std::isnan(error) ? INFINITY : error;
            memcpy(untouched.at(row, head, e), out.at(row, head, e), dtype_size(c.out_dtype));
        }
        result.out.assign(out.base(), out.base() + out.bytes.size() - 16);
        result.overwrote = memcmp(untouched.base(), out.base(), out.bytes.size() - 16) != 0;
        return result;
    }
};

static inline void check(const Case &c, const Result &r) {
    if (!(r.error <= 1) || r.overwrote)
        fail_msg("error %.2f of what is allowed%s: %s", r.error, r.overwrote ? ", wrote elsewhere" : "",
                 c.text().c_str());
}

} // namespace attend
#endif
