//! The timing plan, through `build`.

use std::{future::pending, time::Duration};

use http::StatusCode;
use tokio::time::{Instant, sleep};
use tower_graceful::{ConfigError, Graceful, GracefulBuilder, Outcome, Phase};

use crate::support::{ms, pass, request, s, serve, server};

fn refusal(builder: GracefulBuilder) -> String {
    builder.build().unwrap_err().to_string()
}

fn assert_names(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
}

#[test]
fn a_plan_longer_than_its_grace_period_is_refused_with_its_numbers() {
    let builder = Graceful::builder()
        .grace_period(s(30))
        .drain_delay(s(10))
        .drain_timeout(s(25))
        .cleanup_timeout(s(10));
    let error = builder.clone().build().unwrap_err();
    assert!(matches!(error, ConfigError::DoesNotFit(_)), "{error:?}");
    let message = refusal(builder);
    assert_names(
        &message,
        &[
            "drain_delay 10s",
            "drain_timeout 25s",
            "cleanup_timeout 10s",
            "45s",
            "grace_period 30s",
            "terminationGracePeriodSeconds",
        ],
    );
    assert!(!message.contains("default"), "all were set: {message}");
}

/// A `main` that returns this error prints its `Debug`.
#[test]
fn debug_prints_the_message() {
    let errors = [
        Graceful::builder().drain_delay(s(10)).drain_timeout(s(25)),
        Graceful::builder().close_spread(s(10)),
        Graceful::builder().max_in_flight(0),
        Graceful::builder().unready_status(StatusCode::OK),
        Graceful::builder().exempt("metrics"),
    ]
    .map(|builder| builder.build().unwrap_err());
    for error in errors {
        let boxed: Box<dyn std::error::Error> = error.clone().into();
        assert_eq!(format!("{boxed:?}"), error.to_string());
    }
}

#[test]
fn the_effective_plan_can_be_read_back() {
    let plan = Graceful::new().plan();
    assert_eq!(plan.grace_period, s(30));
    assert_eq!(plan.drain_delay, s(5));
    assert_eq!(plan.interrupt_delay, Duration::ZERO);
    assert_eq!(plan.drain_deadline, s(24));
    assert_eq!(plan.cleanup_timeout, s(5));
    assert_eq!(plan.margin, s(1));

    let builder = Graceful::builder()
        .grace_period(s(60))
        .drain_delay(s(10))
        .interrupt_delay(s(2))
        .drain_timeout(s(20))
        .cleanup_timeout(s(3));
    let plan = builder.build().unwrap().plan();
    assert_eq!(plan.grace_period, s(60));
    assert_eq!(plan.drain_delay, s(10));
    assert_eq!(plan.interrupt_delay, s(2));
    assert_eq!(plan.drain_deadline, s(30));
    assert_eq!(plan.cleanup_timeout, s(3));
    assert_eq!(plan.margin, s(1));
}

#[test]
fn a_refusal_says_which_numbers_are_defaults() {
    let message = refusal(Graceful::builder().drain_delay(s(10)).drain_timeout(s(25)));
    assert_names(
        &message,
        &["drain_delay 10s +", "grace_period 30s (default)"],
    );
}

#[test]
fn a_plan_that_leaves_no_time_to_drain_is_refused() {
    let message = refusal(Graceful::builder().drain_delay(s(25)).cleanup_timeout(s(5)));
    assert_names(
        &message,
        &["drain_delay 25s", "cleanup_timeout 5s", "no time to drain"],
    );
}

#[test]
fn a_delay_for_ctrl_c_that_does_not_fit_is_refused_under_its_own_name() {
    let message = refusal(Graceful::builder().interrupt_delay(s(31)));
    assert_names(&message, &["interrupt_delay 31s", "grace_period 30s"]);
}

#[test]
fn a_plan_that_fills_its_grace_period_is_accepted() {
    let built = Graceful::builder()
        .grace_period(s(45))
        .drain_delay(s(10))
        .drain_timeout(s(25))
        .cleanup_timeout(s(10))
        .build();
    assert!(built.is_ok(), "{built:?}");
}

