//! What the builder sets: the plan of a stop within its grace period, and the rules for requests.
//!
//! Fixed once a lifecycle is built. The rooms that act upon it read it and change nothing.

pub(crate) mod leave_early;
pub(crate) mod plan;
pub(crate) mod policy;
pub(crate) mod rejection;
