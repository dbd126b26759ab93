//! The probes: liveness and readiness, for load balancers and orchestrators.
//!
//! Readiness tells whether to send more requests, and liveness whether to restart the process. From
//! the start of a stop readiness fails, and liveness succeeds until the process exits: a process
//! that is draining must not be restarted.

use std::{
    convert::Infallible,
    fmt,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use tower_service::Service;

use super::{connection_close, peer, probe_body::ProbeBody, probe_route::RouteHandle};
use crate::{
    config::policy, handle::graceful::Graceful, phase::Phase, shutdown::leave_early::ProberId,
};

impl Graceful {
    /// A router with `GET /livez` and `GET /readyz`, the paths that Kubernetes itself uses.
    ///
    /// Merge your app into it, or merge or nest it in your app under any prefix, inside or outside the
    /// [layer](Self::layer). The layer never rejects requests to these two routes, and recognizes no
    /// other route as a probe, whatever its path. Outside the layer (merged after `.layer(…)`) the
    /// requests are not counted either. With `graceful.probes().merge(app)` axum's default 404 for
    /// unknown paths stays inside all layers of `app`; with `app.merge(graceful.probes())` it is outside
    /// of them. A fallback of your own is inside or outside, depending on where you add it.
    ///
    /// If the layer wraps a whole router, as in
    /// `ServiceBuilder::new().layer(graceful.layer()).service(app)`, it cannot see routes. It then
    /// never rejects a GET, HEAD or OPTIONS for exactly `/livez` or `/readyz`, so merge the probes at the
    /// root. Other methods are counted and rejected as for any path. The routes are not recognized with
    /// `nest_service`, as a fallback, or below middleware that does not clone the inner service (such as
    /// tower's `Buffer`). Pass their paths to [`exempt`](crate::GracefulBuilder::exempt) there.
    ///
    /// ```
    /// # use axum::Router;
    /// # use tower_graceful::Graceful;
    /// let graceful = Graceful::new();
    /// let app: Router = Router::new()
    ///     // your routes
    ///     .layer(graceful.layer());
    /// let app = graceful.probes().merge(app);
    /// ```
    #[cfg(feature = "axum")]
    pub fn probes<S>(&self) -> axum::Router<S>
    where
        S: Clone + Send + Sync + 'static,
    {
        self.shared().probes.get_or_init(|| ());
        axum::Router::new()
            .route_service(policy::LIVEZ, self.liveness().marked())
            .route_service(policy::READYZ, self.readiness().marked())
    }

    /// The readiness probe as a tower service, for any path and any router. It answers 200 while
    /// the service is ready, and [`unready_status`](crate::GracefulBuilder::unready_status)
    /// otherwise.
    ///
    /// Behind the [layer](Self::layer), on a path of your own, it needs
    /// [`exempt`](crate::GracefulBuilder::exempt). Otherwise the layer rejects its requests like
    /// any others.
    ///
    /// See [`Probe`] for the answers.
    #[must_use]
    pub fn readiness(&self) -> Probe {
        Probe {
            route: RouteHandle::new(self),
            question: Question::Ready,
        }
    }

    /// The liveness probe as a tower service. It answers 200 in every phase.
    ///
    /// See [`Probe`] for the answers.
    #[must_use]
    pub fn liveness(&self) -> Probe {
        Probe {
            route: RouteHandle::new(self),
            question: Question::Alive,
        }
    }
}

/// A probe, made by [`Graceful::readiness`] and [`Graceful::liveness`].
///
/// Answers GET, HEAD and OPTIONS with the same status, over every HTTP version. (HAProxy's `option
/// httpchk` sends `OPTIONS` over HTTP/1.0.) Other methods are answered with 405. The body is one
/// line that names the phase. Every answer carries `Cache-Control: no-store`. Once the service is
/// stopping, HTTP/1 answers carry `Connection: close`. A CORS layer around the probe would answer
/// OPTIONS itself, so that the prober would never see a failure.
///
/// | probe and state | status | body |
/// |---|---|---|
/// | liveness | 200 | the phase |
/// | readiness, serving | 200 | `serving` |
/// | readiness, serving, `set_ready(false)` | `unready_status` | `not ready` |
/// | readiness, from lame duck on | `unready_status` | the phase |
///
/// [Kubernetes](https://kubernetes.io/docs/concepts/configuration/liveness-readiness-startup-probes/)
/// treats 200 to 399 as success, and keeps probing readiness while a pod terminates.
#[derive(Clone)]
pub struct Probe {
    /// A route if [`Graceful::probes`] made this probe.
    route: RouteHandle,
    question: Question,
}

#[derive(Clone, Copy, Debug)]
enum Question {
    Ready,
    Alive,
}

impl Probe {
    /// Marks the probe as a route, which [`probe_route`](super::probe_route) recognizes.
    #[cfg(feature = "axum")]
    fn marked(mut self) -> Self {
        self.route.is_route = true;
        self
    }

    fn answer<B>(&self, request: &Request<B>) -> Response<ProbeBody> {
        let (method, version) = (request.method(), request.version());
        let phase = self.route.graceful.phase();
        self.route.graceful.shared().outside.count_probe();
        let (status, text) = match self.question {
            Question::Alive => (StatusCode::OK, phase.as_str()),
            Question::Ready if self.route.graceful.is_ready() => (StatusCode::OK, phase.as_str()),
            Question::Ready => {
                let unready = self.route.graceful.shared().policy().unready_status;
                let text = match phase {
                    Phase::Serving => "not ready",
                    _ => phase.as_str(),
                };
                (unready, text)
            }
        };
        let known = policy::is_probe_method(method);
        if known && matches!(self.question, Question::Ready) {
            let is_ready = status == StatusCode::OK;
            if is_ready {
                self.route.graceful.shared().mark_served();
            }
            self.note_answer(request, is_ready);
        }
        let status = if known {
            status
        } else {
            StatusCode::METHOD_NOT_ALLOWED
        };
        let mut response = Response::new(ProbeBody::default());
        *response.status_mut() = status;
        if phase > Phase::Serving {
            connection_close::say_close(&mut response, version);
        }
        let headers = response.headers_mut();
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if !known || *method == Method::OPTIONS {
            let allowed = HeaderValue::from_static("GET, HEAD, OPTIONS");
            headers.insert(header::ALLOW, allowed);
        }
        // RFC 9110 §6.4.1: responses with these statuses have no content, and no length either.
        let bodiless = [
            StatusCode::NO_CONTENT,
            StatusCode::RESET_CONTENT,
            StatusCode::NOT_MODIFIED,
        ];
        if bodiless.contains(&status) {
            return response;
        }
        let text = Bytes::from(format!("{text}\n"));
        let utf8 = HeaderValue::from_static("text/plain; charset=utf-8");
        headers.insert(header::CONTENT_TYPE, utf8);
        // Set here because the answer to HEAD has the length of the answer to GET, and no body.
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(text.len()));
        if *method != Method::HEAD {
            response.body_mut().text = Some(text);
        }
        response
    }

    /// Records the answer that a prober received, if the rule for ending the lame-duck phase early
    /// needs it.
    fn note_answer<B>(&self, request: &Request<B>, ready: bool) {
        /// The part of the header or target, in bytes or characters, that distinguishes probers. It
        /// is enough for the probers in use, and bounds the memory.
        const MOST: usize = 128;

        let Some(rule) = self.route.graceful.shared().policy().leave_early.noticed else {
            return;
        };
        let user_agent = request.headers().get(header::USER_AGENT);
        let user_agent = user_agent.map_or(&[][..], HeaderValue::as_bytes);
        let target: String = request.uri().to_string().chars().take(MOST).collect();
        let id = ProberId {
            address: peer::address(request),
            user_agent: user_agent[..user_agent.len().min(MOST)].into(),
            target: target.into(),
        };
        let shared = self.route.graceful.shared();
        if shared.evidence.probe_answered(id, ready, rule) {
            shared.notify();
        }
    }
}

