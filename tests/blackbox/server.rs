//! The server under test. `server::run` is the `main` of the child process.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    process::{self, ExitCode},
    sync::LazyLock,
    thread,
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{ConnectInfo, DefaultBodyLimit, Path, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Version, header},
    response::{IntoResponse, Response},
    routing::{any, get, post},
    serve::Listener,
};
use fork::Fork;
use futures_util::{StreamExt, stream};
use http_body_util::{BodyExt, Full};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
    service::TowerToHyperService,
};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use tower_graceful::{Graceful, GracefulBuilder, Phase, Report, Serve, Stop};

use crate::{
    chaos::record::{Record, failing},
    long_lived,
    tls::server as tls,
};

/// The ways to put the crate under a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// `graceful.serve(listener, app)`.
    Serve,
    /// axum's server with the tracked listener and the drain future, inside `graceful.run`.
    Run,
    /// The loop of `docs/other_servers.md`: hyper's connections over `graceful.track`, inside `graceful.run`.
    Tracked,
    /// axum's server with the drain future, and nothing else.
    Smallest,
    /// axum's server with its own shutdown future, made of `handle_signals` and `subscribe`.
    Listening,
}

impl Form {
    pub(crate) const ALL: &[Self] = &[Self::Serve, Self::Run, Self::Smallest];
    /// The forms that cut what has not ended at the deadline. In the smallest form axum alone runs the
    /// server, and axum waits without a limit.
    pub(crate) const CUTTING: &[Self] = &[Self::Serve, Self::Run];
    /// The forms with each way to track connections.
    pub(crate) const TRACKING: &[Self] = &[Self::Serve, Self::Run, Self::Tracked];
}

/// The knobs of a scenario: arguments `name=value` of the child process.
pub(crate) struct Knobs<'a>(&'a [String]);

impl Knobs<'_> {
    fn text(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find_map(|arg| arg.strip_prefix(name)?.strip_prefix('='))
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.text(name).map(|text| text.parse().unwrap())
    }

    pub(crate) fn millis(&self, name: &str) -> Option<Duration> {
        match self.text(name) {
            Some("max") => Some(Duration::MAX),
            _ => self.number(name).map(Duration::from_millis),
        }
    }
}

/// Sets the limit of open files to `files`, or to the hard limit if that is lower. Returns the limit.
pub(crate) fn allow_files(files: u64) -> u64 {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};

    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let files = files.min(most);
    setrlimit(Resource::RLIMIT_NOFILE, files, most).unwrap();
    files
}

pub(crate) fn run(args: &[String]) -> ExitCode {
    let knobs = Knobs(args);
    let log = tracing_subscriber::fmt().with_ansi(false);
    if knobs.text("log") == Some("blocks") {
        log.with_writer(|| -> io::Stderr {
            loop {
                thread::park();
            }
        })
        .init();
    } else {
        log.with_writer(io::stderr).init();
    }
    let forked = knobs.text("forked").map(|_| forked(&knobs));
    let mut runtime = match knobs.number("threads") {
        // The runtime of the calling thread.
        Some(0) => tokio::runtime::Builder::new_current_thread(),
        threads => {
            let mut runtime = tokio::runtime::Builder::new_multi_thread();
            runtime.worker_threads(threads.unwrap_or(4).try_into().unwrap());
            runtime
        }
    };
    let runtime = runtime.enable_all().build().unwrap();
    let inherited = forked.filter(|_| knobs.text("forked") == Some("inherits"));
    let code = runtime.block_on(serve(&knobs, inherited));
    // Waits for the blocking work on its threads.
    drop(runtime);
    if knobs.text("log") != Some("blocks") {
        tracing::info!("the process ends");
    }
    code
}

/// Whether all threads of this process but the calling one wait. True if the system does not report it.
fn others_wait() -> bool {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else {
        thread::sleep(Duration::from_millis(200));
        return true;
    };
    let others =
        tasks.filter(|task| task.as_ref().unwrap().file_name() != *process::id().to_string());
    let mut stats =
        others.filter_map(|it| std::fs::read_to_string(it.unwrap().path().join("stat")).ok());
    // The state follows the name, which is in parentheses.
    stats.all(|stat| stat.contains("(graceful-") && stat.contains(") S "))
}

