//! What the bytes of a connection show about HTTP/1 request heads: whether the first one is complete, and whether
//! the last request has no body and is for a probe.

/// What the reads show about HTTP/1 requests. The two lowest bits are the state of the first head: not
/// begun, in a line, at the end of a line, or whole, which is after an empty line and stays. Empty lines
/// before the request line do not begin it
/// ([RFC 9112 §2.2](https://www.rfc-editor.org/rfc/rfc9112#section-2.2)).
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Heads(u8);

impl Heads {
    const FIRST: u8 = 3;
    const NOT_BEGUN: u8 = 0;
    const IN_LINE: u8 = 1;
    const LINE_END: u8 = 2;
    const WHOLE: u8 = 3;
    /// The bytes read since the last write are a request without a body.
    const BODILESS: u8 = 4;
    /// The bytes read since the last write begin with `GET` or `HEAD`, which have no body unless [`BODY`](Self::BODY).
    const METHOD: u8 = 8;
    /// Something was read since the last write.
    const ASKING: u8 = 16;
    /// The bytes read since the last write begin with a request for a probe.
    const PROBE: u8 = 32;
    /// The last bytes that passed were read, end in an empty line, and are no probe. They may be the end of a
    /// request, and the service admitted requests when they came.
    const ASKED: u8 = 64;
    /// The `GET` or `HEAD` may have a body.
    const BODY: u8 = 128;

    pub(super) fn first_is_whole(self) -> bool {
        self.0 & Self::FIRST == Self::WHOLE
    }

    pub(super) fn is_asked(self) -> bool {
        self.0 & Self::ASKED != 0
    }

    #[inline]
    pub(super) fn is_asking(self) -> bool {
        self.0 & Self::ASKING != 0
    }

    pub(super) fn last_is_bodiless(self) -> bool {
        self.0 & (Self::BODILESS | Self::BODY) == Self::BODILESS
    }

    pub(super) fn note_first(&mut self, read: &[u8]) {
        let mut first = self.0 & Self::FIRST;
        for byte in read {
            first = match (byte, first) {
                (_, Self::WHOLE) => break,
                (b'\r', first) => first,
                (b'\n', Self::NOT_BEGUN) => Self::NOT_BEGUN,
                (b'\n', Self::IN_LINE) => Self::LINE_END,
                (b'\n', _) => Self::WHOLE,
                _ => Self::IN_LINE,
            };
        }
        self.0 = self.0 & !Self::FIRST | first;
    }

    /// A request may arrive in several reads, because servers first read a few bytes to tell HTTP/1 from
    /// HTTP/2. `admits` tells whether the service admits requests at this time, and `may_have_body` whether the head
    /// may announce a body in these bytes.
    #[inline]
    pub(super) fn note_last(
        &mut self,
        read: &[u8],
        is_probe: impl FnOnce() -> bool,
        admits: impl FnOnce() -> bool,
        may_have_body: impl FnOnce() -> bool,
    ) {
        let mut bits = self.0 & !(Self::BODILESS | Self::ASKED);
        if self.0 & Self::BODILESS != 0 && bits & Self::ASKING != 0 {
            // Another request follows before the response.
            bits &= !Self::PROBE;
        }
        if bits & Self::ASKING == 0 {
            bits |= Self::ASKING;
            let method = read.starts_with(b"GET ") || read.starts_with(b"HEAD ");
            bits &= !(Self::METHOD | Self::PROBE | Self::BODY);
            bits |= if method { Self::METHOD } else { 0 };
            bits |= if method && is_probe() { Self::PROBE } else { 0 };
        }
        if bits & Self::METHOD != 0 && may_have_body() {
            bits |= Self::BODY;
        }
        if read.ends_with(b"\r\n\r\n") {
            if bits & Self::METHOD != 0 {
                bits |= Self::BODILESS;
            }
            // A prober that has given up waiting has lost nothing.
            if bits & Self::PROBE == 0 && admits() {
                bits |= Self::ASKED;
            }
        }
        self.0 = bits;
    }

    /// A write begins, whether it succeeds or not.
    #[inline]
    pub(super) fn begins_write(&mut self) {
        self.0 &= !Self::ASKED;
    }

    #[inline]
    pub(super) fn wrote(&mut self) {
        self.0 &= !Self::ASKING;
    }
}

