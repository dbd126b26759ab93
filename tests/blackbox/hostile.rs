//! Hostile peers. They cannot prolong the drain, crash the server, or leave a wrong count behind.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::{
    Test,
    client::{
        Connection,
        frames::{
            CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, Method, PING, PREFACE,
            RST_STREAM, SETTINGS, WINDOW_UPDATE, frame, request,
        },
    },
    process::{BOUND, Server, soon, wait_for},
    server::Form,
};

pub(crate) const TESTS: &[Test] = &[
    (
        "hostile::slow_bytes_do_not_prolong_the_drain",
        Form::CUTTING,
        slow,
    ),
    (
        "hostile::a_reset_in_any_state_leaves_no_count_behind",
        Form::CUTTING,
        resets,
    ),
    (
        "hostile::a_reset_during_the_drain_leaves_no_count_behind",
        Form::CUTTING,
        resets_during_the_drain,
    ),
    (
        "hostile::a_reset_that_the_server_does_not_see_is_cleared_at_the_deadline",
        Form::CUTTING,
        unseen,
    ),
    (
        "hostile::without_descriptors_the_stop_ends_in_time",
        Form::CUTTING,
        starved_to_the_end,
    ),
    (
        "hostile::the_service_recovers_when_descriptors_are_free",
        Form::CUTTING,
        starved_for_a_while,
    ),
];

pub(crate) const ALONE: &[Test] = &[
    (
        "hostile::a_flood_neither_prolongs_the_drain_nor_leaves_a_count",
        Form::CUTTING,
        floods,
    ),
    (
        "hostile::repeated_connects_do_not_prolong_the_drain",
        Form::CUTTING,
        repeated_connects,
    ),
];

const MS: fn(u64) -> Duration = Duration::from_millis;
/// A delay of 200 ms, and a drain deadline 800 ms later.
const KNOBS: &[&str] = &["delay=200", "drain=800"];
/// Far after that deadline, because a busy machine may stall. A peer that prolonged the stop would prolong it
/// for as long as it attacks, which is longer than this.
const IN_TIME: Duration = Duration::from_secs(5);
const SOON: Duration = Duration::from_secs(2);

/// The bytes that a peer sends first, and the bytes that it sends in every round.
struct Peer {
    what: &'static str,
    first: fn() -> Vec<u8>,
    round: fn(u32) -> Vec<u8>,
    pause: Duration,
}

/// The first bytes of an HTTP/2 connection, with a request if `asks` is given. A POST stays open for its
/// body.
fn http2(asks: Option<(Method, &str)>) -> Vec<u8> {
    let mut bytes = PREFACE.to_vec();
    bytes.extend(frame(SETTINGS, 0, 0, &[]));
    if let Some((method, path)) = asks {
        let end = match method {
            Method::Get => END_STREAM,
            Method::Post => 0,
        };
        let head = request(method, path);
        bytes.extend(frame(HEADERS, END_HEADERS | end, 1, &head));
    }
    bytes
}

fn post(path: &str, headers: &str) -> Vec<u8> {
    format!("POST {path} HTTP/1.1\r\nhost: test\r\n{headers}\r\n\r\n").into_bytes()
}

const SLOW: &[Peer] = &[
    Peer {
        what: "a slow head",
        first: || b"GET / HTTP/1.1\r\nhost: test\r\nx-slow: ".to_vec(),
        round: |_| b"x".to_vec(),
        pause: Duration::from_millis(20),
    },
    Peer {
        what: "a slow body",
        first: || post("/upload", "content-length: 1000000"),
        round: |_| b"x".to_vec(),
        pause: Duration::from_millis(20),
    },
    Peer {
        what: "a slow chunk",
        first: || post("/upload", "transfer-encoding: chunked"),
        round: |_| b"1\r\nx\r\n".to_vec(),
        pause: Duration::from_millis(20),
    },
    Peer {
        what: "a slow frame",
        first: || [http2(None), vec![0, 0x40, 0, HEADERS, 0, 0, 0, 0, 1]].concat(),
        round: |_| b"x".to_vec(),
        pause: Duration::from_millis(20),
    },
    Peer {
        what: "a slow upload over HTTP/2",
        first: || http2(Some((Method::Post, "/upload"))),
        round: |_| frame(DATA, 0, 1, b"x"),
        pause: Duration::from_millis(20),
    },
];

