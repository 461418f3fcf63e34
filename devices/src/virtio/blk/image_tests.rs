//! Images that cannot be used, by name; locks between processes.

use super::super::testing::scratch;
use super::*;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};

fn refused(path: &Path, readonly: bool, direct: bool) -> String {
    let error = Image::open(path, readonly, direct).unwrap_err();
    let source = std::error::Error::source(&error).map_or_else(String::new, |source| format!(": {source}"));
    format!("{error}{source}").replace(&path.display().to_string(), "PATH")
}

#[test]
fn what_is_no_disk_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing");
    assert_eq!(refused(&missing, false, true), "cannot open disk image PATH: No such file or directory (os error 2)");
    assert_eq!(refused(directory.path(), true, true), "disk image PATH is a directory, not a file or block device");
    let fifo = directory.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let special = "disk image PATH is a special file, not a file or block device";
    assert_eq!(refused(&fifo, true, false), special);
    assert_eq!(refused(Path::new("/dev/null"), false, true), special);
}

#[test]
fn sizes_that_are_no_disk_are_refused() {
    for direct in [true, false] {
        let path = scratch();
        let cut = |size| fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(size).unwrap();
        cut(511);
        assert_eq!(refused(&path, false, direct), "disk image PATH has 511 bytes, less than a sector of 512");
        cut(0);
        assert_eq!(refused(&path, false, direct), "disk image PATH has 0 bytes, less than a sector of 512");
        cut(4097);
        let unit = if direct { Image::open(&scratch(), true, true).unwrap().alignment().offset.max(512) } else { 512 };
        let ragged =
            format!("disk image PATH has 4097 bytes, not a multiple of {unit}: grow it with `truncate -s %{unit}`");
        assert!(refused(&path, false, direct).starts_with(&ragged));
        // The lock went with the refusal.
        cut(8192);
        assert_eq!(Image::open(&path, false, direct).unwrap().size_bytes(), 8192);
    }
}

#[test]
fn no_permission_is_said() {
    let path = scratch();
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o444)).unwrap();
    if rustix::process::geteuid().is_root() {
        // Root may open anything, but nobody may write to a file being executed.
        let program = path.parent().unwrap().join(format!("sleep-{}", std::process::id()));
        fs::copy("/bin/sleep", &program).unwrap();
        let mut child = Command::new(&program).arg("60").spawn().unwrap();
        let message = refused(&program, false, false);
        child.kill().unwrap();
        child.wait().unwrap();
        fs::remove_file(&program).unwrap();
        assert_eq!(message, "cannot open disk image PATH: Text file busy (os error 26)");
    } else {
        assert_eq!(refused(&path, false, false), "cannot open disk image PATH: Permission denied (os error 13)");
    }
}

#[test]
fn a_filesystem_without_o_direct_is_told_apart() {
    // procfs has regular files, and refuses O_DIRECT.
    let message = refused(Path::new("/proc/self/maps"), true, true);
    let expected =
        "the filesystem of disk image PATH refuses O_DIRECT: use direct=off to go through the host's page cache";
    assert_eq!(message, format!("{expected}: Invalid argument (os error 22)"));
}

#[test]
fn alignment_is_tried_out_where_the_kernel_does_not_tell() {
    // tmpfs takes O_DIRECT since Linux 6.6 and says nothing of alignment; before, it refuses.
    let mut file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    file.write_all(&[0; 8192]).unwrap();
    match Image::open(file.path(), false, true) {
        Ok(image) => assert_eq!(image.alignment(), Alignment { memory: 512, offset: 512 }),
        Err(error) => assert!(matches!(error, ImageError::Direct { .. }), "{error}"),
    }
}

#[test]
fn two_readers_share_an_image_and_a_writer_has_it_alone() {
    let path = scratch();
    let reader = Image::open(&path, true, false).unwrap();
    let second = Image::open(&path, true, true).unwrap();
    let itself = "disk image PATH is locked by this VM itself: the image is given twice";
    assert_eq!(refused(&path, false, false), itself);
    drop((reader, second));
    let writer = Image::open(&path, false, false).unwrap();
    let clone = writer.clone();
    assert_eq!(refused(&path, true, false), itself);
    drop(writer);
    assert_eq!(refused(&path, false, false), itself);
    drop(clone);
    Image::open(&path, false, true).unwrap();
}

#[test]
fn a_lock_goes_with_its_image_though_a_child_has_the_descriptor() {
    let path = scratch();
    let image = Image::open(&path, false, true).unwrap();
    // As a fork has it until its exec.
    let _of_a_child = image.file().try_clone().unwrap();
    let clone = image.clone();
    drop(image);
    assert!(Image::open_unlocked(&path, false, true).unwrap().is_locked_elsewhere().unwrap(), "a clone keeps it");
    drop(clone);
    Image::open(&path, false, true).unwrap();
}

