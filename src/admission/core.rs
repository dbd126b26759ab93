//! The lanes of a gate, and what concerns all of them.

use std::{
    sync::Arc,
    task::{Context, Poll},
};

use super::{
    shard::{Common, Refused, Shard},
    thread_index::here,
    word::Word,
};
use crate::{
    phase::Phase,
    sync::{Ordering, lock},
};

/// As many threads as this do not meet. A power of two; few in a model, which tries every order in
/// which they can be visited.
pub(super) const SHARDS: usize = if cfg!(tower_graceful_loom) { 2 } else { 16 };

/// How many refusals may read the bodies of their requests at the same time.
const READERS: usize = 128;

/// Requests that were refused since the gate was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Refusals {
    /// Because draining had begun.
    pub(crate) draining: usize,
    /// Because as many requests as the limit allows were in flight.
    pub(crate) full: usize,
}

/// How many requests were let in, refused, and released without a response, after the first phase.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SinceServing {
    pub(crate) admitted: usize,
    pub(crate) refused: usize,
    pub(crate) dropped: usize,
}

pub(super) struct Core<K, S> {
    shards: [Shard<K, S>; SHARDS],
    /// How many of them are used, less one: where there is a limit, one is, so that it is exact.
    last: usize,
}

impl<K, S> Core<K, S> {
    /// `named`: every admission is to be a special one.
    pub(super) fn new(limit: Option<usize>, named: bool, rules: K) -> Self {
        let common = Arc::new(Common::new(rules));
        Self {
            shards: std::array::from_fn(|_| Shard::new(limit, named, Arc::clone(&common))),
            last: if limit.is_some() { 0 } else { SHARDS - 1 },
        }
    }

    /// The lane of this thread.
    #[inline]
    pub(super) fn shard(&self) -> &Shard<K, S> {
        self.nth(here())
    }

    #[inline]
    pub(super) fn nth(&self, n: usize) -> &Shard<K, S> {
        &self.shards[n & self.last & (SHARDS - 1)]
    }

    /// The one whose phase is the gate's.
    #[inline]
    fn first(&self) -> &Shard<K, S> {
        &self.shards[0]
    }

    fn used(&self) -> &[Shard<K, S>] {
        &self.shards[..=self.last]
    }

    pub(super) fn common(&self) -> &Common<K, S> {
        self.first().common()
    }

    pub(super) fn phase(&self) -> Phase {
        self.first().word().phase()
    }

    pub(super) fn settled_phase(&self) -> Phase {
        self.first().settled_word().phase()
    }

    /// The phase and readiness of the gate, and all who are in flight: point 8. `Relaxed`: point 5.
    pub(super) fn word(&self) -> Word {
        Word::sum(self.used().iter().map(Shard::word))
    }

    /// As [`word`](Self::word), to decide by: see [`Shard::settled_word`].
    pub(super) fn settled_word(&self) -> Word {
        Word::sum(self.used().iter().map(Shard::settled_word))
    }

    /// Counts a refusal. An exempt request is not admitted, and not refused either.
    pub(super) fn refused(&self, refused: Refused) {
        let common = self.common();
        match refused {
            Refused::Draining => &common.refused_draining,
            // A stop advances the gate's phase before its report asks for this count.
            Refused::Full if self.phase() > Phase::Serving => &common.refused_full_late,
            Refused::Full => &common.refused_full,
        }
        .fetch_add(1, Ordering::Relaxed);
    }

    /// All refusals so far. `Relaxed`: figures.
    pub(super) fn refusals(&self) -> Refusals {
        let common = self.common();
        let full = common.refused_full.load(Ordering::Relaxed);
        let full_late = common.refused_full_late.load(Ordering::Relaxed);
        Refusals {
            draining: common.refused_draining.load(Ordering::Relaxed),
            full: full + full_late,
        }
    }

