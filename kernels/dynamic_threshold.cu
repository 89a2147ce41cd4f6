// The dynamic threshold of every image: a quantile of |x_0| over the image, at least 1.   src/ops/dynamic_threshold.rs
//   threshold: (n) f32; x: (n, h, w, C) f32; out: (n, h, w, C or 2C) f32 or bf16 (2n images where guided).
// Exact selection: the bits of a magnitude are an integer of the same order, so its value is found digit by digit, from a histogram of
// the next 8 bits of the elements that share the digits found so far. Counts are integers: no order of the threads changes
// a bit. Value `rank` and, between two values, the next larger one give max(1, v[rank] + fraction (v[rank + 1] - v[rank])).
// One block an image, five passes over it; all but the first read from the caches, x_0 is predicted anew in each.
#include "reverse.cuh"

// src/ops/dynamic_threshold.rs QuantileArg.
struct Quantile {
    uint32_t rank;
    float fraction;  // of the way to the next value
};

// The digit whose bin holds the element of this rank among those counted, and the number of elements in the bins before it. One warp;
// the lane that finds it says so.
DEV void find_digit(uint32_t* found, const uint32_t* count, uint32_t rank) {
    uint32_t lane = threadIdx.x, own = 0;
    for (uint32_t k = 0; k < 8; k++) own += count[8 * lane + k];
    uint32_t sum = own;
#pragma unroll
    for (uint32_t d = 1; d < 32; d *= 2) {
        uint32_t up = __shfl_up_sync(FULL_MASK, sum, d);
        if (lane >= d) sum += up;
    }
    uint32_t before = sum - own, bin = 8 * lane;
    if (rank < before || rank >= sum) return;
    while (before + count[bin] <= rank) before += count[bin++];
    found[0] = bin;
    found[1] = before;
    found[2] = count[bin];
}

// Calls f with the bits of each magnitude of an image, every thread with its own.
template <class T, class F>
DEV void each_magnitude(const float* x, const T* with, const T* without, const ReverseRow& row, const Reverse& reverse,
                        const Tiling& g, F f) {
    Cursor cursor(g);
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < g.size; i += THREADS, cursor.next()) {
        float mean = mean_output(with, without, cursor.at(), reverse);
        f(__float_as_uint(fabsf(predict_x_0(row, x[i], mean))));
    }
}

template <class T>
DEV void dynamic_threshold(float* threshold, const float* x, const T* out, const Control* control, const ReverseRow* rows,
                           const Quantile& quantile, const Reverse& reverse, const Tiling& g) {
    SMEM(uint32_t, count, [256]);
    SMEM(uint32_t, found, [3]);
    SMEM(uint32_t, larger, [1]);
    const ReverseRow row = rows[control->t];
    for (int n = blockIdx.x; n < g.n; n += gridDim.x) {
        const T *with = out + n * g.size / g.channels * g.stride, *without = without_labels(with, reverse, g);
        const float* mine = x + n * g.size;
        uint32_t prefix = 0, known = 0, rank = quantile.rank, equal = 0;
        for (int shift = 24; shift >= 0; shift -= 8) {
            count[threadIdx.x] = 0;
            __syncthreads();
            each_magnitude(mine, with, without, row, reverse, g, [&](uint32_t bits) {
                if ((bits & known) == prefix) atomicAdd(&count[bits >> shift & 255u], 1u);
            });
            __syncthreads();
            if (threadIdx.x < 32) find_digit(found, count, rank);
            __syncthreads();
            prefix |= found[0] << shift;
            known |= 255u << shift;
            rank -= found[1];
            equal = found[2];
        }
        if (threadIdx.x == 0) larger[0] = rank + 1 < equal ? prefix : 0xffffffffu;
        __syncthreads();
        if (quantile.fraction > 0.0f && rank + 1 >= equal) {
            each_magnitude(mine, with, without, row, reverse, g, [&](uint32_t bits) {
                if (bits > prefix) atomicMin(&larger[0], bits);
            });
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            float low = __uint_as_float(prefix), high = quantile.fraction > 0.0f ? __uint_as_float(larger[0]) : low;
            threshold[n] = fmaxf(__fmaf_rn(quantile.fraction, __fsub_rn(high, low), low), 1.0f);
        }
        __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    dynamic_threshold_f32(float* threshold, const float* x, const float* out, const Control* control, const ReverseRow* rows,
                          const Quantile quantile, const Reverse reverse, const Tiling g) {
    dynamic_threshold(threshold, x, out, control, rows, quantile, reverse, g);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    dynamic_threshold_bf16(float* threshold, const float* x, const bf16* out, const Control* control, const ReverseRow* rows,
                           const Quantile quantile, const Reverse reverse, const Tiling g) {
    dynamic_threshold(threshold, x, out, control, rows, quantile, reverse, g);
}
