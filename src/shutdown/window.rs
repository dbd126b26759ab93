//! Windows in which requests outside the layer are detected: `connection::outside` has the argument.

use std::net::SocketAddr;

use http::{Method, StatusCode};

use super::Shared;
use crate::{connection::outside::Window, phase::Phase, report::OutsideLayer};

/// The health checks of gRPC. They belong outside the layer, because they are answered until the end.
const GRPC_HEALTH: &str = "/grpc.health.v1.Health/";

impl Window {
    /// Opens a window for a request that has arrived. Returns `None` if the layer need not see this
    /// request, or if another window is open. `served`: on a server of `serve`.
    #[cold]
    pub(crate) fn open(
        shared: &Shared,
        method: &Method,
        path: &str,
        peer: Option<SocketAddr>,
        served: bool,
    ) -> Option<Self> {
        let others = [Method::OPTIONS, Method::CONNECT, Method::TRACE];
        // Compares the end of the path: a router inside `nest` sees, and exempts, the path without
        // the prefix.
        let mut exempt = shared.policy.exempt.iter();
        if shared.phase() >= Phase::Draining
            || others.contains(method)
            || path.starts_with(GRPC_HEALTH)
            || exempt.any(|exempt| path.ends_with(&**exempt))
        {
            return None;
        }
        let request = || OutsideLayer {
            method: method.clone(),
            path: path.to_owned(),
            peer,
        };
        let has_admitted = || shared.has_admitted();
        let clear_admitted = || shared.clear_admitted();
        (shared.outside).open(
            request,
            unadmitted_answers(shared),
            served,
            has_admitted,
            clear_admitted,
        )
    }

    /// Closes the window when the response goes out, and records the result.
    #[cold]
    pub(crate) fn answered(self, shared: &Shared, status: StatusCode) {
        let succeeds = status.is_success() || status == StatusCode::SWITCHING_PROTOCOLS;
        shared.outside.close(self, |before| {
            succeeds
                && !shared.has_admitted()
                && before == unadmitted_answers(shared)
                && shared.phase() < Phase::Draining
        });
        shared.warn_of_outside();
    }

    /// Closes the window of a request without a response, or with one that proves nothing.
    #[cold]
    pub(crate) fn close(self, shared: &Shared) {
        shared.outside.close(self, |_| false);
    }
}

/// The number of requests that were answered without an admission: by probes, or with a refusal by
/// the layer.
fn unadmitted_answers(shared: &Shared) -> usize {
    let refusals = shared.refusals();
    shared.outside.probe_count() + refusals.draining + refusals.full
}
