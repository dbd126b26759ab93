//! Simulates how the kubelet and the endpoint controller replace a pod, without a cluster. It shows how
//! late the removal of an address may arrive until a stop loses requests.
//!
//! ```sh
//! cargo run --example rolling_deploy -- --kubernetes            # times scaled to a fifth
//! cargo run --example rolling_deploy -- --kubernetes --scale 1  # real times, some minutes
//! cargo run --example rolling_deploy -- --kubernetes --removals 0,3,8
//! ```
//!
//! The deletion of a pod starts two things. The removal of its address reaches the balancer after the
//! removal delay. The balancer is like kube-proxy, without checks and retries. At the same time the
//! preStop sleep begins, and SIGTERM is sent after it. SIGKILL is sent when the grace period is over, counted
//! from the deletion. A new pod becomes ready when a probe succeeds, and its address arrives at the balancer
//! after the same delay.
//!
//! The readiness probe does not speed up the removal, because the deletion has already started it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::time::sleep;

use crate::{
    balancer::Balancer,
    instance::{Instance, Problem, free_port},
    load::{self, Load, Paths, Tally},
};

/// In seconds. These are the defaults of this crate and of Kubernetes.
const DRAIN_DELAY: f64 = 5.0;
const GRACE_PERIOD: f64 = 30.0;
/// `periodSeconds` of the readiness probe, and `minReadySeconds`.
const PROBE_PERIOD: f64 = 2.0;
const MIN_READY: f64 = 5.0;
/// Seconds of load after the stop.
const AFTER: f64 = 2.0;

#[derive(Clone, Debug)]
pub(crate) struct Sweep {
    /// The removal delays in seconds.
    pub(crate) removals: Vec<f64>,
    /// The factor for all times, also those of the service.
    pub(crate) scale: f64,
}

impl Default for Sweep {
    fn default() -> Self {
        Self {
            removals: vec![0.0, 1.0, 2.0, 3.0, 4.0, 4.5, 5.0, 5.5, 6.0, 8.0, 10.0],
            scale: 0.2,
        }
    }
}

impl Sweep {
    fn time(&self, seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds * self.scale)
    }

    fn seconds(&self, seconds: f64) -> String {
        self.time(seconds).as_secs_f64().to_string()
    }
}

/// Prints a row for each removal delay: failed requests of all requests.
pub(crate) async fn run(sweep: &Sweep, paths: &Paths) -> Result<(), Problem> {
    let program = std::env::current_exe()
        .map_err(|error| Problem(format!("cannot find this program's file: {error}")))?
        .display()
        .to_string();
    let command = |words: &[&str]| -> Vec<String> {
        let start = [program.as_str(), "--backend"];
        start.iter().chain(words).map(ToString::to_string).collect()
    };
    let plain = command(&["plain", "{port}"]);
    let (delay, grace) = (sweep.seconds(DRAIN_DELAY), sweep.seconds(GRACE_PERIOD));
    let graceful = command(&["graceful", "{port}", "--delay", &delay, "--grace", &grace]);

    println!("times are multiplied by {}\n", sweep.scale);
    println!(
        "| removal after | plain axum | plain axum, preStop sleep 5 s | tower-graceful, delay 5 s |"
    );
    println!("|---|---|---|---|");
    for removal in &sweep.removals {
        // All three run at the same time, each with its own pods, balancer and load.
        let (plain, slept, graceful) = tokio::try_join!(
            delete_one(sweep, paths, &plain, *removal, 0.0),
            delete_one(sweep, paths, &plain, *removal, DRAIN_DELAY),
            delete_one(sweep, paths, &graceful, *removal, 0.0),
        )?;
        let [plain, slept, graceful] = [plain, slept, graceful]
            .map(|tally| format!("{} of {}", tally.failures.len(), tally.total()));
        println!("| {removal:.1} s | {plain} | {slept} | {graceful} |");
    }
    Ok(())
}

/// Replaces one of two pods under load.
async fn delete_one(
    sweep: &Sweep,
    paths: &Paths,
    command: &[String],
    removal: f64,
    pre_stop: f64,
) -> Result<Tally, Problem> {
    let running = Balancer::start(None).await;
    let running = running.map_err(|error| Problem(format!("no balancer: {error}")))?;
    let balancer = &running.balancer;
    let mut old = start(sweep, command).await?;
    let _other = {
        let other = start(sweep, command).await?;
        balancer.add(old.port);
        balancer.add(other.port);
        other
    };
    let load = Load::start(balancer.address().to_string(), paths.clone());

    // maxSurge 1, maxUnavailable 0: the new pod starts first.
    let new = start(sweep, command).await?;
    sleep(sweep.time(removal)).await;
    balancer.add(new.port);
    sleep(sweep.time(MIN_READY)).await;

    let deleted = Instant::now();
    let removed = remove(Arc::clone(balancer), old.port, sweep.time(removal));
    let stopped = async {
        sleep(sweep.time(pre_stop)).await;
        old.terminate();
        old.ended(deleted, sweep.time(GRACE_PERIOD)).await
    };
    let (ended, ()) = tokio::join!(stopped, removed);
    ended?;
    sleep(sweep.time(AFTER)).await;
    Ok(load.stop().await)
}

async fn remove(balancer: Arc<Balancer>, port: u16, after: Duration) {
    sleep(after).await;
    balancer.remove(port);
}

/// Starts a pod, and returns when its readiness probe has succeeded once.
async fn start(sweep: &Sweep, command: &[String]) -> Result<Instance, Problem> {
    let mut pod = Instance::start(command, free_port())?;
    let begun = Instant::now();
    loop {
        sleep(sweep.time(PROBE_PERIOD)).await;
        pod.must_run("before it was ready").await?;
        let answer = load::get(pod.port, "/readyz").await;
        if answer.is_ok_and(|status| status.is_success()) {
            return Ok(pod);
        }
        if begun.elapsed() > Duration::from_secs(60) {
            return Err(Problem(format!(
                "the pod on port {} does not get ready",
                pod.port
            )));
        }
    }
}
