//! The table and the result file: a row for each figure, with what was to be reached.

use crate::statistics::Summary;
use serde_json::{Value, json};
use std::path::Path;

/// What a figure of Sterna is to be.
#[derive(Clone, Copy)]
pub enum Goal {
    /// Nothing was said.
    None,
    /// The median is at most so much.
    AtMost(f64),
    /// The median is at least so much.
    AtLeast(f64),
    /// The median of the ratios to QEMU's is at most so much.
    RatioAtMost(f64),
}

/// Collects rows and prints them.
pub struct Report {
    rows: Vec<Value>,
}

impl Report {
    /// With a head that says what is in the columns.
    pub fn new(title: &str) -> Self {
        println!("\n{title}");
        println!("{:52} {:>8} {:>26} {:>26}   ratio", "median (10th to 90th percentile)", "", "sterna", "qemu");
        Self { rows: Vec::new() }
    }

    /// A figure: one value a block of each side; QEMU's may be missing.
    pub fn row(&mut self, name: &str, unit: &str, sterna: &[f64], qemu: &[f64], goal: Goal) {
        let ratio = Summary::of(sterna.iter().zip(qemu).map(|(ours, theirs)| ours / theirs).filter(|r| r.is_finite()));
        let [ours, theirs] = [sterna, qemu].map(|values| Summary::of(values.iter().copied()));
        let (word, met) = match goal {
            Goal::None => (String::new(), None),
            Goal::AtMost(most) => (format!("at most {most} {unit}"), Some(ours.median() <= most)),
            Goal::AtLeast(least) => (format!("at least {least} {unit}"), Some(ours.median() >= least)),
            Goal::RatioAtMost(most) => (format!("ratio at most {most}"), Some(ratio.median() <= most)),
        };
        let verdict = met.map_or(String::new(), |met| format!("   {word}: {}", if met { "reached" } else { "MISSED" }));
        let (theirs_text, ratio_text) = match qemu.is_empty() {
            true => ("-".to_owned(), "-".to_owned()),
            false => (theirs.to_string(), ratio.to_string()),
        };
        println!("{name:52} {unit:>8} {ours:>26} {theirs_text:>26}   {ratio_text:22}{verdict}");
        self.rows.push(json!({
            "figure": name, "unit": unit, "sterna": ours.json(), "qemu": theirs.json(), "ratio": ratio.json(),
            "goal": word, "reached": met,
        }));
    }

    /// Writes all rows to `build/bench-{name}.json` of the tree at `root`, with `about` beside them.
    pub fn write(self, root: &str, name: &str, about: Value) {
        let folder = Path::new(root).join("build");
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join(format!("bench-{name}.json"));
        let document = json!({ "about": about, "results": self.rows });
        std::fs::write(&path, format!("{document:#}\n")).unwrap();
        println!("\nwritten to {}", path.display());
    }
}
