//! The timeline: it moves the phase of a service from Serving to Stopped, and decides when.
//!
//! `settle` (in `step`) takes every step that is due at the present instant, and returns when to
//! check again. It is called under one lock by every call that changes something (a trigger, a
//! further signal, a server that ends), and by the control thread and the driver when a deadline
//! passes. So a trigger takes effect before it returns, on any thread and without a runtime.
//!
//! `handle`, `server`, the middleware and `control` call the methods of [`Shared`] in this file.
//! `state` contains the data of a stop and builds the report, `step` decides the steps, `driver` is
//! the task that runs what needs a runtime, `cleanup` runs hooks, workers and cleanup steps,
//! `leave_early` decides when the lame-duck phase may end early, and `warn` detects mistakes in the
//! set-up.
//!
//! User code may block and panic, so none of it runs under the lock. Log events are queued under
//! the lock and written later ([`events`]). Wakers are called after the lock is released, and never
//! on the control thread. Do not call user code, a waker or a destructor of a user value under the
//! lock.

mod cleanup;
mod driver;
pub(crate) mod leave_early;
pub(crate) mod state;
pub(crate) mod step;
#[cfg(all(test, feature = "axum", feature = "signal", not(tower_graceful_loom)))]
mod tests;
mod warn;

use std::{
    sync::{
        Arc, LazyLock, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Waker},
    time::Duration,
};

use tokio::{
    runtime,
    sync::{oneshot, watch},
    time::{self, Instant},
};

use self::{
    driver::Driver,
    leave_early::Evidence,
    state::{Clock, ClosingStage, ServerEnd, Shutdown, State},
};
#[cfg(feature = "signal")]
use crate::events::Effect;
use crate::{
    admission::{Gate, WeakGate},
    background::shielded,
    config::{
        plan::{Plan, instant_after},
        policy::Policy,
    },
    connection::{
        descriptors::Starved,
        outside::Outside,
        stagger::{Place, SLOT_REACHED},
        state::Directive,
        table::{ConnectionTable, Pieces},
        upgraded::Upgraded,
    },
    control::{Control, DriverWaker, Subject, clock},
    events::{self, Event, Origin, Transition},
    phase::Phase,
    report::{Report, Trigger, Warning, request_table::RequestTable},
    server::requests::Requests,
    sync::lock,
    tasks::table::Work,
    waiting::waiters::{Moment, Waiters},
};

/// Two SIGINTs within this time count as one signal. A terminal delivers Ctrl-C to the whole
/// process group, and a parent process may forward it as well.
#[cfg(feature = "signal")]
const DOUBLED: Duration = Duration::from_millis(100);

/// How often a drain logs what it waits for.
const PROGRESS: Duration = Duration::from_secs(2);

/// The control thread of this process.
pub(crate) static CONTROL: LazyLock<Control<Shared>> = LazyLock::new(Control::new);

/// The state of one service: its gate, and the lifecycle that all its handles share.
pub(crate) type Shared = Gate<Policy, Lifecycle>;

/// A reference to [`Shared`] that does not keep it alive.
pub(crate) type WeakShared = WeakGate<Policy, Lifecycle>;

