// The scheduler behind cuda_cpu.h: fibers, collectives, asynchronous copies, launches.
#include "cuda_cpu_device.h"
#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <map>
#include <mutex>
#include <thread>
#include <signal.h>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#define CUDA_CPU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUDA_CPU_ASAN 1
#endif
#endif
#ifdef CUDA_CPU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// ---- stacks ----

// cuda_cpu_switch(&from, to): leaves the running stack in `from` and goes on with the stack `to`. Only registers that
// a callee must preserve need saving; the first switch to a new stack "returns" into its entry function.
#if defined(CUDA_CPU_UCONTEXT) || !(defined(__x86_64__) || defined(__aarch64__))
#define CUDA_CPU_UCONTEXT 1
#include <ucontext.h>
#elif defined(__x86_64__)
enum { SAVED_WORDS = 6 };
asm(".text\n.globl cuda_cpu_switch\n.type cuda_cpu_switch, @function\ncuda_cpu_switch:\n"
    "  push %rbp\n  push %rbx\n  push %r12\n  push %r13\n  push %r14\n  push %r15\n"
    "  mov %rsp, (%rdi)\n  mov %rsi, %rsp\n"
    "  pop %r15\n  pop %r14\n  pop %r13\n  pop %r12\n  pop %rbx\n  pop %rbp\n  ret\n"
    ".size cuda_cpu_switch, .-cuda_cpu_switch\n");
#else
enum { SAVED_WORDS = 20 };
asm(".text\n.globl cuda_cpu_switch\n.type cuda_cpu_switch, %function\ncuda_cpu_switch:\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n  stp x25, x26, [sp, #48]\n"
    "  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, "
    "#144]\n"
    "  mov x9, sp\n  str x9, [x0]\n  mov sp, x1\n"
    "  ldp x19, x20, [sp]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n  ldp x25, x26, [sp, #48]\n"
    "  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, "
    "#144]\n"
    "  add sp, sp, #160\n  ret\n"
    ".size cuda_cpu_switch, .-cuda_cpu_switch\n");
#endif
#ifndef CUDA_CPU_UCONTEXT
extern "C" void cuda_cpu_switch(void **from, void *to);
#endif

namespace cuda_cpu {

Settings settings;

namespace {

const size_t PAGE = 4096;
#ifdef CUDA_CPU_ASAN
const size_t STACK_BYTES = 256 << 10;
#else
const size_t STACK_BYTES = 64 << 10;
#endif
const size_t STACK_STRIDE = STACK_BYTES + PAGE;  // an inaccessible page below each stack
const size_t GUARD_BYTES = 1024;                 // around shared memory
const unsigned char GUARD = 0xa5, POISON = 0xff; // poison is NaN as f32, f16, bf16 and e4m3

// Who gets these addresses next may use them.
void unmap_pages(void *p, size_t bytes) {
    if (!p) return;
#ifdef CUDA_CPU_ASAN
    ASAN_UNPOISON_MEMORY_REGION(p, bytes);
#endif
    munmap(p, bytes);
}

struct Launch {
    const Kernel *kernel;
    dim3 grid, threads;
    size_t shared_bytes;
    const void *args;
    unsigned seed;
    std::atomic<unsigned> next_block{0};
    std::atomic<bool> failed{false};
};

// What one OS thread needs to run blocks; kept between launches.
struct Worker : Block {
    Launch *launch = nullptr;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<BulkCopy> bulk; // under way
    unsigned alive = 0, at_barrier = 0;
    Site barrier_site = {};
    uint32_t random = 1;
    Context main = {};
    unsigned char *stacks = nullptr;
    size_t n_stacks = 0;
    std::vector<char> signal_stack = std::vector<char>(64 << 10); // a fiber's own may be what is full
    uint64_t collectives = 0, mmas = 0;

