//! The time budget of a stop: how the grace period is divided between delay, drain and cleanup.
//! Pure arithmetic.
//!
//! The shares follow one another from the trigger on, so each ends at a fixed instant. A phase that
//! ends early leaves its time to the next one. A share that was not set gets a default:
//!
//! | share | default |
//! |---|---|
//! | `drain_delay` | 5 s, or a sixth of the grace period if that is less |
//! | `cleanup_timeout` | the least of 5 s, a sixth of the grace period, and the time that the margin, the delay and a set `drain_timeout` leave |
//! | `drain_timeout` | the rest |
//!
//! The last second of the grace period (or a thirtieth of it, if that is less) is the *margin*.
//! Every deadline falls before it, so that the process has time to report and exit before it is
//! killed.
//!
//! This file is long because the plan and the error of a plan that does not fit refer to each other.

use std::{fmt, time::Duration};

use tokio::time::Instant;

use super::leave_early::LeaveEarlyError;

const GRACE_PERIOD: Duration = Duration::from_secs(30);
const MOST_DELAY: Duration = Duration::from_secs(5);
const MOST_CLEANUP: Duration = Duration::from_secs(5);
const MOST_MARGIN: Duration = Duration::from_secs(1);

/// The durations that were set in the builder. `None`: not set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Knobs {
    pub(crate) grace_period: Option<Duration>,
    pub(crate) drain_delay: Option<Duration>,
    pub(crate) interrupt_delay: Option<Duration>,
    pub(crate) drain_timeout: Option<Duration>,
    pub(crate) cleanup_timeout: Option<Duration>,
}

/// A plan that fits into its grace period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    grace_period: Duration,
    margin: Duration,
    drain_delay: Duration,
    interrupt_delay: Duration,
    /// `None`: the time that delay, cleanup and margin leave.
    drain_timeout: Option<Duration>,
    cleanup_timeout: Duration,
}

/// The effective plan of a lifecycle: the durations that were set in the
/// [builder](crate::Graceful::builder), and the defaults for the others. Returned by
/// [`Graceful::plan`](crate::Graceful::plan).
///
/// [`grace_period`](Self::grace_period) and [`drain_deadline`](Self::drain_deadline) are measured
/// from the trigger. Each value is a [`Duration`]; its `Debug` form prints the unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct EffectivePlan {
    /// The time from the trigger to the moment when the process would be killed.
    pub grace_period: Duration,
    /// The longest duration of the lame-duck phase after SIGTERM or
    /// [`shutdown`](crate::Graceful::shutdown).
    pub drain_delay: Duration,
    /// The longest duration of the lame-duck phase after SIGINT.
    pub interrupt_delay: Duration,
    /// The time from the trigger to the moment when requests in flight are cut, after SIGTERM or
    /// [`shutdown`](crate::Graceful::shutdown). After SIGINT the time may differ, because the delay
    /// differs.
    pub drain_deadline: Duration,
    /// The share of the grace period that is reserved for workers and cleanup steps.
    pub cleanup_timeout: Duration,
    /// The last part of the grace period. No deadline falls into it, so that the process can report
    /// and exit.
    pub margin: Duration,
}

/// When each phase ends at the latest, as time since the trigger. The values never decrease, and
/// none is later than the grace period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Deadlines {
    /// The end of the lame-duck phase.
    pub(crate) delay: Duration,
    /// The drain deadline.
    pub(crate) drain: Duration,
    /// The end of the plan, where the margin begins.
    pub(crate) end: Duration,
}

impl Knobs {
    pub(crate) fn default_drain_delay(self) -> Duration {
        MOST_DELAY.min(self.grace_period.unwrap_or(GRACE_PERIOD) / 6)
    }

