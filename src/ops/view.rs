//! Views that ops share: a tensor in two pieces, and a block of columns of a matrix.

/// A tensor (pixels, ca + cb) that is the channel concatenation of two; the concatenation is never written.
///
/// A single tensor has `b` empty and `cb = 0`.
#[derive(Clone, Copy, Debug)]
pub struct Cat<'a> {
    /// First source, (pixels, ca).
    pub a: &'a [f32],
    /// Channels of `a`.
    pub ca: usize,
    /// Second source, (pixels, cb).
    pub b: &'a [f32],
    /// Channels of `b`; 0 if there is one source.
    pub cb: usize,
}

impl<'a> Cat<'a> {
    /// A tensor in one piece.
    pub fn single(a: &'a [f32], ca: usize) -> Self {
        Cat { a, ca, b: &[], cb: 0 }
    }

    /// Channels of both sources.
    pub fn c(&self) -> usize {
        self.ca + self.cb
    }

    /// Where channel `c` of pixel `pixel` is: source 0 or 1, and index in it.
    pub fn place(&self, pixel: usize, c: usize) -> (usize, usize) {
        if c < self.ca { (0, pixel * self.ca + c) } else { (1, pixel * self.cb + c - self.ca) }
    }

    /// Channel `c` of pixel `pixel`.
    pub fn at(&self, pixel: usize, c: usize) -> f32 {
        let (source, at) = self.place(pixel, c);
        [self.a, self.b][source][at]
    }

    /// Panics, in the name of `op`, unless both sources hold exactly `pixels` pixels.
    pub fn check(&self, pixels: usize, op: &str) {
        assert_eq!(self.a.len(), pixels * self.ca, "{op}: length of the first source");
        assert_eq!(self.b.len(), pixels * self.cb, "{op}: length of the second source");
    }
}

/// One row of values per image: columns from `col` on of a matrix with rows of `stride` values.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// The whole matrix.
    pub data: &'a [f32],
    /// Values from one row to the next.
    pub stride: usize,
    /// First column of the block.
    pub col: usize,
}

impl<'a> Rows<'a> {
    /// The first `len` values of row `n`.
    pub fn row(&self, n: usize, len: usize) -> &'a [f32] {
        &self.data[n * self.stride + self.col..][..len]
    }
}

/// As [`Rows`], to be written.
#[derive(Debug)]
pub struct RowsMut<'a> {
    /// The whole matrix.
    pub data: &'a mut [f32],
    /// Values from one row to the next.
    pub stride: usize,
    /// First column of the block.
    pub col: usize,
}

impl RowsMut<'_> {
    /// The first `len` values of row `n`.
    pub fn row(&mut self, n: usize, len: usize) -> &mut [f32] {
        &mut self.data[n * self.stride + self.col..][..len]
    }
}
