//! Waiting until the value of a watch channel reaches a point.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::sync::watch;

use super::shielded_wait::ShieldedWait;

/// The common part of futures that wait for a value that never decreases. It may be polled again
/// after it has returned `Ready`, and stays ready.
pub(crate) struct WatchUntil<T> {
    point: T,
    waiting: Option<Pin<Box<dyn Future<Output = ()> + Send + Sync>>>,
}

impl<T: Copy + Ord + Send + Sync + 'static> WatchUntil<T> {
    pub(crate) fn new(point: T) -> Self {
        Self {
            point,
            waiting: None,
        }
    }

    /// Waits on a receiver from `subscribe`, which is called when there is none yet. The sender
    /// must outlive the wait: if the sender is dropped, this returns `Ready`.
    pub(crate) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        subscribe: impl FnOnce() -> watch::Receiver<T>,
    ) -> Poll<()> {
        let waiting = match &mut self.waiting {
            Some(waiting) => waiting,
            none => {
                let point = self.point;
                let mut values = subscribe();
                if *values.borrow() >= point {
                    return Poll::Ready(());
                }
                none.insert(Box::pin(ShieldedWait::new(async move {
                    let _ = values.wait_for(|value| *value >= point).await;
                })))
            }
        };
        ready!(waiting.as_mut().poll(cx));
        self.waiting = None;
        Poll::Ready(())
    }
}