impl<B> Service<Request<B>> for Probe {
    type Response = Response<ProbeBody>;
    type Error = Infallible;
    type Future = ProbeFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> ProbeFuture {
        ProbeFuture(Some(self.answer(&request)))
    }
}

impl fmt::Debug for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Probe")
            .field("question", &self.question)
            .field("graceful", &self.route.graceful)
            .field("is_route", &self.route.is_route)
            .finish()
    }
}

/// The response future of a [`Probe`]. It is ready at once. Polls after it has resolved return
/// `Pending`.
#[derive(Debug)]
#[must_use = "futures do nothing unless polled"]
pub struct ProbeFuture(Option<Response<ProbeBody>>);

impl Future for ProbeFuture {
    type Output = Result<Response<ProbeBody>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        self.0
            .take()
            .map_or(Poll::Pending, |it| Poll::Ready(Ok(it)))
    }
}

#[cfg(all(test, not(tower_graceful_loom)))]
mod tests {
    use http_body::Body;

    use super::*;

    fn request(method: &Method) -> Request<()> {
        Request::builder().method(method).body(()).unwrap()
    }

    #[test]
    fn only_an_answer_that_says_ready_counts_as_service() {
        let graceful = Graceful::new();
        let has_served = || graceful.shared().word().has_served();
        graceful.liveness().answer(&request(&Method::GET));
        graceful.readiness().answer(&request(&Method::POST));
        graceful.set_ready(false);
        graceful.readiness().answer(&request(&Method::GET));
        assert!(!has_served());
        graceful.set_ready(true);
        graceful.readiness().answer(&request(&Method::GET));
        assert!(has_served());
    }

    #[test]
    fn an_answer_has_the_length_and_the_headers_of_its_method() {
        let graceful = Graceful::new();
        for (method, length, allow) in [
            (Method::GET, 8, false),
            (Method::HEAD, 0, false),
            (Method::OPTIONS, 8, true),
            (Method::POST, 8, true),
        ] {
            let response = graceful.liveness().answer(&request(&method));
            let exact = response.body().size_hint().exact();
            assert_eq!(exact, Some(length), "{method}");
            assert_eq!(response.headers().contains_key(header::ALLOW), allow);
        }
    }
}
