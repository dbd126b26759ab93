//! The control thread: the signals of the process, and the deadlines of the stops under way.
//!
//! A runtime hears signals and keeps time with its own threads. A handler that blocks them would delay
//! a SIGTERM, and every deadline, for as long as it blocks. So there is one thread beside all runtimes
//! that does both. It is started by the first thing that needs it and ends when nothing does any more:
//! when no lifecycle listens for signals, no stop is under way, no watchdog watches, and the second is
//! over in which a signal may still belong to the last stop.
//!
//! The thread runs no code but this crate's. What it has to tell (wakers), to log, or to drop last is
//! run [`aside`](crate::background), so that it blocks and panics there.
//!
//! 1. *Nothing that needs the thread is left without it.* All needs, and whether the thread lives, are
//!    behind one lock. It leaves in the critical section in which it finds no need; a need that is
//!    entered later starts another.
//! 2. *Nothing is overslept.* A need is entered under the lock, and wakes the thread unless it is
//!    awake. What it waits for is decided in the critical section in which it says that it sleeps.
//!    Where signals are handled it waits on a socket, which a signal handler may write to, and
//!    otherwise on a condition variable. The byte that wakes it stays in the socket until it is read.
//! 3. *The lock is the innermost one.* It is taken under a lifecycle's lock, so nothing of a lifecycle
//!    is called, cloned into or dropped while it is held.
//! 4. *A child that was forked has none of it.* A thread belongs to the process that started it. A
//!    signal handler leaves its signal in memory, where only its own process finds it: the byte that a
//!    child writes to the parent's socket wakes the parent, and means nothing.
//!
//! The lock and the socket are the operating system's, and no model has them. `rest` has the decisions
//! that points 1 and 2 are about, and models of them with a lock and a socket of loom's. The models fail
//! where a wake-up does not write to the socket, where the thread says that it sleeps after it has given
//! up the lock, and where it leaves after that. `driver_waker` has a model of what is rung for.
//!
//! Inside a runtime whose clock is paused tokio's clock rules, and this thread leaves the deadlines to
//! the driver: see [`clock`].

mod board;
pub(crate) mod clock;
mod driver_waker;
#[cfg(all(unix, feature = "signal"))]
mod exit;
mod rest;
#[cfg(feature = "signal")]
mod signals;

#[cfg(all(unix, feature = "signal"))]
use std::collections::BTreeSet;
#[cfg(feature = "signal")]
use std::collections::HashMap;
use std::{io, process, sync::MutexGuard, thread, time::Duration};

use tokio::time::Instant;

pub(crate) use self::driver_waker::DriverWaker;
#[cfg(feature = "signal")]
use self::signals::Signals;
use self::{board::Board, rest::Rest};
use crate::background::{Aside, shielded};
use crate::{config::plan::instant_after, sync::lock};
#[cfg(feature = "signal")]
use crate::{events, report::Trigger};

/// Of a lifecycle.
pub(crate) type Id = u64;

/// How long after the last stop a signal is taken for one that was meant for it.
#[cfg(feature = "signal")]
const LATE: Duration = Duration::from_secs(1);

/// The longest sleep: what timeouts of the operating system can say.
const LONGEST: Duration = Duration::from_secs(3600);

/// When a stop is looked at again that has not said when.
const OTHERWISE: Duration = Duration::from_millis(250);

/// How often the driver of a stop is woken, where there are few.
///
/// Of the threads of a runtime one at a time waits for timers and sockets. If a task that it runs does
/// not return, no thread does until another has reason to. To be woken from outside is one.
const TICK: Duration = Duration::from_millis(50);

/// How many threads may be stuck in wakers before the rest have to wait.
const MOST_STUCK: usize = 16;

/// What the thread has to do with a lifecycle. None of it may run code that is not this crate's.
pub(crate) trait Subject: Clone + Send + Sync + 'static {
    #[cfg(feature = "signal")]
    type Weak: Clone + Send + 'static;

    #[cfg(feature = "signal")]
    fn upgrade(weak: &Self::Weak) -> Option<Self>;

    /// Takes the steps that are due. Returns what there is to tell of them.
    fn look(&self) -> Option<Box<dyn FnOnce() + Send>>;

    /// Acts upon a signal, and returns as above.
    #[cfg(feature = "signal")]
    fn hear(&self, signal: Trigger) -> Option<Box<dyn FnOnce() + Send>>;

    /// What there is to say at the end of the grace period, unless everything has ended.
    #[cfg(all(unix, feature = "signal"))]
    fn describe(&self) -> Option<String>;
}

