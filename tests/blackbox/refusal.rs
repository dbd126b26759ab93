//! The responses that refused clients receive.

use std::{
    io::{ErrorKind, Write},
    time::Duration,
};

use crate::{Test, client::http2, process::Server, server::Form};

pub(crate) const TESTS: &[Test] = &[
    (
        "refusal::is_503_with_retry_after_and_close",
        Form::ALL,
        is_503,
    ),
    (
        "refusal::has_no_connection_field_on_http2",
        Form::ALL,
        on_http2,
    ),
    (
        "refusal::of_an_unread_upload_reaches_its_client",
        Form::ALL,
        of_an_upload,
    ),
    (
        "refusal::of_a_slow_upload_comes_before_the_drain_deadline",
        Form::CUTTING,
        of_a_slow_upload,
    ),
    (
        "refusal::of_an_expected_continue_comes_at_once",
        Form::ALL,
        of_expect_continue,
    ),
    (
        "refusal::of_an_expected_continue_is_whole_although_its_client_sends_at_once",
        Form::CUTTING,
        of_expect_continue_and_body,
    ),
    ("refusal::of_a_grpc_call_is_unavailable", Form::ALL, of_grpc),
    (
        "refusal::does_not_prolong_the_drain",
        Form::ALL,
        does_not_prolong,
    ),
];

fn is_503(form: Form) {
    let mut server = Server::start(form, &["delay=0", "drain=10000"]);
    let slow = server.get_in_background("/sleep/3000");
    let mut old = server.connect();
    old.get("/").assert_ok();
    server.terminate();
    server.wait_for_draining();
    for connection in [old, server.connect()] {
        let mut connection = connection;
        let response = connection.get("/");
        assert_eq!(response.status, 503);
        assert_eq!(response.header("retry-after"), Some("7"));
        assert!(response.says_close(), "{response:?}");
        assert!(response.text().contains("shutting down"));
        connection.assert_closed();
    }
    slow.join().unwrap().assert_ok();
    server.exit().assert_clean();
}

fn on_http2(form: Form) {
    let mut server = Server::start(form, &["delay=0"]);
    let connection = http2::Connection::open(server.address);
    let slow = connection.begin("/sleep/800", &[]);
    server.wait_for_in_flight(1);
    server.terminate();
    server.wait_for_draining();
    // A new connection, because the other may have received GOAWAY.
    let response = http2::Connection::open(server.address).get("/");
    assert_eq!(response.status, 503);
    assert_eq!(response.headers["retry-after"], "7");
    assert!(!response.headers.contains_key("connection"));
    assert_eq!(slow().unwrap().status, 200);
    let exit = server.exit();
    exit.assert_clean();
    assert!(
        !exit.log.contains("WARN hyper"),
        "hyper warns of a Connection header: {exit:?}"
    );
}

fn of_an_upload(form: Form) {
    const SIZE: usize = 8 * 1024 * 1024;
    let mut server = Server::start(form, &["delay=0", "drain=10000"]);
    let slow = server.get_in_background("/sleep/3000");
    server.terminate();
    server.wait_for_draining();
    let head = format!("POST /upload HTTP/1.1\r\nhost: test\r\ncontent-length: {SIZE}\r\n\r\n");
    let chunked = "POST /upload HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n";
    for whole in [true, false] {
        let mut connection = server.connect();
        connection.send(if whole { &head } else { chunked });
        let piece = vec![b'x'; 64 * 1024];
        for _ in 0..SIZE / piece.len() {
            let mut bytes = piece.clone();
            if !whole {
                bytes = format!("{:x}\r\n", piece.len()).into_bytes();
                bytes.extend(&piece);
                bytes.extend(b"\r\n");
            }
            let sent = connection.try_send(&bytes);
            sent.expect("the refused client can send to the end");
        }
        if !whole {
            connection.send("0\r\n\r\n");
        }
        let response = connection.response("POST");
        assert_eq!(response.status, 503);
        assert!(response.says_close());
        connection.assert_closed();
    }
    slow.join().unwrap().assert_ok();
    server.exit().assert_clean();
}

