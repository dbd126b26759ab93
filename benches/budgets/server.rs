//! The measured server. It is this program as a child process, so that its memory and CPU time contain
//! nothing of the clients.

use std::{
    convert::identity,
    io::{BufRead, stdin},
    process,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::Request,
    response::Response,
    routing::{any, get, post},
};
use axum_server::tls_rustls::RustlsConfig;
use futures_util::stream;
use http_body_util::BodyExt;
use tokio::{
    net::{TcpListener, TcpSocket},
    runtime,
};
use tokio_rustls::{TlsAcceptor, rustls::ServerConfig};
use tower::{layer::util, util::MapResponseLayer};
use tower_graceful::{Graceful, HandshakeExt, Phase};
use tower_http::metrics::InFlightRequestsLayer;

use super::{
    child::{Form, allow_files, status},
    tls::{Identity, TlsListener},
};

/// The drain timeout of the server: the time from the start of the stop until connections are cut.
const DRAIN: Duration = Duration::from_millis(800);

fn app() -> Router {
    Router::new()
        .route("/", get(|| async { "hello" }))
        .route("/never", any(never))
        .route(
            "/silent",
            get(|| async { Body::from_stream(stream::pending::<std::io::Result<Bytes>>()) }),
        )
        .route(
            "/upload",
            post(|body: Bytes| async move { body.len().to_string() }),
        )
}

/// Listens on any port. `TcpListener::bind` would have an accept queue of 128 connections. On a busy machine
/// the clients fill it, and then each lost SYN costs a second.
pub(crate) fn listen() -> TcpListener {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind(([127, 0, 0, 1], 0).into()).expect("a port");
    socket.listen(4096).expect("a listener")
}

async fn never(_request: Request) -> &'static str {
    std::future::pending().await
}

/// Runs `--server FORM WORKERS IDENTITY`. With 0 workers everything runs on this thread. The identity is
/// empty without TLS.
pub(crate) fn run(args: &[String]) {
    let [form, workers, identity] = args else {
        panic!("a form, a number of workers and an identity")
    };
    allow_files();
    let runtime = match workers.parse().expect("a number") {
        0 => runtime::Builder::new_current_thread().enable_all().build(),
        workers => runtime::Builder::new_multi_thread()
            .worker_threads(workers)
            .enable_all()
            .build(),
    };
    let form = Form::of(form);
    let runtime = runtime.expect("a runtime");
    if form.is_tls() {
        runtime.block_on(serve_tls(form, Identity::of(identity).server()));
    } else {
        runtime.block_on(serve(form));
    }
}

/// The lifecycle, and the listener whose address the parent process knows.
fn start() -> (Graceful, TcpListener) {
    let graceful = Graceful::builder()
        .drain_delay(Duration::ZERO)
        .drain_timeout(DRAIN)
        .build()
        .expect("a plan that fits");
    let listener = listen();
    println!("{}", listener.local_addr().expect("an address"));
    let asked = graceful.clone();
    thread::spawn(move || answer(&asked));
    (graceful, listener)
}

async fn serve(form: Form) {
    let (graceful, listener) = start();
    let layered = app().layer(graceful.layer());
    match form {
        Form::Plain => axum::serve(listener, app()).await.expect("a server"),
        Form::Passed => {
            axum::serve(listener, app().layer(util::Identity::new()))
                .await
                .expect("a server");
        }
        Form::Wrapped => {
            let wrap = MapResponseLayer::new(|response: Response| {
                response.map(|body| body.map_err(identity::<axum::Error>))
            });
            axum::serve(listener, app().layer(wrap))
                .await
                .expect("a server");
        }
        Form::Counted => {
            let (counting, _counter) = InFlightRequestsLayer::pair();
            let app = app().layer(counting);
            axum::serve(listener, app).await.expect("a server");
        }
        Form::Layer => axum::serve(listener, layered).await.expect("a server"),
        Form::Tracked => {
            let server = axum::serve(graceful.listener(listener), app())
                .with_graceful_shutdown(graceful.drain());
            drop(graceful.run(server).await);
        }
        Form::Listener => {
            let server = axum::serve(graceful.listener(listener), layered)
                .with_graceful_shutdown(graceful.drain());
            drop(graceful.run(server).await);
        }
        Form::Serve => {
            // The incomplete heads must outlast the test, so the head timeout must not close them.
            let server = graceful.serve(listener, layered);
            drop(server.header_read_timeout(Duration::from_secs(3600)).await);
        }
        Form::AxumServer => {
            let listener = listener.into_std().expect("a listener");
            let server = axum_server::from_tcp(listener).expect("a server");
            let app = app().into_make_service();
            server.serve(app).await.expect("a server");
        }
        Form::TlsPlain | Form::TlsListener | Form::TlsServe | Form::TlsAxumServer => {
            unreachable!("served with TLS")
        }
    }
    // The thread that answers questions ends the process.
    std::future::pending::<()>().await;
}

async fn serve_tls(form: Form, config: Arc<ServerConfig>) {
    /// The clients connect at once.
    const HANDSHAKE: Duration = Duration::from_secs(30);

    let (graceful, tcp) = start();
    let layered = app().layer(graceful.layer());
    let acceptor = TlsAcceptor::from(Arc::clone(&config));
    match form {
        Form::TlsPlain => {
            let listener = TlsListener { tcp, acceptor };
            axum::serve(listener, app()).await.expect("a server");
        }
        Form::TlsListener => {
            let listener = graceful.listener(tcp);
            let listener = listener.handshakes(HANDSHAKE, move |io| acceptor.accept(io));
            let server = axum::serve(listener, layered).with_graceful_shutdown(graceful.drain());
            drop(graceful.run(server).await);
        }
        Form::TlsServe => {
            let listener = graceful.listener(tcp);
            let listener = listener.handshakes(HANDSHAKE, move |io| acceptor.accept(io));
            drop(graceful.serve(listener, layered).await);
        }
        Form::TlsAxumServer => {
            let tcp = tcp.into_std().expect("a listener");
            let config = RustlsConfig::from_config(config);
            let server = axum_server::from_tcp_rustls(tcp, config).expect("a server");
            let app = app().into_make_service();
            server.serve(app).await.expect("a server");
        }
        _ => unreachable!("served without TLS"),
    }
    std::future::pending::<()>().await;
}

/// Answers each line of the parent process, and exits when the parent closes the pipe.
fn answer(graceful: &Graceful) {
    for line in stdin().lock().lines() {
        match &*line.expect("a line") {
            "memory" => println!("{}", status("RssAnon:")),
            "connections" => println!("{}", graceful.connections()),
            "in flight" => println!("{}", graceful.in_flight()),
            "cut" => println!("{}", cut(graceful)),
            other => panic!("no such question: {other}"),
        }
    }
    process::exit(0);
}

/// Microseconds from the drain deadline until every connection is closed.
fn cut(graceful: &Graceful) -> u128 {
    graceful.shutdown();
    let deadline = Instant::now() + DRAIN;
    let in_flight = graceful.in_flight();
    thread::sleep(DRAIN * 9 / 10);
    assert_eq!(graceful.phase(), Phase::Draining);
    assert_eq!(graceful.in_flight(), in_flight, "before the deadline");
    while graceful.connections() > 0 {
        thread::sleep(Duration::from_micros(500));
    }
    deadline.elapsed().as_micros()
}
