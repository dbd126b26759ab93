//! What a connection has been told, and who is woken when it is told more.
//!
//! A waker is stored under the lock under which the connection is told, before the connection is
//! polled: either the cut finds the waker, or the poll finds the cut. Each poller remembers which
//! waker of his is [`RegisteredWaker`]. It stays where it is until the cut takes it, so as long as the same
//! task polls there is nothing to store, and he only looks at what was told, without a lock.
//!
//! That look cannot miss the wake-up that goes with what was told: the waker is his, so a wake-up
//! before the poll orders what was told before it, and one during the poll makes him poll again.
//! `waits` and `wrote` are `Relaxed`: of the first each poller reads what he has written himself, or
//! that the cut took his waker, which is followed by a wake-up as well; the second is asked by
//! whoever writes.

use std::{
    mem,
    task::{Context, Waker},
};

#[cfg(all(feature = "axum", feature = "signal"))]
use crate::sync::AtomicU32;
use crate::sync::{AtomicBool, AtomicU8, Mutex, Ordering, lock};

/// What a connection is told. It only ever moves forward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Directive {
    /// To go on.
    #[default]
    Stay,
    /// The service stops. Nothing is to be done, but what passes is noted from now on.
    Stopping,
    /// To leave when its turn in the spread has come.
    TakeTurns,
    /// To leave, if the peer can be told so without losing a request: by the GOAWAY of HTTP/2.
    Leave,
    /// To close when the last response is out, and at once where there is none to wait for.
    Close,
    /// To close now where nothing is in flight and the peer says nothing.
    Expire,
    /// To close now.
    Cut,
}

impl Directive {
    #[inline]
    const fn of(told: u8) -> Self {
        match told {
            0 => Self::Stay,
            1 => Self::Stopping,
            2 => Self::TakeTurns,
            3 => Self::Leave,
            4 => Self::Close,
            5 => Self::Expire,
            _ => Self::Cut,
        }
    }
}

/// Who waits: for reading and for writing, which may happen in two tasks; for being told; and for
/// the tasks beside to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WakerSlot {
    Read,
    Write,
    Owner,
    Streams,
}

impl WakerSlot {
    const fn bit(self) -> u8 {
        1 << self as u8
    }

    /// Its own, and that of the other waiter that is polled by the same.
    const fn bits_of_poller(self) -> u8 {
        match self {
            Self::Read | Self::Write => Self::Read.bit() | Self::Write.bit(),
            Self::Owner | Self::Streams => Self::Owner.bit() | Self::Streams.bit(),
        }
    }
}

/// One for each [`WakerSlot`].
type Each<T> = [T; 4];

fn only(waiter: WakerSlot) -> Each<bool> {
    let mut each = [false; 4];
    each[waiter as usize] = true;
    each
}

#[derive(Debug)]
pub(crate) struct ConnectionState {
    /// A [`Directive`]. It changes under the lock of the wakers.
    told: AtomicU8,
    /// Something has been written, or tried to be.
    wrote: AtomicBool,
    /// The waiters whose poller's [`RegisteredWaker`] waker is the one that is stored for them. It changes
    /// under the lock of the wakers, and each poller looks only for himself.
    waits: AtomicU8,
    /// Tasks that run beside the connection's own.
    #[cfg(all(feature = "axum", feature = "signal"))]
    streams: AtomicU32,
    wakers: Mutex<Wakers>,
}

impl ConnectionState {
    pub(crate) fn new(told: Directive) -> Self {
        Self {
            told: AtomicU8::new(told as u8),
            wrote: AtomicBool::new(false),
            waits: AtomicU8::new(0),
            #[cfg(all(feature = "axum", feature = "signal"))]
            streams: AtomicU32::new(0),
            wakers: Mutex::new(Wakers::None),
        }
    }

    #[inline]
    pub(crate) fn directive(&self) -> Directive {
        // Acquire: partner of the Release in `tell`.
        Directive::of(self.told.load(Ordering::Acquire))
    }

    /// What has been told. To be called before a poll: when it is told that it is cut, and its
    /// owner when it is told anything, the task is woken.
    #[inline]
    pub(crate) fn enter(
        &self,
        stored: &mut RegisteredWaker,
        waiter: WakerSlot,
        cx: &Context<'_>,
    ) -> Directive {
        let waits = self.waits.load(Ordering::Relaxed) & waiter.bit() != 0;
        if !waits || !stored.is(cx.waker()) {
            self.store(stored, waiter, cx.waker());
        }
        self.directive()
    }

