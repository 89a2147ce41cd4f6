//! Stored tensors as ours and back: convolution weights are stored (out, in, kh, kw), ours (out, kh, kw, in); images channels first,
//! ours last.

use super::vectors::{self, Tensor, VectorFile};
use iddpm::device::{Device, PlanId};
use iddpm::graph::{Shape, Val};
use iddpm::unet::Params;
use serde_json::Value;

/// (out, in, rest..) to (out, rest.., in); vectors and matrices stay.
pub fn to_ours(t: &Tensor) -> Vec<f32> {
    permute(&t.f32s(), t, true)
}

/// The order of `t` from values in our order.
pub fn to_theirs(values: &[f32], t: &Tensor) -> Vec<f32> {
    permute(values, t, false)
}

pub fn permute(values: &[f32], t: &Tensor, forward: bool) -> Vec<f32> {
    if t.shape.len() < 3 {
        return values.to_vec();
    }
    let (inner, rest) = (t.shape[1], t.shape[2..].iter().product::<usize>());
    let mut out = vec![0.0; values.len()];
    for (i, &v) in values.iter().enumerate() {
        let (o, a, b) = if forward {
            (i / (inner * rest), i / rest % inner, i % rest)
        } else {
            (i / (inner * rest), i / inner % rest, i % inner)
        };
        let (da, db) = if forward { (inner, b * inner + a) } else { (rest, b * rest + a) };
        out[o * da * if forward { rest } else { inner } + db] = v;
    }
    out
}

pub fn image_shape(t: &Tensor) -> Shape {
    Shape::new(t.shape[0], t.shape[2], t.shape[3], t.shape[1])
}

pub fn f32s(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&v| v as f32).collect()
}

/// The flat region filled from the tensors `prefix + name`; `strip` is taken off our names first.
pub fn load(file: &VectorFile, params: &Params, prefix: &str, strip: &str) -> Vec<f32> {
    let mut flat = vec![0.0; params.len];
    for p in &params.list {
        let t = file.get(&format!("{prefix}{}", p.name.strip_prefix(strip).unwrap_or(&p.name)));
        assert_eq!(t.values.len(), p.len(), "{}: {} of {:?}", file.path.display(), p.name, t.shape);
        flat[p.offset..p.offset + p.len()].copy_from_slice(&to_ours(t));
    }
    flat
}

/// Compares each tensor of the flat region with `prefix + name`, where the file has it.
pub fn compare(file: &VectorFile, params: &Params, flat: &[f32], prefix: &str, strip: &str) {
    for p in &params.list {
        let name = format!("{prefix}{}", p.name.strip_prefix(strip).unwrap_or(&p.name));
        if file.has(&name) {
            file.compare_f32(&name, &to_theirs(&flat[p.offset..p.offset + p.len()], file.get(&name)));
        }
    }
}

pub fn read(device: &Device, id: PlanId, v: Val) -> Vec<f32> {
    let mut out = vec![f32::NAN; device.plan(id).graph.shape(v).len()];
    device.read(id, v, &mut out).unwrap();
    out
}

/// Compares an image, ours channels last.
pub fn compare_image(file: &VectorFile, name: &str, values: &[f32]) {
    let t = file.get(name);
    file.compare_f32(name, &channels_first(values, t));
}

pub fn channels_first(values: &[f32], t: &Tensor) -> Vec<f32> {
    let image = values.len() / t.shape[0];
    let planes = |x: &[f32]| {
        let wide: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
        vectors::channels_first(&wide, t.shape[1])
    };
    values.chunks(image).flat_map(|x| f32s(&planes(x))).collect()
}
pub fn ints(t: &Tensor) -> Vec<i32> {
    t.values.iter().map(|&v| v as i32).collect()
}
pub fn number(case: &Value, key: &str) -> usize {
    case[key].as_u64().unwrap_or_else(|| panic!("{key} of {case}")) as usize
}

pub fn flag(case: &Value, key: &str) -> bool {
    case[key].as_bool().unwrap_or(false)
}
