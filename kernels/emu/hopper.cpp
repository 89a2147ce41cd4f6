// The Hopper set: mbarrier, bulk tensor copies with their tensor maps, clusters, and products of a warpgroup.
#include "ptx_emu.h"

#include "runtime.h"

namespace emu {
typedef float v8 __attribute__((vector_size(32), aligned(4)));

// ---- mbarrier: a phase ends when all arrivals are in and no bytes are outstanding ----
struct MBarrier {
    uint64_t uninitialised : 1, phase : 1, pending : 20, count : 20;  // fresh shared memory is all ones
    int64_t tx_bytes : 22;
};
static_assert(sizeof(MBarrier) == 8);

static MBarrier mbar_load(const uint64_t* bar) {
    if (reinterpret_cast<uintptr_t>(bar) % 8) fail("mbarrier: the address is not a multiple of 8");
    shared_address(bar);
    MBarrier m;
    memcpy(&m, bar, 8);
    if (m.uninitialised) fail("mbarrier used before mbar_init");
    return m;
}
static void mbar_store(uint64_t* bar, const MBarrier& m) {
    memcpy(bar, &m, 8);
    landed(bar, 8);
    worker().progress++;
}
void mbar_init(uint64_t* bar, int count) {
    if (count < 1 || count > (1 << 20) - 1) fail("mbar_init: a count of %d", count);
    touch(bar, 8, true, nullptr);
    mbar_store(bar, MBarrier{0, 0, uint64_t(count), uint64_t(count), 0});
}
static void mbar_update(uint64_t* bar, unsigned arrivals, int64_t tx_bytes) {
    MBarrier m = mbar_load(bar);
    if (arrivals > m.pending) fail("mbarrier: more arrivals than its count of %u in one phase", unsigned(m.count));
    edge_release(reinterpret_cast<char*>(bar) + m.phase);
    m.tx_bytes += tx_bytes;
    m.pending -= arrivals;
    if (!m.pending && !m.tx_bytes) {
        m.phase ^= 1;
        m.pending = m.count;
    }
    mbar_store(bar, m);
}
void mbar_arrive(uint64_t* bar, uint32_t tx_bytes, int rank) {
    if (rank >= 0) bar = static_cast<uint64_t*>(cluster_map(bar, uint32_t(rank)));
    mbar_update(bar, 1, tx_bytes);
}
bool mbar_try_wait(uint64_t* bar, uint32_t parity) {
    if (parity > 1) fail("mbarrier: a parity of %u", parity);
    if (mbar_load(bar).phase != parity) {
        edge_acquire(reinterpret_cast<char*>(bar) + parity);
        return true;
    }
    yield();
    return false;
}

// ---- tensor maps ----
struct MapSpec {  // RawMap in src/device/driver/library.rs
    uint64_t address, dims[5], strides[4];
    uint32_t sizes[5], element_strides[5], rank, element_bytes, swizzle, im2col;
    int32_t lower[2], upper[2];
    uint32_t channels, pixels;
};
struct Map {  // what lies in the 128 bytes
    uint8_t* base;
    uint64_t stride[4];
    uint32_t dim[5];
    uint16_t box[5];
    uint8_t step[5], rank, element_bytes, swizzle, im2col;
    int8_t lower[2], upper[2];
    uint16_t channels, pixels;
    uint32_t inner_bytes() const { return uint32_t(im2col ? channels : box[0]) * element_bytes; }
};
static_assert(sizeof(Map) <= sizeof(TensorMap));

static uint32_t swizzled(uint32_t address, unsigned swizzle) {  // 1: rows of 32 bytes, 2: 64, 3: 128
    unsigned mask = swizzle == 3 ? 7 : swizzle == 2 ? 3 : swizzle == 1 ? 1 : 0;
    return address ^ (address >> 7 & mask) << 4;
}

// ---- bulk copies ----
struct TmaCopy : AsyncOp {
    Map map;
    uint32_t shared;  // offset of the tile in the cluster's shared memory
    uint64_t* bar;    // of the first receiving block; null for a store
    TmaCoordinates at;
    bool counted = false;

