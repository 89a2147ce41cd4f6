//! The forward process, its tables, its refusals, its respacing.

use iddpm::config::{DiffusionConfig, MeanType, Schedule};
use iddpm::diffusion::gaussian::{self, q_sample_value};
use iddpm::schedule::{Process, space_timesteps};
use proptest::prelude::*;

use super::{message, processes};

#[test]
fn alpha_bar_falls_from_below_one_to_above_zero() {
    for p in processes() {
        assert!(p.alpha_bar[0] < 1.0 && p.alpha_bar.is_sorted_by(|a, b| a > b), "T = {}", p.steps());
        assert!(*p.alpha_bar.last().unwrap() > 0.0);
        assert_eq!((p.alpha_bar_prev[0], p.alpha_bar_next[p.steps() - 1]), (1.0, 0.0));
        assert_eq!(p.alpha_bar_prev[1..], p.alpha_bar[..p.steps() - 1]);
    }
}

/// alpha_bar of the sigmoid schedule by another form of the logistic, and by its symmetry about the middle.
#[test]
fn sigmoid_alpha_bar_is_the_closed_form() {
    let steps = 1000;
    let p = Process::new(Schedule::Sigmoid, steps).unwrap();
    let s = |x: f64| 0.5 * (1.0 + (0.5 * x).tanh());
    for t in 0..steps - 1 {
        let u = (t + 1) as f64 / steps as f64;
        let truth = (s(3.0) - s(6.0 * u - 3.0)) / (s(3.0) - s(-3.0));
        // A product of as many factors, each with a rounding; near the end 1 - beta cancels.
        assert!((p.alpha_bar[t] - truth).abs() <= 1e-12 * truth + 1e-15, "t = {t}: {} {truth}", p.alpha_bar[t]);
        if t + 1 < steps / 2 {
            assert!((p.alpha_bar[t] + p.alpha_bar[steps - 2 - t] - 1.0).abs() <= 1e-12, "t = {t}");
        }
    }
    assert!((p.alpha_bar[steps / 2 - 1] - 0.5).abs() <= 1e-12);
    assert_eq!(*p.beta.last().unwrap(), 0.999);
}

/// The posterior is the product of q(x_t | x_{t-1}) and q(x_{t-1} | x_0), normalised: precisions and weighted means add.
#[test]
fn posterior_is_bayes_rule() {
    for p in processes() {
        for t in 1..p.steps() {
            let c = p.at(t);
            let alpha = 1.0 - c.beta;
            let precision = alpha / c.beta + 1.0 / (1.0 - c.alpha_bar_prev);
            let (x_0, x_t) = (0.3, -0.8);
            let mean =
                (alpha.sqrt() / c.beta * x_t + c.alpha_bar_prev.sqrt() / (1.0 - c.alpha_bar_prev) * x_0) / precision;
            // 1 - alpha_bar near the first steps of 4000 has lost 6 digits already.
            let close = |a: f64, b: f64| (a - b).abs() <= 1e-9 * b.abs().max(1e-3);
            assert!(close(c.beta_tilde, 1.0 / precision), "variance at {t} of {}", p.steps());
            assert!(close(gaussian::q_posterior_mean(&c, x_0, x_t), mean), "mean at {t} of {}", p.steps());
            assert_eq!(c.log_beta_tilde_clipped, c.beta_tilde.ln());
        }
        let first = p.at(0);
        assert_eq!((first.beta_tilde, first.log_beta_tilde_clipped), (0.0, p.beta_tilde[1].ln()));
        assert_eq!((first.beta_large, first.log_beta_large), (p.beta_tilde[1], p.beta_tilde[1].ln()));
    }
}

