//! A stop without free file descriptors: clients wait in the accept queue, and the process cannot accept
//! them.

use std::{
    io,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;

use crate::{
    Test,
    client::{Connection, Response},
    process::{Server, wait_for},
    server::Form,
};

pub(crate) const TESTS: &[Test] = &[
    (
        "starved::idle_connections_make_room_for_the_accept_queue",
        Form::CUTTING,
        idle_make_room,
    ),
    (
        "starved::silent_connections_make_room_for_the_accept_queue",
        Form::CUTTING,
        silent_make_room,
    ),
    (
        "starved::requests_in_flight_complete_before_the_accept_queue_is_emptied",
        Form::CUTTING,
        busy_complete,
    ),
    (
        "starved::connections_that_are_not_idle_are_left_alone",
        Form::CUTTING,
        not_idle,
    ),
    (
        "starved::connections_lost_in_the_accept_queue_are_reported",
        Form::CUTTING,
        lost,
    ),
    (
        "starved::connections_lost_in_the_queue_of_a_process_that_did_not_run_are_reported",
        Form::CUTTING,
        lost_while_stopped,
    ),
];

const MS: fn(u64) -> Duration = Duration::from_millis;
const BOTH: [&str; 2] = ["keep_listening=true", "keep_listening=false"];
const FEW_FILES: &str = "files=64";
const GET: &str = "GET / HTTP/1.1\r\nhost: test\r\n\r\n";
/// The number of clients: more than twice as many as the server may have files open.
const CLIENTS: usize = 150;

/// Connects clients until long after the server has no descriptors left. Each sends `request`.
fn starve(server: &Server, request: &str) -> Vec<Connection> {
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let mut connection = server.connect();
            connection.send(request);
            connection
        })
        .collect();
    wait_for("the descriptors to run out", || is_starved(server));
    clients
}

/// Whether the server has as many files open as its limit allows. True if the system does not report them.
fn is_starved(server: &Server) -> bool {
    let open = std::fs::read_dir(format!("/proc/{}/fd", server.pid()));
    open.map_or(true, |open| open.count() >= 64)
}

#[track_caller]
fn assert_answered(answer: &io::Result<Response>, i: usize) {
    let answered = matches!(answer, Ok(answer) if matches!(answer.status, 200 | 503));
    assert!(answered, "{i}: {answer:?}");
}

/// Each client keeps its connection open after the response, so that no descriptor becomes free.
#[track_caller]
fn assert_all_answered(clients: &mut [Connection]) {
    for (i, client) in clients.iter_mut().enumerate() {
        assert_answered(&client.try_response("GET"), i);
    }
}

/// The accepted clients keep their connections after the response.
fn idle_make_room(form: Form) {
    for keep in BOTH {
        let mut server = Server::start(form, &["delay=300", "drain=5000", keep, FEW_FILES]);
        let mut clients = starve(&server, GET);
        server.terminate();
        assert_all_answered(&mut clients);
        let exit = server.exit();
        exit.assert_clean();
        exit.assert_within(MS(300), MS(1500));
    }
}

/// The accepted clients never send anything.
fn silent_make_room(form: Form) {
    for keep in BOTH {
        let mut server = Server::start(form, &["delay=300", "drain=5000", keep, FEW_FILES]);
        let silent = starve(&server, "");
        let mut clients: Vec<_> = (0..10).map(|_| server.connect()).collect();
        for client in &mut clients {
            client.send(GET);
        }
        server.terminate();
        assert_all_answered(&mut clients);
        let exit = server.exit();
        exit.assert_clean();
        exit.assert_within(MS(300), MS(1500));
        drop(silent);
    }
}

/// Requests that take longer than the delay use all descriptors.
fn busy_complete(form: Form) {
    for keep in BOTH {
        let mut server = Server::start(form, &["delay=300", "drain=8000", keep, FEW_FILES]);
        let mut clients = starve(&server, "GET /sleep/1000 HTTP/1.1\r\nhost: test\r\n\r\n");
        server.terminate();
        assert_all_answered(&mut clients);
        let exit = server.exit();
        exit.assert_clean();
        exit.assert_within(MS(300), MS(5000));
    }
}