const FLOODS: &[Peer] = &[
    Peer {
        what: "PING",
        first: || http2(None),
        round: |_| frame(PING, 0, 0, &[0; 8]).repeat(500),
        pause: Duration::ZERO,
    },
    Peer {
        what: "SETTINGS",
        first: || http2(None),
        round: |_| frame(SETTINGS, 0, 0, &[]).repeat(500),
        pause: Duration::ZERO,
    },
    Peer {
        what: "WINDOW_UPDATE",
        first: || http2(Some((Method::Get, "/silent"))),
        round: |_| frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]).repeat(500),
        pause: Duration::ZERO,
    },
    Peer {
        what: "frames of no known kind",
        first: || http2(None),
        round: |_| frame(0xfa, 0, 0, &[]).repeat(500),
        pause: Duration::ZERO,
    },
    Peer {
        // Below the limit of the upload, so that the server does not close the connection.
        what: "tiny DATA",
        first: || http2(Some((Method::Post, "/upload"))),
        round: |_| frame(DATA, 0, 1, b"x").repeat(20),
        pause: Duration::from_millis(1),
    },
    Peer {
        what: "tiny DATA frames that no handler reads",
        first: || http2(Some((Method::Post, "/never"))),
        round: |_| frame(DATA, 0, 1, b"x").repeat(20),
        pause: Duration::from_millis(1),
    },
    Peer {
        what: "empty DATA",
        first: || http2(Some((Method::Post, "/upload"))),
        round: |_| frame(DATA, 0, 1, &[]).repeat(20),
        pause: Duration::from_millis(1),
    },
    Peer {
        what: "a head without an end",
        first: || {
            let head = frame(HEADERS, END_STREAM, 1, &request(Method::Get, "/"));
            [http2(None), head].concat()
        },
        round: |_| frame(CONTINUATION, 0, 1, &[]).repeat(500),
        pause: Duration::ZERO,
    },
    Peer {
        what: "rapid reset",
        first: || http2(None),
        round: |round| {
            let streams = (0..100).map(|i| 200 * round + 2 * i + 1);
            let head = request(Method::Get, "/never");
            let pairs = streams.map(|stream| {
                let asks = frame(HEADERS, END_STREAM | END_HEADERS, stream, &head);
                [asks, frame(RST_STREAM, 0, stream, &[0, 0, 0, 8])].concat()
            });
            pairs.collect::<Vec<_>>().concat()
        },
        pause: Duration::ZERO,
    },
    Peer {
        what: "requests without waiting for answers",
        first: Vec::new,
        round: |_| b"GET / HTTP/1.1\r\nhost: test\r\n\r\n".repeat(200),
        pause: Duration::ZERO,
    },
];

/// Peers that attack until `call_off`, or until they cannot connect any more. A peer whose connection the
/// server closes connects again.
struct Attack {
    over: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    peers: Vec<thread::JoinHandle<()>>,
}

impl Attack {
    fn new() -> Self {
        Self {
            over: Arc::default(),
            rounds: Arc::default(),
            peers: Vec::new(),
        }
    }

    fn join(&mut self, address: SocketAddr, peer: &'static Peer, reads: bool) {
        let over = Arc::clone(&self.over);
        let rounds = Arc::clone(&self.rounds);
        self.peers.push(thread::spawn(move || {
            while let (false, Ok(stream)) = (
                over.load(Ordering::Relaxed),
                TcpStream::connect_timeout(&address, BOUND),
            ) {
                let _ = torment(&stream, peer, reads, &over, &rounds);
                let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
            }
        }));
    }

    /// Ends all peers, by a reset. Returns the number of rounds.
    fn call_off(self) -> u64 {
        self.over.store(true, Ordering::Relaxed);
        for peer in self.peers {
            peer.join().unwrap();
        }
        self.rounds.load(Ordering::Relaxed)
    }
}

