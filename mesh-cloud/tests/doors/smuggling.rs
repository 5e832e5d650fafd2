//! Requests that two parsers could read differently: refused, and never seen by a service.

use crate::mesh::{BASIC, Mesh, Stage, Talk};

const HOST: &str = "Host: web.shop-1.mesh.test\r\n";

/// Each is tried as the first request of a connection and as the second.
fn requests() -> Vec<(&'static str, String)> {
    let with = |line: &str, fields: &str, body: &str| format!("{line}\r\n{HOST}{fields}\r\n{body}");
    let post = |fields: &str, body: &str| with("POST / HTTP/1.1", fields, body);
    let chunks = "0\r\n\r\n";
    vec![
        ("length beside chunks", post("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", chunks)),
        ("chunks beside length", post("Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", chunks)),
        ("two lengths", post("Content-Length: 5\r\nContent-Length: 6\r\n", "hello")),
        ("the same length twice", post("Content-Length: 5\r\nContent-Length: 5\r\n", "hello")),
        ("a list of lengths", post("Content-Length: 5, 5\r\n", "hello")),
        ("a length with a sign", post("Content-Length: +5\r\n", "hello")),
        ("a length in hex", post("Content-Length: 0x5\r\n", "hello")),
        ("a length below zero", post("Content-Length: -5\r\n", "hello")),
        ("a length beyond measure", post("Content-Length: 99999999999999999999\r\n", "hello")),
        ("an empty length", post("Content-Length:\r\n", "hello")),
        ("chunks, not last", post("Transfer-Encoding: chunked, identity\r\n", chunks)),
        ("another coding before chunks", post("Transfer-Encoding: gzip, chunked\r\n", chunks)),
        ("chunks twice", post("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", chunks)),
        ("chunks behind identity", post("Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n", chunks)),
        ("quoted chunks", post("Transfer-Encoding: \"chunked\"\r\n", chunks)),
        ("something like chunks", post("Transfer-Encoding: xchunked\r\n", chunks)),
        ("chunks behind a control byte", post("Transfer-Encoding: \x0bchunked\r\n", chunks)),
        ("chunks in HTTP/1.0", with("POST / HTTP/1.0", "Transfer-Encoding: chunked\r\n", chunks)),
        ("a folded field", post("X-A: b\r\n c\r\nContent-Length: 0\r\n", "")),
        ("a folded coding", post("Transfer-Encoding:\r\n chunked\r\n", chunks)),
        ("a space before the colon", post("Content-Length : 5\r\n", "hello")),
        ("a space before the first field", format!("POST / HTTP/1.1\r\n {HOST}\r\n")),
        ("a bare line feed behind the request line", format!("POST / HTTP/1.1\n{HOST}\r\n")),
        ("a bare line feed behind a field", format!("POST / HTTP/1.1\r\n{HOST}X-A: b\n\r\n")),
        ("a bare line feed at the end", format!("POST / HTTP/1.1\r\n{HOST}\n")),
        ("a bare carriage return", post("X-A: b\rContent-Length: 5\r\n", "hello")),
        ("a zero byte in a field", post("X-A: b\0c\r\n", "")),
        ("a field without a colon", post("X-A\r\n", "")),
        ("another host in the target", with("GET http://other.shop-1.mesh.test/ HTTP/1.1", "", "")),
        ("two hosts", with("GET / HTTP/1.1", "Host: web.shop-1.mesh.test\r\n", "")),
        ("no host", "GET / HTTP/1.1\r\n\r\n".into()),
        ("an empty host", "GET / HTTP/1.1\r\nHost:\r\n\r\n".into()),
        ("a host with a path", "GET / HTTP/1.1\r\nHost: web.shop-1.mesh.test/x\r\n\r\n".into()),
        ("a host with a user", "GET / HTTP/1.1\r\nHost: a@web.shop-1.mesh.test\r\n\r\n".into()),
        ("a host with a space", "GET / HTTP/1.1\r\nHost: web.shop-1.mesh.test x\r\n\r\n".into()),
        ("two spaces", with("GET  / HTTP/1.1", "", "")),
        ("another version", with("GET / HTTP/1.2", "", "")),
    ]
}

#[tokio::test]
async fn ambiguous_requests_are_refused_and_the_connection_ends() {
    let stage = Stage::new().await;
    let mesh = Mesh::start(&[("web", stage.port())]).await;
    for (what, request) in requests() {
        let mut client = mesh.http().await;
        client.say(&request).await;
        client.say(&format!("GET /smuggled HTTP/1.1\r\n{HOST}\r\n")).await;
        refused(what, &mut client).await;
    }
    assert!(stage.is_lonely().await, "no service has seen any of them");
}

#[tokio::test]
async fn ambiguous_requests_behind_a_good_one_are_refused_too() {
    let stage = Stage::new().await;
    let mesh = Mesh::start(&[("web", stage.port())]).await;
    for (what, request) in requests() {
        let mut client = mesh.http().await;
        client.say(&format!("POST /good HTTP/1.1\r\n{HOST}Content-Length: 2\r\n\r\n\n\n{request}")).await;
        let mut service = stage.enter().await;
        assert!(service.head().await.starts_with("POST /good "), "{what}");
        assert_eq!(service.exactly(2).await, "\n\n", "{what}");
        service.say("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
        assert_eq!(client.response().await.1, "ok", "{what}");
        refused(what, &mut client).await;
        assert_eq!(service.rest().await.0, "", "{what}");
    }
}

#[tokio::test]
async fn the_proxy_door_is_as_strict() {
    let stage = Stage::new().await;
    let mesh = Mesh::start(&[("web", stage.port())]).await;
    for (what, request) in requests() {
        let request = request.replacen(" / ", " http://web.shop-1.mesh.test/ ", 1).replacen(
            "\r\n\r\n",
            &format!("\r\n{BASIC}\r\n"),
            1,
        );
        let mut client = mesh.proxy().await;
        client.say(&request).await;
        refused(what, &mut client).await;
    }
    assert!(stage.is_lonely().await, "no service has seen any of them");
}

#[tokio::test]
async fn bad_chunks_break_the_request_and_not_the_next_one() {
    let stage = Stage::new().await;
    let mesh = Mesh::start(&[("web", stage.port())]).await;
    for chunks in [
        "3\nabc\r\n0\r\n\r\n",
        "3\r\nabcd\r\n0\r\n\r\n",
        "0x3\r\nabc\r\n0\r\n\r\n",
        "-1\r\n",
        "3 \r\nabc\r\n",
        "fffffffffffffffff\r\n",
        "0\r\nX: y\n\r\n",
    ] {
        let mut client = mesh.http().await;
        client.say(&format!("POST / HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n{chunks}GET /smuggled HTTP/1.1\r\n{HOST}\r\n")).await;
        let mut service = stage.enter().await;
        let (seen, _) = service.rest().await;
        assert!(!seen.contains("0\r\n\r\n") && !seen.contains("smuggled"), "{chunks:?}: {seen:?}");
        let (answer, _) = client.rest().await;
        assert!(!answer.starts_with("HTTP/1.1 2"), "{chunks:?}: {answer:?}");
    }
}

async fn refused(what: &str, client: &mut Talk) {
    let (answer, _) = client.rest().await;
    assert!(answer.starts_with("HTTP/1.1 400 ") || answer.starts_with("HTTP/1.0 400 "), "{what}: {answer:?}");
    assert_eq!(answer.matches("HTTP/1.").count(), 1, "{what}: {answer:?}");
}
