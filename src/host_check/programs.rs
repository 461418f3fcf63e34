//! What a stock kernel does in ring 0 before it reaches user space, as a few bytes of machine code each.
//!
//! A program starts in 64-bit mode with RSI at 4 KiB of zeroed memory and ends with `hlt`. There is no interrupt table:
//! an exception shuts the vCPU down.

/// A bit in ECX of CPUID leaf 1; a kernel uses the instruction only when it is set.
pub const CX16: u32 = 1 << 13;
/// The same for XSAVE.
pub const XSAVE: u32 = 1 << 26;

/// One thing to run.
pub struct Program {
    /// What is proven when it ends.
    pub name: &'static str,
    /// Features of CPUID.1:ECX without which no kernel does this.
    pub needs: u32,
    /// Machine code.
    pub code: &'static [u8],
}

/// Programs, in about the order in which a booting kernel does these things.
pub const PROGRAMS: [Program; 8] = [
    Program {
        name: "far return (LRETQ)",
        needs: 0,
        // mov eax, 0x08; push rax; lea rax, [rip + 3]; push rax; lretq; hlt
        code: &[0xb8, 0x08, 0x00, 0x00, 0x00, 0x50, 0x48, 0x8d, 0x05, 0x03, 0x00, 0x00, 0x00, 0x50, 0x48, 0xcb, 0xf4],
    },
    Program {
        name: "model-specific registers and SWAPGS",
        needs: 0,
        // mov ecx, 0xc0000102; mov eax, 0x1000; xor edx, edx; wrmsr; rdmsr; swapgs; cmp eax, 0x1000; je +2; ud2; hlt
        code: &[
            0xb9, 0x02, 0x01, 0x00, 0xc0, 0xb8, 0x00, 0x10, 0x00, 0x00, 0x31, 0xd2, 0x0f, 0x30, 0x0f, 0x32, 0x0f, 0x01,
            0xf8, 0x3d, 0x00, 0x10, 0x00, 0x00, 0x74, 0x02, 0x0f, 0x0b, 0xf4,
        ],
    },
    Program {
        name: "control registers and INVLPG",
        needs: 0,
        // mov rax, cr4; xor rax, 0x80; mov cr4, rax; mov rax, cr3; mov cr3, rax; invlpg [rsi]; hlt
        code: &[
            0x0f, 0x20, 0xe0, 0x48, 0x35, 0x80, 0x00, 0x00, 0x00, 0x0f, 0x22, 0xe0, 0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8,
            0x0f, 0x01, 0x3e, 0xf4,
        ],
    },
    Program {
        name: "FPU and SSE in ring 0",
        needs: 0,
        // fninit; ldmxcsr [rip + 12]; pxor xmm0, xmm0 (twice); movaps [rsi], xmm0; hlt; 1f80h
        code: &[
            0xdb, 0xe3, 0x0f, 0xae, 0x15, 0x0c, 0x00, 0x00, 0x00, 0x66, 0x0f, 0xef, 0xc0, 0x66, 0x0f, 0xef, 0xc0, 0x0f,
            0x29, 0x06, 0xf4, 0x80, 0x1f, 0x00, 0x00,
        ],
    },
    Program {
        name: "XSETBV",
        needs: XSAVE,
        // xor ecx, ecx; xgetbv; or eax, 3; xsetbv; hlt
        code: &[0x31, 0xc9, 0x0f, 0x01, 0xd0, 0x83, 0xc8, 0x03, 0x0f, 0x01, 0xd1, 0xf4],
    },
    Program {
        name: "XSAVE and XRSTOR",
        needs: XSAVE,
        // xor edx, edx; mov eax, 3; xsave [rsi]; xrstor [rsi]; hlt
        code: &[0x31, 0xd2, 0xb8, 0x03, 0x00, 0x00, 0x00, 0x0f, 0xae, 0x26, 0x0f, 0xae, 0x2e, 0xf4],
    },
    Program {
        name: "CMPXCHG16B",
        needs: CX16,
        // xor eax, eax; xor edx, edx; xor ebx, ebx; xor ecx, ecx; lock cmpxchg16b [rsi]; je +2; ud2; hlt
        code: &[
            0x31, 0xc0, 0x31, 0xd2, 0x31, 0xdb, 0x31, 0xc9, 0xf0, 0x48, 0x0f, 0xc7, 0x0e, 0x74, 0x02, 0x0f, 0x0b, 0xf4,
        ],
    },
    Program {
        name: "CPUID and RDTSC",
        needs: 0,
        // xor eax, eax; cpuid; rdtsc; hlt
        code: &[0x31, 0xc0, 0x0f, 0xa2, 0x0f, 0x31, 0xf4],
    },
];

/// Instructions that `LOOP` executes after its port write, nearly.
pub const LOOP_INSTRUCTIONS: u64 = 2 * 20_000;
/// Writes to a port, so that what starting costs is not timed, then counts down:
/// mov ecx, 20000; out 0x10, al; dec ecx; jnz -4; hlt
pub const LOOP: Program = Program {
    name: "speed of ring 0",
    needs: 0,
    code: &[0xb9, 0x20, 0x4e, 0x00, 0x00, 0xe6, 0x10, 0xff, 0xc9, 0x75, 0xfc, 0xf4],
};
