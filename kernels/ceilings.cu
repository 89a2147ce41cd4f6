// Products of values that never leave the multiprocessor: the rates that no kernel can pass.
//   out: (grid) sums, so that nothing is optimised away; rounds: turns of the inner loop.
// mma_rate: 16 products of 16 x 8 x 16 per warp and round, in 16 independent sums.   2 * 2048 * 16 FLOPs per warp and round.
// wgmma_rate (Hopper): 4 products of 64 x 256 x 16 per warpgroup and round, operands in shared memory.
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
