/* Device memory at real addresses: every allocation stands in pages of its own with its end at an unmapped page, and
   reserved addresses cannot be touched until memory is mapped there and access set. Fresh memory is full of 0xff. */
#include "state.h"

#include <cstring>
#include <sys/mman.h>
#include <unistd.h>

static const uint64_t PAGE = 4096;
static uint64_t round_up(uint64_t n, uint64_t to) { return (n + to - 1) / to * to; }

/* ---- plain allocations ---- */
static bool map_allocation(Allocation *a, uint64_t bytes, uint64_t *at) {
    uint64_t used = round_up(bytes, 256), pages = round_up(used, PAGE);
    a->bytes = bytes;
    a->map_bytes = pages + 2 * PAGE;
    a->map = mmap(nullptr, a->map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (a->map == MAP_FAILED) return false;
    char *start = (char *)a->map + PAGE;
    if (mprotect(start, pages, PROT_READ | PROT_WRITE)) {
        munmap(a->map, a->map_bytes);
        return false;
    }
    memset(start, 0xff, pages);
    *at = (uint64_t)start + pages - used;
    return true;
}

static CUresult allocate(std::map<uint64_t, Allocation> *table, Context *c, size_t bytes, uint64_t *out) {
    Allocation a = {};
    uint64_t at;
    bool device = table == &S.device;
    if (!bytes) return CUDA_INVALID_VALUE;
    if (device && S.held_bytes + bytes > S.settings.total_bytes) return CUDA_OUT_OF_MEMORY;
    a.context = c;
    if (!map_allocation(&a, bytes, &at)) return CUDA_OUT_OF_MEMORY;
    (*table)[at] = a;
    if (device) S.held_bytes += bytes;
    *out = at;
    return CUDA_SUCCESS;
}

static void release(std::map<uint64_t, Allocation> *table, std::map<uint64_t, Allocation>::iterator i) {
    if (table == &S.device) S.held_bytes -= i->second.bytes;
    munmap(i->second.map, i->second.map_bytes);
    table->erase(i);
}

CU_API cuMemAlloc_v2(CUdeviceptr *out, size_t bytes) {
    CALL(CONTEXT | UNSAFE);
    uint64_t at;
    if (!out) return CUDA_INVALID_VALUE;
    CUresult r = allocate(&S.device, call.context, bytes, &at);
    if (!r) *out = at;
    return r;
}
static CUresult free_from(std::map<uint64_t, Allocation> *table, uint64_t at, const char *what) {
    auto i = table->find(at);
    if (i == table->end()) {
        misuse("%s of what is not allocated", what);
        return CUDA_INVALID_VALUE;
    }
    check_unused(at, i->second.bytes, what);
    release(table, i);
    return CUDA_SUCCESS;
}
CU_API cuMemFree_v2(CUdeviceptr at) {
    CALL(CONTEXT | UNSAFE | FREES);
    if (!at) return CUDA_SUCCESS;
    CUresult r = free_from(&S.device, at, "cuMemFree");
    return r ? r : call.after;
}
CU_API cuMemHostAlloc(void **out, size_t bytes, unsigned flags) {
    CALL(CONTEXT | UNSAFE);
    uint64_t at;
    if (!out || flags > 7) return CUDA_INVALID_VALUE;
    CUresult r = allocate(&S.pinned, call.context, bytes, &at);
    if (!r) *out = (void *)at;
    return r;
}
CU_API cuMemFreeHost(void *p) {
    CALL(CONTEXT | UNSAFE | FREES);
    CUresult r = free_from(&S.pinned, (uint64_t)p, "cuMemFreeHost");
    return r ? r : call.after;
}
CU_API cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    CALL(CONTEXT);
    *total = S.settings.total_bytes;
    *free_bytes = S.settings.total_bytes - S.held_bytes;
    return CUDA_SUCCESS;
}

/* ---- virtual memory ---- */
static bool multiple(uint64_t n) { return n && n % MOCK_GRANULARITY == 0; }
static bool is_device_prop(const CUmemAllocationProp *p) {
    return p && p->type == 1 && p->location.type == 1 && p->location.id >= 0 &&
           p->location.id < S.settings.devices && p->requestedHandleTypes == 0;
}

CU_API cuMemGetAllocationGranularity(size_t *out, const CUmemAllocationProp *prop, int option) {
    CALL(ANY);
    if (S.settings.no_vmm) return CUDA_NOT_SUPPORTED;
    if (!out || !is_device_prop(prop) || option < 0 || option > 1) return CUDA_INVALID_VALUE;
    *out = MOCK_GRANULARITY;
    return CUDA_SUCCESS;
}

