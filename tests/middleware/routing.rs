//! axum's routing through the layer: the same requests to the same router, with the layer in each place
//! and without it. Responses must be equal in everything a server sees.

use std::{collections::BTreeMap, convert::Infallible, io};

use axum::{
    Extension, Form, Json, Router,
    body::Body,
    extract::rejection::NestedPathRejection,
    extract::{
        ConnectInfo, DefaultBodyLimit, MatchedPath, NestedPath, OriginalUri, Path, Query, RawQuery,
        State, WebSocketUpgrade,
    },
    response::{AppendHeaders, IntoResponse, Redirect, Response},
    routing::{MethodFilter, any, get, on, post},
};
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri, Version, header};
use http_body::{Body as _, SizeHint};
use http_body_util::{BodyExt, Full};
use tower::{Layer, ServiceExt, service_fn};
use tower_graceful::{Graceful, GracefulLayer};

use crate::support::{Script, Step, lame_duck};

/// A last frame of this size or more does not announce the end of its body.
const LARGE: usize = 16 * 1024;

#[derive(Clone)]
struct Greeting(&'static str);

fn nested() -> Router<Greeting> {
    let deeper = Router::new()
        .route("/{id}", get(paths))
        .route("/", get(|| async { "deeper" }));
    Router::new()
        .route("/", get(|| async { "nested" }))
        .route(
            "/state",
            get(|State(it): State<Greeting>| async move { it.0 }),
        )
        .route("/paths/{id}", any(paths))
        .nest("/deep/{outer}", deeper)
        .fallback(|uri: Uri| async move { (StatusCode::IM_A_TEAPOT, uri.to_string()) })
        .method_not_allowed_fallback(|method: Method| async move {
            (StatusCode::METHOD_NOT_ALLOWED, format!("not {method}"))
        })
}

/// What each extractor of paths says.
async fn paths(
    path: Option<MatchedPath>,
    OriginalUri(original): OriginalUri,
    nest: Result<NestedPath, NestedPathRejection>,
    uri: Uri,
    RawQuery(query): RawQuery,
    Path(parts): Path<BTreeMap<String, String>>,
) -> String {
    let path = path.as_ref().map(MatchedPath::as_str);
    let nest = nest.as_ref().ok().map(NestedPath::as_str);
    format!("{path:?} {nest:?} {original} {uri} {query:?} {parts:?}")
}

async fn stream() -> Body {
    let chunks = ["one", "", "two", "three"];
    Body::from_stream(stream::iter(chunks.map(Ok::<_, Infallible>)))
}

async fn failing() -> Body {
    let chunks = [Ok("one"), Err(io::Error::other("broken"))];
    Body::from_stream(stream::iter(chunks))
}

async fn trailers() -> Body {
    let trailers = HeaderMap::from_iter([(
        HeaderName::from_static("x-trailer"),
        HeaderValue::from_static("last"),
    )]);
    Body::new(Full::new(Bytes::from("data")).with_trailers(async { Some(Ok(trailers)) }))
}

async fn headers() -> impl IntoResponse {
    (
        StatusCode::CREATED,
        AppendHeaders([
            (header::SET_COOKIE, "a=1"),
            (header::SET_COOKIE, "b=2"),
            (header::CONNECTION, "x-hop"),
            (HeaderName::from_static("x-hop"), "kept"),
        ]),
        Extension(Greeting("in the response")),
        "created",
    )
}

async fn echo(request: Request<Body>) -> Response {
    let (parts, body) = request.into_parts();
    let length = parts.headers.get(header::CONTENT_LENGTH).cloned();
    let mut response = Response::new(body);
    response
        .headers_mut()
        .extend(length.map(|it| (HeaderName::from_static("x-length"), it)));
    response
}

/// Responses with bodies of all kinds.
fn bodies() -> Router {
    Router::new()
        .route("/stream", get(stream))
        .route("/failing", get(failing))
        .route("/trailers", get(trailers))
        .route(
            "/steps",
            get(|| async { Body::new(Script::new([Step::Data("a"), Step::Data("b")])) }),
        )
        .route("/large", get(|| async { vec![b'x'; 4 * LARGE] }))
        .route("/just-large", get(|| async { vec![b'x'; LARGE] }))
        .route("/headers", get(headers))
        .route("/empty", get(|| async {}))
        .route("/no-content", any(|| async { StatusCode::NO_CONTENT }))
        .route(
            "/not-modified",
            any(|| async { (StatusCode::NOT_MODIFIED, [(header::ETAG, "\"1\"")]) }),
        )
}

fn routes() -> Router {
    let other = Router::new()
        .route("/merged", get(|| async { "merged" }))
        .route(
            "/users/{id}",
            post(|Path(id): Path<u32>| async move { format!("made {id}") }),
        );
    let service = service_fn(|request: Request<Body>| async move {
        Ok::<_, Infallible>(Response::new(Body::from(request.uri().to_string())))
    });
    Router::new()
        .route("/", get(|| async { "root" }))
        .route(
            "/users/{id}",
            get(|Path(id): Path<u32>| async move { format!("user {id}") }),
        )
        .route("/files/{*rest}", get(paths))
        .route("/paths/{a}/{b}", any(paths))
        .route(
            "/any",
            any(|method: Method| async move { method.to_string() }),
        )
        .route(
            "/head",
            on(MethodFilter::HEAD, || async { [("x-head", "own")] }).get(|| async { "get" }),
        )
        .route(
            "/several",
            get(|| async { "get" })
                .post(|| async { "post" })
                .delete(|| async {}),
        )
        .route(
            "/length",
            get(|| async { ([(header::CONTENT_LENGTH, "4")], Body::from("four")) }),
        )
        .route(
            "/json",
            post(|Json(it): Json<BTreeMap<String, u8>>| async move { Json(it) }),
        )
        .route(
            "/form",
            any(|Form(it): Form<BTreeMap<String, String>>| async move { Json(it) }),
        )
        .route(
            "/query",
            get(|Query(it): Query<BTreeMap<String, u8>>| async move { Json(it) }),
        )
        .route("/text", post(|it: String| async move { it }))
        .route(
            "/limited",
            post(|it: Bytes| async move { it }).layer(DefaultBodyLimit::max(10)),
        )
        .route("/unread", post(|| async { "not read" }))
        .route("/echo", any(echo))
        .merge(bodies())
        .route(
            "/redirect",
            get(|| async { Redirect::permanent("/users/7") }),
        )
        .route(
            "/failed",
            get(|| async { Err::<(), _>((StatusCode::BAD_GATEWAY, "upstream")) }),
        )
        .route(
            "/extension",
            get(|Extension(it): Extension<Greeting>| async move { it.0 }),
        )
        .route(
            "/no-extension",
            get(|Extension(it): Extension<u8>| async move { it.to_string() }),
        )
        .route(
            "/peer",
            get(|ConnectInfo(it): ConnectInfo<u8>| async move { it.to_string() }),
        )
        .route(
            "/ws",
            any(|it: WebSocketUpgrade| async move { it.on_upgrade(|_| async {}) }),
        )
        .route_service("/service", service)
        .merge(other)
        .nest("/api", nested().with_state(Greeting("from the state")))
        .nest_service("/files-of", service)
        .fallback(|method: Method, uri: Uri| async move {
            (StatusCode::NOT_FOUND, format!("no {method} {uri}"))
        })
        .layer(Extension(Greeting("from a layer")))
}

/// The router with the layer in each place where it can be.
fn layered(layer: &GracefulLayer) -> Vec<(&'static str, Router)> {
    let layer = || layer.clone();
    vec![
        ("as the last layer", routes().layer(layer())),
        ("as a route layer", routes().route_layer(layer())),
        (
            "round the router",
            Router::new().fallback_service(layer().layer(routes())),
        ),
        (
            "in a router that is merged",
            Router::new().merge(routes().layer(layer())),
        ),
        ("twice", routes().route_layer(layer()).layer(layer())),
    ]
}

/// A body of a request, made anew for each router.
#[derive(Clone, Copy, Debug)]
enum Sent {
    Nothing,
    Text(&'static str),
    Zeros(usize),
    Pieces,
    Trailers,
    Broken,
}

impl Sent {
    fn body(self) -> Body {
        match self {
            Self::Nothing => Body::empty(),
            Self::Text(text) => Body::from(text),
            Self::Zeros(length) => Body::from(vec![0; length]),
            Self::Pieces => Body::from_stream(stream::iter(["12", "34"].map(Ok::<_, Infallible>))),
            Self::Trailers => {
                let trailers = async {
                    Some(Ok(HeaderMap::from_iter([(
                        header::ETAG,
                        HeaderValue::from_static("1"),
                    )])))
                };
                Body::new(Full::new(Bytes::from("data")).with_trailers(trailers))
            }
            Self::Broken => {
                Body::from_stream(stream::iter([Ok("12"), Err(io::Error::other("gone"))]))
            }
        }
    }
}

const PATHS: &[&str] = &[
    "/",
    "//",
    "/?a=1&b=%20",
    "/merged",
    "/merged/",
    "/users/7",
    "/users/7/",
    "/users/",
    "/users/x",
    "/users/%37",
    "/users/%2F",
    "/users/%ff",
    "/users/99999999999",
    "/files/",
    "/files/a/b%20c",
    "/files/a//b/../c",
    "/paths/a/b?c=d",
    "/paths/%C3%A4/%00",
    "/paths//b",
    "/any",
    "/head",
    "/several",
    "/length",
    "/form?a=b",
    "/query",
    "/query?a=1",
    "/query?a=x",
    "/query?a=1&a=2",
    "/json",
    "/text",
    "/limited",
    "/unread",
    "/echo",
    "/stream",
    "/failing",
    "/trailers",
    "/steps",
    "/large",
    "/just-large",
    "/headers",
    "/empty",
    "/no-content",
    "/not-modified",
    "/redirect",
    "/failed",
    "/extension",
    "/no-extension",
    "/peer",
    "/ws",
    "/service",
    "/service/x",
    "/api",
    "/api/",
    "/api/state",
    "/api/paths/7?x",
    "/api/deep/a/7",
    "/api/deep/a",
    "/api/deep/a/",
    "/api/nothing",
    "/api//",
    "/files-of/a/b?c",
    "/files-of",
    "/nothing",
    "/%2e%2e/users/7",
    "*",
    "http://other.example/users/7?a",
];

const METHODS: &[&str] = &[
    "GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "BREW",
];

/// Paths that read a body, content types, and bodies.
const READ: &[&str] = &[
    "/json", "/form", "/text", "/limited", "/unread", "/echo", "/several", "/nothing",
];
const KINDS: &[Option<&str>] = &[
    None,
    Some("application/json"),
    Some("application/x-www-form-urlencoded"),
    Some("text/plain; charset=utf-8"),
];
const SENT: &[Sent] = &[
    Sent::Nothing,
    Sent::Text("{\"a\":1}"),
    Sent::Text("{\"a\":1000}"),
    Sent::Text("{\"a\":"),
    Sent::Text("a=1&b=2"),
    Sent::Text("\u{e4}"),
    Sent::Zeros(10),
    Sent::Zeros(11),
    Sent::Zeros(3 << 20),
    Sent::Pieces,
    Sent::Trailers,
    Sent::Broken,
];

type Case = (
    &'static str,
    &'static str,
    Version,
    Option<&'static str>,
    Sent,
);

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for &path in PATHS {
        for &method in METHODS {
            let version = if method == "BREW" {
                Version::HTTP_2
            } else {
                Version::HTTP_11
            };
            cases.push((method, path, version, None, Sent::Nothing));
        }
        cases.push(("GET", path, Version::HTTP_10, None, Sent::Nothing));
    }
    for &path in READ {
        for &kind in KINDS {
            for &sent in SENT {
                cases.push(("POST", path, Version::HTTP_11, kind, sent));
            }
        }
    }
    cases.push((
        "CONNECT",
        "host.example:443",
        Version::HTTP_11,
        None,
        Sent::Nothing,
    ));
    cases
}

fn request((method, path, version, kind, sent): Case) -> Request<Body> {
    let mut request = Request::new(sent.body());
    *request.method_mut() = method.parse().unwrap();
    *request.uri_mut() = path.parse().unwrap();
    *request.version_mut() = version;
    if let Some(kind) = kind {
        let kind = HeaderValue::from_static(kind);
        request.headers_mut().insert(header::CONTENT_TYPE, kind);
    }
    if let Sent::Zeros(length) = sent {
        request
            .headers_mut()
            .insert(header::CONTENT_LENGTH, length.into());
    }
    request
}

/// Everything that a server sees of a response.
#[derive(Debug, PartialEq)]
struct Seen {
    status: StatusCode,
    version: Version,
    headers: HeaderMap,
    extensions: usize,
    /// Before the first frame, and after each frame: the size hint, and whether the stream is at its end.
    hints: Vec<(u64, Option<u64>, bool)>,
    frames: Vec<Result<Piece, String>>,
}

#[derive(Debug, PartialEq)]
enum Piece {
    Data(Bytes),
    Trailers(HeaderMap),
}

async fn seen(router: &Router, case: Case) -> Seen {
    let response = router.clone().oneshot(request(case)).await.unwrap();
    let (parts, mut body) = response.into_parts();
    let hint = |hint: SizeHint, end| (hint.lower(), hint.upper(), end);
    let mut hints = vec![hint(body.size_hint(), body.is_end_stream())];
    let mut frames = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = match frame {
            Ok(frame) if frame.is_data() => Ok(Piece::Data(frame.into_data().unwrap())),
            Ok(frame) => Ok(Piece::Trailers(frame.into_trailers().unwrap())),
            Err(error) => Err(error.to_string()),
        };
        // The end of the stream is announced later after a large frame, as the documentation says.
        let large = matches!(&frame, Ok(Piece::Data(data)) if data.len() >= LARGE);
        let failed = frame.is_err();
        frames.push(frame);
        hints.push(hint(body.size_hint(), !large && body.is_end_stream()));
        if failed {
            break;
        }
    }
    Seen {
        status: parts.status,
        version: parts.version,
        headers: parts.headers,
        extensions: parts.extensions.len(),
        hints,
        frames,
    }
}

