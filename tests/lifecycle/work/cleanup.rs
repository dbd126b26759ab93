//! Cleanup steps: in order, one at a time, within the time that is left, and before the end.

use std::{future::pending, sync::Barrier, thread, time::Duration};

use tokio::{
    sync::oneshot,
    time::{Instant, sleep},
};
use tokio_test::{assert_pending, assert_ready, task};
use tower_graceful::{
    Graceful, Outcome, Phase, RegisterError, Remaining, Report, TaskKind, TaskOutcome,
};

use super::{Diary, END, outcomes, panics, report, row, rows, sleep_for, stop, until};
use crate::support::{
    DELAY, LET_GO, does_not_hang, graceful, let_others_run, ms, pass, paused_runtime, request, s,
    serve, server, watched, without_delay,
};

const STEP: TaskKind = TaskKind::Cleanup;
const ZERO: Duration = Duration::ZERO;
/// The time that a step gets even if no time is left.
const LEAST: Duration = Duration::from_millis(10);

/// Registers a step that takes this long. The diary records when it begins and when it is dropped.
fn step(graceful: &Graceful, diary: &Diary, name: &'static str, bound: Duration, takes: Duration) {
    let (diary, gone) = (diary.clone(), diary.at_drop("gone"));
    let step = async move {
        let _gone = gone;
        diary.note(name);
        sleep(takes).await;
    };
    graceful.cleanup(name, bound, step).unwrap();
}

/// Registers a step that never ends.
fn hangs(graceful: &Graceful, name: &'static str, bound: Duration) {
    graceful.cleanup(name, bound, pending::<()>()).unwrap();
}

/// How long each step took.
fn times(report: &Report) -> Vec<Duration> {
    report.tasks().iter().map(|task| task.took).collect()
}

