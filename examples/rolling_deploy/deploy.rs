//! A rolling update under load. For each instance: start a new instance, wait until it is ready and the
//! balancer sends to it, send SIGTERM to the old instance, and wait until it has ended.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use hyper::StatusCode;
use tokio::time::sleep;

use crate::{
    balancer::{Balancer, Check, Running},
    instance::{Ended, Instance, Problem, free_port},
    load::{How, Load, Paths, Tally},
    progress::Progress,
    single,
};

/// The time of load before the first signal, and after the last stop.
const AROUND: Duration = Duration::from_secs(1);

/// How much longer than its checks a balancer may take to notice that an instance is ready or has ended.
/// Only a busy machine needs it.
const NOTICE: Duration = Duration::from_secs(5);

#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) command: Vec<String>,
    pub(crate) check: Check,
    pub(crate) paths: Paths,
    /// The time from SIGTERM to SIGKILL.
    pub(crate) grace: Duration,
    /// The time in which an instance must become ready.
    pub(crate) start_timeout: Duration,
    pub(crate) instances: usize,
    /// How often each instance is replaced.
    pub(crate) rounds: usize,
    /// The folder for what the instances print, `1.log` for the first stop.
    pub(crate) logs: Option<PathBuf>,
    pub(crate) front: Front,
}

/// The balancer in front of the instances.
#[derive(Clone, Debug)]
pub(crate) enum Front {
    /// The balancer of this example.
    Own,
    /// A balancer that is already running at `address` and sends to `ports`. There must be more ports
    /// than instances, because a new instance starts before the old one stops. The balancer has the
    /// time `settle` to notice that an instance is ready or has ended.
    External {
        address: String,
        ports: Vec<u16>,
        settle: Duration,
    },
}

#[derive(Debug)]
pub(crate) struct Stop {
    pub(crate) ended: Ended,
    /// When the balancer stopped sending, if known.
    pub(crate) noticed: Option<Instant>,
}

#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) tally: Tally,
    pub(crate) stops: Vec<Stop>,
    /// What the load does not test, because the service does not have the path, or does not answer as needed.
    pub(crate) untested: Vec<String>,
}

pub(crate) async fn run(plan: &Plan, progress: &Progress) -> Result<Run, Problem> {
    let mut paths = plan.paths.clone();
    let own = start_balancer(plan).await?;
    let balancer = own.as_ref().map(|own| &own.balancer);
    let target = match (&plan.front, balancer) {
        (Front::External { address, .. }, _) => address.clone(),
        (Front::Own, balancer) => balancer.expect("started").address().to_string(),
    };

    if let Front::External { address, .. } = &plan.front {
        must_not_answer(address, &paths).await?;
    }
    let mut living = Vec::new();
    for number in 1..=plan.instances {
        progress.say(&format!("starting instance {number}"));
        living.push(start(plan, &living, balancer).await?);
    }
    let untested = leave_out(&living[0], &mut paths).await?;
    if let Front::External { address, .. } = &plan.front {
        reaches(address, &living[0], &paths).await?;
    }
    let load = Load::start(target, paths);
    let watch = progress.follow(&load);
    let mut stops = Vec::new();
    let result: Result<(), Problem> = tokio::select! {
        result = replace_all(plan, balancer, &mut living, &mut stops, progress) => result,
        never = watch => match never {},
    };
    result?;
    let tally = load.stop().await;
    Ok(Run {
        tally,
        stops,
        untested,
    })
}

async fn start_balancer(plan: &Plan) -> Result<Option<Running>, Problem> {
    if !matches!(plan.front, Front::Own) {
        return Ok(None);
    }
    let own = Balancer::start(Some(plan.check.clone())).await;
    own.map(Some)
        .map_err(|error| Problem(format!("the balancer does not start: {error}")))
}

async fn replace_all(
    plan: &Plan,
    balancer: Option<&Arc<Balancer>>,
    living: &mut Vec<Instance>,
    stops: &mut Vec<Stop>,
    progress: &Progress,
) -> Result<(), Problem> {
    sleep(AROUND).await;
    let all = plan.instances * plan.rounds;
    for number in 1..=all {
        progress.say(&format!("replacing an instance, {number} of {all}"));
        let new = start(plan, living, balancer).await?;
        living.push(new);
        let mut old = living.remove(0);
        old.must_run("before it was told to").await?;
        let stopped = stop(plan, &mut old, balancer).await?;
        if let Some(folder) = &plan.logs {
            let file = folder.join(format!("{number}.log"));
            std::fs::write(&file, &stopped.ended.output)
                .map_err(|error| Problem(format!("cannot write {}: {error}", file.display())))?;
        }
        stops.push(stopped);
        progress.step();
    }
    sleep(AROUND).await;
    for instance in living {
        instance.must_run("before it was told to").await?;
    }
    Ok(())
}

/// Starts an instance. Returns when the balancer sends requests to it.
async fn start(
    plan: &Plan,
    living: &[Instance],
    balancer: Option<&Arc<Balancer>>,
) -> Result<Instance, Problem> {
    let port = match &plan.front {
        Front::Own => free_port(),
        Front::External { ports, .. } => *ports
            .iter()
            .find(|port| living.iter().all(|other| other.port != **port))
            .expect("checked with the options"),
    };
    let mut instance = Instance::start(&plan.command, port)?;
    instance.ready(&plan.check.path, plan.start_timeout).await?;
    if let Some(balancer) = balancer {
        balancer.add(port);
        let begun = Instant::now();
        while !balancer.is_up(port) {
            instance.must_run("before the balancer sent to it").await?;
            if begun.elapsed() > plan.start_timeout {
                return Err(Problem(format!(
                    "port {port} was ready once, but not for the balancer's checks: GET {} does not keep succeeding",
                    plan.check.path
                )));
            }
            sleep(Duration::from_millis(10)).await;
        }
    } else if let Front::External { settle, .. } = plan.front {
        sleep(settle).await;
    }
    Ok(instance)
}

