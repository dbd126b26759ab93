//! The knobs.

use std::time::Duration;

use bytes::Bytes;
use http::{Response, StatusCode};

use super::graceful::Graceful;
use crate::config::{
    plan::{ConfigError, Knobs, Plan},
    policy::{Policy, SHARED_DELAY},
    rejection::{Rejection, RejectionFn},
};

impl Graceful {
    /// A lifecycle with a plan of your own. See [`GracefulBuilder`].
    pub fn builder() -> GracefulBuilder {
        GracefulBuilder::default()
    }
}

/// Sets up a [`Graceful`]. Made by [`Graceful::builder`].
///
/// # The budget
///
/// [`grace_period`](Self::grace_period) is the one number that must agree with whoever would kill
/// the process: `terminationGracePeriodSeconds` in Kubernetes, `TimeoutStopSec` in systemd. Delay,
/// drain and cleanup are shares of it, laid end to end from the trigger:
///
/// ```text
/// trigger                                                          SIGKILL
///    |-- drain_delay --|-- drain_timeout --|-- cleanup_timeout --|-- margin --|
///    |------------------------------ grace_period ---------------------------|
/// ```
///
/// Time that a share does not use is left to the next. What is not set is derived from the grace
/// period:
///
/// | share | default | of 30 s |
/// |---|---|---|
/// | `drain_delay` | a sixth, at most 5 s (500 ms with a shared listener) | 5 s |
/// | `drain_timeout` | all the rest | 19 s |
/// | `cleanup_timeout` | a sixth, at most 5 s; less where what you set leaves less | 5 s |
/// | margin | a thirtieth, at most 1 s | 1 s |
///
/// Nothing is planned into the margin, so that the process can report and exit before it is
/// killed. Shares that fill the grace period to the end are accepted, and their last deadlines
/// fall on the margin's start. Shares that do not fit are an error:
///
/// ```
/// use std::time::Duration;
/// use tower_graceful::Graceful;
///
/// let error = Graceful::builder()
///     .grace_period(Duration::from_secs(10))
///     .drain_delay(Duration::from_secs(5))
///     .drain_timeout(Duration::from_secs(15))
///     .build()
///     .unwrap_err();
/// assert!(error.to_string().contains("drain_timeout 15s"));
/// ```
#[derive(Clone, Debug, Default)]
#[must_use = "a builder does nothing until `build` is called"]
pub struct GracefulBuilder {
    knobs: Knobs,
    max_in_flight: Option<usize>,
    name_requests: bool,
    #[cfg(all(unix, feature = "signal"))]
    watchdog: bool,
    policy: Policy,
}

impl GracefulBuilder {
    /// The time from the trigger to the moment the process would be killed. Everything fits inside
    /// it. Default: 30 s, [Kubernetes' own][k8s]. `Duration::MAX` means no end.
    ///
    /// [k8s]: https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/#pod-termination
    pub fn grace_period(mut self, duration: Duration) -> Self {
        self.knobs.grace_period = Some(duration);
        self
    }

    /// How long the service goes on serving after SIGTERM or
    /// [`shutdown`](Graceful::shutdown), so that balancers see the failing readiness and look
    /// away. Zero starts draining at once.
    ///
    /// Default: 5 s, or a sixth of a grace period below 30 s; 500 ms at most where the next process
    /// has the listening socket ([`shared_listener`](Self::shared_listener)). Set it to what your balancer needs:
    /// the probe's interval times the number of failures it waits for, or, in Kubernetes, the time
    /// an endpoint's removal takes to reach every node.
    pub fn drain_delay(mut self, duration: Duration) -> Self {
        self.knobs.drain_delay = Some(duration);
        self
    }

    /// The delay when the trigger is SIGINT (Ctrl-C). Default: zero, because a person at a
    /// terminal is not a load balancer.
    pub fn interrupt_delay(mut self, duration: Duration) -> Self {
        self.knobs.interrupt_delay = Some(duration);
        self
    }

