//! `drain_on`, `draining` and `stopped`.

use std::{
    future::{pending, ready},
    time::Duration,
};

use tokio::{
    sync::oneshot,
    task::JoinSet,
    time::{Instant, sleep},
};
use tokio_test::{assert_pending, assert_ready, task};
use tower_graceful::{Drain, Phase, PhaseReached, Trigger};

use crate::support::{
    DEADLINE, DELAY, graceful, let_others_run, ms, pass, plan, request, s, server, watched,
    without_delay,
};

#[tokio::test(start_paused = true)]
async fn the_future_given_to_drain_on_starts_the_timeline_when_it_resolves() {
    let graceful = graceful();
    let (stop, asked) = oneshot::channel::<()>();
    let mut drain = task::spawn(graceful.drain_on(async {
        let _ = asked.await;
    }));
    assert_pending!(drain.poll());
    assert_eq!(graceful.phase(), Phase::Serving);
    stop.send(()).unwrap();
    assert!(drain.is_woken());
    assert_pending!(drain.poll());
    assert_eq!(graceful.phase(), Phase::LameDuck);
    let begun = Instant::now();
    drain.await;
    assert_eq!(begun.elapsed(), DELAY);
    let report = graceful.run(pending::<()>()).await;
    assert_eq!(report.trigger(), Trigger::Future);
}

#[tokio::test(start_paused = true)]
async fn the_future_given_to_drain_on_is_not_polled_before_the_drain_is() {
    let graceful = graceful();
    let (cause, log) = watched(ready(()));
    let drain = graceful.drain_on(cause);
    pass(s(60)).await;
    assert!(!log.polled());
    assert_eq!(graceful.phase(), Phase::Serving);
    drop(drain);
}

#[tokio::test(start_paused = true)]
async fn drain_on_resolves_when_the_last_request_ends() {
    let graceful = graceful();
    let held = request(&graceful);
    let begun = Instant::now();
    let drain = tokio::spawn(graceful.drain_on(ready(())));
    pass(s(8)).await;
    assert_eq!(graceful.phase(), Phase::Draining);
    assert!(!drain.is_finished());
    drop(held);
    drain.await.unwrap();
    assert_eq!(begun.elapsed(), s(8));
}

#[tokio::test(start_paused = true)]
async fn drain_on_resolves_at_the_end_of_the_delay_when_idle() {
    let graceful = graceful();
    let begun = Instant::now();
    graceful.drain_on(ready(())).await;
    assert_eq!(begun.elapsed(), DELAY);
}

#[tokio::test(start_paused = true)]
async fn drain_on_resolves_at_the_drain_deadline_at_the_latest() {
    let graceful = graceful();
    let _held = request(&graceful);
    let begun = Instant::now();
    graceful.drain_on(ready(())).await;
    assert_eq!(begun.elapsed(), DEADLINE);
}

#[tokio::test(start_paused = true)]
async fn without_keep_listening_drain_on_resolves_when_draining_starts() {
    let graceful = plan().keep_listening(false).build().unwrap();
    let held = request(&graceful);
    let begun = Instant::now();
    graceful.drain_on(ready(())).await;
    assert_eq!(begun.elapsed(), DELAY);
    assert_eq!(graceful.phase(), Phase::Draining);
    drop(held);
}

#[tokio::test(start_paused = true)]
async fn drain_on_resolves_after_a_shutdown_although_its_own_future_never_does() {
    let graceful = graceful();
    let begun = Instant::now();
    let drain = tokio::spawn(server(&graceful));
    pass(s(1)).await;
    graceful.shutdown();
    drain.await.unwrap();
    assert_eq!(begun.elapsed(), s(1) + DELAY);
}

#[tokio::test(start_paused = true)]
async fn two_drains_on_two_futures_are_stopped_by_the_first_of_them() {
    let graceful = graceful();
    let begun = Instant::now();
    let late = tokio::spawn(graceful.drain_on(sleep(s(7))));
    let never = tokio::spawn(graceful.drain_on(pending()));
    graceful.drain_on(sleep(s(1))).await;
    late.await.unwrap();
    never.await.unwrap();
    assert_eq!(begun.elapsed(), s(1) + DELAY);
}

#[tokio::test(start_paused = true)]
async fn a_future_polled_again_after_it_is_ready_is_ready_again() {
    let graceful = without_delay();
    let mut drain = task::spawn(graceful.drain_on(pending()));
    let mut draining = task::spawn(graceful.draining());
    let mut stopped = task::spawn(graceful.stopped());
    assert_pending!(drain.poll());
    assert_pending!(draining.poll());
    assert_pending!(stopped.poll());
    graceful.shutdown();
    for _ in 0..5 {
        assert_ready!(drain.poll());
        assert_ready!(draining.poll());
        assert_ready!(stopped.poll());
    }
}

#[tokio::test(start_paused = true)]
async fn a_future_whose_cause_was_ready_at_the_first_poll_is_ready_again_too() {
    let graceful = without_delay();
    let mut drain = task::spawn(graceful.drain_on(ready(())));
    for _ in 0..5 {
        assert_ready!(drain.poll());
    }
}

