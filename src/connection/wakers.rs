//! The wakers of the tasks that wait for a connection. `state` has the argument about their order.

use std::{slice, task::Waker};

use crate::background::shielded;

/// What a task waits for: reading and writing, which may happen in two tasks; directives (the owner
/// of the connection); and the end of the tasks that run beside the connection (streams).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WakerSlot {
    Read,
    Write,
    Owner,
    Streams,
}

impl WakerSlot {
    pub(super) const ALL: Each<Self> = [Self::Read, Self::Write, Self::Owner, Self::Streams];

    pub(super) const fn bit(self) -> u8 {
        1 << self as u8
    }

    /// The bits of both slots that the same poller uses.
    pub(super) const fn bits_of_poller(self) -> u8 {
        match self {
            Self::Read | Self::Write => Self::Read.bit() | Self::Write.bit(),
            Self::Owner | Self::Streams => Self::Owner.bit() | Self::Streams.bit(),
        }
    }
}

/// One for each [`WakerSlot`].
pub(super) type Each<T> = [T; 4];

fn only(slot: WakerSlot) -> Each<bool> {
    let mut each = [false; 4];
    each[slot as usize] = true;
    each
}

/// The waker that a poller has stored, so that it need not be stored again. The task or tasks that
/// read and write are one poller, and the owner is another.
#[derive(Debug, Default)]
pub(crate) struct RegisteredWaker(pub(super) Option<Waker>);

impl RegisteredWaker {
    #[inline]
    pub(super) fn is(&self, waker: &Waker) -> bool {
        let stored = self.0.as_ref();
        stored.is_some_and(|stored| stored.will_wake(waker))
    }
}

/// A task that waits, and what it waits for.
#[derive(Debug)]
pub(super) struct WaitingTask {
    waker: Waker,
    /// Not bits: the values that a `bool` does not have keep [`Wakers`] small.
    slots: Each<bool>,
}

/// The tasks that wait, each for something else. Usually one task does all the waiting, and there may be
/// very many connections, so that case takes no allocation.
///
/// Nothing here clones, wakes or drops a waker, except [`wake`](Self::wake): the caller holds a lock, and
/// such code of the user may do anything.
#[derive(Debug)]
pub(super) enum Wakers {
    One(Option<WaitingTask>),
    /// At least two.
    Several(Box<Each<Option<WaitingTask>>>),
}

impl Default for Wakers {
    fn default() -> Self {
        Self::One(None)
    }
}

impl Wakers {
    fn places(&self) -> &[Option<WaitingTask>] {
        match self {
            Self::One(place) => slice::from_ref(place),
            Self::Several(places) => &**places,
        }
    }

    fn places_mut(&mut self) -> &mut [Option<WaitingTask>] {
        match self {
            Self::One(place) => slice::from_mut(place),
            Self::Several(places) => &mut **places,
        }
    }

    /// Stores a waker. Returns what it replaces, and the waker itself if it is stored already. The caller
    /// drops them after the lock is released.
    pub(super) fn store(
        &mut self,
        slot: WakerSlot,
        waker: Waker,
    ) -> (Option<WaitingTask>, Option<Waker>) {
        let (mut replaced, mut is_stored) = (None, false);
        for place in self.places_mut() {
            let Some(task) = place else { continue };
            let is_own = task.waker.will_wake(&waker);
            task.slots[slot as usize] = is_own;
            is_stored |= is_own;
            if !task.slots.contains(&true) {
                replaced = place.take();
            }
        }
        if is_stored {
            self.shrink();
            return (replaced, Some(waker));
        }
        let slots = only(slot);
        self.insert(WaitingTask { waker, slots });
        (replaced, None)
    }

    /// There is a place, because each of the other tasks has a slot of its own.
    fn insert(&mut self, task: WaitingTask) {
        let places = self.places_mut();
        if let Some(place) = places.iter_mut().find(|place| place.is_none()) {
            *place = Some(task);
        } else if let Self::One(first) = self {
            *self = Self::Several(Box::new([first.take(), Some(task), None, None]));
        }
    }

    /// After a task has been removed.
    fn shrink(&mut self) {
        let Self::Several(places) = self else { return };
        if places.iter().flatten().count() < 2 {
            *self = Self::One(places.iter_mut().find_map(Option::take));
        }
    }

    pub(super) fn have(&self, slot: WakerSlot) -> bool {
        let mut tasks = self.places().iter().flatten();
        tasks.any(|task| task.slots[slot as usize])
    }

    /// The slots whose wakers are stored.
    pub(super) fn slots(&self) -> u8 {
        WakerSlot::ALL
            .into_iter()
            .filter(|slot| self.have(*slot))
            .fold(0, |slots, slot| slots | slot.bit())
    }

    /// Removes the task that waits for this, also from the other slots.
    pub(super) fn take(&mut self, slot: WakerSlot) -> Self {
        self.take_task(|task| task.slots[slot as usize])
    }

    /// Removes the task that has this waker.
    #[cfg(all(feature = "axum", feature = "signal"))]
    pub(super) fn forget(&mut self, waker: &Waker) -> Self {
        self.take_task(|task| task.waker.will_wake(waker))
    }

    fn take_task(&mut self, is: impl Fn(&WaitingTask) -> bool) -> Self {
        let mut places = self.places_mut().iter_mut();
        let taken = places.find_map(|place| place.take_if(|task| is(task)));
        self.shrink();
        Self::One(taken)
    }

    /// A waker that panics does not keep others from being woken.
    pub(super) fn wake(mut self) {
        for task in self.places_mut().iter_mut().filter_map(Option::take) {
            shielded(|| task.waker.wake());
        }
    }
}

#[cfg(all(test, not(tower_graceful_loom)))]
mod tests {
    use super::WakerSlot::{self, Owner, Read, Streams, Write};

    #[test]
    fn every_slot_has_its_own_bit_and_every_poller_two() {
        let slots = WakerSlot::ALL;
        assert_eq!(slots, [Read, Write, Owner, Streams]);
        assert_eq!(slots.map(WakerSlot::bit), [1, 2, 4, 8]);
        assert_eq!(slots.map(WakerSlot::bits_of_poller), [3, 3, 12, 12]);
    }
}
