//! WebSockets and event streams, which do not end by themselves. They are notified, send a close frame or a
//! last event, and do not hold the process for longer than their timeout.

use std::{
    thread,
    time::{Duration, Instant},
};

use self::peer::{CLOSE, Raw, TEXT, assert_echoes, assert_ended, closed, masked};
use crate::{
    Test,
    client::{
        Connection,
        frames::{self, DATA, END_STREAM, Frame, GOAWAY, HEADERS, RST_STREAM},
        http2,
    },
    process::{Server, soon, wait_for},
    server::Form,
};

pub(crate) mod peer;
pub(crate) mod server;

pub(crate) const TESTS: &[Test] = &[
    (
        "long_lived::websockets_work_and_can_be_opened_during_the_delay",
        Form::ALL,
        usable,
    ),
    (
        "long_lived::websockets_are_closed_with_a_code_and_waited_for",
        Form::ALL,
        waited_for,
    ),
    (
        "long_lived::a_websocket_whose_peer_does_not_answer_holds_until_its_timeout",
        Form::ALL,
        unanswered,
    ),
    (
        "long_lived::a_websocket_whose_peer_does_not_read_holds_until_its_timeout",
        Form::ALL,
        unread,
    ),
    (
        "long_lived::an_echo_whose_peer_does_not_read_holds_until_its_timeout",
        Form::ALL,
        unread_echo,
    ),
    (
        "long_lived::a_websocket_that_does_not_end_is_cut_and_dropped_before_cleanup",
        Form::CUTTING,
        stubborn,
    ),
    (
        "long_lived::a_websocket_whose_peer_is_gone_does_not_hold",
        Form::ALL,
        reset,
    ),
    (
        "long_lived::a_websocket_is_refused_while_draining",
        Form::ALL,
        refused,
    ),
    (
        "long_lived::event_streams_end_with_a_last_event",
        Form::ALL,
        last_event,
    ),
    (
        "long_lived::a_finite_body_is_sent_to_its_end_while_event_streams_end",
        Form::ALL,
        finite,
    ),
    (
        "long_lived::clients_that_reconnect_do_not_prolong_the_drain",
        Form::ALL,
        comes_back,
    ),
    (
        "long_lived::event_streams_end_all_at_once",
        Form::ALL,
        at_once,
    ),
    (
        "long_lived::event_streams_end_evenly_over_a_spread",
        Form::ALL,
        spread,
    ),
    (
        "long_lived::event_streams_over_http2_end_with_a_last_event",
        Form::ALL,
        last_event_over_http2,
    ),
    (
        "long_lived::a_websocket_over_http2_is_closed_and_waited_for",
        Form::CUTTING,
        websocket_over_http2,
    ),
    (
        "long_lived::no_stream_of_a_thousand_is_lost",
        Form::CUTTING,
        thousand_streams,
    ),
    (
        "long_lived::streams_beyond_the_limit_can_be_retried",
        Form::ALL,
        beyond_the_limit,
    ),
];

const MS: fn(u64) -> Duration = Duration::from_millis;
/// The time limit of events that come at once, on a busy machine.
const SOON: Duration = Duration::from_millis(1500);

fn usable(form: Form) {
    let mut server = Server::start(form, &["delay=2000"]);
    let mut early = peer::open(&server, "/ws");
    assert_echoes(&mut early, "before");
    server.terminate();
    server.wait_for_unready();
    assert_echoes(&mut early, "during the delay");
    let mut late = peer::open(&server, "/ws");
    assert_echoes(&mut late, "opened during the delay");
    assert!(server.elapsed() < MS(2000), "{:?}", server.elapsed());
    let late = thread::spawn(move || closed(late));
    assert_eq!(u16::from(closed(early).code), 1001);
    assert_eq!(u16::from(late.join().unwrap().code), 1001);
    let exit = server.exit();
    exit.assert_clean();
    exit.assert_within(MS(2000), MS(2500));
}

