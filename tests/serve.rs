//! `serve` takes what axum's own takes.

#![cfg(all(feature = "axum", feature = "signal"))]

use std::{
    convert::Infallible,
    io,
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use axum::{
    Router,
    extract::{ConnectInfo, Request, connect_info::Connected},
    handler::{Handler, HandlerWithoutStateExt},
    response::Response,
    routing::get,
    serve::{Listener, ListenerExt},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time,
};
use tower::service_fn;
use tower_graceful::{Accepted, Graceful, Outcome, Report};
use tower_service::Service;

const BOUND: Duration = Duration::from_secs(10);

fn graceful() -> Graceful {
    let builder = Graceful::builder().drain_delay(Duration::ZERO);
    builder.build().unwrap()
}

async fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
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
    let server = tokio::spawn(graceful.serve(listener, app));
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
    let server = tokio::spawn(graceful.serve(listener, router()));
    let answer = ask(UnixStream::connect(&path).await.unwrap()).await;
    assert!(answer.ends_with("hello"), "{answer}");
    stop(&graceful, server).await;
    std::fs::remove_file(&path).unwrap();
}

#[tokio::test]
async fn dropping_the_future_closes_the_listener_and_the_connections() {
    let graceful = graceful();
    let (tcp, address) = listener().await;
    let app = router()
        .route("/never", get(std::future::pending::<&'static str>))
        .layer(graceful.layer());
    let server = tokio::spawn(graceful.serve(tcp, app));
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream
        .write_all(b"GET /never HTTP/1.1\r\nhost: test\r\n\r\n")
        .await
        .unwrap();
    let until = |in_flight| {
        let graceful = graceful.clone();
        time::timeout(BOUND, async move {
            while graceful.in_flight() != in_flight {
                time::sleep(Duration::from_millis(1)).await;
            }
        })
    };
    until(1).await.unwrap();
    server.abort();
    until(0).await.unwrap();
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
    let server = graceful.serve(tcp, router());
    runtime.block_on(async {
        let server = tokio::spawn(server);
        let answer = ask(TcpStream::connect(address).await.unwrap()).await;
        assert!(answer.ends_with("hello"), "{answer}");
        stop(&graceful, server).await;
    });
}