/// Forks this process after a lifecycle has begun to handle its signals. Returns the lifecycle in the child,
/// whose runtime does not exist yet. The parent says when its own copy has stopped, and ends.
fn forked(knobs: &Knobs<'_>) -> Graceful {
    let graceful = builder(knobs).build().unwrap();
    graceful.handle_signals().unwrap();
    // A lock that another thread holds during a fork stays locked in the child.
    while !others_wait() {
        thread::sleep(Duration::from_millis(1));
    }
    if let Fork::Parent(_) = fork::fork().unwrap() {
        while graceful.phase() < Phase::Stopped {
            thread::sleep(Duration::from_millis(1));
        }
        println!("the parent has stopped");
        process::exit(0);
    }
    println!("child {}", process::id());
    graceful
}

/// Prints each phase, with the answer of readiness and the time since the first phase of the stop. It runs
/// on a thread outside the runtime, so that blocked workers do not delay it.
fn observe(graceful: Graceful) {
    thread::spawn(move || {
        let mut last = graceful.phase();
        let mut begun = None;
        while last < Phase::Stopped {
            let phase = graceful.phase();
            if phase > last {
                let after = begun.get_or_insert_with(Instant::now).elapsed();
                let ready = graceful.is_ready();
                println!(
                    "phase {phase}, ready {ready}, after {} ms",
                    after.as_millis()
                );
                last = phase;
            }
            thread::sleep(Duration::from_millis(1));
        }
    });
}

fn listener_on_stdin() -> TcpListener {
    use std::os::fd::AsFd;

    let socket = io::stdin().as_fd().try_clone_to_owned().unwrap();
    let listener = std::net::TcpListener::from(socket);
    listener.set_nonblocking(true).unwrap();
    TcpListener::from_std(listener).unwrap()
}

async fn listener_on(port: Option<u64>) -> TcpListener {
    let port = port.unwrap_or(0).try_into().unwrap();
    TcpListener::bind(("127.0.0.1", port)).await.unwrap()
}

fn builder(knobs: &Knobs<'_>) -> GracefulBuilder {
    let mut builder = Graceful::builder();
    if knobs.text("delay") != Some("default") {
        builder = builder.drain_delay(knobs.millis("delay").unwrap_or(Duration::from_secs(1)));
    }
    if let Some(shared) = knobs.text("shared") {
        builder = builder.shared_listener(shared.parse().unwrap());
    }
    builder = builder
        .drain_timeout(knobs.millis("drain").unwrap_or(Duration::from_secs(3)))
        .keep_listening(knobs.text("keep_listening") != Some("false"))
        .retry_after(Duration::from_secs(7))
        .exempt("/metrics")
        .exempt("/nested/metrics");
    if let Some(grace_period) = knobs.millis("grace") {
        builder = builder.grace_period(grace_period);
    }
    if let Some(spread) = knobs.millis("spread") {
        builder = builder.close_spread(spread);
    }
    if let Some(spread) = knobs.millis("drain_spread") {
        builder = builder.drain_spread(spread);
    }
    if let Some(timeout) = knobs.millis("worker_timeout") {
        builder = builder.worker_timeout(timeout);
    }
    builder = builder
        .name_requests(knobs.text("names").is_some())
        .watchdog(knobs.text("watchdog").is_some());
    if let Some(limit) = knobs.number("limit") {
        builder = builder.max_in_flight(limit.try_into().unwrap());
    }
    if let Some(status) = knobs.number("unready") {
        let status = u16::try_from(status).unwrap();
        builder = builder.unready_status(StatusCode::from_u16(status).unwrap());
    }
    // A value of two numbers with a colon between them.
    let pair = |name| {
        let (first, second) = knobs.text(name)?.split_once(':')?;
        Some((
            first.parse::<u32>().unwrap(),
            second.parse::<u32>().unwrap(),
        ))
    };
    if let Some((minimum, quiet_for)) = pair("quiet") {
        let ms = |it: u32| Duration::from_millis(it.into());
        builder = builder.leave_when_quiet(ms(minimum), ms(quiet_for));
    }
    if let Some((failures, probers)) = pair("noticed") {
        builder = builder.leave_when_noticed(failures, probers.try_into().unwrap());
    }
    builder
}

