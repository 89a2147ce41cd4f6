//! Flags that say where sampling starts: latents out of a file, the way between two of them.

use crate::error::{Error, Result};
use crate::npz::{self, Array, Values};
use crate::sampler::latents;
use clap::Args;
use std::path::{Path, PathBuf};

/// Pictures of a row of --interpolate, if no number is asked for.
const COLUMNS: u64 = 8;
/// Most pictures of all rows.
const MOST: usize = 100_000;

/// Flags for latents.
#[derive(Args, Clone, Debug)]
pub struct LatentFlags {
    /// Start from the x_T in this .npz, as `iddpm encode` writes it, rather than from noise
    #[arg(long, value_name = "FILE", help_heading = "Latents")]
    latents: Option<PathBuf>,
    /// Rows of pictures on the way from one latent to the next: seeds, or with --latents places in the file (3,8 or 0,1,2)
    #[arg(long, value_name = "A,B", value_delimiter = ',', help_heading = "Latents")]
    interpolate: Option<Vec<u64>>,
}

/// Where a walk starts.
pub struct Start {
    /// x_T of every picture, (n, h, w, c).
    pub x: Vec<f32>,
    /// Number of pictures, n.
    pub pictures: usize,
    /// Class of each picture, where the file tells it.
    pub labels: Option<Vec<i32>>,
    /// Pictures of a row, if they are on the way between latents.
    pub columns: Option<usize>,
}

impl LatentFlags {
    /// Whether any is given.
    pub fn given(&self) -> bool {
        self.latents.is_some() || self.interpolate.is_some()
    }

    /// The latents of pictures of size (h, w, c): those of the file, the first `asked` of it, or rows of `asked` between two.
    ///
    /// # Errors
    /// [`Error::Data`] for a file of other latents, [`Error::Config`] for places that it has not and rows that are none.
    pub fn start(&self, size: [usize; 3], asked: Option<u64>) -> Result<Option<Start>> {
        let file = self.latents.as_deref().map(|path| read(path, size)).transpose()?;
        let each = size.iter().product::<usize>();
        let Some(points) = &self.interpolate else {
            let (Some(mut file), Some(path)) = (file, &self.latents) else { return Ok(None) };
            let n = asked.map_or(file.pictures, |n| n as usize);
            if n > file.pictures {
                let path = path.display();
                return Err(Error::Config(format!("--num-samples {n}: {path} holds {} latents", file.pictures)));
            }
            file.pictures = n;
            file.x.truncate(n * each);
            file.labels.iter_mut().for_each(|l| l.truncate(n));
            return Ok(Some(file));
        };
        let columns = asked.unwrap_or(COLUMNS) as usize;
        let pictures = columns.saturating_mul(points.len().saturating_sub(1));
        if points.len() < 2 || columns < 2 || pictures > MOST {
            return Err(Error::Config(format!(
                "--interpolate: {} latents and {columns} pictures a row: give 2 or more of each, {MOST} pictures at most",
                points.len()
            )));
        }
        let latent = |&at: &u64| -> Result<Vec<f32>> {
            let Some(file) = &file else {
                let mut x = vec![0.0; each];
                latents::draw(&mut x, at);
                return Ok(x);
            };
            let known = usize::try_from(at).ok().filter(|&at| at < file.pictures);
            let at = known.ok_or_else(|| {
                Error::Config(format!("--interpolate {at}: the latents of --latents are 0 to {}", file.pictures - 1))
            })?;
            Ok(file.x[at * each..][..each].to_vec())
        };
        let ends = points.iter().map(latent).collect::<Result<Vec<_>>>()?;
        let x = ends.windows(2).flat_map(|pair| latents::path(&pair[0], &pair[1], columns)).collect();
        let labels = file.and_then(|f| f.labels).map(|labels| {
            points[..points.len() - 1].iter().flat_map(|&at| vec![labels[at as usize]; columns]).collect()
        });
        Ok(Some(Start { x, pictures, labels, columns: Some(columns) }))
    }
}

/// Writes the latents `x` (n, h, w, c) of pictures of size (h, w, c) with their labels.
///
/// # Errors
/// [`Error::Io`].
pub fn write(path: &Path, x: Vec<f32>, [h, w, c]: [usize; 3], labels: Option<&[i32]>) -> Result<()> {
    let x = Array { shape: vec![x.len() / (h * w * c), h, w, c], values: Values::F32(x) };
    let labels = labels.map(Array::labels);
    let arrays: Vec<_> = [("arr_0", &x)].into_iter().chain(labels.as_ref().map(|l| ("arr_1", l))).collect();
    npz::write(path, &arrays)
}

/// Latents of pictures of size (h, w, c): `arr_0` float32 (n, h, w, c), `arr_1` int64 labels (n) if present.
fn read(path: &Path, size: [usize; 3]) -> Result<Start> {
    let mut arrays = npz::read(path)?;
    let mut take = |name: &str| arrays.iter().position(|(n, _)| n == name).map(|i| arrays.swap_remove(i).1);
    let latents = take("arr_0").ok_or_else(|| Error::data(path, "there is no arr_0 (float32 latents, NHWC) in it"))?;
    let dtype = latents.values.dtype();
    let (pictures, x) = match (latents.values, &latents.shape[..]) {
        (Values::F32(x), &[n, h, w, c]) if [h, w, c] == size && n > 0 => (n, x),
        (_, shape) => {
            let [h, w, c] = size;
            let what =
                format!("arr_0 is {dtype} of {shape:?}; latents of this model are float32 of (n, {h}, {w}, {c})");
            return Err(Error::data(path, what));
        }
    };
    if let Some(bad) = x.iter().find(|x| !x.is_finite()) {
        return Err(Error::data(path, format!("arr_0 holds {bad}: no latent of a picture")));
    }
    let labels = match take("arr_1") {
        None => None,
        Some(Array { values: Values::I64(labels), .. }) if labels.len() == pictures => {
            let label = |l: i64| i32::try_from(l).map_err(|_| Error::data(path, format!("arr_1 holds {l}: no label")));
            Some(labels.into_iter().map(label).collect::<Result<_>>()?)
        }
        Some(Array { values, shape }) => {
            let what = format!("arr_1 is {} of {shape:?}; labels are int64 of [{pictures}]", values.dtype());
            return Err(Error::data(path, what));
        }
    };
    Ok(Start { x, pictures, labels, columns: None })
}
