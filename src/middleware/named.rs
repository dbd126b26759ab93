//! The entry of a named request in the request table.

use http::Request;

use super::refusal::original_path;
use crate::{handle::graceful::Unanswered, shutdown::Shared};

/// The entry of a request in the request table. Dropping it removes the entry.
pub(super) struct Named {
    shared: Shared,
    key: usize,
}

impl Named {
    /// Makes an entry if the lifecycle names its requests (`name_requests`) and still has an owner,
    /// which could list them.
    pub(super) fn new<B>(permit: &Unanswered, request: &Request<B>) -> Option<Self> {
        if !permit.word().is_named() {
            return None;
        }
        let shared = permit.owner()?;
        let path = original_path(request).unwrap_or(request.uri().path());
        let key = shared.request_table.enter(request.method().clone(), path);
        Some(Self { shared, key })
    }

    /// Records that the head of the response has been passed to the server.
    pub(super) fn streams(&self) {
        self.shared.request_table.streams(self.key);
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        self.shared.request_table.remove(self.key);
    }
}
