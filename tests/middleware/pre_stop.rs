//! The preStop route: a call from an allowed caller starts the stop, and is answered when the
//! lame-duck phase is over.

use std::net::{IpAddr, SocketAddr};

use axum::{Router, body::Body, extract::ConnectInfo, routing};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Empty;
use tokio::time::{Duration, Instant, sleep};
use tokio_test::{assert_pending, assert_ready_ok, task};
use tower::{Service, ServiceBuilder, ServiceExt};
use tower_graceful::{Graceful, Phase, PreStop, Trigger};

use crate::support::{connection, full, hold, prompt, text};

const DELAY: Duration = Duration::from_secs(5);

fn call(method: Method, path: &str, peer: &str) -> Request<Empty<Bytes>> {
    let mut request = Request::builder().method(method).uri(path);
    let peer: SocketAddr = peer.parse().unwrap();
    request.extensions_mut().unwrap().insert(ConnectInfo(peer));
    request.body(Empty::new()).unwrap()
}

fn get(path: &str) -> Request<Empty<Bytes>> {
    call(Method::GET, path, "127.0.0.1:1")
}

fn local() -> Request<Empty<Bytes>> {
    get("/prestop")
}

async fn answer(app: &Router, request: Request<Empty<Bytes>>) -> Response<Body> {
    app.clone().oneshot(request).await.unwrap()
}

async fn status(service: PreStop, peer: &str) -> StatusCode {
    let call = service.oneshot(call(Method::GET, "/", peer));
    call.await.unwrap().status()
}

#[tokio::test(start_paused = true)]
async fn a_call_starts_the_lame_duck_phase_and_is_answered_when_it_is_over() {
    for method in [Method::GET, Method::POST] {
        let graceful = Graceful::new();
        let run = tokio::spawn(graceful.run(graceful.drain_on(std::future::pending())));
        tokio::task::yield_now().await;
        let began = Instant::now();
        let mut answer = task::spawn(graceful.pre_stop().call(call(
            method,
            "/prestop",
            "127.0.0.1:1",
        )));
        assert_eq!(graceful.phase(), Phase::LameDuck);
        assert!(!graceful.is_ready());
        assert_pending!(answer.poll());
        sleep(Duration::from_millis(4995)).await;
        assert_pending!(answer.poll());
        let response = answer.await.unwrap();
        let after = began.elapsed();
        assert!(
            after >= DELAY && after < DELAY + Duration::from_millis(5),
            "{after:?}"
        );
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(connection(&response), ["close"]);
        assert_eq!(response.headers()["cache-control"], "no-store");
        assert_eq!(text(response.into_body()).await, "the delay is over\n");
        let report = run.await.unwrap();
        assert_eq!(report.trigger(), Trigger::PreStop);
        assert_eq!(report.trigger().to_string(), "preStop");
    }
}

#[tokio::test(start_paused = true)]
async fn calls_during_the_delay_are_answered_at_its_end_and_later_calls_at_once() {
    let graceful = Graceful::new();
    let mut service = graceful.pre_stop();
    let mut first = task::spawn(service.call(local()));
    sleep(Duration::from_secs(2)).await;
    let mut second = task::spawn(service.call(local()));
    assert_pending!(first.poll());
    assert_pending!(second.poll());
    sleep(Duration::from_secs(3) + Duration::from_millis(5)).await;
    assert!(first.is_woken() && second.is_woken());
    assert_ready_ok!(first.poll());
    assert_ready_ok!(second.poll());
    graceful.stopped().await;
    assert_ready_ok!(task::spawn(service.call(local())).poll());
}