async fn stop(
    plan: &Plan,
    old: &mut Instance,
    balancer: Option<&Arc<Balancer>>,
) -> Result<Stop, Problem> {
    let signalled = old.terminate();
    let ended = old.ended(signalled, plan.grace).await?;
    let mut noticed = None;
    if let Some(balancer) = balancer {
        // The address stays in the balancer's list until the balancer's own checks have failed.
        let bound = (plan.check.interval + single::PROBE) * plan.check.fall + NOTICE;
        while balancer.is_up(old.port) {
            if ended.exited.elapsed() > bound {
                return Err(Problem(format!(
                    "GET {} on port {} still succeeds, although the process that the command started has \
                     ended. A service must not leave its process group (setsid), as it cannot outlive the \
                     first process of its container.",
                    plan.check.path, old.port
                )));
            }
            sleep(Duration::from_millis(10)).await;
        }
        noticed = balancer.down_since(old.port);
        balancer.remove(old.port);
    } else if let Front::External { settle, .. } = plan.front {
        sleep(settle).await;
    }
    Ok(Stop { ended, noticed })
}

/// Checks that nothing answers for the service while no instance runs. Otherwise the load would go elsewhere.
async fn must_not_answer(address: &str, paths: &Paths) -> Result<(), Problem> {
    match single::at(address, "GET", &paths.quick, NOTICE).await {
        Err(How::Refused) => Err(Problem(format!("nothing listens on {address} (--behind)"))),
        Ok(status) if paths.is_answer(status) => Err(Problem(format!(
            "GET {} is answered with {status} at {address} (--behind), although no instance runs yet. Does it \
             send to other servers than --ports?",
            paths.quick
        ))),
        _ => Ok(()),
    }
}

/// Checks that the balancer at `address` has the service behind it: it must answer as the service itself.
async fn reaches(address: &str, instance: &Instance, paths: &Paths) -> Result<(), Problem> {
    let direct = single::once(instance.port, "GET", &paths.quick, paths.timeout).await;
    let begun = Instant::now();
    let through = loop {
        let through = single::at(address, "GET", &paths.quick, paths.timeout).await;
        if matches!((&direct, &through), (Ok(direct), Ok(through)) if direct == through) {
            return Ok(());
        }
        if begun.elapsed() > NOTICE {
            break through;
        }
        sleep(Duration::from_millis(100)).await;
    };
    Err(Problem(format!(
        "GET {} is {} by the balancer at {address} (--behind), and {} by the instance on port {}. Does the \
         balancer send to --ports?",
        paths.quick,
        answer(through),
        answer(direct),
        instance.port
    )))
}

fn answer(result: Result<StatusCode, How>) -> String {
    result.map_or_else(
        |how| how.to_string(),
        |status| format!("answered with {status}"),
    )
}

/// A slow request takes at least this long.
const SLOW: Duration = Duration::from_millis(100);

/// Tries each path once, without the balancer. Removes the paths that the service does not have. Returns what
/// the load does not test.
async fn leave_out(instance: &Instance, paths: &mut Paths) -> Result<Vec<String>, Problem> {
    let mut untested = Vec::new();
    let quick = single::once(instance.port, "GET", &paths.quick, paths.timeout).await;
    match quick {
        Ok(status) if paths.is_answer(status) => {}
        Ok(status) if status.is_client_error() => {
            return Err(Problem(format!(
                "GET {} is answered with {status}, so the load would not reach the service. --get names \
                 another path, and --allow-status {} takes this answer for a success",
                paths.quick,
                status.as_u16()
            )));
        }
        other => {
            return Err(Problem(format!(
                "GET {} is {} although nothing was stopped. --get names another path",
                paths.quick,
                answer(other)
            )));
        }
    }
    let missing = |status: StatusCode| matches!(status.as_u16(), 404 | 405 | 501);
    let names = "(--slow, --upload name other paths)";
    if let Some(slow) = &paths.slow {
        let begun = Instant::now();
        let tried = single::text(instance.port, slow, paths.timeout).await;
        match tried.map(|(status, _)| status) {
            Ok(status) if missing(status) => {
                untested.push(format!("no GET {slow}: the service does not have it {names}"));
                paths.slow = None;
            }
            Ok(_) if begun.elapsed() < SLOW => untested.push(format!(
                "GET {slow} is answered within {} s, so no slow request was in flight at a SIGTERM {names}",
                SLOW.as_secs_f64()
            )),
            _ => {}
        }
    }
    if let Some(upload) = &paths.upload {
        match single::once(instance.port, "POST", upload, paths.timeout).await {
            Ok(status) if missing(status) => {
                untested.push(format!("no POST {upload}: the service does not have it {names}"));
                paths.upload = None;
            }
            Ok(status) if status.is_client_error() => untested.push(format!(
                "POST {upload} without a body is answered with {status}: does an upload reach the service? {names}"
            )),
            _ => {}
        }
    }
    Ok(untested)
}
