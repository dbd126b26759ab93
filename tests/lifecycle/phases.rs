//! The phases: their order, what starts them and what ends each.

use std::{
    future::pending,
    sync::{Arc, Barrier},
    thread,
    time::Duration,
};

use tokio::{io::duplex, time::Instant};
use tokio_test::{assert_pending, assert_ready, task};
use tower_graceful::{Graceful, Outcome, Phase, Trigger};

use crate::support::{
    DEADLINE, DELAY, LET_GO, graceful, let_others_run, ms, pass, paused_runtime, quick_request,
    request, s, serve, server, watched, without_delay,
};

#[tokio::test(start_paused = true)]
async fn a_subscriber_sees_every_phase_in_order_and_on_time() {
    let graceful = graceful();
    let request = request(&graceful);
    let (io, _peer) = duplex(64);
    let connection = graceful.track(io);
    let mut phases = graceful.subscribe();
    let begun = Instant::now();
    let seen = tokio::spawn(async move {
        let mut seen = vec![(phases.phase(), begun.elapsed())];
        while let Some(phase) = phases.changed().await {
            seen.push((phase, begun.elapsed()));
            if phase == Phase::Stopped {
                break;
            }
        }
        seen
    });
    let_others_run().await;

    pass(s(1)).await;
    graceful.shutdown();
    pass(begun + s(8) - Instant::now()).await;
    drop(request);
    pass(begun + s(9) - Instant::now()).await;
    drop(connection);

    let expected = [
        (Phase::Serving, Duration::ZERO),
        (Phase::LameDuck, s(1)),
        (Phase::Draining, s(6)),
        (Phase::Closing, s(8)),
        (Phase::Stopped, s(9)),
    ];
    assert_eq!(seen.await.unwrap(), expected);
}

#[tokio::test(start_paused = true)]
async fn nothing_happens_before_a_trigger() {
    let graceful = graceful();
    let mut stopped = task::spawn(graceful.stopped());
    assert_pending!(stopped.poll());
    pass(s(24 * 60 * 60)).await;
    assert_eq!(graceful.phase(), Phase::Serving);
    assert!(graceful.is_ready());
    assert!(!stopped.is_woken());
}

#[tokio::test(start_paused = true)]
async fn shutdown_takes_effect_before_it_returns() {
    let graceful = graceful();
    let mut phases = graceful.subscribe();
    assert_eq!(graceful.snapshot().time_left, None);
    graceful.shutdown();
    assert_eq!(graceful.phase(), Phase::LameDuck);
    assert!(!graceful.is_ready());
    let snapshot = graceful.snapshot();
    assert_eq!(snapshot.phase, Phase::LameDuck);
    assert!(!snapshot.ready);
    assert_eq!(snapshot.time_left, Some(DELAY));
    assert_eq!(phases.phase(), Phase::LameDuck);
    assert_eq!(phases.changed().await, Some(Phase::LameDuck));
}

#[tokio::test(start_paused = true)]
async fn readiness_cannot_be_set_back_once_a_stop_was_asked_for() {
    let graceful = graceful();
    graceful.set_ready(false);
    assert!(!graceful.is_ready());
    graceful.set_ready(true);
    assert!(graceful.is_ready());
    graceful.shutdown();
    graceful.set_ready(true);
    assert!(!graceful.is_ready());
    assert!(!graceful.snapshot().ready);
    assert_eq!(graceful.phase(), Phase::LameDuck);
}

#[tokio::test(start_paused = true)]
async fn a_delay_of_zero_drains_before_shutdown_returns() {
    let graceful = without_delay();
    let held = request(&graceful);
    let mut draining = task::spawn(graceful.draining());
    assert_pending!(draining.poll());
    graceful.shutdown();
    assert_eq!(graceful.phase(), Phase::Draining);
    assert!(draining.is_woken());
    assert_ready!(draining.poll());
    assert_eq!(quick_request(&graceful).await, 503);
    drop(held);
}

