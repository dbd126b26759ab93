//! `Stop::idle`, the second moment of a `Stop`: nothing is in flight any more.

use std::future::pending;

use tokio::{sync::mpsc, time::Instant};
use tokio_test::{assert_pending, assert_ready, task};
use tower_graceful::{Outcome, Phase, Stop, TaskOutcome};

use super::{Diary, outcomes, report, stop, until};
use crate::support::{
    DEADLINE, DELAY, graceful, let_others_run, ms, pass, plan, request, s, without_delay,
};

#[tokio::test(start_paused = true)]
async fn idle_resolves_after_the_last_request_and_hold() {
    let graceful = graceful();
    let diary = Diary::begin();
    let note = diary.clone();
    let work = |stop: Stop| async move {
        stop.draining().await;
        note.note("draining");
        assert!(stop.is_stopping());
        stop.idle().await;
        note.note("idle");
        pass(s(1)).await;
        note.note("done");
    };
    graceful.worker("worker", work).unwrap();
    let note = diary.clone();
    graceful
        .cleanup("step", s(1), async move { note.note("step") })
        .unwrap();
    let (request, hold) = (request(&graceful), graceful.hold("hold"));
    graceful.shutdown();
    until(&diary, s(6)).await;
    drop(request);
    until(&diary, s(7)).await;
    drop(hold);
    let report = report(&graceful).await;
    diary.assert(&[
        ("draining", DELAY),
        ("idle", s(7)),
        ("done", s(8)),
        ("step", s(8)),
    ]);
    assert_eq!(report.outcome(), Outcome::Clean);
}

#[tokio::test(start_paused = true)]
async fn a_forced_cut_counts_as_the_second_moment() {
    let graceful = without_delay();
    let diary = Diary::begin();
    let note = diary.clone();
    let work = |stop: Stop| async move {
        stop.idle().await;
        note.note("idle");
    };
    graceful.worker("worker", work).unwrap();
    let _held = request(&graceful);
    let report = stop(&graceful).await;
    diary.assert(&[("idle", DEADLINE - DELAY)]);
    assert_eq!(report.outcome(), Outcome::Forced);
    assert_eq!(
        outcomes(&report),
        [TaskOutcome::Done],
        "before workers are joined"
    );
}

#[tokio::test(start_paused = true)]
async fn both_moments_are_cancel_safe_and_stay_ready() {
    let graceful = graceful();
    let (give, given) = tokio::sync::oneshot::channel();
    let work = |stop: Stop| async move {
        let _ = give.send(stop.clone());
        stop.idle().await;
    };
    graceful.worker("worker", work).unwrap();
    let stop = given.await.unwrap();
    let held = request(&graceful);
    for _ in 0..3 {
        assert_pending!(task::spawn(stop.draining()).poll());
        assert_pending!(task::spawn(stop.idle()).poll());
    }
    graceful.shutdown();
    pass(DELAY).await;
    let mut idle = task::spawn(stop.idle());
    assert_ready!(task::spawn(stop.draining()).poll());
    assert_pending!(idle.poll());
    assert_pending!(task::spawn(stop.clone().idle()).poll());
    drop(held);
    let_others_run().await;
    assert!(idle.is_woken());
    for _ in 0..2 {
        assert_ready!(idle.poll());
        assert_ready!(task::spawn(stop.idle()).poll(), "never polled before");
    }
    pass(s(60)).await;
    assert_eq!(graceful.phase(), Phase::Stopped);
    assert_ready!(task::spawn(stop.idle()).poll());
    assert_ready!(task::spawn(stop.draining()).poll());
}

#[tokio::test(start_paused = true)]
async fn the_worker_timeout_begins_at_the_second_moment() {
    let builder = plan().worker_timeout(s(2));
    let graceful = builder.build().unwrap();
    let work = |stop: Stop| async move {
        stop.idle().await;
        pending::<()>().await;
    };
    graceful.worker("worker", work).unwrap();
    let held = request(&graceful);
    let begun = Instant::now();
    graceful.shutdown();
    pass(s(9)).await;
    drop(held);
    let report = report(&graceful).await;
    assert_eq!(begun.elapsed(), s(11));
    assert_eq!(outcomes(&report), [TaskOutcome::Cut]);
}

#[tokio::test(start_paused = true)]
async fn a_queue_that_requests_fill_to_the_end_is_drained() {
    for jobs in [0, 1, 50] {
        let graceful = graceful();
        let (sender, mut queue) = mpsc::channel(1000);
        let (done, mut finished) = mpsc::unbounded_channel();
        let work = |stop: Stop| async move {
            let mut idle = stop.idle();
            loop {
                tokio::select! {
                    () = &mut idle => break,
                    Some(job) = queue.recv() => { pass(ms(10)).await; done.send(job).unwrap(); }
                }
            }
            queue.close();
            while let Some(job) = queue.recv().await {
                pass(ms(10)).await;
                done.send(job).unwrap();
            }
        };
        graceful.worker("jobs", work).unwrap();
        let held = request(&graceful);
        graceful.shutdown();
        pass(DELAY + s(1)).await;
        for job in 0..jobs {
            sender.send(job).await.unwrap();
        }
        drop(held);
        let report = report(&graceful).await;
        assert_eq!(report.outcome(), Outcome::Clean);
        for job in 0..jobs {
            assert_eq!(finished.recv().await, Some(job));
        }
        assert_eq!(finished.recv().await, None);
        assert!(sender.send(0).await.is_err(), "it is closed");
    }
}
