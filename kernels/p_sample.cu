// One reverse step of a sampler, in place: x_t becomes x_{t-1}.   src/ops/p_sample.rs
//   x: (n, h, w, C) f32; out: (n, h, w, C or 2C) f32 or bf16; copy: x_{t-1} as bf16 for the next forward pass, or null;
//   predicted: the x_0 it was made from, f32, or null; seeds: (n, 2) words; given: noise in place of the drawn, f32, or null;
//   threshold: (n) dynamic thresholds of x_0, or null; t: the row of the table, one for all images, in the control block.
//   Guided: out, x and copy are of 2n images.
// Moves 8 + 4 + 2 bytes per element with 2C bf16 outputs and the copy (+ 4 with predicted). Every sampler is linear in the bounded
//     x_0 = p x_t + q out,   x_next = c_0 x_0 + c_t x_t + c_out out + c_last x_0' + sigma exp(u/2) noise
// with coefficients by row of a table; sigma is 0 where there is no noise, c_last where the x_0' that predicted held before is not
// needed (4 bytes more where it is). p x_t + q out cancels at late t (p is 157 at the end of the linear
// schedule, more with cosine): p and q are two floats each, which leaves 3e-7 of x_0 where f32 leaves 3e-5. Error of x_next:
// 1e-6 of the sum of its terms.
#include "reverse.cuh"

template <class T>
DEV void p_sample(float* x, bf16* copy, float* predicted, const T* out, const int32_t* seeds, const float* given,
                  const float* threshold, const Control* control, const ReverseRow* rows, const Reverse& reverse, const Tiling& g) {
    SMEM(T, staged, [2 * TILE]);
    SMEM(float, noise, [TILE]);
    uint32_t t = control->t;
    const ReverseRow row = rows[t];
    const T* without = without_labels(out, reverse, g);
    for (int64_t item = blockIdx.x; item < int64_t(g.n) * g.tiles; item += gridDim.x) {
        int n = int(item / g.tiles);
        int64_t first = item % g.tiles * g.tile, start = n * g.size + first;
        int count = int(min(g.size - first, int64_t(g.tile)));
        int64_t at = start / g.channels * g.stride;
        copy_tile(staged, out + at, count / g.channels * g.stride);
        if (given) {
            fetch(noise, given, start, count);
        } else if (row.sigma != 0.0f) {
            uint64_t seed = uint64_t(uint32_t(seeds[2 * n])) | uint64_t(uint32_t(seeds[2 * n + 1])) << 32;
            draw(noise, Stream(0, t, RNG_P_SAMPLE, seed), first, count);
        }
        float bound = threshold ? threshold[n] : 1.0f;
        __syncthreads();
        Cursor cursor(g);
#pragma unroll 2
        for (int i = threadIdx.x; i < count; i += THREADS, cursor.next()) {
            const T* o = staged + cursor.at();
            float mean = mean_output(o, without ? without + at + cursor.at() : nullptr, 0, reverse);
            float x_t = x[start + i], v = reverse.learned ? to_float(o[g.channels]) : 0.0f;
            float x_0 = predict_x_0(row, x_t, mean);
            if (reverse.clip) x_0 = clamp(x_0, -bound, bound);
            if (threshold) x_0 = __fdiv_rn(x_0, bound);
            float next = fmaf(row.c_0, x_0, fmaf(row.c_t, x_t, row.c_out * mean));
            if (row.c_last != 0.0f) next = fmaf(row.c_last, predicted[start + i], next);
            if (row.sigma != 0.0f) next = fmaf(row.sigma * expf(0.5f * (row.s * ((v + row.z_hi) + row.z_lo))), noise[i], next);
            x[start + i] = next;
            if (copy) copy[start + i] = from_float<bf16>(next);
            if (without) {
                x[start + g.n * g.size + i] = next;
                if (copy) copy[start + g.n * g.size + i] = from_float<bf16>(next);
            }
            if (predicted) predicted[start + i] = x_0;
        }
        __syncthreads();
    }
}

// Four blocks, since for more the compiler spills.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    p_sample_f32(float* x, bf16* copy, float* predicted, const float* out, const int32_t* seeds, const float* given,
                 const float* threshold, const Control* control, const ReverseRow* rows, const Reverse reverse, const Tiling g) {
    p_sample(x, copy, predicted, out, seeds, given, threshold, control, rows, reverse, g);
}
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    p_sample_bf16(float* x, bf16* copy, float* predicted, const bf16* out, const int32_t* seeds, const float* given,
                  const float* threshold, const Control* control, const ReverseRow* rows, const Reverse reverse, const Tiling g) {
    p_sample(x, copy, predicted, out, seeds, given, threshold, control, rows, reverse, g);
}
