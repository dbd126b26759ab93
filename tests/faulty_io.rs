//! Connections whose IO fails, panics or hangs. Such a connection ends, and no other connection is affected.

#![cfg(all(feature = "axum", feature = "signal"))]

mod pipes;
mod waits;

use std::{
    fmt, io,
    panic::resume_unwind,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::{Router, body::Bytes, routing::any};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, duplex},
    sync::mpsc,
    task::JoinHandle,
    time::timeout,
};
use tower_graceful::{Graceful, Outcome, Report};

use crate::{
    pipes::Pipes,
    waits::{BOUND, wait_for},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Read,
    Write,
    Flush,
    Shutdown,
    Drop,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Errors,
    Panics,
    /// Pending, without a wake-up.
    Hangs,
}

/// The call that goes wrong, how, and after how many calls that succeed.
#[derive(Clone, Copy, Debug)]
struct Fault {
    call: Call,
    how: How,
    after: u32,
}

struct Faulty {
    io: DuplexStream,
    fault: Option<Fault>,
    /// How many faults there have been.
    met: Arc<AtomicU32>,
}

impl Faulty {
    fn meets<T>(&mut self, call: Call) -> Option<Poll<io::Result<T>>> {
        let fault = self.fault.as_mut().filter(|fault| fault.call == call)?;
        if fault.after > 0 {
            fault.after -= 1;
            return None;
        }
        self.met.fetch_add(1, Ordering::Relaxed);
        match fault.how {
            How::Errors => Some(Poll::Ready(Err(io::Error::other("faulty")))),
            // `resume_unwind` prints no message on the test's output.
            How::Panics => resume_unwind(Box::new("faulty")),
            How::Hangs => Some(Poll::Pending),
        }
    }
}

impl Drop for Faulty {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = self.meets::<()>(Call::Drop);
        }
    }
}