pub(crate) struct Lifecycle {
    pub(crate) plan: Plan,
    pub(crate) policy: Arc<Policy>,
    pub(crate) connections: ConnectionTable<Shared>,
    pub(crate) starved: Starved,
    pub(crate) work: Work,
    pub(crate) request_table: RequestTable,
    pub(crate) outside: Outside,
    pub(crate) requests: Requests,
    pub(crate) evidence: Evidence,
    /// Set when something needs the peer addresses of requests.
    #[cfg(feature = "axum")]
    pub(crate) wants_peers: AtomicBool,
    pub(crate) upgraded: Upgraded,
    /// Set when the user tracks connections that the user's own code accepts.
    pub(crate) tracks: AtomicBool,
    warnings: Mutex<Vec<Warning>>,
    /// The tasks that wait for a phase. There may be thousands.
    pub(crate) waiters: Waiters,
    /// Set when a router with the default paths of the probes is made.
    pub(crate) probes: OnceLock<()>,
    /// Set when a router with the default path of the preStop route is made.
    #[cfg(feature = "axum")]
    pub(crate) pre_stop: OnceLock<()>,
    phases: watch::Sender<Phase>,
    closing_stages: watch::Sender<ClosingStage>,
    /// Notified of every change that `settle` has to check.
    driver_waker: Arc<DriverWaker>,
    /// Notifies `driver_waker`. Registered with the gate, which wakes it when the last request
    /// ends.
    idle: Waker,
    log: events::Queue,
    /// The plan has been logged.
    plan_logged: AtomicBool,
    /// A copy of [`State::driven`] that can be read without the lock.
    driven: AtomicBool,
    /// The last update that the control thread published.
    published: Mutex<Option<Update>>,
    state: Mutex<State>,
}

/// What a step publishes after the lock is released. Each of the published values only moves
/// forward, so an older update that is published late changes nothing.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Update {
    connections: Directive,
    /// How often connections with nothing left to wait for were told to close
    /// ([`Directive::Expire`]).
    expiries: u32,
    closing_stage: ClosingStage,
    phase: Phase,
    waiters: Moment,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    /// A call that changes something, or the driver.
    User,
    /// The control thread.
    Control,
}

