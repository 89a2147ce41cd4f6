//! At most 256 colours for all frames of an animation, by median cut: the box of colours with the most pixels times its
//! longest side is cut in two halves of equally many pixels, until there are 256; each becomes its mean colour.
//!
//! Colours are counted with 6 bits per channel. Grey frames keep every level.

/// Bits of a channel by which colours are told apart.
const BITS: usize = 6;
/// Colours of a GIF.
const COLOURS: usize = 256;

/// Colours, and which of them stands for each colour of the pixels.
pub struct Palette {
    colours: Vec<[u8; 3]>,
    /// Place in `colours` by bin; empty for grey frames, whose level is the place.
    places: Vec<u8>,
}

/// Pixels of nearly the same colour.
#[derive(Clone, Copy, Default)]
struct Bin {
    count: u64,
    sum: [u64; 3],
}

/// The bin of a colour.
fn bin(rgb: &[u8]) -> usize {
    rgb.iter().fold(0, |bin, x| bin << BITS | usize::from(*x) >> (8 - BITS))
}

/// The channel `channel` of the colours of a bin.
fn level(bin: usize, channel: usize) -> usize {
    bin >> ((2 - channel) * BITS) & ((1 << BITS) - 1)
}

impl Palette {
    /// The palette of frames with `c` channels.
    pub fn of<'a>(frames: impl Iterator<Item = &'a [u8]>, c: usize) -> Self {
        if c == 1 {
            return Palette { colours: (0..=255).map(|x| [x; 3]).collect(), places: Vec::new() };
        }
        let mut bins = vec![Bin::default(); 1 << (3 * BITS)];
        for pixel in frames.flat_map(|f| f.chunks_exact(3)) {
            let bin = &mut bins[bin(pixel)];
            bin.count += 1;
            bin.sum.iter_mut().zip(pixel).for_each(|(s, x)| *s += u64::from(*x));
        }
        let used = (0..bins.len()).filter(|b| bins[*b].count > 0).collect();
        let mut places = vec![0; bins.len()];
        let boxes = cut(used, &bins);
        for (place, members) in boxes.iter().enumerate() {
            members.iter().for_each(|b| places[*b] = place as u8);
        }
        Palette { colours: boxes.iter().map(|members| mean(members, &bins)).collect(), places }
    }

    /// The colours, red, green, blue.
    pub fn colours(&self) -> Vec<u8> {
        self.colours.concat()
    }

    /// The frame as places in the palette.
    pub fn indices(&self, frame: &[u8], c: usize) -> Vec<u8> {
        if c == 1 { frame.to_vec() } else { frame.chunks_exact(3).map(|p| self.places[bin(p)]).collect() }
    }
}

/// Cuts the bins `used` into boxes.
fn cut(used: Vec<usize>, bins: &[Bin]) -> Vec<Vec<usize>> {
    let pixels = |members: &[usize]| members.iter().map(|b| bins[*b].count).sum::<u64>();
    let mut boxes = vec![(urgency(&used, pixels(&used)), used)];
    while boxes.len() < COLOURS {
        let Some(at) = (0..boxes.len()).max_by_key(|i| boxes[*i].0.0).filter(|i| boxes[*i].0.0 > 0) else { break };
        let ((_, channel), mut members) = boxes.swap_remove(at);
        members.sort_by_key(|b| level(*b, channel));
        let (half, mut seen) = (pixels(&members) / 2, 0);
        let middle = members.iter().position(|b| {
            seen += bins[*b].count;
            seen > half
        });
        let rest = members.split_off(middle.unwrap_or(0).clamp(1, members.len() - 1));
        boxes.extend([members, rest].map(|m| (urgency(&m, pixels(&m)), m)));
    }
    boxes.into_iter().map(|(_, members)| members).collect()
}

/// How much a box should be cut, 0 if it cannot be, and along which channel.
fn urgency(members: &[usize], pixels: u64) -> (u64, usize) {
    let side = |channel: usize| {
        let levels = || members.iter().map(|b| level(*b, channel));
        levels().max().unwrap_or(0) - levels().min().unwrap_or(0)
    };
    let longest = (0..3).max_by_key(|c| side(*c)).unwrap_or(0);
    (pixels * side(longest) as u64, longest)
}

fn mean(members: &[usize], bins: &[Bin]) -> [u8; 3] {
    let count: u64 = members.iter().map(|b| bins[*b].count).sum();
    [0, 1, 2].map(|c| ((members.iter().map(|b| bins[*b].sum[c]).sum::<u64>() + count / 2) / count.max(1)) as u8)
}
