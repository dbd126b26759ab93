//! Stops of pods, with and without preStop hooks.

use std::time::Duration;

use hyper::StatusCode;
use tokio::{
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::{Life, events, probed, texts};
use crate::{
    instance::{Problem, free_port},
    kubelet::{Get, Hook, Pod},
    kubernetes::{DRAIN_DELAY, Sweep},
    load::How,
    single,
};

/// A deletion with a request in flight that outlasts the delay by 10 s.
pub(super) async fn drains(sweep: &Sweep, hook: Hook) -> Result<Life, Problem> {
    let gets = matches!(hook, Hook::HttpGet(_));
    let mut life = Life::new(if gets {
        "the same, with a preStop httpGet"
    } else {
        "a deletion, with a request in flight that takes 15 s"
    });
    let slow = sweep.seconds(15.0);
    let command = sweep.backend(&["--pre-stop", "yes", "--slow", &slow])?;
    let spec = sweep.pod(command, hook);
    let liveness = spec.liveness.clone();
    let mut pod = Pod::start(spec, free_port());
    // The request is in flight when the pod is deleted.
    let request = slow_request(&mut pod, sweep.bound()).await?;
    let death = timeout(sweep.bound(), pod.delete()).await;
    let death = death.map_err(|_| Problem("the deletion does not end".into()))??;
    let answer = request.await;
    let phases: Vec<_> = death.lively.phases.iter().map(String::as_str).collect();
    life.seen = format!(
        "SIGTERM {:.1} s and exit {:.1} s after the deletion, {}; {}",
        (death.terminated - death.deleted).as_secs_f64(),
        (death.ended.exited - death.deleted).as_secs_f64(),
        death.ended.status,
        probed(&death),
    );
    let answered = matches!(answer, Ok(Ok(status)) if status.is_success());
    life.must("the request is answered", answered);
    life.exits_with_0(&death.ended);
    life.must(
        "/livez answers while draining",
        phases.contains(&"draining"),
    );
    life.answered(&death, &liveness);
    // If a probe prolonged the drain, the drain would end at its deadline, 24 s after the deletion.
    let in_time = death.ended.exited - death.deleted < sweep.time(22.0);
    life.must("the stop ends with the request", in_time);
    life.must(
        "the report says clean",
        death.ended.output.contains(": clean"),
    );
    if gets {
        // The route answers when the delay is over, and the kubelet waits for the answer.
        let called = death.was_called(sweep.time(DRAIN_DELAY));
        life.must(
            "the call starts the stop, SIGTERM follows the answer",
            called,
        );
    } else {
        let trigger = death.ended.output.contains("shutdown by SIGTERM");
        life.must("SIGTERM starts the stop", trigger);
    }
    Ok(life)
}

/// Waits until the pod is ready and the slow request is in flight: it is sent at once, and then a quick
/// one is answered.
async fn slow_request(
    pod: &mut Pod,
    bound: Duration,
) -> Result<JoinHandle<Result<StatusCode, How>>, Problem> {
    pod.ready().await?;
    let port = pod.port;
    let request = tokio::spawn(async move { single::once(port, "GET", "/slow", bound).await });
    sleep(Duration::from_millis(200)).await;
    match single::get(port, "/").await {
        Ok(status) if status.is_success() => Ok(request),
        other => Err(Problem(format!("GET /: {other:?}"))),
    }
}

/// A deletion with nothing in flight but probes, of which there are many.
pub(super) async fn asked_often(sweep: &Sweep) -> Result<Life, Problem> {
    let mut life = Life::new("a deletion, and /livez is asked every 10 ms");
    let mut spec = sweep.pod(sweep.backend(&[])?, Hook::None);
    spec.liveness.period = Duration::from_millis(10);
    let liveness = spec.liveness.clone();
    let mut pod = Pod::start(spec, free_port());
    pod.ready().await?;
    let death = pod.delete().await?;
    let took = death.ended.exited - death.deleted;
    life.seen = format!(
        "exit {:.1} s after the deletion, {}; {}",
        took.as_secs_f64(),
        death.ended.status,
        probed(&death),
    );
    life.exits_with_0(&death.ended);
    life.answered(&death, &liveness);
    // If a probe prolonged the drain, the drain would end at its deadline, 24 s after the deletion.
    let in_time = took < sweep.time(DRAIN_DELAY) + sweep.time(19.0) / 2;
    life.must("the stop is as long as the delay", in_time);
    Ok(life)
}

/// A stop without a deletion: the kubelet probes liveness to the end, and one failure is enough for
/// it to stop the container. It starts the container again.
pub(super) async fn signalled(sweep: &Sweep) -> Result<Life, Problem> {
    let mut life = Life::new("a stop that the kubelet does not know of");
    let command = sweep.backend(&["--pre-stop", "yes", "--slow", &sweep.seconds(15.0)])?;
    let spec = sweep.pod(command, Hook::None);
    let liveness = spec.liveness.clone();
    let mut pod = Pod::start(spec, free_port());
    let request = slow_request(&mut pod, sweep.bound()).await?;
    let (port, bound) = (pod.port, sweep.bound());
    // This call does not come from the kubelet.
    let stop = tokio::spawn(async move { single::once(port, "GET", "/prestop", bound).await });
    pod.until("restarted", |status| status.restarts == 1)
        .await?;
    let answered = matches!(request.await, Ok(Ok(status)) if status.is_success());
    let told = matches!(stop.await, Ok(Ok(status)) if status.is_success());
    pod.ready().await?;
    let ends = events(&pod);
    life.seen = format!("{}; then ready again", texts(&ends));
    life.must("the request is answered", answered && told);
    // A probe may come in the last moment, when the port is closed and the process has not ended. The
    // kubelet then sends SIGTERM, which changes nothing.
    let is_late = ends.iter().all(|end| end.silence <= liveness.silence());
    life.must("/livez answers until the end", is_late);
    let is_whole = life.seen.contains("exit status: 0") && !life.seen.contains("SIGKILL");
    life.must("no probe cuts it", is_whole);
    life.must(
        "/livez answers while draining",
        life.seen.contains("draining"),
    );
    let gaps = life.seen.contains("missing between two: 0");
    life.must("/livez answers without a gap", gaps);
    Ok(life)
}

/// A preStop GET that starts nothing: SIGTERM follows at once.
pub(super) async fn vain_hook(
    sweep: &Sweep,
    name: &'static str,
    get: Get,
    succeeds: bool,
) -> Result<Life, Problem> {
    let mut life = Life::new(name);
    let command = sweep.backend(&["--pre-stop", "yes"])?;
    let spec = sweep.pod(command, Hook::HttpGet(get));
    let mut pod = Pod::start(spec, free_port());
    pod.ready().await?;
    let death = pod.delete().await?;
    let output = &death.ended.output;
    let after = death.terminated - death.deleted;
    life.seen = format!(
        "SIGTERM {:.1} s after the deletion, {}",
        after.as_secs_f64(),
        death.ended.status
    );
    life.must("the result of the hook", death.hook == Some(succeeds));
    // If the route had started the stop, its answer would have come after the delay.
    let at_once = after < Duration::from_secs(1).min(sweep.time(DRAIN_DELAY));
    life.must("SIGTERM at once", at_once);
    life.must(
        "SIGTERM starts the stop",
        output.contains("shutdown by SIGTERM"),
    );
    life.exits_with_0(&death.ended);
    Ok(life)
}

/// A hook that outlasts the grace period. The service gets SIGTERM at the end of the grace period, and has
/// two seconds. A plan that does not fit them is killed.
pub(super) async fn endless_hook(sweep: &Sweep) -> Result<Life, Problem> {
    let mut life = Life::new("a preStop sleep that outlasts the grace period");
    let mut spec = sweep.pod(sweep.backend(&[])?, Hook::Sleep(sweep.time(60.0)));
    spec.grace_period = sweep.time(6.0);
    let (grace_period, extension) = (spec.grace_period, spec.extension);
    let mut pod = Pod::start(spec, free_port());
    pod.ready().await?;
    let death = pod.delete().await?;
    let terminated = death.terminated - death.deleted;
    let exited = death.ended.exited - death.deleted;
    life.seen = format!(
        "SIGTERM {:.1} s and exit {:.1} s after the deletion, killed: {}",
        terminated.as_secs_f64(),
        exited.as_secs_f64(),
        death.ended.killed
    );
    life.must("the hook is abandoned", death.hook == Some(false));
    let late = terminated >= grace_period;
    life.must("SIGTERM at the end of the grace period", late);
    // The delay of 5 s does not fit into the two seconds that are left.
    let extended = exited >= grace_period + extension;
    life.must("SIGKILL two seconds later", death.ended.killed && extended);
    Ok(life)
}
