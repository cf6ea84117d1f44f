/* Attention of a few query rows (one token's query heads of a KV head, or those of some draft tokens) over many cached ones.

   A block of 4 warps takes an item: up to N packed query rows, one KV head, a range of blocks. Each warp takes units of 16
   tokens in turn and keeps a softmax of its own; at the end the warps' sums are added in a fixed order, so that equal input
   gives equal bits. A unit, with the 16 tokens as M, the queries as N of an m16n8k16 product:
       S^T (16 x N)  = K (16 x D) Q^T (D x N)           K rows straight from their bytes into A fragments
       P^T           = 2^(S^T - m)                      f32, base 2; m moves only if a score is above it by 8
       O^T (D x N)  += V^T (D x 16) P^T (16 x N)        V bytes of two tokens zipped into A fragments; P^T by movmatrix
   No ldmatrix, no transposed copy: which head dim stands where in a fragment is free (formats.cuh), so each lane reads
   pieces of rows as they lie in memory.

   An item has two phases: packed blocks, then exact ones (sinks and own blocks), whose q is not rotated. Packed values that
   are rotated are turned back between the two, in shared memory.

   Roofline: bytes. A unit costs 16 * (K and V row bytes) + scales of device memory traffic, and each byte crosses shared memory
   twice. To hide the latency each warp has a ring of `stages` units in flight: bulk copies (sm_90), cp.async (sm_80), or none
   (sm_75: straight to registers, as exact units of packed formats everywhere). Issue slots come next: instructions for 16 x D
   keys and values, D = 128, N = 8: see formats.cuh, plus D / 8 mma and about 60 for the softmax and the ring. */
#include "formats.cuh"
#include "pages.cuh"

constexpr uint32_t KVL_WARPS = KVLI_CU_DECODE_WARPS, KVL_UNIT = KVLI_CU_UNIT;
constexpr uint32_t KVL_ALL_LANES = 0xffffffff;
constexpr float KVL_LOG2E = 1.4426950408889634f;
constexpr float KVL_NOTHING = -1e38f; /* m of a row that has seen nothing */
constexpr float KVL_SLACK = 8;        /* how far a score may be above m: weights up to 2^8 */

/* Formats of the packed and the exact class, and whether packed K and V are rotated. */
template <uint32_t K, uint32_t V, uint32_t EXACT, bool K_ROTATED, bool V_ROTATED> struct kvl_preset {
    static constexpr uint32_t k = K, v = V, exact = EXACT;
    static constexpr bool k_rotated = K_ROTATED, v_rotated = V_ROTATED, one_class = K == EXACT;
};
typedef kvl_preset<KVLI_CU_F16, KVLI_CU_F16, KVLI_CU_F16, false, false> kvl_preset_f16;
typedef kvl_preset<KVLI_CU_BF16, KVLI_CU_BF16, KVLI_CU_BF16, false, false> kvl_preset_bf16;
typedef kvl_preset<KVLI_CU_INT8, KVLI_CU_INT8, KVLI_CU_F16, false, false> kvl_preset_int8;
typedef kvl_preset<KVLI_CU_INT8_CHANNEL, KVLI_CU_INT8, KVLI_CU_F16, false, false> kvl_preset_int8c;
typedef kvl_preset<KVLI_CU_FP8_E4M3, KVLI_CU_FP8_E4M3, KVLI_CU_F16, false, false> kvl_preset_fp8;
typedef kvl_preset<KVLI_CU_NVFP4, KVLI_CU_NVFP4, KVLI_CU_F16, true, false> kvl_preset_nvfp4;
typedef kvl_preset<KVLI_CU_INT8, KVLI_CU_INT4, KVLI_CU_F16, false, true> kvl_preset_balanced;
typedef kvl_preset<KVLI_CU_INT4_CHANNEL, KVLI_CU_INT4, KVLI_CU_F16, false, true> kvl_preset_int4;

/* ---- 16-bit arithmetic of a class: bfloat16 where it is the format, else f16 ---- */
template <uint32_t F> KVL_D uint16_t kvl_to_16(float x) { return F == KVLI_CU_BF16 ? kvl_f2bf(x) : kvl_f2h(x); }
template <uint32_t F> KVL_D uint32_t kvl_pack(float low, float high) {
    return F == KVLI_CU_BF16 ? kvl_f22bf2(low, high) : kvl_f22h2(low, high);
}
template <uint32_t F> KVL_D void kvl_mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    if constexpr (F == KVLI_CU_BF16) kvl_mma_bf16(c, a, b);
    else kvl_mma_f16(c, a, b);
}

/* ---- shared memory, as kvli_cu_decode_smem counts it ---- */
template <class P, uint32_t D, uint32_t N> struct kvl_shared {
    static constexpr uint32_t q_stride = D + 4;
    uint8_t *ring;
    float *sum;      /* [N x D] at kvl_sum_index */
    uint16_t *q;     /* [1 or 2][N][q_stride]: for packed keys, for exact keys if they differ */
    float *warp_m, *warp_l;   /* [WARPS][N] */
    float *total_m, *total_l; /* [N] of `sum` */
    float *factor;            /* [2][N] from q·k to a score, packed and exact */
    uint32_t *exact_seen;     /* [WARPS] */

    KVL_MEMBER kvl_shared(uint8_t *memory, uint32_t stages) {
        ring = memory;
        sum = (float *)(memory + KVL_WARPS * stages * kvli_cu_decode_slot(P::k, P::v, D));
        q = (uint16_t *)(sum + N * D);
        warp_m = (float *)(q + (P::k_rotated ? 2 : 1) * N * q_stride);
        warp_l = warp_m + KVL_WARPS * N;
        total_m = warp_l + KVL_WARPS * N;
        total_l = total_m + N;
        factor = total_l + N;
        exact_seen = (uint32_t *)(factor + 2 * N);
    }
};

/* Where dim `e` of row `r` stands among the sums: 8 rows beside each other, dims in fours that fill the 32 banks, shuffled so
   that dims any power of two apart differ in bank. */
template <uint32_t D> KVL_D uint32_t kvl_sum_index(uint32_t r, uint32_t e) {
    return r / 8 * (8 * D) + e / 4 * 32 + ((e ^ e >> 2 ^ e >> 4 ^ e >> 6) & 3) * 8 + r % 8;
}

