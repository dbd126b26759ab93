//! Who holds what: the owners of a gate, the doors in it, the ticket that lets one out when dropped,
//! and the permission to read the body of a request that was refused.

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

/// A gate, its rules `K`, and the `T` behind it. Cloning shares all of it, and `T` lives as long as
/// one of the clones does.
pub(crate) struct Gate<K: 'static, T: 'static>(Arc<Shared<K, T>>);

struct Shared<K: 'static, T: 'static> {
    core: Arc<Core<K, Shared<K, T>>>,
    /// The door, from when it was first asked for. Then the core is kept for ever.
    admission: OnceLock<Admission<K, T>>,
    value: T,
}

/// One side of a door.
struct Side<K: 'static, T: 'static> {
    core: Arc<Core<K, Shared<K, T>>>,
    /// The side for services that do nothing but lead to a probe. `None` on that side.
    to_probe: Option<&'static Self>,
}

impl<K, T> Drop for Shared<K, T> {
    fn drop(&mut self) {
        // Its memory goes with the last weak reference, and the hall, which holds one, stays for ever.
        *lock!(self.core.common().owned) = Weak::new();
    }
}

impl<K, T> Gate<K, T> {
    /// `named`: every admission is to be a special one.
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

    /// The first call keeps the lanes for ever. See "Who owns what" in the module header.
    pub(crate) fn admission(&self) -> Admission<K, T>
    where
        K: Send + Sync,
        T: Send + Sync,
    {
        *self.0.admission.get_or_init(|| {
            let side = |to_probe| {
                keep(Side {
                    core: Arc::clone(&self.0.core),
                    to_probe,
                })
            };
            Admission(side(Some(side(None))))
        })
    }

    /// What tells the doors of this gate from others, for as long as there is an owner of it.
    pub(crate) fn address(&self) -> usize {
        ptr::from_ref(&*self.0.core).addr()
    }

    /// How many pieces of responses servers hold.
    pub(crate) fn pieces(&self) -> usize {
        self.0.core.pieces()
    }

    /// What has happened after the first phase.
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

    /// The present phase, by which to act upon it: what led to it happens before.
    pub(crate) fn settled_phase(&self) -> Phase {
        self.0.core.settled_phase()
    }

    /// The present phase and readiness, and the count of all who are in flight.
    pub(crate) fn word(&self) -> Word {
        self.0.core.word()
    }

    /// As [`word`](Self::word), ordered after all that the requests no longer in it have done.
    pub(crate) fn settled_word(&self) -> Word {
        self.0.core.settled_word()
    }

    /// Moves on to `phase`. Returns the word it moved on from, if it did. One at a time.
    pub(crate) fn advance(&self, phase: Phase) -> Option<Word> {
        self.0.core.advance(phase)
    }

    pub(crate) fn set_ready(&self, ready: bool) {
        self.0.core.set_ready(ready);
    }

    /// Notes that somebody was told he would be served.
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

    /// Clears the flags of [`has_admitted`](Self::has_admitted). One at a time.
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

/// A gate that does not keep alive what is behind it.
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

/// Where requests come in. It owns nothing, so to clone it is to copy a pointer, which also says
/// whether the requests are for a probe: a service has no room for more than a pointer.
pub(crate) struct Admission<K: 'static, T: 'static>(&'static Side<K, T>);

impl<K, T> Admission<K, T> {
    #[inline]
    fn core(self) -> &'static Core<K, Shared<K, T>> {
        &self.0.core
    }

    /// Whether what comes in here goes to a probe and nowhere else.
    pub(crate) fn leads_to_probe(self) -> bool {
        self.0.to_probe.is_none()
    }

    /// The same door, for services that do nothing but lead to a probe.
    pub(crate) fn to_probe(self) -> Self {
        self.0.to_probe.map_or(self, Admission)
    }

    /// What tells the doors of one gate from those of others.
    pub(crate) fn address(self) -> usize {
        ptr::from_ref(self.core()).addr()
    }

    /// Lets one request in, if there is nothing to it but to count.
    #[inline]
    pub(crate) fn admit(self) -> Option<Unanswered<K, T>> {
        let shard = self.core().shard();
        shard.admit().then(|| Unanswered(shard))
    }

    /// Lets one request in that [`admit`](Self::admit) did not, or says why not.
    pub(crate) fn admit_slow(self) -> Result<Unanswered<K, T>, Refused> {
        let shard = self.core().shard();
        shard.admit_slow()?;
        Ok(Unanswered(shard))
    }

    /// Notes a refusal. Not all who are not let in are refused.
    pub(crate) fn refused(self, refused: Refused) {
        self.core().refused(refused);
    }

    /// Lets a refusal read the body of its request, unless so many do already that one more is
    /// too many.
    pub(crate) fn begin_reading(self) -> Option<Reading<K, T>> {
        let core = self.core();
        core.begin_reading().then(|| Reading(core))
    }

    /// What holds at this gate for ever.
    pub(crate) fn rules(self) -> &'static K {
        &self.core().common().rules
    }

