// The shim itself: each wrapper of port.cuh against a plain computation, and bugs of kernels, each planted and caught.
#include "port.cuh"
#include "cuda_test.h"
#include <cmath>

struct ShimArgs {
    const unsigned char *in;
    unsigned char *out;
    int plant; // number of a bug, 0: none
    unsigned n;
};

static bool run(const char *kernel, dim3 grid, unsigned threads, size_t smem, const void *in, void *out,
                int plant = 0, unsigned n = 0) {
    ShimArgs args = {(const unsigned char *)in, (unsigned char *)out, plant, n};
    return cuda_cpu::launch(kernel, grid, threads, smem, &args);
}

// ---- conversions and arithmetic ----

// The value of a number of 1 sign bit, `exponent` and `mantissa` bits; NaN and infinity are the caller's business.
static double value_of(unsigned code, int exponent_bits, int mantissa_bits) {
    int bias = (1 << (exponent_bits - 1)) - 1;
    int exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1);
    int mantissa = code & ((1 << mantissa_bits) - 1);
    double v = exponent ? ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)
                        : ldexp(mantissa, 1 - bias - mantissa_bits);
    return code >> (exponent_bits + mantissa_bits) & 1 ? -v : v;
}

static double half_value(unsigned h) {
    if ((h & 0x7fff) > 0x7c00) return NAN;
    if ((h & 0x7fff) == 0x7c00) return h & 0x8000 ? -INFINITY : INFINITY;
    return value_of(h, 5, 10);
}

#ifdef __SIZEOF_FLOAT128__ // holds any a·b + c of halves
__extension__ typedef __float128 Exact;
#else
typedef long double Exact;
#endif

// The half nearest to v, ties to the even one, by bisection among all of them.
static uint16_t nearest_half(Exact v, bool negative_zero) {
    bool negative = v < 0 || (v == 0 && negative_zero);
    if (v < 0) v = -v;
    unsigned low = 0, high = 0x7c00; // 0x7c00 stands for 65536, from the middle to which on it is infinity
    while (high - low > 1) {
        unsigned middle = (low + high) / 2;
        if ((Exact)value_of(middle, 5, 10) <= v)
            low = middle;
        else
            high = middle;
    }
    Exact middle = ((Exact)value_of(low, 5, 10) + (Exact)value_of(high, 5, 10)) / 2;
    unsigned best = v > middle || (v == middle && (low & 1)) ? high : low;
    return (uint16_t)(best | (negative ? 0x8000 : 0));
}

static void test_half_conversions(void **) {
    for (unsigned h = 0; h < 65536; h++) {
        double v = half_value(h);
        float f = kvl_h2f((uint16_t)h);
        if (std::isnan(v)) {
            assert_true(std::isnan(f));
            assert_int_equal(kvl_f2h(f), 0x7fff);
            continue;
        }
        assert_true(f == v && std::signbit(f) == (h >> 15));
        assert_int_equal(kvl_f2h(f), h);
        if ((h & 0x7fff) >= 0x7c00) continue;
        double next = (h & 0x7fff) == 0x7bff ? copysign(65536.0, v) : half_value(h + 1),
               middle = (v + next) / 2;
        float around[3] = {nextafterf((float)middle, (float)v), (float)middle,
                           nextafterf((float)middle, (float)next)};
        for (float x : around) assert_int_equal(kvl_f2h(x), nearest_half(x, h >> 15));
    }
    assert_int_equal(kvl_f2h(1e30f), 0x7c00);
    assert_int_equal(kvl_f2h(-1e-30f), 0x8000);
    assert_int_equal(kvl_f22h2(1.0f, -2.0f), 0xc0003c00);
}

static void test_bfloat_conversions(void **) {
    for (uint32_t b = 0; b < 65536; b++) {
        float f = kvl_bf2f((uint16_t)b);
        uint32_t bits = __float_as_uint(f);
        assert_int_equal(bits, b << 16);
        if ((b & 0x7fff) > 0x7f80) {
            assert_int_equal(kvl_f2bf(f), 0x7fff);
            continue;
        }
        assert_int_equal(kvl_f2bf(f), b);
        if ((b & 0x7fff) == 0x7f80) continue;
        assert_int_equal(kvl_f2bf(__uint_as_float(bits + 0x7fff)), b);
        assert_int_equal(kvl_f2bf(__uint_as_float(bits + 0x8000)), b + (b & 1));
        assert_int_equal(kvl_f2bf(__uint_as_float(bits + 0x8001)), b + 1);
    }
    assert_int_equal(kvl_f22bf2(1.0f, -2.0f), 0xc0003f80);
}

