//! Rules that end the lame-duck phase before its delay is over, and the `preStop` route.

use std::{
    net::TcpListener,
    thread,
    time::{Duration, Instant},
};

use crate::{
    Test,
    client::Connection,
    process::{Server, wait_for},
    server::Form,
};

pub(crate) const TESTS: &[Test] = &[
    (
        "readiness::two_failed_checks_of_the_only_prober_end_the_phase",
        Form::CUTTING,
        noticed,
    ),
    (
        "readiness::the_whole_delay_passes_if_a_second_prober_has_not_noticed",
        Form::CUTTING,
        not_noticed_by_all,
    ),
    (
        "readiness::the_phase_ends_when_traffic_has_ended",
        Form::CUTTING,
        quiet,
    ),
    (
        "activation::a_rule_that_needs_longer_than_the_delay_of_a_passed_socket_has_no_effect",
        Form::CUTTING,
        quiet_on_a_passed_socket,
    ),
    (
        "activation::traffic_that_has_ended_ends_a_delay_that_was_set",
        Form::CUTTING,
        quiet_with_a_delay,
    ),
    (
        "signals::a_pre_stop_call_is_answered_when_draining_starts_and_sigterm_changes_nothing",
        Form::CUTTING,
        pre_stop,
    ),
    (
        "signals::a_pre_stop_caller_that_disconnects_changes_nothing",
        Form::CUTTING,
        disconnects,
    ),
    (
        "signals::a_pre_stop_call_needs_no_connect_info_on_a_server_of_serve",
        &[Form::Serve],
        without_connect_info,
    ),
    (
        "signals::a_pre_stop_call_through_a_proxy_stops_nothing",
        Form::CUTTING,
        through_a_proxy,
    ),
];

/// Long, so that an earlier end must be the effect of a rule.
const DELAY: &str = "delay=8000";

fn noticed(form: Form) {
    let mut server = Server::start(form, &[DELAY, "noticed=2:1"]);
    server.get("/readyz").assert_ok();
    server.terminate();
    server.wait_for_unready();
    assert_eq!(server.get("/readyz").status, 503);
    let exit = server.exit();
    exit.assert_clean();
    assert!(
        exit.report.contains("ended early: every prober"),
        "{exit:?}"
    );
}

fn not_noticed_by_all(form: Form) {
    let mut server = Server::start(form, &["delay=2000", "noticed=2:2"]);
    server.get("/").assert_ok();
    server.terminate();
    let address = server.address;
    // Probes until the server does not answer any more.
    let prober = thread::spawn(move || {
        while let Ok(mut prober) = Connection::try_open(address) {
            if prober.try_request("GET", "/readyz").is_err() {
                break;
            }
            thread::sleep(Duration::from_millis(50));
        }
    });
    let exit = server.exit();
    prober.join().unwrap();
    exit.assert_clean();
    assert!(exit.after >= Duration::from_secs(2), "{exit:?}");
    assert!(!exit.report.contains("ended early"), "{exit:?}");
}

fn quiet(form: Form) {
    let mut server = Server::start(form, &[DELAY, "quiet=500:300"]);
    server.get("/").assert_ok();
    server.terminate();
    server.wait_for_unready();
    for _ in 0..20 {
        server.get("/").assert_ok();
        thread::sleep(Duration::from_millis(5));
    }
    let exit = server.exit();
    exit.assert_clean();
    assert!(
        exit.report.contains("ended early: new requests"),
        "{exit:?}"
    );
    assert!(exit.after >= Duration::from_millis(500), "{exit:?}");
}

/// Sends SIGTERM, and then a request on each of these connections but the last two. The last two keep the
/// phase from ending because every connection has closed.
fn stop_under_requests(server: &mut Server) -> Vec<Connection> {
    let mut connections = [(); 10].map(|()| server.connect());
    for connection in &mut connections {
        connection.get("/").assert_ok();
    }
    server.terminate();
    let mut connections = Vec::from(connections);
    let idle = connections.split_off(8);
    // The first responses may be sent before the signal arrives.
    let mut first = connections.pop().unwrap();
    wait_for("a response that asks to leave", || {
        let response = first.get("/");
        response.assert_ok();
        response.says_close()
    });
    for connection in &mut connections {
        connection.get("/").assert_ok();
        thread::sleep(Duration::from_millis(5));
    }
    idle
}

