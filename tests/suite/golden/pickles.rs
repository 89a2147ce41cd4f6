//! Kind 11_pt: files written by `torch.save`, each with what to expect of it in `manifest.json`.
//!
//! An expectation names a vector file and, by a prefix before `<key>`, its tensors; or says that the file is to be
//! refused. Tensors must be equal bit for bit; the moments of the optimiser follow from the stored gradients.

use iddpm::import::tensor_file::TensorFile;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::path::Path;

/// Every file of the manifest in `folder`.
pub fn check(folder: &Path) {
    let manifest = std::fs::read_to_string(folder.join("manifest.json")).expect("11_pt has a manifest.json");
    let manifest: Value = serde_json::from_str(&manifest).expect("manifest.json is JSON");
    let marker = manifest["marker_file"].as_str().expect("marker_file");
    let mut checked = 0;
    for (name, entry) in manifest["good_and_bad"].as_object().expect("good_and_bad").iter() {
        let path = folder.join(name);
        let expect = entry["expect"].as_str().unwrap_or_else(|| panic!("{name}: no expectation"));
        let opened = TensorFile::open(&path);
        for place in [Path::new(marker).to_path_buf(), folder.join(marker)] {
            assert!(!place.exists(), "{}: code of the pickle was executed", path.display());
        }
        match opened {
            Err(e) if expect.contains("refus") => assert_eq!(e.exit_code(), 2, "{e}"),
            Err(e) => panic!("{e}"),
            Ok(_) if expect.starts_with("refuse") => panic!("{}: read, but should be refused", path.display()),
            Ok(file) => compare(&file, expect, entry, folder.parent().expect("a folder of vectors")),
        }
        checked += 1;
    }
    assert!(checked > 0, "{}: an empty manifest", folder.display());
}

fn compare(file: &TensorFile, expect: &str, entry: &Value, golden: &Path) {
    let name = file.path.display();
    if expect.contains("moments") {
        return moments(file, entry, golden);
    }
    let vectors = expect.split([' ', ',', ';', ':']).find(|w| w.ends_with(".safetensors"));
    let vectors = vectors.unwrap_or_else(|| panic!("{name}: unknown expectation {expect:?}"));
    let bytes = std::fs::read(golden.join(vectors)).unwrap_or_else(|e| panic!("{vectors}: {e}"));
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let prefix = expect.split(' ').find_map(|w| w.strip_suffix("<key>")).unwrap_or("");
    let expected: Vec<_> = all.iter().filter_map(|(k, v)| Some((k.strip_prefix(prefix)?.to_string(), v))).collect();
    assert_eq!(
        file.tensors.keys().map(String::as_str).collect::<std::collections::BTreeSet<_>>(),
        expected.iter().map(|(k, _)| k.as_str()).collect(),
        "{name}: names"
    );
    for (key, view) in expected {
        let t = file.get(&key).unwrap();
        assert_eq!((t.dims.as_slice(), dtype_name(view.dtype())), (view.shape(), t.dtype.name()), "{name}: {key}");
        assert!(file.bytes(t) == view.data(), "{name}: elements of {key}");
    }
    for (key, value) in entry["scalars"].as_object().into_iter().flatten() {
        if let Some(number) = value.as_f64() {
            let found = file.numbers.get(key).copied().or_else(|| {
                let t = file.tensors.get(key)?;
                file.f32s(t).map(|v| f64::from(v[0]))
            });
            assert_eq!(found, Some(number), "{name}: {key}");
        }
    }
}

/// m = 0.9 m + 0.1 g and v = 0.999 v + 0.001 g² over the gradients `wd05/grad.{0,1,2}/<key>`.
///
/// PyTorch rounds to f32 at each of the three steps: 3 roundings of at most 2^-24 each for m and twice that for v, of
/// the largest intermediate value; cancellation can make that larger than the result, hence the absolute part.
fn moments(file: &TensorFile, entry: &Value, golden: &Path) {
    let bytes = std::fs::read(golden.join("10_training.safetensors")).expect("10_training.safetensors");
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let order = entry["parameter_order"].as_array().expect("parameter_order");
    for (i, key) in order.iter().map(|k| k.as_str().unwrap()).enumerate() {
        let grad = |step: usize| -> Vec<f64> {
            let view = all.tensor(&format!("wd05/grad.{step}/{key}")).unwrap();
            view.data().chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect()
        };
        let grads = [grad(0), grad(1), grad(2)];
        for (what, decay, power) in [("exp_avg", 0.9, 1), ("exp_avg_sq", 0.999, 2)] {
            let name = format!("state.{i}.{what}");
            let got = file.f32s(file.get(&name).unwrap()).unwrap();
            for (j, got) in got.iter().enumerate() {
                let terms = grads.each_ref().map(|g| (1.0 - decay) * g[j].powi(power));
                let expected = terms.iter().fold(0.0, |m, g| decay * m + g);
                let largest = terms.iter().fold(0.0f64, |m, g| m.max(g.abs()));
                let allowed = 12.0 * f64::from(f32::EPSILON) * largest + 1e-37;
                let off = (f64::from(*got) - expected).abs();
                assert!(off <= allowed, "{name} ({key}) at {j}: {got:e}, expected {expected:e}, allowed {allowed:e}");
            }
        }
        let step = file.get(&format!("state.{i}.step")).ok().and_then(|t| file.f32s(t));
        assert_eq!(step, Some(vec![3.0]), "state.{i}.step");
    }
}

fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F64 => "float64",
        Dtype::F32 => "float32",
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
        Dtype::I64 => "int64",
        Dtype::I32 => "int32",
        Dtype::I16 => "int16",
        Dtype::I8 => "int8",
        Dtype::U8 => "uint8",
        Dtype::BOOL => "bool",
        other => panic!("unknown element type {other:?}"),
    }
}
