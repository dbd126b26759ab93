//! From the end of the last response to the drain's.

use std::{
    future::pending,
    pin::pin,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::Request;
use http_body::Body;
use http_body_util::Full;
use tokio::{runtime, sync::oneshot, time};
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
    // Until everybody waits.
    time::sleep(Duration::from_millis(1)).await;
    graceful.shutdown();
    time::sleep(Duration::from_millis(1)).await;
    assert_eq!(graceful.phase(), Phase::Draining);
    assert_eq!(graceful.in_flight(), 1);
    let mut body = pin!(response.into_body());
    let out = Instant::now();
    let frame = std::future::poll_fn(|cx| body.as_mut().poll_frame(cx)).await;
    assert!(frame.is_some());
    let at = has_resolved.await.expect("a drain that resolves");
    at.duration_since(out)
}
