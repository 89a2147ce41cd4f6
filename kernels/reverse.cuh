// What the kernels of a reverse step share: the table of a sampler, the guided output, the x_0 prediction.   src/ops/p_sample.rs
#pragma once
#include "image.cuh"

// One row of a sampler: src/ops/p_sample/row.rs.
struct ReverseRow {
    Split p, q;                     // x_0 = p x_t + q out
    float c_0, c_t, c_out, sigma;
    float s, z_hi, z_lo;            // u = s ((v + z_hi) + z_lo), v = the variance output or 0
    float c_last;
};

// src/ops/p_sample.rs ReverseArg.
struct Reverse {
    int32_t clip, learned;
    int32_t guided;   // out is of 2n images, first with their labels, then without; x of 2n too, both halves alike
    float guidance;   // out = without + guidance (with - without), the half of the mean
};

// Where the outputs without labels begin, or null.
template <class T> DEV const T* without_labels(const T* out, const Reverse& reverse, const Tiling& g) {
    return reverse.guided ? out + g.n * g.size / g.channels * g.stride : nullptr;
}

// Element `at` of the mean half.
template <class T> DEV float mean_output(const T* with, const T* without, int64_t at, const Reverse& reverse) {
    float mean = to_float(with[at]);
    if (!without) return mean;
    float other = to_float(without[at]);
    return fmaf(reverse.guidance, mean - other, other);
}

DEV float predict_x_0(const ReverseRow& row, float x_t, float mean) {
    Split sum = dot(row.p, x_t, row.q, mean);
    return sum.hi + sum.lo;
}