static void test_small_formats(void **) {
    for (unsigned code = 0; code < 256; code++) {
        if ((code & 0x7f) == 0x7f) continue; // NaN
        uint32_t pair = kvl_e4m3x2(code | (code ^ 0x80) << 8 | 0xabcd0000u);
        double v = value_of(code, 4, 3);
        assert_true(half_value(pair & 0xffff) == v && half_value(pair >> 16) == -v);
        assert_int_equal(pair >> 15 & 1, code >> 7);
    }
    for (unsigned code = 0; code < 16; code++)
        for (unsigned other = 0; other < 16; other++) {
            double v = value_of(code, 2, 1) * 0x1p-14, u = value_of(other, 2, 1) * 0x1p-14;
            uint32_t w = code | other << 16, pairs[4] = {kvl_e2m1x2<0>(w), kvl_e2m1x2<1>(w << 4),
                                                         kvl_e2m1x2<2>(w << 8), kvl_e2m1x2<3>(w << 12)};
            uint32_t noise = kvl_e2m1x2<1>(w << 4 | 0xff0fff0fu);
            for (uint32_t p : pairs) assert_true(half_value(p & 0xffff) == v && half_value(p >> 16) == u);
            assert_int_equal(noise, pairs[1]);
        }
}

static void check_half_op(uint32_t found, const Exact exact[2], const bool negative_zero[2]) {
    for (int i = 0; i < 2; i++)
        assert_int_equal(found >> (16 * i) & 0xffff, nearest_half(exact[i], negative_zero[i]));
}

static void test_half_arithmetic(void **) {
    uint32_t state = 1;
    for (int n = 0; n < 200000; n++) {
        uint32_t v[3];
        for (uint32_t &x : v) {
            x = test_random(&state) | test_random(&state) << 24;
            if (n & 1) x &= 0xbfffbfff; // smaller: results that are finite, and subnormal
            for (int i = 0; i < 32; i += 16)
                if ((x >> i & 0x7c00) == 0x7c00) x ^= 0x4000u << i;
        }
        Exact product[2], sum[2], fma[2];
        bool product_negative[2], sum_negative[2], fma_negative[2];
        for (int i = 0; i < 2; i++) {
            double a = half_value(v[0] >> (16 * i) & 0xffff), b = half_value(v[1] >> (16 * i) & 0xffff);
            double c = half_value(v[2] >> (16 * i) & 0xffff);
            product[i] = (Exact)a * b;
            sum[i] = (Exact)a + b;
            fma[i] = product[i] + c;
            product_negative[i] = std::signbit(a) != std::signbit(b);
            sum_negative[i] = std::signbit(a) && std::signbit(b);
            fma_negative[i] = product_negative[i] && std::signbit(c);
        }
        check_half_op(kvl_hmul2(v[0], v[1]), product, product_negative);
        check_half_op(kvl_hadd2(v[0], v[1]), sum, sum_negative);
        check_half_op(kvl_hsub2(v[0], v[1] ^ 0x80008000u), sum, sum_negative);
        check_half_op(kvl_hfma2(v[0], v[1], v[2]), fma, fma_negative);
    }
}

static void test_float_arithmetic(void **) {
    volatile float a = 1.0f + 0x1p-12f, b = a, c = -(1.0f + 0x1p-11f);
    assert_true(__fadd_rn(__fmul_rn(a, b), c) == 0.0f); // rounded twice
    assert_true(__fmaf_rn(a, b, c) == 0x1p-24f);        // once
    assert_true(a * b + c == 0.0f);                     // not contracted behind our back
    assert_true(kvl_exp2(-INFINITY) == 0 && kvl_exp2(-130.0f) == 0 && kvl_exp2(3.0f) == 8);
    assert_true(std::isnan(kvl_exp2(NAN)));
    uint32_t state = 7;
    for (int i = 0; i < 1000; i++) {
        uint32_t x = test_random(&state) << 8, y = test_random(&state) << 8, s = test_random(&state), r = 0;
        for (int byte = 0; byte < 4; byte++) {
            unsigned k = s >> (4 * byte) & 15, from = (k & 7) < 4 ? x >> (8 * (k & 3)) : y >> (8 * (k & 3));
            r |= (k & 8 ? ((from & 0x80) ? 0xffu : 0u) : from & 0xff) << (8 * byte);
        }
        assert_int_equal(__byte_perm(x, y, s), r);
    }
}

// ---- collectives ----

KVL_KERNEL(shim_warp_of_31, 64, 1, ShimArgs) {
    unsigned t = threadIdx.x, *out = (unsigned *)a.out;
    if ((t & 31) == 31) return;
    out[t] = __ballot_sync(~0u, 1);
    __syncthreads();
    out[64 + t] = out[(t + 1) % 31];
}

