//! The plan: every set of durations is a plan with its deadlines in order, or a clear error. Durations that fit
//! into the grace period are a plan.

#![no_main]

use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use tower_graceful::Graceful;

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Time {
    Zero,
    Max,
    Milliseconds(u16),
    Seconds(u16),
    Nanoseconds(u64),
    Any(u64, u32),
}

impl Time {
    fn duration(self) -> Duration {
        match self {
            Self::Zero => Duration::ZERO,
            Self::Max => Duration::MAX,
            Self::Milliseconds(time) => Duration::from_millis(time.into()),
            Self::Seconds(time) => Duration::from_secs(time.into()),
            Self::Nanoseconds(time) => Duration::from_nanos(time),
            Self::Any(seconds, nanoseconds) => Duration::new(seconds, nanoseconds % 1_000_000_000),
        }
    }
}

#[derive(Arbitrary, Debug)]
struct Knobs {
    grace_period: Option<Time>,
    drain_delay: Option<Time>,
    interrupt_delay: Option<Time>,
    drain_timeout: Option<Time>,
    cleanup_timeout: Option<Time>,
    worker_timeout: Option<Time>,
    close_spread: Option<Time>,
    drain_spread: Option<Time>,
    quiet: Option<(Time, Time)>,
    noticed: Option<(u32, usize)>,
}

impl Knobs {
    /// Whether these durations fit into the grace period. Of plans with a spread or a rule that ends the delay early it
    /// says nothing, because these have limits of their own.
    fn fit(&self) -> bool {
        let time = |knob: Option<Time>, default| knob.map_or(default, Time::duration);
        let grace_period = time(self.grace_period, Duration::from_secs(30));
        let sixth = Duration::from_secs(5).min(grace_period / 6);
        let delay = time(self.drain_delay, sixth).max(time(self.interrupt_delay, Duration::ZERO));
        let fits = match self.drain_timeout {
            // The cleanup takes what is left, unless its time is set.
            Some(drain_timeout) => delay
                .checked_add(drain_timeout.duration())
                .and_then(|sum| sum.checked_add(time(self.cleanup_timeout, Duration::ZERO)))
                .is_some_and(|sum| sum <= grace_period),
            // The drain takes what is left without the margin, which is a thirtieth or a second.
            None => delay
                .checked_add(time(self.cleanup_timeout, sixth))
                .and_then(|sum| sum.checked_add(Duration::from_secs(1).min(grace_period / 30)))
                .is_some_and(|sum| sum < grace_period),
        };
        let has_limits = self.close_spread.is_some()
            || self.drain_spread.is_some()
            || self.quiet.is_some()
            || self.noticed.is_some();
        fits && !has_limits
    }
}

fuzz_target!(|knobs: Knobs| {
    let mut builder = Graceful::builder();
    // Each knob that is set. The order of the calls must not matter, so there is only one.
    macro_rules! set {
        ($($knob:ident),*) => {$(
            if let Some(time) = knobs.$knob {
                builder = builder.$knob(time.duration());
            }
        )*};
    }
    set!(
        grace_period,
        drain_delay,
        interrupt_delay,
        drain_timeout,
        cleanup_timeout,
        worker_timeout,
        close_spread,
        drain_spread
    );
    if let Some((minimum, quiet_for)) = knobs.quiet {
        builder = builder.leave_when_quiet(minimum.duration(), quiet_for.duration());
    }
    if let Some((failures, probers)) = knobs.noticed {
        builder = builder.leave_when_noticed(failures, probers);
    }
    let grace_period = knobs.grace_period.map(Time::duration);
    match builder.build() {
        Ok(graceful) => {
            let plan = graceful.plan();
            assert_eq!(
                plan.grace_period,
                grace_period.unwrap_or(Duration::from_secs(30))
            );
            for (set, planned) in [
                (knobs.drain_delay, plan.drain_delay),
                (knobs.interrupt_delay, plan.interrupt_delay),
                (knobs.cleanup_timeout, plan.cleanup_timeout),
            ] {
                assert!(set.is_none_or(|set| set.duration() == planned), "{plan:?}");
            }
            let end = plan.grace_period.saturating_sub(plan.margin);
            // The margin may take its part of a delay that fills the grace period.
            assert!(plan.drain_delay.min(end) <= plan.drain_deadline, "{plan:?}");
            assert!(plan.drain_deadline <= end, "{plan:?}");
            assert!(plan.cleanup_timeout <= plan.grace_period, "{plan:?}");
            assert!(plan.interrupt_delay <= plan.grace_period, "{plan:?}");
            if let Some(timeout) = knobs.drain_timeout {
                let asked = plan.drain_delay.saturating_add(timeout.duration());
                assert!(
                    plan.drain_deadline.saturating_add(plan.margin) >= asked,
                    "{plan:?}"
                );
                assert!(plan.drain_deadline <= asked, "{plan:?}");
            }
        }
        Err(error) => {
            let text = error.to_string();
            assert!(!knobs.fit(), "{text}");
            let names = [
                "grace_period",
                "drain_delay",
                "interrupt_delay",
                "leave_when_quiet",
                "leave_when_noticed",
                "worker_timeout",
                "close_spread",
                "drain_spread",
            ];
            assert!(names.iter().any(|name| text.contains(name)), "{text}");
        }
    }
});
