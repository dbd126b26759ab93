//! What holds for every lifecycle.

use std::{collections::BTreeSet, time::Duration};

use http::StatusCode;
use proptest::prelude::*;
use tokio::time::Instant;
use tower_graceful::{Outcome, Phase, TaskKind, TaskOutcome, TaskReport, Trigger};

use crate::{
    schedule::{Schedule, Step},
    world::{Became, Ended, Event, Played, Ran, Seen, SeenRequest, path},
};

/// Timers have milliseconds, and several follow one another.
const ROUNDING: Duration = Duration::from_millis(10);

/// The time that each cleanup step has even if none is left.
const LEAST_STEP: Duration = Duration::from_millis(10);

/// The time that cut work and dropped servers have even if none is left, 50 ms each.
const LEAST_CLOSING: Duration = Duration::from_millis(100);

pub(crate) fn check(schedule: &Schedule, seen: &Seen) -> Result<(), TestCaseError> {
    let Some(played) = &seen.played else {
        // A plan that does not fit.
        return Ok(());
    };
    phases_never_go_back(played)?;
    phases_last_as_planned_and_reported(played)?;
    the_stop_ends_within_the_grace_period(schedule, played)?;
    requests_are_admitted_until_draining(schedule, played)?;
    the_count_is_exact(played)?;
    the_report_counts_each_request(schedule, played)?;
    the_report_names_each_hold_that_was_cut(played)?;
    the_report_says_how_each_task_ended(schedule, played)?;
    tasks_have_their_time(schedule, played)?;
    the_order_is_kept(schedule, played)?;
    the_outcome_is_the_worst_thing_that_happened(schedule, played)
}

impl Played {
    /// When this phase or a later one began.
    fn entered(&self, phase: Phase) -> Instant {
        let mut events = self.events.iter();
        let entered =
            events.find(|(_, event)| matches!(event, Event::Phase(reached) if *reached >= phase));
        entered.expect("the stop is over").0
    }

    /// The end of the plan, where the margin begins.
    fn end(&self) -> Instant {
        self.triggered + self.plan.grace_period - self.plan.margin
    }

    fn requests_cut(&self) -> impl Iterator<Item = &SeenRequest> {
        let requests = self.requests.iter();
        requests.filter(|it| it.was_admitted() && it.ended >= Phase::Closing)
    }

    /// What has begun under this name.
    fn ran(&self, name: &str) -> Option<&Ran> {
        self.ran.iter().find(|ran| ran.name == name)
    }

    fn holds(&self) -> impl Iterator<Item = &Ran> {
        self.ran.iter().filter(|ran| ran.name.starts_with("hold"))
    }

    /// The holds that were there when the closing phase began. They were cut then.
    fn holds_cut(&self) -> impl Iterator<Item = &Ran> {
        self.holds()
            .filter(|hold| hold.began.phase < Phase::Closing && hold.outlasts(Phase::Draining))
    }

    /// Whether the drain deadline has cut something.
    fn was_cut(&self) -> bool {
        self.requests_cut().count() + self.holds_cut().count() > 0
    }
}

impl SeenRequest {
    fn was_admitted(&self) -> bool {
        !matches!(self.became, Became::Refused(_))
    }
}

impl Ran {
    /// Whether it ended after this phase, if at all.
    fn outlasts(&self, phase: Phase) -> bool {
        self.ended.is_none_or(|(ended, _)| ended.phase > phase)
    }
}

fn phases_never_go_back(played: &Played) -> Result<(), TestCaseError> {
    let phases = played.events.iter().filter_map(|(_, event)| match event {
        Event::Phase(phase) => Some(*phase),
        _ => None,
    });
    let phases: Vec<_> = phases.collect();
    prop_assert!(phases.is_sorted(), "{phases:?}");
    prop_assert_eq!(phases.last(), Some(&Phase::Stopped));
    Ok(())
}

