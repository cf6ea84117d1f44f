/* demo_view.h - the terminal side of demo.c: a screen that is drawn anew some ten times a second, in the
 * terminal's alternate screen and in whatever size the terminal has. However the program ends (return,
 * Ctrl-C, SIGTERM) or stops (Ctrl-Z), the terminal is given back as it was. */
#ifndef DEMO_VIEW_H
#define DEMO_VIEW_H

#include <langinfo.h>
#include <locale.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

#define VIEW_MIB(bytes) ((double)(bytes) / 1048576.0)

enum {
    VIEW_STREAMS = 8,
    VIEW_HEAD_ROWS = 8,
    VIEW_MIN_COLS = 60,
    VIEW_MIN_ROWS = VIEW_HEAD_ROWS + VIEW_STREAMS
};

typedef enum view_kind {
    VIEW_SHARED,
    VIEW_PACKED,
    VIEW_EXACT,
    VIEW_CACHED,
    VIEW_SCRATCH,
    VIEW_KINDS
} view_kind;
typedef enum view_state {
    VIEW_ABSENT,
    VIEW_WAITING,
    VIEW_READING,
    VIEW_WRITING,
    VIEW_PAUSE,
    VIEW_DONE
} view_state;

typedef struct view_stream {
    const char *name, *question, *text; /* text: the answer so far */
    unsigned turn, n_turns;
    view_state state;
    unsigned n_prompt, n_read; /* tokens of the prompt, how many of them are in */
    unsigned n_reused, n_written;
    bool pasted; /* a long text stands before the question */
} view_stream;

typedef struct view_frame { /* all that a screen shows */
    const char *model, *setup;
    double seconds;
    uint64_t budget, bytes[VIEW_KINDS]; /* what is left of the budget is free */
    double write_rate, read_rate;       /* tokens a second */
    double gap_ms, usual_gap_ms, asked_gap_ms;
    unsigned long long n_prompt, n_reused, n_evicted, n_preempted;
    view_stream streams[VIEW_STREAMS];
} view_frame;

typedef struct view {
    bool utf8;
    int cols, rows, col;
    char *buf;
    size_t len, cap;
} view;

/* ---- the terminal ---- */
static struct { /* what a signal handler needs */
    volatile sig_atomic_t on, resumed;
    bool has_mode;
    struct termios mode;
} view_terminal;

static void view_put(const char *s, size_t n) {
    while (n > 0) {
        ssize_t w = write(STDOUT_FILENO, s, n);
        if (w <= 0) return;
        s += w;
        n -= (size_t)w;
    }
}

static void view_enter(void) { /* these two are safe in a signal handler */
    static const char enter[] = "\x1b[?1049h\x1b[?25l\x1b[2J";
    struct termios quiet = view_terminal.mode;
    quiet.c_lflag &= ~(tcflag_t)(ECHO | ICANON);
    if (view_terminal.has_mode) tcsetattr(STDIN_FILENO, TCSANOW, &quiet);
    view_put(enter, sizeof enter - 1);
}

static void view_leave(void) {
    static const char leave[] = "\x1b[?2026l\x1b[0m\x1b[?25h\x1b[?1049l";
    view_put(leave, sizeof leave - 1);
    if (view_terminal.has_mode) tcsetattr(STDIN_FILENO, TCSAFLUSH, &view_terminal.mode);
}

static void view_on_end(int sig) { /* the default action follows: SA_RESETHAND */
    if (view_terminal.on) view_leave();
    raise(sig);
}

static void view_on_continue(int sig);

static void view_handle(int sig, void (*handler)(int), int flags) {
    struct sigaction a;
    memset(&a, 0, sizeof a);
    a.sa_handler = handler;
    a.sa_flags = flags;
    sigemptyset(&a.sa_mask);
    sigaction(sig, &a, NULL);
}

static void view_on_continue(int sig) {
    (void)sig;
    view_handle(SIGTSTP, view_on_end, (int)SA_RESETHAND | SA_RESTART);
    if (view_terminal.on) view_enter();
    view_terminal.resumed = 1;
}

static bool view_size(int *cols, int *rows) {
    struct winsize w;
    if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &w) != 0 || !w.ws_col || !w.ws_row) return false;
    *cols = w.ws_col;
    *rows = w.ws_row;
    return true;
}

