#include "gguf.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "GGUF files are little endian and this reader maps them as they are"
#endif

/* Fewest bytes that one entry can take in the file. A count is compared with what the rest of the file could hold
 * before anything is allocated for it. */
#define MIN_KV_BYTES 14u     /* key length 8, key 1, type 4, value 1 */
#define MIN_TENSOR_BYTES 33u /* name length 8, name 1, n_dims 4, one dimension 8, type 4, offset 8 */
#define MAX_NAME_BYTES 65535u
#define DEFAULT_ALIGNMENT 32u

typedef struct kv_entry {
    gguf_str key;
    uint32_t type;
    const uint8_t *value; /* payload of a scalar or string */
    gguf_array array;
} kv_entry;

struct gguf_file {
    const uint8_t *base;
    size_t size;
    bool mapped;
    uint32_t version;
    uint64_t n_kv, n_tensors;
    kv_entry *kv; /* file order */
    gguf_tensor_info *tensors;
    const kv_entry **kv_by_key; /* sorted, for look-up and to find duplicates */
    const gguf_tensor_info **tensor_by_name;
};

/* ---- type tables ------------------------------------------------------------------------------------------ */

typedef struct type_traits {
    const char *name;
    uint16_t elements, bytes; /* per block; 0: no such type */
} type_traits;

/* Indexed by the number in the file; the gaps are types that ggml has removed. Source: ggml/src/ggml-common.h. */
static const type_traits k_types[] = {
    [0] = {"F32", 1, 4},         [1] = {"F16", 1, 2},         [2] = {"Q4_0", 32, 18},
    [3] = {"Q4_1", 32, 20},      [6] = {"Q5_0", 32, 22},      [7] = {"Q5_1", 32, 24},
    [8] = {"Q8_0", 32, 34},      [9] = {"Q8_1", 32, 36},      [10] = {"Q2_K", 256, 84},
    [11] = {"Q3_K", 256, 110},   [12] = {"Q4_K", 256, 144},   [13] = {"Q5_K", 256, 176},
    [14] = {"Q6_K", 256, 210},   [15] = {"Q8_K", 256, 292},   [16] = {"IQ2_XXS", 256, 66},
    [17] = {"IQ2_XS", 256, 74},  [18] = {"IQ3_XXS", 256, 98}, [19] = {"IQ1_S", 256, 50},
    [20] = {"IQ4_NL", 32, 18},   [21] = {"IQ3_S", 256, 110},  [22] = {"IQ2_S", 256, 82},
    [23] = {"IQ4_XS", 256, 136}, [24] = {"I8", 1, 1},         [25] = {"I16", 1, 2},
    [26] = {"I32", 1, 4},        [27] = {"I64", 1, 8},        [28] = {"F64", 1, 8},
    [29] = {"IQ1_M", 256, 56},   [30] = {"BF16", 1, 2},       [34] = {"TQ1_0", 256, 54},
    [35] = {"TQ2_0", 256, 66},   [39] = {"MXFP4", 32, 17},    [40] = {"NVFP4", 64, 36},
};
#define N_TYPES (sizeof k_types / sizeof k_types[0])

static const char *const k_kv_names[] = {"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                         "bool", "string", "array", "u64", "i64", "f64"};
/* Bytes of a scalar; 0 for strings and arrays, whose size is in the file. */
static const uint8_t k_kv_bytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
#define N_KV_TYPES (sizeof k_kv_bytes)

const char *gguf_type_name(uint32_t type) {
    return type < N_TYPES && k_types[type].name ? k_types[type].name : "unknown";
}

bool gguf_type_block(uint32_t type, uint32_t *elements, uint32_t *bytes) {
    if (type >= N_TYPES || !k_types[type].name) return false;
    *elements = k_types[type].elements;
    *bytes = k_types[type].bytes;
    return true;
}

bool gguf_type_readable(uint32_t type) {
    return type == GGUF_F32 || type == GGUF_F16 || type == GGUF_Q8_0 || type == GGUF_Q4_0 ||
           type == GGUF_Q4_1;
}

/* ---- strings ---------------------------------------------------------------------------------------------- */

bool gguf_str_eq(gguf_str s, const char *c) { return strlen(c) == s.len && memcmp(s.data, c, s.len) == 0; }

const char *gguf_printable(gguf_str s, char *buf, size_t buf_len) {
    size_t n = s.len < buf_len - 1 ? s.len : buf_len - 1;
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)s.data[i];
        buf[i] = c >= 0x20 && c < 0x7f ? (char)c : '?';
    }
    buf[n] = 0;
    if (n < s.len && n >= 3) memcpy(buf + n - 3, "...", 3);
    return buf;
}