fn waited_for(form: Form) {
    for (knob, code) in [("close=1001", 1001), ("close=1012", 1012)] {
        let mut server = Server::start(form, &["loud=yes", knob]);
        let mut peer = Raw::open(&server, "/ws");
        server.wait_for_in_flight(1);
        server.terminate();
        let close = peer.read();
        let closed = server.elapsed();
        assert!(
            closed >= MS(1000) && closed < MS(1000) + soon(SOON),
            "{closed:?}"
        );
        assert_eq!(close, (CLOSE, peer::close(code, "deploy")));
        server.expect_line("the socket is notified");
        server.until(MS(1700));
        assert_eq!(server.in_flight(), 1, "it is waited for");
        peer.send(CLOSE, &peer::close(code, "")).unwrap();
        // The server closes the connection first (RFC 6455 §7.1.1).
        peer.0.assert_closed();
        server.expect_line("the socket is closed: true");
        let exit = server.exit();
        exit.assert_clean();
        exit.assert_within(MS(1700), MS(2300));
    }
}

fn unanswered(form: Form) {
    let mut server = Server::start(form, &["loud=yes", "close_within=700"]);
    let mut mute = Raw::open(&server, "/ws");
    let mut talking = Raw::open(&server, "/ws");
    server.wait_for_in_flight(2);
    server.terminate();
    assert_eq!(mute.read().0, CLOSE);
    assert_eq!(talking.read().0, CLOSE);
    // A peer that keeps sending does not prolong the timeout either.
    let talks = thread::spawn(move || {
        while talking.send(TEXT, b"and another thing").is_ok() {
            thread::sleep(MS(5));
        }
    });
    for _ in 0..2 {
        server.expect_line("the socket is notified");
    }
    for _ in 0..2 {
        server.expect_line("the socket is closed: false");
    }
    let exit = server.exit();
    talks.join().unwrap();
    exit.assert_clean();
    exit.assert_within(MS(1700), MS(2300));
}

fn unread(form: Form) {
    let server = Server::start(form, &["loud=yes", "close_within=700"]);
    let peer = Raw::open(&server, "/ws/flood");
    server.wait_for_in_flight(1);
    // The send and the receive buffer are full when no more bytes arrive.
    let mut unread = (0, Instant::now());
    wait_for("the buffers to fill", || {
        let now = waiting(&peer);
        if now != unread.0 {
            unread = (now, Instant::now());
        }
        now > 0 && unread.1.elapsed() > MS(200)
    });
    assert_closed_without_an_answer(form, server, peer);
}

/// The peer does not receive the close frame, so the service waits for as long as the handler allows. What is queued
/// before that frame is lost. Without tracked connections that is not known.
fn assert_closed_without_an_answer(form: Form, mut server: Server, peer: Raw) {
    server.terminate();
    server.expect_line("the socket is notified");
    server.expect_line("the socket is closed: false");
    let exit = server.exit();
    drop(peer);
    if form == Form::Smallest {
        exit.assert_clean();
    } else {
        assert_eq!(exit.status.code(), Some(1), "{exit:?}");
        assert!(exit.report.contains("given up: 1 connection"), "{exit:?}");
    }
    exit.assert_within(MS(1700), MS(3300));
}

fn unread_echo(form: Form) {
    let server = Server::start(form, &["loud=yes", "close_within=700"]);
    let mut peer = Raw::open(&server, "/ws");
    server.wait_for_in_flight(1);
    // The server does not read any more when it cannot send its echo, so the buffers of both fill.
    peer.0.stream().set_write_timeout(Some(MS(500))).unwrap();
    let messages = masked(TEXT, &[b'x'; 125]).repeat(500);
    while peer.0.try_send(&messages).is_ok() {}
    assert_closed_without_an_answer(form, server, peer);
}

