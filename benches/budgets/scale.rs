//! One stop with up to 18,000 idle connections, and with 1,000 busy ones beside them.
//!
//! The server is a child process, because a process has about 20,000 file descriptors. The peer is plain axum
//! with the same routes.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    runtime::{self, Runtime},
    task::JoinSet,
    time,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    child::{Form, Server, allow_files},
    figures::Figures,
    rows::{Budget, Rows},
    scale_server,
    tls::{self, Identity},
};

const IDLE: [usize; 3] = [1_000, 5_000, 18_000];
const BUSY: usize = 1_000;
/// Files that are open besides the connections.
const OTHER_FILES: usize = 200;
/// The stops of each server, and of each with mixed connections, which take longer to open.
const ROUNDS: [usize; 2] = [5, 3];
const FORMS: [Form; 3] = [Form::Plain, Form::Listener, Form::Serve];
/// A client that has to wait longer has lost its request.
const PATIENCE: Duration = Duration::from_secs(30);
/// How much longer than with plain axum a stop with 18,000 idle connections may take. Plain axum closes a
/// connection without a look at what it loses. This crate waits until nothing has come for 25 ms, reads once
/// more, and asks the kernel whether the last response was delivered. A server other than `serve` has to be
/// woken for that read, and once more to close.
const SERVE: f64 = 1.4;
const LISTENER: f64 = 1.7;
/// The pause of a busy client between two requests.
const PAUSE: Duration = Duration::from_millis(500);

/// The connections of a measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mix {
    /// HTTP/1, and nothing else.
    Http1,
    /// Of ten idle connections four are HTTP/1, two HTTP/2, two HTTP/1 over TLS, and two WebSockets. A
    /// quarter of the busy clients uses HTTP/2, a quarter TLS.
    Mixed,
}

/// What one stop took.
struct Stop {
    /// From the trigger until the process has ended.
    seconds: f64,
    /// CPU time of the server from the trigger until nothing is open any more.
    cpu: f64,
    /// Resident memory before the stop and at its peak, in MiB.
    memory: [f64; 2],
    /// The longest time from a request to its whole response, from shortly before the stop to its end.
    slowest: Duration,
    answered: usize,
    /// Requests that were sent and got no response.
    lost: usize,
}

/// What the busy clients share.
#[derive(Default)]
struct Load {
    over: AtomicBool,
    answered: AtomicUsize,
    lost: AtomicUsize,
    slowest_micros: AtomicUsize,
}

impl Load {
    fn answered(&self, sent: Instant) {
        let micros = usize::try_from(sent.elapsed().as_micros()).expect("less than an hour");
        self.slowest_micros.fetch_max(micros, Ordering::Relaxed);
        self.answered.fetch_add(1, Ordering::Relaxed);
    }
}

trait Io: AsyncRead + AsyncWrite + Unpin + Send + 'static {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send + 'static> Io for T {}

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n";
const UPGRADE: &[u8] =
    b"GET /ws HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
    sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";

/// Sends a request, and reads the response: its head, and as much as its `content-length` says.
async fn exchange(io: &mut impl Io, request: &[u8]) -> std::io::Result<String> {
    io.write_all(request).await?;
    let mut response = Vec::new();
    loop {
        if io.read_buf(&mut response).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let text = String::from_utf8_lossy(&response);
        let Some((head, body)) = text.split_once("\r\n\r\n") else {
            continue;
        };
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "));
        let length = length.map_or(0, |length| length.parse().expect("a length"));
        if body.len() >= length {
            return Ok(head.to_owned());
        }
    }
}

async fn connect_tls(
    connector: &TlsConnector,
    address: SocketAddr,
) -> std::io::Result<TlsStream<TcpStream>> {
    tls::connect(connector, TcpStream::connect(address).await?).await
}

/// Waits until the server closes, and closes then.
async fn until_closed(mut io: impl Io) {
    let mut piece = [0; 1024];
    while matches!(io.read(&mut piece).await, Ok(length) if length > 0) {}
    let _ = io.shutdown().await;
}

/// Waits for the close frame, answers it, and waits until the server closes.
async fn until_close_frame(mut io: impl Io) {
    const CLOSE: [u8; 8] = [0x88, 0x82, 0, 0, 0, 0, 0x03, 0xe9];

    let mut frame = [0; 64];
    if matches!(io.read(&mut frame).await, Ok(length) if length > 0) {
        let _ = io.write_all(&CLOSE).await;
        until_closed(io).await;
    }
}

/// The addresses of a server: without and with TLS.
#[derive(Clone)]
struct Target {
    plain: SocketAddr,
    tls: SocketAddr,
    connector: TlsConnector,
}

