//! An npz of images, as samples are written: `arr_0` uint8 (n, h, w, c), `arr_1` integer labels (n) if present.

use super::{DataSpec, Dataset, Source, Split, load::Raw};
use crate::{
    error::{Error, Result},
    npz::{self, Values},
};

/// Loads the images of the file.
pub fn open(spec: &DataSpec) -> Result<Dataset> {
    let path = &spec.path;
    if spec.split == Split::Test {
        return Err(Error::data(path, "an npz has no test split"));
    }
    let mut arrays = npz::read(path)?;
    let names = arrays.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
    let mut take = |name: &str| arrays.iter().position(|(n, _)| n == name).map(|i| arrays.swap_remove(i).1);
    let missing = || Error::data(path, format!("no arr_0 (uint8 images, NHWC) in it; it holds {names}"));
    let images = take("arr_0").ok_or_else(missing)?;
    let dtype = images.values.dtype();
    let (Values::U8(pixels), &[n, h, w, c @ (1 | 3)]) = (images.values, &images.shape[..]) else {
        let what = format!("arr_0 is {dtype} of {:?}; images are uint8 of (n, h, w, 1 or 3)", images.shape);
        return Err(Error::data(path, what));
    };
    let labels = take("arr_1").map(|array| labels(spec, array, n)).transpose()?;
    let top = labels.iter().flatten().max().copied();
    let classes = top.map_or(Vec::new(), |top| (0..=top).map(|class| class.to_string()).collect());
    let source = Source { kind: "npz", path: path.clone(), ..Source::default() };
    Raw { shape: [n, h, w, c], pixels, labels, classes }.into_dataset(spec, source)
}

/// Labels above this are no classes.
const MAX_CLASSES: i64 = 1 << 20;

fn labels(spec: &DataSpec, array: npz::Array, n: usize) -> Result<Vec<i32>> {
    let fail = |what: String| Error::data(&spec.path, what);
    let dtype = array.values.dtype();
    let (Values::I64(values), true) = (array.values, array.shape == [n]) else {
        let what = format!("arr_1 is {dtype} of {:?}; labels of {n} images are int64 of [{n}]", array.shape);
        return Err(fail(what));
    };
    match values.iter().find(|v| !(0..MAX_CLASSES).contains(v)) {
        Some(v) => Err(fail(format!("arr_1 holds {v}: labels are numbers from 0"))),
        None => Ok(values.into_iter().map(|v| v as i32).collect()),
    }
}
