//! The list of workers, hooks and steps: their states, and what has not been started yet.

use std::{
    borrow::Cow,
    collections::{BTreeMap, VecDeque},
    pin::Pin,
    time::Duration,
};

use tokio::{
    task::{AbortHandle, JoinHandle},
    time::Instant,
};

use crate::report::{TaskKind, TaskOutcome, UnlistedWorkers};

/// The name of a hold, worker, hook or cleanup step.
pub(crate) type Name = Cow<'static, str>;

pub(super) type Job = Pin<Box<dyn Future<Output = TaskOutcome> + Send>>;

#[derive(Default)]
pub(super) struct List {
    pub(super) hooks: Registered,
    pub(super) running_hooks: Vec<(usize, JoinHandle<()>)>,
    /// The workers that have not ended.
    pub(super) workers: BTreeMap<usize, JoinHandle<()>>,
    pub(super) workers_closed: bool,
    pub(super) steps: Registered,
    /// In the order in which they were registered.
    pub(super) tasks: BTreeMap<usize, Task>,
    next_key: usize,
    /// The keys of workers that ended without an error before the stop, as long as they are in
    /// `tasks`.
    ended: VecDeque<usize>,
    /// The keys of workers that failed or panicked before the stop, as long as they are in `tasks`.
    failed: VecDeque<usize>,
    pub(super) unlisted: UnlistedWorkers,
}

/// How many workers that ended before the stop are in the report: the latest ones that ended
/// without an error, and separately the latest ones that failed. A service may start and end
/// workers without limit.
const MOST_ENDED: usize = 32;

/// Hooks or steps in the order of their registration, until they are taken.
#[derive(Default)]
pub(super) struct Registered {
    pub(super) jobs: Vec<Registration>,
    pub(super) taken: bool,
}

/// A registered future that has not been started.
pub(crate) struct Registration {
    /// The key of the task, for `Work::began` and `Work::ended`.
    pub(crate) key: usize,
    pub(crate) timeout: Duration,
    pub(crate) job: Job,
}

/// The state of a worker, a hook or a step.
#[derive(Clone, Debug)]
pub(crate) struct Task {
    pub(crate) name: Name,
    pub(crate) kind: TaskKind,
    pub(crate) began: Option<Instant>,
    pub(crate) ended: Option<(Instant, TaskOutcome)>,
    /// Set when the task is started, and removed when it ends by itself.
    handle: Option<AbortHandle>,
}

impl Task {
    /// Records how the task ended. The caller drops the returned handle after the lock is released.
    pub(super) fn end(&mut self, outcome: TaskOutcome) -> Option<AbortHandle> {
        let was_cut = outcome == TaskOutcome::Cut;
        self.ended = Some((Instant::now(), outcome));
        if was_cut { None } else { self.handle.take() }
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

    /// Whether there is a hook that has not ended.
    pub(super) fn has_hook(&self) -> bool {
        let mut hooks = self
            .tasks
            .values()
            .filter(|it| it.kind == TaskKind::LameDuck);
        hooks.any(|hook| hook.ended.is_none())
    }

    pub(super) fn enter(&mut self, name: Name, kind: TaskKind, began: Option<Instant>) -> usize {
        let key = self.next_key;
        self.next_key += 1;
        let task = Task {
            name,
            kind,
            began,
            ended: None,
            handle: None,
        };
        self.tasks.insert(key, task);
        key
    }

    pub(super) fn started(&mut self, key: usize, handle: &JoinHandle<()>) {
        let task = self.tasks.get_mut(&key);
        // A hook or step may have ended before its handle is passed on.
        if let Some(task) = task.filter(|task| task.ended.is_none()) {
            task.handle = Some(handle.abort_handle());
        }
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
