//! The table of requests in flight, for services that set
//! [`name_requests`](crate::GracefulBuilder::name_requests).

use std::{cmp::Reverse, sync::Mutex};

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
    /// Adds a request. The returned key is for the other methods.
    pub(crate) fn enter(&self, method: Method, path: &str) -> usize {
        let entry = Entry {
            method,
            path: path.into(),
            begun: Instant::now(),
            streaming: false,
        };
        lock!(self.0).insert(entry)
    }

    /// Records that the head of the response has been passed to the server.
    pub(crate) fn streams(&self, key: usize) {
        if let Some(entry) = lock!(self.0).get_mut(key) {
            entry.streaming = true;
        }
    }

    pub(crate) fn remove(&self, key: usize) {
        let removed = lock!(self.0).try_remove(key);
        drop(removed);
    }

    /// The requests in flight, oldest first.
    pub(crate) fn list(&self, now: Instant) -> Vec<CutRequest> {
        let mut list: Vec<_> = {
            let entries = lock!(self.0);
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
