//! The lame-duck phase ends early where a rule of the builder says so, and in no other case.

use std::{convert::Infallible, future::ready};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Empty;
use tokio::{
    task::JoinHandle,
    time::{Duration, Instant, sleep},
};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_graceful::{ConfigError, Graceful, GracefulBuilder, LeftEarly, Phase, Report};

use crate::support::{ms, quick_request, request, s, serve, server};

/// The delay, which is the longest that the phase lasts.
const MOST: Duration = s(10);

fn builder() -> GracefulBuilder {
    Graceful::builder().drain_delay(MOST)
}

/// A service whose rule needs a phase of two seconds and a silence of one second.
fn quiet() -> Graceful {
    builder().leave_when_quiet(s(2), s(1)).build().unwrap()
}

/// A service whose rule needs two failures at this number of probers.
fn noticed(probers: usize) -> Graceful {
    builder().leave_when_noticed(2, probers).build().unwrap()
}

/// A service that runs and is asked to stop now.
struct Stopping {
    graceful: Graceful,
    began: Instant,
    run: JoinHandle<Report>,
}

async fn stop(graceful: &Graceful) -> Stopping {
    let run = serve(graceful, server(graceful)).await;
    graceful.shutdown();
    assert_eq!(graceful.phase(), Phase::LameDuck);
    Stopping {
        graceful: graceful.clone(),
        began: Instant::now(),
        run,
    }
}

impl Stopping {
    /// Waits until the phase ends. How long it lasted, and why it ended early, if it did.
    async fn end(self) -> (Duration, Option<LeftEarly>) {
        self.graceful.draining().await;
        let lasted = self.began.elapsed();
        let report = self.run.await.unwrap();
        let reported = report.time_in(Phase::LameDuck);
        assert!(
            reported.abs_diff(lasted) <= ms(5),
            "{reported:?} {lasted:?}"
        );
        let text = report.to_string();
        assert_eq!(
            text.contains("ended early: "),
            report.left_early().is_some(),
            "{text}"
        );
        (lasted, report.left_early())
    }

    async fn lasts(self, least: Duration, why: Option<LeftEarly>) {
        let (lasted, reason) = self.end().await;
        assert_eq!(reason, why, "after {lasted:?}");
        // The driver's clock ticks in milliseconds.
        assert!(lasted >= least && lasted <= least + ms(5), "{lasted:?}");
    }
}

async fn requests(graceful: &Graceful, count: usize, every: Duration) {
    for _ in 0..count {
        sleep(every).await;
        assert_eq!(quick_request(graceful).await, StatusCode::OK);
    }
}

/// Sends one readiness probe with this `User-Agent`, and returns the status.
async fn probe(graceful: &Graceful, name: &str) -> StatusCode {
    let request = Request::get("/readyz").header("user-agent", name);
    let request = request.body(Empty::<Bytes>::new()).unwrap();
    graceful
        .readiness()
        .oneshot(request)
        .await
        .unwrap()
        .status()
}

/// One prober asks so often.
async fn probes(graceful: &Graceful, name: &str, count: usize, every: Duration) {
    for _ in 0..count {
        sleep(every).await;
        probe(graceful, name).await;
    }
}

#[tokio::test(start_paused = true)]
async fn quiet_ends_the_phase_when_the_traffic_has_ended() {
    let graceful = quiet();
    let stopping = stop(&graceful).await;
    requests(&graceful, 25, ms(100)).await;
    // 2.5 s, and a second of silence.
    stopping.lasts(ms(3500), Some(LeftEarly::Quiet)).await;
}

#[tokio::test(start_paused = true)]
async fn quiet_does_not_end_the_phase_before_its_minimum() {
    let graceful = quiet();
    let stopping = stop(&graceful).await;
    requests(&graceful, 5, ms(10)).await;
    stopping.lasts(s(2), Some(LeftEarly::Quiet)).await;
}