#define SHOW(s) gguf_printable((s), (char[80]){0}, 80)

static int compare_str(gguf_str a, gguf_str b) {
    int c = memcmp(a.data, b.data, a.len < b.len ? a.len : b.len);
    return c ? c : (a.len > b.len) - (a.len < b.len);
}

/* Names become part of messages and are looked up as C strings, so they must be plain. */
static bool is_printable_ascii(gguf_str s) {
    for (size_t i = 0; i < s.len; i++)
        if (s.data[i] < 0x20 || s.data[i] > 0x7e) return false;
    return true;
}

/* ---- the cursor: every read is checked against the bytes left --------------------------------------------- */

typedef struct cursor {
    const uint8_t *base;
    size_t size, pos; /* pos <= size always */
} cursor;

static uint64_t load_u64(const uint8_t *p) {
    uint64_t v;
    memcpy(&v, p, 8);
    return v;
}

static uint32_t load_u32(const uint8_t *p) {
    uint32_t v;
    memcpy(&v, p, 4);
    return v;
}

static size_t left(const cursor *c) { return c->size - c->pos; }

static bool take(cursor *c, uint64_t n, const uint8_t **p) {
    if (n > left(c)) return false;
    *p = c->base + c->pos;
    c->pos += (size_t)n;
    return true;
}

static bool take_u32(cursor *c, uint32_t *v) {
    const uint8_t *p;
    if (!take(c, 4, &p)) return false;
    *v = load_u32(p);
    return true;
}

static bool take_u64(cursor *c, uint64_t *v) {
    const uint8_t *p;
    if (!take(c, 8, &p)) return false;
    *v = load_u64(p);
    return true;
}

static bool take_str(cursor *c, gguf_str *s) {
    uint64_t n;
    const uint8_t *p;
    if (!take_u64(c, &n) || !take(c, n, &p)) return false;
    s->data = (const char *)p;
    s->len = (size_t)n;
    return true;
}

/* A key or tensor name. `what` and `i` identify the entry while it has no name yet. */
static bool take_name(cursor *c, const char *what, uint64_t i, gguf_str *s, char *err, size_t err_len) {
    uint64_t n;
    const uint8_t *p;
    if (!take_u64(c, &n))
        return llm_fail(err, err_len, "%s %llu: the file ends before its name", what, (unsigned long long)i);
    if (n == 0 || n > MAX_NAME_BYTES || !take(c, n, &p))
        return llm_fail(err, err_len, "%s %llu: its name would be %llu bytes long", what,
                        (unsigned long long)i, (unsigned long long)n);
    *s = (gguf_str){(const char *)p, (size_t)n};
    if (!is_printable_ascii(*s))
        return llm_fail(err, err_len, "%s %llu: its name '%s' is not printable ASCII", what,
                        (unsigned long long)i, SHOW(*s));
    return true;
}

/* ---- metadata --------------------------------------------------------------------------------------------- */

static bool check_bools(const kv_entry *e, const uint8_t *p, uint64_t n, char *err, size_t err_len) {
    for (uint64_t i = 0; i < n; i++)
        if (p[i] > 1)
            return llm_fail(err, err_len, "key '%s': %u is not a bool (0 or 1)", SHOW(e->key),
                            (unsigned)p[i]);
    return true;
}

