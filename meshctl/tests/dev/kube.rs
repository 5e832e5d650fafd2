//! `meshctl kube check` against a mesh that is real and a cluster that a stand-in for kubectl tells of.

use std::{os::unix::fs::PermissionsExt, path::Path};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::mesh::{Mesh, Said, command, finish};

/// A folder with a `kubectl` that tells of these nodes.
fn cluster(nodes: &[Value]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let kubectl = folder.path().join("kubectl");
    let script = "#!/bin/sh\ncd \"$(dirname \"$0\")\"\ncase \"$*\" in *pods*) exec cat pods.json ;; *) exec cat nodes.json ;; esac\n";
    std::fs::write(&kubectl, script).unwrap();
    std::fs::set_permissions(&kubectl, std::fs::Permissions::from_mode(0o755)).unwrap();
    let flags =
        ["kube-apiserver", "--egress-selector-config-file=/e.yaml", "--kubelet-preferred-address-types=InternalIP"];
    let pods = json!({"items": [{"spec": {"containers": [{"command": flags}]}}]});
    std::fs::write(folder.path().join("pods.json"), pods.to_string()).unwrap();
    std::fs::write(folder.path().join("nodes.json"), json!({"items": nodes}).to_string()).unwrap();
    folder
}

fn node(name: &str, ip: &str, port: u16) -> Value {
    json!({
        "metadata": {"name": name},
        "status": {
            "addresses": [{"type": "InternalIP", "address": ip}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": port}},
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}],
        },
    })
}

async fn check(home: &Path, cluster: &TempDir, line: &str) -> Said {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = command(home, &format!("kube check {line}"));
    command.env("PATH", format!("{}:{path}", cluster.path().display()));
    finish(command.spawn().unwrap(), b"").await
}

/// Verdict and finding of each check of a node.
fn of(said: &Said, node: &str) -> Vec<String> {
    let report = said.json();
    let checks = report["checks"].as_array().unwrap().iter().filter(|c| c["about"] == node);
    checks
        .map(|c| format!("{} {} {}", c["verdict"].as_str().unwrap(), c["check"].as_str().unwrap(), c["says"]))
        .collect()
}

#[tokio::test]
async fn what_is_wrong_is_found_and_said() {
    let mesh = Mesh::with(&["--edges", "2"]);
    let home = mesh.home();
    // The echo service stands in for kubelet.
    let kubelet = |edge: usize| mesh.address(&format!("/edges/{edge}/echo")).port();
    let bad = cluster(&[
        node("edge-1", "10.99.0.5", kubelet(0)),
        node("edge-2", "10.99.0.5", kubelet(1)),
        node("edge-9", "10.99.0.9", 10250),
    ]);
    let said = check(&home, &bad, "-o json").await;
    said.failed(1, "checks failed");
    assert!(of(&said, "edge-1").iter().any(|c| c.starts_with("fail address") && c.contains("ambiguous")), "{said:?}");
    assert!(of(&said, "edge-1").iter().any(|c| c.starts_with("fail policy")), "{said:?}");
    assert!(
        of(&said, "edge-9").iter().any(|c| c.starts_with("fail node") && c.contains("no edge is called")),
        "{said:?}"
    );
    assert_eq!(said.json()["ok"], false);

    mesh.run("policy allow --from apiserver --to edge/* --ports *").await.done();
    let good = cluster(&[node("edge-1", "10.99.0.5", kubelet(0)), node("edge-2", "10.99.0.6", kubelet(1))]);
    let said = check(&home, &good, "-o json").await.done();
    for edge in ["edge-1", "edge-2"] {
        let found = of(&said, edge);
        assert!(matches!(&found[..], [one] if one.starts_with("ok node") && one.contains("answers")), "{found:?}");
    }
    let table = check(&home, &good, "--node edge-2").await.done();
    assert!(table.text().contains("InternalIP") && !table.text().contains("edge-1"), "{table:?}");

    // A door that nobody has opened.
    let said = check(&home, &good, "--node edge-1 --door /nonexistent/egress.sock").await;
    said.failed(1, "1 check failed");
    assert!(said.text().contains("/nonexistent/egress.sock"), "{said:?}");
    let said = check(&home, &good, "--node moon").await;
    said.failed(1, "1 check failed");
}

#[tokio::test]
async fn a_cluster_that_cannot_be_asked_is_one_line() {
    let mesh = Mesh::shared();
    let empty = cluster(&[]);
    std::fs::write(
        empty.path().join("kubectl"),
        "#!/bin/sh\necho 'error: no configuration has been provided' >&2\nexit 1\n",
    )
    .unwrap();
    let said = check(&mesh.home(), &empty, "").await;
    said.failed(1, "1 check failed");
    assert!(
        said.text().contains("no configuration has been provided") && said.text().contains("--kubeconfig"),
        "{said:?}"
    );
}
