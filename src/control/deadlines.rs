//! The stops under way, and when each of them has to be checked.

use std::collections::{BTreeSet, HashMap};

use tokio::time::Instant;

use super::Id;

/// Each stop keeps its owner `S` alive.
pub(super) struct Deadlines<S> {
    stops: HashMap<Id, Stop<S>>,
    /// One entry for each stop.
    due: BTreeSet<(Instant, Id)>,
    notified: Vec<Id>,
}

struct Stop<S> {
    owner: S,
    at: Instant,
}

impl<S> Default for Deadlines<S> {
    fn default() -> Self {
        Self {
            stops: HashMap::new(),
            due: BTreeSet::new(),
            notified: Vec::new(),
        }
    }
}

impl<S: Clone> Deadlines<S> {
    /// Schedules the check of a stop at this instant, in place of the instant set before.
    pub(super) fn schedule(&mut self, id: Id, owner: &S, at: Instant) {
        let stop = self.stops.entry(id).or_insert_with(|| Stop {
            owner: owner.clone(),
            at,
        });
        self.due.remove(&(stop.at, id));
        stop.at = at;
        self.due.insert((at, id));
    }

    /// Ends the checks of a stop. The caller drops the owner after all locks are released.
    pub(super) fn end(&mut self, id: Id) -> Option<S> {
        let stop = self.stops.remove(&id)?;
        self.due.remove(&(stop.at, id));
        Some(stop.owner)
    }

    /// Schedules a check of a stop now.
    pub(super) fn notify(&mut self, id: Id) {
        self.notified.push(id);
    }

    /// The stops to be checked now. The check of each sets a later instant. A stop whose check does
    /// not, because of a panic, is checked again at `otherwise`.
    pub(super) fn take(&mut self, now: Instant, otherwise: Instant) -> Vec<S> {
        let mut ids = std::mem::take(&mut self.notified);
        let due = self.due.iter().take_while(|(at, _)| *at <= now);
        ids.extend(due.map(|(_, id)| *id));
        ids.sort_unstable();
        ids.dedup();
        let mut owners = Vec::with_capacity(ids.len());
        for id in ids {
            if let Some(stop) = self.stops.get_mut(&id) {
                owners.push(stop.owner.clone());
                self.due.remove(&(stop.at, id));
                stop.at = stop.at.max(otherwise);
                self.due.insert((stop.at, id));
            }
        }
        owners
    }

    /// When the next check is due.
    pub(super) fn next(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at)
    }

    pub(super) fn len(&self) -> usize {
        self.stops.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.stops.is_empty()
    }
}

#[cfg(all(test, not(tower_graceful_loom)))]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_stop_is_checked_when_it_is_due_or_notified_and_once_for_both() {
        let now = Instant::now();
        let in_seconds = |n| now + Duration::from_secs(n);
        let mut deadlines = Deadlines::default();
        deadlines.schedule(1, &"one", in_seconds(1));
        deadlines.schedule(2, &"two", in_seconds(2));
        assert_eq!(deadlines.next(), Some(in_seconds(1)));
        assert_eq!(deadlines.len(), 2);
        assert!(deadlines.take(now, in_seconds(9)).is_empty());
        deadlines.notify(2);
        assert_eq!(deadlines.take(now, now), ["two"]);
        assert_eq!(
            deadlines.next(),
            Some(in_seconds(1)),
            "the check of a notified stop keeps its instant"
        );
        deadlines.notify(2);
        deadlines.notify(2);
        deadlines.notify(3);
        assert_eq!(deadlines.take(in_seconds(2), in_seconds(9)), ["one", "two"]);
        assert_eq!(
            deadlines.next(),
            Some(in_seconds(9)),
            "neither check has set another instant"
        );
        deadlines.schedule(1, &"one", in_seconds(3));
        assert_eq!(deadlines.end(2), Some("two"));
        assert_eq!(deadlines.end(2), None);
        assert_eq!(deadlines.next(), Some(in_seconds(3)));
        assert_eq!(deadlines.end(1), Some("one"));
        assert_eq!(deadlines.next(), None);
        assert!(deadlines.is_empty());
    }
}
