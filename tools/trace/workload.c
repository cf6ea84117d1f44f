/* workload.c - reads request traces, or makes them up. */
#include "trace.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_TOKENS = 1 << 27, MAX_REQUESTS = 1 << 24 };

typedef struct reader {
    workload *w;
    const char *path;
    FILE *file;
    char *line;
    size_t cap;
    uint32_t number; /* of the line */
    size_t requests_cap, hashes_cap;
    double first_ms;
    int column[3], n_columns; /* of an Azure file: time, prompt, output */
    uint64_t *keys;           /* hash ids by their number, and an open-addressing table over them */
    uint32_t *slots, n_slots;
    char *err;
    size_t err_len;
} reader;

__attribute__((format(printf, 2, 3))) static bool bad(reader *r, const char *format, ...) {
    char text[160];
    va_list ap;
    va_start(ap, format);
    vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    return llm_fail(r->err, r->err_len, "%s:%u: %s", r->path, r->number, text);
}

static bool grow(void *array, size_t *cap, size_t n, size_t size) {
    if (n < *cap) return true;
    size_t more = *cap ? *cap * 2 : 1024;
    void *p = realloc(*(void **)array, more * size);
    if (!p) return false;
    *(void **)array = p;
    *cap = more;
    return true;
}

/* ---- requests and their hashes ---- */

static bool add_request(reader *r, double ms, double n_prompt, double n_output) {
    workload *w = r->w;
    if (!(n_prompt >= 1 && n_prompt <= MAX_TOKENS) || n_prompt != floor(n_prompt))
        return bad(r, "prompt of %.15g tokens: must be a whole number from 1 to %d", n_prompt, MAX_TOKENS);
    if (!(n_output >= 1 && n_output <= MAX_TOKENS) || n_output != floor(n_output))
        return bad(r, "answer of %.15g tokens: must be a whole number from 1 to %d", n_output, MAX_TOKENS);
    if (!w->n) r->first_ms = ms;
    ms -= r->first_ms;
    if (w->n && ms < w->requests[w->n - 1].arrival_ms)
        return bad(r, "this request is earlier than the one before it");
    if (!(ms < 1e12)) return bad(r, "this request is more than 30 years after the first");
    if (w->n == MAX_REQUESTS) return bad(r, "more than %d requests", MAX_REQUESTS);
    if (!grow(&w->requests, &r->requests_cap, w->n, sizeof *w->requests)) return bad(r, "out of memory");
    request *q = &w->requests[w->n++];
    q->arrival_ms = ms;
    q->n_prompt = (uint32_t)n_prompt;
    q->n_output = (uint32_t)n_output;
    q->first_hash = w->n_hashes;
    return true;
}