async fn serve(knobs: &Knobs<'_>, inherited: Option<Graceful>) -> ExitCode {
    let _ = knobs.number("files").map(allow_files);
    let graceful = match inherited.map_or_else(|| builder(knobs).build(), Ok) {
        Ok(graceful) => graceful,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(64);
        }
    };
    if knobs.text("observed").is_some() {
        observe(graceful.clone());
    }
    register(&graceful, knobs);
    let record = knobs.text("chaos").map(|_| Record::new(&graceful));
    let app = app(&graceful, knobs, record.as_ref());
    if knobs.text("listener") == Some("unix") {
        return serve_unix(graceful, app, knobs).await;
    }
    let listener = match knobs.text("listener") {
        Some("stdin") => listener_on_stdin(),
        _ => listener_on(knobs.number("port")).await,
    };
    let address = listener.local_addr().unwrap();

    if let Some(how) = knobs.text("admin") {
        serve_admin(&graceful, how).await;
    }

    if knobs.text("worker").is_some() {
        tokio::spawn(graceful.draining());
    }
    let start_time = knobs.millis("startup").unwrap_or_default();
    if knobs.text("shutdown") == Some("first") {
        graceful.shutdown();
    }
    let starting = async {
        println!("starting {address}");
        tokio::time::sleep(start_time).await;
        println!("listening {address}");
    };
    let report = match knobs.text("form").unwrap() {
        "Serve" if knobs.text("tls").is_some() => {
            let app = app.into_make_service_with_connect_info::<SocketAddr>();
            let served = graceful.serve(tls::listener(&graceful, listener, knobs), app);
            let served = set_up(served, knobs);
            starting.await;
            served.await
        }
        "Run" if knobs.text("tls").is_some() => {
            let app = app.into_make_service_with_connect_info::<SocketAddr>();
            let server = axum::serve(tls::listener(&graceful, listener, knobs), app)
                .with_graceful_shutdown(graceful.drain());
            starting.await;
            graceful.run(server).await
        }
        "Serve" if knobs.text("connect_info") == Some("none") => {
            let served = graceful.serve(listener, app);
            starting.await;
            served.await
        }
        "Serve" => {
            let app = app.into_make_service_with_connect_info::<SocketAddr>();
            let served = set_up(graceful.serve(listener, app), knobs);
            starting.await;
            served.await
        }
        "Run" => {
            let app = app.into_make_service_with_connect_info::<SocketAddr>();
            let server = axum::serve(graceful.listener(listener), app)
                .with_graceful_shutdown(graceful.drain());
            starting.await;
            graceful.run(server).await
        }
        "Tracked" => {
            starting.await;
            graceful
                .run(serve_tracked(graceful.clone(), listener, app))
                .await
        }
        form => return serve_without_report(form, graceful, listener, app, starting).await,
    };
    end(knobs, report, record).await
}

