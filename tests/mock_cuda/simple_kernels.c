/* The kernels' contract (kernels_cuda/abi.h) in plain C, in double precision: what the mock runs where a test is about
   the host side. */
#define KVL_IMPLEMENTATION
#define KVL_NO_CUDA
#include "../../kvlite.h"

#include "../../kernels_cuda/abi.h"
#include "kernels.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- numbers ---- */
static double get_number(uint32_t dtype, const void *at) {
    uint32_t u;
    uint16_t h;
    float f;
    if (dtype == KVLI_GPU_DTYPE_F32) {
        memcpy(&f, at, 4);
        return f;
    }
    memcpy(&h, at, 2);
    if (dtype == KVLI_GPU_DTYPE_F16) return kvli_f16_to_f32(h);
    u = (uint32_t)h << 16;
    memcpy(&f, &u, 4);
    return f;
}
static void put_number(uint32_t dtype, void *at, double x) {
    float f = (float)x;
    uint16_t h;
    if (dtype == KVLI_GPU_DTYPE_F32) {
        memcpy(at, &f, 4);
        return;
    }
    h = dtype == KVLI_GPU_DTYPE_F16 ? kvli_f32_to_f16(f) : kvli_f32_to_bf16(f);
    memcpy(at, &h, 2);
}
static char *element(const kvli_cu_tensor *t, uint64_t row, uint64_t head, uint64_t e) {
    uint64_t size = t->dtype == KVLI_GPU_DTYPE_F32 ? 4 : 2;
    return (char *)(uintptr_t)(t->data + (row * t->row_stride + head * t->head_stride + e) * size);
}
/* The dtype whose numbers an exact format's are. */
static uint32_t dtype_of(uint32_t exact) {
    return exact == KVLI_GPU_F32   ? KVLI_GPU_DTYPE_F32
           : exact == KVLI_GPU_F16 ? KVLI_GPU_DTYPE_F16
                                   : KVLI_GPU_DTYPE_BF16;
}

/* ---- tiles ---- */
static char *tile_at(const kvli_cu_pages *p, uint64_t entry, uint32_t head, int v) {
    int c = (entry & KVLI_GPU_EXACT) != 0;
    uint64_t at = (entry & ~(uint64_t)KVLI_GPU_FLAGS) + head * p->head_stride[c] + (v ? p->v_offset[c] : 0);
    return (char *)(uintptr_t)(entry & KVLI_GPU_SCRATCH ? at : at + p->offset[c]);
}

/* ---- store ---- */
static void store_one(const kvli_cu_store_args *a, const kvli_gpu_store *s, uint32_t head, int v) {
    const kvli_cu_tensor *from = v ? &a->v : &a->k;
    uint32_t dim = v ? a->v_dim : a->k_dim, type = dtype_of(a->exact),
             size = type == KVLI_GPU_DTYPE_F32 ? 4 : 2;
    char *tile = tile_at(&a->pages, s->exact, head, v);
    uint32_t r, e;
    for (r = 0; r < s->n_rows; r++) {
        for (e = 0; e < dim; e++) {
            char *to = tile + ((size_t)(s->at + r) * dim + e) * size;
            put_number(type, to, get_number(from->dtype, element(from, s->row + r, head, e)));
            if (!isfinite(get_number(type, to))) a->taint[s->span] = 1;
        }
    }
    if (s->sealed) {
        uint32_t n = a->block_tokens * dim, format = v ? a->v_format : a->k_format;
        float *rows = (float *)malloc(n * sizeof(float));
        if (v ? a->v_rotated : a->k_rotated) format |= KVL_ROTATED;
        for (e = 0; e < n; e++) rows[e] = (float)get_number(type, tile + (size_t)e * size);
        kvl_tile_encode(format, a->block_tokens, dim, v ? a->v_global : a->k_global, rows,
                        tile_at(&a->pages, s->sealed, head, v));
        free(rows);
    }
}
static void store(const unsigned grid[3], const kvli_cu_store_args *a) {
    uint32_t x, y, z;
    for (x = 0; x < grid[0] && x < a->counts->stores; x++) {
        for (y = 0; y < grid[1]; y++) {
            for (z = 0; z < 2; z++) store_one(a, &a->stores[x], y, (int)z);
        }
    }
}

