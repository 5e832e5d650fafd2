//! Which proxy is used for which shard, by the configuration and by the environment.

use std::{env, net::IpAddr};

use anyhow::Context;
use proto::book::Cidr;
use runtime::link::tcp::proxy::Proxy;

use crate::config::{ProxyAddress, ProxyConfig};

/// The proxy, and for whom it is not.
#[derive(Clone, Debug, Default)]
pub struct Proxies {
    proxy: Option<Proxy>,
    except: Vec<String>,
}

impl Proxies {
    /// As the configuration says, and the environment where that says nothing.
    ///
    /// # Errors
    /// If the environment names a proxy that cannot be understood, or the credentials cannot be read.
    pub fn new(config: &ProxyConfig) -> anyhow::Result<Self> {
        Self::with(config, |name| env::var(name).ok().filter(|value| !value.trim().is_empty()))
    }

    fn with(config: &ProxyConfig, variable: impl Fn(&str) -> Option<String>) -> anyhow::Result<Self> {
        let either = |upper: &'static str, lower: &'static str| {
            variable(upper).map(|value| (upper, value)).or_else(|| variable(lower).map(|value| (lower, value)))
        };
        let proxy = match &config.url {
            ProxyAddress::Off => None,
            ProxyAddress::At(proxy) => Some(proxy.clone()),
            ProxyAddress::Environment => either("HTTPS_PROXY", "https_proxy")
                .map(|(name, value)| value.trim().parse().with_context(|| format!("the variable {name}")))
                .transpose()?,
        };
        let credentials = match &config.credentials_file {
            Some(path) => {
                let text = std::fs::read_to_string(path);
                Some(text.with_context(|| format!("proxy.credentials_file {}", path.display()))?.trim().to_owned())
            }
            None => None,
        };
        let except = config.except.clone().unwrap_or_else(|| {
            let listed = either("NO_PROXY", "no_proxy").map(|(_, value)| value).unwrap_or_default();
            listed.split(',').map(|word| word.trim().to_owned()).filter(|word| !word.is_empty()).collect()
        });
        Ok(Self { proxy: proxy.map(|proxy| proxy.with_credentials(credentials)), except })
    }

    /// The proxy for this host, if there is one.
    #[must_use]
    pub fn of(&self, host: &str) -> Option<&Proxy> {
        let host = host.to_ascii_lowercase();
        let address = host.parse::<IpAddr>().ok();
        let excepted = |rule: &String| {
            let rule = rule.to_ascii_lowercase();
            if rule == "*" || rule == host {
                return true;
            }
            match address {
                Some(address) => rule.parse::<Cidr>().is_ok_and(|network| network.contains(address)),
                None => {
                    let domain = rule.trim_start_matches("*.").trim_start_matches('.');
                    host == domain || host.strip_suffix(domain).is_some_and(|front| front.ends_with('.'))
                }
            }
        };
        self.proxy.as_ref().filter(|_| !self.except.iter().any(excepted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxies(config: &ProxyConfig, variables: &[(&str, &str)]) -> anyhow::Result<Proxies> {
        Proxies::with(config, |name| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()))
    }

    #[test]
    fn the_environment_is_used_where_the_configuration_says_nothing() {
        let config = ProxyConfig::default();
        let all =
            proxies(&config, &[("https_proxy", "http://p:3128"), ("NO_PROXY", "a.lan, .corp,10.0.0.0/8")]).unwrap();
        for direct in ["a.lan", "x.corp", "corp", "X.CORP", "10.1.2.3", "b.a.lan"] {
            assert!(all.of(direct).is_none(), "{direct}");
        }
        for proxied in ["aa.lan", "xcorp", "11.1.2.3", "shard.example"] {
            assert_eq!(all.of(proxied).unwrap().to_string(), "http://p:3128", "{proxied}");
        }
        assert!(proxies(&config, &[]).unwrap().of("s").is_none());
    }

    #[test]
    fn the_configuration_goes_before_the_environment() {
        let environment = [("HTTPS_PROXY", "http://p:3128"), ("NO_PROXY", "*")];
        let off = ProxyConfig { url: ProxyAddress::Off, ..ProxyConfig::default() };
        assert!(proxies(&off, &environment).unwrap().of("s").is_none());
        let other = ProxyConfig {
            url: ProxyAddress::At("http://q:1".parse().unwrap()),
            except: Some(vec![]),
            ..ProxyConfig::default()
        };
        assert_eq!(proxies(&other, &environment).unwrap().of("s").unwrap().to_string(), "http://q:1");
    }

    #[test]
    fn a_proxy_that_cannot_be_understood_is_no_reason_to_go_without_and_its_password_is_not_told() {
        let error = proxies(&ProxyConfig::default(), &[("HTTPS_PROXY", "socks5://me:secret@h:1")]).unwrap_err();
        let told = format!("{error:#}");
        assert!(told.contains("HTTPS_PROXY") && !told.contains("secret"), "{told}");
    }
}