    ~Worker() {
        unmap_pages(stacks, n_stacks * STACK_STRIDE);
        unmap_pages(arena, arena_bytes);
    }
};

Worker &worker() { return *static_cast<Worker *>(block); }

std::mutex lock; // of what follows
Counters total = {0, 0};
std::vector<std::unique_ptr<Worker>> idle_workers;
ErrorHook error_hook = nullptr;
void *error_user = nullptr;
std::map<void *, size_t> allocations;

std::vector<Kernel> &registry() {
    static std::vector<Kernel> list;
    return list;
}

// ---- going from one fiber to another ----

// leaving: never comes back here
void switch_stack(Context &from, Context &to, bool leaving) {
#ifdef CUDA_CPU_ASAN
    __sanitizer_start_switch_fiber(leaving ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
    (void)leaving;
#ifdef CUDA_CPU_UCONTEXT
    swapcontext((ucontext_t *)from.sp, (ucontext_t *)to.sp);
#else
    cuda_cpu_switch(&from.sp, to.sp);
#endif
#ifdef CUDA_CPU_ASAN
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

[[noreturn]] void leave_to_main() {
    Worker &b = worker();
    Fiber *f = fiber;
    fiber = nullptr;
    switch_stack(f->context, b.main, true);
    abort();
}

uint32_t next_random(Worker &b) {
    b.random = b.random * 1664525u + 1013904223u;
    return b.random >> 8;
}

// The order in which a warp's lanes run: from lane `rotation` on, up or down.
unsigned next_lane(const Warp &w) {
    unsigned r = w.rotation, m = w.runnable;
    if (!w.descending) return ((unsigned)__builtin_ctz(m >> r | m << ((32 - r) & 31)) + r) & 31;
    unsigned up = 31 - r;
    return (r - (unsigned)__builtin_clz(m << up | m >> ((32 - up) & 31))) & 31;
}

void shuffle_lanes(Worker &b, Warp &w) {
    if (!b.launch->seed) return;
    uint32_t r = next_random(b);
    w.rotation = r & 31;
    w.descending = r >> 5 & 1;
}

// A fiber that can run, of warp `first` if it has one. Null: there is none.
Fiber *runnable_fiber(Worker &b, unsigned first) {
    unsigned n = (unsigned)b.warps.size();
    for (unsigned i = 0; i < n; i++) {
        unsigned at = first + i < n ? first + i : first + i - n;
        if (b.warps[at].runnable) return &b.warps[at].fibers[next_lane(b.warps[at])];
    }
    return nullptr;
}

void go_to(Fiber *next, bool leaving = false) {
    Fiber *self = fiber;
    if (next == self) return;
    fiber = next;
    switch_stack(self->context, next->context, leaving);
}

[[noreturn]] void deadlock(Worker &b);
bool finish_bulk_copies(Worker &b, const uint64_t *bar);

// The running fiber waits (its `runnable` bit is off) or has ended: others run.
void give_way(Worker &b, bool leaving = false) {
    Warp &own = *fiber->warp;
    unsigned first = own.index;
    if (!own.runnable && b.launch->seed) first = next_random(b) % (unsigned)b.warps.size();
    Fiber *next = runnable_fiber(b, first);
    if (!next && finish_bulk_copies(b, nullptr)) next = runnable_fiber(b, first);
    if (!next) deadlock(b);
    go_to(next, leaving);
}

// ---- errors ----

// A line of text without memory of its own: the stacks that it is written on are given up without being unwound.
struct Message {
    char text[4096];
    size_t length = 0;

    void add(const char *format, ...) __attribute__((format(printf, 2, 3))) {
        va_list list;
        va_start(list, format);
        add_list(format, list);
        va_end(list);
    }
    void add_list(const char *format, va_list list) {
        int n = vsnprintf(text + length, sizeof text - length, format, list);
        length = std::min(length + (size_t)std::max(n, 0), sizeof text - 1);
    }
    void add_place(Site site) {
        const char *slash = strrchr(site.file, '/');
        add("%s:%u", slash ? slash + 1 : site.file, site.line);
    }
    void add_block(const Worker &b) { add("block (%u,%u,%u), ", b.index.x, b.index.y, b.index.z); }
};

void report(Launch &l, const Message &message) {
    if (l.failed.exchange(true)) return;
    Message line;
    line.add("kernel %s, %s", l.kernel->name, message.text);
    ErrorHook hook;
    void *user;
    {
        std::lock_guard<std::mutex> guard(lock);
        hook = error_hook;
        user = error_user;
    }
    if (!hook) {
        fprintf(stderr, "cuda_cpu: %s\n", line.text);
        abort();
    }
    hook(line.text, user);
}

// An error of the running thread; the launch is given up.
[[noreturn]] void fail(Site site, const char *format, ...) __attribute__((format(printf, 2, 3)));
[[noreturn]] void fail(Site site, const char *format, ...) {
    Worker &b = worker();
    Message m;
    m.add_block(b);
    m.add("thread (%u,%u,%u), ", fiber->thread.x, fiber->thread.y, fiber->thread.z);
    m.add_place(site);
    m.add(": ");
    va_list list;
    va_start(list, format);
    m.add_list(format, list);
    va_end(list);
    report(*b.launch, m);
    leave_to_main();
}

const char *const OP_NAMES[] = {"__syncwarp",   "a shuffle", "a vote",   "kvl_mma_f16",
                                "kvl_mma_bf16", "kvl_movm",  "ldmatrix", "ldmatrix.trans"};
uint64_t meeting_of(Op op, uint32_t mask, Site site) {
    // lanes may reach __syncwarp from several places, any other instruction from one
    return (uint64_t)mask << 32 | (uint64_t)(op == SYNCWARP ? 0 : site.line & 0xffffff) << 8 | op;
}

bool wait_alike(const Fiber &f, const Fiber &g) {
    const Warp &w = *f.warp;
    uint32_t both = 1u << f.lane | 1u << g.lane;
    if (f.site.line != g.site.line) return false;
    if ((w.at_collective & both) == both) return w.meeting[f.lane] == w.meeting[g.lane];
    if ((w.at_mbarrier & both) == both) return f.mbarrier == g.mbarrier && f.parity == g.parity;
    return (w.at_barrier & both) == both;
}

void add_wait(Message &m, const Worker &b, const Fiber &f) {
    const Warp &w = *f.warp;
    if (w.at_collective >> f.lane & 1)
        m.add("%s of mask %08x", OP_NAMES[w.meeting[f.lane] & 255], (unsigned)(w.meeting[f.lane] >> 32));
    else if (w.at_barrier >> f.lane & 1)
        m.add("__syncthreads");
    else {
        uint64_t word;
        memcpy(&word, f.mbarrier, 8);
        m.add(
            "kvl_mbar_wait for parity %u of that at shared offset %td (%d bytes and %u arrivals are missing)",
            f.parity, (const unsigned char *)f.mbarrier - b.shared, (int)(uint32_t)word,
            (unsigned)(word >> 32 & 0xfff));
    }
    m.add(" at ");
    m.add_place(f.site);
}

// Nobody can go on: says who waits where.
void deadlock(Worker &b) {
    Message m;
    m.add_block(b);
    m.add("threads wait for each other");
    for (Warp &w : b.warps) {
        uint32_t left = w.alive;
        const Fiber *fibers = w.fibers;
        while (left) {
            unsigned first = (unsigned)__builtin_ctz(left);
            uint32_t same = 0;
            for (unsigned l = first; l < 32; l++)
                if (left >> l & 1 && wait_alike(fibers[first], fibers[l])) same |= 1u << l;
            m.add("; warp %u lanes %08x: ", w.index, same);
            add_wait(m, b, fibers[first]);
            left &= ~same;
        }
        if (~w.alive) m.add("; warp %u lanes %08x have ended", w.index, ~w.alive);
    }
    report(*b.launch, m);
    leave_to_main();
}

// ---- collectives ----

typedef uint16_t Halves __attribute__((vector_size(16))); // a row of an 8 x 8 matrix
typedef float Floats __attribute__((vector_size(32)));

// Interleaving rows i and i + 4 three times transposes.
void transpose8(void *out, const void *in) {
    Halves r[8], s[8];
    memcpy(r, in, sizeof r);
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < 4; i++) {
            s[2 * i] = __builtin_shufflevector(r[i], r[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
            s[2 * i + 1] = __builtin_shufflevector(r[i], r[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
        }
        memcpy(r, s, sizeof r);
    }
    memcpy(out, r, sizeof r);
}

template <Op op> void to_floats(Floats *f, const void *row) {
#if defined(__F16C__)
    if (op == MMA_F16) {
        __m256 v = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)row));
        memcpy(f, &v, sizeof *f);
        return;
    }
#endif
    uint16_t h[8];
    memcpy(h, row, sizeof h);
    for (int i = 0; i < 8; i++) (*f)[i] = op == MMA_F16 ? kvl_h2f(h[i]) : kvl_bf2f(h[i]);
}

// c += a · b, summed in float in the order of k. Registers are 8 x 8 matrices: see Warp and kvl_mma_f16.
template <Op op> void multiply(Warp &w) {
    Floats a[16][2], b[16], c[16];
    Halves rows[8];
    for (int q = 0; q < 4; q++)
        for (int i = 0; i < 8; i++) to_floats<op>(&a[(q & 1) * 8 + i][q >> 1], w.a[q][4 * i]);
    for (int q = 0; q < 2; q++) {
        transpose8(rows, w.b[q]);
        for (int i = 0; i < 8; i++) to_floats<op>(&b[q * 8 + i], &rows[i]);
    }
    memcpy(c, w.c, sizeof c);
    for (int k = 0; k < 16; k++) // c stays in registers
        for (int row = 0; row < 16; row++) c[row] += a[row][k >> 3][k & 7] * b[k];
    memcpy(w.c, c, sizeof c);
}

void perform_shuffle(Warp &w, uint32_t lanes) {
    for (unsigned l = 0; l < 32; l++) {
        if (!(lanes >> l & 1)) continue;
        if (!(lanes >> w.source[l] & 1)) {
            Fiber &reader = w.fibers[l];
            fiber = &reader;
            fail(reader.site, "lane %u shuffles from lane %u, which does not take part (lanes %08x)", l,
                 w.source[l], lanes);
        }
        w.result[l] = w.value[w.source[l]];
    }
}

void perform(Worker &b, Warp &w, Op op, uint32_t lanes) {
    b.collectives++;
    switch (op) {
    case SYNCWARP: break;
    case SHFL: perform_shuffle(w, lanes); break;
    case VOTE: {
        uint32_t bits = 0;
        for (unsigned l = 0; l < 32; l++)
            if (lanes >> l & 1) bits |= (uint32_t)w.value[l] << l;
        for (unsigned l = 0; l < 32; l++) // others may not have read their last result yet
            if (lanes >> l & 1) w.result[l] = bits;
        break;
    }
    case MMA_F16:
        b.mmas++;
        multiply<MMA_F16>(w);
        break;
    case MMA_BF16:
        b.mmas++;
        multiply<MMA_BF16>(w);
        break;
    case MOVMATRIX: transpose8(w.a[1], w.a[0]); break;
    case LDMATRIX:
    case LDMATRIX_TRANS:
        for (int m = 0; m < 4; m++) {
            Halves rows[8];
            for (int i = 0; i < 8; i++) memcpy(&rows[i], w.row[8 * m + i], 16);
            if (op == LDMATRIX_TRANS) transpose8(rows, rows);
            memcpy(w.a[m], rows, sizeof rows);
        }
        break;
    }
}

// Takes up the meeting of a lane that waits.
void gather(Warp &w, uint64_t meeting) {
    w.gathering = meeting;
    w.gathered = 0;
    for (unsigned l = 0; l < 32; l++)
        if (w.at_collective >> l & 1 && w.meeting[l] == meeting) w.gathered |= 1u << l;
}

// The meeting takes place if all that are alive of its mask wait for it.
bool complete(Worker &b, Warp &w) {
    uint32_t lanes = (uint32_t)(w.gathering >> 32) & w.alive;
    if (lanes & ~w.gathered) return false;
    Op op = (Op)(w.gathering & 255);
    if (op >= MMA_F16 && lanes != ~0u) return false; // .aligned: all 32 lanes
    perform(b, w, op, lanes);
    w.at_collective &= ~lanes;
    w.gathered = 0;
    w.runnable |= lanes;
    shuffle_lanes(b, w);
    return true;
}

void end_barrier(Worker &b) {
    if (!b.alive || b.at_barrier < b.alive) return;
    b.at_barrier = 0;
    for (Warp &w : b.warps) {
        w.runnable |= w.at_barrier;
        w.at_barrier = 0;
        shuffle_lanes(b, w);
    }
}

// The kernel has returned. Those that wait may have waited for this thread alone.
[[noreturn]] void end_fiber() {
    Worker &b = worker();
    Warp &w = *fiber->warp;
    uint32_t bit = 1u << fiber->lane;
    w.alive &= ~bit;
    w.runnable &= ~bit;
    b.alive--;
    for (unsigned l = 0; l < 32; l++)
        if (w.at_collective >> l & 1) {
            gather(w, w.meeting[l]);
            complete(b, w);
        }
    end_barrier(b);
    if (!b.alive) leave_to_main();
    give_way(b, true);
    abort();
}

extern "C" void cuda_cpu_fiber() {
    Worker &b = worker();
#ifdef CUDA_CPU_ASAN
    const void *from;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &from, &bytes);
    if (!b.main.stack) { // the first fiber of all is entered from the OS thread's own stack
        b.main.stack = (void *)from;
        b.main.stack_bytes = bytes;
    }
#endif
    b.launch->kernel->body(b.launch->args);
    end_fiber();
}

// ---- illegal addresses ----

// A kernel has touched memory that is not there: an error like others. Any other fault ends as it would have.
void illegal_address(int number, siginfo_t *info, void *) {
    if (fiber)
        fail({"(address)", 0}, "%p is not memory of the kernel, or a vector access is not aligned",
             info->si_addr);
    signal(number, SIG_DFL);
}

// While launches run, whatever handlers the program has for other times.
struct CatchIllegalAddresses {
    CatchIllegalAddresses() {
        std::lock_guard<std::mutex> guard(lock);
        if (running++) return;
        struct sigaction action = {};
        action.sa_sigaction = illegal_address;
        action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
        sigaction(SIGSEGV, &action, &old_segv);
        sigaction(SIGBUS, &action, &old_bus);
    }
    ~CatchIllegalAddresses() {
        std::lock_guard<std::mutex> guard(lock);
        if (--running) return;
        sigaction(SIGSEGV, &old_segv, nullptr);
        sigaction(SIGBUS, &old_bus, nullptr);
    }
    static unsigned running;
    static struct sigaction old_segv, old_bus;
};
unsigned CatchIllegalAddresses::running;
struct sigaction CatchIllegalAddresses::old_segv, CatchIllegalAddresses::old_bus;

// ---- asynchronous copies ----

// An mbarrier: bits 0-31 bytes still expected, signed; 32-43 arrivals still to come, 44-55 arrivals of a phase;
// 56 parity of the running phase; 57-63 a mark that it was initialised.
const uint64_t MBARRIER_MARK = 0x2a;

uint64_t read_mbarrier(const uint64_t *bar, Site site) {
    uint64_t word;
    check_access(bar, 8, "mbarrier", site);
    if (!is_shared(bar)) bad_access(bar, 8, "an mbarrier outside of shared memory", site);
    memcpy(&word, bar, 8);
    if (word >> 57 != MBARRIER_MARK) fail(site, "this mbarrier was not initialised, or overwritten");
    return word;
}

unsigned parity_of(uint64_t word) { return (unsigned)(word >> 56) & 1; }

// Takes arrivals and bytes off; the phase ends when nothing is left, and those who wait for that run again.
void advance_mbarrier(Worker &b, uint64_t *bar, unsigned arrivals, int64_t bytes) {
    uint64_t word;
    memcpy(&word, bar, 8);
    int64_t left = (int32_t)(uint32_t)word - bytes;
    uint64_t count = word >> 44 & 0xfff, pending = (word >> 32 & 0xfff) - arrivals, parity = parity_of(word);
    bool over = !pending && !left;
    if (over) {
        pending = count;
        parity ^= 1;
    }
    word = MBARRIER_MARK << 57 | parity << 56 | count << 44 | pending << 32 | (uint32_t)left;
    memcpy(bar, &word, 8);
    if (!over) return;
    for (Warp &w : b.warps)
        for (unsigned l = 0; l < 32 && w.at_mbarrier; l++)
            if (w.at_mbarrier >> l & 1 && w.fibers[l].mbarrier == bar) {
                w.at_mbarrier &= ~(1u << l);
                w.runnable |= 1u << l;
            }
}

// Bulk copies under way that `bar` counts (null: all) arrive. False: there are none.
bool finish_bulk_copies(Worker &b, const uint64_t *bar) {
    bool any = false;
    for (size_t i = 0; i < b.bulk.size();) {
        BulkCopy c = b.bulk[i];
        if (bar && c.mbarrier != bar) {
            i++;
            continue;
        }
        b.bulk.erase(b.bulk.begin() + (ptrdiff_t)i);
#ifdef CUDA_CPU_ASAN
        ASAN_UNPOISON_MEMORY_REGION(c.dst, c.bytes);
#endif
        memcpy(c.dst, c.src, c.bytes);
        advance_mbarrier(b, c.mbarrier, 0, c.bytes);
        any = true;
    }
    return any;
}

void poison_destination(void *dst, size_t bytes) {
    memset(dst, POISON, bytes);
#ifdef CUDA_CPU_ASAN
    ASAN_POISON_MEMORY_REGION(dst, bytes);
#endif
}

// ---- running blocks ----

size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

unsigned char *map_pages(size_t bytes) {
    void *p =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        perror("cuda_cpu: mmap");
        abort();
    }
    return (unsigned char *)p;
}

void forbid_page(void *p) {
    if (!mprotect(p, PAGE, PROT_NONE)) return;
    perror("cuda_cpu: mprotect");
    abort();
}

// Shared memory lies between two guards, and is as large as the launch says to the byte.
void prepare_shared(Worker &b, size_t bytes) {
    size_t need = 2 * GUARD_BYTES + round_up(bytes, PAGE);
    if (b.arena_bytes < need) {
        unmap_pages(b.arena, b.arena_bytes);
        b.arena = map_pages(need);
        b.arena_bytes = need;
    }
    b.shared = b.arena + GUARD_BYTES;
    b.shared_bytes = bytes;
#ifdef CUDA_CPU_ASAN
    ASAN_UNPOISON_MEMORY_REGION(b.arena, b.arena_bytes);
#endif
    memset(b.arena, GUARD, GUARD_BYTES);
    memset(b.shared + bytes, GUARD, GUARD_BYTES);
#ifdef CUDA_CPU_ASAN
    ASAN_POISON_MEMORY_REGION(b.arena, GUARD_BYTES);
    ASAN_POISON_MEMORY_REGION(b.shared + bytes, (size_t)(b.arena + b.arena_bytes - (b.shared + bytes)));
#endif
}

void check_guards(Worker &b) {
#ifndef CUDA_CPU_ASAN
    const unsigned char *guards[2] = {b.arena, b.shared + b.shared_bytes};
    for (const unsigned char *guard : guards) {
        if (guard[0] == GUARD && !memcmp(guard, guard + 1, GUARD_BYTES - 1)) continue;
        size_t i = 0;
        while (guard[i] == GUARD) i++;
        Message m;
        m.add_block(b);
        m.add("something was written at offset %td of shared memory, which has %zu bytes",
              guard + i - b.shared, b.shared_bytes);
        report(*b.launch, m);
    }
#endif
    (void)b;
}

void prepare_fibers(Worker &b, const Launch &l) {
    size_t n = (size_t)l.threads.x * l.threads.y * l.threads.z;
    if (b.n_stacks < n) {
        unmap_pages(b.stacks, b.n_stacks * STACK_STRIDE);
        b.stacks = map_pages(n * STACK_STRIDE);
        b.n_stacks = n;
        for (size_t i = 0; i < n; i++) forbid_page(b.stacks + i * STACK_STRIDE);
    }
    b.fibers.resize(n);
    b.warps.resize((n + 31) / 32);
    for (unsigned i = 0; i < n; i++) {
        Fiber &f = b.fibers[i];
        f.warp = &b.warps[i / 32];
        f.lane = i % 32;
        f.thread = dim3(i % l.threads.x, i / l.threads.x % l.threads.y, i / (l.threads.x * l.threads.y));
        f.context.stack = b.stacks + i * STACK_STRIDE + PAGE;
        f.context.stack_bytes =
            STACK_BYTES - (i % 8 * 512 + i / 8 % 8 * 64); // or all would share a few cache sets
    }
}

void start_stack(Context &c) {
#ifdef CUDA_CPU_UCONTEXT
    ucontext_t *u = (ucontext_t *)c.stack; // the context itself stands at the stack's end
    getcontext(u);
    u->uc_stack.ss_sp = (char *)c.stack + sizeof *u;
    u->uc_stack.ss_size = c.stack_bytes - sizeof *u;
    u->uc_link = nullptr;
    makecontext(u, cuda_cpu_fiber, 0);
    c.sp = u;
#else
    void **sp = (void **)(((uintptr_t)c.stack + c.stack_bytes) & ~(uintptr_t)15);
    *--sp = nullptr; // where the entry function would return to
    *--sp = (void *)cuda_cpu_fiber;
    sp -= SAVED_WORDS;
    memset(sp, 0, SAVED_WORDS * sizeof *sp);
#if defined(__aarch64__)
    sp[11] = (void *)cuda_cpu_fiber; // x30
#endif
    c.sp = sp;
#endif
    c.fake_stack = nullptr;
}

void start_block(Worker &b, unsigned number) {
    Launch &l = *b.launch;
    size_t n = b.fibers.size();
    b.index = dim3(number % l.grid.x, number / l.grid.x % l.grid.y, number / (l.grid.x * l.grid.y));
    b.random = l.seed * 2654435761u + number;
    b.alive = (unsigned)n;
    b.at_barrier = 0;
    memset(b.shared, POISON, b.shared_bytes);
    for (unsigned i = 0; i < b.warps.size(); i++) {
        Warp &w = b.warps[i];
        w.index = i;
        w.alive = w.runnable = n - i * 32 >= 32 ? ~0u : (1u << (n - i * 32)) - 1;
        w.at_collective = w.at_barrier = w.at_mbarrier = w.gathered = 0;
        w.fibers = &b.fibers[i * 32];
        w.rotation = w.descending = 0;
        shuffle_lanes(b, w);
    }
    for (Fiber &f : b.fibers) {
        f.copies.clear();
        f.first_copy = 0;
        f.groups = 0;
        f.unfenced = false;
        start_stack(f.context);
    }
}

void finish_block(Worker &b) {
    Launch &l = *b.launch;
    if (!l.failed && !b.bulk.empty()) {
        Message m;
        m.add_block(b);
        m.add("the block ended while %zu bulk copies were under way", b.bulk.size());
        report(l, m);
    }
    if (!l.failed) check_guards(b);
#ifdef CUDA_CPU_ASAN
    ASAN_UNPOISON_MEMORY_REGION(b.shared, b.shared_bytes);
    if (l.failed) // stacks were given up without being unwound
        for (Fiber &f : b.fibers) ASAN_UNPOISON_MEMORY_REGION(f.context.stack, f.context.stack_bytes);
#endif
    b.bulk.clear();
}

// Blocks until there are none left, in an order that depends on the seed.
void run_blocks(Worker &b, Launch &l) {
    unsigned n = l.grid.x * l.grid.y * l.grid.z;
    b.launch = &l;
    b.grid = l.grid;
    b.threads = l.threads;
    b.main.stack = nullptr;
    prepare_shared(b, l.shared_bytes);
    prepare_fibers(b, l);
#ifdef CUDA_CPU_UCONTEXT
    ucontext_t own;
    b.main.sp = &own;
#endif
    stack_t signals = {}, old_signals;
    signals.ss_sp = b.signal_stack.data();
    signals.ss_size = b.signal_stack.size();
    sigaltstack(&signals, &old_signals);
    block = &b;
    for (unsigned i; !l.failed && (i = l.next_block++) < n;) {
        start_block(b, l.seed & 1 ? n - 1 - i : i);
        fiber = runnable_fiber(b, l.seed ? next_random(b) % (unsigned)b.warps.size() : 0);
        switch_stack(b.main, fiber->context, false);
        finish_block(b);
    }
    block = nullptr;
    sigaltstack(&old_signals, nullptr);
}

void work(Launch &l) {
    std::unique_ptr<Worker> b;
    {
        std::lock_guard<std::mutex> guard(lock);
        if (!idle_workers.empty()) {
            b = std::move(idle_workers.back());
            idle_workers.pop_back();
        }
    }
    if (!b) b.reset(new Worker);
    run_blocks(*b, l);
    std::lock_guard<std::mutex> guard(lock);
    total.collectives += b->collectives;
    total.mmas += b->mmas;
    b->collectives = b->mmas = 0;
    idle_workers.push_back(std::move(b));
}

// Shared memory that a block may have on the smallest GPU of each architecture's largest.
size_t shared_limit(unsigned arch) { return (arch >= 900 ? 227u : arch >= 800 ? 163u : 64u) << 10; }

} // namespace

