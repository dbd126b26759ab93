//! The report of a shutdown: what triggered it, how long each phase took, and what was finished,
//! cut or lost.
//!
//! The timeline (`shutdown`) makes the report when the service has stopped. Its parts are plain
//! data. `tasks`, `connection` and the middleware fill in the parts that describe their holds,
//! tasks, connections and requests; `text` writes the report as text. The only state here is
//! `request_table`, which lists the requests in flight for
//! [`name_requests`](crate::GracefulBuilder::name_requests).
//!
//! The text form is at most 80 columns wide, and exit codes are stable: the tests in `text` and in
//! `outcome` pin both.
//!
//! Most of this file is documentation of public items.

#[cfg(feature = "serde")]
pub(crate) mod json;
mod outcome;
mod remaining;
pub(crate) mod request_table;
mod task;
mod text;
mod trigger;
mod warning;

use std::{
    process::{self, ExitCode},
    sync::Arc,
    time::Duration,
};

pub use self::{
    outcome::Outcome,
    remaining::{CutConnection, CutHold, CutRequest, Remaining, Requests},
    task::{TaskKind, TaskOutcome, TaskReport, UnlistedWorkers},
    trigger::{LeftEarly, Trigger},
    warning::{OutsideLayer, UpgradedConnection, Warning},
};
use crate::phase::Phase;

/// The result of a shutdown: its trigger, its outcome, its duration, and what was completed, cut or
/// lost.
///
/// [`Graceful::run`](crate::Graceful::run) and [`Graceful::serve`](crate::Graceful::serve) return
/// it. It converts into an [`ExitCode`], so `main` can return it. Its methods return the parts, for
/// logs and metrics. Its `Display` form is a timeline for people, at most 80 columns wide:
///
/// ```text
/// shutdown by SIGTERM: clean, 1.495 s
///   lame duck             1.001 s  |=====================           |
///     consul              0.121 s  |===                             |  done
///   draining              0.426 s  |                     ========== |
///   closing               0.006 s  |                               =|
///   cleanup               0.061 s  |                               =|
///     mailer              0.315 s  |                     =======    |  done
///     database            0.047 s  |                               =|  done
///     logs                0.014 s  |                               =|  done
///   requests: 4 in flight when it began, 1 more, 5 finished
/// ```
///
/// # JSON
///
/// With the feature `serde` it implements `Serialize`. Each key is the name of a method of this type
/// or of a public field; durations are seconds, as a floating-point number; the names of variants
/// are in `snake_case`. In JSON:
///
/// ```json
#[doc = include_str!("report.json")]
/// ```
///
/// A task that failed or panicked has its message in `error`. A warning has its `Display` in
/// `message`, and the requests or connections that it names. Keys may be added in later versions.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "the report says whether anything was lost, and is the exit code"]
pub struct Report {
    pub(crate) trigger: Trigger,
    pub(crate) outcome: Outcome,
    pub(crate) left_early: Option<LeftEarly>,
    /// The durations of lame duck, draining and closing.
    pub(crate) phases: [Duration; 3],
    pub(crate) cleanup: Duration,
    pub(crate) requests: Requests,
    pub(crate) remaining: Remaining,
    pub(crate) given_up: Arc<GivenUp>,
    pub(crate) tasks: Arc<[TaskReport]>,
    pub(crate) unlisted_workers: UnlistedWorkers,
    pub(crate) server_error: Option<String>,
    pub(crate) warnings: Arc<[Warning]>,
}

/// Everything that was open at the cut, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct GivenUp {
    pub(crate) requests: Vec<CutRequest>,
    /// Requests were in flight and are not listed, because `name_requests` is off.
    pub(crate) unnamed: bool,
    pub(crate) holds: Vec<CutHold>,
    pub(crate) connections: Vec<CutConnection>,
}

impl Report {
    /// What triggered the shutdown.
    #[must_use]
    pub fn trigger(&self) -> Trigger {
        self.trigger
    }

    /// How the shutdown ended.
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

    /// How long `phase` lasted. For [`Phase::Closing`] without its last part, which is the
    /// [`cleanup_time`](Self::cleanup_time). Zero for [`Phase::Serving`], which is not part of a
    /// shutdown, and for [`Phase::Stopped`], which does not end.
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

