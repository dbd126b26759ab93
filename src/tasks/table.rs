//! The work besides requests: holds, and what is registered to run during a shutdown.
//!
//! What is here is bookkeeping. When what runs is for the timeline to say; `tasks` is the face.
//!
//! # The last hold and the drain
//!
//! 1. *The end of the last hold is not missed.* [`release`](Work::release) removes the hold under the
//!    lock, and then reads the phase. The timeline advances the phase, and then counts the holds under
//!    the lock. If the removal comes first, the count is zero. If the count comes first, the lock
//!    orders the advance before the reading of the phase, so that the timeline is rung for.
//! 2. *A hold that continues a request is waited for.* It begins before the request is over.
//!    [`is_idle`](Work::is_idle) looks at the requests first: where the request is over, the hold is
//!    counted.
//!
//! `models` holds both, and fails where the phase is read before the removal, and where the holds are
//! counted before the requests are looked at.

use std::{
    any::Any,
    borrow::Cow,
    cmp::Reverse,
    collections::{BTreeMap, VecDeque},
    error::Error,
    fmt, iter,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::{Pin, pin},
    task::Poll,
    time::Duration,
};

use slab::Slab;
use tokio::{sync::oneshot, task::JoinHandle, time::Instant};

use crate::{
    phase::Phase,
    report::{CutHold, TaskKind, TaskOutcome, UnlistedWorkers},
    sync::{Mutex, lock},
};

/// The name of a hold, worker, hook or cleanup step.
pub(crate) type Name = Cow<'static, str>;

type Job = Pin<Box<dyn Future<Output = TaskOutcome> + Send>>;

#[derive(Default)]
pub(crate) struct Work {
    holds: Mutex<Slab<(Name, Instant)>>,
    list: Mutex<List>,
}

#[derive(Default)]
struct List {
    hooks: Registered,
    running_hooks: Vec<(usize, JoinHandle<()>)>,
    /// Those that have not ended.
    workers: BTreeMap<usize, JoinHandle<()>>,
    workers_closed: bool,
    steps: Registered,
    /// In the order in which they were registered.
    tasks: BTreeMap<usize, Task>,
    next_key: usize,
    /// Workers that ended in good order before the stop, as far as they are in `tasks`.
    ended: VecDeque<usize>,
    /// Workers that failed or panicked before the stop, as far as they are in `tasks`.
    failed: VecDeque<usize>,
    unlisted: UnlistedWorkers,
}

/// How many workers that ended before the stop are in the report: the latest of those that ended in
/// good order, and the latest of those that did not. A service may run workers without end.
const MOST_ENDED: usize = 32;

/// Hooks or steps, in the order they were registered, until they are taken.
#[derive(Default)]
struct Registered {
    jobs: Vec<Registration>,
    taken: bool,
}

/// A future that has not begun.
pub(crate) struct Registration {
    /// Of the task, for [`Work::began`] and [`Work::ended`].
    pub(crate) key: usize,
    pub(crate) timeout: Duration,
    pub(crate) job: Job,
}

/// What is known of a worker, a hook or a step.
#[derive(Clone, Debug)]
pub(crate) struct Task {
    pub(crate) name: Name,
    pub(crate) kind: TaskKind,
    pub(crate) began: Option<Instant>,
    pub(crate) ended: Option<(Instant, TaskOutcome)>,
}

impl Work {
    pub(crate) fn hold(&self, name: Name) -> usize {
        lock!(self.holds).insert((name, Instant::now()))
    }

    /// Ends a hold. Says whether a drain may have waited for it: it was the last one, and draining has
    /// begun. The phase is read after the hold has ended: point 1 of the module header.
    pub(crate) fn release(&self, key: usize, phase: impl FnOnce() -> Phase) -> bool {
        let mut holds = lock!(self.holds);
        let held = holds.try_remove(key);
        let left = holds.len();
        drop(holds);
        drop(held);
        left == 0 && phase() >= Phase::Draining
    }

