//! At most 256 colours for all frames of an animation: the set of colours that deviates most from its mean in one
//! channel is cut in two there, until there are 256 sets; each becomes its mean colour.
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
        let sets = cut(used, &bins);
        for (place, members) in sets.iter().enumerate() {
            members.iter().for_each(|b| places[*b] = place as u8);
        }
        Palette { colours: sets.iter().map(|members| mean(members, &bins)).collect(), places }
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

/// Where a set of colours is cut: the channel in which it deviates most, its mean there and the sum of the squared
/// deviations.
#[derive(Clone, Copy)]
struct Cut {
    channel: usize,
    mean: f64,
    squares: f64,
}

impl Cut {
    fn of(members: &[usize], bins: &[Bin]) -> Self {
        let weighted = |f: &dyn Fn(usize) -> f64| members.iter().map(|b| bins[*b].count as f64 * f(*b)).sum::<f64>();
        let pixels = weighted(&|_| 1.0);
        let along = |channel: usize| {
            let mean = weighted(&|b| level(b, channel) as f64) / pixels;
            Cut { channel, mean, squares: weighted(&|b| (level(b, channel) as f64 - mean).powi(2)) }
        };
        let [red, green, blue] = [0, 1, 2].map(along);
        [green, blue].into_iter().fold(red, |most, cut| if cut.squares > most.squares { cut } else { most })
    }
}

/// Cuts the bins `used` into sets.
fn cut(used: Vec<usize>, bins: &[Bin]) -> Vec<Vec<usize>> {
    let mut sets = vec![(Cut::of(&used, bins), used)];
    while sets.len() < COLOURS {
        let by_squares = |a: &usize, b: &usize| sets[*a].0.squares.total_cmp(&sets[*b].0.squares);
        // One bin cannot be cut.
        let Some(at) = (0..sets.len()).filter(|i| sets[*i].1.len() > 1).max_by(by_squares) else { break };
        let (cut, members) = sets.swap_remove(at);
        let (low, high): (Vec<_>, Vec<_>) =
            members.into_iter().partition(|b| level(*b, cut.channel) as f64 <= cut.mean);
        sets.extend([low, high].map(|members| (Cut::of(&members, bins), members)));
    }
    sets.into_iter().map(|(_, members)| members).collect()
}

fn mean(members: &[usize], bins: &[Bin]) -> [u8; 3] {
    let count: u64 = members.iter().map(|b| bins[*b].count).sum();
    [0, 1, 2].map(|c| ((members.iter().map(|b| bins[*b].sum[c]).sum::<u64>() + count / 2) / count.max(1)) as u8)
}