/// Serves in the loop of `docs/other_servers.md`. `tests/guide.rs` compares it with the page.
async fn serve_tracked(graceful: Graceful, listener: TcpListener, service: Router) {
    let connections = GracefulShutdown::new();
    let mut drain = graceful.drain();
    loop {
        tokio::select! {
            () = &mut drain => break,
            accepted = listener.accept() => {
                let stream = match accepted {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        tracing::error!(%error, "no connection was accepted");
                        // Without a pause this loop would be busy while no file descriptor is left.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                };
                let io = TokioIo::new(graceful.track(stream)); // counted, and cut at the deadline
                let service = TowerToHyperService::new(service.clone());
                let mut http = auto::Builder::new(TokioExecutor::new());
                http.http1().timer(TokioTimer::new()); // for hyper's limit of 30 s for a request head
                let connection = http.serve_connection_with_upgrades(io, service).into_owned();
                tokio::spawn(connections.watch(connection));
            }
        }
    }
    drop(listener);
    connections.shutdown().await;
}

/// Serves in a form that has no report.
async fn serve_without_report(
    form: &str,
    graceful: Graceful,
    listener: TcpListener,
    app: Router,
    starting: impl Future<Output = ()>,
) -> ExitCode {
    match form {
        "Smallest" => {
            let drain = graceful.drain();
            starting.await;
            let app = app.into_make_service_with_connect_info::<SocketAddr>();
            axum::serve(listener, app)
                .with_graceful_shutdown(drain)
                .await
                .unwrap();
        }
        // Without the crate, as a reference for other forms. Used with `layer=none`.
        "Plain" => {
            let mut sigterm = signal(SignalKind::terminate()).unwrap();
            starting.await;
            let app = app.into_make_service_with_connect_info::<SocketAddr>();
            axum::serve(listener, app)
                .with_graceful_shutdown(async move {
                    sigterm.recv().await.unwrap();
                })
                .await
                .unwrap();
        }
        "Listening" => {
            graceful.handle_signals().unwrap();
            starting.await;
            let mut phases = graceful.subscribe();
            let stopped = async move {
                let _ = phases.reached(Phase::Closing).await;
            };
            axum::serve(listener, app)
                .with_graceful_shutdown(stopped)
                .await
                .unwrap();
        }
        other => panic!("no such form: {other}"),
    }
    long_lived::server::all_have_said_so().await;
    println!("stopped");
    ExitCode::SUCCESS
}

/// Serves a Unix listener that is the standard input.
async fn serve_unix(graceful: Graceful, app: Router, knobs: &Knobs<'_>) -> ExitCode {
    use std::os::fd::AsFd;

    let socket = io::stdin().as_fd().try_clone_to_owned().unwrap();
    let listener = std::os::unix::net::UnixListener::from(socket);
    listener.set_nonblocking(true).unwrap();
    let listener = tokio::net::UnixListener::from_std(listener).unwrap();
    // The tests expect an address. This one stands for a socket that has none.
    println!("starting 0.0.0.0:0");
    println!("listening 0.0.0.0:0");
    let report = match knobs.text("form").unwrap() {
        "Serve" => graceful.serve(listener, app).await,
        "Run" => {
            let server = axum::serve(graceful.listener(listener), app)
                .with_graceful_shutdown(graceful.drain());
            graceful.run(server).await
        }
        other => panic!("no such form: {other}"),
    };
    end(knobs, report, None).await
}

/// Prints the report, and ends the process in the way that the knobs say.
async fn end(knobs: &Knobs<'_>, report: Report, record: Option<Record>) -> ExitCode {
    if let Some(record) = record {
        // Requests that are still answered after the end would be noted.
        tokio::time::sleep(Duration::from_millis(20)).await;
        record.print(&report);
    }
    println!("report {}", format!("{report}").replace('\n', " |"));
    match knobs.text("exit") {
        Some("now") => report.exit(),
        Some("by_signal") => report.exit_by_signal(),
        Some("late") => {
            tokio::time::sleep(Duration::from_secs(60)).await;
            report.into()
        }
        _ => report.into(),
    }
}

fn set_up<L: Listener, M, S>(mut served: Serve<L, M, S>, knobs: &Knobs<'_>) -> Serve<L, M, S> {
    if let Some(timeout) = knobs.millis("header_read_timeout") {
        served = served.header_read_timeout(timeout);
    }
    served.half_close(knobs.text("half_close").is_some())
}

/// Runs a second server for figures, without a layer.
async fn serve_admin(graceful: &Graceful, how: &str) {
    let admin = Router::new().route("/figures", get(|| async { "figures" }));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("admin {}", listener.local_addr().unwrap());
    if how == "tracked" {
        tokio::spawn(graceful.serve(listener, admin).into_future());
    } else {
        let served = axum::serve(listener, admin);
        tokio::spawn(
            served
                .with_graceful_shutdown(graceful.stopped())
                .into_future(),
        );
    }
}

/// Registers the work that the knobs name: `name:ms`, or `name:ms:how` for work that fails.
fn register(graceful: &Graceful, knobs: &Knobs<'_>) {
    let listed = |knob| {
        knobs
            .text(knob)
            .into_iter()
            .flat_map(|list| list.split(','))
    };
    for hook in listed("hooks") {
        let (name, work) = work(hook);
        let bound = Duration::from_secs(2);
        graceful.on_lame_duck(name, bound, work).unwrap();
    }
    for worker in listed("workers") {
        let (name, work) = work(worker);
        let notified = name.clone();
        let worker = |stop: Stop| async move {
            stop.await;
            println!("{notified} is notified");
            work.await
        };
        graceful.worker(name, worker).unwrap();
    }
    for step in listed("cleanup") {
        let (name, work) = work(step);
        let bound = Duration::from_millis(500);
        graceful.cleanup(name, bound, work).unwrap();
    }
}

/// Work of this length that prints its beginning and its end.
fn work(
    text: &str,
) -> (
    String,
    impl Future<Output = Result<(), String>> + Send + use<>,
) {
    struct Over(String);

    impl Drop for Over {
        fn drop(&mut self) {
            println!("{} is over", self.0);
        }
    }

    let mut parts = text.split(':');
    let name = parts.next().unwrap().to_owned();
    let length = Duration::from_millis(parts.next().unwrap().parse().unwrap());
    let how = parts.next().unwrap_or_default().to_owned();
    let over = Over(name.clone());
    let work = async move {
        println!("{} begins", over.0);
        tokio::time::sleep(length).await;
        match &*how {
            "fails" => return Err(format!("{} is broken", over.0)),
            "panics" => panic!("{} has had enough", over.0),
            "blocks" => std::thread::sleep(Duration::from_secs(60)),
            "hangs" => std::future::pending().await,
            _ => {}
        }
        Ok(())
    };
    (name, work)
}

fn app(graceful: &Graceful, knobs: &Knobs<'_>, record: Option<&Record>) -> Router {
    let [counting, connected, stopping, marking] = [(); 4].map(|()| graceful.clone());
    let holding = graceful.clone();
    let job = move |Path(ms): Path<u64>| async move {
        let hold = holding.hold("job");
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(ms)).await;
            println!("the job is over");
            drop(hold);
        });
        "begun"
    };
    let count = move || async move { counting.in_flight().to_string() };
    let connections = move || async move { connected.connections().to_string() };
    let shutdown = move |Path(calls): Path<usize>| async move {
        let calls = (0..calls).map(|_| {
            let graceful = stopping.clone();
            tokio::spawn(async move { graceful.shutdown() })
        });
        for call in calls.collect::<Vec<_>>() {
            call.await.unwrap();
        }
        "triggered"
    };
    let [for_plain, for_failing, for_grpc] = [(); 3].map(|()| graceful.clone());
    let after_stop = move |Path((ms, kib)): Path<(u64, usize)>| async move {
        sleep_after_stop(&for_plain, ms).await;
        vec![b'x'; kib * 1024]
    };
    let fails_after_stop = move |Path(kib): Path<usize>| async move {
        sleep_after_stop(&for_failing, 0).await;
        failing_body(kib)
    };
    let grpc = move |Path((ms, kib)): Path<(u64, usize)>, _message: Bytes| async move {
        sleep_after_stop(&for_grpc, ms).await;
        message(kib)
    };
    let set_ready = move |Path(ready): Path<bool>| async move { marking.set_ready(ready) };
    let behind = Router::new()
        .route("/", get(|| async { "hello" }))
        .route("/sleep/{ms}", get(sleep))
        .route("/stream/{chunks}/{ms}", get(stream))
        .route("/bytes/{ms}/{kib}", any(bytes))
        .route("/after_stop/{ms}/{kib}", any(after_stop))
        .route("/fails_after_stop/{kib}", get(fails_after_stop))
        .route("/grpc/{ms}/{kib}", post(grpc))
        .route(
            "/peer",
            get(|ConnectInfo(peer): ConnectInfo<SocketAddr>| async move { peer.to_string() }),
        )
        .route("/never", any(never))
        .route("/block/{ms}", get(block))
        .route("/wait-and-block", get(wait_and_block))
        .route("/large", get(large))
        .route("/buffered", get(|| async { vec![b'x'; 150_000] }))
        .route(
            "/silent",
            get(|| async { Body::from_stream(stream::pending::<io::Result<Bytes>>()) }),
        )
        .route("/job/{ms}", post(job))
        .route("/stuck", get(stuck))
        .route("/spawn-blocking/{ms}", get(spawn_blocking))
        .route("/upgrade", any(upgrade))
        .route("/panic", get(panic))
        .route("/panic-in-body", get(panic_in_body))
        .route("/empty/{status}", get(empty))
        .route(
            "/upload",
            post(|body: Bytes| async move { body.len().to_string() })
                .layer(DefaultBodyLimit::max(8 << 20)),
        )
        .route("/metrics", get(|| async { "metrics" }))
        .route("/shutdown/{calls}", post(shutdown))
        .route("/ready/{ready}", post(set_ready))
        .merge(long_lived(graceful, knobs))
        .nest(
            "/nested",
            Router::new()
                .route("/metrics", get(|| async { "nested metrics" }))
                .merge(graceful.probes()),
        )
        .merge(queue(graceful, knobs.millis("queue")))
        .route("/failing", get(failing))
        .fallback(|| async { (StatusCode::NOT_FOUND, "nothing here") });
    let behind = Record::inside(record, behind);
    let behind = match knobs.text("layer") {
        None => behind.layer(graceful.layer()),
        Some("none") => behind,
        Some("other") => behind.layer(Graceful::new().layer()),
        Some(other) => panic!("no such layer: {other}"),
    };
    let behind = Record::outside(record, behind);
    // Outside the layer, so that these requests do not change the counts that they read.
    let behind = match knobs.text("pre_stop") {
        Some(_) => behind.merge(graceful.pre_stop().into_router()),
        None => behind,
    };
    behind
        .merge(graceful.probes())
        .route("/outside/{ms}", get(sleep))
        .route("/count", get(count))
        .route("/connections", get(connections))
}