// ---- for kernels ----

void meet(Op op, uint32_t mask, Site site) {
    Worker &b = worker();
    Fiber *f = fiber;
    Warp &w = *f->warp;
    uint32_t bit = 1u << f->lane;
    uint64_t meeting = meeting_of(op, mask, site);
    f->site = site;
    if (!(mask & bit)) fail(site, "%s of mask %08x, in which its own lane is not", OP_NAMES[op], mask);
    w.meeting[f->lane] = meeting;
    w.at_collective |= bit;
    if (meeting == w.gathering)
        w.gathered |= bit;
    else
        gather(w, meeting);
    if (complete(b, w)) {
        // other warps may be faster or slower
        if (b.launch->seed && next_random(b) % 16 == 0)
            go_to(runnable_fiber(b, next_random(b) % (unsigned)b.warps.size()));
        return;
    }
    w.runnable &= ~bit;
    if (w.runnable)
        go_to(&w.fibers[next_lane(w)]);
    else
        give_way(b);
}

void sync_threads(Site site) {
    Worker &b = worker();
    Warp &w = *fiber->warp;
    uint32_t bit = 1u << fiber->lane;
    fiber->site = site;
    if (!b.at_barrier++)
        b.barrier_site = site;
    else if (b.barrier_site.line != site.line)
        fail(site, "__syncthreads, while threads of the block wait in that of line %u", b.barrier_site.line);
    w.at_barrier |= bit;
    w.runnable &= ~bit;
    end_barrier(b);
    if (!(w.runnable & bit))
        give_way(b);
    else if (b.launch->seed)
        go_to(runnable_fiber(b, next_random(b) % (unsigned)b.warps.size()));
}

