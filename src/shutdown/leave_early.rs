//! The evidence that the lame-duck phase may end before its delay is over.
//!
//! Two kinds of evidence are collected, each only if the builder has set its rule: new requests
//! that arrive in the lame-duck phase, and answers of the readiness route. Both are recorded under
//! one lock. Requests that already take the slow path record the first kind, and probes the second.
//! An ordinary request in Serving never reaches this code.
//!
//! # Quiet
//!
//! Silence alone proves nothing: a service that is rarely called is silent although its load
//! balancer would still send requests. So the phase ends early only if there was traffic in the
//! phase and it has stopped:
//!
//! 1. at least [`LEAST_REQUESTS`] new requests have arrived since the trigger, and
//! 2. no further request has arrived for `quiet_for`, and for [`GAPS`] times the longest pause
//!    between requests since the trigger. The pause before the first request counts as one.
//!
//! False positives are rare. If requests arrive independently of one another, at any rate, the next
//! pause is longer than `k` times the longest of `n` pauses with probability `1 / C(n + k, k)`. For
//! 5 requests and a factor of 8 that is one stop in 1287, and it is less with more requests. If
//! requests are evenly spaced, it never happens.
//!
//! # Noticed
//!
//! Probers are distinguished by their address, their `User-Agent` and the target that they request.
//! The phase ends early when at least the configured number of probers are known, and every one of
//! them has received the configured number of failures. A prober that asked before the trigger is
//! known from the start of the phase, unless it had stopped asking. The phase does not end before
//! [`SETTLE`] has passed since the last needed failure and since the last new request, because the
//! prober must first read the answer and act on it. If a prober had to be ignored because
//! [`MOST_PROBERS`] were known, after the trigger or at most [`LONGEST_INTERVAL`] before it, the
//! rule does not end the phase.

use std::{net::IpAddr, sync::Mutex, time::Duration};

use tokio::time::Instant;

use crate::{
    config::{
        leave_early::{LeaveEarly, MOST_PROBERS, WhenNoticed, WhenQuiet},
        plan::instant_after,
    },
    report::LeftEarly,
    sync::lock,
};

/// With fewer requests, the usual length of a pause is unknown.
const LEAST_REQUESTS: usize = 5;

/// How many times as long as the longest pause the silence must be.
const GAPS: u32 = 8;

/// The time that a prober may need to read an answer and act on it, and to send the request that it
/// is already sending.
const SETTLE: Duration = Duration::from_millis(100);

/// A prober that has been silent for longer has stopped asking. The value is the longest interval
/// that load balancers offer (AWS target groups: 300 s).
const LONGEST_INTERVAL: Duration = Duration::from_secs(300);

/// A prober that has been silent for this many of its longest intervals has stopped asking.
const MISSED: u32 = 4;

/// The tolerance for jitter in that silence.
const JITTER: Duration = Duration::from_secs(1);

/// The evidence of one lifecycle.
#[derive(Default)]
pub(crate) struct Evidence(Mutex<Seen>);

#[derive(Default)]
struct Seen {
    /// When the lame-duck phase began.
    began: Option<Instant>,
    requests: usize,
    /// When the last new request arrived.
    last_request: Option<Instant>,
    longest_pause: Duration,
    probers: Vec<Prober>,
    /// When a prober was last ignored because [`MOST_PROBERS`] were known.
    overflowed: Option<Instant>,
}

/// The properties that distinguish a prober.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ProberId {
    pub(crate) address: Option<IpAddr>,
    pub(crate) user_agent: Box<[u8]>,
    pub(crate) target: Box<str>,
}

struct Prober {
    id: ProberId,
    last: Instant,
    /// The longest time between two requests. `None` until the second one.
    longest_interval: Option<Duration>,
    failures: u32,
    /// When the prober received the last failure that it needs.
    noticed: Option<Instant>,
}

impl Prober {
    fn has_stopped(&self, now: Instant) -> bool {
        let missed = self.longest_interval.map(|it| it * MISSED + JITTER);
        let most = missed.map_or(LONGEST_INTERVAL, |it| it.min(LONGEST_INTERVAL));
        now.saturating_duration_since(self.last) > most
    }
}

impl Evidence {
    /// Records that the lame-duck phase begins.
    pub(super) fn begin(&self, now: Instant) {
        let mut seen = lock!(self.0);
        seen.began = Some(now);
        seen.probers.retain(|prober| !prober.has_stopped(now));
    }

    /// Records a new request in the lame-duck phase that is not exempt. Returns whether the
    /// timeline must check the rule now. Later requests only postpone the end that the timeline has
    /// planned, so they need no check.
    pub(crate) fn request_arrived(&self) -> bool {
        let mut seen = lock!(self.0);
        // Read under the lock, so that the times are in order.
        let now = Instant::now();
        let Some(began) = seen.began else {
            return false;
        };
        let before = seen.last_request.unwrap_or(began);
        let pause = now.saturating_duration_since(before);
        seen.longest_pause = seen.longest_pause.max(pause);
        seen.last_request = Some(now);
        seen.requests += 1;
        seen.requests == LEAST_REQUESTS
    }

