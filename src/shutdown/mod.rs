//! The timeline: what moves the phase, and when.
//!
//! `settle` is the whole of it: a function of the state and the present instant that takes every
//! step which is due and says when to look again. It is called under one lock by whatever changes
//! something (a trigger, a further signal, a server that ends), and by those that let time pass. So a
//! trigger takes effect before it returns, on any thread and without a runtime.
//!
//! Two let time pass. The *control thread* ([`control`](crate::control)) looks at every stop under way
//! when its next deadline comes, and whenever something rings for it. The *driver* is a task that does
//! the same in a runtime. It runs what is the user's and needs a runtime: hooks, and the cleanup. It
//! also rules alone where tokio's clock is paused, because the control thread knows only the real
//! clock. Where both look, the second finds nothing to do.
//!
//! The driver is spawned by the first call that happens inside a runtime. Until something triggers
//! it waits to be given the state, and ends when that is gone: a service that is built and dropped
//! leaves no task behind. From then on it owns it, and so does the control thread. A driver that ends
//! with its runtime leaves the rest to the control thread, and to the runtime of any task that waits
//! for a phase: such tasks are woken, and one of them starts another driver there. What then can no
//! longer be run is reported as it is.
//!
//! What is the user's may block and panic, so none of it is run under the lock. Events are queued there
//! and written later ([`events`]); wakers are called after the lock, and not by the control thread.
//!
//! `shutdown` is what is known of a shutdown under way, `settle` the steps, `driver` the task; here
//! is what the rest of the crate asks for.

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

/// The same key delivered twice within this time, to the process and to its group, is one signal.
#[cfg(feature = "signal")]
const DOUBLED: Duration = Duration::from_millis(100);

/// How often a drain says what it is waiting for.
const PROGRESS: Duration = Duration::from_secs(2);

/// The control thread of this process.
pub(crate) static CONTROL: LazyLock<Control<Shared>> = LazyLock::new(Control::new);

/// A service's whole state: its gate, and behind it what everybody shares.
pub(crate) type Shared = Gate<Policy, Lifecycle>;

/// It, without keeping it alive.
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
    /// Set once something wants to know where requests come from.
    pub(crate) wants_peers: AtomicBool,
    pub(crate) upgraded: Upgraded,
    /// There are connections that a user has accepted.
    pub(crate) tracks: AtomicBool,
    warnings: Mutex<Vec<Warning>>,
    /// For a phase, by the thousands.
    pub(crate) waiters: Waiters,
    /// Set once there is a router with the probes' own paths.
    pub(crate) probes: OnceLock<()>,
    /// Set once there is a router with the preStop route's own path.
    #[cfg(feature = "axum")]
    pub(crate) pre_stop: OnceLock<()>,
    phases: watch::Sender<Phase>,
    closing_stages: watch::Sender<ClosingStage>,
    /// Rung at every change that has to be looked at.
    driver_waker: Arc<DriverWaker>,
    /// Rings it.
    idle: Waker,
    log: events::Queue,
    /// The log has the plan.
    plan_logged: AtomicBool,
    /// There is a driver. For those who look without the lock.
    driven: AtomicBool,
    /// What the control thread has told last.
    told: Mutex<Option<News>>,
    state: Mutex<State>,
}

/// What a step has to tell, once no lock is held. Telling an older one afterwards changes nothing.
#[derive(Clone, Copy, PartialEq, Eq)]
struct News {
    connections: Directive,
    /// How often connections were looked at for those on which there is nothing to wait for.
    expiries: u32,
    closing_stage: ClosingStage,
    phase: Phase,
    waiters: Moment,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    /// Whatever changes something, and the driver.
    User,
    /// The control thread.
    Control,
}

impl Lifecycle {
    pub(crate) fn new(plan: Plan, policy: Arc<Policy>) -> Self {
        let driver_waker = Arc::new(DriverWaker::new(|id| CONTROL.notify(id)));
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
            told: Mutex::new(None),
            state: Mutex::new(State::default()),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock!(self.state)
    }

    /// The plan for the listeners that there have been so far.
    pub(crate) fn plan(&self) -> Plan {
        match self.policy.shared_delay {
            Some(delay) if delay < self.plan.drain_delay() && self.shares_listeners() => {
                self.plan.with_drain_delay(delay)
            }
            _ => self.plan,
        }
    }

    /// Whether what connects during the stop is left to the next process.
    pub(crate) fn shares_listeners(&self) -> bool {
        let shared = self.policy.shared_listener;
        shared.unwrap_or_else(|| self.connections.listeners().are_shared())
    }

