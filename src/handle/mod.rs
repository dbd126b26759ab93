//! What a user holds: [`Graceful`](crate::Graceful), its builder, and what it hands out to be awaited, held or registered.
//!
//! Called by the middleware and the server, which are told by it which lifecycle they belong to.

// First, and apart from the others, because rustdoc shows the methods in this order: `new` first.
pub(crate) mod graceful;

pub(crate) mod builder;
pub(crate) mod drain;
pub(crate) mod hold;
pub(crate) mod until_draining;
pub(crate) mod work;
