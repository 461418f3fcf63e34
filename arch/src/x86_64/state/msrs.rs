//! Model-specific registers: which there are on this host, their values, and what a refused one means. Knows no other register.

use super::{StateError, read, set};
use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

pub(super) const IA32_TSC: u32 = 0x10;
const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// Registers that KVM has without listing them, and of which a guest would lose what it has set since its start: machine
/// check banks' control, the MTRRs, and AMD's decode configuration, by which kernels make LFENCE serialise.
fn unlisted() -> impl Iterator<Item = u32> {
    let machine_check = (0..32).map(|bank| 0x400 + 4 * bank);
    let mtrrs = [0x250, 0x258, 0x259, 0x2ff].into_iter().chain(0x268..=0x26f).chain(0x200..=0x20f);
    machine_check.chain(mtrrs).chain([0xc001_1029])
}

/// Hyper-V's registers: no guest here is told that they are there, and reading one makes KVM emulate them from then on.
const HYPERV: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_01ff;

/// One register and its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    /// Which.
    pub index: u32,
    /// What is in it.
    pub value: u64,
}

/// The registers that make up a vCPU's state on this host, found once: KVM stops at the first that it refuses, so that trying
/// must not happen while a guest stands still.
///
/// Which of them can be set is the target's to say, and it does when it restores.
#[derive(Clone, Debug)]
pub struct MsrPlan {
    /// As KVM takes them, at most so many a call as it takes. The TSC is not among them: it goes by itself, with its time.
    chunks: Vec<Msrs>,
}

impl MsrPlan {
    /// Tries each register that KVM has by reading it from `vcpu`, whose CPUID is set. The vCPU does not change.
    ///
    /// # Errors
    /// When KVM does not tell which registers it has.
    pub fn find(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Self, StateError> {
        let listed = kvm.get_msr_index_list().map_err(read("the list of MSRs"))?;
        let mut wanted = Vec::new();
        for index in listed.as_slice().iter().copied().chain(unlisted()) {
            if index != IA32_TSC && !wanted.contains(&index) && !HYPERV.contains(&index) {
                wanted.push(index);
            }
        }
        let (mut readable, mut refused, mut rest) = (Vec::new(), Vec::new(), wanted.as_slice());
        while !rest.is_empty() {
            let mut asked = chunk(rest.iter().map(|index| Msr { index: *index, value: 0 }))?;
            let done = vcpu.get_msrs(&mut asked).map_err(read("MSRs"))?;
            let (good, others) = rest.split_at(done.min(rest.len()));
            readable.extend_from_slice(good);
            rest = others;
            if let Some((bad, others)) = rest.split_first().filter(|_| done < asked.as_slice().len()) {
                refused.push(*bad);
                rest = others;
            }
        }
        if !refused.is_empty() {
            log::debug!("KVM lists MSRs that it does not read, and they are not saved: {refused:x?}");
        }
        let chunks = readable.chunks(KVM_MAX_MSR_ENTRIES);
        let chunks = chunks.map(|part| chunk(part.iter().map(|index| Msr { index: *index, value: 0 })));
        Ok(Self { chunks: chunks.collect::<Result<_, _>>()? })
    }

    /// Which registers are saved.
    pub fn indexes(&self) -> impl Iterator<Item = u32> {
        self.chunks.iter().flat_map(|chunk| chunk.as_slice()).map(|entry| entry.index)
    }

    /// Those of `indexes` that a vCPU does not have here.
    pub fn lacks(&self, indexes: &[u32]) -> Vec<u32> {
        indexes.iter().copied().filter(|index| !self.indexes().any(|here| here == *index)).collect()
    }

    /// Those of the registers `among` that hold anything in `vcpu`, which stands still: what a host without them cannot take.
    ///
    /// # Errors
    /// What KVM does not read.
    pub fn used(&self, vcpu: &VcpuFd, among: &[u32]) -> Result<Vec<Msr>, StateError> {
        let mut values = self.read(vcpu)?;
        values.retain(|msr| msr.value != 0 && among.contains(&msr.index));
        Ok(values)
    }

    /// The value of each register.
    pub(super) fn read(&self, vcpu: &VcpuFd) -> Result<Vec<Msr>, StateError> {
        let mut values = Vec::new();
        for chunk in &self.chunks {
            let mut chunk = chunk.clone();
            let done = vcpu.get_msrs(&mut chunk).map_err(read("MSRs"))?;
            if let Some(refused) = chunk.as_slice().get(done) {
                return Err(StateError::Value(format!("KVM no longer reads MSR {:#x}", refused.index)));
            }
            values.extend(chunk.as_slice().iter().map(|entry| Msr { index: entry.index, value: entry.data }));
        }
        Ok(values)
    }
}

/// Sets `msrs`, the TSC deadline last: it arms a timer, and only if the local APIC is in that mode and the TSC is there.
///
/// A register that KVM refuses is an error unless it has that value anyway, or KVM does not know it and it holds 0: a
/// register that a guest has never used.
pub(super) fn restore(vcpu: &VcpuFd, msrs: &[Msr]) -> Result<(), StateError> {
    let (last, mut ordered): (Vec<_>, Vec<_>) = msrs.iter().partition(|msr| msr.index == IA32_TSC_DEADLINE);
    ordered.extend(last);
    let mut rest = ordered.as_slice();
    while !rest.is_empty() {
        let chunk = chunk(rest.iter().copied())?;
        let done = vcpu.set_msrs(&chunk).map_err(set("MSRs"))?;
        rest = rest.get(done..).unwrap_or_default();
        if let Some((refused, others)) = rest.split_first().filter(|_| done < chunk.as_slice().len()) {
            accept_refusal(vcpu, *refused)?;
            rest = others;
        }
    }
    Ok(())
}

fn accept_refusal(vcpu: &VcpuFd, msr: Msr) -> Result<(), StateError> {
    let here = get(vcpu, msr.index)?;
    if here.unwrap_or(0) != msr.value {
        return Err(StateError::Msr { index: msr.index, saved: msr.value, here });
    }
    log::debug!("KVM does not set MSR {:#x}, which has its value {:#x} anyway", msr.index, msr.value);
    Ok(())
}

/// One register's value; `None` if KVM refuses it.
pub(crate) fn get(vcpu: &VcpuFd, index: u32) -> Result<Option<u64>, StateError> {
    let mut chunk = chunk([Msr { index, value: 0 }])?;
    let done = vcpu.get_msrs(&mut chunk).map_err(read("an MSR"))?;
    Ok(chunk.as_slice().first().filter(|_| done == 1).map(|entry| entry.data))
}

/// As many of `msrs` as KVM takes in one call.
fn chunk(msrs: impl IntoIterator<Item = Msr>) -> Result<Msrs, StateError> {
    let entries: Vec<_> = msrs
        .into_iter()
        .take(KVM_MAX_MSR_ENTRIES)
        .map(|msr| kvm_msr_entry { index: msr.index, data: msr.value, ..Default::default() })
        .collect();
    Msrs::from_entries(&entries).map_err(|_| StateError::Value("the list of MSRs is too long".to_owned()))
}