impl Lifecycle {
    pub(crate) fn new(plan: Plan, policy: Arc<Policy>) -> Self {
        let driver_waker = Arc::new(DriverWaker::new(|id| CONTROL.notify(id)));
        #[cfg(feature = "axum")]
        let wants_peers = policy.leave_early.noticed.is_some();
        Self {
            plan,
            policy,
            connections: ConnectionTable::default(),
            starved: Starved::default(),
            work: Work::default(),
            request_table: RequestTable::default(),
            outside: Outside::default(),
            requests: Requests::default(),
            evidence: Evidence::default(),
            #[cfg(feature = "axum")]
            wants_peers: AtomicBool::new(wants_peers),
            upgraded: Upgraded::default(),
            tracks: AtomicBool::new(false),
            warnings: Mutex::default(),
            waiters: Waiters::new(),
            probes: OnceLock::new(),
            #[cfg(feature = "axum")]
            pre_stop: OnceLock::new(),
            phases: watch::Sender::new(Phase::Serving),
            closing_stages: watch::Sender::new(ClosingStage::Open),
            idle: Waker::from(Arc::clone(&driver_waker)),
            driver_waker,
            log: events::Queue::default(),
            plan_logged: AtomicBool::new(false),
            driven: AtomicBool::new(false),
            published: Mutex::new(None),
            state: Mutex::new(State::default()),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock!(self.state)
    }

    /// The plan. Its delay is shorter if every listener so far is shared with the next process.
    pub(crate) fn plan(&self) -> Plan {
        match self.policy.shared_delay {
            Some(delay) if delay < self.plan.drain_delay() && self.shares_listeners() => {
                self.plan.with_drain_delay(delay)
            }
            _ => self.plan,
        }
    }

    /// Whether new connections during the stop are left to the next process.
    pub(crate) fn shares_listeners(&self) -> bool {
        let shared = self.policy.shared_listener;
        shared.unwrap_or_else(|| self.connections.listeners().are_shared())
    }

    /// Whether the next process has taken over: the listeners are shared with it, every listener of
    /// this process has closed, and no connection is left. No request can arrive any more.
    fn has_moved(&self) -> bool {
        let listeners = self.connections.listeners();
        let none_accepts = listeners.so_far > 0 && listeners.open == 0;
        none_accepts && self.shares_listeners() && self.connections.len() == 0
    }

    pub(crate) fn phases(&self) -> watch::Receiver<Phase> {
        self.phases.subscribe()
    }

    pub(crate) fn closing_stages(&self) -> watch::Receiver<ClosingStage> {
        self.closing_stages.subscribe()
    }

    /// Makes the driver and the control thread check what has changed.
    pub(crate) fn notify(&self) {
        self.driver_waker.notify();
    }

    /// Whether a driver is alive.
    pub(crate) fn is_driven(&self) -> bool {
        self.driven.load(Ordering::Acquire)
    }

    /// Logs an event that belongs to no step. The lock must not be held.
    fn log_event(&self, event: Event) {
        let aside = self.state().clock == Clock::Real;
        self.log.push(vec![event], aside, Origin::here().as_ref());
        self.log.write();
    }

    /// The event with the plan: once, and only if a subscriber accepts debug events.
    fn plan_event(&self) -> Option<Event> {
        let first = events::wants_debug() && !self.plan_logged.swap(true, Ordering::Relaxed);
        first.then(|| Event::Plan(self.plan().effective()))
    }

    /// Logs the plan, once. The lock must not be held.
    fn log_plan(&self) {
        if let Some(event) = self.plan_event() {
            self.log_event(event);
        }
    }

    pub(crate) fn report(&self) -> Option<Report> {
        self.state().report.clone()
    }

    /// Whether a response in the lame-duck phase asks its client to leave. Without `close_spread`
    /// every response does. With it, a response does if the slot of its connection has been
    /// reached. Where the server does not know the connection, each response gets a slot of its
    /// own.
    #[cold]
    pub(crate) fn asks_to_leave(&self) -> bool {
        if !self.policy.is_spread() {
            return true;
        }
        SLOT_REACHED
            .try_with(|reached| *reached)
            .unwrap_or_else(|_| {
                let place = {
                    let mut state = self.state();
                    state.spread_responses += 1;
                    Place::nth(state.spread_responses)
                };
                Instant::now() >= self.slot_time(place)
            })
    }

    /// When the slot of this place is reached: the earliest time at which its client is asked to
    /// leave.
    pub(crate) fn slot_time(&self, place: Place) -> Instant {
        let state = self.state();
        let shutdown = state.shutdown.as_ref();
        let asked = shutdown.and_then(|shutdown| shutdown.entered.first().copied());
        let after = place.offset(self.policy.close_spread);
        instant_after(asked.unwrap_or_else(Instant::now), after)
    }

    /// The time until `phase` ends at the latest, if it has an end.
    pub(crate) fn time_left(&self, phase: Phase) -> Option<Duration> {
        let state = self.state();
        let shutdown = state.shutdown.as_ref()?;
        let until = shutdown.ends(phase)?;
        Some(until.saturating_duration_since(Instant::now()))
    }
}

#[cfg(feature = "signal")]
impl Drop for Lifecycle {
    fn drop(&mut self) {
        CONTROL.forget(self.driver_waker.id());
    }
}

impl Subject for Shared {
    #[cfg(feature = "signal")]
    type Weak = WeakShared;

    #[cfg(feature = "signal")]
    fn upgrade(weak: &WeakShared) -> Option<Self> {
        weak.upgrade()
    }

    fn look(&self) -> Option<Box<dyn FnOnce() + Send>> {
        self.driver_waker.looks();
        self.driver_waker.wake_driver();
        let (_, update) = self.step_by(By::Control, |_, _| ());
        self.to_publish(update)
    }

    #[cfg(feature = "signal")]
    fn hear(&self, trigger: Trigger) -> Option<Box<dyn FnOnce() + Send>> {
        {
            let mut state = self.state();
            if state.clock == Clock::Tokio {
                // Only the driver can read the paused clock.
                state.pending_signals.push(trigger);
                drop(state);
                self.notify();
                return None;
            }
        }
        let (_, update) = self.step_by(By::Control, |state, now| {
            self.on_signal(state, trigger, now);
        });
        self.start_driver();
        self.notify();
        self.to_publish(update)
    }

