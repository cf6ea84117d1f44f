/* How the kernels stand in the generated kvlite_cuda_kernels.h, and how they are taken out. C99 and C++; the text of this
   file stands in the generated header, before the kernels.

   A part is one architecture's: a cubin, or PTX with a 0 after it; both as cuModuleLoadData takes them. Parts that are much
   alike stand one after another in a raw LZMA1 stream (lc, lp and pb as in the part). A stream is text: a digit is a
   character c of value c - 35, less 1 if c > '?', less 1 if c > '\\': 0..84. Five digits, the first the most
   significant, are a number in base 85: four bytes, the first the most significant. A stream begins with a string; its
   strings follow one another. */
#ifndef KVLI_CUDA_UNPACK_H
#define KVLI_CUDA_UNPACK_H
#include <stddef.h>
#include <stdint.h>

typedef struct kvli_cu_part {
    uint32_t arch; /* 10 * major + minor */
    uint32_t ptx;
    uint32_t chunk;        /* its stream's first string */
    uint32_t packed_bytes; /* of the stream; equal to before + raw_bytes: not compressed */
    uint32_t before;       /* bytes of other parts that come before it in the stream */
    uint32_t raw_bytes;
    uint32_t lc, lp, pb; /* lc + lp <= 4 */
} kvli_cu_part;

/* The part that runs on a device of this compute capability: of its major and the greatest minor up to its own, else
   the PTX; null if there is none. */
static inline const kvli_cu_part *kvli_cu_find_part(const kvli_cu_part *parts, uint32_t n, uint32_t arch) {
    const kvli_cu_part *best = NULL;
    for (uint32_t i = 0; i < n; i++) {
        const kvli_cu_part *p = &parts[i];
        if (p->arch > arch || (!p->ptx && p->arch / 10 != arch / 10)) continue;
        if (!best || p->ptx < best->ptx || (p->ptx == best->ptx && p->arch > best->arch)) best = p;
    }
    return best;
}

/* Probabilities that unpacking needs, as an array of uint16_t. */
#define KVLI_CU_UNPACK_PROBS (1984 + (0x300 << 4))

typedef struct kvli_cu_unpacker {
    const char *const *chunk;
    const char *digit;
    uint32_t group, group_bytes, left; /* of the text; bytes that are left of it */
    uint32_t range, code;
    int damaged;
} kvli_cu_unpacker;

static inline uint32_t kvli_cu_next_byte(kvli_cu_unpacker *u) {
    if (!u->left) {
        u->damaged = 1;
        return 0;
    }
    if (!u->group_bytes) {
        uint32_t v = 0;
        if (!*u->digit) u->digit = *u->chunk ? *u->chunk++ : u->digit;
        for (int i = 0; i < 5 && *u->digit; i++, u->digit++)
            v = v * 85 + (uint32_t)(*u->digit - 35 - (*u->digit > '?') - (*u->digit > '\\'));
        u->group = v;
        u->group_bytes = 4;
    }
    u->left--;
    return u->group >> 8 * --u->group_bytes & 255u;
}

static inline uint32_t kvli_cu_bit(kvli_cu_unpacker *u, uint16_t *p) {
    if (u->range < 1u << 24) {
        u->range <<= 8;
        u->code = u->code << 8 | kvli_cu_next_byte(u);
    }
    uint32_t bound = (u->range >> 11) * *p;
    if (u->code < bound) {
        u->range = bound;
        *p = (uint16_t)(*p + ((2048 - *p) >> 5));
        return 0;
    }
    u->range -= bound;
    u->code -= bound;
    *p = (uint16_t)(*p - (*p >> 5));
    return 1;
}

/* n bits through a tree, the first the most significant. */
static inline uint32_t kvli_cu_tree(kvli_cu_unpacker *u, uint16_t *p, uint32_t n) {
    uint32_t m = 1;
    for (uint32_t i = 0; i < n; i++) m = m << 1 | kvli_cu_bit(u, p + m);
    return m - (1u << n);
}

/* n bits through a tree, the first the least significant. */
static inline uint32_t kvli_cu_tree_reverse(kvli_cu_unpacker *u, uint16_t *p, uint32_t n) {
    uint32_t m = 1, v = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t bit = kvli_cu_bit(u, p + m);
        m = m << 1 | bit;
        v |= bit << i;
    }
    return v;
}

/* p: choices at 0 and 1, then trees of 3 bits by position from 2 and 130, one of 8 bits from 258. */
static inline uint32_t kvli_cu_length(kvli_cu_unpacker *u, uint16_t *p, uint32_t position) {
    if (!kvli_cu_bit(u, p)) return 2 + kvli_cu_tree(u, p + 2 + 8 * position, 3);
    if (!kvli_cu_bit(u, p + 1)) return 10 + kvli_cu_tree(u, p + 130 + 8 * position, 3);
    return 18 + kvli_cu_tree(u, p + 258, 8);
}

/* p: slots by length from 0, the middle bits from 256, the last four from 371. */
static inline uint32_t kvli_cu_distance(kvli_cu_unpacker *u, uint16_t *p, uint32_t length) {
    uint32_t slot = kvli_cu_tree(u, p + 64 * (length < 6 ? length - 2 : 3), 6), direct = (slot >> 1) - 1, v;
    if (slot < 4) return slot;
    v = (2 | (slot & 1)) << direct;
    if (slot < 14) return v + kvli_cu_tree_reverse(u, p + 256 + v - slot - 1, direct);
    for (uint32_t i = direct; i-- > 4;) {
        if (u->range < 1u << 24) {
            u->range <<= 8;
            u->code = u->code << 8 | kvli_cu_next_byte(u);
        }
        u->range >>= 1;
        if (u->code >= u->range) {
            u->code -= u->range;
            v |= 1u << i;
        }
    }
    return v + kvli_cu_tree_reverse(u, p + 371, 4);
}

