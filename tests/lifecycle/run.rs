//! `run`: servers, how they end, and the report.

use std::{
    convert::Infallible,
    error::Error,
    fmt,
    future::{self, IntoFuture, pending, ready},
    io,
    panic::resume_unwind,
    pin::pin,
    process::{ExitCode, Termination},
    sync::Arc,
    task::Context,
    time::Duration,
};

use bytes::Bytes;
use futures_util::stream;
use http::{Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, Empty, StreamBody};
use tokio::{
    select,
    sync::oneshot,
    time::{Instant, sleep, timeout},
};
use tokio_test::{assert_pending, task};
use tower::{Layer, ServiceExt, service_fn};
use tower_graceful::{Completion, Graceful, Outcome, Phase, Remaining, Report, Trigger};

use crate::support::{
    DEADLINE, DELAY, LET_GO, graceful, let_others_run, ms, pass, request, s, serve, server,
    watched, without_delay,
};

#[tokio::test(start_paused = true)]
async fn a_clean_report_has_the_exact_length_of_every_phase() {
    let graceful = graceful();
    let held = request(&graceful);
    let connection = graceful.track(());
    let run = serve(&graceful, server(&graceful)).await;
    pass(s(60)).await;
    let begun = Instant::now();
    graceful.shutdown();
    pass(ms(7250)).await;
    drop(held);
    pass(ms(125)).await;
    drop(connection);

    let report = run.await.unwrap();
    assert_eq!(begun.elapsed(), ms(7375));
    assert_eq!(report.outcome(), Outcome::Clean);
    assert_eq!(report.exit_code(), 0);
    assert_eq!(report.trigger(), Trigger::Shutdown);
    assert_eq!(report.time_in(Phase::Serving), Duration::ZERO);
    assert_eq!(report.time_in(Phase::LameDuck), s(5));
    assert_eq!(report.time_in(Phase::Draining), ms(2250));
    assert_eq!(report.time_in(Phase::Closing), ms(125));
    assert_eq!(report.time_in(Phase::Stopped), Duration::ZERO);
    assert_eq!(report.duration(), ms(7375));
    assert_eq!(report.remaining(), Remaining::default());
    assert_eq!(report.server_error(), None);
    assert_eq!(
        report.to_string(),
        "shutdown by shutdown(): clean, 7.375 s\n\
         \x20 lame duck             5.000 s  |======================          |\n\
         \x20 draining              2.250 s  |                      ========= |\n\
         \x20 closing               0.125 s  |                               =|\n\
         \x20 requests: 1 in flight when it began, 1 dropped"
    );
}

#[tokio::test(start_paused = true)]
async fn the_report_is_the_exit_code_of_main() {
    let clean = without_delay();
    clean.shutdown();
    let clean = clean.run(ready(())).await;
    let failed = without_delay().run(ready(Err::<(), _>("broken"))).await;
    // `ExitCode` can only be compared by its `Debug` output.
    let code = |code: ExitCode| format!("{code:?}");
    assert_eq!(code(clean.clone().into()), code(ExitCode::from(0)));
    assert_eq!(code(Termination::report(clean)), code(ExitCode::SUCCESS));
    assert_eq!(code(failed.into()), code(ExitCode::from(4)));
}

