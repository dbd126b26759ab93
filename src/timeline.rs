//! The timeline: what moves the phase, and when.
//!
//! [`Lifecycle::settle`] is the whole of it: a function of the state and the present instant that
//! takes every step which is due and says when to look again. It is called under one lock by
//! whoever changes something (a trigger, a further signal, a server that ends) and by the
//! *driver*, a task that sleeps until the next deadline. So a trigger takes effect before it
//! returns, on any thread and without a runtime, and only the passing of time needs the driver.
//!
//! The driver is spawned by the first call that happens inside a runtime. Until something triggers
//! it holds the state weakly: a service that is built and dropped leaves no task behind. It waits
//! for a deadline, for the bell that every change rings, and for the gate to become idle. Nothing
//! is polled by the clock.

use std::{
    future::poll_fn,
    panic::{self, AssertUnwindSafe},
    sync::{Arc, Mutex, MutexGuard, OnceLock},
    time::Duration,
};

use tokio::{
    runtime,
    sync::{Notify, watch},
    time::{self, Instant, MissedTickBehavior},
};

use crate::{
    events,
    gate::{Gate, WeakGate},
    phase::Phase,
    plan::{Plan, instant_after},
    policy::Policy,
    registry::Registry,
    report::{Outcome, Remaining, Report, Trigger},
    sync::lock,
};

/// How long connections are given to close: after the last request has left, even when the drain
/// deadline comes sooner, and after a cut before the service stops waiting for them.
const CLOSING_TIME: Duration = Duration::from_millis(250);

/// How long nothing may have been heard, neither a new connection nor a byte on an old one, before
/// the server is told to close: a server told so closes silent connections at once, and with them
/// requests that are on their way. Measured on loopback, where without it a third of the requests
/// that race with the stop are lost.
const LINGER: Duration = Duration::from_millis(25);

/// How long it waits for that, for clients that are never quiet.
const MOST_LINGER: Duration = Duration::from_millis(150);

/// How long a listener may take to empty its accept queue.
pub(crate) const LAST_ACCEPTS: Duration = Duration::from_millis(100);

/// How long of that they are given in any case, even past the end of the plan. It fits the margin
/// of every grace period of 1.5 s and more.
const LEAST_CLOSING_TIME: Duration = Duration::from_millis(50);

/// How often a drain says what it is waiting for.
const PROGRESS: Duration = Duration::from_secs(2);

/// The same key delivered twice within this time, to the process and to its group, is one signal.
#[cfg(feature = "signal")]
const DOUBLED: Duration = Duration::from_millis(100);

/// A service's whole state: its gate, and behind it what everybody shares.
pub(crate) type Shared = Gate<Lifecycle>;

pub(crate) struct Lifecycle {
    pub(crate) plan: Plan,
    pub(crate) policy: Policy,
    pub(crate) connections: Registry,
    /// Set once there is a router with the probes' own paths.
    pub(crate) probes: OnceLock<()>,
    phases: watch::Sender<Phase>,
    edges: watch::Sender<Edge>,
    /// Rung at every change that the driver has to look at.
    bell: Arc<Notify>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// A driver is alive.
    driven: bool,
    #[cfg(feature = "signal")]
    listening: bool,
    shutdown: Option<Shutdown>,
    /// Servers given to `run` that have not ended. `None`: there never were any.
    servers: Option<usize>,
    /// Drain futures that are waiting, each for a server that may be run by other means.
    drains: usize,
    server_error: Option<String>,
    report: Option<Report>,
}

/// What the servers are told, in this order. Only moves forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Edge {
    /// Accept.
    Open,
    /// Accept what has been queued, and close the listener.
    Listeners,
    /// Close the connections, each when its last response is out.
    Connections,
}

/// A shutdown under way.
struct Shutdown {
    trigger: Trigger,
    edge: Edge,
    /// When the listeners were told to close.
    edge_begun: Option<Instant>,
    /// When each phase so far was entered: lame duck, draining, closing.
    entered: Vec<Instant>,
    delay_until: Instant,
    drain_until: Instant,
    /// The end of what is planned: the margin, and then the end of the grace period, follow.
    end: Instant,
    /// A further signal wants the present phase to end now.
    hurry: bool,
    cut: Option<Cut>,
    /// The connections have been told of the cut.
    cut_done: bool,
    #[cfg(feature = "signal")]
    last_interrupt: Option<Instant>,
}

