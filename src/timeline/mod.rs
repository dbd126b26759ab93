//! The timeline: what moves the phase, and when.
//!
//! `settle` is the whole of it: a function of the state and the present instant that takes every
//! step which is due and says when to look again. It is called under one lock by whoever changes
//! something (a trigger, a further signal, a server that ends) and by the *driver*, a task that
//! sleeps until the next deadline. So a trigger takes effect before it returns, on any thread and
//! without a runtime, and only the passing of time needs the driver.
//!
//! The driver is spawned by the first call that happens inside a runtime. Until something triggers
//! it waits to be given the state, and ends when that is gone: a service that is built and dropped
//! leaves no task behind. From then on it owns it, and waits for a deadline, for the bell that every
//! change rings, and for the gate to become idle. Nothing is polled by the clock, but that during a
//! shutdown the bell is rung from outside the runtime as well, in case a task holds the thread that
//! waits for timers.
//!
//! `shutdown` is what is known of a shutdown under way, `settle` the steps, `driver` the task; here
//! is what the rest of the crate asks for.

mod cleanup;
mod driver;
mod settle;
mod shutdown;

use std::{
    sync::{Arc, Mutex, MutexGuard, OnceLock},
    time::Duration,
};

use tokio::{
    runtime,
    sync::{Notify, oneshot, watch},
    time::{self, Instant},
};

#[cfg(feature = "axum")]
pub(crate) use self::settle::LAST_ACCEPTS;
#[cfg(feature = "axum")]
pub(crate) use self::settle::LINGER;
pub(crate) use self::shutdown::{Edge, ServerEnd};
use self::{
    driver::Driver,
    shutdown::{Expiring, Shutdown, State},
};
#[cfg(all(unix, feature = "signal"))]
use crate::watchdog::Watchdog;
use crate::{
    connections::Starved,
    events,
    gate::{Gate, WeakGate},
    notice::Told,
    phase::Phase,
    plan::{Plan, instant_after},
    policy::Policy,
    registry::Registry,
    report::{Report, Trigger},
    roll::Roll,
    spread::{Place, TURN},
    sync::lock,
    waiters::{Moment, Waiters},
    work::Work,
};

/// The same key delivered twice within this time, to the process and to its group, is one signal.
#[cfg(feature = "signal")]
const DOUBLED: Duration = Duration::from_millis(100);

/// A service's whole state: its gate, and behind it what everybody shares.
pub(crate) type Shared = Gate<Policy, Lifecycle>;

/// It, without keeping it alive.
pub(crate) type WeakShared = WeakGate<Policy, Lifecycle>;

pub(crate) struct Lifecycle {
    pub(crate) plan: Plan,
    pub(crate) policy: &'static Policy,
    pub(crate) connections: Registry<Shared>,
    pub(crate) starved: Starved,
    pub(crate) work: Work,
    pub(crate) roll: Roll,
    /// For a phase, by the thousands.
    pub(crate) waiters: Waiters,
    /// Set where one was asked for.
    #[cfg(all(unix, feature = "signal"))]
    pub(crate) watchdog: OnceLock<Watchdog>,
    /// Set once there is a router with the probes' own paths.
    pub(crate) probes: OnceLock<()>,
    phases: watch::Sender<Phase>,
    edges: watch::Sender<Edge>,
    /// Rung at every change that the driver has to look at.
    bell: Arc<Notify>,
    state: Mutex<State>,
}

