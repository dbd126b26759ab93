//! The long-lived routes of the server under test.

use std::{
    convert::Infallible,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use axum::{
    Router,
    extract::{
        Path, State,
        ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade},
    },
    response::{
        Response,
        sse::{Event, Sse},
    },
    routing::{any, get},
};
use futures_util::{Stream, stream};
use tower_graceful::{Graceful, Hold};

/// The state of the handlers, and how they close a WebSocket.
#[derive(Clone)]
struct Sockets {
    graceful: Graceful,
    code: u16,
    within: Duration,
    /// Whether the handlers print how each WebSocket ends.
    loud: bool,
}

impl Sockets {
    fn goodbye(&self) -> Message {
        Message::Close(Some(CloseFrame {
            code: self.code,
            reason: "deploy".into(),
        }))
    }

    fn say(&self, what: &str) {
        if self.loud {
            println!("{what}");
        }
    }
}

/// `code` is the code of the close frame, and `within` is how long the peer has to answer it.
pub(crate) fn routes(graceful: &Graceful, code: u16, within: Duration, loud: bool) -> Router {
    let sockets = Sockets {
        graceful: graceful.clone(),
        code,
        within,
        loud,
    };
    Router::new()
        .route("/ws", any(echo))
        .route("/ws/flood", any(flood))
        .route("/ws/messages", any(messages))
        .route("/ws/unheld/{room}", any(unheld))
        .route("/ws/notified", any(notified))
        .route("/ws/stubborn", any(stubborn))
        .route("/sse/silent", get(silent))
        .route("/sse/{ms}", get(ticking))
        .with_state(sockets)
}

async fn echo(upgrade: WebSocketUpgrade, State(sockets): State<Sockets>) -> Response {
    let hold = sockets.graceful.hold("echo");
    upgrade
        .read_buffer_size(4096)
        .on_upgrade(move |mut socket| async move {
            let echo = async {
                while let Some(Ok(message)) = socket.recv().await {
                    if socket.send(message).await.is_err() {
                        break;
                    }
                }
            };
            tokio::select! {
                () = sockets.graceful.draining() => {}
                () = echo => return,
            }
            close(hold, socket, sockets).await;
        })
}

/// Echoes text and binary messages alone. A protocol error ends the handler.
async fn messages(upgrade: WebSocketUpgrade, State(sockets): State<Sockets>) -> Response {
    let hold = sockets.graceful.hold("messages");
    upgrade.on_upgrade(move |mut socket| async move {
        let mut draining = sockets.graceful.draining();
        loop {
            let received = tokio::select! {
                () = &mut draining => break,
                received = socket.recv() => received,
            };
            match received {
                Some(Ok(message @ (Message::Text(_) | Message::Binary(_)))) => {
                    drop(socket.send(message).await);
                }
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return,
            }
        }
        close(hold, socket, sockets).await;
    })
}

/// A WebSocket without a `Hold`, whose handler is not notified.
async fn unheld(upgrade: WebSocketUpgrade) -> Response {
    upgrade.on_upgrade(|mut socket| async move {
        while let Some(Ok(message)) = socket.recv().await {
            drop(socket.send(message).await);
        }
    })
}

/// A WebSocket without a `Hold`, whose handler ends when draining starts.
async fn notified(upgrade: WebSocketUpgrade, State(sockets): State<Sockets>) -> Response {
    upgrade.on_upgrade(|mut socket| async move {
        sockets.graceful.draining().await;
        drop(socket.send(sockets.goodbye()).await);
        drop(socket.recv().await);
    })
}

/// The number of handlers that close their socket and have not said so yet.
static CLOSING: AtomicUsize = AtomicUsize::new(0);

async fn close(hold: Hold, socket: WebSocket, sockets: Sockets) {
    sockets.say("the socket is notified");
    CLOSING.fetch_add(1, Ordering::SeqCst);
    let closed = hold
        .close_socket(socket, sockets.goodbye(), sockets.within)
        .await;
    sockets.say(&format!("the socket is closed: {closed}"));
    CLOSING.fetch_sub(1, Ordering::SeqCst);
}

/// Waits until handlers whose holds have ended have said so too. axum's server alone does not wait for them.
pub(crate) async fn all_have_said_so() {
    for _ in 0..1000 {
        if CLOSING.load(Ordering::SeqCst) == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Sends until draining starts, even if the peer does not read.
async fn flood(upgrade: WebSocketUpgrade, State(sockets): State<Sockets>) -> Response {
    let hold = sockets.graceful.hold("flood");
    upgrade.on_upgrade(move |mut socket| async move {
        let mut draining = sockets.graceful.draining();
        let much = Message::Binary(vec![0; 64 * 1024].into());
        loop {
            tokio::select! {
                () = &mut draining => break,
                sent = socket.send(much.clone()) => if sent.is_err() {
                    return;
                },
            }
        }
        close(hold, socket, sockets).await;
    })
}

/// Sends a close frame when draining starts, and waits for the peer without a timeout.
async fn stubborn(upgrade: WebSocketUpgrade, State(sockets): State<Sockets>) -> Response {
    struct Gone(#[expect(dead_code, reason = "goes with it")] Hold);

    impl Drop for Gone {
        fn drop(&mut self) {
            println!("the handler is gone");
        }
    }

    let gone = Gone(sockets.graceful.hold("stubborn"));
    upgrade.on_upgrade(move |mut socket| async move {
        let _gone = gone;
        sockets.graceful.draining().await;
        drop(socket.send(sockets.goodbye()).await);
        while let Some(Ok(_)) = socket.recv().await {}
    })
}

fn goodbye() -> Event {
    let goodbye = Event::default().event("goodbye").data("deploy");
    goodbye.retry(Duration::from_secs(5))
}

type Events<S> = Sse<tower_graceful::UntilDraining<S>>;

async fn silent(
    State(sockets): State<Sockets>,
) -> Events<impl Stream<Item = Result<Event, Infallible>>> {
    let nothing = stream::pending();
    Sse::new(
        sockets
            .graceful
            .until_draining(nothing)
            .and_last(Ok(goodbye())),
    )
}

/// A stream of increasing numbers.
async fn ticking(
    State(sockets): State<Sockets>,
    Path(ms): Path<u64>,
) -> Events<impl Stream<Item = Result<Event, Infallible>>> {
    let ticks = stream::unfold(0_u64, move |number| async move {
        tokio::time::sleep(Duration::from_millis(ms)).await;
        Some((Ok(Event::default().data(number.to_string())), number + 1))
    });
    Sse::new(
        sockets
            .graceful
            .until_draining(ticks)
            .and_last(Ok(goodbye())),
    )
}
