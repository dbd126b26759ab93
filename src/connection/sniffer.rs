//! What the bytes read from a connection show: the protocol that the peer speaks, whether an HTTP/1
//! request head has begun, and whether the peer has closed its writing side.
//!
//! # Whether a head has begun
//!
//! `header_read_timeout` runs from the first byte of a head. That byte may have come in the same
//! read as the end of the previous request, and hyper does not expose its buffer. But the sequence
//! of reads shows it:
//!
//! 1. hyper reads only when its buffer is empty or contains a part of a head.
//! 2. When a request has ended and the buffer is empty, hyper tries to read before it waits for the
//!    next head: to see whether the client closes the connection, or because the response is out.
//!    So if its last read returned no bytes, the buffer is empty. If its last read returned bytes,
//!    some of them are left in the buffer, and these are the last bytes of that read.
//! 3. Empty lines before a request line do not begin a head ([RFC 9112 §2.2]), so leftover bytes
//!    count only if they contain something else. A part of a head that ends in an empty line would
//!    be a whole head, which hyper would have parsed. A part that ends in a single line break may
//!    look like a body that ends in a line break. Such a line break is therefore [held
//!    back](Sniffer::note) and passed to hyper as a separate read.
//! 4. By the second point, a part of a head that has come before hyper waits for it is a part of one
//!    read. So that read has the whole request line, and after it only fields. No other line break
//!    is held back: when a handler drops a body, hyper reads once more, and closes the connection if
//!    that read does not bring all of the rest. If the head is awaited, its first byte is seen
//!    anyway.
//! 5. hyper keeps empty lines until a head follows, hundreds of kilobytes of them. So a head has also
//!    begun if more empty lines have come than any client has a reason to send
//!    ([`MANY_LINE_BREAKS`]). A body may end in as many line breaks, but by the second point it has
//!    been consumed if the read after it returned no bytes.
//!
//! So a head has begun if the last read returned bytes whose last byte is not part of a line break, or
//! after [`MANY_LINE_BREAKS`]. This does not need the length of a body. Bytes are searched only in a read
//! that ends in a line break.
//!
//! # Handshakes
//!
//! After a handshake, of TLS for example, the bytes of the connection are not the bytes that the
//! server reads. Then the sniffer records the bytes that the outermost
//! [`GracefulIo`](crate::GracefulIo) passes to the server: each `GracefulIo` on a connection has a
//! layer number, and only the layer that was begun last records.
//!
//! # On other servers
//!
//! On a server other than `serve` the requests are not known. There the sniffer records only the protocol,
//! and whether the peer has closed its writing side.
//!
//! This file is long because the argument above and the code must be read together.
//!
//! [RFC 9112 §2.2]: https://www.rfc-editor.org/rfc/rfc9112#section-2.2

use tokio::io::ReadBuf;

use super::{
    line_break::{HELD_BACK, held_back_index, index_of, is_line_break},
    preface::{OTHER, UPGRADED, WHOLE, compared},
};
use crate::sync::{AtomicU8, AtomicU16, AtomicU32, Ordering::Relaxed};

/// So many reads of empty lines begin a head, while a head is awaited. Clients that send an empty line after a
/// body send one.
const MANY_LINE_BREAKS: u16 = 15;

/// In a longer read, so many bytes of line breaks count as a further read.
const PER_READ: u16 = 64;

/// Written by the task that reads the connection, and read without a lock. All accesses are
/// `Relaxed`: no other memory is published through these fields.
#[derive(Debug, Default)]
pub(crate) struct Sniffer {
    /// The number of reads that returned something other than empty lines. Wraps around.
    reads: AtomicU32,
    /// How much of the HTTP/2 preface has been read, or that the connection began with something
    /// else.
    preface: AtomicU8,
    /// The flags below, and between them the number of [line breaks](Self::line_breaks) and the end of the last
    /// read that is held back, as an index into [`HELD_BACK`].
    flags: AtomicU16,
    /// The number of the layer that records.
    layer: AtomicU8,
}

