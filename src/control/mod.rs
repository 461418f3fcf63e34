//! Control of a running machine: the contract with it, the protocol, and both ends of the socket.

pub mod client;
#[cfg(test)]
pub mod fake;
pub mod lines;
pub mod machine;
pub mod movement;
pub mod protocol;
pub mod server;
