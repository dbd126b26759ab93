//! In-flight requests complete, and the process ends on time.

use std::{thread, time::Duration};

use crate::{
    Test,
    client::{Connection, http2},
    process::Server,
    server::Form,
};

pub(crate) const TESTS: &[Test] = &[
    (
        "draining::completes_in_flight_requests_and_then_ends",
        Form::ALL,
        finishes,
    ),
    (
        "draining::ends_when_the_delay_is_over_if_nothing_is_in_flight",
        Form::ALL,
        idle,
    ),
    (
        "draining::ends_at_once_without_a_delay",
        Form::ALL,
        idle_without_delay,
    ),
    (
        "draining::a_late_response_head_has_connection_close_and_its_own_headers",
        Form::ALL,
        late_head,
    ),
    (
        "draining::a_body_is_sent_to_its_end",
        Form::ALL,
        streams_to_the_end,
    ),
    (
        "draining::requests_left_at_the_deadline_are_cut_and_reported",
        Form::CUTTING,
        forced,
    ),
    (
        "draining::without_keep_listening_new_connections_are_refused",
        Form::ALL,
        stops_listening,
    ),
    ("draining::http2_streams_finish", Form::ALL, http2_finishes),
    (
        "draining::requests_finish_over_many_deploys",
        Form::ALL,
        deploys,
    ),
];

const MS: fn(u64) -> Duration = Duration::from_millis;

fn finishes(form: Form) {
    let mut server = Server::start(form, &[]);
    let slow = server.get_in_background("/sleep/1500");
    server.terminate();
    let response = slow.join().unwrap();
    let answered = server.elapsed();
    response.assert_ok();
    assert_eq!(response.text(), "slept");
    assert!(response.says_close(), "{response:?}");
    let exit = server.exit();
    exit.assert_clean();
    exit.assert_within(MS(1000), answered + MS(200));
}

fn idle(form: Form) {
    let mut server = Server::start(form, &[]);
    let mut kept_alive = server.connect();
    kept_alive.get("/").assert_ok();
    server.terminate();
    let exit = server.exit();
    exit.assert_clean();
    exit.assert_within(MS(1000), MS(1200));
    kept_alive.assert_closed();
}

fn idle_without_delay(form: Form) {
    let mut server = Server::start(form, &["delay=0"]);
    server.get("/").assert_ok();
    server.terminate();
    let exit = server.exit();
    exit.assert_clean();
    exit.assert_within(MS(0), MS(200));
}

fn late_head(form: Form) {
    let mut server = Server::start(form, &["delay=0"]);
    let late = server.get_in_background("/sleep/700");
    server.terminate();
    let response = late.join().unwrap();
    response.assert_ok();
    assert!(response.says_close(), "{response:?}");
    assert_eq!(response.header("x-handler"), Some("kept"));
    assert_eq!(
        response.header("content-type"),
        Some("text/plain; charset=utf-8")
    );
    assert_eq!(response.header("content-length"), Some("5"));
    server.exit().assert_clean();
}

fn streams_to_the_end(form: Form) {
    let mut server = Server::start(form, &["delay=0"]);
    let stream = server.get_in_background("/stream/10/100");
    server.terminate();
    let response = stream.join().unwrap();
    response.assert_ok();
    assert_eq!(response.text().lines().count(), 10);
    assert_eq!(response.text().lines().last(), Some("chunk 9"));
    server.exit().assert_clean();
}

fn forced(form: Form) {
    let mut server = Server::start(form, &["delay=500", "drain=1000"]);
    let handler = server.get_in_background("/sleep/60000");
    let mut body = server.connect();
    body.send("GET /stream/1000/100 HTTP/1.1\r\nhost: test\r\n\r\n");
    server.wait_for_in_flight(2);
    server.terminate();
    let exit = server.exit();
    assert_eq!(exit.status.code(), Some(1), "{exit:?}");
    exit.assert_within(MS(1500), MS(2000));
    assert!(exit.report.contains("forced"), "{exit:?}");
    assert!(
        exit.report.contains("given up: 2 requests, 2 connections"),
        "{exit:?}"
    );
    assert!(
        exit.log.contains("the drain deadline has passed"),
        "{exit:?}"
    );
    assert!(handler.join().is_err(), "there is no response to give");
    body.head().assert_ok();
    let cut = body.try_response("GET");
    assert!(
        cut.is_err(),
        "the end of the body is missing, and visibly so: {cut:?}"
    );
}

fn stops_listening(form: Form) {
    let knobs = ["delay=1000", "keep_listening=false", "observed=yes"];
    let mut server = Server::start(form, &knobs);
    let slow = server.get_in_background("/sleep/3000");
    server.terminate();
    server.expect_phase("lame duck");
    server.wait_for_unready();
    while server.elapsed() < MS(450) {
        server.get("/").assert_ok();
        thread::sleep(MS(10));
    }
    server.expect_phase("draining");
    // A server of axum closes its listener a moment later. The slow request ends after 3 s, and then every server has
    // closed it.
    while Connection::try_open(server.address).is_ok() {
        assert!(server.elapsed() < MS(2500), "it still listens");
        thread::sleep(MS(10));
    }
    for _ in 0..20 {
        let refused = Connection::try_open(server.address)
            .err()
            .expect("not refused");
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    }
    slow.join().unwrap().assert_ok();
    server.exit().assert_clean();
}

fn http2_finishes(form: Form) {
    let mut server = Server::start(form, &["delay=0"]);
    let connection = http2::Connection::open(server.address);
    let streams: Vec<_> = (0..25)
        .map(|i| {
            connection.begin(
                if i % 2 == 0 {
                    "/sleep/700"
                } else {
                    "/stream/7/100"
                },
                &[],
            )
        })
        .collect();
    server.wait_for_in_flight(25);
    server.terminate();
    for stream in streams {
        let response = stream().unwrap();
        assert_eq!(response.status, 200);
        assert!(!response.headers.contains_key("connection"));
        assert!(response.body.ends_with(b"slept") || response.body.ends_with(b"chunk 6\n"));
    }
    server.exit().assert_clean();
}

/// Repeated deploys under load: every request receives its complete response.
fn deploys(form: Form) {
    for round in 0..5 {
        let mut server = Server::start(form, &["delay=0"]);
        let requests: Vec<_> = (0..16)
            .map(|i| {
                let mut connection = server.connect();
                let path = if i % 2 == 0 {
                    "/sleep/300"
                } else {
                    "/stream/6/50"
                };
                connection.send(&format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n"));
                connection
            })
            .collect();
        server.wait_for_in_flight(16);
        thread::sleep(MS(round * 40));
        server.terminate();
        for mut request in requests {
            let response = request.response("GET");
            response.assert_ok();
            assert!(matches!(response.body.len(), 5 | 48), "{response:?}");
        }
        server.exit().assert_clean();
    }
}
