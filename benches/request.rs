//! The time to count what is in flight: the gate alone, a request through layer, guard and body, and a
//! connection. Each is beside peers, and beside no counting at all. Run it with
//! `cargo bench --bench request`.
//!
//! All of them are measured in one run: compare their ratios, since times depend on the machine.

#![allow(missing_docs)] // criterion's macros make undocumented items

use std::{
    io,
    pin::{Pin, pin},
    sync::Weak,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use hyper::server::conn::http1;
use hyper_util::{
    rt::TokioIo,
    server::graceful::{GracefulConnection, GracefulShutdown},
    service::TowerToHyperService,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tower_graceful::Graceful;

use self::peers::{
    Boxed, Handler, Peer, cancellation_token, concurrency_limit, graceful, graceful_limited,
    request_behind_pointers, task_tracker, tower_http,
};

mod peers;

// The gate is private, so the bench includes its sources and what they use. Warnings about them are
// reported when the crate itself is built.
#[allow(warnings, clippy::pedantic)]
#[path = "../src/admission/mod.rs"]
mod admission;
#[allow(warnings, clippy::pedantic)]
#[path = "../src/phase.rs"]
mod phase;
#[allow(warnings, clippy::pedantic)]
#[path = "../src/sync.rs"]
mod sync;

/// The time in which each of `threads` threads calls `once` `times` times.
fn by_threads(threads: usize, times: u64, once: impl Fn() + Sync) -> Duration {
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| (0..times).for_each(|_| once()));
        }
    });
    start.elapsed()
}

fn add(criterion: &mut Criterion, group: &str, name: &str, once: impl Fn() + Sync) {
    let mut group = criterion.benchmark_group(group);
    for threads in [1, 2] {
        group.bench_function(BenchmarkId::new(name, threads), |bencher| {
            bencher.iter_custom(|times| by_threads(threads, times, &once));
        });
    }
    group.finish();
}

fn gate(criterion: &mut Criterion) {
    let unlimited = admission::Gate::<(), ()>::new(None, false, (), &Weak::new());
    let limited = admission::Gate::<(), ()>::new(Some(1_000), false, (), &Weak::new());
    for (name, admission) in [
        ("no limit", unlimited.admission()),
        ("limit", limited.admission()),
    ] {
        add(criterion, "gate", name, || {
            let permit = admission.admit();
            assert!(permit.is_some());
        });
    }
}

fn requests(criterion: &mut Criterion) {
    fn add_peer<P: Peer>(criterion: &mut Criterion, name: &str, peer: &P) {
        add(criterion, "request", name, || request_behind_pointers(peer));
    }

    let peers = criterion;
    add_peer(peers, "no layer", &Boxed);
    add_peer(peers, "tower-http InFlightRequests", &tower_http(Boxed));
    add_peer(peers, "GracefulLayer", &graceful(Boxed));
    add_peer(
        peers,
        "GracefulLayer, max_in_flight",
        &graceful_limited(Boxed),
    );
    add_peer(peers, "tower ConcurrencyLimit", &concurrency_limit(Boxed));
    add_peer(peers, "tokio-util TaskTracker", &task_tracker(Boxed));
    add_peer(
        peers,
        "tokio-util CancellationToken",
        &cancellation_token(Boxed),
    );
}

/// An IO object whose peer sends nothing and reads nothing.
struct Silent;

impl AsyncRead for Silent {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        _: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Poll::Pending
    }
}

impl AsyncWrite for Silent {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Pending
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

fn connection<I>(io: I) -> impl GracefulConnection
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = TowerToHyperService::new(Handler);
    http1::Builder::new().serve_connection(TokioIo::new(io), service)
}

/// Makes a connection, polls it once, and drops it.
fn connections(criterion: &mut Criterion) {
    fn once(connection: impl Future) {
        let mut cx = Context::from_waker(Waker::noop());
        assert!(pin!(connection).poll(&mut cx).is_pending());
    }

    let graceful = Graceful::new();
    let shutdown = GracefulShutdown::new();
    add(criterion, "connection", "not tracked", || {
        once(connection(Silent));
    });
    add(criterion, "connection", "Graceful::track", || {
        once(connection(graceful.track(Silent)));
    });
    add(
        criterion,
        "connection",
        "hyper-util GracefulShutdown",
        || {
            once(shutdown.watch(connection(Silent)));
        },
    );
}

criterion_group!(benches, gate, requests, connections);
criterion_main!(benches);