void async_copy16(void *dst, const void *src, bool valid, Site site) {
    check_access(dst, 16, "kvl_cp_async16 to", site);
    if (!is_shared(dst)) bad_access(dst, 16, "kvl_cp_async16 to global memory", site);
    if (valid) check_access(src, 16, "kvl_cp_async16 from", site);
    if (valid && is_shared(src)) bad_access(src, 16, "kvl_cp_async16 from shared memory", site);
    poison_destination(dst, 16);
    fiber->copies.push_back({dst, valid ? src : nullptr, fiber->groups});
}

void async_wait(uint32_t groups_left) {
    Fiber *f = fiber;
    while (f->first_copy < f->copies.size()) {
        const AsyncCopy &c = f->copies[f->first_copy];
        if (c.group + groups_left >= f->groups) return;
#ifdef CUDA_CPU_ASAN
        ASAN_UNPOISON_MEMORY_REGION(c.dst, 16);
#endif
        if (c.src)
            memcpy(c.dst, c.src, 16);
        else
            memset(c.dst, 0, 16);
        f->first_copy++;
    }
    f->copies.clear();
    f->first_copy = 0;
}

void mbarrier_init(uint64_t *bar, uint32_t count, Site site) {
    check_access(bar, 8, "mbarrier", site);
    if (!is_shared(bar)) bad_access(bar, 8, "an mbarrier outside of shared memory", site);
    if (count < 1 || count > 0xfff) fail(site, "an mbarrier of %u arrivals", count);
    uint64_t word = MBARRIER_MARK << 57 | (uint64_t)count << 44 | (uint64_t)count << 32;
    memcpy(bar, &word, 8);
    fiber->unfenced = true;
}

