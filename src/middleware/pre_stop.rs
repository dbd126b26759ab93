//! The route for the preStop hook of Kubernetes. A call starts the stop, and is answered when the
//! lame-duck phase is over.

use std::{
    convert::Infallible,
    fmt,
    net::IpAddr,
    pin::Pin,
    sync::atomic::Ordering,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use tower_service::Service;

use super::{callers::Callers, connection_close, probe_body::ProbeBody, probe_route::RouteHandle};
use crate::{
    config::policy,
    events,
    handle::graceful::{Graceful, PhaseReached},
    phase::Phase,
    report::Trigger,
};

impl Graceful {
    /// A route for the `preStop` hook of Kubernetes: it starts the stop, and answers when the
    /// lame-duck phase is over. It is off unless you add it, and is not part of
    /// [`probes`](Self::probes).
    ///
    /// A GET or POST from an allowed address starts the lame-duck phase, as SIGTERM would. The
    /// answer is 200, and is sent when the phase is over. The kubelet sends SIGTERM after that; the
    /// service is already draining then, and the signal changes nothing. Further calls wait for the
    /// same moment. The [report](crate::Report::trigger) contains
    /// [`Trigger::PreStop`](crate::Trigger::PreStop).
    ///
    /// ```
    /// # use axum::Router;
    /// # use tower_graceful::Graceful;
    /// let graceful = Graceful::new();
    /// // status.hostIP of the pod, by the downward API.
    /// let node = std::env::var("NODE_IP").ok().and_then(|ip| ip.parse().ok());
    /// let app: Router = Router::new()
    ///     // your routes
    ///     .layer(graceful.layer());
    /// let pre_stop = graceful.pre_stop().allow(node).into_router(); // /prestop
    /// let app = graceful.probes().merge(pre_stop).merge(app);
    /// ```
    ///
    /// ```yaml
    /// # a container of the pod
    /// env:
    ///   - name: NODE_IP
    ///     valueFrom: { fieldRef: { fieldPath: status.hostIP } }
    /// lifecycle:
    ///   preStop:
    ///     httpGet: { path: /prestop, port: 3000 }
    /// ```
    ///
    /// # Keep the route private
    ///
    /// Every client that reaches this route can stop the service. So the route answers 403 to
    ///
    /// - every peer that is neither loopback nor [allowed](PreStop::allow);
    /// - every request with a header field that proxies add: `Forwarded`, `Via`, `X-Real-IP`,
    ///   `True-Client-IP`, `CF-Connecting-IP`, and all fields that begin with `X-Forwarded-`,
    ///   `X-Envoy-` or `l5d-`. A sidecar or reverse proxy on the same host connects from loopback,
    ///   for any client;
    /// - every request whose peer address is unknown.
    ///
    /// A proxy that adds none of these fields is not recognized. Examples are nginx without a
    /// `proxy_set_header` for one of them, a layer-4 proxy, and
    /// a kernel that rewrites source addresses (Kubernetes Services with `externalTrafficPolicy:
    /// Cluster` make traffic appear to come from a node). In such a network, put the route on a
    /// separate port that no Service and no Ingress exposes.
    ///
    /// Loopback is always allowed. So a service that requests URLs which its clients choose (server-side
    /// request forgery) can be made to call the route itself, as any process on the same host can. In
    /// such a service, put the route on a separate port that these requests cannot reach.
    ///
    /// The peer address is known on every server of [`serve`](Self::serve), and on other servers
    /// with axum's `into_make_service_with_connect_info::<SocketAddr>()`. The address of the
    /// kubelet depends on the network plugin: it is often `status.hostIP`, and with bridge plugins
    /// the pod's default gateway. A 403 is logged at `WARN` with the address, at most once a second. Allow
    /// that address, or a range with [`allow_if`](PreStop::allow_if).
    ///
    /// # Which preStop hook to choose
    ///
    /// Kubernetes removes the endpoint and runs the hook at the same time, and sends SIGTERM when
    /// the hook has ended. The time of the hook counts towards `terminationGracePeriodSeconds`
    /// ([container
    /// hooks](https://kubernetes.io/docs/concepts/containers/container-lifecycle-hooks/)).
    ///
    /// | hook | choose it when | the grace period |
    /// |---|---|---|
    /// | none | in most cases: [`drain_delay`](crate::GracefulBuilder::drain_delay) keeps serving after SIGTERM, so no hook is needed | equal to `terminationGracePeriodSeconds` |
    /// | `sleep` | you cannot change the service; readiness still succeeds during the sleep | shorter by the sleep, with a `drain_delay` of zero |
    /// | `exec` | a command has to run in the container first; the image must contain it | shorter by the command's time |
    /// | `httpGet` of this route | SIGTERM must come last, for example because other containers of the pod stop at it; or the hook should end early together with the delay, by [`leave_when_quiet`](crate::GracefulBuilder::leave_when_quiet) | equal to `terminationGracePeriodSeconds`: the clock starts with the call |
    ///
    /// Exception: with `externalTrafficPolicy: Local`, or with one replica, all endpoints that a node
    /// may use can be terminating at the same time. Nodes then use a terminating pod only while its
    /// readiness succeeds
    /// ([KEP-1669](https://github.com/kubernetes/enhancements/tree/master/keps/sig-network/1669-proxy-terminating-endpoints)).
    /// There use a `sleep` hook, or a readiness probe whose `failureThreshold` × `periodSeconds` is longer than
    /// [`drain_delay`](crate::GracefulBuilder::drain_delay).
    ///
    /// # Limits
    ///
    /// Merge the route outside the layer, as above. Inside the layer, a call counts as in flight
    /// until it is answered, and is never rejected, as with [`probes`](Self::probes). If the caller
    /// disconnects, the stop continues. HEAD and all methods other than GET and POST are answered
    /// with 405. If the layer wraps a whole router, it counts and rejects them as it does for any path.
    pub fn pre_stop(&self) -> PreStop {
        self.shared().wants_peers.store(true, Ordering::Relaxed);
        PreStop {
            route: RouteHandle::new(self),
            callers: Callers::default(),
        }
    }
}

/// The service of the preStop route, made by [`Graceful::pre_stop`]. That page describes it.
///
/// It is a tower service for any path and any router. Behind the [layer](Graceful::layer), on a
/// path of your own, it needs [`exempt`](crate::GracefulBuilder::exempt). Otherwise the layer
/// rejects a call while draining like any other request.
///
/// | call | answer |
/// |---|---|
/// | GET or POST from an allowed peer | 200 when the lame-duck phase is over; at once from draining on |
/// | any other method | 405 |
/// | a peer that is not allowed or not known, or a proxy | 403, with the reason as text |
#[derive(Clone)]
#[must_use = "a route does nothing until a router has it"]
pub struct PreStop {
    /// A route if [`into_router`](Self::into_router) made this service.
    route: RouteHandle,
    callers: Callers,
}

impl PreStop {
    /// Allows these addresses, in addition to loopback (`127.0.0.0/8` and `::1`). Each call adds
    /// addresses. An IPv4 address also matches the IPv6 address that it is mapped to.
    pub fn allow(mut self, addresses: impl IntoIterator<Item = IpAddr>) -> Self {
        self.callers.allow(addresses);
        self
    }

    /// Allows every address for which `allowed` returns true, for example the addresses of a
    /// network. The function gets IPv4 addresses as IPv4, even on an IPv6 socket. A second call
    /// replaces the first.
    pub fn allow_if(mut self, allowed: impl Fn(IpAddr) -> bool + Send + Sync + 'static) -> Self {
        self.callers.allow_if(allowed);
        self
    }

    /// Returns a router with this route at `/prestop`. Merge it at the root, outside the layer, or
    /// nest it.
    pub fn into_router<S>(mut self) -> axum::Router<S>
    where
        S: Clone + Send + Sync + 'static,
    {
        self.route.graceful.shared().pre_stop.get_or_init(|| ());
        self.route.is_route = true;
        axum::Router::new().route_service(policy::PRESTOP, self)
    }

    fn begin<B>(&self, request: &Request<B>) -> Waiting {
        self.route.graceful.shared().outside.count_probe();
        if !policy::is_pre_stop_method(request.method()) {
            return Waiting::Answer(StatusCode::METHOD_NOT_ALLOWED, "use GET or POST\n".into());
        }
        match self.callers.caller(request) {
            Ok(peer) => {
                let shared = self.route.graceful.shared();
                // If this caller disconnects, its missing answer does not count as lost.
                shared.connections.mark_may_drop(peer);
                shared.trigger(Trigger::PreStop);
                Waiting::Delay(PhaseReached::at_once(&self.route.graceful, Phase::Draining))
            }
            Err(reason) => {
                let limit = &self.route.graceful.shared().refused_calls;
                events::pre_stop_refused(limit, &reason);
                Waiting::Answer(StatusCode::FORBIDDEN, format!("{reason}\n").into())
            }
        }
    }
}

impl<B> Service<Request<B>> for PreStop {
    type Response = Response<ProbeBody>;
    type Error = Infallible;
    type Future = PreStopFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> PreStopFuture {
        PreStopFuture {
            waiting: self.begin(&request),
            head: *request.method() == Method::HEAD,
            version: request.version(),
            graceful: self.route.graceful.clone(),
        }
    }
}

impl fmt::Debug for PreStop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PreStop")
            .field("allowed", &self.callers.addresses)
            .field("graceful", &self.route.graceful)
            .field("is_route", &self.route.is_route)
            .finish_non_exhaustive()
    }
}