/// Compares the responses of the plain router with those of all layered ones, after `change` has been made to the
/// headers of the plain response.
async fn compare(layer: &GracefulLayer, change: impl Fn(&mut Seen, Case)) {
    let plain = routes();
    let layered = layered(layer);
    let (mut answered, cases) = (BTreeMap::<StatusCode, usize>::new(), cases());
    for &case in &cases {
        let expected = seen(&plain, case).await;
        *answered.entry(expected.status).or_default() += 1;
        for (place, router) in &layered {
            let mut expected = seen(&plain, case).await;
            if *place != "as a route layer" || !is_fallback(&expected) {
                change(&mut expected, case);
            }
            assert_eq!(seen(router, case).await, expected, "{place}: {case:?}");
        }
    }
    assert_eq!(layer.handle().in_flight(), 0);
    // The table reaches what it is for.
    for status in [
        200, 201, 204, 304, 308, 400, 404, 405, 413, 415, 418, 422, 500, 502,
    ] {
        let status = StatusCode::from_u16(status).unwrap();
        assert!(
            answered.contains_key(&status),
            "{status} is not in {answered:?}"
        );
    }
    assert!(cases.len() > 1000, "{}", cases.len());
}

/// Whether a fallback has answered. A route layer does not see its requests.
fn is_fallback(seen: &Seen) -> bool {
    matches!(seen.status, StatusCode::NOT_FOUND | StatusCode::IM_A_TEAPOT)
}

