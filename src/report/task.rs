//! The results of workers, hooks and cleanup steps.

use std::{fmt, time::Duration};

/// The kind of a task in the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum TaskKind {
    /// A hook of [`Graceful::on_lame_duck`](crate::Graceful::on_lame_duck).
    LameDuck,
    /// A worker of [`Graceful::worker`](crate::Graceful::worker) or
    /// [`Graceful::critical_worker`](crate::Graceful::critical_worker).
    Worker,
    /// A cleanup step of [`Graceful::cleanup`](crate::Graceful::cleanup).
    Cleanup,
}

impl TaskKind {
    /// The word for a task of this kind in log events.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::LameDuck => "hook",
            Self::Worker => "worker",
            Self::Cleanup => "cleanup",
        }
    }
}

/// How a task ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(
    feature = "serde",
    serde(tag = "outcome", content = "error", rename_all = "snake_case")
)]
#[non_exhaustive]
pub enum TaskOutcome {
    /// The task ended without an error. A worker: after it was told to stop.
    Done,
    /// A worker ended without an error before it was told to stop.
    EndedEarly,
    /// The task ended with this error.
    Failed(String),
    /// The task panicked with this message.
    Panicked(String),
    /// The task did not end in time, and was dropped.
    Cut,
    /// The task was not started before the service stopped.
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

/// The numbers of workers that are not listed in the report. See
/// [`Report::unlisted_workers`](crate::Report::unlisted_workers).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct UnlistedWorkers {
    /// The number of all such workers.
    pub ended: usize,
    /// The number of those that failed, panicked or were cut because their runtime has shut down.
    pub failed: usize,
}

/// One worker, hook or cleanup step. See [`Report::tasks`](crate::Report::tasks).
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct TaskReport {
    /// The name of the task.
    pub name: String,
    /// The kind of the task.
    pub kind: TaskKind,
    /// When the task began to run, or a worker began to stop, as time since the trigger. A worker
    /// begins to stop when draining starts. Zero for tasks that ended before the trigger.
    #[cfg_attr(feature = "serde", serde(serialize_with = "super::json::seconds"))]
    pub began: Duration,
    /// How long the task took from then on.
    #[cfg_attr(feature = "serde", serde(serialize_with = "super::json::seconds"))]
    pub took: Duration,
    /// How the task ended.
    #[cfg_attr(feature = "serde", serde(flatten))]
    pub outcome: TaskOutcome,
}

impl TaskReport {
    /// Whether the task failed.
    pub(crate) fn is_failure(&self) -> bool {
        match self.outcome {
            TaskOutcome::Failed(_) | TaskOutcome::Panicked(_) => true,
            TaskOutcome::Cut | TaskOutcome::NotRun => self.kind == TaskKind::Cleanup,
            TaskOutcome::Done | TaskOutcome::EndedEarly => false,
        }
    }

    /// Whether this is a worker that did not end in time.
    pub(crate) fn is_cut_worker(&self) -> bool {
        self.kind == TaskKind::Worker && self.outcome == TaskOutcome::Cut
    }
}
