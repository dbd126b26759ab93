//! `serve` accepts the same apps and listeners as axum's `serve`.

#![cfg(all(feature = "axum", feature = "signal"))]

mod pipes;
mod tcp;
mod waits;
mod wakers;

use std::{
    convert::Infallible,
    fmt::Debug,
    future::IntoFuture,
    io,
    net::SocketAddr,
    panic::resume_unwind,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::{ConnectInfo, Request, connect_info::Connected},
    handler::{Handler, HandlerWithoutStateExt},
    http::header,
    response::Response,
    routing::get,
    serve::{Listener, ListenerExt},
};
use futures_util::{StreamExt, stream};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, duplex},
    net::{TcpListener, TcpStream},
    sync::{Notify, mpsc},
    task::{self, JoinHandle},
    time,
};
use tower::service_fn;
use tower_graceful::{Accepted, Graceful, Outcome, Phase, Report};
use tower_service::Service;

use crate::{
    pipes::Pipes,
    tcp::listener,
    waits::{BOUND, wait_for},
};

fn graceful() -> Graceful {
    let builder = Graceful::builder().drain_delay(Duration::ZERO);
    builder.build().unwrap()
}

async fn ask(mut io: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin) -> String {
    io.write_all(b"GET / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut answer = String::new();
    io.read_to_string(&mut answer).await.unwrap();
    answer
}

/// Serves, asks once over TCP, stops. Returns the body of the answer.
async fn served<L, M, S>(listener: L, address: SocketAddr, app: M) -> String
where
    L: Listener,
    M: for<'a> Service<Accepted<'a, L>, Error = Infallible, Response = S> + Send + 'static,
    for<'a> <M as Service<Accepted<'a, L>>>::Future: Send,
    S: Service<Request, Response = Response, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    let graceful = graceful();
    let server = tokio::spawn(graceful.serve(listener, app).into_future());
    let answer = time::timeout(BOUND, ask(TcpStream::connect(address).await.unwrap()));
    let answer = answer.await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    stop(&graceful, server).await;
    answer.split_once("\r\n\r\n").unwrap().1.to_owned()
}

async fn stop(graceful: &Graceful, server: JoinHandle<Report>) {
    graceful.shutdown();
    let report = time::timeout(BOUND, server).await.unwrap().unwrap();
    assert_eq!(report.outcome(), Outcome::Clean, "{report}");
    assert_eq!(graceful.connections(), 0);
}

async fn hello() -> &'static str {
    "hello"
}

fn router() -> Router {
    Router::new().route("/", get(hello))
}

#[tokio::test]
async fn routers_handlers_and_make_services_are_served() {
    let (tcp, address) = listener().await;
    assert_eq!(served(tcp, address, router()).await, "hello");
    let (tcp, address) = listener().await;
    let app = router().into_make_service();
    assert_eq!(served(tcp, address, app).await, "hello");
    let (tcp, address) = listener().await;
    assert_eq!(served(tcp, address, get(hello)).await, "hello");
    let (tcp, address) = listener().await;
    let app = get(hello).into_make_service();
    assert_eq!(served(tcp, address, app).await, "hello");
    let (tcp, address) = listener().await;
    let app = hello.into_service();
    assert_eq!(served(tcp, address, app).await, "hello");
    let (tcp, address) = listener().await;
    let app = hello.into_make_service();
    assert_eq!(served(tcp, address, app).await, "hello");
    let (tcp, address) = listener().await;
    let app = hello.with_state(());
    assert_eq!(served(tcp, address, app).await, "hello");
}

#[tokio::test]
async fn a_make_service_of_ones_own_is_called_for_each_connection() {
    let (tcp, address) = listener().await;
    let app = service_fn(|accepted: Accepted<'_, TcpListener>| {
        let peer = accepted.remote_addr().ip().to_string();
        async move { Ok::<_, Infallible>(Router::new().route("/", get(|| async { peer }))) }
    });
    assert_eq!(served(tcp, address, app).await, "127.0.0.1");
}

async fn peer(ConnectInfo(peer): ConnectInfo<SocketAddr>) -> String {
    peer.ip().to_string()
}

#[tokio::test]
async fn connect_info_is_the_peers_address() {
    let (tcp, address) = listener().await;
    let app = Router::new().route("/", get(peer));
    let app = app.into_make_service_with_connect_info::<SocketAddr>();
    assert_eq!(served(tcp, address, app).await, "127.0.0.1");
    let (tcp, address) = listener().await;
    let app = get(peer).into_make_service_with_connect_info::<SocketAddr>();
    assert_eq!(served(tcp, address, app).await, "127.0.0.1");
    let (tcp, address) = listener().await;
    let app = peer.into_make_service_with_connect_info::<SocketAddr>();
    let tapped = tcp.tap_io(|tcp| tcp.set_nodelay(true).unwrap());
    assert_eq!(served(tapped, address, app).await, "127.0.0.1");
}

