//! Holds, which keep a drain open besides requests.

use std::{
    future::pending,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use tokio::time::Instant;
use tower_graceful::{Graceful, Hold, Outcome, Phase, Remaining};

use super::{END, report, stop};
use crate::support::{
    DEADLINE, DELAY, LET_GO, does_not_hang, graceful, let_others_run, ms, pass, paused_runtime,
    plan, quick_request, request, s, serve, server, without_delay,
};

#[tokio::test(start_paused = true)]
async fn a_hold_is_in_flight_and_not_counted_against_the_limit() {
    let graceful = plan().max_in_flight(1).build().unwrap();
    let holds = [graceful.hold("one"), graceful.hold(String::from("two"))];
    assert_eq!(graceful.in_flight(), 2);
    assert_eq!(graceful.snapshot().in_flight, 2);
    assert_eq!(quick_request(&graceful).await, 200);
    let held = request(&graceful);
    assert_eq!(graceful.in_flight(), 3);
    assert_eq!(quick_request(&graceful).await, 429);
    drop(held);
    assert_eq!(graceful.in_flight(), 2);
    drop(holds);
    assert_eq!(graceful.in_flight(), 0);
    assert_eq!(graceful.snapshot().in_flight, 0);
}

#[tokio::test(start_paused = true)]
async fn the_drain_lasts_to_the_instant_the_last_hold_is_dropped() {
    let graceful = graceful();
    let (first, last) = (graceful.hold("first"), graceful.hold("last"));
    graceful.shutdown();
    pass(s(7)).await;
    drop(first);
    pass(ms(1125)).await;
    assert_eq!(graceful.phase(), Phase::Draining);
    drop(last);
    let dropped = Instant::now();
    let report = report(&graceful).await;
    assert_eq!(dropped.elapsed(), Duration::ZERO);
    assert_eq!(report.outcome(), Outcome::Clean);
    assert_eq!(report.time_in(Phase::Draining), s(7) + ms(1125) - DELAY);
    assert_eq!(report.duration(), ms(8125));
    assert!(report.holds_cut().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_hold_dropped_before_the_drain_does_not_keep_it_open() {
    let graceful = graceful();
    drop(graceful.hold("serving"));
    let hold = graceful.hold("lame duck");
    graceful.shutdown();
    pass(s(1)).await;
    drop(hold);
    assert_eq!(report(&graceful).await.duration(), DELAY);
}

#[tokio::test(start_paused = true)]
async fn a_hold_that_continues_a_request_keeps_the_drain_open_without_a_gap() {
    let graceful = without_delay();
    let request = request(&graceful);
    graceful.shutdown();
    pass(s(1)).await;
    let hold = graceful.hold("continued");
    drop(request);
    assert_eq!(graceful.in_flight(), 1);
    pass(s(2)).await;
    assert_eq!(graceful.phase(), Phase::Draining);
    drop(hold);
    let report = report(&graceful).await;
    assert_eq!(report.time_in(Phase::Draining), s(3));
    assert_eq!(report.outcome(), Outcome::Clean);
}

#[tokio::test(start_paused = true)]
async fn a_request_may_outlast_the_hold_as_well() {
    let graceful = without_delay();
    let request = request(&graceful);
    let hold = graceful.hold("shorter");
    graceful.shutdown();
    pass(s(1)).await;
    drop(hold);
    pass(s(1)).await;
    assert_eq!(graceful.phase(), Phase::Draining);
    drop(request);
    assert_eq!(report(&graceful).await.time_in(Phase::Draining), s(2));
}

#[tokio::test(start_paused = true)]
async fn a_hold_may_be_taken_in_every_phase() {
    let graceful = graceful();
    let connection = graceful.track(());
    let serving = graceful.hold("serving");
    graceful.shutdown();
    let lame_duck = graceful.hold("lame duck");
    pass(DELAY).await;
    assert_eq!(graceful.phase(), Phase::Draining);
    drop(serving);
    pass(s(1)).await;
    let draining = graceful.hold("draining");
    drop(lame_duck);
    pass(s(1)).await;
    assert_eq!(graceful.phase(), Phase::Draining);
    drop(draining);
    let_others_run().await;
    assert_eq!(graceful.phase(), Phase::Closing);
    let closing = graceful.hold("closing");
    assert_eq!(graceful.in_flight(), 1);
    drop(connection);
    pass(s(1)).await;
    assert_eq!(graceful.phase(), Phase::Closing);
    drop(closing);
    let report = report(&graceful).await;
    assert_eq!(report.outcome(), Outcome::Clean);
    assert_eq!(report.duration(), DELAY + s(3));
    let late = graceful.hold("stopped");
    assert_eq!(graceful.in_flight(), 1);
    drop(late);
    assert_eq!(graceful.in_flight(), 0);
    assert_eq!(graceful.phase(), Phase::Stopped);
}

#[tokio::test(start_paused = true)]
async fn a_hold_taken_while_closing_is_cut_at_the_drain_deadline() {
    let graceful = graceful();
    let connection = graceful.track(());
    graceful.shutdown();
    pass(DELAY).await;
    assert_eq!(graceful.phase(), Phase::Closing);
    let _hold = graceful.hold("late");
    drop(connection);
    let report = report(&graceful).await;
    assert_eq!(report.outcome(), Outcome::Forced);
    assert_eq!(report.duration(), DEADLINE + LET_GO);
    assert_eq!(report.holds_cut()[0].name, "late");
    assert_eq!(report.holds_cut()[0].age, DEADLINE - DELAY);
}

#[tokio::test(start_paused = true)]
async fn holds_beyond_the_deadline_are_named_with_their_age_oldest_first() {
    let graceful = graceful();
    let gone = graceful.hold("gone");
    pass(s(1)).await;
    let _oldest = graceful.hold("oldest");
    pass(s(60)).await;
    drop(gone);
    // A new hold uses the key of one that has ended.
    let _middle = graceful.hold("middle");
    graceful.shutdown();
    pass(ms(500)).await;
    let _youngest = graceful.hold("young\nest");
    let report = report(&graceful).await;
    assert_eq!(report.outcome(), Outcome::Forced);
    assert_eq!(report.exit_code(), 1);
    assert_eq!(report.duration(), DEADLINE + LET_GO);
    assert_eq!(report.remaining().holds, 3);
    assert_eq!(report.remaining().requests, 0);
    let holds = report.holds_cut().iter();
    let holds: Vec<_> = holds.map(|hold| (&*hold.name, hold.age)).collect();
    let expected = [
        ("oldest", DEADLINE + s(60)),
        ("middle", DEADLINE),
        ("young\nest", DEADLINE - ms(500)),
    ];
    assert_eq!(holds, expected);
    let text = report.to_string();
    assert!(
        text.ends_with(
            "\n  given up: 3 holds\
             \n    hold oldest 75.0 s\
             \n    hold middle 15.0 s\
             \n    hold young\\nest 14.5 s"
        ),
        "{text}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_hold_that_ends_after_the_cut_ends_the_wait_and_is_still_cut() {
    let graceful = without_delay();
    let hold = graceful.hold("late");
    graceful.shutdown();
    pass(s(10)).await;
    assert_eq!(graceful.phase(), Phase::Closing);
    pass(ms(100)).await;
    drop(hold);
    let report = report(&graceful).await;
    assert_eq!(report.duration(), s(10) + ms(100));
    assert_eq!(report.outcome(), Outcome::Forced);
    let mut expected = Remaining::default();
    expected.holds = 1;
    assert_eq!(report.remaining(), expected);
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_holds_are_ten_thousand_in_flight() {
    let graceful = graceful();
    let mut holds: Vec<Hold> = (0..10_000)
        .map(|number| graceful.hold(format!("hold {number}")))
        .collect();
    assert_eq!(graceful.in_flight(), 10_000);
    graceful.shutdown();
    pass(DELAY).await;
    let last = holds.swap_remove(7);
    drop(holds);
    pass(s(1)).await;
    assert_eq!(graceful.phase(), Phase::Draining);
    assert_eq!(graceful.in_flight(), 1);
    drop(last);
    assert_eq!(report(&graceful).await.duration(), DELAY + s(1));
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_holds_beyond_the_deadline_are_all_in_the_report() {
    let graceful = without_delay();
    let _holds: Vec<Hold> = (0..10_000).map(|_| graceful.hold("one of many")).collect();
    let report = stop(&graceful).await;
    assert_eq!(report.holds_cut().len(), 10_000);
    assert!(report.to_string().ends_with("\n    and 9997 more"));
}

#[tokio::test(start_paused = true)]
async fn a_hold_may_be_dropped_on_a_plain_thread() {
    let graceful = without_delay();
    let hold = graceful.hold("elsewhere");
    graceful.shutdown();
    pass(s(3)).await;
    thread::spawn(move || drop(hold)).join().unwrap();
    let report = report(&graceful).await;
    assert_eq!(report.duration(), s(3));
    assert_eq!(report.outcome(), Outcome::Clean);
}

#[test]
fn a_hold_needs_no_runtime() {
    let graceful = without_delay();
    let hold = graceful.hold("outside");
    graceful.shutdown();
    assert_eq!(graceful.phase(), Phase::Draining);
    drop(hold);
    // There is no driver, so the next call that changes something takes the steps that are due.
    graceful.shutdown();
    assert_eq!(graceful.phase(), Phase::Stopped);
}

#[tokio::test(start_paused = true)]
async fn a_hold_outlives_every_handle() {
    let graceful = graceful();
    let mut phases = graceful.subscribe();
    let hold = graceful.hold("survivor");
    drop(graceful);
    pass(s(60)).await;
    assert!(!phases.is_closed(), "the hold keeps it alive");
    drop(hold);
    let_others_run().await;
    assert!(phases.changed().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_hold_keeps_the_drain_open_after_every_handle_is_dropped() {
    let graceful = without_delay();
    let mut phases = graceful.subscribe();
    let hold = graceful.hold("survivor");
    let begun = Instant::now();
    graceful.shutdown();
    drop(graceful);
    pass(s(4)).await;
    assert_eq!(phases.phase(), Phase::Draining);
    drop(hold);
    let stopped = phases.reached(Phase::Stopped).await;
    assert!(stopped);
    assert_eq!(begun.elapsed(), s(4));
}

#[test]
fn a_hold_may_be_dropped_with_its_runtime() {
    does_not_hang(|| {
        let first = paused_runtime();
        let graceful = without_delay();
        let hold = graceful.hold("task");
        first.block_on(async {
            tokio::spawn(async move {
                let _hold = hold;
                std::future::pending::<()>().await;
            });
            graceful.shutdown();
            let_others_run().await;
            assert_eq!(graceful.in_flight(), 1);
        });
        drop(first);
        assert_eq!(graceful.in_flight(), 0);
        paused_runtime().block_on(graceful.stopped());
    });
}

#[tokio::test(start_paused = true)]
async fn a_hold_dropped_by_a_panic_ends() {
    let graceful = without_delay();
    let hold = graceful.hold("panicking");
    let task = tokio::spawn(async move {
        let _hold = hold;
        pass(s(2)).await;
        std::panic::resume_unwind(Box::new(()));
    });
    let report = stop(&graceful).await;
    assert!(task.await.is_err());
    assert_eq!(report.duration(), s(2));
    assert_eq!(report.outcome(), Outcome::Clean);
}

#[tokio::test(start_paused = true)]
async fn a_server_may_close_after_the_last_hold() {
    let graceful = graceful();
    let hold = graceful.hold("job");
    let run = serve(&graceful, server(&graceful)).await;
    graceful.shutdown();
    pass(s(9)).await;
    assert!(!run.is_finished());
    drop(hold);
    let report = run.await.unwrap();
    assert_eq!(report.duration(), s(9));
    assert_eq!(report.time_in(Phase::Closing), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_drain_without_a_deadline_waits_for_a_hold_up_to_the_cleanup_share() {
    let graceful = tower_graceful::Graceful::builder()
        .drain_delay(Duration::ZERO)
        .build()
        .unwrap();
    let _hold = graceful.hold("endless");
    let report = stop(&graceful).await;
    assert_eq!(report.duration(), END - s(5) + LET_GO);
}

#[tokio::test(start_paused = true)]
async fn a_spawned_job_is_finished_before_the_stop_and_gives_its_output() {
    let graceful = without_delay();
    let job = graceful.spawn("job", async {
        pass(s(3)).await;
        42
    });
    assert_eq!(graceful.in_flight(), 1, "before it is polled");
    let begun = Instant::now();
    graceful.shutdown();
    graceful.stopped().await;
    assert_eq!(begun.elapsed(), s(3));
    assert_eq!(job.await.unwrap(), 42);
}

#[tokio::test(start_paused = true)]
async fn the_hold_of_a_spawned_job_ends_however_the_job_does() {
    let graceful = without_delay();
    let panicking = graceful.spawn("panics", async { std::panic::resume_unwind(Box::new(1)) });
    let aborted = graceful.spawn("aborted", pending::<()>());
    let never_polled = graceful.spawn("never polled", pending::<()>());
    assert_eq!(graceful.in_flight(), 3);
    never_polled.abort();
    let _: Result<(), _> = panicking.await;
    aborted.abort();
    assert!(aborted.await.unwrap_err().is_cancelled());
    assert!(never_polled.await.unwrap_err().is_cancelled());
    assert_eq!(graceful.in_flight(), 0);
}

/// Records how many requests and holds were in flight when it was dropped.
struct InFlightAtDrop(Graceful, Arc<AtomicUsize>);

impl Drop for InFlightAtDrop {
    fn drop(&mut self) {
        self.1.store(self.0.in_flight(), Ordering::Relaxed);
    }
}

#[tokio::test(start_paused = true)]
async fn the_hold_of_a_spawned_job_ends_after_the_future_is_dropped() {
    for polled in [false, true] {
        let graceful = without_delay();
        let seen = Arc::new(AtomicUsize::new(usize::MAX));
        let at_drop = InFlightAtDrop(graceful.clone(), Arc::clone(&seen));
        let job = graceful.spawn("job", async move {
            let _at_drop = at_drop;
            pending::<()>().await;
        });
        if polled {
            let_others_run().await;
        }
        job.abort();
        assert!(job.await.unwrap_err().is_cancelled());
        assert_eq!(seen.load(Ordering::Relaxed), 1, "polled: {polled}");
        assert_eq!(graceful.in_flight(), 0);
    }
}

#[test]
fn a_job_spawned_outside_a_runtime_panics_and_holds_nothing() {
    let graceful = without_delay();
    let spawning = || drop(graceful.spawn("job", async {}));
    let spawned = std::panic::catch_unwind(std::panic::AssertUnwindSafe(spawning));
    assert!(spawned.is_err());
    assert_eq!(graceful.in_flight(), 0);
}
