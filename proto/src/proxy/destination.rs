//! Where a host and a port lead.
//!
//! | host | leads to |
//! |---|---|
//! | `shop-17` | the port on the edge itself |
//! | `shop-17.mesh.local` | the same |
//! | `web.shop-17.mesh.local` | the service `web` of the edge, whatever the port |

use std::net::IpAddr;

use crate::{
    code::RefuseCode,
    id::EdgeId,
    stream::Refusal,
    target::{HostPort, Target},
};

/// A host and a port as a client wrote them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// A name or an address.
    pub host: String,
    /// The port.
    pub port: u16,
}

impl Destination {
    /// What is meant. Below the domain, `a.b` is the edge of that name if there is one, and else the service `a` of the
    /// edge `b`.
    ///
    /// # Errors
    /// If it is an address, or no name.
    pub fn target(&self, domain: &str, is_edge: impl Fn(&EdgeId) -> bool) -> Result<Target, Refusal> {
        let host = self.host.strip_suffix('.').unwrap_or(&self.host).to_ascii_lowercase();
        if host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok() {
            let reason = format!(
                "{} is an address, and addresses mean nothing here: write EDGE:{} for a port on an edge, or SERVICE.EDGE.{domain}",
                self.host, self.port
            );
            return Err(Refusal::because(RefuseCode::Unsupported, reason));
        }
        let invalid = |e: &dyn std::fmt::Display| {
            Refusal::because(RefuseCode::BadRequest, format!("{:?} leads nowhere: {e}", self.host))
        };
        let Some(below) = host.strip_suffix(domain).and_then(|h| h.strip_suffix('.')) else {
            return self.port_on(host.parse().map_err(|e| invalid(&e))?);
        };
        let whole = below.parse::<EdgeId>().map_err(|e| invalid(&e))?;
        match below.split_once('.') {
            Some((service, edge)) if !is_edge(&whole) => Ok(Target::Service {
                edge: Some(edge.parse().map_err(|e| invalid(&e))?),
                name: service.parse().map_err(|e| invalid(&e))?,
            }),
            _ => self.port_on(whole),
        }
    }

    fn port_on(&self, edge: EdgeId) -> Result<Target, Refusal> {
        let to = HostPort::new("localhost", self.port)
            .map_err(|e| Refusal::because(RefuseCode::BadRequest, e.to_string()))?;
        Ok(Target::Tcp { edge, to })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_lead_to_edges_and_services() {
        let of = |host: &str| {
            let destination = Destination { host: host.into(), port: 22 };
            destination.target("mesh.local", |edge| edge.as_str() == "a.b").map(|t| t.to_string())
        };
        assert_eq!(of("shop-17").unwrap(), "shop-17:22");
        assert_eq!(of("Shop-17.Mesh.Local.").unwrap(), "shop-17:22");
        assert_eq!(of("web.shop-17.mesh.local").unwrap(), "shop-17/web");
        assert_eq!(of("web.a.b.mesh.local").unwrap(), "a.b/web");
        assert_eq!(of("a.b.mesh.local").unwrap(), "a.b:22");
        assert_eq!(of("node1.example.com").unwrap(), "node1.example.com:22");
        for (host, code) in [
            ("10.0.0.1", RefuseCode::Unsupported),
            ("[::1]", RefuseCode::Unsupported),
            ("-a", RefuseCode::BadRequest),
            ("a_b", RefuseCode::BadRequest),
            (".mesh.local", RefuseCode::BadRequest),
        ] {
            assert_eq!(of(host).unwrap_err().code, code, "{host}");
        }
    }
}
