//! timestep_dist: the same integers as the specification, warm-up and repeated t included.

use super::*;
use iddpm::config::TimestepSampler;
use iddpm::ops::timestep_dist::TimestepDist as Step;
use iddpm::timestep::TimestepDist;

/// Batches longer and shorter than a block, processes longer and shorter than a block and than a batch.
#[test]
fn timestep_dist_draws_the_specified_integers() {
    for (sampler, steps, n, runs) in [
        (TimestepSampler::Uniform, 1000, 300, 3),
        (TimestepSampler::LossSecondMoment, 7, 5, 60),
        (TimestepSampler::LossSecondMoment, 40, 300, 6),
        (TimestepSampler::LossSecondMoment, 300, 4, 3),
    ] {
        let process = Arc::new(Process::new(Schedule::Cosine, steps).unwrap());
        let mut g = Graph::new();
        let control = g.fixed("control", Shape::rows(1, 16), DType::I32, Region::Inputs);
        let loss = g.fixed("loss", Shape::rows(n, 1), DType::F32, Region::State);
        let step = Step::record(&mut g, sampler, loss, control, process.clone(), true);
        let mut device = gpu();
        let id = device.bind(Plan::new(g, true)).unwrap();
        let (mut plain, mut t, mut losses, mut weighted) = (TimestepDist::new(sampler, steps), vec![], vec![], false);
        for k in 0..runs {
            plain.update(&t, &losses);
            let drawn = plain.draw(n, 31, k, 0);
            device.write(id, control, &[Control { seed: 31, step: k, ..Control::default() }]).unwrap();
            device.run(id).unwrap();
            t = drawn.iter().map(|d| d.0).collect();
            let what = format!("{sampler:?} T {steps} n {n} step {k}");
            let mut got = vec![0i32; n];
            device.read(id, step.t, &mut got).unwrap();
            assert_eq!(got, t.iter().map(|&t| t as i32).collect::<Vec<_>>(), "{what}");
            assert_eq!(read(&device, id, step.weight), drawn.iter().map(|d| d.1).collect::<Vec<_>>(), "{what}");
            let time: Vec<f32> = t.iter().map(|&t| process.time_value(t, true)).collect();
            assert_eq!(read(&device, id, step.time), time, "{what}");
            weighted |= drawn.iter().any(|d| d.1 != 1.0);
            losses = t.iter().zip(normals(n, k)).map(|(&t, x)| 0.1 + t as f32 * 0.01 + x.abs()).collect();
            device.write(id, loss, &losses).unwrap();
        }
        if let (Some(h), Some(history)) = (step.history, plain.history()) {
            assert_eq!(read(&device, id, h.losses), history.losses());
            let mut counts = vec![0u32; steps];
            device.read(id, h.counts, &mut counts).unwrap();
            assert_eq!(counts, history.counts());
        }
        assert_eq!(weighted, sampler == TimestepSampler::LossSecondMoment && steps < 300, "T {steps}");
    }
}

/// One draw from a warm history, however it is run.
#[test]
fn timestep_dist_has_the_same_bits_on_any_schedule() {
    let (steps, n) = (50, 40);
    let process = Arc::new(Process::new(Schedule::Cosine, steps).unwrap());
    let mut g = Graph::new();
    let control = g.fixed("control", Shape::rows(1, 16), DType::I32, Region::Inputs);
    let loss = g.fixed("loss", Shape::rows(n, 1), DType::F32, Region::State);
    let step = Step::record(&mut g, TimestepSampler::LossSecondMoment, loss, control, process, false);
    let h = step.history.unwrap();
    let fill = |d: &mut Device, id: PlanId| {
        d.write(id, control, &[CONTROL]).unwrap();
        d.write(id, step.t, &(0..n as i32).map(|i| i % 9).collect::<Vec<_>>()).unwrap();
        write(d, id, loss, &normals(n, 1));
        write(d, id, h.losses, &normals(10 * steps, 2));
        d.write(id, h.counts, &vec![10; steps]).unwrap();
    };
    same_bits(&g, &[step.t, step.time, step.weight, h.losses, h.counts], fill);
    let (launches, _) = metered(&g, fill);
    assert_eq!(launches.len(), 1);
}
