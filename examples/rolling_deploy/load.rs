//! A steady load on one address: keep-alive clients, clients with a connection per request, slow
//! requests and uploads. Every request that fails is recorded, with its error and its time.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use futures_util::stream;
use http_body_util::{BodyExt, Empty, StreamBody, combinators::BoxBody};
use hyper::{
    Request, StatusCode,
    body::{Bytes, Frame},
    client::conn::http1::{SendRequest, handshake},
    header,
};
use hyper_util::rt::TokioIo;
use tokio::{
    net::TcpStream,
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::balancer::ERROR;

/// The pieces of an upload, their size, and the pause between two: half a second in total.
const PIECES: usize = 16;
const PIECE: usize = 16 * 1024;
const BETWEEN_PIECES: Duration = Duration::from_millis(30);

pub(crate) type Sender = SendRequest<BoxBody<Bytes, Infallible>>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    KeepAlive,
    PerRequest,
    Slow,
    Upload,
}

impl Kind {
    fn clients(self) -> usize {
        if self == Self::KeepAlive { 4 } else { 2 }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::KeepAlive => "keep-alive",
            Self::PerRequest => "a connection per request",
            Self::Slow => "slow request",
            Self::Upload => "upload",
        })
    }
}

/// How a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum How {
    Refused,
    Reset,
    /// The response began but did not end.
    Truncated,
    TimedOut,
    /// The balancer had no backend for the request.
    NoBackend,
    /// A response with a status of 500 or above.
    Status(u16),
    /// The same with `Retry-After`: a service sends this header with a refusal, and balancers do not.
    RetryAfter(u16),
}

impl fmt::Display for How {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused => f.write_str("refused"),
            Self::Reset => f.write_str("reset"),
            Self::Truncated => f.write_str("truncated"),
            Self::TimedOut => f.write_str("timed out"),
            Self::NoBackend => f.write_str("without a backend"),
            Self::Status(status) => write!(f, "answered {status}"),
            Self::RetryAfter(status) => write!(f, "answered {status} with Retry-After"),
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Failure {
    pub(crate) kind: Kind,
    pub(crate) how: How,
    pub(crate) begun: Instant,
    pub(crate) failed: Instant,
}

/// The paths to request. A path that is `None` is not requested.
#[derive(Clone, Debug)]
pub(crate) struct Paths {
    pub(crate) quick: String,
    /// A status of `quick` that is an answer, beside 2xx and 3xx.
    pub(crate) allowed: Option<StatusCode>,
    pub(crate) slow: Option<String>,
    pub(crate) upload: Option<String>,
    /// The time after which a request counts as lost.
    pub(crate) timeout: Duration,
}

impl Paths {
    /// Whether `quick` reached the service, so that a run can measure something.
    pub(crate) fn is_answer(&self, status: StatusCode) -> bool {
        (200..400).contains(&status.as_u16()) || self.allowed == Some(status)
    }

    fn of(&self, kind: Kind) -> Option<&str> {
        match kind {
            Kind::KeepAlive | Kind::PerRequest => Some(&self.quick),
            Kind::Slow => self.slow.as_deref(),
            Kind::Upload => self.upload.as_deref(),
        }
    }
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) requests: BTreeMap<Kind, u64>,
    /// The longest time of an answered request on `Paths::quick`.
    pub(crate) slowest: Duration,
    pub(crate) failures: Vec<Failure>,
}

impl Tally {
    pub(crate) fn total(&self) -> u64 {
        self.requests.values().sum()
    }
}

/// The clients. They end when this is dropped. `stop` lets their requests complete first.
#[derive(Debug)]
pub(crate) struct Load {
    shared: Arc<Shared>,
    clients: JoinSet<()>,
}

#[derive(Debug)]
struct Shared {
    /// `HOST:PORT`
    target: String,
    paths: Paths,
    over: AtomicBool,
    tally: Mutex<Tally>,
}

impl Load {
    pub(crate) fn start(target: String, paths: Paths) -> Self {
        let shared = Arc::new(Shared {
            target,
            paths,
            over: AtomicBool::new(false),
            tally: Mutex::default(),
        });
        let mut clients = JoinSet::new();
        for kind in [Kind::KeepAlive, Kind::PerRequest, Kind::Slow, Kind::Upload] {
            if shared.paths.of(kind).is_some() {
                for _ in 0..kind.clients() {
                    clients.spawn(client(Arc::clone(&shared), kind));
                }
            }
        }
        Self { shared, clients }
    }

