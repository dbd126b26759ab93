//! The log events.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    fmt,
    future::pending,
    sync::{Arc, Mutex, Once},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Empty;
use tokio::{
    runtime::{self, Runtime},
    time::{Instant, sleep},
};
use tower::{Layer as _, Service, service_fn};
use tower_graceful::{Graceful, Outcome, Phase, TaskOutcome};
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
    subscriber::DefaultGuard,
};
use tracing_subscriber::{
    layer::{Context, Layer, SubscriberExt},
    registry,
};

use crate::support::{
    DEADLINE, DELAY, InFlight, LET_GO, comes, does_not_hang, graceful, ms, pass, paused_runtime,
    plan, quick_request, request, s, serve, server, without_delay,
};

/// One event of this crate.
#[derive(Clone, Debug)]
struct Line {
    at: Instant,
    level: Level,
    fields: BTreeMap<&'static str, String>,
}

impl Line {
    fn message(&self) -> &str {
        &self.fields["message"]
    }

    fn is_transition(&self) -> bool {
        self.fields.contains_key("reason")
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.fields.insert(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.fields.insert(field.name(), value.to_owned());
    }
}

type OnLine = Box<dyn Fn(&Line) + Send + Sync>;

/// Stores this crate's events, and may do something at each.
struct Capture {
    lines: Arc<Mutex<Vec<Line>>>,
    on_line: OnLine,
}

impl<S: Subscriber> Layer<S> for Capture {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if !event.metadata().target().starts_with("tower_graceful") {
            return;
        }
        let mut line = Line {
            at: Instant::now(),
            level: *event.metadata().level(),
            fields: BTreeMap::new(),
        };
        event.record(&mut line);
        (self.on_line)(&line);
        self.lines.lock().unwrap().push(line);
    }
}

/// The events that this thread logs from now on.
struct Log {
    lines: Arc<Mutex<Vec<Line>>>,
    _guard: DefaultGuard,
}

impl Log {
    fn new() -> Self {
        Self::with(|_| ())
    }

    fn with(on_line: impl Fn(&Line) + Send + Sync + 'static) -> Self {
        // With a single subscriber, tracing asks the subscriber of the first thread that reaches an
        // event whether it is enabled, and remembers the answer for all threads. This is a second
        // one.
        static GLOBAL: Once = Once::new();
        GLOBAL.call_once(|| {
            let _ = tracing::subscriber::set_global_default(registry());
        });
        let lines = Arc::default();
        let capture = Capture {
            lines: Arc::clone(&lines),
            on_line: Box::new(on_line),
        };
        let guard = tracing::subscriber::set_default(registry().with(capture));
        Self {
            lines,
            _guard: guard,
        }
    }

    /// Without events of the debug level.
    fn lines(&self) -> Vec<Line> {
        let mut lines = self.lines.lock().unwrap().clone();
        lines.retain(|line| line.level < Level::DEBUG);
        lines
    }

    fn debug_lines(&self) -> Vec<Line> {
        let mut lines = self.lines.lock().unwrap().clone();
        lines.retain(|line| line.level == Level::DEBUG);
        lines
    }

    /// Phase, reason, seconds and level of every transition.
    fn transitions(&self) -> Vec<(String, String, String, Level)> {
        let of = |line: &Line, name| line.fields[name].clone();
        self.lines()
            .iter()
            .filter(|line| line.is_transition())
            .map(|line| {
                (
                    of(line, "phase"),
                    of(line, "reason"),
                    of(line, "seconds"),
                    line.level,
                )
            })
            .collect()
    }

    fn progress(&self) -> Vec<Line> {
        let mut lines = self.lines();
        lines.retain(|line| !line.is_transition());
        lines
    }
}

fn transition(phase: &str, reason: &str, seconds: &str) -> (String, String, String, Level) {
    (phase.into(), reason.into(), seconds.into(), Level::INFO)
}