#[tokio::test]
async fn responses_are_those_of_the_router_without_the_layer() {
    compare(&GracefulLayer::new(), |_, _| {}).await;
}

#[tokio::test]
async fn responses_to_named_requests_are_too() {
    let graceful = Graceful::builder()
        .name_requests(true)
        .max_in_flight(10)
        .build()
        .unwrap();
    compare(&graceful.layer(), |_, _| {}).await;
}

/// In the lame-duck phase HTTP/1 responses have `Connection: close` and the version of the request, and a last
/// data frame does not announce the end of its body. Nothing else is changed.
#[tokio::test]
async fn responses_differ_by_connection_close_in_the_lame_duck_phase() {
    compare(&lame_duck().layer(), |seen, (_, _, version, ..)| {
        if version < Version::HTTP_2 {
            let other = seen.headers.get(header::CONNECTION);
            let close = other.map_or("close".to_owned(), |other| {
                format!("close, {}", other.to_str().unwrap())
            });
            let close = HeaderValue::try_from(close).unwrap();
            seen.headers.insert(header::CONNECTION, close);
        }
        if version == Version::HTTP_10 {
            seen.version = version;
        }
        for (frame, (.., ends)) in seen.frames.iter().zip(&mut seen.hints[1..]) {
            *ends &= !matches!(frame, Ok(Piece::Data(_)));
        }
    })
    .await;
}
