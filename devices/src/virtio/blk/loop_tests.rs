//! Block devices: loop devices with blocks of 512 and 4096 bytes on a file. Needs root and loop devices, and fails with
//! a word about it where they are missing.

use super::testing::{DATA, DISK_BYTES, Guest, MODES, Mode, open, pattern, scratch};
use super::*;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempPath;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_WRITE_ZEROES,
};

/// A loop device, gone with the value.
struct Loop {
    device: PathBuf,
    file: TempPath,
}

impl Loop {
    fn new(block_bytes: u32) -> Self {
        let file = scratch();
        let losetup = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &block_bytes.to_string()])
            .arg(&file)
            .output()
            .expect("losetup (package mount) can be run");
        let complaint = String::from_utf8_lossy(&losetup.stderr);
        assert!(losetup.status.success(), "this test needs root and loop devices: {complaint}");
        Self { device: String::from_utf8(losetup.stdout).unwrap().trim().into(), file }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = Command::new("losetup").arg("--detach").arg(&self.device).status();
        assert!(detached.is_ok_and(|status| status.success()), "{} is left behind", self.device.display());
    }
}

fn allocated(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(&fs::metadata(path).unwrap()) * 512
}

#[test]
fn a_block_device_is_a_disk() {
    for (mode, block) in MODES.into_iter().flat_map(|mode| [(mode, 512), (mode, 4096)]) {
        let disk = Loop::new(block);
        let image = open(&disk.device, mode);
        assert_eq!((image.size_bytes(), image.topology().logical), (DISK_BYTES, block), "{mode:?}");
        let mut guest = Guest::new(image, mode);
        let bytes: Vec<u8> = (0..65536u32).map(|byte| ((byte * 13) >> 4) as u8).collect();
        assert_eq!(guest.write(64, DATA, &bytes), 0, "{mode:?} {block}");
        // Part of a block, at an odd address.
        assert_eq!(guest.write(9, DATA + 1, &[9; 512]), 0, "{mode:?} {block}");
        assert_eq!(guest.run(VIRTIO_BLK_T_FLUSH, 0, &[], &[]), 0, "{mode:?} {block}");
        assert_eq!(guest.range(VIRTIO_BLK_T_DISCARD, 2048, 2048, 0), 0, "{mode:?} {block}");
        assert_eq!(guest.range(VIRTIO_BLK_T_WRITE_ZEROES, 4096, 2048, 1), 0, "{mode:?} {block}");
        assert_eq!(guest.range(VIRTIO_BLK_T_WRITE_ZEROES, 6144, 2040, 0), 0, "{mode:?} {block}");
        let (status, back) = guest.read(64, DATA, 65536);
        assert!(status == 0 && back == bytes, "{mode:?} {block}");
        assert_eq!(guest.run(VIRTIO_BLK_T_IN, DISK_BYTES / 512, &[], &[(DATA, 4096)]), 1, "{mode:?} {block}");
        drop(guest);
        let file = fs::read(&disk.file).unwrap();
        assert!(file[64 * 512..][..65536] == bytes, "{mode:?} {block}");
        assert!(file[8 * 512..9 * 512] == pattern(8) && file[9 * 512..10 * 512] == [9; 512], "{mode:?} {block}");
        assert_eq!(file[10 * 512..11 * 512], pattern(10), "{mode:?} {block}");
        assert!(file[4096 * 512..8184 * 512].iter().all(|byte| *byte == 0), "{mode:?} {block}");
        assert_eq!(file[8184 * 512..8185 * 512], pattern(8184), "{mode:?} {block}");
        // The discarded megabyte at least is given back.
        assert!(allocated(&disk.file) <= DISK_BYTES - (1 << 20), "{mode:?} {block}: {}", allocated(&disk.file));
    }
}

#[test]
fn zeroes_on_part_of_a_devices_block_leave_the_rest() {
    let disk = Loop::new(4096);
    let mut guest = Guest::new(open(&disk.device, Mode::Direct), Mode::Direct);
    for unmap in [0, 1] {
        assert_eq!(guest.range(VIRTIO_BLK_T_WRITE_ZEROES, 9, 2, unmap), 0);
    }
    drop(guest);
    let file = fs::read(&disk.file).unwrap();
    assert!(file[9 * 512..11 * 512].iter().all(|byte| *byte == 0));
    assert!(file[8 * 512..9 * 512] == pattern(8) && file[11 * 512..12 * 512] == pattern(11));
}

#[test]
fn a_block_device_is_locked() {
    let disk = Loop::new(512);
    let held = open(&disk.device, Mode::Direct);
    let error = Image::open(&disk.device, true, true).unwrap_err();
    assert!(matches!(error, ImageError::Locked { holder: Holder::Itself, .. }), "{error}");
    drop(held);
    let readers = [(); 2].map(|()| Image::open(&disk.device, true, true).unwrap());
    assert!(matches!(Image::open(&disk.device, false, true).unwrap_err(), ImageError::Locked { .. }));
    drop(readers);
}
