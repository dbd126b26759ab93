//! Unusual and mistaken uses of the API.

use std::{
    any::Any,
    convert::Infallible,
    future::{pending, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Empty, Full};
use tokio::{io::duplex, runtime, time::Instant};
use tokio_test::{assert_pending, assert_ready, task};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_graceful::{Graceful, GracefulLayer, Outcome, Phase, Rejection, Trigger};

use crate::support::{
    DELAY, comes, does_not_hang, graceful, let_others_run, pass, paused_runtime, plan,
    quick_request, request, s, server, without_delay,
};

#[tokio::test(start_paused = true)]
async fn a_layer_works_on_after_its_handle_is_dropped() {
    let graceful = graceful();
    let layer = graceful.layer();
    drop(graceful);
    let_others_run().await;
    let mut service = layer.layer(service_fn(|_: Request<Empty<Bytes>>| {
        ready(Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new())))
    }));
    pass(s(60)).await;
    let response = service.call(Request::new(Empty::new())).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(layer.handle().phase(), Phase::Serving);

    let begun = Instant::now();
    let stopped = layer.handle().stopped();
    layer.handle().shutdown();
    drop(layer);
    stopped.await;
    assert_eq!(begun.elapsed(), DELAY);
    let response = service.call(Request::new(Empty::new())).await.unwrap();
    assert_eq!(response.status(), 503);
}

