/* Streams, events, copies, launches and graphs: what is queued, and when it runs. */
#include "state.h"

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <unistd.h>

static uint64_t now_ns() { return (uint64_t)std::chrono::steady_clock::now().time_since_epoch().count(); }

/* ---- running ---- */
static void lose(Context *c, CUresult why) {
    c->lost = why;
    drop_work(c);
}

static void execute(Operation *o) {
    Context *c = o->stream->context;
    if (o->work && !c->lost && !S.lost) {
        S.running = o->name;
        CUresult r = o->work();
        S.running.clear();
        if (r) lose(c, r);
    }
    o->done = true;
    o->finished_ns = now_ns();
    o->work = nullptr;
}

static void run(OperationPtr o) {
    while (!o->done) {
        Stream *s = o->stream;
        if (s->queue.empty()) return; /* dropped: the device is lost */
        OperationPtr first = s->queue.front();
        s->queue.pop_front();
        for (auto &a : first->after) run(a);
        first->after.clear();
        if (!first->done) execute(first.get());
    }
}
static void run_stream(Stream *s) {
    if (!s->queue.empty()) run(s->queue.back());
}
static std::vector<Stream *> streams_of(Context *c) {
    std::vector<Stream *> all(1, &c->legacy);
    for (Stream *s : S.streams) {
        if (s->context == c) all.push_back(s);
    }
    return all;
}
void run_all(Context *c) {
    for (Stream *s : streams_of(c)) run_stream(s);
}
void drop_work(Context *c) {
    for (Stream *s : streams_of(c)) {
        for (auto &o : s->queue) o->done = true, o->work = nullptr;
        s->queue.clear();
    }
}

static uint64_t random_number() {
    S.random = S.random * 6364136223846793005u + S.settings.seed * 2 + 1;
    return S.random >> 33;
}
/* Some work of some streams, in an order that is allowed. */
static void run_some(Context *c) {
    std::vector<Stream *> all = streams_of(c);
    for (uint64_t n = random_number() % 4; n--;) {
        Stream *s = all[random_number() % all.size()];
        if (!s->queue.empty()) run(s->queue.front());
    }
}

void check_unused(uint64_t at, uint64_t n, const char *what) {
    for (Context *c : S.contexts) {
        for (Stream *s : streams_of(c)) {
            for (auto &o : s->queue) {
                for (auto &b : o->uses) {
                    if (b.at < at + n && at < b.at + b.n) {
                        misuse("%s of memory that queued work (%s) uses", what, o->name.c_str());
                        return;
                    }
                }
            }
        }
    }
}

/* ---- queueing ---- */
static Stream *stream_of(CUstream handle, Context *c) {
    uint64_t n = (uint64_t)handle;
    if (n <= 2) return &c->legacy; /* 0 and 1: the default stream; 2: the thread's own, taken for it too */
    return S.streams.count(handle) ? handle : nullptr;
}

static OperationPtr push(Stream *s, const char *name, std::vector<Bytes> uses,
                         std::function<CUresult()> work) {
    OperationPtr o = std::make_shared<Operation>();
    o->stream = s;
    o->name = name;
    o->uses = std::move(uses);
    o->work = std::move(work);
    if (s->legacy) { /* follows all that was queued in blocking streams, which follow it */
        for (Stream *other : streams_of(s->context)) {
            if (other != s && other->blocking && !other->queue.empty())
                o->after.push_back(other->queue.back());
        }
    } else if (s->blocking && !s->context->legacy.queue.empty()) {
        o->after.push_back(s->context->legacy.queue.back());
    }
    s->queue.push_back(o);
    if (S.settings.order == MOCK_EAGER) run(o);
    if (S.settings.order == MOCK_MIXED) run_some(s->context);
    return o;
}

CUresult enqueue(CUstream handle, const char *name, std::vector<Bytes> uses, std::function<CUresult()> work) {
    Context *c = current_context();
    Stream *s = stream_of(handle, c);
    if (!s) {
        misuse("%s in a stream that does not exist", name);
        return CUDA_INVALID_HANDLE;
    }
    if (s->context != c) return CUDA_INVALID_CONTEXT;
    if (s->capture) {
        if (s->capture->broken) return CUDA_STREAM_CAPTURE_INVALIDATED;
        s->capture->nodes.push_back(Node{std::move(work), std::move(uses), name});
        return CUDA_SUCCESS;
    }
    if (s->legacy && capturing_blocking(c)) {
        break_captures();
        return CUDA_STREAM_CAPTURE_IMPLICIT;
    }
    push(s, name, std::move(uses), std::move(work));
    return c->lost;
}

