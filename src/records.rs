//! Records of moves on disk: what a host knows about a machine after its process has ended.
//!
//! A file for each machine, in `$STERNA_DIR/records` where that is set, else in `/var/lib/sterna` for root and
//! `$XDG_STATE_HOME/sterna` or `~/.local/state/sterna` for others: unlike the sockets they outlive a reboot of the host.

use crate::clock::rfc3339;
use crate::config::VmConfig;
use crate::registry::name_problem;
use rustix::fs::{Mode, OFlags, open};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use sterna_migration::handover::{Move, Phase, Record};

/// Longest record that is read, bytes.
const MAX_RECORD_BYTES: u64 = 64 << 10;

/// What is recorded of the machine of `config`, now, in a move whose other side is `peer`.
pub fn record(this_move: Move, config: &VmConfig, peer: &str, phase: Phase) -> Record {
    let written = config.disks.iter().filter(|disk| !disk.readonly);
    Record {
        move_id: this_move.id,
        epoch: this_move.epoch,
        vm: config.name.clone(),
        peer: peer.to_owned(),
        phase,
        time: rfc3339(SystemTime::now()),
        disks: written.map(|disk| disk.path.display().to_string()).collect(),
    }
}

/// The directory of this host's records.
#[derive(Clone, Debug)]
pub struct Records {
    dir: PathBuf,
}

impl Records {
    /// See the module.
    pub fn from_env() -> Self {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let dir = match set("STERNA_DIR") {
            Some(dir) => dir.join("records"),
            None if rustix::process::geteuid().is_root() => PathBuf::from("/var/lib/sterna"),
            None => set("XDG_STATE_HOME")
                .or_else(|| set("HOME").map(|home| home.join(".local/state")))
                .unwrap_or_else(|| PathBuf::from("/var/tmp"))
                .join("sterna"),
        };
        Self { dir }
    }

    /// Those in `dir`, which need not exist yet.
    pub fn at(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Where they are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the record of `vm` is, if there is one.
    pub fn path(&self, vm: &str) -> PathBuf {
        self.dir.join(format!("{vm}.move"))
    }

    /// Writes `record` so that it survives a power cut.
    ///
    /// # Errors
    /// The file system's.
    pub fn write(&self, record: &Record) -> io::Result<()> {
        self.prepare()?;
        let path = self.path(&record.vm);
        let temporary = path.with_extension("move.new");
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        let mut text = serde_json::to_string_pretty(record)?;
        text.push('\n');
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, &path)?;
        sync_dir(&self.dir)
    }

    /// Whether a record of `vm` could be written now: one is, and thrown away.
    ///
    /// # Errors
    /// The file system's, the directory named.
    pub fn try_out(&self, vm: &str) -> io::Result<()> {
        let path = self.path(vm).with_extension(format!("trial.{}", std::process::id()));
        let made = self.prepare().and_then(|()| {
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            let written = file.write_all(&[b'\n'; 4096]);
            fs::remove_file(&path).and(written)
        });
        made.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", self.dir.display())))
    }

    /// Makes the directory, which a process that will be confined does while it can; it survives a power cut as the records do.
    ///
    /// # Errors
    /// The file system's.
    pub fn prepare(&self) -> io::Result<()> {
        let missing: Vec<_> = self.dir.ancestors().take_while(|dir| !dir.is_dir()).collect();
        if missing.is_empty() {
            return Ok(());
        }
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        missing.iter().filter_map(|dir| dir.parent()).try_for_each(sync_dir)
    }

    /// The last move of `vm`, if one is recorded.
    ///
    /// # Errors
    /// A record that cannot be read.
    pub fn read(&self, vm: &str) -> io::Result<Option<Record>> {
        if name_problem(vm).is_some() {
            return Ok(None);
        }
        let file = match File::open(self.path(vm)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let mut text = String::new();
        file.take(MAX_RECORD_BYTES).read_to_string(&mut text)?;
        Ok(Some(serde_json::from_str(&text)?))
    }

    /// A person says of `found` that its machine runs at the other side: it is remembered as moved.
    ///
    /// # Errors
    /// The file system's.
    pub fn settle_there(&self, found: Record) -> io::Result<()> {
        self.write(&Record { phase: Phase::Moved, time: rfc3339(SystemTime::now()), ..found })
    }

    /// Every record that can be read.
    pub fn all(&self) -> Vec<Record> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().filter_map(Result::ok);
        let names = entries.filter_map(|entry| Some(entry.file_name().to_str()?.strip_suffix(".move")?.to_owned()));
        let mut records: Vec<_> = names.filter_map(|name| self.read(&name).ok().flatten()).collect();
        records.sort_by(|a, b| a.vm.cmp(&b.vm));
        records
    }

