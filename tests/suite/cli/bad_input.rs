//! Settings, images, checkpoints and devices that cannot be: one clear message each, before anything is written.

use super::{SMALL, assert_bad, at, bad, copied, good, newest, trained};
use iddpm::grid::Images;
use std::path::Path;

/// `n` grey PNGs of side 16, named `cat_…` and `dog_…`, or all alike.
fn pictures(folder: &Path, n: usize, labels: bool) {
    let pixels: Vec<u8> = (0..n * 256).map(|i| (i * 7 % 256) as u8).collect();
    Images::new([16, 16, 1], &pixels).write_each(folder, 0).unwrap();
    if labels {
        for i in 0..n {
            let name = format!("{}_{i}.png", if i % 2 == 0 { "cat" } else { "dog" });
            std::fs::rename(folder.join(format!("{i:06}.png")), folder.join(name)).unwrap();
        }
    }
}

#[test]
fn bad_settings_are_told_before_anything_is_done() {
    let folder = tempfile::tempdir().unwrap();
    let f = folder.path();
    bad(f, "train --noise_schedule foo", &["foo", "linear", "cosine"]);
    bad(f, "train --schedule_sampler foo", &["foo", "uniform", "loss-second-moment"]);
    bad(f, "train --learn_sigma maybe", &["maybe", "True", "False"]);
    bad(f, "train --preset cifar100", &["cifar100", "cifar10-vlb", "digits"]);
    bad(f, "train --preset cifar10", &["cifar10", "--data-dir"]);
    bad(f, "train --no_such_flag 3", &["--no-such-flag"]);
    bad(f, "train --image_size 100000", &["--image-size 100000", "1024"]);
    bad(f, "train --image_size 17 --attention_resolutions 17", &["--image-size 17", "2", "18"]);
    bad(f, "train --num_channels 100", &["100", "32"]);
    bad(f, "train --num_channels 999999999", &["--num-channels 999999999", "8192"]);
    bad(f, "train --batch_size 1000000000", &["--batch-size 1000000000", "65536"]);
    bad(f, "train --batch_size 0", &["--batch-size 0"]);
    bad(f, "train --batch_size x", &["x", "--batch-size"]);
    bad(f, "train --microbatch 64", &["--microbatch 64", "32"]);
    bad(f, "train --num_heads 5", &["--num-heads 5", "64"]);
    bad(f, "train --attention_resolutions 5", &["--attention-resolutions 5", "16, 8"]);
    bad(f, "train --diffusion_steps 1", &["--diffusion-steps 1"]);
    bad(f, "train --timestep_respacing ddim999", &["ddim999", "ddim1000"]);
    bad(f, "train --ema_rate 1.5", &["--ema-rate 1.5"]);
    bad(f, "train --lr nan", &["--lr NaN"]);
    bad(f, "train --lr_anneal_steps 10 --steps 20", &["20", "10"]);
    bad(f, "train --threads 0", &["--threads 0", "1024"]);
    bad(f, "train --threads 100000", &["--threads 100000", "1024"]);
    bad(f, "train --steps -1", &["-1", "--steps"]);
    bad(f, "train --lr -1", &["--lr -1"]);
    bad(f, "train --dropout 1", &["--dropout 1"]);
    bad(f, "train --resume", &["runs/digits"]);
    bad(f, "train --minutes -3", &["--minutes -3"]);
    bad(f, "train --minutes inf", &["--minutes inf"]);
    bad(f, "train --diffusion_steps 20 --noise_schedule linear", &["--diffusion-steps 20", "21", "cosine"]);
    bad(f, "sample", &["runs/digits", "iddpm train"]);
    bad(f, "nll --num_samples 0", &["0", "--num-samples"]);
    bad(f, "nll --model_path none.safetensors", &["none.safetensors", "iddpm train"]);
    assert_eq!(std::fs::read_dir(f).unwrap().count(), 0, "something was written");
}