    /// How long requests in flight may take to finish, counted from the end of the delay; time
    /// that the delay did not use is added. What is in flight after that is cut, and the outcome
    /// is [`Forced`](crate::Outcome::Forced). Default: what the other shares leave, 19 s of 30 s.
    pub fn drain_timeout(mut self, duration: Duration) -> Self {
        self.knobs.drain_timeout = Some(duration);
        self
    }

    /// The share that is kept for what comes after the drain. The drain cannot use it up.
    pub fn cleanup_timeout(mut self, duration: Duration) -> Self {
        self.knobs.cleanup_timeout = Some(duration);
        self
    }

    /// How long [workers](Graceful::worker) are waited for, once nothing else is in flight. Default,
    /// and most: what is left of the grace period then, less the bounds of the cleanup steps, for
    /// which up to half of it is kept.
    pub fn worker_timeout(mut self, duration: Duration) -> Self {
        self.policy.worker_timeout = Some(duration);
        self
    }

    /// Remembers method, path and start of every request in flight, so that the progress line
    /// names the oldest one, and the report those that were cut. Default: no.
    ///
    /// The path is kept without its query. It costs each request three turns of a lock that all
    /// share and three allocations, about a thousand instructions in all. Off, it costs nothing.
    pub fn name_requests(mut self, name: bool) -> Self {
        self.name_requests = name;
        self
    }

    /// Has a thread of its own end the process with exit code 1 when the grace period is over but
    /// for half of its margin, if the service has not stopped by then: even when every thread of
    /// the runtime is blocked, also when it was before the signal came. It says on standard error
    /// how far the service had come. Default: no.
    ///
    /// That end is an immediate one: destructors, cleanup steps that have not begun and buffers
    /// that are not flushed are skipped, and no [`Report`](crate::Report) is returned. The thread that
    /// does it is started by [`build`](Self::build). A service that has [stopped](Graceful::stopped)
    /// is watched no longer, unless something that was given up has not ended and may hold the runtime:
    /// a handler that blocks its thread. What else `main` waits for after that, such as `spawn_blocking`
    /// work at the end of the runtime, is not watched. For that there is
    /// [`Report::exit`](crate::Report::exit).
    #[cfg(all(unix, feature = "signal"))]
    pub fn watchdog(mut self, watch: bool) -> Self {
        self.watchdog = watch;
        self
    }

    /// The most requests that may be in flight at once; the next one is refused with 429. A
    /// request counts until its response body has ended. The refusal answers at once, without reading
    /// the request's body. A client that is still sending reads the answer if the server lets the
    /// connection linger, as it does where connections are tracked. One limit for everything behind this
    /// lifecycle's layers, however many routes and clones there are. Default: no limit.
    ///
    /// Probes and [exempt](Self::exempt) paths are served above the limit too.
    pub fn max_in_flight(mut self, requests: usize) -> Self {
        self.max_in_flight = Some(requests);
        self
    }

    /// What [`drain`](Graceful::drain) and [`drain_on`](Graceful::drain_on) wait for.
    ///
    /// True, the default: until nothing is in flight, at the drain deadline at the latest. The
    /// listener stays open while draining, and who connects is told 503 with `Retry-After`.
    ///
    /// False: until draining starts. The listener closes then, and who connects is refused by the
    /// operating system, which most balancers retry elsewhere while few retry a 503.
    pub fn keep_listening(mut self, keep: bool) -> Self {
        self.policy.keep_listening = keep;
        self
    }

