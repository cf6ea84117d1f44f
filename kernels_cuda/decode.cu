/* Attention of a few query rows (one token's query heads of a KV head, or those of some draft tokens) over many cached ones.

   A block of 4 warps takes an item: up to N packed query rows, one KV head, a range of blocks. Each warp takes units of 16
   tokens in turn and keeps a softmax of its own; at the end the warps' sums are added in a fixed order, so that equal input
   gives equal bits. A unit, with the 16 tokens as M, the queries as N of an m16n8k16 product:
       S^T (16 x N)  = K (16 x D) Q^T (D x N)           K rows straight from their bytes into A fragments
       P^T           = 2^(S^T - m)                      f32, base 2; m moves only if a score is above it by 8
       O^T (D x N)  += V^T (D x 16) P^T (16 x N)        V bytes of two tokens zipped into A fragments; P^T by movmatrix
   No ldmatrix, no transposed copy: which head dim stands where in a fragment is free (formats.cuh), so each lane reads
   pieces of rows as they lie in memory.

   Sinks and own blocks are exact (f16) among packed ones; their rows are read straight from device memory, each lane taking
   the head dims that it takes of packed rows. Where packed values are rotated, or NVFP4, a second pass does the exact ones,
   once the sums over the packed ones were added up and turned back in shared memory.

   Roofline: bytes. A unit costs 16 * (K and V row bytes) + scales of device memory traffic, and each byte crosses shared memory
   twice. To hide the latency each warp has a ring of `stages` units in flight: bulk copies (sm_90), cp.async (sm_80), or none
   (sm_75: straight to registers, as exact units of packed formats everywhere). Issue slots come next: instructions for 16 x D
   keys and values, D = 128, N = 8: see formats.cuh, plus D / 8 mma and about 60 for the softmax and the ring. */
#include "formats.cuh"
#include "presets.cuh"
#include "steps.cuh"

constexpr uint32_t KVL_WARPS = KVLI_CU_DECODE_WARPS, KVL_UNIT = KVLI_CU_UNIT;
constexpr float KVL_NOTHING = -1e38f; /* m of a row that has seen nothing */
constexpr float KVL_SLACK = 8;        /* how far a score may be above m: weights up to 2^8 */

/* ---- 16-bit arithmetic of a class: bfloat16 where it is the format, else f16 ---- */
template <uint32_t F> KVL_D uint16_t kvl_to_16(float x) {
    return F == KVLI_GPU_BF16 ? kvl_f2bf(x) : kvl_f2h(x);
}
template <uint32_t F> KVL_D uint32_t kvl_pack(float low, float high) {
    return F == KVLI_GPU_BF16 ? kvl_f22bf2(low, high) : kvl_f22h2(low, high);
}
template <uint32_t F> KVL_D void kvl_mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    if constexpr (F == KVLI_GPU_BF16)
        kvl_mma_bf16(c, a, b);
    else
        kvl_mma_f16(c, a, b);
}

