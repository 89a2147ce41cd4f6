//! Which images a command loads, and what a checkpoint records of them.

use super::flags::set;
use crate::config::DataConfig;
use crate::data::{DataSpec, Dataset, Labels, Split};
use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

/// Which images to load.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct DataFlags {
    /// Folder of images, MNIST's idx files, CIFAR's .bin files, a .tar(.gz), an .npz, or `digits` (built in)
    #[arg(long, value_name = "PATH", help_heading = "Data")]
    pub data_dir: Option<PathBuf>,
    /// Where labels come from: auto, none, prefix (of the file name up to _) or folder
    #[arg(long, value_name = "SOURCE", value_parser = choice::<Labels>, help_heading = "Data")]
    pub labels_from: Option<Labels>,
    /// Part of a set that has parts: train, test or all
    #[arg(long, value_parser = choice::<Split>, help_heading = "Data")]
    pub split: Option<Split>,
    /// Use at most this many images, evenly spaced over the set
    #[arg(long, value_name = "N", help_heading = "Data")]
    pub limit: Option<usize>,
}

impl DataFlags {
    /// The set that the flags name; what they leave open is as `recorded`, or else the default.
    ///
    /// # Errors
    /// [`Error::Config`] when the record is damaged.
    pub fn spec(&self, recorded: &DataConfig, threads: Option<usize>) -> Result<DataSpec> {
        let source = if recorded.source.is_empty() { "digits" } else { &recorded.source };
        let same = self.data_dir.as_deref().is_none_or(|p| p == Path::new(source));
        let mut spec = DataSpec::new(self.data_dir.clone().unwrap_or_else(|| source.into()));
        if same && !recorded.labels.is_empty() {
            let bad = |what| Error::Config(format!("damaged record of the training data: {what}"));
            spec.labels = choice(&recorded.labels).map_err(bad)?;
            spec.split = choice(&recorded.split).map_err(bad)?;
            spec.limit = recorded.limit;
        }
        set(&mut spec.labels, &self.labels_from);
        set(&mut spec.split, &self.split);
        spec.limit = self.limit.or(spec.limit);
        spec.threads = threads;
        Ok(spec)
    }
}

/// What a checkpoint records of the set `data`, loaded by `spec`.
pub fn record_data(spec: &DataSpec, data: &Dataset) -> DataConfig {
    let spelled = |v: serde_json::Result<serde_json::Value>| {
        v.ok().and_then(|v| v.as_str().map(String::from)).expect("a choice without fields is a word")
    };
    let (mean, std) = channel_moments(&data.pixels, data.c);
    DataConfig {
        source: spec.path.to_string_lossy().into_owned(),
        labels: spelled(serde_json::to_value(spec.labels)),
        split: spelled(serde_json::to_value(spec.split)),
        limit: spec.limit,
        images: data.n,
        classes: data.classes.clone(),
        fingerprint: data.fingerprint(),
        mean,
        std,
    }
}

/// Mean and standard deviation of each channel of `pixels` (.., c), 0 to 255.
pub fn channel_moments(pixels: &[u8], c: usize) -> (Vec<f64>, Vec<f64>) {
    let moments = |k: usize| {
        let mut count = [0u64; 256];
        pixels.iter().skip(k).step_by(c).for_each(|&b| count[b as usize] += 1);
        let n = count.iter().sum::<u64>().max(1) as f64;
        let mean = count.iter().enumerate().map(|(b, &m)| b as f64 * m as f64).sum::<f64>() / n;
        let square = count.iter().enumerate().map(|(b, &m)| (b as f64 - mean).powi(2) * m as f64).sum::<f64>() / n;
        (mean, square.sqrt())
    };
    (0..c).map(moments).unzip()
}

/// Mean and deviation of pictures of `c` channels beside those of the training images, if they are known: a tint or a
/// lack of contrast shows here.
pub fn brightness(pixels: &[u8], c: usize, recorded: &DataConfig) -> String {
    let text = |mean: &[f64], std: &[f64]| {
        let channels = mean.iter().zip(std).map(|(m, s)| format!("{m:.1} ± {s:.1}"));
        channels.collect::<Vec<_>>().join(", ")
    };
    let (mean, std) = channel_moments(pixels, c);
    let pictures = format!("mean ± deviation by channel: {}", text(&mean, &std));
    match recorded.mean.is_empty() {
        true => pictures,
        false => format!("{pictures}; of the training images: {}", text(&recorded.mean, &recorded.std)),
    }
}

/// One of the words that `T` is written as.
///
/// # Errors
/// Another word; the text lists them.
pub fn choice<T: serde::de::DeserializeOwned>(word: &str) -> std::result::Result<T, String> {
    serde_json::from_value(word.into()).map_err(|e| e.to_string())
}