KVL_KERNEL(shim_shuffles, 64, 1, ShimArgs) {
    unsigned t = threadIdx.x, lane = t & 31, v = 1000 * t + blockIdx.x;
    unsigned *out = (unsigned *)a.out + ((size_t)blockIdx.x * blockDim.x + t) * 10;
    out[0] = __shfl_sync(~0u, v, 5);
    out[1] = __shfl_sync(~0u, v, (int)lane + 1, 8);
    out[2] = __shfl_xor_sync(~0u, v, 12);
    out[3] = __shfl_down_sync(~0u, v, 3);
    out[4] = __shfl_up_sync(~0u, v, 3, 16);
    out[5] = __ballot_sync(~0u, lane % 3 == 0);
    out[6] = (unsigned)__any_sync(~0u, t == 40);
    out[7] = (unsigned)__all_sync(~0u, t < 32);
    double d = __shfl_xor_sync(~0u, v + 0.5, 1);
    out[8] = (unsigned)(2 * d);
    if (lane < 16)
        out[9] = __ballot_sync(0xffffu, lane & 1); // halves of a warp meet apart
    else
        out[9] = __shfl_sync(0xffff0000u, v, 20);
}

static void test_shuffles(void **) {
    enum { BLOCKS = 9 };
    DeviceArray<unsigned> out(BLOCKS * 64 * 10);
    for (unsigned seed = 0; seed < 4; seed++) {
        cuda_cpu::settings.seed = seed;
        assert_true(run("shim_shuffles", BLOCKS, 64, 0, nullptr, out.data));
        for (unsigned b = 0; b < BLOCKS; b++)
            for (unsigned t = 0; t < 64; t++) {
                unsigned lane = t & 31, first = t - lane, *o = &out[(b * 64 + t) * 10];
                auto v = [&](unsigned l) { return 1000 * (first + l) + b; };
                assert_int_equal(o[0], v(5));
                assert_int_equal(o[1], v(lane / 8 * 8 + (lane + 1) % 8));
                assert_int_equal(o[2], v(lane ^ 12));
                assert_int_equal(o[3], v(lane + 3 < 32 ? lane + 3 : lane));
                assert_int_equal(o[4], v(lane % 16 >= 3 ? lane - 3 : lane));
                assert_int_equal(o[5], 0x49249249);
                assert_int_equal(o[6], t >= 32);
                assert_int_equal(o[7], t < 32);
                assert_int_equal(o[8], 2 * v(lane ^ 1) + 1);
                assert_int_equal(o[9], lane < 16 ? 0xaaaa : v(20));
            }
    }
}

static void test_ended_lanes(void **) {
    DeviceArray<unsigned> out(128);
    assert_true(run("shim_warp_of_31", 1, 64, 0, nullptr, out.data));
    for (unsigned t = 0; t < 64; t++) {
        if (t % 32 == 31) continue;
        assert_int_equal(out[t], 0x7fffffff);
        assert_int_equal(out[64 + t], 0x7fffffff);
    }
}

// Fragments as the PTX manual gives them for m16n8k16: element i of a lane's a stands at (row, column) …
static void a_place(unsigned lane, unsigned i, unsigned *row, unsigned *column) {
    *row = lane / 4 + (i < 2 || (i >= 4 && i < 6) ? 0 : 8);
    *column = lane % 4 * 2 + (i & 1) + (i < 4 ? 0 : 8);
}
static void b_place(unsigned lane, unsigned i, unsigned *row, unsigned *column) {
    *row = lane % 4 * 2 + (i & 1) + (i < 2 ? 0 : 8);
    *column = lane / 4;
}
static void c_place(unsigned lane, unsigned i, unsigned *row, unsigned *column) {
    *row = lane / 4 + (i < 2 ? 0 : 8);
    *column = lane % 4 * 2 + (i & 1);
}

struct MmaData {
    uint16_t a[16][16], b[16][8];
    float c[16][8];
};

KVL_KERNEL(shim_mma, 32, 1, ShimArgs) {
    const MmaData &m = *(const MmaData *)a.in;
    float(*out)[8] = (float(*)[8])a.out, c[4];
    uint32_t fa[4] = {0}, fb[2] = {0};
    unsigned lane = threadIdx.x, row, column;
    for (unsigned i = 0; i < 8; i++) {
        a_place(lane, i, &row, &column);
        fa[i / 2] |= (uint32_t)m.a[row][column] << (16 * (i & 1));
    }
    for (unsigned i = 0; i < 4; i++) {
        b_place(lane, i, &row, &column);
        fb[i / 2] |= (uint32_t)m.b[row][column] << (16 * (i & 1));
        c_place(lane, i, &row, &column);
        c[i] = m.c[row][column];
    }
    if (a.plant)
        kvl_mma_bf16(c, fa, fb);
    else
        kvl_mma_f16(c, fa, fb);
    for (unsigned i = 0; i < 4; i++) {
        c_place(lane, i, &row, &column);
        out[row][column] = c[i];
    }
}

