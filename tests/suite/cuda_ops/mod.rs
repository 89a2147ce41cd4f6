//! The diffusion and optimiser kernels on a GPU or its emulation, against their specification on the processor and the golden vectors.
//!
//! Kernels are held against the f64 functions of `iddpm::diffusion` and `iddpm::timestep`, over odd and real sizes, in f32 and in bf16
//! (of which the specification gets the rounded inputs); run again, on other grids and under the emulator's schedules for the same
//! bits; and metered against the bytes they declare.

mod bound;
mod golden;
mod optimiser;
mod sampling;
mod steer;
mod timestep;

pub use crate::device::gpu;
use half::bf16;
use iddpm::config::{MeanType, Schedule, VarType};
use iddpm::device::driver::{LaunchTraffic, Schedule as Play};
use iddpm::device::{Device, Plan, PlanId};
use iddpm::diffusion::{Output, to_unit};
use iddpm::graph::{DType, Graph, Region, Shape, Val};
use iddpm::ops::q_sample::{Images, Noise};
use iddpm::ops::{Control, Operation};
use iddpm::rng;
use iddpm::schedule::{Process, space_timesteps};
use std::sync::Arc;

pub const MEANS: [MeanType; 4] = [MeanType::Epsilon, MeanType::XStart, MeanType::PreviousX, MeanType::V];
pub const VARIANCES: [VarType; 4] = [VarType::FixedSmall, VarType::FixedLarge, VarType::Learned, VarType::LearnedRange];

/// Every meaning of the network's output.
pub fn outputs() -> impl Iterator<Item = Output> {
    MEANS.into_iter().flat_map(|mean_type| VARIANCES.map(|var_type| Output { mean_type, var_type }))
}

/// The schedules of the paper, long and respaced.
pub fn processes() -> [Arc<Process>; 3] {
    let linear = Process::new(Schedule::Linear, 1000).unwrap();
    let respaced = linear.respace(&space_timesteps(1000, "25").unwrap()).unwrap();
    [linear, Process::new(Schedule::Cosine, 4000).unwrap(), respaced].map(Arc::new)
}

/// Odd sizes, one pixel, more than one tile: (h, w, c).
pub const SIZES: [[usize; 3]; 5] = [[1, 1, 1], [5, 7, 3], [3, 3, 5], [33, 31, 3], [48, 64, 1]];

/// The device behind `device`, which is no processor.
pub fn cuda(device: &mut Device) -> &mut iddpm::device::cuda::Cuda {
    match device {
        Device::Cuda(d) => d,
        Device::Cpu(_) => panic!("the processor"),
    }
}

/// A plan whose activations are bf16, or f32.
pub fn graph(half: bool) -> Graph {
    let mut g = Graph::new();
    g.half = half;
    g
}

pub fn normals(n: usize, stream: u32) -> Vec<f32> {
    let mut x = vec![0.0; n];
    rng::fill_normal(&mut x, 77, stream, 0, 0);
    x
}

pub fn round(x: &[f32]) -> Vec<f32> {
    x.iter().map(|&x| bf16::from_f32(x).to_f32()).collect()
}

/// Writes numbers in the type of the value.
pub fn write(device: &mut Device, id: PlanId, v: Val, x: &[f32]) {
    match device.plan(id).graph[v].dtype {
        DType::Bf16 => device.write(id, v, &x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>()).unwrap(),
        _ => device.write(id, v, x).unwrap(),
    }
}

/// Reads numbers of either type.
pub fn read(device: &Device, id: PlanId, v: Val) -> Vec<f32> {
    let value = &device.plan(id).graph[v];
    let len = value.shape.len();
    if value.dtype == DType::Bf16 {
        let mut x = vec![bf16::NAN; len];
        device.read(id, v, &mut x).unwrap();
        return x.into_iter().map(bf16::to_f32).collect();
    }
    let mut x = vec![f32::NAN; len];
    device.read(id, v, &mut x).unwrap();
    x
}

