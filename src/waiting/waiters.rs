//! Tasks that wait for a phase: thousands of them, each with a waker of its own.
//!
//! A waiter is entered on the *lane* of the thread that polls it first, so that threads do not contend
//! there, and gets a place in its phase, so that waiters can be told over a period instead of all in
//! the same instant. Telling goes over the lanes. In each it sets apart the wakers that are due, and
//! wakes them one after another without the lane's lock. Where all are told at once, a task that is
//! woken finds by the phase that it has come, without any lock, so ten thousand that wake do not
//! queue; where they are told over a period, few come to their lane at a time.
//!
//! 1. *No wake-up is lost.* What a lane was told and who waits on it are behind one lock. A waiter
//!    that is entered before the lane is told is found there and woken; one that comes after sees that
//!    it was told.
//! 2. *No waker is called under the lock*: not to be cloned, woken or dropped. It may call back.
//! 3. *A waker that panics or blocks takes no other with it.* A panic is caught. The wakers that are
//!    due stay in the lane until each is taken, so whoever tells the lane next goes on with the rest.

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

/// A point on the timeline: a place in a phase. Every place of a phase comes before the next phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment {
    pub(crate) phase: Phase,
    pub(crate) place: Place,
}

pub(crate) struct Waiters {
    shards: [Mutex<Shard>; SHARDS],
}

struct Shard {
    told: Moment,
    /// What each waits for is later than what was told.
    waiting: Slab<(Moment, Waker)>,
    /// Told, and not woken yet.
    due: VecDeque<Waker>,
}

/// Where a waiter is entered, until it is told. To be given back by [`Waiters::leave`].
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
                    told: Moment {
                        phase: Phase::Serving,
                        place: Place::FIRST,
                    },
                    waiting: Slab::new(),
                    due: VecDeque::new(),
                })
            }),
        }
    }

    /// Waits until `phase` is told. A waiter that shares in the `spread` gets a place in it, and waits
    /// until that is told, unless it comes after the phase has begun.
    pub(crate) fn poll(
        &self,
        seat: &mut Option<WaitKey>,
        phase: Phase,
        spread: bool,
        cx: &Context<'_>,
    ) -> Poll<()> {
        match seat {
            Some(_) => self.poll_seated(seat, cx),
            None => self.poll_first(seat, phase, spread, cx),
        }
    }

    fn poll_seated(&self, seat: &mut Option<WaitKey>, cx: &Context<'_>) -> Poll<()> {
        let Some(WaitKey {
            shard,
            key,
            awaited,
        }) = *seat
        else {
            return Poll::Ready(());
        };
        {
            let shard = lock!(self.shards[shard]);
            if shard.told >= awaited {
                *seat = None;
                return Poll::Ready(());
            }
            if shard.waiting[key].1.will_wake(cx.waker()) {
                return Poll::Pending;
            }
        }
        let mut waker = cx.waker().clone();
        let told = {
            let mut shard = lock!(self.shards[shard]);
            let told = shard.told >= awaited;
            if !told {
                mem::swap(&mut shard.waiting[key].1, &mut waker);
            }
            told
        };
        if told {
            *seat = None;
        }
        drop(waker);
        if told { Poll::Ready(()) } else { Poll::Pending }
    }

    fn poll_first(
        &self,
        seat: &mut Option<WaitKey>,
        phase: Phase,
        spread: bool,
        cx: &Context<'_>,
    ) -> Poll<()> {
        let number = thread_index() % SHARDS;
        if lock!(self.shards[number]).told.phase >= phase {
            return Poll::Ready(());
        }
        let waker = cx.waker().clone();
        let mut shard = lock!(self.shards[number]);
        if shard.told.phase >= phase {
            drop(shard);
            drop(waker);
            return Poll::Ready(());
        }
        let entry = shard.waiting.vacant_entry();
        let key = entry.key();
        let place = if spread {
            // Those of a lane follow one another, so that they lie evenly.
            Place::nth((number as u64) << 40 | key as u64)
        } else {
            Place::FIRST
        };
        let awaited = Moment { phase, place };
        entry.insert((awaited, waker));
        *seat = Some(WaitKey {
            shard: number,
            key,
            awaited,
        });
        Poll::Pending
    }

    /// Gives up waiting.
    pub(crate) fn leave(&self, seat: WaitKey) {
        let waiter = {
            let mut shard = lock!(self.shards[seat.shard]);
            // A waiter that was told is not there any more.
            (shard.told < seat.awaited).then(|| shard.waiting.try_remove(seat.key))
        };
        // After the lock: point 2.
        drop(waiter);
    }

    /// Whether somebody waits for this phase.
    pub(crate) fn any(&self, phase: Phase) -> bool {
        let waits = |shard: &Mutex<Shard>| {
            let shard = lock!(shard);
            let mut waiting = shard.waiting.iter();
            waiting.any(|(_, (awaited, _))| awaited.phase == phase)
        };
        self.shards.iter().any(waits)
    }

    /// Tells every waiter for this moment or an earlier one.
    pub(crate) fn instruct(&self, moment: Moment) {
        for shard in &self.shards {
            lock!(shard).instruct(moment);
            loop {
                let waker = lock!(shard).due.pop_front();
                let Some(waker) = waker else { break };
                shielded(|| waker.wake());
            }
        }
    }

    /// Wakes every waiter, to look again at what it waits with.
    pub(crate) fn nudge(&self) {
        for shard in &self.shards {
            let wakers: Vec<_> = {
                let mut shard = lock!(shard);
                let waiting = shard.waiting.iter_mut();
                waiting
                    .map(|(_, (_, waker))| mem::replace(waker, Waker::noop().clone()))
                    .collect()
            };
            for waker in wakers {
                shielded(|| waker.wake());
            }
        }
    }
}

