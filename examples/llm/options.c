#include "options.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* ---- walking over argv ---- */

bool args_next(args *a, char *err, size_t err_len) {
    if (err_len) err[0] = 0;
    if (a->i >= a->argc) return false;
    const char *arg = a->argv[a->i++];
    if (arg[0] != '-' || !arg[1]) return llm_fail(err, err_len, "'%.100s' is not an option", arg);
    const char *equals = strncmp(arg, "--", 2) == 0 ? strchr(arg, '=') : NULL;
    size_t len = equals ? (size_t)(equals - arg) : strlen(arg);
    if (len >= sizeof a->name) return llm_fail(err, err_len, "'%.100s' is not an option", arg);
    memcpy(a->name, arg, len);
    a->name[len] = 0;
    a->inlined = equals ? equals + 1 : NULL;
    return true;
}

bool args_is(const args *a, const char *name) { return strcmp(a->name, name) == 0; }

bool args_value(args *a, const char **value, char *err, size_t err_len) {
    *value = "";
    if (a->inlined)
        *value = a->inlined;
    else if (a->i < a->argc)
        *value = a->argv[a->i++];
    else
        return llm_fail(err, err_len, "%s needs a value", a->name);
    return true;
}

bool args_flag(args *a, char *err, size_t err_len) {
    return !a->inlined || llm_fail(err, err_len, "%s takes no value", a->name);
}

static bool digits_u64(const char *text, uint64_t *v, const char **end) {
    char *stop;
    if (text[0] < '0' || text[0] > '9') return false;
    errno = 0;
    *v = strtoull(text, &stop, 10);
    *end = stop;
    return errno == 0;
}

bool args_u64(args *a, uint64_t min, uint64_t max, uint64_t *value, char *err, size_t err_len) {
    const char *text, *end;
    if (!args_value(a, &text, err, err_len)) return false;
    if (digits_u64(text, value, &end) && !*end && *value >= min && *value <= max) return true;
    return llm_fail(err, err_len, "%s '%.60s': must be a whole number from %" PRIu64 " to %" PRIu64, a->name,
                    text, min, max);
}

bool args_float(args *a, float min, float max, float *value, char *err, size_t err_len) {
    const char *text;
    char *end;
    if (!args_value(a, &text, err, err_len)) return false;
    *value = strtof(text, &end);
    if (end != text && !*end && *value >= min && *value <= max) return true; /* false for NaN */
    return llm_fail(err, err_len, "%s '%.60s': must be a number from %g to %g", a->name, text, (double)min,
                    (double)max);
}

bool args_bytes(args *a, uint64_t *value, char *err, size_t err_len) {
    const char *text, *end;
    if (!args_value(a, &text, err, err_len)) return false;
    if (digits_u64(text, value, &end) && *value) {
        static const char units[] = "KMG";
        const char *unit = *end ? strchr(units, *end & ~0x20) : NULL; /* either case */
        unsigned shift = unit ? 10 * (unsigned)(unit - units + 1) : 0;
        if ((unit ? !end[1] : !*end) && *value <= UINT64_MAX >> shift) {
            *value <<= shift;
            return true;
        }
    }
    return llm_fail(err, err_len, "%s '%.60s': must be a number of bytes above 0, such as 64M (K, M or G)",
                    a->name, text);
}

/* ---- the shared options ---- */

const char options_help[] =
    "  -m FILE          model, a GGUF file (required)\n"
    "  --backend NAME   where the KV cache lives: auto cuda vulkan cpu (default auto: the first that works)\n"
    "  --device N       which GPU, by the numbers that kvl_info lists, from 0 (default: the backend's best)\n"
    "  --threads N      threads (default: one for each processor)\n"
    "  --act int8|f32   activations (default int8; f32 is slower and exact)\n"
    "  --kv NAME|FILE   KV format: f32 f16 bf16 int8 int8+ fp8 nvfp4 balanced int4 (default int8),\n"
    "                   or a file that names formats by layer (llm/kv_file.h says how)\n"
    "  --kv-k FORMAT    format of keys alone\n"
    "  --kv-v FORMAT    format of values alone\n"
    "  --kv-bytes N     KV memory in bytes, or with K, M, G\n"
    "  --temp T         temperature; 0 is greedy\n"
    "  --top-k N  --top-p P  --min-p P  --seed N\n"
    "                   sampling, with a temperature above 0\n";

static bool readable(const char *path) {
    FILE *f = fopen(path, "rb");
    if (f) fclose(f);
    return f != NULL;
}

