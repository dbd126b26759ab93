//! Responses arrive whole, even if the client sends while it reads. The report lists the responses that do
//! not.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use socket2::{Domain, SockAddr, Socket, Type};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, StreamOwned};

use crate::{
    Test,
    client::{
        frames::{
            Connection, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, Method, PING,
            WINDOW_UPDATE, request,
        },
        vanish,
    },
    process::{BOUND, Server, wait_for},
    server::Form,
    tls,
};

pub(crate) const TESTS: &[Test] = &[
    (
        "whole::a_response_over_http2_arrives_although_its_client_sends_while_it_reads",
        Form::TRACKING,
        http2,
    ),
    (
        "whole::a_response_over_http2_and_tls_arrives_although_its_client_sends_while_it_reads",
        Form::CUTTING,
        http2_over_tls,
    ),
    (
        "whole::a_response_over_http2_arrives_although_its_client_pauses",
        Form::TRACKING,
        http2_pauses,
    ),
    (
        "whole::small_responses_over_http2_arrive_although_their_client_has_no_window",
        Form::TRACKING,
        http2_small,
    ),
    (
        "whole::a_client_of_http2_that_falls_silent_after_a_frame_holds_the_stop_for_a_second",
        &[Form::Serve],
        http2_falls_silent,
    ),
    (
        "whole::a_client_of_http2_that_goes_on_sending_is_not_reset",
        &[Form::Serve],
        http2_goes_on_sending,
    ),
    (
        "whole::small_responses_arrive_although_their_clients_upload",
        Form::TRACKING,
        small_uploading,
    ),
    (
        "whole::a_response_arrives_although_its_client_pipelines",
        Form::TRACKING,
        pipelined,
    ),
    (
        "whole::a_response_arrives_although_its_client_uploads",
        Form::TRACKING,
        uploading,
    ),
    (
        "whole::a_response_over_tls_arrives_although_its_client_uploads",
        Form::CUTTING,
        uploading_over_tls,
    ),
    (
        "whole::a_response_arrives_although_its_client_uploads_slowly",
        Form::TRACKING,
        uploading_slowly,
    ),
    (
        "whole::a_response_arrives_on_a_connection_that_serving_closes",
        Form::TRACKING,
        while_serving,
    ),
    (
        "whole::a_client_that_never_stops_sending_does_not_hold_the_stop",
        Form::TRACKING,
        endless,
    ),
    (
        "whole::a_client_that_never_closes_does_not_hold_the_stop",
        Form::TRACKING,
        never_closes,
    ),
    (
        "whole::an_idle_peer_that_sends_nothing_holds_the_stop_for_a_second",
        Form::TRACKING,
        mute,
    ),
    (
        "whole::a_client_that_has_vanished_before_the_stop_holds_it_for_seconds",
        Form::TRACKING,
        vanished_before,
    ),
    (
        "whole::a_response_that_has_ended_before_the_stop_arrives_although_its_client_pauses",
        Form::TRACKING,
        pauses,
    ),
    (
        "whole::a_client_that_vanishes_after_its_response_holds_the_stop_for_seconds",
        Form::TRACKING,
        vanishes_after,
    ),
    (
        "whole::what_a_client_has_not_received_is_reported_as_cut",
        Form::TRACKING,
        undelivered,
    ),
    (
        "whole::what_is_left_of_a_response_that_fails_is_not_reported_as_cut_too",
        Form::TRACKING,
        fails_undelivered,
    ),
    (
        "whole::responses_that_wait_for_a_window_of_http2_are_reported_as_cut",
        &[Form::Serve],
        without_window,
    ),
    (
        "whole::a_client_that_resets_a_connection_being_closed_leaves_nothing_behind",
        Form::TRACKING,
        reset,
    ),
];

const MS: fn(u64) -> Duration = Duration::from_millis;

