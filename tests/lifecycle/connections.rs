//! Tracked connections: counted, waited for, cut.

use std::{
    io::{self, ErrorKind, IoSlice},
    pin::{Pin, pin},
    sync::{Arc, Mutex},
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf, duplex, split},
    time::Instant,
};
use tokio_test::{assert_pending, assert_ready, task};
use tower_graceful::{Graceful, GracefulIo, Outcome, Phase};

use crate::support::{
    DEADLINE, DELAY, LET_GO, does_not_hang, graceful, let_others_run, ms, pass, paused_runtime,
    request, s, serve, server, without_delay,
};

/// An IO on which nothing ever happens.
#[derive(Debug)]
struct Stuck;

impl AsyncRead for Stuck {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        _: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Poll::Pending
    }
}

impl AsyncWrite for Stuck {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Pending
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Pending
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Pending
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        _: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Poll::Pending
    }
}

type Operation = fn(Pin<&mut GracefulIo<Stuck>>, &mut Context<'_>) -> Poll<io::Result<()>>;

/// Every operation on a connection.
const OPERATIONS: [(&str, Operation); 5] = [
    ("read", |io, cx| {
        io.poll_read(cx, &mut ReadBuf::new(&mut [0; 8]))
    }),
    ("write", |io, cx| io.poll_write(cx, b"x").map_ok(drop)),
    ("vectored write", |io, cx| {
        io.poll_write_vectored(cx, &[IoSlice::new(b"x")])
            .map_ok(drop)
    }),
    ("flush", |io, cx| io.poll_flush(cx)),
    ("shutdown", |io, cx| io.poll_shutdown(cx)),
];

/// Polls `io` with the waker of `task`.
fn poll(
    task: &mut task::Spawn<()>,
    operation: Operation,
    io: Pin<&mut GracefulIo<Stuck>>,
) -> Poll<io::Result<()>> {
    task.enter(|cx, _| operation(io, cx))
}

fn aborted<T: std::fmt::Debug>(result: io::Result<T>) -> bool {
    result.unwrap_err().kind() == ErrorKind::ConnectionAborted
}

#[test]
fn a_connection_counts_until_it_is_dropped() {
    let graceful = graceful();
    assert_eq!(graceful.connections(), 0);
    let one = graceful.track(());
    let other = graceful.clone().track(());
    assert_eq!(graceful.connections(), 2);
    assert_eq!(graceful.snapshot().connections, 2);
    assert_eq!(graceful.in_flight(), 0);
    drop(one);
    assert_eq!(graceful.connections(), 1);
    let third = graceful.track(());
    assert_eq!(graceful.connections(), 2);
    drop((other, third));
    assert_eq!(graceful.connections(), 0);
}

#[test]
fn a_thousand_connections_tracked_and_dropped_leave_none() {
    let graceful = graceful();
    let mut open: Vec<_> = (0..1000).map(|number| graceful.track(number)).collect();
    assert_eq!(graceful.connections(), 1000);
    // Every second connection first, so that the freed keys are not only the last ones.
    open.retain(|io| io.get_ref() % 2 == 0);
    assert_eq!(graceful.connections(), 500);
    open.extend((0..250).map(|number| graceful.track(number)));
    assert_eq!(graceful.connections(), 750);
    drop(open);
    assert_eq!(graceful.connections(), 0);
}

#[tokio::test(start_paused = true)]
async fn bytes_pass_through_unchanged_until_the_cut() {
    let graceful = graceful();
    let (io, mut peer) = duplex(1024);
    let mut io = graceful.track(io);
    for phase in [Phase::Serving, Phase::LameDuck, Phase::Closing] {
        assert_eq!(graceful.phase(), phase);
        peer.write_all(b"ping").await.unwrap();
        let mut text = [0; 4];
        io.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"ping");
        io.write_all(b"pong").await.unwrap();
        io.flush().await.unwrap();
        peer.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"pong");
        match phase {
            Phase::Serving => graceful.shutdown(),
            _ => pass(DELAY).await,
        }
    }
    io.get_mut().write_all(b"!").await.unwrap();
    drop(io);
    let mut rest = Vec::new();
    peer.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"!");
}

