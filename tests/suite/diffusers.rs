//! A diffusers folder of the google/ddpm-* kind: its numbers, its gradients, and the way back.
//!
//! `tests/data/ddpm_tiny.safetensors` (scripts/make-diffusers-fixture.py) holds the configuration, the names and sizes of the
//! tensors, and what diffusers computed. The weights are a formula of name and position, written here once more.

use crate::device::device;
use iddpm::autograd;
use iddpm::checkpoint::Checkpoint;
use iddpm::device::Plan;
use iddpm::graph::{DType, Graph, Region, Shape};
use iddpm::import::tensor_file::TensorFile;
use iddpm::train::slots;
use iddpm::unet::{self, Params};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Names and sizes as diffusers gives them.
type Tensors = BTreeMap<String, Vec<usize>>;

fn fixture() -> TensorFile {
    let root = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    TensorFile::open(&Path::new(&root).join("tests/data/ddpm_tiny.safetensors")).unwrap()
}

/// `n` numbers in -1..1: a hash of the checksum of `name` and the position.
fn values(name: &str, n: usize) -> Vec<f64> {
    let mut crc = flate2::Crc::new();
    crc.update(name.as_bytes());
    let one = |i: usize| {
        let mut x = crc.sum().wrapping_add((i as u32).wrapping_mul(2_654_435_761));
        for _ in 0..2 {
            x = (x ^ (x >> 16)).wrapping_mul(0x045d_9f3b);
        }
        f64::from(x ^ (x >> 16)) / 2f64.powi(31) - 1.0
    };
    (0..n).map(one).collect()
}

/// The weights of the tensor `name`.
fn weights(name: &str, dims: &[usize]) -> Vec<f32> {
    let v = values(name, dims.iter().product());
    let scale = (3.0 / dims[1..].iter().product::<usize>() as f64).sqrt();
    let norm = name.contains("norm") && name.ends_with("weight");
    let weigh = |v: f64| match dims.len() {
        1 if norm => 1.0 + 0.25 * v,
        1 => 0.25 * v,
        _ => v * scale,
    };
    v.into_iter().map(|v| weigh(v) as f32).collect()
}

/// Writes `config` and the weights of `tensors`, named by `rename`, as a folder of diffusers.
fn write_folder(folder: &Path, config: &str, tensors: &Tensors, rename: impl Fn(&str) -> String) {
    std::fs::create_dir(folder).unwrap();
    std::fs::write(folder.join("config.json"), config).unwrap();
    let scheduler = r#"{"_class_name": "DDPMScheduler", "beta_end": 0.02, "beta_schedule": "linear", "beta_start": 0.0001,
        "clip_sample": true, "num_train_timesteps": 1000, "trained_betas": null, "variance_type": "fixed_large"}"#;
    std::fs::write(folder.join("scheduler_config.json"), scheduler).unwrap();
    let data: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, dims)| (rename(name), dims.clone(), bytemuck::cast_slice(&weights(name, dims)).to_vec()))
        .collect();
    let views = data.iter().map(|(name, dims, bytes)| {
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, dims.clone(), bytes).unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    std::fs::write(folder.join("diffusion_pytorch_model.safetensors"), bytes).unwrap();
}

fn run(folder: &Path, line: &str) -> Output {
    let program = std::env::var_os("CARGO_BIN_EXE_iddpm").unwrap_or_else(|| env!("CARGO_BIN_EXE_iddpm").into());
    Command::new(program).current_dir(folder).args(line.split_whitespace()).output().unwrap()
}

fn good(folder: &Path, line: &str) {
    let out = run(folder, line);
    assert!(out.status.success(), "{line}: {}", String::from_utf8_lossy(&out.stderr));
}

fn refused(folder: &Path, line: &str, parts: &[&str]) {
    let out = run(folder, line);
    let text = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{line}: {text}");
    parts.iter().for_each(|p| assert!(text.contains(p), "{line}: lacks {p:?}: {text}"));
}

/// The fixture's folder, imported: a temporary folder with `model` and `m.safetensors`.
fn imported(rename: impl Fn(&str) -> String) -> (tempfile::TempDir, TensorFile, Tensors) {
    let (folder, file) = (tempfile::tempdir().unwrap(), fixture());
    let tensors: Tensors = serde_json::from_str(&file.metadata["tensors"]).unwrap();
    write_folder(&folder.path().join("model"), &file.metadata["config"], &tensors, rename);
    good(folder.path(), "import model --to m.safetensors");
    (folder, file, tensors)
}

