// The emulator's twins of the functions in ptx.cuh. What they mean is said there; where they differ from the hardware is said in
// docs/emulator.md.
#pragma once
#include "cuda_emu.h"

#define shared_u32(p) (emu::shared_address(p))
struct alignas(128) TensorMap { uint64_t opaque[16]; };

namespace emu {
void cp_async(void* dst, const void* src, int bytes, int valid);
void cp_async_commit();
void cp_async_wait(unsigned pending);
void ldmatrix(uint32_t* r, int matrices, const void* row, bool transposed);
void mma_bf16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1);
void mma_tf32(float* d, const uint32_t* a, uint32_t b0, uint32_t b1);

void mbar_init(uint64_t* bar, int count);
void mbar_arrive(uint64_t* bar, uint32_t tx_bytes, int rank);  // rank -1: this block
bool mbar_try_wait(uint64_t* bar, uint32_t parity);
struct TmaCoordinates { int c[5]; int rank; bool im2col; uint16_t offset_w, offset_h, blocks; };  // blocks 0: this one
void tma_load(void* dst, const TensorMap* map, uint64_t* bar, TmaCoordinates at);
void tma_store(const TensorMap* map, const void* src, TmaCoordinates at);
void tma_store_commit();
void tma_store_wait(unsigned pending);
uint32_t cluster_rank();
void cluster_arrive();
void cluster_wait();
void* cluster_map(void* p, uint32_t rank);
void wgmma(float* d, int n, const uint32_t* registers, uint64_t a, uint64_t b, int accumulate, int a_mn, int b_mn);
void wgmma_commit();
void wgmma_wait(unsigned pending);
}  // namespace emu

// Inlined into the kernel: the runtime tells instructions apart by their return address.
template <int BYTES> __attribute__((always_inline)) inline void cp_async(void* dst, const void* src, int valid = BYTES) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
    emu::cp_async(dst, src, BYTES, valid);
}
__attribute__((always_inline)) inline void cp_async16(void* dst, const void* src, int valid = 16) { cp_async<16>(dst, src, valid); }
inline void cp_async_commit() { emu::cp_async_commit(); }
template <int N> inline void cp_async_wait() { emu::cp_async_wait(N); }
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { emu::ldmatrix(r, 4, row, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { emu::ldmatrix(r, 4, row, true); }
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row) { emu::ldmatrix(r, 2, row, false); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) { emu::ldmatrix(r, 2, row, true); }
inline void mma_bf16_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { emu::mma_bf16(d, a, b0, b1); }
inline void mma_tf32_1688(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { emu::mma_tf32(d, a, b0, b1); }
inline uint32_t to_tf32(float x) {
    uint32_t u = emu_bits<uint32_t>(x);
    return (u & 0x7fffffffu) >= 0x7f800000u ? u : (u + 0x1000u) & 0xffffe000u;
}
inline float exp2_approx(float x) {
    float y = emu::off_by(2, exp2f(x));
    return y < 0x1p-126f ? 0.0f : y;
}
#define named_barrier_sync(id, threads) ((void)emu::barrier(id, threads, __FILE__, __LINE__, true, 0))
#define named_barrier_arrive(id, threads) ((void)emu::barrier(id, threads, __FILE__, __LINE__, false, 0))

inline void mbar_init(uint64_t* bar, int count) { emu::mbar_init(bar, count); }
inline void mbar_fence_init() {}
inline void mbar_arrive(uint64_t* bar) { emu::mbar_arrive(bar, 0, -1); }
inline void mbar_arrive_expect_tx(uint64_t* bar, uint32_t bytes) { emu::mbar_arrive(bar, bytes, -1); }
inline void mbar_arrive_remote(uint64_t* bar, uint32_t rank) { emu::mbar_arrive(bar, 0, int(rank)); }
inline bool mbar_try_wait(uint64_t* bar, uint32_t parity) { return emu::mbar_try_wait(bar, parity); }
inline void mbar_wait(uint64_t* bar, uint32_t parity) {
    while (!emu::mbar_try_wait(bar, parity)) {}
}
inline void mbar_wait_cluster(uint64_t* bar, uint32_t parity) { mbar_wait(bar, parity); }

inline void tma_prefetch(const TensorMap*) {}
inline void tma_load_2d(void* dst, const TensorMap* map, uint64_t* bar, int c0, int c1) {
    emu::tma_load(dst, map, bar, {{c0, c1}, 2, false, 0, 0, 0});
}
inline void tma_load_4d(void* dst, const TensorMap* map, uint64_t* bar, int c0, int c1, int c2, int c3) {
    emu::tma_load(dst, map, bar, {{c0, c1, c2, c3}, 4, false, 0, 0, 0});
}
inline void tma_load_im2col_4d(void* dst, const TensorMap* map, uint64_t* bar, int c, int w, int h, int n, uint16_t offset_w, uint16_t offset_h) {
    emu::tma_load(dst, map, bar, {{c, w, h, n}, 4, true, offset_w, offset_h, 0});
}
inline void tma_load_2d_multicast(void* dst, const TensorMap* map, uint64_t* bar, int c0, int c1, uint16_t blocks) {
    emu::tma_load(dst, map, bar, {{c0, c1}, 2, false, 0, 0, blocks});
}
inline void tma_load_im2col_4d_multicast(void* dst, const TensorMap* map, uint64_t* bar, int c, int w, int h, int n, uint16_t offset_w, uint16_t offset_h, uint16_t blocks) {
    emu::tma_load(dst, map, bar, {{c, w, h, n}, 4, true, offset_w, offset_h, blocks});
}
inline void tma_store_fence() {}
inline void tma_store_2d(const TensorMap* map, const void* src, int c0, int c1) { emu::tma_store(map, src, {{c0, c1}, 2, false, 0, 0, 0}); }
inline void tma_store_commit() { emu::tma_store_commit(); }
template <int N> inline void tma_store_wait_read() { emu::tma_store_wait(N); }
template <int N> inline void tma_store_wait() { emu::tma_store_wait(N); }

inline void grid_launch_next() {}  // launches run one after the other
inline void grid_wait() {}
inline uint32_t cluster_rank() { return emu::cluster_rank(); }
inline void cluster_arrive() { emu::cluster_arrive(); }
inline void cluster_wait() { emu::cluster_wait(); }
inline void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}
template <class T> inline T* cluster_map(T* p, uint32_t rank) { return static_cast<T*>(emu::cluster_map(p, rank)); }

inline void wgmma_fence() {}
inline void wgmma_commit() { emu::wgmma_commit(); }
template <int N> inline void wgmma_wait() { emu::wgmma_wait(N); }
template <int R> inline void registers_increase() {}
template <int R> inline void registers_decrease() {}
template <int N, int A_MN = 0, int B_MN = 0> inline void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
    static_assert(N % 8 == 0 && N >= 8 && N <= 256);
    emu::wgmma(d, N, nullptr, a, b, accumulate, A_MN, B_MN);
}
template <int N, int B_MN = 0> inline void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    static_assert(N % 8 == 0 && N >= 8 && N <= 256);
    emu::wgmma(d, N, a, 0, b, accumulate, 0, B_MN);
}