    #[cold]
    fn store(&self, stored: &mut RegisteredWaker, waiter: WakerSlot, waker: &Waker) {
        let former = {
            let mut wakers = lock!(self.wakers);
            let former = wakers.store(waiter, waker);
            let mut waits = self.waits.load(Ordering::Relaxed);
            if !stored.is(waker) {
                waits &= !waiter.bits_of_poller();
            }
            self.waits.store(waits | waiter.bit(), Ordering::Relaxed);
            former
        };
        // After the lock, because dropping a waker may run anything.
        drop(former);
        if !stored.is(waker) {
            stored.0 = Some(waker.clone());
        }
        if waiter == WakerSlot::Write && self.directive() < Directive::Cut {
            self.wrote.store(true, Ordering::Relaxed);
        }
    }

    /// Tells more. Less than has been told already changes nothing.
    pub(crate) fn instruct(&self, told: Directive) {
        let woken = {
            let mut wakers = lock!(self.wakers);
            if self.directive() >= told {
                return;
            }
            // Release: partner of the Acquire in `told`.
            self.told.store(told as u8, Ordering::Release);
            match told {
                Directive::Stay | Directive::Stopping => Wakers::None,
                Directive::TakeTurns | Directive::Leave | Directive::Close => {
                    wakers.of(WakerSlot::Owner)
                }
                Directive::Expire | Directive::Cut => self.take_all(&mut wakers),
            }
        };
        woken.wake();
    }

    /// Wakes the task that reads, to look at what has changed elsewhere.
    #[cfg(feature = "axum")]
    pub(crate) fn wake_reader(&self) {
        let woken = lock!(self.wakers).of(WakerSlot::Read);
        woken.wake();
    }

    /// Wakes every task that waits for the connection, to look again at what it was told.
    pub(crate) fn wake_all(&self) {
        let woken = self.take_all(&mut lock!(self.wakers));
        woken.wake();
    }

    /// Whoever has more to wait for is stored again by the poll that the wake-up brings.
    fn take_all(&self, wakers: &mut Wakers) -> Wakers {
        self.waits.store(0, Ordering::Relaxed);
        mem::replace(wakers, Wakers::None)
    }

    /// Nobody waits for it, as if it had just been opened: its next task has not polled it yet.
    #[cfg(feature = "axum")]
    pub(crate) fn forget_all(&self) {
        let wakers = self.take_all(&mut lock!(self.wakers));
        drop(wakers);
    }

    /// It was cut when something had been written, or tried to be. Asked by whoever writes.
    pub(crate) fn is_cut_short(&self) -> bool {
        self.directive() == Directive::Cut && self.wrote.load(Ordering::Relaxed)
    }

    /// Nobody has tried to read yet, or was cut before.
    pub(crate) fn is_unread(&self) -> bool {
        let wakers = lock!(self.wakers);
        self.directive() < Directive::Cut && !wakers.have(WakerSlot::Read)
    }
}

