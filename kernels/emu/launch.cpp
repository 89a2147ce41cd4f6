// A launch: its checks, the host threads that share its clusters, and the C interface that src/device/driver/emulated.rs calls.
#include <sys/mman.h>

#include <condition_variable>
#include <thread>

#include "runtime.h"

namespace emu {
void Job::report(const std::string& message) {
    std::lock_guard<std::mutex> lock(mutex);
    if (!failed.exchange(true)) error = message;
}

// ---- workers: made at need, kept for the life of the process, lent to one launch and host thread at a time ----
static std::mutex workers_mutex;
static std::vector<Worker*>& idle_workers() {
    static auto* v = new std::vector<Worker*>;
    return *v;
}
static Worker* take_worker() {
    {
        std::lock_guard<std::mutex> lock(workers_mutex);
        auto& idle = idle_workers();
        if (!idle.empty()) {
            Worker* w = idle.back();
            idle.pop_back();
            return w;
        }
    }
    Worker* w = new Worker{};
    size_t bytes = MAX_CLUSTER * ARENA;
    void* p = mmap(nullptr, 2 * bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) abort();
    w->arenas = static_cast<uint8_t*>(p);
    w->states = w->arenas + bytes;
    return w;
}

static void work(Job& j) {
    Worker* w = take_worker();
    fiber_adopt_thread(&w->main);
    local = {0, reinterpret_cast<uintptr_t>(w->arenas), nullptr, w};
    run_clusters(j);
    local = {};
    std::lock_guard<std::mutex> lock(workers_mutex);
    idle_workers().push_back(w);
}

// ---- helper threads: one job at a time; a launch that finds them busy runs alone ----
struct Helpers {
    std::mutex mutex, turn;
    std::condition_variable start, done;
    Job* job = nullptr;
    unsigned wanted = 0, running = 0, size = 0;
    void grow(unsigned n) {
        for (; size < n; size++) {
            std::thread([this] {
                for (;;) {
                    std::unique_lock<std::mutex> lock(mutex);
                    start.wait(lock, [&] { return wanted > 0; });
                    wanted--;
                    Job* j = job;
                    lock.unlock();
                    work(*j);
                    lock.lock();
                    if (--running == 0) done.notify_all();
                }
            }).detach();
        }
    }
    void run(Job& j, unsigned helpers) {
        {
            std::lock_guard<std::mutex> lock(mutex);
            grow(helpers);
            job = &j;
            wanted = running = helpers;
            start.notify_all();
        }
        work(j);
        std::unique_lock<std::mutex> lock(mutex);
        running -= wanted;  // who has not started yet need not
        wanted = 0;
        done.wait(lock, [&] { return running == 0; });
    }
};
static Helpers& helpers() {
    static auto* h = new Helpers;
    return *h;
}

static std::string refuse(const Job& j) {
    char s[256] = "";
    uint3 g = j.grid, b = j.block;
    uint64_t threads = uint64_t(b.x) * b.y * b.z;
    if (!g.x || !g.y || !g.z || !threads) {
        snprintf(s, sizeof s, "grid (%u,%u,%u), block (%u,%u,%u): no dimension can be 0", g.x, g.y, g.z, b.x, b.y, b.z);
    } else if (threads > 1024 || b.z > 64) {
        snprintf(s, sizeof s, "a block of %u x %u x %u threads; at most 1024, and 64 in z", b.x, b.y, b.z);
    } else if (threads > j.kernel->max_threads) {
        snprintf(s, sizeof s, "a block of %lu threads; __launch_bounds__ allows %u", threads, j.kernel->max_threads);
    } else if (g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) {
        snprintf(s, sizeof s, "grid (%u,%u,%u); at most 2147483647, 65535 and 65535", g.x, g.y, g.z);
    } else if (j.shared_bytes > MAX_SHARED) {
        snprintf(s, sizeof s, "%u bytes of dynamic shared memory; at most %u", j.shared_bytes, MAX_SHARED);
    } else if (j.cluster < 1 || j.cluster > MAX_CLUSTER || g.x % j.cluster) {
        snprintf(s, sizeof s, "clusters of %u blocks in a grid of %u; they can be 1 or %u and must divide it", j.cluster, g.x, MAX_CLUSTER);
    }
    return s;
}
}  // namespace emu

extern "C" {
struct EmuLaunch {
    const emu::Kernel* kernel;
    void* const* args;
    uint3 grid, block;
    uint32_t shared_bytes, cluster;
    int32_t order, copies;
    uint64_t seed;
    uint32_t workers, metered;
};

// Runs to the end. Returns 0, or 1 with the reason in `error`.
int emu_launch(const EmuLaunch* l, emu::Traffic* traffic, char* error, size_t error_bytes) {
    using namespace emu;
    Job j{};
    j.kernel = l->kernel;
    j.args = l->args;
    j.grid = l->grid;
    j.block = l->block;
    j.shared_bytes = l->shared_bytes;
    j.cluster = l->cluster;
    j.order = l->order;
    j.copies = l->copies;
    j.seed = l->seed;
    j.metered = l->metered != 0;
    std::string bad = refuse(j);
    if (!bad.empty()) {
        snprintf(error, error_bytes, "%s", bad.c_str());
        return 1;
    }
    j.clusters = uint64_t(j.grid.x) * j.grid.y * j.grid.z / j.cluster;
    if (j.metered) meter_begin(j);
    edge_release(&j.begin);
    uint64_t threads = l->workers ? l->workers : std::max(1u, std::thread::hardware_concurrency());
    threads = std::min<uint64_t>(threads, j.clusters);
    std::unique_lock<std::mutex> turn(helpers().turn, std::defer_lock);
    if (threads > 1 && turn.try_lock()) {
        helpers().run(j, unsigned(threads - 1));
    } else {
        work(j);
    }
    edge_acquire(&j.end);
    if (j.metered) {
        meter_end(j);
        *traffic = j.traffic;
    }
    snprintf(error, error_bytes, "%s", j.error.c_str());
    return j.failed ? 1 : 0;
}
}