static void check_mma(int bf16) {
    uint32_t state = 3;
    for (int round = 0; round < 100; round++) {
        DeviceArray<MmaData> data(1);
        DeviceArray<float> out(128);
        MmaData &m = data[0];
        auto random = [&] { return ((int)test_random(&state) % 2001 - 1000) / 300.0f; };
        auto code = [&](float f) { return bf16 ? kvl_f2bf(f) : kvl_f2h(f); };
        auto value = [&](uint16_t h) { return bf16 ? (double)kvl_bf2f(h) : half_value(h); };
        for (auto &r : m.a)
            for (uint16_t &x : r) x = code(random());
        for (auto &r : m.b)
            for (uint16_t &x : r) x = code(random());
        for (auto &r : m.c)
            for (float &x : r) x = random();
        assert_true(run("shim_mma", 1, 32, 0, &m, out.data, bf16));
        for (unsigned row = 0; row < 16; row++)
            for (unsigned column = 0; column < 8; column++) {
                double exact = m.c[row][column], size = fabs(exact);
                for (unsigned k = 0; k < 16; k++) {
                    double product = value(m.a[row][k]) * value(m.b[k][column]);
                    exact += product;
                    size += fabs(product);
                }
                assert_true(fabs(out[row * 8 + column] - exact) <= 17 * 0x1p-24 * size);
            }
    }
}
static void test_mma_f16(void **) { check_mma(0); }
// What an older architecture has no instruction for.
static void skip_below(const char *arch) {
    printf("SKIP below %s: not in the paths for sm_%d\n", arch, KVL_ARCH / 10);
    skip();
}

static void test_mma_bf16(void **) {
    if (KVL_ARCH < 800) skip_below("sm_80");
    check_mma(1);
}

// 8 x 8 matrices: lane l has row l / 4, columns 2 (l % 4) and the next.
KVL_KERNEL(shim_matrices, 32, 1, ShimArgs) {
    KVL_DYN_SMEM(uint16_t, shared);
    unsigned lane = threadIdx.x;
    uint32_t *out = (uint32_t *)a.out + lane * 9;
    for (unsigned i = lane; i < 256; i += 32) shared[i] = (uint16_t)(1000 + i);
    __syncwarp();
    out[0] = kvl_movm(lane * 2 | (lane * 2 + 1) << 16); // element i of the matrix is i
    kvl_ldmatrix_x4(out + 1, shared + 8 * (31 - lane)); // rows in the reverse order
    kvl_ldmatrix_x4_trans(out + 5, shared + 8 * lane);
}

static void test_matrices(void **) {
    DeviceArray<uint32_t> out(32 * 9);
    assert_true(run("shim_matrices", 1, 32, 512, nullptr, out.data));
    for (unsigned lane = 0; lane < 32; lane++)
        for (unsigned h = 0; h < 2; h++) {
            unsigned row = lane / 4, column = lane % 4 * 2 + h;
            assert_int_equal(out[lane * 9] >> (16 * h) & 0xffff, column * 8 + row);
            for (unsigned m = 0; m < 4; m++) {
                unsigned plain = out[lane * 9 + 1 + m] >> (16 * h) & 0xffff;
                unsigned transposed = out[lane * 9 + 5 + m] >> (16 * h) & 0xffff;
                assert_int_equal(plain, 1000 + (31 - (m * 8 + row)) * 8 + column);
                assert_int_equal(transposed, 1000 + (m * 8 + column) * 8 + row);
            }
        }
}

KVL_KERNEL(shim_atomics, 128, 1, ShimArgs) {
    unsigned *out = (unsigned *)a.out;
    atomicAdd(out, threadIdx.x);
    atomicOr(out + 1, 1u << (threadIdx.x & 31));
    atomicAdd((float *)a.out + 2, 0.5f);
    atomicMax(out + 3, blockIdx.x * blockDim.x + threadIdx.x + gridDim.y + blockIdx.y * 2000);
}

static void test_grid(void **) {
    DeviceArray<unsigned> out(4);
    memset(out.data, 0, 16);
    assert_true(run("shim_atomics", dim3(10, 3), 128, 0, nullptr, out.data));
    assert_int_equal(out[0], 30 * 127 * 64);
    assert_int_equal(out[1], ~0u);
    assert_true(__uint_as_float(out[2]) == 30 * 64);
    assert_int_equal(out[3], 1279 + 3 + 4000);
}

// ---- planted bugs that give wrong results on some seed ----

enum { PLANTED = 1 };
enum { SEEDS = 24 };

