//! What a connection is told to do while the service stops.

/// What a connection has to do. Directives only move forward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Directive {
    /// Go on.
    #[default]
    Stay,
    /// The service stops. The connection goes on, but what passes is recorded from now on.
    Stopping,
    /// Leave when the connection's slot in the spread has been reached.
    LeaveInSlot,
    /// Leave, if the peer can be informed without losing a request: by the GOAWAY of HTTP/2.
    Leave,
    /// As `Leave`, and let the server read once more, because the connection is about to be closed.
    Read,
    /// Close when the last response is out, or at once if there is none to wait for.
    Close,
    /// Close now if nothing is in flight and the peer is silent.
    Expire,
    /// Close now.
    Cut,
}

impl Directive {
    #[inline]
    pub(super) const fn of(byte: u8) -> Self {
        match byte {
            0 => Self::Stay,
            1 => Self::Stopping,
            2 => Self::LeaveInSlot,
            3 => Self::Leave,
            4 => Self::Read,
            5 => Self::Close,
            6 => Self::Expire,
            _ => Self::Cut,
        }
    }

    /// The service stops, and the connection has not been cut.
    pub(crate) fn is_uncut_stop(self) -> bool {
        (Self::Stopping..Self::Cut).contains(&self)
    }
}
