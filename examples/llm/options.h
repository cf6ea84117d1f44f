/* options.h - the command line of the programs: `--name value`, `--name=value`, and the options that all
 * share.
 *
 * Threads: one.
 */
#ifndef LLM_OPTIONS_H
#define LLM_OPTIONS_H

#include "error.h"
#include "runtime.h"
#include "sampler.h"

/* A walk over argv. Start from {argc, argv, .i = 1}. */
typedef struct args {
    int argc;
    char **argv;
    int i;
    char name[64];       /* of the current option, without =value */
    const char *inlined; /* its =value, or NULL */
} args;

/* Moves to the next option. False at the end, or with a line in err (else err[0] is 0) at what is no option.
 */
bool args_next(args *a, char *err, size_t err_len);
bool args_is(const args *a, const char *name); /* "--temp"; "-m" */
/* The value of the current option, which must have one. */
bool args_value(args *a, const char **value, char *err, size_t err_len);
bool args_u64(args *a, uint64_t min, uint64_t max, uint64_t *value, char *err, size_t err_len);
bool args_float(args *a, float min, float max, float *value, char *err, size_t err_len);
bool args_bytes(args *a, uint64_t *value, char *err, size_t err_len); /* 64M, 1G, 4096K, 1000000 */
bool args_flag(args *a, char *err, size_t err_len);                   /* refuses an =value */

/* `name` of a KV preset, or else a file that can be read: the one or the other is set in *c. `option` is for
 * the error, which names the presets. */
bool options_kv(runtime_cache_desc *c, const char *option, const char *name, char *err, size_t err_len);

/* -m, --backend, --device, --threads, --act, --kv, --kv-k, --kv-v, --kv-bytes, --temp, --top-k, --top-p,
 * --min-p, --seed */
typedef struct options {
    runtime_desc runtime;
    runtime_cache_desc cache;
    sampler_desc sampling;
} options;

extern const char options_help[]; /* the lines about them for a --help text */

/* Takes the current option if it is one of these: *taken says so. False: its value is bad, err names it. */
bool options_take(options *o, args *a, bool *taken, char *err, size_t err_len);
/* After the last option: the model must be given. */
bool options_check(const options *o, char *err, size_t err_len);

#endif /* LLM_OPTIONS_H */
