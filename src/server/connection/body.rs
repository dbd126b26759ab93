//! The body of a response of `serve`.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use axum::body::Body;
use bytes::{Buf, Bytes};
use http_body::{Frame, SizeHint};
use tokio::time;

use super::owner::{OpenStream, Owner};
use crate::{
    connection::directive::Directive, phase::Phase, shutdown::closing::QUIET_BEFORE_CLOSE,
};

/// The body of a response.
///
/// When an HTTP/1 body of server-sent events ends while the service drains, its connection is closed.
/// Otherwise the client would reconnect on the same connection and be refused, and an `EventSource`
/// does not reconnect after a refusal. The head of the response was sent too early to ask the client to
/// leave. After other responses the connection stays open, and the next request on it is refused with a
/// 503: a client may not repeat a request, such as a `POST`, that is lost with its connection.
///
/// Over HTTP/2, pieces for which the peer has no window stay in the server after the task of the stream
/// has ended. So each piece counts as a stream until the server drops it.
pub(super) struct OwnedBody {
    pub(super) inner: Body,
    pub(super) owner: Option<Owner>,
    pub(super) http2: bool,
}

/// A piece of a response.
pub(super) struct Piece {
    bytes: Bytes,
    _counted: Option<OpenStream>,
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

impl OwnedBody {
    fn ended(&mut self) {
        let Some(owner) = self.owner.take() else {
            return;
        };
        if self.http2 || owner.phase() < Phase::Draining {
            return;
        }
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
        let frame = frame.map(|frame| {
            let counting = self.owner.as_ref().filter(|_| self.http2);
            frame.map(|frame| {
                frame.map_data(|bytes| Piece {
                    bytes,
                    _counted: counting.map(|owner| OpenStream::new(owner.clone())),
                })
            })
        });
        if !matches!(frame, Some(Ok(_))) || self.inner.is_end_stream() {
            self.ended();
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
