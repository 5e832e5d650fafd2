//! What an SSH client may do: show a key, and open channels to targets. russh calls this for whatever arrives, one after
//! the other, and does nothing else meanwhile: nothing here waits for anybody but control's first word.

use std::{net::SocketAddr, sync::Arc};

use bytes::Bytes;
use proto::{
    code::{Fault, RefuseCode},
    principal::Principal,
    proxy::destination::Destination,
    stream::Refusal,
    target::{HostPort, Target},
};
use runtime::clock;
use russh::{
    Channel, ChannelId, ChannelOpenFailure,
    server::{Auth, ChannelOpenHandle, Handler, Msg, PublicKeyOffer, Session, VerifiedPublicKey},
};
use ssh_key::{Algorithm, Certificate};

use super::{
    DOOR, SshDoor,
    connection::{Admitted, Connection},
    lane::{ChannelEnd, Lane},
    who::{self, Facts},
};
use crate::{flow::Opened, route::Request, state::MeshState};

/// Why a session is refused.
const JUMP_ONLY: &str = "this is a jump host and has no shell, no commands and no files of its own: name the edge, as in \
                         'ssh -J THIS-HOST USER@EDGE'";
const TARGETS_ONLY: &str = "a jump host opens connections to edges and nothing else";
/// Why a key is refused. russh does not say that it came with a certificate whose time was over.
const UNKNOWN: &str = "the key is not registered for a user, and came without a certificate or with one that has ended";

/// The part of a connection that russh calls.
pub(super) struct Visit {
    pub(super) door: Arc<SshDoor>,
    pub(super) connection: Arc<Connection>,
    pub(super) from: SocketAddr,
}

impl Handler for Visit {
    type Error = russh::Error;

    async fn auth_publickey_offered(&mut self, _: &str, offer: PublicKeyOffer<'_>) -> Result<Auth, Self::Error> {
        // It is not told whether this is the key of a certificate, so any key may be good. SHA-1 is not.
        let sha1 = matches!(offer.algorithm, Algorithm::Rsa { hash: None });
        Ok(if sha1 { Auth::reject() } else { Auth::Accept })
    }

    async fn auth_publickey(&mut self, _: &str, key: VerifiedPublicKey<'_>) -> Result<Auth, Self::Error> {
        let state = self.state().await;
        let holder = who::line(key.public_key.key_data()).and_then(|line| state.key_holder(&line));
        let admitted = holder.ok_or_else(|| UNKNOWN.to_owned()).map(|holder| Admitted {
            principal: holder.principal,
            credential: holder.key,
            not_after: None,
        });
        Ok(self.decide("key", admitted, &state))
    }

    async fn auth_openssh_certificate(&mut self, _: &str, certificate: &Certificate) -> Result<Auth, Self::Error> {
        let state = self.state().await;
        let admitted = Facts::of(certificate, clock::unix_now()).map_err(|e| e.to_string()).and_then(|facts| {
            if !state.is_ssh_authority(&facts.authority) {
                return Err("an authority signed it that is not this mesh's".to_owned());
            }
            Ok(Admitted {
                principal: Principal::User { name: facts.user, groups: facts.groups },
                credential: proto::ssh::serial_name(facts.serial),
                not_after: Some(facts.not_after),
            })
        });
        Ok(self.decide("certificate", admitted, &state))
    }

    async fn channel_open_direct_tcpip(
        &mut self,
        channel: Channel<Msg>,
        host: &str,
        port: u32,
        _: &str,
        _: u32,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), Self::Error> {
        let (id, (_, write)) = (channel.id(), channel.split());
        let held = match self.connection.take_channel(&self.door) {
            Ok(held) => held,
            Err(refusal) => {
                reply.reject(failure(&refusal)).await;
                return Ok(());
            }
        };
        let lane = Arc::new(Lane::default());
        self.connection.lanes.lock().insert(id, Arc::clone(&lane));
        let end = ChannelEnd { lane, write: Arc::new(write) };
        let asked = Asked { host: host.to_owned(), port, from: self.from };
        let (door, connection) = (Arc::clone(&self.door), Arc::clone(&self.connection));
        self.door.tasks.spawn(async move {
            serve(&door, &connection, asked, (end, reply)).await;
            connection.lanes.lock().remove(&id);
            drop(held);
        });
        Ok(())
    }

    async fn channel_open_session(
        &mut self,
        _: Channel<Msg>,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), Self::Error> {
        self.refuse(reply, JUMP_ONLY).await
    }

