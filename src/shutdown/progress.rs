//! What a stop waits for: for the log while it drains, and for the message that the watchdog writes
//! before it ends the process.

use std::time::Duration;

use tokio::time::Instant;

use super::{Lifecycle, state::State};
#[cfg(all(unix, feature = "signal"))]
use crate::phase::Phase;
#[cfg(feature = "signal")]
use crate::tasks::list::Task;
use crate::{
    config::plan::instant_after,
    events::{self, Event},
};

/// How often a drain logs what it waits for.
const PROGRESS: Duration = Duration::from_secs(2);

impl Lifecycle {
    /// Logs from time to time what the stop waits for. Returns when to check again.
    pub(super) fn note_progress(
        &self,
        state: &mut State,
        draining: Instant,
        now: Instant,
    ) -> Instant {
        let at = *state
            .progress_at
            .get_or_insert_with(|| instant_after(draining, PROGRESS));
        if now < at {
            return at;
        }
        let phase = self.phase();
        let shutdown = state.shutdown.as_ref();
        let ends = shutdown.and_then(|it| it.ends(phase));
        let cleans_up = shutdown.is_some_and(|it| it.cleanup.is_some());
        if let Some(ends) = ends {
            let mut oldest = self.request_table.list(now);
            oldest.truncate(3);
            state.events.push(Event::Progress(events::Progress {
                phase,
                in_flight: self.in_flight(),
                connections: self.connections.len(),
                time_left: ends.saturating_duration_since(now),
                oldest,
                awaited: self.work.awaited(cleans_up),
            }));
        }
        let at = instant_after(now, PROGRESS);
        state.progress_at = Some(at);
        at
    }

    /// Whether nothing is left that the stop waited for.
    #[cfg(feature = "signal")]
    pub(super) fn has_ended(&self) -> bool {
        let runs = || self.work.tasks().iter().any(Task::is_running);
        self.in_flight() == 0 && self.connections.len() == 0 && !runs()
    }

    /// The watchdog's message if the grace period is nearly over and the service has not stopped, or work
    /// that it has given up has not ended.
    #[cfg(all(unix, feature = "signal"))]
    pub(super) fn describe_end(&self) -> Option<String> {
        if self.phase() == Phase::Stopped && self.has_ended() {
            return None;
        }
        let now = Instant::now();
        let mut lines = vec![format!(
            "shutdown: the grace period is nearly over, and the service is {}: in flight {}, \
             connections {}; the process is ended by the watchdog",
            self.phase(),
            self.in_flight(),
            self.connections.len(),
        )];
        let requests = self.request_table.list(now);
        lines.extend(requests.iter().take(3).map(ToString::to_string));
        let holds = self.work.list_holds(now);
        lines.extend(holds.iter().take(3).map(ToString::to_string));
        for task in self.work.tasks() {
            if task.is_running() || task.began.is_none() && task.ended.is_none() {
                lines.push(format!("{} has not ended", task.name));
            }
        }
        Some(lines.join("\n  "))
    }
}
