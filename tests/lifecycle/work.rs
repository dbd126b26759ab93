//! Work besides requests: holds, workers, hooks and cleanup steps.

mod cleanup;
mod holds;
mod hooks;
mod idle;
mod report;
mod workers;

use std::{
    any::Any,
    future::pending,
    panic::resume_unwind,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::time::Instant;
use tower_graceful::{Graceful, Report, TaskKind, TaskOutcome};

use crate::support::let_others_run;

/// The grace period without its margin: the latest end of a shutdown, from the trigger.
const END: Duration = Duration::from_secs(29);

/// Triggers a stop and waits for the report.
async fn stop(graceful: &Graceful) -> Report {
    graceful.shutdown();
    report(graceful).await
}

/// The report, once the service has stopped.
async fn report(graceful: &Graceful) -> Report {
    graceful.stopped().await;
    graceful.run(pending::<()>()).await
}

type Row = (String, TaskKind, Duration, Duration, TaskOutcome);

fn row(name: &str, kind: TaskKind, began: Duration, took: Duration, outcome: TaskOutcome) -> Row {
    (name.to_owned(), kind, began, took, outcome)
}

/// The report's tasks.
fn rows(report: &Report) -> Vec<Row> {
    let tasks = report.tasks().iter().cloned();
    tasks
        .map(|task| (task.name, task.kind, task.began, task.took, task.outcome))
        .collect()
}

fn outcomes(report: &Report) -> Vec<TaskOutcome> {
    report
        .tasks()
        .iter()
        .map(|task| task.outcome.clone())
        .collect()
}

/// A log of events, each with the time since the log was begun.
#[derive(Clone)]
struct Diary {
    begun: Instant,
    lines: Arc<Mutex<Vec<(String, Duration)>>>,
}

impl Diary {
    fn begin() -> Self {
        Self {
            begun: Instant::now(),
            lines: Arc::default(),
        }
    }

    fn note(&self, what: &str) {
        let line = (what.to_owned(), self.begun.elapsed());
        self.lines.lock().unwrap().push(line);
    }

    fn assert(&self, expected: &[(&str, Duration)]) {
        let lines = self.lines.lock().unwrap();
        let lines: Vec<_> = lines.iter().map(|(what, at)| (&**what, *at)).collect();
        assert_eq!(lines, expected);
    }

    /// Returns a guard that records `what` when it is dropped.
    fn at_drop(&self, what: &'static str) -> AtDrop {
        AtDrop(self.clone(), what)
    }
}

struct AtDrop(Diary, &'static str);

impl Drop for AtDrop {
    fn drop(&mut self) {
        self.0.note(self.1);
    }
}

/// Panics without a message on standard error.
async fn panics(said: impl Any + Send) {
    resume_unwind(Box::new(said));
}

/// A sleep that begins with the first poll.
async fn sleep_for(time: Duration) {
    tokio::time::sleep(time).await;
}

/// Waits until this time has passed since the diary was begun.
async fn until(diary: &Diary, at: Duration) {
    tokio::time::sleep_until(diary.begun + at).await;
    let_others_run().await;
}
