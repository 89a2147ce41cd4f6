//! Kind 04_losses: every training loss and its gradient with respect to the raw network output.

use iddpm::config::{FirstStep, LossType, LossWeight};
use iddpm::diffusion::{Objective, loss_and_grad, to_unit};
use iddpm::schedule::Process;

use super::vectors::{Tensor, VectorFile, channels_first, outputs, process};

pub const LOSSES: [(&str, LossType); 4] = [
    ("mse", LossType::Mse),
    ("rescaled_mse", LossType::RescaledMse),
    ("kl", LossType::Kl),
    ("rescaled_kl", LossType::RescaledKl),
];

/// Every case with every output kind and loss in it.
pub fn check(file: &VectorFile) {
    for (name, case) in &file.cases {
        let process = process(case);
        let bytes = &file.get(&format!("{name}/x_start_u8")).values;
        let pixels: Vec<f64> = bytes.iter().map(|&b| f64::from(to_unit(b as u8))).collect();
        assert_eq!(pixels, file.get(&format!("{name}/x_start")).values, "{name}: x_start of its bytes");
        for (combo, output) in outputs(file, name) {
            for (loss, loss_type) in LOSSES {
                let objective =
                    Objective { output, loss_type, first_step: FirstStep::Nll, weight: LossWeight::Uniform };
                one(file, name, &format!("{name}/{combo}"), loss, &objective, &process);
            }
        }
    }
}

/// One loss of one output kind. The images go through in channels-last order.
fn one(file: &VectorFile, name: &str, combo: &str, loss: &str, objective: &Objective, process: &Process) {
    let get = |part: &str| file.get(&format!("{name}/{part}"));
    let (x_0, eps, t) = (get("x_start"), get("noise"), get("t").indices());
    let out = file.get(&format!("{combo}/model_output"));
    let (batch, channels) = (x_0.shape[0] as f64, x_0.shape[1]);
    let vb_scale = objective.vb_scale(process.steps());
    let (mut losses, mut mse, mut vb, mut grad) = (vec![], vec![], vec![], vec![]);
    for (n, &t) in t.iter().enumerate() {
        let c = process.at(t);
        let image = |x: &Tensor| x.sub(n).channels_last().f32s();
        let (x_0, eps, out) = (image(x_0), image(eps), image(out));
        let mut d_out = vec![f32::NAN; out.len()];
        let terms = loss_and_grad(objective, &c, channels, 1.0 / batch, &mut d_out, &x_0, &eps, &out);
        losses.push(terms.loss);
        mse.push(terms.mse);
        vb.push(terms.vb_bpd * vb_scale);
        let d_out: Vec<f64> = d_out.iter().map(|&d| f64::from(d)).collect();
        grad.extend(channels_first(&d_out, objective.output.channels(channels)));
    }
    let compare = |part: &str, got: &[f64]| {
        let tensor = format!("{combo}/{loss}/{part}");
        if file.has(&tensor) {
            file.compare(&tensor, got);
        }
    };
    compare("loss", &losses);
    compare("mse", &mse);
    compare("vb", &vb);
    compare("grad", &grad);
}
