//! What `meshctl forward` is told to do.

use proto::{
    id::EdgeId,
    target::{HostPort, Target},
};

/// One local port and where it leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Forward {
    /// Where it leads.
    pub(super) target: Target,
    /// The local port; 0 for any.
    pub(super) local: u16,
}

/// Reads a target and ports.
///
/// # Errors
/// A sentence, if they make no sense.
pub(super) fn parse(target: &str, ports: &[String]) -> Result<Vec<Forward>, String> {
    match Place::read(target)? {
        Place::Whole(target) => whole(&target, ports),
        Place::Host { edge, host } => {
            if ports.is_empty() {
                return Err(format!(
                    "{target:?} has no port: write REMOTE or REMOTE:LOCAL behind it, for example 5432:15432"
                ));
            }
            ports.iter().map(|ports| at_host(&edge, &host, ports)).collect()
        }
    }
}

/// What the target says by itself.
enum Place {
    /// Everything.
    Whole(Target),
    /// Everything but the port.
    Host { edge: EdgeId, host: String },
}

impl Place {
    fn read(text: &str) -> Result<Self, String> {
        let Some((edge, place)) = text.split_once('/') else {
            return match text.contains(':') {
                true => text.parse().map(Self::Whole).map_err(|e: proto::target::InvalidTarget| e.to_string()),
                false => Ok(Self::Host { edge: text.parse().map_err(|e| format!("{e}"))?, host: "localhost".into() }),
            };
        };
        // A service has no dot; a host without a port has one, or is an address in brackets.
        let bare_v6 = place.starts_with('[') && place.ends_with(']');
        if bare_v6 || (place.contains('.') && !place.contains(':')) {
            let host = HostPort::new(place.trim_matches(['[', ']']), 1).map_err(|e| e.to_string())?;
            return Ok(Self::Host { edge: edge.parse().map_err(|e| format!("{e}"))?, host: host.host });
        }
        text.parse().map(Self::Whole).map_err(|e: proto::target::InvalidTarget| e.to_string())
    }
}

fn whole(target: &Target, ports: &[String]) -> Result<Vec<Forward>, String> {
    let same = if let Target::Tcp { to, .. } = target { to.port } else { 0 };
    if ports.is_empty() {
        return Ok(vec![Forward { target: target.clone(), local: same }]);
    }
    let local = |text: &String| match port(text) {
        Ok(local) => Ok(Forward { target: target.clone(), local }),
        Err(_) if text.contains(':') => {
            Err(format!("{target} names its port itself, so {text:?} must be a local port alone"))
        }
        Err(e) => Err(e),
    };
    ports.iter().map(local).collect()
}

fn at_host(edge: &EdgeId, host: &str, ports: &str) -> Result<Forward, String> {
    let (remote, local) = match ports.split_once(':') {
        Some((remote, local)) => (port(remote)?, port(local)?),
        None => (port(ports)?, port(ports)?),
    };
    let to = HostPort::new(host, remote).map_err(|e| format!("{e}; in {ports:?} the remote port comes first"))?;
    Ok(Forward { target: Target::Tcp { edge: edge.clone(), to }, local })
}

fn port(text: &str) -> Result<u16, String> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    text.parse()
        .ok()
        .filter(|_| digits)
        .ok_or_else(|| format!("{text:?} is not a port; write a number from 0 to 65535"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<Vec<String>, String> {
        let mut words = line.split(' ').map(str::to_owned);
        let target = words.next().unwrap();
        parse(&target, &words.collect::<Vec<_>>()).map(|f| f.iter().map(Forward::as_text).collect())
    }

    #[test]
    fn every_way_to_say_it() {
        assert_eq!(read("shop-1 5432").unwrap(), ["shop-1:5432 <- 5432"]);
        assert_eq!(read("shop-1 5432:15432 22:0").unwrap(), ["shop-1:5432 <- 15432", "shop-1:22 <- 0"]);
        assert_eq!(read("shop-1/10.0.0.5 80:8080").unwrap(), ["shop-1/10.0.0.5:80 <- 8080"]);
        assert_eq!(read("shop-1/[fd00::5] 80").unwrap(), ["shop-1/[fd00::5]:80 <- 80"]);
        assert_eq!(read("shop-1/printer.lan:631").unwrap(), ["shop-1/printer.lan:631 <- 631"]);
        assert_eq!(read("shop-1:5432 15432").unwrap(), ["shop-1:5432 <- 15432"]);
        assert_eq!(read("shop-1/web 8080").unwrap(), ["shop-1/web <- 8080"]);
        assert_eq!(read("*/web").unwrap(), ["*/web <- 0"]);
    }

    #[test]
    fn mistakes_are_named() {
        assert!(read("shop-1").unwrap_err().contains("has no port"));
        assert!(read("shop-1 0:80").unwrap_err().contains("remote port comes first"));
        assert!(read("shop-1/web 80:8080").unwrap_err().contains("must be a local port alone"));
        assert!(read("shop-1 http").unwrap_err().contains("not a port"));
        assert!(read("Shop 80").unwrap_err().contains("edge name"));
        assert!(read("*/10.0.0.5 80").is_err());
    }
}
