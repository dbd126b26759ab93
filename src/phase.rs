//! The five phases of a service. Plain data.

use std::fmt;

/// The phase of a service, from its start to its exit.
///
/// The phase only moves forward, and phases compare in that order: `phase >= Phase::Draining` means
/// "draining or later". [`Graceful::phase`](crate::Graceful::phase) returns the current phase, and
/// [`Graceful::subscribe`](crate::Graceful::subscribe) follows its changes.
///
/// ```
/// use tower_graceful::{Graceful, Phase};
///
/// let graceful = Graceful::new();
/// assert_eq!(graceful.phase(), Phase::Serving);
/// assert!(Phase::LameDuck < Phase::Draining);
/// assert_eq!(Phase::LameDuck.to_string(), "lame duck");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
#[repr(u8)]
pub enum Phase {
    /// No stop was requested. Requests are served and responses are not changed.
    Serving = 0,
    /// A stop was requested and the load balancer is being informed: readiness fails, every HTTP/1
    /// response carries `Connection: close`, and every request is still **served**.
    LameDuck = 1,
    /// New requests are rejected. Requests in flight are completed.
    Draining = 2,
    /// Nothing is in flight any more, or the drain deadline has passed. Connections are being
    /// closed.
    Closing = 3,
    /// The shutdown is complete and the report is written. The process may exit.
    Stopped = 4,
}

impl Phase {
    /// The phase in lower case words: `serving`, `lame duck`, `draining`, `closing`, `stopped`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::LameDuck => "lame duck",
            Self::Draining => "draining",
            Self::Closing => "closing",
            Self::Stopped => "stopped",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