fn quiet_on_a_passed_socket(form: Form) {
    let shared = TcpListener::bind("127.0.0.1:0").unwrap();
    // The rule fits the default delay of 5 s, so `build` accepts it.
    let knobs = ["delay=default", "quiet=2000:100"];
    let mut server = Server::start_on(&shared, form, &knobs);
    let idle = stop_under_requests(&mut server);
    let exit = server.exit();
    drop(idle);
    exit.assert_clean();
    assert!(!exit.report.contains("ended early"), "{exit:?}");
    assert!(exit.log.contains("because the delay is over"), "{exit:?}");
    // The delay is the one of a shared listener, and not the 5 s that `build` has checked.
    exit.assert_within(Duration::from_millis(500), Duration::from_secs(4));
}

fn quiet_with_a_delay(form: Form) {
    let shared = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut server = Server::start_on(&shared, form, &[DELAY, "quiet=500:100"]);
    let idle = stop_under_requests(&mut server);
    let exit = server.exit();
    drop(idle);
    exit.assert_clean();
    assert!(
        exit.report.contains("ended early: new requests"),
        "{exit:?}"
    );
    assert!(exit.after >= Duration::from_millis(500), "{exit:?}");
}

/// The order of Kubernetes: the hook, and SIGTERM after it has ended.
fn pre_stop(form: Form) {
    let mut server = Server::start(form, &["delay=500", "drain=10000", "pre_stop=true"]);
    let slow = server.get_in_background("/sleep/4000");
    server.mark_triggered();
    let address = server.address;
    let hook = thread::spawn(move || {
        let began = Instant::now();
        let response = Connection::open(address).get("/prestop");
        (response, began.elapsed())
    });
    let (response, took) = hook.join().unwrap();
    response.assert_ok();
    assert!(response.says_close());
    assert!(took >= Duration::from_millis(500), "{took:?}");
    // The service is draining already.
    server.terminate();
    slow.join().unwrap().assert_ok();
    let exit = server.exit();
    exit.assert_clean();
    assert!(
        exit.report.contains("shutdown by preStop: clean"),
        "{exit:?}"
    );
    assert!(
        exit.log.contains("a further SIGTERM changes nothing"),
        "{exit:?}"
    );
}

fn disconnects(form: Form) {
    let mut server = Server::start(form, &["delay=1000", "pre_stop=true"]);
    server.mark_triggered();
    let mut caller = server.connect();
    caller.send("POST /prestop HTTP/1.1\r\nhost: test\r\ncontent-length: 0\r\n\r\n");
    server.wait_for_unready();
    drop(caller);
    let exit = server.exit();
    // The caller has disconnected, so no response was lost.
    exit.assert_clean();
    assert!(
        exit.report.contains("shutdown by preStop: clean"),
        "{exit:?}"
    );
    assert!(exit.after >= Duration::from_secs(1), "{exit:?}");
}

fn without_connect_info(form: Form) {
    let mut server = Server::start(form, &["delay=300", "pre_stop=true", "connect_info=none"]);
    server.mark_triggered();
    server.connect().request("POST", "/prestop").assert_ok();
    server.exit().assert_clean();
}

fn through_a_proxy(form: Form) {
    let mut server = Server::start(form, &["delay=300", "pre_stop=true"]);
    let mut proxy = server.connect();
    proxy.send("GET /prestop HTTP/1.1\r\nhost: test\r\nx-forwarded-for: 203.0.113.7\r\n\r\n");
    assert_eq!(proxy.response("GET").status, 403);
    server.get("/readyz").assert_ok();
    server.terminate();
    let exit = server.exit();
    exit.assert_clean();
    assert!(exit.log.contains("x-forwarded-for of a proxy"), "{exit:?}");
}