#[tokio::test(start_paused = true)]
async fn a_server_runs_on_after_every_handle_is_dropped() {
    let graceful = graceful();
    let (stop, asked) = tokio::sync::oneshot::channel::<()>();
    let run = tokio::spawn(graceful.run(graceful.drain_on(async {
        let _ = asked.await;
    })));
    drop(graceful);
    pass(s(60)).await;
    assert!(!run.is_finished());
    stop.send(()).unwrap();
    let report = run.await.unwrap();
    assert_eq!(report.trigger(), Trigger::Future);
    assert_eq!(report.duration(), DELAY);
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_completes_although_every_handle_is_dropped_after_it() {
    let graceful = graceful();
    let held = request(&graceful);
    let mut phases = graceful.subscribe();
    let begun = Instant::now();
    graceful.shutdown();
    drop(graceful);
    pass(s(7)).await;
    assert_eq!(phases.phase(), Phase::Draining);
    drop(held);
    assert!(phases.reached(Phase::Stopped).await);
    assert_eq!(begun.elapsed(), s(7));
    assert!(phases.changed().await.is_none(), "nothing is left");
}

#[tokio::test(start_paused = true)]
async fn a_subscriber_is_notified_when_everything_is_dropped() {
    let graceful = graceful();
    let layer = graceful.layer();
    let mut phases = graceful.subscribe();
    let waiting = tokio::spawn(async move { phases.changed().await });
    let_others_run().await;
    drop(graceful);
    pass(s(1)).await;
    assert!(!waiting.is_finished(), "the layer lives");
    drop(layer);
    assert!(waiting.await.unwrap().is_none());
}

#[test]
fn a_subscriber_is_notified_when_everything_is_dropped_outside_a_runtime() {
    let graceful = graceful();
    let phases = graceful.subscribe();
    let layer = graceful.layer();
    drop(graceful);
    assert!(!phases.is_closed());
    drop(layer);
    assert!(phases.is_closed());
}

#[test]
fn everything_but_time_works_outside_a_runtime() {
    assert!(runtime::Handle::try_current().is_err());
    let _default = (Graceful::new(), GracefulLayer::new(), Graceful::default());
    let graceful = without_delay();
    let held = request(&graceful);
    assert_eq!(graceful.in_flight(), 1);
    graceful.set_ready(false);
    graceful.set_ready(true);
    assert!(graceful.is_ready());
    let connection = graceful.track(());
    assert_eq!(graceful.connections(), 1);
    let _probes = (graceful.readiness(), graceful.liveness());
    let phases = graceful.subscribe();
    let mut drain = task::spawn(graceful.drain_on(pending()));
    let mut draining = task::spawn(graceful.draining());
    let mut stopped = task::spawn(graceful.stopped());
    assert_pending!(drain.poll());
    assert_pending!(draining.poll());
    assert_pending!(stopped.poll());
    assert_eq!(graceful.phase(), Phase::Serving);

    graceful.shutdown();
    assert_eq!(graceful.phase(), Phase::Draining);
    assert_eq!(phases.phase(), Phase::Draining);
    assert_ready!(draining.poll());
    assert_pending!(drain.poll());
    assert!(graceful.snapshot().time_left.is_some());

    // There is no driver, so the next call that changes something takes the steps that are due.
    drop((held, connection));
    graceful.shutdown();
    assert_eq!(graceful.phase(), Phase::Stopped);
    assert_ready!(drain.poll());
    assert_ready!(stopped.poll());
}

#[cfg(feature = "signal")]
#[test]
fn signals_are_listened_for_outside_a_runtime() {
    let graceful = graceful();
    graceful.handle_signals().unwrap();
    graceful.handle_signals().unwrap();
    drop(graceful.drain());
    assert_eq!(graceful.phase(), Phase::Serving);
}

#[test]
fn a_drain_polled_outside_a_runtime_starts_the_timeline() {
    let graceful = graceful();
    let mut drain = task::spawn(graceful.drain_on(ready(())));
    assert_pending!(drain.poll());
    assert_eq!(graceful.phase(), Phase::LameDuck);
}

#[test]
fn run_needs_no_runtime_where_its_server_needs_none() {
    let graceful = graceful();
    let mut run = task::spawn(graceful.run(ready(Err::<(), _>("broken"))));
    let report = assert_ready!(run.poll());
    assert_eq!(report.outcome(), Outcome::ServerFailed);
    assert_eq!(graceful.phase(), Phase::Stopped);
}

#[test]
fn a_lifecycle_outlives_the_runtime_it_was_made_in() {
    let first = paused_runtime();
    let graceful = first.block_on(async {
        let graceful = graceful();
        let_others_run().await;
        graceful
    });
    drop(first);
    assert_eq!(graceful.phase(), Phase::Serving);
    paused_runtime().block_on(async {
        let begun = Instant::now();
        graceful.shutdown();
        graceful.stopped().await;
        assert_eq!(begun.elapsed(), DELAY);
    });
}

#[test]
fn a_shutdown_begun_in_a_runtime_that_is_dropped_completes_in_the_next() {
    let first = paused_runtime();
    let (graceful, held) = first.block_on(async {
        let graceful = graceful();
        let held = request(&graceful);
        graceful.shutdown();
        pass(DELAY).await;
        assert_eq!(graceful.phase(), Phase::Draining);
        (graceful, held)
    });
    drop(first);
    paused_runtime().block_on(async {
        let stopped = tokio::spawn(graceful.stopped());
        let_others_run().await;
        assert!(!stopped.is_finished());
        drop(held);
        stopped.await.unwrap();
        let report = graceful.run(pending::<()>()).await;
        assert_eq!(report.outcome(), Outcome::Clean);
    });
}

#[test]
fn a_runtime_may_be_dropped_under_a_running_server() {
    does_not_hang(|| {
        let first = paused_runtime();
        let graceful = graceful();
        first.block_on(async {
            tokio::spawn(graceful.run(server(&graceful)));
            tokio::spawn(server(&graceful));
            tokio::spawn(graceful.stopped());
            let_others_run().await;
        });
        drop(first);
        assert_eq!(graceful.phase(), Phase::Serving);
        paused_runtime().block_on(async {
            graceful.shutdown();
            graceful.stopped().await;
        });
    });
}

#[test]
fn a_lifecycle_may_be_made_in_the_context_of_a_runtime_that_is_gone() {
    does_not_hang(|| {
        let runtime = paused_runtime();
        let handle = runtime.handle().clone();
        drop(runtime);
        let _context = handle.enter();
        let graceful = without_delay();
        graceful.shutdown();
        assert_eq!(graceful.phase(), Phase::Stopped);
    });
}

#[test]
fn a_task_that_calls_shutdown_when_it_is_dropped_may_be_dropped_with_its_runtime() {
    struct ShutdownOnDrop(Graceful);

    impl Drop for ShutdownOnDrop {
        fn drop(&mut self) {
            self.0.shutdown();
        }
    }

    does_not_hang(|| {
        let first = paused_runtime();
        let graceful = first.block_on(async { graceful() });
        first.block_on(async {
            let guard = ShutdownOnDrop(graceful.clone());
            tokio::spawn(async move {
                let _guard = guard;
                pending::<()>().await;
            });
            let_others_run().await;
        });
        drop(first);
        assert_eq!(graceful.phase(), Phase::LameDuck);
    });
}

#[test]
#[should_panic(expected = "timers are disabled")]
fn a_runtime_without_timers_is_refused_at_the_first_call() {
    let runtime = runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async { plan().build().unwrap() });
}