pub(crate) struct Control<S: Subject> {
    // Not the one of `sync`: a socket cannot be modelled.
    inner: std::sync::Mutex<Inner<S>>,
    needed: std::sync::Condvar,
    tellers: Aside,
}

struct Inner<S: Subject> {
    rest: Rest,
    /// Until when it sleeps.
    sleeps_until: Option<Instant>,
    board: Board<S>,
    #[cfg(feature = "signal")]
    heard: Hearing<S>,
    #[cfg(all(unix, feature = "signal"))]
    watched: Watched<S>,
}

/// Who is to hear of signals.
#[cfg(feature = "signal")]
struct Hearing<S: Subject> {
    signals: Option<Signals>,
    listeners: HashMap<Id, S::Weak>,
    /// The last listener has stopped: until then signals are not given back.
    late_until: Option<Instant>,
}

/// Whose grace period the process may not outlive.
#[cfg(all(unix, feature = "signal"))]
struct Watched<S: Subject> {
    services: HashMap<Id, (Option<Instant>, S::Weak)>,
    due: BTreeSet<(Instant, Id)>,
}

/// What there is to do.
struct Todo<S: Subject> {
    due: Vec<S>,
    #[cfg(feature = "signal")]
    signals: Vec<Trigger>,
    #[cfg(feature = "signal")]
    listeners: Vec<S::Weak>,
    #[cfg(feature = "signal")]
    joined_during_stop: bool,
    #[cfg(all(unix, feature = "signal"))]
    overdue: Vec<S::Weak>,
}

impl<S: Subject> Control<S> {
    pub(crate) fn new() -> Self {
        Self {
            inner: std::sync::Mutex::new(Inner {
                rest: Rest::new(),
                sleeps_until: None,
                board: Board::default(),
                #[cfg(feature = "signal")]
                heard: Hearing {
                    signals: None,
                    listeners: HashMap::new(),
                    late_until: None,
                },
                #[cfg(all(unix, feature = "signal"))]
                watched: Watched {
                    services: HashMap::new(),
                    due: BTreeSet::new(),
                },
            }),
            needed: std::sync::Condvar::new(),
            tellers: Aside::new("graceful-tell", MOST_STUCK),
        }
    }

    /// Has a stop looked at at this instant, and where its driver is to be woken every now and then,
    /// before that. Without a thread the driver alone keeps the time.
    pub(crate) fn schedule(&'static self, id: Id, subject: &S, at: Instant, driven: bool) {
        let mut inner = lock!(self.inner);
        let at = if driven {
            let many = u32::try_from(inner.board.len() / 256).unwrap_or(u32::MAX);
            let tick = TICK.saturating_mul(many.saturating_add(1));
            at.min(instant_after(clock::real_now(), tick))
        } else {
            at
        };
        inner.board.schedule(id, subject, at);
        let is_earlier = inner.sleeps_until.is_none_or(|until| at < until);
        let _ = self.need(&mut inner, is_earlier);
    }

    /// A stop is over. What is returned is to be dropped after every lock.
    pub(crate) fn end(&'static self, id: Id) -> Option<S> {
        let mut inner = lock!(self.inner);
        let ended = inner.board.end(id);
        if inner.board.is_empty() {
            // It may be that it can leave.
            self.wake(&mut inner);
        }
        ended
    }

    pub(crate) fn notify(&'static self, id: Id) {
        let mut inner = lock!(self.inner);
        inner.board.notify(id);
        self.wake(&mut inner);
    }

    /// Passes signals on to a lifecycle, until it [stops](Self::stopped) or is [gone](Self::forget).
    #[cfg(feature = "signal")]
    pub(crate) fn listen(&'static self, id: Id, weak: impl FnOnce() -> S::Weak) -> io::Result<()> {
        let mut inner = lock!(self.inner);
        if !inner.heard.listeners.contains_key(&id) {
            match &mut inner.heard.signals {
                Some(signals) => signals.adopt()?,
                none => *none = Some(Signals::install(|| self.poke())?),
            }
            // Before they are kept from what they would do by themselves.
            self.need(&mut inner, true)?;
            inner.heard.listeners.insert(id, weak());
            inner.heard.late_until = None;
        }
        if let Some(signals) = &inner.heard.signals {
            signals.keep();
        }
        Ok(())
    }