fn of_a_slow_upload(form: Form) {
    let mut server = Server::start(form, &["delay=0", "drain=1500"]);
    let slow = server.get_in_background("/sleep/1000");
    server.terminate();
    server.wait_for_draining();
    let mut connection = server.connect();
    connection.send("POST /upload HTTP/1.1\r\nhost: test\r\ncontent-length: 1000000\r\n\r\n");
    let stream = connection.stream().try_clone().unwrap();
    let upload = std::thread::spawn(move || {
        // Sends until the server closes the connection.
        while (&stream).write_all(b"drip").is_ok() {
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    let response = connection.response("POST");
    assert_eq!(response.status, 503);
    slow.join().unwrap().assert_ok();
    let exit = server.exit();
    exit.assert_clean();
    exit.assert_within(Duration::from_millis(900), Duration::from_millis(1600));
    upload.join().unwrap();
}

fn of_expect_continue(form: Form) {
    let mut server = Server::start(form, &["delay=0", "drain=10000"]);
    let slow = server.get_in_background("/sleep/3000");
    server.terminate();
    server.wait_for_draining();
    let mut connection = server.connect();
    connection.send(
        "POST /upload HTTP/1.1\r\nhost: test\r\ncontent-length: 8388608\r\n\
         expect: 100-continue\r\n\r\n",
    );
    let stream = connection.stream();
    stream
        .set_read_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let response = match connection.try_response("POST") {
        Err(error) if error.kind() == ErrorKind::WouldBlock => panic!("not answered at once"),
        response => response.unwrap(),
    };
    assert_eq!(response.status, 503, "{response:?}");
    slow.join().unwrap().assert_ok();
    server.exit().assert_clean();
}

/// A client need not wait for the 100, and some send the body after a short time without one.
fn of_expect_continue_and_body(form: Form) {
    const SIZE: usize = 8 * 1024 * 1024;
    let mut server = Server::start(form, &["delay=0", "drain=10000"]);
    let slow = server.get_in_background("/sleep/3000");
    server.terminate();
    server.wait_for_draining();
    let head = format!(
        "POST /upload HTTP/1.1\r\nhost: test\r\ncontent-length: {SIZE}\r\n\
         expect: 100-continue\r\n\r\n"
    );
    let mut connection = server.connect();
    let sent = connection.try_send(&[head.as_bytes(), &vec![b'x'; SIZE]].concat());
    sent.expect("the refused client can send to the end");
    let response = connection.response("POST");
    assert_eq!(response.status, 503, "{response:?}");
    assert!(response.says_close(), "{response:?}");
    assert!(response.text().contains("shutting down"));
    connection.assert_closed();
    slow.join().unwrap().assert_ok();
    server.exit().assert_clean();
}

fn of_grpc(form: Form) {
    let mut server = Server::start(form, &["delay=0", "drain=10000"]);
    let slow = server.get_in_background("/sleep/3000");
    server.terminate();
    server.wait_for_draining();
    let connection = http2::Connection::open(server.address);
    let call = connection.begin(
        "/package.Service/Method",
        &[("content-type", "application/grpc")],
    );
    let response = call().unwrap();
    assert_eq!(response.status, 200);
    assert_eq!(response.headers["content-type"], "application/grpc");
    assert_eq!(response.headers["grpc-status"], "14");
    assert!(response.body.is_empty());
    slow.join().unwrap().assert_ok();
    server.exit().assert_clean();
}

fn does_not_prolong(form: Form) {
    let mut server = Server::start(form, &["delay=0"]);
    let slow = server.get_in_background("/sleep/600");
    server.terminate();
    server.wait_for_draining();
    while !slow.is_finished() {
        // New clients connect until the last response has been sent.
        let refused = crate::client::Connection::try_open(server.address)
            .and_then(|mut connection| connection.try_request("GET", "/sleep/10000"));
        if let Ok(refused) = refused {
            assert_eq!(refused.status, 503);
        }
    }
    slow.join().unwrap().assert_ok();
    let answered = server.elapsed();
    let exit = server.exit();
    exit.assert_clean();
    exit.assert_within(Duration::ZERO, answered + Duration::from_millis(200));
}
