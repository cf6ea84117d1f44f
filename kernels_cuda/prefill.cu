/* kvl_prefill_<preset>_d<dim>: attention of many query rows (chunks of prompts), on tensor cores, in FlashAttention-2's
   form. A block of 4 warps takes 128 packed query rows of one KV head (64 where the head is wider than 128) and walks
   over the blocks of its item in steps of 32 (16) tokens:

     memory --cp.async--> shared memory: f16 tiles as they are, packed ones as bytes, which all threads together decode
     into f16 once; then each warp, for its own 32 (16) rows:
     S = Q K^T   q and K by ldmatrix, mma m16n8k16 with sums in f32
     P = 2^(S - max), the online softmax in registers: S's fragments are those that P needs
     O += P V    V by ldmatrix.trans

   Two buffers: while a step is computed, the next one is on its way. Tiles and q stand in shared memory with the 16-byte
   pieces of a row exchanged ("swizzled"), so that the 8 rows of an ldmatrix, and the stores of a decoding warp, meet 32
   different banks. Packed blocks come first, then what their format asks for once per output instead of once per token
   (rotation of values, NVFP4's global factors), then exact blocks.

   The maximum that weights refer to is raised only when it is 2^8 too low: weights up to 256 are as exact in f16 as
   weights up to 1, and most steps then need not touch O. A row decides for itself: it never depends on its neighbours.

   Roofline: 4 D FLOP for a token and a row, for all 128 rows from one read of K and V: 128 FLOP per byte of f16, more of
   packed formats; bound by the tensor cores everywhere. A warp of 32 rows uses each K or V fragment (256 bytes of shared
   memory) for two mma of 4096 FLOP, and reads q once per 4 mma: about 11 mma per 2048 bytes, which at 128 bytes a clock
   is 2800 FLOP a clock and SM, near what mma.sync reaches on sm_90 (4096 peak, 60-65 % by mma.sync) and five times what
   a 4090 does (512). */
#include "formats.cuh"
#include "presets.cuh"
#include "steps.cuh"

/* ---- a packed side (K or V) of a step, as it comes: bytes of one unit after another ---- */
template <uint32_t F, uint32_t D> struct kvl_raw {
    static constexpr uint32_t ROW = kvli_gpu_row_bytes(F, D), TOKEN = kvli_gpu_token_scale_bytes(F, D);
    static constexpr uint32_t ROWS = KVLI_CU_UNIT * ROW, TOKENS = KVLI_CU_UNIT * TOKEN;
    static constexpr uint32_t CHANNELS = kvli_gpu_channel_scale_bytes(F, D), BYTES = ROWS + TOKENS + CHANNELS;
    static constexpr bool IS_4_BIT = kvl_is_4_bit(F), IS_PER_TOKEN = kvl_is_per_token(F);
    static constexpr bool IS_PER_CHANNEL = kvl_is_per_channel(F);

    KVL_D uint4 times(const uint32_t h[4], uint32_t s) {
        return make_uint4(kvl_hmul2(h[0], s), kvl_hmul2(h[1], s), kvl_hmul2(h[2], s), kvl_hmul2(h[3], s));
    }

    /* Numbers 8 * piece.. of a unit's row, decoded; K without the scale of its token. */
    KVL_D uint4 decode(const uint8_t *unit, uint32_t row, uint32_t piece, bool is_k) {
        uint32_t h[4];
        if constexpr (IS_4_BIT) {
            kvl_word_to_f16<F>(kvl_ld4(unit + row * ROW + piece * 4), h);
        } else {
            uint2 w = kvl_ld8(unit + row * ROW + piece * 8);
            kvl_word_to_f16<F>(w.x, h);
            kvl_word_to_f16<F>(w.y, h + 2);
        }
        const uint8_t *scales = unit + ROWS;
        if constexpr (IS_PER_CHANNEL) {
            uint4 s = kvl_ld16(scales + piece * 16), z = kvl_ld16(scales + 2 * D + piece * 16);
            return make_uint4(kvl_hfma2(h[0], s.x, z.x), kvl_hfma2(h[1], s.y, z.y), kvl_hfma2(h[2], s.z, z.z),
                              kvl_hfma2(h[3], s.w, z.w));
        } else if constexpr (F == KVLI_GPU_INT4) {
            uint32_t both = kvl_ld4(scales + row * TOKEN + piece / 8 * 4);
            uint32_t s = kvl_twice(both), z = kvl_twice(both >> 16);
            return make_uint4(kvl_hfma2(h[0], s, z), kvl_hfma2(h[1], s, z), kvl_hfma2(h[2], s, z),
                              kvl_hfma2(h[3], s, z));
        }
        if constexpr (F == KVLI_GPU_NVFP4)
            return times(h, kvl_nvfp4_scales(scales[row * TOKEN + piece / 2] * 0x101u));
        if (is_k) return make_uint4(h[0], h[1], h[2], h[3]);
        return times(h, kvl_twice(kvl_ld2(scales + row * TOKEN)));
    }
};

