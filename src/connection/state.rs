//! The directive that a connection has been given, and the wakers of the tasks that wait for it.
//!
//! 1. *A poll sees the cut, or the cut wakes the task.* Wakers are stored, and the directive is
//!    changed, under one lock. A task stores its waker before it polls the connection. If the cut
//!    comes later, it finds the waker. If the cut came earlier, the task reads it. Models:
//!    `a_poll_sees_the_cut_or_is_woken_by_it`, `a_poll_by_another_task_is_not_lost`.
//! 2. *A task that polls again takes no lock.* Each poller remembers the waker that it has stored
//!    ([`RegisteredWaker`]). That waker stays stored until it is taken and woken. The task then stores it
//!    again in each slot that it still polls. So a task is taken as a whole, although it may be woken for
//!    one of its slots. (`forget_all` and `owner_left` remove the wakers of tasks that no longer poll.
//!    A remembered waker keeps its task in memory, so no new task can be taken for one of them.)
//!    So while the same task polls, there is nothing to store, and it only reads the directive,
//!    with `Acquire`; the partner is the `Release` in `instruct`. Models:
//!    `a_task_that_was_told_to_leave_is_woken_by_the_cut`, `a_task_whose_waker_was_taken_sees_what_it_is_woken_for`.
//! 3. *That read misses no wake-up.* The stored waker belongs to the polling task, and `instruct`
//!    changes the directive before it wakes. A wake-up before the poll orders the new directive
//!    before it; a wake-up during the poll causes another poll.
//! 4. *`waits` and `writes` are `Relaxed`.* In `waits` each poller reads only the bits that it wrote
//!    itself, or sees that its waker was taken, which is followed by a wake-up as well. [`WROTE`] is
//!    only read by the task that writes or drops the connection, and [`BLOCKED`] and [`READ`] also by the
//!    timeline, which reads them again and again.
//! 5. *The last stream that ends wakes the owner.* The owner stores its waker under the lock, and
//!    then loads the number of streams. The last stream subtracts itself, and then takes the waker
//!    under the lock. If the waker was stored before, it is woken. Otherwise the lock orders the
//!    subtraction before the load. `stream_ended` is `AcqRel`, so that the last stream is ordered
//!    after all others; its partner is the `Acquire` load in `poll_streams_ended`. A held response is
//!    released before its stream ends, so nothing but the last stream is left in the word then. Models:
//!    `the_last_stream_is_waited_for`, `the_last_stream_is_waited_for_whenever_the_cut_comes`.
//! 6. *No code of a waker runs under the lock*: it is not cloned, woken or dropped there, because it may
//!    block, or stop the service, which takes this lock too.
//!
//! The models fail if a poll reads the directive before it stores its waker, if the directive changes
//! after the wake-up, and if the cut takes the wakers and leaves the bits in `waits`. They fail if the
//! owner reads the number of streams before it stores its waker, and if the last stream copies the
//! waker before it subtracts itself.

use std::{
    mem,
    task::{Context, Waker},
};

use super::{
    directive::Directive,
    wakers::{RegisteredWaker, WakerSlot, Wakers},
};
#[cfg(all(feature = "axum", feature = "signal"))]
use crate::sync::AtomicU32;
use crate::sync::{AtomicU8, Mutex, Ordering, lock};

/// The task has written or tried to write.
const WROTE: u8 = 1;
/// The last write or flush returned `Pending`.
const BLOCKED: u8 = 2;

/// A task has read or tried to read. In one word with the bits of the [`WakerSlot`]s.
const READ: u8 = 16;