    pub(crate) fn word(self) -> Word {
        self.core().word()
    }

    pub(crate) fn phase(self) -> Phase {
        self.core().phase()
    }

    /// What is behind the door, if anybody owns it still.
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

/// Proof of admission of a request that has no response yet. Dropping it lets the request out, and
/// counts it as dropped if the service stops.
#[must_use = "dropping it lets the request out at once"]
pub(crate) struct Unanswered<K: 'static, T: 'static>(&'static Shard<K, Shared<K, T>>);

impl<K, T> Unanswered<K, T> {
    /// The request has a response, or its service has failed.
    #[inline]
    pub(crate) fn answered(self) -> Permit<K, T> {
        let ticket = Permit(self.0);
        // It is the ticket now that lets the request out.
        mem::forget(self);
        ticket
    }

    /// The phase as this request sees it, and how many share its lane.
    #[inline]
    pub(crate) fn word(&self) -> Word {
        self.0.word()
    }

    /// What is behind the gate, if anybody owns it still.
    pub(crate) fn gate(&self) -> Option<Gate<K, T>> {
        self.0.common().owned().map(Gate)
    }
}

impl<K, T> Drop for Unanswered<K, T> {
    fn drop(&mut self) {
        self.0.release_unanswered();
    }
}

/// Proof of admission of a request that has a response. Dropping it lets the request out.
#[must_use = "dropping the ticket lets the request out at once"]
pub(crate) struct Permit<K: 'static, T: 'static>(&'static Shard<K, Shared<K, T>>);

impl<K, T> Permit<K, T> {
    /// The phase as this request sees it, and how many share its lane.
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

    /// Counts a piece of the response that goes to the server.
    pub(crate) fn piece(&self) -> Piece<K, T> {
        let shard = self.0;
        shard.common().pieces.fetch_add(1, Ordering::Relaxed);
        Piece(shard)
    }
}

/// A piece of a response that its server holds. Dropping it says that the server no longer does. It
/// does not keep the request in flight: other middleware may keep what a response consists of for as
/// long as it likes. `Relaxed`: a number that is looked at long after.
#[must_use = "dropping it says that the server has sent the piece"]
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

/// Permission to read the body of a refused request. Dropping it makes room for another.
#[must_use = "dropping it makes room for another"]
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
        let ticket = gate.admission().admit().unwrap().answered();
        let pieces = [(); 2].map(|()| ticket.piece());
        drop(ticket);
        assert_eq!(gate.pieces(), 2);
        assert_eq!(gate.word().count(), 0);
        drop(pieces);
        assert_eq!(gate.pieces(), 0);
    }

    #[test]
    fn a_door_leads_to_what_is_behind_it_as_long_as_anybody_owns_that() {
        let gate = gate();
        let admission = gate.admission();
        let request = admission.admit().unwrap();
        assert!(admission.gate().is_some() && request.gate().is_some());
        drop(gate);
        assert!(admission.gate().is_none() && request.gate().is_none());
    }

    #[test]
    fn what_is_marked_as_served_was_served() {
        let gate = gate();
        assert!(!gate.word().has_served());
        gate.mark_served();
        assert!(gate.word().has_served());
    }

    #[test]
    fn a_static_list_leads_to_all_that_a_door_points_at() {
        let gate = gate();
        let admission = gate.admission();
        assert!(is_kept(admission.0));
        assert!(admission.0.to_probe.is_some_and(is_kept));
        assert_eq!(gate.address(), admission.address());
        assert!(admission.to_probe().leads_to_probe() && !admission.leads_to_probe());
    }

    #[test]
    fn one_door_is_made_and_none_before_it_is_asked_for() {
        let gate = gate();
        let core = Arc::downgrade(&gate.0.core);
        drop(gate);
        assert!(core.upgrade().is_none(), "it is kept without a admission");
        let gate = self::gate();
        assert!(ptr::eq(gate.admission().0, gate.clone().admission().0));
        let core = Arc::downgrade(&gate.0.core);
        drop(gate);
        assert!(core.upgrade().is_some());
    }
}
