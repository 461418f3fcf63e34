//! What this host can do for a VM: facts, what is missing, and what to do about it.
//!
//! Everything is tried, nothing is inferred from names: whether a stock kernel runs is shown by running what it needs.
//! Changes nothing on the host.

mod capabilities;
mod cpu;
mod facilities;
mod probe;
mod programs;
mod sys;
mod table;

pub use capabilities::missing_capabilities;
use serde::Serialize;

/// Whether an unmodified distribution kernel runs on this host's /dev/kvm.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "stock_kernel", rename_all = "lowercase")]
pub enum StockKernel {
    /// Ring 0 runs, and as fast as it should.
    Runs,
    /// It does not; small guests of one's own still may.
    Cannot {
        /// What was tried, and what came of it.
        why: String,
    },
}

/// How much Sterna wants something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Need {
    /// No VM starts without it.
    Required,
    /// Something is slower or not offered without it.
    Optional,
    /// Told for information.
    Fact,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Heading it stands under.
    pub group: &'static str,
    /// Its name, as the kernel's documentation has it.
    pub name: String,
    /// How much it is wanted.
    pub need: Need,
    /// Whether it is there.
    pub present: bool,
    /// What was found.
    pub detail: String,
    /// What to do when it is not there.
    pub remedy: Option<String>,
}

impl Check {
    /// A thing that is there or not; the remedy is for the latter.
    fn new(
        group: &'static str,
        name: impl Into<String>,
        need: Need,
        found: Result<String, String>,
        remedy: &str,
    ) -> Self {
        let present = found.is_ok();
        let detail = found.unwrap_or_else(|reason| reason);
        let remedy = (!present && !remedy.is_empty()).then(|| remedy.to_owned());
        Self { group, name: name.into(), need, present, detail, remedy }
    }

    /// Plain information.
    fn fact(group: &'static str, name: impl Into<String>, detail: String) -> Self {
        Self { group, name: name.into(), need: Need::Fact, present: true, detail, remedy: None }
    }
}

/// All that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether stock kernels run.
    #[serde(flatten)]
    pub overall: StockKernel,
    /// Whether everything required is there.
    pub usable: bool,
    /// What was looked at, in the order of the table.
    pub checks: Vec<Check>,
}

impl Report {
    fn new(overall: StockKernel, checks: Vec<Check>) -> Self {
        let usable = checks.iter().all(|check| check.present || check.need != Need::Required);
        Self { overall, usable, checks }
    }
}

/// Looks at everything. Takes under two seconds, also where a probe hangs.
pub fn run() -> Report {
    let (mut checks, kvm) = capabilities::check();
    let overall = match &kvm {
        Some(kvm) => {
            let (overall, found) = probe::check(kvm);
            checks.extend(found);
            checks.extend(cpu::check(kvm));
            overall
        }
        None => StockKernel::Cannot { why: "/dev/kvm cannot be used".to_owned() },
    };
    checks.extend(facilities::check());
    Report::new(overall, checks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use std::time::{Duration, Instant};

    #[test]
    fn this_host_gets_a_definite_answer_in_time() {
        let began = Instant::now();
        let report = run();
        println!("{report}");
        assert!(began.elapsed() < Duration::from_secs(2), "took {:?}", began.elapsed());
        if let StockKernel::Cannot { why } = &report.overall {
            assert!(!why.is_empty());
        }
        if Path::new("/sys/module/kvm_pvm").exists() && kvm_ioctls::Kvm::new().is_ok() {
            let StockKernel::Cannot { why } = report.overall else { panic!("kvm_pvm cannot run stock kernels") };
            assert!(why.contains("KVM emulates ring 0 and cannot emulate this"), "{why}");
            assert!(why.contains("it is interpreted"), "{why}");
        }
    }
}
