//! The U-Net of the reference (`UNetModel`), as data and as recorded steps.
//!
//! [`Architecture::new`] lists the blocks of a configuration; [`Params`] gives every tensor its name (the reference's
//! state-dict key), size, initial distribution and place in the flat parameter region; [`record`] appends the forward steps.
//!
//! All time-embedding projections lie side by side in the flat region, weights then biases, so that one linear step
//! computes them together: each residual block reads its own columns of the result.

use crate::autograd::Tape;
use crate::config::ModelConfig;
use crate::graph::{ALIGN, DType, Graph, Region, Shape, Source, Val};
use crate::ops::attention::{Attention, QkvOrder};
use crate::ops::avg_pool::AvgPool;
use crate::ops::conv2d::{Conv2d, ConvOptions};
use crate::ops::embedding::Embedding;
use crate::ops::group_norm::{DropoutStep, GroupNorm, NormOptions};
use crate::ops::linear::Linear;
use crate::ops::silu::Silu;
use crate::ops::timestep_embedding::TimestepEmbedding;
use crate::ops::upsample::Upsample;
use crate::rng;
use std::collections::HashMap;
use std::ops::Range;

/// One layer of a block.
#[derive(Clone, Debug, PartialEq)]
pub enum Layer {
    /// 3x3 convolution.
    Conv {
        /// Input channels.
        c: usize,
        /// Output channels.
        oc: usize,
    },
    /// Residual block.
    Res(ResBlock),
    /// Self-attention block of `c` channels.
    Attention {
        /// Channels.
        c: usize,
        /// Heads.
        heads: usize,
    },
    /// Half the size: 3x3 convolution of stride 2, or a 2x2 mean.
    Downsample {
        /// Channels.
        c: usize,
        /// Convolution rather than mean.
        conv: bool,
    },
    /// Twice the size: nearest neighbour, then a 3x3 convolution if `conv`.
    Upsample {
        /// Channels.
        c: usize,
        /// Convolution after it.
        conv: bool,
    },
}

/// A residual block: norm, SiLU, conv; norm with the time embedding, SiLU, dropout, conv; plus the input.
#[derive(Clone, Debug, PartialEq)]
pub struct ResBlock {
    /// Input channels.
    pub c: usize,
    /// Output channels.
    pub oc: usize,
    /// Width of the time embedding.
    pub emb: usize,
    /// The embedding scales and shifts the second norm; otherwise it is added before it.
    pub scale_shift: bool,
    /// Kernel size of the skip convolution, which is there if `c != oc`.
    pub skip_kernel: usize,
    /// Its first column among all projections of the time embedding.
    pub column: usize,
    /// Its number among all residual blocks: the dropout layer.
    pub number: u32,
}

impl ResBlock {
    /// Columns of the projected time embedding it reads.
    pub fn columns(&self) -> usize {
        if self.scale_shift { 2 * self.oc } else { self.oc }
    }
}

/// A few layers in a row, named as in the state dict (`input_blocks.3`).
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    /// Name.
    pub name: String,
    /// Layers, numbered from 0 in the names of their tensors.
    pub layers: Vec<Layer>,
}

/// The blocks of a configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Architecture {
    /// Going down; the output of each is kept for the way up.
    pub input: Vec<Block>,
    /// At the bottom.
    pub middle: Block,
    /// Going up; each takes the previous output and one kept output.
    pub output: Vec<Block>,
    /// Channels before the last convolution.
    pub out_channels: usize,
    /// Columns of all time-embedding projections together.
    pub columns: usize,
}

/// Hands out columns and numbers to residual blocks.
struct Builder<'a> {
    config: &'a ModelConfig,
    columns: usize,
    blocks: u32,
}

impl Builder<'_> {
    fn res(&mut self, c: usize, oc: usize) -> Layer {
        let block = ResBlock {
            c,
            oc,
            emb: 4 * self.config.model_channels,
            scale_shift: self.config.use_scale_shift_norm,
            skip_kernel: 1,
            column: self.columns,
            number: self.blocks,
        };
        self.columns += block.columns();
        self.blocks += 1;
        Layer::Res(block)
    }

    fn attention(&self, c: usize, heads: usize, factor: usize) -> Option<Layer> {
        self.config.attention_resolutions.contains(&factor).then_some(Layer::Attention { c, heads })
    }
}

