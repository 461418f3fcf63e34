//! The console in a real event loop, with a serial port and a guest that reads and writes its registers.

use super::*;
use event_manager::{EventManager, SubscriberOps};
use std::fs::File;
use std::io::Read;
use std::time::Instant;
use sterna_devices::{BusDevice, IrqLine};

struct NoIrq;

impl IrqLine for NoIrq {
    fn trigger(&self) -> io::Result<()> {
        Ok(())
    }
}

struct Machine {
    events: EventManager<Arc<Mutex<Console>>>,
    console: Arc<Mutex<Console>>,
    serial: Arc<Mutex<Serial>>,
}

impl Machine {
    fn new(config: &SerialConfig) -> Self {
        let (console, writer) = Console::open(config).unwrap();
        Self::with(console, writer)
    }

    /// As on standard input and output, with other descriptors.
    fn on(stdin: impl Into<OwnedFd>, stdout: impl Into<OwnedFd>) -> Self {
        let mut console = Console::new(BACKLOG_BYTES, false).unwrap();
        console.input = Some(Input::new(stdin.into()));
        console.output.lock().set_sink(stdout.into());
        let (console, writer) = console.with_writer();
        Self::with(console, writer)
    }

    fn with(mut console: Console, writer: Box<dyn Write + Send>) -> Self {
        let serial = Arc::new(Mutex::new(Serial::new(Arc::new(NoIrq), writer)));
        console.attach(Arc::clone(&serial)).unwrap();
        let console = Arc::new(Mutex::new(console));
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(Arc::clone(&console));
        Self { events, console, serial }
    }

    /// Runs the loop until nothing is ready.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            if self.events.run_with_timeout(0).unwrap() == 0 {
                return;
            }
        }
        panic!("the event loop spins");
    }

    fn say(&self, text: &[u8]) {
        let mut serial = self.serial.lock().unwrap();
        for byte in text {
            serial.write(0, &[*byte]);
        }
    }

    /// The guest reads all that is in its FIFO.
    fn hear(&self) -> Vec<u8> {
        let mut serial = self.serial.lock().unwrap();
        let mut heard = Vec::new();
        loop {
            let mut byte = [0];
            serial.read(5, &mut byte);
            if byte[0] & 1 == 0 {
                return heard;
            }
            serial.read(0, &mut byte);
            heard.extend(byte);
        }
    }

    /// What `client` reads while the loop runs, `count` bytes of it.
    fn show(&mut self, client: &mut UnixStream, count: usize) -> Vec<u8> {
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut shown = vec![0; count];
        for part in shown.chunks_mut(1000) {
            self.settle();
            client.read_exact(part).unwrap();
        }
        shown
    }

    /// The guest reads until `count` bytes have come.
    fn hear_all(&mut self, count: usize) -> Vec<u8> {
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut heard = Vec::new();
        while heard.len() < count {
            assert!(Instant::now() < deadline, "heard {} of {count} bytes", heard.len());
            self.settle();
            heard.extend(self.hear());
        }
        heard
    }
}

fn null() -> File {
    File::options().read(true).write(true).open("/dev/null").unwrap()
}

fn pattern(count: usize) -> Vec<u8> {
    (0..count).map(|i| (i % 251) as u8).collect()
}

#[test]
fn a_pipe_feeds_the_guest_through_its_small_fifo_without_loss() {
    let (reader, mut writer) = io::pipe().unwrap();
    let mut machine = Machine::on(reader, null());
    let sent = pattern(50_000);
    writer.write_all(&sent).unwrap();
    assert_eq!(machine.hear_all(50_000), sent);
}

#[test]
fn the_end_of_input_does_not_spin() {
    for leave_bytes in [0, 10, 1000] {
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(&pattern(leave_bytes)).unwrap();
        drop(writer);
        let mut machine = Machine::on(reader, null());
        // The FIFO is full and the pipe has hung up: only the guest can go on.
        machine.settle();
        assert_eq!(machine.hear_all(leave_bytes), pattern(leave_bytes));
        machine.settle();
        assert!(machine.console.lock().unwrap().input.is_none());
    }
}

#[test]
fn files_and_dev_null_are_input_too() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&pattern(3000)).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    let mut machine = Machine::on(file, null());
    assert_eq!(machine.hear_all(3000), pattern(3000));
    machine.settle();

    let mut machine = Machine::on(null(), null());
    machine.settle();
    assert_eq!(machine.hear(), b"");
}

#[test]
fn the_escape_stops_the_machine_and_is_not_heard() {
    let (reader, mut writer) = io::pipe().unwrap();
    let mut machine = Machine::on(reader, null());
    machine.console.lock().unwrap().escape = Some(Escape::default());
    writer.write_all(b"a\x1d\x1db").unwrap();
    machine.settle();
    assert!(!machine.console.lock().unwrap().take_stop_request());
    writer.write_all(b"c\x1dqd").unwrap();
    machine.settle();
    assert!(machine.console.lock().unwrap().take_stop_request());
    assert!(!machine.console.lock().unwrap().take_stop_request());
    assert_eq!(machine.hear(), b"a\x1dbcd");
}

