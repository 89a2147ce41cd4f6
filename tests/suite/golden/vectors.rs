//! A folder of vector files, the tensors in them, and comparison by the index's tolerances.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use iddpm::config::{MeanType, Schedule, VarType};
use iddpm::diffusion::Output;
use iddpm::schedule::{Process, space_timesteps};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value};

/// A folder of vector files with its index.
pub struct Folder {
    path: PathBuf,
    entries: Vec<String>,
    index: BTreeMap<String, BTreeMap<String, Spec>>,
}

/// What the index says of one tensor.
struct Spec {
    role: String,
    dtype: String,
    shape: Vec<usize>,
    zero: bool,
    tolerance: Value,
}

impl Folder {
    /// Lists the folder and reads `index.json`.
    pub fn open(path: &Path) -> Self {
        let mut entries: Vec<String> = fs::read_dir(path)
            .unwrap_or_else(|e| panic!("{}: cannot read the folder of golden vectors: {e}", path.display()))
            .map(|entry| entry.unwrap().file_name().into_string().expect("file names are UTF-8"))
            .collect();
        entries.sort();
        let text = fs::read_to_string(path.join("index.json"))
            .unwrap_or_else(|e| panic!("{}/index.json: {e}", path.display()));
        // Python writes measured infinities as bare words, which JSON does not know; they are not read here.
        let json: Value = serde_json::from_str(&text.replace("Infinity", "null"))
            .unwrap_or_else(|e| panic!("{}/index.json: {e}", path.display()));
        let index = json["files"].as_array().expect("index.json: `files` is a list").iter().map(index_entry).collect();
        Folder { path: path.into(), entries, index }
    }

    /// Names of everything in the folder, sorted.
    pub fn entries(&self) -> &[String] {
        &self.entries
    }

    /// Names of the vector files, sorted.
    pub fn vector_files(&self) -> impl Iterator<Item = &String> {
        self.entries.iter().filter(|name| name.ends_with(".safetensors"))
    }

    /// Reads one vector file and holds it against its index entry.
    pub fn load(&self, name: &str) -> VectorFile {
        let path = self.path.join(name);
        let specs = self.index.get(name).unwrap_or_else(|| panic!("{}: no entry in index.json", path.display()));
        let bytes = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        VectorFile::parse(self.path.join(name), &bytes, specs)
    }
}

fn index_entry(file: &Value) -> (String, BTreeMap<String, Spec>) {
    let name = file["file"].as_str().expect("index.json: `file` is a name").to_string();
    let tensors = file["tensors"].as_array().cloned().unwrap_or_default();
    let specs = tensors.iter().map(|t| {
        let text = |key: &str| t[key].as_str().unwrap_or_else(|| panic!("{name}: a tensor without {key}")).to_string();
        let spec = Spec {
            role: text("role"),
            dtype: text("dtype"),
            shape: t["shape"].as_array().expect("shape").iter().map(|n| n.as_u64().expect("size") as usize).collect(),
            zero: t["zero"].as_bool().unwrap_or(false),
            tolerance: t["tol"].clone(),
        };
        (text("name"), spec)
    });
    (name.clone(), specs.collect())
}

/// One tensor: NCHW or whatever its shape says, row-major. Every dtype in the files fits f64 exactly.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Sizes, slowest first.
    pub shape: Vec<usize>,
    /// `float32`, `float64`, `int64` or `uint8`, as the index writes it.
    pub dtype: &'static str,
    /// The elements.
    pub values: Vec<f64>,
}

impl Tensor {
    /// The elements as f32.
    pub fn f32s(&self) -> Vec<f32> {
        self.values.iter().map(|&v| v as f32).collect()
    }

    /// The elements as indices.
    pub fn indices(&self) -> Vec<usize> {
        self.values.iter().map(|&v| v as usize).collect()
    }

    /// Entry `i` of the first axis.
    pub fn sub(&self, i: usize) -> Tensor {
        let n = self.values.len() / self.shape[0];
        Tensor { shape: self.shape[1..].to_vec(), dtype: self.dtype, values: self.values[i * n..(i + 1) * n].to_vec() }
    }

