//! `sterna list` and `sterna show`: what there is, without touching it.

use super::Output;
use crate::config::VmConfig;
use crate::control::client::{Client, Error as ClientError, PATIENCE};
use crate::control::protocol::Show;
use crate::error::Error;
use crate::records::Records;
use crate::registry::Registry;
use crate::units::{format_duration, format_size};
use serde::Serialize;
use std::fmt::Write;
use std::thread;
use std::time::Duration;
use sterna_migration::handover::Phase;

/// How long each VM may take to answer for the list.
const LIST_PATIENCE: Duration = Duration::from_secs(1);

/// A line of the list.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    /// A [`RunState`], or `not-answering`.
    state: String,
    pid: Option<u32>,
    #[serde(flatten)]
    facts: Option<Facts>,
}

/// What only an answering VM tells.
#[derive(Debug, Serialize)]
struct Facts {
    vcpus: u32,
    memory_bytes: u64,
    resident_bytes: u64,
    uptime_ms: u64,
}

/// Prints every VM of this host.
pub fn list(registry: &Registry, output: Output) -> Result<(), Error> {
    let names = registry.names()?;
    // All at once: one that stands still must not delay the others.
    let rows: Vec<Row> = thread::scope(|scope| {
        let asked: Vec<_> = names.iter().map(|name| scope.spawn(|| row(registry, name))).collect();
        asked.into_iter().filter_map(|thread| thread.join().ok().flatten()).collect()
    });
    let rows = with_records(rows);
    output.result(&rows, |rows| table(rows))
}

/// `rows`, and machines whose process ended while they were on their way: nobody knows yet where they are.
fn with_records(mut rows: Vec<Row>) -> Vec<Row> {
    for record in Records::from_env().all() {
        if record.phase == Phase::OnItsWay && rows.iter().all(|row| row.name != record.vm) {
            rows.push(Row { name: record.vm, state: "in-doubt".to_owned(), pid: None, facts: None });
        }
    }
    rows
}

/// One VM's line; `None` for what a crashed VM has left and for one that has just ended.
fn row(registry: &Registry, name: &str) -> Option<Row> {
    let mut client = match Client::connect(registry, name, LIST_PATIENCE) {
        Ok(client) => client,
        Err(ClientError::Gone { .. } | ClientError::NoSuchVm { .. }) => return None,
        Err(error) => return Some(silent(name, None, &error)),
    };
    match client.show(LIST_PATIENCE) {
        Ok(Show { name, pid, status, .. }) => Some(Row {
            name,
            state: status.state.word().to_owned(),
            pid: Some(pid),
            facts: Some(Facts {
                vcpus: status.vcpus,
                memory_bytes: status.memory_bytes,
                resident_bytes: status.resident_bytes,
                uptime_ms: status.uptime_ms,
            }),
        }),
        Err(ClientError::Gone { .. }) => None,
        Err(error) => Some(silent(name, client.pid(), &error)),
    }
}

fn silent(name: &str, pid: Option<u32>, error: &ClientError) -> Row {
    log::info!("{error}");
    Row { name: name.to_owned(), state: "not-answering".to_owned(), pid, facts: None }
}

