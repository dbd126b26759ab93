//! In the lame-duck phase every request is served, and every HTTP/1 response carries `Connection:
//! close`.

use std::future::ready;

use bytes::Bytes;
use http::{Request, Response, StatusCode, Version};
use http_body_util::{Empty, Full};
use tokio::sync::oneshot;
use tokio_test::{assert_pending, assert_ready_ok, task};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_graceful::{Graceful, Phase};

use crate::support::{connection, get, lame_duck, prompt, start, text, whole};

type Answer = Result<Response<Full<Bytes>>, &'static str>;

/// Serves `response` to a request of this version.
async fn served(
    graceful: &Graceful,
    version: Version,
    response: http::response::Builder,
) -> Response<tower_graceful::GracefulBody<Full<Bytes>>> {
    let response = response.body(Full::from("hello")).unwrap();
    let mut response = Some(response);
    let inner = service_fn(
        move |_: Request<Empty<Bytes>>| -> std::future::Ready<Answer> {
            ready(Ok(response.take().unwrap()))
        },
    );
    let mut request = get("/");
    *request.version_mut() = version;
    graceful
        .layer()
        .layer(inner)
        .oneshot(request)
        .await
        .unwrap()
}

#[tokio::test]
async fn a_request_is_served_and_its_client_asked_to_leave() {
    for version in [Version::HTTP_10, Version::HTTP_11] {
        let response = Response::builder()
            .status(StatusCode::CREATED)
            .header("set-cookie", "a=1")
            .header("set-cookie", "b=2");
        let response = served(&lame_duck(), version, response).await;
        assert_eq!(response.status(), StatusCode::CREATED);
        assert_eq!(connection(&response), ["close"]);
        let cookies: Vec<_> = response.headers().get_all("set-cookie").iter().collect();
        assert_eq!(cookies, ["a=1", "b=2"]);
        assert_eq!(response.headers().len(), 3, "nothing else is added");
        assert_eq!(text(response.into_body()).await, "hello");
    }
}

#[tokio::test]
async fn while_serving_responses_are_unchanged() {
    let graceful = Graceful::new();
    let response = Response::builder().header("connection", "keep-alive, x-hop");
    let response = served(&graceful, Version::HTTP_11, response).await;
    assert_eq!(connection(&response), ["keep-alive, x-hop"]);
    assert_eq!(response.headers().len(), 1);
}

#[tokio::test]
async fn keep_alive_is_removed_and_hop_by_hop_options_stay() {
    for (before, after) in [
        (&["keep-alive"][..], "close"),
        (&["Keep-Alive, X-Hop"], "close, X-Hop"),
        (&["x-hop", "keep-alive"], "close, x-hop"),
        (&["close"], "close"),
    ] {
        let response = before.iter().fold(Response::builder(), |response, value| {
            response.header("connection", *value)
        });
        let response = served(&lame_duck(), Version::HTTP_11, response).await;
        assert_eq!(connection(&response), [after]);
    }
}

#[tokio::test]
async fn the_response_to_an_upgrade_is_unchanged() {
    let response = Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header("connection", "upgrade")
        .header("upgrade", "websocket");
    let response = served(&lame_duck(), Version::HTTP_11, response).await;
    assert_eq!(connection(&response), ["upgrade"]);
    assert_eq!(response.headers().len(), 2);
}

#[tokio::test]
async fn http2_has_no_connection_field() {
    let response = served(&lame_duck(), Version::HTTP_2, Response::builder()).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert!(response.headers().is_empty());
}

#[test]
fn the_response_to_an_earlier_request_asks_its_client_to_leave_too() {
    for (graceful, phase) in [
        (Graceful::new(), Phase::LameDuck),
        (prompt().build().unwrap(), Phase::Draining),
    ] {
        let (answer, answered) = oneshot::channel::<Answer>();
        let mut request = start(&graceful, async { answered.await.unwrap() });
        assert_pending!(request.poll());
        graceful.shutdown();
        assert_eq!(graceful.phase(), phase);
        answer.send(Ok(whole("late"))).unwrap();
        let response = assert_ready_ok!(request.poll());
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(connection(&response), ["close"], "{phase}");
        assert_eq!(graceful.in_flight(), 1, "its body is still to come");
    }
}

#[test]
fn the_version_of_the_request_decides_and_not_that_of_the_response() {
    let graceful = lame_duck();
    let inner = service_fn(|_: Request<Empty<Bytes>>| {
        let mut response = whole("hi");
        *response.version_mut() = Version::HTTP_11;
        ready(Ok::<_, &'static str>(response))
    });
    let mut request = get("/");
    *request.version_mut() = Version::HTTP_2;
    let mut future = task::spawn(graceful.layer().layer(inner).call(request));
    let response = assert_ready_ok!(future.poll());
    assert!(connection(&response).is_empty());
}
