//! What a run says about a service: what was lost, when and how, how the stops went, and what to
//! change.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    os::unix::process::ExitStatusExt,
    time::Duration,
};

use crate::{
    deploy::{Front, Plan, Run, Stop},
    load::{Failure, How, Kind},
};

/// When a request was lost, on the clock of the stop before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum When {
    /// Before the first SIGTERM: the stop has nothing to do with it.
    BeforeSignal,
    /// Between SIGTERM and the end, and the balancer was still sending.
    Delay,
    /// Between SIGTERM and the end, and the balancer had stopped sending.
    Draining,
    AfterExit,
}

impl fmt::Display for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BeforeSignal => "before the first SIGTERM",
            Self::Delay => "in the delay (SIGTERM was sent, the balancer had not noticed)",
            Self::Draining => "while draining (the balancer had noticed)",
            Self::AfterExit => "after exit",
        })
    }
}

/// The stop that a failure belongs to, which is the one before it, and when in it it happened.
fn when<'a>(failure: &Failure, stops: &'a [Stop]) -> (When, Option<&'a Stop>) {
    let before = |stop: &&Stop| stop.ended.signalled <= failure.failed;
    let Some(stop) = stops.iter().rev().find(before) else {
        return (When::BeforeSignal, None);
    };
    let when = if failure.failed >= stop.ended.exited {
        When::AfterExit
    } else if stop
        .noticed
        .is_some_and(|noticed| noticed <= failure.failed)
    {
        When::Draining
    } else {
        When::Delay
    };
    (when, Some(stop))
}

/// Failures of one sort.
#[derive(Debug)]
struct Group {
    count: usize,
    kinds: BTreeSet<Kind>,
    /// After SIGTERM.
    first: Duration,
    last: Duration,
    /// So many had begun before the SIGTERM.
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

/// Whether the service loses nothing and ends by itself.
pub(crate) fn passes(run: &Run) -> bool {
    run.tally.failures.is_empty() && run.stops.iter().all(|stop| !stop.ended.killed)
}

pub(crate) fn print(plan: &Plan, run: &Run) {
    let (total, lost) = (run.tally.total(), run.tally.failures.len());
    println!("{total} requests, {lost} lost");
    for (kind, count) in &run.tally.requests {
        println!("    {count:>7}  {kind}");
    }
    for path in &run.left_out {
        println!("    no {path}: the service does not have it (--slow, --upload name other paths)");
    }
    let groups = groups(run);
    for ((when, how), group) in &groups {
        let kinds: Vec<_> = group.kinds.iter().map(ToString::to_string).collect();
        println!("\n{} lost {when}: {how}", group.count);
        println!("    of: {}", kinds.join(", "));
        if *when != When::BeforeSignal {
            let (first, last) = (group.first.as_millis(), group.last.as_millis());
            println!(
                "    {first} to {last} ms after SIGTERM; {} had begun before it",
                group.begun_before
            );
        }
    }
    println!();
    for (number, stop) in (1..).zip(&run.stops) {
        println!("stop {number}: {}", describe(stop, plan));
    }
    let advice = advice(plan, run, &groups);
    if !advice.is_empty() {
        println!();
    }
    for line in advice {
        println!("- {line}");
    }
    if passes(run) {
        println!("\nNothing was lost.");
    }
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
        text += &format!("; the balancer noticed after {after:.3} s");
    }
    text
}

