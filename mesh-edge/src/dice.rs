//! Chance, from one seed: a simulation with the same seed draws alike.

use std::sync::Arc;

use parking_lot::Mutex;
use rand::{RngExt, rngs::StdRng};

/// A source of randomness. Clones draw from the same one. Nothing secret is drawn from it.
#[derive(Clone)]
pub struct Dice(Arc<Mutex<StdRng>>);

impl std::fmt::Debug for Dice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Dice")
    }
}

impl Dice {
    /// Draws from this generator.
    #[must_use]
    pub fn new(rng: StdRng) -> Self {
        Self(Arc::new(Mutex::new(rng)))
    }

    /// Uniform in `[0, 1)`.
    #[must_use]
    pub fn fraction(&self) -> f64 {
        self.0.lock().random()
    }

    /// Any number.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.0.lock().random()
    }
}