void mbarrier_expect(uint64_t *bar, uint32_t bytes, Site site) {
    uint64_t word = read_mbarrier(bar, site);
    if (bytes >= 1u << 20) fail(site, "an mbarrier cannot count %u bytes", bytes);
    if (!(word >> 32 & 0xfff))
        fail(site, "more arrivals than the mbarrier was made for, or its bytes are not there yet");
    advance_mbarrier(worker(), bar, 1, -(int64_t)bytes);
}

void bulk_copy(void *dst, const void *src, uint32_t bytes, uint64_t *bar, Site site) {
    if (bytes % 16 || !bytes) fail(site, "kvl_bulk_copy of %u bytes", bytes);
    check_access(dst, 16, "kvl_bulk_copy to", site);
    check_access((char *)dst + bytes - 16, 16, "kvl_bulk_copy to", site);
    check_access(src, 16, "kvl_bulk_copy from", site);
    if (!is_shared(dst)) bad_access(dst, bytes, "kvl_bulk_copy to global memory", site);
    if (is_shared(src)) bad_access(src, bytes, "kvl_bulk_copy from shared memory", site);
    read_mbarrier(bar, site);
    if (fiber->unfenced) fail(site, "kvl_bulk_copy without kvl_mbar_fence since kvl_mbar_init");
    poison_destination(dst, bytes);
    worker().bulk.push_back({dst, src, bytes, bar});
}

