#version 450
// Attention of a few query rows (one token's query heads of a KV head, or those of some draft tokens) over many cached ones.
//
// A workgroup takes an item: at most ROWS packed query rows, one KV head, a range of blocks. It goes through the blocks one at a
// time (so that all of it reads one bank). LANES invocations are a slot: they share a token, each with pieces of 8 head dims, of
// which it keeps all rows of q and of the sums in registers, so that each byte of K and V is read and decoded once for all rows.
// A slot takes TOKENS tokens at once, whose loads are all under way before the first is used, and has an online softmax of its
// own; the slots' sums are added in their order at the end. Which tokens a slot takes follows from their positions alone.
//
// Packed blocks come first, with the query as they need it (rotated, if keys are), then their sums are turned back if values
// are rotated, then exact blocks: sinks in the table, own blocks.
//
// Roofline: bytes, each read once. A lane's work for a number of K or V, ROWS = 4: 4 fused multiply-adds and what formats.glsl
// takes to decode it (16 bits 1-2, 8 bits 2-6, 4 bits 2-5), plus for a token 4 ROWS log2(LANES) / TOKENS or so for the softmax.
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_control_flow_attributes : require
#if KVL_SUBGROUP
#extension GL_KHR_shader_subgroup_shuffle : require
#extension GL_KHR_shader_subgroup_ballot : require
#endif
#include "formats.glsl"
#include "softmax.glsl"

const uint SLOTS = WORKGROUP / LANES;
const uint ROW_PIECES = DIM / 8;
const uint PIECES = (ROW_PIECES + LANES - 1) / LANES; // of a lane: piece i is number i * LANES + lane of the row
const uint FOURS = 2 * PIECES;
#if KVL_SUBGROUP
const uint MOST_TOKENS = 4; // as in kvli_vk_decode_tokens
#else
const uint MOST_TOKENS = ROWS * DIM > 1920 ? 2 : 4;
#endif
const uint TOKENS = SLOTS == 1 ? 1 : BLOCK_TOKENS / SLOTS < MOST_TOKENS ? BLOCK_TOKENS / SLOTS : MOST_TOKENS;
const uint STEP = SLOTS * TOKENS; // tokens that a workgroup takes at once
const uint SCORES = TOKENS * ROWS;
const bool ONE_CLASS = K_FORMAT == EXACT_FORMAT && V_FORMAT == EXACT_FORMAT;
const float KVL_UNSEEN = -2e38; // a score that is not seen: below KVL_NOTHING, so that its weight is recognised as 0

// What invocations tell each other: the slots' sums of a row, or lanes' parts of scores; all rows.
const uint ROW_WORK = SLOTS == 1 ? 1 : SLOTS * DIM, SCORE_WORK = KVL_SUBGROUP != 0 ? 0 : WORKGROUP * SCORES;
shared float kvl_work[ROW_WORK > SCORE_WORK ? ROW_WORK : SCORE_WORK];
shared float kvl_total[ROWS * DIM];
shared float kvl_slot_m[SLOTS * ROWS], kvl_slot_l[SLOTS * ROWS];

// The item and this invocation's place.
kvli_vk_layer layer;
kvli_gpu_item item;
kvli_gpu_span span;
kvl_sight sight;
uint kv_head, lane, slot, x_first, x_last;
uint position[ROWS];

// What an invocation has of the rows, FOURS for each: queries, sums. Scores: token k's with row r at k * ROWS + r. What goes from or
// to shared memory does so for one row after the other, in the first or last FOURS while the others move up: indices must be
// constants, and the code of a row is there once.
vec4 q[ROWS * FOURS], acc[ROWS * FOURS];
float m[ROWS], l[ROWS];
float score[SCORES];

uint kvl_piece(uint i) { return i * LANES + lane; }
bool kvl_has_piece(uint i) { return ROW_PIECES % LANES == 0 || kvl_piece(i) < ROW_PIECES; }
// Lanes without one read the last.
uint kvl_dim_of_piece(uint i) { return 8 * (kvl_has_piece(i) ? kvl_piece(i) : ROW_PIECES - 1); }

// For exchanges through shared memory. With one slot the workgroup is one subgroup; a barrier of all is dear on a CPU.
void kvl_sync() {
#if KVL_SUBGROUP
    if (SLOTS == 1) {
        subgroupMemoryBarrierShared();
        subgroupBarrier();
        return;
    }
#endif
    barrier();
}