    /// Whether the listening sockets outlive this process, because the next one accepts from them too.
    /// Use it for restarts on one machine without a load balancer: systemd socket activation, a
    /// supervisor that owns the socket, a restart in place, worker processes that share a listener.
    ///
    /// True: from the start of the stop, the lame-duck phase, every listener of this lifecycle stops
    /// accepting and closes its descriptor. Nothing is changed on the socket, and its accept queue is
    /// left as it is, so that the next process accepts what connects. The connections that exist are
    /// served and asked to leave. When the delay is over, or every connection has closed, idle
    /// connections are closed and draining starts, as with
    /// [`keep_listening(false)`](Self::keep_listening).
    ///
    /// False: listeners accept until draining or the end of it, as
    /// [`keep_listening`](Self::keep_listening) has it.
    ///
    /// Default: true for a `TcpListener` or `UnixListener` that was passed to the process by socket
    /// activation, and false for any other (see below).
    ///
    /// ```
    /// use tower_graceful::{ConfigError, Graceful};
    ///
    /// let graceful = Graceful::builder().shared_listener(true).build()?;
    /// assert_eq!(graceful.plan().drain_delay.as_millis(), 500);
    /// # Ok::<(), ConfigError>(())
    /// ```
    ///
    /// | what keeps the socket | this option | what connects during the stop |
    /// |---|---|---|
    /// | systemd socket activation, `systemd-socket-activate`, `systemfd` | set by itself | waits in the queue until the next process has started |
    /// | circus, or another supervisor that names the descriptor in its own way | `true` | is accepted by another worker, or waits |
    /// | a restart in place by `ecdysis` or the like | `true` | is accepted by the new process, which runs already |
    /// | prefork: a parent binds, its children accept | `true` | is accepted by another child |
    /// | nothing: the process binds the port itself | leave it out | |
    ///
    /// With `true` where no other process has the socket, clients are refused as soon as the stop
    /// begins.
    ///
    /// # The delay
    ///
    /// There is no balancer to wait for, so the default of [`drain_delay`](Self::drain_delay) is 500 ms
    /// here, or [`close_spread`](Self::close_spread) if that is longer, and never more than it is
    /// otherwise. It lets keep-alive clients move by a response with `Connection: close`. An HTTP/1
    /// connection that is closed while idle loses a request that crosses the close
    /// ([RFC 9112 §9.5](https://www.rfc-editor.org/rfc/rfc9112#section-9.5)). The phase ends before the
    /// delay if every connection has closed. Where the next process is started only after this one has
    /// ended, new connections wait for the whole stop: a shorter delay shortens that wait, and a
    /// listen backlog that is too small for it costs clients a second.
    ///
    /// # Socket activation
    ///
    /// On Linux a listener is recognised if its socket is one of those that `LISTEN_FDS` and
    /// `LISTEN_PID` name
    /// ([`sd_listen_fds(3)`](https://www.freedesktop.org/software/systemd/man/latest/sd_listen_fds.html)),
    /// also where a library has removed the variables or duplicated the descriptor. Set the option
    /// where the passed descriptor was closed before the listener is given to this crate, where a
    /// listener of another type wraps the passed one, and on other systems. Variables that name
    /// another process, too many descriptors, or files that are not sockets make no listener a shared
    /// one. If some listeners of a lifecycle are shared and others are not, each closes at its own
    /// time, and the delay is that of the others.
    ///
    /// # Limits
    ///
    /// - Only listeners of [`serve`](Graceful::serve) and [`listener`](Graceful::listener) are closed
    ///   early. A server with nothing but [`drain`](Graceful::drain) accepts until draining starts.
    /// - A listener that wraps another one may be in the middle of a handshake, and so continues to
    ///   accept for 60 ms. Use [`handshakes`](crate::HandshakeExt::handshakes) instead: its handshakes
    ///   are finished, and the listener below closes at once.
    /// - On axum's server, idle connections are closed without a last look at what has arrived. Prefer
    ///   `serve`.
    /// - If another process shuts the socket down (`shutdown(2)`), nothing is accepted any more. The
    ///   listener logs the error and tries again each second; the stop works as ever.
    pub fn shared_listener(mut self, shared: bool) -> Self {
        self.policy.shared_listener = Some(shared);
        self
    }

