//! `Graceful`: the handle with which a service is observed and stopped.
//!
//! Most of this file is documentation of public items.

use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use crate::{
    admission::{self, Gate},
    config::{
        plan::{EffectivePlan, Knobs, Plan},
        policy::Policy,
    },
    phase::Phase,
    report::Trigger,
    shutdown::{Lifecycle, Shared},
    waiting::{phase_receiver::PhaseReceiver, waiters::WaitKey},
};

/// Admits the requests of a service.
pub(crate) type Admission = admission::Admission<Policy, Lifecycle>;

/// The permit of a request that has a response.
pub(crate) type Permit = admission::Permit<Lifecycle>;

/// The permit of a request that has no response yet.
pub(crate) type Unanswered = admission::Unanswered<Lifecycle>;

/// The permission of a refusal to read the body of its request.
pub(crate) type Reading = admission::Reading<Lifecycle>;

/// The handle of a service's *lifecycle*: its phase, its counts, its registered work and its stop. Use
/// it to stop the service, to follow its phases, and to register work that the shutdown waits for.
///
/// A handle is cheap to clone, and clones share one lifecycle. Pass a clone to everything that
/// needs one.
///
/// # Example
///
/// ```
/// use std::time::Duration;
/// use tower_graceful::{Graceful, Phase};
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), tower_graceful::ConfigError> {
/// let graceful = Graceful::builder().drain_delay(Duration::from_secs(3)).build()?;
/// assert_eq!(graceful.phase(), Phase::Serving);
///
/// graceful.shutdown();
/// assert_eq!(graceful.phase(), Phase::LameDuck);
///
/// graceful.stopped().await; // nothing is in flight, so three seconds later
/// # Ok(())
/// # }
/// ```
///
/// # Triggers
///
/// A service runs until something triggers a stop:
///
/// - a signal, once [`drain`](Self::drain), [`handle_signals`](Self::handle_signals) or
///   [`serve`](Self::serve) listens for signals;
/// - a call of [`shutdown`](Self::shutdown);
/// - the future passed to [`drain_on`](Self::drain_on), when it resolves;
/// - a call of the preStop route, `Graceful::pre_stop`, if you add that route;
/// - a server passed to [`run`](Self::run), or a [`critical_worker`](Self::critical_worker), when
///   it ends.
///
/// Only the first trigger counts. From then on the phases follow the plan of the
/// [builder](Self::builder).
///
/// # Lifetime
///
/// The layer, the probes, tracked connections and every future made from a handle keep the
/// lifecycle alive, so a handle may be dropped as soon as they have been made. Dropping a handle
/// never stops a service, and a stop that has begun is completed without it.
///
/// The services made by the layer do not keep the lifecycle alive, and neither do the requests in
/// them, except for requests that are recorded [by name](crate::GracefulBuilder::name_requests) or
/// being rejected. When all handles, layers, probes, tracked connections and futures have been dropped,
/// nothing can stop these services any more, and they continue to serve. The futures of the cleanup
/// steps are dropped then.
///
/// # Runtime
///
/// A thread of this crate keeps the deadlines, one thread for the process. The first call that listens for
/// signals, triggers a stop, or builds a lifecycle with a `watchdog` starts this *control thread*. It ends
/// when no lifecycle needs it any more. So deadlines hold while handlers block every thread of the runtime,
/// and after the runtime has ended.
///
/// Workers run on the tokio runtime in which they are registered. Hooks and cleanup steps run on
/// the runtime in which the lifecycle is made. If the lifecycle is made outside a runtime, they run on
/// the runtime of a later call: the first call inside a runtime that registers a task, listens for signals,
/// runs a server, triggers a stop or waits for a phase. If that runtime ends first, those that have not begun run
/// on the runtime of a task that waits for [`run`](Self::run), [`stopped`](Self::stopped) or
/// [`draining`](Self::draining). The service still waits for workers of other runtimes. Tasks that can no longer
/// be run are [reported](crate::Report::tasks) as not run, or as cut. The runtime must have timers
/// (`enable_time` or `enable_all`). In a runtime without timers, the first call that needs timers panics.
/// Making the lifecycle inside a runtime is such a call.
///
/// Methods may be called outside a runtime too, except [`spawn`](Self::spawn), which panics there, and
/// [`worker`](Self::worker) and [`critical_worker`](Self::critical_worker), which return an error.
/// In a runtime whose clock is paused (`tokio::time::pause`), the paused clock applies.
///
/// # Memory
///
/// Requests change no reference count. The price is that each lifecycle whose [layer](Self::layer) has
/// made a service intentionally leaks about 2 KB and the settings of its builder. Make one lifecycle
/// for a process, not one for a request. Leak checkers (`LeakSanitizer`, valgrind) do not report the
/// memory, because a static list leads to it. A lifecycle whose layer was never applied is freed.
#[derive(Clone)]
pub struct Graceful {
    shared: Shared,
}

impl Graceful {
    /// Makes a lifecycle with the default plan: a grace period of 30 s, of which 5 s are the delay
    /// after SIGTERM, and no limit on requests in flight.
    ///
    /// # Panics
    ///
    /// Inside a tokio runtime without timers (`enable_time` or `enable_all`).
    #[must_use]
    pub fn new() -> Self {
        match Knobs::default().plan() {
            Ok(plan) => Self::from_parts(None, false, Policy::default(), plan),
            Err(error) => unreachable!("the default plan fits: {error}"),
        }
    }

    pub(crate) fn from_parts(
        max_in_flight: Option<usize>,
        name_requests: bool,
        policy: Policy,
        plan: Plan,
    ) -> Self {
        let shared = Arc::new_cyclic(|shared| {
            let is_spread = policy.is_spread();
            let gate = Gate::new(max_in_flight, name_requests, policy, shared);
            if is_spread {
                gate.spread_leaving();
            }
            Lifecycle::new(gate, plan)
        });
        shared.drive();
        Self { shared }
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Triggers a stop. It takes effect before this returns: readiness fails, and responses carry
    /// `Connection: close`.
    ///
    /// All calls, from any tasks and threads, before or after serving begins, are a single trigger.
    /// Unlike a further SIGINT, a further call never ends a phase. The delay is the delay of SIGTERM,
    /// [`drain_delay`](crate::GracefulBuilder::drain_delay).
    ///
    /// May be called outside a runtime.
    pub fn shutdown(&self) {
        self.shared.trigger(Trigger::Shutdown);
    }

    /// Sets whether the readiness probe succeeds while the service is [serving](Phase::Serving). It
    /// does from the start, until this is called with `false`. From the lame-duck phase on
    /// readiness always fails, and this has no effect.
    ///
    /// For a service that needs time to warm up, or that has lost a dependency. Liveness is not
    /// affected.
    pub fn set_ready(&self, ready: bool) {
        self.shared.set_ready(ready);
    }

    /// Whether the readiness probe succeeds: the service is serving, and not marked as unready.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.shared.word().is_ready()
    }

    /// The current phase.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.shared.phase()
    }

    /// The number of requests in flight: requests that the [layer](Self::layer) has admitted and
    /// whose response body has neither ended nor been dropped. [Holds](Self::hold) are included.
    ///
    /// Each thread counts separately. While requests come and go on several threads, the sum is not
    /// a snapshot of one moment, and may miss a request that begins while another one ends. It is
    /// exact from draining on, when no request begins any more, and with a
    /// [limit](crate::GracefulBuilder::max_in_flight).
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.shared.in_flight()
    }

    /// The number of open tracked connections: those accepted through [`listener`](Self::listener),
    /// or passed to [`track`](Self::track). Upgraded connections, such as WebSockets, count until
    /// they close.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.connections.len()
    }

    /// Returns phase, readiness, counts and the time left, for a status page or a metric.
    ///
    /// Rejections are counted from the start of the lifecycle and never decrease, so a metric can
    /// export them as counters.
    ///
    /// ```
    /// # use tower_graceful::{Graceful, Phase};
    /// let graceful = Graceful::new();
    /// let snapshot = graceful.snapshot();
    /// assert_eq!(snapshot.phase, Phase::Serving);
    /// assert_eq!(snapshot.in_flight, 0);
    /// ```
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let word = self.shared.word();
        let refusals = self.shared.refusals();
        Snapshot {
            phase: word.phase(),
            ready: word.is_ready(),
            in_flight: self.in_flight(),
            connections: self.connections(),
            time_left: self.shared.time_left(word.phase()),
            refused_draining: refusals.draining,
            refused_full: refusals.full,
        }
    }

    /// Returns the effective plan: the durations that were set, and those derived for the rest.
    ///
    /// It is also logged once, at debug level, by the first call that runs a server, listens for
    /// signals or triggers a stop. The socket of a listener is known from its first accept on: if it was passed by
    /// socket activation, the default delay is shorter from then on. An earlier log event may have the longer delay.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_graceful::Graceful;
    /// let plan = Graceful::new().plan();
    /// assert_eq!(plan.grace_period, Duration::from_secs(30));
    /// assert_eq!(plan.drain_deadline, Duration::from_secs(24));
    /// ```
    #[must_use]
    pub fn plan(&self) -> EffectivePlan {
        self.shared.plan().effective()
    }

    /// Returns a receiver that follows the phase.
    ///
    /// ```
    /// # use tower_graceful::{Graceful, Phase};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let graceful = Graceful::new();
    /// let mut phases = graceful.subscribe();
    /// graceful.shutdown();
    /// assert_eq!(phases.changed().await, Some(Phase::LameDuck));
    /// # }
    /// ```
    ///
    /// The receiver does not keep the lifecycle alive: when all its handles, layers and futures
    /// have been dropped, `changed` returns `None`.
    #[must_use]
    pub fn subscribe(&self) -> PhaseReceiver {
        PhaseReceiver::new(self.shared.phases())
    }

    /// Returns a future that resolves when draining starts. Use it to end long-lived work, such as
    /// a WebSocket or an event stream. If draining has already started, it resolves at once.
    ///
    /// ```
    /// # use tower_graceful::Graceful;
    /// # async fn receive() -> Option<u32> { None }
    /// # async fn use_it(_: u32) {}
    /// async fn subscription(graceful: Graceful) {
    ///     // One future, so that draining ends it even while it waits in `use_it`.
    ///     let messages = async {
    ///         while let Some(message) = receive().await {
    ///             use_it(message).await;
    ///         }
    ///     };
    ///     tokio::select! {
    ///         () = graceful.draining() => {} // send a close message here
    ///         () = messages => {}
    ///     }
    /// }
    /// ```
    ///
    /// For code that takes a `CancellationToken` of tokio-util, spawn a task that waits and then
    /// cancels:
    ///
    /// ```
    /// use tokio_util::sync::CancellationToken;
    /// # use tower_graceful::Graceful;
    ///
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// # let graceful = Graceful::new();
    /// let token = CancellationToken::new();
    /// let (draining, cancel) = (graceful.draining(), token.clone());
    /// tokio::spawn(async move {
    ///     draining.await;
    ///     cancel.cancel();
    /// });
    /// # graceful.shutdown();
    /// token.cancelled().await;
    /// # }
    /// ```
    ///
    /// A token that starts the stop:
    ///
    /// ```
    /// # use tokio_util::sync::CancellationToken;
    /// # use tower_graceful::Graceful;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// # let (graceful, token) = (Graceful::new(), CancellationToken::new());
    /// let (stop, cancelled) = (graceful.clone(), token.clone().cancelled_owned());
    /// tokio::spawn(async move {
    ///     cancelled.await;
    ///     stop.shutdown();
    /// });
    /// # token.cancel();
    /// # graceful.stopped().await;
    /// # }
    /// ```
    ///
    /// To end a stream, use [`until_draining`](Self::until_draining).
    ///
    /// The future owns its data and can be sent to any task. It may be polled again after it is
    /// ready, and stays ready. Cancel safe: dropping it has no effect, and a clone waits for the
    /// same phase. Thousands of them are cheap: each takes 40 bytes, and as much in a shared table
    /// while it waits. They are notified all at once, or one after another over
    /// [`drain_spread`](crate::GracefulBuilder::drain_spread).
    pub fn draining(&self) -> PhaseReached {
        PhaseReached::new(self, Phase::Draining, self.shared.policy().spreads_drain())
    }

    /// Returns a future that resolves when the shutdown is complete: nothing is in flight, every
    /// tracked connection is closed, every server passed to [`run`](Self::run), every worker and every
    /// cleanup step has ended, and work that did not end in time was given up.
    ///
    /// The shutdown must not wait for the task that waits here: do not await this inside a server
    /// passed to [`run`](Self::run), or in a tracked connection. In all other respects the future is like
    /// that of [`draining`](Self::draining).
    pub fn stopped(&self) -> PhaseReached {
        PhaseReached::new(self, Phase::Stopped, false)
    }
}

