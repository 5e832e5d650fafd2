//! How often one network is answered over UDP, so that a forged address gets nobody flooded. Pure.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use tokio::time::Instant;

/// Networks that are remembered; when there are more, those that have been quiet are forgotten, and then all.
const REMEMBERED: usize = 16_384;

/// What is done with a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is answered.
    Answer,
    /// It is told to come over TCP, where addresses are not forged.
    ByTcp,
    /// Nothing.
    Drop,
}

/// A token bucket for each network: IPv4 by 24 bits, IPv6 by 56.
#[derive(Debug)]
pub(super) struct Limit {
    rate: f64,
    networks: HashMap<IpAddr, Bucket>,
}

#[derive(Debug)]
struct Bucket {
    tokens: f64,
    at: Instant,
    /// Of those who ask too often every second one is told so.
    slip: bool,
}

impl Limit {
    /// So many answers per second to one network; twice as many at once.
    pub(super) fn new(rate: f64) -> Self {
        Self { rate: rate.max(1.0), networks: HashMap::new() }
    }

    fn burst(&self) -> f64 {
        self.rate * 2.0
    }

    pub(super) fn judge(&mut self, from: IpAddr, now: Instant) -> Verdict {
        let (rate, burst) = (self.rate, self.burst());
        let refilled = |b: &Bucket| (b.tokens + now.duration_since(b.at).as_secs_f64() * rate).min(burst);
        let network = network(from);
        if self.networks.len() >= REMEMBERED && !self.networks.contains_key(&network) {
            self.networks.retain(|_, bucket| refilled(bucket) < burst);
            if self.networks.len() >= REMEMBERED {
                self.networks.clear();
            }
        }
        let bucket = self.networks.entry(network).or_insert(Bucket { tokens: burst, at: now, slip: false });
        (bucket.tokens, bucket.at) = (refilled(bucket), now);
        if bucket.tokens >= 1.0 {
            bucket.tokens -= 1.0;
            return Verdict::Answer;
        }
        bucket.slip = !bucket.slip;
        if bucket.slip { Verdict::ByTcp } else { Verdict::Drop }
    }
}

fn network(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V4(ip) => Ipv4Addr::from_bits(ip.to_bits() & 0xffff_ff00).into(),
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & !((1 << 72) - 1)).into(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_network_that_asks_too_often_takes_nothing_from_others() {
        let (mut limit, now) = (Limit::new(10.0), Instant::now());
        let (a, neighbour, b) =
            (IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 9]), IpAddr::from([198, 51, 100, 1]));
        for _ in 0..20 {
            assert_eq!(limit.judge(a, now), Verdict::Answer);
        }
        assert_eq!(limit.judge(neighbour, now), Verdict::ByTcp);
        assert_eq!(limit.judge(a, now), Verdict::Drop);
        assert_eq!(limit.judge(b, now), Verdict::Answer);
        let later = now + Duration::from_millis(100);
        assert_eq!((limit.judge(a, later), limit.judge(a, later)), (Verdict::Answer, Verdict::ByTcp));
        for i in 0..40_000u32 {
            limit.judge(Ipv4Addr::from_bits(i << 8).into(), later);
        }
        assert!(limit.networks.len() <= REMEMBERED);
    }
}