    /// Over how much of the lame-duck phase clients are asked to leave, from its start. At first
    /// none is, at half of it half of them, and from its end on everybody, so that ten thousand
    /// clients do not connect anew in the same instant. Must not be longer than
    /// [`drain_delay`](Self::drain_delay); where another delay is shorter the rest are asked when
    /// it ends. Default: zero, everyone is asked with the next response.
    ///
    /// On a server of [`serve`](Graceful::serve) every connection has a turn of its own, and its
    /// responses before that ask nothing; over HTTP/2 it is asked when its turn comes, also
    /// without a response. On other servers every response over HTTP/1 has a turn.
    pub fn close_spread(mut self, duration: Duration) -> Self {
        self.policy.close_spread = duration;
        self
    }

    /// Over how much of the drain long-lived work is told to end, from its start:
    /// [`draining`](Graceful::draining) resolves, and
    /// [`until_draining`](Graceful::until_draining) ends its stream, for one after another, evenly,
    /// in a hundred turns. So ten thousand clients are not sent away, and do not come back
    /// elsewhere, in the same instant. Who is not told when the drain ends is told then. Must be
    /// shorter than a drain may take. Default: zero, all are told at once.
    ///
    /// [Workers](Graceful::worker) are told at once in any case.
    pub fn drain_spread(mut self, duration: Duration) -> Self {
        self.policy.drain_spread = duration;
        self
    }

    /// How long a request head over HTTP/1 may take to arrive, from its first byte to its last,
    /// before [`serve`](Graceful::serve) closes the connection. Default: 30 s. `Duration::MAX`
    /// means no bound.
    ///
    /// For bytes of a head that come together with the request before it, the time runs from the
    /// end of that request's response. Empty lines between requests begin no head
    /// ([RFC 9112 §2.2](https://www.rfc-editor.org/rfc/rfc9112#section-2.2)).
    ///
    /// It does not limit how long a connection may be idle. Other servers have settings of their
    /// own; axum's has none, and reads a head for ever.
    pub fn header_read_timeout(mut self, duration: Duration) -> Self {
        self.policy.header_read_timeout = duration;
        self
    }

    /// Whether [`serve`](Graceful::serve) answers an HTTP/1 client that closes its writing side after
    /// a whole request and before the response, as `nc -N`, `socat` and some health checks and
    /// proxies do ([RFC 9112 §9.6](https://www.rfc-editor.org/rfc/rfc9112#section-9.6)). Default:
    /// false, as in hyper and axum.
    ///
    /// A client that closes its writing side and a client that closes its connection send the same
    /// FIN, so each choice has a cost:
    ///
    /// - True: the FIN is ignored until the response is written, while serving and while draining.
    ///   The handler of a client that has left runs to its end, and a drain waits for it. Where
    ///   handlers are long or expensive, bound them by a timeout.
    /// - False: the FIN drops the handler at once, and the client gets no response. During a
    ///   shutdown the dropped request is reported in
    ///   [`Remaining::half_closed`](crate::Remaining::half_closed), and the outcome is
    ///   [`Forced`](crate::Outcome::Forced), because the client may have waited.
    ///
    /// HTTP/2 has no such ambiguity, and the option does not apply to it. Other servers have
    /// settings of their own; axum's has none, and drops the handler.
    pub fn half_close(mut self, answer: bool) -> Self {
        self.policy.half_close = answer;
        self
    }

    /// What refused clients are told in `Retry-After`
    /// ([RFC 9110 §10.2.3](https://www.rfc-editor.org/rfc/rfc9110#section-10.2.3)): whole
    /// seconds, rounded up. Default: 1 s.
    pub fn retry_after(mut self, duration: Duration) -> Self {
        self.policy.retry_after = duration;
        self
    }

    /// The status with which the readiness route says no. Default: 503.
    ///
    /// HAProxy's `http-check disable-on-404` wants a 404. Kubernetes takes 200 to 399 as success.
    pub fn unready_status(mut self, status: StatusCode) -> Self {
        self.policy.unready_status = status;
        self
    }

    /// A path that is never refused, neither while draining nor above
    /// [`max_in_flight`](Self::max_in_flight): metrics, a status page. May be called repeatedly.
    ///
    /// The path is compared as a whole, without the query, with the one the layer sees; inside
    /// axum's `nest` also with the original one. While it would have been refused such a request
    /// is let pass uncounted, so it cannot prolong a drain. At other times it is in flight like
    /// any other.
    pub fn exempt(mut self, path: impl Into<String>) -> Self {
        self.policy.exempt.push(path.into());
        self
    }

