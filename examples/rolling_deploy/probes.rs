//! The probes of the kubelet: when one is sent, when its results take effect, and what the liveness probe
//! has seen.

use std::{
    collections::BTreeSet,
    fmt,
    time::{Duration, Instant},
};

use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::single;

#[derive(Clone, Debug)]
pub(crate) struct Probe {
    pub(crate) path: &'static str,
    pub(crate) period: Duration,
    pub(crate) timeout: Duration,
    pub(crate) success_threshold: u32,
    pub(crate) failure_threshold: u32,
}

impl Probe {
    /// The times of the probe. The first is now.
    pub(crate) fn ticks(&self) -> Interval {
        let mut ticks = interval(self.period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks
    }

    /// The longest time without an answer at the end of a container. The port is closed shortly before the
    /// process ends, so the last probe may be refused. 0.8 s are for a busy machine.
    pub(crate) fn silence(&self) -> Duration {
        self.period + Duration::from_millis(800)
    }

    /// Sends the probe on a new connection, and returns the text of a success.
    pub(crate) async fn ask(&self, port: u16) -> Option<String> {
        let answer = single::text(port, self.path, self.timeout).await;
        let (status, text) = answer.ok()?;
        (200..400).contains(&status.as_u16()).then_some(text)
    }
}

/// Equal results of a probe in a row.
#[derive(Debug, Default)]
pub(crate) struct InARow {
    success: bool,
    count: u32,
}

impl InARow {
    /// Adds a result. Returns it if it takes effect.
    pub(crate) fn add(&mut self, probe: &Probe, success: bool) -> Option<bool> {
        if success != self.success {
            *self = Self { success, count: 0 };
        }
        self.count += 1;
        let threshold = if success {
            probe.success_threshold
        } else {
            probe.failure_threshold
        };
        (self.count >= threshold).then_some(success)
    }
}

/// What the liveness probe of one container has seen.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lively {
    pub(crate) answered: u32,
    /// Failures that were followed by an answer.
    pub(crate) gaps: u32,
    /// The phases that the answers name.
    pub(crate) phases: BTreeSet<String>,
    /// Failures since the last answer.
    unanswered: u32,
    /// When the first probe was sent that no answer has followed.
    silent_since: Option<Instant>,
}

impl Lively {
    pub(crate) fn asked(&mut self) {
        self.silent_since.get_or_insert_with(Instant::now);
    }

    /// Adds the result of the probe: the text of the answer, or a failure.
    pub(crate) fn add(&mut self, answer: Option<&str>) {
        let Some(text) = answer else {
            self.unanswered += 1;
            return;
        };
        self.answered += 1;
        self.gaps += std::mem::take(&mut self.unanswered);
        self.phases.insert(text.trim().to_owned());
        self.silent_since = None;
    }

    /// How long the container had not answered when it ended: the time since the first probe after the
    /// last answer. Zero if the last probe was answered. The time between two probes does not count, so
    /// that a probe which a busy machine sends late is not held against the container.
    pub(crate) fn silence(&self, exited: Instant) -> Duration {
        self.silent_since
            .map_or(Duration::ZERO, |since| exited - since)
    }
}

impl fmt::Display for Lively {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let phases: Vec<_> = self.phases.iter().map(String::as_str).collect();
        write!(
            f,
            "/livez answered {} times, in: {}; missing between two: {}",
            self.answered,
            phases.join(", "),
            self.gaps
        )
    }
}
