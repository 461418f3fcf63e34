//! From the first instruction to ring 3, the way back in for exceptions and interrupts, and the gate to ring 0.
//!
//! Everything but this file runs in ring 3 on an identity map, with every port open through the TSS's bitmap: hosts
//! that emulate ring 0 instruction by instruction run ring 3 natively. Ring 0 is a handful of instructions that every
//! KVM can emulate (no SSE, no far return, no `int n`). The gate is a known `ud2`, because its exception arrives
//! on every ground, which `syscall` and software interrupts do not.

use crate::port::read;
use core::arch::{asm, global_asm};
use core::ffi::{CStr, c_char};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Most vCPUs the image has stacks for.
pub const MAX_CPUS: usize = 32;
/// Where the application processors' 16-bit start-up code is copied; a page number is the SIPI vector.
pub const TRAMPOLINE: usize = 0x7_0000;

global_asm!(
    // --- entry: 32-bit protected mode, paging off, EBX = start info (Xen's PVH boot ABI)
    ".pushsection .note.pvh, \"a\", @note",
    ".balign 4",
    ".long 4, 8, 18",
    ".asciz \"Xen\"",
    ".quad pvh_entry",
    ".popsection",
    ".pushsection .boot, \"ax\", @progbits",
    ".code32",
    ".global pvh_entry",
    "pvh_entry:",
    "mov al, 0x5a", // the mark of the first instruction: debug port, then the serial port
    "out 0x80, al",
    "mov edx, 0x3f8",
    "mov al, 0x53",
    "out dx, al",
    "xor ebp, ebp", // this vCPU's index
    "common32:",
    "lgdt [{gdtr}]",
    "mov eax, 0x620", // PAE, OSFXSR, OSXMMEXCPT
    "mov cr4, eax",
    "mov eax, offset {pml4}",
    "mov cr3, eax",
    "mov ecx, 0xc0000080", // EFER: long mode
    "rdmsr",
    "or eax, 0x100",
    "wrmsr",
    "mov eax, cr0",
    "or eax, 0x80000022", // PG, NE, MP
    "and eax, 0x9ffffff3", // not EM, TS, NW, CD
    "mov cr0, eax",
    ".byte 0xea", // jmp far 0x08:long_mode
    ".long long_mode",
    ".word 0x08",
    ".code64",
    "long_mode:",
    "mov eax, 0x10",
    "mov ss, eax",
    "mov ds, eax",
    "mov es, eax",
    // own task state segment: stack for ring 0, I/O bitmap all clear
    "imul rax, rbp, {tss_size}",
    "add rax, offset {tss}",
    "imul rcx, rbp, 4096",
    "add rcx, offset {ring0_stacks} + 4096",
    "mov [rax + 4], rcx",
    "mov rsp, rcx",
    "mov word ptr [rax + 102], 104",
    "mov rdx, rbp",
    "shl rdx, 4",
    "add rdx, offset {gdt} + 0x40",
    "mov word ptr [rdx], {tss_size} - 1",
    "mov [rdx + 2], ax",
    "mov rcx, rax",
    "shr rcx, 16",
    "mov [rdx + 4], cl",
    "mov byte ptr [rdx + 5], 0x89",
    "mov [rdx + 7], ch",
    "mov rax, rbp",
    "shl rax, 4",
    "add rax, 0x40",
    "ltr ax",
    "lidt [{idtr}]",
    // ring 3: start(cpu, start_info)
    "imul rax, rbp, {ring3_size}",
    "add rax, offset {ring3_stacks} + {ring3_size} - 8",
    "push 0x33",
    "push rax",
    "push 0x3002", // IOPL 3, interrupts off
    "push 0x2b",
    "push offset {start}",
    "mov edi, ebp",
    "mov esi, ebx",
    "iretq",
    // --- application processors: real mode at TRAMPOLINE, then the same way
    ".code16",
    ".global trampoline, trampoline_end",
    "trampoline:",
    "cli",
    "mov ax, cs",
    "mov ds, ax",
    ".byte 0x66, 0x0f, 0x01, 0x16", // lgdt [trampoline_gdtr], 32-bit operand
    ".word trampoline_gdtr - trampoline",
    "mov eax, cr0",
    "or al, 1",
    "mov cr0, eax",
    ".byte 0x66, 0xea", // jmp far 0x38:ap32, 32-bit offset
    ".long ap32",
    ".word 0x38",
    "trampoline_gdtr:",
    ".word 0x3f",
    ".long {gdt}",
    "trampoline_end:",
    ".code32",
    "ap32:",
    "mov eax, 0x10",
    "mov ss, eax",
    "mov ds, eax",
    "mov es, eax",
    "mov ebp, 1",
    "lock xadd [{cpu_count}], ebp",
    "cmp ebp, {max_cpus}",
    "jb common32",
    "2: hlt", // more vCPUs than stacks: the count tells
    "jmp 2b",
    ".code64",
    // --- one stub a vector: every frame gets an error code and its vector
    ".balign 4096",
    ".global vectors",
    "vectors:",
    ".set vector, 0",
    ".rept 256",
    ".balign 16",
    ".if (vector == 8) | ((vector >= 10) & (vector <= 14)) | (vector == 17) | (vector == 21)",
    ".else",
    "push 0",
    ".endif",
    ".byte 0x68", // push imm32
    ".long vector",
    "jmp vector_common",
    ".set vector, vector + 1",
    ".endr",
    "vector_common:",
    "cmp qword ptr [rsp], 32",
    "jae 5f",
    "cmp qword ptr [rsp], 2", // NMI: the tests may raise one, nothing to do
    "je 6f",
    "cmp qword ptr [rsp], 6",
    "jne 3f",
    "cmp qword ptr [rsp + 16], offset gate_instruction",
    "je 7f",
    "3:", // an exception is a bug of guest or VMM: report it from ring 3, on the interrupted stack
    "pop rdi",
    "pop rsi",
    "mov rdx, [rsp]",
    "mov rcx, cr2",
    "mov qword ptr [rsp], offset {on_exception}",
    "mov qword ptr [rsp + 8], 0x2b",
    "mov qword ptr [rsp + 16], 0x3002",
    "and qword ptr [rsp + 24], -16",
    "sub qword ptr [rsp + 24], 264",
    "mov qword ptr [rsp + 32], 0x33",
    "iretq",
    "5:", // an interrupt: count it, acknowledge it
    "push rax",
    "mov eax, [rsp + 8]",
    "lock inc qword ptr [{interrupts} + rax * 8]",
    "mov eax, 0xfee000b0",
    "mov dword ptr [rax], 0",
    "pop rax",
    "6: add rsp, 16",
    "iretq",
    "7:", // the gate
    "add rsp, 16",
    "add qword ptr [rsp], 2",
    "cmp eax, {gate_wait}",
    "je 8f",
    "cmp eax, {gate_wrmsr}",
    "je 9f",
    "cmp eax, {gate_no_idt}",
    "je 10f",
    "4: cli", // GATE_HALT
    "hlt",
    "jmp 4b",
    "8: sti",
    "hlt",
    "cli",
    "iretq",
    "9: mov eax, edi",
    "mov rdx, rdi",
    "shr rdx, 32",
    "wrmsr",
    "iretq",
    "10: lidt [{no_idt}]",
    "iretq",
    ".global gate_instruction",
    "gate_instruction:", // called from ring 3
    "ud2",
    "ret",
    ".popsection",
    gdtr = sym GDTR, gdt = sym GDT, idtr = sym IDTR, no_idt = sym NO_IDT, pml4 = sym PML4, tss = sym TSS,
    tss_size = const size_of::<Tss>(), ring0_stacks = sym RING0_STACKS, ring3_stacks = sym RING3_STACKS,
    ring3_size = const RING3_STACK, start = sym crate::start, cpu_count = sym CPU_COUNT, max_cpus = const MAX_CPUS,
    on_exception = sym crate::on_exception, interrupts = sym INTERRUPTS, gate_wait = const GATE_WAIT,
    gate_wrmsr = const GATE_WRMSR, gate_no_idt = const GATE_NO_IDT,
);