    /// Records an answer of the readiness route. Returns whether the timeline must check the rule
    /// now.
    pub(crate) fn probe_answered(&self, id: ProberId, ready: bool, rule: WhenNoticed) -> bool {
        let mut seen = lock!(self.0);
        let now = Instant::now();
        let stopping = seen.began.is_some();
        let Some(prober) = seen.prober(id, now) else {
            return false;
        };
        if !stopping || ready {
            return false;
        }
        prober.failures = prober.failures.saturating_add(1);
        let notices = prober.failures == rule.failures;
        if notices {
            prober.noticed = Some(now);
        }
        notices
    }

    /// When the lame-duck phase may end if no further request or probe arrives, and by which rule.
    pub(super) fn leaves_at(
        &self,
        rules: LeaveEarly,
        close_spread: Duration,
    ) -> Option<(Instant, LeftEarly)> {
        let seen = lock!(self.0);
        let began = seen.began?;
        let quiet = rules.quiet.and_then(|rule| seen.quiet_at(rule, began));
        let noticed = rules.noticed.and_then(|rule| seen.noticed_at(rule, began));
        let quiet = quiet.map(|at| (at, LeftEarly::Quiet));
        let noticed = noticed.map(|at| (at, LeftEarly::Noticed));
        let (at, why) = quiet.into_iter().chain(noticed).min_by_key(|(at, _)| *at)?;
        // Until then some clients have not been asked to leave.
        Some((at.max(instant_after(began, close_spread)), why))
    }
}

impl Seen {
    /// The prober with this id, after its request at `now` has been recorded. `None` if the prober
    /// is unknown and no more can be remembered.
    fn prober(&mut self, id: ProberId, now: Instant) -> Option<&mut Prober> {
        if let Some(place) = self.probers.iter().position(|it| it.id == id) {
            let prober = &mut self.probers[place];
            let interval = now.saturating_duration_since(prober.last);
            prober.longest_interval = prober.longest_interval.max(Some(interval));
            prober.last = now;
            return Some(prober);
        }
        if self.probers.len() == MOST_PROBERS && self.began.is_none() {
            self.probers.retain(|prober| !prober.has_stopped(now));
        }
        if self.probers.len() == MOST_PROBERS {
            self.overflowed = Some(now);
            return None;
        }
        self.probers.push(Prober {
            id,
            last: now,
            longest_interval: None,
            failures: 0,
            noticed: None,
        });
        self.probers.last_mut()
    }

    fn quiet_at(&self, rule: WhenQuiet, began: Instant) -> Option<Instant> {
        let last = self.last_request?;
        if self.requests < LEAST_REQUESTS {
            return None;
        }
        let silence = rule.quiet_for.max(self.longest_pause.saturating_mul(GAPS));
        let quiet = instant_after(last, silence);
        Some(quiet.max(instant_after(began, rule.minimum)))
    }

    fn noticed_at(&self, rule: WhenNoticed, began: Instant) -> Option<Instant> {
        let unknown = self
            .overflowed
            .is_some_and(|at| began.saturating_duration_since(at) <= LONGEST_INTERVAL);
        if unknown || self.probers.len() < rule.probers {
            return None;
        }
        let noticed: Option<Vec<_>> = self.probers.iter().map(|it| it.noticed).collect();
        let last_failure = noticed?.into_iter().max()?;
        let last = last_failure.max(self.last_request.unwrap_or(last_failure));
        Some(instant_after(last, SETTLE))
    }
}

#[cfg(all(test, not(tower_graceful_loom)))]
mod tests {
    use super::*;

    fn id(number: usize) -> ProberId {
        ProberId {
            address: None,
            user_agent: Box::default(),
            target: number.to_string().into(),
        }
    }

    /// As many probers as are remembered. The second request of each came after this time.
    fn full(interval: Option<Duration>, last: Instant) -> Seen {
        let mut seen = Seen::default();
        for number in 0..MOST_PROBERS {
            if let Some(interval) = interval {
                seen.prober(id(number), last.checked_sub(interval).unwrap());
            }
            assert!(seen.prober(id(number), last).is_some());
        }
        seen
    }

    #[test]
    fn a_prober_that_has_stopped_gives_its_place_to_another() {
        let s = Duration::from_secs;
        let last = Instant::now() + s(1_000);
        let moment = Duration::from_millis(1);
        for (interval, most) in [(Some(s(2)), s(9)), (Some(s(200)), s(300)), (None, s(300))] {
            let mut seen = full(interval, last);
            assert!(seen.prober(id(MOST_PROBERS), last + most).is_none());
            assert!(seen.overflowed.is_some());
            assert_eq!(seen.probers.len(), MOST_PROBERS);
            // The others have stopped, and are forgotten.
            let another = seen.prober(id(MOST_PROBERS), last + most + moment);
            assert!(another.is_some(), "{interval:?}");
            assert_eq!(seen.probers.len(), 1);
        }
    }

    #[test]
    fn no_prober_is_forgotten_before_the_limit_or_after_the_trigger() {
        let last = Instant::now();
        let late = last + 2 * LONGEST_INTERVAL;
        let mut few = full(None, last);
        few.probers.pop();
        assert!(few.prober(id(MOST_PROBERS), late).is_some());
        assert_eq!(few.probers.len(), MOST_PROBERS);
        let mut stopping = full(None, last);
        stopping.began = Some(late);
        assert!(stopping.prober(id(MOST_PROBERS), late).is_none());
        assert_eq!(stopping.probers.len(), MOST_PROBERS);
    }
}
