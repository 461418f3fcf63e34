//! What tests do inside guests (and hosts) that busybox cannot: streams with checksums over TCP, vsock and Unix sockets,
//! memory that is verified, clocks, zeros on a disk. Each command ends with one line for the test to read, and status 0 only if all was right.

mod net;

use clap::Parser;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::time::{ClockId, clock_gettime};
use std::{
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    net::{IpAddr, Ipv4Addr, Shutdown, TcpListener, TcpStream},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};
use vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};

#[derive(Parser)]
#[command(about = "Streams, memory and clocks for tests")]
enum Command {
    /// Receive one TCP stream, answer its checksum
    TcpReceive { port: u16 },
    /// Send a TCP stream and compare the checksum that the receiver answers
    TcpSend { address: IpAddr, port: u16, mib: u64 },
    /// Echo whatever comes to a TCP port, for ever
    TcpEcho { port: u16 },
    /// Send numbered records to a TCP echo until standard input ends; compare, and print the longest gap
    TcpPulse { address: IpAddr, port: u16, interval_ms: u64 },
    /// Ping until standard input ends; print what was lost, and the longest gap
    Ping { address: Ipv4Addr, interval_ms: u64 },
    /// Echo whatever comes to a vsock port, for ever
    VsockEcho { port: u32 },
    /// Send to a vsock port and compare what comes back
    VsockSend { cid: u32, port: u32, mib: u64 },
    /// Echo whatever comes to a Unix socket, for ever
    UnixEcho { path: PathBuf },
    /// Send to a guest's vsock port through the monitor's Unix socket and compare what comes back
    UnixSend { path: PathBuf, port: u32, mib: u64 },
    /// Fill memory, verify it again and again
    Memory {
        mib: usize,
        #[arg(default_value_t = 2)]
        rounds: u64,
        /// Memory to touch a second, MiB
        #[arg(long, default_value_t = u64::MAX)]
        pace: u64,
        /// End when this file is there
        #[arg(long)]
        until: Option<PathBuf>,
    },
    /// Print the clocks, in seconds
    Clock,
    /// Tell whoever asks on this UDP port the wall clock, for ever
    ClockServe { port: u16 },
    /// Print how far the clocks here are from the wall clock of a server
    ClockCompare {
        address: IpAddr,
        port: u16,
        /// Set the wall clock here by it
        #[arg(long)]
        set: bool,
    },
    /// Have a disk make zeros of a range by itself, and keep its blocks
    WriteZeroes {
        disk: PathBuf,
        offset: u64,
        length: u64,
        /// It may give the blocks up
        #[arg(long)]
        unmap: bool,
    },
    /// Print a tick at an interval; then the longest gap between two
    Ticks { interval_ms: u64, count: u64 },
}

