//! One word and what can be done with it: the operations the module header argues about.

use std::{
    sync::{Arc, Weak},
    task::Waker,
};

use super::word::Word;
use crate::{
    phase::Phase,
    sync::{AtomicBool, AtomicUsize, Mutex, Ordering, lock},
};

/// Why a request was not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Draining has begun.
    Draining,
    /// As many requests as the limit allows are in flight.
    Full,
}

impl Refused {
    /// What the phase is at least, whatever other lanes say.
    pub(crate) fn least_phase(self) -> Phase {
        match self {
            Self::Draining => Phase::Draining,
            Self::Full => Phase::Serving,
        }
    }
}

/// What the lanes of a gate share and a request in Serving does not touch.
pub(super) struct Common<K, S> {
    pub(super) waiter: Mutex<Option<Waker>>,
    /// Admissions after the first phase.
    pub(super) late: AtomicUsize,
    /// Refusals because draining had begun.
    pub(super) refused_draining: AtomicUsize,
    /// Refusals above the limit in the first phase, and after it.
    pub(super) refused_full: AtomicUsize,
    pub(super) refused_full_late: AtomicUsize,
    /// Releases without a response after the first phase.
    pub(super) dropped: AtomicUsize,
    /// Pieces of responses that servers hold.
    pub(super) pieces: AtomicUsize,
    /// A request was admitted before the lanes' flags were last cleared.
    pub(super) admitted: AtomicBool,
    /// Refusals that are reading the bodies of their requests.
    pub(super) readers: AtomicUsize,
    /// What the owners of the gate share, for as long as there is one.
    pub(super) owned: Mutex<Weak<S>>,
    /// What holds for as long as there are requests.
    pub(super) rules: Arc<K>,
}

impl<K, S> Common<K, S> {
    pub(super) fn new(rules: K) -> Self {
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
            owned: Mutex::new(Weak::new()),
            rules: Arc::new(rules),
        }
    }

    #[cold]
    pub(super) fn owned(&self) -> Option<Arc<S>> {
        lock!(self.owned).upgrade()
    }
}

/// On cache lines of its own, two because they are fetched in pairs: what one thread writes there no
/// other reads in Serving.
#[repr(align(128))]
pub(super) struct Shard<K, S> {
    word: AtomicUsize,
    /// The least word above the limit. Here, where the word is, so that no other line is touched.
    full: Word,
    common: Arc<Common<K, S>>,
}

impl<K, S> Shard<K, S> {
    pub(super) fn new(limit: Option<usize>, named: bool, common: Arc<Common<K, S>>) -> Self {
        Self {
            word: AtomicUsize::new(Word::SERVING.named(named).0),
            full: Word::full(limit.unwrap_or(Word::MAX_COUNT).min(Word::MAX_COUNT)),
            common,
        }
    }

    pub(super) fn common(&self) -> &Common<K, S> {
        &self.common
    }

    /// A snapshot for headers, probes and figures. `Relaxed`: point 5 of the module header.
    #[inline]
    pub(super) fn word(&self) -> Word {
        Word(self.word.load(Ordering::Relaxed))
    }

    /// A snapshot by which to decide that a phase has come, or that all is over: what led to it,
    /// and what the requests did that have left, happens before it.
    pub(super) fn settled_word(&self) -> Word {
        // Acquire: partner of the Release in `release` and in `update`.
        Word(self.word.load(Ordering::Acquire))
    }

    /// Lets one in, if there is nothing to it but to count. Whoever is let in calls
    /// [`release`](Self::release) once. Whoever is not asks [`admit_slow`](Self::admit_slow).
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

    /// Lets one out.
    #[inline]
    pub(super) fn release(&self) {
        // Release: partner of the Acquire load in `settled_word`.
        let before = Word(self.word.fetch_sub(Word::ONE, Ordering::Release));
        debug_assert!(before.count() > 0, "released more than was admitted");
        if before.refuses() {
            self.left_a_drain(before);
        }
    }

    /// Lets one out that has had no response, and counts it if the service stops.
    ///
    /// The phase is looked at in the step that lets it out, so that the request is either not among
    /// those that were in flight when the stop was asked for, or is counted here.
    #[cold]
    #[inline(never)]
    pub(super) fn release_unanswered(&self) {
        let served = |word: Word| (!word.is_stopping()).then(|| word.minus_one());
        if self.update(served).is_none() {
            // Before the release, so that it is in the figures of the load that sees the release.
            self.common.dropped.fetch_add(1, Ordering::Relaxed);
            self.release();
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
        let waker = lock!(self.common.waiter).take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Changes the word, and returns what it was, unless there is nothing to change.
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
