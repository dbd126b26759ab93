//! Whether bytes of an HTTP/2 connection belong to a request or a response. Each frame begins with its length, type and
//! flags ([RFC 9113 §4.1](https://www.rfc-editor.org/rfc/rfc9113#section-4.1)). Servers write whole frames, except if
//! the connection is blocked, and usually read whole frames.

/// The length of the head of a frame.
const HEAD: usize = 9;

const PING: u8 = 6;

/// The flag of an answer to a PING.
const ACK: u8 = 1;

/// Whether a part of a response may be in these bytes: anything but whole frames that a server sends without one.
pub(super) fn may_be_response(written: &[u8]) -> bool {
    may_be_other(written, |_, _| false)
}

/// Whether a live peer with open streams may have sent these bytes: an answer to a PING, or anything but whole frames
/// that do not belong to a request.
pub(super) fn may_be_answer(read: &[u8]) -> bool {
    may_be_other(read, |kind, flags| kind == PING && flags & ACK != 0)
}

/// Whether these bytes may contain anything but whole frames about the connection or its windows, or contain one for
/// which `is_other` returns true. Its arguments are the type and the flags.
fn may_be_other(mut bytes: &[u8], is_other: impl Fn(u8, u8) -> bool) -> bool {
    while !bytes.is_empty() {
        let Some((&[high, middle, low, kind, flags], _)) = bytes.split_first_chunk() else {
            return true;
        };
        let length = u32::from_be_bytes([0, high, middle, low]) as usize;
        let is_control = match kind {
            PING => length == 8,
            // PRIORITY
            2 => length == 5,
            // RST_STREAM and WINDOW_UPDATE
            3 | 8 => length == 4,
            // SETTINGS
            4 => length % 6 == 0,
            // GOAWAY
            7 => length >= 8,
            _ => false,
        };
        match bytes.get(HEAD + length..) {
            Some(rest) if is_control && !is_other(kind, flags) => bytes = rest,
            _ => return true,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, length: u8) -> Vec<u8> {
        let mut frame = vec![0; HEAD + usize::from(length)];
        (frame[2], frame[3]) = (length, kind);
        frame
    }

    #[test]
    fn only_whole_frames_that_no_response_has_are_none() {
        // What closing sends.
        let closing = [frame(7, 8), frame(6, 8), frame(7, 30)].concat();
        let others = [frame(4, 0), frame(4, 12), frame(8, 4), frame(3, 4)].concat();
        for (written, expected) in [
            (vec![], false),
            (closing.clone(), false),
            (others, false),
            // DATA, HEADERS, PUSH_PROMISE, CONTINUATION, and an unknown type
            (frame(0, 0), true),
            (frame(1, 20), true),
            (frame(5, 4), true),
            (frame(9, 4), true),
            (frame(10, 4), true),
            ([closing.clone(), frame(0, 11)].concat(), true),
            // Within a frame.
            (closing[..3].to_vec(), true),
            (closing[..closing.len() - 1].to_vec(), true),
            (b"a piece of a body".to_vec(), true),
            (vec![0, 0, 4, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4], true),
        ] {
            assert_eq!(may_be_response(&written), expected, "{written:?}");
        }
    }

    #[test]
    fn a_peer_answers_a_ping_or_sends_a_part_of_a_request() {
        let mut pong = frame(PING, 8);
        pong[4] = ACK;
        let window = frame(8, 4);
        for (read, expected) in [
            (window.clone(), false),
            (
                [frame(PING, 8), frame(4, 0), frame(2, 5), frame(3, 4)].concat(),
                false,
            ),
            (pong.clone(), true),
            ([window.clone(), pong.clone()].concat(), true),
            (pong[..5].to_vec(), true),
            (pong[3..].to_vec(), true),
            ([window.clone(), frame(0, 3)].concat(), true),
            (frame(1, 20), true),
        ] {
            assert_eq!(may_be_answer(&read), expected, "{read:?}");
        }
    }
}
