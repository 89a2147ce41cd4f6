// Products of values that never leave the multiprocessor: the rates that no kernel can pass.
//   out: (grid) sums, so that nothing is optimised away; rounds: turns of the inner loop.
// mma_rate: 16 products of 16 x 8 x 16 per warp and round, in 16 independent sums.   2 * 2048 * 16 FLOPs per warp and round.
// wgmma_rate (Hopper): 4 products of 64 x 256 x 16 per warpgroup and round, operands in shared memory.
// node, node_overlapped (Hopper): nothing but being started: the gap between the nodes of a graph.   x: (32) += 1.
// wgmma_shifted (Hopper): a product whose first operand begins at any row of a swizzled tile, as a halo of pixels needs it.
#include "ptx.cuh"

extern "C" __global__ void __launch_bounds__(256) mma_rate(float* out, int rounds) {
    float d[16][4] = {};
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = threadIdx.x * 3 + i;
    for (int r = 0; r < rounds; r++) {
#pragma unroll
        for (int i = 0; i < 16; i++) mma_bf16_16816(d[i], a, i, r);
    }
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 16; i++) sum += d[i][0] + d[i][1] + d[i][2] + d[i][3];
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(256) wgmma_rate(float* out, int rounds) {
    SMEM_DYN(smem);
    bf16* a = smem.take<bf16>(2 * 64 * 64, 1024);
    bf16* b = smem.take<bf16>(256 * 64, 1024);
    for (int i = threadIdx.x; i < 2 * 64 * 64; i += 256) a[i] = from_float<bf16>(1.0f);
    for (int i = threadIdx.x; i < 256 * 64; i += 256) b[i] = from_float<bf16>(0.5f);
    tma_store_fence();
    __syncthreads();
    uint64_t da = wgmma_descriptor_k128(a + threadIdx.x / 128 * 64 * 64), db = wgmma_descriptor_k128(b);
    float d[128] = {};
    for (int r = 0; r < rounds; r++) {
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++) wgmma<256>(d, da + k * 2, db + k * 2, 1);
        wgmma_commit();
        wgmma_wait<0>();
    }
    if (threadIdx.x == 0) out[blockIdx.x] = d[0];
}

extern "C" __global__ void __launch_bounds__(32) node(float* x) { x[threadIdx.x] += 1; }

extern "C" __global__ void __launch_bounds__(32) node_overlapped(float* x) {
    grid_launch_next();
    grid_wait();
    x[threadIdx.x] += 1;
}

// c (64, 64) = rows shift .. shift + 63 of a (72, 64) times b (64, 64)^T. `base` is the base offset of a's descriptor.
extern "C" __global__ void __launch_bounds__(128) wgmma_shifted(float* c, const bf16* __restrict__ a, const bf16* __restrict__ b, int shift, int base) {
    SMEM_DYN(smem);
    bf16* sa = smem.take<bf16>(72 * 64, 1024);
    bf16* sb = smem.take<bf16>(64 * 64, 1024);
    // 128-byte swizzle: the 16-byte chunk j of row r lies where chunk j ^ (r % 8) would.
    for (int i = threadIdx.x; i < 72 * 64; i += 128) sa[i ^ (i / 64 % 8) * 8] = a[i];
    for (int i = threadIdx.x; i < 64 * 64; i += 128) sb[i ^ (i / 64 % 8) * 8] = b[i];
    tma_store_fence();
    __syncthreads();
    float d[32];
    uint64_t da = wgmma_descriptor_k128(sa + shift * 64) | uint64_t(base) << 49, db = wgmma_descriptor_k128(sb);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma<64>(d, da + k * 2, db + k * 2, k > 0);
    wgmma_commit();
    wgmma_wait<0>();
    int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, t = threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < 8; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) c[(row + i / 2 * 8) * 64 + j * 8 + t + i % 2] = d[j * 4 + i];
    }
}
