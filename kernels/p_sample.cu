// One reverse step of a sampler, in place: x_t becomes x_{t-1}.   src/ops/p_sample.rs
//   x: (n, h, w, C) f32; out: (n, h, w, C or 2C) f32 or bf16; copy: x_{t-1} as bf16 for the next forward pass, or null;
//   predicted: the x_0 it was made from, f32, or null; seeds: (n, 2) words; given: noise in place of the drawn, f32, or null;
//   t: one for all images, in the control block.
// Moves 8 + 4 + 2 bytes per element with 2C bf16 outputs and the copy (+ 4 with predicted). Every sampler is linear in the clipped
//     x_0 = p x_t + q out,   x_next = c_0 x_0 + c_t x_t + c_out out + sigma exp(u/2) noise
// with coefficients by t; sigma is 0 where there is no noise. p x_t + q out cancels at late t (p is 157 at the end of the linear
// schedule, more with cosine): p and q are two floats each, which leaves 3e-7 of x_0 where f32 leaves 3e-5. Error of x_next:
// 1e-6 of the sum of its terms.
#include "image.cuh"

struct ReverseRow {
    Split p, q;
    float c_0, c_t, c_out, sigma;
    float s, z_hi, z_lo, zero;  // u = s ((v + z_hi) + z_lo), v = the variance output or 0
};

// src/ops/p_sample.rs ReverseArg.
struct Reverse {
    int32_t clip, learned;
};

template <class T>
DEV void p_sample(float* x, bf16* copy, float* predicted, const T* out, const int32_t* seeds, const float* given,
                  const Control* control, const ReverseRow* rows, const Reverse& reverse, const Tiling& g) {
    SMEM(T, staged, [2 * TILE]);
    SMEM(float, noise, [TILE]);
    uint32_t t = control->t;
    const ReverseRow row = rows[t];
    for (int64_t item = blockIdx.x; item < int64_t(g.n) * g.tiles; item += gridDim.x) {
        int n = int(item / g.tiles);
        int64_t first = item % g.tiles * g.tile, start = n * g.size + first;
        int count = int(min(g.size - first, int64_t(g.tile)));
        copy_tile(staged, out + start / g.channels * g.stride, count / g.channels * g.stride);
        if (given) {
            fetch(noise, given, start, count);
        } else if (row.sigma != 0.0f) {
            uint64_t seed = uint64_t(uint32_t(seeds[2 * n])) | uint64_t(uint32_t(seeds[2 * n + 1])) << 32;
            draw(noise, Stream(0, t, RNG_P_SAMPLE, seed), first, count);
        }
        __syncthreads();
        Cursor cursor(g);
#pragma unroll 2
        for (int i = threadIdx.x; i < count; i += THREADS, cursor.next()) {
            const T* o = staged + cursor.at();
            float x_t = x[start + i], mean = to_float(o[0]), v = reverse.learned ? to_float(o[g.channels]) : 0.0f;
            Split sum = dot(row.p, x_t, row.q, mean);
            float x_0 = sum.hi + sum.lo;
            if (reverse.clip) x_0 = fminf(fmaxf(x_0, -1.0f), 1.0f);
            float next = fmaf(row.c_0, x_0, fmaf(row.c_t, x_t, row.c_out * mean));
            if (row.sigma != 0.0f) next = fmaf(row.sigma * expf(0.5f * (row.s * ((v + row.z_hi) + row.z_lo))), noise[i], next);
            x[start + i] = next;
            if (copy) copy[start + i] = from_float<bf16>(next);
            if (predicted) predicted[start + i] = x_0;
        }
        __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    p_sample_f32(float* x, bf16* copy, float* predicted, const float* out, const int32_t* seeds, const float* given,
                 const Control* control, const ReverseRow* rows, const Reverse reverse, const Tiling g) {
    p_sample(x, copy, predicted, out, seeds, given, control, rows, reverse, g);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    p_sample_bf16(float* x, bf16* copy, float* predicted, const bf16* out, const int32_t* seeds, const float* given,
                  const Control* control, const ReverseRow* rows, const Reverse reverse, const Tiling g) {
    p_sample(x, copy, predicted, out, seeds, given, control, rows, reverse, g);
}
