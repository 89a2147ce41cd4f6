//! The memory planner: liveness of each arena value gives it an offset in one arena.
//!
//! A value lives from the first step that writes it to the last that touches it. Largest first, each takes the
//! lowest offset that no value alive at the same time occupies (greedy by size). With `reuse` off every value
//! has bytes of its own; results are the same to the bit.

use crate::graph::{ALIGN, Graph, Place, Target};
use crate::ops::Operation;

/// Where everything of a plan lies in its arena.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Byte offset of each value (of no meaning for fixed values).
    pub offsets: Vec<usize>,
    /// Byte offset of each step's scratch space, which only the processor has in the arena.
    pub scratch: Vec<usize>,
    /// Bytes of the arena.
    pub bytes: usize,
}

struct Block {
    first: usize,
    last: usize,
    bytes: usize,
    offset: usize,
}

/// Plans the arena of `g`.
pub fn plan(g: &Graph, reuse: bool) -> Layout {
    let mut blocks = lifetimes(g);
    let mut order: Vec<usize> = (0..blocks.len()).filter(|&i| blocks[i].bytes > 0).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(blocks[i].bytes), i));
    let mut placed: Vec<usize> = Vec::with_capacity(order.len());
    let mut bytes = 0;
    for i in order {
        let offset = if reuse { lowest_gap(&blocks, &placed, i) } else { bytes };
        blocks[i].offset = offset;
        bytes = bytes.max(offset + blocks[i].bytes);
        let at = placed.partition_point(|&j| blocks[j].offset <= offset);
        placed.insert(at, i);
    }
    let values = g.values.len();
    Layout {
        offsets: blocks[..values].iter().map(|b| b.offset).collect(),
        scratch: blocks[values..].iter().map(|b| b.offset).collect(),
        bytes,
    }
}

/// One block per value, then one per step for its scratch space; unused ones have no bytes.
fn lifetimes(g: &Graph) -> Vec<Block> {
    let empty = || Block { first: usize::MAX, last: 0, bytes: 0, offset: 0 };
    let mut blocks: Vec<Block> = std::iter::repeat_with(empty).take(g.values.len()).collect();
    for (i, step) in g.steps.iter().enumerate() {
        for v in step.op.outputs().into_iter().chain(step.op.inputs()) {
            if g[v].place == Place::Arena {
                let b = &mut blocks[v.index()];
                b.first = b.first.min(i);
                b.last = if g[v].keep { g.steps.len() } else { b.last.max(i) };
                b.bytes = g[v].bytes().next_multiple_of(ALIGN);
            }
        }
    }
    for (i, step) in g.steps.iter().enumerate() {
        let scratch = if g.target == Target::Cpu { step.op.scratch(g) } else { 0 };
        let bytes = (scratch * 4).next_multiple_of(ALIGN);
        blocks.push(Block { first: i, last: i, bytes, offset: 0 });
    }
    blocks
}

/// Lowest offset at which block `i` meets no placed block that is alive at the same time; `placed` is sorted by offset.
fn lowest_gap(blocks: &[Block], placed: &[usize], i: usize) -> usize {
    let b = &blocks[i];
    let mut offset = 0;
    for p in placed.iter().map(|&j| &blocks[j]) {
        if p.last < b.first || b.last < p.first {
            continue;
        }
        if offset + b.bytes <= p.offset {
            break;
        }
        offset = offset.max(p.offset + p.bytes);
    }
    offset
}
