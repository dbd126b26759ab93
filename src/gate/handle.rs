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
    pub(crate) fn new(limit: Option<usize>, value: T) -> Self {
        Self(Arc::new(Shared {
            core: Core::new(limit),
            value,
        }))
    }

    /// Lets one request in.
    #[inline]
    pub(crate) fn admit(&self) -> Result<Ticket<T>, Refused> {
        self.0.core.admit()?;
        Ok(Ticket(self.clone()))
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

    pub(crate) fn advance(&self, phase: Phase) -> bool {
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
