//! Loading as the machine does it: good kernels end up where the boot protocol wants them, bad ones in a sentence.

use super::fields::{u16_at, u32_at, u64_at};
use super::sample::{self, ELF_LOAD_PHDR, ELF_START, PAYLOAD_BYTES, SETUP_BYTES, file, put};
use super::*;
use std::fs::File;
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

type Ram = GuestMemoryMmap<AtomicBitmap>;

const RSDP: GuestAddress = GuestAddress(layout::ACPI_TABLES);

fn ram(mib: u64) -> Ram {
    Ram::from_ranges(&ram_ranges(mib << 20)).unwrap()
}

fn boot(ram: &Ram, kernel: &[u8], initrd: Option<&[u8]>, cmdline: &str) -> Result<Entry, BootError> {
    let mut initrd = initrd.map(file);
    load_kernel(ram, BootSource { kernel: &mut file(kernel), initrd: initrd.as_mut(), cmdline }, RSDP)
}

fn refusal(kernel: &[u8]) -> String {
    boot(&ram(64), kernel, None, "").unwrap_err().to_string()
}

fn read(ram: &Ram, address: u64, bytes: usize) -> Vec<u8> {
    let mut buffer = vec![0; bytes];
    ram.read_slice(&mut buffer, GuestAddress(address)).unwrap();
    buffer
}

fn spoilt(mut image: Vec<u8>, offset: usize, bytes: &[u8]) -> Vec<u8> {
    put(&mut image, offset, bytes);
    image
}

fn written_pages(ram: &Ram) -> usize {
    ram.iter()
        .map(|region| (0..region.len()).step_by(4096).filter(|at| region.bitmap().dirty_at(*at as usize)).count())
        .sum()
}

#[test]
fn bzimage_gets_its_zero_page() {
    let ram = ram(64);
    let entry = boot(&ram, &sample::bzimage(), Some(&[0xAB; 5000]), "console=ttyS0 quiet").unwrap();
    assert_eq!(entry, Entry { protocol: Protocol::Linux64, rip: 0x10_0200 });
    assert_eq!(read(&ram, 0x10_0000, PAYLOAD_BYTES), sample::bzimage()[SETUP_BYTES..]);
    assert_eq!(read(&ram, layout::CMDLINE, 20), b"console=ttyS0 quiet\0");

    let zero_page = read(&ram, layout::ZERO_PAGE, 4096);
    assert_eq!(u64_at(&zero_page, 0x70), 0xE_0000, "acpi_rsdp_addr");
    assert_eq!(u16_at(&zero_page, 0x1fe), 0xAA55);
    assert_eq!(&zero_page[0x202..0x206], b"HdrS");
    assert_eq!(zero_page[0x210], 0xff, "type_of_loader");
    assert_eq!(u32_at(&zero_page, 0x228), 0x2_0000, "cmd_line_ptr");
    let (start, size) = (u32_at(&zero_page, 0x218), u32_at(&zero_page, 0x21c));
    assert_eq!((start, size), ((64 << 20) - 8192, 5000), "ramdisk");
    assert_eq!(read(&ram, start.into(), 5000), [0xAB; 5000]);

    assert_eq!(zero_page[0x1e8], 4, "e820_entries");
    let e820 = |i: usize| {
        (u64_at(&zero_page, 0x2d0 + 20 * i), u64_at(&zero_page, 0x2d8 + 20 * i), u32_at(&zero_page, 0x2e0 + 20 * i))
    };
    assert_eq!(e820(0), (0, 0xA_0000, 1));
    assert_eq!(e820(1), (0xE_0000, 0x2_0000, 2));
    assert_eq!(e820(2), (0x10_0000, 63 << 20, 1));
    assert_eq!(e820(3), (0xE800_0000, 0x10_0000, 2));
}

#[test]
fn bytes_after_the_setup_header_do_not_reach_the_zero_page() {
    // An older header ends before kernel_info_offset, and code follows.
    let image = spoilt(spoilt(sample::bzimage(), 0x200, &[0xeb, 0x66]), 0x268, &[0xcc; 4]);
    let ram = ram(64);
    boot(&ram, &image, None, "").unwrap();
    assert_eq!(u32_at(&read(&ram, layout::ZERO_PAGE, 4096), 0x268), 0);
}

