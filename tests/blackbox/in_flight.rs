//! The count of in-flight requests: how long a request counts, and that the count returns to zero.

use std::{io::Write, net::Shutdown, time::Duration};

use crate::{
    Test,
    client::Connection,
    process::{Server, soon},
    server::Form,
};

pub(crate) const TESTS: &[Test] = &[
    (
        "in_flight::handlers_see_the_address_of_their_client",
        Form::ALL,
        peer,
    ),
    (
        "in_flight::counts_a_body_until_its_end",
        Form::ALL,
        counts_bodies,
    ),
    (
        "in_flight::is_zero_after_responses_without_a_body",
        Form::ALL,
        bodiless,
    ),
    ("in_flight::is_zero_soon_after_a_panic", Form::ALL, panics),
    (
        "in_flight::is_zero_soon_after_a_client_has_disconnected",
        Form::ALL,
        clients_gone,
    ),
    ("in_flight::has_one_limit_for_all_routes", Form::ALL, limit),
    (
        "in_flight::a_limit_never_leaks",
        Form::ALL,
        limit_never_leaks,
    ),
];

/// The time limit of events that come at once. If the code is wrong, they come after a minute or never.
const SOON: Duration = Duration::from_secs(1);

fn peer(form: Form) {
    let mut server = Server::start(form, &["delay=0"]);
    let mut connection = server.connect();
    let local = connection.stream().local_addr().unwrap();
    assert_eq!(connection.get("/peer").text(), local.to_string());
    server.terminate();
    server.exit().assert_clean();
}

fn counts_bodies(form: Form) {
    let mut server = Server::start(form, &["delay=0"]);
    let mut connection = server.connect();
    connection.send("GET /stream/5/200 HTTP/1.1\r\nhost: test\r\n\r\n");
    connection.head().assert_ok();
    assert_eq!(server.in_flight(), 1, "the head is sent, the body is not");
    while connection.line().unwrap() != "chunk 3" {
        assert_eq!(server.in_flight(), 1);
    }
    let most = Duration::from_millis(200) + soon(SOON);
    assert!(
        server.wait_for_in_flight(0) < most,
        "the last chunk ends the body"
    );
    server.terminate();
    server.exit().assert_clean();
}

fn bodiless(form: Form) {
    let mut server = Server::start(form, &["delay=0"]);
    let mut connection = server.connect();
    for (method, path) in [
        ("HEAD", "/"),
        ("HEAD", "/stream/5/200"),
        ("GET", "/empty/200"),
        ("GET", "/empty/204"),
        ("GET", "/empty/304"),
        ("HEAD", "/empty/204"),
    ] {
        connection.request(method, path);
        assert!(server.wait_for_in_flight(0) < soon(SOON), "{method} {path}");
    }
    server.terminate();
    server.exit().assert_clean();
}

fn panics(form: Form) {
    let mut server = Server::start(form, &["delay=0"]);
    for path in ["/panic", "/panic-in-body"] {
        for _ in 0..5 {
            let response = server.connect().try_request("GET", path);
            assert!(response.is_err(), "{response:?}");
            assert!(server.wait_for_in_flight(0) < soon(SOON), "{path}");
        }
    }
    server.get("/").assert_ok();
    server.terminate();
    let exit = server.exit();
    exit.assert_clean();
    assert!(exit.log.contains("a handler panics") && exit.log.contains("a body panics"));
}

fn clients_gone(form: Form) {
    let mut server = Server::start(form, &["delay=0"]);
    for path in ["/sleep/60000", "/stream/100000/1"] {
        for reset in [false, true] {
            let mut connection = server.connect();
            connection.send(&format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n"));
            server.wait_for_in_flight(1);
            leave(connection, reset);
            let took = server.wait_for_in_flight(0);
            assert!(took < soon(SOON), "{path}, reset {reset}: {took:?}");
        }
    }
    server.terminate();
    server.exit().assert_clean();
}

/// Disconnects by FIN or by RST. Closing a socket with unread bytes resets the connection.
fn leave(connection: Connection, reset: bool) {
    if reset {
        let socket = socket2::SockRef::from(connection.stream());
        socket.set_linger(Some(Duration::ZERO)).unwrap();
    } else {
        let mut stream = connection.stream();
        stream.flush().unwrap();
        stream.shutdown(Shutdown::Both).unwrap();
    }
    drop(connection);
}

fn limit(form: Form) {
    let mut server = Server::start(form, &["delay=0", "limit=3"]);
    let mut streaming = server.connect();
    streaming.send("GET /stream/8/100 HTTP/1.1\r\nhost: test\r\n\r\n");
    streaming.head().assert_ok();
    let others = [
        server.get_in_background("/sleep/800"),
        server.get_in_background("/sleep/900"),
    ];
    for path in ["/", "/sleep/1", "/missing", "/nested/missing"] {
        let response = server.get(path);
        assert_eq!(response.status, 429, "{path} {response:?}");
        assert_eq!(response.header("retry-after"), Some("7"));
    }
    assert_eq!(server.in_flight(), 3);
    for other in others {
        other.join().unwrap().assert_ok();
    }
    server.terminate();
    server.exit().assert_clean();
}

fn limit_never_leaks(form: Form) {
    let mut server = Server::start(form, &["delay=0", "limit=2"]);
    for round in 0..50 {
        // This request stays in flight until its body is sent.
        let mut held = server.connect();
        held.send("POST /upload HTTP/1.1\r\nhost: test\r\ncontent-length: 4\r\n\r\n");
        server.wait_for_in_flight(1);
        match round % 4 {
            0 => server.get("/").assert_ok(),
            1 => assert!(server.connect().try_request("GET", "/panic").is_err()),
            2 => assert!(
                server
                    .connect()
                    .try_request("GET", "/panic-in-body")
                    .is_err()
            ),
            _ => {
                let mut gone = server.connect();
                gone.send("GET /sleep/60000 HTTP/1.1\r\nhost: test\r\n\r\n");
                server.wait_for_in_flight(2);
                assert_eq!(server.get("/").status, 429);
                leave(gone, round % 8 == 3);
            }
        }
        held.send("held");
        held.response("POST").assert_ok();
        server.wait_for_in_flight(0);
    }
    server.terminate();
    server.exit().assert_clean();
}