/* ---- a row of a head across a warp: lane has dims lane, lane + 32, … ---- */
template <uint32_t D> struct kvl_spread {
    static constexpr uint32_t count = (D + 31) / 32;
    float x[count];
};
template <uint32_t D> KVL_D bool kvl_spread_has(uint32_t lane, uint32_t i) { return D % 32 == 0 || lane + 32 * i < D; }

KVLI_CU_FN uint32_t kvl_hadamard_size(uint32_t dim) {
    uint32_t n = 1;
    while (n < 128 && dim % (2 * n) == 0) n *= 2;
    return n;
}

/* Times the Hadamard matrix (its own inverse), block-diagonal in blocks of kvl_hadamard_size. */
template <uint32_t D> KVL_D void kvl_hadamard(kvl_spread<D> &row, uint32_t lane) {
    constexpr uint32_t size = kvl_hadamard_size(D);
    constexpr float norm = size == 128 ? 0.08838834764831845f : size == 64 ? 0.125f : size == 32 ? 0.17677669529663687f : 0.25f;
    KVL_UNROLL for (uint32_t stride = 1; stride < 32 && stride < size; stride *= 2) {
        KVL_UNROLL for (uint32_t i = 0; i < row.count; i++) {
            float other = __shfl_xor_sync(KVL_ALL_LANES, row.x[i], stride);
            row.x[i] = lane & stride ? other - row.x[i] : row.x[i] + other;
        }
    }
    KVL_UNROLL for (uint32_t apart = 1; 32 * apart < size; apart *= 2) {
        KVL_UNROLL for (uint32_t i = 0; i < row.count; i++) {
            if (i & apart) continue;
            float low = row.x[i], high = row.x[i + apart];
            row.x[i] = low + high;
            row.x[i + apart] = low - high;
        }
    }
    KVL_UNROLL for (uint32_t i = 0; i < row.count; i++) row.x[i] *= norm;
}

/* ---- queries ---- */

/* The power of two at or below a row's largest magnitude, within what has an inverse. */
KVL_D float kvl_row_power(float largest) {
    uint32_t exponent = __float_as_uint(largest) >> 23;
    return __uint_as_float((exponent < 1 ? 1 : exponent > 253 ? 253 : exponent) << 23);
}

/* Where a head dim's number stands in a stored query row, such that each step of kvl_k_codes finds its four beside each
   other. */
template <uint32_t K> KVL_D uint32_t kvl_q_place(uint32_t e, uint32_t row_bytes) {
    if (K != KVLI_CU_NVFP4) return e;
    bool two_byte_piece = row_bytes % 32 == 8 && e >= 2 * (row_bytes - 8);
    if (two_byte_piece) return (e & ~3u) + e % 2 * 2 + e / 2 % 2;
    return (e & ~7u) + e / 2 % 2 * 4 + e % 2 * 2 + e / 4 % 2;
}

/* A query row over its power of two, rounded to 16 bits, for keys of format K. Returns the power. */
template <uint32_t K, uint32_t D> KVL_D float kvl_store_query(uint16_t *to, const kvl_spread<D> &row, uint32_t lane) {
    float largest = 0;
    KVL_UNROLL for (uint32_t i = 0; i < row.count; i++) largest = fmaxf(largest, fabsf(row.x[i]));
    KVL_UNROLL for (uint32_t x = 16; x; x /= 2) largest = fmaxf(largest, __shfl_xor_sync(KVL_ALL_LANES, largest, x));
    float power = kvl_row_power(largest), inverse = __uint_as_float((254u << 23) - __float_as_uint(power));
    KVL_UNROLL for (uint32_t i = 0; i < row.count; i++) {
        uint32_t e = lane + 32 * i;
        if (kvl_spread_has<D>(lane, i)) to[kvl_q_place<K>(e, kvli_cu_row_bytes(K, D))] = kvl_to_16<K>(row.x[i] * inverse);
    }
    return power;
}

/* All query rows of the item into shared memory, and the factors of their scores. */
template <class P, uint32_t D, uint32_t N>
KVL_D void kvl_prepare_queries(const kvli_cu_attend_args &a, const kvli_cu_item &item, const kvl_shared<P, D, N> &s) {
    uint32_t lane = threadIdx.x % 32;
    float to_score = a.softcap != 0 ? a.scale / a.softcap : a.scale * KVL_LOG2E;
    float packed_factor = P::k == KVLI_CU_NVFP4 ? to_score * KVL_NVFP4_FACTOR * a.k_global : to_score;
    for (uint32_t r = threadIdx.x / 32; r < N; r += KVL_WARPS) {
        kvl_row row = kvl_row_of(a, a.spans[item.span], blockIdx.y, item.row + (r < item.n_rows ? r : 0));
        kvl_spread<D> x;
        KVL_UNROLL for (uint32_t i = 0; i < x.count; i++) {
            bool has = r < item.n_rows && kvl_spread_has<D>(lane, i);
            x.x[i] = has ? kvl_tensor_get(a.q, row.tensor_row, row.head, lane + 32 * i) : 0;
        }
        uint16_t *to = s.q + r * s.q_stride;
        if constexpr (P::k_rotated) {
            float power = kvl_store_query<P::exact, D>(to + N * s.q_stride, x, lane);
            if (lane == 0) s.factor[N + r] = power * to_score;
            kvl_hadamard<D>(x, lane);
        }
        float power = kvl_store_query<P::k, D>(to, x, lane);
        if (lane == 0) {
            s.factor[r] = power * packed_factor;
            if constexpr (!P::k_rotated) s.factor[N + r] = power * to_score;
        }
    }
}

/* ---- units ---- */

/* 16 tokens of one block and KV head: where their bytes are (shared or device memory), and which they are. */
struct kvl_unit {
    const uint8_t *k, *k_scales, *v, *v_scales;
    uint32_t token; /* the first */
    bool own;
};

/* What an item's queries see, and from where to where they stand. */
struct kvl_rows {
    kvl_sight sight;
    uint32_t x_first, x_last;
};

/* Goes through a warp's units in order, 32 of them at a time, a lane each. */
enum kvl_class { KVL_ANY_CLASS, KVL_PACKED_CLASS, KVL_EXACT_CLASS };
struct kvl_walk {
    uint32_t next;    /* unit that lane 0 looks at next */
    uint32_t waiting; /* lanes that have a unit to be taken */
    uint32_t token;   /* of this lane's unit; bit 0: it is an own one */
    uint64_t entry;
    bool exact_seen;

