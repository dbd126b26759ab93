//! What the bytes of a connection show about HTTP/1 request heads, when the tracked IO only needs to know
//! whether a request is complete.

/// What the reads show about HTTP/1 requests. The two lowest bits count the line breaks at the end of
/// the bytes read so far. Two in a row mean that the first head may be complete, and then the count
/// stays.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Heads(u8);

impl Heads {
    const BREAKS: u8 = 3;
    const WHOLE: u8 = 2;
    /// The bytes read since the last write are a request without a body.
    const BODILESS: u8 = 4;
    /// The bytes read since the last write begin with `GET` or `HEAD`, which have no body.
    const METHOD: u8 = 8;
    /// Something was read since the last write.
    const ASKING: u8 = 16;
    /// The bytes read since the last write begin with a request for a probe.
    const PROBE: u8 = 32;

    pub(super) fn first_is_whole(self) -> bool {
        self.0 & Self::BREAKS == Self::WHOLE
    }

    pub(super) fn last_is_probe(self) -> bool {
        self.0 & Self::PROBE != 0
    }

    pub(super) fn last_is_bodiless(self) -> bool {
        self.0 & Self::BODILESS != 0
    }

    pub(super) fn note_first(&mut self, read: &[u8]) {
        let mut breaks = self.0 & Self::BREAKS;
        for byte in read {
            breaks = match byte {
                _ if breaks == Self::WHOLE => break,
                b'\n' => breaks + 1,
                b'\r' => breaks,
                _ => 0,
            };
        }
        self.0 = self.0 & !Self::BREAKS | breaks;
    }

    /// A request may arrive in several reads, because servers first read a few bytes to tell HTTP/1 from
    /// HTTP/2.
    #[inline]
    pub(super) fn note_last(&mut self, read: &[u8], is_probe: impl FnOnce() -> bool) {
        let mut bits = self.0 & !Self::BODILESS;
        if self.0 & Self::BODILESS != 0 && bits & Self::ASKING != 0 {
            // Another request follows before the response.
            bits &= !Self::PROBE;
        }
        if bits & Self::ASKING == 0 {
            bits |= Self::ASKING;
            let method = read.starts_with(b"GET ") || read.starts_with(b"HEAD ");
            bits &= !(Self::METHOD | Self::PROBE);
            bits |= if method { Self::METHOD } else { 0 };
            bits |= if method && is_probe() { Self::PROBE } else { 0 };
        }
        if bits & Self::METHOD != 0 && read.ends_with(b"\r\n\r\n") {
            bits |= Self::BODILESS;
        }
        self.0 = bits;
    }

    #[inline]
    pub(super) fn wrote(&mut self) {
        self.0 &= !Self::ASKING;
    }
}
