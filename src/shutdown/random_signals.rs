//! Signals at random moments of a stop with random work, on tokio's paused clock.

use std::{
    convert::Infallible,
    future::pending,
    pin::pin,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use futures_util::{StreamExt, stream::FuturesUnordered};
use http::{Request, Response, StatusCode};
use http_body_util::Empty;
use proptest::{collection::vec, option, prelude::*};
use tokio::{
    runtime,
    time::{Duration, Instant, sleep, sleep_until},
};
use tower::{ServiceExt, service_fn};
use tower_layer::Layer;

use crate::{
    handle::{builder::GracefulBuilder, graceful::Graceful},
    phase::Phase,
    report::{Outcome, Report, TaskOutcome, Trigger},
};

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Two SIGINTs within this time count as one.
const DOUBLED: Duration = ms(100);

/// What closing and steps may take after the end of a short grace period.
const LEAST_TIMES: Duration = ms(200);

/// Times in milliseconds.
#[derive(Clone, Debug)]
struct Schedule {
    grace_period: u64,
    drain_delay: Option<u64>,
    interrupt_delay: Option<u64>,
    drain_timeout: Option<u64>,
    /// In the order of their arrival, each this long after the one before.
    signals: Vec<(u64, Trigger)>,
    /// When each request arrives, and how long its handler takes, or forever.
    requests: Vec<(u64, Option<u64>)>,
    /// When each hold is dropped, or never.
    holds: Vec<Option<u64>>,
    /// How long each worker takes after draining has begun, or forever.
    workers: Vec<Option<u64>>,
    /// The timeout of each cleanup step, and how long it takes.
    steps: Vec<(u64, u64)>,
}

fn schedules() -> impl Strategy<Value = Schedule> {
    let signal = prop_oneof![
        4 => Just(Trigger::Interrupt),
        4 => Just(Trigger::Terminate),
        1 => Just(Trigger::Shutdown),
    ];
    // Some come so soon that they count as one.
    let gap = prop_oneof![Just(0), 1..300_u64, 1..4000_u64];
    let share = || option::of(prop_oneof![Just(0), 0..2500_u64]);
    let time = || prop_oneof![Just(0), Just(1000), 0..9000_u64];
    let lasts = move || option::weighted(0.8, time());
    (
        prop_oneof![Just(10_000), 3000..30_000_u64],
        [share(), share(), share()],
        vec((gap, signal), 1..8),
        vec((time(), lasts()), 0..4),
        vec(lasts(), 0..3),
        vec(lasts(), 0..2),
        vec((0..4000_u64, 0..3000_u64), 0..3),
    )
        .prop_map(
            |(grace_period, shares, signals, requests, holds, workers, steps)| {
                let [drain_delay, interrupt_delay, drain_timeout] = shares;
                Schedule {
                    grace_period,
                    drain_delay,
                    interrupt_delay,
                    drain_timeout,
                    signals,
                    requests,
                    holds,
                    workers,
                    steps,
                }
            },
        )
}

/// A request, a hold, a worker or a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Request,
    Hold,
    Worker,
    Step,
}

#[derive(Clone, Debug)]
struct Ran {
    kind: Kind,
    began: Phase,
    /// A request arrived after the stop had begun.
    is_late: bool,
    /// A request was answered 503.
    is_refused: bool,
    /// The phase in which it ended, and whether it came to its own end.
    ended: Option<(Phase, bool)>,
}

/// A signal that was not the first.
#[derive(Clone, Copy, Debug)]
struct Further {
    signal: Trigger,
    /// It is a SIGINT that a SIGINT came shortly before.
    is_doubled: bool,
    before: Phase,
    after: Phase,
    /// The cleanup had begun.
    in_cleanup: bool,
}

struct World {
    graceful: Graceful,
    ran: Mutex<Vec<Ran>>,
}

/// Notes the end of its work when it is dropped.
struct Running {
    world: Arc<World>,
    index: usize,
    is_done: bool,
}