impl Target {
    /// Opens the idle connection with this number. It has made one request.
    async fn idle(&self, number: usize, mix: Mix, closed: &mut JoinSet<()>) -> std::io::Result<()> {
        match number % 10 {
            _ if mix == Mix::Http1 => {
                let mut io = TcpStream::connect(self.plain).await?;
                exchange(&mut io, REQUEST).await?;
                closed.spawn(until_closed(io));
            }
            0..4 => {
                let mut io = TcpStream::connect(self.plain).await?;
                exchange(&mut io, REQUEST).await?;
                closed.spawn(until_closed(io));
            }
            4 | 5 => {
                let io = TokioIo::new(TcpStream::connect(self.plain).await?);
                let handshake = http2::handshake(TokioExecutor::new(), io).await;
                let (mut peer, connection) = handshake.map_err(std::io::Error::other)?;
                let driver = tokio::spawn(connection);
                http2_request(&mut peer)
                    .await
                    .map_err(std::io::Error::other)?;
                closed.spawn(async move {
                    let _ = driver.await;
                    drop(peer);
                });
            }
            6 | 7 => {
                let mut io = connect_tls(&self.connector, self.tls).await?;
                exchange(&mut io, REQUEST).await?;
                closed.spawn(until_closed(io));
            }
            _ => {
                let mut io = TcpStream::connect(self.plain).await?;
                let head = exchange(&mut io, UPGRADE).await?;
                assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
                closed.spawn(until_close_frame(io));
            }
        }
        Ok(())
    }

    /// A busy client: it reconnects when the server asks it to, and ends when the server is gone.
    async fn busy(self, number: usize, mix: Mix, load: Arc<Load>) {
        let number_of = |count: usize| f64::from(u32::try_from(count).expect("a thousand"));
        // One after another, so that they do not all send at once.
        let part = number_of(number) / number_of(BUSY);
        time::sleep(PAUSE.mul_f64(part)).await;
        while !load.over.load(Ordering::Relaxed) {
            let ended = match number % 4 {
                2 if mix == Mix::Mixed => self.busy_http2(&load).await,
                3 if mix == Mix::Mixed => match connect_tls(&self.connector, self.tls).await {
                    Ok(io) => busy_http1(io, &load).await,
                    Err(_) => return,
                },
                _ => match TcpStream::connect(self.plain).await {
                    Ok(io) => busy_http1(io, &load).await,
                    Err(_) => return,
                },
            };
            if ended.is_none() {
                return;
            }
        }
    }

    async fn busy_http2(&self, load: &Load) -> Option<()> {
        let io = TokioIo::new(TcpStream::connect(self.plain).await.ok()?);
        let (mut peer, connection) =
            http2::handshake::<_, _, Empty<Bytes>>(TokioExecutor::new(), io)
                .await
                .ok()?;
        tokio::spawn(connection);
        while !load.over.load(Ordering::Relaxed) {
            if peer.ready().await.is_err() {
                return Some(());
            }
            let sent = Instant::now();
            let request = Request::get("http://localhost/").body(Empty::new());
            let response = peer.try_send_request(request.expect("a request"));
            match time::timeout(PATIENCE, response).await {
                Ok(Ok(response)) => {
                    if response.into_body().collect().await.is_ok() {
                        load.answered(sent);
                    } else {
                        load.lost.fetch_add(1, Ordering::Relaxed);
                    }
                }
                Ok(Err(mut error)) => {
                    // The library returns a request that it has not sent.
                    if error.take_message().is_none() {
                        load.lost.fetch_add(1, Ordering::Relaxed);
                    }
                    return Some(());
                }
                Err(_) => {
                    load.lost.fetch_add(1, Ordering::Relaxed);
                    return Some(());
                }
            }
            time::sleep(PAUSE).await;
        }
        Some(())
    }
}

/// Requests on one connection, until the server asks the client to leave.
async fn busy_http1(mut io: impl Io, load: &Load) -> Option<()> {
    loop {
        let sent = Instant::now();
        let Ok(Ok(head)) = time::timeout(PATIENCE, exchange(&mut io, REQUEST)).await else {
            load.lost.fetch_add(1, Ordering::Relaxed);
            return Some(());
        };
        load.answered(sent);
        if head.contains("connection: close") {
            let _ = io.shutdown().await;
            return Some(());
        }
        // The server may close meanwhile.
        if time::timeout(PAUSE, io.read_u8()).await.is_ok() {
            return Some(());
        }
        if load.over.load(Ordering::Relaxed) {
            return None;
        }
    }
}

async fn http2_request(peer: &mut http2::SendRequest<Empty<Bytes>>) -> hyper::Result<Bytes> {
    peer.ready().await?;
    let request = Request::get("http://localhost/").body(Empty::new());
    let response = peer.send_request(request.expect("a request")).await?;
    Ok(response.into_body().collect().await?.to_bytes())
}

fn mib(kib: u32) -> f64 {
    f64::from(kib) / 1024.0
}

