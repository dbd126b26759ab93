//! gRPC with tonic, in two forms: tonic's routes on `serve`, and tonic's own server.
//!
//! tonic's server runs in `run` without changes. It takes [`Graceful::layer`] as a layer and
//! [`Graceful::drain`] as its shutdown signal. Two things need additional code:
//!
//! - tonic reads connect info through its own trait `Connected`, which `GracefulIo` does not implement.
//!   So [`tracked`](guide::tracked) wraps tracked connections here. Without tracking it works too, but then a call that
//!   does not end is cut only when the server is dropped.
//! - A layer of tonic's server is around every service, also around health. `exempt` keeps health from
//!   being refused.

use std::{
    error::Error,
    future::pending,
    io,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use axum::serve::Listener;
use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use greeter::{
    HelloReply, HelloRequest, Tick, TicksRequest,
    greeter_client::GreeterClient,
    greeter_server::{Greeter, GreeterServer},
};
use health::Health;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinHandle,
    time,
};
use tonic::{
    Code, Request, Response, Status,
    service::Routes,
    transport::{self, Channel, Server},
};
use tonic_health::{
    ServingStatus,
    pb::{
        HealthCheckRequest, HealthCheckResponse, health_client::HealthClient,
        health_server::HealthServer,
    },
    server::HealthReporter,
};
use tower_graceful::{Graceful, GracefulBuilder, Outcome, Phase, Report, Requests};

// The same code as in the example.
#[path = "../greeter.rs"]
#[allow(clippy::pedantic, unreachable_pub)]
mod greeter;
mod guide;
#[path = "../health.rs"]
#[allow(unreachable_pub)]
mod health;

const BOUND: Duration = Duration::from_secs(20);

/// The message of a refusal while draining.
const REFUSED: &str = "shutting down, please try again";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Serve,
    Tonic,
}

const FORMS: [Form; 2] = [Form::Serve, Form::Tonic];

#[derive(Clone)]
struct Service {
    graceful: Graceful,
    /// One permit lets one call of `slow` complete.
    slow: Arc<Semaphore>,
    /// The number of `Hello` calls that have arrived.
    arrived: Arc<AtomicU64>,
    /// The last number that a stream of ticks has sent.
    sent: Arc<AtomicU64>,
}

impl Service {
    fn new(graceful: &Graceful) -> Self {
        Self {
            graceful: graceful.clone(),
            slow: Arc::new(Semaphore::new(0)),
            arrived: Arc::default(),
            sent: Arc::default(),
        }
    }
}

#[tonic::async_trait]
impl Greeter for Service {
    async fn hello(&self, request: Request<HelloRequest>) -> Result<Response<HelloReply>, Status> {
        self.arrived.fetch_add(1, Ordering::SeqCst);
        let name = request.into_inner().name;
        if name == "slow" {
            self.slow.acquire().await.unwrap().forget();
        }
        let message = format!("hello {name}");
        Ok(Response::new(HelloReply { message }))
    }

    type TicksStream = Pin<Box<dyn Stream<Item = Result<Tick, Status>> + Send>>;

    /// Sends ticks as fast as the client reads.
    async fn ticks(&self, _: Request<TicksRequest>) -> Result<Response<Self::TicksStream>, Status> {
        let sent = Arc::clone(&self.sent);
        let ticks = stream::iter(1..).map(move |count| {
            sent.store(count, Ordering::SeqCst);
            Ok(Tick { count })
        });
        let ticks = self.graceful.until_draining(ticks);
        let last = Err(Status::unavailable("moving"));
        Ok(Response::new(Box::pin(ticks.and_last(last))))
    }
}

/// A running service, which a test stops once.
struct Running {
    graceful: Graceful,
    address: SocketAddr,
    service: Service,
    server: JoinHandle<Report>,
}

/// A plan without a delay.
fn promptly() -> GracefulBuilder {
    Graceful::builder().drain_delay(Duration::ZERO)
}