#[derive(Clone)]
struct NoDelay(bool);

impl<L: Listener<Io = TcpStream>> Connected<Accepted<'_, L>> for NoDelay {
    fn connect_info(accepted: Accepted<'_, L>) -> Self {
        Self(accepted.io().nodelay().unwrap())
    }
}

#[tokio::test]
async fn connect_info_of_ones_own_sees_the_io() {
    let (tcp, address) = listener().await;
    let nodelay =
        |ConnectInfo(NoDelay(nodelay)): ConnectInfo<NoDelay>| async move { nodelay.to_string() };
    let app = Router::new().route("/", get(nodelay));
    let app = app.into_make_service_with_connect_info::<NoDelay>();
    let tapped = tcp.tap_io(|tcp| tcp.set_nodelay(true).unwrap());
    assert_eq!(served(tapped, address, app).await, "true");
}

#[cfg(unix)]
#[tokio::test]
async fn a_unix_listener_is_served() {
    use tokio::net::{UnixListener, UnixStream};

    let path = std::env::temp_dir().join(format!("tower-graceful-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    let graceful = graceful();
    let server = tokio::spawn(graceful.serve(listener, router()).into_future());
    let answer = ask(UnixStream::connect(&path).await.unwrap()).await;
    assert!(answer.ends_with("hello"), "{answer}");
    stop(&graceful, server).await;
    std::fs::remove_file(&path).unwrap();
}

/// A listener that performs a handshake inside of `accept`. If the future of `accept` is dropped in between, the
/// connection is lost.
struct SlowToAccept<L> {
    listener: L,
    handshake: Duration,
}

impl<L: Listener> Listener for SlowToAccept<L> {
    type Io = L::Io;
    type Addr = L::Addr;

    async fn accept(&mut self) -> (L::Io, L::Addr) {
        let accepted = self.listener.accept().await;
        time::sleep(self.handshake).await;
        accepted
    }

    fn local_addr(&self) -> io::Result<L::Addr> {
        self.listener.local_addr()
    }
}

/// Serves with `serve` if `own` is set, and otherwise with axum's server.
fn spawn<L: Listener<Addr: Debug>>(
    own: bool,
    graceful: &Graceful,
    listener: L,
) -> JoinHandle<Report> {
    let app = router().layer(graceful.layer());
    if own {
        return tokio::spawn(graceful.serve(listener, app).into_future());
    }
    let server = axum::serve(graceful.listener(listener), app);
    let server = server.with_graceful_shutdown(graceful.drain());
    tokio::spawn(graceful.run(server))
}

#[tokio::test]
async fn an_accept_that_takes_its_time_is_not_disturbed_by_connections_that_end() {
    let (listener, address) = listener().await;
    let handshake = Duration::from_millis(10);
    let graceful = self::graceful();
    let slow = SlowToAccept {
        listener,
        handshake,
    };
    let server = spawn(true, &graceful, slow);
    let clients = (0..30).map(|i| {
        tokio::spawn(async move {
            time::sleep(Duration::from_millis(7) * i).await;
            ask(TcpStream::connect(address).await.unwrap()).await
        })
    });
    for client in clients.collect::<Vec<_>>() {
        let answer = time::timeout(BOUND, client).await.unwrap().unwrap();
        assert!(answer.ends_with("hello"), "{answer}");
    }
    stop(&graceful, server).await;
}

#[tokio::test(start_paused = true)]
async fn an_accept_that_has_begun_when_the_listener_closes_is_finished() {
    for own in [true, false] {
        let (pipes, accepted) = mpsc::unbounded_channel();
        let handshake = Duration::from_millis(40);
        let graceful = Graceful::builder()
            .drain_delay(Duration::from_millis(100))
            .keep_listening(false)
            .build()
            .unwrap();
        let slow = SlowToAccept {
            listener: Pipes(accepted),
            handshake,
        };
        let server = spawn(own, &graceful, slow);
        // The runtime has one thread, so the listener has been polled after this.
        task::yield_now().await;
        graceful.shutdown();
        time::sleep(Duration::from_millis(85)).await;
        let (client, accepted) = duplex(1_000);
        pipes.send(accepted).unwrap();
        let answer = time::timeout(BOUND, ask(client)).await.unwrap();
        assert!(answer.ends_with("hello"), "own {own}: {answer:?}");
        let report = server.await.unwrap();
        assert_eq!(report.outcome(), Outcome::Clean, "{report}");
    }
}

/// This holds for handlers that the layer does not count too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_handler_outlives_the_server() {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    struct Alive(Arc<AtomicUsize>);

    impl Drop for Alive {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }

    for _ in 0..8 {
        let (tcp, address) = listener().await;
        let alive = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&alive);
        let stuck = move || {
            counted.fetch_add(1, Ordering::SeqCst);
            let alive = Alive(Arc::clone(&counted));
            async move {
                let _alive = alive;
                std::future::pending::<&'static str>().await
            }
        };
        let graceful = Graceful::builder()
            .drain_delay(Duration::ZERO)
            .drain_timeout(Duration::from_millis(100))
            .build()
            .unwrap();
        let app = Router::new().route("/", get(stuck));
        let server = tokio::spawn(graceful.serve(tcp, app).into_future());
        let io = hyper_util::rt::TokioIo::new(TcpStream::connect(address).await.unwrap());
        let executor = hyper_util::rt::TokioExecutor::new();
        let (mut client, connection) = hyper::client::conn::http2::handshake(executor, io)
            .await
            .unwrap();
        tokio::spawn(connection);
        for _ in 0..100 {
            let request = hyper::Request::get(format!("http://{address}/"));
            let request = request.body(axum::body::Body::empty()).unwrap();
            tokio::spawn(client.send_request(request));
        }
        wait_for("all handlers run", || alive.load(Ordering::SeqCst) == 100).await;
        graceful.shutdown();
        let report = time::timeout(BOUND, server).await.unwrap().unwrap();
        assert_eq!(alive.load(Ordering::SeqCst), 0, "{report}");
    }
}