static bool read_array(cursor *c, kv_entry *e, char *err, size_t err_len) {
    uint32_t type;
    uint64_t n;
    if (!take_u32(c, &type) || !take_u64(c, &n))
        return llm_fail(err, err_len, "key '%s': the file ends inside its array header", SHOW(e->key));
    if (type >= N_KV_TYPES)
        return llm_fail(err, err_len, "key '%s': unknown array element type %u", SHOW(e->key), type);
    if (type == GGUF_KV_ARRAY)
        return llm_fail(err, err_len, "key '%s': an array of arrays is not supported", SHOW(e->key));
    /* a string takes 8 bytes at least: its length */
    uint64_t elem = type == GGUF_KV_STR ? 8 : k_kv_bytes[type];
    if (n > left(c) / elem)
        return llm_fail(err, err_len, "key '%s': an array of %llu %s does not fit into the %zu bytes left",
                        SHOW(e->key), (unsigned long long)n, k_kv_names[type], left(c));
    e->array = (gguf_array){(gguf_kv_type)type, n, c->base + c->pos};
    if (type != GGUF_KV_STR) {
        c->pos += (size_t)(n * elem);
        return type != GGUF_KV_BOOL || check_bools(e, e->array.data, n, err, err_len);
    }
    for (uint64_t i = 0; i < n; i++) {
        gguf_str s;
        if (!take_str(c, &s))
            return llm_fail(err, err_len, "key '%s': string %llu of %llu reaches past the end of the file",
                            SHOW(e->key), (unsigned long long)i, (unsigned long long)n);
    }
    return true;
}

static bool read_kv(cursor *c, uint64_t i, kv_entry *e, char *err, size_t err_len) {
    if (!take_name(c, "metadata key", i, &e->key, err, err_len)) return false;
    if (!take_u32(c, &e->type))
        return llm_fail(err, err_len, "key '%s': the file ends before its type", SHOW(e->key));
    if (e->type >= N_KV_TYPES)
        return llm_fail(err, err_len, "key '%s': unknown value type %u", SHOW(e->key), e->type);
    if (e->type == GGUF_KV_ARRAY) return read_array(c, e, err, err_len);
    e->value = c->base + c->pos;
    if (e->type == GGUF_KV_STR) {
        gguf_str s;
        if (!take_str(c, &s))
            return llm_fail(err, err_len, "key '%s': its string reaches past the end of the file",
                            SHOW(e->key));
        return true;
    }
    const uint8_t *p;
    if (!take(c, k_kv_bytes[e->type], &p))
        return llm_fail(err, err_len, "key '%s': the file ends inside its value", SHOW(e->key));
    return e->type != GGUF_KV_BOOL || check_bools(e, p, 1, err, err_len);
}

static int compare_kv(const void *a, const void *b) {
    return compare_str((*(const kv_entry *const *)a)->key, (*(const kv_entry *const *)b)->key);
}

static bool read_metadata(gguf_file *f, cursor *c, char *err, size_t err_len) {
    if (f->n_kv > left(c) / MIN_KV_BYTES)
        return llm_fail(err, err_len, "metadata_kv_count %llu does not fit into the %zu bytes left",
                        (unsigned long long)f->n_kv, left(c));
    size_t n = (size_t)f->n_kv;
    f->kv = calloc(n + 1, sizeof *f->kv);
    f->kv_by_key = calloc(n + 1, sizeof *f->kv_by_key);
    if (!f->kv || !f->kv_by_key) return llm_fail(err, err_len, "out of memory for %zu metadata keys", n);
    for (size_t i = 0; i < n; i++) {
        if (!read_kv(c, i, &f->kv[i], err, err_len)) return false;
        f->kv_by_key[i] = &f->kv[i];
    }
    qsort(f->kv_by_key, n, sizeof *f->kv_by_key, compare_kv);
    for (size_t i = 1; i < n; i++)
        if (compare_kv(&f->kv_by_key[i - 1], &f->kv_by_key[i]) == 0)
            return llm_fail(err, err_len, "key '%s' appears twice", SHOW(f->kv_by_key[i]->key));
    return true;
}

/* ---- tensors ---------------------------------------------------------------------------------------------- */

