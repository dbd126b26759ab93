//! The service that `serve` gives to hyper: it calls the user's service, and asks the peer to leave with the
//! response when that is due.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll, ready},
};

use axum::{body::Body, extract::Request, response::Response};
use http::{HeaderValue, Method, StatusCode, Version, header};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper_util::service::TowerToHyperService;
use pin_project_lite::pin_project;
use tokio::time;
use tower_service::Service;

use super::{
    body::{Kind, OwnedBody, Upload},
    owner::{OpenUpload, Owner},
    tunnel,
};
use crate::{
    connection::{
        flags::{BODY, WATCHED},
        outside::Window,
        stagger::SLOT_REACHED,
        upgraded::TunnelNumber,
    },
    middleware::connection_close,
    phase::Phase,
};

/// A service whose responses ask the peer to leave when it is due.
///
/// It implements hyper's `Service` and not tower's. hyper calls its own service as soon as it has read a
/// request head. A tower service would be called only when the response is polled, which never happens
/// if the client has closed its writing side by then.
pub(super) struct Owned<S> {
    pub(super) inner: TowerToHyperService<S>,
    pub(super) owner: Owner,
    pub(super) half_close: bool,
    pub(super) http2_only: bool,
}

impl<S> hyper::service::Service<http::Request<Incoming>> for Owned<S>
where
    S: Service<Request, Response = Response, Error = Infallible> + Clone,
{
    type Response = http::Response<OwnedBody>;
    type Error = Infallible;
    type Future = OwnedFuture<Inner<S>>;

    fn call(&self, mut request: http::Request<Incoming>) -> Self::Future {
        let version = request.version();
        if version < Version::HTTP_2 {
            self.owner.0.sniffer.head_is_complete();
            // Other methods count as having one.
            let bodiless = matches!(*request.method(), Method::GET | Method::HEAD);
            let body = bodiless && !request.body().is_end_stream();
            self.owner.0.flags.put(BODY, body);
        }
        if self.http2_only && version < Version::HTTP_2 {
            return OwnedFuture {
                inner: None,
                version,
                asks: false,
                connect: false,
                is_lost_by_fin: false,
                tunnel: None,
                window: None,
                owner: None,
            };
        }
        // hyper inserts an extension only for a request that may become an upgrade.
        let asks = !request.extensions().is_empty();
        let tunnel = if asks {
            self.owner.asks_for_upgrade(&request)
        } else {
            None
        };
        self.owner.note_peer(&mut request);
        let watched = self.owner.0.flags.has(WATCHED);
        OwnedFuture {
            window: if watched {
                self.owner.watch(&request)
            } else {
                None
            },
            version,
            asks,
            connect: request.method() == Method::CONNECT,
            is_lost_by_fin: version < Version::HTTP_2
                && !self.half_close
                && self.owner.loses_by_fin(&request),
            tunnel,
            owner: Some(self.owner.clone()),
            inner: Some(
                self.inner
                    .call(request.map(|body| self.body(version, body))),
            ),
        }
    }
}

impl<S> Owned<S> {
    /// Over HTTP/2 a task that reads a body after its response is not known otherwise.
    fn body(&self, version: Version, body: Incoming) -> Body {
        if version < Version::HTTP_2 || body.is_end_stream() {
            return Body::new(body);
        }
        Body::new(Upload {
            inner: body,
            open: Some(OpenUpload::new(self.owner.clone())),
        })
    }
}

pub(super) type Inner<S> = <TowerToHyperService<S> as hyper::service::Service<Request>>::Future;

pin_project! {
    pub(super) struct OwnedFuture<F> {
        // `None` for an HTTP/1 request to a server that speaks HTTP/2 only.
        #[pin]
        inner: Option<F>,
        version: Version,
        // It asks for an upgrade.
        asks: bool,
        connect: bool,
        // An HTTP/1 request that arrived while requests were admitted, and that a FIN of its client drops.
        is_lost_by_fin: bool,
        // The tunnel that an HTTP/2 request asks for.
        tunnel: Option<TunnelNumber>,
        // Checks whether the layer sees the request.
        window: Option<Window>,
        // Moves to the body. Of a tunnel it is also kept here.
        owner: Option<Owner>,
    }

    impl<F> PinnedDrop for OwnedFuture<F> {
        fn drop(this: Pin<&mut Self>) {
            let this = this.project();
            if let Some(owner) = this.owner {
                if let Some(window) = this.window.take() {
                    window.close(&owner.0.owner);
                }
                if *this.is_lost_by_fin {
                    owner.0.dropped_unanswered();
                }
                if let Some(number) = this.tunnel.take() {
                    tunnel::leave(owner, number);
                }
            }
        }
    }
}

