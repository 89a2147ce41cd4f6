// Every PTX instruction the kernels use, one function each; the emulator's twins of the same names are in emu/ptx_emu.h.
//
// Pointers are generic. What needs a newer architecture than the one being compiled traps: such a kernel is compiled
// everywhere and launched only where it runs (mma.sync and cp.async: sm_80; mbarrier, TMA, clusters: sm_90; wgmma: sm_90a).
#pragma once
#include "common.cuh"

#ifdef IDDPM_EMULATOR
#include "emu/ptx_emu.h"
#else

#if __CUDA_ARCH__ >= 900
#define PTX_SM90(...) __VA_ARGS__
#else
#define PTX_SM90(...) __trap()
#endif
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define PTX_SM90A(...) __VA_ARGS__
#else
#define PTX_SM90A(...) __trap()
#endif

DEV uint32_t shared_u32(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- sm_80: asynchronous copies to shared memory, matrix loads, products of one warp ----

// Copies BYTES (4, 8 or 16) of which `valid` come from src and the rest are zero; both addresses are multiples of BYTES.
template <int BYTES> DEV void cp_async(void* dst, const void* src, int valid = BYTES) {
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_u32(dst)), "l"(src), "r"(valid) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(shared_u32(dst)), "l"(src), "r"(valid), "n"(BYTES) : "memory");
    }
}
DEV void cp_async16(void* dst, const void* src, int valid = 16) { cp_async<16>(dst, src, valid); }
DEV void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's committed groups are under way.
template <int N> DEV void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Matrices of 8 x 8 b16: lane 8i + r gives the address of row r of matrix i; register i of lane l holds elements (l/4, 2(l%4))
// and the next one, or, transposed, (2(l%4), l/4) and the one below.
DEV void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_u32(row)) : "memory");
}
DEV void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_u32(row)) : "memory");
}
DEV void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(shared_u32(row)) : "memory");
}
DEV void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(shared_u32(row)) : "memory");
}

