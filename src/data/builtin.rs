//! The built-in set: the first 10,000 training images of MNIST at 16x16, with labels (`assets/README.md`).

use std::path::Path;

use super::{DataSpec, Dataset, Source, Split, idx};
use crate::error::{Error, Result};

/// Licence and attribution of the built-in images.
pub const LICENCE: &str = "MNIST, Yann LeCun, Corinna Cortes and Christopher J.C. Burges, CC BY-SA 3.0; \
                           first 10,000 training images, reduced to 16x16";

const IMAGES: &[u8] = include_bytes!("../../assets/digits-images-idx3-ubyte.gz");
const LABELS: &[u8] = include_bytes!("../../assets/digits-labels-idx1-ubyte.gz");

/// `builtin` or `digits`; a folder of that name is reached as `./digits`.
pub fn is_name(path: &Path) -> bool {
    path == Path::new("builtin") || path == Path::new("digits")
}

pub fn open(spec: &DataSpec) -> Result<Dataset> {
    if spec.split == Split::Test {
        return Err(Error::data(&spec.path, "the built-in set has no test split"));
    }
    let idx::Images { shape, pixels } = idx::images(&spec.path, flate2::bufread::GzDecoder::new(IMAGES))?;
    let labels = idx::labels(&spec.path, flate2::bufread::GzDecoder::new(LABELS))?;
    let source = Source { kind: "built-in digits", path: spec.path.clone(), ..Source::default() };
    idx::with_labels(shape, pixels, Some(labels)).into_dataset(spec, source)
}
