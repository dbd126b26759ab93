//! A response arrives whole, or the outcome is not clean: also on servers without a layer, on exempt paths, and
//! on IO that is not a socket.

#![cfg(all(feature = "axum", feature = "signal"))]

mod pipes;
mod tcp;
mod waits;

use axum::{
    Router,
    body::Body,
    extract::ws::{Message, WebSocketUpgrade},
    http::StatusCode,
    response::Response,
    routing::{MethodRouter, get, post},
    serve::{Listener, ListenerExt},
};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, future::join_all, stream};
use http::Request;
use http_body_util::{BodyExt, Collected, Empty};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};

use std::{
    future::ready,
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr},
    panic::resume_unwind,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{
        AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufWriter, DuplexStream, ReadBuf,
        duplex,
    },
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{Notify, mpsc, oneshot},
    task, time,
};
use tower_graceful::{Graceful, HandshakeExt, Outcome, Phase, Report};

use crate::{
    pipes::Pipes,
    tcp::listener,
    waits::{BOUND, wait_for},
};

fn graceful() -> Graceful {
    Graceful::builder()
        .drain_delay(Duration::ZERO)
        .exempt("/slow")
        .build()
        .unwrap()
}

/// A client whose kernel takes little before the client reads.
async fn connect_with_little_room(address: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    socket.connect(address).await.unwrap()
}

async fn lost(layered: bool, tracked: bool) {
    let graceful = graceful();
    let (tcp, address) = listener().await;
    let handles = Arc::new(Notify::new());
    let begun = Arc::clone(&handles);
    let slow = async move || {
        begun.notify_one();
        time::sleep(Duration::from_secs(3)).await;
        "slow"
    };
    let mut app = Router::new().route("/slow", get(slow));
    if layered {
        app = app.layer(graceful.layer());
    }
    let server = if tracked {
        let server =
            axum::serve(graceful.listener(tcp), app).with_graceful_shutdown(graceful.drain());
        let g = graceful.clone();
        tokio::spawn(async move { g.run(server.into_future()).await })
    } else {
        tokio::spawn(graceful.serve(tcp, app).into_future())
    };
    let hold = layered.then(|| graceful.hold("x"));
    let mut io = TcpStream::connect(address).await.unwrap();
    if layered {
        graceful.shutdown();
        time::sleep(Duration::from_millis(20)).await;
    }
    io.write_all(b"GET /slow HTTP/1.1\r\nhost: test\r\n\r\n")
        .await
        .unwrap();
    time::timeout(BOUND, handles.notified()).await.unwrap();
    drop(hold);
    graceful.shutdown();
    let mut answer = String::new();
    let read = io.read_to_string(&mut answer).await;
    let report = server.await.unwrap();
    assert!(
        answer.ends_with("slow") || report.outcome() != Outcome::Clean,
        "{read:?} {answer:?} {report}"
    );
}
#[tokio::test]
async fn serve_without_a_layer_loses_no_response_unreported() {
    lost(false, false).await;
}
#[tokio::test]
async fn a_tracked_listener_without_a_layer_loses_no_response_unreported() {
    lost(false, true).await;
}
#[tokio::test]
async fn serve_loses_no_exempt_response_unreported() {
    lost(true, false).await;
}
#[tokio::test]
async fn a_tracked_listener_loses_no_exempt_response_unreported() {
    lost(true, true).await;
}

/// An IO type that the crate does not recognise as a socket, like a TLS stream.
struct Other(TcpStream);
impl AsyncRead for Other {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        b: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, b)
    }
}
impl AsyncWrite for Other {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        b: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, b)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
struct Others(TcpListener);
impl Listener for Others {
    type Io = Other;
    type Addr = std::net::SocketAddr;
    async fn accept(&mut self) -> (Other, Self::Addr) {
        let (io, a) = self.0.accept().await.unwrap();
        (Other(io), a)
    }
    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.0.local_addr()
    }
}

/// The service stops while a keep-alive response is in the kernel's buffers. Its client reads slowly, and sends
/// while it reads.
async fn wrapped(other: bool) {
    let graceful = graceful();
    let (tcp, address) = listener().await;
    let app = Router::new()
        .route("/big", get(|| async { vec![b'x'; 600 * 1024] }))
        .layer(graceful.layer());
    let server = if other {
        tokio::spawn(graceful.serve(Others(tcp), app).into_future())
    } else {
        tokio::spawn(graceful.serve(tcp, app).into_future())
    };
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(32 * 1024).unwrap();
    let mut io = socket.connect(address).await.unwrap();
    io.write_all(b"GET /big HTTP/1.1\r\nhost: test\r\n\r\n")
        .await
        .unwrap();
    // The response has begun. The service drains until the rest is in the kernel's buffers.
    time::timeout(BOUND, io.readable()).await.unwrap().unwrap();
    graceful.shutdown();
    let (mut got, mut piece) = (0, vec![0; 16 * 1024]);
    let end = loop {
        match io.read(&mut piece).await {
            Ok(0) => break "eof".to_owned(),
            Ok(n) => got += n,
            Err(e) => break e.to_string(),
        }
        // Other clients send here too: the answer to a close_notify, a WINDOW_UPDATE, or a pipelined request.
        let _ = io.write_all(b"\r\n").await;
        time::sleep(Duration::from_millis(10)).await;
        if got > 600 * 1024 {
            break "whole".to_owned();
        }
    };
    drop(io);
    let report = server.await.unwrap();
    assert!(
        got > 600 * 1024 || report.outcome() != Outcome::Clean,
        "{got} {end}; {report}"
    );
}
#[tokio::test(flavor = "multi_thread")]
async fn io_that_is_no_socket_loses_no_response_unreported() {
    wrapped(true).await;
}
#[tokio::test(flavor = "multi_thread")]
async fn a_socket_loses_no_response_unreported() {
    wrapped(false).await;
}