/// A queue of jobs. The handler answers 202, and a worker takes the time `each` for a job. The worker is the one in
/// the documentation of `Graceful::worker` and in `docs/workers.md`.
fn queue(graceful: &Graceful, each: Option<Duration>) -> Router {
    let Some(each) = each else {
        return Router::new();
    };
    let process = move |job: u64| async move {
        tokio::time::sleep(each).await;
        println!("done {job}");
    };
    let (sender, mut jobs) = mpsc::channel(1000);
    let worker = move |stop: Stop| async move {
        let mut idle = stop.idle();
        loop {
            tokio::select! {
                () = &mut idle => break,
                Some(job) = jobs.recv() => process(job).await,
            }
        }
        jobs.close();
        while let Some(job) = jobs.recv().await {
            process(job).await;
        }
    };
    graceful.worker("jobs", worker).unwrap();
    Router::new()
        .route("/queue/{ms}/{job}", post(submit))
        .with_state(sender)
}

async fn submit(
    State(jobs): State<mpsc::Sender<u64>>,
    Path((ms, job)): Path<(u64, u64)>,
) -> StatusCode {
    tokio::time::sleep(Duration::from_millis(ms)).await;
    if jobs.send(job).await.is_ok() {
        StatusCode::ACCEPTED
    } else {
        println!("closed too early");
        StatusCode::SERVICE_UNAVAILABLE
    }
}

