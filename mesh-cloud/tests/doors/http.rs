//! The HTTP door, in HTTP/1.1.

use crate::mesh::{BLACK_HOLE, Ended, Mesh, Stage, Talk, until, web};

async fn mesh() -> (Mesh, Stage) {
    let stage = Stage::new().await;
    (Mesh::start(&[("web", stage.port()), ("http", stage.port())]).await, stage)
}

const HOST: &str = "Host: web.shop-1.mesh.test\r\n";

#[tokio::test]
async fn bodies_flow_both_ways_piece_by_piece() {
    let (mut mesh, stage) = mesh().await;
    let mut client = mesh.http().await;
    client.say(&format!("POST /a?b HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n3\r\none\r\n")).await;
    let mut service = stage.enter().await;
    let head = service.head().await;
    assert!(head.starts_with("POST /a?b HTTP/1.1\r\n"), "{head}");
    assert!(service.hear("one").await.ends_with("one"), "before the body has ended");
    service.say("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n").await;
    assert!(client.hear("first").await.starts_with("HTTP/1.1 200 OK"), "before the request has ended");
    client.say("3\r\ntwo\r\n").await;
    service.hear("two").await;
    service.say("6\r\nsecond\r\n").await;
    client.hear("second").await;
    client.say("0\r\n\r\n").await;
    service.hear("0\r\n\r\n").await;
    service.say("0\r\n\r\n").await;
    client.hear("0\r\n\r\n").await;
    drop(client);
    let record = mesh.record().await;
    assert_eq!(
        (record.who.as_str(), &*record.outcome, record.target.as_str()),
        ("door/http", "finished", "shop-1/web")
    );
    assert!(record.up > 0 && record.down > 0, "{record:?}");
}

#[tokio::test]
async fn trailers_go_through_both_ways() {
    let (mesh, stage) = mesh().await;
    let mut client = mesh.http().await;
    client
        .say(&format!(
            "POST / HTTP/1.1\r\n{HOST}TE: trailers\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\nX-Sum: 7\r\n\r\n"
        ))
        .await;
    let mut service = stage.enter().await;
    let head = service.head().await.to_lowercase();
    assert!(head.contains("te: trailers") && head.contains("trailer: x-sum"), "{head}");
    assert!(service.hear("\r\n\r\n").await.to_lowercase().ends_with("0\r\nx-sum: 7\r\n\r\n"));
    service
        .say(
            "HTTP/1.1 200 OK\r\nTrailer: X-Back\r\nTransfer-Encoding: chunked\r\n\r\n2\r\ncd\r\n0\r\nX-Back: 8\r\n\r\n",
        )
        .await;
    client.head().await;
    assert!(client.hear("\r\n\r\n").await.to_lowercase().ends_with("0\r\nx-back: 8\r\n\r\n"));
}

#[tokio::test]
async fn another_protocol_takes_over_with_every_early_byte() {
    let (mut mesh, stage) = mesh().await;
    let mut client = mesh.http().await;
    client
        .say(&format!("GET /chat HTTP/1.1\r\n{HOST}Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: k\r\n\r\nEARLY\n"))
        .await;
    let mut service = stage.enter().await;
    let head = service.head().await.to_lowercase();
    assert!(head.contains("upgrade: websocket\r\n") && head.contains("connection: upgrade\r\n"), "{head}");
    service.say("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nHELLO").await;
    let head = client.head().await.to_lowercase();
    assert!(head.starts_with("http/1.1 101 ") && head.contains("upgrade: websocket"), "{head}");
    assert_eq!(client.exactly(5).await, "HELLO");
    assert_eq!(service.exactly(6).await, "EARLY\n");
    for text in ["ping\n", "pong\n"] {
        client.say(text).await;
        assert_eq!(service.exactly(5).await, text);
        service.say(text).await;
        assert_eq!(client.exactly(5).await, text);
    }
    client.finish().await;
    assert_eq!(service.rest().await.1, Ended::Cleanly);
    service.say("after the end").await;
    drop(service);
    assert_eq!(client.rest().await, ("after the end".into(), Ended::Cleanly));
    let record = mesh.record().await;
    assert_eq!(record.outcome, "finished");
    assert!(record.up > 100 && record.down > 50, "the heads count too: {record:?}");
}

