//! The text form of the report.

use std::{borrow::Cow, fmt, time::Duration};

use super::{Report, TaskKind, TaskOutcome, TaskReport, UnlistedWorkers};
use crate::phase::Phase;

/// How many of the requests, holds and connections that were given up are named, for each kind.
const NAMED: usize = 3;

/// The widths of a row's columns. With the text between them a row is 80 columns wide.
const NAME: usize = 18;
const BAR: usize = 32;
const WIDTH: usize = 80;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total = self.duration();
        let seconds = total.as_secs_f64();
        write!(
            f,
            "shutdown by {}: {}, {seconds:.3} s",
            self.trigger, self.outcome
        )?;
        let mut began = Duration::ZERO;
        for phase in [Phase::LameDuck, Phase::Draining, Phase::Closing] {
            let took = self.time_in(phase);
            row(f, 2, phase.as_str(), began, took, total)?;
            began += took;
            if phase == Phase::LameDuck {
                if let Some(why) = self.left_early {
                    line(f, 4, &format!("ended early: {why}"))?;
                }
                self.write_tasks(f, total, |task| task.kind == TaskKind::LameDuck)?;
            }
        }
        if self
            .tasks
            .iter()
            .any(|task| task.kind != TaskKind::LameDuck)
        {
            row(f, 2, "cleanup", began, self.cleanup, total)?;
            self.write_tasks(f, total, |task| task.kind == TaskKind::Worker)?;
            self.write_unlisted(f)?;
            self.write_tasks(f, total, |task| task.kind == TaskKind::Cleanup)?;
        }
        self.write_requests(f)?;
        self.write_given_up(f)?;
        if let Some(error) = &self.server_error {
            line(f, 2, &format!("server error: {error}"))?;
        }
        for warning in self.warnings() {
            let text = format!("warning: {warning}");
            wrapped(f, "", " ", text.split(' ').map(Cow::Borrowed))?;
        }
        Ok(())
    }
}

impl Report {
    fn write_tasks(
        &self,
        f: &mut fmt::Formatter<'_>,
        total: Duration,
        shown: impl Fn(&TaskReport) -> bool,
    ) -> fmt::Result {
        for task in self.tasks.iter().filter(|task| shown(task)) {
            row(f, 4, &task.name, task.began, task.took, total)?;
            write!(f, "  {}", task.outcome)?;
            if let TaskOutcome::Failed(error) | TaskOutcome::Panicked(error) = &task.outcome {
                line(f, 6, error)?;
            }
        }
        Ok(())
    }

    fn write_unlisted(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let UnlistedWorkers { ended, failed } = self.unlisted_workers;
        if ended == 0 {
            return Ok(());
        }
        let text = format!("and {ended} more that ended before the stop, {failed} of them failed");
        line(f, 4, &text)
    }

    fn write_requests(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let requests = &self.requests;
        let figures = [
            (requests.in_flight, " in flight when it began"),
            (requests.admitted, " more"),
            (requests.finished, " finished"),
            (requests.refused, " refused"),
            (requests.cut, " cut"),
            (requests.dropped, " dropped"),
        ];
        let figures = figures.iter().filter(|(count, _)| *count > 0);
        let figures = figures.map(|(count, what)| Cow::Owned(format!("{count}{what}")));
        wrapped(f, "requests: ", ", ", figures)
    }

    fn write_given_up(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.remaining.is_nothing() {
            return Ok(());
        }
        let remaining = self.remaining.to_string();
        let remaining = remaining.split(", ").map(Cow::Borrowed);
        wrapped(f, "given up: ", ", ", remaining)?;
        named(f, &self.given_up.requests)?;
        if self.given_up.unnamed {
            line(f, 4, "requests are named with `name_requests(true)`")?;
        }
        named(f, &self.given_up.holds)?;
        named(f, &self.given_up.connections)?;
        if self.remaining.half_closed > 0 {
            line(
                f,
                4,
                "half-closed: dropped when the client sent FIN; see `half_close`",
            )?;
        }
        Ok(())
    }
}

fn named<T: fmt::Display>(f: &mut fmt::Formatter<'_>, given_up: &[T]) -> fmt::Result {
    for one in given_up.iter().take(NAMED) {
        line(f, 4, &one.to_string())?;
    }
    match given_up.len().saturating_sub(NAMED) {
        0 => Ok(()),
        more => line(f, 4, &format!("and {more} more")),
    }
}