void mbarrier_wait(uint64_t *bar, uint32_t parity, Site site) {
    Worker &b = worker();
    Fiber *f = fiber;
    if (parity_of(read_mbarrier(bar, site)) != (parity & 1)) return;
    int64_t arriving = 0;
    for (const BulkCopy &c : b.bulk)
        if (c.mbarrier == bar) arriving += c.bytes;
    uint64_t word = read_mbarrier(bar, site);
    if (!(word >> 32 & 0xfff) && arriving > (int32_t)(uint32_t)word)
        fail(site, "%lld bytes are on their way to an mbarrier that expects %d", (long long)arriving,
             (int)(uint32_t)word);
    if (arriving) finish_bulk_copies(b, bar);
    if (parity_of(read_mbarrier(bar, site)) != (parity & 1)) return;
    f->mbarrier = bar;
    f->parity = parity & 1;
    f->site = site;
    f->warp->at_mbarrier |= 1u << f->lane;
    f->warp->runnable &= ~(1u << f->lane);
    give_way(b);
}

void bad_access(const void *p, unsigned bytes, const char *what, Site site) {
    const char *not_aligned = (uintptr_t)p & (std::min(bytes, 16u) - 1) ? ", which is not aligned" : "";
    if (is_shared(p))
        fail(site, "%s: %u bytes at offset %td of shared memory, which has %zu bytes%s", what, bytes,
             (const unsigned char *)p - block->shared, block->shared_bytes, not_aligned);
    fail(site, "%s: %u bytes at %p%s", what, bytes, p, not_aligned);
}