CU_API cuMemAddressReserve(CUdeviceptr *out, size_t bytes, size_t alignment, CUdeviceptr hint,
                           unsigned long long flags) {
    CALL(UNSAFE);
    (void)hint;
    if (S.settings.no_vmm) return CUDA_NOT_SUPPORTED;
    if (!out || !multiple(bytes) || flags || (alignment & (alignment - 1))) return CUDA_INVALID_VALUE;
    if (alignment < MOCK_GRANULARITY) alignment = MOCK_GRANULARITY;
    uint64_t all = bytes + alignment;
    void *map = mmap(nullptr, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) return CUDA_OUT_OF_MEMORY;
    uint64_t at = round_up((uint64_t)map, alignment), before = at - (uint64_t)map;
    if (before) munmap(map, before);
    if (alignment - before) munmap((void *)(at + bytes), alignment - before);
    S.reservations[at] = Reservation{bytes};
    *out = at;
    return CUDA_SUCCESS;
}

CU_API cuMemAddressFree(CUdeviceptr at, size_t bytes) {
    CALL(FREES);
    auto i = S.reservations.find(at);
    if (i == S.reservations.end() || i->second.bytes != bytes) {
        misuse("cuMemAddressFree of what is not reserved");
        return CUDA_INVALID_VALUE;
    }
    auto m = S.mappings.lower_bound(at);
    if (m != S.mappings.end() && m->first < at + bytes) {
        misuse("cuMemAddressFree while memory is mapped there");
        return CUDA_INVALID_VALUE;
    }
    munmap((void *)at, bytes);
    S.reservations.erase(i);
    return call.after;
}

CU_API cuMemCreate(CUmemHandle *out, size_t bytes, const CUmemAllocationProp *prop,
                   unsigned long long flags) {
    CALL(UNSAFE);
    if (S.settings.no_vmm) return CUDA_NOT_SUPPORTED;
    if (!out || !multiple(bytes) || !is_device_prop(prop) || flags) return CUDA_INVALID_VALUE;
    if (S.held_bytes + bytes > S.settings.total_bytes) return CUDA_OUT_OF_MEMORY;
    int fd = memfd_create("mock_cuda", 0);
    if (fd < 0 || ftruncate(fd, (off_t)bytes)) {
        if (fd >= 0) close(fd);
        return CUDA_OUT_OF_MEMORY;
    }
    void *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (p != MAP_FAILED) {
        memset(p, 0xff, bytes);
        munmap(p, bytes);
    }
    S.held_bytes += bytes;
    S.backings[S.next_backing] = Backing{fd, bytes, 0, false};
    *out = S.next_backing++;
    return CUDA_SUCCESS;
}

/* Its memory goes when it is released and mapped nowhere. */
static void drop_backing(std::map<CUmemHandle, Backing>::iterator i) {
    if (!i->second.released || i->second.maps) return;
    close(i->second.fd);
    if (!i->second.orphan) S.held_bytes -= i->second.bytes;
    S.backings.erase(i);
}

CU_API cuMemRelease(CUmemHandle handle) {
    CALL(FREES);
    auto i = S.backings.find(handle);
    if (i == S.backings.end() || i->second.released) {
        misuse("cuMemRelease of no handle");
        return CUDA_INVALID_VALUE;
    }
    i->second.released = true;
    drop_backing(i);
    return call.after;
}

static bool reserved(uint64_t at, uint64_t bytes) {
    auto r = S.reservations.upper_bound(at);
    if (r == S.reservations.begin()) return false;
    --r;
    return at + bytes <= r->first + r->second.bytes;
}

CU_API cuMemMap(CUdeviceptr at, size_t bytes, size_t offset, CUmemHandle handle, unsigned long long flags) {
    CALL(UNSAFE);
    auto b = S.backings.find(handle);
    if (b == S.backings.end() || b->second.released) {
        misuse("cuMemMap of no handle");
        return CUDA_INVALID_VALUE;
    }
    if (flags || offset || !multiple(bytes) || bytes > b->second.bytes || at % MOCK_GRANULARITY ||
        !reserved(at, bytes)) {
        return CUDA_INVALID_VALUE;
    }
    auto m = S.mappings.upper_bound(at);
    bool before = m != S.mappings.begin() && std::prev(m)->first + std::prev(m)->second.bytes > at;
    if (before || (m != S.mappings.end() && m->first < at + bytes)) {
        misuse("cuMemMap where memory is mapped already");
        return CUDA_INVALID_VALUE;
    }
    if (mmap((void *)at, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, b->second.fd, 0) == MAP_FAILED) {
        return CUDA_OUT_OF_MEMORY;
    }
    b->second.maps++;
    S.mappings[at] = Mapping{bytes, handle, false};
    return CUDA_SUCCESS;
}

