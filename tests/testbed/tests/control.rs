//! The control: QEMU boots the guest's kernel and initramfs on this machine, so a failure elsewhere is not theirs.

use std::time::Duration;
use sterna_testbed::{Control, Files, Result};

const LIMIT: Duration = Duration::from_secs(180);

#[test]
fn qemu_boots_the_same_kernel_and_initramfs() -> Result<()> {
    for elf in [false, true] {
        let mut guest = Control { elf, ..Control::default() }.start(&Files::new())?.ready(LIMIT)?;
        assert_eq!(guest.check("nproc", LIMIT)?, "2");
        let clock = guest.check("guest-tool clock", LIMIT)?;
        assert!(clock.starts_with("realtime="), "{clock}");
        let output = guest.run("echo partial; printf end; exit 5", LIMIT)?;
        assert_eq!((output.status, output.stdout.as_str()), (5, "partial\nend"));
        guest.start("poweroff -f")?;
        assert_eq!(guest.console().wait(LIMIT)?.status, 0);
    }
    Ok(())
}
