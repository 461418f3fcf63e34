//! The transport as a guest's driver and the event loop see it.

mod hostile;
mod life;
mod machine;
mod registers;
mod state;
