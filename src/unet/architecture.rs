//! The network of a configuration as data: blocks of layers, in the order of the reference's `UNetModel`.

use crate::config::ModelConfig;

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
