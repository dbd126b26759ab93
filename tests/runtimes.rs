//! The runtime in which a lifecycle was first used ends, in any way and at any moment. Tasks that wait on another
//! runtime are still notified in time, and the report says what became of the requests on both.
//!
//! `RUNTIME_ENDS=2000 cargo test --test runtimes at_random` ends more runtimes at random moments.

#![cfg(feature = "signal")]

use std::{
    convert::Infallible,
    env,
    future::{pending, poll_fn},
    ops::RangeInclusive,
    panic::resume_unwind,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{
            AtomicBool, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
        mpsc,
    },
    task::{Context, Poll},
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Empty;
use tokio::{
    runtime::{Builder, Runtime},
    sync::oneshot,
    time,
};
use tower::{Layer, ServiceExt, service_fn};
use tower_graceful::{Graceful, Outcome, Phase, Report, Stop, TaskOutcome};

const MS: fn(u64) -> Duration = Duration::from_millis;

/// The timeout of waits that end by themselves, long enough for a busy machine.
const BOUND: Duration = Duration::from_secs(20);

/// The grace period of [`graceful`]. A stop is over by then, apart from delays of a busy machine.
const END: Duration = Duration::from_millis(1_500);

fn graceful() -> Graceful {
    Graceful::builder()
        .grace_period(END)
        .drain_delay(MS(30))
        .drain_timeout(MS(60))
        .cleanup_timeout(MS(400))
        .build()
        .unwrap()
}

fn runtime(threads: usize) -> Runtime {
    let mut builder = match threads {
        0 => Builder::new_current_thread(),
        threads => {
            let mut builder = Builder::new_multi_thread();
            builder.worker_threads(threads);
            builder
        }
    };
    builder.enable_all().build().unwrap()
}

/// A generator of numbers that are the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, most: u64) -> u64 {
        // Knuth's constants.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = self.0.wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % most
    }
}

