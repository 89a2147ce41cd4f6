//! One training step: its inputs, its start, and what is done with its results when they have arrived.
//!
//! Steps are started ahead of the device, [`Ring`](crate::device::ring::Ring) pages in flight; nothing waits for one step before the next is
//! started. A step whose loss or gradient is not finite leaves the weights alone and so do all after it, until the
//! host, a few steps later, sees it, goes back to it and runs it again in search of the operation at fault.

use super::log::{Meter, Terms};
use super::{Report, Trainer};
use crate::error::{Error, Result};
use crate::ops::Control;
use crate::rng;

/// A step that was started.
#[derive(Clone, Copy, Debug)]
pub(super) struct InFlight {
    /// Its number, counted from 0.
    step: u64,
    /// Images drawn before it.
    position: u64,
    lr: f64,
}

impl Trainer {
    /// Takes one step and adds its losses to `meter`. Allocates nothing but the order of a new epoch.
    ///
    /// # Errors
    /// [`Error::NonFinite`] when a loss or the gradient is not finite, naming the step, t and the first operation at
    /// fault; the weights are then as before the step.
    pub fn step(&mut self, meter: &mut Meter) -> Result<Report> {
        self.begin(meter)?;
        self.finish(meter)
    }

    /// Starts a step, waiting for none if the device is not too far behind. The losses of steps that have ended meanwhile are added to `meter`.
    ///
    /// # Errors
    /// As [`Trainer::step`], for an earlier step perhaps: [`Trainer::step`](field@Trainer::step) is then its number again.
    pub fn begin(&mut self, meter: &mut Meter) -> Result<()> {
        while self.ring.is_full() {
            self.take(meter, true)?;
        }
        let flight =
            InFlight { step: self.step, position: self.batches.position, lr: self.config.train.lr_at(self.step) };
        self.fill(&flight)?;
        self.ring.start(&mut self.device, flight)?;
        if let Some(stream) = &mut self.stream {
            stream.started(&self.device)?;
        }
        self.step += 1;
        while self.take(meter, false)? {}
        Ok(())
    }

    /// Waits for every step that was started and adds its losses to `meter`; returns what the last one reported.
    ///
    /// # Errors
    /// As [`Trainer::begin`].
    pub fn finish(&mut self, meter: &mut Meter) -> Result<Report> {
        while self.take(meter, true)? {}
        Ok(self.report)
    }

    /// Goes to the place in the data after `position` images.
    pub(super) fn seek(&mut self, position: u64) -> Result<()> {
        self.batches.position = position;
        self.stream.as_mut().map_or(Ok(()), |stream| stream.seek(position))
    }

    /// Writes the inputs of the next step to its page.
    fn fill(&mut self, flight: &InFlight) -> Result<()> {
        let (graph, page, vals) = (&self.device.plan(self.id).graph, self.ring.page(), &self.vals);
        let index = self.batches.next();
        page.input_mut::<u32>(graph, vals.index).copy_from_slice(index);
        if let Some(v) = vals.labels {
            let (p, seed) = (self.config.train.label_dropout, self.config.train.seed);
            let null = self.config.model.null_label();
            for (n, (label, &i)) in page.input_mut::<i32>(graph, v).iter_mut().zip(index).enumerate() {
                let null = null.filter(|_| rng::drops_label(p, seed, n as u32, flight.step as u32));
                *label = null.unwrap_or(self.labels[i as usize]);
            }
        }
        if let (Some(v), Some(low_res)) = (vals.low_res, &self.low_res) {
            let size = graph.shape(v).len() / index.len();
            self.image.resize(size, 0.0);
            for (n, &i) in index.iter().enumerate() {
                low_res.enlarge(i as usize, self.config.model.image_size, &mut self.image);
                page.write_floats(graph, v, n * size, &self.image);
            }
        }
        page.input_mut::<Control>(graph, vals.control)[0] = control(&self.config, self.betas, flight);
        if let Some(stream) = &mut self.stream {
            let first = stream.send(&mut self.device, index)?;
            let graph = &self.device.plan(self.id).graph;
            let places = self.ring.page().input_mut::<u32>(graph, vals.index).iter_mut();
            places.zip(first..).for_each(|(place, i)| *place = i);
        }
        Ok(())
    }

