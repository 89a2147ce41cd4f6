// Emulated device memory, shared memory, and the check of every access.
//
// Device memory is one reserved range of addresses: whole pages per allocation, then a page that belongs to nobody. The
// kernels are compiled with -fsanitize=thread, whose callbacks (at the end of this file) look up each address: the thread's own
// stack is free, shared memory must be allocated and, for a read, written before; global memory must lie in one live allocation.
#include <link.h>
#include <sys/mman.h>

#include <map>

#include "runtime.h"
#if !defined(EMU_ASAN) && !defined(EMU_TSAN)
#define EMU_CHECKED_RUNTIME 1  // the kernels' own accesses are checked here too: shared memory knows what was written
#endif
#if defined(EMU_ASAN)
#include <sanitizer/asan_interface.h>
#define POISON(p, n) __asan_poison_memory_region(p, n)
#define UNPOISON(p, n) __asan_unpoison_memory_region(p, n)
#else
#define POISON(p, n) ((void)(p), (void)(n))
#define UNPOISON(p, n) ((void)(p), (void)(n))
#endif

namespace emu {
// ---- device memory ----
static constexpr size_t PAGE = 4096, REGION = 64ull << 30, PAGES = REGION / PAGE;

struct Region {
    uint8_t* base;
    uint32_t* page_owner;  // allocation id + 1, or 0
    std::mutex mutex;
    std::map<size_t, size_t> free;  // first page -> pages
    size_t cursor = 0;              // reuse is put off: the search for room starts here
    Allocation* chunk[4096] = {};   // 1024 descriptors each; never moved, so readers need no lock
    std::vector<uint32_t> free_ids;
    uint32_t ids = 0;
    size_t live = 0;