/* ---- attention ---- */
static const struct {
    const char *name;
    kvl_format k, v;
} presets[] = {{"f16", KVL_F16, KVL_F16},
               {"bf16", KVL_BF16, KVL_BF16},
               {"int8", KVL_INT8, KVL_INT8},
               {"int8c", KVL_INT8_CHANNEL, KVL_INT8},
               {"fp8", KVL_FP8_E4M3, KVL_FP8_E4M3},
               {"nvfp4", KVL_NVFP4 | KVL_ROTATED, KVL_NVFP4},
               {"balanced", KVL_INT8, KVL_INT4 | KVL_ROTATED},
               {"int4", KVL_INT4_CHANNEL, KVL_INT4 | KVL_ROTATED}};

typedef struct view { /* the blocks that an item sees, decoded */
    const kvli_cu_attend_args *a;
    const kvli_gpu_span *span;
    const kvli_gpu_item *item;
    uint32_t n_blocks, n_table;
    float *k, *v; /* [n_blocks][block_tokens][dim] */
} view;

static uint64_t block_entry(const view *w, uint32_t i) {
    const kvli_gpu_item *t = w->item;
    if (i < w->n_table) return w->a->entries[(uint32_t)(w->span->table + t->begin + i)];
    return w->a->entries[(uint32_t)(w->span->own + t->own_begin + (i - w->n_table) - w->span->first_own)];
}

static void view_decode(view *w, kvl_format k, kvl_format v, uint32_t head) {
    const kvli_cu_attend_args *a = w->a;
    size_t tile = (size_t)a->block_tokens * a->dim;
    uint32_t i;
    w->k = (float *)malloc(tile * (w->n_blocks + 1) * sizeof(float));
    w->v = (float *)malloc(tile * (w->n_blocks + 1) * sizeof(float));
    for (i = 0; i < w->n_blocks; i++) {
        uint64_t entry = block_entry(w, i);
        bool exact = (entry & KVLI_GPU_EXACT) != 0;
        if (!entry) continue;
        kvl_tile_decode(exact ? a->exact : k, a->block_tokens, a->dim, a->k_global,
                        tile_at(&a->pages, entry, head, 0), true, w->k + i * tile);
        kvl_tile_decode(exact ? a->exact : v, a->block_tokens, a->dim, a->v_global,
                        tile_at(&a->pages, entry, head, 1), true, w->v + i * tile);
    }
}

/* Does a query at position x see token t, which is row number i of the view? */
static bool sees(const view *w, uint32_t x, uint32_t block, bool own) {
    return own ? block == x / w->a->block_tokens : block < x / w->a->block_tokens;
}
static bool in_window(const kvli_cu_attend_args *a, uint32_t x, uint32_t t) {
    return t <= x && (!a->window || t + a->window > x || t < a->sink_tokens);
}

static double score(const kvli_cu_attend_args *a, uint32_t row, uint32_t q_head, const float *k) {
    double sum = 0;
    uint32_t e;
    for (e = 0; e < a->dim; e++) sum += get_number(a->q.dtype, element(&a->q, row, q_head, e)) * k[e];
    sum *= a->scale;
    if (a->softcap > 0) sum = a->softcap * tanh(sum / a->softcap);
    return sum * 1.4426950408889634;
}

/* o[dim], m and l of one packed row. */
static void attend_row(const view *w, uint32_t row, uint32_t q_head, uint32_t x, double *o, double *m,
                       double *l) {
    const kvli_cu_attend_args *a = w->a;
    uint32_t T = a->block_tokens, i, t, e;
    *m = -1e38;
    *l = 0;
    for (e = 0; e < a->dim; e++) o[e] = 0;
    for (i = 0; i < w->n_blocks; i++) {
        bool own = i >= w->n_table;
        uint32_t block = own ? w->item->own_begin + (i - w->n_table) : w->item->begin + i;
        if (!sees(w, x, block, own)) continue;
        for (t = 0; t < T; t++) {
            double s, p, keep;
            if (!in_window(a, x, block * T + t)) continue;
            s = score(a, row, q_head, w->k + ((size_t)i * T + t) * a->dim);
            if (!(s <= *m)) { /* a NaN too */
                keep = exp2(*m - s);
                *m = s;
                *l *= keep;
                for (e = 0; e < a->dim; e++) o[e] *= keep;
            }
            p = exp2(s - *m);
            *l += p;
            for (e = 0; e < a->dim; e++) o[e] += p * w->v[((size_t)i * T + t) * a->dim + e];
        }
    }
}

