//! 12_architectures.json: names in registration order, sizes, totals and zero initialisation of full-size models, by flags.

use iddpm::config::{Config, ModelConfig, preset};
use iddpm::import::reference::reference_dims;
use iddpm::train::slots;
use iddpm::unet::{Init, Params};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;

/// Every model of the file.
pub fn check(path: &Path) {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let models: Value = serde_json::from_str(&text).unwrap();
    for (name, model) in models.as_object().expect("models by name") {
        let config = network(&model["flags"], model["kind"] == "super-resolution");
        let same = |key: &str, ours: &[usize]| {
            let theirs: Vec<usize> =
                model[key].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as usize).collect();
            assert_eq!(theirs, ours, "{name}: {key}");
        };
        same("channel_mult", &config.channel_mult);
        same("attention_downsample_rates", &config.attention_resolutions);
        let params = Params::new(&config);
        assert_eq!(model["parameters"].as_u64(), Some(params.count() as u64), "{name}: parameters");
        let theirs = model["tensors"].as_array().unwrap();
        assert_eq!(theirs.len(), params.list.len(), "{name}: tensors");
        for (slot, theirs) in slots(&params).iter().zip(theirs) {
            let dims: Vec<usize> = theirs[1].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as usize).collect();
            assert_eq!((Some(slot.name), reference_dims(slot)), (theirs[0].as_str(), dims), "{name}");
        }
        let zero = |k: &Value| k.as_str().unwrap().to_string();
        let theirs: BTreeSet<String> = model["zero_initialised"].as_array().unwrap().iter().map(zero).collect();
        // The list is of modules set to zero on purpose; the biases of norms are 0 anyway.
        let norm_bias =
            |n: &str| params.list.iter().any(|p| p.init == Init::Ones && n == p.name.replace("weight", "bias"));
        let ours = params.list.iter().filter(|p| p.init == Init::Zeros && !norm_bias(&p.name));
        assert_eq!(theirs, ours.map(|p| p.name.clone()).collect(), "{name}: zero-initialised tensors");
    }
}

fn network(flags: &Value, super_resolution: bool) -> ModelConfig {
    let number = |key: &str| flags[key].as_u64().unwrap_or_else(|| panic!("{key} of {flags}")) as usize;
    let truth = |key: &str| flags[key].as_bool().unwrap_or_else(|| panic!("{key} of {flags}"));
    let image_size = number(if super_resolution { "large_size" } else { "image_size" });
    let in_channels = if super_resolution { 6 } else { 3 };
    let pixels = flags["attention_resolutions"].as_str().unwrap().split(',');
    ModelConfig {
        image_size,
        in_channels,
        out_channels: if truth("learn_sigma") { 6 } else { 3 },
        model_channels: number("num_channels"),
        num_res_blocks: number("num_res_blocks"),
        channel_mult: preset::channel_mult(image_size).unwrap(),
        attention_resolutions: pixels.map(|p| image_size / p.parse::<usize>().unwrap()).collect(),
        num_classes: truth("class_cond").then_some(1000),
        use_scale_shift_norm: truth("use_scale_shift_norm"),
        ..Config::default().model
    }
}