impl Default for Graceful {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Graceful {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let snapshot = self.snapshot();
        f.debug_struct("Graceful")
            .field("phase", &snapshot.phase)
            .field("ready", &snapshot.ready)
            .field("in_flight", &snapshot.in_flight)
            .field("connections", &snapshot.connections)
            .finish_non_exhaustive()
    }
}

/// The state of a service at one moment. [`Graceful::snapshot`] makes it.
///
/// With the feature `serde` it implements `Serialize`: `time_left` is in seconds, and the phase is in
/// `snake_case`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Snapshot {
    /// The phase.
    pub phase: Phase,
    /// Whether the readiness probe succeeds.
    pub ready: bool,
    /// Requests in flight, and holds.
    pub in_flight: usize,
    /// Open tracked connections.
    pub connections: usize,
    /// The time until the current phase ends at the latest. In [`Phase::Closing`] it is the time that
    /// the present step has: until open connections are cut; after a cut, until the service stops
    /// waiting for what was cut; during cleanup, until workers and steps are given up. `None` while
    /// serving and once stopped.
    #[cfg_attr(
        feature = "serde",
        serde(serialize_with = "crate::report::json::seconds_left")
    )]
    pub time_left: Option<Duration>,
    /// Requests that were rejected because draining had begun (503), since the start of the
    /// lifecycle.
    pub refused_draining: usize,
    /// Requests that were rejected above [`max_in_flight`](crate::GracefulBuilder::max_in_flight)
    /// (429), since the start of the lifecycle. [`Requests::refused`](crate::Requests::refused) in
    /// the report counts both kinds from the trigger on.
    pub refused_full: usize,
}