// ---- rotation ----
vec4 kvl_row4[FOURS]; // what this invocation has of a row

const uint HADAMARD = DIM % 128 == 0 ? 128 : DIM % 64 == 0 ? 64 : DIM % 32 == 0 ? 32 : 16;

// All rows in kvl_total times the Hadamard matrix (its own inverse), block-diagonal in blocks of HADAMARD.
void kvl_rotate_total() {
    [[dont_unroll]] for (uint apart = 1; apart < HADAMARD; apart *= 2) {
        [[dont_unroll]] for (uint i = gl_LocalInvocationID.x; i < ROWS * DIM / 2; i += WORKGROUP) {
            uint e = 2 * i - (i & apart - 1);
            float low = kvl_total[e], high = kvl_total[e + apart];
            kvl_total[e] = low + high;
            kvl_total[e + apart] = low - high;
        }
        kvl_sync();
    }
}
const float HADAMARD_NORM = HADAMARD == 128 ? 0.08838834764831845 : HADAMARD == 64 ? 0.125 : HADAMARD == 32 ? 0.17677669529663687 : 0.25;

// A row to and from kvl_total.
void kvl_put_row(uint r) {
    [[unroll]] for (uint i = 0; i < 4 * FOURS; i++) {
        if (kvl_has_piece(i / 8)) kvl_total[r * DIM + 8 * kvl_piece(i / 8) + i % 8] = kvl_row4[i / 4][i % 4];
    }
}
void kvl_get_row(uint r) {
    [[unroll]] for (uint i = 0; i < 4 * FOURS; i++) {
        kvl_row4[i / 4][i % 4] = kvl_has_piece(i / 8) ? kvl_total[r * DIM + 8 * kvl_piece(i / 8) + i % 8] : 0;
    }
}

// ---- queries ----
// All rows of q times the score's factor, through kvl_total (in a loop: a load of a tensor is much code); rows past the item's end
// are the last once more.
void kvl_load_queries(bool rotated) {
    float factor = kvl_score_factor(layer) * (rotated ? HADAMARD_NORM : 1);
    kvl_sync();
    [[dont_unroll]] for (uint i = gl_LocalInvocationID.x; i < ROWS * DIM; i += WORKGROUP) {
        kvl_row row = kvl_row_of(span, kv_head, item.row + min(i / DIM, item.n_rows - 1));
        kvl_total[i] = kvl_q_get(kvl_element(push.a, row) + i % DIM) * factor;
    }
    kvl_sync();
    if (rotated) kvl_rotate_total();
    [[dont_unroll]] for (uint r = 0; r < ROWS; r++) {
        kvl_get_row(r);
        [[unroll]] for (uint i = 0; i < (ROWS - 1) * FOURS; i++) q[i] = q[i + FOURS];
        [[unroll]] for (uint i = 0; i < FOURS; i++) q[(ROWS - 1) * FOURS + i] = kvl_row4[i];
    }
    [[unroll]] for (uint r = 0; r < ROWS; r++)
        position[r] = kvl_row_of(span, kv_head, item.row + min(r, item.n_rows - 1)).position;
    kvl_sync();
}

// ---- scores ----
float kvl_dot(vec4 a, vec4 b, float sum) { return fma(a.x, b.x, fma(a.y, b.y, fma(a.z, b.z, fma(a.w, b.w, sum)))); }

// Each lane's part of every score becomes the sum over the slot's lanes.
#if KVL_SUBGROUP
#define KVL_FOUR(i) \
    ((subgroupBroadcast(x, i) + subgroupBroadcast(x, i + 1)) + (subgroupBroadcast(x, i + 2) + subgroupBroadcast(x, i + 3)))
