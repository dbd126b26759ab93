//! Where requests begin and end on a connection of `serve`, however its bytes are split.
//!
//! The sniffer of the crate is private. It is fuzzed through what it decides: whether a connection
//! speaks HTTP/2, and whether `header_read_timeout` closes it, which is the case if and only if a
//! request head has begun and is not complete. Many empty lines begin a head too. The expected answer
//! comes from `httparse`, the parser that hyper uses, on the bytes as a whole.

#![no_main]

use std::{
    io,
    sync::{Arc, LazyLock, Mutex},
    time::Duration,
};

use arbitrary::Arbitrary;
use axum::{Router, body::Bytes, serve::Listener};
use libfuzzer_sys::fuzz_target;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex, split},
    runtime::Runtime,
    sync::mpsc,
    time::sleep,
};
use tower_graceful::Graceful;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const TIMEOUT: Duration = Duration::from_secs(100);

#[derive(Arbitrary, Debug)]
enum Part {
    Get,
    Field,
    /// The end of a field and of a head.
    EndOfHead,
    Post(u8),
    Chunked,
    Chunk(u8),
    LastChunk,
    CarriageReturn,
    LineFeed,
    Preface,
    /// The first bytes of the preface.
    Begun(u8),
    Body(u8),
    Bytes(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
struct Input {
    parts: Vec<Part>,
    /// The lengths of the pieces that the server reads.
    pieces: Vec<u8>,
}

impl Input {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for part in &self.parts {
            match part {
                Part::Get => bytes.extend(b"GET / HTTP/1.1\r\n"),
                Part::Field => bytes.extend(b"host: test"),
                Part::EndOfHead => bytes.extend(b"\r\n\r\n"),
                Part::Post(length) => {
                    let head = format!("POST / HTTP/1.1\r\ncontent-length: {length}\r\n\r\n");
                    bytes.extend(head.into_bytes());
                }
                Part::Chunked => {
                    bytes.extend(b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n");
                }
                Part::Chunk(length) => {
                    bytes.extend(format!("{length:x}\r\n").into_bytes());
                    bytes.extend(vec![b'c'; usize::from(*length)]);
                    bytes.extend(b"\r\n");
                }
                Part::LastChunk => bytes.extend(b"0\r\n\r\n"),
                Part::CarriageReturn => bytes.push(b'\r'),
                Part::LineFeed => bytes.push(b'\n'),
                Part::Preface => bytes.extend(PREFACE),
                Part::Begun(length) => {
                    bytes.extend(&PREFACE[..usize::from(*length) % PREFACE.len()]);
                }
                Part::Body(length) => bytes.extend(vec![b'b'; usize::from(*length)]),
                Part::Bytes(more) => bytes.extend(more),
            }
        }
        bytes.truncate(20_000);
        bytes
    }
}

/// What becomes of a connection after the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The server waits for a request, or for the rest of a body.
    Open,
    /// The server waits for a request after so many line breaks that they may begin a head: it depends on the
    /// pieces.
    Either,
    /// A head has begun.
    InHead,
    Closed,
    Http2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    responses: usize,
    state: State,
}

/// Fewer bytes of line breaks begin no head, however they are split.
const FEW_LINE_BREAKS: usize = 15;

/// So many bytes of line breaks begin a head, however they are split.
const MANY_LINE_BREAKS: usize = 15 * 64;

/// The expected answer, unless the bytes contain something that `httparse` alone does not decide.
fn expected(bytes: &[u8]) -> Option<Seen> {
    if bytes.starts_with(PREFACE) {
        return Some(Seen {
            responses: 0,
            state: State::Http2,
        });
    }
    if !bytes.is_empty() && PREFACE.starts_with(bytes) {
        // The version is not known yet.
        return Some(Seen {
            responses: 0,
            state: State::InHead,
        });
    }
    let mut rest = bytes;
    let mut responses = 0;
    if !is_regular(bytes) {
        return None;
    }
    let ends = |responses, state| Some(Seen { responses, state });
    loop {
        if rest.iter().all(|byte| matches!(byte, b'\r' | b'\n')) {
            // hyper waits for more, or refuses `\r\r`.
            let state = match rest.len() {
                ..FEW_LINE_BREAKS => State::Open,
                FEW_LINE_BREAKS..MANY_LINE_BREAKS => State::Either,
                MANY_LINE_BREAKS.. => State::InHead,
            };
            return (!rest.windows(2).any(|two| two == b"\r\r"))
                .then_some(Seen { responses, state });
        }
        let mut fields = [httparse::EMPTY_HEADER; 100];
        let mut head = httparse::Request::new(&mut fields);
        let length = match head.parse(rest) {
            Ok(httparse::Status::Complete(length)) => length,
            Ok(httparse::Status::Partial) => return ends(responses, State::InHead),
            Err(_) => return ends(responses, State::Closed),
        };
        if head.path != Some("/") || head.version != Some(1) {
            return None;
        }
        if !matches!(head.method, Some("GET" | "POST")) {
            return None;
        }
        rest = &rest[length..];
        let mut body = None;
        let mut chunked = false;
        for field in head.headers.iter() {
            match field.name.to_ascii_lowercase().as_str() {
                "host" => {}
                "content-length" if body.is_none() => {
                    let text = std::str::from_utf8(field.value).ok()?;
                    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
                        return None;
                    }
                    body = Some(text.parse().ok().filter(|body| *body < MOST)?);
                }
                "transfer-encoding" if field.value == b"chunked" && !chunked => chunked = true,
                _ => return None,
            }
        }
        if chunked {
            if body.is_some() {
                return None;
            }
            rest = match skip_chunks(rest) {
                Skipped::Rest(rest) => rest,
                Skipped::Missing => return ends(responses, State::Open),
                Skipped::Other => return None,
            };
        } else {
            let Some(after) = rest.get(body.unwrap_or(0)..) else {
                return ends(responses, State::Open);
            };
            rest = after;
        }
        responses += 1;
    }
}

