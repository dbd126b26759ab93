//! A service for Kubernetes. `deployment.yaml` and `Dockerfile` in this folder deploy it, and `README.md`
//! derives each number in them.
//!
//! ```sh
//! cargo run --example kubernetes
//! curl -i localhost:3000/readyz
//! # A rolling update of this service under load:
//! cargo build --example kubernetes
//! cargo run --example rolling_deploy -- target/debug/examples/kubernetes
//! ```

use std::{env, error::Error, process::ExitCode, time::Duration};

use axum::{
    Router,
    extract::DefaultBodyLimit,
    routing::{get, post},
};
use tokio::{net::TcpListener, time::sleep};

mod plan;

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    tracing_subscriber::fmt().init();
    let graceful = plan::graceful()?;
    // From here on a SIGTERM during start-up is an orderly stop, and does not kill the process.
    graceful.handle_signals()?;

    let database = Database::connect().await;
    let app = Router::new()
        .route("/", get(|| async { "hello\n" }))
        .route("/slow", get(report))
        .route(
            "/upload",
            post(|body: String| async move { body.len().to_string() }),
        )
        .layer(DefaultBodyLimit::max(plan::BODY))
        .layer(graceful.layer());
    let app = graceful.probes().merge(app); // GET /livez and /readyz, outside the layer
    graceful.cleanup("database", Duration::from_secs(4), async move {
        database.close().await;
    })?;

    let port = env::var("PORT").map_or(Ok(plan::PORT), |port| port.parse())?;
    let listener = TcpListener::bind(("0.0.0.0", port)).await?;
    let report = graceful.serve(listener, app).await;
    tracing::info!("{report}");
    Ok(report.into()) // 0 is clean; docs/exit_codes.md has the others
}

async fn report() -> &'static str {
    sleep(Duration::from_secs(2)).await;
    "the report of the month\n"
}

/// Stands for a connection pool.
#[derive(Debug)]
struct Database;

impl Database {
    async fn connect() -> Self {
        sleep(Duration::from_millis(100)).await;
        Self
    }

    async fn close(self) {
        sleep(Duration::from_millis(50)).await;
    }
}
