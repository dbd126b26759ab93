//! TLS: clients connect without pause during many stops.

use std::{
    env,
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use tokio_rustls::rustls::{ClientConfig, ClientConnection, StreamOwned};

use crate::{
    Test,
    process::{BOUND, Server, wait_for},
    server::Form,
};

/// These tests run alone, because they load the machine.
pub(crate) const ALONE: &[Test] = &[
    (
        "tls::connection_per_request_clients_lose_nothing",
        Form::CUTTING,
        connection_per_request,
    ),
    (
        "tls::clients_lose_nothing_when_handshakes_are_slow",
        Form::CUTTING,
        slow_handshakes,
    ),
    (
        "tls::ten_thousand_silent_peers_delay_no_client",
        &[Form::Serve],
        silent_peers,
    ),
];

/// When draining starts, the server closes connections that have been silent for 25 ms. A client that the
/// operating system delays for longer than this may lose its request, and the test does not count it.
const PROMPT: Duration = Duration::from_millis(15);

/// The server side.
pub(crate) mod server {
    use std::{io, net::SocketAddr, sync::Arc, time::Duration};

    use axum::{extract::connect_info::Connected, serve::IncomingStream};
    use tokio::net::{TcpListener, TcpStream};
    use tokio_rustls::{
        TlsAcceptor,
        rustls::{ServerConfig, pki_types::PrivatePkcs8KeyDer},
        server::TlsStream,
    };
    use tower_graceful::{Graceful, GracefulIo, HandshakeExt, TrackedHandshakes, TrackedListener};

    use crate::server::Knobs;

    type Listener =
        TrackedHandshakes<TrackedListener<TcpListener>, TlsStream<GracefulIo<TcpStream>>>;

    const _: fn() = || {
        fn has_connect_info<C: for<'a> Connected<IncomingStream<'a, Listener>>>() {}
        has_connect_info::<SocketAddr>();
    };

    /// A TLS listener. With `tls=40` each handshake begins after 40 milliseconds.
    pub(crate) fn listener(graceful: &Graceful, tcp: TcpListener, knobs: &Knobs<'_>) -> Listener {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
        let mut config = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key.into())
            .unwrap();
        config.alpn_protocols = vec![b"h2".into(), b"http/1.1".into()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let takes = knobs.millis("tls").unwrap_or_default();
        let timeout = knobs
            .millis("tls_timeout")
            .unwrap_or(Duration::from_secs(10));
        graceful.listener(tcp).handshakes(timeout, move |io| {
            let acceptor = acceptor.clone();
            async move {
                if !takes.is_zero() {
                    tokio::time::sleep(takes).await;
                }
                let tls = acceptor.accept(io).await?;
                if !takes.is_zero() {
                    tokio::time::sleep(takes).await;
                }
                Ok::<_, io::Error>(tls)
            }
        })
    }
}

/// A verifier that trusts every certificate.
mod trusting {
    use tokio_rustls::rustls::{
        DigitallySignedStruct, Error, SignatureScheme,
        client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        crypto,
        pki_types::{CertificateDer, ServerName, UnixTime},
    };

    #[derive(Debug)]
    pub(super) struct Verifier;

    impl ServerCertVerifier for Verifier {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            let provider = crypto::ring::default_provider();
            provider
                .signature_verification_algorithms
                .supported_schemes()
        }
    }
}

pub(crate) fn config() -> Arc<ClientConfig> {
    let config = ClientConfig::builder()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(trusting::Verifier))
        .with_no_client_auth();
    Arc::new(config)
}

pub(crate) fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let tcp = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    tcp.set_read_timeout(Some(BOUND))?;
    tcp.set_nodelay(true)?;
    Ok(tcp)
}

/// Completes the handshake on a TCP connection.
pub(crate) fn handshake(
    mut tcp: TcpStream,
    config: &Arc<ClientConfig>,
) -> io::Result<StreamOwned<ClientConnection, TcpStream>> {
    let name = "localhost".try_into().unwrap();
    let mut client = ClientConnection::new(Arc::clone(config), name).unwrap();
    while client.is_handshaking() {
        client.complete_io(&mut tcp)?;
    }
    Ok(StreamOwned::new(client, tcp))
}

/// Sends one request on a TCP connection, and returns the status of the response. The request follows the
/// client's last handshake message without a pause, because rustls buffers it until then. `begun` is when
/// the client started to connect. It shows whether the client began its handshake promptly.
fn request(
    mut tcp: TcpStream,
    config: &Arc<ClientConfig>,
    begun: Instant,
) -> (bool, io::Result<u16>) {
    let name = "localhost".try_into().unwrap();
    let mut client = ClientConnection::new(Arc::clone(config), name).unwrap();
    let request = b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    client.writer().write_all(request).unwrap();
    let sent = client.write_tls(&mut tcp);
    let prompt = begun.elapsed() < PROMPT;
    (
        prompt,
        sent.and_then(|_| response(StreamOwned::new(client, tcp))),
    )
}

