//! Work beside requests, and the order in which it ends.

use std::{os::unix::process::ExitStatusExt, thread, time::Duration};

use nix::sys::signal::Signal;

use crate::{
    Test,
    process::{Exit, Server},
    server::Form,
};

pub(crate) const TESTS: &[Test] = &[
    ("work::ends_in_order", Form::CUTTING, in_order),
    (
        "work::ends_in_order_after_a_cut",
        Form::CUTTING,
        in_order_after_a_cut,
    ),
    (
        "work::of_a_step_that_fails_does_not_stop_the_other_steps",
        Form::CUTTING,
        failing,
    ),
    (
        "work::of_a_request_completes_if_it_is_held",
        Form::CUTTING,
        held,
    ),
    (
        "work::that_requests_queue_during_a_stop_is_done_over_50_stops",
        Form::CUTTING,
        queued,
    ),
    (
        "work::that_is_held_for_too_long_is_cut",
        Form::CUTTING,
        held_too_long,
    ),
    (
        "work::that_blocks_the_timer_thread_is_not_waited_for",
        Form::CUTTING,
        holds_the_timers,
    ),
    (
        "work::that_blocks_is_not_waited_for",
        Form::CUTTING,
        blocking,
    ),
    (
        "work::of_cleanup_is_not_waited_for_after_a_fourth_sigint",
        Form::CUTTING,
        fourth_signal,
    ),
    (
        "work::of_a_request_is_named",
        Form::CUTTING,
        requests_are_named,
    ),
    (
        "work::may_end_with_death_by_the_signal",
        Form::CUTTING,
        by_signal,
    ),
    (
        "work::after_the_stop_can_be_interrupted",
        Form::CUTTING,
        interrupted_afterwards,
    ),
    (
        "work::of_a_blocked_runtime_is_ended_by_the_watchdog",
        Form::CUTTING,
        watchdog,
    ),
    (
        "work::that_ends_in_time_does_not_wake_the_watchdog",
        Form::CUTTING,
        watchdog_sleeps,
    ),
];

const MS: fn(u64) -> Duration = Duration::from_millis;

/// Asserts which lines the process printed before its report.
#[track_caller]
fn assert_output(exit: &Exit, lines: &[&str]) {
    let (_, output) = exit.output.split_last().unwrap();
    assert_eq!(output, lines, "{exit:?}");
}

fn in_order(form: Form) {
    let knobs = [
        "delay=1000",
        "hooks=hook:100",
        "workers=worker:100",
        "cleanup=a:100,b:0,c:50",
    ];
    let mut server = Server::start(form, &knobs);
    let slow = server.get_in_background("/sleep/1500");
    server.wait_for_in_flight(1);
    server.terminate();
    server.expect_line("hook begins");
    server.expect_line("hook is over");
    assert!(server.elapsed() < MS(1000), "{:?}", server.elapsed());
    server.expect_line("worker is notified");
    assert!(server.elapsed() >= MS(1000), "{:?}", server.elapsed());
    server.expect_line("worker begins");
    server.expect_line("worker is over");
    assert_eq!(slow.join().unwrap().text(), "slept");
    let exit = server.exit();
    let steps = [
        "a begins",
        "a is over",
        "b begins",
        "b is over",
        "c begins",
        "c is over",
    ];
    assert_output(&exit, &steps);
    exit.assert_clean();
    exit.assert_within(MS(1600), MS(2200));
    for row in ["hook  ", "worker  ", "a  ", "b  ", "c  ", "cleanup  "] {
        assert!(exit.report.contains(row), "{row}: {exit:?}");
    }
    assert!(!exit.report.contains("failed"), "{exit:?}");
}

fn in_order_after_a_cut(form: Form) {
    // The drain cannot use up the two seconds of cleanup.
    let knobs = [
        "grace=10000",
        "delay=0",
        "drain=500",
        "workers=worker:200",
        "cleanup=a:100,b:100,c:100",
    ];
    let mut server = Server::start(form, &knobs);
    let mut stuck = server.connect();
    stuck.send("GET /stuck HTTP/1.1\r\nhost: test\r\n\r\n");
    server.wait_for_in_flight(1);
    server.terminate();
    server.expect_line("worker is notified");
    server.expect_line("worker begins");
    server.expect_line("worker is over");
    server.expect_line("the handler is gone");
    assert!(server.elapsed() >= MS(500), "{:?}", server.elapsed());
    let exit = server.exit();
    let steps = [
        "a begins",
        "a is over",
        "b begins",
        "b is over",
        "c begins",
        "c is over",
    ];
    assert_output(&exit, &steps);
    assert_eq!(exit.status.code(), Some(1), "{exit:?}");
    exit.assert_within(MS(800), MS(1300));
    assert!(exit.report.contains("1 cut"), "{exit:?}");
}

