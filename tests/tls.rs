//! Handshakes on a tracked listener: TLS with rustls, the PROXY protocol, and peers that violate
//! either of them.

#![cfg(all(feature = "axum", feature = "signal"))]

mod tcp;
mod waits;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{ConnectInfo, connect_info::Connected},
    routing::get,
    serve::{IncomingStream, Listener},
};
use futures_util::{StreamExt, stream};
use http::{Request, Version};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::{TokioExecutor, TokioIo};
use proxy_header::{ParseConfig, ProxiedAddress, ProxyHeader, io::ProxiedStream};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
    time,
};
use tokio_rustls::{
    TlsAcceptor, TlsConnector, client,
    rustls::{
        ClientConfig, RootCertStore, ServerConfig,
        pki_types::{CertificateDer, PrivatePkcs8KeyDer},
    },
    server,
};
use tower_graceful::{
    Accepted, Graceful, GracefulIo, GracefulListener, HandshakeExt, Handshakes, Outcome, Phase,
    Report,
};

use crate::{
    tcp::listener,
    waits::{BOUND, wait_for},
};

/// The timeout of a handshake, longer than any test takes. Tests of the timeout set their own.
const TIMEOUT: Duration = Duration::from_secs(30);

/// What a server and its clients are set up with.
#[derive(Clone)]
struct Certified {
    server: Arc<ServerConfig>,
    certificate: CertificateDer<'static>,
}

fn certified() -> Certified {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let certificate = made.cert.der().clone();
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let mut server = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.clone()], key.into())
        .unwrap();
    server.alpn_protocols = vec![b"h2".into(), b"http/1.1".into()];
    Certified {
        server: Arc::new(server),
        certificate,
    }
}

impl Certified {
    fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(Arc::clone(&self.server))
    }

    async fn over(&self, tcp: TcpStream, alpn: &str) -> io::Result<client::TlsStream<TcpStream>> {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone()).unwrap();
        let mut config = ClientConfig::builder()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![alpn.as_bytes().into()];
        let connector = TlsConnector::from(Arc::new(config));
        connector
            .connect("localhost".try_into().unwrap(), tcp)
            .await
    }

    async fn connect(&self, address: SocketAddr, alpn: &str) -> client::TlsStream<TcpStream> {
        let tcp = TcpStream::connect(address).await.unwrap();
        time::timeout(BOUND, self.over(tcp, alpn))
            .await
            .unwrap()
            .unwrap()
    }

    /// HTTP/2 by ALPN.
    async fn http2(
        &self,
        address: SocketAddr,
    ) -> hyper::client::conn::http2::SendRequest<Empty<Bytes>> {
        let tls = self.connect(address, "h2").await;
        assert_eq!(tls.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        let io = TokioIo::new(tls);
        let made = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await;
        let (sender, connection) = made.unwrap();
        tokio::spawn(connection);
        sender
    }
}

fn get_request() -> Request<Empty<Bytes>> {
    let request = Request::get("https://localhost/");
    request.body(Empty::new()).unwrap()
}

/// Whether the server is `serve` of this crate, or axum's own server.
const SERVERS: [bool; 2] = [true, false];

fn graceful(delay: Duration) -> Graceful {
    let builder = Graceful::builder().drain_delay(delay);
    builder.build().unwrap()
}

fn app(graceful: &Graceful) -> Router {
    let endless = || async {
        let first = stream::iter(["the beginning"]).chain(stream::pending());
        Body::from_stream(first.map(Ok::<_, io::Error>))
    };
    let peer = |ConnectInfo(peer): ConnectInfo<SocketAddr>| async move { peer.to_string() };
    Router::new()
        .route("/", get(|| async { "hello" }))
        .route("/peer", get(peer))
        .route("/endless", get(endless))
        .layer(graceful.layer())
}

/// Serves on `serve`, or on axum's own server.
fn spawn<L: Listener<Addr = SocketAddr>>(
    own: bool,
    graceful: &Graceful,
    listener: L,
) -> JoinHandle<Report>
where
    SocketAddr: for<'a> Connected<IncomingStream<'a, L>>,
{
    let app = app(graceful).into_make_service_with_connect_info::<SocketAddr>();
    if own {
        return tokio::spawn(graceful.serve(listener, app).into_future());
    }
    let server = axum::serve(listener, app).with_graceful_shutdown(graceful.drain());
    tokio::spawn(graceful.run(server))
}

