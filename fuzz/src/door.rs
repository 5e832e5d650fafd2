//! What strangers send to a door.

// The screen is a private part of a shard's HTTP door. It is taken as a file, so that nothing of it has to be made
// public and nothing else of a shard is built here.
#[path = "../../mesh-cloud/src/doors/http/screen.rs"]
mod screen;

// The same for what a visitor of the proxy door shows.
#[path = "../../mesh-cloud/src/doors/proxy/authorization.rs"]
mod authorization;

use proto::proxy::socks;

use self::{authorization::Shown, screen::Screen};

/// The field `Proxy-Authorization` of a request.
pub fn authorization(data: &[u8]) {
    let Some(shown) = Shown::read(data) else { return };
    let (Shown::Basic { token, .. } | Shown::Bearer { token }) = &shown;
    assert!(token.reveal().len() <= data.len(), "more came out than went in");
    assert!(!format!("{shown:?}").contains("token: \""), "a token shows");
}

/// What a visitor says in SOCKS5: the greeting, the login and the request, one after the other.
pub fn socks5(data: &[u8]) {
    let Some(rest) = heard(data, socks::greeting) else { return };
    let Some(rest) = heard(rest, socks::login) else { return };
    let _ = heard(rest, socks::request);
}

/// The head of a datagram in SOCKS5.
pub fn socks5_datagram(data: &[u8]) {
    let Some(((host, _), length)) = socks::addressed(data) else { return };
    assert!(length <= data.len() && length <= 262 && !host.is_empty(), "{length} bytes were taken for a head");
    // What comes behind a head changes nothing of it.
    assert!(socks::addressed(&data[..length]).is_some(), "a whole head is not whole");
}

/// What follows a message, if there is a whole one.
fn heard<T>(data: &[u8], read: fn(&[u8]) -> socks::Heard<T>) -> Option<&[u8]> {
    let (_, length) = read(data).ok()??;
    assert!(length <= 513, "{length} bytes were taken for one message");
    for shorter in 0..length {
        assert!(!matches!(read(&data[..shorter]), Ok(Some(_))), "{shorter} of {length} bytes are whole already");
    }
    Some(&data[length..])
}

/// Lines from here on may end a connection one byte earlier or later, by how they were cut.
const LONG: usize = 1000;

/// A connection of HTTP/1 requests, on its way to the parser. The first byte sets the size of the pieces in which it
/// arrives.
pub fn http_screen(data: &[u8]) {
    let [piece, flow @ ..] = data else { return };
    let whole = screened(flow, flow.len().max(1));
    let pieces = screened(flow, usize::from(*piece) + 1);
    if flow.split(|&b| b == b'\n').all(|line| line.len() < LONG) {
        assert_eq!(whole, pieces, "what passes depends on how it was cut");
    }
}

/// Whether everything passed, and then whether a head has begun.
fn screened(flow: &[u8], piece: usize) -> Option<bool> {
    let mut screen = Screen::default();
    for chunk in flow.chunks(piece) {
        if let Err(before) = screen.take(chunk) {
            assert!(before <= chunk.len(), "wrong at byte {before} of {}", chunk.len());
            return None;
        }
    }
    Some(screen.in_head())
}