    /// Whether every listener is closed at the start of the stop, and no connection is left: nothing
    /// more can be asked for.
    fn has_moved(&self) -> bool {
        let listeners = self.connections.listeners();
        let none_comes = listeners.so_far > 0 && listeners.open == 0;
        none_comes && self.shares_listeners() && self.connections.len() == 0
    }

    pub(crate) fn phases(&self) -> watch::Receiver<Phase> {
        self.phases.subscribe()
    }

    pub(crate) fn closing_stages(&self) -> watch::Receiver<ClosingStage> {
        self.closing_stages.subscribe()
    }

    /// Has what has changed looked at.
    pub(crate) fn notify(&self) {
        self.driver_waker.notify();
    }

    /// Whether a driver is alive.
    pub(crate) fn is_driven(&self) -> bool {
        self.driven.load(Ordering::Acquire)
    }

    /// Has an event written that belongs to no step.
    fn tell_log(&self, event: Event) {
        let aside = self.state().clock == Clock::Real;
        self.log.push(vec![event], aside, Origin::here().as_ref());
        self.log.write();
    }

    /// The plan as an event, the first time that a subscriber wants it.
    fn plan_event(&self) -> Option<Event> {
        let first = events::wants_debug() && !self.plan_logged.swap(true, Ordering::Relaxed);
        first.then(|| Event::Plan(self.plan().effective()))
    }