#[test]
fn a_server_that_is_refused_for_want_of_timers_is_not_waited_for() {
    let without_timers = runtime::Builder::new_current_thread().build().unwrap();
    for is_drain in [false, true] {
        let graceful = graceful();
        let drain = graceful.drain_on(pending());
        let run = graceful.run(pending::<()>());
        let refused = without_timers.block_on(async {
            if is_drain {
                tokio::spawn(drain).await.unwrap_err()
            } else {
                tokio::spawn(run).await.unwrap_err()
            }
        });
        assert!(refused.is_panic());
        paused_runtime().block_on(async {
            // The only server.
            let report = graceful.run(async {}).await;
            assert_eq!(report.duration(), Duration::ZERO, "{report}");
            assert_eq!(report.outcome(), Outcome::Clean, "{report}");
        });
    }
}

/// One of everything that keeps a lifecycle alive.
fn one_of_each(graceful: Graceful) -> Vec<Option<Box<dyn Any>>> {
    let mut polled = task::spawn(graceful.stopped());
    let _ = polled.poll();
    let parts: Vec<Box<dyn Any>> = vec![
        Box::new(graceful.layer()),
        Box::new(server(&graceful)),
        Box::new(polled),
        Box::new(graceful.track(())),
        Box::new(graceful),
    ];
    parts.into_iter().map(Some).collect()
}

/// All orders of `count` things.
fn orders(count: usize) -> Vec<Vec<usize>> {
    if count == 0 {
        return vec![Vec::new()];
    }
    let shorter = orders(count - 1);
    let insert = |order: &Vec<usize>, at| {
        let mut order = order.clone();
        order.insert(at, count - 1);
        order
    };
    shorter
        .iter()
        .flat_map(|order| (0..count).map(move |at| insert(order, at)))
        .collect()
}

#[test]
fn handle_layer_and_futures_may_be_dropped_in_any_order() {
    assert_eq!(orders(5).len(), 120);
    for stop in [false, true] {
        for order in orders(5) {
            let graceful = without_delay();
            let mut parts = one_of_each(graceful.clone());
            if stop {
                graceful.shutdown();
            }
            let phases = graceful.subscribe();
            drop(graceful);
            for index in &order {
                let open = !phases.is_closed();
                assert!(open, "a part of {order:?} does not keep it alive");
                parts[*index] = None;
            }
            // A stop that has begun is completed by another thread.
            let closed = comes(|| phases.is_closed());
            assert!(closed, "{order:?} leaks");
        }
    }
}

/// Services and requests own nothing, and do not need an owner.
#[tokio::test(start_paused = true)]
async fn a_service_and_its_requests_go_on_after_the_last_owner_of_the_lifecycle() {
    let builder = plan().max_in_flight(2).exempt("/metrics");
    let rejection = |_: &Rejection<'_>| Response::new("my own".into());
    let graceful = builder.rejection(rejection).build().unwrap();
    let mut service =
        graceful
            .layer()
            .layer(service_fn(|request: Request<Empty<Bytes>>| async move {
                if request.uri().path() == "/slow" {
                    pass(s(1)).await;
                }
                Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"hello"))))
            }));
    let call = |path: &str| Request::get(path).body(Empty::new()).unwrap();
    let mut phases = graceful.subscribe();
    let first = service.call(call("/"));
    drop(graceful);
    assert!(phases.changed().await.is_none(), "neither of them owns it");

    let slow = tokio::spawn(service.call(call("/slow")));
    for _ in 0..2 {
        // Two requests are in flight.
        let refused = service.call(call("/")).await.unwrap();
        assert_eq!(refused.headers()["retry-after"], "1");
        let text = refused.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(text, "my own");
    }
    let exempt = service.call(call("/metrics")).await.unwrap();
    let text = exempt.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(text, "hello");

    let response = first.await.unwrap();
    drop(response);
    drop(slow.await);
    let response = service.clone().call(call("/")).await.unwrap();
    assert!(!response.headers().contains_key("connection"));
    let text = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(text, "hello");
}

#[tokio::test(start_paused = true)]
async fn named_requests_are_served_after_the_last_owner_of_the_lifecycle() {
    let graceful = plan().name_requests(true).build().unwrap();
    let mut service = graceful
        .layer()
        .layer(service_fn(|_: Request<Empty<Bytes>>| async {
            Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
        }));
    let named = service.call(Request::new(Empty::new()));
    drop(graceful);
    assert_eq!(named.await.unwrap().status(), 200);
    let response = service.call(Request::new(Empty::new())).await.unwrap();
    assert_eq!(response.status(), 200);
}

