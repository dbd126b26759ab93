//! Loom models of the gate. CONTRIBUTING.md has the command that runs them ("models of the atomics").
//!
//! In these models a request does its work with a `Relaxed` store, and the drain reads it with a
//! `Relaxed` load. Only the gate orders the two. If it did not, loom would find the execution in
//! which the drain reads the old value.

use std::{future::poll_fn, sync::Arc};

use loom::{
    future::{AtomicWaker, block_on},
    model,
    model::Builder,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    thread,
};

use super::{core::SHARDS, shard::Refused};
use crate::phase::Phase;

type Core = super::core::Core<(), ()>;
type Shard = super::shard::Shard<()>;

/// As `model`, with at most three preemptions in an execution. Three threads have too many
/// executions for every run of the tests: without the bound these models take minutes.
fn bounded(check: impl Fn() + Send + Sync + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(check);
}

/// Admits a request as the middleware does.
fn admit(shard: &Shard) -> Result<(), Refused> {
    if shard.admit() {
        Ok(())
    } else {
        shard.admit_slow()
    }
}

fn core(limit: Option<usize>) -> Arc<Core> {
    Arc::new(Core::new(limit, false, ()))
}

async fn idle(core: &Core) {
    poll_fn(|cx| core.poll_idle(cx)).await;
}

fn shared<T>(value: T) -> (Arc<T>, Arc<T>) {
    let first = Arc::new(value);
    (first.clone(), first)
}

/// Admission against drain: an admitted request is waited for, a later one is refused, and the work
/// of an admitted request is visible after the wait.
fn is_waited_for(shards: [usize; 2]) {
    bounded(move || {
        let core = core(None);
        let requests: Vec<_> = shards
            .map(|shard| {
                let core = core.clone();
                let (work, seen) = shared(AtomicUsize::new(0));
                let request = thread::spawn(move || {
                    let shard = core.nth(shard);
                    let admitted = admit(shard);
                    if admitted.is_ok() {
                        work.store(1, Relaxed);
                        shard.release();
                    }
                    admitted
                });
                (request, seen)
            })
            .into();
        core.advance(Phase::Draining);
        block_on(idle(&core));
        let seen: Vec<_> = requests
            .iter()
            .map(|(_, work)| work.load(Relaxed))
            .collect();
        for ((request, _), seen) in requests.into_iter().zip(seen) {
            match request.join().unwrap() {
                Ok(()) => assert_eq!(seen, 1, "the drain ended before this request did"),
                Err(refused) => assert_eq!((refused, seen), (Refused::Draining, 0)),
            }
        }
        assert_eq!(core.word().count(), 0);
    });
}

#[test]
fn an_admitted_request_is_waited_for() {
    is_waited_for([0, 0]);
}

#[test]
fn an_admitted_request_on_another_shard_is_waited_for() {
    assert!(SHARDS > 1);
    is_waited_for([0, 1]);
}

/// Once the gate drains, no shard admits a request. The reader runs in the spawned thread: loom
/// keeps only the last access to a word by each thread, and an advance reads a word before it
/// changes it.
#[test]
fn no_shard_lags_behind_the_gate() {
    model(|| {
        let core = core(None);
        let looking = core.clone();
        let reader = thread::spawn(move || {
            if looking.settled_phase() == Phase::Draining {
                for shard in (0..SHARDS).map(|shard| looking.nth(shard)) {
                    // Checked before the attempt to admit, which would read the newest word under
                    // any ordering.
                    assert_eq!(shard.word().phase(), Phase::Draining);
                    assert_eq!(admit(shard), Err(Refused::Draining));
                }
            }
        });
        core.advance(Phase::Draining);
        reader.join().unwrap();
    });
}

/// A thread that acts on a phase sees the writes that led to the phase.
#[test]
fn everything_before_an_advance_is_seen() {
    model(|| {
        let core = core(None);
        let (seen, written) = shared(AtomicUsize::new(0));
        let looking = core.clone();
        let reader = thread::spawn(move || {
            if looking.settled_phase() == Phase::Draining {
                assert_eq!(seen.load(Relaxed), 1);
            }
        });
        written.store(1, Relaxed);
        core.advance(Phase::Draining);
        reader.join().unwrap();
    });
}

/// Also if the gate still shows an earlier phase than the shard that refused.
#[test]
fn a_request_refused_by_a_drain_is_counted() {
    model(|| {
        let core = core(None);
        let asking = core.clone();
        let request = thread::spawn(move || {
            if let Err(refused) = admit(asking.nth(1)) {
                asking.refused(refused);
                assert_eq!(asking.since_serving().refused, 1);
            }
        });
        core.advance(Phase::Draining);
        request.join().unwrap();
    });
}

