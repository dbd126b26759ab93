//! The control thread: it receives the signals of the process, and keeps the deadlines of the stops
//! under way.
//!
//! A runtime receives signals and keeps time with its own threads. A handler that blocks them would
//! delay a SIGTERM, and every deadline, for as long as it blocks. So one plain thread beside all
//! runtimes does both. The timeline (`shutdown`) schedules its deadlines here and listens for
//! signals here. The first call that needs the thread starts it. The thread ends when nothing needs
//! it any more: no lifecycle listens for signals, no stop is under way, no watchdog is active, and
//! the second has passed in which a signal may still belong to the last stop.
//!
//! The thread runs only this crate's code. Wakers, log subscribers and destructors of user values
//! run on the threads of [`background`](crate::background), where they may block and panic. (If the
//! operating system cannot start such a thread, wakers and destructors run here after all.)
//!
//! 1. *No need is left without the thread.* All needs, and whether the thread exists, are behind
//!    one lock. The thread ends in the critical section in which it finds no need. A need that is
//!    registered later starts another thread. Model: `an_entry_is_never_left_without_a_thread`.
//! 2. *The thread oversleeps nothing.* A need is registered under the lock, and wakes the thread
//!    unless it is awake. The thread decides what to wait for in the critical section in which it
//!    records that it sleeps. Where signals are handled it waits on a socket, because a signal
//!    handler may write to one; otherwise on a condition variable. The byte that wakes the thread
//!    stays in the socket until it is read. Models: `the_thread_oversleeps_no_entry_on_the_socket`,
//!    `the_thread_oversleeps_no_entry_on_the_condition`.
//! 3. *The lock is the innermost one.* It is taken while the lock of a lifecycle is held. So no
//!    method of a lifecycle is called, and no lifecycle is dropped, while it is held; only
//!    references to lifecycles are cloned.
//! 4. *A forked child inherits nothing.* A thread belongs to the process that started it. The first
//!    need in a child starts another, which waits on a socket of its own. A signal handler leaves its
//!    signal in memory, where only its own process finds it. The byte that a child writes to the
//!    parent's socket before that only wakes the parent, which finds no signal.
//!
//! The lock and the socket are the operating system's, and loom cannot model them. `thread_state` contains
//! the decisions of points 1 and 2, and models of them with loom's lock and a socket made of loom's
//! parts. The models fail if a wake-up does not write to the socket, if the thread records that it
//! sleeps after it has released the lock, and if it ends after that. `driver_waker` has its own
//! argument and model.
//!
//! Inside a runtime whose clock is paused, tokio's clock applies, and this thread leaves the
//! deadlines to the driver: see [`clock`].
//!
//! This file is long because the argument above and the thread's loop must be read together.

pub(crate) mod clock;
mod deadlines;
mod driver_waker;
#[cfg(all(unix, feature = "signal"))]
mod exit;
mod needs;
#[cfg(feature = "signal")]
mod signals;
mod thread_state;

#[cfg(feature = "signal")]
use std::sync::Weak;
use std::{
    io, process,
    sync::{Arc, MutexGuard},
    thread,
    time::Duration,
};

use tokio::time::Instant;

pub(crate) use self::driver_waker::DriverWaker;
#[cfg(all(unix, feature = "signal"))]
use self::needs::Watched;
use self::needs::{DueWork, Needs};
#[cfg(feature = "signal")]
use self::signals::Signals;
use crate::background::{Job, JobThreads, shielded};
use crate::{config::plan::instant_after, sync::lock};
#[cfg(feature = "signal")]
use crate::{events, report::Trigger};

/// Identifies a lifecycle.
pub(crate) type Id = u64;

/// How long after the last stop a signal still counts as one that was meant for it.
#[cfg(feature = "signal")]
const LATE: Duration = Duration::from_secs(1);

/// The longest sleep. Below the limits of the operating system's timeouts.
const LONGEST: Duration = Duration::from_secs(3600);

/// When a stop is checked again if its last check has panicked before it scheduled the next one.
const FALLBACK_CHECK: Duration = Duration::from_millis(250);

