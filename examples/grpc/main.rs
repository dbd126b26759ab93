//! gRPC that drains: tonic's routes on `serve`, with the standard health service.
//!
//! ```sh
//! cargo run --example grpc                                  # or: -- 127.0.0.1:50051
//! pip install grpcio-tools                                  # or any other client
//! cd examples/grpc
//! python3 <<'END' &
//! import grpc, grpc.experimental
//! messages, calls = grpc.protos_and_services("greeter.proto")
//! name, address = messages.HelloRequest(name="Ada"), "localhost:50051"
//! print(calls.Greeter.Hello(name, address, insecure=True))
//! for tick in calls.Greeter.Ticks(messages.TicksRequest(), address, insecure=True): print(tick)
//! END
//! kill -TERM $(pgrep -x grpc)                               # ticks for five more seconds, then ends
//! ```
//!
//! New calls are then refused with `UNAVAILABLE: shutting down`. `service.rs` has a call with one response and
//! one with a stream, and `health.rs` the health service, which fails as soon as the stop begins.

use std::{env, error::Error, process::ExitCode, time::Duration};

use greeter::greeter_server::GreeterServer;
use health::Health;
use service::Service;
use tokio::net::TcpListener;
use tonic::service::Routes;
use tonic_health::{ServingStatus, pb::health_server::HealthServer, server::HealthReporter};
use tower_graceful::Graceful;

#[allow(clippy::pedantic, unreachable_pub)]
mod greeter;
#[allow(unreachable_pub)]
mod health;
mod service;

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .init();
    let address = env::args().nth(1);
    let address = address.unwrap_or_else(|| "127.0.0.1:50051".into());
    let graceful = Graceful::new();

    // Health becomes NOT_SERVING in the lame-duck phase: for the server as a whole (an empty name) and
    // for the one service.
    let reporter = HealthReporter::new();
    reporter.set_serving::<GreeterServer<Service>>().await;
    let health = HealthServer::new(Health::new(&reporter, &graceful));
    graceful.on_lame_duck("health", Duration::from_secs(1), async move {
        reporter
            .set_service_status("", ServingStatus::NotServing)
            .await;
        reporter.set_not_serving::<GreeterServer<Service>>().await;
    })?;

    let greeter = GreeterServer::new(Service {
        graceful: graceful.clone(),
    });
    let greeter = Routes::new(greeter)
        .into_axum_router()
        .layer(graceful.layer());
    // Added after the layer, so that health checks are answered to the end of the drain, and do not
    // count as in flight.
    let app = Routes::from(greeter).add_service(health).into_axum_router();

    let listener = TcpListener::bind(address).await?;
    println!("listening on {}", listener.local_addr()?);
    let report = graceful.serve(listener, app).await;
    println!("{report}");
    Ok(report.into())
}