#[tokio::test(start_paused = true)]
async fn a_call_after_another_trigger_waits_for_the_same_delay() {
    let graceful = Graceful::new();
    graceful.shutdown();
    sleep(Duration::from_secs(3)).await;
    let began = Instant::now();
    let response = graceful.pre_stop().oneshot(local()).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert!(
        began.elapsed() < Duration::from_millis(2010),
        "{:?}",
        began.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_disconnects_does_not_cancel_the_stop() {
    let graceful = Graceful::new();
    drop(graceful.pre_stop().call(local()));
    assert_eq!(graceful.phase(), Phase::LameDuck);
    let began = Instant::now();
    graceful.draining().await;
    assert!(began.elapsed() >= DELAY);
}

#[tokio::test(start_paused = true)]
async fn the_answer_comes_with_the_end_of_a_phase_that_ends_early() {
    let graceful = Graceful::builder()
        .leave_when_noticed(1, 1)
        .build()
        .unwrap();
    let answer = tokio::spawn(graceful.pre_stop().oneshot(local()));
    sleep(Duration::from_secs(1)).await;
    let began = Instant::now();
    graceful.readiness().oneshot(get("/readyz")).await.unwrap();
    assert_eq!(answer.await.unwrap().unwrap().status(), StatusCode::OK);
    assert!(
        began.elapsed() < Duration::from_millis(110),
        "{:?}",
        began.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn other_methods_are_not_allowed_and_stop_nothing() {
    let graceful = Graceful::new();
    for method in [Method::HEAD, Method::PUT, Method::DELETE, Method::OPTIONS] {
        let request = call(method.clone(), "/prestop", "127.0.0.1:1");
        let response = graceful.pre_stop().oneshot(request).await.unwrap();
        assert_eq!(
            response.status(),
            StatusCode::METHOD_NOT_ALLOWED,
            "{method}"
        );
        assert_eq!(response.headers()["allow"], "GET, POST");
        assert!(!response.headers().contains_key("connection"));
        let empty = text(response.into_body()).await.is_empty();
        assert_eq!(empty, method == Method::HEAD, "{method}");
    }
    assert_eq!(graceful.phase(), Phase::Serving);
}

#[tokio::test(start_paused = true)]
async fn only_loopback_and_allowed_addresses_stop_the_service() {
    let address = |text: &str| text.parse::<IpAddr>().unwrap();
    for (peer, allowed) in [
        ("127.0.0.1:9", true),
        ("127.8.0.1:9", true),
        ("[::1]:9", true),
        ("[::ffff:127.0.0.1]:9", true),
        ("10.0.0.7:9", true),
        ("[::ffff:10.0.0.7]:9", true),
        ("10.0.0.9:9", true),
        ("[fd00::7]:9", true),
        ("10.0.1.4:9", true),
        ("10.0.0.8:9", false),
        ("[::ffff:10.0.0.8]:9", false),
        ("[fd00::8]:9", false),
        ("0.0.0.0:9", false),
    ] {
        let graceful = prompt().build().unwrap();
        let service = graceful
            .pre_stop()
            .allow([address("10.0.0.7"), address("fd00::7")])
            .allow([address("::ffff:10.0.0.9")])
            .allow_if(|it| matches!(it, IpAddr::V4(it) if it.octets()[..3] == [10, 0, 1]));
        let status = status(service, peer).await;
        let expected = if allowed {
            StatusCode::OK
        } else {
            StatusCode::FORBIDDEN
        };
        assert_eq!(status, expected, "{peer}");
        assert_eq!(graceful.phase() > Phase::Serving, allowed, "{peer}");
    }
    let graceful = Graceful::new();
    assert_eq!(
        status(graceful.pre_stop(), "10.0.0.7:9").await,
        StatusCode::FORBIDDEN
    );
}

/// A sidecar connects from loopback, for any client.
#[tokio::test]
async fn a_call_through_a_proxy_is_refused() {
    for field in [
        "forwarded",
        "x-forwarded-for",
        "x-forwarded-client-cert",
        "x-envoy-attempt-count",
        "l5d-dst-override",
        "cf-connecting-ip",
        "X-Real-IP",
        "via",
    ] {
        let graceful = Graceful::new();
        let mut request = local();
        let name = http::HeaderName::from_bytes(field.as_bytes()).unwrap();
        request
            .headers_mut()
            .insert(name, "anything".parse().unwrap());
        let response = graceful.pre_stop().oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::FORBIDDEN, "{field}");
        let text = text(response.into_body()).await;
        assert!(text.contains(&field.to_lowercase()), "{text}");
        assert_eq!(graceful.phase(), Phase::Serving);
    }
}

#[tokio::test]
async fn a_caller_of_unknown_address_is_refused_with_a_remedy() {
    let graceful = Graceful::new();
    let request = Request::get("/prestop")
        .body(Empty::<Bytes>::new())
        .unwrap();
    let anyone = graceful.pre_stop().allow_if(|_| true);
    let response = anyone.oneshot(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::FORBIDDEN);
    let text = text(response.into_body()).await;
    assert!(
        text.contains("into_make_service_with_connect_info"),
        "{text}"
    );
    assert_eq!(graceful.phase(), Phase::Serving);
}

#[tokio::test(start_paused = true)]
async fn the_route_is_not_part_of_the_probes() {
    let graceful = Graceful::new();
    let app = graceful.probes();
    assert_eq!(answer(&app, local()).await.status(), StatusCode::NOT_FOUND);
    assert_eq!(graceful.phase(), Phase::Serving);
}

/// The route works outside the layer, inside it, nested, and below a layer around the whole router.
#[tokio::test(start_paused = true)]
async fn the_route_is_never_refused() {
    type Build = fn(&Graceful) -> Router;
    let routers: [(&str, Build); 3] = [
        ("/prestop", |it| {
            let app = Router::new().route("/", routing::get(|| async {}));
            app.layer(it.layer()).merge(it.pre_stop().into_router())
        }),
        ("/prestop", |it| {
            Router::new()
                .merge(it.pre_stop().into_router())
                .layer(it.layer())
        }),
        ("/admin/prestop", |it| {
            let app = Router::new().nest("/admin", it.pre_stop().into_router());
            app.layer(it.layer())
        }),
    ];
    for (path, router) in routers {
        let (graceful, busy) = full(prompt());
        let app = router(&graceful);
        // Other requests are rejected, first by the limit and then by the drain.
        for _ in 0..2 {
            let response = answer(&app, get(path)).await;
            assert_eq!(response.status(), StatusCode::OK, "{path}");
            assert_eq!(graceful.phase(), Phase::Draining);
            assert_eq!(graceful.in_flight(), 1, "{path}");
        }
        drop(busy);
        graceful.stopped().await;
        assert_eq!(graceful.snapshot().refused_draining, 0);
    }
    let (graceful, busy) = full(prompt());
    let around = ServiceBuilder::new()
        .layer(graceful.layer())
        .service::<Router>(graceful.pre_stop().into_router());
    for _ in 0..2 {
        let response = around.clone().oneshot(local()).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(graceful.phase(), Phase::Draining);
    }
    let other = around.oneshot(get("/other")).await.unwrap();
    assert_eq!(other.status(), StatusCode::SERVICE_UNAVAILABLE);
    drop(busy);
}

/// The path is exempt only if the route exists.
#[tokio::test]
async fn without_the_route_its_path_is_refused_like_others() {
    let (graceful, _busy) = full(prompt());
    let app: Router = Router::new().route("/prestop", routing::get(|| async {}));
    let around = ServiceBuilder::new().layer(graceful.layer()).service(app);
    let response = around.oneshot(local()).await.unwrap();
    assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
}

#[tokio::test(start_paused = true)]
async fn a_call_does_not_delay_the_drain_and_is_not_counted() {
    let graceful = Graceful::new();
    let app: Router = Router::new()
        .layer(graceful.layer())
        .merge(graceful.pre_stop().into_router());
    let run = tokio::spawn(graceful.run(graceful.drain_on(std::future::pending())));
    tokio::task::yield_now().await;
    let waiting = app.clone().oneshot(local());
    let mut waiting = task::spawn(waiting);
    assert_pending!(waiting.poll());
    assert_eq!(
        (graceful.phase(), graceful.in_flight()),
        (Phase::LameDuck, 0)
    );
    // The drain is over although the answer has not been read.
    let report = run.await.unwrap();
    assert_eq!(report.requests(), tower_graceful::Requests::default());
    assert_eq!(report.exit_code(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_grace_period_runs_from_the_call() {
    let graceful = Graceful::builder()
        .grace_period(Duration::from_secs(30))
        .build()
        .unwrap();
    let busy = hold(&graceful);
    let began = Instant::now();
    let answered = graceful.pre_stop().oneshot(local()).await.unwrap();
    assert_eq!(answered.status(), StatusCode::OK);
    graceful.stopped().await;
    assert!(
        began.elapsed() < Duration::from_secs(30),
        "{:?}",
        began.elapsed()
    );
    assert!(
        began.elapsed() >= Duration::from_secs(24),
        "{:?}",
        began.elapsed()
    );
    drop(busy);
}