async fn start(form: Form, plan: GracefulBuilder) -> Running {
    let plan = match form {
        Form::Serve => plan,
        // The layer of tonic's server is around health too.
        Form::Tonic => plan
            .exempt("/grpc.health.v1.Health/Check")
            .exempt("/grpc.health.v1.Health/Watch"),
    };
    let graceful = plan.build().unwrap();
    let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = tcp.local_addr().unwrap();
    let service = Service::new(&graceful);
    let reporter = HealthReporter::new();
    let health = HealthServer::new(Health::new(&reporter, &graceful));
    let not_serving = async move {
        let status = ServingStatus::NotServing;
        reporter.set_service_status("", status).await;
    };
    graceful
        .on_lame_duck("health", Duration::from_secs(1), not_serving)
        .unwrap();
    let greeter = GreeterServer::new(service.clone());
    let server = match form {
        Form::Serve => {
            let greeter = Routes::new(greeter).into_axum_router();
            let app = Routes::from(greeter.layer(graceful.layer())).add_service(health);
            tokio::spawn(graceful.serve(tcp, app.into_axum_router()).into_future())
        }
        Form::Tonic => {
            let listener = graceful.listener(tcp);
            let incoming = stream::unfold(listener, |mut listener| async move {
                let (io, _) = Listener::accept(&mut listener).await;
                Some((Ok::<_, io::Error>(guide::tracked(io)), listener))
            });
            let server = Server::builder()
                .layer(graceful.layer())
                .add_service(greeter)
                .add_service(health)
                .serve_with_incoming_shutdown(incoming, graceful.drain_on(pending()));
            tokio::spawn(graceful.run(server))
        }
    };
    Running {
        graceful,
        address,
        service,
        server,
    }
}

async fn within<F: Future>(future: F) -> F::Output {
    time::timeout(BOUND, future)
        .await
        .expect("it takes too long")
}

