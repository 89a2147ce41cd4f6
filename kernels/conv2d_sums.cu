// The small passes around the convolutions: partial sums of the weight gradient added in order, bias and time-shift gradients from
// row sums, and the weights of an upsampling convolution folded, f32 weights rounded where the plan
// has no bf16 copy of them.   Reference: src/ops/conv2d.rs; table: docs/kernels.md.
//
// Row r of the 4 x 4 window of an upsampling convolution holds the rows 2 - r and 3 - r of the 3 x 3, where they exist.
#include "common.cuh"

// dw[i] (+)= Σ_split partial[split][i];   with fold, dw (oc, 3, 3, c) from partial sums (oc, 4, 4, c).
extern "C" __global__ void __launch_bounds__(256)
    conv2d_weight_reduce(float* __restrict__ dw, const float* __restrict__ partial, int32_t splits, int64_t split_stride,
                         int64_t n, int32_t channels, int32_t fold, int32_t accumulate) {
    int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float sum = accumulate ? dw[i] : 0.0f;
    if (!fold) {
#pragma unroll 4
        for (int s = 0; s < splits; s++) sum += partial[s * split_stride + i];
    } else {
        int64_t c = i % channels, tap = i / channels % 9, o = i / channels / 9, row = 2 - tap / 3, col = 2 - tap % 3;
        for (int s = 0; s < splits; s++) {
            const float* from = partial + s * split_stride + ((o * 4 + row) * 4 + col) * channels + c;
            sum += (from[0] + from[channels]) + (from[4 * channels] + from[5 * channels]);
        }
    }
    dw[i] = sum;
}

// dshift[n, o] = Σ over the slots and segments of image n;  db[o] (+)= Σ_n dshift[n, o].   sums: (slots, images, parts, oc).
// A block of 32 x 8 threads takes 32 channels: eight threads share a channel's images and are added in order.
template <class T>
DEV void row_sums(float* db, T* dshift, const float* sums, int slots, int images, int parts, int oc, int shift_stride, int accumulate) {
    SMEM(float, total, [8][32]);
    constexpr int EACH = 4;  // images that a thread has under way
    int o = blockIdx.x * 32 + threadIdx.x;
    float all = 0.0f;
    for (int first = threadIdx.y; o < oc && first < images; first += 8 * EACH) {
        float sum[EACH] = {}, next[EACH];
        for (int slot = 0; slot < slots; slot++)
            for (int part = 0; part < parts; part++) {
#pragma unroll
                for (int i = 0; i < EACH; i++) {
                    int n = min(first + 8 * i, images - 1);
                    next[i] = sums[((int64_t(slot) * images + n) * parts + part) * oc + o];
                }
#pragma unroll
                for (int i = 0; i < EACH; i++) sum[i] += next[i];
            }
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int n = first + 8 * i;
            if (n >= images) break;
            if (dshift) dshift[int64_t(n) * shift_stride + o] = from_float<T>(sum[i]);
            all += sum[i];
        }
    }
    total[threadIdx.y][threadIdx.x] = all;
    __syncthreads();
    if (threadIdx.y != 0 || o >= oc || !db) return;
    float sum = accumulate ? db[o] : 0.0f;
    for (int i = 0; i < 8; i++) sum += total[i][threadIdx.x];
    db[o] = sum;
}
extern "C" __global__ void __launch_bounds__(256)
    conv2d_row_sums_f32(float* db, float* dshift, const float* sums, int32_t slots, int32_t images, int32_t parts, int32_t oc,
                        int32_t shift_stride, int32_t accumulate) {
    row_sums(db, dshift, sums, slots, images, parts, oc, shift_stride, accumulate);
}
extern "C" __global__ void __launch_bounds__(256)
    conv2d_row_sums_bf16(float* db, bf16* dshift, const float* sums, int32_t slots, int32_t images, int32_t parts, int32_t oc,
                         int32_t shift_stride, int32_t accumulate) {
    row_sums(db, dshift, sums, slots, images, parts, oc, shift_stride, accumulate);
}

// folded (oc, 4, 4, c) from w (oc, 3, 3, c); n: elements of folded.
template <class T, class W> DEV void fold(T* folded, const W* w, int64_t n, int channels) {
    int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int64_t c = i % channels, tap = i / channels % 16, o = i / channels / 16, row = 2 - tap / 4, col = 2 - tap % 4;
    float sum = 0.0f;
    for (int64_t y = max(row, int64_t(0)); y <= min(row + 1, int64_t(2)); y++)
        for (int64_t x = max(col, int64_t(0)); x <= min(col + 1, int64_t(2)); x++)
            sum += to_float(w[((o * 3 + y) * 3 + x) * channels + c]);
    folded[i] = from_float<T>(sum);
}
extern "C" __global__ void __launch_bounds__(256) conv2d_fold_f32(float* folded, const float* w, int64_t n, int32_t channels) {
    fold(folded, w, n, channels);
}
extern "C" __global__ void __launch_bounds__(256) conv2d_fold_bf16(bf16* folded, const bf16* w, int64_t n, int32_t channels) {
    fold(folded, w, n, channels);
}
// From the f32 weights: rounded once.
extern "C" __global__ void __launch_bounds__(256) conv2d_fold_master(bf16* folded, const float* w, int64_t n, int32_t channels) {
    fold(folded, w, n, channels);
}

// The f32 weights rounded to bf16.
extern "C" __global__ void __launch_bounds__(256) conv2d_round_weights(bf16* rounded, const float* w, int64_t n) {
    int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) rounded[i] = from_float<bf16>(w[i]);
}
