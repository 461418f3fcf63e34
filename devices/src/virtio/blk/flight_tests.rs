//! A request follows the results of its operations, without a kernel.

use super::*;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

struct Script {
    flight: Flight,
    ground: Ground,
}

fn ground(offset: u64) -> Ground {
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    Ground { ram: Arc::new(ram), alignment: Alignment { memory: offset, offset }, block_device: false, through: false }
}

fn script(verb: Verb, offset: u64, length: u32, ground: Ground) -> Script {
    let data = SmallVec::from_slice(&[Segment { address: GuestAddress(0), length }]);
    let status = GuestAddress(0x8_0000);
    let request = Request { verb: Ok(verb), offset, length: u64::from(length), data, status, room: 0 };
    Script { flight: Flight::new(0, verb, request, &ground), ground }
}

/// What an operation is, in brief.
fn brief(op: &Op) -> String {
    let bytes = |buffers: &Buffers| buffers.bytes();
    match op {
        Op::Read { offset, into } => format!("read {offset}+{}", bytes(into)),
        Op::Write { offset, from, through } => {
            format!("write {offset}+{}{}", bytes(from), if *through { "!" } else { "" })
        }
        Op::Flush => "flush".into(),
        Op::Allocate { mode, offset, length } => {
            let what = if mode.contains(FallocateFlags::PUNCH_HOLE) { "punch" } else { "zero" };
            format!("{what} {offset}+{length}")
        }
        Op::Discard { offset, length } => format!("discard {offset}+{length}"),
    }
}

impl Script {
    /// Plays `results` (bytes, or a negative error number) and returns what was done, then the status.
    fn play(mut self, results: &[i64]) -> Vec<String> {
        let mut story = Vec::new();
        let mut op = self.flight.first(&self.ground);
        for result in results {
            story.push(brief(&op));
            let result = u32::try_from(*result).map_err(|_| io::Error::from_raw_os_error(-*result as i32));
            match self.flight.after(Done { token: 0, op, result }, &self.ground) {
                Next::Start(next) => op = next,
                Next::Answer(status, error) => {
                    story.push(format!("{status:?}{}", if error.is_some() { " reported" } else { "" }));
                    return story;
                }
            }
        }
        story.push(brief(&op) + " ...");
        story
    }
}

const NOTSUP: i64 = -(libc::EOPNOTSUPP as i64);

#[test]
fn a_short_transfer_is_continued_at_a_block() {
    let story = script(Verb::Read, 0, 4096, ground(512)).play(&[1536 + 100, 2560]);
    assert_eq!(story, ["read 0+4096", "read 1536+2560", "Ok"]);
    let story = script(Verb::Write, 512, 4096, ground(1)).play(&[1, 4095]);
    assert_eq!(story, ["write 512+4096", "write 513+4095", "Ok"]);
    let story = script(Verb::Read, 0, 4096, ground(512)).play(&[1024, 0]);
    assert_eq!(story, ["read 0+4096", "read 1024+3072", "IoError reported"]);
    let story = script(Verb::Read, 0, 4096, ground(512)).play(&[511]);
    assert_eq!(story, ["read 0+4096", "IoError reported"]);
}

#[test]
fn an_interrupted_operation_is_begun_again_but_not_for_ever() {
    for errno in [libc::EINTR, libc::EAGAIN, libc::ECANCELED] {
        let errno = -i64::from(errno);
        let story = script(Verb::Flush, 0, 0, ground(512)).play(&[errno, errno, 0]);
        assert_eq!(story, ["flush", "flush", "flush", "Ok"]);
        let story = script(Verb::Flush, 0, 0, ground(512)).play(&vec![errno; 200]);
        assert_eq!((story.len(), story.last().unwrap().as_str()), (102, "IoError reported"));
    }
}