    pub(crate) fn plan(self) -> Result<Plan, ConfigError> {
        let grace_period = self.grace_period.unwrap_or(GRACE_PERIOD);
        let sixth = grace_period / 6;
        let margin = MOST_MARGIN.min(grace_period / 30);
        let drain_delay = self.drain_delay.unwrap_or(self.default_drain_delay());
        let interrupt_delay = self.interrupt_delay.unwrap_or(Duration::ZERO);
        let longest_delay = drain_delay.max(interrupt_delay);
        let requested = longest_delay.saturating_add(self.drain_timeout.unwrap_or(Duration::ZERO));
        let cleanup_timeout = self.cleanup_timeout.unwrap_or_else(|| {
            MOST_CLEANUP.min(sixth).min(
                grace_period
                    .saturating_sub(margin)
                    .saturating_sub(requested),
            )
        });
        let plan = Plan {
            grace_period,
            margin,
            drain_delay,
            interrupt_delay,
            drain_timeout: self.drain_timeout,
            cleanup_timeout,
        };
        // A sum past Duration::MAX saturates. Such a sum fits only if the grace period is
        // Duration::MAX.
        let fits = requested.saturating_add(cleanup_timeout) <= grace_period;
        let drains = self.drain_timeout.is_some()
            || plan.deadlines(longest_delay).drain > longest_delay
            || grace_period.is_zero();
        if fits && drains {
            Ok(plan)
        } else {
            Err(ConfigError::DoesNotFit(Misfit(Box::new((self, plan)))))
        }
    }
}

impl Plan {
    pub(crate) fn drain_delay(&self) -> Duration {
        self.drain_delay
    }

    pub(crate) fn interrupt_delay(&self) -> Duration {
        self.interrupt_delay
    }

    /// When the watchdog ends the process: after the end of the plan, and before the process is
    /// killed.
    #[cfg(all(unix, feature = "signal"))]
    pub(crate) fn last_moment(&self) -> Duration {
        self.grace_period.saturating_sub(self.margin / 2)
    }

    /// The same plan with a delay after SIGTERM of at most `most`.
    pub(crate) fn with_drain_delay_up_to(self, most: Duration) -> Self {
        Self {
            drain_delay: self.drain_delay.min(most),
            ..self
        }
    }

    /// The plan in its public form.
    pub(crate) fn effective(&self) -> EffectivePlan {
        EffectivePlan {
            grace_period: self.grace_period,
            drain_delay: self.drain_delay,
            interrupt_delay: self.interrupt_delay,
            drain_deadline: self.deadlines(self.drain_delay).drain,
            cleanup_timeout: self.cleanup_timeout,
            margin: self.margin,
        }
    }

    /// How long a drain may take after the longer of the two delays.
    pub(crate) fn drain(&self) -> Duration {
        let longest = self.drain_delay.max(self.interrupt_delay);
        let Deadlines { delay, drain, .. } = self.deadlines(longest);
        drain.saturating_sub(delay)
    }

    /// The deadlines of a stop whose lame-duck phase lasts for `delay`.
    pub(crate) fn deadlines(&self, delay: Duration) -> Deadlines {
        let end = self.grace_period.saturating_sub(self.margin);
        let delay = delay.min(end);
        let drain = match self.drain_timeout {
            Some(timeout) => delay.saturating_add(timeout).min(end),
            None => end.saturating_sub(self.cleanup_timeout).max(delay),
        };
        Deadlines { delay, drain, end }
    }
}

/// Thirty years. On every system this can be added to the current time without an overflow. tokio uses it
/// as "never" too: later instants overflow its timer on some platforms.
pub(crate) const NEVER: Duration = Duration::from_secs(60 * 60 * 24 * 365 * 30);

/// `start` plus `after`, or `start` plus thirty years if the sum is later than that.
pub(crate) fn instant_after(start: Instant, after: Duration) -> Instant {
    start + after.min(NEVER)
}

