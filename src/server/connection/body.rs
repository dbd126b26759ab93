//! The bodies of requests and responses of `serve`.

use std::{
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use axum::body::Body;
use bytes::{Buf, Bytes};
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time;

use super::owner::{OpenStream, OpenUpload, Owner};
use crate::{
    connection::{directive::Directive, flags::RESPONDED},
    middleware::body_poll::guarded,
    phase::Phase,
    shutdown::closing::QUIET_BEFORE_CLOSE,
    sync::{AtomicBool, Ordering},
};

/// The body of a response.
pub(super) struct OwnedBody {
    pub(super) inner: Body,
    pub(super) kind: Kind,
}

/// What the connection has to know about the end of a response.
pub(super) enum Kind {
    Other,
    /// An HTTP/1 response of server-sent events. When it ends while the service drains, its connection is
    /// closed. Otherwise the client would reconnect on the same connection and be refused, and an
    /// `EventSource` does not reconnect after a refusal. The head of the response was sent too early to
    /// ask the client to leave. After other responses the connection stays open, and the next request on
    /// it is refused with a 503: a client may not repeat a request, such as a `POST`, that is lost with
    /// its connection.
    Events(Owner),
    /// An HTTP/2 response. Pieces for which the peer has no window stay in the server after the task of the
    /// stream has ended. So a response counts as a stream until the server has dropped all its pieces,
    /// and if the connection is cut before, the report counts its request as cut.
    Http2(Owner),
    /// An HTTP/2 response of which a piece has been passed to the server.
    Pieces(Arc<HeldResponse>),
}

/// A piece of a response.
pub(super) struct Piece {
    bytes: Bytes,
    /// Only in the piece of an HTTP/2 response of one piece that ends before the stop. Most responses are
    /// such, and take no allocation for this.
    _only: Option<OpenStream>,
}

/// Counts an HTTP/2 response while its body or one of its pieces is left.
pub(super) struct HeldResponse {
    stream: OpenStream,
    has_ended: AtomicBool,
}

/// The body of an HTTP/2 request.
pub(super) struct Upload {
    pub(super) inner: Incoming,
    pub(super) open: Option<OpenUpload>,
}

impl http_body::Body for Upload {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(cx));
        if !matches!(frame, Some(Ok(_))) {
            self.open = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl HeldResponse {
    fn new(owner: Owner) -> Self {
        Self {
            stream: OpenStream::new(owner),
            has_ended: AtomicBool::new(false),
        }
    }

    /// The body has ended, so that its request is in flight no longer. A response that ends before the stop
    /// belongs to no request of the report.
    fn end(&self) {
        if self.stream.owner().phase() > Phase::Serving {
            self.has_ended.store(true, Ordering::Relaxed);
            self.stream.state().response_is_held();
        }
    }
}

impl Drop for HeldResponse {
    fn drop(&mut self) {
        if self.has_ended.load(Ordering::Relaxed) {
            self.stream.state().response_is_released();
        }
    }
}

impl Piece {
    fn uncounted(bytes: Bytes) -> Self {
        Self { bytes, _only: None }
    }
}

impl Buf for Piece {
    fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.chunk()
    }

    fn advance(&mut self, bytes: usize) {
        self.bytes.advance(bytes);
    }

    fn copy_to_bytes(&mut self, length: usize) -> Bytes {
        self.bytes.copy_to_bytes(length)
    }
}

impl Kind {
    /// A part of the response passes. A connection that waits for its client must know whether it is one of the stop.
    fn goes_out(&self) {
        let owner = match self {
            Self::Http2(owner) => owner,
            Self::Pieces(response) => response.stream.owner(),
            // Over HTTP/1 each write tells.
            Self::Other | Self::Events(_) => return,
        };
        if owner.phase() > Phase::Serving {
            owner.0.flags.set(RESPONDED);
        }
    }

    /// Makes a piece. `is_last`: no other piece follows.
    fn piece(&mut self, bytes: Bytes, is_last: bool) -> Piece {
        match mem::replace(self, Self::Other) {
            Self::Http2(owner) if is_last && owner.phase() == Phase::Serving => {
                return Piece {
                    bytes,
                    _only: Some(OpenStream::new(owner)),
                };
            }
            Self::Http2(owner) => *self = Self::Pieces(Arc::new(HeldResponse::new(owner))),
            other => *self = other,
        }
        let bytes = match self {
            Self::Pieces(response) => guarded(bytes, Arc::clone(response)),
            _ => bytes,
        };
        Piece::uncounted(bytes)
    }

    /// The body has ended.
    fn ended(&mut self) {
        let owner = match mem::replace(self, Self::Other) {
            Self::Pieces(response) => return response.end(),
            Self::Events(owner) if owner.phase() >= Phase::Draining => owner,
            _ => return,
        };
        let reads = owner.0.sniffer.reads();
        tokio::spawn(async move {
            time::sleep(QUIET_BEFORE_CLOSE).await;
            // A request that has arrived in the meantime is answered instead.
            if owner.0.sniffer.reads() == reads {
                owner.0.state.instruct(Directive::Close);
            }
        });
    }
}

impl http_body::Body for OwnedBody {
    type Data = Piece;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Piece>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(cx));
        if let Kind::Other = self.kind {
            let frame = frame.map(|frame| frame.map(|frame| frame.map_data(Piece::uncounted)));
            return Poll::Ready(frame);
        }
        if !matches!(frame, Some(Err(_))) {
            self.kind.goes_out();
        }
        let is_last = match &frame {
            Some(Ok(frame)) => frame.is_trailers() || self.inner.is_end_stream(),
            // The response has failed, and its stream is reset.
            Some(Err(_)) => false,
            None => true,
        };
        let kind = &mut self.kind;
        let frame = frame
            .map(|frame| frame.map(|frame| frame.map_data(|bytes| kind.piece(bytes, is_last))));
        if is_last {
            self.kind.ended();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, task::Waker};

    use http::HeaderMap;
    use http_body::Body as _;
    use http_body_util::StreamBody;

    use super::*;
    use crate::{Graceful, connection::entry::ConnectionEntry, shutdown::Shared};

    type Frames = Vec<Frame<Bytes>>;

    fn connected(graceful: &Graceful) -> Arc<ConnectionEntry<Shared>> {
        let shared = graceful.shared();
        shared.connections.insert(shared.clone(), None)
    }

    fn body(entry: &Arc<ConnectionEntry<Shared>>, inner: axum::body::Body) -> OwnedBody {
        OwnedBody {
            inner,
            kind: Kind::Http2(Owner(Arc::clone(entry))),
        }
    }

    fn of_frames(frames: Frames) -> Body {
        let frames = frames.into_iter().map(Ok::<_, Infallible>);
        Body::new(StreamBody::new(futures_util::stream::iter(frames)))
    }

    /// Polls the next frame, and returns its piece.
    fn next(body: &mut OwnedBody) -> Option<Piece> {
        let mut cx = Context::from_waker(Waker::noop());
        match Pin::new(body).poll_frame(&mut cx) {
            Poll::Ready(Some(Ok(frame))) => frame.into_data().ok(),
            Poll::Ready(None) => None,
            _ => panic!("a frame that is ready, or the end"),
        }
    }

    #[test]
    fn a_response_is_unsent_from_the_end_of_its_body_until_its_last_piece_is_dropped() {
        let graceful = Graceful::new();
        graceful.shared().advance(Phase::LameDuck);
        let entry = connected(&graceful);
        let state = &entry.state;
        let data = || Frame::data(Bytes::from_static(b"piece"));
        let trailers = Frame::trailers(HeaderMap::new());
        for (frames, pieces) in [
            (vec![data(), data()], 2),
            (vec![data(), data(), trailers], 2),
        ] {
            let mut body = body(&entry, of_frames(frames));
            let held: Vec<_> = (0..pieces).map(|_| next(&mut body).unwrap()).collect();
            assert_eq!((state.unsent(), state.has_streams()), (0, true));
            assert!(next(&mut body).is_none());
            assert_eq!(state.unsent(), 1);
            drop(body);
            let mut held = held.into_iter();
            drop(held.next());
            assert_eq!((state.unsent(), state.has_streams()), (1, true));
            drop(held);
            assert_eq!((state.unsent(), state.has_streams()), (0, false));
        }
    }

    #[test]
    fn the_only_piece_of_a_body_of_known_length_is_its_last() {
        let graceful = Graceful::new();
        let entry = connected(&graceful);
        let state = &entry.state;
        // What ends before the stop belongs to no request of the report.
        for (phase, unsent) in [(Phase::Serving, 0), (Phase::LameDuck, 3)] {
            graceful.shared().advance(phase);
            let pieces: Vec<_> = (0..3)
                .map(|_| next(&mut body(&entry, Body::from("whole"))).unwrap())
                .collect();
            assert_eq!((state.unsent(), state.has_streams()), (unsent, true));
            drop(pieces);
            assert_eq!((state.unsent(), state.has_streams()), (0, false));
        }
    }

    #[test]
    fn a_body_that_is_dropped_before_its_end_is_not_unsent() {
        let graceful = Graceful::new();
        let entry = connected(&graceful);
        let data = || Frame::data(Bytes::from_static(b"piece"));
        let mut body = body(&entry, of_frames(vec![data(), data()]));
        let held = next(&mut body).unwrap();
        drop(body);
        assert_eq!((entry.state.unsent(), entry.state.has_streams()), (0, true));
        drop(held);
        assert!(!entry.state.has_streams());
    }

    /// Also its end, which is a frame of its own. An error is no part of a response.
    #[test]
    fn a_part_of_a_response_that_goes_out_during_the_stop_is_known() {
        let data = || vec![Ok(Frame::data(Bytes::from_static(b"event")))];
        let none: fn() -> Vec<_> = Vec::new;
        for (phase, frames, responded) in [
            (Phase::Serving, data(), false),
            (Phase::LameDuck, data(), true),
            (Phase::LameDuck, none(), true),
            (Phase::LameDuck, vec![Err("failed")], false),
        ] {
            let graceful = Graceful::new();
            let entry = connected(&graceful);
            graceful.shared().advance(phase);
            let what = format!("{phase:?} {frames:?}");
            let inner = Body::new(StreamBody::new(futures_util::stream::iter(frames)));
            let mut body = body(&entry, inner);
            let mut cx = Context::from_waker(Waker::noop());
            assert!(Pin::new(&mut body).poll_frame(&mut cx).is_ready());
            assert_eq!(entry.flags.has(RESPONDED), responded, "{what}");
        }
    }

    #[test]
    fn an_http1_response_is_not_counted() {
        let graceful = Graceful::new();
        let entry = connected(&graceful);
        let mut body = body(&entry, Body::from("whole"));
        body.kind = Kind::Events(Owner(Arc::clone(&entry)));
        let _held = next(&mut body).unwrap();
        assert_eq!(
            (entry.state.unsent(), entry.state.has_streams()),
            (0, false)
        );
    }
}
