//! Performs a rolling update under load, and counts the requests that are lost. It needs no other
//! program. It runs on Unix only, because a stop is a SIGTERM to a process.
//!
//! ```sh
//! # This crate beside plain axum, half a minute:
//! cargo run --example rolling_deploy
//! # Your own service. {port} is replaced, and PORT is set in the environment:
//! cargo run --example rolling_deploy -- ./my-service --port {port}
//! # A pod on Kubernetes whose address is removed late:
//! cargo run --example rolling_deploy -- --kubernetes
//! # All options:
//! cargo run --example rolling_deploy -- --help
//! ```
//!
//! Exit code 0: nothing was lost. 1: requests were lost, or an instance had to be killed. 2: there was
//! nothing to measure, and the last line says why.

#[cfg(unix)]
mod advice;
#[cfg(unix)]
mod backend;
#[cfg(unix)]
mod balancer;
#[cfg(unix)]
mod compare;
#[cfg(unix)]
mod deploy;
#[cfg(unix)]
mod instance;
#[cfg(unix)]
mod kubelet;
#[cfg(unix)]
mod kubernetes;
#[cfg(unix)]
mod life;
#[cfg(unix)]
mod load;
#[cfg(unix)]
mod options;
#[cfg(unix)]
mod probes;
#[cfg(unix)]
mod progress;
#[cfg(unix)]
mod single;
#[cfg(unix)]
mod verdict;

use std::process::ExitCode;

#[cfg(not(unix))]
fn main() -> ExitCode {
    eprintln!("rolling_deploy needs unix: a stop is a SIGTERM to a process");
    ExitCode::from(2)
}

#[cfg(unix)]
#[tokio::main]
async fn main() -> ExitCode {
    let args: Vec<_> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|first| first == "--backend") {
        return backend::run(&args[1..]).await.unwrap_or_else(|error| {
            eprintln!("rolling_deploy: {error}");
            ExitCode::from(2)
        });
    }
    let result = tokio::select! {
        result = measure(args) => result,
        // Dropping the future drops the instances, which kills their processes.
        code = interrupted() => return code,
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(problem) => {
            eprintln!("rolling_deploy: {problem}");
            ExitCode::from(2)
        }
    }
}

#[cfg(unix)]
async fn interrupted() -> ExitCode {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut terminate) = signal(SignalKind::terminate()) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => ExitCode::from(130),
        _ = terminate.recv() => ExitCode::from(143),
    }
}

/// Returns whether nothing was lost.
#[cfg(unix)]
async fn measure(args: Vec<String>) -> Result<bool, instance::Problem> {
    let plan = match options::parse(args)? {
        options::Task::Help => {
            print!("{}", options::HELP);
            return Ok(true);
        }
        options::Task::Compare(plan) => return compare::run(&plan).await,
        options::Task::Kubernetes(sweep, paths) => {
            return if sweep.life {
                life::run(&sweep).await
            } else {
                kubernetes::run(&sweep, &paths).await
            };
        }
        options::Task::Check(plan) => plan,
    };
    let progress = progress::Progress::new("your service", plan.instances * plan.rounds);
    let run = deploy::run(&plan, &progress).await?;
    drop(progress);
    verdict::print(&plan, &run);
    for line in advice::of(&plan, &run) {
        println!("\n- {line}");
    }
    Ok(verdict::passes(&run))
}
