//! The packed word: phase, readiness and count. Plain data; only this file knows the bits.

use std::fmt;

use crate::phase::Phase;

const PHASE_SHIFT: u32 = usize::BITS - 3;
const NAMED: usize = 1 << (PHASE_SHIFT - 1);
const NOT_READY: usize = 1 << 1;
const SERVED: usize = 1;
const ADMITTED: usize = 1 << 2;
const COUNT: usize = NAMED - Word::ONE;
const LAME_DUCK: usize = (Phase::LameDuck as usize) << PHASE_SHIFT;
const DRAINING: usize = (Phase::Draining as usize) << PHASE_SHIFT;

/// A snapshot of the gate.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Word(pub(super) usize);

impl Word {
    /// One request in flight. The flags lie below the count, where comparisons of counts do not see
    /// them.
    pub(super) const ONE: usize = 1 << 3;

    /// The most requests that can be in flight at once: 2^57 - 1, or 2^25 - 1 where a word has
    /// 32 bits. Admission refuses the next one, so the count cannot spill into the flags.
    pub(super) const MAX_COUNT: usize = COUNT / Self::ONE;

    pub(super) const SERVING: Self = Self((Phase::Serving as usize) << PHASE_SHIFT);

    pub(crate) const fn phase(self) -> Phase {
        match self.0 >> PHASE_SHIFT {
            0 => Phase::Serving,
            1 => Phase::LameDuck,
            2 => Phase::Draining,
            3 => Phase::Closing,
            _ => Phase::Stopped,
        }
    }

    pub(crate) const fn count(self) -> usize {
        (self.0 & COUNT) / Self::ONE
    }

    /// The value that `set_ready` set last, in every phase.
    pub(super) const fn is_marked_ready(self) -> bool {
        self.0 & NOT_READY == 0
    }

    /// Whether the readiness probe answers "ready".
    pub(crate) fn is_ready(self) -> bool {
        self.phase() == Phase::Serving && self.is_marked_ready()
    }

    /// A request was admitted, a connection was tracked, a tracked listener, a server or a drain future
    /// was polled, or a probe has answered "ready".
    pub(crate) const fn has_served(self) -> bool {
        self.0 & SERVED != 0
    }

    /// Whether a request was admitted since this flag was last cleared.
    pub(super) const fn has_admitted(self) -> bool {
        self.0 & ADMITTED != 0
    }

    pub(super) const fn without_admitted(self) -> Self {
        Self(self.0 & !ADMITTED)
    }

    /// Whether requests in flight are listed in the request table.
    pub(crate) const fn is_named(self) -> bool {
        self.0 & NAMED != 0
    }

    pub(super) const fn named(self, named: bool) -> Self {
        Self(self.0 | if named { NAMED } else { 0 })
    }

    /// Whether an admission takes the slow path: later than Serving, or named.
    pub(crate) const fn is_slow(self) -> bool {
        self.0 >= NAMED
    }

    /// Later than Serving.
    pub(crate) const fn is_stopping(self) -> bool {
        self.0 >= LAME_DUCK
    }

    /// The least word in which an admission takes the slow path: the limit is reached, or the word
    /// [is slow](Self::is_slow) at any count.
    pub(super) const fn full(limit: usize) -> Self {
        Self(limit * Self::ONE)
    }

    /// An admission only has to count, and there is room for it. `full` comes from
    /// [`full`](Self::full). No word with a count equals `full`, because
    /// [`plus_one`](Self::plus_one) sets a flag below the count.
    pub(super) const fn is_below(self, full: Self) -> bool {
        self.0 < full.0
    }

    /// Draining or later.
    pub(super) const fn refuses(self) -> bool {
        self.0 >= DRAINING
    }

    /// Draining or later, with nothing in flight. Once true it stays true.
    pub(crate) const fn is_idle(self) -> bool {
        self.refuses() && self.count() == 0
    }

    pub(super) const fn with_phase(self, phase: Phase) -> Self {
        Self(
            (self.0 & (NOT_READY | SERVED | ADMITTED | NAMED | COUNT))
                | ((phase as usize) << PHASE_SHIFT),
        )
    }

    pub(super) const fn with_ready(self, ready: bool) -> Self {
        if ready {
            Self(self.0 & !NOT_READY)
        } else {
            Self(self.0 | NOT_READY)
        }
    }

    pub(super) const fn plus_one(self) -> Self {
        Self((self.0 + Self::ONE) | SERVED | ADMITTED)
    }

    pub(super) const fn minus_one(self) -> Self {
        Self(self.0 - Self::ONE)
    }