/// Writes a name, a duration, and a bar that shows its position in the whole.
fn row(
    f: &mut fmt::Formatter<'_>,
    indent: usize,
    name: &str,
    began: Duration,
    took: Duration,
    total: Duration,
) -> fmt::Result {
    let column = |at: Duration| {
        let share = at.as_secs_f64() / total.as_secs_f64().max(f64::MIN_POSITIVE);
        // Between 0 and the width of the bar.
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss
        )]
        let column = (share.clamp(0.0, 1.0) * BAR as f64).round() as usize;
        column
    };
    let from = column(began).min(BAR - 1);
    let to = column(began + took).clamp(from + 1, BAR);
    let name = printable(name, NAME + 2 - indent);
    let columns: usize = name.chars().map(width).sum();
    let seconds = took.as_secs_f64();
    write!(
        f,
        "\n{:indent$}{name}{:pad$}{seconds:>9.3} s  |{:from$}{}{:rest$}|",
        "",
        "",
        "",
        "=".repeat(to - from),
        "",
        pad = (NAME + 2 - indent).saturating_sub(columns),
        rest = BAR - to,
    )
}

fn line(f: &mut fmt::Formatter<'_>, indent: usize, text: &str) -> fmt::Result {
    write!(f, "\n{:indent$}{}", "", printable(text, WIDTH - indent))
}

/// Writes items on as many lines as they need. Writes nothing if there are none.
fn wrapped<'a>(
    f: &mut fmt::Formatter<'_>,
    start: &str,
    separator: &str,
    mut items: impl Iterator<Item = Cow<'a, str>>,
) -> fmt::Result {
    let columns = |text: &str| text.chars().map(width).sum::<usize>();
    let Some(first) = items.next() else {
        return Ok(());
    };
    // At the end of a line that is continued.
    let end = separator.trim_end();
    let (mut indent, mut shown) = (2, format!("{start}{first}"));
    for item in items {
        if indent + columns(&shown) + separator.len() + columns(&item) + end.len() > WIDTH {
            line(f, indent, &format!("{shown}{end}"))?;
            (indent, shown) = (4, item.into_owned());
        } else {
            shown = format!("{shown}{separator}{item}");
        }
    }
    line(f, indent, &shown)
}

/// Returns the text on one line, and cuts it to `most` columns.
fn printable(text: &str, most: usize) -> String {
    let clean = |char: char| if char.is_control() { ' ' } else { char };
    let text: String = text.chars().map(clean).filter(|c| !is_format(*c)).collect();
    let whole: usize = text.chars().map(width).sum();
    if whole <= most {
        return text;
    }
    let mut shown = String::new();
    let mut left = most.saturating_sub(2);
    for char in text.chars() {
        left = match left.checked_sub(width(char)) {
            Some(left) => left,
            None => break,
        };
        shown.push(char);
    }
    shown + ".."
}