    #[cfg(all(unix, feature = "signal"))]
    fn describe(&self) -> Option<String> {
        self.describe_end()
    }
}

impl Pieces for Shared {
    fn pieces(&self) -> usize {
        Gate::pieces(self)
    }
}

impl Shared {
    /// The number of requests and holds in flight.
    pub(crate) fn in_flight(&self) -> usize {
        self.word().count() + self.work.holds()
    }

    /// Whether the service is draining or later, and nothing is in flight.
    fn is_idle(&self) -> bool {
        self.work.is_idle(|| self.settled_word().is_idle())
    }

    /// Spawns a driver if there is none and the caller is inside a runtime. Starts it if a stop is
    /// under way.
    pub(crate) fn drive(&self) {
        self.spawn_driver();
        self.start_driver();
    }

    fn spawn_driver(&self) {
        let Ok(runtime) = runtime::Handle::try_current() else {
            return;
        };
        let clock = clock_here();
        let (start, started) = oneshot::channel();
        {
            let mut state = self.state();
            if clock == Clock::Tokio && state.driven {
                // The clock was paused after the driver had been spawned.
                state.clock = clock;
            }
            if state.driven || state.report.is_some() {
                return;
            }
            state.driven = true;
            self.driven.store(true, Ordering::Release);
            state.clock = clock;
            state.driver_gone = None;
            state.start = Some(start);
        }
        let driver = Driver::new(self.downgrade(), Arc::clone(&self.driver_waker));
        // `sleep` panics if the runtime has no timers. Here the panic reaches the caller. In the
        // driver task it would stay unnoticed.
        drop(time::sleep(Duration::ZERO));
        // After the lock is released: a runtime that is shutting down drops the driver here, which
        // calls `driver_ended`.
        drop(runtime.spawn(driver.run(started)));
    }

    /// Records that the driver has ended, because its runtime has shut down or because nothing is
    /// left to do. `ran` is false if the runtime dropped it before its first poll.
    fn driver_ended(&self, ran: bool) {
        {
            let mut state = self.state();
            state.driven = false;
            self.driven.store(false, Ordering::Release);
            state.clock = Clock::Real;
            if state.report.is_some() {
                return;
            }
            if ran {
                state.driver_gone = Some(Instant::now());
            }
        }
        if ran {
            // One of the waiting tasks may run in another runtime, and spawns a driver there.
            self.waiters.wake_all();
        }
        self.change(|_, _| ());
    }

    /// Passes the lifecycle to the driver if a stop is under way. The driver then keeps it alive,
    /// so that the stop completes even if every handle is dropped.
    fn start_driver(&self) {
        let start = {
            let mut state = self.state();
            if state.shutdown.is_none() {
                return;
            }
            state.start.take()
        };
        if let Some(start) = start {
            // If the driver has ended, `send` returns the lifecycle, and it is dropped here.
            drop(start.send(self.clone()));
        }
    }

    /// Records that a drain future waits. The server that it stands for may run outside of `run`.
    pub(crate) fn drain_began(&self) {
        {
            let mut state = self.state();
            state.drains += 1;
            state.drains_so_far += 1;
        }
        self.mark_served();
        self.drive();
        self.log_plan();
    }

    /// Records that a drain future that called `drain_began` has ended.
    pub(crate) fn drain_ended(&self) {
        self.change(|state, _| state.drains -= 1);
    }

    /// Starts the timeline, unless it has started already.
    pub(crate) fn trigger(&self, trigger: Trigger) {
        // First, because it determines the clock that the step uses.
        self.spawn_driver();
        self.change(|state, now| self.start(state, trigger, now));
        self.start_driver();
    }

    fn start(&self, state: &mut State, trigger: Trigger, now: Instant) {
        if state.shutdown.is_some() {
            return;
        }
        let delay = match trigger {
            // Nothing has been served yet, so no load balancer sends traffic to this process.
            Trigger::Terminate | Trigger::Interrupt if !self.word().has_served() => Duration::ZERO,
            Trigger::Interrupt => self.plan.interrupt_delay(),
            Trigger::Terminate
            | Trigger::Shutdown
            | Trigger::Future
            | Trigger::ServerEnded
            | Trigger::WorkerEnded
            | Trigger::PreStop => self.plan().drain_delay(),
        };
        state.events.extend(self.plan_event());
        if self.policy.leave_early.is_on() {
            self.evidence.begin(now);
        }
        state.shutdown = Some(Shutdown::new(trigger, now, self.plan.deadlines(delay)));
        #[cfg(all(unix, feature = "signal"))]
        CONTROL.watch_until(
            self.driver_waker.id(),
            instant_after(clock::real_now(), self.plan.last_moment()),
        );
    }