/// Connects a client with a small receive buffer.
pub(crate) fn narrow(address: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(32 * 1024).unwrap();
    socket.connect(&SockAddr::from(address)).unwrap();
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(BOUND)).unwrap();
    stream.set_write_timeout(Some(BOUND)).unwrap();
    stream
}

/// The phase in which the response head is sent; the delay; the duration of the handler.
const PHASES: &[(&str, &str, u64)] = &[
    ("lame duck", "delay=1500", 400),
    ("draining", "delay=0", 400),
    ("draining, after the delay", "delay=200", 700),
];

/// SETTINGS with a window of 8 MiB for each stream.
const WIDE: &[u8] = &[0, 4, 0, 0x80, 0, 0];

fn http2(form: Form) {
    for (phase, delay, handler) in PHASES {
        for kib in [256, 3 * 1024] {
            let mut server = Server::start(form, &[delay, "drain=20000"]);
            let mut client = Connection::on(narrow(server.address), WIDE);
            begin_wide(&mut client, &format!("/bytes/{handler}/{kib}"));
            server.wait_for_in_flight(1);
            server.terminate();
            read_and_send(&mut client, phase, kib);
            drop(client);
            server.exit().assert_clean();
        }
    }
}

/// Opens the window of the connection too, and sends a request.
fn begin_wide(client: &mut Connection<impl Read + Write>, path: &str) {
    let window = (8_u32 << 20).to_be_bytes();
    client.send(WINDOW_UPDATE, 0, 0, &window).unwrap();
    client.begin(path).unwrap();
}

/// Reads a response of `kib` KiB, and sends frames after each of its frames.
fn read_and_send(client: &mut Connection<impl Read + Write>, phase: &str, kib: usize) {
    let mut got = 0;
    loop {
        let Some(frame) = client.read() else {
            panic!("{phase}: closed after {got} of {kib} KiB");
        };
        if frame.kind != DATA {
            continue;
        }
        got += frame.payload.len();
        if frame.flags & END_STREAM != 0 {
            break;
        }
        let more = u32::try_from(frame.payload.len()).unwrap().to_be_bytes();
        // Write errors are ignored, because the server may be closing.
        for (kind, stream, payload) in [
            (WINDOW_UPDATE, 0, &more[..]),
            (WINDOW_UPDATE, frame.stream, &more),
            (PING, 0, b"are you?"),
        ] {
            let _ = client.send(kind, 0, stream, payload);
        }
        thread::sleep(MS(1));
    }
    assert_eq!(got, kib * 1024, "{phase}");
}

type Tls = StreamOwned<ClientConnection, TcpStream>;

/// Connects a client with a small receive buffer, and completes the handshake.
fn narrow_tls(server: &Server, config: &Arc<ClientConfig>) -> Tls {
    tls::handshake(narrow(server.address), config).unwrap()
}

fn wait_for_one_in_flight(server: &Server, config: &Arc<ClientConfig>) {
    wait_for("the request", || {
        let mut observer = narrow_tls(server, config);
        let request = b"GET /count HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n";
        observer.write_all(request).unwrap();
        let mut response = String::new();
        observer.read_to_string(&mut response).unwrap();
        response.ends_with("\r\n\r\n1")
    });
}

fn http2_over_tls(form: Form) {
    const KIB: usize = 3 * 1024;
    let config = tls::config();
    for (phase, delay, handler) in PHASES {
        let mut server = Server::start(form, &[delay, "drain=20000", "tls=0"]);
        let mut client = Connection::over(narrow_tls(&server, &config), WIDE);
        begin_wide(&mut client, &format!("/after_stop/{handler}/{KIB}"));
        wait_for_one_in_flight(&server, &config);
        server.terminate();
        read_and_send(&mut client, phase, KIB);
        drop(client);
        server.exit().assert_clean();
    }
}

