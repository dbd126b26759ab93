//! Shared ownership: the gate beside what it guards, and the ticket that lets one out when
//! dropped.

use std::{
    fmt,
    ops::Deref,
    sync::{Arc, Weak},
    task::{Context, Poll},
};

use super::{
    core::{Core, Refused},
    word::Word,
};
use crate::phase::Phase;

/// A gate and the `T` that everybody at the gate can read. Cloning shares both.
pub(crate) struct Gate<T>(Arc<Shared<T>>);

struct Shared<T> {
    core: Core,
    value: T,
}

impl<T> Gate<T> {
    /// `named`: every admission is to be a special one.
    pub(crate) fn new(limit: Option<usize>, named: bool, value: T) -> Self {
        Self(Arc::new(Shared {
            core: Core::new(limit, named),
            value,
        }))
    }

    /// Lets one request in, if there is nothing to it but to count.
    #[inline]
    pub(crate) fn admit(&self) -> Option<Ticket<T>> {
        self.0.core.admit().then(|| Ticket(self.clone()))
    }

    /// Lets one request in that [`admit`](Self::admit) did not, or says why not.
    pub(crate) fn admit_specially(&self) -> Result<Ticket<T>, Refused> {
        self.0.core.admit_specially()?;
        Ok(Ticket(self.clone()))
    }

    /// Notes a refusal. Not all who are not let in are refused.
    pub(crate) fn refused(&self) {
        self.0.core.refused();
    }

    /// How many were let in, and how many refused, after the first phase.
    pub(crate) fn since_serving(&self) -> (usize, usize) {
        self.0.core.since_serving()
    }

    /// The present phase, readiness and count.
    #[inline]
    pub(crate) fn word(&self) -> Word {
        self.0.core.word()
    }

    /// As [`word`](Self::word), ordered after all that the requests no longer in it have done.
    pub(crate) fn settled_word(&self) -> Word {
        self.0.core.settled_word()
    }

    /// Moves on to `phase`. Returns the word it moved on from, if it did.
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

    pub(crate) fn downgrade(&self) -> WeakGate<T> {
        WeakGate(Arc::downgrade(&self.0))
    }
}

impl<T> Clone for Gate<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Deref for Gate<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0.value
    }
}

impl<T> fmt::Debug for Gate<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.word().fmt(f)
    }
}

/// A gate that does not keep the shared state alive.
pub(crate) struct WeakGate<T>(Weak<Shared<T>>);

impl<T> WeakGate<T> {
    pub(crate) fn upgrade(&self) -> Option<Gate<T>> {
        self.0.upgrade().map(Gate)
    }
}

/// Proof of admission. Dropping it lets the request out.
#[must_use = "dropping the ticket lets the request out at once"]
pub(crate) struct Ticket<T>(Gate<T>);

impl<T> Ticket<T> {
    #[inline]
    pub(crate) fn gate(&self) -> &Gate<T> {
        &self.0
    }
}

impl<T> Drop for Ticket<T> {
    #[inline]
    fn drop(&mut self) {
        self.0.0.core.release();
    }
}

impl<T> fmt::Debug for Ticket<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Ticket").field(&self.0.word()).finish()
    }
}
