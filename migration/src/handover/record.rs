//! What outlives a process: a few lines on disk that say where a machine was going, and what that means for who finds them.
//!
//! Knows no file and no clock: its caller writes it durably (JSON, say) and supplies the time as text.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// What had happened when the record was written. The first two are a source's, the last is a target's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The guest was about to be stopped and given away. Written before the stop, so it does not say whether it was.
    OnItsWay,
    /// The target said that it runs, or a person said that it started there; the copy was destroyed.
    Moved,
    /// The guest came here and started.
    Arrived,
}

/// One machine's last move, as this host saw it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Which attempt.
    pub move_id: Uuid,
    /// The machine's epoch at the target.
    pub epoch: u64,
    /// Name of the machine.
    pub vm: String,
    /// Address of the other side: of the target in a source's record, of the source in a target's.
    pub peer: String,
    /// What had happened.
    pub phase: Phase,
    /// When this was written, as text.
    pub time: String,
    /// Paths of the disks that the guest writes.
    pub disks: Vec<String>,
}

/// What a record means where the machine has no process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Found {
    /// What is true, in plain sentences.
    pub truth: String,
    /// What to do, with the commands to type.
    pub next: String,
}

impl Record {
    /// What is true if this record is found on this host and no process of the machine lives here.
    pub fn without_process(&self) -> Found {
        let Self { epoch, vm, peer, time, .. } = self;
        let disks = if self.disks.is_empty() { "it has no disk".to_owned() } else { self.disks.join(", ") };
        match self.phase {
            Phase::OnItsWay => Found {
                truth: format!(
                    "{vm} was on its way to {peer} (epoch {epoch}, {time}) when its process here ended, and its memory \
                     here went with it. It runs at {peer} if it had been given away by then; if not, it runs nowhere, \
                     and the target discards what it has within a minute."
                ),
                next: format!(
                    "Look for {vm} at {peer} with `sterna list`. If it is there, or was: `sterna migration resolve {vm} \
                     --there`. If it is not and its process there has ended: `sterna migration resolve {vm} --here`, \
                     then boot it again from its disks ({disks})."
                ),
            },
            Phase::Moved => Found {
                truth: format!("{vm} moved to {peer} (epoch {epoch}, {time}); nothing of it is left here."),
                next: format!(
                    "Nothing here. `sterna show {vm}` on that host says how it does. Once it has ended there, `sterna \
                     migration resolve {vm} --here` lets it boot here again."
                ),
            },
            Phase::Arrived => Found {
                truth: format!(
                    "{vm} came here from {peer} (epoch {epoch}, {time}) and started; its process has ended since, and its \
                     memory went with it. The copy at {peer}, if one still stands there, is older than its disks."
                ),
                next: format!(
                    "`sterna migration resolve {vm} --there` at {peer}, if it is in doubt there. Then boot {vm} again from \
                     its disks ({disks})."
                ),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(phase: Phase) -> Record {
        Record {
            move_id: Uuid::from_u128(7),
            epoch: 3,
            vm: "web".into(),
            peer: "tcp:b:7300".into(),
            phase,
            time: "2026-11-25T12:00:00Z".into(),
            disks: vec!["/srv/web.img".into()],
        }
    }

    #[test]
    fn each_phase_says_what_is_true_and_what_to_type() {
        let table = [
            (
                Phase::OnItsWay,
                "web was on its way to tcp:b:7300 (epoch 3, 2026-11-25T12:00:00Z) when",
                "resolve web --here",
            ),
            (Phase::Moved, "web moved to tcp:b:7300 (epoch 3, 2026-11-25T12:00:00Z); nothing", "resolve web --here"),
            (Phase::Arrived, "web came here from tcp:b:7300 (epoch 3, 2026-11-25T12:00:00Z) and", "(/srv/web.img)"),
        ];
        for (phase, truth, next) in table {
            let found = record(phase).without_process();
            assert!(found.truth.starts_with(truth), "{}", found.truth);
            assert!(found.next.contains(next), "{}", found.next);
        }
    }

    #[test]
    fn a_machine_without_disks_is_told_apart() {
        let found = Record { disks: vec![], ..record(Phase::OnItsWay) }.without_process();
        assert!(found.next.ends_with("(it has no disk)."), "{}", found.next);
    }
}
