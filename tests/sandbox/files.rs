//! Files that are within reach, and those that are not.

use super::{Place, fenced, refused};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use sterna::sandbox::{Plan, Storage, enter};

fn read_write(path: &Path) -> std::io::Result<File> {
    File::options().read(true).write(true).open(path)
}

pub fn storage_is_for_files_and_for_nothing_else(place: &Place) {
    let report = place.enter();
    let disk = place.path("storage", "file");
    let mut file = read_write(&disk).unwrap();
    file.write_all(b"what was WRITTEN").unwrap();
    assert_eq!(fs::read(&disk).unwrap(), b"what was WRITTEN");
    // As a machine is saved beside its disk.
    let (new, saved) = (place.path("storage", "new"), place.path("storage", "saved"));
    File::create(&new).unwrap().set_len(4096).unwrap();
    fs::hard_link(&new, &saved).unwrap();
    fs::remove_file(&new).unwrap();
    assert_eq!(fs::metadata(&saved).unwrap().len(), 4096);
    let outside = place.path("outside", "new");
    fenced(&report, File::create(&outside), &outside);
    // These are refused with or without landlock: no such call is on the list.
    refused(fs::create_dir(place.path("storage", "dir")), libc::EPERM, "mkdir");
    refused(std::os::unix::fs::symlink("/etc/shadow", place.path("storage", "link")), libc::EPERM, "symlink");
}

pub fn records_are_made_renamed_and_removed(place: &Place) {
    place.enter();
    let (new, record) = (place.path("writable", "record.new"), place.path("writable", "record"));
    let mut file = File::create(&new).unwrap();
    file.write_all(b"epoch 7").unwrap();
    file.sync_all().unwrap();
    fs::rename(&new, &record).unwrap();
    // As a saved machine is named on NFS, which refuses the rename that replaces nothing.
    fs::hard_link(&record, &new).unwrap();
    fs::remove_file(&new).unwrap();
    File::open(place.0.join("writable")).unwrap().sync_all().unwrap();
    assert_eq!(fs::read(&record).unwrap(), b"epoch 7");
    fs::write(&record, "epoch 8").unwrap();
    let socket = place.path("writable", "vm.sock");
    std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let names: Vec<_> = fs::read_dir(place.0.join("writable")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(names.len(), 3, "{names:?}");
    names.iter().for_each(|path| fs::remove_file(path).unwrap());
}

pub fn kernels_are_read_only(place: &Place) {
    let report = place.enter();
    let kernel = place.path("readable", "file");
    assert_eq!(fs::read(&kernel).unwrap(), b"what was there");
    fenced(&report, read_write(&kernel), &kernel);
    let new = place.path("readable", "new");
    fenced(&report, File::create(&new), &new);
}

pub fn the_system_is_out_of_reach(place: &Place) {
    let report = place.enter();
    for path in ["/etc/shadow", "/etc/hostname", "/usr/bin", "/root", "/proc/kallsyms", "/proc/sys/kernel/hostname"] {
        fenced(&report, File::open(path), Path::new(path));
    }
    let outside = place.path("outside", "file");
    fenced(&report, File::open(&outside), &outside);
    // What is not there is told apart from what may not be seen.
    refused(File::open("/not-there"), libc::ENOENT, "/not-there");
    for path in ["/dev/null", "/dev/urandom"] {
        read_write(Path::new(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    }
}

pub fn without_a_list_all_data_is_storage(place: &Place) {
    // The root's own disk, by whatever name.
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let source = |line: &str| line.split(" - ").nth(1)?.split(' ').nth(1).map(str::to_owned);
    let mounted: Vec<_> = mounts.lines().filter_map(source).filter(|path| path.starts_with("/dev/")).collect();
    let report = enter(&Plan { storage: Storage::FilesAndDevices, ..place.plan() }).unwrap();
    read_write(&place.path("outside", "file")).unwrap().write_all(b"written").unwrap();
    File::create(place.path("outside", "new")).unwrap();
    for path in ["/etc/shadow", "/usr/bin", "/proc/kallsyms"] {
        fenced(&report, File::open(path), Path::new(path));
    }
    for path in mounted.iter().map(Path::new).filter(|path| path.exists()) {
        fenced(&report, File::open(path), path);
    }
    // No device but a disk, however it is called.
    let device = Path::new("/dev/kmsg");
    if device.exists() {
        fenced(&report, File::options().write(true).open(device), device);
    }
}

pub fn a_running_machine_reaches_files_and_no_device(place: &Place) {
    let disks: Vec<_> =
        fs::read_dir("/dev").unwrap().flatten().filter(|e| e.file_type().unwrap().is_block_device()).collect();
    let report = enter(&Plan { storage: Storage::Files, ..place.plan() }).unwrap();
    File::create(place.path("outside", "saved")).unwrap();
    fenced(&report, File::open("/etc/shadow"), Path::new("/etc/shadow"));
    for disk in disks {
        fenced(&report, File::open(disk.path()), &disk.path());
    }
}

pub fn proc_shows_this_process_and_no_other(place: &Place) {
    let parent = std::os::unix::process::parent_id();
    let report = place.enter();
    for name in ["statm", "status", "pagemap", "maps", "cmdline"] {
        // One entry of a page map.
        let mut bytes = [0; 8];
        File::open(format!("/proc/self/{name}")).unwrap().read_exact(&mut bytes).unwrap();
    }
    assert_eq!(fs::read_dir("/proc/self/task").unwrap().count(), 1);
    assert!(fs::read_dir("/proc/self/fd").unwrap().count() >= 3);
    assert!(fs::read_to_string("/proc/meminfo").unwrap().contains("MemTotal"));
    // The search for whoever holds a lock finds nobody, and does no more than that.
    let descriptors = format!("/proc/{parent}/fdinfo");
    for path in ["/proc", &descriptors, &format!("/proc/{parent}/environ"), &format!("/proc/{parent}/mem")] {
        fenced(&report, File::open(path), Path::new(path));
    }
}
