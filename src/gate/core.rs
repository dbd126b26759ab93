//! The word, the limit and the waiter's slot: the operations the module header argues about.

use std::task::{Context, Poll, Waker};

use super::word::Word;
use crate::{
    phase::Phase,
    sync::{AtomicUsize, Mutex, Ordering, lock},
};

/// Why a request was not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Draining has begun.
    Draining,
    /// As many requests as the limit allows are in flight.
    Full,
}

/// On a cache line of its own, so that admissions do not evict what everybody only reads.
#[derive(Debug)]
#[repr(align(64))]
pub(super) struct Core {
    word: AtomicUsize,
    /// The least word above the limit.
    full: Word,
    waiter: Mutex<Option<Waker>>,
    /// Admissions and refusals after the first phase.
    late: AtomicUsize,
    refused: AtomicUsize,
}

impl Core {
    pub(super) fn new(limit: Option<usize>, named: bool) -> Self {
        Self {
            word: AtomicUsize::new(Word::SERVING.named(named).0),
            full: Word::full(limit.unwrap_or(Word::MAX_COUNT).min(Word::MAX_COUNT)),
            waiter: Mutex::new(None),
            late: AtomicUsize::new(0),
            refused: AtomicUsize::new(0),
        }
    }

    /// A snapshot for headers, probes and figures. `Relaxed`: point 5 of the module header.
    #[inline]
    pub(super) fn word(&self) -> Word {
        Word(self.word.load(Ordering::Relaxed))
    }

    /// Lets one in, if there is nothing to it but to count. Whoever is let in calls
    /// [`release`](Self::release) once. Whoever is not asks [`admit_specially`](Self::admit_specially).
    #[inline]
    pub(super) fn admit(&self) -> bool {
        let mut word = self.word();
        loop {
            if !word.is_below(self.full) {
                return false;
            }
            match self.add_one(word) {
                Ok(_) => return true,
                Err(current) => word = Word(current),
            }
        }
    }

    /// Lets one in, in any phase that lets anybody in, or says why not.
    #[cold]
    pub(super) fn admit_specially(&self) -> Result<(), Refused> {
        let mut word = self.word();
        loop {
            if word.refuses() {
                return Err(Refused::Draining);
            }
            if word.count() >= self.full.count() {
                return Err(Refused::Full);
            }
            match self.add_one(word) {
                Ok(_) => {
                    if word.phase() > Phase::Serving {
                        self.late.fetch_add(1, Ordering::Relaxed);
                    }
                    return Ok(());
                }
                Err(current) => word = Word(current),
            }
        }
    }

