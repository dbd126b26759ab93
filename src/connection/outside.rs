//! Requests that the layer does not see: a `.layer(…)` that is missing, or of another lifecycle, and
//! routes that were added after it.
//!
//! The layer counts nothing for this. Each admission sets a flag in the word of its lane, in the same
//! compare-and-swap. A *window* clears the flags when a request arrives on a connection, and looks at
//! them when its response goes out. If no flag is set, no request of the lifecycle was admitted in
//! between, and so this one was not.
//!
//! 1. One window is open at a time, behind a lock, so no other window clears a flag that this one
//!    waits for. A window that is open for long, or in which a flag was set, is replaced, and then says
//!    nothing.
//! 2. The request is admitted after its window has opened and before its response is there, in that
//!    order, whatever tasks and threads it passes through. So the admission comes after the clearing in
//!    the order of the word's changes, and the look at the end sees it. `Relaxed` is enough for that.
//! 3. Other requests set flags too. Then the window says nothing, and a later one may.
//!
//! A window is opened for a few requests of a connection, and not for every connection
//! ([`WATCHED`](crate::connection::table::WATCHED)). No request waits for one.
//!
//! # What is not taken for a mistake
//!
//! - What a [`Probe`](crate::Probe) of the lifecycle answers, exempt paths, and `OPTIONS`.
//! - Responses other than 2xx and 101: by default axum answers paths without a route outside the layer,
//!   and middleware around it may redirect or refuse.
//! - Calls of gRPC that fail.
//! - What more than one server answers: one of them may be there for metrics, without the layer on
//!   purpose.
//! - On a server that is not ours, whatever is not HTTP/1 in the clear. There the reads and writes of the
//!   connection are all that is known.

use std::{net::SocketAddr, num::NonZeroU32, sync::Mutex, time::Duration};

use http::{Method, StatusCode};
use tokio::time::Instant;

use crate::{
    phase::Phase,
    report::{OutsideLayer, Warning},
    shutdown::Shared,
    sync::{AtomicUsize, Ordering::Relaxed, lock},
};

/// How long a window keeps others from being opened.
const OPEN: Duration = Duration::from_secs(1);

/// What is known of the requests outside the layer.
#[derive(Default)]
pub(crate) struct Outside {
    /// What probes have answered.
    probed: AtomicUsize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Which window was opened last.
    window: u32,
    /// It, while it is open.
    open: Option<Open>,
    /// The first request that was answered outside the layer.
    request: Option<OutsideLayer>,
    /// A server of ours has answered it.
    served: bool,
    warned: bool,
}

struct Open {
    since: Instant,
    request: OutsideLayer,
    served: bool,
    noise: usize,
}

/// The servers of a lifecycle so far.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Servers {
    /// Given to `run` or `serve`.
    pub(crate) run: usize,
    /// Drain futures.
    pub(crate) drains: usize,
    pub(crate) listeners: usize,
    /// There are connections that a user has accepted.
    pub(crate) tracks: bool,
}

impl Servers {
    /// As far as is known there is one server, which is ours or not.
    fn is_one(self, served: bool) -> bool {
        let listeners = self.listeners + usize::from(self.tracks);
        listeners == 1 && self.run <= 1 && self.drains <= usize::from(!served)
    }
}

impl Outside {
    /// Notes that a probe answers, so that nobody wonders why the layer does not see it.
    pub(crate) fn probed(&self) {
        self.probed.fetch_add(1, Relaxed);
    }

    /// The warning that is due, once. `certain`: more requests will not change it.
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
            // Connections that a user accepts may be of several servers.
            return None;
        };
        state.warned = true;
        Some(warning)
    }
}

/// A look at whether the layer sees a request. What belongs to it is with the lifecycle, because it is
/// kept with each request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window(NonZeroU32);

impl Window {
    /// Opens a window for a request that has arrived, unless it is one that the layer need not see, or
    /// another window is open. `served`: on a server of ours.
    #[cold]
    pub(crate) fn open(
        shared: &Shared,
        method: &Method,
        path: &str,
        peer: Option<SocketAddr>,
        served: bool,
    ) -> Option<Self> {
        let others = [Method::OPTIONS, Method::CONNECT, Method::TRACE];
        // The prefix of a `nest` may not be part of what is exempt.
        let mut exempt = shared.policy.exempt.iter();
        if shared.phase() >= Phase::Draining
            || others.contains(method)
            || exempt.any(|exempt| path.ends_with(&**exempt))
        {
            return None;
        }
        let now = Instant::now();
        let mut state = lock!(shared.outside.state);
        let open = state.open.as_ref();
        let open = open.is_some_and(|open| now.saturating_duration_since(open.since) < OPEN);
        // One in which another request was admitted says nothing any more.
        if state.warned || open && !shared.has_admitted() {
            return None;
        }
        state.window = state.window.wrapping_add(1).max(1);
        shared.clear_admitted();
        state.open = Some(Open {
            since: now,
            request: OutsideLayer {
                method: method.clone(),
                path: path.to_owned(),
                peer,
            },
            served,
            noise: noise(shared),
        });
        NonZeroU32::new(state.window).map(Self)
    }

    /// Closes the window, and notes what it shows when the response goes out.
    #[cold]
    pub(crate) fn answered(self, shared: &Shared, status: StatusCode) {
        let succeeds = status.is_success() || status == StatusCode::SWITCHING_PROTOCOLS;
        {
            let mut state = lock!(shared.outside.state);
            let Some(open) = self.take(&mut state) else {
                return;
            };
            if succeeds
                && state.request.is_none()
                && !shared.has_admitted()
                && open.noise == noise(shared)
                && shared.phase() < Phase::Draining
            {
                state.request = Some(open.request);
                state.served = open.served;
            }
        }
        shared.warn_of_outside();
    }

    /// Closes the window of a request that has no response, or none that says anything.
    #[cold]
    pub(crate) fn close(self, shared: &Shared) {
        let closed = self.take(&mut lock!(shared.outside.state));
        drop(closed);
    }

    /// What belongs to it, unless it was replaced.
    fn take(self, state: &mut State) -> Option<Open> {
        (state.window == self.0.get()).then(|| state.open.take())?
    }
}

/// How much has happened that leaves no flag.
fn noise(shared: &Shared) -> usize {
    let refusals = shared.refusals();
    shared.outside.probed.load(Relaxed) + refusals.draining + refusals.full
}