fn failing(form: Form) {
    for (how, most) in [("fails", 600), ("panics", 600), ("hangs", 1100)] {
        let step = format!("cleanup=a:0,b:100:{how},c:0");
        let mut server = Server::start(form, &["delay=0", &step]);
        server.get("/").assert_ok();
        server.terminate();
        let exit = server.exit();
        let steps = [
            "a begins",
            "a is over",
            "b begins",
            "b is over",
            "c begins",
            "c is over",
        ];
        assert_output(&exit, &steps);
        assert_eq!(exit.status.code(), Some(2), "{exit:?}");
        assert!(exit.report.contains("cleanup failed"), "{exit:?}");
        exit.assert_within(MS(100), MS(most));
    }
}

fn held(form: Form) {
    let mut server = Server::start(form, &["delay=0", "cleanup=database:0"]);
    assert_eq!(server.connect().request("POST", "/job/700").text(), "begun");
    assert_eq!(server.in_flight(), 1);
    server.terminate();
    let exit = server.exit();
    assert_output(
        &exit,
        &["the job is over", "database begins", "database is over"],
    );
    exit.assert_clean();
    exit.assert_within(MS(500), MS(1200));
}

/// Clients submit one job after another while the service stops. Some handlers are slow.
fn queued(form: Form) {
    let mut accepted_in_all = 0;
    for stop in 0..50 {
        let mut server = Server::start(form, &["delay=20", "queue=1"]);
        let clients: Vec<_> = (0..4)
            .map(|client| {
                let mut connection = server.connect();
                thread::spawn(move || {
                    let mut accepted = Vec::new();
                    for job in client * 1000.. {
                        // Some handlers are running when draining starts.
                        let path = format!("/queue/{}/{job}", job % 4 * 10);
                        match connection.try_request("POST", &path) {
                            Ok(response) if response.status == 202 => accepted.push(job),
                            // The stop has refused the request or closed the connection.
                            _ => break,
                        }
                    }
                    accepted
                })
            })
            .collect();
        // Each stop comes at another moment.
        thread::sleep(MS(20 + stop % 10));
        server.terminate();
        let accepted = clients.into_iter().flat_map(|it| it.join().unwrap());
        let mut accepted: Vec<u64> = accepted.collect();
        let exit = server.exit();
        exit.assert_clean();
        // No admitted request has found the queue closed.
        let closed = exit.output.iter().any(|line| line == "closed too early");
        assert!(!closed, "{exit:?}");
        let done = exit.output.iter().filter_map(|it| it.strip_prefix("done "));
        let mut done: Vec<u64> = done.map(|job| job.parse().unwrap()).collect();
        accepted.sort_unstable();
        done.sort_unstable();
        let lost = accepted.iter().find(|it| done.binary_search(it).is_err());
        assert_eq!(lost, None, "accepted and lost, of {accepted:?}: {exit:?}");
        accepted_in_all += accepted.len();
    }
    assert!(accepted_in_all > 50, "{accepted_in_all} jobs");
}

fn held_too_long(form: Form) {
    let mut server = Server::start(form, &["delay=0", "drain=300", "cleanup=database:0"]);
    assert_eq!(
        server.connect().request("POST", "/job/60000").text(),
        "begun"
    );
    server.terminate();
    let exit = server.exit();
    assert_output(&exit, &["database begins", "database is over"]);
    assert_eq!(exit.status.code(), Some(1), "{exit:?}");
    assert!(exit.report.contains("given up: 1 hold"), "{exit:?}");
    assert!(exit.report.contains("hold job 0."), "{exit:?}");
    exit.assert_within(MS(300), MS(900));
}

