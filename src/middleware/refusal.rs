//! The answer to a rejected request.
//!
//! While the service drains, the request's body is read before the answer is sent. If a server
//! answered at once and closed the connection, the client's next write would fail, and many clients
//! report that failure without reading the answer. The reading is limited in bytes, in time, and in
//! the number of rejections that read at the same time.
//!
//! Above the in-flight limit the answer is sent at once. An overloaded service that read the
//! uploads it rejects would spend the resources that the limit protects.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use http::{HeaderMap, Method, Request, Response, Version, header, header::Entry};
use http_body::Body;
use pin_project_lite::pin_project;
use tokio::{
    runtime,
    time::{self, Instant, Sleep},
};

use super::connection_close;
use crate::{
    admission::Refused,
    config::{
        policy,
        rejection::{self, Rejection},
    },
    handle::graceful::{Admission, Reading},
    phase::Phase,
    shutdown::Shared,
    waiting::watch_until::WatchUntil,
};

/// How many bytes of a rejected request's body are read, for how long, and how long a silence may
/// last. After that the answer is sent anyway.
const MOST_BYTES: u64 = 16 * 1024 * 1024;
const MOST_TIME: Duration = Duration::from_secs(5);
const MOST_SILENCE: Duration = Duration::from_secs(1);

/// The longest silence for a gRPC call: its stream of messages may stay open without an end.
const GRPC_SILENCE: Duration = Duration::from_millis(50);

/// The answer is sent at the latest this long before the drain deadline.
const BEFORE_DEADLINE: Duration = Duration::from_millis(250);

/// The limits once the drain is over: the answer is sent at the latest this long after that, and
/// this long before the connections are cut.
const AFTER_DRAIN: Duration = Duration::from_millis(500);
const BEFORE_CUT: Duration = Duration::from_millis(150);

/// How many frames one poll reads before it yields to other tasks.
const FRAMES_AT_ONCE: usize = 64;

/// Whether a request is never rejected, because it is for a probe, the preStop route or an exempt
/// path.
pub(super) fn is_exempt<B>(admission: Admission, request: &Request<B>) -> bool {
    let path = request.uri().path();
    let exempts = &admission.rules().exempt;
    let exempt = |path: &str| exempts.iter().any(|exempt| exempt == path);
    admission.leads_to_probe()
        || is_for_route_inside(admission, request)
        || exempt(path)
        || original_path(request).is_some_and(exempt)
}

/// Whether a request is for a probe or the preStop route in a router that the layer wraps as a whole.
/// There the layer cannot see routes, so path and method decide: no router has seen the request, its path
/// is a default path whose route answers this method, and a router with that route exists.
fn is_for_route_inside<B>(admission: Admission, request: &Request<B>) -> bool {
    let (path, method) = (request.uri().path(), request.method());
    let is_answered = if path == policy::PRESTOP {
        policy::is_pre_stop_method(method)
    } else {
        policy::is_probe_path(path) && policy::is_probe_method(method)
    };
    // A route keeps the lifecycle alive, so a missing owner means that there are no routes.
    let has_route = || admission.owner().is_some_and(|it| it.has_route(path));
    is_answered && original_path(request).is_none() && has_route()
}

/// The path before axum's `nest` removed its prefix. Every router of axum records it before it
/// chooses a route.
#[cfg(feature = "axum")]
pub(super) fn original_path<B>(request: &Request<B>) -> Option<&str> {
    let original = request.extensions().get::<axum::extract::OriginalUri>()?;
    Some(original.0.path())
}

#[cfg(not(feature = "axum"))]
pub(super) fn original_path<B>(_: &Request<B>) -> Option<&str> {
    None
}

pub(super) fn refuse<B>(admission: Admission, request: Request<B>, refused: Refused) -> Refusal<B> {
    admission.refused(refused);
    let policy = admission.rules();
    let rejection = Rejection::new(refused, policy.retry_after, &request);
    let grpc = rejection::is_grpc(request.headers());
    let mut response = match &policy.rejection {
        _ if grpc => rejection.grpc(),
        Some(respond) => respond.call(&rejection),
        None => rejection.text(),
    };
    if request.method() == Method::HEAD {
        // Servers drop the body of an answer to HEAD themselves, but not every server does over
        // HTTP/2.
        let length = std::mem::take(response.body_mut()).len();
        let headers = response.headers_mut();
        headers
            .entry(header::CONTENT_LENGTH)
            .or_insert(length.into());
    }
    let headers = response.headers_mut();
    if let Entry::Vacant(entry) = headers.entry(header::RETRY_AFTER) {
        entry.insert(rejection.retry_after_value());
    }
    if refused == Refused::Draining || !headers.contains_key(header::CONNECTION) {
        connection_close::say_close(&mut response, request.version());
    }
    Refusal {
        admission,
        least_phase: refused.least_phase(),
        shared: admission.owner(),
        response: Some(response),
        body: reads_body(refused, &request).then(|| request.into_body()),
        reader: None,
        bytes_left: MOST_BYTES,
        silence: if grpc { GRPC_SILENCE } else { MOST_SILENCE },
        last: None,
        silent_since: None,
        closing: WatchUntil::new(Phase::Closing),
        timer: None,
    }
}