#[test]
fn predictions_of_x_0_undo_each_other() {
    for p in processes() {
        for t in [0, 1, p.steps() / 2, p.steps() - 1] {
            let c = p.at(t);
            let (x_0, eps) = (-0.7, 1.3);
            let x_t = q_sample_value(&c, x_0, eps);
            // sqrt(1/alpha_bar) amplifies the rounding of x_t.
            let allowed = 1e-12 * (1.0 + c.sqrt_recip_alpha_bar) / c.sqrt_one_minus_alpha_bar;
            assert!((gaussian::x_0_from_eps(&c, x_t, eps) - x_0).abs() <= allowed, "t = {t}");
            assert!((gaussian::eps_from_x_0(&c, x_t, x_0) - eps).abs() <= allowed, "t = {t}");
            let v = gaussian::target(&c, MeanType::V, x_0, x_t, eps);
            assert!((gaussian::x_0_from_v(&c, x_t, v) - x_0).abs() <= 1e-14, "t = {t}");
            let x_prev = gaussian::q_posterior_mean(&c, x_0, x_t);
            let back = gaussian::x_0_from_x_prev(&c, x_t, x_prev);
            assert!((back - x_0).abs() <= 1e-12 * (1.0 + 1.0 / c.coef1), "t = {t}: {back}");
        }
    }
}

#[test]
fn impossible_processes_are_refused_with_the_way_out() {
    for steps in [0, 1] {
        assert!(message(Process::new(Schedule::Cosine, steps)).contains("2 steps or more"));
        assert!(message(Process::new(Schedule::Linear, steps)).contains("2 steps or more"));
    }
    for steps in [2, 10, 19] {
        let text = message(Process::new(Schedule::Linear, steps));
        assert!(text.contains("20 steps or more") && text.contains(&format!("= {steps}")), "{text}");
    }
    let last = Process::new(Schedule::Linear, 20).unwrap().at(19);
    assert_eq!((last.beta, last.alpha_bar), (1.0, 0.0));
    assert_eq!((last.sqrt_recip_alpha_bar, last.sqrt_recipm1_alpha_bar), (f64::INFINITY, f64::INFINITY));
    let config = DiffusionConfig { timestep_respacing: "1".into(), ..DiffusionConfig::default() };
    assert!(message(Process::from_config(&config)).contains("1 of 1000 steps"));
}

#[test]
fn impossible_respacings_are_refused_with_the_way_out() {
    let refusal = |steps, spec| message(space_timesteps(steps, spec));
    assert!(refusal(10, "ddim7").contains("\"ddim5\""));
    assert!(refusal(1000, "ddim900").contains("\"ddim1000\""));
    assert!(refusal(1000, "ddim1").contains("\"ddim2\""));
    assert!(refusal(10, "6,5").contains("section 0 asks for 6 steps but has 5"));
    for spec in ["", "ddim", "ddimx", "10,", "ten", "-5", "1.5", "99999999999999999999999"] {
        assert!(refusal(100, spec).contains("\"ddim50\""), "{spec}");
    }
}

/// Without respacing the identity spacing rounds the betas again, by no more than their cancellation explains.
#[test]
fn no_respacing_is_the_identity() {
    for (noise_schedule, steps) in [(Schedule::Linear, 1000), (Schedule::Cosine, 4000), (Schedule::Linear, 20)] {
        let config = DiffusionConfig { noise_schedule, diffusion_steps: steps, ..DiffusionConfig::default() };
        let (p, base) = (Process::from_config(&config).unwrap(), Process::new(noise_schedule, steps).unwrap());
        assert_eq!(p.timestep_map, (0..steps).collect::<Vec<_>>());
        assert!(p.beta.iter().zip(&base.beta).all(|(a, b)| (a - b).abs() <= 1e-15), "T = {steps}");
    }
}

/// Even spacing of the log-SNR, up to the distance of neighbouring steps; as many different steps as asked for, the ends among them.
#[test]
fn log_snr_steps_are_evenly_spaced() {
    for base in processes() {
        let all = base.steps();
        let log_snr = |t: usize| (base.alpha_bar[t] / (1.0 - base.alpha_bar[t])).ln();
        for count in [2, 3, 10, all / 2, all - 1, all].into_iter().filter(|n| (2..=all).contains(n)) {
            let kept = base.log_snr_steps(count).unwrap();
            assert!(kept.len() == count && kept.is_sorted_by(|a, b| a < b), "{count} of {all}");
            assert_eq!((kept[0], kept[count - 1]), (0, all - 1));
        }
        if all == 1000 {
            let kept = base.log_snr_steps(10).unwrap();
            let even = (log_snr(0) - log_snr(all - 1)) / 9.0;
            for (i, &t) in kept.iter().enumerate().skip(1).take(6) {
                let gap = (log_snr(t - 1) - log_snr(t + 1)) / 2.0;
                assert!((log_snr(t) - (log_snr(0) - i as f64 * even)).abs() <= gap, "{i}: {kept:?}");
            }
        }
        for count in [0, 1, all + 1] {
            let what = message(base.log_snr_steps(count));
            assert!(what.contains(&format!("logsnr{count}")) && what.contains(&all.to_string()), "{what}");
        }
    }
    let config = DiffusionConfig { timestep_respacing: "logsnrx".into(), ..DiffusionConfig::default() };
    assert!(message(Process::from_config(&config)).contains("logsnr20"));
}