void needs_arch(const char *what, unsigned arch, Site site) { fail(site, "%s needs sm_%u", what, arch / 10); }

// ---- for tests ----

Register::Register(const Kernel &kernel) {
    for (const Kernel &k : registry())
        if (!strcmp(k.name, kernel.name)) {
            fprintf(stderr, "cuda_cpu: two kernels are named %s\n", kernel.name);
            abort();
        }
    registry().push_back(kernel);
}

const std::vector<Kernel> &kernels() { return registry(); }

const Kernel *find(const char *name) {
    for (const Kernel &k : registry())
        if (!strcmp(k.name, name)) return &k;
    return nullptr;
}

void set_error_hook(ErrorHook hook, void *user) {
    std::lock_guard<std::mutex> guard(lock);
    error_hook = hook;
    error_user = user;
}

Counters counters() {
    std::lock_guard<std::mutex> guard(lock);
    return total;
}

void *allocate(size_t bytes) {
    size_t usable = round_up(std::max<size_t>(bytes, 1), 256), pages = round_up(usable, PAGE);
    unsigned char *base = map_pages(pages + 2 * PAGE), *end = base + PAGE + pages, *p = end - usable;
    forbid_page(base);
    forbid_page(end);
    memset(base + PAGE, GUARD, pages);
    memset(p, POISON, bytes);
#ifdef CUDA_CPU_ASAN
    ASAN_POISON_MEMORY_REGION(base + PAGE, (size_t)(p - base - PAGE));
    ASAN_POISON_MEMORY_REGION(p + bytes, usable - bytes);
#endif
    std::lock_guard<std::mutex> guard(lock);
    allocations[p] = bytes;
    return p;
}

