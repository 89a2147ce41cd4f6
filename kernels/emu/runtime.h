// The emulator's own structures: a launch, the blocks that run together, their threads as fibers.
//
// A launch is a list of clusters (of 1 or 2 blocks). A worker, one host thread, runs one cluster at a time: every CUDA
// thread is a fiber, and a fiber runs until it must wait. Kernels never include this file; they see cuda_emu.h.
#pragma once
#include "cuda_emu.h"

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#define EMU_TLS __thread __attribute__((tls_model("initial-exec")))

namespace emu {
constexpr unsigned MAX_CLUSTER = 2;
constexpr unsigned MAX_WARPS = 32;              // per block
constexpr size_t ARENA = 512 << 10;             // shared memory of one block, with room for red zones
constexpr size_t DYNAMIC_SLACK = 28 << 10;      // red zones between the arrays of one SMEM_DYN
constexpr size_t STATIC_OFFSET = 256 << 10;     // static arrays lie above every possible dynamic one
constexpr uint32_t MAX_SHARED = 227 << 10;
#if defined(EMU_ASAN) || defined(EMU_TSAN)
constexpr size_t STACK = 512 << 10;
#else
constexpr size_t STACK = 128 << 10;
#endif

enum Order { FORWARD = 0, REVERSE = 1, RANDOM_ORDER = 2 };
enum Copies { EAGER = 0, LAZY = 1, RANDOM_COPIES = 2 };

struct Thread;
struct Block;
struct Worker;

// ---- traffic (meter.cpp) ----
struct Traffic {
    uint64_t requested_read, requested_written;  // bytes, as the threads asked for them
    uint64_t read_sectors, write_sectors;        // 32-byte sectors summed over the accesses of warps
    uint64_t ideal_sectors;                      // what the same accesses would take if each were contiguous and aligned
    uint64_t read_bytes, written_bytes;          // after a 32 KiB cache per block: what the memory system moves
    uint64_t read_footprint, written_footprint;  // bytes of distinct sectors in the whole launch
    uint64_t shared_wavefronts, shared_ideal;    // shared-memory passes, and without bank conflicts
};
enum AccessKind : uint8_t { GLOBAL_READ, GLOBAL_WRITE, SHARED_READ, SHARED_WRITE };
struct Access {
    uintptr_t address;
    uint32_t pc;
    uint16_t size;
    AccessKind kind;
};
struct SectorCache {  // 4-way, 256 sets of 32-byte sectors
    uint64_t tag[256][4];
    uint8_t next[256];
    bool touch(uint64_t sector);  // true: it was there
    void clear();
};
struct Meter {
    Traffic sum;
    SectorCache reads, writes;
};
struct Footprint;  // bitmaps of the launch

// ---- one launch (launch.cpp) ----
struct Job {
    const Kernel* kernel;
    void* const* args;
    uint3 grid, block;
    uint32_t shared_bytes, cluster;
    int order, copies;
    uint64_t seed;
    uint64_t clusters;
    std::atomic<uint64_t> next{0};
    std::atomic<bool> failed{false};
    std::mutex mutex;
    std::string error;
    bool metered;
    Traffic traffic{};
    Footprint* footprint = nullptr;
    char begin = 0, end = 0;  // addresses for ThreadSanitizer's happens-before edges
    void report(const std::string& message);
};

// ---- fibers (fiber.cpp) ----
struct Fiber {
    uint8_t* stack;  // lowest address; the first 64 bytes are a canary
    size_t size;
    void* sp;
    void *asan_fake, *tsan;
    unsigned index;
};
Fiber* fiber_new(unsigned index, void (*entry)());
void fiber_reset(Fiber*, void (*entry)());  // forget whatever ran on it
bool fiber_overflowed(const Fiber*);
void fiber_switch(Fiber* from, Fiber* to);
void fiber_adopt_thread(Fiber* main);  // the host thread's own stack becomes `main`
void fiber_entered();                  // first statement on a fresh fiber

// ---- threads, warps, blocks (scheduler.cpp) ----
struct CpAsync {
    void* dst;
    const void* src;
    int bytes, src_bytes;
};
struct AsyncOp {
    virtual void run() = 0;
    virtual ~AsyncOp() = default;
};
struct Thread {
    uint3 index;
    unsigned linear, lane, warp;  // warp: inside the cluster
    Block* block;
    Fiber* fiber;
    bool started, done;
    std::vector<CpAsync> copies;
    std::vector<size_t> copy_groups;      // ends of the committed groups
    size_t wgmma_ops, wgmma_groups;       // issued and committed, not yet retired
    unsigned cluster_phase;               // of the cluster barrier, at this thread's arrival
    bool cluster_arrived;
    std::vector<std::unique_ptr<AsyncOp>> stores;  // bulk stores that still read shared memory
    std::vector<size_t> store_groups;
    std::vector<Access> log;
};
struct Warp {
    unsigned phase;
    uint32_t valid, ready, yielded, arrived;
    int op[32];
    void* argument[32];
};
struct Barrier {
    unsigned phase, arrived, expected;
    const char* file;
    int line, votes, result;
    uint32_t waiting[MAX_WARPS];
};
struct WgmmaOp {
    uint64_t a, b;
    float* d[128];
    int n, accumulate, a_mn, b_mn;
    bool from_registers;
    uint32_t registers[128][4];  // operand a, copied when issued
};
struct WarpGroup {
    unsigned phase, arrived;
    uint32_t waiting[4];
    std::vector<WgmmaOp> ops;
    std::vector<size_t> ends;
};
struct SharedSite {
    const void* key;
    size_t bytes;
    uint8_t* p;
};
enum SharedState : uint8_t { UNALLOCATED = 0, UNINITIALISED = 1, INITIALISED = 2 };
struct Block {
    uint3 index;
    unsigned rank, first_warp, warps, threads, alive;
    uint8_t *arena, *state;  // shared memory and one SharedState per byte
    size_t dynamic_bytes, dynamic_used, static_used;  // given by the launch; with red zones, so far
    unsigned sites_used;
    SharedSite sites[64];
    Barrier barrier[16];
    WarpGroup group[MAX_WARPS / 4];
    size_t logged;
};
struct WarpGroupProduct {  // operands and sums of the wgmma being computed: a[m][k], b as [n][k] and [k][n]
    float a[64][16], rows[256][16], b[16][256], sums[4][256];
};
struct Worker {
    Job* job;
    Block block[MAX_CLUSTER];
    Warp warp[MAX_CLUSTER * MAX_WARPS];
    std::vector<Thread> thread;  // all blocks of the cluster, each padded to whole warps
    unsigned blocks, warps, current, alive;
    unsigned cluster_arrivals, cluster_phase;
    std::vector<unsigned> cluster_waiting;  // indices into thread
    uint64_t progress, idle_progress;
    unsigned idle_rounds;
    std::vector<std::unique_ptr<AsyncOp>> async;
    Fiber main;
    std::vector<Fiber*> fibers, idle;
    uint8_t* arenas;
    uint8_t* states;
    uint64_t rng;
    bool failed;
    Meter meter;
    WarpGroupProduct product;
};

struct Local {  // of the host thread; read on every checked access
    uintptr_t stack;  // of the running fiber
    uintptr_t arenas;
    Thread* self;
    Worker* worker;
};
extern EMU_TLS Local local;

inline Thread* self() { return local.self; }
inline Block& block() { return *local.self->block; }
inline Worker& worker() { return *local.worker; }
inline Warp& warp_of(const Thread* t) { return local.worker->warp[t->warp]; }

uint64_t random_bits();
bool complete_now();       // does an asynchronous copy land here? (EAGER yes, LAZY no, RANDOM either)
void wait_for_others();    // self is no longer ready: run something else
void yield();              // one turn of a spin loop
void run_clusters(Job&);   // on this host thread, until the job has no more
void cp_async_wait(unsigned pending);
void group_arrive(void (*last)(WarpGroup&, unsigned), unsigned argument);  // all 128 threads of the warpgroup meet

// ---- memory (memory.cpp) ----
struct Allocation {
    uintptr_t base;
    size_t bytes;
    bool live;
    uint32_t id;
};
const Allocation* find_allocation(uintptr_t address);  // the live allocation whose pages hold it, or null
uintptr_t device_base();
uint8_t* shared_pointer(uint32_t address);
// Fails unless the access is allowed; logs it when the launch is metered. `pc` tells instructions apart; null: no log.
void check_access(const void* p, size_t size, bool write, const void* pc);
void shared_begin(Block&, size_t dynamic_bytes);
// For what the runtime itself moves: a checked access of the running thread; a write that lands later (bounds now, contents
// when it lands); a piece of a bulk copy in device memory.
void touch(const void* p, size_t size, bool write, const void* pc);
void touch_later(const void* p, size_t size, const void* pc);
void landed(const void* p, size_t size);
void touch_bulk(const void* p, size_t bytes, bool write);

// ---- meter (meter.cpp) ----
void meter_log(Thread*, uintptr_t address, size_t size, AccessKind, const void* pc);
void meter_bulk(uintptr_t address, size_t bytes, bool write);  // one contiguous piece of a bulk copy
void meter_shared_rows(const uintptr_t* offsets, unsigned rows);  // one pass of 16-byte rows
void meter_flush_block(Worker&, Block&);
void meter_block_done(Worker&, Block&);
void meter_begin(Job&);
void meter_end(Job&);
void meter_merge(Job&, Worker&);

// ThreadSanitizer's happens-before edges; nothing elsewhere.
void edge_release(void*);
void edge_acquire(void*);
enum { EDGE_BARRIER = 0, EDGE_WARP = 16, EDGE_GROUP = 48, EDGE_CLUSTER = 56 };
void* edge_at(Block&, unsigned slot, unsigned phase);
}  // namespace emu
