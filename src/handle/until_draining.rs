//! Streams that end when draining starts.

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
};

use futures_core::Stream;
use pin_project_lite::pin_project;

use super::graceful::{Graceful, PhaseReached};

impl Graceful {
    /// Ends a stream when draining starts. For subscriptions, which would not end otherwise.
    ///
    /// Use it only for such streams: a download or a generated text ends by itself, and the drain
    /// waits for it.
    ///
    /// Server-sent events, with a last event and the time after which an `EventSource` reconnects
    /// (`retry`, [in the HTML
    /// standard](https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation)):
    ///
    /// ```
    /// use std::{convert::Infallible, time::Duration};
    /// use axum::{extract::State, response::sse::{Event, KeepAlive, Sse}};
    /// use futures_util::{Stream, stream};
    /// use tower_graceful::Graceful;
    ///
    /// async fn events(
    ///     State(graceful): State<Graceful>,
    /// ) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    ///     let news = stream::pending(); // your events
    ///     // Without data, a browser fires no event.
    ///     let last = Event::default().event("goodbye").retry(Duration::from_secs(5)).data("deploy");
    ///     let events = graceful.until_draining(news).and_last(Ok(last));
    ///     // Writes while there are no events: otherwise a client that has disappeared is not noticed.
    ///     Sse::new(events).keep_alive(KeepAlive::default())
    /// }
    /// ```
    ///
    /// An `EventSource` does not reconnect after a 503, as it would after a connection that was
    /// refused or closed. So an `EventSource` that reconnects to a draining service stays closed for good. If no
    /// load balancer sends it to another server, set `retry` longer than the longest possible
    /// drain, or close the listener with
    /// [`keep_listening(false)`](crate::GracefulBuilder::keep_listening).
    ///
    /// A stream of gRPC messages ends with `.and_last(Err(Status::unavailable("moving")))`, a
    /// status with which clients retry elsewhere.
    pub fn until_draining<S: Stream>(&self, stream: S) -> UntilDraining<S> {
        UntilDraining {
            draining: self.draining(),
            last: None,
            stream: Some(stream),
        }
    }
}

pin_project! {
    /// A stream that ends when draining starts. [`Graceful::until_draining`] makes it.
    ///
    /// When draining starts, the inner stream is dropped, with the items that it has not yet
    /// returned. When the inner stream ends by itself, this stream ends too. Either way it stays
    /// ended.
    #[must_use = "streams do nothing unless polled"]
    pub struct UntilDraining<S: Stream> {
        draining: PhaseReached,
        last: Option<S::Item>,
        // `None` once this stream has ended, except for the last item.
        #[pin]
        stream: Option<S>,
    }
}

impl<S: Stream> UntilDraining<S> {
    /// Adds a last item, which is returned when draining starts. It is not returned if the inner
    /// stream ends by itself.
    pub fn and_last(mut self, item: S::Item) -> Self {
        self.last = Some(item);
        self
    }
}

impl<S: Stream> Stream for UntilDraining<S> {
    type Item = S::Item;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<S::Item>> {
        let mut this = self.project();
        let Some(stream) = this.stream.as_mut().as_pin_mut() else {
            return Poll::Ready(None);
        };
        // Polled first, because some streams are always ready.
        if Pin::new(this.draining).poll(cx).is_ready() {
            this.stream.set(None);
            return Poll::Ready(this.last.take());
        }
        let item = ready!(stream.poll_next(cx));
        if item.is_none() {
            this.stream.set(None);
        }
        Poll::Ready(item)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let Some(stream) = &self.stream else {
            return (0, Some(0));
        };
        let (_, most) = stream.size_hint();
        let last = usize::from(self.last.is_some());
        (0, most.and_then(|most| most.checked_add(last)))
    }
}

impl<S: Stream> fmt::Debug for UntilDraining<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UntilDraining")
            .field("ended", &self.stream.is_none())
            .finish_non_exhaustive()
    }
}
