//! The types that refer to a gate: [`Gate`] owns it, [`Admission`] admits requests, [`Permit`]
//! releases one request when it is dropped, and [`Reading`] allows a refusal to read the body of
//! its request.
//!
//! This file is long because these types refer to one another.

use std::{
    fmt, mem,
    ops::Deref,
    ptr,
    sync::{Arc, OnceLock, Weak},
    task::{Context, Poll},
};

use super::{
    core::{Core, Refusals, SinceServing},
    kept::keep,
    shard::{Refused, Shard},
    word::Word,
};
use crate::{
    phase::Phase,
    sync::{Ordering, lock},
};

/// A gate, its rules `K`, and the value `T` behind it. Clones share all of it. `T` is dropped with
/// the last clone.
pub(crate) struct Gate<K: 'static, T: 'static>(Arc<Shared<K, T>>);

struct Shared<K: 'static, T: 'static> {
    core: Arc<Core<K, Shared<K, T>>>,
    /// Set by the first call of [`Gate::admission`]. From then on the core is kept until the
    /// process ends.
    admission: OnceLock<Admission<K, T>>,
    value: T,
}

/// What an [`Admission`] points at.
struct Target<K: 'static, T: 'static> {
    core: Arc<Core<K, Shared<K, T>>>,
    /// The target for services that only lead to a probe. `None` on that target itself.
    to_probe: Option<&'static Self>,
}

impl<K, T> Drop for Shared<K, T> {
    fn drop(&mut self) {
        // The core holds a weak reference and may be kept until the process ends. Without this line
        // it would keep the memory of `Shared` as well.
        *lock!(self.core.common().owned) = Weak::new();
    }
}

impl<K, T> Gate<K, T> {
    /// `named`: every admission takes the slow path.
    pub(crate) fn new(
        limit: Option<usize>,
        named: bool,
        rules: K,
        behind: impl FnOnce(&Arc<K>) -> T,
    ) -> Self {
        let core = Arc::new(Core::new(limit, named, rules));
        let shared = Arc::new(Shared {
            value: behind(&core.common().rules),
            admission: OnceLock::new(),
            core: Arc::clone(&core),
        });
        *lock!(core.common().owned) = Arc::downgrade(&shared);
        Self(shared)
    }

    /// The first call keeps the shards until the process ends. See "Ownership" in the module
    /// header.
    pub(crate) fn admission(&self) -> Admission<K, T>
    where
        K: Send + Sync,
        T: Send + Sync,
    {
        *self.0.admission.get_or_init(|| {
            let target = |to_probe| {
                keep(Target {
                    core: Arc::clone(&self.0.core),
                    to_probe,
                })
            };
            Admission(target(Some(target(None))))
        })
    }

    /// Distinguishes the admissions of this gate from those of other gates, while the gate has an
    /// owner.
    pub(crate) fn address(&self) -> usize {
        ptr::from_ref(&*self.0.core).addr()
    }

    /// How many pieces of responses the servers hold.
    pub(crate) fn pieces(&self) -> usize {
        self.0.core.pieces()
    }

    /// Admissions, refusals and drops after Serving.
    pub(crate) fn since_serving(&self) -> SinceServing {
        self.0.core.since_serving()
    }

    /// All refusals so far.
    pub(crate) fn refusals(&self) -> Refusals {
        self.0.core.refusals()
    }

    pub(crate) fn phase(&self) -> Phase {
        self.0.core.phase()
    }

    /// The current phase, for code that acts on it: everything that led to the phase happens
    /// before.
    pub(crate) fn settled_phase(&self) -> Phase {
        self.0.core.settled_phase()
    }

    /// The current phase and readiness, and the number of all requests in flight.
    pub(crate) fn word(&self) -> Word {
        self.0.core.word()
    }

    /// As [`word`](Self::word), ordered after everything that the released requests did.
    pub(crate) fn settled_word(&self) -> Word {
        self.0.core.settled_word()
    }

    /// Advances to `phase`. Returns the previous word if the phase changed. Calls must not overlap.
    pub(crate) fn advance(&self, phase: Phase) -> Option<Word> {
        self.0.core.advance(phase)
    }

    pub(crate) fn set_ready(&self, ready: bool) {
        self.0.core.set_ready(ready);
    }

    /// Records that a server has begun, a connection was tracked, or a probe has answered "ready".
    pub(crate) fn mark_served(&self) {
        self.0.core.mark_served();
    }

    /// Whether a request was admitted since the flags were last cleared.
    pub(crate) fn has_admitted(&self) -> bool {
        self.0.core.has_admitted()
    }