#[cfg(all(feature = "axum", feature = "signal"))]
impl ConnectionState {
    pub(crate) fn stream_began(&self) {
        self.streams.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn stream_ended(&self) {
        // Release: partner of the Acquire in `poll_streams_ended`. Acquire: the last one speaks for all.
        if self.streams.fetch_sub(1, Ordering::AcqRel) == 1 {
            let woken = lock!(self.wakers).of(WakerSlot::Streams);
            woken.wake();
        }
    }

    pub(crate) fn has_streams(&self) -> bool {
        self.streams.load(Ordering::Acquire) > 0
    }

    /// Ready when no task runs beside. When the last one ends, the task is woken.
    pub(crate) fn poll_streams_ended(
        &self,
        stored: &mut RegisteredWaker,
        cx: &Context<'_>,
    ) -> std::task::Poll<()> {
        self.enter(stored, WakerSlot::Streams, cx);
        // Acquire: partner of the Release in `stream_ended`.
        if self.streams.load(Ordering::Acquire) > 0 {
            return std::task::Poll::Pending;
        }
        std::task::Poll::Ready(())
    }

    /// The owner is gone. Its task would be kept in memory, as long as an upgraded connection is.
    pub(crate) fn owner_left(&self) {
        let mut wakers = lock!(self.wakers);
        let left = [
            wakers.forget(WakerSlot::Owner),
            wakers.forget(WakerSlot::Streams),
        ];
        drop(wakers);
        drop(left);
    }
}

/// What a poller remembers: his waker that is stored. Whoever reads and writes is one poller, and
/// the owner another.
#[derive(Debug, Default)]
pub(crate) struct RegisteredWaker(Option<Waker>);

impl RegisteredWaker {
    #[inline]
    fn is(&self, waker: &Waker) -> bool {
        let stored = self.0.as_ref();
        stored.is_some_and(|stored| stored.will_wake(waker))
    }
}

/// Mostly it is one task that does all of the waiting, and there may be very many connections.
#[derive(Debug)]
enum Wakers {
    None,
    One(Waker, Each<bool>),
    Several(Box<Each<Option<Waker>>>),
}

impl Wakers {
    /// Returns what is to be dropped after the lock, if it is the last of its kind.
    fn store(&mut self, waiter: WakerSlot, waker: &Waker) -> Option<Waker> {
        let seat = waiter as usize;
        match self {
            Self::None => *self = Self::One(waker.clone(), only(waiter)),
            Self::One(one, waits) if one.will_wake(waker) => waits[seat] = true,
            Self::One(one, waits) if *waits == only(waiter) => {
                return Some(mem::replace(one, waker.clone()));
            }
            Self::One(one, waits) => {
                let mut several = Box::new(waits.map(|waits| waits.then(|| one.clone())));
                several[seat] = Some(waker.clone());
                *self = Self::Several(several);
            }
            Self::Several(several) => {
                let former = several[seat].replace(waker.clone());
                self.merge();
                return former;
            }
        }
        None
    }

    /// Where all are wakers of one task again, as after an upgrade, one is enough.
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

    fn have(&self, waiter: WakerSlot) -> bool {
        match self {
            Self::None => false,
            Self::One(_, waits) => waits[waiter as usize],
            Self::Several(several) => several[waiter as usize].is_some(),
        }
    }

    /// A copy of those of one.
    fn of(&self, waiter: WakerSlot) -> Self {
        let waker = match self {
            Self::One(one, waits) if waits[waiter as usize] => one,
            Self::Several(several) => match &several[waiter as usize] {
                Some(waker) => waker,
                None => return Self::None,
            },
            Self::None | Self::One(..) => return Self::None,
        };
        Self::One(waker.clone(), only(waiter))
    }

    /// Returns what is to be dropped after the lock.
    #[cfg(all(feature = "axum", feature = "signal"))]
    fn forget(&mut self, waiter: WakerSlot) -> Self {
        match self {
            Self::None => Self::None,
            Self::One(_, waits) => {
                waits[waiter as usize] = false;
                if waits.contains(&true) {
                    Self::None
                } else {
                    mem::replace(self, Self::None)
                }
            }
            Self::Several(several) => {
                let Some(waker) = several[waiter as usize].take() else {
                    return Self::None;
                };
                self.merge();
                Self::One(waker, only(waiter))
            }
        }
    }

    fn wake(self) {
        match self {
            Self::None => {}
            Self::One(waker, _) => waker.wake(),
            Self::Several(several) => several.into_iter().flatten().for_each(Waker::wake),
        }
    }
}

#[cfg(all(test, tower_graceful_loom))]
mod models {
    use std::{sync::Arc, task::Poll};

    use loom::{model, thread};

    use super::*;
    use crate::sync::wait;

    /// Stored in the first poll, and only looked at in the second. If the wake-up could be lost,
    /// loom would find the execution that never ends.
    #[test]
    fn whoever_polls_finds_the_cut_or_is_found_by_it() {
        model(|| {
            let state = Arc::new(ConnectionState::new(Directive::Stay));
            let telling = Arc::clone(&state);
            let teller = thread::spawn(move || telling.instruct(Directive::Cut));
            let mut stored = RegisteredWaker::default();
            wait(|cx| {
                let first = state.enter(&mut stored, WakerSlot::Read, cx);
                if first == Directive::Cut
                    || state.enter(&mut stored, WakerSlot::Read, cx) == Directive::Cut
                {
                    return Poll::Ready(());
                }
                Poll::Pending
            });
            teller.join().unwrap();
        });
    }

