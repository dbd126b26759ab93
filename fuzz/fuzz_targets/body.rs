//! The body of the layer: it passes frames, size hint and end of stream on, except where `GracefulBody`
//! documents a later end. Each request is counted once and ends once.

#![no_main]

use std::{
    collections::VecDeque,
    convert::Infallible,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    pin::Pin,
    sync::{
        LazyLock,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use arbitrary::Arbitrary;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::{Body, Frame, SizeHint};
use libfuzzer_sys::fuzz_target;
use tower::{Layer, Service, service_fn};
use tower_graceful::Graceful;

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Step {
    Data(u16),
    /// 16 KiB is where a last frame no longer ends its request at once.
    AroundTheLimit(i8),
    Pending,
}

#[derive(Arbitrary, Clone, Copy, Debug, PartialEq, Eq)]
enum Ends {
    /// After the last frame `is_end_stream` is true.
    Announced,
    /// Another poll returns `None`.
    Silently,
    Trailers,
    Fails,
    Panics,
    /// The server drops the body before its end.
    Dropped,
}

#[derive(Arbitrary, Debug)]
struct Input {
    named: bool,
    /// The stop begins before this poll.
    stops: Option<u8>,
    knows_length: bool,
    steps: Vec<Step>,
    ends: Ends,
}

struct Scripted {
    steps: VecDeque<Step>,
    ends: Ends,
    knows_length: bool,
    ended: bool,
}

impl Step {
    fn length(self) -> Option<usize> {
        match self {
            Self::Data(length) => Some(length.into()),
            Self::AroundTheLimit(more) => (16 * 1024_usize).checked_add_signed(more.into()),
            Self::Pending => None,
        }
    }
}

impl Scripted {
    fn left(&self) -> usize {
        self.steps.iter().filter_map(|step| step.length()).sum()
    }
}

impl Body for Scripted {
    type Data = Bytes;
    type Error = &'static str;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
        if let Some(step) = self.steps.pop_front() {
            let Some(length) = step.length() else {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            };
            return Poll::Ready(Some(Ok(Frame::data(Bytes::from(vec![b'x'; length])))));
        }
        if self.ended {
            return Poll::Ready(None);
        }
        self.ended = true;
        match self.ends {
            Ends::Announced | Ends::Silently => Poll::Ready(None),
            Ends::Trailers => {
                let mut trailers = HeaderMap::new();
                trailers.insert("ends", HeaderValue::from_static("here"));
                Poll::Ready(Some(Ok(Frame::trailers(trailers))))
            }
            Ends::Fails => Poll::Ready(Some(Err("planned"))),
            // Without the panic hook, which would end the fuzzer.
            Ends::Panics => resume_unwind(Box::new("planned")),
            Ends::Dropped => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        let empty = self.steps.is_empty();
        match self.ends {
            Ends::Announced => empty,
            Ends::Trailers => empty && self.ended,
            _ => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        if self.knows_length {
            SizeHint::with_exact(self.left() as u64)
        } else {
            SizeHint::default()
        }
    }
}

/// What the server sees of one poll.
#[derive(Debug, PartialEq, Eq)]
enum Polled {
    Data(usize),
    Trailers,
    Failed,
    Panicked,
    End,
    Pending,
}

fn poll<B>(body: Pin<&mut B>) -> (Polled, Option<Bytes>)
where
    B: Body<Data = Bytes, Error = &'static str>,
{
    let cx = &mut Context::from_waker(Waker::noop());
    let polled = catch_unwind(AssertUnwindSafe(|| body.poll_frame(cx)));
    match polled {
        Err(_) => (Polled::Panicked, None),
        Ok(Poll::Pending) => (Polled::Pending, None),
        Ok(Poll::Ready(None)) => (Polled::End, None),
        Ok(Poll::Ready(Some(Err(_)))) => (Polled::Failed, None),
        Ok(Poll::Ready(Some(Ok(frame)))) => match frame.into_data() {
            Ok(data) => (Polled::Data(data.len()), Some(data)),
            Err(_) => (Polled::Trailers, None),
        },
    }
}

fn graceful(named: bool) -> Graceful {
    Graceful::builder()
        .name_requests(named)
        .drain_delay(Duration::ZERO)
        .build()
        .unwrap()
}

/// For inputs without a stop. Each lifecycle with a layer leaks some memory on purpose.
static SERVING: LazyLock<[Graceful; 2]> = LazyLock::new(|| [false, true].map(graceful));

/// Inputs with a stop so far, each of which needs a lifecycle of its own.
static STOPS: AtomicUsize = AtomicUsize::new(0);

/// This number of lifecycles leaks less than 500 MB.
const MOST_STOPS: usize = 150_000;

/// Plays the input. Returns what ended the request, and whether the stop found it in flight.
fn play(input: &Input, graceful: &Graceful) -> (Polled, Option<usize>) {
    let mut service = graceful.layer().layer(service_fn(|_: Request<Scripted>| {
        let body = Scripted {
            steps: input.steps.iter().copied().collect(),
            ends: input.ends,
            knows_length: input.knows_length,
            ended: false,
        };
        std::future::ready(Ok::<_, Infallible>(Response::new(body)))
    }));
    let request = Request::new(Scripted {
        steps: VecDeque::new(),
        ends: Ends::Announced,
        knows_length: true,
        ended: false,
    });
    assert_eq!(graceful.in_flight(), 0);
    let mut future = Box::pin(service.call(request));
    assert_eq!(graceful.in_flight(), 1);
    let cx = &mut Context::from_waker(Waker::noop());
    let Poll::Ready(Ok(response)) = future.as_mut().poll(cx) else {
        panic!("no response");
    };
    drop(future);
    let mut body = Box::pin(response.into_body());
    let mut expected: VecDeque<_> = input.steps.iter().copied().collect();
    let mut pieces = Vec::new();
    let (mut last, mut at_stop, mut waited) = (Polled::End, None, false);
    for number in 0..=input.steps.len() + 2 {
        if input
            .stops
            .is_some_and(|stops| usize::from(stops) == number)
        {
            at_stop = Some(graceful.in_flight());
            graceful.shutdown();
        }
        let left: usize = expected.iter().filter_map(|step| step.length()).sum();
        let hint = body.size_hint();
        assert!(hint.lower() <= left as u64, "{hint:?}, {left} left");
        assert!(
            hint.upper().is_none_or(|most| most >= left as u64),
            "{hint:?}, {left} left"
        );
        if input.knows_length {
            assert_eq!(hint.exact(), Some(left as u64));
        }
        let announced = body.is_end_stream();
        if announced {
            // A body that announces its end after it was pending is not polled. Its request ends
            // with the drop.
            assert!(
                waited || graceful.in_flight() == 0,
                "an announced end ends the request"
            );
            assert!(
                expected.iter().all(|step| step.length().is_none()),
                "{expected:?} after the end"
            );
            break;
        }
        assert_eq!(graceful.in_flight(), 1);
        let (polled, piece) = poll(body.as_mut());
        pieces.extend(piece);
        waited = polled == Polled::Pending;
        if let Some(step) = expected.pop_front() {
            let expected = step.length().map_or(Polled::Pending, Polled::Data);
            assert_eq!(polled, expected);
            continue;
        }
        let expected = match input.ends {
            Ends::Announced | Ends::Silently => Polled::End,
            Ends::Trailers => Polled::Trailers,
            Ends::Fails => Polled::Failed,
            Ends::Panics => Polled::Panicked,
            Ends::Dropped => Polled::Pending,
        };
        assert_eq!(polled, expected);
        last = polled;
        break;
    }
    if last != Polled::Pending && !waited {
        assert_eq!(graceful.in_flight(), 0, "{last:?}");
    }
    drop(body);
    drop(pieces);
    assert_eq!(graceful.in_flight(), 0, "after the body was dropped");
    (last, at_stop)
}

fuzz_target!(|input: Input| {
    if input.stops.is_none() {
        play(&input, &SERVING[usize::from(input.named)]);
        return;
    }
    if STOPS.fetch_add(1, Relaxed) > MOST_STOPS {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        let graceful = graceful(input.named);
        let running = graceful.run(graceful.drain_on(std::future::pending()));
        let running = tokio::spawn(running);
        tokio::task::yield_now().await;
        let (last, at_stop) = play(&input, &graceful);
        graceful.shutdown();
        let report = running.await.unwrap();
        let requests = report.requests();
        let in_flight = at_stop.unwrap_or(0);
        assert_eq!(
            (requests.in_flight, requests.admitted),
            (in_flight, 0),
            "{report}"
        );
        if in_flight == 0 {
            return;
        }
        let ended = (requests.finished, requests.dropped, requests.cut);
        match last {
            Polled::Failed | Polled::Panicked => assert_eq!(ended, (0, 1, 0), "{report}"),
            // A client that leaves after the head of a response has had a response.
            _ => assert_eq!(ended, (1, 0, 0), "{report}"),
        }
    });
});