/// Whether a part of a head may announce a body. The part may begin and end within a line.
#[cold]
pub(super) fn may_have_body(part: &[u8]) -> bool {
    const LENGTH: &[u8] = b"content-length:";
    const ENCODING: &[u8] = b"transfer-encoding:";
    let begins = |line: &[u8], with: &[u8]| {
        let begin = line.get(..with.len());
        begin.is_some_and(|begin| begin.eq_ignore_ascii_case(with))
    };
    let mut lines = part.split(|byte| *byte == b'\n');
    let last = lines.next_back().unwrap_or_default();
    let is_begun = |name: &[u8]| begins(name, last) || begins(last, name);
    let ends_within = !last.is_empty() && (is_begun(LENGTH) || is_begun(ENCODING));
    let announces = |line: &[u8]| {
        begins(line, LENGTH) && line[LENGTH.len()..].trim_ascii() != b"0" || begins(line, ENCODING)
    };
    ends_within || lines.any(announces)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first_is_whole(reads: &[&[u8]]) -> bool {
        let mut heads = Heads::default();
        for read in reads {
            heads.note_first(read);
        }
        heads.first_is_whole()
    }

    #[test]
    fn a_whole_request_is_asked_until_a_write_begins_unless_it_is_a_probe_or_refused() {
        const HEAD: &[u8] = b"GET / HTTP/1.1\r\n\r\n";
        let after = |reads: &[&[u8]], is_probe: bool, admits: bool| {
            let mut heads = Heads::default();
            for read in reads {
                heads.note_last(read, || is_probe, || admits, || false);
            }
            heads
        };
        let (line, rest) = HEAD.split_at(5);
        for (reads, is_probe, admits, expected) in [
            (&[HEAD][..], false, true, true),
            (&[line, rest], false, true, true),
            (&[b"0\r\n\r\n"], false, true, true),
            (&[line], false, true, false),
            (&[HEAD, b"G"], false, true, false),
            (&[HEAD], false, false, false),
            (&[HEAD], true, true, false),
        ] {
            let mut heads = after(reads, is_probe, admits);
            assert_eq!(heads.is_asked(), expected, "{reads:?} {is_probe} {admits}");
            heads.begins_write();
            assert!(!heads.is_asked());
        }
    }

    #[test]
    fn a_part_of_a_head_that_announces_a_body_is_known_wherever_it_is_split() {
        for (head, body) in [
            ("GET / HTTP/1.1\r\nhost: a\r\n\r\n", false),
            ("GET / HTTP/1.1\r\nContent-Length: 10\r\n\r\n", true),
            (
                "GET / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n",
                true,
            ),
            (
                "GET / HTTP/1.1\r\ncontent-length: 0\r\nhost: a\r\n\r\n",
                false,
            ),
            (
                "GET /content-length: HTTP/1.1\r\nx-content-length: 4\r\n\r\n",
                false,
            ),
        ] {
            assert_eq!(may_have_body(head.as_bytes()), body, "{head:?}");
            for at in 0..head.len() {
                let (part, rest) = head.as_bytes().split_at(at);
                let found = may_have_body(part) || may_have_body(rest);
                assert!(found || !body, "{head:?} {at}");
            }
        }
    }

    #[test]
    fn the_first_head_ends_with_an_empty_line_in_any_pieces() {
        let whole: &[&[u8]] = &[
            b"GET / HTTP/1.1\r\nhost: test\r\n\r\n",
            b"GET / HTTP/1.1\n\n",
            b"\r\n\r\nGET / HTTP/1.1\r\n\r\nbody",
        ];
        for head in whole {
            assert!(first_is_whole(&[head]));
            let bytes: Vec<_> = head.chunks(1).collect();
            assert!(first_is_whole(&bytes));
        }
    }

    #[test]
    fn empty_lines_and_half_a_head_are_no_head() {
        let parts: &[&[u8]] = &[
            b"",
            b"\r\n",
            b"\r\n\r\n",
            b"\n\n\n",
            b"\r\n\r\nGET / HTTP/1.1\r\n",
            b"GET / HTTP/1.1\r\nhost: te",
            b"GET / HTTP/1.1\r\n\r",
        ];
        for part in parts {
            assert!(!first_is_whole(&[part]), "{part:?}");
            let bytes: Vec<_> = part.chunks(1).collect();
            assert!(!first_is_whole(&bytes), "{part:?} in pieces");
        }
    }
}
