//! How many of the packets of a link are lost: for people, so in steps and for a while. What is lost because it was too
//! large does not count: the path is not lossy, but narrow.

use std::time::Duration;

use tokio::time::Instant;

/// Packets after which a share is worth something.
const SAMPLE: u64 = 100;
/// For how long a loss is told after it has become less.
const REMEMBERED: Duration = Duration::from_secs(60);
/// For how long after a change of the size of packets nothing is counted: those of the other size are still to be missed.
const SETTLES: Duration = Duration::from_secs(5);
/// Percentages that are told: one that wavers is no news.
const STEPS: [u32; 9] = [1, 2, 3, 5, 7, 10, 20, 30, 50];

/// The losses of one link. Pure.
#[derive(Debug, Default)]
pub(super) struct Losses {
    /// Packets sent and lost before the present sample.
    before: (u64, u64),
    /// What is told, and when it was last true.
    told: Option<(u32, Instant)>,
    /// The size of packets, and since when.
    size: Option<(u16, Instant)>,
}

impl Losses {
    /// Takes note of how many packets were sent and lost in the life of the link, and how large they may be. Returns how
    /// many of a hundred are lost.
    pub(super) fn percent(&mut self, (sent, lost): (u64, u64), mtu: u16, now: Instant) -> u32 {
        let (size, since) = self.size.filter(|(size, _)| *size == mtu).unwrap_or((mtu, now));
        let smaller = self.size.is_some_and(|(before, _)| mtu < before);
        self.size = Some((size, since));
        if smaller {
            self.told = None;
        }
        if now < since + SETTLES {
            self.before = (sent, lost);
            return self.told.map_or(0, |(told, _)| told);
        }
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
        let mut percent = |counts, seconds| losses.percent(counts, 1452, at(seconds));
        assert_eq!(percent((0, 0), 0), 0);
        assert_eq!(percent((99, 50), 10), 0, "too few to say");
        assert_eq!(percent((1000, 50), 11), 5);
        assert_eq!(percent((2000, 96), 12), 5, "4.6 % are no news");
        assert_eq!(percent((3000, 96), 40), 5, "not yet");
        assert_eq!(percent((4000, 296), 41), 20);
        assert_eq!(percent((5000, 296), 102), 0);
    }

    #[test]
    fn what_was_too_large_was_not_lost_by_chance() {
        let began = Instant::now();
        let at = |seconds| began + Duration::from_secs(seconds);
        let mut losses = Losses::default();
        losses.percent((0, 0), 1452, at(0));
        assert_eq!(losses.percent((1000, 200), 1452, at(10)), 20, "a black hole, not known as such");
        assert_eq!(losses.percent((1200, 300), 1200, at(14)), 0, "it is known now");
        assert_eq!(losses.percent((1500, 350), 1200, at(18)), 0, "those that were on their way");
        assert_eq!(losses.percent((2000, 350), 1200, at(22)), 0);
        assert_eq!(losses.percent((3000, 400), 1200, at(26)), 5, "small ones are lost as well");
    }
}