    /// Whether the requests are over, and nothing is held. In this order: point 2 of the module header.
    pub(crate) fn is_idle(&self, requests_are_over: impl FnOnce() -> bool) -> bool {
        requests_are_over() && self.holds() == 0
    }

    pub(crate) fn holds(&self) -> usize {
        lock!(self.holds).len()
    }

    /// The holds, the oldest first.
    pub(crate) fn list_holds(&self, now: Instant) -> Vec<CutHold> {
        let mut list: Vec<_> = {
            let holds = lock!(self.holds);
            let holds = holds.iter().map(|(_, (name, begun))| CutHold {
                name: name.clone().into_owned(),
                age: now.saturating_duration_since(*begun),
            });
            holds.collect()
        };
        list.sort_by_key(|hold| Reverse(hold.age));
        list
    }

    /// Enters a hook or a step, unless those of its kind have been taken.
    pub(crate) fn register(&self, kind: TaskKind, name: Name, timeout: Duration, job: Job) -> bool {
        let mut list = lock!(self.list);
        if list.registered(kind).taken {
            return false;
        }
        let key = list.enter(name, kind, None);
        let registration = Registration { key, timeout, job };
        list.registered(kind).jobs.push(registration);
        true
    }

    /// Takes the hooks or the steps, once.
    pub(crate) fn take(&self, kind: TaskKind) -> Vec<Registration> {
        let mut list = lock!(self.list);
        let registered = list.registered(kind);
        registered.taken = true;
        std::mem::take(&mut registered.jobs)
    }

    /// Enters a worker that `spawn` starts, unless workers are no longer wanted. The worker is to
    /// wait for its key, and not to begin without it.
    pub(crate) fn employ(
        &self,
        name: Name,
        spawn: impl FnOnce(oneshot::Receiver<usize>) -> JoinHandle<()>,
    ) -> bool {
        let (permit, permission) = oneshot::channel();
        // Without the lock: a runtime that shuts down drops the worker here and now.
        let handle = spawn(permission);
        let mut list = lock!(self.list);
        if list.workers_closed {
            return false;
        }
        let key = list.enter(name, TaskKind::Worker, Some(Instant::now()));
        list.workers.insert(key, handle);
        drop(list);
        let _ = permit.send(key);
        true
    }

    /// The handles of the workers that have not ended. From now on there are no new ones.
    pub(crate) fn dismiss(&self) -> Vec<(usize, JoinHandle<()>)> {
        let mut list = lock!(self.list);
        list.workers_closed = true;
        std::mem::take(&mut list.workers).into_iter().collect()
    }

    pub(crate) fn hook_runs(&self, key: usize, handle: JoinHandle<()>) {
        lock!(self.list).running_hooks.push((key, handle));
    }

    /// The handles of the hooks that have been started.
    pub(crate) fn running_hooks(&self) -> Vec<(usize, JoinHandle<()>)> {
        std::mem::take(&mut lock!(self.list).running_hooks)
    }

    pub(crate) fn began(&self, key: usize) {
        if let Some(task) = lock!(self.list).tasks.get_mut(&key) {
            task.began = Some(Instant::now());
        }
    }

    /// Notes how a task came to its end. The first to say so is right.
    pub(crate) fn ended(
        &self,
        key: usize,
        outcome: TaskOutcome,
        before_stop: bool,
    ) -> Option<Task> {
        let mut list = lock!(self.list);
        let task = list.tasks.get_mut(&key)?;
        if task.ended.is_some() {
            return None;
        }
        let failed = matches!(outcome, TaskOutcome::Failed(_) | TaskOutcome::Panicked(_));
        task.ended = Some((Instant::now(), outcome));
        let task = task.clone();
        let handle = list.workers.remove(&key);
        let unlisted = if before_stop && task.kind == TaskKind::Worker {
            list.unlist(key, failed)
        } else {
            None
        };
        drop(list);
        drop((handle, unlisted));
        Some(task)
    }