    /// As after an upgrade, when the connection's next task polls it while it is cut.
    #[test]
    fn a_poll_by_another_task_is_not_lost_either() {
        model(|| {
            let state = Arc::new(ConnectionState::new(Directive::Stay));
            let mut stored = RegisteredWaker::default();
            let noop = &Context::from_waker(Waker::noop());
            state.enter(&mut stored, WakerSlot::Read, noop);
            state.enter(&mut stored, WakerSlot::Write, noop);
            let telling = Arc::clone(&state);
            let teller = thread::spawn(move || telling.instruct(Directive::Cut));
            wait(|cx| match state.enter(&mut stored, WakerSlot::Write, cx) {
                Directive::Cut => Poll::Ready(()),
                _ => Poll::Pending,
            });
            teller.join().unwrap();
        });
    }

    #[cfg(all(feature = "axum", feature = "signal"))]
    #[test]
    fn the_last_stream_is_waited_for() {
        model(|| {
            let state = Arc::new(ConnectionState::new(Directive::Stay));
            state.stream_began();
            let ending = Arc::clone(&state);
            let stream = thread::spawn(move || ending.stream_ended());
            let mut stored = RegisteredWaker::default();
            wait(|cx| state.poll_streams_ended(&mut stored, cx));
            stream.join().unwrap();
        });
    }