/* Is there a terminal that can show it? */
static bool view_possible(void) {
    const char *term = getenv("TERM");
    int cols, rows;
    return isatty(STDOUT_FILENO) && term && *term && strcmp(term, "dumb") != 0 && view_size(&cols, &rows) &&
           cols >= VIEW_MIN_COLS && rows >= VIEW_MIN_ROWS;
}

static void view_close(view *v) {
    if (view_terminal.on) view_leave();
    view_terminal.on = 0;
    free(v->buf);
    v->buf = NULL;
    v->len = v->cap = 0;
}

static void view_at_exit(void) {
    if (view_terminal.on) view_leave();
}

static void view_open(view *v) {
    static const int ends[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT};
    memset(v, 0, sizeof *v);
    setlocale(LC_CTYPE, "");
    v->utf8 = strcmp(nl_langinfo(CODESET), "UTF-8") == 0;
    view_terminal.has_mode = tcgetattr(STDIN_FILENO, &view_terminal.mode) == 0;
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++)
        view_handle(ends[i], view_on_end, (int)SA_RESETHAND | SA_RESTART);
    view_handle(SIGTSTP, view_on_end, (int)SA_RESETHAND | SA_RESTART);
    view_handle(SIGCONT, view_on_continue, SA_RESTART);
    atexit(view_at_exit);
    view_terminal.on = 1;
    view_enter();
}

/* ---- rows of text, cut at the width ---- */
static void view_bytes(view *v, const char *s, size_t n) {
    if (v->len + n > v->cap) {
        size_t cap = 2 * (v->len + n) + 4096;
        char *p = realloc(v->buf, cap);
        if (!p) return;
        v->buf = p;
        v->cap = cap;
    }
    memcpy(v->buf + v->len, s, n);
    v->len += n;
}

/* The next character of s in UTF-8: its bytes and how many columns it takes. */
static size_t view_char(const char *s, int *cols) {
    const unsigned char *u = (const unsigned char *)s;
    size_t n = u[0] < 0x80 ? 1 : u[0] < 0xe0 ? 2 : u[0] < 0xf0 ? 3 : 4;
    uint32_t c = n == 1 ? u[0] : u[0] & (0xffu >> (n + 1));
    for (size_t i = 1; i < n; i++) {
        if ((u[i] & 0xc0) != 0x80) return *cols = 1, i; /* it was not UTF-8 */
        c = c << 6 | (u[i] & 0x3f);
    }
    bool none = (c >= 0x300 && c < 0x370) || (c >= 0x200b && c < 0x2010) || (c >= 0xfe00 && c < 0xfe10);
    bool wide = (c >= 0x1100 && c < 0x1160) || (c >= 0x2e80 && c < 0xa4d0) || (c >= 0xac00 && c < 0xd7a4) ||
                (c >= 0xf900 && c < 0xfb00) || (c >= 0xff00 && c < 0xff61) || c >= 0x1f300;
    *cols = none ? 0 : wide ? 2 : 1;
    return n;
}

/* Writes s in a colour ("32", an SGR number) as far as there are columns. */
static void view_write(view *v, const char *colour, const char *s, size_t n) {
    char sgr[16];
    int sgr_len = snprintf(sgr, sizeof sgr, "\x1b[%sm", colour);
    if (*colour) view_bytes(v, sgr, (size_t)sgr_len);
    for (size_t i = 0, bytes; i < n; i += bytes) {
        int cols;
        bytes = view_char(s + i, &cols);
        if (v->col + cols > v->cols) break;
        view_bytes(v, s + i, bytes);
        v->col += cols;
    }
    if (*colour) view_bytes(v, "\x1b[0m", 4);
}

__attribute__((format(printf, 3, 4))) static void view_text(view *v, const char *colour, const char *fmt,
                                                            ...) {
    char s[512];
    va_list args;
    va_start(args, fmt);
    int n = vsnprintf(s, sizeof s, fmt, args);
    va_end(args);
    if (n > 0) view_write(v, colour, s, strlen(s));
}

static void view_column(view *v, int col) { /* spaces up to there, one at least */
    do view_write(v, "", " ", 1);
    while (v->col < col && v->col < v->cols);
}

static void view_end_row(view *v) {
    view_bytes(v, "\x1b[K\r\n", 5);
    v->col = 0;
}