void kvl_sum_over_lanes() {
    [[unroll]] for (uint i = 0; i < SCORES; i++) {
        float x = score[i], sum = x;
        if (SLOTS == 1 && LANES >= 4 && LANES <= 16) { // the slot is a subgroup
            sum = KVL_FOUR(0);
            if (LANES >= 8) sum += KVL_FOUR(4);
            if (LANES == 16) sum += KVL_FOUR(8) + KVL_FOUR(12);
        } else {
            [[unroll]] for (uint apart = 1; apart < LANES; apart *= 2) sum += subgroupShuffleXor(sum, apart);
        }
        score[i] = sum;
    }
}
#else
void kvl_sum_over_lanes() {
    uint me = gl_LocalInvocationID.x, first = me - lane;
    [[unroll]] for (uint i = 0; i < SCORES; i++) kvl_work[i * WORKGROUP + me] = score[i];
    barrier();
    [[unroll]] for (uint i = 0; i < SCORES; i += LANES) { // lane i % LANES adds up score i, in place
        uint at = (i + lane) * WORKGROUP + first;
        if (i + lane < SCORES) {
            float sum = 0;
            [[unroll]] for (uint j = 0; j < LANES; j++) sum += kvl_work[at + j];
            kvl_work[at] = sum;
        }
    }
    barrier();
    [[unroll]] for (uint i = 0; i < SCORES; i++) score[i] = kvl_work[i * WORKGROUP + first];
    barrier();
}
#endif

// Scores to weights, and the sums as if they had been made with the new largest score.
void kvl_weights() {
    [[unroll]] for (uint r = 0; r < ROWS; r++) {
        float top = m[r];
        [[unroll]] for (uint k = 0; k < TOKENS; k++) top = max(top, score[k * ROWS + r]);
        float shrink = exp2(m[r] - top);
        m[r] = top;
        l[r] *= shrink;
        [[unroll]] for (uint i = 0; i < FOURS; i++) acc[r * FOURS + i] *= shrink;
        [[unroll]] for (uint k = 0; k < TOKENS; k++) {
            float s = score[k * ROWS + r], w = s < KVL_NOTHING ? 0 : exp2(s - top);
            score[k * ROWS + r] = w;
            l[r] += w;
        }
    }
}

// ---- tokens ----
struct kvl_side {
    uint format, tile;
    float factor;
};

// The scales of a block whose keys have them per channel.
vec4 k_scale[FOURS], k_zero[FOURS];
void kvl_load_channel_scales(const uint format, kvl_tiles tiles) {
    if (!kvl_is_per_channel(format)) return;
    [[unroll]] for (uint i = 0; i < PIECES; i++) {
        uint e = kvl_dim_of_piece(i);
        kvl_eight scale = kvl_channel_scales(format, tiles.bank, tiles.k, e, 0),
                  zero = kvl_channel_scales(format, tiles.bank, tiles.k, e, 1);
        k_scale[2 * i] = scale.low, k_scale[2 * i + 1] = scale.high;
        k_zero[2 * i] = zero.low, k_zero[2 * i + 1] = zero.high;
    }
}

// The part of a lane in a token's scores: 8 numbers of K with all rows.
void kvl_multiply(const uint format, uint k, uint i, kvl_raw8 raw, uint raw_scale) {
    kvl_eight x = kvl_codes8(format, raw);
    if (kvl_is_per_channel(format)) {
        x = kvl_madd8(x, kvl_eight(k_scale[2 * i], k_scale[2 * i + 1]), kvl_eight(k_zero[2 * i], k_zero[2 * i + 1]));
    } else if (kvl_is_per_group(format)) {
        x = kvl_madd8(x, kvl_row_scale(format, raw_scale, layer.k_global));
    }
    [[unroll]] for (uint r = 0; r < ROWS; r++) {
        uint at = r * FOURS + 2 * i;
        float sum = i > 0 ? score[k * ROWS + r] : 0;
        score[k * ROWS + r] = kvl_dot(q[at], x.low, kvl_dot(q[at + 1], x.high, sum));
    }
}

// 8 numbers of V times all rows' weights.
void kvl_add(const uint format, uint k, uint i, kvl_raw8 raw, uint raw_scale) {
    kvl_eight x = kvl_codes8(format, raw);
    vec2 scale = kvl_row_scale(format, raw_scale, format == KVLI_GPU_NVFP4 ? layer.v_global : 1);
    if (format == KVLI_GPU_INT4) x = kvl_madd8(x, scale);
    [[unroll]] for (uint r = 0; r < ROWS; r++) {
        uint at = r * FOURS + 2 * i;
        float w = score[k * ROWS + r];
        if (kvl_is_per_token(format) || format == KVLI_GPU_NVFP4) w *= scale.x;
        acc[at] = fma(x.low, vec4(w), acc[at]);
        acc[at + 1] = fma(x.high, vec4(w), acc[at + 1]);
    }
}