/// A configuration that cannot work. Returned by
/// [`GracefulBuilder::build`](crate::GracefulBuilder::build).
///
/// Its `Display` form contains the numbers and says what to change. Its `Debug` form is the same
/// text, because a `main` that returns `Result<_, Box<dyn Error>>` prints an error by its `Debug`.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConfigError {
    /// Delay, drain and cleanup together are longer than the grace period, or leave no time to
    /// drain.
    DoesNotFit(Misfit),
    /// `close_spread` is longer than `drain_delay`: the lame-duck phase would be over before every
    /// client had been asked to leave.
    SpreadTooLong {
        /// The value that was set.
        close_spread: Duration,
        /// The delay: the default, or the value of
        /// [`drain_delay`](crate::GracefulBuilder::drain_delay).
        drain_delay: Duration,
    },
    /// `drain_spread` is too long: the drain would be over before all long-lived work had been told
    /// to end.
    DrainSpreadTooLong {
        /// The value that was set.
        drain_spread: Duration,
        /// How long a drain may take: the value of
        /// [`drain_timeout`](crate::GracefulBuilder::drain_timeout), or the time that the other
        /// shares leave.
        drain: Duration,
    },
    /// `header_read_timeout` is zero, which would close every connection whose request head does
    /// not arrive in one piece.
    NoTimeToRead,
    /// The operating system could not start the watchdog's thread. Contains its error message.
    NoWatchdog(String),
    /// `max_in_flight` is zero, which would reject every request.
    NothingInFlight,
    /// `unready_status` does not mean "not ready": it is informational (1xx), or it is 200, the
    /// status of a ready service.
    UnreadyStatus(http::StatusCode),
    /// An exempt path does not begin with a slash or contains a query, so no request can have it.
    ExemptPath(String),
    /// A rule for ending the lame-duck phase early cannot work.
    LeaveEarly(LeaveEarlyError),
}

/// The numbers of a plan that does not fit. Part of [`ConfigError::DoesNotFit`].
///
/// Its `Display` form is the sum of the shares, with defaults marked as such.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misfit(Box<(Knobs, Plan)>);

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (knobs, plan) = &*self.0;
        let default = |knob: Option<Duration>| if knob.is_none() { " (default)" } else { "" };
        // The longer of the two delays is the one that does not fit.
        let (name, delay, knob) = if plan.interrupt_delay > plan.drain_delay {
            (
                "interrupt_delay",
                plan.interrupt_delay,
                knobs.interrupt_delay,
            )
        } else {
            ("drain_delay", plan.drain_delay, knobs.drain_delay)
        };
        write!(f, "{name} {delay:?}{}", default(knob))?;
        if let Some(timeout) = plan.drain_timeout {
            write!(f, " + drain_timeout {timeout:?}")?;
        }
        // A default of zero is left out.
        if knobs.cleanup_timeout.is_some() || !plan.cleanup_timeout.is_zero() {
            write!(
                f,
                " + cleanup_timeout {:?}{}",
                plan.cleanup_timeout,
                default(knobs.cleanup_timeout)
            )?;
        }
        let sum = delay
            .saturating_add(plan.drain_timeout.unwrap_or(Duration::ZERO))
            .saturating_add(plan.cleanup_timeout);
        if sum > plan.grace_period {
            write!(f, " = {sum:?}, which is longer than")?;
        } else {
            write!(f, " = {sum:?}, which leaves no time to drain within")?;
        }
        write!(
            f,
            " grace_period {:?}{}",
            plan.grace_period,
            default(knobs.grace_period)
        )
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DoesNotFit(misfit) => write!(
                f,
                "the shutdown does not fit its grace period: {misfit}; shorten a share, or raise \
                 grace_period together with the supervisor's (terminationGracePeriodSeconds, \
                 TimeoutStopSec)"
            ),
            Self::SpreadTooLong {
                close_spread,
                drain_delay,
            } => write!(
                f,
                "close_spread {close_spread:?} is longer than drain_delay {drain_delay:?}, so the \
                 last clients would not be asked to leave before their requests are rejected; \
                 shorten close_spread, or lengthen drain_delay"
            ),
            Self::DrainSpreadTooLong {
                drain_spread,
                drain,
            } => write!(
                f,
                "drain_spread {drain_spread:?} leaves nothing of the {drain:?} that a drain may \
                 take, so the last tasks to be told to end would be cut; shorten drain_spread, or \
                 lengthen drain_timeout"
            ),
            Self::NoTimeToRead => f.write_str(
                "header_read_timeout is 0, which would close every connection whose request head \
                 does not arrive in one piece; use Duration::MAX for no limit",
            ),
            Self::NoWatchdog(error) => write!(f, "the watchdog cannot be started: {error}"),
            Self::NothingInFlight => f.write_str(
                "max_in_flight is 0, which would reject every request; leave it out for no limit",
            ),
            Self::UnreadyStatus(status) => write!(
                f,
                "unready_status is {}, which {}",
                status.as_u16(),
                if status.is_informational() {
                    "is informational (1xx), so it is not a final response"
                } else {
                    "is the status of a ready service"
                }
            ),
            Self::ExemptPath(path) if path.starts_with('/') => write!(
                f,
                "exempt path {path:?} contains a query, which is not compared, so no request can have it; leave the query out"
            ),
            Self::ExemptPath(path) => write!(
                f,
                "exempt path {path:?} does not begin with a slash, so no request can have it"
            ),
            Self::LeaveEarly(error) => error.fmt(f),
        }
    }
}