/// The number of bytes that have arrived and that the peer has not read.
fn waiting(peer: &Raw) -> usize {
    let mut much = vec![0; 16 << 20];
    peer.0.stream().peek(&mut much).unwrap()
}

fn stubborn(form: Form) {
    let mut server = Server::start(form, &["cleanup=db:0"]);
    let mut peer = Raw::open(&server, "/ws/stubborn");
    server.wait_for_in_flight(1);
    server.terminate();
    assert_eq!(peer.read().0, CLOSE);
    server.expect_line("the handler is gone");
    let gone = server.elapsed();
    assert!(gone >= MS(3900) && gone < MS(4000) + soon(SOON), "{gone:?}");
    server.expect_line("db begins");
    server.expect_line("db is over");
    let exit = server.exit();
    assert_eq!(exit.status.code(), Some(1), "{exit:?}");
    assert!(exit.report.contains("forced"), "{exit:?}");
    assert!(exit.report.contains("hold stubborn"), "{exit:?}");
    exit.assert_within(MS(3900), MS(4500));
    drop(peer);
}

fn reset(form: Form) {
    let mut server = Server::start(form, &["delay=0", "loud=yes"]);
    let peers = [(); 2].map(|()| Raw::open(&server, "/ws"));
    server.wait_for_in_flight(2);
    let [serving, mut draining] = peers;
    leave(&serving);
    drop(serving);
    let took = server.wait_for_in_flight(1);
    assert!(took < soon(SOON), "{took:?}");
    server.terminate();
    assert_eq!(draining.read().0, CLOSE);
    leave(&draining);
    drop(draining);
    let gone = Instant::now();
    server.expect_line("the socket is notified");
    server.expect_line("the socket is closed: false");
    // The handler ends before the timeout of the close is over.
    let took = gone.elapsed();
    assert!(took < soon(SOON), "{took:?}");
    let exit = server.exit();
    exit.assert_clean();
    exit.assert_within(Duration::ZERO, MS(500));
}

/// Disconnects by RST.
fn leave(peer: &Raw) {
    let socket = socket2::SockRef::from(peer.0.stream());
    socket.set_linger(Some(Duration::ZERO)).unwrap();
}

fn refused(form: Form) {
    let mut server = Server::start(form, &["delay=0"]);
    let slow = server.get_in_background("/sleep/700");
    server.terminate();
    server.wait_for_draining();
    let Err(refused) = peer::try_open(server.address, "/ws") else {
        panic!("let in");
    };
    let refused = refused.downcast::<tungstenite::HandshakeError<_>>();
    match refused.map(|error| *error) {
        Ok(tungstenite::HandshakeError::<
            tungstenite::ClientHandshake<std::net::TcpStream>,
        >::Failure(tungstenite::Error::Http(response))) => {
            assert_eq!(response.status(), 503);
            assert!(response.headers().contains_key("retry-after"));
        }
        other => panic!("{other:?}"),
    }
    slow.join().unwrap().assert_ok();
    server.exit().assert_clean();
}

