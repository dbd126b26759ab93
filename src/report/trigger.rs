//! What triggered a shutdown, and why its lame-duck phase ended early.

use std::fmt;

/// What triggered the shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Trigger {
    /// SIGTERM; on Windows the console's close, logoff and shutdown events.
    Terminate,
    /// SIGINT (Ctrl-C); on Windows Ctrl-C and Ctrl-Break.
    Interrupt,
    /// A call of [`Graceful::shutdown`](crate::Graceful::shutdown).
    Shutdown,
    /// The future given to [`Graceful::drain_on`](crate::Graceful::drain_on).
    Future,
    /// A server passed to [`Graceful::run`](crate::Graceful::run) ended before any other trigger.
    ServerEnded,
    /// A worker of [`Graceful::critical_worker`](crate::Graceful::critical_worker) ended before any
    /// other trigger.
    WorkerEnded,
    /// A call of the preStop route, `Graceful::pre_stop`.
    PreStop,
}

impl fmt::Display for Trigger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Terminate => "SIGTERM",
            Self::Interrupt => "SIGINT",
            Self::Shutdown => "shutdown()",
            Self::Future => "drain_on()",
            Self::ServerEnded => "server ended",
            Self::WorkerEnded => "worker ended",
            Self::PreStop => "preStop",
        })
    }
}

/// Why the lame-duck phase ended before its delay was over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum LeftEarly {
    /// New requests had stopped: [`leave_when_quiet`](crate::GracefulBuilder::leave_when_quiet).
    Quiet,
    /// Every prober had seen readiness fail:
    /// [`leave_when_noticed`](crate::GracefulBuilder::leave_when_noticed).
    Noticed,
}

impl fmt::Display for LeftEarly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Quiet => "new requests have stopped",
            Self::Noticed => "every prober has seen readiness fail",
        })
    }
}
