// The terms of the bound of each image, as the bits/dim evaluation reports them.   src/ops/vb_terms.rs
//   out: (n, h, w, C or 2C) f32 or bf16; data: (N, h, w, C) u8; stored: eps, or null; vb (bits/dim), x_0_mse, eps_mse, t: (n).
// Moves 1 + 4 bytes per element with 2C bf16 outputs (+ 2 where eps is stored in bf16). As hybrid_loss, with the x_0 prediction clipped:
// x_0' - x_0 = clamp(m error, -1 - x_0, 1 - x_0), and eps' - eps is a multiple of it. Error: as hybrid_loss.
#include "image.cuh"

// src/ops/vb_terms.rs EvaluationArg.
struct Evaluation {
    int32_t clip;       // the x_0 prediction to [-1, 1]
    int32_t nll_first;  // the decoder's likelihood at t = 0
    int32_t learned;    // out has a variance half
    int32_t x_prev;     // out is x_{t-1} itself, which clipping leaves alone
};

// Nats of one element; difference: x_0' - x_0.
DEV float element(float& difference, const BoundRow& row, const ExactRow& exact, const Evaluation& e, bool nll, float x_0,
                  float eps, float out, float v) {
    float low = -1.0f - x_0, high = 1.0f - x_0;
    if (!nll) {
        Split target = dot(row.a, x_0, row.b, eps);
        float error = (out - target.hi) - target.lo;
        difference = row.m * error;
        if (e.clip) difference = clamp(difference, low, high);
        return normal_kl(log_ratio(row, v), e.x_prev ? row.k * error : row.c * difference).value;
    }
    double error64 = double(out) - (to_double(row.a) * double(x_0) + to_double(row.b) * double(eps));
    double ratio = double(row.s) * (double(v) + double(row.z_hi) + double(row.z_lo)), x_0_error = exact.m64 * error64;
    if (e.clip) x_0_error = clamp(x_0_error, -1.0 - double(x_0), 1.0 - double(x_0));
    difference = float(x_0_error);
    return decoder_nll(x_0, e.x_prev ? exact.k64 * error64 : exact.coef1 * x_0_error, exact.log1 + ratio, 1.0).value;
}

template <class T>
DEV void vb_terms(float* vb, float* x_0_mse, float* eps_mse, const T* out, const void* stored, int kind, const Images& images,
                  const int32_t* t, const TableRow* rows, float* partials, uint32_t* arrived, const Evaluation& e, const Tiling& g) {
    SMEM(T, staged, [2 * TILE]);
    SMEM(float, eps, [TILE]);
    SMEM(float, sums, [2 * THREADS / 32]);
    for (int64_t item = blockIdx.x; item < int64_t(g.n) * g.tiles; item += gridDim.x) {
        int n = int(item / g.tiles), tile = int(item % g.tiles), step = t[n];
        int64_t first = int64_t(tile) * g.tile, at = (n * g.size + first) / g.channels * g.stride;
        int count = int(min(g.size - first, int64_t(g.tile)));
        const BoundRow row = rows[step].bound;
        Image image(images, n);
        copy_tile(staged, out + at, count / g.channels * g.stride);
        noise(eps, stored, kind, images, n, step, first, count);
        __syncthreads();
        float total[2] = {0.0f, 0.0f};
        Cursor cursor(g);
#pragma unroll 1
        for (int i = threadIdx.x; i < count; i += THREADS, cursor.next()) {
            const T* o = staged + cursor.at();
            float difference, v = e.learned ? to_float(o[g.channels]) : 0.0f;
            bool nll = step == 0 && e.nll_first;
            total[0] += element(difference, row, rows[step].exact, e, nll, image.at(first + i), eps[i], to_float(o[0]), v);
            total[1] = fmaf(difference, difference, total[1]);
        }
        block_sum(total, sums);
        double sum[2];
        if (threadIdx.x == 0 && add_tiles(sum, total, partials, arrived, n, tile, g.tiles)) {
            vb[n] = float(sum[0] / double(g.size) * 1.44269504088896340736);
            x_0_mse[n] = float(sum[1] / double(g.size));
            eps_mse[n] = float(sum[1] / double(g.size) * row.eps_scale);
        }
        __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    vb_terms_f32(float* vb, float* x_0_mse, float* eps_mse, const float* out, const void* stored, int32_t kind, const Images images,
                 const int32_t* t, const TableRow* rows, float* partials, uint32_t* arrived, const Evaluation e, const Tiling g) {
    vb_terms(vb, x_0_mse, eps_mse, out, stored, kind, images, t, rows, partials, arrived, e, g);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    vb_terms_bf16(float* vb, float* x_0_mse, float* eps_mse, const bf16* out, const void* stored, int32_t kind, const Images images,
                  const int32_t* t, const TableRow* rows, float* partials, uint32_t* arrived, const Evaluation e, const Tiling g) {
    vb_terms(vb, x_0_mse, eps_mse, out, stored, kind, images, t, rows, partials, arrived, e, g);
}