    /// Removes the record of `vm`, if there is one.
    ///
    /// # Errors
    /// The file system's.
    pub fn remove(&self, vm: &str) -> io::Result<()> {
        match fs::remove_file(self.path(vm)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
            Ok(()) => sync_dir(&self.dir),
        }
    }
}

/// Brings what was made, named and removed in `dir` to the disk.
fn sync_dir(dir: &Path) -> io::Result<()> {
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    let dir = open(dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    Ok(rustix::fs::fsync(dir)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    #[test]
    fn a_record_is_written_found_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::at(dir.path().join("not/there/yet"));
        assert_eq!(records.read("web").unwrap(), None);
        let record = Record {
            move_id: Uuid::from_u128(1),
            epoch: 2,
            vm: "web".into(),
            peer: "tcp:b:7300".into(),
            phase: Phase::OnItsWay,
            time: "t".into(),
            disks: vec!["/srv/web.img".into()],
        };
        records.write(&record).unwrap();
        records.write(&record).unwrap();
        assert_eq!(records.read("web").unwrap(), Some(record.clone()));
        assert_eq!(records.all(), [record]);
        assert_eq!(records.read("../web").unwrap(), None);
        records.remove("web").unwrap();
        records.remove("web").unwrap();
        assert!(records.all().is_empty());
    }

    /// A record outlives the program that wrote it, and is what keeps a machine from being booted beside its other copy.
    #[test]
    fn a_record_of_version_1_is_read_for_ever() {
        let golden = |phase| {
            format!(
                "{{\n  \"move_id\": \"00112233-4455-6677-8899-aabbccddeeff\",\n  \"epoch\": 18446744073709551615,\n  \
                 \"vm\": \"web\",\n  \"peer\": \"tcp:b:7300\",\n  \"phase\": \"{phase}\",\n  \
                 \"time\": \"2026-11-25T12:00:00Z\",\n  \"disks\": [\n    \"/srv/web.img\",\n    \"/srv/b.img\"\n  ]\n}}\n"
            )
        };
        let dir = tempfile::tempdir().unwrap();
        let records = Records::at(dir.path().to_owned());
        for (phase, word) in [(Phase::OnItsWay, "on-its-way"), (Phase::Moved, "moved"), (Phase::Arrived, "arrived")] {
            let record = Record {
                move_id: Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff),
                epoch: u64::MAX,
                vm: "web".into(),
                peer: "tcp:b:7300".into(),
                phase,
                time: "2026-11-25T12:00:00Z".into(),
                disks: vec!["/srv/web.img".into(), "/srv/b.img".into()],
            };
            records.write(&record).unwrap();
            assert_eq!(fs::read_to_string(records.path("web")).unwrap(), golden(word));
            fs::write(records.path("web"), golden(word)).unwrap();
            assert_eq!(records.read("web").unwrap(), Some(record));
        }
    }

    #[test]
    fn a_place_for_records_is_tried_without_a_trace() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::at(dir.path().join("records"));
        records.try_out("web").unwrap();
        assert_eq!(fs::read_dir(records.dir()).unwrap().count(), 0);
        assert_eq!(records.read("web").unwrap(), None);
        fs::write(dir.path().join("file"), "").unwrap();
        let error = Records::at(dir.path().join("file")).try_out("web").unwrap_err();
        assert!(error.to_string().contains("/file: "), "{error}");
    }

    #[test]
    fn a_machine_that_a_person_says_is_there_stays_recorded_as_moved() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::at(dir.path().to_owned());
        let config = crate::config::Draft { name: Some("web".into()), ..Default::default() }
            .with_devices(&["path=/a".into(), "path=/b,readonly=on".into()], &[], None, &mut Default::default())
            .build(crate::config::SerialConfig::Null, &mut Default::default());
        let this_move = Move { id: Uuid::from_u128(1), epoch: 2 };
        let found = record(this_move, &config, "tcp:b:7300", Phase::OnItsWay);
        assert_eq!(found.disks, ["/a"]);
        records.settle_there(found.clone()).unwrap();
        let settled = records.read("web").unwrap().unwrap();
        assert_eq!((settled.phase, settled.move_id, &settled.peer), (Phase::Moved, found.move_id, &found.peer));
    }
}