void release(void *memory) {
    if (!memory) return;
    unsigned char *p = (unsigned char *)memory, *base = (unsigned char *)((uintptr_t)p / PAGE * PAGE) - PAGE;
    size_t bytes;
    {
        std::lock_guard<std::mutex> guard(lock);
        auto found = allocations.find(p);
        if (found == allocations.end()) {
            fprintf(stderr, "cuda_cpu: release of %p, which is not allocated\n", memory);
            abort();
        }
        bytes = found->second;
        allocations.erase(found);
    }
    size_t usable = round_up(std::max<size_t>(bytes, 1), 256), pages = round_up(usable, PAGE);
#ifdef CUDA_CPU_ASAN
    ASAN_UNPOISON_MEMORY_REGION(base + PAGE, pages);
#endif
    bool intact = true;
    for (unsigned char *q = base + PAGE; q < p; q++) intact &= *q == GUARD;
    for (unsigned char *q = p + bytes; q < p + usable; q++) intact &= *q == GUARD;
    if (!intact) {
        static const Kernel none = {"(any)", 0, 0, 0, nullptr};
        Launch l;
        Message m;
        l.kernel = &none;
        m.add("something was written just outside of an allocation of %zu bytes at %p", bytes, memory);
        report(l, m);
    }
    munmap(base, pages + 2 * PAGE);
}

bool launch(const char *name, dim3 grid, dim3 threads, size_t smem_bytes, const void *args) {
    static const Kernel unknown = {"", 0, 0, 0, nullptr};
    Launch l;
    l.kernel = find(name);
    l.grid = grid;
    l.threads = threads;
    l.shared_bytes = smem_bytes;
    l.args = args;
    l.seed = settings.seed;
    uint64_t n_blocks = (uint64_t)grid.x * grid.y * grid.z, n = (uint64_t)threads.x * threads.y * threads.z;
    Message m;
    if (!l.kernel) {
        l.kernel = &unknown;
        m.add("there is no %s here", name);
    } else if (!n_blocks || n_blocks > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
        m.add("grid (%u,%u,%u)", grid.x, grid.y, grid.z);
    else if (!n || n > l.kernel->threads)
        m.add("%llu threads, it is made for %u", (unsigned long long)n, l.kernel->threads);
    else if (smem_bytes > shared_limit(l.kernel->arch))
        m.add("%zu bytes of shared memory", smem_bytes);
    if (m.length) {
        report(l, m);
        return false;
    }

    CatchIllegalAddresses until_the_end;
    unsigned helpers = (unsigned)std::min<uint64_t>(std::max(settings.os_threads, 1u), n_blocks / 4);
    std::vector<std::thread> others;
    for (unsigned i = 1; i < helpers; i++) others.emplace_back([&l] { work(l); });
    work(l);
    for (std::thread &t : others) t.join();
    return !l.failed;
}

} // namespace cuda_cpu
