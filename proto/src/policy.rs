//! Who may reach what. Default deny: a stream is allowed if one rule covers it, and otherwise refused with a sentence
//! that names the rule which is missing. The same code decides at the shard and explains in `meshctl`.

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{
    id::{EdgeId, ServiceName, SiteName},
    principal::Principal,
    target::Target,
};

/// One rule: everybody in `from` may reach everything in `to` on every port in `ports`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Its name, for people and for access records.
    pub name: String,
    /// Who: `user/alice`, `group/ops`, `edge/shop-*`, `site/berlin`, `door/http`, `apiserver`.
    pub from: Vec<Subject>,
    /// What: `edge/shop-*`, `site/berlin`, `service/web`, `label/tier=front`.
    pub to: Vec<Object>,
    /// Which ports there: `22`, `8000-8100`, `*`. A service has the port that its edge announces. Rules whose objects
    /// are all services may leave this empty, which then means all.
    #[serde(default)]
    pub ports: Vec<Ports>,
}

/// A name, or the beginning of one with `*` behind it, or `*` alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(String);

impl Pattern {
    /// Whether the name fits.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        match self.0.strip_suffix('*') {
            Some(prefix) => name.starts_with(prefix),
            None => self.0 == name,
        }
    }
}

impl FromStr for Pattern {
    type Err = InvalidRule;

    fn from_str(text: &str) -> Result<Self, InvalidRule> {
        let body = text.strip_suffix('*').unwrap_or(text);
        let fits = body.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.'));
        if text.is_empty() || text.len() > 253 || !fits {
            return Err(InvalidRule::Pattern(text.chars().take(80).collect()));
        }
        Ok(Self(text.to_owned()))
    }
}

/// Who may.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Subject {
    /// A user by name.
    User(Pattern),
    /// Members of a group.
    Group(Pattern),
    /// An edge by name.
    Edge(Pattern),
    /// Edges of a site.
    Site(Pattern),
    /// Anybody who comes through this door.
    Door(Pattern),
    /// kube-apiserver.
    Apiserver,
}

/// What may be reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Object {
    /// An edge, with its services and the hosts that it lets one reach.
    Edge(Pattern),
    /// The edges of a site.
    Site(Pattern),
    /// A service by name, on any edge.
    Service(Pattern),
    /// Services whose announced labels have this value.
    Label {
        /// The key.
        key: String,
        /// The value.
        value: String,
    },
}

/// A range of ports, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Ports {
    first: u16,
    last: u16,
}

impl Ports {
    /// Every port.
    pub const ALL: Self = Self { first: 0, last: u16::MAX };

    /// Whether the port is inside.
    #[must_use]
    pub const fn contains(self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }
}

/// A rule could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRule {
    /// Not a pattern.
    #[error("{0:?} is no name pattern; write a name, the beginning of one with '*' behind it, or '*'")]
    Pattern(String),
    /// Not a subject.
    #[error("{0:?} is no subject; write user/NAME, group/NAME, edge/NAME, site/NAME, door/NAME or apiserver")]
    Subject(String),
    /// Not an object.
    #[error("{0:?} is no object; write edge/NAME, site/NAME, service/NAME or label/KEY=VALUE")]
    Object(String),
    /// Not ports.
    #[error("{0:?} is no port range; write a port such as 22, a range such as 8000-8100, or *")]
    Ports(String),
    /// A rule without a part that it needs.
    #[error("rule {rule:?} names no {part}")]
    Incomplete {
        /// The rule's name.
        rule: String,
        /// The part.
        part: &'static str,
    },
}

impl FromStr for Subject {
    type Err = InvalidRule;

    fn from_str(text: &str) -> Result<Self, InvalidRule> {
        match text.split_once('/') {
            Some(("user", p)) => Ok(Self::User(p.parse()?)),
            Some(("group", p)) => Ok(Self::Group(p.parse()?)),
            Some(("edge", p)) => Ok(Self::Edge(p.parse()?)),
            Some(("site", p)) => Ok(Self::Site(p.parse()?)),
            Some(("door", p)) => Ok(Self::Door(p.parse()?)),
            None if text == "apiserver" => Ok(Self::Apiserver),
            Some(_) | None => Err(InvalidRule::Subject(text.chars().take(80).collect())),
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(p) => write!(f, "user/{}", p.0),
            Self::Group(p) => write!(f, "group/{}", p.0),
            Self::Edge(p) => write!(f, "edge/{}", p.0),
            Self::Site(p) => write!(f, "site/{}", p.0),
            Self::Door(p) => write!(f, "door/{}", p.0),
            Self::Apiserver => f.write_str("apiserver"),
        }
    }
}

impl FromStr for Object {
    type Err = InvalidRule;