// Each thread reads what its neighbour of the block wrote.
KVL_KERNEL(shim_block_exchange, 128, 1, ShimArgs) {
    KVL_DYN_SMEM(unsigned, shared);
    unsigned t = threadIdx.x, n = blockDim.x, *out = (unsigned *)a.out + blockIdx.x * n;
    shared[t] = t;
    if (a.plant != PLANTED) __syncthreads();
    out[t] = shared[(t + 32) % n];
}

KVL_KERNEL(shim_warp_exchange, 128, 1, ShimArgs) {
    KVL_DYN_SMEM(unsigned, shared);
    unsigned t = threadIdx.x, next = (t & ~31u) + (t + 1) % 32, *out = (unsigned *)a.out;
    shared[t] = t;
    __syncwarp();
    unsigned got = shared[next];
    if (a.plant != PLANTED) __syncwarp(); // or the next round overwrites what a slower lane has not read
    shared[t] = t + 1000;
    __syncwarp();
    out[t] = got + shared[next] - 1000;
}

// A ring of three stages through cp.async: each thread brings 16 bytes of a stage, and reads 16 others.
KVL_KERNEL(shim_ring, 128, 1, ShimArgs) {
    KVL_DYN_SMEM(unsigned char, shared);
    unsigned t = threadIdx.x, stage_bytes = 16 * blockDim.x, sum = 0;
    for (unsigned s = 0; s < 2; s++) {
        kvl_cp_async16(shared + s * stage_bytes + 16 * t, a.in + s * stage_bytes + 16 * t, true);
        kvl_cp_commit();
    }
    for (unsigned s = 0; s < a.n; s++) {
        if (a.plant == PLANTED)
            kvl_cp_wait<2>();
        else
            kvl_cp_wait<1>();
        __syncthreads();
        uint4 v = kvl_ld16(shared + s % 3 * stage_bytes + 16 * ((7 * t) % blockDim.x));
        sum = sum * 31 + v.x + v.y + v.z + v.w;
        unsigned next = s + 2;
        bool valid = next < a.n;
        kvl_cp_async16(shared + next % 3 * stage_bytes + 16 * t,
                       valid ? a.in + next * stage_bytes + 16 * t : nullptr, valid);
        kvl_cp_commit();
    }
    kvl_cp_wait<0>();
    __syncthreads();
    uint4 zeros = kvl_ld16(shared + a.n % 3 * stage_bytes + 16 * t); // what was not valid
    ((unsigned *)a.out)[t] = sum + (zeros.x | zeros.y | zeros.z | zeros.w);
}

// The same by bulk copies: thread 0 brings whole stages; a barrier for each of the stages.
enum { WRONG_PARITY = 1, TOO_FEW_BYTES, TOO_MANY_BYTES, NO_FENCE, NO_INIT, NO_WAIT_AT_END };
KVL_KERNEL(shim_bulk_ring, 128, 1, ShimArgs) {
    KVL_DYN_SMEM(unsigned char, shared);
    unsigned t = threadIdx.x, stage_bytes = 16 * blockDim.x, sum = 0;
    uint64_t *bars = (uint64_t *)(shared + 3 * stage_bytes);
    auto bring = [&](unsigned s) {
        uint32_t half = stage_bytes / 2;
        uint32_t expected = a.plant == TOO_FEW_BYTES ? half : a.plant == TOO_MANY_BYTES ? 3 * half : 2 * half;
        kvl_mbar_expect(&bars[s % 3], expected);
        kvl_bulk_copy(shared + s % 3 * stage_bytes, a.in + s * stage_bytes, half, &bars[s % 3]);
        kvl_bulk_copy(shared + s % 3 * stage_bytes + half, a.in + s * stage_bytes + half, half, &bars[s % 3]);
    };
    if (t == 0) {
        if (a.plant != NO_INIT)
            for (unsigned i = 0; i < 3; i++) kvl_mbar_init(&bars[i], 1);
        if (a.plant != NO_FENCE) kvl_mbar_fence();
    }
    __syncthreads();
    if (t == 0)
        for (unsigned s = 0; s < 2 && s < a.n; s++) bring(s);
    for (unsigned s = 0; s < a.n; s++) {
        if (a.plant == NO_WAIT_AT_END && s + 1 == a.n) break;
        kvl_mbar_wait(&bars[s % 3], (s / 3 + (a.plant == WRONG_PARITY)) & 1);
        uint4 v = kvl_ld16(shared + s % 3 * stage_bytes + 16 * ((7 * t) % blockDim.x));
        sum = sum * 31 + v.x + v.y + v.z + v.w;
        __syncthreads();
        if (t == 0 && s + 2 < a.n) bring(s + 2);
    }
    ((unsigned *)a.out)[t] = sum;
}

