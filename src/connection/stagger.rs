//! Whose turn it is when, where everybody is told something a little at a time: clients in the
//! lame-duck phase to leave, long-lived work in the drain to end. Pure.
//!
//! Everybody has a [`Place`] in the interval from the start of the spread to its end, and is told
//! from that moment on. The places are those of a Weyl sequence: the fractional parts of the
//! multiples of the golden ratio, which lie evenly however many of them are taken and from
//! wherever, more so than random numbers would, and are the same in every run.

use std::time::Duration;

/// A point in the spread: a fraction of it, in units of 2⁻³².
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place(u32);

impl Place {
    /// Its turn comes as soon as the spread begins.
    pub(crate) const FIRST: Self = Self(0);
    /// When it has come, so has everybody's.
    pub(crate) const LAST: Self = Self(u32::MAX);

    /// The place of number `n`.
    pub(crate) fn nth(n: u64) -> Self {
        /// 2⁶⁴ divided by the golden ratio.
        const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
        let bytes = n.wrapping_mul(STEP).to_be_bytes();
        Self(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    /// The last place whose turn has come, so long after the start of a spread this long.
    pub(crate) fn after(elapsed: Duration, spread: Duration) -> Self {
        if elapsed >= spread {
            return Self::LAST;
        }
        // Less than one, so it fits.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        Self((elapsed.as_secs_f64() / spread.as_secs_f64() * 2.0_f64.powi(32)) as u32)
    }

    /// When its turn comes, in time since the start of a spread this long.
    pub(crate) fn turn(self, spread: Duration) -> Duration {
        spread.mul_f64(f64::from(self.0) / 2.0_f64.powi(32))
    }
}

tokio::task_local! {
    /// Whether the turn of the connection that is being polled has come. Set by whoever knows the
    /// connection, for whoever does not.
    pub(crate) static TURN: bool;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_hundred_in_a_row_are_spread_evenly() {
        const SPREAD: Duration = Duration::from_secs(10);
        for first in [0, 1, 77, 1_000_000, u64::MAX - 99] {
            let mut turns: Vec<_> = (0..100)
                .map(|n| Place::nth(first.wrapping_add(n)).turn(SPREAD))
                .collect();
            turns.sort();
            for (i, turn) in (0..).zip(turns) {
                let even = SPREAD * i / 100;
                let off = even.abs_diff(turn);
                assert!(off < Duration::from_millis(200), "{i} of {first}: {turn:?}");
            }
        }
    }

    #[test]
    fn turns_come_in_the_order_of_places_and_all_by_the_end() {
        for spread in [1, 3, 1_000, 3_600_000].map(Duration::from_millis) {
            let mut last = Place::FIRST;
            for step in 0..=10 {
                let elapsed = spread * step / 10;
                let place = Place::after(elapsed, spread);
                assert!(place >= last, "{elapsed:?} of {spread:?}");
                assert!(place.turn(spread) <= elapsed);
                last = place;
            }
            assert_eq!(last, Place::LAST);
        }
        assert_eq!(Place::after(Duration::ZERO, Duration::ZERO), Place::LAST);
        assert_eq!(
            Place::after(Duration::MAX / 2, Duration::MAX),
            Place(1 << 31)
        );
    }

    #[test]
    fn a_spread_of_any_length_holds_every_turn() {
        for spread in [Duration::ZERO, Duration::from_nanos(1), Duration::MAX] {
            for n in 0..1000 {
                assert!(Place::nth(n).turn(spread) <= spread);
            }
        }
        assert_eq!(Place(0).turn(Duration::MAX), Duration::ZERO);
    }
}