    /// Passes signals to this lifecycle from now on, unless it has stopped.
    #[cfg(feature = "signal")]
    pub(crate) fn listen(&self) -> std::io::Result<()> {
        self.log_plan();
        // Under the lock, so that the service cannot stop between the check and the registration.
        let state = self.state();
        if state.report.is_some() {
            return Ok(());
        }
        CONTROL.listen(self.driver_waker.id(), || self.downgrade())
    }

    /// Activates the watchdog: it ends the process near the end of the grace period if the service
    /// has not stopped by then.
    #[cfg(all(unix, feature = "signal"))]
    pub(crate) fn watch_grace_period(&self) -> std::io::Result<()> {
        CONTROL.watch(self.driver_waker.id(), self.downgrade())
    }

    /// Handles a signal as the control thread does under the real clock. Called by the driver and
    /// by tests.
    #[cfg(feature = "signal")]
    pub(crate) fn signal(&self, trigger: Trigger) {
        self.spawn_driver();
        self.change(|state, now| self.on_signal(state, trigger, now));
        self.start_driver();
    }

    /// Handles the signals that were left for the driver.
    #[cfg(feature = "signal")]
    fn act_on_signals(&self) {
        // A separate statement: in the `for` expression the lock would be held during the loop.
        let signals = std::mem::take(&mut self.state().pending_signals);
        for trigger in signals {
            self.signal(trigger);
        }
    }

    /// The first signal starts the timeline. A further SIGTERM changes nothing. A further SIGINT
    /// ends the present phase.
    #[cfg(feature = "signal")]
    fn on_signal(&self, state: &mut State, trigger: Trigger, now: Instant) {
        let first = state.shutdown.is_none();
        self.start(state, trigger, now);
        let stopped = state.report.is_some();
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
        if first {
            return;
        }
        let effect = if doubled {
            Effect::Doubled
        } else if !interrupt || stopped {
            Effect::Nothing
        } else if shutdown.cleanup.is_some() {
            Effect::EndedCleanup
        } else {
            Effect::Ended(self.phase())
        };
        shutdown.skip_phase |= matches!(effect, Effect::EndedCleanup | Effect::Ended(_));
        state.events.push(Event::Signal(trigger, effect));
    }

