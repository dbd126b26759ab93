//! The responses of the probes, and that probes are never refused.

use axum::{Router, body::Body, routing};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, Version};
use http_body::Body as _;
use http_body_util::Empty;
use tower::{ServiceBuilder, ServiceExt};
use tower_graceful::{Graceful, Phase};
use tower_http::trace::TraceLayer;

use crate::support::{connection, draining, full, get, hold, lame_duck, prompt, text};

async fn send(app: &Router, method: Method, path: &str) -> Response<Body> {
    let request = Request::builder().method(method).uri(path);
    let request = request.body(Empty::<Bytes>::new()).unwrap();
    app.clone().oneshot(request).await.unwrap()
}

async fn ask(app: &Router, path: &str) -> (u16, String) {
    let response = send(app, Method::GET, path).await;
    let status = response.status().as_u16();
    (status, text(response.into_body()).await)
}

fn said(status: u16, text: &str) -> (u16, String) {
    (status, format!("{text}\n"))
}

#[tokio::test(start_paused = true)]
async fn readiness_fails_from_the_first_moment_and_liveness_succeeds_to_the_last() {
    let graceful = Graceful::new();
    let app = graceful.probes();
    let busy = hold(&graceful);
    let mut phases = graceful.subscribe();
    assert_eq!(ask(&app, "/readyz").await, said(200, "serving"));
    assert_eq!(ask(&app, "/livez").await, said(200, "serving"));

    graceful.shutdown();
    assert_eq!(ask(&app, "/readyz").await, said(503, "lame duck"));
    assert_eq!(ask(&app, "/livez").await, said(200, "lame duck"));

    assert!(phases.reached(Phase::Draining).await);
    assert_eq!(ask(&app, "/readyz").await, said(503, "draining"));
    assert_eq!(ask(&app, "/livez").await, said(200, "draining"));

    drop(busy);
    graceful.stopped().await;
    assert_eq!(ask(&app, "/readyz").await, said(503, "stopped"));
    assert_eq!(ask(&app, "/livez").await, said(200, "stopped"));
}

#[tokio::test]
async fn set_ready_is_about_readiness_and_can_be_taken_back() {
    let graceful = Graceful::new();
    let app = graceful.probes();
    graceful.set_ready(false);
    assert_eq!(ask(&app, "/readyz").await, said(503, "not ready"));
    assert_eq!(ask(&app, "/livez").await, said(200, "serving"));
    graceful.set_ready(true);
    assert_eq!(ask(&app, "/readyz").await, said(200, "serving"));

    graceful.shutdown();
    graceful.set_ready(true);
    assert_eq!(ask(&app, "/readyz").await, said(503, "lame duck"));
}

#[tokio::test]
async fn every_method_but_three_is_not_allowed() {
    for (graceful, ready) in [(Graceful::new(), 200), (lame_duck(), 503)] {
        let app = graceful.probes();
        for (path, expected) in [("/readyz", ready), ("/livez", 200)] {
            for method in [Method::GET, Method::HEAD, Method::OPTIONS] {
                let response = send(&app, method.clone(), path).await;
                assert_eq!(response.status().as_u16(), expected, "{method} {path}");
            }
            for method in [Method::POST, Method::PUT, Method::DELETE] {
                let response = send(&app, method, path).await;
                assert_eq!(response.status(), StatusCode::METHOD_NOT_ALLOWED);
                assert_eq!(response.headers()["allow"], "GET, HEAD, OPTIONS");
                assert_eq!(response.headers()["cache-control"], "no-store");
            }
        }
    }
}

#[tokio::test]
async fn head_is_answered_as_get_without_the_body() {
    let app = Graceful::new().probes();
    let mut head = send(&app, Method::HEAD, "/readyz").await;
    let mut get = send(&app, Method::GET, "/readyz").await;
    assert_eq!(get.headers()["content-length"], "8");
    assert_eq!(head.headers_mut(), get.headers_mut());
    assert!(head.body().is_end_stream());
    assert_eq!(text(head.into_body()).await, "");
}