    /// Whether a request was ever admitted.
    pub(crate) fn has_ever_admitted(&self) -> bool {
        self.0.core.has_ever_admitted()
    }

    /// Clears the flags of [`has_admitted`](Self::has_admitted). Calls must not overlap.
    pub(crate) fn clear_admitted(&self) {
        self.0.core.clear_admitted();
    }

    pub(crate) fn poll_idle(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.0.core.poll_idle(cx)
    }

    pub(crate) fn downgrade(&self) -> WeakGate<K, T> {
        WeakGate(Arc::downgrade(&self.0))
    }
}

impl<K, T> Clone for Gate<K, T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<K, T> Deref for Gate<K, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0.value
    }
}

impl<K, T> fmt::Debug for Gate<K, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.word().fmt(f)
    }
}

/// A reference to a gate that does not keep the value behind it alive.
pub(crate) struct WeakGate<K: 'static, T: 'static>(Weak<Shared<K, T>>);

impl<K, T> WeakGate<K, T> {
    pub(crate) fn upgrade(&self) -> Option<Gate<K, T>> {
        self.0.upgrade().map(Gate)
    }
}

impl<K, T> Clone for WeakGate<K, T> {
    fn clone(&self) -> Self {
        Self(Weak::clone(&self.0))
    }
}

/// Admits requests to a gate. A plain pointer: a clone is a copy and owns nothing. The target also
/// tells whether the requests are for a probe, because a service has no room for more than a
/// pointer.
pub(crate) struct Admission<K: 'static, T: 'static>(&'static Target<K, T>);

impl<K, T> Admission<K, T> {
    #[inline]
    fn core(self) -> &'static Core<K, Shared<K, T>> {
        &self.0.core
    }

    /// Whether this admission is for services that only lead to a probe.
    pub(crate) fn leads_to_probe(self) -> bool {
        self.0.to_probe.is_none()
    }

    /// The admission of the same gate for services that only lead to a probe.
    pub(crate) fn to_probe(self) -> Self {
        self.0.to_probe.map_or(self, Admission)
    }

    /// Distinguishes the admissions of one gate from those of others.
    pub(crate) fn address(self) -> usize {
        ptr::from_ref(self.core()).addr()
    }

    /// Admits a request on the fast path: see [`Shard::admit`].
    #[inline]
    pub(crate) fn admit(self) -> Option<Unanswered<K, T>> {
        let shard = self.core().shard();
        shard.admit().then(|| Unanswered(shard))
    }

    /// Admits a request that [`admit`](Self::admit) did not, or returns the reason for the refusal.
    pub(crate) fn admit_slow(self) -> Result<Unanswered<K, T>, Refused> {
        let shard = self.core().shard();
        shard.admit_slow()?;
        Ok(Unanswered(shard))
    }

    /// Counts a refusal. Exempt requests that are not admitted must not be counted here.
    pub(crate) fn refused(self, refused: Refused) {
        self.core().refused(refused);
    }

    /// Allows a refusal to read the body of its request, unless too many refusals are reading
    /// already.
    pub(crate) fn begin_reading(self) -> Option<Reading<K, T>> {
        let core = self.core();
        core.begin_reading().then(|| Reading(core))
    }

    /// The rules of the gate.
    pub(crate) fn rules(self) -> &'static K {
        &self.core().common().rules
    }

    pub(crate) fn word(self) -> Word {
        self.core().word()
    }

    pub(crate) fn phase(self) -> Phase {
        self.core().phase()
    }

    /// The gate, if it still has an owner.
    pub(crate) fn gate(self) -> Option<Gate<K, T>> {
        self.core().common().owned().map(Gate)
    }
}

impl<K, T> Clone for Admission<K, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<K, T> Copy for Admission<K, T> {}

