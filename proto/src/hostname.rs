//! Names under which services are reached from outside: `<service>.<edge>.<domain>`, and `<edge>.<domain>` for the
//! service that has the name of the door (`http`, `https`).

use crate::{
    id::{EdgeId, InvalidName, ServiceName},
    target::Target,
};

/// A host name did not lead to a service.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnknownHost {
    /// It is not below the domain of the doors.
    #[error("{host:?} is not below the mesh's domain {domain:?}; names are <service>.<edge>.{domain}")]
    OtherDomain {
        /// What was asked for.
        host: String,
        /// The domain.
        domain: String,
    },
    /// Below the domain, with an impossible name.
    #[error(transparent)]
    Name(#[from] InvalidName),
}

/// Finds the target of a host name. An edge whose name has dots can be reached with a service in front only.
///
/// `host` may carry a port and a final dot, and any case; `door` names the service that `<edge>.<domain>` means.
///
/// # Errors
/// If it is not below `domain` or has an impossible name.
pub fn target_of(host: &str, domain: &str, door: &ServiceName) -> Result<Target, UnknownHost> {
    let bare = host.rsplit_once(':').filter(|(_, p)| p.bytes().all(|b| b.is_ascii_digit())).map_or(host, |(h, _)| h);
    let bare = bare.strip_suffix('.').unwrap_or(bare).to_ascii_lowercase();
    let other = || UnknownHost::OtherDomain { host: host.chars().take(253).collect(), domain: domain.to_owned() };
    let below = bare.strip_suffix(domain).and_then(|b| b.strip_suffix('.')).ok_or_else(other)?;
    let (name, edge): (ServiceName, EdgeId) = match below.split_once('.') {
        Some((service, edge)) => (service.parse()?, edge.parse()?),
        None => (door.clone(), below.parse()?),
    };
    Ok(Target::Service { edge: Some(edge), name })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_to_services() {
        let door = "http".parse().unwrap();
        let target = |host| target_of(host, "mesh.test", &door).map(|t| t.to_string());
        assert_eq!(target("web.shop-1.mesh.test").unwrap(), "shop-1/web");
        assert_eq!(target("WEB.Shop-1.Mesh.Test.:8080").unwrap(), "shop-1/web");
        assert_eq!(target("shop-1.mesh.test").unwrap(), "shop-1/http");
        assert_eq!(target("web.a.b.mesh.test").unwrap(), "a.b/web");
        for bad in ["", "mesh.test", ".mesh.test", "web.shop.other", "xmesh.test", "a..mesh.test", "[::1]:80"] {
            assert!(target(bad).is_err(), "{bad}");
        }
    }
}
