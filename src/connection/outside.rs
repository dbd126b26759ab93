//! Detection of requests that the layer does not see. The cause is a `.layer(…)` that is missing or
//! belongs to another lifecycle, or a route that was added after it.
//!
//! The layer counts nothing for this. Each admission sets a flag in the word of its shard, in the
//! same compare-and-swap. A *window* clears the flags when a request arrives on a connection, and
//! reads them when the response goes out. If no flag is set, no request of the lifecycle was
//! admitted in between, so this request was not admitted either.
//!
//! 1. Only one window is open at a time, behind a lock, so no other window clears a flag that this
//!    one needs. A window that has been open for too long, or in which a flag was set, may be
//!    replaced; then it has no result.
//! 2. The request is admitted after its window has opened and before its response exists, in that
//!    order, whatever tasks and threads it passes through. So its admission comes after the
//!    clearing in the modification order of the word, and the final read sees the flag. `Relaxed`
//!    is enough for that.
//! 3. Other requests set flags too. Then the window has no result, and a later one may have one.
//!
//! A window is opened for a few requests of a connection and not for every connection
//! ([`WATCHED`](crate::connection::flags::WATCHED)). No request waits for a window.
//!
//! # Requests that are not reported
//!
//! - Responses of a [`Probe`](crate::Probe) of the lifecycle, exempt paths, gRPC health checks, and
//!   `OPTIONS`.
//! - Responses other than 2xx and 101: by default axum answers paths without a route outside the
//!   layer, and middleware around the layer may redirect or reject.
//! - gRPC calls that fail.
//! - All requests, if the lifecycle has more than one server: one of them may serve metrics,
//!   without the layer on purpose.
//! - On a server other than [`serve`](crate::Graceful::serve): everything but HTTP/1 without TLS,
//!   because there only the bytes of the connection are known.

use std::{num::NonZeroU32, sync::Mutex, time::Duration};

use tokio::time::Instant;

use crate::{
    report::{OutsideLayer, Warning},
    sync::{AtomicUsize, Ordering::Relaxed, lock},
};

/// How long an open window prevents others from being opened.
const OPEN: Duration = Duration::from_secs(1);

/// What is known about requests outside the layer.
#[derive(Default)]
pub(crate) struct Outside {
    /// The number of requests that probes have answered.
    probed: AtomicUsize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The number of the window that was opened last.
    window: u32,
    /// That window, while it is open.
    open: Option<Open>,
    /// The first request that was answered outside the layer.
    request: Option<OutsideLayer>,
    /// Whether it was answered by a server of `serve`.
    served: bool,
    warned: bool,
}

struct Open {
    since: Instant,
    request: OutsideLayer,
    served: bool,
    unadmitted_answers: usize,
}

/// The servers of a lifecycle so far.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Servers {
    /// Servers passed to `run` or `serve`.
    pub(crate) run: usize,
    /// Drain futures.
    pub(crate) drains: usize,
    pub(crate) listeners: usize,
    /// Whether there are connections that the user has accepted and passed to `track`.
    pub(crate) tracks: bool,
}

impl Servers {
    /// Whether there is a single server, as far as is known. `served`: it is a server of `serve`.
    fn is_one(self, served: bool) -> bool {
        let listeners = self.listeners + usize::from(self.tracks);
        listeners == 1 && self.run <= 1 && self.drains <= usize::from(!served)
    }
}

impl Outside {
    /// Records that a probe answers a request, so that the request is not reported as missed by the
    /// layer.
    pub(crate) fn count_probe(&self) {
        self.probed.fetch_add(1, Relaxed);
    }

    /// The number of requests that probes have answered.
    pub(crate) fn probe_count(&self) -> usize {
        self.probed.load(Relaxed)
    }

    /// Opens a window, unless another one is open that may have a result. `unadmitted_answers`: how many
    /// requests were answered without an admission. `served`: the server is one of `serve`.
    pub(crate) fn open(
        &self,
        request: impl FnOnce() -> OutsideLayer,
        unadmitted_answers: usize,
        served: bool,
        has_admitted: impl FnOnce() -> bool,
        clear_admitted: impl FnOnce(),
    ) -> Option<Window> {
        let now = Instant::now();
        let mut state = lock!(self.state);
        let open = state.open.as_ref();
        let open = open.is_some_and(|open| now.saturating_duration_since(open.since) < OPEN);
        // A window in which another request was admitted has no result, and is replaced.
        if state.warned || open && !has_admitted() {
            return None;
        }
        state.window = state.window.wrapping_add(1).max(1);
        clear_admitted();
        state.open = Some(Open {
            since: now,
            request: request(),
            served,
            unadmitted_answers,
        });
        NonZeroU32::new(state.window).map(Window)
    }

    /// Closes a window. `is_unseen` says, from the unadmitted answers at its start, whether the layer has
    /// not seen the request.
    pub(crate) fn close(&self, window: Window, is_unseen: impl FnOnce(usize) -> bool) {
        let mut state = lock!(self.state);
        if state.window != window.0.get() {
            return;
        }
        let Some(open) = state.open.take() else {
            return;
        };
        if state.request.is_none() && is_unseen(open.unadmitted_answers) {
            state.request = Some(open.request);
            state.served = open.served;
        }
    }

    /// The warning that is due, at most once. `certain`: later requests cannot change it.
    pub(crate) fn warning(
        &self,
        admitted: bool,
        servers: Servers,
        certain: bool,
    ) -> Option<Warning> {
        let mut state = lock!(self.state);
        if state.warned || !servers.is_one(state.served) {
            return None;
        }
        let request = state.request.as_ref()?;
        let warning = if !admitted {
            certain.then(|| Warning::NoRequestInLayer(request.clone()))?
        } else if !servers.tracks {
            Warning::RequestOutsideLayer(request.clone())
        } else {
            // Connections passed to `track` may belong to several servers.
            return None;
        };
        state.warned = true;
        Some(warning)
    }
}

/// A check whether the layer sees a request. Only a number, because one is kept with each watched
/// request; the details are in [`Outside`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window(NonZeroU32);

#[cfg(all(test, not(tower_graceful_loom)))]
mod tests {
    use http::Method;
    use tokio::time::advance;

    use super::*;

    #[test]
    fn a_lifecycle_has_one_server_if_no_other_may_have_answered() {
        let one = Servers {
            run: 1,
            drains: 0,
            listeners: 1,
            tracks: false,
        };
        for (servers, served, is_one) in [
            (one, true, true),
            (Servers { run: 2, ..one }, true, false),
            (Servers { drains: 1, ..one }, true, false),
            (Servers { drains: 1, ..one }, false, true),
            (Servers { drains: 2, ..one }, false, false),
            (
                Servers {
                    listeners: 0,
                    ..one
                },
                true,
                false,
            ),
            (
                Servers {
                    listeners: 2,
                    ..one
                },
                true,
                false,
            ),
            (
                Servers {
                    tracks: true,
                    ..one
                },
                true,
                false,
            ),
        ] {
            assert_eq!(servers.is_one(served), is_one, "{servers:?} {served}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_open_window_keeps_others_from_being_opened_for_a_second() {
        let outside = Outside::default();
        let open = || {
            let request = || OutsideLayer {
                method: Method::GET,
                path: "/".to_owned(),
                peer: None,
            };
            outside.open(request, 0, true, || false, || ()).is_some()
        };
        assert!(open());
        advance(OPEN.saturating_sub(Duration::from_millis(1))).await;
        assert!(!open());
        advance(Duration::from_millis(1)).await;
        assert!(open());
    }
}
