//! The layer among other layers and routers, and without either.

use std::{
    convert::Infallible,
    fmt::Debug,
    future::{Ready, pending},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::{FromRef, State},
    routing,
};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body::Body as _;
use http_body_util::{BodyExt, Empty, Full};
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_graceful::{Graceful, Phase};
use tower_http::{
    catch_panic::CatchPanicLayer,
    compression::CompressionLayer,
    cors::{Any, CorsLayer},
    decompression::DecompressionLayer,
    request_id::{MakeRequestId, PropagateRequestIdLayer, RequestId, SetRequestIdLayer},
    timeout::TimeoutLayer,
    trace::TraceLayer,
};

use crate::support::{Script, Step, draining, get, hold, prompt, text, whole};

fn graceful() -> Graceful {
    prompt().build().unwrap()
}

/// Two frames. The body does not announce its end.
async fn hello() -> Body {
    Body::new(Script::new([Step::Data("hel"), Step::Data("lo")]))
}

fn hello_at(path: &str) -> Router {
    Router::new().route(path, routing::get(hello))
}

/// The service counts a request to `path` until its body has ended, and refuses it once draining.
async fn counts_and_refuses<S, B>(service: S, graceful: &Graceful, path: &str)
where
    S: Service<Request<Empty<Bytes>>, Response = Response<B>, Error: Debug> + Clone,
    B: http_body::Body<Error: Debug>,
{
    let response = service.clone().oneshot(get(path)).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(graceful.in_flight(), 1, "after the head");
    assert_eq!(text(response.into_body()).await, "hello");
    assert_eq!(graceful.in_flight(), 0, "after the body");

    let busy = hold(graceful);
    graceful.shutdown();
    let response = service.clone().oneshot(get(path)).await.unwrap();
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(response.headers()["retry-after"], "1");
    assert_eq!(response.headers()["connection"], "close");
    assert_eq!(
        text(response.into_body()).await,
        "shutting down, please try again\n"
    );
    assert_eq!(graceful.phase(), Phase::Draining);

    drop(busy);
    graceful.stopped().await;
    let response = service.oneshot(get(path)).await.unwrap();
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn requests_are_counted_and_refused_without_axum() {
    let graceful = graceful();
    let service = graceful
        .layer()
        .layer(service_fn(|_: Request<Empty<Bytes>>| async {
            Ok::<_, Infallible>(whole("hello"))
        }));
    counts_and_refuses(service, &graceful, "/").await;
}

#[tokio::test]
async fn requests_are_counted_and_refused_in_a_service_builder() {
    let graceful = graceful();
    let service = ServiceBuilder::new()
        .layer(TraceLayer::new_for_http())
        .layer(graceful.layer())
        .layer(TimeoutLayer::with_status_code(
            StatusCode::GATEWAY_TIMEOUT,
            Duration::from_secs(1),
        ))
        .service_fn(|_: Request<Empty<Bytes>>| async {
            Ok::<_, Infallible>(Response::new(hello().await))
        });
    counts_and_refuses(service, &graceful, "/").await;
}

#[tokio::test]
async fn requests_are_counted_and_refused_as_the_last_layer_of_a_router() {
    let graceful = graceful();
    let app = hello_at("/").layer(graceful.layer());
    counts_and_refuses(app, &graceful, "/").await;
}

#[tokio::test]
async fn requests_are_counted_and_refused_as_a_route_layer_and_round_a_whole_router() {
    let graceful1 = graceful();
    let app = hello_at("/").route_layer(graceful1.layer());
    counts_and_refuses(app, &graceful1, "/").await;

    let graceful2 = graceful();
    let app = graceful2.layer().layer(hello_at("/"));
    counts_and_refuses(app, &graceful2, "/").await;
}

#[tokio::test]
async fn requests_are_counted_and_refused_inside_and_outside_nest() {
    let inside = graceful();
    let app = Router::new().nest("/api", hello_at("/hello").layer(inside.layer()));
    counts_and_refuses(app, &inside, "/api/hello").await;

    let outside = graceful();
    let app = Router::new()
        .nest("/api", hello_at("/hello"))
        .layer(outside.layer());
    counts_and_refuses(app, &outside, "/api/hello").await;
}

#[tokio::test]
async fn requests_are_counted_and_refused_with_a_fallback() {
    let graceful = graceful();
    let app = Router::new().fallback(hello).layer(graceful.layer());
    counts_and_refuses(app, &graceful, "/anywhere").await;
}

#[tokio::test]
async fn merged_routes_are_behind_the_layer_they_were_merged_under() {
    let (graceful, _busy) = draining(prompt());
    let app = hello_at("/under")
        .merge(hello_at("/merged"))
        .layer(graceful.layer())
        .merge(hello_at("/beside"));
    for (path, status) in [("/under", 503), ("/merged", 503), ("/beside", 200)] {
        let response = app.clone().oneshot(get(path)).await.unwrap();
        assert_eq!(response.status().as_u16(), status, "{path}");
    }
}

#[tokio::test]
async fn all_clones_share_one_count() {
    let graceful = graceful();
    let app = hello_at("/").layer(graceful.layer());
    let mut clones = vec![app];
    let mut responses = Vec::new();
    for count in 1..=10 {
        let clone = clones.last().unwrap().clone();
        clones.push(clone.clone());
        responses.push(clone.oneshot(get("/")).await.unwrap());
        assert_eq!(graceful.in_flight(), count);
    }
    drop(clones);
    assert_eq!(
        graceful.in_flight(),
        10,
        "the services are gone, the bodies are not"
    );
    drop(responses);
    assert_eq!(graceful.in_flight(), 0);
}

#[tokio::test]
async fn a_request_to_head_is_released_with_its_head() {
    let graceful = graceful();
    let app = hello_at("/").layer(graceful.layer());
    let request = Request::head("/").body(Empty::<Bytes>::new()).unwrap();
    let response = app.oneshot(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(graceful.in_flight(), 0);
}

#[tokio::test]
async fn requests_are_counted_and_refused_with_trace_inside_and_outside() {
    let inside = graceful();
    let app = hello_at("/")
        .layer(TraceLayer::new_for_http())
        .layer(inside.layer());
    counts_and_refuses(app, &inside, "/").await;

    let outside = graceful();
    let app = hello_at("/")
        .layer(outside.layer())
        .layer(TraceLayer::new_for_http());
    counts_and_refuses(app, &outside, "/").await;
}

#[tokio::test(start_paused = true)]
async fn a_timeout_outside_without_axum_makes_an_empty_body() {
    let graceful = graceful();
    let service = ServiceBuilder::new()
        .layer(TimeoutLayer::with_status_code(
            StatusCode::GATEWAY_TIMEOUT,
            Duration::from_secs(3),
        ))
        .layer(graceful.layer())
        .service_fn(|_: Request<Empty<Bytes>>| {
            pending::<Result<Response<Full<Bytes>>, Infallible>>()
        });
    let response = service.oneshot(get("/")).await.unwrap();
    assert_eq!(response.status(), StatusCode::GATEWAY_TIMEOUT);
    assert_eq!(text(response.into_body()).await, "");
    assert_eq!(graceful.in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_timeout_inside_or_outside_releases_the_request() {
    let timeout =
        TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, Duration::from_secs(3));
    let graceful = graceful();
    let app = || Router::new().route("/", routing::get(pending::<()>));
    for app in [
        app().layer(timeout).layer(graceful.layer()),
        app().layer(graceful.layer()).layer(timeout),
    ] {
        let response = app.oneshot(get("/")).await.unwrap();
        assert_eq!(response.status(), StatusCode::GATEWAY_TIMEOUT);
        assert_eq!(text(response.into_body()).await, "");
        assert_eq!(graceful.in_flight(), 0);
    }
}

#[tokio::test]
async fn requests_are_counted_and_refused_with_a_timeout_that_does_not_expire() {
    let timeout =
        TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, Duration::from_secs(3));
    let graceful = graceful();
    let app = hello_at("/").layer(graceful.layer()).layer(timeout);
    counts_and_refuses(app, &graceful, "/").await;
}

#[tokio::test]
async fn a_compressed_body_is_counted_until_its_end_and_decodes() {
    let long = || "tower".repeat(10_000);
    let routes = || Router::new().route("/", routing::get(async move || long()));
    let graceful = graceful();
    for app in [
        routes()
            .layer(CompressionLayer::new())
            .layer(graceful.layer()),
        routes()
            .layer(graceful.layer())
            .layer(CompressionLayer::new()),
    ] {
        let request = || {
            let request = Request::get("/").header("accept-encoding", "gzip");
            request.body(Empty::<Bytes>::new()).unwrap()
        };
        let response = app.clone().oneshot(request()).await.unwrap();
        assert_eq!(response.headers()["content-encoding"], "gzip");
        assert_eq!(graceful.in_flight(), 1, "after the head");
        let gzip = response.into_body().collect().await.unwrap().to_bytes();
        assert!(gzip.len() < long().len() / 10);
        assert_eq!(graceful.in_flight(), 0, "after the body");

        let client = DecompressionLayer::new().layer(app);
        let response = client.oneshot(request()).await.unwrap();
        assert_eq!(text(response.into_body()).await, long());
        assert_eq!(graceful.in_flight(), 0);
    }
}

fn in_call<B>(_: Request<B>) -> Ready<Result<Response<Body>, Infallible>> {
    panic!("the service panics in call")
}

#[tokio::test]
async fn a_panic_is_a_500_and_releases_the_request_in_both_orders() {
    async fn in_poll() -> &'static str {
        tokio::task::yield_now().await;
        panic!("the handler panics")
    }
    let graceful = graceful();
    let app = || {
        Router::new()
            .route("/poll", routing::get(in_poll))
            .route_service("/call", service_fn(in_call))
    };
    for app in [
        app().layer(CatchPanicLayer::new()).layer(graceful.layer()),
        app().layer(graceful.layer()).layer(CatchPanicLayer::new()),
    ] {
        for path in ["/poll", "/call"] {
            let response = app.clone().oneshot(get(path)).await.unwrap();
            assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
            assert!(text(response.into_body()).await.contains("panicked"));
            assert_eq!(graceful.in_flight(), 0, "{path}");
        }
    }

    let service = ServiceBuilder::new()
        .layer(CatchPanicLayer::new())
        .layer(graceful.layer())
        .service(service_fn(in_call));
    let response = service.oneshot(get("/")).await.unwrap();
    assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(graceful.in_flight(), 0);
}

#[tokio::test]
async fn requests_are_counted_and_refused_with_catch_panic_and_no_panic() {
    let graceful = graceful();
    let app = hello_at("/")
        .layer(graceful.layer())
        .layer(CatchPanicLayer::new());
    counts_and_refuses(app, &graceful, "/").await;
}

#[derive(Clone, Default)]
struct Numbered(Arc<AtomicU64>);

impl MakeRequestId for Numbered {
    fn make_request_id<B>(&mut self, _: &Request<B>) -> Option<RequestId> {
        let number = self.0.fetch_add(1, Ordering::Relaxed);
        number.to_string().parse().ok().map(RequestId::new)
    }
}

#[tokio::test]
async fn a_refusal_carries_the_request_id_too() {
    let graceful = graceful();
    let app = hello_at("/")
        .layer(graceful.layer())
        .layer(PropagateRequestIdLayer::x_request_id())
        .layer(SetRequestIdLayer::x_request_id(Numbered::default()));
    let served = app.clone().oneshot(get("/")).await.unwrap();
    assert_eq!(served.status(), StatusCode::OK);
    assert_eq!(served.headers()["x-request-id"], "0");
    graceful.shutdown();
    let refused = app.oneshot(get("/")).await.unwrap();
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(refused.headers()["x-request-id"], "1");
    drop(served);
}

#[tokio::test]
async fn requests_are_counted_and_refused_with_request_ids_inside() {
    let graceful = graceful();
    let app = hello_at("/")
        .layer(PropagateRequestIdLayer::x_request_id())
        .layer(SetRequestIdLayer::x_request_id(Numbered::default()))
        .layer(graceful.layer());
    counts_and_refuses(app, &graceful, "/").await;
}

#[tokio::test]
async fn a_layer_that_is_applied_twice_counts_twice_and_returns_to_zero() {
    let graceful = prompt().max_in_flight(3).build().unwrap();
    let app = hello_at("/")
        .layer(graceful.layer())
        .layer(graceful.layer());
    let served = app.clone().oneshot(get("/")).await.unwrap();
    assert_eq!(served.status(), StatusCode::OK);
    assert_eq!(graceful.in_flight(), 2);
    let refused = app.oneshot(get("/")).await.unwrap();
    assert_eq!(
        refused.status(),
        StatusCode::TOO_MANY_REQUESTS,
        "half of three is one"
    );
    assert_eq!(
        graceful.in_flight(),
        3,
        "counted outside until its refusal has been sent"
    );
    drop(refused);
    assert_eq!(graceful.in_flight(), 2);
    assert_eq!(text(served.into_body()).await, "hello");
    assert_eq!(graceful.in_flight(), 0);
}

#[tokio::test]
async fn two_lifecycles_on_one_router_count_and_refuse_apart() {
    let (first, second) = (graceful(), graceful());
    let app = hello_at("/both")
        .layer(first.layer())
        .merge(hello_at("/second"))
        .layer(second.layer());
    let both = app.clone().oneshot(get("/both")).await.unwrap();
    assert_eq!((first.in_flight(), second.in_flight()), (1, 1));
    let one = app.clone().oneshot(get("/second")).await.unwrap();
    assert_eq!((first.in_flight(), second.in_flight()), (1, 2));

    first.shutdown();
    let refused = app.clone().oneshot(get("/both")).await.unwrap();
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
    drop(refused);
    let served = app.oneshot(get("/second")).await.unwrap();
    assert_eq!(served.status(), StatusCode::OK);
    assert!(!served.headers().contains_key("connection"));
    assert_eq!(
        (first.phase(), second.phase()),
        (Phase::Draining, Phase::Serving)
    );

    drop((both, one, served));
    assert_eq!((first.in_flight(), second.in_flight()), (0, 0));
}

#[tokio::test]
async fn handlers_get_the_handle_from_the_state_or_a_part_of_it() {
    #[derive(Clone)]
    struct App {
        graceful: Graceful,
        _database: Arc<str>,
    }

    impl FromRef<App> for Graceful {
        fn from_ref(app: &App) -> Self {
            app.graceful.clone()
        }
    }

    async fn stop(State(graceful): State<Graceful>) -> String {
        let _hold = graceful.hold("stop");
        graceful.shutdown();
        graceful.in_flight().to_string()
    }

    let (whole, part) = (graceful(), graceful());
    let apps = [
        Router::new()
            .route("/", routing::get(stop))
            .layer(whole.layer())
            .with_state(whole.clone()),
        Router::new()
            .route("/", routing::get(stop))
            .layer(part.layer())
            .with_state(App {
                graceful: part.clone(),
                _database: "jobs".into(),
            }),
    ];
    for (app, graceful) in apps.into_iter().zip([whole, part]) {
        let response = app.oneshot(get("/")).await.unwrap();
        assert_eq!(text(response.into_body()).await, "2", "it is the same one");
        // Nothing is in flight any more, so the service may have stopped by now.
        assert!(graceful.phase() >= Phase::Draining);
    }
}

#[tokio::test]
async fn the_length_of_a_body_reaches_the_client() {
    let graceful = graceful();
    let app: Router = Router::new()
        .route("/", routing::get(|| async { "hello" }))
        .layer(graceful.layer());
    let response = app.oneshot(get("/")).await.unwrap();
    assert_eq!(response.headers()["content-length"], "5");
    assert_eq!(response.body().size_hint().exact(), Some(5));
}

/// A request of a page of another origin.
fn cross_origin(method: http::Method) -> Request<Empty<Bytes>> {
    let mut request = get("/");
    *request.method_mut() = method;
    let headers = request.headers_mut();
    headers.insert("origin", "https://app.example.com".parse().unwrap());
    headers.insert("access-control-request-method", "POST".parse().unwrap());
    request
}

fn is_readable<B>(response: &Response<B>) -> bool {
    response
        .headers()
        .contains_key("access-control-allow-origin")
}

/// The documented order: CORS and request ids are outside of the layer, timeouts inside.
#[tokio::test]
async fn with_cors_outside_a_page_can_read_the_refusal_and_the_preflight_passes() {
    let (graceful, busy) = draining(prompt());
    let cors = CorsLayer::new()
        .allow_origin(Any)
        .expose_headers([http::header::RETRY_AFTER]);
    let id = http::HeaderName::from_static("x-request-id");
    let timeout = Duration::from_secs(1);
    let app = hello_at("/")
        .layer(TimeoutLayer::with_status_code(
            StatusCode::GATEWAY_TIMEOUT,
            timeout,
        ))
        .layer(graceful.layer())
        .layer(cors)
        .layer(PropagateRequestIdLayer::new(id.clone()))
        .layer(TraceLayer::new_for_http())
        .layer(SetRequestIdLayer::new(id, Numbered::default()));

    let preflight = cross_origin(http::Method::OPTIONS);
    let response = app.clone().oneshot(preflight).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert!(is_readable(&response), "{response:?}");
    assert_eq!(graceful.in_flight(), 1, "the busy one");
    assert_eq!(graceful.snapshot().refused_draining, 0);

    let request = cross_origin(http::Method::GET);
    let response = app.clone().oneshot(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(is_readable(&response), "{response:?}");
    let headers = response.headers();
    assert_eq!(headers["access-control-expose-headers"], "retry-after");
    assert_eq!(headers["retry-after"], "1");
    assert!(headers.contains_key("x-request-id"));
    assert_eq!(graceful.snapshot().refused_draining, 1);

    drop(busy);
    graceful.stopped().await;
}

/// axum takes the answer to unknown paths from the router that is merged into the other one.
#[cfg(feature = "axum")]
#[tokio::test]
async fn with_the_app_merged_into_the_probes_the_404_stays_inside_the_layers() {
    for inside in [true, false] {
        let graceful = graceful();
        let layered = hello_at("/")
            .layer(graceful.layer())
            .layer(CorsLayer::permissive());
        let app = if inside {
            graceful.probes().merge(layered)
        } else {
            layered.merge(graceful.probes())
        };
        let unknown = Request::get("/unknown").body(Body::empty()).unwrap();
        let response = app.clone().oneshot(unknown).await.unwrap();
        assert_eq!(response.status(), StatusCode::NOT_FOUND);
        assert_eq!(is_readable(&response), inside);
        let ready = Request::get("/readyz").body(Body::empty()).unwrap();
        let response = app.oneshot(ready).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        assert!(!is_readable(&response));
    }
}

#[tokio::test]
async fn with_cors_inside_the_refusal_is_hidden_from_the_page() {
    let (graceful, _busy) = draining(prompt());
    let app = hello_at("/")
        .layer(CorsLayer::permissive())
        .layer(graceful.layer());
    for method in [http::Method::OPTIONS, http::Method::GET] {
        let response = app.clone().oneshot(cross_origin(method)).await.unwrap();
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert!(!is_readable(&response), "{response:?}");
    }
}

#[tokio::test]
async fn the_documented_order_fits_one_service_builder_too() {
    let graceful = graceful();
    let service = ServiceBuilder::new()
        .layer(CorsLayer::permissive())
        .layer(graceful.layer())
        .service_fn(|_: Request<Empty<Bytes>>| async {
            Ok::<_, Infallible>(Response::new(hello().await))
        });
    counts_and_refuses(service, &graceful, "/").await;
}

/// This holds if the limit has a `.layer(…)` of its own, and not if it is in one `ServiceBuilder`
/// with the layer.
#[tokio::test]
async fn a_request_that_waits_for_an_inner_limit_of_the_router_is_in_flight() {
    for (one_builder, in_flight) in [(false, 2), (true, 1)] {
        let graceful = graceful();
        let app = Router::new().route("/", routing::get(pending::<&'static str>));
        let limit = tower::limit::ConcurrencyLimitLayer::new(1);
        let app = if one_builder {
            app.layer(ServiceBuilder::new().layer(graceful.layer()).layer(limit))
        } else {
            app.layer(limit).layer(graceful.layer())
        };
        // One limit for all requests.
        let app: Router = app.with_state(());
        let mut first = tokio_test::task::spawn(app.clone().oneshot(get("/").map(Body::new)));
        tokio_test::assert_pending!(first.poll());
        let mut second = tokio_test::task::spawn(app.oneshot(get("/").map(Body::new)));
        tokio_test::assert_pending!(second.poll());
        assert_eq!(graceful.in_flight(), in_flight, "{one_builder}");
    }
}