/// The peer sends while the server closes the connection. These bytes do not count as a connection that was reset in
/// the accept queue.
#[tokio::test]
async fn a_connection_that_was_read_is_not_counted_with_the_queue() {
    let graceful = graceful();
    let (tcp, address) = listener().await;
    let mut client = TcpStream::connect(address).await.unwrap();
    let (server, _) = tcp.accept().await.unwrap();
    let mut io = graceful.track(server);
    client
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .await
        .unwrap();
    io.read_exact(&mut [0; 24]).await.unwrap();
    io.write_all(b"\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let nothing = time::timeout(Duration::from_millis(50), io.read(&mut [0])).await;
    assert!(nothing.is_err());
    let drain = graceful.drain();
    let run = graceful.clone();
    let (say_polled, polled) = oneshot::channel();
    let (say_dropped, dropped) = oneshot::channel();
    let run = tokio::spawn(async move {
        run.run(async move {
            say_polled.send(()).unwrap();
            drain.await;
            // By then the connection has been told to expire.
            time::sleep(Duration::from_millis(1300)).await;
            drop(io);
            say_dropped.send(()).unwrap();
            io::Result::Ok(())
        })
        .await
    });
    polled.await.unwrap();
    graceful.shutdown();
    client
        .write_all(b"\0\0\x08\x06\0\0\0\0\0 a ping ")
        .await
        .unwrap();
    dropped.await.unwrap();
    drop(client);
    let report = run.await.unwrap();
    assert_eq!(report.remaining().queued, 0, "{report}");
}

/// The client has closed its side and reads nothing, so its response waits in the kernel until the cut.
#[cfg(target_os = "linux")]
#[test]
fn the_cut_ends_a_connection_that_its_client_has_closed_and_does_not_read() {
    let (say_report, report) = std::sync::mpsc::channel();
    // A thread of its own: a task that never yields would hang the test instead of failing it.
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let report = runtime.block_on(async {
            let graceful = Graceful::builder()
                .drain_delay(Duration::ZERO)
                .drain_timeout(Duration::from_secs(1))
                .half_close(true)
                .build()
                .unwrap();
            let (tcp, address) = listener().await;
            let app = Router::new()
                .route("/", get(|| async { vec![0; 100_000] }))
                .layer(graceful.layer());
            let server = tokio::spawn(graceful.serve(tcp, app).into_future());
            let mut client = connect_with_little_room(address).await;
            client
                .write_all(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n")
                .await
                .unwrap();
            client.shutdown().await.unwrap();
            client.readable().await.unwrap();
            // After that, the server waits until the client has received it.
            wait_for("everything is written", || graceful.in_flight() == 0).await;
            graceful.shutdown();
            let report = server.await.unwrap();
            drop(client);
            report
        });
        let _ = say_report.send(report);
    });
    let report = report
        .recv_timeout(Duration::from_secs(20))
        .expect("an end");
    assert_eq!(report.outcome(), Outcome::Forced, "{report}");
    assert!(report.to_string().contains("undelivered"), "{report}");
}

/// No task runs between the cut and the report.
#[cfg(target_os = "linux")]
#[test]
fn what_a_client_has_not_received_is_reported_although_the_runtime_is_blocked() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let report = runtime.block_on(async {
        let graceful = Graceful::builder()
            .drain_delay(Duration::ZERO)
            .drain_timeout(Duration::from_millis(300))
            .build()
            .unwrap();
        let (tcp, address) = listener().await;
        let app = Router::new()
            .route("/", post(|| async { vec![0; 100_000] }))
            .layer(graceful.layer());
        let server = tokio::spawn(graceful.serve(tcp, app).into_future());
        let mut client = connect_with_little_room(address).await;
        // Answered without its body, so the server closes the connection.
        let request = b"POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 9\r\n\r\n";
        client.write_all(request).await.unwrap();
        client.readable().await.unwrap();
        wait_for("everything is written", || graceful.in_flight() == 0).await;
        graceful.shutdown();
        // Until the report is made.
        std::thread::sleep(Duration::from_secs(1));
        let report = server.await.unwrap();
        drop(client);
        report
    });
    assert_eq!(report.remaining().connections, 1, "{report}");
    assert!(report.to_string().contains("undelivered"), "{report}");
    assert_eq!(report.outcome(), Outcome::Forced, "{report}");
}

/// The client would lose its response by a reset, on systems that discard what was received before one.
#[tokio::test]
async fn a_body_that_comes_after_the_response_resets_no_connection_whatever_the_method() {
    for method in ["GET", "POST"] {
        let graceful = graceful();
        let (tcp, address) = listener().await;
        let app = Router::new().layer(graceful.layer());
        let server = tokio::spawn(graceful.serve(tcp, app).into_future());
        let mut client = TcpStream::connect(address).await.unwrap();
        let head = format!("{method} / HTTP/1.1\r\nhost: test\r\ncontent-length: 4\r\n\r\n");
        client.write_all(head.as_bytes()).await.unwrap();
        let mut response = Vec::new();
        client.read_to_end(&mut response).await.unwrap();
        assert!(response.starts_with(b"HTTP/1.1 404"), "{method}");
        // The task of the connection goes on.
        task::yield_now().await;
        assert_eq!(graceful.connections(), 1, "{method}");
        client.write_all(b"body").await.unwrap();
        client.shutdown().await.unwrap();
        wait_for("it is closed", || graceful.connections() == 0).await;
        let error = client.take_error().unwrap();
        assert!(error.is_none(), "{method}: {error:?}");
        graceful.shutdown();
        assert_eq!(server.await.unwrap().outcome(), Outcome::Clean);
    }
}

