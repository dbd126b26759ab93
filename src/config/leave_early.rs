//! The rules by which the lame-duck phase may end before its delay is over. Plain data.

use std::{fmt, time::Duration};

/// The rules that were set in the builder. None by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LeaveEarly {
    pub(crate) quiet: Option<WhenQuiet>,
    pub(crate) noticed: Option<WhenNoticed>,
}

/// The phase ends when new requests have stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WhenQuiet {
    /// The shortest duration of the phase.
    pub(crate) minimum: Duration,
    /// How long no new request may have arrived.
    pub(crate) quiet_for: Duration,
}

/// The phase ends when every known prober has seen readiness fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WhenNoticed {
    /// How many failed answers each prober must have received.
    pub(crate) failures: u32,
    /// How many probers must be known at least.
    pub(crate) probers: usize,
}

/// Why a rule for ending the lame-duck phase early was rejected. Part of
/// [`ConfigError::LeaveEarly`](crate::ConfigError::LeaveEarly).
#[derive(Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum LeaveEarlyError {
    /// `quiet_for` is zero in `leave_when_quiet`, so every pause between two requests would end the
    /// phase.
    NoSilence,
    /// `minimum` or `quiet_for` is not shorter than `drain_delay`, so `leave_when_quiet` could not
    /// end the phase early.
    NeverQuiet {
        /// The first argument of [`leave_when_quiet`](crate::GracefulBuilder::leave_when_quiet).
        minimum: Duration,
        /// The second argument of `leave_when_quiet`.
        quiet_for: Duration,
        /// The delay: the default, or the value of
        /// [`drain_delay`](crate::GracefulBuilder::drain_delay).
        drain_delay: Duration,
    },
    /// `leave_when_noticed` has zero failures or zero probers.
    NothingToNotice {
        /// The first argument of [`leave_when_noticed`](crate::GracefulBuilder::leave_when_noticed).
        failures: u32,
        /// The second argument of `leave_when_noticed`.
        probers: usize,
    },
    /// `leave_when_noticed` waits for more probers than the service remembers.
    TooManyProbers {
        /// The second argument of [`leave_when_noticed`](crate::GracefulBuilder::leave_when_noticed).
        probers: usize,
        /// How many probers the service remembers.
        most: usize,
    },
    /// `drain_delay` is zero, so `leave_when_noticed` has no delay to shorten.
    NoDelay,
}

/// How many probers the service remembers. A service usually has a handful. The limit bounds the
/// memory if strangers can reach the readiness route.
pub(crate) const MOST_PROBERS: usize = 64;

impl LeaveEarly {
    pub(crate) fn is_on(&self) -> bool {
        self.quiet.is_some() || self.noticed.is_some()
    }

    /// Checks the rules against the delay that they shorten.
    pub(crate) fn check(&self, drain_delay: Duration) -> Result<(), LeaveEarlyError> {
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
        Err(error)
    }
}

impl fmt::Display for LeaveEarlyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSilence => f.write_str(
                "leave_when_quiet has a quiet_for of 0, so every pause between two requests would \
                 end the lame-duck phase; use a second or more",
            ),
            Self::NeverQuiet {
                minimum,
                quiet_for,
                drain_delay,
            } => write!(
                f,
                "leave_when_quiet with minimum {minimum:?} and quiet_for {quiet_for:?} has no effect, \
                 because drain_delay is {drain_delay:?}; both must be shorter than drain_delay"
            ),
            Self::NothingToNotice { failures, probers } => write!(
                f,
                "leave_when_noticed has failures {failures} and probers {probers}; both must be 1 \
                 or more"
            ),
            Self::TooManyProbers { probers, most } => write!(
                f,
                "leave_when_noticed waits for {probers} probers, but the service remembers {most}; \
                 use {most} or fewer"
            ),
            Self::NoDelay => f.write_str(
                "leave_when_noticed has no effect, because drain_delay is 0; set drain_delay to \
                 the longest that the probers may need",
            ),
        }
    }
}

/// The text of `Display`, as for [`ConfigError`](crate::ConfigError).
impl fmt::Debug for LeaveEarlyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