fn long_lived(graceful: &Graceful, knobs: &Knobs<'_>) -> Router {
    let code = knobs.number("close").unwrap_or(1001);
    let within = knobs.millis("close_within");
    long_lived::server::routes(
        graceful,
        code.try_into().unwrap(),
        within.unwrap_or(Duration::from_secs(2)),
        knobs.text("loud").is_some(),
    )
}

async fn sleep(Path(ms): Path<u64>) -> impl IntoResponse {
    tokio::time::sleep(Duration::from_millis(ms)).await;
    ([("x-handler", "kept")], "slept")
}

/// Answers with `kib` KiB in one piece after `ms` milliseconds. Reads nothing of the request body.
async fn bytes(Path((ms, kib)): Path<(u64, usize)>) -> Vec<u8> {
    tokio::time::sleep(Duration::from_millis(ms)).await;
    vec![b'x'; kib * 1024]
}

/// Resolves `ms` milliseconds after the start of the stop.
async fn sleep_after_stop(graceful: &Graceful, ms: u64) {
    graceful.subscribe().reached(Phase::LameDuck).await;
    tokio::time::sleep(Duration::from_millis(ms)).await;
}

/// The response of a gRPC call: one message of `kib` KiB, and the status OK.
fn message(kib: usize) -> impl IntoResponse {
    let mut message = vec![0];
    message.extend(u32::try_from(kib * 1024).unwrap().to_be_bytes());
    message.resize(message.len() + kib * 1024, b'x');
    let trailers = HeaderMap::from_iter([(
        HeaderName::from_static("grpc-status"),
        HeaderValue::from_static("0"),
    )]);
    let body = Full::new(Bytes::from(message)).with_trailers(async { Some(Ok(trailers)) });
    let head = [(header::CONTENT_TYPE, "application/grpc")];
    (head, Body::new(body))
}

