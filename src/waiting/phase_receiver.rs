//! Following the phase.

use std::{
    fmt,
    future::poll_fn,
    pin::pin,
    sync::Arc,
    task::{Context, Wake, Waker},
};

use tokio::sync::watch;

use crate::{background::shielded, phase::Phase};

/// Follows the phase of a service. Made by [`Graceful::subscribe`](crate::Graceful::subscribe).
///
/// It copies the phase out, so nothing that is done with it delays the service. It does not keep the
/// lifecycle alive. A clone follows from where this one is.
#[derive(Clone)]
pub struct PhaseReceiver(watch::Receiver<Phase>);

impl PhaseReceiver {
    pub(crate) fn new(phases: watch::Receiver<Phase>) -> Self {
        Self(phases)
    }

    /// The present phase. [`changed`](Self::changed) still returns it, if it has not yet.
    #[must_use]
    pub fn phase(&self) -> Phase {
        *self.0.borrow()
    }

    /// Waits until the phase is another than this returned last, or than it was when this was made,
    /// and returns it. A receiver that looks rarely sees the latest phase, not each one. `None` when the
    /// lifecycle is gone: every handle, layer and future of it.
    ///
    /// Cancel safe: a future that is dropped has missed nothing.
    pub async fn changed(&mut self) -> Option<Phase> {
        {
            let mut changed = pin!(self.0.changed());
            poll_fn(|cx| {
                let waker = shielded_waker(cx);
                changed.as_mut().poll(&mut Context::from_waker(&waker))
            })
            .await
            .ok()?;
        }
        Some(*self.0.borrow_and_update())
    }

    /// Waits until `phase` or a later one has been reached. False if the lifecycle is gone before that.
    pub async fn reached(&mut self, phase: Phase) -> bool {
        while *self.0.borrow_and_update() < phase {
            if self.changed().await.is_none() {
                return false;
            }
        }
        true
    }

    /// Whether the lifecycle is gone: the phase will not change any more.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.has_changed().is_err()
    }
}

impl fmt::Debug for PhaseReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PhaseReceiver")
            .field("phase", &self.phase())
            .field("closed", &self.is_closed())
            .finish()
    }
}

/// A waker whose panic takes nothing with it, and whose clones run no code that is not ours: for
/// channels that wake several.
pub(crate) fn shielded_waker(cx: &Context<'_>) -> Waker {
    struct Shielded(Waker);

    impl Wake for Shielded {
        fn wake(self: Arc<Self>) {
            self.wake_by_ref();
        }

        fn wake_by_ref(self: &Arc<Self>) {
            shielded(|| self.0.wake_by_ref());
        }
    }

    Waker::from(Arc::new(Shielded(cx.waker().clone())))
}