/// Opens the connections, stops the server, and waits for the end of its process.
fn stop(runtime: &Runtime, form: Form, mix: Mix, idle: usize, busy: usize) -> Stop {
    let identity = Identity::new();
    let mut server = Server::spawn(&[scale_server::ROLE, form.name(), &identity.to_text()]);
    let target = Target {
        plain: server.address,
        tls: server.line().parse().expect("its address with TLS"),
        connector: identity.connector(None),
    };
    let load = Arc::new(Load::default());
    let mut closed = JoinSet::new();
    let mut clients = JoinSet::new();
    runtime.block_on(async {
        for first in (0..idle).step_by(50) {
            // Fifty at once, so that the accept queue does not overflow.
            let mut opening = JoinSet::new();
            for number in first..idle.min(first + 50) {
                let target = target.clone();
                opening.spawn(async move {
                    let mut closed = JoinSet::new();
                    let opened = target.idle(number, mix, &mut closed).await;
                    opened.map(|()| closed)
                });
            }
            while let Some(opened) = opening.join_next().await {
                let mut opened = opened.expect("no panic").expect("a connection");
                closed.spawn(async move { while opened.join_next().await.is_some() {} });
            }
        }
        for number in 0..busy {
            clients.spawn(target.clone().busy(number, mix, Arc::clone(&load)));
        }
        // Until every busy client has sent requests.
        time::sleep(if busy > 0 { PAUSE * 3 } else { PAUSE / 5 }).await;
    });
    let before = server.ask("memory");
    load.slowest_micros.store(0, Ordering::Relaxed);
    let begun = Instant::now();
    let peak = server.ask("stop");
    let cpu: f64 = server.line().parse().expect("a time");
    let end = server.wait();
    let seconds = end.duration_since(begun).as_secs_f64();
    load.over.store(true, Ordering::Relaxed);
    runtime.block_on(async {
        while clients.join_next().await.is_some() {}
        while closed.join_next().await.is_some() {}
    });
    let slowest = load.slowest_micros.load(Ordering::Relaxed);
    Stop {
        seconds,
        cpu: cpu / 1e6,
        memory: [mib(before), mib(peak)],
        slowest: Duration::from_micros(slowest as u64),
        answered: load.answered.load(Ordering::Relaxed),
        lost: load.lost.load(Ordering::Relaxed),
    }
}

/// The median of what `of` takes from each stop.
fn median(stops: &[Stop], of: impl Fn(&Stop) -> f64) -> f64 {
    Figures::new(stops.iter().map(of).collect()).median()
}

pub(crate) fn measure(rows: &mut Rows) {
    let files = usize::try_from(allow_files()).expect("a number of files");
    let runtime = runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let mut table = String::from(
        "| connections | server | seconds to the end of the process | CPU seconds of the server | MiB before, at the peak | slowest request | answered | lost |\n\
         |---|---|---|---|---|---|---|---|\n",
    );
    for (mix, busy, all_idle) in [
        (Mix::Http1, 0, &IDLE[..]),
        (Mix::Mixed, 0, &IDLE[2..]),
        (Mix::Mixed, BUSY, &IDLE[..]),
    ] {
        for &idle in all_idle {
            let idle = idle.min(files.saturating_sub(OTHER_FILES + busy));
            let mut all = FORMS.map(|_| Vec::new());
            for _ in 0..ROUNDS[usize::from(mix == Mix::Mixed)] {
                for (stops, form) in all.iter_mut().zip(FORMS) {
                    stops.push(stop(&runtime, form, mix, idle, busy));
                }
            }
            let plain = median(&all[0], |stop| stop.seconds);
            let what = match (mix, busy) {
                (Mix::Http1, _) => format!("{idle} idle, HTTP/1"),
                (Mix::Mixed, 0) => format!("{idle} idle, mixed"),
                (Mix::Mixed, _) => format!("{idle} idle and {busy} busy, mixed"),
            };
            for (stops, form) in all.iter().zip(FORMS) {
                let seconds = Figures::new(stops.iter().map(|stop| stop.seconds).collect());
                let cpu = median(stops, |stop| stop.cpu);
                let [before, peak] = [0, 1].map(|which| median(stops, |stop| stop.memory[which]));
                let [answered, lost] = [
                    stops.iter().map(|stop| stop.answered).sum::<usize>(),
                    stops.iter().map(|stop| stop.lost).sum::<usize>(),
                ];
                let slowest = stops
                    .iter()
                    .map(|stop| stop.slowest)
                    .max()
                    .unwrap_or_default();
                let slowest = if busy > 0 {
                    format!("{:.0} ms", slowest.as_secs_f64() * 1e3)
                } else {
                    "–".to_owned()
                };
                let [low, middle, high] = [0, 50, 100].map(|percent| seconds.percentile(percent));
                let line = format!(
                    "| {what} | {} | {middle:.3} ({low:.3}–{high:.3}) | {cpu:.3} | {before:.0}, {peak:.0} | {slowest} | {answered} | {lost} |\n",
                    form.name()
                );
                print!("{line}");
                table.push_str(&line);
                // Plain axum does not wait for WebSockets and loses requests, so only the rows with nothing but
                // idle HTTP/1 connections are comparable.
                if mix == Mix::Http1 && form != Form::Plain {
                    rows.add(
                        &format!("scale, {what}, {}", form.name()),
                        &format!("{middle:.3} s"),
                        &format!("{plain:.3} s"),
                        middle / plain,
                        match form {
                            Form::Serve if idle == IDLE[2] => Budget::AtMost(SERVE),
                            _ if idle == IDLE[2] => Budget::AtMost(LISTENER),
                            _ => Budget::None,
                        },
                    );
                }
            }
        }
    }
    rows.table("One stop with many connections", table);
}
