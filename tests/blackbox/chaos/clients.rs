//! The clients. Each notes for each request with a number what it saw of the response.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    pin::pin,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, client::conn::http2, header::HeaderMap};
use hyper_util::rt::{TokioExecutor, TokioIo};
use socket2::{Domain, SockRef, Socket, Type};
use tokio::{net::TcpSocket, task::JoinSet, time::timeout};

use crate::{
    client::{Connection, vanish},
    long_lived::peer::{CLOSE, TEXT, close, handshake, masked},
    many::Chance,
    process::BOUND,
};

const MS: fn(u64) -> Duration = Duration::from_millis;

/// What a client saw of the response to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Sight {
    /// The client did not send the request, or knows that the server discards it: the server had said
    /// `Connection: close` before, or the client library returned it.
    Unsent,
    /// No byte of a response arrived.
    Nothing(String),
    /// A whole response with another status than 200.
    Refused(u16),
    /// A whole response.
    Whole,
    /// A part of a response.
    Truncated(String),
    /// A whole response, but not the right one.
    Wrong(String),
    /// The client left before the response was whole, or never meant to read it.
    Abandoned,
}

/// What a client says of one request.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) id: u64,
    pub(super) kind: &'static str,
    /// When the request was sent completely.
    pub(super) sent: Option<Instant>,
    pub(super) sight: Sight,
    /// The client's address, if it is connected to the server itself.
    pub(super) address: Option<SocketAddr>,
}

/// What the clients of one stop share.
pub(super) struct Shared {
    /// The process has ended.
    pub(super) over: AtomicBool,
    /// The stop was triggered.
    pub(super) stopping: AtomicBool,
    pub(super) seen: Mutex<Vec<Seen>>,
    /// Connections of peers that have vanished.
    vanished: Mutex<Vec<Connection>>,
}

