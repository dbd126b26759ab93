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
        let mut exempt = shared.policy().exempt.iter();
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

#[cfg(all(test, feature = "axum", feature = "signal", not(tower_graceful_loom)))]
mod tests {
    use super::*;
    use crate::{Graceful, Warning, admission::Refused, sync::lock};

    /// A service with one server. A request has reached its layer.
    fn service() -> Graceful {
        let graceful = Graceful::builder().exempt("/health").build().unwrap();
        graceful.shared().connections.listener_opened(false);
        admit(graceful.shared());
        graceful
    }

    fn open(shared: &Shared, method: &Method, path: &str) -> Option<Window> {
        Window::open(shared, method, path, None, true)
    }

    fn admit(shared: &Shared) {
        drop(shared.admission().admit().unwrap());
    }

    fn probe(shared: &Shared) {
        shared.outside.count_probe();
    }

    /// The gate refuses requests shard by shard, and the shard that has its phase comes last. So this may
    /// be counted although the phase is still the one before draining.
    fn refuse_draining(shared: &Shared) {
        shared.admission().refused(Refused::Draining);
    }

    fn refuse_full(shared: &Shared) {
        shared.admission().refused(Refused::Full);
    }

    /// The paths of requests that were reported as outside the layer.
    fn reported(shared: &Shared) -> Vec<String> {
        let warnings = lock!(shared.warnings);
        let paths = warnings.iter().map(|warning| match warning {
            Warning::RequestOutsideLayer(request) => request.path.clone(),
            other => panic!("{other}"),
        });
        paths.collect()
    }

    #[test]
    fn a_request_that_succeeds_and_was_not_admitted_is_reported() {
        for (status, expected) in [
            (200, &["/late"][..]),
            (204, &["/late"]),
            (101, &["/late"]),
            (100, &[]),
            (302, &[]),
            (404, &[]),
            (503, &[]),
        ] {
            let graceful = service();
            let window = open(graceful.shared(), &Method::GET, "/late").unwrap();
            window.answered(graceful.shared(), StatusCode::from_u16(status).unwrap());
            assert_eq!(reported(graceful.shared()), expected, "{status}");
        }
    }

    #[test]
    fn a_request_that_the_lifecycle_may_have_answered_is_not_reported() {
        let answers: [&[fn(&Shared)]; 6] = [
            &[admit],
            &[probe],
            &[refuse_draining],
            &[refuse_full],
            &[probe, refuse_draining],
            &[refuse_draining, refuse_full],
        ];
        for (case, answers) in answers.into_iter().enumerate() {
            let graceful = service();
            let window = open(graceful.shared(), &Method::GET, "/").unwrap();
            for answer in answers {
                answer(graceful.shared());
            }
            window.answered(graceful.shared(), StatusCode::OK);
            assert_eq!(reported(graceful.shared()), [""; 0], "{case}");
        }
    }

    #[test]
    fn a_response_that_goes_out_while_draining_proves_nothing() {
        for (phase, expected) in [
            (Phase::LameDuck, &["/"][..]),
            (Phase::Draining, &[]),
            (Phase::Closing, &[]),
        ] {
            let graceful = service();
            let window = open(graceful.shared(), &Method::GET, "/").unwrap();
            graceful.shared().advance(phase);
            window.answered(graceful.shared(), StatusCode::OK);
            assert_eq!(reported(graceful.shared()), expected, "{phase}");
        }
    }

    #[test]
    fn no_window_is_opened_for_a_request_that_the_layer_need_not_see() {
        let graceful = service();
        let shared = graceful.shared();
        for (method, path) in [
            (Method::OPTIONS, "/"),
            (Method::CONNECT, "/"),
            (Method::TRACE, "/"),
            (Method::GET, "/health"),
            // A router inside `nest` exempts `/health`.
            (Method::GET, "/api/health"),
            (Method::POST, "/grpc.health.v1.Health/Check"),
        ] {
            assert!(open(shared, &method, path).is_none(), "{method} {path}");
        }
        assert!(open(shared, &Method::POST, "/healthy").is_some());

        for (phase, opens) in [
            (Phase::LameDuck, true),
            (Phase::Draining, false),
            (Phase::Closing, false),
        ] {
            let graceful = service();
            graceful.shared().advance(phase);
            let window = open(graceful.shared(), &Method::GET, "/");
            assert_eq!(window.is_some(), opens, "{phase}");
        }
    }

    #[test]
    fn a_window_that_is_closed_without_a_response_reports_nothing_and_makes_room() {
        let graceful = service();
        let shared = graceful.shared();
        let window = open(shared, &Method::GET, "/").unwrap();
        assert!(open(shared, &Method::GET, "/").is_none());
        window.close(shared);
        shared.warn_of_outside();
        assert_eq!(reported(shared), [""; 0]);
        let next = open(shared, &Method::GET, "/next").unwrap();
        next.answered(shared, StatusCode::OK);
        assert_eq!(reported(shared), ["/next"]);
    }
}