/// A request that is released without a response is either no longer in flight when the stop is
/// requested, or it is counted by the time the drain has seen it go.
#[test]
fn a_request_dropped_in_a_stop_is_counted_before_the_drain_sees_it_go() {
    model(|| {
        let core = core(None);
        let shard = core.nth(1);
        admit(shard).unwrap();
        let request = {
            let core = core.clone();
            thread::spawn(move || core.nth(1).release_unanswered())
        };
        let in_flight = core.advance(Phase::Draining).unwrap().count();
        block_on(idle(&core));
        assert_eq!(core.since_serving().dropped, in_flight);
        request.join().unwrap();
    });
}

/// Last release against wait, with draining begun and two requests in flight: the waiter is woken,
/// whichever request is the last. A lost wake-up is a deadlock, which loom reports.
fn wakes_the_waiter(shards: [usize; 2]) {
    model(move || {
        let core = core(None);
        for shard in shards {
            admit(core.nth(shard)).unwrap();
        }
        core.advance(Phase::Draining);
        let requests = shards.map(|shard| {
            let core = core.clone();
            thread::spawn(move || core.nth(shard).release())
        });
        block_on(idle(&core));
        assert!(core.settled_word().is_idle());
        for request in requests {
            request.join().unwrap();
        }
    });
}

#[test]
fn the_last_release_wakes_the_waiter() {
    wakes_the_waiter([0, 0]);
}

#[test]
fn the_last_release_of_any_shard_wakes_the_waiter() {
    wakes_the_waiter([0, 1]);
}

/// The waiter registers first, draining begins on a second thread, and the last request is released
/// on a third. The thread that advances also wakes the driver's waker (here loom's `AtomicWaker`).
/// No wake-up is lost between that waker and the last release.
#[test]
fn a_wake_up_is_not_lost_between_advance_and_release() {
    bounded(|| {
        let core = core(None);
        let driver_waker = Arc::new(AtomicWaker::new());
        admit(core.nth(1)).unwrap();
        let request = {
            let core = core.clone();
            thread::spawn(move || core.nth(1).release())
        };
        let trigger = {
            let (core, driver_waker) = (core.clone(), driver_waker.clone());
            thread::spawn(move || {
                core.advance(Phase::Draining);
                driver_waker.wake();
            })
        };
        block_on(poll_fn(|cx| {
            driver_waker.register_by_ref(cx.waker());
            core.poll_idle(cx)
        }));
        assert!(core.settled_word().is_idle());
        request.join().unwrap();
        trigger.join().unwrap();
    });
}

/// The limit: two requests compete for the last place. One of them gets it, the count never passes
/// the limit, and the place is free again afterwards.
#[test]
fn the_limit_is_exact() {
    model(|| {
        let core = core(Some(1));
        let (inside, most) = shared(AtomicUsize::new(0));
        let other = {
            let (core, inside) = (core.clone(), inside);
            // Another shard, if the gate had no limit.
            thread::spawn(move || enter(core.nth(1), &inside))
        };
        let mine = enter(core.nth(0), &most);
        let others = other.join().unwrap();
        assert!(mine || others, "there was room for one request");
        assert_eq!(core.word().count(), 0);
        assert_eq!(admit(core.nth(0)), Ok(()), "the place is free again");
    });

    fn enter(shard: &Shard, inside: &AtomicUsize) -> bool {
        if admit(shard).is_err() {
            return false;
        }
        assert_eq!(
            inside.fetch_add(1, Relaxed),
            0,
            "two requests were admitted"
        );
        inside.fetch_sub(1, Relaxed);
        shard.release();
        true
    }
}

/// Three threads change phase, readiness and count at the same time, and no change is lost.
#[test]
fn changes_of_the_word_do_not_overwrite_one_another() {
    model(|| {
        let core = core(None);
        let request = {
            let core = core.clone();
            thread::spawn(move || admit(core.nth(0)).is_ok())
        };
        let readiness = {
            let core = core.clone();
            thread::spawn(move || core.set_ready(false))
        };
        core.advance(Phase::LameDuck);
        assert!(request.join().unwrap());
        readiness.join().unwrap();
        let word = core.word();
        assert_eq!(word.phase(), Phase::LameDuck);
        assert!(!word.is_marked_ready());
        assert_eq!(word.count(), 1);
    });
}

/// A request that is admitted while the flags are cleared is not forgotten.
#[test]
fn an_admission_during_the_clearing_is_not_forgotten() {
    model(|| {
        let core = core(None);
        let clearing = {
            let core = core.clone();
            thread::spawn(move || core.clear_admitted())
        };
        assert_eq!(admit(core.nth(1)), Ok(()));
        clearing.join().unwrap();
        assert!(core.has_ever_admitted());
    });
}

/// An earlier admission is seen at each moment: by its flag, or as one whose flag was cleared.
#[test]
fn an_admission_before_the_clearing_is_seen_at_each_moment() {
    model(|| {
        let core = core(None);
        assert_eq!(admit(core.nth(1)), Ok(()));
        let threads = [Core::clear_admitted, |core: &Core| {
            assert!(core.has_ever_admitted());
        }]
        .map(|run| {
            let core = core.clone();
            thread::spawn(move || run(&core))
        });
        for thread in threads {
            thread.join().unwrap();
        }
    });
}