#[tokio::test]
async fn an_upgrade_that_is_declined_ends_the_connection() {
    let (mesh, stage) = mesh().await;
    let mut client = mesh.http().await;
    client
        .say(&format!(
            "GET / HTTP/1.1\r\n{HOST}Connection: Upgrade\r\nUpgrade: x\r\n\r\nGET /smuggled HTTP/1.1\r\n{HOST}\r\n"
        ))
        .await;
    let mut service = stage.enter().await;
    service.head().await;
    service.say("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno").await;
    let (heard, _) = client.rest().await;
    assert!(heard.ends_with("no") && heard.to_lowercase().contains("connection: close"), "{heard}");
    assert_eq!(service.rest().await.0, "", "what followed was no request");
}

#[tokio::test]
async fn the_service_decides_whether_a_body_is_wanted() {
    let (mesh, stage) = mesh().await;
    let ask = format!("PUT / HTTP/1.1\r\n{HOST}Expect: 100-continue\r\nContent-Length: 4\r\n\r\n");
    let mut client = mesh.http().await;
    client.say(&ask).await;
    let mut service = stage.enter().await;
    assert!(service.head().await.to_lowercase().contains("expect: 100-continue"));
    service.say("HTTP/1.1 100 Continue\r\n\r\n").await;
    assert!(client.head().await.starts_with("HTTP/1.1 100 Continue"));
    client.say("body").await;
    assert_eq!(service.exactly(4).await, "body");
    service.say("HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n").await;
    assert!(client.head().await.starts_with("HTTP/1.1 201 "));

    let mut client = mesh.http().await;
    client.say(&ask).await;
    let mut service = stage.enter().await;
    service.head().await;
    service.say("HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno").await;
    assert!(client.head().await.starts_with("HTTP/1.1 413 "), "without a 100 before");

    let mut client = mesh.http().await;
    client.say(&ask.replace("web.", "none.")).await;
    assert!(client.head().await.starts_with("HTTP/1.1 404 "), "and the mesh's own no comes first, too");
}

#[tokio::test]
async fn answers_without_a_body_stay_as_they_are() {
    let (mesh, stage) = mesh().await;
    let mut client = mesh.http().await;
    client.say(&format!("HEAD / HTTP/1.1\r\n{HOST}\r\n")).await;
    let mut service = stage.enter().await;
    assert!(service.head().await.starts_with("HEAD / "));
    service.say("HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n").await;
    assert!(client.head().await.to_lowercase().contains("content-length: 1234"));
    client.say(&format!("GET / HTTP/1.1\r\n{HOST}\r\n")).await;
    service.head().await;
    service.say("HTTP/1.1 304 Not Modified\r\nETag: \"a\"\r\n\r\n").await;
    assert!(client.head().await.starts_with("HTTP/1.1 304 "));
    client.say(&format!("GET / HTTP/1.1\r\n{HOST}\r\n")).await;
    service.head().await;
    service.say("HTTP/1.1 204 No Content\r\n\r\n").await;
    assert!(client.head().await.starts_with("HTTP/1.1 204 "));
}