    KVL_MEMBER void start() {
        next = threadIdx.x / 32;
        waiting = 0;
        exact_seen = false;
    }

    /* Looks at up to 32 more units. False: there are none. */
    template <kvl_class CLASS>
    KVL_MEMBER bool look(const kvli_cu_attend_args &a, const kvli_cu_item &item, const kvl_rows &rows) {
        uint32_t block_units = a.block_tokens / KVL_UNIT, table_units = (item.end - item.begin) * block_units;
        uint32_t units = table_units + (item.own_end - item.own_begin) * block_units;
        if (next >= units) return false;
        uint32_t unit = next + threadIdx.x % 32 * KVL_WARPS;
        bool own = unit >= table_units;
        uint32_t first = own ? item.own_begin * a.block_tokens + (unit - table_units) * KVL_UNIT
                             : item.begin * a.block_tokens + unit * KVL_UNIT;
        entry = 0;
        if (unit < units && kvl_any_sees(rows.sight, own, rows.x_first, rows.x_last, first, first + KVL_UNIT - 1)) {
            const kvli_cu_span &span = a.spans[item.span];
            uint32_t block = first / a.block_tokens;
            entry = a.entries[(uint32_t)(own ? span.own + block - span.first_own : span.table + block)];
        }
        bool exact = kvl_entry_is_exact(entry);
        token = first | (own ? 1 : 0);
        if (CLASS == KVL_PACKED_CLASS) exact_seen |= __any_sync(KVL_ALL_LANES, exact) != 0;
        bool wanted = CLASS == KVL_ANY_CLASS || exact == (CLASS == KVL_EXACT_CLASS);
        waiting = __ballot_sync(KVL_ALL_LANES, entry != 0 && wanted);
        next += 32 * KVL_WARPS;
        return true;
    }

    /* The next unit of a class, whose tiles have formats K and V. False: that was all. */
    template <kvl_class CLASS, uint32_t K, uint32_t V, uint32_t D>
    KVL_MEMBER bool take(const kvli_cu_attend_args &a, const kvli_cu_item &item, const kvl_rows &rows, kvl_unit *unit) {
        while (waiting == 0) {
            if (!look<CLASS>(a, item, rows)) return false;
        }
        uint32_t from = __ffs((int)waiting) - 1;
        waiting &= waiting - 1;
        uint32_t low = __shfl_sync(KVL_ALL_LANES, (uint32_t)entry, from);
        uint32_t high = __shfl_sync(KVL_ALL_LANES, (uint32_t)(entry >> 32), from);
        uint32_t its_token = __shfl_sync(KVL_ALL_LANES, token, from);
        kvl_tiles tiles = kvl_tiles_of(a.pages, (uint64_t)high << 32 | low, blockIdx.y);
        unit->token = its_token & ~1u;
        unit->own = its_token & 1;
        uint32_t at = unit->token % a.block_tokens, T = a.block_tokens;
        unit->k = tiles.k + at * kvli_cu_row_bytes(K, D);
        unit->v = tiles.v + at * kvli_cu_row_bytes(V, D);
        unit->k_scales = tiles.k + T * kvli_cu_row_bytes(K, D) + at * kvli_cu_token_scale_bytes(K, D);
        unit->v_scales = tiles.v + T * kvli_cu_row_bytes(V, D) + at * kvli_cu_token_scale_bytes(V, D);
        return true;
    }
};

/* ---- a warp's ring of units in shared memory ---- */
template <uint32_t K, uint32_t V, uint32_t D> struct kvl_ring {
    static constexpr uint32_t k_bytes = KVL_UNIT * kvli_cu_row_bytes(K, D), v_bytes = KVL_UNIT * kvli_cu_row_bytes(V, D);
    static constexpr uint32_t k_scale_bytes =
        KVL_UNIT * kvli_cu_token_scale_bytes(K, D) + kvli_cu_channel_scale_bytes(K, D);
    static constexpr uint32_t v_scale_bytes = KVL_UNIT * kvli_cu_token_scale_bytes(V, D);
    static constexpr uint32_t slot_bytes = kvli_cu_decode_slot(K, V, D);
    /* A slot: */
    static constexpr uint32_t barrier_at = 0, token_at = 8, own_at = 12, k_at = 16, k_scales_at = k_at + k_bytes;
    static constexpr uint32_t v_at = k_scales_at + k_scale_bytes, v_scales_at = v_at + v_bytes;

    uint8_t *slots;
    uint32_t stages, under_way, in, out, parity; /* under_way: units from slot `out` to before `in` */

    KVL_MEMBER void start(uint8_t *ring, uint32_t n) {
        slots = ring + threadIdx.x / 32 * n * slot_bytes;
        stages = n;
        under_way = in = out = parity = 0;
        if constexpr (KVL_ARCH >= 900) {
            if (threadIdx.x % 32 == 0) {
                for (uint32_t i = 0; i < n; i++) kvl_mbar_init(barrier(i), 1);
                kvl_mbar_fence();
            }
            __syncwarp();
        }
    }
    KVL_MEMBER uint64_t *barrier(uint32_t slot) { return (uint64_t *)(slots + slot * slot_bytes + barrier_at); }

    /* A run of bytes, all of it: the whole warp, or with bulk copies one lane. */
    template <uint32_t BYTES> KVL_MEMBER void copy(uint8_t *to, const uint8_t *from, uint64_t *bar) {
        if constexpr (BYTES == 0) {
            return;
        } else if constexpr (KVL_ARCH >= 900) {
            kvl_bulk_copy(to, from, BYTES, bar);
        } else {
            KVL_UNROLL for (uint32_t i = 0; i < BYTES; i += 512) {
                uint32_t at = i + threadIdx.x % 32 * 16;
                if (i + 512 <= BYTES || at < BYTES) kvl_cp_async16(to + at, from + at, true);
            }
        }
    }
    KVL_MEMBER void copy_unit(uint8_t *slot, const kvl_unit &unit, uint64_t *bar) {
        copy<k_bytes>(slot + k_at, unit.k, bar);
        copy<k_scale_bytes>(slot + k_scales_at, unit.k_scales, bar);
        copy<v_bytes>(slot + v_at, unit.v, bar);
        copy<v_scale_bytes>(slot + v_scales_at, unit.v_scales, bar);
    }

    /* Starts copies of further units until every slot is in use. */
    template <kvl_class CLASS>
    KVL_MEMBER void fill(kvl_walk &walk, const kvli_cu_attend_args &a, const kvli_cu_item &item, const kvl_rows &rows) {
        kvl_unit unit;
        while (under_way < stages && walk.take<CLASS, K, V, D>(a, item, rows, &unit)) {
            uint8_t *slot = slots + in * slot_bytes;
            if (threadIdx.x % 32 == 0) {
                *(uint32_t *)(slot + token_at) = unit.token;
                *(uint32_t *)(slot + own_at) = unit.own;
            }
            if constexpr (KVL_ARCH >= 900) {
                if (threadIdx.x % 32 == 0) {
                    kvl_mbar_expect(barrier(in), k_bytes + k_scale_bytes + v_bytes + v_scale_bytes);
                    copy_unit(slot, unit, barrier(in));
                }
            } else {
                copy_unit(slot, unit, nullptr);
                kvl_cp_commit();
            }
            in = in + 1 == stages ? 0 : in + 1;
            under_way++;
        }
    }

    /* The oldest unit, once it is there. To be called by whole warps, where under_way is not 0. */
    KVL_MEMBER kvl_unit wait() {
        uint8_t *slot = slots + out * slot_bytes;
        if constexpr (KVL_ARCH >= 900) {
            kvl_mbar_wait(barrier(out), parity);
        } else {
            if (under_way == 1) kvl_cp_wait<0>();
            else if (under_way == 2) kvl_cp_wait<1>();
            else if (under_way == 3) kvl_cp_wait<2>();
            else kvl_cp_wait<3>();
        }
        __syncwarp();
        kvl_unit unit = {slot + k_at, slot + k_scales_at, slot + v_at, slot + v_scales_at,
                         *(const uint32_t *)(slot + token_at), *(const uint32_t *)(slot + own_at) != 0};
        return unit;
    }

    /* Gives the oldest unit's slot back. */
    KVL_MEMBER void release() {
        __syncwarp();
        out++;
        if (out == stages) out = 0, parity ^= 1;
        under_way--;
    }
};

