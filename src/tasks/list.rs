//! The list of workers, hooks and steps: their states, and what has not been started yet.
//!
//! The list owns all of them. A driver takes a hook or step only to spawn it, so whatever moment its runtime ends at,
//! the next driver finds here what is left to run and to wait for.

use std::{
    borrow::Cow,
    collections::{BTreeMap, VecDeque},
    pin::Pin,
    time::Duration,
};

use tokio::{task::AbortHandle, time::Instant};

use crate::{
    background::drop_each,
    report::{TaskKind, TaskOutcome, UnlistedWorkers},
};

/// How long an aborted task has to end before the next one begins.
pub(crate) const ABORT_TIME: Duration = Duration::from_millis(50);

/// The name of a hold, worker, hook or cleanup step.
pub(crate) type Name = Cow<'static, str>;

/// The future of a hook or step.
pub(crate) type Job = Pin<Box<dyn Future<Output = TaskOutcome> + Send>>;

#[derive(Default)]
pub(super) struct List {
    pub(super) hooks: Registered,
    pub(super) workers_closed: bool,
    pub(super) steps: Registered,
    /// The service has stopped: nothing is run any more.
    pub(super) given_up: bool,
    /// In the order in which they were registered.
    pub(super) tasks: BTreeMap<usize, Task>,
    next_key: usize,
    /// The keys of workers that ended without an error before the stop, as long as they are in
    /// `tasks`.
    ended: VecDeque<usize>,
    /// The keys of workers that failed, panicked or were lost before the stop, as long as they are in `tasks`.
    failed: VecDeque<usize>,
    pub(super) unlisted: UnlistedWorkers,
}

/// How many workers that ended before the stop are in the report: the latest ones that ended
/// without an error, and separately the latest ones that failed. A service may start and end
/// workers without limit.
const MOST_ENDED: usize = 32;

/// Hooks or steps in the order of their registration, until they are spawned.
#[derive(Default)]
pub(super) struct Registered {
    pub(super) jobs: VecDeque<Registration>,
    /// No more are accepted.
    pub(super) closed: bool,
}

impl Drop for Registered {
    fn drop(&mut self) {
        drop_each(self.jobs.drain(..));
    }
}

/// A registered future that has not been started.
pub(crate) struct Registration {
    /// The key of the task in the list.
    pub(crate) key: usize,
    pub(crate) timeout: Duration,
    pub(crate) job: Job,
}

/// The state of a worker, a hook or a step.
#[derive(Clone, Debug)]
pub(crate) struct Task {
    pub(crate) name: Name,
    pub(crate) kind: TaskKind,
    pub(super) stage: Stage,
    pub(crate) began: Option<Instant>,
    /// When the stop no longer waits for it, once that is known.
    pub(super) until: Option<Instant>,
    pub(crate) ended: Option<(Instant, TaskOutcome)>,
    /// Set when the task is spawned, and removed when it ends by itself.
    pub(super) handle: Option<AbortHandle>,
}

/// Where the future of a task is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// In [`Registered`].
    Registered,
    /// In a task of a runtime, or it has ended.
    Spawned,
}

impl Task {
    /// Records how the task ended. The caller drops the returned handle after the lock is released.
    pub(super) fn end(&mut self, outcome: TaskOutcome) -> Option<AbortHandle> {
        let now = Instant::now();
        let by_itself = !matches!(outcome, TaskOutcome::Cut | TaskOutcome::NotRun);
        let late = |until| now.saturating_duration_since(until) > ABORT_TIME;
        let outcome = match outcome {
            // A task that blocks its thread cannot be aborted, and may complete long after its timeout.
            TaskOutcome::Done if self.until.is_some_and(late) => TaskOutcome::Cut,
            outcome => outcome,
        };
        self.ended = Some((now, outcome));
        if by_itself { self.handle.take() } else { None }
    }

    /// Whether the driver has to wait for the task. If it was aborted, it may still block its thread.
    pub(super) fn is_awaited(&self) -> bool {
        self.stage == Stage::Spawned && self.ended.is_none()
    }

    /// Whether the task has been started and has not ended. A task that was aborted runs on while it blocks
    /// its thread.
    #[cfg(feature = "signal")]
    pub(crate) fn is_running(&self) -> bool {
        self.handle.as_ref().is_some_and(|it| !it.is_finished())
    }
}

impl List {
    pub(super) fn registered(&mut self, kind: TaskKind) -> &mut Registered {
        match kind {
            TaskKind::LameDuck => &mut self.hooks,
            TaskKind::Worker | TaskKind::Cleanup => &mut self.steps,
        }
    }

    /// The tasks of this kind that are in a runtime.
    pub(super) fn awaited(&self, kind: TaskKind) -> impl Iterator<Item = (&usize, &Task)> {
        let tasks = self.tasks.iter();
        tasks.filter(move |(_, task)| task.kind == kind && task.is_awaited())
    }

    pub(super) fn enter(&mut self, name: Name, kind: TaskKind) -> usize {
        let key = self.next_key;
        self.next_key += 1;
        // A worker is spawned at once.
        let is_worker = kind == TaskKind::Worker;
        let task = Task {
            name,
            kind,
            stage: if is_worker {
                Stage::Spawned
            } else {
                Stage::Registered
            },
            began: is_worker.then(Instant::now),
            until: None,
            ended: None,
            handle: None,
        };
        self.tasks.insert(key, task);
        key
    }

    /// Records that a hook or step has been taken from [`Registered`] to be spawned.
    pub(super) fn spawns(&mut self, key: usize) {
        if let Some(task) = self.tasks.get_mut(&key) {
            task.stage = Stage::Spawned;
        }
    }

    /// Accepts nothing from now on.
    pub(super) fn close(&mut self) {
        self.workers_closed = true;
        self.hooks.closed = true;
        self.steps.closed = true;
    }

    /// Records that a worker has ended before the stop. If there are too many such workers, the
    /// earliest is only counted from now on, and returned.
    pub(super) fn unlist(&mut self, key: usize, failed: bool) -> Option<Task> {
        let listed = if failed {
            &mut self.failed
        } else {
            &mut self.ended
        };
        listed.push_back(key);
        if listed.len() <= MOST_ENDED {
            return None;
        }
        let earliest = listed.pop_front()?;
        self.unlisted.ended += 1;
        self.unlisted.failed += usize::from(failed);
        self.tasks.remove(&earliest)
    }
}
