//! The line breaks at the end of a read that may be the beginning of an empty line. `sniffer` says why
//! it holds them back.

#[inline]
pub(super) fn is_line_break(byte: u8) -> bool {
    matches!(byte, b'\r' | b'\n')
}

/// The line breaks that are held back, because the rest of an empty line may follow and end a head.
/// The first entry means none. The list also contains what is left of each entry after its first
/// bytes have been passed on.
pub(super) const HELD_BACK: [&[u8]; 6] = [b"", b"\r", b"\n", b"\r\n", b"\n\r", b"\r\n\r"];

/// The index in [`HELD_BACK`] of the line break at the end of these bytes.
///
/// 0 if the bytes consist of line breaks only: they are empty lines or the rest of one. Also 0 for
/// other sequences of line breaks, which end a head or cannot occur in one.
#[inline]
pub(super) fn held_back_index(read: &[u8]) -> u16 {
    let (kept, before) = match read {
        [before @ .., b'\r', b'\n', b'\r'] => (5, before),
        [before @ .., b'\n', b'\r'] => (4, before),
        [before @ .., b'\r', b'\n'] => (3, before),
        [before @ .., b'\n'] => (2, before),
        [before @ .., b'\r'] => (1, before),
        _ => return 0,
    };
    match before.last() {
        Some(byte) if !is_line_break(*byte) => kept,
        _ => 0,
    }
}

/// The index of these bytes in [`HELD_BACK`].
pub(super) fn index_of(bytes: &[u8]) -> u16 {
    let kept = HELD_BACK.iter().position(|kept| *kept == bytes);
    kept.and_then(|kept| kept.try_into().ok()).unwrap_or(0)
}