    /// A service has stopped. Signals go to the others; if there are none, a moment later to the
    /// operating system. What was given up and has not ended may hold the process, and is still watched.
    #[cfg(feature = "signal")]
    pub(crate) fn stopped(&'static self, id: Id, has_ended: bool) {
        let mut inner = lock!(self.inner);
        #[cfg(unix)]
        if has_ended {
            inner.watched.remove(id);
        }
        #[cfg(not(unix))]
        let _ = has_ended;
        if inner.heard.listeners.remove(&id).is_some() && inner.heard.listeners.is_empty() {
            inner.heard.late_until = Some(clock::real_now() + LATE);
        }
        self.wake(&mut inner);
    }

    /// A lifecycle is gone.
    #[cfg(feature = "signal")]
    pub(crate) fn forget(&'static self, id: Id) {
        let mut inner = lock!(self.inner);
        #[cfg(unix)]
        inner.watched.remove(id);
        if inner.heard.listeners.remove(&id).is_some() {
            inner.heard.give_back_if_unused();
        }
        self.wake(&mut inner);
    }

    /// Ends the process at the instant that [`watch_until`](Self::watch_until) will name.
    #[cfg(all(unix, feature = "signal"))]
    pub(crate) fn watch(&'static self, id: Id, weak: S::Weak) -> io::Result<()> {
        let mut inner = lock!(self.inner);
        self.need(&mut inner, true)?;
        inner.watched.services.insert(id, (None, weak));
        Ok(())
    }

    #[cfg(all(unix, feature = "signal"))]
    pub(crate) fn watch_until(&'static self, id: Id, until: Instant) {
        let mut inner = lock!(self.inner);
        let Watched { services, due } = &mut inner.watched;
        if let Some((at @ None, _)) = services.get_mut(&id) {
            *at = Some(until);
            due.insert((until, id));
            self.wake(&mut inner);
        }
    }

    /// Runs code that is not this crate's beside the thread.
    pub(crate) fn aside(&'static self, job: Box<dyn FnOnce() + Send>) {
        self.tellers.queue(job);
        self.tellers.work();
    }

    /// Wakes the thread, if there is a need for it to look.
    fn wake(&self, inner: &mut Inner<S>) {
        if !inner.rest.wakes() {
            return;
        }
        self.needed.notify_one();
        #[cfg(all(unix, feature = "signal"))]
        if let Some(signals) = &inner.heard.signals {
            signals.poke();
        }
    }

    /// As [`wake`](Self::wake), for who does not hold the lock.
    #[cfg(feature = "signal")]
    fn poke(&self) {
        self.wake(&mut lock!(self.inner));
    }

    /// Starts the thread, unless this process has it, or wakes it.
    fn need(&'static self, inner: &mut Inner<S>, wake: bool) -> io::Result<()> {
        let process = process::id();
        if inner.rest.has_thread(process) {
            if wake {
                self.wake(inner);
            }
            return Ok(());
        }
        let thread = thread::Builder::new().name("graceful-control".to_owned());
        thread.spawn(|| self.run()).map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("the control thread cannot be started: {error}"),
            )
        })?;
        inner.rest.started(process);
        Ok(())
    }

    fn run(&'static self) {
        let mut inner = lock!(self.inner);
        loop {
            inner.rest.looks();
            let now = Instant::now();
            let todo = inner.take(now);
            if !todo.is_empty() {
                drop(inner);
                self.act(todo);
                inner = lock!(self.inner);
                continue;
            }
            #[cfg(feature = "signal")]
            if inner.heard.late_until.is_some_and(|until| now >= until) {
                inner.heard.late_until = None;
                inner.heard.give_back_if_unused();
                // One that came a moment earlier is still there.
                continue;
            }
            if !inner.has_need() {
                inner.rest.leaves();
                return;
            }
            // Those who tell what it has seen may be stuck.
            let relief = self.tellers.relieve().map(Instant::from_std);
            inner.sleeps_until = inner.next().into_iter().chain(relief).min();
            inner = self.sleep(inner);
        }
    }

    /// Sleeps until it is woken, or it is time.
    fn sleep<'a>(&'a self, mut inner: MutexGuard<'a, Inner<S>>) -> MutexGuard<'a, Inner<S>> {
        inner.rest.sleeps();
        let left = inner.sleeps_until.map_or(LONGEST, |until| {
            until.saturating_duration_since(Instant::now()).min(LONGEST)
        });
        #[cfg(all(unix, feature = "signal"))]
        if let Some(signals) = &inner.heard.signals {
            let alarm = signals.alarm();
            drop(inner);
            alarm.wait(left);
            return lock!(self.inner);
        }
        let slept = self.needed.wait_timeout(inner, left);
        slept.unwrap_or_else(std::sync::PoisonError::into_inner).0
    }

    fn act(&'static self, todo: Todo<S>) {
        // Whoever is the last to hold a lifecycle drops what its user has put in it.
        let mut held = Vec::new();
        for subject in todo.due {
            shielded(|| {
                if let Some(tell) = subject.look() {
                    self.aside(tell);
                }
            });
            held.push(subject);
        }
        #[cfg(feature = "signal")]
        for signal in todo.signals {
            let listeners: Vec<_> = todo.listeners.iter().filter_map(S::upgrade).collect();
            if listeners.is_empty() {
                if todo.joined_during_stop {
                    events::late_signal(signal);
                } else {
                    signals::default_action(signal);
                }
            }
            for listener in listeners {
                shielded(|| {
                    if let Some(tell) = listener.hear(signal) {
                        self.aside(tell);
                    }
                });
                held.push(listener);
            }
        }
        #[cfg(all(unix, feature = "signal"))]
        for overdue in todo.overdue {
            crate::control::exit::end(move || S::upgrade(&overdue)?.describe());
        }
        if !held.is_empty() {
            self.aside(Box::new(move || drop(held)));
        }
    }
}