    fn from_str(text: &str) -> Result<Self, InvalidRule> {
        let no = || InvalidRule::Object(text.chars().take(80).collect());
        match text.split_once('/') {
            Some(("edge", p)) => Ok(Self::Edge(p.parse()?)),
            Some(("site", p)) => Ok(Self::Site(p.parse()?)),
            Some(("service", p)) => Ok(Self::Service(p.parse()?)),
            Some(("label", pair)) => {
                let (key, value) = pair.split_once('=').filter(|(k, _)| !k.is_empty()).ok_or_else(no)?;
                Ok(Self::Label { key: key.to_owned(), value: value.to_owned() })
            }
            Some(_) | None => Err(no()),
        }
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Edge(p) => write!(f, "edge/{}", p.0),
            Self::Site(p) => write!(f, "site/{}", p.0),
            Self::Service(p) => write!(f, "service/{}", p.0),
            Self::Label { key, value } => write!(f, "label/{key}={value}"),
        }
    }
}

impl FromStr for Ports {
    type Err = InvalidRule;

    fn from_str(text: &str) -> Result<Self, InvalidRule> {
        let port = |t: &str| {
            let digits = !t.is_empty() && t.bytes().all(|b| b.is_ascii_digit());
            t.parse::<u16>().ok().filter(|&p| digits && p != 0)
        };
        let range = match text.split_once('-') {
            _ if text == "*" => Some((0, u16::MAX)),
            Some((a, b)) => port(a).zip(port(b)).filter(|(a, b)| a <= b),
            None => port(text).map(|p| (p, p)),
        };
        range
            .map(|(first, last)| Self { first, last })
            .ok_or_else(|| InvalidRule::Ports(text.chars().take(80).collect()))
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.first, self.last) {
            (0, u16::MAX) => f.write_str("*"),
            (a, b) if a == b => write!(f, "{a}"),
            (a, b) => write!(f, "{a}-{b}"),
        }
    }
}

macro_rules! through_text {
    ($($name:ident),*) => {$(
        impl TryFrom<String> for $name {
            type Error = InvalidRule;
            fn try_from(text: String) -> Result<Self, InvalidRule> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(value: $name) -> Self {
                value.to_string()
            }
        }
    )*};
}
through_text!(Subject, Object, Ports);

impl Rule {
    /// Checks that the rule can ever allow something.
    ///
    /// # Errors
    /// If it names no subject, no object, or no ports although an object needs them.
    pub fn check(&self) -> Result<(), InvalidRule> {
        let incomplete = |part| Err(InvalidRule::Incomplete { rule: self.name.clone(), part });
        let services_only = self.to.iter().all(|o| matches!(o, Object::Service(_) | Object::Label { .. }));
        match () {
            () if self.from.is_empty() => incomplete("subject (from)"),
            () if self.to.is_empty() => incomplete("object (to)"),
            () if self.ports.is_empty() && !services_only => incomplete("ports"),
            () => Ok(()),
        }
    }
}

/// What is known of the target's place when a rule is applied.
#[derive(Clone, Debug)]
pub struct Place<'a> {
    /// The edge that would serve.
    pub edge: &'a EdgeId,
    /// Its site.
    pub site: Option<&'a SiteName>,
    /// The service, if the target is one that the edge announces.
    pub service: Option<&'a ServiceName>,
    /// The port: of the target, or the announced one of the service; `None` for a probe.
    pub port: Option<u16>,
    /// Labels of the service.
    pub labels: Option<&'a BTreeMap<String, String>>,
}

/// All rules of a mesh.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Policy {
    /// In the order of their names.
    pub rules: Vec<Rule>,
}

/// Yes or no, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The named rule allows it.
    Allow {
        /// The rule's name.
        rule: String,
    },
    /// No rule does.
    Deny {
        /// A sentence that names the missing rule and the command that would add it.
        missing: String,
    },
}

impl Policy {
    /// Decides on one stream.
    #[must_use]
    pub fn decide(&self, who: &Principal, target: &Target, place: &Place<'_>) -> Decision {
        match self.rules.iter().find(|rule| rule.allows(who, place)) {
            Some(rule) => Decision::Allow { rule: rule.name.clone() },
            None => Decision::Deny { missing: missing_rule(who, target, place) },
        }
    }
}

impl Rule {
    fn allows(&self, who: &Principal, place: &Place<'_>) -> bool {
        self.from.iter().any(|s| s.covers(who))
            && self.to.iter().any(|o| o.covers(place))
            && place.port.is_none_or(|port| self.ports.is_empty() || self.ports.iter().any(|p| p.contains(port)))
    }
}

impl Subject {
    fn covers(&self, who: &Principal) -> bool {
        match (self, who) {
            (Self::User(p), Principal::User { name, .. }) => p.matches(name.as_str()),
            (Self::Group(p), Principal::User { groups, .. }) => groups.iter().any(|g| p.matches(g.as_str())),
            (Self::Edge(p), Principal::Edge { name, .. }) => p.matches(name.as_str()),
            (Self::Site(p), Principal::Edge { site: Some(site), .. }) => p.matches(site.as_str()),
            (Self::Door(p), Principal::Door { name }) => p.matches(name),
            (Self::Apiserver, Principal::Apiserver) => true,
            (
                Self::User(_) | Self::Group(_) | Self::Edge(_) | Self::Site(_) | Self::Door(_) | Self::Apiserver,
                Principal::User { .. } | Principal::Edge { .. } | Principal::Door { .. } | Principal::Apiserver,
            ) => false,
        }
    }
}

