//! Promises about connections: the head timeout, when clients are asked to leave, cuts, and upgraded
//! connections.

use std::{
    io::{self, Read},
    thread,
    time::{Duration, Instant},
};

use crate::{
    Test,
    client::frames::{self, DATA, END_STREAM, GOAWAY, HEADERS},
    process::{Server, join, soon, wait_for},
    server::Form,
};

pub(crate) const TESTS: &[Test] = &[
    (
        "connections::must_send_a_head_in_time",
        &[Form::Serve],
        slow_head,
    ),
    (
        "connections::may_be_idle_for_longer_than_the_head_timeout",
        &[Form::Serve],
        idle,
    ),
    (
        "connections::must_send_a_head_in_time_if_it_begins_with_the_previous_request",
        &[Form::Serve],
        shared_segment,
    ),
    (
        "connections::may_be_idle_after_an_empty_line",
        &[Form::Serve],
        empty_line,
    ),
    (
        "connections::must_send_a_head_after_very_many_empty_lines",
        &[Form::Serve],
        empty_lines,
    ),
    (
        "connections::have_unlimited_time_for_a_head_if_so_configured",
        &[Form::Serve],
        endless_head,
    ),
    (
        "connections::that_are_accepted_late_are_asked_to_leave",
        &[Form::Serve],
        late_slots,
    ),
    (
        "connections::are_asked_to_leave_one_after_another",
        &[Form::Serve],
        asked_in_slots,
    ),
    (
        "connections::of_http2_are_asked_to_leave_one_after_another",
        &[Form::Serve],
        http2_asked_in_slots,
    ),
    (
        "connections::of_other_servers_are_asked_on_a_fraction_of_responses",
        &[Form::Run, Form::Smallest],
        share_of_responses,
    ),
    (
        "connections::that_are_cut_are_visibly_cut",
        Form::CUTTING,
        cut_is_visible,
    ),
    (
        "connections::that_are_upgraded_count_until_they_are_cut",
        Form::CUTTING,
        upgraded,
    ),
    (
        "connections::of_http2_carry_other_protocols",
        Form::CUTTING,
        connect,
    ),
];

const MS: fn(u64) -> Duration = Duration::from_millis;

fn slow_head(form: Form) {
    let mut server = Server::start(form, &["header_read_timeout=400", "delay=0"]);
    let slow = server.get_in_background("/sleep/1200");
    for begun in [
        "P",
        "PRI * HT",
        "GET / HT",
        "GET / HTTP/1.1\r\nhost: test\r\n",
    ] {
        let fresh = server.connect();
        let mut used = server.connect();
        used.get("/").assert_ok();
        // The timeout runs from the first byte of a head, not from the end of the previous request.
        thread::sleep(MS(100));
        let asked = [fresh, used].map(|mut connection| {
            let at = Instant::now();
            connection.send(begun);
            (connection, at)
        });
        for (connection, at) in asked {
            connection.assert_closed();
            let after = at.elapsed();
            // Without the timeout the server would not close it.
            assert!(after > MS(350) && after < MS(4000), "{begun:?}: {after:?}");
        }
    }
    // Single bytes do not extend the timeout.
    let mut connection = server.connect();
    let begun = Instant::now();
    while connection.try_send(b"GET / HTTP/1.1"[..1].as_ref()).is_ok() {
        thread::sleep(MS(20));
        assert!(begun.elapsed() < MS(2000), "the timeout was extended");
    }
    slow.join().unwrap().assert_ok();
    server.terminate();
    server.exit().assert_clean();
}

fn idle(form: Form) {
    let mut server = Server::start(form, &["header_read_timeout=200", "delay=0"]);
    let mut silent = server.connect();
    let mut idle = server.connect();
    let mut uploading = server.connect();
    let mut http2 = frames::Connection::open(server.address);
    idle.get("/").assert_ok();
    uploading.send("POST /upload HTTP/1.1\r\nhost: test\r\ncontent-length: 4\r\n\r\nha");
    server.wait_for_in_flight(1);
    thread::sleep(MS(600));
    silent.get("/").assert_ok();
    idle.get("/").assert_ok();
    uploading.send("lf");
    uploading.response("POST").assert_ok();
    // After a late body the connection is idle again, and no head has begun.
    thread::sleep(MS(600));
    uploading.get("/").assert_ok();
    http2.begin("/").unwrap();
    assert!(http2.next(HEADERS).is_ok());
    server.terminate();
    drop((silent, idle, uploading));
    http2.until_closed();
    server.exit().assert_clean();
}

