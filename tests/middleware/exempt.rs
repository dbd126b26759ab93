//! Paths that are never refused.

use axum::{Router, routing};
use bytes::Bytes;
use http::{Response, StatusCode};
use http_body_util::Full;
use tokio_test::assert_ready_ok;
use tower::ServiceExt;
use tower_graceful::Graceful;

use crate::support::{connection, draining, full, get, prompt, start, whole};

async fn status(app: &Router, path: &str) -> u16 {
    let response = app.clone().oneshot(get(path)).await.unwrap();
    response.status().as_u16()
}

fn routes(path: &str) -> Router {
    Router::new().route(path, routing::get(|| async { "figures" }))
}

#[tokio::test]
async fn an_exempt_path_is_served_while_draining_and_above_the_limit() {
    let builder = prompt().exempt("/metrics").exempt("/status");
    for (graceful, _busy) in [draining(builder.clone()), full(builder)] {
        let app = routes("/metrics")
            .merge(routes("/status"))
            .merge(routes("/work"))
            .layer(graceful.layer());
        assert_eq!(status(&app, "/metrics").await, 200);
        assert_eq!(status(&app, "/status").await, 200);
        assert_eq!(status(&app, "/metrics?name=all").await, 200);
        assert!([429, 503].contains(&status(&app, "/work").await));
    }
}

#[tokio::test]
async fn an_exempt_path_is_compared_as_a_whole() {
    let (graceful, _busy) = draining(prompt().exempt("/metrics"));
    let app: Router = Router::new()
        .fallback(|| async { "anything" })
        .layer(graceful.layer());
    assert_eq!(status(&app, "/metrics").await, 200);
    for path in [
        "/metrics/",
        "/metrics/all",
        "/metricsx",
        "/a/metrics",
        "/Metrics",
        "/",
    ] {
        assert_eq!(status(&app, path).await, 503, "{path}");
    }
}

#[cfg(feature = "axum")]
#[tokio::test]
async fn inside_nest_the_stripped_and_the_full_path_may_be_exempt() {
    for (exempt, served) in [("/metrics", 200), ("/admin/metrics", 200), ("/admin", 503)] {
        let (graceful, _busy) = draining(prompt().exempt(exempt));
        let inner = routes("/metrics").layer(graceful.layer());
        let app = Router::new().nest("/admin", inner);
        assert_eq!(status(&app, "/admin/metrics").await, served, "{exempt}");
    }
}

#[tokio::test]
async fn outside_nest_the_full_path_is_exempt() {
    for (exempt, served) in [("/admin/metrics", 200), ("/metrics", 503)] {
        let (graceful, _busy) = draining(prompt().exempt(exempt));
        let app = Router::new()
            .nest("/admin", routes("/metrics"))
            .layer(graceful.layer());
        assert_eq!(status(&app, "/admin/metrics").await, served, "{exempt}");
    }
}

#[test]
fn a_request_let_pass_is_not_counted_and_its_client_is_asked_to_leave() {
    let (graceful, _busy) = draining(prompt().exempt("/"));
    let mut request = start(&graceful, std::future::ready(Ok(figures())));
    assert_eq!(graceful.in_flight(), 1, "the busy one alone");
    let response = assert_ready_ok!(request.poll());
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(connection(&response), ["close"]);
    assert_eq!(graceful.in_flight(), 1);
    drop(response);
    assert_eq!(graceful.in_flight(), 1, "and it releases nobody else");
}

#[test]
fn let_pass_above_the_limit_a_response_is_left_alone() {
    let (graceful, _busy) = full(prompt().exempt("/"));
    let mut request = start(&graceful, std::future::ready(Ok(figures())));
    let response = assert_ready_ok!(request.poll());
    assert!(connection(&response).is_empty());
    assert_eq!(graceful.in_flight(), 1);
}

#[test]
fn where_it_would_be_served_anyway_an_exempt_path_is_counted() {
    let graceful: Graceful = prompt().exempt("/").build().unwrap();
    let mut request = start(&graceful, std::future::ready(Ok(figures())));
    assert_eq!(graceful.in_flight(), 1);
    drop(assert_ready_ok!(request.poll()));
    assert_eq!(graceful.in_flight(), 0);
}

fn figures() -> Response<Full<Bytes>> {
    whole("figures")
}

#[cfg(feature = "axum")]
#[tokio::test]
async fn a_path_under_a_wildcard_does_not_pass_for_a_probe() {
    let (graceful, _busy) = full(prompt());
    let app = routes("/files/{*path}")
        .merge(graceful.probes())
        .layer(graceful.layer());
    assert_eq!(status(&app, "/files/readyz").await, 429);
    assert_eq!(status(&app, "/files/a/livez").await, 429);
    assert_eq!(status(&app, "/readyz").await, 200);
}

#[tokio::test]
async fn without_the_probes_router_no_path_passes_for_a_probe() {
    let (graceful, _busy) = full(prompt());
    let app = routes("/readyz").layer(graceful.layer());
    assert_eq!(status(&app, "/readyz").await, 429);
}