static void unmap(std::map<uint64_t, Mapping>::iterator m) {
    auto b = S.backings.find(m->second.backing);
    mmap((void *)m->first, m->second.bytes, PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    S.mappings.erase(m);
    b->second.maps--;
    drop_backing(b);
}

/* Whole mappings that together are exactly these addresses? */
static bool whole_mappings(uint64_t at, uint64_t bytes) {
    uint64_t next = at;
    for (auto m = S.mappings.find(at); m != S.mappings.end() && m->first == next && next < at + bytes; ++m) {
        next += m->second.bytes;
    }
    return bytes && next == at + bytes;
}

CU_API cuMemUnmap(CUdeviceptr at, size_t bytes) {
    CALL(FREES);
    if (!whole_mappings(at, bytes)) {
        misuse("cuMemUnmap of what is not mapped, or of a part");
        return CUDA_INVALID_VALUE;
    }
    check_unused(at, bytes, "cuMemUnmap");
    for (uint64_t next = at; next < at + bytes;) {
        auto m = S.mappings.find(next);
        next += m->second.bytes;
        unmap(m);
    }
    return call.after;
}

CU_API cuMemSetAccess(CUdeviceptr at, size_t bytes, const CUmemAccessDesc *access, size_t n) {
    CALL(UNSAFE);
    if (!access || n != 1 || access->location.type != 1 || access->location.id < 0 ||
        access->location.id >= S.settings.devices || access->flags != 3 || !whole_mappings(at, bytes)) {
        return CUDA_INVALID_VALUE;
    }
    for (uint64_t next = at; next < at + bytes;) {
        Mapping &m = S.mappings[next];
        mprotect((void *)next, m.bytes, PROT_READ | PROT_WRITE);
        m.access = true;
        next += m.bytes;
    }
    return CUDA_SUCCESS;
}

/* ---- questions ---- */
static bool inside(const std::map<uint64_t, Allocation> &table, uint64_t at, uint64_t n) {
    auto i = table.upper_bound(at);
    if (i == table.begin()) return false;
    --i;
    return at + n <= i->first + i->second.bytes && at + n >= at;
}
bool pinned_range(uint64_t at, uint64_t n) { return inside(S.pinned, at, n); }
bool device_only_range(uint64_t at, uint64_t n) {
    if (inside(S.device, at, n)) return true;
    auto m = S.mappings.upper_bound(at);
    if (m == S.mappings.begin() || at + n < at) return false;
    --m;
    uint64_t next = m->first;
    for (; m != S.mappings.end() && m->first == next && m->second.access; ++m) {
        next += m->second.bytes;
        if (at + n <= next) return at < next;
    }
    return false;
}
bool device_range(uint64_t at, uint64_t n) { return device_only_range(at, n) || pinned_range(at, n); }

std::string live_memory() {
    std::string text;
    auto add = [&](size_t count, const char *what) {
        if (count) text += std::to_string(count) + " " + what + " left; ";
    };
    size_t reservations = 0, backings = 0, mappings = 0;
    for (auto &x : S.reservations) reservations += !x.second.orphan;
    for (auto &x : S.backings) backings += !x.second.orphan;
    for (auto &x : S.mappings) mappings += !x.second.orphan;
    add(S.device.size(), "device allocations");
    add(S.pinned.size(), "pinned buffers");
    add(reservations, "reserved address ranges");
    add(mappings, "mappings");
    add(backings, "memory handles");
    return text;
}

/* ---- the end of a context ---- */
void free_memory_of(Context *c) {
    bool lost = c->lost || S.lost;
    std::map<uint64_t, Allocation> *tables[] = {&S.device, &S.pinned};
    for (auto *table : tables) {
        for (auto i = table->begin(); i != table->end();) {
            auto next = std::next(i);
            if (i->second.context == c) {
                if (!lost) {
                    misuse("a context was destroyed before %s of %llu bytes in it",
                           table == &S.device ? "device memory" : "a pinned buffer",
                           (unsigned long long)i->second.bytes);
                }
                release(table, i);
            }
            i = next;
        }
    }
}
/* Reserved addresses and physical memory are the process's; those of a lost device cannot be given back. */
void orphan_memory(Context *c) {
    if (!S.lost && !c->lost) return;
    for (auto &x : S.reservations) x.second.orphan = true;
    for (auto &x : S.mappings) x.second.orphan = true;
    for (auto &x : S.backings) {
        if (!x.second.orphan) S.held_bytes -= x.second.bytes, x.second.orphan = true;
    }
}
void forget_memory() {
    while (!S.mappings.empty()) unmap(S.mappings.begin());
    for (auto &b : S.backings) close(b.second.fd);
    S.backings.clear();
    for (auto &r : S.reservations) munmap((void *)r.first, r.second.bytes);
    S.reservations.clear();
    S.held_bytes = 0;
}