/* ---- captures ---- */
static std::set<std::shared_ptr<Capture>> captures() {
    std::set<std::shared_ptr<Capture>> all;
    for (Stream *s : S.streams) {
        if (s->capture) all.insert(s->capture);
    }
    return all;
}
bool capturing_here() {
    for (auto &c : captures()) {
        if (c->mode == CAPTURE_GLOBAL) return true;
        if (c->mode == CAPTURE_THREAD_LOCAL && c->thread == std::this_thread::get_id()) return true;
    }
    return false;
}
void break_captures() {
    for (auto &c : captures()) c->broken = true;
}
bool capturing_blocking(Context *c) {
    for (Stream *s : S.streams) {
        if (s->context == c && s->blocking && s->capture) return true;
    }
    return false;
}

CU_API cuStreamBeginCapture_v2(CUstream handle, int mode) {
    CALL(CONTEXT);
    Stream *s = stream_of(handle, call.context);
    if (!s) return CUDA_INVALID_HANDLE;
    if (s->legacy) return CUDA_STREAM_CAPTURE_UNSUPPORTED;
    if (s->capture) return CUDA_ILLEGAL_STATE;
    if (mode < 0 || mode > 2) return CUDA_INVALID_VALUE;
    s->capture = std::make_shared<Capture>();
    s->capture->origin = s;
    s->capture->mode = mode;
    s->capture->thread = std::this_thread::get_id();
    return CUDA_SUCCESS;
}
CU_API cuStreamIsCapturing(CUstream handle, int *out) {
    CALL(CONTEXT);
    Stream *s = stream_of(handle, call.context);
    if (!s) return CUDA_INVALID_HANDLE;
    *out = !s->capture ? 0 : s->capture->broken ? 2 : 1;
    return CUDA_SUCCESS;
}
CU_API cuStreamEndCapture(CUstream handle, CUgraph *out) {
    CALL(CONTEXT);
    Stream *s = stream_of(handle, call.context);
    if (!s || !out) return CUDA_INVALID_HANDLE;
    std::shared_ptr<Capture> c = s->capture;
    if (!c) return CUDA_ILLEGAL_STATE;
    if (c->origin != s) return CUDA_STREAM_CAPTURE_UNMATCHED;
    if (c->mode != CAPTURE_RELAXED && c->thread != std::this_thread::get_id()) {
        return CUDA_STREAM_CAPTURE_WRONG_THREAD;
    }
    for (Stream *other : S.streams) {
        if (other->capture == c) other->capture = nullptr;
    }
    *out = nullptr;
    if (!c->joined.empty()) return CUDA_STREAM_CAPTURE_UNJOINED;
    if (c->broken) return CUDA_STREAM_CAPTURE_INVALIDATED;
    *out = new Graph{call.context, std::move(c->nodes)};
    S.graphs.insert(*out);
    return CUDA_SUCCESS;
}

/* ---- streams ---- */
CU_API cuStreamCreate(CUstream *out, unsigned flags) {
    CALL(CONTEXT);
    if (!out || flags > STREAM_NON_BLOCKING) return CUDA_INVALID_VALUE;
    *out = new Stream();
    (*out)->context = call.context;
    (*out)->blocking = !(flags & STREAM_NON_BLOCKING);
    S.streams.insert(*out);
    return CUDA_SUCCESS;
}
CU_API cuStreamDestroy_v2(CUstream s) {
    CALL(CONTEXT | FREES);
    if (!S.streams.count(s)) {
        misuse("cuStreamDestroy of no stream");
        return CUDA_INVALID_HANDLE;
    }
    run_stream(s);
    S.streams.erase(s);
    delete s;
    return call.context->lost ? call.context->lost : call.after;
}
static CUresult wait_stream(Stream *s, Context *c) {
    if (!s) {
        misuse("a wait for a stream that does not exist");
        return CUDA_INVALID_HANDLE;
    }
    if (s->capture) {
        s->capture->broken = true;
        return CUDA_STREAM_CAPTURE_UNSUPPORTED;
    }
    if (s->legacy && capturing_blocking(c)) {
        break_captures();
        return CUDA_STREAM_CAPTURE_IMPLICIT;
    }
    return CUDA_SUCCESS;
}
CU_API cuStreamSynchronize(CUstream handle) {
    CALL(CONTEXT);
    Stream *s = stream_of(handle, call.context);
    CUresult r = wait_stream(s, call.context);
    if (r) return r;
    if (s->legacy) {
        for (Stream *other : streams_of(s->context)) {
            if (other->blocking) run_stream(other);
        }
    }
    run_stream(s);
    return s->context->lost;
}
CU_API cuStreamQuery(CUstream handle) {
    CALL(CONTEXT | UNSAFE);
    Stream *s = stream_of(handle, call.context);
    CUresult r = wait_stream(s, call.context);
    if (r) return r;
    if (s->queue.empty()) return s->context->lost;
    run(s->queue.front());
    return CUDA_NOT_READY;
}
CU_API cuStreamWaitEvent(CUstream handle, CUevent e, unsigned flags) {
    CALL(CONTEXT);
    Stream *s = stream_of(handle, call.context);
    if (!s || !S.events.count(e)) return CUDA_INVALID_HANDLE;
    if (flags > 1) return CUDA_INVALID_VALUE;
    if (auto from = e->capture.lock()) { /* comes in, or joins again */
        if (s->capture && s->capture != from) return CUDA_STREAM_CAPTURE_MERGE;
        if (!s->capture) from->joined.insert(s);
        from->joined.erase(e->captured_in);
        s->capture = from;
        if (s != from->origin) from->joined.insert(s);
        return CUDA_SUCCESS;
    }
    if (s->capture) {
        s->capture->broken = true;
        return CUDA_STREAM_CAPTURE_ISOLATION;
    }
    if (!e->last || e->last->done) return CUDA_SUCCESS;
    OperationPtr o = std::make_shared<Operation>();
    o->stream = s;
    o->name = "wait for an event";
    o->after.push_back(e->last);
    s->queue.push_back(o);
    return CUDA_SUCCESS;
}

