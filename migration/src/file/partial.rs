//! A file under a temporary name beside its own: it gets its name when it is whole and on the disk, or it goes away. What a killed
//! process leaves is swept by the next that writes a file of that name there.

use super::{Error, sys};
use rustix::fs::{self, AtFlags, Dir, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// See the module.
pub(super) struct Partial {
    pub file: File,
    path: PathBuf,
    /// The folder, so that nothing is found elsewhere when it is renamed meanwhile.
    folder: File,
    name: OsString,
    temporary: OsString,
    overwrite: bool,
}

impl Partial {
    /// A new, empty file that only its owner can read: `.NAME.XXXXXX.partial`.
    pub fn create(path: &Path, overwrite: bool) -> Result<Self, Error> {
        let name =
            path.file_name().ok_or_else(|| Error::io("creating the file")(io::ErrorKind::InvalidInput.into()))?;
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let folder = File::open(parent).map_err(Error::io("opening the folder"))?;
        if !overwrite && fs::statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
            return Err(Error::exists(path));
        }
        sweep(&folder, name);
        let (temporary, file) = make(&folder, name).map_err(Error::io("creating the file"))?;
        Ok(Self { file, path: path.to_owned(), folder, name: name.to_owned(), temporary, overwrite })
    }

    /// The file opened once more, for writing past the page cache; `None` where the file system does not do that.
    pub fn direct(&self) -> Option<File> {
        let flags = OFlags::WRONLY | OFlags::DIRECT | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        fs::openat(&self.folder, &self.temporary, flags, Mode::empty()).ok().map(File::from)
    }

    /// Bytes that the file system has for us; `None` where it cannot say.
    pub fn free_bytes(&self) -> Option<u64> {
        let free = fs::fstatvfs(&self.file).ok().filter(|free| free.f_blocks > 0)?;
        Some(free.f_bavail.saturating_mul(free.f_frsize))
    }

    /// Gives the file its name, once all of it is on the disk.
    pub fn publish(&self) -> Result<(), Error> {
        self.file.sync_all().map_err(Error::io("writing the file to the disk"))?;
        self.rename().map_err(|errno| match errno {
            Errno::EXIST if !self.overwrite => Error::exists(&self.path),
            errno => Error::io("naming the file")(errno.into()),
        })?;
        if let Err(error) = sys::unlock(&self.file) {
            log::debug!("{} stays locked until it is closed: {error}", self.path.display());
        }
        let written = match fs::fsync(&self.folder) {
            // A file system that writes no folder by itself.
            Ok(()) | Err(Errno::INVAL) => Ok(()),
            Err(errno) => Err(Error::io("writing the folder to the disk")(errno.into())),
        };
        written.and_then(|()| self.find()).inspect_err(|_| {
            let _ = fs::unlinkat(&self.folder, &self.name, AtFlags::empty());
        })
    }

    /// Sees that others find the file: its volume may have been unmounted, or its folder moved, since it was made.
    fn find(&self) -> Result<(), Error> {
        let attempt = "finding the file under its name";
        let (here, there) = fs::fstat(&self.file)
            .and_then(|here| Ok((here, fs::statat(fs::CWD, &self.path, AtFlags::SYMLINK_NOFOLLOW)?)))
            .map_err(|errno| Error::io(attempt)(errno.into()))?;
        match (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino) {
            true => Ok(()),
            false => Err(Error::io(attempt)(io::ErrorKind::NotFound.into())),
        }
    }

    fn rename(&self) -> Result<(), Errno> {
        let (folder, from, to) = (&self.folder, &self.temporary, &self.name);
        if self.overwrite {
            return fs::renameat(folder, from, folder, to);
        }
        match fs::renameat_with(folder, from, folder, to, RenameFlags::NOREPLACE) {
            // NFS, for one: a second name, then the first goes away with `self`.
            Err(Errno::INVAL | Errno::NOSYS) => fs::linkat(folder, from, folder, to, AtFlags::empty()),
            result => result,
        }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // It is gone already when it has its name.
        let _ = fs::unlinkat(&self.folder, &self.temporary, AtFlags::empty());
    }
}

/// How often a new file is made that another process takes for one left behind, in the moment before it is locked.
const ATTEMPTS: u32 = 8;
/// Letters that tell temporary names apart.
const LETTERS: usize = 6;
const SUFFIX: &[u8] = b".partial";

/// A new file, locked as long as it is open under its temporary name. A file system without locks has nobody who sweeps.
fn make(folder: &File, name: &OsStr) -> io::Result<(OsString, File)> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    for _ in 0..ATTEMPTS {
        let temporary = temporary(name)?;
        let file = File::from(fs::openat(folder, &temporary, flags, Mode::RUSR | Mode::WUSR)?);
        let is_swept = match sys::lock(&file, true) {
            Ok(locked) => !locked || fs::fstat(&file)?.st_nlink == 0,
            Err(_) => false,
        };
        if !is_swept {
            return Ok((temporary, file));
        }
    }
    Err(io::Error::other("each new file is taken away at once"))
}

/// Removes files under temporary names for `name` whose lock nobody holds: their process was killed.
fn sweep(folder: &File, name: &OsStr) {
    let Ok(entries) = Dir::read_from(folder) else { return };
    for entry in entries.flatten() {
        let found = OsStr::from_bytes(entry.file_name().to_bytes());
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let Some(file) =
            is_temporary(found, name).then(|| fs::openat(folder, found, flags, Mode::empty()).ok()).flatten()
        else {
            continue;
        };
        if sys::lock(&File::from(file), true).is_ok_and(|locked| locked) {
            match fs::unlinkat(folder, found, AtFlags::empty()) {
                Ok(()) => log::info!("removed {}, left by a process that was killed", found.display()),
                Err(errno) => log::warn!("{}, left by a process that was killed, stays: {errno}", found.display()),
            }
        }
    }
}

/// Whether `found` is what [`temporary`] makes of `name`.
fn is_temporary(found: &OsStr, name: &OsStr) -> bool {
    let letters = found.as_bytes().strip_prefix(b".").and_then(|rest| rest.strip_prefix(name.as_bytes()));
    let letters = letters.and_then(|rest| rest.strip_prefix(b".")).and_then(|rest| rest.strip_suffix(SUFFIX));
    letters.is_some_and(|letters| letters.len() == LETTERS && letters.iter().all(u8::is_ascii_lowercase))
}

fn temporary(name: &OsStr) -> io::Result<OsString> {
    let mut random = [0u8; LETTERS];
    getrandom(&mut random, GetRandomFlags::empty())?;
    let mut temporary = OsString::from(".");
    temporary.push(name);
    temporary.push(".");
    temporary.push(random.map(|byte| char::from(b'a' + byte % 26)).iter().collect::<String>());
    temporary.push(OsStr::from_bytes(SUFFIX));
    Ok(temporary)
}