#[test]
fn elf_with_a_note_is_entered_by_pvh() {
    let entry_address = ELF_START as u32 + 0x40;
    // The note may be behind others, in its segment or in a segment of its own.
    let others = [sample::note(b"GNU\0", 1, &[0; 20]), sample::note(b"Xen\0", 6, b"linux\0")].concat();
    let behind = [others.clone(), sample::pvh_note(entry_address)].concat();
    for notes in [
        vec![behind],
        vec![others.clone(), sample::pvh_note(entry_address)],
        vec![sample::pvh_note(entry_address), others],
    ] {
        let ram = ram(64);
        let entry = boot(&ram, &sample::elf(&notes), Some(&[7; 4096]), "panic=1").unwrap();
        assert_eq!(entry, Entry { protocol: Protocol::Pvh, rip: entry_address.into() });

        let info = read(&ram, layout::PVH_START_INFO, 56);
        assert_eq!((u32_at(&info, 0), u32_at(&info, 4), u32_at(&info, 12)), (0x336e_c578, 1, 1));
        assert_eq!((u64_at(&info, 24), u64_at(&info, 32)), (layout::CMDLINE, 0xE_0000));
        let module = read(&ram, u64_at(&info, 16), 32);
        assert_eq!((u64_at(&module, 0), u64_at(&module, 8)), ((64 << 20) - 4096, 4096));
        let map = read(&ram, u64_at(&info, 40), 24 * u32_at(&info, 48) as usize);
        assert_eq!((u64_at(&map, 48), u64_at(&map, 56), u32_at(&map, 64)), (0x10_0000, 63 << 20, 1));
        assert_eq!(read(&ram, layout::CMDLINE, 8), b"panic=1\0");
    }
}

#[test]
fn elf_without_a_note_is_entered_by_the_64_bit_protocol() {
    for notes in [vec![], vec![sample::note(b"GNU\0", 18, &[0; 4])], vec![sample::note(b"Xen\0", 6, b"linux\0")]] {
        let ram = ram(64);
        let entry = boot(&ram, &sample::elf(&notes), None, "").unwrap();
        assert_eq!(entry, Entry { protocol: Protocol::Linux64, rip: ELF_START + 0x10 });
        assert_eq!(&read(&ram, layout::ZERO_PAGE + 0x202, 4), b"HdrS");
        assert_eq!(read(&ram, ELF_START, 4096), sample::elf(&[])[0x1000..0x2000]);
    }
}

#[test]
fn few_pages_are_written_besides_the_kernel() {
    let pvh = ram(256);
    boot(&pvh, &sample::elf(&[sample::pvh_note(ELF_START as u32)]), None, "quiet").unwrap();
    // GDT, start info, command line, reset vector; one page of kernel.
    assert_eq!(written_pages(&pvh), 5);
    let linux = ram(256);
    boot(&linux, &sample::bzimage(), None, "quiet").unwrap();
    // GDT, zero page, three page tables, command line, reset vector; two pages of kernel.
    assert_eq!(written_pages(&linux), 9);
    assert_eq!(read(&linux, 0xF_FFF0, 9), [0xba, 0, 6, 0xb0, 1, 0xee, 0xf4, 0xeb, 0xfd]);
}

#[test]
fn files_that_are_no_kernel_are_refused() {
    assert_eq!(refusal(b""), "the kernel file is empty");
    assert_eq!(refusal(b"just text\n"), "the kernel is a text file, not a bzImage or an ELF vmlinux");
    let directory = tempfile::tempdir().unwrap();
    let mut kernel = File::open(directory.path()).unwrap();
    let source = BootSource { kernel: &mut kernel, initrd: None, cmdline: "" };
    assert_eq!(load_kernel(&ram(64), source, RSDP).unwrap_err().to_string(), "the kernel is not a regular file");
}

