//! Requests that are lost because their client has closed its writing side, as far as the IO of a
//! connection shows it.

/// Whether a client that has closed its writing side may wait for a response. Used where the server
/// is not ours, and its requests are not known.
#[derive(Debug, Default)]
pub(super) struct Unanswered {
    /// The last bytes that passed were read, and ended an HTTP/1 request without a body, or with a
    /// chunked one.
    asked: bool,
    /// The peer has closed its writing side.
    ended: bool,
}

impl Unanswered {
    /// Notes what was read, and whether the service let requests in at that time.
    #[inline]
    pub(super) fn read(&mut self, read: &[u8], lets_in: bool) {
        self.asked = lets_in && read.ends_with(b"\r\n\r\n");
    }

    #[cold]
    pub(super) fn read_end(&mut self) {
        self.ended = true;
    }

    #[inline]
    pub(super) fn wrote(&mut self) {
        self.asked = false;
    }

    /// Whether the connection, if it is dropped now, leaves a request unanswered.
    pub(super) fn is_lost(&self) -> bool {
        self.asked && self.ended
    }
}
