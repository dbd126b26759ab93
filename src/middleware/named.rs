use http::Request;

use super::refusal::original_path;
use crate::handle::Graceful;

/// A request on the roll of those in flight. Dropping it strikes it out.
pub(super) struct Named {
    graceful: Graceful,
    key: usize,
}

impl Named {
    pub(super) fn new<B>(graceful: &Graceful, request: &Request<B>) -> Self {
        let path = original_path(request).unwrap_or(request.uri().path());
        let key = graceful.shared().roll.enter(request.method().clone(), path);
        Self {
            graceful: graceful.clone(),
            key,
        }
    }

    /// The head of its response is out.
    pub(super) fn streams(&self) {
        self.graceful.shared().roll.streams(self.key);
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        self.graceful.shared().roll.strike_out(self.key);
    }
}
