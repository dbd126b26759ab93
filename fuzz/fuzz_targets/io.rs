//! Tracked IO passes all reads and writes on unchanged, and after the cut none. It does not pass on that the
//! peer has closed its writing side while a write or flush is blocked.

#![no_main]

use std::{
    collections::VecDeque,
    io::{self, ErrorKind, IoSlice},
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, Waker},
    time::Duration,
};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tower_graceful::{Graceful, GracefulIo, Outcome};

#[derive(Arbitrary, Clone, Debug)]
enum Reads {
    Bytes(Vec<u8>),
    End,
    Pending,
    Fails,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Writes {
    /// Takes at most so many bytes.
    Takes(u8),
    Pending,
    Fails,
}

#[derive(Arbitrary, Clone, Debug)]
enum Operation {
    Read(u8),
    Write(Vec<u8>),
    WriteVectored(Vec<u8>, Vec<u8>),
    Flush,
    Shutdown,
    /// Ends the service with this connection open.
    Cut,
}

#[derive(Arbitrary, Debug)]
struct Input {
    reads: Vec<Reads>,
    writes: Vec<Writes>,
    operations: Vec<Operation>,
}

/// What the wrapped IO was asked for and did.
#[derive(Default)]
struct Script {
    reads: VecDeque<Reads>,
    writes: VecDeque<Writes>,
    read: Vec<u8>,
    written: Vec<u8>,
    calls: usize,
    vectored: usize,
    dropped: bool,
}

struct Scripted(Arc<Mutex<Script>>);

impl Script {
    fn write(&mut self, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.calls += 1;
        match self.writes.pop_front() {
            Some(Writes::Takes(most)) => {
                let taken = buf.len().min(most.into());
                self.written.extend_from_slice(&buf[..taken]);
                Poll::Ready(Ok(taken))
            }
            Some(Writes::Fails) => Poll::Ready(Err(ErrorKind::BrokenPipe.into())),
            Some(Writes::Pending) | None => Poll::Pending,
        }
    }
}

impl AsyncRead for Scripted {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut script = self.0.lock().unwrap();
        script.calls += 1;
        match script.reads.pop_front() {
            Some(Reads::Bytes(bytes)) => {
                let length = bytes.len().min(buf.remaining());
                buf.put_slice(&bytes[..length]);
                script.read.extend_from_slice(&bytes[..length]);
                Poll::Ready(Ok(()))
            }
            Some(Reads::End) => Poll::Ready(Ok(())),
            Some(Reads::Fails) => Poll::Ready(Err(ErrorKind::ConnectionReset.into())),
            Some(Reads::Pending) | None => Poll::Pending,
        }
    }
}

impl AsyncWrite for Scripted {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.0.lock().unwrap().write(buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut script = self.0.lock().unwrap();
        script.vectored += 1;
        let whole: Vec<_> = bufs.iter().flat_map(|buf| buf.iter().copied()).collect();
        script.write(&whole)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.lock().unwrap().write(&[]).map_ok(drop)
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.lock().unwrap().write(&[]).map_ok(drop)
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.0.lock().unwrap().dropped = true;
    }
}

/// The result of an operation, without the bytes.
#[derive(Debug, PartialEq, Eq)]
enum Became {
    Done(usize),
    Pending,
    Failed(ErrorKind),
}

fn became(result: Poll<io::Result<usize>>) -> Became {
    match result {
        Poll::Ready(Ok(length)) => Became::Done(length),
        Poll::Ready(Err(error)) => Became::Failed(error.kind()),
        Poll::Pending => Became::Pending,
    }
}

/// Does one operation, and adds what was read.
fn operate<I>(io: &mut I, operation: &Operation, read: &mut Vec<u8>) -> Became
where
    I: AsyncRead + AsyncWrite + Unpin,
{
    let cx = &mut Context::from_waker(Waker::noop());
    let io = Pin::new(io);
    became(match operation {
        Operation::Read(size) => {
            let mut space = vec![0; usize::from(*size)];
            let mut buf = ReadBuf::new(&mut space);
            let polled = io.poll_read(cx, &mut buf);
            read.extend_from_slice(buf.filled());
            polled.map_ok(|()| buf.filled().len())
        }
        Operation::Write(bytes) => io.poll_write(cx, bytes),
        Operation::WriteVectored(first, second) => {
            let bufs = [IoSlice::new(first), IoSlice::new(second)];
            io.poll_write_vectored(cx, &bufs)
        }
        Operation::Flush => io.poll_flush(cx).map_ok(|()| 0),
        Operation::Shutdown => io.poll_shutdown(cx).map_ok(|()| 0),
        Operation::Cut => return Became::Done(0),
    })
}