#[tokio::test]
async fn no_answer_may_be_cached() {
    for graceful in [Graceful::new(), lame_duck()] {
        let app = graceful.probes();
        for path in ["/readyz", "/livez"] {
            for method in [Method::GET, Method::HEAD, Method::OPTIONS] {
                let response = send(&app, method, path).await;
                assert_eq!(response.headers()["cache-control"], "no-store");
            }
        }
    }
}

#[tokio::test]
async fn haproxy_asks_with_options_over_http10() {
    let app = lame_duck().probes();
    let mut request = get("/readyz");
    *request.method_mut() = Method::OPTIONS;
    *request.version_mut() = Version::HTTP_10;
    let response = app.oneshot(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(connection(&response), ["close"]);
}

#[tokio::test]
async fn a_stopping_probe_closes_http1_connections_and_no_others() {
    for (version, expected) in [(Version::HTTP_11, vec!["close"]), (Version::HTTP_2, vec![])] {
        for path in ["/readyz", "/livez"] {
            let mut request = get(path);
            *request.version_mut() = version;
            let response = lame_duck().probes().oneshot(request).await.unwrap();
            assert_eq!(connection(&response), expected);
        }
    }
    let response = send(&Graceful::new().probes(), Method::GET, "/readyz").await;
    assert!(connection(&response).is_empty(), "while serving");
}

#[tokio::test]
async fn unready_status_does_not_apply_to_liveness() {
    let graceful = prompt()
        .unready_status(StatusCode::NOT_FOUND)
        .build()
        .unwrap();
    let app = graceful.probes();
    assert_eq!(ask(&app, "/readyz").await, said(200, "serving"));
    graceful.set_ready(false);
    assert_eq!(ask(&app, "/readyz").await, said(404, "not ready"));
    assert_eq!(ask(&app, "/livez").await, said(200, "serving"));
}

#[tokio::test]
async fn an_unready_204_has_no_body_and_no_length() {
    let graceful = prompt()
        .unready_status(StatusCode::NO_CONTENT)
        .build()
        .unwrap();
    graceful.set_ready(false);
    let response = graceful.readiness().oneshot(get("/")).await.unwrap();
    assert_eq!(response.status(), StatusCode::NO_CONTENT);
    assert!(!response.headers().contains_key("content-length"));
    assert!(!response.headers().contains_key("content-type"));
    assert!(response.body().is_end_stream());
    assert_eq!(text(response.into_body()).await, "");
}

#[tokio::test]
async fn an_unready_204_has_no_length_in_axum_either() {
    let graceful = prompt()
        .unready_status(StatusCode::NO_CONTENT)
        .build()
        .unwrap();
    graceful.set_ready(false);
    let response = send(&graceful.probes(), Method::GET, "/readyz").await;
    assert_eq!(response.status(), StatusCode::NO_CONTENT);
    assert!(!response.headers().contains_key("content-length"));
}

#[tokio::test]
async fn wherever_they_are_mounted_probes_are_not_refused() {
    for (graceful, _busy) in [draining(prompt()), full(prompt())] {
        let (layer, probes) = (graceful.layer(), graceful.probes::<()>());
        let work: Router = Router::new().route("/work", routing::get(|| async { "done" }));
        let ready = if graceful.is_ready() { 200 } else { 503 };
        let phase = graceful.phase();
        for (place, prefix, app) in [
            (
                "outside",
                "",
                work.clone().layer(layer.clone()).merge(probes.clone()),
            ),
            (
                "inside",
                "",
                work.clone().merge(probes.clone()).layer(layer.clone()),
            ),
            (
                "layer inside nest",
                "/sys",
                work.clone()
                    .nest("/sys", probes.clone().layer(layer.clone())),
            ),
            (
                "layer outside nest",
                "/sys",
                work.clone()
                    .nest("/sys", probes.clone())
                    .layer(layer.clone()),
            ),
            (
                "nested twice",
                "/a/b",
                Router::new()
                    .nest("/a", Router::new().nest("/b", probes.clone()))
                    .layer(layer.clone()),
            ),
            (
                "beside a fallback",
                "",
                work.clone()
                    .merge(probes.clone())
                    .fallback(|| async { "lost" })
                    .layer(layer.clone()),
            ),
            (
                "below a TraceLayer",
                "",
                work.clone()
                    .merge(probes.clone())
                    .layer(TraceLayer::new_for_http())
                    .layer(layer.clone()),
            ),
            (
                "nested below a TraceLayer",
                "/sys",
                work.clone()
                    .nest("/sys", probes.clone().layer(TraceLayer::new_for_http()))
                    .layer(layer.clone()),
            ),
            (
                "in a router with a state",
                "/{tenant}/sys",
                Router::new()
                    .nest("/{tenant}/sys", graceful.probes::<u8>())
                    .layer(layer.clone())
                    .with_state(7),
            ),
            (
                "layered before it is merged",
                "",
                work.clone().merge(probes.clone().layer(layer.clone())),
            ),
        ] {
            let readiness = ask(&app, &format!("{prefix}/readyz")).await;
            assert_eq!(readiness, said(ready, phase.as_str()), "{place}");
            let liveness = ask(&app, &format!("{prefix}/livez")).await;
            assert_eq!(liveness, said(200, phase.as_str()), "{place}");
        }
        assert_eq!(graceful.in_flight(), 1);
    }
}

#[tokio::test]
async fn a_layer_around_the_whole_router_lets_its_probes_pass() {
    for (graceful, _busy) in [draining(prompt()), full(prompt())] {
        let work: Router = Router::new().route("/work", routing::get(|| async { "done" }));
        let ready = if graceful.is_ready() { 200 } else { 503 };
        let app = ServiceBuilder::new()
            .layer(graceful.layer())
            .service(work.merge(graceful.probes()));
        for (path, expected) in [
            ("/readyz", ready),
            ("/livez", 200),
            ("/readyz?verbose", ready),
        ] {
            let response = app.clone().oneshot(get(path)).await.unwrap();
            assert_eq!(response.status().as_u16(), expected, "{path}");
            let body = text(response.into_body()).await;
            assert_eq!(body, format!("{}\n", graceful.phase()), "{path}");
        }
        assert_eq!(graceful.in_flight(), 1);
    }
}

#[tokio::test]
async fn probes_are_counted_as_any_request_while_they_would_be_served_anyway() {
    let graceful = Graceful::new();
    let app: Router = graceful.probes().layer(graceful.layer());
    let response = send(&app, Method::GET, "/readyz").await;
    assert_eq!(graceful.in_flight(), 1);
    drop(response);
    assert_eq!(graceful.in_flight(), 0);
}

#[tokio::test]
async fn a_probe_is_served_on_a_custom_path() {
    let (graceful, _busy) = draining(prompt().exempt("/health"));
    let app: Router = Router::new()
        .route_service("/health", graceful.readiness())
        .route_service("/alive", graceful.liveness())
        .layer(graceful.layer());
    assert_eq!(ask(&app, "/health").await, said(503, "draining"));
    let (status, text) = ask(&app, "/alive").await;
    assert_eq!(status, 503, "not exempt, and so refused as any request is");
    assert!(text.starts_with("shutting down"));

    let app: Router = Router::new().route_service("/alive", graceful.liveness());
    assert_eq!(ask(&app, "/alive").await, said(200, "draining"));
}

#[tokio::test]
async fn the_future_of_a_probe_stays_pending_once_it_has_been_ready() {
    let mut probe = Graceful::new().liveness();
    let mut answer = tokio_test::task::spawn(tower::Service::call(&mut probe, get("/")));
    let response = tokio_test::assert_ready_ok!(answer.poll());
    assert_eq!(response.status(), StatusCode::OK);
    tokio_test::assert_pending!(answer.poll());
}
