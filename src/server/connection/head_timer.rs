//! The timeout for request heads over HTTP/1.

use std::{
    pin::Pin,
    sync::{Arc, LazyLock},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use hyper::rt::{Sleep, Timer};

use super::owner::{Owner, RareSleep};
use crate::{connection::sniffer::Awaited, server::settings::Settings};

/// The timer for the reading of a request head over HTTP/1.
///
/// hyper starts the timer when it begins to wait for a head. That would close idle connections too, and
/// a load balancer that reuses one at that moment would lose a request. So this timer runs only from the
/// first byte of the head.
pub(super) struct HeadTimer {
    pub(super) owner: Owner,
    pub(super) settings: Arc<Settings>,
}

impl Timer for HeadTimer {
    fn sleep(&self, _: Duration) -> Pin<Box<dyn Sleep>> {
        Box::pin(HeadTimeout {
            head: self.owner.0.sniffer.await_head(),
            owner: self.owner.clone(),
            settings: Arc::clone(&self.settings),
            sleep: None,
        })
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

struct HeadTimeout {
    head: Awaited,
    owner: Owner,
    settings: Arc<Settings>,
    sleep: RareSleep,
}

impl Sleep for HeadTimeout {}

impl Future for HeadTimeout {
    type Output = ();

    /// hyper polls this after each read that leaves the head incomplete.
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        this.owner
            .poll_head(this.head, &this.settings, &mut this.sleep, cx)
    }
}
