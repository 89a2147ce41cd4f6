//! A plain implementation in bf16, which the kernels are measured against: a plan recorded for CUDA in bf16, run on the processor in
//! f32, op by op, with every value that the plan holds in bf16 rounded after each step that writes it.

use half::bf16;
use iddpm::graph::{DType, Graph, Place, Region, Val};
use iddpm::ops::fast::Isa;
use iddpm::ops::{Operation, Views};

/// The nearest bf16 numbers.
pub fn round(x: &mut [f32]) {
    x.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
}

/// Root mean square of the difference, relative to that of `want`.
pub fn distance(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len(), "lengths");
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut got.iter().zip(want).map(|(g, w)| f64::from(g - w))) / norm(&mut want.iter().map(|&w| f64::from(w)))
}

/// The memory of such a run: the weights and their gradients flat, every other value by itself.
pub struct Plain {
    g: Graph,
    half: Vec<bool>,
    values: Vec<Vec<f32>>,
    weights: Vec<f32>,
    rounded: Vec<f32>,
    /// Gradients of all parameters.
    pub grads: Vec<f32>,
}

impl Plain {
    pub fn new(g: &Graph, weights: &[f32]) -> Self {
        let mut g = g.clone();
        let half = g.values.iter().map(|v| v.dtype == DType::Bf16).collect();
        g.values.iter_mut().filter(|v| v.dtype == DType::Bf16).for_each(|v| v.dtype = DType::F32);
        let values = g.values.iter().map(|v| vec![f32::NAN; v.bytes() / 4]).collect();
        let mut rounded = weights.to_vec();
        round(&mut rounded);
        Plain { g, half, values, weights: weights.to_vec(), rounded, grads: vec![0.0; weights.len()] }
    }

    /// Writes floats, rounded where the plan holds them so.
    pub fn write(&mut self, v: Val, x: &[f32]) {
        self.values[v.index()].copy_from_slice(x);
        self.round(v);
    }

    pub fn write_ints(&mut self, v: Val, x: &[i32]) {
        self.values[v.index()].copy_from_slice(bytemuck::cast_slice(x));
    }

    pub fn read(&self, v: Val) -> &[f32] {
        &self.values[v.index()]
    }

    fn round(&mut self, v: Val) {
        if self.half[v.index()] {
            round(&mut self.values[v.index()]);
        }
    }

    /// Runs the list once.
    pub fn run(&mut self) {
        let places = self.g.values.iter().zip(&mut self.values);
        let address: Vec<*mut u8> = places
            .map(|(v, own)| match v.place {
                Place::Fixed(Region::Params, at) => self.weights.as_mut_ptr().cast::<u8>().wrapping_add(at),
                Place::Fixed(Region::Compute, at) => self.rounded.as_mut_ptr().cast::<u8>().wrapping_add(2 * at),
                Place::Fixed(Region::Grads, at) => self.grads.as_mut_ptr().cast::<u8>().wrapping_add(at),
                _ => own.as_mut_ptr().cast(),
            })
            .collect();
        for i in 0..self.g.steps.len() {
            let op = self.g.steps[i].op.clone();
            let mut scratch = vec![f32::NAN; op.scratch(&self.g)];
            let space = (scratch.as_mut_ptr().cast(), scratch.len());
            // SAFETY: every value has memory of its own or a place in a flat region, which live as long as `self`; nothing else uses
            // them while the op runs.
            op.run_cpu(&unsafe { Views::new(&self.g, &address, space, Isa::detect()) });
            op.outputs().into_iter().for_each(|v| self.round(v));
        }
    }
}
