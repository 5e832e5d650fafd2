//! The wall clock. Certificates and records need it; everything that waits uses tokio's clock, which tests can steer.

use std::{
    cell::Cell,
    marker::PhantomData,
    time::{SystemTime, UNIX_EPOCH},
};

use tokio::time::Instant;

thread_local! {
    static STEERED: Cell<Option<(u64, Instant)>> = const { Cell::new(None) };
}

/// Seconds since 1970.
#[must_use]
pub fn unix_now() -> i64 {
    i64::try_from(unix_millis() / 1000).unwrap_or(i64::MAX)
}

/// Milliseconds since 1970; 0 on a clock that stands before it.
#[must_use]
#[allow(clippy::disallowed_methods, reason = "this is the one place that reads the wall clock")]
pub fn unix_millis() -> u64 {
    if let Some((at, set)) = STEERED.get() {
        return at.saturating_add(u64::try_from(set.elapsed().as_millis()).unwrap_or(u64::MAX));
    }
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// The wall clock of this thread in the hands of a simulation, which would else see its hours pass in a real second.
/// It goes as tokio's clock does, and is the system's again once this is dropped.
#[derive(Debug)]
pub struct SteeredClock(PhantomData<*const ()>);

impl SteeredClock {
    /// Sets this thread's clock, now.
    #[must_use]
    pub fn set(unix_millis: u64) -> Self {
        STEERED.set(Some((unix_millis, Instant::now())));
        Self(PhantomData)
    }

    /// Sets it forward or back, as a time server may do with a clock that was wrong.
    pub fn jump(&self, millis: i64) {
        STEERED.set(Some((unix_millis().saturating_add_signed(millis), Instant::now())));
    }
}

impl Drop for SteeredClock {
    fn drop(&mut self) {
        STEERED.set(None);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_steered_clock_goes_with_tokio_and_jumps_alone() {
        let clock = SteeredClock::set(1_000_000);
        let begun = Instant::now();
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!((unix_millis(), unix_now()), (1_005_000, 1005));
        clock.jump(-1_000_000);
        assert_eq!((unix_millis(), begun.elapsed().as_secs()), (5_000, 5));
        clock.jump(-60_000);
        assert_eq!(unix_millis(), 0, "a clock before 1970 shows 1970");
        drop(clock);
        assert!(unix_now() > 1_700_000_000);
    }
}