impl AsyncRead for Faulty {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.meets(Call::Read) {
            Some(fault) => fault,
            None => Pin::new(&mut self.io).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Faulty {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.meets(Call::Write) {
            Some(fault) => fault,
            None => Pin::new(&mut self.io).poll_write(cx, buf),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.meets(Call::Flush) {
            Some(fault) => fault,
            None => Pin::new(&mut self.io).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.meets(Call::Shutdown) {
            Some(fault) => fault,
            None => Pin::new(&mut self.io).poll_shutdown(cx),
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Form {
    Serve,
    Run,
}

struct Server {
    graceful: Graceful,
    gives: mpsc::UnboundedSender<Faulty>,
    report: JoinHandle<Report>,
    met: Arc<AtomicU32>,
}

impl Server {
    fn start(form: Form) -> Self {
        let graceful = Graceful::builder()
            .drain_delay(Duration::ZERO)
            .drain_timeout(Duration::from_millis(300))
            .build()
            .unwrap();
        let app = Router::new()
            .route("/", any(|body: Bytes| async move { body }))
            .layer(graceful.layer());
        let (gives, receiver) = mpsc::unbounded_channel();
        let listener = Pipes(receiver);
        let report = match form {
            Form::Serve => tokio::spawn(graceful.serve(listener, app).into_future()),
            Form::Run => {
                let server = axum::serve(graceful.listener(listener), app)
                    .with_graceful_shutdown(graceful.drain());
                tokio::spawn(graceful.run(server))
            }
        };
        Self {
            graceful,
            gives,
            report,
            met: Arc::default(),
        }
    }

    fn connect(&self, fault: Option<Fault>) -> DuplexStream {
        let (client, io) = duplex(64 * 1024);
        let met = Arc::clone(&self.met);
        assert!(self.gives.send(Faulty { io, fault, met }).is_ok());
        client
    }

    async fn assert_serves(&self) {
        let mut client = self.connect(None);
        client.write_all(&h1("close")).await.unwrap();
        let mut answer = String::new();
        let read = timeout(BOUND, client.read_to_string(&mut answer)).await;
        assert!(
            read.unwrap().is_ok() && answer.ends_with("whole"),
            "{answer}"
        );
    }

    async fn wait_for_none(&self, what: &dyn fmt::Debug) {
        let left = || (self.graceful.connections(), self.graceful.in_flight());
        wait_for(format_args!("{what:?}: {:?}", self.graceful), || {
            left() == (0, 0)
        })
        .await;
    }
}

fn h1(connection: &str) -> Vec<u8> {
    let head = "POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 5\r\nconnection: ";
    format!("{head}{connection}\r\n\r\nwhole").into_bytes()
}

/// The preface, empty SETTINGS, and a request for `/`.
fn h2() -> Vec<u8> {
    let request = b"\0\0\x09\x01\x05\0\0\0\x01\x82\x86\x84\x01\x04test";
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
        &request[..],
    ]
    .concat()
}

fn faults(how: How) -> impl Iterator<Item = Fault> {
    let calls = [
        Call::Read,
        Call::Write,
        Call::Flush,
        Call::Shutdown,
        Call::Drop,
    ];
    let faults = calls
        .into_iter()
        .flat_map(move |call| (0..5).map(move |after| Fault { call, how, after }));
    faults.filter(|fault| fault.call != Call::Drop || fault.after == 0)
}

/// Faults while the service is serving: each client sends its request, reads the response, and closes.
async fn ends_only_its_own_connection(form: Form, how: How) {
    let server = Server::start(form);
    for fault in faults(how) {
        let met = server.met.load(Ordering::Relaxed);
        for request in [h1("keep-alive"), h1("close"), h2()] {
            let mut client = server.connect(Some(fault));
            // The reader may be gone.
            let _ = client.write_all(&request).await;
            let mut piece = [0; 1024];
            let read = async { while matches!(client.read(&mut piece).await, Ok(1..)) {} };
            let _ = timeout(Duration::from_millis(3), read).await;
            drop(client);
            server
                .wait_for_none(&(fault, String::from_utf8_lossy(&request)))
                .await;
        }
        let met = server.met.load(Ordering::Relaxed) - met;
        assert!(met > 0 || fault.after > 0, "{fault:?} was not met");
    }
    server.assert_serves().await;
    server.graceful.shutdown();
    let report = timeout(BOUND, server.report).await.unwrap().unwrap();
    assert_eq!(report.outcome(), Outcome::Clean, "{report}");
}

/// Faults during the stop: the clients keep their connections, so that a fault may occur when the service closes
/// or cuts them.
async fn ends_by_the_deadline(form: Form, how: How) {
    let server = Server::start(form);
    let mut clients = Vec::new();
    for fault in faults(how) {
        for request in [h1("keep-alive"), h1("close"), h2(), b"POST / HT".to_vec()] {
            let mut client = server.connect(Some(fault));
            let _ = client.write_all(&request).await;
            clients.push(client);
        }
    }
    server.assert_serves().await;
    let begun = std::time::Instant::now();
    server.graceful.shutdown();
    let report = timeout(BOUND, server.report).await.unwrap().unwrap();
    let took = begun.elapsed();
    // The plan has 550 ms. The machine may be busy.
    assert!(took < Duration::from_secs(3), "{took:?}: {report}");
    let expected = [Outcome::Clean, Outcome::Forced];
    assert!(expected.contains(&report.outcome()), "{report}");
    assert_eq!(server.graceful.connections(), 0, "{report}");
    assert_eq!(server.graceful.in_flight(), 0, "{report}");
    drop(clients);
}

#[tokio::test(flavor = "multi_thread")]
async fn io_that_fails_takes_only_its_connection_with_it() {
    for form in [Form::Serve, Form::Run] {
        ends_only_its_own_connection(form, How::Errors).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn io_that_panics_takes_only_its_connection_with_it() {
    for form in [Form::Serve, Form::Run] {
        ends_only_its_own_connection(form, How::Panics).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn io_that_fails_does_not_outlast_the_deadline() {
    for form in [Form::Serve, Form::Run] {
        ends_by_the_deadline(form, How::Errors).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn io_that_panics_does_not_outlast_the_deadline() {
    for form in [Form::Serve, Form::Run] {
        ends_by_the_deadline(form, How::Panics).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn io_that_hangs_does_not_outlast_the_deadline() {
    for form in [Form::Serve, Form::Run] {
        ends_by_the_deadline(form, How::Hangs).await;
    }
}