/// The end of a response is queued in the server when the task of its stream ends, although no body is left: a head
/// without a body, or the end of a stream. Nothing counts the request, so the service has long been closing.
async fn lost_over_http2(layered: bool, head_only: bool) {
    let graceful = graceful();
    let (tcp, address) = listener().await;
    let handles = Arc::new(Notify::new());
    let begun = Arc::clone(&handles);
    let no_content = async move || {
        begun.notify_one();
        time::sleep(Duration::from_secs(3)).await;
        StatusCode::NO_CONTENT
    };
    let begun = Arc::clone(&handles);
    let stream = async move || {
        begun.notify_one();
        let pieces = stream::iter([0, 1500, 1500]).then(|delay| async move {
            time::sleep(Duration::from_millis(delay)).await;
            Ok::<_, io::Error>("piece")
        });
        let end = stream::once(time::sleep(Duration::from_millis(1500)));
        Body::from_stream(pieces.chain(end.filter_map(|()| async { None })))
    };
    let slow = if head_only {
        get(no_content)
    } else {
        get(stream)
    };
    let mut app = Router::new().route("/slow", slow);
    if layered {
        app = app.layer(graceful.layer());
    }
    let server = tokio::spawn(graceful.serve(tcp, app).into_future());
    let io = TokioIo::new(TcpStream::connect(address).await.unwrap());
    let handshake = http2::handshake(TokioExecutor::new(), io).await;
    let (mut client, connection) = handshake.unwrap();
    tokio::spawn(connection);
    let request = Request::get("http://test/slow").body(Empty::<Bytes>::new());
    let answer = tokio::spawn(async move {
        let response = client.send_request(request.unwrap()).await?;
        response.into_body().collect().await
    });
    time::timeout(BOUND, handles.notified()).await.unwrap();
    graceful.shutdown();
    let answer = answer.await.unwrap().map(Collected::to_bytes);
    let report = server.await.unwrap();
    assert!(answer.is_ok(), "{answer:?}, {report}");
    assert_eq!(report.outcome(), Outcome::Clean, "{report}");
}

#[tokio::test]
async fn serve_loses_no_end_of_an_exempt_response_over_http2() {
    tokio::join!(lost_over_http2(true, true), lost_over_http2(true, false));
}

#[tokio::test]
async fn serve_without_a_layer_loses_no_end_of_a_response_over_http2() {
    tokio::join!(lost_over_http2(false, true), lost_over_http2(false, false));
}

async fn closed(graceful: &Graceful) {
    wait_for("its connection has closed", || graceful.connections() == 0).await;
}

/// Sends a message, and drops the socket: at once, or when draining begins.
fn push(upgrade: WebSocketUpgrade, graceful: Graceful, at_once: bool) -> Response {
    let hold = graceful.hold("push");
    upgrade.on_upgrade(move |mut socket| async move {
        socket.send(Message::from("pushed")).await.unwrap();
        if !at_once {
            graceful.draining().await;
        }
        drop(socket);
        drop(hold);
    })
}

async fn end(client: &mut TcpStream) -> io::Result<usize> {
    time::timeout(BOUND, client.read(&mut [0])).await.unwrap()
}

/// Opens a WebSocket, and reads until the message `pushed`.
async fn open_websocket(address: SocketAddr) -> TcpStream {
    let mut client = TcpStream::connect(address).await.unwrap();
    let request = b"GET / HTTP/1.1\r\nhost: test\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
        sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    client.write_all(request).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"pushed") {
        let read = time::timeout(BOUND, client.read_buf(&mut answer)).await;
        assert!(read.unwrap().unwrap() > 0);
    }
    client
}

#[derive(Clone, Copy, Debug)]
enum Server {
    Serve,
    /// With a handshake, which makes another IO of the accepted one.
    Handshake,
    Axum,
}

/// The client of a WebSocket may send at any time. A reset would destroy the last message.
/// Whether the connection of a WebSocket that its handler has dropped is open until its client has closed it. It
/// is not, if the client does not run for 250 ms.
async fn is_open_until_its_client_has_closed_it(server: Server, at_once: bool) -> bool {
    let case = format!("{server:?}, at once: {at_once}");
    let graceful = graceful();
    let (tcp, address) = listener().await;
    let in_handler = graceful.clone();
    let handler = move |upgrade| ready(push(upgrade, in_handler, at_once));
    let app = Router::new().route("/", get(handler));
    let run = match server {
        Server::Serve => tokio::spawn(graceful.serve(tcp, app).into_future()),
        Server::Handshake => {
            let listener = graceful
                .listener(tcp)
                .handshakes(Duration::from_secs(10), async |io| Ok::<_, io::Error>(io));
            tokio::spawn(graceful.serve(listener, app).into_future())
        }
        Server::Axum => {
            let server =
                axum::serve(graceful.listener(tcp), app).with_graceful_shutdown(graceful.drain());
            let graceful = graceful.clone();
            tokio::spawn(async move { graceful.run(server.into_future()).await })
        }
    };
    let mut client = open_websocket(address).await;
    if !at_once {
        graceful.shutdown();
    }
    // Its handler has dropped it.
    let end = end(&mut client).await;
    assert!(matches!(end, Ok(0)), "{case}: {end:?}");
    if graceful.connections() == 0 {
        return false;
    }
    client.write_all(b"\x81\x80mask").await.unwrap();
    client.shutdown().await.unwrap();
    closed(&graceful).await;
    let reset = client.take_error().unwrap();
    assert!(reset.is_none(), "{case}: {reset:?}");
    graceful.shutdown();
    let report = time::timeout(BOUND, run).await.unwrap().unwrap();
    assert_eq!(report.outcome(), Outcome::Clean, "{case}: {report}");
    true
}

