//! The result of a run: which requests were lost, when and how, and how each stop went.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Write},
    os::unix::process::ExitStatusExt,
    time::Duration,
};

use crate::{
    deploy::{Plan, Run, Stop},
    load::{Failure, How, Kind},
};

/// When a request was lost, relative to the stop before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum When {
    /// Before the first SIGTERM, so that no stop can be the cause.
    BeforeSignal,
    /// Between SIGTERM and the end of the process, while the balancer was still sending.
    Delay,
    /// Between SIGTERM and the end of the process, behind a balancer that does not tell when it
    /// stopped sending.
    Stopping,
    /// Between SIGTERM and the end of the process, after the balancer had stopped sending.
    Draining,
    AfterExit,
}

impl fmt::Display for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BeforeSignal => "before the first SIGTERM",
            Self::Delay => "in the delay (SIGTERM was sent, the balancer had not noticed)",
            Self::Stopping => "between SIGTERM and exit",
            Self::Draining => "while draining (the balancer had noticed)",
            Self::AfterExit => "after exit",
        })
    }
}

/// Returns the last stop that began before the failure, and when during that stop the failure happened.
pub(crate) fn when<'a>(failure: &Failure, stops: &'a [Stop]) -> (When, Option<&'a Stop>) {
    let before = |stop: &&Stop| stop.ended.signalled <= failure.failed;
    let Some(stop) = stops.iter().rev().find(before) else {
        return (When::BeforeSignal, None);
    };
    let when = if failure.failed >= stop.ended.exited {
        When::AfterExit
    } else {
        match stop.noticed {
            None => When::Stopping,
            Some(noticed) if noticed <= failure.failed => When::Draining,
            Some(_) => When::Delay,
        }
    };
    (when, Some(stop))
}

/// Failures of one kind.
#[derive(Debug)]
struct Group {
    count: usize,
    kinds: BTreeSet<Kind>,
    /// Time of the first failure after SIGTERM.
    first: Duration,
    last: Duration,
    /// The number of these requests that began before SIGTERM.
    begun_before: usize,
}

fn groups(run: &Run) -> BTreeMap<(When, How), Group> {
    let mut groups = BTreeMap::new();
    for failure in &run.tally.failures {
        let (when, stop) = when(failure, &run.stops);
        let after = stop.map_or(Duration::ZERO, |stop| failure.failed - stop.ended.signalled);
        let group = groups.entry((when, failure.how)).or_insert(Group {
            count: 0,
            kinds: BTreeSet::new(),
            first: after,
            last: after,
            begun_before: 0,
        });
        group.count += 1;
        group.kinds.insert(failure.kind);
        group.first = group.first.min(after);
        group.last = group.last.max(after);
        group.begun_before +=
            usize::from(stop.is_some_and(|stop| failure.begun < stop.ended.signalled));
    }
    groups
}

/// Whether no request was lost, and every instance ended without SIGKILL.
pub(crate) fn passes(run: &Run) -> bool {
    run.tally.failures.is_empty() && run.stops.iter().all(|stop| !stop.ended.killed)
}

pub(crate) fn print(plan: &Plan, run: &Run) {
    let (total, lost) = (run.tally.total(), run.tally.failures.len());
    println!("{total} requests, {lost} lost");
    for (kind, count) in &run.tally.requests {
        println!("    {count:>7}  {kind}");
    }
    println!(
        "slowest GET {}: {:.3} s",
        plan.paths.quick,
        run.tally.slowest.as_secs_f64()
    );
    for note in &run.untested {
        println!("    {note}");
    }
    let groups = groups(run);
    for ((when, how), group) in &groups {
        let kinds: Vec<_> = group.kinds.iter().map(ToString::to_string).collect();
        println!("\n{} lost {when}: {how}", group.count);
        println!("    of: {}", kinds.join(", "));
        if *when != When::BeforeSignal {
            let (from, to) = (group.first.as_millis(), group.last.as_millis());
            println!(
                "    {from} to {to} ms after SIGTERM; {} had begun before it",
                group.begun_before
            );
        }
    }
    println!();
    let mut warned = false;
    for (number, stop) in (1..).zip(&run.stops) {
        println!("stop {number}: {}", describe(stop, plan));
        for warning in warnings(&stop.ended.output) {
            println!("    {warning}");
            warned = true;
        }
    }
    match (passes(run), warned) {
        (true, false) => println!("\nNothing was lost."),
        (true, true) => println!("\nNothing was lost, but the service warns: see above."),
        (false, _) => {}
    }
}

/// The warnings of the report in what an instance printed. A long one is continued on lines that are indented
/// further.
fn warnings(output: &str) -> Vec<String> {
    let indent = |line: &str| line.len() - line.trim_start().len();
    let mut lines = output.lines().peekable();
    let mut warnings = Vec::new();
    while let Some(line) = lines.next() {
        if !line.trim_start().starts_with("warning: ") {
            continue;
        }
        let mut warning = line.trim().to_owned();
        while let Some(more) = lines.next_if(|more| indent(more) > indent(line)) {
            warning = warning + " " + more.trim();
        }
        // A service may print the report and log it.
        if !warnings.contains(&warning) {
            warnings.push(warning);
        }
    }
    warnings
}

fn describe(stop: &Stop, plan: &Plan) -> String {
    let ended = &stop.ended;
    let took = ended.exited - ended.signalled;
    let mut text = if ended.killed {
        format!(
            "had not ended {:.1} s after SIGTERM (--grace), and was killed",
            plan.grace.as_secs_f64()
        )
    } else if let Some(code) = ended.status.code() {
        format!("exit code {code} after {:.3} s", took.as_secs_f64())
    } else {
        let signal = ended.status.signal().unwrap_or_default();
        format!("ended by signal {signal} after {:.3} s", took.as_secs_f64())
    };
    if let Some(noticed) = stop.noticed {
        let after = noticed
            .saturating_duration_since(ended.signalled)
            .as_secs_f64();
        let _ = write!(text, "; the balancer noticed after {after:.3} s");
    }
    text
}
