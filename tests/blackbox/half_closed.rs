//! Clients that close their writing side after a request. The server cannot know whether such a client
//! waits for the response or has disconnected. The setting `half_close` selects one of the two.

use std::{
    net::Shutdown,
    thread,
    time::{Duration, Instant},
};

use crate::{
    Test,
    client::Connection,
    process::{Exit, Server, wait_for},
    server::Form,
};

pub(crate) const TESTS: &[Test] = &[
    (
        "half_closed::clients_are_answered_with_the_option",
        &[Form::Serve],
        answered,
    ),
    (
        "half_closed::clients_are_answered_while_draining_with_the_option",
        &[Form::Serve],
        answered_while_draining,
    ),
    (
        "half_closed::clients_that_have_left_keep_their_handler_running_with_the_option",
        &[Form::Serve],
        handler_runs_on,
    ),
    (
        "half_closed::clients_lose_their_handler_at_once_without_the_option",
        Form::CUTTING,
        dropped,
    ),
    (
        "half_closed::clients_are_in_the_report_of_a_shutdown_that_dropped_them",
        Form::CUTTING,
        reported,
    ),
    (
        "half_closed::clients_with_a_body_are_in_the_report_too",
        &[Form::Serve],
        reported_with_a_body,
    ),
    (
        "half_closed::clients_that_have_left_or_lose_nothing_are_not_in_the_report",
        Form::CUTTING,
        not_reported,
    ),
    (
        "half_closed::probers_that_have_given_up_are_not_in_the_report",
        Form::CUTTING,
        probes,
    ),
];

const MS: fn(u64) -> Duration = Duration::from_millis;

/// Sends a request and the FIN after it.
fn half_closed(server: &Server, request: &str) -> Connection {
    let mut connection = server.connect();
    connection.send(request);
    connection.stream().shutdown(Shutdown::Write).unwrap();
    connection
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n")
}

const POST: &str = "POST /upload HTTP/1.1\r\nhost: test\r\ncontent-length: 4\r\n\r\nbody";

fn answered(form: Form) {
    let mut server = Server::start(form, &["delay=0", "half_close=true"]);
    for request in [
        &*get("/"),
        &get("/readyz"),
        &get("/sleep/200"),
        &get("/stream/3/50"),
        POST,
    ] {
        for _ in 0..10 {
            let mut connection = half_closed(&server, request);
            connection.response("GET").assert_ok();
            connection.assert_closed();
        }
    }
    let requests = get("/") + POST + &get("/sleep/50");
    let mut connection = half_closed(&server, &requests);
    for _ in 0..3 {
        connection.response("GET").assert_ok();
    }
    connection.assert_closed();
    server.terminate();
    server.exit().assert_clean();
}

fn answered_while_draining(form: Form) {
    let mut server = Server::start(form, &["delay=0", "half_close=true"]);
    let holds = server.get_in_background("/sleep/800");
    let mut connections: Vec<_> = (0..10)
        .map(|_| half_closed(&server, &get("/sleep/600")))
        .collect();
    server.wait_for_in_flight(11);
    server.terminate();
    server.wait_for_draining();
    let mut refused = half_closed(&server, &get("/"));
    assert_eq!(refused.response("GET").status, 503);
    for connection in &mut connections {
        connection.response("GET").assert_ok();
    }
    holds.join().unwrap().assert_ok();
    server.exit().assert_clean();
}

/// The cost of the option: the handler of a client that has disconnected continues.
fn handler_runs_on(form: Form) {
    let mut server = Server::start(form, &["delay=0", "half_close=true"]);
    drop(half_closed(&server, &get("/sleep/600")));
    server.wait_for_in_flight(1);
    let begun = Instant::now();
    server.wait_for_in_flight(0);
    assert!(begun.elapsed() > MS(400), "{:?}", begun.elapsed());
    server.terminate();
    server.exit().assert_clean();
}

fn dropped(form: Form) {
    let mut server = Server::start(form, &["delay=0"]);
    let mut connection = server.connect();
    connection.send(&get("/sleep/60000"));
    server.wait_for_in_flight(1);
    connection.stream().shutdown(Shutdown::Write).unwrap();
    let took = server.wait_for_in_flight(0);
    // The handler would take a minute.
    assert!(took < MS(1000), "{took:?}");
    connection.assert_closed();
    // The request was dropped before the shutdown, so the report does not list it.
    server.terminate();
    server.exit().assert_clean();
}

