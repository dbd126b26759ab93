//! Clients and handlers that never finish do not keep the server past its deadline.

use std::{io::Read, time::Duration};

use crate::{Test, client::Connection, process::Server, server::Form};

pub(crate) const TESTS: &[Test] = &[
    (
        "deadline::is_kept_whatever_a_client_does",
        Form::CUTTING,
        states,
    ),
    (
        "deadline::is_kept_with_two_hundred_connections_in_mixed_states",
        Form::CUTTING,
        mixed,
    ),
    (
        "deadline::is_not_waited_for_if_a_slow_reader_finishes",
        Form::CUTTING,
        slow_reader,
    ),
    (
        "deadline::is_not_waited_for_if_a_paused_upload_finishes",
        Form::CUTTING,
        resumed_upload,
    ),
    (
        "deadline::does_not_truncate_a_response_that_was_sent",
        Form::CUTTING,
        answered,
    ),
];

const MS: fn(u64) -> Duration = Duration::from_millis;

/// The states of a connection: the client sends these bytes, reads nothing, and stays connected.
const STATES: &[(&str, &[u8])] = &[
    ("half a head", b"GET / HTTP/1.1\r\nhost: test\r\nx-half: "),
    ("eight bytes of a head", b"GET / HT"),
    ("half a preface", b"PRI * HT"),
    (
        "the HTTP/2 preface alone",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ),
    // Sends empty SETTINGS, and never acknowledges the PING that comes with GOAWAY.
    (
        "a silent HTTP/2 peer",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
    ),
    (
        "a ticking stream",
        b"GET /stream/1000000/50 HTTP/1.1\r\nhost: test\r\n\r\n",
    ),
    (
        "a silent stream",
        b"GET /silent HTTP/1.1\r\nhost: test\r\n\r\n",
    ),
    (
        "a large body unread",
        b"GET /large HTTP/1.1\r\nhost: test\r\n\r\n",
    ),
    (
        "a stalled upload",
        b"POST /upload HTTP/1.1\r\nhost: test\r\ncontent-length: 1000\r\n\r\nhalf",
    ),
    (
        "a handler that never resolves",
        b"GET /never HTTP/1.1\r\nhost: test\r\n\r\n",
    ),
    (
        "a handler that never resolves nor reads",
        b"POST /never HTTP/1.1\r\nhost: test\r\ncontent-length: 1000\r\n\r\nhalf",
    ),
];

fn enter(server: &Server, state: &[u8]) -> Connection {
    let mut connection = server.connect();
    connection.try_send(state).unwrap();
    connection
}

/// States without a request: closing the connection loses nothing, so the stop is clean.
fn has_no_request(what: &str) -> bool {
    let states = ["half a", "eight", "preface alone", "silent HTTP/2"];
    states.iter().any(|state| what.contains(state))
}

/// Each state with a delay of 200 ms and 800 ms to drain. Where nothing is lost there is more time to
/// drain, so that a busy machine does not reach the deadline first.
fn states(form: Form) {
    for (what, state) in STATES {
        let no_request = has_no_request(what);
        let drain = if no_request {
            "drain=8000"
        } else {
            "drain=800"
        };
        let mut server = Server::start(form, &["delay=200", drain]);
        let connection = enter(&server, state);
        server.get("/").assert_ok();
        server.terminate();
        let exit = server.exit();
        if no_request {
            assert_eq!(exit.status.code(), Some(0), "{what}: {exit:?}");
            exit.assert_within(MS(200), MS(5000));
        } else {
            assert_eq!(exit.status.code(), Some(1), "{what}: {exit:?}");
            exit.assert_within(MS(1000), MS(1500));
            assert!(exit.report.contains("forced"), "{what}: {exit:?}");
            assert!(exit.report.contains("connection"), "{what}: {exit:?}");
        }
        drop(connection);
    }
}

fn mixed(form: Form) {
    let mut server = Server::start(form, &["delay=200", "drain=800"]);
    let states = STATES.iter().cycle().take(200);
    let connections: Vec<_> = states.map(|(_, state)| enter(&server, state)).collect();
    server.get("/").assert_ok();
    server.terminate();
    let exit = server.exit();
    assert_eq!(exit.status.code(), Some(1), "{exit:?}");
    exit.assert_within(MS(1000), MS(1500));
    drop(connections);
}

fn slow_reader(form: Form) {
    let mut server = Server::start(form, &["delay=0", "drain=10000"]);
    let connection = enter(&server, b"GET /large HTTP/1.1\r\nhost: test\r\n\r\n");
    connection.stream().peek(&mut [0]).unwrap();
    server.terminate();
    server.until(MS(1000));
    let mut read = 0;
    let mut piece = vec![0; 1024 * 1024];
    let mut stream = connection.stream();
    loop {
        let bytes = stream.read(&mut piece).unwrap();
        if bytes == 0 {
            break;
        }
        read += bytes;
    }
    assert!(read > 64 * 1024 * 1024, "{read}");
    server.exit().assert_clean();
}

fn resumed_upload(form: Form) {
    let mut server = Server::start(form, &["delay=0"]);
    let mut connection = enter(
        &server,
        b"POST /upload HTTP/1.1\r\nhost: test\r\ncontent-length: 8\r\n\r\nhalf",
    );
    server.wait_for_in_flight(1);
    server.terminate();
    server.until(MS(1000));
    connection.send("half");
    let response = connection.response("POST");
    response.assert_ok();
    assert_eq!(response.text(), "8");
    server.exit().assert_clean();
}

/// One handler is stuck. Another client has a complete response in the kernel's send buffer, and reads it
/// only after the process has ended. The kernel delivers it, and the report says that the client had not
/// received it.
fn answered(form: Form) {
    let mut server = Server::start(form, &["delay=0", "drain=500"]);
    let stuck = enter(&server, b"GET /never HTTP/1.1\r\nhost: test\r\n\r\n");
    let slow = server.connect();
    socket2::SockRef::from(slow.stream())
        .set_recv_buffer_size(4096)
        .unwrap();
    let mut slow = slow;
    slow.send("GET /buffered HTTP/1.1\r\nhost: test\r\n\r\n");
    // The response has begun to arrive.
    slow.stream().peek(&mut [0]).unwrap();
    server.wait_for_in_flight(1);
    let idle = server.connect();
    server.terminate();
    let exit = server.exit();
    assert_eq!(exit.status.code(), Some(1), "{exit:?}");
    assert!(exit.report.contains("1 request, 2 connections"), "{exit:?}");
    assert!(exit.report.contains("bytes undelivered"), "{exit:?}");
    let response = slow.response("GET");
    response.assert_ok();
    assert_eq!(response.body.len(), 150_000);
    idle.assert_closed();
    drop(stuck);
}