    /// Logs the plan, once. Not under the lock.
    fn log_plan(&self) {
        if let Some(event) = self.plan_event() {
            self.tell_log(event);
        }
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
        SLOT_REACHED.try_with(|turn| *turn).unwrap_or_else(|_| {
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
        let after = place.offset(self.policy.close_spread);
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
        let (_, news) = self.step_by(By::Control, |_, _| ());
        self.to_tell(news)
    }

    #[cfg(feature = "signal")]
    fn hear(&self, trigger: Trigger) -> Option<Box<dyn FnOnce() + Send>> {
        {
            let mut state = self.state();
            if state.clock == Clock::Tokio {
                // What time it is there only the driver knows.
                state.heard.push(trigger);
                drop(state);
                self.notify();
                return None;
            }
        }
        let (_, news) = self.step_by(By::Control, |state, now| self.heard(state, trigger, now));
        self.start_driver();
        self.notify();
        self.to_tell(news)
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
    /// Requests and holds.
    pub(crate) fn in_flight(&self) -> usize {
        self.word().count() + self.work.holds()
    }

    /// Draining or later, with nothing in flight.
    fn is_idle(&self) -> bool {
        self.work.is_idle(|| self.settled_word().is_idle())
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
        let clock = clock_here();
        let (start, started) = oneshot::channel();
        {
            let mut state = self.state();
            if clock == Clock::Tokio && state.driven {
                // It has been paused since.
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
        // Tells whoever calls, not a task that nobody watches, that the runtime has no timers.
        drop(time::sleep(Duration::ZERO));
        // After the lock: a runtime that shuts down drops the driver here and now.
        drop(runtime.spawn(driver.run(started)));
    }

    /// The driver has ended, with its runtime or because there is nothing left to drive. `ran`: it was
    /// more than refused by a runtime that was shutting down.
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
            // One of them may have a runtime that goes on.
            self.waiters.wake_all();
        }
        self.change(|_, _| ());
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
        {
            let mut state = self.state();
            state.drains += 1;
            state.drains_so_far += 1;
        }
        self.mark_served();
        self.drive();
        self.log_plan();
    }

    /// The waiting of `drain_began` is over.
    pub(crate) fn drain_ended(&self) {
        self.change(|state, _| state.drains -= 1);
    }

    /// Starts the timeline, unless something has already.
    pub(crate) fn trigger(&self, trigger: Trigger) {
        // First, because it finds out which clock rules.
        self.spawn_driver();
        self.change(|state, now| self.start(state, trigger, now));
        self.start_driver();
    }

    fn start(&self, state: &mut State, trigger: Trigger, now: Instant) {
        if state.shutdown.is_some() {
            return;
        }
        let delay = match trigger {
            // Nobody serves yet, so there is nothing for a balancer to look away from.
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

    /// Passes signals on to this lifecycle from now on, unless it has stopped.
    #[cfg(feature = "signal")]
    pub(crate) fn listen(&self) -> std::io::Result<()> {
        self.log_plan();
        // Under the lock, so that it cannot stop in between.
        let state = self.state();
        if state.report.is_some() {
            return Ok(());
        }
        CONTROL.listen(self.driver_waker.id(), || self.downgrade())
    }

    /// Ends the process at the end of the grace period, if this has not stopped by then.
    #[cfg(all(unix, feature = "signal"))]
    pub(crate) fn watch_grace_period(&self) -> std::io::Result<()> {
        CONTROL.watch(self.driver_waker.id(), self.downgrade())
    }

    /// As the control thread does where the real clock rules: for tests, and in the driver.
    #[cfg(feature = "signal")]
    pub(crate) fn signal(&self, trigger: Trigger) {
        self.spawn_driver();
        self.change(|state, now| self.heard(state, trigger, now));
        self.start_driver();
    }

    /// Acts upon the signals that were left for the driver.
    #[cfg(feature = "signal")]
    fn act_on_signals(&self) {
        // Not in the `for`, which would hold the lock.
        let heard = std::mem::take(&mut self.state().heard);
        for trigger in heard {
            self.signal(trigger);
        }
    }

    /// The first signal starts the timeline. A further SIGTERM changes nothing, a further SIGINT ends
    /// the present phase.
    #[cfg(feature = "signal")]
    fn heard(&self, state: &mut State, trigger: Trigger, now: Instant) {
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

    /// Makes a change, takes every step that is then due, and has the driver look again.
    fn change(&self, change: impl FnOnce(&mut State, Instant)) {
        self.step(change);
        self.notify();
    }

    /// Takes every step that is due, for the driver. Says when to look again, if ever.
    fn tick(&self) -> Option<Instant> {
        let clock = clock_here();
        #[cfg(feature = "signal")]
        self.act_on_signals();
        self.step(|state, _| state.clock = clock)
    }

    fn step(&self, change: impl FnOnce(&mut State, Instant)) -> Option<Instant> {
        let (next, news) = self.step_by(By::User, change);
        self.instruct(news);
        next
    }

    /// What is returned is still to be told.
    fn step_by(&self, by: By, change: impl FnOnce(&mut State, Instant)) -> (Option<Instant>, News) {
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
                // Before it is looked at, so that whatever ends later rings.
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
        // Of a service that has stopped it keeps no subscriber.
        let origin = origin.or_else(|| state.origin.take());
        let events = std::mem::take(&mut state.events);
        self.log.push(events, is_real, origin.as_ref());
        let former = if stopping && !stopped {
            std::mem::replace(&mut state.origin, origin)
        } else {
            origin
        };
        let phase = self.phase();
        let news = News {
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
            // The rest is written by the thread for it.
            events::work();
        }
        (next, news)
    }

    /// For the control thread: what is new of this, to be told beside it.
    fn to_tell(&self, news: News) -> Option<Box<dyn FnOnce() + Send>> {
        if lock!(self.told).replace(news) == Some(news) {
            return None;
        }
        let shared = self.clone();
        Some(Box::new(move || shared.instruct(news)))
    }

    /// Tells connections, servers and waiters, after every lock because they may call back. None of
    /// them keeps another from being told.
    fn instruct(&self, news: News) {
        shielded(|| self.connections.instruct(news.connections));
        if news.expiries > 1 {
            // Some that were waited for may have become such.
            shielded(|| self.connections.wake_all());
        }
        shielded(|| advance(&self.closing_stages, news.closing_stage));
        shielded(|| advance(&self.phases, news.phase));
        if news.waiters.phase > Phase::LameDuck {
            self.waiters.notify(news.waiters);
        }
        self.log.write();
    }

    /// Notes the transitions for the log, and every now and then what the drain waits for. Says when to
    /// look again.
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
        let ends = state.shutdown.as_ref().and_then(|it| it.ends(phase));
        if let Some(ends) = ends {
            let mut oldest = self.request_table.list(now);
            oldest.truncate(3);
            state.events.push(Event::Progress(events::Progress {
                phase,
                in_flight: self.in_flight(),
                connections: self.connections.len(),
                time_left: ends.saturating_duration_since(now),
                oldest,
            }));
        }
        let at = instant_after(now, PROGRESS);
        state.progress_at = Some(at);
        Some(next.min(at))
    }

    /// Nothing is left of what the stop waited for. Tasks have ended with a runtime that is gone.
    #[cfg(feature = "signal")]
    fn has_ended(&self, runtime_gone: bool) -> bool {
        let workless = || {
            let tasks = self.work.tasks();
            let mut tasks = tasks.iter();
            runtime_gone || tasks.all(|it| it.began.is_none() || it.ended.is_some())
        };
        self.in_flight() == 0 && self.connections.len() == 0 && workless()
    }

    /// What there is to say when time is over and the service has not stopped.
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
    fn directive(&self, state: &State) -> Directive {
        let Some(shutdown) = &state.shutdown else {
            return Directive::Stay;
        };
        // What connects after the end is cut as well.
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

/// Moves a watched value forward, never back: whoever publishes does so after the lock, and may be
/// overtaken.
fn advance<T: Ord + Copy>(watched: &watch::Sender<T>, to: T) {
    watched.send_if_modified(|value| {
        let moves = *value < to;
        *value = to.max(*value);
        moves
    });
}
