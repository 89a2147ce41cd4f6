// Clip, AdamW, every moving average and the bf16 copy of the weights, in one pass.   src/ops/adamw_ema.rs
//   p, m, v, grads: (len) f32; ema: (rates, len) f32; copy: (len) bf16, or null; norm: (1); rate: (rates, 2) decay and 1 - decay.
// Moves 28 + 8 per average + 2 bytes per parameter: 38 with one average and the copy; memory bound. 16 bytes per tensor and thread.
// A norm that is not finite leaves everything as it was. The operations of src/ops/adamw_ema.rs, each rounded as there: the same bits.
#include "image.cuh"

// src/ops/adamw_ema.rs HyperArg.
struct Hyper {
    int64_t len;
    double weight_decay;
    float b1, b2, c2, eps;  // 1 - beta1, beta2, 1 - beta2
    float max_norm;         // infinite: no clipping
    int32_t rates;
};

// What is the same for all elements.
struct Scalars {
    float clip, keep, step, root;
};

// One element; returns the new weight.
DEV float update(float& p, float& m, float& v, float g, const Scalars& s, const Hyper& h) {
    g = __fmul_rn(g, s.clip);
    m = __fadd_rn(m, __fmul_rn(__fsub_rn(g, m), h.b1));
    v = __fadd_rn(__fmul_rn(v, h.b2), __fmul_rn(__fmul_rn(h.c2, g), g));
    float slope = m / __fadd_rn(sqrtf(v) / s.root, h.eps);
    p = __fsub_rn(__fmul_rn(p, s.keep), __fmul_rn(s.step, slope));
    return p;
}

// N neighbouring elements from i on.
template <int N>
DEV void update_at(float* p, float* m, float* v, float* ema, bf16* copy, const float* grads, const float2* rate, int64_t i,
                   const Scalars& s, const Hyper& h) {
    typedef Vec<float, N> F;
    F pv = *reinterpret_cast<F*>(p + i), mv = *reinterpret_cast<F*>(m + i), vv = *reinterpret_cast<F*>(v + i);
    F gv = *reinterpret_cast<const F*>(grads + i);
#pragma unroll
    for (int k = 0; k < N; k++) update(pv[k], mv[k], vv[k], gv[k], s, h);
    *reinterpret_cast<F*>(p + i) = pv;
    *reinterpret_cast<F*>(m + i) = mv;
    *reinterpret_cast<F*>(v + i) = vv;
    for (int r = 0; r < h.rates; r++) {
        float2 decay = rate[r];
        F e = *reinterpret_cast<F*>(ema + r * h.len + i);
#pragma unroll
        for (int k = 0; k < N; k++) e[k] = __fadd_rn(__fmul_rn(decay.x, e[k]), __fmul_rn(decay.y, pv[k]));
        *reinterpret_cast<F*>(ema + r * h.len + i) = e;
    }
    if (copy) {
        Vec<bf16, N> c;
#pragma unroll
        for (int k = 0; k < N; k++) c[k] = from_float<bf16>(pv[k]);
        *reinterpret_cast<Vec<bf16, N>*>(copy + i) = c;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    adamw_ema(float* p, float* m, float* v, float* ema, bf16* copy, const float* grads, const float* norm, const Control* control,
              const float2* rate, const Hyper h) {
    SMEM(Scalars, shared, [1]);
    if (threadIdx.x == 0) {
        double lr = double(control->lr);
        shared[0].clip = isinf(h.max_norm) ? 1.0f : fminf(h.max_norm / norm[0], 1.0f);
        shared[0].keep = float(1.0 - lr * h.weight_decay);
        shared[0].step = float(lr / double(control->bias1));
        shared[0].root = float(sqrt(double(control->bias2)));
    }
    __syncthreads();
    if (!isfinite(norm[0])) return;
    const Scalars s = shared[0];
    int64_t stride = int64_t(gridDim.x) * THREADS, start = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    // Bases are aligned; the second average starts at len.
    int64_t wide = h.rates < 2 || h.len % 4 == 0 ? h.len / 4 : 0;
    for (int64_t i = start; i < wide; i += stride) update_at<4>(p, m, v, ema, copy, grads, rate, 4 * i, s, h);
    for (int64_t i = 4 * wide + start; i < h.len; i += stride) update_at<1>(p, m, v, ema, copy, grads, rate, i, s, h);
}
