// The scheduler of one worker: which thread runs next, barriers, collectives of a warp, and what a deadlock looks like.
#include "runtime.h"

#include <cstdarg>

namespace emu {
// Orders the memory of the threads that call it. The counter is what a race checker sees of that.
void fence() {
    static std::atomic<unsigned> turn;
    turn.fetch_add(1, std::memory_order_acq_rel);
    std::atomic_thread_fence(std::memory_order_seq_cst);
}

static void thread_main();

uint64_t random_bits() {
    uint64_t& s = worker().rng;
    s ^= s << 13;
    s ^= s >> 7;
    s ^= s << 17;
    return s;
}
bool complete_now() {
    int mode = worker().job->copies;
    return mode == EAGER || (mode == RANDOM_COPIES && (random_bits() & 1));
}

uint3 thread_index() { return self()->index; }
uint3 block_index() { return block().index; }
uint3 block_dim() { return worker().job->block; }
uint3 grid_dim() { return worker().job->grid; }
unsigned lane() { return self()->lane; }

// ---- choosing ----
template <class Mask> static unsigned pick_bit(Mask mask, unsigned from) {  // forward: the first at or after `from`, cyclic
    constexpr unsigned bits = sizeof(Mask) * 8;
    switch (worker().job->order) {
        case FORWARD: {
            Mask above = from < bits ? mask >> from << from : 0;
            return unsigned(__builtin_ctzll(above ? above : mask));
        }
        case REVERSE: {
            Mask below = from < bits - 1 ? mask & ((Mask(2) << from) - 1) : mask;
            return 63 - unsigned(__builtin_clzll(below ? below : mask));
        }
        default:
            for (uint64_t k = random_bits() % __builtin_popcountll(mask); k; k--) mask &= mask - 1;
            return unsigned(__builtin_ctzll(mask));
    }
}

static void run_async(Worker& w) {  // a deferred TMA load lands
    size_t i = w.job->order == RANDOM_ORDER || w.job->copies == RANDOM_COPIES ? random_bits() % w.async.size() : 0;
    std::unique_ptr<AsyncOp> op = std::move(w.async[i]);
    w.async.erase(w.async.begin() + long(i));
    op->run();
    w.progress++;
}

static Thread* pick() {  // null: nothing can run
    Worker& w = worker();
    bool random = w.job->order == RANDOM_ORDER;
    for (;;) {
        if (w.job->copies == RANDOM_COPIES && !w.async.empty() && random_bits() % 64 == 0) run_async(w);
        unsigned c = w.current;
        // A random schedule stays on one warp for long: only a large skew between warps shows some pipeline bugs.
        if (!w.warp[c].ready || (random && random_bits() % 64 == 0)) {
            uint64_t ready = 0;
            for (unsigned i = 0; i < w.warps; i++) ready |= uint64_t(w.warp[i].ready != 0) << i;
            if (ready) c = pick_bit(ready, c);
        }
        if (w.warp[c].ready) {
            w.current = c;
            unsigned l = pick_bit(w.warp[c].ready, w.job->order == REVERSE ? 31 : 0);
            return &w.thread[c * 32 + l];
        }
        if (!w.async.empty()) run_async(w);
        bool any = false;
        for (unsigned i = 0; i < w.warps; i++) {
            any |= w.warp[i].yielded != 0 || w.warp[i].ready != 0;
            w.warp[i].ready |= w.warp[i].yielded;
            w.warp[i].yielded = 0;
        }
        if (!any) return nullptr;
        if (w.progress != w.idle_progress) {
            w.idle_progress = w.progress;
            w.idle_rounds = 0;
        } else if (++w.idle_rounds > 1000) {
            return nullptr;  // everybody spins and nothing changes
        }
    }
}

static void resume(Fiber* from, Thread* t) {
    Worker& w = worker();
    if (!t->started) {
        t->started = true;
#ifdef EMU_TSAN
        t->fiber = w.fibers[t - w.thread.data()];  // made beforehand, and never shared between CUDA threads
#else
        if (w.idle.empty()) {
            w.fibers.push_back(fiber_new(unsigned(w.fibers.size()), thread_main));
            w.idle.push_back(w.fibers.back());
        }
        t->fiber = w.idle.back();
        w.idle.pop_back();
#endif
    }
    local.self = t;
    if (t->fiber != from) fiber_switch(from, t->fiber);
}

// ---- failing ----
static std::string place(const Block& b) {
    char s[64];
    snprintf(s, sizeof s, "block (%u,%u,%u)", b.index.x, b.index.y, b.index.z);
    return s;
}

[[noreturn]] static void abandon(const std::string& message) {
    Worker& w = worker();
    w.job->report(message);
    edge_release(&w.job->end);
    w.failed = true;
    fiber_switch(self()->fiber, &w.main);
    __builtin_unreachable();
}

void fail(const char* format, ...) {
    char s[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(s, sizeof s, format, arguments);
    va_end(arguments);
    uint3 t = self()->index;
    char where[64];
    snprintf(where, sizeof where, ", thread (%u,%u,%u): ", t.x, t.y, t.z);
    abandon(place(block()) + where + s);
}

static std::string explain_stuck() {
    Worker& w = worker();
    std::string s = "deadlock";
    char line[256];
    for (unsigned r = 0; r < w.blocks; r++) {
        Block& b = w.block[r];
        s += " in " + place(b) + ":";
        for (int i = 0; i < 16; i++) {
            Barrier& bar = b.barrier[i];
            if (!bar.arrived) continue;
            snprintf(line, sizeof line, " %u of %u threads wait at barrier %d (%s:%d);", bar.arrived, bar.expected, i, bar.file, bar.line);
            s += line;
        }
        unsigned spinning = 0;
        int first = -1;
        for (unsigned i = 0; i < b.warps; i++) {
            Warp& p = w.warp[b.first_warp + i];
            uint32_t spin = p.ready | p.yielded;
            if (spin && first < 0) first = int(i * 32) + __builtin_ctz(spin);
            spinning += unsigned(__builtin_popcount(spin));
            if (!p.arrived) continue;
            snprintf(line, sizeof line, " warp %u: lanes %08x of %08x wait in a warp collective;", i, p.arrived, p.valid);
            s += line;
        }
        if (spinning) {
            snprintf(line, sizeof line, " %u threads spin on an mbarrier or flag (first: %d);", spinning, first);
            s += line;
        }
        if (b.alive < b.threads) {
            snprintf(line, sizeof line, " %u threads have exited;", b.threads - b.alive);
            s += line;
        }
    }
    if (!w.cluster_waiting.empty()) {
        snprintf(line, sizeof line, " %zu threads wait at the cluster barrier;", w.cluster_waiting.size());
        s += line;
    }
    s.pop_back();
    return s;
}

void wait_for_others() {
    Thread* me = self();
    if (fiber_overflowed(me->fiber)) fail("stack overflow: more than %zu KiB of local variables", STACK >> 10);
    Fiber* mine = me->fiber;
    Thread* t = pick();
    if (!t) abandon(explain_stuck());
    resume(mine, t);
}

void yield() {
    Warp& w = warp_of(self());
    w.ready &= ~(1u << self()->lane);
    w.yielded |= 1u << self()->lane;
    wait_for_others();
}

// The body of every fiber: run a thread to its end, then another one.
static void thread_main() {
    fiber_entered();
    for (;;) {
        Thread* t = self();
        Fiber* mine = t->fiber;
        Worker& w = worker();
        edge_acquire(&w.job->begin);
        edge_acquire(t->block);
        w.job->kernel->call(w.job->args);
        edge_release(&w.job->end);
        if (fiber_overflowed(mine)) fail("stack overflow: more than %zu KiB of local variables", STACK >> 10);
        if (!t->copies.empty() || t->wgmma_ops || !t->stores.empty()) fail("the thread ended before its asynchronous copies or products did: a wait is missing");
        t->done = true;
        t->block->alive--;
        w.alive--;
        w.progress++;
        warp_of(t).ready &= ~(1u << t->lane);
        if (w.alive == 0) {
#ifndef EMU_TSAN
            w.idle.push_back(mine);
#endif
            fiber_switch(mine, &w.main);
            continue;
        }
        Thread* next = pick();
        if (!next) abandon(explain_stuck());
#ifndef EMU_TSAN
        if (!next->started) {  // no switch: it runs on this stack
            next->started = true;
            next->fiber = mine;
            local.self = next;
            continue;
        }
        w.idle.push_back(mine);
#endif
        resume(mine, next);
    }
}

// ---- barriers and collectives ----
// Where ThreadSanitizer keeps the order that a meeting makes. One place per phase: who arrives at the next one must not order this
// one. In the block's own memory, which is fresh for every block: a barrier orders nothing between blocks.
void* edge_at(Block& b, unsigned slot, unsigned phase) { return b.arena + ARENA - 4096 + (2 * slot + (phase & 1)) * 8; }

int barrier(unsigned id, unsigned threads, const char* file, int line, bool wait, int vote) {
    Block& b = block();
    if (id > 15) fail("barrier %u: there are 16, 0 to 15", id);
    Barrier& r = b.barrier[id];
    if (threads == 0) threads = b.threads;
    if (threads % 32 && threads != b.threads) fail("barrier %u: %u threads are not whole warps", id, threads);
    if (!self()->copies.empty() && worker().job->copies == RANDOM_COPIES && (random_bits() & 1)) cp_async_wait(0);
    void* edge = edge_at(b, EDGE_BARRIER + id, r.phase);
    edge_release(edge);
    if (!r.arrived) {
        r.expected = threads;
        r.file = file;
        r.line = line;
    } else if (r.expected != threads) {
        fail("barrier %u: %u threads here (%s:%d), %u at %s:%d", id, threads, file, line, r.expected, r.file, r.line);
    } else if (id == 0 && r.line != line) {
        fail("divergent barrier: %s:%d, while others wait at %s:%d", file, line, r.file, r.line);
    }
    r.votes += vote;
    if (++r.arrived == threads) {
        r.arrived = 0;
        r.phase++;
        r.result = r.votes;
        r.votes = 0;
        worker().progress++;
        for (unsigned i = 0; i < b.warps; i++) {
            worker().warp[b.first_warp + i].ready |= r.waiting[i];
            r.waiting[i] = 0;
        }
        if (threads == b.threads && b.logged > 1 << 18) meter_flush_block(worker(), b);
    } else if (wait) {
        Thread* t = self();
        r.waiting[t->warp - b.first_warp] |= 1u << t->lane;
        warp_of(t).ready &= ~(1u << t->lane);
        wait_for_others();
    }
    if (wait) edge_acquire(edge);
    return r.result;
}

void collective(uint32_t mask, int op, void* mine, void (*last)(void**, uint32_t)) {
    Thread* t = self();
    Warp& w = warp_of(t);
    uint32_t bit = 1u << t->lane, all = mask & w.valid;
    if (!(mask & bit)) fail("warp collective: lane %u is not in its own mask %08x", t->lane, mask);
    w.argument[t->lane] = mine;
    w.op[t->lane] = op;
    w.arrived |= bit;
    if ((w.arrived & all) != all) {
        w.ready &= ~bit;
        wait_for_others();
        return;
    }
    for (uint32_t m = all; m; m &= m - 1) {
        int l = __builtin_ctz(m);
        if (w.op[l] != op) fail("divergent warp collective: lane %u and lane %d are in different operations", t->lane, l);
    }
    w.arrived &= ~all;
    last(w.argument, all);
    w.ready |= all;
    worker().progress++;
}

void sync_warp(uint32_t mask) {
    Warp& w = warp_of(self());
    Thread* t = self();
    void* edge = edge_at(block(), EDGE_WARP + t->warp - block().first_warp, w.phase);
    edge_release(edge);
    collective(mask, OP_SYNC, nullptr, [](void**, uint32_t) { warp_of(self()).phase++; });
    edge_acquire(edge);
}

uint64_t shuffle(uint32_t mask, uint64_t bits, int source) {
    struct Lane {
        uint64_t value, result;
        int source;
    } mine{bits, bits, source};
    collective(mask, OP_SHUFFLE, &mine, [](void** a, uint32_t all) {
        for (uint32_t m = all; m; m &= m - 1) {
            int l = __builtin_ctz(m), s = static_cast<Lane*>(a[l])->source & 31;
            if (!(all >> s & 1)) fail("shuffle: lane %d reads lane %d, which does not take part", l, s);
            static_cast<Lane*>(a[l])->result = static_cast<Lane*>(a[s])->value;
        }
    });
    return mine.result;
}

void group_arrive(void (*last)(WarpGroup&, unsigned), unsigned argument) {
    Thread* t = self();
    Block& b = block();
    unsigned in_block = t->warp - b.first_warp;
    if (b.threads % 128) fail("wgmma: the block has %u threads, not whole warpgroups of 128", b.threads);
    WarpGroup& g = b.group[in_block / 4];
    void* edge = edge_at(b, EDGE_GROUP + in_block / 4, g.phase);
    edge_release(edge);
    if (++g.arrived == 128) {
        g.arrived = 0;
        g.phase++;
        edge_acquire(edge);
        last(g, argument);
        edge_release(edge);
        worker().progress++;
        for (unsigned i = 0; i < 4; i++) {
            worker().warp[t->warp / 4 * 4 + i].ready |= g.waiting[i];
            g.waiting[i] = 0;
        }
    } else {
        g.waiting[in_block % 4] |= 1u << t->lane;
        warp_of(t).ready &= ~(1u << t->lane);
        wait_for_others();
    }
    edge_acquire(edge);
}

// ---- one cluster, from its first thread to its last ----
static void start_block(Worker& w, unsigned rank, uint64_t linear) {
    Job& j = *w.job;
    Block& b = w.block[rank];
    b.index = {unsigned(linear % j.grid.x), unsigned(linear / j.grid.x % j.grid.y), unsigned(linear / j.grid.x / j.grid.y)};
    b.rank = rank;
    b.threads = b.alive = j.block.x * j.block.y * j.block.z;
    b.warps = (b.threads + 31) / 32;
    b.first_warp = rank * b.warps;
    b.logged = 0;
    shared_begin(b, j.shared_bytes);
    memset(b.barrier, 0, sizeof b.barrier);
    for (WarpGroup& g : b.group) {
        g.arrived = 0;
        g.ops.clear();
        g.ends.clear();
#ifdef EMU_TSAN  // a vector that grows would look like an access of the thread that happens to add to it
        g.ops.reserve(256);
        g.ends.reserve(256);
#endif
        memset(g.waiting, 0, sizeof g.waiting);
    }
    for (unsigned i = 0; i < b.warps * 32; i++) {
        Thread& t = w.thread[b.first_warp * 32 + i];
        t.index = {i % j.block.x, i / j.block.x % j.block.y, i / (j.block.x * j.block.y)};
        t.linear = i;
        t.lane = i % 32;
        t.warp = b.first_warp + i / 32;
        t.block = &b;
        t.fiber = nullptr;
        t.started = t.done = false;
        t.copies.clear();
        t.copy_groups.clear();
        t.wgmma_ops = t.wgmma_groups = 0;
        t.cluster_phase = 0;
        t.cluster_arrived = false;
        t.stores.clear();
        t.store_groups.clear();
        t.log.clear();
    }
    for (unsigned i = 0; i < b.warps; i++) {
        unsigned left = b.threads - i * 32;
        uint32_t valid = left >= 32 ? ~0u : (1u << left) - 1;
        w.warp[b.first_warp + i] = Warp{};
        w.warp[b.first_warp + i].valid = w.warp[b.first_warp + i].ready = valid;
    }
    edge_release(&b);
}

static void run_cluster(Worker& w, uint64_t id) {
    Job& j = *w.job;
    if (j.order == REVERSE) id = j.clusters - 1 - id;
    w.rng = ((j.seed + 1) * 0x9E3779B97F4A7C15ull) ^ ((id + 1) * 0xD1B54A32D192ED03ull);
    w.blocks = j.cluster;
    unsigned threads = j.block.x * j.block.y * j.block.z, warps = (threads + 31) / 32;
    w.warps = warps * w.blocks;
    w.thread.resize(size_t(w.warps) * 32);
    w.alive = threads * w.blocks;
    w.current = j.order == REVERSE ? w.warps - 1 : 0;
    w.progress = 1;
    w.idle_progress = w.idle_rounds = 0;
    w.cluster_arrivals = w.cluster_phase = 0;
    w.cluster_waiting.clear();
    w.cluster_waiting.reserve(w.thread.size());
    w.async.clear();
    w.failed = false;
    for (unsigned r = 0; r < w.blocks; r++) start_block(w, r, id * w.blocks + r);
#ifdef EMU_TSAN  // made here, not by another CUDA thread: a fiber's creation is ordered after its creator
    while (w.fibers.size() < w.thread.size()) w.fibers.push_back(fiber_new(unsigned(w.fibers.size()), thread_main));
#endif
    resume(&w.main, pick());
    local.self = nullptr;
    if (w.failed) {  // some threads are suspended in the middle: their stacks start afresh
        for (Fiber* f : w.fibers) fiber_reset(f, thread_main);
        w.idle = w.fibers;
        w.async.clear();
        return;
    }
    for (unsigned r = 0; r < w.blocks; r++) meter_block_done(w, w.block[r]);
}

void run_clusters(Job& j) {
    Worker& w = worker();
    w.job = &j;
    for (uint64_t i; (i = j.next.fetch_add(1)) < j.clusters && !j.failed;) run_cluster(w, i);
    if (j.metered) meter_merge(j, w);
}
}  // namespace emu
