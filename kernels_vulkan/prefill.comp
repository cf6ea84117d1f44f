// prefill: attention of up to ROWS packed query rows of one KV head (chunks of prompts), in FlashAttention-2's form on scalar
// units. A workgroup walks over the blocks of its item in steps of STEP tokens. Its invocations are a grid of TX x TY: those of a
// line y have the same ROWS / TY rows; of a step's scores invocation x has tokens x, x + TX, .., of the sums dims 4 x.. of every
// 4 TX.
//
//     S = Q K^T    q stands in shared memory throughout, K comes through a tile there, SLICE dims of a step's tokens at a time,
//                  as f32 numbers, decoded once; a vec4 of K is used for all of an invocation's rows, a vec4 of q for its tokens
//     P = 2^(S - max), the online softmax; P to shared memory, transposed
//     O += P V     V comes through the same tile, V_TOKENS whole rows at a time; O stays in registers
//
// Packed blocks come first, with q rotated where keys are; then the rotation of values is undone, then come exact blocks. A step
// is of positions aligned to its size and all sums are taken in the order of dims or tokens, so a row's result depends on nothing
// but its own positions. What a row does not see is removed by selection, and rows of V that nobody has written become zeros.
//
// Roofline: 4 D FLOP for a token and a row; D reads of K and V from memory serve ROWS rows. An invocation with 4 rows and 2
// tokens reads 6 vec4 of shared memory for 32 multiply-adds (Q K^T), or 3 (P V, 8 dims), most of them the same words for a whole
// line or column of the grid, which is one read; barriers: 2 for each SLICE or V_TOKENS.
#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_control_flow_attributes : require
#include "formats.glsl"
#include "pages.glsl"
#include "softmax.glsl"

const uint TX = LANES, TY = WORKGROUP / LANES;
const uint R4 = ROWS / TY / 4; // rows of an invocation, in fours
const uint STEP = KVLI_VK_PREFILL_STEP(DIM, BLOCK_TOKENS);
const uint T = (STEP + TX - 1) / TX;     // tokens of an invocation; if TX > STEP, those from x = STEP on have none
const uint QUADS = DIM / 4;              // vec4 in a row
const uint N = (QUADS + TX - 1) / TX;    // vec4 of an invocation in a row of O; if TX does not divide QUADS, some have fewer
const uint SLICE = KVLI_VK_PREFILL_SLICE(DIM);
const uint K_STRIDE = SLICE / 4 + 1, Q_STRIDE = QUADS + 1; // one more: rows begin in different banks of shared memory
const uint V_TOKENS = KVLI_VK_PREFILL_V_TOKENS(DIM);
const uint HADAMARD = DIM % 128 == 0 ? 128 : DIM % 64 == 0 ? 64 : DIM % 32 == 0 ? 32 : 16;

shared vec4 q_rows[ROWS * Q_STRIDE];                                // q, or O while its rotation is undone
shared vec4 tile[KVLI_VK_PREFILL_TILE(DIM, BLOCK_TOKENS)];                  // of K: [STEP][K_STRIDE], of V: [V_TOKENS][QUADS]
shared vec4 weights[STEP * (ROWS / 4)];                             // P: [STEP][ROWS / 4]
shared vec4 exchange[R4 * WORKGROUP];                               // [R4][TY][TX] maxima or sums of rows

// An invocation's place in the grid and its share of the sums; a vec4 is of four rows (score, m, l) or four dims (o).
const float HIDDEN = -3e38; // score of what is not seen: below KVL_NOTHING
uint x, y;
uint position[4 * R4];
vec4 score[T * R4], m[R4], l[R4], o[4 * R4 * N];

struct kvl_rows {
    kvli_gpu_item item;
    kvli_gpu_span span;
    kvl_sight sight;
    uint kv_head, x_first, x_last; // positions of the first and the last row
};
uint kvl_position(kvl_rows r, uint i) { return r.span.position + (r.item.row + i) / push.gqa; }

