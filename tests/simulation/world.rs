//! Plays a schedule, and notes what happens.

use std::{
    cell::Cell,
    convert::Infallible,
    future::pending,
    panic::AssertUnwindSafe,
    pin::pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, stream, stream::FuturesUnordered};
use http::{Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, Empty, StreamBody};
use tokio::{
    runtime,
    time::{Instant, sleep, sleep_until},
};
use tower::{ServiceBuilder, ServiceExt, service_fn};
use tower_graceful::{ConfigError, EffectivePlan, Graceful, Phase, Report};

use crate::{
    planned_panic,
    schedule::{Does, End, Hold, Request, Schedule, Step, Worker},
};

/// What became of a request, as its client saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Became {
    /// Admitted, and its body came to its end.
    Whole,
    Refused(StatusCode),
    /// The client disconnected after the head of the response.
    Left,
    /// The client disconnected before there was a response, or something failed or panicked.
    Broken,
    /// The server dropped it.
    Cut,
}

#[derive(Clone, Debug)]
pub(crate) struct SeenRequest {
    pub(crate) number: usize,
    pub(crate) phase: Phase,
    /// Whether it arrived after the stop had been asked for.
    pub(crate) is_late: bool,
    pub(crate) in_flight_before: usize,
    pub(crate) expected_before: usize,
    /// Other requests than this one that were admitted and had not ended.
    pub(crate) requests_before: usize,
    pub(crate) became: Became,
    /// The phase in which it ended, and whether the stop had been asked for by then.
    pub(crate) ended: Phase,
    pub(crate) ended_late: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    pub(crate) at: Instant,
    pub(crate) phase: Phase,
}

/// How the future of a worker, a hook, a cleanup step or a hold ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Returned,
    Failed,
    Panicked,
    /// It was dropped before its end.
    Dropped,
}

/// A worker, a hook, a cleanup step or a hold that has begun.
#[derive(Clone, Debug)]
pub(crate) struct Ran {
    pub(crate) name: String,
    pub(crate) began: Moment,
    /// `None`: it had not ended when the stop was over.
    pub(crate) ended: Option<(Moment, Ended)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Phase(Phase),
    WorkerEnded,
    HandlersAtCleanup(usize),
    CleanupBegan(usize),
    CleanupEnded(usize),
}

pub(crate) struct Seen {
    /// `None` if there is no such plan.
    pub(crate) played: Option<Played>,
}

pub(crate) struct Played {
    pub(crate) report: Report,
    pub(crate) plan: EffectivePlan,
    pub(crate) triggered: Instant,
    pub(crate) stopped: Instant,
    pub(crate) in_flight_at_stop: usize,
    pub(crate) in_flight_at_end: usize,
    /// Whether the server came to its own end.
    pub(crate) server_ended: bool,
    pub(crate) ran: Vec<Ran>,
    pub(crate) requests: Vec<SeenRequest>,
    pub(crate) events: Vec<(Instant, Event)>,
}

struct World {
    graceful: Graceful,
    /// The stop has been asked for.
    is_stopping: AtomicBool,
    /// `requests` at that moment.
    in_flight_at_stop: AtomicUsize,
    server_ended: AtomicBool,
    /// Requests that were admitted and have not ended.
    requests: AtomicUsize,
    holds: AtomicUsize,
    /// Handlers and bodies that have not been dropped.
    handlers: AtomicUsize,
    seen: Mutex<Vec<SeenRequest>>,
    events: Mutex<Vec<(Instant, Event)>>,
    ran: Mutex<Vec<Ran>>,
}

impl World {
    fn now(&self) -> Moment {
        Moment {
            at: Instant::now(),
            phase: self.graceful.phase(),
        }
    }

    fn shut_down(&self) {
        if !self.is_stopping.swap(true, Relaxed) {
            let requests = self.requests.load(Relaxed);
            self.in_flight_at_stop.store(requests, Relaxed);
        }
        self.graceful.shutdown();
    }

    fn note(&self, event: Event) {
        self.events.lock().unwrap().push((Instant::now(), event));
    }
}

/// Notes the end of a worker, a hook, a cleanup step or a hold when it is dropped.
struct Running {
    world: Arc<World>,
    index: usize,
    ended: Ended,
}