/// Waits for the service on a separate runtime. Returns the report, and the times from the call until `draining`
/// and `stopped` resolved.
fn waits_elsewhere(graceful: &Graceful) -> thread::JoinHandle<(Report, [Duration; 2])> {
    let graceful = graceful.clone();
    thread::spawn(move || {
        runtime(1).block_on(async {
            let begun = Instant::now();
            let draining = async {
                graceful.draining().await;
                begun.elapsed()
            };
            let stopped = async {
                graceful.stopped().await;
                begun.elapsed()
            };
            let run = graceful.run(graceful.drain_on(pending()));
            let all = async { tokio::join!(run, draining, stopped) };
            let (report, draining, stopped) = time::timeout(BOUND, all).await.expect("it hangs");
            (report, [draining, stopped])
        })
    })
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Became {
    Whole,
    Refused,
    /// Its runtime has ended.
    Dropped,
}

/// A request that has ended, and the phases before and after that.
#[derive(Clone, Copy, Debug)]
struct Ended {
    became: Became,
    before: Phase,
    after: Phase,
}

/// The requests of one lifecycle.
struct Requests {
    graceful: Graceful,
    /// So many have not ended.
    open: AtomicUsize,
    ended: Mutex<Vec<Ended>>,
}

impl Requests {
    /// A request that begins after the first time, and whose handler takes the second.
    fn request(self: &Arc<Self>, after: Duration, lasts: Duration) -> OneRequest {
        let graceful = self.graceful.clone();
        let admitted = Arc::new(AtomicBool::new(false));
        let admits = Arc::clone(&admitted);
        self.open.fetch_add(1, SeqCst);
        OneRequest {
            requests: Arc::clone(self),
            admitted,
            answer: Some(Box::pin(async move {
                time::sleep(after).await;
                let handler = service_fn(move |_| {
                    admits.store(true, SeqCst);
                    async move {
                        time::sleep(lasts).await;
                        Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
                    }
                });
                let service = graceful.layer().layer(handler);
                let response = service.oneshot(Request::new(Empty::<Bytes>::new()));
                response.await.unwrap().status()
            })),
        }
    }

    /// Of how many requests this is true: for certain, and perhaps.
    fn count(&self, is: impl Fn(&Ended) -> [bool; 2]) -> RangeInclusive<usize> {
        let ended = self.ended.lock().unwrap();
        let count = |which: usize| ended.iter().filter(|it| is(it)[which]).count();
        count(0)..=count(1)
    }

    /// Asserts that the report counts each request, after all have ended.
    fn assert_reported(&self, report: &Report, what: &str) {
        let begun = Instant::now();
        while self.open.load(SeqCst) > 0 {
            assert!(begun.elapsed() < BOUND, "a request does not end: {what}");
            thread::sleep(MS(1));
        }
        let requests = report.requests();
        // While it ended, the stop may have begun, or the drain may have been over.
        let drained = |it: &Ended| {
            [
                it.before > Phase::Serving && it.after < Phase::Closing,
                it.after > Phase::Serving && it.before < Phase::Closing,
            ]
        };
        let drained_and = |became: Became| {
            self.count(|it| drained(it).map(|drained| drained && it.became == became))
        };
        let cut = self.count(|it| {
            [it.before, it.after].map(|at| it.became != Became::Refused && at >= Phase::Closing)
        });
        let refused = self.count(|it| {
            let refused = it.became == Became::Refused;
            [refused && it.after < Phase::Stopped, refused]
        });
        let begun = self.count(|it| {
            [it.before, it.after].map(|at| it.became != Became::Refused && at > Phase::Serving)
        });
        for (name, reported, range) in [
            ("begun", requests.in_flight + requests.admitted, begun),
            ("finished", requests.finished, drained_and(Became::Whole)),
            ("dropped", requests.dropped, drained_and(Became::Dropped)),
            ("cut", requests.cut, cut),
            ("refused", requests.refused, refused),
        ] {
            let ended = self.ended.lock().unwrap();
            assert!(
                range.contains(&reported),
                "{reported} {name}, and not {range:?}: {what}\n{requests:?}\n{ended:?}"
            );
        }
        assert_eq!(report.remaining().requests, requests.cut, "{what}");
        assert!(
            requests.cut == 0 || report.outcome() == Outcome::Forced,
            "{what}"
        );
    }
}

struct OneRequest {
    requests: Arc<Requests>,
    admitted: Arc<AtomicBool>,
    answer: Option<Pin<Box<dyn Future<Output = StatusCode> + Send>>>,
}

impl OneRequest {
    fn ended(&mut self, became: Became, before: Phase) {
        let requests = &self.requests;
        let after = requests.graceful.phase();
        if became == Became::Refused || self.admitted.load(SeqCst) {
            let ended = Ended {
                became,
                before,
                after,
            };
            requests.ended.lock().unwrap().push(ended);
        }
        requests.open.fetch_sub(1, SeqCst);
    }
}

impl Future for OneRequest {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let before = self.requests.graceful.phase();
        let Some(answer) = &mut self.answer else {
            return Poll::Ready(());
        };
        let Poll::Ready(status) = answer.as_mut().poll(cx) else {
            return Poll::Pending;
        };
        self.answer = None;
        let became = if status == StatusCode::OK {
            Became::Whole
        } else {
            Became::Refused
        };
        self.ended(became, before);
        Poll::Ready(())
    }
}

impl Drop for OneRequest {
    fn drop(&mut self) {
        let before = self.requests.graceful.phase();
        if self.answer.take().is_some() {
            self.ended(Became::Dropped, before);
        }
    }
}

