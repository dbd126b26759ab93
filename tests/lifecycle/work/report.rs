//! The report of a whole shutdown: its numbers, its rows, its text.

use std::{convert::Infallible, future::pending, time::Duration};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Full};
use tower::{Layer, Service, service_fn};
use tower_graceful::{Graceful, Outcome, Phase, Report, Requests};

use super::{panics, report, sleep_for, stop};
use crate::support::{DELAY, graceful, ms, pass, plan, quick_request, request, s, without_delay};

fn requests(
    in_flight: usize,
    admitted: usize,
    finished: usize,
    refused: usize,
    cut: usize,
    dropped: usize,
) -> Requests {
    let mut requests = Requests::default();
    requests.in_flight = in_flight;
    requests.admitted = admitted;
    requests.finished = finished;
    requests.refused = refused;
    requests.cut = cut;
    requests.dropped = dropped;
    requests
}

#[tokio::test(start_paused = true)]
async fn the_figures_of_a_clean_stop_are_exact() {
    let graceful = graceful();
    for _ in 0..7 {
        quick_request(&graceful).await;
    }
    let before = [request(&graceful), request(&graceful), request(&graceful)];
    graceful.shutdown();
    for _ in 0..4 {
        assert_eq!(quick_request(&graceful).await, 200);
    }
    let during = request(&graceful);
    pass(DELAY).await;
    for _ in 0..2 {
        assert_eq!(quick_request(&graceful).await, 503);
    }
    drop((before, during));
    let report = report(&graceful).await;
    assert_eq!(report.requests(), requests(3, 5, 4, 2, 0, 4));
    assert!(
        report.to_string().ends_with(
            "\n  requests: 3 in flight when it began, 5 more, 4 finished, 2 refused, 4 dropped"
        ),
        "{report}"
    );
    // Requests after the end are not included.
    assert_eq!(quick_request(&graceful).await, 503);
    let again = graceful.run(pending::<()>()).await;
    assert_eq!(again, report);
}

#[tokio::test(start_paused = true)]
async fn the_figures_of_a_forced_stop_are_exact() {
    let graceful = plan().max_in_flight(4).build().unwrap();
    let [ends, _endless] = [request(&graceful), request(&graceful)];
    graceful.shutdown();
    let [also_ends, _endless] = [request(&graceful), request(&graceful)];
    assert_eq!(quick_request(&graceful).await, 429);
    pass(s(7)).await;
    drop((ends, also_ends));
    assert_eq!(quick_request(&graceful).await, 503);
    let report = report(&graceful).await;
    assert_eq!(report.requests(), requests(2, 2, 0, 2, 2, 2));
    assert_eq!(report.remaining().requests, 2);
    assert_eq!(report.outcome(), Outcome::Forced);
    assert!(
        report.requests_cut().is_empty(),
        "name_requests was not set"
    );
}

#[tokio::test(start_paused = true)]
async fn requests_that_end_after_the_cut_count_as_cut() {
    let graceful = without_delay();
    let held = request(&graceful);
    graceful.shutdown();
    pass(s(10) + ms(100)).await;
    drop(held);
    let report = report(&graceful).await;
    assert_eq!(report.requests(), requests(1, 0, 0, 0, 1, 0));
}