pin_project! {
    /// Reads the request's body within the limits, and then resolves to the answer.
    pub(super) struct Refusal<B> {
        admission: Admission,
        least_phase: Phase,
        // `None`: the lifecycle has no owner any more, and nothing ends the reading early.
        shared: Option<Shared>,
        response: Option<Response<Bytes>>,
        #[pin]
        body: Option<B>,
        // Set at the first poll of the body.
        reader: Option<Reading>,
        bytes_left: u64,
        silence: Duration,
        // When the answer is sent at the latest. Set at the first poll.
        last: Option<Instant>,
        silent_since: Option<Instant>,
        closing: WatchUntil<Phase>,
        #[pin]
        timer: Option<Sleep>,
    }
}

impl<B: Body> Future for Refusal<B> {
    type Output = Response<Bytes>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Response<Bytes>> {
        ready!(self.as_mut().poll_body(cx));
        let mut this = self.project();
        this.body.set(None);
        *this.reader = None;
        this.response.take().map_or(Poll::Pending, Poll::Ready)
    }
}

impl<B: Body> Refusal<B> {
    /// Ready when the body has ended or a limit has been reached.
    fn poll_body(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        let now = Instant::now();
        let phase = this.admission.phase().max(*this.least_phase);
        let shared = this.shared.as_ref();
        let limit = match shared.and_then(|shared| shared.time_left(phase)) {
            left if phase >= Phase::Closing => {
                AFTER_DRAIN.min(left.unwrap_or_default().saturating_sub(BEFORE_CUT))
            }
            Some(left) if phase == Phase::Draining => {
                MOST_TIME.min(left.saturating_sub(BEFORE_DEADLINE))
            }
            _ => MOST_TIME,
        };
        let last = this.last.map_or(now + limit, |last| last.min(now + limit));
        *this.last = Some(last);
        for _ in 0..FRAMES_AT_ONCE {
            let Some(body) = this.body.as_mut().as_pin_mut() else {
                return Poll::Ready(());
            };
            // A body that is too large to be read to its end is not read at all.
            if now >= last || body.is_end_stream() || body.size_hint().lower() > *this.bytes_left {
                return Poll::Ready(());
            }
            if this.reader.is_none() {
                *this.reader = this.admission.begin_reading();
            }
            if this.reader.is_none() {
                return Poll::Ready(());
            }
            match body.poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    *this.silent_since = None;
                    let bytes = frame.data_ref().map_or(0, Buf::remaining) as u64;
                    match this.bytes_left.checked_sub(bytes) {
                        Some(left) => *this.bytes_left = left,
                        None => return Poll::Ready(()),
                    }
                }
                Poll::Ready(Some(Err(_)) | None) => return Poll::Ready(()),
                // Without a runtime there is no timer to limit the wait, so there is no wait.
                Poll::Pending if runtime::Handle::try_current().is_err() => return Poll::Ready(()),
                Poll::Pending => {
                    let silent_since = *this.silent_since.get_or_insert(now);
                    let until = last.min(silent_since + *this.silence);
                    if now >= until {
                        return Poll::Ready(());
                    }
                    // The end of the drain changes the limits, so it must wake this task.
                    if let Some(shared) = shared {
                        let _ = this.closing.poll(cx, || shared.phases());
                    }
                    match this.timer.as_mut().as_pin_mut() {
                        Some(timer) if timer.deadline() == until => {}
                        Some(timer) => timer.reset(until),
                        None => this.timer.set(Some(time::sleep_until(until))),
                    }
                    let timer = this.timer.as_mut().as_pin_mut();
                    return timer.map_or(Poll::Ready(()), |timer| timer.poll(cx));
                }
            }
        }
        // Yields to other tasks.
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// Whether the body of a rejected request is read before the answer is sent.
fn reads_body<B>(refused: Refused, request: &Request<B>) -> bool {
    match refused {
        Refused::Full => false,
        // Reading the body would make the server send `100 Continue`, which this answer replaces.
        Refused::Draining => !expects_continue(request.version(), request.headers()),
    }
}

/// Whether the client waits for `100 Continue` before it sends the body, and the server sends one
/// as soon as the body is read ([RFC 9110
/// §10.1.1](https://www.rfc-editor.org/rfc/rfc9110#section-10.1.1)).
///
/// Over HTTP/1.0 the expectation is ignored. Over HTTP/2 hyper sends no 100, so the client sends
/// the body without one, after a timeout of its own.
fn expects_continue(version: Version, headers: &HeaderMap) -> bool {
    version == Version::HTTP_11
        && headers.get_all(header::EXPECT).iter().any(|value| {
            let mut expectations = value.as_bytes().split(|byte| *byte == b',');
            expectations.any(|it| it.trim_ascii().eq_ignore_ascii_case(b"100-continue"))
        })
}