// Which scale of a row's a piece has: so that lanes that share it read the same word.
uint kvl_scale_dim(const uint format, uint i) {
    if (format == KVLI_GPU_INT4 && 8 % LANES == 0) return 8 * i * LANES;
    return kvl_is_per_token(format) ? 0 : kvl_dim_of_piece(i);
}

// Tokens at .. at + STEP - 1 of a block, `first` being the block's first. Rows past `last` may not be there; nobody sees them, and
// row `last` is read instead.
void kvl_attend_tokens(const uint k_format, const uint v_format, kvl_tiles tiles, bool own, uint first, uint at, uint last) {
    kvl_raw8 k_raw[TOKENS * PIECES], v_raw[TOKENS * PIECES];
    uint k_raw_scale[TOKENS * PIECES], v_raw_scale[TOKENS * PIECES];
    [[unroll]] for (uint k = 0; k < TOKENS; k++) {
        uint token = min(at + k * SLOTS + slot, last);
        [[unroll]] for (uint i = 0; i < PIECES; i++) {
            uint e = kvl_dim_of_piece(i);
            k_raw[k * PIECES + i] = kvl_load8(k_format, tiles.bank, tiles.k, token, e);
            k_raw_scale[k * PIECES + i] =
                kvl_load_row_scale(k_format, tiles.bank, tiles.k, token, kvl_scale_dim(k_format, i));
        }
    }
    [[unroll]] for (uint k = 0; k < TOKENS; k++) {
        uint token = min(at + k * SLOTS + slot, last);
        [[unroll]] for (uint i = 0; i < PIECES; i++) {
            uint e = kvl_dim_of_piece(i);
            v_raw[k * PIECES + i] = kvl_load8(v_format, tiles.bank, tiles.v, token, e);
            v_raw_scale[k * PIECES + i] =
                kvl_load_row_scale(v_format, tiles.bank, tiles.v, token, kvl_scale_dim(v_format, i));
        }
    }
    [[unroll]] for (uint k = 0; k < TOKENS; k++) {
        [[unroll]] for (uint i = 0; i < PIECES; i++) {
            kvl_multiply(k_format, k, i, k_raw[k * PIECES + i], k_raw_scale[k * PIECES + i]);
        }
    }
    kvl_sum_over_lanes();
    bool all = kvl_all_see(sight, own, x_first, x_last, first + at, first + at + STEP - 1);
    [[unroll]] for (uint k = 0; k < TOKENS; k++) {
        float scale = kvl_is_per_token(k_format) ? kvl_row_scale(k_format, k_raw_scale[k * PIECES], 1).x : 1;
        [[unroll]] for (uint r = 0; r < ROWS; r++) {
            float s = score[k * ROWS + r] * scale;
            if (layer.softcap != 0) s = kvl_capped(s, layer.softcap);
            bool seen = all || kvl_sees(sight, own, position[r], first + at + k * SLOTS + slot);
            score[k * ROWS + r] = seen ? s : KVL_UNSEEN;
        }
    }
    kvl_weights();
    [[unroll]] for (uint k = 0; k < TOKENS; k++) {
        [[unroll]] for (uint i = 0; i < PIECES; i++) {
            kvl_add(v_format, k, i, v_raw[k * PIECES + i], v_raw_scale[k * PIECES + i]);
        }
    }
}

void kvl_attend_block(const uint k_format, const uint v_format, uvec2 entry, bool own, uint block) {
    kvl_tiles tiles = kvl_tiles_of(layer, entry, kv_head);
    uint first = block * BLOCK_TOKENS, last = own ? min(x_last - first, BLOCK_TOKENS - 1) : BLOCK_TOKENS - 1;
    kvl_load_channel_scales(k_format, tiles);
    [[dont_unroll]] for (uint at = 0; at < BLOCK_TOKENS; at += STEP) {
        if (kvl_any_sees(sight, own, x_first, x_last, first + at, first + at + STEP - 1))
            kvl_attend_tokens(k_format, v_format, tiles, own, first, at, last);
    }
}