#[tokio::test(start_paused = true)]
async fn steps_run_one_at_a_time_in_the_order_registered() {
    let graceful = graceful();
    let diary = Diary::begin();
    step(&graceful, &diary, "A", s(2), s(1));
    step(&graceful, &diary, "B", s(3), s(2));
    step(&graceful, &diary, "C", s(4), ms(500));
    let report = stop(&graceful).await;
    diary.assert(&[
        ("A", s(5)),
        ("gone", s(6)),
        ("B", s(6)),
        ("gone", s(8)),
        ("C", s(8)),
        ("gone", ms(8500)),
    ]);
    assert_eq!(report.outcome(), Outcome::Clean);
    assert_eq!(report.time_in(Phase::Closing), ZERO);
    assert_eq!(report.cleanup_time(), ms(3500));
    assert_eq!(report.duration(), ms(8500));
    assert_eq!(
        rows(&report),
        [
            row("A", STEP, s(5), s(1), TaskOutcome::Done),
            row("B", STEP, s(6), s(2), TaskOutcome::Done),
            row("C", STEP, s(8), ms(500), TaskOutcome::Done),
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn steps_run_after_the_last_request_hold_connection_and_server() {
    let graceful = graceful();
    let diary = Diary::begin();
    step(&graceful, &diary, "step", s(1), ZERO);
    let (request, hold) = (request(&graceful), graceful.hold("hold"));
    let connection = graceful.track(());
    let drain = server(&graceful);
    let note = diary.clone();
    let run = serve(&graceful, async move {
        drain.await;
        sleep(s(3)).await;
        note.note("server is done");
    })
    .await;
    graceful.shutdown();
    until(&diary, s(6)).await;
    drop(request);
    until(&diary, s(7)).await;
    drop(hold);
    until(&diary, s(8)).await;
    drop(connection);
    let report = run.await.unwrap();
    diary.assert(&[("server is done", s(10)), ("step", s(10)), ("gone", s(10))]);
    assert_eq!(report.time_in(Phase::Closing), s(3));
    assert_eq!(report.cleanup_time(), ZERO);
    assert_eq!(report.outcome(), Outcome::Clean);
}

#[tokio::test(start_paused = true)]
async fn stopped_and_run_wait_for_the_last_step() {
    let graceful = graceful();
    let diary = Diary::begin();
    step(&graceful, &diary, "step", s(3), s(2));
    let run = serve(&graceful, server(&graceful)).await;
    let mut stopped = task::spawn(graceful.stopped());
    graceful.shutdown();
    until(&diary, DELAY + s(2) - ms(1)).await;
    assert_pending!(stopped.poll());
    assert!(!run.is_finished());
    assert_eq!(graceful.phase(), Phase::Closing);
    assert_eq!(
        graceful.snapshot().time_left,
        Some(END - DELAY - s(2) + ms(1))
    );
    until(&diary, DELAY + s(2)).await;
    assert_ready!(stopped.poll());
    assert!(run.is_finished());
    assert_eq!(graceful.phase(), Phase::Stopped);
}

#[tokio::test(start_paused = true)]
async fn without_steps_nothing_takes_longer() {
    for graceful in [graceful(), without_delay()] {
        let begun = Instant::now();
        let report = stop(&graceful).await;
        assert_eq!(begun.elapsed(), report.time_in(Phase::LameDuck));
        assert_eq!(report.cleanup_time(), ZERO);
        assert!(!report.to_string().contains("cleanup"), "{report}");
    }
    let graceful = without_delay();
    graceful.shutdown();
    assert_eq!(graceful.phase(), Phase::Stopped, "before it returns");
}

#[tokio::test(start_paused = true)]
async fn a_step_that_goes_wrong_does_not_stop_the_next() {
    let graceful = without_delay();
    let diary = Diary::begin();
    let fails = async {
        sleep(s(1)).await;
        Err("connection reset")
    };
    graceful.cleanup("fails", s(2), fails).unwrap();
    let panicking = panics("assertion failed");
    graceful.cleanup("panics", s(2), panicking).unwrap();
    step(&graceful, &diary, "hangs", s(2), s(60));
    step(&graceful, &diary, "last", s(2), s(1));
    let report = stop(&graceful).await;
    diary.assert(&[
        ("hangs", s(1)),
        ("gone", s(3)),
        ("last", s(3)),
        ("gone", s(4)),
    ]);
    assert_eq!(report.outcome(), Outcome::CleanupFailed);
    assert_eq!(report.exit_code(), 2);
    assert_eq!(report.cleanup_time(), s(4));
    assert_eq!(report.remaining(), Remaining::default());
    assert_eq!(
        rows(&report),
        [
            row(
                "fails",
                STEP,
                ZERO,
                s(1),
                TaskOutcome::Failed("connection reset".into())
            ),
            row(
                "panics",
                STEP,
                s(1),
                ZERO,
                TaskOutcome::Panicked("assertion failed".into())
            ),
            row("hangs", STEP, s(1), s(2), TaskOutcome::Cut),
            row("last", STEP, s(3), s(1), TaskOutcome::Done),
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn each_kind_of_failed_task_makes_the_outcome_cleanup_failed() {
    let graceful = without_delay();
    graceful
        .cleanup("fails", s(1), async { Err("no") })
        .unwrap();
    assert_eq!(stop(&graceful).await.outcome(), Outcome::CleanupFailed);

    let graceful = without_delay();
    hangs(&graceful, "hangs", s(1));
    assert_eq!(stop(&graceful).await.outcome(), Outcome::CleanupFailed);

    let graceful = without_delay();
    graceful.cleanup("panics", s(1), panics(())).unwrap();
    assert_eq!(stop(&graceful).await.outcome(), Outcome::CleanupFailed);
}

#[tokio::test(start_paused = true)]
async fn a_failed_server_and_a_forced_stop_outweigh_a_failed_step() {
    let graceful = graceful();
    graceful
        .cleanup("fails", s(1), async { Err("no") })
        .unwrap();
    let report = graceful
        .run(std::future::ready(Err::<(), _>("broken")))
        .await;
    assert_eq!(report.outcome(), Outcome::ServerFailed);
    assert_eq!(outcomes(&report), [TaskOutcome::Failed("no".into())]);

    let graceful = without_delay();
    graceful
        .cleanup("fails", s(1), async { Err("no") })
        .unwrap();
    let _held = request(&graceful);
    let report = stop(&graceful).await;
    assert_eq!(report.outcome(), Outcome::Forced);
    assert_eq!(outcomes(&report), [TaskOutcome::Failed("no".into())]);
}

#[tokio::test(start_paused = true)]
async fn a_step_that_ends_just_before_its_timeout_is_done() {
    let graceful = without_delay();
    let step = sleep_for(s(2) - ms(1));
    graceful.cleanup("step", s(2), step).unwrap();
    let report = stop(&graceful).await;
    assert_eq!(outcomes(&report), [TaskOutcome::Done]);
    assert_eq!(report.duration(), s(2) - ms(1));
}

#[tokio::test(start_paused = true)]
async fn the_drain_cannot_use_up_the_share_that_is_kept_for_cleanup() {
    let graceful = Graceful::builder().drain_delay(ZERO).build().unwrap();
    let diary = Diary::begin();
    step(&graceful, &diary, "A", s(60), s(60));
    step(&graceful, &diary, "B", s(60), s(60));
    let _held = request(&graceful);
    let _connection = graceful.track(());
    let report = stop(&graceful).await;
    let begun = s(24) + LET_GO;
    let half = (END - begun) / 2;
    diary.assert(&[
        ("A", begun),
        ("gone", begun + half),
        ("B", begun + half),
        ("gone", END),
    ]);
    assert_eq!(report.outcome(), Outcome::Forced);
    assert_eq!(report.time_in(Phase::Closing), LET_GO);
    assert_eq!(report.cleanup_time(), s(5) - LET_GO);
    assert_eq!(report.duration(), END);
    assert_eq!(outcomes(&report), [TaskOutcome::Cut, TaskOutcome::Cut]);
}

#[tokio::test(start_paused = true)]
async fn a_cleanup_share_that_was_set_is_kept_to_the_millisecond() {
    let graceful = Graceful::builder()
        .grace_period(s(60))
        .drain_delay(s(10))
        .drain_timeout(s(20))
        .cleanup_timeout(s(8))
        .build()
        .unwrap();
    hangs(&graceful, "hangs", s(8));
    let _held = request(&graceful);
    let report = stop(&graceful).await;
    assert_eq!(report.time_in(Phase::Draining), s(20));
    assert_eq!(
        rows(&report),
        [row("hangs", STEP, s(30) + LET_GO, s(8), TaskOutcome::Cut)]
    );
}

#[tokio::test(start_paused = true)]
async fn without_a_share_every_step_still_runs() {
    let graceful = Graceful::builder()
        .grace_period(s(30))
        .drain_delay(ZERO)
        .drain_timeout(s(30))
        .build()
        .unwrap();
    let diary = Diary::begin();
    step(&graceful, &diary, "A", s(5), s(60));
    step(&graceful, &diary, "B", ZERO, s(60));
    step(&graceful, &diary, "C", Duration::MAX, ms(5));
    let _held = request(&graceful);
    let report = stop(&graceful).await;
    let begun = END + ms(50);
    diary.assert(&[
        ("A", begun),
        ("gone", begun + LEAST),
        ("B", begun + LEAST),
        ("gone", begun + LEAST * 2),
        ("C", begun + LEAST * 2),
        ("gone", begun + LEAST * 2 + ms(5)),
    ]);
    assert_eq!(
        outcomes(&report),
        [TaskOutcome::Cut, TaskOutcome::Cut, TaskOutcome::Done]
    );
    assert!(report.duration() < s(30));
}

#[tokio::test(start_paused = true)]
async fn timeouts_that_do_not_fit_together_are_reduced_in_proportion() {
    let graceful = without_delay();
    hangs(&graceful, "A", s(10));
    hangs(&graceful, "B", s(20));
    hangs(&graceful, "C", s(28));
    let report = stop(&graceful).await;
    assert_eq!(times(&report), [s(5), s(10), s(14)]);
    assert_eq!(report.duration(), END);
}

#[tokio::test(start_paused = true)]
async fn timeouts_that_fit_together_are_kept() {
    let graceful = without_delay();
    hangs(&graceful, "A", s(9));
    hangs(&graceful, "B", s(20));
    let report = stop(&graceful).await;
    assert_eq!(times(&report), [s(9), s(20)]);
}

#[tokio::test(start_paused = true)]
async fn time_that_a_step_does_not_use_is_left_to_the_next() {
    let graceful = without_delay();
    graceful.cleanup("A", s(29), async {}).unwrap();
    hangs(&graceful, "B", s(29));
    hangs(&graceful, "C", s(29));
    let report = stop(&graceful).await;
    assert_eq!(times(&report), [ZERO, END / 2, END / 2]);

    let graceful = without_delay();
    graceful.cleanup("A", s(29), async {}).unwrap();
    graceful.cleanup("B", s(29), sleep_for(s(1))).unwrap();
    hangs(&graceful, "C", s(29));
    let report = stop(&graceful).await;
    assert_eq!(times(&report), [ZERO, s(1), END - s(1)]);
}

#[tokio::test(start_paused = true)]
async fn steps_without_a_timeout_share_what_is_left() {
    let graceful = without_delay();
    hangs(&graceful, "A", Duration::MAX);
    hangs(&graceful, "B", Duration::MAX);
    let report = stop(&graceful).await;
    assert_eq!(times(&report), [END / 2, END / 2]);
    assert_eq!(report.duration(), END);
}

#[tokio::test(start_paused = true)]
async fn a_step_without_a_timeout_leaves_its_part_to_one_that_has_one() {
    let graceful = without_delay();
    hangs(&graceful, "A", Duration::MAX);
    graceful.cleanup("B", s(1), sleep_for(ms(900))).unwrap();
    let report = stop(&graceful).await;
    assert_eq!(outcomes(&report), [TaskOutcome::Cut, TaskOutcome::Done]);
    assert!(report.duration() < END);
}

#[tokio::test(start_paused = true)]
async fn a_step_with_a_timeout_of_zero_is_polled() {
    let graceful = without_delay();
    let (endless, log) = watched(pending::<()>());
    graceful.cleanup("ready", ZERO, async {}).unwrap();
    graceful.cleanup("endless", ZERO, endless).unwrap();
    let report = stop(&graceful).await;
    assert!(log.polled() && log.dropped().is_some());
    assert_eq!(outcomes(&report), [TaskOutcome::Done, TaskOutcome::Cut]);
    assert_eq!(times(&report), [ZERO, LEAST]);
}

#[tokio::test(start_paused = true)]
async fn without_a_grace_period_a_step_without_a_timeout_may_take_a_year() {
    const YEAR: Duration = Duration::from_secs(60 * 60 * 24 * 365);
    let graceful = Graceful::builder()
        .grace_period(Duration::MAX)
        .drain_delay(ZERO)
        .build()
        .unwrap();
    graceful
        .cleanup("A", Duration::MAX, sleep_for(s(3600)))
        .unwrap();
    graceful.cleanup("B", s(5), pending::<()>()).unwrap();
    let report = stop(&graceful).await;
    assert_eq!(times(&report), [s(3600), s(5)]);
    assert!(report.duration() < YEAR);
}

#[tokio::test(start_paused = true)]
async fn a_step_may_be_registered_until_the_drain_is_over() {
    let graceful = graceful();
    graceful.cleanup("serving", s(1), async {}).unwrap();
    let held = request(&graceful);
    let connection = graceful.track(());
    graceful.shutdown();
    graceful.cleanup("lame duck", s(1), async {}).unwrap();
    pass(DELAY).await;
    graceful.cleanup("draining", s(1), async {}).unwrap();
    drop(held);
    let_others_run().await;
    assert_eq!(graceful.phase(), Phase::Closing);
    let (late, log) = watched(pending::<()>());
    let error = graceful.cleanup("late", s(1), late).unwrap_err();
    let expected = RegisterError::TooLate {
        name: "late".into(),
        phase: Phase::Closing,
    };
    assert_eq!(error, expected);
    assert!(log.dropped().is_some() && !log.polled());
    drop(connection);
    let report = report(&graceful).await;
    assert_eq!(
        outcomes(&report),
        [TaskOutcome::Done, TaskOutcome::Done, TaskOutcome::Done]
    );
    let names: Vec<_> = report.tasks().iter().map(|task| &*task.name).collect();
    assert_eq!(names, ["serving", "lame duck", "draining"]);
    let error = graceful.cleanup("later", s(1), async {}).unwrap_err();
    assert!(matches!(
        error,
        RegisterError::TooLate {
            phase: Phase::Stopped,
            ..
        }
    ));
}

#[tokio::test(start_paused = true)]
async fn a_step_may_use_the_service_and_cannot_prolong_its_end() {
    let graceful = without_delay();
    let (keep, _kept) = oneshot::channel();
    let step = {
        let graceful = graceful.clone();
        async move {
            assert_eq!(graceful.phase(), Phase::Closing);
            graceful.shutdown();
            assert!(graceful.cleanup("more", s(1), async {}).is_err());
            assert!(graceful.worker("more", |stop| stop).is_err());
            assert!(graceful.on_lame_duck("more", s(1), async {}).is_err());
            let hold = graceful.hold("kept");
            assert_eq!(graceful.in_flight(), 1);
            sleep(s(1)).await;
            keep.send(hold).unwrap();
        }
    };
    graceful.cleanup("step", s(2), step).unwrap();
    let report = stop(&graceful).await;
    assert_eq!(outcomes(&report), [TaskOutcome::Done]);
    assert_eq!(report.outcome(), Outcome::Clean);
    assert_eq!(report.duration(), s(1));
}

#[tokio::test(start_paused = true)]
async fn a_step_that_waits_for_the_end_is_cut() {
    let graceful = without_delay();
    let stopped = graceful.stopped();
    graceful.cleanup("circular", s(2), stopped).unwrap();
    let report = stop(&graceful).await;
    assert_eq!(outcomes(&report), [TaskOutcome::Cut]);
    assert_eq!(report.duration(), s(2));
}

#[tokio::test(start_paused = true)]
async fn calls_of_shutdown_during_cleanup_do_not_shorten_it() {
    let graceful = without_delay();
    let diary = Diary::begin();
    step(&graceful, &diary, "step", s(5), s(3));
    graceful.shutdown();
    for second in 1..3 {
        until(&diary, s(second)).await;
        graceful.shutdown();
    }
    let report = report(&graceful).await;
    assert_eq!(outcomes(&report), [TaskOutcome::Done]);
    assert_eq!(report.duration(), s(3));
}

#[tokio::test(start_paused = true)]
async fn a_step_is_not_polled_before_the_one_before_it_has_ended() {
    let graceful = graceful();
    let (step, log) = watched(async {});
    graceful.cleanup("step", s(1), step).unwrap();
    let held = request(&graceful);
    pass(s(60)).await;
    graceful.shutdown();
    pass(s(14)).await;
    assert!(!log.polled());
    drop(held);
    let report = report(&graceful).await;
    assert!(log.polled());
    assert_eq!(report.duration(), s(14));
}

#[tokio::test(start_paused = true)]
async fn a_step_of_a_service_that_is_never_stopped_is_dropped_with_it() {
    let graceful = graceful();
    let mut phases = graceful.subscribe();
    let (step, log) = watched(async {});
    graceful.cleanup("step", s(1), step).unwrap();
    let_others_run().await;
    drop(graceful);
    assert!(log.dropped().is_some() && !log.polled());
    assert!(phases.changed().await.is_none());
}

#[test]
fn a_step_registered_and_asked_for_outside_a_runtime_runs_in_the_next() {
    let graceful = without_delay();
    let (step, log) = watched(async {});
    graceful.cleanup("step", s(1), step).unwrap();
    graceful.shutdown();
    assert_eq!(graceful.phase(), Phase::Closing);
    assert!(!log.polled());
    paused_runtime().block_on(async {
        let report = report(&graceful).await;
        assert_eq!(outcomes(&report), [TaskOutcome::Done]);
        assert_eq!(report.outcome(), Outcome::Clean);
    });
}

#[test]
fn only_the_step_that_has_begun_is_given_up_with_its_runtime_and_the_next_runtime_runs_the_rest() {
    does_not_hang(|| {
        let first = paused_runtime();
        let graceful = without_delay();
        let diary = Diary::begin();
        let (running, running_log) = watched(pending::<()>());
        let (waiting, waiting_log) = watched(sleep_for(s(1)));
        first.block_on(async {
            graceful.cleanup("done", s(5), async {}).unwrap();
            graceful.cleanup("running", s(5), running).unwrap();
            graceful.cleanup("waiting", s(5), waiting).unwrap();
            step(&graceful, &diary, "last", s(5), ZERO);
            graceful.shutdown();
            pass(s(1)).await;
            assert!(running_log.polled());
        });
        drop(first);
        assert!(running_log.dropped().is_some());
        assert!(waiting_log.dropped().is_none());
        assert_eq!(graceful.phase(), Phase::Closing);
        paused_runtime().block_on(async {
            let report = report(&graceful).await;
            assert!(waiting_log.polled());
            let (done, cut) = (TaskOutcome::Done, TaskOutcome::Cut);
            assert_eq!(outcomes(&report), [done.clone(), cut, done.clone(), done]);
            assert_eq!(report.outcome(), Outcome::CleanupFailed);
            assert_eq!(report.remaining(), Remaining::default());
        });
    });
}

#[test]
fn work_registered_while_the_service_stops_is_either_refused_or_run() {
    for _ in 0..2_000 {
        let graceful = without_delay();
        let start = Barrier::new(2);
        let registered = thread::scope(|scope| {
            let registering = scope.spawn(|| {
                start.wait();
                graceful.cleanup("step", s(1), async {}).is_ok()
            });
            start.wait();
            graceful.shutdown();
            registering.join().unwrap()
        });
        // There is no driver, so an accepted step has not been run.
        let stopped = graceful.phase() == Phase::Stopped;
        assert_ne!(registered, stopped);
    }
}

/// On the real clock: a paused clock stands still while a thread is blocked.
#[tokio::test]
async fn a_step_that_holds_the_only_thread_for_too_long_counts_as_cut() {
    let graceful = without_delay();
    let blocks = async { std::thread::sleep(ms(400)) };
    graceful.cleanup("blocks", ms(50), blocks).unwrap();
    graceful.cleanup("after", s(1), async {}).unwrap();
    let report = stop(&graceful).await;
    assert_eq!(outcomes(&report), [TaskOutcome::Cut, TaskOutcome::Done]);
    assert_eq!(report.outcome(), Outcome::CleanupFailed);
}
