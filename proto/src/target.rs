//! What a stream is for.
//!
//! | text | means |
//! |---|---|
//! | `shop-17:22` | port 22 on the edge itself |
//! | `shop-17/10.0.0.5:80`, `shop-17/[fd00::5]:80`, `shop-17/printer.lan:631` | a host that the edge can reach |
//! | `shop-17/web` | the service `web` of that edge |
//! | `*/web` | the service `web` of any edge that announces it |
//! | `shop-17:53/udp`, `shop-17/10.0.0.5:53/udp` | the same port and host, for datagrams |

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr},
    str::FromStr,
};

use crate::id::{EdgeId, InvalidName, ServiceName};

/// Longest host name or address in bytes.
const MAX_HOST: usize = 253;

/// A host as seen from the edge, and a port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HostPort {
    /// A name, an IPv4 address, or an IPv6 address without brackets; never empty.
    pub host: String,
    /// 1 to 65535.
    pub port: u16,
}

impl HostPort {
    /// Checks both parts.
    ///
    /// # Errors
    /// If the host is neither an address nor a host name, or if the port is 0.
    pub fn new(host: &str, port: u16) -> Result<Self, InvalidTarget> {
        if port == 0 {
            return Err(InvalidTarget::Port("0".into()));
        }
        let address = host.parse::<IpAddr>().is_ok();
        let name = !host.is_empty()
            && host.len() <= MAX_HOST
            && !host.starts_with(['-', '.'])
            && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'));
        if address || name {
            Ok(Self { host: host.to_ascii_lowercase(), port })
        } else {
            Err(InvalidTarget::Host(host.chars().take(MAX_HOST).collect()))
        }
    }

    /// Whether the host is the edge itself.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        self.host == "localhost" || self.host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }
}

impl FromStr for HostPort {
    type Err = InvalidTarget;

    /// Reads `host:port`, with brackets round an IPv6 address.
    fn from_str(text: &str) -> Result<Self, InvalidTarget> {
        let (host, port) = text.rsplit_once(':').ok_or_else(|| InvalidTarget::NoPort(text.to_owned()))?;
        let port = parse_port(port)?;
        match host.strip_prefix('[').map(|h| h.strip_suffix(']')) {
            Some(Some(v6)) if v6.parse::<Ipv6Addr>().is_ok() => Self::new(v6, port),
            Some(_) => Err(InvalidTarget::Host(host.to_owned())),
            None if host.contains(':') => Err(InvalidTarget::Host(host.to_owned())),
            None => Self::new(host, port),
        }
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// What a stream is for: an edge and a place there, or a service.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// A TCP connection that the edge makes.
    Tcp {
        /// The edge that dials.
        edge: EdgeId,
        /// Whom it dials.
        to: HostPort,
    },
    /// A UDP flow from the edge.
    Udp {
        /// The edge that sends.
        edge: EdgeId,
        /// To whom.
        to: HostPort,
    },
    /// A service by name.
    Service {
        /// The edge that announces it; `None` for any that does.
        edge: Option<EdgeId>,
        /// Its name.
        name: ServiceName,
    },
    /// The edge itself, which echoes.
    Probe {
        /// Which one.
        edge: EdgeId,
    },
}

impl Target {
    /// The same place for datagrams: a port becomes a UDP port, anything else stays as it is.
    #[must_use]
    pub fn over_udp(self) -> Self {
        match self {
            Self::Tcp { edge, to } => Self::Udp { edge, to },
            other @ (Self::Udp { .. } | Self::Service { .. } | Self::Probe { .. }) => other,
        }
    }

