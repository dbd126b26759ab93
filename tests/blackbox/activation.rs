//! A listening socket that outlives the process: the next process has the same accept queue.

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
        "activation::a_leftover_filter_does_not_drop_connections",
        Form::CUTTING,
        leftover_filter,
    ),
    (
        "activation::ten_overlapping_restarts_lose_no_request",
        Form::CUTTING,
        beside,
    ),
    (
        "activation::ten_consecutive_restarts_lose_no_request",
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
        "activation::connections_during_the_stop_wait_for_the_next_process",
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
        "activation::a_socket_that_was_shut_down_does_not_prevent_the_stop",
        Form::CUTTING,
        shut_down,
    ),
];

/// Scripts that pass the socket by socket activation, or without telling the process.
const ACTIVATED: &str = r#"export LISTEN_FDS=1 LISTEN_PID=$$; exec "$0" "$@" 3<&0"#;
const PLAIN: &str = r#"exec "$0" "$@""#;

/// Sets no delay, so that the default of a shared listener applies.
const DEFAULT: &[&str] = &["delay=default"];

fn shared_socket() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Attaches the socket filter that a process leaves behind if it is killed while it closes its listener.
#[cfg(target_os = "linux")]
fn leftover_filter(form: Form) {
    use socket2::SockFilter;

    const RETURN: u16 = 0x06;
    let (shared, address) = shared_socket();
    let drop_all = [SockFilter::new(RETURN, 0, 0, 0)];
    SockRef::from(&shared).attach_filter(&drop_all).unwrap();
    let mut server = Server::start_on(&shared, form, &["delay=0"]);
    // The server may not have polled its listener yet. Each attempt is shorter than the one second after
    // which the kernel repeats a handshake.
    wait_for("a connection", || {
        TcpStream::connect_timeout(&address, Duration::from_millis(100)).is_ok()
    });
    server.get("/").assert_ok();
    server.terminate();
    server.exit().assert_clean();
}

/// Restarts the process ten times while clients send requests. Returns the results of the clients.
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
    // The kernel repeats a dropped handshake within this time.
    thread::sleep(Duration::from_millis(1100));
    let seen = load.end();
    server.terminate();
    server.exit().assert_clean();
    seen
}

#[derive(Clone, Copy, PartialEq)]
enum How {
    /// The next process is started before the old one receives SIGTERM.
    Beside,
    /// The next process is started when the old one has ended.
    InTurn,
    /// The same, but the old process is killed this long after its SIGTERM.
    Killed(Duration),
}

/// Asserts that no request failed, that no connect failed, and that none waited for a repeated handshake.
fn assert_unnoticed(seen: &Seen, what: &str) {
    assert_eq!(seen.failed, [""; 0], "{what}: {seen:?}");
    assert_connected(seen, what);
    assert!(seen.requests > 500, "{what}: {seen:?}");
    assert!(seen.moved > 50 && seen.again > 100, "{what}: {seen:?}");
}

fn assert_connected(seen: &Seen, what: &str) {
    assert_eq!(seen.refused, [""; 0], "{what}: {seen:?}");
    assert!(seen.slowest_connect < RETRIED, "{what}: {seen:?}");
}

fn beside(form: Form) {
    let seen = restart(form, DEFAULT, How::Beside, Duration::from_millis(100), 8);
    assert_unnoticed(&seen, "beside");
}

fn in_turn(form: Form) {
    let seen = restart(form, DEFAULT, How::InTurn, Duration::from_millis(100), 8);
    assert_unnoticed(&seen, "in turn");
    // New connections wait until the old process has ended, so its delay must be short.
    assert!(seen.slowest < Duration::from_secs(4), "{seen:?}");
}

/// Idle connections are closed. A request that crosses the close is lost, which HTTP/1 cannot prevent. A
/// client sends such a request if it was not scheduled between its check and its write. No connection is
/// refused.
fn idle(form: Form) {
    for how in [How::Beside, How::InTurn] {
        let mut seen = restart(form, &["delay=0"], how, Duration::from_millis(200), 40);
        assert!(seen.failed.len() * 50 < seen.requests, "{seen:?}");
        seen.failed.retain(|error| error.starts_with("status"));
        assert_unnoticed(&seen, "idle");
    }
}

/// Requests that the killed process had accepted are lost. New connections are not.
fn killed(form: Form) {
    for after in [0, 1, 3, 6, 30] {
        let how = How::Killed(Duration::from_millis(after));
        let seen = restart(form, DEFAULT, how, Duration::from_millis(100), 2);
        assert_connected(&seen, &format!("{after} ms"));
        assert!(seen.requests > 500, "{after} ms: {seen:?}");
        // Each of ten restarts can lose the request of each of six clients.
        assert!(seen.failed.len() <= 60, "{after} ms: {seen:?}");
    }
}

/// Connections after the signal wait in the queue for the next process, although the first process still
/// serves its own connections.
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
        // The first process may not have received the signal yet.
        wait_for("a connection that is not accepted", || {
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

/// A request that arrives on an idle connection directly after the signal.
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
    // The first responses may be sent before the signal arrives.
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

/// If `LISTEN_FDS` does not name this socket, or the setting is off, the listener belongs to this process
/// alone: it accepts during the delay.
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
        // Waits until it serves. Before that, the stop has no delay.
        server.get("/").assert_ok();
        server.terminate();
        server.wait_for_unready();
        server.get("/").assert_ok();
        server.exit().assert_clean();
    }
}

/// A socket that this or another process has shut down accepts no more connections. The process still
/// stops.
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
