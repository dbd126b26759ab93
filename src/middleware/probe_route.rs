//! Recognizes the routes that `Graceful::probes` and `PreStop::into_router` make, so that the layer
//! never rejects their requests. Other routes must not be recognized.
//!
//! The path alone cannot decide this: the router of the probes may be nested under any prefix, and
//! a user may have routes whose paths end in the same segment. So routes are recognized when they
//! are cloned. axum's router keeps each route as a service and calls a clone of it, and a clone of
//! the route clones every layer around it and then the service inside.
//!
//! 1. When a probe route is cloned, it stores the address of its lifecycle in a thread-local cell.
//! 2. [`GracefulService`](super::GracefulService) empties the cell, clones the service inside, and
//!    then reads the cell. An address there comes from a route that was cloned in between, as part
//!    of that service.
//! 3. So the clone that is called knows whether it leads to a probe. If a service is called without
//!    having been cloned, it is not a route of a router.
//!
//! A clone of a whole router only increments a reference count. So a service around a whole router
//! does not recognize the routes in it, and `refusal` decides by the path.

use std::cell::Cell;

use crate::handle::graceful::{Admission, Graceful};

/// No lifecycle has this address.
const NONE: usize = 0;

thread_local! {
    // A constant without a destructor, so that a read is one instruction.
    static CLONED: Cell<usize> = const { Cell::new(NONE) };
}

/// The handle in a service that may be a probe route.
pub(super) struct RouteHandle {
    pub(super) graceful: Graceful,
    pub(super) is_route: bool,
}

impl RouteHandle {
    /// For a service that is not a route.
    pub(super) fn new(graceful: &Graceful) -> Self {
        Self {
            graceful: graceful.clone(),
            is_route: false,
        }
    }
}

impl Clone for RouteHandle {
    fn clone(&self) -> Self {
        if self.is_route {
            CLONED.set(self.graceful.shared().address());
        }
        Self {
            graceful: self.graceful.clone(),
            ..*self
        }
    }
}

/// Clones a service, and returns the admission for the clone. The admission differs if the service
/// leads to a probe of the same lifecycle.
#[inline]
pub(super) fn clone<S: Clone>(service: &S, admission: Admission) -> (S, Admission) {
    CLONED.set(NONE);
    let service = service.clone();
    match CLONED.get() {
        // The probe in the clone keeps its lifecycle alive, so no other lifecycle has this address.
        probe if probe != NONE && probe == admission.address() => (service, admission.to_probe()),
        _ => (service, admission),
    }
}
