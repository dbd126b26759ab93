//! Parses the command line.

use std::time::Duration;

use hyper::StatusCode;

use crate::{
    balancer::Check,
    deploy::{Front, Plan},
    instance::Problem,
    kubernetes::Sweep,
    load::Paths,
};

pub(crate) const HELP: &str = "\
A rolling update under load, and how many requests it loses.

  rolling_deploy                              this crate beside plain axum
  rolling_deploy [OPTIONS] COMMAND [ARGS...]  your service; {port} in its arguments is replaced,
                                              and PORT in its environment is set
  rolling_deploy --kubernetes                 a pod's stop, for removals of its address that arrive
                                              later and later; --scale and --removals only
  rolling_deploy --kubernetes --life          the lives of single pods: probes, preStop hooks, SIGKILL;
                                              --scale only
  rolling_deploy --backend KIND PORT          only the backend of the first form: graceful,
                                              plain, or deaf, which ignores SIGTERM

Times are in seconds. A path set to '' is not requested.

  --ready PATH           readiness probe [/readyz]
  --get PATH             what quick requests ask for [/]
  --slow PATH            a slow request [/slow]
  --upload PATH          takes a POST of 256 KiB that lasts half a second [/upload]
  --interval SECONDS     between two probes of the balancer [0.5; 0.25 without COMMAND]
  --fall COUNT           failed probes until the balancer stops sending [2]
  --allow-status STATUS  of --get, if it answers neither 2xx nor 3xx while nothing stops
  --timeout SECONDS      after which a request counts as lost [15]
  --grace SECONDS        from SIGTERM to SIGKILL [30]
  --start-timeout SECONDS  for an instance to become ready [30]
  --instances COUNT      instances of the service [2]
  --rounds COUNT         how often each instance is replaced [2]
  --behind HOST:PORT     a running balancer, in place of the built-in one
  --ports A,B,...        the ports it sends to, at least one more than instances
  --settle SECONDS       for it to notice that an instance is ready or has ended [1]
  --logs FOLDER          writes what each stopped instance printed to a file of its own
  --removals A,B,...     with --kubernetes, after which an address is removed [0,1,2,3,4,4.5,5,5.5,6,8,10]
  --scale FACTOR         with --kubernetes, for all times [0.2]
";

/// The form of the command line.
#[derive(Debug)]
pub(crate) enum Task {
    Help,
    /// Plain axum and this crate, side by side.
    Compare(Plan),
    Check(Plan),
    Kubernetes(Sweep, Paths),
}

