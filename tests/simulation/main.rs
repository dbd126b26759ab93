//! Random lifecycles on a paused clock, checked against rules that hold for all of them.
//!
//! A schedule is a plan, requests, holds, workers, hooks, cleanup steps, and the moment at which the
//! stop is asked for. [`world`] plays it with a server that owns its requests, as real servers do, and
//! notes what happens. [`rules`] compares the notes and the report.
//!
//! proptest prints a failing schedule after shrinking it, and how to keep its seed as a test.
//! `PROPTEST_CASES=100000 cargo test --release --test simulation` runs for some minutes.

mod rules;
mod schedule;
mod world;

use std::{cell::Cell, panic};

use proptest::{
    prelude::*,
    test_runner::{Config, FileFailurePersistence},
};

thread_local! {
    /// A panic that belongs to the schedule prints nothing.
    static EXPECTED: Cell<bool> = const { Cell::new(false) };
}

/// Panics as a schedule says.
fn planned_panic() -> ! {
    EXPECTED.set(true);
    panic!("planned");
}

fn hide_planned_panics() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let report = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !EXPECTED.take() {
                report(info);
            }
        }));
    });
}

proptest! {
    #![proptest_config(Config {
        cases: 1500,
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        ..Config::default()
    })]

    #[test]
    fn every_lifecycle_keeps_the_rules(schedule in schedule::schedules()) {
        hide_planned_panics();
        let seen = world::play(&schedule);
        rules::check(&schedule, &seen)?;
    }
}