#[test]
fn errors_of_the_host_are_io_errors_and_reported() {
    for errno in [libc::EIO, libc::ENOSPC, libc::EDQUOT, libc::EBADF] {
        for (verb, first) in [(Verb::Read, "read 0+512"), (Verb::Write, "write 0+512"), (Verb::Discard, "punch 0+512")]
        {
            assert_eq!(script(verb, 0, 512, ground(512)).play(&[-i64::from(errno)]), [first, "IoError reported"]);
        }
    }
}

#[test]
fn zeroing_finds_another_way_where_fallocate_cannot() {
    let story = script(Verb::Zero { unmap: true }, 512, 1024, ground(512)).play(&[NOTSUP, NOTSUP, 1024]);
    assert_eq!(story, ["punch 512+1024", "zero 512+1024", "write 512+1024", "Ok"]);
    let story = script(Verb::Zero { unmap: false }, 512, 1024, ground(4096)).play(&[NOTSUP, 4096, 4096]);
    assert_eq!(story, ["zero 512+1024", "read 0+4096", "write 0+4096", "Ok"]);
}

#[test]
fn a_discard_the_host_cannot_do_is_unsupported() {
    assert_eq!(script(Verb::Discard, 0, 512, ground(512)).play(&[NOTSUP]), ["punch 0+512", "Unsupported"]);
    let device = Ground { block_device: true, ..ground(512) };
    assert_eq!(script(Verb::Discard, 0, 512, device).play(&[NOTSUP]), ["discard 0+512", "Unsupported"]);
}

#[test]
fn a_discard_of_parts_of_a_devices_block_keeps_them() {
    let story = |block_device| {
        let ground = Ground { block_device, ..ground(512) };
        script(Verb::Discard, 0, 512, ground).play(&[-i64::from(libc::EINVAL)])
    };
    assert_eq!(story(true), ["discard 0+512", "Ok"]);
    assert_eq!(story(false), ["punch 0+512", "IoError reported"]);
}

#[test]
fn without_a_flush_every_change_is_made_durable() {
    let through = || Ground { through: true, ..ground(512) };
    assert_eq!(script(Verb::Write, 0, 512, through()).play(&[512]), ["write 0+512!", "Ok"]);
    assert_eq!(script(Verb::Zero { unmap: false }, 0, 512, through()).play(&[0, 0]), ["zero 0+512", "flush", "Ok"]);
    let story = script(Verb::Zero { unmap: false }, 0, 512, through()).play(&[0, -i64::from(libc::EIO)]);
    assert_eq!(story, ["zero 0+512", "flush", "IoError reported"]);
}

#[test]
fn a_part_of_a_block_is_read_before_it_is_written() {
    let story = script(Verb::Write, 512, 4096, ground(4096)).play(&[4096, 4096, 8192]);
    assert_eq!(story, ["read 0+8192", "read 4096+4096", "write 0+8192", "Ok"]);
    let story = script(Verb::Read, 512, 512, ground(4096)).play(&[4096]);
    assert_eq!(story, ["read 0+4096", "Ok"]);
}

#[test]
fn a_bounced_request_goes_in_chunks() {
    let mut long = script(Verb::Write, 0, 600 << 10, ground(512));
    long.flight = {
        let data = SmallVec::from_slice(&[Segment { address: GuestAddress(1), length: 600 << 10 }]);
        let request =
            Request { verb: Ok(Verb::Write), offset: 0, length: 600 << 10, data, status: GuestAddress(0), room: 0 };
        Flight::new(0, Verb::Write, request, &long.ground)
    };
    let story = long.play(&[262144, 262144, 90112]);
    assert_eq!(story, ["write 0+262144", "write 262144+262144", "write 524288+90112", "Ok"]);
}

#[test]
fn an_error_in_the_midst_of_a_read_leaves_its_pages_dirty() {
    let script = script(Verb::Read, 0, 8192, ground(512));
    let ram = Arc::clone(&script.ground.ram);
    let bitmap = |page: usize| ram.iter().next().unwrap().bitmap().dirty_at(page * 4096);
    assert!(!bitmap(0) && !bitmap(1));
    script.play(&[-i64::from(libc::EIO)]);
    assert!(bitmap(0) && bitmap(1) && !bitmap(2));
}