#[tokio::test(start_paused = true)]
async fn no_request_yet_is_not_quiet() {
    let graceful = quiet();
    // Also where there was traffic before.
    requests(&graceful, 50, ms(10)).await;
    stop(&graceful).await.lasts(MOST, None).await;
}

#[tokio::test(start_paused = true)]
async fn four_requests_do_not_say_how_long_a_pause_is_usual() {
    let graceful = quiet();
    let stopping = stop(&graceful).await;
    requests(&graceful, 4, ms(10)).await;
    stopping.lasts(MOST, None).await;
}

/// A request every 1.2 s: each pause is longer than `quiet_for`.
#[tokio::test(start_paused = true)]
async fn rare_requests_are_not_quiet() {
    let graceful = quiet();
    let stopping = stop(&graceful).await;
    requests(&graceful, 8, ms(1200)).await;
    stopping.lasts(MOST, None).await;
}

#[tokio::test(start_paused = true)]
async fn the_silence_is_eight_times_the_longest_pause() {
    let graceful = quiet();
    let stopping = stop(&graceful).await;
    requests(&graceful, 3, ms(50)).await;
    requests(&graceful, 1, ms(500)).await;
    requests(&graceful, 3, ms(50)).await;
    stopping
        .lasts(ms(800 + 8 * 500), Some(LeftEarly::Quiet))
        .await;

    // So is the pause before the first request.
    let graceful = quiet();
    let stopping = stop(&graceful).await;
    sleep(ms(400)).await;
    requests(&graceful, 5, ms(10)).await;
    stopping
        .lasts(ms(450 + 8 * 410), Some(LeftEarly::Quiet))
        .await;
}

#[tokio::test(start_paused = true)]
async fn traffic_that_does_not_end_takes_the_whole_delay() {
    let graceful = quiet();
    let stopping = stop(&graceful).await;
    let traffic = graceful.clone();
    let traffic = tokio::spawn(async move {
        while traffic.phase() == Phase::LameDuck {
            quick_request(&traffic).await;
            sleep(ms(300)).await;
        }
    });
    stopping.lasts(MOST, None).await;
    traffic.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_request_in_flight_does_not_keep_the_phase_from_being_quiet() {
    let graceful = quiet();
    let slow = request(&graceful);
    let stopping = stop(&graceful).await;
    requests(&graceful, 10, ms(100)).await;
    let draining = graceful.draining();
    draining.await;
    assert_eq!(graceful.phase(), Phase::Draining);
    drop(slow);
    stopping.lasts(s(2), Some(LeftEarly::Quiet)).await;
}

#[tokio::test(start_paused = true)]
async fn a_request_above_the_limit_is_traffic_too() {
    let graceful = builder()
        .leave_when_quiet(s(2), s(1))
        .max_in_flight(1)
        .build()
        .unwrap();
    let full = request(&graceful);
    let stopping = stop(&graceful).await;
    for _ in 0..25 {
        sleep(ms(100)).await;
        assert_eq!(
            quick_request(&graceful).await,
            StatusCode::TOO_MANY_REQUESTS
        );
    }
    graceful.draining().await;
    drop(full);
    stopping.lasts(ms(3500), Some(LeftEarly::Quiet)).await;
}

/// A probe or an exempt path does not count as one of the five requests that the rule needs, and does not end the
/// silence.
#[tokio::test(start_paused = true)]
async fn probes_and_exempt_paths_are_no_requests() {
    let exempt = || builder().exempt("/metrics").leave_when_quiet(s(2), s(1));
    let metrics = |graceful: Graceful| async move {
        let mut app = graceful
            .layer()
            .layer(service_fn(|_: Request<Empty<Bytes>>| {
                ready(Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new())))
            }));
        while graceful.phase() == Phase::LameDuck {
            let request = Request::get("/metrics").body(Empty::new()).unwrap();
            app.call(request).await.unwrap();
            probe(&graceful, "prober").await;
            sleep(ms(50)).await;
        }
    };
    let graceful = exempt().build().unwrap();
    let stopping = stop(&graceful).await;
    tokio::spawn(metrics(graceful.clone()));
    stopping.lasts(MOST, None).await;

    let graceful = exempt().build().unwrap();
    let stopping = stop(&graceful).await;
    tokio::spawn(metrics(graceful.clone()));
    requests(&graceful, 25, ms(100)).await;
    stopping.lasts(ms(3500), Some(LeftEarly::Quiet)).await;
}

