//! Lives of single pods, with the rules of `kubelet.rs`. Each is a check with a printed line.

mod running;
mod stops;

use std::{fmt, sync::PoisonError};

use crate::{
    instance::{Ended, Problem},
    kubelet::{Death, Event, Get, Hook, Pod},
    kubernetes::Sweep,
    probes::Probe,
};

/// Prints a line for each life. Returns whether all went as they must.
pub(crate) async fn run(sweep: &Sweep) -> Result<bool, Problem> {
    println!("times are multiplied by {}\n", sweep.scale);
    let get = |path, port, is_forwarded| Get {
        path,
        port,
        is_forwarded,
    };
    let missing = get("/no-such-route", None, false);
    let forwarded = get("/prestop", None, true);
    // A port below the range of `free_port`, where nothing listens.
    let refused = get("/prestop", Some(1), false);
    // At the same time, each with its own pod.
    let lives = tokio::try_join!(
        running::slow_start(sweep),
        running::late_start(sweep),
        running::unready(sweep),
        running::hangs(sweep),
        stops::drains(sweep, Hook::None),
        stops::drains(sweep, Hook::get("/prestop")),
        stops::asked_often(sweep),
        stops::signalled(sweep),
        stops::vain_hook(
            sweep,
            "a preStop httpGet that is answered with 404",
            missing,
            true
        ),
        stops::vain_hook(
            sweep,
            "the same with 403, for a call that a proxy forwards",
            forwarded,
            true
        ),
        stops::vain_hook(
            sweep,
            "the same, and nothing listens on its port",
            refused,
            false
        ),
        stops::endless_hook(sweep),
    )?;
    let lives = [
        lives.0, lives.1, lives.2, lives.3, lives.4, lives.5, lives.6, lives.7, lives.8, lives.9,
        lives.10, lives.11,
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

    fn answered(&mut self, death: &Death, probe: &Probe) {
        self.must("/livez answers until the end", death.was_lively(probe));
    }
}

impl fmt::Display for Life {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "- {}: {}", self.name, self.seen)?;
        for wrong in &self.wrong {
            write!(f, "\n  FAILED, expected: {wrong}")?;
        }
        Ok(())
    }
}

fn events(pod: &Pod) -> Vec<Event> {
    pod.events
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone()
}

fn probed(death: &Death) -> String {
    let silence = death.silence().as_secs_f64();
    format!("{}, at the end: {silence:.2} s", death.lively)
}

fn texts(events: &[Event]) -> String {
    let texts: Vec<_> = events.iter().map(|event| event.text.as_str()).collect();
    texts.join("; ")
}
