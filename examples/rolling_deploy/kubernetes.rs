//! Simulates how the kubelet and the endpoint controller replace a pod, without a cluster. It shows how
//! late the removal of an address may arrive until a stop loses requests.
//!
//! ```sh
//! cargo run --example rolling_deploy -- --kubernetes            # times scaled to a fifth
//! cargo run --example rolling_deploy -- --kubernetes --scale 1  # real times, some minutes
//! cargo run --example rolling_deploy -- --kubernetes --removals 0,3,8
//! cargo run --example rolling_deploy -- --kubernetes --life     # a pod's life, event by event
//! ```
//!
//! `kubelet.rs` has the rules. The balancer has neither checks nor retries, like kube-proxy. Every change of
//! the endpoints reaches it after the removal delay. Unlike kube-proxy it chooses a pod for each request, and
//! sends nothing to a removed pod, also not on a connection that is already open. kube-proxy chooses for each
//! connection, and existing connections stay with their pod.
//!
//! The readiness probe does not speed up the removal, because the deletion has already started it.

use std::{collections::BTreeSet, fmt::Write as _, sync::Arc, time::Duration};

use tokio::time::sleep;

use crate::{
    balancer::Balancer,
    instance::{Problem, free_port},
    kubelet::{Death, Hook, Pod, Spec},
    load::{Load, Paths, Tally},
    probes::Probe,
};

/// In seconds. These are the defaults of this crate and of Kubernetes.
pub(crate) const DRAIN_DELAY: f64 = 5.0;
const GRACE_PERIOD: f64 = 30.0;
/// `minReadySeconds`.
const MIN_READY: f64 = 5.0;
/// The time that the kubelet adds after a hook that outlasts the grace period.
const EXTENSION: f64 = 2.0;
/// The timeout of what a pod is waited for on a busy machine, beside the times of the pod itself.
const BOUND: Duration = Duration::from_secs(60);
/// Seconds of load after the stop.
const AFTER: f64 = 2.0;

#[derive(Clone, Debug)]
pub(crate) struct Sweep {
    /// The removal delays in seconds.
    pub(crate) removals: Vec<f64>,
    /// The factor for all times, also those of the service.
    pub(crate) scale: f64,
    /// Whether to show a pod's life in place of the sweep.
    pub(crate) life: bool,
}

impl Default for Sweep {
    fn default() -> Self {
        Self {
            removals: vec![0.0, 1.0, 2.0, 3.0, 4.0, 4.5, 5.0, 5.5, 6.0, 8.0, 10.0],
            scale: 0.2,
            life: false,
        }
    }
}

impl Sweep {
    pub(crate) fn time(&self, seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds * self.scale)
    }

    /// The timeout of what a pod is waited for.
    pub(crate) fn bound(&self) -> Duration {
        BOUND + self.time(60.0)
    }

    pub(crate) fn seconds(&self, seconds: f64) -> String {
        self.time(seconds).as_secs_f64().to_string()
    }

    /// The probes of `examples/kubernetes/deployment.yaml`, but with a liveness probe that is as strict as
    /// possible: every second, and one missing answer is enough.
    pub(crate) fn pod(&self, command: Vec<String>, pre_stop: Hook) -> Spec {
        let probe = |path, period, failure_threshold| Probe {
            path,
            period: self.time(period),
            // Not scaled: a busy machine answers no faster.
            timeout: Duration::from_secs(3),
            success_threshold: 1,
            failure_threshold,
        };
        Spec {
            command,
            startup: probe("/livez", 1.0, 60),
            readiness: probe("/readyz", 2.0, 1),
            liveness: probe("/livez", 1.0, 1),
            pre_stop,
            grace_period: self.time(GRACE_PERIOD),
            extension: self.time(EXTENSION),
            bound: self.bound(),
        }
    }

    /// The command of this program's own backend with the default plan.
    pub(crate) fn backend(&self, options: &[&str]) -> Result<Vec<String>, Problem> {
        let (delay, grace) = (self.seconds(DRAIN_DELAY), self.seconds(GRACE_PERIOD));
        let plan = ["graceful", "{port}", "--delay", &delay, "--grace", &grace];
        command(&[&plan, options].concat())
    }
}

/// The command that starts this program as a backend.
fn command(words: &[&str]) -> Result<Vec<String>, Problem> {
    let program = std::env::current_exe()
        .map_err(|error| Problem(format!("cannot find this program's file: {error}")))?
        .display()
        .to_string();
    let start = [program.as_str(), "--backend"];
    Ok(start.iter().chain(words).map(ToString::to_string).collect())
}

/// A column of the table.
struct Column {
    title: &'static str,
    pod: Spec,
    deaths: Vec<Death>,
}

