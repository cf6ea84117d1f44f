/* kv_file.h - a KV geometry override as a text file: which format each layer's keys and values take.
 *
 *     # what `quality --per-layer --out FILE` writes and `--kv FILE` reads
 *     preset int4                          formats of the layers not named; default int8
 *     sink_blocks 1                        first blocks of a sequence that stay exact; 0 = none; default 1
 *     block_tokens 32                      default 32
 *     layer 0 k=int8_channel v=int8        one side may be left out
 *
 * One statement a line, words apart by blanks, '#' begins a comment. Formats are called as
 * kvl_format_from_name takes them. Each statement, and each layer, may stand once.
 *
 * Threads: one.
 */
#ifndef LLM_KV_FILE_H
#define LLM_KV_FILE_H

#include "error.h"

#include "kvlite.h"

typedef struct kv_file {
    const char *preset;                 /* a name of kvlite's table; NULL: the default */
    uint32_t sink_blocks, block_tokens; /* as in kvl_geometry: 0 is the default */
    kvl_layer *layers;                  /* [n_layers], k_format and v_format set where the file does */
} kv_file;

/* Reads a file for a model of n_layers. False, with "FILE:LINE: why" in err, where something in it is wrong.
 * On failure *out is {0}; free with kv_file_free(). */
bool kv_file_read(const char *path, uint32_t n_layers, kv_file *out, char *err, size_t err_len);
void kv_file_free(kv_file *f); /* leaves {0} */

/* Writes what kv_file_read reads, after a comment (one line, or NULL). */
bool kv_file_write(const char *path, const kv_file *f, uint32_t n_layers, const char *comment, char *err,
                   size_t err_len);

#endif /* LLM_KV_FILE_H */
