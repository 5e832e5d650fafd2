//! The stories of SSH, told on each database.

use std::{fs, os::unix::fs::PermissionsExt, time::Duration};

use proto::{
    api::{ApiCode, TokenKind, WatchEvent},
    id::GroupName,
    ssh::{
        Authorities, Certificate as Signed, GROUPS_EXTENSION, HostCertificateRequest, Key, KeyRequest,
        UserCertificateRequest, serial_name,
    },
};
use ssh_key::{Certificate, HashAlg, PublicKey, certificate::CertType};

use super::world::{Kind, Member, World, code, event};

const SECOND: Duration = Duration::from_secs(1);
const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILM+rvN+ot98qgEN796jTiQfZfG1KaT0PtFDJ/XFSqti alice@laptop";

async fn person(world: &World, name: &str, groups: &[&str]) -> Member {
    let join = world.join(TokenKind::User, |request| {
        request.name = Some(name.parse().unwrap());
        request.groups = groups.iter().map(|g| g.parse().unwrap()).collect();
    });
    world.enrol(&join.await, None, &[]).await.unwrap()
}

fn asked(key: &str, groups: &[&str]) -> KeyRequest {
    KeyRequest { key: key.into(), groups: groups.iter().map(|g| g.parse().unwrap()).collect() }
}

fn fingerprint(line: &str) -> ssh_key::Fingerprint {
    PublicKey::from_openssh(line).unwrap().fingerprint(HashAlg::Sha256)
}

