//! What a network carries while a machine moves: numbered records over TCP, pings, and two clocks compared. Each goes on until
//! standard input ends, and then says what it saw.

use crate::Noise;
use rustix::{
    net::{AddressFamily, SocketType, ipproto, socket},
    time::{ClockId, Timespec, clock_gettime, clock_settime},
};
use std::{
    fs,
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Shutdown, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// A record of a numbered stream: its number, and noise that follows from it.
const RECORD_BYTES: usize = 1 << 10;
/// How long after the last ping an answer may still come.
const LATE_ANSWERS: Duration = Duration::from_secs(3);
/// Exchanges of a comparison of clocks; the quickest counts.
const EXCHANGES: usize = 60;
const EXCHANGE_LIMIT: Duration = Duration::from_millis(500);

/// True from when standard input has ended.
fn input_ended() -> Arc<AtomicBool> {
    let ended = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&ended);
    thread::spawn(move || {
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        seen.store(true, Ordering::Relaxed);
    });
    ended
}

/// The longest time between two things that came.
struct Gap {
    last: Option<Instant>,
    longest: Duration,
}

impl Gap {
    fn new() -> Self {
        Self { last: None, longest: Duration::ZERO }
    }

    fn came(&mut self) {
        let now = Instant::now();
        self.longest = self.longest.max(self.last.replace(now).map_or(Duration::ZERO, |last| now - last));
    }

    fn ms(&self) -> f64 {
        self.longest.as_secs_f64() * 1e3
    }
}

fn record(number: u64) -> Vec<u8> {
    let mut bytes = vec![0; RECORD_BYTES];
    Noise(number).fill(&mut bytes);
    let (head, _) = bytes.split_at_mut(8);
    head.copy_from_slice(&number.to_le_bytes());
    bytes
}

/// Sends a record at an interval to an echo, and compares all that comes back.
pub fn pulse(stream: TcpStream, interval: Duration) -> io::Result<String> {
    stream.set_nodelay(true)?;
    let ended = input_ended();
    let (mut reader, mut writer) = (stream.try_clone()?, stream);
    println!("connected");
    let sender = thread::spawn(move || -> io::Result<u64> {
        let mut number = 0;
        while !ended.load(Ordering::Relaxed) {
            writer.write_all(&record(number))?;
            number += 1;
            thread::sleep(interval);
        }
        writer.shutdown(Shutdown::Write).map(|()| number)
    });
    let (mut number, mut gap, mut bytes) = (0, Gap::new(), vec![0; RECORD_BYTES]);
    loop {
        match reader.read_exact(&mut bytes) {
            Ok(()) if bytes == record(number) => gap.came(),
            Ok(()) => return Err(io::Error::other(format!("record {number} came back as another"))),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
            Err(error) => return Err(error),
        }
        number += 1;
    }
    let sent = sender.join().map_err(|_| io::Error::other("the sending thread panicked"))??;
    if sent != number {
        return Err(io::Error::other(format!("{sent} records sent, {number} came back")));
    }
    Ok(format!("same {number} records, longest gap {:.1} ms", gap.ms()))
}

/// Pings at an interval, and says what was lost and for how long nothing came.
pub fn ping(address: Ipv4Addr, interval: Duration) -> io::Result<String> {
    // The kernel fills in checksum and identifier, for those groups that may ping without being root's raw socket.
    fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0")?;
    let socket = UdpSocket::from(socket(AddressFamily::INET, SocketType::DGRAM, Some(ipproto::ICMP))?);
    socket.connect((address, 0))?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    let (ended, out) = (input_ended(), socket.try_clone()?);
    let sender = thread::spawn(move || {
        let mut sent = 0u32;
        while !ended.load(Ordering::Relaxed) {
            let mut request = [0u8; 16];
            let (head, number) = request.split_at_mut(8);
            head.copy_from_slice(&[8, 0, 0, 0, 0, 0, (sent >> 8) as u8, sent as u8]);
            number.copy_from_slice(&u64::from(sent).to_le_bytes());
            // Unreachable now is lost, and may come to be reachable.
            let _ = out.send(&request);
            sent += 1;
            thread::sleep(interval);
        }
        sent
    });
    let (mut gap, mut answered, mut request) = (Gap::new(), Vec::<bool>::new(), [0u8; 64]);
    let mut over = None;
    let count = |answered: &[bool]| answered.iter().filter(|answered| **answered).count();
    loop {
        if let Ok(16) = socket.recv(&mut request)
            && let Some((_, number)) = request.get(..16).and_then(|request| request.split_at_checked(8))
        {
            let number = number.iter().rev().fold(0usize, |all, byte| all << 8 | usize::from(*byte));
            if number < 1 << 24 {
                answered.resize(answered.len().max(number + 1), false);
                if let Some(answered @ false) = answered.get_mut(number) {
                    *answered = true;
                    gap.came();
                    if number == 0 {
                        println!("answered");
                    }
                }
            }
        }
        if sender.is_finished() && over.get_or_insert_with(Instant::now).elapsed() > LATE_ANSWERS {
            break;
        }
    }
    let sent = sender.join().map_err(|_| io::Error::other("the sending thread panicked"))? as usize;
    let lost = sent - count(&answered).min(sent);
    Ok(format!("pinged sent={sent} lost={lost} gap_ms={:.1}", gap.ms()))
}