/// An upgraded connection, one with an incomplete request head, and one whose request is not counted
/// because its route is outside the layer.
fn not_idle(form: Form) {
    let knobs = ["delay=300", "drain=6000", "keep_listening=false", FEW_FILES];
    let mut server = Server::start(form, &knobs);
    let mut upgraded = server.connect();
    upgraded.send(
        "GET /upgrade HTTP/1.1\r\nhost: test\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n",
    );
    assert_eq!(upgraded.head().status, 101);
    let mut half = server.connect();
    half.get("/").assert_ok();
    half.send("GET / HTTP/1.1\r\nhost: ");
    wait_for("no request in flight", || server.in_flight() == 0);
    let mut uncounted = server.connect();
    uncounted.send("GET /outside/3000 HTTP/1.1\r\nhost: test\r\n\r\n");
    let mut clients = starve(&server, GET);
    server.terminate();
    let begun = Instant::now();
    assert_all_answered(&mut clients);
    assert!(begun.elapsed() < MS(3000), "{:?}", begun.elapsed());
    upgraded.send("still there\n");
    assert_eq!(upgraded.line().unwrap(), "still there");
    if form == Form::Run {
        // With `serve`, hyper closes such a connection, as at the end of every drain. With axum's server it does so
        // 25 ms after the last client has been answered, which may be before a busy machine runs this client.
        let sent = half.try_send(b"test\r\n\r\n");
        let answer = sent.and_then(|()| half.try_response("GET"));
        if answer.is_ok() {
            assert_answered(&answer, 0);
        }
    }
    uncounted.response("GET").assert_ok();
    drop(upgraded);
    server.exit().assert_clean();
}

/// Requests that never end hold the descriptors until the deadline.
fn lost(form: Form) {
    for keep in BOTH {
        let mut server = Server::start(form, &["delay=200", "drain=800", keep, FEW_FILES]);
        let clients = starve(&server, "GET /never HTTP/1.1\r\nhost: test\r\n\r\n");
        server.terminate();
        let exit = server.exit();
        assert_eq!(exit.status.code(), Some(1), "{exit:?}");
        exit.assert_within(MS(900), MS(1500));
        let cut = number_before(&exit.report, " connections, ");
        let queued = number_before(&exit.report, " queued connections");
        let answers = clients
            .into_iter()
            .map(|mut client| client.try_response("GET"));
        // Some clients are refused, if a descriptor was free for a moment.
        let answered = answers.flatten().count();
        assert_eq!(cut + queued + answered, CLIENTS, "{answered}: {exit:?}");
        assert!(queued > CLIENTS / 2, "{exit:?}");
        assert!(exit.log.contains("before its queue is empty"), "{exit:?}");
    }
}

/// The process does not run until the drain deadline has passed, so that it has no time to empty the queue.
fn lost_while_stopped(form: Form) {
    for keep in BOTH {
        let knobs = ["delay=300", "drain=300", "observed=true", keep, FEW_FILES];
        let mut server = Server::start(form, &knobs);
        let clients = starve(&server, GET);
        server.terminate();
        server.expect_phase("lame duck");
        server.signal(Signal::SIGSTOP);
        server.until(MS(1200));
        server.signal(Signal::SIGCONT);
        let exit = server.exit();
        let answers = clients
            .into_iter()
            .map(|mut client| client.try_response("GET"));
        let lost = CLIENTS - answers.flatten().count();
        // Clients that were accepted after all are among the connections that were cut.
        let output = exit.output.join("\n");
        let given_up = output.split_once("given up: ");
        let given_up = given_up.map_or("", |(_, rest)| rest.split('|').next().unwrap_or(""));
        let (mut queued, mut cut) = (0, 0);
        for entry in given_up.split(", ") {
            if entry.contains(" queued connection") {
                queued = number_before(entry, " queued");
            } else if entry.contains(" connection") {
                cut = number_before(entry, " connection");
            }
        }
        assert!(queued <= lost && lost <= queued + cut, "{lost}: {exit:?}");
        assert_eq!(exit.status.code(), Some(i32::from(lost > 0)), "{exit:?}");
    }
}

#[track_caller]
fn number_before(text: &str, what: &str) -> usize {
    let (before, _) = text.split_once(what).unwrap_or_else(|| panic!("{text}"));
    let digits = before.rsplit(|c: char| !c.is_ascii_digit()).next();
    digits.unwrap().parse().unwrap()
}
