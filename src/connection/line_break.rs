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
/// 0 if the bytes consist of line breaks only: they are empty lines or the rest of one. 0 also for
/// other sequences of line breaks, which end a head or cannot occur in one, and after bytes that
/// [cannot be the last of a part of a head](may_end_in_head).
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
        Some(byte) if !is_line_break(*byte) && may_end_in_head(before) => kept,
        _ => 0,
    }
}

/// Whether a part of a head may be at the end of these bytes, and end in a whole line: a request line, and
/// then nothing but fields. hyper answers any other line with an error, and does not wait for the rest.
///
/// Most bodies are known by their last line, so only that is searched.
#[cold]
fn may_end_in_head(read: &[u8]) -> bool {
    for line in read.rsplit(|byte| *byte == b'\n') {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.ends_with(b" HTTP/1.1") || line.ends_with(b" HTTP/1.0") {
            return true;
        }
        if !is_field(line) {
            return false;
        }
    }
    false
}

/// Whether the line is a field: a name ([RFC 9110 §5.6.2]), a colon, and any value.
///
/// [RFC 9110 §5.6.2]: https://www.rfc-editor.org/rfc/rfc9110#section-5.6.2
fn is_field(line: &[u8]) -> bool {
    let is_token = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    let length = line.iter().take_while(|byte| is_token(byte)).count();
    length > 0 && line.get(length) == Some(&b':')
}

/// The index of these bytes in [`HELD_BACK`].
pub(super) fn index_of(bytes: &[u8]) -> u16 {
    let kept = HELD_BACK.iter().position(|kept| *kept == bytes);
    kept.and_then(|kept| kept.try_into().ok()).unwrap_or(0)
}