/// Resolves when a phase, or a later one, has been reached. [`Graceful::draining`],
/// [`Graceful::stopped`] and the methods of [`Stop`](crate::Stop) make it.
#[must_use = "futures do nothing unless polled"]
pub struct PhaseReached {
    pub(super) graceful: Graceful,
    phase: Phase,
    /// Whether it has a place in [`drain_spread`](crate::GracefulBuilder::drain_spread).
    spread: bool,
    wait_key: Option<WaitKey>,
}

impl PhaseReached {
    fn new(graceful: &Graceful, phase: Phase, spread: bool) -> Self {
        Self {
            graceful: graceful.clone(),
            phase,
            spread,
            wait_key: None,
        }
    }

    /// A future that resolves as soon as the phase begins: `drain_spread` does not delay it.
    pub(crate) fn at_once(graceful: &Graceful, phase: Phase) -> Self {
        Self::new(graceful, phase, false)
    }
}

impl Future for PhaseReached {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Self {
            graceful,
            phase,
            spread,
            wait_key,
        } = &mut *self;
        let shared = graceful.shared();
        // Checked without a lock, because thousands of tasks may be woken at once.
        let present = shared.settled_phase();
        if present > *phase || present == *phase && !*spread {
            // The notification is under way and removes the registration.
            *wait_key = None;
            return Poll::Ready(());
        }
        let first = wait_key.is_none();
        let polled = shared.waiters.poll(wait_key, *phase, *spread, cx);
        // After the registration: a driver that ended before it has not woken this task.
        if first || !shared.is_driven() {
            shared.drive();
        }
        polled
    }
}

/// The clone waits for the same phase, with its own registration.
impl Clone for PhaseReached {
    fn clone(&self) -> Self {
        Self::new(&self.graceful, self.phase, self.spread)
    }
}

impl Drop for PhaseReached {
    fn drop(&mut self) {
        if let Some(wait_key) = self.wait_key.take() {
            self.graceful.shared.waiters.remove(wait_key);
        }
    }
}

impl fmt::Debug for PhaseReached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PhaseReached")
            .field("awaited", &self.phase)
            .field("present", &self.graceful.phase())
            .finish_non_exhaustive()
    }
}