#[test]
fn a_lock_is_handed_over() {
    let path = scratch();
    let source = Image::open(&path, false, true).unwrap();
    // Opened beside it, as on the host that a VM comes to: it sees the lock, and is refused by name.
    let target = Image::open_unlocked(&path, false, true).unwrap();
    assert!(target.is_locked_elsewhere().unwrap() && !source.is_locked_elsewhere().unwrap());
    assert!(matches!(target.lock(), Err(ImageError::Locked { holder: Holder::Itself, .. })));
    source.lock().unwrap();
    source.flush().unwrap();
    source.unlock().unwrap();
    source.unlock().unwrap();
    assert!(!target.is_locked_elsewhere().unwrap());
    target.lock().unwrap();
    assert!(source.is_locked_elsewhere().unwrap());
    assert!(matches!(source.lock(), Err(ImageError::Locked { .. })));
    // The other image of the same name is not the same file.
    let other = Image::open_unlocked(&scratch(), false, true).unwrap();
    assert!(!other.is_locked_elsewhere().unwrap());
    drop(source);
    assert!(Image::open_unlocked(&path, true, true).unwrap().is_locked_elsewhere().unwrap(), "a reader is kept out");
    drop(target);
    let readers = [(); 2].map(|()| Image::open(&path, true, true).unwrap());
    assert!(!readers[0].is_locked_elsewhere().unwrap(), "readers are not in each other's way");
    assert!(Image::open_unlocked(&path, false, true).unwrap().is_locked_elsewhere().unwrap());
}

#[test]
fn an_image_written_through_the_page_cache_is_told_apart() {
    let path = scratch();
    let cached = |readonly, direct| Image::open(&path, readonly, direct).unwrap().cached();
    assert_eq!([cached(false, false), cached(false, true), cached(true, false)], [true, false, false]);
}

#[test]
fn a_fingerprint_tells_images_apart_and_does_not_depend_on_how_they_are_opened() {
    let path = scratch();
    let digest = |direct| Image::open(&path, true, direct).unwrap().sample().unwrap();
    let first = digest(true);
    assert_eq!(first, digest(false));
    let coarse = Image::open(&path, true, true).unwrap();
    let coarse = coarse.with_alignment(Alignment { memory: 4096, offset: 65536 });
    assert_eq!(first, coarse.sample().unwrap());
    // It is written down by one program and compared by another, so it must not change.
    assert_eq!(first.iter().fold(0, |sum, hash| sum ^ hash), DIGEST);
    drop(coarse);
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    let write = |bytes: &[u8], at| std::os::unix::fs::FileExt::write_all_at(&file, bytes, at).unwrap();
    // Its first, its last and a middle place, one byte each; then its size.
    let mut seen = vec![first];
    for offset in [100, (4 << 20) - 65536 + 4095, 33 * 65536 + 7] {
        write(b"\xfe", offset);
        seen.push(digest(true));
    }
    file.set_len(8 << 20).unwrap();
    seen.push(digest(true));
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), 5);
    for length in [512, 4096, 4608, 65536, 65536 + 512] {
        file.set_len(length).unwrap();
        seen.push(Image::open(&path, true, false).unwrap().sample().unwrap());
    }
    seen.sort_unstable();
    seen.dedup();
    // 4096, 4608 and 65536 bytes have the same first 4 KiB and nothing else that is looked at; sizes are compared apart.
    assert_eq!(seen.len(), 8, "small images have one, too");
}

/// That of what [`scratch`] makes.
const DIGEST: u64 = 5_985_838_675_153_420_848;

/// Names the image to the child that [`the_holder_of_a_lock_is_named`] starts of itself.
const HOLD: &str = "STERNA_TEST_HOLD_IMAGE";
/// Where the lock of a name is to be held, for it to be told.
const NAME: &str = "STERNA_TEST_HOLD_NAME";

#[test]
fn the_holder_of_a_lock_is_named() {
    if let Some(path) = std::env::var_os(HOLD) {
        let _held = Image::open(Path::new(&path), false, true).unwrap();
        let mut name = std::env::var_os(NAME).map(|path| File::create(path).unwrap());
        if let Some(lock) = &mut name {
            writeln!(lock, "{}", std::process::id()).unwrap();
        }
        println!("\nheld");
        // Until the parent closes its end.
        std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
        return;
    }
    let path = scratch();
    // The child has the command name of a VM's process, and in the second run what a VM with a name holds.
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("sterna");
    // A link, not a copy: a file just written may be open for writing in a child that another test has forked.
    std::os::unix::fs::symlink(std::env::current_exe().unwrap(), &program).unwrap();
    let test = "virtio::blk::image::tests::the_holder_of_a_lock_is_named";
    for name in [None, Some("a.b")] {
        let mut child = Command::new(&program);
        child.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(HOLD, path.as_os_str());
        child.envs(name.map(|name| (NAME, directory.path().join(format!("{name}.lock")))));
        let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap() == "held"), "the child ended before it held the image");
        let message = refused(&path, false, false);
        let read_message = refused(&path, true, false);
        drop(child.stdin.take());
        let _rest: Vec<_> = lines.collect();
        assert!(child.wait().unwrap().success());
        let who = name.map_or_else(
            || format!("process {} (sterna)", child.id()),
            |name: &str| format!("VM {name} (sterna, process {})", child.id()),
        );
        assert_eq!(message, format!("disk image PATH is locked by {who}"));
        assert_eq!(read_message, message);
        // Nothing is left of it.
        Image::open(&path, false, false).unwrap();
    }
}