#[test]
fn the_network_is_told_the_original_time() {
    let config = |respacing: &str| DiffusionConfig {
        noise_schedule: Schedule::Cosine,
        diffusion_steps: 4000,
        timestep_respacing: respacing.into(),
        ..DiffusionConfig::default()
    };
    let whole = Process::from_config(&config("")).unwrap();
    assert_eq!((whole.time_value(3999, true), whole.time_value(3999, false)), (999.75, 3999.0));
    let few = Process::from_config(&config("ddim50")).unwrap();
    assert_eq!((few.steps(), few.time_value(49, true), few.time_value(49, false)), (50, 980.0, 3920.0));
}

proptest! {
    #[test]
    fn sections_keep_what_they_promise(sizes in prop::collection::vec((1usize..60, 0.0..1.0f64), 1..6), more in 0usize..6) {
        // A T whose sections have these sizes up to the even split, and counts that fit the smallest.
        let sections = sizes.len();
        let steps = sizes.iter().map(|s| s.0).sum::<usize>() + more;
        let smallest = steps / sections;
        let counts: Vec<usize> = sizes.iter().map(|s| (s.1 * (smallest + 1) as f64) as usize).collect();
        let spec = counts.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
        let kept = space_timesteps(steps, &spec).unwrap();
        prop_assert_eq!(kept.len(), counts.iter().sum::<usize>(), "{} of {}", spec, steps);
        prop_assert!(kept.is_sorted_by(|a, b| a < b) && kept.iter().all(|&t| t < steps));
        let mut start = 0;
        for (i, &count) in counts.iter().enumerate() {
            let size = smallest + usize::from(i < steps % sections);
            let own: Vec<usize> = kept.iter().copied().filter(|t| (start..start + size).contains(t)).collect();
            prop_assert_eq!(own.len(), count);
            prop_assert!(count == 0 || own[0] == start);
            prop_assert!(count < 2 || own[count - 1] == start + size - 1);
            start += size;
        }
    }

    #[test]
    fn strides_are_even_and_smallest(steps in 2usize..400, stride in 1usize..400) {
        prop_assume!(stride < steps);
        let count = steps.div_ceil(stride);
        let kept = space_timesteps(steps, &format!("ddim{count}")).unwrap();
        let first = kept[1];
        prop_assert!(first <= stride && kept.len() == count);
        prop_assert!(kept.iter().enumerate().all(|(i, &t)| t == i * first));
    }

    /// Respacing keeps alpha_bar at the kept steps.
    #[test]
    fn respaced_processes_agree_where_they_meet(steps in 20usize..500, share in 0.0..1.0f64, linear: bool) {
        let base = Process::new(if linear { Schedule::Linear } else { Schedule::Cosine }, steps).unwrap();
        let kept = space_timesteps(steps, &(2 + (share * (steps - 2) as f64) as usize).to_string()).unwrap();
        let p = base.respace(&kept).unwrap();
        prop_assert_eq!(&p.timestep_map, &kept);
        for (i, &t) in kept.iter().enumerate() {
            // Each product of 1 - beta adds a rounding; 1 - beta itself cancels where beta is near 1.
            let (got, truth) = (p.alpha_bar[i], base.alpha_bar[t]);
            prop_assert!((got - truth).abs() <= 1e-11 * truth + 1e-16, "{} {}", got, truth);
        }
    }
}