    Region() {
        void* p = mmap(nullptr, REGION, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        void* t = mmap(nullptr, PAGES * 4, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED || t == MAP_FAILED) {
            fprintf(stderr, "emulator: cannot reserve 64 GiB of addresses (ulimit -v?)\n");
            abort();
        }
        base = static_cast<uint8_t*>(p);
        page_owner = static_cast<uint32_t*>(t);
        free[0] = PAGES;
    }
    Allocation& descriptor(uint32_t id) { return chunk[id / 1024][id % 1024]; }
};
static Region& region() {
    static Region* r = new Region;
    return *r;
}
static uintptr_t region_base = 0;  // set by the first allocation

static void* allocate(size_t bytes) {
    Region& r = region();
    std::lock_guard<std::mutex> lock(r.mutex);
    size_t used = (bytes + PAGE - 1) / PAGE, pages = used + 1;  // and a page that nobody owns
    auto it = r.free.lower_bound(r.cursor);
    while (it != r.free.end() && it->second < pages) ++it;
    if (it == r.free.end()) {
        it = r.free.begin();
        while (it != r.free.end() && it->second < pages) ++it;
    }
    if (it == r.free.end()) return nullptr;
    size_t first = it->first, length = it->second;
    r.free.erase(it);
    if (length > pages) r.free[first + pages] = length - pages;
    r.cursor = first + pages;
    uint32_t id;
    if (!r.free_ids.empty()) {
        id = r.free_ids.back();
        r.free_ids.pop_back();
    } else {
        id = r.ids++;
        if (id / 1024 >= 4096) return nullptr;
        if (!r.chunk[id / 1024]) r.chunk[id / 1024] = new Allocation[1024]();
    }
    uint8_t* p = r.base + first * PAGE;
    if (mprotect(p, used * PAGE, PROT_READ | PROT_WRITE) != 0) return nullptr;
    UNPOISON(p, used * PAGE);
    memset(p, 0xff, used * PAGE);  // NaN, as a float or a bf16: unwritten memory shows
    POISON(p + bytes, used * PAGE - bytes);
    r.descriptor(id) = {reinterpret_cast<uintptr_t>(p), bytes, true, id};
    for (size_t i = 0; i < used; i++) r.page_owner[first + i] = id + 1;
    region_base = reinterpret_cast<uintptr_t>(r.base);
    r.live++;
    return p;
}

static bool release(void* p) {
    Region& r = region();
    std::lock_guard<std::mutex> lock(r.mutex);
    const Allocation* found = find_allocation(reinterpret_cast<uintptr_t>(p));
    if (!found || found->base != reinterpret_cast<uintptr_t>(p) || !found->live) return false;
    Allocation& a = r.descriptor(found->id);
    size_t first = (a.base - reinterpret_cast<uintptr_t>(r.base)) / PAGE, used = (a.bytes + PAGE - 1) / PAGE, pages = used + 1;
    a.live = false;
    for (size_t i = 0; i < used; i++) r.page_owner[first + i] = 0;
    UNPOISON(p, used * PAGE);
    madvise(p, used * PAGE, MADV_DONTNEED);
    mprotect(p, used * PAGE, PROT_NONE);
    r.free_ids.push_back(a.id);
    r.live--;
    auto next = r.free.emplace(first, pages).first;
    if (next != r.free.begin()) {
        auto previous = std::prev(next);
        if (previous->first + previous->second == first) {
            previous->second += pages;
            r.free.erase(next);
            next = previous;
        }
    }
    auto after = std::next(next);
    if (after != r.free.end() && next->first + next->second == after->first) {
        next->second += after->second;
        r.free.erase(after);
    }
    return true;
}

const Allocation* find_allocation(uintptr_t address) {
    if (!region_base || address - region_base >= REGION) return nullptr;
    uint32_t id = region().page_owner[(address - region_base) / PAGE];
    return id ? &region().descriptor(id - 1) : nullptr;
}

uintptr_t device_base() { return region_base; }

static std::string range_error(uintptr_t address, size_t bytes, const char* what) {
    char s[256] = "";
    const Allocation* a = find_allocation(address);
    if (!a && region_base && address - region_base < REGION) {
        snprintf(s, sizeof s, "%s of %zu bytes at 0x%lx: no live allocation is there", what, bytes, address);
    } else if (!a) {
        snprintf(s, sizeof s, "%s of %zu bytes at 0x%lx: not device memory", what, bytes, address);
    } else if (address + bytes > a->base + a->bytes) {
        snprintf(s, sizeof s, "%s of %zu bytes out of bounds: it ends %zu bytes past the end of an allocation of %zu bytes", what,
                 bytes, size_t(address + bytes - a->base - a->bytes), a->bytes);
    }
    return s;
}

// ---- shared memory ----
void shared_begin(Block& b, size_t dynamic_bytes) {
    Worker& w = worker();
    b.arena = w.arenas + b.rank * ARENA;
    b.state = w.states + b.rank * ARENA;
#ifdef EMU_TSAN  // fresh pages: ThreadSanitizer forgets the previous block's accesses
    if (mmap(b.arena, ARENA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED) abort();
#else
    if (b.dynamic_used) memset(b.state, UNALLOCATED, b.dynamic_used);
    if (b.static_used) memset(b.state + STATIC_OFFSET, UNALLOCATED, b.static_used);
    POISON(b.arena, ARENA);
#endif
    b.dynamic_bytes = dynamic_bytes;
    b.dynamic_used = b.static_used = 0;
    b.sites_used = 0;
}

// Fills memory of the running block. ThreadSanitizer watches memset, and would take it for an access of the thread that happens to come
// first; it also has no use for the states, which exist for the checks of the plain build.
static void fill([[maybe_unused]] uint8_t* p, [[maybe_unused]] int value, [[maybe_unused]] size_t bytes) {
#ifdef EMU_TSAN
    for (size_t i = 0; i < bytes; i++) static_cast<volatile uint8_t*>(p)[i] = uint8_t(value);
#else
    memset(p, value, bytes);
#endif
}
static void set_state([[maybe_unused]] uint8_t* state, [[maybe_unused]] SharedState value, [[maybe_unused]] size_t bytes) {
#ifdef EMU_CHECKED_RUNTIME
    memset(state, value, bytes);
#endif
}

static void* open_array(Block& b, const void* key, size_t bytes, size_t offset) {
    if (b.sites_used == 64) fail("more than 64 shared arrays");
    if (bytes) {
        UNPOISON(b.arena + offset, bytes);
        fill(b.arena + offset, 0xff, bytes);  // NaN: memory nobody wrote shows
        set_state(b.state + offset, UNINITIALISED, bytes);
    }
    b.sites[b.sites_used++] = {key, bytes, b.arena + offset};
    return b.arena + offset;
}

void* shared_array(const void* key, size_t bytes, size_t align) {
    Block& b = block();
    for (unsigned i = 0; i < b.sites_used; i++) {
        if (b.sites[i].key == key) return b.sites[i].p;
    }
    // 128 bytes between arrays: the red zone keeps every bank where the device has it for 128-byte aligned arrays.
    size_t offset = STATIC_OFFSET + (b.static_used + align - 1) / align * align;
    if (offset + bytes + 128 > ARENA - 4096 || b.static_used + bytes > (48 << 10) + 4096) fail("more than 48 KiB of static shared memory");
    b.static_used = (offset - STATIC_OFFSET + bytes + 127) / 128 * 128 + 128;
    return open_array(b, key, bytes, offset);
}

void* DynamicShared::take_bytes(size_t bytes, size_t align) {
    Block& b = block();
    real = (real + align - 1) / align * align + bytes;
    if (real > b.dynamic_bytes) fail("dynamic shared memory: the kernel takes %zu bytes, the launch gave %zu", real, b.dynamic_bytes);
    size_t zone = align > 128 ? align : 128;
    size_t offset = (used + align - 1) / align * align;
    used = (offset + bytes + 127) / 128 * 128 + zone;
    if (used > b.dynamic_used) b.dynamic_used = used;
    if (used > MAX_SHARED + DYNAMIC_SLACK) fail("dynamic shared memory: too many arrays for the red zones between them");
    const void* key = b.arena + offset;
    for (unsigned i = 0; i < b.sites_used; i++) {
        if (b.sites[i].key == key && b.sites[i].bytes == bytes) return b.sites[i].p;
    }
    // A second layout over memory that already served keeps what is there, as on the device.
    bool fresh = true;
    for (unsigned i = 0; i < b.sites_used; i++) {
        fresh &= b.arena + offset >= b.sites[i].p + b.sites[i].bytes || b.arena + offset + bytes <= b.sites[i].p;
    }
    if (fresh) return open_array(b, key, bytes, offset);
    for (size_t i = 0; i < bytes; i++) {
        if (b.state[offset + i] == UNALLOCATED) set_state(b.state + offset + i, UNINITIALISED, 1);
    }
    UNPOISON(b.arena + offset, bytes);
    if (b.sites_used == 64) fail("more than 64 shared arrays");
    b.sites[b.sites_used++] = {key, bytes, b.arena + offset};
    return b.arena + offset;
}

uint32_t shared_address(const void* p) {
    uintptr_t offset = reinterpret_cast<uintptr_t>(p) - local.arenas;
    if (offset >= MAX_CLUSTER * ARENA) fail("the address %p is not in shared memory", p);
    return uint32_t(offset);
}
uint8_t* shared_pointer(uint32_t address) { return worker().arenas + address; }

// ---- the check ----
static bool in_program_image(uintptr_t address) {  // constants and tables of the kernels
    struct Search {
        uintptr_t address;
        bool found;
    } search{address, false};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
            Search* s = static_cast<Search*>(data);
            for (int i = 0; i < info->dlpi_phnum; i++) {
                const auto& h = info->dlpi_phdr[i];
                if (h.p_type == PT_LOAD && s->address - (info->dlpi_addr + h.p_vaddr) < h.p_memsz) s->found = true;
            }
            return int(s->found);
        },
        &search);
    return search.found;
}

static void check_shared(uintptr_t offset, size_t size, bool write, bool later = false) {
    Worker& w = worker();
    unsigned rank = unsigned(offset / ARENA);
    size_t at = offset % ARENA;
    if (rank >= w.blocks || at + size > ARENA) fail("shared %s of %zu bytes beyond the shared memory", write ? "write" : "read", size);
    uint8_t* state = w.block[rank].state + at;
    if (size == 16 || size == 8 || size == 4) {  // the common case: all written
        constexpr uint64_t written = 0x0101010101010101ull * INITIALISED;
        uint64_t low = written, high = written;
        memcpy(&low, state, size == 4 ? 4 : 8);
        if (size == 16) memcpy(&high, state + 8, 8);
        if (low == written && high == written) return;
    }
    for (size_t i = 0; i < size; i++) {
        if (state[i] == INITIALISED) continue;
        if (state[i] == UNALLOCATED) fail("shared %s of %zu bytes out of bounds: outside every shared array", write ? "write" : "read", size);
        if (!write) fail("read of uninitialised shared memory (%zu bytes)", size);
    }
    if (write && !later) set_state(state, INITIALISED, size);
}

#ifdef EMU_TSAN
extern "C" void __tsan_read_range(const void*, unsigned long);
extern "C" void __tsan_write_range(void*, unsigned long);
#endif
static void report_to_sanitizer([[maybe_unused]] const void* p, [[maybe_unused]] size_t size, [[maybe_unused]] bool write) {
#ifdef EMU_TSAN
    if (write) {
        __tsan_write_range(const_cast<void*>(p), size);
    } else {
        __tsan_read_range(p, size);
    }
#endif
}

void touch(const void* p, size_t size, bool write, [[maybe_unused]] const void* pc) {
    report_to_sanitizer(p, size, write);
#ifdef EMU_CHECKED_RUNTIME
    check_access(p, size, write, pc);
#endif
}

void touch_later(const void* p, size_t size, [[maybe_unused]] const void* pc) {
    report_to_sanitizer(p, size, true);
    uintptr_t offset = reinterpret_cast<uintptr_t>(p) - local.arenas;
    if (offset >= MAX_CLUSTER * ARENA) fail("asynchronous copy to %p, which is not shared memory", p);
#ifdef EMU_CHECKED_RUNTIME
    check_shared(offset, size, true, true);
    if (pc && worker().job->metered) meter_log(self(), offset, size, SHARED_WRITE, pc);
#endif
}

void landed(const void* p, size_t size) {
    uintptr_t offset = reinterpret_cast<uintptr_t>(p) - local.arenas;
    set_state(worker().states + offset, INITIALISED, size);
}

void touch_bulk(const void* p, size_t bytes, bool write) {
    report_to_sanitizer(p, bytes, write);
    uintptr_t address = reinterpret_cast<uintptr_t>(p);
    std::string wrong = range_error(address, bytes, write ? "bulk write" : "bulk read");
    if (!wrong.empty()) fail("%s", wrong.c_str());
    meter_bulk(address, bytes, write);
}

void check_access(const void* p, size_t size, bool write, const void* pc) {
    uintptr_t address = reinterpret_cast<uintptr_t>(p);
    if (!local.self || address - local.stack < STACK) return;
    size_t natural = size >= 16 ? 16 : (size & (size - 1)) == 0 ? size : 1;
    if (uintptr_t offset = address - local.arenas; offset < MAX_CLUSTER * ARENA) {
        if (offset % natural) fail("misaligned shared %s of %zu bytes", write ? "write" : "read", size);
        check_shared(offset, size, write);
        if (pc && worker().job->metered) meter_log(local.self, offset, size, write ? SHARED_WRITE : SHARED_READ, pc);
        return;
    }
    const Allocation* a = find_allocation(address);
    if (a && address + size <= a->base + a->bytes) {
        if (address % natural) fail("misaligned global %s of %zu bytes, at offset %zu of its allocation", write ? "write" : "read", size, size_t(address - a->base));
        if (pc && worker().job->metered) meter_log(local.self, address, size, write ? GLOBAL_WRITE : GLOBAL_READ, pc);
        return;
    }
    if (!a && in_program_image(address)) return;
    fail("%s", range_error(address, size, write ? "global write" : "global read").c_str());
}

void copy(void* dst, const void* src, size_t bytes, const void* pc) {
    check_access(src, bytes, false, pc);
    check_access(dst, bytes, true, static_cast<const char*>(pc) + 1);
    memcpy(dst, src, bytes);
}
}  // namespace emu

