//! The HTTP settings of a server of `serve`. Plain data, set once for each server.

use std::time::Duration;

use hyper_util::{rt::TokioTimer, server::conn::auto};

use crate::config::policy::Policy;

/// About 30 years. On every system this can be added to the current time without an overflow.
const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);

#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) header_read_timeout: Duration,
    /// Whether an HTTP/1 client that has closed its writing side is answered.
    pub(super) half_close: bool,
    versions: Versions,
    keep_alive_interval: Duration,
    keep_alive_timeout: Duration,
    max_concurrent_streams: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Versions {
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

    pub(super) fn set_http1_only(&mut self) {
        self.versions = Versions::Http1;
    }

    pub(super) fn set_http2_only(&mut self) {
        self.versions = Versions::Http2;
    }

    pub(super) fn set_keep_alive_interval(&mut self, interval: Duration) {
        self.keep_alive_interval = interval;
    }

    pub(super) fn set_keep_alive_timeout(&mut self, timeout: Duration) {
        self.keep_alive_timeout = timeout;
    }

    pub(super) fn set_max_concurrent_streams(&mut self, streams: u32) {
        self.max_concurrent_streams = Some(streams.max(1));
    }

    pub(super) fn http1_only(&self) -> bool {
        self.versions == Versions::Http1
    }

    pub(super) fn http2_only(&self) -> bool {
        self.versions == Versions::Http2
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
        if !self.keep_alive_interval.is_zero() && self.keep_alive_interval < FAR {
            http2
                .timer(TokioTimer::new())
                .keep_alive_interval(self.keep_alive_interval)
                .keep_alive_timeout(self.keep_alive_timeout.min(FAR));
        }
    }
}