impl Lifecycle {
    pub(crate) fn new(plan: Plan, policy: &'static Policy) -> Self {
        Self {
            plan,
            policy,
            connections: Registry::default(),
            starved: Starved::default(),
            work: Work::default(),
            roll: Roll::default(),
            waiters: Waiters::new(),
            #[cfg(all(unix, feature = "signal"))]
            watchdog: OnceLock::new(),
            probes: OnceLock::new(),
            phases: watch::Sender::new(Phase::Serving),
            edges: watch::Sender::new(Edge::Open),
            bell: Arc::new(Notify::new()),
            state: Mutex::new(State::default()),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock!(self.state)
    }

    pub(crate) fn phases(&self) -> watch::Receiver<Phase> {
        self.phases.subscribe()
    }

    pub(crate) fn edges(&self) -> watch::Receiver<Edge> {
        self.edges.subscribe()
    }

    /// Wakes the driver to look at what has changed.
    pub(crate) fn ring(&self) {
        self.bell.notify_one();
    }

    pub(crate) fn report(&self) -> Option<Report> {
        self.state().report.clone()
    }

    /// Whether a response in the lame-duck phase asks its client to leave: every one, or where
    /// that is spread, those whose turn has come. On a connection that nobody knows it is the
    /// response that has a turn.
    #[cold]
    pub(crate) fn asks_to_leave(&self) -> bool {
        if !self.policy.is_spread() {
            return true;
        }
        TURN.try_with(|turn| *turn).unwrap_or_else(|_| {
            let place = {
                let mut state = self.state();
                state.spread_responses += 1;
                Place::nth(state.spread_responses)
            };
            Instant::now() >= self.turn(place)
        })
    }

    /// When whoever has this place is asked to leave, at the earliest.
    pub(crate) fn turn(&self, place: Place) -> Instant {
        let state = self.state();
        let shutdown = state.shutdown.as_ref();
        let asked = shutdown.and_then(|shutdown| shutdown.entered.first().copied());
        let after = place.turn(self.policy.close_spread);
        instant_after(asked.unwrap_or_else(Instant::now), after)
    }

    /// Time until the present phase ends at the latest, if it has an end.
    pub(crate) fn time_left(&self, phase: Phase) -> Option<Duration> {
        let state = self.state();
        let shutdown = state.shutdown.as_ref()?;
        let until = shutdown.ends(phase)?;
        Some(until.saturating_duration_since(Instant::now()))
    }
}

impl Shared {
    /// Requests and holds.
    pub(crate) fn in_flight(&self) -> usize {
        self.word().count() + self.work.holds()
    }

    /// Draining or later, with nothing in flight.
    fn is_idle(&self) -> bool {
        // In this order: what holds on behalf of a request begins before the request is over.
        self.settled_word().is_idle() && self.work.holds() == 0
    }

    /// Sees to it that there is a driver, if there is a runtime to run it.
    pub(crate) fn drive(&self) {
        self.spawn_driver();
        self.start_driver();
    }

    fn spawn_driver(&self) {
        let Ok(runtime) = runtime::Handle::try_current() else {
            return;
        };
        let (start, started) = oneshot::channel();
        {
            let mut state = self.state();
            if state.driven || state.report.is_some() {
                return;
            }
            state.driven = true;
            state.start = Some(start);
        }
        let driver = Driver::new(self.downgrade(), Arc::clone(&self.bell));
        // Tells whoever calls, not a task that nobody watches, that the runtime has no timers.
        drop(time::sleep(Duration::ZERO));
        // After the lock: a runtime that shuts down drops the driver here and now.
        drop(runtime.spawn(driver.run(started)));
    }

    /// Has the driver keep the service alive from now on, if a shutdown is under way: it is to
    /// complete, whoever has let go of it.
    fn start_driver(&self) {
        let start = {
            let mut state = self.state();
            if state.shutdown.is_none() {
                return;
            }
            state.start.take()
        };
        if let Some(start) = start {
            // A driver that is gone already gives it back.
            drop(start.send(self.clone()));
        }
    }

    /// Notes that a server waits for the drain, by whomever it is run.
    pub(crate) fn drain_began(&self) {
        self.state().drains += 1;
        self.mark_served();
        self.drive();
    }

    /// The waiting of `drain_began` is over.
    pub(crate) fn drain_ended(&self) {
        self.change(|state, _| state.drains -= 1);
    }

