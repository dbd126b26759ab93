//! The server of `scale`: a child process with two listeners, one of them with TLS.

use std::{
    io::{BufRead, stdin},
    net::SocketAddr,
    process,
    sync::mpsc,
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
use tokio::{
    net::{TcpListener, TcpStream},
    runtime,
    sync::{
        mpsc::{Receiver, Sender, channel},
        watch,
    },
    time,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tower_graceful::{Graceful, HandshakeExt};

use super::{
    child::{Form, allow_files, status},
    server,
    tls::Identity,
};

/// The argument that makes this program the server.
pub(crate) const ROLE: &str = "--scale-server";

/// Longer than any stop takes.
const DRAIN: Duration = Duration::from_secs(20);

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

/// A WebSocket. When draining starts, it sends a close frame. In plain axum the state is `None`, because axum
/// does not notify its handlers.
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

/// Runs `--scale-server FORM IDENTITY`.
pub(crate) fn run(args: &[String]) {
    let [form, identity] = args else {
        panic!("a form and an identity")
    };
    let acceptor = TlsAcceptor::from(Identity::of(identity).server());
    allow_files();
    let runtime = runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(serve(Form::of(form), acceptor));
    // The process ends without waiting for tasks, in each form.
    process::exit(0);
}

async fn serve(form: Form, acceptor: TlsAcceptor) {
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
