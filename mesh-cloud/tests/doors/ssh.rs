//! The SSH door, with a client that does exactly what a test wants. Stock OpenSSH is in `e2e/jump`.

use std::{sync::Arc, time::Duration};

use proto::{
    api::{Revoked, WatchEvent},
    id::GroupName,
    identity::Role,
    ssh::{GROUPS_EXTENSION, Key, Trust, key_name, serial_name},
};
use russh::{
    ChannelMsg, ChannelStream, Disconnect,
    client::{self, Handle, Msg},
    keys::{PrivateKeyWithHashAlg, PublicKeyOrCertificate},
};
use ssh_key::{Certificate, PrivateKey, PublicKey, certificate::Builder, private::Ed25519Keypair};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

use super::mesh::{Ended, Mesh, PATIENCE, Stage, echo, until};

/// More than may wait anywhere on the way.
const MUCH: usize = 48 * 1024 * 1024;

/// A client that takes any host for the right one.
struct Trusting;

impl client::Handler for Trusting {
    type Error = russh::Error;

    async fn check_server_key(&mut self, _: &PublicKeyOrCertificate) -> Result<bool, Self::Error> {
        Ok(true)
    }
}

fn key(seed: u8) -> PrivateKey {
    PrivateKey::from(Ed25519Keypair::from_seed(&[seed; 32]))
}

fn line(key: &PrivateKey) -> String {
    PublicKey::new(key.public_key().key_data().clone(), "").to_openssh().unwrap().trim_end().to_owned()
}

const AUTHORITY: u8 = 1;
const ALICE: u8 = 2;
const REGISTERED: u8 = 3;
const SERIAL: u64 = 77;

/// A certificate for the key of Alice.
fn certificate(authority: u8, user: &str, from_now: std::ops::Range<i64>) -> Certificate {
    let at = |offset| u64::try_from(runtime::clock::unix_now() + offset).unwrap();
    let public = key(ALICE).public_key().key_data().clone();
    let mut builder = Builder::new([7; 16], public, at(from_now.start), at(from_now.end)).unwrap();
    builder.serial(SERIAL).unwrap().valid_principal(user).unwrap().extension(GROUPS_EXTENSION, "people").unwrap();
    builder.sign(&key(authority)).unwrap()
}

struct World {
    mesh: Mesh,
    _dir: TempDir,
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mesh = Mesh::start_with_config(&[], |config| {
            config.doors.ssh = Some("127.0.0.1:0".parse().unwrap());
            config.data_dir = dir.path().to_owned();
            config.drain_secs = 10;
        })
        .await;
        let registered = Key {
            id: "k1".into(),
            fingerprint: String::new(),
            user: "alice".parse().unwrap(),
            groups: Vec::<GroupName>::new(),
            key: line(&key(REGISTERED)),
            comment: String::new(),
            created: 0,
            created_by: "user/alice".into(),
        };
        let trust = Trust { authorities: vec![line(&key(AUTHORITY))], keys: vec![registered] };
        let world = Self { mesh, _dir: dir };
        world.hears(WatchEvent { revision: 2, ssh: Some(trust), ..WatchEvent::default() });
        world
    }

    /// What a shard does with news of control.
    fn hears(&self, event: WatchEvent) {
        let next = Arc::new(self.mesh.state.borrow().after(event));
        self.mesh.state.send_replace(Arc::clone(&next));
        self.mesh.live.end_where(|credential| next.is_good(credential));
    }

    async fn connect(&self) -> Handle<Trusting> {
        let config = client::Config { nodelay: true, ..client::Config::default() };
        let connecting = client::connect(Arc::new(config), self.mesh.shard.ssh.unwrap(), Trusting);
        timeout(PATIENCE, connecting).await.expect("a connection in time").unwrap()
    }

    async fn by_certificate(&self) -> Handle<Trusting> {
        let mut client = self.connect().await;
        assert!(shows(&mut client, certificate(AUTHORITY, "alice", -60..600)).await);
        client
    }

    async fn by_key(&self, seed: u8) -> (bool, Handle<Trusting>) {
        let mut client = self.connect().await;
        let shown = PrivateKeyWithHashAlg::new(Arc::new(key(seed)), None);
        let result = client.authenticate_publickey("anybody", shown).await.unwrap();
        (result.success(), client)
    }
}

async fn shows(client: &mut Handle<Trusting>, certificate: Certificate) -> bool {
    client.authenticate_openssh_cert("anybody", Arc::new(key(ALICE)), certificate).await.unwrap().success()
}