async fn stream(Path((chunks, ms)): Path<(u32, u64)>) -> Body {
    Body::from_stream(stream::unfold(0, move |sent| async move {
        if sent == chunks {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(ms)).await;
        Some((Ok::<_, Infallible>(format!("chunk {sent}\n")), sent + 1))
    }))
}

/// Never resolves.
async fn never(_request: Request) -> &'static str {
    std::future::pending().await
}

/// Never resolves, and prints a line when it is dropped.
async fn stuck() -> &'static str {
    struct Gone;

    impl Drop for Gone {
        fn drop(&mut self) {
            println!("the handler is gone");
        }
    }

    let _gone = Gone;
    std::future::pending().await
}

/// Runs blocking work, which cannot be aborted.
async fn spawn_blocking(Path(ms): Path<u64>) {
    tokio::task::spawn_blocking(move || std::thread::sleep(Duration::from_millis(ms)))
        .await
        .unwrap();
}

/// Blocks a thread of the runtime.
async fn block(Path(ms): Path<u64>) -> &'static str {
    std::thread::sleep(Duration::from_millis(ms));
    "blocked"
}

/// Blocks the thread that was woken by the timer.
async fn wait_and_block() {
    tokio::time::sleep(Duration::from_millis(100)).await;
    std::thread::sleep(Duration::from_secs(60));
}

/// A body that is larger than the buffers of any socket.
async fn large() -> Bytes {
    static LARGE: LazyLock<Bytes> = LazyLock::new(|| vec![b'x'; 64 * 1024 * 1024].into());
    LARGE.clone()
}

/// Upgrades the connection, and then echoes bytes: after `Upgrade` over HTTP/1, and after an extended
/// CONNECT over HTTP/2.
async fn upgrade(request: Request) -> Response {
    let mut response = Response::new(Body::empty());
    if request.version() < Version::HTTP_2 {
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, HeaderValue::from_static("echo"));
    }
    tokio::spawn(async move {
        let upgraded = hyper::upgrade::on(request).await.unwrap();
        let (mut read, mut write) = tokio::io::split(TokioIo::new(upgraded));
        let _ = tokio::io::copy(&mut read, &mut write).await;
    });
    response
}

async fn panic() -> &'static str {
    panic!("a handler panics")
}

async fn panic_in_body() -> Body {
    Body::from_stream(stream::unfold(0, |sent| async move {
        assert_eq!(sent, 0, "a body panics");
        Some((Ok::<_, Infallible>("before the panic"), sent + 1))
    }))
}

/// A body with one piece, and then an error.
fn failing_body(kib: usize) -> Body {
    let piece = stream::iter([Ok(vec![b'x'; kib * 1024])]);
    // The piece is written before the body is asked for more.
    let error = stream::once(async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        Err(io::Error::other("it fails"))
    });
    Body::from_stream(piece.chain(error))
}

async fn empty(Path(status): Path<u16>) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    let etag = HeaderValue::from_static("\"1\"");
    response.headers_mut().insert(header::ETAG, etag);
    response
}
