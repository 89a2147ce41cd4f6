//! Part of the golden suite on a GPU or its emulation, always: layers, residual blocks, attention, a whole network with every gradient,
//! losses, the optimiser and walks, in f32 at the tolerances of the index; the network in bf16 within twice the error of a plain
//! implementation.

use super::tensors::load;
use super::unet::{UnetRun, model_config};
use super::{Folder, carried_folder, check_ops, folder, pieces, training, unet};
use crate::cuda_ops::{gpu, read};
use crate::half::{Plain, distance};
use iddpm::config::Precision;
use iddpm::device::Device;
use iddpm::graph::{Region, Target};
use iddpm::unet::Params;

fn on_gpu(precision: Precision) -> Device {
    gpu().with_precision(precision)
}

fn plain_f32() -> Device {
    on_gpu(Precision::F32)
}

/// Checks the carried files of one kind there.
fn check(kind: &str, check: impl Fn(&super::VectorFile)) {
    let folder = Folder::open(&carried_folder());
    for name in folder.vector_files().filter(|name| name.starts_with(kind)) {
        let file = folder.load(name);
        check(&file);
        file.finish();
    }
}

#[test]
fn layers_match_the_reference() {
    check("09_layers", |file| pieces::layers(file, &plain_f32));
}

#[test]
fn resblocks_match_the_reference() {
    check("09_resblocks", |file| pieces::resblocks(file, &plain_f32));
}

#[test]
fn attention_matches_the_reference() {
    check("09_attention", |file| pieces::attention(file, &plain_f32));
}

#[test]
fn unet_matches_the_reference() {
    check("10_unet_", |file| unet::unet(file, &plain_f32));
}

#[test]
fn optimiser_matches_the_reference() {
    check("10_adamw_ema", |file| training::adamw_ema(file, &plain_f32));
}

#[test]
fn ops_match_the_reference() {
    check_ops(&plain_f32);
}

/// The error of an element is a sum of many roundings of either sign: over all elements of a tensor it is as large as its
/// statistics say. A kernel that rounds once more, or in the wrong place, more often than a plain implementation exceeds twice.
#[test]
fn a_network_in_bf16_is_as_good_as_a_plain_implementation() {
    let folder = Folder::open(&folder());
    for name in folder.vector_files().filter(|name| name.starts_with("10_unet_")) {
        let file = folder.load(name);
        let config = model_config(&file.settings["config"]);
        let params = Params::new(&config);
        let weights = load(&file, &params, "param/", "");
        let exact = UnetRun::record(&file, &config, &params, Target::Cpu);
        let mut cpu = Device::cpu(0).unwrap();
        let (exact_id, exact_grads) = exact.run(&mut cpu, &weights);
        let run = UnetRun::record(&file, &config, &params, Target::Cuda(Precision::Bf16));
        let mut device = on_gpu(Precision::Bf16);
        let (id, grads) = run.run(&mut device, &weights);
        let mut plain = Plain::new(&run.g);
        plain.write_region(Region::Params, &weights);
        run.floats.iter().for_each(|(v, x)| plain.write(*v, x));
        run.labels.iter().for_each(|(v, x)| plain.write(*v, x));
        plain.run();
        let compare = |what: &str, got: &[f32], plain: &[f32], want: &[f32]| {
            let (ours, theirs) = (distance(got, want), distance(plain, want));
            println!("{name} {what}: {ours:.2e}, plain {theirs:.2e}: {:.2}", ours / theirs);
            assert!(ours <= 2.0 * theirs, "{name} {what}: error {ours:e}, of a plain bf16 implementation {theirs:e}");
        };
        for ((what, v), (_, exact_v)) in run.named.iter().zip(&exact.named) {
            compare(what, &read(&device, id, *v), plain.read(*v), &crate::cuda_ops::read(&cpu, exact_id, *exact_v));
        }
        let plain_grads = plain.region(Region::Grads);
        compare("all gradients", &grads, plain_grads, &exact_grads);
        for p in &params.list {
            let at = p.offset..p.offset + p.len();
            compare(&p.name, &grads[at.clone()], &plain_grads[at.clone()], &exact_grads[at]);
        }
    }
}