async fn open(client: &Handle<Trusting>, host: &str, port: u16) -> Result<ChannelStream<Msg>, russh::Error> {
    let opening = client.channel_open_direct_tcpip(host, port.into(), "127.0.0.1", 1);
    Ok(timeout(PATIENCE, opening).await.expect("an answer in time")?.into_stream())
}

#[tokio::test]
async fn a_certificate_and_a_registered_key_open_the_door_and_nothing_else_does() {
    let mut world = World::new().await;
    let port = echo().await;
    let client = world.by_certificate().await;
    let mut stream = open(&client, "shop-1", port).await.unwrap();
    stream.write_all(b"hello").await.unwrap();
    let mut answer = [0; 5];
    timeout(PATIENCE, stream.read_exact(&mut answer)).await.unwrap().unwrap();
    assert_eq!(&answer, b"hello");
    stream.shutdown().await.unwrap();
    assert_eq!(timeout(PATIENCE, stream.read(&mut answer)).await.unwrap().unwrap(), 0);
    let record = world.mesh.record().await;
    assert_eq!((record.door.as_str(), record.who.as_str(), &*record.outcome), ("ssh", "user/alice", "finished"));
    assert_eq!((record.up, record.down), (5, 5));

    let (known, client) = world.by_key(REGISTERED).await;
    assert!(known && open(&client, "shop-1.mesh.test", port).await.is_ok());
    assert!(!world.by_key(99).await.0, "a key that nobody knows");
    for (wrong, why) in [
        (certificate(AUTHORITY, "alice", -600..-60), "it has ended"),
        (certificate(AUTHORITY, "alice", 60..600), "it has not begun"),
        (certificate(99, "alice", -60..600), "somebody else signed it"),
        (certificate(AUTHORITY, "Not A Name", -60..600), "it names nobody"),
    ] {
        assert!(!shows(&mut world.connect().await, wrong).await, "{why}");
    }
}

#[tokio::test]
async fn a_channel_that_may_not_be_is_refused_and_leaves_a_record() {
    let mut world = World::new().await;
    let client = world.by_certificate().await;
    let refused = |result: Result<ChannelStream<Msg>, russh::Error>| match result {
        Err(russh::Error::ChannelOpenFailure(failure)) => failure.code(),
        other => panic!("{:?}", other.err()),
    };
    assert_eq!(refused(open(&client, "plant-1", 22).await), 1, "no rule allows it");
    assert_eq!(world.mesh.record().await.code, "policy-denied");
    assert_eq!(refused(open(&client, "shop-9", 22).await), 1, "there is none");
    assert_eq!(refused(open(&client, "10.0.0.1", 22).await), 1, "an address means nothing");
    let closed = {
        let stage = Stage::new().await;
        stage.port()
    };
    assert_eq!(refused(open(&client, "shop-1", closed).await), 2, "nobody listens");
    assert!(matches!(client.channel_open_session().await, Err(russh::Error::ChannelOpenFailure(_))));
    assert!(client.channel_open_direct_streamlocal("/run/x").await.is_err());
    assert!(client.tcpip_forward("localhost", 1).await.is_err());
    // And it is still good for what it is for.
    assert!(open(&client, "shop-1", echo().await).await.is_ok());
}

#[tokio::test]
async fn each_direction_ends_by_itself_and_a_break_is_no_end() {
    let world = World::new().await;
    let stage = Stage::new().await;
    let client = world.by_certificate().await;
    let mut stream = open(&client, "shop-1", stage.port()).await.unwrap();
    let mut target = stage.enter().await;
    stream.write_all(b"question").await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(target.rest().await, ("question".into(), Ended::Cleanly));
    target.say("answer").await;
    target.finish().await;
    let mut answer = String::new();
    timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert_eq!(answer, "answer");

    // A target that resets: the channel is closed without an end.
    let mut channel = client.channel_open_direct_tcpip("shop-1", stage.port().into(), "127.0.0.1", 1).await.unwrap();
    stage.enter().await.reset();
    let mut heard = vec![];
    let hearing = async {
        while let Some(message) = channel.wait().await {
            heard.push(matches!(message, ChannelMsg::Eof));
            if matches!(message, ChannelMsg::Close) {
                return;
            }
        }
    };
    timeout(PATIENCE, hearing).await.expect("the channel is closed");
    assert!(!heard.contains(&true), "no end came before");

    // A client that goes away: the target sees a reset.
    let stream = open(&client, "shop-1", stage.port()).await.unwrap();
    let mut target = stage.enter().await;
    client.disconnect(Disconnect::ByApplication, "", "").await.unwrap();
    assert_eq!(target.rest().await.1, Ended::ByReset);
    drop(stream);
}

