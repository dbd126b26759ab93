//! A small load balancer.
//!
//! It distributes requests over the backends that are up, in turn, on keep-alive HTTP/1.1 connections. It
//! requests each backend's readiness path once per interval. A backend is up after one success, and
//! down after `fall` failures in a row. The balancer does not retry, so that every failure reaches the
//! client. kube-proxy, and Envoy in its default configuration, do not retry either.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use axum::body::Body;
use hyper::{
    Request, Response, StatusCode, Uri, body::Incoming, header, server::conn::http1,
    service::service_fn,
};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo},
};
use tokio::{net::TcpListener, task::JoinHandle, time::sleep};

use crate::{instance::Problem, single};

/// The header of responses that the balancer itself makes. Its value is the reason.
pub(crate) const ERROR: &str = "x-balancer-error";

/// The settings of the readiness checks.
#[derive(Clone, Debug)]
pub(crate) struct Check {
    pub(crate) path: String,
    pub(crate) interval: Duration,
    pub(crate) fall: u32,
}

impl Check {
    /// The longest time from the first failing probe until a backend is down.
    pub(crate) fn notices_within(&self) -> Duration {
        self.interval * self.fall
    }
}

#[derive(Debug)]
struct Backend {
    port: u16,
    up: bool,
    failures: u32,
    down_since: Option<Instant>,
}

#[derive(Debug)]
pub(crate) struct Balancer {
    check: Option<Check>,
    address: SocketAddr,
    backends: Mutex<Vec<Backend>>,
    turn: AtomicUsize,
    client: Client<HttpConnector, Incoming>,
}

/// Ends the balancer's accept loop when it is dropped.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) balancer: Arc<Balancer>,
    accepts: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.accepts.abort();
    }
}

impl Balancer {
    /// Starts a balancer on a free port. Without `check`, a backend is up from `add` to `remove`.
    pub(crate) async fn start(check: Option<Check>) -> std::io::Result<Running> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let balancer = Arc::new(Self {
            check,
            address: listener.local_addr()?,
            backends: Mutex::default(),
            turn: AtomicUsize::new(0),
            client: Client::builder(TokioExecutor::new())
                .retry_canceled_requests(false)
                .build(HttpConnector::new()),
        });
        let accepts = tokio::spawn(accept(Arc::clone(&balancer), listener));
        Ok(Running { balancer, accepts })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Adds a backend. It is up at once without a check, otherwise after its first success.
    pub(crate) fn add(self: &Arc<Self>, port: u16) {
        self.with(|backends| {
            backends.push(Backend {
                port,
                up: self.check.is_none(),
                failures: 0,
                down_since: None,
            });
        });
        if let Some(check) = self.check.clone() {
            tokio::spawn(poll(Arc::clone(self), check, port));
        }
    }

    pub(crate) fn remove(&self, port: u16) {
        self.with(|backends| backends.retain(|backend| backend.port != port));
    }

    pub(crate) fn is_up(&self, port: u16) -> bool {
        self.with(|backends| backends.iter().any(|one| one.port == port && one.up))
    }

    /// When the balancer stopped sending requests to this backend.
    pub(crate) fn down_since(&self, port: u16) -> Option<Instant> {
        self.with(|backends| backends.iter().find(|one| one.port == port)?.down_since)
    }

    /// Waits until these are the backends.
    pub(crate) async fn has(&self, ports: &[u16], bound: Duration) -> Result<(), Problem> {
        let begun = Instant::now();
        loop {
            let listed = self.with(|backends| {
                let has = |port| backends.iter().any(|one| one.port == port);
                backends.len() == ports.len() && ports.iter().all(|port| has(*port))
            });
            if listed {
                return Ok(());
            }
            if begun.elapsed() > bound {
                return Err(Problem(format!(
                    "the balancer has other backends than {ports:?}"
                )));
            }
            sleep(Duration::from_millis(5)).await;
        }
    }

    fn with<T>(&self, act: impl FnOnce(&mut Vec<Backend>) -> T) -> T {
        act(&mut self.backends.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn pick(&self) -> Option<u16> {
        let turn = self.turn.fetch_add(1, Relaxed);
        self.with(|backends| {
            let up = backends.iter().filter(|backend| backend.up);
            let count = up.clone().count();
            up.clone().nth(turn.checked_rem(count)?).map(|one| one.port)
        })
    }

    async fn forward(&self, mut request: Request<Incoming>) -> Response<Body> {
        let Some(port) = self.pick() else {
            return failure(StatusCode::SERVICE_UNAVAILABLE, "no backend");
        };
        let path = request
            .uri()
            .path_and_query()
            .map_or("/", |path| path.as_str());
        let Ok(uri) = format!("http://127.0.0.1:{port}{path}").parse::<Uri>() else {
            return failure(StatusCode::BAD_REQUEST, "path");
        };
        *request.uri_mut() = uri;
        request.headers_mut().remove(header::CONNECTION);
        match self.client.request(request).await {
            Ok(mut response) => {
                // This header concerns the connection to the backend only.
                response.headers_mut().remove(header::CONNECTION);
                response.map(Body::new)
            }
            Err(error) if error.is_connect() => failure(StatusCode::BAD_GATEWAY, "refused"),
            Err(_) => failure(StatusCode::BAD_GATEWAY, "reset"),
        }
    }
}

fn failure(status: StatusCode, why: &'static str) -> Response<Body> {
    let mut response = Response::new(Body::from(why));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(ERROR, header::HeaderValue::from_static(why));
    response
}

async fn accept(balancer: Arc<Balancer>, listener: TcpListener) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            sleep(Duration::from_millis(10)).await;
            continue;
        };
        let _ = stream.set_nodelay(true);
        let balancer = Arc::clone(&balancer);
        tokio::spawn(async move {
            let forward = service_fn(|request| async {
                Ok::<_, std::convert::Infallible>(balancer.forward(request).await)
            });
            // An error means that the client has disconnected, which is not a failure of the balancer.
            let _ = http1::Builder::new()
                .serve_connection(TokioIo::new(stream), forward)
                .await;
        });
    }
}

/// Probes one backend while it is in the list.
async fn poll(balancer: Arc<Balancer>, check: Check, port: u16) {
    loop {
        let begun = Instant::now();
        let ready = single::get(port, &check.path)
            .await
            .is_ok_and(|status| status.is_success());
        let listed = balancer.with(|backends| {
            let Some(backend) = backends.iter_mut().find(|one| one.port == port) else {
                return false;
            };
            backend.failures = if ready { 0 } else { backend.failures + 1 };
            if ready {
                backend.up = true;
                backend.down_since = None;
            } else if backend.up && backend.failures >= check.fall {
                backend.up = false;
                backend.down_since = Some(Instant::now());
            }
            true
        });
        if !listed {
            return;
        }
        sleep(check.interval.saturating_sub(begun.elapsed())).await;
    }
}
