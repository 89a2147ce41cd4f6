//! Draws of t, their weights, and the history that a checkpoint stores.

use iddpm::config::TimestepSampler;
use iddpm::timestep::{HISTORY, LossHistory, TimestepDist};

use super::message;

#[test]
fn uniform_draws_are_uniform() {
    let dist = TimestepDist::new(TimestepSampler::Uniform, 10);
    assert_eq!(dist.probabilities(), vec![0.1; 10]);
    let (batch, steps) = (128, 800);
    let mut counts = [0u32; 10];
    for step in 0..steps {
        for (t, weight) in dist.draw(batch, 17, step, 0) {
            counts[t] += 1;
            assert_eq!(weight, 1.0);
        }
    }
    let n = f64::from(steps) * batch as f64;
    // Five standard errors of a binomial.
    assert!(counts.iter().all(|&c| (f64::from(c) - n * 0.1).abs() < 5.0 * (n * 0.09).sqrt()), "{counts:?}");
}

/// A draw depends on its image number alone, not on how the images are cut into batches.
#[test]
fn draws_do_not_depend_on_the_batch() {
    let dist = TimestepDist::new(TimestepSampler::Uniform, 1000);
    let whole = dist.draw(8, 5, 3, 0);
    assert_eq!(whole, [dist.draw(3, 5, 3, 0), dist.draw(5, 5, 3, 3)].concat());
    assert_ne!(whole, dist.draw(8, 5, 4, 0));
    assert_ne!(whole, dist.draw(8, 6, 3, 0));
}

#[test]
fn losses_choose_the_timesteps_after_the_warm_up() {
    let steps = 4;
    let mut dist = TimestepDist::new(TimestepSampler::LossSecondMoment, steps);
    let loss_of = [1.0f32, 2.0, 4.0, 1.0];
    for round in 0..HISTORY {
        assert_eq!(dist.weights(), vec![1.0; steps], "round {round}");
        assert!(dist.pick(&[0.0, 0.3, 0.99]).iter().all(|p| p.1 == 1.0));
        // t = 2 comes twice in a batch; what it saw first is pushed out.
        dist.update(&[0, 2, 1, 2, 3], &[1.0, 99.0, 2.0, 4.0, 1.0]);
    }
    assert!(dist.history().unwrap().is_warm());
    dist.update(&[2; HISTORY], &[4.0; HISTORY]);
    let p = dist.probabilities();
    for t in 0..steps {
        let expected = 0.999 * f64::from(loss_of[t]) / 8.0 + 0.001 / 4.0;
        assert!((p[t] - expected).abs() < 1e-12, "{p:?}");
    }
    let (batch, calls) = (64, 2000);
    let (mut counts, mut weighted) = ([0u32; 4], 0.0);
    for step in 0..calls {
        for (t, weight) in dist.draw(batch, 23, step, 0) {
            counts[t] += 1;
            weighted += f64::from(weight) * f64::from(loss_of[t]);
            assert!((f64::from(weight) - 1.0 / (4.0 * p[t])).abs() < 1e-6);
        }
    }
    let n = f64::from(calls) * batch as f64;
    for t in 0..steps {
        assert!((f64::from(counts[t]) - n * p[t]).abs() < 5.0 * (n * p[t]).sqrt(), "{counts:?} {p:?}");
    }
    // The weighted losses are an unbiased estimate of the plain mean, 2; their spread is below 0.01 here.
    assert!((weighted / n - 2.0).abs() < 0.01, "{}", weighted / n);
}

#[test]
fn histories_are_stored_and_restored() {
    let mut dist = TimestepDist::new(TimestepSampler::LossSecondMoment, 3);
    for i in 0..25u8 {
        dist.update(&[usize::from(i) % 3, 1], &[f32::from(i), 0.5]);
    }
    let history = dist.history().unwrap();
    let (losses, counts) = (history.losses().to_vec(), history.counts().to_vec());
    assert_eq!((losses.len(), counts.as_slice()), (3 * HISTORY, [9, 10, 8].as_slice()));
    let mut again = TimestepDist::new(TimestepSampler::LossSecondMoment, 3);
    again.restore(losses.clone(), counts.clone()).unwrap();
    assert_eq!(again, dist);
    let mut other = TimestepDist::new(TimestepSampler::LossSecondMoment, 4);
    assert!(message(other.restore(losses.clone(), counts.clone())).contains("4 steps need 40 and 4"));
    assert!(message(again.restore(losses.clone(), vec![11, 0, 0])).contains("damaged"));
    let mut uniform = TimestepDist::new(TimestepSampler::Uniform, 3);
    assert!(message(uniform.restore(losses, counts)).contains("uniformly"));
    assert_eq!(LossHistory::new(3, 2, 0.1).losses(), [0.0; 6]);
}
