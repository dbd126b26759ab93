//! Exempt paths and probes: their requests are never rejected.

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
fn an_uncounted_exempt_request_asks_its_client_to_leave() {
    let (graceful, _busy) = draining(prompt().exempt("/"));
    let mut request = start(&graceful, std::future::ready(Ok(figures())));
    assert_eq!(graceful.in_flight(), 1, "the busy one alone");
    let response = assert_ready_ok!(request.poll());
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(connection(&response), ["close"]);
    assert_eq!(graceful.in_flight(), 1);
    drop(response);
    assert_eq!(graceful.in_flight(), 1, "and it releases no other request");
}

#[test]
fn an_exempt_response_above_the_limit_is_unchanged() {
    let (graceful, _busy) = full(prompt().exempt("/"));
    let mut request = start(&graceful, std::future::ready(Ok(figures())));
    let response = assert_ready_ok!(request.poll());
    assert!(connection(&response).is_empty());
    assert_eq!(graceful.in_flight(), 1);
}

#[test]
fn an_exempt_request_that_would_be_served_anyway_is_counted() {
    let graceful: Graceful = prompt().exempt("/").build().unwrap();
    let mut request = start(&graceful, std::future::ready(Ok(figures())));
    assert_eq!(graceful.in_flight(), 1);
    drop(assert_ready_ok!(request.poll()));
    assert_eq!(graceful.in_flight(), 0);
}

fn figures() -> Response<Full<Bytes>> {
    whole("figures")
}

#[tokio::test]
async fn without_the_probes_router_no_path_is_exempt_as_a_probe() {
    let (graceful, _busy) = full(prompt());
    let app = routes("/readyz").layer(graceful.layer());
    assert_eq!(status(&app, "/readyz").await, 429);
}

#[cfg(feature = "axum")]
mod spelled_like_a_probe {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use futures_util::future::join_all;
    use tokio::sync::Semaphore;
    use tower::ServiceBuilder;
    use tower_graceful::Snapshot;
    use tower_http::trace::TraceLayer;

    use super::*;

    const SPELLINGS: [&str; 10] = [
        "/tenant/readyz",
        "/tenant/livez",
        "/tenant/readyz?of=all",
        "/expensive/7/readyz",
        "/files/readyz",
        "/files/a/b/livez",
        "/lost/readyz",
        "/lost//readyz",
        "/lost/%72eadyz",
        "/readyz/livez",
    ];

    /// Routes of the user, and a fallback, whose paths end like those of the probes.
    fn tenants() -> Router {
        let work = || routing::get(|| async { "work" });
        Router::new()
            .route("/tenant/readyz", work())
            .route("/tenant/livez", work())
            .route("/expensive/{n}/readyz", work())
            .route("/files/{*path}", work())
            .route("/readyz/livez", work())
            .fallback(|| async { "lost" })
    }

    #[tokio::test]
    async fn no_route_of_a_user_passes() {
        for (graceful, _busy) in [draining(prompt()), full(prompt())] {
            let (layer, probes) = (graceful.layer(), graceful.probes::<()>());
            let traced = Router::new()
                .merge(tenants())
                .merge(probes.clone())
                .layer(TraceLayer::new_for_http())
                .layer(layer.clone());
            for (place, prefix, app) in [
                (
                    "inside",
                    "",
                    tenants().merge(probes.clone()).layer(layer.clone()),
                ),
                (
                    "outside",
                    "",
                    tenants().layer(layer.clone()).merge(probes.clone()),
                ),
                ("below a TraceLayer", "", traced),
                (
                    "layer outside nest",
                    "/sys",
                    Router::new()
                        .nest("/sys", tenants().merge(probes.clone()))
                        .layer(layer.clone()),
                ),
                (
                    "layer inside nest",
                    "/sys",
                    Router::new()
                        .nest("/sys", tenants().merge(probes.clone()).layer(layer.clone())),
                ),
                (
                    "as a service",
                    "/sys",
                    Router::new()
                        .nest_service("/sys", tenants().merge(probes.clone()))
                        .layer(layer.clone()),
                ),
                (
                    "around the router",
                    "",
                    Router::new().fallback_service(
                        ServiceBuilder::new()
                            .layer(layer.clone())
                            .service(tenants().merge(probes.clone())),
                    ),
                ),
            ] {
                for path in SPELLINGS {
                    let status = status(&app, &format!("{prefix}{path}")).await;
                    assert!([429, 503].contains(&status), "{place}: {path}: {status}");
                }
            }
            // The layer outside of everything else, directly below the server.
            let app = ServiceBuilder::new()
                .layer(layer)
                .service(tenants().merge(probes));
            for path in SPELLINGS {
                let response = app.clone().oneshot(get(path)).await.unwrap();
                let status = response.status().as_u16();
                assert!([429, 503].contains(&status), "around all: {path}: {status}");
            }
        }
    }