/* ---- a unit's products. Lane = 4 g + t. ---- */

/* What a warp has summed up: o[i] is a tile of 16 of the head dims by 8 rows for each 8 rows; of each row, l is this lane's
   share. Rows of a lane: 8 tile + 2 t, 8 tile + 2 t + 1. */
template <uint32_t D, uint32_t N> struct kvl_sums {
    float o[D / 16][N / 8][4];
    float m[N / 8][2], l[N / 8][2];
};
template <uint32_t D, uint32_t N> KVL_D void kvl_clear(kvl_sums<D, N> &sums) {
    KVL_UNROLL for (uint32_t tile = 0; tile < N / 8; tile++) {
        KVL_UNROLL for (uint32_t i = 0; i < D / 16; i++) {
            KVL_UNROLL for (uint32_t j = 0; j < 4; j++) sums.o[i][tile][j] = 0;
        }
        sums.m[tile][0] = sums.m[tile][1] = KVL_NOTHING;
        sums.l[tile][0] = sums.l[tile][1] = 0;
    }
}

/* Query fragments for keys of format K: in registers if they are few, else read for each unit. */
template <uint32_t K, uint32_t D, uint32_t N> struct kvl_queries {
    static constexpr bool in_registers = D * N <= 128 * 16;
    uint32_t b[in_registers ? D / 16 : 1][N / 8][2];
    const uint16_t *rows; /* at row g */
    const float *factors; /* at row 2 t */
};
template <uint32_t K, uint32_t D, uint32_t N>
KVL_D void kvl_query(const kvl_queries<K, D, N> &q, uint32_t tile, uint32_t dim, uint32_t b[2]) {
    uint2 four = kvl_ld8(q.rows + tile * 8 * (D + 4) + dim);
    b[0] = four.x, b[1] = four.y;
}

/* body(piece's number, bytes of its pieces, first step, step in the piece) for all steps of K's fragments. */
template <uint32_t F, uint32_t D, uint32_t LANES> struct kvl_cut {
    static constexpr uint32_t row = kvli_cu_row_bytes(F, D), pieces = kvl_piece_count(row, LANES);
    /* Numbers of a lane in the pieces before piece i. */
    KVLI_CU_FN uint32_t numbers_before(uint32_t i) { return kvl_numbers_in(F, kvl_piece_at(row, LANES, i).offset) / LANES; }
};

template <uint32_t K, uint32_t D, uint32_t N>
KVL_D void kvl_load_queries(kvl_queries<K, D, N> &q, const uint16_t *rows, const float *factors) {
    typedef kvl_cut<K, D, 4> cut;
    uint32_t lane = threadIdx.x % 32, t = lane % 4;
    q.rows = rows + lane / 4 * (D + 4);
    q.factors = factors + 2 * t;
    if constexpr (kvl_queries<K, D, N>::in_registers) {
        kvl_static_for<cut::pieces>([&](auto i) {
            constexpr kvl_piece piece = kvl_piece_at(cut::row, 4, i.value);
            constexpr uint32_t numbers = kvl_numbers_in(K, piece.bytes), first = cut::numbers_before(i.value);
            KVL_UNROLL for (uint32_t n = 0; n < numbers; n += 4) {
                uint32_t dim = 4 * first + t * numbers + n;
                KVL_UNROLL for (uint32_t tile = 0; tile < N / 8; tile++) kvl_query(q, tile, dim, q.b[(first + n) / 4][tile]);
            }
        });
    }
}

