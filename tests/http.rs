//! The settings of `Serve`: which versions of HTTP are spoken, the PING of HTTP/2, and values at their
//! extremes.

#![cfg(all(feature = "axum", feature = "signal"))]

mod pipes;
mod waits;

use std::{
    future::{self, IntoFuture},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use axum::{
    Router,
    routing::{MethodRouter, get},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    sync::mpsc,
    time::{self, Instant},
};
use tower_graceful::{Graceful, Phase, Serve};

use crate::{pipes::Pipes, waits::wait_for};

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: test\r\n\r\n";
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

type OwnServe = Serve<Pipes, Router, Router>;

/// A server, and a connection to it.
struct Served {
    graceful: Graceful,
    /// How often the handler was called.
    calls: Arc<AtomicUsize>,
    client: DuplexStream,
    begun: Instant,
}

impl Served {
    fn new(set_up: impl FnOnce(OwnServe) -> OwnServe) -> Self {
        Self::with(set_up, |calls| {
            get(move || {
                calls.fetch_add(1, Relaxed);
                future::ready("hello")
            })
        })
    }

    /// A server whose handler never responds.
    fn stuck(set_up: impl FnOnce(OwnServe) -> OwnServe) -> Self {
        Self::with(set_up, |_| get(future::pending::<&'static str>))
    }

    fn with(
        set_up: impl FnOnce(OwnServe) -> OwnServe,
        handler: impl FnOnce(Arc<AtomicUsize>) -> MethodRouter,
    ) -> Self {
        let graceful = Graceful::new();
        let calls = Arc::new(AtomicUsize::new(0));
        let (pipes, accepted) = mpsc::unbounded_channel();
        let app = Router::new()
            .route("/", handler(Arc::clone(&calls)))
            .layer(graceful.layer());
        let server = set_up(graceful.serve(Pipes(accepted), app));
        tokio::spawn(server.into_future());
        let (client, server) = tokio::io::duplex(1 << 20);
        pipes.send(server).unwrap();
        Self {
            graceful,
            calls,
            client,
            begun: Instant::now(),
        }
    }

    async fn send(&mut self, bytes: &[u8]) {
        self.client.write_all(bytes).await.unwrap();
    }

    /// What is received within this time, and whether the connection has been closed.
    async fn receive(&mut self, length: Duration) -> (Vec<u8>, bool) {
        let end = Instant::now() + length;
        let mut received = Vec::new();
        loop {
            let read = self.client.read_buf(&mut received);
            match time::timeout_at(end, read).await {
                Ok(read) => {
                    if read.unwrap() == 0 {
                        return (received, true);
                    }
                }
                Err(_) => return (received, false),
            }
        }
    }

    /// The frames that are received within this time, and whether the connection has been closed.
    async fn frames(&mut self, length: Duration) -> (Vec<Frame>, bool) {
        let (received, closed) = self.receive(length).await;
        (Frame::parse(&received), closed)
    }

    /// The peer of HTTP/2 sends its first bytes and a request.
    async fn ask_over_http2(&mut self) {
        self.send(&http2()).await;
        self.send(&frame(HEADERS, 5, 1, b"\x82\x86\x84\x41\x04test"))
            .await;
    }

    async fn is_gone(&self) {
        let open = || (self.graceful.connections(), self.graceful.in_flight());
        wait_for("the connection is gone", || open() == (0, 0)).await;
        assert_eq!(self.graceful.phase(), Phase::Serving);
    }
}

const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const ACK: u8 = 1;

/// A frame of HTTP/2 (RFC 9113 §4.1).
fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let length = u8::try_from(payload.len()).unwrap();
    let head = [0, 0, length, kind, flags, 0, 0, 0, stream];
    [&head, payload].concat()
}

/// The preface and an empty SETTINGS frame.
fn http2() -> Vec<u8> {
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    [&preface[..], &frame(SETTINGS, 0, 0, &[])].concat()
}

#[derive(Debug)]
struct Frame {
    kind: u8,
    flags: u8,
    payload: Vec<u8>,
}

impl Frame {
    fn parse(mut bytes: &[u8]) -> Vec<Self> {
        let mut frames = Vec::new();
        while let [a, b, c, kind, flags, _, _, _, _, rest @ ..] = bytes {
            let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
            let (payload, rest) = rest.split_at(length);
            frames.push(Self {
                kind: *kind,
                flags: *flags,
                payload: payload.to_vec(),
            });
            bytes = rest;
        }
        assert!(bytes.is_empty(), "{bytes:?}");
        frames
    }

    fn is_ping(&self) -> bool {
        self.kind == PING && self.flags & ACK == 0
    }
}

fn pings(frames: &[Frame]) -> usize {
    frames.iter().filter(|frame| frame.is_ping()).count()
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[tokio::test(start_paused = true)]
async fn a_vanished_http2_peer_is_noticed_while_serving() {
    let mut served = Served::stuck(|serve| {
        serve
            .http2_keep_alive_interval(seconds(10))
            .http2_keep_alive_timeout(seconds(5))
    });
    served.ask_over_http2().await;
    let (frames, closed) = served.frames(seconds(14)).await;
    assert!(!closed);
    assert_eq!(pings(&frames), 1, "{frames:?}");
    assert_eq!(served.graceful.in_flight(), 1);
    let (_, closed) = served.receive(seconds(2)).await;
    assert!(closed, "15 s after the last frame");
    served.is_gone().await;
}

#[tokio::test(start_paused = true)]
async fn an_http2_peer_that_acknowledges_pings_stays() {
    let mut served = Served::stuck(|serve| {
        serve
            .http2_keep_alive_interval(seconds(10))
            .http2_keep_alive_timeout(seconds(5))
    });
    served.ask_over_http2().await;
    let mut acknowledged = 0;
    while served.begun.elapsed() < seconds(100) {
        let (frames, closed) = served.frames(seconds(1)).await;
        assert!(!closed, "after {:?}", served.begun.elapsed());
        for ping in frames.iter().filter(|frame| frame.is_ping()) {
            acknowledged += 1;
            served.send(&frame(PING, ACK, 0, &ping.payload)).await;
        }
    }
    assert!((5..=10).contains(&acknowledged), "{acknowledged}");
    assert_eq!(served.graceful.in_flight(), 1);
}

#[tokio::test(start_paused = true)]
async fn without_an_interval_there_is_no_ping_and_a_silent_peer_stays() {
    fn unchanged(serve: OwnServe) -> OwnServe {
        serve
    }
    type SetUp = fn(OwnServe) -> OwnServe;
    let set_ups: [SetUp; 5] = [
        unchanged,
        |serve| serve.http2_keep_alive_timeout(seconds(5)),
        |serve| serve.http2_keep_alive_timeout(Duration::ZERO),
        |serve| serve.http2_keep_alive_interval(Duration::ZERO),
        |serve| serve.http2_keep_alive_interval(Duration::MAX),
    ];
    for (i, set_up) in set_ups.into_iter().enumerate() {
        let mut served = Served::stuck(set_up);
        served.ask_over_http2().await;
        let (frames, closed) = served.frames(HOUR).await;
        assert!(!closed, "{i}");
        assert_eq!(pings(&frames), 0, "{i}");
        assert_eq!(served.graceful.in_flight(), 1, "{i}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_interval_of_years_and_timeouts_at_their_extremes_do_what_they_say() {
    let almost = seconds(29 * 365 * 24 * 3600);
    let mut served = Served::stuck(|serve| {
        let serve = serve.http2_keep_alive_interval(almost);
        serve.http2_keep_alive_timeout(Duration::MAX)
    });
    served.ask_over_http2().await;
    let (frames, closed) = served.frames(HOUR).await;
    assert_eq!((pings(&frames), closed), (0, false));

    let mut served = Served::stuck(|serve| {
        let serve = serve.http2_keep_alive_interval(seconds(10));
        serve.http2_keep_alive_timeout(Duration::MAX)
    });
    served.ask_over_http2().await;
    let (frames, closed) = served.frames(DAY).await;
    assert_eq!((pings(&frames), closed), (1, false));

    let mut served = Served::stuck(|serve| {
        let serve = serve.http2_keep_alive_interval(seconds(10));
        serve.http2_keep_alive_timeout(Duration::ZERO)
    });
    served.ask_over_http2().await;
    let (_, closed) = served.receive(seconds(9)).await;
    assert!(!closed);
    let (_, closed) = served.receive(seconds(3)).await;
    assert!(closed, "at the first PING");
    served.is_gone().await;
}

/// What the server's SETTINGS say of the streams that may be open at once (RFC 9113 §6.5.2).
async fn most_streams(set_up: impl FnOnce(OwnServe) -> OwnServe) -> Option<u32> {
    let mut served = Served::new(set_up);
    served.send(&http2()).await;
    let (frames, _) = served.frames(seconds(1)).await;
    let settings = frames.iter().find(|frame| frame.kind == SETTINGS).unwrap();
    settings
        .payload
        .chunks(6)
        .find_map(|setting| match setting {
            [0, 3, value @ ..] => Some(u32::from_be_bytes(value.try_into().unwrap())),
            _ => None,
        })
}

#[tokio::test(start_paused = true)]
async fn the_limit_of_streams_is_announced_and_is_never_zero() {
    assert_eq!(most_streams(|serve| serve).await, Some(200));
    for (set, announced) in [(7, 7), (0, 1), (u32::MAX, u32::MAX)] {
        let most = most_streams(|serve| serve.http2_max_concurrent_streams(set)).await;
        assert_eq!(most, Some(announced));
    }
}

/// Whether exactly one response over HTTP/2 has begun, with status 200. HPACK encodes this status as one byte.
fn is_answered(frames: &[Frame]) -> bool {
    let heads = frames.iter().filter(|frame| frame.kind == HEADERS);
    heads.map(|head| head.payload[0]).eq([0x88])
}

#[tokio::test(start_paused = true)]
async fn http1_only_closes_what_begins_with_the_preface_of_http2() {
    let first_bytes = http2();
    for size in [first_bytes.len(), 1, 7] {
        let mut served = Served::new(Serve::http1_only);
        for piece in first_bytes.chunks(size) {
            // The last pieces come after the connection was closed.
            let _ = served.client.write_all(piece).await;
            tokio::task::yield_now().await;
        }
        let (received, closed) = served.receive(seconds(5)).await;
        assert!(closed, "in pieces of {size}");
        assert_eq!(received, b"", "in pieces of {size}");
        served.is_gone().await;
    }

    let mut served = Served::new(Serve::http1_only);
    served.client.write_all(&http2()).await.unwrap();
    served
        .send(&frame(HEADERS, 5, 1, b"\x82\x86\x84\x41\x04test"))
        .await;
    assert_eq!(served.receive(seconds(5)).await, (Vec::new(), true));
    assert_eq!(served.calls.load(Relaxed), 0, "the request is not seen");

    let mut served = Served::new(Serve::http1_only);
    served.send(REQUEST).await;
    let (received, closed) = served.receive(seconds(5)).await;
    let received = String::from_utf8(received).unwrap();
    assert!(received.starts_with("HTTP/1.1 200 OK\r\n"), "{received}");
    assert!(!closed);
}

#[tokio::test(start_paused = true)]
async fn http2_only_answers_http1_with_505_and_closes() {
    for request in [REQUEST, b"GET / HTTP/1.0\r\n\r\n"] {
        let mut served = Served::new(Serve::http2_only);
        served.send(request).await;
        let (received, closed) = served.receive(seconds(5)).await;
        let received = String::from_utf8(received).unwrap();
        assert!(
            received.contains(" 505 HTTP Version Not Supported\r\n"),
            "{received}"
        );
        assert!(received.ends_with("\r\n\r\nthis server speaks HTTP/2 only\n"));
        if request == REQUEST {
            assert!(received.contains("\r\nconnection: close\r\n"), "{received}");
        }
        assert!(closed);
        assert_eq!(served.calls.load(Relaxed), 0, "the request is not seen");
        served.is_gone().await;
    }

    let mut served = Served::new(Serve::http2_only);
    served.ask_over_http2().await;
    let (frames, closed) = served.frames(seconds(5)).await;
    assert!(is_answered(&frames), "{frames:?}");
    assert!(!closed);
}

#[tokio::test(start_paused = true)]
async fn of_both_the_last_call_takes_effect() {
    let mut served = Served::new(|serve| serve.http1_only().http2_only());
    served.ask_over_http2().await;
    let (frames, _) = served.frames(seconds(5)).await;
    assert!(is_answered(&frames), "{frames:?}");

    let mut served = Served::new(|serve| serve.http2_only().http1_only());
    served.send(REQUEST).await;
    let (received, _) = served.receive(seconds(5)).await;
    assert!(received.starts_with(b"HTTP/1.1 200 OK\r\n"));
}

#[tokio::test(start_paused = true)]
async fn by_default_both_versions_are_served() {
    let mut served = Served::new(|serve| serve);
    served.ask_over_http2().await;
    let (frames, _) = served.frames(seconds(5)).await;
    assert!(is_answered(&frames), "{frames:?}");

    let mut served = Served::new(|serve| serve);
    served.send(REQUEST).await;
    let (received, _) = served.receive(seconds(5)).await;
    assert!(received.starts_with(b"HTTP/1.1 200 OK\r\n"));
}

#[tokio::test(start_paused = true)]
async fn a_header_read_timeout_of_zero_wants_each_head_in_one_piece() {
    let set_up = |serve: OwnServe| serve.header_read_timeout(Duration::ZERO);
    let mut served = Served::new(set_up);
    for _ in 0..3 {
        served.send(REQUEST).await;
        let (received, closed) = served.receive(HOUR).await;
        assert!(received.starts_with(b"HTTP/1.1 200 OK\r\n"));
        assert!(!closed, "an idle connection stays");
    }
    served.send(&REQUEST[..20]).await;
    assert!(served.receive(seconds(1)).await.1);

    let mut served = Served::new(set_up);
    served.send(&REQUEST[..2]).await;
    assert!(served.receive(seconds(1)).await.1);
    served.is_gone().await;
}

#[tokio::test(start_paused = true)]
async fn without_a_header_read_timeout_half_a_head_may_wait_for_the_rest() {
    let mut served = Served::new(|serve| serve.header_read_timeout(Duration::MAX));
    for half in REQUEST.chunks(REQUEST.len() / 3 + 1) {
        assert_eq!(served.receive(DAY).await, (Vec::new(), false));
        served.send(half).await;
    }
    let (received, _) = served.receive(seconds(1)).await;
    assert!(received.starts_with(b"HTTP/1.1 200 OK\r\n"));
}

#[tokio::test]
async fn debug_shows_the_settings() {
    let graceful = Graceful::new();
    let (_pipes, accepted) = mpsc::unbounded_channel::<DuplexStream>();
    let serve = graceful.serve(Pipes(accepted), Router::new());
    let shown = format!("{:?}", serve.header_read_timeout(seconds(7)));
    assert!(shown.contains("header_read_timeout: 7s"), "{shown}");
}