#[test]
fn truncated_kernels_say_how_much_is_missing() {
    let whole = SETUP_BYTES + PAYLOAD_BYTES;
    let truncated = |needed: usize, has: usize| {
        format!("the kernel is truncated: its headers describe {needed} bytes, the file has {has}")
    };
    for has in [0x26c, SETUP_BYTES, whole - 1] {
        assert_eq!(refusal(&sample::bzimage()[..has]), truncated(whole, has));
    }
    assert_eq!(refusal(&sample::bzimage()[..0x210]), truncated(0x26c, 0x210));
    let elf = sample::elf(&[sample::pvh_note(ELF_START as u32)]);
    assert_eq!(refusal(&elf[..elf.len() - 1]), truncated(elf.len(), elf.len() - 1));
    assert_eq!(refusal(&elf[..100]), truncated(64 + 2 * 56, 100));
}

#[test]
fn every_length_of_a_kernel_is_answered() {
    let ram = ram(64);
    for image in [sample::bzimage(), sample::elf(&[sample::pvh_note(ELF_START as u32)])] {
        for length in (0..image.len()).step_by(7) {
            assert!(boot(&ram, &image[..length], None, "").is_err(), "{length} of {} bytes", image.len());
        }
    }
}

#[test]
fn bzimages_that_cannot_be_entered_are_refused() {
    let old = "the kernel speaks boot protocol 2.06; 2.12 (Linux 3.8) or later is needed";
    assert_eq!(refusal(&spoilt(sample::bzimage(), 0x206, &[6, 2])), old);
    let narrow = "the kernel is built for 32-bit x86; this machine is x86-64";
    assert_eq!(refusal(&spoilt(sample::bzimage(), 0x236, &[0])), narrow);
    let wrong = |what| format!("the kernel's headers are wrong: {what}");
    let zimage = "it is a zImage, to be loaded below 1 MiB";
    assert_eq!(refusal(&spoilt(sample::bzimage(), 0x211, &[0])), wrong(zimage));
    let alignment = "kernel_alignment is not a power of two";
    assert_eq!(refusal(&spoilt(sample::bzimage(), 0x230, &[1, 0, 0x20])), wrong(alignment));
    let entry = "syssize leaves no 64-bit entry point";
    assert_eq!(refusal(&spoilt(sample::bzimage(), 0x1f4, &[0x20, 0])), wrong(entry));
}

#[test]
fn kernels_larger_than_ram_are_refused() {
    let error = boot(&ram(31), &sample::bzimage(), None, "").unwrap_err().to_string();
    let message = "the kernel needs RAM up to 0x2000000, but RAM ends at 0x1f00000: give the machine more memory";
    assert_eq!(error, message);
    let huge = spoilt(sample::bzimage(), 0x258, &[0xff; 8]);
    assert!(refusal(&huge).starts_with("the kernel needs RAM up to 0xffffffffffffffff"));
    let error = boot(&ram(2), &sample::elf(&[]), None, "").unwrap_err().to_string();
    assert!(error.starts_with("the kernel needs RAM up to 0x203000, but RAM ends at 0x200000"), "{error}");
    let tiny = Ram::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
    for kernel in [sample::bzimage(), sample::elf(&[])] {
        assert!(matches!(boot(&tiny, &kernel, None, ""), Err(BootError::KernelTooLarge { ram_end: 4096, .. })));
    }
}

#[test]
fn elf_headers_that_lie_are_refused() {
    let wrong = |what| format!("the kernel's headers are wrong: {what}");
    let field = |offset, value: u64| spoilt(sample::elf(&[]), offset, &value.to_le_bytes());
    assert_eq!(refusal(&spoilt(sample::elf(&[]), 16, &[1, 0])), wrong("not an executable ELF file"));
    assert_eq!(refusal(&spoilt(sample::elf(&[]), 54, &[55])), wrong("no usable program headers"));
    assert_eq!(refusal(&spoilt(sample::elf(&[]), 56, &[0, 2])), wrong("no usable program headers"));
    assert!(refusal(&field(32, u64::MAX)).contains("is truncated"), "e_phoff");
    assert!(refusal(&field(ELF_LOAD_PHDR + 8, u64::MAX)).contains("is truncated"), "p_offset");
    let larger = "a segment is larger in the file than in memory";
    assert_eq!(refusal(&field(ELF_LOAD_PHDR + 40, 4095)), wrong(larger));
    let low = "the kernel has a segment at 0x9000, below 1 MiB, where the boot structures are";
    assert_eq!(refusal(&field(ELF_LOAD_PHDR + 24, 0x9000)), low);
    assert!(refusal(&field(ELF_LOAD_PHDR + 24, u64::MAX - 4096)).contains("needs RAM up to 0xffffffffffffffff"));
    let outside = "the entry point lies outside every segment";
    assert_eq!(refusal(&field(24, 0x10)), wrong(outside));
    assert_eq!(refusal(&sample::elf(&[sample::pvh_note(0x10)])), wrong(outside));
    let short = sample::note(b"Xen\0", 18, &[0; 2]);
    assert_eq!(refusal(&sample::elf(&[short])), wrong("its PVH note holds no address"));
    assert_eq!(refusal(&spoilt(sample::elf(&[]), ELF_LOAD_PHDR, &[6])), wrong("no segment to load"));
}

