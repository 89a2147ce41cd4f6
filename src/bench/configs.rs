//! The named configurations that are measured: T1 to T4, small enough for a processor, T0 for the emulator, `tiny` for a GPU,
//! and every preset.
//!
//! T0 to T4 are 3-channel networks of width 32 with 4 heads, scale-shift norm, learned variance and hybrid loss, trained
//! with AdamW and one moving average on batches of 16. `tiny` is such a network of width 64 on one channel, batches of 128.

use crate::config::preset::{PRESETS, preset};
use crate::config::{Config, Schedule, VarType};
use crate::data::{self, DataSpec, Dataset};
use crate::error::{Error, Result};

/// A configuration with the name it was asked for.
#[derive(Clone, Debug)]
pub struct Named {
    /// "t1" or the name of a preset.
    pub name: String,
    /// The settings.
    pub config: Config,
}

/// Name, image size, residual blocks, widths, attention at these image sizes.
type Small = (&'static str, usize, usize, &'static [usize], &'static [usize]);

const SMALL: [Small; 6] = [
    ("t0", 8, 1, &[1], &[8]),
    ("t1", 16, 1, &[1, 2], &[8]),
    ("t2", 16, 2, &[1, 2, 2], &[8]),
    ("t3", 32, 1, &[1, 2, 2], &[16, 8]),
    ("t4", 32, 2, &[1, 2, 2, 2], &[16, 8]),
    ("tiny", 32, 2, &[1, 2, 2, 2], &[16, 8]),
];

/// Every name that can be asked for.
pub fn names() -> Vec<&'static str> {
    SMALL.iter().map(|s| s.0).chain(PRESETS.iter().map(|p| p.name)).collect()
}

/// The configurations called `names`, with batches of `batch` if given.
///
/// # Errors
/// [`Error::Config`] for a name or a batch that cannot be; it lists the names.
pub fn named(list: &[String], batch: Option<usize>) -> Result<Vec<Named>> {
    let one = |name: &String| {
        let small = SMALL.iter().find(|s| s.0 == name);
        let mut config = match small {
            Some(&(_, size, blocks, mult, attention)) => small_config(size, blocks, mult, attention),
            None => preset(name).map_err(|_| {
                Error::Config(format!("--config {name}: no such configuration; there are {}", names().join(", ")))
            })?,
        };
        if name == "tiny" {
            (config.model.in_channels, config.model.out_channels, config.model.model_channels) = (1, 2, 64);
            config.train.batch_size = 128;
        }
        if let Some(batch) = batch {
            config.train.batch_size = batch;
        }
        config.train.microbatch = 0;
        config.validate()?;
        Ok(Named { name: name.clone(), config })
    };
    list.iter().map(one).collect()
}

fn small_config(size: usize, blocks: usize, mult: &[usize], attention: &[usize]) -> Config {
    let mut c = Config::default();
    c.model.image_size = size;
    c.model.out_channels = 2 * c.model.in_channels;
    c.model.model_channels = 32;
    c.model.num_res_blocks = blocks;
    c.model.channel_mult = mult.to_vec();
    c.model.attention_resolutions = attention.iter().map(|s| size / s).collect();
    c.diffusion.diffusion_steps = 4000;
    c.diffusion.noise_schedule = Schedule::Cosine;
    c.diffusion.var_type = VarType::LearnedRange;
    c.train.batch_size = 16;
    c
}

/// Real images in the size and channels of `config`: built-in handwritten digits, resized, in at least `batch` copies.
///
/// # Errors
/// [`Error::Config`] for a number of channels that images do not have.
pub fn images(config: &Config) -> Result<Dataset> {
    let m = &config.model;
    let spec = DataSpec {
        image_size: Some(m.image_size),
        channels: Some(m.in_channels),
        limit: Some(LIMIT),
        ..DataSpec::default()
    };
    let mut set = data::open(&spec)?;
    let copies = config.train.batch_size.div_ceil(set.n);
    set.pixels = set.pixels.repeat(copies);
    set.labels = set.labels.map(|l| l.repeat(copies));
    set.n *= copies;
    Ok(set)
}

/// Images resized for a measurement.
const LIMIT: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unet::Params;

    /// Parameter counts of the reference's network in these configurations, in millions to three places.
    #[test]
    fn small_configurations_have_the_published_sizes() {
        let list = ["t1", "t2", "t3", "t4", "tiny"].map(String::from);
        let sizes: Vec<f64> =
            named(&list, None).unwrap().iter().map(|n| Params::new(&n.config.model).count() as f64 / 1e6).collect();
        for (have, want) in sizes.iter().zip([0.757, 1.745, 1.244, 2.491, 9.92]) {
            assert!((have - want).abs() < 0.0006 * want, "{sizes:?}");
        }
    }

    #[test]
    fn every_name_is_a_valid_configuration() {
        let all: Vec<String> = names().into_iter().map(String::from).collect();
        assert_eq!(named(&all, Some(2)).unwrap().len(), all.len());
        let message = named(&["t9".into()], None).unwrap_err().to_string();
        assert!(message.contains("t9") && message.contains("t1, t2") && message.contains("cifar10"), "{message}");
    }

    #[test]
    fn images_fill_a_batch() {
        let mut c = named(&["t1".into()], Some(300)).unwrap().remove(0).config;
        let set = images(&c).unwrap();
        assert_eq!((set.n, set.h, set.w, set.c, set.pixels.len()), (512, 16, 16, 3, 512 * 768));
        c.train.batch_size = 16;
        assert_eq!(images(&c).unwrap().n, 256);
    }
}
