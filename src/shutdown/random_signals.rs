//! Signals at random moments of a stop, on tokio's paused clock.

use proptest::{collection::vec, option, prelude::*};
use tokio::{
    runtime,
    time::{Duration, Instant, sleep, sleep_until},
};

use crate::{
    handle::graceful::Graceful,
    phase::Phase,
    report::{Outcome, Trigger},
};

const GRACE_PERIOD: u64 = 10_000;

/// Times in milliseconds.
#[derive(Clone, Debug)]
struct Schedule {
    /// In the order of their arrival, each this long after the one before.
    signals: Vec<(u64, Trigger)>,
    /// When a hold is dropped, or never.
    held: Option<u64>,
    /// How long the cleanup takes.
    cleanup: u64,
}

fn schedules() -> impl Strategy<Value = Schedule> {
    let signal = prop_oneof![Just(Trigger::Interrupt), Just(Trigger::Terminate)];
    // Some come so soon that they count as one.
    let gap = prop_oneof![Just(0), 1..300_u64, 1..4000_u64];
    let signals = vec((gap, signal), 1..8);
    (signals, option::of(0..9000_u64), 0..3000_u64).prop_map(|(signals, held, cleanup)| Schedule {
        signals,
        held,
        cleanup,
    })
}

/// What a stop looks like from outside.
#[derive(Debug, PartialEq)]
struct Seen {
    /// Each phase, and when it began.
    phases: Vec<(Phase, u128)>,
    outcome: Outcome,
}

/// Plays the signals of which `keeps` is true, at their times.
fn play(schedule: &Schedule, keeps: impl Fn(usize, Trigger) -> bool) -> Seen {
    let mut runtime = runtime::Builder::new_current_thread();
    let runtime = runtime.enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let ms = Duration::from_millis;
        let graceful = Graceful::builder()
            .grace_period(ms(GRACE_PERIOD))
            .drain_delay(ms(1000))
            .interrupt_delay(ms(500))
            .drain_timeout(ms(5000))
            .build()
            .unwrap();
        graceful.shared().mark_served();
        let step = sleep(ms(schedule.cleanup));
        graceful.cleanup("step", ms(GRACE_PERIOD), step).unwrap();
        let work = graceful.hold("hold");
        let dropped = schedule.held;
        tokio::spawn(async move {
            if let Some(dropped) = dropped {
                sleep(ms(dropped)).await;
                drop(work);
            } else {
                let _work = work;
                std::future::pending::<()>().await;
            }
        });
        let mut phases = graceful.subscribe();
        let begun = Instant::now();
        let seen = tokio::spawn(async move {
            let mut seen = Vec::new();
            while seen.last().is_none_or(|(phase, _)| *phase < Phase::Stopped) {
                let phase = phases.changed().await.unwrap();
                seen.push((phase, begun.elapsed().as_millis()));
            }
            seen
        });
        let mut at = begun;
        for (number, (gap, signal)) in schedule.signals.iter().enumerate() {
            at += ms(*gap);
            sleep_until(at).await;
            if keeps(number, *signal) {
                graceful.shared().signal(*signal);
            }
        }
        graceful.stopped().await;
        let outcome = graceful.shared().report().unwrap().outcome();
        Seen {
            phases: seen.await.unwrap(),
            outcome,
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn signals_keep_the_order_and_the_end_of_a_stop(schedule in schedules()) {
        let seen = play(&schedule, |_, _| true);
        let first = u128::from(schedule.signals[0].0);
        prop_assert!(seen.phases.is_sorted(), "{seen:?}");
        let (last, ended) = *seen.phases.last().unwrap();
        prop_assert_eq!(last, Phase::Stopped);
        prop_assert!(ended <= first + u128::from(GRACE_PERIOD), "{seen:?}");
        // A further SIGTERM changes nothing, however soon it comes.
        let once = play(&schedule, |number, signal| number == 0 || signal != Trigger::Terminate);
        prop_assert_eq!(&seen, &once);
        // Only a further SIGINT abandons the cleanup.
        let further = play(&schedule, |number, _| number == 0);
        prop_assert_ne!(further.outcome, Outcome::Abandoned);
        // It makes no phase longer.
        prop_assert!(ended <= further.phases.last().unwrap().1, "{seen:?} {further:?}");
    }
}