/* Bytes of the tensor from its shape and type, overflow-checked. */
static bool tensor_bytes(gguf_tensor_info *t, char *err, size_t err_len) {
    uint32_t block, block_bytes;
    uint64_t n = 1;
    if (!gguf_type_block(t->type, &block, &block_bytes))
        return llm_fail(err, err_len, "tensor '%s': unknown type %u", SHOW(t->name), t->type);
    for (uint32_t d = 0; d < t->n_dims; d++) {
        if (t->ne[d] == 0) return llm_fail(err, err_len, "tensor '%s': dimension %u is 0", SHOW(t->name), d);
        if (n > (uint64_t)INT64_MAX / t->ne[d])
            return llm_fail(err, err_len, "tensor '%s': its dimensions overflow", SHOW(t->name));
        n *= t->ne[d];
    }
    if (t->ne[0] % block)
        return llm_fail(err, err_len, "tensor '%s': rows of %llu elements are no multiple of a %s block (%u)",
                        SHOW(t->name), (unsigned long long)t->ne[0], gguf_type_name(t->type), block);
    if (n / block > (uint64_t)INT64_MAX / block_bytes)
        return llm_fail(err, err_len, "tensor '%s': its size overflows", SHOW(t->name));
    t->bytes = n / block * block_bytes;
    return true;
}

/* Reads one entry of the tensor table; `offset` is from the start of the data section, which is not known yet. */
static bool read_tensor(cursor *c, uint64_t i, gguf_tensor_info *t, uint64_t *offset, char *err,
                        size_t err_len) {
    if (!take_name(c, "tensor", i, &t->name, err, err_len)) return false;
    if (!take_u32(c, &t->n_dims))
        return llm_fail(err, err_len, "tensor '%s': the file ends inside its entry", SHOW(t->name));
    if (t->n_dims < 1 || t->n_dims > GGUF_MAX_DIMS)
        return llm_fail(err, err_len, "tensor '%s': %u dimensions; 1 to %d are supported", SHOW(t->name),
                        t->n_dims, GGUF_MAX_DIMS);
    bool whole = true;
    for (uint32_t d = 0; d < GGUF_MAX_DIMS; d++) {
        t->ne[d] = 1;
        if (d < t->n_dims) whole = whole && take_u64(c, &t->ne[d]);
    }
    if (!whole || !take_u32(c, &t->type) || !take_u64(c, offset))
        return llm_fail(err, err_len, "tensor '%s': the file ends inside its entry", SHOW(t->name));
    return tensor_bytes(t, err, err_len);
}

static int compare_tensor(const void *a, const void *b) {
    return compare_str((*(const gguf_tensor_info *const *)a)->name,
                       (*(const gguf_tensor_info *const *)b)->name);
}

static int compare_data(const void *a, const void *b) {
    const uint8_t *x = (*(const gguf_tensor_info *const *)a)->data;
    const uint8_t *y = (*(const gguf_tensor_info *const *)b)->data;
    return (x > y) - (x < y);
}

/* Turns offsets into pointers once the data section is known, and refuses tensors outside it. */
static bool place_tensor(const gguf_file *f, gguf_tensor_info *t, size_t data_start, uint64_t offset,
                         uint32_t alignment, char *err, size_t err_len) {
    uint64_t room = data_start < f->size ? f->size - data_start : 0;
    if (offset % alignment)
        return llm_fail(err, err_len, "tensor '%s': offset %llu is no multiple of the alignment %u",
                        SHOW(t->name), (unsigned long long)offset, alignment);
    if (offset > room || t->bytes > room - offset)
        return llm_fail(err, err_len,
                        "tensor '%s': %llu bytes at offset %llu reach past the %llu bytes of data",
                        SHOW(t->name), (unsigned long long)t->bytes, (unsigned long long)offset,
                        (unsigned long long)room);
    t->data = f->base + data_start + offset;
    return true;
}