/* ---- events ---- */
CU_API cuEventCreate(CUevent *out, unsigned flags) {
    CALL(CONTEXT);
    if (!out || flags > 7) return CUDA_INVALID_VALUE;
    *out = new Event();
    (*out)->context = call.context;
    (*out)->timing = !(flags & EVENT_DISABLE_TIMING);
    S.events.insert(*out);
    return CUDA_SUCCESS;
}
CU_API cuEventDestroy_v2(CUevent e) {
    CALL(CONTEXT | FREES);
    if (!S.events.count(e)) {
        misuse("cuEventDestroy of no event");
        return CUDA_INVALID_HANDLE;
    }
    S.events.erase(e);
    delete e;
    return call.after;
}
CU_API cuEventRecord(CUevent e, CUstream handle) {
    CALL(CONTEXT);
    Stream *s = stream_of(handle, call.context);
    if (!s || !S.events.count(e)) {
        misuse("cuEventRecord of no event, or in no stream");
        return CUDA_INVALID_HANDLE;
    }
    if (s->context != e->context) return CUDA_INVALID_HANDLE;
    e->capture.reset();
    if (s->capture) {
        if (s->capture->broken) return CUDA_STREAM_CAPTURE_INVALIDATED;
        e->capture = s->capture;
        e->captured_in = s;
        return CUDA_SUCCESS;
    }
    if (s->legacy && capturing_blocking(call.context)) {
        break_captures();
        return CUDA_STREAM_CAPTURE_IMPLICIT;
    }
    e->asked = 0;
    e->last = push(s, "event", {}, nullptr);
    return CUDA_SUCCESS;
}
CU_API cuEventSynchronize(CUevent e) {
    CALL(CONTEXT);
    if (!S.events.count(e)) {
        misuse("cuEventSynchronize of no event");
        return CUDA_INVALID_HANDLE;
    }
    if (auto c = e->capture.lock()) {
        c->broken = true;
        return CUDA_CAPTURED_EVENT;
    }
    if (e->last) run(e->last);
    return e->context->lost;
}
CU_API cuEventQuery(CUevent e) {
    CALL(CONTEXT | UNSAFE);
    if (!S.events.count(e)) return CUDA_INVALID_HANDLE;
    if (e->capture.lock()) return CUDA_CAPTURED_EVENT;
    if (!e->last || e->last->done) return e->context->lost;
    if (++e->asked > 2) run(e->last); /* time goes by */
    return CUDA_NOT_READY;
}
CU_API cuEventElapsedTime(float *out, CUevent from, CUevent to) {
    CALL(CONTEXT);
    if (!S.events.count(from) || !S.events.count(to) || !from->timing || !to->timing || !from->last ||
        !to->last) {
        return CUDA_INVALID_HANDLE;
    }
    if (!from->last->done || !to->last->done) return CUDA_NOT_READY;
    *out = (float)((double)to->last->finished_ns * 1e-6 - (double)from->last->finished_ns * 1e-6);
    return CUDA_SUCCESS;
}

