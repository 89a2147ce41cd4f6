//! Steps of the diffusion process on a device against their plain specification.

use crate::device::device;
use iddpm::config::{Schedule, TimestepSampler};
use iddpm::device::{Device, Plan, PlanId};
use iddpm::diffusion;
use iddpm::graph::{DType, Graph, Region, Shape, Val};
use iddpm::ops::Control;
use iddpm::ops::q_sample::{Images, Noise, QSample};
use iddpm::ops::timestep_dist::TimestepDist as Step;
use iddpm::rng;
use iddpm::schedule::Process;
use iddpm::timestep::TimestepDist;
use std::sync::Arc;

fn read<T: bytemuck::Pod>(device: &Device, id: PlanId, v: Val) -> Vec<T> {
    let mut out = vec![T::zeroed(); device.plan(id).graph.shape(v).len()];
    device.read(id, v, &mut out).unwrap();
    out
}

/// 200 steps of 3 images over a process of 7: warm-up, then draws by loss, repeated t in a batch included.
#[test]
fn timesteps_are_drawn_as_specified() {
    for sampler in [TimestepSampler::Uniform, TimestepSampler::LossSecondMoment] {
        let (n, seed) = (3, 17);
        let process = Arc::new(Process::new(Schedule::Cosine, 7).unwrap());
        let mut g = Graph::new();
        let control = g.fixed("control", Shape::rows(1, 16), DType::I32, Region::Inputs);
        let loss = g.fixed("loss", Shape::rows(n, 1), DType::F32, Region::State);
        let step = Step::record(&mut g, sampler, loss, control, process.clone(), true);
        let mut device = device();
        let id = device.bind(Plan::new(g, true)).unwrap();
        let mut plain = TimestepDist::new(sampler, 7);
        let mut losses: Vec<f32> = Vec::new();
        let mut t: Vec<usize> = Vec::new();
        let mut weighted = false;
        for k in 0..200u32 {
            plain.update(&t, &losses);
            let drawn = plain.draw(n, seed, k, 0);
            device.write(id, control, &[Control { seed, step: k, ..Control::default() }]).unwrap();
            device.run(id).unwrap();
            t = drawn.iter().map(|d| d.0).collect();
            assert_eq!(read::<i32>(&device, id, step.t), t.iter().map(|&t| t as i32).collect::<Vec<_>>(), "step {k}");
            assert_eq!(read::<f32>(&device, id, step.weight), drawn.iter().map(|d| d.1).collect::<Vec<_>>());
            let time: Vec<f32> = t.iter().map(|&t| process.time_value(t, true)).collect();
            assert_eq!(read::<f32>(&device, id, step.time), time);
            weighted |= drawn.iter().any(|d| d.1 != 1.0);
            losses = t.iter().map(|&t| 0.1 + t as f32 * 0.3 + k as f32 * 0.01).collect();
            device.write(id, loss, &losses).unwrap();
        }
        assert_eq!(weighted, sampler == TimestepSampler::LossSecondMoment);
    }
}

#[test]
fn images_are_gathered_flipped_and_noised_as_specified() {
    let (n, seed, step, size) = (40usize, 5, 3, [4usize, 5, 3]);
    let [h, w, c] = size;
    let process = Arc::new(Process::new(Schedule::Linear, 50).unwrap());
    let mut g = Graph::new();
    let data = g.at("data", Shape::new(9, h, w, c), DType::U8, Region::Data, 0);
    let mut input = |name: &str, shape, dtype| g.fixed(name, shape, dtype, Region::Inputs);
    let control = input("control", Shape::rows(1, 16), DType::I32);
    let (index, t) = (input("index", Shape::rows(n, 1), DType::I32), input("t", Shape::rows(n, 1), DType::I32));
    let images = Images { data, index, flip: true, first_image: 2, control };
    let (x_t, eps) = QSample::record_stored(&mut g, images, t, Noise::Drawn, process.clone());
    g.keep(x_t);
    g.keep(eps);
    let mut device = device();
    let id = device.bind(Plan::new(g, true)).unwrap();
    let bytes: Vec<u8> = (0..9 * h * w * c).map(|i| (i * 71 % 256) as u8).collect();
    let (indices, ts): (Vec<i32>, Vec<i32>) = (0..n as i32).map(|i| (i * 5 % 9, i * 7 % 50)).unzip();
    device.write(id, data, &bytes).unwrap();
    device.write(id, index, &indices).unwrap();
    device.write(id, t, &ts).unwrap();
    device.write(id, control, &[Control { seed, step, ..Control::default() }]).unwrap();
    device.run(id).unwrap();
    let (got, noise) = (read::<f32>(&device, id, x_t), read::<f32>(&device, id, eps));
    let mut flipped = 0;
    for i in 0..n {
        let mirrored = rng::philox([0, 2 + i as u32, step, rng::op::FLIP], seed)[0] >> 31 == 1;
        flipped += usize::from(mirrored);
        let mut normals = vec![0.0; h * w * c];
        rng::fill_normal(&mut normals, seed, 2 + i as u32, step, rng::op::Q_SAMPLE);
        assert_eq!(noise[i * normals.len()..][..normals.len()], normals);
        let coefs = process.at(ts[i] as usize);
        for (p, eps) in normals.iter().enumerate() {
            let (row, col, k) = (p / (w * c), p / c % w, p % c);
            let col = if mirrored { w - 1 - col } else { col };
            let byte = bytes[((indices[i] as usize * h + row) * w + col) * c + k];
            let x_0 = f64::from(diffusion::to_unit(byte));
            let x = diffusion::gaussian::q_sample_value(&coefs, x_0, f64::from(*eps)) as f32;
            assert_eq!(got[i * normals.len() + p], x, "image {i}, element {p}, seed {seed}");
        }
    }
    assert!((5..35).contains(&flipped), "{flipped} of {n} images flipped");
}
