//! Hooks that run alongside the lame-duck phase.

use std::{future::pending, io, time::Duration};

use tokio::time::sleep;
use tower_graceful::{Graceful, Outcome, Phase, RegisterError, TaskKind, TaskOutcome};

use super::{Diary, outcomes, panics, report, row, rows, sleep_for, stop, until};
use crate::support::{
    DELAY, does_not_hang, graceful, let_others_run, ms, pass, paused_runtime, plan, request, s,
    serve, server, watched, without_delay,
};

const HOOK: TaskKind = TaskKind::LameDuck;
const ZERO: Duration = Duration::ZERO;

#[tokio::test(start_paused = true)]
async fn hooks_begin_with_the_lame_duck_phase_and_run_beside_one_another() {
    let graceful = graceful();
    for seconds in [3, 1, 2] {
        let hook = sleep_for(s(seconds));
        graceful
            .on_lame_duck(format!("{seconds}"), s(60), hook)
            .unwrap();
    }
    pass(s(60)).await;
    let report = stop(&graceful).await;
    assert_eq!(report.outcome(), Outcome::Clean);
    assert_eq!(report.time_in(Phase::LameDuck), DELAY);
    assert_eq!(report.duration(), DELAY);
    assert_eq!(
        rows(&report),
        [
            row("3", HOOK, ZERO, s(3), TaskOutcome::Done),
            row("1", HOOK, ZERO, s(1), TaskOutcome::Done),
            row("2", HOOK, ZERO, s(2), TaskOutcome::Done),
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_hook_is_not_polled_before_a_stop_is_asked_for() {
    let graceful = graceful();
    let (hook, log) = watched(pending::<()>());
    graceful.on_lame_duck("hook", s(1), hook).unwrap();
    pass(s(60)).await;
    assert!(!log.polled());
    graceful.shutdown();
    let_others_run().await;
    assert!(log.polled());
}

#[tokio::test(start_paused = true)]
async fn a_hook_is_cut_at_its_timeout() {
    let graceful = graceful();
    let diary = Diary::begin();
    let dropped = diary.at_drop("dropped");
    let hook = async move {
        let _dropped = dropped;
        pending::<()>().await;
    };
    graceful.on_lame_duck("endless", ms(2125), hook).unwrap();
    let report = stop(&graceful).await;
    diary.assert(&[("dropped", ms(2125))]);
    assert_eq!(report.duration(), DELAY);
    assert_eq!(report.outcome(), Outcome::Clean, "reported, and no failure");
    assert_eq!(
        rows(&report),
        [row("endless", HOOK, ZERO, ms(2125), TaskOutcome::Cut)]
    );
}

#[tokio::test(start_paused = true)]
async fn a_hook_is_cut_at_the_end_of_the_delay() {
    for bound in [DELAY, s(60), Duration::MAX] {
        let graceful = graceful();
        let diary = Diary::begin();
        let dropped = diary.at_drop("dropped");
        let hook = async move {
            let _dropped = dropped;
            pending::<()>().await;
        };
        graceful.on_lame_duck("endless", bound, hook).unwrap();
        let held = request(&graceful);
        graceful.shutdown();
        until(&diary, s(6)).await;
        diary.assert(&[("dropped", DELAY)]);
        drop(held);
        let report = report(&graceful).await;
        assert_eq!(report.duration(), s(6));
        assert_eq!(report.outcome(), Outcome::Clean);
        assert_eq!(
            rows(&report),
            [row("endless", HOOK, ZERO, DELAY, TaskOutcome::Cut)]
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_hook_is_gone_when_the_service_has_stopped() {
    for delay in [ZERO, DELAY] {
        let graceful = plan().drain_delay(delay).build().unwrap();
        let (hook, log) = watched(pending::<()>());
        graceful.on_lame_duck("endless", s(60), hook).unwrap();
        let stopped = graceful.stopped();
        graceful.shutdown();
        stopped.await;
        assert!(log.dropped().is_some(), "after a delay of {delay:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_hook_that_ends_exactly_at_its_timeout_or_at_the_end_of_the_delay_is_done() {
    let graceful = graceful();
    graceful
        .on_lame_duck("bound", s(2), sleep_for(s(2)))
        .unwrap();
    graceful
        .on_lame_duck("delay", s(60), sleep_for(DELAY))
        .unwrap();
    let fails = async {
        sleep(DELAY).await;
        Err("at the last moment")
    };
    graceful.on_lame_duck("fails", s(60), fails).unwrap();
    let report = stop(&graceful).await;
    assert_eq!(report.duration(), DELAY);
    let failed = TaskOutcome::Failed("at the last moment".into());
    assert_eq!(
        outcomes(&report),
        [TaskOutcome::Done, TaskOutcome::Done, failed]
    );
    assert_eq!(report.outcome(), Outcome::CleanupFailed);
}

#[tokio::test(start_paused = true)]
async fn a_hook_timeout_of_zero_is_one_poll() {
    let graceful = graceful();
    graceful.on_lame_duck("ready", ZERO, async {}).unwrap();
    let (hook, log) = watched(pending::<()>());
    graceful.on_lame_duck("endless", ZERO, hook).unwrap();
    graceful.shutdown();
    pass(ms(2)).await;
    assert!(log.polled());
    assert!(log.dropped().is_some());
    assert_eq!(
        outcomes(&report(&graceful).await),
        [TaskOutcome::Done, TaskOutcome::Cut]
    );
}

/// A hook that is ready at once, and a hook that waits.
fn two_hooks(graceful: &Graceful) -> crate::support::WatchLog {
    let hook = async { Ok::<(), io::Error>(()) };
    graceful.on_lame_duck("ready", s(1), hook).unwrap();
    let (hook, log) = watched(pending::<()>());
    graceful.on_lame_duck("waiting", s(1), hook).unwrap();
    log
}

#[tokio::test(start_paused = true)]
async fn without_a_delay_a_hook_is_dropped_at_its_first_wait() {
    let graceful = without_delay();
    let log = two_hooks(&graceful);
    let held = request(&graceful);
    graceful.shutdown();
    assert_eq!(graceful.phase(), Phase::Draining);
    pass(s(1)).await;
    assert!(log.polled());
    drop(held);
    let report = report(&graceful).await;
    assert_eq!(
        rows(&report),
        [
            row("ready", HOOK, ZERO, ZERO, TaskOutcome::Done),
            row("waiting", HOOK, ZERO, ZERO, TaskOutcome::Cut),
        ]
    );
    assert_eq!(report.duration(), s(1));
}

#[tokio::test(start_paused = true)]
async fn without_a_delay_and_without_anything_in_flight_a_hook_runs_too() {
    let graceful = without_delay();
    let log = two_hooks(&graceful);
    let report = stop(&graceful).await;
    assert!(log.polled());
    assert_eq!(outcomes(&report), [TaskOutcome::Done, TaskOutcome::Cut]);
    assert_eq!(report.outcome(), Outcome::Clean);
    assert_eq!(report.duration(), ZERO);
}

#[tokio::test(start_paused = true)]
async fn without_a_delay_a_hook_runs_beside_a_server_that_ends_at_once() {
    let graceful = without_delay();
    let log = two_hooks(&graceful);
    let run = serve(&graceful, server(&graceful)).await;
    graceful.shutdown();
    let report = run.await.unwrap();
    assert!(log.polled());
    assert_eq!(outcomes(&report), [TaskOutcome::Done, TaskOutcome::Cut]);
    assert_eq!(report.duration(), ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_hook_runs_when_a_server_ends_by_itself() {
    let graceful = graceful();
    let log = two_hooks(&graceful);
    let report = graceful
        .run(std::future::ready(Err::<(), _>("broken")))
        .await;
    assert!(log.polled());
    assert_eq!(outcomes(&report), [TaskOutcome::Done, TaskOutcome::Cut]);
    assert_eq!(report.outcome(), Outcome::ServerFailed);
    assert_eq!(report.duration(), ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_hook_that_fails_or_panics_is_reported_as_a_failure() {
    let graceful = graceful();
    let fails = async { Err("503") };
    graceful.on_lame_duck("fails", s(1), fails).unwrap();
    let report = stop(&graceful).await;
    assert_eq!(report.outcome(), Outcome::CleanupFailed);
    assert_eq!(report.duration(), DELAY);
    assert_eq!(outcomes(&report), [TaskOutcome::Failed("503".into())]);

    let graceful = plan().build().unwrap();
    let panicking = async {
        sleep(s(2)).await;
        panics("no route".to_owned()).await;
    };
    graceful.on_lame_duck("panics", s(3), panicking).unwrap();
    let (beside, log) = watched(sleep_for(s(3)));
    graceful.on_lame_duck("beside", s(4), beside).unwrap();
    let report = stop(&graceful).await;
    assert!(log.polled());
    assert_eq!(report.outcome(), Outcome::CleanupFailed);
    assert_eq!(
        rows(&report),
        [
            row(
                "panics",
                HOOK,
                ZERO,
                s(2),
                TaskOutcome::Panicked("no route".into())
            ),
            row("beside", HOOK, ZERO, s(3), TaskOutcome::Done),
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_hook_registered_after_the_trigger_is_not_run() {
    let graceful = graceful();
    graceful.shutdown();
    let (hook, log) = watched(pending::<()>());
    let error = graceful.on_lame_duck("late", s(1), hook).unwrap_err();
    let expected = RegisterError::TooLate {
        name: "late".into(),
        phase: Phase::LameDuck,
    };
    assert_eq!(error, expected);
    assert!(log.dropped().is_some());
    let report = report(&graceful).await;
    assert!(!log.polled());
    assert!(report.tasks().is_empty());
    let error = graceful.on_lame_duck("later", s(1), async {}).unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("the service is stopped already")
    );
}

#[tokio::test(start_paused = true)]
async fn a_hook_may_use_the_service() {
    let graceful = graceful();
    let hook = {
        let graceful = graceful.clone();
        async move {
            assert_eq!(graceful.phase(), Phase::LameDuck);
            graceful.shutdown();
            graceful.set_ready(true);
            let late = graceful.on_lame_duck("late", s(1), async {});
            assert!(late.is_err());
            graceful.worker("worker", |stop| stop).unwrap();
            graceful.cleanup("step", s(1), async {}).unwrap();
            let hold = graceful.hold("deregistering");
            sleep(s(1)).await;
            drop(hold);
        }
    };
    graceful.on_lame_duck("hook", s(2), hook).unwrap();
    let report = stop(&graceful).await;
    assert_eq!(report.outcome(), Outcome::Clean, "{report}");
    assert_eq!(
        outcomes(&report),
        [TaskOutcome::Done, TaskOutcome::Done, TaskOutcome::Done]
    );
    assert_eq!(report.duration(), DELAY);
}

#[test]
fn a_hook_of_a_stop_asked_for_outside_a_runtime_runs_in_the_next() {
    let graceful = without_delay();
    let log = two_hooks(&graceful);
    graceful.shutdown();
    assert!(!log.polled());
    paused_runtime().block_on(async {
        let report = report(&graceful).await;
        assert!(log.polled());
        assert_eq!(outcomes(&report), [TaskOutcome::Done, TaskOutcome::Cut]);
    });
}

#[test]
fn a_runtime_dropped_with_its_hooks_does_not_hold_the_stop() {
    does_not_hang(|| {
        let first = paused_runtime();
        let graceful = graceful();
        let log = two_hooks(&graceful);
        first.block_on(async {
            graceful.shutdown();
            pass(ms(500)).await;
            assert!(log.polled());
        });
        drop(first);
        assert!(log.dropped().is_some());
        paused_runtime().block_on(async {
            let report = report(&graceful).await;
            assert_eq!(outcomes(&report), [TaskOutcome::Done, TaskOutcome::Cut]);
            assert_eq!(report.outcome(), Outcome::Clean);
        });
    });
}
