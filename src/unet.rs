//! The U-Net of the reference (`UNetModel`) as recorded steps.
//!
//! [`Architecture`] lists the blocks of a configuration, [`Params`] its tensors; [`record`] appends the forward steps. The
//! projections of the time embedding are one linear step: each residual block reads its own columns of the result.

pub mod architecture;
pub mod params;

pub use architecture::{Architecture, Block, Layer, ResBlock, Resample};
pub use params::{Init, Param, ParamVals, Params};

use crate::autograd::Tape;
use crate::config::ModelConfig;
use crate::graph::{Graph, Source, Val};
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
use std::ops::Range;

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
    variant: Variant,
}

/// What differs between relatives of the reference's network, for all layers alike.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Variant {
    /// Added to the variance in group norms.
    pub norm_eps: f32,
    /// The convolutions that halve an image have their padding behind it alone.
    pub pad_behind: bool,
}

impl Variant {
    /// That of `config`.
    pub fn of(config: &ModelConfig) -> Self {
        Variant { norm_eps: config.norm_eps as f32, pad_behind: config.downsample_padding == 0 }
    }
}

impl Default for Variant {
    fn default() -> Self {
        Variant::of(&ModelConfig::default())
    }
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
    let variant = Variant::of(config);
    let mut r = Recorder { variant, ..Recorder::new(g, params, projected, dropout) };
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
    let h = r.norm("out.0", h.into(), NormOptions { silu: true, ..r.norm_options() });
    let out = r.conv("out.2", h.into(), ConvOptions::default());
    Activations { out, emb, input, middle, output, layers: r.layers, projected, variant }
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
        let recorder = Recorder::new(g, params, net.projected, dropout);
        let y = Recorder { variant: net.variant, ..recorder }.res_block(&l.name, block, l.x);
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
    let e = TimestepEmbedding::record(g, t, config.model_channels, max_period(config));
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

/// Longest period of the time embedding: 10000^(-k / (half - shift)) is P^(-k / half) with P = 10000^(half / (half - shift)).
fn max_period(config: &ModelConfig) -> f32 {
    let half = (config.model_channels / 2) as f64;
    10_000f64.powf(half / (half - config.freq_shift)) as f32
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
    /// Differences from the reference's network.
    pub variant: Variant,
    layers: Vec<RecordedLayer>,
}

impl<'a> Recorder<'a> {
    /// A recorder of layers that read their columns of `projected`.
    pub fn new(g: &'a mut Graph, params: &'a ParamVals, projected: Val, dropout: Option<DropoutRun>) -> Self {
        Recorder { g, params, projected, dropout, variant: Variant::default(), layers: Vec::new() }
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
            Layer::Attention { heads, order, .. } => self.attention(name, x.a, *heads, *order),
            Layer::Downsample { conv: true, .. } => {
                let o = ConvOptions { downsample: true, pad_behind: self.variant.pad_behind, ..ConvOptions::default() };
                self.conv(&format!("{name}.op"), x, o)
            }
            Layer::Downsample { conv: false, .. } => AvgPool::record(self.g, x.a),
            Layer::Upsample { conv: true, .. } => {
                self.conv(&format!("{name}.conv"), x, ConvOptions { upsample: true, ..ConvOptions::default() })
            }
            Layer::Upsample { conv: false, .. } => Upsample::record(self.g, x.a),
        }
    }

    fn norm_options(&self) -> NormOptions {
        NormOptions { eps: self.variant.norm_eps, ..NormOptions::default() }
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
        let h = self.norm(&format!("{name}.in_layers.0"), x, NormOptions { silu: true, ..self.norm_options() });
        let shift = if b.scale_shift { None } else { columns };
        let h = if b.resample == Resample::Down { AvgPool::record(self.g, h) } else { h };
        let o = ConvOptions { shift, upsample: b.resample == Resample::Up, ..ConvOptions::default() };
        let h = self.conv(&format!("{name}.in_layers.2"), h.into(), o);
        let dropout = self.dropout.filter(|d| d.p > 0.0).map(|d| DropoutStep {
            p: d.p,
            op: rng::op::DROPOUT + b.number,
            first_image: d.first_image,
            control: d.control,
        });
        let scale_shift = if b.scale_shift { columns } else { None };
        let o = NormOptions { silu: true, scale_shift, dropout, ..self.norm_options() };
        let h = self.norm(&format!("{name}.out_layers.0"), h.into(), o);
        let skip = if b.c == b.oc {
            assert!(x.b.is_none(), "{name}: a skip of two parts has a convolution");
            match b.resample {
                Resample::Keep => x.a,
                Resample::Down => AvgPool::record(self.g, x.a),
                Resample::Up => Upsample::record(self.g, x.a),
            }
        } else {
            self.conv(&format!("{name}.skip_connection"), x, ConvOptions::default())
        };
        let o = ConvOptions { residual: Some(skip), ..ConvOptions::default() };
        self.conv(&format!("{name}.out_layers.3"), h.into(), o)
    }

    fn attention(&mut self, name: &str, x: Val, heads: usize, order: QkvOrder) -> Val {
        let h = self.norm(&format!("{name}.norm"), x.into(), self.norm_options());
        let qkv = self.conv(&format!("{name}.qkv"), h.into(), ConvOptions::default());
        let h = Attention::record(self.g, qkv, heads, order);
        let o = ConvOptions { residual: Some(x), ..ConvOptions::default() };
        self.conv(&format!("{name}.proj_out"), h.into(), o)
    }
}
