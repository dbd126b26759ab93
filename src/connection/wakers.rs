//! The wakers of the tasks that wait for a connection. `state` has the argument about their order.

use std::{mem, task::Waker};

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

/// The stored wakers. Usually one task does all the waiting, and there may be very many
/// connections, so that case takes no allocation.
#[derive(Debug)]
pub(super) enum Wakers {
    None,
    One(Waker, Each<bool>),
    Several(Box<Each<Option<Waker>>>),
}

impl Wakers {
    /// Stores a waker. Returns a former one, which the caller drops after the lock is released.
    pub(super) fn store(&mut self, slot: WakerSlot, waker: &Waker) -> Option<Waker> {
        let index = slot as usize;
        match self {
            Self::None => *self = Self::One(waker.clone(), only(slot)),
            Self::One(one, waits) if one.will_wake(waker) => waits[index] = true,
            Self::One(one, waits) if *waits == only(slot) => {
                return Some(mem::replace(one, waker.clone()));
            }
            Self::One(one, waits) => {
                let mut several = Box::new(waits.map(|waits| waits.then(|| one.clone())));
                several[index] = Some(waker.clone());
                *self = Self::Several(several);
            }
            Self::Several(several) => {
                let former = several[index].replace(waker.clone());
                self.merge();
                return former;
            }
        }
        None
    }

    /// If all wakers belong to one task again, as after an upgrade, one of them is enough.
    fn merge(&mut self) {
        let Self::Several(several) = self else {
            return;
        };
        let mut all = several.iter().flatten();
        let Some(first) = all.next() else {
            return;
        };
        if all.all(|other| other.will_wake(first)) {
            let waits = several.each_ref().map(Option::is_some);
            *self = Self::One(first.clone(), waits);
        }
    }

    fn get(&self, slot: WakerSlot) -> Option<&Waker> {
        match self {
            Self::One(one, waits) => waits[slot as usize].then_some(one),
            Self::Several(several) => several[slot as usize].as_ref(),
            Self::None => None,
        }
    }

    pub(super) fn have(&self, slot: WakerSlot) -> bool {
        self.get(slot).is_some()
    }

    /// A copy of the waker in this slot.
    pub(super) fn of(&self, slot: WakerSlot) -> Self {
        self.get(slot)
            .map_or(Self::None, |waker| Self::One(waker.clone(), only(slot)))
    }

    /// Removes the waker of this task from all slots. One that does nothing stays for reading, to show
    /// that the connection has been read. The caller drops the result after the lock is released.
    #[cfg(all(feature = "axum", feature = "signal"))]
    pub(super) fn forget(&mut self, task: &Waker) -> Self {
        let noop = || Waker::noop().clone();
        match self {
            Self::One(one, waits) if one.will_wake(task) => {
                let left = if waits[WakerSlot::Read as usize] {
                    Self::One(noop(), only(WakerSlot::Read))
                } else {
                    Self::None
                };
                mem::replace(self, left)
            }
            Self::None | Self::One(..) => Self::None,
            Self::Several(several) => {
                let of_task = |waker: &mut Option<Waker>| waker.take_if(|it| it.will_wake(task));
                let forgotten = several.each_mut().map(of_task);
                if forgotten[WakerSlot::Read as usize].is_some() {
                    several[WakerSlot::Read as usize] = Some(noop());
                }
                self.merge();
                Self::Several(Box::new(forgotten))
            }
        }
    }

    /// A waker that panics does not keep others from being woken.
    pub(super) fn wake(self) {
        match self {
            Self::None => {}
            Self::One(waker, _) => shielded(|| waker.wake()),
            Self::Several(several) => {
                for waker in several.into_iter().flatten() {
                    shielded(|| waker.wake());
                }
            }
        }
    }
}

#[cfg(all(test, not(tower_graceful_loom)))]
mod tests {
    use super::WakerSlot::{self, Owner, Read, Streams, Write};

    #[test]
    fn every_slot_has_its_own_bit_and_every_poller_two() {
        let slots = [Read, Write, Owner, Streams];
        assert_eq!(slots.map(WakerSlot::bit), [1, 2, 4, 8]);
        assert_eq!(slots.map(WakerSlot::bits_of_poller), [3, 3, 12, 12]);
    }
}
