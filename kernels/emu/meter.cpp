// The traffic meter: what the accesses of a launch cost the memory system.
//
// Each thread logs its accesses. The k-th run of one instruction (told by its return address) by the 32 lanes of a warp is one
// access of the warp: its distinct 32-byte sectors are what the device would fetch, its distinct banks decide how many
// passes shared memory needs. Sectors then go through a 32 KiB cache per block, so that a scalar read by every warp counts
// once and a second pass over a large tensor counts again; the rest are the bytes held against an op's declared cost.
#include <sys/mman.h>

#include "runtime.h"

namespace emu {
static constexpr uint64_t SECTOR = 32, REGION_SECTORS = (64ull << 30) / SECTOR;

struct Footprint {
    uint8_t* bits[2];  // read, written: one bit per sector of the device memory
    std::atomic<uint64_t> sectors[2];
};

bool SectorCache::touch(uint64_t sector) {
    uint64_t s = (sector ^ sector >> 8) % 256;
    for (uint64_t t : tag[s]) {
        if (t == sector) return true;
    }
    tag[s][next[s]++ % 4] = sector;
    return false;
}
void SectorCache::clear() { memset(this, 0, sizeof *this); }

void meter_begin(Job& j) {
    Footprint* f = new Footprint{};
    for (auto& b : f->bits) {
        void* p = mmap(nullptr, REGION_SECTORS / 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) abort();
        b = static_cast<uint8_t*>(p);
    }
    j.footprint = f;
}
void meter_end(Job& j) {
    Footprint* f = j.footprint;
    j.traffic.read_footprint = SECTOR * f->sectors[0];
    j.traffic.written_footprint = SECTOR * f->sectors[1];
    for (auto& b : f->bits) munmap(b, REGION_SECTORS / 8);
    delete f;
    j.footprint = nullptr;
}
void meter_merge(Job& j, Worker& w) {
    std::lock_guard<std::mutex> lock(j.mutex);
    auto* total = reinterpret_cast<uint64_t*>(&j.traffic);
    auto* mine = reinterpret_cast<const uint64_t*>(&w.meter.sum);
    for (size_t i = 0; i < sizeof(Traffic) / 8; i++) total[i] += mine[i];
    w.meter.sum = {};
}

// One sector of device memory moves: `sector` counts from the start of the region.
static void move_sector(Worker& w, uint64_t sector, bool write) {
    Traffic& t = w.meter.sum;
    (write ? t.write_sectors : t.read_sectors)++;
    if (!(write ? w.meter.writes : w.meter.reads).touch(sector + 1)) (write ? t.written_bytes : t.read_bytes) += SECTOR;
    Footprint* f = w.job->footprint;
    uint8_t bit = uint8_t(1u << sector % 8);
    if (!(__atomic_fetch_or(&f->bits[write][sector / 8], bit, __ATOMIC_RELAXED) & bit)) f->sectors[write]++;
}

static uint64_t region_offset(uintptr_t address) { return address - device_base(); }

void meter_bulk(uintptr_t address, size_t bytes, bool write) {
    Worker& w = worker();
    if (!w.job->metered || !bytes) return;
    uint64_t first = region_offset(address);
    (write ? w.meter.sum.requested_written : w.meter.sum.requested_read) += bytes;
    w.meter.sum.ideal_sectors += (bytes + SECTOR - 1) / SECTOR;
    for (uint64_t s = first / SECTOR; s <= (first + bytes - 1) / SECTOR; s++) move_sector(w, s, write);
}

void meter_log(Thread* t, uintptr_t address, size_t size, AccessKind kind, const void* pc) {
    t->log.push_back({address, uint32_t(reinterpret_cast<uintptr_t>(pc)), uint16_t(size), kind});
    t->block->logged++;
}

struct Entry {
    uint32_t pc, turn, order;
    uint8_t lane;
    const Access* access;
};

static void global_access(Worker& w, const Entry* e, size_t n, bool write) {
    std::vector<std::pair<uint64_t, uint64_t>> ranges;
    for (size_t i = 0; i < n; i++) {
        uint64_t first = region_offset(e[i].access->address), size = e[i].access->size;
        (write ? w.meter.sum.requested_written : w.meter.sum.requested_read) += size;
        ranges.push_back({first, first + size});
    }
    std::sort(ranges.begin(), ranges.end());
    uint64_t bytes = 0, covered = 0, sector = ~0ull;
    for (auto [first, last] : ranges) {
        first = std::max(first, covered);
        if (first >= last) continue;
        bytes += last - first;
        covered = last;
        for (uint64_t s = first / SECTOR; s <= (last - 1) / SECTOR; s++) {
            if (s == sector) continue;
            move_sector(w, s, write);
            sector = s;
        }
    }
    w.meter.sum.ideal_sectors += (bytes + SECTOR - 1) / SECTOR;
}

// Shared memory serves 128 bytes in one pass, one 4-byte word from each of 32 banks; wide accesses go in groups of lanes.
static void shared_access(Worker& w, const Entry* e, size_t n) {
    unsigned size = e[0].access->size, lanes = size <= 4 ? 32 : size <= 8 ? 16 : 8;
    for (unsigned group = 0; group < 32 / lanes; group++) {
        std::vector<uint64_t> words;
        for (size_t i = 0; i < n; i++) {
            if (e[i].lane / lanes != group) continue;
            uint64_t first = e[i].access->address / 4, last = (e[i].access->address + e[i].access->size - 1) / 4;
            for (uint64_t word = first; word <= last; word++) words.push_back(word);
        }
        if (words.empty()) continue;
        std::sort(words.begin(), words.end());
        words.erase(std::unique(words.begin(), words.end()), words.end());
        unsigned bank[32] = {}, passes = 0;
        for (uint64_t word : words) passes = std::max(passes, ++bank[word % 32]);
        w.meter.sum.shared_wavefronts += passes;
        w.meter.sum.shared_ideal += (words.size() + 31) / 32;
    }
}

void meter_shared_rows(const uintptr_t* offsets, unsigned rows) {
    Worker& w = worker();
    if (!w.job->metered) return;
    Access access[8];
    Entry entries[8];
    for (unsigned i = 0; i < rows; i++) {
        access[i] = {offsets[i], 0, 16, SHARED_READ};
        entries[i] = {0, 0, 0, uint8_t(i), &access[i]};
    }
    shared_access(w, entries, rows);
}

static void flush_warp(Worker& w, Thread* lanes) {
    std::vector<Entry> entries;
    std::unordered_map<uint32_t, uint32_t> turns;
    for (uint8_t l = 0; l < 32; l++) {
        turns.clear();
        for (size_t i = 0; i < lanes[l].log.size(); i++) {
            const Access& a = lanes[l].log[i];
            entries.push_back({a.pc, turns[a.pc]++, uint32_t(i), l, &a});
        }
    }
    std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
        return std::tie(a.pc, a.turn, a.lane) < std::tie(b.pc, b.turn, b.lane);
    });
    std::vector<std::pair<uint32_t, std::pair<size_t, size_t>>> groups;  // time, [first, last)
    for (size_t i = 0, k; i < entries.size(); i = k) {
        uint32_t time = entries[i].order;
        for (k = i; k < entries.size() && entries[k].pc == entries[i].pc && entries[k].turn == entries[i].turn; k++) {
            time = std::min(time, entries[k].order);
        }
        groups.push_back({time, {i, k}});
    }
    std::sort(groups.begin(), groups.end());
    for (auto& [time, range] : groups) {
        const Entry* e = &entries[range.first];
        size_t n = range.second - range.first;
        if (e->access->kind == GLOBAL_READ || e->access->kind == GLOBAL_WRITE) {
            global_access(w, e, n, e->access->kind == GLOBAL_WRITE);
        } else {
            shared_access(w, e, n);
        }
    }
    for (int l = 0; l < 32; l++) lanes[l].log.clear();
}

void meter_flush_block(Worker& w, Block& b) {
    if (!b.logged) return;
    for (unsigned i = 0; i < b.warps; i++) flush_warp(w, &w.thread[(b.first_warp + i) * 32]);
    b.logged = 0;
}
void meter_block_done(Worker& w, Block& b) {
    meter_flush_block(w, b);
    w.meter.reads.clear();
    w.meter.writes.clear();
}
}  // namespace emu
