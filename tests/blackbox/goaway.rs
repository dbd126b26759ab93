//! GOAWAY: HTTP/2 clients are asked to leave their connections, and lose no request.

use std::time::Duration;

use crate::{
    Test,
    client::{
        frames::{Connection, DATA, END_STREAM, Frame, GOAWAY, HEADERS},
        http2,
    },
    process::Server,
    server::Form,
};

pub(crate) const TESTS: &[Test] = &[
    (
        "goaway::comes_with_the_next_response_of_the_lame_duck_phase",
        &[Form::Serve],
        with_a_response,
    ),
    (
        "goaway::comes_at_the_end_of_the_lame_duck_phase_to_clients_that_connect_in_it",
        &[Form::Serve],
        late,
    ),
    (
        "goaway::comes_to_clients_that_connect_in_the_last_moment",
        &[Form::Serve],
        last_moment,
    ),
    (
        "goaway::comes_before_requests_are_refused",
        &[Form::Serve],
        when_draining_starts,
    ),
    (
        "goaway::comes_when_connections_close",
        &[Form::Run, Form::Smallest],
        when_connections_close,
    ),
    (
        "goaway::does_not_come_before_the_response_to_a_late_client",
        &[Form::Serve],
        connects_late,
    ),
    (
        "goaway::loses_no_stream_that_races_with_it",
        Form::ALL,
        racing,
    ),
    (
        "goaway::lets_twenty_five_streams_finish",
        Form::ALL,
        twenty_five,
    ),
];

const MS: fn(u64) -> Duration = Duration::from_millis;
/// The last stream of a first GOAWAY, which still allows all streams (RFC 9113 §6.8).
const ALL_STREAMS: u32 = u32::MAX >> 1;

/// Opens a connection and completes one request on it.
fn used(server: &Server) -> Connection {
    let mut connection = Connection::open(server.address);
    connection.begin("/").unwrap();
    assert!(connection.next(HEADERS).is_ok());
    assert!(
        connection
            .until_quiet(MS(50))
            .iter()
            .all(|f| f.kind == DATA)
    );
    connection
}

fn with_a_response(form: Form) {
    let mut server = Server::start(form, &["delay=2000"]);
    let mut idle = used(&server);
    let mut busy = used(&server);
    server.terminate();
    server.wait_for_unready();
    busy.begin("/").unwrap();
    assert!(busy.next(HEADERS).is_ok());
    assert_eq!(busy.next(GOAWAY).last_stream(), ALL_STREAMS);
    assert_eq!(busy.next(GOAWAY).last_stream(), 3);
    // The server closes a connection whose requests have completed.
    busy.until_closed();
    assert!(server.elapsed() < MS(1900), "{:?}", server.elapsed());
    // A client without requests gets no GOAWAY before the end of the delay.
    let frames = idle.until_quiet(MS(1900).saturating_sub(server.elapsed()));
    assert!(frames.is_empty(), "{frames:?}");
    assert_eq!(idle.next(GOAWAY).last_stream(), ALL_STREAMS);
    idle.until_closed();
    server.exit().assert_clean();
}

/// If GOAWAY came with the first response, a client without a load balancer would open a new connection
/// for nearly every request during the delay.
fn late(form: Form) {
    let mut server = Server::start(form, &["delay=2000"]);
    // Waits until it serves. Before that, a signal would end the process without a delay.
    server.get("/").assert_ok();
    server.terminate();
    server.wait_for_unready();
    let mut connection = used(&server);
    while server.elapsed() < MS(800) {
        connection.begin("/").unwrap();
        loop {
            let frame = connection.read().unwrap();
            assert!(frame.kind != GOAWAY, "after {:?}", server.elapsed());
            if frame.flags & END_STREAM != 0 {
                break;
            }
        }
    }
    assert_eq!(connection.next(GOAWAY).last_stream(), ALL_STREAMS);
    assert!(server.elapsed() > MS(1950), "{:?}", server.elapsed());
    connection.until_closed();
    server.exit().assert_clean();
}

fn last_moment(form: Form) {
    let mut server = Server::start(form, &["drain=5000"]);
    let held = server.get_in_background("/sleep/4000");
    server.terminate();
    // A moment at which the other clients have received GOAWAY, and draining has not begun.
    server.until(MS(983));
    let mut connection = Connection::open(server.address);
    connection.begin("/").unwrap();
    assert_eq!(connection.next(GOAWAY).last_stream(), ALL_STREAMS);
    // Not only when connections are closed.
    assert!(server.elapsed() < MS(3500), "{:?}", server.elapsed());
    connection.until_closed();
    held.join().unwrap().assert_ok();
    server.exit().assert_clean();
}

