//! The tunnels of an HTTP/2 connection, such as a WebSocket ([RFC 8441](https://www.rfc-editor.org/rfc/rfc8441)): each
//! is one stream, which a successful response to a `CONNECT` turns into another protocol.
//!
//! hyper runs a tunnel in a task of its own. It gives this task to its executor in the poll in which the future of the
//! service resolves, and drops that future afterwards. So the future leaves the number of the tunnel in a variable of
//! its thread, where the executor finds it.

use std::cell::Cell;

use super::owner::Owner;
use crate::connection::upgraded::{TunnelNumber, Upgrade};

thread_local! {
    static GRANTED: Cell<Option<TunnelNumber>> = const { Cell::new(None) };
}

/// Records that the response to the request for this tunnel is a success.
pub(super) fn grant(number: TunnelNumber) {
    GRANTED.set(Some(number));
}

/// The future of the request for this tunnel is dropped. Forgets the tunnel if no task runs it.
#[cold]
pub(super) fn leave(owner: &Owner, number: TunnelNumber) {
    GRANTED.set(None);
    let upgraded = &owner.0.owner.upgraded;
    upgraded.not_begun(Upgrade::Tunnel(number));
}

/// A tunnel that is open until its task has ended.
pub(super) struct Tunnel {
    owner: Owner,
    number: TunnelNumber,
}

impl Tunnel {
    /// The tunnel that the task runs that hyper starts now, if it is the task of a tunnel.
    #[inline]
    pub(super) fn begin(owner: &Owner) -> Option<Self> {
        GRANTED.get().map(|number| Self::granted(owner, number))
    }

    #[cold]
    fn granted(owner: &Owner, number: TunnelNumber) -> Self {
        GRANTED.set(None);
        let upgraded = &owner.0.owner.upgraded;
        upgraded.began(Upgrade::Tunnel(number), owner.0.peer());
        Self {
            owner: owner.clone(),
            number,
        }
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        let upgraded = &self.owner.0.owner.upgraded;
        upgraded.ended(Upgrade::Tunnel(self.number));
    }
}
