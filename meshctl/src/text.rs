//! Times as people write and read them.

use std::time::Duration;

const MINUTE: u64 = 60;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

/// A span in one unit, rounded down: `45s`, `3m`, `5h`, `2d`.
pub(crate) fn span(span: Duration) -> String {
    match span.as_secs() {
        s if s < 2 * MINUTE => format!("{s}s"),
        s if s < 2 * HOUR => format!("{}m", s / MINUTE),
        s if s < 2 * DAY => format!("{}h", s / HOUR),
        s => format!("{}d", s / DAY),
    }
}

/// How long ago a moment was, in seconds since 1970; a moment to come is `0s` ago.
pub(crate) fn age(then: i64, now: i64) -> String {
    span(Duration::from_secs(u64::try_from(now.saturating_sub(then)).unwrap_or(0)))
}

/// How long until a moment, or that it is over.
pub(crate) fn until(then: i64, now: i64) -> String {
    match u64::try_from(then.saturating_sub(now)) {
        Ok(left @ 1..) => format!("in {}", span(Duration::from_secs(left))),
        Ok(0) | Err(_) => "over".to_owned(),
    }
}

/// Milliseconds with as many digits as matter.
pub(crate) fn millis(span: Duration) -> String {
    let ms = span.as_secs_f64() * 1000.0;
    if ms < 10.0 { format!("{ms:.2} ms") } else { format!("{ms:.1} ms") }
}

/// A part of a whole, from 0 to 1: `33.3 %`.
pub(crate) fn percent(part: f64) -> String {
    format!("{:.1} %", part * 100.0)
}

/// Reads a span: a number with `s`, `m`, `h` or `d` behind it.
///
/// # Errors
/// A sentence, if it is none.
pub(crate) fn parse_span(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no span of time; write 90s, 30m, 12h or 7d");
    let unit = match text.chars().last() {
        Some('s') => 1,
        Some('m') => MINUTE,
        Some('h') => HOUR,
        Some('d') => DAY,
        Some(_) | None => return Err(wrong()),
    };
    let digits = &text[..text.len() - 1];
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(wrong());
    }
    let count: u64 = digits.parse().map_err(|_| wrong())?;
    let seconds = count.checked_mul(unit).filter(|&s| s > 0 && s <= u64::from(u32::MAX)).ok_or_else(wrong)?;
    Ok(Duration::from_secs(seconds))
}

/// A count with its noun: `1 use`, `2 uses`.
pub(crate) fn counted(count: u64, noun: &str) -> String {
    if count == 1 { format!("1 {noun}") } else { format!("{count} {noun}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_read() {
        assert_eq!(parse_span("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_span("1h"), Ok(Duration::from_secs(3600)));
        assert_eq!(parse_span("7d"), Ok(Duration::from_secs(7 * 86_400)));
        for bad in ["", "h", "1", "0s", "-1h", "+1h", "1.5h", "1 h", "99999999999d", "1ü", "ü"] {
            assert!(parse_span(bad).unwrap_err().contains("90s, 30m"), "{bad}");
        }
    }

    #[test]
    fn ages_are_short() {
        assert_eq!(age(1000, 1045), "45s");
        assert_eq!(age(1000, 1000 + 200), "3m");
        assert_eq!(age(0, 5 * 3600), "5h");
        assert_eq!(age(0, 50 * 86_400), "50d");
        assert_eq!(age(2000, 1000), "0s");
        assert_eq!(age(i64::MIN, i64::MAX), "106751991167300d");
        assert_eq!(until(2000, 1990), "in 10s");
        assert_eq!(until(2000, 2000), "over");
    }
}
