//! What runs besides the requests while the service stops: hooks in the lame-duck phase; and when
//! nothing is in flight any more, the joining of the workers and the cleanup steps.

use std::time::Duration;

use tokio::{
    task::{JoinError, JoinHandle},
    time::{self, Instant},
};

use super::{Shared, state::ClosingStage};
use crate::{
    config::plan::instant_after,
    events::Event,
    phase::Phase,
    report::{TaskKind, TaskOutcome},
};

/// How long a task that was cut is given to be gone, before what comes after it begins.
const GONE: Duration = Duration::from_millis(50);

/// How long a step is given even where no time is left, so that every one has its turn.
const LEAST_BOUND: Duration = Duration::from_millis(10);

/// How long after the end of the plan the last step is over at the latest, whatever the steps do, where
/// the runtime runs: see `clean_up`.
pub(super) fn most_overtime(steps: usize) -> Duration {
    let waits = u32::try_from(steps).unwrap_or(u32::MAX).saturating_add(3);
    (LEAST_BOUND + GONE).saturating_mul(waits)
}

/// A task that is aborted when it is no longer wanted.
struct Job(JoinHandle<()>);

impl Job {
    /// Waits for the end of the task, until the deadline. Says whether it has ended; otherwise it
    /// has been cut.
    async fn ends_by(&mut self, deadline: Instant) -> bool {
        let ended = time::timeout_at(deadline, &mut self.0).await.is_ok();
        if !ended {
            self.0.abort();
        }
        ended
    }