#[tokio::test]
async fn connections_to_a_service_are_kept_and_replaced() {
    let (mesh, stage) = mesh().await;
    let mut client = mesh.http().await;
    let ask = format!("GET / HTTP/1.1\r\n{HOST}\r\n");
    let yes = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
    client.say(&ask).await;
    let mut service = stage.enter().await;
    for _ in 0..3 {
        service.head().await;
        service.say(yes).await;
        assert_eq!(client.response().await.1, "ok");
        client.say(&ask).await;
    }
    // The service closes an idle connection: the next request is on a new one and nobody sees anything.
    service.head().await;
    service.say(yes).await;
    assert_eq!(client.response().await.1, "ok");
    let edge = mesh.shard.registry.find(&"shop-1".parse().unwrap()).unwrap();
    drop(service);
    until(|| edge.streams() == 0).await;
    client.say(&ask).await;
    let mut service = stage.enter().await;
    service.head().await;
    service.say(yes).await;
    assert_eq!(client.response().await.1, "ok");
    // When control has said something new, policy decides anew.
    let state = mesh.state.borrow().after(proto::api::WatchEvent {
        revision: 2,
        policy: Some(Vec::new()),
        ..proto::api::WatchEvent::default()
    });
    mesh.state.send_replace(state.into());
    client.say(&ask).await;
    let (head, body) = client.response().await;
    assert!(head.starts_with("HTTP/1.1 403 policy-denied\r\n") && body.contains("door/http"), "{head}{body}");
}

