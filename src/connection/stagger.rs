//! Slots for actions that are spread over a period: clients are asked to leave one after another in
//! the lame-duck phase, and long-lived work is notified one after another in the drain. Plain
//! arithmetic.
//!
//! Each connection or task has a [`Place`] in the interval from the start of the spread to its end,
//! and its slot is reached at that moment. The places are a Weyl sequence: the fractional parts of
//! the multiples of the golden ratio. Any run of consecutive places is distributed evenly, more
//! evenly than random numbers, and the sequence is the same in every process.

use std::time::Duration;

/// 2³². Not computed by `powi`, whose result may be inexact.
const PLACES: f64 = 4_294_967_296.0;

/// A point in the spread, as a fraction in units of 2⁻³².
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place(u32);

impl Place {
    /// The slot that is reached when the spread begins.
    pub(crate) const FIRST: Self = Self(0);
    /// The last slot: when it is reached, all slots have been reached.
    pub(crate) const LAST: Self = Self(u32::MAX);

    /// The place with number `n`.
    pub(crate) fn nth(n: u64) -> Self {
        /// 2⁶⁴ divided by the golden ratio.
        const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
        let bytes = n.wrapping_mul(STEP).to_be_bytes();
        Self(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    /// The last place whose slot has been reached `elapsed` after the start of a spread of length
    /// `spread`.
    pub(crate) fn after(elapsed: Duration, spread: Duration) -> Self {
        if elapsed >= spread {
            return Self::LAST;
        }
        // Less than one, so it fits.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        Self((elapsed.as_secs_f64() / spread.as_secs_f64() * PLACES) as u32)
    }

    /// When this slot is reached, as time since the start of a spread of length `spread`.
    pub(crate) fn offset(self, spread: Duration) -> Duration {
        spread.mul_f64(f64::from(self.0) / PLACES)
    }
}

tokio::task_local! {
    /// Whether the slot of the connection that is being polled has been reached. The server, which
    /// knows the connection, sets it for the middleware, which does not.
    pub(crate) static SLOT_REACHED: bool;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_hundred_in_a_row_are_spread_evenly() {
        const SPREAD: Duration = Duration::from_secs(10);
        for first in [0, 1, 77, 1_000_000, u64::MAX - 99] {
            let mut offsets: Vec<_> = (0..100)
                .map(|n| Place::nth(first.wrapping_add(n)).offset(SPREAD))
                .collect();
            offsets.sort();
            for (i, offset) in (0..).zip(offsets) {
                let even = SPREAD * i / 100;
                let off = even.abs_diff(offset);
                assert!(
                    off < Duration::from_millis(200),
                    "{i} of {first}: {offset:?}"
                );
            }
        }
    }

    #[test]
    fn slots_are_reached_in_the_order_of_places_and_all_by_the_end() {
        for spread in [1, 3, 1_000, 3_600_000].map(Duration::from_millis) {
            let mut last = Place::FIRST;
            for step in 0..=10 {
                let elapsed = spread * step / 10;
                let place = Place::after(elapsed, spread);
                assert!(place >= last, "{elapsed:?} of {spread:?}");
                assert!(place.offset(spread) <= elapsed);
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
    fn every_slot_is_within_a_spread_of_any_length() {
        for spread in [Duration::ZERO, Duration::from_nanos(1), Duration::MAX] {
            for n in 0..1000 {
                assert!(Place::nth(n).offset(spread) <= spread);
            }
        }
        assert_eq!(Place(0).offset(Duration::MAX), Duration::ZERO);
    }
}
