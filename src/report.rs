//! What happened, in one value. Plain data.

use std::{
    fmt,
    net::SocketAddr,
    process::{self, ExitCode},
    sync::Arc,
    time::Duration,
};

use crate::phase::Phase;

/// What asked for the stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Trigger {
    /// SIGTERM; on Windows the console's close, logoff and shutdown events.
    Terminate,
    /// SIGINT, which is Ctrl-C; on Windows Ctrl-C and Ctrl-Break.
    Interrupt,
    /// A call of [`Graceful::shutdown`](crate::Graceful::shutdown).
    Shutdown,
    /// The future given to [`Graceful::drain_on`](crate::Graceful::drain_on).
    Future,
    /// A server given to [`Graceful::run`](crate::Graceful::run) ended although nothing had asked
    /// it to.
    ServerEnded,
}

impl fmt::Display for Trigger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Terminate => "SIGTERM",
            Self::Interrupt => "SIGINT",
            Self::Shutdown => "shutdown()",
            Self::Future => "drain_on()",
            Self::ServerEnded => "server ended",
        })
    }
}

/// How a shutdown ended. Each outcome has an exit code of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Outcome {
    /// Everything in flight was finished and every server ended. Exit code 0.
    Clean,
    /// Something was still running when the drain deadline passed, or when repeated signals cut
    /// the drain short, and was given up. Exit code 1.
    Forced,
    /// Repeated signals ended even the wait for what had been cut. Exit code 3.
    Abandoned,
    /// A server ended with an error. What was in flight was finished. Exit code 4.
    ServerFailed,
}

impl Outcome {
    /// The exit code of this outcome: 0 for [`Clean`](Self::Clean), and a number of its own,
    /// never 0, for each of the others. Stable across versions.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Clean => 0,
            Self::Forced => 1,
            // 2 is kept for a failed cleanup.
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
            Self::Abandoned => "abandoned",
            Self::ServerFailed => "server failed",
        })
    }
}

/// What was still there when the cut came. All zero after a clean shutdown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Remaining {
    /// Requests in flight.
    pub requests: usize,
    /// Tracked connections, upgraded ones included.
    pub connections: usize,
    /// Servers given to [`Graceful::run`](crate::Graceful::run) that had not ended.
    pub servers: usize,
}

impl Remaining {
    pub(crate) fn is_nothing(self) -> bool {
        self == Self::default()
    }
}

impl fmt::Display for Remaining {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = [
            (self.requests, "request"),
            (self.connections, "connection"),
            (self.servers, "server"),
        ];
        let mut first = true;
        for (count, name) in named {
            if count > 0 {
                let comma = if first { "" } else { ", " };
                let plural = if count == 1 { "" } else { "s" };
                write!(f, "{comma}{count} {name}{plural}")?;
                first = false;
            }
        }
        if first {
            f.write_str("nothing")?;
        }
        Ok(())
    }
}

/// A connection that was open when the cut came. See [`Report::connections_cut`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CutConnection {
    /// Who was at the other end, where the listener's addresses are `SocketAddr`s. `None` for
    /// other listeners, and for IO given to [`Graceful::track`](crate::Graceful::track).
    pub peer: Option<SocketAddr>,
    /// How long it had been open.
    pub age: Duration,
}

impl fmt::Display for CutConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.peer {
            Some(peer) => write!(f, "{peer}")?,
            None => f.write_str("a peer without address")?,
        }
        write!(f, ", open for {:.1} s", self.age.as_secs_f64())
    }
}

/// What happened during a shutdown.
///
/// [`Graceful::run`](crate::Graceful::run) and [`Graceful::serve`](crate::Graceful::serve) return
/// it. It converts into an [`ExitCode`], so `main` can return it, and its `Display` is a few lines
/// for a person:
///
/// ```text
/// shutdown by SIGINT: clean, 1.204 s
///   lame duck     0.000 s
///   draining      1.203 s
///   closing       0.001 s
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "the report says whether anything was lost, and is the exit code"]
pub struct Report {
    pub(crate) trigger: Trigger,
    pub(crate) outcome: Outcome,
    /// Lame duck, draining, closing.
    pub(crate) phases: [Duration; 3],
    pub(crate) remaining: Remaining,
    pub(crate) connections_cut: Arc<[CutConnection]>,
    pub(crate) server_error: Option<String>,
}

impl Report {
    /// What asked for the stop.
    #[must_use]
    pub fn trigger(&self) -> Trigger {
        self.trigger
    }