/* What turns K's codes into numbers, for the 4 numbers of a step in two tokens: a scale and a zero for each half2. */
template <uint32_t K, uint32_t D, uint32_t BYTES> struct kvl_k_scales {
    uint32_t by_token[2][2]; /* NVFP4: [token][group of 16] */
    const uint8_t *channels; /* scales of the lane's first number in the piece */
};
template <uint32_t K, uint32_t D, uint32_t BYTES>
KVL_D kvl_k_scales<K, D, BYTES> kvl_load_k_scales(const kvl_unit &unit, uint32_t g, uint32_t dim) {
    kvl_k_scales<K, D, BYTES> r = {};
    if constexpr (kvl_is_per_channel(K)) r.channels = unit.k_scales + 2 * dim;
    if constexpr (K == KVLI_CU_NVFP4) {
        KVL_UNROLL for (uint32_t i = 0; i < 2; i++) {
            const uint8_t *p = unit.k_scales + (g + 8 * i) * (D / 16) + dim / 16;
            if constexpr (BYTES == 16) {
                uint32_t both = kvl_nvfp4_scales(kvl_ld2(p));
                r.by_token[i][0] = kvl_twice(both), r.by_token[i][1] = kvl_twice(both >> 16);
            } else {
                r.by_token[i][0] = kvl_nvfp4_scales(*p * 0x101u);
            }
        }
    }
    return r;
}
template <uint32_t K, uint32_t D, uint32_t BYTES, uint32_t S>
KVL_D void kvl_scale_k(const kvl_k_scales<K, D, BYTES> &scales, uint32_t a[2][2]) {
    if constexpr (kvl_is_per_channel(K)) {
        uint2 scale = kvl_ld8(scales.channels + 8 * S), zero = kvl_ld8(scales.channels + 2 * D + 8 * S);
        KVL_UNROLL for (uint32_t i = 0; i < 2; i++) {
            a[i][0] = kvl_hfma2(a[i][0], scale.x, zero.x);
            a[i][1] = kvl_hfma2(a[i][1], scale.y, zero.y);
        }
    }
    if constexpr (K == KVLI_CU_NVFP4) {
        KVL_UNROLL for (uint32_t i = 0; i < 2; i++) {
            a[i][0] = kvl_hmul2(a[i][0], scales.by_token[i][S / 4]);
            a[i][1] = kvl_hmul2(a[i][1], scales.by_token[i][S / 4]);
        }
    }
}

/* s[tile][0, 1]: token g, rows 8 tile + 2 t and + 1; [2, 3]: token g + 8. Scores, or what tanh is to be taken of. */
template <uint32_t K, uint32_t D, uint32_t N>
KVL_D void kvl_scores(const kvl_unit &unit, const kvl_queries<K, D, N> &q, float s[N / 8][4]) {
    typedef kvl_cut<K, D, 4> cut;
    uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float odd[N / 8][4]; /* two sums of products, so that they do not wait for each other */
    KVL_UNROLL for (uint32_t i = 0; i < N / 2; i++) s[i / 4][i % 4] = odd[i / 4][i % 4] = 0;
    kvl_static_for<cut::pieces>([&](auto i) {
        constexpr kvl_piece piece = kvl_piece_at(cut::row, 4, i.value);
        constexpr uint32_t numbers = kvl_numbers_in(K, piece.bytes), first = cut::numbers_before(i.value);
        const uint8_t *p = unit.k + g * cut::row + piece.offset + t * piece.bytes;
        kvl_words<piece.bytes> low = kvl_load_piece<piece.bytes>(p), high = kvl_load_piece<piece.bytes>(p + 8 * cut::row);
        auto scales = kvl_load_k_scales<K, D, piece.bytes>(unit, g, 4 * first + t * numbers);
        kvl_static_for<numbers / 4>([&](auto j) {
            constexpr uint32_t step = first / 4 + j.value;
            uint32_t x[2][2];
            kvl_k_codes<K, piece.bytes, j.value>(low, x[0]);
            kvl_k_codes<K, piece.bytes, j.value>(high, x[1]);
            kvl_scale_k<K, D, piece.bytes, j.value>(scales, x);
            uint32_t a[4] = {x[0][0], x[1][0], x[0][1], x[1][1]};
            KVL_UNROLL for (uint32_t tile = 0; tile < N / 8; tile++) {
                float *sum = step % 2 ? odd[tile] : s[tile];
                if constexpr (kvl_queries<K, D, N>::in_registers) {
                    kvl_mma<K>(sum, a, q.b[step][tile]);
                } else {
                    uint32_t b[2];
                    kvl_query(q, tile, 4 * first + t * numbers + 4 * j.value, b);
                    kvl_mma<K>(sum, a, b);
                }
            }
        });
    });
    float of_token[2] = {1, 1};
    if constexpr (kvl_is_per_token(K)) {
        of_token[0] = kvl_h2f(kvl_ld2(unit.k_scales + 2 * g));
        of_token[1] = kvl_h2f(kvl_ld2(unit.k_scales + 2 * g + 16));
    }
    KVL_UNROLL for (uint32_t i = 0; i < N / 2; i++) {
        s[i / 4][i % 4] = (s[i / 4][i % 4] + odd[i / 4][i % 4]) * of_token[i % 4 / 2] * q.factors[i / 4 * 8 + i % 2];
    }
}

/* What turns V's codes of two tokens into numbers, in a piece: the halves belong to the tokens. */
template <uint32_t V> struct kvl_v_scales {
    uint32_t scale[2], zero; /* NVFP4: two groups of 16 */
};
template <uint32_t V, uint32_t D, uint32_t BYTES>
KVL_D kvl_v_scales<V> kvl_load_v_scales(const kvl_unit &unit, uint32_t token, uint32_t dim) {
    kvl_v_scales<V> r = {{0, 0}, 0};
    const uint8_t *p = unit.v_scales + token * kvli_cu_token_scale_bytes(V, D);
    if constexpr (kvl_is_per_token(V)) r.scale[0] = kvl_ld4(p);
    if constexpr (V == KVLI_CU_NVFP4) {
        KVL_UNROLL for (uint32_t i = 0; i < (BYTES == 16 ? 2 : 1); i++) {
            const uint8_t *group = p + dim / 16 + i;
            r.scale[i] = kvl_nvfp4_scales(group[0] | (uint32_t)group[D / 16] << 8);
        }
    }
    if constexpr (V == KVLI_CU_INT4) {
        uint32_t x = kvl_ld4(p + dim / 64 * 4), y = kvl_ld4(p + dim / 64 * 4 + kvli_cu_token_scale_bytes(V, D));
        r.scale[0] = __byte_perm(x, y, 0x5410);
        r.zero = __byte_perm(x, y, 0x7632);
    }
    return r;
}
template <uint32_t V, uint32_t GROUP> KVL_D uint32_t kvl_scale_v(const kvl_v_scales<V> &s, uint32_t codes) {
    if constexpr (V == KVLI_CU_INT4) return kvl_hfma2(codes, s.scale[0], s.zero);
    if constexpr (kvl_is_16_bit(V)) return codes;
    return kvl_hmul2(codes, s.scale[GROUP]);
}

/* sums.o += V^T P^T. p[tile]: weights of tokens 2 t, 2 t + 1 and 2 t + 8, 2 t + 9 for row 8 tile + g. Tokens that are not in
   `seen` (bits 0..15) count as zeros: their rows may never have been written. */