#[test]
fn command_lines_are_measured_against_the_kernel() {
    for kernel in [sample::bzimage(), sample::elf(&[])] {
        boot(&ram(64), &kernel, None, &"x".repeat(2047)).unwrap();
        let error = boot(&ram(64), &kernel, None, &"x".repeat(2048)).unwrap_err().to_string();
        assert_eq!(error, "the kernel command line is 2048 bytes long; this kernel takes 2047");
    }
    let greedy = spoilt(sample::bzimage(), 0x238, &[0xff; 4]);
    boot(&ram(64), &greedy, None, &"x".repeat(4095)).unwrap();
    let error = boot(&ram(64), &greedy, None, &"x".repeat(4096)).unwrap_err().to_string();
    assert_eq!(error, "the kernel command line is 4096 bytes long; this kernel takes 4095");
    let error = boot(&ram(64), &sample::bzimage(), None, "a\0b").unwrap_err().to_string();
    assert_eq!(error, "the kernel command line contains a NUL byte");
}

#[test]
fn initrds_stay_between_the_kernel_and_its_limit() {
    let refusal = |mib, kernel: &[u8], bytes: usize| {
        boot(&ram(mib), kernel, Some(&vec![1; bytes]), "").map_err(|error| error.to_string())
    };
    // The kernel works up to 32 MiB.
    refusal(33, &sample::bzimage(), 1 << 20).unwrap();
    let message = "the initrd is 1048577 bytes long, but only 1048576 bytes of RAM are left for it beside the kernel";
    assert_eq!(refusal(33, &sample::bzimage(), (1 << 20) + 1).unwrap_err(), message);
    let limited = spoilt(sample::bzimage(), 0x22c, &0x020f_ffffu32.to_le_bytes());
    let message = "the initrd is 1048577 bytes long, but only 1048576 bytes of RAM are left for it beside the kernel";
    assert_eq!(refusal(64, &limited, (1 << 20) + 1).unwrap_err(), message);
    let none = spoilt(sample::bzimage(), 0x22c, &[0; 4]);
    assert!(refusal(64, &none, 1).unwrap_err().contains("only 0 bytes of RAM are left"));
    assert_eq!(refusal(64, &sample::bzimage(), 0).unwrap_err(), "the initrd is empty");
}

#[test]
fn an_initrd_that_is_a_directory_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let mut initrd = File::open(directory.path()).unwrap();
    let source = BootSource { kernel: &mut file(&sample::bzimage()), initrd: Some(&mut initrd), cmdline: "" };
    assert_eq!(load_kernel(&ram(64), source, RSDP).unwrap_err().to_string(), "the initrd is not a regular file");
}

proptest::proptest! {
    /// Whatever the headers say: an error, or an entry point inside RAM with the boot structures in place.
    #[test]
    fn hostile_headers_are_answered(
        elf in proptest::bool::ANY,
        changes in proptest::collection::vec((0usize..0x300, proptest::num::u8::ANY), 1..12),
    ) {
        let mut image = if elf { sample::elf(&[sample::pvh_note(ELF_START as u32)]) } else { sample::bzimage() };
        for (offset, value) in changes {
            image[if elf { offset % 176 } else { offset }] = value;
        }
        let ram = ram(40);
        if let Ok(entry) = boot(&ram, &image, Some(&[1; 100]), "quiet") {
            proptest::prop_assert!((layout::KERNEL_START..40 << 20).contains(&entry.rip));
            proptest::prop_assert_eq!(read(&ram, layout::CMDLINE, 6), b"quiet\0");
        }
    }
}
