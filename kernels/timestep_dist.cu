// Choice of t for every image of the batch from the loss history, without the host.   src/ops/timestep_dist.rs
//   t, time, weight, loss: (n); losses: (T, kept) oldest first, counts: (T), both null when every t is alike; times: (T) f32;
//   work: (2, T) f64, weights and their running sums.
// One block. All in f64 and in the order of src/timestep.rs: a thread owns rows of the history and takes the batch's losses in
// batch order; both sums over T run in one thread, so that equal losses draw equal integers. Small: the two sums are a chain of 2 T
// additions once the history is warm, nothing before.
#include "image.cuh"

struct Distribution {
    int32_t n, steps, kept;
    int32_t unused;
    double uniform_prob;
};

// Takes the losses of the previous step into the history.
DEV void update(float* losses, int32_t* counts, const int32_t* t, const float* loss, const Distribution& d, int32_t* seen_t,
                float* seen_loss) {
    for (int first = 0; first < d.n; first += THREADS) {
        int here = min(d.n - first, THREADS);
        if (int(threadIdx.x) < here) {
            seen_t[threadIdx.x] = t[first + threadIdx.x];
            seen_loss[threadIdx.x] = loss[first + threadIdx.x];
        }
        __syncthreads();
        for (int row = threadIdx.x; row < d.steps; row += THREADS) {
            float* mine = losses + int64_t(row) * d.kept;
            for (int i = 0; i < here; i++) {
                if (seen_t[i] != row) continue;
                int filled = counts[row];
                if (filled == d.kept) {
                    for (int k = 1; k < d.kept; k++) mine[k - 1] = mine[k];
                    mine[d.kept - 1] = seen_loss[i];
                } else {
                    mine[filled] = seen_loss[i];
                    counts[row] = filled + 1;
                }
            }
        }
        __syncthreads();
    }
}

// Weights and running sums into work.
DEV void weigh(double* w, double* sums, const float* losses, const int32_t* counts, const Distribution& d) {
    int cold = 0;
    for (int row = threadIdx.x; row < d.steps; row += THREADS) cold |= counts[row] < d.kept;
    if (__syncthreads_or(cold)) {
        for (int row = threadIdx.x; row < d.steps; row += THREADS) w[row] = 1.0, sums[row] = double(row + 1);
        __syncthreads();
        return;
    }
    for (int row = threadIdx.x; row < d.steps; row += THREADS) {
        double square = 0.0;
        for (int k = 0; k < d.kept; k++) {
            double l = double(losses[int64_t(row) * d.kept + k]);
            square += l * l;  // the product of two floats is exact in f64, fused or not
        }
        w[row] = sqrt(square / double(d.kept));
    }
    __syncthreads();
    SMEM(double, sum, [1]);
    if (threadIdx.x == 0) {
        double all = 0.0;
        for (int row = 0; row < d.steps; row++) all += w[row];
        sum[0] = all;
    }
    __syncthreads();
    for (int row = threadIdx.x; row < d.steps; row += THREADS) {
        double share = __dmul_rn(w[row] / sum[0], 1.0 - d.uniform_prob);
        w[row] = __dadd_rn(share, d.uniform_prob / double(d.steps));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        constexpr int AHEAD = 8;  // read before the first of them is added
        double all = 0.0, next[AHEAD];
        for (int first = 0; first < d.steps; first += AHEAD) {
#pragma unroll
            for (int k = 0; k < AHEAD; k++) next[k] = w[min(first + k, d.steps - 1)];
#pragma unroll
            for (int k = 0; k < AHEAD; k++)
                if (first + k < d.steps) all += next[k], sums[first + k] = all;
        }
    }
    __syncthreads();
}

// The first t whose share of the running sum exceeds u.
DEV int pick(double u, const double* sums, int steps) {
    double total = sums[steps - 1];
    int low = 0, high = steps;
    while (low < high) {
        int middle = (low + high) / 2;
        if (sums[middle] / total <= u) low = middle + 1;
        else high = middle;
    }
    return min(low, steps - 1);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    timestep_dist(int32_t* t, float* time, float* weight, float* losses, int32_t* counts, const float* loss, const Control* control,
                  const float* times, double* work, const Distribution d) {
    SMEM(int32_t, seen_t, [THREADS]);
    SMEM(float, seen_loss, [THREADS]);
    double *w = work, *sums = work + d.steps;
    if (losses) {
        if (control->step > 0) update(losses, counts, t, loss, d, seen_t, seen_loss);
        weigh(w, sums, losses, counts, d);
    }
    for (int n = threadIdx.x; n < d.n; n += THREADS) {
        uint4 words = philox(make_uint4(0, uint32_t(n), control->step, RNG_TIMESTEP), control->seed);
        double u = double(words.x) / 4294967296.0;
        int drawn = losses ? pick(u, sums, d.steps) : min(int(u * double(d.steps)), d.steps - 1);
        t[n] = drawn;
        time[n] = times[drawn];
        weight[n] = losses ? float(sums[d.steps - 1] / (double(d.steps) * w[drawn])) : 1.0f;
    }
}