/* ---- the kernel, for a preset and a dim ---- */
template <class P, uint32_t D> struct kvl_prefill {
    static constexpr uint32_t THREADS = 32 * KVLI_CU_PREFILL_WARPS;
    static constexpr uint32_t STEP = kvli_cu_prefill_step(D), UNITS = STEP / KVLI_CU_UNIT;
    static constexpr uint32_t WARP_ROWS = kvli_cu_prefill_rows(D) / KVLI_CU_PREFILL_WARPS;
    static constexpr uint32_t TILES = WARP_ROWS / 16; /* m16 tiles of a warp */
    static constexpr uint32_t PIECES = D / 8;         /* 16-byte pieces of a row of f16 */
    static constexpr uint32_t TILE_BYTES = STEP * D * 2, Q_BYTES = kvli_cu_prefill_rows(D) * D * 2;
    static constexpr bool IS_BF16 = P::exact == KVLI_GPU_BF16;
    static constexpr uint32_t HADAMARD = kvl_hadamard_size(D);
    static constexpr float HADAMARD_NORM = kvl_hadamard_norm(HADAMARD);
    typedef kvl_raw<P::k, D> raw_k;
    typedef kvl_raw<P::v, D> raw_v;
    static constexpr uint32_t RAW_UNIT = raw_k::BYTES + raw_v::BYTES;
    static_assert(UNITS * RAW_UNIT + STEP * 4 <= 2 * TILE_BYTES || P::one_class,
                  "bytes and scales of a step fit");

    /* What a thread knows of its warp's rows. In a fragment of a 16 x 8 tile lane 4 g + t has columns 2 t and 2 t + 1 of
       rows g (numbers 0 and 1) and g + 8 (2 and 3); [2] below is these two rows. */
    struct state {
        float o[TILES][D / 8][4];
        float max[TILES][2], sum[TILES][2]; /* sum: of this thread's columns */
        float factor[TILES][2];             /* what makes a sum of q k a score in base 2; above 0 */
        uint32_t x_first, x_last;           /* of the warp's rows; x_first > x_last: it has none */
    };

    /* threadIdx.x, computed with anew where it stands: what depends on it would fill registers throughout the kernel. */
    KVL_D uint32_t thread() { return kvl_opaque(threadIdx.x); }

    /* ---- shared memory ---- */

    /* Exchanges pieces within groups of GROUP, by row: 8 rows' piece of one number stand in 8 different places of 128 bytes. */
    static constexpr uint32_t GROUP = PIECES % 8 == 0 ? 8 : PIECES % 4 == 0 ? 4 : 2;
    KVL_D uint32_t swizzled(uint32_t row, uint32_t piece) {
        return (row * PIECES + (piece ^ (row * GROUP / 8 % GROUP))) * 16;
    }
    /* From there to `pieces` (even) further on. */
    KVL_D uint32_t further(uint32_t at, uint32_t pieces) {
        return (at ^ (pieces % GROUP * 16)) + pieces / GROUP * GROUP * 16;
    }
    KVL_D uint8_t *buffer(uint8_t *smem, uint32_t i) {
        return smem + Q_BYTES + i * 2 * TILE_BYTES;
    } /* K, then V */
    KVL_D float *k_scales(uint8_t *smem) { return (float *)(buffer(smem, 1) + UNITS * RAW_UNIT); }

    /* ---- q ---- */

    /* Where row r of the item begins in a tensor, in elements. */
    KVL_D uint64_t row_offset(const kvli_cu_attend_args &a, const kvli_cu_tensor &t, const kvl_rows &rows,
                              uint32_t r) {
        kvl_row row = kvl_row_of(a, kvl_span_of(a, rows), blockIdx.y, rows.item->row + r);
        return row.tensor_row * t.row_stride + row.head * t.head_stride;
    }

    /* 8 numbers from element `from` on, an aligned place. */
    KVL_D void load8(const kvli_cu_tensor &t, uint64_t from, float x[8]) {
        bool is_f32 = t.dtype == KVLI_GPU_DTYPE_F32;
        const uint8_t *at = (const uint8_t *)t.data + from * (is_f32 ? 4 : 2);
        uint4 v = kvl_ld16(at), more = is_f32 ? kvl_ld16(at + 16) : v;
        const uint32_t w[8] = {v.x, v.y, v.z, v.w, more.x, more.y, more.z, more.w};
        KVL_UNROLL
        for (int i = 0; i < 8; i++) {
            uint16_t half = (uint16_t)(w[i / 2] >> (i % 2 * 16));
            float y = t.dtype == KVLI_GPU_DTYPE_F16 ? kvl_h2f(half) : kvl_bf2f(half);
            x[i] = is_f32 ? __uint_as_float(w[i]) : y;
        }
    }

    /* A row of which each lane has 8 numbers. */
    KVL_D void rotate_row(float x[8]) {
        KVL_UNROLL
        for (uint32_t stride = 1; stride < HADAMARD; stride *= 2) {
            KVL_UNROLL
            for (uint32_t i = 0; i < 8; i++) {
                if (stride >= 8) {
                    float other = __shfl_xor_sync(KVL_ALL_LANES, x[i], stride / 8);
                    x[i] = threadIdx.x & (stride / 8) ? other - x[i] : x[i] + other;
                } else if (!(i & stride)) {
                    float a = x[i], b = x[i + stride];
                    x[i] = a + b;
                    x[i + stride] = a - b;
                }
            }
        }
        KVL_UNROLL
        for (uint32_t i = 0; i < 8; i++) x[i] *= HADAMARD_NORM;
    }

    /* The largest power of two up to the row's largest number: q divided by it fits f16. */
    KVL_D float row_power(const float x[8]) {
        float largest = 0;
        KVL_UNROLL
        for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(x[i]));
        KVL_UNROLL
        for (int lane = 1; lane < 32; lane *= 2)
            largest = fmaxf(largest, __shfl_xor_sync(KVL_ALL_LANES, largest, lane));
        return kvl_row_power(largest);
    }

    KVL_D uint32_t pack(float low, float high) {
        if constexpr (IS_BF16)
            return kvl_f22bf2(low, high);
        else
            return kvl_f22h2(low, high);
    }

    /* The warp's rows of q to shared memory, to be read after a barrier, and their factors. global: what K's numbers lack. */
    KVL_D void load_q(state &s, uint8_t *smem, const kvli_cu_attend_args &a, const kvl_rows &rows,
                      bool rotated, float global) {
        constexpr uint32_t AT_ONCE = P::k_rotated ? 2 : 4; /* rows whose reads are under way together */
        uint32_t lane = thread() % 32, first = thread() / 32 * WARP_ROWS;
        uint32_t size = a.q.dtype == KVLI_GPU_DTYPE_F32 ? 4 : 2;
        bool aligned = ((a.q.data | a.q.row_stride * size | a.q.head_stride * size) & 15) == 0;
        uint64_t mine = row_offset(a, a.q, rows, first + lane); /* of row `lane`, as is: */
        float power = 1;
        KVL_ROLLED
        for (uint32_t i = 0; i < WARP_ROWS; i += AT_ONCE) {
            float x[AT_ONCE][8] = {};
            KVL_UNROLL
            for (uint32_t j = 0; j < AT_ONCE; j++) {
                uint64_t from = __shfl_sync(KVL_ALL_LANES, mine, i + j) + lane * 8;
                if (aligned && first + i + j < rows.item->n_rows && lane < PIECES) load8(a.q, from, x[j]);
            }
            KVL_ROLLED
            for (uint32_t n = aligned ? AT_ONCE * 8 : 0; n < AT_ONCE * 8;
                 n++) { /* rare: small code, not fast */
                uint64_t from = __shfl_sync(KVL_ALL_LANES, mine, i + n / 8) + lane * 8 + n % 8;
                bool here = first + i + n / 8 < rows.item->n_rows && lane < PIECES;
                float y = here ? kvl_number_at(a.q, from) : 0;
                KVL_UNROLL
                for (uint32_t j = 0; j < AT_ONCE * 8; j++) x[j / 8][j % 8] = j == n ? y : x[j / 8][j % 8];
            }
            KVL_UNROLL
            for (uint32_t j = 0; j < AT_ONCE; j++) {
                if (P::k_rotated && rotated) rotate_row(x[j]);
                float p = row_power(x[j]), inverse = __uint_as_float(0x7f000000u - __float_as_uint(p));
                if (a.scale < 0) inverse = -inverse;
                if (lane == i + j) power = p;
                KVL_UNROLL
                for (int e = 0; e < 8; e++) x[j][e] *= inverse;
                if (lane < PIECES) {
                    kvl_st16(smem + swizzled(first + i + j, lane),
                             make_uint4(pack(x[j][0], x[j][1]), pack(x[j][2], x[j][3]),
                                        pack(x[j][4], x[j][5]), pack(x[j][6], x[j][7])));
                }
            }
        }
        KVL_UNROLL
        for (uint32_t i = 0; i < TILES * 2; i++) {
            float p = __shfl_sync(KVL_ALL_LANES, power, i * 8 + lane / 4);
            s.factor[i / 2][i % 2] = fmaxf(p * (fabsf(a.scale) * KVL_LOG2E * global), 0x1p-96f);
        }
    }

    /* ---- K and V to shared memory ---- */

    /* A run of bytes, by all threads. */
    template <uint32_t BYTES> KVL_D void copy(uint8_t *dst, const uint8_t *src, bool valid) {
        KVL_UNROLL
        for (uint32_t i = 0; i < BYTES; i += THREADS * 16) {
            uint32_t at = i + threadIdx.x * 16;
            if (i + THREADS * 16 <= BYTES || at < BYTES) kvl_cp_async16(dst + at, src + at, valid);
        }
    }
    template <class Raw>
    KVL_D void copy_packed(uint8_t *dst, const uint8_t *tile, uint32_t row, uint32_t T, bool valid) {
        copy<Raw::ROWS>(dst, tile + row * Raw::ROW, valid);
        const uint8_t *scales = tile + T * Raw::ROW;
        if constexpr (Raw::TOKENS) copy<Raw::TOKENS>(dst + Raw::ROWS, scales + row * Raw::TOKEN, valid);
        if constexpr (Raw::CHANNELS) copy<Raw::CHANNELS>(dst + Raw::ROWS, scales, valid);
    }

    /* The bytes of packed units. One that is absent becomes zeros, which decode to zeros. */
    KVL_D void issue_packed(uint8_t *dst, const kvl_step<UNITS> &step, uint32_t T) {
        KVL_UNROLL
        for (uint32_t u = 0; u < UNITS; u++) {
            uint32_t row = (step.token + u * KVLI_CU_UNIT) % T;
            bool valid = step.has(u);
            copy_packed<raw_k>(dst + u * RAW_UNIT, step.tiles[u].k, row, T, valid);
            copy_packed<raw_v>(dst + u * RAW_UNIT + raw_k::BYTES, step.tiles[u].v, row, T, valid);
        }
    }

    /* Exact units. Rows that are absent or not yet written become zeros: a weight of 0 does not take a NaN away. */
    KVL_D void issue_exact(uint8_t *dst, const kvl_step<UNITS> &step, uint32_t T, uint32_t written) {
        const uint32_t me = thread();
        KVL_UNROLL
        for (uint32_t u = 0; u < UNITS; u++) {
            uint32_t token = step.token + u * KVLI_CU_UNIT, row = token % T, end = step.has(u) ? written : 0;
            KVL_UNROLL
            for (uint32_t i = 0; i < KVLI_CU_UNIT * PIECES; i += THREADS) {
                uint32_t at = i + me, r = at / PIECES;
                if (at >= KVLI_CU_UNIT * PIECES) break;
                uint32_t to = swizzled(u * KVLI_CU_UNIT + r, at % PIECES), from = row * D * 2 + at * 16;
                kvl_cp_async16(dst + to, step.tiles[u].k + from, token + r < end);
                kvl_cp_async16(dst + TILE_BYTES + to, step.tiles[u].v + from, token + r < end);
            }
        }
    }

    /* All threads: the bytes in buffer 1 -> f16 tiles in buffer 0. */
    KVL_D void decode(uint8_t *smem) {
        const uint32_t me = thread();
        uint8_t *to = buffer(smem, 0);
        const uint8_t *raw = buffer(smem, 1);
        for (uint32_t i = me; i < STEP * PIECES; i += THREADS) {
            uint32_t row = i / PIECES, piece = i % PIECES;
            const uint8_t *unit = raw + row / KVLI_CU_UNIT * RAW_UNIT;
            kvl_st16(to + swizzled(row, piece), raw_k::decode(unit, row % KVLI_CU_UNIT, piece, true));
            kvl_st16(to + TILE_BYTES + swizzled(row, piece),
                     raw_v::decode(unit + raw_k::BYTES, row % KVLI_CU_UNIT, piece, false));
        }
        if (raw_k::IS_PER_TOKEN && me < STEP) {
            const uint8_t *unit = raw + me / KVLI_CU_UNIT * RAW_UNIT + raw_k::ROWS;
            k_scales(smem)[me] = kvl_h2f(kvl_ld2(unit + me % KVLI_CU_UNIT * 2));
        }
    }

    /* ---- one step, for one warp ---- */
    typedef float scores[TILES][STEP / 8][4];

    KVL_D void mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
        if constexpr (IS_BF16)
            kvl_mma_bf16(c, a, b);
        else
            kvl_mma_f16(c, a, b);
    }

    KVL_D void q_times_k(scores &c, const uint8_t *q, const uint8_t *k) {
        uint32_t lane = thread() % 32;
        uint32_t q_at = swizzled(lane % 16, lane / 16),
                 k_at = swizzled(lane % 8 + lane / 16 * 8, lane / 8 % 2);
        KVL_UNROLL
        for (uint32_t d = 0; d < D / 16; d++) {
            uint32_t qf[TILES][4];
            KVL_UNROLL
            for (uint32_t m = 0; m < TILES; m++)
                kvl_ldmatrix_x4(qf[m], q + further(q_at, 2 * d) + m * 16 * D * 2);
            KVL_UNROLL
            for (uint32_t u = 0; u < UNITS; u++) {
                uint32_t kf[4];
                kvl_ldmatrix_x4(kf, k + further(k_at, 2 * d) + u * 16 * D * 2);
                KVL_UNROLL
                for (uint32_t m = 0; m < TILES; m++) {
                    mma(c[m][2 * u], qf[m], kf);
                    mma(c[m][2 * u + 1], qf[m], kf + 2);
                }
            }
        }
    }

    KVL_D void p_times_v(state &s, const uint32_t p[TILES][UNITS][4], const uint8_t *v) {
        uint32_t lane = thread() % 32, v_at = swizzled(lane % 16, lane / 16);
        KVL_UNROLL
        for (uint32_t u = 0; u < UNITS; u++) {
            KVL_UNROLL
            for (uint32_t d = 0; d < D / 16; d++) {
                uint32_t vf[4];
                kvl_ldmatrix_x4_trans(vf, v + further(v_at, 2 * d) + u * 16 * D * 2);
                KVL_UNROLL
                for (uint32_t m = 0; m < TILES; m++) {
                    mma(s.o[m][2 * d], p[m][u], vf);
                    mma(s.o[m][2 * d + 1], p[m][u], vf + 2);
                }
            }
        }
    }

    /* Calls body(number, row tile, row half, column tile) for each score of the thread. */
    template <class Body> KVL_D void each(scores &c, Body &&body) {
        KVL_UNROLL
        for (uint32_t n = 0; n < STEP / 8; n++) {
            KVL_UNROLL
            for (uint32_t m = 0; m < TILES; m++) {
                KVL_UNROLL
                for (uint32_t i = 0; i < 4; i++) body(c[m][n][i], m, i / 2, n, i % 2);
            }
        }
    }

    KVL_D void scale_tokens(scores &c, const float *k_scale) {
        uint32_t t = thread() % 4;
        each(c, [&](float &x, uint32_t, uint32_t, uint32_t n, uint32_t column) {
            x *= k_scale[8 * n + 2 * t + column];
        });
    }

    /* softcap * tanh(score / softcap) as 1 - 2 / (1 + e^2x): an error of 2^-23 of softcap, where sums are no better. What
       comes out still lacks the factor. */
    KVL_D void cap(scores &c, const state &s, float softcap) {
        KVL_UNROLL
        for (uint32_t r = 0; r < TILES * 2; r++) {
            float factor = s.factor[r / 2][r % 2], limit = softcap * KVL_LOG2E * kvl_rcp(factor);
            float inner = factor * kvl_rcp(softcap) * 2;
            KVL_UNROLL
            for (uint32_t n = 0; n < STEP / 4; n++) {
                float &x = c[r / 2][n / 2][r % 2 * 2 + n % 2];
                x = limit - 2 * limit * kvl_rcp(1 + kvl_exp2(x * inner));
            }
        }
    }

    KVL_D void hide(scores &c, const kvli_cu_attend_args &a, const kvl_rows &rows,
                    const kvl_step<UNITS> &step) {
        uint32_t x[TILES * 2], first = thread() / 32 * WARP_ROWS + thread() % 32 / 4;
        KVL_UNROLL
        for (uint32_t r = 0; r < TILES * 2; r++) x[r] = kvl_position(a, rows, first + r * 8);
        KVL_UNROLL
        for (uint32_t n = 0; n < STEP / 4; n++) {
            uint32_t token = step.token + n / 2 * 8 + thread() % 4 * 2 + n % 2;
            kvl_range by = kvl_seen_by(rows.sight, step.own(), step.has(n / 4) ? token : KVL_NO_TOKEN);
            KVL_UNROLL
            for (uint32_t r = 0; r < TILES * 2; r++) {
                if (x[r] < by.first || x[r] > by.last) c[r / 2][n / 2][r % 2 * 2 + n % 2] = -INFINITY;
            }
        }
    }

    /* Raises the maxima that are 2^8 or more too low. */
    KVL_D void raise_max(state &s, scores &c) {
        float top[TILES][2], rescale[TILES][2];
        bool raised = false;
        KVL_UNROLL
        for (uint32_t r = 0; r < TILES * 2; r++) top[r / 2][r % 2] = -INFINITY;
        each(c,
             [&](float &x, uint32_t m, uint32_t h, uint32_t, uint32_t) { top[m][h] = fmaxf(top[m][h], x); });
        KVL_UNROLL
        for (uint32_t r = 0; r < TILES * 2; r++) {
            float x = top[r / 2][r % 2], &max = s.max[r / 2][r % 2];
            x = fmaxf(x, __shfl_xor_sync(KVL_ALL_LANES, x, 1));
            x = fmaxf(x, __shfl_xor_sync(KVL_ALL_LANES, x, 2)) * s.factor[r / 2][r % 2];
            bool raise = x > max + 8;
            rescale[r / 2][r % 2] = raise ? kvl_exp2(max - x) : 1;
            max = raise ? x : max;
            raised |= raise;
        }
        if (!__any_sync(KVL_ALL_LANES, raised)) return;
        KVL_UNROLL
        for (uint32_t m = 0; m < TILES; m++) {
            s.sum[m][0] *= rescale[m][0];
            s.sum[m][1] *= rescale[m][1];
            KVL_UNROLL
            for (uint32_t i = 0; i < D / 8 * 4; i++) s.o[m][i / 4][i % 4] *= rescale[m][i % 4 / 2];
        }
    }

    KVL_D void attend(state &s, uint8_t *smem, uint32_t from, const kvl_step<UNITS> &step,
                      const kvli_cu_attend_args &a, const kvl_rows &rows, bool packed) {
        if (s.x_first > s.x_last || !kvl_step_any_sees(rows.sight, step, s.x_first, s.x_last)) return;
        const uint8_t *k = buffer(smem, from);
        scores c = {};
        q_times_k(c, smem + thread() / 32 * WARP_ROWS * D * 2, k);
        if (raw_k::IS_PER_TOKEN && packed) scale_tokens(c, k_scales(smem));
        if (a.softcap != 0) cap(c, s, a.softcap);
        if (!kvl_step_all_see(rows.sight, step, s.x_first, s.x_last)) hide(c, a, rows, step);
        raise_max(s, c);
        uint32_t p[TILES][UNITS][4];
        each(c, [&](float &x, uint32_t m, uint32_t h, uint32_t n, uint32_t column) {
            x = kvl_exp2(__fmaf_rn(x, s.factor[m][h], -s.max[m][h]));
            s.sum[m][h] += x;
            if (column == 1) p[m][n / 2][n % 2 * 2 + h] = pack(c[m][n][2 * h], x);
        });
        p_times_v(s, p, k + TILE_BYTES);
    }

    /* ---- the end of the packed blocks, and of all ---- */

    /* The warp's quarter of all shared memory holds its rows of O as f32. */
    static_assert(Q_BYTES + 4 * TILE_BYTES == KVLI_CU_PREFILL_WARPS * WARP_ROWS * D * 4, "all shared memory");
    KVL_D float *quarter(uint8_t *smem) { return (float *)smem + thread() / 32 * WARP_ROWS * D; }

    /* Calls body(pair of numbers of O, their place in the quarter). */
    template <class Body> KVL_D void each_pair(state &s, uint8_t *smem, Body &&body) {
        float *mine = quarter(smem) + thread() % 32 / 4 * D + thread() % 4 * 2;
        KVL_UNROLL
        for (uint32_t i = 0; i < TILES * 2; i++) {
            KVL_UNROLL
            for (uint32_t j = 0; j < D / 8; j++)
                body(&s.o[i / 2][j][i % 2 * 2], (float2 *)(mine + i * 8 * D + 8 * j));
        }
    }
    KVL_D void o_to_quarter(state &s, uint8_t *smem) {
        __syncthreads();
        each_pair(s, smem, [](const float *o, float2 *to) { *to = make_float2(o[0], o[1]); });
        __syncwarp();
    }

    /* The rotation of values undone, a row at a time. */
    KVL_D void unrotate(state &s, uint8_t *smem) {
        o_to_quarter(s, smem);
        uint32_t lane = thread() % 32;
        KVL_ROLLED
        for (uint32_t r = 0; r < WARP_ROWS; r++) {
            float x[8] = {}, *at = quarter(smem) + r * D + lane * 8;
            KVL_UNROLL
            for (int i = 0; i < 8; i++) x[i] = lane < PIECES ? at[i] : 0;
            rotate_row(x);
            KVL_UNROLL
            for (int i = 0; i < 8; i++) {
                if (lane < PIECES) at[i] = x[i];
            }
        }
        __syncwarp();
        each_pair(s, smem, [](float *o, const float2 *from) { o[0] = from->x, o[1] = from->y; });
        __syncwarp();
    }

    KVL_D void finish_packed(state &s, uint8_t *smem, float v_global) {
        if constexpr (P::v_rotated) unrotate(s, smem);
        if constexpr (P::v == KVLI_GPU_NVFP4) {
            KVL_UNROLL
            for (uint32_t i = 0; i < TILES * D / 8 * 4; i++) {
                s.o[i / (D / 2)][i / 4 % (D / 8)][i % 4] *= v_global * KVL_NVFP4_FACTOR;
            }
        }
    }

    /* 8 numbers, times factor, to element `at` on of an array. */
    KVL_D void store8(uint64_t data, uint64_t at, uint32_t dtype, bool aligned, const float *from,
                      float factor) {
        if (!aligned) {
            KVL_ROLLED
            for (int i = 0; i < 8; i++) {
                float x = from[i] * factor;
                if (dtype == KVLI_GPU_DTYPE_F32)
                    ((float *)data)[at + i] = x;
                else
                    ((uint16_t *)data)[at + i] = dtype == KVLI_GPU_DTYPE_F16 ? kvl_f2h(x) : kvl_f2bf(x);
            }
            return;
        }
        float x[8];
        uint32_t w[8];
        KVL_UNROLL
        for (int i = 0; i < 8; i++) x[i] = from[i] * factor;
        KVL_UNROLL
        for (int i = 0; i < 8; i++) {
            w[i] = __float_as_uint(x[i]);
            if (dtype != KVLI_GPU_DTYPE_F32 && i < 4) {
                w[i] = dtype == KVLI_GPU_DTYPE_F16 ? kvl_f22h2(x[2 * i], x[2 * i + 1])
                                                   : kvl_f22bf2(x[2 * i], x[2 * i + 1]);
            }
        }
        uint8_t *to = (uint8_t *)data + at * (dtype == KVLI_GPU_DTYPE_F32 ? 4 : 2);
        kvl_st16(to, make_uint4(w[0], w[1], w[2], w[3]));
        if (dtype == KVLI_GPU_DTYPE_F32) kvl_st16(to + 16, make_uint4(w[4], w[5], w[6], w[7]));
    }

    /* The warp's rows from its quarter to out or to partial results. factor: of row `lane`. */
    KVL_D void write_rows(uint8_t *smem, const kvli_cu_attend_args &a, const kvl_rows &rows, float factor) {
        bool partial = rows.item->partial != KVLI_GPU_NONE;
        uint32_t first = thread() / 32 * WARP_ROWS,
                 dtype = partial ? (uint32_t)KVLI_GPU_DTYPE_F32 : a.out.dtype;
        uint32_t size = dtype == KVLI_GPU_DTYPE_F32 ? 4 : 2;
        bool aligned =
            partial || ((a.out.data | a.out.row_stride * size | a.out.head_stride * size) & 15) == 0;
        uint64_t data = partial ? (uint64_t)a.partial_o : a.out.data,
                 mine = row_offset(a, a.out, rows, first + thread() % 32);
        if (partial) mine = kvl_partial_number(a, *rows.item, first + thread() % 32) * D;
        KVL_ROLLED
        for (uint32_t i = thread() % 32; i < WARP_ROWS * PIECES; i += 32) {
            uint32_t r = i / PIECES, e = i % PIECES * 8;
            uint64_t at = __shfl_sync(KVL_ALL_LANES, mine, r) + e;
            float f = __shfl_sync(KVL_ALL_LANES, factor, r);
            if (first + r < rows.item->n_rows) store8(data, at, dtype, aligned, quarter(smem) + i * 8, f);
        }
    }

    /* Of row `lane`, what the lanes of fragments have of theirs. */
    KVL_D float of_row(const float of[TILES][2]) {
        float x = 0;
        KVL_UNROLL
        for (uint32_t i = 0; i < TILES * 2; i++) {
            float y = __shfl_sync(KVL_ALL_LANES, of[i / 2][i % 2], thread() % 8 * 4);
            if (thread() % 32 / 8 == i) x = y;
        }
        return x;
    }

    KVL_D void finish(state &s, uint8_t *smem, const kvli_cu_attend_args &a, const kvl_rows &rows) {
        KVL_UNROLL
        for (uint32_t i = 0; i < TILES * 2; i++) {
            float &sum = s.sum[i / 2][i % 2];
            sum += __shfl_xor_sync(KVL_ALL_LANES, sum, 1);
            sum += __shfl_xor_sync(KVL_ALL_LANES, sum, 2);
        }
        float max = of_row(s.max), sum = of_row(s.sum), factor = 1;
        uint32_t lane = thread() % 32, r = thread() / 32 * WARP_ROWS + lane;
        if (rows.item->partial == KVLI_GPU_NONE) {
            uint32_t head = blockIdx.y * a.gqa + (rows.item->row + r) % a.gqa;
            factor = kvl_output_factor(a, head, max, sum);
        } else if (lane < WARP_ROWS && r < rows.item->n_rows) {
            float *ml = a.partial_ml + kvl_partial_number(a, *rows.item, r) * 2;
            ml[0] = max;
            ml[1] = sum;
        }
        o_to_quarter(s, smem);
        write_rows(smem, a, rows, factor);
    }

    /* ---- all of it ---- */
    KVL_D void start(state &s, const kvli_cu_attend_args &a, const kvl_rows &rows) {
        uint32_t first = thread() / 32 * WARP_ROWS;
        KVL_UNROLL
        for (uint32_t i = 0; i < TILES * D / 8 * 4; i++) s.o[i / (D / 2)][i / 4 % (D / 8)][i % 4] = 0;
        KVL_UNROLL
        for (uint32_t i = 0; i < TILES * 2; i++) {
            s.max[i / 2][i % 2] = KVL_NO_SCORE;
            s.sum[i / 2][i % 2] = 0;
        }
        uint32_t n = rows.item->n_rows, last = first + WARP_ROWS < n ? first + WARP_ROWS : n;
        s.x_first = kvl_position(a, rows, first);
        s.x_last = kvl_position(a, rows, last - 1);
        if (first >= n) {
            s.x_first = 1;
            s.x_last = 0;
        }
    }

    /* All steps over one kind of blocks. False: there were none. */
    KVL_D bool walk(state &s, uint8_t *smem, const kvli_cu_attend_args &a, const kvl_rows &rows,
                    kvl_walk_kind kind) {
        const bool packed = !P::one_class && kind == KVL_WALK_PACKED;
        const uint32_t written = kvl_written(a, rows);
        uint32_t from = 0; /* buffer of the step that is computed */
        kvl_walk w = kvl_walk_start(rows);
        kvl_step<UNITS> step, next;
        step.flags = 0;
        KVL_ROLLED
        for (;;) {
            kvl_walk_step(w, a, rows, kind, next);
            bool some = step.flags != 0, more = next.flags != 0;
            kvl_cp_wait<0>();
            __syncthreads();
            if constexpr (!P::one_class) {
                if (packed && some) {
                    decode(smem);
                    __syncthreads();
                }
                if (packed && more) issue_packed(buffer(smem, 1), next, a.block_tokens);
            }
            if (more && !packed) issue_exact(buffer(smem, from ^ 1), next, a.block_tokens, written);
            kvl_cp_commit();
            if (some) attend(s, smem, from, step, a, rows, packed);
            if (!more) return some;
            if (!packed) from ^= 1;
            step = next;
        }
    }

    KVL_D void run(const kvli_cu_attend_args &a) {
        KVL_DYN_SMEM(uint8_t, smem);
        kvl_rows rows;
        if (!kvl_rows_of_block(a, a.counts->prefills, rows)) return;
        state s;
        start(s, a, rows);
        for (uint32_t kind = !P::one_class ? KVL_WALK_PACKED : KVL_WALK_ALL;;) {
            bool packed = kind == KVL_WALK_PACKED;
            float global = P::k == KVLI_GPU_NVFP4 && packed ? a.k_global * KVL_NVFP4_FACTOR : 1;
            if (kind != KVL_WALK_EXACT || P::k_rotated || P::v_rotated)
                load_q(s, smem, a, rows, packed, global);
            bool some = walk(s, smem, a, rows, (kvl_walk_kind)kind);
            if (P::one_class || !packed) break;
            if (some) finish_packed(s, smem, a.v_global);
            kind = KVL_WALK_EXACT;
            __syncthreads(); /* all shared memory is free again */
        }
        finish(s, smem, a, rows);
    }
};

#define KVL_PREFILL(preset, dim)                                                                    \
    KVL_KERNEL(kvl_prefill_##preset##_d##dim, 32 * KVLI_CU_PREFILL_WARPS, 2, kvli_cu_attend_args) { \
        if constexpr (KVL_ARCH >= 800 || kvl_preset_##preset::exact != KVLI_GPU_BF16) {             \
            kvl_prefill<kvl_preset_##preset, dim>::run(a);                                          \
        }                                                                                           \
    }
#define KVL_PREFILL_DIMS(preset) \
    KVL_PREFILL(preset, 64)      \
    KVL_PREFILL(preset, 80)      \
    KVL_PREFILL(preset, 96)      \
    KVL_PREFILL(preset, 128)     \
    KVL_PREFILL(preset, 192)     \
    KVL_PREFILL(preset, 256)
KVL_PREFILL_DIMS(f16)
KVL_PREFILL_DIMS(bf16)
KVL_PREFILL_DIMS(int8)
KVL_PREFILL_DIMS(int8c)
KVL_PREFILL_DIMS(fp8)
KVL_PREFILL_DIMS(nvfp4)
KVL_PREFILL_DIMS(balanced)
KVL_PREFILL_DIMS(int4)
