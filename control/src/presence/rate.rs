//! How fast a counter of a shard grows, from reports that come every two seconds or less often. Pure.

use std::time::Duration;

use tokio::time::Instant;

/// What a rate is the mean of. Long enough that one missed report shows little, short enough for a scaler that looks every
/// fifteen seconds.
const WINDOW: Duration = Duration::from_secs(10);

/// A counter of one process, and how fast it grew.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Rate {
    /// When the window began, and where the counter stood; what it counted before it was first told is not known.
    begun: Option<(Instant, u64)>,
    last: u64,
    per_second: f64,
}

impl Rate {
    /// The counter stands here now. One that went back belongs to a new process, which began at 0.
    #[allow(clippy::cast_precision_loss, reason = "a rate need not be exact")]
    pub(super) fn note(&mut self, count: u64, now: Instant) {
        let Some((since, from)) = self.begun.filter(|_| count >= self.last) else {
            *self = Self { begun: Some((now, count)), last: count, per_second: 0.0 };
            return;
        };
        self.last = count;
        let took = now.saturating_duration_since(since);
        if took >= WINDOW {
            self.per_second = (count - from) as f64 / took.as_secs_f64();
            self.begun = Some((now, count));
        }
    }

    /// Mean growth of the last whole window; 0 before there is one.
    pub(super) const fn per_second(&self) -> f64 {
        self.per_second
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_the_mean_of_a_window_and_forgets_what_was_before() {
        let start = Instant::now();
        let at = |secs| start + Duration::from_secs(secs);
        let mut rate = Rate::default();
        rate.note(1_000_000, start);
        for second in (2..=10).step_by(2) {
            assert!(rate.per_second().abs() < 1e-9, "not yet");
            rate.note(1_000_000 + second * 300, at(second));
        }
        assert!((rate.per_second() - 300.0).abs() < 1e-9, "{rate:?}");
        rate.note(1_003_000, at(20));
        assert!(rate.per_second().abs() < 1e-9, "it stands still");
        rate.note(7, at(22));
        rate.note(1_007, at(32));
        assert!((rate.per_second() - 100.0).abs() < 1e-9, "a new process: {rate:?}");
    }
}