impl Architecture {
    /// The blocks of `config`, in the reference's order.
    pub fn new(config: &ModelConfig) -> Self {
        let mut b = Builder { config, columns: 0, blocks: 0 };
        let (base, conv) = (config.model_channels, config.conv_resample);
        let levels = config.channel_mult.len();
        let mut input = vec![vec![Layer::Conv { c: config.in_channels, oc: base }]];
        let (mut kept, mut c, mut factor) = (vec![base], base, 1);
        for (level, mult) in config.channel_mult.iter().enumerate() {
            for _ in 0..config.num_res_blocks {
                let mut layers = vec![b.res(c, mult * base)];
                c = mult * base;
                layers.extend(b.attention(c, config.num_heads, factor));
                input.push(layers);
                kept.push(c);
            }
            if level + 1 < levels {
                input.push(vec![Layer::Downsample { c, conv }]);
                kept.push(c);
                factor *= 2;
            }
        }
        let middle = vec![b.res(c, c), Layer::Attention { c, heads: config.num_heads }, b.res(c, c)];
        let mut output = Vec::new();
        for (level, mult) in config.channel_mult.iter().enumerate().rev() {
            for i in 0..=config.num_res_blocks {
                let skip = kept.pop().expect("as many outputs as inputs");
                let mut layers = vec![b.res(c + skip, mult * base)];
                c = mult * base;
                layers.extend(b.attention(c, config.num_heads_upsample, factor));
                if level > 0 && i == config.num_res_blocks {
                    layers.push(Layer::Upsample { c, conv });
                    factor /= 2;
                }
                output.push(layers);
            }
        }
        let named = |part: &str, blocks: Vec<Vec<Layer>>| -> Vec<Block> {
            let name = |(i, layers)| Block { name: format!("{part}.{i}"), layers };
            blocks.into_iter().enumerate().map(name).collect()
        };
        Architecture {
            input: named("input_blocks", input),
            middle: Block { name: "middle_block".into(), layers: middle },
            output: named("output_blocks", output),
            out_channels: c,
            columns: b.columns,
        }
    }

    /// All blocks, in the order they run.
    pub fn blocks(&self) -> impl Iterator<Item = &Block> {
        self.input.iter().chain([&self.middle]).chain(&self.output)
    }
}

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
        if let Some(classes) = config.num_classes {
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

    /// Declares the tensors as values of `g`.
    pub fn declare(&self, g: &mut Graph) -> ParamVals {
        let all = g.at("params", Shape::rows(1, self.len), DType::F32, Region::Params, 0);
        let mut at = |p: &Param| {
            let v = g.at(&p.name, p.shape(), DType::F32, Region::Params, 4 * p.offset);
            (p.name.clone(), v)
        };
        let vals = self.list.iter().map(&mut at).collect();
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
            Some(g.at(&whole.name, whole.shape(), DType::F32, Region::Params, 4 * whole.offset))
        };
        let projections = projection("weight").zip(projection("bias"));
        ParamVals { all, vals, projections }
    }
}

/// The tensors of a model as values of a plan.
#[derive(Clone, Debug)]
pub struct ParamVals {
    /// The whole flat region.
    pub all: Val,
    vals: HashMap<String, Val>,
    /// Weights and biases of all time-embedding projections together.
    projections: Option<(Val, Val)>,
}

impl ParamVals {
    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Val {
        *self.vals.get(name).unwrap_or_else(|| panic!("the model has no tensor {name}"))
    }

    /// Weight and bias of the layer called `name`.
    fn pair(&self, name: &str) -> (Val, Val) {
        (self.get(&format!("{name}.weight")), self.get(&format!("{name}.bias")))
    }
}

/// What dropout needs to know of the run.
#[derive(Clone, Copy, Debug)]
pub struct DropoutRun {
    /// Probability of being dropped.
    pub p: f32,
    /// Position in the batch of the plan's first image.
    pub first_image: u32,
    /// The control block.
    pub control: Val,
}

/// The recorded network's values worth a name.
#[derive(Clone, Debug)]
pub struct Activations {
    /// The output, (n, h, w, out).
    pub out: Val,
    /// The embedding of time and label that the residual blocks project, (n, 4 base).
    pub emb: Val,
    /// After each input block.
    pub input: Vec<Val>,
    /// After the middle block.
    pub middle: Val,
    /// After each output block.
    pub output: Vec<Val>,
    /// Every layer between the embedding and the last norm, in order.
    layers: Vec<RecordedLayer>,
    projected: Val,
}