pub(crate) fn parse(args: Vec<String>) -> Result<Task, Problem> {
    let mut plan = Plan {
        command: Vec::new(),
        check: Check {
            path: "/readyz".into(),
            interval: Duration::from_millis(500),
            fall: 2,
        },
        paths: Paths {
            quick: "/".into(),
            allowed: None,
            slow: Some("/slow".into()),
            upload: Some("/upload".into()),
            timeout: Duration::from_secs(15),
        },
        grace: Duration::from_secs(30),
        start_timeout: Duration::from_secs(30),
        instances: 2,
        rounds: 2,
        logs: None,
        front: Front::Own,
    };
    let (mut interval, mut behind, mut ports) = (None, None, Vec::new());
    let mut settle = Duration::from_secs(1);
    let (mut kubernetes, mut sweep) = (false, Sweep::default());
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        if !arg.starts_with("--") {
            plan.command = std::iter::once(arg).chain(args.by_ref()).collect();
            break;
        }
        if arg == "--help" {
            return Ok(Task::Help);
        }
        if arg == "--kubernetes" {
            kubernetes = true;
            continue;
        }
        if arg == "--life" {
            sweep.life = true;
            continue;
        }
        let value = args.next();
        let value = value.ok_or_else(|| Problem(format!("{arg} wants a value (--help)")))?;
        match arg.as_str() {
            "--ready" => plan.check.path = path(&arg, value)?,
            "--get" => plan.paths.quick = path(&arg, value)?,
            "--slow" => plan.paths.slow = optional(&arg, value)?,
            "--upload" => plan.paths.upload = optional(&arg, value)?,
            "--allow-status" => plan.paths.allowed = Some(status(&arg, &value)?),
            "--logs" => plan.logs = Some(value.into()),
            "--interval" => interval = Some(seconds(&arg, &value)?),
            "--fall" => plan.check.fall = count(&arg, &value)?,
            "--timeout" => plan.paths.timeout = seconds(&arg, &value)?,
            "--grace" => plan.grace = seconds(&arg, &value)?,
            "--start-timeout" => plan.start_timeout = seconds(&arg, &value)?,
            "--instances" => plan.instances = count(&arg, &value)? as usize,
            "--rounds" => plan.rounds = count(&arg, &value)? as usize,
            "--behind" => behind = Some(value),
            "--settle" => settle = seconds(&arg, &value)?,
            "--ports" => {
                let list: Result<_, _> = value.split(',').map(str::parse).collect();
                ports = list.map_err(|_| wrong(&arg, &value, "ports with commas between them"))?;
            }
            "--scale" => sweep.scale = factor(&arg, &value)?,
            "--removals" => sweep.removals = list(&arg, &value)?,
            _ => return Err(Problem(format!("unknown option {arg} (--help)"))),
        }
    }
    // The backends of the comparison have a delay of 1.5 s, and 0.25 s × 2 leaves room for a busy
    // machine.
    let default = if plan.command.is_empty() { 250 } else { 500 };
    plan.check.interval = interval.unwrap_or(Duration::from_millis(default));
    if let Some(address) = behind {
        if ports.len() <= plan.instances {
            return Err(Problem(format!(
                "--behind wants --ports, more than the {} instances",
                plan.instances
            )));
        }
        plan.front = Front::External {
            address,
            ports,
            settle,
        };
    }
    if sweep.life && !kubernetes {
        return Err(Problem("--life wants --kubernetes (--help)".into()));
    }
    Ok(match (kubernetes, plan.command.is_empty()) {
        (true, _) => Task::Kubernetes(sweep, plan.paths),
        (false, true) => Task::Compare(plan),
        (false, false) => Task::Check(plan),
    })
}

fn list(option: &str, value: &str) -> Result<Vec<f64>, Problem> {
    let numbers = value.split(',').map(|number| {
        let number: Option<f64> = number.parse().ok();
        number.filter(|number| (0.0..=600.0).contains(number))
    });
    let numbers: Option<_> = numbers.collect();
    numbers.ok_or_else(|| wrong(option, value, "seconds with commas between them"))
}

fn wrong(option: &str, value: &str, wanted: &str) -> Problem {
    Problem(format!("{option} {value}: {wanted} is wanted (--help)"))
}

fn path(option: &str, value: String) -> Result<String, Problem> {
    if value.starts_with('/') && value.parse::<hyper::Uri>().is_ok() {
        Ok(value)
    } else {
        Err(wrong(option, &value, "a path that begins with /"))
    }
}

fn optional(option: &str, value: String) -> Result<Option<String>, Problem> {
    if value.is_empty() {
        Ok(None)
    } else {
        path(option, value).map(Some)
    }
}

fn seconds(option: &str, value: &str) -> Result<Duration, Problem> {
    let seconds = value.parse().ok();
    let seconds = seconds.and_then(|value| Duration::try_from_secs_f64(value).ok());
    // At most one day, so that no calculation with durations overflows.
    seconds
        .filter(|seconds| !seconds.is_zero() && *seconds <= Duration::from_secs(86_400))
        .ok_or_else(|| {
            wrong(
                option,
                value,
                "a number of seconds, above 0 and at most a day,",
            )
        })
}

fn factor(option: &str, value: &str) -> Result<f64, Problem> {
    let factor = value
        .parse()
        .ok()
        .filter(|factor| (0.01..=10.0).contains(factor));
    factor.ok_or_else(|| wrong(option, value, "a factor from 0.01 to 10"))
}

fn status(option: &str, value: &str) -> Result<StatusCode, Problem> {
    let status = value
        .parse()
        .ok()
        .filter(|status: &StatusCode| (200..500).contains(&status.as_u16()));
    status.ok_or_else(|| wrong(option, value, "a status from 200 to 499"))
}

fn count(option: &str, value: &str) -> Result<u32, Problem> {
    let count = value.parse().ok().filter(|count| (1..=100).contains(count));
    count.ok_or_else(|| wrong(option, value, "a number from 1 to 100"))
}