/// How a server's future came to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ServerEnd {
    /// Dropped before it was ready.
    Dropped,
    /// Ready.
    Finished,
    /// Ready, with an error.
    Failed(String),
}

struct Cut {
    at: Instant,
    remaining: Remaining,
}

/// One step of the timeline, for the log.
pub(crate) struct Transition {
    pub(crate) to: Phase,
    pub(crate) reason: Reason,
    /// Since the trigger.
    pub(crate) after: Duration,
    /// Until the phase just entered ends at the latest.
    pub(crate) time_left: Duration,
    pub(crate) in_flight: usize,
    pub(crate) connections: usize,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Reason {
    Triggered(Trigger),
    DelayOver,
    NobodyServes,
    Signal,
    Idle,
    Deadline,
    Closed,
    Cut,
    LetGo,
}

impl Lifecycle {
    pub(crate) fn new(plan: Plan, policy: Policy) -> Self {
        Self {
            plan,
            policy,
            connections: Registry::default(),
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

    /// Time until the present phase ends at the latest, if it has an end.
    pub(crate) fn time_left(&self, phase: Phase) -> Option<Duration> {
        let state = self.state();
        let shutdown = state.shutdown.as_ref()?;
        let until = shutdown.ends(phase)?;
        Some(until.saturating_duration_since(Instant::now()))
    }
}

impl Drop for Lifecycle {
    fn drop(&mut self) {
        // The driver finds nothing to upgrade and ends.
        self.ring();
    }
}

impl Gate<Lifecycle> {
    /// Starts the driver, if there is a runtime to run it and none runs already.
    pub(crate) fn drive(&self) {
        let Ok(runtime) = runtime::Handle::try_current() else {
            return;
        };
        {
            let mut state = self.state();
            if state.driven || state.report.is_some() {
                return;
            }
            state.driven = true;
        }
        let driver = Driver {
            gate: self.downgrade(),
            bell: Arc::clone(&self.bell),
        };
        // Tells whoever calls, not a task that nobody watches, that the runtime has no timers.
        drop(time::sleep(Duration::ZERO));
        // After the lock: a runtime that shuts down drops the driver here and now.
        drop(runtime.spawn(driver.run()));
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
        let deadlines = self.plan.deadlines(delay);
        state.shutdown = Some(Shutdown {
            trigger,
            edge: Edge::Open,
            edge_begun: None,
            entered: Vec::with_capacity(3),
            delay_until: instant_after(now, deadlines.delay),
            drain_until: instant_after(now, deadlines.drain),
            end: instant_after(now, deadlines.end),
            hurry: false,
            cut: None,
            cut_done: false,
            #[cfg(feature = "signal")]
            last_interrupt: None,
        });
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
        let (next, edge, cut) = {
            let mut state = self.state();
            change(&mut state, now);
            let next = self.settle(&mut state, now, &mut transitions);
            let stopped = state.report.is_some();
            match &mut state.shutdown {
                None => (next, Edge::Open, false),
                Some(shutdown) => {
                    // What connects after the end is cut as well.
                    let due = shutdown.cut.is_some() || stopped;
                    let cut = due && !std::mem::replace(&mut shutdown.cut_done, due);
                    (next, shutdown.edge, cut)
                }
            }
        };
        // After the lock, because wakers and subscribers may call back.
        if cut {
            self.connections.cut();
        }
        advance(&self.edges, edge);
        if let Some(last) = transitions.last() {
            advance(&self.phases, last.to);
        }
        for transition in transitions {
            log(|| events::transition(&transition));
        }
        next
    }

    /// Takes every step that is due at `now`. Says when to look again, if ever.
    fn settle(
        &self,
        state: &mut State,
        now: Instant,
        transitions: &mut Vec<Transition>,
    ) -> Option<Instant> {
        loop {
            let phase = self.word().phase();
            let servers = state.servers.unwrap_or(0);
            let nobody_serves = state.servers == Some(0) && state.drains == 0;
            let shutdown = state.shutdown.as_mut()?;
            let (to, reason) = match phase {
                Phase::Serving => (Phase::LameDuck, Reason::Triggered(shutdown.trigger)),
                Phase::LameDuck => {
                    let reason = if std::mem::take(&mut shutdown.hurry) {
                        shutdown.delay_until = now;
                        Reason::Signal
                    } else if now >= shutdown.delay_until {
                        Reason::DelayOver
                    } else if nobody_serves {
                        Reason::NobodyServes
                    } else {
                        return Some(shutdown.delay_until);
                    };
                    // What is in the accept queue is served, and only then is work refused.
                    if !self.policy.keep_listening {
                        if let Some(until) = self.close_edge(shutdown, now) {
                            return Some(until);
                        }
                    }
                    (Phase::Draining, reason)
                }
                Phase::Draining => {
                    if self.settled_word().is_idle() {
                        (Phase::Closing, Reason::Idle)
                    } else if std::mem::take(&mut shutdown.hurry) {
                        self.cut(shutdown, servers, now);
                        (Phase::Closing, Reason::Signal)
                    } else if now >= shutdown.drain_until {
                        self.cut(shutdown, servers, now);
                        (Phase::Closing, Reason::Deadline)
                    } else {
                        return Some(shutdown.drain_until);
                    }
                }
                Phase::Closing => {
                    let told = self.close_edge(shutdown, now);
                    let closed = servers == 0
                        && self.connections.len() == 0
                        && self.settled_word().is_idle()
                        && told.is_none();
                    if closed && shutdown.cut.is_none() {
                        (Phase::Stopped, Reason::Closed)
                    } else if closed {
                        (Phase::Stopped, Reason::Cut)
                    } else if shutdown.cut.is_some() {
                        let until = shutdown.ends(phase)?;
                        if std::mem::take(&mut shutdown.hurry) {
                            (Phase::Stopped, Reason::Signal)
                        } else if now >= until {
                            (Phase::Stopped, Reason::LetGo)
                        } else {
                            return Some(until);
                        }
                    } else {
                        let until = shutdown.ends(phase)?;
                        if std::mem::take(&mut shutdown.hurry) || now >= until {
                            self.cut(shutdown, servers, now);
                            continue;
                        }
                        return Some(told.map_or(until, |told| told.min(until)));
                    }
                }
                Phase::Stopped => return None,
            };
            self.enter(state, to, reason, now, transitions);
        }
    }

    fn enter(
        &self,
        state: &mut State,
        to: Phase,
        reason: Reason,
        now: Instant,
        transitions: &mut Vec<Transition>,
    ) {
        let Some(shutdown) = &mut state.shutdown else {
            return;
        };
        if to == Phase::Stopped {
            state.report = Some(shutdown.report(reason, state.server_error.take(), now));
        } else {
            shutdown.entered.push(now);
        }
        self.advance(to);
        let until = shutdown.ends(to).unwrap_or(now);
        transitions.push(Transition {
            to,
            reason,
            after: now.saturating_duration_since(shutdown.entered[0]),
            time_left: until.saturating_duration_since(now),
            in_flight: self.word().count(),
            connections: self.connections.len(),
        });
    }

    /// Has the listeners closed, and then the servers told to close their connections. Says when
    /// to look again, if that is not done.
    fn close_edge(&self, shutdown: &mut Shutdown, now: Instant) -> Option<Instant> {
        if shutdown.edge == Edge::Connections {
            return None;
        }
        let begun = *shutdown.edge_begun.get_or_insert(now);
        shutdown.edge = Edge::Listeners;
        let listeners = self.connections.listeners();
        // Without a listener of ours there is no knowing what is accepted when.
        if listeners.any && shutdown.cut.is_none() {
            let last_accepts = begun + LAST_ACCEPTS;
            if listeners.open > 0 && now < last_accepts {
                return Some(last_accepts);
            }
            let asked = shutdown.entered.first().copied();
            let heard = asked.max(self.connections.last_heard());
            let quiet = heard.map_or(now, |heard| heard + LINGER);
            let until = quiet.min(begun + MOST_LINGER);
            if now < until {
                return Some(until);
            }
        }
        shutdown.edge = Edge::Connections;
        None
    }

    /// Ends by force what is still there.
    fn cut(&self, shutdown: &mut Shutdown, servers: usize, now: Instant) {
        shutdown.cut = Some(Cut {
            at: now,
            remaining: Remaining {
                requests: self.settled_word().count(),
                connections: self.connections.len(),
                servers,
            },
        });
    }

    fn progress(&self) {
        let word = self.word();
        if let Some(time_left) = self.time_left(word.phase()) {
            let connections = self.connections.len();
            log(|| events::progress(word.phase(), word.count(), connections, time_left));
        }
    }
}

/// Calls into the log, whose panics must not stop the timeline: a subscriber that writes to a
/// closed pipe panics, and a closed pipe is common at shutdown.
pub(crate) fn log(event: impl FnOnce()) {
    let _ = panic::catch_unwind(AssertUnwindSafe(event));
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

impl Shutdown {
    /// When this phase ends at the latest, if it has an end: in closing, when what is still open
    /// is cut, and after that, when the service stops waiting for it.
    fn ends(&self, phase: Phase) -> Option<Instant> {
        match (phase, &self.cut) {
            (Phase::LameDuck, _) => Some(self.delay_until),
            (Phase::Draining, _) => Some(self.drain_until),
            (Phase::Closing, Some(cut)) => Some(self.closing_until(cut.at)),
            (Phase::Closing, None) => {
                let begun = *self.entered.last()?;
                Some(self.drain_until.max(self.closing_until(begun)))
            }
            (Phase::Serving | Phase::Stopped, _) => None,
        }
    }

    fn closing_until(&self, begun: Instant) -> Instant {
        let end = self.end.max(begun + LEAST_CLOSING_TIME);
        end.min(begun + CLOSING_TIME)
    }

    fn report(&self, reason: Reason, server_error: Option<String>, now: Instant) -> Report {
        let remaining = self
            .cut
            .as_ref()
            .map_or_else(Remaining::default, |cut| cut.remaining);
        let outcome = if matches!(reason, Reason::Signal) {
            Outcome::Abandoned
        } else if !remaining.is_nothing() {
            Outcome::Forced
        } else if server_error.is_some() {
            Outcome::ServerFailed
        } else {
            Outcome::Clean
        };
        let mut ends = self.entered.iter().skip(1).copied().chain([now]);
        let mut phases = [Duration::ZERO; 3];
        for (phase, begun) in phases.iter_mut().zip(&self.entered) {
            let ended = ends.next().unwrap_or(now);
            *phase = ended.saturating_duration_since(*begun);
        }
        Report {
            trigger: self.trigger,
            outcome,
            phases,
            remaining,
            server_error,
        }
    }
}

struct Driver {
    gate: WeakGate<Lifecycle>,
    bell: Arc<Notify>,
}

impl Driver {
    async fn run(self) {
        let Some(gate) = self.triggered().await else {
            return;
        };
        let mut progress = time::interval_at(instant_after(Instant::now(), PROGRESS), PROGRESS);
        progress.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut phase = Phase::Serving;
        // Once the gate has said so it stays so, and need not be asked again.
        let mut idle = false;
        while let Some(next) = gate.tick() {
            let before = std::mem::replace(&mut phase, gate.word().phase());
            let draining = phase >= Phase::Draining;
            if draining && before < Phase::Draining {
                progress.reset();
            }
            tokio::select! {
                biased;
                () = self.bell.notified() => {}
                () = time::sleep_until(next) => {}
                () = poll_fn(|cx| gate.poll_idle(cx)), if draining && !idle => idle = true,
                _ = progress.tick(), if draining => gate.progress(),
            }
        }
    }

    /// Waits for the trigger without keeping the service alive.
    async fn triggered(&self) -> Option<Shared> {
        loop {
            let gate = self.gate.upgrade()?;
            if gate.word().phase() > Phase::Serving {
                return Some(gate);
            }
            drop(gate);
            self.bell.notified().await;
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // Its runtime may be gone while the service lives: the next call starts another.
        if let Some(gate) = self.gate.upgrade() {
            gate.state().driven = false;
        }
    }
}