fn torment(
    stream: &TcpStream,
    peer: &Peer,
    reads: bool,
    over: &AtomicBool,
    rounds: &AtomicU64,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(MS(20)))?;
    stream.set_read_timeout(Some(MS(20)))?;
    let ended = AtomicBool::new(false);
    let goes_on = || !over.load(Ordering::Relaxed) && !ended.load(Ordering::Relaxed);
    let patient = |error: &io::Error| {
        use io::ErrorKind::{TimedOut, WouldBlock};
        matches!(error.kind(), TimedOut | WouldBlock) && goes_on()
    };
    let write = |mut bytes: &[u8]| {
        while !bytes.is_empty() {
            match (&*stream).write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if patient(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    };
    let read = || {
        let mut piece = [0; 16 * 1024];
        loop {
            match (&*stream).read(&mut piece) {
                Ok(1..) => {}
                Err(error) if patient(&error) => {}
                _ => return,
            }
        }
    };
    thread::scope(|scope| {
        if reads {
            scope.spawn(read);
        }
        let written = write(&(peer.first)()).and_then(|()| {
            for round in 0.. {
                write(&(peer.round)(round))?;
                rounds.fetch_add(1, Ordering::Relaxed);
                thread::sleep(peer.pause);
                if over.load(Ordering::Relaxed) {
                    break;
                }
            }
            Ok(())
        });
        ended.store(true, Ordering::Relaxed);
        written
    })
}

fn slow(form: Form) {
    for peer in SLOW {
        let mut server = Server::start(form, KNOBS);
        let mut attack = Attack::new();
        attack.join(server.address, peer, true);
        wait_for("the peer", || server.connections() == 2);
        server.get("/").assert_ok();
        server.terminate();
        let exit = server.exit();
        let what = peer.what;
        assert!(
            matches!(exit.status.code(), Some(0 | 1)),
            "{what}: {exit:?}"
        );
        exit.assert_within(Duration::ZERO, IN_TIME);
        // The attack must have lasted at least until the end of the delay.
        assert!(attack.call_off() > 5, "{what}");
    }
}

fn floods(form: Form) {
    for peer in FLOODS {
        let what = peer.what;
        let mut server = Server::start(form, KNOBS);
        let flood = |server: &Server| {
            let mut attack = Attack::new();
            for reads in [true, false] {
                attack.join(server.address, peer, reads);
            }
            thread::sleep(MS(200));
            server.get("/").assert_ok();
            attack
        };
        let rounds = flood(&server).call_off();
        assert!(rounds > 5, "{what}: {rounds}");
        let took = nothing_but(&server, 0, 0, what);
        let attack = flood(&server);
        server.terminate();
        let exit = server.exit();
        println!(
            "{what}: {rounds} rounds, forgotten after {took:?}, exit after {:?}",
            exit.after
        );
        assert!(
            matches!(exit.status.code(), Some(0 | 1)),
            "{what}: {exit:?}"
        );
        exit.assert_within(Duration::ZERO, IN_TIME);
        assert!(!exit.log.contains("panicked"), "{what}: {exit:?}");
        attack.call_off();
    }
}

/// Waits until this many connections and requests are left, without the connection that asks.
#[track_caller]
fn wait_for_counts(server: &Server, connections: usize, in_flight: usize, what: &str) -> Duration {
    wait_for(what, || {
        (server.connections() - 1, server.in_flight()) == (connections, in_flight)
    })
}

/// The same within [`SOON`]: the server may count disconnected clients for that long.
#[track_caller]
fn nothing_but(server: &Server, connections: usize, in_flight: usize, what: &str) -> Duration {
    let took = wait_for_counts(server, connections, in_flight, what);
    assert!(took < soon(SOON), "{what}: {took:?}");
    took
}

/// The state in which a client disconnects, and whether a request is in flight in this state.
struct State {
    what: &'static str,
    sends: fn() -> Vec<u8>,
    in_flight: bool,
}

const STATES: &[State] = &[
    State {
        what: "nothing sent",
        sends: Vec::new,
        in_flight: false,
    },
    State {
        what: "half a head",
        sends: || b"GET / HTTP/1.1\r\nhost: ".to_vec(),
        in_flight: false,
    },
    State {
        what: "half an upload",
        sends: || [post("/upload", "content-length: 8"), b"half".to_vec()].concat(),
        in_flight: true,
    },
    State {
        what: "half a chunk",
        sends: || {
            [
                post("/upload", "transfer-encoding: chunked"),
                b"8\r\nhalf".to_vec(),
            ]
            .concat()
        },
        in_flight: true,
    },
    State {
        what: "no answer yet",
        sends: || b"GET /never HTTP/1.1\r\nhost: test\r\n\r\n".to_vec(),
        in_flight: true,
    },
    State {
        what: "in a stream",
        sends: || b"GET /stream/1000000/1 HTTP/1.1\r\nhost: test\r\n\r\n".to_vec(),
        in_flight: true,
    },
    State {
        what: "in a silent stream",
        sends: || b"GET /silent HTTP/1.1\r\nhost: test\r\n\r\n".to_vec(),
        in_flight: true,
    },
    State {
        what: "a large body unread",
        sends: || b"GET /large HTTP/1.1\r\nhost: test\r\n\r\n".to_vec(),
        // The handler has passed the whole body to hyper, which still holds most of it.
        in_flight: true,
    },
    State {
        what: "upgraded",
        sends: || {
            let head = "connection: upgrade\r\nupgrade: echo\r\ncontent-length: 0";
            post("/upgrade", head)
        },
        in_flight: false,
    },
    State {
        what: "half the preface",
        sends: || PREFACE[..12].to_vec(),
        in_flight: false,
    },
    State {
        what: "the preface",
        sends: || PREFACE.to_vec(),
        in_flight: false,
    },
    State {
        what: "idle over HTTP/2",
        sends: || http2(None),
        in_flight: false,
    },
    State {
        what: "half a frame",
        sends: || [http2(None), vec![0, 0x40, 0, HEADERS]].concat(),
        in_flight: false,
    },
    State {
        what: "no answer yet over HTTP/2",
        sends: || http2(Some((Method::Get, "/never"))),
        in_flight: true,
    },
    State {
        what: "in a stream over HTTP/2",
        sends: || http2(Some((Method::Get, "/stream/1000000/1"))),
        in_flight: true,
    },
    State {
        what: "a large body unread over HTTP/2",
        sends: || http2(Some((Method::Get, "/large"))),
        // h2 holds most of the body, and polls the body again as soon as it has sent the first part.
        in_flight: false,
    },
    State {
        what: "half an upload over HTTP/2",
        sends: || {
            [
                http2(Some((Method::Post, "/upload"))),
                frame(DATA, 0, 1, b"half"),
            ]
            .concat()
        },
        in_flight: true,
    },
];

const COPIES: usize = 3;

impl State {
    fn enter(&self, server: &Server) -> Vec<Connection> {
        let connections = (0..COPIES).map(|_| {
            let mut connection = server.connect();
            connection.try_send(&(self.sends)()).unwrap();
            if self.what == "upgraded" {
                assert_eq!(connection.head().status, 101);
            }
            connection
        });
        connections.collect()
    }

    fn requests(&self) -> usize {
        if self.in_flight { COPIES } else { 0 }
    }
}

fn reset(connections: Vec<Connection>) {
    for connection in connections {
        let socket = socket2::SockRef::from(connection.stream());
        socket.set_linger(Some(Duration::ZERO)).unwrap();
    }
}

fn resets(form: Form) {
    let mut server = Server::start(form, KNOBS);
    for state in STATES {
        let connections = state.enter(&server);
        wait_for_counts(&server, COPIES, state.requests(), state.what);
        reset(connections);
        nothing_but(&server, 0, 0, state.what);
    }
    server.get("/").assert_ok();
    server.terminate();
    server.exit().assert_clean();
}

fn resets_during_the_drain(form: Form) {
    let mut server = Server::start(form, &["delay=0", "drain=10000"]);
    let mut holds = server.connect();
    holds.send("GET /never HTTP/1.1\r\nhost: test\r\n\r\n");
    let mut entered: Vec<_> = STATES
        .iter()
        .map(|state| (state, state.enter(&server)))
        .collect();
    let requests: usize = STATES.iter().map(State::requests).sum();
    wait_for_counts(&server, entered.len() * COPIES + 1, requests + 1, "before");
    server.terminate();
    server.wait_for_draining();
    let mut requests = requests;
    while let Some((state, connections)) = entered.pop() {
        reset(connections);
        requests -= state.requests();
        nothing_but(
            &server,
            entered.len() * COPIES + 1,
            requests + 1,
            state.what,
        );
    }
    reset(vec![holds]);
    server.exit().assert_clean();
}

/// hyper does not read the socket while a handler leaves an upload unread, or while a pipelined request
/// waits for the current response. So hyper does not notice a reset.
fn unseen(form: Form) {
    let upload = b"POST /never HTTP/1.1\r\nhost: test\r\ncontent-length: 8\r\n\r\nhalf";
    let pipelined = [NEVER, GET].concat();
    for sends in [&upload[..], pipelined.as_bytes()] {
        let mut server = Server::start(form, KNOBS);
        let mut connection = server.connect();
        connection.try_send(sends).unwrap();
        server.wait_for_in_flight(1);
        reset(vec![connection]);
        server.terminate();
        let exit = server.exit();
        assert!(matches!(exit.status.code(), Some(0 | 1)), "{exit:?}");
        exit.assert_within(MS(200), IN_TIME);
    }
}

/// Half of the clients send a request and wait for the response. The others never complete their heads.
fn repeated_connects(form: Form) {
    for keep in ["keep_listening=true", "keep_listening=false"] {
        let mut server = Server::start(form, &["delay=200", "drain=800", keep]);
        let address = server.address;
        let clients: Vec<_> = (0..6)
            .map(|i| {
                thread::spawn(move || {
                    let mut held = Vec::new();
                    let mut connected = 0;
                    while let Ok(mut connection) = Connection::try_open(address) {
                        connected += 1;
                        if i % 2 == 0 {
                            let _ = connection.try_request("GET", "/");
                        } else {
                            let _ = connection.try_send(b"GET / HTTP/1.1\r\nx-half: ");
                            held.push(connection);
                            if held.len() > 100 {
                                held.remove(0);
                            }
                        }
                    }
                    (connected, held)
                })
            })
            .collect();
        thread::sleep(MS(100));
        server.terminate();
        let exit = server.exit();
        let clients: Vec<(u32, Vec<Connection>)> = clients
            .into_iter()
            .map(|client| client.join().unwrap())
            .collect();
        let connected: u32 = clients.iter().map(|(connected, _)| connected).sum();
        println!(
            "{keep}: {connected} connections, exit after {:?}",
            exit.after
        );
        assert!(matches!(exit.status.code(), Some(0 | 1)), "{exit:?}");
        exit.assert_within(Duration::ZERO, IN_TIME);
        assert!(connected > 100, "{connected}");
    }
}

/// Connects more clients than the server may have files open. Each sends `request`.
fn starve(server: &Server, observer: &mut Connection, request: &str) -> Vec<Connection> {
    let connect = |_| {
        let mut connection = server.connect();
        connection.send(request);
        connection
    };
    let clients = (0..150).map(connect).collect();
    wait_for("the descriptors to run out", || {
        let connections: usize = observer.get("/connections").text().parse().unwrap();
        connections > 40
    });
    let mut waiting = server.connect();
    waiting.stream().set_read_timeout(Some(MS(200))).unwrap();
    let answer = waiting.try_request("GET", "/");
    assert!(answer.is_err(), "{answer:?}");
    clients
}

const FEW_FILES: &str = "files=64";
const GET: &str = "GET / HTTP/1.1\r\nhost: test\r\n\r\n";
const NEVER: &str = "GET /never HTTP/1.1\r\nhost: test\r\n\r\n";

fn starved_to_the_end(form: Form) {
    for (request, code) in [(GET, 0), (NEVER, 1)] {
        let mut server = Server::start(form, &["delay=200", "drain=800", FEW_FILES]);
        let mut observer = server.connect();
        let clients = starve(&server, &mut observer, request);
        server.terminate();
        let exit = server.exit();
        assert_eq!(exit.status.code(), Some(code), "{exit:?}");
        exit.assert_within(MS(200), IN_TIME);
        drop(clients);
    }
}

fn starved_for_a_while(form: Form) {
    let mut server = Server::start(form, &["delay=200", "drain=800", FEW_FILES]);
    let mut observer = server.connect();
    for request in [GET, NEVER] {
        drop(starve(&server, &mut observer, request));
        let begun = Instant::now();
        server.get("/").assert_ok();
        // axum pauses for one second if there is no descriptor. It pauses once more if accepting the
        // disconnected clients in the queue uses up all descriptors again.
        let took = begun.elapsed();
        println!("served again after {took:?}");
        assert!(took < MS(3000), "{took:?}");
        nothing_but(&server, 1, 0, "the clients are gone");
    }
    server.terminate();
    server.exit().assert_clean();
}