fn serve_tls(
    own: bool,
    graceful: &Graceful,
    tcp: TcpListener,
    certified: &Certified,
) -> JoinHandle<Report> {
    let acceptor = certified.acceptor();
    let tls = graceful
        .listener(tcp)
        .handshakes(TIMEOUT, move |io| acceptor.accept(io));
    spawn(own, graceful, tls)
}

async fn report(run: JoinHandle<Report>) -> Report {
    time::timeout(BOUND, run).await.unwrap().unwrap()
}

async fn stop(graceful: &Graceful, run: JoinHandle<Report>) {
    graceful.shutdown();
    let report = report(run).await;
    assert_eq!(report.outcome(), Outcome::Clean, "{report}");
    assert_eq!(graceful.connections(), 0);
}

async fn ask(
    io: &mut (impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin),
    path: &str,
) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n");
    io.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    while !answer.contains("\r\n\r\n") || answer.ends_with("\r\n\r\n") {
        let read = time::timeout(BOUND, io.read_u8()).await.unwrap();
        answer.push(read.unwrap().into());
    }
    let (head, _) = answer.split_once("\r\n\r\n").unwrap();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "));
    let length: usize = length.unwrap().parse().unwrap();
    let mut rest = vec![0; length - 1];
    io.read_exact(&mut rest).await.unwrap();
    answer + &String::from_utf8(rest).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_of_tls_is_one_connection_and_its_peer_is_known() {
    for own in SERVERS {
        let certified = certified();
        let graceful = graceful(Duration::ZERO);
        let (tcp, address) = listener().await;
        let run = serve_tls(own, &graceful, tcp, &certified);
        let mut first = certified.connect(address, "http/1.1").await;
        let answer = ask(&mut first, "/peer").await;
        let peer = first.get_ref().0.local_addr().unwrap();
        assert!(answer.ends_with(&peer.to_string()), "own {own}: {answer}");
        assert_eq!(graceful.connections(), 1, "own {own}");
        let mut second = certified.http2(address).await;
        let response = second.send_request(get_request()).await.unwrap();
        assert_eq!(response.version(), Version::HTTP_2);
        response.into_body().collect().await.unwrap();
        assert_eq!(graceful.connections(), 2, "own {own}");
        drop((first, second));
        wait_for("both are gone", || graceful.connections() == 0).await;
        stop(&graceful, run).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_tls_are_asked_to_leave_in_the_lame_duck_phase() {
    let certified = certified();
    let graceful = graceful(Duration::from_secs(2));
    let (tcp, address) = listener().await;
    let run = serve_tls(true, &graceful, tcp, &certified);
    let mut http1 = certified.connect(address, "http/1.1").await;
    let answer = ask(&mut http1, "/").await;
    assert!(!answer.contains("connection: close"), "{answer}");
    let mut http2 = certified.http2(address).await;
    http2.send_request(get_request()).await.unwrap();

    graceful.shutdown();
    let answer = ask(&mut http1, "/").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    assert!(answer.contains("connection: close"), "{answer}");
    let mut end = Vec::new();
    // The connection ends with a close_notify, so this is no error.
    let ended = time::timeout(BOUND, http1.read_to_end(&mut end)).await;
    assert_eq!(ended.unwrap().unwrap(), 0);
    let response = http2.send_request(get_request()).await.unwrap();
    assert_eq!(response.status(), 200);
    assert!(response.headers().get("connection").is_none());
    response.into_body().collect().await.unwrap();
    // A GOAWAY has come.
    wait_for("the client leaves", || http2.is_closed()).await;
    assert_eq!(graceful.phase(), Phase::LameDuck);
    let report = report(run).await;
    assert_eq!(report.outcome(), Outcome::Clean, "{report}");
}

/// As over plain TCP: a second after the last request, instead of at the drain deadline.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peers_that_say_nothing_more_hold_nothing_up() {
    for own in SERVERS {
        let certified = certified();
        let graceful = graceful(Duration::ZERO);
        let (tcp, address) = listener().await;
        let run = serve_tls(own, &graceful, tcp, &certified);
        let mut half = certified.connect(address, "http/1.1").await;
        half.write_all(b"GET / HTTP/1.1\r\nhost:").await.unwrap();
        let mut idle = certified.connect(address, "http/1.1").await;
        ask(&mut idle, "/").await;
        let silent = certified.connect(address, "http/1.1").await;
        let mut mute = certified.connect(address, "h2").await;
        mute.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
            .await
            .unwrap();
        let tcp_alone = TcpStream::connect(address).await.unwrap();
        wait_for("all are accepted", || graceful.connections() == 5).await;
        time::sleep(Duration::from_millis(50)).await;
        let begun = Instant::now();
        graceful.shutdown();
        let report = report(run).await;
        assert_eq!(report.outcome(), Outcome::Clean, "own {own}: {report}");
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(3), "own {own}: {took:?}");
        drop((half, idle, silent, mute, tcp_alone));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_clients_and_silent_peers_cost_no_time_at_the_stop() {
    for own in SERVERS {
        let certified = certified();
        let graceful = graceful(Duration::ZERO);
        let (tcp, address) = listener().await;
        let run = serve_tls(own, &graceful, tcp, &certified);
        let mut idle = certified.connect(address, "http/1.1").await;
        ask(&mut idle, "/").await;
        let silent = TcpStream::connect(address).await.unwrap();
        wait_for("all are accepted", || graceful.connections() == 2).await;
        time::sleep(Duration::from_millis(50)).await;
        let begun = Instant::now();
        stop(&graceful, run).await;
        let took = begun.elapsed();
        // The wait for a handshake would be one second.
        assert!(took < Duration::from_millis(900), "own {own}: {took:?}");
        drop((idle, silent));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_cut_ends_without_a_close_notify() {
    for own in SERVERS {
        let certified = certified();
        let graceful = Graceful::builder()
            .drain_delay(Duration::ZERO)
            .drain_timeout(Duration::from_millis(200))
            .build()
            .unwrap();
        let (tcp, address) = listener().await;
        let run = serve_tls(own, &graceful, tcp, &certified);
        let mut client = certified.connect(address, "http/1.1").await;
        // An HTTP/1.0 response without a length ends with its connection (RFC 9112 §6.3), so its client
        // needs another sign that the response was cut.
        client
            .write_all(b"GET /endless HTTP/1.0\r\n\r\n")
            .await
            .unwrap();
        let mut read = Vec::new();
        while !read.ends_with(b"the beginning") {
            read.push(client.read_u8().await.unwrap());
        }
        graceful.shutdown();
        let report = report(run).await;
        assert_eq!(report.outcome(), Outcome::Forced, "{report}");
        let peers = report.connections_cut().iter().map(|cut| cut.peer);
        let expected = client.get_ref().0.local_addr().unwrap();
        assert_eq!(peers.collect::<Vec<_>>(), [Some(expected)]);
        let error = client.read_to_end(&mut read).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "own {own}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peers_that_do_not_shake_hands_delay_no_other_peer_and_are_closed() {
    for own in SERVERS {
        let certified = certified();
        let graceful = graceful(Duration::ZERO);
        let (tcp, address) = listener().await;
        let acceptor = certified.acceptor();
        let timeout = Duration::from_millis(500);
        let tls = graceful
            .listener(tcp)
            .handshakes(timeout, move |io| acceptor.accept(io));
        let run = spawn(own, &graceful, tls);
        let mut silent = Vec::new();
        for _ in 0..50 {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        // The first bytes of a ClientHello, and nothing more.
        let mut half = TcpStream::connect(address).await.unwrap();
        half.write_all(b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03")
            .await
            .unwrap();
        let mut garbage = TcpStream::connect(address).await.unwrap();
        garbage
            .write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
            .await
            .unwrap();
        let mut client = certified.connect(address, "http/1.1").await;
        let begun = Instant::now();
        let answer = ask(&mut client, "/").await;
        assert!(answer.ends_with("hello"), "{answer}");
        assert!(begun.elapsed() < timeout, "{:?}", begun.elapsed());
        // An alert, and the end.
        let mut alert = Vec::new();
        time::timeout(BOUND, garbage.read_to_end(&mut alert))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(alert.first(), Some(&0x15), "{alert:?}");
        drop(garbage);
        for mut peer in silent {
            let read = time::timeout(BOUND, peer.read(&mut [0])).await.unwrap();
            assert!(!matches!(read, Ok(1..)), "{read:?}");
        }
        drop(half);
        wait_for("the client is left", || graceful.connections() == 1).await;
        stop(&graceful, run).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_ends_its_handshake_and_no_other() {
    let graceful = graceful(Duration::ZERO);
    let (tcp, address) = listener().await;
    let calls = AtomicUsize::new(0);
    let shaky = graceful.listener(tcp).handshakes(TIMEOUT, move |io| {
        let call = calls.fetch_add(1, Ordering::SeqCst);
        assert_ne!(call, 0, "the call panics");
        async move {
            assert_ne!(call, 1, "the future panics");
            Ok::<_, io::Error>(io)
        }
    });
    let run = spawn(true, &graceful, shaky);
    for _ in 0..2 {
        let mut client = TcpStream::connect(address).await.unwrap();
        let read = time::timeout(BOUND, client.read(&mut [0])).await.unwrap();
        assert!(!matches!(read, Ok(1..)), "{read:?}");
    }
    let mut client = TcpStream::connect(address).await.unwrap();
    let answer = ask(&mut client, "/").await;
    assert!(answer.ends_with("hello"), "{answer}");
    wait_for("the others are gone", || graceful.connections() == 1).await;
    stop(&graceful, run).await;
}

/// The service does not wait for the peers of dropped handshakes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handshakes_that_run_when_connections_close_are_dropped() {
    for own in SERVERS {
        struct Dropped(Arc<AtomicUsize>);

        impl Drop for Dropped {
            fn drop(&mut self) {
                self.0.fetch_add(1, Ordering::SeqCst);
            }
        }

        let graceful = graceful(Duration::ZERO);
        let (tcp, address) = listener().await;
        let dropped = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&dropped);
        let endless = graceful.listener(tcp).handshakes(TIMEOUT, move |mut io| {
            let guard = Dropped(Arc::clone(&counted));
            async move {
                let _guard = guard;
                let _ = io.read(&mut [0; 8]).await;
                std::future::pending::<()>().await;
                Ok::<_, io::Error>(io)
            }
        });
        let run = spawn(own, &graceful, endless);
        let mut clients = Vec::new();
        for _ in 0..10 {
            clients.push(TcpStream::connect(address).await.unwrap());
        }
        clients[0].write_all(b"speaks").await.unwrap();
        wait_for("all are accepted", || graceful.connections() == 10).await;
        time::sleep(Duration::from_millis(50)).await;
        let begun = Instant::now();
        stop(&graceful, run).await;
        // The service waits for the client that has sent something, for one second.
        assert!(begun.elapsed() < Duration::from_secs(2), "{own}");
        assert_eq!(dropped.load(Ordering::SeqCst), 10, "{own}");
    }
}

async fn unread(times_out: bool) {
    let graceful = graceful(Duration::ZERO);
    let (tcp, address) = listener().await;
    let timeout = if times_out {
        Duration::from_millis(50)
    } else {
        TIMEOUT
    };
    let begun = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&begun);
    let endless = graceful.listener(tcp).handshakes(timeout, move |mut io| {
        let counted = Arc::clone(&counted);
        async move {
            // More than its client takes.
            io.write_all(&vec![0; 300_000]).await?;
            counted.fetch_add(1, Ordering::SeqCst);
            std::future::pending::<()>().await;
            Ok::<_, io::Error>(io)
        }
    });
    let run = spawn(true, &graceful, endless);
    let client = TcpStream::connect(address).await.unwrap();
    wait_for("the handshake begins", || begun.load(Ordering::SeqCst) == 1).await;
    if times_out {
        wait_for("it is given up", || graceful.connections() == 0).await;
    }
    graceful.shutdown();
    let report = report(run).await;
    assert_eq!(report.outcome(), Outcome::Clean, "{report}");
    assert!(report.duration() < Duration::from_secs(5), "{report}");
    drop(client);
}

/// The client has sent its request already, as it may in TLS 1.3 before its certificate is refused.
#[tokio::test]
async fn the_reason_why_a_handshake_has_failed_arrives_although_the_client_goes_on_sending() {
    const REASON: &[u8] = b"no certificate";
    for stops in [false, true] {
        let graceful = graceful(Duration::from_secs(5));
        let (tcp, address) = listener().await;
        let fails = graceful
            .listener(tcp)
            .handshakes(TIMEOUT, |mut io| async move {
                io.read_u8().await?;
                io.write_all(REASON).await?;
                Err::<GracefulIo<TcpStream>, _>(io::Error::other("refused"))
            });
        let run = spawn(true, &graceful, fails);
        let mut client = TcpStream::connect(address).await.unwrap();
        wait_for("the connection", || graceful.connections() == 1).await;
        if stops {
            graceful.shutdown();
        }
        client.write_all(&[0; 1000]).await.unwrap();
        client.readable().await.unwrap();
        for _ in 0..10 {
            client.write_all(&[0; 1000]).await.unwrap();
            time::sleep(Duration::from_millis(2)).await;
        }
        let mut reason = Vec::new();
        client.read_to_end(&mut reason).await.unwrap();
        assert_eq!(reason, REASON, "stops: {stops}");
        run.abort();
    }
}

/// Its client receives nothing of what the server has sent.
#[tokio::test]
async fn a_handshake_that_is_dropped_is_not_waited_for() {
    tokio::join!(unread(false), unread(true));
}

const BALANCER: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

async fn proxied(io: GracefulIo<TcpStream>) -> io::Result<ProxiedStream<GracefulIo<TcpStream>>> {
    if io.peer().is_none_or(|peer| peer.ip() != BALANCER) {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let io = ProxiedStream::create_from_tokio(io, ParseConfig::default()).await?;
    if let Some(address) = io.proxy_header().proxied_address() {
        io.get_ref().set_peer(address.source);
    }
    Ok(io)
}

fn header() -> Vec<u8> {
    let (source, destination) = ("192.0.2.7:4711", "192.0.2.1:443");
    let address = ProxiedAddress::stream(source.parse().unwrap(), destination.parse().unwrap());
    let mut header = Vec::new();
    let made = ProxyHeader::with_address(address);
    made.encode_v2(&mut header).unwrap();
    header
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_client_behind_a_proxy_is_the_peer_with_tls_and_without() {
    for own in SERVERS {
        let graceful = graceful(Duration::ZERO);
        let (tcp, address) = listener().await;
        let run = spawn(
            own,
            &graceful,
            graceful.listener(tcp).handshakes(TIMEOUT, proxied),
        );
        let mut client = TcpStream::connect(address).await.unwrap();
        // The request comes with it.
        let first = [
            &header()[..],
            b"GET /peer HTTP/1.1\r\nhost: localhost\r\n\r\n",
        ]
        .concat();
        client.write_all(&first).await.unwrap();
        let answer = ask(&mut client, "/peer").await;
        assert!(answer.ends_with("192.0.2.7:4711"), "{own}: {answer}");
        assert_eq!(graceful.connections(), 1);
        let mut wrong = TcpStream::connect(address).await.unwrap();
        wrong.write_all(b"PROXY TCP9 nonsense\r\n").await.unwrap();
        let read = time::timeout(BOUND, wrong.read(&mut [0])).await.unwrap();
        assert!(!matches!(read, Ok(1..)), "{read:?}");
        drop(client);
        stop(&graceful, run).await;

        let certified = certified();
        let graceful = self::graceful(Duration::ZERO);
        let (tcp, address) = listener().await;
        let acceptor = certified.acceptor();
        let tls = graceful
            .listener(tcp)
            .handshakes(TIMEOUT, proxied)
            .handshakes(TIMEOUT, move |io| acceptor.accept(io));
        let run = spawn(own, &graceful, tls);
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(&header()).await.unwrap();
        let mut client = certified.over(client, "http/1.1").await.unwrap();
        let answer = ask(&mut client, "/peer").await;
        assert!(answer.ends_with("192.0.2.7:4711"), "{own}: {answer}");
        assert_eq!(graceful.connections(), 1);
        drop(client);
        stop(&graceful, run).await;
    }
}

/// On other systems, 127.0.0.2 is no address of the machine.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_header_of_a_peer_other_than_the_balancer_is_not_read() {
    for own in SERVERS {
        let graceful = graceful(Duration::ZERO);
        let (tcp, address) = listener().await;
        let listener = graceful.listener(tcp).handshakes(TIMEOUT, proxied);
        let run = spawn(own, &graceful, listener);
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
        let mut other = socket.connect(address).await.unwrap();
        let request = b"GET /peer HTTP/1.1\r\nhost: localhost\r\n\r\n";
        let _ = other.write_all(&[&header(), &request[..]].concat()).await;
        let read = time::timeout(BOUND, other.read(&mut [0])).await.unwrap();
        assert!(!matches!(read, Ok(1..)), "{own}: {read:?}");
        stop(&graceful, run).await;
    }
}

type Tls<L> = Handshakes<L, server::TlsStream<GracefulIo<TcpStream>>>;

/// What was agreed on by ALPN.
#[derive(Clone)]
struct Protocol(Option<Vec<u8>>);

impl Protocol {
    fn of(tls: &GracefulIo<server::TlsStream<GracefulIo<TcpStream>>>) -> Self {
        let (_, tls) = tls.get_ref().get_ref();
        Self(tls.alpn_protocol().map(<[_]>::to_vec))
    }
}

impl<L> Connected<Accepted<'_, L>> for Protocol
where
    L: Listener<Io = GracefulIo<server::TlsStream<GracefulIo<TcpStream>>>>,
{
    fn connect_info(accepted: Accepted<'_, L>) -> Self {
        Self::of(accepted.io())
    }
}

impl Connected<IncomingStream<'_, Tls<GracefulListener<TcpListener>>>> for Protocol {
    fn connect_info(stream: IncomingStream<'_, Tls<GracefulListener<TcpListener>>>) -> Self {
        Self::of(stream.io())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connect_info_of_ones_own_knows_of_the_handshake() {
    for own in SERVERS {
        let certified = certified();
        let graceful = graceful(Duration::ZERO);
        let (tcp, address) = listener().await;
        let acceptor = certified.acceptor();
        let listener = GracefulListener::new(&graceful, tcp);
        let tls = Handshakes::new(listener, TIMEOUT, move |io| acceptor.accept(io));
        let protocol = |ConnectInfo(Protocol(protocol)): ConnectInfo<Protocol>| async move {
            protocol.unwrap_or_default()
        };
        let app = Router::new().route("/", get(protocol));
        let app = app.into_make_service_with_connect_info::<Protocol>();
        let run = if own {
            tokio::spawn(graceful.serve(tls, app).into_future())
        } else {
            let server = axum::serve(tls, app).with_graceful_shutdown(graceful.drain());
            tokio::spawn(graceful.run(server))
        };
        let mut client = certified.connect(address, "http/1.1").await;
        let answer = ask(&mut client, "/").await;
        assert!(answer.ends_with("http/1.1"), "{own}: {answer}");
        drop(client);
        stop(&graceful, run).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_certificate_is_for_new_connections() {
    let [old, new] = [certified(), certified()];
    let (sender, receiver) = watch::channel(old.acceptor());
    let graceful = graceful(Duration::ZERO);
    let (tcp, address) = listener().await;
    let tls = graceful
        .listener(tcp)
        .handshakes(TIMEOUT, move |io| receiver.borrow().accept(io));
    let run = spawn(true, &graceful, tls);
    let mut first = old.connect(address, "http/1.1").await;
    sender.send_replace(new.acceptor());
    let mut second = new.connect(address, "http/1.1").await;
    for client in [&mut first, &mut second] {
        let answer = ask(client, "/").await;
        assert!(answer.ends_with("hello"), "{answer}");
    }
    let stale = TcpStream::connect(address).await.unwrap();
    assert!(old.over(stale, "http/1.1").await.is_err());
    drop((first, second));
    stop(&graceful, run).await;
}

/// A handshake that is given up is dropped before its connection counts as gone.
#[tokio::test(start_paused = true)]
async fn the_clock_of_a_handshake_is_the_runtimes() {
    let graceful = graceful(Duration::ZERO);
    let (tcp, address) = listener().await;
    let timeout = Duration::from_secs(3600);
    let mut listener = graceful.listener(tcp).handshakes(timeout, |mut io| async {
        io.read_u8().await?;
        Ok::<_, io::Error>(io)
    });
    let client = TcpStream::connect(address).await.unwrap();
    let accepting = tokio::spawn(async move { drop(listener.accept().await) });
    let begun = time::Instant::now();
    wait_for("it is accepted", || graceful.connections() == 1).await;
    let given_up = time::timeout(timeout * 2, async {
        while graceful.connections() > 0 {
            time::sleep(Duration::from_secs(60)).await;
        }
    });
    given_up.await.expect("the handshake is given up");
    let took = begun.elapsed();
    assert!(took >= timeout && took < timeout * 2, "{took:?}");
    drop(client);
    accepting.abort();
}