// ---- blocks ----
// The entry of a block, 0 where it is past the end or nobody sees it (and the entry need not be there).
uvec2 kvl_look(bool own, uint block, uint end) {
    uint first = block * BLOCK_TOKENS;
    if (block >= end || !kvl_any_sees(sight, own, x_first, x_last, first, first + BLOCK_TOKENS - 1)) return uvec2(0);
    return kvl_entry_at(own ? span.own + block - span.first_own : span.table + block);
}

// Packed blocks of the table. Returns the range in which exact ones are.
uvec2 kvl_attend_packed() {
    uvec2 exact = uvec2(item.end, item.begin), next = kvl_look(false, item.begin, item.end);
    [[dont_unroll]] for (uint b = item.begin; b < item.end; b++) {
        uvec2 entry = next;
        next = kvl_look(false, b + 1, item.end);
        if (kvl_entry_is_exact(entry))
            exact = uvec2(min(exact.x, b), b + 1);
        else if (entry != uvec2(0))
            kvl_attend_block(K_FORMAT, V_FORMAT, entry, false, b);
    }
    return exact;
}

// Exact blocks: those in a range of the table, then own ones.
void kvl_attend_exact(uvec2 range) {
    [[dont_unroll]] for (uint own = 0; own < 2; own++) {
        uint begin = own != 0 ? item.own_begin : range.x, end = own != 0 ? item.own_end : range.y;
        uvec2 next = kvl_look(own != 0, begin, end);
        [[dont_unroll]] for (uint b = begin; b < end; b++) {
            uvec2 entry = next;
            next = kvl_look(own != 0, b + 1, end);
            if (entry != uvec2(0) && (ONE_CLASS || own != 0 || kvl_entry_is_exact(entry)))
                kvl_attend_block(EXACT_FORMAT, EXACT_FORMAT, entry, own != 0, b);
        }
    }
}

// ---- the end ----
// The slots' sums together: sums in kvl_total, m and l where slot 0 has them, times a factor.
// With one slot, lanes need no barrier to read again what they wrote themselves.
void kvl_fold_row(uint r) {
    if (SLOTS == 1) {
        kvl_put_row(r);
        return;
    }
    [[unroll]] for (uint i = 0; i < 4 * FOURS; i++) {
        if (kvl_has_piece(i / 8)) kvl_work[slot * DIM + 8 * kvl_piece(i / 8) + i % 8] = kvl_row4[i / 4][i % 4];
    }
    barrier();
    for (uint e = gl_LocalInvocationID.x; e < DIM; e += WORKGROUP) {
        float sum = kvl_work[e];
        for (uint s = 1; s < SLOTS; s++) sum += kvl_work[s * DIM + e];
        kvl_total[r * DIM + e] = sum;
    }
    barrier();
}
void kvl_fold(float factor) {
    [[unroll]] for (uint r = 0; r < ROWS; r++) kvl_slot_m[slot * ROWS + r] = m[r], kvl_slot_l[slot * ROWS + r] = l[r];
    if (SLOTS > 1) barrier();
    [[dont_unroll]] for (uint r = 0; r < ROWS; r++) {
        float mine = kvl_slot_m[slot * ROWS + r], top = mine;
        for (uint s = 0; s < SLOTS && SLOTS > 1; s++) top = max(top, kvl_slot_m[s * ROWS + r]);
        float shrink = SLOTS > 1 ? exp2(mine - top) * factor : factor;
        [[unroll]] for (uint i = 0; i < FOURS; i++) kvl_row4[i] = acc[i] * shrink;
        [[unroll]] for (uint i = 0; i < (ROWS - 1) * FOURS; i++) acc[i] = acc[i + FOURS];
        kvl_fold_row(r);
    }
    if (SLOTS == 1) return;
    for (uint r = gl_LocalInvocationID.x; r < ROWS; r += WORKGROUP) {
        float top = kvl_slot_m[r], sum = 0;
        for (uint s = 1; s < SLOTS; s++) top = max(top, kvl_slot_m[s * ROWS + r]);
        for (uint s = 0; s < SLOTS; s++) sum += kvl_slot_l[s * ROWS + r] * exp2(kvl_slot_m[s * ROWS + r] - top);
        kvl_slot_m[r] = top, kvl_slot_l[r] = sum;
    }
    barrier();
}
// Slot 0 goes on from the sums, the others from nothing.
void kvl_unfold() {
    [[dont_unroll]] for (uint r = 0; r < ROWS; r++) {
        kvl_get_row(r);
        [[unroll]] for (uint i = 0; i < (ROWS - 1) * FOURS; i++) acc[i] = acc[i + FOURS];
        [[unroll]] for (uint i = 0; i < FOURS; i++) acc[(ROWS - 1) * FOURS + i] = slot == 0 ? kvl_row4[i] : vec4(0);
    }
    [[unroll]] for (uint r = 0; r < ROWS; r++) {
        m[r] = slot == 0 ? kvl_slot_m[r] : KVL_NOTHING;
        l[r] = slot == 0 ? kvl_slot_l[r] : 0;
    }
    kvl_sync();
}

