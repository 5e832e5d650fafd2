//! What comes in through the egress door, and the book by which it is read.

// Private parts of the door, taken as files: see `door.rs`.
#[path = "../../mesh-cloud/src/doors/egress/grpc/frames.rs"]
mod frames;
use proto::proxy::connect as head;

use frames::Messages;
use proto::{
    book::{Book, BookChange},
    target::HostPort,
};

/// The head of a CONNECT request.
pub fn egress_head(data: &[u8]) {
    match head::read(data) {
        Ok(Some((to, length))) => {
            assert!(length <= data.len().min(head::MAX_HEAD) && data[..length].ends_with(b"\r\n\r\n"));
            assert_eq!(to.to_string().parse::<HostPort>().as_ref(), Ok(&to));
            // What comes behind a head changes nothing of it.
            assert_eq!(head::read(&data[..length]), Ok(Some((to, length))));
        }
        Ok(None) => assert!(data.len() < head::MAX_HEAD),
        Err(bad) => assert!(!bad.to_string().is_empty()),
    }
}

/// The body of a gRPC call, in pieces whose size the first byte gives.
pub fn egress_packets(data: &[u8]) {
    let [piece, body @ ..] = data else { return };
    let taken = |size: usize| {
        let (mut messages, mut all) = (Messages::default(), Vec::new());
        for chunk in body.chunks(size) {
            messages.push(chunk);
            loop {
                match messages.next() {
                    Ok(Some(packet)) => all.push(packet),
                    Ok(None) => break,
                    Err(bad) => return (all, Some(bad)),
                }
            }
        }
        (all, None)
    };
    let (packets, bad) = taken(body.len().max(1));
    let again = taken(usize::from(*piece) + 1);
    assert_eq!((&packets, bad), (&again.0, again.1), "it depends on how it was cut");
    for packet in packets {
        let mut messages = Messages::default();
        messages.push(&frames::encode(&packet));
        assert_eq!(messages.next(), Ok(Some(packet)));
    }
}

/// A change of the address book, and lookups of whatever it names.
pub fn book(data: &[u8]) {
    let Ok(change) = serde_json::from_slice::<BookChange>(data) else { return };
    let text = serde_json::to_string(&change).expect("what was read can be written");
    assert_eq!(serde_json::from_str::<BookChange>(&text).expect("what was written can be read"), change);
    let mut book = Book::new(change.put.clone());
    for (turn, pod) in change.put.pods.iter().enumerate() {
        for ip in &pod.ips {
            if let Err(why) = book.resolve(&ip.to_string(), 1, turn as u64) {
                assert!(!why.to_string().is_empty());
            }
        }
    }
    for service in &change.put.services {
        let name = format!("{}.{}.svc", service.key.name, service.key.namespace);
        for port in &service.ports {
            let _ = book.resolve(&name, port.port, u64::MAX);
        }
    }
    book.remove(&change.gone);
}
