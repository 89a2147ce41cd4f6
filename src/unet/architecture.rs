//! The network of a configuration as data: blocks of layers, in the order of the reference's `UNetModel`.

use crate::config::ModelConfig;
use crate::ops::attention::QkvOrder;

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
        /// Where each head finds its q, k and v.
        order: QkvOrder,
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

/// Change of size inside a residual block, before its first convolution and on its skip.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Resample {
    /// None.
    #[default]
    Keep,
    /// 2x2 mean.
    Down,
    /// Nearest neighbour, twice the size.
    Up,
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
    /// Change of size.
    pub resample: Resample,
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
        self.resampling(c, oc, Resample::Keep)
    }

    fn resampling(&mut self, c: usize, oc: usize, resample: Resample) -> Layer {
        let block = ResBlock {
            c,
            oc,
            emb: 4 * self.config.model_channels,
            scale_shift: self.config.use_scale_shift_norm,
            skip_kernel: 1,
            resample,
            column: self.columns,
            number: self.blocks,
        };
        self.columns += block.columns();
        self.blocks += 1;
        Layer::Res(block)
    }

    fn attention(&self, c: usize, heads: usize) -> Layer {
        let heads = self.config.num_head_channels.map_or(heads, |d| c / d);
        let order = if self.config.use_new_attention_order { QkvOrder::New } else { QkvOrder::Legacy };
        Layer::Attention { c, heads, order }
    }

    fn attention_at(&self, factor: usize, c: usize, heads: usize) -> Option<Layer> {
        self.config.attention_resolutions.contains(&factor).then(|| self.attention(c, heads))
    }

    fn downsample(&mut self, c: usize) -> Layer {
        match self.config.resblock_updown {
            true => self.resampling(c, c, Resample::Down),
            false => Layer::Downsample { c, conv: self.config.conv_resample },
        }
    }

    fn upsample(&mut self, c: usize) -> Layer {
        match self.config.resblock_updown {
            true => self.resampling(c, c, Resample::Up),
            false => Layer::Upsample { c, conv: self.config.conv_resample },
        }
    }
}

impl Architecture {
    /// The blocks of `config`, in the reference's order.
    pub fn new(config: &ModelConfig) -> Self {
        let mut b = Builder { config, columns: 0, blocks: 0 };
        let base = config.model_channels;
        let levels = config.channel_mult.len();
        let mut input = vec![vec![Layer::Conv { c: config.input_channels(), oc: base }]];
        let (mut kept, mut c, mut factor) = (vec![base], base, 1);
        for (level, mult) in config.channel_mult.iter().enumerate() {
            for _ in 0..config.num_res_blocks {
                let mut layers = vec![b.res(c, mult * base)];
                c = mult * base;
                layers.extend(b.attention_at(factor, c, config.num_heads));
                input.push(layers);
                kept.push(c);
            }
            if level + 1 < levels {
                input.push(vec![b.downsample(c)]);
                kept.push(c);
                factor *= 2;
            }
        }
        let middle = vec![b.res(c, c), b.attention(c, config.num_heads), b.res(c, c)];
        let mut output = Vec::new();
        for (level, mult) in config.channel_mult.iter().enumerate().rev() {
            for i in 0..=config.num_res_blocks {
                let skip = kept.pop().expect("as many outputs as inputs");
                let mut layers = vec![b.res(c + skip, mult * base)];
                c = mult * base;
                layers.extend(b.attention_at(factor, c, config.num_heads_upsample));
                if level > 0 && i == config.num_res_blocks {
                    layers.push(b.upsample(c));
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