template <uint32_t V, uint32_t D, uint32_t N>
KVL_D void kvl_add_values(const kvl_unit &unit, const uint32_t p[N / 8][2], uint32_t seen, kvl_sums<D, N> &sums) {
    typedef kvl_cut<V, D, 8> cut;
    uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    kvl_static_for<cut::pieces>([&](auto i) {
        constexpr kvl_piece piece = kvl_piece_at(cut::row, 8, i.value);
        constexpr uint32_t numbers = kvl_numbers_in(V, piece.bytes), first = cut::numbers_before(i.value);
        uint32_t dim = 8 * first + g * numbers;
        kvl_words<piece.bytes> x[4];
        kvl_v_scales<V> scales[2];
        KVL_UNROLL for (uint32_t j = 0; j < 4; j++) {
            uint32_t token = 2 * t + j % 2 + j / 2 * 8;
            x[j] = kvl_load_piece<piece.bytes>(unit.v + token * cut::row + piece.offset + g * piece.bytes, seen >> token & 1);
        }
        KVL_UNROLL for (uint32_t j = 0; j < 2; j++) {
            scales[j] = kvl_load_v_scales<V, D, piece.bytes>(unit, 2 * t + 8 * j, dim);
        }
        kvl_static_for<numbers / 2>([&](auto j) {
            constexpr uint32_t lo = kvl_v_number(V, piece.bytes, j.value, 0) / 16, hi = kvl_v_number(V, piece.bytes, j.value, 1) / 16;
            uint32_t a[2][2];
            KVL_UNROLL for (uint32_t pair = 0; pair < 2; pair++) {
                kvl_v_codes<V, piece.bytes, j.value>(x[2 * pair], x[2 * pair + 1], a[pair]);
                a[pair][0] = kvl_scale_v<V, V == KVLI_CU_NVFP4 ? lo : 0>(scales[pair], a[pair][0]);
                a[pair][1] = kvl_scale_v<V, V == KVLI_CU_NVFP4 ? hi : 0>(scales[pair], a[pair][1]);
            }
            KVL_UNROLL for (uint32_t tile = 0; tile < N / 8; tile++) {
                kvl_mma<V>(sums.o[first / 2 + j.value][tile], a[0], p[tile]);
            }
        });
    });
}

/* ---- softmax ---- */

/* Position of row r of the item; of the last one, past its end. */
KVL_D uint32_t kvl_position(const kvli_cu_attend_args &a, const kvli_cu_item &item, uint32_t r) {
    return a.spans[item.span].position + (item.row + (r < item.n_rows ? r : item.n_rows - 1)) / a.gqa;
}

/* Removes from s what rows do not see. Returns which tokens any row sees. */
template <uint32_t N>
KVL_D uint32_t kvl_mask(const kvli_cu_attend_args &a, const kvli_cu_item &item, const kvl_rows &rows, const kvl_unit &unit,
                        float s[N / 8][4]) {
    uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    if (kvl_all_see(rows.sight, unit.own, rows.x_first, rows.x_last, unit.token, unit.token + KVL_UNIT - 1)) return 0xffff;
    for (uint32_t j = 0; j < 2; j++) {
        KVL_UNROLL for (uint32_t tile = 0; tile < N / 8; tile++) {
            uint32_t x = kvl_position(a, item, 8 * tile + 2 * t + j);
            KVL_UNROLL for (uint32_t i = 0; i < 2; i++) {
                bool sees = kvl_sees(rows.sight, unit.own, x, unit.token + g + 8 * i);
                if (!sees && j == 0) s[tile][2 * i] = -INFINITY;
                if (!sees && j == 1) s[tile][2 * i + 1] = -INFINITY;
            }
        }
    }
    uint32_t token = unit.token + lane % 16;
    return __ballot_sync(KVL_ALL_LANES, kvl_any_sees(rows.sight, unit.own, rows.x_first, rows.x_last, token, token)) & 0xffff;
}

/* Raises m of rows of which a score is far above it, and rescales what was summed up with the old one. Each row for
   itself, so that no row's result depends on its neighbours. */
template <uint32_t D, uint32_t N> KVL_D void kvl_raise(const float s[N / 8][4], kvl_sums<D, N> &sums) {
    KVL_UNROLL for (uint32_t tile = 0; tile < N / 8; tile++) {
        KVL_UNROLL for (uint32_t j = 0; j < 2; j++) {
            float top = fmaxf(s[tile][j], s[tile][j + 2]);
            KVL_UNROLL for (uint32_t x = 4; x < 32; x *= 2) top = fmaxf(top, __shfl_xor_sync(KVL_ALL_LANES, top, x));
            float m = top > sums.m[tile][j] + KVL_SLACK ? top : sums.m[tile][j], shrink = kvl_exp2(sums.m[tile][j] - m);
            sums.m[tile][j] = m;
            sums.l[tile][j] *= shrink;
            KVL_UNROLL for (uint32_t i = 0; i < D / 16; i++) {
                sums.o[i][tile][j] *= shrink;
                sums.o[i][tile][j + 2] *= shrink;
            }
        }
    }
}

/* Scores to weights as fragments for kvl_add_values, in the 16-bit numbers of format F. */
template <uint32_t F, uint32_t D, uint32_t N>
KVL_D void kvl_weights(const float s[N / 8][4], kvl_sums<D, N> &sums, uint32_t p[N / 8][2]) {
    bool above = false;
    KVL_UNROLL for (uint32_t i = 0; i < N / 2; i++) above |= s[i / 4][i % 4] > sums.m[i / 4][i % 2] + KVL_SLACK;
    if (__any_sync(KVL_ALL_LANES, above)) kvl_raise(s, sums);
    KVL_UNROLL for (uint32_t tile = 0; tile < N / 8; tile++) {
        float w[4];
        KVL_UNROLL for (uint32_t i = 0; i < 4; i++) w[i] = kvl_exp2(s[tile][i] - sums.m[tile][i % 2]);
        sums.l[tile][0] += w[0] + w[2];
        sums.l[tile][1] += w[1] + w[3];
        p[tile][0] = kvl_movm(kvl_pack<F>(w[0], w[1]));
        p[tile][1] = kvl_movm(kvl_pack<F>(w[2], w[3]));
    }
}

