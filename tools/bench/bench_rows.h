/* bench_rows.h - figures as JSON, an object a line, so that what was measured before an end that was not planned is there; without
 * cJSON, which machines with a GPU often have not. And lists on a command line. */
#ifndef BENCH_ROWS_H
#define BENCH_ROWS_H

#include "bench.h"

#include <math.h>

typedef struct bench_out {
    FILE *table; /* for people */
    FILE *rows;  /* JSON, or null */
} bench_out;

/* Is the word in a list with commas or spaces between? A null list has all. */
static inline bool in_list(const char *list, const char *word) {
    size_t n = strlen(word);
    for (const char *at = list; at && *at; at += strcspn(at, ", "), at += strspn(at, ", "))
        if (strcspn(at, ", ") == n && strncmp(at, word, n) == 0) return true;
    return !list;
}

static inline void row_begin(bench_out *b, const char *section) {
    if (b->rows) fprintf(b->rows, "{\"section\": \"%s\"", section);
}
static inline void row_text(bench_out *b, const char *name, const char *text) {
    if (!b->rows) return;
    fprintf(b->rows, ", \"%s\": \"", name);
    for (; *text; text++)
        fputc((unsigned char)*text < ' ' || *text == '"' || *text == '\\' ? ' ' : *text, b->rows);
    fputc('"', b->rows);
}
static inline void row_number(bench_out *b, const char *name, double x) {
    if (b->rows) fprintf(b->rows, isfinite(x) ? ", \"%s\": %.10g" : ", \"%s\": null", name, x);
}
static inline void row_bool(bench_out *b, const char *name, bool x) {
    if (b->rows) fprintf(b->rows, ", \"%s\": %s", name, x ? "true" : "false");
}
static inline void row_end(bench_out *b) {
    if (b->rows) fputs("}\n", b->rows), fflush(b->rows);
}

static inline void leave_out(bench_out *b, const char *what, const char *why) {
    fprintf(b->table, "left out: %s: %s\n", what, why);
    row_begin(b, "left_out");
    row_text(b, "case", what);
    row_text(b, "why", why);
    row_end(b);
}

/* False: the file could not be made. "-": stdout, the table goes to stderr then. */
static inline bool rows_open(bench_out *b, const char *json) {
    b->table = bench_table(json);
    b->rows = !json ? NULL : strcmp(json, "-") == 0 ? stdout : fopen(json, "w");
    return !json || b->rows;
}
static inline bool rows_close(bench_out *b) {
    bool ok = !b->rows || (fflush(b->rows) == 0 && !ferror(b->rows));
    if (b->rows && b->rows != stdout) ok = fclose(b->rows) == 0 && ok;
    b->rows = NULL;
    return ok;
}

#endif /* BENCH_ROWS_H */