#[derive(Debug)]
pub(crate) struct ConnectionState {
    /// A [`Directive`]. Changes under the lock of the wakers.
    directive: AtomicU8,
    /// The bits [`WROTE`] and [`BLOCKED`]. Only the task that writes changes them.
    writes: AtomicU8,
    /// The slots whose stored waker is the one in their poller's [`RegisteredWaker`], and the bit
    /// [`READ`]. Changes under the lock of the wakers. Each poller reads only its own bits; the timeline reads
    /// [`READ`].
    waits: AtomicU8,
    /// The number of streams: tasks that run beside the connection's own task, and HTTP/2 responses of
    /// which the server holds bytes. In the high half, the number of those responses whose bodies have
    /// ended during the stop. In one word, because there may be very many connections. Below 65,535 such
    /// responses the word is 0 only if there are no streams, even if the low half overflows.
    #[cfg(all(feature = "axum", feature = "signal"))]
    streams: AtomicU32,
    /// The number of HTTP/2 request bodies that have not ended and that a task can still read. From 255 on it
    /// stays at 255. One byte, because there may be very many connections.
    #[cfg(all(feature = "axum", feature = "signal"))]
    uploads: AtomicU8,
    wakers: Mutex<Wakers>,
}

impl ConnectionState {
    pub(crate) fn new(directive: Directive) -> Self {
        Self {
            directive: AtomicU8::new(directive as u8),
            writes: AtomicU8::new(0),
            waits: AtomicU8::new(0),
            #[cfg(all(feature = "axum", feature = "signal"))]
            streams: AtomicU32::new(0),
            #[cfg(all(feature = "axum", feature = "signal"))]
            uploads: AtomicU8::new(0),
            wakers: Mutex::new(Wakers::default()),
        }
    }

    #[inline]
    pub(crate) fn directive(&self) -> Directive {
        // Acquire: partner of the Release in `instruct`.
        Directive::of(self.directive.load(Ordering::Acquire))
    }

    /// Registers the waker of a task that is about to poll, and returns the current directive. The
    /// task is woken by `Expire` and `Cut`; the owner is also woken by the directives from
    /// `LeaveInSlot` on, except by `Read` if it was told to leave before. The reading task is also
    /// woken by `wake_reader`, and by `Read` if there is no owner.
    #[inline]
    pub(crate) fn enter(
        &self,
        stored: &mut RegisteredWaker,
        slot: WakerSlot,
        cx: &Context<'_>,
    ) -> Directive {
        let waits = self.waits.load(Ordering::Relaxed) & slot.bit() != 0;
        if !waits || !stored.is(cx.waker()) {
            self.store(stored, slot, cx.waker());
        }
        self.directive()
    }

    #[cold]
    fn store(&self, stored: &mut RegisteredWaker, slot: WakerSlot, waker: &Waker) {
        // Cloned before the lock is taken, and dropped after it is released: point 6.
        let remembered = (!stored.is(waker)).then(|| waker.clone());
        let waker = waker.clone();
        let replaced = {
            let mut wakers = lock!(self.wakers);
            let replaced = wakers.store(slot, waker);
            let mut waits = self.waits.load(Ordering::Relaxed);
            if remembered.is_some() {
                waits &= !slot.bits_of_poller();
            }
            if slot == WakerSlot::Read {
                waits |= READ;
            }
            self.waits.store(waits | slot.bit(), Ordering::Relaxed);
            replaced
        };
        let former = remembered.and_then(|waker| stored.0.replace(waker));
        if slot == WakerSlot::Write && self.directive() < Directive::Cut {
            self.change_writes(0, WROTE);
        }
        drop((replaced, former));
    }

    /// Gives a directive. A directive that is not later than the current one changes nothing.
    pub(crate) fn instruct(&self, directive: Directive) {
        let woken = {
            let mut wakers = lock!(self.wakers);
            let former = self.directive();
            if former >= directive {
                return;
            }
            // Release: partner of the Acquire in `directive`.
            self.directive.store(directive as u8, Ordering::Release);
            let taken = match directive {
                Directive::Stay | Directive::Stopping => return,
                Directive::LeaveInSlot | Directive::Leave | Directive::Close => {
                    wakers.take(WakerSlot::Owner)
                }
                // The task of an owner reads before it closes the connection, so it only has to know that
                // it is to leave.
                Directive::Read if former >= Directive::Leave && wakers.have(WakerSlot::Owner) => {
                    return;
                }
                Directive::Read if wakers.have(WakerSlot::Owner) => wakers.take(WakerSlot::Owner),
                Directive::Read => wakers.take(WakerSlot::Read),
                Directive::Expire | Directive::Cut => mem::take(&mut *wakers),
            };
            self.wait_no_longer(taken)
        };
        woken.wake();
    }