/// Whether all lines end in CR LF, or all in LF. hyper parses a head again when it sees such an end. In a
/// head with other ends, whether it finds the end or an error depends on the pieces.
fn is_regular(bytes: &[u8]) -> bool {
    let mut pairs = bytes.windows(2);
    let all_in_pairs =
        !bytes.starts_with(b"\n") && pairs.all(|two| (two[0] == b'\r') == (two[1] == b'\n'));
    !bytes.contains(&b'\r') || all_in_pairs
}

/// No body is longer. axum's limit is 2 MB.
const MOST: usize = 1_000_000;

enum Skipped<'a> {
    Rest(&'a [u8]),
    Missing,
    /// Extensions, trailers, errors.
    Other,
}

fn skip_chunks(mut rest: &[u8]) -> Skipped<'_> {
    loop {
        let Some(line) = rest.iter().position(|byte| *byte == b'\n') else {
            let plain = rest
                .iter()
                .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
            return if plain && rest.len() < 8 {
                Skipped::Missing
            } else {
                Skipped::Other
            };
        };
        let digits = rest[..line].strip_suffix(b"\r").unwrap_or(b"");
        let plain = digits
            .iter()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if !plain || digits.is_empty() || digits.len() > 7 {
            return Skipped::Other;
        }
        let digits = std::str::from_utf8(digits).unwrap();
        let length = usize::from_str_radix(digits, 16).unwrap();
        if length >= MOST {
            return Skipped::Other;
        }
        rest = &rest[line + 1..];
        let end = &rest[length.min(rest.len())..];
        if end.len() < 2 && b"\r\n".starts_with(end) {
            return Skipped::Missing;
        }
        let Some(after) = end.strip_prefix(b"\r\n") else {
            return Skipped::Other;
        };
        if length == 0 {
            return Skipped::Rest(after);
        }
        rest = after;
    }
}

struct Queue(mpsc::UnboundedReceiver<DuplexStream>);

impl Listener for Queue {
    type Io = DuplexStream;
    type Addr = ();

