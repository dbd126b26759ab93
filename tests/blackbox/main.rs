//! Black-box tests: a real process, real signals, real sockets.
//!
//! The server under test is this executable, started again with `--server` and the knobs of the scenario
//! (see `server`). By default the delay is one second, and the drain deadline is three seconds after the
//! delay.
//!
//! Tests that take minutes, or need a new namespace, run only with `cargo test --test blackbox -- --ignored`.

#![cfg_attr(not(unix), allow(unused))]

use std::process::ExitCode;

#[cfg(unix)]
mod activation;
#[cfg(unix)]
mod chaos;
#[cfg(unix)]
mod client;
#[cfg(unix)]
mod connections;
#[cfg(unix)]
mod deadline;
#[cfg(unix)]
mod draining;
#[cfg(unix)]
mod early;
#[cfg(unix)]
mod edge;
#[cfg(unix)]
mod goaway;
#[cfg(unix)]
mod half_closed;
#[cfg(unix)]
mod hostile;
#[cfg(unix)]
mod in_flight;
#[cfg(unix)]
mod long_lived;
#[cfg(unix)]
mod many;
#[cfg(unix)]
mod misuse;
#[cfg(unix)]
mod process;
#[cfg(unix)]
mod processes;
#[cfg(unix)]
mod readiness;
#[cfg(unix)]
mod refusal;
#[cfg(unix)]
mod restarts;
#[cfg(unix)]
mod server;
#[cfg(unix)]
mod shared;
#[cfg(unix)]
mod signals;
#[cfg(unix)]
mod starved;
#[cfg(unix)]
mod tls;
#[cfg(unix)]
mod whole;
#[cfg(unix)]
mod work;

/// The name of a test, which is the promise that it checks; the server forms that make the promise; and
/// the test itself.
#[cfg(unix)]
type Test = (&'static str, &'static [server::Form], fn(server::Form));

#[cfg(not(unix))]
fn main() {
    // These tests send Unix signals.
}

#[cfg(unix)]
fn main() -> ExitCode {
    use std::sync::{PoisonError, RwLock};

    use libtest_mimic::{Arguments, Trial};

    let mut args = std::env::args().skip(1);
    if args.next().as_deref() == Some("--server") {
        return server::run(&args.collect::<Vec<_>>());
    }
    let mut arguments = Arguments::from_args();
    handle_ignored_interrupts();
    // Tests wait most of the time, so that more of them than cores can run at once.
    arguments.test_threads.get_or_insert(8);
    let shared = [
        activation::TESTS,
        readiness::TESTS,
        draining::TESTS,
        connections::TESTS,
        deadline::TESTS,
        early::TESTS,
        edge::TESTS,
        goaway::TESTS,
        half_closed::TESTS,
        hostile::TESTS,
        in_flight::TESTS,
        long_lived::TESTS,
        misuse::TESTS,
        processes::TESTS,
        processes::IN_NAMESPACES,
        refusal::TESTS,
        shared::TESTS,
        signals::TESTS,
        starved::TESTS,
        whole::TESTS,
        work::TESTS,
    ];
    // These tests run alone, because they load the machine so much that others would miss their times.
    let alone = [
        chaos::ALONE,
        hostile::ALONE,
        many::ALONE,
        many::SOAK,
        tls::ALONE,
    ];
    let tests = shared.into_iter().flatten().map(|test| (test, false));
    let tests = tests.chain(alone.into_iter().flatten().map(|test| (test, true)));
    let mut trials = Vec::new();
    for ((name, forms, test), alone) in tests {
        for &form in *forms {
            let trial = Trial::test(format!("{name} [{form:?}]"), move || {
                static MACHINE: RwLock<()> = RwLock::new(());
                if alone {
                    let _whole = MACHINE.write().unwrap_or_else(PoisonError::into_inner);
                    test(form);
                } else {
                    let _share = MACHINE.read().unwrap_or_else(PoisonError::into_inner);
                    test(form);
                }
                Ok(())
            });
            // These take minutes, or need what some systems forbid, and run only with `-- --ignored`.
            let ignored = ["chaos::", "many::", "namespaces::", "tls::"];
            let ignored = ignored.iter().any(|module| name.starts_with(module));
            trials.push(trial.with_ignored_flag(ignored));
        }
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Makes SIGINT have its default action in the servers that the tests start. A shell script that runs the tests in
/// the background has it ignored, and the programs that they start would inherit that. A signal that is handled
/// has its default action in a new program.
#[cfg(unix)]
fn handle_ignored_interrupts() {
    use tokio::{
        runtime::Builder,
        signal::unix::{SignalKind, signal},
    };

    let kind = SignalKind::interrupt();
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|it| it.strip_prefix("SigIgn:"));
    let ignored = ignored.map_or(0, |it| u64::from_str_radix(it.trim(), 16).unwrap());
    if ignored >> (kind.as_raw_value() - 1) & 1 == 1 {
        // The handler stays when the runtime has ended.
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { drop(signal(kind).unwrap()) });
    }
}
