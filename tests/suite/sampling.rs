//! Objectives and samplers beyond the reference's, as a user meets them.

use crate::cli::{SMALL, bad, good};
use iddpm::checkpoint::{self, Checkpoint};
use iddpm::schedule::sigmoid_betas;
use std::path::Path;

/// Trains on v with weighted errors over a sigmoid schedule; the checkpoint knows all of it.
#[test]
fn a_velocity_model_is_trained_and_sampled() {
    let folder = tempfile::tempdir().unwrap();
    let f = folder.path();
    let small = SMALL.replace("cosine", "sigmoid");
    let flags = "--predict_v True --loss_weight min-snr:5 --learn_sigma True --sample-interval 0";
    let out = good(f, &format!("train {small} {flags} --steps 3 --out run"));
    for setting in ["predict-v=true", "loss-weight=min-snr:5", "noise-schedule=sigmoid", "predict-xstart=false"] {
        assert!(out.contains(setting), "{setting}: {out}");
    }
    good(f, "sample --model-path run --num-samples 2 --use-ddim --timestep-respacing 4 --out s --ema-rate 0");
    good(f, "sample --model-path run --num-samples 2 --predict-v True --out s --ema-rate 0");
    good(f, "nll --model-path run --num-samples 2 --out n");
    // Diffusers gets the betas themselves; they are recognised without our record of the schedule.
    good(f, "export run --to folder");
    let settings = std::fs::read_to_string(f.join("folder/scheduler_config.json")).unwrap();
    let mut settings: serde_json::Value = serde_json::from_str(&settings).unwrap();
    assert_eq!(settings["prediction_type"], "v_prediction");
    let betas: Vec<f64> = serde_json::from_value(settings["trained_betas"].clone()).unwrap();
    assert_eq!(betas, sigmoid_betas(12));
    good(f, "import folder --to back.safetensors");
    let config = |path: &Path| Checkpoint::open(path).unwrap().progress.config.diffusion;
    let trained = config(&checkpoint::find(&f.join("run")).unwrap());
    assert_eq!(config(&f.join("back.safetensors")), trained);
    let weights = f.join("folder/diffusion_pytorch_model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    std::fs::write(&weights, safetensors::serialize(tensors.iter(), None).unwrap()).unwrap();
    good(f, "import folder --to other.safetensors");
    let other = config(&f.join("other.safetensors"));
    assert_eq!((other.noise_schedule, other.mean_type), (trained.noise_schedule, trained.mean_type));
    settings["trained_betas"][3] = 0.5.into();
    std::fs::write(f.join("folder/scheduler_config.json"), settings.to_string()).unwrap();
    bad(f, "import folder --to third.safetensors", &["trained_betas", "sigmoid"]);

    bad(f, "sample --model-path run --predict-v False", &["--predict-v false", "true"]);
    bad(f, "sample --model-path run --loss-weight uniform", &["--loss-weight uniform", "min-snr:5"]);
    bad(f, "train --predict_v True --predict_xstart True", &["--predict-v", "--predict-xstart"]);
    bad(f, "train --loss_weight snr", &["snr", "min-snr:5"]);
    bad(f, "train --loss_weight min-snr --use_kl True", &["--loss-weight min-snr:5", "--use-kl"]);
    // A flag for another prediction takes the preset's back; a False leaves a prediction of another kind alone.
    let plan = |flags: &str| good(f, &format!("plan --totals --batch-size 1 {flags}"));
    assert_eq!(plan("--predict_v True --predict_xstart False"), plan("--predict_v True"));
}
