//! The timeline: it moves the phase of a service from Serving to Stopped, and decides when.
//!
//! Each pass takes the lock, makes a change, takes every step that is due (`settle` in `step`), and
//! publishes the result after the lock is released (`update`). A call that changes something makes a pass
//! (`triggers`: a signal, a server that ends), and so do the control thread and the driver when a deadline
//! passes. So a trigger takes effect before it returns, on any thread and without a runtime.
//!
//! This file has what one lifecycle consists of. `state` contains the data of a stop, and `report`
//! makes the report of it. `closing` is the order in which listeners and connections close. `driver`
//! is the task that runs what needs a runtime, `cleanup` runs hooks, workers and cleanup steps,
//! `leave_early` decides when the lame-duck phase may end early, `publishing` which thread publishes
//! what a step has changed, `progress` says what the stop waits
//! for, and `warn` and `window` detect mistakes in the set-up. `handle`, `server`, the middleware and
//! `control` call the methods of [`Shared`] and may change nothing else.
//!
//! User code may block and panic, so none of it runs under the lock. Log events are queued under
//! the lock and written later ([`events`]). Wakers are called after the lock is released, and never
//! on the control thread. Under the real clock the driver calls none either. Do not call user code, a
//! waker or a destructor of a user value under the lock.

mod cleanup;
pub(crate) mod closing;
mod driver;
pub(crate) mod leave_early;
mod progress;
mod publishing;
#[cfg(all(test, feature = "signal", not(tower_graceful_loom)))]
mod random_signals;
mod report;
pub(crate) mod state;
pub(crate) mod step;
#[cfg(all(test, feature = "axum", feature = "signal", not(tower_graceful_loom)))]
mod tests;
mod triggers;
mod update;
mod warn;
mod window;

