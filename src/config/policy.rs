//! How a service behaves while it stops. Plain data, fixed when the lifecycle is built.

use std::time::Duration;

use http::{Method, StatusCode};

use super::{leave_early::LeaveEarly, rejection::RejectionFn};

/// The default paths of the probes.
pub(crate) const LIVEZ: &str = "/livez";
pub(crate) const READYZ: &str = "/readyz";

/// Whether this is a default path of the probes.
pub(crate) fn is_probe_path(path: &str) -> bool {
    path == LIVEZ || path == READYZ
}

/// Whether a probe answers requests with this method.
pub(crate) fn is_probe_method(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS)
}

/// The default path of the preStop route.
pub(crate) const PRESTOP: &str = "/prestop";

/// Whether the preStop route answers requests with this method.
pub(crate) fn is_pre_stop_method(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::POST)
}

/// The default of `drain_delay` if every listener is shared with the next process, which accepts
/// new connections. No load balancer has to stop sending traffic then. The delay is for existing
/// connections: a client that sends a request during the delay receives `Connection: close` and
/// reconnects to the next process. Only connections that are silent for the whole delay are closed
/// while idle.
pub(crate) const SHARED_DELAY: Duration = Duration::from_millis(500);

#[derive(Clone, Debug)]
pub(crate) struct Policy {
    pub(crate) keep_listening: bool,
    /// Whether the next process accepts from the listening sockets at the start of the stop.
    /// `None`: only if socket activation has passed them.
    pub(crate) shared_listener: Option<bool>,
    /// The delay if every listening socket is left to the next process and this delay is shorter
    /// than the plan's. `None`: the plan's delay.
    pub(crate) shared_delay: Option<Duration>,
    /// How long, from the start of the lame-duck phase, clients are asked to leave one after
    /// another. Zero: all at once.
    pub(crate) close_spread: Duration,
    /// The rules that end the lame-duck phase before its delay is over.
    pub(crate) leave_early: LeaveEarly,
    /// How long, from the start of the drain, long-lived work is told to end one task after
    /// another. Zero: all at once.
    pub(crate) drain_spread: Duration,
    /// How long a client may take to send a request head. Default for servers of `serve` that set
    /// nothing else.
    pub(crate) header_read_timeout: Duration,
    /// Whether a server of `serve` answers an HTTP/1 client that has closed its writing side.
    pub(crate) half_close: bool,
    /// How long the cleanup waits for workers. `None`: as long as there is time.
    pub(crate) worker_timeout: Option<Duration>,
    pub(crate) retry_after: Duration,
    pub(crate) unready_status: StatusCode,
    pub(crate) exempt: Vec<String>,
    pub(crate) rejection: Option<RejectionFn>,
}

impl Policy {
    /// Whether clients are asked to leave one after another.
    pub(crate) fn is_spread(&self) -> bool {
        !self.close_spread.is_zero()
    }

    /// Whether long-lived work is told to end one task after another.
    pub(crate) fn spreads_drain(&self) -> bool {
        !self.drain_spread.is_zero()
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            keep_listening: true,
            shared_listener: None,
            shared_delay: Some(SHARED_DELAY),
            close_spread: Duration::ZERO,
            leave_early: LeaveEarly::default(),
            drain_spread: Duration::ZERO,
            // hyper's default.
            header_read_timeout: Duration::from_secs(30),
            half_close: false,
            worker_timeout: None,
            retry_after: Duration::from_secs(1),
            unready_status: StatusCode::SERVICE_UNAVAILABLE,
            exempt: Vec::new(),
            rejection: None,
        }
    }
}