/* Zeroes V rows of a slot that nobody sees. */
template <uint32_t V, uint32_t D> KVL_D void kvl_zero_unseen(const kvl_unit &unit, uint32_t seen) {
    constexpr uint32_t row = kvli_cu_row_bytes(V, D);
    if (seen == 0xffff) return;
    for (uint32_t at = threadIdx.x % 32 * 16; at < KVL_UNIT * row; at += 512) {
        if (!(seen >> at / row & 1)) kvl_st16((uint8_t *)unit.v + at, make_uint4(0, 0, 0, 0));
    }
    __syncwarp();
}

template <uint32_t K, uint32_t V, uint32_t D, uint32_t N, bool IN_SLOT>
KVL_D void kvl_attend_unit(const kvli_cu_attend_args &a, const kvli_cu_item &item, const kvl_rows &rows, const kvl_unit &unit,
                           const kvl_queries<K, D, N> &q, kvl_sums<D, N> &sums) {
    float s[N / 8][4];
    uint32_t p[N / 8][2];
    kvl_scores(unit, q, s);
    if (a.softcap != 0) {
        KVL_UNROLL for (uint32_t i = 0; i < N / 2; i++) s[i / 4][i % 4] = a.softcap * KVL_LOG2E * kvl_tanh(s[i / 4][i % 4]);
    }
    uint32_t seen = kvl_mask<N>(a, item, rows, unit, s);
    kvl_weights<V>(s, sums, p);
    if constexpr (IN_SLOT) {
        if constexpr (kvl_is_16_bit(V)) kvl_zero_unseen<V, D>(unit, seen); /* others hold sealed rows, all of them written */
        seen = 0xffff;
    }
    kvl_add_values<V>(unit, p, seen, sums);
}

/* ---- a warp's part of a phase ---- */

/* Units straight from device memory. */
template <kvl_class CLASS, uint32_t K, uint32_t V, uint32_t D, uint32_t N>
KVL_D void kvl_attend_direct(const kvli_cu_attend_args &a, const kvli_cu_item &item, const kvl_rows &rows, kvl_walk &walk,
                             const kvl_queries<K, D, N> &q, kvl_sums<D, N> &sums) {
    kvl_unit unit;
    while (walk.take<CLASS, K, V, D>(a, item, rows, &unit)) kvl_attend_unit<K, V, D, N, false>(a, item, rows, unit, q, sums);
}

/* Units through the ring, which was filled before. */
template <kvl_class CLASS, uint32_t K, uint32_t V, uint32_t D, uint32_t N>
KVL_D void kvl_attend_ring(const kvli_cu_attend_args &a, const kvli_cu_item &item, const kvl_rows &rows, kvl_walk &walk,
                           kvl_ring<K, V, D> &ring, const kvl_queries<K, D, N> &q, kvl_sums<D, N> &sums) {
    while (ring.under_way > 0) {
        kvl_unit unit = ring.wait();
        kvl_attend_unit<K, V, D, N, true>(a, item, rows, unit, q, sums);
        ring.release();
        ring.template fill<CLASS>(walk, a, item, rows);
    }
}

/* ---- the warps' sums together ---- */

/* Adds what the warps have, times `factor`, to shared.sum in the order of warps; `first`: there is nothing there yet. For
   the whole block. */
template <uint32_t V, class P, uint32_t D, uint32_t N>
KVL_D void kvl_fold(const kvl_shared<P, D, N> &shared, kvl_sums<D, N> &sums, float factor, bool first) {
    typedef kvl_cut<V, D, 8> cut;
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    float keep[N / 8][2];
    KVL_UNROLL for (uint32_t i = 0; i < N / 4; i++) {
        float l = sums.l[i / 2][i % 2];
        KVL_UNROLL for (uint32_t x = 4; x < 32; x *= 2) l += __shfl_xor_sync(KVL_ALL_LANES, l, x);
        uint32_t r = i / 2 * 8 + 2 * t + i % 2;
        if (g == 0) shared.warp_m[warp * N + r] = sums.m[i / 2][i % 2], shared.warp_l[warp * N + r] = l;
    }
    __syncthreads();
    KVL_UNROLL for (uint32_t i = 0; i < N / 4; i++) {
        uint32_t r = i / 2 * 8 + 2 * t + i % 2;
        float before = first ? KVL_NOTHING : shared.total_m[r], m = before;
        for (uint32_t w = 0; w < KVL_WARPS; w++) m = fmaxf(m, shared.warp_m[w * N + r]);
        keep[i / 2][i % 2] = kvl_exp2(before - m);
        float shrink = kvl_exp2(sums.m[i / 2][i % 2] - m) * factor;
        KVL_UNROLL for (uint32_t j = 0; j < D / 16; j++) {
            sums.o[j][i / 2][i % 2] *= shrink;
            sums.o[j][i / 2][i % 2 + 2] *= shrink;
        }
    }
    for (uint32_t w = 0; w < KVL_WARPS; w++) {
        if (w == warp) {
            kvl_static_for<cut::pieces>([&](auto i) {
                constexpr uint32_t bytes = kvl_piece_at(cut::row, 8, i.value).bytes;
                constexpr uint32_t numbers = kvl_numbers_in(V, bytes), before = cut::numbers_before(i.value);
                KVL_UNROLL for (uint32_t j = 0; j < numbers * (N / 8); j++) {
                    uint32_t tile = j / numbers, step = j % numbers / 2, hi = j % 2;
                    const float *o = sums.o[before / 2 + step][tile] + 2 * hi;
                    uint32_t e = 8 * before + g * numbers + kvl_v_number(V, bytes, step, hi);
                    float2 *sum = (float2 *)(shared.sum + kvl_sum_index<D>(8 * tile + 2 * t, e)), old = {0, 0};
                    if (!(first && w == 0)) old = *sum;
                    float keep0 = w == 0 ? keep[tile][0] : 1, keep1 = w == 0 ? keep[tile][1] : 1;
                    *sum = make_float2(old.x * keep0 + o[0], old.y * keep1 + o[1]);
                }
            });
        }
        __syncthreads();
    }
    if (threadIdx.x < N) {
        uint32_t r = threadIdx.x;
        float before = first ? KVL_NOTHING : shared.total_m[r], m = before;
        for (uint32_t w = 0; w < KVL_WARPS; w++) m = fmaxf(m, shared.warp_m[w * N + r]);
        float l = first ? 0 : shared.total_l[r] * kvl_exp2(before - m);
        for (uint32_t w = 0; w < KVL_WARPS; w++) l += shared.warp_l[w * N + r] * kvl_exp2(shared.warp_m[w * N + r] - m);
        shared.total_m[r] = m, shared.total_l[r] = l;
    }
    __syncthreads();
}

