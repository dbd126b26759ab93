//! The timeout for request heads over HTTP/1.
//!
//! hyper starts its timer when it begins to wait for a head. That would close idle connections too, and
//! a load balancer that reuses one at that moment would lose a request. So hyper's timer never ends here.
//! It only tells when hyper begins to wait, and [`HeadTimeout`] runs from the first byte of the head.

use std::{
    pin::Pin,
    sync::LazyLock,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use hyper::rt::{Sleep, Timer};
use tokio::time;

use super::owner::{Owner, RareSleep};
use crate::connection::sniffer::Sniffer;

/// hyper's timer for the reading of a request head.
pub(super) struct HeadTimer(pub(super) Owner);

impl Timer for HeadTimer {
    fn sleep(&self, _: Duration) -> Pin<Box<dyn Sleep>> {
        self.0.0.sniffer.await_head();
        // Has no size, so this takes no memory.
        Box::pin(Never)
    }

    fn sleep_until(&self, _: Instant) -> Pin<Box<dyn Sleep>> {
        self.sleep(Duration::ZERO)
    }

    fn now(&self) -> Instant {
        /// hyper computes a deadline from it, which `sleep_until` ignores.
        static ANY: LazyLock<Instant> = LazyLock::new(Instant::now);
        *ANY
    }
}

struct Never;

impl Sleep for Never {}

impl Future for Never {
    type Output = ();

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        Poll::Pending
    }
}

/// The timer of the head that has begun, if one has. Boxed to keep connections small: few of them have a
/// head that is incomplete, and there may be very many.
#[derive(Default)]
pub(super) struct HeadTimeout(RareSleep);

impl HeadTimeout {
    /// Ready when the awaited head has begun and has not been completed within `timeout`. Called after
    /// each poll of the connection.
    #[inline]
    pub(super) fn poll(
        &mut self,
        sniffer: &Sniffer,
        timeout: Duration,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        if sniffer.head_has_begun() {
            return self.poll_begun(sniffer, timeout, cx);
        }
        self.0 = None;
        Poll::Pending
    }

    #[cold]
    fn poll_begun(
        &mut self,
        sniffer: &Sniffer,
        timeout: Duration,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        if sniffer.take_completed() {
            // The timer belongs to the head before.
            self.0 = None;
        }
        let sleep = (self.0).get_or_insert_with(|| Box::pin(time::sleep(timeout)));
        sleep.as_mut().poll(cx)
    }
}