/// Prints a row for each removal delay, "failed requests of all requests", and then how the stops went.
/// Returns whether the stops of this crate went as they must, whatever the requests that came too late.
pub(crate) async fn run(sweep: &Sweep, paths: &Paths) -> Result<bool, Problem> {
    let sleeps = Hook::Sleep(sweep.time(DRAIN_DELAY));
    let gets = Hook::get("/prestop");
    let plain = command(&["plain", "{port}"])?;
    let mut columns = [
        ("plain axum", plain.clone(), Hook::None),
        ("plain axum, preStop sleep 5 s", plain, sleeps),
        ("tower-graceful, delay 5 s", sweep.backend(&[])?, Hook::None),
        (
            "the same, preStop httpGet",
            sweep.backend(&["--pre-stop", "yes"])?,
            gets,
        ),
    ]
    .map(|(title, command, hook)| Column {
        title,
        pod: sweep.pod(command, hook),
        deaths: Vec::new(),
    });

    println!("times are multiplied by {}\n", sweep.scale);
    let titles: Vec<_> = columns.iter().map(|column| column.title).collect();
    println!("| removal after | {} |", titles.join(" | "));
    println!("|{}", "---|".repeat(columns.len() + 1));
    for removal in &sweep.removals {
        // All columns run at the same time, each with its own pods, balancer and load.
        let [one, two, three, four] = &columns;
        let (one, two, three, four) = tokio::try_join!(
            replace_one(sweep, paths, &one.pod, *removal),
            replace_one(sweep, paths, &two.pod, *removal),
            replace_one(sweep, paths, &three.pod, *removal),
            replace_one(sweep, paths, &four.pod, *removal),
        )?;
        let mut row = format!("| {removal:.1} s |");
        for (column, (tally, death)) in columns.iter_mut().zip([one, two, three, four]) {
            let _ = write!(row, " {} of {} |", tally.failures.len(), tally.total());
            column.deaths.push(death);
        }
        println!("{row}");
    }
    println!("\n{}", summary(&columns));
    Ok(columns[2..].iter().all(|column| went_well(sweep, column)))
}

/// How the stops of each column went.
fn summary(columns: &[Column]) -> String {
    let mut text = String::from(
        "| stops | longest | SIGTERM after the deletion | exit codes | killed | restarts | answers of /livez \
         | missing between two | missing at the end |\n|---|---|---|---|---|---|---|---|---|\n",
    );
    for column in columns {
        let deaths = &column.deaths;
        let longest = deaths.iter().map(|it| it.ended.exited - it.deleted).max();
        let silence = deaths.iter().map(Death::silence).max();
        let signals = deaths.iter().map(|it| it.terminated - it.deleted);
        let codes: BTreeSet<_> = deaths.iter().map(|it| it.ended.status.code()).collect();
        let codes: Vec<_> = codes
            .into_iter()
            .map(|code| code.map_or_else(|| "none".to_owned(), |code| code.to_string()))
            .collect();
        let sum = |of: fn(&Death) -> u32| deaths.iter().map(of).sum::<u32>();
        let _ = writeln!(
            text,
            "| {} | {:.2} s | {:.2} s to {:.2} s | {} | {} | {} | {} | {} | {:.2} s |",
            column.title,
            longest.unwrap_or_default().as_secs_f64(),
            signals.clone().min().unwrap_or_default().as_secs_f64(),
            signals.max().unwrap_or_default().as_secs_f64(),
            codes.join(", "),
            sum(|it| it.ended.killed.into()),
            sum(|it| it.restarts),
            sum(|it| it.lively.answered),
            sum(|it| it.lively.gaps),
            silence.unwrap_or_default().as_secs_f64(),
        );
    }
    text
}

/// Whether no container was killed or restarted by a probe, each answered the liveness probe until it
/// ended, and an `httpGet` hook started the stop and lasted as long as the delay.
fn went_well(sweep: &Sweep, column: &Column) -> bool {
    column.deaths.iter().all(|death| {
        let hook_works = match column.pod.pre_stop {
            Hook::None | Hook::Sleep(_) => true,
            Hook::HttpGet(_) => death.was_called(sweep.time(DRAIN_DELAY)),
        };
        hook_works
            && death.ended.status.success()
            && !death.ended.killed
            && death.restarts == 0
            && death.was_lively(&column.pod.liveness)
            && death.hook != Some(false)
    })
}

/// Replaces one of two pods under load.
async fn replace_one(
    sweep: &Sweep,
    paths: &Paths,
    spec: &Spec,
    late: f64,
) -> Result<(Tally, Death), Problem> {
    let late = sweep.time(late);
    let running = Balancer::start(None).await;
    let running = running.map_err(|error| Problem(format!("no balancer: {error}")))?;
    let balancer = &running.balancer;
    let start = || Pod::start(spec.clone(), free_port());
    let (mut old, mut other) = (start(), start());
    tokio::try_join!(old.ready(), other.ready())?;
    // These two are older than the rollout, so the balancer has them already.
    for pod in [&old, &other] {
        pod.expose(Arc::clone(balancer), late);
    }
    let ports = [old.port, other.port];
    balancer.has(&ports, late + sweep.bound()).await?;
    let load = Load::start(balancer.address().to_string(), paths.clone());

    // maxSurge 1, maxUnavailable 0: the new pod starts first, and the rollout waits until its address has
    // arrived and for minReadySeconds after that. (The controller does not know when an address arrives.)
    let mut new = start();
    new.ready().await?;
    new.expose(Arc::clone(balancer), late);
    sleep(late + sweep.time(MIN_READY)).await;

    let death = old.delete().await?;
    // The address is removed late, also if the container ended long before.
    let rest = late.saturating_sub(death.deleted.elapsed());
    sleep(rest + sweep.time(AFTER)).await;
    let tally = load.stop().await;
    for pod in [other, new] {
        if pod.status().restarts > 0 {
            return Err(Problem(format!(
                "a pod that nothing deleted ended: {pod:?}"
            )));
        }
    }
    Ok((tally, death))
}