    /// Looks at the oldest step in flight, if it has ended or is to be waited for; false if there was none.
    fn take(&mut self, meter: &mut Meter, wait: bool) -> Result<bool> {
        let Some((flight, page)) = self.ring.take(wait)? else { return Ok(false) };
        let (graph, vals) = (&self.device.plan(self.id).graph, &self.vals);
        let norm = page.state::<f32>(graph, vals.norm)[0];
        let [weight, loss, mse, vb] =
            [vals.weight, vals.terms.loss, vals.terms.mse, vals.terms.vb].map(|v| page.state::<f32>(graph, v));
        if !norm.is_finite() || loss.iter().any(|x| !x.is_finite()) {
            let t = bad_t(loss, page.state(graph, vals.t));
            return Err(self.explain_non_finite(flight, &t));
        }
        for (i, &t) in page.state::<i32>(graph, vals.t).iter().enumerate() {
            let terms = Terms { loss: loss[i].into(), mse: mse[i].into(), vb: vb[i].into() };
            meter.add(t as usize, vals.process_steps, weight[i].into(), terms);
        }
        self.report = Report { grad_norm: norm.into(), lr: flight.lr };
        Ok(true)
    }

    /// Goes back to the failed step and runs it again, to find the first operation at fault.
    fn explain_non_finite(&mut self, flight: InFlight, t: &str) -> Error {
        let found = match self.run_again(flight) {
            Ok(found) => found,
            Err(e) => return e,
        };
        let graph = &self.device.plan(self.id).graph;
        let place = found.map_or("the gradients together overflow".to_string(), |(i, value)| {
            let step = &graph.steps[i];
            format!("the first bad value is {value}, written by {} of {}", step.op.name(), step.scope)
        });
        Error::NonFinite(format!(
            "step {}: the loss or its gradient is not finite; t of the images with a bad loss: {t}; {place}. \
             Use a lower --lr or --grad-clip 1, or look at the images of this batch",
            flight.step
        ))
    }

    /// Runs the step taken last again; everything is then as before it, the number of the step and the place in the data too.
    fn run_again(&mut self, flight: InFlight) -> Result<Option<(usize, String)>> {
        self.ring.rewind(&mut self.device)?;
        self.step = flight.step;
        self.batches.position = flight.position;
        if let Some(stream) = &mut self.stream {
            let graph = &self.device.plan(self.id).graph;
            let first = self.ring.page().input::<u32>(graph, self.vals.index)[0];
            stream.send_again(&mut self.device, self.batches.next(), first)?;
        }
        let found = self.device.first_non_finite(self.id)?;
        self.ring.restore(&mut self.device)?;
        self.seek(flight.position)?;
        Ok(found)
    }
}

/// What the host tells step `flight`; `betas` are those of AdamW.
fn control(config: &crate::config::Config, betas: [f64; 2], flight: &InFlight) -> Control {
    let k = flight.step as f64 + 1.0;
    Control {
        seed: config.train.seed,
        step: u32::try_from(flight.step).expect("steps are checked to be below 2^32"),
        lr: flight.lr as f32,
        bias1: (1.0 - betas[0].powf(k)) as f32,
        bias2: (1.0 - betas[1].powf(k)) as f32,
        ..Control::default()
    }
}

/// The t of the images whose loss is not finite.
fn bad_t(loss: &[f32], t: &[i32]) -> String {
    let bad = loss.iter().zip(t).filter(|(x, _)| !x.is_finite()).map(|(_, t)| t.to_string());
    let t: Vec<_> = bad.collect();
    if t.is_empty() { "none".to_string() } else { t.join(", ") }
}