const GATE_HALT: u32 = 0;
const GATE_WAIT: u32 = 1;
const GATE_WRMSR: u32 = 2;
const GATE_NO_IDT: u32 = 3;
const RING3_STACK: usize = 32 << 10;

/// Interrupts taken, by vector.
pub static INTERRUPTS: [AtomicU64; 256] = [const { AtomicU64::new(0) }; 256];
/// vCPUs that have started; also hands out their indices.
pub static CPU_COUNT: AtomicU32 = AtomicU32::new(1);

#[repr(C, align(4096))]
pub struct Page<T>(pub T);

/// Task state segment with an I/O bitmap for all ports and the byte after it that processors read (SDM 1, 19.5.2).
#[repr(C, align(16))]
struct Tss([u8; 104 + 8192 + 8]);
static mut TSS: [Tss; MAX_CPUS] = [const { Tss([0; 104 + 8192 + 8]) }; MAX_CPUS];
static mut RING0_STACKS: Page<[[u8; 4096]; MAX_CPUS]> = Page([[0; 4096]; MAX_CPUS]);
static mut RING3_STACKS: Page<[[u8; RING3_STACK]; MAX_CPUS]> = Page([[0; RING3_STACK]; MAX_CPUS]);

/// Selectors: 08 code, 10 data; 2b and 33 ring 3's; 38 32-bit code for the trampoline; from 40 one TSS a vCPU.
static mut GDT: [u64; 8 + 2 * MAX_CPUS] = {
    let mut gdt = [0; 8 + 2 * MAX_CPUS];
    gdt[1] = 0x00af_9b00_0000_ffff;
    gdt[2] = 0x00cf_9300_0000_ffff;
    gdt[5] = 0x00af_fb00_0000_ffff;
    gdt[6] = 0x00cf_f300_0000_ffff;
    gdt[7] = 0x00cf_9b00_0000_ffff;
    gdt
};