/* Names must be unique and data must not overlap: both are signs of a damaged file. Leaves tensor_by_name sorted. */
static bool check_tensors(gguf_file *f, char *err, size_t err_len) {
    size_t n = (size_t)f->n_tensors;
    const gguf_tensor_info **order = f->tensor_by_name;
    for (size_t i = 0; i < n; i++) order[i] = &f->tensors[i];
    qsort(order, n, sizeof *order, compare_data);
    for (size_t i = 1; i < n; i++)
        if ((const uint8_t *)order[i - 1]->data + order[i - 1]->bytes > (const uint8_t *)order[i]->data)
            return llm_fail(err, err_len, "tensor '%s' overlaps tensor '%s'", SHOW(order[i]->name),
                            SHOW(order[i - 1]->name));
    qsort(order, n, sizeof *order, compare_tensor);
    for (size_t i = 1; i < n; i++)
        if (compare_tensor(&order[i - 1], &order[i]) == 0)
            return llm_fail(err, err_len, "tensor '%s' appears twice", SHOW(order[i]->name));
    return true;
}

static bool read_alignment(const gguf_file *f, uint32_t *alignment, char *err, size_t err_len) {
    *alignment = DEFAULT_ALIGNMENT;
    if (!gguf_has(f, "general.alignment")) return true;
    if (!gguf_get_u32(f, "general.alignment", alignment, err, err_len)) return false;
    if (*alignment < 8 || (*alignment & (*alignment - 1)))
        return llm_fail(err, err_len, "key 'general.alignment': %u is not a power of two of at least 8",
                        *alignment);
    return true;
}

static bool read_tensors(gguf_file *f, cursor *c, char *err, size_t err_len) {
    uint32_t alignment;
    if (!read_alignment(f, &alignment, err, err_len)) return false;
    if (f->n_tensors > left(c) / MIN_TENSOR_BYTES)
        return llm_fail(err, err_len, "tensor_count %llu does not fit into the %zu bytes left",
                        (unsigned long long)f->n_tensors, left(c));
    size_t n = (size_t)f->n_tensors;
    uint64_t *offsets = calloc(n + 1, sizeof *offsets);
    f->tensors = calloc(n + 1, sizeof *f->tensors);
    f->tensor_by_name = calloc(n + 1, sizeof *f->tensor_by_name);
    bool ok = offsets && f->tensors && f->tensor_by_name;
    if (!ok) llm_fail(err, err_len, "out of memory for %zu tensors", n);
    for (size_t i = 0; ok && i < n; i++) ok = read_tensor(c, i, &f->tensors[i], &offsets[i], err, err_len);
    size_t start = c->pos + (alignment - c->pos % alignment) % alignment;
    for (size_t i = 0; ok && i < n; i++)
        ok = place_tensor(f, &f->tensors[i], start, offsets[i], alignment, err, err_len);
    free(offsets);
    return ok && check_tensors(f, err, err_len);
}

/* ---- open and close --------------------------------------------------------------------------------------- */

static bool read_file(gguf_file *f, char *err, size_t err_len) {
    cursor c = {f->base, f->size, 0};
    const uint8_t *magic;
    if (!take(&c, 4, &magic) || memcmp(magic, "GGUF", 4) != 0)
        return llm_fail(err, err_len, "not a GGUF file (it does not begin with 'GGUF')");
    if (!take_u32(&c, &f->version)) return llm_fail(err, err_len, "the file ends before its version");
    if (f->version != 2 && f->version != 3)
        return llm_fail(err, err_len, "GGUF version %u%s; versions 2 and 3 are supported", f->version,
                        (f->version & 0xffff) == 0 && f->version ? " (a big-endian file)" : "");
    if (!take_u64(&c, &f->n_tensors)) return llm_fail(err, err_len, "the file ends before tensor_count");
    if (!take_u64(&c, &f->n_kv)) return llm_fail(err, err_len, "the file ends before metadata_kv_count");
    return read_metadata(f, &c, err, err_len) && read_tensors(f, &c, err, err_len);
}

static gguf_file *open_bytes(const void *data, size_t size, char *err, size_t err_len) {
    gguf_file *f = calloc(1, sizeof *f);
    if (!f) {
        llm_fail(err, err_len, "out of memory");
        return NULL;
    }
    f->base = data;
    f->size = size;
    if (read_file(f, err, err_len)) return f;
    gguf_close(f);
    return NULL;
}

bool gguf_open_memory(const void *data, size_t size, gguf_file **out, char *err, size_t err_len) {
    *out = open_bytes(data, size, err, err_len);
    return *out != NULL;
}

