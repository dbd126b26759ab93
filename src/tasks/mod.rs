//! The table of work besides requests: holds, workers, lame-duck hooks and cleanup steps.
//!
//! `handle` registers work here, and the timeline (`shutdown`) takes it, starts it and records how
//! it ended. This module only stores and counts; it does not decide when a task runs.
//!
//! The drain waits for holds as it does for requests. `table` contains the argument that the end of
//! the last hold is not missed, and loom models for it. The order of the steps in `release` and
//! `is_idle` is part of that argument.

pub(crate) mod awaited;
pub(crate) mod completion;
pub(crate) mod list;
pub(crate) mod table;