#[tokio::test(start_paused = true)]
async fn noticed_ends_the_phase_after_the_last_failure_that_is_needed() {
    let graceful = noticed(1);
    let stopping = stop(&graceful).await;
    probes(&graceful, "balancer", 2, ms(500)).await;
    stopping.lasts(ms(1100), Some(LeftEarly::Noticed)).await;
}

#[tokio::test(start_paused = true)]
async fn fewer_failures_than_a_prober_needs_are_not_noticed() {
    let graceful = noticed(1);
    let stopping = stop(&graceful).await;
    probes(&graceful, "balancer", 1, ms(500)).await;
    stopping.lasts(MOST, None).await;
}

#[tokio::test(start_paused = true)]
async fn no_probe_at_all_is_not_noticed() {
    let graceful = noticed(1);
    stop(&graceful).await.lasts(MOST, None).await;
}

/// One prober does not stand for the other two, however often it asks.
#[tokio::test(start_paused = true)]
async fn one_prober_of_three_is_not_noticed() {
    let graceful = noticed(3);
    let stopping = stop(&graceful).await;
    probes(&graceful, "one", 15, ms(500)).await;
    stopping.lasts(MOST, None).await;
}

#[tokio::test(start_paused = true)]
async fn three_probers_of_three_are_noticed() {
    let graceful = noticed(3);
    let stopping = stop(&graceful).await;
    let ask = |name, every| {
        let graceful = graceful.clone();
        tokio::spawn(async move { probes(&graceful, name, 2, every).await })
    };
    let asked = [
        ask("one", ms(300)),
        ask("two", ms(700)),
        ask("three", ms(1000)),
    ];
    stopping.lasts(ms(2100), Some(LeftEarly::Noticed)).await;
    for asked in asked {
        asked.await.unwrap();
    }
}

/// The rule names a minimum of one prober. Here two probers are known, and both have to notice.
#[tokio::test(start_paused = true)]
async fn a_prober_from_before_the_signal_has_to_notice_too() {
    let graceful = noticed(1);
    for _ in 0..3 {
        probes(&graceful, "slow", 1, s(3)).await;
    }
    let stopping = stop(&graceful).await;
    probes(&graceful, "fast", 4, ms(500)).await;
    assert_eq!(graceful.phase(), Phase::LameDuck);
    probes(&graceful, "slow", 2, s(3)).await;
    stopping.lasts(ms(8100), Some(LeftEarly::Noticed)).await;

    // It asks no more, and has noticed nothing.
    let graceful = noticed(1);
    probes(&graceful, "slow", 3, s(3)).await;
    let stopping = stop(&graceful).await;
    probes(&graceful, "slow", 1, ms(100)).await;
    probes(&graceful, "fast", 4, ms(500)).await;
    stopping.lasts(MOST, None).await;
}