/// HTTP/2 flow control keeps the rest of the response in the server, not in the kernel. The client is silent
/// for longer than the server waits for a peer on a connection where nothing is in flight.
fn http2_pauses(form: Form) {
    let mut server = Server::start(form, &["delay=0", "drain=20000"]);
    let mut client = Connection::on(TcpStream::connect(server.address).unwrap(), &[]);
    let stream = client.begin("/bytes/300/256").unwrap();
    server.wait_for_in_flight(1);
    server.terminate();
    let mut got = 0;
    while got < 65_535 {
        let frame = client.read().expect("closed before the window was used up");
        got += if frame.kind == DATA {
            frame.payload.len()
        } else {
            0
        };
    }
    thread::sleep(MS(2500));
    let window = (1_u32 << 20).to_be_bytes();
    for stream in [0, stream] {
        client.send(WINDOW_UPDATE, 0, stream, &window).unwrap();
    }
    loop {
        let frame = client
            .read()
            .unwrap_or_else(|| panic!("closed after {got}"));
        if frame.kind == DATA {
            got += frame.payload.len();
            if frame.flags & END_STREAM != 0 {
                break;
            }
        }
    }
    assert_eq!(got, 256 * 1024);
    drop(client);
    server.exit().assert_clean();
}

/// The responses are so small that the handlers have finished before the stop. The peer opens its
/// flow-control window only some time later.
fn http2_small(form: Form) {
    const STREAMS: usize = 8;
    const KIB: usize = 6;
    // A window of zero for each stream.
    let mut server = Server::start(form, &["delay=0", "drain=20000"]);
    let stream = TcpStream::connect(server.address).unwrap();
    let mut client = Connection::on(stream, &[0, 4, 0, 0, 0, 0]);
    let streams: Vec<_> = (0..STREAMS)
        .map(|_| client.begin(&format!("/bytes/0/{KIB}")).unwrap())
        .collect();
    for _ in 0..STREAMS {
        client.next(HEADERS);
    }
    server.terminate();
    // Answers the PING, as every client does.
    for frame in client.until_quiet(MS(2500)) {
        assert_ne!(frame.kind, DATA, "there is no window");
    }
    let window = (1_u32 << 20).to_be_bytes();
    for stream in streams {
        client.send(WINDOW_UPDATE, 0, stream, &window).unwrap();
    }
    let (mut got, mut ended) = (0, 0);
    while ended < STREAMS {
        let frame = client
            .read()
            .unwrap_or_else(|| panic!("closed after {got} bytes and {ended} responses"));
        if frame.kind == DATA {
            got += frame.payload.len();
            ended += usize::from(frame.flags & END_STREAM != 0);
        }
    }
    assert_eq!(got, STREAMS * KIB * 1024);
    drop(client);
    server.exit().assert_clean();
}

/// The client receives the GOAWAY, sends one more frame, and then falls silent.
fn http2_falls_silent(form: Form) {
    let mut server = Server::start(form, &["delay=100", "drain=20000"]);
    let mut client = Connection::open(server.address);
    client.begin("/").unwrap();
    client.until_quiet(MS(100));
    server.terminate();
    client.next(GOAWAY);
    let window = 1_u32.to_be_bytes();
    client.send(WINDOW_UPDATE, 0, 0, &window).unwrap();
    let exit = server.exit();
    exit.assert_clean();
    exit.assert_within(MS(100), MS(4000));
    drop(client);
}

/// The client does not answer the PING, so the server closes the connection after a second, and must not reset it.
fn http2_goes_on_sending(form: Form) {
    let mut server = Server::start(form, &["delay=0", "drain=20000"]);
    let mut client = Connection::open(server.address);
    client.begin("/sleep/300").unwrap();
    server.wait_for_in_flight(1);
    server.terminate();
    client.end_of_stream();
    let begun = Instant::now();
    while begun.elapsed() < MS(1500) {
        let window = 1_u32.to_be_bytes();
        let sent = client.send(WINDOW_UPDATE, 0, 0, &window);
        assert!(sent.is_ok(), "{sent:?} after {:?}", begun.elapsed());
        thread::sleep(MS(20));
    }
    // Panics if the connection was reset.
    while client.read().is_some() {}
    drop(client);
    server.exit().assert_clean();
}

