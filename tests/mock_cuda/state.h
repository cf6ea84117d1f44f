/* Everything that the mock driver knows. One lock guards it all. */
#ifndef MOCK_CUDA_STATE_H
#define MOCK_CUDA_STATE_H
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "cu.h"
#include "mock_cuda.h"

struct Bytes { /* addresses that an operation uses */
    uint64_t at, n;
};

/* What is queued in a stream: it runs once, after all that it follows. */
struct Operation {
    Stream *stream = nullptr;
    std::vector<std::shared_ptr<Operation>> after; /* in other streams */
    std::function<CUresult()> work;                /* null: only an order */
    std::vector<Bytes> uses;
    std::string name;
    bool done = false;
    uint64_t finished_ns = 0;
};
typedef std::shared_ptr<Operation> OperationPtr;

struct Node { /* of a graph: an operation that can run again and again */
    std::function<CUresult()> work;
    std::vector<Bytes> uses;
    std::string name;
};

struct Capture {
    Stream *origin;
    int mode;
    std::thread::id thread;
    std::vector<Node> nodes;
    std::set<Stream *> joined; /* other streams that have come in by events */
    bool broken = false;
};

struct Stream {
    Context *context;
    bool blocking, legacy;
    std::deque<OperationPtr> queue; /* not done */
    std::shared_ptr<Capture> capture;
};

struct Event {
    Context *context;
    bool timing;
    OperationPtr last; /* null: never recorded */
    std::weak_ptr<Capture> capture;
    Stream *captured_in = nullptr;
    int asked = 0;
};

struct Graph {
    Context *context;
    std::vector<Node> nodes;
};
struct GraphExec {
    Context *context;
    std::vector<Node> nodes;
};

struct Module {
    Context *context;
    std::map<std::string, std::unique_ptr<Function>> functions;
};
struct Function {
    Module *module;
    std::string name;
    size_t args_bytes;
    unsigned threads;
    int dynamic_limit = 48 << 10;
};

struct Context {
    bool primary;
    CUdevice device = 0;
    int lost = 0; /* the result that every call gives since */
    Stream legacy;
};

struct Allocation { /* cuMemAlloc, pinned memory */
    Context *context;
    uint64_t bytes;
    void *map;
    size_t map_bytes;
};
struct Reservation {
    uint64_t bytes;
    bool orphan = false; /* what a lost device leaves behind is not its owner's fault */
};
struct Backing { /* cuMemCreate */
    int fd;
    uint64_t bytes;
    uint32_t maps;
    bool released, orphan = false;
};
struct Mapping {
    uint64_t bytes;
    CUmemHandle backing;
    bool access, orphan = false;
};

struct State {
    std::recursive_mutex lock;
    mock_cuda_settings settings;
    bool initialised = false;

    uint64_t calls = 0, launches = 0;
    uint64_t fail_at = 0, failures = 0;
    int fail_result = 0;
    bool fail_lost = false, lost = false, own = false;
    std::string failed;
    std::vector<std::string> misuse;

    Context *primary = nullptr;
    uint32_t primary_held = 0;
    std::set<Context *> contexts; /* the primary one too */
    std::vector<Context *> dead;  /* destroyed: no later one has the address of an earlier one */
    std::set<Stream *> streams;   /* legacy ones are not in here */
    std::set<Event *> events;
    std::set<Graph *> graphs;
    std::set<GraphExec *> execs;
    std::set<Module *> modules;
    std::map<uint64_t, Allocation> device, pinned;
    std::map<uint64_t, Reservation> reservations;
    std::map<CUmemHandle, Backing> backings;
    std::map<uint64_t, Mapping> mappings;
    CUmemHandle next_backing = 0x1000;
    uint64_t held_bytes = 0;
    std::string running; /* name of the kernel that runs now, for a fault's message */
    uint64_t random = 1;
};
extern State S;

/* What each call does first: counts, fails if it is its turn, and checks the context. */
enum {
    ANY = 0,
    CONTEXT = 1,
    UNSAFE = 2, /* not during a capture */
    EVEN_LOST = 4,
    BEFORE_INIT = 8,
    FREES = 16 /* does its work even where it is made to fail: drivers report earlier errors here */
};
struct Call {
    std::lock_guard<std::recursive_mutex> held;
    Context *context;
    CUresult refused, after = CUDA_SUCCESS; /* what the call gives in the end */
    Call(const char *name, int flags);
};
#define CALL(flags)             \
    Call call(__func__, flags); \
    if (call.refused) return call.refused

Context *current_context();
void misuse(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* memory.cpp */
enum { MOCK_GRANULARITY = 2 << 20 };
bool device_range(uint64_t at, uint64_t n); /* all of it can be used by a kernel: device or pinned memory */
bool device_only_range(uint64_t at, uint64_t n);
bool pinned_range(uint64_t at, uint64_t n);
void free_memory_of(Context *c); /* all that it holds; misuse unless it is lost */
void orphan_memory(Context *c);
void forget_memory();
std::string live_memory();

/* stream.cpp */
CUresult enqueue(CUstream stream, const char *name, std::vector<Bytes> uses, std::function<CUresult()> work);
void run_all(Context *c);
void drop_work(Context *c);
void check_unused(uint64_t at, uint64_t n, const char *what); /* misuse if queued work uses it */
bool capturing_here();                                        /* would an unsafe call break a capture? */
void break_captures();
bool capturing_blocking(Context *c);
void destroy_streams_of(Context *c);
std::string live_streams();

/* kernels.cpp: kernels of the architecture that the settings name. args_bytes 0: there is no such kernel. */
struct KernelInfo {
    size_t args_bytes;
    unsigned threads;
};
KernelInfo kernel_find(const char *name);
CUresult kernel_run(const char *name, const unsigned grid[3], const unsigned block[3], size_t shared,
                    const void *args);
/* arguments.cpp: what the kernel reads its addresses from leads to device memory. null, or what does not. */
const char *arguments_problem(const char *name, const void *args);
#endif