    /// The same tensor with channels last: (.., C, H, W) becomes (.., H, W, C).
    pub fn channels_last(&self) -> Tensor {
        let (outer, c, pixels) = self.image_sizes();
        let mut values = vec![0.0; self.values.len()];
        for (i, v) in self.values.iter().enumerate() {
            let (o, k, p) = (i / (c * pixels), i / pixels % c, i % pixels);
            values[(o * pixels + p) * c + k] = *v;
        }
        let rank = self.shape.len();
        let shape = [&self.shape[..outer], &self.shape[rank - 2..], &[c]].concat();
        Tensor { shape, dtype: self.dtype, values }
    }

    /// (number of leading axes, channels, pixels) of (.., C, H, W).
    fn image_sizes(&self) -> (usize, usize, usize) {
        let rank = self.shape.len();
        assert!(rank >= 3, "an image has 3 axes or more, not {:?}", self.shape);
        (rank - 3, self.shape[rank - 3], self.shape[rank - 2] * self.shape[rank - 1])
    }
}

/// Values of one (H, W, C) image as (C, H, W).
pub fn channels_first(values: &[f64], channels: usize) -> Vec<f64> {
    let pixels = values.len() / channels;
    (0..values.len()).map(|i| values[i % pixels * channels + i / pixels]).collect()
}

/// One vector file. Comparisons collect their failures; [`VectorFile::finish`] reports them all.
pub struct VectorFile {
    /// Where it lies.
    pub path: PathBuf,
    /// Settings of the whole file.
    pub settings: Value,
    /// Settings of each case, by the first part of the tensor names.
    pub cases: Map<String, Value>,
    tensors: BTreeMap<String, Tensor>,
    specs: BTreeMap<String, (String, bool, Value)>,
    compared: RefCell<BTreeSet<String>>,
    failures: RefCell<Vec<String>>,
}