/// The response is sent long before the upload is complete, so the request is no longer in flight.
fn small_uploading(form: Form) {
    for (phase, delay, handler) in PHASES {
        let mut server = Server::start(form, &[delay, "drain=20000"]);
        let mut client = narrow(server.address);
        let head = format!("POST /bytes/{handler}/1 HTTP/1.1\r\nhost: test\r\n{UPLOAD}");
        client.write_all(head.as_bytes()).unwrap();
        server.wait_for_in_flight(1);
        server.terminate();
        let mut sending = client.try_clone().unwrap();
        let sender = thread::spawn(move || while sending.write_all(&[0; 4096]).is_ok() {});
        // Waits until the server has long closed its writing side.
        thread::sleep(MS(handler + 600));
        assert_eq!(read_slowly(&mut client, 1), 1024, "{phase}");
        client.shutdown(Shutdown::Both).unwrap();
        sender.join().unwrap();
        server.exit().assert_clean();
    }
}

/// Reads a response of `kib` KiB in small pieces. Returns the number of body bytes.
fn read_slowly(stream: &mut impl Read, kib: usize) -> usize {
    let mut read = Vec::<u8>::new();
    let mut piece = [0; 16 * 1024];
    loop {
        let end = read.windows(4).position(|end| end == b"\r\n\r\n");
        let body = end.map_or(0, |end| read.len() - end - 4);
        if body == kib * 1024 {
            return body;
        }
        match stream.read(&mut piece) {
            Ok(0) => return body,
            Ok(bytes) => read.extend(&piece[..bytes]),
            Err(error) => panic!("{error} after {body} of {kib} KiB"),
        }
        thread::sleep(MS(1));
    }
}

fn pipelined(form: Form) {
    for (phase, delay, handler) in PHASES {
        let mut server = Server::start(form, &[delay, "drain=20000"]);
        let mut client = narrow(server.address);
        let request = format!("GET /bytes/{handler}/600 HTTP/1.1\r\nhost: test\r\n\r\n");
        client.write_all(request.as_bytes()).unwrap();
        server.wait_for_in_flight(1);
        server.terminate();
        client.write_all(request.repeat(4).as_bytes()).unwrap();
        let mut sending = client.try_clone().unwrap();
        let sender = thread::spawn(move || {
            // Sends until the server has closed.
            while sending.write_all(request.as_bytes()).is_ok() {
                thread::sleep(MS(1));
            }
        });
        assert_eq!(read_slowly(&mut client, 600), 600 * 1024, "{phase}");
        client.shutdown(Shutdown::Both).unwrap();
        sender.join().unwrap();
        server.exit().assert_clean();
    }
}

const UPLOAD: &str = "content-length: 50000000\r\n\r\n";

fn uploading(form: Form) {
    for (phase, delay, handler) in PHASES {
        let mut server = Server::start(form, &[delay, "drain=20000"]);
        let mut client = narrow(server.address);
        let head = format!("POST /bytes/{handler}/600 HTTP/1.1\r\nhost: test\r\n{UPLOAD}");
        client.write_all(head.as_bytes()).unwrap();
        server.wait_for_in_flight(1);
        server.terminate();
        let mut sending = client.try_clone().unwrap();
        let sender = thread::spawn(move || while sending.write_all(&[0; 4096]).is_ok() {});
        assert_eq!(read_slowly(&mut client, 600), 600 * 1024, "{phase}");
        client.shutdown(Shutdown::Both).unwrap();
        sender.join().unwrap();
        server.exit().assert_clean();
    }
}

/// A client that sends a piece of its upload after each read.
struct Uploading(Tls);

