//! A file under a temporary name beside its own: it gets its name when it is whole and on the disk, or it goes away.

use super::Error;
use rustix::fs::{self, AtFlags, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
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
        let temporary = temporary(name).map_err(Error::io("creating the file"))?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = fs::openat(&folder, &temporary, flags, Mode::RUSR | Mode::WUSR);
        let file = File::from(file.map_err(io::Error::from).map_err(Error::io("creating the file"))?);
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
        match fs::fsync(&self.folder) {
            // A file system that writes no folder by itself.
            Ok(()) | Err(Errno::INVAL) => Ok(()),
            Err(errno) => {
                let _ = fs::unlinkat(&self.folder, &self.name, AtFlags::empty());
                Err(Error::io("writing the folder to the disk")(errno.into()))
            }
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

fn temporary(name: &OsStr) -> io::Result<OsString> {
    let mut random = [0u8; 6];
    getrandom(&mut random, GetRandomFlags::empty())?;
    let mut temporary = OsString::from(".");
    temporary.push(name);
    temporary.push(".");
    temporary.push(random.map(|byte| char::from(b'a' + byte % 26)).iter().collect::<String>());
    temporary.push(".partial");
    Ok(temporary)
}
