//! The builder: all settings of a lifecycle.
//!
//! Most of this file is documentation of public items.

use std::time::Duration;

use bytes::Bytes;
use http::{Response, StatusCode};

use super::graceful::Graceful;
use crate::config::{
    leave_early::{WhenNoticed, WhenQuiet},
    plan::{ConfigError, Knobs, Plan},
    policy::{Policy, SHARED_DELAY},
    rejection::{Rejection, RejectionFn},
};

impl Graceful {
    /// Returns a builder for a lifecycle with settings other than the defaults. See
    /// [`GracefulBuilder`].
    pub fn builder() -> GracefulBuilder {
        GracefulBuilder::default()
    }
}

/// Configures a [`Graceful`]. Made by [`Graceful::builder`] or [`new`](Self::new).
///
/// # The budget
///
/// [`grace_period`](Self::grace_period) is the one number that must agree with the environment that
/// kills the process: `terminationGracePeriodSeconds` in Kubernetes, `TimeoutStopSec` in systemd.
/// Delay, drain and cleanup are shares of it, laid end to end from the [trigger](Graceful#triggers),
/// which is the event that starts the stop, usually SIGTERM:
///
/// ```text
/// trigger                                                          SIGKILL
///    |-- drain_delay --|-- drain_timeout --|-- cleanup_timeout --|-- margin --|
///    |------------------------------ grace_period ---------------------------|
/// ```
///
/// Time that a share does not use is added to the next one. Shares that are not set are derived
/// from the grace period:
///
/// | share | default | of 30 s |
/// |---|---|---|
/// | `drain_delay` | a sixth, at most 5 s (500 ms with a shared listener) | 5 s |
/// | `drain_timeout` | the rest | 19 s |
/// | `cleanup_timeout` | a sixth, at most 5 s; less if the shares that you set leave less | 5 s |
/// | margin | a thirtieth, at most 1 s | 1 s |
///
/// Nothing is planned into the margin, so that the process can report and exit before it is killed.
/// The shares may fill the whole grace period. Their last deadline is then still the start of the margin,
/// so the cleanup loses the time of the margin. For example, if 30 s are full and `cleanup_timeout` is 1 s,
/// the cleanup has no time. So leave room for the margin. Shares that do not fit are an error:
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
    /// A builder with the defaults: the same as [`Graceful::builder`].
    pub fn new() -> Self {
        Self::default()
    }

    /// The time from the trigger to the moment when the process is killed. All shares fit inside
    /// it. Default: 30 s, as [in Kubernetes][k8s]. `Duration::MAX` means no limit.
    ///
    /// [k8s]: https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/#pod-termination
    pub fn grace_period(mut self, duration: Duration) -> Self {
        self.knobs.grace_period = Some(duration);
        self
    }

    /// How long the service keeps serving after SIGTERM or [`shutdown`](Graceful::shutdown), while
    /// load balancers see the failing readiness probe and stop sending traffic. Zero starts
    /// draining at once.
    ///
    /// Default: 5 s, or a sixth of a grace period below 30 s. If the next process has the listening
    /// socket too, the default is shorter: see [`shared_listener`](Self::shared_listener). Set the delay to the time that
    /// your load balancer needs: the interval of its probe times its failure threshold, or, in Kubernetes,
    /// the time until the removal of an endpoint has reached every node.
    pub fn drain_delay(mut self, duration: Duration) -> Self {
        self.knobs.drain_delay = Some(duration);
        self
    }

    /// Ends the lame-duck phase before its delay is over, once new requests have stopped. Default: no.
    ///
    /// `minimum` is how long the phase lasts in any case, and `quiet_for` how long no new request must
    /// have arrived. Both must be shorter than [`drain_delay`](Self::drain_delay), which stays the
    /// longest that the phase lasts. Use it where `drain_delay` has to be long for the slowest
    /// balancer, and requests are frequent.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tower_graceful::{ConfigError, Graceful};
    ///
    /// let graceful = Graceful::builder()
    ///     .drain_delay(Duration::from_secs(15)) // at most
    ///     .leave_when_quiet(Duration::from_secs(2), Duration::from_secs(1))
    ///     .build()?;
    /// # Ok::<(), ConfigError>(())
    /// ```
    ///
    /// # When it is quiet
    ///
    /// Silence alone is no evidence: a service that is rarely called is silent while the balancer
    /// would still send. The phase ends early only if all of this holds:
    ///
    /// - `minimum` has passed since the trigger;
    /// - at least five new requests have arrived in the phase;
    /// - since the last request, `quiet_for` has passed, and also eight times the longest pause
    ///   between two requests of the phase. The time from the trigger to the first request counts as
    ///   such a pause.
    ///
    /// A service that gets fewer requests waits for the whole delay. A request counts when it reaches
    /// the [layer](Graceful::layer), admitted or refused above
    /// [`max_in_flight`](Self::max_in_flight). Probes and [exempt](Self::exempt) paths do not count.
    /// While an [`on_lame_duck`](Graceful::on_lame_duck) hook runs, the phase does not end early.
    ///
    /// # Limits
    ///
    /// Requests that come in bursts look like traffic that has ended. Choose a `quiet_for` that is
    /// longer than the pauses between bursts. Requests outside the layer are not seen.
    ///
    /// The rule never makes the phase longer than its delay. With a listening socket that was passed
    /// by socket activation, the default of the delay is 500 ms
    /// ([`shared_listener`](Self::shared_listener)). `build` cannot know this, and accepts a `minimum`
    /// that is longer; the rule has no effect then. If you set [`drain_delay`](Self::drain_delay), the
    /// rule applies. With such a socket it sees only requests on the connections that exist, because new
    /// connections wait for the next process.
    ///
    /// The phase does not end before [`close_spread`](Self::close_spread) is over, because until then
    /// some clients have not been asked to leave.
    ///
    /// After SIGINT the rule shortens [`interrupt_delay`](Self::interrupt_delay) in the same way, and after
    /// [`shutdown`](Graceful::shutdown) the `drain_delay`. A further SIGINT ends the phase at once.
    /// The log and the [report](crate::Report::left_early) say that the phase ended early, and why.
    pub fn leave_when_quiet(mut self, minimum: Duration, quiet_for: Duration) -> Self {
        self.policy.leave_early.quiet = Some(WhenQuiet { minimum, quiet_for });
        self
    }

    /// Ends the lame-duck phase before its delay is over, once every prober has seen readiness fail. A
    /// *prober* is a client that asks the readiness probe again and again. Default: no.
    ///
    /// For balancers that poll [readiness](Graceful::readiness): HAProxy, Envoy, nginx Plus, target
    /// groups of a cloud. `failures` is how many failed checks a prober needs before it stops sending
    /// (HAProxy `fall`, Envoy `unhealthy_threshold`). `probers` is how many probers there are at least.
    /// [`drain_delay`](Self::drain_delay) stays the longest that the phase lasts.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tower_graceful::{ConfigError, Graceful};
    ///
    /// // Two balancers: option httpchk GET /readyz, inter 2s fall 3
    /// let graceful = Graceful::builder()
    ///     .drain_delay(Duration::from_secs(15)) // at most
    ///     .leave_when_noticed(3, 2)
    ///     .build()?;
    /// # Ok::<(), ConfigError>(())
    /// ```
    ///
    /// # When it is noticed
    ///
    /// Probers are told apart by their address, their `User-Agent` and the path and query they ask for.
    /// The phase ends 100 ms after the last of these:
    ///
    /// - at least `probers` probers have each received `failures` failing answers since the trigger;
    /// - every other prober that asked before the trigger, or has asked since, has received as many. So a
    ///   prober that does not ask again after the trigger prevents an early end. A prober that had stopped
    ///   asking before the trigger is left out: at the trigger it had been silent for more than 300 s, or
    ///   for more than one second plus four times its longest interval;
    /// - the last new request has arrived, counted as in
    ///   [`leave_when_quiet`](Self::leave_when_quiet).
    ///
    /// If both rules are set, the first that holds ends the phase. While an
    /// [`on_lame_duck`](Graceful::on_lame_duck) hook runs, the phase does not end early.
    ///
    /// # Limits
    ///
    /// - Probers that share address, `User-Agent` and target are one prober to this rule: several
    ///   HAProxy processes on one host, or balancers behind one NAT. Give each a query of its own
    ///   (`/readyz?from=lb1`), and set `probers` to their number. Until they differ, `probers` is not
    ///   reached, and the whole delay passes.
    /// - The address is known on servers of [`serve`](Graceful::serve), and on others with axum's
    ///   `into_make_service_with_connect_info::<SocketAddr>()`.
    /// - The kubelet is a prober like others. If its readiness probe needs longer than the delay, the
    ///   whole delay passes; have it ask for another route.
    /// - 64 probers are remembered. If there are more, the whole delay passes.
    /// - A prober that needs more failures than `failures` still sends requests when this rule counts it as
    ///   done. These requests put off the end of the phase, at most to the end of the delay.
    /// - With a [shared listener](Self::shared_listener), a prober that opens a connection for each
    ///   check reaches the next process, and so the whole delay passes. The default of the delay is 500 ms there.
    ///
    /// Signals and the report are as in [`leave_when_quiet`](Self::leave_when_quiet).
    pub fn leave_when_noticed(mut self, failures: u32, probers: usize) -> Self {
        self.policy.leave_early.noticed = Some(WhenNoticed { failures, probers });
        self
    }

    /// The delay if the trigger is SIGINT (Ctrl-C). Default: zero, because a developer at a
    /// terminal has no load balancer.
    pub fn interrupt_delay(mut self, duration: Duration) -> Self {
        self.knobs.interrupt_delay = Some(duration);
        self
    }

    /// How long requests in flight may take to finish, counted from the end of the delay. Time that
    /// the delay did not use is added. Requests that are still in flight after it are cut, and the
    /// outcome is [`Forced`](crate::Outcome::Forced). Default: the rest of the grace period, 19 s
    /// of 30 s.
    pub fn drain_timeout(mut self, duration: Duration) -> Self {
        self.knobs.drain_timeout = Some(duration);
        self
    }

    /// The share that is reserved for workers and cleanup steps after the drain. The drain cannot
    /// use it. Default: 5 s, or a sixth of a grace period below 30 s; less if the shares that you set leave
    /// less.
    pub fn cleanup_timeout(mut self, duration: Duration) -> Self {
        self.knobs.cleanup_timeout = Some(duration);
        self
    }

    /// How long the service waits for [workers](Graceful::worker), once nothing else is in flight.
    /// The default is also the maximum: the time from that moment to the margin, less the timeouts of the
    /// cleanup steps, which take at most half of that time.
    pub fn worker_timeout(mut self, duration: Duration) -> Self {
        self.policy.worker_timeout = Some(duration);
        self
    }

    /// Records method, path and start of every request in flight, so that the progress line names
    /// the oldest ones and the report lists those that were cut. Default: false.
    ///
    /// The path is recorded without its query. The cost for each request is four acquisitions of
    /// shared locks and four allocations. Without this setting there is no cost.
    pub fn name_requests(mut self, name: bool) -> Self {
        self.name_requests = name;
        self
    }

    /// Ends the process with exit code 1 if the service has not stopped by the middle of the
    /// margin, even if every thread of the runtime is blocked. Default: false.
    ///
    /// Use it where a handler may block its thread: the process then ends with a message on
    /// standard error, which tells how far the shutdown has come, instead of being killed without
    /// one.
    ///
    /// The process ends immediately: destructors, cleanup steps that have not begun, and unflushed
    /// buffers are skipped, and no [`Report`](crate::Report) is returned. [`build`](Self::build)
    /// starts the [control thread](Graceful#runtime) that does this. A service that has [stopped](Graceful::stopped) is
    /// no longer watched, unless work that was given up has not ended and may block the runtime,
    /// such as a handler that blocks its thread. Other work that `main` waits for afterwards, such
    /// as `spawn_blocking` tasks at the end of the runtime, is not watched; for that, see
    /// [`Report::exit`](crate::Report::exit).
    ///
    /// On systems other than unix it does nothing.
    #[cfg(feature = "signal")]
    #[cfg_attr(not(unix), allow(unused_mut, unused_variables))]
    pub fn watchdog(mut self, watch: bool) -> Self {
        #[cfg(unix)]
        {
            self.watchdog = watch;
        }
        self
    }

    /// The maximum number of requests in flight. Further requests are rejected with 429. Default:
    /// no limit.
    ///
    /// A request counts until its response body has ended. The limit is one for everything behind
    /// the layers of this lifecycle, however many routes and clones there are. Probes and
    /// [exempt](Self::exempt) paths are served above the limit too.
    ///
    /// A rejection is sent at once, without reading the body of the request. A client that is still
    /// sending can read the response if the server lets the connection linger, as tracked
    /// connections do.
    pub fn max_in_flight(mut self, requests: usize) -> Self {
        self.max_in_flight = Some(requests);
        self
    }

    /// Whether the listener stays open while draining. Sets what [`drain`](Graceful::drain) and
    /// [`drain_on`](Graceful::drain_on) wait for.
    ///
    /// True, the default: they wait until nothing is in flight, at most until the drain deadline.
    /// The listener stays open while draining, and new clients get a 503 with `Retry-After`.
    ///
    /// False: they wait until the delay is over. Then the listener closes, and the operating system
    /// refuses new connections. Most load balancers retry a refused connection on another server,
    /// while few retry a 503. Draining, which rejects requests, starts only after the listener has
    /// closed, usually less than 200 ms later and at most two seconds later. So requests that arrive
    /// while the listener closes are still served. This needs [`serve`](crate::Graceful::serve) or a
    /// [tracked listener](crate::Graceful::listener): it is not known when another listener closes, so with
    /// [`drain`](crate::Graceful::drain) alone a request that arrives at that moment is refused.
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
    /// False: listeners accept until the drain ends, or, with
    /// [`keep_listening(false)`](Self::keep_listening), until draining starts. Set it only if no other
    /// process has the socket: the [socket filter](Graceful::listener) stays on it until the close, so
    /// another process with this socket would get no new connections. A socket that was passed by socket
    /// activation gets no filter, also with false.
    ///
    /// Default: true for a `TcpListener` or `UnixListener` that was passed to the process by socket
    /// activation. Any other listener accepts as with false, but its filter is detached a few microseconds
    /// before the close, and a connection that arrives in between is reset.
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
    /// | systemd socket activation | true by default | waits in the queue until this process has ended, after its longest request, and the next has started: set a short [`drain_timeout`](Self::drain_timeout) |
    /// | nothing, although the socket was passed: `systemd-socket-activate` and `systemfd` are replaced by the program (`exec`) and keep no copy | true by default; `false` keeps accepting during the delay | is refused |
    /// | circus, or another supervisor that names the descriptor in its own way | `true` | is accepted by another worker, or waits as with systemd |
    /// | a restart in place by `ecdysis` or the like | `true` | is accepted by the new process, which runs already |
    /// | prefork: a parent binds, its children accept | `true` | is accepted by another child |
    /// | nothing: the process binds the port itself | do not set it, or `false` | is accepted by this process, or refused |
    ///
    /// With `true` where no other process has the socket, clients are refused as soon as the stop
    /// begins.
    ///
    /// # The delay
    ///
    /// There is no balancer to wait for, so the default of [`drain_delay`](Self::drain_delay) is 500 ms
    /// here, or [`close_spread`](Self::close_spread) if that is longer, and never more than
    /// without a shared listener. The delay lets keep-alive clients move by a response with
    /// `Connection: close`. An HTTP/1 connection that is closed while idle loses a request that crosses the
    /// close ([RFC 9112 §9.5](https://www.rfc-editor.org/rfc/rfc9112#section-9.5)). The phase ends before the
    /// delay if every connection has closed. Where the next process is started only after this one has
    /// ended, new connections wait for the whole stop, that is for the longest request in flight; a shorter
    /// [`drain_timeout`](Self::drain_timeout) limits that wait. If the
    /// listen backlog is too small for the connections that arrive meanwhile, the kernel drops further
    /// connection attempts, and their clients try again after a second.
    ///
    /// # Socket activation
    ///
    /// On Linux a listener is recognized if its socket is one of those that `LISTEN_FDS` and
    /// `LISTEN_PID` name
    /// ([`sd_listen_fds(3)`](https://www.freedesktop.org/software/systemd/man/latest/sd_listen_fds.html)),
    /// from descriptor 3 on or from that of `LISTEN_FDS_FIRST_FD`, also if a library has removed the
    /// variables or duplicated the descriptor. Set the option
    /// where the passed descriptor was closed before the listener is given to this crate, where a
    /// listener of another type wraps the passed one, and on other systems. If `LISTEN_PID` is
    /// missing or names another process, no listener counts as shared. If one of the named descriptors is
    /// closed or is not a socket, only the sockets before that descriptor count. If some listeners of a lifecycle are shared and others are not, each closes at its own
    /// time, and the delay is that of a lifecycle without shared listeners.
    ///
    /// # Limits
    ///
    /// - Only listeners of [`serve`](Graceful::serve) and [`listener`](Graceful::listener) are closed
    ///   early. A server with nothing but [`drain`](Graceful::drain) accepts until draining starts.
    /// - A listener that wraps another one may be in the middle of a handshake, and so continues to
    ///   accept for 60 ms. Use [`handshakes`](crate::HandshakeExt::handshakes) instead: its handshakes
    ///   are finished, and the listener below closes at once.
    /// - If another process shuts the socket down (`shutdown(2)`), nothing is accepted any more. The
    ///   listener logs the error and tries again each second; the stop works as ever.
    pub fn shared_listener(mut self, shared: bool) -> Self {
        self.policy.shared_listener = Some(shared);
        self
    }

    /// Asks clients to leave on a fraction of connections that rises from 0 to 100 % over this time
    /// from the start of the lame-duck phase, so that ten thousand clients do not reconnect in the
    /// same instant. Default: zero, all clients are asked with their next response.
    ///
    /// It must not be longer than [`drain_delay`](Self::drain_delay). If the delay that applies is
    /// shorter, the remaining clients are asked when it ends.
    ///
    /// On a server of [`serve`](Graceful::serve) each connection has a *slot*: a moment within this time.
    /// Before its slot, responses on that connection are unchanged. Over HTTP/2 the client is asked when
    /// the slot is reached, even without a response. On other servers each HTTP/1 response has a slot.
    pub fn close_spread(mut self, duration: Duration) -> Self {
        self.policy.close_spread = duration;
        self
    }

    /// Spreads the end of long-lived work over this time from the start of the drain, so that ten
    /// thousand clients are not disconnected, and do not reconnect elsewhere, in the same instant.
    /// Default: zero, all of it ends at once.
    ///
    /// The futures of [`draining`](Graceful::draining) resolve, and the streams of
    /// [`until_draining`](Graceful::until_draining) end, one after another, evenly, in a hundred
    /// steps. Tasks that have not been notified when the drain ends are notified then.
    /// [Workers](Graceful::worker) are notified at once in any case.
    ///
    /// It must be shorter than the time that a drain has after the longer of the two delays,
    /// [`drain_delay`](Self::drain_delay) and [`interrupt_delay`](Self::interrupt_delay): 19 s by default.
    pub fn drain_spread(mut self, duration: Duration) -> Self {
        self.policy.drain_spread = duration;
        self
    }

    /// The [`header_read_timeout`](crate::Serve::header_read_timeout) of every server that
    /// [`serve`](Graceful::serve) makes, unless the server has its own: how long an HTTP/1 request head
    /// may take from its first byte to its last. Default: 30 s. `Duration::MAX` means no limit.
    ///
    /// Other servers have their own settings; axum's server has none and waits for a head forever.
    pub fn header_read_timeout(mut self, duration: Duration) -> Self {
        self.policy.header_read_timeout = duration;
        self
    }

    /// Whether servers of [`serve`](Graceful::serve) answer an HTTP/1 client that closes its writing
    /// side before the response, unless the server has its own setting. Default: false.
    ///
    /// Each choice has a cost: see [`Serve::half_close`](crate::Serve::half_close).
    pub fn half_close(mut self, answer: bool) -> Self {
        self.policy.half_close = answer;
        self
    }

    /// Sets the `Retry-After` field of rejections ([RFC 9110
    /// §10.2.3](https://www.rfc-editor.org/rfc/rfc9110#section-10.2.3)), rounded up to whole
    /// seconds. Default: 1 s.
    pub fn retry_after(mut self, duration: Duration) -> Self {
        self.policy.retry_after = duration;
        self
    }

    /// Sets the status of a failing readiness probe. Default: 503.
    ///
    /// HAProxy's `http-check disable-on-404` needs 404. Kubernetes treats 200 to 399 as success.
    pub fn unready_status(mut self, status: StatusCode) -> Self {
        self.policy.unready_status = status;
        self
    }

    /// Exempts a path: its requests are never rejected, neither while draining nor above
    /// [`max_in_flight`](Self::max_in_flight). For metrics or a status page. May be called
    /// repeatedly.
    ///
    /// The whole path, without the query, is compared with the path that the layer sees; inside
    /// axum's `nest` also with the original path. While other requests would be rejected, an exempt
    /// request is served without being counted, so the drain does not wait for it. But its tracked
    /// connection stays open until the response ends: an exempt response without an end is cut at the drain
    /// deadline, and the exit code is 1. End it with [`until_draining`](crate::Graceful::until_draining).
    /// At other times an exempt request counts as in flight like any other. Default: no path is exempt.
    pub fn exempt(mut self, path: impl Into<String>) -> Self {
        self.policy.exempt.push(path.into());
        self
    }

    /// Sets the response to rejected requests. Default: one line of text. gRPC calls always get
    /// `UNAVAILABLE`, because gRPC clients understand nothing else.
    ///
    /// `respond` is called once for each rejected request with the [`Rejection`]: the reason, and the
    /// method, URI, version and header fields of the request.
    ///
    /// `Retry-After` and, on HTTP/1, `Connection: close` are added if the response has no such
    /// field. While draining, a `Connection` field of an HTTP/1 response also gets `close`: `keep-alive` is
    /// removed, and other options stay.
    ///
    /// A JSON response for clients that accept it, with the field that lets a page of another origin
    /// read it:
    ///
    /// ```
    /// use bytes::Bytes;
    /// use http::{HeaderValue, Response, header};
    /// use tower_graceful::{ConfigError, Graceful, Rejection};
    ///
    /// fn respond(rejection: &Rejection<'_>) -> Response<Bytes> {
    ///     let accept = rejection.headers().get(header::ACCEPT);
    ///     let json = accept
    ///         .and_then(|accept| accept.to_str().ok())
    ///         .is_some_and(|accept| accept.contains("application/json"));
    ///     let (kind, body) = if json {
    ///         ("application/json", r#"{"error":"try again later"}"#)
    ///     } else {
    ///         ("text/plain", "try again later\n")
    ///     };
    ///     let mut response = Response::new(Bytes::from_static(body.as_bytes()));
    ///     *response.status_mut() = rejection.status();
    ///     let headers = response.headers_mut();
    ///     headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    ///     headers.insert(header::VARY, HeaderValue::from_static("accept, origin"));
    ///     if let Some(origin) = rejection.headers().get(header::ORIGIN) {
    ///         if origin == "https://app.example.com" {
    ///             headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
    ///         }
    ///     }
    ///     response
    /// }
    ///
    /// let graceful = Graceful::builder().rejection(respond).build()?;
    /// # Ok::<(), ConfigError>(())
    /// ```
    ///
    /// With tower-http's `CorsLayer` outside of the [layer](crate::GracefulLayer#layer-order) the
    /// response gets its CORS fields there.
    ///
    /// A panic in `respond` unwinds through the service, as one in a handler does.
    pub fn rejection<F>(mut self, respond: F) -> Self
    where
        F: Fn(&Rejection<'_>) -> Response<Bytes> + Send + Sync + 'static,
    {
        self.policy.rejection = Some(RejectionFn::new(respond));
        self
    }

    /// The plan. The default of its delay depends on whose listeners are used.
    fn plan(&mut self) -> Result<Plan, ConfigError> {
        let policy = &mut self.policy;
        let shorter = SHARED_DELAY.max(policy.close_spread);
        policy.shared_delay = self.knobs.drain_delay.is_none().then_some(shorter);
        if policy.shared_listener == Some(true) {
            let default = shorter.min(self.knobs.default_drain_delay());
            self.knobs.drain_delay.get_or_insert(default);
        }
        self.knobs.plan()
    }

    /// Checks the settings and makes the lifecycle.
    ///
    /// # Errors
    ///
    /// Returns an error, with the numbers in its message, if
    ///
    /// - the shares do not fit the grace period, or leave no time to drain;
    /// - `close_spread` is longer than `drain_delay`, or `drain_spread` is not shorter than the time that
    ///   a drain has after the longer of the two delays;
    /// - `max_in_flight` or `header_read_timeout` is zero;
    /// - `unready_status` is informational or 200;
    /// - a rule for leaving early cannot work;
    /// - an exempt path does not begin with a slash, or contains a query;
    /// - the thread of the watchdog cannot be started.
    ///
    /// # Panics
    ///
    /// Inside a tokio runtime without timers (`enable_time` or `enable_all`).
    pub fn build(mut self) -> Result<Graceful, ConfigError> {
        let plan = self.plan()?;
        if self.policy.close_spread > plan.drain_delay() {
            return Err(ConfigError::SpreadTooLong {
                close_spread: self.policy.close_spread,
                drain_delay: plan.drain_delay(),
            });
        }
        let leave_early = self.policy.leave_early.check(plan.drain_delay());
        leave_early.map_err(ConfigError::LeaveEarly)?;
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
            .find(|path| !path.starts_with('/') || path.contains('?'))
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