#[tokio::test]
async fn dropping_the_future_closes_the_listener_and_the_connections() {
    let graceful = graceful();
    let (tcp, address) = listener().await;
    let app = router()
        .route("/never", get(std::future::pending::<&'static str>))
        .layer(graceful.layer());
    let server = tokio::spawn(graceful.serve(tcp, app).into_future());
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream
        .write_all(b"GET /never HTTP/1.1\r\nhost: test\r\n\r\n")
        .await
        .unwrap();
    wait_for("the request is read", || graceful.in_flight() == 1).await;
    server.abort();
    wait_for("the request is dropped", || graceful.in_flight() == 0).await;
    let read = time::timeout(BOUND, stream.read(&mut [0])).await.unwrap();
    assert!(!matches!(read, Ok(1..)), "{read:?}");
    let refused = TcpStream::connect(address).await.unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    assert_eq!(graceful.connections(), 0);
}

#[test]
fn the_call_needs_no_runtime() {
    let graceful = graceful();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (tcp, address) = runtime.block_on(listener());
    let server = graceful.serve(tcp, router()).into_future();
    runtime.block_on(async {
        let server = tokio::spawn(server);
        let answer = ask(TcpStream::connect(address).await.unwrap()).await;
        assert!(answer.ends_with("hello"), "{answer}");
        stop(&graceful, server).await;
    });
}

/// Reads until `text` has come.
async fn read_to(io: &mut TcpStream, text: &str) -> String {
    let mut read = Vec::new();
    while !String::from_utf8_lossy(&read).contains(text) {
        let byte = time::timeout(BOUND, io.read_u8()).await.unwrap().unwrap();
        read.push(byte);
    }
    String::from_utf8(read).unwrap()
}

/// Returns what a client reads on a connection after draining has ended its subscription. The client sends
/// `pipelined` on this connection before the stop.
async fn after_a_subscription(kind: &'static str, pipelined: &str) -> String {
    let graceful = graceful();
    let (listener, address) = listener().await;
    let ending = graceful.clone();
    let subscription = move || {
        let news = stream::iter(["news"]).chain(stream::pending());
        let news = ending.until_draining(news.map(Ok::<_, Infallible>));
        let kind = [(header::CONTENT_TYPE, kind)];
        async move { (kind, Body::from_stream(news)) }
    };
    let app = Router::new()
        .route("/", get(subscription))
        .layer(graceful.layer());
    let server = tokio::spawn(graceful.serve(listener, app).into_future());
    let mut subscriber = TcpStream::connect(address).await.unwrap();
    subscriber
        .write_all(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n")
        .await
        .unwrap();
    let head = read_to(&mut subscriber, "news\r\n").await;
    assert!(!head.contains("connection: close"), "{head}");
    subscriber.write_all(pipelined.as_bytes()).await.unwrap();
    let mut idle = TcpStream::connect(address).await.unwrap();
    idle.write_all(b"GET /missing HTTP/1.1\r\nhost: test\r\n\r\n")
        .await
        .unwrap();
    read_to(&mut idle, "\r\n\r\n").await;

    let hold = graceful.hold("so that the drain goes on");
    graceful.shutdown();
    let mut rest = String::new();
    if kind != EVENTS {
        rest += &read_to(&mut subscriber, "0\r\n\r\n").await;
        // The connection stays open, so that the next request gets a 503: a client may not repeat a request that is
        // lost with its connection.
        time::sleep(Duration::from_millis(100)).await;
        rest += &ask(&mut subscriber).await;
    }
    time::timeout(BOUND, subscriber.read_to_string(&mut rest))
        .await
        .expect("the connection is closed")
        .unwrap();
    assert_eq!(graceful.phase(), Phase::Draining);
    // Other connections are not closed early: the next request on them gets a 503.
    let answer = ask(&mut idle).await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    drop(hold);
    let report = time::timeout(BOUND, server).await.unwrap().unwrap();
    assert_eq!(report.outcome(), Outcome::Clean, "{report}");
    rest
}

const EVENTS: &str = "text/event-stream";
const ASKED: &str = "GET / HTTP/1.1\r\nhost: test\r\n\r\n";

/// An `EventSource` that reconnected on the same connection would be refused, and does not reconnect after a refusal.
#[tokio::test]
async fn events_that_end_while_draining_take_their_connection_along() {
    assert_eq!(after_a_subscription(EVENTS, "").await, "0\r\n\r\n");
}

#[tokio::test]
async fn what_has_come_on_that_connection_meanwhile_is_answered() {
    let rest = after_a_subscription(EVENTS, ASKED).await;
    assert!(rest.starts_with("0\r\n\r\nHTTP/1.1 503"), "{rest}");
    assert!(rest.contains("connection: close"), "{rest}");
}

#[tokio::test]
async fn other_responses_leave_their_connection_open() {
    let rest = after_a_subscription("text/plain", "").await;
    assert!(rest.starts_with("0\r\n\r\nHTTP/1.1 503"), "{rest}");
}

#[tokio::test]
async fn a_panic_whose_value_panics_when_it_is_dropped_ends_its_connection_and_no_other() {
    struct PanicsWhenDropped;

    impl Drop for PanicsWhenDropped {
        fn drop(&mut self) {
            resume_unwind(Box::new("the destructor panics"));
        }
    }

    async fn panics() {
        resume_unwind(Box::new(PanicsWhenDropped));
    }

    let graceful = graceful();
    let (tcp, address) = listener().await;
    let app = router().route("/panics", get(panics));
    let server = tokio::spawn(graceful.serve(tcp, app).into_future());
    let mut client = TcpStream::connect(address).await.unwrap();
    client
        .write_all(b"GET /panics HTTP/1.1\r\nhost: test\r\n\r\n")
        .await
        .unwrap();
    let read = time::timeout(BOUND, client.read(&mut [0; 100])).await;
    assert!(!matches!(read.unwrap(), Ok(1..)));
    let answer = ask(TcpStream::connect(address).await.unwrap()).await;
    assert!(answer.ends_with("hello"), "{answer}");
    graceful.shutdown();
    let report = time::timeout(BOUND, server).await.unwrap().unwrap();
    assert_eq!(report.outcome(), Outcome::Clean, "{report}");
}

/// The last connection wakes the server when it ends. If the waker panics while the connection panics, the process
/// aborts.
#[tokio::test(start_paused = true)]
async fn a_waker_that_panics_does_not_abort_the_process_when_a_handler_panics() {
    let graceful = graceful();
    let [begins, panics] = [(); 2].map(|()| Arc::new(Notify::new()));
    let (begun, told) = (Arc::clone(&begins), Arc::clone(&panics));
    let app = get(async move || -> &'static str {
        begun.notify_one();
        told.notified().await;
        resume_unwind(Box::new("a handler that panics"))
    });
    let (ours, mut client) = duplex(1_000);
    let (pipes, accepted) = mpsc::unbounded_channel();
    pipes.send(ours).unwrap();
    let mut server = graceful.serve(Pipes(accepted), app).into_future();
    let mut poll = |waker: &Waker| Pin::new(&mut server).poll(&mut Context::from_waker(waker));
    assert!(poll(Waker::noop()).is_pending());
    client.write_all(ASKED.as_bytes()).await.unwrap();
    begins.notified().await;
    // Without the layer nothing is in flight, so the listener closes, and the server waits for its connection.
    graceful.shutdown();
    for _ in 0..100 {
        time::sleep(Duration::from_millis(10)).await;
        assert!(poll(Waker::noop()).is_pending());
    }
    assert_eq!(graceful.phase(), Phase::Closing);
    assert!(poll(&wakers::panicking()).is_pending());
    panics.notify_one();
    assert_eq!(client.read(&mut [0; 100]).await.unwrap(), 0);
    time::sleep(Duration::from_millis(1)).await;
    let Poll::Ready(report) = poll(Waker::noop()) else {
        panic!("it does not end");
    };
    assert_eq!(report.outcome(), Outcome::Clean, "{report}");
}