#[test]
fn a_plan_a_nanosecond_too_long_is_refused() {
    let built = Graceful::builder()
        .grace_period(s(45))
        .drain_delay(s(10))
        .drain_timeout(s(25) + Duration::from_nanos(1))
        .cleanup_timeout(s(10))
        .build();
    assert!(built.is_err(), "{built:?}");
}

#[test]
fn a_limit_of_zero_is_refused() {
    let error = Graceful::builder().max_in_flight(0).build().unwrap_err();
    assert_eq!(error, ConfigError::NothingInFlight);
    assert_names(&error.to_string(), &["max_in_flight is 0"]);
    assert!(Graceful::builder().max_in_flight(1).build().is_ok());
    assert!(
        Graceful::builder()
            .max_in_flight(usize::MAX)
            .build()
            .is_ok()
    );
}

#[test]
fn an_informational_unready_status_is_refused() {
    for code in [100, 101, 103, 199] {
        let status = StatusCode::from_u16(code).unwrap();
        let error = Graceful::builder()
            .unready_status(status)
            .build()
            .unwrap_err();
        assert_eq!(error, ConfigError::UnreadyStatus(status));
        assert_names(&error.to_string(), &["unready_status", &code.to_string()]);
    }
    for code in [404, 503] {
        let status = StatusCode::from_u16(code).unwrap();
        assert!(Graceful::builder().unready_status(status).build().is_ok());
    }
}

#[test]
fn an_exempt_path_that_no_request_can_have_is_refused_by_name() {
    let without_slash =
        ["metrics", "", "*", "http://localhost/metrics"].map(|path| (path, "slash"));
    for (path, why) in without_slash.into_iter().chain([("/metrics?all", "query")]) {
        let error = Graceful::builder()
            .exempt("/fine")
            .exempt(path)
            .build()
            .unwrap_err();
        assert_eq!(error, ConfigError::ExemptPath(path.to_owned()));
        assert_names(&error.to_string(), &[&format!("{path:?}"), why]);
    }
    assert!(
        Graceful::builder()
            .exempt("/")
            .exempt("/metrics")
            .build()
            .is_ok()
    );
}

#[test]
fn a_refusal_is_an_error_that_main_can_return() {
    fn build() -> Result<Graceful, Box<dyn std::error::Error + Send + Sync>> {
        Ok(Graceful::builder().max_in_flight(0).build()?)
    }
    assert!(build().is_err());
}

fn zero_everywhere() -> GracefulBuilder {
    Graceful::builder()
        .grace_period(Duration::ZERO)
        .drain_delay(Duration::ZERO)
        .interrupt_delay(Duration::ZERO)
        .drain_timeout(Duration::ZERO)
        .cleanup_timeout(Duration::ZERO)
        .retry_after(Duration::ZERO)
}

#[tokio::test(start_paused = true)]
async fn with_zero_everywhere_an_idle_service_stops_cleanly_and_at_once() {
    for builder in [
        zero_everywhere(),
        Graceful::builder().grace_period(Duration::ZERO),
    ] {
        let graceful = builder.build().unwrap();
        let run = serve(&graceful, server(&graceful)).await;
        let begun = Instant::now();
        graceful.shutdown();
        let report = run.await.unwrap();
        assert_eq!(begun.elapsed(), Duration::ZERO);
        assert_eq!(report.outcome(), Outcome::Clean);
        assert_eq!(report.duration(), Duration::ZERO);
    }
}

#[tokio::test(start_paused = true)]
async fn with_zero_everywhere_requests_in_flight_are_cut_at_once() {
    let graceful = zero_everywhere().build().unwrap();
    let _held = request(&graceful);
    let run = serve(&graceful, pending::<()>()).await;
    let begun = Instant::now();
    graceful.shutdown();
    assert_eq!(graceful.phase(), Phase::Closing);
    let report = run.await.unwrap();
    // Cut work has a short time to end.
    assert_eq!(begun.elapsed(), Duration::from_millis(50));
    assert_eq!(report.outcome(), Outcome::Forced);
    assert_eq!(report.remaining().requests, 1);
    assert_eq!(report.remaining().servers, 1);
}