/* ---- copies ---- */
static CUresult copy(const char *name, void *to, const void *from, size_t n) {
    (void)name;
    memmove(to, from, n);
    return CUDA_SUCCESS;
}
static bool bad_device(const char *name, uint64_t at, size_t n) {
    if (device_only_range(at, n)) return false;
    misuse("%s: %llu bytes that are not all device memory", name, (unsigned long long)n);
    return true;
}
/* What the stream must be for a copy that uses memory which is not pinned. */
static bool is_capturing(CUstream handle) {
    Stream *s = stream_of(handle, current_context());
    return s && s->capture;
}

CU_API cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t n, CUstream stream) {
    CALL(CONTEXT);
    if (!n) return CUDA_SUCCESS;
    if (!from || bad_device(__func__, to, n)) return CUDA_INVALID_VALUE;
    if (pinned_range((uint64_t)from, n)) { /* read when the copy runs, not now */
        return enqueue(stream, __func__, {{to, n}, {(uint64_t)from, n}},
                       [=] { return copy("HtoD", (void *)to, from, n); });
    }
    if (is_capturing(stream)) return CUDA_STREAM_CAPTURE_UNSUPPORTED;
    auto staged = std::make_shared<std::vector<char>>((const char *)from, (const char *)from + n);
    return enqueue(stream, __func__, {{to, n}}, [=] { return copy("HtoD", (void *)to, staged->data(), n); });
}
CU_API cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t n, CUstream stream) {
    CALL(CONTEXT);
    if (!n) return CUDA_SUCCESS;
    if (!to || bad_device(__func__, from, n)) return CUDA_INVALID_VALUE;
    bool pinned = pinned_range((uint64_t)to, n);
    if (!pinned && is_capturing(stream)) return CUDA_STREAM_CAPTURE_UNSUPPORTED;
    CUresult r = enqueue(stream, __func__, {{from, n}, {(uint64_t)to, n}},
                         [=] { return copy("DtoH", to, (const void *)from, n); });
    if (!r && !pinned) run_stream(stream_of(stream, call.context)); /* returns when it is complete */
    return r ? r : call.context->lost;
}
CU_API cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t n, CUstream stream) {
    CALL(CONTEXT);
    if (!n) return CUDA_SUCCESS;
    if (bad_device(__func__, from, n) || bad_device(__func__, to, n)) return CUDA_INVALID_VALUE;
    return enqueue(stream, __func__, {{from, n}, {to, n}},
                   [=] { return copy("DtoD", (void *)to, (const void *)from, n); });
}
CU_API cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t n, CUstream stream) {
    CALL(CONTEXT);
    if (!n) return CUDA_SUCCESS;
    if (bad_device(__func__, to, n)) return CUDA_INVALID_VALUE;
    return enqueue(stream, __func__, {{to, n}}, [=] {
        memset((void *)to, value, n);
        return CUresult(CUDA_SUCCESS);
    });
}

/* The blocking ones, in the default stream. */
static CUresult blocking(Context *c, CUresult queued) {
    if (queued) return queued;
    run_stream(&c->legacy);
    return c->lost;
}
CU_API cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t n) {
    CALL(CONTEXT);
    if (!n) return CUDA_SUCCESS;
    if (!from || bad_device(__func__, to, n)) return CUDA_INVALID_VALUE;
    return blocking(call.context,
                    enqueue(nullptr, __func__, {{to, n}}, [=] { return copy("HtoD", (void *)to, from, n); }));
}
CU_API cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t n) {
    CALL(CONTEXT);
    if (!n) return CUDA_SUCCESS;
    if (!to || bad_device(__func__, from, n)) return CUDA_INVALID_VALUE;
    return blocking(call.context, enqueue(nullptr, __func__, {{from, n}},
                                          [=] { return copy("DtoH", to, (const void *)from, n); }));
}

/* ---- launches ---- */
bool is_function(CUfunction f);

static void on_fault(int signal_number, siginfo_t *info, void *) {
    char text[200];
    int n = snprintf(text, sizeof text, "mock_cuda: %s touched %p, where no memory is\n", S.running.c_str(),
                     info->si_addr);
    if (write(2, text, (size_t)n) < 0) _exit(1);
    signal(signal_number, SIG_DFL);
}
static void name_faults() {
#if !defined(__SANITIZE_ADDRESS__)
    static bool done;
    struct sigaction a = {};
    if (done) return;
    done = true;
    a.sa_sigaction = on_fault;
    a.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &a, nullptr);
#else
    (void)on_fault;
#endif
}

