//! What is known of open connections, and what each is told: to leave, to close, and in the end that it
//! is cut.
//!
//! The [`table`] has an entry for each, with its [`state`] and what its [`sniffer`] has read. Nothing
//! here reads or writes a socket: the server does, and asks here.

#[cfg_attr(not(feature = "axum"), allow(dead_code))]
pub(crate) mod descriptors;
pub(crate) mod outside;
#[cfg_attr(not(all(feature = "axum", feature = "signal")), allow(dead_code))]
pub(crate) mod sniffer;
pub(crate) mod stagger;
pub(crate) mod state;
pub(crate) mod table;
pub(crate) mod upgraded;