impl VectorFile {
    fn parse(path: PathBuf, bytes: &[u8], specs: &BTreeMap<String, Spec>) -> Self {
        let wrong = |what: String| -> ! { panic!("{}: {what}", path.display()) };
        let (_, header) = SafeTensors::read_metadata(bytes).unwrap_or_else(|e| wrong(e.to_string()));
        let metadata = header.metadata().clone().unwrap_or_default();
        let json = |key: &str| -> Value {
            let text = metadata.get(key).unwrap_or_else(|| wrong(format!("no `{key}` in the metadata")));
            serde_json::from_str(text).unwrap_or_else(|e| wrong(format!("metadata `{key}`: {e}")))
        };
        let stored = SafeTensors::deserialize(bytes).unwrap_or_else(|e| wrong(e.to_string()));
        let mut tensors = BTreeMap::new();
        for (name, view) in stored.iter() {
            let (dtype, values) = decode(view.dtype(), view.data());
            let tensor = Tensor { shape: view.shape().to_vec(), dtype, values };
            let spec = specs.get(name).unwrap_or_else(|| wrong(format!("tensor {name} has no entry in index.json")));
            if spec.shape != tensor.shape || spec.dtype != dtype {
                wrong(format!("{name} is {dtype} {:?}, the index says {} {:?}", tensor.shape, spec.dtype, spec.shape));
            }
            tensors.insert(name.to_string(), tensor);
        }
        if let Some(missing) = specs.keys().find(|name| !tensors.contains_key(*name)) {
            wrong(format!("tensor {missing} of index.json is not in the file"));
        }
        VectorFile {
            settings: json("settings"),
            cases: json("cases").as_object().cloned().unwrap_or_default(),
            specs: specs.iter().map(|(k, s)| (k.clone(), (s.role.clone(), s.zero, s.tolerance.clone()))).collect(),
            tensors,
            compared: RefCell::default(),
            failures: RefCell::default(),
            path,
        }
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("{}: no tensor {name}", self.path.display()))
    }

    /// Whether there is a tensor of that name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.tensors.keys()
    }

    /// A tensor that says where others are comparable: it counts as compared by being used.
    pub fn mask(&self, name: &str) -> Vec<bool> {
        self.compared.borrow_mut().insert(name.into());
        self.get(name).values.iter().map(|&v| v != 0.0).collect()
    }

    /// Notes a failure that is not a comparison.
    pub fn fail(&self, what: impl std::fmt::Display) {
        self.failures.borrow_mut().push(format!("{}: {what}", self.path.display()));
    }

    /// [`VectorFile::compare`] for f32 results.
    pub fn compare_f32(&self, name: &str, got: &[f32]) {
        self.compare(name, &got.iter().map(|&v| f64::from(v)).collect::<Vec<_>>());
    }

    /// Holds `got` (in the order of the stored tensor) against tensor `name`, by the tolerance of the index.
    pub fn compare(&self, name: &str, got: &[f64]) {
        self.compared.borrow_mut().insert(name.into());
        let expected = self.get(name);
        if got.len() != expected.values.len() {
            return self.fail(format!("{name}: {} elements, expected {}", got.len(), expected.values.len()));
        }
        let (_, zero, tolerance) = &self.specs[name];
        let tolerance = self.tolerance(name, tolerance, expected);
        let mut worst: Option<(f64, usize, f64)> = None;
        let mut wrong = 0;
        for (i, (&g, &e)) in got.iter().zip(&expected.values).enumerate() {
            let e = if *zero { 0.0 } else { e };
            let Some(allowed) = tolerance.at(i, e) else { continue };
            let same = g == e || (g.is_nan() && e.is_nan());
            let error = (g - e).abs();
            if same || error <= allowed {
                continue;
            }
            wrong += 1;
            let excess = if error.is_nan() { f64::INFINITY } else { error - allowed };
            if worst.is_none_or(|(w, ..)| excess > w) {
                worst = Some((excess, i, allowed));
            }
        }
        if let Some((_, i, allowed)) = worst {
            let (g, e) = (got[i], if *zero { 0.0 } else { expected.values[i] });
            self.fail(format!(
                "{name}: {wrong} of {} elements differ; worst at {i} {:?}: got {g:e}, expected {e:e}, off by {:e}, tolerance {allowed:e}",
                got.len(),
                position(i, &expected.shape),
                (g - e).abs(),
            ));
        }
    }

    /// What the index allows tensor `name`.
    fn tolerance<'a>(&'a self, name: &str, stated: &Value, expected: &Tensor) -> Tolerance<'a> {
        let number = |value: &Value| {
            value.as_f64().unwrap_or_else(|| panic!("{}: {name}: unknown tolerance {stated}", self.path.display()))
        };
        let tensor = |key: &str| self.get(stated[key].as_str().unwrap_or_default()).values.as_slice();
        match stated["mode"].as_str() {
            Some("exact") => Tolerance::Relative(0.0, 0.0),
            Some("abs") => Tolerance::Relative(0.0, number(&stated["atol"])),
            Some("axis0") => {
                let rows = (0..expected.shape[0]).map(|row| number(&stated["atol"][row])).collect();
                Tolerance::Rows(rows, expected.values.len() / expected.shape[0])
            }
            Some("rel") => Tolerance::Relative(number(&stated["rtol"]), stated["atol"].as_f64().unwrap_or(0.0)),
            Some("elementwise") => Tolerance::Each(tensor("tensor")),
            Some("masked") => Tolerance::Masked(tensor("mask"), number(&stated["rtol"]), number(&stated["atol"])),
            _ => panic!("{}: {name}: unknown tolerance {stated}", self.path.display()),
        }
    }

    /// Ends the check: fails with every difference found and every result that was never compared.
    pub fn finish(self) {
        let compared = self.compared.borrow();
        for (name, (role, ..)) in &self.specs {
            match role.as_str() {
                "output" | "exact" if !compared.contains(name) => {
                    self.fail(format!("{name}: no check compares it"));
                }
                "output" | "exact" | "input" | "mask" | "tolerance" | "output64" => {}
                other => self.fail(format!("{name}: unknown role {other}")),
            }
        }
        self.finish_part();
    }

    /// Ends the check of a part of the file: fails with every difference found.
    pub fn finish_part(&self) {
        let failures = self.failures.borrow();
        let shown = 30.min(failures.len());
        assert!(failures.is_empty(), "{} failures, of which:\n{}", failures.len(), failures[..shown].join("\n"));
    }
}

