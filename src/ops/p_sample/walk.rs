//! The samplers: which steps a walk takes, network call by network call.
//!
//! A sampler's table has a row for every t; Heun's has T more, those of its second halves. One call of the network and one row of the
//! table are a [`Pass`]; a step of the walk is one pass, or two of Heun's.

use crate::diffusion::reverse;
use crate::schedule::{Coefs, Process};

/// Kind of reverse step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reverse {
    /// x_{t-1} drawn from p(x_{t-1} | x_t).
    Ancestral,
    /// DDIM with this eta, 0 to 1: 0 draws no noise.
    Ddim(f64),
    /// DDIM from x_t to x_{t+1}: the way from an image to its noise.
    DdimReverse,
    /// DPM-Solver++ (2M): second order with one call a step.
    DpmSolver,
    /// Heun's method: second order with two calls a step, but one for the last.
    Heun,
}

/// One call of the network and what follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pass {
    /// The step of the process at which the network is asked.
    pub t: usize,
    /// Row of the sampler's table: [`crate::ops::Control`]'s t.
    pub row: usize,
    /// Whether a step of the walk is complete.
    pub completes: bool,
}

/// What one row does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Step {
    Ancestral,
    Ddim(f64),
    DdimReverse,
    /// Factors of [`reverse::second_order`].
    SecondOrder([f64; 3]),
}

impl Reverse {
    /// Whether noise is drawn on the way.
    pub fn draws(self) -> bool {
        match self {
            Reverse::Ancestral => true,
            Reverse::Ddim(eta) => eta != 0.0,
            Reverse::DdimReverse | Reverse::DpmSolver | Reverse::Heun => false,
        }
    }

    /// Whether a pass reads the x_0 prediction of the one before.
    pub fn remembers(self) -> bool {
        matches!(self, Reverse::DpmSolver | Reverse::Heun)
    }

    /// The passes of a walk over a process of `steps` steps, in order.
    pub fn passes(self, steps: usize) -> Vec<Pass> {
        let one = |t| Pass { t, row: t, completes: true };
        match self {
            Reverse::Ancestral | Reverse::Ddim(_) | Reverse::DpmSolver => (0..steps).rev().map(one).collect(),
            Reverse::DdimReverse => (0..steps).map(one).collect(),
            Reverse::Heun => {
                let second = |t: usize| Pass { t, row: steps + t, completes: true };
                let two = |t: usize| [Pass { completes: false, ..one(t) }, second(t - 1)];
                (1..steps).rev().flat_map(two).chain([one(0)]).collect()
            }
        }
    }

    /// Rows of the table for a process of `steps` steps.
    pub(super) fn rows(self, steps: usize) -> usize {
        if self == Reverse::Heun { 2 * steps } else { steps }
    }

    /// What row `row` does, and the tables at its t.
    pub(super) fn row(self, process: &Process, row: usize) -> (Coefs, Step) {
        let steps = process.steps();
        assert!(row < self.rows(steps), "row {row} of {self:?} over {steps} steps");
        let c = process.at(row % steps);
        let step = match self {
            Reverse::Ancestral => Step::Ancestral,
            Reverse::Ddim(eta) => Step::Ddim(eta),
            Reverse::DdimReverse => Step::DdimReverse,
            Reverse::DpmSolver => Step::SecondOrder(reverse::dpm_solver_coefs(&c)),
            Reverse::Heun if row < steps => Step::Ddim(0.0),
            Reverse::Heun => Step::SecondOrder(reverse::heun_coefs(&c)),
        };
        (c, step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heun_asks_twice_but_for_the_last_step() {
        let told: Vec<_> = Reverse::Heun.passes(3).iter().map(|p| (p.t, p.row, p.completes)).collect();
        assert_eq!(told, [(2, 2, false), (1, 4, true), (1, 1, false), (0, 3, true), (0, 0, true)]);
        for reverse in [Reverse::Ancestral, Reverse::Ddim(0.0), Reverse::DpmSolver, Reverse::DdimReverse, Reverse::Heun]
        {
            let passes = reverse.passes(7);
            assert_eq!(passes.iter().filter(|p| p.completes).count(), 7);
            assert!(passes.iter().all(|p| p.row < reverse.rows(7) && p.row % 7 == p.t));
        }
    }
}
