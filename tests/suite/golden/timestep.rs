//! Kind 08_timestep_samplers: histories, weights and draws of the choice of t.

use iddpm::timestep::{LossHistory, TimestepDist};
use serde_json::Value;

use super::vectors::VectorFile;

/// Replays the updates of every case and compares weights, probabilities and draws after each.
pub fn check(file: &VectorFile) {
    for (name, case) in &file.cases {
        let steps = case["T"].as_u64().expect("`T`") as usize;
        if case["history_per_term"].is_null() {
            let dist = TimestepDist::Uniform { steps };
            file.compare(&format!("{name}/weights"), &dist.weights());
            draws(file, name, &[dist.pick(&file.get(&format!("{name}/u")).values)]);
        } else {
            replay(file, name, case, steps);
        }
    }
}

fn replay(file: &VectorFile, name: &str, case: &Value, steps: usize) {
    let per_step = case["history_per_term"].as_u64().expect("history_per_term") as usize;
    let uniform_prob = case["uniform_prob"].as_f64().expect("uniform_prob");
    let mut dist = TimestepDist::LossSecondMoment(LossHistory::new(steps, per_step, uniform_prob));
    let get = |part: &str| file.get(&format!("{name}/{part}"));
    let (t, loss, u) = (get("t"), get("loss"), get("u"));
    let (mut warm, mut weights, mut p, mut picks) = (vec![], vec![], vec![], vec![]);
    for call in 0..t.shape[0] {
        dist.update(&t.sub(call).indices(), &loss.sub(call).f32s());
        warm.push(f64::from(dist.history().expect("a history").is_warm()));
        weights.extend(dist.weights());
        p.extend(dist.probabilities());
        picks.push(dist.pick(&u.sub(call).values));
    }
    if let Some(first) = case["first_warm_call"].as_u64() {
        let got = warm.iter().position(|&w| w == 1.0);
        if got != Some(first as usize) {
            file.fail(format!("{name}: warm from call {got:?}, expected {first}"));
        }
    }
    file.compare(&format!("{name}/warm"), &warm);
    file.compare(&format!("{name}/weights"), &weights);
    file.compare(&format!("{name}/p"), &p);
    draws(file, name, &picks);
}

fn draws(file: &VectorFile, name: &str, picks: &[Vec<(usize, f32)>]) {
    let picks: Vec<_> = picks.iter().flatten().collect();
    file.compare(&format!("{name}/sampled_t"), &picks.iter().map(|p| p.0 as f64).collect::<Vec<_>>());
    file.compare_f32(&format!("{name}/importance_weight"), &picks.iter().map(|p| p.1).collect::<Vec<_>>());
}