fn phases_last_as_planned_and_reported(played: &Played) -> Result<(), TestCaseError> {
    let [draining, closing, stopped] =
        [Phase::Draining, Phase::Closing, Phase::Stopped].map(|phase| played.entered(phase));
    prop_assert_eq!(played.report.trigger(), Trigger::Shutdown);
    let is_close = |one: Duration, other| one.abs_diff(other) <= ROUNDING;
    let lame_duck = draining - played.triggered;
    // No deadline falls into the margin.
    let delay = played.plan.drain_delay;
    let delay = delay.min(played.plan.grace_period.saturating_sub(played.plan.margin));
    prop_assert!(is_close(lame_duck, delay), "{lame_duck:?}");
    if played.was_cut() {
        let drained = closing - played.triggered;
        prop_assert!(
            is_close(drained, played.plan.drain_deadline),
            "cut after {drained:?}"
        );
    }
    let report = &played.report;
    for (phase, took) in [
        (Phase::LameDuck, lame_duck),
        (Phase::Draining, closing - draining),
    ] {
        prop_assert!(
            is_close(report.time_in(phase), took),
            "{phase:?} {took:?}\n{report}"
        );
    }
    let closing = report.time_in(Phase::Closing) + report.cleanup_time();
    let took = stopped - played.entered(Phase::Closing);
    prop_assert!(is_close(closing, took), "{took:?}\n{report}");
    Ok(())
}

fn the_stop_ends_within_the_grace_period(
    schedule: &Schedule,
    played: &Played,
) -> Result<(), TestCaseError> {
    let took = played.stopped - played.triggered;
    // In a long grace period the margin has room for the least time that each wait has, even where
    // nothing is left: what was cut, servers that are dropped, and each cleanup step.
    let steps = LEAST_STEP * schedule.cleanup.len().try_into().unwrap();
    let most = if played.plan.grace_period < Duration::from_secs(6) {
        played.plan.grace_period + LEAST_CLOSING + steps + ROUNDING
    } else {
        played.plan.grace_period
    };
    prop_assert!(took <= most, "{took:?}");
    let reported = played.report.duration();
    prop_assert!(
        reported <= took + ROUNDING && took <= reported + ROUNDING,
        "{reported:?} of {took:?}"
    );
    Ok(())
}

fn requests_are_admitted_until_draining(
    schedule: &Schedule,
    played: &Played,
) -> Result<(), TestCaseError> {
    for request in &played.requests {
        let full = schedule
            .max_in_flight
            .is_some_and(|limit| request.requests_before >= limit);
        let expected = if request.phase >= Phase::Draining {
            Some(StatusCode::SERVICE_UNAVAILABLE)
        } else if full {
            Some(StatusCode::TOO_MANY_REQUESTS)
        } else {
            None
        };
        let refused = match request.became {
            Became::Refused(status) => Some(status),
            _ => None,
        };
        prop_assert_eq!(refused, expected, "{:?}", request);
    }
    Ok(())
}

fn the_count_is_exact(played: &Played) -> Result<(), TestCaseError> {
    for request in &played.requests {
        prop_assert_eq!(
            request.in_flight_before,
            request.expected_before,
            "{:?}",
            request
        );
    }
    prop_assert_eq!(played.in_flight_at_end, 0);
    Ok(())
}

/// One thread plays a schedule, so what it noted is what the report must say.
fn the_report_counts_each_request(
    schedule: &Schedule,
    played: &Played,
) -> Result<(), TestCaseError> {
    let count =
        |is: &dyn Fn(&SeenRequest) -> bool| played.requests.iter().filter(|it| is(it)).count();
    let drained = |it: &SeenRequest| it.ended_late && it.ended < Phase::Closing;
    let report = &played.report;
    let requests = report.requests();
    let reported = [
        ("in flight", requests.in_flight, played.in_flight_at_stop),
        (
            "admitted",
            requests.admitted,
            count(&|it| it.is_late && it.was_admitted()),
        ),
        (
            "refused",
            requests.refused,
            count(&|it| it.is_late && !it.was_admitted()),
        ),
        (
            "finished",
            requests.finished,
            count(&|it| drained(it) && matches!(it.became, Became::Whole | Became::Left)),
        ),
        (
            "dropped",
            requests.dropped,
            count(&|it| drained(it) && it.became == Became::Broken),
        ),
        ("cut", requests.cut, played.requests_cut().count()),
        (
            "remaining",
            report.remaining().requests,
            played.requests_cut().count(),
        ),
    ];
    for (name, reported, seen) in reported {
        prop_assert_eq!(reported, seen, "{} in {:?}", name, requests);
    }
    for request in &played.requests {
        prop_assert!(
            request.became != Became::Cut || request.ended >= Phase::Closing,
            "{request:?}"
        );
    }
    let named: BTreeSet<_> = report
        .requests_cut()
        .iter()
        .map(|it| it.path.clone())
        .collect();
    let cut = played.requests_cut().map(|it| path(it.number));
    let cut = if schedule.name_requests {
        cut.collect()
    } else {
        BTreeSet::new()
    };
    prop_assert_eq!(named, cut);
    Ok(())
}

