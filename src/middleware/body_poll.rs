//! What a poll of the inner body means for its request, and the frames that are counted until the
//! server drops their data. `body` has the argument.

use std::task::Poll;

use bytes::{Buf, Bytes};
use http_body::{Body, Frame};

use crate::handle::graceful::Permit;

/// The size in bytes from which on a last frame does not end its request.
const LARGE: usize = 16 * 1024;

pub(super) type Polled<B> = Poll<Option<Result<Frame<<B as Body>::Data>, <B as Body>::Error>>>;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum BodyState {
    Open,
    Ended,
    /// The body returned an error, or it panicked.
    Failed,
}

/// The permit, if the request stays in flight after this frame even if the frame is the last one.
// A call would move each frame once more.
#[expect(clippy::inline_always)]
#[inline(always)]
pub(super) fn outliving<'a, D: Buf>(
    permit: Option<&'a Permit>,
    frame: &Frame<D>,
) -> Option<&'a Permit> {
    let permit = permit?;
    let data = frame.data_ref()?;
    (data.remaining() >= LARGE || permit.word().is_stopping()).then_some(permit)
}

/// Returns the frame, counted as a piece until the server drops its data.
#[cold]
#[inline(never)]
pub(super) fn counted<D: Buf + From<Bytes>>(permit: &Permit, frame: Frame<D>) -> Frame<D> {
    frame.map_data(|mut data| {
        let data = data.copy_to_bytes(data.remaining());
        guarded(data, permit.piece()).into()
    })
}

/// Returns the bytes. `guard` is dropped with the last part of them.
pub(crate) fn guarded(bytes: Bytes, guard: impl Send + 'static) -> Bytes {
    struct Guarded<G> {
        bytes: Bytes,
        _guard: G,
    }

    impl<G> AsRef<[u8]> for Guarded<G> {
        fn as_ref(&self) -> &[u8] {
            &self.bytes
        }
    }

    Bytes::from_owner(Guarded {
        bytes,
        _guard: guard,
    })
}