/// The head begins in one segment with the previous request, byte by byte, or separately. The client cannot
/// control how its bytes arrive.
fn shared_segment(form: Form) {
    const GET: &str = "GET / HTTP/1.1\r\nhost: test\r\n\r\n";
    const POST: &str = "POST /upload HTTP/1.1\r\nhost: test\r\ncontent-length: 2\r\n\r\nok";

    for half_close in [&[][..], &["half_close=true"]] {
        let knobs = [&["header_read_timeout=400", "delay=0"], half_close].concat();
        let mut server = Server::start(form, &knobs);
        for request in [GET, POST, &format!("{GET}{POST}"), &format!("{POST}{GET}")] {
            for begun in ["G", "GET / HTTP/1.1\r\nhost: test\r\n", "\r\nGE"] {
                let [mut together, mut apart, mut pieces] = [(); 3].map(|()| server.connect());
                let asked = Instant::now();
                together.send(&format!("{request}{begun}"));
                apart.send(request);
                thread::sleep(MS(20));
                apart.send(begun);
                for byte in format!("{request}{begun}").bytes() {
                    pieces.try_send(&[byte]).unwrap();
                }
                for mut connection in [together, apart, pieces] {
                    for _ in 0..request.matches("HTTP/1.1").count() {
                        connection.response("GET").assert_ok();
                    }
                    connection.assert_closed();
                    let after = asked.elapsed();
                    assert!(
                        after > MS(250) && after < MS(4000),
                        "{request:?} {begun:?}: {after:?}"
                    );
                }
            }
        }
        server.terminate();
        server.exit().assert_clean();
    }
}

/// Some clients send an empty line after a body (RFC 9112 §2.2). It does not begin a request.
fn empty_line(form: Form) {
    const POST: &str = "POST /upload HTTP/1.1\r\nhost: test\r\ncontent-length: 2\r\n\r\nok";

    let mut server = Server::start(form, &["header_read_timeout=200", "delay=0"]);
    let mut first = server.connect();
    first.send("\r\n");
    let mut together = server.connect();
    together.send(&format!("{POST}\r\n"));
    let mut apart = server.connect();
    apart.send(POST);
    let mut pieces = server.connect();
    pieces.send(&format!("{POST}\r"));
    for connection in [&mut together, &mut apart, &mut pieces] {
        connection.response("POST").assert_ok();
    }
    apart.send("\r\n");
    pieces.send("\n");
    for _ in 0..2 {
        thread::sleep(MS(500));
        for connection in [&mut first, &mut together, &mut apart, &mut pieces] {
            connection.get("/").assert_ok();
            connection.send("\r\n");
        }
    }
    server.terminate();
    drop((first, together, apart, pieces));
    server.exit().assert_clean();
}

/// hyper keeps empty lines until a head follows, hundreds of kilobytes of them.
fn empty_lines(form: Form) {
    const GET: &str = "GET / HTTP/1.1\r\nhost: test\r\n\r\n";

    let mut server = Server::start(form, &["header_read_timeout=400", "delay=0"]);
    let lines = "\n".repeat(200_000);
    for begun in [lines.clone(), format!("{GET}{lines}")] {
        let mut connection = server.connect();
        let at = Instant::now();
        connection.send(&begun);
        for _ in 0..begun.matches("HTTP/1.1").count() {
            connection.response("GET").assert_ok();
        }
        // The server may not have read all of it.
        let mut rest = Vec::new();
        let end = connection.stream().read_to_end(&mut rest);
        let is_reset = |error: &io::Error| error.kind() == io::ErrorKind::ConnectionReset;
        assert!(end.as_ref().err().is_none_or(is_reset), "{end:?}");
        let after = at.elapsed();
        assert!(after > MS(350) && after < MS(4000), "{after:?}");
    }
    // Single lines do not extend the timeout.
    let mut connection = server.connect();
    let begun = Instant::now();
    while connection.try_send(b"\r\n").is_ok() {
        thread::sleep(MS(20));
        assert!(begun.elapsed() < MS(4000), "the timeout was extended");
    }
    server.terminate();
    server.exit().assert_clean();
}

