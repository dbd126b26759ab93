//! The five phases of a service's life. Plain data.

use std::fmt;

/// Where a service stands between its first request and its exit.
///
/// A phase only ever moves forward, and phases compare in that order, so "draining or later" is
/// `phase >= Phase::Draining`. [`Graceful::phase`](crate::Graceful::phase) reads the present one,
/// [`Graceful::subscribe`](crate::Graceful::subscribe) follows the changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
#[repr(u8)]
pub enum Phase {
    /// Nothing has asked for a stop. Requests are served and responses are left alone.
    Serving = 0,
    /// A stop was asked for and the balancer is being told: readiness says no, every HTTP/1
    /// response says `Connection: close`, and every request is still **served**.
    LameDuck = 1,
    /// New requests are refused; those in flight are finished.
    Draining = 2,
    /// Nothing is in flight any more, or the drain deadline has passed. Connections are closed.
    Closing = 3,
    /// All is over and the report is written. The process may exit.
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