// ---- q ----
// The rotation of every row of q_rows.
void rotate_rows() {
    const float norm = HADAMARD == 128 ? 0.08838834764831845 : HADAMARD == 64 ? 0.125 : HADAMARD == 32 ? 0.17677669529663687 : 0.25;
    for (uint i = gl_LocalInvocationIndex; i < ROWS * QUADS; i += WORKGROUP) { // strides 1 and 2
        uint at = i / QUADS * Q_STRIDE + i % QUADS;
        vec4 a = q_rows[at] * norm;
        a = vec4(a.x + a.y, a.x - a.y, a.z + a.w, a.z - a.w);
        q_rows[at] = vec4(a.xy + a.zw, a.xy - a.zw);
    }
    for (uint stride = 1; stride < HADAMARD / 4; stride *= 2) {
        barrier();
        for (uint i = gl_LocalInvocationIndex; i < ROWS * QUADS / 2; i += WORKGROUP) {
            uint pair = i % (QUADS / 2), at = i / (QUADS / 2) * Q_STRIDE + (pair / stride * 2 * stride | pair % stride);
            vec4 a = q_rows[at], b = q_rows[at + stride];
            q_rows[at] = a + b;
            q_rows[at + stride] = a - b;
        }
    }
}

// The item's rows of q times `factor` to shared memory, to be read after a barrier. Rows that are not there are zeros.
void load_q(kvl_rows r, float factor, bool rotated) {
    barrier(); // where no block came after it, the rotation of the rows before may not have ended
    for (uint i = gl_LocalInvocationIndex; i < ROWS * QUADS; i += WORKGROUP) {
        uint row = i / QUADS, quad = i % QUADS;
        vec4 q = vec4(0);
        if (row < r.item.n_rows) {
            uint at = kvl_element(push.a, kvl_row_of(r.span, r.kv_head, r.item.row + row)) + 4 * quad;
            q = vec4(kvl_q_get(at), kvl_q_get(at + 1), kvl_q_get(at + 2), kvl_q_get(at + 3)) * factor;
        }
        q_rows[row * Q_STRIDE + quad] = q;
    }
    if (rotated) {
        barrier();
        rotate_rows();
    }
}

// ---- K and V to the tile ----
// Dims dim.. of the STEP tokens from `token` (of the block) on, SLICE of them. An invocation has the same dims of each token.
void stage_k(const uint format, float factor, uint bank, uint base, uint token, uint dim, uint end) {
    const uint EIGHTS = SLICE / 8;
    uint e = gl_LocalInvocationIndex % EIGHTS;
    kvl_eight scale, zero;
    if (kvl_is_per_channel(format)) {
        scale = kvl_channel_scales(format, bank, base, dim + 8 * e, 0);
        zero = kvl_channel_scales(format, bank, base, dim + 8 * e, 1);
    }
    for (uint t = gl_LocalInvocationIndex / EIGHTS; t < end; t += WORKGROUP / EIGHTS) {
        kvl_eight k;
        if (kvl_is_per_channel(format))
            k = kvl_madd8(kvl_codes8(format, kvl_load8(format, bank, base, token + t, dim + 8 * e)), scale, zero);
        else
            k = kvl_numbers8(format, factor, bank, base, token + t, dim + 8 * e);
        tile[t * K_STRIDE + 2 * e] = k.low;
        tile[t * K_STRIDE + 2 * e + 1] = k.high;
    }
}

// Whole rows of V_TOKENS tokens from `token` (of the block) on; `written` of them are there, the others become zeros.
void stage_v(const uint format, float factor, uint bank, uint base, uint token, uint written, uint end) {
    for (uint i = gl_LocalInvocationIndex; i < end; i += WORKGROUP) {
        uint t = i / (DIM / 8), e = i % (DIM / 8);
        kvl_eight v = kvl_numbers8(format, factor, bank, base, token + t, 8 * e);
        tile[t * QUADS + 2 * e] = t < written ? v.low : vec4(0);
        tile[t * QUADS + 2 * e + 1] = t < written ? v.high : vec4(0);
    }
}

// ---- one step ----
// Some tokens of a block: `token` is the first one's place in the block, `position` in the sequence.
struct kvl_step {
    kvl_tiles tiles;
    uint token, position;
    bool own, packed;
};

