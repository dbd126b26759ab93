use tokio::io::ReadBuf;

/// The longest end of a read that is kept.
const MOST_KEPT: usize = 3;

/// The end of a read that is handed on as a read of its own, as if the network had split it there.
/// `Heard::note` says which, and its module why.
#[derive(Debug, Default)]
pub(super) struct Kept {
    bytes: [u8; MOST_KEPT],
    length: u8,
}

impl Kept {
    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Takes the last `length` bytes, at most three, out of the buffer.
    #[cold]
    pub(super) fn take(&mut self, buf: &mut ReadBuf<'_>, length: usize) {
        let passed = buf.filled().len() - length;
        for (kept, byte) in self.bytes.iter_mut().zip(&buf.filled()[passed..]) {
            *kept = *byte;
            self.length += 1;
        }
        buf.set_filled(passed);
    }

    /// Puts as much into the buffer as there is room for.
    #[cold]
    pub(super) fn hand_on(&mut self, buf: &mut ReadBuf<'_>) {
        let length = usize::from(self.length).min(buf.remaining());
        buf.put_slice(&self.bytes[..length]);
        self.bytes.rotate_left(length);
        // At most three.
        #[expect(clippy::cast_possible_truncation)]
        let length = length as u8;
        self.length -= length;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_handed_on_in_order_and_as_there_is_room() {
        let mut memory = [0; 8];
        let mut buf = ReadBuf::new(&mut memory);
        buf.put_slice(b"ok\r\n\r");
        let mut kept = Kept::default();
        assert!(kept.is_empty());
        kept.take(&mut buf, 3);
        assert_eq!(buf.filled(), b"ok");
        let mut small = [0; 2];
        let mut small = ReadBuf::new(&mut small);
        kept.hand_on(&mut small);
        assert_eq!(small.filled(), b"\r\n");
        assert!(!kept.is_empty());
        kept.hand_on(&mut buf);
        assert_eq!(buf.filled(), b"ok\r");
        assert!(kept.is_empty());
    }
}
