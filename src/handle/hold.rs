//! Holds: guards for work that belongs to no response, and that the drain waits for.

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
    /// Keeps the drain waiting until the returned [`Hold`] is dropped. For work that belongs to no
    /// response, such as the task of a WebSocket. To spawn a job, use [`spawn`](Self::spawn).
    ///
    /// Take the hold before the request that it continues has ended, so that the drain does not end
    /// in between:
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
    ///
    /// A hold counts in [`in_flight`](Self::in_flight), but not against
    /// [`max_in_flight`](crate::GracefulBuilder::max_in_flight). The drain does not wait beyond the
    /// drain deadline; the report names the holds that are still active then.
    pub fn hold(&self, name: impl Into<Cow<'static, str>>) -> Hold {
        let key = self.shared().work.hold(name.into());
        Hold {
            graceful: self.clone(),
            key,
        }
    }

    /// Spawns a task that the drain waits for: [`hold`](Self::hold) and [`tokio::spawn`] in one.
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
    /// The hold begins before this returns. It ends when the future has been dropped, after it has
    /// completed or panicked, or after the task was aborted.
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
            // The future is captured first. So it is dropped before the hold, even if the task is
            // never polled.
            let output = future.await;
            drop(hold);
            output
        })
    }
}

/// Keeps the drain waiting until it is dropped. [`Graceful::hold`] makes one.
#[must_use = "the hold ends when this is dropped"]
pub struct Hold {
    graceful: Graceful,
    key: usize,
}

impl Hold {
    /// Closes a WebSocket: sends the message `close`, waits until the peer has closed too, for at
    /// most `within`, and then drops the socket and the hold. Returns whether the peer has closed.
    ///
    /// An axum handler. The hold is taken before the upgrade, because the request ends with the
    /// response that announces the upgrade:
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
    ///         // One future, so that draining ends it even while it waits for a client that does not read.
    ///         let echo = async {
    ///             while let Some(Ok(message)) = socket.recv().await {
    ///                 if socket.send(message).await.is_err() {
    ///                     break;
    ///                 }
    ///             }
    ///         };
    ///         tokio::select! {
    ///             () = graceful.draining() => {}
    ///             () = echo => return,
    ///         }
    ///         let close = CloseFrame { code: close_code::AWAY, reason: "deploy".into() };
    ///         hold.close_socket(socket, Message::Close(Some(close)), Duration::from_secs(2)).await;
    ///     })
    /// }
    /// ```
    ///
    /// `close` is the Close frame in the type of your WebSocket library. [RFC 6455
    /// §7.4.1](https://www.rfc-editor.org/rfc/rfc6455#section-7.4.1) defines the code 1001, "going
    /// away", for a server that goes down. The code
    /// [1012](https://www.iana.org/assignments/websocket/websocket.xhtml#close-code-number),
    /// "service restart", tells clients that the server comes back. The reason has room for 123
    /// bytes.
    ///
    /// Messages that the peer sends meanwhile are read and dropped. A peer that does not answer, or
    /// does not read, keeps the drain waiting for at most `within`. Dropping this future drops the
    /// socket and the hold.
    ///
    /// # Panics
    ///
    /// When polled outside a tokio runtime with timers.
    // Not an `async fn`, so that the arguments are dropped in the right order.
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
            // Captured first. So it is dropped before the hold, even if this is never polled.
            let closed = closed(socket, close);
            let closed = time::timeout(within, closed).await.unwrap_or(false);
            drop(self);
            closed
        }
    }
}

/// Sends `close`, and reads until the peer has closed. Returns whether it has.
async fn closed<S, M, E>(socket: S, close: M) -> bool
where
    S: Stream<Item = Result<M, E>> + Sink<M>,
{
    let mut socket = pin!(socket);
    let mut close = Some(close);
    let mut sending = true;
    // Reads while it sends: a peer that is also sending may not read before its own data has been
    // read.
    poll_fn(|cx| {
        if sending && close.is_some() {
            match socket.as_mut().poll_ready(cx) {
                Poll::Ready(Ok(())) => {
                    sending = close
                        .take()
                        .is_some_and(|close| socket.as_mut().start_send(close).is_ok());
                }
                // Reading will show what the error means.
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
        // One buffer may contain thousands of messages, and other tasks need to run.
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await
}

/// How many messages are read before other tasks may run.
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
