//! The gate: it owns the core with all shards, and the value behind it.

use std::{
    fmt,
    ops::Deref,
    ptr,
    sync::{Arc, OnceLock, Weak},
    task::{Context, Poll},
};

use super::{
    core::{Core, Refusals, SinceServing},
    word::Word,
};
use crate::{phase::Phase, sync::lock};

/// A gate, its rules `K`, and the value `T` behind it. Clones share all of it. `T` is dropped with
/// the last clone.
pub(crate) struct Gate<K: 'static, T: 'static>(pub(super) Arc<GateInner<K, T>>);

pub(super) struct GateInner<K: 'static, T: 'static> {
    pub(super) core: Arc<Core<K, GateInner<K, T>>>,
    /// Set by the first call of `Gate::admission`. From then on the core is kept until the
    /// process ends.
    pub(super) target: OnceLock<&'static Target<K, T>>,
    value: T,
}

/// What an `Admission` points at.
pub(super) struct Target<K: 'static, T: 'static> {
    pub(super) core: Arc<Core<K, GateInner<K, T>>>,
    /// The target for services that only lead to a probe. `None` on that target itself.
    pub(super) to_probe: Option<&'static Self>,
}

impl<K, T> Drop for GateInner<K, T> {
    fn drop(&mut self) {
        // The core holds a weak reference and may be kept until the process ends. Without this line
        // it would keep the memory of `GateInner` as well.
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
        let shared = Arc::new(GateInner {
            value: behind(&core.common().rules),
            target: OnceLock::new(),
            core: Arc::clone(&core),
        });
        *lock!(core.common().owned) = Arc::downgrade(&shared);
        Self(shared)
    }

    /// Drops this clone. Returns what all clones share, if it was the last one.
    pub(crate) fn into_last(self) -> Option<impl Sized> {
        Arc::into_inner(self.0)
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
pub(crate) struct WeakGate<K: 'static, T: 'static>(Weak<GateInner<K, T>>);

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