fn ends_at_random(seed: u64) {
    let mut random = Random(seed);
    let threads = usize::try_from(random.below(3)).unwrap();
    let first = runtime(threads);
    let graceful = graceful();
    let ran = Arc::new(AtomicBool::new(false));
    let requests = Arc::new(Requests {
        graceful: graceful.clone(),
        open: AtomicUsize::new(0),
        ended: Mutex::default(),
    });
    let mut some = |most| -> Vec<_> {
        let count = random.below(most);
        let micros = |random: &mut Random| Duration::from_micros(random.below(150_000));
        let times = (0..count).map(|_| (micros(&mut random), micros(&mut random)));
        times
            .map(|(after, lasts)| requests.request(after, lasts))
            .collect()
    };
    let [on_first, on_other] = [some(5), some(5)];
    let register = {
        let (graceful, ran) = (graceful.clone(), Arc::clone(&ran));
        async move {
            graceful
                .on_lame_duck("hook", MS(20), async { time::sleep(MS(5)).await })
                .unwrap();
            graceful.worker("worker", |stop| stop).unwrap();
            graceful
                .cleanup("step", MS(200), async move {
                    time::sleep(MS(20)).await;
                    ran.store(true, Relaxed);
                })
                .unwrap();
            tokio::spawn(graceful.stopped());
            tokio::spawn(graceful.run(graceful.drain_on(pending())));
            for request in on_first {
                tokio::spawn(request);
            }
            tokio::task::yield_now().await;
        }
    };
    first.block_on(register);
    let other = runtime(1);
    {
        let _there = other.enter();
        for request in on_other {
            tokio::spawn(request);
        }
        let work = |stop: Stop| async move {
            stop.idle().await;
            time::sleep(MS(20)).await;
        };
        graceful.worker("on another runtime", work).unwrap();
    }
    let driven = threads == 0 && random.below(2) == 0;
    let stops_first = random.below(2) == 0;
    if stops_first {
        graceful.shutdown();
    }
    let elsewhere = waits_elsewhere(&graceful);
    // The runtime ends during the delay, the drain or the cleanup, or after the stop.
    let moment = Duration::from_micros(random.below(150_000));
    if driven {
        first.block_on(async { time::sleep(moment).await });
    } else {
        thread::sleep(moment);
    }
    match random.below(3) {
        0 => drop(first),
        1 => first.shutdown_background(),
        _ => first.shutdown_timeout(MS(random.below(10))),
    }
    let begun = Instant::now();
    graceful.shutdown();
    let (report, [draining, stopped]) = elsewhere.join().unwrap();
    let what = format!("seed {seed}, {threads} threads, after {moment:?}: {report}");
    assert_eq!(graceful.phase(), Phase::Stopped, "{what}");
    assert!(draining <= stopped, "{what}");
    assert!(begun.elapsed() < 2 * END + MS(2_000), "{what}");
    let outcome = |name| {
        let task = report.tasks().iter().find(|task| task.name == name);
        &task.unwrap().outcome
    };
    assert_eq!(*outcome("on another runtime"), TaskOutcome::Done, "{what}");
    // The report tells the truth about the step.
    match outcome("step") {
        TaskOutcome::Done => assert!(ran.load(Relaxed), "{what}"),
        TaskOutcome::Cut | TaskOutcome::NotRun => {
            assert_ne!(report.outcome(), Outcome::Clean, "{what}");
        }
        other => panic!("{other:?}: {what}"),
    }
    // What has been cut may still run.
    drop(other);
    requests.assert_reported(&report, &what);
}

#[test]
fn a_stop_completes_in_time_however_the_first_runtime_ends() {
    let ends = env::var("RUNTIME_ENDS").map_or(150, |ends| ends.parse().unwrap());
    let tasks: Vec<_> = (0..10)
        .map(|task| thread::spawn(move || (task..ends).step_by(10).for_each(ends_at_random)))
        .collect();
    for task in tasks {
        task.join().unwrap();
    }
}

/// The driver on that runtime never runs. The tasks that were to run there are reported as cut or not run.
#[test]
fn a_runtime_that_is_kept_but_not_driven_does_not_hang_a_stop() {
    let first = runtime(0);
    let graceful = graceful();
    first.block_on(async {
        graceful.on_lame_duck("hook", MS(20), async {}).unwrap();
        graceful.worker("worker", |stop| stop).unwrap();
        graceful.cleanup("step", MS(200), async {}).unwrap();
    });
    let elsewhere = waits_elsewhere(&graceful);
    graceful.shutdown();
    let (report, [draining, stopped]) = elsewhere.join().unwrap();
    assert!(draining < MS(1_000), "{report}");
    assert!(stopped < 2 * END, "{report}");
    assert_eq!(
        outcomes(&report),
        [TaskOutcome::NotRun, TaskOutcome::Cut, TaskOutcome::NotRun],
        "{report}"
    );
    assert_eq!(report.outcome(), Outcome::Forced);
    drop(first);
}

/// How long a stop may take here if it waits for nothing: far less than the grace period of [`long`].
const SOON: Duration = Duration::from_secs(5);

/// A stop that waits for its cleanup in vain takes thrice as long as [`SOON`].
fn long() -> Graceful {
    let builder = Graceful::builder().grace_period(3 * SOON);
    builder.drain_delay(Duration::ZERO).build().unwrap()
}

fn outcomes(report: &Report) -> Vec<TaskOutcome> {
    let tasks = report.tasks().iter();
    tasks.map(|task| task.outcome.clone()).collect()
}