    #[cfg(all(feature = "axum", feature = "signal"))]
    #[test]
    fn the_last_stream_is_waited_for_whenever_the_cut_comes() {
        model(|| {
            let state = Arc::new(ConnectionState::new(Directive::Stay));
            state.stream_began();
            let other = Arc::clone(&state);
            let teller = thread::spawn(move || {
                other.instruct(Directive::Cut);
                other.stream_ended();
            });
            let mut stored = RegisteredWaker::default();
            wait(|cx| state.poll_streams_ended(&mut stored, cx));
            teller.join().unwrap();
        });
    }
}

#[cfg(all(test, not(tower_graceful_loom)))]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering::Relaxed},
        },
        task::Wake,
    };

    use super::*;

    #[derive(Default)]
    struct Task(AtomicUsize);

    impl Wake for Task {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    impl Task {
        fn woken(&self) -> usize {
            self.0.swap(0, Relaxed)
        }

        /// What it is told when it polls.
        fn enters(
            self: &Arc<Self>,
            state: &ConnectionState,
            stored: &mut RegisteredWaker,
            waiter: WakerSlot,
        ) -> Directive {
            let waker = Waker::from(Arc::clone(self));
            state.enter(stored, waiter, &Context::from_waker(&waker))
        }
    }

    fn holds(state: &ConnectionState) -> Each<bool> {
        let wakers = lock!(state.wakers);
        [
            WakerSlot::Read,
            WakerSlot::Write,
            WakerSlot::Owner,
            WakerSlot::Streams,
        ]
        .map(|waiter| wakers.have(waiter))
    }

    fn is_one(state: &ConnectionState) -> bool {
        matches!(*lock!(state.wakers), Wakers::One(..))
    }

    #[test]
    fn a_task_that_does_all_is_woken_once_by_the_cut() {
        let (state, task) = (
            ConnectionState::new(Directive::Stay),
            Arc::<Task>::default(),
        );
        let (mut io, mut owner) = <(RegisteredWaker, RegisteredWaker)>::default();
        assert!(state.is_unread());
        for _ in 0..2 {
            assert_eq!(
                task.enters(&state, &mut owner, WakerSlot::Owner),
                Directive::Stay
            );
            task.enters(&state, &mut io, WakerSlot::Read);
            task.enters(&state, &mut io, WakerSlot::Write);
        }
        assert!(is_one(&state) && !state.is_unread());
        state.instruct(Directive::Leave);
        state.instruct(Directive::TakeTurns);
        assert_eq!(task.woken(), 1);
        // Its waker is still there.
        assert_eq!(
            task.enters(&state, &mut owner, WakerSlot::Owner),
            Directive::Leave
        );
        state.instruct(Directive::Close);
        assert_eq!(task.woken(), 1);
        assert!(!state.is_cut_short());
        state.instruct(Directive::Cut);
        assert_eq!(task.woken(), 1);
        assert_eq!(
            task.enters(&state, &mut io, WakerSlot::Read),
            Directive::Cut
        );
        assert!(state.is_cut_short() && !state.is_unread());
    }

    #[test]
    fn only_the_owner_is_woken_for_less_than_the_cut() {
        let state = ConnectionState::new(Directive::Stay);
        let [reader, writer, owner] = [(); 3].map(|()| Arc::<Task>::default());
        let (mut io, mut told) = <(RegisteredWaker, RegisteredWaker)>::default();
        owner.enters(&state, &mut told, WakerSlot::Owner);
        for _ in 0..2 {
            reader.enters(&state, &mut io, WakerSlot::Read);
            writer.enters(&state, &mut io, WakerSlot::Write);
        }
        state.instruct(Directive::Close);
        let woken = [&reader, &writer, &owner].map(|task| task.woken());
        assert_eq!(woken, [0, 0, 1]);
        state.instruct(Directive::Cut);
        let woken = [&reader, &writer, &owner].map(|task| task.woken());
        assert_eq!(woken, [1, 1, 1]);
    }

    #[test]
    fn whoever_was_cut_before_he_wrote_was_not_cut_short() {
        let (state, task) = (
            ConnectionState::new(Directive::Stay),
            Arc::<Task>::default(),
        );
        let mut io = RegisteredWaker::default();
        task.enters(&state, &mut io, WakerSlot::Read);
        state.instruct(Directive::Cut);
        assert_eq!(
            task.enters(&state, &mut io, WakerSlot::Write),
            Directive::Cut
        );
        assert!(!state.is_cut_short());
    }

    /// The cut takes all wakers, but whoever waits for streams is not done with it.
    #[cfg(all(feature = "axum", feature = "signal"))]
    #[test]
    fn the_last_stream_wakes_after_the_cut_too() {
        let (state, task) = (
            ConnectionState::new(Directive::Stay),
            Arc::<Task>::default(),
        );
        let waker = Waker::from(Arc::clone(&task));
        let (mut stored, cx) = (RegisteredWaker::default(), &mut Context::from_waker(&waker));
        state.stream_began();
        assert!(state.poll_streams_ended(&mut stored, cx).is_pending());
        state.instruct(Directive::Cut);
        assert_eq!(task.woken(), 1);
        assert!(state.poll_streams_ended(&mut stored, cx).is_pending());
        state.stream_ended();
        assert_eq!(task.woken(), 1);
        assert!(state.poll_streams_ended(&mut stored, cx).is_ready());
    }

    /// Every way in which two tasks may take turns, against a table of who polled last as what.
    #[test]
    fn the_cut_wakes_whoever_polled_last_as_anything() {
        const TURNS: u32 = 6;
        for turns in 0..4_u32.pow(TURNS) {
            let state = ConnectionState::new(Directive::Stay);
            let tasks = [(); 2].map(|()| Arc::<Task>::default());
            let mut io = RegisteredWaker::default();
            let mut last = [None; 2];
            for turn in 0..TURNS {
                let [who, what] = [1, 2].map(|bit| (turns >> (2 * turn)) as usize & bit);
                let waiter = [WakerSlot::Read, WakerSlot::Write][what >> 1];
                tasks[who].enters(&state, &mut io, waiter);
                last[what >> 1] = Some(who);
                assert_eq!(
                    holds(&state),
                    [last[0].is_some(), last[1].is_some(), false, false]
                );
                let one = last[0] == last[1] || last.contains(&None);
                assert_eq!(is_one(&state), one);
            }
            state.instruct(Directive::Cut);
            for (who, task) in tasks.iter().enumerate() {
                let expected = usize::from(last.contains(&Some(who)));
                assert_eq!(task.woken(), expected, "{who} in {turns:#b}");
            }
        }
    }

    #[cfg(all(feature = "axum", feature = "signal"))]
    #[test]
    fn whoever_has_left_is_not_kept() {
        let state = ConnectionState::new(Directive::Stay);
        let [served, upgraded] = [(); 2].map(|()| Arc::<Task>::default());
        let (mut io, mut owner) = <(RegisteredWaker, RegisteredWaker)>::default();
        served.enters(&state, &mut owner, WakerSlot::Owner);
        served.enters(&state, &mut io, WakerSlot::Read);
        upgraded.enters(&state, &mut io, WakerSlot::Read);
        upgraded.enters(&state, &mut io, WakerSlot::Write);
        state.owner_left();
        drop(owner);
        assert_eq!(holds(&state), [true, true, false, false]);
        assert_eq!(Arc::strong_count(&served), 1);
        state.instruct(Directive::Cut);
        assert_eq!((served.woken(), upgraded.woken()), (0, 1));
    }
}