#[derive(Debug)]
enum Waiting {
    Delay(PhaseReached),
    Answer(StatusCode, Bytes),
}

/// The response future of [`PreStop`]. It is ready when the lame-duck phase is over, and at once for a 403
/// or 405. Dropping it does not cancel the stop.
#[derive(Debug)]
#[must_use = "futures do nothing unless polled"]
pub struct PreStopFuture {
    waiting: Waiting,
    head: bool,
    version: http::Version,
    graceful: Graceful,
}

impl Future for PreStopFuture {
    type Output = Result<Response<ProbeBody>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let (status, text) = match &mut self.waiting {
            Waiting::Delay(over) => {
                ready!(Pin::new(over).poll(cx));
                (StatusCode::OK, Bytes::from_static(b"the delay is over\n"))
            }
            Waiting::Answer(status, text) => (*status, text.clone()),
        };
        let mut response = Response::new(ProbeBody::new(text, self.head));
        *response.status_mut() = status;
        if self.graceful.phase() > Phase::Serving {
            connection_close::say_close(&mut response, self.version);
        }
        let headers = response.headers_mut();
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        let utf8 = HeaderValue::from_static("text/plain; charset=utf-8");
        headers.insert(header::CONTENT_TYPE, utf8);
        if status == StatusCode::METHOD_NOT_ALLOWED {
            headers.insert(header::ALLOW, HeaderValue::from_static("GET, POST"));
        }
        Poll::Ready(Ok(response))
    }
}
