//! Workers: notified when draining starts, and joined when nothing is in flight any more.

use std::{
    fmt,
    future::{Ready, pending},
    io,
    panic::resume_unwind,
    pin::Pin,
    sync::{Arc, Mutex, mpsc},
    task::{Context, Poll},
    thread,
    time::Duration,
};

use tokio::{runtime, time::Instant};
use tokio_test::{assert_pending, assert_ready, task};
use tower_graceful::{
    Graceful, Outcome, Phase, RegisterError, Stop, TaskKind, TaskOutcome, Trigger,
};

use super::{Diary, END, outcomes, panics, report, row, rows, stop, until};
use crate::support::{
    DELAY, LET_GO, does_not_hang, graceful, let_others_run, ms, pass, paused_runtime, plan,
    request, s, serve, server, watched, without_delay,
};

const WORKER: TaskKind = TaskKind::Worker;
const ZERO: Duration = Duration::ZERO;

/// A worker that stops when it is notified.
async fn obedient(stop: Stop) {
    stop.await;
}

/// Registers a worker, and returns its `Stop`.
async fn stop_of(graceful: &Graceful) -> Stop {
    let (give, given) = tokio::sync::oneshot::channel();
    let work = |stop: Stop| async {
        let _ = give.send(stop.clone());
        stop.await;
    };
    graceful.worker("worker", work).unwrap();
    given.await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_worker_is_notified_exactly_when_draining_starts() {
    let graceful = graceful();
    let stop = stop_of(&graceful).await;
    let _held = request(&graceful);
    pass(s(60)).await;
    let mut first = task::spawn(stop.clone());
    assert!(!stop.is_stopping());
    assert_pending!(first.poll());
    graceful.shutdown();
    pass(DELAY - ms(1)).await;
    assert!(!stop.is_stopping());
    assert_pending!(first.poll());
    pass(ms(1)).await;
    assert_eq!(graceful.phase(), Phase::Draining);
    assert!(stop.is_stopping());
    assert!(first.is_woken());
    for _ in 0..3 {
        assert_ready!(first.poll(), "it stays ready");
    }
    let clone = first.clone();
    assert_ready!(task::spawn(clone).poll());
    assert_ready!(task::spawn(stop.clone()).poll(), "never polled before");
    pass(s(60)).await;
    assert_eq!(graceful.phase(), Phase::Stopped);
    assert!(stop.is_stopping());
    assert_ready!(task::spawn(stop).poll());
}

#[tokio::test(start_paused = true)]
async fn every_worker_and_every_clone_is_notified_at_once() {
    let graceful = graceful();
    let diary = Diary::begin();
    for _ in 0..3 {
        let diary = diary.clone();
        let work = |stop: Stop| async move {
            tokio::join!(stop.clone(), stop.clone(), stop);
            diary.note("notified");
        };
        graceful.worker("worker", work).unwrap();
    }
    let report = stop(&graceful).await;
    diary.assert(&[("notified", DELAY); 3]);
    assert_eq!(report.outcome(), Outcome::Clean);
    assert_eq!(report.duration(), DELAY);
    assert_eq!(
        rows(&report),
        vec![row("worker", WORKER, DELAY, ZERO, TaskOutcome::Done); 3]
    );
}

#[tokio::test(start_paused = true)]
async fn a_worker_is_joined_after_the_last_request_and_hold_and_before_the_first_step() {
    let graceful = graceful();
    let diary = Diary::begin();
    let (request, hold) = (request(&graceful), graceful.hold("hold"));
    let note = diary.clone();
    let step = async move {
        note.note("step");
        pass(s(1)).await;
    };
    graceful.cleanup("step", s(5), step).unwrap();
    let note = diary.clone();
    let work = |stop: Stop| async move {
        stop.await;
        note.note("notified");
        pass(s(4)).await;
        note.note("worker is done");
    };
    graceful.worker("worker", work).unwrap();
    graceful.shutdown();
    until(&diary, s(6)).await;
    drop(request);
    until(&diary, s(7)).await;
    assert_eq!(graceful.phase(), Phase::Draining);
    drop(hold);
    until(&diary, s(8)).await;
    assert_eq!(graceful.phase(), Phase::Closing);
    let report = report(&graceful).await;
    diary.assert(&[("notified", s(5)), ("worker is done", s(9)), ("step", s(9))]);
    assert_eq!(report.time_in(Phase::Draining), s(2));
    assert_eq!(report.time_in(Phase::Closing), ZERO);
    assert_eq!(report.cleanup_time(), s(3));
    assert_eq!(report.duration(), s(10));
    assert_eq!(report.outcome(), Outcome::Clean);
    assert_eq!(
        rows(&report),
        [
            row("step", TaskKind::Cleanup, s(9), s(1), TaskOutcome::Done),
            row("worker", WORKER, s(5), s(4), TaskOutcome::Done),
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_is_done_before_the_last_request_costs_no_time() {
    let graceful = graceful();
    let held = request(&graceful);
    graceful.worker("worker", obedient).unwrap();
    graceful.shutdown();
    pass(s(9)).await;
    drop(held);
    let report = report(&graceful).await;
    assert_eq!(report.duration(), s(9));
    assert_eq!(report.cleanup_time(), ZERO);
    assert_eq!(
        rows(&report),
        [row("worker", WORKER, DELAY, ZERO, TaskOutcome::Done)]
    );
}

#[tokio::test(start_paused = true)]
async fn a_worker_does_not_hold_the_drain_nor_the_server() {
    let graceful = graceful();
    let (server, log) = watched(server(&graceful));
    let run = serve(&graceful, server).await;
    let work = |stop: Stop| async move {
        stop.await;
        pass(s(3)).await;
    };
    graceful.worker("worker", work).unwrap();
    let begun = Instant::now();
    graceful.shutdown();
    let report = run.await.unwrap();
    assert_eq!(log.dropped().unwrap() - begun, DELAY);
    assert_eq!(begun.elapsed(), DELAY + s(3));
    assert_eq!(report.time_in(Phase::Draining), ZERO);
    assert_eq!(report.time_in(Phase::Closing), ZERO);
    assert_eq!(report.cleanup_time(), s(3));
    assert_eq!(report.outcome(), Outcome::Clean);
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_ends_early_in_good_order_is_reported_and_no_failure() {
    let graceful = graceful();
    graceful.worker("serving", |_| async {}).unwrap();
    let result = |_| async { Ok::<(), io::Error>(()) };
    graceful.worker("result", result).unwrap();
    let later = |_| pass(s(61));
    graceful.worker("lame duck", later).unwrap();
    pass(s(60)).await;
    assert_eq!(graceful.phase(), Phase::Serving);
    let report = stop(&graceful).await;
    assert_eq!(report.outcome(), Outcome::Clean);
    assert_eq!(report.duration(), DELAY);
    assert_eq!(
        rows(&report),
        [
            row("serving", WORKER, ZERO, ZERO, TaskOutcome::EndedEarly),
            row("result", WORKER, ZERO, ZERO, TaskOutcome::EndedEarly),
            row("lame duck", WORKER, s(1), ZERO, TaskOutcome::EndedEarly),
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_fails_is_reported_and_does_not_stop_the_service() {
    let graceful = graceful();
    let early = |_| async { Err("out of\nmemory") };
    graceful.worker("early", early).unwrap();
    let late = |stop: Stop| async move {
        stop.await;
        pass(ms(250)).await;
        Err(io::Error::other("the last flush"))
    };
    graceful.worker("late", late).unwrap();
    pass(s(60)).await;
    assert_eq!(graceful.phase(), Phase::Serving);
    let report = stop(&graceful).await;
    assert_eq!(report.outcome(), Outcome::CleanupFailed);
    assert_eq!(report.exit_code(), 2);
    assert_eq!(report.duration(), DELAY + ms(250));
    assert_eq!(
        rows(&report),
        [
            row(
                "early",
                WORKER,
                ZERO,
                ZERO,
                TaskOutcome::Failed("out of\nmemory".into())
            ),
            row(
                "late",
                WORKER,
                DELAY,
                ms(250),
                TaskOutcome::Failed("the last flush".into())
            ),
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_panics_is_reported_with_its_message() {
    struct Bomb;

    impl Drop for Bomb {
        fn drop(&mut self) {
            resume_unwind(Box::new("the payload of a panic panics when it is dropped"));
        }
    }

    fn in_closure(_: Stop) -> Ready<()> {
        resume_unwind(Box::new("in the closure"))
    }
    let graceful = graceful();
    graceful.worker("closure", in_closure).unwrap();
    let at_once = |_| panics(format!("at {}", "once"));
    graceful.worker("at once", at_once).unwrap();
    let later = |_| async {
        pass(s(1)).await;
        panics("a str").await;
    };
    graceful.worker("later", later).unwrap();
    let other = |stop: Stop| async move {
        stop.await;
        panics(42_u8).await;
    };
    graceful.worker("other", other).unwrap();
    graceful.worker("bomb", |_| panics(Bomb)).unwrap();
    graceful.worker("obedient", obedient).unwrap();
    pass(s(60)).await;
    assert_eq!(graceful.phase(), Phase::Serving);
    let report = stop(&graceful).await;
    assert_eq!(report.outcome(), Outcome::CleanupFailed);
    assert_eq!(report.duration(), DELAY);
    let panicked = |message: &str| TaskOutcome::Panicked(message.into());
    assert_eq!(
        outcomes(&report),
        [
            panicked("in the closure"),
            panicked("at once"),
            panicked("a str"),
            panicked("the payload is not text"),
            panicked("the payload is not text"),
            TaskOutcome::Done,
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn of_the_workers_that_ended_before_the_stop_the_latest_are_listed_and_the_others_counted() {
    let graceful = graceful();
    graceful.worker("living", obedient).unwrap();
    for number in 0..1000_u32 {
        let name = number.to_string();
        let work = move |_| async move {
            match number % 100 {
                0 => Err("failed"),
                50 => resume_unwind(Box::new("panicked")),
                _ => Ok(()),
            }
        };
        graceful.worker(name, work).unwrap();
        let_others_run().await;
    }
    let failing = |_| async { Err("failed") };
    for _ in 0..32 {
        graceful.worker("last", failing).unwrap();
        let_others_run().await;
    }
    let report = stop(&graceful).await;
    let names: Vec<_> = report.tasks().iter().map(|it| it.name.clone()).collect();
    let mut expected = vec!["living".to_owned()];
    expected.extend((968..1000).map(|number: u32| number.to_string()));
    expected.extend(vec!["last".to_owned(); 32]);
    assert_eq!(names, expected);
    assert_eq!(report.unlisted_workers().ended, 1000 - 32);
    assert_eq!(report.unlisted_workers().failed, 20);
    let line = "\n    and 968 more that ended before the stop, 20 of them failed\n";
    assert!(format!("{report}\n").contains(line), "{report}");
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_failed_and_is_only_counted_is_in_the_outcome() {
    let graceful = graceful();
    let failing = |_| async { Err("failed") };
    graceful.worker("failing", failing).unwrap();
    let_others_run().await;
    for _ in 0..100 {
        graceful.worker("ending", |_| async {}).unwrap();
        let_others_run().await;
    }
    let report = stop(&graceful).await;
    assert_eq!(report.tasks().len(), 33, "the failure, and the latest");
    assert_eq!(report.outcome(), Outcome::CleanupFailed);
}

#[tokio::test(start_paused = true)]
async fn a_critical_worker_that_ends_stops_the_service_and_the_report_says_why() {
    type End = fn() -> Result<(), &'static str>;
    let ends: [(_, End, _); 3] = [
        (TaskOutcome::EndedEarly, || Ok(()), Outcome::Clean),
        (
            TaskOutcome::Failed("lost".into()),
            || Err("lost"),
            Outcome::CleanupFailed,
        ),
        (
            TaskOutcome::Panicked("gone".into()),
            || resume_unwind(Box::new("gone")),
            Outcome::CleanupFailed,
        ),
    ];
    for (task, end, outcome) in ends {
        let graceful = graceful();
        let work = move |_| async move {
            tokio::time::sleep(s(60)).await;
            end()
        };
        graceful.critical_worker("critical", work).unwrap();
        pass(s(59)).await;
        assert_eq!(graceful.phase(), Phase::Serving);
        pass(s(1)).await;
        assert_eq!(graceful.phase(), Phase::LameDuck);
        let report = report(&graceful).await;
        assert_eq!(report.trigger(), Trigger::WorkerEnded);
        assert_eq!(report.duration(), DELAY);
        assert_eq!(report.outcome(), outcome);
        assert_eq!(rows(&report), [row("critical", WORKER, ZERO, ZERO, task)]);
        assert!(report.to_string().starts_with("shutdown by worker ended: "));
    }
}

#[tokio::test(start_paused = true)]
async fn a_critical_worker_that_ends_with_the_stop_is_an_ordinary_worker() {
    let graceful = graceful();
    graceful.critical_worker("critical", obedient).unwrap();
    pass(s(60)).await;
    let report = stop(&graceful).await;
    assert_eq!(report.trigger(), Trigger::Shutdown);
    assert_eq!(report.outcome(), Outcome::Clean);
    assert_eq!(outcomes(&report), [TaskOutcome::Done]);
}

/// An error with a source, whose text may include that of the source.
#[derive(Debug)]
struct Layered(&'static str, Option<Box<Layered>>);

impl fmt::Display for Layered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Layered {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        let source = self.1.as_deref()?;
        Some(source)
    }
}

/// An error that is its own source.
#[derive(Debug)]
struct Circular;

impl fmt::Display for Circular {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("circular")
    }
}

impl std::error::Error for Circular {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(self)
    }
}

#[tokio::test(start_paused = true)]
async fn an_error_is_reported_with_its_sources_and_each_of_them_once() {
    let full = || Some(Box::new(Layered("disk full", None)));
    let flushing = Layered("flushing", full());
    let errors = [
        Layered("closing the pool", full()),
        Layered("closing the pool", Some(Box::new(flushing))),
        Layered("closing the pool: disk full", full()),
    ];
    let graceful = without_delay();
    for error in errors {
        let step = async { Err(error) };
        graceful.cleanup("step", s(1), step).unwrap();
    }
    let step = async { Err(Circular) };
    graceful.cleanup("circular", s(1), step).unwrap();
    let report = stop(&graceful).await;
    let failed = |text: &str| TaskOutcome::Failed(text.into());
    assert_eq!(
        outcomes(&report),
        [
            failed("closing the pool: disk full"),
            failed("closing the pool: flushing: disk full"),
            failed("closing the pool: disk full"),
            failed("circular"),
        ]
    );
}

/// An error whose `Display` panics.
#[derive(Debug)]
struct Speechless;

impl fmt::Display for Speechless {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        resume_unwind(Box::new("speechless"))
    }
}

impl std::error::Error for Speechless {}

#[tokio::test(start_paused = true)]
async fn an_error_whose_display_panics_is_a_panic() {
    let graceful = without_delay();
    graceful
        .worker("worker", |_| async { Err(Speechless) })
        .unwrap();
    let step = async { Err(Speechless) };
    graceful.cleanup("step", s(1), step).unwrap();
    let report = stop(&graceful).await;
    assert_eq!(report.outcome(), Outcome::CleanupFailed);
    let panicked = TaskOutcome::Panicked("speechless".into());
    assert_eq!(outcomes(&report), [panicked.clone(), panicked]);
}

/// Panics when it is dropped.
struct Landmine;

impl Drop for Landmine {
    fn drop(&mut self) {
        if !thread::panicking() {
            resume_unwind(Box::new("stepped on"));
        }
    }
}

/// Ready at once, and panics when it is dropped.
struct ReadyLandmine(#[allow(dead_code)] Landmine);

impl Future for ReadyLandmine {
    type Output = ();

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }
}

#[tokio::test(start_paused = true)]
async fn what_panics_when_it_is_dropped_has_panicked_and_was_not_cut() {
    let graceful = without_delay();
    let work = |_| ReadyLandmine(Landmine);
    graceful.worker("worker", work).unwrap();
    let step = ReadyLandmine(Landmine);
    graceful.cleanup("step", s(1), step).unwrap();
    let hook = ReadyLandmine(Landmine);
    graceful.on_lame_duck("hook", s(1), hook).unwrap();
    graceful.cleanup("next", s(1), async {}).unwrap();
    pass(s(1)).await;
    let report = stop(&graceful).await;
    let panicked = TaskOutcome::Panicked("stepped on".into());
    let expected = [
        panicked.clone(),
        panicked.clone(),
        panicked,
        TaskOutcome::Done,
    ];
    assert_eq!(outcomes(&report), expected);
    assert_eq!(report.outcome(), Outcome::CleanupFailed);
}

/// Registers a worker that never ends. The diary records when it was dropped.
fn endless(graceful: &Graceful, diary: &Diary) {
    let dropped = diary.at_drop("worker is dropped");
    let work = |_| async move {
        let _dropped = dropped;
        pending::<()>().await;
    };
    graceful.worker("endless", work).unwrap();
}

fn last_step(graceful: &Graceful, diary: &Diary) {
    step(graceful, diary, s(1));
}

fn step(graceful: &Graceful, diary: &Diary, bound: Duration) {
    let note = diary.clone();
    let step = async move { note.note("step") };
    graceful.cleanup("step", bound, step).unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_never_ends_is_cut_exactly_at_its_timeout() {
    let builder = plan().drain_delay(ZERO).worker_timeout(ms(3250));
    let graceful = builder.build().unwrap();
    let diary = Diary::begin();
    endless(&graceful, &diary);
    last_step(&graceful, &diary);
    let report = stop(&graceful).await;
    diary.assert(&[("worker is dropped", ms(3250)), ("step", ms(3250))]);
    assert_eq!(report.outcome(), Outcome::Forced);
    assert_eq!(report.exit_code(), 1);
    assert_eq!(report.remaining().workers, 1);
    assert_eq!(report.remaining().to_string(), "1 worker");
    assert_eq!(
        rows(&report),
        [
            row("endless", WORKER, ZERO, ms(3250), TaskOutcome::Cut),
            row("step", TaskKind::Cleanup, ms(3250), ZERO, TaskOutcome::Done),
        ]
    );
    assert_eq!(report.cleanup_time(), ms(3250));
}

#[tokio::test(start_paused = true)]
async fn by_default_workers_get_the_time_that_the_steps_leave_and_at_least_half() {
    for (bound, left) in [(s(1), s(1)), (Duration::MAX, (END - s(9)) / 2)] {
        let graceful = graceful();
        let diary = Diary::begin();
        endless(&graceful, &diary);
        step(&graceful, &diary, bound);
        let held = request(&graceful);
        graceful.shutdown();
        until(&diary, s(9)).await;
        drop(held);
        let report = report(&graceful).await;
        let cut = END - left;
        diary.assert(&[("worker is dropped", cut), ("step", cut)]);
        assert_eq!(report.duration(), cut);
        assert_eq!(rows(&report)[0].3, cut - DELAY);
    }
}

#[tokio::test(start_paused = true)]
async fn by_default_workers_get_all_the_time_left_if_there_is_no_step() {
    let graceful = graceful();
    let diary = Diary::begin();
    endless(&graceful, &diary);
    let report = stop(&graceful).await;
    diary.assert(&[("worker is dropped", END)]);
    assert_eq!(report.duration(), END);
    assert_eq!(report.outcome(), Outcome::Forced);
}

#[tokio::test(start_paused = true)]
async fn a_longer_timeout_than_the_steps_leave_is_reduced() {
    for timeout in [s(1000), Duration::MAX] {
        let builder = plan().worker_timeout(timeout);
        let graceful = builder.build().unwrap();
        let diary = Diary::begin();
        endless(&graceful, &diary);
        step(&graceful, &diary, s(2));
        let report = stop(&graceful).await;
        let cut = END - s(2);
        diary.assert(&[("worker is dropped", cut), ("step", cut)]);
        assert_eq!(report.outcome(), Outcome::Forced);
    }
}

#[tokio::test(start_paused = true)]
async fn a_timeout_of_zero_waits_for_no_worker() {
    let graceful = plan().worker_timeout(ZERO).build().unwrap();
    let diary = Diary::begin();
    endless(&graceful, &diary);
    let held = request(&graceful);
    graceful.worker("obedient", obedient).unwrap();
    graceful.shutdown();
    until(&diary, s(6)).await;
    drop(held);
    let report = report(&graceful).await;
    diary.assert(&[("worker is dropped", s(6))]);
    assert_eq!(outcomes(&report), [TaskOutcome::Cut, TaskOutcome::Done]);
    assert_eq!(report.remaining().workers, 1);
}

#[tokio::test(start_paused = true)]
async fn several_workers_share_one_timeout() {
    let builder = plan().drain_delay(ZERO).worker_timeout(s(2));
    let graceful = builder.build().unwrap();
    let diary = Diary::begin();
    endless(&graceful, &diary);
    endless(&graceful, &diary);
    let slow = |stop: Stop| async move {
        stop.await;
        pass(ms(1999)).await;
    };
    graceful.worker("slow", slow).unwrap();
    let report = stop(&graceful).await;
    diary.assert(&[("worker is dropped", s(2)); 2]);
    assert_eq!(report.remaining().workers, 2);
    assert_eq!(
        rows(&report)[2],
        row("slow", WORKER, ZERO, ms(1999), TaskOutcome::Done)
    );
    assert_eq!(report.duration(), s(2));
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_ends_just_before_its_timeout_is_done() {
    let builder = plan().drain_delay(ZERO).worker_timeout(s(2));
    let graceful = builder.build().unwrap();
    let work = |stop: Stop| async move {
        stop.await;
        tokio::time::sleep(s(2) - ms(1)).await;
    };
    graceful.worker("worker", work).unwrap();
    let report = stop(&graceful).await;
    assert_eq!(report.duration(), s(2) - ms(1));
    assert_eq!(outcomes(&report), [TaskOutcome::Done]);
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_fails_while_another_is_cut_is_a_forced_stop() {
    let graceful = plan().worker_timeout(s(1)).build().unwrap();
    endless(&graceful, &Diary::begin());
    let work = |_| async { Err("broken") };
    graceful.worker("broken", work).unwrap();
    let report = stop(&graceful).await;
    assert_eq!(report.outcome(), Outcome::Forced);
    assert_eq!(
        outcomes(&report),
        [TaskOutcome::Cut, TaskOutcome::Failed("broken".into())]
    );
}

#[tokio::test(start_paused = true)]
async fn workers_are_joined_after_a_forced_cut_too() {
    let graceful = plan().drain_delay(ZERO).build().unwrap();
    let diary = Diary::begin();
    let _held = request(&graceful);
    let note = diary.clone();
    let work = |stop: Stop| async move {
        stop.await;
        pass(s(11)).await;
        note.note("worker is done");
    };
    graceful.worker("worker", work).unwrap();
    let report = stop(&graceful).await;
    diary.assert(&[("worker is done", s(11))]);
    assert_eq!(report.outcome(), Outcome::Forced);
    assert_eq!(report.remaining().to_string(), "1 request");
    assert_eq!(report.time_in(Phase::Closing), LET_GO);
    assert_eq!(report.cleanup_time(), s(1) - LET_GO);
    assert_eq!(outcomes(&report), [TaskOutcome::Done]);
}

#[tokio::test(start_paused = true)]
async fn a_worker_may_begin_in_the_lame_duck_phase() {
    let graceful = graceful();
    graceful.shutdown();
    pass(DELAY - ms(1)).await;
    graceful.worker("late", obedient).unwrap();
    let report = report(&graceful).await;
    assert_eq!(report.duration(), DELAY);
    assert_eq!(
        rows(&report),
        [row("late", WORKER, DELAY, ZERO, TaskOutcome::Done)]
    );
}

/// Registers a worker that must not run.
fn comes_too_late(graceful: &Graceful) {
    let dropped = Diary::begin();
    let at_drop = dropped.at_drop("dropped");
    let work = |_| -> Ready<()> {
        drop(at_drop);
        panic!("it has run")
    };
    let error = graceful.worker("late", work).unwrap_err();
    dropped.assert(&[("dropped", ZERO)]);
    let phase = graceful.phase();
    let expected = RegisterError::TooLate {
        name: "late".into(),
        phase,
    };
    assert_eq!(error, expected);
    assert_eq!(
        error.to_string(),
        format!("\"late\" was registered too late: the service is {phase} already")
    );
}

#[tokio::test(start_paused = true)]
async fn a_worker_registered_after_draining_has_started_is_not_run() {
    let graceful = without_delay();
    let held = request(&graceful);
    let connection = graceful.track(());
    graceful.shutdown();
    assert_eq!(graceful.phase(), Phase::Draining);
    comes_too_late(&graceful);
    drop(held);
    let_others_run().await;
    assert_eq!(graceful.phase(), Phase::Closing);
    comes_too_late(&graceful);
    drop(connection);
    let report = report(&graceful).await;
    comes_too_late(&graceful);
    let_others_run().await;
    assert!(report.tasks().is_empty());
    assert_eq!(report.duration(), ZERO);
}

#[test]
fn a_worker_outside_a_runtime_is_not_run() {
    let graceful = graceful();
    let error = graceful.worker("homeless", obedient).unwrap_err();
    let expected = RegisterError::NoRuntime {
        name: "homeless".into(),
    };
    assert_eq!(error, expected);
    assert_eq!(
        error.to_string(),
        "worker \"homeless\" was registered outside a tokio runtime, or in one that has shut down; \
         it needs a runtime to run"
    );
    graceful.shutdown();
    paused_runtime().block_on(async {
        let report = report(&graceful).await;
        assert!(report.tasks().is_empty());
        assert_eq!(report.outcome(), Outcome::Clean);
    });
}

#[test]
fn a_worker_in_a_runtime_that_has_shut_down_is_not_run() {
    let graceful = graceful();
    let handle = {
        let runtime = paused_runtime();
        runtime.handle().clone()
    };
    let _there = handle.enter();
    let name = "homeless".into();
    let error = graceful.worker("homeless", obedient).unwrap_err();
    assert_eq!(error, RegisterError::NoRuntime { name });
    graceful.shutdown();
    paused_runtime().block_on(async {
        let report = report(&graceful).await;
        assert!(report.tasks().is_empty());
        assert_eq!(report.outcome(), Outcome::Clean);
    });
}

#[tokio::test(start_paused = true)]
async fn a_worker_keeps_the_service_alive_and_lets_it_go_when_it_ends() {
    let graceful = graceful();
    let mut phases = graceful.subscribe();
    graceful.worker("short", |_| pass(s(60))).unwrap();
    drop(graceful);
    pass(s(59)).await;
    assert!(!phases.is_closed());
    pass(s(1)).await;
    assert!(phases.changed().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_worker_may_stop_the_service_itself() {
    let graceful = graceful();
    let work = {
        let graceful = graceful.clone();
        |stop: Stop| async move {
            pass(s(60)).await;
            graceful.shutdown();
            assert!(!stop.is_stopping());
            stop.await;
            Err("the disk is gone")
        }
    };
    graceful.worker("watchdog", work).unwrap();
    let begun = Instant::now();
    let report = report(&graceful).await;
    assert_eq!(begun.elapsed(), s(60) + DELAY);
    assert_eq!(report.outcome(), Outcome::CleanupFailed);
}

#[tokio::test(start_paused = true)]
async fn a_worker_may_hold_and_register() {
    let graceful = without_delay();
    let diary = Diary::begin();
    let held = request(&graceful);
    let work = {
        let (graceful, diary) = (graceful.clone(), diary.clone());
        |stop: Stop| async move {
            graceful.worker("second", obedient).unwrap();
            graceful.on_lame_duck("hook", s(1), async {}).unwrap();
            stop.await;
            let rest = graceful.hold("rest");
            let late = graceful.worker("third", obedient);
            assert!(late.is_err());
            let note = diary.clone();
            let step = async move { note.note("step") };
            graceful.cleanup("step", s(1), step).unwrap();
            pass(s(3)).await;
            diary.note("hold ends");
            drop(rest);
            pass(s(1)).await;
            let late = graceful.cleanup("late", s(1), async {});
            assert!(late.is_err());
            diary.note("worker ends");
        }
    };
    graceful.worker("first", work).unwrap();
    let_others_run().await;
    graceful.shutdown();
    until(&diary, s(1)).await;
    drop(held);
    let report = report(&graceful).await;
    diary.assert(&[("hold ends", s(3)), ("worker ends", s(4)), ("step", s(4))]);
    assert_eq!(report.outcome(), Outcome::Clean);
    assert_eq!(report.time_in(Phase::Draining), s(3));
    assert_eq!(
        rows(&report),
        [
            row("first", WORKER, ZERO, s(4), TaskOutcome::Done),
            row("second", WORKER, ZERO, ZERO, TaskOutcome::Done),
            row("hook", TaskKind::LameDuck, ZERO, ZERO, TaskOutcome::Done),
            row("step", TaskKind::Cleanup, s(4), ZERO, TaskOutcome::Done),
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_waits_for_the_end_is_cut() {
    let graceful = plan().worker_timeout(s(1)).build().unwrap();
    let stopped = graceful.stopped();
    graceful.worker("circular", |_| stopped).unwrap();
    let report = stop(&graceful).await;
    assert_eq!(outcomes(&report), [TaskOutcome::Cut]);
    assert_eq!(report.duration(), DELAY + s(1));
}

#[test]
fn workers_that_hold_their_threads_do_not_hold_the_stop() {
    does_not_hang(|| {
        let elsewhere = runtime::Builder::new_multi_thread()
            .worker_threads(4)
            .build()
            .unwrap();
        let (release, released) = mpsc::channel::<()>();
        let released = Arc::new(Mutex::new(released));
        paused_runtime().block_on(async {
            let builder = plan().drain_delay(ZERO).worker_timeout(s(2));
            let graceful = builder.build().unwrap();
            let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
            for _ in 0..4 {
                let (released, tell) = (Arc::clone(&released), tell.clone());
                let _elsewhere = elsewhere.enter();
                let work = |_| async move {
                    let _ = tell.send(());
                    let _ = released.lock().unwrap().recv();
                };
                graceful.worker("blocked", work).unwrap();
            }
            for _ in 0..4 {
                told.recv().await;
            }
            let report = stop(&graceful).await;
            assert_eq!(report.outcome(), Outcome::Forced);
            assert_eq!(report.remaining().workers, 4);
            // The service waits briefly for all cut workers together.
            assert_eq!(report.cleanup_time(), s(2) + ms(50));
        });
        drop(release);
    });
}

#[test]
fn a_worker_whose_runtime_is_gone_is_reported() {
    does_not_hang(|| {
        let (runtime, elsewhere) = (paused_runtime(), paused_runtime());
        let graceful = runtime.block_on(async { without_delay() });
        elsewhere.block_on(async {
            graceful.worker("orphan", |_| pending::<()>()).unwrap();
        });
        drop(elsewhere);
        runtime.block_on(async {
            let report = stop(&graceful).await;
            assert_eq!(report.outcome(), Outcome::Forced);
            assert_eq!(outcomes(&report), [TaskOutcome::Cut]);
            assert_eq!(report.duration(), ZERO);
        });
    });
}

#[test]
fn a_runtime_dropped_while_workers_are_joined_leaves_the_steps_to_the_next() {
    does_not_hang(|| {
        let first = paused_runtime();
        let graceful = without_delay();
        let diary = Diary::begin();
        first.block_on(async {
            graceful.worker("endless", |_| pending::<()>()).unwrap();
            last_step(&graceful, &diary);
            graceful.shutdown();
            pass(s(1)).await;
            assert_eq!(graceful.phase(), Phase::Closing);
        });
        drop(first);
        assert_eq!(graceful.phase(), Phase::Closing);
        paused_runtime().block_on(async {
            let report = report(&graceful).await;
            assert_eq!(outcomes(&report), [TaskOutcome::Cut, TaskOutcome::Done]);
            assert_eq!(report.outcome(), Outcome::Forced);
        });
    });
}
