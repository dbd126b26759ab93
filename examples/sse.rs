//! Server-sent events whose last event tells clients when to reconnect.
//!
//! ```sh
//! cargo run --example sse
//! curl -N localhost:3000/events      # or a browser at http://localhost:3000/
//! kill -TERM $(pgrep -x sse)         # continues for five seconds; with Ctrl-C it ends at once
//! ```

use std::{convert::Infallible, env, process::ExitCode, time::Duration};

use axum::{
    Router,
    extract::State,
    response::{
        Html,
        sse::{Event, Sse},
    },
    routing::get,
};
use futures_util::{Stream, stream};
use tower_graceful::Graceful;

#[tokio::main]
async fn main() -> std::io::Result<ExitCode> {
    tracing_subscriber::fmt().init();

    let graceful = Graceful::new();
    let app = Router::new()
        .route("/", get(|| async { Html(PAGE) }))
        .route("/events", get(events))
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

async fn events(
    State(graceful): State<Graceful>,
) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let ticks = stream::unfold(1_u64, |number| async move {
        tokio::time::sleep(Duration::from_secs(1)).await;
        Some((
            Ok(Event::default().data(format!("tick {number}"))),
            number + 1,
        ))
    });
    // The client reconnects when this process has ended. If it reconnected earlier and received a
    // 503, an `EventSource` would not reconnect again.
    let last = Event::default()
        .event("goodbye")
        .retry(Duration::from_secs(5))
        .data("deploy");
    Sse::new(graceful.until_draining(ticks).and_last(Ok(last)))
}

const PAGE: &str = "<!doctype html><title>Events</title><pre></pre><script>
    const say = line => document.querySelector('pre').append(line + '\\n');
    const events = new EventSource('/events');
    events.onopen = () => say('open');
    events.onmessage = event => say(event.data);
    events.addEventListener('goodbye', event => say(`goodbye: ${event.data}`));
    events.onerror = () => say(['comes back', '', 'has given up'][events.readyState]);
</script>";