    /// Has a task that ended in good order, but later than this, count as one that was cut.
    pub(crate) fn was_late(&self, key: usize, latest: Instant) {
        let mut list = lock!(self.list);
        let ended = list
            .tasks
            .get_mut(&key)
            .and_then(|task| task.ended.as_mut());
        if let Some((ended, outcome @ TaskOutcome::Done)) = ended {
            if *ended > latest {
                *outcome = TaskOutcome::Cut;
            }
        }
    }

    /// There is something to be done, or a hook to be waited for, when nothing is in flight any
    /// more. If not, from now on nothing is accepted either.
    pub(crate) fn has_cleanup_or_closes(&self) -> bool {
        let mut list = lock!(self.list);
        if !list.workers.is_empty() || !list.steps.jobs.is_empty() || list.has_hook() {
            return true;
        }
        list.workers_closed = true;
        list.hooks.taken = true;
        list.steps.taken = true;
        false
    }

    pub(crate) fn has_steps(&self) -> bool {
        self.steps() > 0
    }

    /// How many steps have not been taken.
    pub(crate) fn steps(&self) -> usize {
        lock!(self.list).steps.jobs.len()
    }

    /// The sum of the steps' bounds.
    pub(crate) fn asked_by_steps(&self) -> Duration {
        let list = lock!(self.list);
        let timeouts = list.steps.jobs.iter().map(|step| step.timeout);
        timeouts.fold(Duration::ZERO, Duration::saturating_add)
    }

    pub(crate) fn is_worker(&self, key: usize) -> bool {
        let list = lock!(self.list);
        list.tasks
            .get(&key)
            .is_some_and(|task| task.kind == TaskKind::Worker)
    }

    /// A hook has not begun, or not come to its end.
    pub(crate) fn has_hook(&self) -> bool {
        lock!(self.list).has_hook()
    }

    pub(crate) fn tasks(&self) -> Vec<Task> {
        lock!(self.list).tasks.values().cloned().collect()
    }

    /// What ended before the stop and is not in [`tasks`](Self::tasks) any more.
    pub(crate) fn unlisted(&self) -> UnlistedWorkers {
        lock!(self.list).unlisted
    }
}

impl List {
    fn registered(&mut self, kind: TaskKind) -> &mut Registered {
        match kind {
            TaskKind::LameDuck => &mut self.hooks,
            TaskKind::Worker | TaskKind::Cleanup => &mut self.steps,
        }
    }

    /// A hook has not begun, or not come to its end.
    fn has_hook(&self) -> bool {
        let mut hooks = self
            .tasks
            .values()
            .filter(|it| it.kind == TaskKind::LameDuck);
        hooks.any(|hook| hook.ended.is_none())
    }

    fn enter(&mut self, name: Name, kind: TaskKind, began: Option<Instant>) -> usize {
        let key = self.next_key;
        self.next_key += 1;
        let task = Task {
            name,
            kind,
            began,
            ended: None,
        };
        self.tasks.insert(key, task);
        key
    }

    /// Notes that a worker has ended before the stop. Where there are too many of its kind, the
    /// earliest is only counted from now on; gives that back.
    fn unlist(&mut self, key: usize, failed: bool) -> Option<Task> {
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

impl fmt::Debug for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Work")
            .field("holds", &self.holds())
            .field("tasks", &self.tasks())
            .finish_non_exhaustive()
    }
}

/// What a server, a worker or a cleanup step may resolve to: `()`, or a `Result<(), E>` whose error
/// is reported.
///
/// The report has the error's text and those of its [sources](Error::source), joined by `": "`.
///
/// Sealed: implemented here for those two.
#[diagnostic::on_unimplemented(
    message = "the future must end with `()` or a `Result<(), E>`, but its output is `{Self}`",
    label = "the output of this future is `{Self}`",
    note = "a future that only loops has the output `!`, and could not be stopped: leave the loop \
            when the service stops, as with `() = &mut stop => break` in `tokio::select!`",
    note = "the error `E` must convert into `Box<dyn Error + Send + Sync>`"
)]
pub trait Completion: sealed::Sealed {}

