//! The words of an order to the link emulator: `both delay=100ms loss=5% burst=3 rate=20mbit queue=1bdp`.

use std::str::FromStr;

use loadtest::bottleneck::{Conditions, MILLI, SECOND};

/// Which direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// What is sent into device a.
    A,
    /// What is sent into device b.
    B,
    /// Both.
    Both,
}

/// What somebody wants.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Order {
    /// To know what was counted.
    Stats,
    /// Everything counted from nothing again.
    Forget,
    /// Another link.
    Change(Side, Change),
}

/// What to change.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Change {
    clear: bool,
    words: Vec<(String, String)>,
}

impl FromStr for Order {
    type Err = String;

    fn from_str(order: &str) -> Result<Self, String> {
        let mut words = order.split_ascii_whitespace();
        let side = match words.next().ok_or("an empty order")? {
            "stats" => return Ok(Self::Stats),
            "forget" => return Ok(Self::Forget),
            "a" => Side::A,
            "b" => Side::B,
            "both" => Side::Both,
            other => return Err(format!("{other:?} is neither stats, forget, a, b nor both")),
        };
        let mut change = Change { clear: false, words: Vec::new() };
        for word in words {
            match word.split_once('=') {
                Some((name, value)) => change.words.push((name.into(), value.into())),
                None if word == "clear" => change.clear = true,
                None => return Err(format!("{word:?} is neither clear nor NAME=VALUE")),
            }
        }
        // What is wrong is said whatever the link is like.
        change.applied(Conditions::default())?;
        Ok(Self::Change(side, change))
    }
}

impl Change {
    /// What a link is like after it that was so before. A queue in bandwidth-delay products counts with the rate and
    /// the delay that hold then, and a round trip of twice the delay.
    pub(super) fn applied(&self, before: Conditions) -> Result<Conditions, String> {
        let mut next = if self.clear { Conditions::default() } else { before };
        let mut products = None;
        for (name, value) in &self.words {
            let bad = || format!("{name}={value}: not understood");
            match name.as_str() {
                "delay" => next.delay = time(value).ok_or_else(bad)?,
                "jitter" => next.jitter = time(value).ok_or_else(bad)?,
                "loss" => next.loss = share(value).ok_or_else(bad)?,
                "burst" => next.burst = number(value).filter(|burst| *burst >= 1.0).ok_or_else(bad)?,
                "rate" => next.rate = rate(value).ok_or_else(bad)?,
                "queue" => match value.strip_suffix("bdp") {
                    Some(count) => products = Some(number(count).ok_or_else(bad)?),
                    None => next.queue = size(value).ok_or_else(bad)?,
                },
                "reorder" => {
                    let (part, by) = value.split_once(',').ok_or_else(bad)?;
                    next.reorder = (share(part).ok_or_else(bad)?, time(by).ok_or_else(bad)?);
                }
                "policer" if value == "none" => next.policer = None,
                "policer" => {
                    let (bits, burst) = value.split_once(',').ok_or_else(bad)?;
                    next.policer = Some((rate(bits).ok_or_else(bad)?, bytes(size(burst).ok_or_else(bad)?)));
                }
                "mtu" if value == "none" => next.mtu = u64::MAX,
                "mtu" => next.mtu = size(value).ok_or_else(bad)?,
                _ => return Err(format!("{name:?} is nothing that a link has")),
            }
        }
        if let Some(products) = products {
            next.queue = product(next, products)?;
        }
        Ok(next)
    }
}

#[allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "sizes of queues"
)]
fn product(link: Conditions, products: f64) -> Result<u64, String> {
    if !link.rate.is_finite() {
        return Err("a queue in bandwidth-delay products takes a rate".into());
    }
    Ok((link.rate / 8.0 * (2 * link.delay) as f64 / SECOND as f64 * products) as u64)
}

#[allow(clippy::cast_precision_loss, reason = "the burst of a policer")]
fn bytes(size: u64) -> f64 {
    size as f64
}

fn number(text: &str) -> Option<f64> {
    text.parse().ok().filter(|n: &f64| n.is_finite() && (0.0..=1e12).contains(n))
}

/// `20ms`, `1.5s`, `300us`, in nanoseconds.
#[allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "at most an hour"
)]
fn time(text: &str) -> Option<u64> {
    let (text, unit) = if let Some(ms) = text.strip_suffix("ms") {
        (ms, MILLI)
    } else if let Some(us) = text.strip_suffix("us") {
        (us, MILLI / 1000)
    } else {
        (text.strip_suffix('s')?, SECOND)
    };
    let nanos = number(text)? * unit as f64;
    (nanos <= 3600.0 * SECOND as f64).then_some(nanos as u64)
}

/// `5%`, `0.05`.
fn share(text: &str) -> Option<f64> {
    let share = match text.strip_suffix('%') {
        Some(percent) => number(percent)? / 100.0,
        None => number(text)?,
    };
    (share <= 1.0).then_some(share)
}

/// `20mbit`, `500kbit`, `none`, in bits per second.
fn rate(text: &str) -> Option<f64> {
    if text == "none" {
        return Some(f64::INFINITY);
    }
    let (text, unit) = match (text.strip_suffix("mbit"), text.strip_suffix("kbit")) {
        (Some(mbit), _) => (mbit, 1e6),
        (None, Some(kbit)) => (kbit, 1e3),
        (None, None) => return None,
    };
    number(text).filter(|rate| *rate > 0.0).map(|rate| rate * unit)
}

/// `64kb`, `1mb`, `1280`, in bytes.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most a terabyte")]
fn size(text: &str) -> Option<u64> {
    let (text, unit) = match (text.strip_suffix("kb"), text.strip_suffix("mb")) {
        (Some(kb), _) => (kb, 1e3),
        (None, Some(mb)) => (mb, 1e6),
        (None, None) => (text, 1.0),
    };
    Some((number(text)? * unit) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(order: &str) -> Result<Conditions, String> {
        match order.parse()? {
            Order::Change(_, change) => change.applied(Conditions::default()),
            Order::Stats | Order::Forget => Err("no change".into()),
        }
    }

    #[test]
    fn an_order_says_what_the_link_is_like() {
        let link =
            after("both delay=100ms jitter=300us loss=5% burst=3 rate=20mbit queue=1bdp reorder=0.01,5ms").unwrap();
        let wanted = Conditions {
            rate: 20e6,
            delay: 100 * MILLI,
            jitter: 300_000,
            queue: 500_000,
            loss: 0.05,
            burst: 3.0,
            reorder: (0.01, 5 * MILLI),
            ..Conditions::default()
        };
        assert_eq!(link, wanted);
        assert_eq!(after("a policer=2mbit,64kb mtu=1280 queue=1mb").unwrap().policer, Some((2e6, 64e3)));
        assert_eq!(after("b rate=5mbit clear").unwrap(), Conditions { rate: 5e6, ..Conditions::default() });
        assert_eq!("stats".parse(), Ok(Order::Stats));
        assert_eq!("forget".parse(), Ok(Order::Forget));
    }

    #[test]
    fn what_is_not_understood_changes_nothing() {
        for wrong in [
            "",
            "c delay=1ms",
            "a delay",
            "a delay=1",
            "a loss=101%",
            "a loss=-1",
            "a rate=0mbit",
            "a rate=5",
            "a burst=0",
            "a speed=1",
            "a queue=1bdp",
            "a policer=1mbit",
            "a mtu=x",
            "a delay=1e99s",
            "a loss=NaN",
            "a reorder=1",
        ] {
            assert!(after(wrong).is_err(), "{wrong}");
        }
    }
}