/* ---- what stands on the screen ---- */
static const char *const view_kind_name[VIEW_KINDS] = {"shared", "packed", "exact", "cached", "scratch"};
static const char *const view_kind_colour[VIEW_KINDS + 1] = {"36", "32", "33", "34", "35", "90"};
static const char *const view_kind_mark[2][VIEW_KINDS + 1] = {{"S", "#", "=", "-", "+", "."},
                                                              {"█", "▓", "▒", "░", "+", "·"}};

static void view_bar(view *v, const view_frame *f) {
    const char *const *mark = view_kind_mark[v->utf8];
    uint64_t sum = 0;
    int width = v->cols - 12 - 22, at = 0;
    view_text(v, "1", " KV memory");
    view_column(v, 12);
    for (int k = 0; k <= VIEW_KINDS; k++) {
        sum += k < VIEW_KINDS ? f->bytes[k] : 0;
        double part = k < VIEW_KINDS && f->budget ? (double)sum / (double)f->budget : 1;
        int to = (int)(width * (part < 1 ? part : 1) + 0.5);
        for (; at < to; at++) view_text(v, view_kind_colour[k], "%s", mark[k]);
    }
    view_text(v, "", " %6.1f of %.1f MiB", VIEW_MIB(sum), VIEW_MIB(f->budget));
    view_end_row(v);
    int digits = v->cols < 100 ? 0 : 1;
    view_column(v, digits ? 12 : 4);
    for (int k = 0; k < VIEW_KINDS; k++) {
        view_text(v, view_kind_colour[k], "%s ", mark[k]);
        view_text(v, "", "%s %.*f  ", view_kind_name[k], digits, VIEW_MIB(f->bytes[k]));
    }
    view_text(v, view_kind_colour[VIEW_KINDS], "%s ", mark[VIEW_KINDS]);
    view_text(v, "", "free %.*f", digits, VIEW_MIB(f->budget > sum ? f->budget - sum : 0));
    view_end_row(v);
}

static void view_head(view *v, const view_frame *f) {
    char clock[16];
    int n = snprintf(clock, sizeof clock, "%d:%02d", (int)f->seconds / 60 % 1000, (int)f->seconds % 60);
    view_text(v, "1", " kvlite");
    view_column(v, 12);
    view_text(v, "", "%s  %s", f->model, f->setup);
    view_column(v, v->cols - n - 1);
    view_text(v, "", "%s", clock);
    view_end_row(v);
    view_end_row(v);
    view_bar(v, f);
    view_text(v, "1", " speed");
    view_column(v, 12);
    view_text(v, "32", "%.0f", f->write_rate);
    view_text(v, "", " tokens/s written, ");
    view_text(v, "36", "%.0f", f->read_rate);
    view_text(v, "", " read");
    view_end_row(v);
    view_text(v, "1", " gap");
    view_column(v, 12);
    view_text(v, "33", "%.0f ms", f->usual_gap_ms);
    view_text(v, "", " from token to token, at the longest ");
    view_text(v, "33", "%.0f ms", f->gap_ms);
    if (f->asked_gap_ms > 0) view_text(v, "", " (asked: %.0f)", f->asked_gap_ms);
    view_end_row(v);
    view_text(v, "1", " reuse");
    view_column(v, 12);
    view_text(v, "36", "%llu", f->n_reused);
    view_text(v, "", " of %llu prompt tokens were in memory already", f->n_prompt);
    if (f->n_evicted) view_text(v, "", ", %llu blocks evicted", f->n_evicted);
    if (f->n_preempted) view_text(v, "", ", %llu preempted", f->n_preempted);
    view_end_row(v);
    view_end_row(v);
}

/* Cuts text into lines of at most `width` columns, at spaces where it can; keeps where the last `keep` begin
   and end. Returns how many were kept. */
static int view_wrap(const char *text, int width, int keep, const char **from, const char **to) {
    int n = 0;
    while (*text) {
        const char *s = text, *space = NULL;
        int col = 0, cols;
        while (*s) {
            size_t bytes = view_char(s, &cols);
            if (col + cols > width) break;
            if (*s == ' ') space = s;
            col += cols;
            s += bytes;
        }
        const char *end = *s && *s != ' ' && space && space > text ? space : s;
        if (n == keep) {
            memmove(from, from + 1, (size_t)(keep - 1) * sizeof *from);
            memmove(to, to + 1, (size_t)(keep - 1) * sizeof *to);
            n--;
        }
        from[n] = text;
        to[n++] = end;
        if (end == text) break; /* narrower than one character */
        for (text = end; *text == ' ';) text++;
    }
    return n;
}