    /// Notes a refusal. Not all who are not let in are refused.
    pub(super) fn refused(&self) {
        if self.word().phase() > Phase::Serving {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// `Relaxed`: points 1 and 2 of the module header.
    #[inline]
    fn add_one(&self, word: Word) -> Result<usize, usize> {
        self.word.compare_exchange_weak(
            word.0,
            word.plus_one().0,
            Ordering::Relaxed,
            Ordering::Relaxed,
        )
    }

    /// How many were let in, and how many refused, after the first phase. `Relaxed`: figures.
    pub(super) fn since_serving(&self) -> (usize, usize) {
        (
            self.late.load(Ordering::Relaxed),
            self.refused.load(Ordering::Relaxed),
        )
    }

    /// Lets one out.
    #[inline]
    pub(super) fn release(&self) {
        // Release: partner of the Acquire load in `poll_idle`.
        let before = Word(self.word.fetch_sub(Word::ONE, Ordering::Release));
        debug_assert!(before.count() > 0, "released more than was admitted");
        if before.refuses() {
            self.left_a_drain(before);
        }
    }

    /// Outlined, for all that it is: in most releases nothing drains.
    #[cold]
    #[inline(never)]
    fn left_a_drain(&self, before: Word) {
        if before.count() == 1 {
            self.last_one_out();
        }
    }

    fn last_one_out(&self) {
        let waker = lock!(self.waiter).take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Ready once draining has begun and nothing is in flight. One task waits at a time.
    pub(super) fn poll_idle(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut slot = lock!(self.waiter);
        // Acquire: partner of the Release in `release`. Under the lock: point 4.
        if Word(self.word.load(Ordering::Acquire)).is_idle() {
            *slot = None;
            return Poll::Ready(());
        }
        match &mut *slot {
            Some(waker) => waker.clone_from(cx.waker()),
            empty => *empty = Some(cx.waker().clone()),
        }
        Poll::Pending
    }

    /// A snapshot by which to decide that a phase has come, or that all is over: what led to it,
    /// and what the requests did that have left, happens before it.
    pub(super) fn settled_word(&self) -> Word {
        // Acquire: partner of the Release in `release` and in `update`.
        Word(self.word.load(Ordering::Acquire))
    }

    /// Moves on to `phase`, unless that phase or a later one has been reached. Returns the word
    /// it moved on from, if it did.
    pub(super) fn advance(&self, phase: Phase) -> Option<Word> {
        self.update(|word| (word.phase() < phase).then(|| word.with_phase(phase)))
    }

    pub(super) fn set_ready(&self, ready: bool) {
        self.update(|word| Some(word.with_ready(ready)));
    }

    pub(super) fn mark_served(&self) {
        self.update(|word| (!word.has_served()).then(|| word.served()));
    }

    fn update(&self, change: impl Fn(Word) -> Option<Word>) -> Option<Word> {
        // Release: partner of the Acquire load in `settled_word`, point 6 of the module header.
        self.word
            .fetch_update(Ordering::Release, Ordering::Relaxed, |word| {
                change(Word(word)).map(|word| word.0)
            })
            .ok()
            .map(Word)
    }
}

#[cfg(all(test, not(tower_graceful_loom)))]
mod tests {
    use tokio_test::{assert_pending, assert_ready, task};

    use super::*;

    fn idle(core: &Core) -> impl Future<Output = ()> + '_ {
        std::future::poll_fn(|cx| core.poll_idle(cx))
    }

    #[test]
    fn the_limit_refuses_the_next_one_and_no_earlier() {
        let core = Core::new(Some(2), false);
        assert!(core.admit());
        assert!(core.admit());
        assert!(!core.admit());
        assert_eq!(core.admit_specially(), Err(Refused::Full));
        assert_eq!(core.word().count(), 2);
        core.release();
        assert!(core.admit());
    }

    #[test]
    fn draining_refuses_before_full_does() {
        let core = Core::new(Some(1), false);
        assert!(core.admit());
        core.advance(Phase::Draining);
        assert!(!core.admit());
        assert_eq!(core.admit_specially(), Err(Refused::Draining));
    }

    #[test]
    fn a_lame_duck_still_admits() {
        let core = Core::new(None, false);
        core.advance(Phase::LameDuck);
        assert!(!core.admit(), "there is more to it than to count");
        assert_eq!(core.admit_specially(), Ok(()));
        assert_eq!(core.word().count(), 1);
    }

    #[test]
    fn what_is_admitted_and_refused_after_serving_is_counted() {
        let core = Core::new(Some(2), true);
        core.admit_specially().unwrap();
        core.refused();
        assert_eq!(core.since_serving(), (0, 0));
        core.advance(Phase::LameDuck);
        core.admit_specially().unwrap();
        core.refused();
        core.advance(Phase::Draining);
        core.refused();
        assert_eq!(core.since_serving(), (1, 2));
    }

    #[test]
    fn a_phase_never_goes_back() {
        let core = Core::new(None, false);
        assert_eq!(core.advance(Phase::Closing), Some(Word::SERVING));
        assert_eq!(core.advance(Phase::Draining), None);
        assert_eq!(core.advance(Phase::Closing), None);
        assert_eq!(core.word().phase(), Phase::Closing);
    }

    #[test]
    fn idle_waits_for_draining_and_for_the_last_one() {
        let core = Core::new(None, false);
        let mut waiting = task::spawn(idle(&core));
        assert!(core.admit());
        assert!(core.admit());
        assert_pending!(waiting.poll());
        core.release();
        assert!(core.admit());
        core.advance(Phase::Draining);
        assert_pending!(waiting.poll());
        core.release();
        assert!(!waiting.is_woken(), "one is still in flight");
        core.release();
        assert!(waiting.is_woken(), "the last one out wakes the waiter");
        assert_ready!(waiting.poll());
    }

    #[test]
    fn releases_before_draining_wake_nobody() {
        let core = Core::new(None, false);
        let mut waiting = task::spawn(idle(&core));
        assert!(core.admit());
        assert_pending!(waiting.poll());
        core.release();
        assert!(!waiting.is_woken());
    }
}