// How many of the seeds gave the wrong numbers. Under AddressSanitizer a wrong one may end in its report: counted, too.
struct Ring {
    const char *kernel;
    size_t smem;
    int plant;
};
static unsigned wrong_seeds(const Ring &r) {
    enum { STAGES = 7 };
    struct Work {
        Ring ring;
        unsigned seed;
    };
    unsigned wrong = 0;
    for (unsigned seed = 1; seed <= SEEDS; seed++) {
        Work work = {r, seed};
        std::string words = words_of_child(
            [](void *user) {
                const Work &w = *(const Work *)user;
                DeviceArray<unsigned> in(STAGES * 512), out(128);
                for (unsigned i = 0; i < in.n; i++) in[i] = i * 2654435761u;
                cuda_cpu::settings.seed = w.seed;
                run(w.ring.kernel, 1, 128, w.ring.smem, in.data, out.data, w.ring.plant, STAGES);
                bool right = true;
                bool exchange = !strstr(w.ring.kernel, "ring"),
                     warp = !strcmp(w.ring.kernel, "shim_warp_exchange");
                for (unsigned t = 0; t < 128; t++) {
                    unsigned sum = 0;
                    for (unsigned s = 0; s < STAGES; s++) {
                        const unsigned *v = &in[s * 512 + 4 * (7 * t % 128)];
                        sum = sum * 31 + v[0] + v[1] + v[2] + v[3];
                    }
                    if (warp)
                        sum = 2 * ((t & ~31u) + (t + 1) % 32);
                    else if (exchange)
                        sum = (t + 32) % 128;
                    right &= out[t] == sum;
                }
                if (!right) fprintf(stderr, "wrong");
            },
            &work);
        if (!r.plant && !words.empty()) fail_msg("seed %u: %s", seed, words.c_str());
        wrong += !words.empty();
    }
    return wrong;
}

static void test_missing_syncthreads(void **) {
    assert_int_equal(wrong_seeds({"shim_block_exchange", 512, 0}), 0);
    assert_true(wrong_seeds({"shim_block_exchange", 512, PLANTED}) > SEEDS / 2);
}
static void test_missing_syncwarp(void **) {
    assert_int_equal(wrong_seeds({"shim_warp_exchange", 512, 0}), 0);
    assert_true(wrong_seeds({"shim_warp_exchange", 512, PLANTED}) > SEEDS / 2);
}
static void test_wait_count(void **) {
    assert_int_equal(wrong_seeds({"shim_ring", 3 * 2048, 0}), 0);
    if (KVL_ARCH < 800) skip_below("sm_80"); // there are no waits
    assert_int_equal(wrong_seeds({"shim_ring", 3 * 2048, PLANTED}), SEEDS);
}
static void test_bulk_copies(void **) {
    if (KVL_ARCH < 900) skip_below("sm_90");
    assert_int_equal(wrong_seeds({"shim_bulk_ring", 3 * 2048 + 24, 0}), 0);
    assert_int_equal(wrong_seeds({"shim_bulk_ring", 3 * 2048 + 24, WRONG_PARITY}), SEEDS);
}

// ---- planted bugs that are reported ----

struct Planted {
    const char *kernel;
    unsigned threads;
    size_t smem;
    int plant;
    unsigned n;
};
static void run_planted(void *user) {
    const Planted &p = *(const Planted *)user;
    DeviceArray<unsigned char> in(16384), out(16384);
    memset(in.data, 0, in.n);
    memset(out.data, 0, out.n);
    cuda_cpu::settings.seed = 5;
    run(p.kernel, dim3(2, 2), p.threads, p.smem, in.data, out.data, p.plant, p.n);
}
static void assert_reported(Planted p, const char *wanted) { assert_caught(run_planted, &p, wanted); }

static void test_bad_bulk_copies(void **) {
    if (KVL_ARCH < 900) {
        assert_reported({"shim_bulk_ring", 128, 3 * 2048 + 24, 0, 4}, "needs sm_90");
        return;
    }
    const size_t smem = 3 * 2048 + 24;
    assert_reported({"shim_bulk_ring", 128, smem, TOO_FEW_BYTES, 4}, "that expects 1024");
    assert_reported({"shim_bulk_ring", 128, smem, TOO_MANY_BYTES, 4},
                    "1024 bytes and 0 arrivals are missing");
    assert_reported({"shim_bulk_ring", 128, smem, NO_FENCE, 4}, "without kvl_mbar_fence");
    assert_reported({"shim_bulk_ring", 128, smem, NO_INIT, 4}, "was not initialised");
    assert_reported({"shim_bulk_ring", 128, smem, NO_WAIT_AT_END, 4}, "2 bulk copies were under way");
    assert_reported({"shim_bulk_ring", 128, smem - 8, 0, 4},
                    "offset 6160 of shared memory, which has 6160 bytes");
}

