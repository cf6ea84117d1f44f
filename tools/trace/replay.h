/* Replays an event trace of kvlite (see kvl_event in kvlite.h): does the recorded calls on the null backend with the
   recorded clock, and compares what the scheduler records now, byte for byte, with the file. The file may be hostile. */
#ifndef TRACE_REPLAY_H
#define TRACE_REPLAY_H

#include "../../kvlite.h"

enum replay_status {
    REPLAY_EQUAL = 0, /* the same plans, byte for byte, up to the end record */
    REPLAY_DIFFERS,   /* another plan; text names the event, the field and both values */
    REPLAY_INCOMPLETE, /* the same plans as far as it goes, but the trace was cut short (or its recording failed) */
    REPLAY_BAD,        /* not a trace, a broken one, or one that cannot be replayed */
};

struct replay_options {
    size_t max_bytes;  /* memory that cache, scheduler and requests may take; 0 = 4 GiB */
    kvl_write_fn copy; /* gets what is recorded now; may be null */
    void *copy_user;
};

struct replay_report {
    enum replay_status status;
    uint64_t events, requests, plans; /* replayed; plans: those that gave a step */
    uint64_t event;  /* with DIFFERS and BAD: which, from 1; 0 = the description at the beginning */
    uint64_t offset; /* byte of the file where that was found */
    char text[512];  /* one line, of every status */
};

/* Returns out->status. options may be null. */
enum replay_status replay_file(const char *path, const struct replay_options *options,
                               struct replay_report *out);

/* The same for a trace in memory. */
enum replay_status replay_bytes(const void *data, size_t size, const struct replay_options *options,
                                struct replay_report *out);

#endif /* TRACE_REPLAY_H */
