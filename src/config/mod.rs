//! The configuration that the builder produces: the plan of a stop within its grace period, and the
//! rules for requests.
//!
//! This module contains plain data and arithmetic, without state or I/O. The builder (`handle`)
//! checks the configuration and stores it. The timeline (`shutdown`), the middleware and the server
//! read it, and nothing changes it after the lifecycle has been built.
//!
//! `plan` guarantees that the deadlines of a stop are in order and lie within the grace period. Its
//! property tests check this; change its arithmetic only together with them.

pub(crate) mod leave_early;
pub(crate) mod plan;
pub(crate) mod policy;
pub(crate) mod rejection;