/// The handler sleeps first, so that it then blocks the thread that drives the timers.
fn holds_the_timers(form: Form) {
    let cleanup = ["delay=0", "cleanup=a:100:blocks,b:0", "exit=now"];
    let mut server = Server::start(form, &cleanup);
    server.get("/").assert_ok();
    server.terminate();
    let exit = server.exit();
    assert_eq!(exit.status.code(), Some(2), "{exit:?}");
    assert!(
        exit.output.iter().any(|line| line == "b is over"),
        "{exit:?}"
    );
    exit.assert_within(MS(500), MS(1200));

    let worker = [
        "delay=0",
        "workers=a:100:blocks",
        "worker_timeout=300",
        "exit=now",
    ];
    let mut server = Server::start(form, &worker);
    server.get("/").assert_ok();
    server.terminate();
    let exit = server.exit();
    assert_eq!(exit.status.code(), Some(1), "{exit:?}");
    exit.assert_within(MS(300), MS(1000));

    // One handler on an otherwise idle server.
    let mut server = Server::start(form, &["delay=0", "drain=500", "exit=now"]);
    let mut stuck = server.connect();
    stuck.send("GET /wait-and-block HTTP/1.1\r\nhost: test\r\n\r\n");
    server.wait_for_in_flight(1);
    server.terminate();
    let exit = server.exit();
    assert_eq!(exit.status.code(), Some(1), "{exit:?}");
    exit.assert_within(MS(500), MS(1300));
}

fn blocking(form: Form) {
    let knobs = ["delay=0", "drain=500", "cleanup=database:0", "exit=now"];
    let mut server = Server::start(form, &knobs);
    let mut client = server.connect();
    client.send("GET /spawn-blocking/60000 HTTP/1.1\r\nhost: test\r\n\r\n");
    server.wait_for_in_flight(1);
    drop(client);
    server.wait_for_in_flight(0);
    server.terminate();
    let exit = server.exit();
    assert_output(&exit, &["database begins", "database is over"]);
    exit.assert_clean();
    exit.assert_within(MS(0), MS(500));
}

fn fourth_signal(form: Form) {
    let knobs = ["grace=20000", "delay=9000", "cleanup=a:0,slow:400,b:0"];
    let mut server = Server::start(form, &knobs);
    let mut stuck = server.connect();
    stuck.send("GET /stuck HTTP/1.1\r\nhost: test\r\n\r\n");
    server.wait_for_in_flight(1);
    server.terminate();
    server.wait_for_unready();
    server.signal(Signal::SIGINT);
    server.wait_for_draining();
    // A pause, so that this is not the same Ctrl-C delivered twice.
    thread::sleep(MS(150));
    server.signal(Signal::SIGINT);
    server.expect_line("the handler is gone");
    server.expect_line("a begins");
    server.expect_line("a is over");
    server.expect_line("slow begins");
    thread::sleep(MS(150));
    server.signal(Signal::SIGINT);
    let exit = server.exit();
    assert_eq!(exit.status.code(), Some(3), "{exit:?}");
    // A cut future may be dropped only after the report is printed.
    let mut output = exit.output.iter();
    let report = output.find(|line| line.starts_with("report")).unwrap();
    for words in ["abandoned", "cut", "not run"] {
        assert!(report.contains(words), "{words}: {exit:?}");
    }
    assert!(
        !exit.output.iter().any(|line| line == "b begins"),
        "{exit:?}"
    );
    let effects = [
        "ends the phase lame duck",
        "cuts the work in flight",
        "ends the wait for the cleanup",
    ];
    assert_eq!(exit.effects_of_sigint(), effects, "{exit:?}");
    let mut log = exit.log.lines();
    let stopped = log.find(|line| line.contains("shutdown: stopped"));
    assert!(
        stopped.is_some_and(|line| line.contains("WARN")),
        "{exit:?}"
    );
    exit.assert_within(MS(0), MS(2000));
}