/// The connection belongs to a server of `serve`.
const LISTENING: u16 = 1;
/// The server waits for a head.
const AWAITING: u16 = 1 << 1;
/// The last read returned bytes, and the last of them is not part of a line break.
const MID_LINE: u16 = 1 << 2;
/// The peer has closed its writing side.
const ENDED: u16 = 1 << 3;
/// The connection was accepted when other connections had already been asked to leave.
const LATE: u16 = 1 << 4;
/// The server speaks HTTP/1 only.
const HTTP1_ONLY: u16 = 1 << 5;
/// The awaited head has begun. Has no meaning while no head is awaited.
const BEGUN: u16 = 1 << 6;
/// A head was completed since the flag was last cleared.
const COMPLETED: u16 = 1 << 7;
/// The position of the number of [line breaks](Sniffer::line_breaks), and its four bits.
const LINE_BREAKS_SHIFT: u32 = 8;
const LINE_BREAKS: u16 = MANY_LINE_BREAKS << LINE_BREAKS_SHIFT;
/// The position of the index into [`HELD_BACK`], and its three bits.
const HELD_BACK_SHIFT: u32 = 12;
const HELD_BACK_BITS: u16 = 7 << HELD_BACK_SHIFT;
const _: () = assert!(HELD_BACK.len() <= 8);
/// The last read found nothing, in the poll of the connection that is under way.
const FOUND_NOTHING: u16 = 1 << 15;

impl Sniffer {
    /// Not a read-modify-write: only one task writes, so no change is lost.
    #[inline]
    fn change(&self, clear: u16, set: u16) {
        let flags = self.flags.load(Relaxed) & !clear | set;
        self.flags.store(flags, Relaxed);
    }

    #[inline]
    fn set(&self, flag: u16, on: bool) {
        self.change(flag, if on { flag } else { 0 });
    }

    #[inline]
    fn has(&self, flag: u16) -> bool {
        self.flags.load(Relaxed) & flag != 0
    }

    #[inline]
    fn held_back(&self) -> u16 {
        (self.flags.load(Relaxed) & HELD_BACK_BITS) >> HELD_BACK_SHIFT
    }

    fn hold_back(&self, kept: u16) {
        self.change(HELD_BACK_BITS, kept << HELD_BACK_SHIFT);
    }

    /// The connection belongs to `serve`: everything read from now on is recorded. The first head is
    /// awaited from here on, because some of its bytes are read to tell HTTP/1 from HTTP/2.
    pub(crate) fn listen(&self) {
        self.set(LISTENING | AWAITING, true);
    }

    /// The connection belongs to a server of `serve`.
    pub(crate) fn is_listened_to(&self) -> bool {
        self.has(LISTENING)
    }

    /// The number of the layer that records.
    #[inline]
    pub(crate) fn layer(&self) -> u8 {
        self.layer.load(Relaxed)
    }

    /// Begins a new layer, from which nothing has been read yet. Returns its number.
    #[cfg_attr(not(feature = "axum"), expect(dead_code))]
    pub(crate) fn begin_layer(&self) -> u8 {
        self.reads.store(0, Relaxed);
        self.preface.store(0, Relaxed);
        self.flags.store(0, Relaxed);
        // Layers beyond the 255th share the last number.
        let layer = self.layer().saturating_add(1);
        self.layer.store(layer, Relaxed);
        layer
    }

    /// Whether something has been read.
    pub(crate) fn has_read(&self) -> bool {
        self.preface.load(Relaxed) > 0
    }

    /// Records that the bytes read from now on are not HTTP.
    #[cold]
    pub(crate) fn upgraded(&self) {
        self.preface.store(UPGRADED, Relaxed);
    }

    /// Records a read. Returns the number of bytes at the end of `read`, at most three, that the caller
    /// holds back until the next read.
    #[inline]
    pub(crate) fn note(&self, read: &[u8]) -> usize {
        if !self.has(LISTENING) {
            self.note_preface(read);
            return 0;
        }
        let kept = match self.preface.load(Relaxed) {
            WHOLE | UPGRADED => 0,
            _ => held_back_index(read),
        };
        let length = HELD_BACK[usize::from(kept)].len();
        if length > 0 {
            self.hold_back(kept);
        }
        self.note_passed(&read[..read.len() - length]);
        length
    }

