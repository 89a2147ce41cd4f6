//! Steps of the samplers, and the bytes they end in.

use iddpm::config::{MeanType, Schedule, VarType};
use iddpm::diffusion::gaussian::{self, p_mean_variance, q_sample_value};
use iddpm::diffusion::reverse::ddim_coefs;
use iddpm::diffusion::{Output, clip, ddim, ddim_reverse, p_sample, to_byte, to_byte_truncate, to_unit};
use iddpm::schedule::Process;

use super::processes;

/// DDIM with eta = 1 is ancestral sampling from the posterior: the same mean, the same deviation.
#[test]
fn ddim_at_eta_one_is_the_posterior() {
    for p in processes() {
        for t in 0..p.steps() {
            let c = p.at(t);
            let (keep, eps_scale, sigma) = ddim_coefs(&c, 1.0);
            let close = |a: f64, b: f64| (a - b).abs() <= 1e-9 * b.abs().max(1e-2);
            assert!(close(sigma * sigma, c.beta_tilde), "sigma at {t}: {sigma} {}", c.beta_tilde);
            let (x_0, eps) = (0.4, -1.1);
            let ddim_mean = keep * x_0 + eps_scale * eps;
            let mean = gaussian::q_posterior_mean(&c, x_0, q_sample_value(&c, x_0, eps));
            assert!(close(ddim_mean, mean), "mean at {t} of {}: {ddim_mean} {mean}", p.steps());
        }
    }
}

/// With one prediction of x_0 and eps, the backward DDIM step undoes the forward one.
#[test]
fn ddim_and_its_reverse_undo_each_other() {
    let p = Process::new(Schedule::Linear, 100).unwrap();
    let output = Output { mean_type: MeanType::XStart, var_type: VarType::FixedLarge };
    let x_0 = [0.5f32, -0.25, 0.75];
    let x_5 = [0.2f32, 0.9, -1.5];
    let (mut x_4, mut back, mut predicted) = ([f32::NAN; 3], [f32::NAN; 3], [f32::NAN; 3]);
    ddim(output, &p.at(5), 3, 0.0, clip(false), &mut x_4, &mut predicted, &x_5, &x_0, &[7.0; 3]);
    ddim_reverse(output, &p.at(4), 3, clip(false), &mut back, &mut predicted, &x_4, &x_0);
    for (a, b) in back.iter().zip(&x_5) {
        assert!((a - b).abs() <= 1e-5, "{back:?} {x_5:?}");
    }
    assert_eq!(predicted, x_0);
}

/// The last step adds no noise, clipping bounds x_0, the noise enters by its deviation.
#[test]
fn ancestral_step_adds_its_noise_except_at_the_end() {
    let p = Process::new(Schedule::Cosine, 20).unwrap();
    let output = Output { mean_type: MeanType::Epsilon, var_type: VarType::LearnedRange };
    let (x_t, out) = ([0.4f32, -2.0], [0.1f32, -3.0, 0.5, -0.5]);
    let run = |t: usize, noise: [f32; 2]| {
        let (mut next, mut x_0) = ([f32::NAN; 2], [f32::NAN; 2]);
        p_sample(output, &p.at(t), 2, clip(true), &mut next, &mut x_0, &x_t, &out, &noise);
        (next, x_0)
    };
    assert_eq!(run(0, [5.0, -5.0]), run(0, [0.0, 0.0]));
    let (quiet, x_0) = run(7, [0.0, 0.0]);
    let loud = run(7, [1.0, -2.0]).0;
    assert!(x_0.iter().all(|x| x.abs() <= 1.0));
    for (i, factor) in [(0, 1.0), (1, -2.0)] {
        let expected = p_mean_variance(&p.at(7), output, x_t[i].into(), (out[i].into(), out[2 + i].into()), clip(true));
        assert!((f64::from(quiet[i]) - expected.mean).abs() < 1e-6);
        assert!((f64::from(loud[i] - quiet[i]) - factor * expected.variance.sqrt()).abs() < 1e-6);
    }
}

#[test]
fn every_byte_survives_and_the_reference_loses_63() {
    let levels: Vec<u8> = (0..=255).collect();
    assert!(levels.iter().all(|&b| to_byte(to_unit(b)) == b));
    assert_eq!(levels.iter().filter(|&&b| to_byte_truncate(to_unit(b)) != b).count(), 63);
    assert_eq!([-7.0, -1.0, 1.0, 9.0].map(to_byte), [0, 0, 255, 255]);
    assert_eq!([-7.0, -1.0, 1.0, 9.0].map(to_byte_truncate), [0, 0, 255, 255]);
}
