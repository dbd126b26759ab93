//! The test of `docs/testing.md`, as it is printed there.

use axum::{Router, body::Body, routing::get};
use http::{Request, StatusCode};
use std::time::Duration;
use tower::ServiceExt;
use tower_graceful::{Graceful, Outcome, Phase};

async fn slow() -> &'static str {
    tokio::time::sleep(Duration::from_secs(10)).await;
    "done"
}

fn app(graceful: &Graceful) -> Router {
    Router::new()
        .route("/slow", get(slow))
        .layer(graceful.layer())
        .merge(graceful.probes())
}

fn request(path: &str) -> Request<Body> {
    Request::get(path).body(Body::empty()).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_slow_request_completes_and_a_late_one_is_refused() {
    let graceful = Graceful::new();
    let app = app(&graceful);
    // A server that ends when the drain says so, in place of a real one.
    let server = tokio::spawn(graceful.run(graceful.drain_on(std::future::pending())));

    let in_flight = tokio::spawn(app.clone().oneshot(request("/slow")));
    while graceful.in_flight() == 0 {
        tokio::task::yield_now().await;
    }
    graceful.shutdown();
    let ready = app.clone().oneshot(request("/readyz")).await.unwrap();
    assert_eq!(ready.status(), StatusCode::SERVICE_UNAVAILABLE);

    graceful.draining().await; // five seconds later
    let late = app.clone().oneshot(request("/slow")).await.unwrap();
    assert_eq!(late.status(), StatusCode::SERVICE_UNAVAILABLE);

    let response = in_flight.await.unwrap().unwrap(); // another five seconds later
    assert_eq!(response.status(), StatusCode::OK);
    drop(response); // its body ends here

    let report = server.await.unwrap();
    assert_eq!(report.outcome(), Outcome::Clean);
    assert_eq!(report.requests().finished + report.requests().dropped, 1);
    assert_eq!(report.requests().refused, 1);
    assert!(report.time_in(Phase::Draining) >= Duration::from_secs(5));
}

/// The page prints the program of this file.
#[test]
fn the_page_prints_this_test() {
    let (page, file) = (include_str!("../docs/testing.md"), include_str!("guide.rs"));
    let printed = page.split("```rust,ignore\n").nth(1).unwrap();
    let printed = printed.split("```").next().unwrap();
    assert!(file.contains(printed.trim()), "{printed}");
}