    /// Starts the timeline, unless something has already.
    pub(crate) fn trigger(&self, trigger: Trigger) {
        self.change(|state, now| self.start(state, trigger, now));
        self.drive();
    }

    fn start(&self, state: &mut State, trigger: Trigger, now: Instant) {
        if state.shutdown.is_some() {
            return;
        }
        let delay = match trigger {
            // Nobody serves yet, so there is nothing for a balancer to look away from.
            Trigger::Terminate | Trigger::Interrupt if !self.word().has_served() => Duration::ZERO,
            Trigger::Interrupt => self.plan.interrupt_delay(),
            Trigger::Terminate | Trigger::Shutdown | Trigger::Future | Trigger::ServerEnded => {
                self.plan.drain_delay()
            }
        };
        state.shutdown = Some(Shutdown::new(trigger, now, self.plan.deadlines(delay)));
    }

    /// Claims the listening for signals, once.
    #[cfg(feature = "signal")]
    pub(crate) fn claim_signals(&self) -> bool {
        let mut state = self.state();
        !std::mem::replace(&mut state.listening, true)
    }

    /// Gives the claim back, because the listening has ended.
    #[cfg(feature = "signal")]
    pub(crate) fn release_signals(&self) {
        self.state().listening = false;
    }

    /// The service stopped longer ago than a signal that was meant for it may take.
    #[cfg(feature = "signal")]
    pub(crate) fn is_long_stopped(&self) -> bool {
        const LATE: Duration = Duration::from_secs(1);

        let stopped = self.state().stopped;
        stopped.is_some_and(|stopped| stopped.elapsed() > LATE)
    }

    /// The first signal starts the timeline, each further one skips what is left of the phase.
    #[cfg(feature = "signal")]
    pub(crate) fn signal(&self, trigger: Trigger) {
        self.change(|state, now| {
            let first = state.shutdown.is_none();
            self.start(state, trigger, now);
            let Some(shutdown) = &mut state.shutdown else {
                return;
            };
            let interrupt = trigger == Trigger::Interrupt;
            let doubled = interrupt
                && shutdown
                    .last_interrupt
                    .is_some_and(|last| now.saturating_duration_since(last) < DOUBLED);
            if interrupt && !doubled {
                shutdown.last_interrupt = Some(now);
            }
            if !first && !doubled {
                shutdown.hurry = true;
            }
        });
        self.drive();
    }

    pub(crate) fn server_began(&self) {
        {
            let mut state = self.state();
            state.servers = Some(state.servers.map_or(1, |servers| servers + 1));
        }
        self.mark_served();
        self.drive();
    }

    pub(crate) fn server_ended(&self, end: &ServerEnd) {
        self.change(|state, now| {
            state.servers = state.servers.map(|servers| servers - 1);
            if let ServerEnd::Failed(error) = end {
                state.server_error.get_or_insert_with(|| error.clone());
            }
            if *end != ServerEnd::Dropped {
                self.start(state, Trigger::ServerEnded, now);
            }
        });
        self.start_driver();
    }

    /// Makes a change, takes every step that is then due, and has the driver look again.
    fn change(&self, change: impl FnOnce(&mut State, Instant)) {
        self.step(change);
        self.ring();
    }

    /// Takes every step that is due, for the driver. Says when to look again, if ever.
    fn tick(&self) -> Option<Instant> {
        self.step(|_, _| ())
    }