impl World {
    /// How many requests have not ended.
    fn requests(&self) -> usize {
        let ran = self.ran.lock().unwrap();
        let is_open = |ran: &&Ran| ran.kind == Kind::Request && ran.ended.is_none();
        ran.iter().filter(is_open).count()
    }

    fn begin(self: &Arc<Self>, kind: Kind) -> Running {
        let began = self.graceful.phase();
        let mut ran = self.ran.lock().unwrap();
        ran.push(Ran {
            kind,
            began,
            is_late: began > Phase::Serving,
            is_refused: false,
            ended: None,
        });
        Running {
            world: self.clone(),
            index: ran.len() - 1,
            is_done: false,
        }
    }
}

impl Running {
    async fn lasts(&mut self, lasts: Option<u64>) {
        match lasts {
            Some(lasts) => sleep(ms(lasts)).await,
            None => pending().await,
        }
        self.is_done = true;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let ended = Some((self.world.graceful.phase(), self.is_done));
        self.world.ran.lock().unwrap()[self.index].ended = ended;
    }
}

/// What happened in a stop.
struct Seen {
    /// Each phase, and when it began.
    phases: Vec<(Phase, Duration)>,
    further: Vec<Further>,
    ran: Vec<Ran>,
    /// Requests in flight when the stop began.
    in_flight: usize,
    report: Report,
}

fn build(schedule: &Schedule) -> Option<Graceful> {
    let set = |builder: GracefulBuilder,
               time: Option<u64>,
               knob: fn(GracefulBuilder, Duration) -> GracefulBuilder| {
        match time {
            Some(time) => knob(builder, ms(time)),
            None => builder,
        }
    };
    let mut builder = Graceful::builder().grace_period(ms(schedule.grace_period));
    builder = set(builder, schedule.drain_delay, GracefulBuilder::drain_delay);
    let interrupt_delay = schedule.interrupt_delay;
    builder = set(builder, interrupt_delay, GracefulBuilder::interrupt_delay);
    let drain_timeout = schedule.drain_timeout;
    builder = set(builder, drain_timeout, GracefulBuilder::drain_timeout);
    builder.build().ok()
}

/// Answers one request.
async fn answer(world: Arc<World>, lasts: Option<u64>) {
    let mut running = world.begin(Kind::Request);
    let index = running.index;
    let mut handler = Some(async move {
        running.lasts(lasts).await;
        Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
    });
    let service = service_fn(|_| handler.take().expect("one request"));
    let service = world.graceful.layer().layer(service);
    let response = service.oneshot(Request::new(Empty::<Bytes>::new())).await;
    let status = response.map(|response| response.status());
    if status == Ok(StatusCode::SERVICE_UNAVAILABLE) {
        world.ran.lock().unwrap()[index].is_refused = true;
    }
}

/// A server that owns its requests.
async fn serve(schedule: Schedule, begun: Instant, world: Arc<World>) {
    let mut requests: FuturesUnordered<_> = schedule
        .requests
        .iter()
        .map(|&(at, lasts)| {
            let world = world.clone();
            async move {
                sleep_until(begun + ms(at)).await;
                // Nothing connects any more.
                if world.graceful.phase() < Phase::Closing {
                    answer(world, lasts).await;
                }
            }
        })
        .collect();
    let mut drain = pin!(world.graceful.drain_on(pending()));
    loop {
        tokio::select! {
            biased;
            Some(()) = requests.next() => {}
            () = &mut drain => return,
        }
    }
}

