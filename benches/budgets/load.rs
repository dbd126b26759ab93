//! Clients without pauses: on each connection the next request follows as soon as a response has
//! arrived.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
};
use tokio_rustls::client::TlsStream;

use super::tls::{self, Identity};

#[derive(Clone, Copy, Debug)]
pub(crate) enum Version {
    Http1,
    Http2,
}

/// Requests at a time: on 32 connections over HTTP/1, on two over HTTP/2.
const REQUESTS: usize = 32;

/// The clients of one server. Their connections stay open.
pub(crate) enum Load {
    /// The connections, and the length of a response, which is always the same.
    Http1(Vec<TcpStream>, usize),
    Tls(Vec<TlsStream<TcpStream>>, usize),
    Http2(Vec<SendRequest<Empty<Bytes>>>),
}

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: test\r\n\r\n";

impl Load {
    pub(crate) async fn connect(address: SocketAddr, version: Version) -> Self {
        match version {
            Version::Http1 => {
                let mut streams = Vec::new();
                let mut length = 0;
                for _ in 0..REQUESTS {
                    let mut stream = TcpStream::connect(address).await.expect("a connection");
                    length = first_request(&mut stream).await;
                    streams.push(stream);
                }
                Self::Http1(streams, length)
            }
            Version::Http2 => {
                let mut peers = Vec::new();
                for _ in 0..2 {
                    let stream = TcpStream::connect(address).await.expect("a connection");
                    let _ = stream.set_nodelay(true);
                    peers.extend(vec![http2_peer(stream).await; REQUESTS / 2]);
                }
                Self::Http2(peers)
            }
        }
    }

    /// As [`connect`](Self::connect), with TLS.
    pub(crate) async fn connect_tls(
        address: SocketAddr,
        version: Version,
        identity: &Identity,
    ) -> Self {
        let connector = identity.connector(Some(match version {
            Version::Http1 => "http/1.1",
            Version::Http2 => "h2",
        }));
        let connect = || async {
            let tcp = TcpStream::connect(address).await.expect("a connection");
            let _ = tcp.set_nodelay(true);
            tls::connect(&connector, tcp).await.expect("a handshake")
        };
        match version {
            Version::Http1 => {
                let mut streams = Vec::new();
                let mut length = 0;
                for _ in 0..REQUESTS {
                    let mut stream = connect().await;
                    length = first_request(&mut stream).await;
                    streams.push(stream);
                }
                Self::Tls(streams, length)
            }
            Version::Http2 => {
                let mut peers = Vec::new();
                for _ in 0..2 {
                    peers.extend(vec![http2_peer(connect().await).await; REQUESTS / 2]);
                }
                Self::Http2(peers)
            }
        }
    }

    /// Sends requests for `time`, and returns the number of responses per second.
    pub(crate) async fn run(&mut self, time: Duration) -> f64 {
        let start = Instant::now();
        let end = start + time;
        let mut answered = 0;
        match self {
            Self::Http1(streams, length) => answered += http1_clients(streams, *length, end).await,
            Self::Tls(streams, length) => answered += http1_clients(streams, *length, end).await,
            Self::Http2(peers) => {
                let mut clients = JoinSet::new();
                for peer in peers {
                    clients.spawn(http2_client(peer.clone(), end));
                }
                while let Some(client) = clients.join_next().await {
                    answered += client.expect("a client");
                }
            }
        }
        f64::from(answered) / start.elapsed().as_secs_f64()
    }
}

/// Sends a first request, and returns the length of the response.
async fn first_request(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> usize {
    stream.write_all(REQUEST).await.expect("a server");
    stream.flush().await.expect("a server");
    let mut response = Vec::new();
    while !response.ends_with(b"hello") {
        let read = stream.read_buf(&mut response).await;
        assert!(
            read.expect("a response") > 0,
            "the server closed the connection"
        );
    }
    response.len()
}

/// Runs all clients, and returns the number of responses. The connections stay open.
async fn http1_clients<S>(streams: &mut Vec<S>, length: usize, end: Instant) -> u32
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut clients = JoinSet::new();
    for stream in streams.drain(..) {
        clients.spawn(http1_client(stream, length, end));
    }
    let mut answered = 0;
    while let Some(client) = clients.join_next().await {
        let (stream, count) = client.expect("a client");
        streams.push(stream);
        answered += count;
    }
    answered
}

async fn http1_client<S>(mut stream: S, length: usize, end: Instant) -> (S, u32)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut response = vec![0; length];
    let mut answered = 0;
    while Instant::now() < end {
        stream.write_all(REQUEST).await.expect("a server");
        stream.flush().await.expect("a server");
        stream.read_exact(&mut response).await.expect("a response");
        answered += 1;
    }
    assert!(response.ends_with(b"hello"));
    (stream, answered)
}

async fn http2_peer(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> SendRequest<Empty<Bytes>> {
    let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
    let (peer, connection) = handshake.await.expect("a server of HTTP/2");
    tokio::spawn(connection);
    peer
}

async fn http2_client(mut peer: SendRequest<Empty<Bytes>>, end: Instant) -> u32 {
    let mut answered = 0;
    while Instant::now() < end {
        peer.ready().await.expect("a connection");
        let request = Request::get("http://test/").body(Empty::new());
        let response = peer.send_request(request.expect("a request"));
        let body = response.await.expect("a response").into_body();
        assert_eq!(body.collect().await.expect("a body").to_bytes(), "hello");
        answered += 1;
    }
    answered
}
