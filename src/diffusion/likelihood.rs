//! KL of Gaussians and the discretised Gaussian, in nats, each with its derivatives. All of one element, in f64.

/// Value and derivatives of a term with respect to the mean and the log-variance (or log-scale) of p.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Term {
    /// The value, in nats.
    pub value: f64,
    /// Derivative with respect to p's mean.
    pub d_mean: f64,
    /// Derivative with respect to p's log-variance ([`normal_kl`]) or log-scale ([`log_likelihood`]).
    pub d_log: f64,
}

/// KL(N(mean1, exp(log1)) || N(mean2, exp(log2))) in nats, with derivatives with respect to mean2 and log2:
/// `½(-1 + log2 - log1 + exp(log1 - log2) + (mean1 - mean2)² exp(-log2))`.
#[inline]
pub fn normal_kl(mean1: f64, log1: f64, mean2: f64, log2: f64) -> Term {
    let ratio_m1 = (log1 - log2).exp_m1();
    let difference = mean2 - mean1;
    let slope = difference * (-log2).exp();
    Term {
        value: 0.5 * (log2 - log1 + ratio_m1 + difference * slope),
        d_mean: slope,
        d_log: -0.5 * (ratio_m1 + difference * slope),
    }
}

/// Derivatives of [`normal_kl`] with respect to mean1 and log1.
pub fn normal_kl_d_first(mean1: f64, log1: f64, mean2: f64, log2: f64) -> (f64, f64) {
    ((mean1 - mean2) * (-log2).exp(), 0.5 * (log1 - log2).exp_m1())
}

const SQRT_2_OVER_PI: f64 = std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2;
const CUBIC: f64 = 0.044_715;

/// The reference's normal cdf: `½(1 + tanh u) = 1/(1 + exp(-2u))`, `u = sqrt(2/π)(x + 0.044715 x³)`; with its derivative.
#[inline]
pub fn normal_cdf(x: f64) -> (f64, f64) {
    let squared = x * x;
    let cdf = 1.0 / (1.0 + (-2.0 * SQRT_2_OVER_PI * (x + CUBIC * squared * x)).exp());
    let bell = cdf * (1.0 - cdf);
    // Far out the bell is 0 exactly; there 0·x² must not become NaN when x² overflows.
    let slope = if bell == 0.0 { 0.0 } else { 2.0 * SQRT_2_OVER_PI * bell * (1.0 + 3.0 * CUBIC * squared) };
    (cdf, slope)
}

/// Below this no probability goes before its logarithm is taken; the derivative is 0 there.
pub const MIN_PROBABILITY: f64 = 1e-12;

/// Logarithm of the probability that N(mean, exp(log_scale)²) gives the 8-bit bin of `x`, a pixel in [-1, 1], with its derivatives:
///
/// ```text
/// ln max(cdf(u₊) - cdf(u₋), 1e-12),   u± = (x - mean ± 1/255) exp(-log_scale)
/// ```
///
/// Below -0.999 the bin reaches to -∞ (`cdf(u₊)`), above 0.999 to +∞ (`1 - cdf(u₋)`).
#[inline]
pub fn log_likelihood(x: f64, mean: f64, log_scale: f64) -> Term {
    let inverse = (-log_scale).exp();
    let (upper, lower) = (inverse * (x - mean + 1.0 / 255.0), inverse * (x - mean - 1.0 / 255.0));
    let (low_edge, high_edge) = (x < -0.999, x > 0.999);
    let (cdf_upper, slope_upper) = if high_edge { (1.0, 0.0) } else { normal_cdf(upper) };
    let (cdf_lower, slope_lower) = if low_edge { (0.0, 0.0) } else { normal_cdf(lower) };
    let probability = cdf_upper - cdf_lower;
    if probability < MIN_PROBABILITY {
        return Term { value: MIN_PROBABILITY.ln(), d_mean: 0.0, d_log: 0.0 };
    }
    // du/dmean = -inverse, du/dlog_scale = -u; where the slope is 0 so is its product, even with an infinite factor.
    let times = |slope: f64, factor: f64| if slope == 0.0 { 0.0 } else { slope * factor };
    Term {
        value: probability.ln(),
        d_mean: -times(slope_upper - slope_lower, inverse) / probability,
        d_log: -(times(slope_upper, upper) - times(slope_lower, lower)) / probability,
    }
}