impl Shared {
    pub(super) fn new() -> Self {
        Self {
            over: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            seen: Mutex::default(),
            vanished: Mutex::default(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// One connection for all its requests.
    KeepAlive,
    /// One connection for each request.
    Each,
    /// Several requests at once on one HTTP/1 connection.
    Pipelines,
    Uploads,
    /// Reads slowly, into a small buffer.
    Slow,
    /// Resets or closes in the middle of requests and responses.
    Leaves,
    /// Sends a part of a request head.
    HalfHead,
    /// Connects and sends nothing.
    Silent,
    /// Vanishes without a FIN on an idle connection.
    VanishesIdle,
    /// Vanishes without a FIN in the middle of a response.
    VanishesBusy,
    Events,
    Socket,
    Http2,
    /// HTTP/2 with small windows.
    Http2Slow,
    /// HTTP/2, and cancels some streams.
    Http2Cancels,
}

/// One client.
pub(super) struct Client<'a> {
    pub(super) role: Role,
    /// Of the server, or of a relay before it.
    pub(super) address: SocketAddr,
    pub(super) relayed: bool,
    /// Leaves by RST and not by FIN.
    pub(super) resets: bool,
    pub(super) next: u64,
    pub(super) chance: Chance,
    pub(super) shared: &'a Shared,
}

/// A request, and the body of its response.
struct Asked {
    kind: &'static str,
    path: String,
    body: usize,
    expected: Expected,
}

enum Expected {
    Text(String),
    Bytes(usize),
    Events,
    /// The response fails.
    Failure,
}

impl Expected {
    fn sight(&self, status: u16, number: Option<&str>, id: u64, body: &[u8]) -> Sight {
        if status != 200 {
            return Sight::Refused(status);
        }
        if number != Some(&*id.to_string()) {
            return Sight::Wrong(format!("the response of {number:?}"));
        }
        let right = match self {
            Self::Text(text) => body == text.as_bytes(),
            Self::Bytes(length) => body.len() == *length && body.iter().all(|byte| *byte == b'x'),
            Self::Events => {
                body.ends_with(b"data: deploy\nretry: 5000\n\n")
                    || body.ends_with(b"retry: 5000\n\n")
            }
            Self::Failure => false,
        };
        if right {
            Sight::Whole
        } else {
            Sight::Wrong(format!("{} bytes", body.len()))
        }
    }
}

impl Client<'_> {
    fn asks(&mut self) -> Asked {
        let chance = &mut self.chance;
        let text = |text: &str| Expected::Text(text.to_owned());
        let (kind, path, expected) = match chance.within(0..10) {
            0..4 => ("short", "/sleep/0".to_owned(), text("slept")),
            4..6 => {
                let ms = chance.within(5..250);
                ("sleep", format!("/sleep/{ms}"), text("slept"))
            }
            6..8 => {
                let (chunks, ms) = (chance.within(1..12), chance.within(1..25));
                let body: Vec<_> = (0..chunks).map(|n| format!("chunk {n}\n")).collect();
                (
                    "stream",
                    format!("/stream/{chunks}/{ms}"),
                    text(&body.concat()),
                )
            }
            8 => {
                let (ms, kib) = (chance.within(0..30), chance.within(1..400));
                let length = usize::try_from(kib * 1024).unwrap();
                (
                    "bytes",
                    format!("/bytes/{ms}/{kib}"),
                    Expected::Bytes(length),
                )
            }
            _ if chance.within(0..5) == 0 => ("fails", "/failing".to_owned(), Expected::Failure),
            _ => ("large", "/buffered".to_owned(), Expected::Bytes(150_000)),
        };
        Asked {
            kind,
            path,
            body: 0,
            expected,
        }
    }

    fn upload(&mut self) -> Asked {
        let body = usize::try_from(self.chance.within(1..300) * 1024).unwrap();
        if self.chance.within(0..4) == 0 {
            // Answered before the upload is read.
            let (ms, kib) = (self.chance.within(0..30), self.chance.within(1..100));
            let length = usize::try_from(kib * 1024).unwrap();
            return Asked {
                kind: "unread upload",
                path: format!("/bytes/{ms}/{kib}"),
                body,
                expected: Expected::Bytes(length),
            };
        }
        Asked {
            kind: "upload",
            path: "/upload".to_owned(),
            body,
            expected: Expected::Text(body.to_string()),
        }
    }

    fn id(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn over(&self) -> bool {
        self.shared.over.load(Ordering::Relaxed)
    }

    fn see(
        &self,
        (id, kind): (u64, &'static str),
        sent: Option<Instant>,
        address: Option<SocketAddr>,
        sight: Sight,
    ) {
        self.shared.seen.lock().unwrap().push(Seen {
            id,
            kind,
            sent,
            sight,
            address: address.filter(|_| !self.relayed),
        });
    }

    fn pause(&mut self) {
        thread::sleep(MS(self.chance.within(1..40)));
    }

    /// `None` when the client is to end: the listener is closed, or the process has ended.
    fn connect(&mut self) -> Option<Connection> {
        while !self.over() {
            let small = matches!(self.role, Role::Slow).then_some(4096);
            match connect(self.address, small).and_then(Connection::on) {
                Ok(connection) => return Some(connection),
                Err(_) if self.shared.stopping.load(Ordering::Relaxed) => thread::sleep(MS(20)),
                Err(_) => thread::sleep(MS(5)),
            }
        }
        None
    }

    pub(super) fn run(&mut self) {
        thread::sleep(MS(self.chance.within(0..30)));
        match self.role {
            Role::Http2 | Role::Http2Slow | Role::Http2Cancels => return self.http2(),
            _ => {}
        }
        while let Some(mut connection) = self.connect() {
            match self.role {
                Role::KeepAlive | Role::Slow => while self.one(&mut connection, Self::asks) {},
                Role::Each => drop(self.one(&mut connection, Self::asks)),
                Role::Uploads => while self.one(&mut connection, Self::upload) {},
                Role::Pipelines => while self.several(&mut connection) {},
                Role::Leaves => self.leaves(connection),
                Role::HalfHead => {
                    let head = [
                        &b"GET / HTT"[..],
                        b"GET /sleep/0 HTTP/1.1\r\nhost: te",
                        b"PRI * HTTP/2.0\r\n",
                    ];
                    let which = usize::try_from(self.chance.within(0..3)).unwrap();
                    drop(connection.try_send(head[which]));
                    self.wait_or_leave(connection);
                }
                Role::Silent => self.wait_or_leave(connection),
                Role::VanishesIdle | Role::VanishesBusy => {
                    self.vanishes(connection);
                    return;
                }
                Role::Events => drop(self.one(&mut connection, |_| Asked {
                    kind: "events",
                    path: "/sse/9".to_owned(),
                    body: 0,
                    expected: Expected::Events,
                })),
                Role::Socket => self.socket(&mut connection),
                Role::Http2 | Role::Http2Slow | Role::Http2Cancels => unreachable!("it returned"),
            }
            if self.shared.stopping.load(Ordering::Relaxed) {
                thread::sleep(MS(5));
            }
        }
    }

    /// Waits until the server closes, or closes after a while.
    fn wait_or_leave(&mut self, mut connection: Connection) {
        let until = Instant::now() + MS(self.chance.within(50..3000));
        while Instant::now() < until && !self.over() && !connection.has_ended() {
            thread::sleep(MS(5));
        }
        if self.resets {
            reset(&mut connection);
        }
    }

    /// One request and its response. Whether the connection can be used again.
    fn one(&mut self, connection: &mut Connection, ask: fn(&mut Self) -> Asked) -> bool {
        if self.over() || connection.has_ended() {
            return false;
        }
        let asked = ask(self);
        let id = self.id();
        let address = connection.stream().local_addr().ok();
        let sent = self.send(connection, id, &asked);
        let at = sent.is_ok().then(Instant::now);
        let (sight, again) = self.read(connection, id, &asked);
        let sight = match (sight, sent) {
            // The server may have closed the idle connection before the request was written.
            (Sight::Nothing(_), Err(_)) => Sight::Unsent,
            (sight, _) => sight,
        };
        self.see((id, asked.kind), at, address, sight);
        self.pause();
        again && at.is_some()
    }

    fn send(&mut self, connection: &mut Connection, id: u64, asked: &Asked) -> io::Result<()> {
        let Asked { path, body, .. } = asked;
        let method = if *body > 0 { "POST" } else { "GET" };
        let head = format!(
            "{method} {path}?id={id} HTTP/1.1\r\nhost: test\r\ncontent-length: {body}\r\n\r\n"
        );
        // A part of the heads arrives in two pieces.
        let (first, second) = head.split_at(if self.chance.within(0..8) == 0 { 20 } else { 0 });
        if !first.is_empty() {
            connection.try_send(first.as_bytes())?;
            thread::sleep(MS(self.chance.within(0..10)));
        }
        connection.try_send(second.as_bytes())?;
        let mut left = *body;
        let paced = self.chance.within(0..2) == 0;
        while left > 0 {
            let piece = left.min(16 * 1024);
            connection.try_send(&vec![b'u'; piece])?;
            left -= piece;
            if paced {
                thread::sleep(MS(self.chance.within(0..8)));
            }
        }
        Ok(())
    }

    /// Reads a response. Also returns whether the connection can be used again.
    fn read(&mut self, connection: &mut Connection, id: u64, asked: &Asked) -> (Sight, bool) {
        let fails = matches!(asked.expected, Expected::Failure);
        match connection.has_more() {
            Ok(true) => {}
            // The response may fail before its head is written.
            _ if fails => return (Sight::Abandoned, false),
            Ok(false) => return (Sight::Nothing("the server closed".to_owned()), false),
            Err(error) => return (Sight::Nothing(error.to_string()), false),
        }
        let pace = matches!(self.role, Role::Slow).then(|| MS(self.chance.within(0..12)));
        let mut read = 0;
        let response = connection.try_head().and_then(|mut head| {
            let slow = |connection: &mut Connection, mut length: usize, read: &mut usize| {
                let mut body = Vec::new();
                while length > 0 {
                    let piece = length.min(if pace.is_some() { 8 * 1024 } else { length });
                    body.extend(connection.exactly(piece)?);
                    *read += piece;
                    length -= piece;
                    thread::sleep(pace.unwrap_or_default());
                }
                Ok::<_, io::Error>(body)
            };
            let length = head.header("content-length").map(str::parse);
            head.body = match length {
                Some(length) => slow(connection, length.map_err(io::Error::other)?, &mut read)?,
                None => connection.chunks()?,
            };
            Ok(head)
        });
        match response {
            Ok(response) => {
                let number = response.header("x-id");
                let sight = asked
                    .expected
                    .sight(response.status, number, id, &response.body);
                (sight, !response.says_close())
            }
            Err(_) if fails => (Sight::Abandoned, false),
            Err(error) => {
                let sight = Sight::Truncated(format!("{error}, {read} bytes of the body"));
                (sight, false)
            }
        }
    }

    /// Several requests in one write. Responses come in the same order.
    fn several(&mut self, connection: &mut Connection) -> bool {
        if self.over() || connection.has_ended() {
            return false;
        }
        let all: Vec<_> = (0..self.chance.within(2..6))
            .map(|_| (self.id(), self.asks()))
            .collect();
        let heads: Vec<_> = all
            .iter()
            .map(|(id, asked)| format!("GET {}?id={id} HTTP/1.1\r\nhost: test\r\n\r\n", asked.path))
            .collect();
        let address = connection.stream().local_addr().ok();
        let sent = connection.try_send(heads.concat().as_bytes());
        let at = sent.is_ok().then(Instant::now);
        let mut open = true;
        let mut failed = None;
        for (id, asked) in &all {
            let sight = if open {
                let (sight, again) = self.read(connection, *id, asked);
                open = again;
                if !again && !matches!(sight, Sight::Whole | Sight::Refused(_) | Sight::Abandoned) {
                    failed = Some("the connection failed before".to_owned());
                }
                match sight {
                    Sight::Nothing(_) if sent.is_err() => Sight::Unsent,
                    sight => sight,
                }
            } else {
                // After `Connection: close` the server discards what follows.
                match &failed {
                    Some(why) if sent.is_ok() => Sight::Nothing(why.clone()),
                    _ => Sight::Unsent,
                }
            };
            self.see((*id, asked.kind), at, address, sight);
        }
        self.pause();
        open && sent.is_ok()
    }

    /// Leaves in the middle of a request or of a response.
    fn leaves(&mut self, mut connection: Connection) {
        let uploads = self.chance.within(0..3) == 0;
        let mut asked = if uploads { self.upload() } else { self.asks() };
        let id = self.id();
        let address = connection.stream().local_addr().ok();
        if self.chance.within(0..4) == 0 {
            // Announces more than it sends.
            asked.body += 1;
        }
        let sent = self.send(&mut connection, id, &asked);
        thread::sleep(MS(self.chance.within(0..60)));
        if self.chance.within(0..2) == 0 {
            let stream = connection.stream();
            let _ = stream.set_read_timeout(Some(MS(1)));
            let _ = connection.exactly(1000);
        }
        if self.resets {
            reset(&mut connection);
        }
        drop(connection);
        self.see(
            (id, "leaves"),
            sent.is_ok().then(Instant::now),
            address,
            Sight::Abandoned,
        );
        self.pause();
    }

    /// From now on, the kernel discards every packet for this client, and nothing more is sent.
    fn vanishes(&mut self, mut connection: Connection) {
        for _ in 0..self.chance.within(1..8) {
            if !self.one(&mut connection, Self::asks) {
                return;
            }
        }
        if self.role == Role::VanishesBusy {
            let asked = self.asks();
            let id = self.id();
            let address = connection.stream().local_addr().ok();
            let sent = self.send(&mut connection, id, &asked);
            self.see(
                (id, "vanishes"),
                sent.is_ok().then(Instant::now),
                address,
                Sight::Abandoned,
            );
            thread::sleep(MS(self.chance.within(0..20)));
        }
        vanish(connection.stream());
        self.shared.vanished.lock().unwrap().push(connection);
    }

    /// A WebSocket: sends messages until the server sends a close frame, and answers that.
    fn socket(&mut self, connection: &mut Connection) {
        let id = self.id();
        let address = connection.stream().local_addr().ok();
        let request = handshake(&format!("/ws?id={id}"));
        let sent = connection.try_send(request.as_bytes());
        let at = sent.is_ok().then(Instant::now);
        let sight = match (connection.has_more(), sent) {
            (Ok(true), _) => self.echoes(connection),
            (_, Err(_)) => Sight::Unsent,
            (more, _) => Sight::Nothing(format!("{more:?}")),
        };
        self.see((id, "websocket"), at, address, sight);
        self.pause();
    }

    fn echoes(&mut self, connection: &mut Connection) -> Sight {
        let head = match connection.try_head() {
            Ok(head) => head,
            Err(error) => return Sight::Truncated(error.to_string()),
        };
        if head.status != 101 {
            let length = head.header("content-length").and_then(|it| it.parse().ok());
            return match connection.exactly(length.unwrap_or(0)) {
                Ok(_) => Sight::Refused(head.status),
                Err(error) => Sight::Truncated(error.to_string()),
            };
        }
        let mut echoed = 0_usize;
        loop {
            let text = format!("message {echoed}");
            // The server may have closed its side.
            let sent = connection.try_send(&masked(TEXT, text.as_bytes()));
            let frame = connection.exactly(2).and_then(|head| {
                let payload = connection.exactly((head[1] & 0x7f).into())?;
                Ok((head[0] & 0x0f, payload))
            });
            match frame {
                Ok((TEXT, payload)) if payload == text.as_bytes() => echoed += 1,
                Ok((CLOSE, _)) => {
                    let _ = connection.try_send(&masked(CLOSE, &close(1001, "")));
                    // The server closes.
                    let _ = connection.has_more();
                    return Sight::Whole;
                }
                Ok(other) => return Sight::Wrong(format!("{other:?} for {text}")),
                Err(error) => {
                    return Sight::Truncated(format!("{error}, {echoed} echoes, {sent:?}"));
                }
            }
            thread::sleep(MS(self.chance.within(0..20)));
        }
    }

    fn http2(&mut self) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        while !self.over() {
            if runtime.block_on(self.http2_connection()).is_err() {
                thread::sleep(MS(10));
            }
        }
        runtime.shutdown_background();
    }

    async fn http2_connection(&mut self) -> Result<(), Box<dyn std::error::Error>> {
        let slow = self.role == Role::Http2Slow;
        let socket = TcpSocket::new_v4()?;
        if slow {
            socket.set_recv_buffer_size(4096)?;
        }
        let stream = timeout(BOUND, socket.connect(self.address)).await??;
        stream.set_nodelay(true)?;
        let address = stream.local_addr()?;
        let mut builder = http2::Builder::new(TokioExecutor::new());
        if slow {
            builder.initial_stream_window_size(4096);
        }
        let (sender, connection) = builder.handshake(TokioIo::new(stream)).await?;
        let driver = tokio::spawn(connection);
        let mut all = JoinSet::new();
        let mut open = true;
        while open && !self.over() {
            let asked = if self.chance.within(0..4) == 0 {
                self.upload()
            } else {
                self.asks()
            };
            let id = self.id();
            let url = format!("http://{}{}?id={id}", self.address, asked.path);
            let cancels = self.role == Role::Http2Cancels && self.chance.within(0..3) == 0;
            let most = if cancels {
                MS(self.chance.within(0..30))
            } else {
                BOUND
            };
            let pace = if slow {
                MS(self.chance.within(0..10))
            } else {
                Duration::ZERO
            };
            let mut sender = sender.clone();
            all.spawn(async move {
                let method = if asked.body > 0 { "POST" } else { "GET" };
                let body = Full::new(Bytes::from(vec![b'u'; asked.body]));
                let request = Request::builder().method(method).uri(url);
                let request = request.body(body).expect("a request");
                let exchange = pin!(exchange(&mut sender, request, id, &asked, pace));
                let mut exchange = pin!(timeout(most, exchange));
                // On this thread the connection writes the request before a timer ends.
                let first = timeout(MS(2), exchange.as_mut()).await;
                let sent = Instant::now();
                let sight = match first {
                    Ok(sight) => sight,
                    Err(_) => exchange.await,
                };
                let sight = match sight {
                    Ok(sight) => sight,
                    Err(_) if cancels => Sight::Abandoned,
                    Err(_) => Sight::Nothing("the client waited too long".to_owned()),
                };
                (id, asked.kind, sent, sight)
            });
            while all.len() >= 4 || !all.is_empty() && self.chance.within(0..3) == 0 {
                let (id, kind, sent, sight) = all.join_next().await.expect("one of them")?;
                open &= !matches!(
                    sight,
                    Sight::Unsent | Sight::Nothing(_) | Sight::Truncated(_)
                );
                self.see((id, kind), Some(sent), Some(address), sight);
            }
            tokio::time::sleep(MS(self.chance.within(1..40))).await;
            open &= !sender_is_closed(&driver);
        }
        while let Some(ended) = all.join_next().await {
            let (id, kind, sent, sight) = ended?;
            self.see((id, kind), Some(sent), Some(address), sight);
        }
        driver.abort();
        Ok(())
    }
}

fn sender_is_closed<T>(driver: &tokio::task::JoinHandle<T>) -> bool {
    driver.is_finished()
}

async fn exchange(
    sender: &mut http2::SendRequest<Full<Bytes>>,
    request: Request<Full<Bytes>>,
    id: u64,
    asked: &Asked,
    pace: Duration,
) -> Sight {
    if sender.ready().await.is_err() {
        return Sight::Unsent;
    }
    let response = match sender.try_send_request(request).await {
        Ok(response) => response,
        Err(mut error) => {
            return match error.take_message() {
                Some(_) => Sight::Unsent,
                // The response may fail before its head is written.
                None if matches!(asked.expected, Expected::Failure) => Sight::Abandoned,
                None => Sight::Nothing(chain(error.error())),
            };
        }
    };
    let (head, mut body) = response.into_parts();
    let mut bytes = Vec::new();
    while let Some(frame) = body.frame().await {
        match frame {
            Ok(frame) => bytes.extend(frame.into_data().unwrap_or_default()),
            Err(_) if matches!(asked.expected, Expected::Failure) => return Sight::Abandoned,
            Err(error) => {
                let read = bytes.len();
                return Sight::Truncated(format!("{}, {read} bytes of the body", chain(&error)));
            }
        }
        if !pace.is_zero() {
            tokio::time::sleep(pace).await;
        }
    }
    let number = number(&head.headers);
    asked
        .expected
        .sight(head.status.as_u16(), number, id, &bytes)
}

fn number(headers: &HeaderMap) -> Option<&str> {
    headers.get("x-id")?.to_str().ok()
}

/// An error and its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn connect(address: SocketAddr, receive_buffer: Option<usize>) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    if let Some(size) = receive_buffer {
        socket.set_recv_buffer_size(size)?;
    }
    socket.connect_timeout(&address.into(), Duration::from_secs(5))?;
    Ok(socket.into())
}