/// Invisible characters that change the direction of a text or break its lines.
fn is_format(char: char) -> bool {
    matches!(char, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// How many columns a character takes, estimated too high rather than too low: two for East Asian
/// scripts and for symbols.
fn width(char: char) -> usize {
    match char {
        '\u{300}'..='\u{36f}' => 0,
        '\u{1100}'.. => 2,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use http::Method;

    use super::super::{
        CutConnection, CutHold, CutRequest, GivenUp, Outcome, Remaining, Requests, Trigger,
    };
    use super::*;

    const fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    fn task(name: &str, kind: TaskKind, began: u64, took: u64, outcome: TaskOutcome) -> TaskReport {
        TaskReport {
            name: name.into(),
            kind,
            began: ms(began),
            took: ms(took),
            outcome,
        }
    }

    fn clean() -> Report {
        Report {
            trigger: Trigger::Terminate,
            outcome: Outcome::Clean,
            left_early: None,
            phases: [ms(5000), ms(1250), ms(3)],
            cleanup: Duration::ZERO,
            requests: Requests::default(),
            remaining: Remaining::default(),
            given_up: Arc::default(),
            tasks: Arc::default(),
            unlisted_workers: UnlistedWorkers::default(),
            server_error: None,
            warnings: Arc::default(),
        }
    }

    #[test]
    fn a_report_is_a_timeline() {
        assert_eq!(
            clean().to_string(),
            "shutdown by SIGTERM: clean, 6.253 s\
             \n  lame duck             5.000 s  |==========================      |\
             \n  draining              1.250 s  |                          ======|\
             \n  closing               0.003 s  |                               =|"
        );
    }

    #[test]
    fn a_report_names_what_was_given_up() {
        let mut report = clean();
        report.outcome = Outcome::Forced;
        report.phases = [ms(1000), ms(3000), ms(250)];
        report.cleanup = ms(750);
        report.requests = Requests {
            in_flight: 3,
            admitted: 2,
            finished: 1,
            refused: 7,
            cut: 2,
            dropped: 2,
        };
        report.remaining = Remaining {
            requests: 1,
            holds: 1,
            connections: 5,
            servers: 0,
            workers: 1,
            queued: 12,
            half_closed: 2,
        };
        let connection = |age| CutConnection {
            peer: Some(([10, 0, 0, 7], 51234).into()),
            age: ms(age),
            undelivered: if age == 300 { 237_568 } else { 0 },
        };
        report.given_up = Arc::new(GivenUp {
            requests: vec![CutRequest {
                method: Method::GET,
                path: "/export".into(),
                age: ms(28_440),
                streaming: true,
            }],
            unnamed: false,
            holds: vec![CutHold {
                name: "order mail".into(),
                age: ms(3100),
            }],
            connections: [28_440, 300, 200, 100, 0].map(connection).into(),
        });
        report.tasks = Arc::new([
            task("database", TaskKind::Cleanup, 4600, 400, TaskOutcome::Done),
            task("mailer", TaskKind::Worker, 1000, 3600, TaskOutcome::Cut),
            task(
                "consul",
                TaskKind::LameDuck,
                0,
                20,
                TaskOutcome::Failed("503\nunavailable".into()),
            ),
        ]);
        report.server_error = Some("broken".into());
        assert_eq!(
            report.to_string(),
            "shutdown by SIGTERM: forced, 5.000 s\
             \n  lame duck             1.000 s  |======                          |\
             \n    consul              0.020 s  |=                               |  failed\
             \n      503 unavailable\
             \n  draining              3.000 s  |      ====================      |\
             \n  closing               0.250 s  |                          =     |\
             \n  cleanup               0.750 s  |                           =====|\
             \n    mailer              3.600 s  |      =======================   |  cut\
             \n    database            0.400 s  |                             ===|  done\
             \n  requests: 3 in flight when it began, 2 more, 1 finished, 7 refused, 2 cut,\
             \n    2 dropped\
             \n  given up: 1 request, 1 hold, 5 connections, 1 worker, \
             12 queued connections,\
             \n    2 half-closed requests\
             \n    GET /export 28.4 s, body streaming\
             \n    hold order mail 3.1 s\
             \n    connection from 10.0.0.7:51234 28.4 s\
             \n    connection from 10.0.0.7:51234 0.3 s, 237568 bytes undelivered\
             \n    connection from 10.0.0.7:51234 0.2 s\
             \n    and 2 more\
             \n    half-closed: dropped when the client sent FIN; see `half_close`\
             \n  server error: broken"
        );
    }

    #[test]
    fn a_report_without_names_says_how_to_get_them() {
        let mut report = clean();
        report.remaining.requests = 1;
        report.remaining.connections = 1;
        report.given_up = Arc::new(GivenUp {
            unnamed: true,
            connections: vec![CutConnection {
                peer: Some(([127, 0, 0, 1], 46164).into()),
                age: ms(28_440),
                undelivered: 0,
            }],
            ..GivenUp::default()
        });
        let text = report.to_string();
        assert!(
            text.ends_with(
                "\n  given up: 1 request, 1 connection\
                 \n    requests are named with `name_requests(true)`\
                 \n    connection from 127.0.0.1:46164 28.4 s"
            ),
            "{text}"
        );
    }

    #[test]
    fn no_line_is_wider_than_eighty_columns_or_breaks() {
        let long = "a\nvery \u{1b}[31mlong\u{7} name ".repeat(20);
        for began in [0, 1, 4_000_000, u64::MAX / 1_000_000] {
            let mut report = clean();
            report.phases = [Duration::ZERO, ms(began), ms(5)];
            report.server_error = Some(long.clone());
            let request = CutRequest {
                method: Method::GET,
                path: long.clone(),
                age: ms(began),
                streaming: false,
            };
            report.remaining.requests = usize::MAX;
            report.given_up = Arc::new(GivenUp {
                requests: vec![request],
                ..GivenUp::default()
            });
            let failed = TaskOutcome::Failed(long.clone());
            report.tasks = Arc::new([
                task(&long, TaskKind::Worker, began, 5, TaskOutcome::EndedEarly),
                task(&long, TaskKind::LameDuck, 7, 0, failed),
            ]);
            for line in report.to_string().lines() {
                assert!(line.chars().count() <= 80, "{line}");
                assert!(!line.contains(char::is_control), "{line:?}");
            }
            assert_eq!(report.to_string().lines().count(), 11);
        }
    }

    #[test]
    fn names_in_any_script_keep_the_columns() {
        let mut report = clean();
        for (name, columns) in [
            ("データベース", 12),
            ("データベースを閉じる", 16),
            ("cafe\u{301}", 4),
            ("a\u{202e}b\u{2028}c", 3),
        ] {
            report.tasks = Arc::new([task(name, TaskKind::Cleanup, 0, 5, TaskOutcome::Done)]);
            let text = report.to_string();
            let row = text.lines().last().unwrap();
            let shown: String = row.chars().take_while(|c| !c.is_ascii_digit()).collect();
            let wide: usize = shown.chars().map(width).sum();
            // Up to the digits of "0.005".
            assert_eq!(wide, 4 + 16 + 4, "{text}");
            let name: usize = shown.trim().chars().map(width).sum();
            assert_eq!(name, columns, "{text}");
        }
    }

    #[test]
    fn a_shutdown_of_zero_length_has_a_bar() {
        let mut report = clean();
        report.phases = [Duration::ZERO; 3];
        assert!(report.to_string().contains("|=      "), "{report}");
    }
}