static void write_out(const kvli_cu_attend_args *a, uint32_t row, uint32_t q_head, const double *o, double m,
                      double l) {
    uint32_t e;
    if (a->sink_logits) {
        double s = (double)a->sink_logits[q_head] * 1.4426950408889634, top = s > m ? s : m;
        double keep = exp2(m - top);
        l = l * keep + exp2(s - top);
        for (e = 0; e < a->dim; e++)
            put_number(a->out.dtype, element(&a->out, row, q_head, e), o[e] * keep / l);
        return;
    }
    for (e = 0; e < a->dim; e++) put_number(a->out.dtype, element(&a->out, row, q_head, e), o[e] / l);
}

static void attend_item(const kvli_cu_attend_args *a, const kvli_gpu_item *t, kvl_format k, kvl_format v,
                        uint32_t head) {
    view w = {a, &a->spans[t->span], t, 0, 0, NULL, NULL};
    double o[256], m, l;
    uint32_t p, e;
    w.n_table = t->end > t->begin ? t->end - t->begin : 0;
    w.n_blocks = w.n_table + (t->own_end > t->own_begin ? t->own_end - t->own_begin : 0);
    view_decode(&w, k, v, head);
    for (p = t->row; p < t->row + t->n_rows; p++) {
        uint32_t row = w.span->first_row + p / a->gqa, q_head = head * a->gqa + p % a->gqa;
        attend_row(&w, row, q_head, w.span->position + p / a->gqa, o, &m, &l);
        if (t->partial == KVLI_GPU_NONE) {
            write_out(a, row, q_head, o, m, l);
        } else {
            uint64_t at = (uint64_t)t->partial * a->n_kv_heads + (uint64_t)head * t->n_rows + (p - t->row);
            for (e = 0; e < a->dim; e++) a->partial_o[at * a->dim + e] = (float)o[e];
            a->partial_ml[2 * at] = (float)m;
            a->partial_ml[2 * at + 1] = (float)l;
        }
    }
    free(w.k);
    free(w.v);
}

static void attend(const unsigned grid[3], const kvli_cu_attend_args *a, uint32_t count, kvl_format k,
                   kvl_format v) {
    uint32_t end = a->end_item < count ? a->end_item : count, x, y;
    for (x = 0; x < grid[0] && a->first_item + x < end; x++) {
        for (y = 0; y < grid[1]; y++) attend_item(a, &a->items[a->first_item + x], k, v, y);
    }
}

static void merge_rows(const kvli_cu_attend_args *a, const kvli_gpu_merge *g, uint32_t head) {
    const kvli_gpu_span *s = &a->spans[g->span];
    uint32_t p, i, e;
    for (p = 0; p < g->n_rows; p++) {
        double o[256] = {0}, m = -1e38, l = 0;
        uint32_t at = g->row + p;
        for (i = 0; i < g->n_parts; i++) {
            uint64_t n =
                (uint64_t)(g->partial + i * g->n_rows) * a->n_kv_heads + (uint64_t)head * g->n_rows + p;
            double pm = (double)a->partial_ml[2 * n], pl = (double)a->partial_ml[2 * n + 1],
                   top = pm > m ? pm : m;
            if (pl == 0) continue;
            l = l * exp2(m - top) + pl * exp2(pm - top);
            for (e = 0; e < a->dim; e++)
                o[e] = o[e] * exp2(m - top) + (double)a->partial_o[n * a->dim + e] * exp2(pm - top);
            m = top;
        }
        write_out(a, s->first_row + at / a->gqa, head * a->gqa + at % a->gqa, o, m, l);
    }
}
static void merge(const unsigned grid[3], const kvli_cu_attend_args *a) {
    uint32_t end = a->end_item < a->counts->merges ? a->end_item : a->counts->merges, x, y;
    for (x = 0; x < grid[0] && a->first_item + x < end; x++) {
        for (y = 0; y < grid[1]; y++) merge_rows(a, &a->merges[a->first_item + x], y);
    }
}

