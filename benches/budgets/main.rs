//! The budgets: the cost of the crate, beside the cost of the same server without it or with another
//! crate, in one run on one machine.
//!
//! `cargo bench --bench budgets` runs all measurements, and `cargo bench --bench budgets -- wake cut`
//! only those named. `--write` writes the results into `BENCHMARKS.md` and `benches/plot.svg`. The exit
//! code is 1 if a budget is not met. `BENCHMARKS.md` describes each measurement.

#[cfg(target_os = "linux")]
mod child;
#[cfg(target_os = "linux")]
mod connections;
#[cfg(target_os = "linux")]
mod figures;
#[cfg(target_os = "linux")]
mod load;
#[cfg(target_os = "linux")]
#[path = "../peers/mod.rs"]
mod peers;
#[cfg(target_os = "linux")]
mod plot;
#[cfg(target_os = "linux")]
mod reads;
#[cfg(target_os = "linux")]
mod requests;
#[cfg(target_os = "linux")]
mod rows;
#[cfg(target_os = "linux")]
mod scale;
#[cfg(target_os = "linux")]
mod scale_server;
#[cfg(target_os = "linux")]
mod server;
#[cfg(target_os = "linux")]
mod throughput;
#[cfg(target_os = "linux")]
mod tls;
#[cfg(target_os = "linux")]
mod wake;

#[cfg(not(target_os = "linux"))]
fn main() {
    println!("budgets: measured on Linux only, because the figures come from /proc");
}

#[cfg(target_os = "linux")]
fn main() -> std::process::ExitCode {
    use std::process::ExitCode;

    use self::rows::Rows;

    type Measure = fn(&mut Rows);
    const ALL: [(&str, Measure); 8] = [
        ("requests", requests::measure),
        ("reads", reads::measure),
        ("throughput", throughput::measure),
        ("wake", wake::measure),
        ("notify", wake::measure_notify),
        ("cut", connections::measure_cut),
        ("memory", connections::measure_memory),
        ("scale", scale::measure),
    ];

    let mut args: Vec<_> = std::env::args().skip(1).collect();
    if let [role, rest @ ..] = &*args {
        if role == child::ROLE {
            server::run(rest);
            return ExitCode::SUCCESS;
        }
        if role == scale_server::ROLE {
            scale_server::run(rest);
            return ExitCode::SUCCESS;
        }
    }
    // cargo passes these. Without `--bench` the caller is `cargo test`, which only checks that the
    // program starts.
    let bench = args.iter().any(|arg| arg == "--bench");
    let test = args.iter().any(|arg| arg == "--test") || !bench;
    if test {
        println!("budgets: measured by `cargo bench --bench budgets`");
        return ExitCode::SUCCESS;
    }
    let write = args.iter().any(|arg| arg == "--write");
    args.retain(|arg| !arg.starts_with("--"));
    if let Some(unknown) = args
        .iter()
        .find(|arg| !ALL.iter().any(|(name, _)| name == arg))
    {
        eprintln!("budgets: no such measurement: {unknown}");
        return ExitCode::from(2);
    }
    if write && !args.is_empty() {
        eprintln!("budgets: --write needs all measurements, so that the page shows one run");
        return ExitCode::from(2);
    }
    let mut rows = Rows::default();
    for (name, measure) in ALL {
        if args.is_empty() || args.iter().any(|arg| arg == name) {
            measure(&mut rows);
        }
    }
    if write {
        rows.write();
    }
    if rows.all_met() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