    async fn channel_open_x11(
        &mut self,
        _: Channel<Msg>,
        _: &str,
        _: u32,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), Self::Error> {
        self.refuse(reply, TARGETS_ONLY).await
    }

    async fn channel_open_forwarded_tcpip(
        &mut self,
        _: Channel<Msg>,
        _: &str,
        _: u32,
        _: &str,
        _: u32,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), Self::Error> {
        self.refuse(reply, TARGETS_ONLY).await
    }

    async fn channel_open_direct_streamlocal(
        &mut self,
        _: Channel<Msg>,
        _: &str,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), Self::Error> {
        self.refuse(reply, "a jump host opens TCP connections to edges, and no unix sockets").await
    }

    async fn data(&mut self, channel: ChannelId, data: &[u8], _: &mut Session) -> Result<(), Self::Error> {
        let lane = self.connection.lanes.lock().get(&channel).cloned();
        if let Some(lane) = lane {
            let waiting = lane.push(Bytes::copy_from_slice(data));
            self.connection.has_waiting(&lane, waiting);
        }
        Ok(())
    }

    async fn channel_eof(&mut self, channel: ChannelId, _: &mut Session) -> Result<(), Self::Error> {
        if let Some(lane) = self.connection.lanes.lock().get(&channel) {
            lane.finish();
        }
        Ok(())
    }

    async fn channel_close(&mut self, channel: ChannelId, _: &mut Session) -> Result<(), Self::Error> {
        if let Some(lane) = self.connection.lanes.lock().get(&channel) {
            lane.closed();
        }
        Ok(())
    }
}

impl Visit {
    async fn state(&self) -> Arc<MeshState> {
        // Without a word of control nobody is known, and the client is told no.
        let _ = self.door.router.knows_people().await;
        self.door.router.state()
    }

    fn decide(&self, by: &'static str, shown: Result<Admitted, String>, state: &MeshState) -> Auth {
        let logins = &self.door.router.metrics().ssh_logins;
        let refused = match shown {
            Ok(admitted) if !state.is_good(&admitted.credential) => "it is revoked".to_owned(),
            Ok(admitted) => {
                let who = admitted.principal.to_string();
                match self.connection.admit(admitted, &self.door) {
                    Ok(()) => {
                        logins.with_label_values(&[by, "ok"]).inc();
                        tracing::debug!(from = %self.from, who, by, "let in by SSH");
                        return Auth::Accept;
                    }
                    Err(why) => why,
                }
            }
            Err(why) => why,
        };
        logins.with_label_values(&[by, "refused"]).inc();
        tracing::info!(from = %self.from, by, why = refused, "an SSH client was not let in");
        Auth::reject()
    }

    async fn refuse(&self, reply: ChannelOpenHandle, why: &str) -> Result<(), russh::Error> {
        self.door.router.metrics().door_refusals.with_label_values(&[DOOR, "channel"]).inc();
        reply.reject(failure(&Refusal::because(RefuseCode::Unsupported, why))).await;
        Ok(())
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.connection.end();
    }
}

/// Where a client wants to go.
struct Asked {
    host: String,
    port: u32,
    from: SocketAddr,
}

/// Serves one channel. It is confirmed when the target is connected: before, the client may not send, and only a channel
/// that is not open can be refused with a sentence.
async fn serve(door: &SshDoor, connection: &Connection, asked: Asked, (end, reply): (ChannelEnd, ChannelOpenHandle)) {
    let opened = tokio::select! {
        biased;
        () = connection.over.cancelled() => return,
        opened = open(door, connection, asked) => opened,
    };
    let opened = match opened {
        Ok(opened) => opened,
        Err(refusal) => {
            tracing::debug!(code = %refusal.code, reason = refusal.reason, "an SSH channel was refused");
            return reply.reject(failure(&refusal)).await;
        }
    };
    reply.accept().await;
    let write = Arc::clone(&end.write);
    opened.splice(end).await;
    tokio::select! {
        biased;
        () = connection.over.cancelled() => {}
        // Behind an end in both directions that is the usual thing; without, it is how SSH says that something broke.
        _ = write.close() => {}
    }
}