/* A literal: 8 bits, of which those before the first that differs from `match` (256: there is none) know it. */
static inline uint8_t kvli_cu_literal(kvli_cu_unpacker *u, uint16_t *p, uint32_t match) {
    uint32_t m = 1;
    while (m < 256) {
        if (match >= 256) {
            m = m << 1 | kvli_cu_bit(u, p + m);
            continue;
        }
        uint32_t expected = match >> 7 & 1, bit = kvli_cu_bit(u, p + ((1 + expected) << 8) + m);
        match = match << 1 & 255u;
        m = m << 1 | bit;
        if (bit != expected) match = 256;
    }
    return (uint8_t)m;
}

enum { /* where the probabilities stand */
       KVLI_CU_P_MATCH = 0,
       KVLI_CU_P_REP = 192,
       KVLI_CU_P_REP0 = 204,
       KVLI_CU_P_REP1 = 216,
       KVLI_CU_P_REP2 = 228,
       KVLI_CU_P_REP0_LONG = 240,
       KVLI_CU_P_LENGTH = 432,
       KVLI_CU_P_REP_LENGTH = 946,
       KVLI_CU_P_DISTANCE = 1460,
       KVLI_CU_P_LITERAL = 1984
};

/* A match's length, its distance less 1 in rep[0]; 0: one byte at rep[0]. Brings `state` and `rep` up to date. */
static inline uint32_t kvli_cu_match(kvli_cu_unpacker *u, uint16_t *p, uint32_t *state, uint32_t *rep,
                                     uint32_t position) {
    uint32_t s = *state;
    if (!kvli_cu_bit(u, p + KVLI_CU_P_REP + s)) {
        uint32_t length = kvli_cu_length(u, p + KVLI_CU_P_LENGTH, position);
        rep[3] = rep[2], rep[2] = rep[1], rep[1] = rep[0];
        rep[0] = kvli_cu_distance(u, p + KVLI_CU_P_DISTANCE, length);
        *state = s < 7 ? 7 : 10;
        return length;
    }
    if (!kvli_cu_bit(u, p + KVLI_CU_P_REP0 + s)) {
        if (!kvli_cu_bit(u, p + KVLI_CU_P_REP0_LONG + 16 * s + position)) {
            *state = s < 7 ? 9 : 11;
            return 0;
        }
    } else {
        uint32_t which =
            !kvli_cu_bit(u, p + KVLI_CU_P_REP1 + s) ? 1 : 2 + kvli_cu_bit(u, p + KVLI_CU_P_REP2 + s);
        uint32_t distance = rep[which];
        for (; which; which--) rep[which] = rep[which - 1];
        rep[0] = distance;
    }
    *state = s < 7 ? 8 : 11;
    return kvli_cu_length(u, p + KVLI_CU_P_REP_LENGTH, position);
}

static inline int kvli_cu_unlzma(kvli_cu_unpacker *u, const kvli_cu_part *part, uint8_t *out, uint16_t *p) {
    uint32_t n = part->before + part->raw_bytes, at = 0, state = 0, rep[4] = {0, 0, 0, 0};
    for (uint32_t i = 0; i < KVLI_CU_UNPACK_PROBS; i++) p[i] = 1024;
    u->range = 0xffffffffu;
    for (int i = 0; i < 5; i++) u->code = u->code << 8 | kvli_cu_next_byte(u);
    while (at < n && !u->damaged) {
        uint32_t position = at & ((1u << part->pb) - 1);
        if (!kvli_cu_bit(u, p + KVLI_CU_P_MATCH + 16 * state + position)) {
            uint32_t before = at ? out[at - 1] : 0;
            uint32_t context = (at & ((1u << part->lp) - 1)) << part->lc | before >> (8 - part->lc);
            uint32_t match = state < 7 ? 256u : out[at - rep[0] - 1];
            out[at++] = kvli_cu_literal(u, p + KVLI_CU_P_LITERAL + 0x300 * context, match);
            state = state < 4 ? 0 : state < 10 ? state - 3 : state - 6;
            continue;
        }
        uint32_t length = kvli_cu_match(u, p, &state, rep, position);
        if (!length) length = 1;
        if (rep[0] >= at) return 0;
        if (length > n - at) length = n - at; /* it goes on into the next part */
        for (uint32_t end = at + length; at < end; at++) out[at] = out[at - rep[0] - 1];
    }
    return !u->damaged;
}

/* Writes before + raw_bytes bytes to `out`, the part's the last of them; probs [KVLI_CU_UNPACK_PROBS]. False: the text
   is damaged. */
static inline int kvli_cu_unpack_part(const char *const *image, const kvli_cu_part *part, uint8_t *out,
                                      uint16_t *probs) {
    kvli_cu_unpacker u = {NULL, "", 0, 0, 0, 0, 0, 0};
    u.chunk = image + part->chunk;
    u.left = part->packed_bytes;
    if (part->packed_bytes != part->before + part->raw_bytes) return kvli_cu_unlzma(&u, part, out, probs);
    for (uint32_t i = 0; i < part->packed_bytes; i++) out[i] = (uint8_t)kvli_cu_next_byte(&u);
    return !u.damaged;
}

#endif