    /// Wakes the task that reads, so that it checks what has changed elsewhere.
    pub(crate) fn wake_reader(&self) {
        self.take(|wakers| wakers.take(WakerSlot::Read)).wake();
    }

    /// Wakes every task that waits for the connection, so that it reads its directive again.
    pub(crate) fn wake_all(&self) {
        self.take(mem::take).wake();
    }

    /// Takes wakers, which the caller wakes or drops after the lock is released.
    fn take(&self, take: impl FnOnce(&mut Wakers) -> Wakers) -> Wakers {
        let mut wakers = lock!(self.wakers);
        self.wait_no_longer(take(&mut wakers))
    }

    /// Called under the lock with the wakers that are taken. A task that has more to wait for stores its
    /// waker again in the poll that the wake-up causes.
    fn wait_no_longer(&self, taken: Wakers) -> Wakers {
        let waits = self.waits.load(Ordering::Relaxed) & !taken.slots();
        self.waits.store(waits, Ordering::Relaxed);
        taken
    }

    /// Removes all wakers, as if the connection had just been opened: its next task has not polled
    /// it yet.
    #[cfg(feature = "axum")]
    pub(crate) fn forget_all(&self) {
        let forgotten = self.take(|wakers| {
            // With the bit `READ`.
            self.waits.store(0, Ordering::Relaxed);
            mem::take(wakers)
        });
        drop(forgotten);
    }

    /// Whether the connection was cut after something had been written, or tried to be. Called by
    /// the task that writes or drops the connection.
    pub(crate) fn is_cut_short(&self) -> bool {
        self.directive() == Directive::Cut && self.writes.load(Ordering::Relaxed) & WROTE != 0
    }

    /// Records whether the last write or flush was blocked.
    pub(crate) fn set_blocked(&self, blocked: bool) {
        self.change_writes(BLOCKED, if blocked { BLOCKED } else { 0 });
    }

    /// Whether the server has bytes that it could not write yet.
    pub(crate) fn is_blocked(&self) -> bool {
        self.writes.load(Ordering::Relaxed) & BLOCKED != 0
    }

    /// Not a read-modify-write: only one task writes, so no change is lost.
    fn change_writes(&self, clear: u8, set: u8) {
        let writes = self.writes.load(Ordering::Relaxed) & !clear | set;
        self.writes.store(writes, Ordering::Relaxed);
    }

    /// Whether no task has tried to read yet, and the connection was not cut.
    pub(crate) fn is_unread(&self) -> bool {
        self.directive() < Directive::Cut && self.waits.load(Ordering::Relaxed) & READ == 0
    }
}

/// One response in the high half of [`ConnectionState::streams`].
#[cfg(all(feature = "axum", feature = "signal"))]
const UNSENT: u32 = 1 << 16;

#[cfg(all(feature = "axum", feature = "signal"))]
impl ConnectionState {
    /// The number of responses whose bodies have ended during the stop, and of which the server holds bytes.
    pub(crate) fn unsent(&self) -> u32 {
        self.streams.load(Ordering::Relaxed) / UNSENT
    }

    pub(crate) fn stream_began(&self) {
        self.streams.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn stream_ended(&self) {
        // Release: partner of the Acquire in `poll_streams_ended`. Acquire: the last stream is
        // ordered after all others.
        if self.streams.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.take(|wakers| wakers.take(WakerSlot::Streams)).wake();
        }
    }

    /// The body of a response has ended, and the server holds bytes of it.
    pub(crate) fn response_is_held(&self) {
        self.streams.fetch_add(UNSENT, Ordering::Relaxed);
    }

    /// The server has sent these bytes, or has dropped them because the client has reset the stream.
    pub(crate) fn response_is_released(&self) {
        self.streams.fetch_sub(UNSENT, Ordering::Relaxed);
    }

