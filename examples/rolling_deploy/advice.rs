//! Derives from the lost requests what to change in the service or in its deployment.

use std::{fmt::Display, os::unix::process::ExitStatusExt, time::Duration};

use crate::{
    deploy::{Front, Plan, Run, Stop},
    load::{Failure, How, Kind},
    verdict::{When, when},
};

/// A request that was lost in a stop that ended without SIGKILL.
#[derive(Clone, Copy, Debug)]
struct Loss<'a> {
    failure: &'a Failure,
    when: When,
    stop: &'a Stop,
}

impl Loss<'_> {
    /// The response was truncated, or a long request that began before SIGTERM was reset.
    fn cut(self) -> bool {
        match self.failure.how {
            How::Truncated => true,
            How::Reset => {
                self.failure.begun < self.stop.ended.signalled
                    && matches!(self.failure.kind, Kind::Slow | Kind::Upload)
            }
            _ => false,
        }
    }

    /// The request was refused or reset, or the balancer had no backend for it, and it was not `cut`.
    fn gone(self) -> bool {
        let how = self.failure.how;
        matches!(how, How::Refused | How::Reset | How::NoBackend) && !self.cut()
    }

    fn answered(self) -> bool {
        matches!(self.failure.how, How::Status(_) | How::RetryAfter(_))
    }
}

/// Returns the advice, the most urgent first.
pub(crate) fn of(plan: &Plan, run: &Run) -> Vec<String> {
    let mut lines = Vec::new();
    let killed = run.stops.iter().filter(|stop| stop.ended.killed).count();
    if killed > 0 {
        lines.push(format!(
            "{killed} of {} stops ended by SIGKILL. Handle SIGTERM (a shell that is the container's \
             first process does not pass it on), and end the drain before the grace period is over: \
             with tower-graceful, grace_period = terminationGracePeriodSeconds.",
            run.stops.len()
        ));
    }
    let placed = run
        .tally
        .failures
        .iter()
        .map(|one| (one, when(one, &run.stops)));
    let early = placed
        .clone()
        .filter(|(_, (when, _))| *when == When::BeforeSignal);
    let early = early.count();
    if early > 0 {
        lines.push(format!(
            "{early} requests were lost before anything was stopped: look at the service, or at the \
             paths (--get, --slow, --upload), first. What was lost later may have the same cause."
        ));
        return lines;
    }
    let losses: Vec<_> = placed
        .filter_map(|(failure, (when, stop))| {
            let stop = stop.filter(|stop| !stop.ended.killed)?;
            Some(Loss {
                failure,
                when,
                stop,
            })
        })
        .collect();
    lines.extend(from_losses(plan, &losses));
    lines.extend(from_stops(plan, run));
    lines
}

fn from_losses(plan: &Plan, losses: &[Loss<'_>]) -> Vec<String> {
    let mut lines = Vec::new();
    let notices = notices(plan);
    let draining = |loss: Loss<'_>| loss.when == When::Draining;

    let (gone, within) = count(losses, |loss| !draining(loss) && loss.gone());
    if gone > 0 {
        lines.push(format!(
            "{gone} requests were refused or reset within {within} ms of the signal: the service \
             stops listening before the balancer has noticed. Let it fail its readiness probe at \
             SIGTERM and go on serving: with tower-graceful, set drain_delay above {notices}."
        ));
    }
    let (answered, within) = count(losses, |loss| !draining(loss) && loss.answered());
    if answered > 0 {
        lines.push(format!(
            "{answered} requests were answered with an error within {within} ms of the signal, \
             before the balancer had noticed. Let the service go on serving for longer: with \
             tower-graceful, set drain_delay above {notices}."
        ));
    }
    let (cut, _) = count(losses, Loss::cut);
    if cut > 0 {
        lines.push(format!(
            "{cut} requests were cut while they were in flight. Let the service wait for them, \
             uploads and response bodies included: with tower-graceful, set drain_timeout above the \
             slowest request."
        ));
    }
    let (late, _) = count(losses, |loss| {
        draining(loss) && (loss.answered() || loss.gone())
    });
    if late > 0 {
        lines.push(format!(
            "{late} requests failed while draining, although the balancer had noticed: they were on \
             their way. A longer drain_delay covers them."
        ));
    }
    let (timed_out, _) = count(losses, |loss| loss.failure.how == How::TimedOut);
    if timed_out > 0 {
        lines.push(format!(
            "{timed_out} requests were not answered within {:.0} s (--timeout).",
            plan.paths.timeout.as_secs_f64()
        ));
    }
    lines
}

/// Counts the `wanted` losses, and returns when the last one was lost, in milliseconds after SIGTERM.
fn count<'a>(losses: &[Loss<'a>], wanted: impl Fn(Loss<'a>) -> bool) -> (usize, u128) {
    let mut last = Duration::ZERO;
    let mut count = 0;
    for loss in losses.iter().filter(|loss| wanted(**loss)) {
        count += 1;
        last = last.max(loss.failure.failed - loss.stop.ended.signalled);
    }
    (count, last.as_millis())
}

fn notices(plan: &Plan) -> impl Display + use<> {
    match plan.front {
        Front::Own => format!(
            "interval × fall = {:.1} s × {} = {:.1} s",
            plan.check.interval.as_secs_f64(),
            plan.check.fall,
            plan.check.notices_within().as_secs_f64()
        ),
        Front::External { .. } => "the time that your balancer needs to notice".into(),
    }
}

fn from_stops(plan: &Plan, run: &Run) -> Vec<String> {
    let mut lines = Vec::new();
    let some = |test: fn(&Stop) -> bool| {
        run.stops
            .iter()
            .any(|stop| !stop.ended.killed && test(stop))
    };
    if some(|stop| stop.ended.left_behind) {
        lines.push(
            "The process that the command started ended before the processes that it had started, and these \
             were killed, as in a container. A shell does not pass SIGTERM on: let it start the service with \
             `exec`."
                .into(),
        );
    } else if some(|stop| stop.ended.status.signal() == Some(15)) {
        lines.push(
            "SIGTERM itself ended the process: it has no handler, or it raises the signal again after \
             its shutdown, which is in order."
                .into(),
        );
    }
    if some(|stop| {
        stop.noticed
            .is_some_and(|noticed| noticed > stop.ended.exited)
    }) {
        lines.push(format!(
            "The balancer noticed a stop only after the process had ended. Let GET {} fail from \
             SIGTERM on, and let the process live on for longer than {}.",
            plan.check.path,
            notices(plan)
        ));
    }
    if some(|stop| stop.ended.status.code().is_some_and(|code| code != 0)) {
        lines.push("An exit code other than 0 says that a stop was not clean.".into());
    }
    lines
}