fn endless_head(form: Form) {
    let mut server = Server::start(form, &["header_read_timeout=max", "delay=0"]);
    let mut connection = server.connect();
    for piece in ["GET / HT", "TP/1.1\r\nhost: test\r\n", "\r\n"] {
        connection.send(piece);
        thread::sleep(MS(100));
    }
    connection.response("GET").assert_ok();
    connection.get("/").assert_ok();
    server.terminate();
    server.exit().assert_clean();
}

/// Clients that connect after the start of the stop, and complete a request before their stagger slot.
fn late_slots(form: Form) {
    let mut server = Server::start(form, &["delay=5000", "spread=2000"]);
    server.get("/").assert_ok();
    server.terminate();
    server.wait_for_unready();
    let clients: Vec<_> = (0..8).map(|_| used_http2(&server)).collect();
    assert!(server.elapsed() < MS(1500), "{:?}", server.elapsed());
    for mut client in clients {
        client.next(GOAWAY);
        client.until_closed();
    }
    // Not only at the end of the delay.
    assert!(server.elapsed() < MS(4500), "{:?}", server.elapsed());
    server.exit().assert_clean();
}

fn used_http2(server: &Server) -> frames::Connection {
    let mut client = frames::Connection::open(server.address);
    client.begin("/").unwrap();
    client.end_of_stream();
    client
}

/// When each client was asked to leave, as a fraction of a spread of two seconds.
fn asked_at<C: Send + 'static>(
    server: &mut Server,
    clients: Vec<C>,
    leave: impl Fn(C) + Clone + Send + 'static,
) -> Vec<f64> {
    server.terminate();
    let begun = Instant::now();
    let clients = clients.into_iter().map(|client| {
        let leave = leave.clone();
        thread::spawn(move || {
            leave(client);
            begun.elapsed().as_secs_f64() / 2.0
        })
    });
    let clients: Vec<_> = clients.collect();
    let mut asked: Vec<_> = clients.into_iter().map(join).collect();
    asked.sort_by(f64::total_cmp);
    asked
}

#[track_caller]
fn assert_linear(asked: &[f64]) {
    let step = 1.0 / f64::from(u32::try_from(asked.len()).unwrap());
    // A share of the two seconds.
    let off = soon(MS(200)).as_secs_f64() / 2.0;
    let mut even = 0.0;
    for at in asked {
        assert!((at - even).abs() < off, "{at} for {even}: {asked:?}");
        even += step;
    }
}

/// The delay is longer than the spread, so that a client that runs late on a busy machine is still asked.
const SPREAD: &[&str] = &["delay=4000", "spread=2000"];

fn asked_in_slots(form: Form) {
    let mut server = Server::start(form, SPREAD);
    let mut clients: Vec<_> = (0..40).map(|_| server.connect()).collect();
    for client in &mut clients {
        assert!(!client.get("/").says_close());
    }
    let asked = asked_at(&mut server, clients, |mut client| {
        loop {
            let response = client.get("/");
            response.assert_ok();
            if response.says_close() {
                return client.assert_closed();
            }
            thread::sleep(MS(20));
        }
    });
    assert_linear(&asked);
    server.exit().assert_clean();
}

fn http2_asked_in_slots(form: Form) {
    let mut server = Server::start(form, SPREAD);
    let clients: Vec<_> = (0..40).map(|_| used_http2(&server)).collect();
    // No client sends another request.
    let asked = asked_at(&mut server, clients, |mut client| {
        client.next(GOAWAY);
        client.until_closed();
    });
    assert_linear(&asked);
    server.exit().assert_clean();
}