impl Read for Uploading {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.0.read(buffer)?;
        // Small enough for the buffers of the sockets, because the server may not read it. Errors are ignored, because
        // the server may be closing.
        let _ = self.0.write(&[0; 512]);
        Ok(read)
    }
}

fn uploading_over_tls(form: Form) {
    const KIB: usize = 3 * 1024;
    let config = tls::config();
    for (phase, delay, handler) in PHASES {
        let mut server = Server::start(form, &[delay, "drain=20000", "tls=0"]);
        let mut client = Uploading(narrow_tls(&server, &config));
        let head = format!("POST /after_stop/{handler}/{KIB} HTTP/1.1\r\nhost: test\r\n{UPLOAD}");
        client.0.write_all(head.as_bytes()).unwrap();
        wait_for_one_in_flight(&server, &config);
        server.terminate();
        assert_eq!(read_slowly(&mut client, KIB), KIB * 1024, "{phase}");
        // Without the last message of TLS this would be an error.
        assert_eq!(client.read(&mut [0; 1]).unwrap(), 0, "{phase}");
        drop(client);
        server.exit().assert_clean();
    }
}

/// Between two pieces of the upload, no byte is unread and no byte is unsent.
fn uploading_slowly(form: Form) {
    let mut server = Server::start(form, &["delay=0", "drain=20000"]);
    let mut client = narrow(server.address);
    let head = format!("POST /bytes/300/1 HTTP/1.1\r\nhost: test\r\n{UPLOAD}");
    client.write_all(head.as_bytes()).unwrap();
    server.wait_for_in_flight(1);
    server.terminate();
    for piece in 0..12 {
        thread::sleep(MS(100));
        let written = client.write_all(&[0; 1000]);
        assert!(written.is_ok(), "piece {piece}: {written:?}");
    }
    assert_eq!(read_slowly(&mut client, 1), 1024);
    drop(client);
    server.exit().assert_clean();
}

fn while_serving(form: Form) {
    let server = Server::start(form, &[]);
    let mut client = narrow(server.address);
    let head = format!("POST /bytes/0/600 HTTP/1.1\r\nhost: test\r\n{UPLOAD}");
    client.write_all(head.as_bytes()).unwrap();
    let mut sending = client.try_clone().unwrap();
    let sender = thread::spawn(move || while sending.write_all(&[0; 4096]).is_ok() {});
    assert_eq!(read_slowly(&mut client, 600), 600 * 1024);
    client.shutdown(Shutdown::Both).unwrap();
    sender.join().unwrap();
    wait_for("the connection to be gone", || server.connections() == 1);
}

fn endless(form: Form) {
    let mut server = Server::start(form, &["delay=0", "drain=20000"]);
    let mut client = TcpStream::connect(server.address).unwrap();
    let head = format!("POST /bytes/300/1 HTTP/1.1\r\nhost: test\r\n{UPLOAD}");
    client.write_all(head.as_bytes()).unwrap();
    server.wait_for_in_flight(1);
    server.terminate();
    assert_eq!(read_slowly(&mut client, 1), 1024);
    let answered = server.elapsed();
    // The server reads for two seconds; a write may then wait in a full buffer.
    while client.write_all(&[0; 8192]).is_ok() {
        assert!(server.elapsed() < answered + MS(15_000));
    }
    let exit = server.exit();
    exit.assert_clean();
    exit.assert_within(answered + MS(1500), answered + MS(10_000));
}

fn never_closes(form: Form) {
    let mut server = Server::start(form, &["delay=0", "drain=20000"]);
    let mut client = server.connect();
    client.send("GET /sleep/300 HTTP/1.1\r\nhost: test\r\n\r\n");
    let idle = server.connect();
    server.wait_for_in_flight(1);
    server.terminate();
    client.response("GET").assert_ok();
    let answered = server.elapsed();
    let exit = server.exit();
    exit.assert_clean();
    exit.assert_within(answered, answered + MS(2500));
    drop((client, idle));
}

