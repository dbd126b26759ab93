//! How a shutdown ended, and the exit codes.

use std::fmt;

/// How a shutdown ended. Each outcome has its own exit code. If several apply, the outcome is the first that
/// applies of `Abandoned`, `Forced`, `ServerFailed` and `CleanupFailed`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Outcome {
    /// Nothing was given up because of the stop, and every server ended. Exit code 0.
    ///
    /// Requests that failed by themselves during the stop are in [`Requests::dropped`](crate::Requests::dropped) and do not
    /// change the outcome: the handler or the response body panicked or failed, or the client
    /// disconnected.
    Clean,
    /// Some work was lost or given up. Exit code 1. At least one of these happened:
    ///
    /// - work was still in flight when the drain deadline passed, or when a further SIGINT cut the
    ///   drain short;
    /// - a response had not been received by its client at that time;
    /// - a connection was open at that time, or a server did not end even after the cut;
    /// - a worker did not end in time;
    /// - connections were reset in a listener's queue ([`Remaining::queued`](crate::Remaining::queued));
    /// - a request was dropped because its client had closed its writing side
    ///   ([`Remaining::half_closed`](crate::Remaining::half_closed)).
    Forced,
    /// Everything in flight was completed, but a worker, a hook or a cleanup step failed or
    /// panicked, or a cleanup step did not end within its timeout or was not run. Exit code 2.
    CleanupFailed,
    /// A further SIGINT ended the wait for workers and cleanup steps, or the wait for work that had
    /// been cut. Exit code 3.
    Abandoned,
    /// A server ended with an error. Everything in flight was completed. Exit code 4.
    ServerFailed,
}

impl Outcome {
    /// The exit code of this outcome: 0 for [`Clean`](Self::Clean), and a different number for each
    /// of the other outcomes. Stable across versions.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Clean => 0,
            Self::Forced => 1,
            Self::CleanupFailed => 2,
            Self::Abandoned => 3,
            Self::ServerFailed => 4,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Clean => "clean",
            Self::Forced => "forced",
            Self::CleanupFailed => "cleanup failed",
            Self::Abandoned => "abandoned",
            Self::ServerFailed => "server failed",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_has_an_exit_code_of_its_own_and_only_clean_is_zero() {
        let codes = [
            Outcome::Clean,
            Outcome::Forced,
            Outcome::CleanupFailed,
            Outcome::Abandoned,
            Outcome::ServerFailed,
        ]
        .map(Outcome::exit_code);
        assert_eq!(codes, [0, 1, 2, 3, 4]);
    }
}