    /// How it ended.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        self.outcome
    }

    /// The outcome as a process exit code: 0 when clean, another number otherwise
    /// ([`Outcome::exit_code`]).
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        self.outcome.exit_code()
    }

    /// How long `phase` lasted. Zero for [`Phase::Serving`], which is no part of a shutdown, and
    /// for [`Phase::Stopped`], which has no end.
    #[must_use]
    pub fn time_in(&self, phase: Phase) -> Duration {
        let [lame_duck, draining, closing] = self.phases;
        match phase {
            Phase::LameDuck => lame_duck,
            Phase::Draining => draining,
            Phase::Closing => closing,
            Phase::Serving | Phase::Stopped => Duration::ZERO,
        }
    }

    /// How long it took from the trigger to the end.
    #[must_use]
    pub fn duration(&self) -> Duration {
        self.phases.iter().sum()
    }

    /// What was given up at the cut. All zero if there was none.
    #[must_use]
    pub fn remaining(&self) -> Remaining {
        self.remaining
    }

    /// The connections that were open at the cut, the oldest first. Empty if there was none.
    #[must_use]
    pub fn connections_cut(&self) -> &[CutConnection] {
        &self.connections_cut
    }

    /// The error with which a server given to [`Graceful::run`](crate::Graceful::run) ended, if
    /// one did: the first one's.
    #[must_use]
    pub fn server_error(&self) -> Option<&str> {
        self.server_error.as_deref()
    }

    /// Ends the process with the exit code.
    ///
    /// Unlike returning from `main` this does not wait for the runtime, which waits for every
    /// [`spawn_blocking`](tokio::task::spawn_blocking) that has begun, for as long as it takes. It
    /// does not run the destructors of what is alive on the stack either.
    pub fn exit(self) -> ! {
        process::exit(self.exit_code().into())
    }
}

impl From<Report> for ExitCode {
    fn from(report: Report) -> Self {
        Self::from(report.exit_code())
    }
}

impl process::Termination for Report {
    fn report(self) -> ExitCode {
        self.into()
    }
}

/// How many connections `Display` names.
const NAMED: usize = 3;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |duration: Duration| format!("{:.3} s", duration.as_secs_f64());
        write!(
            f,
            "shutdown by {}: {}, {}",
            self.trigger,
            self.outcome,
            seconds(self.duration())
        )?;
        for phase in [Phase::LameDuck, Phase::Draining, Phase::Closing] {
            write!(f, "\n  {phase:<10}{:>11}", seconds(self.time_in(phase)))?;
        }
        if !self.remaining.is_nothing() {
            write!(f, "\n  given up: {}", self.remaining)?;
        }
        let (named, others) = self
            .connections_cut
            .split_at(NAMED.min(self.connections_cut.len()));
        for connection in named {
            write!(f, "\n    {connection}")?;
        }
        if !others.is_empty() {
            write!(f, "\n    and {} more", others.len())?;
        }
        if let Some(error) = &self.server_error {
            write!(f, "\n  server error: {error}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(outcome: Outcome) -> Report {
        Report {
            trigger: Trigger::Terminate,
            outcome,
            phases: [
                Duration::from_secs(5),
                Duration::from_millis(1250),
                Duration::from_millis(3),
            ],
            remaining: Remaining::default(),
            connections_cut: Arc::default(),
            server_error: None,
        }
    }

    #[test]
    fn every_outcome_has_an_exit_code_of_its_own_and_only_clean_is_zero() {
        let codes = [
            Outcome::Clean,
            Outcome::Forced,
            Outcome::Abandoned,
            Outcome::ServerFailed,
        ]
        .map(Outcome::exit_code);
        assert_eq!(codes, [0, 1, 3, 4]);
    }

    #[test]
    fn the_report_is_a_few_lines_for_a_person() {
        assert_eq!(
            report(Outcome::Clean).to_string(),
            "shutdown by SIGTERM: clean, 6.253 s\n\
             \x20 lame duck     5.000 s\n\
             \x20 draining      1.250 s\n\
             \x20 closing       0.003 s"
        );
    }

    #[test]
    fn the_report_names_what_was_given_up() {
        let mut report = report(Outcome::Forced);
        report.remaining = Remaining {
            requests: 2,
            connections: 5,
            servers: 0,
        };
        let connection = |age| CutConnection {
            peer: Some(([10, 0, 0, 7], 51234).into()),
            age: Duration::from_millis(age),
        };
        report.connections_cut = [28_440, 300, 200, 100, 0].map(connection).into();
        report.server_error = Some("broken".into());
        let text = report.to_string();
        assert!(
            text.ends_with(
                "\n  given up: 2 requests, 5 connections\
                 \n    10.0.0.7:51234, open for 28.4 s\
                 \n    10.0.0.7:51234, open for 0.3 s\
                 \n    10.0.0.7:51234, open for 0.2 s\
                 \n    and 2 more\
                 \n  server error: broken"
            ),
            "{text}"
        );
    }
}
