//! Probes while the service drains: a request that is not exactly a probe is never treated as one,
//! and a probe is never refused.

#![no_main]

use std::{
    sync::LazyLock,
    task::{Context, Poll, Waker},
    time::Duration,
};

use arbitrary::Arbitrary;
use axum::{Router, body::Body, routing::any};
use http::{Method, Request, Response, StatusCode, Uri, header};
use libfuzzer_sys::fuzz_target;
use tower::{Layer, Service};
use tower_graceful::{Graceful, Hold};

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Arrangement {
    /// The layer is inside the router, and so are the probes.
    Inside,
    /// The probes are under a prefix.
    Nested,
    /// The layer is around the whole router.
    Around,
}

#[derive(Arbitrary, Debug)]
enum Segment<'a> {
    Livez,
    Readyz,
    Prefix,
    Slash,
    Text(&'a str),
}

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    arrangement: Arrangement,
    method: u8,
    path: Vec<Segment<'a>>,
    query: Option<&'a str>,
}

struct Draining {
    graceful: Graceful,
    _hold: Hold,
    inside: Router,
    nested: Router,
    /// Without the layer, which is put around it.
    whole: Router,
}

/// What the handlers of the user answer.
const HANDLER: StatusCode = StatusCode::IM_A_TEAPOT;

static DRAINING: LazyLock<Draining> = LazyLock::new(|| {
    let graceful = Graceful::builder()
        .grace_period(Duration::MAX)
        .drain_delay(Duration::ZERO)
        .build()
        .unwrap();
    let hold = graceful.hold("fuzzing");
    let handler = || async { HANDLER };
    let app = || {
        Router::new()
            .route("/", any(handler))
            .route("/api/livez", any(handler))
            .route("/{name}/readyz", any(handler))
            .route("/files/{*path}", any(handler))
            .fallback(handler)
    };
    let inside = app().merge(graceful.probes()).layer(graceful.layer());
    let nested = app()
        .nest("/health", graceful.probes())
        .layer(graceful.layer());
    let whole = app().merge(graceful.probes());
    graceful.shutdown();
    assert_eq!(graceful.phase().as_str(), "draining");
    Draining {
        _hold: hold,
        graceful,
        inside,
        nested,
        whole,
    }
});

/// The router and the layer's refusal need no runtime, and are ready when they are polled.
fn answer<F, B>(mut future: std::pin::Pin<Box<F>>) -> Response<B>
where
    F: Future<Output = Result<Response<B>, std::convert::Infallible>> + ?Sized,
{
    let cx = &mut Context::from_waker(Waker::noop());
    for _ in 0..100 {
        if let Poll::Ready(Ok(response)) = future.as_mut().poll(cx) {
            return response;
        }
    }
    panic!("no answer");
}

fuzz_target!(|input: Input<'_>| {
    let mut target = String::from("/");
    for segment in &input.path {
        match segment {
            Segment::Livez => target.push_str("livez"),
            Segment::Readyz => target.push_str("readyz"),
            Segment::Prefix => target.push_str("health"),
            Segment::Slash => target.push('/'),
            Segment::Text(text) => target.push_str(text),
        }
    }
    if let Some(query) = input.query {
        target.push('?');
        target.push_str(query);
    }
    let Ok(uri) = target.parse::<Uri>() else {
        return;
    };
    let methods = [
        Method::GET,
        Method::HEAD,
        Method::OPTIONS,
        Method::POST,
        Method::DELETE,
    ];
    let method = methods[usize::from(input.method) % methods.len()].clone();
    let path = uri.path().to_owned();
    let request = Request::builder().method(&method).uri(uri);
    let request = request.body(Body::empty()).unwrap();
    let draining = &*DRAINING;
    let (response, probe) = match input.arrangement {
        Arrangement::Inside => (
            answer(Box::pin(draining.inside.clone().call(request))),
            path.as_str(),
        ),
        Arrangement::Nested => (
            answer(Box::pin(draining.nested.clone().call(request))),
            // With the slash, so that `/healthlivez` is no probe.
            path.strip_prefix("/health").unwrap_or("none"),
        ),
        Arrangement::Around => {
            let mut service = draining.graceful.layer().layer(draining.whole.clone());
            let response = answer(Box::pin(service.call(request)));
            (response.map(Body::new), path.as_str())
        }
    };
    let known = matches!(method, Method::GET | Method::HEAD | Method::OPTIONS);
    // Around the whole router, the layer sees the path and not the route.
    let is_probe = matches!(probe, "/livez" | "/readyz")
        && (known || !matches!(input.arrangement, Arrangement::Around));
    let expected = match probe {
        _ if !is_probe => StatusCode::SERVICE_UNAVAILABLE,
        _ if !known => StatusCode::METHOD_NOT_ALLOWED,
        "/livez" => StatusCode::OK,
        // Readiness fails and other requests are refused, both with 503.
        _ => StatusCode::SERVICE_UNAVAILABLE,
    };
    assert_eq!(response.status(), expected, "{method} {path}");
    let headers = response.headers();
    assert_eq!(
        headers.contains_key(header::RETRY_AFTER),
        !is_probe,
        "{path}"
    );
    assert_eq!(
        headers.contains_key(header::CACHE_CONTROL),
        is_probe,
        "{path}"
    );
    assert_eq!(draining.graceful.in_flight(), 1, "the hold alone");
});