fn the_report_names_each_hold_that_was_cut(played: &Played) -> Result<(), TestCaseError> {
    let report = &played.report;
    let named: BTreeSet<_> = report
        .holds_cut()
        .iter()
        .map(|it| it.name.as_str())
        .collect();
    prop_assert_eq!(named.len(), report.remaining().holds, "{}", report);
    let cut: BTreeSet<_> = played.holds_cut().map(|it| it.name.as_str()).collect();
    // If the drain has cut nothing, connections may still close, and what begins then is cut after that.
    let later: BTreeSet<_> = played
        .holds()
        .filter(|hold| {
            !played.was_cut()
                && hold.began.phase == Phase::Closing
                && hold.ended.is_none_or(|(ended, _)| ended.at > hold.began.at)
        })
        .map(|it| it.name.as_str())
        .collect();
    prop_assert!(
        named.is_superset(&cut) && named.difference(&cut).all(|hold| later.contains(hold)),
        "{cut:?}, perhaps {later:?}\n{report}"
    );
    Ok(())
}

/// How a task must be reported that has run like this.
fn outcome(kind: TaskKind, ran: Option<&Ran>) -> TaskOutcome {
    let Some(ran) = ran else {
        return TaskOutcome::NotRun;
    };
    match ran.ended {
        Some((ended, Ended::Returned))
            if kind == TaskKind::Worker && ended.phase < Phase::Draining =>
        {
            TaskOutcome::EndedEarly
        }
        Some((_, Ended::Returned)) => TaskOutcome::Done,
        Some((_, Ended::Failed)) => TaskOutcome::Failed("planned".to_owned()),
        Some((_, Ended::Panicked)) => TaskOutcome::Panicked("planned".to_owned()),
        Some((_, Ended::Dropped)) | None => TaskOutcome::Cut,
    }
}

/// The names and kinds of all tasks, in the order of their registration.
fn tasks(schedule: &Schedule) -> impl Iterator<Item = (String, TaskKind)> {
    [
        ("worker", TaskKind::Worker, schedule.workers.len()),
        ("hook", TaskKind::LameDuck, schedule.hooks.len()),
        ("cleanup", TaskKind::Cleanup, schedule.cleanup.len()),
    ]
    .into_iter()
    .flat_map(|(name, kind, count)| (0..count).map(move |n| (format!("{name} {n}"), kind)))
}

fn the_report_says_how_each_task_ended(
    schedule: &Schedule,
    played: &Played,
) -> Result<(), TestCaseError> {
    let report = &played.report;
    let reported = report.tasks().iter();
    let reported: Vec<_> = reported
        .map(|it| (it.name.clone(), it.kind, it.outcome.clone()))
        .collect();
    let expected: Vec<_> = tasks(schedule)
        .map(|(name, kind)| {
            let outcome = outcome(kind, played.ran(&name));
            (name, kind, outcome)
        })
        .collect();
    prop_assert_eq!(reported, expected, "{}", report);
    prop_assert_eq!(report.unlisted_workers().ended, 0);
    let draining = played.entered(Phase::Draining) - played.triggered;
    for TaskReport {
        name,
        kind,
        began,
        took,
        ..
    } in report.tasks()
    {
        let Some((ran, (ended, _))) = played.ran(name).and_then(|ran| Some((ran, ran.ended?)))
        else {
            continue;
        };
        let ended = ended.at.saturating_duration_since(played.triggered);
        let expected = match kind {
            TaskKind::Worker => draining.min(ended),
            _ => ran.began.at - played.triggered,
        };
        prop_assert!(
            began.abs_diff(expected) <= ROUNDING && (*began + *took).abs_diff(ended) <= ROUNDING,
            "{name}: from {expected:?} to {ended:?}\n{report}"
        );
    }
    Ok(())
}