// Scores of a slice of dims: `dim` and SLICE - 1 more. In both products all that is read is on its way before the first is used.
void q_times_k(uint dim) {
    uint k_at = (TX <= STEP ? x : x % STEP) * K_STRIDE, q_at = y * 4 * R4 * Q_STRIDE + dim / 4;
    [[dont_unroll]] for (uint e = 0; e < SLICE / 4; e++, k_at++, q_at++) {
        vec4 k[T], q[4 * R4];
        [[unroll]] for (uint t = 0; t < T; t++) k[t] = tile[k_at + TX * t * K_STRIDE];
        [[unroll]] for (uint r = 0; r < 4 * R4; r++) q[r] = q_rows[q_at + r * Q_STRIDE];
        [[unroll]] for (uint r = 0; r < 4 * R4; r++) {
            [[unroll]] for (uint t = 0; t < T; t++) {
                float sum = score[t * R4 + r / 4][r % 4];
                sum = fma(q[r].w, k[t].w, fma(q[r].z, k[t].z, fma(q[r].y, k[t].y, fma(q[r].x, k[t].x, sum))));
                score[t * R4 + r / 4][r % 4] = sum;
            }
        }
    }
}

void p_times_v(uint first) {
    uint p_at = first * (ROWS / 4) + y * R4, v_at[N];
    [[unroll]] for (uint n = 0; n < N; n++) v_at[n] = QUADS % TX == 0 ? x + TX * n : min(x + TX * n, QUADS - 1);
    [[dont_unroll]] for (uint t = 0; t < V_TOKENS; t++, p_at += ROWS / 4) {
        vec4 v[N], p[R4];
        [[unroll]] for (uint n = 0; n < N; n++) v[n] = tile[t * QUADS + v_at[n]];
        [[unroll]] for (uint i = 0; i < R4; i++) p[i] = weights[p_at + i];
        [[unroll]] for (uint r = 0; r < 4 * R4; r++) {
            [[unroll]] for (uint n = 0; n < N; n++) o[r * N + n] = fma(vec4(p[r / 4][r % 4]), v[n], o[r * N + n]);
        }
    }
}

// Softcap; what is not seen is hidden.
void finish_scores(kvl_rows r, kvli_vk_layer layer, kvl_step s) {
    if (layer.softcap != 0) {
        [[unroll]] for (uint t = 0; t < T; t++) {
            [[unroll]] for (uint i = 0; i < 4 * R4; i++)
                score[t * R4 + i / 4][i % 4] = kvl_capped(score[t * R4 + i / 4][i % 4], layer.softcap);
        }
    }
    if (TX <= STEP && kvl_all_see(r.sight, s.own, r.x_first, r.x_last, s.position, s.position + STEP - 1)) return;
    [[unroll]] for (uint t = 0; t < T; t++) {
        [[unroll]] for (uint i = 0; i < 4 * R4; i++) {
            bool seen = (TX <= STEP || x < STEP) && kvl_sees(r.sight, s.own, position[i], s.position + x + TX * t);
            if (!seen) score[t * R4 + i / 4][i % 4] = HIDDEN;
        }
    }
}

// Scores -> weights, with the maxima of rows raised and all sums rescaled to them. There is a barrier in it.
void softmax() {
    [[unroll]] for (uint i = 0; i < R4; i++) {
        vec4 top = score[i];
        [[unroll]] for (uint t = 1; t < T; t++) top = max(top, score[t * R4 + i]);
        exchange[(i * TY + y) * TX + x] = top;
    }
    barrier();
    [[unroll]] for (uint i = 0; i < R4; i++) {
        vec4 top = m[i];
        [[dont_unroll]] for (uint j = 0; j < TX; j++) top = max(top, exchange[(i * TY + y) * TX + j]);
        vec4 rescale = exp2(m[i] - top);
        m[i] = top;
        l[i] *= rescale;
        [[unroll]] for (uint j = 0; j < 4; j++) {
            [[unroll]] for (uint n = 0; n < N; n++) o[(4 * i + j) * N + n] *= rescale[j];
        }
        [[unroll]] for (uint t = 0; t < T; t++) {
            vec4 p = exp2(score[t * R4 + i] - top);
            l[i] += p;
            if (TX <= STEP || x < STEP) weights[(x + TX * t) * (ROWS / 4) + y * R4 + i] = p;
        }
    }
}

