//! What an edge lets through, and what not.

use super::*;

fn allow(rules: &[&str]) -> Allow {
    let services = [
        ("web", (ServiceKind::Http, "127.0.0.1:8080")),
        ("cam", (ServiceKind::Tcp, "10.9.9.9:554")),
        ("dns", (ServiceKind::Udp, "127.0.0.1:53")),
    ];
    let services = services.map(|(n, (k, a))| (n.parse().unwrap(), (k, a.parse().unwrap()))).into();
    let rules = rules.iter().map(|r| r.parse().unwrap()).collect();
    Allow::new("shop-1".parse().unwrap(), Local { kubelet: true, sshd: false }, services, rules)
}

#[allow(clippy::unwrap_in_result, reason = "the result is what is tested, not the target")]
fn rule(allow: &Allow, target: &str) -> Result<(String, String), RefuseCode> {
    match allow.plan(&target.parse().unwrap()) {
        Ok(Plan::Dial { to, rule, by_address, .. }) => {
            Ok((to.to_string(), if by_address { "?".to_owned() } else { rule }))
        }
        Ok(Plan::Flow { to, rule, by_address }) => {
            Ok((to.to_string(), if by_address { "?".to_owned() } else { format!("{rule} over UDP") }))
        }
        Ok(Plan::Echo) => Ok((String::new(), "echo".into())),
        Err(refusal) => Err(refusal.code),
    }
}

#[test]
fn by_itself_an_edge_allows_kubelet_sshd_and_its_services() {
    let table = [
        ("shop-1:10250", Ok(("localhost:10250", "kubelet"))),
        ("shop-1/127.0.0.1:10250", Ok(("127.0.0.1:10250", "kubelet"))),
        ("shop-1/shop-1:10250", Ok(("localhost:10250", "kubelet"))),
        ("shop-1/10.0.0.7:10250", Err(RefuseCode::EdgeDenied)),
        ("shop-1:22", Err(RefuseCode::EdgeDenied)),
        ("shop-1/web", Ok(("127.0.0.1:8080", "service web"))),
        ("*/web", Ok(("127.0.0.1:8080", "service web"))),
        ("shop-1:8080", Ok(("127.0.0.1:8080", "service web"))),
        ("shop-1/10.9.9.9:554", Ok(("10.9.9.9:554", "service cam"))),
        ("shop-1/10.9.9.9:555", Err(RefuseCode::EdgeDenied)),
        ("shop-1/dns", Ok(("127.0.0.1:53", "service dns over UDP"))),
        ("shop-1:53/udp", Ok(("127.0.0.1:53", "service dns over UDP"))),
        ("shop-1:8080/udp", Err(RefuseCode::EdgeDenied)),
        ("shop-1:10250/udp", Err(RefuseCode::EdgeDenied)),
        ("shop-1/10.9.9.9:554/udp", Err(RefuseCode::EdgeDenied)),
        ("shop-1:53", Err(RefuseCode::EdgeDenied)),
        ("shop-1/nothing", Err(RefuseCode::ServiceUnknown)),
        ("shop-2:10250", Err(RefuseCode::EdgeUnknown)),
    ];
    for (target, expected) in table {
        let expected = expected.map(|(to, rule)| (to.to_owned(), rule.to_owned()));
        assert_eq!(rule(&allow(&[]), target), expected, "{target}");
    }
}

#[test]
fn the_configuration_opens_addresses_networks_and_names() {
    let opened = allow(&["127.0.0.1:5432", "10.0.0.0/24:80-90", "printer.lan:631", "[fd00::]/64:*", "localhost:9000"]);
    let table = [
        ("127.0.0.1:5432", Some("127.0.0.1:5432")),
        ("127.0.0.2:5432", None),
        ("10.0.0.255:85", Some("10.0.0.0/24:80-90")),
        ("10.0.1.0:85", None),
        ("10.0.0.1:91", None),
        ("PRINTER.lan:631", Some("printer.lan:631")),
        ("printer.lan:80", Some("?")),
        ("scanner.lan:631", Some("?")),
        ("[fd00::5]:7", Some("[fd00::]/64:*")),
        ("[fd00:0:0:1::5]:7", None),
        ("[::ffff:10.0.0.1]:80", Some("10.0.0.0/24:80-90")),
        ("localhost:9000", Some("localhost:9000")),
        ("localhost:5432", Some("?")),
    ];
    for (to, expected) in table {
        let found = rule(&opened, &format!("shop-1/{to}")).ok().map(|(_, rule)| rule);
        assert_eq!(found.as_deref(), expected, "{to}");
    }
    let without = allow(&["printer.lan:631"]);
    assert_eq!(rule(&without, "shop-1/scanner.lan:631"), Err(RefuseCode::EdgeDenied), "no name is resolved for it");
}