    fn step(&self, change: impl FnOnce(&mut State, Instant)) -> Option<Instant> {
        let now = Instant::now();
        let mut transitions = Vec::new();
        let (next, edge, told, expires_again, moment, queued) = {
            let mut state = self.state();
            change(&mut state, now);
            let next = self.settle(&mut state, now, &mut transitions);
            let told = self.told(&state);
            let shutdown = state.shutdown.as_mut();
            let expires_again = shutdown.is_some_and(Shutdown::takes_again);
            let edge = state.shutdown.as_ref().map(|shutdown| shutdown.edge);
            let moment = self.moment(&state, now);
            let stopped = transitions.iter().any(|it| it.to == Phase::Stopped);
            let report = state.report.as_ref().filter(|_| stopped);
            let queued = report.map(|report| report.remaining().queued);
            (
                next,
                edge.unwrap_or(Edge::Open),
                told,
                expires_again,
                moment,
                queued,
            )
        };
        // After the lock, because wakers and subscribers may call back.
        self.connections.tell(told);
        if expires_again {
            self.connections.wake_all();
        }
        #[cfg(all(unix, feature = "signal"))]
        self.tell_watchdog(&transitions);
        advance(&self.edges, edge);
        if let Some(last) = transitions.last() {
            advance(&self.phases, last.to);
        }
        if moment.phase > Phase::LameDuck {
            self.waiters.tell(moment);
        }
        for transition in &transitions {
            events::transition(transition);
        }
        if let Some(queued @ 1..) = queued {
            events::queue_reset(queued);
        }
        next
    }

    #[cfg(all(unix, feature = "signal"))]
    fn tell_watchdog(&self, transitions: &[events::Transition]) {
        let Some(watchdog) = self.watchdog.get() else {
            return;
        };
        for transition in transitions {
            match transition.to {
                Phase::LameDuck => watchdog.arm(),
                Phase::Stopped => watchdog.call_off(),
                Phase::Serving | Phase::Draining | Phase::Closing => {}
            }
        }
    }

    /// What there is to say when time is over and the service has not stopped.
    #[cfg(all(unix, feature = "signal"))]
    pub(crate) fn describe(&self) -> Option<String> {
        if self.phase() == Phase::Stopped {
            return None;
        }
        let now = Instant::now();
        let mut text = format!(
            "shutdown: the grace period is over, and the service is {}: in flight {}, connections \
             {}; ended by the watchdog",
            self.phase(),
            self.in_flight(),
            self.connections.len(),
        );
        let requests = self.roll.list(now).into_iter().map(|it| it.to_string());
        let holds = self
            .work
            .list_holds(now)
            .into_iter()
            .map(|it| it.to_string());
        let tasks = self
            .work
            .tasks()
            .into_iter()
            .filter(|task| task.ended.is_none());
        let tasks = tasks.map(|task| format!("{} has not ended", task.name));
        for line in requests.take(3).chain(holds.take(3)).chain(tasks) {
            text.push_str("\n  ");
            text.push_str(&line);
        }
        Some(text)
    }

    /// How far those who wait for a phase are told.
    fn moment(&self, state: &State, now: Instant) -> Moment {
        let phase = self.phase();
        let spreading = (phase == Phase::Draining).then(|| state.draining_since());
        let place = spreading.flatten().map_or(Place::LAST, |since| {
            let elapsed = now.saturating_duration_since(since);
            Place::after(elapsed, self.policy.drain_spread)
        });
        Moment { phase, place }
    }

    /// What the connections are to be told.
    fn told(&self, state: &State) -> Told {
        let Some(shutdown) = &state.shutdown else {
            return Told::Stay;
        };
        // What connects after the end is cut as well.
        if shutdown.cut.is_some() || state.report.is_some() {
            return Told::Cut;
        }
        let phase = self.phase();
        if shutdown.expiring != Expiring::No {
            Told::Expire
        } else if shutdown.edge == Edge::Connections {
            Told::Close
        } else if phase >= Phase::Draining || shutdown.asks_everybody {
            Told::Leave
        } else if phase == Phase::LameDuck && self.policy.is_spread() {
            Told::TakeTurns
        } else if phase > Phase::Serving {
            Told::Stopping
        } else {
            Told::Stay
        }
    }
}

/// Moves a watched value forward, never back: whoever publishes does so after the lock, and may be
/// overtaken.
fn advance<T: Ord + Copy>(watched: &watch::Sender<T>, to: T) {
    watched.send_if_modified(|value| {
        let moves = *value < to;
        *value = to.max(*value);
        moves
    });
}
