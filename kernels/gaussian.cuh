// The mathematics of one element: the port of src/diffusion to f32, with what f32 loses put back by algebra.
//
// The loss needs x_t nowhere. With x_t = sqrt(ab) x_0 + sqrt(1 - ab) eps every objective is a function of one error,
//
//     error = out - target,   target = a x_0 + b eps      eps: (0, 1)   x_0: (1, 0)   x_prev: (sqrt(ab_prev), coef2 sqrt(1 - ab))
//                                                         v: (-sqrt(1 - ab), sqrt(ab))
//     mean_p - mean_q = k64 error                         eps: -coef1 sqrt(1/ab - 1)   x_0: coef1   x_prev: 1         v: -coef1 sqrt(1 - ab)
//     x_0' - x_0 = m error                                eps: -sqrt(1/ab - 1)         x_0: 1       x_prev: 1/coef1   v: -sqrt(1 - ab)
//
// and at t = 0 (coef1 = 1, coef2 = 0) the decoder's x_0 - mean is -k64 error. So differences of large terms never occur; what
// remains are sums with coefficients given as two floats (Split), good to an f32 rounding of the result even where the terms
// cancel. Tables come from src/ops/table.rs, computed in f64.
#pragma once
#include "common.cuh"

// A number as the sum of two floats: 48 bits.
struct Split {
    float hi, lo;
};

DEV double to_double(Split x) { return double(x.hi) + double(x.lo); }

// a x + b y, with the roundings of the products and of the sum kept in lo.
DEV Split dot(Split a, float x, Split b, float y) {
    float p = __fmul_rn(a.hi, x), q = __fmul_rn(b.hi, y);
    float p_lo = __fmaf_rn(a.hi, x, -p), q_lo = __fmaf_rn(b.hi, y, -q);
    float sum = __fadd_rn(p, q), back = __fsub_rn(sum, p);
    float sum_lo = __fadd_rn(__fsub_rn(p, __fsub_rn(sum, back)), __fsub_rn(q, back));
    float lo = __fmaf_rn(a.lo, x, __fmaf_rn(b.lo, y, __fadd_rn(p_lo, q_lo)));
    return {sum, __fadd_rn(sum_lo, lo)};
}

// x within low and high; NaN stays NaN, as fmin and fmax would not have it.
template <class T> DEV T clamp(T x, T low, T high) { return x < low ? low : x > high ? high : x; }

// byte/127.5 - 1, rounded as src/diffusion/codes.rs rounds it: one correction makes the quotient the nearest float.
DEV float to_unit(uint8_t byte) {
    const float inverse = 1.0f / 127.5f;
    float x = float(byte), q = __fmul_rn(x, inverse);
    q = __fmaf_rn(__fmaf_rn(-q, 127.5f, x), inverse, q);
    return __fsub_rn(q, 1.0f);
}

// What the decoder's likelihood at t = 0 needs in f64.
struct ExactRow {
    double k64, m64, coef1, log1;
};

// One t of the bound and of the losses; sigma is the root of the clipped posterior variance exp(log1).
struct BoundRow {
    Split a, b;             // target = a x_0 + b eps
    float s, z_hi, z_lo;    // u = log_variance - log1 = s ((v + z_hi) + z_lo), v = the variance output or 0
    float k;                // (mean_p - mean_q)/sigma = k error
    float m, c;             // x_0' - x_0 = m error;   (mean_p - mean_q)/sigma = c (x_0' - x_0) unless out is x_prev itself
    float eps_scale;        // (eps' - eps)^2 = eps_scale (x_0' - x_0)^2
    float weight;           // of the squared error in the loss
};

// A row of the table. The loops keep the first half in registers.
struct TableRow {
    BoundRow bound;
    ExactRow exact;
};

// u = log_variance - log1 of an element.
DEV float log_ratio(const BoundRow& row, float v) { return row.s * ((v + row.z_hi) + row.z_lo); }

// Value in nats and derivatives; d_mean is per sigma of the mean, d_log per unit of log-variance.
struct Term {
    float value, d_mean, d_log;
};

// u + exp(-u) - 1 without cancellation; x = expm1(-u). The series is good to 2e-9 relative below 1/2.
DEV float kl_of_ratio(float u, float x) {
    if (fabsf(u) >= 0.5f) return u + x;
    float r = -1.0f / 362880.0f;
    r = fmaf(r, u, 1.0f / 40320.0f);
    r = fmaf(r, u, -1.0f / 5040.0f);
    r = fmaf(r, u, 1.0f / 720.0f);
    r = fmaf(r, u, -1.0f / 120.0f);
    r = fmaf(r, u, 1.0f / 24.0f);
    r = fmaf(r, u, -1.0f / 6.0f);
    return fmaf(r, u, 0.5f) * u * u;
}

// KL(q || p) of an element: u = log_variance_p - log_variance_q, d = (mean_p - mean_q)/sigma_q.
DEV Term normal_kl(float u, float d) {
    float x = expm1f(-u), slope = d * expf(-u);
    return {0.5f * fmaf(d, slope, kl_of_ratio(u, x)), slope, -0.5f * fmaf(d, slope, x)};
}

// The reference's cdf, its slope: src/diffusion/likelihood.rs normal_cdf, in f64 as there. t = 0 is one step in T.
DEV double2 normal_cdf(double x) {
    const double ROOT = 0.79788456080286535588, CUBIC = 0.044715;
    double squared = x * x;
    double t = tanh(ROOT * (x + CUBIC * squared * x));
    double sech_squared = 1.0 - t * t;
    double slope = sech_squared == 0.0 ? 0.0 : 0.5 * sech_squared * ROOT * (1.0 + 3.0 * CUBIC * squared);
    return make_double2(0.5 * (1.0 + t), slope);
}

// -log P of the 8-bit bin of x under N(mean, exp(log_variance)), difference = mean - x: likelihood.rs log_likelihood.
DEV Term decoder_nll(float x, double difference, double log_variance, double sigma) {
    double inverse = exp(-0.5 * log_variance);
    double upper = inverse * (1.0 / 255.0 - difference), lower = inverse * (-1.0 / 255.0 - difference);
    double2 above = x > 0.999f ? make_double2(1.0, 0.0) : normal_cdf(upper);
    double2 below = x < -0.999f ? make_double2(0.0, 0.0) : normal_cdf(lower);
    double probability = above.x - below.x;
    if (probability < 1e-12) return {27.631021115928547f, 0.0f, 0.0f};
    // Where a slope is 0 so is its product, even with an infinite factor.
    double up = above.y == 0.0 ? 0.0 : above.y * upper, down = below.y == 0.0 ? 0.0 : below.y * lower;
    double slope = above.y == below.y ? 0.0 : (above.y - below.y) * inverse;
    return {float(-log(probability)), float(slope * sigma / probability), float(0.5 * (up - down) / probability)};
}