/// A permit of a request that has no response yet. Dropping it releases the request, and counts it
/// as dropped during a stop.
#[must_use = "dropping it releases the request at once"]
pub(crate) struct Unanswered<K: 'static, T: 'static>(&'static Shard<K, Shared<K, T>>);

impl<K, T> Unanswered<K, T> {
    /// The request has a response, or its service has failed.
    #[inline]
    pub(crate) fn answered(self) -> Permit<K, T> {
        let permit = Permit(self.0);
        // From here on the permit releases the request.
        mem::forget(self);
        permit
    }

    /// The word of this request's shard: the phase, and the number of requests on the shard.
    #[inline]
    pub(crate) fn word(&self) -> Word {
        self.0.word()
    }

    /// The gate, if it still has an owner.
    pub(crate) fn gate(&self) -> Option<Gate<K, T>> {
        self.0.common().owned().map(Gate)
    }
}

impl<K, T> Drop for Unanswered<K, T> {
    fn drop(&mut self) {
        self.0.release_unanswered();
    }
}

/// A permit of a request that has a response. Dropping it releases the request.
#[must_use = "dropping the permit releases the request at once"]
pub(crate) struct Permit<K: 'static, T: 'static>(&'static Shard<K, Shared<K, T>>);

impl<K, T> Permit<K, T> {
    /// The word of this request's shard: the phase, and the number of requests on the shard.
    #[inline]
    pub(crate) fn word(&self) -> Word {
        self.0.word()
    }
}

impl<K, T> Permit<K, T> {
    /// The body of the response has failed, so the response cannot be completed. Releases the
    /// request, and counts it as dropped if the service stops.
    #[cold]
    #[inline(never)]
    pub(crate) fn fail(self) {
        let request = Unanswered(self.0);
        mem::forget(self);
        drop(request);
    }

    /// Counts a piece of the response that is passed to the server.
    pub(crate) fn piece(&self) -> Piece<K, T> {
        let shard = self.0;
        shard.common().pieces.fetch_add(1, Ordering::Relaxed);
        Piece(shard)
    }
}

/// A piece of a response that the server holds. Dropping it means that the server no longer holds
/// it. It does not keep the request in flight, because other middleware may keep parts of a
/// response for any time. `Relaxed`: this is a statistic that is read much later.
#[must_use = "dropping it means that the server has sent the piece"]
pub(crate) struct Piece<K: 'static, T: 'static>(&'static Shard<K, Shared<K, T>>);

impl<K, T> Drop for Piece<K, T> {
    fn drop(&mut self) {
        self.0.common().pieces.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<K, T> Drop for Permit<K, T> {
    #[inline]
    fn drop(&mut self) {
        self.0.release();
    }
}

/// Permission to read the body of a refused request. Dropping it allows another refusal to read.
#[must_use = "dropping it allows another refusal to read"]
pub(crate) struct Reading<K: 'static, T: 'static>(&'static Core<K, Shared<K, T>>);

impl<K, T> Drop for Reading<K, T> {
    fn drop(&mut self) {
        self.0.end_reading();
    }
}

impl<K, T> fmt::Debug for Permit<K, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Permit").field(&self.word()).finish()
    }
}

#[cfg(all(test, not(tower_graceful_loom)))]
mod tests {
    use super::super::kept::is_kept;
    use super::*;

    fn gate() -> Gate<(), ()> {
        Gate::new(None, false, (), |_| ())
    }

    #[test]
    fn a_piece_counts_until_its_server_drops_it() {
        let gate = gate();
        let permit = gate.admission().admit().unwrap().answered();
        let pieces = [(); 2].map(|()| permit.piece());
        drop(permit);
        assert_eq!(gate.pieces(), 2);
        assert_eq!(gate.word().count(), 0);
        drop(pieces);
        assert_eq!(gate.pieces(), 0);
    }

    #[test]
    fn an_admission_leads_to_the_gate_while_the_gate_has_an_owner() {
        let gate = gate();
        let admission = gate.admission();
        let request = admission.admit().unwrap();
        assert!(admission.gate().is_some() && request.gate().is_some());
        drop(gate);
        assert!(admission.gate().is_none() && request.gate().is_none());
    }

    #[test]
    fn mark_served_sets_has_served() {
        let gate = gate();
        assert!(!gate.word().has_served());
        gate.mark_served();
        assert!(gate.word().has_served());
    }

    #[test]
    fn the_static_list_contains_everything_that_an_admission_points_at() {
        let gate = gate();
        let admission = gate.admission();
        assert!(is_kept(admission.0));
        assert!(admission.0.to_probe.is_some_and(is_kept));
        assert_eq!(gate.address(), admission.address());
        assert!(admission.to_probe().leads_to_probe() && !admission.leads_to_probe());
    }

    #[test]
    fn one_admission_is_made_on_first_use() {
        let gate = gate();
        let core = Arc::downgrade(&gate.0.core);
        drop(gate);
        assert!(core.upgrade().is_none(), "it is kept without an admission");
        let gate = self::gate();
        assert!(ptr::eq(gate.admission().0, gate.clone().admission().0));
        let core = Arc::downgrade(&gate.0.core);
        drop(gate);
        assert!(core.upgrade().is_some());
    }
}