/// The text of `Display`, because a `main` that returns an error prints its `Debug` form.
impl fmt::Debug for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for ConfigError {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn refusal(knobs: Knobs) -> String {
        knobs.plan().unwrap_err().to_string()
    }

    #[test]
    fn the_default_plan_is_kubernetes_thirty_seconds() {
        let plan = Knobs::default().plan().unwrap();
        assert_eq!(
            plan.deadlines(plan.drain_delay()),
            Deadlines {
                delay: s(5),
                drain: s(24),
                end: s(29),
            }
        );
    }

    #[test]
    fn a_shorter_grace_period_scales_the_defaults() {
        let plan = Knobs {
            grace_period: Some(s(6)),
            ..Knobs::default()
        }
        .plan()
        .unwrap();
        let deadlines = plan.deadlines(plan.drain_delay());
        assert_eq!(deadlines.delay, s(1));
        assert_eq!(deadlines.drain, Duration::from_millis(4800));
        assert_eq!(deadlines.end, Duration::from_millis(5800));
    }

    #[test]
    fn without_a_delay_the_drain_keeps_its_timeout() {
        let plan = Knobs::default().plan().unwrap();
        assert_eq!(plan.deadlines(Duration::ZERO).drain, s(24));
        let plan = Knobs {
            drain_delay: Some(s(1)),
            drain_timeout: Some(s(3)),
            ..Knobs::default()
        }
        .plan()
        .unwrap();
        assert_eq!(plan.deadlines(Duration::ZERO).drain, s(3));
        assert_eq!(plan.deadlines(s(1)).drain, s(4));
    }

    #[test]
    fn a_plan_that_fills_the_grace_period_fits_and_still_ends_before_the_margin() {
        let plan = Knobs {
            grace_period: Some(s(30)),
            drain_delay: Some(s(5)),
            drain_timeout: Some(s(15)),
            cleanup_timeout: Some(s(10)),
            ..Knobs::default()
        }
        .plan()
        .unwrap();
        assert_eq!(plan.deadlines(s(5)).drain, s(20));
        assert_eq!(plan.deadlines(s(5)).end, s(29));
    }

    #[test]
    fn a_plan_that_does_not_fit_is_rejected_with_its_numbers() {
        let message = refusal(Knobs {
            drain_delay: Some(s(10)),
            drain_timeout: Some(s(25)),
            cleanup_timeout: Some(Duration::from_millis(1500)),
            ..Knobs::default()
        });
        assert!(
            message.contains(
                "drain_delay 10s + drain_timeout 25s + cleanup_timeout 1.5s = 36.5s, which is \
                 longer than grace_period 30s (default)"
            ),
            "{message}"
        );
    }

