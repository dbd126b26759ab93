//! Workers, cleanup steps and holds: the table of what is waited for beside requests.

pub(crate) mod table;
