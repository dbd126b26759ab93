//! What tells that the lame-duck phase may end before its delay is over.
//!
//! Two kinds of evidence are collected, each only where the builder asked for its rule: new requests
//! that arrive in the lame-duck phase, and answers of the readiness route. Both are noted under one
//! lock, by requests that already take the slow path and by probes. In Serving no request comes here.
//!
//! # Quiet
//!
//! Silence alone proves nothing: a service that is rarely called is silent while its balancer would
//! still send. So the phase ends early only if there was traffic in the phase and it ended:
//!
//! 1. [`LEAST_REQUESTS`] new requests have arrived since the trigger, and
//! 2. no request has arrived since, for `quiet_for` and for [`GAPS`] times the longest pause seen
//!    since the trigger, the pause before the first request included.
//!
//! For requests that arrive independently of one another, at any rate, the next pause is longer than
//! `k` times the longest of `n` with the probability `1 / C(n + k, k)`: for 5 and 8 once in 1287 stops,
//! and less often the more requests arrive. For evenly spaced ones it never is.
//!
//! # Noticed
//!
//! A prober is told from others by its address, its `User-Agent` and the target it asks for. The phase
//! ends early once as many of them as the builder was told have had as many failures as they need,
//! and none has had fewer. A prober that asked before the trigger counts among them from the start,
//! unless it had stopped asking. After the last failure that was needed, and after every new request,
//! [`SETTLE`] passes first: the prober has still to read the answer and to act on it.

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

/// With fewer requests than this, how long a pause is usual is not known.
const LEAST_REQUESTS: usize = 5;

/// How many times longer than every pause before it the silence must be.
const GAPS: u32 = 8;

/// What a prober may need to act on an answer: to read it, and to send what it had begun to send.
const SETTLE: Duration = Duration::from_millis(100);

/// A prober that has not asked for this long does not ask any more: the longest interval that
/// balancers offer (AWS target groups: 300 s).
const LONGEST_INTERVAL: Duration = Duration::from_secs(300);

/// Nor does one that has missed so many times its longest interval so far.
const MISSED: u32 = 4;

/// What is allowed for the jitter of such an interval.
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
    /// When there were last more probers than are remembered.
    overflowed: Option<Instant>,
}

/// What a prober is known by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ProberId {
    pub(crate) address: Option<IpAddr>,
    pub(crate) user_agent: Box<[u8]>,
    pub(crate) target: Box<str>,
}

struct Prober {
    id: ProberId,
    last: Instant,
    /// Known from its second question on.
    longest_interval: Option<Duration>,
    failures: u32,
    /// When it had as many failures as it needs.
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
    /// The lame-duck phase begins.
    pub(super) fn begin(&self, now: Instant) {
        let mut seen = lock!(self.0);
        seen.began = Some(now);
        seen.probers.retain(|prober| !prober.has_stopped(now));
    }

    /// A new request has arrived in the lame-duck phase, and is not exempt. Says whether the timeline
    /// has to look: later requests only put off what it has planned.
    pub(crate) fn request_arrived(&self) -> bool {
        let mut seen = lock!(self.0);
        // Under the lock, so that the times are in order.
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

    /// The readiness route has answered. Says whether the timeline has to look.
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

    /// When the lame-duck phase may end if nothing more comes, and why then.
    pub(super) fn leaves_at(&self, rules: LeaveEarly) -> Option<(Instant, LeftEarly)> {
        let seen = lock!(self.0);
        let began = seen.began?;
        let quiet = rules.quiet.and_then(|rule| seen.quiet_at(rule, began));
        let noticed = rules.noticed.and_then(|rule| seen.noticed_at(rule, began));
        let quiet = quiet.map(|at| (at, LeftEarly::Quiet));
        let noticed = noticed.map(|at| (at, LeftEarly::Noticed));
        quiet.into_iter().chain(noticed).min_by_key(|(at, _)| *at)
    }
}

impl Seen {
    /// The prober with this id, which has asked now. `None` if no more can be remembered.
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
