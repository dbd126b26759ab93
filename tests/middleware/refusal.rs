//! Which requests are refused, and with which response.

use std::{
    future::{Ready, pending, poll_fn, ready},
    task::Poll,
    time::Duration,
};

use axum::{Router, routing};
use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, Version, header};
use http_body::Body;
use http_body_util::{Empty, Full};
use tokio_test::{assert_pending, assert_ready_err, assert_ready_ok};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_graceful::{Graceful, Phase, Rejection, RejectionReason};

use crate::support::{
    Busy, Script, Step, connection, draining, full, get, hold, panics, prompt, refuse, start, text,
    whole,
};

fn over(version: Version) -> Request<Empty<Bytes>> {
    let mut request = get("/");
    *request.version_mut() = version;
    request
}

#[tokio::test]
async fn while_draining_the_answer_is_503_with_retry_after() {
    let (graceful, _busy) = draining(prompt().retry_after(Duration::from_millis(6001)));
    let response = refuse(&graceful, get("/")).await.unwrap();
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(response.headers()["retry-after"], "7");
    assert_eq!(
        response.headers()["content-type"],
        "text/plain; charset=utf-8"
    );
    let body = text(response.into_body()).await;
    assert_eq!(body, "shutting down, please try again\n");
}

#[tokio::test]
async fn above_the_limit_the_answer_is_429_with_retry_after() {
    let (graceful, _busy) = full(prompt());
    let response = refuse(&graceful, get("/")).await.unwrap();
    assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(response.headers()["retry-after"], "1");
    let body = text(response.into_body()).await;
    assert_eq!(
        body,
        "too many requests in flight, please try again later\n"
    );
    assert_eq!(graceful.phase(), Phase::Serving);
}