    /// There path and method decide, so a route of the user with the same two would pass too.
    #[tokio::test]
    async fn below_a_layer_around_all_only_the_methods_of_a_route_pass() {
        for (graceful, _busy) in [draining(prompt()), full(prompt())] {
            let app = tenants()
                .merge(graceful.probes())
                .merge(graceful.pre_stop().into_router());
            let app = ServiceBuilder::new().layer(graceful.layer()).service(app);
            // Without a peer the preStop route answers 403.
            for (path, passing, passed) in [
                ("/readyz", &["GET", "HEAD", "OPTIONS"][..], &[200, 503][..]),
                ("/livez", &["GET", "HEAD", "OPTIONS"], &[200]),
                ("/prestop", &["GET", "POST"], &[403]),
            ] {
                for method in [
                    "GET", "HEAD", "OPTIONS", "POST", "PUT", "DELETE", "CONNECT", "BREW",
                ] {
                    let refused = |it: Snapshot| it.refused_draining + it.refused_full;
                    let before = refused(graceful.snapshot());
                    let mut request = get(path);
                    *request.method_mut() = method.parse().unwrap();
                    let response = app.clone().oneshot(request).await.unwrap();
                    let status = response.status().as_u16();
                    let refused = refused(graceful.snapshot()) - before;
                    if passing.contains(&method) {
                        assert_eq!(refused, 0, "{method} {path}");
                        assert!(passed.contains(&status), "{method} {path}: {status}");
                    } else {
                        assert_eq!(refused, 1, "{method} {path}");
                        assert!([429, 503].contains(&status), "{method} {path}: {status}");
                    }
                }
            }
        }
    }

    #[tokio::test]
    async fn a_fallback_does_not_pass_where_the_probes_are_elsewhere() {
        let (graceful, _busy) = full(prompt());
        let app = tenants()
            .nest("/sys", graceful.probes())
            .layer(graceful.layer());
        assert_eq!(status(&app, "/readyz").await, 429);
        assert_eq!(status(&app, "/livez").await, 429);
        assert_eq!(status(&app, "/sys/readyz").await, 200);
    }

    #[tokio::test]
    async fn a_route_does_not_pass_where_the_probes_are_elsewhere() {
        let (graceful, _busy) = full(prompt());
        let app = routes("/readyz")
            .nest("/sys", graceful.probes())
            .layer(graceful.layer());
        assert_eq!(status(&app, "/readyz").await, 429);
        assert_eq!(status(&app, "/sys/readyz").await, 200);
    }

    #[tokio::test]
    async fn the_probes_of_another_lifecycle_do_not_pass() {
        let (graceful, _busy) = full(prompt());
        let _own = graceful.probes::<()>();
        let app = Graceful::new().probes::<()>().layer(graceful.layer());
        assert_eq!(status(&app, "/readyz").await, 429);
    }

    #[tokio::test]
    async fn a_separately_routed_probe_is_refused() {
        let (graceful, _busy) = full(prompt());
        let app: Router = Router::new()
            .nest("/sys", graceful.probes())
            .route_service("/readyz", graceful.readiness())
            .layer(graceful.layer());
        assert_eq!(status(&app, "/readyz").await, 429);
        assert_eq!(status(&app, "/sys/readyz").await, 200);
    }

    #[tokio::test]
    async fn fifty_at_once_are_held_to_a_limit_of_one() {
        let graceful = prompt().max_in_flight(1).build().unwrap();
        let (gate, most) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicUsize::new(0)));
        let (inside, peak) = (Arc::clone(&gate), Arc::clone(&most));
        let expensive = move || {
            let (inside, peak) = (Arc::clone(&inside), Arc::clone(&peak));
            async move {
                peak.fetch_add(1, Ordering::Relaxed);
                drop(inside.acquire().await);
            }
        };
        let app: Router = Router::new()
            .route("/expensive/{n}/readyz", routing::get(expensive))
            .merge(graceful.probes())
            .layer(graceful.layer());
        let all = join_all((0..50).map(|n| {
            let app = app.clone();
            async move { status(&app, &format!("/expensive/{n}/readyz")).await }
        }));
        let (statuses, ()) = tokio::join!(all, async {
            // While one request is in flight, the probes answer.
            assert_eq!(status(&app, "/readyz").await, 200);
            assert_eq!(status(&app, "/livez").await, 200);
            gate.add_permits(1);
        });
        assert_eq!(most.load(Ordering::Relaxed), 1);
        assert_eq!(statuses.iter().filter(|it| **it == 200).count(), 1);
        assert_eq!(statuses.iter().filter(|it| **it == 429).count(), 49);
    }
}
