//! The time of a read on a tracked connection, in the lame-duck phase and while serving. In the
//! lame-duck phase the connection also records that something was read.

use std::{
    hint::black_box,
    io,
    pin::Pin,
    sync::Barrier,
    task::{Context, Poll, Waker},
    thread,
    time::{Duration, Instant},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tower_graceful::{Graceful, GracefulIo, Phase};

use super::{
    figures::Figures,
    rows::{Budget, Rows},
};

const READS: u32 = 200_000;
const ROUNDS: usize = 41;

pub(crate) fn measure(rows: &mut Rows) {
    for threads in [1, 2] {
        let (mut serving, mut stopping) = (Vec::new(), Vec::new());
        // Alternately, so that other programs on the machine disturb both alike.
        for _ in 0..ROUNDS {
            serving.push(round(threads, Phase::Serving));
            stopping.push(round(threads, Phase::LameDuck));
        }
        let [serving, stopping] =
            [serving, stopping].map(|times| Figures::new(times).percentile(50));
        rows.add(
            &format!("a read in the lame-duck phase, {threads} threads, ns more than serving"),
            &format!("{stopping:.1} ns"),
            &format!("{serving:.1} ns"),
            stopping - serving,
            Budget::AtMost(2.0),
        );
    }
}

/// Nanoseconds of a read. Each thread reads on a connection of its own, all of one `Graceful`.
fn round(threads: usize, phase: Phase) -> f64 {
    let builder = Graceful::builder().drain_delay(Duration::from_secs(20));
    let graceful = builder.build().expect("a plan that fits");
    let connections: Vec<_> = (0..threads).map(|_| graceful.track(Ready)).collect();
    if phase == Phase::LameDuck {
        graceful.shutdown();
    }
    assert_eq!(graceful.phase(), phase);
    let start = Barrier::new(threads);
    let times = thread::scope(|scope| {
        let readers = connections.into_iter().map(|io| {
            scope.spawn(|| {
                let mut io = io;
                start.wait();
                read(&mut io)
            })
        });
        let readers: Vec<_> = readers.collect();
        let times = readers.into_iter().map(|it| it.join().expect("a time"));
        times.collect()
    });
    Figures::new(times).percentile(50)
}

fn read(io: &mut GracefulIo<Ready>) -> f64 {
    let cx = &mut Context::from_waker(Waker::noop());
    let begun = Instant::now();
    for _ in 0..READS {
        let mut space = [0; 1];
        let mut buf = ReadBuf::new(black_box(&mut space));
        let _ = black_box(Pin::new(&mut *io).poll_read(cx, &mut buf));
    }
    begun.elapsed().as_secs_f64() * 1e9 / f64::from(READS)
}

/// An IO object from which one byte can always be read.
struct Ready;

impl AsyncRead for Ready {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        buf.put_slice(b"x");
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Ready {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
