//! The figures of this program: noise schedules, training curves, loss by timestep, terms of the bound.
//!
//! Each is a list of charts, from which a caller may pick by key.

use super::table::{Table, smooth};
use super::{Axis, Chart, Look, Scale, Series};
use crate::schedule::Process;
use crate::timestep::{LossHistory, TimestepDist};

/// The forward processes side by side (Nichol & Dhariwal 2021, figures 1 and 5): `alpha_bar`, `beta`, the range
/// between which a learned variance interpolates, and `beta_tilde/beta`.
///
/// Steps are given as t/T with the paper's t = 1 .. T, those of a respaced process as steps of the original one.
pub fn schedules(processes: &[(String, Process)]) -> Vec<Chart> {
    let step = |p: &Process, i: usize| (p.timestep_map[i] + 1) as f64 / p.original_steps as f64;
    let over = |p: &Process, f: &dyn Fn(usize) -> f64| -> Vec<(f64, f64)> {
        (0..p.steps()).map(|i| (step(p, i), f(i))).collect()
    };
    let each = |f: &dyn Fn(&Process, usize) -> f64| -> Vec<Series> {
        let series = |(colour, (name, p)): (usize, &(String, Process))| Series {
            name: name.clone(),
            points: over(p, &|i| f(p, i)),
            colour,
            look: Look::Solid,
        };
        processes.iter().enumerate().map(series).collect()
    };
    let mut variances = Vec::new();
    for (colour, (name, p)) in processes.iter().enumerate() {
        let low = over(p, &|i| p.log_beta_tilde_clipped[i].exp());
        let high = over(p, &|i| p.beta[i]);
        let outline = high.iter().chain(low.iter().rev()).copied().collect();
        let line = |name: String, points, look| Series { name, points, colour, look };
        variances.push(line(String::new(), outline, Look::Area));
        variances.push(line(format!("{name}: β"), high, Look::Solid));
        variances.push(line(format!("{name}: β\u{303}"), low, Look::Dashed));
    }
    let x = || Axis::linear("diffusion step t/T");
    let log_x = || Axis::log("diffusion step t/T");
    vec![
        chart("alpha-bar", "Signal left after t steps", x(), Axis::linear("ᾱ"), each(&|p, i| p.alpha_bar[i])),
        chart("beta", "Noise added by each step", x(), Axis::log("β"), each(&|p, i| p.beta[i])),
        chart("variances", "Range of the learned variance", log_x(), Axis::log("variance"), variances),
        chart(
            "ratio",
            "Posterior against forward variance",
            log_x(),
            Axis::linear("β\u{303}/β"),
            each(&|p, i| p.beta_tilde[i] / p.beta[i]),
        ),
    ]
}

/// How training curves are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Curves {
    /// Weight of the past in the moving average, 0 to below 1; the values as they are lie behind it. None averages over
    /// about a fiftieth of the points.
    pub smooth: Option<f64>,
    /// Against images rather than steps.
    pub by_images: bool,
    /// Linear axes for losses and norms too.
    pub linear: bool,
}

impl Curves {
    fn x(&self) -> (&'static str, Axis) {
        if self.by_images { ("images", Axis::linear("images")) } else { ("step", Axis::linear("step")) }
    }

    fn y(&self, label: &str, scale: Scale) -> Axis {
        Axis { label: label.into(), scale: if self.linear { Scale::Linear } else { scale } }
    }

    /// The column `y` of a log as a line, smoothed, with what it came from behind it.
    fn series(&self, log: &Table, y: &str, name: &str, colour: usize) -> Vec<Series> {
        let points = log.points(self.x().0, y);
        let line = |name: &str, points, look| Series { name: name.into(), points, colour, look };
        // The learning rate is no measurement: it has no noise.
        let weight = if y == "lr" { 0.0 } else { self.smooth.unwrap_or(1.0 - 50.0 / points.len().max(50) as f64) };
        if points.is_empty() {
            Vec::new()
        } else if weight > 0.0 {
            vec![line(name, smooth(&points, weight), Look::Solid), line("", points, Look::Faint)]
        } else {
            vec![line(name, points, Look::Solid)]
        }
    }