impl Running {
    fn begin(world: &Arc<World>, name: String) -> Self {
        let began = world.now();
        let mut ran = world.ran.lock().unwrap();
        ran.push(Ran {
            name,
            began,
            ended: None,
        });
        Self {
            world: world.clone(),
            index: ran.len() - 1,
            ended: Ended::Dropped,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let ended = if std::thread::panicking() {
            Ended::Panicked
        } else {
            self.ended
        };
        let ended = Some((self.world.now(), ended));
        self.world.ran.lock().unwrap()[self.index].ended = ended;
    }
}

/// Counts what has not been dropped.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Relaxed);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// A handler or its body.
struct Handler(Arc<World>);

impl Handler {
    fn new(world: &Arc<World>) -> Self {
        world.handlers.fetch_add(1, Relaxed);
        Self(world.clone())
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        self.0.handlers.fetch_sub(1, Relaxed);
    }
}

const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

pub(crate) fn play(schedule: &Schedule) -> Seen {
    let runtime = runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    let played = runtime.block_on(run(schedule));
    Seen {
        played: played.ok(),
    }
}

async fn run(schedule: &Schedule) -> Result<Played, ConfigError> {
    let start = Instant::now();
    let graceful = build(schedule)?;
    let world = Arc::new(World {
        graceful: graceful.clone(),
        is_stopping: AtomicBool::new(false),
        in_flight_at_stop: AtomicUsize::new(0),
        server_ended: AtomicBool::new(false),
        requests: AtomicUsize::new(0),
        holds: AtomicUsize::new(0),
        handlers: AtomicUsize::new(0),
        seen: Mutex::default(),
        events: Mutex::default(),
        ran: Mutex::default(),
    });
    register(schedule, &graceful, &world);
    let watching = tokio::spawn(watch(graceful.clone(), world.clone()));
    for (number, hold) in schedule.holds.iter().cloned().enumerate() {
        tokio::spawn(play_hold(hold, number, start, world.clone()));
    }
    for at in schedule.shutdowns.clone() {
        let world = world.clone();
        tokio::spawn(async move {
            sleep_until(start + ms(at)).await;
            world.shut_down();
        });
    }
    let server = serve(
        schedule.requests.clone(),
        start,
        graceful.clone(),
        world.clone(),
    );
    let report = graceful.run(server).await;
    let stopped = Instant::now();
    let ran = world.ran.lock().unwrap().clone();
    let server_ended = world.server_ended.load(Relaxed);
    // The watcher has seen everything once it has seen the end.
    watching.await.unwrap();
    let events = world.events.lock().unwrap().clone();
    let requests = world.seen.lock().unwrap().clone();
    Ok(Played {
        report,
        plan: graceful.plan(),
        triggered: start + ms(*schedule.shutdowns.iter().min().unwrap()),
        stopped,
        in_flight_at_stop: world.in_flight_at_stop.load(Relaxed),
        server_ended,
        ran,
        in_flight_at_end: graceful.in_flight() - world.holds.load(Relaxed),
        requests,
        events,
    })
}

fn build(schedule: &Schedule) -> Result<Graceful, ConfigError> {
    let plan = &schedule.plan;
    let mut builder = Graceful::builder()
        .grace_period(ms(plan.grace_period))
        .name_requests(schedule.name_requests)
        .keep_listening(schedule.keep_listening);
    if let Some(limit) = schedule.max_in_flight {
        builder = builder.max_in_flight(limit);
    }
    if let Some(delay) = plan.drain_delay {
        builder = builder.drain_delay(ms(delay));
    }
    if let Some(timeout) = plan.drain_timeout {
        builder = builder.drain_timeout(ms(timeout));
    }
    if let Some(timeout) = plan.cleanup_timeout {
        builder = builder.cleanup_timeout(ms(timeout));
    }
    builder.build()
}

async fn watch(graceful: Graceful, world: Arc<World>) {
    let mut phases = graceful.subscribe();
    loop {
        let phase = phases.phase();
        world.note(Event::Phase(phase));
        if phase == Phase::Stopped {
            return;
        }
        phases.changed().await;
    }
}

fn register(schedule: &Schedule, graceful: &Graceful, world: &Arc<World>) {
    for (number, worker) in schedule.workers.iter().cloned().enumerate() {
        let world = world.clone();
        let name = format!("worker {number}");
        let named = name.clone();
        let work = |stop: tower_graceful::Stop| async move {
            let mut running = Running::begin(&world, named);
            let _ended = Noted(world, Some(Event::WorkerEnded));
            match worker {
                Worker::AfterDraining(after) => {
                    stop.draining().await;
                    sleep(ms(after)).await;
                }
                Worker::AfterIdle(after) => {
                    stop.idle().await;
                    sleep(ms(after)).await;
                }
                Worker::Early(after) => sleep(ms(after)).await,
                Worker::Panics(after) => {
                    sleep(ms(after)).await;
                    planned_panic();
                }
                Worker::Never => pending().await,
            }
            running.ended = Ended::Returned;
        };
        graceful.worker(name, work).unwrap();
    }
    for (number, hook) in schedule.hooks.iter().enumerate() {
        let name = format!("hook {number}");
        let work = step(hook.clone(), world.clone(), name.clone());
        graceful.on_lame_duck(name, ms(hook.timeout), work).unwrap();
    }
    for (number, cleanup) in schedule.cleanup.iter().enumerate() {
        let world = world.clone();
        let name = format!("cleanup {number}");
        let work = step(cleanup.clone(), world.clone(), name.clone());
        let work = async move {
            world.note(Event::HandlersAtCleanup(world.handlers.load(Relaxed)));
            world.note(Event::CleanupBegan(number));
            let _ended = Noted(world, Some(Event::CleanupEnded(number)));
            work.await
        };
        graceful.cleanup(name, ms(cleanup.timeout), work).unwrap();
    }
}

/// Notes the event when it is dropped.
struct Noted(Arc<World>, Option<Event>);

impl Drop for Noted {
    fn drop(&mut self) {
        if let Some(event) = self.1.take() {
            self.0.note(event);
        }
    }
}

async fn step(step: Step, world: Arc<World>, name: String) -> Result<(), &'static str> {
    let mut running = Running::begin(&world, name);
    match step.does {
        Does::End(after) => sleep(ms(after)).await,
        Does::Fail(after) => {
            sleep(ms(after)).await;
            running.ended = Ended::Failed;
            return Err("planned");
        }
        Does::Panic(after) => {
            sleep(ms(after)).await;
            planned_panic();
        }
        Does::Hang => pending().await,
    }
    running.ended = Ended::Returned;
    Ok(())
}

