//! The open connections: what is known about each of them, and the directive that each has been
//! given (leave, close, cut).
//!
//! The [`table`] has an entry for each connection, with its [`state`] (directive and wakers) and
//! its [`sniffer`] (what the bytes read so far show). The timeline (`shutdown`) gives directives to
//! all connections here and waits for the last one to close. The server (`server`) registers
//! connections, reads its directives here, and does all reading and writing of sockets; nothing in
//! this module touches a socket of a connection, except that [`descriptors`] resets what is left in
//! an accept queue.
//!
//! The arguments about wake-ups are in `table` and in `state`, each with loom models. Change the
//! locking or an ordering only together with both. `outside` argues about the flags of `admission`.

pub(crate) mod activity;
#[cfg_attr(not(feature = "axum"), allow(dead_code))]
pub(crate) mod descriptors;
pub(crate) mod directive;
pub(crate) mod entry;
pub(crate) mod flags;
mod line_break;
pub(crate) mod outside;
mod preface;
pub(crate) mod requests;
#[cfg_attr(not(all(feature = "axum", feature = "signal")), allow(dead_code))]
pub(crate) mod sniffer;
pub(crate) mod stagger;
pub(crate) mod state;
pub(crate) mod table;
pub(crate) mod upgraded;
pub(crate) mod wakers;
