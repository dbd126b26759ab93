//! The preface of HTTP/2: how much of it a connection has sent.

/// The bytes that every HTTP/2 connection begins with ([RFC 9113
/// §3.4](https://www.rfc-editor.org/rfc/rfc9113#section-3.4)).
pub(super) const PREFACE: [u8; 24] = *b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The whole preface has been read.
pub(super) const WHOLE: u8 = 24;
/// The connection began with something else.
pub(super) const OTHER: u8 = 25;
/// The connection was upgraded from HTTP/1 to another protocol.
pub(super) const UPGRADED: u8 = 26;

/// How much of the preface has been read after `read`, if `before` bytes of it had been read
/// before.
#[inline]
pub(super) fn compared(before: u8, read: &[u8]) -> u8 {
    let mut preface = before;
    for (expected, byte) in PREFACE[usize::from(before)..].iter().zip(read) {
        if expected != byte {
            return OTHER;
        }
        preface += 1;
    }
    preface
}