/// A peer that does not answer anything, not even a PING, because its machine is suspended or its address
/// translation has expired. No request is in flight: it was answered long ago, or never sent completely.
fn mute(form: Form) {
    const MUTE: &[(&str, &[u8])] = &[
        (
            "HTTP/2",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
        ),
        ("half a head", b"GET / HTTP/1.1\r\nhost: te"),
        ("an empty line", b"\r\n"),
        ("empty lines", b"\r\n\r\n"),
        ("empty lines and half a head", b"\n\n\r\nGET / HTTP/1.1\r\n"),
        ("nothing", b""),
    ];
    let mut server = Server::start(form, &["delay=100", "drain=20000"]);
    let mut clients = Vec::new();
    for (_, bytes) in MUTE {
        let mut client = server.connect();
        client.try_send(bytes).unwrap();
        clients.push(client);
    }
    let mut answered = Connection::open(server.address);
    answered.begin("/").unwrap();
    answered.until_quiet(MS(100));
    wait_for("all to be accepted", || {
        server.connections() == MUTE.len() + 2
    });
    server.terminate();
    let exit = server.exit();
    exit.assert_clean();
    exit.assert_within(MS(100), MS(4000));
    drop((clients, answered));
}

/// The response has ended before the stop, and the client has acknowledged nothing of it.
fn vanished_before(form: Form) {
    for protocol in ["HTTP/1", "HTTP/1, and the server closes", "HTTP/2"] {
        let mut server = Server::start(form, &["delay=100", "drain=20000"]);
        let tcp = TcpStream::connect(server.address).unwrap();
        let path = "/bytes/300/2";
        if protocol == "HTTP/2" {
            let mut client = Connection::on(tcp.try_clone().unwrap(), WIDE);
            client.until_quiet(MS(100));
            vanish(&tcp);
            client.begin(path).unwrap();
        } else {
            vanish(&tcp);
            let closes = ["", "connection: close\r\n"][usize::from(protocol != "HTTP/1")];
            let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\n{closes}\r\n");
            (&tcp).write_all(request.as_bytes()).unwrap();
        }
        server.wait_for_in_flight(1);
        server.wait_for_in_flight(0);
        server.terminate();
        let exit = server.exit();
        exit.assert_clean();
        // The kernel notices it after 3 s.
        exit.assert_within(MS(100), MS(10_000));
        drop(tcp);
    }
}

/// The response has ended before the stop, and most of it is still in the server's kernel. The client sends while it
/// reads.
fn pauses(form: Form) {
    const KIB: usize = 512;
    for is_http2 in [false, true] {
        let mut server = Server::start(form, &["delay=100", "drain=20000"]);
        let mut tcp = narrow(server.address);
        let path = format!("/bytes/300/{KIB}");
        let mut http2 = is_http2.then(|| Connection::on(tcp.try_clone().unwrap(), WIDE));
        if let Some(client) = &mut http2 {
            begin_wide(client, &path);
        } else {
            let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n");
            tcp.write_all(request.as_bytes()).unwrap();
        }
        server.wait_for_in_flight(1);
        server.wait_for_in_flight(0);
        server.terminate();
        // The kernel probes it more than three times.
        thread::sleep(MS(4000));
        if let Some(client) = &mut http2 {
            read_and_send(client, "lame duck", KIB);
        } else {
            let _ = tcp.write_all(b"GET /next HTTP/1.1\r\n");
            assert_eq!(read_slowly(&mut tcp, KIB), KIB * 1024);
        }
        drop((tcp, http2));
        server.exit().assert_clean();
    }
}

