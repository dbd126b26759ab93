//! The figures of many rounds: their median and their percentiles.

/// Sorted, and not empty.
#[derive(Clone, Debug)]
pub(crate) struct Figures(Vec<f64>);

impl Figures {
    pub(crate) fn new(mut figures: Vec<f64>) -> Self {
        assert!(!figures.is_empty(), "nothing was measured");
        figures.sort_by(f64::total_cmp);
        Self(figures)
    }

    /// The figure at this percentile.
    pub(crate) fn percentile(&self, percent: usize) -> f64 {
        self.0[(self.0.len() * percent / 100).min(self.0.len() - 1)]
    }

    pub(crate) fn median(&self) -> f64 {
        self.percentile(50)
    }

    /// The median, and the quartiles in parentheses.
    pub(crate) fn text(&self) -> String {
        let [low, median, high] = [25, 50, 75].map(|percent| self.percentile(percent));
        format!("{median:.1} ({low:.1}–{high:.1})")
    }
}

/// Compares two series round by round with `of`.
pub(crate) fn pairs(a: &[f64], b: &[f64], of: impl Fn(f64, f64) -> f64) -> Figures {
    Figures::new(a.iter().zip(b).map(|(a, b)| of(*a, *b)).collect())
}