/// One layer as it was recorded.
#[derive(Clone, Debug)]
struct RecordedLayer {
    name: String,
    layer: Layer,
    x: Source,
    y: Val,
    steps: Range<usize>,
}

/// Appends the network: x (n, h, w, in), t (n) time values, labels (n) if class-conditional, to (n, h, w, out).
pub fn record(
    g: &mut Graph,
    config: &ModelConfig,
    params: &ParamVals,
    x: Source,
    t: Val,
    labels: Option<Val>,
    dropout: Option<DropoutRun>,
) -> Activations {
    assert_eq!(labels.is_some(), config.num_classes.is_some(), "labels are given iff the model has classes");
    let a = Architecture::new(config);
    let emb = time_embedding(g, config, params, t, labels);
    let projected = project(g, params, emb);
    let mut r = Recorder::new(g, params, projected, dropout);
    let mut input = Vec::new();
    for block in &a.input {
        input.push(r.block(block, input.last().map_or(x, |&h: &Val| h.into())));
    }
    let bottom = *input.last().expect("there is an input block");
    let middle = r.block(&a.middle, bottom.into());
    let mut output: Vec<Val> = Vec::new();
    for (block, &skip) in a.output.iter().zip(input.iter().rev()) {
        let h = output.last().copied().unwrap_or(middle);
        output.push(r.block(block, Source { a: h, b: Some(skip) }));
    }
    r.g.scope("out");
    let h = *output.last().expect("there is an output block");
    let h = r.norm("out.0", h.into(), NormOptions { silu: true, ..NormOptions::default() });
    let out = r.conv("out.2", h.into(), ConvOptions::default());
    Activations { out, emb, input, middle, output, layers: r.layers, projected }
}

/// Appends the gradients of the recorded `steps` of the network, computing the inside of each residual block anew instead
/// of keeping it from the forward pass: less memory, a third more work, the same bits.
pub fn backward_with_recompute(
    g: &mut Graph,
    params: &ParamVals,
    net: &Activations,
    dropout: Option<DropoutRun>,
    steps: Range<usize>,
    dout: Val,
) {
    let mut tape = Tape::new(g, &[]);
    tape.need(steps.clone());
    tape.start(net.out, dout);
    let mut end = steps.end;
    for l in net.layers.iter().rev() {
        tape.walk(l.steps.end..end);
        end = l.steps.start;
        let Layer::Res(block) = &l.layer else {
            tape.walk(l.steps.clone());
            continue;
        };
        let dy = tape.gradient(l.y).expect("every block leads to the output");
        let first = tape.g.steps.len();
        let g = &mut *tape.g;
        g.scope(l.name.as_str());
        let y = Recorder::new(g, params, net.projected, dropout).res_block(&l.name, block, l.x);
        let last = tape.g.steps.len();
        tape.need(first..last);
        tape.start(y, dy);
        tape.walk(first..last);
        // The block's last convolution made y, which is known; its gradient needs only its input.
        tape.g.steps.remove(last - 1);
    }
    tape.walk(steps.start..end);
}

/// The embedding of time and label, (n, 4 base).
fn time_embedding(g: &mut Graph, config: &ModelConfig, params: &ParamVals, t: Val, labels: Option<Val>) -> Val {
    g.scope("time_embed");
    let e = TimestepEmbedding::record(g, t, config.model_channels);
    let (w, b) = params.pair("time_embed.0");
    let e = Linear::record(g, e, w, b);
    let e = Silu::record(g, e);
    let (w, b) = params.pair("time_embed.2");
    let mut e = Linear::record(g, e, w, b);
    if let Some(labels) = labels {
        g.scope("label_emb");
        e = Embedding::record(g, e, params.get("label_emb.weight"), labels);
    }
    e
}

/// SiLU and every residual block's projection of the embedding `e` (n, emb).
pub fn project(g: &mut Graph, params: &ParamVals, e: Val) -> Val {
    g.scope("emb_layers");
    let e = Silu::record(g, e);
    let (w, b) = params.projections.expect("the model has residual blocks");
    Linear::record(g, e, w, b)
}

