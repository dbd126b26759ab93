//! A listening socket that outlives the process: the successor reads the same accept queue.

use std::{
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    thread,
    time::Duration,
};

use nix::sys::signal::Signal;
use socket2::SockRef;

use crate::{
    Test,
    client::Connection,
    process::{BOUND, Server, wait_for},
    restarts::{Load, RETRIED, Seen},
    server::Form,
};

pub(crate) const TESTS: &[Test] = &[
    #[cfg(target_os = "linux")]
    (
        "activation::a_leftover_filter_does_not_keep_clients_away",
        Form::CUTTING,
        leftover_filter,
    ),
    (
        "activation::ten_restarts_beside_each_other_fail_nobody",
        Form::CUTTING,
        beside,
    ),
    (
        "activation::ten_restarts_in_turn_fail_nobody",
        Form::CUTTING,
        in_turn,
    ),
    (
        "activation::idle_clients_are_not_refused",
        &[Form::Serve],
        idle,
    ),
    (
        "activation::killed_processes_leave_a_port_that_accepts",
        Form::CUTTING,
        killed,
    ),
    (
        "activation::what_connects_during_the_stop_waits_for_the_next_process",
        Form::CUTTING,
        queue,
    ),
    (
        "activation::requests_on_existing_connections_are_served",
        Form::CUTTING,
        existing,
    ),
    (
        "activation::the_delay_ends_with_the_last_connection",
        Form::CUTTING,
        early,
    ),
    (
        "activation::a_listener_that_was_not_passed_accepts_during_the_delay",
        Form::CUTTING,
        own,
    ),
    (
        "activation::a_socket_that_was_shut_down_keeps_nothing_from_stopping",
        Form::CUTTING,
        shut_down,
    ),
];

/// The socket is passed by socket activation, or in a way that the process does not know of.
const ACTIVATED: &str = r#"export LISTEN_FDS=1 LISTEN_PID=$$; exec "$0" "$@" 3<&0"#;
const PLAIN: &str = r#"exec "$0" "$@""#;

/// The delay is the default of a shared listener.
const DEFAULT: &[&str] = &["delay=default"];

fn shared_socket() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// What a process leaves behind that was killed while no handshake was to begin.
#[cfg(target_os = "linux")]
fn leftover_filter(form: Form) {
    use socket2::SockFilter;

    const RETURN: u16 = 0x06;
    let (shared, address) = shared_socket();
    let drop_all = [SockFilter::new(RETURN, 0, 0, 0)];
    SockRef::from(&shared).attach_filter(&drop_all).unwrap();
    let mut server = Server::start_on(&shared, form, &["delay=0"]);
    // The server may not have polled its listener yet. Each attempt is too short for a handshake
    // that is tried again.
    wait_for("a connection", || {
        TcpStream::connect_timeout(&address, Duration::from_millis(100)).is_ok()
    });
    server.get("/").assert_ok();
    server.terminate();
    server.exit().assert_clean();
}

/// Ten processes one after another, while clients go on. Returns what those have seen.
fn restart(form: Form, knobs: &[&str], how: How, idle: Duration, clients: usize) -> Seen {
    let (shared, address) = shared_socket();
    let mut server = Server::start_on(&shared, form, knobs);
    let load = Load::begin(address, 4, clients, idle);
    for _ in 0..10 {
        thread::sleep(Duration::from_millis(200));
        let next = (how == How::Beside).then(|| Server::start_on(&shared, form, knobs));
        server.terminate();
        if let How::Killed(after) = how {
            thread::sleep(after);
            server.signal(Signal::SIGKILL);
            server.exit();
        } else {
            server.exit().assert_clean();
        }
        server = next.unwrap_or_else(|| Server::start_on(&shared, form, knobs));
    }
    // A handshake that was dropped is tried again in this time.
    thread::sleep(Duration::from_millis(1100));
    let seen = load.end();
    server.terminate();
    server.exit().assert_clean();
    seen
}

#[derive(Clone, Copy, PartialEq)]
enum How {
    /// The next process is started before the old one is told to stop.
    Beside,
    /// The next process is started when the old one has ended.
    InTurn,
    /// The same, and the old one is killed so long after it was told to stop.
    Killed(Duration),
}

/// A client that opens a connection anew waits for no handshake that was dropped, and for no balancer.
fn assert_unnoticed(seen: &Seen, what: &str) {
    assert_eq!(seen.failed, [""; 0], "{what}: {seen:?}");
    assert!(seen.slowest_connect < RETRIED, "{what}: {seen:?}");
    assert!(seen.requests > 500, "{what}: {seen:?}");
    assert!(seen.moved > 50 && seen.again > 100, "{what}: {seen:?}");
}

fn beside(form: Form) {
    let seen = restart(form, DEFAULT, How::Beside, Duration::from_millis(100), 8);
    assert_unnoticed(&seen, "beside");
}

fn in_turn(form: Form) {
    let seen = restart(form, DEFAULT, How::InTurn, Duration::from_millis(100), 8);
    assert_unnoticed(&seen, "in turn");
    // Who connects waits for the old process, which must not have a balancer's delay.
    assert!(seen.slowest < Duration::from_secs(4), "{seen:?}");
}

/// Connections that are closed while they are idle. A request that crosses the close is lost, as HTTP/1
/// has it; a client that has not been scheduled since it looked sends one. None is refused.
fn idle(form: Form) {
    for how in [How::Beside, How::InTurn] {
        let mut seen = restart(form, &["delay=0"], how, Duration::from_millis(200), 40);
        seen.failed.retain(|error| error.starts_with("status"));
        assert_unnoticed(&seen, "idle");
    }
}