/// A batch of images out of a data set of 7, as every kernel over images takes it.
pub struct Batch {
    pub images: Images,
    pub t: Val,
    pub shape: Shape,
    t_values: Vec<i32>,
}

const STORED: usize = 7;
pub const CONTROL: Control =
    Control { seed: 0x1234_5678_9abc, step: 11, t: 0, lr: 0.0, bias1: 0.0, bias2: 0.0, first: 40, reserved: [0; 8] };

impl Batch {
    /// A batch with one image for each of `t`.
    pub fn record(g: &mut Graph, [h, w, c]: [usize; 3], t: &[usize], flip: bool) -> Self {
        let n = t.len();
        let data = g.at("data", Shape::new(STORED, h, w, c), DType::U8, Region::Data, 0);
        let mut input = |name: &str, shape| g.fixed(name, shape, DType::I32, Region::Inputs);
        let control = input("control", Shape::rows(1, 16));
        let (index, t_val) = (input("index", Shape::rows(n, 1)), input("t", Shape::rows(n, 1)));
        let images = Images { data, index, flip, first_image: 3, control };
        Batch { images, t: t_val, shape: Shape::new(n, h, w, c), t_values: t.iter().map(|&t| t as i32).collect() }
    }

    /// Bytes of the data set: black and white pixels at the edges of the range among all others.
    fn bytes(&self) -> Vec<u8> {
        let one = self.shape.len() / self.shape.n;
        let pixel = |i: usize| rng::philox([i as u32, 9, 9, 9], 5)[0];
        (0..STORED * one)
            .map(|i| match pixel(i) % 8 {
                0 => 0,
                1 => 255,
                _ => (pixel(i) >> 8) as u8,
            })
            .collect()
    }

    fn index(&self, n: usize) -> usize {
        (n * 3 + 1) % STORED
    }

    pub fn write(&self, device: &mut Device, id: PlanId) {
        let index: Vec<i32> = (0..self.shape.n).map(|n| self.index(n) as i32).collect();
        device.write(id, self.images.data, &self.bytes()).unwrap();
        device.write(id, self.images.index, &index).unwrap();
        device.write(id, self.images.control, &[CONTROL]).unwrap();
        device.write(id, self.t, &self.t_values).unwrap();
    }

    /// Elements of one image.
    pub fn size(&self) -> usize {
        self.shape.len() / self.shape.n
    }

    /// x_0 of every image, one after the other.
    pub fn x_0(&self) -> Vec<f32> {
        let (bytes, size, [w, c]) = (self.bytes(), self.size(), [self.shape.w, self.shape.c]);
        let pixel = |n: usize, i: usize| {
            let counter = [0, self.images.first_image + n as u32, CONTROL.step, rng::op::FLIP];
            let mirrored = self.images.flip && rng::philox(counter, CONTROL.seed)[0] >> 31 == 1;
            let (row, col, k) = (i / (w * c), i / c % w, i % c);
            let col = if mirrored { w - 1 - col } else { col };
            to_unit(bytes[self.index(n) * size + (row * w + col) * c + k])
        };
        (0..self.shape.len()).map(|i| pixel(i / size, i % size)).collect()
    }

    /// The drawn noise of every image.
    pub fn eps(&self, noise: Noise) -> Vec<f32> {
        let mut eps = vec![0.0; self.shape.len()];
        for (n, eps) in eps.chunks_exact_mut(self.size()).enumerate() {
            let (image, step, op) = match noise {
                Noise::PerImage => (CONTROL.first + self.index(n) as u32, self.t_values[n] as u32, rng::op::NLL),
                _ => (self.images.first_image + n as u32, CONTROL.step, rng::op::Q_SAMPLE),
            };
            rng::fill_normal(eps, CONTROL.seed, image, step, op);
        }
        eps
    }
}

/// Steps worth a look: the first two, a middle one, the last.
pub fn steps_of(process: &Process) -> [usize; 4] {
    let steps = process.steps();
    [0, 1, steps / 2, steps - 1]
}

