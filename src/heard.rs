//! What has been read from a connection: enough to know what the peer speaks, and whether it has
//! begun to speak at all.

#[derive(Debug, Default)]
pub(crate) struct Heard {
    /// How many there were so far.
    pub(crate) bytes: u64,
    /// A first head has been awaited.
    awaited: bool,
    /// How much of the preface of HTTP/2 it began with.
    preface: u8,
}

impl Heard {
    pub(crate) fn note(&mut self, read: &[u8]) {
        // As long as all there was is preface.
        if self.bytes == u64::from(self.preface) {
            let rest = PREFACE[usize::from(self.preface)..].iter();
            for _ in rest.zip(read).take_while(|(a, b)| a == b) {
                self.preface += 1;
            }
        }
        self.bytes += read.len() as u64;
    }

    /// From which byte on the next head is awaited. The first one is from the start, even if some
    /// of it was read to tell HTTP/1 from HTTP/2.
    pub(crate) fn await_head(&mut self) -> u64 {
        if std::mem::replace(&mut self.awaited, true) {
            self.bytes
        } else {
            0
        }
    }

    /// It is known what the peer speaks.
    pub(crate) fn is_decided(&self) -> bool {
        self.is_http2() || self.bytes > u64::from(self.preface)
    }

    /// The peer speaks HTTP/2.
    pub(crate) fn is_http2(&self) -> bool {
        usize::from(self.preface) == PREFACE.len()
    }
}

/// What every connection of HTTP/2 begins with
/// ([RFC 9113 §3.4](https://www.rfc-editor.org/rfc/rfc9113#section-3.4)).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(pieces: &[&[u8]]) -> Heard {
        let mut heard = Heard::default();
        for piece in pieces {
            heard.note(piece);
        }
        heard
    }

    #[test]
    fn the_preface_of_http2_is_known_in_any_pieces() {
        assert!(heard(&[PREFACE]).is_http2());
        assert!(heard(&[PREFACE, b"\0\0\0\x04"]).is_http2());
        assert!(heard(&[b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0"]).is_http2());
        let bytes: Vec<_> = PREFACE.chunks(1).collect();
        assert!(heard(&bytes).is_http2());
        assert!(!heard(&bytes[..23]).is_http2());
        assert!(!heard(&bytes[..23]).is_decided());
    }

    #[test]
    fn nothing_else_is_taken_for_it() {
        assert!(!heard(&[]).is_decided());
        assert!(heard(&[b"PO"]).is_decided());
        assert!(!heard(&[b"GET / HTTP/1.1\r\n\r\n", PREFACE]).is_http2());
        assert!(!heard(&[b"PRI * HTTP/1", PREFACE]).is_http2());
        assert!(!heard(&[b"P", b"P", &PREFACE[1..]]).is_http2());
        assert!(!heard(&[&PREFACE[..5], b"x", &PREFACE[5..]]).is_http2());
    }

    #[test]
    fn the_first_head_is_awaited_from_the_start_and_the_next_from_where_it_begins() {
        let mut heard = heard(&[b"GET"]);
        assert_eq!(heard.await_head(), 0);
        heard.note(b" / HTTP/1.1\r\n\r\n");
        assert_eq!(heard.await_head(), 18);
    }
}