use std::{
    ops::Deref,
    sync::{
        Arc, LazyLock, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{sync::watch, time::Instant};

pub(crate) use self::{cleanup::Spawned, driver::has_shut_down};
use self::{
    leave_early::Evidence,
    publishing::Published,
    state::{Clock, ClosingStage, State},
    update::Update,
};
use crate::{
    admission::Gate,
    config::{
        plan::{Plan, instant_after},
        policy::{self, Policy},
    },
    connection::{
        descriptors::Starved,
        outside::Outside,
        requests::Requests,
        stagger::{Place, SLOT_REACHED},
        table::ConnectionTable,
        upgraded::Upgraded,
    },
    control::{Control, DriverWaker},
    events::{self, Event, Origin},
    phase::Phase,
    report::{Report, Warning, request_table::RequestTable},
    sync::lock,
    tasks::table::Work,
    waiting::waiters::Waiters,
};

/// The control thread of this process.
pub(crate) static CONTROL: LazyLock<Control<Lifecycle>> = LazyLock::new(Control::new);

/// The lifecycle of one service, which all its handles share.
pub(crate) type Shared = Arc<Lifecycle>;

/// The state of one service. It dereferences to its gate.
pub(crate) struct Lifecycle {
    gate: Gate<Policy, Self>,
    pub(crate) plan: Plan,
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
    /// Set when `Graceful::track` is called, for connections that the user's code accepts.
    pub(crate) tracks: AtomicBool,
    warnings: Mutex<Vec<Warning>>,
    /// The tasks that wait for a phase. There may be thousands.
    pub(crate) waiters: Waiters,
    /// Set when a router with the default paths of the probes is made.
    pub(crate) probes: OnceLock<()>,
    /// Set when a router with the default path of the preStop route is made.
    pub(crate) pre_stop: OnceLock<()>,
    /// Limits the events of refused calls of the preStop route.
    #[cfg(feature = "axum")]
    pub(crate) refused_calls: events::Limit,
    phases: watch::Sender<Phase>,
    closing_stages: watch::Sender<ClosingStage>,
    /// Notified of every change that `settle` has to check.
    driver_waker: Arc<DriverWaker>,
    log: events::Queue,
    /// The plan has been logged.
    plan_logged: AtomicBool,
    /// A driver is alive. Changes under the lock, and is read without it.
    driven: AtomicBool,
    /// When the lame-duck phase began. Requests read it without the lock.
    asked_since: OnceLock<Instant>,
    /// The number of responses that got a slot of their own in the spread.
    spread_responses: AtomicU64,
    published: Published<Update>,
    state: Mutex<State>,
}

impl Lifecycle {
    pub(crate) fn new(gate: Gate<Policy, Self>, plan: Plan) -> Self {
        let driver_waker = Arc::new(DriverWaker::new(|id| CONTROL.notify(id)));
        #[cfg(feature = "axum")]
        let wants_peers = gate.rules().leave_early.noticed.is_some();
        Self {
            gate,
            plan,
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
            pre_stop: OnceLock::new(),
            #[cfg(feature = "axum")]
            refused_calls: events::Limit::default(),
            phases: watch::Sender::new(Phase::Serving),
            closing_stages: watch::Sender::new(ClosingStage::Open),
            driver_waker,
            log: events::Queue::default(),
            plan_logged: AtomicBool::new(false),
            driven: AtomicBool::new(false),
            asked_since: OnceLock::new(),
            spread_responses: AtomicU64::new(0),
            published: Published::new(Update::SERVING),
            state: Mutex::new(State::default()),
        }
    }

    pub(crate) fn policy(&self) -> &Policy {
        self.rules()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock!(self.state)
    }

    /// The plan. Its delay is shorter if every listener so far is shared with the next process.
    pub(crate) fn plan(&self) -> Plan {
        match self.policy().shared_delay {
            Some(most) if self.shares_listeners() => self.plan.with_drain_delay_up_to(most),
            _ => self.plan,
        }
    }

    /// Whether new connections during the stop are left to the next process.
    pub(crate) fn shares_listeners(&self) -> bool {
        let shared = self.policy().shared_listener;
        shared.unwrap_or_else(|| self.connections.listeners().are_shared())
    }

    /// Whether the next process has taken over: the listeners are shared with it, every listener of
    /// this process has closed, and no connection is left. No request can arrive any more.
    fn has_handed_over(&self) -> bool {
        let listeners = self.connections.listeners();
        let none_accepts = listeners.so_far > 0 && listeners.open == 0;
        none_accepts && self.shares_listeners() && self.connections.len() == 0
    }

    /// Whether a request for this path is one for [`Graceful::probes`](crate::Graceful::probes), as far as
    /// the path alone tells.
    pub(crate) fn is_probe(&self, path: &str) -> bool {
        policy::is_probe_path(path) && self.probes.get().is_some()
    }

    /// Whether this is the default path of a probe or of the preStop route, and that route exists.
    pub(crate) fn has_route(&self, path: &str) -> bool {
        self.is_probe(path) || path == policy::PRESTOP && self.pre_stop.get().is_some()
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
        let on_log_thread = self.state().clock == Clock::Real;
        self.log
            .push(vec![event], on_log_thread, Origin::here().as_ref());
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

    /// Whether a response in the lame-duck phase asks its client to leave, with `close_spread`: if the slot of
    /// its connection has been reached. Where the server does not know the connection, each response gets a
    /// slot of its own.
    #[cold]
    pub(crate) fn asks_to_leave(&self) -> bool {
        SLOT_REACHED
            .try_with(|reached| *reached)
            .unwrap_or_else(|_| {
                let nth = self.spread_responses.fetch_add(1, Ordering::Relaxed);
                Instant::now() >= self.slot_time(Place::nth(nth + 1))
            })
    }

    /// When the slot of this place is reached: the earliest time at which its client is asked to
    /// leave.
    pub(crate) fn slot_time(&self, place: Place) -> Instant {
        // A request may see the phase before it sees this moment. Then it is now.
        let since = self.asked_since.get().copied();
        let after = place.offset(self.policy().close_spread);
        instant_after(since.unwrap_or_else(Instant::now), after)
    }

    /// The time until `phase` ends at the latest, if it has an end.
    pub(crate) fn time_left(&self, phase: Phase) -> Option<Duration> {
        let state = self.state();
        let shutdown = state.shutdown.as_ref()?;
        let until = shutdown.ends(phase)?;
        Some(until.saturating_duration_since(Instant::now()))
    }

    /// The number of requests and holds in flight.
    pub(crate) fn in_flight(&self) -> usize {
        self.word().count() + self.work.holds()
    }

    /// Whether the service is draining or later, and nothing is in flight.
    fn is_idle(&self) -> bool {
        self.work.is_idle(|| self.settled_word().is_idle())
    }
}

impl Deref for Lifecycle {
    type Target = Gate<Policy, Self>;

    fn deref(&self) -> &Self::Target {
        &self.gate
    }
}

#[cfg(feature = "signal")]
impl Drop for Lifecycle {
    fn drop(&mut self) {
        CONTROL.forget(self.driver_waker.id());
    }
}