    #[test]
    fn sums_past_the_largest_duration_do_not_overflow() {
        let endless = Knobs {
            drain_timeout: Some(Duration::MAX),
            cleanup_timeout: Some(Duration::MAX),
            ..Knobs::default()
        };
        let message = refusal(endless);
        assert!(
            message.contains("longer than grace_period 30s"),
            "{message}"
        );
        let grace_period = Some(Duration::MAX);
        assert!(
            Knobs {
                grace_period,
                ..endless
            }
            .plan()
            .is_ok()
        );
    }

    #[test]
    fn a_grace_period_of_zero_or_for_ever_is_a_plan() {
        let nothing = Knobs {
            grace_period: Some(Duration::ZERO),
            ..Knobs::default()
        }
        .plan()
        .unwrap();
        assert_eq!(nothing.deadlines(Duration::ZERO).end, Duration::ZERO);
        let for_ever = Knobs {
            grace_period: Some(Duration::MAX),
            ..Knobs::default()
        }
        .plan()
        .unwrap();
        let now = Instant::now();
        assert!(instant_after(now, for_ever.deadlines(s(5)).drain) > now + s(1_000_000));
    }

    fn any_duration() -> impl Strategy<Value = Duration> {
        prop_oneof![
            Just(Duration::ZERO),
            Just(Duration::MAX),
            Just(Duration::from_nanos(1)),
            (0..120_000_u64).prop_map(Duration::from_millis),
            (any::<u64>(), 0..1_000_000_000_u32).prop_map(|(s, n)| Duration::new(s, n)),
        ]
    }

    fn any_knobs() -> impl Strategy<Value = Knobs> {
        let knob = || proptest::option::of(any_duration());
        (knob(), knob(), knob(), knob(), knob()).prop_map(|(g, d, i, t, c)| Knobs {
            grace_period: g,
            drain_delay: d,
            interrupt_delay: i,
            drain_timeout: t,
            cleanup_timeout: c,
        })
    }

    proptest! {
        #[test]
        fn any_durations_make_an_ordered_plan_within_the_grace_period_or_an_error(
            knobs in any_knobs(),
        ) {
            let grace = knobs.grace_period.unwrap_or(GRACE_PERIOD);
            match knobs.plan() {
                Ok(plan) => for delay in [plan.drain_delay, plan.interrupt_delay, Duration::ZERO] {
                    let deadlines = plan.deadlines(delay);
                    prop_assert!(deadlines.delay <= deadlines.drain);
                    prop_assert!(deadlines.drain <= deadlines.end);
                    prop_assert!(deadlines.end <= grace.saturating_sub(plan.margin));
                    // Each share that was set is granted in full, except for the margin.
                    prop_assert!(deadlines.delay >= delay.min(grace.saturating_sub(plan.margin)));
                    if let Some(timeout) = knobs.drain_timeout {
                        let asked = delay.saturating_add(timeout);
                        prop_assert!(deadlines.drain.saturating_add(plan.margin) >= asked);
                    }
                    let now = Instant::now();
                    prop_assert!(instant_after(now, deadlines.drain) >= now);
                },
                Err(error) => {
                    let named = format!("grace_period {grace:?}");
                    prop_assert!(error.to_string().contains(&named), "{}", error);
                }
            }
        }

        #[test]
        fn durations_that_fit_are_never_rejected(
            delay in 0..10_000_u64, drain in 0..10_000_u64, cleanup in 0..10_000_u64,
        ) {
            let ms = Duration::from_millis;
            let knobs = Knobs {
                grace_period: Some(ms(delay + drain + cleanup)),
                drain_delay: Some(ms(delay)),
                interrupt_delay: None,
                drain_timeout: Some(ms(drain)),
                cleanup_timeout: Some(ms(cleanup)),
            };
            prop_assert!(knobs.plan().is_ok());
            let derived = Knobs { cleanup_timeout: None, ..knobs };
            prop_assert!(derived.plan().is_ok());
            let shorter = ms((delay + drain + cleanup).saturating_sub(1));
            prop_assert_eq!(
                Knobs { grace_period: Some(shorter), ..knobs }.plan().is_ok(),
                delay + drain + cleanup == 0
            );
        }
    }
}
