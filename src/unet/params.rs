//! Every tensor of a model: its name in the reference's state dict, size, initial values and place in the flat region.
//!
//! All time-embedding projections lie side by side in the flat region, weights then biases, so that one linear step
//! computes them together.

use super::architecture::{Architecture, Layer};
use crate::config::ModelConfig;
use crate::graph::{ALIGN, DType, Graph, Region, Shape, Val};
use crate::rng;
use std::collections::HashMap;

/// Distribution of a tensor's initial values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All 0.
    Zeros,
    /// All 1.
    Ones,
    /// Uniform in ± this bound: 1/sqrt(fan-in).
    Uniform(f32),
    /// Standard normal.
    Normal,
}

/// One tensor of the model.
#[derive(Clone, Debug, PartialEq)]
pub struct Param {
    /// Key in the reference's state dict.
    pub name: String,
    /// Size as stored here: (out, kh, kw, in) for convolutions, (out, in) for matrices, (n) for vectors.
    pub dims: Vec<usize>,
    /// First element in the flat region.
    pub offset: usize,
    /// Initial values.
    pub init: Init,
}

impl Param {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the tensor is a factor of products: the weights of a convolution or a linear layer.
    fn is_factor(&self) -> bool {
        self.dims.len() > 1 && self.name != "label_emb.weight"
    }

    /// Size as a value of a plan.
    pub fn shape(&self) -> Shape {
        match self.dims[..] {
            [c] => Shape::rows(1, c),
            [n, c] => Shape::rows(n, c),
            [n, h, w, c] => Shape::new(n, h, w, c),
            _ => panic!("{}: {} dimensions", self.name, self.dims.len()),
        }
    }
}

/// Every tensor of a model, in the reference's registration order, and their places in one flat region.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Params {
    /// The tensors.
    pub list: Vec<Param>,
    /// Elements of the flat region, gaps between tensors included.
    pub len: usize,
}

const ALIGN_ELEMENTS: usize = ALIGN / 4;

impl Params {
    /// The tensors of `config`.
    pub fn new(config: &ModelConfig) -> Self {
        let a = Architecture::new(config);
        let (base, emb) = (config.model_channels, 4 * config.model_channels);
        let mut p = Params::default();
        p.linear("time_embed.0", base, emb);
        p.linear("time_embed.2", emb, emb);
        if let Some(classes) = config.class_rows() {
            p.add("label_emb.weight".into(), vec![classes, emb], Init::Normal);
        }
        for block in a.blocks() {
            for (i, layer) in block.layers.iter().enumerate() {
                p.layer(&format!("{}.{i}", block.name), layer);
            }
        }
        p.norm("out.0", a.out_channels);
        p.conv("out.2", a.out_channels, config.out_channels, 3, true);
        p.place();
        p
    }

    fn add(&mut self, name: String, dims: Vec<usize>, init: Init) {
        self.list.push(Param { name, dims, offset: 0, init });
    }

    fn linear(&mut self, name: &str, c: usize, oc: usize) {
        let bound = Init::Uniform(1.0 / (c as f32).sqrt());
        self.add(format!("{name}.weight"), vec![oc, c], bound);
        self.add(format!("{name}.bias"), vec![oc], bound);
    }

    fn conv(&mut self, name: &str, c: usize, oc: usize, k: usize, zero: bool) {
        let bound = if zero { Init::Zeros } else { Init::Uniform(1.0 / ((c * k * k) as f32).sqrt()) };
        self.add(format!("{name}.weight"), vec![oc, k, k, c], bound);
        self.add(format!("{name}.bias"), vec![oc], bound);
    }

    fn norm(&mut self, name: &str, c: usize) {
        self.add(format!("{name}.weight"), vec![c], Init::Ones);
        self.add(format!("{name}.bias"), vec![c], Init::Zeros);
    }

    /// Appends the tensors of one layer called `name`.
    pub fn layer(&mut self, name: &str, layer: &Layer) {
        match layer {
            Layer::Conv { c, oc } => self.conv(name, *c, *oc, 3, false),
            Layer::Res(b) => {
                self.norm(&format!("{name}.in_layers.0"), b.c);
                self.conv(&format!("{name}.in_layers.2"), b.c, b.oc, 3, false);
                self.linear(&format!("{name}.emb_layers.1"), b.emb, b.columns());
                self.norm(&format!("{name}.out_layers.0"), b.oc);
                self.conv(&format!("{name}.out_layers.3"), b.oc, b.oc, 3, true);
                if b.c != b.oc {
                    self.conv(&format!("{name}.skip_connection"), b.c, b.oc, b.skip_kernel, false);
                }
            }
            Layer::Attention { c, .. } => {
                self.norm(&format!("{name}.norm"), *c);
                self.conv(&format!("{name}.qkv"), *c, 3 * c, 1, false);
                self.conv(&format!("{name}.proj_out"), *c, *c, 1, true);
            }
            Layer::Downsample { c, conv: true } => self.conv(&format!("{name}.op"), *c, *c, 3, false),
            Layer::Upsample { c, conv: true } => self.conv(&format!("{name}.conv"), *c, *c, 3, false),
            Layer::Downsample { conv: false, .. } | Layer::Upsample { conv: false, .. } => {}
        }
    }

