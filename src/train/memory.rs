//! Whether a training step fits into the memory of its device, and what would fit if it does not.

use super::{plan_of, stream};
use crate::config::Config;
use crate::device::room::bytes;
use crate::device::{Device, Plan};
use crate::error::{Error, Result};

/// Refuses a plan of `config` that needs more memory than `device` has free.
///
/// # Errors
/// [`Error::Device`] with need and rest, and what to change so that it fits.
pub fn check(config: &Config, device: &Device, plan: &Plan) -> Result<()> {
    let room = device.room(plan)?;
    if room.is_enough() {
        return Ok(());
    }
    let way_out = match remedy(config, device)? {
        Some(flags) => format!("{flags} would fit"),
        None => "not even --microbatch 1 with --use-checkpoint True fits, so use a smaller network".into(),
    };
    Err(Error::Device(format!("training needs {room}: {way_out}")))
}

/// The flags that make a training step fit: fewer images per pass, then also residual blocks computed anew. Every candidate is
/// planned, with the images on the host.
fn remedy(config: &Config, device: &Device) -> Result<Option<String>> {
    let given = config.train.microbatches()[0];
    let sizes = std::iter::successors(Some(given), |&n| (n > 1).then(|| n.div_ceil(2)));
    let sizes: Vec<usize> = sizes.collect();
    for recompute in [config.train.recompute, true] {
        let mut config = config.clone();
        let more = if recompute == config.train.recompute { "" } else { " --use-checkpoint True" };
        config.train.recompute = recompute;
        for &n in &sizes {
            config.train.microbatch = n;
            let room = device.room(&plan_of(&config, stream::images(&config), true, device.target())?.0)?;
            if room.is_enough() {
                return Ok(Some(format!("--microbatch {n}{more} ({})", bytes(room.need))));
            }
        }
    }
    Ok(None)
}