    /// The answer to refused requests, instead of a line of text. gRPC calls are answered
    /// `UNAVAILABLE` all the same, because they cannot read anything else.
    ///
    /// `Retry-After` and, on HTTP/1, `Connection: close` are added where the answer has no such
    /// field; while draining a `Connection` field of its own is made to say `close` too.
    ///
    /// ```
    /// use http::Response;
    /// use tower_graceful::{ConfigError, Graceful, Rejection};
    ///
    /// let graceful = Graceful::builder()
    ///     .rejection(|rejection: &Rejection| {
    ///         let mut response = Response::new(r#"{"error":"try again"}"#.into());
    ///         *response.status_mut() = rejection.status();
    ///         response
    ///     })
    ///     .build()?;
    /// # Ok::<(), ConfigError>(())
    /// ```
    pub fn rejection<F>(mut self, respond: F) -> Self
    where
        F: Fn(&Rejection) -> Response<Bytes> + Send + Sync + 'static,
    {
        self.policy.rejection = Some(RejectionFn::new(respond));
        self
    }

    /// The plan. The default of its delay depends on whose listeners are used.
    fn plan(&mut self) -> Result<Plan, ConfigError> {
        let policy = &mut self.policy;
        let shorter = SHARED_DELAY.max(policy.close_spread);
        policy.shared_delay = self.knobs.drain_delay.is_none().then_some(shorter);
        if policy.shared_listener != Some(true) {
            return self.knobs.plan();
        }
        let delay = self.knobs.drain_delay.unwrap_or_else(|| {
            let default = self.knobs.default_drain_delay();
            shorter.min(default)
        });
        let drain_delay = Some(delay);
        Knobs {
            drain_delay,
            ..self.knobs
        }
        .plan()
    }

    /// Checks the plan and makes the lifecycle.
    ///
    /// # Errors
    ///
    /// When the shares do not fit the grace period or leave no time to drain, when `close_spread`
    /// is longer than `drain_delay` or `drain_spread` not shorter than a drain, when `max_in_flight`
    /// or `header_read_timeout` is zero, when `unready_status` is informational or 200, and when an
    /// exempt path does not begin with a slash. The message names the numbers. And when the thread
    /// of a watchdog cannot be started.
    pub fn build(mut self) -> Result<Graceful, ConfigError> {
        let plan = self.plan()?;
        if self.policy.close_spread > plan.drain_delay() {
            return Err(ConfigError::SpreadTooLong {
                close_spread: self.policy.close_spread,
                drain_delay: plan.drain_delay(),
            });
        }
        let drain = plan.drain();
        if self.policy.spreads_drain() && self.policy.drain_spread >= drain {
            return Err(ConfigError::DrainSpreadTooLong {
                drain_spread: self.policy.drain_spread,
                drain,
            });
        }
        if self.policy.header_read_timeout.is_zero() {
            return Err(ConfigError::NoTimeToRead);
        }
        if self.max_in_flight == Some(0) {
            return Err(ConfigError::NothingInFlight);
        }
        let unready = self.policy.unready_status;
        if unready.is_informational() || unready == StatusCode::OK {
            return Err(ConfigError::UnreadyStatus(unready));
        }
        if let Some(path) = self
            .policy
            .exempt
            .iter()
            .find(|path| !path.starts_with('/'))
        {
            return Err(ConfigError::ExemptPath(path.clone()));
        }
        let graceful =
            Graceful::from_parts(self.max_in_flight, self.name_requests, self.policy, plan);
        #[cfg(all(unix, feature = "signal"))]
        if self.watchdog {
            let watched = graceful.shared().watch_grace_period();
            watched.map_err(|error| ConfigError::NoWatchdog(error.to_string()))?;
        }
        Ok(graceful)
    }
}
