//! The commands with the CUDA kernels, on the emulator.

use super::good;
use std::path::Path;

/// Mean losses of the lines of a run's log.
fn losses(run: &Path) -> Vec<f64> {
    let log = std::fs::read_to_string(run.join("log.jsonl")).unwrap();
    log.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["loss"].as_f64().unwrap()).collect()
}

/// The commands with the CUDA kernels, on the emulator: 20 steps follow those of the processor, pictures and bits/dim come of
/// them, and a run begun on one device goes on on the other.
fn train_sample_and_nll_emulated(precision: &str, tolerance: f64) {
    let folder = tempfile::tempdir().unwrap();
    let f = folder.path();
    let device = format!("--device emulated --precision {precision}");
    let network =
        "--num_channels 32 --channel_mult 1,1 --num_res_blocks 1 --attention_resolutions 4 --learn_sigma True";
    let tiny = format!(
        "--image_size 8 {network} --diffusion_steps 2 --noise_schedule cosine --batch_size 2 --lr 1e-3 --ema_rate 0.5 \
         --limit 8 --log_interval 1 --save_interval 20"
    );
    good(f, &format!("train {tiny} --steps 20 --threads 1 --out cpu"));
    let out = good(f, &format!("train {tiny} --steps 20 --stream-data --out run {device}"));
    assert!(
        out.contains(&format!("device    emulated GPU (the CUDA kernels as C++ on this CPU), {precision}")),
        "{out}"
    );
    assert!(out.contains("sent batch by batch") && out.contains("done: 20 steps"), "{out}");
    let (have, want) = (losses(&f.join("run")), losses(&f.join("cpu")));
    assert_eq!((have.len(), want.len()), (20, 20));
    for (step, (have, want)) in have.iter().zip(&want).enumerate() {
        let error = (have - want).abs() / want;
        assert!(error <= tolerance, "{precision}, step {step}: loss {have}, on the processor {want}: {error} apart");
    }
    let out = good(f, &format!("sample --model_path run --num_samples 2 {device}"));
    assert!(out.contains("samples_2x8x8x1.npz"), "{out}");
    let bpd = |device: &str| {
        let out = good(f, &format!("nll --model_path run --num_samples 1 --batch_size 3 {device}"));
        out.lines().find_map(|l| l.strip_prefix("bits/dim  ")?.split(' ').next()?.parse::<f64>().ok()).unwrap()
    };
    let (have, want) = (bpd(&device), bpd("--device cpu"));
    assert!((have - want).abs() <= tolerance * want + 5e-5, "{precision}: {have} bits/dim, on the processor {want}");
    good(f, "train --resume --out run --steps 22 --device cpu");
}

/// Sums of a few hundred f32 products in other orders, 20 optimiser steps on.
#[test]
fn train_sample_and_nll_on_the_emulator_in_f32() {
    train_sample_and_nll_emulated("f32", 1e-4);
}

/// Each of some 60 roundings to bf16 on the way, 2^-9 of a value, moves the loss in a direction of its own: sqrt(60)/512.
#[test]
fn train_sample_and_nll_on_the_emulator_in_bf16() {
    train_sample_and_nll_emulated("bf16", 1.5e-2);
}