#[test]
fn the_metadata_address_must_be_listed_by_itself() {
    let metadata = "shop-1/169.254.169.254:80";
    for wide in ["0.0.0.0/0:80", "169.254.0.0/16:*", "169.254.169.254/31:80"] {
        assert_eq!(rule(&allow(&[wide]), metadata), Err(RefuseCode::EdgeDenied), "{wide}");
        assert_eq!(rule(&allow(&[wide]), "shop-1/[::ffff:a9fe:a9fe]:80"), Err(RefuseCode::EdgeDenied), "{wide}");
    }
    assert!(rule(&allow(&["169.254.169.254:80"]), metadata).is_ok());
    let ip = "169.254.169.254".parse().unwrap();
    assert!(!allow(&["metadata.lan:80"]).named_address(ip, 80, Over::Tcp));
    assert!(allow(&["169.254.169.254:80"]).named_address(ip, 80, Over::Tcp));
    assert!(!allow(&["169.254.169.254:80"]).named_address(ip, 80, Over::Udp));
    assert_eq!(rule(&allow(&["0.0.0.0/0:*"]), "shop-1/0.0.0.0:22"), Err(RefuseCode::EdgeDenied));
}

#[test]
fn kube_apiserver_may_reach_this_machine_and_its_pods_and_nobody_else_may() {
    let machine = Machine {
        has_address: |ip| ip == IpAddr::from([10, 99, 0, 5]),
        has_pod: |ip| matches!(ip, IpAddr::V4(v4) if v4.octets()[..3] == [10, 244, 1]),
    };
    let open = Cluster { open: true, pod_networks: vec!["10.50.0.0/16".parse().unwrap()] };
    let opened = allow(&[]).with_cluster(open.clone());
    let shut = allow(&[]);
    let sealed = Allow { local: Local { kubelet: false, sshd: false }, ..allow(&[]).with_cluster(open) };
    let plan = |allow: &Allow, who: &Principal, to: &str| match allow.plan_for(
        Some(who),
        &format!("shop-1/{to}").parse().unwrap(),
        machine,
    ) {
        Ok(Plan::Dial { rule, or, .. }) => {
            format!("{rule}{}", or.map(|or| format!(" or {or}")).unwrap_or_default())
        }
        Ok(Plan::Echo | Plan::Flow { .. }) => "echo".into(),
        Err(refusal) => refusal.code.slug().into(),
    };
    let kas = Principal::Apiserver;
    for (to, expected) in [
        ("10.99.0.5:10250", "node address or localhost:10250"),
        ("10.99.0.5:9100", "node address"),
        ("[::ffff:10.99.0.5]:9100", "node address"),
        ("10.244.1.9:80", "local pod"),
        ("10.50.1.1:80", "local pod"),
        ("localhost:10250", "kubelet"),
        ("127.0.0.1:9100", "edge-denied"),
        ("10.99.0.6:10250", "edge-denied"),
        ("10.244.2.9:80", "edge-denied"),
        ("169.254.169.254:80", "edge-denied"),
        ("0.0.0.0:10250", "edge-denied"),
    ] {
        assert_eq!(plan(&opened, &kas, to), expected, "{to}");
    }
    assert_eq!(plan(&shut, &kas, "10.99.0.5:10250"), "edge-denied");
    assert_eq!(plan(&sealed, &kas, "10.99.0.5:10250"), "edge-denied");
    let alice = Principal::User { name: "alice".parse().unwrap(), groups: vec![] };
    assert_eq!(plan(&opened, &alice, "10.99.0.5:10250"), "edge-denied");
    assert_eq!(plan(&opened, &alice, "10.244.1.9:80"), "edge-denied");
}

#[test]
fn a_rule_is_for_tcp_or_for_udp() {
    let both = allow(&["10.0.0.0/24:53", "10.0.0.0/24:5060/udp", "printer.lan:161/udp"]);
    for (target, expected) in [
        ("shop-1/10.0.0.5:53", Ok("10.0.0.0/24:53")),
        ("shop-1/10.0.0.5:53/udp", Err(RefuseCode::EdgeDenied)),
        ("shop-1/10.0.0.5:5060/udp", Ok("10.0.0.0/24:5060/udp over UDP")),
        ("shop-1/10.0.0.5:5060", Err(RefuseCode::EdgeDenied)),
        ("shop-1/printer.lan:161/udp", Ok("printer.lan:161/udp over UDP")),
        ("shop-1/other.lan:5060/udp", Ok("?")),
        ("shop-1/other.lan:161/udp", Err(RefuseCode::EdgeDenied)),
    ] {
        assert_eq!(rule(&both, target).map(|(_, rule)| rule), expected.map(str::to_owned), "{target}");
    }
}

#[test]
fn rules_that_are_none() {
    for text in [
        "",
        "h",
        "h:",
        "h:0",
        "h:1-",
        "10.0.0.0/33:1",
        "10.0.0.0/:1",
        "fd00::1:1",
        "[fd00::]/129:1",
        "a b:1",
        "h/8:1",
        "*:1",
        "h/udp",
        "h:1/tcp",
        "h:1/udp/udp",
    ] {
        assert!(text.parse::<Rule>().is_err(), "{text}");
    }
}
