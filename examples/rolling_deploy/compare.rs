//! The comparison: the same rolling update of the same service, on plain axum and with this crate.

use std::{collections::BTreeMap, time::Duration};

use crate::{
    deploy::{self, Plan, Run},
    instance::Problem,
    progress::Progress,
    verdict,
};

/// Runs both, and prints a row for each and the timeline of one stop. Returns whether this crate lost no
/// request.
pub(crate) async fn run(plan: &Plan) -> Result<bool, Problem> {
    let program = std::env::current_exe()
        .map_err(|error| Problem(format!("cannot find this program's file: {error}")))?
        .display()
        .to_string();
    println!(
        "{} backends, each replaced {} times under load, behind a balancer that requests /readyz every \
         {:.2} s, stops sending after {} failures, and does not retry.\n",
        plan.instances,
        plan.rounds,
        plan.check.interval.as_secs_f64(),
        plan.check.fall
    );
    let mut runs = Vec::new();
    for (name, kind) in [("plain axum", "plain"), ("tower-graceful", "graceful")] {
        let command = [&*program, "--backend", kind, "{port}"];
        let plan = Plan {
            command: command.map(String::from).into(),
            ..plan.clone()
        };
        let progress = Progress::new(name, plan.instances * plan.rounds);
        runs.push((name, deploy::run(&plan, &progress).await?));
    }
    table(&runs);
    let (_, ours) = runs.last().expect("two runs");
    if let Some(stop) = ours.stops.last() {
        println!("\nThe last stop with tower-graceful, as the service itself reports it:\n");
        print!("{}", stop.ended.output);
    }
    Ok(verdict::passes(ours) && ours.stops.iter().all(|stop| stop.ended.status.success()))
}

fn table(runs: &[(&str, Run)]) {
    println!(
        "\n{:16}{:>9}{:>8}{:>16}{:>14}  exit codes",
        "", "requests", "failed", "slowest GET /", "longest stop"
    );
    for (name, run) in runs {
        let took = |stop: &deploy::Stop| stop.ended.exited - stop.ended.signalled;
        let longest = run.stops.iter().map(took).max().unwrap_or(Duration::ZERO);
        let codes: Vec<_> = run
            .stops
            .iter()
            .map(|stop| stop.ended.status.code())
            .collect();
        let codes: Vec<_> = codes
            .iter()
            .map(|code| code.map_or("signal".into(), |code| code.to_string()))
            .collect();
        println!(
            "{name:16}{:>9}{:>8}{:>14.3} s{:>12.3} s  {}",
            run.tally.total(),
            run.tally.failures.len(),
            run.tally.slowest.as_secs_f64(),
            longest.as_secs_f64(),
            codes.join(" ")
        );
    }
    for (name, run) in runs {
        let mut how = BTreeMap::new();
        for failure in &run.tally.failures {
            *how.entry((failure.how, failure.kind)).or_insert(0) += 1;
        }
        for ((how, kind), count) in how {
            println!("    {name}: {count} {how} ({kind})");
        }
    }
}