#[tokio::test(start_paused = true)]
async fn a_prober_that_stopped_before_the_signal_is_not_waited_for() {
    let graceful = noticed(1);
    probes(&graceful, "gone", 3, ms(500)).await;
    // Four times its interval, and a second.
    sleep(ms(3001)).await;
    let stopping = stop(&graceful).await;
    probes(&graceful, "balancer", 2, ms(500)).await;
    stopping.lasts(ms(1100), Some(LeftEarly::Noticed)).await;

    // One that asked once may ask at the longest interval there is.
    for (ago, left) in [(s(299), None), (s(301), Some(LeftEarly::Noticed))] {
        let graceful = noticed(1);
        probe(&graceful, "once").await;
        sleep(ago).await;
        let stopping = stop(&graceful).await;
        probes(&graceful, "balancer", 2, ms(500)).await;
        let (lasted, reason) = stopping.end().await;
        assert_eq!(reason, left, "{ago:?}: {lasted:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_prober_that_stops_after_its_failures_has_noticed() {
    let graceful = noticed(2);
    let stopping = stop(&graceful).await;
    probes(&graceful, "one", 2, ms(100)).await;
    probes(&graceful, "two", 2, s(2)).await;
    stopping.lasts(ms(4300), Some(LeftEarly::Noticed)).await;
}

#[tokio::test(start_paused = true)]
async fn failures_before_the_signal_do_not_count() {
    let graceful = noticed(1);
    graceful.set_ready(false);
    for _ in 0..5 {
        assert_eq!(
            probe(&graceful, "balancer").await,
            StatusCode::SERVICE_UNAVAILABLE
        );
    }
    let stopping = stop(&graceful).await;
    probe(&graceful, "balancer").await;
    stopping.lasts(MOST, None).await;
}

#[tokio::test(start_paused = true)]
async fn a_question_that_is_no_probe_does_not_count() {
    let graceful = noticed(1);
    let stopping = stop(&graceful).await;
    for _ in 0..5 {
        let post = Request::post("/readyz")
            .body(Empty::<Bytes>::new())
            .unwrap();
        graceful.readiness().oneshot(post).await.unwrap();
        let live = Request::get("/livez").body(Empty::<Bytes>::new()).unwrap();
        graceful.liveness().oneshot(live).await.unwrap();
    }
    stopping.lasts(MOST, None).await;
}

/// Reasons for such requests: the balancer is configured with more failures than the rule, or a client connects
/// directly.
#[tokio::test(start_paused = true)]
async fn new_requests_put_off_the_end_after_it_was_noticed() {
    let graceful = noticed(1);
    let stopping = stop(&graceful).await;
    probes(&graceful, "balancer", 2, ms(500)).await;
    requests(&graceful, 30, ms(90)).await;
    stopping
        .lasts(ms(1000 + 30 * 90 + 100), Some(LeftEarly::Noticed))
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_target_of_its_own_tells_a_prober_from_others() {
    let graceful = noticed(2);
    let stopping = stop(&graceful).await;
    for target in ["/readyz?from=lb1", "/readyz?from=lb2"] {
        for _ in 0..2 {
            let request = Request::get(target).body(Empty::<Bytes>::new()).unwrap();
            graceful.readiness().oneshot(request).await.unwrap();
        }
    }
    stopping.lasts(ms(100), Some(LeftEarly::Noticed)).await;
}

#[cfg(feature = "axum")]
#[tokio::test(start_paused = true)]
async fn an_address_of_its_own_tells_a_prober_from_others() {
    use std::net::SocketAddr;

    for (addresses, left) in [
        (["10.0.0.1:1", "10.0.0.2:1"], Some(LeftEarly::Noticed)),
        // The port changes with each connection, and IPv6 sockets map IPv4 addresses.
        (["10.0.0.1:1", "10.0.0.1:2"], None),
        (["10.0.0.1:1", "[::ffff:10.0.0.1]:2"], None),
    ] {
        let graceful = noticed(2);
        let stopping = stop(&graceful).await;
        for address in addresses {
            let peer: SocketAddr = address.parse().unwrap();
            for _ in 0..2 {
                let mut request = Request::get("/").body(Empty::<Bytes>::new()).unwrap();
                let info = axum::extract::ConnectInfo(peer);
                request.extensions_mut().insert(info);
                graceful.readiness().oneshot(request).await.unwrap();
            }
        }
        assert_eq!(stopping.end().await.1, left, "{addresses:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn more_probers_than_are_remembered_take_the_whole_delay() {
    for (probers, left) in [(64, Some(LeftEarly::Noticed)), (65, None)] {
        let graceful = noticed(1);
        let stopping = stop(&graceful).await;
        for prober in 0..probers {
            for _ in 0..2 {
                probe(&graceful, &prober.to_string()).await;
            }
        }
        assert_eq!(stopping.end().await.1, left, "{probers}");
    }
}

#[tokio::test(start_paused = true)]
async fn of_two_rules_the_first_that_holds_ends_the_phase() {
    let both = || {
        let builder = builder().leave_when_quiet(s(2), s(1));
        builder.leave_when_noticed(2, 1).build().unwrap()
    };
    let graceful = both();
    let stopping = stop(&graceful).await;
    probes(&graceful, "balancer", 2, ms(500)).await;
    stopping.lasts(ms(1100), Some(LeftEarly::Noticed)).await;

    let graceful = both();
    let stopping = stop(&graceful).await;
    requests(&graceful, 5, ms(100)).await;
    stopping.lasts(s(2), Some(LeftEarly::Quiet)).await;
}

/// Deregistering is how a balancer that does not poll learns of the stop.
#[tokio::test(start_paused = true)]
async fn the_phase_does_not_end_early_while_a_hook_runs() {
    let graceful = noticed(1);
    let deregister = sleep(s(4));
    graceful
        .on_lame_duck("deregister", s(9), deregister)
        .unwrap();
    let stopping = stop(&graceful).await;
    probes(&graceful, "balancer", 2, ms(500)).await;
    let (lasted, reason) = stopping.end().await;
    assert_eq!(reason, Some(LeftEarly::Noticed));
    // It began when the service was asked to stop, or when the hook was registered.
    assert!(lasted >= s(4) && lasted <= s(4) + ms(10), "{lasted:?}");
}

#[tokio::test(start_paused = true)]
async fn the_delay_after_shutdown_without_rules_is_the_whole_one() {
    let graceful = builder().build().unwrap();
    let stopping = stop(&graceful).await;
    requests(&graceful, 25, ms(10)).await;
    probes(&graceful, "balancer", 10, ms(10)).await;
    stopping.lasts(MOST, None).await;
}

#[test]
fn rules_that_cannot_work_are_refused_with_their_numbers() {
    let refused = |builder: GracefulBuilder, parts: &[&str]| {
        let error = builder.build().unwrap_err();
        assert!(matches!(error, ConfigError::LeaveEarly(_)), "{error:?}");
        for part in parts {
            assert!(error.to_string().contains(part), "no {part:?} in {error}");
        }
    };
    refused(builder().leave_when_quiet(s(1), s(0)), &["quiet_for of 0"]);
    let numbers = ["minimum 10s", "quiet_for 1s", "drain_delay is 10s"];
    refused(builder().leave_when_quiet(MOST, s(1)), &numbers);
    let numbers = ["minimum 1s", "quiet_for 12s", "drain_delay is 10s"];
    refused(builder().leave_when_quiet(s(1), s(12)), &numbers);
    let default = Graceful::builder().leave_when_quiet(s(6), s(1));
    refused(default, &["drain_delay is 5s"]);
    refused(
        builder().leave_when_noticed(0, 1),
        &["failures 0 and probers 1"],
    );
    refused(
        builder().leave_when_noticed(1, 0),
        &["failures 1 and probers 0"],
    );
    refused(builder().leave_when_noticed(1, 65), &["65 probers", "64"]);
    let none = builder().drain_delay(s(0)).leave_when_noticed(1, 1);
    refused(none, &["drain_delay is 0"]);
    assert!(builder().leave_when_quiet(s(0), ms(1)).build().is_ok());
    assert!(builder().leave_when_noticed(1, 64).build().is_ok());
}
