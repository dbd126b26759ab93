//! Plays a schedule, and notes what clients and handlers see.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, to_bytes},
    extract::{Request, State},
    response::Response,
    serve::Listener,
};
use bytes::Bytes;
use futures_util::stream;
use http::{StatusCode, Version};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::{conn::auto, graceful::GracefulShutdown},
    service::TowerToHyperService,
};
use tokio::{
    runtime,
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, sleep, sleep_until, timeout},
};
use tower_graceful::{Graceful, Phase, Report};

use crate::{
    client::{self, Received},
    kernel::{self, Facts, Wire},
    ms,
    pipes::Pipes,
    schedule::{Client, End, Form, Schedule},
};

/// No schedule takes longer, in simulated time.
const LONGEST: Duration = Duration::from_secs(600);

pub(crate) struct Played {
    /// `None` if the service did not stop.
    pub(crate) report: Option<Report>,
    pub(crate) triggered: Instant,
    pub(crate) stopped: Instant,
    pub(crate) connections_at_end: usize,
    pub(crate) in_flight_at_end: usize,
    pub(crate) clients: Vec<Seen>,
}

#[derive(Debug)]
pub(crate) struct Seen {
    /// The server's socket.
    pub(crate) facts: Facts,
    /// `None` if the client waits forever.
    pub(crate) received: Option<Vec<Received>>,
    /// Whether the handler of each request was called.
    pub(crate) handled: Vec<bool>,
    /// Whether the handler of each request, or its body if that has several frames, ended after the drain, or never.
    pub(crate) cut: Vec<bool>,
}

struct World {
    schedule: Schedule,
    graceful: Graceful,
    handled: Mutex<Vec<Handled>>,
    /// The connection of each client that has connected.
    wires: Mutex<Vec<Option<Wire>>>,
}

/// A request whose handler was called.
struct Handled {
    client: usize,
    request: usize,
    /// In which phase the handler or its body ended.
    ended: Option<Phase>,
}

/// Notes the end of a handler or its body.
struct Handling {
    world: Arc<World>,
    index: usize,
}

impl Handling {
    fn begin(world: Arc<World>, client: usize, request: usize) -> Self {
        let mut handled = world.handled.lock().unwrap();
        handled.push(Handled {
            client,
            request,
            ended: None,
        });
        let index = handled.len() - 1;
        drop(handled);
        Self { world, index }
    }
}

impl Drop for Handling {
    fn drop(&mut self) {
        let ended = self.world.graceful.phase();
        self.world.handled.lock().unwrap()[self.index].ended = Some(ended);
    }
}

pub(crate) fn play(schedule: &Schedule) -> Played {
    let runtime = runtime::Builder::new_current_thread()
        .enable_time()
        .enable_io()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(run(schedule))
}

async fn run(schedule: &Schedule) -> Played {
    let start = Instant::now();
    let graceful = Graceful::builder()
        .drain_delay(ms(schedule.drain_delay))
        .drain_timeout(ms(schedule.drain_timeout))
        .build()
        .unwrap();
    let world = Arc::new(World {
        schedule: schedule.clone(),
        graceful: graceful.clone(),
        handled: Mutex::default(),
        wires: Mutex::new(vec![None; schedule.clients.len()]),
    });
    let (connects, queue) = mpsc::unbounded_channel();
    let server = serve(schedule, &graceful, Pipes(queue), &world);
    let clients: Vec<_> = (0..schedule.clients.len())
        .map(|number| tokio::spawn(connect(world.clone(), number, start, connects.clone())))
        .collect();
    drop(connects);
    let triggered = start + ms(schedule.shutdown);
    sleep_until(triggered).await;
    graceful.shutdown();
    let report = timeout(LONGEST, server).await;
    let stopped = Instant::now();
    // Connections that were cut are dropped by their tasks.
    sleep(ms(1)).await;
    let (connections_at_end, in_flight_at_end) = (graceful.connections(), graceful.in_flight());
    let mut seen = Vec::new();
    for (number, client) in clients.into_iter().enumerate() {
        let client = timeout(LONGEST, client).await;
        let handled = world.handled.lock().unwrap();
        let handled = |request| {
            let mut handled = handled.iter();
            handled.find(|it| (it.client, it.request) == (number, request))
        };
        let requests = 0..schedule.clients[number].requests.len();
        let received = client.ok().map(|client| client.expect("a client panicked"));
        let wire = world.wires.lock().unwrap()[number].clone();
        seen.push(Seen {
            facts: wire.map(|wire| wire.facts()).unwrap_or_default(),
            received,
            handled: requests.clone().map(|it| handled(it).is_some()).collect(),
            cut: requests
                .map(|request| {
                    let handled = handled(request);
                    let outlasts = |it: &Handled| it.ended.is_none_or(|it| it >= Phase::Closing);
                    handled.is_some_and(outlasts)
                })
                .collect(),
        });
    }
    Played {
        report: report
            .ok()
            .map(|report| report.expect("the server panicked")),
        triggered,
        stopped,
        connections_at_end,
        in_flight_at_end,
        clients: seen,
    }
}

