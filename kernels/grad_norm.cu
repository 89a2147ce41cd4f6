// Euclidean norm of the flat gradient, in two launches.   src/ops/grad_norm.rs
//   x: (len) f32 -> partials: one f64 per CHUNK elements -> norm: (1) f32.
// Moves 4 bytes per element: memory bound. The partition is fixed and every sum a fixed tree, so the norm does not depend on the grid;
// f64, so that gradients of 1e-25 or 1e25 neither vanish nor overflow when squared. Error: the rounding of the result, 6e-8.
#include "image.cuh"

#define CHUNK 16384

// Adds v over the block in a fixed tree; the sum is in thread 0.
DEV double block_sum(double v) {
    SMEM(double, sums, [THREADS / 32]);
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) v += __shfl_xor_sync(FULL_MASK, v, mask);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
    __syncthreads();
    double all = 0.0;
    if (threadIdx.x == 0) {
        for (int w = 0; w < THREADS / 32; w++) all += sums[w];
    }
    __syncthreads();
    return all;
}

extern "C" __global__ void __launch_bounds__(THREADS) grad_norm_partial(double* partials, const float* x, int64_t len) {
    int64_t chunks = (len + CHUNK - 1) / CHUNK;
    for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        const float* from = x + chunk * CHUNK;
        int count = int(min(len - chunk * CHUNK, int64_t(CHUNK))), wide = aligned(x) ? count / 4 : 0;
        double sum = 0.0;
#pragma unroll 4
        for (int i = threadIdx.x; i < wide; i += THREADS) {
            Vec<float, 4> v = reinterpret_cast<const Vec<float, 4>*>(from)[i];
#pragma unroll
            for (int k = 0; k < 4; k++) sum += double(v[k]) * double(v[k]);
        }
        for (int i = 4 * wide + threadIdx.x; i < count; i += THREADS) sum += double(from[i]) * double(from[i]);
        sum = block_sum(sum);
        if (threadIdx.x == 0) partials[chunk] = sum;
    }
}

// loss: (images), or null. With it a norm that is not finite stays so, and a loss that is not finite makes it so.
extern "C" __global__ void __launch_bounds__(THREADS)
    grad_norm(float* norm, const double* partials, int64_t chunks, const float* loss, int64_t images) {
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < chunks; i += THREADS) sum += partials[i];
    for (int64_t i = threadIdx.x; i < images; i += THREADS) {
        if (!isfinite(loss[i])) sum = NAN;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0 && (!loss || isfinite(norm[0]))) norm[0] = float(sqrt(sum));
}