impl Completion for () {}
impl<E: Into<Box<dyn Error + Send + Sync>>> Completion for Result<(), E> {}

mod sealed {
    use std::error::Error;

    #[allow(unreachable_pub)]
    pub trait Sealed {
        fn error(self) -> Option<String>;
    }

    impl Sealed for () {
        fn error(self) -> Option<String> {
            None
        }
    }

    impl<E: Into<Box<dyn Error + Send + Sync>>> Sealed for Result<(), E> {
        fn error(self) -> Option<String> {
            self.err().map(|error| super::with_sources(&*error.into()))
        }
    }
}

/// The error of what has completed, if it has one.
pub(crate) fn error(completion: impl Completion) -> Option<String> {
    sealed::Sealed::error(completion)
}

/// The text of an error and of its sources, without those that the text has already.
pub(crate) fn with_sources(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let sources = iter::successors(error.source(), |&error| error.source());
    // Bounded, because an error may name itself as its source.
    for source in sources.take(MOST_SOURCES) {
        let source = source.to_string();
        if !text.contains(&source) {
            text.push_str(": ");
            text.push_str(&source);
        }
    }
    text
}

/// How many sources of an error are in its text.
const MOST_SOURCES: usize = 32;

/// Runs a future to its end, also if that is a panic.
pub(crate) async fn outcome<F: Future<Output: Completion>>(future: F) -> TaskOutcome {
    // The block drops it with the last poll, in case that panics.
    let mut future = pin!(async move { error(future.await) });
    std::future::poll_fn(|cx| {
        // A future that has panicked is not polled again.
        let polled = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx)));
        match polled {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(None)) => Poll::Ready(TaskOutcome::Done),
            Ok(Poll::Ready(Some(error))) => Poll::Ready(TaskOutcome::Failed(error)),
            Err(payload) => Poll::Ready(TaskOutcome::Panicked(message(&*payload))),
        }
    })
    .await
}

/// What a panic said.
fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("of a type that is no text").to_owned()
}

#[cfg(all(test, tower_graceful_loom))]
mod models {
    use std::sync::Arc;

    use loom::{model, thread};

    use super::*;
    use crate::{
        admission::Gate,
        sync::{AtomicBool, Ordering::Relaxed},
    };

    type Holding = Gate<(), Work>;

    fn holding() -> Holding {
        Gate::new(None, false, (), |_| Work::default())
    }

    /// As the timeline asks.
    fn is_idle(gate: &Holding) -> bool {
        gate.is_idle(|| gate.settled_word().is_idle())
    }

    #[test]
    fn the_end_of_the_last_hold_is_seen_or_rung_for() {
        model(|| {
            let gate = holding();
            let rung = Arc::new(AtomicBool::new(false));
            let holds = [(); 2].map(|()| gate.hold("work".into()));
            let ends = holds.map(|key| {
                let (gate, rung) = (gate.clone(), Arc::clone(&rung));
                thread::spawn(move || {
                    if gate.release(key, || gate.phase()) {
                        rung.store(true, Relaxed);
                    }
                })
            });
            gate.advance(Phase::Draining);
            let seen = is_idle(&gate);
            for end in ends {
                end.join().unwrap();
            }
            assert!(seen || rung.load(Relaxed), "the drain waits for ever");
            assert!(is_idle(&gate));
        });
    }

    #[test]
    fn a_hold_that_continues_a_request_is_waited_for() {
        model(|| {
            let gate = holding();
            let request = gate.admission().admit().unwrap().answered();
            gate.advance(Phase::Draining);
            let handler = {
                let gate = gate.clone();
                thread::spawn(move || {
                    let key = gate.hold("work".into());
                    drop(request);
                    key
                })
            };
            assert!(!is_idle(&gate), "it is in flight, or held");
            let key = handler.join().unwrap();
            assert!(gate.release(key, || gate.phase()));
            assert!(is_idle(&gate));
        });
    }
}