impl Shard {
    /// Sets apart those that are due.
    fn instruct(&mut self, moment: Moment) {
        if self.told >= moment {
            return;
        }
        self.told = moment;
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

    /// If the wake-up could be lost, loom would find the execution that never ends.
    #[test]
    fn a_waiter_is_told() {
        model(|| {
            let waiters = Arc::new(Waiters::new());
            let telling = Arc::clone(&waiters);
            let teller = thread::spawn(move || telling.instruct(DRAINING));
            let mut seat = None;
            wait(|cx| waiters.poll(&mut seat, Phase::Draining, true, cx));
            assert!(seat.is_none());
            teller.join().unwrap();
        });
    }

    /// A seat that is given up is free once, whoever comes first.
    #[test]
    fn a_seat_is_given_up_beside_the_telling() {
        model(|| {
            let waiters = Arc::new(Waiters::new());
            let mut first = None;
            let cx = Context::from_waker(Waker::noop());
            assert!(
                waiters
                    .poll(&mut first, Phase::Draining, true, &cx)
                    .is_pending()
            );
            let telling = Arc::clone(&waiters);
            let teller = thread::spawn(move || telling.instruct(DRAINING));
            waiters.leave(first.unwrap());
            let mut second = None;
            let _ = waiters.poll(&mut second, Phase::Draining, true, &cx);
            teller.join().unwrap();
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

    fn draining(place: Place) -> Moment {
        let phase = Phase::Draining;
        Moment { phase, place }
    }

    async fn told(waiters: &Waiters, spread: bool) {
        let mut seat = None;
        poll_fn(|cx| waiters.poll(&mut seat, Phase::Draining, spread, cx)).await;
    }

    #[test]
    fn places_are_told_one_after_another_and_the_rest_with_the_next_phase() {
        let waiters = Waiters::new();
        let mut all: Vec<_> = (0..100)
            .map(|_| task::spawn(told(&waiters, true)))
            .collect();
        let mut unspread = task::spawn(told(&waiters, false));
        for waiter in &mut all {
            assert_pending!(waiter.poll());
        }
        assert_pending!(unspread.poll());
        let half = Place::after(
            std::time::Duration::from_secs(1),
            std::time::Duration::from_secs(2),
        );
        for (place, least, most) in [(Place::FIRST, 0, 1), (half, 40, 60)] {
            waiters.instruct(draining(place));
            assert!(unspread.is_woken());
            let woken = all.iter().filter(|waiter| waiter.is_woken()).count();
            assert!((least..=most).contains(&woken), "{woken} at {place:?}");
        }
        all.retain_mut(|waiter| {
            let woken = waiter.is_woken();
            assert_eq!(waiter.poll().is_ready(), woken);
            !woken
        });
        // Whoever comes now does not wait for a turn.
        assert_ready!(task::spawn(told(&waiters, true)).poll());
        waiters.instruct(Moment {
            phase: Phase::Closing,
            place: Place::FIRST,
        });
        assert!(all.iter().all(task::Spawn::is_woken));
    }

    #[test]
    fn a_waker_may_give_up_other_seats_when_it_is_dropped_or_woken() {
        struct Leaves(Arc<Waiters>, OnceLock<WaitKey>);

        impl Wake for Leaves {
            fn wake(self: Arc<Self>) {}
        }

        impl Drop for Leaves {
            fn drop(&mut self) {
                if let Some(seat) = self.1.get() {
                    self.0.leave(*seat);
                }
            }
        }

        for last in ["replaced", "left", "told"] {
            let waiters = Arc::new(Waiters::new());
            let noop = Context::from_waker(Waker::noop());
            let mut other = None;
            assert_pending!(waiters.poll(&mut other, Phase::Draining, false, &noop));
            let leaves = Leaves(Arc::clone(&waiters), OnceLock::from(other.unwrap()));
            let waker = Waker::from(Arc::new(leaves));
            let mut seat = None;
            let cx = Context::from_waker(&waker);
            assert_pending!(waiters.poll(&mut seat, Phase::Draining, false, &cx));
            drop(waker);
            match last {
                "replaced" => {
                    assert_pending!(waiters.poll(&mut seat, Phase::Draining, false, &noop));
                }
                "left" => waiters.leave(seat.unwrap()),
                _ => waiters.instruct(draining(Place::LAST)),
            }
        }
    }

    #[test]
    fn a_waker_that_panics_takes_no_other_with_it() {
        struct Panics;

        impl Wake for Panics {
            fn wake(self: Arc<Self>) {
                std::panic::resume_unwind(Box::new("as the test wants it to"));
            }
        }

        for nudged in [false, true] {
            let waiters = Waiters::new();
            let panics = Waker::from(Arc::new(Panics));
            let mut seats = [None; 3];
            for seat in &mut seats {
                let cx = Context::from_waker(&panics);
                assert_pending!(waiters.poll(seat, Phase::Draining, false, &cx));
            }
            let mut last = task::spawn(told(&waiters, false));
            assert_pending!(last.poll());
            if nudged {
                waiters.nudge();
                assert!(last.is_woken());
                assert_pending!(last.poll());
            }
            waiters.instruct(draining(Place::LAST));
            assert!(last.is_woken());
            assert_ready!(last.poll());
        }
    }

    #[test]
    fn a_waker_that_blocks_delays_no_other() {
        use std::sync::mpsc;

        struct Blocks(std::sync::Mutex<mpsc::Receiver<()>>, mpsc::Sender<()>);

        impl Wake for Blocks {
            fn wake(self: Arc<Self>) {
                self.1.send(()).unwrap();
                let _ = self.0.lock().unwrap().recv();
            }
        }

        let (release, blocked) = mpsc::channel();
        let (woken, is_woken) = mpsc::channel();
        let waiters = Waiters::new();
        let blocks = Waker::from(Arc::new(Blocks(blocked.into(), woken)));
        let mut seat = None;
        let cx = Context::from_waker(&blocks);
        assert_pending!(waiters.poll(&mut seat, Phase::Draining, false, &cx));
        let mut other = task::spawn(told(&waiters, false));
        assert_pending!(other.poll());
        std::thread::scope(|scope| {
            scope.spawn(|| waiters.instruct(draining(Place::LAST)));
            is_woken.recv().unwrap();
            assert!(!other.is_woken());
            // As the control thread does in place of the one that is stuck.
            waiters.instruct(draining(Place::LAST));
            assert!(other.is_woken());
            drop(release);
        });
        assert_ready!(other.poll());
    }

    #[test]
    fn a_seat_given_up_is_given_to_somebody_else_who_is_told() {
        struct Nothing;

        impl Wake for Nothing {
            fn wake(self: Arc<Self>) {}
        }

        let waiters = Waiters::new();
        for _ in 0..3 {
            let nothing = Arc::new(Nothing);
            let waker = Waker::from(Arc::clone(&nothing));
            let mut seat = None;
            let cx = Context::from_waker(&waker);
            assert_pending!(waiters.poll(&mut seat, Phase::Draining, true, &cx));
            assert_eq!(Arc::strong_count(&nothing), 3);
            waiters.leave(seat.unwrap());
            assert_eq!(Arc::strong_count(&nothing), 2, "nothing of it is kept");
        }
        let mut waiter = task::spawn(told(&waiters, true));
        assert_pending!(waiter.poll());
        waiters.instruct(draining(Place::LAST));
        assert!(waiter.is_woken());
        assert_ready!(waiter.poll());
    }
}
