//! What a lifecycle leaves behind: nothing, unless its layer has made a service.
//!
//! `.ci/leaks` runs these tests under valgrind, `.ci/sanitizers` under `LeakSanitizer`, and `.ci/miri` in Miri. They find
//! memory that nothing points to.

use allocation_counter::{AllocationInfo, measure};
use tower_graceful::{Graceful, GracefulLayer};
use tower_layer::Layer;

/// A lifecycle whose rules have allocations of their own.
fn graceful() -> Graceful {
    Graceful::builder()
        .exempt("/metrics".to_owned())
        .build()
        .unwrap()
}

/// What is left of a second run. A first one makes what the process has once.
fn left(run: impl Fn()) -> AllocationInfo {
    run();
    measure(run)
}

#[test]
fn a_lifecycle_whose_layer_makes_no_service_is_freed() {
    let left = left(|| {
        let graceful = graceful();
        let layer: GracefulLayer = graceful.layer();
        drop((graceful.hold("hold"), layer.clone(), graceful.draining()));
        assert_eq!(graceful.in_flight(), 0);
    });
    assert!(left.bytes_total > 2_000, "there was something to free");
    assert_eq!((left.bytes_current, left.count_current), (0, 0));
}

#[cfg(feature = "axum")]
#[test]
fn a_lifecycle_with_probes_and_no_layer_is_freed() {
    let left = left(|| {
        let graceful = graceful();
        let probes: axum::Router = graceful.probes();
        // Clones of the routes.
        drop(probes.clone().layer(tower::layer::util::Identity::new()));
        drop(graceful.readiness().clone());
    });
    assert_eq!((left.bytes_current, left.count_current), (0, 0));
}

#[test]
fn a_layer_keeps_some_two_kilobytes_however_many_services_it_makes() {
    let left = left(|| {
        let graceful = graceful();
        for _ in 0..100 {
            std::hint::black_box(graceful.layer().layer(()));
        }
    });
    let bytes = left.bytes_current;
    assert!((1..3_500).contains(&bytes), "{bytes} bytes are left");
}

#[test]
fn twenty_thousand_lifecycles_are_cheap() {
    let left = left(|| {
        for _ in 0..10_000 {
            std::hint::black_box(graceful().layer().layer(()));
        }
    });
    let each = left.bytes_current / 10_000;
    assert!((1..3_500).contains(&each), "{each} bytes are left of each");
}

/// Fails under valgrind, or else the other tests show nothing there. A hundred blocks, because an old copy of a pointer
/// may keep one of them reachable.
#[test]
#[ignore = "loses memory"]
fn what_is_lost_is_found() {
    for size in 1_000..1_100 {
        std::mem::forget(std::hint::black_box(vec![1_u8; size]));
    }
}