bool options_kv(runtime_cache_desc *c, const char *option, const char *name, char *err, size_t err_len) {
    char known[160] = "";
    uint32_t n;
    const kvl_preset *preset = kvl_preset_find(name);
    c->preset = preset ? preset->name : NULL;
    c->kv_file = preset ? NULL : name;
    if (preset || readable(name)) return true;
    const kvl_preset *all = kvl_presets(&n);
    for (uint32_t i = 0; i < n; i++) {
        size_t at = strlen(known);
        snprintf(known + at, sizeof known - at, " %s", all[i].name);
    }
    return llm_fail(err, err_len, "%s '%.40s' is unknown and no file; there are:%s", option, name, known);
}

static bool take_kv(options *o, args *a, char *err, size_t err_len) {
    const char *name;
    return args_value(a, &name, err, err_len) && options_kv(&o->cache, a->name, name, err, err_len);
}

static bool take_format(args *a, kvl_format *format, char *err, size_t err_len) {
    const char *name;
    char known[200] = "";
    if (!args_value(a, &name, err, err_len)) return false;
    *format = kvl_format_from_name(name);
    if (*format != KVL_FORMAT_DEFAULT) return true;
    for (kvl_format f = KVL_F32; f < KVL_FORMAT_COUNT; f++) {
        size_t at = strlen(known);
        snprintf(known + at, sizeof known - at, " %s", kvl_format_name(f));
    }
    return llm_fail(err, err_len, "%s '%.40s' is unknown; there are:%s, and '+rot' after some", a->name, name,
                    known);
}

static bool take_backend(options *o, args *a, char *err, size_t err_len) {
    static const struct {
        const char *name;
        kvl_backend_kind kind;
    } all[] = {{"auto", KVL_BACKEND_AUTO},
               {"cuda", KVL_BACKEND_CUDA},
               {"vulkan", KVL_BACKEND_VULKAN},
               {"cpu", KVL_BACKEND_CPU}};
    const char *name;
    if (!args_value(a, &name, err, err_len)) return false;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        if (strcmp(name, all[i].name) != 0) continue;
        o->runtime.backend = all[i].kind;
        return true;
    }
    return llm_fail(err, err_len, "%s '%.40s' is unknown; there are: auto cuda vulkan cpu", a->name, name);
}

static bool take_act(options *o, args *a, char *err, size_t err_len) {
    const char *name;
    if (!args_value(a, &name, err, err_len)) return false;
    if (strcmp(name, "int8") == 0)
        o->runtime.act = WEIGHTS_INT8;
    else if (strcmp(name, "f32") == 0)
        o->runtime.act = WEIGHTS_F32;
    else
        return llm_fail(err, err_len, "%s '%.40s' is unknown; there are: int8 f32", a->name, name);
    return true;
}

bool options_take(options *o, args *a, bool *taken, char *err, size_t err_len) {
    uint64_t n = 0;
    *taken = true;
    if (args_is(a, "-m") || args_is(a, "--model")) return args_value(a, &o->runtime.path, err, err_len);
    if (args_is(a, "--backend")) return take_backend(o, a, err, err_len);
    if (args_is(a, "--device")) {
        if (!args_u64(a, 0, 255, &n, err, err_len)) return false;
        o->runtime.device = (uint32_t)n + 1;
        return true;
    }
    if (args_is(a, "--act")) return take_act(o, a, err, err_len);
    if (args_is(a, "--kv")) return take_kv(o, a, err, err_len);
    if (args_is(a, "--kv-k")) return take_format(a, &o->cache.k_format, err, err_len);
    if (args_is(a, "--kv-v")) return take_format(a, &o->cache.v_format, err, err_len);
    if (args_is(a, "--kv-bytes")) return args_bytes(a, &o->cache.device_bytes, err, err_len);
    if (args_is(a, "--temp")) return args_float(a, 0, 100, &o->sampling.temperature, err, err_len);
    if (args_is(a, "--top-p")) return args_float(a, 0, 1, &o->sampling.top_p, err, err_len);
    if (args_is(a, "--min-p")) return args_float(a, 0, 1, &o->sampling.min_p, err, err_len);
    if (args_is(a, "--seed")) return args_u64(a, 0, UINT64_MAX, &o->sampling.seed, err, err_len);
    if (args_is(a, "--threads")) {
        if (!args_u64(a, 1, 256, &n, err, err_len)) return false;
        o->runtime.n_threads = (uint32_t)n;
        return true;
    }
    if (args_is(a, "--top-k")) {
        if (!args_u64(a, 0, INT32_MAX, &n, err, err_len)) return false;
        o->sampling.top_k = (int)n;
        return true;
    }
    *taken = false;
    return true;
}

bool options_check(const options *o, char *err, size_t err_len) {
    return o->runtime.path || llm_fail(err, err_len, "-m MODEL.gguf is missing");
}