fn nanoseconds(time: Timespec) -> i128 {
    i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)
}

fn now(clock: ClockId) -> i128 {
    nanoseconds(clock_gettime(clock))
}

/// Answers whoever asks for the time, for ever.
pub fn serve_clock(port: u16) -> io::Result<String> {
    let socket = UdpSocket::bind(("0.0.0.0", port))?;
    println!("listening");
    let mut number = [0; 8];
    loop {
        let (_, asker) = socket.recv_from(&mut number)?;
        let answer = [number, (now(ClockId::Realtime) as u64).to_le_bytes()].concat();
        // An asker that has gone asks no more.
        let _ = socket.send_to(&answer, asker);
    }
}

/// This machine's clocks less the server's wall clock, nanoseconds, by the quickest exchange, which took `rtt`.
struct Offset {
    realtime: i128,
    monotonic: i128,
    rtt: Duration,
}

/// Asks [`EXCHANGES`] times.
fn offset(socket: &UdpSocket) -> io::Result<Offset> {
    let mut best: Option<Offset> = None;
    for number in 0..EXCHANGES as u64 {
        let (monotonic, realtime, began) = (now(ClockId::Monotonic), now(ClockId::Realtime), Instant::now());
        socket.send(&number.to_le_bytes())?;
        let Some(there) = answer_to(socket, number) else { continue };
        let rtt = began.elapsed();
        if best.as_ref().is_some_and(|best| best.rtt <= rtt) {
            continue;
        }
        let half = i128::try_from(rtt.as_nanos() / 2).unwrap_or_default();
        best = Some(Offset { realtime: realtime + half - there, monotonic: monotonic + half - there, rtt });
    }
    best.ok_or_else(|| io::Error::other("nobody tells the time"))
}

/// The server's time in its answer to question `number`. Answers to earlier ones, given up already, are passed over: else one that
/// is late would put all that follow out of step.
fn answer_to(socket: &UdpSocket, number: u64) -> Option<i128> {
    loop {
        let mut answer = [0; 16];
        // Shorter is nobody's answer; no answer within the socket's patience is an error.
        if socket.recv(&mut answer).ok()? < answer.len() {
            continue;
        }
        if let Some(there) = answer.strip_prefix(&number.to_le_bytes()) {
            return Some(u64::from_le_bytes(there.try_into().ok()?).into());
        }
    }
}

/// Compares this machine's clocks with the wall clock of a server; sets this wall clock by it where `set` says so.
pub fn compare_clocks(address: IpAddr, port: u16, set: bool) -> io::Result<String> {
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    socket.connect((address, port))?;
    socket.set_read_timeout(Some(EXCHANGE_LIMIT))?;
    if set {
        let ahead = offset(&socket)?.realtime;
        let right = now(ClockId::Realtime) - ahead;
        let failed = |_| io::Error::other("a time that no clock shows");
        let (tv_sec, tv_nsec) = (right.div_euclid(1_000_000_000), right.rem_euclid(1_000_000_000));
        let right = Timespec { tv_sec: tv_sec.try_into().map_err(failed)?, tv_nsec: tv_nsec as _ };
        clock_settime(ClockId::Realtime, right)?;
    }
    let Offset { realtime, monotonic, rtt } = offset(&socket)?;
    Ok(format!("realtime_us={} monotonic_us={} rtt_us={}", realtime / 1000, monotonic / 1000, rtt.as_micros()))
}