// d (16 x 8, f32) += a (16 x 16, bf16, rows) b (16 x 8, bf16, columns). With g = lane/4, t = lane%4:
// a: (g, 2t..) (g+8, 2t..) (g, 2t+8..) (g+8, 2t+8..);  b: (2t.., g) (2t+8.., g);  d: (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1).
DEV void mma_bf16_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same with k = 8 and tf32: a: (g, t) (g+8, t) (g, t+4) (g+8, t+4);  b: (t, g) (t+4, g).
DEV void mma_tf32_1688(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// f32 to tf32 (10 bits of mantissa), to nearest, ties away from zero.
DEV uint32_t to_tf32(float x) {
    uint32_t r;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
    return r;
}

// 2^x to 2 ulp, one instruction; below 2^-126 it is 0.
DEV float exp2_approx(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// Barriers 1 to 15 for whole warps of a block: `threads` counts those that arrive and those that wait.
DEV void named_barrier_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEV void named_barrier_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// ---- sm_90: barriers in shared memory (mbarrier) ----
typedef CUtensorMap TensorMap;

DEV void mbar_init(uint64_t* bar, int count) {
    PTX_SM90(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_u32(bar)), "r"(count) : "memory"));
}
// After the inits, before the block (or cluster) barrier that lets others use them.
DEV void mbar_fence_init() { PTX_SM90(asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async;" ::: "memory")); }
DEV void mbar_arrive(uint64_t* bar) {
    PTX_SM90(asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_u32(bar)) : "memory"));
}
DEV void mbar_arrive_expect_tx(uint64_t* bar, uint32_t bytes) {
    PTX_SM90(asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_u32(bar)), "r"(bytes) : "memory"));
}
// Arrives at the barrier of the same offset in block `rank` of the cluster.
DEV void mbar_arrive_remote(uint64_t* bar, uint32_t rank) {
    PTX_SM90(asm volatile("{.reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;\n"
                          "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];}"
                          ::"r"(shared_u32(bar)), "r"(rank) : "memory"));
}
// Has the phase of this parity ended?
DEV bool mbar_try_wait(uint64_t* bar, uint32_t parity) {
    uint32_t done = 0;
    PTX_SM90(asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                          : "=r"(done) : "r"(shared_u32(bar)), "r"(parity) : "memory"));
    return done;
}
DEV void mbar_wait(uint64_t* bar, uint32_t parity) {
    while (!mbar_try_wait(bar, parity)) {}
}
// Also sees what other blocks of the cluster wrote before they arrived.
DEV void mbar_wait_cluster(uint64_t* bar, uint32_t parity) {
    uint32_t done = 0;
    while (!done) {
        PTX_SM90(asm volatile("{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                              : "=r"(done) : "r"(shared_u32(bar)), "r"(parity) : "memory"));
    }
}

// ---- sm_90: bulk tensor copies (TMA); dst is 128-byte aligned (1024 with a 128-byte swizzle) ----
DEV void tma_prefetch(const TensorMap* map) { PTX_SM90(asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory")); }
DEV void tma_load_2d(void* dst, const TensorMap* map, uint64_t* bar, int c0, int c1) {
    PTX_SM90(asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4}], [%2];"
                          ::"r"(shared_u32(dst)), "l"(map), "r"(shared_u32(bar)), "r"(c0), "r"(c1) : "memory"));
}
DEV void tma_load_4d(void* dst, const TensorMap* map, uint64_t* bar, int c0, int c1, int c2, int c3) {
    PTX_SM90(asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5,%6}], [%2];"
                          ::"r"(shared_u32(dst)), "l"(map), "r"(shared_u32(bar)), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory"));
}
// Pixels from (w, h, n) on, each moved by the filter tap (offset_w, offset_h).
DEV void tma_load_im2col_4d(void* dst, const TensorMap* map, uint64_t* bar, int c, int w, int h, int n, uint16_t offset_w, uint16_t offset_h) {
    PTX_SM90(asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5,%6}], [%2], {%7,%8};"
                          ::"r"(shared_u32(dst)), "l"(map), "r"(shared_u32(bar)), "r"(c), "r"(w), "r"(h), "r"(n), "h"(offset_w), "h"(offset_h) : "memory"));
}
// To the same offset in every block of the cluster named in `blocks`, each told through its own barrier at bar's offset.
DEV void tma_load_2d_multicast(void* dst, const TensorMap* map, uint64_t* bar, int c0, int c1, uint16_t blocks) {
    PTX_SM90A(asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3,%4}], [%2], %5;"
                          ::"r"(shared_u32(dst)), "l"(map), "r"(shared_u32(bar)), "r"(c0), "r"(c1), "h"(blocks) : "memory"));
}
DEV void tma_load_im2col_4d_multicast(void* dst, const TensorMap* map, uint64_t* bar, int c, int w, int h, int n, uint16_t offset_w, uint16_t offset_h, uint16_t blocks) {
    PTX_SM90A(asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3,%4,%5,%6}], [%2], {%7,%8}, %9;"
                          ::"r"(shared_u32(dst)), "l"(map), "r"(shared_u32(bar)), "r"(c), "r"(w), "r"(h), "r"(n), "h"(offset_w), "h"(offset_h), "h"(blocks) : "memory"));
}
// Shared to global. What the threads wrote must be made visible first: tma_store_fence, then a barrier, then one thread stores.
DEV void tma_store_fence() { PTX_SM90(asm volatile("fence.proxy.async.shared::cta;" ::: "memory")); }
DEV void tma_store_2d(const TensorMap* map, const void* src, int c0, int c1) {
    PTX_SM90(asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2,%3}], [%1];"
                          ::"l"(map), "r"(shared_u32(src)), "r"(c0), "r"(c1) : "memory"));
}
DEV void tma_store_commit() { PTX_SM90(asm volatile("cp.async.bulk.commit_group;" ::: "memory")); }
// Waits until at most N groups still read shared memory.
template <int N> DEV void tma_store_wait_read() { PTX_SM90(asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory")); }
template <int N> DEV void tma_store_wait() { PTX_SM90(asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory")); }

// ---- sm_90: a kernel launched with `overlap` starts while the one before it still runs ----
DEV void grid_launch_next() { PTX_SM90(asm volatile("griddepcontrol.launch_dependents;" ::: "memory")); }  // the next one may start
DEV void grid_wait() { PTX_SM90(asm volatile("griddepcontrol.wait;" ::: "memory")); }  // until all before have ended

// ---- sm_90: clusters ----
DEV uint32_t cluster_rank() {
    uint32_t r = 0;
    PTX_SM90(asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)));
    return r;
}
DEV void cluster_arrive() { PTX_SM90(asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory")); }
DEV void cluster_wait() { PTX_SM90(asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory")); }
DEV void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}
// The address of the same shared variable in block `rank` of the cluster.
template <class T> DEV T* cluster_map(T* p, uint32_t rank) {
    uint64_t r = 0;
    PTX_SM90(asm volatile("mapa.u64 %0, %1, %2;" : "=l"(r) : "l"(p), "r"(rank)));
    return reinterpret_cast<T*>(r);
}

// ---- sm_90a: products of a warpgroup ----
DEV void wgmma_fence() { PTX_SM90A(asm volatile("wgmma.fence.sync.aligned;" ::: "memory")); }
DEV void wgmma_commit() { PTX_SM90A(asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory")); }
template <int N> DEV void wgmma_wait() { PTX_SM90A(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory")); }
template <int R> DEV void registers_increase() { PTX_SM90A(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(R))); }
template <int R> DEV void registers_decrease() { PTX_SM90A(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(R))); }

#define WGMMA_D4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define WGMMA_D8(i) WGMMA_D4(i), WGMMA_D4((i) + 4)
#define WGMMA_D16(i) WGMMA_D8(i), WGMMA_D8((i) + 8)
#define WGMMA_D32(i) WGMMA_D16(i), WGMMA_D16((i) + 16)
#define WGMMA_D64(i) WGMMA_D32(i), WGMMA_D32((i) + 32)

#define WGMMA_LIST8 \
    "%0,%1,%2,%3"
#define WGMMA_LIST16 \
    "%0,%1,%2,%3,%4,%5,%6,%7"
#define WGMMA_LIST32 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define WGMMA_LIST64 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define WGMMA_LIST96 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
    "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define WGMMA_LIST128 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
    "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define WGMMA_LIST192 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
    "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63," \
    "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define WGMMA_LIST256 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
    "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63," \
    "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95," \
    "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

#define WGMMA_SHARED(N, A, B, P, TA, TB, ...)                                                                             \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #P ", 0;\n"                                                           \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WGMMA_LIST##N "}, %" #A ", %" #B           \
                 ", p, 1, 1, %" #TA ", %" #TB ";}"                                                                       \
                 : __VA_ARGS__ : "l"(a), "l"(b), "r"(accumulate), "n"(A_MN), "n"(B_MN))
#define WGMMA_REGISTERS(N, A0, A1, A2, A3, B, P, TB, ...)                                                                 \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #P ", 0;\n"                                                           \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WGMMA_LIST##N "}, {%" #A0 ",%" #A1         \
                 ",%" #A2 ",%" #A3 "}, %" #B ", p, 1, 1, %" #TB ";}"                                                     \
                 : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(B_MN))


// d (64 x N, f32) = [d +] a (64 x 16) b (N x 16)^T, bf16, from shared memory; A_MN, B_MN: 1 when the operand lies with its rows (m
// or n) contiguous instead of k. Row 16 w + g of warp w: d[4j] (2t + 8j), d[4j + 1], and row + 8: d[4j + 2], d[4j + 3].
template <int N, int A_MN = 0, int B_MN = 0> DEV void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
    static_assert(N == 8 || N == 16 || N == 32 || N == 64 || N == 96 || N == 128 || N == 192 || N == 256, "wgmma: no instance for this N");
    if constexpr (N == 8) { PTX_SM90A(WGMMA_SHARED(8, 4, 5, 6, 7, 8, WGMMA_D4(0))); }
    else if constexpr (N == 16) { PTX_SM90A(WGMMA_SHARED(16, 8, 9, 10, 11, 12, WGMMA_D8(0))); }
    else if constexpr (N == 32) { PTX_SM90A(WGMMA_SHARED(32, 16, 17, 18, 19, 20, WGMMA_D16(0))); }
    else if constexpr (N == 64) { PTX_SM90A(WGMMA_SHARED(64, 32, 33, 34, 35, 36, WGMMA_D32(0))); }
    else if constexpr (N == 96) { PTX_SM90A(WGMMA_SHARED(96, 48, 49, 50, 51, 52, WGMMA_D32(0), WGMMA_D16(32))); }
    else if constexpr (N == 128) { PTX_SM90A(WGMMA_SHARED(128, 64, 65, 66, 67, 68, WGMMA_D64(0))); }
    else if constexpr (N == 192) { PTX_SM90A(WGMMA_SHARED(192, 96, 97, 98, 99, 100, WGMMA_D64(0), WGMMA_D32(64))); }
    else if constexpr (N == 256) { PTX_SM90A(WGMMA_SHARED(256, 128, 129, 130, 131, 132, WGMMA_D64(0), WGMMA_D64(64))); }
}
// The same with a in registers, as mma_bf16_16816 holds it: rows 16 w .. of warp w.
template <int N, int B_MN = 0> DEV void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    if constexpr (N == 8) { PTX_SM90A(WGMMA_REGISTERS(8, 4, 5, 6, 7, 8, 9, 10, WGMMA_D4(0))); }
    else if constexpr (N == 16) { PTX_SM90A(WGMMA_REGISTERS(16, 8, 9, 10, 11, 12, 13, 14, WGMMA_D8(0))); }
    else if constexpr (N == 32) { PTX_SM90A(WGMMA_REGISTERS(32, 16, 17, 18, 19, 20, 21, 22, WGMMA_D16(0))); }
    else if constexpr (N == 64) { PTX_SM90A(WGMMA_REGISTERS(64, 32, 33, 34, 35, 36, 37, 38, WGMMA_D32(0))); }
    else if constexpr (N == 96) { PTX_SM90A(WGMMA_REGISTERS(96, 48, 49, 50, 51, 52, 53, 54, WGMMA_D32(0), WGMMA_D16(32))); }
    else if constexpr (N == 128) { PTX_SM90A(WGMMA_REGISTERS(128, 64, 65, 66, 67, 68, 69, 70, WGMMA_D64(0))); }
    else if constexpr (N == 192) { PTX_SM90A(WGMMA_REGISTERS(192, 96, 97, 98, 99, 100, 101, 102, WGMMA_D64(0), WGMMA_D32(64))); }
    else if constexpr (N == 256) { PTX_SM90A(WGMMA_REGISTERS(256, 128, 129, 130, 131, 132, 133, 134, WGMMA_D64(0), WGMMA_D64(64))); }
}
#endif

// Describes a shared-memory operand to wgmma. swizzle: 0 none, 1 of 128, 2 of 64, 3 of 32 bytes; `leading` and `stride` are the
// byte offsets of the PTX manual. K-major with a 128-byte swizzle: rows of 128 bytes, leading unused (16), stride 1024.
DEV uint64_t wgmma_descriptor(const void* p, uint32_t leading, uint32_t stride, uint32_t swizzle) {
    return uint64_t(shared_u32(p) & 0x3FFFF) >> 4 | uint64_t(leading >> 4 & 0x3FFF) << 16 | uint64_t(stride >> 4 & 0x3FFF) << 32 |
           uint64_t(swizzle) << 62;
}
DEV uint64_t wgmma_descriptor_k128(const void* p) { return wgmma_descriptor(p, 16, 1024, 1); }
