//! A median with its spread. Refuses to say anything about a mean.

use serde_json::{Value, json};
use std::fmt;

/// Order statistics of one figure.
pub struct Summary {
    sorted: Vec<f64>,
}

impl Summary {
    /// Of these values.
    pub fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = values.collect();
        sorted.sort_by(f64::total_cmp);
        Self { sorted }
    }

    /// The middle one; NaN when there is none.
    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// The value below which `share` of all lie; NaN when there is none.
    fn quantile(&self, share: f64) -> f64 {
        let at = (self.sorted.len().saturating_sub(1)) as f64 * share;
        self.sorted.get(at.round() as usize).copied().unwrap_or(f64::NAN)
    }

    /// As it goes into the result file.
    pub fn json(&self) -> Value {
        json!({ "median": self.quantile(0.5), "p10": self.quantile(0.1), "p90": self.quantile(0.9), "all": self.sorted })
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{:.3} ({:.3}-{:.3})", self.quantile(0.5), self.quantile(0.1), self.quantile(0.9));
        f.pad(&text)
    }
}