    pub(super) const fn served(self) -> Self {
        Self(self.0 | SERVED)
    }

    /// Combines all shards: the phase and the flags of the first one, the sum of the counts, and
    /// "has served" and "has admitted" if any shard has them.
    pub(super) fn sum(shards: impl IntoIterator<Item = Self>) -> Self {
        let mut shards = shards.into_iter();
        let first = shards.next().unwrap_or(Self::SERVING);
        shards.fold(first, |sum, shard| {
            let count = (sum.count() + shard.count()).min(Self::MAX_COUNT);
            Self((sum.0 & !COUNT) | (count * Self::ONE) | (shard.0 & (SERVED | ADMITTED)))
        })
    }
}

impl fmt::Debug for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Word")
            .field("phase", &self.phase())
            .field("marked_ready", &self.is_marked_ready())
            .field("has_served", &self.has_served())
            .field("has_admitted", &self.has_admitted())
            .field("named", &self.is_named())
            .field("count", &self.count())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_has_the_phase_and_the_readiness_of_the_first_shard() {
        let first = Word::SERVING.plus_one();
        let other = first.with_phase(Phase::Draining).with_ready(false);
        let sum = Word::sum([first, other, other.plus_one()]);
        assert_eq!(sum.phase(), Phase::Serving);
        assert!(sum.is_ready());
        assert_eq!(sum.count(), 4);
        let sum = Word::sum([other, first]);
        assert_eq!(sum.phase(), Phase::Draining);
        assert!(!sum.is_marked_ready());
    }

    #[test]
    fn a_sum_has_served_and_has_admitted_if_any_shard_has() {
        let admitted = Word::SERVING.plus_one().minus_one();
        for shards in [
            [Word::SERVING, admitted],
            [admitted, Word::SERVING],
            [admitted; 2],
        ] {
            let sum = Word::sum(shards);
            assert!(sum.has_served() && sum.has_admitted(), "{sum:?}");
        }
        let sum = Word::sum([Word::SERVING, Word::SERVING.served()]);
        assert!(sum.has_served() && !sum.has_admitted(), "{sum:?}");
    }

    #[test]
    fn a_flag_that_is_set_again_stays_set() {
        let twice = Word::SERVING.plus_one().plus_one();
        assert!(twice.has_served() && twice.has_admitted());
        assert!(Word::SERVING.served().served().has_served());
        assert!(Word::SERVING.named(true).named(true).is_named());
    }

    #[test]
    fn a_sum_saturates_at_the_largest_count_of_a_word() {
        let most = Word(Word::MAX_COUNT * Word::ONE);
        let sum = Word::sum([most, most]);
        assert_eq!(sum.count(), Word::MAX_COUNT);
        assert_eq!(sum.phase(), Phase::Serving);
        assert!(!sum.is_named());
    }

    #[test]
    fn phase_readiness_and_count_do_not_disturb_one_another() {
        let phases = [
            Phase::Serving,
            Phase::LameDuck,
            Phase::Draining,
            Phase::Closing,
            Phase::Stopped,
        ];
        for phase in phases {
            for ready in [true, false] {
                for count in [0, 1, 7, Word::MAX_COUNT - 1] {
                    let word = Word(Word::SERVING.0 + count * Word::ONE)
                        .with_ready(ready)
                        .with_phase(phase);
                    assert_eq!(word.phase(), phase);
                    assert_eq!(word.is_marked_ready(), ready);
                    assert!(!word.has_served());
                    assert_eq!(
                        word.served().with_phase(phase).with_ready(ready).0 ^ word.0,
                        SERVED
                    );
                    assert_eq!(word.count(), count);
                    assert_eq!(word.is_slow(), phase > Phase::Serving);
                    assert_eq!(word.is_stopping(), phase > Phase::Serving);
                    let admitted = word.plus_one().minus_one();
                    assert!(admitted.has_admitted() && !word.has_admitted());
                    assert_eq!(admitted.without_admitted(), word.served());
                    assert!(admitted.with_phase(phase).with_ready(ready).has_admitted());
                    let named = word.named(true).with_phase(phase).with_ready(ready);
                    assert_eq!(named.0 ^ word.0, NAMED);
                    assert!(named.is_named() && named.is_slow());
                    assert_eq!(named.is_stopping(), phase > Phase::Serving);
                    assert_eq!(word.refuses(), phase >= Phase::Draining);
                    assert_eq!(word.is_idle(), phase >= Phase::Draining && count == 0);
                }
            }
        }
    }
}