void attend(kvl_rows r, kvli_vk_layer layer, kvl_step s) {
    [[unroll]] for (uint t = 0; t < T; t++) {
        [[unroll]] for (uint i = 0; i < R4; i++) score[t * R4 + i] = vec4(0);
    }
    [[dont_unroll]] for (uint dim = 0; dim < DIM; dim += SLICE) {
        barrier();
        stage_k(K_FORMAT, K_FORMAT == KVLI_GPU_NVFP4 ? layer.k_global : 1, s.tiles.bank, s.tiles.k, s.token, dim, s.packed ? STEP : 0);
        stage_k(EXACT_FORMAT, 1, s.tiles.bank, s.tiles.k, s.token, dim, s.packed ? 0 : STEP);
        barrier();
        q_times_k(dim);
    }
    finish_scores(r, layer, s);
    softmax();
    uint there = r.span.position + r.span.n_rows - s.position; // tokens of the step and later ones that were written
    [[dont_unroll]] for (uint t = 0; t < STEP; t += V_TOKENS) {
        if (t > 0) barrier();
        const uint all = V_TOKENS * (DIM / 8);
        stage_v(V_FORMAT, V_FORMAT == KVLI_GPU_NVFP4 ? layer.v_global : 1, s.tiles.bank, s.tiles.v, s.token + t, V_TOKENS, s.packed ? all : 0);
        stage_v(EXACT_FORMAT, 1, s.tiles.bank, s.tiles.v, s.token + t, there - min(t, there), s.packed ? 0 : all);
        barrier();
        p_times_v(t);
    }
}

// ---- the walk over blocks ----
// Blocks of the table that are packed, those that are exact, own blocks.
const uint PACKED = 0, EXACT = 1, OWN = 2;
const bool HAS_PACKED = K_FORMAT != EXACT_FORMAT || V_FORMAT != EXACT_FORMAT;

// All blocks of one kind of which some row sees something. False: there were none.
bool walk(kvl_rows r, kvli_vk_layer layer, uint kind) {
    bool own = kind == OWN, some = false;
    uint list = own ? r.span.own - r.span.first_own : r.span.table;
    for (uint b = own ? r.item.own_begin : r.item.begin; b < (own ? r.item.own_end : r.item.end); b++) {
        uint first = b * BLOCK_TOKENS;
        if (!kvl_any_sees(r.sight, own, r.x_first, r.x_last, first, first + BLOCK_TOKENS - 1)) continue;
        uvec2 entry = kvl_entry_at(list + b);
        bool packed = HAS_PACKED && !own && !kvl_entry_is_exact(entry);
        if (entry == uvec2(0) || packed != (kind == PACKED)) continue;
        kvl_step s = kvl_step(kvl_tiles_of(layer, entry, r.kv_head), 0, 0, own, packed);
        for (s.token = 0; s.token < BLOCK_TOKENS; s.token += STEP) {
            s.position = first + s.token;
            if (kvl_any_sees(r.sight, own, r.x_first, r.x_last, s.position, s.position + STEP - 1)) attend(r, layer, s);
        }
        some = true;
    }
    return some;
}

// O, its rows times `factor`, to q_rows.
void o_to_shared(vec4 factor[R4]) {
    barrier();
    [[unroll]] for (uint i = 0; i < 4 * R4; i++) {
        uint row = (y * 4 * R4 + i) * Q_STRIDE;
        [[unroll]] for (uint n = 0; n < N; n++) {
            if (x + TX * n < QUADS) q_rows[row + x + TX * n] = o[i * N + n] * factor[i / 4][i % 4];
        }
    }
    barrier();
}