fn script(input: &Input) -> (Scripted, Arc<Mutex<Script>>) {
    let script = Arc::new(Mutex::new(Script {
        reads: input.reads.iter().cloned().collect(),
        writes: input.writes.iter().copied().collect(),
        ..Script::default()
    }));
    (Scripted(script.clone()), script)
}

fn tracked(graceful: &Graceful, io: Scripted) -> GracefulIo<Scripted> {
    assert_eq!(graceful.connections(), 0);
    let io = graceful.track(io);
    assert_eq!(graceful.connections(), 1);
    assert!(io.is_write_vectored());
    io
}

fuzz_target!(|input: Input| {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        let graceful = Graceful::builder()
            .drain_delay(Duration::ZERO)
            .drain_timeout(Duration::from_millis(10))
            .build()
            .unwrap();
        let (mut plain, expected) = script(&input);
        let (inner, script) = script(&input);
        let mut io = tracked(&graceful, inner);
        let (mut read, mut expected_read) = (Vec::new(), Vec::new());
        let mut cut = false;
        let (mut blocked, mut shut) = (false, false);
        // An end that the server is not told while a write is blocked. The IO is not asked for it again.
        let mut withheld = false;
        for operation in &input.operations {
            if matches!(operation, Operation::Cut) && !cut {
                cut = true;
                let hold = graceful.hold("keeps the service from ending before the deadline");
                graceful.shutdown();
                // The deadline.
                tokio::time::sleep(Duration::from_millis(20)).await;
                drop(hold);
                continue;
            }
            if cut {
                if matches!(operation, Operation::Cut) {
                    continue;
                }
                let calls = script.lock().unwrap().calls;
                let became = operate(&mut io, operation, &mut read);
                assert_eq!(
                    became,
                    Became::Failed(ErrorKind::ConnectionAborted),
                    "{operation:?}"
                );
                assert_eq!(
                    script.lock().unwrap().calls,
                    calls,
                    "the IO was polled after the cut"
                );
            } else if withheld && matches!(operation, Operation::Read(1..)) {
                let calls = script.lock().unwrap().calls;
                let became = operate(&mut io, operation, &mut read);
                let expected = if blocked {
                    Became::Pending
                } else {
                    Became::Done(0)
                };
                assert_eq!(became, expected);
                assert_eq!(script.lock().unwrap().calls, calls);
                withheld = blocked;
            } else {
                let became = operate(&mut io, operation, &mut read);
                let as_plain = operate(&mut plain, operation, &mut expected_read);
                let end = matches!(operation, Operation::Read(1..)) && as_plain == Became::Done(0);
                let waits = end && blocked && became == Became::Pending;
                assert!(
                    waits || became == as_plain,
                    "{became:?}, {as_plain:?}: {operation:?}"
                );
                withheld |= waits;
                let closes = matches!(operation, Operation::Flush | Operation::Shutdown);
                // After an error of a read or write the IO is asked again.
                withheld &= closes || !matches!(as_plain, Became::Failed(_));
                match (operation, &as_plain) {
                    (Operation::Shutdown, Became::Done(_)) => {
                        (blocked, shut) = (false, true);
                    }
                    (Operation::Read(_) | Operation::Shutdown, _) => {}
                    (Operation::Flush, _) if shut => {}
                    (_, result) => {
                        blocked = *result == Became::Pending;
                        shut = false;
                    }
                }
            }
        }
        {
            let (script, expected) = (script.lock().unwrap(), expected.lock().unwrap());
            assert_eq!(script.read, expected.read);
            assert_eq!(read, expected.read);
            assert_eq!(script.written, expected.written);
            assert_eq!(script.calls, expected.calls);
            assert_eq!(script.vectored, expected.vectored);
            assert!(!script.dropped);
        }
        assert_eq!(graceful.connections(), 1);
        drop(io);
        assert!(script.lock().unwrap().dropped);
        assert_eq!(graceful.connections(), 0);
        graceful.shutdown();
        graceful.stopped().await;
        let report = graceful.run(async {}).await;
        assert_eq!(report.remaining().connections, usize::from(cut), "{report}");
        assert_eq!(report.outcome() == Outcome::Clean, !cut, "{report}");
    });
});
