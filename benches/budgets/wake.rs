//! The time from the end of the last response until the drain resolves, and the time to notify ten
//! thousand tasks.

use std::{
    future::pending,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::Request;
use http_body::Body;
use http_body_util::Full;
use tokio::{runtime, sync::oneshot, task::JoinSet, time};
use tokio_util::sync::CancellationToken;
use tower::{Layer, Service};
use tower_graceful::{Graceful, Phase};

use super::{
    figures::Figures,
    peers::Handler,
    rows::{Budget, Rows},
};

const TIMES: usize = 2_000;

pub(crate) fn measure(rows: &mut Rows) {
    for (row, workers) in [("wake, 2 workers", 2), ("wake, 1 worker", 1)] {
        let runtime = runtime::Builder::new_multi_thread()
            .worker_threads(workers)
            .enable_all()
            .build()
            .expect("a runtime");
        let times = runtime.block_on(async {
            let mut times = Vec::new();
            for _ in 0..TIMES {
                let time = tokio::spawn(once()).await.expect("a time");
                times.push(time.as_secs_f64() * 1e6);
            }
            Figures::new(times)
        });
        let [p50, p99] = [50, 99].map(|percent| times.percentile(percent));
        let ours = format!("{p50:.0} µs, p99 {p99:.0} µs");
        rows.add(row, &ours, "p99 1000 µs", p99 / 1e3, Budget::AtMost(1.0));
    }
}

/// The time until the last of ten thousand tasks runs, after draining has started or a token was
/// cancelled.
pub(crate) fn measure_notify(rows: &mut Rows) {
    let runtime = runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let (mut ours, mut tokens) = (Vec::new(), Vec::new());
    for _ in 0..21 {
        let builder = Graceful::builder().drain_delay(Duration::ZERO);
        let graceful = builder.build().expect("a plan that fits");
        let hold = graceful.hold("until all tasks are notified");
        let time = notify(|| graceful.draining(), || graceful.shutdown());
        ours.push(runtime.block_on(time));
        drop(hold);
        let token = CancellationToken::new();
        let time = notify(|| token.clone().cancelled_owned(), || token.cancel());
        tokens.push(runtime.block_on(time));
    }
    let [ours, tokens] = [ours, tokens].map(|times| Figures::new(times).percentile(50));
    let [notified, cancelled] = [ours, tokens].map(|time| format!("{time:.1} ms"));
    rows.add(
        "notify 10,000 tasks, beside CancellationToken",
        &notified,
        &cancelled,
        ours / tokens,
        Budget::None,
    );
}

async fn notify<F>(wait: impl Fn() -> F, notify: impl FnOnce()) -> f64
where
    F: Future<Output = ()> + Send + 'static,
{
    let mut tasks = JoinSet::new();
    for _ in 0..10_000 {
        let wait = wait();
        tasks.spawn(async move {
            wait.await;
            Instant::now()
        });
    }
    // Gives all tasks time to begin waiting.
    time::sleep(Duration::from_millis(50)).await;
    let begun = Instant::now();
    notify();
    let last = tasks.join_all().await.into_iter().max();
    last.map_or(0.0, |last| (last - begun).as_secs_f64() * 1e3)
}

async fn once() -> Duration {
    let builder = Graceful::builder().drain_delay(Duration::ZERO);
    let graceful = builder.build().expect("a plan that fits");
    let mut service = graceful.layer().layer(Handler);
    let response = service.call(Request::new(Full::<Bytes>::default())).await;
    let Ok(response) = response;
    let (resolved, has_resolved) = oneshot::channel();
    let drain = graceful.drain_on(pending());
    tokio::spawn(async move {
        drain.await;
        let _ = resolved.send(Instant::now());
    });
    // Gives the task time to begin waiting.
    time::sleep(Duration::from_millis(1)).await;
    graceful.shutdown();
    time::sleep(Duration::from_millis(1)).await;
    assert_eq!(graceful.phase(), Phase::Draining);
    assert_eq!(graceful.in_flight(), 1);
    let mut body = Box::pin(response.into_body());
    let frame = std::future::poll_fn(|cx| body.as_mut().poll_frame(cx)).await;
    assert!(frame.is_some());
    // The service is stopping, so the request stays in flight until the server has sent the frame.
    assert_eq!(graceful.in_flight(), 1);
    let out = Instant::now();
    drop((frame, body));
    let at = has_resolved.await.expect("a drain that resolves");
    at.duration_since(out)
}