    /// Waits for what was cut to be gone, unless it holds its thread and cannot be.
    async fn is_gone_by(&mut self, deadline: Instant) {
        let _: Result<Result<(), JoinError>, _> = time::timeout_at(deadline, &mut self.0).await;
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Shared {
    /// Starts the hooks of the lame-duck phase. They run beside it, and not longer.
    pub(super) fn start_hooks(&self) {
        for hook in self.work.take(TaskKind::LameDuck) {
            let shared = self.clone();
            let mut phases = self.phases();
            let key = hook.key;
            let handle = tokio::spawn(async move {
                shared.work.began(hook.key);
                let outcome = tokio::select! {
                    biased;
                    outcome = hook.job => outcome,
                    () = time::sleep(hook.timeout) => TaskOutcome::Cut,
                    _ = phases.wait_for(|phase| *phase >= Phase::Draining) => TaskOutcome::Cut,
                };
                shared.task_ended(hook.key, outcome);
            });
            self.work.hook_runs(key, handle);
        }
    }

    /// Waits for hooks whose delay was over before they had their one poll, or that have still to
    /// notice that it is.
    async fn join_hooks(&self) {
        let gone = gone();
        for (key, handle) in self.work.running_hooks() {
            if !Job(handle).ends_by(gone).await {
                self.task_ended(key, TaskOutcome::Cut);
            }
        }
    }

    /// When cleaning up has to be done, if it has begun.
    pub(super) fn cleanup_deadline(&self) -> Option<Instant> {
        let state = self.state();
        let shutdown = state.shutdown.as_ref()?;
        debug_assert!(
            shutdown.cleanup.is_none() || shutdown.closing_stage == ClosingStage::Servers
        );
        shutdown.cleanup.as_ref().map(|_| shutdown.end)
    }

    /// Joins the workers, and then runs the steps one after another. Dropping the future gives up
    /// what is running and what has not begun.
    pub(super) async fn clean_up(self, deadline: Instant) {
        self.join_hooks().await;
        self.join_workers(deadline).await;
        let mut steps = self.work.take(TaskKind::Cleanup);
        // No timeout is more than all there is, so that one without an end leaves the others a share.
        let most = deadline.saturating_duration_since(Instant::now());
        for step in &mut steps {
            step.timeout = step.timeout.min(most);
        }
        let mut steps = steps.into_iter();
        while let Some(step) = steps.next() {
            let rest = steps.as_slice().iter().map(|step| step.timeout);
            let timeout = share(deadline, step.timeout, rest);
            self.work.began(step.key);
            let shared = self.clone();
            let mut job = Job(tokio::spawn(async move {
                let outcome = step.job.await;
                shared.task_ended(step.key, outcome);
            }));
            let until = instant_after(Instant::now(), timeout);
            if !job.ends_by(until).await {
                job.is_gone_by(gone()).await;
                self.task_ended(step.key, TaskOutcome::Cut);
            }
            self.was_it_late(step.key, until);
        }
    }

    async fn join_workers(&self, deadline: Instant) {
        let workers = self.work.dismiss();
        if workers.is_empty() {
            return;
        }
        let until = instant_after(Instant::now(), self.workers_share(deadline));
        // All at once, so that whoever is not reached is aborted when this is dropped.
        let workers: Vec<_> = workers
            .into_iter()
            .map(|(key, handle)| (key, Job(handle)))
            .collect();
        let mut cut = Vec::new();
        for (key, mut job) in workers {
            if job.ends_by(until).await {
                self.was_it_late(key, until);
            } else {
                cut.push((key, job));
            }
        }
        let gone = gone();
        for (key, mut job) in cut {
            job.is_gone_by(gone).await;
            self.task_ended(key, TaskOutcome::Cut);
        }
    }

    /// What holds its thread cannot be cut, and may end in good order long after its time.
    fn was_it_late(&self, key: usize, until: Instant) {
        self.work.was_late(key, instant_after(until, GONE));
    }

    /// How long workers are waited for: not into the time that the steps have asked for, as far as
    /// that is no more than half of what there is.
    fn workers_share(&self, deadline: Instant) -> Duration {
        let left = deadline.saturating_duration_since(Instant::now());
        let most = left.saturating_sub(self.work.asked_by_steps().min(left / 2));
        self.policy.worker_timeout.unwrap_or(most).min(most)
    }

    /// Ends what is still there when the service has stopped without cleaning up.
    pub(super) fn give_up_work(&self) {
        for (_, worker) in self.work.dismiss() {
            worker.abort();
        }
        drop(self.work.take(TaskKind::LameDuck));
        drop(self.work.take(TaskKind::Cleanup));
    }

    /// Notes how a task came to its end, and has it logged.
    pub(crate) fn task_ended(&self, key: usize, outcome: TaskOutcome) {
        let before_stop = self.phase() < Phase::Draining;
        let outcome = match outcome {
            // A worker that was not told to.
            TaskOutcome::Done if before_stop && self.work.is_worker(key) => TaskOutcome::EndedEarly,
            outcome => outcome,
        };
        if let Some(task) = self.work.ended(key, outcome, before_stop) {
            self.tell_log(Event::Task(Box::new(task)));
        }
        if self.policy.leave_early.is_on() {
            // It may be the last hook that the lame-duck phase waited for.
            self.notify();
        }
    }

    /// All that was to be cleaned up is.
    pub(super) fn cleaned_up(&self) {
        self.change(|state, _| {
            let cleanup = state.shutdown.as_mut().and_then(|it| it.cleanup.as_mut());
            if let Some(cleanup) = cleanup {
                cleanup.done = true;
            }
        });
    }
}

/// When what is cut now is given up.
fn gone() -> Instant {
    instant_after(Instant::now(), GONE)
}

/// How much of the time until the deadline a step has: what it asked for, or where all those that
/// are left have asked for more than there is, its share of it.
fn share(deadline: Instant, timeout: Duration, rest: impl Iterator<Item = Duration>) -> Duration {
    let left = deadline.saturating_duration_since(Instant::now());
    let asked = rest.fold(timeout, Duration::saturating_add);
    let timeout = if asked <= left {
        timeout
    } else {
        left.mul_f64(timeout.as_secs_f64() / asked.as_secs_f64())
    };
    timeout.max(LEAST_BOUND)
}

#[cfg(all(test, feature = "signal", not(tower_graceful_loom)))]
mod tests {
    use std::{future::pending, sync::Arc};

    use super::*;
    use crate::{
        handle::graceful::Graceful,
        report::{Outcome, Report, Trigger},
    };

    const SECOND: Duration = Duration::from_secs(1);

    fn stop(graceful: &Graceful) {
        graceful.shared().signal(Trigger::Terminate);
    }

    fn skip_phase(graceful: &Graceful) {
        graceful.shared().signal(Trigger::Interrupt);
    }

    async fn report(graceful: &Graceful) -> Report {
        graceful.stopped().await;
        graceful.shared().report().unwrap()
    }

    fn fates(report: &Report) -> Vec<TaskOutcome> {
        report.tasks().iter().map(|it| it.outcome.clone()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_further_sigint_abandons_the_steps_at_once() {
        let graceful = Graceful::new();
        graceful.cleanup("done", SECOND, async {}).unwrap();
        let (running, waiting) = (pending::<()>(), pending::<()>());
        graceful.cleanup("running", SECOND * 9, running).unwrap();
        graceful.cleanup("waiting", SECOND * 9, waiting).unwrap();
        stop(&graceful);
        time::sleep(SECOND).await;
        assert_eq!(graceful.phase(), Phase::Closing);
        skip_phase(&graceful);
        assert_eq!(graceful.phase(), Phase::Stopped, "before it returns");
        let report = report(&graceful).await;
        assert_eq!(report.outcome(), Outcome::Abandoned);
        assert_eq!(report.duration(), SECOND);
        assert_eq!(report.cleanup_time(), SECOND);
        assert_eq!(
            fates(&report),
            [TaskOutcome::Done, TaskOutcome::Cut, TaskOutcome::NotRun]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_further_sigint_abandons_the_workers_at_once() {
        let graceful = Graceful::new();
        let held = Arc::new(());
        let kept = Arc::clone(&held);
        let endless = |_| async move {
            pending::<()>().await;
            drop(kept);
        };
        graceful.worker("endless", endless).unwrap();
        graceful.cleanup("step", SECOND, async {}).unwrap();
        stop(&graceful);
        time::sleep(SECOND).await;
        skip_phase(&graceful);
        let report = report(&graceful).await;
        assert_eq!(report.outcome(), Outcome::Abandoned);
        assert_eq!(report.duration(), SECOND);
        assert_eq!(fates(&report), [TaskOutcome::Cut, TaskOutcome::NotRun]);
        assert_eq!(report.remaining().workers, 1);
        time::sleep(SECOND).await;
        assert_eq!(Arc::strong_count(&held), 1, "it is gone");
    }

    #[tokio::test(start_paused = true)]
    async fn a_sigint_that_ends_the_drain_does_not_end_the_cleanup() {
        let graceful = Graceful::new();
        let hold = graceful.hold("hold");
        let step = time::sleep(SECOND);
        graceful.cleanup("step", SECOND * 2, step).unwrap();
        stop(&graceful);
        time::sleep(SECOND).await;
        skip_phase(&graceful);
        assert_eq!(graceful.phase(), Phase::Closing);
        let report = report(&graceful).await;
        drop(hold);
        assert_eq!(report.outcome(), Outcome::Forced);
        assert_eq!(fates(&report), [TaskOutcome::Done]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_sigint_in_the_moment_of_the_end_does_not_skip_the_cleanup() {
        let graceful = Graceful::new();
        let hold = graceful.hold("hold");
        graceful.cleanup("step", SECOND, async {}).unwrap();
        stop(&graceful);
        skip_phase(&graceful);
        assert_eq!(graceful.phase(), Phase::Closing);
        time::sleep(SECOND / 8).await;
        // What was cut ends, and nobody has looked yet.
        drop(hold);
        skip_phase(&graceful);
        let report = report(&graceful).await;
        assert_eq!(report.outcome(), Outcome::Forced);
        assert_eq!(fates(&report), [TaskOutcome::Done]);
    }
}
