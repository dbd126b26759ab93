//! Tasks that wait for a phase. There may be thousands, each with its own waker.
//!
//! A waiter is registered in the *shard* of the thread that polls it first, so that threads do not
//! contend for one lock. It also gets a place in its phase, so that waiters can be notified over a
//! period instead of all in the same instant. A notification goes over the shards. In each it moves
//! the due wakers into a queue, and then wakes them one after another without holding the shard's
//! lock.
//!
//! If all waiters are notified at once, a woken task first checks the phase, which takes no lock,
//! so ten thousand woken tasks do not queue for one. If waiters are notified over a period, few
//! tasks come to their shard at a time.
//!
//! 1. *No wake-up is lost.* The latest notified moment of a shard and its waiters are behind one
//!    lock. A waiter registered before the notification is found and woken. A waiter that comes
//!    after it sees the notified moment. Models: `a_waiter_is_notified`,
//!    `a_waiter_may_be_removed_while_waiters_are_notified`.
//! 2. *No code of a waker runs under the lock*: it is not cloned, woken or dropped there, because
//!    it may call back into this module.
//! 3. *A waker that panics or blocks does not keep other tasks from being woken.* A panic is
//!    caught. Due wakers stay in the queue of the shard until each is taken, so the next
//!    notification continues with the rest.
//!
//! The models fail if a waiter is registered without a look at the notified moment under the same
//! lock, if a notification records its moment after it has released the lock under which it takes
//! the due waiters, and if a waiter is removed without a check whether it is still registered.

use std::{
    array,
    collections::VecDeque,
    mem,
    task::{Context, Poll, Waker},
};

use slab::Slab;

use crate::{
    admission::thread_index,
    background::shielded,
    connection::stagger::Place,
    phase::Phase,
    sync::{Mutex, lock},
};

const SHARDS: usize = 16;

/// A point on the timeline: a phase and a place in it. Every place of a phase comes before the next
/// phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment {
    pub(crate) phase: Phase,
    pub(crate) place: Place,
}

pub(crate) struct Waiters {
    shards: [Mutex<Shard>; SHARDS],
}

struct Shard {
    notified: Moment,
    /// The moment that each waiter waits for, always later than `notified`. With its waker.
    waiting: Slab<(Moment, Waker)>,
    /// Wakers that `notify` or `make_all_due` has taken and that have not been woken yet.
    due: VecDeque<Waker>,
}

/// The registration of a waiter that has not been notified yet. The owner passes it to
/// [`Waiters::remove`] when it stops waiting.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WaitKey {
    shard: usize,
    key: usize,
    awaited: Moment,
}

impl Waiters {
    pub(crate) fn new() -> Self {
        Self {
            shards: array::from_fn(|_| {
                Mutex::new(Shard {
                    notified: Moment {
                        phase: Phase::Serving,
                        place: Place::FIRST,
                    },
                    waiting: Slab::new(),
                    due: VecDeque::new(),
                })
            }),
        }
    }

    /// Waits until `phase` is notified. With `spread`, a waiter that comes before the phase begins
    /// gets a place in it, and waits until that place is notified.
    pub(crate) fn poll(
        &self,
        wait_key: &mut Option<WaitKey>,
        phase: Phase,
        spread: bool,
        cx: &Context<'_>,
    ) -> Poll<()> {
        let Some(registered) = *wait_key else {
            return self.poll_first(wait_key, phase, spread, cx);
        };
        let polled = self.poll_registered(registered, cx);
        if polled.is_ready() {
            *wait_key = None;
        }
        polled
    }

    fn poll_registered(&self, registered: WaitKey, cx: &Context<'_>) -> Poll<()> {
        let WaitKey {
            shard,
            key,
            awaited,
        } = registered;
        {
            let shard = lock!(self.shards[shard]);
            if shard.notified >= awaited {
                return Poll::Ready(());
            }
            if shard.waiting[key].1.will_wake(cx.waker()) {
                return Poll::Pending;
            }
        }
        // Declared before the guard, so it is dropped after the lock is released: point 2.
        let mut waker = cx.waker().clone();
        let mut shard = lock!(self.shards[shard]);
        if shard.notified >= awaited {
            return Poll::Ready(());
        }
        mem::swap(&mut shard.waiting[key].1, &mut waker);
        Poll::Pending
    }

