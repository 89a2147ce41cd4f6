//! The coefficients of a sampler by row, in f64, as the kernels take them.

use super::walk::{Reverse, Step};
use crate::config::MeanType;
use crate::diffusion::gaussian::Output;
use crate::diffusion::reverse;
use crate::ops::table::{LogRatio, Split};
use crate::schedule::{Coefs, Process};

/// One row of a sampler: ReverseRow of `kernels/reverse.cuh`.
///
/// ```text
/// x_0 = clip(p x_t + q out),   x_next = c_0 x_0 + c_t x_t + c_out out + c_last x_0' + sigma exp(ratio/2) noise
/// ```
///
/// x_0' is the prediction of the call before.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct ReverseRow {
    predict: [Split; 2],
    next: [f32; 3],
    sigma: f32,
    ratio: LogRatio,
    last: f32,
}

impl ReverseRow {
    /// Every row of a sampler.
    pub(super) fn table(reverse: Reverse, output: Output, process: &Process) -> Vec<Self> {
        let row = |k| {
            let (c, step) = reverse.row(process, k);
            ReverseRow::new(&c, output, step)
        };
        (0..reverse.rows(process.steps())).map(row).collect()
    }

    fn new(c: &Coefs, output: Output, step: Step) -> Self {
        let predict = match output.mean_type {
            MeanType::Epsilon => [c.sqrt_recip_alpha_bar, -c.sqrt_recipm1_alpha_bar],
            MeanType::XStart => [0.0, 1.0],
            MeanType::PreviousX => [-c.coef2 / c.coef1, 1.0 / c.coef1],
            MeanType::V => [c.sqrt_alpha_bar, -c.sqrt_one_minus_alpha_bar],
        };
        let (next, last, sigma, ratio) = match step {
            Step::Ancestral => {
                let mean =
                    if output.mean_type == MeanType::PreviousX { [0.0, 0.0, 1.0] } else { [c.coef1, c.coef2, 0.0] };
                (mean, 0.0, (0.5 * c.log_beta_tilde_clipped).exp(), LogRatio::new(c, output.var_type))
            }
            Step::Ddim(eta) => {
                let (keep, eps_scale, sigma) = reverse::ddim_coefs(c, eta);
                let [x_0, x_t] = reverse::over_x_0(c, keep, eps_scale);
                ([x_0, x_t, 0.0], 0.0, sigma, LogRatio::ZERO)
            }
            Step::DdimReverse => {
                let next = c.alpha_bar_next;
                let [x_0, x_t] = reverse::over_x_0(c, next.sqrt(), (1.0 - next).sqrt());
                ([x_0, x_t, 0.0], 0.0, 0.0, LogRatio::ZERO)
            }
            Step::SecondOrder([x_0, last, x_t]) => ([x_0, x_t, 0.0], last, 0.0, LogRatio::ZERO),
        };
        let sigma = if c.t == 0 { 0.0 } else { sigma };
        ReverseRow {
            predict: predict.map(Split::from),
            next: next.map(|x| x as f32),
            sigma: sigma as f32,
            ratio,
            last: last as f32,
        }
    }
}
