//! What workers, hooks and cleanup steps did.

use std::{fmt, time::Duration};

/// What a task of the shutdown is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum TaskKind {
    /// Of [`Graceful::on_lame_duck`](crate::Graceful::on_lame_duck).
    LameDuck,
    /// Of [`Graceful::worker`](crate::Graceful::worker).
    Worker,
    /// Of [`Graceful::cleanup`](crate::Graceful::cleanup).
    Cleanup,
}

/// How a task came to its end.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(
    feature = "serde",
    serde(tag = "outcome", content = "error", rename_all = "snake_case")
)]
#[non_exhaustive]
pub enum TaskOutcome {
    /// It ended, after it was told to.
    Done,
    /// A worker ended in good order before it was told to.
    EndedEarly,
    /// It ended with this error.
    Failed(String),
    /// It panicked, and said this.
    Panicked(String),
    /// Its time was over.
    Cut,
    /// It never began: the service stopped before its turn came.
    NotRun,
}

impl fmt::Display for TaskOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Done => "done",
            Self::EndedEarly => "ended early",
            Self::Failed(_) => "failed",
            Self::Panicked(_) => "panicked",
            Self::Cut => "cut",
            Self::NotRun => "not run",
        })
    }
}

/// Workers that are counted in the report and not listed. See
/// [`Report::unlisted_workers`](crate::Report::unlisted_workers).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct UnlistedWorkers {
    /// All of them.
    pub ended: usize,
    /// Those of them that failed or panicked.
    pub failed: usize,
}

/// One worker, hook or cleanup step. See [`Report::tasks`](crate::Report::tasks).
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct TaskReport {
    /// The name it was given.
    pub name: String,
    /// What it is.
    pub kind: TaskKind,
    /// When it began to stop, or to run, in time since the stop was asked for. A worker begins to
    /// stop when draining starts. Zero for what ended before the stop was asked for.
    #[cfg_attr(feature = "serde", serde(serialize_with = "super::json::seconds"))]
    pub began: Duration,
    /// How long it took from then on.
    #[cfg_attr(feature = "serde", serde(serialize_with = "super::json::seconds"))]
    pub took: Duration,
    /// How it came to its end.
    #[cfg_attr(feature = "serde", serde(flatten))]
    pub outcome: TaskOutcome,
}

impl TaskReport {
    /// It did not do what it was there for.
    pub(crate) fn is_failure(&self) -> bool {
        match self.outcome {
            TaskOutcome::Failed(_) | TaskOutcome::Panicked(_) => true,
            TaskOutcome::Cut | TaskOutcome::NotRun => self.kind == TaskKind::Cleanup,
            TaskOutcome::Done | TaskOutcome::EndedEarly => false,
        }
    }

    /// It was running when its time was over.
    pub(crate) fn is_cut_worker(&self) -> bool {
        self.kind == TaskKind::Worker && self.outcome == TaskOutcome::Cut
    }
}