/// Binds `g`, lets `write` fill it, and runs it.
pub fn run(mut device: Device, g: &Graph, write: impl Fn(&mut Device, PlanId)) -> (Device, PlanId) {
    let id = device.bind(Plan::new(g.clone(), true)).unwrap();
    write(&mut device, id);
    device.run(id).unwrap();
    (device, id)
}

/// Bits of the outputs of every way to play the plan out: the emulator's schedules, one block, many blocks, a graph, once more.
pub fn same_bits(g: &Graph, outputs: &[Val], write: impl Fn(&mut Device, PlanId)) {
    let bits = |device: &Device, id| -> Vec<Vec<u32>> {
        outputs.iter().map(|&v| read(device, id, v).iter().map(|x| x.to_bits()).collect()).collect()
    };
    let mut device = gpu();
    let id = device.bind(Plan::new(g.clone(), true)).unwrap();
    write(&mut device, id);
    device.run(id).unwrap();
    let first = bits(&device, id);
    let again = |what: &str, device: &mut Device| {
        write(device, id);
        device.run(id).unwrap();
        assert!(bits(device, id) == first, "{what}: other bits");
    };
    again("second run", &mut device);
    for blocks in [1, 3, 1000] {
        cuda(&mut device).set_blocks(blocks);
        again(&format!("{blocks} blocks"), &mut device);
    }
    let plays = if device.is_emulated() { Play::sweep() } else { Vec::new() };
    for play in plays {
        cuda(&mut device).driver().emulator().unwrap().set_schedule(play);
        again(&format!("{play:?}"), &mut device);
    }
    device.capture(id).unwrap();
    again("as a graph", &mut device);
    again("as a graph, again", &mut device);
}

/// Runs the plan under the emulator's traffic meter: each launch, and the bytes moved by all.
pub fn metered(g: &Graph, write: impl Fn(&mut Device, PlanId)) -> (Vec<LaunchTraffic>, f64) {
    let mut device = Device::emulated().unwrap();
    let id = device.bind(Plan::new(g.clone(), true)).unwrap();
    write(&mut device, id);
    let driver = cuda(&mut device).driver().clone();
    let ((), launches) = driver.emulator().unwrap().metered(|| device.run(id)).unwrap();
    let moved = launches.iter().map(|l| l.traffic.bytes() as f64).sum();
    (launches, moved)
}

/// [`metered`], held against what the plan declares and against strided access.
pub fn traffic(g: &Graph, write: impl Fn(&mut Device, PlanId)) -> (Vec<LaunchTraffic>, f64) {
    let (launches, moved) = metered(g, write);
    let cost = g.cost();
    let declared = cost.read + cost.written;
    let names: Vec<&str> = launches.iter().map(|l| l.kernel.as_str()).collect();
    println!("{names:?}: declared {declared} bytes, moved {moved} ({:.4})", moved / declared);
    assert!(moved <= 1.05 * declared, "{names:?}: {moved} bytes moved, {declared} declared");
    for l in &launches {
        let spread = l.traffic.sectors_per_ideal();
        assert!(spread <= 2.0, "{}: {spread} sectors for each one needed", l.kernel);
    }
    (launches, moved)
}

/// What the steps of a plan write.
pub fn outputs_of(g: &Graph) -> Vec<Val> {
    g.steps.iter().flat_map(|s| s.op.outputs()).collect()
}

#[test]
fn an_image_of_too_many_channels_is_refused() {
    let mut g = Graph::new();
    let batch = Batch::record(&mut g, [2, 2, 300], &[0], false);
    let process = processes()[0].clone();
    iddpm::ops::q_sample::QSample::record(&mut g, batch.images, batch.t, Noise::Drawn, process);
    let message = gpu().bind(Plan::new(g, true)).unwrap_err().to_string();
    assert!(message.contains("QSample") && message.contains("300") && message.contains("256"), "{message}");
}