#[tokio::test(start_paused = true)]
async fn the_shortest_durations_there_are_do_not_hang() {
    let nano = Duration::from_nanos(1);
    let graceful = Graceful::builder()
        .grace_period(nano * 3)
        .drain_delay(nano)
        .drain_timeout(nano)
        .cleanup_timeout(nano)
        .build()
        .unwrap();
    let run = serve(&graceful, server(&graceful)).await;
    let begun = Instant::now();
    graceful.shutdown();
    let report = run.await.unwrap();
    assert_eq!(report.outcome(), Outcome::Clean);
    assert!(begun.elapsed() <= Duration::from_millis(1));
}

fn longest_everywhere() -> GracefulBuilder {
    Graceful::builder()
        .grace_period(Duration::MAX)
        .drain_delay(Duration::MAX)
        .interrupt_delay(Duration::MAX)
        .drain_timeout(Duration::MAX)
        .cleanup_timeout(Duration::MAX)
        .retry_after(Duration::MAX)
}

#[tokio::test(start_paused = true)]
async fn with_the_longest_durations_everywhere_the_delay_lasts_and_a_server_that_ends_ends_it() {
    let graceful = longest_everywhere().build().unwrap();
    let run = serve(&graceful, sleep(s(365 * 24 * 60 * 60))).await;
    graceful.shutdown();
    pass(s(364 * 24 * 60 * 60)).await;
    assert_eq!(graceful.phase(), Phase::LameDuck);
    assert!(graceful.snapshot().time_left.unwrap() > s(365 * 24 * 60 * 60));
    let report = run.await.unwrap();
    assert_eq!(report.outcome(), Outcome::Clean);
}

#[tokio::test(start_paused = true)]
async fn with_the_longest_durations_and_no_delay_an_idle_service_stops_at_once() {
    let graceful = longest_everywhere()
        .drain_delay(Duration::ZERO)
        .interrupt_delay(Duration::ZERO)
        .build()
        .unwrap();
    let run = serve(&graceful, server(&graceful)).await;
    let begun = Instant::now();
    graceful.shutdown();
    let report = run.await.unwrap();
    assert_eq!(begun.elapsed(), Duration::ZERO);
    assert_eq!(report.outcome(), Outcome::Clean);
}

#[tokio::test(start_paused = true)]
async fn with_the_longest_durations_the_drain_ends_with_the_last_request() {
    let graceful = longest_everywhere()
        .drain_delay(Duration::ZERO)
        .build()
        .unwrap();
    let held = request(&graceful);
    let begun = Instant::now();
    graceful.shutdown();
    pass(s(24 * 60 * 60)).await;
    assert_eq!(graceful.phase(), Phase::Draining);
    drop(held);
    graceful.stopped().await;
    assert_eq!(begun.elapsed(), s(24 * 60 * 60));
}

#[tokio::test(start_paused = true)]
async fn a_grace_period_without_end_keeps_the_default_delay() {
    let graceful = Graceful::builder()
        .grace_period(Duration::MAX)
        .build()
        .unwrap();
    let begun = Instant::now();
    graceful.shutdown();
    graceful.stopped().await;
    assert_eq!(begun.elapsed(), s(5));
}

#[tokio::test(start_paused = true)]
async fn connections_that_do_not_close_are_given_up_within_the_grace_period() {
    // The last request ends so late that the time for closing would reach beyond the end, or it
    // does not end at all.
    for leaves_after in [ms(9660), ms(20_000)] {
        let graceful = Graceful::builder()
            .grace_period(s(10))
            .drain_delay(s(2))
            .drain_timeout(s(8))
            .build()
            .unwrap();
        let _stays = graceful.track(tokio::io::empty());
        let held = request(&graceful);
        let begun = Instant::now();
        graceful.shutdown();
        tokio::spawn(async move {
            pass(leaves_after).await;
            drop(held);
        });
        graceful.stopped().await;
        assert!(begun.elapsed() < s(10), "{:?}", begun.elapsed());
    }
}
