//! A saved machine in a file: a recorded move, whose RAM lies where it can be mapped.
//!
//! | offset | bytes | what |
//! | --- | --- | --- |
//! | 0 | 48 | preamble, purpose *file*; zeros up to 4096 |
//! | 4096 | 4096 | the [`claim`] block: zeros, or when and where the machine was restored |
//! | 8192 | | message frame: [`Saved`], the layout of RAM, the [`Form`] |
//! | | | message frame: the machine's description, which this crate does not look into |
//! | | | state frame, final: the sections; zeros up to the next multiple of 2 MiB |
//! | *data* | | RAM, in place: page n at *data* + n * 4096, holes where a page is absent or all zeros |
//! | *table* | 152 each | the [`table`]: for each 4 MiB of RAM with pages in it which they are, and their checksum |
//! | end - 64 | 64 | the end record: counts, checksums of all before *data* and of the table, and that the file is whole |
//!
//! Compressed, RAM is one zstd frame for each entry of the table, of its pages one after the other, in any order between *data* and
//! *table*. What is known only when RAM is written stands behind it, so that the file is written in one go and is not whole until
//! its last 64 bytes are there. A file without them is refused.
//!
//! Checksums are XXH3. Pages are compared with theirs when they are loaded or verified; **a mapped file is not read, so damage in
//! its RAM is found only by [`SavedFile::verify`]**.

mod claim;
mod error;
mod head;
mod lazy;
mod partial;
mod save;
mod saved;
mod store;
mod sys;
mod table;
mod uffd;
mod work;

pub use claim::Claim;
pub use error::Error;
pub use head::{Contents, Form, Saved};
pub use lazy::Lazy;
pub use save::{Figures, Options, save};
pub use saved::{SavedFile, Statistics};
pub use work::Hooks;
