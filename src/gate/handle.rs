//! Who holds what: the owners of a gate, the doors in it, and the ticket that lets one out when
//! dropped.

use std::{
    fmt,
    ops::Deref,
    sync::{Arc, Weak},
    task::{Context, Poll},
};

use super::{
    core::Core,
    lane::{Lane, Refused},
    word::Word,
};
use crate::{phase::Phase, sync::lock};

/// A gate, the rules `K` that stay for ever, and the `T` behind it. Cloning shares all of it, and
/// `T` lives as long as one of the clones does.
pub(crate) struct Gate<K: 'static, T: 'static>(Arc<Shared<K, T>>);

struct Shared<K: 'static, T: 'static> {
    core: &'static Core<K, Shared<K, T>>,
    value: T,
}

impl<K, T> Drop for Shared<K, T> {
    fn drop(&mut self) {
        // The rest of its memory goes with the last weak reference.
        *lock!(self.core.hall().owned) = Weak::new();
    }
}

impl<K, T> Gate<K, T> {
    /// `named`: every admission is to be a special one.
    ///
    /// The lanes are never given back, two kilobytes in all: requests point at them without being
    /// counted twice. See "Who owns what" in the module header.
    pub(crate) fn new(
        limit: Option<usize>,
        named: bool,
        rules: K,
        behind: impl FnOnce(&'static K) -> T,
    ) -> Self {
        let core = Box::leak(Box::new(Core::new(limit, named, rules)));
        let value = behind(&core.hall().rules);
        let shared = Arc::new(Shared { core, value });
        *lock!(core.hall().owned) = Arc::downgrade(&shared);
        Self(shared)
    }

    pub(crate) fn door(&self) -> Door<K, T> {
        Door(self.0.core)
    }

    /// How many were let in, and how many refused, after the first phase.
    pub(crate) fn since_serving(&self) -> (usize, usize) {
        self.0.core.since_serving()
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

/// Where requests come in. It owns nothing, so to clone it is to copy a pointer.
pub(crate) struct Door<K: 'static, T: 'static>(&'static Core<K, Shared<K, T>>);

impl<K, T> Door<K, T> {
    /// Lets one request in, if there is nothing to it but to count.
    #[inline]
    pub(crate) fn admit(self) -> Option<Ticket<K, T>> {
        let lane = self.0.lane();
        lane.admit().then(|| Ticket(lane))
    }

    /// Lets one request in that [`admit`](Self::admit) did not, or says why not.
    pub(crate) fn admit_specially(self) -> Result<Ticket<K, T>, Refused> {
        let lane = self.0.lane();
        lane.admit_specially()?;
        Ok(Ticket(lane))
    }

    /// Notes a refusal. Not all who are not let in are refused.
    pub(crate) fn refused(self, refused: Refused) {
        self.0.refused(refused);
    }

    /// What holds at this gate for ever.
    pub(crate) fn rules(self) -> &'static K {
        &self.0.hall().rules
    }

    pub(crate) fn word(self) -> Word {
        self.0.word()
    }

    pub(crate) fn phase(self) -> Phase {
        self.0.phase()
    }

    /// What is behind the door, if anybody owns it still.
    pub(crate) fn gate(self) -> Option<Gate<K, T>> {
        self.0.hall().owned().map(Gate)
    }
}

impl<K, T> Clone for Door<K, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<K, T> Copy for Door<K, T> {}

/// Proof of admission. Dropping it lets the request out.
#[must_use = "dropping the ticket lets the request out at once"]
pub(crate) struct Ticket<K: 'static, T: 'static>(&'static Lane<K, Shared<K, T>>);

impl<K, T> Ticket<K, T> {
    /// The phase as this request sees it, and how many share its lane.
    #[inline]
    pub(crate) fn word(&self) -> Word {
        self.0.word()
    }

    /// What is behind the gate, if anybody owns it still.
    pub(crate) fn gate(&self) -> Option<Gate<K, T>> {
        self.0.hall().owned().map(Gate)
    }
}

impl<K, T> Drop for Ticket<K, T> {
    #[inline]
    fn drop(&mut self) {
        self.0.release();
    }
}

impl<K, T> fmt::Debug for Ticket<K, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Ticket").field(&self.word()).finish()
    }
}
