// One small kernel for each of ptx.cuh's functions from sm_90 on: bulk copies, clusters, products of a warpgroup.
#include "ptx.cuh"

// Copies the box at (c0, c1) of a 2-D bf16 tensor through shared memory to `out`, as it lies there.   out: bytes / 2
extern "C" __global__ void __launch_bounds__(128) test_tma_tile(bf16* out, const __grid_constant__ TensorMap map, int c0, int c1, int n) {
    SMEM_DYN(smem);
    bf16* tile = smem.take<bf16>(n, 1024);
    SMEM(uint64_t, bar, [1]);
    if (threadIdx.x == 0) {
        tma_prefetch(&map);
        mbar_init(bar, 1);
        mbar_fence_init();
        mbar_arrive_expect_tx(bar, n * 2);
        tma_load_2d(tile, &map, bar, c0, c1);
    }
    __syncthreads();
    mbar_wait(bar, 0);
    for (int i = threadIdx.x; i < n; i += 128) out[i] = tile[i];
}

// The same for the pixels of a filter tap.
extern "C" __global__ void __launch_bounds__(128) test_tma_im2col(bf16* out, const __grid_constant__ TensorMap map, int c, int w, int h, int image,
                                                                  int offset_w, int offset_h, int n) {
    SMEM_DYN(smem);
    bf16* tile = smem.take<bf16>(n, 1024);
    SMEM(uint64_t, bar, [1]);
    if (threadIdx.x == 0) {
        mbar_init(bar, 1);
        mbar_fence_init();
        mbar_arrive_expect_tx(bar, n * 2);
        tma_load_im2col_4d(tile, &map, bar, c, w, h, image, uint16_t(offset_w), uint16_t(offset_h));
    }
    __syncthreads();
    mbar_wait(bar, 0);
    for (int i = threadIdx.x; i < n; i += 128) out[i] = tile[i];
}

// Stores a tile of 8 x 64 ramp values at (c0, c1) of a 2-D tensor.
extern "C" __global__ void __launch_bounds__(128) test_tma_store(const __grid_constant__ TensorMap map, int c0, int c1) {
    SMEM_DYN(smem);
    bf16* tile = smem.take<bf16>(512, 1024);
    for (int i = threadIdx.x; i < 512; i += 128) tile[i] = from_float<bf16>(float(i % 256));
    tma_store_fence();
    __syncthreads();
    if (threadIdx.x == 0) {
        tma_store_2d(&map, tile, c0, c1);
        tma_store_commit();
        tma_store_wait<0>();
    }
}

// Clusters of 2: block 0 loads rows 0.. for both (multicast), each adds its rank and writes into the other's shared memory.
//   out: (grid, 512) = tile + rank of the sender, and the peer's arrivals counted through a remote mbarrier.
extern "C" __global__ void __launch_bounds__(128) test_cluster(float* out, const __grid_constant__ TensorMap map) {
    SMEM_DYN(smem);
    bf16* tile = smem.take<bf16>(512, 1024);
    float* inbox = smem.take<float>(512);
    SMEM(uint64_t, bar, [2]);
    uint32_t rank = cluster_rank();
    if (threadIdx.x == 0) {
        mbar_init(&bar[0], 1);
        mbar_init(&bar[1], 128);
        mbar_fence_init();
        mbar_arrive_expect_tx(&bar[0], 1024);
    }
    cluster_sync();
    if (rank == 0 && threadIdx.x == 0) tma_load_2d_multicast(tile, &map, &bar[0], 0, 8 * int(blockIdx.x / 2), 3);
    mbar_wait(&bar[0], 0);
    float* peer = cluster_map(inbox, rank ^ 1);
    for (int i = threadIdx.x; i < 512; i += 128) peer[i] = to_float(tile[i]) + float(rank);
    mbar_arrive_remote(&bar[1], rank ^ 1);
    mbar_wait_cluster(&bar[1], 0);
    for (int i = threadIdx.x; i < 512; i += 128) out[blockIdx.x * 512 + i] = inbox[i];
    cluster_sync();
}