#[tokio::test]
async fn a_websocket_whose_client_has_sent_nothing_is_open_until_its_client_has_closed_it() {
    for server in [Server::Serve, Server::Handshake, Server::Axum] {
        for at_once in [true, false] {
            let mut is_open = false;
            // More than once on a machine that stalls.
            for _ in 0..3 {
                is_open = is_open || is_open_until_its_client_has_closed_it(server, at_once).await;
            }
            assert!(is_open, "{server:?}, at once: {at_once}");
        }
    }
}

/// Only a connection from which no task has read counts as reset in the queue. The handler of a WebSocket may
/// never read, but the server has read its request.
#[tokio::test]
async fn a_websocket_that_is_not_read_is_not_counted_with_the_queue() {
    let graceful = graceful();
    let (tcp, address) = listener().await;
    let draining = graceful.clone();
    let app = Router::new().route(
        "/",
        get(move |upgrade: WebSocketUpgrade| async move {
            upgrade.on_upgrade(async move |mut socket| {
                socket.send(Message::from("pushed")).await.unwrap();
                draining.draining().await;
                // If it counted as unread, it would be told to close after one second, and to expire after two.
                time::sleep(Duration::from_millis(1500)).await;
                drop(socket);
            })
        }),
    );
    let server = tokio::spawn(graceful.serve(tcp, app).into_future());
    let mut client = open_websocket(address).await;
    client.write_all(b"\x81\x80mask").await.unwrap();
    graceful.shutdown();
    let end = end(&mut client).await;
    assert!(matches!(end, Ok(0)), "{end:?}");
    drop(client);
    let report = time::timeout(BOUND, server).await.unwrap().unwrap();
    assert_eq!(report.remaining().queued, 0, "{report}");
    assert_eq!(report.outcome(), Outcome::Clean, "{report}");
}

/// Bytes of the peer are in the socket when the server drops the connection, and the runtime does not tell: it has
/// not asked the operating system since, or the task has used up its budget.
#[tokio::test]
async fn a_connection_whose_peer_has_just_sent_something_is_not_reset() {
    for budget in [true, false] {
        let graceful = graceful();
        let (tcp, address) = listener().await;
        let mut client = std::net::TcpStream::connect(address).unwrap();
        let (server, _) = tcp.accept().await.unwrap();
        let mut io = graceful.track(server);
        let request = b"GET / HTTP/1.1\r\nhost: test\r\n\r\n";
        client.write_all(request).unwrap();
        client.set_read_timeout(Some(BOUND)).unwrap();
        let mut read = [0; 30];
        let whole = time::timeout(BOUND, io.read_exact(&mut read)).await;
        whole.unwrap().unwrap();
        let nothing = time::timeout(Duration::from_millis(20), io.read(&mut [0])).await;
        assert!(nothing.is_err());
        io.write_all(b"HTTP/1.1 204 No Content\r\n\r\n")
            .await
            .unwrap();
        // The client has received it.
        client.read_exact(&mut [0; 27]).unwrap();
        client.write_all(request).unwrap();
        if !budget {
            time::sleep(Duration::from_millis(20)).await;
            while task::coop::has_budget_remaining() {
                let _ = task::consume_budget().now_or_never();
            }
        }
        drop(io);
        assert_eq!(graceful.connections(), 1, "budget: {budget}");
        client.set_nonblocking(true).unwrap();
        let mut client = TcpStream::from_std(client).unwrap();
        let end = end(&mut client).await;
        assert!(matches!(end, Ok(0)), "budget: {budget}, {end:?}");
        client.shutdown().await.unwrap();
        closed(&graceful).await;
        let reset = client.take_error().unwrap();
        assert!(reset.is_none(), "budget: {budget}, {reset:?}");
    }
}

/// As above, and the client resets the connection. The first call that sees the error takes it from the socket, and the
/// next one would see the end of the stream, as of a client that waits for its response.
#[tokio::test]
async fn a_reset_is_not_taken_for_a_client_that_has_closed_its_writing_side() {
    let graceful = Graceful::builder()
        .drain_delay(Duration::ZERO)
        .keep_listening(false)
        .build()
        .unwrap();
    let (tcp, address) = listener().await;
    let client = std::net::TcpStream::connect(address).unwrap();
    let (server, _) = tcp.accept().await.unwrap();
    let mut io = graceful.track(server);
    let _hold = graceful.hold("a request");
    graceful.shutdown();
    assert_eq!(graceful.phase(), Phase::Draining);
    let nothing = time::timeout(Duration::from_millis(20), io.read(&mut [0])).await;
    assert!(nothing.is_err());
    while task::coop::has_budget_remaining() {
        let _ = task::consume_budget().now_or_never();
    }
    let linger = socket2::SockRef::from(&client);
    linger.set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    let read = match io.read(&mut [0]).now_or_never() {
        Some(read) => read,
        None => time::timeout(BOUND, io.read(&mut [0])).await.unwrap(),
    };
    let kind = read.map_err(|error| error.kind());
    assert_eq!(kind, Err(io::ErrorKind::ConnectionReset));
}