CU_API cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                      unsigned bz, unsigned shared, CUstream stream, void **params, void **extra) {
    CALL(CONTEXT);
    if (!is_function(f)) {
        misuse("cuLaunchKernel of no function");
        return CUDA_INVALID_HANDLE;
    }
    if (f->module->context != call.context) return CUDA_INVALID_CONTEXT;
    if (!gx || !gy || !gz || gx > 0x7fffffff || gy > 65535 || gz > 65535 || !params || !params[0] || extra ||
        !bx || by != 1 || bz != 1 || (int)shared > f->dynamic_limit) {
        misuse("%s: launched with grid %u,%u,%u, %u,%u,%u threads, %u bytes of shared memory (limit %d)",
               f->name.c_str(), gx, gy, gz, bx, by, bz, shared, f->dynamic_limit);
        return CUDA_INVALID_VALUE;
    }
    if (f->threads && bx != f->threads) {
        misuse("%s: launched with %u threads, made for %u", f->name.c_str(), bx, f->threads);
        return bx > f->threads ? CUDA_INVALID_VALUE : CUDA_SUCCESS;
    }
    name_faults();
    auto args = std::make_shared<std::vector<uint64_t>>((f->args_bytes + 7) / 8);
    memcpy(args->data(), params[0], f->args_bytes);
    std::vector<Bytes> uses;
    for (uint64_t word : *args) { /* every address in it */
        if (device_range(word, 1)) uses.push_back(Bytes{word, 1});
    }
    std::string name = f->name;
    return enqueue(stream, name.c_str(), uses, [=]() -> CUresult {
        const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
        const char *problem = arguments_problem(name.c_str(), args->data());
        if (problem) {
            misuse("%s: %s leads to no device memory", name.c_str(), problem);
            return CUDA_ILLEGAL_ADDRESS;
        }
        S.launches++;
        return kernel_run(name.c_str(), grid, block, shared, args->data());
    });
}

/* ---- graphs ---- */
CU_API cuGraphInstantiateWithFlags(CUgraphExec *out, CUgraph g, unsigned long long flags) {
    CALL(CONTEXT | UNSAFE);
    (void)flags;
    if (!out || !S.graphs.count(g)) return CUDA_INVALID_VALUE;
    *out = new GraphExec{call.context, g->nodes};
    S.execs.insert(*out);
    return CUDA_SUCCESS;
}
CU_API cuGraphLaunch(CUgraphExec g, CUstream stream) {
    CALL(CONTEXT);
    if (!S.execs.count(g)) {
        misuse("cuGraphLaunch of no graph");
        return CUDA_INVALID_HANDLE;
    }
    std::vector<Bytes> uses;
    for (auto &n : g->nodes) uses.insert(uses.end(), n.uses.begin(), n.uses.end());
    std::vector<Node> nodes = g->nodes;
    return enqueue(stream, __func__, uses, [=]() -> CUresult {
        for (auto &n : nodes) {
            S.running = n.name;
            CUresult r = n.work();
            if (r) return r;
        }
        return CUDA_SUCCESS;
    });
}
CU_API cuGraphExecDestroy(CUgraphExec g) {
    CALL(CONTEXT);
    if (!S.execs.erase(g)) return CUDA_INVALID_HANDLE;
    delete g;
    return CUDA_SUCCESS;
}
CU_API cuGraphGetNodes(CUgraph g, void **nodes, size_t *n) {
    CALL(ANY);
    if (!S.graphs.count(g) || nodes || !n) return CUDA_INVALID_VALUE; /* it counts them, no more */
    *n = g->nodes.size();
    return CUDA_SUCCESS;
}
CU_API cuGraphDestroy(CUgraph g) {
    CALL(ANY);
    if (!S.graphs.erase(g)) return CUDA_INVALID_HANDLE;
    delete g;
    return CUDA_SUCCESS;
}

/* ---- the end of a context ---- */
void destroy_streams_of(Context *c) {
    bool lost = c->lost || S.lost;
    for (auto i = S.streams.begin(); i != S.streams.end();) {
        auto next = std::next(i);
        if ((*i)->context == c) {
            if (!lost) misuse("a context was destroyed before a stream of it");
            delete *i;
            S.streams.erase(i);
        }
        i = next;
    }
    for (auto i = S.events.begin(); i != S.events.end();) {
        auto next = std::next(i);
        if ((*i)->context == c) {
            if (!lost) misuse("a context was destroyed before an event of it");
            delete *i;
            S.events.erase(i);
        }
        i = next;
    }
}
std::string live_streams() {
    std::string text;
    auto add = [&](size_t count, const char *what) {
        if (count) text += std::to_string(count) + " " + what + " left; ";
    };
    add(S.streams.size(), "streams");
    add(S.events.size(), "events");
    add(S.graphs.size(), "graphs");
    add(S.execs.size(), "executable graphs");
    return text;
}