fn main() -> ExitCode {
    match run(Command::parse()) {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("guest-tool: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> io::Result<String> {
    match command {
        Command::TcpReceive { port } => tcp_receive(port),
        Command::TcpSend { address, port, mib } => tcp_send(TcpStream::connect((address, port))?, mib),
        Command::TcpEcho { port } => {
            let listener = TcpListener::bind(("0.0.0.0", port))?;
            println!("listening");
            serve(listener.incoming(), |stream| {
                stream.set_nodelay(true)?;
                Ok((stream.try_clone()?, stream))
            })
        }
        Command::TcpPulse { address, port, interval_ms } => {
            net::pulse(TcpStream::connect((address, port))?, Duration::from_millis(interval_ms))
        }
        Command::Ping { address, interval_ms } => net::ping(address, Duration::from_millis(interval_ms)),
        Command::VsockEcho { port } => {
            let listener = VsockListener::bind(&VsockAddr::new(VMADDR_CID_ANY, port))?;
            println!("listening");
            serve(listener.incoming(), |stream| Ok((stream.try_clone()?, stream)))
        }
        Command::VsockSend { cid, port, mib } => {
            let stream = VsockStream::connect(&VsockAddr::new(cid, port))?;
            round_trip(stream.try_clone()?, stream, mib)
        }
        Command::UnixEcho { path } => {
            let _ = fs::remove_file(&path);
            let listener = UnixListener::bind(path)?;
            println!("listening");
            serve(listener.incoming(), |stream| Ok((stream.try_clone()?, stream)))
        }
        Command::UnixSend { path, port, mib } => unix_send(UnixStream::connect(path)?, port, mib),
        Command::Memory { mib, rounds, pace, until } => memory(mib, rounds, pace, until.as_deref()),
        Command::Clock => clock(),
        Command::ClockServe { port } => net::serve_clock(port),
        Command::ClockCompare { address, port, set } => net::compare_clocks(address, port, set),
        Command::WriteZeroes { disk, offset, length, unmap } => write_zeroes(&disk, offset, length, unmap),
        Command::Ticks { interval_ms, count } => Ok(ticks(Duration::from_millis(interval_ms), count)),
    }
}

/// Deterministic bytes, cheap enough not to hide the speed of what carries them.
struct Noise(u64);

impl Noise {
    fn fill(&mut self, buffer: &mut [u8]) {
        for word in buffer.chunks_exact_mut(8) {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            word.copy_from_slice(&(self.0 ^ (self.0 >> 29)).to_le_bytes());
        }
    }
}

/// Checksum over 8-byte words; the order of words counts, how they were cut into reads does not.
#[derive(Default)]
struct Sum {
    value: u64,
    rest: Vec<u8>,
}

impl Sum {
    fn add(&mut self, bytes: &[u8]) {
        self.rest.extend_from_slice(bytes);
        let whole = self.rest.len() - self.rest.len() % 8;
        for chunk in self.rest.drain(..whole).as_slice().chunks_exact(8) {
            let word = chunk.iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
            self.value = (self.value ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
        }
    }

    fn hex(&self) -> String {
        format!("{:016x}", self.value)
    }
}

const CHUNK_BYTES: usize = 64 << 10;

/// Sends `mib` MiB of noise; returns its checksum.
fn send(to: &mut impl Write, mib: u64) -> io::Result<Sum> {
    let (mut noise, mut sum, mut buffer) = (Noise(mib), Sum::default(), vec![0u8; CHUNK_BYTES]);
    for _ in 0..mib << 20 >> CHUNK_BYTES.trailing_zeros() {
        noise.fill(&mut buffer);
        sum.add(&buffer);
        to.write_all(&buffer)?;
    }
    to.flush().map(|()| sum)
}

/// Reads at most `limit` bytes; returns their number and checksum.
fn receive(from: &mut impl Read, limit: u64) -> io::Result<(u64, Sum)> {
    let (mut count, mut sum, mut buffer) = (0u64, Sum::default(), vec![0u8; CHUNK_BYTES]);
    while count < limit {
        let bytes = match from.read(&mut buffer)? {
            0 => break,
            n => buffer.get(..n).unwrap_or_default(),
        };
        sum.add(bytes);
        count += bytes.len() as u64;
    }
    Ok((count, sum))
}

fn same(sent: &str, received: &str, mib: u64, start: Instant) -> io::Result<String> {
    if sent != received {
        return Err(io::Error::other(format!("checksum differs: sent {sent}, received {received}")));
    }
    let seconds = start.elapsed().as_secs_f64();
    Ok(format!("same {sent} {mib} MiB in {seconds:.2} s, {:.1} MiB/s", mib as f64 / seconds))
}

fn tcp_receive(port: u16) -> io::Result<String> {
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    println!("listening");
    let (mut stream, _) = listener.accept()?;
    let (count, sum) = receive(&mut stream, u64::MAX)?;
    writeln!(stream, "{}", sum.hex())?;
    Ok(format!("received {count} bytes {}", sum.hex()))
}

fn tcp_send(mut stream: TcpStream, mib: u64) -> io::Result<String> {
    let start = Instant::now();
    let sum = send(&mut stream, mib)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    same(&sum.hex(), answer.trim(), mib, start)
}

/// Echoes each stream of a listener in its own thread.
fn serve<S, R, W>(
    incoming: impl Iterator<Item = io::Result<S>>,
    split: impl Fn(S) -> io::Result<(R, W)>,
) -> io::Result<String>
where
    R: Read + Send + 'static,
    W: Write + Send + 'static,
{
    for stream in incoming {
        let (mut reader, mut writer) = split(stream?)?;
        thread::spawn(move || io::copy(&mut reader, &mut writer));
    }
    Ok("end".into())
}

/// Sends noise from one thread while another reads it back.
fn round_trip<W: Write + Send + 'static>(mut reader: impl Read, mut writer: W, mib: u64) -> io::Result<String> {
    let start = Instant::now();
    let sender = thread::spawn(move || send(&mut writer, mib).map(|sum| (sum, writer)));
    let (_, received) = receive(&mut reader, mib << 20)?;
    let (sent, _writer) = sender.join().map_err(|_| io::Error::other("the sending thread panicked"))??;
    same(&sent.hex(), &received.hex(), mib, start)
}

/// The monitor's Unix socket wants `CONNECT port` and answers `OK port` before the stream begins.
fn unix_send(stream: UnixStream, port: u32, mib: u64) -> io::Result<String> {
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::new(stream);
    writeln!(writer, "CONNECT {port}")?;
    let mut answer = String::new();
    reader.read_line(&mut answer)?;
    if !answer.starts_with("OK ") {
        return Err(io::Error::other(format!("the monitor answered {answer:?} to CONNECT {port}")));
    }
    round_trip(reader, writer, mib)
}

fn memory(mib: usize, rounds: u64, pace: u64, until: Option<&Path>) -> io::Result<String> {
    const MIB_WORDS: usize = 1 << 20 >> 3;
    let words = mib * MIB_WORDS;
    let rest = Duration::from_secs(1) / u32::try_from(pace).unwrap_or(u32::MAX).max(1);
    let expected = |index: usize, round: u64| (index as u64 ^ round << 56).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut memory = vec![0u64; words];
    for round in 1..=rounds {
        for (part, words) in memory.chunks_mut(MIB_WORDS).enumerate() {
            for (index, word) in words.iter_mut().enumerate() {
                *word = expected(part * MIB_WORDS + index, round);
            }
            thread::sleep(rest);
        }
        let wrong = memory.iter().enumerate().find(|(index, word)| **word != expected(*index, round));
        if let Some((index, word)) = wrong {
            let (offset, right) = (index * 8, expected(index, round));
            return Err(io::Error::other(format!("memory at {offset:#x}: {word:#x} instead of {right:#x}")));
        }
        println!("round {round} of {rounds}");
        if until.is_some_and(Path::exists) {
            break;
        }
    }
    Ok(format!("memory {mib} MiB right"))
}

/// A block device's fallocate is its REQ_OP_WRITE_ZEROES (`blkdev_fallocate`). Of a hole the kernel writes nothing itself where the
/// device cannot; to a range of zeros it would, unless the device says that it can.
fn write_zeroes(disk: &Path, offset: u64, length: u64, unmap: bool) -> io::Result<String> {
    let kind = if unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
    let file = fs::File::options().read(true).write(true).open(disk)?;
    fallocate(&file, kind | FallocateFlags::KEEP_SIZE, offset, length)?;
    file.sync_all()?;
    Ok(format!("zeros {length} bytes at {offset}"))
}

fn clock() -> io::Result<String> {
    let read = |id| {
        let time = clock_gettime(id);
        format!("{}.{:06}", time.tv_sec, time.tv_nsec / 1000)
    };
    let source = fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource")?;
    Ok(format!(
        "realtime={} monotonic={} boottime={} source={}",
        read(ClockId::Realtime),
        read(ClockId::Monotonic),
        read(ClockId::Boottime),
        source.trim()
    ))
}

fn ticks(interval: Duration, count: u64) -> String {
    let start = Instant::now();
    let (mut last, mut longest) = (start, Duration::ZERO);
    for tick in 1..=count {
        thread::sleep(interval);
        let now = Instant::now();
        longest = longest.max(now - last);
        last = now;
        println!("tick {tick} {:.3}", (now - start).as_secs_f64());
    }
    format!("longest gap {:.3} ms", longest.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_does_not_depend_on_how_bytes_are_cut() {
        let mut bytes = vec![0u8; 4096];
        Noise(7).fill(&mut bytes);
        let mut whole = Sum::default();
        whole.add(&bytes);
        let mut cut = Sum::default();
        bytes.chunks(13).for_each(|chunk| cut.add(chunk));
        assert_eq!(whole.hex(), cut.hex());
        bytes.swap(0, 8);
        let mut other = Sum::default();
        other.add(&bytes);
        assert_ne!(whole.hex(), other.hex());
    }

    #[test]
    fn a_stream_comes_back_and_a_changed_one_is_noticed() {
        let (near, far) = UnixStream::pair().unwrap();
        let echo = thread::spawn(move || io::copy(&mut far.try_clone().unwrap(), &mut &far));
        let line = round_trip(near.try_clone().unwrap(), near.try_clone().unwrap(), 1).unwrap();
        assert!(line.starts_with("same "), "{line}");
        near.shutdown(Shutdown::Both).unwrap();
        echo.join().unwrap().unwrap();
        let error = same("a", "b", 1, Instant::now()).unwrap_err().to_string();
        assert_eq!(error, "checksum differs: sent a, received b");
    }

    #[test]
    fn memory_is_verified() {
        assert_eq!(memory(1, 2, u64::MAX, None).unwrap(), "memory 1 MiB right");
    }
}