/// The connection will be closed by RST.
fn reset(connection: &mut Connection) {
    let _ = SockRef::from(connection.stream()).set_linger(Some(Duration::ZERO));
}

/// Accepts connections until `over`, and passes on what it receives in small pieces with pauses.
pub(super) fn relay(listener: &TcpListener, server: SocketAddr, shared: &Shared, seed: u64) {
    listener.set_nonblocking(true).unwrap();
    let mut chance = Chance::new(seed);
    while !shared.over.load(Ordering::Relaxed) {
        let Ok((client, _)) = listener.accept() else {
            thread::sleep(MS(2));
            continue;
        };
        client.set_nonblocking(false).unwrap();
        let Ok(server) = connect(server, Some(8192)) else {
            let _ = SockRef::from(&client).set_linger(Some(Duration::ZERO));
            continue;
        };
        for stream in [&client, &server] {
            stream.set_nodelay(true).unwrap();
            stream.set_read_timeout(Some(BOUND)).unwrap();
            stream.set_write_timeout(Some(BOUND)).unwrap();
        }
        let pace = MS(chance.within(0..6));
        let back = (server.try_clone().unwrap(), client.try_clone().unwrap());
        thread::spawn(move || pass_on(client, server, pace, true));
        thread::spawn(move || pass_on(back.0, back.1, pace, false));
    }
}

/// A reset of the client is passed on as one. If the server resets the connection, the client still gets
/// what has arrived before, because a link does not lose it either.
fn pass_on(mut from: TcpStream, mut to: TcpStream, pace: Duration, resets: bool) {
    let mut piece = [0; 4096];
    loop {
        let passed = from.read(&mut piece).and_then(|length| {
            thread::sleep(pace);
            to.write_all(&piece[..length]).map(|()| length)
        });
        match passed {
            Ok(0) => {
                let _ = to.shutdown(Shutdown::Write);
                return;
            }
            Ok(_) => {}
            Err(_) => {
                if resets {
                    let _ = SockRef::from(&to).set_linger(Some(Duration::ZERO));
                }
                let _ = to.shutdown(Shutdown::Write);
                let _ = from.shutdown(Shutdown::Both);
                return;
            }
        }
    }
}
