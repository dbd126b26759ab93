//! What holds for every lifecycle.

use std::time::Duration;

use http::StatusCode;
use proptest::prelude::*;
use tower_graceful::{Outcome, Phase, Remaining, TaskKind, TaskOutcome};

use crate::{
    schedule::Schedule,
    world::{Became, Event, Played, Seen},
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
    the_stop_ends_within_the_grace_period(schedule, played)?;
    requests_are_admitted_until_draining(schedule, played)?;
    the_count_is_exact(played)?;
    the_report_agrees_with_the_clients(played)?;
    the_order_is_kept(schedule, played)?;
    the_outcome_is_the_worst_thing_that_happened(played)
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

fn the_stop_ends_within_the_grace_period(
    schedule: &Schedule,
    played: &Played,
) -> Result<(), TestCaseError> {
    let took = played.stopped - played.triggered;
    // In a long grace period the margin has room for the least time that each wait has, even where
    // nothing is left: what was cut, servers that are dropped, and each cleanup step.
    let steps = LEAST_STEP * schedule.cleanup.len().try_into().unwrap();
    let most = if played.grace_period < Duration::from_secs(6) {
        played.grace_period + LEAST_CLOSING + steps + ROUNDING
    } else {
        played.grace_period
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

fn the_report_agrees_with_the_clients(played: &Played) -> Result<(), TestCaseError> {
    let requests = played.report.requests();
    prop_assert_eq!(
        requests.in_flight + requests.admitted,
        requests.finished + requests.cut + requests.dropped,
        "{:?}",
        requests
    );
    // Requests are counted when the stop is asked for and at the end of the drain. Of a request that
    // ended at one of these very instants the report may say either.
    let drained = played.triggered
        + played.report.time_in(Phase::LameDuck)
        + played.report.time_in(Phase::Draining);
    let count = |is: fn(Became) -> bool| {
        let in_stop = |from: bool, to: bool| {
            let ended = played.requests.iter().filter(|request| is(request.became));
            let ended = ended.map(|request| request.ended);
            let ended = ended.filter(|&at| at > played.triggered || from && at == played.triggered);
            ended
                .filter(|&at| at < drained || to && at == drained)
                .count()
        };
        in_stop(false, false)..=in_stop(true, true)
    };
    let late = |from: bool| {
        let ended = played
            .requests
            .iter()
            .filter(|request| match request.became {
                Became::Refused(_) => false,
                Became::Cut => true,
                Became::Whole | Became::Left | Became::Broken => {
                    request.ended > drained || from && request.ended == drained
                }
            });
        ended.count()
    };
    let whole = count(|became| matches!(became, Became::Whole | Became::Left));
    let broken = count(|became| became == Became::Broken);
    let cut = late(false)..=late(true);
    let refused = played.requests.iter().filter(|request| {
        matches!(request.became, Became::Refused(_)) && request.ended >= played.triggered
    });
    let refused = refused.count();
    prop_assert!(
        whole.contains(&requests.finished),
        "{requests:?}, whole {whole:?}"
    );
    prop_assert!(cut.contains(&requests.cut), "{requests:?}, cut {cut:?}");
    prop_assert!(
        broken.contains(&requests.dropped),
        "{requests:?}, broken {broken:?}"
    );
    prop_assert!(
        requests.refused <= refused,
        "{requests:?}, refused {refused}"
    );
    prop_assert_eq!(played.report.remaining().requests, requests.cut);
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

fn the_outcome_is_the_worst_thing_that_happened(played: &Played) -> Result<(), TestCaseError> {
    let report = &played.report;
    let failed = report.tasks().iter().any(|task| {
        matches!(
            task.outcome,
            TaskOutcome::Failed(_) | TaskOutcome::Panicked(_)
        ) || task.outcome == TaskOutcome::Cut && task.kind == TaskKind::Cleanup
    });
    let expected = if report.remaining() != Remaining::default() {
        Outcome::Forced
    } else if failed {
        Outcome::CleanupFailed
    } else {
        Outcome::Clean
    };
    prop_assert_eq!(report.outcome(), expected, "{}", report);
    let cut = played
        .requests
        .iter()
        .any(|request| request.became == Became::Cut);
    prop_assert!(!cut || report.outcome() == Outcome::Forced, "{}", report);
    Ok(())
}
