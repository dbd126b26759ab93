//! The table of requests in flight, for services that set
//! [`name_requests`](crate::GracefulBuilder::name_requests).

use std::{
    cmp::Reverse,
    fmt,
    sync::{Mutex, MutexGuard},
};

use http::Method;
use slab::Slab;
use tokio::time::Instant;

use super::CutRequest;
use crate::sync::lock;

#[derive(Default)]
pub(crate) struct RequestTable(Mutex<Slab<Entry>>);

struct Entry {
    method: Method,
    path: Box<str>,
    begun: Instant,
    streaming: bool,
}

impl RequestTable {
    fn entries(&self) -> MutexGuard<'_, Slab<Entry>> {
        lock!(self.0)
    }

    /// Adds a request. The returned key is for the other methods.
    pub(crate) fn enter(&self, method: Method, path: &str) -> usize {
        let entry = Entry {
            method,
            path: path.into(),
            begun: Instant::now(),
            streaming: false,
        };
        self.entries().insert(entry)
    }

    /// Records that the head of the response has been passed to the server.
    pub(crate) fn streams(&self, key: usize) {
        if let Some(entry) = self.entries().get_mut(key) {
            entry.streaming = true;
        }
    }

    pub(crate) fn remove(&self, key: usize) {
        let removed = self.entries().try_remove(key);
        drop(removed);
    }

    /// The requests in flight, oldest first.
    pub(crate) fn list(&self, now: Instant) -> Vec<CutRequest> {
        let mut list: Vec<_> = {
            let entries = self.entries();
            let entries = entries.iter().map(|(_, entry)| entry.describe(now));
            entries.collect()
        };
        list.sort_by_key(|request| Reverse(request.age));
        list
    }
}

impl Entry {
    fn describe(&self, now: Instant) -> CutRequest {
        CutRequest {
            method: self.method.clone(),
            path: self.path.to_string(),
            age: now.saturating_duration_since(self.begun),
            streaming: self.streaming,
        }
    }
}

impl fmt::Debug for RequestTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestTable")
            .field("entries", &self.entries().len())
            .finish()
    }
}
