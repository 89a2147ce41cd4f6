//! Kind 03_gaussian: q_sample, q(x_t | x_0), q(x_{t-1} | x_t, x_0), and p(x_{t-1} | x_t) of every output kind.

use iddpm::diffusion::gaussian::{Output, Prediction, clip, p_mean_variance, q_mean_variance, q_posterior_mean};
use iddpm::diffusion::q_sample;
use iddpm::schedule::Coefs;

use super::vectors::{VectorFile, outputs, process};

/// Every case with every combination of mean, variance and clipping in it.
pub fn check(file: &VectorFile) {
    for (name, case) in &file.cases {
        let process = process(case);
        let t = file.get(&format!("{name}/t")).indices();
        let coefs: Vec<Coefs> = t.iter().map(|&t| process.at(t)).collect();
        forward(file, name, &coefs);
        for (combo, output) in outputs(file, name) {
            reverse(file, name, &format!("{name}/{combo}"), output, &coefs);
        }
    }
}

fn forward(file: &VectorFile, name: &str, coefs: &[Coefs]) {
    let (x_0, eps) = (file.get(&format!("{name}/x_start")), file.get(&format!("{name}/noise")));
    let stored_x_t = file.get(&format!("{name}/x_t"));
    let (mut x_t, mut q_mean, mut posterior_mean) = (vec![], vec![], vec![]);
    for (n, c) in coefs.iter().enumerate() {
        let (x_0, eps, stored) = (x_0.sub(n), eps.sub(n), stored_x_t.sub(n));
        let mut noised = vec![f32::NAN; eps.values.len()];
        q_sample(c, &mut noised, &x_0.f32s(), &eps.f32s());
        x_t.extend(noised);
        q_mean.extend(x_0.values.iter().map(|&x_0| q_mean_variance(c, x_0).0));
        posterior_mean.extend(x_0.values.iter().zip(&stored.values).map(|(&x_0, &x_t)| q_posterior_mean(c, x_0, x_t)));
    }
    let per_sample = |f: &dyn Fn(&Coefs) -> f64| coefs.iter().map(f).collect::<Vec<_>>();
    file.compare_f32(&format!("{name}/x_t"), &x_t);
    file.compare(&format!("{name}/q_mean"), &q_mean);
    file.compare(&format!("{name}/q_variance"), &per_sample(&|c| q_mean_variance(c, 0.0).1));
    file.compare(&format!("{name}/q_log_variance"), &per_sample(&|c| q_mean_variance(c, 0.0).2));
    file.compare(&format!("{name}/posterior_mean"), &posterior_mean);
    file.compare(&format!("{name}/posterior_variance"), &per_sample(&|c| c.beta_tilde));
    file.compare(&format!("{name}/posterior_log_variance_clipped"), &per_sample(&|c| c.log_beta_tilde_clipped));
}

fn reverse(file: &VectorFile, name: &str, combo: &str, output: Output, coefs: &[Coefs]) {
    let (x_t, out) = (file.get(&format!("{name}/x_t")), file.get(&format!("{combo}/model_output")));
    for clipped in [false, true] {
        let mut predictions: Vec<Prediction> = vec![];
        for (n, c) in coefs.iter().enumerate() {
            let (x_t, out) = (x_t.sub(n).values, out.sub(n).values);
            for (i, &x_t) in x_t.iter().enumerate() {
                let second = if output.learns_variance() { out[out.len() / 2 + i] } else { f64::NAN };
                predictions.push(p_mean_variance(c, output, x_t, (out[i], second), clip(clipped)));
            }
        }
        let compare = |part: &str, f: &dyn Fn(&Prediction) -> f64| {
            let tensor = format!("{combo}/{part}");
            // A fixed variance is stored once per sample.
            let step = predictions.len() / file.get(&tensor).values.len();
            file.compare(&tensor, &predictions.iter().step_by(step).map(f).collect::<Vec<_>>());
        };
        compare(&format!("clip{}/mean", i32::from(clipped)), &|p| p.mean);
        compare(&format!("clip{}/pred_xstart", i32::from(clipped)), &|p| p.x_0);
        compare("variance", &|p| p.variance);
        compare("log_variance", &|p| p.log_variance);
    }
}