/// How often the driver of a stop is woken, if there are few stops.
///
/// At any time one thread of a runtime waits for timers and sockets. If it then runs a task that
/// does not return, no other thread waits for them until there is a reason to. A wake-up from
/// outside is such a reason.
const TICK: Duration = Duration::from_millis(50);

/// How often the driver of each stop is woken, if there are this many.
fn tick(stops: usize) -> Duration {
    let many = u32::try_from(stops / 256).unwrap_or(u32::MAX);
    TICK.saturating_mul(many.saturating_add(1))
}

/// How many threads may be blocked in wakers before other wakers have to wait.
const MOST_STUCK: usize = 16;

/// What the thread needs from a lifecycle. The methods must not run code that does not belong to
/// this crate.
pub(crate) trait Subject: Send + Sync + 'static {
    /// Takes the steps that are due. Returns the notifications that they require, to be run on
    /// another thread.
    fn take_due_steps(self: &Arc<Self>) -> Option<Job>;

    /// Handles a signal. Returns notifications as [`take_due_steps`](Self::take_due_steps) does.
    #[cfg(feature = "signal")]
    fn on_signal(self: &Arc<Self>, signal: Trigger) -> Option<Job>;

    /// The message to print when the grace period is over, or `None` if everything has ended.
    #[cfg(all(unix, feature = "signal"))]
    fn describe(&self) -> Option<String>;
}

pub(crate) struct Control<S: Subject> {
    // Not from `sync`: a socket cannot be modelled.
    inner: std::sync::Mutex<Needs<S>>,
    needed: std::sync::Condvar,
    notifiers: JobThreads,
}

impl<S: Subject> Control<S> {
    pub(crate) fn new() -> Self {
        Self {
            inner: std::sync::Mutex::new(Needs::new()),
            needed: std::sync::Condvar::new(),
            notifiers: JobThreads::new("graceful-notify", MOST_STUCK),
        }
    }

    /// Schedules a check of a stop at `at`. With `driven`, its driver is also woken at regular
    /// intervals before that. If the thread cannot be started, the driver alone keeps the time.
    pub(crate) fn schedule(&'static self, id: Id, subject: &Arc<S>, at: Instant, driven: bool) {
        let mut inner = lock!(self.inner);
        let at = if driven {
            at.min(instant_after(
                clock::real_now(),
                tick(inner.deadlines.len()),
            ))
        } else {
            at
        };
        let stops = inner.deadlines.len();
        inner.deadlines.schedule(id, subject, at);
        let is_first = inner.deadlines.len() > stops;
        if is_first {
            // A notification that came before this call found no stop, and the stop does not send another
            // before it has been checked.
            inner.deadlines.notify(id);
        }
        let is_earlier = inner.sleeps_until.is_none_or(|until| at < until);
        let _ = self.need(&mut inner, is_first || is_earlier);
    }

    /// Ends the checks of a stop. The caller drops the result after all locks are released.
    pub(crate) fn end(&'static self, id: Id) -> Option<Arc<S>> {
        let mut inner = lock!(self.inner);
        let ended = inner.deadlines.end(id);
        if inner.deadlines.is_empty() {
            // The thread may be able to end.
            self.wake(&mut inner);
        }
        ended
    }

    pub(crate) fn notify(&'static self, id: Id) {
        let mut inner = lock!(self.inner);
        inner.deadlines.notify(id);
        self.wake(&mut inner);
    }

    /// Passes signals to a lifecycle, until it has [stopped](Self::stopped) or is
    /// [gone](Self::forget).
    #[cfg(feature = "signal")]
    pub(crate) fn listen(&'static self, id: Id, weak: Weak<S>) -> io::Result<()> {
        let mut inner = lock!(self.inner);
        if inner.listening.signals.is_none() {
            inner.listening.signals = Some(Signals::install(|| self.poke())?);
        }
        // The thread must exist before signals lose their default action. Also for a lifecycle that
        // listens already: in a forked child it has no thread.
        self.need(&mut inner, true)?;
        inner.listening.listeners.insert(id, weak);
        inner.listening.late_until = None;
        if let Some(signals) = &inner.listening.signals {
            signals.keep();
        }
        Ok(())
    }

