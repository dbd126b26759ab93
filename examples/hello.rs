//! A service that drains.
//!
//! ```sh
//! cargo run --example hello           # the other commands are for another terminal
//! curl -i localhost:3000/              # hello
//! curl -i localhost:3000/slow &        # in flight for ten seconds
//! kill -TERM $(pgrep -x hello)
//! curl -i localhost:3000/readyz        # 503: the load balancer stops sending traffic
//! curl -i localhost:3000/              # 200 for five more seconds, then 503
//! wait                                 # /slow is answered, then the process ends
//! ```

use std::{error::Error, process::ExitCode, time::Duration};

use axum::{Router, routing::get};
use tower_graceful::GracefulLayer;

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    tracing_subscriber::fmt().init();

    let layer = GracefulLayer::new(); // the same as Graceful::new().layer()
    let graceful = layer.handle();
    let app = Router::new()
        .route("/", get(|| async { "hello\n" }))
        .route("/slow", get(slow))
        .layer(layer);
    let app = graceful.probes().merge(app); // adds GET /livez and /readyz

    let listener = tokio::net::TcpListener::bind("127.0.0.1:3000").await?;
    tracing::info!("listening on http://{}", listener.local_addr()?);

    let report = graceful.serve(listener, app).await;
    tracing::info!("{report}");
    Ok(report.into()) // the report becomes the exit code
}

async fn slow() -> &'static str {
    tokio::time::sleep(Duration::from_secs(10)).await;
    "finished, although the service was told to stop meanwhile\n"
}