async fn until(condition: impl Fn() -> bool) {
    within(async {
        while !condition() {
            time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

impl Running {
    async fn channel(&self) -> Channel {
        let endpoint = Channel::from_shared(format!("http://{}", self.address));
        within(endpoint.unwrap().connect()).await.unwrap()
    }

    async fn greeter(&self) -> GreeterClient<Channel> {
        GreeterClient::new(self.channel().await)
    }

    async fn health(&self) -> HealthClient<Channel> {
        HealthClient::new(self.channel().await)
    }

    /// Begins a call that completes after [`release`](Self::release).
    async fn slow(&self) -> JoinHandle<Result<String, Status>> {
        let mut client = self.greeter().await;
        let before = self.graceful.in_flight();
        let call = tokio::spawn(async move { hello(&mut client, "slow").await });
        until(|| self.graceful.in_flight() > before).await;
        call
    }

    fn release(&self) {
        self.service.slow.add_permits(1);
    }

    async fn ends_clean(self) -> Requests {
        let report = within(self.server).await.unwrap();
        assert_eq!(report.outcome(), Outcome::Clean, "{report}");
        assert!(report.warnings().is_empty(), "{report}");
        report.requests()
    }
}

async fn hello(client: &mut GreeterClient<Channel>, name: &str) -> Result<String, Status> {
    let name = name.to_owned();
    let reply = within(client.hello(HelloRequest { name })).await?;
    Ok(reply.into_inner().message)
}

async fn check(client: &mut HealthClient<Channel>) -> Result<ServingStatus, Status> {
    let answer = within(client.check(HealthCheckRequest::default())).await?;
    Ok(status(answer.into_inner()))
}

fn status(answer: HealthCheckResponse) -> ServingStatus {
    match answer.status {
        1 => ServingStatus::Serving,
        2 => ServingStatus::NotServing,
        _ => ServingStatus::Unknown,
    }
}

/// A client at the level of HTTP/2. Its connection task ends when the server asks it to leave.
async fn raw(
    address: SocketAddr,
) -> (
    hyper::client::conn::http2::SendRequest<Full<Bytes>>,
    JoinHandle<hyper::Result<()>>,
) {
    let io = TokioIo::new(TcpStream::connect(address).await.unwrap());
    let (client, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io)
        .await
        .unwrap();
    (client, tokio::spawn(connection))
}

/// A call of `Hello` with an empty name.
fn raw_hello(address: SocketAddr) -> http::Request<Full<Bytes>> {
    http::Request::post(format!("http://{address}/greeter.Greeter/Hello"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::from(vec![0; 5])) // not compressed, and a length of zero in four bytes
        .unwrap()
}

/// Asserts that the response is only headers, which contain the gRPC status ("Trailers-Only").
async fn assert_refused(address: SocketAddr, message: &str) {
    let (mut client, _connection) = raw(address).await;
    let answer = within(client.send_request(raw_hello(address)))
        .await
        .unwrap();
    assert_eq!(answer.status(), 200, "{answer:?}");
    assert_eq!(answer.headers()["content-type"], "application/grpc");
    assert_eq!(answer.headers()["grpc-status"], "14");
    assert_eq!(answer.headers()["grpc-message"], message);
    let body = answer.into_body();
    assert!(hyper::body::Body::is_end_stream(&body), "no END_STREAM");
    let body = within(body.collect()).await.unwrap();
    assert!(body.trailers().is_none());
    assert!(body.to_bytes().is_empty());
}

#[tokio::test]
async fn a_call_is_answered_with_trailers() {
    for form in FORMS {
        let running = start(form, promptly()).await;
        let (mut client, _connection) = raw(running.address).await;
        let call = client.send_request(raw_hello(running.address));
        let answer = within(call).await.unwrap();
        assert!(!answer.headers().contains_key("grpc-status"));
        let body = within(answer.into_body().collect()).await.unwrap();
        assert_eq!(body.trailers().unwrap()["grpc-status"], "0", "{form:?}");
        assert!(body.to_bytes().ends_with(b"hello "));
        running.graceful.shutdown();
        running.ends_clean().await;
    }
}

#[tokio::test]
async fn a_refused_call_is_unavailable_in_headers_alone() {
    for form in FORMS {
        let running = start(form, promptly()).await;
        let slow = running.slow().await;
        running.graceful.shutdown();
        assert_refused(running.address, REFUSED).await;
        // A gRPC client receives the same status.
        let mut client = running.greeter().await;
        let refused = hello(&mut client, "Ada").await.unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable, "{form:?}");
        assert_eq!(refused.message(), REFUSED);
        assert_eq!(refused.metadata().get("retry-after").unwrap(), "1");
        running.release();
        within(slow).await.unwrap().unwrap();
        let requests = running.ends_clean().await;
        assert_eq!(requests.refused, 2, "{requests:?}");
    }
}

#[tokio::test]
async fn a_stream_is_refused_like_a_call() {
    for form in FORMS {
        let running = start(form, promptly()).await;
        let slow = running.slow().await;
        running.graceful.shutdown();
        let mut client = running.greeter().await;
        let refused = within(client.ticks(TicksRequest {})).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable, "{form:?}");
        assert_eq!(refused.message(), REFUSED);
        running.release();
        within(slow).await.unwrap().unwrap();
        running.ends_clean().await;
    }
}

#[tokio::test]
async fn above_the_limit_a_call_is_unavailable() {
    for form in FORMS {
        let running = start(form, promptly().max_in_flight(1)).await;
        let slow = running.slow().await;
        let message = "too many requests in flight, please try again later";
        assert_refused(running.address, message).await;
        // Health does not count toward the limit, and the limit does not refuse it.
        let mut health = running.health().await;
        assert_eq!(check(&mut health).await.unwrap(), ServingStatus::Serving);
        running.release();
        within(slow).await.unwrap().unwrap();
        until(|| running.graceful.in_flight() == 0).await;
        let mut client = running.greeter().await;
        assert_eq!(hello(&mut client, "Ada").await.unwrap(), "hello Ada");
        running.graceful.shutdown();
        running.ends_clean().await;
    }
}

#[tokio::test]
async fn health_says_not_serving_before_calls_are_refused() {
    for form in FORMS {
        let delay = Duration::from_millis(1500);
        let running = start(form, Graceful::builder().drain_delay(delay)).await;
        let mut health = running.health().await;
        let mut client = running.greeter().await;
        assert_eq!(check(&mut health).await.unwrap(), ServingStatus::Serving);
        let watched = within(health.watch(HealthCheckRequest::default())).await;
        let mut watched = watched.unwrap().into_inner();
        let response = within(watched.message()).await.unwrap().unwrap();
        assert_eq!(status(response), ServingStatus::Serving);

        running.graceful.shutdown();
        // The stream reports the change, without another request.
        let response = within(watched.message()).await.unwrap().unwrap();
        assert_eq!(status(response), ServingStatus::NotServing, "{form:?}");
        assert_eq!(check(&mut health).await.unwrap(), ServingStatus::NotServing);
        assert_eq!(hello(&mut client, "Ada").await.unwrap(), "hello Ada");
        assert_eq!(running.graceful.phase(), Phase::LameDuck);

        let ended = within(watched.message()).await.unwrap_err();
        assert!(running.graceful.phase() >= Phase::Draining);
        assert_eq!(ended.code(), Code::Unavailable, "{form:?}");
        running.ends_clean().await;
    }
}

#[tokio::test]
async fn watching_health_does_not_hold_the_drain() {
    for form in FORMS {
        let running = start(form, promptly()).await;
        let mut watching = Vec::new();
        for _ in 0..20 {
            let mut health = running.health().await;
            let watched = within(health.watch(HealthCheckRequest::default())).await;
            let mut watched = watched.unwrap().into_inner();
            assert!(within(watched.message()).await.unwrap().is_some());
            watching.push(watched);
        }
        let slow = running.slow().await;
        let begun = Instant::now();
        running.graceful.shutdown();
        for watched in &mut watching {
            let ended = loop {
                match within(watched.message()).await {
                    Ok(Some(response)) => assert_eq!(status(response), ServingStatus::NotServing),
                    ended => break ended.unwrap_err(),
                }
            };
            assert_eq!(ended.code(), Code::Unavailable);
        }
        // A watch that begins while draining does not hold the drain either, and a check is answered to
        // the end.
        let mut health = running.health().await;
        let late = within(health.watch(HealthCheckRequest::default())).await;
        let late = match late {
            Ok(watched) => within(watched.into_inner().message()).await.unwrap_err(),
            Err(ended) => ended,
        };
        assert_eq!(late.code(), Code::Unavailable, "{form:?}");
        assert_eq!(check(&mut health).await.unwrap(), ServingStatus::NotServing);
        running.release();
        within(slow).await.unwrap().unwrap();
        running.ends_clean().await;
        assert!(begun.elapsed() < BOUND / 2, "{:?}", begun.elapsed());
    }
}

#[tokio::test]
async fn a_stream_ends_with_its_status_after_all_its_messages() {
    for form in FORMS {
        let running = start(form, promptly()).await;
        let mut client = running.greeter().await;
        let ticks = within(client.ticks(TicksRequest {})).await.unwrap();
        let mut ticks = ticks.into_inner();
        let mut got = 0;
        let ended = loop {
            match within(ticks.message()).await {
                Ok(tick) => {
                    got += 1;
                    assert_eq!(tick.unwrap().count, got);
                }
                Err(ended) => break ended,
            }
            if got == 100 {
                assert_eq!(running.graceful.in_flight(), 1);
                running.graceful.shutdown();
            }
        };
        assert_eq!(ended.code(), Code::Unavailable, "{form:?}");
        assert_eq!(ended.message(), "moving");
        assert!(got >= 100);
        assert_eq!(got, running.service.sent.load(Ordering::SeqCst));
        let requests = running.ends_clean().await;
        assert_eq!(requests.finished, 1, "{requests:?}");
    }
}

#[tokio::test]
async fn a_call_in_flight_is_answered() {
    for form in FORMS {
        let running = start(form, promptly()).await;
        let slow = running.slow().await;
        running.graceful.shutdown();
        assert_refused(running.address, REFUSED).await;
        assert!(!slow.is_finished());
        running.release();
        let answer = within(slow).await.unwrap().unwrap();
        assert_eq!(answer, "hello slow", "{form:?}");
        running.ends_clean().await;
    }
}

#[tokio::test]
async fn a_client_is_asked_to_leave_with_its_next_answer() {
    let delay = Duration::from_millis(1500);
    let running = start(Form::Serve, Graceful::builder().drain_delay(delay)).await;
    let (mut client, connection) = raw(running.address).await;
    for leaves in [false, true] {
        let call = client.send_request(raw_hello(running.address));
        let body = within(call).await.unwrap().into_body();
        let body = within(body.collect()).await.unwrap();
        assert_eq!(body.trailers().unwrap()["grpc-status"], "0");
        if leaves {
            within(connection).await.unwrap().unwrap();
            assert_eq!(running.graceful.phase(), Phase::LameDuck);
            break;
        }
        running.graceful.shutdown();
    }
    running.ends_clean().await;
}

/// Callers make calls on one channel without pause, while the channel reconnects as often as necessary.
///
/// hyper's client may accept a call for a connection and then not send it, because a GOAWAY has arrived in
/// between. tonic's channel does not retry such a call: it fails with "operation was canceled" or with the
/// GOAWAY. No such call has arrived at the server, so the caller may retry it. No call that has arrived is
/// lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_channel_loses_no_call_that_has_arrived() {
    for form in FORMS {
        let delay = Duration::from_millis(200);
        let running = start(form, Graceful::builder().drain_delay(delay)).await;
        let channel = running.channel().await;
        let callers: Vec<_> = (0..8)
            .map(|_| {
                let mut client = GreeterClient::new(channel.clone());
                let graceful = running.graceful.clone();
                tokio::spawn(async move {
                    let mut answered = 0;
                    loop {
                        let Err(error) = hello(&mut client, "Ada").await else {
                            answered += 1;
                            continue;
                        };
                        let draining = graceful.phase() >= Phase::Draining;
                        if draining && error.code() == Code::Unavailable {
                            return answered;
                        }
                        // Any other error must come from the client's transport, not from the service.
                        let source = error.source();
                        let failed = source.is_some_and(<dyn Error>::is::<transport::Error>);
                        assert!(failed, "{form:?}: {error:?}");
                    }
                })
            })
            .collect();
        let arrived = Arc::clone(&running.service.arrived);
        until(|| arrived.load(Ordering::SeqCst) > 100).await;
        running.graceful.shutdown();
        let mut answered = 0;
        for caller in callers {
            answered += within(caller).await.unwrap();
        }
        running.ends_clean().await;
        assert_eq!(answered, arrived.load(Ordering::SeqCst), "{form:?}");
    }
}