#[tokio::test(start_paused = true)]
async fn a_delay_of_zero_and_nothing_in_flight_is_stopped_before_shutdown_returns() {
    let graceful = without_delay();
    graceful.shutdown();
    assert_eq!(graceful.phase(), Phase::Stopped);
}

#[tokio::test(start_paused = true)]
async fn requests_are_served_during_the_delay_and_refused_after_it() {
    let graceful = graceful();
    graceful.shutdown();
    pass(DELAY - ms(1)).await;
    assert_eq!(quick_request(&graceful).await, 200);
    let held = request(&graceful);
    assert_eq!(graceful.in_flight(), 1);
    pass(ms(1)).await;
    assert_eq!(graceful.phase(), Phase::Draining);
    assert_eq!(quick_request(&graceful).await, 503);
    assert_eq!(graceful.in_flight(), 1);
    drop(held);
}

#[tokio::test(start_paused = true)]
async fn an_idle_service_stops_at_the_end_of_the_delay_and_not_at_the_deadline() {
    let graceful = graceful();
    let begun = Instant::now();
    graceful.shutdown();
    graceful.stopped().await;
    assert_eq!(begun.elapsed(), DELAY);
    assert_eq!(graceful.phase(), Phase::Stopped);
}

#[tokio::test(start_paused = true)]
async fn a_request_in_flight_holds_the_drain_and_its_end_ends_it_at_once() {
    let graceful = graceful();
    let held = request(&graceful);
    let begun = Instant::now();
    graceful.shutdown();
    let mut stopped = task::spawn(graceful.stopped());
    assert_pending!(stopped.poll());

    pass(DEADLINE - ms(1)).await;
    assert_eq!(graceful.phase(), Phase::Draining);
    assert_pending!(stopped.poll());

    drop(held);
    stopped.await;
    assert_eq!(begun.elapsed(), DEADLINE - ms(1));
}

