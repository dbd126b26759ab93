//! The bar chart `benches/plot.svg`.

use std::fmt::Write as _;

/// The nanoseconds that each peer adds to a request, on one thread and on two.
pub(crate) struct Plot(Vec<(&'static str, [f64; 2])>);

impl Plot {
    pub(crate) fn new(bars: Vec<(&'static str, [f64; 2])>) -> Self {
        Self(bars)
    }

    pub(crate) fn svg(&self) -> String {
        /// The x coordinate at which bars begin, and the length of the longest bar.
        const LEFT: f64 = 240.0;
        const LONGEST: f64 = 420.0;
        const COLOURS: [&str; 2] = ["#4c78a8", "#f58518"];

        let bars = self.0.iter().flat_map(|(_, times)| times);
        let most = bars.copied().fold(1.0, f64::max);
        let mut y = 62;
        let mut body = String::new();
        for (name, times) in &self.0 {
            let _ = writeln!(
                body,
                r#"<text x="{}" y="{}" text-anchor="end">{name}</text>"#,
                LEFT - 10.0,
                y + 19
            );
            for (time, colour) in times.iter().zip(COLOURS) {
                let width = (time.max(0.0) / most * LONGEST).max(1.0);
                let _ = writeln!(
                    body,
                    r#"<rect x="{LEFT}" y="{y}" width="{width:.1}" height="12" fill="{colour}"/><text x="{:.1}" y="{}">{time:.1}</text>"#,
                    LEFT + width + 5.0,
                    y + 11
                );
                y += 14;
            }
            y += 14;
        }
        let mut legend = String::new();
        for (i, (threads, colour)) in ["1 thread", "2 threads"]
            .into_iter()
            .zip(COLOURS)
            .enumerate()
        {
            let x = 240 + i * 100;
            let _ = writeln!(
                legend,
                r#"<rect x="{x}" y="34" width="12" height="12" fill="{colour}"/><text x="{}" y="45">{threads}</text>"#,
                x + 17
            );
        }
        format!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" width="720" height="{y}" font-family="sans-serif" font-size="13" fill="#222">
<rect width="720" height="{y}" fill="#fff"/>
<text x="20" y="22" font-weight="bold">Time a request adds, in ns for each thread (less is better)</text>
{legend}{body}</svg>
"##
        )
    }
}