/// What the killed process had accepted is lost. What connects is not.
fn killed(form: Form) {
    for after in [0, 1, 3, 6, 30] {
        let how = How::Killed(Duration::from_millis(after));
        let seen = restart(form, DEFAULT, how, Duration::from_millis(100), 2);
        assert!(seen.slowest_connect < RETRIED, "{after} ms: {seen:?}");
        assert!(seen.requests > 500, "{after} ms: {seen:?}");
        // In each of ten restarts those that had a request in it: six clients.
        assert!(seen.failed.len() <= 60, "{after} ms: {seen:?}");
    }
}

/// What connects after the signal waits in the queue for the next process, although the first one
/// still serves.
fn queue(form: Form) {
    for (words, knobs) in [
        (ACTIVATED, &["delay=default"][..]),
        (PLAIN, &["shared=true"][..]),
        (PLAIN, &["shared=true", "keep_listening=false"][..]),
    ] {
        let (shared, address) = shared_socket();
        let mut first = Server::start_by(words, &shared, form, knobs);
        let slow = first.get_in_background("/sleep/1500");
        first.terminate();
        let mut kept = Vec::new();
        // The first process may not have heard the signal yet.
        wait_for("a connection that nobody answers", || {
            let mut connection = Connection::open(address);
            let stream = connection.stream();
            stream
                .set_read_timeout(Some(Duration::from_millis(300)))
                .unwrap();
            let answered = connection.try_request("GET", "/").is_ok();
            connection.stream().set_read_timeout(Some(BOUND)).unwrap();
            kept.push(connection);
            !answered
        });
        let second = Server::start_by(words, &shared, form, knobs);
        let mut waits = kept.pop().unwrap();
        waits.response("GET").assert_ok();
        slow.join().unwrap().assert_ok();
        first.exit().assert_clean();
        waits.get("/").assert_ok();
        drop(waits);
        stop(second);
    }
}

/// A request that comes on an idle connection right after the signal.
fn existing(form: Form) {
    let (shared, _) = shared_socket();
    let mut server = Server::start_on(&shared, form, &["delay=10000", "grace=60000"]);
    let mut connections = [(); 8].map(|()| server.connect());
    for connection in &mut connections {
        connection.get("/").assert_ok();
    }
    server.terminate();
    wait_for("a response that asks to leave", || {
        let response = connections[0].get("/");
        response.assert_ok();
        response.says_close()
    });
    for connection in &mut connections[1..] {
        let response = connection.get("/");
        response.assert_ok();
        assert!(response.says_close(), "{response:?}");
    }
    server.exit().assert_clean();
}

/// The delay is over as soon as the last connection has closed.
fn early(form: Form) {
    let (shared, _) = shared_socket();
    let mut server = Server::start_on(&shared, form, &["delay=20000", "grace=60000"]);
    let mut connection = server.connect();
    connection.get("/").assert_ok();
    server.terminate();
    let mut last = connection.get("/");
    // The signal may come after the first ones.
    wait_for("a response that asks to leave", || {
        last.assert_ok();
        last.says_close() || {
            last = connection.get("/");
            false
        }
    });
    connection.assert_closed();
    let exit = server.exit();
    exit.assert_clean();
    exit.assert_within(Duration::ZERO, Duration::from_secs(5));
    assert!(exit.log.contains("every connection has closed"), "{exit:?}");
}

/// With what does not name this socket, and where it was not wanted, the listener is the process's
/// own: it accepts during the delay.
fn own(form: Form) {
    let lies = [
        r#"export LISTEN_FDS=1 LISTEN_PID=1; exec "$0" "$@" 3<&0"#,
        r#"export LISTEN_FDS=1000000; exec "$0" "$@" 3</dev/null"#,
        r#"export LISTEN_FDS=2; exec "$0" "$@" 3</dev/null 4<&-"#,
        r#"export LISTEN_FDS=-1; exec "$0" "$@" 3<&0"#,
        r#"export LISTEN_FDS=x LISTEN_PID=y; exec "$0" "$@" 3<&0"#,
    ];
    let lies = lies.map(|words| (words, "shared="));
    for (words, knob) in lies.into_iter().chain([(ACTIVATED, "shared=false")]) {
        let (shared, _) = shared_socket();
        let knobs = [knob, "delay=1000"];
        let knobs = if knob == "shared=" {
            &knobs[1..]
        } else {
            &knobs
        };
        let mut server = Server::start_by(words, &shared, form, knobs);
        // Before it serves, it has nothing to wait for.
        server.get("/").assert_ok();
        server.terminate();
        server.wait_for_unready();
        server.get("/").assert_ok();
        server.exit().assert_clean();
    }
}

/// A socket that has been shut down, by this process or by another one, accepts nothing more. That
/// keeps no process from stopping.
fn shut_down(form: Form) {
    let (shared, _) = shared_socket();
    let mut server = Server::start_on(&shared, form, DEFAULT);
    let mut connection = server.connect();
    connection.get("/").assert_ok();
    SockRef::from(&shared).shutdown(Shutdown::Both).unwrap();
    connection.get("/").assert_ok();
    server.terminate();
    server.exit().assert_clean();
}

fn stop(mut server: Server) {
    server.terminate();
    server.exit().assert_clean();
}
