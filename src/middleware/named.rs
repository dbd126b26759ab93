use http::Request;

use super::refusal::original_path;
use crate::{handle::graceful::Unanswered, shutdown::Shared};

/// A request on the roll of those in flight. Dropping it strikes it out.
pub(super) struct Named {
    shared: Shared,
    key: usize,
}

impl Named {
    /// Where requests are known by name, and while there is somebody who could ask.
    pub(super) fn new<B>(pass: &Unanswered, request: &Request<B>) -> Option<Self> {
        if !pass.word().is_named() {
            return None;
        }
        let shared = pass.gate()?;
        let path = original_path(request).unwrap_or(request.uri().path());
        let key = shared.request_table.enter(request.method().clone(), path);
        Some(Self { shared, key })
    }

    /// The head of its response is out.
    pub(super) fn streams(&self) {
        self.shared.request_table.streams(self.key);
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        self.shared.request_table.remove(self.key);
    }
}