static bool map_file(int fd, const char *path, void **map, size_t *size, char *err, size_t err_len) {
    struct stat st;
    if (fstat(fd, &st) != 0) return llm_fail(err, err_len, "%.150s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode)) return llm_fail(err, err_len, "%.150s: not a regular file", path);
    if (st.st_size == 0) return llm_fail(err, err_len, "%.150s: the file is empty", path);
    if ((uint64_t)st.st_size > SIZE_MAX) return llm_fail(err, err_len, "%.150s: too large to map", path);
    *size = (size_t)st.st_size;
    *map = mmap(NULL, *size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (*map == MAP_FAILED) return llm_fail(err, err_len, "%.150s: mmap: %s", path, strerror(errno));
    return true;
}

bool gguf_open(const char *path, gguf_file **out, char *err, size_t err_len) {
    *out = NULL;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return llm_fail(err, err_len, "%.150s: %s", path, strerror(errno));
    void *map = NULL;
    size_t size = 0;
    bool ok = map_file(fd, path, &map, &size, err, err_len);
    close(fd);
    if (!ok) return false;
    gguf_file *f = open_bytes(map, size, err, err_len);
    if (f)
        f->mapped = true;
    else
        munmap(map, size);
    *out = f;
    return f != NULL;
}

void gguf_close(gguf_file *f) {
    if (!f) return;
    if (f->mapped) munmap((void *)(uintptr_t)f->base, f->size);
    free(f->kv);
    free(f->tensors);
    free(f->kv_by_key);
    free(f->tensor_by_name);
    free(f);
}

/* ---- look-up ---------------------------------------------------------------------------------------------- */

static const kv_entry *find_kv(const gguf_file *f, const char *key) {
    kv_entry wanted = {.key = {key, strlen(key)}};
    const kv_entry *p = &wanted;
    const kv_entry **hit = bsearch(&p, f->kv_by_key, (size_t)f->n_kv, sizeof *f->kv_by_key, compare_kv);
    return hit ? *hit : NULL;
}

static const kv_entry *need_kv(const gguf_file *f, const char *key, char *err, size_t err_len) {
    const kv_entry *e = find_kv(f, key);
    if (!e) llm_fail(err, err_len, "key '%s' is missing", key);
    return e;
}

static bool wrong_type(const kv_entry *e, const char *wanted, char *err, size_t err_len) {
    return llm_fail(err, err_len, "key '%s' is of type %s%s; expected %s", SHOW(e->key),
                    e->type == GGUF_KV_ARRAY ? "array of " : "",
                    k_kv_names[e->type == GGUF_KV_ARRAY ? (uint32_t)e->array.type : e->type], wanted);
}

bool gguf_has(const gguf_file *f, const char *key) { return find_kv(f, key) != NULL; }

bool gguf_get_u32(const gguf_file *f, const char *key, uint32_t *v, char *err, size_t err_len) {
    const kv_entry *e = need_kv(f, key, err, err_len);
    if (!e) return false;
    uint64_t u = 0;
    int64_t s = 0;
    switch (e->type) {
    case GGUF_KV_U8: u = e->value[0]; break;
    case GGUF_KV_U16: u = (uint64_t)e->value[0] | (uint64_t)e->value[1] << 8; break;
    case GGUF_KV_U32: u = load_u32(e->value); break;
    case GGUF_KV_U64: u = load_u64(e->value); break;
    case GGUF_KV_I8: s = (int8_t)e->value[0]; break;
    case GGUF_KV_I16: s = (int16_t)(e->value[0] | e->value[1] << 8); break;
    case GGUF_KV_I32: s = (int32_t)load_u32(e->value); break;
    case GGUF_KV_I64: s = (int64_t)load_u64(e->value); break;
    default: return wrong_type(e, "an integer", err, err_len);
    }
    if (s < 0) return llm_fail(err, err_len, "key '%s': %lld is negative", key, (long long)s);
    if (s > 0) u = (uint64_t)s;
    if (u > UINT32_MAX)
        return llm_fail(err, err_len, "key '%s': %llu does not fit into 32 bits", key, (unsigned long long)u);
    *v = (uint32_t)u;
    return true;
}

bool gguf_get_f32(const gguf_file *f, const char *key, float *v, char *err, size_t err_len) {
    const kv_entry *e = need_kv(f, key, err, err_len);
    if (!e) return false;
    if (e->type == GGUF_KV_F32) {
        memcpy(v, e->value, sizeof *v);
    } else if (e->type == GGUF_KV_F64) {
        double d;
        memcpy(&d, e->value, sizeof d);
        *v = (float)d;
    } else {
        return wrong_type(e, "f32", err, err_len);
    }
    return true;
}

bool gguf_get_bool(const gguf_file *f, const char *key, bool *v, char *err, size_t err_len) {
    const kv_entry *e = need_kv(f, key, err, err_len);
    if (!e) return false;
    if (e->type != GGUF_KV_BOOL) return wrong_type(e, "bool", err, err_len);
    *v = e->value[0] != 0;
    return true;
}

bool gguf_get_str(const gguf_file *f, const char *key, gguf_str *v, char *err, size_t err_len) {
    const kv_entry *e = need_kv(f, key, err, err_len);
    if (!e) return false;
    if (e->type != GGUF_KV_STR) return wrong_type(e, "string", err, err_len);
    *v = (gguf_str){(const char *)e->value + 8, (size_t)load_u64(e->value)};
    return true;
}

bool gguf_get_array(const gguf_file *f, const char *key, gguf_kv_type type, gguf_array *v, char *err,
                    size_t err_len) {
    const kv_entry *e = need_kv(f, key, err, err_len);
    if (!e) return false;
    if (e->type != GGUF_KV_ARRAY || e->array.type != type) {
        char wanted[32];
        snprintf(wanted, sizeof wanted, "array of %s", k_kv_names[type]);
        return wrong_type(e, wanted, err, err_len);
    }
    *v = e->array;
    return true;
}

float gguf_array_f32(const gguf_array *a, uint64_t i) {
    float v;
    memcpy(&v, a->data + i * 4, 4);
    return v;
}

int32_t gguf_array_i32(const gguf_array *a, uint64_t i) { return (int32_t)load_u32(a->data + i * 4); }

gguf_str gguf_array_next_str(const gguf_array *a, size_t *pos) {
    const uint8_t *p = a->data + *pos;
    gguf_str s = {(const char *)p + 8, (size_t)load_u64(p)};
    *pos += 8 + s.len;
    return s;
}

const gguf_tensor_info *gguf_tensor(const gguf_file *f, const char *name) {
    gguf_tensor_info wanted = {.name = {name, strlen(name)}};
    const gguf_tensor_info *p = &wanted;
    const gguf_tensor_info **hit =
        bsearch(&p, f->tensor_by_name, (size_t)f->n_tensors, sizeof *f->tensor_by_name, compare_tensor);
    return hit ? *hit : NULL;
}

uint64_t gguf_tensor_count(const gguf_file *f) { return f->n_tensors; }

const gguf_tensor_info *gguf_tensor_at(const gguf_file *f, uint64_t i) { return &f->tensors[i]; }

bool gguf_require_tensor(const gguf_file *f, const char *name, uint64_t ne0, uint64_t ne1,
                         const gguf_tensor_info **out, char *err, size_t err_len) {
    const gguf_tensor_info *t = gguf_tensor(f, name);
    *out = NULL;
    if (!t) return llm_fail(err, err_len, "tensor '%s' is missing", name);
    if (!gguf_type_readable(t->type))
        return llm_fail(err, err_len, "tensor '%s' has type %s, which is not supported", name,
                        gguf_type_name(t->type));
    uint64_t rows = ne1 ? ne1 : 1;
    if (t->ne[0] != ne0 || t->ne[1] != rows || t->ne[2] != 1 || t->ne[3] != 1)
        return llm_fail(err, err_len, "tensor '%s' has shape [%llu, %llu, %llu, %llu]; expected [%llu, %llu]",
                        name, (unsigned long long)t->ne[0], (unsigned long long)t->ne[1],
                        (unsigned long long)t->ne[2], (unsigned long long)t->ne[3], (unsigned long long)ne0,
                        (unsigned long long)rows);
    *out = t;
    return true;
}