/// Largest allowed difference of each element of a tensor.
enum Tolerance<'a> {
    /// `rtol |e| + atol`.
    Relative(f64, f64),
    /// One absolute value for each row of so many elements.
    Rows(Vec<f64>, usize),
    /// One absolute value for each element.
    Each(&'a [f64]),
    /// `rtol |e| + atol` where the mask is not 0, nothing elsewhere.
    Masked(&'a [f64], f64, f64),
}

impl Tolerance<'_> {
    /// For element `i` with expected value `e`; none where it is not comparable. An infinite `e` allows no difference.
    fn at(&self, i: usize, e: f64) -> Option<f64> {
        let size = if e.is_finite() { e.abs() } else { 0.0 };
        match self {
            Tolerance::Relative(rtol, atol) => Some(rtol * size + atol),
            Tolerance::Rows(rows, length) => Some(rows[i / length]),
            Tolerance::Each(each) => Some(each[i]),
            Tolerance::Masked(mask, rtol, atol) => (mask[i] != 0.0).then(|| rtol * size + atol),
        }
    }
}

fn position(mut i: usize, shape: &[usize]) -> Vec<usize> {
    let mut place: Vec<usize> = shape.iter().rev().map(|n| (i % n, i /= n).0).collect();
    place.reverse();
    place
}

fn decode(dtype: Dtype, data: &[u8]) -> (&'static str, Vec<f64>) {
    fn each<const N: usize>(data: &[u8], f: impl Fn([u8; N]) -> f64) -> Vec<f64> {
        data.chunks_exact(N).map(|b| f(b.try_into().unwrap())).collect()
    }
    match dtype {
        Dtype::F32 => ("float32", each(data, |b| f64::from(f32::from_le_bytes(b)))),
        Dtype::F64 => ("float64", each(data, f64::from_le_bytes)),
        Dtype::I64 => ("int64", each(data, |b| i64::from_le_bytes(b) as f64)),
        Dtype::U8 => ("uint8", each(data, |[b]| f64::from(b))),
        other => panic!("dtype {other:?} is not used by golden vectors"),
    }
}

/// The schedule a case names.
pub fn schedule(case: &Value) -> Schedule {
    match case["schedule"].as_str() {
        Some("linear") => Schedule::Linear,
        Some("cosine") => Schedule::Cosine,
        other => panic!("unknown schedule {other:?}"),
    }
}

/// The process of a case: `schedule`, `T` and `spec` (null: as it is; text or a list of counts: respaced).
pub fn process(case: &Value) -> Process {
    let steps = case["T"].as_u64().expect("`T` is a number") as usize;
    let base = Process::new(schedule(case), steps).unwrap();
    let process = match spec(case) {
        None => base,
        Some(spec) => base.respace(&space_timesteps(steps, &spec).unwrap()).unwrap(),
    };
    if let Some(n) = case["num_timesteps"].as_u64() {
        assert_eq!(process.steps() as u64, n, "{case}: number of steps");
    }
    process
}

/// The respacing of a case as text: "50", "10,15,20", "ddim25"; a list of counts is joined.
pub fn spec(case: &Value) -> Option<String> {
    match &case["spec"] {
        Value::Null => None,
        Value::String(s) => Some(s.clone()),
        Value::Array(counts) => Some(counts.iter().map(Value::to_string).collect::<Vec<_>>().join(",")),
        other => panic!("unknown respacing {other}"),
    }
}

/// The mean type the files call `eps`, `xstart` or `xprev`.
pub fn mean_type(name: &str) -> MeanType {
    match name {
        "eps" => MeanType::Epsilon,
        "xstart" => MeanType::XStart,
        "xprev" => MeanType::PreviousX,
        other => panic!("unknown mean type {other}"),
    }
}

/// The variance type the files call `range`, `learned`, `small` or `large`.
pub fn var_type(name: &str) -> VarType {
    match name {
        "range" => VarType::LearnedRange,
        "learned" => VarType::Learned,
        "small" => VarType::FixedSmall,
        "large" => VarType::FixedLarge,
        other => panic!("unknown variance type {other}"),
    }
}

/// Output kinds a case has tensors for, as they are named there: "eps.range" and so on.
pub fn outputs<'a>(file: &'a VectorFile, case: &str) -> Vec<(&'a str, Output)> {
    let kinds = file.names().filter_map(|name| {
        let combo = name.strip_prefix(case)?.strip_prefix('/')?.strip_suffix("/model_output")?;
        let (mean, var) = combo.split_once('.').unwrap_or_else(|| panic!("output kind {combo}"));
        Some((combo, Output { mean_type: mean_type(mean), var_type: var_type(var) }))
    });
    kinds.collect()
}