/// The task of the connection ends by the panic, and the response before it is still on its way.
#[tokio::test]
async fn a_handler_that_panics_takes_nothing_from_the_response_before_its_request() {
    const BODY: usize = 200_000;
    let graceful = graceful();
    let called = Arc::new(Notify::new());
    let calls = Arc::clone(&called);
    let panics = async move || -> () {
        calls.notify_one();
        resume_unwind(Box::new("a handler that panics"))
    };
    let (tcp, address) = listener().await;
    let app = Router::new()
        .route("/big", get(|| async { vec![b'x'; BODY] }))
        .route("/panics", get(panics))
        .layer(graceful.layer());
    let server = tokio::spawn(graceful.serve(tcp, app).into_future());
    let mut client = connect_with_little_room(address).await;
    let ask = async |client: &mut TcpStream, path: &str| {
        let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n");
        client.write_all(request.as_bytes()).await.unwrap();
    };
    ask(&mut client, "/big").await;
    ask(&mut client, "/panics").await;
    // The rest of its poll, which drops the connection, comes before this task runs.
    time::timeout(BOUND, called.notified()).await.unwrap();
    ask(&mut client, "/big").await;
    let mut response = Vec::new();
    let read = time::timeout(BOUND, client.read_to_end(&mut response)).await;
    read.unwrap().unwrap();
    assert!(
        response.ends_with(&vec![b'x'; BODY]),
        "{} bytes",
        response.len()
    );
    drop(client);
    graceful.shutdown();
    let report = time::timeout(BOUND, server).await.unwrap().unwrap();
    assert_eq!(report.outcome(), Outcome::Clean, "{report}");
}

const GET: &[u8] = b"GET / HTTP/1.1\r\nhost: test\r\n\r\n";
const GET_CLOSE: &[u8] = b"GET / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n";
/// As Java's `HttpClient` sends it.
const H2C: &[u8] = b"GET / HTTP/1.1\r\nhost: test\r\nconnection: upgrade, http2-settings\r\n\
    upgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n\r\n";
const H2C_CLOSE: &[u8] =
    b"GET / HTTP/1.1\r\nhost: test\r\nconnection: upgrade, close\r\nupgrade: h2c\r\n\r\n";

/// A client receives the rest of a response that was blocked, although it has closed its writing side (after a
/// `GET`) or the service closes its connections.
async fn the_rest_is_received<L>(
    own: bool,
    stops: bool,
    request: &[u8],
    listener: impl FnOnce(&Graceful, Pipes) -> L,
) where
    L: Listener<Addr = ()>,
{
    const BODY: usize = 10_000;
    let graceful = graceful();
    let called = Arc::new(Notify::new());
    let calls = Arc::clone(&called);
    let handler = get(async move || {
        calls.notify_one();
        vec![b'x'; BODY]
    });
    let app = Router::new().route("/", handler).layer(graceful.layer());
    let (pipes, accepted) = mpsc::unbounded_channel();
    let listener = listener(&graceful, Pipes(accepted));
    let server = if own {
        tokio::spawn(graceful.serve(listener, app).into_future())
    } else {
        let server = axum::serve(listener, app);
        tokio::spawn(graceful.run(server.with_graceful_shutdown(graceful.drain())))
    };
    let (mut client, pipe) = duplex(1_000);
    pipes.send(pipe).unwrap();
    client.write_all(request).await.unwrap();
    called.notified().await;
    while graceful.in_flight() > 0 {
        task::yield_now().await;
    }
    if stops {
        graceful.shutdown();
    }
    if request == GET {
        client.shutdown().await.unwrap();
    }
    // Until every task waits.
    time::sleep(Duration::from_secs(1)).await;
    let mut response = Vec::new();
    let read = time::timeout(BOUND, client.read_to_end(&mut response)).await;
    read.unwrap().unwrap();
    let whole = response.ends_with(&vec![b'x'; BODY]);
    assert!(
        whole,
        "own: {own}, stops: {stops}, {} bytes",
        response.len()
    );
    closed(&graceful).await;
    graceful.shutdown();
    let report = time::timeout(BOUND, server).await.unwrap().unwrap();
    assert_eq!(report.outcome(), Outcome::Clean, "{report}");
}

const FORMS: [(bool, bool); 4] = [(true, false), (true, true), (false, false), (false, true)];

/// hyper would drop the rest of the response if it read the end of what the client sends, although the request has
/// finished.
#[tokio::test(start_paused = true)]
async fn a_client_that_closes_its_writing_side_while_a_write_is_blocked_receives_the_rest() {
    for (own, stops) in FORMS {
        the_rest_is_received(own, stops, GET, |graceful, pipes| graceful.listener(pipes)).await;
    }
}

/// A server of its own protocol may wait for the end although its client does not read.
#[tokio::test(start_paused = true)]
async fn a_client_of_another_protocol_that_closes_its_writing_side_is_heard_while_a_write_is_blocked()
 {
    for greeting in [&b""[..], b"+hello", b"CONNECT a:1 HTTP/1.1\r\n\r\n"] {
        let graceful = graceful();
        let (mut client, pipe) = duplex(100);
        let mut io = graceful.track(pipe);
        client.write_all(greeting).await.unwrap();
        io.read_exact(&mut vec![0; greeting.len()]).await.unwrap();
        client.shutdown().await.unwrap();
        let write = io.write_all(&[b'x'; 200]).now_or_never();
        assert!(write.is_none());
        let read = io.read(&mut [0]).now_or_never();
        assert!(matches!(read, Some(Ok(0))), "{read:?}: {greeting:?}");
    }
}

