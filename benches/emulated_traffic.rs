//! Bytes that each CUDA kernel moves on the emulator, against those its op declares:
//! `cargo bench --features emulator --bench emulated_traffic [-- CONFIG:BATCH ..]`.
//!
//! A table for every configuration of `iddpm bench --config` named (default: t0 at 2 images, t1 at 1), in f32 and in bf16:
//! every distinct op of a training step and of sampling. These are counts, the same on every run; the emulator's times say nothing.

use iddpm::bench::{configs, kernels::Kinds, traffic};
use iddpm::device::Device;
use iddpm::error::Result;

fn main() -> Result<()> {
    // Cargo, and the runner of the other benches, add flags that are not for this one.
    let asked: Vec<String> = std::env::args().skip(1).filter(|a| a.contains(':')).collect();
    let asked = if asked.is_empty() { ["t0:2", "t1:1"].map(String::from).to_vec() } else { asked };
    for text in &asked {
        let (name, batch) = text.split_once(':').expect("entries without a colon are left out");
        let config = configs::named(&[name.to_string()], batch.parse().ok())?.swap_remove(0).config;
        let mut kinds = Kinds::new(&config, &Device::emulated)?;
        let title = format!("{name}, batch {}", config.train.batch_size);
        if !kinds.missing.is_empty() {
            println!("{title}: no kernel for {}", kinds.missing.join(", "));
        }
        println!("{}", traffic::table(&title, &mut kinds)?);
    }
    Ok(())
}