#[tokio::test]
async fn much_goes_both_ways_at_once_and_arrives_whole() {
    let world = World::new().await;
    let port = echo().await;
    let client = world.by_certificate().await;
    let stream = open(&client, "shop-1", port).await.unwrap();
    let (mut reader, mut writer) = tokio::io::split(stream);
    let piece: Vec<u8> = (0..=250).cycle().take(64 * 1024 + 3).collect();
    let pieces = MUCH / piece.len();
    let sending = async {
        for _ in 0..pieces {
            writer.write_all(&piece).await.unwrap();
        }
        writer.shutdown().await.unwrap();
    };
    let reading = async {
        let mut heard = vec![0; piece.len()];
        for _ in 0..pieces {
            reader.read_exact(&mut heard).await.unwrap();
            assert_eq!(heard, piece);
        }
    };
    let both = async { tokio::join!(sending, reading) };
    timeout(Duration::from_secs(60), both).await.expect("nobody waits for the other for ever");
}

#[tokio::test]
async fn a_target_that_does_not_read_slows_its_client_down_and_is_cut_when_others_wait() {
    let world = World::new().await;
    let (stage, port) = (Stage::new().await, echo().await);
    let client = world.by_certificate().await;
    let stalled = open(&client, "shop-1", stage.port()).await.unwrap();
    let silent = stage.enter().await;
    let (_, mut writer) = tokio::io::split(stalled);
    let sent = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = Arc::clone(&sent);
    let sending = tokio::spawn(async move {
        let piece = vec![0; 64 * 1024];
        while writer.write_all(&piece).await.is_ok() {
            counted.fetch_add(piece.len(), std::sync::atomic::Ordering::Relaxed);
        }
    });
    // Alone, it may wait for any time, and is held back.
    let now = || sent.load(std::sync::atomic::Ordering::Relaxed);
    until(|| now() > 4 * 1024 * 1024).await;
    let mut before = 0;
    let standstill = async {
        while now() != before {
            before = now();
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    timeout(PATIENCE, standstill).await.expect("it is held back");
    assert!(now() < 64 * 1024 * 1024, "{} bytes were taken for a target that takes nothing", now());
    // Beside it somebody else comes, and gets through before long.
    let mut stream = open(&client, "shop-1", port).await.unwrap();
    stream.write_all(b"hello").await.unwrap();
    let mut answer = [0; 5];
    timeout(PATIENCE, stream.read_exact(&mut answer)).await.expect("it gets through").unwrap();
    sending.abort();
    drop(silent);
}

#[tokio::test]
async fn who_is_revoked_loses_what_is_open() {
    let world = World::new().await;
    let port = echo().await;
    // Those of the edges.
    let before = world.mesh.live.len();
    let by_certificate = world.by_certificate().await;
    let (_, by_key) = world.by_key(REGISTERED).await;
    let mut streams = vec![];
    for client in [&by_certificate, &by_key] {
        streams.push(open(client, "shop-1", port).await.unwrap());
    }
    assert_eq!(world.mesh.live.len(), before + 2);
    let revoked =
        Revoked { serial: serial_name(SERIAL), role: Role::User, name: "alice".parse().unwrap(), not_after: i64::MAX };
    world.hears(WatchEvent { revision: 3, revoked: Some(vec![revoked]), ..WatchEvent::default() });
    until(|| by_certificate.is_closed()).await;
    assert!(!by_key.is_closed(), "the key is another credential");
    assert!(world.mesh.state.borrow().is_good(&key_name("k1")));
    let trust = Trust { authorities: vec![line(&key(AUTHORITY))], keys: vec![] };
    world.hears(WatchEvent { revision: 4, ssh: Some(trust), ..WatchEvent::default() });
    until(|| by_key.is_closed()).await;
    assert!(!shows(&mut world.connect().await, certificate(AUTHORITY, "alice", -60..600)).await);
    drop(streams);
    until(|| world.mesh.live.len() == before).await;
}

#[tokio::test]
async fn a_shard_that_leaves_lets_channels_end_and_idle_connections_go() {
    let world = World::new().await;
    let stage = Stage::new().await;
    let (busy, idle) = (world.by_certificate().await, world.by_certificate().await);
    let mut stream = open(&busy, "shop-1", stage.port()).await.unwrap();
    let mut target = stage.enter().await;
    world.mesh.tasks.stop();
    until(|| idle.is_closed()).await;
    assert!(!busy.is_closed());
    stream.write_all(b"last words").await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(target.rest().await, ("last words".into(), Ended::Cleanly));
    target.say("heard").await;
    target.finish().await;
    let mut answer = String::new();
    timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert_eq!(answer, "heard");
    until(|| busy.is_closed()).await;
}
