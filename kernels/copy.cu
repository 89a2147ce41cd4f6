// Copy, 16 bytes a thread and step: the memory ceiling every other kernel is held against.
//   dst, src: n16 words of 16 bytes, 16-byte aligned.   Moves 2 * 16 * n16 bytes: memory bound.
// The grid is a fixed multiple of the multiprocessors and strides over the words, so that one launch fills the device.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256) copy_16(uint4* __restrict__ dst, const uint4* __restrict__ src,
                                                          int64_t n16) {
    int64_t stride = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n16; i += stride) {
        dst[i] = src[i];
    }
}
