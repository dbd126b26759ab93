//! How a service answers while it stops. Plain data, fixed once the service is built.

use std::time::Duration;

use http::StatusCode;

use crate::rejection::RejectionFn;

/// The paths of the probes' router.
pub(crate) const LIVEZ: &str = "/livez";
pub(crate) const READYZ: &str = "/readyz";

/// Whether `path`, a route or a request's path, is one of the probes', wherever their router is
/// nested.
pub(crate) fn is_probe(path: &str) -> bool {
    path.ends_with(LIVEZ) || path.ends_with(READYZ)
}

#[derive(Clone, Debug)]
pub(crate) struct Policy {
    pub(crate) keep_listening: bool,
    pub(crate) retry_after: Duration,
    pub(crate) unready_status: StatusCode,
    pub(crate) exempt: Vec<String>,
    pub(crate) rejection: Option<RejectionFn>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            keep_listening: true,
            retry_after: Duration::from_secs(1),
            unready_status: StatusCode::SERVICE_UNAVAILABLE,
            exempt: Vec::new(),
            rejection: None,
        }
    }
}