    // One row of dimension 0: `n` elements from coordinate c0; `line` is null outside the tensor. Zeros outside.
    void row(uint32_t offset, uint8_t* line, int c0, int n) {
        int size = map.element_bytes, first = std::max(0, -c0), last = line ? std::min<int64_t>(n, int64_t(map.dim[0]) - c0) : 0;
        if (last <= first) first = last = 0;
        uint8_t* source = line ? line + int64_t(c0) * size : nullptr;
        if (last > first && !counted) touch_bulk(source + first * size, size_t(last - first) * size_t(size), !bar);
        for (int i = 0; i < n; i += 16 / size) {  // a chunk of 16 bytes stays whole under every swizzle
            int chunk = std::min(n - i, 16 / size);
            uint8_t* p = shared_pointer(swizzled(shared + offset + uint32_t(i * size), map.swizzle));
            if (bar) {
                memset(p, 0, size_t(chunk * size));
                for (int k = std::max(i, first); k < std::min(i + chunk, last); k++) memcpy(p + (k - i) * size, source + k * size, size_t(size));
                landed(p, size_t(chunk * size));
            } else {
                for (int k = std::max(i, first); k < std::min(i + chunk, last); k++) memcpy(source + k * size, p + (k - i) * size, size_t(size));
            }
        }
    }
    // Pixels in the order W, H, N inside the bounding box, each shifted by the filter tap.
    uint32_t im2col() {
        uint32_t offset = 0;
        int w = at.c[1], h = at.c[2], n = at.c[3];
        int end_w = int(map.dim[1]) + map.upper[0], end_h = int(map.dim[2]) + map.upper[1];
        for (int i = 0; i < map.pixels; i++, offset += map.inner_bytes()) {
            int x = w + at.offset_w, y = h + at.offset_h;
            bool inside = x >= 0 && x < int(map.dim[1]) && y >= 0 && y < int(map.dim[2]) && n >= 0 && n < int(map.dim[3]);
            row(offset, inside ? map.base + n * map.stride[2] + y * map.stride[1] + x * map.stride[0] : nullptr, at.c[0], map.channels);
            if ((w += map.step[1]) >= end_w) {
                w = map.lower[0];
                if ((h += map.step[2]) >= end_h) h = map.lower[1], n++;
            }
        }
        return offset;
    }
    uint32_t tile() {
        uint32_t offset = 0;
        int i[5] = {};
        for (;;) {
            uint8_t* line = map.base;
            for (int k = 1; k < map.rank && line; k++) {
                int64_t v = int64_t(at.c[k]) + int64_t(i[k]) * map.step[k];
                line = v >= 0 && v < map.dim[k] ? line + v * int64_t(map.stride[k - 1]) : nullptr;
            }
            row(offset, line, at.c[0], map.box[0]);
            offset += map.inner_bytes();
            int k = 1;
            while (k < map.rank && ++i[k] == map.box[k]) i[k++] = 0;
            if (k >= map.rank) return offset;
        }
    }
    void run() override {
        if (!bar) {
            tile();
            return;
        }
        uint32_t offset = shared % ARENA;
        size_t bar_offset = shared_address(bar) % ARENA;
        for (unsigned r = 0; r < worker().blocks; r++) {
            if (!(at.blocks >> r & 1)) continue;
            shared = uint32_t(r * ARENA) + offset;
            uint32_t bytes = at.im2col ? im2col() : tile();
            counted = true;  // several receivers, one read
            mbar_update(reinterpret_cast<uint64_t*>(shared_pointer(uint32_t(r * ARENA + bar_offset))), 0, -int64_t(bytes));
        }
    }
};

static std::unique_ptr<TmaCopy> tma_copy(const char* what, const void* shared, const TensorMap* map, const TmaCoordinates& at) {
    auto op = std::make_unique<TmaCopy>();
    memcpy(&op->map, map, sizeof op->map);
    op->shared = shared_address(shared);
    op->at = at;
    if (op->map.rank != at.rank || bool(op->map.im2col) != at.im2col) {
        fail("%s: the tensor map has rank %d (%s), the instruction rank %d (%s)", what, op->map.rank, op->map.im2col ? "im2col" : "tile", at.rank, at.im2col ? "im2col" : "tile");
    }
    unsigned align = op->map.swizzle == 3 ? 1024 : op->map.swizzle == 2 ? 512 : op->map.swizzle == 1 ? 256 : 128;
    if (op->shared % align) fail("%s: the shared address is not a multiple of %u, which its swizzle needs", what, align);
    return op;
}
static size_t tile_bytes(const Map& m) {
    size_t n = m.inner_bytes();
    if (m.im2col) return n * m.pixels;
    for (int k = 1; k < m.rank; k++) n *= m.box[k];
    return n;
}
void tma_load(void* dst, const TensorMap* map, uint64_t* bar, TmaCoordinates at) {
    auto op = tma_copy("TMA load", dst, map, at);
    mbar_load(bar);
    op->bar = bar;
    unsigned mine = 1u << block().rank;
    if (op->at.blocks == 0) op->at.blocks = uint16_t(mine);
    if (op->at.blocks >> worker().blocks) fail("TMA load: multicast to blocks %x of a cluster of %u", at.blocks, worker().blocks);
    for (unsigned r = 0; r < worker().blocks; r++) {
        if (op->at.blocks >> r & 1) touch_later(shared_pointer(uint32_t(r * ARENA + op->shared % ARENA)), tile_bytes(op->map), nullptr);
    }
#ifdef EMU_TSAN
    op->run();  // as if the issuing thread wrote: the exact order of events
#else
    if (complete_now()) {
        op->run();
    } else {
        worker().async.push_back(std::move(op));
    }
#endif
}
void tma_store(const TensorMap* map, const void* src, TmaCoordinates at) {
    auto op = tma_copy("TMA store", src, map, at);
    op->bar = nullptr;
    for (size_t i = 0; i < tile_bytes(op->map); i += 16) {
        touch(static_cast<const uint8_t*>(src) + i, 16, false, nullptr);
    }
    self()->stores.push_back(std::move(op));
}
void tma_store_commit() {
    self()->store_groups.push_back(self()->stores.size());
    if (complete_now()) tma_store_wait(0);
}
void tma_store_wait(unsigned pending) {
    Thread& t = *self();
    if (t.store_groups.size() <= pending) return;
    size_t groups = t.store_groups.size() - pending, upto = t.store_groups[groups - 1];
    for (size_t i = 0; i < upto; i++) t.stores[i]->run();
    t.stores.erase(t.stores.begin(), t.stores.begin() + long(upto));
    t.store_groups.erase(t.store_groups.begin(), t.store_groups.begin() + long(groups));
    for (size_t& end : t.store_groups) end -= upto;
}

// ---- clusters ----
uint32_t cluster_rank() { return block().rank; }
void* cluster_map(void* p, uint32_t rank) {
    if (rank >= worker().blocks) fail("block %u of a cluster of %u", rank, worker().blocks);
    return shared_pointer(uint32_t(rank * ARENA + shared_address(p) % ARENA));
}
void cluster_arrive() {
    Worker& w = worker();
    if (self()->cluster_arrived) fail("cluster barrier: a second arrival before the wait");
    self()->cluster_arrived = true;
    self()->cluster_phase = w.cluster_phase;
    edge_release(edge_at(w.block[0], EDGE_CLUSTER, w.cluster_phase));
    if (++w.cluster_arrivals < w.blocks * w.block[0].threads) return;
    w.cluster_arrivals = 0;
    w.cluster_phase++;
    w.progress++;
    for (unsigned i : w.cluster_waiting) w.warp[w.thread[i].warp].ready |= 1u << w.thread[i].lane;
    w.cluster_waiting.clear();
}
void cluster_wait() {
    Worker& w = worker();
    Thread* t = self();
    if (!t->cluster_arrived) fail("cluster barrier: a wait without an arrival");
    t->cluster_arrived = false;
    if (w.cluster_phase == t->cluster_phase) {
        w.cluster_waiting.push_back(unsigned(t - w.thread.data()));
        warp_of(t).ready &= ~(1u << t->lane);
        wait_for_others();
    }
    edge_acquire(edge_at(w.block[0], EDGE_CLUSTER, t->cluster_phase));
}

// ---- wgmma: computed at its wait (lazy) or when the group is committed (eager) ----
// Reads 8 neighbouring bf16 of an operand: row mn, columns k .. k + 7, or, MN-major, column k, rows mn .. mn + 7.
static void operand_chunk(uint64_t descriptor, bool mn_major, unsigned mn, unsigned k, float* out) {
    uint32_t start = uint32_t(descriptor & 0x3fff) << 4, leading = uint32_t(descriptor >> 16 & 0x3fff) << 4, stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
    unsigned mode = unsigned(descriptor >> 62), width = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 16;
    uint32_t a;
    if (!mn_major) {
        a = mode ? start + mn / 8 * stride + mn % 8 * width + k * 2 : start + mn / 8 * stride + k / 8 * leading + mn % 8 * 16;
    } else {
        unsigned per = width / 2;
        a = mode ? start + mn / per * leading + k / 8 * stride + k % 8 * width + mn % per * 2 : start + mn / 8 * stride + k / 8 * leading + k % 8 * 16;
    }
    if (mode) a ^= (a >> 7 & (width / 16 - 1)) << 4;
    const uint8_t* p = block().arena + a;
    if (a + 16 > STATIC_OFFSET) fail("wgmma: a descriptor points beyond the dynamic shared memory");
    touch(p, 16, false, nullptr);  // unlogged: the tensor cores' own path
    uint16_t v[8];
    memcpy(v, p, 16);
    for (int i = 0; i < 8; i++) out[i] = emu_bits<float>(uint32_t(v[i]) << 16);
}
static void load_operand(uint64_t descriptor, bool mn_major, unsigned rows, float (*out)[16]) {
    float chunk[8];
    if (!mn_major) {
        for (unsigned r = 0; r < rows; r++) {
            for (unsigned k = 0; k < 16; k += 8) operand_chunk(descriptor, false, r, k, &out[r][k]);
        }
        return;
    }
    for (unsigned k = 0; k < 16; k++) {
        for (unsigned r = 0; r < rows; r += 8) {
            operand_chunk(descriptor, true, r, k, chunk);
            for (unsigned i = 0; i < 8; i++) out[r + i][k] = chunk[i];
        }
    }
}
// One row of d, from the registers of its four threads or back to them.
static void move_row(const WgmmaOp& o, int r, float* row, bool back) {
    int owner = r / 16 * 32 + r % 8 * 4, half = r % 16 / 8 * 2;
    for (int q = 0; q < 4; q++) {
        float* d = o.d[owner + q] + half;
        for (int j = 0; j < o.n / 8; j++) {
            float* at = row + j * 8 + q * 2;
            if (back) {
                d[j * 4] = at[0], d[j * 4 + 1] = at[1];
            } else {
                at[0] = o.accumulate ? d[j * 4] : 0, at[1] = o.accumulate ? d[j * 4 + 1] : 0;
            }
        }
    }
}
static void wgmma_compute(const WgmmaOp& o) {
    auto& [A, rows, B, acc] = worker().product;
    if (o.from_registers) {
        for (int t = 0; t < 128; t++) {
            int r = t / 32 * 16 + t % 32 / 4, c = t % 4 * 2;
            for (int i = 0; i < 4; i++) {
                float* p = &A[r + (i & 1) * 8][c + (i >> 1) * 8];
                p[0] = emu_bits<float>(o.registers[t][i] << 16);
                p[1] = emu_bits<float>(o.registers[t][i] & 0xffff0000u);
            }
        }
    } else {
        load_operand(o.a, o.a_mn, 64, A);
    }
    load_operand(o.b, o.b_mn, unsigned(o.n), rows);
    for (int n = 0; n < o.n; n++) {
        for (int k = 0; k < 16; k++) B[k][n] = rows[n][k];
    }
    for (int r = 0; r < 64; r += 4) {  // four rows at a time: independent sums
        for (int i = 0; i < 4; i++) move_row(o, r + i, acc[i], false);
        for (int j = 0; j < o.n; j += 8) {
            v8 c[4], b;
            for (int i = 0; i < 4; i++) memcpy(&c[i], acc[i] + j, 32);
            for (int k = 0; k < 16; k++) {
                memcpy(&b, B[k] + j, 32);
                for (int i = 0; i < 4; i++) c[i] += A[r + i][k] * b;
            }
            for (int i = 0; i < 4; i++) memcpy(acc[i] + j, &c[i], 32);
        }
        for (int i = 0; i < 4; i++) move_row(o, r + i, acc[i], true);
    }
}
static WarpGroup& group() {
    if (block().threads % 128) fail("wgmma: the block has %u threads, not whole warpgroups of 128", block().threads);
    return block().group[(self()->warp - block().first_warp) / 4];
}
static void retire(WarpGroup& g, size_t groups) {
    size_t upto = groups ? g.ends[groups - 1] : 0;
    for (size_t i = 0; i < upto; i++) wgmma_compute(g.ops[i]);
    g.ops.erase(g.ops.begin(), g.ops.begin() + long(upto));
    g.ends.erase(g.ends.begin(), g.ends.begin() + long(groups));
    for (size_t& end : g.ends) end -= upto;
    Thread* t = &worker().thread[self()->warp / 4 * 128];
    for (int i = 0; i < 128; i++) t[i].wgmma_ops -= upto, t[i].wgmma_groups -= groups;
}
void wgmma(float* d, int n, const uint32_t* registers, uint64_t a, uint64_t b, int accumulate, int a_mn, int b_mn) {
    WarpGroup& g = group();
    size_t i = self()->wgmma_ops++;
    if (g.ops.size() <= i) {
        g.ops.emplace_back();
        WgmmaOp& o = g.ops[i];
        o.a = a, o.b = b, o.n = n, o.accumulate = accumulate, o.a_mn = a_mn, o.b_mn = b_mn, o.from_registers = registers != nullptr;
    }
    WgmmaOp& o = g.ops[i];
    if (o.a != a || o.b != b || o.accumulate != accumulate || o.n != n || o.from_registers != (registers != nullptr)) fail("wgmma: operands differ inside the warpgroup");
    unsigned t = self()->linear % 128;
    o.d[t] = d;
    if (registers) memcpy(o.registers[t], registers, 16);
}
void wgmma_commit() {
    WarpGroup& g = group();
    size_t i = self()->wgmma_groups++;
    if (g.ends.size() <= i) g.ends.push_back(self()->wgmma_ops);
    if (g.ends[i] != self()->wgmma_ops) fail("wgmma: committed groups differ inside the warpgroup");
    if (worker().job->copies == EAGER) group_arrive([](WarpGroup& w, unsigned) { retire(w, w.ends.size()); }, 0);
}
void wgmma_wait(unsigned pending) {
    group();
    group_arrive([](WarpGroup& g, unsigned left) {
        if (g.ends.size() > left) retire(g, g.ends.size() - left);
    }, pending);
}
}  // namespace emu

// Fills the 128 bytes of a tensor map; the Rust side has checked the rules of the hardware.
extern "C" int emu_tensor_map(void* out, const emu::MapSpec* s) {
    emu::Map m{};
    m.base = reinterpret_cast<uint8_t*>(s->address);
    m.rank = uint8_t(s->rank), m.element_bytes = uint8_t(s->element_bytes), m.swizzle = uint8_t(s->swizzle), m.im2col = uint8_t(s->im2col);
    for (int i = 0; i < 5; i++) {
        if (s->dims[i] > 0xffffffffull || s->element_strides[i] < 1 || s->element_strides[i] > 8) return 1;
        m.dim[i] = uint32_t(s->dims[i]), m.box[i] = uint16_t(s->sizes[i]), m.step[i] = uint8_t(s->element_strides[i]);
    }
    for (int i = 0; i < 4; i++) m.stride[i] = s->strides[i];
    for (int i = 0; i < 2; i++) m.lower[i] = int8_t(s->lower[i]), m.upper[i] = int8_t(s->upper[i]);
    m.channels = uint16_t(s->channels), m.pixels = uint16_t(s->pixels);
    memset(out, 0, 128);
    memcpy(out, &m, sizeof m);
    return 0;
}
