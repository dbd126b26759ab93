//! The shards of a gate, and the operations that concern all of them.

use std::{
    ptr,
    sync::Arc,
    task::{Context, Poll},
};

use super::{
    shard::{Common, Refused, Shard},
    thread_index::thread_index,
    word::Word,
};
use crate::{
    phase::Phase,
    sync::{Ordering, lock},
};

/// The number of shards: this many threads do not share a word. A power of two. A loom model tries
/// every order of visiting them, so it uses only two.
pub(super) const SHARDS: usize = if cfg!(tower_graceful_loom) { 2 } else { 16 };

/// Requests that were refused since the gate was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Refusals {
    /// Because draining had begun.
    pub(crate) draining: usize,
    /// Because as many requests as the limit allows were in flight.
    pub(crate) full: usize,
}

/// How many requests were admitted, refused, and released without a response after Serving.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SinceServing {
    pub(crate) admitted: usize,
    pub(crate) refused: usize,
    pub(crate) dropped: usize,
}

pub(crate) struct Core<K, T> {
    shards: [Shard<T>; SHARDS],
    /// The index of the last shard in use. With a limit this is 0, because an exact limit needs a
    /// single shard.
    last: usize,
    /// The rules that hold for as long as there are requests.
    rules: K,
}

impl<K, T> Core<K, T> {
    /// `named`: every admission takes the slow path.
    pub(super) fn new(limit: Option<usize>, named: bool, rules: K) -> Self {
        let common = Arc::new(Common::new());
        Self {
            shards: std::array::from_fn(|_| Shard::new(limit, named, Arc::clone(&common))),
            last: if limit.is_some() { 0 } else { SHARDS - 1 },
            rules,
        }
    }

    /// The shard of the calling thread.
    #[inline]
    pub(super) fn shard(&self) -> &Shard<T> {
        self.nth(thread_index())
    }

    #[inline]
    pub(super) fn nth(&self, n: usize) -> &Shard<T> {
        &self.shards[n & self.last & (SHARDS - 1)]
    }

    /// The shard whose phase is the phase of the gate.
    #[inline]
    fn first(&self) -> &Shard<T> {
        &self.shards[0]
    }

    fn used(&self) -> &[Shard<T>] {
        &self.shards[..=self.last]
    }

    pub(super) fn common(&self) -> &Common<T> {
        self.first().common()
    }

    /// Distinguishes this gate from others, while its owner is alive.
    pub(crate) fn address(&self) -> usize {
        ptr::from_ref(self).addr()
    }

    /// The owner of the gate, if it is still alive.
    pub(crate) fn owner(&self) -> Option<Arc<T>> {
        self.common().owner()
    }

    /// Records that clients are asked to leave one after another. The caller has not shared the gate yet.
    pub(crate) fn spread_leaving(&self) {
        self.common().spreads_leaving.store(true, Ordering::Relaxed);
    }

    /// The rules of the gate.
    pub(crate) fn rules(&self) -> &K {
        &self.rules
    }

    pub(crate) fn phase(&self) -> Phase {
        self.first().word().phase()
    }

    /// The current phase, for code that acts on it: everything that led to the phase happens
    /// before.
    pub(crate) fn settled_phase(&self) -> Phase {
        self.first().settled_word().phase()
    }

    /// The phase and readiness of the gate, and the number of all requests in flight: point 8.
    /// `Relaxed`: point 5.
    pub(crate) fn word(&self) -> Word {
        Word::sum(self.used().iter().map(Shard::word))
    }

    /// As [`word`](Self::word), ordered after everything that the released requests did: see
    /// [`Shard::settled_word`].
    pub(crate) fn settled_word(&self) -> Word {
        Word::sum(self.used().iter().map(Shard::settled_word))
    }

    /// Counts a refusal. Exempt requests that are not admitted must not be counted here.
    pub(crate) fn refused(&self, refused: Refused) {
        let common = self.common();
        match refused {
            Refused::Draining => &common.refused_draining,
            // A stop advances the gate's phase before its report asks for this count.
            Refused::Full if self.phase() > Phase::Serving => &common.refused_full_late,
            Refused::Full => &common.refused_full,
        }
        .fetch_add(1, Ordering::Relaxed);
    }

    /// All refusals so far. `Relaxed`: these are statistics.
    pub(crate) fn refusals(&self) -> Refusals {
        let common = self.common();
        let full = common.refused_full.load(Ordering::Relaxed);
        let full_late = common.refused_full_late.load(Ordering::Relaxed);
        Refusals {
            draining: common.refused_draining.load(Ordering::Relaxed),
            full: full + full_late,
        }
    }

    /// How many pieces of responses the servers hold.
    pub(crate) fn pieces(&self) -> usize {
        self.common().pieces.load(Ordering::Relaxed)
    }

