//! Very many times in little room.

/// Each class is so much longer than the one before.
const STEP: f64 = 1.05;
/// Classes; the last one begins above an hour of microseconds.
const CLASSES: usize = 460;

/// How often a time was how long, to 5 %.
#[derive(Clone, Debug, Default)]
pub struct Delays {
    classes: Vec<u64>,
    count: u64,
}

#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "times to 5 %")]
impl Delays {
    /// Adds a time in nanoseconds.
    pub fn add(&mut self, nanos: u64) {
        if self.classes.is_empty() {
            self.classes = vec![0; CLASSES];
        }
        let class = (nanos as f64 / 1e3 + 1.0).log(STEP) as usize;
        self.classes[class.min(CLASSES - 1)] += 1;
        self.count += 1;
    }

    /// The time in milliseconds that this share of all was not above, to 5 %; 0 if there is none.
    #[must_use]
    pub fn share_ms(&self, share: f64) -> f64 {
        let wanted = (self.count as f64 * share).ceil() as u64;
        let mut seen = 0;
        for (class, count) in self.classes.iter().enumerate() {
            seen += count;
            if seen >= wanted && seen > 0 {
                return (STEP.powi(class as i32) - 1.0) / 1e3;
            }
        }
        0.0
    }
}