    fn poll_first(
        &self,
        wait_key: &mut Option<WaitKey>,
        phase: Phase,
        spread: bool,
        cx: &Context<'_>,
    ) -> Poll<()> {
        let number = thread_index() % SHARDS;
        if lock!(self.shards[number]).notified.phase >= phase {
            return Poll::Ready(());
        }
        let waker = cx.waker().clone();
        let mut shard = lock!(self.shards[number]);
        if shard.notified.phase >= phase {
            return Poll::Ready(());
        }
        let entry = shard.waiting.vacant_entry();
        let key = entry.key();
        let place = if spread {
            // The waiters of a shard get consecutive numbers, so that their places are evenly
            // distributed.
            Place::nth((number as u64) << 40 | key as u64)
        } else {
            Place::FIRST
        };
        let awaited = Moment { phase, place };
        entry.insert((awaited, waker));
        *wait_key = Some(WaitKey {
            shard: number,
            key,
            awaited,
        });
        Poll::Pending
    }

    /// Removes a waiter that stops waiting.
    pub(crate) fn remove(&self, wait_key: WaitKey) {
        let waiter = {
            let mut shard = lock!(self.shards[wait_key.shard]);
            // A notified waiter is not in the shard any more.
            (shard.notified < wait_key.awaited).then(|| shard.waiting.try_remove(wait_key.key))
        };
        // Dropped after the lock is released: point 2.
        drop(waiter);
    }

    /// Whether a task waits for this phase.
    pub(crate) fn any(&self, phase: Phase) -> bool {
        let waits = |shard: &Mutex<Shard>| {
            let shard = lock!(shard);
            let mut waiting = shard.waiting.iter();
            waiting.any(|(_, (awaited, _))| awaited.phase == phase)
        };
        self.shards.iter().any(waits)
    }

    /// Notifies every waiter for this moment or an earlier one.
    pub(crate) fn notify(&self, moment: Moment) {
        for shard in &self.shards {
            lock!(shard).notify(moment);
            wake_due(shard);
        }
    }

    /// Makes every waiter due without a notification, so that it checks its condition again when it is
    /// [woken](Self::wake_due). Returns whether there is one.
    pub(crate) fn make_all_due(&self) -> bool {
        for shard in &self.shards {
            let mut shard = lock!(shard);
            let Shard { waiting, due, .. } = &mut *shard;
            for (_, (_, waker)) in waiting.iter_mut() {
                due.push_back(mem::replace(waker, Waker::noop().clone()));
            }
        }
        self.has_due()
    }

    /// Whether a waiter is due and has not been woken.
    pub(crate) fn has_due(&self) -> bool {
        self.shards.iter().any(|shard| !lock!(shard).due.is_empty())
    }

    /// Wakes every waiter that is due.
    pub(crate) fn wake_due(&self) {
        self.shards.iter().for_each(wake_due);
    }
}

/// Wakes the wakers in the queue: point 3.
fn wake_due(shard: &Mutex<Shard>) {
    loop {
        let waker = lock!(shard).due.pop_front();
        let Some(waker) = waker else { break };
        shielded(|| waker.wake());
    }
}

impl Shard {
    /// Moves the wakers of due waiters into the queue.
    fn notify(&mut self, moment: Moment) {
        if self.notified >= moment {
            return;
        }
        self.notified = moment;
        let due = self.waiting.iter().filter(|(_, (at, _))| *at <= moment);
        let due: Vec<_> = due.map(|(key, _)| key).collect();
        for key in due {
            self.due.push_back(self.waiting.remove(key).1);
        }
    }
}

#[cfg(all(test, tower_graceful_loom))]
mod models {
    use std::sync::Arc;

    use loom::{model, thread};

    use super::*;
    use crate::sync::wait;

    const DRAINING: Moment = Moment {
        phase: Phase::Draining,
        place: Place::LAST,
    };

    /// If the wake-up could be lost, loom would find an execution that never ends.
    #[test]
    fn a_waiter_is_notified() {
        model(|| {
            let waiters = Arc::new(Waiters::new());
            let notifying = Arc::clone(&waiters);
            let notifier = thread::spawn(move || notifying.notify(DRAINING));
            let mut wait_key = None;
            wait(|cx| waiters.poll(&mut wait_key, Phase::Draining, true, cx));
            assert!(wait_key.is_none());
            notifier.join().unwrap();
        });
    }