    /// Whether the end of the last read is held back.
    #[inline]
    pub(crate) fn has_held_back(&self) -> bool {
        self.held_back() != 0
    }

    /// Passes on the bytes that were held back, as if the network had split the read there.
    #[cold]
    pub(crate) fn release_held_back(&self, buf: &mut ReadBuf<'_>) {
        let kept = HELD_BACK[usize::from(self.held_back())];
        let (passed, rest) = kept.split_at(kept.len().min(buf.remaining()));
        buf.put_slice(passed);
        self.note_passed(passed);
        self.hold_back(index_of(rest));
    }

    #[inline]
    fn note_preface(&self, read: &[u8]) {
        let preface = self.preface.load(Relaxed);
        if preface < WHOLE {
            self.preface.store(compared(preface, read), Relaxed);
        }
    }

    /// Records bytes that are passed on to the server.
    fn note_passed(&self, passed: &[u8]) {
        self.note_preface(passed);
        let from_the_end = passed
            .iter()
            .rev()
            .take((MANY_LINE_BREAKS * PER_READ).into());
        let at_the_end = from_the_end.take_while(|byte| is_line_break(**byte));
        let at_the_end: u16 = at_the_end.map(|_| 1).sum();
        let only = passed.iter().all(|byte| is_line_break(*byte));
        let mut line_breaks = at_the_end / PER_READ;
        if only && self.has(AWAITING) {
            let sum = self.line_breaks() + line_breaks + 1;
            line_breaks = sum.min(MANY_LINE_BREAKS);
        }
        let mut set = line_breaks << LINE_BREAKS_SHIFT;
        if !only && at_the_end == 0 {
            set |= MID_LINE;
        }
        if !only || line_breaks == MANY_LINE_BREAKS {
            set |= BEGUN;
        }
        self.change(MID_LINE | LINE_BREAKS | FOUND_NOTHING, set);
        if !only {
            let reads = self.reads().wrapping_add(1);
            self.reads.store(reads, Relaxed);
        }
    }

    /// How many line breaks may be left in the buffer of hyper, up to [`MANY_LINE_BREAKS`].
    #[inline]
    fn line_breaks(&self) -> u16 {
        (self.flags.load(Relaxed) & LINE_BREAKS) >> LINE_BREAKS_SHIFT
    }

    /// Records a read that found no bytes.
    #[inline]
    pub(crate) fn note_nothing(&self) {
        // Empty lines before an awaited head are not consumed.
        let consumed = if self.has(AWAITING) { 0 } else { LINE_BREAKS };
        self.change(MID_LINE | consumed, FOUND_NOTHING);
    }

    /// The server begins to poll the connection.
    #[inline]
    pub(crate) fn begin_poll(&self) {
        self.change(FOUND_NOTHING, 0);
    }

    /// Whether a read would find nothing, because one in the same poll of the connection has found nothing. If
    /// bytes have come since, they wake the task. Over HTTP/1 not while a request is running: after an upgrade
    /// other tasks read.
    #[inline]
    pub(crate) fn would_find_nothing(&self) -> bool {
        let both = AWAITING | FOUND_NOTHING;
        self.flags.load(Relaxed) & both == both
    }

    /// Records that the peer has closed its writing side.
    #[cold]
    pub(crate) fn note_end(&self) {
        self.note_nothing();
        self.change(FOUND_NOTHING, ENDED);
    }

    /// The peer has closed its writing side.
    pub(crate) fn has_ended(&self) -> bool {
        self.has(ENDED)
    }

    /// A number that changes when something other than empty lines has been read.
    pub(crate) fn reads(&self) -> u32 {
        self.reads.load(Relaxed)
    }

    /// The server calls this when hyper begins to wait for a head.
    pub(crate) fn await_head(&self) {
        // The first head is awaited already.
        if !self.has(AWAITING) {
            let begun = self.has(MID_LINE) || self.line_breaks() == MANY_LINE_BREAKS;
            self.change(BEGUN, AWAITING | if begun { BEGUN } else { 0 });
        }
    }

    /// The server calls this when a head is complete.
    #[inline]
    pub(crate) fn head_is_complete(&self) {
        self.change(AWAITING, COMPLETED);
    }