// Pair n of the dims that this invocation writes.
uint kvl_dim_to_write(uint n) { return SLOTS == 1 ? 8 * kvl_piece(n / 4) + n % 4 * 2 : 2 * (n * WORKGROUP + gl_LocalInvocationID.x); }

// The item's result: a partial one, or the output.
void kvl_write() {
    [[dont_unroll]] for (uint r = 0; r < item.n_rows; r++) {
        float top = kvl_slot_m[r], sum = kvl_slot_l[r];
        bool whole = item.partial == KVLI_GPU_NONE;
        kvl_row row = kvl_row_of(span, kv_head, item.row + r);
        uint to = kvl_element(push.b, row), partial = kvl_partial_number(item, kv_head, r);
        float factor = whole ? kvl_output_factor(layer, row.head, top, sum) : 1;
        [[dont_unroll]] for (uint n = 0; n < 4 * PIECES; n++) {
            uint e = kvl_dim_to_write(n);
            if (e >= DIM) continue;
            vec2 x = vec2(kvl_total[r * DIM + e], kvl_total[r * DIM + e + 1]) * factor;
            if (whole)
                kvl_out_set(to + e, x);
            else
                partial_o[partial * DIM + e] = x.x, partial_o[partial * DIM + e + 1] = x.y;
        }
        if (!whole && gl_LocalInvocationID.x == 0) partial_ml[partial] = vec2(top, sum);
    }
}

void main() {
    uint index = push.first + gl_WorkGroupID.x;
    if (index >= push.n) return;
    layer = kvl_layer();
    item = kvl_item_at(index);
    span = kvl_span_at(item.span);
    sight = kvl_sight(layer.window, layer.sink_tokens);
    kv_head = gl_WorkGroupID.y;
    uint me = gl_LocalInvocationID.x;
#if KVL_SUBGROUP
    // Shuffles go by places in subgroups, which need not be in the order of gl_LocalInvocationID. (All are full, but for drivers
    // that cannot be asked for that.)
    if (gl_NumSubgroups * gl_SubgroupSize == WORKGROUP) me = gl_SubgroupID * gl_SubgroupSize + gl_SubgroupInvocationID;
#endif
    lane = SLOTS == 1 ? me : me % LANES;
    slot = SLOTS == 1 ? 0 : me / LANES;
    x_first = kvl_row_of(span, kv_head, item.row).position;
    x_last = kvl_row_of(span, kv_head, item.row + item.n_rows - 1).position;
    [[unroll]] for (uint r = 0; r < ROWS; r++) {
        m[r] = KVL_NOTHING, l[r] = 0;
        [[unroll]] for (uint i = 0; i < FOURS; i++) acc[r * FOURS + i] = vec4(0);
    }
    // Packed blocks, then exact ones. (A loop, so that what both do is there once.)
    uvec2 exact = uvec2(item.begin, item.end);
    [[dont_unroll]] for (uint pass = ONE_CLASS ? 1 : 0; pass < 2; pass++) {
        if (pass == 0 || ONE_CLASS || (ROTATED & 1) != 0) kvl_load_queries((ROTATED & 1) != 0 && pass == 0);
        if (!ONE_CLASS && pass == 0)
            exact = kvl_attend_packed();
        else
            kvl_attend_exact(exact);
        if (pass == 0 && (ROTATED & 2) == 0) continue;
        kvl_fold(pass == 0 ? HADAMARD_NORM : 1);
        if (pass == 1) break;
        kvl_sync();
        kvl_rotate_total();
        kvl_unfold();
    }
    kvl_write();
}