/// A user's certificate names the user and nobody else, ends in time, and is revoked with its user.
pub(crate) async fn a_user_gets_a_certificate_and_loses_it(kind: Kind) {
    let world = World::with(kind, |config| config.ssh_certificate_secs = 7200).await;
    let (admin, alice) = (world.admin().await, person(&world, "alice", &["ops", "people"]).await);
    let shard = world.member(TokenKind::Shard, "s1").await;
    let mut watch = shard.client.watch().await.unwrap();
    let first: WatchEvent = watch.next().await.unwrap();
    let authorities: Authorities = alice.client.get("/v1/ssh/authorities").await.unwrap();
    assert_eq!(first.ssh.unwrap().authorities, authorities.user, "shards know who signs");
    let mode = fs::metadata(world.config.data_dir.join("ssh-user-ca")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let sign = async |key: &str, ttl_secs| {
        let request = UserCertificateRequest { key: key.into(), ttl_secs };
        alice.client.post::<Signed>("/v1/ssh/user-certificates", &request).await
    };
    let signed = sign(KEY, None).await.unwrap();
    let certificate = Certificate::from_openssh(&signed.certificate).unwrap();
    assert_eq!((certificate.cert_type(), certificate.valid_principals()), (CertType::User, &["alice".to_owned()][..]));
    assert_eq!(certificate.extensions().get(GROUPS_EXTENSION).map(String::as_str), Some("ops people"));
    assert_eq!(signed.not_after - signed.not_before, 600 + 7200 - 1, "no longer than control allows");
    assert_eq!(signed.hosts, authorities.host);
    let now = u64::try_from(runtime::clock::unix_now()).unwrap();
    certificate.validate_at(now, [&fingerprint(&authorities.user[0])]).unwrap();
    let short = sign(KEY, Some(300)).await.unwrap();
    assert_eq!(short.not_after - short.not_before, 75 + 300 - 1, "as short as it was asked for");
    let long = sign(KEY, Some(u32::MAX)).await.unwrap();
    assert_eq!(long.not_after - long.not_before, 600 + 7200 - 1);
    for wrong in ["", "ssh-ed25519 AAAA", "-----BEGIN OPENSSH PRIVATE KEY-----"] {
        assert_eq!(code(sign(wrong, None).await), ApiCode::BadRequest, "{wrong}");
    }
    let request = UserCertificateRequest { key: KEY.into(), ttl_secs: None };
    assert_eq!(code(shard.client.post::<Signed>("/v1/ssh/user-certificates", &request).await), ApiCode::Forbidden);

    admin.client.post::<()>("/v1/users/alice/revoke", &()).await.unwrap();
    let name = serial_name(certificate.serial());
    let fits = |e: &WatchEvent| e.revoked.as_ref().is_some_and(|all| all.iter().any(|r| r.serial == name));
    event(&mut watch, SECOND, fits).await;
    assert_eq!(code(sign(KEY, None).await), ApiCode::Revoked);
    world.end().await;
}

/// A shard's host certificate holds for its names, and never for those of control.
pub(crate) async fn a_shard_gets_a_host_certificate(kind: Kind) {
    let world = World::with(kind, |config| config.names = vec!["127.0.0.1".into(), "control.test".into()]).await;
    let shard = world.member(TokenKind::Shard, "s1").await;
    let sign = async |names: &[&str]| {
        let names = names.iter().map(ToString::to_string).collect();
        let request = HostCertificateRequest { key: KEY.into(), names };
        shard.client.post::<Signed>("/v1/ssh/host-certificates", &request).await
    };
    let signed = sign(&["Shard.Example.org", "192.0.2.1", "localhost"]).await.unwrap();
    let certificate = Certificate::from_openssh(&signed.certificate).unwrap();
    assert_eq!(certificate.cert_type(), CertType::Host);
    assert_eq!(certificate.valid_principals(), ["s1", "shard.example.org", "192.0.2.1", "localhost"]);
    let now = u64::try_from(runtime::clock::unix_now()).unwrap();
    certificate.validate_at(now, [&fingerprint(&signed.hosts[0])]).unwrap();
    for wrong in [&["control.test"][..], &["a b"], &["*"]] {
        assert_eq!(code(sign(wrong).await), ApiCode::BadRequest, "{wrong:?}");
    }
    let alice = person(&world, "alice", &["admin"]).await;
    let request = HostCertificateRequest { key: KEY.into(), names: vec![] };
    assert_eq!(code(alice.client.post::<Signed>("/v1/ssh/host-certificates", &request).await), ApiCode::Forbidden);
    world.end().await;
}

/// Users keep their own keys, administrators those of all, and shards hear of each change.
pub(crate) async fn keys_are_registered_and_removed(kind: Kind) {
    let world = World::new(kind).await;
    let admin = world.admin().await;
    let (alice, bob) = (person(&world, "alice", &["ops"]).await, person(&world, "bob", &[]).await);
    let shard = world.member(TokenKind::Shard, "s1").await;
    let mut watch = shard.client.watch().await.unwrap();
    assert!(watch.next().await.unwrap().ssh.unwrap().keys.is_empty());
    let path = "/v1/users/alice/keys";

    let key: Key = alice.client.post(path, &asked(KEY, &[])).await.unwrap();
    assert_eq!((key.comment.as_str(), key.groups.as_slice()), ("alice@laptop", &["ops".parse().unwrap()][..]));
    assert_eq!(key.fingerprint, fingerprint(KEY).to_string());
    let heard = event(&mut watch, SECOND, |e| e.ssh.is_some()).await.ssh.unwrap();
    assert_eq!(heard.keys, std::slice::from_ref(&key));
    assert_eq!(alice.client.get::<Vec<Key>>(path).await.unwrap(), std::slice::from_ref(&key));
    assert_eq!(admin.client.get::<Vec<Key>>(path).await.unwrap(), std::slice::from_ref(&key));

    assert_eq!(code(bob.client.get::<Vec<Key>>(path).await), ApiCode::Forbidden);
    assert_eq!(code(bob.client.post::<Key>(path, &asked(KEY, &[])).await), ApiCode::Forbidden);
    let own = bob.client.post::<Key>("/v1/users/bob/keys", &asked(KEY, &[])).await;
    assert_eq!(code(own), ApiCode::BadRequest, "it is the key of somebody else");
    assert_eq!(code(alice.client.post::<Key>(path, &asked(KEY, &["admin"])).await), ApiCode::Forbidden);
    let again: Key = admin.client.post(path, &asked(KEY, &["admin"])).await.unwrap();
    assert_eq!((again.id.as_str(), again.groups.len()), (key.id.as_str(), 1));
    assert_eq!(again.groups[0], "admin".parse::<GroupName>().unwrap());
    assert_eq!(alice.client.get::<Vec<Key>>(path).await.unwrap().len(), 1, "it took the place of the old one");

    let one = format!("{path}/{}", key.id);
    assert_eq!(code(bob.client.delete::<Option<()>>(&one).await), ApiCode::Forbidden);
    alice.client.delete::<Option<()>>(&one).await.unwrap();
    event(&mut watch, SECOND, |e| e.ssh.as_ref().is_some_and(|ssh| ssh.keys.is_empty())).await;
    assert_eq!(code(alice.client.delete::<Option<()>>(&one).await), ApiCode::NotFound);

    alice.client.post::<Key>(path, &asked(KEY, &[])).await.unwrap();
    event(&mut watch, SECOND, |e| e.ssh.as_ref().is_some_and(|ssh| ssh.keys.len() == 1)).await;
    admin.client.post::<()>("/v1/users/alice/revoke", &()).await.unwrap();
    event(&mut watch, SECOND, |e| e.ssh.as_ref().is_some_and(|ssh| ssh.keys.is_empty())).await;
    world.end().await;
}

/// The authorities outlive a restart; a CA that was given brings its own, or there are none.
pub(crate) async fn the_authorities_lie_beside_the_ca(kind: Kind) {
    let world = World::new(kind).await;
    let alice = person(&world, "alice", &[]).await;
    let before: Authorities = alice.client.get("/v1/ssh/authorities").await.unwrap();
    let world = world.restarted(|_| ()).await;
    let client = alice.at(&world.address());
    assert_eq!(client.get::<Authorities>("/v1/ssh/authorities").await.unwrap(), before);

    let data = world.config.data_dir.clone();
    let world = world
        .restarted(|config| {
            (config.ca.cert, config.ca.key) = (Some(data.join("ca.pem")), Some(data.join("ca.key")));
            for file in ["ssh-user-ca", "ssh-host-ca"] {
                fs::rename(data.join(file), data.join(format!("{file}.away"))).unwrap();
            }
        })
        .await;
    let client = alice.at(&world.address());
    assert_eq!(client.get::<Authorities>("/v1/ssh/authorities").await.unwrap(), Authorities::default());
    let request = UserCertificateRequest { key: KEY.into(), ttl_secs: None };
    assert_eq!(code(client.post::<Signed>("/v1/ssh/user-certificates", &request).await), ApiCode::NotFound);
    world.end().await;
}