#[tokio::test(start_paused = true)]
async fn every_transition_is_one_event_with_its_reason() {
    let log = Log::new();
    let graceful = graceful();
    let held = request(&graceful);
    let connection = graceful.track(());
    for _ in 0..10 {
        graceful.shutdown();
    }
    pass(ms(5500)).await;
    drop(held);
    pass(ms(500)).await;
    drop(connection);
    graceful.stopped().await;
    graceful.shutdown();

    assert_eq!(
        log.transitions(),
        [
            transition("lame duck", "shutdown()", "0.0"),
            transition("draining", "the delay is over", "5.0"),
            transition("closing", "nothing is in flight", "5.5"),
            transition("stopped", "everything is closed", "6.0"),
        ]
    );
    let lines = log.lines();
    assert_eq!(lines.len(), 4, "{lines:#?}");
    assert_eq!(
        lines[0].message(),
        "shutdown: lame duck, because shutdown()"
    );
    assert_eq!(lines[0].fields["in_flight"], "1");
    assert_eq!(lines[0].fields["connections"], "1");
    assert_eq!(lines[0].fields["seconds_left"], "5.0");
    assert_eq!(lines[1].fields["seconds_left"], "10.0");
    assert_eq!(lines[2].fields["in_flight"], "0");
    assert_eq!(lines[3].fields["connections"], "0");
}