/// Appends layers; the blocks of the network are functions of it.
pub struct Recorder<'a> {
    /// The plan.
    pub g: &'a mut Graph,
    /// The tensors.
    pub params: &'a ParamVals,
    /// The projected time embedding, (n, columns).
    pub projected: Val,
    /// Dropout, in training.
    pub dropout: Option<DropoutRun>,
    layers: Vec<RecordedLayer>,
}

impl<'a> Recorder<'a> {
    /// A recorder of layers that read their columns of `projected`.
    pub fn new(g: &'a mut Graph, params: &'a ParamVals, projected: Val, dropout: Option<DropoutRun>) -> Self {
        Recorder { g, params, projected, dropout, layers: Vec::new() }
    }

    fn block(&mut self, block: &Block, mut x: Source) -> Val {
        for (i, layer) in block.layers.iter().enumerate() {
            let (name, first) = (format!("{}.{i}", block.name), self.g.steps.len());
            let y = self.layer(&name, layer, x);
            let steps = first..self.g.steps.len();
            self.layers.push(RecordedLayer { name, layer: layer.clone(), x, y, steps });
            x = y.into();
        }
        x.a
    }

    /// Appends the layer called `name`.
    pub fn layer(&mut self, name: &str, layer: &Layer, x: Source) -> Val {
        self.g.scope(name);
        match layer {
            Layer::Conv { .. } => self.conv(name, x, ConvOptions::default()),
            Layer::Res(b) => self.res_block(name, b, x),
            Layer::Attention { heads, .. } => self.attention(name, x.a, *heads),
            Layer::Downsample { conv: true, .. } => {
                self.conv(&format!("{name}.op"), x, ConvOptions { downsample: true, ..ConvOptions::default() })
            }
            Layer::Downsample { conv: false, .. } => AvgPool::record(self.g, x.a),
            Layer::Upsample { conv: true, .. } => {
                self.conv(&format!("{name}.conv"), x, ConvOptions { upsample: true, ..ConvOptions::default() })
            }
            Layer::Upsample { conv: false, .. } => Upsample::record(self.g, x.a),
        }
    }

    fn norm(&mut self, name: &str, x: Source, o: NormOptions) -> Val {
        let (gamma, beta) = self.params.pair(name);
        GroupNorm::record(self.g, x, gamma, beta, o)
    }

    fn conv(&mut self, name: &str, x: Source, o: ConvOptions) -> Val {
        let (w, b) = self.params.pair(name);
        Conv2d::record(self.g, x, w, Some(b), o)
    }

    fn res_block(&mut self, name: &str, b: &ResBlock, x: Source) -> Val {
        let columns = Some((self.projected, b.column));
        let h = self.norm(&format!("{name}.in_layers.0"), x, NormOptions { silu: true, ..NormOptions::default() });
        let shift = if b.scale_shift { None } else { columns };
        let h = self.conv(&format!("{name}.in_layers.2"), h.into(), ConvOptions { shift, ..ConvOptions::default() });
        let dropout = self.dropout.filter(|d| d.p > 0.0).map(|d| DropoutStep {
            p: d.p,
            op: rng::op::DROPOUT + b.number,
            first_image: d.first_image,
            control: d.control,
        });
        let scale_shift = if b.scale_shift { columns } else { None };
        let h = self.norm(&format!("{name}.out_layers.0"), h.into(), NormOptions { silu: true, scale_shift, dropout });
        let skip = if b.c == b.oc {
            assert!(x.b.is_none(), "{name}: a skip of two parts has a convolution");
            x.a
        } else {
            self.conv(&format!("{name}.skip_connection"), x, ConvOptions::default())
        };
        let o = ConvOptions { residual: Some(skip), ..ConvOptions::default() };
        self.conv(&format!("{name}.out_layers.3"), h.into(), o)
    }

    fn attention(&mut self, name: &str, x: Val, heads: usize) -> Val {
        let h = self.norm(&format!("{name}.norm"), x.into(), NormOptions::default());
        let qkv = self.conv(&format!("{name}.qkv"), h.into(), ConvOptions::default());
        let h = Attention::record(self.g, qkv, heads, QkvOrder::Legacy);
        let o = ConvOptions { residual: Some(x), ..ConvOptions::default() };
        self.conv(&format!("{name}.proj_out"), h.into(), o)
    }
}
