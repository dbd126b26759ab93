//! Shows the progress of a run: a bar on a terminal, lines elsewhere.

use std::{convert::Infallible, time::Duration};

use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::sleep;

use crate::load::Load;

#[derive(Debug)]
pub(crate) struct Progress {
    name: String,
    bar: ProgressBar,
}

impl Progress {
    /// Progress of a run with this number of stops.
    pub(crate) fn new(name: &str, stops: usize) -> Self {
        let bar = ProgressBar::new(stops as u64);
        let style = ProgressStyle::with_template("{prefix:16} [{bar:24}] {pos}/{len} stops  {msg}");
        bar.set_style(style.expect("a template").progress_chars("=> "));
        bar.set_prefix(name.to_owned());
        Self {
            name: name.to_owned(),
            bar,
        }
    }

    /// Shows the next step.
    pub(crate) fn say(&self, text: &str) {
        if self.bar.is_hidden() {
            eprintln!("{}: {text}", self.name);
        } else {
            self.bar.set_message(text.to_owned());
        }
    }

    pub(crate) fn step(&self) {
        self.bar.inc(1);
    }

    /// Shows the counts of `load` while the future is polled.
    pub(crate) async fn follow(&self, load: &Load) -> Infallible {
        loop {
            let (requests, failed) = load.count();
            if !self.bar.is_hidden() {
                self.bar
                    .set_message(format!("{requests} requests, {failed} failed"));
            }
            sleep(Duration::from_millis(100)).await;
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish();
    }
}