#[tokio::test(start_paused = true)]
async fn stopped_waits_for_the_server_after_the_drain() {
    let graceful = graceful();
    let begun = Instant::now();
    let drain = server(&graceful);
    let run = serve(&graceful, async move {
        drain.await;
        pass(s(2)).await;
    })
    .await;
    graceful.shutdown();
    let report = run.await.unwrap();
    assert_eq!(begun.elapsed(), DELAY + s(2));
    assert_eq!(report.time_in(Phase::Closing), s(2));
    assert_eq!(report.outcome(), Outcome::Clean);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_fails_stops_the_service_and_its_error_is_reported() {
    let graceful = graceful();
    let begun = Instant::now();
    let report = graceful
        .run(async {
            pass(s(3)).await;
            Err::<(), _>(io::Error::other("too many open files"))
        })
        .await;
    assert_eq!(
        begun.elapsed(),
        s(3),
        "no server is left, so the delay is skipped"
    );
    assert_eq!(report.outcome(), Outcome::ServerFailed);
    assert_eq!(report.exit_code(), 4);
    assert_eq!(report.server_error(), Some("too many open files"));
    assert_eq!(report.trigger(), Trigger::ServerEnded);
    let text = report.to_string();
    assert!(text.contains("server failed"), "{text}");
    assert!(
        text.ends_with("server error: too many open files"),
        "{text}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_server_that_fails_while_stopping_is_reported_as_failed() {
    let graceful = graceful();
    let drain = server(&graceful);
    let run = serve(&graceful, async move {
        drain.await;
        Err::<(), _>("the last flush failed")
    })
    .await;
    graceful.shutdown();
    let report = run.await.unwrap();
    assert_eq!(report.outcome(), Outcome::ServerFailed);
    assert_eq!(report.trigger(), Trigger::Shutdown);
    assert_eq!(report.server_error(), Some("the last flush failed"));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_ends_by_itself_is_the_trigger() {
    let graceful = graceful();
    let begun = Instant::now();
    let report = graceful.run(sleep(s(3))).await;
    assert_eq!(begun.elapsed(), s(3));
    assert_eq!(report.trigger(), Trigger::ServerEnded);
    assert_eq!(report.outcome(), Outcome::Clean);
    assert_eq!(report.exit_code(), 0);
}

#[tokio::test(start_paused = true)]
async fn requests_in_flight_when_a_server_ends_by_itself_are_finished() {
    let graceful = graceful();
    let held = request(&graceful);
    tokio::spawn(async move {
        pass(s(4)).await;
        drop(held);
    });
    let begun = Instant::now();
    let report = graceful.run(ready(Err::<(), _>("broken"))).await;
    assert_eq!(begun.elapsed(), s(4));
    assert_eq!(report.time_in(Phase::LameDuck), Duration::ZERO);
    assert_eq!(report.time_in(Phase::Draining), s(4));
    assert_eq!(report.outcome(), Outcome::ServerFailed);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_never_ends_is_dropped_shortly_after_the_deadline() {
    let graceful = graceful();
    let (server, log) = watched(pending::<()>());
    let run = serve(&graceful, server).await;
    let begun = Instant::now();
    graceful.shutdown();
    let report = run.await.unwrap();
    let dropped = log.dropped().unwrap() - begun;
    assert!(dropped > DEADLINE, "{dropped:?}");
    assert!(dropped <= DEADLINE + LET_GO, "{dropped:?}");
    assert_eq!(begun.elapsed(), dropped);
    assert_eq!(report.outcome(), Outcome::Forced);
    assert_eq!(report.exit_code(), 1);
    assert_eq!(report.remaining().servers, 1);
    assert_eq!(report.remaining().requests, 0);
    assert!(
        report.to_string().contains("given up: 1 server"),
        "{report}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_server_that_does_not_end_is_dropped_with_its_handlers_before_the_first_cleanup_step() {
    let graceful = without_delay();
    let handler = Arc::new(());
    let owned = handler.clone();
    let server = async move {
        pending::<()>().await;
        drop(owned);
    };
    let hold = graceful.hold("work");
    let (seen, handlers) = oneshot::channel();
    let counted = handler.clone();
    let step = async move {
        // This one, the test's, and the server's if it is still there.
        let _ = seen.send(Arc::strong_count(&counted) - 2);
    };
    graceful.cleanup("step", s(1), step).unwrap();
    let run = serve(&graceful, server).await;
    graceful.shutdown();
    let report = run.await.unwrap();
    drop(hold);
    assert_eq!(handlers.await, Ok(0));
    assert_eq!(report.outcome(), Outcome::Forced);
    assert_eq!(report.remaining().servers, 1);
}

#[tokio::test(start_paused = true)]
async fn a_response_whose_body_fails_or_panics_is_dropped_and_not_finished() {
    for name_requests in [false, true] {
        let graceful = Graceful::builder().name_requests(name_requests);
        let graceful = graceful.build().unwrap();
        let layer = graceful.layer();
        let body = |panics: bool| {
            StreamBody::new(stream::once(async move {
                assert!(!panics, "planned");
                Err::<Frame<Bytes>, _>("planned")
            }))
        };
        let service = |panics| {
            layer.layer(service_fn(move |_: Request<Empty<Bytes>>| {
                ready(Ok::<_, Infallible>(Response::new(body(panics))))
            }))
        };
        let request = || Request::new(Empty::new());
        let failing = service(false).oneshot(request()).await.unwrap();
        let panicking = service(true).oneshot(request()).await.unwrap();
        graceful.shutdown();
        assert_eq!(graceful.in_flight(), 2);
        assert!(pin!(failing.into_body()).frame().await.unwrap().is_err());
        let panicked = tokio::spawn(async { pin!(panicking.into_body()).frame().await.is_some() });
        assert!(panicked.await.unwrap_err().is_panic());
        assert_eq!(graceful.in_flight(), 0);
        let report = graceful.run(ready(())).await;
        assert_eq!(report.requests().dropped, 2);
        assert_eq!(report.requests().finished, 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_ends_after_the_cut_ends_the_wait_at_once() {
    let graceful = graceful();
    let run = serve(&graceful, sleep(DEADLINE + ms(10))).await;
    graceful.shutdown();
    let report = run.await.unwrap();
    assert_eq!(report.duration(), DEADLINE + ms(10));
    // Nothing was taken from it.
    assert_eq!(report.outcome(), Outcome::Clean);
}

#[tokio::test(start_paused = true)]
async fn a_server_has_time_to_close_although_the_drain_ended_just_before_the_deadline() {
    let graceful = graceful();
    let held = request(&graceful);
    let drain = server(&graceful);
    tokio::spawn(async move {
        pass(DEADLINE - ms(1)).await;
        drop(held);
    });
    let run = serve(&graceful, async move {
        drain.await;
        sleep(ms(200)).await;
    })
    .await;
    graceful.shutdown();
    let report = run.await.unwrap();
    assert_eq!(report.outcome(), Outcome::Clean);
    assert_eq!(report.duration(), DEADLINE - ms(1) + ms(200));
}

#[tokio::test(start_paused = true)]
async fn two_runs_at_once_return_the_same_report() {
    let graceful = graceful();
    let (slow, drain) = (s(1), server(&graceful));
    tokio::spawn({
        let graceful = graceful.clone();
        async move {
            pass(s(60)).await;
            graceful.shutdown();
        }
    });
    let begun = Instant::now();
    let (one, other) = tokio::join!(
        graceful.run(server(&graceful)),
        graceful.run(async move {
            drain.await;
            pass(slow).await;
        }),
    );
    assert_eq!(one, other);
    assert_eq!(begun.elapsed(), s(60) + DELAY + slow);
    assert_eq!(one.outcome(), Outcome::Clean);
    assert_eq!(one.time_in(Phase::Closing), slow);
}

#[tokio::test(start_paused = true)]
async fn when_one_of_two_servers_ends_early_the_other_is_stopped_with_its_whole_delay() {
    let graceful = graceful();
    let begun = Instant::now();
    let (one, other) = tokio::join!(graceful.run(sleep(s(3))), graceful.run(server(&graceful)),);
    assert_eq!(one, other);
    assert_eq!(begun.elapsed(), s(3) + DELAY);
    assert_eq!(one.trigger(), Trigger::ServerEnded);
    assert_eq!(one.outcome(), Outcome::Clean);
    assert_eq!(one.time_in(Phase::LameDuck), DELAY);
}

#[tokio::test(start_paused = true)]
async fn of_two_servers_that_fail_the_first_error_is_reported() {
    let graceful = graceful();
    let drain = server(&graceful);
    let (one, other) = tokio::join!(
        graceful.run(async move {
            drain.await;
            Err::<(), _>("second")
        }),
        graceful.run(ready(Err::<(), _>("first"))),
    );
    assert_eq!(one, other);
    assert_eq!(one.outcome(), Outcome::ServerFailed);
    assert_eq!(one.server_error(), Some("first"));
}

#[tokio::test(start_paused = true)]
async fn of_two_servers_only_the_one_that_did_not_end_is_given_up() {
    let graceful = graceful();
    let one = serve(&graceful, server(&graceful)).await;
    let other = serve(&graceful, pending::<()>()).await;
    graceful.shutdown();
    let (one, other) = (one.await.unwrap(), other.await.unwrap());
    assert_eq!(one, other);
    assert_eq!(one.remaining().servers, 1);
    assert_eq!(one.outcome(), Outcome::Forced);
}

#[tokio::test(start_paused = true)]
async fn a_run_after_the_stop_drops_its_server_unpolled_and_returns_at_once() {
    let graceful = graceful();
    let run = serve(&graceful, server(&graceful)).await;
    graceful.shutdown();
    let first = run.await.unwrap();
    let begun = Instant::now();
    let (server, log) = watched(pending::<()>());
    let second = graceful.run(server).await;
    assert_eq!(begun.elapsed(), Duration::ZERO);
    assert!(!log.polled());
    assert!(log.dropped().is_some());
    assert_eq!(first, second);
}

#[tokio::test(start_paused = true)]
async fn a_run_that_comes_during_the_delay_drops_its_server_and_leaves_the_others_theirs() {
    let graceful = graceful();
    let first = serve(&graceful, server(&graceful)).await;
    graceful.shutdown();
    pass(s(1)).await;
    let (server, log) = watched(pending::<()>());
    let late = graceful.run(server).await;
    assert!(!log.polled());
    assert_eq!(late.time_in(Phase::LameDuck), DELAY);
    assert_eq!(late.remaining().servers, 0);
    assert_eq!(late, first.await.unwrap());
}

/// A server may also be run without `run`, as in the smallest example of the README.
#[tokio::test(start_paused = true)]
async fn a_run_that_comes_during_the_delay_leaves_a_server_that_is_run_by_itself_its_delay() {
    let graceful = graceful();
    let alone = tokio::spawn(server(&graceful));
    let_others_run().await;
    let begun = Instant::now();
    graceful.shutdown();
    pass(s(1)).await;
    let _report = graceful.run(pending::<()>()).await;
    alone.await.unwrap();
    assert_eq!(begun.elapsed(), DELAY);
}

#[tokio::test(start_paused = true)]
async fn a_run_dropped_half_way_leaves_a_server_that_is_run_by_itself_its_delay() {
    let graceful = graceful();
    let alone = tokio::spawn(server(&graceful));
    let mut run = task::spawn(graceful.run(pending::<()>()));
    assert_pending!(run.poll());
    drop(run);
    let_others_run().await;
    let begun = Instant::now();
    graceful.shutdown();
    alone.await.unwrap();
    assert_eq!(begun.elapsed(), DELAY);
}

#[tokio::test(start_paused = true)]
async fn a_run_that_comes_while_closing_drops_its_server_unpolled_and_waits_for_the_stop() {
    let graceful = graceful();
    let connection = graceful.track(());
    let begun = Instant::now();
    graceful.shutdown();
    pass(DELAY).await;
    assert_eq!(graceful.phase(), Phase::Closing);
    let (server, log) = watched(pending::<()>());
    let run = tokio::spawn(graceful.run(server));
    pass(s(1)).await;
    assert!(log.dropped().is_some());
    assert!(!run.is_finished());
    drop(connection);
    let report = run.await.unwrap();
    assert!(!log.polled());
    assert_eq!(begun.elapsed(), DELAY + s(1));
    assert_eq!(report.outcome(), Outcome::Clean);
}

#[tokio::test(start_paused = true)]
async fn a_run_that_is_not_polled_counts_as_no_server() {
    let graceful = graceful();
    let run = graceful.run(pending::<()>());
    let begun = Instant::now();
    graceful.shutdown();
    graceful.stopped().await;
    assert_eq!(begun.elapsed(), DELAY);
    assert_eq!(run.await.outcome(), Outcome::Clean);
}

#[tokio::test(start_paused = true)]
async fn a_run_dropped_half_way_triggers_nothing_and_drops_its_server() {
    let graceful = graceful();
    let (server, log) = watched(pending::<()>());
    select! {
        _ = graceful.run(server) => unreachable!("nothing stops it"),
        () = sleep(s(10)) => {}
    }
    assert!(log.polled());
    assert!(log.dropped().is_some());
    pass(s(60)).await;
    assert_eq!(graceful.phase(), Phase::Serving);
    assert!(graceful.is_ready());
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_after_a_run_dropped_half_way_completes() {
    let graceful = graceful();
    let mut run = task::spawn(graceful.run(pending::<()>()));
    assert_pending!(run.poll());
    drop(run);
    graceful.shutdown();
    let report = graceful.run(pending::<()>()).await;
    assert_eq!(report.outcome(), Outcome::Clean);
    assert_eq!(report.trigger(), Trigger::Shutdown);
    assert_eq!(report.remaining().servers, 0);
}

#[tokio::test(start_paused = true)]
async fn a_server_started_after_a_run_dropped_half_way_has_its_delay() {
    let graceful = graceful();
    let mut run = task::spawn(graceful.run(pending::<()>()));
    assert_pending!(run.poll());
    drop(run);
    let run = serve(&graceful, server(&graceful)).await;
    graceful.shutdown();
    let report = run.await.unwrap();
    assert_eq!(report.time_in(Phase::LameDuck), DELAY);
    assert_eq!(report.outcome(), Outcome::Clean);
}

#[tokio::test(start_paused = true)]
async fn a_run_dropped_during_the_shutdown_is_not_waited_for() {
    let graceful = graceful();
    let mut run = task::spawn(graceful.run(pending::<()>()));
    assert_pending!(run.poll());
    let begun = Instant::now();
    graceful.shutdown();
    pass(DELAY + s(1)).await;
    assert_eq!(graceful.phase(), Phase::Closing);
    drop(run);
    graceful.stopped().await;
    assert_eq!(begun.elapsed(), DELAY + s(1));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_panics_panics_its_run_and_stops_the_service() {
    fn break_down() {
        panic!("the server panics, as the test wants it to");
    }

    let graceful = graceful();
    let run = tokio::spawn(graceful.run(async {
        pass(s(1)).await;
        break_down();
    }));
    assert!(run.await.unwrap_err().is_panic());
    let report = graceful.run(pending::<()>()).await;
    assert_eq!(report.trigger(), Trigger::ServerEnded);
    assert_eq!(report.remaining().servers, 0);
    assert_eq!(report.outcome(), Outcome::ServerFailed);
    assert_eq!(report.server_error(), Some("the server panicked"));
}

/// An error whose `Display`, or whose destructor, panics.
#[derive(Debug)]
struct Panics {
    in_display: bool,
}

impl fmt::Display for Panics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.in_display {
            resume_unwind(Box::new("as the test wants it to"));
        }
        f.write_str("panics when it is dropped")
    }
}

impl Error for Panics {}

impl Drop for Panics {
    fn drop(&mut self) {
        if !self.in_display {
            resume_unwind(Box::new("as the test wants it to"));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_whose_error_panics_panics_its_run_and_stops_the_service() {
    for in_display in [false, true] {
        let graceful = graceful();
        let other = serve(&graceful, server(&graceful)).await;
        let run = tokio::spawn(graceful.run(async move { Err::<(), _>(Panics { in_display }) }));
        assert!(run.await.unwrap_err().is_panic());
        assert_eq!(graceful.phase(), Phase::LameDuck);
        let report = other.await.unwrap();
        assert_eq!(report.trigger(), Trigger::ServerEnded);
        assert_eq!(report.outcome(), Outcome::ServerFailed);
        assert_eq!(report.server_error(), Some("the server panicked"));
    }
}

/// Servers wait on one channel, which has several lists of tasks.
#[tokio::test(start_paused = true)]
async fn a_run_whose_waker_panics_does_not_keep_other_servers_running() {
    let graceful = without_delay();
    let waker = crate::wakers::panicking();
    let mut first: Vec<_> = (0..50)
        .map(|_| Box::pin(graceful.run(server(&graceful))))
        .collect();
    for run in &mut first {
        assert_pending!(run.as_mut().poll(&mut Context::from_waker(&waker)));
    }
    let mut others = Vec::new();
    for _ in 0..50 {
        others.push(serve(&graceful, server(&graceful)).await);
        others.push(serve(&graceful, pending::<()>()).await);
    }
    graceful.shutdown();
    // Their task is not woken, and they are dropped at once.
    drop(first);
    for run in others {
        let report = timeout(s(60), run).await.expect("it hangs").unwrap();
        assert_eq!(report.remaining().servers, 50);
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_may_resolve_to_unit_or_to_a_result() {
    async fn error(output: impl Completion + 'static) -> Option<String> {
        let report: Report = without_delay().run(ready(output)).await;
        report.server_error().map(str::to_owned)
    }
    let boxed = || -> Box<dyn Error + Send + Sync> { "boxed".into() };
    assert_eq!(error(()).await, None);
    assert_eq!(error(Ok::<(), io::Error>(())).await, None);
    assert_eq!(error(Ok::<(), Infallible>(())).await, None);
    assert_eq!(
        error(Err::<(), _>(io::Error::other("io"))).await.as_deref(),
        Some("io")
    );
    assert_eq!(error(Err::<(), _>(boxed())).await.as_deref(), Some("boxed"));
    assert_eq!(
        error(Err::<(), _>("text".to_owned())).await.as_deref(),
        Some("text")
    );
    assert_eq!(error(Err::<(), _>("str")).await.as_deref(), Some("str"));
}

#[tokio::test(start_paused = true)]
async fn run_accepts_into_future() {
    struct Serve(Graceful);

    impl IntoFuture for Serve {
        type Output = io::Result<()>;
        type IntoFuture = future::Ready<io::Result<()>>;

        fn into_future(self) -> Self::IntoFuture {
            self.0.set_ready(false);
            ready(Err(io::Error::other("converted")))
        }
    }

    let graceful = without_delay();
    let report = graceful.run(Serve(graceful.clone())).await;
    assert_eq!(report.server_error(), Some("converted"));
    assert_eq!(report.trigger(), Trigger::ServerEnded);
}

#[tokio::test(start_paused = true)]
async fn a_run_dropped_by_a_panic_that_is_not_its_servers_triggers_nothing() {
    let graceful = graceful();
    let run = graceful.run(pending::<()>());
    let others = tokio::spawn(async move {
        tokio::select! {
            _ = run => {}
            () = async { pass(s(1)).await; panic!("another task panics, as the test wants it to") } => {}
        }
    });
    assert!(others.await.unwrap_err().is_panic());
    assert_eq!(graceful.phase(), Phase::Serving);
}
