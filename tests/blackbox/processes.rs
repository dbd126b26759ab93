//! Processes that are special to the operating system: a fork of a process, and the process with the id 1.

use std::{
    fs,
    io::{Read, Write},
    net::TcpListener,
    os::unix::fs::MetadataExt,
    process::Command,
    thread,
    time::Duration,
};

use nix::{
    sys::signal::{
        Signal::{self, SIGINT, SIGKILL, SIGTERM},
        kill,
    },
    unistd::Pid,
};

use crate::{Test, process::Server, server::Form, whole::narrow};

pub(crate) const TESTS: &[Test] = &[(
    "processes::a_fork_hears_its_own_signals_and_the_parent_hears_none_of_them",
    &[Form::Serve, Form::Run],
    fork,
)];

/// These need `unshare` of util-linux, and a system that allows its users to make namespaces.
pub(crate) const IN_NAMESPACES: &[Test] = &[
    (
        "namespaces::process_1_ends_with_the_status_of_its_signal",
        &[Form::Serve],
        exits_as_process_1,
    ),
    (
        "namespaces::process_1_is_ended_by_a_signal_after_the_stop",
        &[Form::Serve],
        signalled_as_process_1,
    ),
    (
        "namespaces::a_response_on_a_socket_from_another_network_is_not_thrown_away",
        Form::CUTTING,
        other_network,
    ),
];

const MS: fn(u64) -> Duration = Duration::from_millis;

/// The child of a server process. It is killed when the test drops it.
struct Child(Pid);

impl Child {
    fn signal(&self, signal: Signal) {
        kill(self.0, signal).unwrap();
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = kill(self.0, SIGKILL);
    }
}

/// The child serves with the lifecycle that its parent has made, or with one of its own, whose first need of
/// the control thread is the watchdog or the signals. If it waited on its parent's socket, the parent would
/// sometimes take the bytes that wake it: hence several rounds.
fn fork(form: Form) {
    for round in 0..3 {
        for (forked, more) in [
            ("forked=inherits", "names=yes"),
            ("forked=builds", "names=yes"),
            ("forked=builds", "watchdog=yes"),
        ] {
            let mut server = Server::launch(form, &[forked, "delay=5000", more]);
            let child = server.expect_line("child").parse().unwrap();
            let child = Child(Pid::from_raw(child));
            server.address = server.expect_line("starting").parse().unwrap();
            server.expect_line("listening");
            server.get("/").assert_ok();
            server.mark_triggered();
            child.signal(SIGTERM);
            server.wait_for_unready();
            child.signal(SIGINT);
            let report = server.expect_line("report");
            assert!(report.contains("clean"), "{round}, {forked}: {report}");
            // The parent goes on until it gets a signal itself. Its line would have come before.
            server.terminate();
            server.expect_line("the parent has stopped");
            server.exit().assert_clean();
        }
    }
}

/// systemd passes such a socket to a service with `PrivateNetwork=yes`. The kernel does not find its connections
/// when the service asks how much has been delivered.
fn other_network(form: Form) {
    // Only root may make a network namespace without one of users.
    const UNSHARED: &str = r#"
        export LISTEN_FDS=1 LISTEN_PID=$$
        [ "$(id -u)" = 0 ] || user=--map-root-user
        exec unshare --net $user "$0" "$@" 3<&0
    "#;

    let shared = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut server = Server::start_by(UNSHARED, &shared, form, &["delay=0"]);
    let mut client = narrow(server.address);
    let request = b"GET /buffered HTTP/1.1\r\nhost: test\r\n\r\n";
    client.write_all(request).unwrap();
    client.peek(&mut [0]).unwrap();
    server.wait_for_in_flight(0);
    server.terminate();
    // By now the server would have closed the connection, if it took the response for delivered.
    thread::sleep(MS(200));
    let _ = client.write_all(b"\r\n");
    let mut response = Vec::new();
    let read = client.read_to_end(&mut response);
    let exit = server.exit();
    let is_whole = response.len() > 150_000;
    assert!(
        is_whole || !exit.status.success(),
        "{read:?}, {}, {exit:?}",
        response.len()
    );
}

/// Starts a server as process 1 of a new namespace.
fn start_as_process_1(knobs: &[&str]) -> (Server, Child) {
    let mut command = Command::new("unshare");
    if fs::metadata("/proc/self").unwrap().uid() != 0 {
        // Only root may make the other namespace without this one.
        command.args(["--user", "--map-root-user"]);
    }
    command.args(["--pid", "--fork", "--kill-child"]);
    command.arg(std::env::current_exe().unwrap());
    let mut server = Server::run(command, Form::Serve, knobs);
    server.expect_line("starting");
    server.address = server.expect_line("listening").parse().unwrap();
    // `unshare` waits for its only child. Outside of the namespace this has another id.
    let unshare = server.pid();
    let children = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children")).unwrap();
    let child = Child(Pid::from_raw(children.trim().parse().unwrap()));
    (server, child)
}

fn exits_as_process_1(_: Form) {
    for (signal, status) in [(SIGTERM, 143), (SIGINT, 130)] {
        let (mut server, child) = start_as_process_1(&["delay=0", "exit=by_signal"]);
        server.get("/").assert_ok();
        server.mark_triggered();
        child.signal(signal);
        let exit = server.exit();
        assert!(exit.report.contains("clean"), "{exit:?}");
        assert_eq!(exit.status.code(), Some(status), "{exit:?}");
    }
}

fn signalled_as_process_1(_: Form) {
    for (signal, status) in [(SIGTERM, 143), (SIGINT, 130)] {
        let (mut server, child) = start_as_process_1(&["delay=0", "exit=late"]);
        server.get("/").assert_ok();
        server.mark_triggered();
        child.signal(signal);
        server.expect_line("report");
        // A second after the stop the signals are given back to the operating system.
        thread::sleep(MS(1500));
        child.signal(signal);
        let exit = server.exit();
        assert_eq!(exit.status.code(), Some(status), "{exit:?}");
        assert!(exit.after < MS(30_000), "{exit:?}");
    }
}
