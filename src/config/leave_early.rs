//! When the lame-duck phase may end before its delay is over. Plain data.

use std::{fmt, time::Duration};

use super::plan::ConfigError;

/// What the builder was told about ending the lame-duck phase early. Off by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LeaveEarly {
    pub(crate) quiet: Option<WhenQuiet>,
    pub(crate) noticed: Option<WhenNoticed>,
}

/// New requests have stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WhenQuiet {
    /// How long the phase lasts in any case.
    pub(crate) minimum: Duration,
    /// How long no new request must have arrived.
    pub(crate) quiet_for: Duration,
}

/// Every prober has seen readiness fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WhenNoticed {
    /// How many failures a prober needs.
    pub(crate) failures: u32,
    /// How many probers there are at least.
    pub(crate) probers: usize,
}

/// Why a rule for ending the lame-duck phase early was refused. Part of [`ConfigError::LeaveEarly`].
#[derive(Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum LeaveEarlyError {
    /// `leave_when_quiet` with a `quiet_for` of zero, which every moment satisfies.
    NoSilence,
    /// `leave_when_quiet` could not end the phase before `drain_delay` does.
    NeverQuiet {
        /// The first argument of [`leave_when_quiet`](crate::GracefulBuilder::leave_when_quiet).
        minimum: Duration,
        /// The second argument.
        quiet_for: Duration,
        /// The delay, by default or by [`drain_delay`](crate::GracefulBuilder::drain_delay).
        drain_delay: Duration,
    },
    /// `leave_when_noticed` with zero failures or zero probers.
    NothingToNotice {
        /// The first argument of [`leave_when_noticed`](crate::GracefulBuilder::leave_when_noticed).
        failures: u32,
        /// The second argument.
        probers: usize,
    },
    /// `leave_when_noticed` waits for more probers than are remembered.
    TooManyProbers {
        /// The second argument of [`leave_when_noticed`](crate::GracefulBuilder::leave_when_noticed).
        probers: usize,
        /// How many probers are remembered.
        most: usize,
    },
    /// `leave_when_noticed` with a `drain_delay` of zero, which leaves nothing to end early.
    NoDelay,
}

/// How many probers are remembered. A service has a handful; the bound keeps a readiness route that
/// strangers can reach from filling the memory.
pub(crate) const MOST_PROBERS: usize = 64;

impl LeaveEarly {
    pub(crate) fn is_on(&self) -> bool {
        self.quiet.is_some() || self.noticed.is_some()
    }

    /// Checks the rules against the delay that they are to shorten.
    pub(crate) fn check(&self, drain_delay: Duration) -> Result<(), ConfigError> {
        let error = match (self.quiet, self.noticed) {
            (Some(WhenQuiet { quiet_for, .. }), _) if quiet_for.is_zero() => {
                LeaveEarlyError::NoSilence
            }
            (Some(WhenQuiet { minimum, quiet_for }), _)
                if minimum.max(quiet_for) >= drain_delay =>
            {
                LeaveEarlyError::NeverQuiet {
                    minimum,
                    quiet_for,
                    drain_delay,
                }
            }
            (_, Some(WhenNoticed { failures, probers })) if failures == 0 || probers == 0 => {
                LeaveEarlyError::NothingToNotice { failures, probers }
            }
            (_, Some(WhenNoticed { probers, .. })) if probers > MOST_PROBERS => {
                LeaveEarlyError::TooManyProbers {
                    probers,
                    most: MOST_PROBERS,
                }
            }
            (_, Some(_)) if drain_delay.is_zero() => LeaveEarlyError::NoDelay,
            _ => return Ok(()),
        };
        Err(ConfigError::LeaveEarly(error))
    }
}

impl fmt::Display for LeaveEarlyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSilence => f.write_str(
                "leave_when_quiet has a quiet_for of 0, so the pause between two requests would end \
                 the lame-duck phase; use a second or more",
            ),
            Self::NeverQuiet {
                minimum,
                quiet_for,
                drain_delay,
            } => write!(
                f,
                "leave_when_quiet with minimum {minimum:?} and quiet_for {quiet_for:?} can end \
                 nothing early, because drain_delay is {drain_delay:?}; both must be shorter than \
                 drain_delay"
            ),
            Self::NothingToNotice { failures, probers } => write!(
                f,
                "leave_when_noticed has failures {failures} and probers {probers}; both must be 1 \
                 or more"
            ),
            Self::TooManyProbers { probers, most } => write!(
                f,
                "leave_when_noticed waits for {probers} probers, and {most} are remembered; use \
                 {most} or fewer"
            ),
            Self::NoDelay => f.write_str(
                "leave_when_noticed has no effect, because drain_delay is 0; set drain_delay to \
                 the longest that the probers may need",
            ),
        }
    }
}

/// The text of `Display`, as for [`ConfigError`].
impl fmt::Debug for LeaveEarlyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
