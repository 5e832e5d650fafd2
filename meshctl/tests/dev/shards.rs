//! Several shards in one mesh, and what people do with them.

use std::{collections::BTreeSet, path::Path};

use proto::{
    id::EdgeId,
    ring::{Member, Ring, RingSpec},
};
use serde_json::Value;
use tokio::io::AsyncWriteExt;

use crate::mesh::{Mesh, command, eventually, finish, read_until, run};

const EDGES: [&str; 6] = ["edge-1", "edge-2", "edge-3", "edge-4", "edge-5", "edge-6"];

/// Waits until an edge is at its owner. Returns what is said of it.
async fn at_home(home: &Path, edge: &str) -> Value {
    eventually(home, &format!("ring explain {edge} -o json"), |said| said.json()["home"] == true).await.json()
}

fn owner(explained: &Value) -> &str {
    explained["owner"].as_str().unwrap()
}

/// Whether every edge answers, again and again, whichever shard it is asked through.
async fn all_answer(mesh: &Mesh) {
    let mut through = BTreeSet::new();
    for edge in EDGES.iter().cycle().take(3 * EDGES.len()) {
        let report = mesh.run(&format!("ping {edge} -c 1 -o json")).await.done().json();
        assert_eq!(report["received"], 1, "{report}");
        through.insert(report["shard"].as_str().unwrap().to_owned());
    }
    assert!(through.len() > 1, "all through {through:?}");
}

#[tokio::test]
async fn shards_share_the_edges_and_are_drained_under_a_stream() {
    let mesh = Mesh::with(&["--shards", "3", "--edges", "6"]);
    let home = mesh.home();
    let shards = mesh.run("shard ls -o json").await.done().json();
    let shares: f64 = shards.as_array().unwrap().iter().map(|s| s["share"].as_f64().unwrap()).sum();
    assert!((shares - 1.0).abs() < 1e-9 && shards.as_array().unwrap().iter().all(|s| s["standing"] == "serving"));
    let words = mesh.run("shard ls").await.done();
    assert!(words.text().starts_with("NAME     STATE    EDGES  SHARE   STREAMS  WEIGHT  EPOCH"), "{words:?}");

    // Anybody can work out the owner.
    let spec = mesh.run("ring -o json").await.done().json();
    let members: Vec<Member> = serde_json::from_value(spec["members"].clone()).unwrap();
    let ring = Ring::new(RingSpec { epoch: spec["epoch"].as_u64().unwrap(), members });
    for edge in EDGES {
        let id: EdgeId = edge.parse().unwrap();
        assert_eq!(owner(&at_home(&home, edge).await), ring.owner(&id).unwrap().shard.as_str());
    }
    let table = mesh.run("ring").await.done();
    assert!(table.text().starts_with(&format!("epoch {}, 3 shards\nSHARD    SHARE ", ring.epoch())), "{table:?}");
    all_answer(&mesh).await;

    // A stream goes on while its edge moves away and back.
    let mut stream = command(&home, "proxy edge-1/echo").spawn().unwrap();
    let mut talk = async |word: &str| {
        stream.stdin.as_mut().unwrap().write_all(word.as_bytes()).await.unwrap();
        read_until(stream.stdout.as_mut().unwrap(), word).await;
    };
    talk("before").await;
    let before = at_home(&home, "edge-1").await;
    let (first, second) = (owner(&before), before["next"][0].as_str().unwrap());
    let drained = mesh.run(&format!("shard drain {first} --wait --timeout 60s")).await.done();
    assert!(drained.text().contains(&format!("Shard {first} holds no edges any more, after")), "{drained:?}");
    assert!(drained.text().contains(&format!("meshctl shard undrain {first}")), "{drained:?}");
    talk("drained").await;
    assert_eq!(owner(&at_home(&home, "edge-1").await), second, "where the list said that it would go");
    let listed = mesh.run("shard ls -o json").await.done().json();
    let row = listed.as_array().unwrap().iter().find(|s| s["name"] == first).unwrap().clone();
    assert_eq!((&row["standing"], &row["edges"], &row["share"]), (&"draining".into(), &0.into(), &0.0.into()));
    all_answer(&mesh).await;
    mesh.run(&format!("shard undrain {first}")).await.done();
    eventually(&home, "ring explain edge-1 -o json", |said| {
        owner(&said.json()) == first && said.json()["home"] == true
    })
    .await;
    talk("back").await;
    drop(stream.stdin.take());
    finish(stream, b"").await.done();

    // One that is cordoned keeps what it has.
    let cordoned = mesh.run(&format!("shard cordon {first}")).await.done();
    assert!(cordoned.text().contains(&format!("meshctl shard uncordon {first}")), "{cordoned:?}");
    let why = mesh.run("ring explain edge-1").await.done();
    assert!(why.text().contains(&format!("{first} is cordoned")), "{why:?}");
    mesh.run("ping edge-1 -c 1").await.done();
    mesh.run(&format!("shard uncordon {first}")).await.done();
    at_home(&home, "edge-1").await;
}

#[tokio::test]
async fn orders_that_make_no_sense_say_so() {
    let mesh = Mesh::shared();
    mesh.run("shard drain shard-9").await.failed(1, "there is no shard \"shard-9\"");
    mesh.run("shard drain shard-1 --wait").await.failed(1, "only shard in the ring");
    mesh.run("shard drain shard-1 --timeout 5s").await.failed(2, "--wait");
    let heidi = mesh.login("heidi").await;
    run(heidi.path(), "shard cordon shard-1", b"").await.failed(3, "is for users of the group 'admin'");
    run(heidi.path(), "ring", b"").await.done();
    let nobody = mesh.run("ring explain plant.example.org").await.done();
    assert!(nobody.text().contains("No edge plant.example.org is enrolled; this is where it would go."), "{nobody:?}");
    assert!(nobody.text().contains("0xc835a8622facd5e4 on the circle, 78.2 %"), "{nobody:?}");
}

#[tokio::test]
async fn the_last_shard_can_be_taken_out_and_is_warned_of() {
    let mesh = Mesh::with(&["--edges", "1"]);
    let warned = mesh.run("shard cordon shard-1").await.done();
    assert!(warned.err.contains("the only shard in the ring") && warned.text().contains("keeps 1 edge"), "{warned:?}");
    let empty = eventually(&mesh.home(), "ring", |said| said.text().contains("0 shards")).await;
    assert!(empty.text().contains("No shard serves"), "{empty:?}");
    let why = mesh.run("ring explain edge-1").await.done();
    assert!(why.text().contains("The ring is empty"), "{why:?}");
    mesh.run("ping edge-1 -c 1").await.done();
    mesh.run("shard uncordon shard-1").await.done();
    eventually(&mesh.home(), "ring explain edge-1", |said| said.text().contains("where it belongs")).await;
}
