//! `header_read_timeout` bounds each request head, however its bytes arrive, and nothing else.

#![cfg(all(feature = "axum", feature = "signal"))]

mod pipes;

use std::{fmt::Write, time::Duration};

use axum::{Router, body::Bytes, extract::Path, http::StatusCode, routing};
use proptest::{prelude::*, sample::Index};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    sync::mpsc,
    time,
};
use tower_graceful::Graceful;

use crate::pipes::Pipes;

const TIMEOUT: Duration = Duration::from_secs(30);
const ALMOST: Duration = Duration::from_secs(29);
const HEAD: &str = "GET /0 HTTP/1.1\r\nhost: test\r\nx-note: a: b\r\n\r\n";

async fn answer(Path(ms): Path<u64>, _body: Bytes) -> &'static str {
    if ms > 0 {
        time::sleep(Duration::from_millis(ms)).await;
    }
    "hello"
}

/// Answers without reading the body.
async fn refuse() -> StatusCode {
    StatusCode::UNAUTHORIZED
}

/// A connection to a server of its own.
fn connect(half_close: bool) -> DuplexStream {
    let graceful = Graceful::new();
    let (pipes, accepted) = mpsc::unbounded_channel();
    let app = Router::new()
        .route("/{ms}", routing::any(answer))
        .route("/refuse", routing::post(refuse));
    let server = graceful.serve(Pipes(accepted), app);
    let server = server.header_read_timeout(TIMEOUT).half_close(half_close);
    tokio::spawn(server.into_future());
    let (client, server) = tokio::io::duplex(1 << 20);
    pipes.send(server).unwrap();
    client
}

/// What the client has read, and whether the connection has been closed.
#[derive(Default)]
struct Read {
    text: String,
    closed: bool,
}

impl Read {
    /// Reads for this long.
    async fn go_on(&mut self, client: &mut DuplexStream, length: Duration) {
        let end = time::Instant::now() + length;
        let mut buffer = [0; 4096];
        while !self.closed {
            let Ok(read) = time::timeout_at(end, client.read(&mut buffer)).await else {
                return;
            };
            let read = read.unwrap();
            self.closed = read == 0;
            self.text += std::str::from_utf8(&buffer[..read]).unwrap();
        }
    }

    fn responses(&self) -> usize {
        self.text.matches("HTTP/1.1 200").count()
    }
}