// ---- what the Rust side calls ----
extern "C" {
void* emu_alloc(size_t bytes) { return emu::allocate(bytes ? bytes : 1); }
int emu_free(void* p) { return emu::release(p) ? 0 : 1; }
// 0 when the range lies in one live allocation; else 1 and the reason.
int emu_check_range(const void* p, size_t bytes, const char* what, char* error, size_t error_bytes) {
    std::string e = emu::range_error(reinterpret_cast<uintptr_t>(p), bytes, what);
    snprintf(error, error_bytes, "%s", e.c_str());
    return e.empty() ? 0 : 1;
}
size_t emu_live_allocations() {
    std::lock_guard<std::mutex> lock(emu::region().mutex);
    return emu::region().live;
}
}

#if !defined(EMU_ASAN) && !defined(EMU_TSAN)
// ---- what -fsanitize=thread calls ----
template <size_t SIZE, bool WRITE> static inline void checked(const void* p, const void* pc) {
    if (reinterpret_cast<uintptr_t>(p) - emu::local.stack >= emu::STACK) emu::check_access(p, SIZE, WRITE, pc);
}
#define CALLER __builtin_return_address(0)
#define ACCESS(N)                                                                              \
    void __tsan_read##N(void* p) { checked<N, false>(p, CALLER); }                             \
    void __tsan_write##N(void* p) { checked<N, true>(p, CALLER); }                             \
    void __tsan_unaligned_read##N(void* p) { checked<N, false>(p, CALLER); }                   \
    void __tsan_unaligned_write##N(void* p) { checked<N, true>(p, CALLER); }
