//! The mathematics of Improved DDPM as plain functions: what every kernel is tested against.
//!
//! ```text
//! x_t     = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps                      q_sample
//! p(x_{t-1} | x_t) = N(mean(x_t, out), exp(log_variance(out)))                  p_mean_variance
//! L_vb(t) = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)),  at t = 0  -log p(x_0 | x_1)
//! L       = |target - out|² + (T/1000) L_vb(t)                                  the hybrid loss
//! ```
//!
//! Formulas of one element take and give f64. Formulas of one image take f32 slices and compute in f64 inside. An image is
//! (pixels, C), channels last; the network's output for it is (pixels, C), or (pixels, 2C) with a learned variance: first the C
//! mean parameters of a pixel, then its C variance parameters. The reference computes in f32 from tables rounded to f32, so it
//! agrees to the f32 rounding of its steps and not to the bit.
//!
//! - [`gaussian`]: forward process, posterior, what the network's output means
//! - [`likelihood`]: KL of Gaussians, the discretised Gaussian, with derivatives
//! - [`loss`]: every training loss with its gradient; the terms of the bound
//! - [`reverse`]: the steps of the samplers
//! - [`steer`]: guidance and dynamic threshold
//! - [`codes`]: bytes and [-1, 1]

pub mod codes;
pub mod gaussian;
pub mod likelihood;
pub mod loss;
pub mod reverse;
pub mod steer;

pub use codes::{to_byte, to_byte_truncate, to_unit};
pub use gaussian::{Output, clip, q_sample};
pub use loss::{BoundTerms, Objective, Terms, bound_terms, loss_and_grad, prior_bpd};
pub use reverse::{ddim, ddim_reverse, p_sample, second_order};
