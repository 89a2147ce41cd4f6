//! Kind 05_likelihood: pointwise tables of the cdf, the discretised Gaussian and the normal KL, with derivatives.

use iddpm::diffusion::likelihood::{log_likelihood, normal_cdf, normal_kl, normal_kl_d_first};

use super::vectors::VectorFile;

/// The three tables.
pub fn check(file: &VectorFile) {
    cdf(file);
    discretised(file);
    kl(file);
}

fn cdf(file: &VectorFile) {
    let x = &file.get("cdf/x").values;
    file.compare("cdf/y", &x.iter().map(|&x| normal_cdf(x).0).collect::<Vec<_>>());
    // The f32 of the reference gives NaN where x² overflows; ours does not, and 0 is stored there.
    let finite: Vec<bool> = x.iter().map(|&x| (x as f32 * x as f32).is_finite()).collect();
    file.compare("cdf/dydx_finite", &finite.iter().map(|&f| f64::from(f)).collect::<Vec<_>>());
    let slopes = x.iter().zip(&finite).map(|(&x, &finite)| if finite { normal_cdf(x).1 } else { 0.0 });
    file.compare("cdf/dydx", &slopes.collect::<Vec<_>>());
    assert!(x.iter().all(|&x| normal_cdf(x).1.is_finite()));
}

fn discretised(file: &VectorFile) {
    let column = |name: &str| &file.get(name).values;
    let (x, mean, log_scale) = (column("dgll/x"), column("dgll/mean"), column("dgll/log_scale"));
    let terms: Vec<_> = (0..x.len()).map(|i| log_likelihood(x[i], mean[i], log_scale[i])).collect();
    file.compare("dgll/log_prob", &terms.iter().map(|t| t.value).collect::<Vec<_>>());
    let ok = file.mask("dgll/grad_ok");
    let masked = |f: &dyn Fn(usize) -> f64| (0..x.len()).map(|i| if ok[i] { f(i) } else { 0.0 }).collect::<Vec<_>>();
    file.compare("dgll/d_mean", &masked(&|i| terms[i].d_mean));
    file.compare("dgll/d_log_scale", &masked(&|i| terms[i].d_log));
}

fn kl(file: &VectorFile) {
    let column = |name: &str| &file.get(name).values;
    let columns = [column("kl/mean1"), column("kl/logvar1"), column("kl/mean2"), column("kl/logvar2")];
    let each = |f: &dyn Fn(f64, f64, f64, f64) -> f64| {
        (0..columns[0].len()).map(|i| f(columns[0][i], columns[1][i], columns[2][i], columns[3][i])).collect::<Vec<_>>()
    };
    file.compare("kl/kl", &each(&|a, b, c, d| normal_kl(a, b, c, d).value));
    file.compare("kl/d_mean2", &each(&|a, b, c, d| normal_kl(a, b, c, d).d_mean));
    file.compare("kl/d_logvar2", &each(&|a, b, c, d| normal_kl(a, b, c, d).d_log));
    file.compare("kl/d_mean1", &each(&|a, b, c, d| normal_kl_d_first(a, b, c, d).0));
    file.compare("kl/d_logvar1", &each(&|a, b, c, d| normal_kl_d_first(a, b, c, d).1));
}