    /// Whether the server waits for a head.
    pub(crate) fn awaits_head(&self) -> bool {
        self.has(AWAITING)
    }

    /// Whether a head is awaited and has begun.
    #[inline]
    pub(crate) fn head_has_begun(&self) -> bool {
        let both = AWAITING | BEGUN;
        self.flags.load(Relaxed) & both == both && !self.is_http2()
    }

    /// Whether a head was completed since the last call.
    pub(crate) fn take_completed(&self) -> bool {
        let completed = self.has(COMPLETED);
        self.set(COMPLETED, false);
        completed
    }

    /// Whether the peer speaks HTTP/1, or the protocol that the connection was upgraded to.
    pub(crate) fn is_http1(&self) -> bool {
        self.preface.load(Relaxed) >= OTHER
    }

    /// Whether the peer speaks HTTP/2.
    pub(crate) fn is_http2(&self) -> bool {
        self.preface.load(Relaxed) == WHOLE
    }

    /// The server speaks HTTP/1 only.
    pub(crate) fn refuse_http2(&self) {
        self.set(HTTP1_ONLY, true);
    }

    /// The peer speaks HTTP/2 and the server does not.
    #[inline]
    pub(crate) fn is_refused(&self) -> bool {
        self.has(HTTP1_ONLY) && self.is_http2()
    }

    pub(crate) fn mark_joined_during_stop(&self) {
        self.set(LATE, true);
    }

    pub(crate) fn joined_during_stop(&self) -> bool {
        self.has(LATE)
    }
}

#[cfg(all(test, not(tower_graceful_loom)))]
mod tests {
    use super::*;
    use crate::connection::preface::PREFACE;

    fn sniffer(pieces: &[&[u8]]) -> Sniffer {
        let sniffer = Sniffer::default();
        sniffer.listen();
        for piece in pieces {
            sniffer.note(piece);
        }
        sniffer
    }

