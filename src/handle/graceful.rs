//! `Graceful`: the handle through which a service is observed and stopped.

use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use crate::{
    admission,
    config::{
        plan::{EffectivePlan, Knobs, Plan},
        policy::Policy,
    },
    phase::Phase,
    report::Trigger,
    shutdown::{Lifecycle, Shared},
    waiting::{phase_receiver::PhaseReceiver, waiters::WaitKey},
};

/// Where the requests of a service come in.
pub(crate) type Admission = admission::Admission<Policy, Lifecycle>;

/// A request's permission to be in flight, once it has a response.
pub(crate) type Permit = admission::Permit<Policy, Lifecycle>;

/// The same, up to the response.
pub(crate) type Unanswered = admission::Unanswered<Policy, Lifecycle>;

/// A piece of a response that its server holds.
pub(crate) type Piece = admission::Piece<Policy, Lifecycle>;

/// A refusal's permission to read the body of its request.
pub(crate) type Reading = admission::Reading<Policy, Lifecycle>;

/// The handle on one service's lifecycle: what stops it, and what tells how far it has come.
///
/// It is cheap to clone, and clones share one lifecycle: give one to whatever needs it. The layer,
/// the probes, tracked connections and every future it hands out keep the lifecycle alive, so a
/// handle may be dropped as soon as they have been made; dropping never stops a service, and a stop
/// that has begun is completed by itself.
///
/// The services that the layer has made do not keep it alive, nor do the requests in them, but for
/// those that are known [by name](crate::GracefulBuilder::name_requests) or being refused: where
/// nothing else is left, nothing can stop them any more, and they go on as they are. What cleanup
/// steps have captured is dropped then.
///
/// A request counts no references. In return, each lifecycle whose [layer](Self::layer) has made a
/// service keeps about two kilobytes, and what was set up in the builder, until the process ends. Make
/// one lifecycle for a process, not one for a request. Leak checkers (`LeakSanitizer`, Miri) do not
/// report it, because a static list leads to it. A lifecycle whose layer was never applied is freed.
///
/// Nothing happens until something asks for a stop: a signal, once [`drain`](Self::drain),
/// [`handle_signals`](Self::handle_signals) or [`serve`](Self::serve) listens for them;
/// [`shutdown`](Self::shutdown); or the future given to [`drain_on`](Self::drain_on). The first of
/// them wins, and from there the phases follow each other on a timetable laid down by the
/// [builder](Self::builder).
///
/// # Runtime
///
/// The timetable is kept by a thread of this crate's own, one for the process. It is started by the
/// first call that listens for signals or asks for a stop, and ends when no lifecycle needs it any more.
/// So deadlines hold while handlers block every thread of the runtime, and after the runtime has ended.
///
/// Workers run on the tokio runtime in which they are registered. Hooks and cleanup steps run on the
/// runtime of the first call made inside one. If that runtime ends before, they run on the runtime of a
/// task that waits for [`run`](Self::run), [`stopped`](Self::stopped) or [`draining`](Self::draining);
/// what can no longer be run is [reported](crate::Report::tasks) as not run, or as cut. The runtime must have timers
/// (`enable_time` or `enable_all`): inside one that has none, that first call panics.
///
/// Every method may be called outside a runtime too; where one needs a runtime later, its page says so.
/// In a runtime whose clock is paused (`tokio::time::pause`) that clock rules.
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
#[derive(Clone)]
pub struct Graceful {
    shared: Shared,
}

impl Graceful {
    /// A lifecycle with the default plan: a grace period of 30 s, of which 5 s delay on SIGTERM,
    /// and no limit on requests in flight.
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
        let shared = Shared::new(max_in_flight, name_requests, policy, |policy| {
            Lifecycle::new(plan, Arc::clone(policy))
        });
        shared.drive();
        Self { shared }
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    pub(crate) fn admission(&self) -> Admission {
        self.shared.admission()
    }

    pub(crate) fn policy(&self) -> &Policy {
        &self.shared.policy
    }

    /// Asks the service to stop, now. Takes effect before it returns: readiness says no and
    /// responses say `Connection: close`.
    ///
    /// Any number of calls, from any number of tasks and threads, before or after serving began,
    /// are one trigger; it never ends a phase that is under way, as a further SIGINT does. The
    /// delay is the one of SIGTERM, [`drain_delay`](crate::GracefulBuilder::drain_delay).
    ///
    /// May be called outside a runtime, from a thread of its own for example.
    pub fn shutdown(&self) {
        self.shared.trigger(Trigger::Shutdown);
    }

    /// Whether the readiness route says yes while the service is [serving](Phase::Serving): true
    /// from the start, until this says otherwise. From the lame-duck phase on readiness is no, and
    /// this changes nothing.
    ///
    /// For a service that is up before it is warm, or that has lost what it depends on. Liveness
    /// is not affected.
    pub fn set_ready(&self, ready: bool) {
        self.shared.set_ready(ready);
    }

