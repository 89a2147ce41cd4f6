//! Super-resolution: the small images, and a model trained, used, taken out and brought in again.

use iddpm::checkpoint::{self, Checkpoint};
use iddpm::data::low_res::{LowRes, bilinear};
use iddpm::data::{self, DataSpec};
use iddpm::diffusion::to_unit;
use iddpm::npz::{self, Array};
use iddpm::train::slots;
use iddpm::unet::Params;
use std::path::Path;
use std::process::Command;

fn iddpm(folder: &Path, args: &[&str]) -> (Option<i32>, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_iddpm")).current_dir(folder).args(args).output().unwrap();
    (out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned())
}

fn succeed(folder: &Path, args: &[&str]) {
    let (code, text) = iddpm(folder, args);
    assert_eq!(code, Some(0), "{args:?}: {text}");
}

/// Positions 0.25, 0.75 between the centres of two pixels, by hand.
#[test]
fn enlarging_follows_half_pixel_centres() {
    let mut out = [0.0; 4];
    bilinear(&mut out, &[0.0, 1.0], [1, 2], [1, 4], 1);
    assert_eq!(out, [0.0, 0.25, 0.75, 1.0]);
    let mut out = [0.0; 6];
    bilinear(&mut out, &[2.0, -1.0, 4.0, 3.0], [2, 1], [3, 1], 2);
    assert_eq!(out, [2.0, -1.0, 3.0, 1.0, 4.0, 3.0]);
}

/// The mean of the small image is that of the large one, and a whole image of one value stays so.
#[test]
fn small_images_are_means() {
    let set = data::open(&DataSpec { limit: Some(3), ..DataSpec::new("digits") }).unwrap();
    let low = LowRes::of(&set, set.h / 4);
    let mean = |x: &[f32]| x.iter().map(|x| f64::from(*x)).sum::<f64>() / x.len() as f64;
    for i in 0..set.n {
        let large: Vec<f32> = set.image(i).iter().map(|&b| to_unit(b)).collect();
        let small = &low.pixels[i * low.pixels.len() / 3..][..low.pixels.len() / 3];
        // Sums of a few hundred f32 values of magnitude 1.
        assert!((mean(&large) - mean(small)).abs() < 1e-6, "image {i}");
    }
}

#[test]
fn a_model_is_trained_used_exported_and_imported() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let train = ["super-res", "train", "--preset", "digits", "--steps", "2", "--batch_size", "4", "--out", "run"];
    let (code, text) = iddpm(at, &train);
    assert!(code == Some(2) && text.contains("--small-size"), "{text}");
    let train: Vec<&str> = train.into_iter().chain(["--small_size", "8", "--sample-interval", "0"]).collect();
    succeed(at, &train);
    let path = checkpoint::find(&at.join("run")).unwrap();
    let c = Checkpoint::open(&path).unwrap();
    assert_eq!(c.progress.config.model.low_res, Some(8));

    let (code, text) = iddpm(at, &["sample", "--model-path", "run", "--num-samples", "2"]);
    assert!(code == Some(2) && text.contains("--base-samples"), "{text}");
    let small = Array::images([2, 8, 8, 1], (0..128).map(|i| i as u8 * 2).collect());
    npz::write(&at.join("small.npz"), &[("arr_0", &small)]).unwrap();
    let sample = |base: &str, out: &str| {
        let args = ["super-res", "sample", "--model-path", "run", "--num-samples", "2", "--ema-rate", "0"];
        let more = ["--timestep-respacing", "3", "--base-samples", base, "--out", out];
        succeed(at, &args.into_iter().chain(more).collect::<Vec<_>>());
        npz::read(&at.join(out).join("samples_2x16x16x1.npz")).unwrap()
    };
    let first = sample("small.npz", "a");
    assert_eq!(first, sample("small.npz", "b"), "the same seeds and small images");
    let other = Array::images([2, 8, 8, 1], vec![255; 128]);
    npz::write(&at.join("white.npz"), &[("arr_0", &other)]).unwrap();
    assert_ne!(first, sample("white.npz", "c"), "the small image has a say");

    succeed(at, &["export", "run", "--to", "m.pt", "--ema-rate", "0"]);
    let flags =
        ["--num_heads", "4", "--diffusion_steps", "1000", "--noise_schedule", "cosine", "--rescale_timesteps", "1"];
    let import = |more: &[&'static str]| -> Vec<&str> {
        ["import", "m.pt", "--image_size", "16", "--to", "back.safetensors"]
            .iter()
            .chain(&flags)
            .chain(more)
            .copied()
            .collect()
    };
    let (code, text) = iddpm(at, &import(&[]));
    assert!(code == Some(2) && text.contains("super-resolution") && text.contains("--small-size"), "{text}");
    succeed(at, &import(&["--small_size", "8"]));
    let back = Checkpoint::open(&at.join("back.safetensors")).unwrap();
    assert_eq!(back.progress.config.model, c.progress.config.model);
    let params = Params::new(&c.progress.config.model);
    let weights = |c: &Checkpoint| c.weights(&slots(&params), params.len).unwrap();
    assert_eq!(weights(&back), weights(&c));

    // As a folder: diffusers' network takes the picture and the enlarged small one as its input.
    succeed(at, &["export", "run", "--to", "folder", "--ema-rate", "0"]);
    let settings = std::fs::read(at.join("folder/config.json")).unwrap();
    let settings: serde_json::Value = serde_json::from_slice(&settings).unwrap();
    assert_eq!((&settings["in_channels"], &settings["out_channels"]), (&2.into(), &2.into()));
    // Without the configuration that our own export carries.
    let file = at.join("folder/diffusion_pytorch_model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    std::fs::write(&file, safetensors::serialize(tensors.iter(), None).unwrap()).unwrap();
    let import = ["import", "folder", "--to", "third.safetensors"];
    let (code, text) = iddpm(at, &import);
    assert!(code == Some(2) && text.contains("--small-size"), "{text}");
    succeed(at, &[&import[..], &["--small_size", "8"]].concat());
    let third = Checkpoint::open(&at.join("third.safetensors")).unwrap();
    let shape = |c: &Checkpoint| {
        let m = &c.progress.config.model;
        (m.low_res, m.in_channels, m.out_channels, c.progress.config.diffusion.var_type)
    };
    assert_eq!((shape(&third), weights(&third)), (shape(&c), weights(&c)));
}