enum {
    SHUFFLE_IN_BRANCH = 1,
    BARRIER_IN_BRANCH,
    TWO_BARRIERS,
    FOREIGN_LANE,
    ENDED_LANE,
    NOT_IN_MASK,
    PARTIAL_MMA
};
KVL_KERNEL(shim_divergence, 64, 1, ShimArgs) {
    unsigned lane = threadIdx.x & 31, v = lane;
    float c[4] = {0};
    uint32_t f[4] = {0};
    switch (a.plant) {
    case SHUFFLE_IN_BRANCH:
        if (lane < 16)
            v = __shfl_xor_sync(~0u, v, 1);
        else
            __syncwarp();
        break;
    case BARRIER_IN_BRANCH:
        if (threadIdx.x != 3)
            __syncthreads();
        else
            v = __ballot_sync(~0u, 1);
        break;
    case TWO_BARRIERS:
        if (threadIdx.x < 32)
            __syncthreads();
        else
            __syncthreads();
        break;
    case FOREIGN_LANE:
        if (lane < 8) v = __shfl_down_sync(0xffu, v, 2);
        break;
    case ENDED_LANE:
        if (lane >= 8) return;
        v = __shfl_sync(~0u, v, 9);
        break;
    case NOT_IN_MASK:
        if (lane < 8) v = __shfl_xor_sync(0x7fu, v, 1);
        break;
    case PARTIAL_MMA:
        if (lane == 31) return;
        kvl_mma_f16(c, f, f);
        break;
    default: break;
    }
    a.out[threadIdx.x] = (unsigned char)v;
}

static void test_divergence(void **) {
    assert_reported({"shim_divergence", 64, 0, SHUFFLE_IN_BRANCH, 0},
                    "lanes 0000ffff: a shuffle of mask ffffffff");
    assert_reported({"shim_divergence", 64, 0, SHUFFLE_IN_BRANCH, 0},
                    "lanes ffff0000: __syncwarp of mask ffffffff");
    assert_reported({"shim_divergence", 64, 0, BARRIER_IN_BRANCH, 0},
                    "warp 0 lanes 00000008: a vote of mask");
    assert_reported({"shim_divergence", 64, 0, TWO_BARRIERS, 0},
                    "__syncthreads, while threads of the block wait");
    assert_reported({"shim_divergence", 64, 0, FOREIGN_LANE, 0}, "from lane 8, which does not take part");
    assert_reported({"shim_divergence", 64, 0, ENDED_LANE, 0}, "from lane 9, which does not take part");
    assert_reported({"shim_divergence", 64, 0, NOT_IN_MASK, 0}, "in which its own lane is not");
    assert_reported({"shim_divergence", 64, 0, PARTIAL_MMA, 0}, "lanes 80000000 have ended");
}

enum {
    SHARED_WRITE_BEYOND = 1,
    SHARED_WRITE_BEFORE,
    SHARED_LOAD_BEYOND,
    GLOBAL_READ_BEYOND,
    GLOBAL_WRITE_BEFORE,
    LOAD_MISALIGNED,
    STORE_MISALIGNED,
    LDG_SHARED,
    LDMATRIX_MISALIGNED,
    LDMATRIX_GLOBAL,
    ASYNC_MISALIGNED,
    ASYNC_SOURCE_MISALIGNED,
    ASYNC_TO_GLOBAL,
    ASYNC_FROM_SHARED,
    STACK_OVERFLOW
};
static unsigned deep(volatile unsigned *p, unsigned n) {
    volatile unsigned char page[4096];
    page[n] = (unsigned char)n;
    return n ? deep(p, n - 1) + page[n] : *p;
}
KVL_KERNEL(shim_addresses, 32, 1, ShimArgs) {
    KVL_DYN_SMEM(unsigned char, shared);
    unsigned lane = threadIdx.x;
    volatile unsigned char *s = shared, *g = a.out;
    uint32_t r[4] = {0};
    switch (a.plant) {
    case SHARED_WRITE_BEYOND: s[100 + lane] = 1; break;
    case SHARED_WRITE_BEFORE: s[-1] = 1; break;
    case SHARED_LOAD_BEYOND: r[0] = kvl_ld16(shared + 96).x; break;
    case GLOBAL_READ_BEYOND: r[0] = g[16384 + lane]; break;
    case GLOBAL_WRITE_BEFORE: g[-1] = 1; break;
    case LOAD_MISALIGNED: r[0] = kvl_ld8(a.in + 4).x; break;
    case STORE_MISALIGNED: kvl_st16(shared + 8, make_uint4(1, 2, 3, 4)); break;
    case LDG_SHARED: r[0] = kvl_ldg16(shared).x; break;
    case LDMATRIX_MISALIGNED: kvl_ldmatrix_x4(r, shared + 2); break;
    case LDMATRIX_GLOBAL: kvl_ldmatrix_x4(r, a.in); break;
    case ASYNC_MISALIGNED: kvl_cp_async16(shared + 8, a.in, true); break;
    case ASYNC_SOURCE_MISALIGNED: kvl_cp_async16(shared, a.in + 8, true); break;
    case ASYNC_TO_GLOBAL: kvl_cp_async16(a.out, a.in, true); break;
    case ASYNC_FROM_SHARED: kvl_cp_async16(shared, shared + 16, true); break;
    case STACK_OVERFLOW: r[0] = deep((volatile unsigned *)a.out, 200); break;
    default: break;
    }
    a.out[lane] = (unsigned char)r[0];
}