    /// Records that a service has stopped. Signals go to the other services from now on; if there
    /// are none, a moment later to the operating system. If the service has given up work that has
    /// not ended (`has_ended` is false), that work may block the process, and the watchdog stays
    /// active, also if the lifecycle is dropped.
    #[cfg(feature = "signal")]
    pub(crate) fn stopped(&'static self, id: Id, has_ended: bool) {
        let mut inner = lock!(self.inner);
        #[cfg(unix)]
        if has_ended {
            inner.watched.remove(&id);
        } else if let Some(watched) = inner.watched.get_mut(&id) {
            if watched.until.is_some() {
                watched.kept = watched.subject.upgrade();
            }
        }
        #[cfg(not(unix))]
        let _ = has_ended;
        if inner.listening.listeners.remove(&id).is_some() && inner.listening.listeners.is_empty() {
            inner.listening.late_until = Some(clock::real_now() + LATE);
        }
        self.wake(&mut inner);
    }

    /// Records that a lifecycle was dropped.
    #[cfg(feature = "signal")]
    pub(crate) fn forget(&'static self, id: Id) {
        let mut inner = lock!(self.inner);
        #[cfg(unix)]
        inner.watched.remove(&id);
        if inner.listening.listeners.remove(&id).is_some() {
            inner.listening.give_back_if_unused();
        }
        self.wake(&mut inner);
    }

    /// Activates the watchdog, which ends the process at the instant that is passed to
    /// [`watch_until`](Self::watch_until) later.
    #[cfg(all(unix, feature = "signal"))]
    pub(crate) fn watch(&'static self, id: Id, weak: Weak<S>) -> io::Result<()> {
        let mut inner = lock!(self.inner);
        self.need(&mut inner, true)?;
        let watched = Watched {
            until: None,
            subject: weak,
            kept: None,
        };
        inner.watched.insert(id, watched);
        Ok(())
    }

    #[cfg(all(unix, feature = "signal"))]
    pub(crate) fn watch_until(&'static self, id: Id, until: Instant) {
        let mut inner = lock!(self.inner);
        if let Some(watched) = inner.watched.get_mut(&id) {
            if watched.until.is_none() {
                watched.until = Some(until);
                self.wake(&mut inner);
            }
        }
    }

    /// Runs code that does not belong to this crate on another thread.
    pub(crate) fn run_elsewhere(&'static self, job: Job) {
        self.notifiers.queue(job);
        self.notifiers.work();
        // If the job before blocks, the control thread starts another one for the queue.
        let _ = self.need(&mut lock!(self.inner), true);
    }

    /// Wakes the thread if it sleeps.
    fn wake(&self, inner: &mut Needs<S>) {
        if !inner.thread.wakes() {
            return;
        }
        self.needed.notify_one();
        #[cfg(all(unix, feature = "signal"))]
        if let Some(signals) = &inner.listening.signals {
            signals.poke();
        }
    }

    /// As [`wake`](Self::wake), for callers that do not hold the lock.
    #[cfg(feature = "signal")]
    fn poke(&self) {
        self.wake(&mut lock!(self.inner));
    }