    /// Why the lame-duck phase ended before its delay was over, if a rule of the builder ended it:
    /// [`leave_when_quiet`](crate::GracefulBuilder::leave_when_quiet) or
    /// [`leave_when_noticed`](crate::GracefulBuilder::leave_when_noticed). `None` after a further
    /// signal, and where every server had ended.
    #[must_use]
    pub fn left_early(&self) -> Option<LeftEarly> {
        self.left_early
    }

    /// How long the service waited for workers and ran cleanup steps: the last part of
    /// [`Phase::Closing`], after the connections have closed.
    #[must_use]
    pub fn cleanup_time(&self) -> Duration {
        self.cleanup
    }

    /// The time from the trigger to the end.
    #[must_use]
    pub fn duration(&self) -> Duration {
        self.phases.iter().sum::<Duration>() + self.cleanup
    }

    /// The numbers of requests by what happened to them.
    #[must_use]
    pub fn requests(&self) -> Requests {
        self.requests
    }

    /// Every worker, hook and cleanup step, in the order of their registration.
    ///
    /// Of the workers that ended before draining began, the list contains the latest 32 that ended
    /// without an error and the latest 32 of the rest. The others are
    /// [counted](Self::unlisted_workers).
    #[must_use]
    pub fn tasks(&self) -> &[TaskReport] {
        &self.tasks
    }

    /// The workers that ended before draining began and are not in [`tasks`](Self::tasks).
    #[must_use]
    pub fn unlisted_workers(&self) -> UnlistedWorkers {
        self.unlisted_workers
    }

    /// The numbers of requests, holds, connections, servers and workers that were given up, and of what was
    /// lost without a cut: queued connections and half-closed requests. All zero if nothing was cut or lost.
    #[must_use]
    pub fn remaining(&self) -> Remaining {
        self.remaining
    }

    /// The requests that were in flight at the cut, oldest first, if
    /// [`name_requests`](crate::GracefulBuilder::name_requests) was set. Empty otherwise.
    #[must_use]
    pub fn requests_cut(&self) -> &[CutRequest] {
        &self.given_up.requests
    }

    /// The [holds](crate::Hold) that were active at the cut, oldest first.
    #[must_use]
    pub fn holds_cut(&self) -> &[CutHold] {
        &self.given_up.holds
    }

    /// The connections that were open at the cut, oldest first.
    #[must_use]
    pub fn connections_cut(&self) -> &[CutConnection] {
        &self.given_up.connections
    }

    /// The error of the first server passed to [`Graceful::run`](crate::Graceful::run) that ended
    /// with one.
    #[must_use]
    pub fn server_error(&self) -> Option<&str> {
        self.server_error.as_deref()
    }

    /// Mistakes in the setup that were found while the service ran, each kind once. They change
    /// neither outcome nor exit code, and are logged at `WARN` when they are found.
    ///
    /// Not every such mistake is found. These are looked for:
    ///
    /// - requests that the layer does not see ([`Warning::NoRequestInLayer`],
    ///   [`Warning::RequestOutsideLayer`]), if the lifecycle has one server: with
    ///   [`serve`](crate::Graceful::serve) in any protocol, with a
    ///   [`listener`](crate::Graceful::listener) or [`track`](crate::Graceful::track) in HTTP/1
    ///   without TLS. Only some of the requests are checked;
    /// - upgraded connections, such as WebSockets, that are open while draining although there is no
    ///   [`Hold`](crate::Hold) ([`Warning::UpgradesNotHeld`]): with `serve` in any protocol, with other
    ///   servers in HTTP/1.
    #[must_use]
    pub fn warnings(&self) -> &[Warning] {
        &self.warnings
    }

    /// Ends the process with the exit code of the outcome. Use it if blocking work may keep the
    /// runtime from shutting down.
    ///
    /// Returning from `main` waits for the runtime, which waits for every
    /// [`spawn_blocking`](tokio::task::spawn_blocking) task that has begun, and for every handler that blocks
    /// its thread, however long it takes. This method does not. It does not run the destructors of values on the stack either.
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