/// (n, c, h, w) to (n, h, w, c), or back with the sizes (n, h, w, c) in place of (n, c, h, w) and `c` of w.
fn to_nhwc(x: &[f32], [n, c, h, w]: [usize; 4]) -> Vec<f32> {
    let at = |i: usize| {
        let (k, x, y, b) = (i % c, i / c % w, i / (c * w) % h, i / (c * w * h));
        ((b * c + k) * h + y) * w + x
    };
    (0..n * c * h * w).map(|i| x[at(i)]).collect()
}

fn tensor(file: &TensorFile, name: &str) -> (Vec<f32>, Vec<usize>) {
    let t = file.get(name).unwrap();
    (file.f32s(t).unwrap(), t.dims.clone())
}

/// Largest difference over the largest value.
fn relative(have: &[f32], want: &[f32]) -> f64 {
    assert_eq!(have.len(), want.len());
    let largest = want.iter().fold(0f64, |m, x| m.max(f64::from(x.abs())));
    have.iter().zip(want).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max) / largest
}

/// Rounding in f32 moves the output by 2e-6 of its largest value and the gradients by ten times that (the script prints
/// the first); a wrong shift, order, padding or eps moves them by 1e-3 and more.
#[test]
fn the_network_computes_what_diffusers_computes() {
    let (folder, file, tensors) = imported(str::to_string);
    let c = Checkpoint::open(&folder.path().join("m.safetensors")).unwrap();
    let m = &c.progress.config.model;
    assert_eq!((m.freq_shift, m.sine_first, m.norm_eps, m.downsample_padding), (1.0, true, 1e-6, 0));
    assert_eq!((m.num_heads, m.num_head_channels, m.channel_mult.as_slice()), (1, None, &[1, 2][..]));
    let params = Params::new(m);
    let mut g = Graph::new();
    let vals = params.declare(&mut g);
    let size = Shape::new(2, 8, 8, 3);
    let x = g.fixed("x", size, DType::F32, Region::Inputs);
    let t = g.fixed("t", Shape::rows(2, 1), DType::F32, Region::Inputs);
    let dout = g.fixed("cotangent", size, DType::F32, Region::Inputs);
    let out = unet::record(&mut g, m, &vals, x.into(), t, None, None).out;
    let steps = g.steps.len();
    g.keep(out);
    autograd::backward(&mut g, 0..steps, out, dout, &[x]);
    let mut d = device();
    let id = d.bind(Plan::new(g, true)).unwrap();
    d.write_region(Region::Params, &c.weights(&slots(&params), params.len).unwrap()).unwrap();
    for (v, name) in [(x, "x"), (dout, "cotangent")] {
        let (values, dims) = tensor(&file, name);
        d.write(id, v, &to_nhwc(&values, dims.try_into().unwrap())).unwrap();
    }
    d.write(id, t, &tensor(&file, "t").0).unwrap();
    d.run(id).unwrap();
    let mut have = vec![0.0; size.len()];
    d.read(id, out, &mut have).unwrap();
    let (want, dims) = tensor(&file, "out");
    let error = relative(&have, &to_nhwc(&want, dims.try_into().unwrap()));
    assert!(error < 1e-5, "output: {error:e}");

    let mut flat = vec![0.0f32; params.len];
    d.read_region(Region::Grads, &mut flat).unwrap();
    let part = |name: &str| {
        let p = params.list.iter().find(|p| p.name == name).unwrap();
        flat[p.offset..p.offset + p.len()].to_vec()
    };
    for (theirs, ours) in [
        ("conv_in.weight", "input_blocks.0.0.weight"),
        ("down_blocks.0.downsamplers.0.conv.weight", "input_blocks.2.0.op.weight"),
        ("conv_norm_out.weight", "out.0.weight"),
    ] {
        let (want, dims) = tensor(&file, &format!("grad/{theirs}"));
        let want = if dims.len() == 4 { to_nhwc(&want, dims.try_into().unwrap()) } else { want };
        let error = relative(&part(ours), &want);
        assert!(error < 1e-4, "{theirs}: {error:e}");
    }
    // The columns of sines come first there, those of cosines here.
    let (want, dims) = tensor(&file, "grad/time_embedding.linear_1.weight");
    let half = dims[1] / 2;
    let swapped: Vec<f32> = want.chunks_exact(dims[1]).flat_map(|r| [&r[half..], &r[..half]].concat()).collect();
    let error = relative(&part("time_embed.0.weight"), &swapped);
    assert!(error < 1e-4, "time embedding: {error:e}");
    // One head: all of q, all of k, all of v.
    let (want, dims) = tensor(&file, "grad/mid_block.attentions.0.to_k.weight");
    let qkv = part("middle_block.1.qkv.weight");
    let error = relative(&qkv[dims[0] * dims[1]..2 * dims[0] * dims[1]], &want);
    assert!(error < 1e-4, "keys: {error:e}");
    assert_eq!(tensors.len(), file.metadata["tensors"].matches('[').count());
}

