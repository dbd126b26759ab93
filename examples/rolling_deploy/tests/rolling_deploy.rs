//! Runs the example `rolling_deploy`, and checks its output and its exit code.

#![cfg(unix)]

use std::{
    env,
    io::Read,
    path::PathBuf,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// The timeout of a run, much longer than a run takes on a busy machine.
const BOUND: Duration = Duration::from_secs(150);

/// The path of the example, in the folder above the test program. Cargo builds it together with the tests,
/// unless only some targets are selected.
fn example() -> PathBuf {
    let tests = env::current_exe().unwrap();
    let profile = tests.ancestors().nth(2).unwrap();
    let example = profile.join("examples/rolling_deploy");
    if !example.exists() {
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--example", "rolling_deploy"]);
        if profile.ends_with("release") {
            build.arg("--release");
        }
        assert!(build.status().unwrap().success());
    }
    example
}

/// Runs the example with these arguments, in which `{self}` is replaced by its path. Returns the exit code
/// and the output.
fn run(args: &[&str]) -> (Option<i32>, String) {
    let example = example();
    let args = args
        .iter()
        .map(|arg| arg.replace("{self}", example.to_str().unwrap()));
    let mut child = Command::new(&example)
        .args(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut stderr = child.stderr.take().unwrap();
    let errors = thread::spawn(move || {
        let mut text = String::new();
        stderr.read_to_string(&mut text).unwrap();
        text
    });
    let pid = Pid::from_raw(child.id().try_into().unwrap());
    let watch = thread::spawn(move || {
        let begun = Instant::now();
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return (status, false);
            }
            if begun.elapsed() > BOUND {
                // SIGTERM, so that the example also ends its instances.
                kill(pid, Signal::SIGTERM).unwrap();
                return (child.wait().unwrap(), true);
            }
            thread::sleep(Duration::from_millis(20));
        }
    });
    let mut text = String::new();
    stdout.read_to_string(&mut text).unwrap();
    let (status, late) = watch.join().unwrap();
    text += &errors.join().unwrap();
    assert!(!late, "it has not ended by itself:\n{text}");
    (status.code(), text)
}

/// The number in the column `failed` of a row of the comparison.
fn failed(text: &str, row: &str) -> u64 {
    let line = text
        .lines()
        .find(|line| line.starts_with(row) && !line.contains(':'));
    let line = line.unwrap_or_else(|| panic!("no row {row}:\n{text}"));
    let mut columns = line[row.len()..].split_whitespace();
    assert!(
        columns.next().unwrap().parse::<u64>().unwrap() > 100,
        "hardly a load:\n{text}"
    );
    columns.next().unwrap().parse().unwrap()
}

#[test]
fn the_comparison_loses_requests_on_plain_axum_and_none_with_this_crate() {
    let (code, text) = run(&[]);
    assert_eq!(failed(&text, "tower-graceful"), 0, "{text}");
    // Plain axum closes its port at SIGTERM, and the balancer notices after two probes at the earliest.
    assert!(failed(&text, "plain axum") > 0, "{text}");
    assert!(text.contains("shutdown by SIGTERM: clean"), "{text}");
    assert!(text.contains("lame duck"), "{text}");
    assert_eq!(code, Some(0), "{text}");
}

#[test]
fn the_checker_finds_nothing_lost_with_this_crate() {
    let (code, text) = run(&[
        "--interval",
        "0.25",
        "--rounds",
        "1",
        "{self}",
        "--backend",
        "graceful",
        "{port}",
    ]);
    assert!(text.contains("requests, 0 lost"), "{text}");
    assert!(text.contains("stop 2: exit code 0"), "{text}");
    assert!(text.contains("Nothing was lost."), "{text}");
    assert_eq!(code, Some(0), "{text}");
}

#[test]
fn the_warnings_of_the_service_are_printed() {
    let service = ["{self}", "--backend", "graceful", "{port}", "--layer", "no"];
    let options = ["--interval", "0.25", "--rounds", "1"];
    let (code, text) = run(&[&options[..], &service].concat());
    let warning = "    warning: no request has reached the layer, although GET ";
    assert!(text.contains(warning), "{text}");
    // The end of the warning, which the report continues on lines of their own.
    assert!(
        text.contains("serves or tracks the connections\n"),
        "{text}"
    );
    assert!(
        text.contains("\nNothing was lost, but the service warns: see above.\n"),
        "{text}"
    );
    assert_eq!(code, Some(0), "{text}");
}