#[tokio::test(start_paused = true)]
async fn futures_are_woken_by_their_own_phase_and_by_no_other() {
    let graceful = graceful();
    let held = request(&graceful);
    let mut draining = task::spawn(graceful.draining());
    let mut drain = task::spawn(server(&graceful));
    let mut stopped = task::spawn(graceful.stopped());
    let connection = graceful.track(());
    assert_pending!(draining.poll());
    assert_pending!(drain.poll());
    assert_pending!(stopped.poll());

    graceful.shutdown();
    assert_pending!(draining.poll());
    assert_pending!(drain.poll());
    assert_pending!(stopped.poll());

    pass(DELAY).await;
    assert!(draining.is_woken());
    assert_ready!(draining.poll());
    assert_pending!(drain.poll());
    assert_pending!(stopped.poll());

    drop(held);
    let_others_run().await;
    assert!(drain.is_woken());
    assert_ready!(drain.poll());
    assert_pending!(stopped.poll());

    drop(connection);
    let_others_run().await;
    assert!(stopped.is_woken());
    assert_ready!(stopped.poll());
}

#[tokio::test(start_paused = true)]
async fn dropped_futures_change_nothing() {
    let graceful = graceful();
    let mut polled = task::spawn(server(&graceful));
    assert_pending!(polled.poll());
    let mut draining = task::spawn(graceful.draining());
    assert_pending!(draining.poll());
    drop(polled);
    drop(draining);
    drop(server(&graceful));
    drop(graceful.stopped());
    pass(s(60)).await;
    assert_eq!(graceful.phase(), Phase::Serving);

    let begun = Instant::now();
    graceful.shutdown();
    let mut during = task::spawn(server(&graceful));
    assert_pending!(during.poll());
    drop(during);
    graceful.stopped().await;
    assert_eq!(begun.elapsed(), DELAY);
}

#[test]
fn the_futures_can_be_sent_anywhere_and_need_no_pinning() {
    fn check<T: Future<Output = ()> + Send + Unpin + 'static>() {}
    fn check_sync<T: Sync>() {}
    check::<PhaseReached>();
    check::<Drain>();
    check_sync::<PhaseReached>();
}

#[tokio::test(start_paused = true)]
async fn many_futures_at_once_all_resolve() {
    let graceful = graceful();
    let mut all = JoinSet::new();
    for _ in 0..100 {
        all.spawn(graceful.draining());
        all.spawn(graceful.stopped());
        all.spawn(server(&graceful));
    }
    let_others_run().await;
    assert!(all.try_join_next().is_none());
    let begun = Instant::now();
    graceful.shutdown();
    let mut joined = 0;
    while let Some(result) = all.join_next().await {
        result.unwrap();
        joined += 1;
    }
    assert_eq!(joined, 300);
    assert_eq!(begun.elapsed(), DELAY);
}

#[tokio::test(start_paused = true)]
async fn draining_made_after_draining_began_resolves_at_once() {
    let graceful = graceful();
    let held = request(&graceful);
    graceful.shutdown();
    pass(DELAY).await;
    assert_ready!(task::spawn(graceful.draining()).poll());
    drop(held);
    graceful.stopped().await;
    assert_ready!(task::spawn(graceful.draining()).poll());
    assert_ready!(task::spawn(graceful.stopped()).poll());
    assert_ready!(task::spawn(server(&graceful)).poll());
}

#[tokio::test(start_paused = true)]
async fn a_future_moved_to_another_task_while_it_waits_wakes_that_task() {
    let graceful = graceful();
    let mut draining = graceful.draining();
    {
        let mut here = task::spawn(&mut draining);
        assert_pending!(here.poll());
    }
    let there = tokio::spawn(draining);
    let_others_run().await;
    graceful.shutdown();
    there.await.unwrap();
    assert!(graceful.phase() >= Phase::Draining);
}

#[tokio::test(start_paused = true)]
async fn the_future_given_to_drain_on_is_dropped_when_it_has_resolved() {
    let graceful = graceful();
    let (cause, log) = watched(ready(()));
    let mut drain = task::spawn(graceful.drain_on(cause));
    assert_pending!(drain.poll());
    assert!(log.polled());
    assert!(log.dropped().is_some());
}

#[tokio::test(start_paused = true)]
async fn the_future_given_to_drain_on_is_dropped_when_the_drain_resolves_without_it() {
    let graceful = graceful();
    let (cause, log) = watched(pending());
    let mut drain = task::spawn(graceful.drain_on(cause));
    assert_pending!(drain.poll());
    graceful.shutdown();
    assert_eq!(log.dropped(), None);
    graceful.stopped().await;
    assert_ready!(drain.poll());
    assert!(log.dropped().is_some(), "while the drain itself lives on");
    assert_ready!(drain.poll());
}

#[tokio::test(start_paused = true)]
async fn stopped_is_later_than_the_drain_by_what_the_connections_take() {
    let graceful = graceful();
    let connection = graceful.track(());
    let begun = Instant::now();
    graceful.drain_on(ready(())).await;
    assert_eq!(begun.elapsed(), DELAY);
    pass(ms(300)).await;
    assert_eq!(graceful.phase(), Phase::Closing);
    drop(connection);
    graceful.stopped().await;
    assert_eq!(begun.elapsed(), DELAY + ms(300));
    assert_eq!(graceful.in_flight() + graceful.connections(), 0);
    assert!(begun.elapsed() > Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_the_future_given_to_drain_on_stops_the_service() {
    let break_down = std::future::poll_fn(|_| panic!("the future panics, as the test wants it to"));
    let graceful = graceful();
    // As in axum, which takes the end of this task for the signal to stop.
    let signal = tokio::spawn(graceful.drain_on(break_down));
    assert!(signal.await.unwrap_err().is_panic());
    assert_eq!(graceful.phase(), Phase::LameDuck);
    graceful.stopped().await;
}