/// A stop that has begun keeps the service alive to its end.
#[tokio::test(start_paused = true)]
async fn requests_are_still_refused_after_a_stop_without_an_owner() {
    let graceful = graceful();
    let mut service = graceful
        .layer()
        .layer(service_fn(|_: Request<Empty<Bytes>>| async {
            Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
        }));
    let mut phases = graceful.subscribe();
    graceful.shutdown();
    drop(graceful);
    let response = service.call(Request::new(Empty::new())).await.unwrap();
    assert_eq!(response.headers()["connection"], "close");
    while phases.changed().await.is_some() {}
    assert_eq!(phases.phase(), Phase::Stopped);
    let refused = service.call(Request::new(Empty::new())).await.unwrap();
    assert_eq!(refused.status(), 503);
    assert_eq!(refused.headers()["connection"], "close");
}

#[tokio::test(start_paused = true)]
async fn handle_layer_and_futures_may_be_dropped_in_any_order_inside_a_runtime() {
    for stop in [false, true] {
        for order in orders(5) {
            let graceful = graceful();
            let mut parts = one_of_each(graceful.clone());
            if stop {
                graceful.shutdown();
            }
            let mut phases = graceful.subscribe();
            drop(graceful);
            for index in &order {
                parts[*index] = None;
                tokio::task::yield_now().await;
            }
            while phases.changed().await.is_some() {}
            let last = phases.phase();
            let expected = if stop { Phase::Stopped } else { Phase::Serving };
            assert_eq!(last, expected, "{order:?}");
        }
    }
}

#[test]
fn clones_share_one_lifecycle() {
    let graceful = without_delay();
    let clone = graceful.clone();
    let through_layer = graceful.layer().clone().handle();
    let held = request(&graceful);
    let connection = clone.track(());
    through_layer.set_ready(false);
    for each in [&graceful, &clone, &through_layer] {
        assert_eq!(each.in_flight(), 1);
        assert_eq!(each.connections(), 1);
        assert!(!each.is_ready());
    }
    clone.shutdown();
    for each in [&graceful, &clone, &through_layer] {
        assert_eq!(each.phase(), Phase::Draining);
    }
    drop((held, connection));
}

#[test]
fn two_lifecycles_share_nothing() {
    let (one, other) = (without_delay(), without_delay());
    let _held = request(&one);
    let _connection = one.track(());
    one.shutdown();
    assert_eq!(other.phase(), Phase::Serving);
    assert_eq!((other.in_flight(), other.connections()), (0, 0));
}

#[track_caller]
fn assert_shows(value: &impl std::fmt::Debug, parts: &[&str]) {
    for text in [format!("{value:?}"), format!("{value:#?}")] {
        for part in parts {
            assert!(text.contains(part), "no {part:?} in {text}");
        }
    }
}

#[test]
fn debug_of_the_handle_and_what_holds_it_shows_live_values() {
    let graceful = without_delay();
    assert_shows(
        &graceful,
        &["Serving", "ready: true", "in_flight: 0", "connections: 0"],
    );
    let held = request(&graceful);
    let connection = graceful.track(7);
    let live = ["in_flight: 1", "connections: 1"];
    assert_shows(&graceful, &live);
    assert_shows(&graceful.snapshot(), &live);
    assert_shows(&graceful.layer(), &live);
    assert_shows(&graceful.layer().layer("inner"), &["inner", live[0]]);
    assert_shows(&server(&graceful), &live);
    assert_shows(&graceful.readiness(), &["Ready", live[0]]);
    assert_shows(&graceful.liveness(), &["Alive", live[0]]);
    assert_shows(&graceful.stopped(), &["Stopped", "Serving"]);
    assert_shows(&graceful.draining(), &["Draining", "Serving"]);
    assert_shows(&graceful.subscribe(), &["Serving", "closed: false"]);
    let stream = graceful.until_draining(futures_util::stream::empty::<()>());
    assert_shows(&stream, &["UntilDraining", "ended: false"]);
    assert_shows(&connection, &["GracefulIo", "7"]);
    assert_shows(&held, &["admitted"]);

    let refused = {
        graceful.shutdown();
        request(&graceful)
    };
    assert_shows(&refused, &["refused"]);
    assert_shows(&graceful, &["Draining", "ready: false"]);
    assert_shows(&graceful.layer(), &["Draining"]);
    assert_shows(&graceful.stopped(), &["Stopped", "Draining"]);
}