    pub(crate) fn has_streams(&self) -> bool {
        // Acquire: partner of the Release in `stream_ended`.
        self.streams.load(Ordering::Acquire) > 0
    }

    pub(crate) fn upload_began(&self) {
        self.change_uploads(|uploads| uploads.checked_add(1));
    }

    pub(crate) fn upload_ended(&self) {
        self.change_uploads(|uploads| (uploads < u8::MAX).then(|| uploads - 1));
    }

    fn change_uploads(&self, change: impl FnMut(u8) -> Option<u8>) {
        let order = Ordering::Relaxed;
        let _ = self.uploads.fetch_update(order, order, change);
    }

    /// Whether a task may read on an upload, perhaps after its response.
    pub(crate) fn has_uploads(&self) -> bool {
        self.uploads.load(Ordering::Relaxed) > 0
    }

    /// Ready when no stream task runs any more. The end of the last one wakes the task.
    pub(crate) fn poll_streams_ended(
        &self,
        stored: &mut RegisteredWaker,
        cx: &Context<'_>,
    ) -> std::task::Poll<()> {
        self.enter(stored, WakerSlot::Streams, cx);
        if self.has_streams() {
            return std::task::Poll::Pending;
        }
        std::task::Poll::Ready(())
    }

    /// Removes the wakers of the owner's task, which has ended, from all slots: until its upgrade the
    /// connection was read and written by that task too. Otherwise an upgraded connection would keep
    /// the task in memory, for as long as its handler does not write, for example.
    pub(crate) fn owner_left(&self, cx: &Context<'_>) {
        let left = self.take(|wakers| wakers.forget(cx.waker()));
        drop(left);
    }
}

#[cfg(all(test, tower_graceful_loom))]
mod models {
    use std::{sync::Arc, task::Poll};

    use loom::{model, thread};

    use super::*;
    use crate::sync::{AtomicBool, wait};

    /// The waker is stored in the first poll; the second only reads the directive. If the wake-up
    /// could be lost, loom would find an execution that never ends.
    #[test]
    fn a_poll_sees_the_cut_or_is_woken_by_it() {
        model(|| {
            let state = Arc::new(ConnectionState::new(Directive::Stay));
            let instructing = Arc::clone(&state);
            let instructor = thread::spawn(move || instructing.instruct(Directive::Cut));
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
            instructor.join().unwrap();
        });
    }

    /// The connection changes to another task, as after an upgrade, and that task polls it while it
    /// is cut.
    #[test]
    fn a_poll_by_another_task_is_not_lost() {
        model(|| {
            let state = Arc::new(ConnectionState::new(Directive::Stay));
            let mut stored = RegisteredWaker::default();
            let noop = &Context::from_waker(Waker::noop());
            state.enter(&mut stored, WakerSlot::Read, noop);
            state.enter(&mut stored, WakerSlot::Write, noop);
            let instructing = Arc::clone(&state);
            let instructor = thread::spawn(move || instructing.instruct(Directive::Cut));
            wait(|cx| match state.enter(&mut stored, WakerSlot::Write, cx) {
                Directive::Cut => Poll::Ready(()),
                _ => Poll::Pending,
            });
            instructor.join().unwrap();
        });
    }

    /// It may be cut before it has been polled again.
    #[test]
    fn a_task_that_was_told_to_leave_is_woken_by_the_cut() {
        model(|| {
            let state = Arc::new(ConnectionState::new(Directive::Stay));
            let mut owner = RegisteredWaker::default();
            let mut instructor = None;
            wait(|cx| {
                if state.enter(&mut owner, WakerSlot::Owner, cx) == Directive::Cut {
                    return Poll::Ready(());
                }
                instructor.get_or_insert_with(|| {
                    let state = Arc::clone(&state);
                    thread::spawn(move || {
                        state.instruct(Directive::Leave);
                        state.instruct(Directive::Cut);
                    })
                });
                Poll::Pending
            });
            instructor.unwrap().join().unwrap();
        });
    }

