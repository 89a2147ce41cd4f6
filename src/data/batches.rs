//! The order of a run: epoch e visits the images in the permutation of (seed, e); batches follow one another without a
//! gap, across the ends of epochs. The number of images drawn alone restores the place.

use crate::rng;

/// An endless walk through n images in batches.
#[derive(Clone, Debug)]
pub struct Batches {
    /// Images in the set.
    pub n: usize,
    /// Images per batch.
    pub batch: usize,
    /// Seed of the order.
    pub seed: u64,
    /// Images drawn so far.
    pub position: u64,
    epoch: Option<u64>,
    order: Vec<u32>,
    indices: Vec<u32>,
}

impl Batches {
    /// A walk that has already drawn `position` images; `Dataset::batches` checks the sizes.
    pub(super) fn new(n: usize, batch: usize, seed: u64, position: u64) -> Self {
        assert!(0 < batch && batch <= n && n <= u32::MAX as usize, "batches of {batch} from {n} images");
        Batches { n, batch, seed, position, epoch: None, order: Vec::new(), indices: vec![0; batch] }
    }

    /// Indices of the next batch. Allocates only when an epoch begins.
    #[allow(clippy::should_implement_trait, reason = "it lends its buffer, which Iterator cannot")]
    pub fn next(&mut self) -> &[u32] {
        for i in 0..self.batch {
            let epoch = self.position / self.n as u64;
            if self.epoch != Some(epoch) {
                self.order = rng::permutation(self.n, self.seed, epoch as u32);
                self.epoch = Some(epoch);
            }
            self.indices[i] = self.order[(self.position % self.n as u64) as usize];
            self.position += 1;
        }
        &self.indices
    }
}
