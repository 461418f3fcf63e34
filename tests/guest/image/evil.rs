//! Descriptor chains that no driver may submit, and the proof that the disk works again after a reset.

use crate::blk::{Disk, data_address, header_address, status_address};
use crate::time::wait_until;
use crate::virtio::{NEEDS_RESET, NEXT, QUEUE_SIZE, WRITE};
use crate::{fail, line};

const KINDS: [&str; 7] = ["loop", "outside", "overflow", "order", "next", "head", "index"];

/// Submits the chain `kind` (or each, for `all`) to disk `disk`.
pub fn run(disk: u32, kind: &str) {
    let mut known = false;
    for name in KINDS.into_iter().filter(|&name| kind == "all" || kind == name) {
        known = true;
        submit(disk, name);
        Disk::start(disk, false).exercise(8);
        line!("recovered after evil-ring={name}");
    }
    if !known {
        fail!("evil-ring={kind}: not one of {KINDS:?} or all");
    }
}

fn submit(index: u32, kind: &str) {
    let mut disk = Disk::start(index, false);
    let (header, data, status) = (header_address() as u64, data_address() as u64, status_address() as u64);
    let queue = &mut disk.queue;
    queue.describe(0, header, 16, NEXT, 1);
    queue.describe(1, data, 512, NEXT | WRITE, 2);
    queue.describe(2, status, 1, WRITE, 0);
    let head = if kind == "head" { QUEUE_SIZE } else { 0 };
    match kind {
        "loop" => queue.describe(1, data, 512, NEXT, 0),
        "outside" => queue.describe(1, 0xff_ffff_f000, 4096, NEXT | WRITE, 2),
        "overflow" => queue.describe(1, u64::MAX - 0xff, u32::MAX, NEXT | WRITE, 2),
        "order" => {
            queue.describe(0, status, 1, NEXT | WRITE, 1);
            queue.describe(1, data, 512, NEXT | WRITE, 2);
            queue.describe(2, header, 16, 0, 0);
        }
        "next" => queue.describe(1, data, 512, NEXT | WRITE, 0xffff),
        _ => {}
    }
    if kind == "index" {
        queue.set_available(0x8000);
    } else {
        queue.offer(head);
    }
    queue.notify();
    wait_until(500_000, || disk.device.status() & NEEDS_RESET != 0 || disk.queue.has_used());
    let status = disk.device.status();
    line!("evil-ring={kind} status={status:#x} used={}", u8::from(disk.queue.has_used()));
}