#[tokio::test]
async fn what_is_not_ours_is_refused_with_a_sentence() {
    let (mesh, stage) = mesh().await;
    for (host, status, text) in [
        ("example.com", "404", "mesh.test"),
        ("shop-9.mesh.test", "404", "shop-9"),
        ("none.shop-1.mesh.test", "404", "shop-1/none"),
        ("web.shop-2.mesh.test", "503", "not connected"),
    ] {
        let mut client = mesh.http().await;
        client.say(&format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")).await;
        let (head, body) = client.response().await;
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")) && head.contains("x-mesh-error"), "{head}");
        assert!(body.contains(text), "{host}: {body}");
    }
    assert!(stage.is_lonely().await);
}

#[tokio::test]
async fn a_service_that_breaks_before_it_answers_is_a_502() {
    let (mesh, stage) = mesh().await;
    for (answer, slug) in
        [("", "peer-reset"), ("HTTP/1.1 200 OK\r\nConte", "peer-reset"), ("SSH-2.0-nonsense\r\n", "protocol-error")]
    {
        let mut client = mesh.http().await;
        client.say(&format!("GET / HTTP/1.1\r\n{HOST}\r\n")).await;
        let mut service = stage.enter().await;
        service.head().await;
        service.say(answer).await;
        drop(service);
        let (head, _) = client.response().await;
        assert!(head.starts_with(&format!("HTTP/1.1 502 {slug}\r\n")), "{answer:?}: {head}");
        assert!(head.contains("x-mesh-fault: target"), "{head}");
    }
}

#[tokio::test]
async fn a_response_that_breaks_off_never_looks_whole() {
    let (mesh, stage) = mesh().await;
    for (version, framing) in
        [("1.1", "Content-Length: 100\r\n"), ("1.1", "Transfer-Encoding: chunked\r\n"), ("1.1", ""), ("1.0", "")]
    {
        let mut client = mesh.http().await;
        client.say(&format!("GET / HTTP/{version}\r\n{HOST}\r\n")).await;
        let mut service = stage.enter().await;
        service.head().await;
        service.say(&format!("HTTP/1.1 200 OK\r\n{framing}\r\n4\r\nhalf\r\n")).await;
        client.hear("half").await;
        service.reset();
        let (rest, ended) = client.rest().await;
        assert_eq!(ended, Ended::ByReset, "{version} {framing}: {rest:?}");
        assert!(!rest.contains("0\r\n\r\n"), "{rest:?}");
    }
    // The end of the connection is the end of such a body, if it comes cleanly.
    let mut client = mesh.http().await;
    client.say(&format!("GET / HTTP/1.0\r\n{HOST}\r\n")).await;
    let mut service = stage.enter().await;
    service.head().await;
    service.say("HTTP/1.0 200 OK\r\n\r\nall of it").await;
    drop(service);
    let (rest, ended) = client.rest().await;
    assert!(rest.ends_with("all of it") && ended == Ended::Cleanly, "{rest}");
}

#[tokio::test]
async fn a_request_that_breaks_off_never_looks_whole() {
    let (mut mesh, stage) = mesh().await;
    for framing in ["Content-Length: 100\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n4\r\n"] {
        let mut client = mesh.http().await;
        client.say(&format!("POST / HTTP/1.1\r\n{HOST}{framing}half")).await;
        let mut service = stage.enter().await;
        service.hear("half").await;
        client.reset();
        let (rest, ended) = service.rest().await;
        assert!(!rest.contains("0\r\n\r\n"), "{rest:?}");
        assert_eq!(ended, Ended::ByReset, "{framing}");
        assert_ne!(mesh.record().await.outcome, "finished");
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_stalls_only_itself() {
    let other = web("other").await;
    let stage = Stage::new().await;
    let mesh = Mesh::start(&[("web", stage.port()), ("other", other)]).await;
    let mut lazy = mesh.http().await;
    lazy.say(&format!("GET / HTTP/1.1\r\n{HOST}\r\n")).await;
    let mut service = stage.enter().await;
    service.head().await;
    service.say("HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n").await;
    let block = vec![b'x'; 64 * 1024];
    let mut sent = 0;
    // Until everything between the two is full.
    while tokio::time::timeout(std::time::Duration::from_millis(300), service.say_bytes(&block)).await.is_ok() {
        sent += block.len();
        assert!(sent < 100_000_000, "there is no end to what is kept for a reader that does not read");
    }
    let mut busy = mesh.http().await;
    for _ in 0..10 {
        busy.say("GET / HTTP/1.1\r\nHost: other.shop-1.mesh.test\r\n\r\n").await;
        assert!(busy.response().await.1.starts_with("other: "));
    }
}

#[tokio::test]
async fn a_shard_that_leaves_finishes_what_it_has_begun() {
    let (mesh, stage) = mesh().await;
    let mut idle = mesh.http().await;
    let mut silent = mesh.http().await;
    let mut client = mesh.http().await;
    for talk in [&mut idle, &mut client] {
        talk.say(&format!("GET / HTTP/1.1\r\n{HOST}\r\n")).await;
        let mut service = stage.enter().await;
        service.head().await;
        service.say("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok").await;
        talk.response().await;
    }
    client.say(&format!("GET / HTTP/1.1\r\n{HOST}\r\n")).await;
    let mut service = stage.enter().await;
    service.head().await;
    service.say("HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf").await;
    client.hear("half").await;
    mesh.tasks.stop();
    assert_eq!(idle.rest().await, (String::new(), Ended::Cleanly));
    assert_eq!(silent.rest().await, (String::new(), Ended::Cleanly));
    service.say("half").await;
    assert_eq!(client.rest().await, ("half".into(), Ended::Cleanly));
    assert_eq!(mesh.tasks.finished(crate::mesh::PATIENCE).await, 0);
}

#[tokio::test]
async fn a_shard_whose_time_is_over_cuts_the_rest_visibly() {
    let stage = Stage::new().await;
    let mesh = Mesh::start_with_config(&[("web", stage.port()), ("hole", BLACK_HOLE)], |c| c.drain_secs = 0).await;
    let mut client = mesh.http().await;
    client.say(&format!("GET / HTTP/1.1\r\n{HOST}\r\n")).await;
    let mut service = stage.enter().await;
    service.head().await;
    service.say("HTTP/1.1 200 OK\r\n\r\nhalf").await;
    client.hear("half").await;
    mesh.tasks.stop();
    assert_eq!(client.rest().await.1, Ended::ByReset);
    assert_eq!(service.rest().await.1, Ended::ByReset);
    assert_eq!(mesh.tasks.finished(crate::mesh::PATIENCE).await, 0);
}

/// Sends a head and then nothing.
#[tokio::test]
async fn heads_that_trickle_do_not_live_for_ever() {
    let (mesh, _stage) = mesh().await;
    for start in ["GET / HT", "P", "PRI * HTTP/2.0\r\n", "GET / HTTP/1.1\r\nHost: a"] {
        let mut talk: Talk = mesh.http().await;
        talk.say(start).await;
        talk.finish().await;
        talk.rest().await;
    }
}
