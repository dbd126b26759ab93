//! The measured rows and their budgets. [`Rows::write`] puts them into `BENCHMARKS.md`.

use std::{fmt::Write as _, fs, path::Path};

use super::plot::Plot;

/// The bound of a ratio.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Budget {
    AtMost(f64),
    AtLeast(f64),
    /// The row is for comparison.
    None,
}

#[derive(Default)]
pub(crate) struct Rows {
    measured: Vec<[String; 6]>,
    missed: bool,
    tables: Vec<(&'static str, String)>,
    plot: Option<Plot>,
}

impl Rows {
    /// Records and prints a row.
    pub(crate) fn add(&mut self, row: &str, ours: &str, peer: &str, ratio: f64, budget: Budget) {
        let (bound, met) = match budget {
            Budget::AtMost(most) => (format!("≤ {most}"), ratio <= most),
            Budget::AtLeast(least) => (format!("≥ {least}"), ratio >= least),
            Budget::None => ("none".to_owned(), true),
        };
        self.missed |= !met;
        let met = match (budget, met) {
            (Budget::None, _) => "–",
            (_, true) => "met",
            (_, false) => "NOT MET",
        };
        println!("{row}: ours {ours}, peer {peer}, ratio {ratio:.3}, budget {bound}, {met}");
        let [row, ours, peer, met] = [row, ours, peer, met].map(str::to_owned);
        self.measured
            .push([row, ours, peer, format!("{ratio:.3}"), bound, met]);
    }

    /// Records and prints a further table, in Markdown.
    pub(crate) fn table(&mut self, title: &'static str, table: String) {
        println!("\n{title}\n\n{table}");
        self.tables.push((title, table));
    }

    pub(crate) fn plot(&mut self, plot: Plot) {
        self.plot = Some(plot);
    }

    pub(crate) fn all_met(&self) -> bool {
        !self.missed
    }

    /// Writes the tables between the markers in `BENCHMARKS.md`, and the plot.
    pub(crate) fn write(&self) {
        const BEGIN: &str = "<!-- written by cargo bench --bench budgets -- --write -->\n";
        const END: &str = "<!-- to here -->";

        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let path = folder.join("BENCHMARKS.md");
        let text = fs::read_to_string(&path).expect("BENCHMARKS.md");
        let (before, rest) = text.split_once(BEGIN).expect("where the tables begin");
        let (_, after) = rest.split_once(END).expect("where the tables end");
        let mut tables = String::from("\n| measurement | ours | peer | ratio | budget | |\n");
        tables.push_str("|---|---|---|---|---|---|\n");
        for row in &self.measured {
            let _ = writeln!(tables, "| {} |", row.join(" | "));
        }
        for (title, table) in &self.tables {
            let _ = write!(tables, "\n{title}\n\n{table}");
        }
        tables.push('\n');
        fs::write(&path, [before, BEGIN, &tables, END, after].concat()).expect("BENCHMARKS.md");
        if let Some(plot) = &self.plot {
            fs::write(folder.join("benches/plot.svg"), plot.svg()).expect("benches/plot.svg");
        }
    }
}