    /// The edge that is named, if one is.
    #[must_use]
    pub const fn edge(&self) -> Option<&EdgeId> {
        match self {
            Self::Tcp { edge, .. } | Self::Udp { edge, .. } | Self::Probe { edge } => Some(edge),
            Self::Service { edge, .. } => edge.as_ref(),
        }
    }
}

/// A text was no target.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTarget {
    /// Neither port nor service.
    #[error("{0:?} names no port and no service; write EDGE:PORT, EDGE/HOST:PORT or EDGE/SERVICE")]
    NoPort(String),
    /// The port is not 1 to 65535.
    #[error("{0:?} is not a port; write a number from 1 to 65535")]
    Port(String),
    /// The host is neither a name nor an address.
    #[error("{0:?} is neither a host name nor an IP address (IPv6 is written in brackets)")]
    Host(String),
    /// The edge or the service has no valid name.
    #[error(transparent)]
    Name(#[from] InvalidName),
}

fn parse_port(text: &str) -> Result<u16, InvalidTarget> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|&p| digits && p != 0).ok_or_else(|| InvalidTarget::Port(text.to_owned()))
}

impl FromStr for Target {
    type Err = InvalidTarget;

    fn from_str(text: &str) -> Result<Self, InvalidTarget> {
        // `shop-17/udp` is a service of that name.
        if let Some(place) = text.strip_suffix("/udp").filter(|place| place.contains(':')) {
            return match place.parse()? {
                tcp @ Self::Tcp { .. } => Ok(tcp.over_udp()),
                Self::Udp { .. } | Self::Service { .. } | Self::Probe { .. } => {
                    Err(InvalidTarget::NoPort(text.to_owned()))
                }
            };
        }
        match text.split_once('/') {
            Some(("*", name)) => Ok(Self::Service { edge: None, name: name.parse()? }),
            Some((edge, place)) if place.contains(':') => Ok(Self::Tcp { edge: edge.parse()?, to: place.parse()? }),
            Some((edge, name)) => Ok(Self::Service { edge: Some(edge.parse()?), name: name.parse()? }),
            None => {
                let (edge, port) = text.split_once(':').ok_or_else(|| InvalidTarget::NoPort(text.to_owned()))?;
                Ok(Self::Tcp { edge: edge.parse()?, to: HostPort::new("localhost", parse_port(port)?)? })
            }
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { edge, to } if to.host == "localhost" => write!(f, "{edge}:{}", to.port),
            Self::Tcp { edge, to } => write!(f, "{edge}/{to}"),
            Self::Udp { edge, to } if to.host == "localhost" => write!(f, "{edge}:{}/udp", to.port),
            Self::Udp { edge, to } => write!(f, "{edge}/{to}/udp"),
            Self::Service { edge: Some(edge), name } => write!(f, "{edge}/{name}"),
            Self::Service { edge: None, name } => write!(f, "*/{name}"),
            Self::Probe { edge } => write!(f, "{edge}/(probe)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_grammar() {
        for text in [
            "shop-17:22",
            "shop-17/10.0.0.5:80",
            "shop-17/[fd00::5]:80",
            "shop-17/printer.lan:631",
            "shop-17/web",
            "*/web",
            "a.b.c:1",
            "shop-17:53/udp",
            "shop-17/10.0.0.5:53/udp",
            "shop-17/[fd00::5]:53/udp",
            "shop-17/udp",
            "*/udp",
        ] {
            let target: Target = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(target.to_string(), text);
        }
        for text in [
            "",
            "shop",
            "shop:",
            "shop:0",
            "shop:65536",
            "shop:+1",
            ":22",
            "/web",
            "shop/",
            "*:22",
            "shop/fd00::5:80",
            "shop/[10.0.0.1]:1",
            "shop/a b:1",
            "shop/[::1:22",
            "Shop:22",
            "shop/x:y:1",
            "shop/web/x",
            "shop/web/udp",
            "shop:53/udp/udp",
            "shop:53/tcp",
            "/udp",
        ] {
            assert!(text.parse::<Target>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_taken_or_refused_and_what_is_taken_prints_alike(text in "\\PC{0,40}") {
            if let Ok(target) = text.parse::<Target>() {
                let printed = target.to_string();
                prop_assert_eq!(printed.parse::<Target>(), Ok(target));
            }
        }
    }
}
