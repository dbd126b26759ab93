//! A shared listening socket with clients and listeners of other kinds: HTTP/2 clients, a TLS listener, and a
//! Unix socket. The processes on it replace each other.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener},
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use http_body_util::{BodyExt, Empty};
use hyper::{Request, body::Bytes, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{net::TcpStream, time};
use tokio_rustls::rustls::ClientConfig;

use crate::{
    Test,
    process::{BOUND, Server},
    restarts::RETRIED,
    server::Form,
    tls,
};

pub(crate) const TESTS: &[Test] = &[
    (
        "shared::http2_clients_move_by_goaway_through_ten_restarts",
        &[Form::Serve],
        http2_moves,
    ),
    (
        "shared::http2_clients_of_axums_server_move_through_ten_restarts",
        &[Form::Run],
        http2_refused,
    ),
    (
        "shared::tls_clients_lose_no_request_through_ten_restarts",
        Form::CUTTING,
        tls_restarts,
    ),
    (
        "shared::clients_of_a_unix_socket_lose_no_request_through_ten_restarts",
        Form::CUTTING,
        unix_restarts,
    ),
];

/// The results of all clients.
#[derive(Debug, Default)]
struct Seen {
    requests: usize,
    /// Connections that were left because the server asked for it.
    moved: usize,
    failed: Vec<String>,
    /// Responses with the status 503.
    refused: usize,
    slowest_connect: Duration,
}

fn connected(seen: &Mutex<Seen>, begun: Instant) {
    let mut seen = seen.lock().unwrap();
    seen.slowest_connect = seen.slowest_connect.max(begun.elapsed());
}

/// Restarts the process ten times, alternately with the next process beside the old one and after it, while
/// `client` runs on some threads. A client returns when the flag is set.
fn restart(
    start: &dyn Fn() -> Server,
    clients: usize,
    client: impl Fn(&AtomicBool, &Mutex<Seen>) + Send + Sync + 'static,
) -> Seen {
    let seen = Arc::new(Mutex::new(Seen::default()));
    let over = Arc::new(AtomicBool::new(false));
    let client = Arc::new(client);
    let mut server = start();
    let clients: Vec<_> = (0..clients)
        .map(|_| {
            let (client, over, seen) = (Arc::clone(&client), Arc::clone(&over), Arc::clone(&seen));
            thread::spawn(move || client(&over, &seen))
        })
        .collect();
    for round in 0..10 {
        thread::sleep(Duration::from_millis(200));
        let next = (round % 2 == 0).then(start);
        server.terminate();
        server.exit().assert_clean();
        server = next.unwrap_or_else(start);
    }
    // The kernel repeats a dropped handshake within this time.
    thread::sleep(Duration::from_millis(1100));
    over.store(true, Ordering::Relaxed);
    for client in clients {
        client.join().unwrap();
    }
    server.terminate();
    server.exit().assert_clean();
    let seen = std::mem::take(&mut *seen.lock().unwrap());
    println!("{seen:?}");
    seen
}

fn assert_unnoticed(seen: &Seen) {
    assert_eq!(seen.failed, [""; 0], "{seen:?}");
    assert_eq!(seen.refused, 0, "{seen:?}");
    assert!(seen.slowest_connect < RETRIED, "{seen:?}");
    assert!(seen.requests > 300, "{seen:?}");
    assert!(seen.moved >= 30, "{seen:?}");
}

fn shared_tcp() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Longer than the default, because a busy machine may not schedule a client for half a second. The phase
/// ends as soon as every connection has closed, so a restart takes as long as the clients need to move.
const DELAY: &str = "delay=3000";

fn http2_restarts(form: Form, delay: &'static str) -> Seen {
    let (shared, address) = shared_tcp();
    let start = move || Server::start_on(&shared, form, &[delay]);
    let is_first = AtomicBool::new(true);
    restart(&start, 9, move |over, seen| {
        // One client keeps a slow request in flight, so that every drain lasts.
        let is_first = is_first.fetch_and(false, Ordering::Relaxed);
        let path = if is_first { "/sleep/800" } else { "/" };
        let runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = { runtime }.enable_all().build().unwrap();
        runtime.block_on(async {
            while !over.load(Ordering::Relaxed) {
                if let Err(error) = http2_client(address, path, over, seen).await {
                    seen.lock().unwrap().failed.push(error);
                }
            }
        });
    })
}

/// Sends requests on one connection, two at a time, until the server asks to leave it. A request that hyper
/// has not sent for this reason belongs on the next connection, as in a connection pool.
async fn http2_client(
    address: SocketAddr,
    path: &str,
    over: &AtomicBool,
    seen: &Mutex<Seen>,
) -> Result<(), String> {
    let begun = Instant::now();
    let tcp = time::timeout(BOUND, TcpStream::connect(address)).await;
    let tcp = tcp.map_err(|_| "connect: timeout")?;
    let tcp = tcp.map_err(|error| format!("connect: {error}"))?;
    connected(seen, begun);
    tcp.set_nodelay(true).unwrap();
    let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(tcp)).await;
    let (sender, connection) = handshake.map_err(|error| format!("handshake: {error}"))?;
    let connection = tokio::spawn(connection);
    while !over.load(Ordering::Relaxed) {
        let one = || async {
            let mut sender = sender.clone();
            // The connection has ended: nothing was sent.
            let Ok(()) = sender.ready().await else {
                return Ok(None);
            };
            let request = Request::get(format!("http://{address}{path}"));
            let request = request.body(Empty::<Bytes>::new()).unwrap();
            match sender.send_request(request).await {
                Ok(response) => {
                    let (head, body) = response.into_parts();
                    let body = body.collect().await;
                    body.map_err(|error| format!("body: {error:?}"))?;
                    Ok(Some(head.status.as_u16()))
                }
                Err(error) if error.is_canceled() => Ok(None),
                Err(error) => Err(format!("request: {error:?}")),
            }
        };
        let answers = async { tokio::join!(one(), one()) };
        let answers = time::timeout(BOUND, answers).await;
        let (first, second) = answers.map_err(|_| "request: timeout")?;
        let mut leaves = false;
        for answer in [first?, second?] {
            let mut seen = seen.lock().unwrap();
            match answer {
                Some(200) => seen.requests += 1,
                Some(503) => seen.refused += 1,
                Some(status) => return Err(format!("status {status}")),
                None => leaves = true,
            }
        }
        if leaves {
            seen.lock().unwrap().moved += 1;
            // The connection ends without an error after a GOAWAY.
            let ended = time::timeout(BOUND, connection).await;
            let ended = ended.map_err(|_| "end: timeout")?.unwrap();
            return ended.map_err(|error| format!("end: {error:?}"));
        }
        time::sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}

fn http2_moves(form: Form) {
    let seen = http2_restarts(form, DELAY);
    assert_unnoticed(&seen);
}

/// axum's own server sends GOAWAY when the delay is over. A request that crosses it may be refused with 503,
/// because draining has begun. The delay is the default of a shared listener, because all of it passes.
fn http2_refused(form: Form) {
    let seen = http2_restarts(form, "delay=default");
    assert_eq!(seen.failed, [""; 0], "{seen:?}");
    assert!(
        seen.refused <= 9 * 10 * 2,
        "more than one round of each client: {seen:?}"
    );
    assert!(seen.slowest_connect < RETRIED, "{seen:?}");
    assert!(seen.requests > 300, "{seen:?}");
    assert!(seen.moved >= 30, "{seen:?}");
}

/// Half of the clients keep their connections, and half open a connection for each request.
fn tls_restarts(form: Form) {
    let (shared, address) = shared_tcp();
    let start = move || Server::start_on(&shared, form, &[DELAY, "tls=0"]);
    let keeps = AtomicBool::new(false);
    let config = tls::config();
    let seen = restart(&start, 8, move |over, seen| {
        let keeps = keeps.fetch_xor(true, Ordering::Relaxed);
        while !over.load(Ordering::Relaxed) {
            let result = tls_client(address, &config, keeps, over, seen);
            if let Err(error) = result {
                seen.lock().unwrap().failed.push(error);
            }
        }
    });
    assert_unnoticed(&seen);
}

fn tls_client(
    address: SocketAddr,
    config: &Arc<ClientConfig>,
    keeps: bool,
    over: &AtomicBool,
    seen: &Mutex<Seen>,
) -> Result<(), String> {
    let begun = Instant::now();
    let tcp = tls::connect(address).map_err(|error| format!("connect: {error}"))?;
    connected(seen, begun);
    let tls = tls::handshake(tcp, config).map_err(|error| format!("handshake: {error}"))?;
    exchange(tls, keeps, over, seen)
}

struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn unix_restarts(form: Form) {
    let name = format!("tower-graceful-shared-{}-{form:?}", std::process::id());
    let file = SocketFile(std::env::temp_dir().join(name));
    let shared = UnixListener::bind(&file.0).unwrap();
    let start = move || {
        let shared: OwnedFd = shared.try_clone().unwrap().into();
        Server::start_on_socket(shared, form, &[DELAY, "listener=unix"])
    };
    let path = file.0.clone();
    let keeps = AtomicBool::new(false);
    let seen = restart(&start, 8, move |over, seen| {
        let keeps = keeps.fetch_xor(true, Ordering::Relaxed);
        while !over.load(Ordering::Relaxed) {
            if let Err(error) = unix_client(&path, keeps, over, seen) {
                seen.lock().unwrap().failed.push(error);
            }
        }
    });
    assert_unnoticed(&seen);
}

fn unix_client(
    path: &Path,
    keeps: bool,
    over: &AtomicBool,
    seen: &Mutex<Seen>,
) -> Result<(), String> {
    let begun = Instant::now();
    let stream = UnixStream::connect(path).map_err(|error| format!("connect: {error}"))?;
    connected(seen, begun);
    stream.set_read_timeout(Some(BOUND)).unwrap();
    exchange(stream, keeps, over, seen)
}

/// Sends requests on one connection until a response asks to leave it.
fn exchange(
    mut stream: impl Read + Write,
    keeps: bool,
    over: &AtomicBool,
    seen: &Mutex<Seen>,
) -> Result<(), String> {
    while !over.load(Ordering::Relaxed) {
        let connection = if keeps { "keep-alive" } else { "close" };
        let request = format!("GET / HTTP/1.1\r\nhost: test\r\nconnection: {connection}\r\n\r\n");
        let sent = stream.write_all(request.as_bytes());
        sent.map_err(|error| format!("send: {error}"))?;
        let mut response = Vec::new();
        // The body of the route is "hello".
        while !response.ends_with(b"\r\n\r\nhello") {
            let mut piece = [0; 4096];
            let read = stream.read(&mut piece);
            let read = read.map_err(|error| format!("receive: {error}"))?;
            response.extend_from_slice(&piece[..read]);
            if read == 0 {
                let text = String::from_utf8_lossy(&response);
                return Err(format!("closed after {text:?}"));
            }
        }
        let response = String::from_utf8_lossy(&response).to_lowercase();
        if !response.starts_with("http/1.1 200") {
            return Err(format!("{response:?}"));
        }
        let closes = response.contains("connection: close");
        let mut seen = seen.lock().unwrap();
        seen.requests += 1;
        seen.moved += usize::from(closes && keeps);
        drop(seen);
        thread::sleep(Duration::from_millis(5));
        if closes {
            break;
        }
    }
    Ok(())
}