fn response(mut tls: StreamOwned<ClientConnection, TcpStream>) -> io::Result<u16> {
    let mut answer = String::new();
    tls.read_to_string(&mut answer)?;
    let status = answer
        .get("HTTP/1.1 ".len()..)
        .and_then(|rest| rest.get(..3));
    let status = status.and_then(|status| status.parse().ok());
    status.ok_or_else(|| io::Error::other(format!("{answer:?}")))
}

fn refused(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset
    )
}

/// Sixteen clients open a connection for each request until they are refused. More stops with `FULL=1`.
fn connection_per_request(form: Form) {
    through_stops(form, "tls=0");
}

fn slow_handshakes(form: Form) {
    through_stops(form, "tls=40");
}

fn through_stops(form: Form, tls: &str) {
    let stops = if env::var_os("FULL").is_some() { 20 } else { 8 };

    let (mut answers, mut excused) = (0, 0);
    for stop in 0..stops {
        let keep = ["keep_listening=true", "keep_listening=false"][stop % 2];
        // `shared=false`: otherwise a connection that arrives in the last microseconds is reset.
        let mut server = Server::start(form, &["delay=100", keep, "shared=false", tls]);
        let address = server.address;
        let config = config();
        let clients: Vec<_> = (0..16)
            .map(|_| {
                let config = Arc::clone(&config);
                thread::spawn(move || {
                    let (mut answers, mut excused) = (0, 0);
                    loop {
                        let begun = Instant::now();
                        let tcp = match connect(address) {
                            Ok(tcp) => tcp,
                            Err(error) if refused(&error) => return Ok((answers, excused)),
                            Err(error) => return Err(format!("connect: {error}")),
                        };
                        match request(tcp, &config, begun) {
                            (_, Ok(200 | 503)) => answers += 1,
                            (_, Ok(status)) => return Err(format!("{status}")),
                            (false, Err(_)) => excused += 1,
                            // The server waits at most one second for handshakes.
                            (_, Err(_)) if begun.elapsed() > Duration::from_secs(1) => excused += 1,
                            (true, Err(error)) => {
                                let took = begun.elapsed();
                                return Err(format!(
                                    "lost after {answers} answers and {took:?}: {error}"
                                ));
                            }
                        }
                    }
                })
            })
            .collect();
        thread::sleep(Duration::from_millis(200));
        server.terminate();
        let ended: Vec<_> = clients.into_iter().map(|it| it.join().unwrap()).collect();
        server.exit().assert_clean();
        for client in ended {
            let seen = client.unwrap_or_else(|error| panic!("stop {stop}, {keep}: {error}"));
            answers += seen.0;
            excused += seen.1;
        }
    }
    println!("{answers} answers through {stops} stops, {excused} clients too slow, {tls}");
    assert!(answers > stops * 16, "{answers}");
    assert!(excused * 10 <= answers, "{excused} of {answers}");
}

/// As many silent peers as there may be open files.
fn silent_peers(form: Form) {
    let files = crate::server::allow_files(12_000);
    let peers = usize::try_from(files).unwrap() * 5 / 6;
    let files = format!("files={files}");
    let mut server = Server::start(form, &["delay=100", "tls=0", "tls_timeout=60000", &files]);
    let memory = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid()));
        let status = status.unwrap_or_default();
        let line = status.lines().find_map(|it| it.strip_prefix("VmRSS:"));
        let kib = line.and_then(|it| it.trim().split(' ').next()?.parse::<usize>().ok());
        kib.unwrap_or(0)
    };
    let config = config();
    let before = memory();
    let silent: Vec<_> = (0..peers)
        .map(|_| TcpStream::connect(server.address).unwrap())
        .collect();
    wait_for("an answer", || {
        let tcp = connect(server.address).unwrap();
        let begun = Instant::now();
        let (_, status) = request(tcp, &config, begun);
        assert_eq!(status.unwrap(), 200);
        begun.elapsed() < Duration::from_millis(200)
    });
    let each = memory().saturating_sub(before) * 1024 / peers;
    assert!(each < 12 * 1024, "{each}");
    server.terminate();
    let exit = server.exit();
    exit.assert_clean();
    let after = exit.after;
    println!("{peers} silent peers, {each} bytes of memory each, ended after {after:?}");
    exit.assert_within(Duration::ZERO, Duration::from_secs(4));
    drop(silent);
}