/// A listener with a handshake, after which writes are buffered.
fn buffered<L, I>(tracked: L, capacity: usize) -> impl Listener<Addr = L::Addr>
where
    L: HandshakeExt<I, Addr: 'static>,
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    tracked.handshakes(BOUND, move |io| {
        ready(Ok::<_, io::Error>(BufWriter::with_capacity(capacity, io)))
    })
}

/// TLS and other IO with a buffer takes all bytes at once.
#[tokio::test(start_paused = true)]
async fn a_client_that_closes_its_writing_side_while_a_flush_is_blocked_receives_the_rest() {
    for (own, stops) in FORMS {
        the_rest_is_received(own, stops, GET, |graceful, pipes| {
            buffered(graceful.listener(pipes), 1 << 16)
        })
        .await;
    }
}

/// hyper takes such a connection for one that is being upgraded, if it is told to close it.
#[tokio::test(start_paused = true)]
async fn a_client_that_offers_an_upgrade_receives_the_whole_response_at_a_stop() {
    for request in [H2C, H2C_CLOSE] {
        for own in [true, false] {
            the_rest_is_received(own, true, request, |graceful, pipes| {
                graceful.listener(pipes)
            })
            .await;
        }
    }
}

/// Without `keep_listening` axum's server is told to close when the delay is over. A client that does not read then
/// loses the rest, and that is in the report.
#[tokio::test(start_paused = true)]
async fn a_response_that_axum_drops_because_its_client_offers_an_upgrade_is_reported() {
    for request in [H2C_CLOSE, GET_CLOSE] {
        is_reported_if_axum_drops_it(request, |graceful, pipes| graceful.listener(pipes)).await;
        is_reported_if_axum_drops_it(request, |graceful, pipes| {
            buffered(graceful.listener(pipes), 100)
        })
        .await;
    }
}

async fn is_reported_if_axum_drops_it<L: Listener<Addr = ()>>(
    request: &[u8],
    listener: impl FnOnce(&Graceful, Pipes) -> L,
) {
    let graceful = Graceful::builder()
        .drain_delay(Duration::ZERO)
        .keep_listening(false)
        .build()
        .unwrap();
    let handler = get(|| async { vec![b'x'; 10_000] });
    let app = Router::new().route("/", handler).layer(graceful.layer());
    let (pipes, accepted) = mpsc::unbounded_channel();
    let server = axum::serve(listener(&graceful, Pipes(accepted)), app);
    let server = server.with_graceful_shutdown(graceful.drain());
    let server = tokio::spawn(graceful.run(server));
    let (mut client, pipe) = duplex(1_000);
    pipes.send(pipe).unwrap();
    client.write_all(request).await.unwrap();
    client.read_exact(&mut [0]).await.unwrap();
    graceful.shutdown();
    time::sleep(Duration::from_secs(3)).await;
    let mut response = Vec::new();
    let read = time::timeout(BOUND, client.read_to_end(&mut response)).await;
    read.unwrap().unwrap();
    let is_whole = response.ends_with(&vec![b'x'; 10_000]);
    let report = time::timeout(BOUND, server).await.unwrap().unwrap();
    assert_eq!(report.outcome() == Outcome::Clean, is_whole, "{report}");
    assert_eq!(is_whole, request == GET_CLOSE, "{report}");
    let lost = usize::from(!is_whole);
    assert_eq!(report.remaining().connections, lost, "{report}");
}

/// The socket is below the handshake, so another IO than the one that is torn has it.
#[tokio::test]
async fn a_response_that_axum_drops_above_a_handshake_is_reported_once() {
    let graceful = Graceful::builder()
        .drain_delay(Duration::ZERO)
        .drain_timeout(Duration::from_secs(5))
        .keep_listening(false)
        .build()
        .unwrap();
    let handler = get(|| async { vec![b'x'; 15_000] });
    let app = Router::new().route("/", handler).layer(graceful.layer());
    let tcp = TcpSocket::new_v4().unwrap();
    tcp.set_send_buffer_size(1).unwrap();
    tcp.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let tcp = tcp.listen(1).unwrap();
    let client = TcpSocket::new_v4().unwrap();
    client.set_recv_buffer_size(1).unwrap();
    let client = client.connect(tcp.local_addr().unwrap());
    let mut client = client.await.unwrap();
    let listener = buffered(graceful.listener(tcp), 100);
    let server = axum::serve(listener, app).with_graceful_shutdown(graceful.drain());
    let server = tokio::spawn(graceful.run(server));
    client.write_all(H2C_CLOSE).await.unwrap();
    client.read_exact(&mut [0]).await.unwrap();
    graceful.shutdown();
    let report = time::timeout(BOUND, server).await.unwrap().unwrap();
    assert_eq!(report.outcome(), Outcome::Forced, "{report}");
    assert_eq!(report.remaining().connections, 1, "{report}");
    assert!(report.connections_cut().is_empty(), "{report}");
}