#[test]
fn a_slow_reader_of_standard_output_gets_everything_that_fits_the_backlog() {
    let (mut reader, writer) = io::pipe().unwrap();
    let mut machine = Machine::on(null(), writer);
    let said = pattern(500_000);
    machine.say(&said);
    let mut got = Vec::new();
    while got.len() < said.len() {
        let mut part = [0; 10_000];
        let read = reader.read(&mut part).unwrap();
        got.extend_from_slice(&part[..read]);
        machine.settle();
    }
    assert_eq!(got, said);
    assert_eq!(machine.console.lock().unwrap().dropped_bytes(), 0);
}

#[test]
fn what_still_waits_is_sent_at_the_end() {
    let (mut reader, writer) = io::pipe().unwrap();
    let machine = Machine::on(null(), writer);
    machine.say(&pattern(200_000));
    let all = std::thread::spawn(move || {
        let mut got = Vec::new();
        reader.read_to_end(&mut got).unwrap();
        got
    });
    drop(machine);
    assert_eq!(all.join().unwrap(), pattern(200_000));
}

#[test]
fn a_file_is_appended_to() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("console.log");
    for text in ["first\n", "second\n"] {
        Machine::new(&SerialConfig::File(path.clone())).say(text.as_bytes());
    }
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "first\nsecond\n");
    let error = Console::open(&SerialConfig::File(directory.path().into())).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains(directory.path().to_str().unwrap()), "{error}");
}

#[test]
fn nothing_goes_nowhere() {
    let mut machine = Machine::new(&SerialConfig::Null);
    machine.say(&pattern(10_000));
    machine.settle();
    assert_eq!(machine.console.lock().unwrap().dropped_bytes(), 0);
}

#[test]
fn a_socket_replays_the_latest_output_and_talks_both_ways() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("console");
    let mut machine = Machine::new(&SerialConfig::Socket(path.clone()));
    let said = pattern(100_000);
    machine.say(&said);
    machine.settle();
    let mut client = UnixStream::connect(&path).unwrap();
    machine.settle();
    assert_eq!(machine.show(&mut client, REPLAY_BYTES), said[said.len() - REPLAY_BYTES..]);
    machine.say(b"now");
    assert_eq!(machine.show(&mut client, 3), b"now");
    client.write_all(b"\x1dq").unwrap();
    machine.settle();
    assert_eq!(machine.hear(), b"\x1dq", "escapes are the client's own");
    drop(machine);
    assert!(!path.exists());
}

#[test]
fn one_client_at_a_time_and_the_next_when_it_has_left() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("console");
    let mut machine = Machine::new(&SerialConfig::Socket(path.clone()));
    let mut first = UnixStream::connect(&path).unwrap();
    machine.settle();
    let mut second = UnixStream::connect(&path).unwrap();
    machine.settle();
    let mut answer = String::new();
    second.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("in use"), "{answer}");
    machine.say(b"x");
    assert_eq!(machine.show(&mut first, 1), b"x");

    // The guest reads nothing, so nobody reads the first client's hang-up either.
    first.write_all(&pattern(1000)).unwrap();
    machine.settle();
    drop(first);
    machine.settle();
    let mut third = UnixStream::connect(&path).unwrap();
    machine.settle();
    machine.say(b"y");
    assert_eq!(machine.show(&mut third, 2), b"xy");
    assert_eq!(machine.hear_all(64), pattern(1000)[..64]);
}

#[test]
fn a_client_that_does_not_read_loses_the_oldest_and_stalls_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("console");
    let mut machine = Machine::new(&SerialConfig::Socket(path.clone()));
    let mut client = UnixStream::connect(&path).unwrap();
    machine.settle();
    let said = pattern(1 << 20);
    for part in said.chunks(10_000) {
        machine.say(part);
        machine.settle();
    }
    machine.settle();
    client.set_nonblocking(true).unwrap();
    let mut got = Vec::new();
    let mut part = [0; 4096];
    while let Ok(count) = client.read(&mut part) {
        got.extend_from_slice(&part[..count]);
        machine.settle();
    }
    let dropped = machine.console.lock().unwrap().dropped_bytes();
    assert!(dropped > 0);
    assert_eq!(got.len() as u64 + dropped, 1 << 20);
    assert_eq!(got[got.len() - 1000..], said[said.len() - 1000..]);
    drop(client);
    machine.say(b"z");
    machine.settle();
    assert!(machine.console.lock().unwrap().input.is_none());
}

#[test]
fn a_client_that_has_said_all_still_listens() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("console");
    let mut machine = Machine::new(&SerialConfig::Socket(path.clone()));
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"ls\n").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    machine.settle();
    assert_eq!(machine.hear(), b"ls\n");
    machine.say(b"file");
    assert_eq!(machine.show(&mut client, 4), b"file");
}

#[test]
fn a_path_that_is_no_socket_is_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let error = Console::open(&SerialConfig::Socket(file.path().into())).map(|_| ()).unwrap_err();
    assert!(matches!(error, Error::Listen(ListenError::NotASocket { .. })), "{error}");
}