    /// A waiter is removed while another thread notifies. Its place in the shard is freed once, and
    /// a later waiter is notified.
    #[test]
    fn a_waiter_may_be_removed_while_waiters_are_notified() {
        model(|| {
            let waiters = Arc::new(Waiters::new());
            let mut first = None;
            let cx = Context::from_waker(Waker::noop());
            assert!(
                waiters
                    .poll(&mut first, Phase::Draining, true, &cx)
                    .is_pending()
            );
            let notifying = Arc::clone(&waiters);
            let notifier = thread::spawn(move || notifying.notify(DRAINING));
            waiters.remove(first.unwrap());
            let mut second = None;
            let _ = waiters.poll(&mut second, Phase::Draining, true, &cx);
            notifier.join().unwrap();
            assert!(
                waiters
                    .poll(&mut second, Phase::Draining, true, &cx)
                    .is_ready()
            );
        });
    }
}

#[cfg(all(test, not(tower_graceful_loom)))]
mod tests {
    use std::{
        future::poll_fn,
        sync::{Arc, OnceLock},
        task::Wake,
    };

    use tokio_test::{assert_pending, assert_ready, task};

    use super::*;
    use crate::background::wakers;

    fn draining(place: Place) -> Moment {
        let phase = Phase::Draining;
        Moment { phase, place }
    }

    async fn notified(waiters: &Waiters, spread: bool) {
        let mut wait_key = None;
        poll_fn(|cx| waiters.poll(&mut wait_key, Phase::Draining, spread, cx)).await;
    }

    #[test]
    fn places_are_notified_in_order_and_the_rest_with_the_next_phase() {
        let waiters = Waiters::new();
        let mut all: Vec<_> = (0..100)
            .map(|_| task::spawn(notified(&waiters, true)))
            .collect();
        let mut unspread = task::spawn(notified(&waiters, false));
        for waiter in &mut all {
            assert_pending!(waiter.poll());
        }
        assert_pending!(unspread.poll());
        let half = Place::after(
            std::time::Duration::from_secs(1),
            std::time::Duration::from_secs(2),
        );
        for (place, least, most) in [(Place::FIRST, 0, 1), (half, 40, 60)] {
            waiters.notify(draining(place));
            assert!(unspread.is_woken());
            let woken = all.iter().filter(|waiter| waiter.is_woken()).count();
            assert!((least..=most).contains(&woken), "{woken} at {place:?}");
        }
        all.retain_mut(|waiter| {
            let woken = waiter.is_woken();
            assert_eq!(waiter.poll().is_ready(), woken);
            !woken
        });
        // A task that comes after the phase has begun does not wait for a place.
        assert_ready!(task::spawn(notified(&waiters, true)).poll());
        waiters.notify(Moment {
            phase: Phase::Closing,
            place: Place::FIRST,
        });
        assert!(all.iter().all(task::Spawn::is_woken));
    }

    #[test]
    fn a_waker_may_remove_other_waiters_when_it_is_dropped_or_woken() {
        struct Leaves(Arc<Waiters>, OnceLock<WaitKey>);

        impl Wake for Leaves {
            fn wake(self: Arc<Self>) {}
        }

        impl Drop for Leaves {
            fn drop(&mut self) {
                if let Some(wait_key) = self.1.get() {
                    self.0.remove(*wait_key);
                }
            }
        }

        for last in ["replaced", "removed", "notified"] {
            let waiters = Arc::new(Waiters::new());
            let noop = Context::from_waker(Waker::noop());
            let mut other = None;
            assert_pending!(waiters.poll(&mut other, Phase::Draining, false, &noop));
            let leaves = Leaves(Arc::clone(&waiters), OnceLock::from(other.unwrap()));
            let waker = Waker::from(Arc::new(leaves));
            let mut wait_key = None;
            let cx = Context::from_waker(&waker);
            assert_pending!(waiters.poll(&mut wait_key, Phase::Draining, false, &cx));
            drop(waker);
            match last {
                "replaced" => {
                    assert_pending!(waiters.poll(&mut wait_key, Phase::Draining, false, &noop));
                }
                "removed" => waiters.remove(wait_key.unwrap()),
                _ => waiters.notify(draining(Place::LAST)),
            }
        }
    }