static uint64_t mix(uint64_t x) { /* splitmix64's finaliser */
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static bool more_slots(reader *r) {
    uint32_t n = r->n_slots ? r->n_slots * 2 : 1 << 12;
    uint32_t *slots = malloc(n * sizeof *slots);
    uint64_t *keys = realloc(r->keys, n / 2 * sizeof *keys);
    if (keys) r->keys = keys;
    if (!slots || !keys) {
        free(slots);
        return bad(r, "out of memory");
    }
    memset(slots, 0xff, n * sizeof *slots);
    for (uint32_t i = 0; i < r->w->n_distinct; i++) {
        uint32_t at = (uint32_t)mix(keys[i]) & (n - 1);
        while (slots[at] != KVL_NONE) at = (at + 1) & (n - 1);
        slots[at] = i;
    }
    free(r->slots);
    r->slots = slots;
    r->n_slots = n;
    return true;
}

static bool add_hash(reader *r, double id) {
    workload *w = r->w;
    if (!(id >= 0 && id <= 9007199254740992.0) || id != floor(id))
        return bad(r, "hash_ids: %.17g is not a whole number from 0 to 2^53", id);
    if (w->n_distinct >= r->n_slots / 2 && !more_slots(r)) return false;
    if (w->n_hashes == UINT32_MAX || !grow(&w->hashes, &r->hashes_cap, w->n_hashes, sizeof *w->hashes))
        return bad(r, "out of memory");
    uint64_t key = (uint64_t)id;
    uint32_t at = (uint32_t)mix(key) & (r->n_slots - 1);
    while (r->slots[at] != KVL_NONE && r->keys[r->slots[at]] != key) at = (at + 1) & (r->n_slots - 1);
    if (r->slots[at] == KVL_NONE) {
        r->keys[w->n_distinct] = key;
        r->slots[at] = w->n_distinct++;
    }
    w->hashes[w->n_hashes++] = r->slots[at];
    return true;
}

/* ---- Azure: TIMESTAMP,ContextTokens,GeneratedTokens ---- */

static char *next_field(char **at) {
    char *field = *at, *comma = field ? strchr(field, ',') : NULL;
    if (!field) return NULL;
    *at = comma ? comma + 1 : NULL;
    if (comma) *comma = 0;
    return field;
}

static bool azure_header(reader *r) {
    static const char *const names[3] = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"};
    char *at = r->line, *field;
    for (int i = 0; i < 3; i++) r->column[i] = -1;
    for (r->n_columns = 0; (field = next_field(&at)); r->n_columns++)
        for (int i = 0; i < 3; i++)
            if (strcmp(field, names[i]) == 0) r->column[i] = r->n_columns;
    for (int i = 0; i < 3; i++)
        if (r->column[i] < 0) return bad(r, "the header has no column %s", names[i]);
    return true;
}

/* "2023-11-16 18:15:46.6805900", perhaps with "+00:00" behind, in milliseconds. */
static bool azure_time(reader *r, const char *text, double *ms) {
    unsigned year, month, day, hour, minute;
    double second;
    int end = 0;
    int n =
        sscanf(text, "%4u-%2u-%2u%*1[ T]%2u:%2u:%lf%n", &year, &month, &day, &hour, &minute, &second, &end);
    bool whole = n == 6 && (!text[end] || strcmp(text + end, "+00:00") == 0 || strcmp(text + end, "Z") == 0);
    if (!whole || year < 1970 || month - 1 > 11 || day - 1 > 30 || hour > 23 || minute > 59 ||
        !(second >= 0 && second < 61))
        return bad(r, "'%.40s' is not a time such as 2023-11-16 18:15:46.68", text);
    uint32_t y = month > 2 ? year : year - 1,
             m = month > 2 ? month - 3 : month + 9; /* years that begin in March */
    double days = 365.0 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1;
    *ms = ((days * 24 + hour) * 60 + minute) * 60e3 + second * 1e3;
    return true;
}

static bool whole_number(reader *r, const char *name, const char *text, double *v) {
    char *end;
    errno = 0;
    *v = (double)strtoull(text, &end, 10);
    if (text[0] < '0' || text[0] > '9' || *end || errno)
        return bad(r, "%s: '%.40s' is not a whole number", name, text);
    return true;
}

static bool azure_line(reader *r) {
    char *at = r->line, *field, *fields[3] = {NULL, NULL, NULL};
    int n = 0;
    double ms = 0, n_prompt = 0, n_output = 0;
    for (; (field = next_field(&at)); n++)
        for (int i = 0; i < 3; i++)
            if (r->column[i] == n) fields[i] = field;
    if (n != r->n_columns) return bad(r, "%d columns, the header has %d", n, r->n_columns);
    return azure_time(r, fields[0], &ms) && whole_number(r, "ContextTokens", fields[1], &n_prompt) &&
           whole_number(r, "GeneratedTokens", fields[2], &n_output) && add_request(r, ms, n_prompt, n_output);
}

/* ---- Mooncake: an object a line ---- */

static bool json_number(reader *r, const cJSON *object, const char *name, double *v) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, name);
    if (!cJSON_IsNumber(item)) return bad(r, "no number \"%s\"", name);
    *v = item->valuedouble;
    return true;
}