/// A part of what a client sends.
#[derive(Clone, Debug)]
enum Part {
    Bodyless,
    Length(String),
    Chunked(Vec<String>),
    /// Empty lines, which are no request.
    Stray(&'static str),
}

impl Part {
    fn write(&self, ms: u64, stream: &mut String) {
        let head = |method| format!("{method} /{ms} HTTP/1.1\r\nhost: test\r\n");
        match self {
            Self::Bodyless => *stream += &(head("GET") + "\r\n"),
            Self::Length(body) => {
                let length = body.len();
                *stream += &(head("POST") + &format!("content-length: {length}\r\n\r\n{body}"));
            }
            Self::Chunked(chunks) => {
                *stream += &(head("POST") + "transfer-encoding: chunked\r\n\r\n");
                for chunk in chunks {
                    let length = chunk.len();
                    write!(stream, "{length:x}\r\n{chunk}\r\n").unwrap();
                }
                *stream += "0\r\n\r\n";
            }
            Self::Stray(lines) => *stream += lines,
        }
    }
}

/// Text that is easily taken for the end of a head, or for its beginning.
fn body() -> impl Strategy<Value = String> {
    let word = prop::sample::select(vec![
        "\r",
        "\n",
        "\r\n",
        "\r\n\r\n",
        "x",
        " HTTP/1.1",
        "GET /",
        "a: b",
    ]);
    let words = prop::collection::vec(word, 0..6);
    words.prop_map(|words| words.concat())
}

fn part() -> impl Strategy<Value = Part> {
    let chunk = body().prop_filter("a chunk", |chunk| !chunk.is_empty());
    prop_oneof![
        Just(Part::Bodyless),
        body().prop_map(Part::Length),
        prop::collection::vec(chunk, 0..3).prop_map(Part::Chunked),
        prop::sample::select(vec!["\r\n", "\n", "\r\n\r\n"]).prop_map(Part::Stray),
    ]
}

/// What is left over after the last request.
fn rest() -> impl Strategy<Value = String> {
    let empty = prop::sample::select(vec!["", "", "\r", "\n", "\r\n", "\r\n\r"]);
    (empty, prop_oneof![Just(0), 0..HEAD.len()]).prop_map(|(empty, length)| {
        // A head cannot follow half an empty line.
        let empty = if length > 0 {
            empty.trim_end_matches('\r')
        } else {
            empty
        };
        empty.to_owned() + &HEAD[..length]
    })
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 1500,
        failure_persistence: None,
        ..ProptestConfig::default() })]

    #[test]
    fn a_head_that_has_begun_is_bounded_and_an_idle_connection_is_not(
        parts in prop::collection::vec((part(), prop_oneof![Just(0), Just(5_u64)]), 0..5),
        rest in rest(),
        half_close: bool,
        cuts in prop::collection::vec((any::<Index>(), prop_oneof![Just(0), 1..8_u64]), 0..6),
    ) {
        let mut stream = String::new();
        for (part, ms) in &parts {
            part.write(*ms, &mut stream);
        }
        stream += &rest;
        let requests = parts.iter().filter(|(part, _)| !matches!(part, Part::Stray(_))).count();
        let has_begun = rest.contains(|char| char != '\r' && char != '\n');
        let mut cuts: Vec<_> =
            cuts.iter().map(|(cut, pause)| (cut.index(stream.len() + 1), *pause)).collect();
        cuts.push((stream.len(), 1));
        cuts.sort_unstable();

        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap();
        let read = runtime.block_on(async {
            let mut client = connect(half_close);
            let mut sent = 0;
            for (cut, pause) in cuts {
                client.write_all(&stream.as_bytes()[sent..cut]).await.unwrap();
                sent = cut;
                time::sleep(Duration::from_millis(pause)).await;
            }
            let mut read = Read::default();
            read.go_on(&mut client, ALMOST).await;
            assert!(!read.closed, "closed too early");
            assert_eq!(read.responses(), requests);
            read.go_on(&mut client, Duration::from_secs(2)).await;
            if !has_begun && !read.closed {
                // After half an empty line the other half.
                let other_half = if rest.ends_with('\r') { "\n" } else { "" };
                client.write_all((other_half.to_owned() + HEAD).as_bytes()).await.unwrap();
                read.go_on(&mut client, Duration::from_secs(1)).await;
                assert_eq!(read.responses(), requests + 1);
            }
            read
        });
        prop_assert_eq!(read.closed, has_begun);
    }
}

/// hyper reads once more for the rest of a body that its handler has dropped. It keeps the connection open only
/// if that read brings all of the rest.
#[tokio::test(start_paused = true)]
async fn a_body_that_is_not_read_does_not_close_its_connection() {
    let ends = [
        "no line break",
        "\n",
        "\r\n",
        "\r\n\r\n--boundary--\r\n",
        "{\"a\": \"b: c\"}\n",
        "a: b\n",
        "\"GET / HTTP/1.1\" 200 \"http://test\"\n",
        "GET / HTTP/1.1\r\nnot a field\r\n",
        "GET / HTTP/1.1\r\n\r\na: b\r\n",
    ];
    for end in ends {
        let mut client = connect(false);
        let mut read = Read::default();
        let body = "x".repeat(20_000) + end;
        let length = body.len();
        let request = format!(
            "POST /refuse HTTP/1.1\r\nhost: test\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        for requests in 1..=3 {
            client.write_all(request.as_bytes()).await.unwrap();
            read.go_on(&mut client, Duration::from_secs(1)).await;
            assert!(!read.closed, "{end:?}, request {requests}");
            assert_eq!(read.text.matches("HTTP/1.1 401").count(), requests);
        }
        assert!(!read.text.contains("connection: close"), "{}", read.text);
    }
}