async fn connect(
    world: Arc<World>,
    number: usize,
    start: Instant,
    connects: mpsc::UnboundedSender<kernel::End>,
) -> Vec<Received> {
    let client = &world.schedule.clients[number];
    sleep_until(start + ms(client.at)).await;
    let (server_end, client_end, wire) = kernel::connect(&client.link);
    world.wires.lock().unwrap()[number] = Some(wire.clone());
    // The listener may be gone. Then the server's end is dropped.
    let _ = connects.send(server_end);
    drop(connects);
    play_client(client, number, client_end, &wire).await
}

async fn play_client(
    client: &Client,
    number: usize,
    end: kernel::End,
    wire: &Wire,
) -> Vec<Received> {
    let playing = client::play(client, number, end);
    match client.end {
        End::Stays | End::Closes | End::HalfCloses => playing.await,
        End::Leaves(after) => timeout(ms(after), playing).await.unwrap_or_default(),
        End::Vanishes(after) => {
            let vanishes = async {
                sleep(ms(after)).await;
                wire.client_vanishes();
            };
            tokio::select! {
                received = playing => received,
                () = vanishes => Vec::new(),
            }
        }
    }
}

fn serve(
    schedule: &Schedule,
    graceful: &Graceful,
    queue: Pipes<kernel::End>,
    world: &Arc<World>,
) -> JoinHandle<Report> {
    let app = Router::new()
        .fallback(handle)
        .with_state(world.clone())
        .layer(graceful.layer());
    match schedule.form {
        Form::Serve => {
            let server = graceful.serve(queue, app).half_close(schedule.half_close);
            tokio::spawn(server.into_future())
        }
        Form::Axum => {
            let server =
                axum::serve(graceful.listener(queue), app).with_graceful_shutdown(graceful.drain());
            tokio::spawn(graceful.run(server))
        }
        Form::Hyper => tokio::spawn(graceful.run(accept(graceful.clone(), queue, app))),
    }
}

/// The loop of the guide, with a tracked listener.
async fn accept(graceful: Graceful, queue: Pipes<kernel::End>, app: Router) {
    let mut listener = graceful.listener(queue);
    let connections = GracefulShutdown::new();
    let mut drain = graceful.drain();
    loop {
        tokio::select! {
            () = &mut drain => break,
            (io, ()) = listener.accept() => {
                let http = auto::Builder::new(TokioExecutor::new());
                let service = TowerToHyperService::new(app.clone());
                let connection = http.serve_connection_with_upgrades(TokioIo::new(io), service);
                tokio::spawn(connections.watch(connection.into_owned()));
            }
        }
    }
    drop(listener);
    connections.shutdown().await;
}

async fn handle(State(world): State<Arc<World>>, request: Request) -> Response {
    let mut numbers = request.uri().path()[1..].split('/');
    let mut number = || numbers.next().unwrap().parse::<usize>().unwrap();
    let (client, index) = (number(), number());
    let scheduled = world.schedule.clients[client].requests[index].clone();
    let handling = Handling::begin(world, client, index);
    if scheduled.reads_upload || request.version() == Version::HTTP_2 {
        let upload = to_bytes(request.into_body(), usize::MAX).await;
        if upload.map_or(0, |upload| upload.len()) != scheduled.upload {
            let mut response = Response::new(Body::empty());
            *response.status_mut() = StatusCode::BAD_REQUEST;
            return response;
        }
    }
    sleep(ms(scheduled.handler)).await;
    let frame = Bytes::from(vec![b'x'; scheduled.length]);
    let body = match scheduled.frames {
        0 => Body::empty(),
        1 if scheduled.gap == 0 => Body::from(frame),
        frames => {
            let gap = scheduled.gap;
            Body::from_stream(stream::unfold((0, handling), move |(sent, handling)| {
                let frame = frame.clone();
                async move {
                    if sent == frames {
                        return None;
                    }
                    sleep(ms(gap)).await;
                    Some((Ok::<_, Infallible>(frame), (sent + 1, handling)))
                }
            }))
        }
    };
    Response::new(body)
}