#[test]
fn a_slow_path_that_is_answered_at_once_is_named() {
    let service = ["{self}", "--backend", "graceful", "{port}"];
    let options = ["--interval", "0.25", "--rounds", "1", "--slow", "/"];
    let (code, text) = run(&[&options[..], &service].concat());
    let note = "GET / is answered within 0.1 s, so no slow request was in flight at a SIGTERM";
    assert!(text.contains(note), "{text}");
    assert_eq!(code, Some(0), "{text}");
}

#[test]
fn the_checker_says_what_plain_axum_loses_and_what_to_set() {
    let (code, text) = run(&["--rounds", "1", "{self}", "--backend", "plain", "{port}"]);
    assert!(text.contains(": refused"), "{text}");
    assert!(
        text.contains("set drain_delay above interval × fall = 0.5 s × 2 = 1.0 s"),
        "{text}"
    );
    assert!(!text.contains("Nothing was lost."), "{text}");
    assert_eq!(code, Some(1), "{text}");
}

#[test]
fn a_drain_delay_shorter_than_the_balancer_needs_is_found() {
    let graceful = [
        "{self}",
        "--backend",
        "graceful",
        "{port}",
        "--delay",
        "0.01",
    ];
    let (code, text) = run(&[&["--rounds", "1"], &graceful[..]].concat());
    assert!(text.contains("set drain_delay above"), "{text}");
    assert_eq!(code, Some(1), "{text}");
}

#[test]
fn a_service_that_ignores_sigterm_is_killed_at_the_grace_period_and_named() {
    let (code, text) = run(&[
        "--grace",
        "1",
        "--rounds",
        "1",
        "{self}",
        "--backend",
        "deaf",
        "{port}",
    ]);
    assert!(
        text.contains("had not ended 1.0 s after SIGTERM (--grace), and was killed"),
        "{text}"
    );
    assert!(text.contains("2 of 2 stops ended by SIGKILL"), "{text}");
    assert_eq!(code, Some(1), "{text}");
}

#[test]
fn a_command_that_cannot_be_measured_is_a_clear_error() {
    let not_ready = ["--start-timeout", "0.5"];
    let graceful = ["{self}", "--backend", "graceful", "{port}"];
    // Nothing listens on port 1.
    let behind = ["--behind", "127.0.0.1:1", "--ports", "19001,19002,19003"];
    let cases: [(&[&str], &str); 10] = [
        (&["/nonexistent/program"], "does not start: No such file"),
        (
            &["false"],
            "`false` ended before it was ready: exit status: 1",
        ),
        (
            &[&not_ready[..], &["sleep", "60"]].concat(),
            "nothing listens on 127.0.0.1:",
        ),
        (
            &[
                &not_ready[..],
                &["--ready", "/no", "{self}", "--backend", "plain", "{port}"],
            ]
            .concat(),
            "is answered with 404 Not Found. Is --ready the path",
        ),
        (
            &[&["--get", "/no"], &graceful[..]].concat(),
            "GET /no is answered with 404 Not Found, so the load would not reach the service",
        ),
        (
            &[&behind[..], &graceful[..]].concat(),
            "nothing listens on 127.0.0.1:1 (--behind)",
        ),
        (
            &["--fall", "0", "false"],
            "--fall 0: a number from 1 to 100 is wanted",
        ),
        (&["--interval"], "--interval wants a value"),
        (&["--wrong", "1"], "unknown option --wrong"),
        (&["--life"], "--life wants --kubernetes"),
    ];
    for (args, expected) in cases {
        let (code, text) = run(args);
        assert!(text.contains(expected), "{args:?}:\n{text}");
        assert_eq!(code, Some(2), "{args:?}:\n{text}");
    }
}

#[test]
fn on_kubernetes_the_delay_covers_a_removal_that_arrives_before_its_end_and_no_later_one() {
    // With all times halved, the delay is 2.5 s, and the removals arrive after 0.5 s and 5 s. So a busy
    // machine has 2 s to spare.
    let (code, text) = run(&["--kubernetes", "--scale", "0.5", "--removals", "1,10"]);
    assert_eq!(code, Some(0), "{text}");
    let failed = |removal: &str| -> Vec<u64> {
        let row = text
            .lines()
            .find(|line| line.starts_with(&format!("| {removal} s |")));
        let row = row.unwrap_or_else(|| panic!("no row {removal}:\n{text}"));
        let cells = row
            .split('|')
            .filter_map(|cell| cell.trim().split_once(" of "));
        cells.map(|(failed, _)| failed.parse().unwrap()).collect()
    };
    let [plain, slept, graceful, pre_stop] = failed("1.0")[..] else {
        panic!("{text}")
    };
    assert!(plain > 0, "{text}");
    assert_eq!((slept, graceful, pre_stop), (0, 0, 0), "{text}");
    assert!(failed("10.0").iter().all(|failed| *failed > 0), "{text}");
}