    /// The wake-up of the reader may come when the directive has taken its waker, and has not woken it yet.
    #[test]
    fn a_task_whose_waker_was_taken_sees_what_it_is_woken_for() {
        let mut bounded = loom::model::Builder::new();
        // With three threads, the states are too many for all preemptions.
        bounded.preemption_bound = Some(3);
        bounded.check(|| {
            let state = Arc::new(ConnectionState::new(Directive::Stay));
            let changed = Arc::new(AtomicBool::new(false));
            let mut io = RegisteredWaker::default();
            let mut others = None;
            wait(|cx| {
                state.enter(&mut io, WakerSlot::Read, cx);
                if changed.load(Ordering::Relaxed) {
                    return Poll::Ready(());
                }
                others.get_or_insert_with(|| {
                    let (instructed, woken) = (Arc::clone(&state), Arc::clone(&state));
                    let changed = Arc::clone(&changed);
                    let instructor = thread::spawn(move || instructed.instruct(Directive::Read));
                    let changer = thread::spawn(move || {
                        changed.store(true, Ordering::Relaxed);
                        woken.wake_reader();
                    });
                    [instructor, changer]
                });
                Poll::Pending
            });
            for other in others.unwrap() {
                other.join().unwrap();
            }
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
            let instructor = thread::spawn(move || {
                other.instruct(Directive::Cut);
                other.stream_ended();
            });
            let mut stored = RegisteredWaker::default();
            wait(|cx| state.poll_streams_ended(&mut stored, cx));
            instructor.join().unwrap();
        });
    }
}