    /// Whether one more refusal may read its request's body. Then [`end_reading`](Self::end_reading)
    /// follows. `Relaxed`: it bounds a number, and publishes nothing.
    pub(super) fn begin_reading(&self) -> bool {
        let one_more = |readers| (readers < READERS).then_some(readers + 1);
        self.common()
            .readers
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more)
            .is_ok()
    }

    pub(super) fn end_reading(&self) {
        self.common().readers.fetch_sub(1, Ordering::Relaxed);
    }

    /// How many pieces of responses servers hold.
    pub(super) fn pieces(&self) -> usize {
        self.common().pieces.load(Ordering::Relaxed)
    }

    /// What has happened after the first phase. `Relaxed`: figures.
    pub(super) fn since_serving(&self) -> SinceServing {
        let common = self.common();
        let draining = common.refused_draining.load(Ordering::Relaxed);
        let full = common.refused_full_late.load(Ordering::Relaxed);
        SinceServing {
            admitted: common.late.load(Ordering::Relaxed),
            refused: draining + full,
            dropped: common.dropped.load(Ordering::Relaxed),
        }
    }

    /// Ready once draining has begun and nothing is in flight. One task waits at a time.
    pub(super) fn poll_idle(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut slot = lock!(self.common().waiter);
        // Under the lock: point 4.
        let mut shards = self.used().iter();
        if shards.all(|shard| shard.settled_word().is_idle()) {
            *slot = None;
            return Poll::Ready(());
        }
        match &mut *slot {
            Some(waker) => waker.clone_from(cx.waker()),
            empty => *empty = Some(cx.waker().clone()),
        }
        Poll::Pending
    }

    /// Moves on to `phase`, unless that phase or a later one has been reached. Returns the word
    /// it moved on from, if it did. One at a time: point 7.
    pub(super) fn advance(&self, phase: Phase) -> Option<Word> {
        let advance = |shard: &Shard<K, S>| {
            shard.update(|word| (word.phase() < phase).then(|| word.with_phase(phase)))
        };
        let [first, others @ ..] = self.used() else {
            unreachable!("one is always used")
        };
        let others: Vec<_> = others.iter().map(advance).collect();
        // Last, because its phase is the gate's.
        let first = advance(first)?;
        Some(Word::sum(
            [first].into_iter().chain(others.into_iter().flatten()),
        ))
    }

    pub(super) fn set_ready(&self, ready: bool) {
        self.first().update(|word| Some(word.with_ready(ready)));
    }

    /// Whether a request was admitted since the flags were last cleared. `Relaxed`: see `outside`.
    pub(super) fn has_admitted(&self) -> bool {
        self.used().iter().any(|shard| shard.word().has_admitted())
    }

    /// Whether a request was ever admitted.
    pub(super) fn has_ever_admitted(&self) -> bool {
        // In this order: what is cleared is noted before.
        self.has_admitted() || self.common().admitted.load(Ordering::Acquire)
    }

    /// Clears the flags. One at a time.
    pub(super) fn clear_admitted(&self) {
        if self.has_admitted() {
            self.common().admitted.store(true, Ordering::Release);
        }
        for shard in self.used() {
            shard.update(|word| word.has_admitted().then(|| word.without_admitted()));
        }
    }

    /// Writes only the first time. Every connection and every probe calls this, and a write takes the
    /// cache line from the requests of that lane.
    pub(super) fn mark_served(&self) {
        self.first()
            .update(|word| (!word.has_served()).then(|| word.served()));
    }
}

#[cfg(all(test, not(tower_graceful_loom)))]
mod tests {
    use tokio_test::{assert_pending, assert_ready, task};

    use super::*;

    type Core = super::Core<(), ()>;