static bool mooncake_object(reader *r, const cJSON *object) {
    double ms = 0, n_prompt = 0, n_output = 0;
    const cJSON *ids = cJSON_GetObjectItemCaseSensitive(object, "hash_ids"), *id;
    if (!json_number(r, object, "timestamp", &ms) || !json_number(r, object, "input_length", &n_prompt) ||
        !json_number(r, object, "output_length", &n_output))
        return false;
    if (!(ms >= 0)) return bad(r, "timestamp %.15g is negative", ms);
    if (!cJSON_IsArray(ids)) return bad(r, "no array \"hash_ids\"");
    if (!add_request(r, ms, n_prompt, n_output)) return false;
    int n = cJSON_GetArraySize(ids), wanted = ((int)n_prompt + HASH_TOKENS - 1) / HASH_TOKENS;
    if (n != wanted) return bad(r, "%d hash_ids for a prompt of %.0f tokens, not %d", n, n_prompt, wanted);
    cJSON_ArrayForEach(id, ids) if (!cJSON_IsNumber(id)) return bad(r, "hash_ids: not a number");
    else if (!add_hash(r, id->valuedouble)) return false;
    return true;
}

static bool mooncake_line(reader *r) {
    const char *end = NULL;
    cJSON *object = cJSON_ParseWithOpts(r->line, &end, true);
    bool ok = cJSON_IsObject(object) ? mooncake_object(r, object) : bad(r, "not a JSON object");
    cJSON_Delete(object);
    return ok;
}

/* ---- a file ---- */

static bool next_line(reader *r, bool *any) {
    ssize_t n = getline(&r->line, &r->cap, r->file);
    *any = n >= 0;
    if (!*any)
        return ferror(r->file) ? llm_fail(r->err, r->err_len, "%s: %s", r->path, strerror(errno)) : true;
    r->number++;
    if (strlen(r->line) != (size_t)n) return bad(r, "a NUL byte");
    while (n && (r->line[n - 1] == '\n' || r->line[n - 1] == '\r')) r->line[--n] = 0;
    return true;
}

static bool read_lines(reader *r, trace_format format, uint32_t limit) {
    bool any, header = false;
    while (!limit || r->w->n < limit) {
        if (!next_line(r, &any)) return false;
        if (!any) break;
        if (!r->line[0]) continue;
        if (format == TRACE_GUESS) format = r->line[0] == '{' ? TRACE_MOONCAKE : TRACE_AZURE;
        if (format == TRACE_AZURE && !header) {
            header = true;
            if (!azure_header(r)) return false;
        } else if (!(format == TRACE_AZURE ? azure_line(r) : mooncake_line(r))) {
            return false;
        }
    }
    return r->w->n || llm_fail(r->err, r->err_len, "%s: no requests", r->path);
}

static void measure(workload *w) {
    w->max_prompt = w->max_output = w->max_total = 0;
    for (uint32_t i = 0; i < w->n; i++) {
        const request *q = &w->requests[i];
        if (q->n_prompt > w->max_prompt) w->max_prompt = q->n_prompt;
        if (q->n_output > w->max_output) w->max_output = q->n_output;
        if (q->n_prompt + q->n_output > w->max_total) w->max_total = q->n_prompt + q->n_output;
    }
    if (w->reserve < w->max_total) w->reserve = w->max_total;
}

bool workload_read(workload *w, const char *path, trace_format format, uint32_t limit, char *err, size_t n) {
    reader r = {.w = w, .path = path, .err = err, .err_len = n};
    memset(w, 0, sizeof *w);
    r.file = fopen(path, "r");
    if (!r.file) return llm_fail(err, n, "%s: %s", path, strerror(errno));
    bool ok = read_lines(&r, format, limit);
    fclose(r.file);
    free(r.line);
    free(r.keys);
    free(r.slots);
    if (ok)
        measure(w);
    else
        workload_free(w);
    return ok;
}

