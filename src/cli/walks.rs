//! Walks of many pictures, batch by batch: what `sample` and `encode` share.

use super::model::Model;
use super::parts::checksum;
use super::progress::Progress;
use crate::data::low_res::LowRes;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::graph::Target;
use crate::sampler::{self, Pictures, SampleSettings, Sampler, Walk};

/// Pictures made at the same time, if no number is asked for; on a GPU more, as far as its memory goes.
const BATCH: usize = 16;
const GPU_BATCH: usize = 128;

/// How many of `n` pictures are made at the same time, where `asked` were asked for.
///
/// # Errors
/// When the process cannot be or the device does not answer.
pub fn batch(asked: Option<u64>, n: usize, model: &Model, settings: &SampleSettings) -> Result<usize> {
    let device = &model.device;
    let plan = |batch| {
        let settings = SampleSettings { batch, ..settings.clone() };
        sampler::plan(&model.config.model, &model.process, &model.params, &settings, device.target())
    };
    match asked {
        Some(asked) => Ok(n.min(asked as usize)),
        None if device.target() == Target::Cpu || device.is_emulated() => Ok(n.min(BATCH)),
        None => Ok(device.fitting(n.min(GPU_BATCH), plan)?.map_or(1, |(batch, _)| batch)),
    }
}

/// The pictures that are asked for.
pub struct Walks<'a> {
    /// Number of them.
    pub n: usize,
    /// Seed of the first.
    pub seed: u64,
    /// Class of each.
    pub labels: Option<&'a [i32]>,
    /// Small images to enlarge.
    pub small: Option<LowRes>,
    /// Where each begins, if not in drawn noise: (n, h, w, c).
    pub start: Option<&'a [f32]>,
}

impl Walks<'_> {
    /// All that the pictures depend on beside the model; not their number, nor the size of a batch.
    pub fn key(&self, settings: &SampleSettings) -> String {
        let settings = SampleSettings { batch: 1, ..settings.clone() };
        let labels = self.labels.map(checksum);
        let start = self.start.map(checksum);
        let small = self.small.as_ref().map(|s| checksum(&s.pixels));
        format!("{settings:?}, seed {}, labels {labels:x?}, start {start:x?}, small images {small:x?}", self.seed)
    }

    /// Walks with all but the first `there` pictures. `each` sees every step, `take` the end of each batch: its pictures in [-1, 1],
    /// or the noise that images come from.
    ///
    /// # Errors
    /// [`Error::NonFinite`] for a picture with values that are no numbers; those of [`Sampler::run`], of `each` and of `take`.
    pub fn run(
        &self,
        device: &mut Device,
        sampler: &Sampler,
        there: usize,
        each: &mut dyn FnMut(&Walk) -> Result<()>,
        take: &mut dyn FnMut(&[f32]) -> Result<()>,
    ) -> Result<()> {
        if there > 0 {
            println!("going on  {there} of {} are there from a run that was ended", self.n);
        }
        let seeds: Vec<u64> = (0..self.n as u64).map(|i| self.seed.wrapping_add(i)).collect();
        let (batch, size) = (sampler.batch(), sampler.picture());
        let (mut progress, mut before) = (Progress::new("steps"), 0);
        let total = (self.n - there).div_ceil(batch) * sampler.steps();
        for range in (there..self.n).step_by(batch).map(|first| first..self.n.min(first + batch)) {
            let labels = self.labels.map(|l| &l[range.clone()]);
            let pictures = Pictures { first: range.start, seeds: &seeds[range.clone()], labels };
            let each = &mut |walk: &Walk| {
                progress.at(before + walk.done, total);
                each(walk)
            };
            let x = match (&self.small, self.start) {
                (Some(small), _) => sampler.enlarge(device, pictures, small, each)?,
                (None, Some(x)) => {
                    sampler.run_from(device, pictures, &x[range.start * size..range.end * size], each)?
                }
                (None, None) => sampler.run(device, pictures, each)?,
            };
            if let Some(bad) = x.iter().find(|x| !x.is_finite()) {
                return Err(Error::NonFinite(format!(
                    "a picture holds {bad}: the weights are damaged, use an older checkpoint"
                )));
            }
            before += sampler.steps();
            take(&x)?;
        }
        let seconds = progress.finish();
        println!("time      {seconds:.1} s, {:.2} pictures/s", (self.n - there) as f64 / seconds);
        Ok(())
    }
}