fn when_draining_starts(form: Form) {
    let mut server = Server::start(form, &[]);
    // A client without a request, one whose request has completed, and one with a request in flight.
    let mut silent = Connection::open(server.address);
    let mut idle = used(&server);
    let mut busy = Connection::open(server.address);
    let slow = busy.begin("/sleep/3500").unwrap();
    server.wait_for_in_flight(1);
    server.terminate();
    for connection in [&mut silent, &mut idle, &mut busy] {
        assert_eq!(connection.next(GOAWAY).last_stream(), ALL_STREAMS);
    }
    assert!(server.elapsed() > MS(950), "{:?}", server.elapsed());
    // Not only when connections are closed after the last response.
    assert!(server.elapsed() < MS(3000), "{:?}", server.elapsed());
    for connection in [&mut silent, &mut idle] {
        connection.until_closed();
    }
    assert!(server.elapsed() < MS(3000), "{:?}", server.elapsed());
    // It still listens.
    server.wait_for_draining();
    assert_eq!(server.get("/").status, 503);
    let head = busy.next(HEADERS);
    assert!(head.is_ok() && head.stream == slow, "{head:?}");
    busy.end_of_stream();
    busy.until_closed();
    server.exit().assert_clean();
}

fn when_connections_close(form: Form) {
    let mut server = Server::start(form, &[]);
    let mut busy = Connection::open(server.address);
    busy.begin("/sleep/1500").unwrap();
    server.wait_for_in_flight(1);
    server.terminate();
    // GOAWAY and the response may come in either order, because the request is no longer in flight
    // once its response is being sent.
    let first = loop {
        let frame = busy.read().unwrap();
        if matches!(frame.kind, HEADERS | GOAWAY) {
            break frame;
        }
    };
    assert!(server.elapsed() > MS(1400), "{:?}", server.elapsed());
    let other = if first.kind == HEADERS {
        GOAWAY
    } else {
        HEADERS
    };
    let second = busy.next(other);
    for frame in [first, second] {
        assert!(frame.kind == GOAWAY && frame.last_stream() == ALL_STREAMS || frame.is_ok());
    }
    busy.until_closed();
    server.exit().assert_clean();
}

fn connects_late(form: Form) {
    let mut server = Server::start(form, &[]);
    let slow = server.get_in_background("/sleep/1800");
    server.terminate();
    server.wait_for_unready();
    let mut connection = Connection::open(server.address);
    assert!(connection.until_quiet(MS(100)).is_empty());
    connection.begin("/").unwrap();
    assert!(connection.next(HEADERS).is_ok());
    connection.until_closed();
    server.wait_for_draining();
    let mut connection = Connection::open(server.address);
    assert!(connection.until_quiet(MS(100)).is_empty());
    connection.begin("/").unwrap();
    let head = connection.next(HEADERS);
    assert!(!head.is_ok(), "{head:?}");
    connection.until_closed();
    slow.join().unwrap().assert_ok();
    server.exit().assert_clean();
}

/// A client opens streams on a connection until the second GOAWAY names the last stream.
fn racing(form: Form) {
    for delay in ["delay=0", "delay=300"] {
        let mut server = Server::start(form, &[delay]);
        let mut connection = used(&server);
        let slow = server.get_in_background("/sleep/600");
        server.wait_for_in_flight(1);
        server.terminate();
        let mut sent = vec![1];
        let mut frames: Vec<Frame> = Vec::new();
        let last_stream = |frames: &[Frame]| {
            let goaway = frames.iter().rev().find(|frame| frame.kind == GOAWAY)?;
            Some(goaway.last_stream()).filter(|last| *last != ALL_STREAMS)
        };
        while last_stream(&frames).is_none() {
            for _ in 0..3 {
                if let Ok(stream) = connection.begin("/") {
                    sent.push(stream);
                }
            }
            frames.extend(connection.until_quiet(Duration::from_micros(200)));
            assert!(server.elapsed() < MS(3000), "no GOAWAY");
        }
        while let Some(frame) = connection.read() {
            frames.push(frame);
        }
        let last = last_stream(&frames).unwrap();
        let answered = |stream| {
            let mut frames = frames.iter().filter(|frame| frame.stream == stream);
            frames.any(|frame| frame.flags & END_STREAM != 0)
        };
        let promised = sent.iter().filter(|stream| **stream <= last).skip(1);
        let unanswered: Vec<_> = promised
            .clone()
            .filter(|stream| !answered(**stream))
            .collect();
        assert!(promised.count() > 0, "{last} of {sent:?}: {frames:?}");
        assert!(unanswered.is_empty(), "{unanswered:?} of {}", sent.len());
        slow.join().unwrap().assert_ok();
        server.exit().assert_clean();
    }
}

fn twenty_five(form: Form) {
    let mut server = Server::start(form, &["delay=200"]);
    let connection = http2::Connection::open(server.address);
    let streams: Vec<_> = (0..25)
        .map(|i| connection.begin(&format!("/stream/10/{}", 60 + i), &[]))
        .collect();
    server.wait_for_in_flight(25);
    server.terminate();
    for stream in streams {
        let response = stream().unwrap();
        assert_eq!(response.status, 200);
        assert_eq!(response.body.split(|byte| *byte == b'\n').count(), 11);
    }
    let exit = server.exit();
    exit.assert_clean();
    exit.assert_within(MS(500), MS(1500));
}