/// The worker is told that it is idle while the first driver waits for it, and the runtime of that driver ends then.
#[test]
fn a_worker_of_another_runtime_ends_by_itself_when_the_runtime_of_the_driver_ends() {
    for waits in [true, false] {
        let [first, other] = [1, 1].map(runtime);
        let graceful = first.block_on(async { long() });
        let (begins, begun) = mpsc::channel();
        let (goes_on, may_go_on) = oneshot::channel::<()>();
        {
            let _there = other.enter();
            let work = |stop: Stop| async move {
                stop.idle().await;
                begins.send(()).unwrap();
                may_go_on.await.unwrap();
            };
            graceful.worker("jobs", work).unwrap();
        }
        if waits {
            graceful.cleanup("step", SOON, async {}).unwrap();
        }
        let run = waits.then(|| other.spawn(graceful.run(graceful.drain_on(pending()))));
        graceful.shutdown();
        begun.recv_timeout(BOUND).unwrap();
        // The first driver has begun to wait for the worker, unless the machine is very busy.
        thread::sleep(MS(20));
        drop(first);
        // Longer than another runtime has to take over.
        thread::sleep(MS(400));
        assert_eq!(graceful.phase(), Phase::Closing);
        assert!(goes_on.send(()).is_ok(), "the worker is gone");
        let run = run.unwrap_or_else(|| other.spawn(graceful.run(pending::<()>())));
        let report = other.block_on(run).unwrap();
        let done = vec![TaskOutcome::Done; report.tasks().len()];
        assert_eq!(outcomes(&report), done, "{report}");
        assert_eq!(report.outcome(), Outcome::Clean, "{report}");
        assert!(report.duration() < SOON, "{report}");
    }
}

/// They have been spawned there, and the runtime ends before it polls them.
#[test]
fn a_hook_or_step_that_has_not_begun_runs_in_the_next_runtime() {
    for is_hook in [true, false] {
        // It polls one task in each round: the driver, which spawns the hook or step.
        let mut builder = Builder::new_current_thread();
        let first = builder.event_interval(1).enable_all().build().unwrap();
        let delay = if is_hook { MS(400) } else { MS(0) };
        let builder = Graceful::builder()
            .grace_period(3 * SOON)
            .drain_delay(delay);
        let tasks = || first.metrics().num_alive_tasks();
        let graceful = first.block_on(async {
            let graceful = builder.build().unwrap();
            while tasks() > 1 {
                tokio::task::yield_now().await;
            }
            graceful
        });
        let polled = Arc::new(AtomicBool::new(false));
        let polls = Arc::clone(&polled);
        let job = async move { polls.store(true, Relaxed) };
        if is_hook {
            graceful.on_lame_duck("job", SOON, job).unwrap();
        } else {
            graceful.cleanup("job", SOON, job).unwrap();
        }
        first.block_on(async {
            graceful.shutdown();
            while tasks() < 2 {
                tokio::task::yield_now().await;
            }
        });
        drop(first);
        assert!(!polled.load(Relaxed), "the runtime ended too late");
        let report = runtime(0).block_on(async {
            graceful.stopped().await;
            graceful.run(pending::<()>()).await
        });
        assert_eq!(outcomes(&report), [TaskOutcome::Done], "{report}");
        assert_eq!(report.outcome(), Outcome::Clean, "{report}");
    }
}

/// The first step blocks a thread of a runtime that has been shut down.
#[test]
fn steps_of_two_runtimes_run_one_at_a_time() {
    let (first, other) = (runtime(2), runtime(1));
    let graceful = first.block_on(async { long() });
    let (begins, begun) = mpsc::channel();
    let (release, blocked) = mpsc::channel::<()>();
    let next_begins = begins.clone();
    let blocks = async move {
        begins.send("first").unwrap();
        blocked.recv().unwrap();
    };
    graceful.cleanup("first", 2 * SOON, blocks).unwrap();
    let next = async move { next_begins.send("next").unwrap() };
    graceful.cleanup("next", SOON, next).unwrap();
    let run = other.spawn(graceful.run(graceful.drain_on(pending())));
    graceful.shutdown();
    assert_eq!(begun.recv_timeout(BOUND), Ok("first"));
    first.shutdown_background();
    assert!(begun.recv_timeout(MS(400)).is_err());
    release.send(()).unwrap();
    assert_eq!(begun.recv_timeout(BOUND), Ok("next"));
    let report = other.block_on(run).unwrap();
    assert_eq!(outcomes(&report), [TaskOutcome::Done, TaskOutcome::Done]);
    assert_eq!(report.outcome(), Outcome::Clean, "{report}");
}

