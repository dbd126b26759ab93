//! A job that outlives its request. The request is answered at once. The job completes before the
//! database that it uses is closed, and before the process ends.
//!
//! ```sh
//! cargo run --example detached
//! curl localhost:3000/orders -d 'a bicycle'      # answered at once
//! kill -TERM $(pgrep -x detached)                # the payment completes, then the database closes
//! ```

use std::{env, process::ExitCode, time::Duration};

use axum::{Router, extract::State, http::StatusCode, routing::post};
use tower_graceful::Graceful;

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
    tracing_subscriber::fmt().init();

    let graceful = Graceful::new();
    // Runs after the last request and the last hold have ended.
    graceful.cleanup("database", Duration::from_secs(2), async {
        tracing::info!("the database is closed");
    })?;
    let app = Router::new()
        .route("/orders", post(order))
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

async fn order(State(graceful): State<Graceful>, what: String) -> (StatusCode, &'static str) {
    let hold = graceful.hold("payment"); // taken before the response is sent
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(8)).await; // stands for the payment
        tracing::info!("{what} is paid");
        drop(hold);
    });
    (StatusCode::ACCEPTED, "ordered\n")
}