#[tokio::test(start_paused = true)]
async fn stopped_waits_for_a_tracked_connection_and_no_longer() {
    let graceful = graceful();
    let connection = graceful.track(());
    let begun = Instant::now();
    graceful.shutdown();
    pass(s(9)).await;
    assert_eq!(graceful.phase(), Phase::Closing);
    drop(connection);
    let report = graceful.run(server(&graceful)).await;
    assert_eq!(begun.elapsed(), s(9));
    assert_eq!(report.outcome(), Outcome::Clean);
    assert_eq!(report.time_in(Phase::Closing), s(9) - DELAY);
}

#[tokio::test(start_paused = true)]
async fn stopped_waits_for_the_last_of_many_connections() {
    let graceful = graceful();
    for seconds in 1..=8 {
        let connection = graceful.track(());
        tokio::spawn(async move {
            pass(s(seconds)).await;
            drop(connection);
        });
    }
    let begun = Instant::now();
    graceful.shutdown();
    graceful.stopped().await;
    assert_eq!(begun.elapsed(), s(8));
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_came_during_the_shutdown_is_waited_for_too() {
    let graceful = graceful();
    let first = graceful.track(());
    let begun = Instant::now();
    graceful.shutdown();
    pass(s(6)).await;
    let late = graceful.track(());
    drop(first);
    pass(s(1)).await;
    assert_eq!(graceful.phase(), Phase::Closing);
    drop(late);
    graceful.stopped().await;
    assert_eq!(begun.elapsed(), s(7));
}

#[tokio::test(start_paused = true)]
async fn connections_still_open_at_the_deadline_are_reported() {
    let graceful = graceful();
    let _open = [graceful.track(()), graceful.track(()), graceful.track(())];
    let run = serve(&graceful, server(&graceful)).await;
    graceful.shutdown();
    let report = run.await.unwrap();
    assert_eq!(report.outcome(), Outcome::Forced);
    assert_eq!(report.remaining().connections, 3);
    assert_eq!(report.remaining().requests, 0);
    assert_eq!(report.duration(), DEADLINE + LET_GO);
    let ages = report.connections_cut().iter().map(|cut| cut.age);
    assert_eq!(ages.collect::<Vec<_>>(), [DEADLINE; 3]);
    let text = report.to_string();
    assert!(text.contains("given up: 3 connections\n"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn at_the_deadline_every_operation_that_waits_is_woken_and_fails() {
    for (name, operation) in OPERATIONS {
        let graceful = graceful();
        let mut io = pin!(graceful.track(Stuck));
        let mut waiting = task::spawn(());
        assert_pending!(poll(&mut waiting, operation, io.as_mut()), "{name}");
        graceful.shutdown();
        pass(DEADLINE - ms(1)).await;
        assert_pending!(poll(&mut waiting, operation, io.as_mut()), "{name}");
        pass(ms(1)).await;
        assert!(waiting.is_woken(), "{name}");
        for _ in 0..3 {
            assert!(
                aborted(assert_ready!(poll(&mut waiting, operation, io.as_mut()))),
                "{name}"
            );
        }
    }
}

#[tokio::test(start_paused = true)]
async fn at_the_deadline_operations_fail_that_were_not_waiting() {
    let graceful = graceful();
    let mut io = pin!(graceful.track(Stuck));
    graceful.shutdown();
    pass(DEADLINE).await;
    for (name, operation) in OPERATIONS {
        let mut fresh = task::spawn(());
        let result = poll(&mut fresh, operation, io.as_mut());
        assert!(aborted(assert_ready!(result)), "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_cut_wakes_both_halves_of_a_connection_in_two_tasks() {
    let graceful = graceful();
    let (io, _peer) = duplex(16);
    let (mut read, mut write) = split(graceful.track(io));
    let reader = tokio::spawn(async move {
        let error = read.read_u8().await.unwrap_err();
        (error.kind(), Instant::now(), read)
    });
    let writer = tokio::spawn(async move {
        let error = write.write_all(&[0; 64]).await.unwrap_err();
        (error.kind(), Instant::now(), write)
    });
    let_others_run().await;
    let begun = Instant::now();
    graceful.shutdown();
    let (kind, at, _read) = reader.await.unwrap();
    assert_eq!((kind, at - begun), (ErrorKind::ConnectionAborted, DEADLINE));
    let (kind, at, _write) = writer.await.unwrap();
    assert_eq!((kind, at - begun), (ErrorKind::ConnectionAborted, DEADLINE));
    assert_eq!(graceful.connections(), 1, "until both halves are dropped");
}

#[tokio::test(start_paused = true)]
async fn the_cut_wakes_the_task_that_polled_last() {
    let graceful = graceful();
    let mut io = pin!(graceful.track(Stuck));
    let (_, read) = OPERATIONS[0];
    let mut first = task::spawn(());
    let mut second = task::spawn(());
    assert_pending!(poll(&mut first, read, io.as_mut()));
    assert_pending!(poll(&mut second, read, io.as_mut()));
    graceful.shutdown();
    pass(DEADLINE).await;
    assert!(second.is_woken());
}

#[tokio::test(start_paused = true)]
async fn connections_are_not_cut_before_the_deadline_although_nothing_is_in_flight() {
    let graceful = graceful();
    let (io, mut peer) = duplex(16);
    let mut io = graceful.track(io);
    graceful.shutdown();
    pass(DEADLINE - ms(1)).await;
    assert_eq!(graceful.phase(), Phase::Closing);
    io.write_all(b"x").await.unwrap();
    assert_eq!(peer.read_u8().await.unwrap(), b'x');
    pass(ms(1)).await;
    assert!(aborted(io.write_all(b"x").await));
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_ends_because_of_the_cut_ends_the_service_at_once() {
    let graceful = graceful();
    let (io, _peer) = duplex(16);
    let mut io = graceful.track(io);
    let held = request(&graceful);
    tokio::spawn(async move {
        let _ = io.read_u8().await;
        drop((io, held));
    });
    let run = serve(&graceful, server(&graceful)).await;
    let begun = Instant::now();
    graceful.shutdown();
    let report = run.await.unwrap();
    assert_eq!(begun.elapsed(), DEADLINE);
    assert_eq!(report.outcome(), Outcome::Forced);
    assert_eq!(report.remaining().connections, 1);
    assert_eq!(report.remaining().requests, 1);
    // The server was notified a little earlier, and had nothing else to wait for.
    assert_eq!(report.remaining().servers, 0);
}

#[tokio::test(start_paused = true)]
async fn a_connection_tracked_after_the_cut_fails_from_the_start() {
    let graceful = graceful();
    let _held = request(&graceful);
    graceful.shutdown();
    pass(DEADLINE).await;
    assert_eq!(graceful.phase(), Phase::Closing);
    for _ in 0..2 {
        let (io, mut peer) = duplex(16);
        let mut io = graceful.track(io);
        peer.write_all(b"x").await.unwrap();
        assert!(aborted(io.read_u8().await));
        assert!(aborted(io.write_all(b"x").await));
        assert!(aborted(io.flush().await));
        assert!(aborted(io.shutdown().await));
        graceful.stopped().await;
    }
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_connections_are_all_cut_at_the_deadline() {
    let graceful = graceful();
    let begun = Instant::now();
    let tasks: Vec<_> = (0..10_000)
        .map(|_| {
            let mut io = graceful.track(Stuck);
            tokio::spawn(async move { aborted(io.read_u8().await) })
        })
        .collect();
    graceful.shutdown();
    graceful.stopped().await;
    assert_eq!(begun.elapsed(), DEADLINE);
    assert_eq!(graceful.connections(), 0);
    for task in tasks {
        assert!(task.await.unwrap());
    }
}

/// Records the bytes that are written to it.
#[derive(Debug, Default)]
struct Recorder {
    vectored: bool,
    slices: Arc<Mutex<Vec<usize>>>,
}

impl AsyncWrite for Recorder {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.slices.lock().unwrap().push(1);
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.slices.lock().unwrap().push(bufs.len());
        Poll::Ready(Ok(bufs.iter().map(|buf| buf.len()).sum()))
    }

    fn is_write_vectored(&self) -> bool {
        self.vectored
    }
}

#[tokio::test(start_paused = true)]
async fn vectored_writes_reach_the_wrapped_io_as_they_are() {
    let graceful = graceful();
    for vectored in [true, false] {
        let recorder = Recorder {
            vectored,
            ..Recorder::default()
        };
        let slices = Arc::clone(&recorder.slices);
        let mut io = graceful.track(recorder);
        assert_eq!(io.is_write_vectored(), vectored);
        let bufs = [
            IoSlice::new(b"ab"),
            IoSlice::new(b"c"),
            IoSlice::new(b"def"),
        ];
        assert_eq!(io.write_vectored(&bufs).await.unwrap(), 6);
        assert_eq!(*slices.lock().unwrap(), [3]);
    }
}

/// A waker that reads the state of the service, as the waker of an instrumented executor may.
struct Curious(Graceful, Mutex<Vec<Phase>>);

impl Wake for Curious {
    fn wake(self: Arc<Self>) {
        let phase = self.0.snapshot().phase;
        self.1.lock().unwrap().push(phase);
    }
}

#[test]
fn a_waker_that_asks_for_the_state_at_the_cut_is_answered() {
    does_not_hang(|| {
        let graceful = without_delay();
        let curious = Arc::new(Curious(graceful.clone(), Mutex::default()));
        let waker = Waker::from(Arc::clone(&curious));
        let (_, read) = OPERATIONS[0];
        let mut io = pin!(graceful.track(Stuck));
        assert_pending!(read(io.as_mut(), &mut Context::from_waker(&waker)));
        paused_runtime().block_on(async {
            graceful.shutdown();
            graceful.stopped().await;
        });
        assert_eq!(curious.1.lock().unwrap().len(), 1);
    });
}

#[tokio::test(start_paused = true)]
async fn a_waker_that_panics_does_not_keep_other_connections_from_being_cut() {
    let graceful = without_delay();
    let waker = crate::wakers::panicking();
    let (_, read) = OPERATIONS[0];
    let (_, write) = OPERATIONS[1];
    let mut first = pin!(graceful.track(Stuck));
    assert_pending!(read(first.as_mut(), &mut Context::from_waker(&waker)));
    let mut second = pin!(graceful.track(Stuck));
    let mut reader = task::spawn(());
    let mut writer = task::spawn(());
    // The connection has two wakers, and the first of them panics.
    assert_pending!(read(second.as_mut(), &mut Context::from_waker(&waker)));
    assert_pending!(poll(&mut writer, write, second.as_mut()));
    let mut third = pin!(graceful.track(Stuck));
    assert_pending!(poll(&mut reader, read, third.as_mut()));
    graceful.shutdown();
    graceful.stopped().await;
    assert!(writer.is_woken());
    assert!(reader.is_woken());
    for io in [first, second, third] {
        let after = task::spawn(()).enter(|cx, _| read(io, cx));
        assert!(aborted(assert_ready!(after)));
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_tracked_after_a_clean_stop_does_not_live_on() {
    let graceful = without_delay();
    graceful.shutdown();
    assert_eq!(graceful.phase(), Phase::Stopped);
    let (io, _peer) = duplex(16);
    let mut io = graceful.track(io);
    let read = tokio::time::timeout(Duration::from_secs(60), io.read_u8()).await;
    assert!(aborted(read.expect("it is never cut")));
}