async fn play_hold(hold: Hold, number: usize, start: Instant, world: Arc<World>) {
    sleep_until(start + ms(hold.at)).await;
    let name = format!("hold {number}");
    let mut running = Running::begin(&world, name.clone());
    let guard = world.graceful.hold(name);
    let counted = Counted::new(&world.holds);
    match hold.lasts {
        Some(lasts) => sleep(ms(lasts)).await,
        None => pending().await,
    }
    running.ended = Ended::Returned;
    drop(running);
    drop(guard);
    drop(counted);
}

/// A server that owns its requests: when it is dropped, they are.
async fn serve(requests: Vec<Request>, start: Instant, graceful: Graceful, world: Arc<World>) {
    let arriving = requests.into_iter().enumerate();
    let mut arriving: FuturesUnordered<_> = arriving
        .map(|request| async move {
            sleep_until(start + ms(request.1.at)).await;
            request
        })
        .collect();
    let mut serving = FuturesUnordered::new();
    let drain = graceful.drain_on(pending());
    let mut drain = pin!(drain);
    loop {
        tokio::select! {
            biased;
            Some((number, request)) = arriving.next() => {
                let served = exchange(request, number, &graceful, &world);
                // A panic ends the exchange and nothing else, as it does in a task.
                serving.push(AssertUnwindSafe(served).catch_unwind());
            }
            Some(_) = serving.next() => {}
            () = &mut drain => break,
        }
    }
    drop(arriving);
    while serving.next().await.is_some() {}
    world.server_ended.store(true, Relaxed);
}

/// Notes what became of a request, at the latest when it is dropped.
struct Exchange<'a> {
    world: &'a World,
    seen: Option<SeenRequest>,
    admitted: Option<Counted<'a>>,
}