/// The log names the requests that the drain waits for, and the report those that were cut.
fn requests_are_named(form: Form) {
    let knobs = ["delay=0", "drain=2500", "names=yes"];
    let mut server = Server::start(form, &knobs);
    let mut stuck = server.connect();
    stuck.send("GET /never?token=secret HTTP/1.1\r\nhost: test\r\n\r\n");
    server.wait_for_in_flight(1);
    thread::sleep(MS(100));
    let mut streaming = server.connect();
    streaming.send("GET /silent HTTP/1.1\r\nhost: test\r\n\r\n");
    assert_eq!(streaming.head().status, 200);
    server.get("/").assert_ok();
    server.terminate();
    let exit = server.exit();
    assert_eq!(exit.status.code(), Some(1), "{exit:?}");
    let age = |text: &str, before: &str, after: &str| {
        let rest = text.split_once(before).map(|(_, rest)| rest);
        let age = rest.and_then(|rest| rest.split_once(after)?.0.parse::<f64>().ok());
        age.unwrap_or_else(|| panic!("no {before:?}, age, {after:?}: {exit:?}"))
    };
    let never = age(&exit.report, "GET /never ", " s, no response yet");
    let silent = age(&exit.report, "GET /silent ", " s, body streaming");
    assert!(never > silent && silent >= 2.5 && never < 5.0, "{exit:?}");
    let earlier = age(&exit.log, "oldest GET /never ", " s, no response yet");
    assert!(earlier >= 2.1 && earlier < never, "{exit:?}");
    assert!(!exit.log.contains("secret") && !exit.report.contains("secret"));
}

fn by_signal(form: Form) {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut server = Server::start(form, &["delay=0", "exit=by_signal", "cleanup=a:0"]);
        server.get("/").assert_ok();
        server.signal(signal);
        let exit = server.exit();
        assert_eq!(exit.status.signal(), Some(signal as i32), "{exit:?}");
        assert_output(&exit, &["a begins", "a is over"]);
    }
    // If a request was lost, the process does not end by the signal.
    let mut server = Server::start(form, &["delay=0", "drain=100", "exit=by_signal"]);
    let mut stuck = server.connect();
    stuck.send("GET /never HTTP/1.1\r\nhost: test\r\n\r\n");
    server.wait_for_in_flight(1);
    server.terminate();
    assert_eq!(server.exit().status.code(), Some(1));
}

fn interrupted_afterwards(form: Form) {
    let mut server = Server::start(form, &["delay=0", "exit=late"]);
    server.get("/").assert_ok();
    server.terminate();
    server.expect_line("report");
    // Within one second after the stop, a signal still counts as part of the stop, and has no effect.
    server.signal(Signal::SIGTERM);
    thread::sleep(MS(1500));
    server.signal(Signal::SIGTERM);
    let exit = server.exit();
    assert_eq!(
        exit.status.signal(),
        Some(Signal::SIGTERM as i32),
        "{exit:?}"
    );
    exit.assert_within(MS(1500), MS(3000));
}

/// The runtime is blocked before the signal comes, so that no tokio task can handle it.
fn watchdog(form: Form) {
    let knobs = [
        "grace=1500",
        "delay=0",
        "drain=200",
        "watchdog=yes",
        "names=yes",
    ];
    let mut server = Server::start(form, &knobs);
    let blocked: Vec<_> = (0..5)
        .map(|_| {
            let mut connection = server.connect();
            connection.send("GET /block/60000 HTTP/1.1\r\nhost: test\r\n\r\n");
            thread::sleep(MS(50));
            connection
        })
        .collect();
    server.terminate();
    let exit = server.exit();
    assert_eq!(exit.status.code(), Some(1), "{exit:?}");
    exit.assert_within(MS(1450), MS(1900));
    // There is no log line after the drain. Without the watchdog the process would end after a minute.
    assert!(exit.after <= MS(5000), "{exit:?}");
    assert!(exit.log.contains("ended by the watchdog"), "{exit:?}");
    assert!(exit.log.contains("GET /block/60000"), "{exit:?}");
    drop(blocked);
}

fn watchdog_sleeps(form: Form) {
    let knobs = [
        "grace=1500",
        "delay=0",
        "drain=200",
        "watchdog=yes",
        "exit=late",
    ];
    let mut server = Server::start(form, &knobs);
    server.get("/").assert_ok();
    server.terminate();
    server.expect_line("report");
    thread::sleep(MS(1800));
    server.signal(Signal::SIGTERM);
    let exit = server.exit();
    assert_eq!(
        exit.status.signal(),
        Some(Signal::SIGTERM as i32),
        "{exit:?}"
    );
}
