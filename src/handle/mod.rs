//! The public handle of a lifecycle, [`Graceful`](crate::Graceful), its builder, and the futures,
//! streams and guards that it returns.
//!
//! The middleware and the server take a `Graceful` to learn which lifecycle they belong to.
//! Everything here is a thin layer: it registers holds and tasks in `tasks`, waits in `waiting`,
//! and triggers and reads the timeline in `shutdown`. It makes no decision about time.
//!
//! The public API is documented here. Each promise on these pages has a test under `tests/`. The
//! futures here are cancel safe, and a `Drop` that ends a hold or a wait must not panic.

// First, and apart from the others, because rustdoc shows the methods in this order: `new` first.
pub(crate) mod graceful;

pub(crate) mod builder;
pub(crate) mod drain;
pub(crate) mod hold;
pub(crate) mod until_draining;
pub(crate) mod work;