    #[test]
    fn the_preface_of_http2_is_known_in_any_pieces() {
        assert!(sniffer(&[&PREFACE]).is_http2());
        assert!(sniffer(&[&PREFACE, b"\0\0\0\x04"]).is_http2());
        assert!(sniffer(&[b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0"]).is_http2());
        let bytes: Vec<_> = PREFACE.chunks(1).collect();
        assert!(sniffer(&bytes).is_http2());
        assert!(!sniffer(&bytes[..23]).is_http2());
        assert!(!sniffer(&bytes[..23]).is_http1());
    }

    #[test]
    fn no_other_bytes_are_taken_for_the_preface() {
        assert!(!sniffer(&[]).is_http1());
        assert!(sniffer(&[b"PO"]).is_http1());
        assert!(!sniffer(&[b"GET / HTTP/1.1\r\n\r\n", &PREFACE]).is_http2());
        assert!(!sniffer(&[b"PRI * HTTP/1", &PREFACE]).is_http2());
        assert!(!sniffer(&[b"P", b"P", &PREFACE[1..]]).is_http2());
        assert!(!sniffer(&[&PREFACE[..5], b"x", &PREFACE[5..]]).is_http2());
    }

    /// Whether the next head has begun, when the server waits for it.
    fn next_has_begun(sniffer: &Sniffer) -> bool {
        sniffer.head_is_complete();
        assert!(!sniffer.head_has_begun());
        sniffer.await_head();
        assert!(sniffer.take_completed() && !sniffer.take_completed());
        sniffer.head_has_begun()
    }

    #[test]
    fn the_first_head_is_awaited_from_the_start_and_the_next_from_where_it_begins() {
        let sniffer = sniffer(&[b"GET"]);
        assert!(sniffer.head_has_begun());
        sniffer.await_head();
        assert!(sniffer.head_has_begun() && !sniffer.take_completed());
        sniffer.note(b" / HTTP/1.1\r\n\r\n");
        assert!(!next_has_begun(&sniffer));
        sniffer.note(b"G");
        assert!(sniffer.head_has_begun());
    }

    #[test]
    fn a_head_whose_first_bytes_came_with_the_request_before_has_begun() {
        let sniffer = sniffer(&[b"GET / HTTP/1.1\r\n\r\n"]);
        sniffer.await_head();
        sniffer.note(b" / HTTP/1.1\r\n\r\nG");
        assert!(next_has_begun(&sniffer));
        sniffer.note(b"GET / HTTP/1.1\r\n\r\nG");
        sniffer.note_nothing();
        assert!(!next_has_begun(&sniffer), "all was consumed");
    }

    #[test]
    fn a_read_is_repeated_in_one_poll_only_after_bytes_and_while_a_request_is_running() {
        let sniffer = sniffer(&[]);
        sniffer.note_nothing();
        assert!(sniffer.would_find_nothing());
        sniffer.note(b"GET / HTTP/1.1\r\n\r\n");
        assert!(!sniffer.would_find_nothing());
        sniffer.head_is_complete();
        sniffer.note_nothing();
        assert!(!sniffer.would_find_nothing(), "it may become an upgrade");
        sniffer.await_head();
        assert!(sniffer.would_find_nothing());
        sniffer.begin_poll();
        assert!(!sniffer.would_find_nothing());
        assert!(!sniffer.has_ended());
        sniffer.note_end();
        assert!(!sniffer.would_find_nothing(), "the end is not nothing");
        assert!(sniffer.has_ended());
    }

    #[test]
    fn the_number_of_reads_changes_unless_a_read_has_only_empty_lines() {
        let sniffer = sniffer(&[]);
        let mut last = sniffer.reads();
        for (read, changes) in [(&b"\r\n"[..], false), (b"GET", true), (b" / ", true)] {
            sniffer.note(read);
            assert_eq!(sniffer.reads() != last, changes);
            last = sniffer.reads();
        }
    }

    #[cfg(feature = "axum")]
    #[test]
    fn each_layer_has_a_number_and_begins_anew() {
        let sniffer = sniffer(&[b"hello"]);
        sniffer.note_end();
        for number in [1, 2] {
            assert_eq!(sniffer.begin_layer(), number);
            assert_eq!(sniffer.layer(), number);
            assert!(!sniffer.has_read() && !sniffer.has_ended() && !sniffer.is_listened_to());
        }
        for _ in 0..300 {
            sniffer.begin_layer();
        }
        assert_eq!(sniffer.layer(), u8::MAX);
    }

    #[test]
    fn a_connection_that_has_joined_during_the_stop_is_marked() {
        let sniffer = sniffer(&[]);
        assert!(!sniffer.joined_during_stop());
        sniffer.mark_joined_during_stop();
        assert!(sniffer.joined_during_stop());
    }

    #[test]
    fn empty_lines_begin_no_head() {
        for lines in [&b"\r\n"[..], b"\n", b"\r", b"\r\n\r\n", b"\r\n\r"] {
            let sniffer = sniffer(&[]);
            sniffer.await_head();
            assert_eq!(sniffer.note(lines), 0);
            assert!(!sniffer.head_has_begun(), "{lines:?}");
            assert!(!next_has_begun(&sniffer));
            sniffer.note(lines);
            assert!(!sniffer.head_has_begun(), "{lines:?}");
            sniffer.note(&[lines, b"G"].concat());
            assert!(sniffer.head_has_begun(), "{lines:?}");
        }
    }

    #[test]
    fn very_many_empty_lines_begin_a_head() {
        for lines in [&b"\n"[..], b"\r\n", b"\r\n\r\n\r\n"] {
            let sniffer = sniffer(&[]);
            for _ in 0..MANY_LINE_BREAKS {
                sniffer.note(lines);
                sniffer.note_nothing();
            }
            assert!(sniffer.head_has_begun(), "{lines:?}");
            sniffer.note(b"GET / HTTP/1.1\r\n\r\n");
            sniffer.note_nothing();
            assert!(!next_has_begun(&sniffer), "{lines:?}");
            sniffer.note(lines);
            assert!(!sniffer.head_has_begun(), "counted anew: {lines:?}");
        }
        assert!(sniffer(&[&[b'\n'; 1000]]).head_has_begun());
        let after_a_request = [b"GET / HTTP/1.1\r\n".as_slice(), &[b'\n'; 1000]].concat();
        let sniffer = sniffer(&[&after_a_request]);
        assert!(next_has_begun(&sniffer));
        sniffer.note(&after_a_request[..500]);
        assert!(
            !next_has_begun(&sniffer),
            "the end of a body and some empty lines"
        );
        sniffer.note(&after_a_request);
        sniffer.head_is_complete();
        sniffer.note_nothing();
        assert!(!next_has_begun(&sniffer), "all was consumed");
    }

    #[test]
    fn http2_has_no_heads_that_are_awaited() {
        let sniffer = sniffer(&[&PREFACE[..20]]);
        assert!(sniffer.head_has_begun());
        sniffer.note(&PREFACE[20..]);
        assert!(!sniffer.head_has_begun());
    }

    #[test]
    fn an_ambiguous_line_break_is_held_back() {
        for (kept, line_break) in HELD_BACK.into_iter().enumerate().skip(1) {
            let line = [b"bodyGET / HTTP/1.1", line_break].concat();
            assert_eq!(usize::from(held_back_index(&line)), kept, "{line:?}");
            let sniffer = sniffer(&[]);
            assert_eq!(sniffer.note(&line), line_break.len());
            sniffer.await_head();
            assert!(next_has_begun(&sniffer));
            // The bytes are passed on in order, as many as there is room for.
            let mut passed = Vec::new();
            while sniffer.has_held_back() {
                let mut memory = [0];
                let mut buf = ReadBuf::new(&mut memory);
                sniffer.release_held_back(&mut buf);
                passed.extend_from_slice(buf.filled());
                assert!(!next_has_begun(&sniffer));
            }
            assert_eq!(passed, line_break);
        }
        for line in [
            &b""[..],
            b"ok",
            b"ok\r\n\r\n",
            b"ok\n\n",
            b"ok\n\r\n",
            b"\r\n",
            b"ok\r\r",
            b"GET / HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\n\n",
            b"GET / HTTP/1.1\na: b\n\r\n",
            b"GET / HTTP/1.1\r\r",
        ] {
            assert_eq!(held_back_index(line), 0, "{line:?}");
        }
        let http2 = sniffer(&[&PREFACE]);
        assert_eq!(http2.note(b"GET / HTTP/1.1\r\n"), 0);
        let upgraded = sniffer(&[b"GET / HTTP/1.1\r\n\r\n"]);
        upgraded.upgraded();
        assert_eq!(upgraded.note(b"GET / HTTP/1.1\r\n"), 0);
    }

    #[test]
    fn a_line_break_that_cannot_be_in_a_part_of_a_head_is_not_held_back() {
        for part in [
            "GET / HTTP/1.1",
            "HTTP/1.1 200 / HTTP/1.0",
            "\r\n\nGET / HTTP/1.0",
            "POST / HTTP/1.1\r\n\r\nbodyGET / HTTP/1.1\nhost: test\r\nX-Note!:",
        ] {
            let part = part.to_owned() + "\r\n";
            assert_eq!(held_back_index(part.as_bytes()), 3, "{part:?}");
        }
        for body in [
            "ok",
            "a: b",
            "GET / HTTP/1.1\r\n\r\na: b",
            "GET / HTTP/1.1\n\na: b",
            "GET / HTTP/1.1\r\n: b",
            "GET / HTTP/1.1\r\n a: b",
            "GET / HTTP/1.1\r\na : b",
            "GET / HTTP/1.1\r\nno field",
            "GET / HTTP/1.1\r\n{\"a\":1}",
            "GET / HTTP/1.1\" 200",
            "GET / HTTP/2.0",
            "HTTP/1.1",
        ] {
            let body = body.to_owned() + "\n";
            assert_eq!(held_back_index(body.as_bytes()), 0, "{body:?}");
            let sniffer = sniffer(&[b"POST / HTTP/1.1\r\n\r\n"]);
            sniffer.head_is_complete();
            assert_eq!(sniffer.note(body.as_bytes()), 0);
            sniffer.await_head();
            assert!(!sniffer.head_has_begun(), "{body:?}");
            // Of an awaited head the first byte is enough.
            sniffer.note(body.as_bytes());
            assert!(sniffer.head_has_begun(), "{body:?}");
        }
    }
}
