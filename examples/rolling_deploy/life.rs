//! Lives of single pods, with the rules of `kubelet.rs`. Each is a check with a printed line.

use std::{
    fmt,
    sync::{Arc, PoisonError},
    time::Duration,
};

use tokio::time::{sleep, timeout};

use crate::{
    balancer::Balancer,
    instance::{Ended, Problem, free_port},
    kubelet::{Hook, Pod},
    kubernetes::{DRAIN_DELAY, Sweep},
    load,
};

/// The timeout of what a life waits for, beside the times that the life itself takes.
const BOUND: Duration = Duration::from_secs(60);

/// Prints a line for each life. Returns whether all went as they must.
pub(crate) async fn run(sweep: &Sweep) -> Result<bool, Problem> {
    println!("times are multiplied by {}\n", sweep.scale);
    // At the same time, each with its own pod.
    let lives = tokio::try_join!(
        slow_start(sweep),
        late_start(sweep),
        unready(sweep),
        hangs(sweep),
        drains(sweep, Hook::None),
        drains(sweep, Hook::HttpGet("/prestop")),
        asked_often(sweep),
        signalled(sweep),
        missing_hook(sweep),
        endless_hook(sweep),
    )?;
    let lives = [
        lives.0, lives.1, lives.2, lives.3, lives.4, lives.5, lives.6, lives.7, lives.8, lives.9,
    ];
    for life in &lives {
        println!("{life}");
    }
    Ok(lives.iter().all(|life| life.wrong.is_empty()))
}

/// What was seen, and what should have been seen instead.
struct Life {
    name: &'static str,
    seen: String,
    wrong: Vec<String>,
}

impl Life {
    fn new(name: &'static str) -> Self {
        Self {
            name,
            seen: String::new(),
            wrong: Vec::new(),
        }
    }

    fn must(&mut self, what: &str, is: bool) {
        if !is {
            self.wrong.push(what.to_owned());
        }
    }

    fn exits_with_0(&mut self, ended: &Ended) {
        if !ended.status.success() || ended.killed {
            self.wrong.push(format!("exit code 0\n{}", ended.output));
        }
    }
}

impl fmt::Display for Life {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "- {}: {}", self.name, self.seen)?;
        for wrong in &self.wrong {
            write!(f, "\n  WRONG, not so: {wrong}")?;
        }
        Ok(())
    }
}

fn events(pod: &Pod) -> Vec<String> {
    pod.events
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone()
}

async fn post(pod: &Pod, path: &str) -> Result<(), Problem> {
    let answer = load::once(pod.port, "POST", path, BOUND).await;
    match answer {
        Ok(status) if status.is_success() => Ok(()),
        other => Err(Problem(format!("POST {path}: {other:?}"))),
    }
}