    /// Gives every tensor its offset: the time-embedding projections first, side by side, then the others, aligned.
    pub fn place(&mut self) {
        let projection = |p: &Param, what: &str| p.name.ends_with(&format!("emb_layers.1.{what}"));
        self.len = 0;
        for what in ["weight", "bias"] {
            for p in self.list.iter_mut().filter(|p| projection(p, what)) {
                p.offset = self.len;
                self.len += p.len();
            }
            self.len = self.len.next_multiple_of(ALIGN_ELEMENTS);
        }
        for p in self.list.iter_mut().filter(|p| !p.name.contains("emb_layers.1.")) {
            p.offset = self.len;
            self.len = (self.len + p.len()).next_multiple_of(ALIGN_ELEMENTS);
        }
    }

    /// Number of parameters, gaps not counted.
    pub fn count(&self) -> usize {
        self.list.iter().map(Param::len).sum()
    }

    /// The initial flat region of a run with `seed`.
    pub fn init(&self, seed: u64) -> Vec<f32> {
        let mut flat = vec![0.0; self.len];
        for (k, p) in self.list.iter().enumerate() {
            let out = &mut flat[p.offset..p.offset + p.len()];
            let op = rng::op::PARAM_INIT + k as u32;
            match p.init {
                Init::Zeros => {}
                Init::Ones => out.fill(1.0),
                Init::Normal => rng::fill_normal(out, seed, 0, 0, op),
                Init::Uniform(bound) => {
                    rng::fill_uniform(out, seed, 0, 0, op);
                    out.iter_mut().for_each(|x| *x = (2.0 * *x - 1.0) * bound);
                }
            }
        }
        flat
    }

    /// Declares the tensors as values of `g`; where activations are bf16, the weights of products as their bf16 copies.
    pub fn declare(&self, g: &mut Graph) -> ParamVals {
        let whole = Shape::rows(1, self.len);
        let all = g.at("params", whole, DType::F32, Region::Params, 0);
        let compute = g.half.then(|| g.at("compute weights", whole, DType::Bf16, Region::Compute, 0));
        let mut at = |p: &Param| {
            if compute.is_some() && p.is_factor() {
                g.at(&p.name, p.shape(), DType::Bf16, Region::Compute, 2 * p.offset)
            } else {
                g.at(&p.name, p.shape(), DType::F32, Region::Params, 4 * p.offset)
            }
        };
        let vals = self.list.iter().map(|p| (p.name.clone(), at(p))).collect();
        let mut projection = |what: &str| -> Option<Val> {
            let ends = |p: &&Param| p.name.ends_with(&format!("emb_layers.1.{what}"));
            let parts: Vec<&Param> = self.list.iter().filter(ends).collect();
            let first = parts.first()?;
            let rows: usize = parts.iter().map(|p| p.dims[0]).sum();
            let dims = first.dims.iter().skip(1).copied();
            let whole = Param {
                name: format!("emb_layers.1.{what}"),
                dims: [rows].into_iter().chain(dims).collect(),
                ..(*first).clone()
            };
            Some(at(&whole))
        };
        let projections = projection("weight").zip(projection("bias"));
        ParamVals { all, compute, vals, projections }
    }
}

/// The tensors of a model as values of a plan.
#[derive(Clone, Debug)]
pub struct ParamVals {
    /// The whole flat region.
    pub all: Val,
    /// The whole region of bf16 copies, where activations are bf16.
    pub compute: Option<Val>,
    vals: HashMap<String, Val>,
    /// Weights and biases of all time-embedding projections together, if there is a residual block.
    pub projections: Option<(Val, Val)>,
}

impl ParamVals {
    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Val {
        *self.vals.get(name).unwrap_or_else(|| panic!("the model has no tensor {name}"))
    }

    /// Weight and bias of the layer called `name`.
    pub fn pair(&self, name: &str) -> (Val, Val) {
        (self.get(&format!("{name}.weight")), self.get(&format!("{name}.bias")))
    }
}