    /// Starts the thread unless this process has one. Otherwise wakes it if `wake` is set.
    fn need(&'static self, inner: &mut Needs<S>, wake: bool) -> io::Result<()> {
        let process = process::id();
        if inner.thread.has_thread(process) {
            if wake {
                self.wake(inner);
            }
            return Ok(());
        }
        #[cfg(feature = "signal")]
        if let Some(signals) = &mut inner.listening.signals {
            // Before the thread begins to wait: in a forked child the socket is the parent's.
            signals.adopt()?;
        }
        let thread = thread::Builder::new().name("graceful-control".to_owned());
        thread.spawn(|| self.run()).map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("the control thread cannot be started: {error}"),
            )
        })?;
        inner.thread.started(process);
        Ok(())
    }

    fn run(&'static self) {
        loop {
            // The threads that run notifications may be blocked. Called without the lock, because where no
            // thread can be started it runs the notifications.
            let relief = self.notifiers.relieve().map(Instant::from_std);
            let mut inner = lock!(self.inner);
            inner.thread.begins_check();
            let now = Instant::now();
            let due = inner.take(now);
            if !due.is_empty() {
                drop(inner);
                self.act(due);
                continue;
            }
            #[cfg(feature = "signal")]
            if inner.listening.late_until.is_some_and(|until| now >= until) {
                inner.listening.late_until = None;
                inner.listening.give_back_if_unused();
                // A signal that arrived a moment earlier is still recorded: take it in the next
                // round.
                continue;
            }
            if relief.is_none() && self.notifiers.has_jobs() {
                // Queued since. The caller has found this thread awake.
                continue;
            }
            if relief.is_none() && !inner.has_need() {
                inner.thread.leaves();
                return;
            }
            inner.sleeps_until = inner.next().into_iter().chain(relief).min();
            self.sleep(inner);
        }
    }

    /// Sleeps until the thread is woken or `sleeps_until` is reached.
    fn sleep(&self, mut inner: MutexGuard<'_, Needs<S>>) {
        inner.thread.sleeps();
        let left = inner.sleeps_until.map_or(LONGEST, |until| {
            until.saturating_duration_since(Instant::now()).min(LONGEST)
        });
        #[cfg(all(unix, feature = "signal"))]
        if let Some(signals) = &inner.listening.signals {
            let alarm = signals.alarm();
            drop(inner);
            alarm.wait(left);
            return;
        }
        drop(self.needed.wait_timeout(inner, left));
    }

    fn act(&'static self, due: DueWork<S>) {
        let mut held = Vec::new();
        for subject in due.checks {
            shielded(|| {
                if let Some(notify) = subject.take_due_steps() {
                    self.run_elsewhere(notify);
                }
            });
            held.push(subject);
        }
        #[cfg(feature = "signal")]
        for signal in due.signals {
            let listeners: Vec<_> = due.listeners.iter().filter_map(Weak::upgrade).collect();
            if listeners.is_empty() {
                if due.is_late {
                    events::late_signal(signal);
                } else {
                    signals::default_action(signal);
                }
            }
            for listener in listeners {
                shielded(|| {
                    if let Some(notify) = listener.on_signal(signal) {
                        self.run_elsewhere(notify);
                    }
                });
                held.push(listener);
            }
        }
        #[cfg(all(unix, feature = "signal"))]
        for overdue in due.overdue {
            exit::end(move || overdue.describe());
        }
        // The last reference to a lifecycle drops values that its user has put into it.
        for last in held.into_iter().filter_map(Arc::into_inner) {
            self.run_elsewhere(Box::new(move || drop(last)));
        }
    }
}

#[cfg(all(test, not(tower_graceful_loom)))]
mod tests {
    #[cfg(all(unix, feature = "signal"))]
    use std::sync::mpsc::RecvTimeoutError::Disconnected;
    use std::sync::{LazyLock, mpsc};

    use super::*;

    const BOUND: Duration = Duration::from_secs(20);

    /// A stop whose notifications are counted by this channel, one for each check.
    struct Stop {
        control: &'static Control<Self>,
        ends: bool,
        checked: mpsc::Sender<()>,
    }

    impl Subject for Stop {
        fn take_due_steps(self: &Arc<Self>) -> Option<Job> {
            if self.ends {
                drop(self.control.end(1));
            }
            let checked = self.checked.clone();
            Some(Box::new(move || checked.send(()).unwrap()))
        }

        #[cfg(feature = "signal")]
        fn on_signal(self: &Arc<Self>, _: Trigger) -> Option<Job> {
            None
        }

        #[cfg(all(unix, feature = "signal"))]
        fn describe(&self) -> Option<String> {
            self.checked.send(()).unwrap();
            None
        }
    }