    /// The number of requests so far, and the number of failures.
    pub(crate) fn count(&self) -> (u64, usize) {
        let tally = self.shared.tally();
        (tally.total(), tally.failures.len())
    }

    /// Begins no further request, and waits for those in flight.
    pub(crate) async fn stop(mut self) -> Tally {
        self.shared.over.store(true, Relaxed);
        while self.clients.join_next().await.is_some() {}
        self.shared.tally().clone()
    }
}

impl Shared {
    fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn client(shared: Arc<Shared>, kind: Kind) {
    let path = shared.paths.of(kind).unwrap_or("/").to_owned();
    let mut kept = None;
    while !shared.over.load(Relaxed) {
        let begun = Instant::now();
        let request = send(&shared.target, &path, kind, &mut kept);
        let result = timeout(shared.paths.timeout, request).await;
        let failed = Instant::now();
        {
            let mut tally = shared.tally();
            *tally.requests.entry(kind).or_default() += 1;
            match result.unwrap_or(Err(How::TimedOut)) {
                Ok(()) if matches!(kind, Kind::Slow | Kind::Upload) => {}
                Ok(()) => tally.slowest = tally.slowest.max(failed - begun),
                Err(how) => tally.failures.push(Failure {
                    kind,
                    how,
                    begun,
                    failed,
                }),
            }
        }
        sleep(Duration::from_millis(10)).await;
    }
}

/// Sends one request. Keeps the connection in `kept` if the kind of client and the server allow it.
async fn send(target: &str, path: &str, kind: Kind, kept: &mut Option<Sender>) -> Result<(), How> {
    let mut sender = match kept.take() {
        Some(sender) => sender,
        None => connect(target).await?,
    };
    // Sends nothing on a connection that the server has closed.
    if sender.ready().await.is_err() {
        sender = connect(target).await?;
    }
    let mut request = Request::builder().uri(path).header(header::HOST, target);
    if kind == Kind::PerRequest {
        request = request.header(header::CONNECTION, "close");
    }
    let request = if kind == Kind::Upload {
        request
            .method("POST")
            .header(header::CONTENT_LENGTH, PIECES * PIECE)
            .body(upload())
    } else {
        request.body(Empty::new().boxed())
    };
    let request = request.expect("the path was tried before");
    let response = sender.send_request(request).await.map_err(|_| How::Reset)?;
    if let Some(reason) = response.headers().get(ERROR) {
        return Err(match reason.as_bytes() {
            b"refused" => How::Refused,
            b"reset" => How::Reset,
            _ => How::NoBackend,
        });
    }
    let status = response.status();
    let retry_after = response.headers().contains_key(header::RETRY_AFTER);
    let body = response.into_body().collect().await;
    if status.is_server_error() {
        let how = if retry_after {
            How::RetryAfter
        } else {
            How::Status
        };
        return Err(how(status.as_u16()));
    }
    body.map_err(|_| How::Truncated)?;
    if kind != Kind::PerRequest {
        *kept = Some(sender);
    }
    Ok(())
}

pub(crate) async fn connect(target: &str) -> Result<Sender, How> {
    let stream = TcpStream::connect(target).await.map_err(|error| {
        if error.kind() == std::io::ErrorKind::ConnectionRefused {
            How::Refused
        } else {
            How::Reset
        }
    })?;
    let _ = stream.set_nodelay(true);
    let (sender, connection) = handshake(TokioIo::new(stream))
        .await
        .map_err(|_| How::Reset)?;
    tokio::spawn(connection);
    Ok(sender)
}

fn upload() -> BoxBody<Bytes, Infallible> {
    let pieces = stream::unfold(0, |sent| async move {
        if sent == PIECES {
            return None;
        }
        sleep(BETWEEN_PIECES).await;
        let piece = Bytes::from_static(&[b'x'; PIECE]);
        Some((Ok(Frame::data(piece)), sent + 1))
    });
    StreamBody::new(pieces).boxed()
}
