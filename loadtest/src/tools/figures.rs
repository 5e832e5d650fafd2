//! What was measured, in words that scripts can take apart: `p50_ms=0.31 p99_ms=1.20 max_ms=4.00`.

use std::{fmt, time::Duration};

/// Times of many events.
#[derive(Debug, Default)]
pub(crate) struct Times(Vec<Duration>);

impl Times {
    /// Adds one.
    pub(crate) fn add(&mut self, time: Duration) {
        self.0.push(time);
    }

    /// Adds all of another.
    pub(crate) fn merge(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// How many.
    pub(crate) const fn len(&self) -> usize {
        self.0.len()
    }

    /// The time in milliseconds that so many of a thousand are not above; `None` if there is none at all.
    pub(crate) fn per_mille_ms(&self, q: usize) -> Option<f64> {
        let times = self.ordered();
        let at = times.get((times.len() * q / 1000).min(times.len().saturating_sub(1)))?;
        Some(at.as_secs_f64() * 1e3)
    }

    /// How its 99th percentile compares with that of other times; NaN if there are none.
    pub(crate) fn p99_over(&self, other: &Self) -> f64 {
        let p99 = |times: &Self| times.per_mille_ms(990).unwrap_or(f64::NAN);
        p99(self) / p99(other)
    }

    fn ordered(&self) -> Vec<Duration> {
        let mut times = self.0.clone();
        times.sort_unstable();
        times
    }
}

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let times = self.ordered();
        let at = |q: usize| times.get((times.len() * q / 1000).min(times.len().saturating_sub(1)));
        let ms = |time: Option<&Duration>| time.map_or(f64::NAN, |t| t.as_secs_f64() * 1e3);
        let (p50, p99, max) = (ms(at(500)), ms(at(990)), ms(times.last()));
        write!(f, "count={} p50_ms={p50:.2} p99_ms={p99:.2} max_ms={max:.2}", times.len())
    }
}

/// Bytes over a time, in MB/s.
pub(crate) fn rate(bytes: u64, time: Duration) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "a figure for people")]
    let bytes = bytes as f64;
    bytes / 1e6 / time.as_secs_f64().max(1e-9)
}

/// Hexadecimal, lower case.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_the_sorted_times() {
        let mut times = Times::default();
        for ms in (1..=100).rev() {
            times.add(Duration::from_millis(ms));
        }
        assert_eq!(times.to_string(), "count=100 p50_ms=51.00 p99_ms=100.00 max_ms=100.00");
        assert_eq!(Times::default().to_string(), "count=0 p50_ms=NaN p99_ms=NaN max_ms=NaN");
    }
}
