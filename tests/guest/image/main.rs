//! The test guest: what it does is on its command line. Knows no operating system.
#![no_std]
#![no_main]

mod blk;
mod boot;
mod console;
mod cpus;
mod evil;
mod fuzz;
mod mem;
mod memory;
mod net;
mod options;
mod pci;
mod port;
mod power;
mod random;
mod time;
mod virtio;

use core::sync::atomic::{AtomicBool, Ordering};
use options::Options;
use port::read;

/// Ring 3's entry on every vCPU. `info` is the address of `struct hvm_start_info`, for vCPU 0 only.
extern "C" fn start(cpu: u32, info: u32) -> ! {
    if cpu != 0 {
        cpus::run(cpu);
    }
    boot::init_vectors();
    console::init();
    let clock = time::init();
    let info = info as usize;
    if read::<u32>(info) != 0x336e_c578 {
        fail!("start info at {info:#x} has no magic number");
    }
    let ram = memory::Ram::from_start_info(info);
    line!("terna-guest ready ram_kib={} clock={clock} us={}", ram.bytes() >> 10, time::now_us());
    let Some(text) = boot::command_line(info) else { fail!("the command line is not UTF-8") };
    let options = Options::parse(text);
    run(&options, &ram)
}

fn run(options: &Options, ram: &memory::Ram) -> ! {
    if options.fault {
        let nowhere = 0x80_0000_0000_usize;
        line!("{}", read::<u8>(nowhere));
    }
    if options.cpus > 1 {
        cpus::start(options.cpus);
    }
    if options.disk_sectors > 0 {
        blk::check(options.disk_index, options.disk_sectors, options.irq);
    }
    if !options.evil_ring.is_empty() {
        evil::run(options.disk_index, options.evil_ring);
    }
    if let Some((seed, count)) = options.fuzz {
        fuzz::run(seed, count);
        if options.disk_sectors > 0 {
            blk::check(options.disk_index, options.disk_sectors, options.irq);
        }
    }
    let mut net = options.net_address.map(net::Net::start);
    let worker = memory::begin(options, ram);
    if options.off {
        power::off();
    }
    if options.halt {
        line!("halted");
        power::halt_for_good(options.button);
    }
    serve(options, worker, net.as_mut())
}

/// Dirties memory, prints ticks, answers the network and the serial port, for ever.
fn serve(options: &Options, mut worker: Option<memory::Worker>, mut net: Option<&mut net::Net>) -> ! {
    let busy = worker.is_some() || net.is_some();
    let began = time::now_us();
    let (mut ticks, mut next_poll) = (0, began);
    let mut verify_at = if options.verify_s > 0 { began + options.verify_s * 1_000_000 } else { u64::MAX };
    loop {
        if let Some(worker) = &mut worker {
            worker.step();
        }
        if let Some(net) = &mut net {
            net.poll();
        }
        let now = time::now_us();
        if options.tick_ms > 0 && now >= began + (ticks + 1) * options.tick_ms * 1000 {
            ticks += 1;
            match options.tally {
                true => line!("tick {ticks} {}us {}", now - began, memory::writes()),
                false => line!("tick {ticks} {}us", now - began),
            }
        }
        if now >= verify_at {
            verify_at = u64::MAX;
            memory::verify();
        }
        if now >= next_poll {
            next_poll = now + 2_000;
            if options.button && power::button_pressed() {
                line!("power button");
                power::off();
            }
            if let Some(byte) = console::input() {
                command(byte, net.as_deref());
            }
        }
        if !busy {
            time::sleep(if options.tick_ms > 0 { options.tick_ms.min(2) * 1000 } else { 10_000 });
        }
    }
}

fn command(byte: u8, net: Option<&net::Net>) {
    match byte {
        b'v' => memory::verify(),
        b's' => {
            memory::status();
            if let Some(net) = net {
                net.status();
            }
        }
        b'q' => power::off(),
        b'r' => power::reset(),
        b'p' => power::panicked(),
        b't' => power::fault(),
        b'h' => boot::halt(),
        _ => {}
    }
}

/// Where `boot` sends exceptions.
extern "C" fn on_exception(vector: u64, error: u64, rip: u64, cr2: u64) -> ! {
    static SEEN: AtomicBool = AtomicBool::new(false);
    if SEEN.swap(true, Ordering::Relaxed) {
        boot::halt();
    }
    line!("EXCEPTION vector={vector} error={error:#x} rip={rip:#x} cr2={cr2:#x}");
    power::panicked()
}

#[panic_handler]
fn on_panic(info: &core::panic::PanicInfo) -> ! {
    static SEEN: AtomicBool = AtomicBool::new(false);
    if SEEN.swap(true, Ordering::Relaxed) {
        boot::halt();
    }
    fail!("{info}")
}
