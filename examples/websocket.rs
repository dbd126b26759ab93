//! WebSockets that are closed with a close frame: 1001, "going away". The process ends when the clients
//! have answered it, or after two seconds.
//!
//! ```sh
//! cargo run --example websocket
//! npx wscat -c ws://localhost:3000/echo      # or a browser at http://localhost:3000/
//! kill -TERM $(pgrep -x websocket)           # echoes for five more seconds; with Ctrl-C it closes at once
//! ```

use std::{env, process::ExitCode, time::Duration};

use axum::{
    Router,
    extract::{
        State,
        ws::{CloseFrame, Message, WebSocketUpgrade, close_code},
    },
    response::{Html, Response},
    routing::{any, get},
};
use tower_graceful::Graceful;

#[tokio::main]
async fn main() -> std::io::Result<ExitCode> {
    tracing_subscriber::fmt().init();
    let graceful = Graceful::new();
    let app = Router::new()
        .route("/", get(|| async { Html(PAGE) }))
        .route("/echo", any(echo))
        .layer(graceful.layer())
        .with_state(graceful.clone());
    let app = graceful.probes().merge(app);

    let address = env::args().nth(1).unwrap_or("127.0.0.1:3000".into());
    let listener = tokio::net::TcpListener::bind(address).await?;
    tracing::info!("listening on http://{}", listener.local_addr()?);
    let report = graceful.serve(listener, app).await;
    tracing::info!("{report}");
    Ok(report.into())
}

async fn echo(upgrade: WebSocketUpgrade, State(graceful): State<Graceful>) -> Response {
    let hold = graceful.hold("echo"); // the drain waits for this handler
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
            reason: "deploy".into(),
        };
        let close = Message::Close(Some(goodbye));
        hold.close_socket(socket, close, Duration::from_secs(2))
            .await;
    })
}

const PAGE: &str = "<!doctype html><title>WebSocket</title><pre></pre><script>
    const say = line => document.querySelector('pre').append(line + '\\n');
    const socket = new WebSocket(`ws://${location.host}/echo`);
    socket.onopen = () => socket.send('hello');
    socket.onmessage = message => say(message.data);
    socket.onclose = close => say(`closed: ${close.code} ${close.reason}, clean: ${close.wasClean}`);
</script>";
