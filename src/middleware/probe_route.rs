//! Whether a service is the route of a probe that `Graceful::probes` made.
//!
//! Such a route is never refused, and no other is. Its path cannot say so: the router of the probes
//! may be nested anywhere, and a user may have routes that end in the same segment. What a route is
//! shows when it is cloned. A router of axum keeps each route as a service and calls a clone of it.
//! To clone the route is to clone every layer around it, and then the service inside.
//!
//! 1. A [`Probe`](crate::Probe) that `probes` made notes its lifecycle when it is cloned, in a cell of
//!    the thread.
//! 2. [`GracefulService`](super::GracefulService) clones the service inside between emptying the cell
//!    and looking at it. What it finds there is a probe that it has just cloned.
//! 3. The clone that is called therefore knows what it leads to. The original is called where nothing
//!    was cloned, and then it is no route of a router.
//!
//! A router is cloned by counting a reference, so a service around a whole router sees no probe in
//! it: all that such a service may let pass is decided by the path, in `refusal`.

use std::cell::Cell;

use crate::{handle::graceful::Admission, shutdown::Shared};

/// What no lifecycle has for an address.
const NONE: usize = 0;

thread_local! {
    // Without a destructor and known at compile time, so that to read it is one instruction.
    static CLONED: Cell<usize> = const { Cell::new(NONE) };
}

/// Notes that the route of a probe of this lifecycle is being cloned.
pub(crate) fn note_clone(shared: &Shared) {
    CLONED.set(shared.address());
}

/// Clones a service. Returns the entrance for the clone: another one if it leads to a probe of the
/// same lifecycle.
#[inline]
pub(super) fn clone<S: Clone>(service: &S, admission: Admission) -> (S, Admission) {
    CLONED.set(NONE);
    let service = service.clone();
    match CLONED.get() {
        // The probe in the clone keeps its lifecycle, so that no other has its address.
        probe if probe != NONE && probe == admission.address() => (service, admission.to_probe()),
        _ => (service, admission),
    }
}
