//! The server of `scale`: a child process with two listeners, one of them with TLS.

use std::{
    io::{BufRead, stdin},
    net::SocketAddr,
    process,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use axum::{
    Router,
    extract::{
        State,
        ws::{CloseFrame, Message, WebSocketUpgrade},
    },
    response::Response,
    routing::{any, get},
    serve::Listener,
};
use nix::sys::{
    resource::{UsageWho, getrusage},
    time::TimeValLike,
};
use rcgen::{CertifiedKey, generate_simple_self_signed};
use tokio::{
    net::{TcpListener, TcpStream},
    runtime,
    sync::{
        mpsc::{Receiver, Sender, channel},
        watch,
    },
    time,
};
use tokio_rustls::{
    TlsAcceptor, TlsConnector,
    rustls::{
        self, ClientConfig, DigitallySignedStruct, Error, ServerConfig, SignatureScheme,
        client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime},
    },
    server::TlsStream,
};
use tower_graceful::{Graceful, HandshakeExt};

use super::{
    child::{Form, allow_files, status},
    server,
};

/// The argument that makes this program the server.
pub(crate) const ROLE: &str = "--scale-server";

/// Longer than any stop takes.
const DRAIN: Duration = Duration::from_secs(20);

/// Accepts every certificate: the client measures, and trusts the server that it has started.
#[derive(Debug)]
struct Trusting(Vec<SignatureScheme>);

impl ServerCertVerifier for Trusting {
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
        self.0.clone()
    }
}

pub(crate) fn connector() -> TlsConnector {
    let provider = rustls::crypto::ring::default_provider();
    let schemes = provider
        .signature_verification_algorithms
        .supported_schemes();
    let config = ClientConfig::builder()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Trusting(schemes)))
        .with_no_client_auth();
    TlsConnector::from(Arc::new(config))
}

fn acceptor() -> TlsAcceptor {
    let CertifiedKey { cert, signing_key } =
        generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let key = PrivatePkcs8KeyDer::from(signing_key.serialize_der());
    let config = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key.into());
    TlsAcceptor::from(Arc::new(config.expect("a configuration")))
}

/// A connection after its handshake.
type Done = (TlsStream<TcpStream>, SocketAddr);

/// TLS for plain axum: handshakes run beside accepting.
struct Tls {
    listener: TcpListener,
    acceptor: TlsAcceptor,
    done: (Sender<Done>, Receiver<Done>),
}

impl Listener for Tls {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            tokio::select! {
                Some(done) = self.done.1.recv() => return done,
                Ok((tcp, addr)) = self.listener.accept() => {
                    let (acceptor, done) = (self.acceptor.clone(), self.done.0.clone());
                    tokio::spawn(async move {
                        if let Ok(tls) = acceptor.accept(tcp).await {
                            let _ = done.send((tls, addr)).await;
                        }
                    });
                }
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A WebSocket that says goodbye when draining starts. `None` in plain axum, which does not tell its handlers.
async fn socket(upgrade: WebSocketUpgrade, State(graceful): State<Option<Graceful>>) -> Response {
    let hold = graceful.as_ref().map(|graceful| graceful.hold("socket"));
    upgrade
        .read_buffer_size(4096)
        .write_buffer_size(0)
        .on_upgrade(move |mut socket| async move {
            let (Some(graceful), Some(hold)) = (graceful, hold) else {
                while let Some(Ok(_)) = socket.recv().await {}
                return;
            };
            graceful.draining().await;
            let goodbye = Message::Close(Some(CloseFrame {
                code: 1001,
                reason: "".into(),
            }));
            hold.close_socket(socket, goodbye, Duration::from_secs(5))
                .await;
        })
}

fn app(graceful: Option<Graceful>) -> Router {
    Router::new()
        .route("/", get(|| async { "hello" }))
        .route("/ws", any(socket))
        .with_state(graceful)
}

/// Runs `--scale-server FORM`.
pub(crate) fn run(args: &[String]) {
    let [form] = args else { panic!("a form") };
    allow_files();
    let runtime = runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(serve(Form::of(form)));
    // The process ends without waiting for tasks, in each form.
    process::exit(0);
}

async fn serve(form: Form) {
    let graceful = Graceful::builder()
        .drain_delay(Duration::ZERO)
        .drain_timeout(DRAIN)
        .build()
        .expect("a plan that fits");
    let [plain, tls] = [server::listen(), server::listen()];
    let (stop, mut stopped) = watch::channel(false);
    for listener in [&plain, &tls] {
        println!("{}", listener.local_addr().expect("an address"));
    }
    let (ended, end) = mpsc::channel();
    let asked = graceful.clone();
    thread::spawn(move || answer(&asked, form, &stop, &end));
    let layered = app(Some(graceful.clone())).layer(graceful.layer());
    let acceptor = acceptor();
    let timeout = Duration::from_secs(30);
    match form {
        Form::Plain => {
            let tls = Tls {
                listener: tls,
                acceptor,
                done: channel(100),
            };
            let wait = |mut stopped: watch::Receiver<bool>| async move {
                let _ = stopped.wait_for(|stopped| *stopped).await;
            };
            let _ = tokio::join!(
                axum::serve(plain, app(None)).with_graceful_shutdown(wait(stopped.clone())),
                axum::serve(tls, app(None)).with_graceful_shutdown(wait(stopped.clone())),
            );
        }
        Form::Listener => {
            let tls = graceful
                .listener(tls)
                .handshakes(timeout, move |io| acceptor.accept(io));
            let plain = axum::serve(graceful.listener(plain), layered.clone())
                .with_graceful_shutdown(graceful.drain());
            let tls = axum::serve(tls, layered).with_graceful_shutdown(graceful.drain());
            drop(tokio::join!(graceful.run(plain), graceful.run(tls)));
        }
        Form::Serve => {
            let tls = graceful
                .listener(tls)
                .handshakes(timeout, move |io| acceptor.accept(io));
            let plain = graceful.serve(plain, layered.clone()).into_future();
            drop(tokio::join!(
                plain,
                graceful.serve(tls, layered).into_future()
            ));
        }
        other => panic!("not measured: {other:?}"),
    }
    let _ = stopped.wait_for(|stopped| *stopped).await;
    ended.send(()).expect("the thread that answers");
    // The answer is written before the process ends.
    time::sleep(DRAIN).await;
}

/// The CPU time that this process has used.
fn cpu_time() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).expect("the usage");
    let times = [usage.user_time(), usage.system_time()];
    times
        .map(|time| Duration::from_micros(time.num_microseconds().try_into().expect("a time")))
        .iter()
        .sum()
}

/// Answers each line of the parent process. After `stop` the process ends.
fn answer(graceful: &Graceful, form: Form, stop: &watch::Sender<bool>, end: &mpsc::Receiver<()>) {
    for line in stdin().lock().lines() {
        match &*line.expect("a line") {
            "memory" => println!("{}", status("VmRSS:")),
            "stop" => {
                let before = cpu_time();
                if form != Form::Plain {
                    graceful.shutdown();
                }
                let _ = stop.send(true);
                let _ = end.recv();
                println!("{}", status("VmHWM:"));
                println!("{}", cpu_time().saturating_sub(before).as_micros());
                process::exit(0);
            }
            other => panic!("no such question: {other}"),
        }
    }
    process::exit(0);
}