    /// Admissions, refusals and drops after Serving. `Relaxed`: these are statistics.
    pub(crate) fn since_serving(&self) -> SinceServing {
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
    pub(crate) fn poll_idle(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut slot = lock!(self.common().waiter);
        // The words are loaded under the lock: point 4 of the module header.
        let mut shards = self.used().iter();
        if shards.all(|shard| shard.settled_word().is_idle()) {
            *slot = None;
            return Poll::Ready(());
        }
        *slot = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Advances to `phase`, unless the gate has reached that phase or a later one. Returns the
    /// previous word if the phase changed. Callers must not overlap: point 7 of the module header.
    pub(crate) fn advance(&self, phase: Phase) -> Option<Word> {
        let advance = |shard: &Shard<T>| {
            shard.update(|word| (word.phase() < phase).then(|| word.with_phase(phase)))
        };
        let [first, others @ ..] = self.used() else {
            unreachable!("one shard is always used")
        };
        let others: Vec<_> = others.iter().map(advance).collect();
        // Last, because its phase is the phase of the gate: point 7.
        let first = advance(first)?;
        Some(Word::sum(
            [first].into_iter().chain(others.into_iter().flatten()),
        ))
    }

    pub(crate) fn set_ready(&self, ready: bool) {
        self.first().update(|word| Some(word.with_ready(ready)));
    }

    /// Whether a request was admitted since the flags were last cleared. `Relaxed` is enough: see
    /// `connection::outside`.
    pub(crate) fn has_admitted(&self) -> bool {
        self.used().iter().any(|shard| shard.word().has_admitted())
    }

    /// Whether a request was ever admitted.
    pub(crate) fn has_ever_admitted(&self) -> bool {
        // The flags are read first, with Acquire: `clear_admitted` sets `admitted` and then clears a
        // flag, with Release.
        self.settled_word().has_admitted() || self.common().admitted.load(Ordering::Relaxed)
    }

    /// Clears the "has admitted" flags. Calls must not overlap.
    pub(crate) fn clear_admitted(&self) {
        for shard in self.used() {
            if shard.word().has_admitted() {
                self.common().admitted.store(true, Ordering::Relaxed);
                shard.update(|word| Some(word.without_admitted()));
            }
        }
    }

    /// Records that a server has begun, a connection was tracked, or a probe has answered "ready".
    ///
    /// Writes only the first time. Every connection and every probe calls this, and a write takes
    /// the cache line away from the requests of the first shard.
    pub(crate) fn mark_served(&self) {
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
    fn the_limit_refuses_the_next_request_and_no_earlier_one() {
        let core = Core::new(Some(2), false, ());
        // With a limit, every thread uses the same shard.
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
        assert!(!core.shard().admit(), "a lame duck takes the slow path");
        assert_eq!(core.shard().admit_slow(), Ok(()));
        assert_eq!(core.word().count(), 1);
    }

    #[test]
    fn admissions_refusals_and_drops_after_serving_are_counted() {
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
        // Refusals are counted from the start, those above the limit separately.
        let refusals = Refusals {
            draining: 1,
            full: 2,
        };
        assert_eq!(core.refusals(), refusals);
        assert!(core.word().is_idle());
    }

    #[test]
    fn a_phase_never_goes_back_on_any_shard() {
        let core = Core::new(None, false, ());
        assert_eq!(core.advance(Phase::Closing), Some(Word::SERVING));
        assert_eq!(core.advance(Phase::Draining), None);
        assert_eq!(core.advance(Phase::Closing), None);
        for thread in 0..SHARDS {
            assert_eq!(core.nth(thread).word().phase(), Phase::Closing);
        }
    }

    #[test]
    fn an_advance_counts_the_requests_of_all_shards() {
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
    fn a_request_on_any_shard_sets_has_served() {
        let core = Core::new(None, false, ());
        assert!(!core.word().has_served());
        assert!(core.nth(SHARDS - 1).admit());
        core.nth(SHARDS - 1).release();
        assert!(core.word().has_served());
    }

    #[test]
    fn idle_waits_for_draining_and_for_the_last_request_of_all_shards() {
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
        assert!(!waiting.is_woken(), "one request is still in flight");
        shard.release();
        assert!(
            waiting.is_woken(),
            "the last release of a shard wakes the waiter"
        );
        assert_pending!(waiting.poll());
        other.release();
        assert!(waiting.is_woken());
        assert_ready!(waiting.poll());
    }

    #[test]
    fn releases_before_draining_do_not_wake_the_waiter() {
        let core = Core::new(None, false, ());
        let mut waiting = task::spawn(idle(&core));
        assert!(core.shard().admit());
        assert_pending!(waiting.poll());
        core.shard().release();
        assert!(!waiting.is_woken());
    }

    #[test]
    fn the_task_that_polled_last_is_woken() {
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
    fn the_waker_is_dropped_when_the_wait_is_ready() {
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
    fn mark_served_sets_has_served() {
        let core = Core::new(None, false, ());
        core.mark_served();
        assert!(core.word().has_served());
        assert_eq!(core.word().count(), 0);
        core.mark_served();
        assert!(core.word().has_served());
    }

    #[test]
    fn as_many_threads_as_there_are_shards_do_not_share_one() {
        let core = Core::new(None, false, ());
        assert_eq!(SHARDS, 16);
        for thread in 0..SHARDS {
            assert!(core.nth(thread).admit());
            for other in 0..2 * SHARDS {
                let same = other % SHARDS == thread;
                assert_eq!(core.nth(other).word().count(), usize::from(same));
            }
            core.nth(thread).release();
        }
    }

    #[test]
    fn a_shard_shares_no_cache_line_with_another() {
        assert!(size_of::<Shard<()>>() >= 128);
        assert!(align_of::<Shard<()>>() >= 128);
    }
}