#define ATOMIC(BITS, T)                                                                                       \
    static inline void both##BITS(const volatile void* p, const void* pc) {                                   \
        emu::check_access(const_cast<void*>(p), sizeof(T), false, pc);                                        \
        emu::check_access(const_cast<void*>(p), sizeof(T), true, static_cast<const char*>(pc) + 1);           \
    }                                                                                                         \
    T __tsan_atomic##BITS##_load(const volatile T* p, int) {                                                  \
        emu::check_access(const_cast<const T*>(p), sizeof(T), false, CALLER);                                 \
        return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                          \
    }                                                                                                         \
    void __tsan_atomic##BITS##_store(volatile T* p, T v, int) {                                               \
        emu::check_access(const_cast<T*>(p), sizeof(T), true, CALLER);                                        \
        __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                             \
    }                                                                                                         \
    T __tsan_atomic##BITS##_exchange(volatile T* p, T v, int) { both##BITS(p, CALLER); return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }   \
    T __tsan_atomic##BITS##_fetch_add(volatile T* p, T v, int) { both##BITS(p, CALLER); return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }   \
    T __tsan_atomic##BITS##_fetch_sub(volatile T* p, T v, int) { both##BITS(p, CALLER); return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); }   \
    T __tsan_atomic##BITS##_fetch_or(volatile T* p, T v, int) { both##BITS(p, CALLER); return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST); }     \
    T __tsan_atomic##BITS##_fetch_and(volatile T* p, T v, int) { both##BITS(p, CALLER); return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST); }   \
    int __tsan_atomic##BITS##_compare_exchange_strong(volatile T* p, T* expected, T v, int, int) {            \
        both##BITS(p, CALLER);                                                                                \
        return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);        \
    }                                                                                                         \
    int __tsan_atomic##BITS##_compare_exchange_weak(volatile T* p, T* expected, T v, int a, int b) {          \
        return __tsan_atomic##BITS##_compare_exchange_strong(p, expected, v, a, b);                           \
    }
extern "C" {
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
ATOMIC(32, uint32_t)
ATOMIC(64, uint64_t)
void __tsan_read_range(void* p, size_t n) { emu::check_access(p, n, false, CALLER); }
void __tsan_write_range(void* p, size_t n) { emu::check_access(p, n, true, CALLER); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
}
#endif
