/* layers.c - what each layer loses by a format of its own, and the best formats within a budget; see quality.h.
 *
 * Each layer's keys, and its values, are put into each format of a ladder alone, with everything else in F16; the
 * divergences are taken to add up. The assignment starts from the best formats and goes down a rung where that costs
 * the least divergence for each bit it saves, until it is within the budget (the idea is KVTuner's, Li et al. 2025).
 * Then it is measured whole.
 */
#include "quality.h"
#include "llm/kv_file.h"

#include <cjson/cJSON.h>
#include <stdlib.h>
#include <string.h>

/* From best to smallest; what is worse than another of its size is left out. */
static const kvl_format ladder[] = {KVL_INT8_CHANNEL, KVL_INT8, KVL_INT4_CHANNEL, /* keys */
                                    KVL_INT8, KVL_INT4 | KVL_ROTATED};            /* values */
enum { K_RUNGS = 3, V_RUNGS = 2, RUNGS = K_RUNGS + V_RUNGS, BATCH = 4 * RUNGS };
enum { BLOCK_TOKENS = 32 };

/* Layer and rung, layer by layer, are a probe. */
typedef struct study {
    runtime *rt;
    const passage *p;
    uint32_t n_layers, n_probes;
    double *kld;       /* [n_probes] above that of F16 alone */
    uint32_t *k, *v;   /* [n_layers] chosen: index into ladder */
    kvl_layer *layers; /* [n_layers] chosen: formats */
} study;

static variant reference_variant(runtime *rt) {
    return (variant){.name = "f32", .rt = rt, .cache.preset = "f32"};
}

/* Scores probes [first, first + n), and F16 alone, which costs the first batch a run more. */
static bool score_probes(study *s, uint32_t first, uint32_t n_probes, double *f16, char *err, size_t n) {
    variant v[BATCH + 2] = {reference_variant(s->rt)};
    kvl_layer *layers = calloc((size_t)n_probes * s->n_layers, sizeof *layers);
    if (!layers) return llm_fail(err, n, "no memory for %u layers", s->n_layers);
    for (uint32_t i = 0; i < n_probes; i++) {
        const uint32_t layer = (first + i) / RUNGS, rung = (first + i) % RUNGS;
        kvl_layer *mine = layers + (size_t)i * s->n_layers;
        *(rung < K_RUNGS ? &mine[layer].k_format : &mine[layer].v_format) = ladder[rung];
        v[1 + i] = (variant){.rt = s->rt, .cache = {.preset = "f16", .layers = mine}};
    }
    const bool with_f16 = first == 0;
    if (with_f16) v[1 + n_probes] = (variant){.rt = s->rt, .cache.preset = "f16"};
    const uint32_t n_variants = 1 + n_probes + with_f16;
    bool ok = score_passage(s->p, v, n_variants, false, err, n);
    if (ok && with_f16) *f16 = v[1 + n_probes].kld_mean;
    for (uint32_t i = 0; ok && i < n_probes; i++) s->kld[first + i] = v[1 + i].kld_mean - *f16;
    free_scores(v, n_variants);
    free(layers);
    return ok;
}

static bool score_all(study *s, char *err, size_t n) {
    double f16 = 0;
    for (uint32_t first = 0; first < s->n_probes; first += BATCH) {
        const uint32_t n_probes = s->n_probes - first < BATCH ? s->n_probes - first : BATCH;
        if (!score_probes(s, first, n_probes, &f16, err, n)) return false;
        fprintf(stderr, "quality: %u of %u layers\n", (first + n_probes) / RUNGS, s->n_layers);
    }
    return true;
}

/* ---- the assignment ---- */

static double tile_bits(const study *s, kvl_format f) {
    const uint32_t dim = s->rt->config->head_dim;
    return 8.0 * (double)kvl_tile_bytes(f, BLOCK_TOKENS, dim) / (BLOCK_TOKENS * dim);
}

