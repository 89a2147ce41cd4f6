//! `iddpm nll`: bits/dim of images under a checkpoint, by the variational bound.

use super::flags::{BOOL, ModelFlags};
use super::images::DataFlags;
use super::model::Model;
use super::parts::Parts;
use super::progress::Progress;
use super::{Global, create_folder, reference};
use crate::data;
use crate::error::{Error, Result};
use crate::nll::{Evaluated, Evaluation, Nll, NllReport, NllSettings, Terms, mean_and_interval};
use crate::train::check_data;
use clap::Args;
use std::fmt::Write;
use std::path::PathBuf;

/// Rows of the printed table.
const ROWS: usize = 10;

/// Flags of `iddpm nll`. The flags of the network are not needed; those given must agree with the checkpoint.
#[derive(Args, Clone, Debug)]
pub struct NllArgs {
    /// Checkpoint, or a run's folder for its newest one
    #[arg(long, value_name = "PATH", default_value = "runs/digits")]
    model_path: PathBuf,
    /// Number of images, evenly spaced over the set [default: all]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    num_samples: Option<u32>,
    /// Terms evaluated at the same time; the result does not depend on it
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=65_536))]
    batch_size: u64,
    /// Steps to use: 250, 10,15,20, ddim50 or logsnr20 [default: those of training]
    #[arg(long)]
    timestep_respacing: Option<String>,
    /// Clip predicted images to the range of pixels [default: True]
    #[arg(long, value_name = BOOL)]
    clip_denoised: Option<bool>,
    /// Moving average to evaluate; 0: the live weights [default: the first]
    #[arg(long, value_name = "RATE")]
    ema_rate: Option<f64>,
    /// Also write vb_terms.npz, mse_terms.npz and xstart_mse_terms.npz, as the reference does
    #[arg(long)]
    reference_files: bool,
    #[command(flatten)]
    data: DataFlags,
    #[command(flatten)]
    model: ModelFlags,
}

/// Measures.
///
/// # Errors
/// [`Error::Checkpoint`], [`Error::Config`] for flags that disagree with it, [`Error::Data`], [`Error::Io`].
pub fn main(a: &NllArgs, g: &Global) -> Result<()> {
    let mut model = Model::open(&a.model_path, &a.model, a.ema_rate, a.timestep_respacing.as_deref(), g)?;
    let config = model.config.clone();
    let mut spec = a.data.spec(&config.data, g.threads)?;
    spec.image_size = Some(config.model.image_size);
    spec.channels = Some(config.model.in_channels);
    spec.limit = a.num_samples.map(|n| n as usize).or(spec.limit);
    let data = data::open(&spec)?;
    check_data(&config, &data)?;
    let settings =
        NllSettings { clip: a.clip_denoised.unwrap_or(true), batch: a.batch_size as usize, seed: g.seed.unwrap_or(0) };
    let nll = Nll::new(&mut model.device, &config.model, &model.process, &model.params, data.n, &settings)?;
    model.tell();
    let parts =
        if nll.resident() < data.n { format!(", {} at a time on the device", nll.resident()) } else { String::new() };
    println!("data      {}: {} of {} images{parts}", spec.path.display(), data.n, data.source.found);
    let out = g.out.clone().unwrap_or_else(|| model.path.with_file_name("nll"));
    create_folder(&out)?;
    let key = format!("{:?}, images {:016x}", NllSettings { batch: 1, ..settings }, data.fingerprint());
    let (mut parts, known) = Parts::open::<Terms>(&out, &model.key("nll", &key))?;
    if !known.is_empty() {
        println!("going on  {} of {} terms are there from a run that was ended", known.len(), nll.terms());
    }
    let mut progress = Progress::new("terms");
    let images = Evaluated { pixels: &data.pixels, labels: data.labels.as_deref() };
    let report = nll.run(&mut model.device, images, &known, &mut |e: Evaluation| {
        progress.at(e.done, e.total);
        parts.append(e.new)
    })?;
    progress.finish();
    let csv = out.join("nll.csv");
    std::fs::write(&csv, table(&report)).map_err(Error::io(&csv, "write"))?;
    print!("{}", summary(&report));
    println!("written   {}", csv.display());
    if a.reference_files {
        reference::files::write_terms(&out, &report)?.iter().for_each(|path| println!("          {}", path.display()));
    }
    parts.remove()
}

/// One line per t.
fn table(r: &NllReport) -> String {
    let mut text = String::from("t,vb_bpd,x_0_mse,eps_mse\n");
    for (t, ((vb, x_0), eps)) in r.vb_bpd.iter().zip(&r.x_0_mse).zip(&r.eps_mse).enumerate() {
        let _ = writeln!(text, "{t},{vb},{x_0},{eps}");
    }
    text
}

/// Totals, and the terms added up over ten stretches of t.
fn summary(r: &NllReport) -> String {
    let (total, interval) = mean_and_interval(&r.total_bpd);
    let (prior, _) = mean_and_interval(&r.prior_bpd);
    let n = r.total_bpd.len();
    let mut text = format!("bits/dim  {total:.4}");
    if n > 1 {
        let _ = write!(text, " ± {interval:.4} (95 % confidence interval)");
    }
    let _ = writeln!(text, " over {n} images");
    let _ = writeln!(text, "          prior {prior:.6}, decoder (t = 0) {:.4}", r.vb_bpd[0]);
    let _ = writeln!(text, "{:>16} {:>12} {:>12} {:>12}", "t", "vb bits/dim", "x_0 mse", "eps mse");
    let steps = r.vb_bpd.len();
    let size = steps.div_ceil(ROWS);
    for first in (0..steps).step_by(size) {
        let part = first..(first + size).min(steps);
        let mean = |x: &[f64]| x[part.clone()].iter().sum::<f64>() / part.len() as f64;
        let vb: f64 = r.vb_bpd[part.clone()].iter().sum();
        let t = format!("{first}..{}", part.end - 1);
        let _ = writeln!(text, "{t:>16} {vb:>12.4} {:>12.6} {:>12.6}", mean(&r.x_0_mse), mean(&r.eps_mse));
    }
    text
}