async fn open(door: &SshDoor, connection: &Connection, asked: Asked) -> Result<Opened, Refusal> {
    let admitted = connection.admitted().ok_or_else(|| Refusal::new(RefuseCode::Unauthenticated))?;
    if let Some(ended) = admitted.not_after.filter(|end| *end < clock::unix_now()) {
        let ago = clock::unix_now().saturating_sub(ended);
        let reason = format!(
            "the SSH certificate of this connection ended {ago} s ago: get a new one with 'meshctl ssh-cert' and \
             connect again"
        );
        return Err(Refusal::because(RefuseCode::Unauthenticated, reason));
    }
    let target = target(&asked, &door.domain, &door.router.state())?;
    let request = Request::new(admitted.principal.clone(), asked.from.to_string(), DOOR, target);
    let request = Request { credential: Some(admitted.credential.clone()), ..request };
    door.router.open(request).await?.opened().await
}

/// What a host and a port mean: `EDGE`, `EDGE.DOMAIN` and `SERVICE.EDGE.DOMAIN` as at the proxy door, and `EDGE/HOST`
/// for a host that the edge reaches.
fn target(asked: &Asked, domain: &str, state: &MeshState) -> Result<Target, Refusal> {
    let wrong = |why: String| Refusal::because(RefuseCode::BadRequest, why);
    let port = u16::try_from(asked.port).ok().filter(|port| *port != 0);
    let port = port.ok_or_else(|| wrong(format!("{} is no port", asked.port)))?;
    let Some((edge, host)) = asked.host.split_once('/') else {
        return Destination { host: asked.host.clone(), port }.target(domain, |edge| state.edges.contains_key(edge));
    };
    let edge = edge.to_ascii_lowercase();
    let edge = edge.strip_suffix(domain).and_then(|e| e.strip_suffix('.')).unwrap_or(&edge);
    let edge = edge.parse().map_err(|e| wrong(format!("{:?} leads nowhere: {e}", asked.host)))?;
    let to = HostPort::new(host.trim_matches(['[', ']']), port).map_err(|e| wrong(e.to_string()))?;
    Ok(Target::Tcp { edge, to })
}

/// A refusal as SSH has them (RFC 4254, 5.1): OpenSSH prints a word for the number, and then our sentence.
fn failure(refusal: &Refusal) -> ChannelOpenFailure {
    /// `SSH_OPEN_ADMINISTRATIVELY_PROHIBITED`, `SSH_OPEN_CONNECT_FAILED`, `SSH_OPEN_RESOURCE_SHORTAGE`.
    const PROHIBITED: u32 = 1;
    const FAILED: u32 = 2;
    const SHORTAGE: u32 = 4;
    let code = match (refusal.code, refusal.code.fault()) {
        (RefuseCode::LimitReached, _) => SHORTAGE,
        (_, Fault::Policy | Fault::Client) => PROHIBITED,
        (_, Fault::Mesh | Fault::Edge | Fault::Target) => FAILED,
    };
    ChannelOpenFailure::Other { code, reason: refusal.reason.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_lead_to_edges_and_to_what_is_beside_them() {
        let of = |host: &str, port| {
            let asked = Asked { host: host.into(), port, from: "192.0.2.1:1".parse().unwrap() };
            target(&asked, "mesh.test", &MeshState::default()).map(|t| t.to_string()).map_err(|r| r.code)
        };
        assert_eq!(of("shop-1", 22).unwrap(), "shop-1:22");
        assert_eq!(of("shop-1.mesh.test", 2222).unwrap(), "shop-1:2222");
        assert_eq!(of("ssh.shop-1.mesh.test", 22).unwrap(), "shop-1/ssh");
        assert_eq!(of("shop-1/10.0.0.5", 22).unwrap(), "shop-1/10.0.0.5:22");
        assert_eq!(of("shop-1.mesh.test/nas.local", 22).unwrap(), "shop-1/nas.local:22");
        assert_eq!(of("shop-1/[fd00::5]", 22).unwrap(), "shop-1/[fd00::5]:22");
        for (host, port) in [("shop-1", 0), ("shop-1", 65_536), ("/x", 22), ("-a", 22), ("shop-1/a b", 22)] {
            assert_eq!(of(host, port), Err(RefuseCode::BadRequest), "{host} {port}");
        }
        assert_eq!(of("10.0.0.1", 22), Err(RefuseCode::Unsupported));
    }

    #[test]
    fn a_refusal_keeps_its_sentence() {
        for (code, wanted) in
            [(RefuseCode::PolicyDenied, 1), (RefuseCode::EdgeOffline, 2), (RefuseCode::LimitReached, 4)]
        {
            let failure = failure(&Refusal::because(code, "why"));
            assert_eq!((failure.code(), failure.description()), (wanted, "why"));
        }
    }
}
