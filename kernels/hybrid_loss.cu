// Training loss of every image and its gradient with respect to the network's output, in one pass.   src/ops/hybrid_loss.rs
//   out, d_out: (n, h, w, C or 2C) f32 or bf16; data: (N, h, w, C) u8; stored: eps, or null; loss, mse, vb, weight, t: (n).
// Moves 1 + 4 + 4 bytes per element with 2C bf16 outputs (+ 2 where eps is stored in bf16): x_t is not needed (gaussian.cuh)
// and eps is drawn again. The tile of out is staged in shared memory, so that any channel count reads and writes 16 bytes at a time.
// Error of the f32 form against src/diffusion/loss.rs: 1e-5 of a term's parts for |ln sigma_p^2/sigma_q^2| <= 80, from exp of a ratio
// that is good to 1.2e-7; t = 0 runs in f64 and agrees to the rounding of the sums while a bin's probability is above 1e-10 (below,
// the f64 of the specification itself ends).
#include "image.cuh"

// What is minimised: src/ops/hybrid_loss.rs ObjectiveArg.
struct Objective {
    float mse_scale, vb_scale;  // loss = mse_scale weight mse + vb_scale vb, weight by t, vb in bits/dim
    int32_t nll_first;          // the decoder's likelihood at t = 0
    int32_t learned;            // out has a variance half
};

constexpr float INV_LN_2 = 1.44269504088896340736f;

// Error of the prediction, and the term of the bound, of one element.
DEV Term element(float& error, const BoundRow& row, const ExactRow& exact, bool nll, bool bound, float x_0, float eps,
                 float out, float v) {
    Split target = dot(row.a, x_0, row.b, eps);
    error = (out - target.hi) - target.lo;
    if (!bound) return {0.0f, 0.0f, 0.0f};
    if (!nll) return normal_kl(log_ratio(row, v), row.k * error);
    double error64 = double(out) - (to_double(row.a) * double(x_0) + to_double(row.b) * double(eps));
    double ratio = double(row.s) * (double(v) + double(row.z_hi) + double(row.z_lo));
    return decoder_nll(x_0, exact.k64 * error64, exact.log1 + ratio, exp(0.5 * exact.log1));
}

template <class T>
DEV void hybrid_loss(T* d_out, float* loss, float* mse, float* vb, const T* out, const float* weight, const void* stored, int kind,
                     const Images& images, const int32_t* t, const TableRow* rows, float* partials, uint32_t* arrived,
                     const Objective& objective, const Tiling& g) {
    SMEM(T, staged, [2 * TILE]);
    SMEM(float, eps, [TILE]);
    SMEM(float, sums, [2 * THREADS / 32]);
    for (int64_t item = blockIdx.x; item < int64_t(g.n) * g.tiles; item += gridDim.x) {
        int n = int(item / g.tiles), tile = int(item % g.tiles), step = t[n];
        int64_t first = int64_t(tile) * g.tile, at = (n * g.size + first) / g.channels * g.stride;
        int count = int(min(g.size - first, int64_t(g.tile))), out_count = count / g.channels * g.stride;
        const BoundRow row = rows[step].bound;
        Image image(images, n);
        copy_tile(staged, out + at, out_count);
        noise(eps, stored, kind, images, n, step, first, count);
        __syncthreads();
        bool nll = step == 0 && objective.nll_first, bound = objective.vb_scale != 0.0f;
        float scale = weight[n] / (float(g.n) * float(g.size)), vb_scale = scale * objective.vb_scale * INV_LN_2;
        float total[2] = {0.0f, 0.0f};
        Cursor cursor(g);
#pragma unroll 1
        for (int i = threadIdx.x; i < count; i += THREADS, cursor.next()) {
            T* o = staged + cursor.at();
            float error, v = objective.learned ? to_float(o[g.channels]) : 0.0f;
            Term term = element(error, row, rows[step].exact, nll, bound, image.at(first + i), eps[i], to_float(o[0]), v);
            total[0] = fmaf(error, error, total[0]);
            total[1] += term.value;
            float d_mean = objective.mse_scale != 0.0f ? 2.0f * scale * row.weight * error : vb_scale * row.k * term.d_mean;
            o[0] = from_float<T>(d_mean);
            if (objective.learned) o[g.channels] = from_float<T>(vb_scale * row.s * term.d_log);
        }
        block_sum(total, sums);  // its barrier also ends the work on staged
        copy_tile(d_out + at, staged, out_count);
        double sum[2];
        if (threadIdx.x == 0 && add_tiles(sum, total, partials, arrived, n, tile, g.tiles)) {
            double mean_error = sum[0] / double(g.size), bits = sum[1] / double(g.size) * 1.44269504088896340736;
            loss[n] = float(objective.mse_scale * row.weight * mean_error + objective.vb_scale * bits);
            mse[n] = float(mean_error);
            vb[n] = float(bits);
        }
        __syncthreads();
    }
}

// Two blocks, since for three the compiler of sm_120 spills.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    hybrid_loss_f32(float* d_out, float* loss, float* mse, float* vb, const float* out, const float* weight, const void* stored,
                    int32_t kind, const Images images, const int32_t* t, const TableRow* rows, float* partials, uint32_t* arrived,
                    const Objective objective, const Tiling g) {
    hybrid_loss(d_out, loss, mse, vb, out, weight, stored, kind, images, t, rows, partials, arrived, objective, g);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    hybrid_loss_bf16(bf16* d_out, float* loss, float* mse, float* vb, const bf16* out, const float* weight, const void* stored,
                     int32_t kind, const Images images, const int32_t* t, const TableRow* rows, float* partials, uint32_t* arrived,
                     const Objective objective, const Tiling g) {
    hybrid_loss(d_out, loss, mse, vb, out, weight, stored, kind, images, t, rows, partials, arrived, objective, g);
}