#[test]
fn bad_images_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let f = folder.path();
    let train = |data: &str| format!("train {SMALL} --image_size 16 --out out --data_dir {data}");
    bad(f, &train("nowhere"), &["nowhere"]);
    std::fs::create_dir(f.join("empty")).unwrap();
    bad(f, &train("empty"), &["empty"]);
    pictures(&f.join("few"), 3, false);
    bad(f, &train("few"), &["few", "3", "4"]);
    bad(
        f,
        &format!("{} --class_cond True", train("few").replace("--batch_size 4", "--batch_size 2")),
        &["few", "label"],
    );
    pictures(&f.join("cut"), 5, true);
    let one = f.join("cut/cat_2.png");
    let whole = std::fs::read(&one).unwrap();
    std::fs::write(&one, &whole[..whole.len() / 2]).unwrap();
    bad(f, &train("cut"), &["cat_2.png"]);
    std::fs::write(&one, "no picture").unwrap();
    bad(f, &train("cut"), &["cat_2.png"]);
    std::fs::remove_file(&one).unwrap();
    std::os::unix::fs::symlink("/nowhere", &one).unwrap();
    bad(f, &train("cut"), &["cat_2.png"]);
    pictures(&f.join("mixed"), 4, false);
    Images::new([8, 8, 1], &[9; 64]).write_each(&f.join("mixed"), 4).unwrap();
    bad(f, "data inspect --data-dir mixed", &["mixed", "16", "8"]);
    let out = good(f, "data inspect --data-dir mixed --image-size 16");
    assert!(out.contains('5'), "{out}");
    assert!(!f.join("out").exists(), "a run was begun");
}

#[test]
fn bad_checkpoints_are_named() {
    let (folder, path) = copied();
    let (f, name) = (folder.path(), path.file_name().unwrap().to_str().unwrap());
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() - 1000]).unwrap();
    for line in ["sample --model_path .", "nll --model_path .", "train --resume ."] {
        bad(f, line, &[name, "truncated"]);
    }
    std::fs::write(&path, "PK\x03\x04 and more").unwrap();
    bad(f, "sample --model_path .", &[name, ".pt"]);
    std::fs::write(&path, "").unwrap();
    bad(f, "sample --model_path .", &[name, "truncated"]);
    let tensor = br#"{"input_blocks.0.0.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}    "#;
    std::fs::write(&path, [&(tensor.len() as u64).to_le_bytes()[..], tensor, &[0; 4]].concat()).unwrap();
    bad(f, "sample --model_path .", &[name, "reference", "input_blocks.0.0.weight"]);
    bad(f, "train --resume_checkpoint gone.safetensors", &["gone.safetensors"]);
}

#[test]
fn flags_that_disagree_with_the_checkpoint_name_both_values() {
    let (folder, _path) = copied();
    let f = folder.path();
    bad(f, "sample --model_path . --diffusion_steps 50", &["--diffusion-steps 50", "12"]);
    bad(f, "nll --model_path . --learn_sigma False", &["--learn-sigma false", "true"]);
    bad(f, "sample --model_path . --image_size 32", &["--image-size 32", "16"]);
    bad(f, "train --resume . --lr 0.5", &["--lr 0.5", "0.001"]);
    bad(f, "train --resume . --seed 5", &["--seed 5", "0"]);
    bad(f, "train --resume . --preset mnist", &["--image-size 28", "16"]);
    good(f, "sample --model_path . --num_samples 1 --learn_sigma True --image_size 16 --num_channels 32");
    bad(f, "sample --model_path . --ema_rate 0.9", &["0.9", "0.5"]);
    bad(f, "sample --model_path . --eta 1", &["--eta 1", "--use-ddim"]);
    bad(f, "sample --model_path . --timestep_respacing 13", &["13", "12"]);
    bad(f, "train --resume . --limit 30 --steps 9", &["fingerprint", "40", "30"]);
}

#[test]
fn devices_that_cannot_be_are_told_with_the_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let f = folder.path();
    bad(f, "train --device gpu", &["gpu", "cpu, cuda, cuda:N"]);
    bad(f, "train --precision f16", &["f16", "bf16", "f32"]);
    bad(f, "train --precision bf16", &["--precision bf16", "--device cuda"]);
    let model = newest(&trained().join("run")).display().to_string();
    // No driver, no kernels in the program, or no GPU of this number.
    for line in ["train".into(), format!("sample --model_path {model}"), format!("nll --model_path {model}")] {
        let line = format!("{line} --device cuda:4096");
        assert_bad(&at(f, &line), &line, 1, &["--device cpu"]);
    }
    if !cfg!(feature = "emulator") {
        assert_bad(&at(f, "train --device emulated"), "train", 1, &["--features emulator", "--device cpu"]);
    }
    assert_eq!(std::fs::read_dir(f).unwrap().count(), 0, "something was written");
}
