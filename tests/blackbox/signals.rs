//! What starts a stop, what shortens it, and its exit code.

use std::{
    os::unix::process::ExitStatusExt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use nix::{
    sys::signal::{
        Signal::{SIGINT, SIGTERM},
        kill,
    },
    unistd::Pid,
};

use crate::{
    Test,
    process::{Exit, Server},
    server::Form,
};

pub(crate) const TESTS: &[Test] = &[
    (
        "signals::take_effect_and_deadlines_hold_while_handlers_block_every_worker",
        Form::CUTTING,
        blocked_workers,
    ),
    (
        "signals::take_effect_and_deadlines_hold_while_the_only_thread_is_blocked",
        Form::CUTTING,
        blocked_thread,
    ),
    (
        "signals::a_log_that_blocks_delays_no_phase",
        Form::CUTTING,
        blocked_log,
    ),
    (
        "signals::a_further_sigterm_changes_nothing_in_any_phase",
        Form::CUTTING,
        further_sigterm,
    ),
    (
        "signals::one_that_changes_nothing_is_logged_at_once",
        Form::CUTTING,
        logged_at_once,
    ),
    (
        "signals::a_sigint_after_sigterm_skips_the_delay",
        Form::ALL,
        second_skips,
    ),
    (
        "signals::a_second_sigint_after_sigterm_cuts",
        Form::CUTTING,
        second_sigint_cuts,
    ),
    (
        "signals::a_third_sigint_after_sigterm_does_not_wait_for_cut_requests",
        Form::CUTTING,
        third_sigint_abandons,
    ),
    (
        "signals::after_the_stop_end_a_process_that_waits_for_blocking_work",
        Form::ALL,
        afterwards,
    ),
    (
        "signals::two_at_once_stop_an_idle_service_cleanly",
        Form::CUTTING,
        two_at_once,
    ),
    (
        "signals::a_ctrl_c_that_arrives_twice_counts_once",
        Form::ALL,
        doubled,
    ),
    (
        "signals::two_ctrl_c_with_a_pause_count_twice",
        Form::CUTTING,
        apart,
    ),
    (
        "signals::sigint_skips_the_delay_and_still_drains",
        Form::ALL,
        sigint,
    ),
    (
        "signals::during_start_up_lead_to_an_orderly_exit",
        Form::ALL,
        during_start_up,
    ),
    (
        "signals::late_in_start_up_keep_the_service_from_serving",
        Form::ALL,
        late_in_start_up,
    ),
    (
        "signals::a_server_with_its_own_shutdown_has_its_delay",
        &[Form::Listening],
        other_means,
    ),
    (
        "signals::during_start_up_lead_to_an_orderly_exit_with_a_worker_too",
        Form::ALL,
        worker,
    ),
    (
        "signals::repeated_shutdown_calls_cause_one_drain",
        Form::ALL,
        shutdown_calls,
    ),
    (
        "signals::shutdown_before_serving_leads_to_an_orderly_exit",
        Form::ALL,
        shutdown_first,
    ),
    (
        "signals::an_impossible_plan_is_refused_with_its_numbers",
        Form::ALL,
        impossible_plan,
    ),
    (
        "signals::without_time_to_drain_in_flight_requests_are_cut",
        Form::CUTTING,
        no_time,
    ),
    (
        "signals::without_time_to_drain_an_idle_service_ends_clean",
        Form::ALL,
        no_time_needed,
    ),
    (
        "signals::with_unlimited_time_the_drain_ends_with_the_last_request",
        Form::ALL,
        all_the_time,
    ),
];

const MS: fn(u64) -> Duration = Duration::from_millis;

/// A handler in `thread::sleep` blocks a runtime worker. If that worker drives the timers and the IO, the
/// others wait too.
fn blocked_workers(form: Form) {
    for (threads, blocked) in [(1, 1), (2, 1), (4, 1), (2, 3), (4, 5)] {
        on_time(form, threads, blocked);
    }
}

/// With one thread the server ends only when the handler returns. All phases are still on time.
fn blocked_thread(form: Form) {
    on_time(form, 0, 1);
}

/// The delay, the drain and the wait for cut requests end on time, with handlers that block for 5 s.
fn on_time(form: Form, threads: usize, blocked: usize) {
    let what = format!("{blocked} of {threads} blocked");
    let threads = format!("threads={threads}");
    let knobs = [
        "delay=800",
        "drain=800",
        "observed=yes",
        "exit=now",
        &*threads,
    ];
    let mut server = Server::start(form, &knobs);
    let _blocked: Vec<_> = (0..blocked)
        .map(|_| {
            let mut connection = server.connect();
            connection.send("GET /block/5000 HTTP/1.1\r\nhost: test\r\n\r\n");
            thread::sleep(MS(50));
            connection
        })
        .collect();
    server.terminate();
    server.expect_phase("lame duck");
    // If the signal needed a handler's thread, it would take more than 4 s.
    assert!(
        server.elapsed() < MS(3000),
        "{what}: {:?}",
        server.elapsed()
    );
    let [draining, closing] = ["draining", "closing"].map(|phase| server.expect_phase(phase));
    let exit = server.exit();
    // Tolerance for a busy machine. If the phases needed a handler's thread, it would be more than 3 s.
    let late = MS(1000);
    // The observer may also see the start of the stop late, so only the log has a lower bound.
    for (at, due) in [(draining, MS(800)), (closing, MS(1600))] {
        assert!(
            at <= due + late,
            "{what}: {at:?} instead of {due:?}, {exit:?}"
        );
    }
    for (text, due) in [
        ("lame duck, because SIGTERM", MS(0)),
        ("draining, because", MS(800)),
        ("closing, because the drain deadline", MS(1600)),
        ("stopped, because", MS(1850)),
    ] {
        let at = exit.logged_after(text);
        let on_time = at >= due && at <= due + late;
        assert!(on_time, "{what}: {at:?} instead of {due:?}, {exit:?}");
    }
    assert_eq!(exit.status.code(), Some(1), "{what}: {exit:?}");
    if threads != "threads=0" {
        exit.assert_within(MS(1600), MS(1850) + 2 * late);
        // The process does not wait for the handlers.
        assert!(exit.after < MS(4500), "{what}: {exit:?}");
    }
}

fn blocked_log(form: Form) {
    let mut server = Server::start(form, &["delay=1500", "observed=yes", "log=blocks"]);
    let slow = server.get_in_background("/sleep/1900");
    server.terminate();
    // Closing is over in a moment, so a busy machine may not see it.
    for phase in ["lame duck", "draining"] {
        server.expect_line(&format!("phase {phase}, ready false"));
    }
    slow.join().unwrap().assert_ok();
    let answered = server.elapsed();
    let exit = server.exit();
    exit.assert_clean();
    exit.assert_within(MS(1500), answered + MS(400));
}

fn further_sigterm(form: Form) {
    let knobs = ["delay=400", "observed=yes", "cleanup=a:300,b:300"];
    let mut server = Server::start(form, &knobs);
    let slow = server.get_in_background("/sleep/800");
    let (pid, signalling) = (server.pid(), Arc::new(AtomicBool::new(true)));
    server.terminate();
    let more = {
        let signalling = Arc::clone(&signalling);
        thread::spawn(move || {
            let pid = Pid::from_raw(pid.try_into().unwrap());
            while signalling.load(Relaxed) && kill(pid, SIGTERM).is_ok() {
                thread::sleep(MS(2));
            }
        })
    };
    server.wait_for_unready();
    server.get("/").assert_ok();
    slow.join().unwrap().assert_ok();
    let [answered, exit] = [server.elapsed(), MS(600)];
    server.expect_line("phase lame duck");
    server.expect_line("phase draining");
    server.expect_line("phase closing");
    for line in ["a begins", "a is over", "b begins", "b is over"] {
        server.expect_line(line);
    }
    let least = answered.min(MS(800)) + exit.saturating_sub(MS(100));
    let exit = server.exit();
    signalling.store(false, Relaxed);
    more.join().unwrap();
    exit.assert_clean();
    exit.assert_within(least, answered + MS(900));
    let changes_nothing = "shutdown: a further SIGTERM changes nothing";
    assert!(exit.log.contains(changes_nothing), "{exit:?}");
    assert!(exit.logged_after("draining, because the delay is over") >= MS(390));
}

/// The line is written when the signal arrives, although the runtime is blocked, and not when the delay ends.
fn logged_at_once(form: Form) {
    let knobs = ["delay=10000", "observed=yes", "threads=1"];
    let mut server = Server::start(form, &knobs);
    let mut client = server.connect();
    client.send("GET /block/3000 HTTP/1.1\r\nhost: test\r\n\r\n");
    thread::sleep(MS(300));
    server.terminate();
    server.expect_phase("lame duck");
    // The thread that has logged the first signal has ended.
    thread::sleep(MS(500));
    server.terminate();
    thread::sleep(MS(1000));
    server.signal(SIGINT);
    let exit = server.exit();
    exit.assert_clean();
    let further = exit.written_after("a further SIGTERM changes nothing");
    let draining = exit.written_after("draining, because");
    assert!(
        further + MS(300) < draining,
        "{further:?}, {draining:?}, {exit:?}"
    );
}

fn afterwards(form: Form) {
    for signal in [SIGTERM, SIGINT] {
        let mut server = Server::start(form, &["delay=0", "drain=200"]);
        let mut client = server.connect();
        client.send("GET /spawn-blocking/60000 HTTP/1.1\r\nhost: test\r\n\r\n");
        server.wait_for_in_flight(1);
        drop(client);
        server.terminate();
        server.expect_line(if form == Form::Smallest {
            "stopped"
        } else {
            "report"
        });
        // `main` waits for the runtime, which waits for its blocking work.
        thread::sleep(MS(1200));
        server.signal(signal);
        let exit = server.exit();
        assert_eq!(exit.status.signal(), Some(signal as i32), "{exit:?}");
        exit.assert_within(MS(1200), MS(5000));
    }
}

fn second_skips(form: Form) {
    let mut server = Server::start(form, &["delay=10000"]);
    let slow = server.get_in_background("/sleep/1200");
    server.terminate();
    server.wait_for_unready();
    server.get("/").assert_ok();
    server.until(MS(300));
    server.signal(SIGINT);
    let sent = server.elapsed();
    server.wait_for_draining();
    assert_eq!(server.get("/").status, 503);
    slow.join().unwrap().assert_ok();
    let answered = server.elapsed();
    let exit = server.exit();
    exit.assert_clean();
    let draining = exit.logged_after("draining, because a further signal");
    assert!(draining < sent + MS(200), "{sent:?}, {exit:?}");
    exit.assert_within(MS(1000), answered + MS(300));
    let effects = ["ends the phase lame duck"];
    assert_eq!(exit.effects_of_sigint(), effects, "{exit:?}");
}

fn second_sigint_cuts(form: Form) {
    let mut server = Server::start(form, &["delay=5000", "drain=10000"]);
    let slow = server.get_in_background("/sleep/60000");
    server.terminate();
    server.until(MS(200));
    server.signal(SIGINT);
    server.wait_for_draining();
    server.until(MS(500));
    server.signal(SIGINT);
    let exit = server.exit();
    assert_eq!(exit.status.code(), Some(1), "{exit:?}");
    exit.assert_within(MS(500), MS(1000));
    assert!(exit.report.contains("forced"), "{exit:?}");
    assert!(exit.log.contains("a further signal"), "{exit:?}");
    let effects = ["ends the phase lame duck", "cuts the work in flight"];
    assert_eq!(exit.effects_of_sigint(), effects, "{exit:?}");
    assert!(slow.join().is_err());
}

fn third_sigint_abandons(form: Form) {
    // More than once on a machine that stalls.
    let mut attempts = (0..3).map(|_| abandons_at_third_sigint(form));
    assert!(attempts.any(|abandoned| abandoned));
}

/// Whether the third SIGINT has abandoned the cleanup. It comes too late if this process does not run for 140 ms.
fn abandons_at_third_sigint(form: Form) -> bool {
    let mut server = Server::start(form, &["delay=5000", "drain=10000", "observed=yes"]);
    // A handler that blocks its thread cannot be aborted, even if its connection is cut.
    let mut stays = server.connect();
    stays.send("GET /block/5000 HTTP/1.1\r\nhost: test\r\n\r\n");
    // Sleeps, because a request for the count could wait for the blocked thread.
    thread::sleep(MS(100));
    server.terminate();
    // The last signal arrives within the 250 ms in which the server waits for cut requests. A signal less than
    // 100 ms after the one before would count as the same one.
    for phase in ["lame duck", "draining", "closing"] {
        server.expect_phase(phase);
        thread::sleep(MS(110));
        server.signal(SIGINT);
    }
    let exit = server.exit();
    if exit.status.code() == Some(1) {
        return false;
    }
    assert_eq!(exit.status.code(), Some(3), "{exit:?}");
    // The observer may print its last line after the report.
    let mut output = exit.output.iter();
    assert!(output.any(|line| line.contains("abandoned")), "{exit:?}");
    let effects = [
        "ends the phase lame duck",
        "cuts the work in flight",
        "ends the wait for connections to close",
    ];
    assert_eq!(exit.effects_of_sigint(), effects, "{exit:?}");
    true
}

/// A supervisor and a terminal may send their signals at the same time.
fn two_at_once(form: Form) {
    for (first, then, after) in [
        (SIGTERM, SIGTERM, 8),
        (SIGINT, SIGTERM, 3),
        (SIGTERM, SIGINT, 30),
    ] {
        let mut server = Server::start(form, &["delay=0"]);
        server.get("/").assert_ok();
        server.signal(first);
        server.until(MS(after));
        server.signal(then);
        let exit = server.exit();
        exit.assert_clean();
        exit.assert_within(MS(0), MS(300));
    }
}

/// A shell may deliver a Ctrl-C twice: to the process and to its group.
fn doubled(form: Form) {
    let mut server = Server::start(form, &[]);
    let slow = server.get_in_background("/sleep/700");
    server.signal(SIGINT);
    server.wait_for_unready();
    server.signal(SIGINT);
    slow.join().unwrap().assert_ok();
    let exit = server.exit();
    exit.assert_clean();
    assert!(!exit.log.contains("a further signal"), "{exit:?}");
    let effects = ["is a duplicate of the last one, and changes nothing"];
    assert_eq!(exit.effects_of_sigint(), effects, "{exit:?}");
}

fn apart(form: Form) {
    let mut server = Server::start(form, &[]);
    let slow = server.get_in_background("/sleep/60000");
    server.signal(SIGINT);
    server.until(MS(200));
    server.signal(SIGINT);
    let exit = server.exit();
    assert_eq!(exit.status.code(), Some(1), "{exit:?}");
    exit.assert_within(MS(200), MS(700));
    assert!(slow.join().is_err());
}

fn sigint(form: Form) {
    let mut server = Server::start(form, &["delay=10000"]);
    let slow = server.get_in_background("/sleep/800");
    server.signal(SIGINT);
    server.wait_for_draining();
    assert_eq!(server.get("/").status, 503);
    slow.join().unwrap().assert_ok();
    let answered = server.elapsed();
    let exit = server.exit();
    exit.assert_clean();
    exit.assert_within(MS(500), answered + MS(200));
    if form != Form::Smallest {
        assert!(exit.report.contains("SIGINT"), "{exit:?}");
    }
}

fn during_start_up(form: Form) {
    for signal in [SIGTERM, SIGINT] {
        let mut server = Server::spawn(form, &["startup=2000"]);
        server.signal(signal);
        assert_never_served(server);
    }
}

fn late_in_start_up(form: Form) {
    // The signal comes late, and a second before the end, because a busy machine may delay it.
    let mut server = Server::spawn(form, &["startup=3000", "delay=3000"]);
    thread::sleep(MS(2000));
    server.terminate();
    assert_never_served(server);
}

fn worker(form: Form) {
    let mut server = Server::spawn(form, &["startup=1000", "worker=yes"]);
    server.terminate();
    assert_never_served(server);
}

fn other_means(form: Form) {
    let mut server = Server::start(form, &["delay=2000"]);
    server.get("/").assert_ok();
    server.terminate();
    server.wait_for_unready();
    while server.elapsed() < MS(900) {
        let response = server.get("/");
        response.assert_ok();
        assert!(response.says_close());
    }
    let exit = server.exit();
    exit.assert_clean();
    exit.assert_within(MS(2000), MS(2300));
}

fn assert_never_served(mut server: Server) {
    // The listener is bound, so the kernel accepts this connection. The request must not be served.
    let mut early = server.connect();
    early.send("GET / HTTP/1.1\r\nhost: test\r\n\r\n");
    server.expect_line("listening");
    let ready = server.elapsed();
    if let Ok(response) = early.try_response("GET") {
        assert_eq!(response.status, 503, "{response:?}");
    }
    let exit = server.exit();
    exit.assert_clean();
    exit.assert_within(MS(0), ready + MS(200));
}

fn shutdown_calls(form: Form) {
    let mut server = Server::start(form, &[]);
    let slow = server.get_in_background("/sleep/1500");
    server.mark_triggered();
    server.connect().request("POST", "/shutdown/50").assert_ok();
    assert_eq!(server.get("/readyz").text(), "lame duck\n");
    slow.join().unwrap().assert_ok();
    let exit = server.exit();
    exit.assert_clean();
    exit.assert_within(MS(1400), MS(1800));
    assert_eq!(
        exit.log.matches("lame duck, because shutdown()").count(),
        1,
        "{exit:?}"
    );
}

fn shutdown_first(form: Form) {
    let mut server = Server::spawn(form, &["shutdown=first", "startup=200"]);
    server.mark_triggered();
    server.expect_line("listening");
    let exit = server.exit();
    exit.assert_clean();
    exit.assert_within(MS(0), MS(1400));
}

fn impossible_plan(form: Form) {
    let exit = start_and_exit(form, &["delay=10000", "drain=25000"]);
    assert_eq!(exit.status.code(), Some(64));
    assert!(
        exit.log.contains("drain_delay 10s + drain_timeout 25s")
            && exit.log.contains("= 35s")
            && exit.log.contains("grace_period 30s"),
        "{exit:?}"
    );
}

fn start_and_exit(form: Form, knobs: &[&str]) -> Exit {
    Server::launch(form, knobs).exit()
}

fn no_time(form: Form) {
    let mut server = Server::start(form, &["delay=0", "drain=0"]);
    let slow = server.get_in_background("/sleep/60000");
    server.terminate();
    let exit = server.exit();
    assert_eq!(exit.status.code(), Some(1), "{exit:?}");
    exit.assert_within(MS(0), MS(500));
    assert!(slow.join().is_err());
}

fn no_time_needed(form: Form) {
    let mut server = Server::start(form, &["delay=0", "drain=0"]);
    let mut idle = server.connect();
    idle.get("/").assert_ok();
    server.terminate();
    let exit = server.exit();
    exit.assert_clean();
    exit.assert_within(MS(0), MS(300));
    idle.assert_closed();
}

fn all_the_time(form: Form) {
    let mut server = Server::start(form, &["delay=0", "drain=max", "grace=max"]);
    let slow = server.get_in_background("/sleep/500");
    server.terminate();
    slow.join().unwrap().assert_ok();
    let answered = server.elapsed();
    let exit = server.exit();
    exit.assert_clean();
    exit.assert_within(MS(300), answered + MS(200));
}