#[tokio::test]
async fn draining_is_reported_before_overloaded() {
    let (graceful, _busy) = full(prompt());
    graceful.shutdown();
    let response = refuse(&graceful, get("/")).await.unwrap();
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn a_stopped_service_still_refuses() {
    let graceful = prompt().build().unwrap();
    graceful.shutdown();
    graceful.stopped().await;
    let response = refuse(&graceful, get("/")).await.unwrap();
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn a_refusal_closes_http1_connections_and_no_others() {
    let busy: [(Graceful, Busy); 2] = [draining(prompt()), full(prompt())];
    for (graceful, _busy) in &busy {
        for (version, expected) in [
            (Version::HTTP_10, vec!["close"]),
            (Version::HTTP_11, vec!["close"]),
            (Version::HTTP_2, vec![]),
            (Version::HTTP_3, vec![]),
        ] {
            let response = refuse(graceful, over(version)).await.unwrap();
            assert_eq!(connection(&response), expected, "{version:?}");
        }
    }
}

#[test]
fn a_refused_request_is_never_in_flight() {
    let (graceful, _busy) = full(prompt());
    let refused = refuse(&graceful, get("/"));
    assert_eq!(graceful.in_flight(), 1);
    drop(refused);
    assert_eq!(graceful.in_flight(), 1);
}

#[test]
fn the_snapshot_counts_refusals_from_the_start_and_by_reason() {
    let (graceful, _busy) = full(prompt());
    let counts = || {
        let snapshot = graceful.snapshot();
        (snapshot.refused_draining, snapshot.refused_full)
    };
    assert_eq!(counts(), (0, 0));
    drop(refuse(&graceful, get("/")));
    drop(refuse(&graceful, get("/")));
    assert_eq!(counts(), (0, 2), "while serving");
    graceful.shutdown();
    drop(refuse(&graceful, get("/")));
    assert_eq!(counts(), (1, 2));
}

#[test]
fn the_limit_holds_until_the_body_has_ended() {
    let graceful = prompt().max_in_flight(1).build().unwrap();
    let body = Script::new([Step::Data("data")]);
    let mut first = start(&graceful, ready(Ok(Response::new(body))));
    let streaming = assert_ready_ok!(first.poll());
    let mut second = start(&graceful, pending::<Result<Response<Full<Bytes>>, _>>());
    let refused = assert_ready_ok!(second.poll());
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    drop(streaming);
    let mut third = start(&graceful, pending::<Result<Response<Full<Bytes>>, _>>());
    assert_pending!(third.poll());
}

#[tokio::test]
async fn one_limit_for_all_routes_layers_and_clones() {
    let graceful = prompt().max_in_flight(2).build().unwrap();
    let stream = || async { axum::body::Body::new(Script::new([Step::Data("data")])) };
    let app: Router = Router::new()
        .route("/a", routing::get(stream))
        .route("/b", routing::get(stream))
        .layer(graceful.layer());
    let other = Router::<()>::new()
        .route("/c", routing::get(stream))
        .layer(graceful.clone().layer().clone());
    let a = app.clone().oneshot(get("/a")).await.unwrap();
    let c = other.clone().oneshot(get("/c")).await.unwrap();
    assert_eq!((a.status(), c.status()), (StatusCode::OK, StatusCode::OK));
    for (app, path) in [(&app, "/a"), (&app, "/b"), (&app, "/lost"), (&other, "/c")] {
        let response = app.clone().oneshot(get(path)).await.unwrap();
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS, "{path}");
    }
    assert_eq!(graceful.in_flight(), 2);
    drop(c);
    let b = app.oneshot(get("/b")).await.unwrap();
    assert_eq!(b.status(), StatusCode::OK);
}

#[test]
fn every_way_for_a_request_to_end_frees_its_place() {
    type Answer<B> = Result<Response<B>, &'static str>;
    let graceful = prompt().max_in_flight(1).build().unwrap();
    for round in 0..200 {
        match round % 8 {
            0 => {
                let mut request = start(&graceful, ready(Ok(whole("hi"))));
                drop(assert_ready_ok!(request.poll()));
            }
            1 => drop(hold(&graceful)),
            2 => {
                let mut request = start(&graceful, pending::<Answer<Empty<Bytes>>>());
                assert_pending!(request.poll());
            }
            3 => {
                let mut request = start(&graceful, ready(Answer::<Empty<Bytes>>::Err("broken")));
                assert_ready_err!(request.poll());
            }
            4 => {
                let panicking = poll_fn(|_| -> Poll<Answer<Empty<Bytes>>> { panic!("in poll") });
                let mut request = start(&graceful, panicking);
                assert!(panics(|| request.poll()));
            }
            5 => {
                let inner = service_fn(|_| -> Ready<Answer<Empty<Bytes>>> { panic!("in call") });
                let mut service = graceful.layer().layer(inner);
                assert!(panics(|| service.call(get("/"))));
            }
            6 => {
                let body = Script::new([Step::Panic]);
                let mut request = start(&graceful, ready(Ok(Response::new(body))));
                let body = assert_ready_ok!(request.poll()).into_body();
                let mut body = tokio_test::task::spawn(body);
                assert!(panics(|| body.enter(|cx, body| body.poll_frame(cx))));
            }
            _ => {
                let _busy = hold(&graceful);
                let mut refused = start(&graceful, pending::<Answer<Empty<Bytes>>>());
                assert_ready_ok!(refused.poll());
                assert_eq!(graceful.in_flight(), 1);
            }
        }
        assert_eq!(graceful.in_flight(), 0, "round {round}");
    }
}

fn teapot(rejection: &Rejection<'_>) -> Response<Bytes> {
    let reason = match rejection.reason() {
        RejectionReason::Draining => "draining",
        RejectionReason::Overloaded => "overloaded",
        _ => unreachable!(),
    };
    let wait = rejection.retry_after().as_millis();
    let body = format!("{reason} {} {wait}", rejection.status().as_u16());
    Response::builder()
        .status(StatusCode::IM_A_TEAPOT)
        .header("x-own", "kept")
        .body(body.into())
        .unwrap()
}

#[tokio::test]
async fn a_custom_rejection_replaces_status_and_body() {
    let builder = prompt()
        .rejection(teapot)
        .retry_after(Duration::from_millis(2500));
    for ((graceful, _busy), body) in [
        (draining(builder.clone()), "draining 503 2500"),
        (full(builder), "overloaded 429 2500"),
    ] {
        let response = refuse(&graceful, get("/")).await.unwrap();
        assert_eq!(response.status(), StatusCode::IM_A_TEAPOT);
        assert_eq!(response.headers()["x-own"], "kept");
        assert_eq!(response.headers()["retry-after"], "3", "added");
        assert_eq!(connection(&response), ["close"], "added");
        assert_eq!(text(response.into_body()).await, body);
    }
}

/// JSON to the clients that accept it, and the CORS field for one origin.
fn negotiated(rejection: &Rejection<'_>) -> Response<Bytes> {
    let accept = rejection.headers().get(header::ACCEPT);
    let json = accept
        .and_then(|accept| accept.to_str().ok())
        .is_some_and(|accept| accept.contains("application/json"));
    let (kind, body) = if json {
        ("application/json", r#"{"error":"try again later"}"#)
    } else {
        ("text/plain", "try again later\n")
    };
    let mut response = Response::new(Bytes::from_static(body.as_bytes()));
    *response.status_mut() = rejection.status();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    if let Some(origin) = rejection.headers().get(header::ORIGIN) {
        if origin == "https://app.example.com" {
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        }
    }
    response
}

#[tokio::test]
async fn a_custom_rejection_honours_accept_and_origin() {
    let builder = prompt().rejection(negotiated);
    for (graceful, _busy) in [draining(builder.clone()), full(builder)] {
        for (accept, kind) in [
            ("text/html, application/json;q=0.9", "application/json"),
            ("text/html", "text/plain"),
        ] {
            for (origin, allowed) in [
                ("https://app.example.com", true),
                ("https://other.example.com", false),
            ] {
                let mut request = get("/");
                let headers = request.headers_mut();
                headers.insert(header::ACCEPT, HeaderValue::from_static(accept));
                headers.insert(header::ORIGIN, HeaderValue::from_static(origin));
                let response = refuse(&graceful, request).await.unwrap();
                assert_eq!(response.headers()["content-type"], kind);
                let allows = response.headers().get("access-control-allow-origin");
                assert_eq!(allows.is_some_and(|it| it == origin), allowed, "{origin}");
                let body = text(response.into_body()).await;
                assert_eq!(body.starts_with('{'), kind == "application/json", "{body}");
            }
        }
    }
}

#[tokio::test]
async fn a_custom_rejection_sees_the_head_of_the_request() {
    let builder = prompt().rejection(|rejection: &Rejection<'_>| {
        let [method, uri] = [rejection.method().as_str(), &rejection.uri().to_string()];
        let version = rejection.version();
        let tenant = rejection.headers()["x-tenant"].to_str().unwrap();
        Response::new(format!("{method} {uri} {version:?} {tenant}").into())
    });
    for (graceful, _busy) in [draining(builder.clone()), full(builder)] {
        let mut request = get("/orders?page=2");
        *request.method_mut() = http::Method::PUT;
        *request.version_mut() = Version::HTTP_2;
        let tenant = HeaderValue::from_static("acme");
        request.headers_mut().insert("x-tenant", tenant);
        let response = refuse(&graceful, request).await.unwrap();
        let body = text(response.into_body()).await;
        assert_eq!(body, "PUT /orders?page=2 HTTP/2.0 acme");
    }
}

#[tokio::test]
async fn a_custom_rejection_keeps_its_own_headers() {
    let builder = prompt().rejection(|_| {
        let response = Response::builder()
            .header("retry-after", "99")
            .header("connection", "keep-alive");
        response.body(Bytes::new()).unwrap()
    });
    for ((graceful, _busy), says) in [
        (full(builder.clone()), "keep-alive"),
        (draining(builder), "close"),
    ] {
        let response = refuse(&graceful, get("/")).await.unwrap();
        let waits: Vec<_> = response.headers().get_all("retry-after").iter().collect();
        assert_eq!(waits, ["99"]);
        assert_eq!(connection(&response), [says]);
        assert!(response.body().is_end_stream());
    }
}

fn call(content_type: &'static str) -> Request<Empty<Bytes>> {
    let mut request = over(Version::HTTP_2);
    let value = HeaderValue::from_static(content_type);
    request.headers_mut().insert("content-type", value);
    request
}

#[tokio::test]
async fn a_grpc_call_is_refused_with_unavailable_as_headers_alone() {
    let builder = prompt().rejection(teapot);
    for (graceful, _busy) in [draining(builder.clone()), full(builder)] {
        for content_type in ["application/grpc", "application/grpc+proto"] {
            let response = refuse(&graceful, call(content_type)).await.unwrap();
            assert_eq!(response.status(), StatusCode::OK);
            let headers = response.headers();
            assert_eq!(headers["content-type"], "application/grpc");
            assert_eq!(headers["grpc-status"], "14");
            assert!(!headers["grpc-message"].is_empty());
            assert!(!headers.contains_key("connection"));
            assert!(response.body().is_end_stream());
            assert_eq!(text(response.into_body()).await, "");
        }
    }
}

#[tokio::test]
async fn a_grpc_web_call_is_refused_as_http() {
    let (graceful, _busy) = draining(prompt());
    for content_type in ["application/grpc-web", "application/grpc-web+proto"] {
        let response = refuse(&graceful, call(content_type)).await.unwrap();
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert!(!response.headers().contains_key("grpc-status"));
    }
}

#[tokio::test]
async fn a_refused_head_has_the_length_of_the_answer_and_no_body() {
    let (graceful, _busy) = draining(prompt());
    let full = refuse(&graceful, get("/")).await.unwrap();
    let length = text(full.into_body()).await.len();
    let mut head = get("/");
    *head.method_mut() = http::Method::HEAD;
    let response = refuse(&graceful, head).await.unwrap();
    assert_eq!(response.headers()["content-length"], length.to_string());
    assert!(response.body().is_end_stream());
}

#[tokio::test]
async fn an_http_1_0_client_is_answered_in_its_own_version() {
    // To a response in a later version hyper adds `keep-alive`, and the client stays connected.
    let (graceful, _busy) = draining(prompt());
    let response = refuse(&graceful, over(Version::HTTP_10)).await.unwrap();
    assert_eq!(response.version(), Version::HTTP_10);
    let response = refuse(&graceful, over(Version::HTTP_11)).await.unwrap();
    assert_eq!(response.version(), Version::HTTP_11);
}