impl Exchange<'_> {
    fn became(&mut self, became: Became) {
        self.admitted = None;
        if let Some(mut seen) = self.seen.take() {
            seen.became = became;
            seen.ended = self.world.graceful.phase();
            seen.ended_late = self.world.is_stopping.load(Relaxed);
            self.world.seen.lock().unwrap().push(seen);
        }
    }
}

impl Drop for Exchange<'_> {
    fn drop(&mut self) {
        let became = if std::thread::panicking() {
            Became::Broken
        } else {
            Became::Cut
        };
        self.became(became);
    }
}

async fn exchange(request: Request, number: usize, graceful: &Graceful, world: &Arc<World>) {
    let mut exchange = Exchange {
        world,
        seen: Some(SeenRequest {
            number,
            phase: graceful.phase(),
            is_late: world.is_stopping.load(Relaxed),
            in_flight_before: graceful.in_flight(),
            expected_before: world.requests.load(Relaxed) + world.holds.load(Relaxed),
            requests_before: world.requests.load(Relaxed),
            became: Became::Cut,
            ended: graceful.phase(),
            ended_late: false,
        }),
        admitted: None,
    };
    let disconnected = async {
        match request.end {
            End::Disconnect(after) => sleep(ms(after)).await,
            _ => pending().await,
        }
    };
    let has_head = Cell::new(false);
    let became = {
        let answered = answered(
            request.clone(),
            number,
            graceful,
            world,
            &mut exchange.admitted,
            &has_head,
        );
        let mut answered = pin!(answered);
        tokio::select! {
            biased;
            became = &mut answered => became,
            () = disconnected => if has_head.get() { Became::Left } else { Became::Broken },
        }
    };
    exchange.became(became);
}

async fn answered<'a>(
    request: Request,
    number: usize,
    graceful: &Graceful,
    world: &'a Arc<World>,
    admitted: &mut Option<Counted<'a>>,
    has_head: &Cell<bool>,
) -> Became {
    let handler = |_: http::Request<Empty<Bytes>>| {
        let running = Handler::new(world);
        handle(request.clone(), running)
    };
    let service = ServiceBuilder::new()
        .layer(graceful.layer())
        .service(service_fn(handler));
    // Until its answer says something else.
    *admitted = Some(Counted::new(&world.requests));
    let asked = http::Request::builder().uri(path(number));
    let response = service.oneshot(asked.body(Empty::new()).unwrap()).await;
    let response = response.unwrap_or_else(|never| match never {});
    if response.status() != StatusCode::OK {
        *admitted = None;
        return Became::Refused(response.status());
    }
    has_head.set(true);
    let mut body = pin!(response.into_body());
    loop {
        match body.frame().await {
            None => return Became::Whole,
            Some(Ok(_)) => {}
            Some(Err(_)) => return Became::Broken,
        }
    }
}

/// The path of the request with this number.
pub(crate) fn path(number: usize) -> String {
    format!("/{number}")
}

type Answer = Response<StreamBody<stream::BoxStream<'static, Result<Frame<Bytes>, &'static str>>>>;

async fn handle(request: Request, running: Handler) -> Result<Answer, Infallible> {
    sleep(ms(request.handler)).await;
    match request.end {
        End::HandlerPanics => planned_panic(),
        End::Never => pending().await,
        _ => {}
    }
    let frames = stream::unfold((0, running), move |(number, running)| {
        let request = request.clone();
        async move {
            let last = number + 1 >= request.frames;
            match request.end {
                End::BodyPanics | End::BodyFails if last => sleep(ms(request.gap)).await,
                _ if number == request.frames => return None,
                _ => sleep(ms(request.gap)).await,
            }
            if last {
                match request.end {
                    End::BodyPanics => planned_panic(),
                    End::BodyFails => return Some((Err("planned"), (usize::MAX - 1, running))),
                    _ => {}
                }
            }
            let length = if request.large { 20_000 } else { 5 };
            let frame = Frame::data(Bytes::from(vec![b'x'; length]));
            Some((Ok(frame), (number + 1, running)))
        }
    });
    Ok(Response::new(StreamBody::new(frames.boxed())))
}