#[tokio::test(start_paused = true)]
async fn the_drain_waits_for_the_last_of_many_requests() {
    let graceful = graceful();
    let begun = Instant::now();
    for seconds in 1..=9 {
        let held = request(&graceful);
        tokio::spawn(async move {
            pass(s(seconds)).await;
            drop(held);
        });
    }
    graceful.shutdown();
    graceful.stopped().await;
    assert_eq!(begun.elapsed(), s(9));
    assert_eq!(graceful.in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_ends_during_the_delay_does_not_shorten_it() {
    let graceful = graceful();
    let held = request(&graceful);
    let begun = Instant::now();
    graceful.shutdown();
    pass(s(1)).await;
    drop(held);
    graceful.stopped().await;
    assert_eq!(begun.elapsed(), DELAY);
}

#[tokio::test(start_paused = true)]
async fn the_deadline_ends_a_drain_that_does_not_end_by_itself() {
    let graceful = graceful();
    let _held = [request(&graceful), request(&graceful)];
    let begun = Instant::now();
    graceful.shutdown();
    let mut phases = graceful.subscribe();
    assert!(phases.reached(Phase::Closing).await);
    assert_eq!(begun.elapsed(), DEADLINE);

    let report = graceful.run(server(&graceful)).await;
    assert_eq!(begun.elapsed(), DEADLINE + LET_GO);
    assert_eq!(report.outcome(), Outcome::Forced);
    assert_eq!(report.exit_code(), 1);
    assert_eq!(report.remaining().requests, 2);
    assert_eq!(report.remaining().connections, 0);
    assert_eq!(report.remaining().servers, 0);
    assert_eq!(report.time_in(Phase::Draining), DEADLINE - DELAY);
}

#[tokio::test(start_paused = true)]
async fn work_that_ends_after_the_cut_ends_the_wait_at_once_and_the_outcome_is_forced() {
    let graceful = graceful();
    let held = request(&graceful);
    let begun = Instant::now();
    graceful.shutdown();
    pass(DEADLINE + ms(100)).await;
    assert_eq!(graceful.phase(), Phase::Closing);
    drop(held);
    graceful.stopped().await;
    assert_eq!(begun.elapsed(), DEADLINE + ms(100));
    let report = graceful.run(server(&graceful)).await;
    assert_eq!(report.outcome(), Outcome::Forced);
    assert_eq!(report.remaining().requests, 1);
    assert_eq!(report.time_in(Phase::Closing), ms(100));
}

#[tokio::test(start_paused = true)]
async fn the_snapshot_counts_the_present_phase_down() {
    let graceful = graceful();
    let held = request(&graceful);
    let (io, _peer) = duplex(64);
    let connection = graceful.track(io);
    assert_eq!(graceful.snapshot().time_left, None);
    graceful.shutdown();
    pass(s(3)).await;
    assert_eq!(graceful.snapshot().time_left, Some(s(2)));
    pass(s(3)).await;
    let snapshot = graceful.snapshot();
    assert_eq!(snapshot.phase, Phase::Draining);
    assert_eq!(snapshot.time_left, Some(s(9)));
    assert_eq!((snapshot.in_flight, snapshot.connections), (1, 1));
    drop(held);
    pass(s(1)).await;
    let snapshot = graceful.snapshot();
    assert_eq!(snapshot.phase, Phase::Closing);
    assert_eq!(snapshot.time_left, Some(s(8)));
    assert_eq!((snapshot.in_flight, snapshot.connections), (0, 1));
    drop(connection);
    graceful.stopped().await;
    assert_eq!(graceful.snapshot().time_left, None);
}

#[tokio::test(start_paused = true)]
async fn the_snapshot_of_closing_says_when_the_cut_comes() {
    let graceful = graceful();
    let held = request(&graceful);
    let (io, _peer) = duplex(64);
    let _connection = graceful.track(io);
    let begun = Instant::now();
    graceful.shutdown();
    pass(DEADLINE - ms(50)).await;
    drop(held);
    let_others_run().await;
    assert_eq!(graceful.phase(), Phase::Closing);
    let left = graceful.snapshot().time_left.unwrap();
    graceful.stopped().await;
    assert_eq!(begun.elapsed(), DEADLINE - ms(50) + left + LET_GO);
}

#[tokio::test(start_paused = true)]
async fn a_further_shutdown_neither_skips_nor_prolongs_any_phase() {
    let graceful = graceful();
    let _held = request(&graceful);
    let run = serve(&graceful, server(&graceful)).await;
    let (again, begun) = (graceful.clone(), Instant::now());
    graceful.shutdown();
    let calls = tokio::spawn(async move {
        let mut calls = 0;
        while again.phase() < Phase::Stopped {
            pass(ms(100)).await;
            again.shutdown();
            calls += 1;
        }
        calls
    });
    let report = run.await.unwrap();
    assert_eq!(begun.elapsed(), DEADLINE + LET_GO);
    assert_eq!(report.time_in(Phase::LameDuck), DELAY);
    assert_eq!(report.time_in(Phase::Draining), DEADLINE - DELAY);
    assert_eq!(report.time_in(Phase::Closing), LET_GO);
    assert!(calls.await.unwrap() > 150);
}

#[test]
fn threads_that_call_shutdown_at_once_are_one_trigger() {
    for _ in 0..100 {
        let graceful = without_delay();
        let phases = graceful.subscribe();
        let held = request(&graceful);
        let barrier = Arc::new(Barrier::new(8));
        let threads: Vec<_> = (0..8)
            .map(|_| {
                let (graceful, barrier) = (graceful.clone(), Arc::clone(&barrier));
                thread::spawn(move || {
                    barrier.wait();
                    graceful.shutdown();
                    graceful.phase()
                })
            })
            .collect();
        for thread in threads {
            assert_eq!(thread.join().unwrap(), Phase::Draining);
        }
        assert_eq!(phases.phase(), Phase::Draining);
        let runtime = paused_runtime();
        drop(held);
        let report = runtime.block_on(async { graceful.run(server(&graceful)).await });
        assert_eq!(report.outcome(), Outcome::Clean);
        assert_eq!(report.trigger(), Trigger::Shutdown);
    }
}

#[test]
fn tasks_on_many_workers_and_threads_that_call_shutdown_at_once_are_one_trigger() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(4)
        .enable_time()
        .build()
        .unwrap();
    let report = runtime.block_on(async {
        let graceful = without_delay();
        let run = tokio::spawn(graceful.run(server(&graceful)));
        let tasks: Vec<_> = (0..50)
            .map(|_| {
                let graceful = graceful.clone();
                tokio::spawn(async move { graceful.shutdown() })
            })
            .collect();
        let threads: Vec<_> = (0..8)
            .map(|_| {
                let graceful = graceful.clone();
                thread::spawn(move || graceful.shutdown())
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        for task in tasks {
            task.await.unwrap();
        }
        run.await.unwrap()
    });
    assert_eq!(report.trigger(), Trigger::Shutdown);
    assert_eq!(report.outcome(), Outcome::Clean);
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_before_serving_begins_is_not_followed_by_serving() {
    let graceful = graceful();
    graceful.shutdown();
    pass(s(2)).await;
    let begun = Instant::now();
    let (server, log) = watched(pending::<()>());
    let report = graceful.run(server).await;
    assert!(!log.polled());
    assert_eq!(
        begun.elapsed(),
        Duration::ZERO,
        "there is no traffic to wait for"
    );
    assert_eq!(report.outcome(), Outcome::Clean);
    assert_eq!(report.trigger(), Trigger::Shutdown);
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_from_a_plain_thread_wakes_the_runtime_and_keeps_the_timetable() {
    let graceful = graceful();
    let run = serve(&graceful, server(&graceful)).await;
    let other = graceful.clone();
    let thread = thread::spawn(move || {
        assert!(tokio::runtime::Handle::try_current().is_err());
        other.shutdown();
        other.phase()
    });
    assert_eq!(thread.join().unwrap(), Phase::LameDuck);
    let report = run.await.unwrap();
    assert_eq!(report.outcome(), Outcome::Clean);
    // A plain thread reads the real clock, which is slightly ahead of the paused one, and timers
    // fire on whole milliseconds.
    let delay = report.time_in(Phase::LameDuck);
    assert!(delay >= DELAY && delay <= DELAY + ms(2), "{delay:?}");
}

#[test]
fn a_shutdown_before_any_runtime_exists_completes_in_the_one_it_is_used_in() {
    let graceful = graceful();
    graceful.shutdown();
    assert_eq!(graceful.phase(), Phase::LameDuck);
    paused_runtime().block_on(async {
        server(&graceful).await;
        let report = graceful.run(pending::<()>()).await;
        assert_eq!(report.outcome(), Outcome::Clean);
        assert!(report.time_in(Phase::LameDuck) >= DELAY);
        assert_eq!(report.time_in(Phase::Draining), Duration::ZERO);
    });
}

#[test]
fn a_shutdown_before_any_runtime_exists_is_driven_by_stopped_alone() {
    let graceful = graceful();
    graceful.shutdown();
    paused_runtime().block_on(graceful.stopped());
    assert_eq!(graceful.phase(), Phase::Stopped);
}

#[tokio::test(start_paused = true)]
async fn the_default_plan_gives_five_seconds_of_delay_and_nineteen_of_drain() {
    let graceful = Graceful::new();
    let _held = request(&graceful);
    let run = serve(&graceful, server(&graceful)).await;
    graceful.shutdown();
    let report = run.await.unwrap();
    assert_eq!(report.time_in(Phase::LameDuck), s(5));
    assert_eq!(report.time_in(Phase::Draining), s(19));
}

#[tokio::test(start_paused = true)]
async fn a_service_that_is_built_and_dropped_leaves_no_task_behind() {
    let tasks = || {
        tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks()
    };
    let before = tasks();
    let unused = graceful();
    let used = graceful();
    let_others_run().await;
    assert!(tasks() > before, "the drivers run");
    used.shutdown();
    used.stopped().await;
    let_others_run().await;
    drop(unused);
    let_others_run().await;
    assert_eq!(tasks(), before);
    drop(used);
}