/// What a test of `serve` needs that has a delay, does not keep listening, and has one client.
async fn served_until_the_delay_is_over(
    handler: impl FnOnce(&Graceful) -> MethodRouter,
) -> (Graceful, DuplexStream, task::JoinHandle<Report>) {
    let graceful = Graceful::builder()
        .drain_delay(Duration::from_secs(1))
        .keep_listening(false)
        .build()
        .unwrap();
    let app = Router::new()
        .route("/", handler(&graceful))
        .layer(graceful.layer());
    let (pipes, accepted) = mpsc::unbounded_channel();
    let server = tokio::spawn(graceful.serve(Pipes(accepted), app).into_future());
    let (client, pipe) = duplex(1_000);
    pipes.send(pipe).unwrap();
    // The server has accepted it.
    wait_for("a connection", || graceful.connections() == 1).await;
    (graceful, client, server)
}

async fn read_until(client: &mut DuplexStream, end: &str) -> String {
    let mut read = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&read);
        if let Some((before, _)) = text.split_once(end) {
            return before.to_owned();
        }
        let more = time::timeout(BOUND, client.read_buf(&mut read)).await;
        assert_ne!(more.unwrap().unwrap(), 0, "{}", read.escape_ascii());
    }
}

/// `held`: by a task that holds the drain. The report of a stop that cuts the upload is not `Clean`.
async fn read_on_after_the_response(held: bool) {
    let (sender, mut received) = mpsc::unbounded_channel();
    let handler = |graceful: &Graceful| {
        let graceful = graceful.clone();
        post(async move |body: Body| {
            let reading = async move {
                let bytes = axum::body::to_bytes(body, 100).await;
                let bytes = bytes.map_err(|error| error.to_string());
                sender.send(bytes).unwrap();
            };
            if held {
                drop(graceful.spawn("upload", reading));
            } else {
                tokio::spawn(reading);
            }
            "taken"
        })
    };
    let (graceful, mut client, server) = served_until_the_delay_is_over(handler).await;
    graceful.shutdown();
    client
        .write_all(b"POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 10\r\n\r\nfirst")
        .await
        .unwrap();
    read_until(&mut client, "taken").await;
    time::sleep(Duration::from_secs(5)).await;
    client.write_all(b"other").await.unwrap();
    let bytes = time::timeout(BOUND, received.recv()).await.unwrap();
    assert_eq!(bytes, Some(Ok(Bytes::from_static(b"firstother"))));
    let report = time::timeout(BOUND, server).await.unwrap().unwrap();
    assert_eq!(report.outcome(), Outcome::Clean, "{report}");
}

#[tokio::test(start_paused = true)]
async fn an_upload_that_is_read_on_after_its_response_is_received_whole() {
    for held in [true, false] {
        read_on_after_the_response(held).await;
    }
}

/// The clock is the real one, because the connection has a socket.
#[tokio::test]
async fn an_http2_upload_that_is_read_on_by_a_task_that_nothing_counts_is_received_whole() {
    let graceful = graceful();
    let (tcp, address) = listener().await;
    let (sender, mut received) = mpsc::unbounded_channel();
    let handler = post(async move |body: Body| {
        tokio::spawn(async move {
            let bytes = axum::body::to_bytes(body, 100).await;
            sender
                .send(bytes.map_err(|error| error.to_string()))
                .unwrap();
        });
    });
    let app = Router::new().route("/", handler).layer(graceful.layer());
    let server = tokio::spawn(graceful.serve(tcp, app).into_future());
    let io = TokioIo::new(TcpStream::connect(address).await.unwrap());
    let handshake = http2::handshake(TokioExecutor::new(), io).await;
    let (mut client, connection) = handshake.unwrap();
    tokio::spawn(connection);
    let (upload, pieces) = mpsc::unbounded_channel::<Result<Bytes, io::Error>>();
    let pieces = stream::unfold(pieces, async |mut pieces| {
        Some((pieces.recv().await?, pieces))
    });
    let request = Request::post("http://test/").body(Body::from_stream(pieces));
    upload.send(Ok(Bytes::from_static(b"first"))).unwrap();
    let response = client.send_request(request.unwrap()).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    graceful.shutdown();
    time::sleep(Duration::from_secs(3)).await;
    upload.send(Ok(Bytes::from_static(b"other"))).unwrap();
    drop(upload);
    let bytes = time::timeout(BOUND, received.recv()).await.unwrap();
    assert_eq!(bytes, Some(Ok(Bytes::from_static(b"firstother"))));
    let report = time::timeout(BOUND, server).await.unwrap().unwrap();
    assert_eq!(report.outcome(), Outcome::Clean, "{report}");
}

/// hyper has read the second request while the first response was blocked.
#[tokio::test(start_paused = true)]
async fn a_pipelined_request_is_answered_although_the_service_closes_its_connections() {
    let handler = |_: &Graceful| get(|| async { vec![b'x'; 10_000] });
    let (graceful, mut client, server) = served_until_the_delay_is_over(handler).await;
    client.write_all(&[GET, GET].concat()).await.unwrap();
    let mut responses = vec![0];
    let begun = time::timeout(BOUND, client.read_exact(&mut responses)).await;
    begun.unwrap().unwrap();
    graceful.shutdown();
    time::sleep(Duration::from_secs(2)).await;
    let read = time::timeout(BOUND, client.read_to_end(&mut responses)).await;
    read.unwrap().unwrap();
    let responses = String::from_utf8(responses).unwrap();
    let (first, second) = responses.split_once("xHTTP/1.1 ").unwrap();
    assert!(first.ends_with(&"x".repeat(9_999)), "{} bytes", first.len());
    assert!(second.starts_with("503"), "{second}");
    let report = time::timeout(BOUND, server).await.unwrap().unwrap();
    assert_eq!(report.outcome(), Outcome::Clean, "{report}");
}