#[test]
fn the_folder_comes_back_as_it_was() {
    let (folder, file, tensors) = imported(str::to_string);
    let at = folder.path();
    good(at, "export m.safetensors --to back");
    let json = |p: PathBuf| -> serde_json::Value { serde_json::from_slice(&std::fs::read(p).unwrap()).unwrap() };
    let (have, want) = (json(at.join("back/config.json")), json(at.join("model/config.json")));
    for (name, want) in want.as_object().unwrap() {
        let have = &have[name];
        assert!(have == want || (have.is_number() && have.as_f64() == want.as_f64()), "{name}: {have}, was {want}");
    }
    let back = TensorFile::open(&at.join("back/diffusion_pytorch_model.safetensors")).unwrap();
    assert_eq!(back.tensors.len(), tensors.len());
    for (name, dims) in &tensors {
        assert_eq!(tensor(&back, name), (weights(name, dims), dims.clone()), "{name}");
    }
    // Without the configuration in the metadata, from its settings alone.
    drop(back);
    std::fs::rename(at.join("model"), at.join("first")).unwrap();
    write_folder(&at.join("model"), &have.to_string(), &tensors, str::to_string);
    good(at, "import model --to again.safetensors");
    let model = |name: &str| Checkpoint::open(&at.join(name)).unwrap().progress.config.model;
    assert_eq!(model("again.safetensors"), model("m.safetensors"));
    // The reference's code would compute something else with these tensors.
    refused(at, "export m.safetensors --to m.pt", &["m.pt", "norm-eps", "downsample-padding", "diffusers"]);
    assert!(!at.join("m.pt").exists());
    good(at, "export m.safetensors --to state.safetensors");
    good(at, "import state.safetensors --to third.safetensors");
    assert_eq!(model("third.safetensors"), model("m.safetensors"));
    good(at, "sample --model-path model --num-samples 2 --timestep-respacing 3 --out s");
    drop(file);
}

/// Files of before 2023 name the parts of attention otherwise.
#[test]
fn old_names_and_wrong_settings() {
    let old = |name: &str| {
        let pairs = [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")];
        pairs.iter().fold(name.to_string(), |name, (new, old)| name.replace(new, old))
    };
    let (folder, file, tensors) = imported(old);
    let (new, _, _) = imported(str::to_string);
    let read = |f: &tempfile::TempDir| std::fs::read(f.path().join("m.safetensors")).unwrap();
    assert!(read(&folder) == read(&new));
    for (from, to, parts) in [
        (r#""downsample_padding": 0"#, r#""downsample_padding": 2"#, ["downsample_padding 2", "0 and 1"]),
        (r#""freq_shift": 1"#, r#""freq_shift": 40"#, ["freq_shift 40", "0 and 1"]),
        (r#""flip_sin_to_cos": false"#, r#""flip_sin_to_cos": "no""#, ["flip_sin_to_cos", "true or false"]),
        (r#""norm_eps": 1e-06"#, r#""norm_eps": "small""#, ["norm_eps", "number"]),
        (r#""mid_block_scale_factor": 1"#, r#""mid_block_scale_factor": 2"#, ["mid_block_scale_factor", "only 1"]),
    ] {
        let config = file.metadata["config"].replace(from, to);
        assert_ne!(config, file.metadata["config"], "{from}");
        std::fs::remove_dir_all(folder.path().join("model")).unwrap();
        write_folder(&folder.path().join("model"), &config, &tensors, str::to_string);
        refused(folder.path(), "import model --to x.safetensors", &[&["config.json"], &parts[..]].concat());
    }
}