/* The end of text that fits into width columns, from the beginning of a word. */
static const char *view_tail(const char *text, int width, bool *cut) {
    int total = 0, cols;
    for (const char *s = text; *s; total += cols) s += view_char(s, &cols);
    *cut = total > width;
    if (!*cut) return text;
    while (*text && total > width - 2) {
        text += view_char(text, &cols);
        total -= cols;
    }
    const char *word = strchr(text, ' ');
    return word && word[1] ? word + 1 : text;
}

static void view_answer(view *v, const view_stream *s, int n_rows) {
    enum { INDENT = 10, MOST = 8 };
    const char *from[MOST], *to[MOST], *colour = s->state == VIEW_WRITING ? "" : "90";
    int n = 0;
    if (n_rows > MOST) n_rows = MOST;
    if (n_rows == 1) {
        bool cut;
        const char *tail = view_tail(s->text, v->cols - INDENT - 1, &cut);
        view_column(v, INDENT);
        if (cut) view_text(v, "90", v->utf8 ? "… " : "~ ");
        view_write(v, colour, tail, strlen(tail));
        view_end_row(v);
        return;
    }
    n = view_wrap(s->text, v->cols - INDENT - 1, n_rows, from, to);
    for (int i = 0; i < n_rows; i++) {
        if (i < n) {
            view_column(v, INDENT);
            view_write(v, colour, from[i], (size_t)(to[i] - from[i]));
        }
        view_end_row(v);
    }
}

static void view_stream_rows(view *v, const view_stream *s, int n_rows) {
    static const char *const colour[] = {"90", "33", "36", "32", "90", "90"};
    static const char *const word[] = {"not here yet", "waits", "reads", "writes", "pauses", "done"};
    view_text(v, s->state == VIEW_ABSENT ? "90" : "1", " %s", s->name);
    view_column(v, 10);
    if (s->state == VIEW_ABSENT) {
        view_text(v, "90", "%s", word[s->state]);
    } else {
        view_text(v, "", "%u/%u ", s->turn, s->n_turns);
        view_text(v, colour[s->state], "%s", word[s->state]);
        if (s->state == VIEW_READING)
            view_text(v, "36", " %u of %u", s->n_read, s->n_prompt);
        else if (s->n_written)
            view_text(v, "", " %u", s->n_written);
        view_column(v, 31);
        if (s->state != VIEW_WAITING) view_text(v, "", "reused %u of %u", s->n_reused, s->n_prompt);
        view_column(v, 51);
        view_text(v, "3", "%s", s->question);
    }
    view_end_row(v);
    if (n_rows > 1 && s->pasted && s->state == VIEW_READING) {
        view_column(v, 10);
        view_text(v, "90", "a pasted text: it is read in chunks, while the others go on");
        for (int i = 1; i < n_rows; i++) view_end_row(v);
    } else if (n_rows > 1) {
        view_answer(v, s, n_rows - 1);
    }
}

static void view_draw(view *v, const view_frame *f) {
    int cols = v->cols, rows = v->rows;
    if (!view_size(&cols, &rows)) return;
    v->len = 0;
    v->col = 0;
    view_bytes(v, "\x1b[?2026h\x1b[H", 11);
    if (cols != v->cols || rows != v->rows || view_terminal.resumed) view_bytes(v, "\x1b[2J", 4);
    view_terminal.resumed = 0;
    v->cols = cols;
    v->rows = rows;
    if (cols < VIEW_MIN_COLS || rows < VIEW_MIN_ROWS) {
        view_text(v, "", "the window is too small: %d x %d needed", VIEW_MIN_COLS, VIEW_MIN_ROWS);
        view_end_row(v);
    } else {
        int n_rows = (rows - VIEW_HEAD_ROWS) / VIEW_STREAMS;
        view_head(v, f);
        for (int i = 0; i < VIEW_STREAMS; i++) view_stream_rows(v, &f->streams[i], n_rows < 5 ? n_rows : 5);
    }
    if (v->len >= 2 && memcmp(v->buf + v->len - 2, "\r\n", 2) == 0)
        v->len -= 2; /* the last row does not scroll */
    view_bytes(v, "\x1b[J\x1b[?2026l", 11);
    view_put(v->buf, v->len);
}

#endif /* DEMO_VIEW_H */