/// A pointer for `lgdt` and `lidt`.
#[repr(C, packed)]
struct TablePointer(u16, *const u64);
// SAFETY: read by the processor only.
unsafe impl Sync for TablePointer {}
static GDTR: TablePointer = TablePointer(8 * (8 + 2 * MAX_CPUS as u16) - 1, &raw const GDT as *const u64);
static IDTR: TablePointer = TablePointer(4095, &raw const IDT as *const u64);
static NO_IDT: TablePointer = TablePointer(0, core::ptr::null());
static mut IDT: Page<[[u64; 2]; 256]> = Page([[0; 2]; 256]);

/// Page tables entry: present, writable, user.
pub const TABLE: u64 = 0x7;
/// The same for a 2 MiB page.
pub const LARGE: u64 = 0x87;
/// A page table of pointers to other statics: addresses are link-time constants.
#[repr(C, align(4096))]
pub struct Table(pub [Entry; 512]);
/// An entry that the linker can compute: address plus flags.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Entry(pub *const u8);
// SAFETY: plain numbers to everyone but the processor.
unsafe impl Sync for Entry {}
const NONE: Entry = Entry(core::ptr::null());

static mut PML4: Table = {
    let mut table = [NONE; 512];
    table[0] = Entry((&raw const PDPT as *const u8).wrapping_add(TABLE as usize));
    Table(table)
};
/// The first 512 GiB, an entry each GiB; `memory::map` fills in what is not there at the start.
pub static mut PDPT: Table = {
    let mut table = [NONE; 512];
    table[0] = Entry((&raw const LOW as *const u8).wrapping_add(TABLE as usize));
    table[3] = Entry((&raw const DEVICES as *const u8).wrapping_add(TABLE as usize));
    Table(table)
};
static LOW: Page<[u64; 512]> = Page(large_pages(0, LARGE));
/// 3 to 4 GiB: PCI BARs and interrupt controllers, not cached.
static DEVICES: Page<[u64; 512]> = Page(large_pages(3 << 30, LARGE | 0x18));

/// A page directory that maps the GiB at `start` onto itself.
pub const fn large_pages(start: u64, flags: u64) -> [u64; 512] {
    let mut entries = [0; 512];
    let mut index = 0;
    while index < 512 {
        entries[index] = (start + ((index as u64) << 21)) | flags;
        index += 1;
    }
    entries
}

unsafe extern "C" {
    static vectors: [u8; 4096];
    static trampoline: u8;
    static trampoline_end: u8;
}

/// The command line that the start info at `info` points at; `None` if it is not UTF-8.
pub fn command_line(info: usize) -> Option<&'static str> {
    let text = read::<u64>(info + 24) as *const c_char;
    if text.is_null() {
        return Some("");
    }
    // SAFETY: the boot ABI gives a terminated string, and nothing here changes it.
    unsafe { CStr::from_ptr(text) }.to_str().ok()
}

/// Fills the interrupt table: ring-0 interrupt gates.
pub fn init_vectors() {
    for vector in 0..256 {
        let handler = &raw const vectors as u64 + vector as u64 * 16;
        let low = (handler & 0xffff) | (0x08 << 16) | (0x8e00 << 32) | ((handler >> 16 & 0xffff) << 48);
        // SAFETY: once, on one vCPU, before any interrupt is enabled.
        unsafe { (&raw mut IDT.0[vector]).write([low, handler >> 32]) };
    }
}

/// Puts the start-up code of the other vCPUs in place.
pub fn install_trampoline() {
    let (from, to) = (&raw const trampoline, &raw const trampoline_end);
    // SAFETY: the page is RAM on every machine this image runs on, and nothing else uses it.
    unsafe { core::ptr::copy_nonoverlapping(from, TRAMPOLINE as *mut u8, to as usize - from as usize) };
}

fn gate(function: u32, value: u64, msr: u32) {
    // SAFETY: the gate preserves what the clobbers do not name; it returns (or never does).
    unsafe {
        asm!("call gate_instruction", inout("eax") function => _, in("rdi") value, in("ecx") msr, out("rdx") _);
    }
}

/// Stops this vCPU for good.
pub fn halt() -> ! {
    loop {
        gate(GATE_HALT, 0, 0);
    }
}

/// Halts until an interrupt has been taken. Interrupts are taken nowhere else, so a check before it cannot race.
pub fn wait_for_interrupt() {
    gate(GATE_WAIT, 0, 0);
}

/// Writes a model-specific register.
pub fn wrmsr(msr: u32, value: u64) {
    gate(GATE_WRMSR, value, msr);
}

/// Takes the interrupt table away and faults.
pub fn triple_fault() -> ! {
    gate(GATE_NO_IDT, 0, 0);
    // SAFETY: there is no handler; the vCPU shuts down.
    unsafe { asm!("ud2", options(noreturn)) }
}

/// Interrupts taken on `vector` so far.
pub fn interrupts(vector: u8) -> u64 {
    INTERRUPTS[usize::from(vector)].load(Ordering::Relaxed)
}