/// A task is dropped when its time is over, not earlier and not later.
fn tasks_have_their_time(schedule: &Schedule, played: &Played) -> Result<(), TestCaseError> {
    let step = |kind: &str, number: usize| {
        let ran = played.ran(&format!("{kind} {number}"))?;
        let (ended, how) = ran.ended?;
        Some((ran.began.at, ended, how))
    };
    for (number, hook) in schedule.hooks.iter().enumerate() {
        let Some((began, ended, how)) = step("hook", number) else {
            continue;
        };
        let timeout = Duration::from_millis(hook.timeout);
        let lasted = ended.at - began;
        prop_assert!(lasted <= timeout + ROUNDING, "hook {number}: {lasted:?}");
        prop_assert!(
            how != Ended::Dropped || lasted >= timeout || ended.phase >= Phase::Draining,
            "hook {number} after {lasted:?}"
        );
    }
    // The steps keep their timeouts, but at most half of the time.
    let timeout = |step: &Step| Duration::from_millis(step.timeout);
    let asked: Duration = schedule.cleanup.iter().map(timeout).sum();
    let end = played.end();
    let left = end.saturating_duration_since(played.entered(Phase::Closing));
    for number in 0..schedule.workers.len() {
        if let Some((_, ended, Ended::Dropped)) = step("worker", number) {
            prop_assert!(
                ended.at + asked.min(left / 2) + ROUNDING >= end,
                "worker {number}\n{}",
                played.report
            );
        }
    }
    let mut most = None;
    for (number, cleanup) in schedule.cleanup.iter().enumerate() {
        let Some((began, ended, how)) = step("cleanup", number) else {
            continue;
        };
        let left = end.saturating_duration_since(began);
        let most = *most.get_or_insert(left);
        let rest = schedule.cleanup[number..].iter();
        let asked: Duration = rest.map(|step| timeout(step).min(most)).sum();
        let mut time = timeout(cleanup).min(most);
        if asked > left {
            time = left.mul_f64(time.as_secs_f64() / asked.as_secs_f64());
        }
        let time = time.max(LEAST_STEP);
        let lasted = ended.at - began;
        prop_assert!(
            lasted <= time + ROUNDING && (how != Ended::Dropped || lasted >= time),
            "cleanup {number}: {lasted:?} of {time:?}\n{}",
            played.report
        );
    }
    Ok(())
}

fn the_order_is_kept(schedule: &Schedule, played: &Played) -> Result<(), TestCaseError> {
    let mut workers = schedule.workers.len();
    let mut running = None;
    let mut next = 0;
    for (_, event) in &played.events {
        match *event {
            Event::WorkerEnded => workers -= 1,
            Event::HandlersAtCleanup(handlers) => {
                prop_assert_eq!(handlers, 0, "a cleanup step beside a handler");
                prop_assert_eq!(workers, 0, "a cleanup step beside a worker");
            }
            Event::CleanupBegan(number) => {
                prop_assert_eq!(running, None, "two cleanup steps at once");
                prop_assert_eq!(number, next, "cleanup steps out of order");
                running = Some(number);
                next += 1;
            }
            Event::CleanupEnded(number) => {
                prop_assert_eq!(running, Some(number));
                running = None;
            }
            Event::Phase(phase) => {
                prop_assert!(
                    phase < Phase::Stopped || running.is_none(),
                    "stopped in a cleanup step"
                );
            }
        }
    }
    prop_assert_eq!(
        next,
        schedule.cleanup.len(),
        "cleanup steps that were not begun"
    );
    Ok(())
}

fn the_outcome_is_the_worst_thing_that_happened(
    schedule: &Schedule,
    played: &Played,
) -> Result<(), TestCaseError> {
    let report = &played.report;
    let outcomes: Vec<_> = tasks(schedule)
        .map(|(name, kind)| (kind, outcome(kind, played.ran(&name))))
        .collect();
    let workers_cut = outcomes
        .iter()
        .filter(|it| **it == (TaskKind::Worker, TaskOutcome::Cut))
        .count();
    let remaining = report.remaining();
    prop_assert_eq!(remaining.workers, workers_cut, "{}", report);
    prop_assert_eq!(
        remaining.servers,
        usize::from(!played.server_ended),
        "{}",
        report
    );
    // The schedule has no connections.
    let others = remaining.connections + remaining.queued + remaining.half_closed;
    prop_assert_eq!(others, 0, "{}", report);
    let failed = outcomes.iter().any(|(kind, outcome)| match outcome {
        TaskOutcome::Failed(_) | TaskOutcome::Panicked(_) => true,
        TaskOutcome::Cut | TaskOutcome::NotRun => *kind == TaskKind::Cleanup,
        _ => false,
    });
    // `the_report_names_each_hold_that_was_cut` has checked the holds.
    let forced = played.was_cut() || remaining.holds > 0 || workers_cut > 0 || !played.server_ended;
    let expected = if forced {
        Outcome::Forced
    } else if failed {
        Outcome::CleanupFailed
    } else {
        Outcome::Clean
    };
    prop_assert_eq!(report.outcome(), expected, "{}", report);
    Ok(())
}
