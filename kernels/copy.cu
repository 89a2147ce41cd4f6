// Copy, 16 bytes a thread and step: the memory ceiling every other kernel is held against.
//   dst, src: n16 words of 16 bytes, 16-byte aligned.   Moves 2 * 16 * n16 bytes: memory bound.
// The grid is a fixed multiple of the multiprocessors and strides over the words, so that one launch fills the device.
// read_16 only reads, and leaves the exclusive or of each block's words in out: (grid).   Moves 16 * n16 bytes.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256) copy_16(uint4* __restrict__ dst, const uint4* __restrict__ src,
                                                          int64_t n16) {
    int64_t stride = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n16; i += stride) {
        dst[i] = src[i];
    }
}

extern "C" __global__ void __launch_bounds__(256) read_16(uint32_t* __restrict__ out, const uint4* __restrict__ src, int64_t n16) {
    int64_t stride = (int64_t)gridDim.x * blockDim.x;
    uint32_t all = 0;
#pragma unroll 4
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n16; i += stride) {
        uint4 x = src[i];
        all ^= x.x ^ x.y ^ x.z ^ x.w;
    }
    SMEM(uint32_t, warp, [8]);
    for (int lane = 16; lane; lane /= 2) all ^= __shfl_xor_sync(~0u, all, lane);
    if (threadIdx.x % 32 == 0) warp[threadIdx.x / 32] = all;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < 8; i++) all ^= warp[i];
        out[blockIdx.x] = all;
    }
}
