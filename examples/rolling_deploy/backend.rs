//! The deployed service, on plain axum as in axum's own example, or with this crate. `--backend` runs it as
//! a separate process, so that a stop is a real signal to a real process.
//!
//! ```sh
//! cargo run --example rolling_deploy -- --backend graceful 3000
//! cargo run --example rolling_deploy -- --backend plain 3000
//! ```

use std::{process::ExitCode, time::Duration};

use axum::{
    Router,
    body::Bytes,
    http::StatusCode,
    routing::{get, post},
};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    time::sleep,
};
use tower_graceful::Graceful;

/// The duration of `GET /slow`, unless `--slow` sets another.
const SLOW: Duration = Duration::from_millis(700);

fn routes(slow: Duration) -> Router {
    let slow = move || async move {
        sleep(slow).await;
        "slow\n"
    };
    Router::new()
        .route("/", get(|| async { "hello\n" }))
        .route("/slow", get(slow))
        .route(
            "/upload",
            post(|body: Bytes| async move { body.len().to_string() }),
        )
}

/// `POST /ready` and `POST /unready` change the answer of the readiness probe. `POST /hang` blocks every
/// thread of the runtime for good, as a deadlock would.
fn steering(graceful: &Graceful) -> Router {
    let (on, off) = (graceful.clone(), graceful.clone());
    let hang = || async {
        for _ in 0..256 {
            tokio::spawn(async { std::thread::sleep(Duration::from_secs(3600)) });
        }
    };
    Router::new()
        .route("/ready", post(|| async move { on.set_ready(true) }))
        .route("/unready", post(|| async move { off.set_ready(false) }))
        .route("/hang", post(hang))
}

/// Runs the backend that `args` name: `graceful PORT`, `plain PORT` or `deaf PORT`. Options of the first
/// are `--delay SECONDS`, `--grace SECONDS`, `--keep-listening no`, `--unready STATUS`, `--slow SECONDS` for the
/// duration of `GET /slow`, `--start SECONDS` for the time until it listens, `--layer no` for a service that
/// forgot the layer, `--pre-stop yes` for the route `/prestop`, and `--steer yes` for the routes that change its state.
pub(crate) async fn run(args: &[String]) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let [kind, port, options @ ..] = args else {
        return Err("--backend wants graceful, plain or deaf, and a port".into());
    };
    let port: u16 = port.parse()?;
    let result = match kind.as_str() {
        "graceful" => graceful(port, options).await?,
        "plain" => plain(port).await?,
        "deaf" => deaf(port).await?,
        other => {
            return Err(format!("--backend is graceful, plain or deaf, and not {other}").into());
        }
    };
    Ok(result)
}

/// This crate, by default with a delay of 1.5 s. This is three times as long as the balancer of the
/// comparison needs to notice.
async fn graceful(port: u16, options: &[String]) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let mut builder = Graceful::builder()
        .grace_period(Duration::from_secs(10))
        .drain_delay(Duration::from_millis(1500));
    let (mut slow, mut start) = (SLOW, Duration::ZERO);
    let (mut layer, mut pre_stop, mut steer) = (true, false, false);
    for option in options.chunks(2) {
        let [name, value] = option else {
            return Err(format!("{} wants a value", option[0]).into());
        };
        builder = match name.as_str() {
            "--delay" => builder.drain_delay(Duration::try_from_secs_f64(value.parse()?)?),
            "--grace" => builder.grace_period(Duration::try_from_secs_f64(value.parse()?)?),
            "--keep-listening" => builder.keep_listening(value != "no"),
            "--slow" => {
                slow = Duration::try_from_secs_f64(value.parse()?)?;
                builder
            }
            "--layer" => {
                layer = value != "no";
                builder
            }
            "--start" => {
                start = Duration::try_from_secs_f64(value.parse()?)?;
                builder
            }
            "--pre-stop" => {
                pre_stop = value == "yes";
                builder
            }
            "--steer" => {
                steer = value == "yes";
                builder
            }
            "--unready" => builder.unready_status(StatusCode::from_u16(value.parse()?)?),
            _ => return Err(format!("unknown option of the backend: {name}").into()),
        };
    }
    let graceful = builder.build()?;
    graceful.handle_signals()?;
    sleep(start).await;
    let mut app = graceful.probes();
    if pre_stop {
        app = app.merge(graceful.pre_stop().into_router());
    }
    if steer {
        app = app.merge(steering(&graceful));
    }
    let mut routes = routes(slow);
    if layer {
        routes = routes.layer(graceful.layer());
    }
    let app = app.merge(routes);
    let listener = TcpListener::bind(("127.0.0.1", port)).await?;
    let report = graceful.serve(listener, app).await;
    println!("{report}");
    Ok(report.into())
}

/// Plain axum, as in its `graceful-shutdown` example, with a readiness route.
async fn plain(port: u16) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let app = routes(SLOW)
        .route("/readyz", get(|| async {}))
        .route("/livez", get(|| async {}));
    let listener = TcpListener::bind(("127.0.0.1", port)).await?;
    axum::serve(listener, app)
        .with_graceful_shutdown(shutdown_signal())
        .await?;
    Ok(ExitCode::SUCCESS)
}

/// A service that ignores SIGTERM, to show the advice for such a service.
async fn deaf(port: u16) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let _unread = signal(SignalKind::terminate())?;
    let app = routes(SLOW).route("/readyz", get(|| async {}));
    axum::serve(TcpListener::bind(("127.0.0.1", port)).await?, app).await?;
    Ok(ExitCode::SUCCESS)
}

async fn shutdown_signal() {
    let ctrl_c = async {
        tokio::signal::ctrl_c()
            .await
            .expect("failed to install Ctrl+C handler");
    };
    let terminate = async {
        signal(SignalKind::terminate())
            .expect("failed to install signal handler")
            .recv()
            .await;
    };
    tokio::select! {
        () = ctrl_c => {}
        () = terminate => {}
    }
}