/// The driver on the first runtime never runs, and has nothing to do either.
#[test]
fn a_stop_ends_with_its_last_worker_where_the_runtime_of_the_driver_is_not_driven() {
    for end in ["of the worker", "of its runtime", "of its time"] {
        let (first, other) = (runtime(0), runtime(1));
        let builder = Graceful::builder()
            .grace_period(3 * SOON)
            .drain_delay(Duration::ZERO)
            .worker_timeout(if end == "of its time" {
                MS(200)
            } else {
                2 * SOON
            });
        let graceful = first.block_on(async { builder.build().unwrap() });
        let (begins, begun) = mpsc::channel();
        let held = Arc::new(());
        {
            let _there = other.enter();
            let kept = Arc::clone(&held);
            let takes = if end == "of the worker" {
                MS(200)
            } else {
                6 * SOON
            };
            let work = move |stop: Stop| async move {
                stop.idle().await;
                begins.send(()).unwrap();
                time::sleep(takes).await;
                drop(kept);
            };
            graceful.worker("jobs", work).unwrap();
        }
        let elsewhere = waits_elsewhere(&graceful);
        graceful.shutdown();
        begun.recv_timeout(BOUND).unwrap();
        if end == "of its runtime" {
            // The worker is dropped with its runtime.
            other.shutdown_background();
        }
        let (report, [_, stopped]) = elsewhere.join().unwrap();
        assert!(stopped < SOON, "{end}: {report}");
        let (outcome, worker) = if end == "of the worker" {
            (Outcome::Clean, TaskOutcome::Done)
        } else {
            (Outcome::Forced, TaskOutcome::Cut)
        };
        assert_eq!(outcomes(&report), [worker], "{end}: {report}");
        assert_eq!(report.outcome(), outcome, "{end}: {report}");
        assert_eq!(Arc::strong_count(&held), 1, "{end}: the worker goes on");
        drop(first);
    }
}

/// As a guard does that spawns a task when it is dropped, outside of every runtime.
struct Landmine(Arc<AtomicUsize>);

impl Drop for Landmine {
    fn drop(&mut self) {
        self.0.fetch_add(1, SeqCst);
        resume_unwind(Box::new("as the test wants it to"));
    }
}

fn two_landmines(graceful: &Graceful) -> Arc<AtomicUsize> {
    let dropped = Arc::default();
    for name in ["first", "second"] {
        let landmine = Landmine(Arc::clone(&dropped));
        let step = async move { drop(landmine) };
        graceful.cleanup(name, MS(200), step).unwrap();
    }
    dropped
}

/// Two panics at once would end the process.
#[test]
fn steps_that_panic_when_they_are_dropped_are_dropped_one_by_one() {
    let stops = graceful();
    let dropped = two_landmines(&stops);
    runtime(0).block_on(async { stops.handle_signals().unwrap() });
    stops.shutdown();
    let begun = Instant::now();
    while dropped.load(SeqCst) < 2 {
        assert!(begun.elapsed() < BOUND, "{}", stops.phase());
        thread::sleep(MS(1));
    }
    assert_eq!(stops.phase(), Phase::Stopped);
    // A service that is never stopped.
    let unused = graceful();
    let dropped = two_landmines(&unused);
    drop(unused);
    assert_eq!(dropped.load(SeqCst), 2);
}

/// A handle of a runtime still polls futures after the runtime has ended, but tasks cannot be spawned there any more.
#[test]
fn a_task_that_is_polled_in_a_runtime_that_has_ended_does_not_prolong_the_stop() {
    let first = runtime(1);
    let graceful = long();
    first.block_on(async {
        graceful.cleanup("step", MS(200), async {}).unwrap();
        time::sleep(MS(20)).await;
    });
    let handle = first.handle().clone();
    drop(first);
    // Polls it there, and keeps it registered.
    let mut waits = Box::pin(graceful.stopped());
    let polled = handle.block_on(async { futures_util::poll!(&mut waits) });
    assert!(polled.is_pending());
    let begun = Instant::now();
    graceful.shutdown();
    handle.block_on(waits);
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    let report = handle.block_on(graceful.run(pending::<()>()));
    assert_eq!(outcomes(&report), [TaskOutcome::NotRun], "{report}");
}

/// The driver on that runtime is dropped before it was polled.
#[test]
fn a_stop_does_not_wait_for_a_runtime_that_ended_without_being_driven() {
    let first = runtime(0);
    let graceful = long();
    first.block_on(async { graceful.cleanup("step", MS(200), async {}).unwrap() });
    drop(first);
    let begun = Instant::now();
    graceful.shutdown();
    while graceful.phase() < Phase::Stopped {
        assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
        thread::sleep(MS(1));
    }
    let report = runtime(0).block_on(graceful.run(pending::<()>()));
    assert_eq!(outcomes(&report), [TaskOutcome::NotRun], "{report}");
}