#[cfg(all(test, not(tower_graceful_loom)))]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering::Relaxed},
            mpsc,
        },
        task::Wake,
        thread,
        time::Duration,
    };

    use super::{super::wakers::Each, *};

    #[cfg(all(feature = "axum", feature = "signal"))]
    #[test]
    fn uploads_are_counted_up_to_a_number_that_stays() {
        for (uploads, left) in [(1, false), (254, false), (255, true), (300, true)] {
            let state = ConnectionState::new(Directive::Stay);
            (0..uploads).for_each(|_| state.upload_began());
            assert!(state.has_uploads());
            (0..uploads).for_each(|_| state.upload_ended());
            assert_eq!(state.has_uploads(), left, "{uploads}");
        }
    }

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

        /// Polls the connection as this task, and returns the directive.
        fn enters(
            self: &Arc<Self>,
            state: &ConnectionState,
            stored: &mut RegisteredWaker,
            slot: WakerSlot,
        ) -> Directive {
            let waker = Waker::from(Arc::clone(self));
            state.enter(stored, slot, &Context::from_waker(&waker))
        }
    }

    fn holds(state: &ConnectionState) -> Each<bool> {
        let wakers = lock!(state.wakers);
        WakerSlot::ALL.map(|slot| wakers.have(slot))
    }

    fn is_one(state: &ConnectionState) -> bool {
        matches!(*lock!(state.wakers), Wakers::One(Some(_)))
    }

    #[test]
    fn a_task_that_does_all_the_waiting_is_woken_once_by_the_cut() {
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
        state.instruct(Directive::LeaveInSlot);
        assert_eq!(task.woken(), 1);
        assert_eq!(holds(&state), [false; 4]);
        assert_eq!(
            task.enters(&state, &mut owner, WakerSlot::Owner),
            Directive::Leave
        );
        state.instruct(Directive::Close);
        assert_eq!(task.woken(), 1);
        assert!(!state.is_cut_short() && !state.is_unread());
        task.enters(&state, &mut io, WakerSlot::Write);
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
        let (mut io, mut registered) = <(RegisteredWaker, RegisteredWaker)>::default();
        owner.enters(&state, &mut registered, WakerSlot::Owner);
        for _ in 0..2 {
            reader.enters(&state, &mut io, WakerSlot::Read);
            writer.enters(&state, &mut io, WakerSlot::Write);
        }
        state.instruct(Directive::Close);
        let woken = [&reader, &writer, &owner].map(|task| task.woken());
        assert_eq!(woken, [0, 0, 1]);
        owner.enters(&state, &mut registered, WakerSlot::Owner);
        state.instruct(Directive::Cut);
        let woken = [&reader, &writer, &owner].map(|task| task.woken());
        assert_eq!(woken, [1, 1, 1]);
    }

    #[test]
    fn a_connection_cut_before_its_first_write_is_not_cut_short() {
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

    /// The cut takes all wakers, but a task that waits for streams still waits afterwards.
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

    /// A task is woken with all its slots, and the others still wait.
    #[test]
    fn a_task_that_is_woken_stores_its_waker_again() {
        use WakerSlot::{Owner, Read, Streams, Write};
        let state = ConnectionState::new(Directive::Stay);
        let tasks = [(); 4].map(|()| Arc::<Task>::default());
        let [mut io, mut owner] = [(); 2].map(|()| RegisteredWaker::default());
        let slots = [Read, Write, Owner, Streams];
        for (task, slot) in tasks.iter().zip(slots) {
            let stored = match slot {
                Read | Write => &mut io,
                Owner | Streams => &mut owner,
            };
            task.enters(&state, stored, slot);
        }
        assert_eq!(holds(&state), [true; 4]);
        let woken = || tasks.each_ref().map(|task| task.woken());
        state.wake_reader();
        assert_eq!(woken(), [1, 0, 0, 0]);
        state.wake_reader();
        assert_eq!(woken(), [0; 4]);
        assert_eq!(holds(&state), [false, true, true, true]);

        // The task of the owner reads too.
        tasks[2].enters(&state, &mut io, Read);
        tasks[2].enters(&state, &mut owner, Owner);
        state.instruct(Directive::Leave);
        assert_eq!(woken(), [0, 0, 1, 0]);
        assert_eq!(holds(&state), [false, true, false, true]);
        for (slot, stored) in [(Read, &mut io), (Owner, &mut owner)] {
            assert_eq!(tasks[2].enters(&state, stored, slot), Directive::Leave);
        }
        assert_eq!(holds(&state), [true; 4]);
        state.instruct(Directive::Read);
        assert_eq!(woken(), [0; 4], "the owner has been told to leave");
        state.instruct(Directive::Cut);
        assert_eq!(woken(), [0, 1, 1, 1]);
        assert_eq!(holds(&state), [false; 4]);
    }

    #[test]
    fn the_reader_is_woken_to_read_once_more_unless_there_is_an_owner() {
        for (former, has_owner, woken) in [
            (Directive::Stay, false, [1, 0]),
            (Directive::Leave, false, [1, 0]),
            (Directive::Stay, true, [0, 1]),
            (Directive::Leave, true, [0, 0]),
        ] {
            let state = ConnectionState::new(former);
            let [reader, owner] = [(); 2].map(|()| Arc::<Task>::default());
            let [mut io, mut registered] = [(); 2].map(|()| RegisteredWaker::default());
            reader.enters(&state, &mut io, WakerSlot::Read);
            if has_owner {
                owner.enters(&state, &mut registered, WakerSlot::Owner);
            }
            state.instruct(Directive::Read);
            assert_eq!(
                [reader.woken(), owner.woken()],
                woken,
                "{former:?} {has_owner}"
            );
        }
    }

    #[test]
    fn a_task_that_polls_again_takes_no_lock() {
        let (state, task) = (
            ConnectionState::new(Directive::Stay),
            Arc::<Task>::default(),
        );
        let mut io = RegisteredWaker::default();
        task.enters(&state, &mut io, WakerSlot::Read);
        let (send, entered) = mpsc::channel();
        thread::scope(|scope| {
            let held = lock!(state.wakers);
            scope.spawn(|| {
                let _ = send.send(task.enters(&state, &mut io, WakerSlot::Read));
            });
            let entered = entered.recv_timeout(Duration::from_secs(10));
            drop(held);
            assert_eq!(entered, Ok(Directive::Stay));
        });
    }

    #[cfg(feature = "axum")]
    #[test]
    fn a_connection_whose_wakers_are_forgotten_is_as_if_it_had_just_been_opened() {
        let (state, task) = (
            ConnectionState::new(Directive::Stay),
            Arc::<Task>::default(),
        );
        task.enters(&state, &mut RegisteredWaker::default(), WakerSlot::Read);
        assert!(!state.is_unread());
        state.forget_all();
        assert!(state.is_unread());
        assert_eq!((holds(&state), Arc::strong_count(&task)), ([false; 4], 1));
    }

    #[test]
    fn a_connection_that_is_cut_is_not_unread() {
        assert!(ConnectionState::new(Directive::Expire).is_unread());
        assert!(!ConnectionState::new(Directive::Cut).is_unread());
    }

    /// The timeline asks for every connection, under locks of its own.
    #[test]
    fn whether_a_connection_was_read_is_known_without_its_lock() {
        let state = ConnectionState::new(Directive::Stay);
        let (send, asked) = mpsc::channel();
        thread::scope(|scope| {
            let held = lock!(state.wakers);
            scope.spawn(|| {
                let _ = send.send(state.is_unread());
            });
            let asked = asked.recv_timeout(Duration::from_secs(10));
            drop(held);
            assert_eq!(asked, Ok(true));
        });
    }

    /// All sequences in which two tasks may poll for reading and writing, compared with a table of
    /// the task that polled last for each.
    #[test]
    fn the_cut_wakes_the_last_poller_of_each_slot() {
        const POLLS: u32 = 6;
        for sequence in 0..4_u32.pow(POLLS) {
            let state = ConnectionState::new(Directive::Stay);
            let tasks = [(); 2].map(|()| Arc::<Task>::default());
            let mut io = RegisteredWaker::default();
            let mut last = [None; 2];
            for poll in 0..POLLS {
                let [index, kind] = [1, 2].map(|bit| (sequence >> (2 * poll)) as usize & bit);
                let slot = [WakerSlot::Read, WakerSlot::Write][kind >> 1];
                tasks[index].enters(&state, &mut io, slot);
                last[kind >> 1] = Some(index);
                assert_eq!(
                    holds(&state),
                    [last[0].is_some(), last[1].is_some(), false, false]
                );
                let one = last[0] == last[1] || last.contains(&None);
                assert_eq!(is_one(&state), one);
            }
            state.instruct(Directive::Cut);
            for (index, task) in tasks.iter().enumerate() {
                let expected = usize::from(last.contains(&Some(index)));
                assert_eq!(task.woken(), expected, "task {index} in {sequence:#b}");
            }
        }
    }

    #[cfg(all(feature = "axum", feature = "signal"))]
    #[test]
    fn the_wakers_of_an_owner_that_is_gone_are_dropped() {
        use WakerSlot::{Owner, Read, Streams, Write};
        // Where the handler of the upgraded connection polls before the owner is gone, and after it.
        for (before, after) in [
            (&[][..], &[Read][..]),
            (&[Read], &[]),
            (&[Write], &[]),
            (&[Read, Write], &[]),
            (&[], &[Write]),
        ] {
            let state = ConnectionState::new(Directive::Stay);
            let [served, upgraded] = [(); 2].map(|()| Arc::<Task>::default());
            let (mut io, mut owner) = <(RegisteredWaker, RegisteredWaker)>::default();
            served.enters(&state, &mut owner, Owner);
            served.enters(&state, &mut io, Read);
            served.enters(&state, &mut io, Write);
            served.enters(&state, &mut owner, Streams);
            for slot in before {
                upgraded.enters(&state, &mut io, *slot);
            }
            let waker = Waker::from(Arc::clone(&served));
            state.owner_left(&Context::from_waker(&waker));
            drop((owner, waker));
            for slot in after {
                upgraded.enters(&state, &mut io, *slot);
            }
            let [reads, writes] = [Read, Write].map(|it| [before, after].concat().contains(&it));
            assert_eq!(
                holds(&state),
                [reads, writes, false, false],
                "{before:?} {after:?}"
            );
            assert!(!state.is_unread());
            assert_eq!(Arc::strong_count(&served), 1, "{before:?} {after:?}");
            state.instruct(Directive::Cut);
            assert_eq!((served.woken(), upgraded.woken()), (0, 1));
        }
    }
}
