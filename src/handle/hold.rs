//! Holds: work that no response carries, and that the drain waits for.

use std::{
    borrow::Cow,
    fmt,
    future::poll_fn,
    pin::pin,
    task::{Poll, ready},
    time::Duration,
};

use futures_core::Stream;
use futures_sink::Sink;
use tokio::{task::JoinHandle, time};

use super::graceful::Graceful;

impl Graceful {
    /// Holds the drain until the returned [`Hold`] is dropped: for work that no response carries,
    /// such as the task of a WebSocket. To spawn a job, use [`spawn`](Self::spawn).
    ///
    /// It counts in [`in_flight`](Self::in_flight), and not against
    /// [`max_in_flight`](crate::GracefulBuilder::max_in_flight). What holds beyond the drain
    /// deadline is not waited for, and the report names it. Take it before the request that it
    /// continues is over, so that the drain does not end in between:
    ///
    /// ```
    /// # use tower_graceful::Graceful;
    /// # async fn send_mail() {}
    /// async fn order(graceful: Graceful) -> &'static str {
    ///     let hold = graceful.hold("order mail");
    ///     tokio::spawn(async move {
    ///         send_mail().await;
    ///         drop(hold);
    ///     });
    ///     "ordered"
    /// }
    /// ```
    pub fn hold(&self, name: impl Into<Cow<'static, str>>) -> Hold {
        let key = self.shared().work.hold(name.into());
        Hold {
            graceful: self.clone(),
            key,
        }
    }

    /// Spawns a task that the drain waits for: [`hold`](Self::hold) and [`tokio::spawn`] in one.
    ///
    /// The hold begins before this returns, and ends when the future has been dropped: after it
    /// has completed or panicked, or the task was aborted.
    ///
    /// ```
    /// # use tower_graceful::Graceful;
    /// # async fn send_mail() {}
    /// async fn order(graceful: Graceful) -> &'static str {
    ///     graceful.spawn("order mail", send_mail());
    ///     "ordered"
    /// }
    /// ```
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime, as `tokio::spawn` does.
    #[track_caller]
    pub fn spawn<F>(&self, name: impl Into<Cow<'static, str>>, future: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send + 'static> + Send + 'static,
    {
        let hold = self.hold(name);
        tokio::spawn(async move {
            // Captured first, and so dropped before the hold also where this is never polled.
            let output = future.await;
            drop(hold);
            output
        })
    }
}

/// Holds the drain until it is dropped. Made by [`Graceful::hold`].
#[must_use = "the hold ends when this is dropped"]
pub struct Hold {
    graceful: Graceful,
    key: usize,
}

impl Hold {
    /// Closes the WebSocket that was held for: sends `close`, and waits for `within` at most until
    /// the peer has closed too. Then the socket is dropped, and the hold. Says whether the peer has
    /// closed.
    ///
    /// What the peer sends meanwhile is read and dropped. A peer that does not answer, or does not
    /// read what it is sent, holds the drain no longer than `within`. Dropping this future drops
    /// the socket too.
    ///
    /// `close` is whatever a Close frame is to the library at hand: 1001, "going away", is what
    /// [RFC 6455 §7.4.1](https://www.rfc-editor.org/rfc/rfc6455#section-7.4.1) has for a server that
    /// goes down; [1012](https://www.iana.org/assignments/websocket/websocket.xhtml#close-code-number)
    /// says that it is to come back. The reason has room for 123 bytes.
    ///
    /// A handler for axum. The hold is taken before the upgrade, because the request is over with
    /// the response that announces it:
    ///
    /// ```
    /// use std::time::Duration;
    /// use axum::{
    ///     extract::{State, ws::{CloseFrame, Message, WebSocketUpgrade, close_code}},
    ///     response::Response,
    /// };
    /// use tower_graceful::Graceful;
    ///
    /// async fn echo(upgrade: WebSocketUpgrade, State(graceful): State<Graceful>) -> Response {
    ///     let hold = graceful.hold("echo"); // the drain waits
    ///     upgrade.on_upgrade(move |mut socket| async move {
    ///         let mut draining = graceful.draining();
    ///         loop {
    ///             tokio::select! {
    ///                 () = &mut draining => break, // the handler is told
    ///                 message = socket.recv() => match message {
    ///                     Some(Ok(message)) => drop(socket.send(message).await),
    ///                     _ => return,
    ///                 },
    ///             }
    ///         }
    ///         let goodbye = CloseFrame { code: close_code::AWAY, reason: "deploy".into() };
    ///         hold.close_socket(socket, Message::Close(Some(goodbye)), Duration::from_secs(2)).await;
    ///     })
    /// }
    /// ```
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime with timers, when it is polled.
    // Written so for the order in which what it takes is dropped.
    #[expect(clippy::manual_async_fn)]
    pub fn close_socket<S, M, E>(
        self,
        socket: S,
        close: M,
        within: Duration,
    ) -> impl Future<Output = bool> + use<S, M, E>
    where
        S: Stream<Item = Result<M, E>> + Sink<M>,
    {
        async move {
            // First, and so dropped before the hold also where this is never polled.
            let closed = closed(socket, close);
            let closed = time::timeout(within, closed).await.unwrap_or(false);
            drop(self);
            closed
        }
    }
}

/// Sends `close`, and resolves when the peer has closed: whether it has.
async fn closed<S, M, E>(socket: S, close: M) -> bool
where
    S: Stream<Item = Result<M, E>> + Sink<M>,
{
    let mut socket = pin!(socket);
    let mut close = Some(close);
    let mut sending = true;
    // Reads beside sending: a peer that is sending too may not read before it has been read.
    poll_fn(|cx| {
        if sending && close.is_some() {
            match socket.as_mut().poll_ready(cx) {
                Poll::Ready(Ok(())) => {
                    sending = close
                        .take()
                        .is_some_and(|close| socket.as_mut().start_send(close).is_ok());
                }
                // What that means, reading tells.
                Poll::Ready(Err(_)) => sending = false,
                Poll::Pending => {}
            }
        }
        if sending && close.is_none() && socket.as_mut().poll_flush(cx).is_ready() {
            sending = false;
        }
        for _ in 0..MESSAGES {
            match ready!(socket.as_mut().poll_next(cx)) {
                Some(Ok(_)) => {}
                Some(Err(_)) => return Poll::Ready(false),
                None => return Poll::Ready(true),
            }
        }
        // There may be thousands in one buffer, and time is to pass for others.
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await
}

/// How many messages are read before others have their turn.
const MESSAGES: usize = 32;

impl Drop for Hold {
    fn drop(&mut self) {
        let shared = self.graceful.shared();
        if shared.work.release(self.key, || shared.phase()) {
            shared.notify();
        }
    }
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hold")
            .field("graceful", &self.graceful)
            .finish_non_exhaustive()
    }
}