bool workload_synthetic(workload *w, uint32_t n, uint32_t n_prompt, uint32_t mean, uint32_t max,
                        uint64_t seed, char *err, size_t err_len) {
    memset(w, 0, sizeof *w);
    w->requests = calloc(n, sizeof *w->requests);
    if (!w->requests) return llm_fail(err, err_len, "out of memory");
    w->n = n;
    w->reserve = n_prompt + max;
    for (uint32_t i = 0; i < n; i++) {
        double u = ((double)(mix(seed * 0x9e3779b97f4a7c15u + i) >> 11) + 0.5) / 9007199254740992.0;
        double length = ceil(mean ? -log(u) * mean : u * max);
        w->requests[i].n_prompt = n_prompt;
        w->requests[i].n_output = length > max ? max : (uint32_t)length;
    }
    measure(w);
    return true;
}

bool workload_repeat(workload *w, uint32_t times, double speed, char *err, size_t err_len) {
    uint32_t n = w->n, n_hashes = w->n_hashes;
    if ((uint64_t)n * times > MAX_REQUESTS || (uint64_t)n_hashes * times > UINT32_MAX / 2)
        return llm_fail(err, err_len, "--repeat %u: more than %d requests", times, MAX_REQUESTS);
    request *q = realloc(w->requests, (size_t)n * times * sizeof *q);
    if (q) w->requests = q;
    uint32_t *h = n_hashes ? realloc(w->hashes, (size_t)n_hashes * times * sizeof *h) : NULL;
    if (h) w->hashes = h;
    if (!q || (n_hashes && !h)) return llm_fail(err, err_len, "--repeat %u: out of memory", times);
    double span = q[n - 1].arrival_ms * (n > 1 ? (double)n / (n - 1) : 1);
    for (uint32_t t = 1; t < times; t++) {
        for (uint32_t i = 0; i < n; i++) {
            q[(size_t)t * n + i] = q[i];
            q[(size_t)t * n + i].arrival_ms += span * t;
            q[(size_t)t * n + i].first_hash += n_hashes * t;
        }
        for (uint32_t i = 0; i < n_hashes; i++) h[(size_t)t * n_hashes + i] = h[i] + w->n_distinct * t;
    }
    w->n = n * times;
    w->n_hashes = n_hashes * times;
    w->n_distinct *= times;
    for (uint32_t i = 0; i < w->n; i++) q[i].arrival_ms = isinf(speed) ? 0 : q[i].arrival_ms / speed;
    return true;
}

uint32_t workload_drop(workload *w, uint32_t max_total) {
    uint32_t kept = 0, n = w->n;
    for (uint32_t i = 0; i < n; i++)
        if (w->requests[i].n_prompt + w->requests[i].n_output <= max_total)
            w->requests[kept++] = w->requests[i];
    w->n = kept;
    if (w->reserve == w->max_total) w->reserve = 0; /* measured, not declared */
    measure(w);
    return n - kept;
}

void workload_free(workload *w) {
    free(w->requests);
    free(w->hashes);
    memset(w, 0, sizeof *w);
}

int32_t workload_token(const workload *w, uint32_t r, uint32_t i) {
    const request *q = &w->requests[r];
    uint64_t block =
        w->hashes ? w->hashes[q->first_hash + i / HASH_TOKENS] : (uint64_t)r << 20 | i / HASH_TOKENS;
    return (int32_t)((mix(block + 1) + (uint64_t)(i % HASH_TOKENS) * 0x9e3779b1u) & 0x3fffffff);
}

int32_t workload_answer(uint32_t r, uint32_t i) {
    return (int32_t)((mix((uint64_t)r + 1) + (uint64_t)i * 0x9e3779b1u) & 0x3fffffff) | 0x40000000;
}
