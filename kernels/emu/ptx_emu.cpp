// cp.async, ldmatrix and mma.sync.
#include "ptx_emu.h"

#include "runtime.h"

namespace emu {
typedef float v8 __attribute__((vector_size(32), aligned(4)));

// ---- cp.async: a copy stays pending until its wait, so that a missing wait shows ----
void cp_async(void* dst, const void* src, int bytes, int valid) {
    const char* pc = static_cast<const char*>(__builtin_return_address(0));
    if (valid < 0 || valid > bytes) fail("cp.async: %d valid of %d bytes", valid, bytes);
    if (reinterpret_cast<uintptr_t>(dst) % unsigned(bytes)) fail("cp.async: shared address not a multiple of %d", bytes);
    if (valid) {
        if (reinterpret_cast<uintptr_t>(src) % unsigned(bytes)) fail("cp.async: global address not a multiple of %d", bytes);
        touch(src, size_t(valid), false, pc);
    }
    touch_later(dst, size_t(bytes), pc + 1);
    self()->copies.push_back({dst, src, bytes, valid});
}

void cp_async_commit() {
    self()->copy_groups.push_back(self()->copies.size());
    if (complete_now()) cp_async_wait(0);
}

void cp_async_wait(unsigned pending) {
    Thread& t = *self();
    if (pending && t.copy_groups.size() <= pending) return;
    size_t groups = t.copy_groups.size() - std::min<size_t>(pending, t.copy_groups.size());
    size_t upto = pending ? t.copy_groups[groups - 1] : t.copies.size();
    for (size_t i = 0; i < upto; i++) {
        CpAsync& c = t.copies[i];
        memcpy(c.dst, c.src, size_t(c.src_bytes));
        memset(static_cast<uint8_t*>(c.dst) + c.src_bytes, 0, size_t(c.bytes - c.src_bytes));
        landed(c.dst, size_t(c.bytes));
    }
    t.copies.erase(t.copies.begin(), t.copies.begin() + long(upto));
    t.copy_groups.erase(t.copy_groups.begin(), t.copy_groups.begin() + long(groups));
    for (size_t& end : t.copy_groups) end -= upto;
}

// ---- ldmatrix ----
struct LdMatrix {
    const uint8_t* row;
    uint32_t* r;
    int matrices;
};
static void ldmatrix_rows(void** lanes, bool transposed) {
    auto at = [&](int l) { return static_cast<LdMatrix*>(lanes[l]); };
    for (int m = 0; m < at(0)->matrices; m++) {
        uint16_t element[8][8];
        uintptr_t offsets[8];
        for (int row = 0; row < 8; row++) {
            const uint8_t* p = at(m * 8 + row)->row;
            if (reinterpret_cast<uintptr_t>(p) % 16) fail("ldmatrix: the row address of lane %d is not a multiple of 16", m * 8 + row);
            offsets[row] = shared_address(p);
            touch(p, 16, false, nullptr);  // unlogged: the pass is counted as a whole below
            memcpy(element[row], p, 16);
        }
        meter_shared_rows(offsets, 8);
        for (int l = 0; l < 32; l++) {
            int i = l / 4, j = l % 4 * 2;
            uint16_t low = transposed ? element[j][i] : element[i][j], high = transposed ? element[j + 1][i] : element[i][j + 1];
            at(l)->r[m] = low | uint32_t(high) << 16;
        }
    }
}
void ldmatrix(uint32_t* r, int matrices, const void* row, bool transposed) {
    LdMatrix mine{static_cast<const uint8_t*>(row), r, matrices};
    collective(0xffffffffu, transposed ? OP_LDMATRIX_TRANS : OP_LDMATRIX, &mine, transposed
               ? [](void** lanes, uint32_t) { ldmatrix_rows(lanes, true); }
               : [](void** lanes, uint32_t) { ldmatrix_rows(lanes, false); });
}

// ---- mma.sync: products are exact in f32, sums are rounded one by one in the order of k ----
struct Mma {
    float* d;
    const uint32_t* a;
    uint32_t b0, b1;
};
static float low(uint32_t v) { return emu_bits<float>(v << 16); }
static float high(uint32_t v) { return emu_bits<float>(v & 0xffff0000u); }
static float tf32(uint32_t v) { return emu_bits<float>(v & 0xffffe000u); }

template <int K> static void multiply(void** lanes, const float (&A)[16][16], const float (&B)[16][8]) {
    alignas(32) float C[16][8];
    for (int l = 0; l < 32; l++) {
        int g = l / 4, t = l % 4 * 2;
        const float* d = static_cast<Mma*>(lanes[l])->d;
        C[g][t] = d[0], C[g][t + 1] = d[1], C[g + 8][t] = d[2], C[g + 8][t + 1] = d[3];
    }
    for (int i = 0; i < 16; i += 4) {  // four rows at a time: independent sums
        v8 c[4];
        for (int r = 0; r < 4; r++) memcpy(&c[r], C[i + r], 32);
        for (int k = 0; k < K; k++) {
            v8 b;
            memcpy(&b, B[k], 32);
            for (int r = 0; r < 4; r++) c[r] += A[i + r][k] * b;
        }
        for (int r = 0; r < 4; r++) memcpy(C[i + r], &c[r], 32);
    }
    for (int l = 0; l < 32; l++) {
        int g = l / 4, t = l % 4 * 2;
        float* d = static_cast<Mma*>(lanes[l])->d;
        d[0] = C[g][t], d[1] = C[g][t + 1], d[2] = C[g + 8][t], d[3] = C[g + 8][t + 1];
    }
}
void mma_bf16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
    Mma mine{d, a, b0, b1};
    collective(0xffffffffu, OP_MMA_BF16, &mine, [](void** lanes, uint32_t) {
        alignas(32) float A[16][16], B[16][8];
        for (int l = 0; l < 32; l++) {
            int g = l / 4, t = l % 4 * 2;
            const Mma& x = *static_cast<Mma*>(lanes[l]);
            for (int i = 0; i < 4; i++) {
                float* p = &A[g + (i & 1) * 8][t + (i >> 1) * 8];
                p[0] = low(x.a[i]), p[1] = high(x.a[i]);
            }
            B[t][g] = low(x.b0), B[t + 1][g] = high(x.b0), B[t + 8][g] = low(x.b1), B[t + 9][g] = high(x.b1);
        }
        multiply<16>(lanes, A, B);
    });
}
void mma_tf32(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
    Mma mine{d, a, b0, b1};
    collective(0xffffffffu, OP_MMA_TF32, &mine, [](void** lanes, uint32_t) {
        alignas(32) float A[16][16] = {}, B[16][8];
        for (int l = 0; l < 32; l++) {
            int g = l / 4, t = l % 4;
            const Mma& x = *static_cast<Mma*>(lanes[l]);
            A[g][t] = tf32(x.a[0]), A[g + 8][t] = tf32(x.a[1]), A[g][t + 4] = tf32(x.a[2]), A[g + 8][t + 4] = tf32(x.a[3]);
            B[t][g] = tf32(x.b0), B[t + 4][g] = tf32(x.b1);
        }
        multiply<8>(lanes, A, B);
    });
}
}  // namespace emu