// The rotation of O undone.
void unrotate() {
    vec4 one[R4];
    [[unroll]] for (uint i = 0; i < R4; i++) one[i] = vec4(1);
    o_to_shared(one);
    rotate_rows();
    barrier();
    [[unroll]] for (uint i = 0; i < 4 * R4; i++) {
        uint row = (y * 4 * R4 + i) * Q_STRIDE;
        [[unroll]] for (uint n = 0; n < N; n++) o[i * N + n] = q_rows[row + min(x + TX * n, QUADS - 1)];
    }
    barrier();
}

// ---- the end ----
// What of a row's sum of weights the invocations of its line have -> all of it, in each.
void add_up_l() {
    barrier();
    [[unroll]] for (uint i = 0; i < R4; i++) exchange[(i * TY + y) * TX + x] = l[i];
    barrier();
    [[unroll]] for (uint i = 0; i < R4; i++) {
        l[i] = vec4(0);
        [[dont_unroll]] for (uint j = 0; j < TX; j++) l[i] += exchange[(i * TY + y) * TX + j];
    }
}

// The rows to out or to partial results.
void write_rows(kvl_rows r, kvli_vk_layer layer) {
    bool partial = r.item.partial != KVLI_GPU_NONE;
    vec4 factor[R4];
    [[unroll]] for (uint i = 0; i < 4 * R4; i++) {
        uint row = y * 4 * R4 + i;
        float top = m[i / 4][i % 4], sum = l[i / 4][i % 4];
        factor[i / 4][i % 4] = partial ? 1 : kvl_output_factor(layer, kvl_row_of(r.span, r.kv_head, r.item.row + row).head, top, sum);
        if (partial && x == 0 && row < r.item.n_rows) partial_ml[kvl_partial_number(r.item, r.kv_head, row)] = vec2(top, sum);
    }
    o_to_shared(factor);
    for (uint i = gl_LocalInvocationIndex; i < r.item.n_rows * (DIM / 2); i += WORKGROUP) {
        uint row = i / (DIM / 2), e = i % (DIM / 2) * 2;
        vec4 quad = q_rows[row * Q_STRIDE + e / 4];
        vec2 pair = (e & 2) != 0 ? quad.zw : quad.xy;
        if (partial) {
            uint at = kvl_partial_number(r.item, r.kv_head, row) * DIM + e;
            partial_o[at] = pair.x;
            partial_o[at + 1] = pair.y;
        } else {
            kvl_out_set(kvl_element(push.b, kvl_row_of(r.span, r.kv_head, r.item.row + row)) + e, pair);
        }
    }
}

void main() {
    if (push.first + gl_WorkGroupID.x >= push.n) return;
    kvli_vk_layer layer = kvl_layer();
    kvl_rows r;
    r.item = kvl_item_at(push.first + gl_WorkGroupID.x);
    r.span = kvl_span_at(r.item.span);
    r.sight = kvl_sight(layer.window, layer.sink_tokens);
    r.kv_head = gl_WorkGroupID.y;
    r.x_first = kvl_position(r, 0);
    r.x_last = kvl_position(r, r.item.n_rows - 1);
    x = gl_LocalInvocationIndex % TX;
    y = gl_LocalInvocationIndex / TX;
    [[unroll]] for (uint i = 0; i < 4 * R4; i++) position[i] = kvl_position(r, y * 4 * R4 + i);
    [[unroll]] for (uint i = 0; i < R4; i++) {
        m[i] = vec4(KVL_NOTHING), l[i] = vec4(0);
        [[unroll]] for (uint j = 0; j < 4; j++) {
            [[unroll]] for (uint n = 0; n < N; n++) o[(4 * i + j) * N + n] = vec4(0);
        }
    }

    const bool k_rotated = (ROTATED & 1) != 0, v_rotated = (ROTATED & 2) != 0;
    float factor = kvl_score_factor(layer);
    const uint first_kind = HAS_PACKED ? PACKED : EXACT;
    for (uint kind = first_kind; kind <= OWN; kind++) {
        if (kind == first_kind || (kind == EXACT && ROTATED != 0)) load_q(r, factor, k_rotated && kind == PACKED);
        bool some = walk(r, layer, kind);
        if (kind == PACKED && v_rotated && some) unrotate();
    }
    add_up_l();
    write_rows(r, layer);
}
