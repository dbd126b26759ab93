//! A WebSocket that is closed when the process is replaced.

use std::time::Duration;

use axum::{
    extract::{
        State,
        ws::{CloseFrame, Message, WebSocketUpgrade, close_code},
    },
    response::Response,
};
use tower_graceful::Graceful;

/// Echoes messages. When the process is replaced, it closes the socket and asks the client to
/// reconnect.
pub(crate) async fn echo(upgrade: WebSocketUpgrade, State(graceful): State<Graceful>) -> Response {
    let hold = graceful.hold("echo");
    upgrade.on_upgrade(move |mut socket| async move {
        let echo = async {
            while let Some(Ok(message)) = socket.recv().await {
                if socket.send(message).await.is_err() {
                    break;
                }
            }
        };
        tokio::select! {
            () = graceful.draining() => {} // even if the echo waits for a client that does not read
            () = echo => return,
        }
        let goodbye = CloseFrame {
            code: close_code::AWAY,
            reason: "restart".into(),
        };
        let close = Message::Close(Some(goodbye));
        hold.close_socket(socket, close, Duration::from_secs(2))
            .await;
    })
}