fn table(rows: &[Row]) -> String {
    if rows.is_empty() {
        return "no VM runs here\n".to_owned();
    }
    let header = ["NAME", "STATE", "CPUS", "MEMORY", "UPTIME", "PID"].map(str::to_owned);
    let lines = rows.iter().map(|row| {
        let fact = |text: fn(&Facts) -> String| row.facts.as_ref().map_or("-".to_owned(), text);
        [
            row.name.clone(),
            row.state.replace('-', " "),
            fact(|facts| facts.vcpus.to_string()),
            fact(|facts| format_size(facts.memory_bytes)),
            fact(|facts| format_duration(Duration::from_millis(facts.uptime_ms))),
            row.pid.map_or("-".to_owned(), |pid| pid.to_string()),
        ]
    });
    let lines: Vec<_> = std::iter::once(header).chain(lines).collect();
    let mut text = String::new();
    for line in &lines {
        for (column, cell) in line.iter().enumerate() {
            let width = lines.iter().filter_map(|line| line.get(column)).map(String::len).max().unwrap_or(0);
            let _ = write!(text, "{cell:width$}  "); // writing to a String cannot fail
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    text
}

/// Prints all about one VM.
pub fn show(registry: &Registry, name: &str, output: Output) -> Result<(), Error> {
    let show = Client::connect(registry, name, PATIENCE)?.show(PATIENCE)?;
    output.result(&show, describe)
}

fn describe(show: &Show) -> String {
    let Show { name, pid, status, config } = show;
    let uptime = format_duration(Duration::from_millis(status.uptime_ms));
    let mut rows = vec![
        ("state".to_owned(), format!("{}, up {uptime}, process {pid}", status.state.word().replace('-', " "))),
        ("cpus".to_owned(), status.vcpus.to_string()),
        (
            "memory".to_owned(),
            format!("{}, resident {}", format_size(status.memory_bytes), format_size(status.resident_bytes)),
        ),
        ("balloon".to_owned(), super::balloon::describe(&status.balloon)),
    ];
    rows.extend(describe_config(config));
    for device in &status.devices {
        if let Some(fault) = &device.fault {
            rows.push(("FAULT".to_owned(), format!("{} waits for a reset by its driver: {fault}", device.id)));
        }
    }
    let width = rows.iter().map(|(key, _)| key.len()).max().unwrap_or(0);
    rows.iter().fold(format!("{name}\n"), |text, (key, value)| text + &format!("  {key:width$}  {value}\n"))
}

fn describe_config(config: &VmConfig) -> Vec<(String, String)> {
    let mut rows = vec![("kernel".to_owned(), config.kernel.display().to_string())];
    rows.extend(config.initrd.iter().map(|initrd| ("initrd".to_owned(), initrd.display().to_string())));
    rows.push(("cmdline".to_owned(), config.cmdline.clone()));
    rows.extend(config.disks.iter().map(|disk| {
        let how = if disk.readonly { " (read-only)" } else { "" };
        (disk.id.clone(), format!("{}{how}", disk.path.display()))
    }));
    rows.extend(config.nets.iter().map(|net| {
        let mac = net.mac.map(|byte| format!("{byte:02x}")).join(":");
        (net.id.clone(), format!("tap {}, {mac}", net.tap))
    }));
    rows.extend(
        config.vsock.iter().map(|vsock| ("vsock".to_owned(), format!("cid {}, {}", vsock.cid, vsock.socket.display()))),
    );
    rows.push(("serial".to_owned(), config.serial.to_string()));
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_lines_up_and_shows_who_does_not_answer() {
        let facts = Facts { vcpus: 2, memory_bytes: 512 << 20, resident_bytes: 1, uptime_ms: 130_000 };
        let rows = [
            Row { name: "web".into(), state: "running".into(), pid: Some(123), facts: Some(facts) },
            Row { name: "database".into(), state: "not-answering".into(), pid: None, facts: None },
        ];
        assert_eq!(
            table(&rows),
            "NAME      STATE          CPUS  MEMORY  UPTIME  PID\n\
             web       running        2     512M    2m 10s  123\n\
             database  not answering  -     -       -       -\n"
        );
        assert_eq!(table(&[]), "no VM runs here\n");
        let json = serde_json::to_value(&rows[0]).unwrap();
        assert_eq!(json["memory_bytes"], 512 << 20);
    }

    #[test]
    fn what_a_crashed_vm_has_left_is_not_listed() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::at(dir.path().to_owned());
        drop(std::os::unix::net::UnixListener::bind(registry.socket("crashed")).unwrap());
        assert!(row(&registry, "crashed").is_none());
        let _listener = std::os::unix::net::UnixListener::bind(registry.socket("hung")).unwrap();
        let hung = row(&registry, "hung").unwrap();
        assert_eq!((hung.state.as_str(), hung.pid), ("not-answering", Some(std::process::id())));
    }
}