/// The container listens after 5 s. The liveness probe allows one failure, and has not begun.
async fn slow_start(sweep: &Sweep) -> Result<Life, Problem> {
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
async fn late_start(sweep: &Sweep) -> Result<Life, Problem> {
    let mut life = Life::new("the same, and the startup probe allows 3 failures");
    let command = sweep.backend(&["--start", &sweep.seconds(60.0)])?;
    let mut spec = sweep.pod(command, Hook::None);
    spec.startup.failure_threshold = 3;
    let mut pod = Pod::start(spec, free_port());
    pod.until("restarted", |status| status.restarts == 1)
        .await?;
    life.seen = events(&pod).join("; ");
    life.must(
        "stopped by the startup probe",
        life.seen.contains("startup"),
    );
    life.must("it never was ready", !pod.status().ready);
    Ok(life)
}

/// A pod that becomes unready leaves the endpoints, is not restarted, and returns.
async fn unready(sweep: &Sweep) -> Result<Life, Problem> {
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
    balancer.has(&[pod.port]).await?;
    post(&pod, "/unready").await?;
    pod.until("unready", |status| !status.ready).await?;
    balancer.has(&[]).await?;
    let answer = load::get(pod.port, "/").await;
    life.must(
        "it serves while it is unready",
        answer.is_ok_and(|it| it.is_success()),
    );
    post(&pod, "/ready").await?;
    pod.ready().await?;
    balancer.has(&[pod.port]).await?;
    let restarts = pod.status().restarts;
    life.seen = format!("left the endpoints and returned, {restarts} restarts");
    life.must("no restart", restarts == 0);
    Ok(life)
}

/// A process whose threads are all blocked does not answer the liveness probe. SIGTERM starts the stop, but
/// nothing can end it, so SIGKILL follows.
async fn hangs(sweep: &Sweep) -> Result<Life, Problem> {
    let mut life = Life::new("a process that hangs");
    let grace = sweep.seconds(10.0);
    let command = sweep.backend(&["--steer", "yes", "--grace", &grace])?;
    let mut spec = sweep.pod(command, Hook::None);
    spec.grace_period = sweep.time(10.0);
    let mut pod = Pod::start(spec, free_port());
    pod.ready().await?;
    // The answer may get lost, because the threads block at once.
    let _ = load::once(pod.port, "POST", "/hang", Duration::from_secs(1)).await;
    pod.until("restarted", |status| status.restarts == 1)
        .await?;
    pod.ready().await?;
    life.seen = format!("{}; then ready again", events(&pod).join("; "));
    let killed = life
        .seen
        .contains("liveness probe failed, ended after SIGKILL");
    life.must("stopped by the liveness probe, with SIGKILL", killed);
    Ok(life)
}

/// A deletion with a request in flight that outlasts the delay by 10 s.
async fn drains(sweep: &Sweep, hook: Hook) -> Result<Life, Problem> {
    let gets = matches!(hook, Hook::HttpGet(_));
    let mut life = Life::new(if gets {
        "the same, with a preStop httpGet"
    } else {
        "a deletion, with a request in flight that takes 15 s"
    });
    let slow = sweep.seconds(15.0);
    let command = sweep.backend(&["--pre-stop", "yes", "--slow", &slow])?;
    let mut pod = Pod::start(sweep.pod(command, hook), free_port());
    pod.ready().await?;
    let port = pod.port;
    let request = tokio::spawn(async move { load::once(port, "GET", "/slow", BOUND).await });
    // The request is in flight when the pod is deleted.
    in_flight(port).await?;
    let death = timeout(BOUND, pod.delete()).await;
    let death = death.map_err(|_| Problem("the deletion does not end".into()))??;
    let answer = request.await;
    let phases: Vec<_> = death.lively.phases.iter().map(String::as_str).collect();
    life.seen = format!(
        "SIGTERM {:.1} s and exit {:.1} s after the deletion, {}; {}",
        (death.terminated - death.deleted).as_secs_f64(),
        (death.ended.exited - death.deleted).as_secs_f64(),
        death.ended.status,
        death.lively,
    );
    let answered = matches!(answer, Ok(Ok(status)) if status.is_success());
    life.must("the request is answered", answered);
    life.exits_with_0(&death.ended);
    life.must(
        "/livez answers while draining",
        phases.contains(&"draining"),
    );
    life.must("/livez answers without a gap", death.lively.gaps == 0);
    life.must(
        "the report says clean",
        death.ended.output.contains(": clean"),
    );
    if gets {
        life.must("the hook succeeds", death.hook == Some(true));
        let trigger = death.ended.output.contains("shutdown by preStop");
        life.must("the call of the route starts the stop", trigger);
        // The route answers when the delay is over, and the kubelet waits for the answer.
        let waited = death.terminated - death.deleted >= sweep.time(5.0);
        life.must("SIGTERM follows the answer", waited);
    } else {
        let trigger = death.ended.output.contains("shutdown by SIGTERM");
        life.must("SIGTERM starts the stop", trigger);
    }
    Ok(life)
}

/// Waits until a request is in flight: the slow one is sent at once, and then a quick one is answered.
async fn in_flight(port: u16) -> Result<(), Problem> {
    sleep(Duration::from_millis(200)).await;
    match load::get(port, "/").await {
        Ok(status) if status.is_success() => Ok(()),
        other => Err(Problem(format!("GET /: {other:?}"))),
    }
}

/// A deletion with nothing in flight but probes, of which there are many.
async fn asked_often(sweep: &Sweep) -> Result<Life, Problem> {
    let mut life = Life::new("a deletion, and /livez is asked every 10 ms");
    let mut spec = sweep.pod(sweep.backend(&[])?, Hook::None);
    spec.liveness.period = Duration::from_millis(10);
    let mut pod = Pod::start(spec, free_port());
    pod.ready().await?;
    let death = pod.delete().await?;
    let took = death.ended.exited - death.deleted;
    life.seen = format!(
        "exit {:.1} s after the deletion, {}; {}",
        took.as_secs_f64(),
        death.ended.status,
        death.lively,
    );
    life.exits_with_0(&death.ended);
    life.must("/livez answers without a gap", death.lively.gaps == 0);
    // If a probe prolonged the drain, the drain would end at its deadline, 24 s after the deletion.
    let in_time = took < sweep.time(DRAIN_DELAY) + sweep.time(19.0) / 2;
    life.must("the stop is as long as the delay", in_time);
    Ok(life)
}

/// A stop without a deletion: the kubelet probes liveness to the end, and one failure is enough for
/// it to stop the container. It starts the container again.
async fn signalled(sweep: &Sweep) -> Result<Life, Problem> {
    let mut life = Life::new("a stop that the kubelet does not know of");
    let command = sweep.backend(&["--pre-stop", "yes", "--slow", &sweep.seconds(15.0)])?;
    let mut pod = Pod::start(sweep.pod(command, Hook::None), free_port());
    pod.ready().await?;
    let port = pod.port;
    let request = tokio::spawn(async move { load::once(port, "GET", "/slow", BOUND).await });
    in_flight(port).await?;
    // This call does not come from the kubelet.
    let stop = tokio::spawn(async move { load::once(port, "GET", "/prestop", BOUND).await });
    pod.until("restarted", |status| status.restarts == 1)
        .await?;
    let answered = matches!(request.await, Ok(Ok(status)) if status.is_success());
    let told = matches!(stop.await, Ok(Ok(status)) if status.is_success());
    pod.ready().await?;
    life.seen = format!("{}; then ready again", events(&pod).join("; "));
    life.must("the request is answered", answered && told);
    // A probe may come in the last moment, when the port is closed and the process has not ended. The
    // kubelet then sends SIGTERM, which changes nothing.
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

/// A preStop GET that is refused: SIGTERM follows at once.
async fn missing_hook(sweep: &Sweep) -> Result<Life, Problem> {
    let mut life = Life::new("a preStop httpGet of a path that does not exist");
    let hook = Hook::HttpGet("/no-such-route");
    let mut pod = Pod::start(sweep.pod(sweep.backend(&[])?, hook), free_port());
    pod.ready().await?;
    let death = pod.delete().await?;
    let output = &death.ended.output;
    life.seen = format!("SIGTERM at once, {}", death.ended.status);
    life.must(
        "SIGTERM starts the stop",
        output.contains("shutdown by SIGTERM"),
    );
    life.exits_with_0(&death.ended);
    Ok(life)
}

/// A hook that outlasts the grace period. The service gets SIGTERM at the end of the grace period, and has
/// two seconds. A plan that does not fit them is killed.
async fn endless_hook(sweep: &Sweep) -> Result<Life, Problem> {
    let mut life = Life::new("a preStop sleep that outlasts the grace period");
    let mut spec = sweep.pod(sweep.backend(&[])?, Hook::Sleep(sweep.time(60.0)));
    spec.grace_period = sweep.time(6.0);
    let mut pod = Pod::start(spec, free_port());
    pod.ready().await?;
    let death = pod.delete().await?;
    life.seen = format!(
        "SIGTERM at the end of the grace period, killed: {}",
        death.ended.killed
    );
    life.must("the hook is abandoned", death.hook == Some(false));
    let late = death.terminated - death.deleted >= sweep.time(6.0);
    life.must("SIGTERM at the end of the grace period", late);
    // The delay of 5 s does not fit into the two seconds that are left.
    life.must("SIGKILL two seconds later", death.ended.killed);
    Ok(life)
}
