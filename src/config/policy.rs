//! How a service answers while it stops. Plain data, fixed once the service is built.

use std::time::Duration;

use http::StatusCode;

use super::{leave_early::LeaveEarly, rejection::RejectionFn};

/// The paths of the probes' router.
pub(crate) const LIVEZ: &str = "/livez";
pub(crate) const READYZ: &str = "/readyz";

/// The path of the preStop router.
#[cfg(feature = "axum")]
pub(crate) const PRESTOP: &str = "/prestop";
/// The default of `drain_delay` where the next process accepts what connects. No balancer has to be
/// waited for then. The delay is for the connections that exist: a client that uses its connection
/// meanwhile moves with a response that says `Connection: close`, and only those that are silent for
/// all of it are closed while idle.
pub(crate) const SHARED_DELAY: Duration = Duration::from_millis(500);

#[derive(Clone, Debug)]
pub(crate) struct Policy {
    pub(crate) keep_listening: bool,
    /// The listening sockets are left to the next process at the start of the stop. `None`: those
    /// that socket activation has passed.
    pub(crate) shared_listener: Option<bool>,
    /// The delay where every socket is left to the next process, if that is shorter than the plan's.
    /// `None`: the plan's.
    pub(crate) shared_delay: Option<Duration>,
    /// Over how much of the lame-duck phase clients are asked to leave.
    pub(crate) close_spread: Duration,
    /// What ends the lame-duck phase before its delay is over.
    pub(crate) leave_early: LeaveEarly,
    /// Over how much of the drain long-lived work is told to end.
    pub(crate) drain_spread: Duration,
    /// How long a request head may take on a server of `serve` that sets nothing else.
    pub(crate) header_read_timeout: Duration,
    /// Whether such a server answers an HTTP/1 client that has closed its writing side.
    pub(crate) half_close: bool,
    /// How long workers are waited for. `None`: as long as there is time.
    pub(crate) worker_timeout: Option<Duration>,
    pub(crate) retry_after: Duration,
    pub(crate) unready_status: StatusCode,
    pub(crate) exempt: Vec<String>,
    pub(crate) rejection: Option<RejectionFn>,
}

impl Policy {
    /// Clients are asked to leave one after another.
    pub(crate) fn is_spread(&self) -> bool {
        !self.close_spread.is_zero()
    }

    /// Long-lived work is told to end by and by.
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
            // hyper's own.
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