    fn idle(core: &Core) -> impl Future<Output = ()> + '_ {
        std::future::poll_fn(|cx| core.poll_idle(cx))
    }

    #[test]
    fn the_limit_refuses_the_next_one_and_no_earlier() {
        let core = Core::new(Some(2), false, ());
        // Whatever the thread.
        let [shard, other] = [1, 2].map(|thread| core.nth(thread));
        assert!(shard.admit());
        assert!(other.admit());
        assert!(!shard.admit());
        assert_eq!(shard.admit_slow(), Err(Refused::Full));
        assert_eq!(core.word().count(), 2);
        shard.release();
        assert!(other.admit());
    }

    #[test]
    fn draining_refuses_before_full_does() {
        let core = Core::new(Some(1), false, ());
        assert!(core.shard().admit());
        core.advance(Phase::Draining);
        assert!(!core.shard().admit());
        assert_eq!(core.shard().admit_slow(), Err(Refused::Draining));
    }

    #[test]
    fn a_lame_duck_still_admits() {
        let core = Core::new(None, false, ());
        core.advance(Phase::LameDuck);
        assert!(!core.shard().admit(), "there is more to it than to count");
        assert_eq!(core.shard().admit_slow(), Ok(()));
        assert_eq!(core.word().count(), 1);
    }

    #[test]
    fn what_is_admitted_refused_and_dropped_after_serving_is_counted() {
        let core = Core::new(Some(3), true, ());
        core.shard().admit_slow().unwrap();
        core.shard().admit_slow().unwrap();
        core.shard().admit_slow().unwrap();
        core.refused(Refused::Full);
        core.shard().release_unanswered();
        assert_eq!(core.since_serving(), SinceServing::default());
        assert_eq!(core.word().count(), 2);
        core.advance(Phase::LameDuck);
        core.shard().admit_slow().unwrap();
        core.refused(Refused::Full);
        core.shard().release_unanswered();
        core.advance(Phase::Draining);
        core.refused(Refused::Draining);
        core.shard().release_unanswered();
        core.shard().release();
        let since_serving = SinceServing {
            admitted: 1,
            refused: 2,
            dropped: 2,
        };
        assert_eq!(core.since_serving(), since_serving);
        // From the start, those of the limit apart.
        let refusals = Refusals {
            draining: 1,
            full: 2,
        };
        assert_eq!(core.refusals(), refusals);
        assert!(core.word().is_idle());
    }

    #[test]
    fn so_many_read_at_the_same_time_and_no_more() {
        let core = Core::new(None, false, ());
        for _ in 0..READERS {
            assert!(core.begin_reading());
        }
        assert!(!core.begin_reading());
        core.end_reading();
        assert!(core.begin_reading());
        assert!(!core.begin_reading());
    }

    #[test]
    fn a_phase_never_goes_back_on_any_lane() {
        let core = Core::new(None, false, ());
        assert_eq!(core.advance(Phase::Closing), Some(Word::SERVING));
        assert_eq!(core.advance(Phase::Draining), None);
        assert_eq!(core.advance(Phase::Closing), None);
        for thread in 0..SHARDS {
            assert_eq!(core.nth(thread).word().phase(), Phase::Closing);
        }
    }

    #[test]
    fn all_lanes_are_counted_when_a_phase_comes() {
        let core = Core::new(None, false, ());
        for thread in 0..2 * SHARDS {
            assert!(core.nth(thread).admit());
        }
        assert_eq!(core.word().count(), 2 * SHARDS);
        let before = core.advance(Phase::LameDuck).unwrap();
        assert_eq!(before.count(), 2 * SHARDS);
        assert_eq!(before.phase(), Phase::Serving);
        assert!(before.has_served());
        assert_eq!(core.settled_word().phase(), Phase::LameDuck);
    }

    #[test]
    fn whoever_was_served_on_any_lane_was_served() {
        let core = Core::new(None, false, ());
        assert!(!core.word().has_served());
        assert!(core.nth(SHARDS - 1).admit());
        core.nth(SHARDS - 1).release();
        assert!(core.word().has_served());
    }

    #[test]
    fn idle_waits_for_draining_and_for_the_last_one_of_all_lanes() {
        let core = Core::new(None, false, ());
        let mut waiting = task::spawn(idle(&core));
        let [shard, other] = [0, 1].map(|thread| core.nth(thread));
        assert!(shard.admit());
        assert!(other.admit());
        assert_pending!(waiting.poll());
        shard.release();
        assert!(shard.admit());
        assert!(shard.admit());
        core.advance(Phase::Draining);
        assert_pending!(waiting.poll());
        shard.release();
        assert!(!waiting.is_woken(), "one is still in flight");
        shard.release();
        assert!(waiting.is_woken(), "the last of a shard wakes the waiter");
        assert_pending!(waiting.poll());
        other.release();
        assert!(waiting.is_woken());
        assert_ready!(waiting.poll());
    }

    #[test]
    fn releases_before_draining_wake_nobody() {
        let core = Core::new(None, false, ());
        let mut waiting = task::spawn(idle(&core));
        assert!(core.shard().admit());
        assert_pending!(waiting.poll());
        core.shard().release();
        assert!(!waiting.is_woken());
    }

    #[test]
    fn it_waits_for_whoever_polled_last() {
        let core = Core::new(None, false, ());
        assert!(core.shard().admit());
        core.advance(Phase::Draining);
        let [mut first, mut last] = [(); 2].map(|()| task::spawn(idle(&core)));
        assert_pending!(first.poll());
        assert_pending!(last.poll());
        core.shard().release();
        assert!(last.is_woken());
        assert!(!first.is_woken());
        assert_ready!(last.poll());
    }

    #[test]
    fn nothing_is_kept_of_a_task_that_has_seen_it_idle() {
        struct Nothing;

        impl std::task::Wake for Nothing {
            fn wake(self: std::sync::Arc<Self>) {}
        }

        let core = Core::new(None, false, ());
        let nothing = std::sync::Arc::new(Nothing);
        let waker = nothing.clone().into();
        let mut cx = Context::from_waker(&waker);
        assert_pending!(core.poll_idle(&mut cx));
        assert_eq!(std::sync::Arc::strong_count(&nothing), 3);
        core.advance(Phase::Draining);
        assert_ready!(core.poll_idle(&mut cx));
        assert_eq!(std::sync::Arc::strong_count(&nothing), 2);
    }

    #[test]
    fn what_is_marked_as_served_was_served() {
        let core = Core::new(None, false, ());
        core.mark_served();
        assert!(core.word().has_served());
        assert_eq!(core.word().count(), 0);
        core.mark_served();
        assert!(core.word().has_served());
    }

    #[test]
    fn as_many_threads_as_there_are_lanes_do_not_meet() {
        let core = Core::new(None, false, ());
        assert_eq!(SHARDS, 16);
        for thread in 0..SHARDS {
            assert!(core.nth(thread).admit());
            for other in 0..2 * SHARDS {
                let met = other % SHARDS == thread;
                assert_eq!(core.nth(other).word().count(), usize::from(met));
            }
            core.nth(thread).release();
        }
    }

    #[test]
    fn a_lane_shares_no_cache_line_with_another() {
        assert!(size_of::<Shard<(), ()>>() >= 128);
        assert!(align_of::<Shard<(), ()>>() >= 128);
    }
}
