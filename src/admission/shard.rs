//! One word and its operations. The header of `mod.rs` has the argument that they are right.

use std::{
    sync::{Arc, Weak},
    task::Waker,
};

use super::word::Word;
use crate::{
    phase::Phase,
    sync::{AtomicBool, AtomicUsize, Mutex, Ordering, lock},
};

/// Why a request was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Draining has begun.
    Draining,
    /// As many requests as the limit allows are in flight.
    Full,
}

impl Refused {
    /// The phase that this refusal proves, even if other shards still show an earlier one.
    pub(crate) fn least_phase(self) -> Phase {
        match self {
            Self::Draining => Phase::Draining,
            Self::Full => Phase::Serving,
        }
    }
}

/// State that the shards of a gate share. In Serving, a request touches it only if it is refused or
/// named, or if its last frame is large.
pub(super) struct Common<T> {
    pub(super) waiter: Mutex<Option<Waker>>,
    /// Admissions after Serving.
    pub(super) late: AtomicUsize,
    /// Refusals because draining had begun.
    pub(super) refused_draining: AtomicUsize,
    /// Refusals above the limit in Serving, and (`_late`) after it.
    pub(super) refused_full: AtomicUsize,
    pub(super) refused_full_late: AtomicUsize,
    /// Releases without a response after Serving.
    pub(super) dropped: AtomicUsize,
    /// Pieces of responses that the servers hold.
    pub(super) pieces: AtomicUsize,
    /// A request was admitted before the flags of the shards were last cleared.
    pub(super) admitted: AtomicBool,
    /// Refusals that are reading the bodies of their requests.
    pub(super) readers: AtomicUsize,
    /// Responses in the lame-duck phase ask their clients to leave one after another. Set before there are
    /// requests.
    pub(super) spreads_leaving: AtomicBool,
    /// The owner of the gate, while it is alive.
    pub(super) owner: Mutex<Weak<T>>,
}

impl<T> Common<T> {
    pub(super) fn new() -> Self {
        Self {
            waiter: Mutex::new(None),
            late: AtomicUsize::new(0),
            refused_draining: AtomicUsize::new(0),
            refused_full: AtomicUsize::new(0),
            refused_full_late: AtomicUsize::new(0),
            dropped: AtomicUsize::new(0),
            pieces: AtomicUsize::new(0),
            admitted: AtomicBool::new(false),
            readers: AtomicUsize::new(0),
            spreads_leaving: AtomicBool::new(false),
            owner: Mutex::new(Weak::new()),
        }
    }

    #[cold]
    pub(super) fn owner(&self) -> Option<Arc<T>> {
        lock!(self.owner).upgrade()
    }
}

/// Aligned to two cache lines, because processors fetch them in pairs. In Serving, only a body that
/// ends on another thread, a snapshot, a probe and a new connection use the lines of another thread.
#[repr(align(128))]
pub(super) struct Shard<T> {
    word: AtomicUsize,
    /// The least word in which an admission takes the slow path: see [`Word::full`]. Stored next to
    /// the word, so that an admission touches no other cache line.
    full: Word,
    common: Arc<Common<T>>,
}

impl<T> Shard<T> {
    pub(super) fn new(limit: Option<usize>, named: bool, common: Arc<Common<T>>) -> Self {
        Self {
            word: AtomicUsize::new(Word::SERVING.named(named).0),
            full: Word::full(limit.unwrap_or(Word::MAX_COUNT).min(Word::MAX_COUNT)),
            common,
        }
    }

    pub(super) fn common(&self) -> &Common<T> {
        &self.common
    }

    /// A snapshot for headers, probes and statistics. `Relaxed`: point 5 of the module header.
    #[inline]
    pub(super) fn word(&self) -> Word {
        Word(self.word.load(Ordering::Relaxed))
    }

    /// A snapshot for deciding that a phase has been reached or that all requests have ended.
    /// Everything that led to the phase, and everything that released requests did, happens before
    /// it.
    pub(super) fn settled_word(&self) -> Word {
        // Acquire: partner of the Release in `release` and in `update`.
        Word(self.word.load(Ordering::Acquire))
    }

    /// Admits a request on the fast path: Serving, not named, below the limit. If this returns
    /// true, the caller calls [`release`](Self::release) once. If it returns false, the caller
    /// tries [`admit_slow`](Self::admit_slow).
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

    /// Admits a request in any phase that admits requests, or returns the reason for the refusal.
    #[cold]
    pub(super) fn admit_slow(&self) -> Result<(), Refused> {
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
                        self.common.late.fetch_add(1, Ordering::Relaxed);
                    }
                    return Ok(());
                }
                Err(current) => word = Word(current),
            }
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

    /// Releases a request.
    #[inline]
    pub(super) fn release(&self) {
        // Release: partner of the Acquire load in `settled_word`.
        let before = Word(self.word.fetch_sub(Word::ONE, Ordering::Release));
        debug_assert!(before.count() > 0, "released more than was admitted");
        if before.refuses() {
            self.released_while_draining(before);
        }
    }

    /// Releases a request that has had no response, and counts it as dropped during a stop.
    ///
    /// The phase is checked in the same step that releases the request. So the request was either
    /// released before the stop was requested and is not among those in flight at that moment, or
    /// it is counted here.
    #[cold]
    #[inline(never)]
    pub(super) fn release_unanswered(&self) {
        let before_a_stop = |word: Word| (!word.is_stopping()).then(|| word.minus_one());
        if self.update(before_a_stop).is_none() {
            // Before the release, so that a load that sees the release also sees this count.
            self.common.dropped.fetch_add(1, Ordering::Relaxed);
            self.release();
        }
    }

    /// Outlined although it is short: most releases happen before draining.
    #[cold]
    #[inline(never)]
    fn released_while_draining(&self, before: Word) {
        if before.count() != 1 {
            return;
        }
        let waker = lock!(self.common.waiter).take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Changes the word and returns the previous one. Returns `None` if `change` returns `None`.
    pub(super) fn update(&self, change: impl Fn(Word) -> Option<Word>) -> Option<Word> {
        // Release: partner of the Acquire load in `settled_word`, point 6 of the module header.
        self.word
            .fetch_update(Ordering::Release, Ordering::Relaxed, |word| {
                change(Word(word)).map(|word| word.0)
            })
            .ok()
            .map(Word)
    }
}
