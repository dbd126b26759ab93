//! Refusing a request so that its client reads the refusal.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use http::{Request, Response, header, header::Entry};
use http_body::Body;
use pin_project_lite::pin_project;
use tokio::{
    runtime,
    time::{self, Instant, Sleep},
};

use crate::{
    gate::Refused,
    handle::Graceful,
    leaving, policy,
    rejection::{self, Rejection},
};

/// How much of a refused request's body is read, for how long, and through how long a silence,
/// before the answer goes out regardless. Where a server answers at once and closes, the client's
/// next write fails, and many clients report that failure and never read the answer.
const MOST_BYTES: u64 = 16 * 1024 * 1024;
const MOST_TIME: Duration = Duration::from_secs(5);
const MOST_SILENCE: Duration = Duration::from_secs(1);

/// Whether a request is never refused: a probe, or an exempt path.
pub(super) fn is_exempt<B>(graceful: &Graceful, request: &Request<B>) -> bool {
    let exempt = |path: &str| {
        policy::is_probe(path) || graceful.policy().exempt.iter().any(|exempt| exempt == path)
    };
    exempt(request.uri().path()) || original_path(request).is_some_and(exempt)
}

/// The path before axum's `nest` took its prefix off.
#[cfg(feature = "axum")]
fn original_path<B>(request: &Request<B>) -> Option<&str> {
    let original = request.extensions().get::<axum::extract::OriginalUri>()?;
    Some(original.0.path())
}

#[cfg(not(feature = "axum"))]
fn original_path<B>(_: &Request<B>) -> Option<&str> {
    None
}

pub(super) fn refuse<B>(graceful: &Graceful, request: Request<B>, refused: Refused) -> Refusal<B> {
    let policy = graceful.policy();
    let rejection = Rejection::new(refused, policy.retry_after);
    let mut response = match &policy.rejection {
        _ if rejection::is_grpc(request.headers()) => rejection.grpc(),
        Some(respond) => respond.call(&rejection),
        None => rejection.text(),
    };
    let status = response.status();
    let headers = response.headers_mut();
    if let Entry::Vacant(entry) = headers.entry(header::RETRY_AFTER) {
        entry.insert(rejection.retry_after_value());
    }
    if refused == Refused::Draining || !headers.contains_key(header::CONNECTION) {
        leaving::say_close(headers, request.version(), status);
    }
    // RFC 9110 §10.1.1: reading would send the 100 that this answer takes the place of.
    let waits = request
        .headers()
        .get_all(header::EXPECT)
        .iter()
        .any(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"));
    Refusal {
        response: Some(response),
        body: (!waits).then(|| request.into_body()),
        bytes_left: MOST_BYTES,
        started: None,
        waits: false,
        timer: None,
    }
}

pin_project! {
    /// Reads the request's body within bounds, then resolves to the answer.
    pub(super) struct Refusal<B> {
        response: Option<Response<Bytes>>,
        #[pin]
        body: Option<B>,
        bytes_left: u64,
        // When it first had to wait.
        started: Option<Instant>,
        // The timer runs for the present silence, and not for one that is over.
        waits: bool,
        #[pin]
        timer: Option<Sleep>,
    }
}

impl<B: Body> Future for Refusal<B> {
    type Output = Response<Bytes>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Response<Bytes>> {
        let mut this = self.project();
        while let Some(body) = this.body.as_mut().as_pin_mut() {
            // What cannot be read to its end need not be read at all.
            if body.is_end_stream() || body.size_hint().lower() > *this.bytes_left {
                break;
            }
            match body.poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    *this.waits = false;
                    let bytes = frame.data_ref().map_or(0, Buf::remaining) as u64;
                    match this.bytes_left.checked_sub(bytes) {
                        Some(left) => *this.bytes_left = left,
                        None => break,
                    }
                }
                Poll::Ready(Some(Err(_)) | None) => break,
                Poll::Pending => {
                    // Without a clock there is no bound on the wait, so there is no wait.
                    if runtime::Handle::try_current().is_err() {
                        break;
                    }
                    if !*this.waits {
                        *this.waits = true;
                        let now = Instant::now();
                        let last = *this.started.get_or_insert(now) + MOST_TIME;
                        let until = last.min(now + MOST_SILENCE);
                        match this.timer.as_mut().as_pin_mut() {
                            Some(timer) => timer.reset(until),
                            None => this.timer.set(Some(time::sleep_until(until))),
                        }
                    }
                    if let Some(timer) = this.timer.as_mut().as_pin_mut() {
                        ready!(timer.poll(cx));
                    }
                    break;
                }
            }
        }
        this.body.set(None);
        this.response.take().map_or(Poll::Pending, Poll::Ready)
    }
}
