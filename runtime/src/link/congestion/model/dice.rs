//! Chance without a source of its own: it follows from the seed and from the times that the model was told. The same
//! inputs give the same outcome.

/// A small generator (splitmix64).
#[derive(Clone, Copy, Debug)]
pub(super) struct Dice(u64);

impl Dice {
    pub(super) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Lets a measurement take part, so that flows with the same seed go apart.
    pub(super) const fn stir(&mut self, value: u64) {
        self.0 ^= value.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    /// A number from 0 to 1.
    pub(super) fn roll(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}