/// Opens an event stream on a new connection.
fn subscribe(server: &Server, path: &str) -> Connection {
    let mut connection = server.connect();
    connection.send(&format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n"));
    let head = connection.head();
    head.assert_ok();
    assert_eq!(head.header("content-type"), Some("text/event-stream"));
    assert_eq!(head.header("transfer-encoding"), Some("chunked"));
    connection
}

fn last_event(form: Form) {
    let mut server = Server::start(form, &[]);
    // A busy machine sends few events in a second.
    let mut streams = [("/sse/silent", 0), ("/sse/20", 1), ("/sse/0", 1)]
        .map(|(path, least)| (subscribe(&server, path), least));
    server.wait_for_in_flight(3);
    server.terminate();
    for (stream, least) in &mut streams {
        assert_ended(&stream.chunks().unwrap(), *least);
        let ended = server.elapsed();
        assert!(
            ended >= MS(1000) && ended < MS(1000) + soon(SOON),
            "{ended:?}"
        );
    }
    let exit = server.exit();
    exit.assert_clean();
    exit.assert_within(MS(1000), MS(1500));
    // The connections of the streams are closed, without a further byte.
    for (stream, _) in streams {
        stream.assert_closed();
    }
}

fn finite(form: Form) {
    let mut server = Server::start(form, &["delay=300", "drain=20000"]);
    let mut events = subscribe(&server, "/sse/20");
    let download = server.get_in_background("/stream/25/100");
    server.terminate();
    assert_ended(&events.chunks().unwrap(), 1);
    assert!(
        server.elapsed() < MS(300) + soon(SOON),
        "{:?}",
        server.elapsed()
    );
    assert!(!download.is_finished());
    let download = download.join().unwrap();
    let ended = server.elapsed();
    let whole: Vec<_> = (0..25).map(|chunk| format!("chunk {chunk}\n")).collect();
    assert_eq!(download.text(), whole.concat());
    let exit = server.exit();
    exit.assert_clean();
    exit.assert_within(MS(1000), ended + MS(500));
}

fn comes_back(form: Form) {
    let mut server = Server::start(form, &["delay=300"]);
    let slow = server.get_in_background("/sleep/2500");
    let mut events = subscribe(&server, "/sse/20");
    server.terminate();
    assert_ended(&events.chunks().unwrap(), 1);
    // The client retries on the same connection, which is closed, or refuses.
    match events.try_request("GET", "/sse/20") {
        Ok(response) => assert_eq!(response.status, 503, "{response:?}"),
        Err(error) => assert!(server.elapsed() < MS(300) + soon(SOON), "{error}"),
    }
    // The client reconnects repeatedly until the listener is closed.
    let (address, asked) = (server.address, Instant::now());
    let again = thread::spawn(move || {
        let mut refusals = 0;
        while let Ok(mut connection) = Connection::try_open(address) {
            match connection.try_request("GET", "/sse/20") {
                Ok(response) => {
                    assert_eq!(response.status, 503, "{response:?}");
                    assert!(response.says_close(), "{response:?}");
                    assert!(response.header("retry-after").is_some(), "{response:?}");
                    refusals += 1;
                }
                // The last attempt.
                Err(error) => assert!(asked.elapsed() > MS(700), "{error}"),
            }
        }
        refusals
    });
    slow.join().unwrap().assert_ok();
    let exit = server.exit();
    exit.assert_clean();
    exit.assert_within(MS(2200), MS(3100));
    let refusals = again.join().unwrap();
    assert!(refusals > 10, "{refusals}");
}

const SUBSCRIBERS: usize = 50;

/// The times from the start of draining to the end of each of fifty streams, in order.
fn ends(server: &mut Server, delay: Duration) -> Vec<Duration> {
    let streams: Vec<_> = (0..SUBSCRIBERS)
        .map(|number| {
            let path = ["/sse/silent", "/sse/30"][number % 2];
            subscribe(server, path)
        })
        .collect();
    server.wait_for_in_flight(SUBSCRIBERS);
    server.terminate();
    let signalled = Instant::now();
    let read = |mut stream: Connection| {
        thread::spawn(move || {
            assert_ended(&stream.chunks().unwrap(), 0);
            signalled.elapsed()
        })
    };
    let readers: Vec<_> = streams.into_iter().map(read).collect();
    let ends = readers.into_iter().map(|reader| reader.join().unwrap());
    let mut ends: Vec<_> = ends.map(|end| end.saturating_sub(delay)).collect();
    ends.sort();
    ends
}

fn at_once(form: Form) {
    let mut server = Server::start(form, &["delay=300"]);
    let ends = ends(&mut server, MS(300));
    // Without the notification none would end before the deadline.
    assert!(ends[SUBSCRIBERS - 1] < MS(2000), "{ends:?}");
    let exit = server.exit();
    exit.assert_clean();
    exit.assert_within(MS(300), MS(2300));
}

fn spread(form: Form) {
    // So long that a busy machine, which is late by half a second, changes the shares little.
    let knobs = ["delay=300", "drain=10000", "drain_spread=6000"];
    let mut server = Server::start(form, &knobs);
    let ends = ends(&mut server, MS(300));
    let by = |time| ends.iter().filter(|end| **end <= time).count() * 100 / SUBSCRIBERS;
    for (time, share) in [(1500, 10..=40), (3000, 35..=65), (4500, 60..=90)] {
        assert!(share.contains(&by(MS(time))), "by {time} ms: {ends:?}");
    }
    assert!(ends[SUBSCRIBERS - 1] < MS(6000) + soon(SOON), "{ends:?}");
    let exit = server.exit();
    exit.assert_clean();
    exit.assert_within(MS(6000), MS(7500));
}

fn last_event_over_http2(form: Form) {
    const STREAMS: usize = 25;
    let mut server = Server::start(form, &["delay=300"]);
    let mut connection = frames::Connection::open(server.address);
    let streams = ["/sse/silent", "/sse/20"].into_iter().cycle();
    let streams: Vec<_> = streams
        .take(STREAMS)
        .map(|path| connection.begin(path).unwrap())
        .collect();
    server.wait_for_in_flight(STREAMS);
    server.terminate();
    let frames: Vec<_> = std::iter::from_fn(|| connection.read()).collect();
    for stream in streams {
        let of_it: Vec<_> = frames.iter().filter(|f| f.stream == stream).collect();
        assert!(of_it[0].is_ok(), "{of_it:?}");
        let last = of_it.last().unwrap();
        assert!(
            last.kind == DATA && last.flags & END_STREAM != 0,
            "{of_it:?}"
        );
        let body: Vec<_> = of_it[1..].iter().flat_map(|f| f.payload.clone()).collect();
        assert_ended(&body, 0);
    }
    assert!(frames.iter().any(|frame| frame.kind == GOAWAY));
    let exit = server.exit();
    exit.assert_clean();
    exit.assert_within(MS(300), MS(900));
}

fn websocket_over_http2(form: Form) {
    let mut server = Server::start(form, &["delay=300", "loud=yes"]);
    let mut connection = frames::Connection::open(server.address);
    // A client may send an extended CONNECT only after the server has announced it (RFC 8441 §3).
    let settings = connection.next(frames::SETTINGS).payload;
    let connects = [0, 8, 0, 0, 0, 1];
    assert!(settings.chunks(6).any(|setting| setting == connects));
    let stream = connection.connect("/ws", "websocket").unwrap();
    let head = connection.next(HEADERS);
    assert!(head.is_ok() && head.flags & END_STREAM == 0, "{head:?}");
    connection
        .data(stream, &masked(TEXT, b"over HTTP/2"))
        .unwrap();
    assert_eq!(connection.next(DATA).payload, b"\x81\x0bover HTTP/2");
    assert_eq!(server.in_flight(), 1, "it is held");
    server.terminate();
    let mut frames = Vec::new();
    let mut next = |connection: &mut frames::Connection| {
        let frame = connection.read()?;
        let seen = (frame.kind, frame.stream, frame.flags);
        frames.push(seen);
        Some(frame)
    };
    let close = loop {
        match next(&mut connection) {
            Some(frame) if frame.kind == DATA => break frame,
            Some(_) => {}
            None => panic!("closed before the Close"),
        }
    };
    let close_frame = [&[0x88, 8], &*peer::close(1001, "deploy")].concat();
    assert_eq!(close.payload, close_frame);
    assert!(server.elapsed() >= MS(300), "{:?}", server.elapsed());
    server.expect_line("the socket is notified");
    server.until(MS(900));
    assert_eq!(server.in_flight(), 1, "it is waited for");
    let answer = masked(CLOSE, &peer::close(1001, ""));
    connection.data(stream, &answer).unwrap();
    while next(&mut connection).is_some() {}
    let ended = |&(kind, on, flags): &(u8, u32, u8)| {
        kind == DATA && on == stream && flags & END_STREAM != 0
    };
    assert!(frames.iter().any(ended), "{frames:?}");
    assert!(
        frames.iter().any(|(kind, ..)| *kind == GOAWAY),
        "{frames:?}"
    );
    server.expect_line("the socket is closed: true");
    let exit = server.exit();
    exit.assert_clean();
    exit.assert_within(MS(900), MS(1500));
}

const STREAMS: usize = 1000;

/// A client that respects the server's limit of concurrent streams, and has more requests than that.
fn thousand_streams(form: Form) {
    for delay in ["delay=1000", "delay=100"] {
        let mut server = Server::start(form, &[delay]);
        let connection = http2::Connection::open(server.address);
        let responses: Vec<_> = (0..STREAMS)
            .map(|_| connection.begin("/sleep/600", &[]))
            .collect();
        server.wait_for_in_flight(200);
        server.terminate();
        let [mut answered, mut refused] = [0; 2];
        for response in responses {
            match response() {
                Ok(response) if response.status == 200 => answered += 1,
                Ok(response) => {
                    assert_eq!(response.status, 503);
                    refused += 1;
                }
                Err(error) => {
                    // Either the GOAWAY says that the server has not processed this request, or
                    // hyper's client has not sent it. The client reports one unsent request with
                    // another error than the others.
                    let text = format!("{error:?}");
                    let untouched = text.contains("GoAway(b\"\", NO_ERROR, Remote")
                        || text.contains("DispatchGone")
                        || error.is_canceled();
                    assert!(untouched, "{text}");
                }
            }
        }
        println!("{form:?} {delay}: {answered} answered, {refused} refused");
        assert!(answered >= 200, "{answered}");
        let exit = server.exit();
        exit.assert_clean();
        // The client has received an answer or a refusal for each request that the server has seen.
        let finished = format!(" {answered} finished");
        assert!(exit.report.contains(&finished), "{answered}: {exit:?}");
        let reported = exit.report.contains(&format!(" {refused} refused"));
        assert!(reported || refused == 0, "{refused}: {exit:?}");
        assert!(refused > 0 || !exit.report.contains(" refused"), "{exit:?}");
    }
}

/// A client that ignores the limit, or has not received it yet.
fn beyond_the_limit(form: Form) {
    let mut server = Server::start(form, &["delay=200"]);
    let mut connection = frames::Connection::open(server.address);
    let streams: Vec<_> = (0..STREAMS)
        .map(|_| connection.begin("/sleep/700").unwrap())
        .collect();
    server.wait_for_in_flight(200);
    server.terminate();
    let frames: Vec<_> = std::iter::from_fn(|| connection.read()).collect();
    let goaways = frames.iter().filter(|frame| frame.kind == GOAWAY);
    let last = goaways.map(Frame::last_stream).min().unwrap();
    let mut answered = 0;
    for stream in &streams {
        let of_it: Vec<_> = frames.iter().filter(|f| f.stream == *stream).collect();
        if of_it.iter().any(|frame| frame.is_ok()) {
            assert!(of_it.last().unwrap().flags & END_STREAM != 0, "{of_it:?}");
            answered += 1;
        } else if *stream <= last {
            // REFUSED_STREAM: the server has not processed the request (RFC 9113 §8.7).
            let [refusal] = *of_it else {
                panic!("{stream} has got {of_it:?}, the last is {last}");
            };
            assert_eq!(refusal.kind, RST_STREAM, "{refusal:?}");
            assert_eq!(refusal.payload, [0, 0, 0, 7], "{refusal:?}");
        }
    }
    assert_eq!(answered, 200);
    server.exit().assert_clean();
}