/// A request that fails, or that is answered with a body of this many bytes.
async fn answered(graceful: &Graceful, answer: Result<usize, &'static str>) {
    let answer = answer.map(|size| Response::new(Full::new(Bytes::from(vec![0; size]))));
    let handler = move |_: Request<Empty<Bytes>>| {
        let answer = answer.clone();
        async { answer }
    };
    let mut service = graceful.layer().layer(service_fn(handler));
    if let Ok(response) = service.call(Request::new(Empty::new())).await {
        response.into_body().collect().await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_dropped_before_its_response_is_not_finished() {
    for names in [false, true] {
        let graceful = plan().name_requests(names).build().unwrap();
        drop(request(&graceful));
        let [gone, cancelled, polled] = [0; 3].map(|_| request(&graceful));
        let mut polled = tokio_test::task::spawn(polled);
        graceful.shutdown();
        drop(gone);
        assert!(polled.poll().is_pending());
        let late = request(&graceful);
        answered(&graceful, Ok(0)).await;
        answered(&graceful, Ok(1)).await;
        answered(&graceful, Ok(1_000_000)).await;
        answered(&graceful, Err("broken")).await;
        pass(DELAY).await;
        drop((cancelled, polled, late));
        let report = report(&graceful).await;
        assert_eq!(report.outcome(), Outcome::Clean);
        assert_eq!(report.requests(), requests(3, 5, 4, 0, 0, 4), "{names}");
        assert!(report.to_string().contains(", 4 dropped"), "{report}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_dropped_by_the_cut_counts_as_cut() {
    let graceful = without_delay();
    let [gone, cut, also_cut] = [0; 3].map(|_| request(&graceful));
    graceful.shutdown();
    pass(s(1)).await;
    drop(gone);
    pass(s(9) + ms(100)).await;
    drop((cut, also_cut));
    let report = report(&graceful).await;
    assert_eq!(report.requests(), requests(3, 0, 0, 0, 2, 1));
}

#[tokio::test(start_paused = true)]
async fn a_response_whose_client_leaves_half_way_is_not_dropped() {
    let graceful = without_delay();
    let answer = |_: Request<Empty<Bytes>>| async {
        Ok::<_, Infallible>(Response::new(Full::new(Bytes::from("body"))))
    };
    let mut service = graceful.layer().layer(service_fn(answer));
    let response = service.call(Request::new(Empty::new())).await.unwrap();
    graceful.shutdown();
    drop(response);
    let report = report(&graceful).await;
    assert_eq!(report.requests(), requests(1, 0, 1, 0, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_request_is_finished_when_its_body_is_at_its_end() {
    let graceful = without_delay();
    let answer = |_: Request<Empty<Bytes>>| async {
        Ok::<_, Infallible>(Response::new(Full::new(Bytes::from("body"))))
    };
    let mut service = graceful.layer().layer(service_fn(answer));
    let read = service.call(Request::new(Empty::new())).await.unwrap();
    let unread = service.call(Request::new(Empty::new())).await.unwrap();
    assert_eq!(read.status(), StatusCode::OK);
    graceful.shutdown();
    pass(s(1)).await;
    assert_eq!(read.into_body().collect().await.unwrap().to_bytes(), "body");
    let report = report(&graceful).await;
    drop(unread);
    assert_eq!(report.requests(), requests(2, 0, 1, 0, 1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_hold_that_continues_a_request_is_cut_without_the_request() {
    let graceful = without_delay();
    let held = request(&graceful);
    graceful.shutdown();
    pass(s(1)).await;
    let _hold = graceful.hold("continued");
    drop(held);
    let report = report(&graceful).await;
    assert_eq!(report.outcome(), Outcome::Forced);
    assert_eq!(report.remaining().holds, 1);
    assert_eq!(report.remaining().requests, 0);
    assert_eq!(report.requests(), requests(1, 0, 0, 0, 0, 1));
}

#[tokio::test(start_paused = true)]
async fn holds_are_no_requests() {
    let graceful = without_delay();
    let _hold = graceful.hold("job");
    let short = graceful.hold("short");
    graceful.shutdown();
    drop(short);
    let report = report(&graceful).await;
    assert_eq!(report.requests(), Requests::default());
    assert_eq!(report.holds_cut().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn exempt_requests_that_are_not_counted_are_in_no_figure() {
    let graceful = plan()
        .drain_delay(Duration::ZERO)
        .exempt("/metrics")
        .build()
        .unwrap();
    let held = request(&graceful);
    graceful.shutdown();
    let answer = |_: Request<Empty<Bytes>>| async {
        Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
    };
    let mut service = graceful.layer().layer(service_fn(answer));
    let exempt = Request::get("/metrics").body(Empty::new()).unwrap();
    assert_eq!(service.call(exempt).await.unwrap().status(), 200);
    drop(held);
    assert_eq!(
        report(&graceful).await.requests(),
        requests(1, 0, 0, 0, 0, 1)
    );
}

/// A stop in which everything happens that a report can contain.
async fn eventful() -> Report {
    let name = "a name that is far too long for its column\n\u{1b}[31m".repeat(3);
    let builder = plan().name_requests(true).worker_timeout(s(1));
    let graceful = builder.build().unwrap();
    let path = format!("/{}", "long/".repeat(50));
    let answer = |_: Request<Empty<Bytes>>| pending::<Result<Response<Empty<Bytes>>, Infallible>>();
    let mut service = graceful.layer().layer(service_fn(answer));
    let requests: Vec<_> = (0..5)
        .map(|_| service.call(Request::get(&path).body(Empty::new()).unwrap()))
        .collect();
    let holds: Vec<_> = (0..5).map(|_| graceful.hold(name.clone())).collect();
    let connections: Vec<_> = (0..5).map(|_| graceful.track(())).collect();
    graceful.worker(name.clone(), |_| pending::<()>()).unwrap();
    let ended = |_| async {};
    graceful.worker(name.clone(), ended).unwrap();
    let fails = |_| {
        let error = "ü".repeat(500);
        async move { Err(error) }
    };
    graceful.worker(name.clone(), fails).unwrap();
    graceful
        .on_lame_duck(name.clone(), s(1), pending::<()>())
        .unwrap();
    let panicking = panics("x\ny".repeat(200));
    graceful.cleanup(name.clone(), s(1), panicking).unwrap();
    graceful.cleanup("last", s(1), sleep_for(ms(250))).unwrap();
    let report = stop(&graceful).await;
    drop((requests, holds, connections));
    report
}

#[tokio::test(start_paused = true)]
async fn no_line_of_a_report_is_wider_than_eighty_columns() {
    let report = eventful().await;
    let text = report.to_string();
    for line in text.lines() {
        assert!(line.chars().count() <= 80, "{line}");
        assert!(!line.contains(char::is_control), "{line:?}");
    }
    // The head, four phases, six tasks, two errors, the requests, and of the requests, holds and
    // connections that were given up three each and the number of the others.
    assert_eq!(
        text.lines().count(),
        1 + 4 + 6 + 2 + 1 + 1 + 3 * 4,
        "{text}"
    );
    assert!(text.contains("\n    and 2 more\n"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn the_debug_of_a_report_leaves_nothing_out() {
    let report = eventful().await;
    let debug = format!("{report:?}");
    let all = [
        "trigger: Shutdown",
        "outcome: Forced",
        "5s, 10s, 250ms",
        "cleanup: 1.25s",
        "in_flight: 5",
        "admitted: 0",
        "finished: 0",
        "refused: 0",
        "cut: 5",
        "dropped: 0",
        "requests: 5, holds: 5, connections: 5, servers: 0, workers: 1",
        "path: \"/long/",
        "streaming: false",
        "CutHold { name: \"a name",
        "CutConnection { peer: None, age: 15s, undelivered: 0 }",
        "kind: Worker",
        "kind: LameDuck",
        "kind: Cleanup",
        "EndedEarly",
        "Failed(\"üü",
        "Panicked(\"x\\nyx",
        "server_error: None",
    ];
    for part in all {
        assert!(debug.contains(part), "{part} is not in {debug}");
    }
    assert_eq!(report.requests_cut().len(), 5);
    assert_eq!(report.holds_cut().len(), 5);
    assert_eq!(report.connections_cut().len(), 5);
    assert_eq!(report.tasks().len(), 6);
}

#[tokio::test(start_paused = true)]
async fn the_parts_of_a_report_add_up() {
    let report = eventful().await;
    let phases = [Phase::LameDuck, Phase::Draining, Phase::Closing];
    let sum: Duration = phases.map(|phase| report.time_in(phase)).iter().sum();
    assert_eq!(report.duration(), sum + report.cleanup_time());
    assert_eq!(report.cleanup_time(), s(1) + ms(250));
    for task in report.tasks() {
        assert!(task.began + task.took <= report.duration(), "{task:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_handle_and_its_parts_can_be_debugged_while_they_stop() {
    let graceful = Graceful::new();
    let hold = graceful.hold("hold");
    assert!(format!("{hold:?}").starts_with("Hold { graceful: Graceful { phase: Serving"));
    assert!(format!("{graceful:?}").contains("in_flight: 1"));
    graceful
        .worker("worker", |stop| async move {
            assert!(format!("{stop:?}").contains("Stop { draining"));
            stop.await;
        })
        .unwrap();
    drop(hold);
    assert_eq!(stop(&graceful).await.outcome(), Outcome::Clean);
}