impl<S: Subject> Inner<S> {
    fn take(&mut self, now: Instant) -> Todo<S> {
        #[cfg(feature = "signal")]
        let signals = self.heard.signals.as_ref().map(Signals::take);
        #[cfg(feature = "signal")]
        let signals = signals.unwrap_or_default();
        Todo {
            due: self.board.take(now, instant_after(now, OTHERWISE)),
            #[cfg(feature = "signal")]
            listeners: if signals.is_empty() {
                Vec::new()
            } else {
                self.heard.listeners.values().cloned().collect()
            },
            #[cfg(feature = "signal")]
            signals,
            #[cfg(feature = "signal")]
            joined_during_stop: self.heard.late_until.is_some(),
            #[cfg(all(unix, feature = "signal"))]
            overdue: self.watched.take(now),
        }
    }

    fn has_need(&self) -> bool {
        #[cfg(feature = "signal")]
        if !self.heard.listeners.is_empty() || self.heard.late_until.is_some() {
            return true;
        }
        #[cfg(all(unix, feature = "signal"))]
        if !self.watched.services.is_empty() {
            return true;
        }
        !self.board.is_empty()
    }

    fn next(&self) -> Option<Instant> {
        let next = self.board.next().into_iter();
        #[cfg(feature = "signal")]
        let next = next.chain(self.heard.late_until);
        #[cfg(all(unix, feature = "signal"))]
        let next = next.chain(self.watched.due.first().map(|(at, _)| *at));
        next.min()
    }
}

#[cfg(feature = "signal")]
impl<S: Subject> Hearing<S> {
    /// From now on a signal does what it did before anything listened.
    fn give_back_if_unused(&self) {
        if self.listeners.is_empty() && self.late_until.is_none() {
            if let Some(signals) = &self.signals {
                signals.give_back();
            }
        }
    }
}

#[cfg(all(unix, feature = "signal"))]
impl<S: Subject> Watched<S> {
    fn remove(&mut self, id: Id) {
        if let Some((Some(at), _)) = self.services.remove(&id) {
            self.due.remove(&(at, id));
        }
    }

    fn take(&mut self, now: Instant) -> Vec<S::Weak> {
        let mut overdue = Vec::new();
        while let Some(&(at, id)) = self.due.first() {
            if at > now {
                break;
            }
            self.due.pop_first();
            overdue.extend(self.services.remove(&id).map(|(_, weak)| weak));
        }
        overdue
    }
}

impl<S: Subject> Todo<S> {
    fn is_empty(&self) -> bool {
        #[cfg(feature = "signal")]
        if !self.signals.is_empty() {
            return false;
        }
        #[cfg(all(unix, feature = "signal"))]
        if !self.overdue.is_empty() {
            return false;
        }
        self.due.is_empty()
    }
}