/* Turns the sums of packed blocks back. */
template <class P, uint32_t D, uint32_t N> KVL_D void kvl_rotate_sums(const kvl_shared<P, D, N> &shared) {
    uint32_t lane = threadIdx.x % 32;
    for (uint32_t r = threadIdx.x / 32; r < N; r += KVL_WARPS) {
        kvl_spread<D> row;
        KVL_UNROLL for (uint32_t i = 0; i < row.count; i++) {
            row.x[i] = kvl_spread_has<D>(lane, i) ? shared.sum[kvl_sum_index<D>(r, lane + 32 * i)] : 0;
        }
        kvl_hadamard<D>(row, lane);
        KVL_UNROLL for (uint32_t i = 0; i < row.count; i++) {
            if (kvl_spread_has<D>(lane, i)) shared.sum[kvl_sum_index<D>(r, lane + 32 * i)] = row.x[i];
        }
    }
    __syncthreads();
}

/* The item's result: a partial one, or the output. */
template <class P, uint32_t D, uint32_t N>
KVL_D void kvl_write(const kvli_cu_attend_args &a, const kvli_cu_item &item, const kvl_shared<P, D, N> &shared) {
    bool whole = item.partial == KVLI_CU_NONE;
    uint64_t partial = (uint64_t)item.partial * a.n_kv_heads + (uint64_t)blockIdx.y * item.n_rows;
    if (!whole && threadIdx.x < item.n_rows) {
        a.partial_ml[2 * (partial + threadIdx.x)] = shared.total_m[threadIdx.x];
        a.partial_ml[2 * (partial + threadIdx.x) + 1] = shared.total_l[threadIdx.x];
    }
    for (uint32_t i = threadIdx.x; i < item.n_rows * D; i += KVL_WARPS * 32) {
        uint32_t r = i / D, e = i % D;
        float sum = shared.sum[kvl_sum_index<D>(r, e)];
        if (!whole) {
            a.partial_o[(partial + r) * D + e] = sum;
            continue;
        }
        kvl_row row = kvl_row_of(a, a.spans[item.span], blockIdx.y, item.row + r);
        float l = shared.total_l[r];
        if (a.sink_logits) l += kvl_exp2(a.sink_logits[row.head] * KVL_LOG2E - shared.total_m[r]);
        kvl_tensor_set(a.out, row.tensor_row, row.head, e, l == 0 ? 0 : sum / l);
    }
}

/* ---- the kernel ---- */
template <class P, uint32_t D, uint32_t N> KVL_D void kvl_decode(const kvli_cu_attend_args &a, uint8_t *memory) {
    uint32_t index = a.first_item + blockIdx.x;
    if (index >= a.end_item || index >= a.counts->decodes) return;
    const kvli_cu_item item = a.items[index];
    kvl_shared<P, D, N> shared(memory, a.stages);
    kvl_rows rows = {{a.block_tokens, a.window, a.sink_tokens}, kvl_position(a, item, 0), kvl_position(a, item, item.n_rows - 1)};
    constexpr kvl_class first_class = P::one_class ? KVL_ANY_CLASS : KVL_PACKED_CLASS;
    kvl_walk walk;
    kvl_ring<P::k, P::v, D> ring;
    kvl_sums<D, N> sums;
    walk.start();
    if constexpr (KVL_ARCH >= 800) {
        ring.start(shared.ring, a.stages);
        ring.template fill<first_class>(walk, a, item, rows); /* under way while the queries are prepared */
    }
    kvl_prepare_queries(a, item, shared);
    __syncthreads();
    kvl_clear(sums);
    {
        kvl_queries<P::k, D, N> q;
        kvl_load_queries(q, shared.q, shared.factor);
        if constexpr (KVL_ARCH >= 800) kvl_attend_ring<first_class, P::k, P::v, D, N>(a, item, rows, walk, ring, q, sums);
        else kvl_attend_direct<first_class, P::k, P::v, D, N>(a, item, rows, walk, q, sums);
    }
    if (threadIdx.x % 32 == 0) shared.exact_seen[threadIdx.x / 32] = walk.exact_seen;
    kvl_fold<P::v>(shared, sums, P::v == KVLI_CU_NVFP4 ? KVL_NVFP4_FACTOR * a.v_global : 1, true);
    if constexpr (P::v_rotated) kvl_rotate_sums(shared);
    if constexpr (!P::one_class) {
        bool exact = item.own_begin < item.own_end;
        for (uint32_t w = 0; w < KVL_WARPS; w++) exact |= shared.exact_seen[w] != 0;
        if (exact) {
            kvl_queries<P::exact, D, N> q;
            kvl_load_queries(q, shared.q + (P::k_rotated ? N * shared.q_stride : 0), shared.factor + N);
            kvl_clear(sums);
            walk.start();
            kvl_attend_direct<KVL_EXACT_CLASS, P::exact, P::exact, D, N>(a, item, rows, walk, q, sums);
            kvl_fold<P::exact>(shared, sums, 1, false);
        }
    }
    kvl_write(a, item, shared);
}

#define KVL_DECODE_N(preset, D, N)                                                                                        \
    KVL_KERNEL(kvl_decode_##preset##_d##D##_n##N, 32 * KVLI_CU_DECODE_WARPS, 1, kvli_cu_attend_args) {                     \
        KVL_DYN_SMEM(uint8_t, memory);                                                                                    \
        if constexpr (KVL_ARCH >= 800 || kvl_preset_##preset::k != KVLI_CU_BF16) kvl_decode<kvl_preset_##preset, D, N>(a, memory); \
    }
#define KVL_DECODE_D(preset, D) KVL_DECODE_N(preset, D, 8) KVL_DECODE_N(preset, D, 16)
#define KVL_DECODE(preset)                                                                                                \
    KVL_DECODE_D(preset, 64)                                                                                              \
    KVL_DECODE_D(preset, 80)                                                                                              \
    KVL_DECODE_D(preset, 96) KVL_DECODE_D(preset, 128) KVL_DECODE_D(preset, 192) KVL_DECODE_D(preset, 256)
KVL_DECODE(f16)
KVL_DECODE(bf16)
KVL_DECODE(int8)
KVL_DECODE(int8c)
KVL_DECODE(fp8)
KVL_DECODE(nvfp4)
KVL_DECODE(balanced)
KVL_DECODE(int4)
