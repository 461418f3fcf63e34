//! CPU time of processes, from /proc: in ticks of the kernel's clock, usually 10 ms.

/// What all threads of `pid` have used so far, ended ones included; milliseconds.
pub fn cpu_ms(pid: u32) -> f64 {
    fields(&pid.to_string(), 11)
}

/// What all children of this process that have ended used, milliseconds.
pub fn children_cpu_ms() -> f64 {
    fields("self", 13)
}

/// The sum of a user and a system time; fields are counted from the one after the program's name.
fn fields(process: &str, first: usize) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let Some((_, rest)) = text.rsplit_once(") ") else { return f64::NAN };
    let ticks: f64 = rest.split(' ').skip(first).take(2).filter_map(|word| word.parse::<f64>().ok()).sum();
    ticks * 1e3 / rustix::param::clock_ticks_per_second() as f64
}