/// Plays the signals of which `keeps` is true, at their times. `None` if there is no such plan.
fn play(schedule: &Schedule, keeps: impl Fn(usize, Trigger) -> bool) -> Option<Seen> {
    let mut runtime = runtime::Builder::new_current_thread();
    let runtime = runtime.enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let graceful = build(schedule)?;
        let world = Arc::new(World {
            graceful: graceful.clone(),
            ran: Mutex::default(),
        });
        for &worker in &schedule.workers {
            let world = world.clone();
            let work = move |stop| async move {
                let mut running = world.begin(Kind::Worker);
                std::future::IntoFuture::into_future(stop).await;
                running.lasts(worker).await;
            };
            graceful.worker("worker", work).unwrap();
        }
        for &(timeout, lasts) in &schedule.steps {
            let world = world.clone();
            let step = async move {
                let mut running = world.begin(Kind::Step);
                running.lasts(Some(lasts)).await;
            };
            graceful.cleanup("step", ms(timeout), step).unwrap();
        }
        let begun = Instant::now();
        for &lasts in &schedule.holds {
            let world = world.clone();
            let hold = graceful.hold("hold");
            tokio::spawn(async move {
                let _hold = hold;
                // It is dropped before the hold.
                let mut running = world.begin(Kind::Hold);
                running.lasts(lasts).await;
            });
        }
        let mut phases = graceful.subscribe();
        let seen = tokio::spawn(async move {
            let mut seen = Vec::new();
            while seen.last().is_none_or(|(phase, _)| *phase < Phase::Stopped) {
                let phase = phases.changed().await.unwrap();
                seen.push((phase, begun.elapsed()));
            }
            seen
        });
        let server = serve(schedule.clone(), begun, world.clone());
        let run = tokio::spawn(graceful.run(server));
        // The server polls its requests first.
        tokio::task::yield_now().await;
        let mut at = begun;
        let mut further = Vec::new();
        let mut in_flight = None;
        let mut last_interrupt = None::<Instant>;
        for (number, &(gap, signal)) in schedule.signals.iter().enumerate() {
            at += ms(gap);
            sleep_until(at).await;
            if !keeps(number, signal) {
                continue;
            }
            let before = graceful.phase();
            let in_cleanup = {
                let state = graceful.shared().state();
                let shutdown = state.shutdown.as_ref();
                shutdown.is_some_and(|shutdown| shutdown.cleanup.is_some())
            };
            let first = in_flight.is_none();
            in_flight.get_or_insert(world.requests());
            if signal == Trigger::Shutdown {
                graceful.shutdown();
            } else {
                graceful.shared().signal(signal);
            }
            let is_doubled = signal == Trigger::Interrupt
                && last_interrupt.is_some_and(|last| last.elapsed() < DOUBLED);
            if signal == Trigger::Interrupt && !is_doubled {
                last_interrupt = Some(Instant::now());
            }
            if !first {
                further.push(Further {
                    signal,
                    is_doubled,
                    before,
                    after: graceful.phase(),
                    in_cleanup,
                });
            }
        }
        let report = run.await.unwrap();
        let phases = seen.await.unwrap();
        let ran = world.ran.lock().unwrap().clone();
        Some(Seen {
            phases,
            further,
            ran,
            in_flight: in_flight.unwrap(),
            report,
        })
    })
}

impl Seen {
    fn ended(&self) -> Duration {
        self.phases.last().unwrap().1
    }

    fn count(&self, kind: Kind, is: impl Fn(&Ran) -> bool) -> usize {
        let ran = self.ran.iter().filter(|ran| ran.kind == kind);
        ran.filter(|ran| is(ran)).count()
    }
}

fn each_signal_does_what_it_should(seen: &Seen) -> Result<(), TestCaseError> {
    for further in &seen.further {
        let ends = further.signal == Trigger::Interrupt && !further.is_doubled;
        let expected = if !ends || further.before == Phase::Stopped {
            further.after == further.before
        } else if further.before == Phase::Closing && !further.in_cleanup {
            // It ends the wait before the connections close, or the wait for what was cut.
            true
        } else {
            further.after > further.before
        };
        prop_assert!(expected, "{further:?}\n{}", seen.report);
    }
    // Only a further SIGINT abandons the cleanup, or the wait for what was cut.
    let abandons = |it: &Further| it.before == Phase::Closing && it.after == Phase::Stopped;
    if seen.report.outcome() == Outcome::Abandoned {
        prop_assert!(seen.further.iter().any(abandons), "{}", seen.report);
    }
    Ok(())
}