static void test_addresses(void **) {
    auto check = [](int plant, const char *wanted) {
        assert_reported({"shim_addresses", 32, 100, plant, 0}, wanted);
    };
    check(SHARED_WRITE_BEYOND, "written at offset 100 of shared memory, which has 100 bytes");
    check(SHARED_WRITE_BEFORE, "written at offset -1 of shared memory");
    check(SHARED_LOAD_BEYOND, "load: 16 bytes at offset 96 of shared memory, which has 100 bytes");
    check(GLOBAL_READ_BEYOND, "is not memory of the kernel");
    check(GLOBAL_WRITE_BEFORE, "is not memory of the kernel");
    check(LOAD_MISALIGNED, "not aligned");
    check(STORE_MISALIGNED, "not aligned");
    check(LDG_SHARED, "kvl_ldg16 from shared memory");
    check(LDMATRIX_MISALIGNED, "not aligned");
    check(LDMATRIX_GLOBAL, "outside of shared memory");
    check(ASYNC_MISALIGNED, "not aligned");
    check(ASYNC_SOURCE_MISALIGNED, "not aligned");
    check(ASYNC_TO_GLOBAL, "to global memory");
    check(ASYNC_FROM_SHARED, "from shared memory");
    check(STACK_OVERFLOW, "is not memory of the kernel");
    assert_reported({"shim_addresses", 32, 100, 0, 0}, ""); // nothing to report
    assert_caught(
        [](void *) {
            DeviceArray<char> memory(100);
            *(volatile char *)(memory.data + 100) = 1;
        },
        nullptr, "just outside of an allocation of 100 bytes");
}

// A hook may let the test go on: the launch is given up, and the next is as good as any.
static void test_hook(void **) {
    std::string words;
    DeviceArray<unsigned char> out(128);
    cuda_cpu::set_error_hook([](const char *message, void *user) { *(std::string *)user += message; },
                             &words);
    for (int i = 0; i < 3; i++) {
        words.clear();
        assert_false(run("shim_divergence", 8, 64, 0, nullptr, out.data, BARRIER_IN_BRANCH));
        assert_true(words.find("kernel shim_divergence, block (") == 0);
        words.clear();
        assert_true(run("shim_divergence", 8, 64, 0, nullptr, out.data, 0) && words.empty());
    }
    assert_false(run("shim_none", 1, 32, 0, nullptr, out.data));
    assert_true(words.find("there is no shim_none") != std::string::npos);
    words.clear();
    assert_false(run("shim_divergence", 1, 65, 0, nullptr, out.data));
    assert_true(words.find("65 threads") != std::string::npos);
    words.clear();
    assert_false(run("shim_divergence", 1, 64, 300 << 10, nullptr, out.data));
    assert_true(words.find("307200 bytes of shared memory") != std::string::npos);
    cuda_cpu::set_error_hook(nullptr, nullptr);
    assert_null(cuda_cpu::find("shim_none"));
    assert_int_equal(cuda_cpu::find("shim_mma")->args_bytes, sizeof(ShimArgs));
}

int main() {
    const CMUnitTest tests[] = {
        cmocka_unit_test(test_half_conversions),
        cmocka_unit_test(test_bfloat_conversions),
        cmocka_unit_test(test_small_formats),
        cmocka_unit_test(test_half_arithmetic),
        cmocka_unit_test(test_float_arithmetic),
        cmocka_unit_test(test_shuffles),
        cmocka_unit_test(test_ended_lanes),
        cmocka_unit_test(test_mma_f16),
        cmocka_unit_test(test_mma_bf16),
        cmocka_unit_test(test_matrices),
        cmocka_unit_test(test_grid),
        cmocka_unit_test(test_missing_syncthreads),
        cmocka_unit_test(test_missing_syncwarp),
        cmocka_unit_test(test_wait_count),
        cmocka_unit_test(test_bulk_copies),
        cmocka_unit_test(test_bad_bulk_copies),
        cmocka_unit_test(test_divergence),
        cmocka_unit_test(test_addresses),
        cmocka_unit_test(test_hook),
    };
    return cmocka_run_group_tests(tests, nullptr, nullptr);
}