fn share_of_responses(form: Form) {
    let mut server = Server::start(form, &["delay=4000", "spread=2000"]);
    assert!(!server.get("/").says_close());
    server.terminate();
    server.wait_for_unready();
    let (mut closing, mut expected) = (0.0, 0.0);
    for _ in 0..200 {
        let elapsed = server.elapsed();
        if server.get("/").says_close() {
            closing += 1.0;
        }
        // The whole spread is two seconds.
        expected += (elapsed.as_secs_f64() / 2.0).min(1.0);
        thread::sleep(MS(8));
    }
    let off: f64 = closing - expected;
    assert!(
        off.abs() < 20.0,
        "{closing} of 200 responses ask to close, not {expected}"
    );
    server.exit().assert_clean();
}

fn cut_is_visible(form: Form) {
    let mut server = Server::start(form, &["delay=0", "drain=500"]);
    let open = |request: &str| {
        let mut connection = server.connect();
        connection.send(request);
        assert_eq!(connection.head().status, 200);
        connection
    };
    // The handler has returned this body in one piece, and most of it is not sent.
    let of_a_length = open("GET /large HTTP/1.1\r\nhost: test\r\n\r\n");
    let in_chunks = open("GET /stream/1000000/20 HTTP/1.1\r\nhost: test\r\n\r\n");
    // This body ends with the connection (RFC 9112 §6.3), so only a reset shows the cut.
    let to_the_end = open("GET /stream/1000000/20 HTTP/1.0\r\n\r\n");
    let mut http2 = frames::Connection::open(server.address);
    let stream = http2.begin("/stream/1000000/20").unwrap();
    assert!(http2.next(HEADERS).is_ok());
    server.terminate();
    // The client reads the bytes that were written before the cut, and then the reset.
    for mut connection in [of_a_length, in_chunks, to_the_end] {
        server.until(MS(600));
        let error = connection.rest().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}");
    }
    let rest = http2.until_quiet(MS(1000));
    assert!(!rest.is_empty());
    let mut ended = rest.iter().filter(|frame| frame.stream == stream);
    assert!(ended.all(|frame| frame.flags & END_STREAM == 0), "{rest:?}");
    let exit = server.exit();
    assert_eq!(exit.status.code(), Some(1), "{exit:?}");
    assert!(
        exit.report.contains("4 requests, 4 connections"),
        "{exit:?}"
    );
}

fn upgraded(form: Form) {
    let mut server = Server::start(form, &["delay=300", "drain=700"]);
    let mut connection = server.connect();
    connection.send(
        "GET /upgrade HTTP/1.1\r\nhost: test\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n",
    );
    assert_eq!(connection.head().status, 101);
    let mut echo = |text: &str| {
        connection.send(text);
        assert_eq!(connection.line().unwrap(), text.trim_end());
    };
    echo("while serving\n");
    wait_for("the upgrade to be no request", || server.in_flight() == 0);
    // The upgraded connection, and the one that asks.
    wait_for("the upgrade to be a connection", || {
        server.get("/connections").text() == "2"
    });
    server.terminate();
    server.wait_for_unready();
    echo("in the delay\n");
    server.until(MS(600));
    echo("and in the drain\n");
    let exit = server.exit();
    assert_eq!(exit.status.code(), Some(1), "{exit:?}");
    assert!(exit.report.contains("given up: 1 connection"), "{exit:?}");
    let peer = connection.stream().local_addr().unwrap().to_string();
    assert!(exit.report.contains(&peer), "{exit:?}");
    exit.assert_within(MS(1000), MS(1500));
    let read = connection.stream().read(&mut [0]);
    assert!(!matches!(read, Ok(1..)), "{read:?}");
}

/// The beginning of WebSocket over HTTP/2 (RFC 8441).
fn connect(form: Form) {
    let mut server = Server::start(form, &["delay=300", "drain=700"]);
    let mut connection = frames::Connection::open(server.address);
    let stream = connection.connect("/upgrade", "echo").unwrap();
    assert!(connection.next(HEADERS).is_ok());
    let mut echo = |text: &[u8]| {
        connection.data(stream, text).unwrap();
        assert_eq!(connection.next(DATA).payload, text);
    };
    echo(b"while serving");
    server.terminate();
    server.wait_for_unready();
    echo(b"in the delay");
    server.until(MS(600));
    echo(b"in the drain");
    connection.end(stream).unwrap();
    connection.until_closed();
    let exit = server.exit();
    exit.assert_clean();
    exit.assert_within(MS(600), MS(900));
}