/// Its `Connection` field says `upgrade`, and nothing else: a client may refuse it otherwise.
#[tokio::test(start_paused = true)]
async fn an_upgrade_that_is_accepted_while_connections_close_is_whole() {
    let accepts = Arc::new(Notify::new());
    let accepted = Arc::clone(&accepts);
    let handler = |_: &Graceful| {
        get(async move |upgrade: WebSocketUpgrade| {
            accepted.notified().await;
            upgrade.on_upgrade(async |mut socket| {
                socket.send(Message::text("hello")).await.unwrap();
            })
        })
    };
    let (graceful, mut client, server) = served_until_the_delay_is_over(handler).await;
    client
        .write_all(
            b"GET / HTTP/1.1\r\nhost: test\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
            sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        )
        .await
        .unwrap();
    time::sleep(Duration::from_millis(10)).await;
    graceful.shutdown();
    time::sleep(Duration::from_secs(2)).await;
    accepts.notify_one();
    let head = read_until(&mut client, "\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    assert!(!head.contains("close"), "{head}");
    drop(client);
    let report = time::timeout(BOUND, server).await.unwrap().unwrap();
    assert_eq!(report.outcome(), Outcome::Clean, "{report}");
}

/// While axum's server waits for such a client until shortly before the drain deadline, other connections are idle.
#[tokio::test(start_paused = true)]
async fn a_client_that_offers_an_upgrade_and_does_not_read_keeps_no_other_connection_open() {
    let graceful = graceful();
    let handler = get(|| async { vec![b'x'; 10_000] });
    let app = Router::new()
        .route("/", handler)
        .route("/small", get(|| async { "small" }))
        .layer(graceful.layer());
    let (pipes, accepted) = mpsc::unbounded_channel();
    let server = axum::serve(graceful.listener(Pipes(accepted)), app);
    let server = tokio::spawn(graceful.run(server.with_graceful_shutdown(graceful.drain())));
    let [(mut blocked, one), (mut idle, other)] = [(); 2].map(|()| duplex(1_000));
    pipes.send(one).unwrap();
    pipes.send(other).unwrap();
    blocked.write_all(H2C_CLOSE).await.unwrap();
    read_until(&mut blocked, "\r\n").await;
    let small = b"GET /small HTTP/1.1\r\nhost: test\r\n\r\n";
    idle.write_all(small).await.unwrap();
    read_until(&mut idle, "small").await;
    graceful.shutdown();
    let report = time::timeout(BOUND * 10, server).await.unwrap().unwrap();
    assert_eq!(report.remaining().connections, 1, "{report}");
    let end = time::timeout(BOUND, idle.read(&mut [0])).await;
    assert_eq!(end.unwrap().unwrap(), 0);
}

/// The client acknowledges nothing from now on.
#[cfg(target_os = "linux")]
fn vanish(client: &TcpStream) {
    const RETURN: u16 = 0x06;

    let discard = [socket2::SockFilter::new(RETURN, 0, 0, 0)];
    let client = socket2::SockRef::from(client);
    client.attach_filter(&discard).unwrap();
}

/// The report of a stop during which a client sends a request and vanishes.
#[cfg(target_os = "linux")]
async fn given_up(own: bool, after: Duration, request: &[u8], bytes: usize) -> Report {
    let graceful = graceful();
    let called = Arc::new(Notify::new());
    let (calls, stops) = (Arc::clone(&called), graceful.clone());
    let handler = get(async move || {
        calls.notify_one();
        stops.draining().await;
        vec![b'x'; bytes]
    });
    let app = Router::new().route("/", handler).layer(graceful.layer());
    let (tcp, address) = listener().await;
    let listener = graceful.listener(tcp).tap_io(move |io| {
        let socket = socket2::SockRef::from(io.get_ref());
        socket.set_tcp_user_timeout(Some(after)).unwrap();
    });
    let server = if own {
        tokio::spawn(graceful.serve(listener, app).into_future())
    } else {
        let server = axum::serve(listener, app).with_graceful_shutdown(graceful.drain());
        tokio::spawn(graceful.run(server))
    };
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(request).await.unwrap();
    time::timeout(BOUND, called.notified()).await.unwrap();
    vanish(&client);
    graceful.shutdown();
    let report = time::timeout(BOUND, server).await.unwrap().unwrap();
    drop(client);
    report
}

/// The kernel does so after the time set by `TCP_USER_TIMEOUT`.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_response_whose_client_the_kernel_gives_up_is_cut() {
    const GET: &[u8] = b"GET / HTTP/1.1\r\nhost: test\r\n\r\n";
    // A request for `http://test/`, which ends its stream.
    const GET_OVER_HTTP2: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\
        \0\0\0\x04\0\0\0\0\0\
        \0\0\x09\x01\x05\0\0\0\x01\x82\x86\x84\x01\x04test";
    let mut runs = Vec::new();
    for own in [true, false] {
        // Before connections expire, and after that.
        for after in [500, 2500] {
            for (request, bytes) in [
                (GET, 1_000),
                // More than the socket has room for.
                (GET, 20_000_000),
                (GET_OVER_HTTP2, 1_000),
            ] {
                runs.push(async move {
                    let report = given_up(own, Duration::from_millis(after), request, bytes).await;
                    let lost = (report.requests().cut, report.remaining().connections);
                    assert_eq!(lost, (1, 1), "{own} {after} {bytes}: {report}");
                });
            }
        }
    }
    join_all(runs).await;
}
