//! Those who wait for a phase: by the thousands, each with a waker of its own.
//!
//! A waiter is entered on the *lane* of the thread that polls it first, so that threads do not meet
//! there, and gets a place in its phase: one after another they can be told over a while, instead
//! of all in the same instant. Telling goes over the lanes, takes from each the wakers of those
//! whose turn has come, and wakes them after the lane's lock is released. Where all are told at once,
//! whoever is woken finds by the phase that it has come, without any lock, so ten thousand who wake
//! do not queue; where they are told by and by, few come to their lane at a time.
//!
//! No wake-up is lost: what a lane was told and who waits on it are behind one lock. Whoever enters
//! before the lane is told is found there and woken; whoever comes after sees that it was told. But a
//! waker that panics takes the rest of its telling with it: no executor's does.

use std::{
    array,
    task::{Context, Poll, Waker},
};

use slab::Slab;

use crate::{
    gate::here,
    phase::Phase,
    spread::Place,
    sync::{Mutex, lock},
};

const LANES: usize = 16;

/// A point on the timeline: a place in a phase. Every place of a phase comes before the next phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment {
    pub(crate) phase: Phase,
    pub(crate) place: Place,
}

pub(crate) struct Waiters {
    lanes: [Mutex<Lane>; LANES],
}

struct Lane {
    told: Moment,
    /// What each waits for is later than what was told.
    waiting: Slab<(Moment, Waker)>,
}

/// Where a waiter is entered, until it is told. To be given back by [`Waiters::leave`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seat {
    lane: usize,
    key: usize,
    awaited: Moment,
}

impl Waiters {
    pub(crate) fn new() -> Self {
        Self {
            lanes: array::from_fn(|_| {
                Mutex::new(Lane {
                    told: Moment {
                        phase: Phase::Serving,
                        place: Place::FIRST,
                    },
                    waiting: Slab::new(),
                })
            }),
        }
    }

    /// Waits until `phase` is told. Whoever shares in the `spread` gets a place in it, and waits
    /// until that is told; but nobody who comes after the phase has begun.
    pub(crate) fn poll(
        &self,
        seat: &mut Option<Seat>,
        phase: Phase,
        spread: bool,
        cx: &Context<'_>,
    ) -> Poll<()> {
        if let Some(Seat { lane, key, awaited }) = *seat {
            let former = {
                let mut lane = lock!(self.lanes[lane]);
                if lane.told >= awaited {
                    *seat = None;
                    return Poll::Ready(());
                }
                let (_, waker) = &mut lane.waiting[key];
                if waker.will_wake(cx.waker()) {
                    return Poll::Pending;
                }
                std::mem::replace(waker, cx.waker().clone())
            };
            // After the lock, because dropping a waker may run anything.
            drop(former);
            return Poll::Pending;
        }
        let number = here() % LANES;
        let mut lane = lock!(self.lanes[number]);
        if lane.told.phase >= phase {
            return Poll::Ready(());
        }
        let entry = lane.waiting.vacant_entry();
        let key = entry.key();
        let place = if spread {
            // Those of a lane follow one another, so that they lie evenly.
            Place::nth((number as u64) << 40 | key as u64)
        } else {
            Place::FIRST
        };
        let awaited = Moment { phase, place };
        entry.insert((awaited, cx.waker().clone()));
        *seat = Some(Seat {
            lane: number,
            key,
            awaited,
        });
        Poll::Pending
    }

    /// Gives up waiting.
    pub(crate) fn leave(&self, seat: Seat) {
        let waiter = {
            let mut lane = lock!(self.lanes[seat.lane]);
            // Who was told is not there any more.
            (lane.told < seat.awaited).then(|| lane.waiting.try_remove(seat.key))
        };
        // After the lock, as above.
        drop(waiter);
    }

    /// Tells everybody who waits for this moment or an earlier one.
    pub(crate) fn tell(&self, moment: Moment) {
        for lane in &self.lanes {
            let wakers = lock!(lane).tell(moment);
            for waker in wakers {
                waker.wake();
            }
        }
    }
}

impl Lane {
    fn tell(&mut self, moment: Moment) -> Vec<Waker> {
        if self.told >= moment {
            return Vec::new();
        }
        self.told = moment;
        let due = self.waiting.iter().filter(|(_, (at, _))| *at <= moment);
        let due: Vec<_> = due.map(|(key, _)| key).collect();
        let wakers = due.into_iter().map(|key| self.waiting.remove(key).1);
        wakers.collect()
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
    fn whoever_waits_is_told() {
        model(|| {
            let waiters = Arc::new(Waiters::new());
            let telling = Arc::clone(&waiters);
            let teller = thread::spawn(move || telling.tell(DRAINING));
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
            let teller = thread::spawn(move || telling.tell(DRAINING));
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
            waiters.tell(draining(place));
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
        waiters.tell(Moment {
            phase: Phase::Closing,
            place: Place::FIRST,
        });
        assert!(all.iter().all(task::Spawn::is_woken));
    }

    #[test]
    fn a_waker_may_give_up_other_seats_when_it_is_dropped_or_woken() {
        struct Leaves(Arc<Waiters>, OnceLock<Seat>);

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
                _ => waiters.tell(draining(Place::LAST)),
            }
        }
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
        waiters.tell(draining(Place::LAST));
        assert!(waiter.is_woken());
        assert_ready!(waiter.poll());
    }
}
