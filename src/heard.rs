//! What has been read from a connection: enough to know what the peer speaks, and whether it has
//! begun to speak at all.

use crate::sync::{AtomicBool, AtomicU8, AtomicU32, Ordering::Relaxed};

/// Written by whoever reads the connection, which is one at a time, and read without a lock. It
/// says nothing about anything else in memory.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    /// Somebody asks what was read.
    listening: AtomicBool,
    /// How many there were so far, and from the start again after 4 GiB.
    bytes: AtomicU32,
    /// How much of the preface of HTTP/2 it began with, or that it began with something else.
    preface: AtomicU8,
    /// A first head has been awaited.
    awaited: AtomicBool,
    /// It has come when others were asked to leave already.
    late: AtomicBool,
}

impl Heard {
    /// What is read from now on is noted.
    pub(crate) fn listen(&self) {
        self.listening.store(true, Relaxed);
    }

    #[inline]
    pub(crate) fn note(&self, read: &[u8]) {
        let preface = self.preface.load(Relaxed);
        if preface < WHOLE {
            self.preface.store(compared(preface, read), Relaxed);
        }
        if self.listening.load(Relaxed) {
            self.note_all(read);
        }
    }

    fn note_all(&self, read: &[u8]) {
        // More than that are never read at once.
        #[expect(clippy::cast_possible_truncation)]
        let bytes = self.bytes().wrapping_add(read.len() as u32);
        self.bytes.store(bytes, Relaxed);
    }

    #[cfg(all(feature = "axum", feature = "signal"))]
    pub(crate) fn is_listened_to(&self) -> bool {
        self.listening.load(Relaxed)
    }

    /// How many there were so far: another number if there were more.
    pub(crate) fn bytes(&self) -> u32 {
        self.bytes.load(Relaxed)
    }

    /// From which byte on the next head is awaited. The first one is from the start, even if some
    /// of it was read to tell HTTP/1 from HTTP/2.
    pub(crate) fn await_head(&self) -> u32 {
        if self.awaited.load(Relaxed) {
            return self.bytes();
        }
        self.awaited.store(true, Relaxed);
        0
    }

    /// It is known what the peer speaks.
    pub(crate) fn is_decided(&self) -> bool {
        self.preface.load(Relaxed) >= WHOLE
    }

    /// The peer speaks HTTP/2.
    pub(crate) fn is_http2(&self) -> bool {
        self.preface.load(Relaxed) == WHOLE
    }

    pub(crate) fn comes_late(&self) {
        self.late.store(true, Relaxed);
    }

    pub(crate) fn is_late(&self) -> bool {
        self.late.load(Relaxed)
    }
}

/// What every connection of HTTP/2 begins with
/// ([RFC 9113 §3.4](https://www.rfc-editor.org/rfc/rfc9113#section-3.4)).
const PREFACE: [u8; 24] = *b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// All of the preface has been read.
const WHOLE: u8 = 24;
/// It was something else.
const OTHER: u8 = 25;

/// How much of the preface there is with what was read after so much of it.
fn compared(before: u8, read: &[u8]) -> u8 {
    let mut preface = before;
    for (expected, byte) in PREFACE[usize::from(before)..].iter().zip(read) {
        if expected != byte {
            return OTHER;
        }
        preface += 1;
    }
    preface
}

#[cfg(all(test, not(tower_graceful_loom)))]
mod tests {
    use super::*;

    fn heard(pieces: &[&[u8]]) -> Heard {
        let heard = Heard::default();
        heard.listen();
        for piece in pieces {
            heard.note(piece);
        }
        heard
    }

    #[test]
    fn the_preface_of_http2_is_known_in_any_pieces() {
        assert!(heard(&[&PREFACE]).is_http2());
        assert!(heard(&[&PREFACE, b"\0\0\0\x04"]).is_http2());
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
        assert!(!heard(&[b"GET / HTTP/1.1\r\n\r\n", &PREFACE]).is_http2());
        assert!(!heard(&[b"PRI * HTTP/1", &PREFACE]).is_http2());
        assert!(!heard(&[b"P", b"P", &PREFACE[1..]]).is_http2());
        assert!(!heard(&[&PREFACE[..5], b"x", &PREFACE[5..]]).is_http2());
    }

    #[test]
    fn the_first_head_is_awaited_from_the_start_and_the_next_from_where_it_begins() {
        let heard = heard(&[b"GET"]);
        assert_eq!(heard.await_head(), 0);
        heard.note(b" / HTTP/1.1\r\n\r\n");
        assert_eq!(heard.await_head(), 18);
    }
}