#[cfg(feature = "axum")]
#[test]
fn debug_of_a_listener_shows_live_values() {
    #[derive(Debug)]
    struct NoListener;

    impl axum::serve::Listener for NoListener {
        type Io = tokio::io::DuplexStream;
        type Addr = ();

        async fn accept(&mut self) -> (Self::Io, ()) {
            pending().await
        }

        fn local_addr(&self) -> std::io::Result<()> {
            Ok(())
        }
    }

    let graceful = graceful();
    let _connection = graceful.track(());
    let listener = graceful.listener(NoListener);
    assert_shows(&listener, &["NoListener", "connections: 1"]);
    let pre_stop = graceful.pre_stop();
    assert_shows(&pre_stop, &["PreStop", "allowed", "connections: 1"]);
}

#[tokio::test(start_paused = true)]
async fn debug_of_a_body_shows_whether_its_request_is_in_flight() {
    let graceful = graceful();
    let response = graceful
        .layer()
        .layer(service_fn(|_: Request<Empty<Bytes>>| {
            ready(Ok::<_, Infallible>(Response::new(Full::new(
                Bytes::from_static(b"hello"),
            ))))
        }))
        .oneshot(Request::new(Empty::new()))
        .await
        .unwrap();
    let mut body = response.into_body();
    assert_shows(&body, &["inner", "in_flight: true"]);
    http_body_util::BodyExt::frame(&mut body).await;
    assert_shows(&body, &["in_flight: false"]);
}

#[tokio::test(start_paused = true)]
async fn debug_of_plain_data_names_its_values() {
    let builder = plan().max_in_flight(77).exempt("/metrics");
    assert_shows(&builder, &["77", "/metrics", "5s", "10s"]);
    let with_rejection = builder.rejection(|_: &Rejection<'_>| Response::new(Bytes::new()));
    assert_shows(&with_rejection, &["77"]);

    let error = Graceful::builder().drain_delay(s(99)).build().unwrap_err();
    assert_shows(&error, &["99s"]);
    assert_shows(&Phase::LameDuck, &["LameDuck"]);
    assert_shows(&Trigger::Shutdown, &["Shutdown"]);

    let graceful = without_delay();
    let report = graceful.run(ready(Err::<(), _>("broken"))).await;
    assert_shows(&report, &["ServerFailed", "ServerEnded", "broken"]);
    assert_shows(&report.remaining(), &["requests: 0"]);
    assert_shows(&report.outcome(), &["ServerFailed"]);
}

#[tokio::test(start_paused = true)]
async fn debug_of_a_rejection_names_its_reason() {
    let shown = std::sync::Arc::new(std::sync::Mutex::new(String::new()));
    let sink = std::sync::Arc::clone(&shown);
    let graceful = plan()
        .max_in_flight(1)
        .rejection(move |rejection: &Rejection<'_>| {
            *sink.lock().unwrap() = format!("{rejection:?}");
            Response::new(Bytes::new())
        })
        .build()
        .unwrap();
    let _held = request(&graceful);
    quick_request(&graceful).await;
    let shown = shown.lock().unwrap();
    assert!(shown.contains("Overloaded"), "{shown}");
}

#[tokio::test(start_paused = true)]
async fn debug_never_waits_for_a_lock_that_the_service_holds() {
    let graceful = graceful();
    let (io, _peer) = duplex(16);
    let connection = graceful.track(io);
    graceful.shutdown();
    for _ in 0..200 {
        pass(s(1) / 10).await;
        let text = format!("{graceful:?} {connection:?} {:?}", graceful.snapshot());
        assert!(text.contains("connections: 1"), "{text}");
    }
    assert_eq!(graceful.phase(), Phase::Stopped);
}

/// On real threads and the real clock: the race is between the driver and the last request.
#[test]
fn the_driver_never_misses_the_last_request() {
    let runtime = runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    for round in 0..3000 {
        let graceful = without_delay();
        let held = request(&graceful);
        let leaving = std::thread::spawn({
            let graceful = graceful.clone();
            move || {
                while graceful.phase() < Phase::Draining {
                    std::hint::spin_loop();
                }
                for _ in 0..(round * 7 % 3000) {
                    std::hint::spin_loop();
                }
                drop(held);
            }
        });
        let took = runtime.block_on(async {
            let begun = std::time::Instant::now();
            graceful.shutdown();
            graceful.stopped().await;
            begun.elapsed()
        });
        leaving.join().unwrap();
        // A driver that has missed it checks again with the next progress line, after 2 s.
        assert!(took < s(2), "round {round}: {took:?}");
    }
}