    pub(crate) fn server_began(&self) {
        {
            let mut state = self.state();
            state.servers = Some(state.servers.map_or(1, |servers| servers + 1));
            state.servers_so_far += 1;
        }
        self.mark_served();
        self.drive();
        self.log_plan();
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

    /// Makes a change, takes every step that is then due, and notifies the driver.
    fn change(&self, change: impl FnOnce(&mut State, Instant)) {
        self.step(change);
        self.notify();
    }

    /// Takes every step that is due. Called by the driver. Returns when to check again, if ever.
    fn tick(&self) -> Option<Instant> {
        let clock = clock_here();
        #[cfg(feature = "signal")]
        self.act_on_signals();
        self.step(|state, _| state.clock = clock)
    }

    fn step(&self, change: impl FnOnce(&mut State, Instant)) -> Option<Instant> {
        let (next, update) = self.step_by(By::User, change);
        self.publish(update);
        next
    }

    /// Makes a change and takes every step that is then due. Returns when to check again, and the
    /// update that the caller must publish.
    fn step_by(
        &self,
        by: By,
        change: impl FnOnce(&mut State, Instant),
    ) -> (Option<Instant>, Update) {
        let now = Instant::now();
        let origin = (by == By::User).then(Origin::here).flatten();
        let mut transitions = Vec::new();
        let mut state = self.state();
        change(&mut state, now);
        let is_real = state.clock == Clock::Real;
        let stopping = state.shutdown.is_some() && state.report.is_none();
        let was_engaged = if stopping && is_real {
            self.driver_waker.engage(true)
        } else {
            self.driver_waker.engage(false)
        };
        let next = if by == By::Control && !is_real {
            None
        } else {
            if stopping {
                // Registered before the check, so that work that ends after the check notifies the
                // driver.
                let _ = self.poll_idle(&mut Context::from_waker(&self.idle));
            }
            let next = self.settle(&mut state, now, &mut transitions);
            let next = self.note_progress(&mut state, next, now, &mut transitions);
            self.warn_of_unheld(&mut state, next, now)
        };
        let ended = match next {
            Some(next) if is_real => {
                CONTROL.schedule(self.driver_waker.id(), self, next, state.driven);
                None
            }
            _ if was_engaged || stopping && is_real => {
                self.driver_waker.engage(false);
                CONTROL.end(self.driver_waker.id())
            }
            _ => None,
        };
        let stopped = stopping && state.report.is_some();
        if let (true, Some(report)) = (stopped, &state.report) {
            let queued = report.remaining().queued;
            if queued > 0 {
                state.events.push(Event::QueueReset(queued));
            }
        }
        #[cfg(feature = "signal")]
        if stopped {
            let has_ended = self.has_ended(state.driver_gone.is_some());
            CONTROL.stopped(self.driver_waker.id(), has_ended);
        }
        // A service that has stopped keeps no reference to a subscriber.
        let origin = origin.or_else(|| state.origin.take());
        let events = std::mem::take(&mut state.events);
        self.log.push(events, is_real, origin.as_ref());
        let former = if stopping && !stopped {
            std::mem::replace(&mut state.origin, origin)
        } else {
            origin
        };
        let phase = self.phase();
        let update = Update {
            connections: self.directive(&state),
            expiries: state.shutdown.as_ref().map_or(0, |it| it.expiries),
            closing_stage: state
                .shutdown
                .as_ref()
                .map_or(ClosingStage::Open, |it| it.closing_stage),
            phase,
            waiters: self.moment(&state, now),
        };
        let undriven = stopped && !state.driven;
        drop(state);
        drop((ended, former));
        if undriven {
            let shared = self.clone();
            CONTROL.aside(Box::new(move || shared.give_up_work()));
        }
        if by == By::Control {
            // The log thread writes the events, because a subscriber is user code.
            events::work();
        }
        (next, update)
    }

    /// The job that publishes an update of the control thread, to be run on another thread. `None`
    /// if nothing has changed since the last one.
    fn to_publish(&self, update: Update) -> Option<Box<dyn FnOnce() + Send>> {
        if lock!(self.published).replace(update) == Some(update) {
            return None;
        }
        let shared = self.clone();
        Some(Box::new(move || shared.publish(update)))
    }

    /// Publishes an update to connections, servers and waiters. No lock may be held, because wakers
    /// may call back. A panic in one of them does not keep the others from being notified.
    fn publish(&self, update: Update) {
        shielded(|| self.connections.instruct(update.connections));
        if update.expiries > 1 {
            // Connections that had something to wait for at the last check may have nothing left
            // now.
            shielded(|| self.connections.wake_all());
        }
        shielded(|| advance(&self.closing_stages, update.closing_stage));
        shielded(|| advance(&self.phases, update.phase));
        if update.waiters.phase > Phase::LameDuck {
            self.waiters.notify(update.waiters);
        }
        self.log.write();
    }

    /// Adds the transitions to the log, and from time to time what the stop waits for. Returns
    /// when to check again.
    fn note_progress(
        &self,
        state: &mut State,
        next: Option<Instant>,
        now: Instant,
        transitions: &mut Vec<Transition>,
    ) -> Option<Instant> {
        let events = transitions.drain(..).map(Event::Transition);
        state.events.extend(events);
        let (next, since) = (next?, state.draining_since());
        let Some(since) = since else {
            return Some(next);
        };
        let at = *state
            .progress_at
            .get_or_insert_with(|| instant_after(since, PROGRESS));
        if now < at {
            return Some(next.min(at));
        }
        let phase = self.phase();
        let shutdown = state.shutdown.as_ref();
        let ends = shutdown.and_then(|it| it.ends(phase));
        let cleans_up = shutdown.is_some_and(|it| it.cleanup.is_some());
        if let Some(ends) = ends {
            let mut oldest = self.request_table.list(now);
            oldest.truncate(3);
            state.events.push(Event::Progress(events::Progress {
                phase,
                in_flight: self.in_flight(),
                connections: self.connections.len(),
                time_left: ends.saturating_duration_since(now),
                oldest,
                awaited: self.work.awaited(cleans_up),
            }));
        }
        let at = instant_after(now, PROGRESS);
        state.progress_at = Some(at);
        Some(next.min(at))
    }

    /// Whether nothing is left that the stop waited for. The tasks of a runtime that is gone have
    /// ended.
    #[cfg(feature = "signal")]
    fn has_ended(&self, runtime_gone: bool) -> bool {
        let workless = || {
            let tasks = self.work.tasks();
            let mut tasks = tasks.iter();
            runtime_gone || tasks.all(|it| it.began.is_none() || it.ended.is_some())
        };
        self.in_flight() == 0 && self.connections.len() == 0 && workless()
    }

    /// The watchdog's message if the grace period is over and the service has not stopped, or work
    /// that it has given up has not ended.
    #[cfg(all(unix, feature = "signal"))]
    fn describe_end(&self) -> Option<String> {
        let runtime_gone = self.state().driver_gone.is_some();
        if self.phase() == Phase::Stopped && self.has_ended(runtime_gone) {
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
        let requests = self
            .request_table
            .list(now)
            .into_iter()
            .map(|it| it.to_string());
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
        for entry in requests.take(3).chain(holds.take(3)).chain(tasks) {
            text.push_str("\n  ");
            text.push_str(&entry);
        }
        Some(text)
    }

    /// The moment up to which waiters are notified: the phase, and during a spread drain the place
    /// in it.
    fn moment(&self, state: &State, now: Instant) -> Moment {
        let phase = self.phase();
        let spreading = (phase == Phase::Draining).then(|| state.draining_since());
        let place = spreading.flatten().map_or(Place::LAST, |since| {
            let elapsed = now.saturating_duration_since(since);
            Place::after(elapsed, self.policy.drain_spread)
        });
        Moment { phase, place }
    }

    /// The directive for all connections.
    fn directive(&self, state: &State) -> Directive {
        let Some(shutdown) = &state.shutdown else {
            return Directive::Stay;
        };
        // A connection that is registered after the stop is cut as well.
        if shutdown.cut.is_some() || state.report.is_some() {
            return Directive::Cut;
        }
        let phase = self.phase();
        if shutdown.expiries > 0 {
            Directive::Expire
        } else if shutdown.closing_stage >= ClosingStage::Connections {
            Directive::Close
        } else if phase >= Phase::Draining || shutdown.asks_all {
            Directive::Leave
        } else if phase == Phase::LameDuck && self.policy.is_spread() {
            Directive::LeaveInSlot
        } else if phase > Phase::Serving {
            Directive::Stopping
        } else {
            Directive::Stay
        }
    }
}

fn clock_here() -> Clock {
    if clock::is_real() {
        Clock::Real
    } else {
        Clock::Tokio
    }
}

/// Moves a watched value forward, never back. Values are published after the lock is released, so a
/// newer value may have been published before an older one.
fn advance<T: Ord + Copy>(watched: &watch::Sender<T>, to: T) {
    watched.send_if_modified(|value| {
        let moves = *value < to;
        *value = to.max(*value);
        moves
    });
}