/* Bits a number at the length of a chunk, as cache_bits has them: the first block and the open one are exact. */
static double assignment_bits(const study *s) {
    const double tokens = s->p->ctx - 1, exact = tile_bits(s, KVL_F16);
    const uint32_t blocks = (s->p->ctx - 1 + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    const uint32_t n_exact = blocks < 2 ? blocks : 2;
    double packed = 0;
    for (uint32_t l = 0; l < s->n_layers; l++)
        packed += (tile_bits(s, ladder[s->k[l]]) + tile_bits(s, ladder[s->v[l]])) / (2 * s->n_layers);
    return (packed * (blocks - n_exact) + exact * n_exact) * BLOCK_TOKENS / tokens;
}

/* The step down that costs the least divergence for a bit: which choice becomes which rung. */
static bool best_step(const study *s, uint32_t **choice, uint32_t *rung) {
    double least = 0;
    *choice = NULL;
    for (uint32_t i = 0; i < 2 * s->n_layers; i++) {
        const uint32_t layer = i / 2, end = i % 2 ? RUNGS : K_RUNGS;
        uint32_t *at = i % 2 ? &s->v[layer] : &s->k[layer];
        for (uint32_t to = *at + 1; to < end; to++) {
            const double lost = s->kld[layer * RUNGS + to] - s->kld[layer * RUNGS + *at];
            const double ratio = lost / (tile_bits(s, ladder[*at]) - tile_bits(s, ladder[to]));
            if (*choice && ratio >= least) continue;
            least = ratio;
            *choice = at;
            *rung = to;
        }
    }
    return *choice != NULL;
}

/* Everything on one rung of the keys' and one of the values'. */
static void set_all(study *s, uint32_t k, uint32_t v) {
    for (uint32_t l = 0; l < s->n_layers; l++) {
        s->k[l] = k;
        s->v[l] = v;
    }
}

static bool check_budget(study *s, double budget, char *err, size_t n) {
    set_all(s, K_RUNGS - 1, RUNGS - 1);
    const double least = assignment_bits(s);
    return budget <= 0 || budget >= least ||
           llm_fail(err, n, "--bits %g: chunks of %u tokens take %.2f at least", budget, s->p->ctx, least);
}

static void assign(study *s, double budget) {
    uint32_t *choice, rung;
    set_all(s, 0, K_RUNGS);
    while (assignment_bits(s) > budget && best_step(s, &choice, &rung)) *choice = rung;
    for (uint32_t l = 0; l < s->n_layers; l++)
        s->layers[l] = (kvl_layer){.k_format = ladder[s->k[l]], .v_format = ladder[s->v[l]]};
}

static double expected_kld(const study *s) {
    double sum = 0;
    for (uint32_t l = 0; l < s->n_layers; l++)
        sum += s->kld[l * RUNGS + s->k[l]] + s->kld[l * RUNGS + s->v[l]];
    return sum;
}

/* ---- output ---- */

static void print_table(const study *s, bool chosen) {
    const uint32_t predictions = s->p->n_chunks * (s->p->ctx / 2 - 1);
    printf(
        "KLD above F16's with one layer's keys (left) or values (right) in a format, %u predictions\n\n%-6s",
        predictions, "layer");
    for (uint32_t r = 0; r < RUNGS; r++) printf(" %13s", kvl_format_name(ladder[r]));
    puts(chosen ? "  chosen" : "");
    for (uint32_t l = 0; l < s->n_layers; l++) {
        printf("%-6u", l);
        for (uint32_t r = 0; r < RUNGS; r++) printf(" %13.7f", s->kld[l * RUNGS + r]);
        if (chosen) printf("  %s %s", kvl_format_name(ladder[s->k[l]]), kvl_format_name(ladder[s->v[l]]));
        putchar('\n');
    }
}

static cJSON *probes_json(const study *s) {
    cJSON *rows = cJSON_CreateArray();
    for (uint32_t i = 0; i < s->n_probes; i++) {
        const uint32_t layer = i / RUNGS;
        cJSON *row = cJSON_CreateObject();
        cJSON_AddItemToArray(rows, row);
        cJSON_AddNumberToObject(row, "layer", layer);
        cJSON_AddStringToObject(row, "side", i % RUNGS < K_RUNGS ? "k" : "v");
        cJSON_AddStringToObject(row, "format", kvl_format_name(ladder[i % RUNGS]));
        cJSON_AddNumberToObject(row, "kld_mean", s->kld[i]);
    }
    return rows;
}

/* The assignment beside the presets of about its size. */
static bool measure_assignment(study *s, cJSON *out, char *err, size_t n) {
    variant v[] = {reference_variant(s->rt),
                   {.name = "assignment", .rt = s->rt, .cache = {.preset = "int8+", .layers = s->layers}},
                   {.name = "int4", .rt = s->rt, .cache.preset = "int4"},
                   {.name = "balanced", .rt = s->rt, .cache.preset = "balanced"},
                   {.name = "int8+", .rt = s->rt, .cache.preset = "int8+"}};
    enum { N = sizeof v / sizeof v[0] };
    if (!score_passage(s->p, v, N, false, err, n)) return false;
    cJSON *rows = out ? cJSON_AddArrayToObject(out, "caches") : NULL;
    if (!out) printf("\nThe sum of the chosen is %.6f; measured:\n\n", expected_kld(s));
    for (uint32_t i = 1; i < N; i++) {
        if (!out)
            printf("%-12s %6.2f bits  KLD %.6f  p99.9 %.4f\n", v[i].name, v[i].bits, v[i].kld_mean,
                   kld_quantile(&v[i], 0.999));
        if (!out) continue;
        cJSON *row = cJSON_CreateObject();
        cJSON_AddItemToArray(rows, row);
        cJSON_AddStringToObject(row, "kv", v[i].name);
        cJSON_AddNumberToObject(row, "bits", v[i].bits);
        cJSON_AddNumberToObject(row, "kld_mean", v[i].kld_mean);
        cJSON_AddNumberToObject(row, "kld_p999", kld_quantile(&v[i], 0.999));
    }
    free_scores(v, N);
    return true;
}

static bool write_assignment(const study *s, const layers_desc *d, char *err, size_t n) {
    char comment[128];
    const kv_file f = {.preset = "int8+", .layers = s->layers};
    snprintf(comment, sizeof comment, "%.2f bits a number at %u tokens; expected KLD %.6f",
             assignment_bits(s), s->p->ctx - 1, expected_kld(s));
    return !d->out || kv_file_write(d->out, &f, s->n_layers, comment, err, n);
}

static bool report(study *s, const layers_desc *d, char *err, size_t n) {
    if (d->bits > 0) assign(s, d->bits);
    if (d->bits > 0 && !write_assignment(s, d, err, n)) return false;
    if (!d->json) {
        print_table(s, d->bits > 0);
        return d->bits <= 0 || measure_assignment(s, NULL, err, n);
    }
    cJSON *out = cJSON_CreateObject();
    cJSON_AddItemToObject(out, "probes", probes_json(s));
    bool ok = d->bits <= 0 || measure_assignment(s, out, err, n);
    char *text = ok ? cJSON_Print(out) : NULL;
    if (text) puts(text);
    if (ok && !text) ok = llm_fail(err, n, "no memory for the output");
    cJSON_free(text);
    cJSON_Delete(out);
    return ok;
}

bool study_layers(runtime *rt, const passage *p, const layers_desc *d, char *err, size_t n) {
    study s = {.rt = rt, .p = p, .n_layers = rt->config->n_layers, .n_probes = rt->config->n_layers * RUNGS};
    s.kld = calloc(s.n_probes, sizeof *s.kld);
    s.k = calloc(s.n_layers, sizeof *s.k);
    s.v = calloc(s.n_layers, sizeof *s.v);
    s.layers = calloc(s.n_layers, sizeof *s.layers);
    bool ok = s.kld && s.k && s.v && s.layers
                  ? check_budget(&s, d->bits, err, n) && score_all(&s, err, n) && report(&s, d, err, n)
                  : llm_fail(err, n, "no memory for %u layers", s.n_layers);
    free(s.kld);
    free(s.k);
    free(s.v);
    free(s.layers);
    return ok;
}
