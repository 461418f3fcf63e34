//! The report as a table for people.

use super::{Check, Need, Report, StockKernel};
use std::collections::BTreeSet;
use std::fmt;

impl Report {
    /// Groups with a line a check, each remedy once, below what is missing, the verdict last.
    pub fn table(&self) -> String {
        self.to_string()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
        let (mut group, mut said) = ("", BTreeSet::new());
        for check in &self.checks {
            if check.group != group {
                group = check.group;
                writeln!(f, "{group}")?;
            }
            writeln!(f, "  {:<8} {:<width$}  {}", mark(check), check.name, check.detail)?;
            if let Some(remedy) = &check.remedy
                && said.insert(remedy)
            {
                writeln!(f, "  {:<8} {:<width$}  -> {remedy}", "", "")?;
            }
        }
        writeln!(f)?;
        match &self.overall {
            StockKernel::Runs => writeln!(f, "Stock kernels run here.")?,
            StockKernel::Cannot { why } => writeln!(f, "Stock kernels cannot run here: {why}.")?,
        }
        let verdict = if self.usable { "Everything required is here." } else { "Something required is missing." };
        write!(f, "{verdict}")
    }
}

fn mark(check: &Check) -> &'static str {
    match (check.present, check.need) {
        (true, Need::Fact) => "",
        (true, _) => "ok",
        (false, Need::Required) => "MISSING",
        (false, _) => "no",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let checks = vec![
            Check::new("KVM", "/dev/kvm", Need::Required, Err("permission denied".to_owned()), "run as root"),
            Check::new("KVM", "KVM_CAP_RING", Need::Optional, Err("dirty ring".to_owned()), ""),
            Check::new("host", "io_uring", Need::Required, Ok("works".to_owned()), "never shown"),
            Check::fact("host", "memory", "5 MiB".to_owned()),
        ];
        Report::new(StockKernel::Cannot { why: "/dev/kvm cannot be used".to_owned() }, checks)
    }

    #[test]
    fn table_shows_groups_marks_and_remedies() {
        let expected = "\
KVM
  MISSING  /dev/kvm      permission denied
                         -> run as root
  no       KVM_CAP_RING  dirty ring
host
  ok       io_uring      works
           memory        5 MiB

Stock kernels cannot run here: /dev/kvm cannot be used.
Something required is missing.";
        assert_eq!(report().table(), expected);
    }

    #[test]
    fn json_carries_the_same() {
        let json = serde_json::to_value(report()).unwrap();
        assert_eq!(json["stock_kernel"], "cannot");
        assert_eq!(json["why"], "/dev/kvm cannot be used");
        assert_eq!(json["usable"], false);
        assert_eq!(json["checks"][0]["remedy"], "run as root");
        assert_eq!(json["checks"][3]["need"], "fact");
    }

    #[test]
    fn only_what_is_required_makes_a_host_unusable() {
        let optional = Check::new("KVM", "x", Need::Optional, Err(String::new()), "");
        assert!(Report::new(StockKernel::Runs, vec![optional]).usable);
    }
}
