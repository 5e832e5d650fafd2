//! How many of the packets of a link are lost: for people, so in steps and for a while.

use std::time::Duration;

use tokio::time::Instant;

/// Packets after which a share is worth something.
const SAMPLE: u64 = 200;
/// For how long a loss is told after it has become less.
const REMEMBERED: Duration = Duration::from_secs(60);
/// Percentages that are told: one that wavers is no news.
const STEPS: [u32; 9] = [1, 2, 3, 5, 7, 10, 20, 30, 50];

/// The losses of one link. Pure.
#[derive(Debug, Default)]
pub(super) struct Losses {
    /// Packets sent and lost before the present sample.
    before: (u64, u64),
    /// What is told, and when it was last true.
    told: Option<(u32, Instant)>,
}

impl Losses {
    /// Takes note of how many packets were sent and lost in the life of the link. Returns how many of a hundred are lost.
    pub(super) fn percent(&mut self, (sent, lost): (u64, u64), now: Instant) -> u32 {
        let (sample, gone) = (sent.saturating_sub(self.before.0), lost.saturating_sub(self.before.1));
        if sample >= SAMPLE {
            self.before = (sent, lost);
            let step = STEPS.into_iter().rev().find(|step| gone * 200 >= sample * u64::from(step * 2 - 1)).unwrap_or(0);
            let stays = self.told.is_some_and(|(told, at)| told > step && now < at + REMEMBERED);
            if !stays {
                self.told = Some((step, now));
            }
        }
        self.told.map_or(0, |(told, _)| told)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_are_told_in_steps_and_for_a_minute() {
        let began = Instant::now();
        let at = |seconds| began + Duration::from_secs(seconds);
        let mut losses = Losses::default();
        assert_eq!(losses.percent((199, 50), at(0)), 0, "too few to say");
        assert_eq!(losses.percent((1000, 50), at(1)), 5);
        assert_eq!(losses.percent((2000, 96), at(2)), 5, "4.6 % are no news");
        assert_eq!(losses.percent((3000, 96), at(30)), 5, "not yet");
        assert_eq!(losses.percent((4000, 296), at(31)), 20);
        assert_eq!(losses.percent((5000, 296), at(92)), 0);
    }
}
