//! The report, made of the data of a stop that has ended.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::state::Shutdown;
use crate::{
    admission::SinceServing,
    connection::{entry::OpenAtCut, table::Lost},
    events::Reason,
    report::{
        GivenUp, Outcome, Remaining, Report, Requests, TaskKind, TaskOutcome, TaskReport,
        UnlistedWorkers,
    },
    tasks::list::Task,
};

impl Shutdown {
    pub(super) fn report(
        &self,
        reason: Reason,
        server_error: Option<String>,
        figures: SinceServing,
        lost: Lost,
        (tasks, unlisted_workers): (Vec<Task>, UnlistedWorkers),
        now: Instant,
    ) -> Report {
        let tasks: Arc<[_]> = tasks
            .into_iter()
            .map(|task| self.describe(task, now))
            .collect();
        let cut = self.cut.as_ref();
        let mut remaining = cut.map_or_else(Remaining::default, |cut| cut.remaining);
        // A connection that lingered and has delivered everything has lost nothing.
        let left = || cut.into_iter().flat_map(|cut| &cut.connections);
        let cut_short = || left().filter(|left| !left.lingered() || left.undelivered() > 0);
        remaining.connections = cut_short().count() + lost.torn;
        let given_up = cut.map(|cut| GivenUp {
            connections: cut_short().map(OpenAtCut::describe).collect(),
            ..cut.given_up.clone()
        });
        // After a server has dropped a connection, no request is counted for the bytes that the
        // peer has not taken.
        let owing = |lingered: bool| {
            // A response that went out before the stop belongs to no request of this report.
            let owing = left().filter(|left| left.undelivered() > 0 && left.owes_response());
            owing.filter(|left| left.lingered() == lingered).count()
        };
        // On `serve` the server says of how many responses it held bytes. On other servers a response may
        // consist of several pieces, so the pieces count at most once for each open connection.
        let unsent: usize = left().map(|left| left.unsent as usize).sum();
        let open = left().filter(|left| !left.lingered()).count();
        let pieces = cut.map_or(0, |cut| cut.pieces.min(open));
        let known = remaining.requests + unsent;
        let requests_cut = owing(true) + owing(false).max(pieces).max(known) + lost.torn_requests;
        remaining.servers = self.servers_left;
        remaining.queued = self.queued;
        remaining.half_closed = lost.half_closed;
        remaining.workers = tasks.iter().filter(|task| task.is_cut_worker()).count();
        let outcome = if matches!(reason, Reason::Signal) {
            Outcome::Abandoned
        } else if !remaining.is_nothing() {
            Outcome::Forced
        } else if server_error.is_some() {
            Outcome::ServerFailed
        } else if tasks.iter().any(TaskReport::is_failure) {
            // Checking the listed tasks is enough: a failure is left out of the list only in favour
            // of later failures.
            Outcome::CleanupFailed
        } else {
            Outcome::Clean
        };
        let closed = self.cleanup.as_ref().map_or(now, |cleanup| cleanup.begun);
        let ends = self.entered.iter().skip(1).copied().chain([closed]);
        let mut phases = [Duration::ZERO; 3];
        for ((phase, begun), ended) in phases.iter_mut().zip(&self.entered).zip(ends) {
            *phase = ended.saturating_duration_since(*begun);
        }
        // A request that ended without a response after the cut counts as cut, not as dropped. So does one
        // that was dropped just when the cut counted.
        let begun = self.in_flight + figures.admitted;
        let dropped = cut.map_or(figures.dropped, |cut| cut.dropped);
        let dropped = dropped.min(begun.saturating_sub(remaining.requests));
        // A response that failed half-way may have undelivered bytes, but it is only dropped.
        let requests_cut = requests_cut.min(begun - dropped);
        Report {
            trigger: self.trigger,
            outcome,
            left_early: match self.delay_over {
                Some(Reason::LeftEarly(why)) => Some(why),
                _ => None,
            },
            phases,
            cleanup: now.saturating_duration_since(closed),
            requests: Requests {
                in_flight: self.in_flight,
                admitted: figures.admitted,
                finished: begun - dropped - requests_cut,
                refused: figures.refused,
                cut: requests_cut,
                dropped,
            },
            remaining,
            given_up: Arc::new(given_up.unwrap_or_default()),
            tasks,
            unlisted_workers,
            server_error,
            warnings: Arc::default(),
        }
    }

    fn describe(&self, task: Task, now: Instant) -> TaskReport {
        let entered = |phase: usize| self.entered.get(phase).copied();
        let asked = entered(0).unwrap_or(now);
        let (ended, outcome) = match task.ended {
            Some((ended, outcome)) => (ended, outcome),
            None if task.began.is_none() => (now, TaskOutcome::NotRun),
            None => (now, TaskOutcome::Cut),
        };
        let began = match task.kind {
            // A worker is measured from the start of draining, when it was told to stop.
            TaskKind::Worker => entered(1).unwrap_or(now),
            TaskKind::LameDuck | TaskKind::Cleanup => task.began.unwrap_or(now),
        };
        let began = began.min(ended).max(asked);
        TaskReport {
            name: task.name.into_owned(),
            kind: task.kind,
            began: began - asked,
            took: ended.saturating_duration_since(began),
            outcome,
        }
    }
}
