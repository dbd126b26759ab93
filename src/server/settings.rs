//! The HTTP settings of a server of `serve`. Plain data, set once for each server.

use std::time::Duration;

use hyper_util::{rt::TokioTimer, server::conn::auto};

use crate::config::{plan::NEVER, policy::Policy};

#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) header_read_timeout: Duration,
    /// Whether an HTTP/1 client that has closed its writing side is answered.
    pub(super) half_close: bool,
    pub(super) versions: Versions,
    pub(super) keep_alive_interval: Duration,
    pub(super) keep_alive_timeout: Duration,
    pub(super) max_concurrent_streams: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Versions {
    All,
    Http1,
    Http2,
}

impl Settings {
    pub(super) fn new(policy: &Policy) -> Self {
        Self {
            header_read_timeout: policy.header_read_timeout,
            half_close: policy.half_close,
            versions: Versions::All,
            keep_alive_interval: Duration::MAX,
            // The default of hyper.
            keep_alive_timeout: Duration::from_secs(20),
            max_concurrent_streams: None,
        }
    }

    /// Passes the settings to hyper. The versions are not among them: hyper-util ignores its own setting
    /// for connections that may be upgraded, so `serve` checks the version itself.
    pub(super) fn apply<E>(&self, http: &mut auto::Builder<E>) {
        http.http1().half_close(self.half_close);
        let mut http2 = http.http2();
        // For WebSockets (RFC 8441).
        http2.enable_connect_protocol();
        if let Some(streams) = self.max_concurrent_streams {
            http2.max_concurrent_streams(streams);
        }
        // hyper adds both to the current time, and panics if the sum overflows.
        if !self.keep_alive_interval.is_zero() && self.keep_alive_interval < NEVER {
            http2
                .timer(TokioTimer::new())
                .keep_alive_interval(self.keep_alive_interval)
                .keep_alive_timeout(self.keep_alive_timeout.min(NEVER));
        }
    }
}

#[cfg(all(test, not(tower_graceful_loom)))]
mod tests {
    use super::*;
    use crate::Graceful;

    #[test]
    fn a_server_has_the_settings_of_the_builder() {
        let timeout = Duration::from_secs(7);
        let builder = Graceful::builder().header_read_timeout(timeout);
        let graceful = builder.half_close(true).build().unwrap();
        let settings = Settings::new(graceful.shared().policy());
        assert_eq!(settings.header_read_timeout, timeout);
        assert!(settings.half_close);
    }
}
