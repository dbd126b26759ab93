//! Mistakes in the set-up, which the log and the report name, and correct set-ups without a warning.

use std::{
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use crate::{
    Test,
    client::{
        Connection,
        frames::{self, DATA, END_STREAM, HEADERS},
        http2,
    },
    long_lived::peer::{self, CLOSE, Raw, TEXT, masked},
    process::{Exit, Server},
    server::Form,
};

pub(crate) const TESTS: &[Test] = &[
    (
        "misuse::a_layer_that_is_missing_is_named",
        Form::CUTTING,
        missing,
    ),
    (
        "misuse::a_layer_of_another_lifecycle_is_named",
        Form::CUTTING,
        of_another,
    ),
    (
        "misuse::a_route_after_the_layer_is_named_once",
        Form::CUTTING,
        after,
    ),
    (
        "misuse::a_route_after_the_layer_is_named_over_http2",
        &[Form::Serve],
        after_over_http2,
    ),
    (
        "misuse::a_websocket_without_a_hold_is_named_when_draining_starts",
        Form::CUTTING,
        unheld,
    ),
    (
        "misuse::a_websocket_without_a_hold_is_named_when_the_last_hold_ends",
        Form::CUTTING,
        unheld_among_others,
    ),
    (
        "misuse::tunnels_of_http2_without_a_hold_are_named_when_draining_starts",
        &[Form::Serve],
        unheld_over_http2,
    ),
    (
        "misuse::a_correct_set_up_has_no_warning",
        Form::CUTTING,
        ordinary,
    ),
    (
        "misuse::an_admin_server_without_a_layer_has_no_warning",
        Form::CUTTING,
        admin,
    ),
    (
        "misuse::websockets_that_are_held_or_notified_have_no_warning",
        Form::CUTTING,
        held,
    ),
    (
        "misuse::tunnels_of_http2_that_are_held_or_have_ended_have_no_warning",
        &[Form::Serve],
        held_over_http2,
    ),
];

const MS: fn(u64) -> Duration = Duration::from_millis;

/// Texts by which the warnings are recognised.
const NO_REQUEST: &str = "no request has reached the layer";
const OUTSIDE: &str = "was answered outside the layer";
const UNHELD: &str = "no `Hold`";

/// Asserts that the log and the report contain the warning once, with these details.
#[track_caller]
fn assert_warned(exit: &Exit, kind: &str, names: &[&str]) {
    let logged: Vec<_> = exit
        .log
        .lines()
        .filter(|line| line.contains(kind))
        .collect();
    let [line] = &*logged else {
        panic!("{kind:?} is logged {} times: {exit:?}", logged.len());
    };
    assert!(line.contains("WARN tower_graceful"), "{line}");
    let report = exit.report.replace(" |    ", " ");
    assert_eq!(report.matches(kind).count(), 1, "{report}");
    assert_eq!(report.matches("warning: ").count(), 1, "{report}");
    for name in names {
        assert!(line.contains(name), "{name:?} is not in {line}");
        assert!(report.contains(name), "{name:?} is not in {report}");
    }
}

#[track_caller]
fn assert_not_warned(exit: &Exit) {
    assert!(!exit.log.contains("WARN"), "{exit:?}");
    assert!(!exit.report.contains("warning"), "{exit:?}");
}

/// The client's address, in the format of a warning.
fn from(connection: &Connection) -> String {
    format!("from {}", connection.stream().local_addr().unwrap())
}

fn never_reached(form: Form, layer: &str) {
    let mut server = Server::start(form, &["delay=200", layer]);
    // Probes and requests without a route do not count as served.
    server.get("/readyz").assert_ok();
    assert_eq!(server.get("/favicon.ico").status, 404);
    let mut connection = server.connect();
    connection.get("/bytes/0/1?secret").assert_ok();
    server.get("/").assert_ok();
    server.terminate();
    let exit = server.exit();
    exit.assert_clean();
    let names = ["GET /bytes/0/1 ", &*from(&connection), "`.layer("];
    assert_warned(&exit, NO_REQUEST, &names);
}

fn missing(form: Form) {
    never_reached(form, "layer=none");
}

fn of_another(form: Form) {
    never_reached(form, "layer=other");
}

fn after(form: Form) {
    let mut server = Server::start(form, &["delay=200"]);
    let mut connection = server.connect();
    connection.get("/").assert_ok();
    // The connection has carried requests, and another request is in flight.
    let mut other = server.connect();
    other.send("GET /sleep/300 HTTP/1.1\r\nhost: test\r\n\r\n");
    std::thread::sleep(MS(50));
    connection.get("/outside/5").assert_ok();
    connection.get("/outside/6").assert_ok();
    other.response("GET").assert_ok();
    server.terminate();
    let exit = server.exit();
    exit.assert_clean();
    let names = ["GET /outside/5 ", &*from(&connection), "`exempt`"];
    assert_warned(&exit, OUTSIDE, &names);
}

fn after_over_http2(form: Form) {
    let mut server = Server::start(form, &["delay=200"]);
    let connection = http2::Connection::open(server.address);
    assert_eq!(connection.get("/").status, 200);
    assert_eq!(connection.get("/outside/5").status, 200);
    server.terminate();
    let exit = server.exit();
    exit.assert_clean();
    assert_warned(&exit, OUTSIDE, &["GET /outside/5 "]);
}

fn unheld(form: Form) {
    let mut server = Server::start(form, &["delay=300", "drain=2000"]);
    let mut raw = Raw::open(&server, "/ws/unheld/7?secret");
    raw.send(1, b"hello").unwrap();
    assert_eq!(raw.read().1, b"hello");
    server.terminate();
    let exit = server.exit();
    assert_eq!(exit.status.code(), Some(1), "{exit:?}");
    let names = [
        &*format!("/ws/unheld/7 {}", from(&raw.0)),
        "`graceful.hold(…)`",
        "close_socket",
    ];
    assert_warned(&exit, UNHELD, &names);
    let warned = exit.written_after(UNHELD);
    assert!(warned >= MS(300) && warned < MS(1500), "{warned:?}");
}

fn unheld_among_others(form: Form) {
    let mut server = Server::start(form, &["delay=300", "drain=3000"]);
    let first = Raw::open(&server, "/ws/unheld/1");
    let held = Raw::open(&server, "/ws");
    let second = Raw::open(&server, "/ws/unheld/2");
    assert_eq!(server.connect().request("POST", "/job/900").status, 200);
    server.terminate();
    let exit = server.exit();
    drop(held);
    assert_eq!(exit.status.code(), Some(1), "{exit:?}");
    let both = format!(
        "2 upgraded connections have no `Hold`: /ws/unheld/1 {}, /ws/unheld/2 {}",
        from(&first.0),
        from(&second.0)
    );
    assert_warned(&exit, UNHELD, &[&both]);
}

/// Begins HTTP/2. Returns the client's address too.
fn open_http2(server: &Server) -> (frames::Connection, SocketAddr) {
    let stream = TcpStream::connect(server.address).unwrap();
    let from = stream.local_addr().unwrap();
    (frames::Connection::on(stream, &[]), from)
}

/// Opens a WebSocket over HTTP/2, and returns its stream.
#[track_caller]
fn open_tunnel(connection: &mut frames::Connection, path: &str) -> u32 {
    let stream = connection.connect(path, "websocket").unwrap();
    let head = connection.next(HEADERS);
    assert!(head.is_ok() && head.flags & END_STREAM == 0, "{head:?}");
    stream
}

/// Two WebSockets on one connection, and one on another. One that has ended is not named.
fn unheld_over_http2(form: Form) {
    let mut server = Server::start(form, &["delay=300", "drain=2000"]);
    let (mut connection, from) = open_http2(&server);
    let first = open_tunnel(&mut connection, "/ws/unheld/1?secret");
    let ended = open_tunnel(&mut connection, "/ws/unheld/2");
    open_tunnel(&mut connection, "/ws/unheld/3");
    let (mut other, from_other) = open_http2(&server);
    let refused = other.connect("/ws/missing", "websocket").unwrap();
    assert!(!other.next(HEADERS).is_ok(), "{refused}");
    open_tunnel(&mut other, "/ws/unheld/4");
    connection.data(first, &masked(TEXT, b"hello")).unwrap();
    assert_eq!(connection.next(DATA).payload, b"\x81\x05hello");
    connection.end(ended).unwrap();
    connection.end_of_stream();
    server.terminate();
    let exit = server.exit();
    assert_eq!(exit.status.code(), Some(1), "{exit:?}");
    let all = format!(
        "3 upgraded connections have no `Hold`: /ws/unheld/1 from {from}, /ws/unheld/3 from {from}, \
         /ws/unheld/4 from {from_other}; "
    );
    assert_warned(&exit, UNHELD, &[&all, "`graceful.hold(…)`", "close_socket"]);
    let warned = exit.written_after(UNHELD);
    assert!(warned >= MS(300) && warned < MS(1500), "{warned:?}");
}

fn held_over_http2(form: Form) {
    let mut server = Server::start(form, &["delay=300"]);
    let (mut connection, _) = open_http2(&server);
    let ended = open_tunnel(&mut connection, "/ws/unheld/1");
    connection.end(ended).unwrap();
    connection.end_of_stream();
    let reset = open_tunnel(&mut connection, "/ws/unheld/2");
    let cancel = 8_u32.to_be_bytes();
    connection
        .send(frames::RST_STREAM, 0, reset, &cancel)
        .unwrap();
    let held = open_tunnel(&mut connection, "/ws");
    // A response that is open in the drain.
    connection.begin("/sleep/1500").unwrap();
    server.terminate();
    assert_eq!(connection.next(DATA).stream, held);
    let answer = masked(CLOSE, &peer::close(1001, ""));
    connection.data(held, &answer).unwrap();
    connection.until_closed();
    let exit = server.exit();
    exit.assert_clean();
    assert_not_warned(&exit);
}

fn ordinary(form: Form) {
    let mut server = Server::start(form, &["delay=300", "limit=50"]);
    // A TCP probe, and a client that sends nothing.
    drop(server.connect());
    let silent = server.connect();
    let mut connection = server.connect();
    for path in [
        "/readyz",
        "/nested/livez",
        "/metrics",
        "/nested/metrics",
        "/",
    ] {
        connection.get(path).assert_ok();
    }
    for method in ["GET", "HEAD", "OPTIONS"] {
        let mut connection = server.connect();
        assert_eq!(connection.request(method, "/livez").status, 200);
    }
    assert_eq!(server.get("/nothing").status, 404);
    assert_eq!(
        server.connect().request("OPTIONS", "/outside/1").status,
        405
    );
    let mut bad = server.connect();
    bad.send("GET / HTTP/1.1\r\nbad header\r\n\r\n");
    assert_eq!(bad.response("GET").status, 400);
    let upload = "POST /upload HTTP/1.1\r\nhost: test\r\ncontent-length: 5\r\n\r\n";
    let mut uploading = server.connect();
    uploading.send(&format!("{upload}hello"));
    uploading.response("POST").assert_ok();
    uploading.send(upload);
    uploading.send("again");
    uploading.response("POST").assert_ok();
    let http2 = http2::Connection::open(server.address);
    assert_eq!(http2.get("/").status, 200);
    assert_eq!(http2.get("/livez").status, 200);
    let mut pipelining = server.connect();
    pipelining.send(&"GET /sleep/20 HTTP/1.1\r\nhost: test\r\n\r\n".repeat(5));
    for _ in 0..5 {
        pipelining.response("GET").assert_ok();
    }
    server.terminate();
    server.get("/").assert_ok();
    server.get("/readyz");
    let exit = server.exit();
    exit.assert_clean();
    drop(silent);
    assert_not_warned(&exit);
}

fn admin(form: Form) {
    for how in ["admin=tracked", "admin=plain"] {
        let mut server = Server::launch(form, &["delay=300", how]);
        let admin = server.expect_line("admin").parse().unwrap();
        server.address = server.expect_line("starting").parse().unwrap();
        server.expect_line("listening");
        let mut admin = Connection::open(admin);
        admin.get("/figures").assert_ok();
        server.get("/").assert_ok();
        admin.get("/figures").assert_ok();
        server.terminate();
        let exit = server.exit();
        exit.assert_clean();
        assert_not_warned(&exit);
    }
}

fn held(form: Form) {
    let mut server = Server::start(form, &["delay=300"]);
    let mut held = Raw::open(&server, "/ws");
    let mut notified = Raw::open(&server, "/ws/notified");
    server.terminate();
    for peer in [&mut notified, &mut held] {
        let (_, close) = peer.read();
        peer.send(8, &close).unwrap();
    }
    let exit = server.exit();
    exit.assert_clean();
    assert_not_warned(&exit);
}