    /// Training curves of one or several runs.
    pub fn training(&self, logs: &[Table]) -> Vec<Chart> {
        let panel = |key, title, label, scale, column| {
            let runs = logs.iter().enumerate();
            let series = runs.flat_map(|(i, log)| self.series(log, column, &log.name, i)).collect();
            chart(key, title, self.x().1, self.y(label, scale), series)
        };
        vec![
            panel("loss", "Loss", "loss", Scale::Log, "loss"),
            panel("mse", "Squared error", "mean squared error", Scale::Log, "mse"),
            panel("vb", "Variational bound", "bits/dim", Scale::Log, "vb_bpd"),
            panel("grad-norm", "Norm of the gradients", "norm", Scale::Log, "grad_norm"),
            panel("lr", "Learning rate", "learning rate", Scale::Linear, "lr"),
            panel("speed", "Speed", "images/s", Scale::Linear, "images_per_s"),
        ]
    }

    /// Loss and bound of a run by quarter of the process, over training.
    pub fn quarters(&self, log: &Table) -> Vec<Chart> {
        const NAMES: [&str; 4] = ["t < T/4", "T/4 ≤ t < T/2", "T/2 ≤ t < 3T/4", "3T/4 ≤ t"];
        let panel = |key, title, label, column: &str| {
            let quarters = NAMES.iter().enumerate();
            let series = quarters.flat_map(|(q, name)| self.series(log, &format!("{column}_q{q}"), name, q)).collect();
            chart(key, title, self.x().1, self.y(label, Scale::Log), series)
        };
        vec![
            panel("loss", "Loss by quarter of the process", "loss", "loss"),
            panel("vb", "Bound by quarter of the process", "bits/dim", "vb_bpd"),
        ]
    }
}

/// The loss history of a checkpoint by timestep, and the probabilities it gives (Nichol & Dhariwal 2021, section 3.3).
pub fn loss_history(history: &LossHistory) -> Vec<Chart> {
    let steps = history.counts().len();
    let kept = history.losses().len() / steps;
    let root_mean_square = |t: usize| {
        let filled = &history.losses()[t * kept..][..history.counts()[t] as usize];
        let squares: f64 = filled.iter().map(|l| f64::from(*l) * f64::from(*l)).sum();
        (t as f64, (squares / filled.len() as f64).sqrt())
    };
    let line = |points| vec![Series { points, ..Series::default() }];
    let losses = (0..steps).map(root_mean_square).collect();
    let p = TimestepDist::LossSecondMoment(history.clone()).probabilities();
    let p = p.iter().enumerate().map(|(t, p)| (t as f64, p * steps as f64)).collect();
    let x = || Axis::linear("timestep t");
    vec![
        chart("history", "Loss by timestep", x(), Axis::log("root mean square of the last losses"), line(losses)),
        chart("probability", "Choice of t in training", x(), Axis::log("probability × T"), line(p)),
    ]
}

/// The terms of the bound by timestep (Nichol & Dhariwal 2021, figure 2) of one or several models: tables with the
/// columns `t`, `vb_bpd`, `x_0_mse` and `eps_mse`.
pub fn terms(tables: &[Table]) -> Vec<Chart> {
    let panel = |key, title, x, y, points: &dyn Fn(&Table) -> Vec<(f64, f64)>| {
        let series = tables.iter().enumerate().map(|(colour, table)| Series {
            name: table.name.clone(),
            points: points(table),
            colour,
            look: Look::Solid,
        });
        chart(key, title, x, y, series.collect())
    };
    let summed = |table: &Table| {
        let mut sum = 0.0;
        let add = |(t, bits): (f64, f64)| {
            sum += bits;
            (t + 1.0, sum)
        };
        table.points("t", "vb_bpd").into_iter().map(add).collect()
    };
    let x = || Axis::linear("timestep t");
    vec![
        panel("terms", "Terms of the bound", x(), Axis::log("bits/dim"), &|t| t.points("t", "vb_bpd")),
        panel("sum", "Sum of the first terms", Axis::log("number of terms"), Axis::linear("bits/dim"), &summed),
        panel("x-0-mse", "Error of the predicted image", x(), Axis::log("mean squared error"), &|t| {
            t.points("t", "x_0_mse")
        }),
        panel("eps-mse", "Error of the predicted noise", x(), Axis::log("mean squared error"), &|t| {
            t.points("t", "eps_mse")
        }),
    ]
}

fn chart(key: &'static str, title: &str, x: Axis, y: Axis, series: Vec<Series>) -> Chart {
    Chart { key, title: title.into(), x, y, series }
}