    async fn accept(&mut self) -> (DuplexStream, ()) {
        match self.0.recv().await {
            Some(io) => (io, ()),
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<()> {
        Ok(())
    }
}

/// One server for all inputs, on a clock that stands still while there is something to do.
struct Server {
    runtime: Runtime,
    graceful: Graceful,
    connects: mpsc::UnboundedSender<DuplexStream>,
}

impl Server {
    fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap();
        let _inside = runtime.enter();
        let graceful = Graceful::new();
        let (connects, queue) = mpsc::unbounded_channel();
        let app = Router::new()
            .fallback(|_: Bytes| async { "ok" })
            .layer(graceful.layer());
        let server = graceful
            .serve(Queue(queue), app)
            .header_read_timeout(TIMEOUT);
        runtime.spawn(server.into_future());
        Self {
            runtime,
            graceful,
            connects,
        }
    }

    async fn sends(&self, pieces: impl Iterator<Item = &[u8]>) -> Seen {
        let (client, io) = duplex(1024 * 1024);
        self.connects.send(io).unwrap();
        let (mut reads, mut writes) = split(client);
        let seen = Arc::new(Mutex::new((Vec::new(), false)));
        let reader = tokio::spawn({
            let seen = seen.clone();
            async move {
                let mut piece = [0; 4096];
                while let Ok(length @ 1..) = reads.read(&mut piece).await {
                    seen.lock().unwrap().0.extend_from_slice(&piece[..length]);
                }
                seen.lock().unwrap().1 = true;
            }
        });
        for piece in pieces {
            if writes.write_all(piece).await.is_err() {
                break;
            }
            // Ends when every task waits.
            sleep(Duration::from_millis(1)).await;
        }
        let is_closed = || seen.lock().unwrap().1;
        // Longer than a closed connection lingers.
        sleep(Duration::from_secs(5)).await;
        let early = is_closed();
        sleep(TIMEOUT).await;
        let late = is_closed();
        let bytes = std::mem::take(&mut seen.lock().unwrap().0);
        reader.abort();
        let _ = reader.await;
        drop(writes);
        for _ in 0..10 {
            sleep(Duration::from_secs(1)).await;
            if self.graceful.connections() == 0 {
                break;
            }
        }
        assert_eq!(self.graceful.connections(), 0);
        assert_eq!(self.graceful.in_flight(), 0);
        let state = match (early, late) {
            // A frame of SETTINGS is the first that an HTTP/2 server sends.
            _ if bytes.get(3) == Some(&4) => State::Http2,
            (true, _) => State::Closed,
            (false, true) => State::InHead,
            (false, false) => State::Open,
        };
        let ok = b"HTTP/1.1 200 OK\r\n";
        let responses = bytes.windows(ok.len()).filter(|window| window == ok);
        Seen {
            responses: responses.count(),
            state,
        }
    }
}

/// Cuts the bytes into pieces of these lengths, which are repeated.
fn cut<'a>(mut bytes: &'a [u8], lengths: &[u8]) -> Vec<&'a [u8]> {
    let mut pieces = Vec::new();
    let mut lengths = lengths.iter().cycle();
    // So many pieces take less than the timeout.
    while !bytes.is_empty() && pieces.len() < 5000 {
        let length = lengths
            .next()
            .map_or(bytes.len(), |length| 1 + usize::from(*length) % 40);
        let (piece, rest) = bytes.split_at(length.min(bytes.len()));
        pieces.push(piece);
        bytes = rest;
    }
    if !bytes.is_empty() {
        pieces.push(bytes);
    }
    pieces
}

/// Static, so that it is never dropped: at the end of the process tokio's own statics are gone.
static SERVER: LazyLock<Server> = LazyLock::new(Server::start);

fuzz_target!(|input: Input| {
    let bytes = input.bytes();
    let server = &*SERVER;
    server.runtime.block_on(async {
        let whole = server.sends(std::iter::once(&*bytes)).await;
        let split = server.sends(cut(&bytes, &input.pieces).into_iter()).await;
        let text = String::from_utf8_lossy(&bytes);
        let is_http2 = bytes.starts_with(PREFACE);
        for seen in [whole, split] {
            assert_eq!(seen.state == State::Http2, is_http2, "{text:?}");
            let Some(expected) = expected(&bytes) else {
                continue;
            };
            assert_eq!(seen.responses, expected.responses, "{text:?}");
            // hyper may find an error in a head only at the end of the head.
            let late = expected.state == State::Closed && seen.state == State::InHead;
            let either = expected.state == State::Either
                && matches!(seen.state, State::Open | State::InHead);
            assert!(
                late || either || seen.state == expected.state,
                "{seen:?}, {expected:?}: {text:?}"
            );
        }
    });
});