/* ---- copies ---- */
static void copy(const unsigned grid[3], const kvli_cu_copy_args *a) {
    uint32_t n = a->counts ? a->counts->copies : a->n_copies, i;
    for (i = 0; i < n && i < grid[0]; i++)
        memcpy((void *)(uintptr_t)a->copies[i].dst, (const void *)(uintptr_t)a->copies[i].src,
               a->copies[i].bytes);
}
static void copy_rows(const unsigned grid[3], const kvli_cu_row_copy_args *a) {
    uint32_t i, t;
    for (i = 0; i < a->n_copies && i < grid[0]; i++) {
        uint64_t at = 0;
        for (t = 0; t < a->n_tiles; at += a->tile_bytes[t % 2], t++) {
            memcpy((char *)(uintptr_t)a->copies[i].dst + at, (const char *)(uintptr_t)a->copies[i].src + at,
                   (size_t)a->copies[i].n_rows * a->row_bytes[t % 2]);
        }
    }
}

/* ---- names ---- */
enum { STORE, DECODE, PREFILL, PLAIN, MERGE, COPY, COPY_ROWS, NOTHING };

/* kvl_decode_<preset>_d<dim>_n<8|16> and kvl_prefill_<preset>_d<dim> */
static int parse(const char *name, kvl_format *k, kvl_format *v) {
    int kind = !strcmp(name, "kvl_store")           ? STORE
               : !strcmp(name, "kvl_plain")         ? PLAIN
               : !strcmp(name, "kvl_merge")         ? MERGE
               : !strcmp(name, "kvl_copy")          ? COPY
               : !strcmp(name, "kvl_copy_rows")     ? COPY_ROWS
               : !strncmp(name, "kvl_decode_", 11)  ? DECODE
               : !strncmp(name, "kvl_prefill_", 12) ? PREFILL
                                                    : NOTHING;
    if (kind == DECODE || kind == PREFILL) {
        const char *preset = name + (kind == DECODE ? 11 : 12), *end = strstr(preset, "_d");
        size_t i;
        for (i = 0; end && i < sizeof presets / sizeof presets[0]; i++) {
            if (strlen(presets[i].name) == (size_t)(end - preset) &&
                !strncmp(presets[i].name, preset, (size_t)(end - preset))) {
                *k = presets[i].k;
                *v = presets[i].v;
                return kind;
            }
        }
        return NOTHING;
    }
    return kind;
}

size_t mock_kernel_find(const char *name, unsigned *threads) {
    static const struct {
        size_t bytes;
        unsigned threads;
    } kinds[] = {{sizeof(kvli_cu_store_args), KVLI_CU_STORE_THREADS},
                 {sizeof(kvli_cu_attend_args), KVLI_CU_DECODE_WARPS * 32},
                 {sizeof(kvli_cu_attend_args), KVLI_CU_PREFILL_WARPS * 32},
                 {sizeof(kvli_cu_attend_args), KVLI_CU_PLAIN_THREADS},
                 {sizeof(kvli_cu_attend_args), KVLI_CU_MERGE_THREADS},
                 {sizeof(kvli_cu_copy_args), KVLI_CU_COPY_THREADS},
                 {sizeof(kvli_cu_row_copy_args), KVLI_CU_COPY_THREADS},
                 {0, 0}};
    kvl_format k, v;
    int kind = parse(name, &k, &v);
    *threads = kinds[kind].threads;
    return kinds[kind].bytes;
}

int mock_kernel_run(const char *name, const unsigned grid[3], const unsigned block[3], size_t shared,
                    const void *args) {
    const kvli_cu_attend_args *a = (const kvli_cu_attend_args *)args;
    kvl_format k = 0, v = 0;
    (void)block;
    (void)shared;
    switch (parse(name, &k, &v)) {
    case STORE: store(grid, (const kvli_cu_store_args *)args); return 0;
    case DECODE: attend(grid, a, a->counts->decodes, k, v); return 0;
    case PREFILL: attend(grid, a, a->counts->prefills, k, v); return 0;
    case PLAIN: attend(grid, a, a->counts->decodes, a->exact, a->exact); return 0;
    case MERGE: merge(grid, a); return 0;
    case COPY: copy(grid, (const kvli_cu_copy_args *)args); return 0;
    case COPY_ROWS: copy_rows(grid, (const kvli_cu_row_copy_args *)args); return 0;
    default: return 500;
    }
}
