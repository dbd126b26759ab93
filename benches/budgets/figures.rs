//! Figures from many rounds: their median, and how far they are apart.

/// Sorted, and not empty.
#[derive(Clone, Debug)]
pub(crate) struct Figures(Vec<f64>);

impl Figures {
    pub(crate) fn new(mut figures: Vec<f64>) -> Self {
        assert!(!figures.is_empty(), "nothing was measured");
        figures.sort_by(f64::total_cmp);
        Self(figures)
    }

    /// So many of a hundred are below it.
    pub(crate) fn percentile(&self, percent: usize) -> f64 {
        self.0[(self.0.len() * percent / 100).min(self.0.len() - 1)]
    }

    pub(crate) fn median(&self) -> f64 {
        self.percentile(50)
    }

    /// The median and the quartiles around it.
    pub(crate) fn text(&self) -> String {
        let [low, median, high] = [25, 50, 75].map(|percent| self.percentile(percent));
        format!("{median:.1} ({low:.1}–{high:.1})")
    }
}

/// What each round says of one against another.
pub(crate) fn pairs(a: &[f64], b: &[f64], of: impl Fn(f64, f64) -> f64) -> Figures {
    Figures::new(a.iter().zip(b).map(|(a, b)| of(*a, *b)).collect())
}