/// The client has acknowledged its response before it vanishes. On axum's server it vanishes before the GOAWAY.
fn vanishes_after(form: Form) {
    let mut server = Server::start(form, &["delay=1500", "drain=20000"]);
    server.get("/").assert_ok();
    server.terminate();
    server.wait_for_unready();
    // A client that connects so late is not asked to leave with its response.
    let mut client = Connection::open(server.address);
    client.begin("/").unwrap();
    client.end_of_stream();
    client.until_quiet(MS(100));
    vanish(client.stream());
    let exit = server.exit();
    exit.assert_clean();
    // The kernel notices it after 3 s.
    exit.assert_within(MS(1500), MS(10_000));
    drop(client);
}

fn undelivered(form: Form) {
    for kib in [1024, 64 * 1024] {
        let mut server = Server::start(form, &["delay=0", "drain=1500"]);
        let mut client = narrow(server.address);
        let request = format!("GET /bytes/300/{kib} HTTP/1.1\r\nhost: test\r\n\r\n");
        client.write_all(request.as_bytes()).unwrap();
        server.wait_for_in_flight(1);
        server.terminate();
        let begun = Instant::now();
        let exit = server.exit();
        assert!(begun.elapsed() >= MS(1400), "{kib} KiB: {exit:?}");
        assert_eq!(exit.status.code(), Some(1), "{kib} KiB: {exit:?}");
        assert!(exit.report.contains(", 1 cut"), "{kib} KiB: {exit:?}");
        assert!(!exit.report.contains("finished"), "{kib} KiB: {exit:?}");
        assert!(exit.report.contains("bytes undelivered"), "{exit:?}");
        drop(client);
    }
}

fn fails_undelivered(form: Form) {
    let mut server = Server::start(form, &["delay=0", "drain=1500"]);
    let mut client = narrow(server.address);
    client
        .write_all(b"GET /fails_after_stop/300 HTTP/1.1\r\nhost: test\r\n\r\n")
        .unwrap();
    server.wait_for_in_flight(1);
    server.terminate();
    let exit = server.exit();
    assert_eq!(exit.status.code(), Some(1), "{exit:?}");
    assert!(exit.report.contains("bytes undelivered"), "{exit:?}");
    let requests = "requests: 1 in flight when it began, 1 dropped |";
    assert!(exit.report.contains(requests), "{exit:?}");
    drop(client);
}

/// The window of each stream has 1,000 bytes, and the client never enlarges it.
fn without_window(form: Form) {
    let mut server = Server::start(form, &["delay=0", "drain=1500"]);
    // SETTINGS_INITIAL_WINDOW_SIZE (RFC 9113 §6.5.2)
    let settings = [0, 4, 0, 0, 3, 232];
    let mut client = Connection::on(TcpStream::connect(server.address).unwrap(), &settings);
    for _ in 0..2 {
        client.begin("/").unwrap();
        client.end_of_stream();
    }
    for path in [
        "/after_stop/300/2",
        "/after_stop/300/200",
        "/after_stop/300/3000",
    ] {
        client.begin(path).unwrap();
    }
    // Its body ends with trailers.
    let call = request(Method::Post, "/grpc/300/200");
    let flags = END_STREAM | END_HEADERS;
    client.send(HEADERS, flags, 101, &call).unwrap();
    server.wait_for_in_flight(4);
    server.terminate();
    let exit = server.exit();
    assert_eq!(exit.status.code(), Some(1), "{exit:?}");
    assert!(exit.report.contains(", 4 cut"), "{exit:?}");
    assert!(!exit.report.contains("finished"), "{exit:?}");
    drop(client);
}

fn reset(form: Form) {
    let server = Server::start(form, &[]);
    let clients: Vec<_> = (0..100)
        .map(|_| {
            let mut client = narrow(server.address);
            let request = "GET /bytes/0/300 HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n";
            client.write_all(request.as_bytes()).unwrap();
            client.peek(&mut [0]).unwrap();
            client
        })
        .collect();
    assert_eq!(server.connections(), 101);
    for client in clients {
        let linger = socket2::SockRef::from(&client);
        linger.set_linger(Some(Duration::ZERO)).unwrap();
    }
    wait_for("the connections to be gone", || server.connections() == 1);
}
