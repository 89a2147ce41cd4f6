//! Kinds 01 and 02: schedules, derived tables, respacing, the time told to the network.

use iddpm::config::Schedule;
use iddpm::error::Error;
use iddpm::schedule::{Process, cosine_betas, linear_betas, sigmoid_betas, space_timesteps};
use serde_json::Value;

use super::vectors::{VectorFile, process, schedule, spec};

/// Compares every table of `case` that the file holds.
fn tables(file: &VectorFile, case: &str, p: &Process) {
    let tables: [(&str, &[f64]); 13] = [
        ("betas", &p.beta),
        ("alphas_cumprod", &p.alpha_bar),
        ("alphas_cumprod_prev", &p.alpha_bar_prev),
        ("alphas_cumprod_next", &p.alpha_bar_next),
        ("sqrt_alphas_cumprod", &p.sqrt_alpha_bar),
        ("sqrt_one_minus_alphas_cumprod", &p.sqrt_one_minus_alpha_bar),
        ("log_one_minus_alphas_cumprod", &p.log_one_minus_alpha_bar),
        ("sqrt_recip_alphas_cumprod", &p.sqrt_recip_alpha_bar),
        ("sqrt_recipm1_alphas_cumprod", &p.sqrt_recipm1_alpha_bar),
        ("posterior_variance", &p.beta_tilde),
        ("posterior_log_variance_clipped", &p.log_beta_tilde_clipped),
        ("posterior_mean_coef1", &p.coef1),
        ("posterior_mean_coef2", &p.coef2),
    ];
    for (name, got) in tables {
        file.compare(&format!("{case}/{name}"), got);
    }
}

/// File 01: betas and tables; a schedule that is not constructible has betas only and is refused.
pub fn schedules(file: &VectorFile) {
    for (name, case) in &file.cases {
        let steps = case["T"].as_u64().expect("`T`") as usize;
        if case["constructible"] == true {
            tables(file, name, &process(case));
            continue;
        }
        let betas = match schedule(case) {
            Schedule::Linear => linear_betas(steps),
            Schedule::Cosine => cosine_betas(steps),
            Schedule::Sigmoid => sigmoid_betas(steps),
        };
        file.compare(&format!("{name}/betas"), &betas);
        if !matches!(Process::new(schedule(case), steps), Err(Error::Config(_))) {
            file.fail(format!("{name}: {case} must be refused"));
        }
    }
}

/// File 02: kept steps, refusals, tables of respaced processes, time values.
pub fn respacing(file: &VectorFile) {
    let mut refused = 0;
    for (name, case) in &file.cases {
        let kind = name.split('.').next().unwrap_or_default();
        match kind {
            "steps" => kept_steps(file, name, case),
            "refused" => {
                refused += 1;
                let steps = case["T"].as_u64().expect("`T`") as usize;
                if !matches!(space_timesteps(steps, &spec(case).expect("a spec")), Err(Error::Config(_))) {
                    file.fail(format!("{name}: {case} must be refused"));
                }
            }
            "spaced" => {
                let p = process(case);
                file.compare(&format!("{name}/timestep_map"), &floats(&p.timestep_map));
                tables(file, name, &p);
            }
            "time" => {
                let (p, rescale) = (process(case), case["rescale_timesteps"] == true);
                let t = file.get(&format!("{name}/t")).indices();
                let told: Vec<f32> = t.iter().map(|&t| p.time_value(t, rescale)).collect();
                file.compare_f32(&format!("{name}/t_model"), &told);
            }
            other => file.fail(format!("{name}: unknown case {other}")),
        }
    }
    file.compare("refused.count", &[f64::from(refused)]);
}

fn kept_steps(file: &VectorFile, name: &str, case: &Value) {
    let steps = case["T"].as_u64().expect("`T`") as usize;
    match space_timesteps(steps, &spec(case).expect("a spec")) {
        Ok(kept) => file.compare(name, &floats(&kept)),
        Err(e) => file.fail(format!("{name}: {e}")),
    }
}

fn floats(indices: &[usize]) -> Vec<f64> {
    indices.iter().map(|&i| i as f64).collect()
}
