//! A plain implementation in bf16, which the kernels are measured against: a plan recorded for CUDA in bf16, run on the processor in
//! f32, op by op, with every value that the plan holds in bf16 rounded after each step that writes it.

use half::bf16;
use iddpm::graph::{DType, Graph, Place, Region, Val, Value};
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

/// The memory of such a run: the regions that are laid out as the weights are flat, every other value has its own.
pub struct Plain {
    g: Graph,
    half: Vec<bool>,
    /// Whose memory a value lies in, and how many bytes from its start: its own but for a view.
    home: Vec<(usize, usize)>,
    values: Vec<Vec<f32>>,
    flat: [Vec<f32>; 9],
}

fn is_flat(region: Region) -> bool {
    !matches!(region, Region::Inputs | Region::State | Region::Data)
}

/// The first value that holds all of value `i`.
fn home(g: &Graph, i: usize) -> (usize, usize) {
    let Place::Fixed(region, at) = g.values[i].place else { return (i, 0) };
    if is_flat(region) {
        return (i, 0);
    }
    let holds = |j: &usize| match g.values[*j].place {
        Place::Fixed(r, from) => r == region && from <= at && at + g.values[i].bytes() <= from + g.values[*j].bytes(),
        Place::Arena => false,
    };
    let j = (0..=i).find(holds).expect("it holds itself");
    let Place::Fixed(_, from) = g.values[j].place else { unreachable!("a fixed value") };
    assert!(i == j || g.values[j].dtype != DType::Bf16, "{}: a view of bf16", g.values[i].name);
    (j, at - from)
}

impl Plain {
    /// Memory for the plan `g`.
    pub fn new(g: &Graph) -> Self {
        let mut g = g.clone();
        let half = g.values.iter().map(|v| v.dtype == DType::Bf16).collect();
        let home = (0..g.values.len()).map(|i| home(&g, i)).collect();
        let flat = Region::ALL.map(|r| if is_flat(r) { vec![0.0; g.region_bytes(r) / 4] } else { Vec::new() });
        g.values.iter_mut().filter(|v| v.dtype == DType::Bf16).for_each(|v| v.dtype = DType::F32);
        // As on a device, what survives from run to run is 0 at first.
        let first = |v: &Value| if v.place == Place::Arena { f32::NAN } else { 0.0 };
        let values = g.values.iter().map(|v| vec![first(v); v.bytes().div_ceil(4)]).collect();
        Plain { g, half, home, values, flat }
    }

    /// Writes a region that is laid out as the weights are.
    pub fn write_region(&mut self, region: Region, x: &[f32]) {
        self.flat[region as usize] = x.to_vec();
        self.round_weights();
    }

    pub fn region(&self, region: Region) -> &[f32] {
        &self.flat[region as usize]
    }

    /// Writes a value of floats, rounded where the plan holds them so, or of anything else.
    pub fn write<T: bytemuck::Pod>(&mut self, v: Val, x: &[T]) {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.values[v.index()]);
        bytes[..size_of_val(x)].copy_from_slice(bytemuck::cast_slice(x));
        self.round(v);
    }

    pub fn read(&self, v: Val) -> &[f32] {
        assert_eq!(self.home[v.index()].0, v.index(), "a view");
        &self.values[v.index()]
    }

    fn round(&mut self, v: Val) {
        if self.half[v.index()] {
            round(&mut self.values[v.index()]);
        }
    }

    fn round_weights(&mut self) {
        let mut rounded = self.flat[Region::Params as usize].clone();
        round(&mut rounded);
        self.flat[Region::Compute as usize] = rounded;
    }

    /// Runs the list once.
    pub fn run(&mut self) {
        let own: Vec<*mut u8> = self.values.iter_mut().map(|x| x.as_mut_ptr().cast()).collect();
        let flat = self.flat.each_mut().map(|x| x.as_mut_ptr().cast::<u8>());
        let places = self.g.values.iter().zip(&self.home);
        let address: Vec<*mut u8> = places
            .map(|(v, &(home, offset))| match v.place {
                Place::Fixed(Region::Compute, at) => flat[Region::Compute as usize].wrapping_add(2 * at),
                Place::Fixed(region, at) if is_flat(region) => flat[region as usize].wrapping_add(at),
                _ => own[home].wrapping_add(offset),
            })
            .collect();
        for i in 0..self.g.steps.len() {
            let op = self.g.steps[i].op.clone();
            let mut scratch = vec![f32::NAN; op.scratch(&self.g)];
            let space = (scratch.as_mut_ptr().cast(), scratch.len());
            // SAFETY: every value has memory of its own, lies in another's or in a flat region, which live as long as `self`; nothing else
            // uses them while the op runs.
            op.run_cpu(&unsafe { Views::new(&self.g, &address, space, Isa::detect()) });
            op.outputs().into_iter().for_each(|v| self.round(v));
        }
        self.round_weights();
    }
}