// c (64, N) = a (64, 64) b (N, 64)^T, from shared memory with a 128-byte swizzle, or with a in registers.
template <int N, bool REGISTERS> DEV void product(float* c, const bf16* a, const TensorMap& ma, const TensorMap& mb) {
    SMEM_DYN(smem);
    bf16* sa = smem.take<bf16>(64 * 64, 1024);
    bf16* sb = smem.take<bf16>(N * 64, 1024);
    SMEM(uint64_t, bar, [1]);
    if (threadIdx.x == 0) {
        mbar_init(bar, 1);
        mbar_fence_init();
        mbar_arrive_expect_tx(bar, (64 + N) * 128);
        tma_load_2d(sa, &ma, bar, 0, 0);
        tma_load_2d(sb, &mb, bar, 0, 0);
    }
    __syncthreads();
    mbar_wait(bar, 0);
    float d[N / 2];
    int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, t = threadIdx.x % 4 * 2;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) {
        uint64_t da = wgmma_descriptor_k128(sa) + k * 2, db = wgmma_descriptor_k128(sb) + k * 2;
        if constexpr (REGISTERS) {
            uint32_t r[4];
            for (int i = 0; i < 4; i++) r[i] = *reinterpret_cast<const uint32_t*>(a + (row + (i & 1) * 8) * 64 + k * 16 + t + (i >> 1) * 8);
            wgmma_fence();  // the registers were written since the last one
            wgmma<N>(d, r, db, k > 0);
        } else {
            wgmma<N>(d, da, db, k > 0);
        }
    }
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) c[(row + i / 2 * 8) * N + j * 8 + t + i % 2] = d[j * 4 + i];
    }
}
#define PRODUCT(N)                                                                                                            \
    extern "C" __global__ void __launch_bounds__(128) test_wgmma_##N(float* c, const bf16* a, const __grid_constant__ TensorMap ma, \
                                                                     const __grid_constant__ TensorMap mb) {                  \
        product<N, false>(c, a, ma, mb);                                                                                      \
    }                                                                                                                         \
    extern "C" __global__ void __launch_bounds__(128) test_wgmma_registers_##N(float* c, const bf16* a,                       \
                                                                               const __grid_constant__ TensorMap ma,          \
                                                                               const __grid_constant__ TensorMap mb) {        \
        product<N, true>(c, a, ma, mb);                                                                                       \
    }
PRODUCT(8)
PRODUCT(64)
PRODUCT(256)

// The same product with both operands MN-major: a lies as (k, 64), b as (k, 64); N = 64.
extern "C" __global__ void __launch_bounds__(128) test_wgmma_mn(float* c, const __grid_constant__ TensorMap ma, const __grid_constant__ TensorMap mb) {
    SMEM_DYN(smem);
    bf16* sa = smem.take<bf16>(64 * 64, 1024);
    bf16* sb = smem.take<bf16>(64 * 64, 1024);
    SMEM(uint64_t, bar, [1]);
    if (threadIdx.x == 0) {
        mbar_init(bar, 1);
        mbar_fence_init();
        mbar_arrive_expect_tx(bar, 128 * 128);
        tma_load_2d(sa, &ma, bar, 0, 0);
        tma_load_2d(sb, &mb, bar, 0, 0);
    }
    __syncthreads();
    mbar_wait(bar, 0);
    float d[32];
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) {
        // 16 rows of k are 2 groups of 8 rows of 128 bytes.
        uint64_t step = uint64_t(k) * (2048 >> 4);
        wgmma<64, 1, 1>(d, wgmma_descriptor(sa, 8192, 1024, 1) + step, wgmma_descriptor(sb, 8192, 1024, 1) + step, k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, t = threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < 8; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) c[(row + i / 2 * 8) * 64 + j * 8 + t + i % 2] = d[j * 4 + i];
    }
}