impl Object {
    fn covers(&self, place: &Place<'_>) -> bool {
        match self {
            Self::Edge(p) => p.matches(place.edge.as_str()),
            Self::Site(p) => place.site.is_some_and(|s| p.matches(s.as_str())),
            Self::Service(p) => place.service.is_some_and(|s| p.matches(s.as_str())),
            Self::Label { key, value } => place.labels.is_some_and(|l| l.get(key) == Some(value)),
        }
    }
}

fn missing_rule(who: &Principal, target: &Target, place: &Place<'_>) -> String {
    let (to, port) = match (target, place.port) {
        (Target::Service { name, .. }, _) => (format!("service/{name}"), String::new()),
        (_, Some(port)) => (format!("edge/{}", place.edge), format!(" --ports {port}")),
        (_, None) => (format!("edge/{}", place.edge), " --ports '*'".to_owned()),
    };
    format!("no rule allows {who} to reach {target}; to add one: meshctl policy allow --from {who} --to {to}{port}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> Policy {
        serde_json::from_str(
            r#"[
            {"name": "ops-ssh", "from": ["group/ops"], "to": ["edge/shop-*"], "ports": ["22", "8000-8100"]},
            {"name": "public-web", "from": ["door/http"], "to": ["service/web"]},
            {"name": "berlin", "from": ["site/berlin"], "to": ["site/berlin", "label/tier=front"], "ports": ["*"]}
        ]"#,
        )
        .unwrap()
    }

    fn alice(group: &str) -> Principal {
        Principal::User { name: "alice".parse().unwrap(), groups: vec![group.parse().unwrap()] }
    }

    fn decide(who: &Principal, target: &str, site: Option<&str>, announced: Option<u16>) -> Decision {
        let target: Target = target.parse().unwrap();
        let site: Option<SiteName> = site.map(|s| s.parse().unwrap());
        let (service, port) = match &target {
            Target::Tcp { to, .. } => (None, Some(to.port)),
            Target::Service { name, .. } => (Some(name), announced),
            Target::Udp { .. } | Target::Probe { .. } => (None, None),
        };
        let edge = target.edge().unwrap().clone();
        let place = Place { edge: &edge, site: site.as_ref(), service, port, labels: None };
        policy().decide(who, &target, &place)
    }

    #[test]
    fn a_rule_allows_what_it_names_and_nothing_else() {
        let allowed = |rule: &str| Decision::Allow { rule: rule.into() };
        assert_eq!(decide(&alice("ops"), "shop-1:22", None, None), allowed("ops-ssh"));
        assert_eq!(decide(&alice("ops"), "shop-1/10.0.0.9:8050", None, None), allowed("ops-ssh"));
        assert!(matches!(decide(&alice("ops"), "shop-1:23", None, None), Decision::Deny { .. }));
        assert!(matches!(decide(&alice("ops"), "plant-1:22", None, None), Decision::Deny { .. }));
        assert!(matches!(decide(&alice("dev"), "shop-1:22", None, None), Decision::Deny { .. }));

        let door = Principal::Door { name: "http".into() };
        assert_eq!(decide(&door, "plant-1/web", None, Some(8080)), allowed("public-web"));
        assert!(matches!(decide(&door, "plant-1:8080", None, None), Decision::Deny { .. }));

        let edge = |site: &str| Principal::Edge { name: "a".parse().unwrap(), site: Some(site.parse().unwrap()) };
        assert_eq!(decide(&edge("berlin"), "b:1", Some("berlin"), None), allowed("berlin"));
        assert!(matches!(decide(&edge("paris"), "b:1", Some("berlin"), None), Decision::Deny { .. }));
        assert!(matches!(decide(&Principal::Apiserver, "b:10250", None, None), Decision::Deny { .. }));
    }

    #[test]
    fn a_refusal_names_the_rule_that_is_missing() {
        let Decision::Deny { missing } = decide(&alice("dev"), "shop-1:22", None, None) else { panic!("allowed") };
        assert_eq!(
            missing,
            "no rule allows user/alice to reach shop-1:22; to add one: \
             meshctl policy allow --from user/alice --to edge/shop-1 --ports 22"
        );
    }

    #[test]
    fn rules_that_are_none() {
        for subject in ["", "alice", "user/", "user/A", "door", "user/a*b", "apiserver/x"] {
            assert!(subject.parse::<Subject>().is_err(), "{subject}");
        }
        for object in ["", "edge", "service/", "label/x", "label/=x", "user/a"] {
            assert!(object.parse::<Object>().is_err(), "{object}");
        }
        for ports in ["", "0", "x", "2-1", "1-", "-1", "65536", "+1", "1-2-3"] {
            assert!(ports.parse::<Ports>().is_err(), "{ports}");
        }
        let empty = Rule { name: "r".into(), from: vec![], to: vec![], ports: vec![] };
        assert_eq!(empty.check().unwrap_err().to_string(), "rule \"r\" names no subject (from)");
    }
}