impl<F> Future for OwnedFuture<F>
where
    F: Future<Output = Result<Response, Infallible>>,
{
    type Output = Result<http::Response<OwnedBody>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let Some(inner) = this.inner.as_pin_mut() else {
            return Poll::Ready(Ok(version_not_supported(*this.version)));
        };
        let Some(owner) = this.owner else {
            return Poll::Pending;
        };
        let polled = if owner.is_spread(owner.phase()) {
            let slot_reached = time::Instant::now() >= owner.slot_time();
            SLOT_REACHED.sync_scope(slot_reached, || inner.poll(cx))
        } else {
            inner.poll(cx)
        };
        let Ok(mut response) = ready!(polled);
        if *this.version < Version::HTTP_2 {
            if is_upgrade(&response, *this.connect) {
                owner.upgraded();
            } else if *this.asks {
                owner.0.not_upgraded();
            }
        }
        if let Some(number) = *this.tunnel {
            // The executor is called next, by the task that polls this future.
            if response.status().is_success() {
                tunnel::grant(number);
            }
        }
        if let Some(window) = this.window.take() {
            owner.answered(window, &response);
        }
        let phase = owner.phase();
        if phase > Phase::Serving {
            owner.ask_to_leave(&mut response, *this.version, phase);
        }
        let owner = match this.tunnel {
            Some(_) => this.owner.clone(),
            None => this.owner.take(),
        };
        let kind = match owner {
            Some(owner) if *this.version == Version::HTTP_2 => Kind::Http2(owner),
            Some(owner) if is_event_stream(&response) => Kind::Events(owner),
            _ => Kind::Other,
        };
        Poll::Ready(Ok(response.map(|inner| OwnedBody { inner, kind })))
    }
}

/// The response to an HTTP/1 client of a server that speaks HTTP/2 only
/// ([RFC 9110 §15.6.6](https://www.rfc-editor.org/rfc/rfc9110#section-15.6.6)).
#[cold]
fn version_not_supported(version: Version) -> http::Response<OwnedBody> {
    let mut response = Response::new(Body::from("this server speaks HTTP/2 only\n"));
    *response.status_mut() = StatusCode::HTTP_VERSION_NOT_SUPPORTED;
    let text = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, text);
    connection_close::say_close(&mut response, version);
    response.map(|inner| OwnedBody {
        inner,
        kind: Kind::Other,
    })
}

/// Whether the connection speaks another protocol after this response.
fn is_upgrade(response: &Response, connect: bool) -> bool {
    let status = response.status();
    status == StatusCode::SWITCHING_PROTOCOLS || connect && status.is_success()
}

fn is_event_stream(response: &Response) -> bool {
    const EVENTS: &[u8] = b"text/event-stream";
    // An event stream has no known length, and most other bodies have one. This check is cheaper than
    // the search for the header.
    if response.body().size_hint().exact().is_some() {
        return false;
    }
    let kind = response.headers().get(header::CONTENT_TYPE);
    let kind = kind.and_then(|kind| kind.as_bytes().get(..EVENTS.len()));
    kind.is_some_and(|kind| kind.eq_ignore_ascii_case(EVENTS))
}

#[cfg(all(test, not(tower_graceful_loom)))]
mod tests {
    use std::future::{Ready, ready};

    use futures_util::FutureExt;

    use super::{super::tunnel::Tunnel, *};
    use crate::handle::graceful::Graceful;

    /// A request that asks for an upgrade, and that is answered in its first poll.
    fn asking(
        owner: &Owner,
        request: &http::Request<()>,
        status: StatusCode,
    ) -> OwnedFuture<Ready<Result<Response, Infallible>>> {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = status;
        OwnedFuture {
            inner: Some(ready(Ok(response))),
            version: request.version(),
            asks: true,
            connect: request.method() == Method::CONNECT,
            is_lost_by_fin: false,
            tunnel: owner.asks_for_upgrade(request),
            window: None,
            owner: Some(owner.clone()),
        }
    }

    /// The path of such a request may be long, and its connection may stay open.
    #[test]
    fn a_refused_upgrade_is_forgotten() {
        let graceful = Graceful::new();
        let shared = graceful.shared();
        let owner = Owner(shared.connections.insert(shared.clone(), None));
        for (status, upgraded) in [
            (StatusCode::FORBIDDEN, 0),
            (StatusCode::OK, 0),
            (StatusCode::SWITCHING_PROTOCOLS, 1),
        ] {
            let future = asking(&owner, &http::Request::new(()), status);
            assert_eq!(shared.upgraded.len(), 1);
            assert!(future.now_or_never().is_some());
            assert_eq!(shared.upgraded.len(), upgraded, "{status}");
        }
        assert!(shared.upgraded.any());
    }

    #[test]
    fn a_tunnel_is_open_from_its_response_until_its_task_ends() {
        let graceful = Graceful::new();
        let shared = graceful.shared();
        let owner = Owner(shared.connections.insert(shared.clone(), None));
        let mut request = http::Request::connect("/room").body(()).unwrap();
        *request.version_mut() = Version::HTTP_2;
        let polled = |status| {
            let mut future = Box::pin(asking(&owner, &request, status));
            assert!(future.as_mut().now_or_never().is_some());
            future
        };
        let tunnels = [(); 2].map(|()| {
            let future = polled(StatusCode::OK);
            let tunnel = Tunnel::begin(&owner).unwrap();
            assert!(Tunnel::begin(&owner).is_none());
            drop(future);
            assert!(shared.upgraded.any());
            tunnel
        });
        assert_eq!(shared.upgraded.len(), 2);
        drop(tunnels);
        assert_eq!(shared.upgraded.len(), 0);
        // Refused, reset before its response, and granted without a task, as when hyper does not accept the response.
        drop(polled(StatusCode::FORBIDDEN));
        assert!(Tunnel::begin(&owner).is_none());
        drop(asking(&owner, &request, StatusCode::OK));
        drop(polled(StatusCode::OK));
        assert!(Tunnel::begin(&owner).is_none());
        assert_eq!(shared.upgraded.len(), 0);
    }
}