fn the_report_says_what_became_of_the_work(
    schedule: &Schedule,
    seen: &Seen,
) -> Result<(), TestCaseError> {
    let report = &seen.report;
    for request in seen.ran.iter().filter(|it| it.kind == Kind::Request) {
        prop_assert_eq!(request.is_refused, request.began >= Phase::Draining);
    }
    let outlasts =
        |ran: &Ran| !ran.is_refused && ran.ended.is_none_or(|(at, _)| at >= Phase::Closing);
    let requests = report.requests();
    let cut = seen.count(Kind::Request, outlasts);
    let admitted = seen.count(Kind::Request, |it| it.is_late && !it.is_refused);
    prop_assert_eq!(requests.in_flight, seen.in_flight, "{}", report);
    prop_assert_eq!(requests.admitted, admitted, "{}", report);
    prop_assert_eq!(
        requests.refused,
        seen.count(Kind::Request, |it| it.is_refused)
    );
    prop_assert_eq!(requests.cut, cut, "{}", report);
    prop_assert_eq!(requests.dropped, 0, "{}", report);
    prop_assert_eq!(requests.finished, seen.in_flight + admitted - cut);
    let remaining = report.remaining();
    prop_assert_eq!(remaining.requests, cut, "{}", report);
    prop_assert_eq!(
        remaining.holds,
        seen.count(Kind::Hold, outlasts),
        "{}",
        report
    );
    let is_done = |ran: &Ran| matches!(ran.ended, Some((at, true)) if at < Phase::Stopped);
    let workers = schedule.workers.len() - seen.count(Kind::Worker, is_done);
    prop_assert_eq!(remaining.workers, workers, "{}", report);
    let steps = seen.count(Kind::Step, is_done);
    let tasks = report.tasks().iter();
    let done = tasks.filter(|it| it.outcome == TaskOutcome::Done).count();
    prop_assert_eq!(done, schedule.workers.len() - workers + steps, "{}", report);
    let is_abandoned = report.outcome() == Outcome::Abandoned;
    let begun = seen.count(Kind::Step, |_| true);
    prop_assert!(is_abandoned || begun == schedule.steps.len(), "{}", report);
    let expected = if is_abandoned {
        Outcome::Abandoned
    } else if cut + remaining.holds + workers + remaining.servers > 0 {
        Outcome::Forced
    } else if steps < schedule.steps.len() {
        Outcome::CleanupFailed
    } else {
        Outcome::Clean
    };
    prop_assert_eq!(report.outcome(), expected, "{}", report);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn signals_keep_the_order_and_the_end_of_a_stop(schedule in schedules()) {
        let Some(seen) = play(&schedule, |_, _| true) else {
            return Ok(());
        };
        let first = ms(schedule.signals[0].0);
        prop_assert!(seen.phases.is_sorted(), "{:?}", seen.phases);
        prop_assert_eq!(seen.phases.last().unwrap().0, Phase::Stopped);
        let most = first + ms(schedule.grace_period) + LEAST_TIMES;
        prop_assert!(seen.ended() <= most, "{:?}", seen.phases);
        each_signal_does_what_it_should(&seen)?;
        the_report_says_what_became_of_the_work(&schedule, &seen)?;
        // A further SIGTERM or `shutdown` changes nothing, however soon it comes.
        let is_further = |number, signal| number > 0 && signal != Trigger::Interrupt;
        let once = play(&schedule, |number, signal| !is_further(number, signal)).unwrap();
        prop_assert_eq!(&seen.phases, &once.phases);
        prop_assert_eq!(&seen.report, &once.report);
        // Only a further SIGINT abandons the cleanup.
        let alone = play(&schedule, |number, _| number == 0).unwrap();
        prop_assert_ne!(alone.report.outcome(), Outcome::Abandoned);
        // It makes no stop longer.
        prop_assert!(seen.ended() <= alone.ended(), "{}\n{}", seen.report, alone.report);
    }
}