    /// A stop that is scheduled at this moment. `ends`: it ends with its first check.
    fn scheduled(
        control: &'static Control<Stop>,
        at: Instant,
        ends: bool,
    ) -> (Arc<Stop>, mpsc::Receiver<()>) {
        let (checked, checks) = mpsc::channel();
        let stop = Arc::new(Stop {
            control,
            ends,
            checked,
        });
        control.schedule(1, &stop, at, false);
        assert_eq!(checks.recv_timeout(BOUND), Ok(()), "the first check");
        (stop, checks)
    }

    /// Begins a notification that blocks until the sender is dropped.
    fn block_notification(control: &'static Control<Stop>) -> mpsc::Sender<()> {
        let (release, blocked) = mpsc::channel();
        let (begins, begun) = mpsc::channel();
        control.run_elsewhere(Box::new(move || {
            begins.send(()).unwrap();
            let _ = blocked.recv();
        }));
        begun.recv().unwrap();
        release
    }

    fn assert_unchecked(checks: &mpsc::Receiver<()>) {
        assert!(checks.recv_timeout(Duration::from_millis(50)).is_err());
    }

    #[test]
    fn a_notification_that_blocks_does_not_keep_the_last_one_from_being_sent() {
        static CONTROL: LazyLock<Control<Stop>> = LazyLock::new(Control::new);
        let release = block_notification(&CONTROL);
        scheduled(&CONTROL, Instant::now(), true);
        drop(release);
    }

    #[test]
    fn a_notification_after_the_thread_has_left_is_not_kept_by_one_that_blocks() {
        static CONTROL: LazyLock<Control<Stop>> = LazyLock::new(Control::new);
        let release = block_notification(&CONTROL);
        let (ends, ended) = mpsc::channel();
        CONTROL.run_elsewhere(Box::new(move || ends.send(()).unwrap()));
        assert_eq!(ended.recv_timeout(BOUND), Ok(()));
        drop(release);
    }

    #[test]
    fn a_stop_is_checked_when_it_is_first_scheduled_and_when_an_earlier_moment_has_come() {
        static CONTROL: LazyLock<Control<Stop>> = LazyLock::new(Control::new);
        let far = Instant::now() + LONGEST;
        let (stop, checks) = scheduled(&CONTROL, far, false);
        // Meanwhile the thread begins to sleep.
        assert_unchecked(&checks);
        CONTROL.schedule(1, &stop, far, false);
        assert_unchecked(&checks);
        CONTROL.schedule(1, &stop, Instant::now(), false);
        assert_eq!(checks.recv_timeout(BOUND), Ok(()));
    }

    #[test]
    fn a_notification_wakes_the_thread() {
        static CONTROL: LazyLock<Control<Stop>> = LazyLock::new(Control::new);
        let (_stop, checks) = scheduled(&CONTROL, Instant::now() + LONGEST, false);
        assert_unchecked(&checks);
        CONTROL.notify(1);
        assert_eq!(checks.recv_timeout(BOUND), Ok(()));
    }

    #[cfg(all(unix, feature = "signal"))]
    #[test]
    fn the_watchdog_watches_work_that_was_given_up_although_its_lifecycle_is_dropped() {
        static CONTROL: LazyLock<Control<Stop>> = LazyLock::new(Control::new);
        for (has_ended, watched) in [(false, Ok(())), (true, Err(Disconnected))] {
            let (stop, checks) = scheduled(&CONTROL, Instant::now() + LONGEST, true);
            CONTROL.watch(1, Arc::downgrade(&stop)).unwrap();
            CONTROL.watch_until(1, Instant::now() + Duration::from_millis(200));
            CONTROL.stopped(1, has_ended);
            drop(stop);
            assert_eq!(checks.recv_timeout(BOUND), watched, "{has_ended}");
            assert_eq!(checks.recv_timeout(BOUND), Err(Disconnected));
        }
    }

    #[test]
    fn many_drivers_are_woken_less_often() {
        assert_eq!([1, 255].map(tick), [TICK; 2]);
        assert_eq!(tick(256), 2 * TICK);
        assert_eq!(tick(2_600), 11 * TICK);
        assert!(tick(usize::MAX) > LONGEST);
    }
}