/// Makes a lifecycle in this runtime, with a hook. The second value is a server that ends after the hook. If it is
/// the only one, the delay ends with it.
fn with_hook(runtime: &Runtime) -> (Graceful, impl Future<Output = ()> + Send + 'static) {
    let builder = Graceful::builder().grace_period(3 * SOON);
    let graceful = runtime.block_on(async { builder.drain_delay(SOON).build().unwrap() });
    let (ends, ended) = oneshot::channel();
    let hook = async move {
        time::sleep(MS(1)).await;
        ends.send(()).unwrap();
    };
    graceful.on_lame_duck("hook", SOON, hook).unwrap();
    (graceful, async { drop(ended.await) })
}

fn assert_hook_ran(report: &Report, what: &str) {
    assert_eq!(outcomes(report), [TaskOutcome::Done], "{what}: {report}");
    assert!(report.duration() < SOON, "{what}: {report}");
    assert_eq!(report.outcome(), Outcome::Clean, "{what}: {report}");
}

/// Nothing but `run` waits on the last runtime, and its server has nothing to do when the other runtimes end.
#[test]
fn the_runtime_of_run_takes_over_a_hook() {
    for threads in [1, 0] {
        // Without threads it does not even poll its driver.
        let [first, second, last] = [threads, 1, 1].map(runtime);
        let (graceful, server) = with_hook(&first);
        let (polls, polled) = oneshot::channel();
        let run = last.spawn(graceful.run(async {
            polls.send(()).unwrap();
            server.await;
        }));
        last.block_on(polled).unwrap();
        second.spawn(graceful.stopped());
        for other in [first, second] {
            thread::sleep(MS(20));
            drop(other);
        }
        graceful.shutdown();
        let report = last.block_on(run).unwrap();
        assert_hook_ran(&report, &format!("{threads} threads"));
    }
}

/// Nothing but the control thread is left.
#[test]
fn a_stop_completes_where_no_runtime_is_left() {
    let graceful = graceful();
    let first = runtime(1);
    first.block_on(async {
        graceful.cleanup("step", MS(200), async {}).unwrap();
        tokio::task::yield_now().await;
    });
    graceful.shutdown();
    drop(first);
    let begun = Instant::now();
    while graceful.phase() < Phase::Stopped {
        assert!(begun.elapsed() < BOUND, "it hangs");
        thread::sleep(MS(1));
    }
    assert!(begun.elapsed() < END, "{:?}", begun.elapsed());
    // `run` gives the report to whatever asks.
    let mut run = Box::pin(graceful.run(pending::<()>()));
    let report = loop {
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        if let std::task::Poll::Ready(report) = run.as_mut().poll(&mut cx) {
            break report;
        }
    };
    assert_eq!(report.tasks()[0].outcome, TaskOutcome::NotRun);
    assert_eq!(report.outcome(), Outcome::CleanupFailed);
}

/// A runtime ends while a task of another one begins to wait. The task finds no driver, or it is woken.
#[test]
fn a_task_that_begins_to_wait_while_the_first_runtime_ends_takes_over() {
    let mut random = Random(1);
    for round in 0..1_000 {
        let (first, other) = (runtime(0), runtime(0));
        let (graceful, server) = with_hook(&first);
        let arrived = AtomicUsize::new(0);
        let meet_and_spin = |spins| {
            arrived.fetch_add(1, SeqCst);
            while arrived.load(SeqCst) < 2 {
                thread::yield_now();
            }
            (0..spins).for_each(|_| std::hint::spin_loop());
        };
        let spins = [random.below(300), random.below(300)];
        let report = thread::scope(|scope| {
            let waits = scope.spawn(|| {
                let mut run = Box::pin(graceful.run(server));
                meet_and_spin(spins[0]);
                // It is polled again only if it is woken.
                other.block_on(poll_fn(|cx| {
                    let polled = run.as_mut().poll(cx);
                    arrived.fetch_add(1, SeqCst);
                    polled
                }))
            });
            meet_and_spin(spins[1]);
            drop(first);
            while arrived.load(SeqCst) < 3 {
                thread::yield_now();
            }
            graceful.shutdown();
            waits.join().unwrap()
        });
        assert_hook_ran(&report, &format!("round {round}"));
    }
}