    /// Whether the readiness route says yes: serving, and not marked unready.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.shared.word().is_ready()
    }

    /// The present phase.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.shared.phase()
    }

    /// The number of requests in flight: let in by the [layer](Self::layer), and their response
    /// body neither ended nor dropped. [Holds](Self::hold) are among them.
    ///
    /// Threads count apart, so while requests come and go on several of them the sum is not of one
    /// moment, and may miss one that ends on one thread while another begins on the next. From
    /// draining on, when none begins, it is exact, and so it is with a
    /// [limit](crate::GracefulBuilder::max_in_flight).
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.shared.in_flight()
    }

    /// The number of open connections that are tracked: those accepted through
    /// [`listener`](Self::listener), or given to [`track`](Self::track). Upgraded ones, such as
    /// WebSockets, count until they close.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.connections.len()
    }

    /// Phase, readiness, counts and the time left, for a status page or a metric.
    ///
    /// The refusals are counted from the start of the lifecycle and never decrease, so a metric can
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

    /// The effective plan: the durations that were set, and those derived for the rest.
    ///
    /// It is also logged once, at debug level, by the first call that runs a server, listens for
    /// signals or asks for a stop.
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

    /// Follows the phase.
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
    /// The receiver does not keep the lifecycle alive: when every handle, layer and future of it
    /// is gone, `changed` returns `None`.
    #[must_use]
    pub fn subscribe(&self) -> PhaseReceiver {
        PhaseReceiver::new(self.shared.phases())
    }

    /// Resolves when draining starts: the moment for long-lived work, a WebSocket or an event
    /// stream, to come to an end. Resolves at once if draining has started already.
    ///
    /// The future owns what it needs, can be sent to any task, and may be polled again after it
    /// is ready: it stays ready. Dropping it has no effect, and a clone waits anew. It is cheap to
    /// make thousands of: 40 bytes, and as much in a shared table while it waits. They are told all
    /// at once, or by and by over [`drain_spread`](crate::GracefulBuilder::drain_spread).
    ///
    /// ```
    /// # use tower_graceful::Graceful;
    /// # async fn receive() -> Option<u32> { None }
    /// # async fn use_it(_: u32) {}
    /// async fn subscription(graceful: Graceful) {
    ///     let mut draining = graceful.draining();
    ///     loop {
    ///         tokio::select! {
    ///             () = &mut draining => break, // say goodbye
    ///             message = receive() => match message {
    ///                 Some(message) => use_it(message).await,
    ///                 None => break,
    ///             },
    ///         }
    ///     }
    /// }
    /// ```
    ///
    /// For code that takes a `CancellationToken` of tokio-util, a task that waits and then cancels:
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
    /// A stream is ended by [`until_draining`](Self::until_draining).
    pub fn draining(&self) -> PhaseReached {
        PhaseReached::new(self, Phase::Draining, self.policy().spreads_drain())
    }

    /// Resolves when all is over: nothing is in flight, every tracked connection is closed, every
    /// server given to [`run`](Self::run) has ended, or what did not end in time was given up.
    ///
    /// What waits for it must not itself be waited for: a server given to [`run`](Self::run), or a
    /// tracked connection. Behaves like [`draining`](Self::draining) otherwise.
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

/// A service's state. Made by [`Graceful::snapshot`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Snapshot {
    /// The phase.
    pub phase: Phase,
    /// Whether the readiness route says yes.
    pub ready: bool,
    /// Requests in flight, and holds.
    pub in_flight: usize,
    /// Tracked connections that are open.
    pub connections: usize,
    /// Until the present phase ends at the latest; for [`Phase::Closing`], until what is still
    /// open is cut, and after that, until it is given up. `None` while serving and once stopped.
    pub time_left: Option<Duration>,
    /// Requests that were refused because draining had begun (503), since the start of the lifecycle.
    pub refused_draining: usize,
    /// Requests that were refused above
    /// [`max_in_flight`](crate::GracefulBuilder::max_in_flight) (429), since the start of the
    /// lifecycle. [`Requests::refused`](crate::Requests::refused) in the report counts both kinds from
    /// the stop on.
    pub refused_full: usize,
}

/// Resolves when a phase, or a later one, has been reached. Made by [`Graceful::draining`],
/// [`Graceful::stopped`] and the methods of [`Stop`](crate::Stop).
#[must_use = "futures do nothing unless polled"]
pub struct PhaseReached {
    graceful: Graceful,
    phase: Phase,
    /// Whether it has a turn in [`drain_spread`](crate::GracefulBuilder::drain_spread).
    spread: bool,
    seat: Option<WaitKey>,
}

impl PhaseReached {
    fn new(graceful: &Graceful, phase: Phase, spread: bool) -> Self {
        Self {
            graceful: graceful.clone(),
            phase,
            spread,
            seat: None,
        }
    }

    /// Resolves as soon as the phase begins: `drain_spread` does not delay it.
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
            seat,
        } = &mut *self;
        let shared = graceful.shared();
        // Without a lock, for the thousands who are woken at once.
        let present = shared.settled_phase();
        if present > *phase || present == *phase && !*spread {
            // The telling is under way, and empties it.
            *seat = None;
            return Poll::Ready(());
        }
        if seat.is_none() || !shared.is_driven() {
            shared.drive();
        }
        shared.waiters.poll(seat, *phase, *spread, cx)
    }
}

/// The clone waits anew, for the same phase.
impl Clone for PhaseReached {
    fn clone(&self) -> Self {
        Self::new(&self.graceful, self.phase, self.spread)
    }
}

impl Drop for PhaseReached {
    fn drop(&mut self) {
        if let Some(seat) = self.seat.take() {
            self.graceful.shared.waiters.leave(seat);
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