fn assert_lost(exit: &Exit, requests: usize) {
    assert_eq!(exit.status.code(), Some(1), "{exit:?}");
    let plural = if requests == 1 { "" } else { "s" };
    let lost = format!("given up: {requests} half-closed request{plural} |");
    assert!(exit.report.contains(&lost), "{exit:?}");
    assert!(exit.report.contains("see `half_close`"), "{exit:?}");
}

fn reported(form: Form) {
    // A request that is in flight at the signal, and is dropped in the lame-duck phase or while draining.
    for knobs in ["delay=500", "delay=0"] {
        let mut server = Server::start(form, &[knobs]);
        let mut connection = server.connect();
        connection.send(&get("/sleep/60000"));
        server.wait_for_in_flight(1);
        let left_before = half_closed(&server, &get("/sleep/60000"));
        left_before.assert_closed();
        // The socket is closed before the request is dropped.
        wait_for("the request to be dropped", || server.connections() == 2);
        server.terminate();
        server.wait_for_unready();
        connection.stream().shutdown(Shutdown::Write).unwrap();
        connection.assert_closed();
        assert_lost(&server.exit(), 1);
    }
    // In the lame-duck phase, request and FIN arrive at once. The handler never starts.
    let mut server = Server::start(form, &["delay=1000"]);
    server.get("/").assert_ok();
    server.terminate();
    server.wait_for_unready();
    for _ in 0..3 {
        half_closed(&server, &get("/sleep/60000")).assert_closed();
    }
    assert_lost(&server.exit(), 3);
}

fn reported_with_a_body(form: Form) {
    let mut server = Server::start(form, &["delay=0"]);
    let mut connection = server.connect();
    connection.send("POST /never HTTP/1.1\r\nhost: test\r\ncontent-length: 4\r\n\r\nbody");
    let mut reading = server.connect();
    reading.send("GET /sleep/60000 HTTP/1.1\r\nhost: test\r\ncontent-length: 4\r\n\r\nbody");
    server.wait_for_in_flight(2);
    server.terminate();
    server.wait_for_draining();
    for connection in [&connection, &reading] {
        connection.stream().shutdown(Shutdown::Write).unwrap();
    }
    assert_eq!(server.exit().status.code(), Some(1));
}

/// A prober that has given up waiting has lost nothing.
fn probes(form: Form) {
    let mut server = Server::start(form, &["delay=1000"]);
    server.get("/").assert_ok();
    server.terminate();
    server.wait_for_unready();
    for path in ["/livez", "/readyz", "/readyz?full"] {
        // It is answered, or dropped.
        half_closed(&server, &get(path)).rest().unwrap();
    }
    server.exit().assert_clean();
}

fn not_reported(form: Form) {
    let mut server = Server::start(form, &["delay=0"]);
    let holds = server.get_in_background("/sleep/1200");
    // Idle before a request, idle after a request, and in the middle of a head.
    let silent = server.connect();
    let mut idle = server.connect();
    idle.get("/").assert_ok();
    let mut begun = server.connect();
    begun.send("GET / HTTP/1.1\r\nhost: test\r\n");
    // A connection whose response head has been sent.
    let mut streaming = server.connect();
    streaming.send(&get("/stream/100000/1"));
    streaming.head().assert_ok();
    // A connection that the client resets.
    let mut reset = server.connect();
    reset.send(&get("/sleep/60000"));
    server.wait_for_in_flight(3);
    server.terminate();
    server.wait_for_draining();
    // A request that would be refused.
    let refused = half_closed(&server, &get("/"));
    for connection in [&silent, &idle, &begun, &streaming] {
        connection.stream().shutdown(Shutdown::Write).unwrap();
    }
    socket2::SockRef::from(reset.stream())
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(reset);
    thread::sleep(MS(100));
    drop((silent, idle, begun, streaming, refused));
    holds.join().unwrap().assert_ok();
    server.exit().assert_clean();
}
