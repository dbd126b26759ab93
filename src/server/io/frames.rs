//! Whether bytes that an HTTP/2 server has written belong to a response. Each frame begins with its length and type
//! ([RFC 9113 §4.1](https://www.rfc-editor.org/rfc/rfc9113#section-4.1)), and servers write whole frames, except if
//! the connection is blocked.

/// The length of the head of a frame.
const HEAD: usize = 9;

/// Whether a part of a response may be in these bytes: anything but whole frames that a server sends without one.
pub(super) fn may_be_response(mut written: &[u8]) -> bool {
    while !written.is_empty() {
        let Some(([high, middle, low, kind], _)) = written.split_first_chunk() else {
            return true;
        };
        let length = u32::from_be_bytes([0, *high, *middle, *low]) as usize;
        let is_control = match kind {
            // PING
            6 => length == 8,
            // RST_STREAM and WINDOW_UPDATE
            3 | 8 => length == 4,
            // SETTINGS
            4 => length % 6 == 0,
            // GOAWAY
            7 => length >= 8,
            _ => false,
        };
        match written.get(HEAD + length..) {
            Some(rest) if is_control => written = rest,
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
}