/* ---- shared memory, as kvli_cu_decode_smem counts it ---- */
template <class P, uint32_t D, uint32_t N> struct kvl_shared {
    static constexpr uint32_t q_stride = D + 4;
    float *sum;               /* [N x D] at kvl_sum_index */
    uint16_t *q;              /* [1 or 2][N][q_stride]: for packed keys, for exact keys if they differ */
    float *warp_m, *warp_l;   /* [WARPS][N] */
    float *total_m, *total_l; /* [N] of `sum` */
    float *factor;            /* [2][N] from q·k to a score, packed and exact */
    uint32_t *position;       /* [N] of rows; past the end that of the last */
    uint32_t *exact_seen;     /* [WARPS] */
    uint32_t *item;           /* which it is: found there again at the end, not kept in a register */
    uint8_t *ring;            /* [WARPS][stages] slots */

    /* At constant offsets but for the ring's length, so that no register holds where things are. */
    KVL_MEMBER kvl_shared(uint8_t *memory) {
        sum = (float *)memory;
        q = (uint16_t *)(sum + N * D);
        warp_m = (float *)(q + (P::k_rotated ? 2 : 1) * N * q_stride);
        warp_l = warp_m + KVL_WARPS * N;
        total_m = warp_l + KVL_WARPS * N;
        total_l = total_m + N;
        factor = total_l + N;
        position = (uint32_t *)(factor + 2 * N);
        exact_seen = position + N;
        item = exact_seen + KVL_WARPS;
        ring = (uint8_t *)(item + 4);
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
template <uint32_t D> KVL_D bool kvl_spread_has(uint32_t lane, uint32_t i) {
    return D % 32 == 0 || lane + 32 * i < D;
}

/* Times the Hadamard matrix (its own inverse), block-diagonal in blocks of kvl_hadamard_size. */
template <uint32_t D> KVL_D void kvl_hadamard(kvl_spread<D> &row, uint32_t lane) {
    constexpr uint32_t size = kvl_hadamard_size(D);
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
    KVL_UNROLL for (uint32_t i = 0; i < row.count; i++) row.x[i] *= kvl_hadamard_norm(size);
}

/* ---- queries ---- */

/* Where a head dim's number stands in a stored query row, such that each step of kvl_k_codes finds its four beside each
   other. */
template <uint32_t K> KVL_D uint32_t kvl_q_place(uint32_t e, uint32_t row_bytes) {
    if (K != KVLI_GPU_NVFP4) return e;
    bool two_byte_piece = row_bytes % 32 == 8 && e >= 2 * (row_bytes - 8);
    if (two_byte_piece) return (e & ~3u) + e % 2 * 2 + e / 2 % 2;
    return (e & ~7u) + e / 2 % 2 * 4 + e % 2 * 2 + e / 4 % 2;
}

/* A query row over its power of two, rounded to 16 bits for keys of format F, in the order of format K. Returns the power. */
template <uint32_t F, uint32_t K, uint32_t D>
KVL_D float kvl_store_query(uint16_t *to, const kvl_spread<D> &row, uint32_t lane) {
    float largest = 0;
    KVL_UNROLL for (uint32_t i = 0; i < row.count; i++) largest = fmaxf(largest, fabsf(row.x[i]));
    KVL_UNROLL for (uint32_t x = 16; x; x /= 2) largest =
        fmaxf(largest, __shfl_xor_sync(KVL_ALL_LANES, largest, x));
    float power = kvl_row_power(largest), inverse = __uint_as_float((254u << 23) - __float_as_uint(power));
    KVL_UNROLL for (uint32_t i = 0; i < row.count; i++) {
        uint32_t e = lane + 32 * i;
        if (kvl_spread_has<D>(lane, i))
            to[kvl_q_place<K>(e, kvli_gpu_row_bytes(K, D))] = kvl_to_16<F>(row.x[i] * inverse);
    }
    return power;
}

/* The block's item and its rows, found again where they are needed: registers are dear in the loop over units. */
KVL_D kvl_rows kvl_its_rows(const kvli_cu_attend_args &a) {
    kvl_rows rows;
    kvl_rows_of_block(a, KVLI_GPU_NONE, rows);
    return rows;
}

/* All query rows of the item into shared memory, and the factors of their scores; sums to nothing. */
template <class P, uint32_t D, uint32_t N>
KVL_D void kvl_prepare(const kvli_cu_attend_args &a, const kvl_shared<P, D, N> &s) {
    const kvl_rows rows = kvl_its_rows(a);
    uint32_t lane = threadIdx.x % 32, n_rows = rows.item->n_rows;
    float to_score = a.softcap != 0 ? 2 * KVL_LOG2E * a.scale / a.softcap : a.scale * KVL_LOG2E;
    float packed_factor = P::k == KVLI_GPU_NVFP4 ? to_score * KVL_NVFP4_FACTOR * a.k_global : to_score;
    KVL_ROLLED for (uint32_t i = threadIdx.x; i < N * D; i += 32 * KVL_WARPS) s.sum[i] = 0;
    KVL_ROLLED for (uint32_t r = threadIdx.x / 32; r < N; r += KVL_WARPS) {
        kvl_row row =
            kvl_row_of(a, kvl_span_of(a, rows), blockIdx.y, rows.item->row + (r < n_rows ? r : n_rows - 1));
        kvl_spread<D> x;
        KVL_UNROLL for (uint32_t i = 0; i < x.count; i++) {
            bool has = r < n_rows && kvl_spread_has<D>(lane, i);
            x.x[i] = has ? kvl_tensor_get(a.q, row.tensor_row, row.head, lane + 32 * i) : 0;
        }
        uint16_t *to = s.q + r * s.q_stride;
        float exact_power = 0;
        if constexpr (P::k_rotated) {
            exact_power = kvl_store_query<P::exact, P::k, D>(to + N * s.q_stride, x, lane);
            kvl_hadamard<D>(x, lane);
        }
        float power = kvl_store_query<P::k, P::k, D>(to, x, lane);
        if (lane > 0) continue;
        s.factor[r] = power * packed_factor;
        s.factor[N + r] = (P::k_rotated ? exact_power : power) * to_score;
        s.position[r] = row.position;
        *s.item = (uint32_t)(rows.item - a.items);
        s.total_m[r] = KVL_NOTHING, s.total_l[r] = 0;
    }
}

/* ---- units ---- */

/* 16 tokens of one block and KV head: where their bytes are (in a slot, or in device memory), and which they are. */
struct kvl_unit {
    const uint8_t *k, *k_scales, *v, *v_scales;
    uint32_t token; /* the first */
    bool own, exact;
};

/* Goes through a warp's units in order, 32 of them at a time, a lane each. With two passes, the first takes packed ones. */
struct kvl_unit_walk {
    uint32_t next;    /* unit that lane 0 looks at next, and the flag: exact ones were seen */
    uint32_t waiting; /* lanes that have a unit to be taken */
    uint32_t token;   /* of this lane's unit; bit 0: it is an own one, bit 1: exact */
    uint64_t k;       /* address of this lane's K tile */
    static constexpr uint32_t exact_flag = 0x80000000;

    KVL_MEMBER void start() {
        next = threadIdx.x / 32;
        waiting = 0;
    }
    KVL_MEMBER bool exact_seen() { return next & exact_flag; }

    /* Looks at up to 32 more units. False: there are none. */
    template <class P> KVL_MEMBER bool look(const kvli_cu_attend_args &a, uint32_t pass) {
        kvl_rows rows = kvl_its_rows(a);
        const kvli_gpu_item &item = *rows.item;
        uint32_t block_units = a.block_tokens / KVL_UNIT, table_units = (item.end - item.begin) * block_units;
        uint32_t units = table_units + (item.own_end - item.own_begin) * block_units;
        uint32_t at = next & ~exact_flag;
        if (at >= units) return false;
        uint32_t unit = at + threadIdx.x % 32 * KVL_WARPS;
        bool own = unit >= table_units;
        uint32_t first = own ? item.own_begin * a.block_tokens + (unit - table_units) * KVL_UNIT
                             : item.begin * a.block_tokens + unit * KVL_UNIT;
        uint64_t entry = 0;
        if (unit < units &&
            kvl_any_sees(rows.sight, own, rows.x_first, rows.x_last, first, first + KVL_UNIT - 1)) {
            uint32_t block = first / a.block_tokens;
            entry = a.entries[own ? kvl_span_of(a, rows).own + block - kvl_span_of(a, rows).first_own
                                  : kvl_span_of(a, rows).table + block];
        }
        bool exact = kvl_entry_is_exact(entry);
        k = (uint64_t)kvl_tiles_of(a.pages, entry, blockIdx.y).k;
        token = first | (own ? 1 : 0) | (exact ? 2 : 0);
        bool wanted = entry != 0;
        if constexpr (P::two_passes) {
            if (__any_sync(KVL_ALL_LANES, exact)) next |= exact_flag;
            wanted = wanted && exact == (pass == 1);
        }
        waiting = __ballot_sync(KVL_ALL_LANES, wanted);
        next += 32 * KVL_WARPS;
        return true;
    }

    /* The next unit, in device memory. False: that was all. */
    template <class P, uint32_t D>
    KVL_MEMBER bool take(const kvli_cu_attend_args &a, uint32_t pass, kvl_unit *unit) {
        while (waiting == 0) {
            if (!look<P>(a, pass)) return false;
        }
        uint32_t from = __ffs((int)waiting) - 1;
        waiting &= waiting - 1;
        uint32_t its_token = __shfl_sync(KVL_ALL_LANES, token, from);
        const uint8_t *tile = (const uint8_t *)__shfl_sync(KVL_ALL_LANES, (unsigned long long)k, from);
        unit->token = its_token & ~3u;
        unit->own = its_token & 1;
        unit->exact = !P::one_class && (its_token & 2);
        uint32_t T = a.block_tokens, at = unit->token & (T - 1);
        const uint8_t *v_tile = tile + (unit->exact ? a.pages.v_offset[1] : a.pages.v_offset[0]);
        unit->k_scales = tile + T * kvli_gpu_row_bytes(P::k, D) + at * kvli_gpu_token_scale_bytes(P::k, D);
        unit->v_scales = v_tile + T * kvli_gpu_row_bytes(P::v, D) + at * kvli_gpu_token_scale_bytes(P::v, D);
        unit->k = tile + at * (unit->exact ? 2 * D : kvli_gpu_row_bytes(P::k, D));
        unit->v = v_tile + at * (unit->exact ? 2 * D : kvli_gpu_row_bytes(P::v, D));
        return true;
    }
};

/* ---- a warp's ring of units in shared memory ---- */

/* A slot's first bytes. Of exact units these are all. */
struct kvl_slot {
    uint64_t barrier;
    uint32_t token, flags;
    const uint8_t *k, *v; /* of exact units */
};
static_assert(sizeof(kvl_slot) == 32, "as kvli_cu_decode_slot has it");

/* Where an exact unit's rows are: its slot says it, so that what reads slots need not ask which memory it reads. */
KVL_D kvl_tiles kvl_exact_rows(const kvl_unit &unit) {
    if constexpr (KVL_ARCH < 800) return kvl_tiles{unit.k, unit.v};
    const kvl_slot *slot = (const kvl_slot *)(unit.k - sizeof(kvl_slot));
    return kvl_tiles{slot->k, slot->v};
}

template <class P, uint32_t D> struct kvl_ring {
    static constexpr uint32_t k_bytes = KVL_UNIT * kvli_gpu_row_bytes(P::k, D),
                              v_bytes = KVL_UNIT * kvli_gpu_row_bytes(P::v, D);
    static constexpr uint32_t k_scale_bytes =
        KVL_UNIT * kvli_gpu_token_scale_bytes(P::k, D) + kvli_gpu_channel_scale_bytes(P::k, D);
    static constexpr uint32_t v_scale_bytes = KVL_UNIT * kvli_gpu_token_scale_bytes(P::v, D);
    static constexpr uint32_t slot_bytes = kvli_cu_decode_slot(P::k, P::v, D);
    static constexpr uint32_t k_at = sizeof(kvl_slot), k_scales_at = k_at + k_bytes,
                              v_at = k_scales_at + k_scale_bytes;
    static constexpr uint32_t v_scales_at = v_at + v_bytes;

    uint8_t *slots;
    uint32_t stages, under_way, out, parity; /* under_way: units from slot `out` on, around the ring */

    KVL_MEMBER kvl_slot *slot(uint32_t i) { return (kvl_slot *)(slots + i * slot_bytes); }

    KVL_MEMBER void start(uint8_t *ring, uint32_t n) {
        slots = ring + threadIdx.x / 32 * n * slot_bytes;
        stages = n;
        under_way = out = parity = 0;
        if constexpr (KVL_ARCH >= 900) {
            if (threadIdx.x % 32 == 0) {
                KVL_ROLLED for (uint32_t i = 0; i < n; i++) kvl_mbar_init(&slot(i)->barrier, 1);
                kvl_mbar_fence();
            }
            __syncwarp();
        }
    }

    /* A run of bytes, all of it: the whole warp, or with bulk copies one lane. */
    template <uint32_t BYTES> KVL_MEMBER void copy(uint8_t *to, const uint8_t *from, uint64_t *barrier) {
        if constexpr (BYTES == 0) {
            return;
        } else if constexpr (KVL_ARCH >= 900) {
            kvl_bulk_copy(to, from, BYTES, barrier);
        } else {
            KVL_UNROLL for (uint32_t i = 0; i < BYTES; i += 512) {
                uint32_t at = i + threadIdx.x % 32 * 16;
                if (i + 512 <= BYTES || at < BYTES) kvl_cp_async16(to + at, from + at, true);
            }
        }
    }
    KVL_MEMBER void copy_unit(kvl_slot *to, const kvl_unit &unit) {
        uint8_t *bytes = (uint8_t *)to;
        copy<k_bytes>(bytes + k_at, unit.k, &to->barrier);
        copy<k_scale_bytes>(bytes + k_scales_at, unit.k_scales, &to->barrier);
        copy<v_bytes>(bytes + v_at, unit.v, &to->barrier);
        copy<v_scale_bytes>(bytes + v_scales_at, unit.v_scales, &to->barrier);
    }

    /* Starts the copies of further units until every slot is in use. */
    KVL_MEMBER void fill(kvl_unit_walk &walk, const kvli_cu_attend_args &a, uint32_t pass) {
        kvl_unit unit;
        KVL_ROLLED while (under_way < stages && walk.template take<P, D>(a, pass, &unit)) {
            uint32_t in = out + under_way;
            kvl_slot *to = slot(in < stages ? in : in - stages);
            if (threadIdx.x % 32 == 0) {
                to->token = unit.token, to->flags = (unit.own ? 1 : 0) | (unit.exact ? 2 : 0);
                to->k = unit.k, to->v = unit.v;
                if constexpr (KVL_ARCH >= 900) {
                    kvl_mbar_expect(&to->barrier,
                                    unit.exact ? 0 : k_bytes + k_scale_bytes + v_bytes + v_scale_bytes);
                    if (!unit.exact) copy_unit(to, unit);
                }
            }
            if constexpr (KVL_ARCH < 900) {
                if (!unit.exact) copy_unit(to, unit);
                kvl_cp_commit();
            }
            under_way++;
        }
    }

    /* The oldest unit, once it is there. To be called by whole warps, where under_way is not 0. */
    KVL_MEMBER kvl_unit wait() {
        kvl_slot *from = slot(out);
        const uint8_t *bytes = (const uint8_t *)from;
        if constexpr (KVL_ARCH >= 900) {
            kvl_mbar_wait(&from->barrier, parity);
        } else {
            if (under_way == 1)
                kvl_cp_wait<0>();
            else if (under_way == 2)
                kvl_cp_wait<1>();
            else if (under_way == 3)
                kvl_cp_wait<2>();
            else
                kvl_cp_wait<3>();
        }
        __syncwarp();
        return kvl_unit{bytes + k_at,
                        bytes + k_scales_at,
                        bytes + v_at,
                        bytes + v_scales_at,
                        from->token,
                        (from->flags & 1) != 0,
                        !P::one_class && (from->flags & 2)};
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

/* How a row of format F is dealt to lanes (formats.cuh). */
template <uint32_t F, uint32_t D, uint32_t LANES> struct kvl_cut {
    static constexpr uint32_t row = kvli_gpu_row_bytes(F, D), pieces = kvl_piece_count(row, LANES);
    /* Numbers of a lane in the pieces before piece i. */
    KVLI_GPU_FN uint32_t numbers_before(uint32_t i) {
        return kvl_numbers_in(F, kvl_piece_at(row, LANES, i).offset) / LANES;
    }
};

/* Query fragments for keys of format K: in registers if they are few, else read for each unit. Exact keys' are always read,
   `exact_rows` after the packed ones'. */
template <uint32_t K, uint32_t D, uint32_t N> struct kvl_queries {
    static constexpr bool in_registers = D * N <= 128 * 16 && D < 256;
    uint32_t b[in_registers ? D / 16 : 1][N / 8][2];
    const uint16_t *rows; /* at row g */
    const float *factors; /* at row 2 t */
    uint32_t exact_rows;
};
template <uint32_t D> KVL_D void kvl_query(const uint16_t *rows, uint32_t tile, uint32_t dim, uint32_t b[2]) {
    uint2 four = kvl_ld8(rows + tile * 8 * (D + 4) + dim);
    b[0] = four.x, b[1] = four.y;
}
template <class P, uint32_t D, uint32_t N>
KVL_D void kvl_load_queries(kvl_queries<P::k, D, N> &q, const kvl_shared<P, D, N> &shared) {
    typedef kvl_cut<P::k, D, 4> cut;
    uint32_t lane = threadIdx.x % 32, t = lane % 4;
    q.rows = shared.q + lane / 4 * shared.q_stride;
    q.factors = shared.factor + 2 * t;
    q.exact_rows = P::k_rotated ? N * shared.q_stride : 0;
    if constexpr (kvl_queries<P::k, D, N>::in_registers) {
        kvl_static_for<cut::pieces>([&](auto i) {
            constexpr kvl_piece piece = kvl_piece_at(cut::row, 4, i.value);
            constexpr uint32_t numbers = kvl_numbers_in(P::k, piece.bytes),
                               first = cut::numbers_before(i.value);
            KVL_UNROLL for (uint32_t n = 0; n < numbers; n += 4) {
                KVL_UNROLL for (uint32_t tile = 0; tile < N / 8; tile++) {
                    kvl_query<D>(q.rows, tile, 4 * first + t * numbers + n, q.b[(first + n) / 4][tile]);
                }
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
    if constexpr (K == KVLI_GPU_NVFP4) {
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
    if constexpr (K == KVLI_GPU_NVFP4) {
        KVL_UNROLL for (uint32_t i = 0; i < 2; i++) {
            a[i][0] = kvl_hmul2(a[i][0], scales.by_token[i][S / 4]);
            a[i][1] = kvl_hmul2(a[i][1], scales.by_token[i][S / 4]);
        }
    }
}

/* Keeps loads from being moved ahead of the pieces before them where the sums leave few registers. */
template <uint32_t D, uint32_t N> KVL_D void kvl_in_order() {
    if constexpr (D * N > 192 * 16) __syncwarp();
}

/* With one tile of rows, products go into two sums that are added up later, so that they need not wait for each other. */
KVLI_GPU_FN uint32_t kvl_chains(uint32_t n) { return n == 8 ? 2 : 1; }

/* Sums of products: s[chain][tile][0, 1] of token g with rows 8 tile + 2 t and + 1; [2, 3] of token g + 8. */
template <uint32_t K, uint32_t D, uint32_t N>
KVL_D void kvl_multiply_packed(const kvl_unit &unit, const kvl_queries<K, D, N> &q,
                               float s[kvl_chains(N)][N / 8][4]) {
    typedef kvl_cut<K, D, 4> cut;
    uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    kvl_static_for<cut::pieces>([&](auto i) {
        constexpr kvl_piece piece = kvl_piece_at(cut::row, 4, i.value);
        constexpr uint32_t numbers = kvl_numbers_in(K, piece.bytes), first = cut::numbers_before(i.value);
        kvl_in_order<D, N>();
        const uint8_t *p = unit.k + g * cut::row + piece.offset + t * piece.bytes;
        kvl_words<piece.bytes> low = kvl_load_piece<piece.bytes>(p),
                               high = kvl_load_piece<piece.bytes>(p + 8 * cut::row);
        auto scales = kvl_load_k_scales<K, D, piece.bytes>(unit, g, 4 * first + t * numbers);
        kvl_static_for<numbers / 4>([&](auto j) {
            constexpr uint32_t step = first / 4 + j.value;
            uint32_t x[2][2];
            kvl_k_codes<K, piece.bytes, j.value>(low, x[0]);
            kvl_k_codes<K, piece.bytes, j.value>(high, x[1]);
            kvl_scale_k<K, D, piece.bytes, j.value>(scales, x);
            uint32_t a[4] = {x[0][0], x[1][0], x[0][1], x[1][1]};
            KVL_UNROLL for (uint32_t tile = 0; tile < N / 8; tile++) {
                if constexpr (kvl_queries<K, D, N>::in_registers) {
                    kvl_mma<K>(s[step % kvl_chains(N)][tile], a, q.b[step][tile]);
                } else {
                    uint32_t b[2];
                    kvl_query<D>(q.rows, tile, 4 * first + t * numbers + 4 * j.value, b);
                    kvl_mma<K>(s[step % kvl_chains(N)][tile], a, b);
                }
            }
        });
    });
}

/* The same of f16 rows, each lane with the head dims that it has of rows of format K. */
template <uint32_t K, uint32_t D, uint32_t N>
KVL_D void kvl_multiply_exact(const kvl_unit &unit, const kvl_queries<K, D, N> &q,
                              float s[kvl_chains(N)][N / 8][4]) {
    const uint8_t *rows = kvl_exact_rows(unit).k;
    typedef kvl_cut<K, D, 4> cut;
    uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    kvl_static_for<cut::pieces>([&](auto i) {
        constexpr uint32_t bytes = kvl_piece_at(cut::row, 4, i.value).bytes,
                           numbers = kvl_numbers_in(K, bytes);
        constexpr uint32_t at_once = numbers < 8 ? numbers : 8;
        KVL_UNROLL for (uint32_t n = 0; n < numbers; n += at_once) {
            kvl_in_order<D, N>();
            uint32_t dim = 4 * cut::numbers_before(i.value) + t * numbers + n;
            const uint8_t *p = rows + 2 * (g * D + dim);
            kvl_words<2 *at_once> low = kvl_load_piece<2 * at_once>(p),
                                  high = kvl_load_piece<2 * at_once>(p + 16 * D);
            KVL_UNROLL for (uint32_t step = 0; step < at_once / 4; step++) {
                uint32_t a[4];
                KVL_UNROLL for (uint32_t r = 0; r < 2; r++) {
                    uint32_t n0 = kvl_k_number(K, bytes, step, r, 0), n1 = kvl_k_number(K, bytes, step, r, 1);
                    uint32_t which = (n0 % 2 ? 0x32 : 0x10) | (n1 % 2 ? 0x7600 : 0x5400);
                    a[2 * r] = __byte_perm(low.w[n0 / 2], low.w[n1 / 2], which);
                    a[2 * r + 1] = __byte_perm(high.w[n0 / 2], high.w[n1 / 2], which);
                }
                KVL_UNROLL for (uint32_t tile = 0; tile < N / 8; tile++) {
                    uint32_t b[2];
                    kvl_query<D>(q.rows + q.exact_rows, tile, dim + 4 * step, b);
                    kvl_mma_f16(s[step % kvl_chains(N)][tile], a, b);
                }
            }
        }
    });
}

/* Scores in base 2, or without its last factor what tanh is to be taken of, times 2 log2(e). */
template <class P, uint32_t D, uint32_t N>
KVL_D void kvl_scores(const kvl_unit &unit, const kvl_queries<P::k, D, N> &q, float s[N / 8][4]) {
    uint32_t g = threadIdx.x % 32 / 4;
    float sums[kvl_chains(N)][N / 8][4] = {}, of_token[2] = {1, 1};
    if (!unit.exact) {
        kvl_multiply_packed(unit, q, sums);
        if constexpr (kvl_is_per_token(P::k)) {
            of_token[0] = kvl_h2f(kvl_ld2(unit.k_scales + 2 * g));
            of_token[1] = kvl_h2f(kvl_ld2(unit.k_scales + 2 * g + 16));
        }
    } else if constexpr (!P::one_class) {
        kvl_multiply_exact(unit, q, sums);
    }
    const float *factors = q.factors + (unit.exact ? N : 0);
    KVL_UNROLL for (uint32_t i = 0; i < N / 2; i++) {
        float product = sums[0][i / 4][i % 4];
        if constexpr (kvl_chains(N) == 2) product += sums[1][i / 4][i % 4];
        s[i / 4][i % 4] = product * of_token[i % 4 / 2] * factors[i / 4 * 8 + i % 2];
    }
}

/* What turns V's codes of two tokens into numbers, in a piece: the halves belong to the tokens. */
template <uint32_t V> struct kvl_v_scales { uint32_t scale[2], zero; /* NVFP4: two groups of 16 */ };
template <uint32_t V, uint32_t D, uint32_t BYTES>
KVL_D kvl_v_scales<V> kvl_load_v_scales(const kvl_unit &unit, uint32_t token, uint32_t dim) {
    kvl_v_scales<V> r = {{0, 0}, 0};
    const uint8_t *p = unit.v_scales + token * kvli_gpu_token_scale_bytes(V, D);
    if constexpr (kvl_is_per_token(V)) r.scale[0] = kvl_ld4(p);
    if constexpr (V == KVLI_GPU_NVFP4) {
        KVL_UNROLL for (uint32_t i = 0; i < (BYTES == 16 ? 2 : 1); i++) {
            const uint8_t *group = p + dim / 16 + i;
            r.scale[i] = kvl_nvfp4_scales(group[0] | (uint32_t)group[D / 16] << 8);
        }
    }
    if constexpr (V == KVLI_GPU_INT4) {
        uint32_t x = kvl_ld4(p + dim / 64 * 4),
                 y = kvl_ld4(p + dim / 64 * 4 + kvli_gpu_token_scale_bytes(V, D));
        r.scale[0] = __byte_perm(x, y, 0x5410);
        r.zero = __byte_perm(x, y, 0x7632);
    }
    return r;
}
template <uint32_t V, uint32_t GROUP> KVL_D uint32_t kvl_scale_v(const kvl_v_scales<V> &s, uint32_t codes) {
    if constexpr (V == KVLI_GPU_INT4) return kvl_hfma2(codes, s.scale[0], s.zero);
    if constexpr (kvl_is_16_bit(V)) return codes;
    return kvl_hmul2(codes, s.scale[GROUP]);
}

/* sums.o += V^T P^T. p[tile]: weights of tokens 2 t, 2 t + 1 and 2 t + 8, 2 t + 9 for row 8 tile + g. */
template <uint32_t V, uint32_t D, uint32_t N>
KVL_D void kvl_add_packed(const kvl_unit &unit, const uint32_t p[N / 8][2], uint32_t seen,
                          kvl_sums<D, N> &sums) {
    typedef kvl_cut<V, D, 8> cut;
    uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    kvl_static_for<cut::pieces>([&](auto i) {
        constexpr kvl_piece piece = kvl_piece_at(cut::row, 8, i.value);
        constexpr uint32_t numbers = kvl_numbers_in(V, piece.bytes), first = cut::numbers_before(i.value);
        kvl_in_order<D, N>();
        kvl_words<piece.bytes> x[4];
        kvl_v_scales<V> scales[2];
        KVL_UNROLL for (uint32_t j = 0; j < 4; j++) {
            uint32_t token = 2 * t + j % 2 + j / 2 * 8;
            x[j] = kvl_load_piece<piece.bytes>(unit.v + token * cut::row + piece.offset + g * piece.bytes,
                                               seen >> token & 1);
        }
        KVL_UNROLL for (uint32_t j = 0; j < 2; j++) {
            scales[j] = kvl_load_v_scales<V, D, piece.bytes>(unit, 2 * t + 8 * j, 8 * first + g * numbers);
        }
        kvl_static_for<numbers / 2>([&](auto j) {
            constexpr uint32_t low = V == KVLI_GPU_NVFP4 ? kvl_v_number(V, piece.bytes, j.value, 0) / 16 : 0;
            constexpr uint32_t high = V == KVLI_GPU_NVFP4 ? kvl_v_number(V, piece.bytes, j.value, 1) / 16 : 0;
            uint32_t a[2][2];
            KVL_UNROLL for (uint32_t pair = 0; pair < 2; pair++) {
                kvl_v_codes<V, piece.bytes, j.value>(x[2 * pair], x[2 * pair + 1], a[pair]);
                a[pair][0] = kvl_scale_v<V, low>(scales[pair], a[pair][0]);
                a[pair][1] = kvl_scale_v<V, high>(scales[pair], a[pair][1]);
            }
            KVL_UNROLL for (uint32_t tile = 0; tile < N / 8; tile++) {
                kvl_mma<V>(sums.o[first / 2 + j.value][tile], a[0], p[tile]);
            }
        });
    });
}

/* The same of f16 rows, each lane with the head dims that it has of rows of format V. */
template <uint32_t V, uint32_t D, uint32_t N>
KVL_D void kvl_add_exact(const kvl_unit &unit, const uint32_t p[N / 8][2], uint32_t seen,
                         kvl_sums<D, N> &sums) {
    const uint8_t *rows = kvl_exact_rows(unit).v;
    typedef kvl_cut<V, D, 8> cut;
    uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    kvl_static_for<cut::pieces>([&](auto i) {
        constexpr uint32_t bytes = kvl_piece_at(cut::row, 8, i.value).bytes,
                           numbers = kvl_numbers_in(V, bytes);
        constexpr uint32_t first = cut::numbers_before(i.value), at_once = numbers < 8 ? numbers : 8;
        KVL_UNROLL for (uint32_t n = 0; n < numbers; n += at_once) {
            kvl_in_order<D, N>();
            kvl_words<2 * at_once> x[4];
            KVL_UNROLL for (uint32_t j = 0; j < 4; j++) {
                uint32_t token = 2 * t + j % 2 + j / 2 * 8;
                x[j] = kvl_load_piece<2 * at_once>(rows + 2 * (token * D + 8 * first + g * numbers + n),
                                                   seen >> token & 1);
            }
            KVL_UNROLL for (uint32_t step = 0; step < at_once / 2; step++) {
                uint32_t a[4];
                KVL_UNROLL for (uint32_t j = 0; j < 4; j++) {
                    uint32_t number = kvl_v_number(V, bytes, step, j % 2), pair = j / 2 * 2;
                    a[j] = __byte_perm(x[pair].w[number / 2], x[pair + 1].w[number / 2],
                                       number % 2 ? 0x7632 : 0x5410);
                }
                KVL_UNROLL for (uint32_t tile = 0; tile < N / 8; tile++) {
                    kvl_mma_f16(sums.o[(first + n) / 2 + step][tile], a, p[tile]);
                }
            }
        }
    });
}

/* Zeroes V rows of a slot that nobody sees. */
template <uint32_t V, uint32_t D> KVL_D void kvl_zero_unseen(const kvl_unit &unit, uint32_t seen) {
    constexpr uint32_t row = kvli_gpu_row_bytes(V, D);
    if (seen == 0xffff) return;
    KVL_ROLLED for (uint32_t at = threadIdx.x % 32 * 16; at < KVL_UNIT * row; at += 512) {
        if (!(seen >> at / row & 1)) kvl_st16((uint8_t *)unit.v + at, make_uint4(0, 0, 0, 0));
    }
    kvl_bulk_fence(); /* the slot's next unit comes by bulk copies */
    __syncwarp();
}

/* Rows of tokens that are not in `seen` (bits 0..15) may never have been written, and count as zeros. Sealed rows are all
   written. */
template <class P, uint32_t D, uint32_t N>
KVL_D void kvl_add_values(const kvl_unit &unit, const uint32_t p[N / 8][2], uint32_t seen,
                          kvl_sums<D, N> &sums) {
    if (!unit.exact) {
        constexpr bool in_slot = KVL_ARCH >= 800;
        if constexpr (P::one_class && in_slot) kvl_zero_unseen<P::v, D>(unit, seen);
        kvl_add_packed<P::v>(unit, p, P::one_class && !in_slot ? seen : 0xffff, sums);
    } else if constexpr (!P::one_class) {
        kvl_add_exact<P::v>(unit, p, seen, sums);
    }
}

/* ---- softmax ---- */

/* Removes from s what rows do not see. Returns which tokens any row sees. */
template <uint32_t N>
KVL_D uint32_t kvl_mask(const kvli_cu_attend_args &a, const uint32_t *position, const kvl_unit &unit,
                        float s[N / 8][4]) {
    const kvl_sight sight = {a.block_tokens, a.window, a.sink_tokens};
    const uint32_t x_first = position[0], x_last = position[N - 1];
    uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    if (kvl_all_see(sight, unit.own, x_first, x_last, unit.token, unit.token + KVL_UNIT - 1)) return 0xffff;
    KVL_UNROLL for (uint32_t i = 0; i < N / 2; i++) {
        uint32_t x = position[i / 4 * 8 + 2 * t + i % 2];
        if (!kvl_sees(sight, unit.own, x, unit.token + g + i % 4 / 2 * 8)) s[i / 4][i % 4] = -INFINITY;
    }
    uint32_t token = unit.token + lane % 16;
    return __ballot_sync(KVL_ALL_LANES, kvl_any_sees(sight, unit.own, x_first, x_last, token, token)) &
           0xffff;
}

/* cap · tanh(score / cap) in base 2, from 2 log2(e) · score / cap: as exact as cap · 2^-22. */
KVL_D float kvl_capped(float x, float cap) { return cap * KVL_LOG2E * (1 - kvl_divide(2, 1 + kvl_exp2(x))); }

/* Raises m of rows of which a score is far above it, and rescales what was summed up with the old one. Each row for
   itself, so that no row's result depends on its neighbours. */
template <uint32_t D, uint32_t N> KVL_D void kvl_raise(const float s[N / 8][4], kvl_sums<D, N> &sums) {
    KVL_UNROLL for (uint32_t tile = 0; tile < N / 8; tile++) {
        KVL_UNROLL for (uint32_t j = 0; j < 2; j++) {
            float top = fmaxf(s[tile][j], s[tile][j + 2]);
            KVL_UNROLL for (uint32_t x = 4; x < 32; x *= 2) top =
                fmaxf(top, __shfl_xor_sync(KVL_ALL_LANES, top, x));
            float m = top > sums.m[tile][j] + KVL_SLACK ? top : sums.m[tile][j],
                  shrink = kvl_exp2(sums.m[tile][j] - m);
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
    KVL_UNROLL for (uint32_t i = 0; i < N / 2; i++) above |=
        s[i / 4][i % 4] > sums.m[i / 4][i % 2] + KVL_SLACK;
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

template <class P, uint32_t D, uint32_t N>
KVL_D void kvl_attend_unit(const kvli_cu_attend_args &a, const kvl_shared<P, D, N> &shared,
                           const kvl_unit &unit, const kvl_queries<P::k, D, N> &q, kvl_sums<D, N> &sums) {
    float s[N / 8][4];
    uint32_t p[N / 8][2];
    kvl_scores<P>(unit, q, s);
    if (a.softcap != 0) {
        KVL_UNROLL for (uint32_t i = 0; i < N / 2; i++) s[i / 4][i % 4] =
            kvl_capped(s[i / 4][i % 4], a.softcap);
    }
    uint32_t seen = kvl_mask<N>(a, shared.position, unit, s);
    kvl_weights<P::v>(s, sums, p);
    kvl_add_values<P>(unit, p, seen, sums);
}

/* ---- the warps' sums together ---- */

/* Adds a warp's sums to shared.sum, times `keep` for each of the lane's rows. */
template <uint32_t V, uint32_t D, uint32_t N>
KVL_D void kvl_add_warp(float *sum, const kvl_sums<D, N> &sums, const float keep[N / 8][2]) {
    typedef kvl_cut<V, D, 8> cut;
    uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    kvl_static_for<cut::pieces>([&](auto i) {
        constexpr uint32_t bytes = kvl_piece_at(cut::row, 8, i.value).bytes;
        constexpr uint32_t numbers = kvl_numbers_in(V, bytes), before = cut::numbers_before(i.value);
        float *at[4]; /* by the two low bits that kvl_sum_index shuffles */
        KVL_UNROLL for (uint32_t low = 0; low < 4; low++) {
            at[low] = sum + (kvl_sum_index<D>(2 * t, 8 * before + g * numbers) ^ low * 8);
        }
        KVL_UNROLL for (uint32_t j = 0; j < numbers * (N / 8); j++) {
            uint32_t tile = j / numbers, step = j % numbers / 2, hi = j % 2,
                     number = kvl_v_number(V, bytes, step, hi);
            const float *o = sums.o[before / 2 + step][tile] + 2 * hi;
            uint32_t place = kvl_sum_index<D>(8 * tile, number);
            float2 *two = (float2 *)(at[place / 8 % 4] + (place & ~31u)), old = *two;
            *two = make_float2(old.x * keep[tile][0] + o[0], old.y * keep[tile][1] + o[1]);
        }
    });
}

/* The largest m of a row in what was added up and in the warps. */
template <class P, uint32_t D, uint32_t N>
KVL_D float kvl_largest_m(const kvl_shared<P, D, N> &shared, uint32_t r) {
    float m = shared.total_m[r];
    KVL_UNROLL for (uint32_t w = 0; w < KVL_WARPS; w++) m = fmaxf(m, shared.warp_m[w * N + r]);
    return m;
}

/* Adds what the warps have, times `factor`, to the totals, in the order of warps. For the whole block. */
template <class P, uint32_t D, uint32_t N>
KVL_D void kvl_fold(const kvl_shared<P, D, N> &shared, kvl_sums<D, N> &sums, float factor) {
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, t = lane % 4, r = threadIdx.x % N;
    float keep[N / 8][2];
    KVL_UNROLL for (uint32_t i = 0; i < N / 4; i++) {
        float l = sums.l[i / 2][i % 2];
        KVL_UNROLL for (uint32_t x = 4; x < 32; x *= 2) l += __shfl_xor_sync(KVL_ALL_LANES, l, x);
        uint32_t row = warp * N + i / 2 * 8 + 2 * t + i % 2;
        if (lane < 4) shared.warp_m[row] = sums.m[i / 2][i % 2], shared.warp_l[row] = l;
    }
    __syncthreads();
    KVL_UNROLL for (uint32_t i = 0; i < N / 4; i++) {
        uint32_t row = i / 2 * 8 + 2 * t + i % 2;
        float m = kvl_largest_m(shared, row), shrink = kvl_exp2(sums.m[i / 2][i % 2] - m) * factor;
        keep[i / 2][i % 2] = warp == 0 ? kvl_exp2(shared.total_m[row] - m) : 1;
        KVL_UNROLL for (uint32_t j = 0; j < D / 16; j++) {
            sums.o[j][i / 2][i % 2] *= shrink;
            sums.o[j][i / 2][i % 2 + 2] *= shrink;
        }
    }
    KVL_ROLLED for (uint32_t w = 0; w < KVL_WARPS; w++) {
        if (w == warp) kvl_add_warp<P::v>(shared.sum, sums, keep);
        __syncthreads();
    }
    float m = kvl_largest_m(shared, r), l = shared.total_l[r] * kvl_exp2(shared.total_m[r] - m);
    KVL_UNROLL for (uint32_t w = 0; w < KVL_WARPS; w++) l +=
        shared.warp_l[w * N + r] * kvl_exp2(shared.warp_m[w * N + r] - m);
    __syncthreads();
    if (threadIdx.x < N) shared.total_m[r] = m, shared.total_l[r] = l;
    __syncthreads();
}

/* Turns the sums of packed blocks back. */
template <class P, uint32_t D, uint32_t N> KVL_D void kvl_rotate_sums(const kvl_shared<P, D, N> &shared) {
    uint32_t lane = threadIdx.x % 32;
    KVL_ROLLED for (uint32_t r = threadIdx.x / 32; r < N; r += KVL_WARPS) {
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
KVL_D void kvl_write(const kvli_cu_attend_args &a, const kvl_shared<P, D, N> &shared) {
    const kvli_gpu_item &item = a.items[*shared.item];
    bool whole = item.partial == KVLI_GPU_NONE;
    KVL_ROLLED for (uint32_t r = threadIdx.x / 32; r < item.n_rows; r += KVL_WARPS) {
        uint32_t lane = threadIdx.x % 32;
        kvl_row row = kvl_row_of(a, a.spans[item.span], blockIdx.y, item.row + r);
        uint64_t partial = kvl_partial_number(a, item, r);
        float m = shared.total_m[r], l = shared.total_l[r],
              factor = whole ? kvl_output_factor(a, row.head, m, l) : 1;
        if (!whole && lane < 2) a.partial_ml[2 * partial + lane] = lane ? l : m;
        KVL_ROLLED for (uint32_t e = lane; e < D; e += 32) {
            float x = shared.sum[kvl_sum_index<D>(r, e)] * factor;
            if (whole)
                kvl_tensor_set(a.out, row.tensor_row, row.head, e, x);
            else
                a.partial_o[partial * D + e] = x;
        }
    }
}

/* ---- the kernel ---- */

/* A warp's units of a pass. The queries are prepared in the first one, while the first copies are under way. */
template <class P, uint32_t D, uint32_t N>
KVL_D void kvl_pass(const kvli_cu_attend_args &a, const kvl_shared<P, D, N> &shared, uint32_t pass,
                    kvl_unit_walk &walk, kvl_ring<P, D> &ring, kvl_queries<P::k, D, N> &q,
                    kvl_sums<D, N> &sums) {
    bool prepared = pass > 0;
    KVL_ROLLED for (;;) {
        kvl_unit unit = {};
        bool there;
        if constexpr (KVL_ARCH >= 800) {
            ring.fill(walk, a, pass);
            there = ring.under_way > 0;
        } else {
            there = walk.template take<P, D>(a, pass, &unit);
        }
        if (!prepared) {
            kvl_prepare(a, shared);
            __syncthreads();
            kvl_load_queries(q, shared);
            prepared = true;
        }
        if (!there) break;
        if constexpr (KVL_ARCH >= 800) unit = ring.wait();
        kvl_attend_unit<P>(a, shared, unit, q, sums);
        if constexpr (KVL_ARCH >= 800) ring.release();
    }
}

template <class P, uint32_t D, uint32_t N>
KVL_D void kvl_decode(const kvli_cu_attend_args &a, uint8_t *memory) {
    uint32_t index = a.first_item + blockIdx.x;
    if (index >= a.end_item || index >= a.counts->decodes) return;
    kvl_shared<P, D, N> shared(memory);
    kvl_unit_walk walk;
    kvl_ring<P, D> ring;
    kvl_queries<P::k, D, N> q;
    kvl_sums<D, N> sums;
    if constexpr (KVL_ARCH >= 800) ring.start(shared.ring, a.stages);
    KVL_ROLLED for (uint32_t pass = 0;; pass++) {
        walk.start();
        kvl_clear(sums);
        kvl_pass(a, shared, pass, walk, ring, q, sums);
        if (P::two_passes && threadIdx.x % 32 == 0) shared.exact_seen[threadIdx.x / 32] = walk.exact_seen();
        kvl_fold(shared, sums, P::v == KVLI_GPU_NVFP4 && pass == 0 ? KVL_NVFP4_FACTOR * a.v_global : 1);
        if constexpr (!P::two_passes) break;
        if (pass == 0 && P::v_rotated) kvl_rotate_sums(shared);
        bool exact = false;
        KVL_UNROLL for (uint32_t w = 0; w < KVL_WARPS; w++) exact |= shared.exact_seen[w] != 0;
        if (pass == 1 || !exact) break;
    }
    kvl_write(a, shared);
}

/* At least so many blocks of threads on a multiprocessor, as far as registers go: 128, 168 or 255 of them. (sm_75 holds
   units in registers while they come.) */
KVLI_GPU_FN uint32_t kvl_blocks_per_sm(uint32_t dim, uint32_t n) {
    return dim * n <= (KVL_ARCH < 800 ? 64 : 96) * 8 ? 4 : dim * n <= 128 * 8 ? 3 : 2;
}

#define KVL_DECODE_N(preset, D, N)                                                                    \
    KVL_KERNEL(kvl_decode_##preset##_d##D##_n##N, 32 * KVLI_CU_DECODE_WARPS, kvl_blocks_per_sm(D, N), \
               kvli_cu_attend_args) {                                                                 \
        KVL_DYN_SMEM(uint8_t, memory);                                                                \
        if constexpr (KVL_ARCH >= 800 || kvl_preset_##preset::k != KVLI_GPU_BF16)                     \
            kvl_decode<kvl_preset_##preset, D, N>(a, memory);                                         \
    }
#define KVL_DECODE(preset) /* as kvli_cu_decode_rows says */ \
    KVL_DECODE_N(preset, 64, 8)                              \
    KVL_DECODE_N(preset, 64, 16)                             \
    KVL_DECODE_N(preset, 80, 8)                              \
    KVL_DECODE_N(preset, 96, 8)                              \
    KVL_DECODE_N(preset, 128, 8)                             \
    KVL_DECODE_N(preset, 128, 16)                            \
    KVL_DECODE_N(preset, 192, 8)                             \
    KVL_DECODE_N(preset, 256, 8)
KVL_DECODE(f16)
KVL_DECODE(bf16)
KVL_DECODE(int8)
KVL_DECODE(int8c)
KVL_DECODE(fp8)
KVL_DECODE(nvfp4)
KVL_DECODE(balanced)
KVL_DECODE(int4)
