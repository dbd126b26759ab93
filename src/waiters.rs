//! Those who wait for a phase: by the thousands, each with a waker of its own.
//!
//! A waiter is entered on the *lane* of the thread that polls it first, so that threads do not meet
//! there, and gets a place in its phase: one after another they can be told over a while, instead
//! of all in the same instant. Telling goes over the lanes, takes from each the wakers of those
//! whose turn has come, and wakes them after the lane's lock is released. Whoever has been woken
//! finds by the phase that it has come, without any lock, so ten thousand who wake do not queue.
//!
//! No wake-up is lost: what a lane was told and who waits on it are behind one lock. Whoever enters
//! before the lane is told is found there and woken; whoever comes after sees that it was told.

use std::{
    array,
    hash::{BuildHasher, BuildHasherDefault, DefaultHasher},
    task::{Context, Poll, Waker},
    thread,
};

use slab::Slab;

use crate::{
    phase::Phase,
    spread::Place,
    sync::{Mutex, lock},
};

const LANES: usize = 16;

thread_local! {
    static LANE: usize = {
        let hasher = BuildHasherDefault::<DefaultHasher>::new();
        // The remainder is a lane.
        #[expect(clippy::cast_possible_truncation)]
        let hash = hasher.hash_one(thread::current().id()) as usize;
        hash % LANES
    };
}

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
        let number = LANE.with(|lane| *lane);
        let mut lane = lock!(self.lanes[number]);
        if lane.told.phase >= phase {
            return Poll::Ready(());
        }
        let entry = lane.waiting.vacant_entry();
        let key = entry.key();
        let place = if spread {
            Place::nth((key * LANES + number) as u64)
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
