//! Who is asked to leave when, while the lame-duck phase asks everybody a little at a time. Pure.
//!
//! Everybody has a [`Place`] in the interval from the start of the spread to its end, and is asked
//! from that moment on. The places are those of a Weyl sequence: the fractional parts of the
//! multiples of the golden ratio, which lie evenly however many of them are taken and from
//! wherever, more so than random numbers would, and are the same in every run.

use std::time::Duration;

/// A point in the spread: a fraction of it, in units of 2⁻³².
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place(u32);

impl Place {
    /// The place of number `n`.
    pub(crate) fn nth(n: u64) -> Self {
        /// 2⁶⁴ divided by the golden ratio.
        const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
        let bytes = n.wrapping_mul(STEP).to_be_bytes();
        Self(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
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
    fn a_spread_of_any_length_holds_every_turn() {
        for spread in [Duration::ZERO, Duration::from_nanos(1), Duration::MAX] {
            for n in 0..1000 {
                assert!(Place::nth(n).turn(spread) <= spread);
            }
        }
        assert_eq!(Place(0).turn(Duration::MAX), Duration::ZERO);
    }
}
