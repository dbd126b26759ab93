//! Lives of containers that start, become unready, or hang.

use std::{sync::Arc, time::Duration};

use super::{Life, events, texts};
use crate::{
    balancer::Balancer,
    instance::{Problem, free_port},
    kubelet::{Hook, Pod},
    kubernetes::Sweep,
    single,
};

/// The container listens after 5 s. The liveness probe allows one failure, and has not begun.
pub(super) async fn slow_start(sweep: &Sweep) -> Result<Life, Problem> {
    let mut life = Life::new("a container that listens after 5 s");
    let command = sweep.backend(&["--start", &sweep.seconds(5.0)])?;
    let mut pod = Pod::start(sweep.pod(command, Hook::None), free_port());
    pod.ready().await?;
    let restarts = pod.status().restarts;
    life.seen = format!("ready, {restarts} restarts");
    life.must("no restart before it listens", restarts == 0);
    Ok(life)
}

/// The same, and the startup probe gives it 3 s.
pub(super) async fn late_start(sweep: &Sweep) -> Result<Life, Problem> {
    let mut life = Life::new("the same, and the startup probe allows 3 failures");
    let command = sweep.backend(&["--start", &sweep.seconds(60.0)])?;
    let mut spec = sweep.pod(command, Hook::None);
    spec.startup.failure_threshold = 3;
    let mut pod = Pod::start(spec, free_port());
    pod.until("restarted", |status| status.restarts == 1)
        .await?;
    life.seen = texts(&events(&pod));
    life.must(
        "stopped by the startup probe",
        life.seen.contains("startup"),
    );
    life.must("it never was ready", !pod.status().was_ready);
    Ok(life)
}

/// A pod that becomes unready leaves the endpoints, is not restarted, and returns.
pub(super) async fn unready(sweep: &Sweep) -> Result<Life, Problem> {
    let mut life = Life::new("a pod that is unready for a while");
    let running = Balancer::start(None).await;
    let running = running.map_err(|error| Problem(format!("no balancer: {error}")))?;
    let balancer = &running.balancer;
    let mut spec = sweep.pod(sweep.backend(&["--steer", "yes"])?, Hook::None);
    spec.readiness.failure_threshold = 2;
    spec.readiness.success_threshold = 2;
    let mut pod = Pod::start(spec, free_port());
    pod.expose(Arc::clone(balancer), sweep.time(0.5));
    pod.ready().await?;
    balancer.has(&[pod.port], sweep.bound()).await?;
    post(sweep, &pod, "/unready").await?;
    pod.until("unready", |status| !status.ready).await?;
    balancer.has(&[], sweep.bound()).await?;
    let answer = single::get(pod.port, "/").await;
    life.must(
        "it serves while it is unready",
        answer.is_ok_and(|it| it.is_success()),
    );
    post(sweep, &pod, "/ready").await?;
    pod.ready().await?;
    balancer.has(&[pod.port], sweep.bound()).await?;
    let restarts = pod.status().restarts;
    life.seen = format!("left the endpoints and returned, {restarts} restarts");
    life.must("no restart", restarts == 0);
    Ok(life)
}

/// A process whose threads are all blocked does not answer the liveness probe. SIGTERM starts the stop, but
/// nothing can end it, so SIGKILL follows.
pub(super) async fn hangs(sweep: &Sweep) -> Result<Life, Problem> {
    let mut life = Life::new("a process that hangs");
    let grace = sweep.seconds(10.0);
    let command = sweep.backend(&["--steer", "yes", "--grace", &grace])?;
    let mut spec = sweep.pod(command, Hook::None);
    spec.grace_period = sweep.time(10.0);
    let mut pod = Pod::start(spec, free_port());
    pod.ready().await?;
    // The answer may get lost, because the threads block at once.
    let _ = single::once(pod.port, "POST", "/hang", Duration::from_secs(1)).await;
    pod.until("restarted", |status| status.restarts == 1)
        .await?;
    pod.ready().await?;
    life.seen = format!("{}; then ready again", texts(&events(&pod)));
    let killed = life
        .seen
        .contains("liveness probe failed, ended after SIGKILL");
    life.must("stopped by the liveness probe, with SIGKILL", killed);
    Ok(life)
}

async fn post(sweep: &Sweep, pod: &Pod, path: &str) -> Result<(), Problem> {
    let answer = single::once(pod.port, "POST", path, sweep.bound()).await;
    match answer {
        Ok(status) if status.is_success() => Ok(()),
        other => Err(Problem(format!("POST {path}: {other:?}"))),
    }
}