/// What to change, the most urgent first.
fn advice(plan: &Plan, run: &Run, groups: &BTreeMap<(When, How), Group>) -> Vec<String> {
    let mut lines = Vec::new();
    let count = |wanted: &dyn Fn(When, How, &Group) -> bool| -> (usize, Duration) {
        let matching = groups
            .iter()
            .filter(|((when, how), group)| wanted(*when, *how, group));
        matching.fold((0, Duration::ZERO), |(count, last), (_, group)| {
            (count + group.count, last.max(group.last))
        })
    };
    let notices = match plan.front {
        Front::Own => format!(
            "interval × fall = {:.1} s × {} = {:.1} s",
            plan.check.interval.as_secs_f64(),
            plan.check.fall,
            plan.check.notices_within().as_secs_f64()
        ),
        Front::External { .. } => "the time your balancer needs to notice".into(),
    };
    let killed = run.stops.iter().filter(|stop| stop.ended.killed).count();
    if killed > 0 {
        lines.push(format!(
            "{killed} of {} stops ended by SIGKILL. Handle SIGTERM (a shell as the container's first \
             process does not pass it on), and give the drain a deadline below the grace period: with \
             tower-graceful, grace_period = terminationGracePeriodSeconds.",
            run.stops.len()
        ));
    }
    let unhandled = |stop: &&Stop| !stop.ended.killed && stop.ended.status.signal() == Some(15);
    if run.stops.iter().any(|stop| unhandled(&stop)) {
        lines.push(
            "SIGTERM itself ended the process: it has no handler for it, or sends it to itself in \
             the end (then this is in order)."
                .into(),
        );
    }
    let (early, _) = count(&|when, _, _| when == When::BeforeSignal);
    if early > 0 {
        lines.push(format!(
            "{early} requests were lost before anything was stopped: look at the service, or at the \
             paths (--get, --slow, --upload), first."
        ));
    }
    let gone = |how| matches!(how, How::Refused | How::Reset | How::NoBackend);
    let (refused, last) =
        count(&|when, how, _| matches!(when, When::Delay | When::AfterExit) && gone(how));
    if refused > 0 {
        lines.push(format!(
            "{refused} requests were refused or reset within {} ms of the signal: the service stops \
             listening before the balancer has noticed. Let it fail its readiness probe at SIGTERM \
             and go on serving: with tower-graceful, set drain_delay above {notices}.",
            last.as_millis()
        ));
    }
    let status = |how| matches!(how, How::Status(_));
    let (answered, last) =
        count(&|when, how, _| matches!(when, When::Delay | When::AfterExit) && status(how));
    if answered > 0 {
        lines.push(format!(
            "{answered} requests were answered with an error within {} ms of the signal, before the \
             balancer had noticed. Let the service go on serving for longer: with tower-graceful, \
             set drain_delay above {notices}.",
            last.as_millis()
        ));
    }
    let (cut, _) = count(&|when, how, group| {
        how == How::Truncated || (when == When::Draining && gone(how)) || group.begun_before > 0
    });
    if cut > 0 {
        lines.push(format!(
            "{cut} requests are of sorts that were under way when they were cut. Let the service wait \
             for requests in flight, uploads and response bodies included: with tower-graceful, set \
             drain_timeout above the slowest request."
        ));
    }
    let (late, _) = count(&|when, how, _| when == When::Draining && status(how));
    if late > 0 {
        lines.push(format!(
            "{late} requests were answered with an error while draining, although the balancer had \
             noticed: they had been on their way. A little more drain_delay covers them."
        ));
    }
    let (timed_out, _) = count(&|_, how, _| how == How::TimedOut);
    if timed_out > 0 {
        lines.push(format!(
            "{timed_out} requests were not answered within {:.0} s (--timeout).",
            plan.paths.timeout.as_secs_f64()
        ));
    }
    let blind = |stop: &&Stop| {
        stop.noticed
            .is_some_and(|noticed| noticed > stop.ended.exited)
    };
    if run.stops.iter().any(|stop| blind(&stop)) {
        lines.push(format!(
            "The balancer noticed only after the process had ended: until then GET {} was a success, \
             or the process was too quick. Answer 503 from SIGTERM on, for longer than {notices}.",
            plan.check.path
        ));
    }
    if run
        .stops
        .iter()
        .any(|stop| stop.ended.status.code().is_some_and(|code| code != 0))
    {
        lines.push("An exit code other than 0 says that a stop was not clean.".into());
    }
    lines
}