    #[test]
    fn a_waker_that_panics_does_not_keep_others_from_being_woken() {
        for woken_before in [false, true] {
            let waiters = Waiters::new();
            let panics = wakers::panicking();
            let mut wait_keys = [None; 3];
            for wait_key in &mut wait_keys {
                let cx = Context::from_waker(&panics);
                assert_pending!(waiters.poll(wait_key, Phase::Draining, false, &cx));
            }
            let mut last = task::spawn(notified(&waiters, false));
            assert_pending!(last.poll());
            if woken_before {
                assert!(waiters.make_all_due());
                waiters.wake_due();
                assert!(!waiters.has_due() && last.is_woken());
                assert_pending!(last.poll());
            }
            waiters.notify(draining(Place::LAST));
            assert!(last.is_woken());
            assert_ready!(last.poll());
        }
    }

    #[test]
    fn a_waker_that_blocks_delays_no_other() {
        let all_due = |waiters: &Waiters| {
            waiters.make_all_due();
            waiters.wake_due();
        };
        let all_notified = |waiters: &Waiters| waiters.notify(draining(Place::LAST));
        for first in [all_due, all_notified] {
            let waiters = Waiters::new();
            let (blocks, is_woken, release) = wakers::blocking();
            let mut wait_key = None;
            let cx = Context::from_waker(&blocks);
            assert_pending!(waiters.poll(&mut wait_key, Phase::Draining, false, &cx));
            let mut other = task::spawn(notified(&waiters, false));
            assert_pending!(other.poll());
            std::thread::scope(|scope| {
                scope.spawn(|| first(&waiters));
                is_woken.recv().unwrap();
                assert!(!other.is_woken());
                // As the control thread does when the notifying thread is stuck.
                waiters.notify(draining(Place::LAST));
                assert!(other.is_woken());
                drop(release);
            });
            assert_ready!(other.poll());
        }
    }

    #[test]
    fn the_waiters_of_different_threads_have_different_places() {
        let waiters = Waiters::new();
        let place = || {
            let mut wait_key = None;
            let cx = Context::from_waker(Waker::noop());
            assert_pending!(waiters.poll(&mut wait_key, Phase::Draining, true, &cx));
            wait_key.unwrap().awaited.place
        };
        let mut places: Vec<_> = std::thread::scope(|scope| {
            let threads = [(); 4].map(|()| scope.spawn(place));
            threads.map(|thread| thread.join().unwrap()).into()
        });
        places.sort();
        places.dedup();
        assert_eq!(places.len(), 4);
    }

    /// Its key may belong to another waiter by now.
    #[test]
    fn the_removal_of_a_waiter_that_was_notified_removes_no_other() {
        let waiters = Waiters::new();
        let cx = Context::from_waker(Waker::noop());
        let mut notified_key = None;
        assert_pending!(waiters.poll(&mut notified_key, Phase::Draining, false, &cx));
        waiters.notify(draining(Place::FIRST));
        let mut other = None;
        assert_pending!(waiters.poll(&mut other, Phase::Stopped, false, &cx));
        waiters.remove(notified_key.unwrap());
        assert!(waiters.any(Phase::Stopped));
    }

    #[test]
    fn the_place_of_a_removed_waiter_is_used_again() {
        struct Nothing;

        impl Wake for Nothing {
            fn wake(self: Arc<Self>) {}
        }

        let waiters = Waiters::new();
        for _ in 0..3 {
            let nothing = Arc::new(Nothing);
            let waker = Waker::from(Arc::clone(&nothing));
            let mut wait_key = None;
            let cx = Context::from_waker(&waker);
            assert_pending!(waiters.poll(&mut wait_key, Phase::Draining, true, &cx));
            assert_eq!(Arc::strong_count(&nothing), 3);
            waiters.remove(wait_key.unwrap());
            assert_eq!(Arc::strong_count(&nothing), 2, "its waker is not kept");
        }
        let mut waiter = task::spawn(notified(&waiters, true));
        assert_pending!(waiter.poll());
        waiters.notify(draining(Place::LAST));
        assert!(waiter.is_woken());
        assert_ready!(waiter.poll());
    }
}