#[cfg(feature = "axum")]
#[tokio::test(start_paused = true)]
async fn connections_that_are_reset_in_a_queue_are_logged_once_when_the_service_has_stopped() {
    use axum::serve::Listener as _;

    for (clients, expected) in [(2, ["2"].as_slice()), (0, &[])] {
        let log = Log::new();
        let graceful = without_delay();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        tcp.set_nonblocking(true).unwrap();
        let address = tcp.local_addr().unwrap();
        let tcp = tokio::net::TcpListener::from_std(tcp).unwrap();
        let mut listener = graceful.listener(tcp);
        let connection = graceful.track(());
        assert!(
            tokio_test::task::spawn(listener.accept())
                .poll()
                .is_pending()
        );
        graceful.shutdown();
        let _clients: Vec<_> = (0..clients)
            .map(|_| std::net::TcpStream::connect(address).unwrap())
            .collect();
        // The listener is not polled again, and dropped after it should have closed.
        pass(s(2)).await;
        drop(listener);
        drop(connection);
        graceful.stopped().await;
        let lines = log.lines();
        let queued: Vec<_> = (lines.iter())
            .filter_map(|line| line.fields.get("queued"))
            .collect();
        assert_eq!(queued, expected, "{lines:#?}");
        let last = lines.last().unwrap();
        assert_eq!(
            last.fields.contains_key("queued"),
            clients > 0,
            "{lines:#?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn the_plan_is_logged_once_before_everything_else() {
    let log = Log::new();
    let graceful = graceful();
    let plan = graceful.plan();
    assert_eq!(log.debug_lines().len(), 0, "nothing has used it");
    let run = serve(&graceful, server(&graceful)).await;
    let lines = log.debug_lines();
    assert_eq!(lines.len(), 1, "{lines:#?}");
    assert_eq!(lines[0].message(), "shutdown plan, in seconds");
    for (name, value) in [
        ("grace_period", plan.grace_period),
        ("drain_delay", plan.drain_delay),
        ("interrupt_delay", plan.interrupt_delay),
        ("drain_deadline", plan.drain_deadline),
        ("cleanup_timeout", plan.cleanup_timeout),
        ("margin", plan.margin),
    ] {
        let logged: f64 = lines[0].fields[name].parse().unwrap();
        assert!((logged - value.as_secs_f64()).abs() < 1e-3, "{name}");
    }
    graceful.shutdown();
    assert_eq!(run.await.unwrap().outcome(), Outcome::Clean);
    assert_eq!(log.debug_lines().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_stop_as_the_first_event_logs_the_plan() {
    let log = Log::new();
    let graceful = graceful();
    graceful.shutdown();
    let lines = log.lines.lock().unwrap().clone();
    assert_eq!(lines[0].message(), "shutdown plan, in seconds");
    assert!(lines[1].is_transition());
}

#[tokio::test(start_paused = true)]
async fn a_forced_end_is_a_warning_that_says_so() {
    let log = Log::new();
    let graceful = graceful();
    let _held = request(&graceful);
    graceful.shutdown();
    graceful.stopped().await;
    let transitions = log.transitions();
    let mut closing = transition("closing", "the drain deadline has passed", "15.0");
    closing.3 = Level::WARN;
    let mut stopped = transition("stopped", "cut work did not end in time", "15.25");
    stopped.3 = Level::WARN;
    assert_eq!(transitions[2..], [closing, stopped]);
    let lines = log.lines();
    assert_eq!(lines.last().unwrap().at - lines[0].at, DEADLINE + LET_GO);
}

#[tokio::test(start_paused = true)]
async fn connections_cut_at_the_deadline_are_a_warning_too() {
    let log = Log::new();
    let graceful = graceful();
    let (io, _peer) = tokio::io::duplex(16);
    let mut io = graceful.track(io);
    tokio::spawn(async move {
        let _ = tokio::io::AsyncReadExt::read_u8(&mut io).await;
    });
    let run = serve(&graceful, server(&graceful)).await;
    graceful.shutdown();
    let report = run.await.unwrap();
    assert_eq!(report.outcome().exit_code(), 1);
    let warned = log.lines().iter().any(|line| line.level == Level::WARN);
    assert!(warned, "{:#?}", log.lines());
}

#[tokio::test(start_paused = true)]
async fn a_server_that_ends_is_named_as_the_reason() {
    let log = Log::new();
    let graceful = graceful();
    let _report = graceful.run(sleep(s(1))).await;
    assert_eq!(
        log.transitions(),
        [
            transition("lame duck", "server ended", "0.0"),
            transition("draining", "every server has ended", "0.0"),
            transition("closing", "nothing is in flight", "0.0"),
            transition("stopped", "everything is closed", "0.0"),
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_drain_logs_progress_every_two_seconds() {
    let log = Log::new();
    let graceful = graceful();
    let held = request(&graceful);
    let other = request(&graceful);
    let _connection = graceful.track(());
    // Not a multiple of two seconds after the lifecycle was made.
    pass(ms(700)).await;
    let begun = Instant::now();
    graceful.shutdown();
    pass(DELAY + ms(4500)).await;
    drop(other);
    pass(s(2)).await;
    drop(held);

    let progress = log.progress();
    let at: Vec<_> = progress.iter().map(|line| line.at - begun).collect();
    assert_eq!(at, [s(7), s(9), s(11)]);
    let in_flight: Vec<_> = progress
        .iter()
        .map(|line| line.fields["in_flight"].as_str())
        .collect();
    assert_eq!(in_flight, ["2", "2", "1"]);
    assert_eq!(
        progress[0].message(),
        "shutdown: draining, in flight 2, connections 1"
    );
    assert_eq!(progress[0].fields["seconds_left"], "8.0");
    assert!(progress.iter().all(|line| line.level == Level::INFO));
}

#[tokio::test(start_paused = true)]
async fn progress_is_logged_while_connections_close() {
    let log = Log::new();
    let graceful = without_delay();
    let connection = graceful.track(());
    graceful.shutdown();
    pass(ms(4500)).await;
    drop(connection);
    graceful.stopped().await;
    let messages: Vec<_> = log
        .progress()
        .iter()
        .map(|line| line.message().to_owned())
        .collect();
    let expected = "shutdown: closing, in flight 0, connections 1";
    assert_eq!(messages, [expected, expected]);
}

#[tokio::test(start_paused = true)]
async fn progress_names_the_oldest_requests_where_names_were_asked_for() {
    let log = Log::new();
    let builder = plan().drain_delay(Duration::ZERO).name_requests(true);
    let graceful = builder.build().unwrap();
    let held = request(&graceful);
    pass(ms(500)).await;
    let inner = |_| pending::<Result<Response<Empty<Bytes>>, Infallible>>();
    let mut other = graceful.layer().layer(service_fn(inner));
    let _other = other.call(
        Request::post("/other?q")
            .body(Empty::<Bytes>::new())
            .unwrap(),
    );
    graceful.shutdown();
    pass(s(3)).await;
    drop(held);
    pass(s(1)).await;
    let progress = log.progress();
    let messages: Vec<_> = progress.iter().map(Line::message).collect();
    assert_eq!(
        messages,
        [
            "shutdown: draining, in flight 2, connections 0, \
             oldest GET / 2.5 s, no response yet; POST /other 2.0 s, no response yet",
            "shutdown: draining, in flight 1, connections 0, oldest POST /other 4.0 s, no response yet",
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn progress_says_that_a_hold_is_in_flight_and_how_long_cleanup_may_take() {
    let log = Log::new();
    let graceful = without_delay();
    let hold = graceful.hold("job");
    graceful.cleanup("slow", s(5), pass(s(3))).unwrap();
    graceful.shutdown();
    pass(s(3)).await;
    drop(hold);
    graceful.stopped().await;
    let mut progress = log.progress();
    progress.retain(|line| !line.fields.contains_key("outcome"));
    let lines: Vec<_> = progress
        .iter()
        .map(|line| (line.message(), &*line.fields["seconds_left"]))
        .collect();
    assert_eq!(
        lines,
        [
            (
                "shutdown: draining, in flight 1, connections 0, waits for hold job",
                "8.0"
            ),
            (
                "shutdown: closing, in flight 0, connections 0, waits for cleanup slow",
                "25.0"
            ),
            (
                "shutdown: closing, in flight 0, connections 0, waits for cleanup slow",
                "23.0"
            ),
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn progress_names_the_workers_and_then_the_step_that_the_stop_waits_for() {
    let log = Log::new();
    let graceful = without_delay();
    let hold = graceful.hold("upload");
    for name in ["a", "b", "c", "d", "e"] {
        graceful.worker(name, |_| pass(s(5))).unwrap();
    }
    graceful.worker("f", |_| pass(s(7))).unwrap();
    graceful.worker("quick", |stop| stop).unwrap();
    graceful.cleanup("first", s(5), pass(s(2))).unwrap();
    graceful.cleanup("second", s(5), async {}).unwrap();
    graceful.shutdown();
    pass(s(3)).await;
    drop(hold);
    graceful.stopped().await;
    let mut progress = log.progress();
    progress.retain(|line| !line.fields.contains_key("outcome"));
    let messages: Vec<_> = progress.iter().map(Line::message).collect();
    let closing = "shutdown: closing, in flight 0, connections 0, waits for";
    assert_eq!(
        messages,
        [
            // Workers are joined when nothing is in flight any more.
            "shutdown: draining, in flight 1, connections 0, waits for hold upload".to_owned(),
            format!("{closing} worker a, worker b, worker c and 3 more"),
            format!("{closing} worker f"),
            format!("{closing} cleanup first"),
        ]
    );
    let last = progress.last().unwrap();
    assert_eq!(last.fields["waits_for"], "cleanup first");
}

#[tokio::test(start_paused = true)]
async fn progress_that_waits_for_requests_alone_has_no_names() {
    let log = Log::new();
    let graceful = without_delay();
    let held = request(&graceful);
    graceful.worker("queue", |stop| stop).unwrap();
    graceful.shutdown();
    pass(s(3)).await;
    drop(held);
    let progress = log.progress();
    assert!(
        !progress[0].fields.contains_key("waits_for"),
        "{progress:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn the_end_of_every_task_is_an_event_of_its_moment() {
    async fn panics() {
        pass(ms(500)).await;
        std::panic::resume_unwind(Box::new("dropped the tables"));
    }
    let log = Log::new();
    let builder = plan().worker_timeout(s(1));
    let graceful = builder.build().unwrap();
    let begun = Instant::now();
    let early = |_| async { pass(s(3)).await };
    graceful.worker("early", early).unwrap();
    let fails = |_| async {
        pass(s(4)).await;
        Err("out of luck")
    };
    graceful.worker("fails", fails).unwrap();
    graceful.worker("endless", |_| pending::<()>()).unwrap();
    graceful.worker("obedient", |stop| stop).unwrap();
    graceful
        .on_lame_duck("hook", s(2), pending::<()>())
        .unwrap();
    graceful.cleanup("database", s(2), panics()).unwrap();
    graceful.cleanup("logs", s(2), async {}).unwrap();
    pass(s(10)).await;
    graceful.shutdown();
    graceful.stopped().await;
    let mut lines = log.progress();
    lines.retain(|line| line.fields.contains_key("outcome"));
    let lines: Vec<_> = lines
        .iter()
        .map(|line| (line.message(), line.at - begun, line.level))
        .collect();
    let (info, warn) = (Level::INFO, Level::WARN);
    assert_eq!(
        lines,
        [
            ("shutdown: worker early: ended early", s(3), warn),
            ("shutdown: worker fails: failed", s(4), warn),
            ("shutdown: hook hook: cut", s(12), warn),
            ("shutdown: worker obedient: done", s(15), info),
            ("shutdown: worker endless: cut", s(16), warn),
            ("shutdown: cleanup database: panicked", ms(16_500), warn),
            ("shutdown: cleanup logs: done", ms(16_500), info),
        ]
    );
    let errors: Vec<_> = log
        .lines()
        .iter()
        .filter_map(|line| line.fields.get("error").cloned())
        .collect();
    assert_eq!(errors, ["out of luck", "dropped the tables"]);
}

fn real_runtime() -> Runtime {
    let mut builder = runtime::Builder::new_current_thread();
    builder.enable_all().build().unwrap()
}

#[test]
fn a_worker_that_is_lost_with_its_runtime_is_logged_at_once_and_stops_nothing() {
    let log = Log::new();
    let graceful = graceful();
    real_runtime().block_on(async {
        graceful.worker("jobs", |_| pending::<()>()).unwrap();
        graceful
            .critical_worker("vital", |_| pending::<()>())
            .unwrap();
    });
    for line in ["shutdown: worker jobs: cut", "shutdown: worker vital: cut"] {
        let is_logged = |it: &Line| it.message() == line && it.level == Level::WARN;
        assert!(comes(|| log.lines().iter().any(is_logged)), "{line}");
    }
    assert_eq!(graceful.phase(), Phase::Serving);
    let report = paused_runtime().block_on(async {
        graceful.shutdown();
        graceful.run(pending::<()>()).await
    });
    let mut tasks = report.tasks().iter();
    assert!(
        tasks.all(|task| task.outcome == TaskOutcome::Cut),
        "{report}"
    );
    assert_eq!(report.outcome(), Outcome::Forced);
    assert_eq!(
        log.lines()
            .iter()
            .filter(|it| it.message().contains("worker"))
            .count(),
        2
    );
}

/// As in a `main` that does not await `stopped`.
#[test]
fn a_runtime_that_ends_during_a_stop_that_nothing_awaits_logs_once_what_has_not_ended() {
    for is_awaited in [false, true] {
        let log = Log::new();
        let runtime = real_runtime();
        let graceful = without_delay();
        runtime.block_on(async {
            graceful.worker("jobs", |_| pending::<()>()).unwrap();
            graceful.cleanup("database", s(1), async {}).unwrap();
            graceful.shutdown();
            graceful.draining().await;
        });
        let mut stopped = tokio_test::task::spawn(graceful.stopped());
        if is_awaited {
            // The task might go on in another runtime.
            tokio_test::assert_pending!(stopped.poll());
        }
        drop(runtime);
        assert!(comes(|| graceful.phase() == Phase::Stopped));
        let is_end = |line: &Line| line.message().starts_with("the runtime ends");
        let ends = || log.lines().into_iter().filter(is_end).collect::<Vec<_>>();
        let is_over = |line: &Line| line.message().starts_with("shutdown: stopped");
        assert!(comes(|| log.lines().iter().any(is_over)));
        if is_awaited {
            assert!(ends().is_empty(), "{:?}", ends());
        } else {
            let [line] = ends().try_into().unwrap();
            assert!(line.message().contains("cleanup database"), "{line:?}");
            assert_eq!(line.level, Level::WARN);
        }
    }
}

#[test]
fn a_subscriber_that_panics_at_the_end_of_a_task_stops_nothing() {
    does_not_hang(|| {
        let _log = Log::with(|_| panic!("the log panics, as the test wants it to"));
        let graceful = graceful();
        let report = paused_runtime().block_on(async {
            graceful.worker("worker", |stop| stop).unwrap();
            graceful.on_lame_duck("hook", s(1), async {}).unwrap();
            graceful.cleanup("step", s(1), async {}).unwrap();
            let run = serve(&graceful, server(&graceful)).await;
            graceful.shutdown();
            run.await.unwrap()
        });
        assert_eq!(report.outcome(), Outcome::Clean);
        let done = report
            .tasks()
            .iter()
            .all(|task| task.outcome == TaskOutcome::Done);
        assert!(done, "{report}");
    });
}

#[tokio::test(start_paused = true)]
async fn no_progress_is_logged_during_the_delay_and_after_the_stop() {
    let log = Log::new();
    let graceful = graceful();
    graceful.shutdown();
    pass(DELAY - ms(1)).await;
    assert_eq!(log.lines().len(), 1);
    pass(s(600)).await;
    assert_eq!(log.lines().len(), 4);
}

#[tokio::test(start_paused = true)]
async fn requests_and_connections_are_not_logged() {
    let log = Log::new();
    let graceful = graceful();
    for _ in 0..100 {
        assert_eq!(quick_request(&graceful).await, 200);
        drop(request(&graceful));
        drop(graceful.track(()));
    }
    assert_eq!(log.lines().len(), 0);
    let held = request(&graceful);
    graceful.shutdown();
    for _ in 0..100 {
        assert_eq!(quick_request(&graceful).await, 200);
        drop(graceful.track(()));
    }
    assert_eq!(log.lines().len(), 1);
    pass(DELAY).await;
    for _ in 0..100 {
        assert_eq!(quick_request(&graceful).await, 503);
    }
    assert_eq!(log.lines().len(), 2);
    drop(held);
}

#[test]
fn a_subscriber_may_look_at_the_service_from_within_an_event() {
    does_not_hang(|| {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let graceful = graceful();
        let log = Log::with({
            let (graceful, seen) = (graceful.clone(), Arc::clone(&seen));
            move |line| {
                let snapshot = graceful.snapshot();
                assert!(snapshot.phase >= graceful.subscribe().phase());
                let _ = (graceful.connections(), graceful.is_ready());
                let _ = format!("{graceful:?}");
                graceful.set_ready(true);
                let named = line.fields["phase"].clone();
                seen.lock().unwrap().push((named, graceful.phase()));
            }
        });
        paused_runtime().block_on(async {
            let held = request(&graceful);
            graceful.shutdown();
            pass(DELAY + ms(2500)).await;
            drop(held);
            graceful.stopped().await;
        });
        drop(log);
        let seen = seen.lock().unwrap();
        assert_eq!(seen.len(), 5, "four transitions and a line of progress");
        assert_eq!(seen[0], ("lame duck".to_owned(), Phase::LameDuck));
        assert_eq!(seen[1], ("draining".to_owned(), Phase::Draining));
        assert_eq!(seen[2], ("draining".to_owned(), Phase::Draining));
    });
}

#[test]
fn a_subscriber_may_change_the_service_from_within_an_event() {
    does_not_hang(|| {
        let graceful = graceful();
        let log = Log::with({
            let graceful = graceful.clone();
            move |_| {
                graceful.shutdown();
                drop(graceful.track(()));
                drop(request(&graceful));
                drop((graceful.draining(), graceful.stopped(), server(&graceful)));
            }
        });
        paused_runtime().block_on(async {
            let held = request(&graceful);
            graceful.shutdown();
            pass(DELAY + ms(2500)).await;
            drop(held);
            graceful.stopped().await;
        });
        assert_eq!(log.transitions().len(), 4, "{:#?}", log.lines());
    });
}

#[test]
fn an_event_that_says_a_phase_has_come_is_never_ahead_of_the_handle() {
    // Also if several steps are taken at once.
    let phases = [
        (Phase::LameDuck, "lame duck"),
        (Phase::Draining, "draining"),
        (Phase::Closing, "closing"),
        (Phase::Stopped, "stopped"),
    ];
    let graceful = without_delay();
    let log = Log::with({
        let graceful: Graceful = graceful.clone();
        move |line| {
            let (named, _) = phases
                .into_iter()
                .find(|(_, name)| *name == line.fields["phase"])
                .unwrap();
            assert!(graceful.phase() >= named);
        }
    });
    graceful.shutdown();
    assert_eq!(graceful.phase(), Phase::Stopped);
    // On a separate thread, with the subscriber of this one.
    assert!(comes(|| log.transitions().len() == 4));
}

#[test]
fn a_request_that_ends_while_the_line_is_written_ends_the_drain() {
    let leaving: Arc<Mutex<Option<InFlight>>> = Arc::default();
    let _log = Log::with({
        let leaving = leaving.clone();
        move |line| {
            if line.message().starts_with("shutdown: draining, because") {
                drop(leaving.lock().unwrap().take());
            }
        }
    });
    paused_runtime().block_on(async {
        let graceful = graceful();
        *leaving.lock().unwrap() = Some(request(&graceful));
        let begun = Instant::now();
        graceful.shutdown();
        graceful.stopped().await;
        assert_eq!(begun.elapsed(), DELAY, "not at the next progress line");
    });
}

#[test]
fn a_subscriber_that_panics_stops_nothing() {
    does_not_hang(|| {
        // Set here, because a subscriber belongs to the thread that sets it.
        let _log = Log::with(|_| panic!("the log panics, as the test wants it to"));
        let graceful = graceful();
        let report = paused_runtime().block_on(async {
            let run = serve(&graceful, server(&graceful)).await;
            graceful.shutdown();
            run.await.unwrap()
        });
        assert_eq!(report.outcome(), Outcome::Clean);
    });
}

/// Every client that reaches the route can cause them.
#[cfg(feature = "axum")]
#[test]
fn refused_calls_of_the_pre_stop_route_are_logged_once_a_second() {
    paused_runtime().block_on(async {
        let log = Log::new();
        let graceful = Graceful::new();
        let calls = async |count: u32| {
            for _ in 0..count {
                let response = graceful
                    .pre_stop()
                    .call(Request::new(Empty::<Bytes>::new()));
                assert_eq!(response.await.unwrap().status(), 403);
            }
        };
        calls(1000).await;
        sleep(ms(999)).await;
        calls(1).await;
        sleep(ms(1)).await;
        calls(10).await;
        let suppressed = |line: &Line| line.fields["suppressed"].clone();
        let lines = log.lines();
        assert_eq!(
            lines.iter().map(suppressed).collect::<Vec<_>>(),
            ["0", "1000"]
        );
        assert!(lines[1].message().contains("1000"), "{lines:?}");
        // Each lifecycle has its own limit.
        let other = Graceful::new()
            .pre_stop()
            .call(Request::new(Empty::<Bytes>::new()));
        assert_eq!(other.await.unwrap().status(), 403);
        assert_eq!(log.lines().len(), 3);
    });
}
